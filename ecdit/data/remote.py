"""Files from elsewhere: by streaming's downloaders for the clouds that it knows, by fsspec for all other URLs."""

import shutil
import time
from pathlib import Path

import fsspec
from fsspec.core import url_to_fs

from ecdit.data.streaming_import import DOWNLOADER_MAPPINGS, CloudDownloader
from ecdit.errors import UserError

ATTEMPTS, PAUSE = 5, 1.0  # the pause in seconds doubles with every attempt
TIMEOUT = 600.0


def file_system(url: str) -> fsspec.AbstractFileSystem:
    """fsspec's. Raises UserError for a protocol that is unknown, or whose package is not installed."""
    try:
        return url_to_fs(url)[0]
    except (ImportError, ValueError) as error:
        raise UserError(f"{url}: {error}; a path, or a URL that fsspec knows, with its package installed") from None


class Unreachable(OSError):
    """A file that could not be fetched."""


def download(url: str, to: Path) -> None:
    """Fetches a file. Raises FileNotFoundError where there is none, Unreachable when all attempts have failed."""
    to.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return _download(url, to)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{url}: there is no such file") from error
        except UserError:
            raise
        except Exception as error:  # every cloud's library has its own
            if attempt == ATTEMPTS:
                raise Unreachable(f"{url}: cannot be fetched: {error}") from error
            time.sleep(PAUSE * 2 ** (attempt - 1))


def _download(url: str, to: Path) -> None:
    scheme = url.partition("://")[0] if "://" in url else "file"
    if scheme == "file":
        shutil.copyfile(url.removeprefix("file://"), to)
    elif scheme in DOWNLOADER_MAPPINGS:
        to.unlink(missing_ok=True)  # streaming takes what is there for what is wanted
        CloudDownloader.direct_download(url, str(to), TIMEOUT)
    else:
        file_system(url).get_file(url, str(to))

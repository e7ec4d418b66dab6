"""Fréchet inception distance (Heusel et al. 2017) to a folder of reference pictures, with the MS-COCO protocol.

The Inception is a TorchScript file, as clean-fid and StyleGAN use it (inception-2015-12-05.pt): it takes (B, 3, R, R)
uint8, resizes by itself as TensorFlow 1 did, and gives features (B, d) when called with return_features=True.

Shapes: `N` pictures of `R` pixels a side, `B` at once, `d` features.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from PIL import Image
from safetensors.numpy import load_file, save_file
from torch import Tensor

from ecdit.data.prepare.picture import centre_square
from ecdit.errors import UserError
from ecdit.evaluate.clip import captions
from ecdit.evaluate.suite import Judgement, Options, Row, device, existing, needed
from ecdit.pictures import read_pixels
from ecdit.prompts import Request
from ecdit.recipe import Recipe

B = 64
TRIED = 32  # pixels a side of what a network is tried on, before any picture is drawn for it


@dataclass(frozen=True)
class Statistics:
    """Of features: their mean (d,), their covariance (d, d), both float64, and how many there were."""

    mean: np.ndarray
    covariance: np.ndarray
    count: int


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """|m_a - m_b|^2 + Tr(C_a + C_b - 2 (C_a C_b)^(1/2)): the squared distance between the Gaussians.

    The trace of the root is the sum of the roots of the product's eigenvalues, which are real and not negative but for
    rounding.
    """
    difference = a.mean - b.mean
    roots = np.sqrt(np.linalg.eigvals(a.covariance @ b.covariance).astype(complex)).real.sum()
    return float(difference @ difference + np.trace(a.covariance) + np.trace(b.covariance) - 2 * roots)


class Inception:
    """The network whose features are compared. Raises UserError for a file that is no TorchScript module, or another
    one than is needed."""

    def __init__(self, file: Path):
        try:
            self._network = torch.jit.load(file, map_location="cpu").eval()
        except RuntimeError:
            raise UserError(
                f"--inception: {file}: no TorchScript module; valid: inception-2015-12-05.pt, as clean-fid downloads it"
            ) from None
        try:
            self.statistics([torch.zeros(2, 3, TRIED, TRIED, dtype=torch.uint8)])
        except RuntimeError as error:
            raise UserError(
                f"--inception: {file}: makes no features of pictures: {str(error).strip().splitlines()[-1]}; valid: "
                "inception-2015-12-05.pt, as clean-fid downloads it"
            ) from None

    @torch.no_grad()
    def statistics(self, batches: Iterable[Tensor]) -> Statistics:
        """Of pictures (B, 3, R, R) uint8. Sums are in float64, so that a batch's size does not matter."""
        self._network.to(device())
        total, products, count = 0.0, 0.0, 0
        for batch in batches:
            features = self._network(batch.to(device()), return_features=True).flatten(1).double().cpu().numpy()
            total, products = total + features.sum(0), products + features.T @ features
            count += len(features)
        mean = total / count
        return Statistics(mean, (products - count * np.outer(mean, mean)) / (count - 1), count)


def reference_statistics(folder: Path, resolution: int, weights: Path, inception: Inception) -> Statistics:
    """Of a folder's pictures, their middles at the resolution of ours; kept in the user's cache under a digest of the
    files' names, sizes and times, the resolution, and the Inception's bytes."""
    files = picture_files(folder)
    digest = xxhash.xxh64(weights.read_bytes())
    for file in files:
        digest.update(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}".encode())
    cache = cache_folder() / f"fid-{digest.hexdigest()}-{resolution}.safetensors"
    if cache.exists():
        kept = load_file(cache)
        return Statistics(kept["mean"], kept["covariance"], int(kept["count"][0]))
    found = inception.statistics(_squares(files, resolution))
    cache.parent.mkdir(parents=True, exist_ok=True)
    aside = cache.with_suffix(f".{os.getpid()}.partial")
    save_file({"mean": found.mean, "covariance": found.covariance, "count": np.array([found.count])}, aside)
    aside.replace(cache)
    return found


def cache_folder() -> Path:
    """Where statistics are kept: XDG's, as other programs have it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ecdit"


def picture_files(folder: Path) -> list[Path]:
    """The files of a folder, sorted, all of which are pictures. Raises UserError where one is not, or there are fewer
    than two."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    for path in files:
        try:
            Image.open(path).close()  # reads the header alone
        except OSError:
            raise UserError(
                f"--reference: {path}: no picture; valid: a folder that holds nothing but pictures"
            ) from None
    if len(files) < 2:
        raise UserError(f"--reference: {folder}: has {len(files)} pictures; valid: a folder of at least two")
    return files


def _squares(files: list[Path], resolution: int) -> Iterator[Tensor]:
    for first in range(0, len(files), B):
        yield torch.stack([_square(path, resolution) for path in files[first : first + B]])


def _square(path: Path, resolution: int) -> Tensor:
    try:
        with Image.open(path) as picture:
            pixels = np.array(centre_square(picture.convert("RGB"), resolution))
    except OSError as error:
        raise UserError(f"--reference: {path}: broken picture: {error}") from None
    return torch.from_numpy(pixels).permute(2, 0, 1)


class FidSuite:
    """See `ecdit.evaluate.suite.Suite`. A picture a caption unless `n` says more."""

    def __init__(self, options: Options, recipe: Recipe):
        self._requests = captions("fid", options)
        if len(self._requests) < 2:
            raise UserError(f"--prompts: {options.prompts}: one picture has no covariance; valid: at least two prompts")
        meaning = "the folder of the real pictures, such as MS-COCO's val2014"
        self._folder = existing("--reference", needed("fid", "--reference", options.reference, meaning), folder=True)
        meaning = "inception-2015-12-05.pt, as clean-fid downloads it"
        self._weights = existing("--inception", needed("fid", "--inception", options.inception, meaning))
        self._resolution = recipe.data.resolution

    def requests(self) -> list[Request]:
        """`n` pictures a caption."""
        return self._requests

    def load(self) -> None:
        """The Inception; the reference's files are looked at, and read when they are needed."""
        self._inception = Inception(self._weights)
        picture_files(self._folder)

    def judge(self, pictures: list[Path]) -> Judgement:
        """All of them against the reference."""
        ours = self._inception.statistics(
            torch.stack([read_pixels(path).permute(2, 0, 1) for path in pictures[first : first + B]])
            for first in range(0, len(pictures), B)
        )
        theirs = reference_statistics(self._folder, self._resolution, self._weights, self._inception)
        summary = {
            "suite": "fid",
            "fid": frechet_distance(ours, theirs),
            "pictures": ours.count,
            "reference": str(self._folder),
            "reference_pictures": theirs.count,
            "inception": str(self._weights),
        }
        return Judgement(summary, [{} for _ in pictures])

    @staticmethod
    def rows(scores: dict[str, Any]) -> list[Row]:
        """The distance; the paper's is of 30,000 pictures, and fewer give a higher one."""
        return [Row("FID", f"{scores['fid']:.2f}", str(scores["pictures"]), "fid")]

"""Asks a program or a piece of our own code something, in a process of its own and with a time limit.

A process that waits in a driver or a dead file system cannot be killed, and whoever waits for its end waits as long:
it is left behind.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryFile

import launcher

PROBE_SECONDS = 180  # importing torch from a network file system takes most
ROOT = Path(launcher.__file__).parents[1]


class NoAnswer(Exception):
    """A program could not be started, or did not end in time."""


def ask(command: list[str], seconds: float, environment: dict[str, str] | None = None) -> tuple[int, str, str]:
    """Exit code, output and errors of a command. Raises NoAnswer."""
    # files, not pipes: a child's child that hangs would keep a pipe open
    with TemporaryFile("w+", errors="replace") as output, TemporaryFile("w+", errors="replace") as errors:
        in_time = True
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                start_new_session=True,
                env=os.environ | (environment or {}),
            )
        except OSError as error:
            raise NoAnswer(f"{command[0]} cannot be started: {error.strerror}") from None
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            in_time = False
        finally:
            left_behind = process.poll() is None and not _kill(process)
        output.seek(0)
        errors.seek(0)
        texts = output.read(), errors.read()
    if not in_time:
        raise NoAnswer(f"no answer within {seconds:g} s" + (", and it cannot be killed" if left_behind else ""))
    return process.returncode, *texts


def _kill(process: subprocess.Popen) -> bool:
    """Whether it is gone, and all that it started with it."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(2)
    except ProcessLookupError:
        return True
    except subprocess.TimeoutExpired:
        return False
    return True


def last_line(text: str) -> str:
    """The last line that is not empty: where programs say what went wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


@cache
def probe(name: str, seconds: float = PROBE_SECONDS) -> dict[str, dict]:
    """What `probes.py` finds under a name, part by part; a part that it died or hung in has an "error" alone."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    output, why = "", ""
    command = [sys.executable, "-P", "-m", "launcher.doctor.probes", name]
    with TemporaryFile("w+", dir=None) as told:
        told.close()
    try:
        code, output, errors = ask(command, seconds, {"PYTHONPATH": path})
        why = "" if code == 0 else last_line(errors) or f"exit code {code}"
    except NoAnswer as error:
        why = str(error)
    return _parts(output, why)


def _parts(output: str, why: str) -> Iterator[tuple[str, dict]]:
    raise NotImplementedError(json, output, why)

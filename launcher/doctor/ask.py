"""Asks a program or a piece of our own code something, in a process of its own and with a time limit.

A process that waits in a driver or a dead file system cannot be killed, and whoever waits for its end waits as long:
it is left behind.
"""

import json
import os
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryFile

import launcher
from launcher.doctor.probes import GROUPS

PROBE_SECONDS = 180  # importing torch from a network file system takes most
ROOT = Path(launcher.__file__).parents[1]


class NoAnswer(Exception):
    """A program could not be started, or did not end in time. `output`: what it said until then."""

    def __init__(self, why: str, output: str = ""):
        super().__init__(why)
        self.output = output


def ask(command: list[str], seconds: float, environment: dict[str, str] | None = None) -> tuple[int, str, str]:
    """Exit code, output and errors of a command. Raises NoAnswer."""
    # files, not pipes: what the command has started may hold a pipe open after its end
    with TemporaryFile("w+", errors="replace") as output, TemporaryFile("w+", errors="replace") as errors:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, start_new_session=True,
                env=os.environ | (environment or {}),
            )  # fmt: skip
        except OSError as error:
            raise NoAnswer(f"{command[0]} cannot be started: {error.strerror}") from None
        late, gone = False, True
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            late = True
        finally:  # Ctrl-C as well
            if process.poll() is None:
                gone = _kill(process)
        output.seek(0)
        errors.seek(0)
        said, complained = output.read(), errors.read()
    if late:
        raise NoAnswer(f"no answer within {seconds:g} s" + ("" if gone else "; it cannot be killed either"), said)
    return process.returncode, said, complained


def _kill(process: subprocess.Popen) -> bool:
    """Whether it is gone, with all that it started."""
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
    return ([""] + [line.strip() for line in text.splitlines() if line.strip()])[-1]


@cache
def probe(group: str, seconds: float = PROBE_SECONDS) -> dict[str, dict]:
    """What a group of `probes.py` finds, by probe; {"error": why} for one that fails, dies or hangs."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    code = f"from launcher.doctor.probes import main; main({group!r})"
    try:
        status, output, errors = ask([sys.executable, "-P", "-c", code], seconds, {"PYTHONPATH": path})
        why = last_line(errors) if status > 0 else ""
        why = why or (f"died of signal {-status}" if status < 0 else f"exit code {status}")
    except NoAnswer as error:
        output, why = error.output, str(error)
    return told(output, why, list(GROUPS[group]))


def told(output: str, why: str, names: list[str]) -> dict[str, dict]:
    """A group's output: a line `BEGIN name` before each probe, `FOUND name {...}` after it. why: how it ended."""
    found = {name: {"error": f"not tried: {why}"} for name in names}
    for line in output.splitlines():
        word, _, rest = line.partition(" ")
        name, _, text = rest.partition(" ")
        if name in found and word == "BEGIN":
            found[name] = {"error": why}
        elif name in found and word == "FOUND":
            found[name] = json.loads(text)
    return found

"""The `ecdit` command in a process of its own that need not import torch again: it runs a hundred times in the tests.

A server process has imported what most commands need, and forks for each. Tests of how the command starts, of signals
and of torchrun start a whole interpreter instead.
"""

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from ecdit.cli import main
from tests.ranks import forked

ROOT = Path(__file__).parents[1]
SECONDS = 300


def ecdit(*args, cwd=None):
    """Runs it with so many arguments; its output is text."""
    words, variables = list(map(str, args)), dict(os.environ) | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = forked(_command, words, str(cwd or Path.cwd()), variables, out, err)
        process.join(SECONDS)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(words, SECONDS, out.read_bytes(), err.read_bytes())
        return subprocess.CompletedProcess(words, process.exitcode, out.read_text(), err.read_text())


def _command(words, folder, variables, out, err):
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    torch.set_num_threads(1)
    sys.argv = ["ecdit", *words]
    main()

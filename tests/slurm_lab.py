"""A real SLURM of several nodes on this machine, for tests: started where that is possible, and broken on purpose."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT.parent / "shared/slurm"
SECONDS = 240  # that a job may take, waiting for a restart included


def why_not() -> str | None:
    """Why SLURM cannot be had here; None: it can."""
    if not (SCRIPTS / "start-slurm.sh").exists():
        return f"{SCRIPTS}/start-slurm.sh, which starts a SLURM on one machine, is not there"
    if os.geteuid():
        return "starting a SLURM needs root"
    if not shutil.which("slurmctld") and not shutil.which("apt-get"):
        return "SLURM is not installed, and cannot be without apt-get"
    return None


class Lab:
    """A cluster of `nodes` nodes, and a folder like a clone from which jobs are submitted."""

    def __init__(self, folder: Path, nodes: int):
        self.folder = folder
        self.environment = os.environ | {
            "SLURM_LAB_DIR": f"/tmp/ecdit-lab-{os.getpid()}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        self._script("start-slurm.sh", str(nodes))
        settings = Path(self.environment["SLURM_LAB_DIR"], "env.sh").read_text().removeprefix("export ")
        self.environment |= dict([settings.strip().split("=", 1)])
        (folder / ".venv").symlink_to(sys.prefix)
        (folder / "recipes").symlink_to(ROOT / "recipes")

    def stop(self) -> None:
        """Ends the cluster with its jobs."""
        self._script("stop-slurm.sh")
        shutil.rmtree(self.environment["SLURM_LAB_DIR"], ignore_errors=True)

    def _script(self, name: str, *arguments: str) -> None:
        subprocess.run([SCRIPTS / name, *arguments], env=self.environment, check=True, capture_output=True, timeout=300)

    def __call__(self, *command: str, code: int = 0) -> str:
        """What a command prints, in the clone's folder."""
        if command[0] == "ecdit":
            command = (sys.executable, "-m", "ecdit.cli", *command[1:])
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=SECONDS
        )
        assert done.returncode == code, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    # --------------------------------------------------------------------------------------------------------- looking

    def status(self, run: str) -> dict:
        """What the run's status.json says."""
        with contextlib.suppress(OSError, ValueError):
            return json.loads((self.folder / "runs" / run / "status.json").read_text())
        return {}

    def wait(self, run: str, ready) -> dict:
        """The run's status once `ready(status)` is true, or once the run has ended."""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            status = self.status(run)
            gone = status.get("job") and "JobState=FAILED" in self("scontrol", "show", "job", status["job"])
            assert not gone, f"{run}: its job could not be started"
            if ready(status) or status.get("state") in ("finished", "failed", "cancelled"):
                return status
            time.sleep(0.2)
        raise AssertionError(f"{run}: {self.status(run)}\n{self.log(run)}\n{self('squeue')}")

    def end(self, run: str) -> dict:
        """The status that the run ends with, once its job has gone."""
        status = self.wait(run, lambda _: False)
        deadline = time.monotonic() + 60
        while status.get("job") and self("squeue", "-h", "-j", status["job"]).strip() and time.monotonic() < deadline:
            time.sleep(0.2)
        return status

    def log(self, run: str) -> str:
        """What the run's jobs have said."""
        files = [*self.folder.glob("*.log"), *(self.folder / "runs" / run / "logs").glob("slurm-*.log")]
        return "\n".join(f"--- {file.name}\n{file.read_text()}" for file in files)

    # -------------------------------------------------------------------------------------------------------- breaking

    def lose(self, node: str) -> None:
        """Pulls the plug on a node."""
        self._script("stop-slurm.sh", node)
        self("scontrol", "update", f"nodename={node}", "state=down", "reason=test")

    def boot(self, node: str) -> None:
        """Brings it back."""
        self._script("start-slurm.sh", node)

    def on(self, node: str, *command: str) -> None:
        """Runs a command within a node's namespaces."""
        number = Path(self.environment["SLURM_LAB_DIR"], "pids", node).read_text().split()[0]
        self("nsenter", "-t", number, "-m", "-p", "--", *command)

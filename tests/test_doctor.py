"""The doctor says what is there, survives what is broken, and tells what a lack costs."""

import json
import os
import subprocess
import sys

import pytest

from launcher import doctor
from tests.test_train import ROOT, ecdit


def test_it_examines_this_machine():
    done = ecdit("doctor", "--json")
    found = {one["name"]: one for one in json.loads(done.stdout)}
    broken = [name for name, one in found.items() if one["state"] == "broken"]
    assert done.returncode == bool(broken), done.stderr
    assert found["torch"]["state"] == found["megatron-core"]["state"] == "ok"
    for name in ("Python", "apex", "SLURM", "InfiniBand", "shared memory", "open files", "disk here", "deepspeed"):
        assert found[name]["state"] in ("ok", "missing", "warning"), found[name]
    assert all(one["costs"] for one in found.values() if one["state"] == "missing")


def package(folder, *subfolders):
    for name in ("", *subfolders):
        (folder / "apex" / name).mkdir(parents=True, exist_ok=True)
        (folder / "apex" / name / "__init__.py").write_text("raise SystemExit('executed')")


@pytest.mark.parametrize(
    "subfolders, kind", [(("multi_tensor_apply", "normalization"), "nvidia"), (("lib", "views"), "other")]
)
def test_nvidias_apex_is_told_apart(tmp_path, monkeypatch, subfolders, kind):
    package(tmp_path, *subfolders)
    monkeypatch.syspath_prepend(tmp_path)
    assert doctor.apex_kind() == kind
    assert doctor._apex()[0].state == (doctor.OK if kind == "nvidia" else doctor.WARNING)


def program(folder, name, text):
    file = folder / name
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)


def test_a_driver_that_fails_makes_a_node_broken(tmp_path, monkeypatch):
    program(tmp_path, "nvidia-smi", "echo 'NVIDIA-SMI has failed because it could not reach the driver'; exit 9")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = doctor._gpu()
    assert [one.state for one in found] == [doctor.BROKEN] and "could not reach the driver" in found[0].found


def test_a_driver_without_a_torch_that_fits_is_broken(tmp_path, monkeypatch):
    program(tmp_path, "nvidia-smi", "echo 535.104.05")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = doctor._gpu()
    assert found[0].state == doctor.BROKEN and found[0].found.startswith("driver 535.104.05, but torch")


def test_a_probe_that_hangs_or_dies_is_reported(monkeypatch):
    monkeypatch.setattr(doctor, "PROBE_SECONDS", 1)
    with pytest.raises(RuntimeError, match="no answer within 1 s"):
        doctor.probe("import time; time.sleep(30)")
    with pytest.raises(RuntimeError, match="exit code -6"):
        doctor.probe("import os; os.abort()")


def test_infiniband_ports_are_read(tmp_path):
    for name, state in (("mlx5_0", "4: ACTIVE"), ("mlx5_1", "4: ACTIVE"), ("mlx5_2", "1: DOWN")):
        port = tmp_path / name / "ports/1"
        port.mkdir(parents=True)
        (port / "state").write_text(f"{state}\n")
        (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
    (found,) = doctor._infiniband(tmp_path)
    assert (found.state, found.found) == ("warning", "2 x 400 Gb/sec (4X NDR); down: mlx5_2/1 1: DOWN")
    (found,) = doctor._infiniband(tmp_path / "none")
    assert found.state == "missing"


def test_a_low_limit_of_open_files_is_told_with_its_remedy():
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 8192));"
        "from launcher.doctor import _limits; print(_limits()[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "warning" in done.stdout and "ulimit -n 8192" in done.stdout, done.stderr


def test_slurm_that_does_not_answer_and_slurm_that_is_not_there_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor._slurm()[0].state == "missing"
    for name in ("sbatch", "srun", "squeue", "scontrol"):
        program(tmp_path, name, "exit 0")
    program(tmp_path, "sinfo", "echo 'slurm_load_partitions: Unable to contact slurm controller' >&2; exit 1")
    (found,) = doctor._slurm()
    assert found.state == "warning" and "Unable to contact" in found.found

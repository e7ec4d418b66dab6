"""The doctor says what is there, survives what is broken, and tells what a lack costs."""

import importlib.metadata
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from ecdit import UserError, load_recipe
from launcher import doctor
from launcher.doctor import ask, cluster, gpus, machine, needs, packages
from launcher.doctor.finding import BROKEN, MISSING, OK, WARNING, Finding
from tests.command import ecdit
from tests.test_train import FAILED, ROOT, complaint

QUICKSTART = ROOT / "recipes/quickstart.yaml"
EVERYWHERE = {
    "Python", "torch", "megatron-core", "mosaicml-streaming", "GPU driver", "GPUs", "GPU product", "NCCL",
    "transformer-engine", "FP8", "apex", "torchvision", "triton", "transformers", "diffusers", "deepspeed",
    "DeepSpeed's Adam", "DeepSpeed's disk", "wandb", "requests", "SLURM", "SLURM job", "pyxis", "InfiniBand",
    "shared memory", "open files", "locked memory", "processes", "disk here", "host",
}  # fmt: skip
CPU_BUILD, CUDA_BUILD = {"version": "2.13.0+cpu", "cuda": None}, {"version": "2.11.0+cu130", "cuda": "13.0"}
H200 = "580.95.05, NVIDIA H200, 143771, 0, Disabled, 0, [N/A]"


@pytest.fixture(autouse=True)
def fresh():
    """What one test has asked is not the answer of the next."""
    for asked in (ask.probe, gpus.look):
        asked.cache_clear()


def program(folder, name, text):
    file = folder / name
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)


# ------------------------------------------------------------------------------------------------------- the command


def test_it_examines_this_machine(tmp_path):
    done = ecdit("doctor", "--json", cwd=tmp_path)
    found = {one["name"]: one for one in json.loads(done.stdout)}
    assert set(found) == EVERYWHERE, done.stdout
    assert all(set(one) == {"name", "state", "found", "costs"} for one in found.values())
    assert done.returncode == 0, done.stderr
    for name in ("Python", "torch", "megatron-core", "mosaicml-streaming"):
        assert found[name]["state"] == "ok", found[name]
    assert re.fullmatch(r"\d+ GiB free, \d+ MB/s", found["disk here"]["found"])
    assert all(one["costs"] for one in found.values() if one["state"] != "ok")
    assert not list(tmp_path.iterdir())  # what is written to measure the disk is gone


def test_a_driver_that_hangs_ends_the_command_with_1_and_every_other_line(tmp_path):
    # what it starts holds its output open, as a real one's helpers do
    program(tmp_path, "nvidia-smi", "sleep 300 & sleep 300")
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    code = (
        "import launcher.doctor.gpus; launcher.doctor.gpus.SMI_SECONDS = 1;"
        "import sys; sys.argv = ['ecdit', 'doctor', '--json']; from ecdit.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    found = {one["name"]: one for one in json.loads(done.stdout)}
    assert set(found) == EVERYWHERE and done.returncode == FAILED, done.stderr
    assert (found["GPU driver"]["state"], found["GPU driver"]["found"]) == (
        "broken",
        "nvidia-smi: no answer within 1 s",
    )
    assert "Traceback" not in done.stderr


def test_a_recipe_that_needs_what_is_missing_is_refused_by_its_key():
    said = complaint(ecdit("doctor", "--recipe", QUICKSTART, "train.linears=transformer_engine", "--json"))
    assert "train.linears: transformer_engine needs" in said and "ecdit[te]" in said
    assert "--recipe RECIPE" in complaint(ecdit("doctor", "train.steps=3"))
    assert "nowhere.yaml" in complaint(ecdit("doctor", "--recipe", "nowhere.yaml"))


# ------------------------------------------------------------------------------------------------------ asking others


def test_a_command_that_hangs_is_killed_with_what_it_started(tmp_path):
    began = time.monotonic()
    with pytest.raises(ask.NoAnswer, match=r"no answer within 0\.5 s$") as caught:
        ask.ask(["sh", "-c", f"echo said; sleep 300 & echo $! >{tmp_path}/pid; wait"], 0.5)
    assert time.monotonic() - began < 10 and caught.value.output == "said\n"
    child = int((tmp_path / "pid").read_text())
    for _ in range(50):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    pytest.fail("what it started lives on")


def test_what_cannot_be_started_is_no_answer(tmp_path):
    (tmp_path / "text").write_text("")
    with pytest.raises(ask.NoAnswer, match="Permission denied"):
        ask.ask([str(tmp_path / "text")], 1)


def test_the_probe_that_dies_is_told_from_those_before_it():
    output = 'BEGIN cuda\nFOUND cuda {"available": true}\nBEGIN product\n'
    assert ask.told(output, "died of signal 11", ["cuda", "product", "nccl"]) == {
        "cuda": {"available": True},
        "product": {"error": "died of signal 11"},
        "nccl": {"error": "not tried: died of signal 11"},
    }


def test_a_probe_that_hangs_is_told(monkeypatch, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import time; time.sleep(300)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(machine, "DISK_SECONDS", 1)
    (found,) = machine.disk()
    assert (found.state, found.found) == (WARNING, "not tried: no answer within 1 s")


def test_a_python_that_cannot_start_a_probe_forbids_training(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    found = packages.needed()
    assert [one.state for one in found] == [BROKEN] * 3 and doctor.cannot_train(found)


def test_a_check_that_raises_costs_its_own_line_alone(monkeypatch):
    def limits():
        raise PermissionError("no")

    monkeypatch.setattr(doctor, "CHECKS", [limits, packages.python])
    assert [(one.name, one.state) for one in doctor.examine()] == [("limits", WARNING), ("Python", OK)]


# ----------------------------------------------------------------------------------------------------------- packages


def test_the_ranges_are_those_of_setup():
    text = (ROOT / "setup.py").read_text()
    for one in (*packages.NEEDED, *packages.OPTIONAL, packages.TRANSFORMER_ENGINE):
        assert re.search(rf'"{one.name}(\[\w+\])?{re.escape(one.versions)}"', text), one


@pytest.mark.parametrize(
    "version, state", [("0.16.1", OK), ("0.16.2rc1", OK), ("0.16.0", WARNING), ("0.17.0", WARNING), (None, BROKEN)]
)
def test_a_version_out_of_range_is_warned_of(version, state):
    assert packages.judge(packages.NEEDED[1], version).state == state


def test_a_package_that_cannot_be_imported_is_broken_but_only_a_needed_one_forbids_training():
    torch = packages.judge(packages.NEEDED[0], "2.13.0", "OSError: libcudart.so.13: cannot open shared object file")
    engine = packages.judge(packages.TRANSFORMER_ENGINE, "2.11.0", "ImportError: undefined symbol")
    assert torch.state == engine.state == BROKEN and "libcudart" in torch.found
    assert doctor.cannot_train([torch]) and not doctor.cannot_train([engine])


def make_package(folder, *names, version):
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "__init__.py").write_text("raise SystemExit('executed')")
    information = folder / f"apex-{version}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: apex\nVersion: {version}\n")


NVIDIAS = ("apex", "apex/multi_tensor_apply", "apex/optimizers", "apex/normalization", "apex/contrib")
OTHERS = ("apex", "apex/lib", "apex/models", "apex/forms", "apex/templates")  # a web framework's toolkit


@pytest.mark.parametrize(
    "names, version, state, told",
    [
        ((*NVIDIAS, "amp_C"), "0.1", OK, "NVIDIA's, 0.1, with its kernels"),
        (NVIDIAS, "0.1", WARNING, "NVIDIA's, 0.1, without its kernels"),
        (OTHERS, "0.9.10.dev0", WARNING, "not NVIDIA's but another package of that name, 0.9.10.dev0"),
    ],
)
def test_nvidias_apex_is_told_apart(tmp_path, monkeypatch, names, version, state, told):
    make_package(tmp_path, *names, version=version)
    monkeypatch.syspath_prepend(tmp_path)
    assert importlib.metadata.version("apex") == version
    (found,) = packages.apex()
    assert (found.state, found.found) == (state, told)


# --------------------------------------------------------------------------------------------------------------- GPUs


def smi(folder, monkeypatch, text):
    program(folder, "nvidia-smi", text)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_nvidia_smi_is_read_whatever_it_does_not_tell():
    output = (
        "580.95.05, NVIDIA H200, 143771, 4, Disabled, 0, [N/A]\n"
        "580.95.05, NVIDIA H200, 143771, 70000, Enabled, 2, Yes\n"
        "535.104.05, NVIDIA GeForce RTX 4090, 24564, 1, [N/A], [Not Supported], [N/A]\n"
        "535.104.05, Tesla V100, [Unknown Error], 3\n"
        "WARNING: infoROM is corrupted at gpu 0000:5D:00.0\n"
    )
    assert gpus.cards(output) == [
        gpus.Card("580.95.05", "NVIDIA H200", 143771, 4),
        gpus.Card("580.95.05", "NVIDIA H200", 143771, 70000, mig=True, errors=2, pending=True),
        gpus.Card("535.104.05", "NVIDIA GeForce RTX 4090", 24564, 1),
        gpus.Card("535.104.05", "Tesla V100", None, 3),
    ]


def test_an_old_nvidia_smi_is_asked_for_less(tmp_path, monkeypatch):
    smi(
        tmp_path,
        monkeypatch,
        'case "$1" in *mig*) echo "Field \\"mig.mode.current\\" is not a valid field to query."; exit 2;; esac\n'
        "echo '418.87.01, Tesla V100-SXM2-32GB, 32480, 0'",
    )
    assert gpus.query() == [gpus.Card("418.87.01", "Tesla V100-SXM2-32GB", 32480, 0)]


FAILURE = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."


def card_on_bus(folder, vendor, kind):
    device = folder / "0000:1a:00.0"
    device.mkdir(parents=True)
    (device / "vendor").write_text(f"{vendor}\n")
    (device / "class").write_text(f"{kind}\n")


@pytest.mark.parametrize("kind, state", [("0x030200", BROKEN), ("0x068000", MISSING)])  # a GPU; an NVSwitch bridge
def test_a_driver_that_fails_makes_a_node_with_gpus_broken(tmp_path, monkeypatch, kind, state):
    monkeypatch.delenv("SLURM_JOB_GPUS", raising=False)
    smi(tmp_path, monkeypatch, f'echo "{FAILURE}"; exit 9')
    card_on_bus(tmp_path / "bus", "0x10de", kind)
    found = {one.name: one for one in gpus.gpus(tmp_path / "bus")}
    assert found["GPU driver"].state == state and FAILURE in found["GPU driver"].found
    assert found["NCCL"].state == found["GPU product"].state == MISSING


def test_gpus_without_a_driver_are_seen_on_the_bus(tmp_path):
    card_on_bus(tmp_path, "0x10de", "0x030200")
    assert gpus.on_the_bus(tmp_path) == 1 and gpus.on_the_bus(tmp_path / "none") == 0


@pytest.mark.parametrize(
    "build, driver, hidden, state, told",
    [
        (CPU_BUILD, "580.95.05", None, BROKEN, "torch is built for CPUs"),
        (CUDA_BUILD, "535.104.05", None, BROKEN, "driver 535.104.05 is too old for torch's CUDA 13.0"),
        (CUDA_BUILD, "580.95.05", "", MISSING, "hidden by CUDA_VISIBLE_DEVICES="),
        (CUDA_BUILD, "580.95.05", None, BROKEN, "Error 802: system not yet initialized"),
    ],
)
def test_why_torch_cannot_use_the_gpus(monkeypatch, build, driver, hidden, state, told):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    cards = gpus.cards(H200.replace("580.95.05", driver))
    tried = {"cuda": {"available": False, "why": "Error 802: system not yet initialized", "names": []}}
    found = {one.name: one for one in gpus.judge_cards(cards, build, tried)}
    assert found["GPUs"].state == state and told in found["GPUs"].found
    assert doctor.cannot_train(list(found.values())) == (state == BROKEN)


def test_a_driver_too_old_for_torch_is_told_with_the_one_it_needs(tmp_path, monkeypatch):
    smi(tmp_path, monkeypatch, f"echo '{H200.replace('580.95.05', '535.104.05')}'")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    tried = {"torch": CUDA_BUILD, "cuda": {"available": False, "why": "", "names": []}}
    monkeypatch.setattr(gpus, "probe", lambda group: tried)
    found = {one.name: one for one in gpus.gpus(tmp_path)}
    assert found["GPU driver"].found == "535.104.05"
    assert found["GPUs"].state == BROKEN and "580 or newer" in found["GPUs"].costs


SEEN = {"cuda": {"available": True, "why": "", "names": ["NVIDIA H200"] * 2}}
WELL = SEEN | {"product": {"bad": [], "tried": 2}, "nccl": {"version": "2.28.9"}}


def test_gpus_that_work_are_told_with_their_numbers():
    found = gpus.judge_cards(gpus.cards(f"{H200}\n{H200}"), CUDA_BUILD, WELL)
    assert [(one.name, one.state, one.found) for one in found] == [
        ("GPU driver", OK, "580.95.05, torch for CUDA 13.0"),
        ("GPUs", OK, "2 x NVIDIA H200, 140 GiB each"),
        ("GPU product", OK, "finite, and the same twice, on 2"),
        ("NCCL", OK, "2.28.9"),
        ("copy engines", MISSING, "cuda-bindings is not installed"),
    ]


def test_copy_engines_are_asked_of_several_gpus_alone(monkeypatch):
    monkeypatch.setattr(gpus, "version_of", {"cuda-bindings": "13.0.3"}.get)
    found = gpus.judge_cards(gpus.cards(f"{H200}\n{H200}"), CUDA_BUILD, WELL)
    assert [(one.state, one.found) for one in found if one.name == "copy engines"] == [(OK, "by cuda-bindings 13.0.3")]
    alone = WELL | {"cuda": SEEN["cuda"] | {"names": ["NVIDIA H200"]}}
    assert all(one.name != "copy engines" for one in gpus.judge_cards(gpus.cards(H200), CUDA_BUILD, alone))


@pytest.mark.parametrize(
    "tried, told",
    [
        (SEEN | {"product": {"bad": [1], "tried": 2}}, "wrong on 1"),
        (SEEN | {"product": {"error": "no answer within 180 s"}}, "no answer within 180 s"),
        (SEEN, "wrong on all"),
    ],
)
def test_a_product_that_fails_forbids_training(tried, told):
    found = gpus.judge_cards(gpus.cards(f"{H200}\n{H200}"), CUDA_BUILD, tried)
    assert [one.found for one in found if one.state == BROKEN] == [told] and doctor.cannot_train(found)


def test_an_unhealthy_gpu_is_warned_of_by_its_number():
    bad = "580.95.05, NVIDIA H200, 143771, 70000, Enabled, 2, Yes"
    (row,) = [one for one in gpus.judge_cards(gpus.cards(f"{H200}\n{bad}"), CUDA_BUILD, WELL) if one.name == "GPUs"]
    assert row.state == WARNING and "GPU 0" not in row.costs
    for told in ("has 2 uncorrected", "waits for a reset", "is split by MIG", "has 70000 MiB in use"):
        assert f"GPU 1 {told}" in row.costs, row.costs


@pytest.mark.parametrize(
    "tried, gpu, state, told",
    [
        ({"works": True, "why": ""}, True, OK, "forward and backward"),
        ({"works": False, "why": "Device compute capability 8.9 or higher required"}, True, MISSING, "8.9 or higher"),
        ({"error": "RuntimeError: CUBLAS_STATUS_NOT_SUPPORTED"}, True, WARNING, "CUBLAS_STATUS"),
        ({"error": "RuntimeError: No CUDA GPUs are available"}, False, MISSING, "there is no GPU"),
    ],
)
def test_whether_fp8_works_is_told_with_the_reason(tried, gpu, state, told):
    row, fp8 = gpus.judge_engine("2.11.0", {"transformer-engine": {}, "FP8": tried}, gpu)
    assert row.state == OK and fp8.state == state and told in fp8.found


# ------------------------------------------------------------------------------------------------------------ cluster


def test_slurm_that_is_not_there_does_not_answer_hangs_and_works_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "REACH_SECONDS", 1)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert [one.state for one in cluster.slurm() if one.name != "SLURM job"] == [MISSING, MISSING]
    for name in cluster.PROGRAMS:
        program(tmp_path, name, "echo '      --container-image=[USER@][REGISTRY#]IMAGE[:TAG]|PATH'")
    version = 'if [ "$1" = --version ]; then echo slurm 24.11.3; exit; fi'
    program(tmp_path, "sinfo", f"{version}; echo 'Unable to contact slurm controller' >&2; exit 1")
    found = cluster.slurm()
    assert found[0].state == WARNING and "Unable to contact" in found[0].found
    program(tmp_path, "sinfo", f"{version}; /bin/sleep 100")
    assert cluster.slurm()[0].found == "sinfo: no answer within 1 s"
    program(tmp_path, "sinfo", f"{version}; echo 'batch* 64'; echo 'debug 1'; echo 'debug 3'")
    found = cluster.slurm()
    assert (found[0].state, found[0].found) == (OK, "24.11.3; batch* 64 nodes, debug 4 nodes")
    assert (found[2].name, found[2].state) == ("pyxis", OK)
    program(tmp_path, "srun", "echo Usage")
    assert cluster.slurm()[2].state == MISSING


def test_a_job_is_told_and_one_without_gpus_is_warned_of():
    inside = {"SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": "8", "SLURM_NTASKS": "64"}
    assert cluster.job({}).state == MISSING
    assert cluster.job(inside).state == WARNING
    found = cluster.job(inside | {"SLURM_GPUS_ON_NODE": "8"})
    assert (found.state, found.found) == (OK, "job 77, nodes 8, tasks 64, GPUs here 8")


def ports(folder, *states):
    for number, state in enumerate(states):
        port = folder / f"mlx5_{number}" / "ports/1"
        port.mkdir(parents=True)
        (port / "state").write_text(f"{state}\n")
        (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
        (port / "link_layer").write_text("InfiniBand\n")


def test_infiniband_ports_are_read(tmp_path):
    devices = tmp_path / "devices"
    devices.mkdir()
    (devices / "uverbs0").touch()
    ports(tmp_path / "up", "4: ACTIVE", "4: ACTIVE")
    ports(tmp_path / "partly", "4: ACTIVE", "1: DOWN")
    ports(tmp_path / "down", "1: DOWN")
    expected = {
        "up": (OK, "2 x 400 Gb/sec (4X NDR) InfiniBand"),
        "partly": (WARNING, "1 x 400 Gb/sec (4X NDR) InfiniBand; down: mlx5_1/1 (DOWN)"),
        "down": (WARNING, "no active port; down: mlx5_0/1 (DOWN)"),
        "none": (MISSING, "no adapter"),
    }
    for name, told in expected.items():
        (found,) = cluster.infiniband(tmp_path / name, devices)
        assert (found.state, found.found) == told
    (found,) = cluster.infiniband(tmp_path / "up", tmp_path / "no devices")
    assert found.state == WARNING and "uverbs" in found.found
    (tmp_path / "up/mlx5_0/ports/1/rate").unlink()
    assert "1 x unknown" in cluster.infiniband(tmp_path / "up", devices)[0].found


# ------------------------------------------------------------------------------------------------------------ machine


@pytest.mark.parametrize(
    "limits, told",
    [
        ("(1024, 8192)", "ulimit -n 8192"),
        ("(1024, 2048)", "only an administrator can raise it: 4096"),
        ("(4096, 4096)", "state='ok'"),
    ],
)
def test_a_low_limit_of_open_files_is_told_with_its_remedy(limits, told):
    code = (
        f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, {limits});"
        "from launcher.doctor.machine import limits; print(limits()[0])"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert told in done.stdout and ("warning" in done.stdout) == ("ok" not in told), done.stderr


def test_locked_memory_matters_where_there_is_infiniband(tmp_path):
    code = (
        "import resource, sys, pathlib; resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536));"
        "from launcher.doctor.machine import limits; print(limits(pathlib.Path(sys.argv[1]))[1].state)"
    )
    ports(tmp_path / "there", "4: ACTIVE")
    for place, state in (("there", "warning"), ("none", "ok")):
        command = [sys.executable, "-c", code, str(tmp_path / place)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
        assert done.stdout.strip() == state, done.stderr
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    assert machine.judge_limit("locked memory", unlimited, resource.RLIM_INFINITY, "l", "").state == OK
    raised = machine.judge_limit("locked memory", (65536, resource.RLIM_INFINITY), resource.RLIM_INFINITY, "l", "x")
    assert raised.costs == "x; ulimit -l unlimited"


def test_small_shared_memory_full_and_slow_disks_and_little_memory_are_warned_of(tmp_path):
    assert machine.judge_shared_memory(64 << 20, 64 << 20).state == WARNING  # a container's default
    assert machine.judge_shared_memory(64 << 30, 60 << 30).state == OK
    assert machine.shared_memory(tmp_path / "none")[0].state == MISSING
    assert machine.judge_disk({"free": 500 << 30, "rate": 2e9}).state == OK
    assert machine.judge_disk({"free": 500 << 30, "rate": 2e7}).state == WARNING
    assert machine.judge_disk({"free": 1 << 30, "rate": 2e9}).state == WARNING
    assert machine.judge_host(128, 1 << 40, 1 << 39).state == OK
    assert machine.judge_host(128, 32 << 30, 1 << 40).state == WARNING
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.group_limit(tmp_path) > 1 << 50
    (tmp_path / "memory.max").write_text(f"{8 << 30}\n")
    assert machine.group_limit(tmp_path) == 8 << 30


def test_a_folder_that_cannot_be_written_is_told(monkeypatch):
    monkeypatch.chdir("/proc")  # not even by root
    (found,) = machine.disk()
    assert found.state == WARNING and "/proc" in found.found


# ------------------------------------------------------------------------------------------------------------- recipe


def findings(**states):
    names = {"SLURM": OK} | dict.fromkeys(needs.CHOICES, OK)
    names |= {name.replace("_", "-"): state for name, state in states.items()}
    return [Finding(name, state, "found", "costs") for name, state in names.items()]


@pytest.mark.parametrize(
    "override, lack, key",
    [
        ("train.linears=transformer_engine", {"transformer_engine": MISSING}, "train.linears"),
        ("train.linears=transformer_engine", {"transformer_engine": BROKEN}, "train.linears"),
        ("train.linears=transformer_engine", {"GPUs": MISSING}, "train.linears"),
        ("model.routing=megatron_topk", {"GPUs": MISSING}, "model.routing"),
        ("data.text_encoder=google/flan-t5-xl", {"transformers": MISSING}, "data.text_encoder"),
        ("data.autoencoder=some/vae", {"diffusers": MISSING}, "data.autoencoder"),
        ("log.wandb=pictures", {"wandb": MISSING}, "log.wandb"),
        ("engine=deepspeed", {"deepspeed": MISSING}, "engine"),
        ("cluster.container=image.sqsh", {"pyxis": MISSING}, "cluster.container"),
    ],
)
def test_what_a_recipe_needs_of_what_is_missing(override, lack, key):
    plain, changed = load_recipe(QUICKSTART), load_recipe(QUICKSTART, [override])
    doctor.require(findings(**lack), plain)
    doctor.require(findings(), changed)
    with pytest.raises(UserError, match=rf"^{key}: .* needs"):
        doctor.require(findings(**lack), changed)
    (row,) = [one for one in doctor.for_recipe(findings(**lack), changed) if one.state != OK]
    assert row.costs == f"quickstart needs it ({override.replace('=', ': ')}); costs"
    (row,) = [one for one in doctor.for_recipe(findings(**lack), plain) if one.state != OK]
    assert row.costs == "quickstart does without; costs"


def test_a_disk_for_offload_is_missed():
    keys = [
        "engine=deepspeed",
        "engine_options.zero=3",
        "engine_options.offload_optimizer=nvme",
        "engine_options.nvme=x",
    ]
    lacking = [replace(one, state=MISSING) if one.name == packages.DEEPSPEEDS_DISK else one for one in findings()]
    with pytest.raises(UserError, match=r"^engine_options.offload_optimizer: nvme needs DeepSpeed's disk"):
        doctor.require(lacking, load_recipe(QUICKSTART, ["engine=deepspeed", *keys]))


@pytest.mark.parametrize(
    "found, state, told",
    [
        ({"works": True, "why": ""}, OK, "can be built here, at its first use"),
        ({"works": False, "why": "ninja missing"}, MISSING, "cannot be built: ninja missing"),
        ({"error": "ImportError: no"}, MISSING, "cannot be built: ImportError: no"),
    ],
)
def test_what_deepspeed_builds_is_told(found, state, told):
    one = packages.judge_build("DeepSpeed's Adam", found, "costs")
    assert (one.state, one.found) == (state, told)


def test_a_container_is_not_missed_where_no_jobs_are_submitted_from():
    changed = load_recipe(QUICKSTART, ["cluster.container=image.sqsh"])
    doctor.require(findings(SLURM=MISSING, pyxis=MISSING), changed)

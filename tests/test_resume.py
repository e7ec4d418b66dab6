"""A run goes on: on any other layout, after any kill, from whatever is left of its folder."""

import contextlib
import random
import subprocess
import sys
import time

import pytest
import torch
import torch.multiprocessing as mp

from ecdit.callbacks.metrics import JsonLines, read_metrics
from ecdit.data.prepare import prepare_shapes
from ecdit.recipe_io import load_recipe
from ecdit.train import train
from parallel.checkpoint.folder import committed, newest
from parallel.checkpoint.store import DELAY
from tests.command import ecdit
from tests.ranks import free_port, run_on_ranks, start_ranks
from tests.test_train import ROOT, TINY, complaint, losses

MODEL = [
    "model.layers=4", "model.heads=4", "model.kv_heads=4", "model.experts=8", "model.group_tokens=128",
    "train.batch=16", "train.micro_batch=2", "optimizer.lr=1e-4", "optimizer.schedule=constant", "log.samples=true",
]  # fmt: skip


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume") / "shapes"
    prepare_shapes(folder, count=40, seed=0)
    return folder


def overrides(shapes, *more):
    return [*TINY, f"data.streams=[{{path: {shapes}}}]", *MODEL, *more]


def run(runs, keys):
    """Trains on this rank of a job; the exit code."""
    return train(load_recipe(ROOT / "recipes/quickstart.yaml", keys), runs, [JsonLines()])


# (ranks, keys): each goes on from the one before it, so every neighbouring pair is a save at A and a load at B
CHAIN = [
    (1, []),
    (2, []),
    (2, ["parallel.tensor=2"]),
    (4, ["parallel.tensor=2", "parallel.expert=2", "parallel.sequence=true"]),
    (4, ["parallel.expert=4"]),
    (8, ["parallel.expert=8"]),
    (8, ["parallel.pipeline=2", "parallel.expert=2"]),
    (4, ["parallel.pipeline=2", "parallel.tensor=2"]),
    (4, ["parallel.expert_tensor=2", "parallel.expert=2"]),
    (8, ["parallel.tensor=2", "parallel.expert=4"]),
    (8, []),
    (4, ["parallel.tensor=4", "train.micro_batch=4"]),
    (4, ["parallel.pipeline=4"]),
    (1, []),
]
LEG = 3


def test_a_run_goes_on_over_thirteen_changes_of_layout(shapes, tmp_path):
    for leg, (ranks, layout) in enumerate(CHAIN, 1):
        keys = overrides(shapes, f"train.steps={leg * LEG}", *layout)
        assert run_on_ranks(run, ranks, tmp_path, keys) == [0] * ranks, layout
    steps = len(CHAIN) * LEG
    assert run_on_ranks(run, 1, tmp_path / "undisturbed", overrides(shapes, f"train.steps={steps}")) == [0]
    found = read_metrics(tmp_path / "quickstart/metrics.jsonl")
    expected = read_metrics(tmp_path / "undisturbed/quickstart/metrics.jsonl")
    assert [record["step"] for record in found] == list(range(1, steps + 1))
    for one, other in zip(found, expected, strict=True):
        assert one["sample_ids"] == other["sample_ids"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6), one["step"]


def test_on_the_same_layout_it_goes_on_bitwise(shapes, tmp_path):
    layout = ["parallel.expert=2", "parallel.dispatch_chunks=2"]
    for steps in (3, 6):
        assert run_on_ranks(run, 2, tmp_path, overrides(shapes, f"train.steps={steps}", *layout)) == [0, 0]
    run_on_ranks(run, 2, tmp_path / "undisturbed", overrides(shapes, "train.steps=6", *layout))
    assert_same_run(tmp_path, tmp_path / "undisturbed")


def assert_same_run(one, other):
    assert losses(one / "quickstart") == losses(other / "quickstart")
    a, b = (newest(runs / "quickstart/checkpoints")[0] for runs in (one, other))
    for kind in ("weights", "ema", "square", "momentum"):
        theirs = b.kind(kind)
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in a.kind(kind).items()), kind


def killed_run(shapes, folder, kills, monkeypatch):
    """A run of two ranks that is killed so often, at random moments, and then left in peace."""
    chance = random.Random(0)
    keys = overrides(shapes, "train.steps=40", "checkpoint.every=2", "data.workers=1")
    checkpoints = folder / "quickstart/checkpoints"
    for kill in range(kills):
        # some saves are slow, so that kills fall into their middle
        monkeypatch.setenv(DELAY, str(chance.choice([0.0, 0.1, 0.4])))
        before = committed(checkpoints)
        answers = mp.get_context("forkserver").SimpleQueue()  # kept: the ranks do not start without it
        ranks = start_ranks(run, 2, free_port(), answers, (folder, keys))
        time.sleep(chance.uniform(0.5, 6))
        for process in ranks:
            process.kill()
        for process in ranks:
            process.join()
        after = committed(checkpoints)
        assert not before or after[-1].name >= before[-1].name or int(after[-1].name[5:]) >= int(before[-1].name[5:])
        found, messages = newest(checkpoints)
        assert messages == [] and (found is None) == (not after), kill
        if after and after[-1].name == "step-40":
            break
    monkeypatch.delenv(DELAY)
    assert run_on_ranks(run, 2, folder, keys) == [0, 0]
    assert not list(checkpoints.glob("*.partial")) and not list(checkpoints.glob("*.broken"))
    return keys


@pytest.mark.parametrize("kills", [4, pytest.param(25, marks=pytest.mark.slow)])
def test_kill_9_at_any_moment_loses_nothing(shapes, tmp_path, kills, monkeypatch):
    keys = killed_run(shapes, tmp_path, kills, monkeypatch)
    assert run_on_ranks(run, 2, tmp_path / "undisturbed", keys) == [0, 0]
    assert_same_run(tmp_path, tmp_path / "undisturbed")


def command(shapes, runs, *more):
    return ["train", ROOT / "recipes/quickstart.yaml", *overrides(shapes, *more), "--runs", runs]


@contextlib.contextmanager
def training(shapes, runs):
    """A run that is under way."""
    process = subprocess.Popen(
        [sys.executable, "-m", "ecdit.cli", *map(str, command(shapes, runs, "train.steps=100000"))],
        cwd=ROOT, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (runs / "quickstart/metrics.jsonl").exists():
        time.sleep(0.05)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_second_run_in_the_folder_is_refused_until_the_first_is_dead(shapes, tmp_path):
    with training(shapes, tmp_path) as first:
        message = complaint(ecdit(*command(shapes, tmp_path)))
        assert f"process {first.pid} on" in message and "is training in this folder" in message
    done = ecdit(*command(shapes, tmp_path, "train.steps=2"))
    assert done.returncode == 0, done.stderr


def test_a_flipped_bit_is_met_and_the_checkpoint_before_is_taken(shapes, tmp_path):
    assert ecdit(*command(shapes, tmp_path, "train.steps=4", "checkpoint.every=2")).returncode == 0
    (tmp_path / "quickstart/checkpoints/latest").write_text("step-99\n")
    file = tmp_path / "quickstart/checkpoints/step-4/__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    again = ecdit(*command(shapes, tmp_path, "train.steps=4", "optimizer.lr=2e-4"))
    assert again.returncode == 0, again.stderr
    assert "step-4 is broken and was set aside as step-4.broken: __0_0.distcp is damaged" in again.stderr
    assert "at step 2" in again.stderr
    assert "Goes on with another optimizer.lr: 0.0002 in the recipe, 0.0001 in the checkpoint." in again.stderr


def mount_is_allowed():
    probe = ["unshare", "-rm", "sh", "-c", "mount -t tmpfs none /mnt"]
    return subprocess.run(probe, capture_output=True).returncode == 0


@pytest.mark.skipif(not mount_is_allowed(), reason="a read-only file system cannot be mounted here")
def test_a_read_only_folder_is_named(shapes, tmp_path):
    runs = tmp_path / "runs"
    runs.mkdir()
    script = 'mount -t tmpfs -o ro none "$0"; exec "$@"'
    inner = [sys.executable, "-m", "ecdit.cli", *map(str, command(shapes, runs))]
    finished = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, str(runs), *inner], capture_output=True, text=True, cwd=ROOT
    )
    assert "Read-only file system" in complaint(finished) and str(runs) in finished.stderr


def test_checkpoints_are_listed_verified_and_exported(shapes, tmp_path):
    import json

    from safetensors.torch import load_file

    assert ecdit(*command(shapes, tmp_path, "train.steps=4", "checkpoint.every=2")).returncode == 0
    folder = tmp_path / "quickstart"
    listed = json.loads(ecdit("checkpoint", "ls", folder, "--json").stdout)
    assert [(entry["step"], entry["samples"]) for entry in listed] == [(2, 32), (4, 64)]
    assert "step-4: verified" in ecdit("checkpoint", "verify", folder).stdout
    done = ecdit("export", folder, "--to", "safetensors", "--out", tmp_path / "model.safetensors")
    assert done.returncode == 0, done.stderr
    exported = load_file(tmp_path / "model.safetensors")
    ema = newest(folder / "checkpoints")[0].kind("ema")
    assert exported.keys() == ema.keys() and all(torch.equal(exported[name], ema[name]) for name in ema)
    (folder / "checkpoints/step-2/__0_0.distcp").write_bytes(b"")
    state = folder / "checkpoints/step-2/state.json"
    kept = state.read_text()
    state.write_text("")
    damaged, whole = json.loads(ecdit("checkpoint", "ls", folder, "--json").stdout)
    assert "state.json" in damaged["damaged"] and whole["step"] == 4
    assert "damaged" in ecdit("checkpoint", "ls", folder).stdout
    state.write_text(kept)
    broken = ecdit("checkpoint", "verify", folder)
    assert broken.returncode == 1 and "step-2: __0_0.distcp is damaged" in broken.stdout
    assert (folder / "checkpoints/step-2").exists()

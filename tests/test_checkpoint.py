"""Checkpoints: committed whole or not at all, verified before they are trusted."""

import json
import resource
import signal

import pytest
import torch

from parallel.checkpoint import CheckpointError, committed, newest, save, verify


def state(value=1.0, size=1000):
    return {"weights": {"a.b": torch.full((size,), value)}, "ema": {"a.b": torch.zeros(size)}}


def names(root):
    return sorted(path.name for path in root.iterdir())


def test_what_is_saved_is_loaded(tmp_path):
    save(tmp_path, 5, state(), {"updates": 4}, keep_last=2)
    saved, messages = newest(tmp_path)
    assert (saved.step, saved.meta["updates"], messages) == (5, 4, [])
    assert torch.equal(saved.tensors()["weights"]["a.b"], torch.ones(1000))
    assert torch.equal(saved.kind("ema")["a.b"], torch.zeros(1000))
    assert (tmp_path / "latest").read_text() == "step-5\n"


def test_the_newest_are_kept_and_steps_are_numbers(tmp_path):
    for step in (9, 10, 100):
        save(tmp_path, step, state(), {}, keep_last=2)
    assert names(tmp_path) == ["latest", "step-10", "step-100"]


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 5, state(1.0), {}, keep_last=2)
    save(tmp_path, 5, state(2.0), {}, keep_last=2)
    assert newest(tmp_path)[0].tensors()["weights"]["a.b"][0] == 2


@pytest.mark.parametrize("harm", ["flip", "cut", "remove", "manifest", "outside"])
def test_a_broken_checkpoint_is_set_aside_and_the_one_before_is_taken(tmp_path, harm):
    for step in (1, 2):
        save(tmp_path, step, state(step), {}, keep_last=2)
    file = tmp_path / "step-2/weights.safetensors"
    manifest = tmp_path / "step-2/manifest.json"
    if harm == "flip":
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    elif harm == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif harm == "remove":
        file.unlink()
    elif harm == "manifest":
        manifest.write_text("{")
    else:
        described = json.loads(manifest.read_text())
        described["files"]["../step-1/state.json"] = {"bytes": 1, "xxh64": "0"}
        manifest.write_text(json.dumps(described))
    saved, messages = newest(tmp_path)
    assert saved.step == 1
    assert len(messages) == 1 and "step-2.broken" in messages[0]
    assert names(tmp_path) == ["latest", "step-1", "step-2.broken"]


def test_a_folder_without_a_manifest_is_no_checkpoint(tmp_path):
    save(tmp_path, 1, state(), {}, keep_last=2)
    for name in ("step-2.partial", "step-3"):
        (tmp_path / name).mkdir()
    assert [path.name for path in committed(tmp_path)] == ["step-1"]
    assert newest(tmp_path)[0].step == 1
    assert newest(tmp_path / "absent") == (None, [])


def test_a_write_that_fails_leaves_the_one_before(tmp_path):
    """The kernel's own limit on a file's size stands for a full disk: the write fails half-way."""
    save(tmp_path, 1, state(), {}, keep_last=1)
    limit, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        with pytest.raises(CheckpointError, match=r"step-2: cannot write .* MiB free"):
            save(tmp_path, 2, state(size=1_000_000), {}, keep_last=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)
    assert names(tmp_path) == ["latest", "step-1"]
    assert verify(tmp_path / "step-1") == []
    save(tmp_path, 2, state(), {}, keep_last=1)
    assert names(tmp_path) == ["latest", "step-2"]

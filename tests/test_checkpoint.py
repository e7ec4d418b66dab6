"""Checkpoints: committed whole or not at all, verified before they are trusted, read onto any layout."""

import errno
import fcntl
import json
import os
import pickle
import resource
import signal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parallel import topology
from parallel.checkpoint import CheckpointError
from parallel.checkpoint.boxes import Boxes, view_as_boxes
from parallel.checkpoint.folder import Keep, committed, newest, verify
from parallel.checkpoint.lock import FolderLock, NoLocks
from parallel.checkpoint.store import CheckpointStore
from parallel.topology import Layout


@pytest.fixture
def place():
    yield topology.start(Layout(), 1)
    topology.stop()


def state(value=1.0, size=1000):
    filled, zeros = torch.full((size, 2), value), torch.zeros(size)
    return {"weights/a.b": Boxes((size, 2), [((0, 0), filled)]), "ema/a.b": Boxes((size,), [((0,), zeros)])}


def save(root, place, step, values=None, meta=None, keep=None, asynchronous=False):
    """Saves, and returns what was wrong, if anything."""
    store = CheckpointStore(root, place, keep or Keep(2), asynchronous=asynchronous, timeout_minutes=1)
    store.save(step, values or state(), meta or {})
    store.wait()
    return store.ended().error


def names(root):
    return sorted(path.name for path in root.iterdir())


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_any_slice_of_a_flat_tensor_is_a_few_boxes_of_it(shape, data):
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    start = data.draw(st.integers(0, whole.numel() - 1))
    stop = data.draw(st.integers(start + 1, whole.numel()))
    parts = view_as_boxes((0,) * len(shape), tuple(shape), start, whole.flatten()[start:stop])
    assert len(parts) <= 2 * len(shape) - 1
    found = torch.full(shape, -1)
    for at, values in parts:
        box = tuple(slice(o, o + n) for o, n in zip(at, values.shape, strict=True))
        assert (found[box] == -1).all()
        found[box] = values
    assert torch.equal(found.flatten()[start:stop], whole.flatten()[start:stop])
    assert (found.flatten()[:start] == -1).all() and (found.flatten()[stop:] == -1).all()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_is_saved_is_loaded(tmp_path, place, asynchronous):
    assert save(tmp_path, place, 5, meta={"updates": 4}, asynchronous=asynchronous) is None
    saved, messages = newest(tmp_path)
    assert (saved.step, saved.meta["updates"], messages) == (5, 4, [])
    assert torch.equal(saved.kind("weights")["a.b"], torch.ones(1000, 2))
    assert torch.equal(saved.kind("ema")["a.b"], torch.zeros(1000))
    part = Boxes((1000, 2), [((990, 1), torch.zeros(10, 1))])
    saved.load({"weights/a.b": part})
    assert part.parts[0][1].sum() == 10
    assert (tmp_path / "latest").read_text() == "step-5\n"


def test_what_changes_after_a_save_has_begun_is_not_in_it(tmp_path, place):
    values = state()
    store = CheckpointStore(tmp_path, place, Keep(2), asynchronous=True, timeout_minutes=1)
    store.save(1, values, {})
    values["weights/a.b"].parts[0][1].zero_()
    store.wait()
    assert newest(tmp_path)[0].kind("weights")["a.b"].sum() == 2000


def test_the_newest_are_kept_and_steps_are_numbers(tmp_path, place):
    for step in (9, 10, 100):
        save(tmp_path, place, step)
    assert names(tmp_path) == ["latest", "step-10", "step-100"]


def test_every_nth_is_kept_besides(tmp_path, place):
    for step in (10, 20, 25, 30, 35):
        save(tmp_path, place, step, keep=Keep(1, 20))
    assert names(tmp_path) == ["latest", "step-20", "step-35"]


def test_saving_a_step_again_replaces_it(tmp_path, place):
    save(tmp_path, place, 5, state(1.0))
    save(tmp_path, place, 5, state(2.0))
    assert newest(tmp_path)[0].kind("weights")["a.b"][0, 0] == 2


def harm(folder, how):
    """Damages a checkpoint as disks, copies and attackers do."""
    file, manifest = folder / "__0_0.distcp", folder / "manifest.json"
    if how == "flip":
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif how == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif how == "remove":
        file.unlink()
    elif how == "manifest":
        manifest.write_text("{")
    elif how == "list":
        manifest.write_text("[]")
    elif how == "outside":
        described = json.loads(manifest.read_text())
        described["files"]["../step-1/state.json"] = {"bytes": 1, "xxh64": "0"}
        manifest.write_text(json.dumps(described))


@pytest.mark.parametrize("how", ["flip", "cut", "remove", "manifest", "list", "outside"])
def test_a_broken_checkpoint_is_set_aside_and_the_one_before_is_taken(tmp_path, place, how):
    for step in (1, 2):
        save(tmp_path, place, step, state(step))
    harm(tmp_path / "step-2", how)
    store = CheckpointStore(tmp_path, place, Keep(2), asynchronous=False, timeout_minutes=1)
    (tmp_path / "step-3.partial").mkdir()
    saved, messages = store.newest()
    assert saved.step == 1
    assert len(messages) == 1 and "step-2.broken" in messages[0]
    assert names(tmp_path) == ["latest", "step-1", "step-2.broken"]


def test_readers_rename_nothing(tmp_path, place):
    for step in (1, 2):
        save(tmp_path, place, step, state(step))
    harm(tmp_path / "step-2", "flip")
    saved, messages = newest(tmp_path)
    assert saved.step == 1 and "step-2 is broken: __0_0.distcp is damaged" in messages[0]
    assert names(tmp_path) == ["latest", "step-1", "step-2"]


def test_an_index_that_points_outside_is_refused(tmp_path, place):
    save(tmp_path, place, 1)
    index = json.loads((tmp_path / "step-1/index.json").read_text())
    index["weights/a.b"]["boxes"][0]["file"] = "../../elsewhere"
    (tmp_path / "step-1/index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"outside the checkpoint"):
        newest_without_checksums(tmp_path).kind("weights")


def newest_without_checksums(root):
    from parallel.checkpoint.folder import open_checkpoint

    return open_checkpoint(root / "step-1")


class Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ["EVIL"],)


def test_nothing_in_a_checkpoint_is_executed(tmp_path, place, monkeypatch):
    save(tmp_path, place, 1)
    monkeypatch.setenv("EVIL", str(tmp_path / "hacked"))
    file = tmp_path / "step-1/__0_0.distcp"
    index = json.loads((tmp_path / "step-1/index.json").read_text())
    payload = pickle.dumps(Evil())
    file.write_bytes(payload)
    for tensor in index.values():
        tensor["boxes"][0]["bytes"] = [0, len(payload)]
    (tmp_path / "step-1/index.json").write_text(json.dumps(index))
    (tmp_path / "step-1/.metadata").write_bytes(payload)
    with pytest.raises(CheckpointError):
        newest_without_checksums(tmp_path).kind("weights")
    assert not (tmp_path / "hacked").exists()


def test_a_folder_without_a_manifest_is_no_checkpoint(tmp_path, place):
    save(tmp_path, place, 1)
    for name in ("step-2.partial", "step-3"):
        (tmp_path / name).mkdir()
    assert [path.name for path in committed(tmp_path)] == ["step-1"]
    assert newest(tmp_path)[0].step == 1
    assert newest(tmp_path / "absent") == (None, [])


def test_latest_may_point_at_nothing(tmp_path, place):
    save(tmp_path, place, 1)
    (tmp_path / "latest").write_text("step-99\n")
    assert newest(tmp_path)[0].step == 1


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_write_that_fails_leaves_the_one_before(tmp_path, place, asynchronous):
    """The kernel's own limit on a file's size stands for a full disk: the write fails half-way."""
    save(tmp_path, place, 1, keep=Keep(1))
    limit, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        error = save(tmp_path, place, 2, state(size=1_000_000), keep=Keep(1), asynchronous=asynchronous)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)
    assert "step-2: cannot write this checkpoint" in error and "MiB free" in error
    assert names(tmp_path) == ["latest", "step-1"]
    assert verify(tmp_path / "step-1") == []
    save(tmp_path, place, 2, keep=Keep(1))
    assert names(tmp_path) == ["latest", "step-2"]


def test_memory_for_the_copy_is_asked_for_beforehand(tmp_path, place, monkeypatch):
    store = CheckpointStore(tmp_path, place, Keep(1), asynchronous=True, timeout_minutes=1)
    store.check_memory(state())
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(10**9))
    with pytest.raises(CheckpointError, match=r"checkpoint.asynchronous: true needs"):
        store.check_memory(state(size=10**6))


def test_a_second_run_is_kept_out_until_the_first_ends(tmp_path):
    first = FolderLock(tmp_path / "lock")
    with pytest.raises(CheckpointError, match=rf"process {os.getpid()} on .* is training in this folder"):
        FolderLock(tmp_path / "lock")
    first.release()
    FolderLock(tmp_path / "lock").release()


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.raises(NoLocks, match=rf"^{tmp_path}/lock: this file system cannot lock a file \(No locks available"):
        FolderLock(tmp_path / "lock")


def test_a_lock_may_be_of_another_folder_and_removed(tmp_path, monkeypatch):
    file = tmp_path / "out.lock"
    first = FolderLock(file)
    with pytest.raises(CheckpointError, match=rf"^{tmp_path}/out: process {os.getpid()} on .* works here"):
        FolderLock(file, "works here", of=tmp_path / "out")
    first.remove()
    assert not file.exists()
    # one that was opened before its owner removed it is not what the next one locks
    opened, lock = FolderLock(file), fcntl.flock

    def removed_meanwhile(descriptor, how):
        monkeypatch.setattr(fcntl, "flock", lock)
        opened.remove()
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", removed_meanwhile)
    third = FolderLock(file)
    with pytest.raises(CheckpointError):
        FolderLock(file)
    third.remove()

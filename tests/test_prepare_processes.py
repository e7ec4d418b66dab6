"""Shards are the same whatever the ranks and processes that make them, and when these are killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ecdit import UserError
from ecdit.cli import app
from ecdit.data.prepare import prepare_shapes
from ecdit.data.shards import ShardFolder
from parallel.checkpoint.lock import FolderLock
from tests.pairs import KINDS, as_folder, as_tar, make_pairs
from tests.preparing import COUNT, OPTIONS, run
from tests.ranks import run_on_ranks


@pytest.fixture(scope="module")
def pairs():
    return make_pairs(COUNT)


COMMAND = [sys.executable, "-m", "ecdit.cli", "prepare"]


def shards_of(out: Path) -> dict[str, bytes]:
    names = ("*.mds", "index.json", "report.jsonl")
    return {str(f.relative_to(out)): f.read_bytes() for name in names for f in out.rglob(name)}


def test_ranks_and_processes_change_nothing_in_the_shards(pairs, tmp_path):
    source = as_folder(pairs, tmp_path / "in")
    run(source, tmp_path / "one")
    run(source, tmp_path / "many", workers=3)
    launched = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command = [*launched, "ecdit.cli", "prepare", str(source), str(tmp_path / "ranks"), *OPTIONS, "--workers", "1"]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    assert shards_of(tmp_path / "one") == shards_of(tmp_path / "many") == shards_of(tmp_path / "ranks")


def kill_until_done(source: Path, out: Path, kills: int, longest: float, *more: str) -> int:
    """Starts the command again and again, each time killed after a while. Returns how often it was killed."""
    generator, killed = np.random.default_rng(kills), 0
    while not out.exists():
        process = subprocess.Popen(
            [*COMMAND, str(source), str(out), *OPTIONS, *more], start_new_session=True, stderr=subprocess.DEVNULL
        )
        try:
            process.wait(generator.uniform(0.3, 1) * longest if killed < kills else 300)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL) if killed % 2 else process.kill()  # all at once, or the parent alone
            process.wait()
            killed += 1
    return killed


def started(*words: object) -> subprocess.Popen:
    return subprocess.Popen([*COMMAND, *map(str, words)], start_new_session=True, stderr=subprocess.PIPE, text=True)


def wait_for(found: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize("source", ["shapes", "folder"])
def test_a_second_command_is_kept_out_until_the_first_has_ended(source, pairs, tmp_path):
    out, begun = tmp_path / "out", tmp_path / "out.partial"
    words = ["shapes", out, "--count", 100_000, "--workers", 1]
    if source == "folder":
        words = [as_folder(make_pairs(400), tmp_path / "in"), out, *OPTIONS, "--part", 200, "--workers", 1]
    first = started(*words)
    try:
        wait_for(begun.exists)
        os.kill(first.pid, signal.SIGSTOP)  # or it may be done before the second has started
        second = subprocess.run([*COMMAND, *map(str, words)], capture_output=True, text=True, timeout=60)
        assert second.returncode == 2 and "Traceback" not in second.stderr
        told = second.stderr.replace("\n", " ")
        assert f"process {first.pid} on" in told and "is preparing it; wait, or choose another folder" in told
        os.kill(first.pid, signal.SIGCONT if source == "folder" else signal.SIGKILL)
        first.communicate(timeout=120)
        assert first.returncode == (0 if source == "folder" else -signal.SIGKILL)
    finally:
        first.kill()
        first.wait()
    # the killed one's lock does not keep others out, and none is left behind
    (prepare_shapes(out, count=50, seed=0) if source == "shapes" else run(words[0], out, part=200))
    ShardFolder(str(out)).check()
    assert len(ShardFolder(str(out))) == (50 if source == "shapes" else 400)
    assert sorted(file.name for file in tmp_path.iterdir() if file.name != "in") == ["out"]


def test_all_ranks_are_told_what_the_first_found(pairs, tmp_path):
    source, out = as_folder(pairs, tmp_path / "in"), tmp_path / "out"
    lock = FolderLock(tmp_path / "out.lock")
    for words in (["shapes", out, "--count", "50"], [source, out, *OPTIONS]):
        assert run_on_ranks(refused, 2, [*map(str, words), "--workers", "1"]) == [f"{out}: process {os.getpid()}"] * 2
    lock.remove()
    assert run_on_ranks(refused, 2, ["shapes", str(out), "--count", "50", "--workers", "1"]) == ["", ""]
    assert len(ShardFolder(str(out))) == 50


def refused(words: list[str]) -> str:
    """In a rank: why the command does not start; nothing where it does what it should."""
    try:
        app(["prepare", *words], standalone_mode=False)
    except UserError as error:
        return str(error).partition(" on ")[0]
    return ""


def test_killed_and_resumed_gives_the_same_shards(tmp_path):
    pairs = make_pairs(400)
    source = as_folder(pairs, tmp_path / "in")
    run(source, tmp_path / "whole", workers=2)
    began = time.perf_counter()
    subprocess.run([*COMMAND, str(source), str(tmp_path / "timed"), *OPTIONS], check=True, stderr=subprocess.DEVNULL)
    once = time.perf_counter() - began
    killed = kill_until_done(source, tmp_path / "out", 3, once, "--workers", "1")
    assert killed >= 1
    assert shards_of(tmp_path / "out") == shards_of(tmp_path / "whole")
    assert not list(tmp_path.glob("out.partial"))


def test_a_preparation_that_was_begun_otherwise_is_not_gone_on_with(pairs, tmp_path):
    source = as_tar(pairs, tmp_path / "set.tar")
    run(source, tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "new.partial")
    plan = {"settings": {"source": "elsewhere"}, "parts": 1, "names": ""}
    (tmp_path / "new.partial/plan.json").write_text(json.dumps(plan))
    with pytest.raises(UserError, match="begun with other settings"):
        run(source, tmp_path / "new")
    shutil.rmtree(tmp_path / "new.partial/part-000000")  # nothing is lost any more
    assert len(run(source, tmp_path / "new")) == COUNT


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["set.tar", "folder", "listed", "set.parquet", "mds"])
def test_twenty_thousand_pairs_killed_ten_times(kind, tmp_path):
    pairs = make_pairs(20_000)
    source = KINDS[kind](pairs, tmp_path / kind)
    more = ("--part", "500", "--workers", "2")
    began = time.perf_counter()
    whole = [*COMMAND, str(source), str(tmp_path / "whole"), *OPTIONS, *more]
    subprocess.run(whole, check=True, stderr=subprocess.DEVNULL)
    once = time.perf_counter() - began
    killed, outs = 0, []
    while killed < 10:  # one that was done before it was killed often enough is begun anew
        outs.append(tmp_path / f"out-{len(outs)}")
        killed += kill_until_done(source, outs[-1], 10 - killed, 0.8 * once, *more)
        assert shards_of(outs[-1]) == shards_of(tmp_path / "whole")
    print(f"{kind}: {once:.1f} s undisturbed; killed {killed} times in {len(outs)} preparations")
    folder = ShardFolder(str(outs[-1]))
    captions = [folder.sample(number)["captions"][0] for number in range(len(folder))]
    assert sorted(captions) == sorted(caption for _, caption in pairs.values())

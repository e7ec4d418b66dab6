"""Shards and the stream: what is written is read back, in one order for every layout, or refused by name."""

import io
import os
import subprocess
import sys
import tracemalloc
from fractions import Fraction
from itertools import islice

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ecdit import UserError
from ecdit.data import cache as cache_module
from ecdit.data import remote, shards
from ecdit.data.cache import CacheSettings
from ecdit.data.order import Order, Passes
from ecdit.data.prepare import prepare_shapes
from ecdit.data.shapes import make
from ecdit.data.shards import ShardFolder, write_shards
from ecdit.data.stream import TrainStream
from ecdit.data.streaming_import import StreamingDataset
from tests.command import ROOT
from tests.pairs import served

COUNT, BATCH = 37, 8


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """37 samples in several shards."""
    folder = tmp_path_factory.mktemp("data") / "shapes"
    before, shards.SHARD_BYTES = shards.SHARD_BYTES, 8_000
    prepare_shapes(folder, count=COUNT, seed=0)
    shards.SHARD_BYTES = before
    assert len(list(folder.glob("*.mds"))) > 2
    return folder


def keys_of(folder, step, steps, **options):
    stream = TrainStream([folder], batch=BATCH, resolution=32, **options)
    return [batch.samples.keys for batch in islice(stream.batches(step), steps)]


def test_streaming_reads_back_what_was_written(shapes):
    dataset = StreamingDataset(local=str(shapes), shuffle=False, batch_size=1)
    assert len(dataset) == COUNT
    for index in (0, 1, COUNT - 1):
        sample, original = dataset[index], make(0, index)
        assert sample["caption"] == original.caption
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(sample["image"]))), original.image)
        assert sample["scene"]["task"] == original.scene.task


LOADS = """
import multiprocessing, sys, time
if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[2])
    from ecdit.data.stream import TrainStream
    batches = TrainStream([sys.argv[1]], batch=8, resolution=32, workers=2).batches(0)
    next(batches)
    print("loads", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_workers_end_with_a_process_that_was_killed(method, shapes, tmp_path):
    script = tmp_path / "loads.py"
    script.write_text(LOADS)
    killed = subprocess.Popen(
        [sys.executable, script, shapes, method], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert killed.stdout.readline() == b"loads\n"
    workers = psutil.Process(killed.pid).children(recursive=True)
    assert len(workers) >= 2
    killed.kill()
    killed.wait()
    alive = psutil.wait_procs(workers, timeout=20)[1]
    for process in alive:
        process.kill()
    assert alive == []


def test_batches_hold_the_samples_of_their_keys(shapes):
    batch = next(TrainStream([shapes], batch=BATCH, resolution=32).batches(0))
    samples = batch.samples
    assert samples.image.shape == (BATCH, 3, 32, 32) and samples.image.dtype == torch.uint8
    assert batch.positions.tolist() == list(range(BATCH))
    for image, caption, key in zip(samples.image, samples.captions, samples.keys, strict=True):
        original = make(0, int(key.rsplit("-", 1)[1]))
        assert caption == original.caption
        assert np.array_equal(image.permute(1, 2, 0).numpy(), original.image)


@given(st.integers(0, 12), st.sampled_from([1, 2, 4]))
@settings(max_examples=15, deadline=None)
def test_the_global_batch_is_one_whatever_the_ranks_and_the_start(shapes, start, ranks):
    expected = keys_of(shapes, 0, 15)[start : start + 3]
    parts = [keys_of(shapes, start, 3, data_rank=rank, data_ranks=ranks) for rank in range(ranks)]
    assert [[key for part in parts for key in part[step]] for step in range(3)] == expected


def test_workers_change_nothing(shapes):
    assert keys_of(shapes, 3, 4, workers=2) == keys_of(shapes, 3, 4)


def test_a_pass_has_every_sample_once_and_the_next_another_order(shapes):
    keys = [key for some in keys_of(shapes, 0, 2 * COUNT // BATCH) for key in some]
    first, second = keys[:COUNT], keys[COUNT : 2 * COUNT]
    assert len(set(first)) == COUNT and len(set(second)) == len(second) and first[: len(second)] != second
    assert keys_of(shapes, 0, 1, seed=1) != keys_of(shapes, 0, 1)
    assert keys_of(shapes, 0, 1, shuffle=False) == [[f"shapes-0-{i}" for i in range(BATCH)]]


def test_a_second_reader_needs_no_leave_of_the_first(shapes):
    """No lock and no shared memory: a run that was killed leaves nothing behind, and two runs share a data set."""
    one, other = (TrainStream([shapes], batch=BATCH, resolution=32).batches(0) for _ in range(2))
    assert next(one).samples.keys == next(other).samples.keys


def damaged(shapes, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in shapes.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy, sorted(copy.glob("*.mds*"))[1]


def refuse(folder, match, **options):
    options = {"batch": BATCH, "resolution": 32} | options
    with pytest.raises(UserError, match=match) as error:
        next(TrainStream([folder], **options).batches(0))
    return str(error.value)


def test_a_shard_with_flipped_bytes_is_named(shapes, tmp_path):
    copy, shard = damaged(shapes, tmp_path)
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 0xFF
    shard.write_bytes(data)
    assert str(shard) in refuse(copy, "damaged")


def test_a_shard_that_is_missing_or_cut_is_named(shapes, tmp_path):
    copy, shard = damaged(shapes, tmp_path)
    shard.write_bytes(shard.read_bytes()[:-1])
    assert str(shard) in refuse(copy, "expected")
    shard.unlink()
    assert str(shard) in refuse(copy, "missing")
    (copy / "index.json").write_text("{")
    assert "index.json" in refuse(copy, "cannot be read")
    (copy / "index.json").unlink()
    assert "ecdit prepare" in refuse(copy, "index.json is missing")


@pytest.mark.parametrize("workers", [0, 1])
def test_pictures_of_another_size_name_key_and_sample(shapes, workers):
    message = refuse(shapes, "data.resolution: 64", resolution=64, workers=workers)
    assert "shapes-0-" in message and "Traceback" not in message


def test_a_batch_over_the_data_is_refused(shapes):
    refuse(shapes, "train.batch: 64 .* try at most 37", batch=64)


# ---- the order, by itself


def passes(sizes, **options):
    return Passes(sizes, **({"nodes": 1, "seed": 0, "shuffle": True, "segment": 1000} | options))


@given(
    st.lists(st.integers(1, 400), min_size=1, max_size=40),
    st.sampled_from([1, 2, 3]),
    st.integers(0, 5),
    st.sampled_from([100, 1000, 10**6]),
)
@settings(max_examples=40, deadline=None)
def test_passes_have_every_sample_once_whatever_the_segments(sizes, nodes, seed, segment):
    order = passes([*sizes, 50], nodes=nodes, seed=seed, segment=segment)
    whole = order.rows(0, 2 * order.rows_of_a_pass)
    for one in np.split(whole, 2):
        assert len(np.unique(one)) == one.size  # none twice
        left_out = sum(sizes) + 50 - one.size
        assert 0 <= left_out < nodes * len(order._segments)
    middle = order.rows_of_a_pass
    first, stop = max(0, middle - 7), middle + 5
    assert np.array_equal(
        passes([*sizes, 50], nodes=nodes, seed=seed, segment=segment).rows(first, stop), whole[first:stop]
    )


def test_a_billion_samples_need_no_table():
    """Any step of 1.2 billion samples in 300,000 shards, in the memory of a segment."""
    order = Order([Passes([4000] * 300_000, 8, 0, True)], [Fraction(1)], 4096, 8, 0)
    tracemalloc.start()
    _, number = order.step(200_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(set(number.tolist())) == 4096 and peak < 1 << 29


def test_streams_keep_their_shares_and_their_own_passes():
    sizes, shares = [[100] * 9, [30, 30], [7]], [Fraction(6, 10), Fraction(3, 10), Fraction(1, 10)]
    order = Order([passes(some) for some in sizes], shares, 20, 1, 0)
    steps = [order.step(step) for step in range(500)]
    streams = np.concatenate([stream for stream, _ in steps])
    numbers = np.concatenate([number for _, number in steps])
    assert np.bincount(streams).tolist() == [6000, 3000, 1000]
    for stream, size in enumerate((900, 60, 7)):
        own = numbers[streams == stream]
        for first in range(0, len(own) - size, size):
            assert sorted(own[first : first + size]) == list(range(size))
    assert len({tuple(stream) for stream, _ in steps}) > 100  # mixed anew in every batch


def test_canonical_nodes_have_their_own_shards_at_their_own_places():
    order = Order([passes([50] * 8, nodes=4, segment=10**6)], [Fraction(1)], 40, 4, 0)
    shards = [set() for _ in range(4)]
    for step in range(10):
        _, number = order.step(step)
        for node in range(4):
            shards[node] |= set((number[node * 10 : (node + 1) * 10] // 50).tolist())
    assert all(len(some) <= 3 for some in shards)  # of eight


# ---- ranks, workers, resuming: the issue is one list of samples


@pytest.fixture(scope="module")
def two_passes(shapes):
    steps = 2 * COUNT // BATCH + 1
    return keys_of(shapes, 0, steps)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("workers", [0, 4])
@pytest.mark.parametrize("start", [0, 2, COUNT // BATCH, COUNT // BATCH + 1])
def test_two_passes_are_the_same_for_any_ranks_workers_and_start(shapes, two_passes, ranks, workers, start):
    """Resumed at the first batch, in mid-pass, and on both sides of the edge between passes, which lies in a batch."""
    if workers and ranks > 2 and start:
        ranks = 2  # workers by ranks by starts: processes enough
    wanted = two_passes[start : start + 6]
    parts = [keys_of(shapes, start, 6, data_rank=r, data_ranks=ranks, workers=workers) for r in range(ranks)]
    assert [[key for part in parts for key in part[step]] for step in range(6)][: len(wanted)] == wanted


# ---- several streams


def test_streams_are_mixed_by_their_proportions(shapes, tmp_path):
    prepare_shapes(tmp_path / "other", count=16, seed=9)
    stream = TrainStream([shapes, tmp_path / "other"], shares=[3, 1], batch=8, resolution=32)
    keys = [key for batch in islice(stream.batches(0), 100) for key in batch.samples.keys]
    assert sum(key.startswith("shapes-9") for key in keys) == pytest.approx(200, abs=25)
    together = TrainStream([shapes, tmp_path / "other"], batch=COUNT + 16, resolution=32)
    assert len(set(next(together.batches(0)).samples.keys)) == COUNT + 16


def test_streams_that_do_not_go_together_are_refused(shapes, tmp_path):
    write_shards([{"image": b"", "key": "a"}], tmp_path / "bare", {"image": "bytes", "key": "str"})
    with pytest.raises(UserError, match="no column 'caption'"):
        TrainStream([tmp_path / "bare"], batch=1, resolution=32)
    with pytest.raises(UserError, match=r"one in 10000"):
        TrainStream([shapes, shapes], shares=[1, 1e-9], batch=8, resolution=32)
    with pytest.raises(UserError, match=r"data.canonical_nodes: 64 is more than"):
        TrainStream([shapes], batch=8, nodes=64, resolution=32)


# ---- shards that are elsewhere


@pytest.fixture(scope="module")
def packed(shapes, tmp_path_factory):
    """The same samples, compressed."""
    folder = tmp_path_factory.mktemp("packed") / "data"
    source = ShardFolder(str(shapes))
    columns = {"image": "png", "caption": "str", "key": "str", "scene": "json"}
    write_shards((source.sample(i) for i in range(COUNT)), folder, columns, shard_bytes=8_000, compression="zstd")
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_from_a_server_give_the_same_batches_and_are_fetched_once(shapes, packed, tmp_path, workers):
    seen = []
    with served(packed, seen) as url:
        cache = CacheSettings(tmp_path / "cache")
        found = [keys_of(url, 0, 9, cache=cache, workers=workers, predownload=16) for _ in range(2)]
    assert found[0] == found[1] == keys_of(shapes, 0, 9)
    fetched = [path for path in seen if path.endswith(".zstd")]
    assert len(fetched) == len(set(fetched)) == len(list(packed.glob("*.zstd")))


def test_compressed_shards_are_unpacked_beside_and_the_data_stay_as_they_are(shapes, packed, tmp_path):
    before = sorted(packed.iterdir())
    assert keys_of(packed, 0, 3, cache=CacheSettings(tmp_path)) == keys_of(shapes, 0, 3)
    assert sorted(packed.iterdir()) == before


def test_a_cache_keeps_to_its_limit(packed, tmp_path):
    folder = ShardFolder(str(packed), CacheSettings(tmp_path, limit=20_000))
    for number in range(COUNT):
        folder.sample(number)
        held = sum(file.stat().st_size for file in tmp_path.rglob("*.mds"))
        assert held <= 20_000
    assert folder.bytes > 20_000
    with pytest.raises(UserError, match=r"data.cache.limit: .* at least"):
        TrainStream([packed], batch=8, resolution=32, cache=CacheSettings(tmp_path, limit=100))


def test_a_shard_damaged_on_its_way_is_fetched_once_more(shapes, packed, tmp_path, monkeypatch):
    damaged = []

    def download(url, to):
        remote.download(url, to)
        if to.name.endswith(".part") and len(damaged) < 1:
            damaged.append(url)
            to.write_bytes(b"x" + to.read_bytes()[1:])

    monkeypatch.setattr(cache_module, "download", download)
    assert keys_of(packed, 0, 4, cache=CacheSettings(tmp_path)) == keys_of(shapes, 0, 4)
    assert damaged and len(list(tmp_path.rglob("*.damaged"))) == 1


def test_a_shard_damaged_in_the_cache_is_set_aside_and_fetched_again(shapes, packed, tmp_path):
    settings = CacheSettings(tmp_path)
    wanted = keys_of(packed, 0, 4, cache=settings)
    for file in tmp_path.rglob("*.mds"):
        file.write_bytes(file.read_bytes()[:-3000] + b"x" * 3000)
    assert keys_of(packed, 0, 4, cache=settings) == wanted
    assert list(tmp_path.rglob("*.damaged"))


def test_a_shard_that_stays_damaged_is_named(packed, tmp_path):
    copy, _ = damaged(packed, tmp_path)
    for shard in copy.glob("*.zstd"):
        shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with served(copy) as url:
        stream = TrainStream([url], batch=BATCH, resolution=32, cache=CacheSettings(tmp_path / "c"))
        with pytest.raises(UserError, match=rf"{url}/shard\.\d+\.mds\.zstd: .* damaged .*xxh64.*once more"):
            next(stream.batches(0))


def test_a_server_that_is_gone_is_named(monkeypatch):
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    with pytest.raises(UserError, match=r"http://127.0.0.1:9/data"):
        TrainStream(["http://127.0.0.1:9/data"], batch=8, resolution=32)

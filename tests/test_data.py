"""Shards and the stream: what is written is read back, in one order for every layout, or refused by name."""

from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ecdit import UserError
from ecdit.data import shards
from ecdit.data.prepare import prepare_shapes
from ecdit.data.shapes import make
from ecdit.data.stream import TrainStream
from ecdit.data.streaming_import import StreamingDataset

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
        assert np.array_equal(np.asarray(sample["image"]), original.image)
        assert sample["scene"]["task"] == original.scene.task


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
    return copy, sorted(copy.glob("*.mds"))[1]


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

"""Shards and the stream: what is written is read back, in one order for every layout, or refused by name."""

import io
import json
import tarfile
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ecdit import UserError
from ecdit.data import shards
from ecdit.data.prepare import prepare
from ecdit.data.shapes import make
from ecdit.data.stream import TrainStream
from ecdit.data.streaming_import import StreamingDataset
from tests.photographs import photographs

COUNT, BATCH = 37, 8


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """37 samples in several shards."""
    folder = tmp_path_factory.mktemp("data") / "shapes"
    before, shards.SHARD_BYTES = shards.SHARD_BYTES, 8_000
    prepare("shapes", folder, resolution=None, count=COUNT, seed=0)
    shards.SHARD_BYTES = before
    assert len(list(folder.glob("*.mds"))) > 2
    return folder


def keys_of(folder, step, steps, **options):
    stream = TrainStream([folder], batch=BATCH, resolution=32, **options)
    return [batch.keys for batch in islice(stream.batches(step), steps)]


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
    assert batch.images.shape == (BATCH, 3, 32, 32) and batch.images.dtype == torch.uint8
    assert batch.positions.tolist() == list(range(BATCH))
    for image, caption, key in zip(batch.images, batch.captions, batch.keys, strict=True):
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


def test_epochs_cover_the_samples_once_in_another_order(shapes):
    steps = COUNT // BATCH
    first, second = ([k for keys in keys_of(shapes, epoch * steps, steps) for k in keys] for epoch in (0, 1))
    assert len(set(first)) == len(first) == steps * BATCH
    assert len(set(second)) == len(second) and first != second
    assert keys_of(shapes, 0, 1, seed=1) != keys_of(shapes, 0, 1)
    assert keys_of(shapes, 0, 1, shuffle=False) == [[f"shapes-0-{i}" for i in range(BATCH)]]


def test_a_second_reader_needs_no_leave_of_the_first(shapes):
    """No lock and no shared memory: a run that was killed leaves nothing behind, and two runs share a data set."""
    one, other = (TrainStream([shapes], batch=BATCH, resolution=32).batches(0) for _ in range(2))
    assert next(one).keys == next(other).keys


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


def picture(side=(40, 30), color="red"):
    out = io.BytesIO()
    Image.new("RGB", side, color).save(out, "PNG")
    return out.getvalue()


def test_tar_folder_and_parquet_give_the_same_samples(tmp_path, capsys):
    import pyarrow
    import pyarrow.parquet

    pairs = {
        "a": (picture(), "first"),
        "b": (b"no picture", "second"),
        "c": (picture(), None),
        "d": (picture(), "last"),
    }
    folder = tmp_path / "folder"
    folder.mkdir()
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        for key, (data, caption) in pairs.items():
            for name, content in ((f"{key}.png", data), (f"{key}.txt", caption and caption.encode())):
                if content is not None:
                    (folder / name).write_bytes(content)
                    entry = tarfile.TarInfo(name)
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    rows = {"image": [data for data, _ in pairs.values()], "caption": [caption for _, caption in pairs.values()]}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "set.parquet")
    seen = []
    for source in ("set.tar", "folder", "set.parquet"):
        out = tmp_path / f"out-{source}"
        prepare(str(tmp_path / source), out, resolution=16, count=1, seed=0)
        told = capsys.readouterr().err
        assert "2 samples were left out" in told and "no caption" in told and "broken picture" in told
        stream = TrainStream([out], batch=2, resolution=16, shuffle=False)
        batch = next(stream.batches(0))
        assert batch.captions == ["first", "last"]
        seen.append(batch.images)
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])


def test_prepare_is_idle_when_done_and_refuses_to_mix(tmp_path, capsys):
    out = tmp_path / "out"
    prepare("shapes", out, resolution=None, count=3, seed=0)
    before = (out / "index.json").stat().st_mtime_ns
    prepare("shapes", out, resolution=None, count=3, seed=0)
    assert "there already" in capsys.readouterr().err and (out / "index.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="choose another folder"):
        prepare("shapes", out, resolution=None, count=4, seed=0)
    with pytest.raises(UserError, match="no such file"):
        prepare(str(tmp_path / "absent.tar"), tmp_path / "new", resolution=16, count=1, seed=0)
    (tmp_path / "odd.txt").write_text("x")
    with pytest.raises(UserError, match="not a source that is known"):
        prepare(str(tmp_path / "odd.txt"), tmp_path / "new", resolution=16, count=1, seed=0)
    (tmp_path / "bad.tar").write_bytes(b"x" * 2000)
    with pytest.raises(UserError, match="cannot be read as a tar"):
        prepare(str(tmp_path / "bad.tar"), tmp_path / "new", resolution=16, count=1, seed=0)
    assert not (tmp_path / "new").exists()


def test_photographs(tmp_path):
    prepare(str(photographs(tmp_path)), tmp_path / "out", resolution=None, count=1, seed=0)
    entries = json.loads((tmp_path / "out/index.json").read_text())["shards"]
    assert sum(entry["samples"] for entry in entries) == 32
    batch = next(TrainStream([tmp_path / "out"], batch=32, resolution=256).batches(0))
    assert all(caption.strip() for caption in batch.captions) and batch.images.float().std() > 30

"""Any source becomes the same shards: every pair once, captions byte for byte, whatever is broken in it named."""

import errno
import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ecdit import UserError
from ecdit.cli import app
from ecdit.data.prepare import Settings, prepare, prepare_shapes
from ecdit.data.shards import ShardFolder
from ecdit.data.sources import Columns, find_parts, tar
from ecdit.data.sources.files import expand
from parallel.checkpoint.lock import FolderLock
from tests.command import ecdit
from tests.pairs import KINDS, as_folder, as_listed, as_mds, as_parquet, as_tar, make_pairs, served
from tests.photographs import photographs
from tests.ranks import run_on_ranks
from tests.test_train import complaint

COUNT, RESOLUTION = 30, 32


def run(source, out, *, workers=1, **more) -> ShardFolder:
    settings = {"resolution": RESOLUTION, "min_side": 16, "part": 7, "shard_mib": 1} | more
    prepare(Settings(source=str(source), **settings), out, workers=workers)
    return ShardFolder(str(out))


def samples_of(folder: ShardFolder) -> list[dict]:
    return [folder.sample(number) for number in range(len(folder))]


def report(out: Path) -> dict[str, dict]:
    return {note["key"]: note for note in map(json.loads, (out / "report.jsonl").read_text().splitlines())}


def plain(picture: bytes) -> np.ndarray:
    """The centre crop, as anyone would make it."""
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    short = min(image.size)
    left, top = (image.width - short) // 2, (image.height - short) // 2
    box = (left, top, left + short, top + short)
    return np.asarray(image.resize((RESOLUTION,) * 2, Image.Resampling.LANCZOS, box=box)).astype(int)


def check_round_trip(pairs, folder: ShardFolder) -> None:
    found = samples_of(folder)
    assert sorted(sample["captions"][0] for sample in found) == sorted(caption for _, caption in pairs.values())
    assert len({sample["key"] for sample in found}) == len(pairs)
    by_caption = {caption: picture for picture, caption in pairs.values()}
    for sample in found:
        decoded = np.asarray(Image.open(io.BytesIO(sample["image"]))).astype(int)
        assert np.abs(decoded - plain(by_caption[sample["captions"][0]])).mean() < 3


@pytest.fixture(scope="module")
def pairs():
    return make_pairs(COUNT)


@pytest.mark.parametrize("kind", KINDS)
def test_every_pair_of_every_kind_of_source_comes_through_once(kind, pairs, tmp_path, capsys):
    source = KINDS[kind](pairs, tmp_path / kind)
    check_round_trip(pairs, run(source, tmp_path / "out"))
    assert f"{COUNT} samples" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["set.tar", "listed", "set.parquet", "mds"])
def test_sources_may_be_elsewhere(kind, pairs, tmp_path):
    KINDS[kind](pairs, tmp_path / "there" / kind if kind == "mds" else _made(tmp_path / "there") / kind)
    with served(tmp_path / "there") as url:
        check_round_trip(pairs, run(f"{url}/{kind}", tmp_path / "out"))


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_many_files_are_named_by_braces_stars_or_their_folder(pairs, tmp_path):
    keys = list(pairs)
    for index in range(3):
        as_tar({key: pairs[key] for key in keys[index::3]}, tmp_path / f"{index:03}.tar")
    seen = [
        [s["key"] for s in samples_of(run(source, tmp_path / f"out-{index}"))]
        for index, source in enumerate((tmp_path / "{000..002}.tar", tmp_path / "*.tar", tmp_path))
    ]
    assert seen[0] == seen[1] == seen[2] and seen[0][0] == "000/000000" and len(seen[0]) == COUNT
    assert expand("a{08..10}b{1..2}") == ["a08b1", "a08b2", "a09b1", "a09b2", "a10b1", "a10b2"]


def test_a_large_tar_is_cut_between_samples(pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(tar, "CUT", 20_000)
    source = as_tar(pairs, tmp_path / "set.tar")
    parts = find_parts(str(source), Columns(), 7)
    assert len(parts) > 2
    found = [pair.key for part in parts for pair in part.pairs()]
    assert found == [f"set/{key}" for key in pairs]


def test_a_jpeg_of_the_right_size_is_kept_byte_for_byte(tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (RESOLUTION, RESOLUTION), "red").save(file, "JPEG", quality=40)
    folder = run(as_folder({"a": (file.getvalue(), "c")}, tmp_path / "in"), tmp_path / "out")
    assert folder.sample(0)["image"] == file.getvalue()


def test_photographs(tmp_path):
    folder = run(photographs(tmp_path), tmp_path / "out", resolution=256, min_side=256)
    assert len(folder) == 32
    assert all(s["captions"][0].strip() and len(s["image"]) > 3000 for s in samples_of(folder))


# ---- what is asked for


def test_filters_leave_out_by_size_and_shape_and_say_so(tmp_path):
    sizes = {"small": (20, 90), "long": (100, 40), "good": (40, 50), "large": (3000, 2000)}
    pairs = {key: (picture(size=size), key) for key, size in sizes.items()}
    folder = run(as_folder(pairs, tmp_path / "in"), tmp_path / "out", min_side=32, max_aspect=2.0, max_megapixels=5)
    assert [s["captions"] for s in samples_of(folder)] == [["good"]]
    reasons = {Path(key).name: note["left_out"] for key, note in report(tmp_path / "out").items()}
    assert reasons == {"small": "too small", "long": "too long", "large": "too many pixels"}
    told = json.loads((tmp_path / "out/prepare.json").read_text())["report"]
    assert told["pairs"] == 1 and sum(told["left_out"].values()) == 3


def test_random_crops_differ_from_centre_ones_and_are_the_same_again(tmp_path):
    gradient = np.linspace(0, 255, 200, dtype=np.uint8)[None, :, None].repeat(40, 0).repeat(3, 2)
    source = as_folder({f"{i}": (encoded(Image.fromarray(gradient), "PNG"), str(i)) for i in range(8)}, tmp_path / "in")

    def means(out, crop, seed):
        return [int(pixels(s).mean()) for s in samples_of(run(source, tmp_path / out, crop=crop, seed=seed))]

    centre, random, again = means("a", "centre", 0), means("b", "random", 0), means("c", "random", 0)
    assert len(set(centre)) == 1 and len(set(random)) > 4 and random == again
    assert means("d", "random", 1) != random


def test_captions_may_be_several_in_fields_lines_or_lists(tmp_path):
    good = picture()
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jpg").write_bytes(good)
    (tmp_path / "in/a.txt").write_text("one\ntwo\n\n")
    assert run(tmp_path / "in", tmp_path / "whole").sample(0)["captions"] == ["one\ntwo\n\n"]
    lines = run(tmp_path / "in", tmp_path / "lines", columns=Columns(lines=True))
    assert lines.sample(0)["captions"] == ["one", "two"]
    (tmp_path / "in/b.jsonl").write_text('{"file_name": "a.jpg", "text": ["x", " ", "y"]}\n')
    assert run(tmp_path / "in/b.jsonl", tmp_path / "listed").sample(0)["captions"] == ["x", "y"]


def test_cleaning_is_off_unless_asked_for(tmp_path):
    source = as_folder({"a": (picture(), "  fish &amp;amp; chips\u200b\n now ")}, tmp_path / "in")
    assert run(source, tmp_path / "a").sample(0)["captions"] == ["  fish &amp;amp; chips\u200b\n now "]
    assert run(source, tmp_path / "b", clean=True).sample(0)["captions"] == ["fish & chips now"]


def test_shards_are_cut_and_compressed_as_asked_for(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (24, 256, 256, 3), dtype=np.uint8)
    pairs = {str(i): (encoded(Image.fromarray(noise[i]), "PNG"), f"caption {i}") for i in range(24)}
    source = as_folder(pairs, tmp_path / "in")
    folder = run(source, tmp_path / "out", resolution=256, shard_mib=1, compression="zstd:3", part=100)
    entries = json.loads((tmp_path / "out/index.json").read_text())["shards"]
    assert len(entries) > 1 and all(e["zip_data"]["hashes"] and e["compression"] == "zstd:3" for e in entries)
    assert all(e["raw_data"]["bytes"] <= 1 << 20 for e in entries)
    assert len(samples_of(folder)) == 24


# ---- bad input: named, and never fatal


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture(size=(48, 40), mode="RGB", color="red", kind="JPEG", **options) -> bytes:
    return encoded(Image.new(mode, size, color), kind, **options)


def pixels(sample) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(sample["image"])))


def turned() -> bytes:
    """Red above, blue below, to be turned upside down by its EXIF data."""
    image = Image.new("RGB", (40, 40), "red")
    image.paste("blue", (0, 20, 40, 40))
    exif = Image.Exif()
    exif[0x0112] = 3
    return encoded(image, "JPEG", exif=exif, quality=95)


def animated() -> bytes:
    frames = [Image.new("P", (40, 40), color) for color in (1, 2, 3)]
    for frame in frames:
        frame.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


def bomb() -> bytes:
    """100 megapixels in a few kilobytes."""
    return encoded(Image.new("1", (10_000, 10_000)), "PNG")


def grey_tiff(values: np.ndarray, bits: int, kind: int) -> bytes:
    """A TIFF of one channel, as it is laid out: 40x40. kind: 1 unsigned, 2 signed, 3 floating point."""
    data = values.tobytes()
    tags = {256: 40, 257: 40, 258: bits, 259: 1, 262: 1, 273: 134, 277: 1, 278: 40, 279: len(data), 339: kind}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data


def unturned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 99
    return picture(exif=exif)


def with_16_in_a_place() -> bytes:
    """A TIFF of 8 bits, of which a part begins at a byte whose number has a 16 in it."""
    made = (picture(size=(40, height), kind="TIFF", compression="tiff_lzw") for height in range(20, 400))
    return next(data for data in made if "16" in str(Image.open(io.BytesIO(data)).tile))


def bmp_of_16_bits() -> bytes:
    """Of a pixel: 5 red, 6 green, 5 blue."""
    header = struct.pack("<IiiHHIIiiII", 40, 40, 40, 1, 16, 3, 3200, 0, 0, 0, 0)
    masks = struct.pack("<III", 0xF800, 0x07E0, 0x001F)
    return b"BM" + struct.pack("<IHHI", 66 + 3200, 0, 0, 66) + header + masks + bytes(3200)


LEFT_OUT = {
    "int32": (grey_tiff(np.full((40, 40), 200, np.int32), 32, 2), "broken picture"),
    "uint32": (grey_tiff(np.full((40, 40), 200, np.uint32), 32, 1), "broken picture"),
    "int16": (grey_tiff(np.full((40, 40), 200, np.int16), 16, 2), "broken picture"),
    "float": (grey_tiff(np.full((40, 40), 200, np.float32), 32, 3), "broken picture"),
    "empty": (b"", "empty picture file"),
    "text": (b"no picture at all", "broken picture"),
    "cut": (picture(size=(200, 200))[:-300], "broken picture"),
    "bomb": (bomb(), "too many pixels"),
}
CHANGED = {
    "cmyk": (picture(mode="CMYK", color=(0, 255, 255, 0)), "CMYK to RGB", (255, 0, 0)),
    "deep": (encoded(Image.fromarray(np.full((40, 40), 51 << 8, np.uint16)), "PNG"), "16 bits to 8", (51, 51, 51)),
    "uint16": (grey_tiff(np.full((40, 40), 51 << 8, np.uint16), 16, 1), "16 bits to 8", (51, 51, 51)),
    "uint12": (grey_tiff(np.full((40, 60), 0x33, np.uint8), 12, 1), "12 bits to 8", (51, 51, 51)),
    "pgm": (b"P5 40 40 1023\n" + np.full((40, 40), 205, ">u2").tobytes(), "16 bits to 8", (51, 51, 51)),
    "animated": (animated(), "animated: first frame taken", (255, 0, 0)),
    "clear": (picture(mode="RGBA", color=(0, 0, 0, 0), kind="PNG"), "transparent: put on white", (255, 255, 255)),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_pictures_that_cannot_be_used_are_left_out_by_name(name, tmp_path):
    data, reason = LEFT_OUT[name]
    source = as_folder({"a": (picture(), "first"), name: (data, "second"), "z": (picture(), "third")}, tmp_path / "in")
    folder = run(source, tmp_path / "out")
    assert [s["captions"][0] for s in samples_of(folder)] == ["first", "third"] or name < "a"
    notes = report(tmp_path / "out")
    assert [note["left_out"] for note in notes.values()] == [reason] and name in next(iter(notes))


@pytest.mark.parametrize("name", CHANGED)
def test_pictures_of_odd_kinds_are_made_plain_and_named(name, tmp_path):
    data, change, color = CHANGED[name]
    folder = run(as_tar({name: (data, "c")}, tmp_path / "in.tar"), tmp_path / "out")
    assert np.abs(pixels(folder.sample(0)).reshape(-1, 3).mean(0) - color).max() < 3
    assert report(tmp_path / "out") == {f"in/{name}": {"key": f"in/{name}", "changed": change}}


def test_pictures_are_turned_as_their_exif_data_say(tmp_path):
    folder = run(as_tar({"a": (turned(), "c")}, tmp_path / "in.tar"), tmp_path / "out")
    above = pixels(folder.sample(0))[: RESOLUTION // 3]
    assert above[..., 2].mean() > 200 > 50 > above[..., 0].mean()
    assert report(tmp_path / "out")["in/a"]["changed"] == "turned as its EXIF data say"


NOTHING_DONE = [unturned(), with_16_in_a_place(), bmp_of_16_bits()]


@pytest.mark.parametrize("data", NOTHING_DONE, ids=["unturned", "place", "bmp"])
def test_nothing_is_told_that_was_not_done(data, tmp_path):
    """Not of an orientation that is none, nor of depth where a place in the file has digits that look like one."""
    run(as_tar({"a": (data, "c")}, tmp_path / "in.tar"), tmp_path / "out")
    assert report(tmp_path / "out") == {}


def test_captions_that_are_missing_empty_or_not_utf8_are_named(tmp_path):
    folder = as_folder({"good": (picture(), "c")}, tmp_path / "in") / "half-0"
    for name, caption in (("blank", b" \n"), ("latin", "né".encode("latin-1")), ("none", None)):
        (folder / f"{name}.jpg").write_bytes(picture())
        if caption is not None:
            (folder / f"{name}.txt").write_bytes(caption)
    assert len(run(tmp_path / "in", tmp_path / "out")) == 1
    reasons = {Path(key).name: note["left_out"] for key, note in report(tmp_path / "out").items()}
    assert reasons == {"blank": "empty caption", "latin": "caption is not UTF-8", "none": "no caption"}


def test_a_truncated_tar_gives_what_is_before_the_break(pairs, tmp_path):
    source = as_tar(pairs, tmp_path / "set.tar")
    source.write_bytes(source.read_bytes()[: source.stat().st_size // 2])
    folder = run(source, tmp_path / "out")
    assert 0 < len(folder) < COUNT
    broken = [note for note in report(tmp_path / "out").values() if note["left_out"] == "broken tar"]
    assert len(broken) == 1 and str(source) in broken[0]["detail"]


def test_a_parquet_without_the_column_is_named_and_others_are_read(pairs, tmp_path):
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "in").mkdir()
    as_parquet(pairs, tmp_path / "in/b.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"image": [b""], "words": ["x"]}), tmp_path / "in/a.parquet")
    (tmp_path / "in/c.parquet").write_bytes(b"PAR1 and nothing else")
    check_round_trip(pairs, run(tmp_path / "in", tmp_path / "out"))
    notes = {Path(key).name: note for key, note in report(tmp_path / "out").items()}
    assert "no column 'caption'; it has image, words" in notes["a.parquet"]["detail"]
    assert notes["c.parquet"]["left_out"] == "broken parquet"


def test_lines_that_are_no_json_and_pictures_that_are_not_there_are_named(pairs, tmp_path):
    source = as_listed(pairs, tmp_path / "in")
    with (source / "captions.jsonl").open("a") as file:
        file.write('{"file_name": "absent.jpg", "caption": "x"}\nnonsense\n{"caption": "x"}\n')
    check_round_trip(pairs, run(source, tmp_path / "out"))
    assert [note["left_out"] for note in report(tmp_path / "out").values()] == [
        "no picture",
        "broken line",
        "no picture",
    ]


NO_NAMES = ("a\0b.jpg", "\ud800.jpg")


def test_pictures_whose_names_no_file_can_have_are_named(tmp_path):
    source = as_listed({"good": (picture(), "c")}, tmp_path / "in") / "captions.jsonl"
    lines = [json.dumps({"file_name": name, "caption": "x"}) for name in NO_NAMES]
    source.write_text("\n".join([*lines, "[" * 100_000, source.read_text()]))
    assert len(run(source, tmp_path / "out")) == 1
    reasons = {key: note["left_out"] for key, note in report(tmp_path / "out").items()}
    assert reasons == dict.fromkeys(NO_NAMES, "cannot be read") | {f"{source}:3": "broken line"}


def test_rows_whose_paths_no_file_can_have_are_named(tmp_path):
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "good.jpg").write_bytes(picture())
    paths = ["a\0b.jpg", str(tmp_path / "a\0b.jpg"), "good.jpg"]
    pyarrow.parquet.write_table(pyarrow.table({"image": paths, "caption": ["x"] * 3}), tmp_path / "set.parquet")
    assert len(run(tmp_path / "set.parquet", tmp_path / "out")) == 1
    assert [note["left_out"] for note in report(tmp_path / "out").values()] == ["cannot be read"] * 2


def test_names_that_are_not_utf8_are_written_with_escapes(tmp_path):
    (tmp_path / "in").mkdir()
    for ending, data in ((b".jpg", picture()), (b".txt", b"c")):
        Path(os.fsdecode(os.fsencode(tmp_path / "in") + b"/caf\xe9" + ending)).write_bytes(data)
    folder = run(tmp_path / "in", tmp_path / "out")
    assert [sample["key"] for sample in samples_of(folder)] == ["caf\\udce9"]
    assert run(tmp_path / "in", tmp_path / "random", crop="random").sample(0)["captions"] == ["c"]


def test_a_damaged_shard_of_a_source_is_named(pairs, tmp_path):
    source = as_mds(pairs, tmp_path / "in")
    shard = sorted(source.glob("*.zstd"))[1]
    shard.write_bytes(shard.read_bytes()[:-7])
    folder = run(source, tmp_path / "out")
    assert 0 < len(folder) < COUNT
    assert {note["left_out"] for note in report(tmp_path / "out").values()} == {"broken shard"}


# ---- what is fatal


def test_sources_that_are_absent_unknown_or_useless_are_refused(tmp_path):
    cases = {
        str(tmp_path / "absent.tar"): "no such file",
        str(tmp_path / "odd.txt"): "not a source that is known",
        str(tmp_path / "bad.tar"): "no usable pair.*\n.*broken tar",
        "nothing://x/y": "nothing://x/y.*fsspec",
        "http://127.0.0.1:9/x.tar": "no such file|cannot be read",
    }
    (tmp_path / "odd.txt").write_text("x")
    (tmp_path / "bad.tar").write_bytes(b"x" * 2000)
    for source, message in cases.items():
        with pytest.raises(UserError, match=f"(?s){message}"):
            run(source, tmp_path / "new")
    assert not (tmp_path / "new").exists() and not (tmp_path / "new.partial").exists()


def test_what_is_there_is_left_and_nothing_else_is_mixed_in(pairs, tmp_path, capsys):
    source = as_tar(pairs, tmp_path / "set.tar")
    run(source, tmp_path / "out")
    before = (tmp_path / "out/index.json").stat().st_mtime_ns
    run(source, tmp_path / "out")
    assert "there already" in capsys.readouterr().err and (tmp_path / "out/index.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"resolution 32 instead of 16.*another folder"):
        run(source, tmp_path / "out", resolution=16)
    (tmp_path / "else").mkdir()
    with pytest.raises(UserError, match="something else than shards"):
        run(source, tmp_path / "else")


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_what_is_there_is_not_taken_for_whole_where_a_shard_is_missing(compression, pairs, tmp_path):
    source, out = as_tar(pairs, tmp_path / "set.tar"), tmp_path / "out"
    run(source, out, compression=compression)
    shard = next(out.rglob("*.mds*"))
    shard.rename(tmp_path / "away")
    with pytest.raises(UserError, match=rf"{shard}: this shard is missing; .*remove {out} and prepare it anew"):
        run(source, out, compression=compression)
    (tmp_path / "away").rename(shard)
    run(source, out, compression=compression)


@pytest.mark.parametrize("name", ["prepare.json", "index.json"])
@pytest.mark.parametrize("text", [b"", b'{"source": "sha', b"\xff", b"[]", b"{}"])
def test_files_that_were_cut_off_are_named(name, text, tmp_path):
    prepare_shapes(tmp_path / "out", count=3, seed=0)
    (tmp_path / "out" / name).write_bytes(text)
    with pytest.raises(UserError, match=rf"{tmp_path}/out.*choose another folder, or remove this one") as error:
        prepare_shapes(tmp_path / "out", count=3, seed=0)
    assert name in str(error.value) or "shards with source None" in str(error.value)


def test_a_plan_that_was_cut_off_is_named(pairs, tmp_path):
    source = as_tar(pairs, tmp_path / "set.tar")
    run(source, tmp_path / "out")
    begun = tmp_path / "new.partial"
    (tmp_path / "out").rename(begun)
    (begun / "plan.json").write_text('{"settings":')
    with pytest.raises(UserError, match=rf"{begun}/plan.json: cannot be read .*remove {begun}, or choose another"):
        run(source, tmp_path / "new")


def full_disk(*_: object) -> None:
    """What writing to an open file raises: no name in it."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_named(pairs, tmp_path, monkeypatch):
    out, begun = tmp_path / "out", tmp_path / "out.partial"
    begun.mkdir()
    (begun / "index.json.new").symlink_to("/dev/full")
    source = as_tar(pairs, tmp_path / "set.tar")
    told = complaint(ecdit("prepare", source, out, *OPTIONS, "--workers", 1))
    assert f"{begun}: No space left on device" in told.replace("\n", " ")
    monkeypatch.setattr("ecdit.data.prepare.write_shards", full_disk)
    with pytest.raises(OSError) as error:
        prepare_shapes(out, count=50, seed=0)
    assert error.value.filename == str(begun)
    monkeypatch.setattr("socket.gethostname", full_disk)
    with pytest.raises(OSError) as error:
        prepare_shapes(out, count=50, seed=0)
    assert error.value.filename == f"{out}.lock" and not Path(f"{out}.lock").exists()


# ---- processes, ranks, and the plug pulled

COMMAND = [sys.executable, "-m", "ecdit.cli", "prepare"]
OPTIONS = ["--resolution", str(RESOLUTION), "--min-side", "16", "--part", "7", "--shard-size", "1"]


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

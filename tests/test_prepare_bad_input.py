"""Whatever is broken in a source is named, and the rest of it prepared; what is of no use at all is refused."""

import errno
import io
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ecdit import UserError
from ecdit.data.prepare import prepare_shapes
from tests.command import ecdit
from tests.pairs import as_folder, as_listed, as_mds, as_parquet, as_tar, make_pairs
from tests.preparing import (
    COUNT,
    OPTIONS,
    RESOLUTION,
    check_round_trip,
    encoded,
    picture,
    pixels,
    report,
    run,
    samples_of,
)
from tests.test_train import complaint


@pytest.fixture(scope="module")
def pairs():
    return make_pairs(COUNT)


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

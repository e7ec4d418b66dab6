"""Any source becomes the same shards: every pair once, captions byte for byte, as was asked for."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ecdit.data.sources import Columns, find_parts, tar
from ecdit.data.sources.files import expand
from tests.pairs import KINDS, as_folder, as_tar, make_pairs, served
from tests.photographs import photographs
from tests.preparing import COUNT, RESOLUTION, check_round_trip, encoded, picture, pixels, report, run, samples_of


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

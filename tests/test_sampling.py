"""A picture is a function of checkpoint, prompt and seed: alone, in a batch, on any ranks, drawn once."""

import errno
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from ecdit import drawing
from ecdit.assemble import start_topology
from ecdit.drawing import path_of, share, text_of
from ecdit.errors import UserError
from ecdit.export.weights import checkpoint_of
from ecdit.pictures import read_pixels, read_text, save_picture, slug
from ecdit.prompts import Request, read_prompts, repeat
from ecdit.recipe_io import change_recipe
from ecdit.run import Run
from ecdit.sample_command import sample
from ecdit.sampling import Sampler
from ecdit.sampling import sample as draw_pictures
from ecdit.sampling_job import joined, open_sampler, precision_of, sampling_recipe
from ecdit.whole import whole
from parallel import topology
from parallel.checkpoint.folder import committed
from tests.command import ecdit
from tests.ranks import run_on_ranks
from tests.test_layouts_cli import torchrun
from tests.test_train import complaint
from tests.tiny_runs import random_run, save_checkpoint

WORDS = ("red", "blue", "green", "yellow", "star", "circle", "ring", "square")
REQUESTS = [Request(f"a {WORDS[i % 4]} {WORDS[4 + i // 4 % 4]}", 7 * i) for i in range(64)]
LAYOUTS = {
    "1 rank": (1, ()),
    "data 4": (4, ()),
    "tensor 2, expert 4, sequence": (4, ("parallel.tensor=2", "parallel.expert=4", "parallel.sequence=true")),
    "data 2, pipeline 2": (4, ("parallel.pipeline=2",)),
    "pipeline 2, expert 2": (4, ("parallel.pipeline=2", "parallel.expert=2")),
    "expert-tensor 2, tensor 2": (4, ("parallel.tensor=2", "parallel.expert_tensor=2")),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return random_run(tmp_path_factory.mktemp("sampling") / "tiny")


def draw(sampler, requests):
    return sampler.draw([r.prompt for r in requests], [r.seed for r in requests], sampler.recipe.sample).latents


@pytest.fixture(scope="module")
def alone(run):
    """Each picture's latents, drawn by itself."""
    sampler = Sampler.from_run(run, torch.device("cpu"))
    return torch.cat([draw(sampler, [request]) for request in REQUESTS])


def on_ranks(folder, overrides):
    run = Run(folder)
    recipe = sampling_recipe(run, overrides)
    place = start_topology(recipe)
    sampler, _ = open_sampler(run, recipe, place)
    own = draw(sampler, share(REQUESTS, place.data_rank, place.data_ranks))
    found = torch.cat(place.gather([own]))
    topology.stop()
    return found.numpy()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_picture_is_the_same_alone_in_a_batch_and_on_any_layout(run, alone, layout):
    ranks, overrides = LAYOUTS[layout]
    exactly = layout in ("1 rank", "data 4", "data 2, pipeline 2")  # others have products of other sizes
    for found in run_on_ranks(on_ranks, ranks, run.folder, overrides):
        torch.testing.assert_close(torch.from_numpy(found), alone, rtol=0, atol=0 if exactly else 1e-5)
    assert (alone[0] - alone[1]).abs().max() > 0.1  # and no two are alike


def near_ties(model):
    """Routers whose scores of experts are large and all but alike, so that in fp32 rounding decides which token an
    expert takes."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("router.weight"):
                weight.copy_(1e-4 * weight + 30 * weight[:, :1])


def in_fp64(folder, overrides):
    run = Run(folder)
    recipe = sampling_recipe(run, ("train.precision=fp64", *overrides))
    place = start_topology(recipe)
    sampler, _ = open_sampler(run, recipe, place)
    near_ties(sampler.model)
    own = draw(sampler, share(REQUESTS[:16], place.data_rank, place.data_ranks))
    found = torch.cat(place.gather([own]))
    topology.stop()
    return found.numpy()


@pytest.fixture(scope="module")
def alone_in_fp64(run):
    sampler = Sampler.from_run(run, torch.device("cpu"))
    sampler.model.double()
    near_ties(sampler.model)
    sampler = Sampler(sampler.model, sampler.recipe, sampler.text_encoder, sampler.autoencoder)
    return torch.cat([draw(sampler, [request]) for request in REQUESTS[:16]])


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if not name.startswith("data")])
def test_in_fp64_near_ties_change_no_picture_whatever_is_computed_at_once(run, alone_in_fp64, layout):
    """In fp32 all of these pictures differ, by up to 0.05."""
    ranks, overrides = LAYOUTS[layout]
    for found in run_on_ranks(in_fp64, ranks, run.folder, ("sample.batch=16", *overrides)):
        torch.testing.assert_close(torch.from_numpy(found), alone_in_fp64, rtol=0, atol=1e-5)
    assert alone_in_fp64.dtype == torch.float32


def test_encoders_see_one_picture_at_a_time(run):
    """Else what they make of it would be rounded otherwise, and be another input."""
    sampler, asked = Sampler.from_run(run, torch.device("cpu")), []
    text, pictures = sampler.text_encoder, sampler.autoencoder
    sampler.text_encoder = lambda captions: asked.append(captions) or text(captions)
    sampler.autoencoder = SimpleNamespace(decode=lambda x: asked.append(len(x)) or pictures.decode(x))
    settings = sampler.recipe.sample.model_copy(update={"batch": 4})
    sampler.draw(["a", "b", "b"], [0, 1, 2], settings)
    assert asked == [["a", ""], ["b", ""], 1, 1, 1, 1]


def written_on_ranks(run_folder, folder):
    run, written, save = Run(run_folder), [], drawing.save_picture
    drawing.save_picture = lambda image, path, text: written.append(path.name) or save(image, path, text)
    with joined(sampling_recipe(run, ()), run) as place:
        sampler, source = open_sampler(run, sampling_recipe(run, ()), place)
        drawing.draw_all(sampler, str(source), REQUESTS[:5], sampler.recipe.sample, folder, place, "test")
    return written


def test_no_two_ranks_write_the_same_picture(run, tmp_path):
    """Five pictures on four ranks: the last one is drawn by two, of which one would find its file gone."""
    written = [name for names in run_on_ranks(written_on_ranks, 4, run.folder, tmp_path) for name in names]
    assert sorted(written) == sorted(path_of(request, tmp_path).name for request in REQUESTS[:5])


def test_a_full_disk_is_named_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    def full(*_args, **_more):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*a\.png'"):
        save_picture(torch.zeros(4, 4, 3, dtype=torch.uint8), tmp_path / "a.png", {})
    monkeypatch.undo()
    (tmp_path / "there").write_text("old")
    with pytest.raises(KeyboardInterrupt), whole(tmp_path / "there") as aside:
        aside.write_text("half")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["there"] and (tmp_path / "there").read_text() == "old"


def test_a_prompt_file_is_drawn_by_ranks_once(run, tmp_path):
    """The command under torchrun; then what is there is left alone, and what is not as asked for is drawn."""
    file = tmp_path / "prompts.jsonl"
    lines = [{"prompt": f"a {word} {{thing}}", "seed": 10 * i, "note": i} for i, word in enumerate(WORDS[:5])]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["-m", "ecdit.cli", "sample", str(run.folder), "--prompts", str(file), "-n", "2", "--out", str(tmp_path)]
    first = torchrun(2, *command, "parallel.expert=2")
    assert first.returncode == 0, first.stderr
    assert "10/10 pictures" in first.stderr and "pictures/s" in first.stderr
    pictures = {path: path.stat().st_mtime_ns for path in sorted((tmp_path / "samples").glob("*.png"))}
    assert len(pictures) == 10
    text = read_text(path_of(Request("a red {thing}", 1), tmp_path / "samples"))
    assert (text["prompt"], text["seed"], text["steps"], text["precision"]) == ("a red {thing}", "1", "3", "fp32")
    assert text["checkpoint"].startswith("step 3, ")
    damaged, changed, *_ = pictures
    before = read_pixels(damaged)
    damaged.write_bytes(damaged.read_bytes()[:200])
    Image.open(changed).save(changed)  # says no longer what it was drawn from
    again = ecdit(*command[2:])
    assert again.returncode == 0 and "8 of 10 pictures are there already" in again.stderr, again.stderr
    assert [path for path in pictures if path.stat().st_mtime_ns == pictures[path]] == list(pictures)[2:]
    assert torch.equal(read_pixels(damaged), before)  # by one process what two ranks had drawn
    with Image.open(tmp_path / "samples.png") as grid:
        assert grid.height > 5 * grid.width / 2  # five prompts of two pictures
    run_on_ranks(save_checkpoint, 1, run.folder, 4)
    newer = ecdit(*command[2:])
    assert newer.returncode == 0 and "there already" not in newer.stderr, newer.stderr
    assert read_text(damaged)["checkpoint"].startswith("step 4, ")


ON_GPUS = {
    "fp8": ["train.precision=bf16", "precision.fp8=block", "train.linears=transformer_engine", "train.recompute=block"],
    "graph": ["train.graph=true", "train.compile=true", "train.micro_batch=1", "parallel.dispatch_chunks=2"],
}


@pytest.mark.parametrize("trained", ON_GPUS)
def test_a_run_of_gpus_is_drawn_from_anywhere(tmp_path, trained):
    """What is of the training or its hardware alone is left out; the rest of the run's recipe stays."""
    run = random_run(tmp_path / "run", "model.group_tokens=16")
    plain = run.recipe()
    expected = Sampler.from_run(run, torch.device("cpu")).draw(["a star"], [0], plain.sample).images[0]
    run.write_recipe(change_recipe(plain, ON_GPUS[trained], "test"))
    words = ["parallel.tensor=2", "train.precision=fp32"]  # a layout that its micro-batch of one image would forbid
    drawn = sampling_recipe(run, words)
    assert (drawn.model.layers, drawn.sample, drawn.data) == (plain.model.layers, plain.sample, plain.data)
    assert (drawn.precision.fp8, drawn.train.linears, drawn.train.graph) == ("none", "torch", False)
    done = ecdit("sample", run.folder, "train.precision=fp32", "--prompt", "a star", "-n", "1")
    assert done.returncode == 0, done.stderr
    picture = run.samples / "a-star-0.png"
    assert torch.equal(read_pixels(picture), expected) and read_text(picture)["precision"] == "fp32"
    sampler = Sampler.from_run(run, torch.device("cpu"))  # what analyze and serve draw with, in the run's own type
    assert sampler.draw(["a star"], [0], plain.sample).images.float().std() > 10


def test_a_heat_map_draws_again_what_it_shows_and_no_more(run, tmp_path, monkeypatch):
    drawn, draw_them = [], Sampler.draw
    monkeypatch.setattr(Sampler, "draw", lambda self, *a, **k: drawn.append((a[0], k)) or draw_them(self, *a, **k))
    sample(run, (), list("abcde"), None, 2, 0, {}, tmp_path, heatmap=True)
    assert drawn[-1] == (["a", "b", "c"], {"count_experts": True}) and (tmp_path / "heatmap.png").exists()


def test_pictures_of_other_linears_are_others(run):
    recipe = sampling_recipe(run, ("train.linears=transformer_engine", "train.precision=bf16"))
    assert precision_of(recipe) == "bf16, transformer_engine"
    with pytest.raises(UserError, match=r"train\.precision: fp64 does not go with train\.linears: trans"):
        sampling_recipe(run, ("train.linears=transformer_engine", "train.precision=fp64"))
    with pytest.raises(UserError, match=r"this key belongs to the run, .*valid here: parallel\.\*"):
        sampling_recipe(run, ("train.compile=true",))


BF16 = ("train.precision=bf16", "sample.batch=8")


def test_pictures_in_fp8_are_others(run):
    recipe = sampling_recipe(run, (*BF16, "precision.fp8=block", "precision.where=[experts]"))
    assert precision_of(recipe) == "bf16, FP8 block of experts"
    assert precision_of(sampling_recipe(run, BF16)) == "bf16"  # whatever the run was trained in


@pytest.mark.parametrize(
    ("changes", "message"),
    {
        (*BF16, "precision.fp8=current"): "current would scale a picture's numbers by the pictures that are drawn with",
        (*BF16, "precision.fp8=delayed"): "delayed would scale .* by training steps before it; valid here: block, none",
        ("precision.fp8=block",): "precision.fp8: block goes with train.precision: bf16, not fp32",
        (*BF16, "sample.batch=1", "precision.fp8=block"): "sample.batch: 1 pictures give an expert 8 rows",
        (
            *BF16,
            "sample.batch=1",
            "precision.fp8=block",
            "parallel.tensor=2",
        ): "sample.batch: 2 pictures give .* 8 rows",
    }.items(),
)
def test_fp8_that_cannot_be_is_told_before_anything_is_drawn(run, changes, message):
    with pytest.raises(UserError, match=message):
        sampling_recipe(run, changes)


@pytest.mark.parametrize("key", ["steps=9", "solver=heun", "guidance=1.5", "shift=2.0", "batch=2"])
def test_pictures_of_other_settings_are_others(run, key):
    request, one, other = Request("a", 0), sampling_recipe(run, ()), sampling_recipe(run, (f"sample.{key}",))
    assert text_of(request, one.sample, "step 3", "fp32") != text_of(request, other.sample, "step 3", "fp32")


def test_prompt_files(tmp_path):
    text, objects = tmp_path / "p.txt", tmp_path / "p.jsonl"
    text.write_text("a red circle\n\n  two stars \n")
    assert read_prompts(text, 2, 5) == [
        Request(prompt, seed) for prompt in ("a red circle", "two stars") for seed in (5, 6)
    ]
    objects.write_text('{"prompt": "a", "seed": 3}\n{"prompt": ""}\n')
    assert read_prompts(objects, 1, 5) == [Request("a", 3), Request("", 5)]
    text.write_bytes("\ufeffa café\u2028au lait\r\n".encode())  # as Windows' editors write it
    assert read_prompts(text, 1, 0) == [Request("a café\u2028au lait", 0)]
    requests = repeat(["a", "a", "b"], 4, 0) + repeat(["a", "a", "b"], 4, 1)
    assert len({request.seed for request in requests}) == 24


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("none.txt", None, "none.txt: cannot read this prompts file: No such file or directory"),
        ("empty.txt", "\n", "empty.txt: has no prompt"),
        ("latin.txt", b"caf\xe9", "latin.txt: cannot read this prompts file: not UTF-8 text"),
        ("a.jsonl", "a red circle", "a.jsonl, line 1: 'a red circle' is no prompt"),
        ("b.jsonl", '{"prompt": "a"}\n{"prompt": "a", "seed": -1}', "b.jsonl, line 2: seed: -1 is no seed"),
        ("c.jsonl", '{"caption": "a"}', "c.jsonl, line 1:"),
        ("e.JSONL", '{"prompt": 5}', "e.JSONL, line 1:"),
        ("f.jsonl", '{"prompt": "a \\ud800 circle"}', "is no UTF-8 text"),
        ("d.jsonl", f'{{"prompt": "a", "seed": {2**63}}}', f"d.jsonl, line 1: seed: {2**63} is no seed"),
    ],
)
def test_bad_prompt_files_are_named(tmp_path, name, content, told):
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=told.replace("(", r"\(")):
        read_prompts(file, 1, 0)


def test_a_recipe_of_another_model_is_not_drawn_from(run, tmp_path):
    """Edited by hand, say, or beside checkpoints that were copied in."""
    edited = Run(tmp_path / "edited")
    shutil.copytree(run.folder, edited.folder)
    text = edited.recipe_file.read_text()
    edited.recipe_file.write_text(text.replace("capacity_factor: 2", "capacity_factor: 1"))
    told = r"another model than .*; make these agree:\n  model\.capacity_factor: 1\.0 in the recipe, 2\.0 in the checkp"
    with pytest.raises(UserError, match=told):
        draw_pictures(edited.folder, ["a red circle"])
    with pytest.raises(UserError, match=told):
        sample(edited, (), ["a"], None, 1, 0, {}, tmp_path, heatmap=False)
    with pytest.raises(UserError, match=told):
        checkpoint_of(edited)


def test_names_of_files_tell_prompts_apart():
    prompts = ["a red circle", "a red  circle", "A red circle", "a red circle!", "", "été", "x" * 80, "x" * 81]
    names = [slug(prompt) for prompt in prompts]
    assert names[0] == "a-red-circle" and len(set(names)) == len(names)
    assert all(0 < len(name) <= 60 and "/" not in name for name in names)


@pytest.mark.parametrize(
    ("prompts", "n", "message"),
    [
        ("red", 1, r"prompts: 'red' is no list of texts; valid: one such as \['a red circle'\]"),
        ([], 1, r"prompts: \[\] is no list of texts"),
        ([3], 1, r"prompts: \[3\] is no list of texts"),
        (["red"], 0, r"n: 0 pictures of each prompt; a whole number, at least 1"),
        (["red"], 1.5, r"n: 1\.5 pictures of each prompt; a whole number"),
        (["a \ud800 circle"], 1, r"prompt: 'a \\ud800 circle' is no UTF-8 text"),
    ],
)
def test_bad_input_of_the_function(run, prompts, n, message):
    with pytest.raises(UserError, match=message):
        draw_pictures(run.folder, prompts, n=n)


def test_a_prompt_of_two_lines_is_one_label(run, tmp_path):
    sample(run, (), ["a red\ncircle"], None, 1, 0, {}, tmp_path, heatmap=True)
    assert {"samples.png", "heatmap.png"} <= {path.name for path in tmp_path.iterdir()}


def test_bad_input_of_the_command(run, tmp_path, capsys):
    def told(folder, overrides=(), prompts=None, file=None):
        with pytest.raises(UserError) as error:
            sample(Run(folder), overrides, prompts, file, 1, 0, {}, tmp_path, heatmap=False)
        topology.stop()
        return str(error.value)

    for seed, n in ((2**63, 1), (2**63 - 1, 2)):  # of the second, the second picture has none
        with pytest.raises(UserError, match=f"seed: {2**63} is no seed; valid: from 0 to {2**63 - 1}"):
            sample(run, (), ["a"], None, n, seed, {}, tmp_path, heatmap=False)
    with pytest.raises(UserError, match=f"seed: {2**64} is no seed"):
        Sampler.from_run(run, torch.device("cpu")).draw(["a"], [2**64], run.recipe().sample)
    lost = tmp_path / "no.txt"
    assert "'model.layers=2': this key belongs to the run" in told(run.folder, ["model.layers=2"])
    assert "parallel.tensor: 3 does not divide model.heads: 4" in told(run.folder, ["parallel.tensor=3"])
    assert "2 does not divide the 1 ranks of this job" in told(run.folder, ["parallel.pipeline=2"])
    assert "--prompt and --prompts: give one of the two" in told(run.folder, (), ["a"], lost)
    assert "no run here" in told(tmp_path / "nothing")
    empty = Run(tmp_path / "empty")
    empty.write_recipe(run.recipe())
    assert "no checkpoint yet" in told(empty.folder)
    broken = tmp_path / "broken"
    shutil.copytree(run.folder, broken)
    *older, newest = committed(Run(broken).checkpoints)
    for folder in older:
        shutil.rmtree(folder)
    file = next(newest.glob("__*"))
    file.write_bytes(file.read_bytes()[:-1])
    assert f"{newest} is broken: " in told(broken)
    shutil.copytree(run.folder / "checkpoints" / newest.name, broken / "checkpoints/step-1")
    capsys.readouterr()
    sample(Run(broken), (), ["a"], None, 1, 0, {}, tmp_path, heatmap=False)
    assert checkpoint_of(Run(broken)).folder.name == "step-1"
    assert capsys.readouterr().err.count("; step-1 is taken") == 2  # of what is drawn and of what is exported
    wrong = complaint(ecdit("sample", run.folder, "--step", 2))
    assert "--step: 2: " in wrong and "has no checkpoint of this step; valid: 3" in wrong
    assert f"{lost}: cannot read this prompts file" in complaint(ecdit("sample", run.folder, "--prompts", lost))

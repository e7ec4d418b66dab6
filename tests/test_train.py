"""Training as a user runs it: through the command line, in a process of its own."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from PIL import Image

from ecdit import UserError, load_recipe, sample
from ecdit.callbacks.metrics import Wandb, read_metrics
from ecdit.data.prepare import Settings, prepare, prepare_shapes
from ecdit.run import check_same_model
from tests.command import ecdit
from tests.photographs import photographs
from tests.tiny_encoders import make_autoencoder, make_text_encoder

ROOT = Path(__file__).parents[1]
TINY = [
    "model.layers=2", "model.width=32", "model.heads=2", "model.kv_heads=2", "model.experts=4",
    "model.group_tokens=256", "model.text_width=16", "train.batch=8", "train.micro_batch=4", "train.steps=8",
    "optimizer.warmup=2", "log.tensorboard=false", "sample.steps=4", "checkpoint.every=100",
]  # fmt: skip
STOPPED, BAD_INPUT, FAILED = 75, 2, 1


def complaint(finished, code=BAD_INPUT):
    """The message of a command that had to refuse: the exit code, no traceback."""
    assert finished.returncode == code, finished.stderr
    assert "Traceback" not in finished.stderr
    return finished.stderr


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train") / "shapes"
    prepare_shapes(folder, count=40, seed=0)
    return folder


def command(shapes, runs, *overrides):
    data = f"data.streams=[{{path: {shapes}}}]"
    return ["train", ROOT / "recipes/quickstart.yaml", *TINY, data, *overrides, "--runs", runs]


def losses(run):
    return [record["loss"] for record in read_metrics(run / "metrics.jsonl")]


@pytest.fixture(scope="module")
def trained(shapes, tmp_path_factory):
    """An uninterrupted run, with TensorBoard and two picture grids."""
    runs = tmp_path_factory.mktemp("runs")
    done = ecdit(*command(shapes, runs, "log.tensorboard=true", "log.grid_every=4", "log.samples=true"))
    assert done.returncode == 0, done.stderr
    return runs / "quickstart"


def test_a_run_leaves_what_is_promised(trained):
    records = read_metrics(trained / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 9))
    for record in records:
        needed = {"step", "loss", "grad_norm", "lr", "images_per_s", "mfu", "seconds", "memory", "sample_ids"}
        assert needed <= record.keys()
        assert len(record["unrouted_share"]) == len(record["experts_per_token_std"]) == 1
        assert len(record["sample_ids"]) == 8 and 0 < record["mfu"] < 1.5
    assert load_recipe(trained / "recipe.yaml").model.width == 32
    assert {path.name for path in (trained / "samples").iterdir()} == {"step-4.png", "step-8.png"}
    assert list((trained / "tensorboard").iterdir())
    assert (trained / "checkpoints/latest").read_text() == "step-8\n"


def test_the_same_command_again_has_nothing_to_do(shapes, trained):
    before = losses(trained)
    again = ecdit(*command(shapes, trained.parent, "log.samples=true"))
    assert again.returncode == 0 and "Resumed from" in again.stderr
    assert losses(trained) == before


def test_fewer_steps_than_there_are_change_nothing(shapes, trained):
    before = (trained / "recipe.yaml").read_text(), losses(trained)
    again = ecdit(*command(shapes, trained.parent, "train.steps=3"))
    assert again.returncode == 0 and "more than train.steps: 3 already: nothing to do" in again.stderr
    other = ecdit(*command(shapes, trained.parent, "optimizer.lr=0.1"))  # as many, and a rate that trained none
    assert other.returncode == 0, other.stderr
    assert before == ((trained / "recipe.yaml").read_text(), losses(trained))


def test_a_line_of_metrics_that_is_none_does_not_stop_a_resume(shapes, trained, tmp_path):
    run = tmp_path / trained.name
    shutil.copytree(trained, run, symlinks=True)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('5\n{"loss": 1}\n')
    again = ecdit(*command(shapes, tmp_path))
    assert again.returncode == 0, again.stderr
    assert losses(run) == losses(trained)


@pytest.mark.parametrize("workers", [0, 1])
def test_ctrl_c_saves_and_the_same_command_goes_on_bitwise(shapes, trained, tmp_path, workers):
    overrides = command(shapes, tmp_path, f"data.workers={workers}")
    run = tmp_path / "quickstart"
    process = subprocess.Popen(
        [sys.executable, "-m", "ecdit.cli", *map(str, overrides)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (run / "metrics.jsonl").exists():
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # a terminal's Ctrl-C reaches every process of the command
    _, told = process.communicate(timeout=120)
    assert process.returncode == STOPPED, told
    assert "Traceback" not in told
    stopped_at = int((run / "checkpoints/latest").read_text().split("-")[1])
    assert 0 < stopped_at < 8
    again = ecdit(*overrides)
    assert again.returncode == 0 and f"at step {stopped_at}" in again.stderr, again.stderr
    assert losses(run) == losses(trained)


def test_kill_9_loses_no_more_than_the_steps_since_the_checkpoint(shapes, trained, tmp_path):
    overrides = command(shapes, tmp_path, "checkpoint.every=2", "train.steps=8")
    run = tmp_path / "quickstart"
    process = subprocess.Popen(
        [sys.executable, "-m", "ecdit.cli", *map(str, overrides)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (run / "checkpoints/step-2/manifest.json").exists():
        time.sleep(0.01)
    process.kill()
    process.wait()
    again = ecdit(*overrides)
    assert again.returncode == 0 and "Resumed from" in again.stderr, again.stderr
    assert losses(run) == losses(trained)


def test_losses_do_not_depend_on_the_micro_batch(shapes, trained, tmp_path):
    """Groups of consecutive images are the same, so only the rounding differs."""
    done = ecdit(*command(shapes, tmp_path, "train.micro_batch=8", "train.steps=3"))
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "quickstart") == pytest.approx(losses(trained)[:3], rel=1e-5)


def test_two_ranks_follow_the_same_curve(shapes, trained, tmp_path):
    launched = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "ecdit.cli",
         *map(str, command(shapes, tmp_path, "log.samples=true", "log.grid_every=4"))],
        capture_output=True, text=True, timeout=240,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert launched.returncode == 0, launched.stderr
    run = tmp_path / "quickstart"
    assert losses(run) == pytest.approx(losses(trained), rel=1e-4)
    assert (run / "samples/step-8.png").exists()
    records = read_metrics(run / "metrics.jsonl")
    expected = read_metrics(trained / "metrics.jsonl")
    for record, one in zip(records, expected, strict=True):
        assert record["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
        assert record["unrouted_share"] == pytest.approx(one["unrouted_share"], abs=1e-6)
        assert record["sample_ids"] == one["sample_ids"]


OTHER_WAYS = {
    "bf16": ["train.precision=bf16"],
    "masked, with a decoder, then unmasked": [
        "masking.ratio=[[0,0.5],[20,0.0]]", "model.decoder.layers=1", "model.decoder.width=16",
        "model.decoder.heads=2", "model.group_tokens=128",
    ],
    "token choice": ["model.routing=token_choice"],
    "dense, the classic optimizer": ["model.routing=dense", "optimizer.name=torch_rmsprop", "optimizer.lr=3e-4"],
}  # fmt: skip


@pytest.mark.parametrize("way", OTHER_WAYS)
def test_other_ways_to_train(shapes, tmp_path, way):
    """The loss falls, what is told is finite, and the run can be drawn from."""
    done = ecdit(*command(shapes, tmp_path, "train.steps=30", *OTHER_WAYS[way]))
    assert done.returncode == 0, done.stderr
    curve = losses(tmp_path / "quickstart")
    assert all(map(math.isfinite, curve)) and sum(curve[-5:]) < sum(curve[:5])
    assert sample(tmp_path / "quickstart", ["a red circle"], steps=2).images.shape == (1, 32, 32, 3)


def test_held_out_pairs_may_share_a_picture(shapes, tmp_path):
    """As those of COCO do, with five captions each."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.new("RGB", (32, 32), "red").save(pictures / "one.png")
    lines = [json.dumps({"image": "one.png", "caption": f"caption {n}"}) for n in range(16)]
    (pictures / "pairs.jsonl").write_text("\n".join(lines))
    made = ecdit("prepare", pictures / "pairs.jsonl", tmp_path / "held", "--resolution", "32")
    assert made.returncode == 0, made.stderr
    keys = [f"log.held_out.path={tmp_path}/held", "log.held_out.every=4"]
    trained = ecdit(*command(shapes, tmp_path, *keys, "log.held_out.pictures=16"))
    assert trained.returncode == 0 and (tmp_path / "quickstart/held-out.jsonl").exists(), trained.stderr
    refused = ecdit(*command(shapes, tmp_path / "more", *keys, "log.held_out.pictures=32"))
    assert refused.returncode == 2 and "pictures: 32, but" in refused.stderr and "has 16; try 16" in refused.stderr


def test_a_misspelt_key_gets_the_nearest_one(shapes, tmp_path):
    assert "did you mean model.experts?" in complaint(ecdit(*command(shapes, tmp_path, "model.exprets=8")))
    assert not (tmp_path / "quickstart").exists()


def test_a_text_encoder_that_is_missing_is_named(shapes, tmp_path):
    message = complaint(ecdit(*command(shapes, tmp_path, "data.text_encoder=./absent/t5")))
    assert "data.text_encoder: './absent/t5': no such folder" in message


def test_a_damaged_shard_is_named_before_the_first_step(shapes, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in shapes.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    shard = next(copy.glob("*.mds"))
    data = bytearray(shard.read_bytes())
    data[1000] ^= 0xFF
    shard.write_bytes(data)
    assert f"{shard}: this shard is damaged" in complaint(ecdit(*command(copy, tmp_path)))
    assert not (tmp_path / "quickstart").exists()


def test_a_checkpoint_of_another_model_is_refused_with_the_keys(shapes, trained):
    message = complaint(ecdit(*command(shapes, trained.parent, "model.experts=8", "model.layers=4")))
    assert "model.experts: 8 in the recipe, 4 in the checkpoint" in message
    assert "model.layers: 4 in the recipe, 2 in the checkpoint" in message


def mount_is_allowed():
    probe = ["unshare", "-rm", "sh", "-c", "mount -t tmpfs none /mnt"]
    return subprocess.run(probe, capture_output=True).returncode == 0


@pytest.mark.skipif(not mount_is_allowed(), reason="a small file system cannot be mounted here")
def test_a_full_disk_keeps_the_checkpoint_before(shapes, tmp_path):
    """A real file system with room for one checkpoint and a half, in a name space of its own."""
    runs, kept = tmp_path / "runs", tmp_path / "kept"
    runs.mkdir()
    inner = [sys.executable, "-m", "ecdit.cli", *command(shapes, runs, "checkpoint.every=3", "train.steps=6")]
    script = 'mount -t tmpfs -o size=1800k none "$1"; shift; "$@"; code=$?; cp -r "$0" "$KEPT"; exit $code'
    finished = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, str(runs), str(runs), *map(str, inner)],
        capture_output=True, text=True, timeout=240,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "KEPT": str(kept)},
    )  # fmt: skip
    message = complaint(finished)
    assert "cannot write this checkpoint" in message and "step-3 is kept" in message
    assert sorted(path.name for path in (kept / "quickstart/checkpoints").iterdir()) == ["latest", "step-3"]
    assert not math.isnan(losses(kept / "quickstart")[-1])


def test_losses_that_stay_non_finite_end_the_run(shapes, tmp_path):
    done = ecdit(*command(shapes, tmp_path, "optimizer.lr=1e30", "train.steps=40", "checkpoint.every=1"))
    message = complaint(done, FAILED)
    assert "not finite in the last 10 steps" in message and "The newest checkpoint is" in message
    records = read_metrics(tmp_path / "quickstart/metrics.jsonl")
    assert records[-1]["skipped"] == 10 and records[-1]["loss"] is None


def test_samples_do_not_depend_on_the_batch(trained):
    """With Heun's solver; tests/test_sampling.py has Euler's, on all layouts."""
    solver = "heun"
    prompts = ["a red circle", "two blue squares", "a green star"]
    together = sample(trained, prompts, n=2, seed=4, steps=3, solver=solver)
    alone = sample(trained, prompts[1:2], n=1, seed=5, steps=3, solver=solver)
    assert (together.prompts[3], together.seeds[3]) == (alone.prompts[0], alone.seeds[0])
    assert (together.images[3].int() - alone.images[0].int()).abs().max() <= 1


def test_experts_are_counted_per_layer_time_and_token(trained):
    drawn = sample(trained, ["a red circle"], steps=3, count_experts=True)
    assert drawn.experts.shape == (3, 1, 1, 64) and len(drawn.times) == 3
    # an image's two halves share its group: together its tokens meet capacity_factor experts on average
    assert 0 < drawn.experts.float().mean() < 4


def test_the_sample_command_writes_pictures_that_know_their_prompt(trained, tmp_path):
    done = ecdit("sample", trained, "--prompt", "a red circle", "-n", 2, "--heatmap", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "samples.png").width > 200
    assert Image.open(tmp_path / "heatmap.png").width > 200
    single = Image.open(tmp_path / "samples/a-red-circle-1.png")
    assert single.size == (32, 32)
    assert (single.text["prompt"], single.text["seed"], single.text["steps"]) == ("a red circle", "1", "4")


def test_sampling_refuses_what_is_no_run(tmp_path, trained):
    assert "no run here" in complaint(ecdit("sample", tmp_path))
    assert "solver: 'midpoint'" in complaint(ecdit("sample", trained, "--solver", "midpoint"))
    with pytest.raises(UserError, match="steps"):
        sample(trained, ["a"], steps=0)


def test_wandb_without_its_package_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"log.wandb: 'mine' needs the package wandb"):
        Wandb("mine")


def test_evaluate_prints_json_on_standard_output_alone(trained):
    done = ecdit("evaluate", trained, "--suite", "shapes", "-n", 2, "--json")
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout)
    assert set(scores["tasks"]) >= {"single_object", "counting", "color_attr"}
    assert json.loads((trained / "evaluate-shapes.json").read_text()) == scores
    assert "valid: samples, shapes" in complaint(ecdit("evaluate", trained, "--suite", "fidd"))


def test_photographs_are_overfitted_through_real_encoders(tmp_path):
    """32 photographs, a T5 encoder and an AutoencoderKL loaded as downloaded ones are."""
    prepare(Settings(str(photographs(tmp_path)), resolution=64, min_side=64), tmp_path / "photographs", workers=1)
    encoders = make_text_encoder(tmp_path / "t5"), make_autoencoder(tmp_path / "vae")
    done = ecdit(
        *command(tmp_path / "photographs", tmp_path),
        f"data.text_encoder={encoders[0]}", f"data.autoencoder={encoders[1]}", "data.resolution=64",
        "model.side=8", "model.channels=4", "model.patch=2", "model.text_width=32", "model.width=64",
        "model.group_tokens=128", "train.batch=32", "train.micro_batch=32", "train.steps=150",
        "optimizer.lr=3e-3", "optimizer.warmup=10", "diffusion.text_drop=0.0", "masking.ratio=0.0",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    curve = losses(tmp_path / "quickstart")
    assert sum(curve[-10:]) < 0.6 * sum(curve[:10])
    drawn = ecdit("sample", tmp_path / "quickstart", "--prompt", "a dog", "-n", 1)
    assert drawn.returncode == 0, drawn.stderr
    assert Image.open(tmp_path / "quickstart/samples/a-dog-0.png").size == (64, 64)


def test_a_checkpoint_that_is_older_than_a_key_goes_on_with_its_default():
    recipe = load_recipe(ROOT / "recipes/quickstart.yaml")
    values = recipe.model_dump(mode="json")
    del values["model"]["sparse_layers"], values["log"]["held_out"]
    saved = SimpleNamespace(folder="step-1", meta={"recipe": yaml.safe_dump(values)})
    assert check_same_model(recipe, saved) == []
    other = load_recipe(ROOT / "recipes/quickstart.yaml", ["model.sparse_layers=all"])
    with pytest.raises(UserError, match=r"model\.sparse_layers: 'all' in the recipe, 'every_second' in the checkpoint"):
        check_same_model(other, saved)
    values["model"]["of_another_version"] = 1
    saved.meta["recipe"] = yaml.safe_dump(values)
    with pytest.raises(UserError, match="of_another_version"):
        check_same_model(recipe, saved)

"""`ecdit export`: bit for bit, and a diffusers folder that draws the same pictures without this package."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from ecdit import UserError
from ecdit.cli import app
from ecdit.data.torchvision_guard import hide_broken_torchvision
from ecdit.diffusion.draws import seed_noise
from ecdit.export import weights
from ecdit.export.diffusers_folder import write_pipeline
from ecdit.export.weights import checkpoint_of, write_file
from ecdit.run import Run
from ecdit.sampling import Sampler
from tests.tiny_encoders import make_autoencoder, make_text_encoder
from tests.tiny_runs import ROOT, make_run, make_shapes

STRONG = ["train.steps=30", "optimizer.lr=1e-2", "model.layers=4"]  # weights that make a difference
RUNS = {
    "expert_choice": [],
    "token_choice": ["model.routing=token_choice", "sample.solver=heun", "sample.guidance=2.0", "sample.batch=2"],
    "choices": ["model.sparse_layers=all", "model.router_input=unmodulated"],
    "decoder": ["model.routing=dense", "masking.ratio=0.5", "model.decoder.layers=1", "model.decoder.width=16",
                "model.decoder.heads=2"],
}  # fmt: skip
ALL = [*RUNS, "encoders"]
PROMPTS, SEEDS = ["a red circle", "two blue squares", ""], [0, 7, 2**40]
TOLERANCE = {"fp32": 1e-4, "bf16": 0.02}

# what a user types, in an interpreter that must not find this package
DRAW = """
import json, sys
sys.modules["torchvision"] = None  # a broken one must not matter; nothing here uses it
import numpy as np, torch
from diffusers import DiffusionPipeline
wanted, found = json.loads(sys.argv[1]), {}
for name, (folder, options) in wanted["folders"].items():
    dtype = torch.bfloat16 if name.endswith("bf16") else torch.float32
    pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, **options)
    pipe.set_progress_bar_config(disable=True)
    found[name] = pipe(wanted["prompts"], seed=wanted["seeds"], output_type="latent").images.numpy()
    found[f"{name} pictures"] = np.stack([np.asarray(i) for i in pipe(wanted["prompts"], seed=wanted["seeds"]).images])
assert not {"ecdit", "parallel"} & {name.split(".")[0] for name in sys.modules}
np.savez(sys.argv[2], **found)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    shapes = make_shapes(folder)
    for name, overrides in RUNS.items():
        make_run(shapes, folder, f"run={name}", *STRONG, *overrides)
    encoders = make_text_encoder(folder / "t5"), make_autoencoder(folder / "vae")
    make_run(
        shapes, folder, "run=encoders", *STRONG, f"data.text_encoder={encoders[0]}",
        f"data.autoencoder={encoders[1]}", "model.text_width=32", "model.side=4", "model.channels=4",
        "model.patch=1", "model.group_tokens=32", "model.layers=2",
    )  # fmt: skip
    return folder


def latents_of(run):
    """What `ecdit sample` decodes, and what it makes of it."""
    sampler = Sampler.from_run(Run(run))
    drawn = sampler.draw(PROMPTS, SEEDS, sampler.recipe.sample)
    return drawn.latents.numpy(), drawn.images.numpy()


@pytest.fixture(scope="module")
def drawn(runs, tmp_path_factory):
    """Latents and pictures of every exported folder, from one interpreter that knows nothing of this package."""
    place = tmp_path_factory.mktemp("elsewhere")
    trusted = {"trust_remote_code": True}
    folders = {}
    for name in ALL:
        for dtype in ("fp32", "bf16") if name == "expert_choice" else ("fp32",):
            write_pipeline(Run(runs / name), "ema", dtype, place / f"{name} {dtype}")
            folders[f"{name} {dtype}"] = str(place / f"{name} {dtype}"), trusted
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "SHARD_BYTES", 100_000)
        write_pipeline(Run(runs / "expert_choice"), "ema", "fp32", place / "shards")
    folders["shards"] = str(place / "shards"), trusted | {"custom_pipeline": str(place / "shards/pipeline_ecdit.py")}
    wanted = json.dumps({"folders": folders, "prompts": PROMPTS, "seeds": SEEDS})
    environment = {"HF_MODULES_CACHE": str(place / "modules"), "OMP_NUM_THREADS": "1", "HOME": str(place)}
    command = [sys.executable, "-P", "-c", DRAW, wanted, str(place / "found.npz")]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return np.load(place / "found.npz")


@pytest.mark.parametrize(("name", "dtype"), [(name, "fp32") for name in ALL] + [("expert_choice", "bf16")])
def test_the_pipeline_draws_what_the_run_does(runs, drawn, name, dtype):
    latents, pictures = latents_of(runs / name)
    difference = np.abs(drawn[f"{name} {dtype}"] - latents)
    error = difference.max() if dtype == "fp32" else difference.mean()  # rounding may send a token to another expert
    assert error < TOLERANCE[dtype] and np.abs(latents).max() > 1
    if dtype == "fp32":
        assert np.abs(drawn[f"{name} {dtype} pictures"].astype(int) - pictures.astype(int)).max() <= 1


def test_weights_in_several_files_are_the_same(drawn):
    assert np.array_equal(drawn["shards"], drawn["expert_choice fp32"])


def test_noise_is_ours():
    hide_broken_torchvision()
    from ecdit.export import pipeline_ecdit

    seeds = [0, 3, 2**32 + 5]
    ours = seed_noise(seeds, 3, 5, torch.device("cpu"))
    torch.testing.assert_close(pipeline_ecdit.draw_noise(seeds, 3, 5), ours, rtol=1e-6, atol=1e-6)


def invoke(*arguments):
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


@pytest.mark.parametrize("kind", ["ema", "weights"])
def test_one_file_holds_the_checkpoint_bit_for_bit(runs, kind, tmp_path):
    run = Run(runs / "expert_choice")
    done = invoke(run.folder, "--weights", kind, "--out", tmp_path / "w.safetensors")
    assert done.exit_code == 0, done.output
    saved, found = run.newest_checkpoint().kind(kind), load_file(tmp_path / "w.safetensors")
    assert found.keys() == saved.keys() and all(torch.equal(found[name], saved[name]) for name in saved)
    done = invoke(run.folder, "--weights", kind, "--dtype", "bf16", "--out", tmp_path / "b.safetensors")
    assert done.exit_code == 0, done.output
    rounded = load_file(tmp_path / "b.safetensors")
    assert all(torch.equal(rounded[name], saved[name].bfloat16()) for name in saved)


def test_others_may_read_what_the_umask_lets_them(runs, tmp_path):
    """Libraries write weights through temporary files, which are private."""
    before = os.umask(0o027)
    try:
        write_file(checkpoint_of(Run(runs / "encoders")), "ema", "fp32", tmp_path / "w.safetensors")
        write_pipeline(Run(runs / "encoders"), "ema", "fp32", tmp_path / "pipe")
        assert os.umask(0o027) == 0o027  # is left as it was
    finally:
        os.umask(before)
    paths = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(path.suffix == ".safetensors" for path in paths) == 4  # the file, the model and two encoders
    assert {path.stat().st_mode & 0o777 for path in paths} == {0o640}
    assert {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_dir()} == {0o750}


def test_an_earlier_export_is_replaced_and_nothing_else_is(runs, tmp_path):
    run = runs / "expert_choice"
    for _ in range(2):
        done = invoke(run, "--to", "diffusers", "--out", tmp_path / "pipe")
        assert done.exit_code == 0, done.output
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match=r"mine: exists and is no earlier export"):
        write_pipeline(Run(run), "ema", "fp32", tmp_path / "mine")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "onnx"], "--to: 'onnx' is not known; valid: safetensors, diffusers"),
        (["--dtype", "fp8"], "--dtype: 'fp8' is not known; valid: fp32, bf16"),
        (["--weights", "best"], "--weights: 'best' is not known; valid: ema, weights"),
    ],
)
def test_a_wrong_choice_is_named(runs, arguments, message):
    done = invoke(runs / "expert_choice", *arguments)
    assert isinstance(done.exception, UserError) and message in str(done.exception)


def test_the_exported_code_imports_nothing_of_ours():
    for name in ("modeling_ecdit", "pipeline_ecdit"):
        text = (ROOT / f"ecdit/export/{name}.py").read_text()
        assert "import ecdit" not in text and "from ecdit" not in text and "parallel" not in text

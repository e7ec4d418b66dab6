"""`ecdit study`: what is missing is run, once; what was found is right; the page says all of it."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields

import numpy as np
import pytest
import torch
import yaml
from scipy.stats import binomtest
from typer.testing import CliRunner

from ecdit import UserError, load_recipe, reference
from ecdit.callbacks import Callback
from ecdit.callbacks.held_out import HeldOutLoss, draws
from ecdit.callbacks.metrics import JsonLines, read_metrics
from ecdit.cli import app
from ecdit.data.encoders import HashText
from ecdit.data.shapes import TASKS, make
from ecdit.evaluate.shapes import suite
from ecdit.model.count import forward_flops
from ecdit.recipe_io import change_recipe
from ecdit.run import Run
from ecdit.stop import StopRequest
from ecdit.study.claims import HOLDS, MISSING, NOT, UNKNOWN, claims, interval, judge
from ecdit.study.intervals import Estimate, Resamples, estimate, share, wilson
from ecdit.study.page import write
from ecdit.study.plan import Study, StudyPlan
from ecdit.train import DONE, STOPPED, train
from launcher.study import Runner, places_of
from tests.browser import open_browser
from tests.command import ecdit
from tests.pictures import save_square
from tests.tiny_runs import ROOT, TINY, make_shapes

STEPS, EVERY, PICTURES = 100, 10, 64
PLAN = {
    "name": "tiny", "reference": "dense", "equal_compute": "dense_wide", "token_choice": "token_choice",
    "expert_choice": ["expert_choice", "more_experts"], "pictures": 4,
    "ablations": [{"question": "More capacity?", "default": "expert_choice", "variants": ["more_capacity"]}],
}  # fmt: skip
VARIANTS = {
    "dense": {"routing": "dense"},
    "dense_wide": {"routing": "dense", "width": 36},
    "token_choice": {"routing": "token_choice"},
    "expert_choice": {},
    "more_experts": {"experts": 8},
    "more_capacity": {"capacity_factor": 4.0},
}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("data"))


def make_study(folder, shapes, plan=PLAN, **keys):
    """A study of tiny models as a user would write it."""
    folder.mkdir(parents=True, exist_ok=True)
    base = {
        "extends": str(ROOT / "recipes/study/cpu/base.yaml"),
        "model": {
            "layers": 2, "width": 32, "heads": 2, "kv_heads": 2, "text_width": 16, "experts": 4, "group_tokens": 256,
        },
        "data": {"streams": [{"path": str(shapes)}]},
        "optimizer": {"warmup": 2},
        "train": {"steps": STEPS, "batch": 8, "micro_batch": 4},
        "log": {"every": 1, "held_out": {"path": str(shapes), "every": EVERY, "pictures": 16}},
        "sample": {"steps": 2},
    }  # fmt: skip
    for section, values in keys.items():
        base[section] = base[section] | values
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    (folder / "study.yaml").write_text(yaml.safe_dump(plan))
    for name, model in VARIANTS.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"extends": "base.yaml", "run": name, "model": model}))
    return folder


def fake_run(study, variant, seed, losses, right=0.5, steps=STEPS):
    """A run's folder as training and evaluation leave it. losses: of the evaluations, the same for all pictures but for
    what is of the picture; right: share of the pictures of each task."""
    run = study.run_of(variant, seed)
    place = Run(study.folder / run.name)
    place.write_recipe(run.recipe)
    sparse = run.recipe.model.routing != "dense"
    routing = {"unrouted_share": [0.1], "experts_per_token": [1.5], "experts_per_token_std": [1.0]} if sparse else {}
    with place.metrics_file.open("w") as file:
        for step in range(1, steps + 1):
            record = {"step": step, "loss": 1.0, "seconds": 0.5 if sparse else 0.25, "mfu": 0.4, "images_per_s": 16.0}
            file.write(json.dumps(record | routing) + "\n")
    rows = place.held_out_file.with_suffix("")
    rows.mkdir()
    pictures = np.random.default_rng(5).normal(size=PICTURES)
    with place.held_out_file.open("w") as file:
        for step, loss in zip(range(EVERY, steps + 1, EVERY), losses, strict=True):
            np.save(rows / f"step-{step}.npy", (loss + 0.01 * (pictures - pictures.mean())).astype(np.float32))
            file.write(json.dumps({"step": step, "loss": loss}) + "\n")
    _judge(place, right, steps)
    return place


def _judge(place, right, steps):
    (place.folder / f"evaluate-shapes-step-{steps}.json").write_text("{}")
    folder = place.folder / f"evaluate/step-{steps}"
    (folder / "pictures").mkdir(parents=True)
    with (folder / "shapes.jsonl").open("w") as file:
        for number, prompt in enumerate(suite(10, 0)):
            name = f"{number}.png"
            save_square(folder / "pictures" / name)
            known = {"task": prompt.scene.task, "prompt": prompt.caption, "file": name, "seed": 0}
            file.write(json.dumps(known | {"right": number % 10 < 10 * right}) + "\n")


DENSE = np.linspace(1.0, 0.5, 10)  # 0.5 at step 100
TWICE = np.concatenate([np.linspace(1.0, 0.5, 5), np.linspace(0.48, 0.4, 5)])  # 0.5 at step 50


@pytest.fixture
def done(tmp_path, shapes):
    """A study whose outcome is known: expert choice is twice as fast as dense, token choice slower, two seeds."""
    study = Study(make_study(tmp_path / "tiny", shapes), seeds=[0, 1], runs=tmp_path / "runs")
    for seed in (0, 1):
        fake_run(study, "dense", seed, DENSE + 0.001 * seed, right=0.3)
        fake_run(study, "dense_wide", seed, DENSE - 0.05, right=0.3)
        fake_run(study, "token_choice", seed, DENSE + 0.1, right=0.2)
        fake_run(study, "expert_choice", seed, TWICE + 0.001 * seed, right=0.8)
    return study


# ----------------------------------------------------------------------------------------------------------- statistics


def test_wilson_is_scipys():
    for right, count in ((0, 10), (3, 10), (10, 10), (71, 100)):
        known = binomtest(right, count).proportion_ci(0.95, "wilson")
        assert wilson(right, count) == pytest.approx((known.low, known.high), abs=1e-6)


def test_the_bootstrap_of_a_mean_is_the_normal_intervals():
    values = np.random.default_rng(3).normal(2.0, 1.0, (1, 1, 2000))
    (resampled,) = Resamples(1, [2000]).means(values)
    found = estimate(values.mean(), resampled[:, 0])
    half = 1.96 * values.std() / np.sqrt(2000)
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.006)


def test_seeds_that_differ_widen_an_interval_and_shared_pictures_cancel():
    pictures = np.random.default_rng(3).normal(0.0, 1.0, 500)
    seeds = np.array([0.0, 0.3, -0.3])
    ours, theirs = (offset + seeds[:, None, None] + pictures for offset in (1.0, 1.2))
    draws = Resamples(3, [500])
    (a,), (b,) = draws.means(ours), draws.means(theirs)
    one = estimate(ours.mean(), a[:, 0])
    (alone,) = Resamples(1, [500]).means(ours[:1])
    assert one.high - one.low > 1.5 * np.ptp(np.quantile(alone, [0.025, 0.975]))
    difference = estimate(-0.2, a[:, 0] - b[:, 0])
    assert (difference.low, difference.high) == pytest.approx((-0.2, -0.2), abs=1e-9)


def test_a_share_of_nothing_still_has_an_interval():
    found = share(np.zeros((2, 20), bool))
    assert found.value == found.low == 0.0 and found.high == pytest.approx(wilson(0, 20)[1])
    first, second = Resamples(2, [3, 4]).means(np.array([1.0, 1, 1, 2, 2, 2, 2]) * np.ones((2, 1, 1)))
    assert np.allclose(first, 1.0) and np.allclose(second, 2.0)  # a task's prompts are drawn among themselves


def test_a_claim_holds_only_where_the_whole_interval_does():
    assert judge(Estimate(0.5, 0.4, 0.6), better=-1, neutral=1.0) == HOLDS
    assert judge(Estimate(0.5, 0.4, 1.6), better=-1, neutral=1.0) == UNKNOWN
    assert judge(Estimate(np.inf, 1.2, np.inf), better=-1, neutral=1.0) == NOT
    assert judge(None, better=1) == MISSING
    assert interval(Estimate(np.inf, np.inf, np.inf)) == "not reached"
    assert interval(Estimate(np.inf, 1.25, np.inf), "{:.2f}") == "not reached [1.25, not reached]"


def test_no_variant_is_claimed_to_differ_from_itself():
    plan = StudyPlan(name="s", reference="dense", equal_compute="dense", token_choice="tc", expert_choice=["ec"])
    assert [claim.text for claim in claims({}, plan)] == [
        "ec has dense's last loss in fewer steps",
        "ec has a lower loss than dense",
        "ec has a lower loss than tc",
        "ec draws more of what is asked for than dense",
        "ec draws more of what is asked for than tc",
    ]


# ----------------------------------------------------------------------------------------------------------------- plan


def test_the_control_spends_what_expert_choice_does():
    for folder, tolerance in (("recipes/study", 0.02), ("recipes/study/cpu", 0.005)):
        models = {
            name: load_recipe(ROOT / folder / f"{name}.yaml").model
            for name in ("dense", "dense_wide", "token_choice_8e", "expert_choice_8e", "expert_choice_32e")
        }
        flops = {name: forward_flops(model, model.tokens) for name, model in models.items()}
        assert flops["expert_choice_8e"] == flops["expert_choice_32e"] == flops["token_choice_8e"]
        assert flops["dense_wide"] == pytest.approx(flops["expert_choice_8e"], rel=tolerance)
        assert flops["expert_choice_8e"] > 1.2 * flops["dense"]


@pytest.mark.parametrize("folder", ["recipes/study", "recipes/study/cpu"])
def test_groups_are_the_papers(folder):
    study = Study(ROOT / folder, ablations=True)
    assert study.plan.expert_choice == ["expert_choice_8e", "expert_choice_16e", "expert_choice_32e"]
    for run in study.runs:
        model = run.recipe.model
        if model.grouped and run.variant in study.plan.main:
            assert model.group_tokens == 1024 and model.capacity(1024) * model.experts == 2 * 1024
            assert model.capacity(model.sample_group_tokens) * model.experts == 2 * model.sample_group_tokens


def test_a_mistake_in_a_plan_is_named(tmp_path, shapes):
    for plan, told in (
        (PLAN | {"referense": "dense"}, "referense"),
        ({key: value for key, value in PLAN.items() if key != "token_choice"}, "token_choice: Field required"),
        (PLAN | {"reference": "dens"}, "'dens': there is no dens.yaml beside it; did you mean dense?"),
    ):
        with pytest.raises(UserError, match=r"study\.yaml") as error:
            Study(make_study(tmp_path / "s", shapes, plan))
        assert told in str(error.value)
    with pytest.raises(UserError, match="cannot read this plan"):
        Study(tmp_path / "absent")
    folder = make_study(tmp_path / "s", shapes)
    with pytest.raises(UserError, match="did you mean dense_wide"):
        Study(folder, only=["dense_wid"])
    with pytest.raises(UserError, match=r"optimizer\.schedule: cosine"):
        Study(folder, ["optimizer.schedule=cosine"])
    with pytest.raises(UserError, match=r"log\.held_out\.path: null"):
        Study(folder, ["log.held_out.path=null"])
    (folder / "dense_wide.yaml").write_text(yaml.safe_dump({"extends": "base.yaml", "run": "x", "train": {"batch": 4}}))
    with pytest.raises(UserError, match=r"dense_wide.yaml: train.batch: 4, where .*dense.yaml has 8"):
        Study(folder)
    for seeds in ("many", "²", "0,²", "0", ""):
        error = CliRunner().invoke(app, ["study", str(folder), "--seeds", seeds]).exception
        assert isinstance(error, UserError) and f"--seeds: {seeds!r}" in str(error)


def test_runs_are_dealt_to_gpus():
    assert places_of([], 1) == [None]
    assert places_of(["0", "1", "2"], 1) == ["2", "1", "0"]  # the last is taken first
    assert places_of(["0", "1", "2", "3", "4"], 2) == ["2,3", "0,1"]


# ------------------------------------------------------------------------------------------------------------- findings


def test_what_is_found_is_what_was_put_in(done):
    told = write(done)
    assert "Missing: more_experts-seed-0 (not begun), more_experts-seed-1 (not begun)" in told[0]
    record = json.loads((done.folder / "study.json").read_text())
    fast, slow = record["variants"]["expert_choice"], record["variants"]["token_choice"]
    assert fast["steps_ratio"]["value"] == pytest.approx(0.5, abs=0.01)
    assert fast["seconds_ratio"]["value"] == pytest.approx(1.0, abs=0.02)  # its steps take twice as long
    assert fast["loss_difference"]["value"] == pytest.approx(-0.1) and fast["loss_difference"]["high"] < -0.09
    assert fast["overall"]["value"] == pytest.approx(0.8) and fast["overall_difference"]["low"] > 0
    assert slow["steps_ratio"]["value"] is None  # not reached
    assert slow["unrouted"] == pytest.approx(0.1) and slow["dropped"] == pytest.approx(0.25)
    assert fast["dropped"] is None and record["variants"]["dense"]["unrouted"] is None
    assert record["variants"]["dense"]["seeds"] == [0, 1] and record["step"] == STEPS
    verdicts = {claim["text"]: claim["verdict"] for claim in record["claims"]}
    assert verdicts["expert_choice has dense's last loss in fewer steps"] == HOLDS
    assert verdicts["more_experts has a lower loss than expert_choice"] == MISSING
    assert (done.folder / "loss.png").stat().st_size > 1000 and (done.folder / "loss.svg").exists()


def test_fewer_steps_are_the_beginning_of_more(done, tmp_path):
    """The same runs, looked at earlier: nothing after that step plays a part."""
    early = Study(done.source, ["train.steps=50"], seeds=[0, 1], runs=tmp_path / "runs")
    write(early)
    record = json.loads((early.folder / "study.json").read_text())
    dense, fast = record["variants"]["dense"], record["variants"]["expert_choice"]
    assert dense["loss"]["value"] == pytest.approx(DENSE[4] + 0.0005)
    assert fast["loss"]["value"] == pytest.approx(0.5005)
    assert fast["overall"] is None  # scored at another step


def test_the_page_says_all_of_it_without_a_network(done):
    write(done)
    with open_browser() as page:
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        page.context.set_offline(True)
        page.goto((done.folder / "index.html").as_uri())
        page.wait_for_load_state("networkidle")
        assert len([url for url in asked if not url.startswith("data:")]) == 1
        sizes = page.eval_on_selector_all("img", "all => all.map(i => i.complete ? i.naturalWidth : 0)")
        assert len(sizes) == 4 + 4 * 2 * len(TASKS) and all(sizes)
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        found = page.inner_text("#found")
        assert "holds here" in found and "not measured" in found and "Figure 8" in found
        assert "not reached" in page.inner_text("#loss")
        assert "more_experts-seed-1\tnot begun" in page.inner_text("#runs")
        assert "More capacity?" in page.inner_text("#ablations") and "Not run yet" in page.inner_text("#ablations")
        assert "bootstrap over training seeds" in page.inner_text("#method")


def test_what_is_published_is_small_and_whole(done, tmp_path):
    told = write(done, tmp_path / "out")
    assert "MiB in" in told[-1]
    run = tmp_path / "out/runs/expert_choice-seed-0"
    lines = gzip.decompress((run / "metrics.jsonl.gz").read_bytes()).decode().splitlines()
    assert len(lines) == STEPS and (run / "recipe.yaml").exists()
    assert len(gzip.decompress((run / "shapes.jsonl.gz").read_bytes()).splitlines()) == 10 * len(TASKS)
    assert sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file()) < 2e6
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    write(done, tmp_path / "out")
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}


def test_a_study_of_which_nothing_is_done_has_a_page_too(tmp_path, shapes):
    study = Study(make_study(tmp_path / "tiny", shapes), runs=tmp_path / "runs")
    told = write(study, tmp_path / "out")
    assert "No run is done yet" in (study.folder / "index.html").read_text() and "0 runs compared" in told[1]


# ------------------------------------------------------------------------------------------------------------- held out


class Stop(Callback):
    """Asks for a stop after a step."""

    def __init__(self, step):
        self.step = step

    def on_step(self, trainer, record):
        if record["step"] == self.step:
            trainer._stop.signal = "SIGTERM"


def train_tiny(shapes, runs, *overrides, extra=()):
    keys = [*TINY, f"data.streams=[{{path: {shapes}}}]", "log.every=1", "model.group_tokens=128", *overrides]
    keys.append(f"log.held_out={{path: {shapes}, every: 3, pictures: 12}}")
    recipe = load_recipe(ROOT / "recipes/quickstart.yaml", keys)
    callbacks = [JsonLines(), HeldOutLoss(), *extra]
    return Run(runs / recipe.run), train(recipe, runs, callbacks)


@pytest.fixture(scope="module")
def tiny(shapes, tmp_path_factory):
    run, code = train_tiny(shapes, tmp_path_factory.mktemp("held-out"))
    assert code == DONE
    return run


def test_the_held_out_loss_is_the_oracles_of_the_averaged_weights(tiny, shapes):
    recipe, records = tiny.recipe(), read_metrics(tiny.held_out_file)
    assert [record["step"] for record in records] == [3, 6, 8]
    losses = np.load(tiny.folder / "held-out/step-8.npy")
    assert losses.shape == (12,) and losses.mean() == pytest.approx(records[-1]["loss"], rel=1e-6)
    assert np.mean(records[-1]["by_time"]) == pytest.approx(records[-1]["loss"], rel=1e-6)
    saved = tiny.newest_checkpoint()
    m = recipe.model
    oracle = reference.EcDit(reference.Config(**{f.name: getattr(m, f.name) for f in fields(reference.Config)}))
    oracle.load_state_dict(saved.kind("ema"))
    samples = [make(0, index) for index in range(12)]
    pixels = torch.stack([torch.from_numpy(sample.image) for sample in samples]).permute(0, 3, 1, 2)
    text, mask = HashText(m.text_width, m.text_tokens, torch.device("cpu"))([sample.caption for sample in samples])
    noise, t = draws(recipe)
    x_t, target = reference.flow_pair(pixels / 127.5 - 1, noise, t)
    with torch.no_grad():
        velocity, _ = oracle(x_t, t, text, mask, m.group_tokens)
    expected = (velocity - reference.patchify(target, m.patch)).square().mean((1, 2))
    assert losses == pytest.approx(expected.numpy(), rel=1e-4)


def test_times_of_held_out_pictures_divide_the_density_evenly(tiny):
    _, t = draws(change_recipe(tiny.recipe(), ["log.held_out.pictures=1000", "train.micro_batch=4"], "a test"))
    u = torch.logit(t.double()) - tiny.recipe().diffusion.time.mean
    assert u.mean().abs() < 1e-3 and u.std() == pytest.approx(1.0, abs=0.01)
    assert torch.corrcoef(torch.stack([u, torch.arange(1000.0)]))[0, 1].abs() < 0.1  # a group has all kinds


def test_looking_at_held_out_pictures_changes_no_step_and_resumes(tiny, shapes, tmp_path):
    run, code = train_tiny(shapes, tmp_path, "checkpoint.every=4", extra=[Stop(5)])
    assert code == STOPPED
    _, code = train_tiny(shapes, tmp_path, "checkpoint.every=4")
    assert code == DONE
    plain = train_tiny(shapes, tmp_path, "run=plain", "train.seed=0")[0]
    for other in (run, plain):
        assert [r["loss"] for r in read_metrics(other.metrics_file)] == [
            r["loss"] for r in read_metrics(tiny.metrics_file)
        ]
        assert read_metrics(other.held_out_file) == read_metrics(tiny.held_out_file)


def test_too_few_held_out_pictures_are_told_before_the_first_step(shapes, tmp_path):
    keys = [*TINY, f"data.streams=[{{path: {shapes}}}]", "model.group_tokens=128"]
    recipe = load_recipe(ROOT / "recipes/quickstart.yaml", [*keys, f"log.held_out={{path: {shapes}, pictures: 80}}"])
    with pytest.raises(UserError, match=r"log\.held_out\.pictures: 80, but .* has 40; try 40"):
        train(recipe, tmp_path, [HeldOutLoss()])
    absent = change_recipe(recipe, ["log.held_out.path=absent"], "a test")
    with pytest.raises(UserError, match=r"log\.held_out\.path: .*absent"):
        train(absent, tmp_path, [HeldOutLoss()])
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------------------------------------- running


def typed(study, *overrides, only=()):
    """The study that another command asks for."""
    return Study(study.source, overrides, seeds=study.seeds, only=only, runs=study.folder.parent)


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("optimizer.lr=0.1", "optimizer.lr: 0.003 in the run, 0.1 asked for"),
        ("diffusion.time.mean=0.5", "diffusion.time.mean: -0.6 in the run, 0.5 asked for"),
        ("log.held_out.pictures=32", "log.held_out.pictures: 16 in the run, 32 asked for"),
        ("sample.guidance=2.0", "sample.guidance: 5.0 in the run, 2.0 asked for"),
    ],
)
def test_runs_on_other_terms_than_typed_are_refused(done, key, told):
    for only in ((), ["more_experts"]):  # what is not to be run is compared, too
        with pytest.raises(UserError, match=r"tiny/dense-seed-0: .*, name another folder with --runs, or rem") as error:
            Runner(typed(done, key, only=only))
        assert told in str(error.value) and len(str(error.value).splitlines()) == 2
    with pytest.raises(UserError, match=r"dense-seed-0: this run was started with other keys"):
        write(typed(done, key))  # one may end while the others are waited for


def test_other_terms_end_the_command_before_anything_starts(done):
    keys = ["optimizer.lr=0.1", "--only", "more_experts", "--runs", done.folder.parent]
    refused = ecdit("study", done.source, *keys)
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert "optimizer.lr: 0.003 in the run, 0.1 asked for" in refused.stderr
    assert not (done.folder / "more_experts-seed-0").exists() and not (done.folder / "index.html").exists()


def test_keys_that_a_run_may_change_on_its_way_are_no_other_terms(done):
    for keys in (
        ["train.steps=200"],
        ["train.steps=50"],
        ["checkpoint.every=7", "train.micro_batch=8", "log.every=2"],
        ["data.cache.folder=/tmp/cache", "data.shard_encoders=true", "train.compile=true", "cluster.time=1:00:00"],
        ["train.graph=true"],
    ):
        made = typed(done, *keys)
        assert not Runner(made).failures
        write(made)


def test_what_has_no_checkpoint_begins_anew_on_any_terms(tmp_path, shapes):
    study = Study(make_study(tmp_path / "tiny", shapes), runs=tmp_path / "runs")
    for run in study.runs:
        Run(study.folder / run.name).write_recipe(run.recipe)
    Runner(typed(study, "optimizer.lr=0.1"))


def test_a_run_that_another_study_has_trained_on_other_terms_is_not_gone_on_with(tmp_path, shapes, monkeypatch):
    """It began before that run had anything."""
    study = Study(make_study(tmp_path / "tiny", shapes), only=["dense"], runs=tmp_path / "runs")
    other = typed(study, "optimizer.lr=0.1", only=["dense"])
    runner = Runner(study)

    def unlocked(folder):
        fake_run(other, "dense", 0, DENSE)
        return False

    monkeypatch.setattr("launcher.study.is_locked", unlocked)
    monkeypatch.setattr("launcher.study.subprocess.Popen", None)
    monkeypatch.setattr("launcher.study.gpus", list)
    runner.run_here(StopRequest(), seconds=None, ranks=1)
    with pytest.raises(UserError, match=r"optimizer\.lr: 0\.1 in the run, 0\.003 asked for"):
        write(study)


def command(folder, runs, *words):
    keys = ["log.held_out.every=1000", "optimizer.lr=1e-4"]
    return [sys.executable, "-m", "ecdit.cli", "study", str(folder), *keys, "--runs", str(runs), "--seeds", "1", *words]


def test_a_study_that_was_stopped_goes_on_and_a_failed_run_is_named(shapes, tmp_path):
    folder, runs = make_study(tmp_path / "tiny", shapes), tmp_path / "runs"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    metrics = runs / "tiny/dense-seed-0/metrics.jsonl"
    first = command(folder, runs, "train.steps=100000", "--only", "dense")
    with subprocess.Popen(first, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as study:
        until = time.monotonic() + 120
        while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < until:
            time.sleep(0.1)
        study.send_signal(signal.SIGTERM)
        told = study.communicate(timeout=120)[1]
    assert study.returncode == 75, told
    saved = Run(runs / "tiny/dense-seed-0").newest_checkpoint().step
    assert f"dense-seed-0 (requeue, {saved:,} of 100,000 steps)" in told
    assert "requeue" in (runs / "tiny/index.html").read_text()

    with (folder / "token_choice.yaml").open("a") as file:
        file.write("data: {streams: [{path: x}]}\n")
    wanted = f"train.steps={saved + 2}"
    again = ecdit(*command(folder, runs, wanted, "--only", "token_choice", "--only", "dense")[3:], cwd=tmp_path)
    assert again.returncode == 1
    log = runs / "tiny/token_choice-seed-0/logs/study.log"
    assert "token_choice-seed-0 failed" in again.stderr and str(log) in again.stderr and log.exists()
    assert "1 runs compared" in again.stderr
    steps = [record["step"] for record in read_metrics(metrics)]
    assert steps == list(range(1, saved + 3))  # none twice
    third = ecdit(*command(folder, runs, wanted, "--only", "dense")[3:], cwd=tmp_path)
    assert third.returncode == 0 and "dense-seed-0: " not in third.stderr  # nothing is missing


def test_jobs_are_submitted_for_what_is_missing_and_score_themselves(done, monkeypatch):
    jobs = []
    monkeypatch.setattr("launcher.study.launch", lambda file, keys, nodes, runs: jobs.append((file, keys)) or "7")
    Runner(done, on_slurm=True).submit()
    assert len(jobs) == len(done.runs)  # none of these has a checkpoint
    assert not list(Runner(done, on_slurm=True).tasks(done.runs[0]))  # nothing is trained where it was typed
    file, keys = jobs[0]
    recipe = load_recipe(file, keys)
    assert recipe.evaluation.suites == ["shapes"] and recipe.evaluation.options == {"n": 4}
    assert recipe.evaluation.every % recipe.checkpoint.every == 0 and recipe.evaluation.every >= recipe.train.steps

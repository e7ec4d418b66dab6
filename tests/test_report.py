"""`ecdit report`: the figures are right, the page holds all of them, and a browser opens it without a network."""

import json
import re

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from typer.testing import CliRunner

from ecdit import UserError, load_recipe
from ecdit.cli import app
from ecdit.pictures import slug
from ecdit.report.curves import Curve, average, equal_loss, thin, window_of
from ecdit.report.page import write_report
from ecdit.report.read import read_runs
from ecdit.report.scores import fid_and_clip, newest, table
from ecdit.run import Run
from tests.browser import open_browser
from tests.tiny_runs import ROOT


def make(folder, *overrides, losses=(1.0, 0.8, 0.6, 0.5), **scores):
    """A run folder as training and evaluation leave it."""
    recipe = load_recipe(ROOT / "recipes/quickstart.yaml", [f"run={folder.name}", *overrides])
    Run(folder).write_recipe(recipe)
    with (folder / "metrics.jsonl").open("w") as file:
        for step, loss in enumerate(losses, start=1):
            record = {"step": step, "loss": loss, "images_per_s": 100.0, "seconds": 0.5, "mfu": 0.4, "memory": 2**30}
            file.write(json.dumps(record) + "\n")
    for name, values in scores.items():
        (folder / f"evaluate-{name.replace('_', '-')}.json").write_text(json.dumps(values))
    return folder


def draw(run, prompt, seed, settings):
    (run / "samples").mkdir(exist_ok=True)
    info = PngInfo()
    for key, value in {"prompt": prompt, "seed": seed, "source": run, **settings}.items():
        info.add_itxt(key, str(value))
    image = Image.new("RGB", (32, 32), "red")
    image.save(run / f"samples/{slug(prompt)}-{seed}.png", pnginfo=info)


def test_equal_loss_is_met_between_logged_steps():
    a = Curve(np.array([10.0, 20.0]), np.array([1.0, 0.5]))
    b = Curve(np.array([10.0, 20.0, 30.0]), np.array([0.9, 0.7, 0.2]))
    assert equal_loss([a, b]) == [[20.0, 24.0], [None, 30.0]]
    assert b.step_of(2.0) == 10.0


def test_an_average_is_over_the_steps_before_and_leaves_out_what_was_skipped(tmp_path):
    losses = [float(loss) for loss in range(1, 101)]
    losses[49] = None  # a skipped step's loss is null in the file
    (run,) = read_runs([make(tmp_path / "a", losses=losses)])
    window = window_of([run])
    curve = average(run, window)
    assert window == 5.0 and curve.steps[0] == 5.0 and curve.losses[0] == 3.0
    assert curve.end == 98.0
    assert curve.losses[list(curve.steps).index(51)] == pytest.approx((47 + 48 + 49 + 51) / 4)


def test_points_are_thinned_to_means():
    steps, values = thin(np.arange(10_000.0), np.arange(10_000.0), 100)
    assert len(steps) == 100 and np.array_equal(steps, values) and steps[0] == 49.5


def test_fid_and_clip_are_paired_by_step_whatever_the_file(tmp_path):
    run = make(
        tmp_path / "a",
        fid_step_2={"suite": "fid", "fid": 30.0},
        clip_step_2={"suite": "clip", "scores": {"clip_score": 0.2}},
        fid={"fid": 20.0},
        clip={"clip": 0.3, "step": 4},
        fid_step_3={"fid": 25.0},
        parti={"best_clip_score": 0.9, "categories": {"Animals": {"clip_score": 0.8}}, "step": 4},
    )
    (data,) = read_runs([run])
    assert fid_and_clip(data) == [(2, 30.0, 0.2), (4, 20.0, 0.3)]
    assert newest(data, "fid").numbers == {"fid": 20.0}


def test_any_suite_becomes_a_table(tmp_path):
    a = make(tmp_path / "a", geneval={"suite": "geneval", "overall": 0.7, "tasks": {"colors": 1}, "seed": 3})
    b = make(tmp_path / "b", geneval={"suite": "geneval", "overall": 0.6, "tasks": {"position": 0.1}, "step": 9})
    headings, rows = table(read_runs([a, b]), "geneval")
    assert headings == ["a", "b, step 9"]
    assert rows == {"overall": [0.7, 0.6], "tasks.colors": [1.0, None], "tasks.position": [None, 0.1]}


def test_what_cannot_be_compared_is_named(tmp_path):
    run, empty = make(tmp_path / "a"), make(tmp_path / "b", losses=())
    with pytest.raises(UserError, match="no run here"):
        read_runs([run, tmp_path / "absent"])
    with pytest.raises(UserError, match=r"b/metrics.jsonl: no logged step"):
        read_runs([run, empty])
    with pytest.raises(UserError, match="stands twice"):
        read_runs([run, tmp_path / "b/../a"])
    torn = make(tmp_path / "torn")  # what a full disk leaves is left out
    draw(torn, "a red circle", 0, {})
    (torn / "samples/none.png").write_text("garbage")
    (torn / "evaluate/step-2").mkdir(parents=True)
    (torn / "evaluate/step-2/samples.jsonl").write_text('5\n{"prompt": "a"}\n{"prompt": "a')
    (data,) = read_runs([torn])
    assert list(data.pictures) == [("a red circle", 0)] and not data.drawn
    broken = make(tmp_path / "c")
    (broken / "evaluate-fid.json").write_text("{")
    with pytest.raises(UserError, match=r"evaluate-fid.json: cannot read these scores"):
        read_runs([broken])


def test_a_run_without_a_finite_loss_spoils_no_report(tmp_path):
    lost, fine = make(tmp_path / "lost", losses=(None, None)), make(tmp_path / "fine")
    (data, _) = read_runs([lost, fine])
    assert np.isnan(data.metrics["loss"]).all()
    write_report([lost, fine], tmp_path / "report.html")


def test_runs_of_one_name_are_told_apart(tmp_path):
    runs = [make(tmp_path / "x/a"), make(tmp_path / "y/a")]
    assert [run.name for run in read_runs(runs)] == [str(run) for run in runs]


@pytest.fixture
def compared(tmp_path):
    evil = "<script>alert(1)</script> & co"
    dense = make(tmp_path / "dense", "model.routing=dense", losses=np.linspace(1, 0.5, 200).tolist(),
                 fid={"fid": 20.0}, clip={"clip": 0.3})  # fmt: skip
    sparse = make(
        tmp_path / "sparse", losses=np.linspace(1, 0.25, 200).tolist(), fid={"fid": 15.0}, clip={"clip": 0.31}
    )
    for run in (dense, sparse):
        draw(run, "a red circle", 0, {"steps": 50, "checkpoint": f"step 200, {run.name}"})
        draw(run, evil, 1, {"steps": 50})
    draw(dense, "alone", 0, {})
    (sparse / "analysis").mkdir()
    Image.new("RGB", (64, 32), "blue").save(sparse / "analysis/overlap.png")
    Image.new("RGB", (64, 32), "blue").save(sparse / "heatmap.png")
    return [dense, sparse]


def test_a_browser_opens_the_page_without_a_network(compared, tmp_path):
    out = tmp_path / "report.html"
    done = CliRunner().invoke(app, ["report", *map(str, compared), "--out", str(out)])
    assert done.exit_code == 0, done.output
    with open_browser() as page:
        asked, troubles = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: troubles.append(message.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("dialog", lambda dialog: troubles.append(dialog.message))
        page.context.set_offline(True)
        page.goto(out.as_uri())
        page.wait_for_load_state("networkidle")
        assert [url for url in asked if not url.startswith("data:")] == [out.as_uri()] and not troubles
        sizes = page.eval_on_selector_all("img", "all => all.map(i => i.complete ? i.naturalWidth : 0)")
        assert len(sizes) == 9 and all(sizes)  # three charts, four samples, a heat map, an analysis
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        loss = page.inner_text("#loss")
        assert "not reached" in loss and re.search(r"\(0\.6\dx\)", loss)
        assert "<script>alert(1)</script> & co" in page.inner_text("#samples")
        assert "alone" not in page.inner_text("#samples")
        assert "model.routing" in page.inner_text("#recipes")
        page.click("nav a[href='#speed']")
        assert "100" in page.inner_text("#speed")


def test_the_page_is_one_file_and_refers_to_nothing(compared, tmp_path):
    """Holds where there is no browser, too."""
    write_report(compared, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:|#)', text) and "<script" not in text and "@import" not in text
    assert not list(tmp_path.glob("*.partial"))


def test_scores_have_the_papers_beside_them(tmp_path):
    tasks = {"position": {"score": 0.125, "pictures": 4}, "counting": {"score": 0.25, "pictures": 4}}
    run = make(tmp_path / "a", geneval={"overall": 0.5, "tasks": tasks}, fid={"fid": 20.0})
    write_report([run], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    for cells in (["overall", "0.5", "71.68%"], ["position", "0.125", ""], ["counting", "0.25", ""]):
        assert "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>" in text
    assert "paper: a curve of FID against CLIP score (Figure 7)" in text and "pictures</td>" not in text


def test_pictures_of_other_settings_are_called_so(compared, tmp_path):
    told = "Not all were drawn with the same settings"
    write_report(compared, tmp_path / "report.html")
    assert told not in (tmp_path / "report.html").read_text()  # their checkpoints differ, as of any two runs
    draw(compared[0], "a red circle", 0, {"steps": 9})
    write_report(compared, tmp_path / "report.html")
    assert told in (tmp_path / "report.html").read_text()


def test_what_analyze_draws_is_not_shown_twice(compared, tmp_path):
    run = compared[1]
    (run / "analysis/allocation.png").write_bytes((run / "heatmap.png").read_bytes())
    write_report([run], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "allocation.png" in text and "heatmap.png" not in text


def test_losses_of_another_task_are_called_so(compared, tmp_path):
    other = make(tmp_path / "other", "diffusion.text_drop=0.2")
    write_report([compared[0], other], tmp_path / "report.html")
    assert "the runs differ in diffusion.text_drop" in (tmp_path / "report.html").read_text()


def test_a_page_that_cannot_be_written_is_named(tmp_path):
    run = str(make(tmp_path / "a"))
    assert CliRunner().invoke(app, ["report", run, "--out", str(tmp_path / "new/folder/r.html")]).exit_code == 0
    assert (tmp_path / "new/folder/r.html").exists()
    for out, told in ((tmp_path / "a", "is a folder"), (tmp_path / "a/recipe.yaml/r.html", "a file is in the way")):
        error = CliRunner().invoke(app, ["report", run, "--out", str(out)]).exception
        assert isinstance(error, UserError) and told in str(error)


def test_runs_beside_a_wrong_path_are_told(tmp_path):
    runs = tmp_path / "alone/runs"
    run = make(runs / "quickstart")
    for path, why in ((runs, "recipe.yaml is missing"), (runs / "quickstrat", "there is no such folder")):
        with pytest.raises(UserError) as error:
            read_runs([path])
        assert str(error.value) == f"{path}: no run here: {why}; valid: {run}"

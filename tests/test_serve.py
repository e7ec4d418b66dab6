"""`ecdit serve`: the page in a real browser, and the states that it shows."""

import sys

import numpy as np
import pytest
import torch

from ecdit import UserError
from ecdit.run import Run
from ecdit.sampling import Sampler
from ecdit.serve import SHOWN, build, looks, serve, states
from tests.browser import open_browser
from tests.ranks import free_port
from tests.tiny_runs import make_run, make_shapes


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    shapes = make_shapes(folder)
    for routing in ("expert_choice", "dense"):
        make_run(shapes, folder, f"run={routing}", f"model.routing={routing}")
    return folder


def sampler_of(run):
    return Sampler.from_run(Run(run))


def test_the_last_state_is_what_sample_draws(runs):
    sampler = sampler_of(runs / "expert_choice")
    shown = list(states(sampler, "a red circle", 3, 4, 5.0))
    assert [text for _, _, text in shown][-1] == "step 4 of 4, t = 1.00" and len(shown) == 4
    drawn = sampler.draw(["a red circle"], [3], sampler.recipe.sample).images[0].numpy()
    assert np.array_equal(np.asarray(shown[-1][0])[::16, ::16], drawn)
    assert shown[-1][0].size == shown[-1][1].size == (512, 512)


def test_many_steps_are_shown_in_a_few_states_and_the_last(runs):
    shown = [text for _, _, text in states(sampler_of(runs / "expert_choice"), "", 0, 30, 1.0)]
    assert len(shown) == SHOWN and shown[0].startswith("step 1 of 30") and shown[-1].startswith("step 30 of 30")


def test_a_dense_run_has_no_heat_map(runs):
    assert [heat for _, heat, _ in states(sampler_of(runs / "dense"), "a star", 0, 2, 1.0)] == [None, None]


def test_bad_numbers_are_named(runs):
    sampler = sampler_of(runs / "expert_choice")
    with pytest.raises(UserError, match="seed: -1 is no seed"):
        next(states(sampler, "a", -1, 2, 1.0))
    with pytest.raises(UserError, match="steps"):
        next(states(sampler, "a", 0, 0, 1.0))


def test_steps_one_by_one_are_the_solver_in_one_go(runs):
    sampler = sampler_of(runs / "expert_choice")
    settings = sampler.recipe.sample.model_copy(update={"solver": "heun"})
    *_, (t, latents) = sampler.denoise(["a star"], [1], settings)
    assert t == 1.0 and torch.equal(sampler.decode(latents), sampler.draw(["a star"], [1], settings).images)


def test_without_gradio_the_extra_is_named(runs, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r"needs the package gradio; install the extra `ecdit\[serve\]`"):
        serve(runs / "expert_choice", "127.0.0.1", free_port())


def test_what_is_no_run_is_refused(tmp_path):
    pytest.importorskip("gradio")
    with pytest.raises(UserError, match="no run here"):
        serve(tmp_path, "127.0.0.1", free_port())


# collects every picture that the page shows, frame by frame
COLLECT = """() => {
  window.shown = new Set();
  const look = () => {
    for (const image of document.querySelectorAll('img')) window.shown.add(image.src);
    requestAnimationFrame(look);
  };
  look();
}"""
DONE = "() => [...document.querySelectorAll('textarea, input')].some(e => e.value.startsWith('step 120 of 120'))"
BOTH = "() => [...document.querySelectorAll('img')].filter(image => image.naturalWidth === 512).length === 2"


def test_a_browser_sees_the_picture_appear(runs, capfd):
    gradio = pytest.importorskip("gradio")
    app, port = build(sampler_of(runs / "expert_choice"), "<b>tiny</b>"), free_port()
    with open_browser() as page:
        app.launch(server_name="127.0.0.1", server_port=port, prevent_thread_lock=True, quiet=True, **looks(gradio))
        try:
            asked = set()
            page.on("request", lambda request: asked.add(request.url.split("/")[2]))
            page.goto(f"http://127.0.0.1:{port}")
            page.wait_for_load_state("networkidle", timeout=60_000)  # gradio sets the fields once more while it loads
            page.get_by_label("Prompt").fill("two blue squares")
            page.get_by_label("Seed").fill("7")
            page.get_by_label("number input for Steps").fill("120")
            page.evaluate(COLLECT)
            page.click("button:has-text('Draw')")
            page.wait_for_function(DONE, timeout=120_000)
            page.wait_for_function(BOTH, timeout=120_000)
            assert page.evaluate("window.shown.size") >= 6  # picture and heat map, in three states at least
            assert asked - {""} == {f"127.0.0.1:{port}"}  # nothing from elsewhere
            assert page.is_visible("text=Experts per token") and page.title() == "EC-DiT: <b>tiny</b>"
            page.get_by_label("Seed").fill("-5")
            page.click("button:has-text('Draw')")
            page.wait_for_selector("text=seed: -5 is no seed; valid: from 0 to", timeout=60_000)
            assert "Traceback" not in capfd.readouterr().err  # what a user mistypes is no crash of the server
        finally:
            app.close()


def test_a_port_that_is_taken_is_named(runs):
    gradio = pytest.importorskip("gradio")
    app = build(sampler_of(runs / "dense"), "dense")
    port = free_port()
    app.launch(server_name="127.0.0.1", server_port=port, prevent_thread_lock=True, quiet=True, **looks(gradio))
    try:
        with pytest.raises(UserError, match=f"--port: {port} on 127.0.0.1 cannot be served"):
            serve(runs / "dense", "127.0.0.1", port)
    finally:
        app.close()

"""`ecdit sample`: pictures of prompts, as single PNGs and on one grid, by one process or by the ranks of a job."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ecdit.drawing import draw_all
from ecdit.errors import UserError
from ecdit.pictures import grid, read_pixels
from ecdit.prompts import Request
from ecdit.recipe import Recipe, SampleRecipe
from ecdit.run import Run
from ecdit.sampling import Sampler, sample_settings
from ecdit.sampling_job import joined, open_sampler, sampling_recipe
from ecdit.terminal import check_folder, console, number

GRID_ROWS = 50  # more would make a picture that nothing shows


def requests_of(recipe: Recipe, prompts: list[str] | None, file: Path | None, n: int, seed: int) -> list[Request]:
    """`n` pictures of each prompt given, of each one in the file, or of the recipe's. Raises UserError."""
    if prompts and file is not None:
        raise UserError("--prompt and --prompts: give one of the two")
    if file is not None:
        from ecdit.prompts import read_prompts

        return read_prompts(file, n, seed)
    return [Request(prompt, seed + i) for prompt in prompts or recipe.log.prompts for i in range(n)]


def sample(
    run: Run,
    overrides: Sequence[str],
    prompts: list[str] | None,
    file: Path | None,
    n: int,
    seed: int,
    settings: dict[str, Any],
    out: Path,
    *,
    step: int | None = None,
    heatmap: bool,
) -> None:
    """Draws the pictures into `out/samples`, the grid, and the heatmap where asked for; from the newest checkpoint, or
    that of `step`. Raises UserError."""
    recipe = sampling_recipe(run, overrides)
    chosen = sample_settings(recipe, **settings)
    requests = requests_of(recipe, prompts, file, n, seed)
    if heatmap:
        _check_heatmap(recipe)
    check_folder(out / "samples")
    with joined(recipe, run) as place:
        sampler, source = open_sampler(run, recipe, place, step)
        if place.first:
            steps = number(chosen.steps, "step")
            console.print(f"{number(len(requests), 'picture')} of step {source.step}, {steps} each")
        paths = draw_all(sampler, str(source), requests, chosen, out / "samples", place, str(run.folder))
        if place.first:
            _write_grid(requests, paths, n, out)
        if heatmap:
            _write_heatmap(sampler, requests[::n], chosen, out, shown=place.first)


def _write_grid(requests: list[Request], paths: list[Path], n: int, out: Path) -> None:
    shown = paths[: GRID_ROWS * n]
    labels = [request.prompt for request in requests[: GRID_ROWS * n : n]]
    grid(torch.stack([read_pixels(path) for path in shown]), labels, n).save(out / "samples.png")
    which = "all" if len(shown) == len(paths) else f"the first {len(shown)}"
    drawn = f"{number(len(paths), 'picture')} in {out / 'samples'}"
    console.print(f"{drawn}, {which} on {out / 'samples.png'}", markup=False)


def _check_heatmap(recipe: Recipe) -> None:
    if recipe.model.routing == "dense":
        raise UserError("--heatmap: this model is dense (model.routing: dense); it has no experts to show")
    for key in ("tensor", "pipeline"):
        if (ranks := getattr(recipe.parallel, key)) > 1:
            raise UserError(
                f"--heatmap: with parallel.{key}: {ranks} no rank has all of a picture's routing; set it to 1"
            )


def _write_heatmap(
    sampler: Sampler, requests: list[Request], settings: SampleRecipe, out: Path, *, shown: bool
) -> None:
    from ecdit.analyze.heatmap import PICTURES, write_heatmap

    model, requests = sampler.recipe.model, requests[:PICTURES]  # there may be thousands
    counted = sampler.draw([r.prompt for r in requests], [r.seed for r in requests], settings, count_experts=True)
    if shown:
        write_heatmap(counted, out / "heatmap.png", [layer + 1 for layer in range(model.layers) if model.sparse(layer)])
        console.print(f"Experts per token: {out / 'heatmap.png'}", markup=False)

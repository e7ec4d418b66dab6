"""Layouts for so many GPUs: all that divide, ranked by the time of a step among those that fit."""

from collections import Counter
from collections.abc import Iterator
from itertools import product

from ecdit.errors import UserError
from ecdit.recipe import Recipe
from ecdit.recipe_io import parse_recipe
from launcher.plan import Plan, check, plan
from launcher.plan.gpus import Gpu
from launcher.plan.memory import static
from launcher.plan.spread import Place
from parallel.topology import Layout

RECOMPUTES = ("none", "moe", "block")
MOST_STAGES = 8
ENOUGH = 2  # of the largest micro-batches that fit a layout: smaller ones are slower


def search(recipe: Recipe, nodes: int, gpus_per_node: int, gpu: Gpu) -> list[Plan]:
    """Plans that fit, the fastest first."""
    found: list[Plan] = []
    fitting: Counter = Counter()
    for candidate in candidates(recipe, nodes * gpus_per_node, gpus_per_node):
        layout, recompute = _layout(candidate), candidate.train.recompute
        place = Place(layout, nodes * gpus_per_node)
        if fitting[layout, recompute] == ENOUGH:
            continue
        if sum(static(candidate, place).values()) + gpu.context < gpu.memory:
            made = plan(candidate, nodes, gpus_per_node, gpu)
            if made.margin >= 0:
                found.append(made)
                fitting[layout, recompute] += 1
    return sorted(found, key=lambda made: made.step_seconds)


def candidates(recipe: Recipe, ranks: int, gpus_per_node: int) -> Iterator[Recipe]:
    """Every valid layout of the recipe over the ranks, its batch and its model as they are."""
    model = recipe.model
    experts = _divisors(model.experts) if model.routing != "dense" else [1]
    tensors = [n for n in _divisors(model.kv_heads) if n <= gpus_per_node]
    stages = [n for n in _divisors(model.layers) if n <= MOST_STAGES]
    for tensor, expert, pipeline, recompute in product(tensors, experts, stages, RECOMPUTES):
        layout = Layout(tensor, expert, 1, pipeline, tensor > 1)
        if ranks % (tensor * pipeline) or ranks % (expert * pipeline):
            continue
        data_ranks = Place(layout, ranks).data_ranks
        for micro in _micro_batches(recipe, data_ranks):
            parallel = recipe.parallel.model_dump() | {
                "tensor": tensor, "expert": expert, "expert_tensor": 1, "pipeline": pipeline, "sequence": tensor > 1,
                "dispatch_chunks": 1,
            }  # fmt: skip
            made = _changed(recipe, parallel, micro, recompute)
            if made is not None:
                yield made


def _micro_batches(recipe: Recipe, data_ranks: int) -> list[int]:
    """Powers of two of a data rank's images, the largest first."""
    if recipe.train.batch % data_ranks:
        return []
    images = recipe.train.batch // data_ranks
    return [n for n in (2**i for i in reversed(range(8))) if images % n == 0]


def _changed(recipe: Recipe, parallel: dict, micro: int, recompute: str) -> Recipe | None:
    values = recipe.model_dump(mode="json") | {"parallel": parallel}
    values["train"] |= {"micro_batch": micro, "recompute": recompute}
    values["train"]["graph"] &= parallel["pipeline"] == 1  # stages wait for each other
    try:
        return parse_recipe(values, "a layout")
    except UserError:
        return None


def _layout(recipe: Recipe) -> Layout:
    sizes = recipe.parallel
    return Layout(sizes.tensor, sizes.expert, sizes.expert_tensor, sizes.pipeline, sizes.sequence)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def best_layout(recipe: Recipe, nodes: int, gpus_per_node: int, gpu: Gpu | None) -> list[str]:
    """Overrides for the recipe on so many GPUs; none where its own layout will do. gpu: None where memory does not
    matter, as on a CPU: then the layout with the fewest changes.

    Raises UserError where there is no layout.
    """
    ranks = nodes * gpus_per_node
    try:
        check(recipe, _layout(recipe), ranks)
        if gpu is None or plan(recipe, nodes, gpus_per_node, gpu).margin >= 0:
            return []
    except UserError:
        pass
    if gpu is None:
        return changes(recipe, nearest(recipe, ranks, gpus_per_node))
    found = search(recipe, nodes, gpus_per_node, gpu)
    if not found:
        raise UserError(
            f"cluster.nodes: {nodes} x {gpus_per_node} {gpu.name}: no layout of this model and train.batch: "
            f"{recipe.train.batch} divides by these {ranks} ranks and fits; `ecdit plan` tells what is too large"
        )
    return changes(recipe, found[0].recipe)


def nearest(recipe: Recipe, ranks: int, gpus_per_node: int) -> Recipe:
    """The recipe itself where it divides over the ranks; else the valid layout that changes its own least: first the
    sizes, then what is recomputed, then the micro-batch. Memory is not asked for.

    Raises UserError where there is none.
    """
    try:
        check(recipe, _layout(recipe), ranks)
        return recipe
    except UserError:
        valid = list(candidates(recipe, ranks, gpus_per_node))
    if not valid:
        raise UserError(
            f"cluster.nodes: {ranks} ranks: no layout of this model and train.batch: {recipe.train.batch} divides by "
            "them; try a number of ranks that divides the batch"
        )

    def distance(other: Recipe) -> tuple:
        ours, theirs = recipe.parallel, other.parallel
        sizes = sum(abs(getattr(ours, axis) - getattr(theirs, axis)) for axis in ("tensor", "expert", "pipeline"))
        micro = abs(other.train.micro_batch - recipe.train.micro_batch)
        return sizes, other.train.recompute != recipe.train.recompute, micro

    return min(valid, key=distance)


def changes(before: Recipe, after: Recipe) -> list[str]:
    """Overrides that make one layout of a recipe of another."""
    pairs = [("parallel", key) for key in type(before.parallel).model_fields]
    pairs += [("train", key) for key in ("micro_batch", "recompute", "graph")]
    found = []
    for section, key in pairs:
        old, new = (getattr(getattr(recipe, section), key) for recipe in (before, after))
        if old != new:
            found.append(f"{section}.{key}={str(new).lower()}")
    return found

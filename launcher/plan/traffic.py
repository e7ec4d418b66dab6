"""What each collective of a step sends, over NVLink and over the network, and how long that takes.

Ranks of a node are consecutive, and so are those of a tensor group, as in `parallel.topology`.
"""

from dataclasses import dataclass

from ecdit.diffusion.masking import keep_count, ratio_at
from ecdit.recipe import Recipe
from launcher.plan import zero
from launcher.plan.gpus import Gpu
from launcher.plan.memory import both_buffers
from launcher.plan.spread import Place
from launcher.plan.stage import Stage
from launcher.plan.trace import TYPES


@dataclass(frozen=True)
class Collective:
    """One kind of collective over one axis: what a rank sends in a step, in bytes, and the time of it in seconds.

    exposed: the part of that time in which nothing else is done.
    """

    kind: str
    axis: str
    ranks: int
    calls: float
    nvlink: float
    network: float
    seconds: float
    exposed: float


def collectives(recipe: Recipe, place: Place, gpu: Gpu, here: Stage, micro_batches: int) -> list[Collective]:
    """Those of a step on a rank of this stage. What overlaps with the backward pass is settled by the caller."""
    found = []
    for (kind, axis, ranks), (calls, size, _) in sorted(here.sent.items()):
        made = _collective(kind, axis, ranks, calls * micro_batches, size * micro_batches, place, gpu)
        found.append(
            _with_exposed(made, _exposed(recipe, made, here, micro_batches) if axis == "expert" else made.seconds)
        )
    found += _pipeline(recipe, place, gpu, micro_batches)
    size = TYPES[recipe.train.precision].itemsize
    if recipe.engine == "deepspeed":
        made = zero.sent(recipe, place, size, micro_batches)
        return found + [_collective(*one[:4], one[4], place, gpu) for one in made]
    for (kept, group), axis in zip(both_buffers(recipe, place), ("data", "expert-data"), strict=True):
        if group > 1 and kept.padded:
            share = kept.padded * (group - 1) / group
            found.append(_collective("reduce-scatter", axis, group, 1, 4 * share, place, gpu))
            found.append(_collective("all-gather", axis, group, 1, size * share, place, gpu))
    return found


def _exposed(recipe: Recipe, made: Collective, here: Stage, micro_batches: int) -> float:
    """Of rows on their way to the experts and back: of each way of a layer the first or last chunk. Where the model's
    own code computes the experts, half of a rank's own rows hide it forward, all of them one way backward, and the
    weights' gradients the other."""
    sizes = recipe.parallel
    forward = 1 if recipe.train.recompute == "none" else 2  # passes
    way = made.seconds / (2 * forward + 2) / sizes.dispatch_chunks
    library = recipe.precision.fp8 != "none" and "experts" in recipe.precision.where
    kept = keep_count(recipe.model.tokens, ratio_at(recipe.masking.schedule, 0))
    spanning = sizes.tensor > 1 and recipe.train.micro_batch * kept // sizes.tensor % recipe.model.group_tokens
    if library or sizes.expert_tensor > 1 or spanning:
        return (2 * forward + 2) * way
    own = here.seconds["experts"] * micro_batches / (forward + 2) / made.ranks  # products of one kind
    return 2 * forward * max(0.0, way - own / 2) + max(0.0, way - own)


def boxes(recipe: Recipe, place: Place, gpu: Gpu, here: Stage) -> float:
    """Bytes that copy engines put rows into (`parallel.copy_engines`): a box for each chunk, there and back."""
    ranks = place.layout.expert
    if ranks == 1 or ranks_on_a_node("expert", ranks, place, gpu.gpus_per_node) < ranks:
        return 0.0
    *_, most = here.sent.get(("all-to-all", "expert", ranks), (0, 0.0, 0.0))
    return 2 * recipe.parallel.dispatch_chunks * most


def _pipeline(recipe: Recipe, place: Place, gpu: Gpu, micro_batches: int) -> list[Collective]:
    stages = place.layout.pipeline
    if stages == 1:
        return []
    model = recipe.model
    images = recipe.train.micro_batch
    if place.layout.sequence and place.layout.tensor > 1:
        images //= place.layout.tensor
    size = images * (model.tokens + model.text_tokens + 1) * model.width * TYPES[recipe.train.precision].itemsize
    sides = (place.stage > 0) + (place.stage < stages - 1)  # activations one way, gradients the other
    calls = sides * micro_batches
    return [_collective("send", "pipeline", stages, calls, size * calls, place, gpu)]


def _collective(kind: str, axis: str, ranks: int, calls: float, size: float, place: Place, gpu: Gpu) -> Collective:
    local = ranks_on_a_node(axis, ranks, place, gpu.gpus_per_node)
    nodes = -(-ranks // local)
    if kind == "all-to-all":
        network = size * (ranks - local) / (ranks - 1)
    elif kind == "send":
        network = 0.0 if local > 1 else size
    else:  # a ring passes the whole over every node's links, which its ranks there share
        network = size * ranks / (ranks - 1) * (nodes - 1) / nodes / local
    nvlink = max(0.0, size - network)
    share = gpu.link_share
    seconds = max(nvlink / (gpu.nvlink * share), network / (gpu.network * share)) + calls * gpu.link_latency
    return Collective(kind, axis, ranks, calls, nvlink, network, seconds, seconds)


def _with_exposed(made: Collective, exposed: float) -> Collective:
    return Collective(**{**vars(made), "exposed": exposed})


def ranks_on_a_node(axis: str, ranks: int, place: Place, gpus: int) -> int:
    """How many ranks of a group are on one node."""
    layout = place.layout
    step = {
        "tensor": 1,
        "expert-tensor": 1,
        "expert": layout.expert_tensor,
        "data": layout.tensor,
        "expert-data": layout.expert * layout.expert_tensor,
        "pipeline": place.ranks // layout.pipeline,
    }[axis]
    return max(1, min(ranks, gpus // step))


def hide_behind(found: list[Collective], seconds: float) -> list[Collective]:
    """The reduction of gradients runs beside the backward pass of the last micro-batch, which lasts `seconds`."""
    settled = []
    for made in found:
        if made.kind == "reduce-scatter" and made.axis in ("data", "expert-data"):
            exposed = max(0.0, made.seconds - seconds)
            seconds = max(0.0, seconds - made.seconds)
            made = _with_exposed(made, exposed)
        settled.append(made)
    return settled

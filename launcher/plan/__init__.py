"""The planner: memory, traffic and time of a recipe on so many GPUs, before any of them is there.

A plan is a function of the recipe and the GPU's data alone. It comes from the model's own code, run on tensors that
have shapes and no memory (`trace.py`).
"""

from dataclasses import asdict, dataclass, fields
from typing import Any

from ecdit.diffusion.masking import keep_count
from ecdit.errors import UserError
from ecdit.model.count import forward_flops
from ecdit.model.sizes import TEXT_ENCODER_PARAMETERS
from ecdit.recipe import Recipe
from launcher.plan import zero
from launcher.plan.gpus import Gpu
from launcher.plan.memory import Memory, both_buffers, encoders_used, rank_memory
from launcher.plan.spread import Place
from launcher.plan.stage import Stage, stage
from launcher.plan.trace import TYPES
from launcher.plan.traffic import Collective, boxes, collectives, hide_behind
from parallel.topology import Layout, LayoutError

BACKWARD_SHARE = 2 / 3  # of a micro-batch's time
# read and written for an element of the optimizer's slice, by the norm and both passes, without the model's weight
UPDATE_BYTES = 48
AUTOENCODER_FLOPS = 0.27e12 / 256**2  # of an AutoencoderKL of the usual widths, for a pixel


@dataclass(frozen=True)
class Plan:
    """Of one recipe on `nodes` nodes. seconds: of a step, by part. memory: of a rank of each pipeline stage."""

    recipe: Recipe
    gpu: str
    nodes: int
    ranks: int
    parameters: int
    capacity: float
    memory: list[Memory]
    traffic: list[Collective]
    seconds: dict[str, float]
    images_per_s: float
    mfu: float
    days: float

    @property
    def layout(self) -> dict[str, Any]:
        """What the recipe says of it."""
        train = self.recipe.train
        return self.recipe.parallel.model_dump() | {"micro_batch": train.micro_batch, "recompute": train.recompute}

    @property
    def worst(self) -> Memory:
        """The stage that needs most memory."""
        return max(self.memory, key=lambda memory: memory.peak)

    @property
    def margin(self) -> float:
        """Bytes that are left on a GPU of the worst stage; negative where it does not fit."""
        return self.capacity - self.worst.peak

    @property
    def step_seconds(self) -> float:
        """Of a whole step."""
        return sum(self.seconds.values())

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        peaks = {"peak": self.worst.peak, "margin": self.margin, "largest": self.worst.largest}
        own = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "recipe"}
        own |= {"memory": [asdict(m) for m in self.memory], "traffic": [asdict(t) for t in self.traffic]}
        sums = {"step_seconds": self.step_seconds, "fits": self.margin >= 0}
        return {"run": self.recipe.run, "layout": self.layout} | own | peaks | sums


def plan(recipe: Recipe, nodes: int, gpus_per_node: int, gpu: Gpu) -> Plan:
    """Raises UserError where the ranks do not divide as the recipe's layout needs."""
    ranks = nodes * gpus_per_node
    sizes = recipe.parallel
    layout = Layout(sizes.tensor, sizes.expert, sizes.expert_tensor, sizes.pipeline, sizes.sequence)
    micro_batches = check(recipe, layout, ranks)
    places = [Place(layout, ranks, number) for number in range(layout.pipeline)]
    memory = [_memory(recipe, place, gpu, micro_batches) for place in places]
    costs = [stage(recipe, place, gpu, most=False) for place in places]
    slowest = max(range(len(places)), key=lambda i: _kernels_time(recipe, costs[i], gpu))
    seconds, traffic = _time(recipe, places[slowest], gpu, costs[slowest], micro_batches)
    total = sum(seconds.values())
    return Plan(
        recipe,
        gpu.name,
        nodes,
        ranks,
        sum(kept.piece for kept, _ in both_buffers(recipe, Place(Layout(), 1))),
        gpu.memory,
        memory,
        traffic,
        seconds,
        recipe.train.batch / total,
        _mfu(recipe, gpu, ranks, total),
        total * recipe.train.steps / 86400,
    )


def check(recipe: Recipe, layout: Layout, ranks: int) -> int:
    """Micro-batches of a step on a rank. Raises UserError where the ranks, or the batch, do not divide."""
    try:
        layout.check(ranks)
    except LayoutError as error:
        raise UserError(str(error)) from None
    data_ranks = Place(layout, ranks).data_ranks
    images = recipe.train.micro_batch * data_ranks
    if recipe.train.batch % images:
        raise UserError(
            f"train.batch: {recipe.train.batch} does not divide into {data_ranks} data ranks with whole micro-batches "
            f"of train.micro_batch: {recipe.train.micro_batch}; try a multiple of {images}"
        )
    return recipe.train.batch // images


def _memory(recipe: Recipe, place: Place, gpu: Gpu, micro_batches: int) -> Memory:
    cost = stage(recipe, place, gpu, most=True)
    in_flight = min(place.layout.pipeline - place.stage, micro_batches)
    return rank_memory(
        recipe,
        place,
        gpu,
        kept=cost.kept,
        dispatch=cost.dispatch,
        boxes=boxes(recipe, place, gpu, cost),
        peak=cost.peak,
        in_flight=in_flight,
    )


def _kernels_time(recipe: Recipe, cost: Stage, gpu: Gpu) -> float:
    """Of a micro-batch: kernels one after the other, or the host that launches them, whichever is slower. A graph needs
    no host."""
    return max(sum(cost.seconds.values()), 0.0 if recipe.train.graph else cost.kernels * gpu.host_seconds)


def _time(
    recipe: Recipe, place: Place, gpu: Gpu, cost: Stage, micro_batches: int
) -> tuple[dict[str, float], list[Collective]]:
    """Seconds of a step by part, and its collectives."""
    micro = _kernels_time(recipe, cost, gpu)
    traffic = collectives(recipe, place, gpu, cost, micro_batches)
    traffic = hide_behind(traffic, BACKWARD_SHARE * micro)
    seconds = {part: value * micro_batches for part, value in cost.seconds.items()}
    seconds["waiting for the host"] = (micro - sum(cost.seconds.values())) * micro_batches
    size = TYPES[recipe.train.precision].itemsize
    if recipe.engine == "deepspeed":
        seconds |= zero.seconds(recipe, place, gpu, size, micro_batches, UPDATE_BYTES)
    else:
        moved = gpu.hbm * gpu.hbm_share
        kept = both_buffers(recipe, place)
        padded, piece = sum(b.padded for b, _ in kept), sum(b.piece for b, _ in kept)
        # the buffer is cleared, and gradients that no product has added to it are
        seconds["gradients"] = (micro_batches * cost.returned * (size + 8) + 4 * padded) / moved
        seconds["update"] = piece * (UPDATE_BYTES + size) / moved
    seconds["encoders"] = _encoders(recipe, gpu, micro_batches)
    seconds["communication"] = sum(made.exposed for made in traffic)
    stages = place.layout.pipeline
    seconds["pipeline bubble"] = micro * (stages - 1)
    return seconds, traffic


def _encoders(recipe: Recipe, gpu: Gpu, micro_batches: int) -> float:
    """Tensor ranks share the work."""
    data, images = recipe.data, micro_batches * recipe.train.micro_batch / recipe.parallel.tensor
    text, pictures = encoders_used(recipe)
    flops = 2.0 * TEXT_ENCODER_PARAMETERS * recipe.model.text_tokens if text else 0.0
    flops += AUTOENCODER_FLOPS * data.resolution**2 if pictures else 0.0
    rate = gpu.bf16 if recipe.train.precision == "bf16" else gpu.fp32
    return images * flops / rate / gpu.product_share


def _mfu(recipe: Recipe, gpu: Gpu, ranks: int, seconds: float) -> float:
    tokens = keep_count(recipe.model.tokens, recipe.masking.schedule[0][1])
    rate = gpu.bf16 if recipe.train.precision == "bf16" else gpu.fp32
    return 3 * forward_flops(recipe.model, tokens) * recipe.train.batch / seconds / (rate * ranks)

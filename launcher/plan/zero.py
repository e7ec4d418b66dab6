"""What engine deepspeed holds, moves and sends, for each ZeRO stage (`parallel/engine/zero.py` has the table).

Elements are counted as DeepSpeed pads them; its buffers for the reduction and the update are those of its code.
"""

from dataclasses import dataclass
from typing import Any

from ecdit.recipe import Recipe
from launcher.plan.gpus import Gpu
from launcher.plan.spread import Place
from launcher.plan.weights import parameters
from parallel.engine.deepspeed_config import BUCKET, BUFFERS, SUB_GROUP

ALIGNMENT = 2  # elements of a group, times its ranks
MASTERS = {"master weights": 4, "optimizer states": 8, "EMA": 4}  # bytes of an element of the rank's piece
ADDING = 28  # bytes moved for an element of a gradient that goes through a bucket to fp32
HOST_UPDATE_BYTES = 112  # read and written in the host's memory for an element, by torch's passes
WHOLE = {0, 1}  # stages at which every rank keeps all gradients, and reduces them once a step


@dataclass(frozen=True)
class Group:
    """Elements of weights that are reduced over `ranks`: padded, a rank's piece of them, the largest weight."""

    ranks: int
    padded: int
    piece: int
    largest: int


def groups(recipe: Recipe, place: Place) -> list[Group]:
    """Of a rank: dense vectors, dense matrices, experts."""
    stage, found = recipe.engine_options.zero, {}
    for weight in parameters(recipe.model, place):
        found.setdefault((weight.expert, weight.matrix), []).append(weight.numel)
    made = []
    for (expert, _), sizes in found.items():
        ranks = place.expert_data_ranks if expert else place.data_ranks
        if stage == 3:
            piece = sum(-(-size // ranks) for size in sizes)
            padded = piece * ranks
        else:
            padded = _up(sum(sizes), ALIGNMENT * ranks) if stage else sum(sizes)
            piece = padded // ranks if stage else padded
        made.append(Group(ranks, padded, piece, max(sizes)))
    return made


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


@dataclass(frozen=True)
class Held:
    """Bytes from start to end: on the GPU, in the host's memory, on the disk, by part."""

    gpu: dict[str, float]
    host: dict[str, float]
    disk: dict[str, float]


def held(recipe: Recipe, place: Place, size: int) -> Held:
    """size: bytes of a weight as it computes."""
    options, kinds = recipe.engine_options, groups(recipe, place)
    stage, padded, piece = options.zero, sum(g.padded for g in kinds), sum(g.piece for g in kinds)
    parts = Held({}, {}, {})
    places = {"none": parts.gpu, "cpu": parts.host, "nvme": parts.disk}
    places[options.offload_weights]["weights"] = size * (piece if stage == 3 else padded)
    gradients = {0: size * padded, 1: 4 * (padded + piece), 2: 4 * piece, 3: 4 * piece}[stage]
    offloaded = options.offload_optimizer != "none"
    if stage == 1 and size < 4 and not offloaded:
        gradients = (4 + size) * padded  # fp32 beside those of the last micro-batch
    elif stage == 2 and size == 4:
        gradients = 8 * piece  # a sum, and what is added to it
    (parts.host if offloaded and stage == 3 else parts.gpu)["gradients"] = gradients
    if stage == 0 or (stage == 3 and size == 4 and not offloaded):
        masters = {kind: each * piece for kind, each in MASTERS.items() if kind != "master weights"}
    else:
        masters = {kind: each * piece for kind, each in MASTERS.items()}
    places[options.offload_optimizer].update(masters)
    if options.offload_optimizer == "cpu":
        parts.host["gradients"] = parts.host.get("gradients", 0) + 4 * piece
        if stage < 3:
            parts.host["weights that are sent"] = size * piece
    if parts.disk:
        parts.host["buffers for the disk"] = _buffers_for_the_disk(recipe, kinds, size)
    return parts


def _buffers_for_the_disk(recipe: Recipe, kinds: list[Group], size: int) -> float:
    """In each is what is updated at once, or a weight."""
    options, parts = recipe.engine_options, [-(-g.largest // g.ranks) for g in kinds]
    found = 0.0
    if options.offload_optimizer == "nvme":
        at_once = _tuned(recipe, "sub_group_size", SUB_GROUP)  # and the weight with which it is reached
        updated = max(min(g.piece, at_once + part) for g, part in zip(kinds, parts, strict=True))
        found += 4 * updated * _tuned(recipe, "offload_optimizer", {}).get("buffer_count", BUFFERS)
    if options.offload_weights == "nvme":
        found += size * max(parts) * _tuned(recipe, "offload_param", {}).get("buffer_count", BUFFERS)
    return found


def _tuned(recipe: Recipe, key: str, default: Any) -> Any:
    """What the recipe says of DeepSpeed's key."""
    return recipe.engine_options.config.get("zero_optimization", {}).get(key, default)


def buckets(recipe: Recipe, place: Place, size: int) -> float:
    """Bytes of the buffers through which gradients are reduced while a backward pass runs, and of the weights that
    stage 3 has gathered and keeps for it."""
    stage, kinds = recipe.engine_options.zero, groups(recipe, place)
    elements = min(_tuned(recipe, "reduce_bucket_size", BUCKET), sum(g.padded for g in kinds))
    if stage == 0:
        return 0.0
    if stage == 3:
        kept = 0 if recipe.train.recompute == "block" else sum(g.padded for g in kinds)
        return 4.0 * 2 * elements + size * kept
    sent = size * max(g.largest for g in kinds) if recipe.engine_options.offload_optimizer != "none" else 0
    return elements * (2 * size + 4.0) + sent


def update_peak(recipe: Recipe, place: Place) -> float:
    """Bytes that the update needs on the GPU besides: DeepSpeed's norms are of fp64 copies, a weight at a time."""
    options = recipe.engine_options
    if options.zero == 0 or (options.zero == 2 and options.offload_optimizer == "none"):
        return 0.0
    return 8.0 * max(-(-g.largest // (g.ranks if options.zero > 1 else 1)) for g in groups(recipe, place))


def seconds(recipe: Recipe, place: Place, gpu: Gpu, size: int, micro_batches: int, update_bytes: float) -> dict:
    """Of a step, by part: adding gradients up, the update, and what goes over PCIe or to the disk."""
    options, kinds = recipe.engine_options, groups(recipe, place)
    padded, piece = sum(g.padded for g in kinds), sum(g.piece for g in kinds)
    moved = gpu.hbm * gpu.hbm_share
    found = {"gradients": micro_batches * ADDING * padded / moved}
    if options.offload_optimizer == "none":
        found["update"] = piece * (update_bytes + size) / moved
        transferred = 0.0
    else:
        found["update"] = piece * HOST_UPDATE_BYTES / gpu.host
        transferred = (4 + size) * piece / gpu.pcie
        if options.zero == 3:  # sums are on the host: each micro-batch fetches them and brings them back
            transferred += 8 * piece * micro_batches / gpu.pcie
    if options.offload_weights != "none":  # for the forward pass and for the backward pass
        rate = gpu.disk if options.offload_weights == "nvme" else gpu.pcie
        transferred += 2 * size * piece * micro_batches / rate
    if options.offload_optimizer == "nvme":  # masters, states and average, there and back, and gradients
        transferred += (2 * sum(MASTERS.values()) + 8) * piece / gpu.disk
    return found | {"offload": transferred}


def sent(recipe: Recipe, place: Place, size: int, micro_batches: int) -> list[tuple[str, str, int, float, float]]:
    """(kind, axis, ranks, calls, bytes) of a step's reductions and gathers."""
    stage, found = recipe.engine_options.zero, []
    for group in groups(recipe, place):
        if group.ranks == 1:
            continue
        axis = "data" if group.ranks == place.data_ranks else "expert-data"
        share = group.padded * (group.ranks - 1) / group.ranks
        times = 1 if stage in WHOLE else micro_batches
        calls = times * -(-group.padded // _tuned(recipe, "reduce_bucket_size", BUCKET))
        found.append(("all-reduce", axis, group.ranks, calls, 8 * share * times))
        gathered = {0: 0, 1: 1, 2: 1, 3: 2 * micro_batches}[stage]
        if gathered:
            found.append(("all-gather", axis, group.ranks, gathered, size * share * gathered))
    return found

"""Bytes on a rank, part by part: what the engine allocates, exactly, and what a micro-batch needs, from its trace.

The engine's buffers are those of megatron-core's DDP with a sharded optimizer: parameters in reverse order, each begun
at a multiple of 64 elements, buckets that end at a multiple of the data ranks and of 128.
"""

import math
from dataclasses import dataclass, field

from ecdit.data.cache import is_local
from ecdit.data.encoded import Encoded, read_encoded
from ecdit.errors import UserError
from ecdit.model.sizes import AUTOENCODER_PARAMETERS, TEXT_ENCODER_PARAMETERS
from ecdit.recipe import Recipe
from launcher.plan import zero
from launcher.plan.gpus import Gpu
from launcher.plan.spread import Place
from launcher.plan.trace import TYPES
from launcher.plan.weights import parameters
from parallel.kernels.rmsprop import ROOTS

BUCKET, BUCKET_A_RANK = 40_000_000, 1_000_000  # elements of a bucket at least, where reduction overlaps
STATES = 2  # of the optimizer: square and momentum
AUTOENCODER_WIDEST = 128 * 3  # channels that are alive at once at the picture's full resolution: an estimate


@dataclass(frozen=True)
class Buffers:
    """Elements that one rank holds of the weights of one kind: padded buffers, its piece, its largest bucket."""

    padded: int
    piece: int
    largest_bucket: int


def buffers(sizes: list[int], group: int, ranks: int) -> Buffers:
    """For parameters of these sizes, reduced over `group` of the job's `ranks`."""
    limit = max(BUCKET, BUCKET_A_RANK * group) if ranks > 1 else None
    buckets, placed, start, bucket_start = [], [], 0, 0

    def close(end: int) -> int:
        divisor = math.lcm(group, 128)
        padded = -(-end // divisor) * divisor
        buckets.append((bucket_start, padded))
        return padded

    for size in reversed(sizes):
        start = -(-start // 64) * 64
        end = start + size
        placed.append((start, end))
        if limit is not None and end - bucket_start >= limit:
            end = bucket_start = close(end)
        start = end
    if start > bucket_start:
        close(start)
    padded = buckets[-1][1] if buckets else 0
    piece = sum(_overlap(placed, begin, begin + (end - begin) // group) for begin, end in buckets)
    return Buffers(padded, piece, max((end - begin for begin, end in buckets), default=0))


def _overlap(placed: list[tuple[int, int]], low: int, high: int) -> int:
    return sum(max(0, min(end, high) - max(start, low)) for start, end in placed)


def both_buffers(recipe: Recipe, place: Place) -> list[tuple[Buffers, int]]:
    """The buffers of dense and of expert weights, each with the size of the group that shares them."""
    found = parameters(recipe.model, place)
    groups = ((False, place.data_ranks), (True, place.expert_data_ranks))
    return [
        (buffers([weight.numel for weight in found if weight.expert == expert], group, place.ranks), group)
        for expert, group in groups
    ]


def static(recipe: Recipe, place: Place) -> dict[str, float]:
    """Bytes of what a rank's GPU holds from start to end."""
    if recipe.engine == "deepspeed":
        return zero.held(recipe, place, TYPES[recipe.train.precision].itemsize).gpu
    kinds = both_buffers(recipe, place)
    padded, piece = sum(b.padded for b, _ in kinds), sum(b.piece for b, _ in kinds)
    held = {
        "weights": padded * TYPES[recipe.train.precision].itemsize,
        "gradients": 4 * padded,
        "master weights": 4 * piece,
        "optimizer states": 4 * STATES * piece,
        "EMA": 4 * piece,
    }
    return held if recipe.precision.fp8 == "none" else held | {"weights in FP8": fp8_weights(recipe, place)}


def fp8_weights(recipe: Recipe, place: Place) -> float:
    """Bytes of what a rank keeps of its weights in FP8 between micro-batches, along their rows and their columns."""
    kinds = {"experts": lambda w: w.expert, "linears": lambda w: w.linear}
    found = parameters(recipe.model, place)
    return 2.0 * sum(w.numel for w in found for kind in recipe.precision.where if kinds[kind](w))


def update_peak(recipe: Recipe, place: Place) -> float:
    """Bytes that the update needs besides, at most: some squares' roots, or a bucket's slice that is sent."""
    if recipe.engine == "deepspeed":
        return zero.update_peak(recipe, place)
    kinds = both_buffers(recipe, place)
    slices = max(b.largest_bucket / group for b, group in kinds) * TYPES[recipe.train.precision].itemsize
    return max(4.0 * min(ROOTS, sum(b.piece for b, _ in kinds)), slices)


def encoders_used(recipe: Recipe) -> tuple[bool, bool]:
    """Whether training runs the text encoder and the autoencoder: not where the shards, if they are here, hold what
    these would make."""
    data = recipe.data
    source = data.streams[0].path
    try:
        encoded = read_encoded(source) if is_local(source) else Encoded()
    except UserError:  # training will refuse it, not the plan
        encoded = Encoded()
    return data.text_encoder != "hash" and not encoded.text, data.autoencoder != "pixels" and not encoded.pictures


def encoders(recipe: Recipe, place: Place) -> dict[str, float]:
    """Bytes of the frozen encoders, which run in the precision of training."""
    size, (text, pictures) = TYPES[recipe.train.precision].itemsize, encoders_used(recipe)
    found = {}
    if text:
        found["text encoder"] = TEXT_ENCODER_PARAMETERS * size / (place.ranks if recipe.data.shard_encoders else 1)
    if pictures:
        found["autoencoder"] = AUTOENCODER_PARAMETERS * size
    return found


def encoding_peak(recipe: Recipe, place: Place) -> float:
    """Bytes while a micro-batch of pictures is encoded, as an estimate; none of it is kept."""
    if not encoders_used(recipe)[1]:
        return 0.0
    size, images = TYPES[recipe.train.precision].itemsize, recipe.train.micro_batch / place.layout.tensor
    return images * recipe.data.resolution**2 * AUTOENCODER_WIDEST * size


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, by part; `peak` is their sum at the worst moment. host, disk: what is offloaded there."""

    stage: int
    parts: dict[str, float]
    host: dict[str, float] = field(default_factory=dict)
    disk: dict[str, float] = field(default_factory=dict)

    @property
    def peak(self) -> float:
        """Bytes at most."""
        return sum(self.parts.values())

    @property
    def largest(self) -> str:
        """The part that has most."""
        return max(self.parts, key=self.parts.get)


def rank_memory(
    recipe: Recipe,
    place: Place,
    gpu: Gpu,
    *,
    kept: float,
    dispatch: float,
    boxes: float,
    peak: float,
    in_flight: int,
) -> Memory:
    """kept, dispatch, peak: of a micro-batch (see `Trace`); boxes: what rows on their way to experts and back take, of
    all layers; in_flight: micro-batches whose activations are kept."""
    parts = static(recipe, place) | encoders(recipe, place)
    parts["activations"] = (kept - dispatch) * in_flight
    parts["dispatch buffers"] = dispatch * in_flight + boxes
    # forward and backward, the update and the encoding have their working memory one after the other
    backward = peak - kept
    elsewhere = max(update_peak(recipe, place), encoding_peak(recipe, place)) - kept * in_flight
    parts["working memory"] = max(backward, elsewhere, 0.0)
    offloaded = zero.Held({}, {}, {})
    if recipe.engine == "deepspeed":
        size = TYPES[recipe.train.precision].itemsize
        parts["reduction buckets"] = zero.buckets(recipe, place, size)
        offloaded = zero.held(recipe, place, size)
    parts["allocator slack"] = gpu.slack * sum(parts.values())
    parts["CUDA, cuBLAS, NCCL"] = gpu.context
    return Memory(place.stage, parts, offloaded.host, offloaded.disk)

"""The expert-choice layer against what people would use: a dense FFN of equal FLOPs, the paper's Algorithm 1 as it
prints it, megatron-core's dropless top-2 layer.

Shapes: `G` routing groups, `T` tokens of a group, `D` hidden, `F = 4D` expert hidden, `E` experts, `C` capacity.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from benchmarks.budget import NOTHING, Asked, Step, Variant, compare
from benchmarks.harness import Row, device_here
from benchmarks.peers import FP8_KINDS, GPU, algorithm_1, differentiated, first_region, here, in_fp8, randomized
from ecdit.model.experts import Ffn
from ecdit.model.moe import Moe
from parallel.spread import Spread

G, T = (64, 1024) if GPU else (8, 1024)
CASES = ((1152, 8), (2304, 32)) if GPU else ((256, 16), (256, 64))  # D, E
TYPE = torch.bfloat16 if GPU else torch.float32
CAPACITY_FACTOR = 2
SECONDS = 24.0 if GPU else 14.0
AUX_LOSS = 0.01  # weight of the peer's load-balancing loss


def rows(asked: Asked = NOTHING) -> list[Row]:
    """Forward and backward, gradients of weights and tokens. The trace is of the first variant."""
    cases = [_variants(width, experts) for width, experts in CASES]
    picked = asked.pick([variant for case in cases for variant in case])
    cases = [case for case in ([variant for variant in case if variant in picked] for case in cases) if case]
    found: list[Row] = []
    for number, case in enumerate(cases):
        seconds = (asked.seconds or SECONDS) / len(cases)
        found += compare(case, seconds, TYPE, asked.trace if number == 0 else None)
    return found


def _variants(width: int, experts: int) -> list[Variant]:
    where = f"D {width}, E {experts}"
    layer, dense = f"EC-DiT layer, {where}", f"dense FFN of equal FLOPs, {where}"
    products = 3 * 2 * CAPACITY_FACTOR * G * T * 8 * width**2  # two products of 4 D^2 multiply-adds, thrice

    made = [
        Variant(layer, lambda: _layer(width, experts), dense, graph=True),
        Variant(dense, lambda: _dense(width), graph=True),
        # which asks the host for its counts of rows
        Variant(f"megatron-core's MoELayer, top-2 dropless, {where}", lambda: _megatron(width, experts), layer),
        Variant(f"Algorithm 1 as printed, {where}", lambda: _printed(width, experts), layer, graph=True),
    ]
    for kind in FP8_KINDS:
        ready = partial(_layer_fp8, kind, width, experts)
        made.append(Variant(f"{layer}, FP8 {kind}", ready, dense, graph=True))
    for variant in made:
        variant.flops = float(products)
    return made


def _tokens(width: int, *shape: int) -> Tensor:
    return torch.randn(*shape, width, device=device_here(), dtype=TYPE)


def _moe(width: int, experts: int, spread: Spread) -> Moe:
    with device_here():
        return randomized(Moe(width, experts, CAPACITY_FACTOR, "expert_choice", spread)).to(TYPE)


@contextmanager
def _layer(width: int, experts: int) -> Iterator[Step]:
    moe = _moe(width, experts, Spread())
    yield differentiated(lambda x: moe(x, T)[0], [_tokens(width, G, T)], list(moe.parameters()))


@contextmanager
def _layer_fp8(kind: str, width: int, experts: int) -> Iterator[Step]:
    with in_fp8(kind, lambda spread: _moe(width, experts, spread)) as (moe, fp8):

        def forward(x: Tensor) -> Tensor:
            with first_region(fp8):
                return moe(x, T)[0]

        yield differentiated(forward, [_tokens(width, G, T)], list(moe.parameters()))


@contextmanager
def _dense(width: int) -> Iterator[Step]:
    with device_here():
        ffn = randomized(Ffn(width, Spread())).to(TYPE)
    yield differentiated(ffn, [_tokens(width, CAPACITY_FACTOR * G * T)], list(ffn.parameters()))


@contextmanager
def _printed(width: int, experts: int) -> Iterator[Step]:
    moe = _moe(width, experts, Spread())
    router, up, down = moe.router.weight, moe.experts.up, moe.experts.down
    capacity = T * CAPACITY_FACTOR // experts
    function = lambda x: algorithm_1(x, router, up.mT, down.mT, capacity)  # noqa: E731
    yield differentiated(function, [_tokens(width, G, T)], [router, up, down])


@contextmanager
def _megatron(width: int, experts: int) -> Iterator[Step]:
    if not GPU:
        raise RuntimeError("needs a GPU, and Transformer Engine's grouped products")
    from parallel.megatron_moe import MegatronMoe, set_share

    place = here()
    with place.device:
        layer = randomized(MegatronMoe(place, width, experts, AUX_LOSS)).to(TYPE)
    set_share(1.0, place.device)
    yield differentiated(layer, [_tokens(width, G * T)], list(layer.parameters()))

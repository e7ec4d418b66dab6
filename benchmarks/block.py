"""A whole block, dense and with expert choice, against the same block in plain torch: eager, compiled, in FP8.

Shapes: `B` images, `S` tokens of an image, `L` text tokens, `D` hidden, `E` experts, `T` tokens of a routing group.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from benchmarks.budget import NOTHING, Asked, Step, Variant, compare
from benchmarks.harness import Row, device_here
from benchmarks.peers import FP8_KINDS, GPU, PlainBlock, differentiated, first_region, in_fp8, randomized
from ecdit import reference
from ecdit.model.block import Block
from ecdit.model.moe import Moe
from parallel.spread import Spread

# B, S, L, D, heads, key-value heads, E, T: XL with half of its tokens masked; on a CPU about the quickstart
SHAPE = (128, 128, 120, 1152, 18, 6, 8, 1024) if GPU else (16, 64, 16, 128, 4, 4, 8, 256)
TYPE = torch.bfloat16 if GPU else torch.float32
CAPACITY_FACTOR = 2
SECONDS = 20.0 if GPU else 8.0
COMPILED = GPU  # on a CPU a compiler of C++ takes half a minute a block


def rows(asked: Asked = NOTHING) -> list[Row]:
    """Forward and backward, gradients of weights, tokens, time and text. The trace is of the first variant."""
    variants = asked.pick([*_variants(sparse=True), *_variants(sparse=False)])
    return compare(variants, asked.seconds or SECONDS, TYPE, asked.trace)


def _variants(*, sparse: bool) -> list[Variant]:
    kind = "expert-choice" if sparse else "dense"
    ours, plain, flops = f"{kind} block", f"{kind} block in plain torch", _flops(sparse)
    made = [
        Variant(ours, lambda: _ours(sparse, compiled=False), plain, flops),
        Variant(plain, lambda: _plain(sparse, compiled=False), None, flops),
    ]
    if COMPILED:
        made.append(Variant(f"{ours}, compiled", lambda: _ours(sparse, compiled=True), plain, flops))
        made.append(Variant(f"{plain}, compiled", lambda: _plain(sparse, compiled=True), plain, flops))
    for fp8 in FP8_KINDS:
        made.append(Variant(f"{ours}, FP8 {fp8}", lambda fp8=fp8: _in_fp8(fp8, sparse), plain, flops))
    for variant in made:
        variant.graph = True
    return made


def _flops(sparse: bool) -> float:
    """Of the products, forward and backward."""
    b, s, length, d, heads, kv_heads, *_ = SHAPE
    kv = 2 * kv_heads * d // heads
    ffn = 8 * d * d * (CAPACITY_FACTOR if sparse else 1)
    token = d * (d + kv) + 3 * d * d + ffn + 2 * d * (s + length)
    return 3.0 * 2 * b * (s * token + length * d * kv + 4 * d * d)


def _block(spread: Spread, sparse: bool) -> Block:
    _, _, _, d, heads, kv_heads, experts, _ = SHAPE
    with device_here():
        moe = Moe(d, experts, CAPACITY_FACTOR, "expert_choice", spread) if sparse else None
        return randomized(Block(d, heads, kv_heads, spread, moe)).to(TYPE)


def _inputs() -> list[Tensor]:
    b, s, length, d, *_ = SHAPE
    return [torch.randn(*shape, device=device_here(), dtype=TYPE) for shape in ((b, s, d), (b, d), (b, length, d))]


def _step(block: nn.Module, forward: Callable[..., Tensor]) -> Step:
    b, _, length, *_, group_tokens = SHAPE
    mask = torch.ones(b, 1, 1, length, dtype=torch.bool, device=device_here())
    mask[:, :, :, length // 2 :] = False  # a caption seldom fills it
    return differentiated(lambda *x: forward(*x, mask, group_tokens), _inputs(), list(block.parameters()))


@contextmanager
def _ours(sparse: bool, *, compiled: bool) -> Iterator[Step]:
    block = _block(Spread(), sparse)

    def forward(*inputs) -> Tensor:
        return block(*inputs)[0]

    yield _step(block, torch.compile(forward, dynamic=False) if compiled else forward)


@contextmanager
def _plain(sparse: bool, *, compiled: bool) -> Iterator[Step]:
    _, _, _, d, heads, kv_heads, experts, _ = SHAPE
    config = reference.Config(1, d, heads, kv_heads, experts=experts, capacity_factor=CAPACITY_FACTOR)
    with device_here():
        block = randomized(PlainBlock(config, sparse)).to(TYPE)
    yield _step(block, torch.compile(block, dynamic=False) if compiled else block)


@contextmanager
def _in_fp8(kind: str, sparse: bool) -> Iterator[Step]:
    with in_fp8(kind, lambda spread: _block(spread, sparse)) as (block, fp8):

        def forward(*inputs) -> Tensor:
            with first_region(fp8):
                return block(*inputs)[0]

        yield _step(block, forward)

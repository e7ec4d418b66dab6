"""Counter-based random numbers: Philox 4x32-10 (Salmon et al. 2011), in torch, on any device.

A number is a function of (key, counter) alone: no state, no stream of a rank. Keys come from a seed and words that
name the purpose; counters from where a number belongs (the position in the global batch, the index in a weight).
Integer arithmetic is exact, so all devices draw the same 32-bit words.
"""

import hashlib
import math

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF
# Elements worked on at once: on a CPU the int64 words of a chunk stay within a core's cache; on a GPU every chunk is
# some 150 kernels, which a host takes milliseconds to launch.
_CHUNK = {"cpu": 1 << 16, "cuda": 1 << 22}


def key_of(seed: int, *words: int | str) -> int:
    """A 64-bit key for a seed and a purpose, such as key_of(0, "noise", step): the BLAKE2b hash of their text."""
    text = "\0".join(str(word) for word in (seed, *words))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: int) -> tuple[Tensor, ...]:
    """Ten rounds over four counter words (int64 tensors below 2**32) -> four words of the same shape."""
    c0, c1, c2, c3 = counter
    k0, k1 = key & _LOW, key >> 32
    for _ in range(10):
        # a product of two 32-bit words wraps int64's sign; shift and mask still give its upper and lower word
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = (p1 >> 32).bitwise_and_(_LOW).bitwise_xor_(c1).bitwise_xor_(k0)
        c1 = p1.bitwise_and_(_LOW)
        c2 = (p0 >> 32).bitwise_and_(_LOW).bitwise_xor_(c3).bitwise_xor_(k1)
        c3 = p0.bitwise_and_(_LOW)
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def uniform(key: int, streams: Tensor, n: int) -> Tensor:
    """The first `n` numbers of each stream, in the open interval (0, 1), fp32. streams (N,) int64 -> (N, n)."""
    return _unit(_words(key, streams, n))


def normal(key: int, streams: Tensor, n: int) -> Tensor:
    """The first `n` standard normals of each stream, fp32. streams (N,) int64 -> (N, n)."""
    return _box_muller(_words(key, streams, n + n % 2))[:, :n]


def normal_at(key: int, start: int, n: int, device: torch.device | None = None) -> Tensor:
    """Standard normals number start ... start + n - 1 of one endless sequence, fp32 (n,).

    Any split of the sequence gives the numbers of the whole.
    """
    out = torch.empty(n, device=device)
    chunk = _CHUNK.get(out.device.type, _CHUNK["cpu"])
    first = start - start % 4  # a block of the generator makes four
    while first < start + n:
        blocks = torch.arange(first // 4, first // 4 + chunk // 4, device=device)
        low, high = blocks & _LOW, blocks >> 32
        words = torch.stack(philox4x32((low, high, torch.zeros_like(low), torch.ones_like(low)), key), dim=-1)
        values = _box_muller(words.view(1, -1))[0]
        begin, end = max(start, first), min(start + n, first + chunk)
        out[begin - start : end - start] = values[begin - first : end - first]
        first += chunk
    return out


def _words(key: int, streams: Tensor, n: int) -> Tensor:
    """n 32-bit words of each stream (N,) -> (N, n). Counter: the stream's two words, the block, 0."""
    blocks = torch.arange(-(-n // 4), device=streams.device).expand(len(streams), -1)
    low, high = (part[:, None].expand_as(blocks) for part in (streams & _LOW, (streams >> 32) & _LOW))
    words = philox4x32((low, high, blocks, torch.zeros_like(blocks)), key)
    return torch.stack(words, dim=-1).flatten(1)[:, :n]


def _unit(words: Tensor) -> Tensor:
    """32-bit words -> the middle of one of 2**24 equal parts of (0, 1). The largest is 1 - 2**-25, below 1 in fp32
    only if it is not rounded up, so the top part stands for its lower edge."""
    return ((words >> 8).float() + 0.5).mul_(2.0**-24).clamp_(max=1 - 2.0**-24)


def _box_muller(words: Tensor) -> Tensor:
    """Pairs of words (N, 2m) -> pairs of normals (N, 2m)."""
    u, v = _unit(words[:, 0::2]), _unit(words[:, 1::2])
    radius = u.log_().mul_(-2.0).sqrt_()
    angle = v.mul_(2 * math.pi)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1).flatten(1)

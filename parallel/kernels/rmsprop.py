"""RMSProp's two passes over the slices of many tensors: squares, then momenta, weights and their average.

Between them the caller turns the sums of squares of the updates, which the first pass finds, into a factor for each
slice's updates. A kernel's pass reads and writes every number once; updates are made anew in the second instead of
being kept. In torch, updates take the place of the gradients.

Shapes: `n` slices, each flat and fp32, `P` programs of a kernel.
"""

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from parallel import kernels

TINY = 1e-30  # added to squares, so that a gradient of zero divides to zero
BLOCK = 2048  # elements of a kernel's program
ROOTS = 1 << 24  # elements of the largest temporary that torch makes


class Passes:
    """The passes over one list of slices; squares, momenta and masters are changed in place. decays: whether a slice's
    weights decay."""

    def __init__(
        self,
        squares: list[Tensor],
        momenta: list[Tensor],
        masters: list[Tensor],
        decays: list[bool],
        beta_square: float,
        beta_momentum: float,
    ):
        self._squares, self._momenta, self._masters, self._decays = squares, momenta, masters, decays
        self._beta_square, self._beta_momentum = beta_square, beta_momentum
        self._addresses: list[int] = []
        self._pointers: Tensor | None = None

    def first(self, gradients: list[Tensor], correction: float) -> Tensor:
        """v = EMA(g^2), u = g / sqrt(v / correction); returns the sum of u^2 of each slice (n,)."""
        if kernels.use_triton(self._masters[0]):
            return self._first_kernel(gradients, correction)
        torch._foreach_mul_(self._squares, self._beta_square)
        torch._foreach_addcmul_(self._squares, gradients, gradients, 1 - self._beta_square)
        for some, squares in _batches(gradients, self._squares):
            root = torch._foreach_div(squares, correction)
            torch._foreach_add_(root, TINY)
            torch._foreach_sqrt_(root)
            torch._foreach_div_(some, root)
        return squared_norms(gradients, self._masters[0].device)

    def second(
        self,
        gradients: list[Tensor],
        factor: Tensor,
        correction: float,
        *,
        lr: float,
        weight_decay: float,
        averages: list[Tensor] | None,
        average_share: float,
    ) -> None:
        """m = EMA(factor u); p -= lr (m + weight_decay p); averages move to p by their share. `gradients`: what the
        first pass has left there; factor (n,)."""
        if kernels.use_triton(self._masters[0]):
            self._second_kernel(gradients, factor, correction, lr, weight_decay, averages, average_share)
            return
        torch._foreach_mul_(gradients, list(factor.unbind()))
        torch._foreach_lerp_(self._momenta, gradients, 1 - self._beta_momentum)
        decayed = [master for master, decays in zip(self._masters, self._decays, strict=True) if decays]
        if weight_decay and decayed:
            torch._foreach_mul_(decayed, 1 - lr * weight_decay)
        torch._foreach_add_(self._masters, self._momenta, alpha=-lr)
        if averages is not None:
            torch._foreach_lerp_(averages, self._masters, average_share)

    # -------------------------------------------------------------------------------------------------- with kernels

    def _first_kernel(self, gradients: list[Tensor], correction: float) -> Tensor:
        from parallel.kernels import rmsprop_triton

        segment, first, sizes, decay = self._tables
        partial, sums = torch.empty(len(segment), device=sizes.device), torch.empty_like(decay)
        rmsprop_triton.squares[(len(segment),)](
            self._table_of_addresses(gradients, None), segment, first, sizes, partial, self._beta_square,
            1 - self._beta_square, correction, TINY, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
        rmsprop_triton.sums[(len(sizes),)](partial, first, sums, BLOCK=1024)
        return sums

    def _second_kernel(
        self,
        gradients: list[Tensor],
        factor: Tensor,
        correction: float,
        lr: float,
        weight_decay: float,
        averages: list[Tensor] | None,
        average_share: float,
    ) -> None:
        from parallel.kernels import rmsprop_triton

        segment, first, sizes, decay = self._tables
        rmsprop_triton.update[(len(segment),)](
            self._table_of_addresses(gradients, averages), segment, first, sizes, factor, decay,
            1 - self._beta_momentum, correction, TINY, lr, lr * weight_decay, average_share, BLOCK=BLOCK,
            AVERAGED=averages is not None, num_warps=8,
        )  # fmt: skip

    @cached_property
    def _tables(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The slice of each program (P,), the first program of each slice (n + 1,), its size, its decay (0 or 1)."""
        device = self._masters[0].device
        sizes = torch.tensor([len(master) for master in self._masters])
        programs = -(-sizes // BLOCK)
        segment = torch.arange(len(sizes), dtype=torch.int32).repeat_interleave(programs)
        first = torch.cat([programs.new_zeros(1), programs.cumsum(0)])
        decay = torch.tensor(self._decays, dtype=torch.float32)
        return tuple(_to(table, device) for table in (segment, first, sizes, decay))

    def _table_of_addresses(self, gradients: list[Tensor], averages: list[Tensor] | None) -> Tensor:
        """(n, 5), sent to the device only where something lies elsewhere than the last time."""
        lists = (gradients, self._squares, self._momenta, self._masters, averages or self._masters)
        addresses = [tensor.data_ptr() for row in zip(*lists, strict=True) for tensor in row]
        if addresses != self._addresses:
            self._addresses = addresses
            self._pointers = _to(torch.tensor(addresses).view(-1, len(lists)), self._masters[0].device)
        return self._pointers


def squared_norms(tensors: list[Tensor], device: torch.device) -> Tensor:
    """Sum of squares of each of n tensors -> (n,)."""
    return torch.stack(torch._foreach_norm(tensors)).square() if tensors else torch.zeros(0, device=device)


def _batches(*lists: list[Tensor]) -> Iterator[list[list[Tensor]]]:
    """Parts of lists of equally long flat tensors: in each, up to ROOTS elements of every list."""
    batch, size = [[] for _ in lists], 0
    for tensors in zip(*lists, strict=True):
        for parts in zip(*(tensor.split(ROOTS) for tensor in tensors), strict=True):
            if size + len(parts[0]) > ROOTS:
                yield batch
                batch, size = [[] for _ in lists], 0
            for some, part in zip(batch, parts, strict=True):
                some.append(part)
            size += len(parts[0])
    if size:
        yield batch


def _to(table: Tensor, device: torch.device) -> Tensor:
    """Without the host waiting for a GPU."""
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table.to(device)

"""RMSProp's two passes over the slices of many tensors: squares, then momenta, weights and their average.

Between them the caller turns the sums of squares of the updates, which the first pass finds, into a factor for each
slice's updates. A kernel's pass reads and writes every number once; updates are made anew in the second instead of
being kept, gradients scaled anew, and the model's weights written beside their masters. In torch, updates take the
place of the gradients.

What an update is made with are six numbers on the device, fp64: the correction of the squares, the learning rate, that
times the weight decay, the share of the weights that goes into the average, 1, or 0 where nothing shall change, and
what gradients are multiplied by. So a kernel needs no word of the host.

Shapes: `n` slices, each flat and fp32, `P` programs of a kernel.
"""

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from parallel import kernels
from parallel.device import to_device

TINY = 1e-30  # added to squares, so that a gradient of zero divides to zero
BLOCK = 2048  # elements of a kernel's program
ROOTS = 1 << 24  # elements of the largest temporary that torch makes


class Passes:
    """The passes over one list of slices; squares, momenta and masters are changed in place. decays: whether a slice's
    weights decay. weights: the model's, of any one type, which become the masters rounded; None: nobody's."""

    def __init__(
        self,
        squares: list[Tensor],
        momenta: list[Tensor],
        masters: list[Tensor],
        weights: list[Tensor] | None,
        decays: list[bool],
        beta_square: float,
        beta_momentum: float,
    ):
        self._squares, self._momenta, self._masters = squares, momenta, masters
        self._weights, self._decays = weights, decays
        self._beta_square, self._beta_momentum = beta_square, beta_momentum
        self._addresses: dict[bool, list[int]] = {}  # by whether averages are among them
        self._pointers: dict[bool, Tensor] = {}

    def first(self, gradients: list[Tensor], numbers: Tensor) -> Tensor:
        """v = EMA(g^2), u = g / sqrt(v / correction) of scaled gradients g; returns the sum of u^2 of each slice (n,).
        numbers (6,)."""
        if kernels.use_triton(self._masters[0]):
            return self._first_kernel(gradients, numbers)
        correction, *_, applied, scale = numbers.tolist()
        if not applied:
            return torch.zeros(len(gradients), device=self._masters[0].device)
        torch._foreach_mul_(gradients, scale)
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
        numbers: Tensor,
        averages: list[Tensor] | None,
    ) -> None:
        """m = EMA(factor u); p -= lr (m + weight_decay p); averages move to p by their share, and the model's weights
        become p. `gradients`: what the first pass has left there; factor (n,), numbers (6,)."""
        if kernels.use_triton(self._masters[0]):
            self._second_kernel(gradients, factor, numbers, averages)
            return
        _, lr, shrink, average_share, applied, _ = numbers.tolist()
        if not applied:
            return
        torch._foreach_mul_(gradients, list(factor.unbind()))
        torch._foreach_lerp_(self._momenta, gradients, 1 - self._beta_momentum)
        decayed = [master for master, decays in zip(self._masters, self._decays, strict=True) if decays]
        if shrink and decayed:
            torch._foreach_mul_(decayed, 1 - shrink)
        torch._foreach_add_(self._masters, self._momenta, alpha=-lr)
        if averages is not None:
            torch._foreach_lerp_(averages, self._masters, average_share)
        if self._weights is not None:
            torch._foreach_copy_(self._weights, self._masters)

    # -------------------------------------------------------------------------------------------------- with kernels

    def _first_kernel(self, gradients: list[Tensor], numbers: Tensor) -> Tensor:
        from parallel.kernels import rmsprop_triton

        segment, first, sizes, decay = self._tables
        partial, sums = torch.empty(len(segment), device=sizes.device), torch.empty_like(decay)
        rmsprop_triton.squares[(len(segment),)](
            self._table_of_addresses(gradients, None), segment, first, sizes, numbers, partial, self._beta_square,
            1 - self._beta_square, TINY, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
        rmsprop_triton.sums[(len(sizes),)](partial, first, sums, BLOCK=1024)
        return sums

    def _second_kernel(
        self,
        gradients: list[Tensor],
        factor: Tensor,
        numbers: Tensor,
        averages: list[Tensor] | None,
    ) -> None:
        from parallel.kernels import rmsprop_triton

        segment, first, sizes, decay = self._tables
        rmsprop_triton.update[(len(segment),)](
            self._table_of_addresses(gradients, averages), segment, first, sizes, numbers, factor, decay,
            (self._weights or self._masters)[0], 1 - self._beta_momentum, TINY, BLOCK=BLOCK,
            AVERAGED=averages is not None, PUBLISHED=self._weights is not None, num_warps=8,
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
        return tuple(to_device(table, device) for table in (segment, first, sizes, decay))

    def _table_of_addresses(self, gradients: list[Tensor], averages: list[Tensor] | None) -> Tensor:
        """(n, 6), sent to the device only where something lies elsewhere than last time: a graph of the kernels goes
        on reading the table that it was made with."""
        averaged = averages is not None
        masters = self._masters  # also where there are no averages or no weights of a model, and nothing is read
        lists = (gradients, self._squares, self._momenta, masters, averages or masters, self._weights or masters)
        addresses = [tensor.data_ptr() for row in zip(*lists, strict=True) for tensor in row]
        if addresses != self._addresses.get(averaged):
            self._addresses[averaged] = addresses
            self._pointers[averaged] = to_device(torch.tensor(addresses).view(-1, len(lists)), self._masters[0].device)
        return self._pointers[averaged]


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

"""An all-to-all between GPUs of one host by their copy engines, which take no multiprocessor from the products.

NCCL sends by kernels. Products that run meanwhile have fewer multiprocessors, and the libraries' products, which put
one long-lived block on each, end later by as much as was taken. Here every rank copies its rows into a box in the
memory of the rank that they are for, and sets a word beside them for which a stream of that rank waits, which copies
them to where they are wanted: no kernel waits, and no host. Memory that ranks share is torch's symmetric memory.

Each use of a box between two ranks goes by two words. `filled`, where the rows arrive: they are there. `empty`, where
they come from: the box may be written. Whoever has waited for a word clears it, so that a CUDA graph finds at every
replay what it found when it was captured. All ranks use the boxes in the same order, so whatever a stream waits for
comes from work that was given to another one before.

Shapes: `n` ranks of the group, `b` boxes; parts as in `parallel.transport`.
"""

import os
import socket

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.transport import Copy

WORD = torch.int32
ALIGNED = 256  # bytes; a part of a box begins at a multiple
SMALL = 1 << 18  # bytes; what lies in shorter runs than that a kernel copies at once


class CopyEngines:
    """The boxes of one rank, and the mapped ones of the others of its group."""

    def __init__(self, group: dist.ProcessGroup, boxes: int, device: torch.device):
        """Raises RuntimeError or ImportError where the ranks' memory cannot be shared."""
        from cuda.bindings import driver  # comes with torch, where that has CUDA

        # nothing here needs a multicast address, which rendezvous would make for every buffer
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        self._driver, self._group, self._device = driver, group, device
        # ahead of the products where a copy is a kernel after all
        self.sending, self.arriving = (torch.cuda.Stream(device, priority=-1) for _ in range(2))
        self._kept: list[tuple] = []  # all that was ever shared: graphs know its addresses
        self._set_up(group.rank(), group.size(), boxes)
        torch.cuda.synchronize(device)  # before `engines_of` has all ranks wait for each other

    def _set_up(self, me: int, ranks: int, boxes: int) -> None:
        self.me, self.ranks, self._boxes = me, ranks, boxes
        self.others = [rank for rank in range(ranks) if rank != me]
        words = self.share(2 * boxes * ranks * WORD.itemsize)
        # each rank's: (filled or empty, b, n), by who sets it
        self._words = [part.view(WORD).view(2, boxes, ranks) for part in words]
        self._words[me][0].zero_()
        self._words[me][1].fill_(1)
        self._room = Room([], 0)

    def box(self, number: int) -> "Box":
        """Of which nobody else may be under way."""
        return Box(self, number)

    def room(self, size: int) -> "Room":
        """With so many bytes in a box for each sender. Where there are fewer yet, all ranks come here at once."""
        if size > self._room.size:
            self._room = Room(self.share(self._boxes * len(self.others) * size), size)
        return self._room

    def filled(self, rank: int, box: int, by: int) -> Tensor:
        """The word with which rank `by` says that it has filled its part of that rank's box."""
        return self._words[rank][0, box, by]

    def empty(self, rank: int, box: int, by: int) -> Tensor:
        """The word with which rank `by` says that that rank's part of its box is empty."""
        return self._words[rank][1, box, by]

    # ------------------------------------------------------------------------------------------------ of the device

    def share(self, size: int) -> list[Tensor]:
        """Bytes of every rank, mapped here."""
        import torch.distributed._symmetric_memory as symmetric_memory

        own = symmetric_memory.empty(size, dtype=torch.uint8, device=self._device)
        handle = symmetric_memory.rendezvous(own, self._group)
        self._kept.append((own, handle))
        return [handle.get_buffer(rank, (size,), torch.uint8) for rank in range(self.ranks)]

    def fork(self, stream: torch.cuda.Stream) -> None:
        """The stream goes on from where the caller's is."""
        stream.wait_stream(torch.cuda.current_stream())

    def mark(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        """Where the stream is."""
        return stream.record_event()

    def join(self, mark: torch.cuda.Event) -> None:
        """The caller's stream goes on from there."""
        torch.cuda.current_stream().wait_event(mark)

    def copy(self, stream: torch.cuda.Stream, to: Tensor, rows: Tensor) -> None:
        """On that stream; in runs, for a copy of anything else is a kernel's."""
        with torch.cuda.stream(stream):
            _copy(to, rows)

    def await_word(self, stream: torch.cuda.Stream, word: Tensor) -> None:
        """The stream goes on when the word is set, and clears it."""
        driver, handle, address = self._driver, *self._handles(stream, word)
        equal = driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_EQ
        _checked(driver.cuStreamWaitValue32(handle, address, 1, equal))
        _checked(driver.cuStreamWriteValue32(handle, address, 0, 0))

    def set_word(self, stream: torch.cuda.Stream, word: Tensor) -> None:
        """After all that the stream does before."""
        _checked(self._driver.cuStreamWriteValue32(*self._handles(stream, word), 1, 0))

    def _handles(self, stream: torch.cuda.Stream, word: Tensor) -> tuple:
        return self._driver.CUstream(stream.cuda_stream), self._driver.CUdeviceptr(word.data_ptr())


class Room:
    """Memory of every rank's boxes, in each of which a sender has its own part, whatever the sizes of what is sent."""

    def __init__(self, mapped: list[Tensor], size: int):
        """size: of a sender's part of a box, in bytes."""
        self._mapped, self.size = mapped, size

    def place(self, rank: int, box: int, by: int, at: int, like: Tensor) -> Tensor:
        """In the part of rank `by` of that rank's box, from byte `at` on, of the shape and type of another."""
        senders = len(self._mapped) - 1
        first = (box * senders + by - (by > rank)) * self.size + at
        return self._mapped[rank][first : first + like.nbytes].view(like.dtype).view(like.shape)


class Box:
    """See `parallel.transport.Transport`."""

    def __init__(self, engines: CopyEngines, number: int):
        self._engines, self._number = engines, number

    def start(self, parts: list[Tensor], into: list[Tensor], here: list[Copy]) -> None:
        self._marks = self._send(parts), self._receive(into, here)
        self._held = parts, into, here  # while they are copied

    def land(self) -> None:
        for mark in self._marks:
            self._engines.join(mark)
        self._marks = self._held = ()

    def _send(self, parts: list[Tensor]) -> torch.cuda.Event:
        engines, stream = self._engines, self._engines.sending
        places, room = self._places(parts)
        engines.fork(stream)
        for index, peer in enumerate(engines.others):
            engines.await_word(stream, engines.empty(engines.me, self._number, peer))
            for part, at in places:
                there = room.place(peer, self._number, engines.me, at, part[index])
                engines.copy(stream, there, part[index])
            engines.set_word(stream, engines.filled(peer, self._number, engines.me))
        return engines.mark(stream)

    def _receive(self, into: list[Tensor], here: list[Copy]) -> torch.cuda.Event:
        engines, stream = self._engines, self._engines.arriving
        places, room = self._places(into)
        engines.fork(stream)
        for to, rows in here:
            engines.copy(stream, to, rows)
        for index, peer in enumerate(engines.others):
            engines.await_word(stream, engines.filled(engines.me, self._number, peer))
            for x, at in places:
                engines.copy(stream, x[index], room.place(engines.me, self._number, peer, at, x[index]))
            engines.set_word(stream, engines.empty(peer, self._number, engines.me))
        return engines.mark(stream)

    def _places(self, parts: list[Tensor]) -> tuple[list[tuple[Tensor, int]], Room]:
        """Each with the byte of a sender's part at which its block begins."""
        places, at = [], 0
        for part in parts:
            places.append((part, at))
            at += -(-part[0].nbytes // ALIGNED) * ALIGNED
        return places, self._engines.room(at)


def _copy(to: Tensor, rows: Tensor) -> None:
    whole = to.is_contiguous() and rows.is_contiguous()
    if whole or rows[0].nbytes < SMALL:
        to.copy_(rows)
        return
    for pair in zip(to, rows, strict=True):
        _copy(*pair)


def _checked(answer: tuple) -> None:
    if int(answer[0]):
        raise RuntimeError(f"the driver refused to have a stream wait or write: {answer[0].name}")


def engines_of(group: dist.ProcessGroup, boxes: int, device: torch.device) -> tuple[CopyEngines | None, str | None]:
    """Copy engines of a group that has GPUs of one host alone, or None; and why not, if it is one host's. All ranks of
    the group at once."""
    if group.size() == 1 or device.type != "cuda":
        return None, None
    hosts: list = [None] * group.size()
    dist.all_gather_object(hosts, socket.gethostname(), group=group)
    if len(set(hosts)) > 1:
        return None, None
    try:
        found, why = CopyEngines(group, boxes, device), None
    except (RuntimeError, ImportError) as error:
        found, why = None, str(error).splitlines()[0]
    whys: list = [None] * group.size()
    dist.all_gather_object(whys, why, group=group)
    why = next((one for one in whys if one is not None), None)
    return (found if why is None else None), why

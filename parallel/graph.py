"""A function of tensors as a CUDA graph: the host launches one thing where it would launch every kernel by itself."""

from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from weakref import WeakSet

import torch
from torch import Tensor

WARM_UP = 2  # calls before the capture: kernels are compiled, and memory and handles made, that a capture cannot make

Lot = tuple[Tensor, ...]


_made: WeakSet["Graphed"] = WeakSet()
_watchers: list[None] = []  # open `without_graphs`


class GraphError(Exception):
    """The function does what a graph cannot hold."""


class Graphed:
    """`function(numbers, lots)` -> a tensor, whose every call does the same work on tensors of the same shapes.

    The first WARM_UP calls run as they are, and then again whenever `key`, which stands for the shapes, is another one.
    A graph reads its inputs where the capture has put them, so every call copies its own there. What a call returns is
    written over by the next. All of it has to run on one stream, which is not the default one (`own_stream`).
    """

    def __init__(self, function: Callable[[Tensor, Iterable[Lot]], Tensor]):
        self._function = function
        self._key: Hashable = None
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        _made.add(self)

    def __call__(self, key: Hashable, numbers: Tensor, lots: Iterable[Lot]) -> Tensor:
        """Raises GraphError where the function cannot be captured."""
        if _watchers:
            return self._function(numbers, lots)
        if key != self._key:
            self._key, self._calls, self._graph = key, 0, None
        if self._calls < WARM_UP:
            self._calls += 1
            return self._function(numbers, lots)
        if self._graph is None:
            self._numbers, self._lots = numbers.clone(), [tuple(x.clone() for x in lot) for lot in lots]
            self._capture()
        else:
            self._numbers.copy_(numbers)
            for kept, lot in zip(self._lots, lots, strict=True):
                for place, x in zip(kept, lot, strict=True):
                    place.copy_(x)
        self._graph.replay()
        return self._found

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            # other threads may go on meanwhile: loaders that pin memory, NCCL's watchdog
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
                self._found = self._function(self._numbers, self._lots)
        except torch.cuda.OutOfMemoryError:  # of this rank alone, perhaps, and no matter of graphs
            raise
        except RuntimeError as error:
            raise GraphError(str(error).splitlines()[0]) from error
        self._graph = graph

    def release(self) -> None:
        """Gives the graph up; the next call makes another."""
        self._key = None
        if self._graph is not None:
            torch.cuda.synchronize()
            self._graph.reset()
            self._graph = None


def release_all() -> None:
    """Gives all graphs up, as must be before process groups are left: NCCL waits for those that hold its collectives,
    for ever."""
    for graphed in list(_made):
        graphed.release()


@contextmanager
def without_graphs() -> Iterator[None]:
    """Within it every call runs as it is: hooks on modules hear nothing of a replay, and may ask for what a capture
    cannot give. Graphs that there are already are replayed again afterwards."""
    _watchers.append(None)
    try:
        yield
    finally:
        _watchers.pop()


def own_stream(device: torch.device) -> AbstractContextManager:
    """Within it, work on a GPU goes to a stream of its own, on which it can be captured; what autograd keeps for later
    belongs to the stream that it was made on."""
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()

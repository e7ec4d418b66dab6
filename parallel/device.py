"""Between a host and its GPU without either waiting for the other."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A host's tensor there. From memory that is not pinned, CUDA would copy at once and wait for it.

    Raises RuntimeError while a graph is captured, which would copy from the host's memory again at every replay,
    whatever is there by then.
    """
    if device.type != "cuda":
        return tensor.to(device)
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a copy from the host's memory cannot be part of a CUDA graph")
    return tensor.pin_memory().to(device, non_blocking=True)


class Readable:
    """A device's tensor on its way to the host, who waits when it asks for it."""

    def __init__(self, tensor: Tensor):
        self._arrived: torch.cuda.Event | None = None
        self._copy = tensor
        if tensor.is_cuda:
            self._copy = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def tolist(self) -> list[float]:
        """Its numbers, when they have arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._copy.tolist()

"""A frozen module's weights, spread over all ranks: each holds its part, and gathers a layer's while it runs."""

from collections.abc import Iterator

from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from parallel.topology import Topology


def shard_frozen(module: nn.Module, place: Topology) -> None:
    """Does nothing in a job of one rank. All ranks must call the module equally often from then on."""
    if place.ranks == 1:
        return
    mesh = init_device_mesh(place.device.type, (place.ranks,))
    for layer in _layers(module):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(module, mesh=mesh, reshard_after_forward=True)


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """The members of the outermost lists of modules."""
    for child in module.children():
        yield from child if isinstance(child, nn.ModuleList) else _layers(child)


def bytes_here(module: nn.Module) -> int:
    """Bytes of the weights that this rank holds."""
    weights = (getattr(weight, "_local_tensor", weight) for weight in module.parameters())
    return sum(weight.numel() * weight.element_size() for weight in weights)

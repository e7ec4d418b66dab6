"""A frozen module's weights, spread over all ranks: each holds its part, and gathers a layer's while it runs."""

from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from parallel.topology import Topology


def shard_frozen(module: nn.Module, place: Topology) -> None:
    """Does nothing in a job of one rank. All ranks must call the module equally often from then on."""
    if place.ranks == 1:
        return
    mesh = init_device_mesh(place.device.type, (place.ranks,))
    layers = [child for child in module.modules() if isinstance(child, nn.ModuleList)]
    for layer in (layer for many in layers for layer in many):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(module, mesh=mesh, reshard_after_forward=True)


def bytes_here(module: nn.Module) -> int:
    """Bytes of the weights that this rank holds."""
    weights = (getattr(weight, "_local_tensor", weight) for weight in module.parameters())
    return sum(weight.numel() * weight.element_size() for weight in weights)

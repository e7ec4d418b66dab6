"""torchmetrics, also where torchvision is broken (a CUDA build beside the CPU build of torch, say).

torchmetrics imports torchvision for metrics that are not used here; in its place there it gets modules of nothing.
"""

import importlib.machinery
import sys
from types import ModuleType
from typing import Any

NAMES = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional", "torchvision.models")


class _Nothing(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def import_torchmetrics() -> ModuleType:
    """The package."""
    import transformers  # noqa: F401  looks for torchvision while it is still the true one, or hidden

    hidden = {name: sys.modules.get(name) for name in NAMES}
    if hidden["torchvision"] is None:
        for name in NAMES:
            sys.modules[name] = _Nothing(name)
            sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
    try:
        import torchmetrics.functional.multimodal
        import torchmetrics.image.fid
    finally:
        for name, module in hidden.items():
            if module is None:
                sys.modules.pop(name, None)
        if "torchvision" not in sys.modules:
            sys.modules["torchvision"] = None
    return torchmetrics

"""Hides a torchvision that cannot be loaded.

transformers and diffusers look for torchvision and import it where they find it; one that was built for another torch
(a CUDA build beside the CPU build of torch, say) raises then. Nothing here uses it, so it may as well be absent.
"""

import sys


def hide_broken_torchvision() -> None:
    """Makes torchvision count as not installed where importing it fails."""
    try:
        import torchvision.transforms  # noqa: F401
    except (ImportError, OSError, RuntimeError):
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.modules["torchvision"] = None  # what importlib.util.find_spec takes for absent

"""Which of the optional packages are here, told without running them, and without torch."""

from importlib.util import find_spec
from pathlib import Path

OF_NVIDIAS_APEX = ("multi_tensor_apply", "optimizers", "normalization")


def apex_kind() -> str | None:
    """ "nvidia", "other" for the unrelated package of that name in the package index, or None."""
    found = find_spec("apex")
    if found is None:
        return None
    places = [Path(place) for place in found.submodule_search_locations or []]
    nvidias = any(all((place / name).is_dir() for name in OF_NVIDIAS_APEX) for place in places)
    return "nvidia" if nvidias else "other"


def has_deepspeed() -> bool:
    """Whether there is one."""
    return find_spec("deepspeed") is not None

"""EC-DiT: diffusion transformers whose feed-forward layers are mixtures of experts with expert-choice routing."""

from importlib import import_module

# The public Python interface. Loaded on first use: reading a recipe must not cost an import of torch.
_PUBLIC = {
    "EcDit": "ecdit.model.dit",
    "Recipe": "ecdit.recipe",
    "UserError": "ecdit.errors",
    "load_recipe": "ecdit.recipe_io",
    "sample": "ecdit.sampling",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'ecdit' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)

"""Rules of recipes that span sections. Each raises ValueError("@key: ..."), which the reader prints with its place."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ecdit.recipe import Recipe


def divides(small: int, large: int, small_key: str, large_key: str) -> None:
    """Refuses a number that does not divide another, with the nearest that do."""
    if large % small:
        valid = [n for n in range(1, large + 1) if large % n == 0]
        near = sorted(sorted(valid, key=lambda n: abs(n - small))[:6])
        raise ValueError(
            f"@{small_key}: {small} does not divide {large_key}: {large}; try one of {', '.join(map(str, near))}"
        )


def layout_divides(recipe: "Recipe") -> None:
    """Every axis of `parallel` divides what it splits."""
    model, parallel = recipe.model, recipe.parallel
    divides(parallel.tensor, model.heads, "parallel.tensor", "model.heads")
    divides(parallel.tensor, model.kv_heads, "parallel.tensor", "model.kv_heads")
    if model.decoder.layers:
        divides(parallel.tensor, model.decoder.heads, "parallel.tensor", "model.decoder.heads")
    divides(parallel.tensor, recipe.train.micro_batch, "parallel.tensor", "train.micro_batch")
    divides(parallel.pipeline, model.layers, "parallel.pipeline", "model.layers")
    if model.routing == "dense":
        for key in ("expert", "expert_tensor"):
            if getattr(parallel, key) > 1:
                raise ValueError(
                    f"@parallel.{key}: {getattr(parallel, key)}, but model.routing: dense has no experts; set it to 1"
                )
        return
    divides(parallel.expert, model.experts, "parallel.expert", "model.experts")
    divides(parallel.expert_tensor, 4 * model.width, "parallel.expert_tensor", "an expert's hidden width 4 model.width")
    if parallel.dispatch_chunks > 1:
        here = model.experts // parallel.expert
        divides(parallel.dispatch_chunks, here, "parallel.dispatch_chunks", "the experts of a rank")

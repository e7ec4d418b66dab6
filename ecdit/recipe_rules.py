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
    if parallel.dispatch_fp8 and not model.grouped:
        raise ValueError(
            f"@parallel.dispatch_fp8: true does not go with model.routing: {model.routing}, which has no dispatch of "
            "ours; set it to false"
        )
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


def graph_fits(recipe: "Recipe") -> None:
    """A step that is to be a CUDA graph does the same work every time, and never asks the host."""
    if not recipe.train.graph:
        return
    for key, value, bad, why, instead in (
        ("model.routing", recipe.model.routing, "megatron_topk", "whose shapes change", "expert_choice"),
        ("optimizer.name", recipe.optimizer.name, "torch_rmsprop", "which waits for the host", "rmsprop_momentum"),
        ("optimizer.name", recipe.optimizer.name, "adamw", "which waits for the host", "rmsprop_momentum"),
    ):
        if value == bad:
            raise ValueError(
                f"@train.graph: true does not go with {key}: {value}, {why}: set it to false, or try {instead}"
            )
    if recipe.parallel.pipeline > 1:
        raise ValueError(
            f"@train.graph: true does not go with parallel.pipeline: {recipe.parallel.pipeline}, whose stages wait for "
            "each other; set one of the two to false or 1"
        )


def compile_fits(recipe: "Recipe") -> None:
    """Libraries' layers are not for torch.compile to read."""
    if not recipe.train.compile:
        return
    for key, value, good in (
        ("model.routing", recipe.model.routing, ("expert_choice", "token_choice", "dense")),
        ("train.linears", recipe.train.linears, ("torch",)),
        ("precision.fp8", recipe.precision.fp8, ("none",)),
    ):
        if value not in good:
            raise ValueError(
                f"@train.compile: true does not go with {key}: {value}; set it to false, or {key} to "
                f"{' or '.join(good)}"
            )


FP8_MULTIPLE = 16  # of every dimension of a product


def fp8_fits(recipe: "Recipe") -> None:
    """Products in FP8 have dimensions that the hardware can take."""
    model, train, parallel, precision = recipe.model, recipe.train, recipe.parallel, recipe.precision
    if precision.fp8 == "none":
        return
    if train.precision != "bf16":
        raise ValueError(f"@precision.fp8: {precision.fp8} goes with train.precision: bf16, not {train.precision}")
    if precision.fp8 == "delayed":
        for key, value, good in (
            ("train.recompute", train.recompute, "none"),
            ("parallel.pipeline", parallel.pipeline, 1),
        ):
            if value != good:
                raise ValueError(
                    f"@precision.fp8: delayed does not go with {key}: {value}; try current or block, or {key}: {good}"
                )
    parts = {"experts": parallel.expert_tensor, "linears": parallel.tensor}
    for where in precision.where:
        if model.width // parts[where] % FP8_MULTIPLE:
            raise ValueError(
                f"@precision.where: {where} have a width of {model.width // parts[where]} on a rank; FP8 needs a "
                f"multiple of {FP8_MULTIPLE}"
            )
    if "experts" in precision.where and model.grouped:
        _rows_fit(recipe)


def _rows_fit(recipe: "Recipe") -> None:
    images = recipe.train.micro_batch
    for _, ratio in recipe.masking.schedule:
        kept = int(recipe.model.tokens * (1 - ratio))
        rows = rows_of_expert(recipe, images * kept)
        if rows % FP8_MULTIPLE:
            raise ValueError(
                f"@train.micro_batch: {images} images of {kept} tokens give an expert {rows:g} rows; "
                f"precision.fp8 needs a multiple of {FP8_MULTIPLE}"
            )


def rows_of_expert(recipe: "Recipe", tokens: int) -> float:
    """Of all ranks that bring it some, where the tensor ranks have so many tokens."""
    model, parallel = recipe.model, recipe.parallel
    return tokens * model.capacity_factor / model.experts * parallel.expert / parallel.tensor


def evaluations_have_checkpoints(recipe: "Recipe") -> None:
    """What is evaluated is a checkpoint."""
    every, saved = recipe.evaluation.every, recipe.checkpoint.every
    if every % saved:
        near = max(saved, round(every / saved) * saved)
        raise ValueError(
            f"@evaluation.every: {every} is no multiple of checkpoint.every: {saved}, and only checkpoints are "
            f"evaluated; try {near}"
        )


def held_out_fits(recipe: "Recipe") -> None:
    """The held-out pictures, all of their tokens, make whole micro-batches of whole groups."""
    held, model, micro = recipe.log.held_out, recipe.model, recipe.train.micro_batch
    if held.path is None:
        return
    if held.pictures % micro:
        raise ValueError(
            f"@log.held_out.pictures: {held.pictures} is no multiple of train.micro_batch: {micro}; "
            f"try {max(1, round(held.pictures / micro)) * micro}"
        )
    if model.grouped and micro * model.tokens % model.group_tokens:
        raise ValueError(
            f"@log.held_out.path: {held.path}, whose pictures enter with all {model.tokens} tokens, but "
            f"train.micro_batch: {micro} of them do not fill groups of model.group_tokens: {model.group_tokens}"
        )

"""The engine of a recipe: `engine_options`, and what an engine cannot do."""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ecdit.recipe_section import Section
from ecdit.recipe_tunable import tunable_fits

if TYPE_CHECKING:
    from ecdit.recipe import Recipe

Place = Literal["none", "cpu", "nvme"]


class EngineOptions(Section):
    """Of `engine: deepspeed` alone."""

    zero: Literal[0, 1, 2, 3] = Field(
        2, description="ZeRO's stage: 1 spreads optimizer states over data ranks, 2 gradients too, 3 weights too."
    )
    offload_optimizer: Place = Field(
        "none", description="Where master weights and optimizer states are: on the GPU, in host memory, on a disk."
    )
    offload_weights: Place = Field(
        "none", description="Where the weights are while no layer computes with them; zero 3."
    )
    nvme: str | None = Field(None, description="Folder on a fast disk for what is offloaded to nvme, in NAME/ there.")
    pinned: bool = Field(True, description="Pin the host memory of what is offloaded: faster, and never swapped out.")
    config: dict[str, Any] = Field({}, description="Further keys of DeepSpeed's JSON that change its speed or memory.")


def engine_fits(recipe: "Recipe") -> None:
    """The engine can do what the recipe asks. Raises ValueError("@key: ...")."""
    options = recipe.engine_options
    if recipe.engine == "megatron":
        given = [key for key, value in options if value != getattr(EngineOptions(), key)]
        if given:
            raise ValueError(f"@engine_options.{given[0]}: means nothing to engine: megatron; leave it out")
        return
    for key, value, good, why in (
        ("parallel.pipeline", recipe.parallel.pipeline, 1, "has no pipeline for this model's stages"),
        ("train.graph", recipe.train.graph, False, "asks the host in every step"),
        ("train.linears", recipe.train.linears, "torch", "works with torch's alone"),
        ("precision.fp8", recipe.precision.fp8, "none", "does not keep scales of FP8"),
    ):
        if value != good:
            better = f"set it to {_yaml(good)}, or take engine: megatron"
            raise ValueError(f"@{key}: {_yaml(value)}, but engine: deepspeed {why}; {better}")
    if recipe.model.routing == "megatron_topk":
        raise ValueError("@model.routing: megatron_topk is megatron-core's layer; take engine: megatron")
    _stage_fits(recipe)
    _offload_fits(options)
    if options.offload_weights == "nvme" and recipe.train.precision == "fp32":
        raise ValueError(
            "@engine_options.offload_weights: nvme keeps weights in bf16, whatever they are; try cpu, or "
            "train.precision: bf16"
        )
    on_disk = {key for key in ("offload_optimizer", "offload_weights") if getattr(options, key) == "nvme"}
    if options.nvme is not None and not on_disk:
        raise ValueError(f"@engine_options.nvme: {options.nvme} means nothing where nothing is offloaded to nvme")
    tunable_fits(options.config, on_disk)


def _stage_fits(recipe: "Recipe") -> None:
    stage, sizes = recipe.engine_options.zero, recipe.parallel
    if stage == 0 and recipe.train.precision == "bf16":
        raise ValueError(
            "@engine_options.zero: 0 adds gradients up in bf16 under train.precision: bf16; try 1, which keeps fp32"
        )
    if stage < 3:
        return
    for key in ("expert", "expert_tensor", "tensor"):
        size = getattr(sizes, key)
        if size > 1 and recipe.model.routing != "dense":
            raise ValueError(
                f"@parallel.{key}: {size}, but engine_options.zero: 3 spreads every weight over all data ranks, and "
                "experts would be on fewer; set it to 1, or take engine_options.zero: 2"
            )
    if recipe.train.compile:
        raise ValueError("@train.compile: true does not go with engine_options.zero: 3, which swaps weights in and out")


def _offload_fits(options: EngineOptions) -> None:
    stage = options.zero
    for key, value, least in (
        ("offload_optimizer", options.offload_optimizer, {"cpu": 1, "nvme": 3}),
        ("offload_weights", options.offload_weights, {"cpu": 3, "nvme": 3}),
    ):
        if value != "none" and stage < least[value]:
            raise ValueError(
                f"@engine_options.{key}: {value} needs engine_options.zero: {least[value]}"
                f"{' or more' if least[value] < 3 else ''}, not {stage}"
            )
        if value == "nvme" and options.nvme is None:
            raise ValueError(f"@engine_options.nvme: this folder is needed for {key}: nvme")


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)

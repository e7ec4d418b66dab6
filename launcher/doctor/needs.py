"""What a recipe needs of that which training in general can do without."""

from dataclasses import replace

from ecdit.errors import UserError
from ecdit.recipe import Recipe
from launcher.doctor.cluster import PYXIS, SLURM
from launcher.doctor.finding import BROKEN, MISSING, OK, Finding
from launcher.doctor.gpus import GPUS
from launcher.doctor.packages import DEEPSPEEDS_DISK, TRANSFORMER_ENGINE

ENGINE = (GPUS, TRANSFORMER_ENGINE.name)
CHOICES = ("transformers", "diffusers", "deepspeed", DEEPSPEEDS_DISK, "wandb", PYXIS, *ENGINE)  # what a recipe can need


def needs(recipe: Recipe) -> list[tuple[str, str, tuple[str, ...], str]]:
    """Key, its value, the findings that it needs, and what it can be instead."""
    rows = (
        ("train.linears", recipe.train.linears, "transformer_engine", ENGINE, "torch"),
        ("model.routing", recipe.model.routing, "megatron_topk", ENGINE, "expert_choice or token_choice"),
    )
    options = recipe.engine_options
    rows += (
        ("engine", recipe.engine, "deepspeed", ("deepspeed",), "megatron"),
        ("engine_options.offload_optimizer", options.offload_optimizer, "nvme", (DEEPSPEEDS_DISK,), "cpu"),
        ("engine_options.offload_weights", options.offload_weights, "nvme", (DEEPSPEEDS_DISK,), "cpu"),
    )
    found = [(key, value, names, instead) for key, value, wanted, names, instead in rows if value == wanted]
    for key, value, without, name in (
        ("data.text_encoder", recipe.data.text_encoder, "hash", "transformers"),
        ("data.autoencoder", recipe.data.autoencoder, "pixels", "diffusers"),
        ("log.wandb", recipe.log.wandb, None, "wandb"),
        ("cluster.container", recipe.cluster.container, None, PYXIS),
    ):
        if value != without:
            found.append((key, value, (name,), without or "null"))
    return found


def for_recipe(findings: list[Finding], recipe: Recipe) -> list[Finding]:
    """The findings, with what this recipe needs of what is missing, and what it does without."""
    needed_by: dict[str, list[str]] = {}
    for key, value, names, _ in needs(recipe):
        for name in names:
            needed_by.setdefault(name, []).append(f"{key}: {value}")
    rows = []
    for one in findings:
        if one.state != OK and one.name in needed_by:
            one = replace(one, costs=f"{recipe.run} needs it ({', '.join(needed_by[one.name])}); {one.costs}")
        elif one.state != OK and one.name in CHOICES:
            one = replace(one, costs=f"{recipe.run} does without; {one.costs}")
        rows.append(one)
    return rows


def require(findings: list[Finding], recipe: Recipe) -> None:
    """Raises UserError naming the first key whose needs are not met here."""
    by_name = {one.name: one for one in findings}
    for key, value, names, instead in needs(recipe):
        lacks = [by_name[name] for name in names if name in by_name and by_name[name].state in (MISSING, BROKEN)]
        if names == (PYXIS,) and by_name[SLURM].state != OK:
            continue  # not where jobs are submitted from: inside of the container, say
        if lacks:
            told = " and ".join(f"{one.name} ({one.found}: {one.costs})" for one in lacks)
            raise UserError(f"{key}: {value} needs {told}; or try {instead}")

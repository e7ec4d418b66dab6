"""From a recipe to what trains it: the topology of this job, this rank's part of the model, its engine."""

import importlib.util

import torch

from ecdit.errors import UserError
from ecdit.model.dit import EcDit
from ecdit.recipe import Recipe
from parallel import topology
from parallel.engine import Engine, UpdateSettings
from parallel.engine.megatron import MegatronEngine
from parallel.spread.ranks import RankSpread
from parallel.topology import Layout, LayoutError, Topology

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def start_topology(recipe: Recipe) -> Topology:
    """The recipe's layout over the ranks of this job. Raises UserError where the ranks or the batch do not divide."""
    sizes = recipe.parallel
    layout = Layout(sizes.tensor, sizes.expert, sizes.expert_tensor, sizes.pipeline, sizes.sequence)
    try:
        place = topology.start(layout, sizes.timeout_minutes)
    except LayoutError as error:
        raise UserError(str(error)) from None
    return place


def check_job(recipe: Recipe, place: Topology) -> None:
    """What only the job can tell of a recipe. Raises UserError naming the key and what would be valid."""
    train, ranks = recipe.train, place.data_ranks
    if train.batch % (ranks * train.micro_batch):
        raise UserError(
            f"train.batch: {train.batch} does not divide into {ranks} data ranks with whole micro-batches of "
            f"train.micro_batch: {train.micro_batch}; try a multiple of {ranks * train.micro_batch}"
        )
    for key, value, wanted, instead in (
        ("model.routing", recipe.model.routing, "megatron_topk", "expert_choice or token_choice"),
        ("train.linears", train.linears, "transformer_engine", "torch"),
    ):
        if value != wanted:
            continue
        if place.device.type != "cuda":
            raise UserError(f"{key}: {value} needs a GPU, and there is none here; try {instead}")
        if importlib.util.find_spec("transformer_engine") is None:
            raise UserError(f"{key}: {value} needs Transformer Engine; install the extra `ecdit[te]`, or try {instead}")


def assemble_model(recipe: Recipe, place: Topology) -> EcDit:
    """This rank's part of the model, as it shall compute."""
    spread = RankSpread(place, linears=recipe.train.linears, dispatch_chunks=recipe.parallel.dispatch_chunks)
    with place.device:
        model = EcDit(recipe.model, recipe.train.seed, spread, recipe.train.recompute)
    if recipe.model.routing == "megatron_topk":
        from parallel.megatron_moe import set_share  # needs the extra `te`

        set_share(recipe.train.micro_batch * place.data_ranks / recipe.train.batch, place.device)
    return model.to(DTYPES[recipe.train.precision])


def assemble_engine(recipe: Recipe, place: Topology) -> Engine:
    """The engine with its model."""
    optimizer = recipe.optimizer
    settings = UpdateSettings(optimizer.name, optimizer.weight_decay, optimizer.clip, optimizer.ema)
    return MegatronEngine(assemble_model(recipe, place), place, settings)

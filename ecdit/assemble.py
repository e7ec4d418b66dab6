"""From a recipe to what trains it: the topology of this job, this rank's part of the model, its engine."""

import importlib.util
import sys
from pathlib import Path

from ecdit.dtypes import DTYPES
from ecdit.errors import UserError
from ecdit.model.dit import EcDit
from ecdit.recipe import Recipe
from parallel import topology
from parallel.apex import told_of_norm
from parallel.engine import Engine, UpdateSettings
from parallel.engine.deepspeed_config import ConfigError, ZeroOptions
from parallel.engine.deepspeed_import import has_async_io
from parallel.engine.megatron import MegatronEngine
from parallel.installed import has_deepspeed
from parallel.precision import KINDS, Fp8
from parallel.spread.ranks import RankSpread
from parallel.topology import Layout, LayoutError, Topology


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
    if train.graph and place.device.type != "cuda":
        raise UserError("train.graph: true needs a GPU, and there is none here; set it to false")
    check_libraries(recipe, place)


def check_libraries(recipe: Recipe, place: Topology) -> None:
    """Raises UserError where the recipe asks for a library or a device that is not here."""
    train, fp8 = recipe.train, recipe.precision.fp8
    for key, value, wanted, instead in (
        ("model.routing", recipe.model.routing, ["megatron_topk"], "expert_choice or token_choice"),
        ("train.linears", train.linears, ["transformer_engine"], "torch"),
        ("precision.fp8", fp8, KINDS, "none"),
    ):
        if value not in wanted:
            continue
        if place.device.type != "cuda":
            raise UserError(f"{key}: {value} needs a GPU, and there is none here; try {instead}")
        if importlib.util.find_spec("transformer_engine") is None:
            raise UserError(f"{key}: {value} needs Transformer Engine; install the extra `ecdit[te]`, or try {instead}")
    if recipe.engine == "deepspeed":
        check_deepspeed(recipe)
    why = Fp8(fp8).missing() if fp8 != "none" else None
    if why is not None:
        raise UserError(f"precision.fp8: {fp8} is not possible on this GPU ({why}); try none")


def check_deepspeed(recipe: Recipe) -> None:
    """Raises UserError where the engine, or what it needs for a disk, is not here."""
    if not has_deepspeed():
        raise UserError(
            "engine: deepspeed needs DeepSpeed; install the extra `ecdit[deepspeed]`, or try engine: megatron"
        )
    options = recipe.engine_options
    for key, place in (("offload_optimizer", options.offload_optimizer), ("offload_weights", options.offload_weights)):
        if place == "nvme" and not has_async_io():
            raise UserError(
                f"engine_options.{key}: nvme needs DeepSpeed's asynchronous I/O, which is built from libaio's headers "
                "(Debian's libaio-dev) and is not here; try cpu"
            )


def assemble_model(recipe: Recipe, place: Topology) -> EcDit:
    """This rank's part of the model, as it shall compute."""
    fp8 = Fp8(recipe.precision.fp8, recipe.precision.where)
    spread = RankSpread(
        place,
        linears=recipe.train.linears,
        dispatch_chunks=recipe.parallel.dispatch_chunks,
        dispatch_fp8=recipe.parallel.dispatch_fp8,
        fp8=fp8,
        recomputed=recipe.train.recompute == "block",
    )
    with place.device:
        model = EcDit(recipe.model, recipe.train.seed, spread, recipe.train.recompute, compiled=recipe.train.compile)
    if recipe.model.routing == "megatron_topk":
        from parallel.megatron_moe import set_share  # needs the extra `te`

        set_share(recipe.train.micro_batch / recipe.train.batch, place.device)
    model.to(DTYPES[recipe.train.precision])
    for message in fp8.prepare(model):
        print(message, file=sys.stderr)
    if spread.told and place.first:
        print(spread.told, file=sys.stderr)
    return model


def assemble_engine(recipe: Recipe, place: Topology) -> Engine:
    """The engine with its model."""
    optimizer = recipe.optimizer
    settings = UpdateSettings(optimizer.name, optimizer.weight_decay, optimizer.clip, optimizer.ema)
    model = assemble_model(recipe, place)
    if recipe.engine == "megatron":
        engine: Engine = MegatronEngine(model, place, settings)
    else:
        from parallel.engine.deepspeed import DeepSpeedEngine

        try:
            engine = DeepSpeedEngine(model, place, settings, zero_options(recipe))
        except ConfigError as error:
            raise UserError(f"engine_options: {error}") from None
    if place.first:
        for message in [*engine.told, *told_of_norm(place.device)]:
            print(message, file=sys.stderr)
    return engine


def zero_options(recipe: Recipe) -> ZeroOptions:
    """`engine_options` as the engine wants them."""
    options = recipe.engine_options
    folder = None if options.nvme is None else str(Path(options.nvme) / recipe.run)
    return ZeroOptions(
        options.zero, options.offload_optimizer, options.offload_weights, folder, options.pinned, options.config
    )

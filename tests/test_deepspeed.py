"""The DeepSpeed engine: it trains as the oracle and as engine megatron do, and either goes on from the other."""

import random
import time
from itertools import islice, product

import pytest
import torch
import torch.multiprocessing as mp
from megatron.core import parallel_state

from ecdit import UserError, assemble, load_recipe
from ecdit.callbacks.metrics import read_metrics
from ecdit.recipe_io import change_recipe
from ecdit.recipe_tunable import LEAST_BUFFERS, TUNABLE
from launcher.plan import plan
from launcher.plan.gpus import GPUS
from launcher.plan.spread import Place
from launcher.plan.weights import parameters
from launcher.plan.zero import buckets, held
from parallel import topology
from parallel.checkpoint.folder import committed, newest
from parallel.checkpoint.lock import FolderLock
from parallel.checkpoint.store import DELAY
from parallel.engine import deepspeed_config
from parallel.engine.deepspeed_config import ConfigError, ZeroOptions
from parallel.engine.deepspeed_import import has_async_io
from parallel.topology import Layout
from tests.command import ecdit
from tests.layouts import LR, Case, accumulate, build, global_batch, train_cases, whole_kind
from tests.ranks import free_port, run_on_ranks, start_ranks
from tests.test_parallel import COMPILER, assert_parity
from tests.test_resume import assert_same_run, overrides, run
from tests.test_train import ROOT
from tests.tiny_runs import make_shapes

pytest.importorskip("deepspeed")

# every weight is gathered when its layer runs, and a flat is updated in many portions
SMALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0, "sub_group_size": 5000}}


def zero(stage, optimizer="none", weights="none"):
    return ZeroOptions(stage, optimizer, weights, config=SMALL if stage == 3 else {})


def bf16(layout, how=None):
    return Case(layout, 2, accumulation=4, precision=torch.bfloat16, zero=how)


TWO = [
    Case(Layout(), 2, zero=zero(0)),
    Case(Layout(), 2, masked=True, accumulation=2, recompute="moe", zero=zero(3)),
    Case(Layout(), 2, accumulation=2, zero=zero(3, "cpu", "cpu")),
    Case(Layout(expert=2), 2, masked=True, accumulation=2, zero=zero(2)),
    Case(Layout(expert=2), 2, accumulation=2, chunks=2, zero=zero(1, "cpu")),
]
FOUR = [
    Case(Layout(tensor=2, expert=4, sequence=True), 4, masked=True, zero=zero(2)),
    Case(Layout(expert=2), 4, routing="token_choice", zero=zero(1, "cpu")),
    Case(Layout(tensor=2, sequence=True), 4, routing="dense", zero=zero(3)),
]
ALL_TWO = [
    Case(layout, 2, masked=True, accumulation=2, recompute=recompute, zero=zero(stage, *places))
    for layout, recompute, stage, places in product(
        (Layout(), Layout(expert=2)), ("none", "block"), (0, 1, 2, 3), ((), ("cpu",), ("cpu", "cpu"))
    )
    if len(places) <= stage and (len(places) < 2 or stage == 3) and (stage < 3 or layout.expert == 1)
]
ALL_FOUR = [
    Case(layout, 4, accumulation=accumulation, zero=zero(stage, *places))
    for layout, accumulation, stage, places in product(
        (
            Layout(), Layout(expert=4), Layout(expert=2), Layout(tensor=2, expert=2),
            Layout(tensor=2, expert=2, expert_tensor=2), Layout(tensor=4, expert=4, sequence=True),
        ),
        (1, 2), (0, 1, 2, 3), ((), ("cpu",)),
    )
    if len(places) <= stage and (stage < 3 or layout == Layout())
]  # fmt: skip


def lots(cases):
    """A few in a job, which keeps the groups of all."""
    every = iter(cases)
    while lot := list(islice(every, 6)):
        yield lot


SLOW = [pytest.param(lot, marks=pytest.mark.slow) for every in (ALL_TWO, ALL_FOUR) for lot in lots(every)]


@pytest.mark.parametrize("cases", [TWO, FOUR, *SLOW], ids=lambda cases: f"{cases[0]} and {len(cases) - 1} more")
def test_every_stage_trains_as_the_oracle(cases):
    found = run_on_ranks(train_cases, cases[0].ranks, cases)[0]
    for case, of_case in zip(cases, found, strict=True):
        assert_parity(case, of_case)


@COMPILER
@pytest.mark.slow
def test_compiled_blocks_train_as_the_oracle_too():
    case = Case(Layout(), 2, accumulation=2, compiled=True, zero=zero(2))
    assert_parity(case, run_on_ranks(train_cases, 2, [case])[0][0])


@pytest.mark.parametrize(
    ("layout", "how"),
    [
        (Layout(), [zero(1), zero(2, "cpu"), zero(3)]),
        pytest.param(
            Layout(), [zero(1, "cpu"), zero(2), zero(3, "cpu"), zero(3, "cpu", "cpu")], marks=pytest.mark.slow
        ),
        pytest.param(Layout(expert=2), [zero(1), zero(2), zero(2, "cpu")], marks=pytest.mark.slow),
    ],
)
def test_in_bf16_it_trains_as_engine_megatron_does(layout, how):
    cases = [bf16(layout), *(bf16(layout, one) for one in how)]
    (expected_losses, _, expected), *found = run_on_ranks(train_cases, 2, cases)[0]
    for case, (losses, _, weights) in zip(cases[1:], found, strict=True):
        assert losses == expected_losses, str(case)
        for name, weight in expected.items():
            assert (weights[name] - weight).norm() <= 1e-6 * weight.norm(), f"{case}: {name}"


def train_past_a_bad_step(cases):
    """Losses of four steps, in the second of which one rank's first micro-batch is not finite; weights after them."""
    found = []
    for case in cases:
        place = topology.start(case.layout, 1)
        _, engine = build(case, place)
        losses, applied = [], []
        for step in range(4):
            batch = global_batch(case.recipe(), step)
            batch.latents[0] *= torch.inf if step == 1 else 1
            losses.append(accumulate(case, place, engine, batch))
            applied.append(bool(engine.update(LR).applied))
        assert applied == [True, False, True, True], str(case)
        found.append((losses, whole_kind(engine, "weights")))
        parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
    return found


@pytest.mark.parametrize(
    ("layout", "precision", "how"),
    [
        (Layout(expert=2), torch.bfloat16, [zero(1), zero(2, "cpu")]),
        *(
            pytest.param(layout, precision, how, marks=pytest.mark.slow)
            for layout, precision, how in (
                (Layout(), torch.bfloat16, [zero(1, "cpu"), zero(2), zero(3), zero(3, "cpu"), zero(3, "cpu", "cpu")]),
                (Layout(), torch.float32, [zero(0), zero(1), zero(2), zero(3), zero(3, "cpu", "cpu")]),
                (Layout(expert=2), torch.float32, [zero(0), zero(1, "cpu"), zero(2), zero(2, "cpu")]),
            )
        ),
    ],
)
def test_a_step_that_is_not_finite_leaves_nothing_behind(layout, precision, how):
    cases = [Case(layout, 2, accumulation=2, precision=precision, zero=one) for one in (None, *how)]
    (expected_losses, expected), *found = run_on_ranks(train_past_a_bad_step, 2, cases)[0]
    for case, (losses, weights) in zip(cases[1:], found, strict=True):
        assert losses == pytest.approx(expected_losses, rel=1e-6, nan_ok=True), str(case)
        for name, weight in expected.items():
            assert (weights[name] - weight).norm() <= 1e-6 * weight.norm(), f"{case}: {name}"


def hold(cases):
    """Bytes that this rank holds of each kind, for each case."""
    found = []
    for case in cases:
        place = topology.start(case.layout, 1)
        _, engine = build(case, place)
        wrapped, masters = engine._deepspeed.optimizer, [flat.master for flat in engine._flats.flats]
        stored = [weight.ds_tensor for weight in engine.model.parameters()] if case.zero.stage == 3 else None
        weights = stored or getattr(wrapped, "bit16_groups_flat", None) or wrapped.bf16_groups_flat
        states = [engine._client.states(master) for master in masters]
        found.append(
            {
                "weights": sum(tensor.nbytes for tensor in weights),
                "master weights": sum(master.nbytes for master in masters),
                "optimizer states": sum(one[kind].nbytes for one in states for kind in ("square", "momentum")),
                "EMA": sum(one["average"].nbytes for one in states),
            }
        )
        parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
    return found


def test_the_plan_knows_what_a_rank_holds():
    cases = [bf16(Layout(), zero(1)), bf16(Layout(expert=2), zero(2)), bf16(Layout(expert=2), zero(2, "cpu"))]
    cases += [bf16(Layout(), zero(3)), bf16(Layout(), zero(3, "cpu", "cpu"))]
    for case, expected in zip(cases, run_on_ranks(hold, 2, cases)[0], strict=True):
        options = case.zero
        keys = [f"engine_options.offload_optimizer={options.offload_optimizer}", f"engine_options.zero={options.stage}"]
        keys += [f"engine_options.offload_weights={options.offload_weights}", f"parallel.expert={case.layout.expert}"]
        recipe = change_recipe(case.recipe(), ["engine=deepspeed", "train.precision=bf16", *keys], "a case")
        parts = held(recipe, Place(case.layout, 2), 2)
        assert parts.disk == {} and {kind: (parts.gpu | parts.host)[kind] for kind in expected} == expected, str(case)
        assert ("EMA" in parts.host) == (options.offload_optimizer == "cpu")
        assert ("weights" in parts.host) == (options.offload_weights == "cpu")


def test_the_plan_heeds_a_disk_and_what_is_tuned():
    """A disk needs host memory too: five buffers for what is updated at once, five for the largest weight."""

    def parts(*keys):
        keys = ["engine_options.zero=3", "engine_options.nvme=x", "engine_options.offload_optimizer=nvme", *keys]
        recipe = load_recipe(ROOT / "recipes/xl_8e_1gpu.yaml", keys)
        return recipe, held(recipe, Place(Layout(), 1), 2)

    largest = 8 * 1152 * 4608  # of the experts
    small = {"zero_optimization": {"sub_group_size": 1, "reduce_bucket_size": 1000}}
    _, optimizer = parts()
    tuned, of_each = parts(f"engine_options.config={small}")
    _, both = parts("engine_options.offload_weights=nvme", f"engine_options.config={small}")
    assert optimizer.host["buffers for the disk"] == 5 * 4 * (100_000_000 + largest)
    assert of_each.host["buffers for the disk"] == 5 * 4 * (1 + largest)
    assert both.host["buffers for the disk"] == 5 * 4 * (1 + largest) + 5 * 2 * largest
    assert "weights" in both.disk and "master weights" in both.disk and "EMA" in of_each.disk
    gathered = 2 * sum(weight.numel for weight in parameters(tuned.model, Place(Layout(), 1)))
    assert buckets(tuned, Place(Layout(), 1), 2) == 4 * 2 * 1000 + gathered


def test_the_largest_model_for_one_card_is_planned_to_fit():
    """EC-DiT-XL-8E on 24 GB, as its recipe says; without offload it does not fit."""
    recipe = load_recipe(ROOT / "recipes/xl_8e_1gpu.yaml")
    made = plan(recipe, 1, 1, GPUS["rtx4090"])
    assert made.margin > 0 and sum(made.worst.host.values()) > 16 * made.parameters
    resident = load_recipe(ROOT / "recipes/xl_8e_1gpu.yaml", ["engine_options.offload_optimizer=none"])
    assert plan(resident, 1, 1, GPUS["rtx4090"]).margin < 0


# ------------------------------------------------------------------------------------------------------ whole runs


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("deepspeed"))


def keys_of(shapes, *more):
    return overrides(shapes, "model.layers=2", *more)


def deepspeed(stage, *more):
    return ["engine=deepspeed", f"engine_options.zero={stage}", *more]


def curve(runs):
    return [record["loss"] for record in read_metrics(runs / "quickstart/metrics.jsonl")]


@pytest.fixture(scope="module")
def undisturbed(shapes, tmp_path_factory):
    """A hundred steps of engine megatron, on one rank."""
    runs = tmp_path_factory.mktemp("megatron")
    assert run_on_ranks(run, 1, runs, keys_of(shapes, "train.steps=100")) == [0]
    return runs


@pytest.mark.parametrize(
    "how",
    [
        deepspeed(2, "parallel.expert=2"),
        pytest.param(deepspeed(0, "parallel.expert=2"), marks=pytest.mark.slow),
        pytest.param(deepspeed(1, "engine_options.offload_optimizer=cpu"), marks=pytest.mark.slow),
        pytest.param(deepspeed(3, "engine_options.offload_optimizer=cpu"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_hundred_steps_follow_engine_megatrons_curve(shapes, undisturbed, tmp_path, how):
    assert run_on_ranks(run, 2, tmp_path, keys_of(shapes, "train.steps=100", *how)) == [0, 0]
    assert curve(tmp_path) == pytest.approx(curve(undisturbed), rel=1e-4)


CHAIN = [
    (2, deepspeed(2, "parallel.expert=2")),
    (1, deepspeed(3, "engine_options.offload_optimizer=cpu")),
    (2, ["parallel.expert=2"]),
    (2, deepspeed(1, "engine_options.offload_optimizer=cpu")),
]
LONGER = [
    (4, deepspeed(1, "parallel.tensor=2", "parallel.expert=4", "parallel.sequence=true")),
    (2, deepspeed(3)),
    (4, deepspeed(3, "engine_options.offload_optimizer=cpu", "engine_options.offload_weights=cpu")),
    (4, ["parallel.pipeline=2"]),
    (1, deepspeed(0)),
    (1, []),
]


@pytest.mark.parametrize("legs", [CHAIN, pytest.param(CHAIN + LONGER, marks=pytest.mark.slow)], ids=len)
def test_a_run_goes_on_over_engines_stages_and_ranks(shapes, undisturbed, tmp_path, legs):
    steps = 3
    for leg, (ranks, how) in enumerate(legs, 1):
        assert run_on_ranks(run, ranks, tmp_path, keys_of(shapes, f"train.steps={leg * steps}", *how)) == [0] * ranks
    found, expected = (read_metrics(runs / "quickstart/metrics.jsonl") for runs in (tmp_path, undisturbed))
    assert [record["step"] for record in found] == list(range(1, len(legs) * steps + 1))
    for one, other in zip(found, expected, strict=False):
        assert one["sample_ids"] == other["sample_ids"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6), one["step"]
    listed = ecdit("checkpoint", "ls", tmp_path / "quickstart")
    verified = ecdit("checkpoint", "verify", tmp_path / "quickstart")
    assert listed.returncode == verified.returncode == 0 and f"step-{len(legs) * steps}: verified" in verified.stdout


@pytest.mark.parametrize("optimizer", ["rmsprop_momentum", "torch_rmsprop"])
def test_a_new_run_takes_the_other_engines_states(shapes, tmp_path, optimizer):
    """States are kept where both have them: the same optimizer."""
    before, after = tmp_path / "before", tmp_path / "after"
    assert run_on_ranks(run, 1, before, keys_of(shapes, "train.steps=3")) == [0]
    start = [f"init_from={before / 'quickstart'}", f"optimizer.name={optimizer}", "train.steps=1"]
    assert run_on_ranks(run, 2, after, keys_of(shapes, *start, *deepspeed(2, "parallel.expert=2"))) == [0, 0]
    saved = newest(after / "quickstart/checkpoints")[0]
    assert saved.meta["updates"] == (4 if optimizer == "rmsprop_momentum" else 1)
    squares, old = saved.kind("square"), newest(before / "quickstart/checkpoints")[0].kind("square")
    # an update leaves 95 parts in 100 of a square, and adds some
    kept = all((squares[name] >= 0.94 * old[name]).all() for name in old)
    assert kept == (optimizer == "rmsprop_momentum")
    back = tmp_path / "back"
    start[0] = f"init_from={after / 'quickstart'}"
    assert run_on_ranks(run, 1, back, keys_of(shapes, *start)) == [0]
    again = newest(back / "quickstart/checkpoints")[0]
    assert again.meta["updates"] == saved.meta["updates"] + 1
    assert all((square >= 0.94 * squares[name]).all() for name, square in again.kind("square").items())


@pytest.mark.slow  # it compiles what reads and writes the disk
@pytest.mark.parametrize("also", [[], ["engine_options.offload_weights=nvme", "train.precision=bf16"]], ids=str)
def test_a_run_that_is_on_a_disk_goes_on_as_any_other(shapes, tmp_path, also):
    if not has_async_io():
        pytest.skip("libaio's headers are not here")
    there = ["engine_options.offload_optimizer=nvme", f"engine_options.nvme={tmp_path / 'disk'}", *also]
    # parts of a flat that are worth a file have a million bytes
    wide = ["model.width=256", "train.batch=16", "train.micro_batch=4", *(key for key in also if "engine" not in key)]
    for runs, hows in ((tmp_path, (deepspeed(3, *there), deepspeed(3, *there), [])), (tmp_path / "memory", ([],) * 3)):
        for leg, how in enumerate(hows, 1):
            keys = keys_of(shapes, f"train.steps={2 * leg}", *wide, *how)
            assert run_on_ranks(run, 2, runs, keys) == [0, 0]
    assert curve(tmp_path) == pytest.approx(curve(tmp_path / "memory"), rel=1e-6)
    assert bool(list((tmp_path / "disk/quickstart").glob("**/*param*.swp"))) == bool(also)


def refused_folders(folder):
    """Why this rank's engine does not take a folder that another process has, and one that cannot be made."""
    place = topology.start(Layout(), 1)
    whys = []
    for disk in (folder, "/proc/none"):
        with pytest.raises(ConfigError) as error:
            build(Case(Layout(), 1, zero=ZeroOptions(3, "nvme", nvme=str(disk))), place)
        whys.append(str(error.value))
    return whys


def test_no_two_runs_use_one_folder_of_a_disk(tmp_path):
    lock = FolderLock(tmp_path / "rank-0.lock")
    taken, impossible = run_on_ranks(refused_folders, 1, tmp_path)[0]
    lock.release()
    assert f"nvme: {tmp_path}: process" in taken and "name another run" in taken
    assert "nvme: /proc/none cannot be written" in impossible


def wait_for_step(checkpoints, step):
    """Until there is a checkpoint of it or a later one."""
    end = time.monotonic() + 120
    while not committed(checkpoints) or int(committed(checkpoints)[-1].name.removeprefix("step-")) < step:
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_kill_9_at_any_moment_loses_nothing(shapes, tmp_path, kills, monkeypatch):
    chance = random.Random(1)
    how = deepspeed(2, "parallel.expert=2", "engine_options.offload_optimizer=cpu")
    keys = keys_of(shapes, f"train.steps={8 * kills + 40}", "checkpoint.every=2", *how)
    checkpoints = tmp_path / "quickstart/checkpoints"
    answers = mp.get_context("forkserver").SimpleQueue()  # kept: the ranks do not start without it
    for number in range(kills):
        monkeypatch.setenv(DELAY, str(chance.choice([0.0, 0.1, 0.4])))
        ranks = start_ranks(run, 2, free_port(), answers, (tmp_path, keys))
        if number % 3 < 2:  # while it trains and saves; else while it starts
            wait_for_step(checkpoints, 8 * number + 2)
        time.sleep(chance.uniform(0, 0.5 if number % 3 < 2 else 4))
        assert all(process.is_alive() for process in ranks)
        for process in ranks:
            process.kill()
        for process in ranks:
            process.join()
        assert newest(checkpoints)[1] == []
    monkeypatch.delenv(DELAY)
    assert run_on_ranks(run, 2, tmp_path, keys) == [0, 0]
    assert not list(checkpoints.glob("*.partial")) and not list(checkpoints.glob("*.broken"))
    assert run_on_ranks(run, 2, tmp_path / "undisturbed", keys) == [0, 0]
    assert_same_run(tmp_path, tmp_path / "undisturbed")


@pytest.mark.slow  # it compiles DeepSpeed's
def test_adam_is_the_same_under_both_engines(shapes, tmp_path):
    adam = ["optimizer.name=adamw", "optimizer.weight_decay=0.1", "train.steps=6"]
    curves = []
    for number, how in enumerate(([], deepspeed(2), deepspeed(1, "engine_options.offload_optimizer=cpu"))):
        assert run_on_ranks(run, 1, tmp_path / str(number), keys_of(shapes, *adam, *how)) == [0]
        curves.append(curve(tmp_path / str(number)))
    assert curves[1] == pytest.approx(curves[0], rel=1e-5) and curves[2] == pytest.approx(curves[0], rel=1e-5)


@pytest.mark.parametrize("stage", [2, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 1, 3))])
def test_losses_that_stay_non_finite_change_nothing_and_end_the_run(shapes, tmp_path, stage):
    keys = keys_of(shapes, "train.steps=40", "checkpoint.every=1", "optimizer.lr=1e30", *deepspeed(stage))
    assert run_on_ranks(run, 1, tmp_path, keys) == [1]
    assert read_metrics(tmp_path / "quickstart/metrics.jsonl")[-1]["skipped"] == 10
    saved = newest(tmp_path / "quickstart/checkpoints")[0]
    assert all(tensor.isfinite().all() for tensor in saved.kind("weights").values())


# --------------------------------------------------------------------------------------------------------- recipes


def test_what_a_recipe_may_set_is_what_deepspeed_takes():
    from deepspeed.runtime.constants import MEMORY_BREAKDOWN, WALL_CLOCK_BREAKDOWN
    from deepspeed.runtime.swap_tensor.aio_config import get_aio_config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    def least(known):
        return {key: least(kind) if isinstance(kind, dict) else kind.least for key, kind in known.items()}

    values = least(TUNABLE)
    taken = DeepSpeedZeroConfig(**values["zero_optimization"])  # refuses what it does not know
    assert taken.reduce_bucket_size == 1 and taken.offload_param.max_in_cpu == 0
    assert set(values["aio"]) < set(get_aio_config({}))
    assert {MEMORY_BREAKDOWN, WALL_CLOCK_BREAKDOWN} < set(values) and LEAST_BUFFERS == deepspeed_config.BUFFERS


ON_DISK = (
    "engine=deepspeed", "engine_options.zero=3", "engine_options.offload_weights=nvme", "engine_options.nvme=disk",
    "train.precision=bf16",
)  # fmt: skip
REFUSED = {
    ("engine_options.zero=1",): "engine_options.zero: means nothing to engine: megatron",
    ("engine=deepspeed", "parallel.pipeline=2"): "parallel.pipeline: 2, but engine: deepspeed has no pipeline",
    ("engine=deepspeed", "train.graph=true"): "train.graph: true, but engine: deepspeed asks the host",
    ("engine=deepspeed", "engine_options.zero=4"): "engine_options.zero: 4 is not valid",
    ("engine=deepspeed", "engine_options.zero=0", "train.precision=bf16"): "engine_options.zero: 0 adds gradients up",
    ("engine=deepspeed", "engine_options.zero=3", "parallel.expert=2"): "parallel.expert: 2, but engine_options.zero",
    ("engine=deepspeed", "engine_options.zero=3", "parallel.tensor=2"): "parallel.tensor: 2, but engine_options.zero",
    ("engine=deepspeed", "engine_options.zero=0", "engine_options.offload_optimizer=cpu"):
        "engine_options.offload_optimizer: cpu needs engine_options.zero: 1 or more, not 0",
    ("engine=deepspeed", "engine_options.offload_weights=cpu"):
        "engine_options.offload_weights: cpu needs engine_options.zero: 3, not 2",
    ("engine=deepspeed", "engine_options.zero=3", "engine_options.offload_optimizer=nvme"):
        "engine_options.nvme: this folder is needed for offload_optimizer: nvme",
    ("engine=deepspeed", "engine_options.zero=3", "engine_options.offload_weights=nvme", "engine_options.nvme=x"):
        "engine_options.offload_weights: nvme keeps weights in bf16",
    ("engine=deepspeed", "engine_options.config={zero_optimization: {reduce_bucket: 5}}"):
        "engine_options.config.zero_optimization.reduce_bucket: is none of DeepSpeed's keys that a recipe may set; did "
        "you mean reduce_bucket_size?",
    ("engine=deepspeed", "engine_options.config={fp16: {enabled: true}}"): "engine_options.config.fp16: is none of",
    ("engine=deepspeed", "engine_options.config={aio: 5}"): "engine_options.config.aio: 5 is no mapping",
    ("engine=deepspeed", "engine_options.config={zero_optimization: {sub_group_size: -1}}"):
        "engine_options.config.zero_optimization.sub_group_size: -1 is not valid: a whole number from 1 on",
    ("engine=deepspeed", "engine_options.config={zero_optimization: {allgather_bucket_size: 5}}"):
        "engine_options.config.zero_optimization.allgather_bucket_size: 5 is not valid: a whole number from 2 on, a "
        "multiple of 2",
    ("engine=deepspeed", "engine_options.config={wall_clock_breakdown: maybe}"):
        "engine_options.config.wall_clock_breakdown: 'maybe' is not valid: true or false",
    ("engine=deepspeed", "engine_options.config={aio: {queue_depth: 8}}"):
        "engine_options.config.aio: means nothing where nothing is offloaded to nvme",
    ("engine=deepspeed", "engine_options.offload_optimizer=cpu",
     "engine_options.config={zero_optimization: {offload_optimizer: {buffer_count: 8}}}"):
        "engine_options.config.zero_optimization.offload_optimizer: means nothing without "
        "engine_options.offload_optimizer: nvme",
    ("engine=deepspeed", "engine_options.nvme=disk"): "engine_options.nvme: disk means nothing where nothing is",
    (*ON_DISK, "engine_options.config={zero_optimization: {stage3_prefetch_bucket_size: 100}}"):
        "engine_options.config.zero_optimization.stage3_prefetch_bucket_size: DeepSpeed cannot look ahead",
    (*ON_DISK, "engine_options.config={zero_optimization: {offload_param: {buffer_count: 1}}}"):
        "engine_options.config.zero_optimization.offload_param.buffer_count: 1 is not valid: a whole number from 5 on",
}  # fmt: skip


@pytest.mark.parametrize("keys", REFUSED)
def test_what_deepspeed_cannot_do_is_refused_when_the_recipe_is_read(keys):
    with pytest.raises(UserError) as error:
        load_recipe(ROOT / "recipes/quickstart.yaml", keys)
    assert REFUSED[keys] in str(error.value)


@pytest.mark.parametrize(
    ("missing", "keys", "told"),
    [
        ("has_deepspeed", (), "engine: deepspeed needs DeepSpeed; install the extra `ecdit\\[deepspeed\\]`"),
        ("has_async_io", ON_DISK[1:], "engine_options.offload_weights: nvme needs DeepSpeed's asynchronous I/O"),
    ],
)
def test_what_is_not_installed_is_refused_before_the_first_step(monkeypatch, missing, keys, told):
    monkeypatch.setattr(assemble, missing, lambda: False)
    with pytest.raises(UserError, match=told):
        assemble.check_deepspeed(load_recipe(ROOT / "recipes/quickstart.yaml", ["engine=deepspeed", *keys]))

"""The megatron engine against a plain loop, and against itself on more ranks."""

from functools import partial

import pytest
import torch

from ecdit import EcDit
from ecdit.recipe_model import ModelRecipe
from parallel import topology
from parallel.engine import UpdateSettings
from parallel.engine.ema import Ema
from parallel.engine.megatron import MegatronEngine
from parallel.engine.optimizer import RmspropMomentum, Slice, clip_scale
from parallel.topology import Layout
from tests.layouts import Case, accumulate, build, global_batch, whole, whole_kind
from tests.ranks import run_on_ranks
from tests.test_model import TINY, inputs

SETTINGS = UpdateSettings("rmsprop_momentum", weight_decay=0.01, clip=0.05, ema=0.99)
IMAGES, STEPS, LR = 8, 4, 0.01
NO_STAGES = (0, 0, 0)


def loss_of(model, batch, hidden=None, share=1.0):
    loss = model(*batch).velocity.sub(1).square().mean() * share
    return loss, loss


def engine_kinds(engine):
    return {name.split("/")[0] for name in engine.state()}


def train(settings=SETTINGS, precision=torch.float32, poison=None):
    """A few steps of a tiny model on this rank's share of the images; losses, norms, and the whole state."""
    recipe = ModelRecipe(**(TINY | {"group_tokens": 32}))
    place = topology.start(Layout(), 1)
    engine = MegatronEngine(EcDit(recipe, seed=1).to(precision), place, settings)
    images = IMAGES // place.data_ranks
    trace = []
    for step in range(STEPS):
        part = [tensor[place.data_rank * images :][:images] for tensor in inputs(recipe, IMAGES, seed=step)]
        if step == poison:
            part[0][:] = float("nan")
        micro = [[tensor[i : i + 2] for tensor in part] for i in range(0, images, 2)]  # two images fill a group
        loss = engine.accumulate(micro, len(micro), partial(loss_of, share=2 / IMAGES), NO_STAGES)
        update = engine.update(LR)
        trace.append((loss.item(), update.grad_norm.item(), update.applied.item()))
    state = {kind: whole_kind(engine, kind) for kind in engine_kinds(engine)}
    topology.stop()
    return trace, state


def plain():
    """The same steps with nothing but autograd, the optimizer over whole tensors, and the EMA."""
    recipe = ModelRecipe(**(TINY | {"group_tokens": 32}))
    model = EcDit(recipe, seed=1)
    units = []
    for weight in model.parameters():
        units += list(weight.detach().unbind()) if weight.expert else [weight.detach()]
    decays = [weight.ndim > 1 for weight in model.parameters() for _ in range(len(weight) if weight.expert else 1)]
    masters = [unit.view(-1) for unit in units]
    slices = [Slice(master, i, decay) for i, (master, decay) in enumerate(zip(masters, decays, strict=True))]
    optimizer = RmspropMomentum(slices, [len(m) for m in masters], weight_decay=SETTINGS.weight_decay)
    ema = Ema(masters, SETTINGS.ema)
    trace = []
    for step in range(STEPS):
        model.zero_grad()
        loss, _ = loss_of(model, inputs(recipe, IMAGES, seed=step))
        loss.backward()
        grads = []
        for weight in model.parameters():
            grads += [g.flatten() for g in (weight.grad.unbind() if weight.expert else [weight.grad])]
        norm = torch.stack([g.norm() for g in grads]).norm()
        optimizer.step(grads, LR, scale=clip_scale(norm, SETTINGS.clip))
        ema.update(masters)
        trace.append((loss.item(), norm.item()))
    return trace, dict(model.state_dict())


def assert_same(a, b, tolerance):
    for name, expected in b.items():
        assert (a[name] - expected).norm() <= tolerance * expected.norm() + 1e-7, name


def test_one_rank_is_a_plain_loop():
    (trace, state), (expected, weights) = train(), plain()
    for (loss, norm, applied), (plain_loss, plain_norm) in zip(trace, expected, strict=True):
        assert applied
        assert loss == pytest.approx(plain_loss, rel=1e-5)
        assert norm == pytest.approx(plain_norm, rel=1e-4)
    assert_same(state["weights"], weights, 1e-4)


def test_two_and_four_ranks_train_as_one_does():
    trace, state = train()
    for world in (2, 4):
        answers = run_on_ranks(train, world)
        for other_trace, other_state in answers:
            for (loss, norm, _), (one_loss, one_norm, _) in zip(other_trace, trace, strict=True):
                assert loss == pytest.approx(one_loss, rel=1e-5)
                assert norm == pytest.approx(one_norm, rel=1e-4)
            for kind in ("weights", "ema", "square", "momentum"):
                assert_same(other_state[kind], state[kind], 2e-3)


def squares_flowing_back(layout, images):
    """Sum over all ranks of the squares of each attention's gradients, of a batch in micro-batches."""
    place = topology.start(layout, 1)
    case = Case(layout, place.ranks, accumulation=2, batch=images)
    model, engine = build(case, place)
    found = torch.zeros(len(model.blocks))

    def count(number, _module, _inputs, slopes):
        found[number] += slopes[0].square().sum()

    for number, block in enumerate(model.blocks.values()):
        block.self_attention.register_full_backward_hook(partial(count, number))
    accumulate(case, place, engine, global_batch(case.recipe(), 0))
    sums = place.sum(found).tolist()
    topology.stop()
    return sums


def test_what_flows_back_is_as_large_on_any_layout():
    """Scales of FP8 are of it, and a checkpoint may go on over other ranks."""
    one = squares_flowing_back(Layout(), 16)
    for layout, ranks in ((Layout(), 2), (Layout(expert=2), 4)):
        assert run_on_ranks(squares_flowing_back, ranks, layout, 16)[0] == pytest.approx(one, rel=1e-4)


def test_state_is_whole_and_loads_into_an_identical_continuation():
    recipe = ModelRecipe(**TINY)
    place = topology.start(Layout(), 1)

    def steps(engine, numbers):
        for step in numbers:
            batch = inputs(recipe, IMAGES, seed=step)
            engine.accumulate([batch], 1, loss_of, NO_STAGES)
            engine.update(LR)

    engine = MegatronEngine(EcDit(recipe, seed=1), place, SETTINGS)
    steps(engine, range(3))
    saved = {name: tensor.clone() for name, tensor in whole(engine.state()).items()}
    assert {n.removeprefix("weights/"): t.shape for n, t in saved.items() if n.startswith("weights/")} == {
        n: p.shape for n, p in EcDit(recipe).named_parameters()
    }
    steps(engine, range(3, 5))
    other = MegatronEngine(EcDit(recipe, seed=2), place, SETTINGS)
    for name, boxes in other.state().items():
        for at, values in boxes.parts:
            values.copy_(saved[name][tuple(slice(o, o + n) for o, n in zip(at, values.shape, strict=True))])
    other.loaded(3)
    steps(other, range(3, 5))
    found = whole(other.state())
    assert all(torch.equal(tensor, found[name]) for name, tensor in whole(engine.state()).items())
    topology.stop()


def test_averaged_weights_are_there_within_the_context_alone():
    place = topology.start(Layout(), 1)
    engine = MegatronEngine(EcDit(ModelRecipe(**TINY), seed=1), place, SETTINGS)
    engine.accumulate([inputs(engine.model.recipe, IMAGES)], 1, loss_of, NO_STAGES)
    engine.update(LR)
    state = {kind: whole_kind(engine, kind) for kind in ("weights", "ema")}
    with engine.averaged() as model:
        assert all(torch.equal(p, state["ema"][n]) for n, p in model.named_parameters())
    assert all(torch.equal(p, state["weights"][n]) for n, p in engine.model.named_parameters())
    topology.stop()


def test_a_gradient_that_is_not_finite_changes_nothing():
    trace, state = train(poison=STEPS - 1)
    assert [applied for *_, applied in trace] == [True] * (STEPS - 1) + [False]
    assert all(t.isfinite().all() for part in state.values() for t in part.values())


def test_bf16_keeps_fp32_masters():
    _, state = train(precision=torch.bfloat16)
    weight = state["weights"]["patch.weight"]
    assert weight.dtype == torch.float32 and not torch.equal(weight, weight.bfloat16().float())


def test_the_classic_form_trains_through_the_engine_too():
    trace, _ = train(UpdateSettings("torch_rmsprop", 0.0, 1.0, 0.9))
    assert all(applied for *_, applied in trace)

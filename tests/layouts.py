"""Trains a tiny EC-DiT on some layout, and the oracle on one rank, on the same batches, for comparison."""

from dataclasses import dataclass, fields, replace

import torch
from megatron.core import parallel_state

from ecdit import reference
from ecdit.diffusion.draws import draw
from ecdit.diffusion.masking import gather_tokens
from ecdit.diffusion.objective import MicroBatch, objective, to_differentiate
from ecdit.diffusion.patch import patchify
from ecdit.model.dit import EcDit
from ecdit.recipe_io import parse_recipe
from parallel import topology
from parallel.checkpoint.boxes import Boxes
from parallel.engine import Engine, UpdateSettings
from parallel.engine.deepspeed import DeepSpeedEngine
from parallel.engine.deepspeed_config import ZeroOptions
from parallel.engine.megatron import MegatronEngine
from parallel.engine.optimizer import RmspropMomentum, Slice, clip_scale
from parallel.parameters import initialize
from parallel.spread.ranks import RankSpread
from parallel.topology import Layout

SETTINGS = UpdateSettings("rmsprop_momentum", weight_decay=0.01, clip=0.05, ema=0.9)
STEPS, LR = 3, 1e-3


@dataclass(frozen=True)
class Case:
    """A layout and what is trained on it. Two images fill a routing group."""

    layout: Layout
    ranks: int = 8
    routing: str = "expert_choice"
    masked: bool = False
    accumulation: int = 1
    chunks: int = 1
    recompute: str = "none"
    compiled: bool = False
    batch: int = 32
    precision: torch.dtype = torch.float32
    linears: str = "torch"
    model: tuple = ()
    zero: ZeroOptions | None = None  # None: engine megatron
    dispatch_fp8: bool = False

    def recipe(self):
        """The recipe that both sides follow."""
        tokens = 8 if self.masked else 16
        model = {
            "layers": 4, "width": 32, "heads": 4, "kv_heads": 4, "experts": 8, "group_tokens": 2 * tokens, "side": 8,
            "channels": 3, "patch": 2, "text_width": 12, "text_tokens": 5, "routing": self.routing,
        }  # fmt: skip
        values = {
            "run": "parity",
            "model": model | dict(self.model),
            "data": {"streams": [{"path": "none"}], "resolution": 8},
            "masking": {"ratio": 0.5 if self.masked else 0.0},
            "train": {"batch": self.batch, "micro_batch": self.micro_batch, "precision": "fp32"},
        }
        return parse_recipe(values, "the parity test")

    @property
    def micro_batch(self) -> int:
        """Images of a micro-batch on a rank."""
        return self.batch // (self.ranks // self.layout.tensor // self.layout.pipeline) // self.accumulation

    def __str__(self) -> str:
        size = self.layout
        parts = [
            f"{name}{value}"
            for name, value in (
                ("tp", size.tensor), ("ep", size.expert), ("etp", size.expert_tensor), ("pp", size.pipeline),
                ("dp", self.ranks // size.tensor // size.pipeline), ("acc", self.accumulation), ("chunks", self.chunks),
            )
            if value > 1
        ]  # fmt: skip
        if self.zero is not None:
            places = (self.zero.offload_optimizer, self.zero.offload_weights)
            parts += [f"zero{self.zero.stage}", *(f"offload-{place}" for place in places if place != "none")]
        parts += (
            ["sp"] * size.sequence
            + ["masked"] * self.masked
            + ["fp8-dispatch"] * self.dispatch_fp8
            + ["compiled"] * self.compiled
        )
        return " ".join([*parts, self.routing, *([self.recompute] if self.recompute != "none" else [])])


def global_batch(recipe, step: int) -> MicroBatch:
    """The whole batch of a step, a function of the step."""
    generator = torch.Generator().manual_seed(step)
    images, model = recipe.train.batch, recipe.model
    latents = torch.randn(images, model.channels, model.side, model.side, generator=generator)
    text = torch.randn(images, model.text_tokens, model.text_width, generator=generator)
    mask = torch.rand(images, model.text_tokens, generator=generator) > 0.4
    mask[:, 0] = True
    return MicroBatch(latents, text, mask, draw(recipe, step, torch.arange(images)))


def slice_of(batch: MicroBatch, part: slice, device: torch.device) -> MicroBatch:
    """Some images of a batch."""
    draws = batch.draws
    keep = None if draws.keep is None else draws.keep[part].to(device)
    draws = replace(draws, noise=draws.noise[part].to(device), t=draws.t[part].to(device), keep=keep)
    return MicroBatch(*(x[part].to(device) for x in (batch.latents, batch.text, batch.text_mask)), draws)


def randomize(model) -> None:
    """Gives weights that start as zero a value, so that every path carries a signal."""
    for weight in model.parameters():
        weight.init_std = weight.init_std or 0.05
    initialize(model, 0)


def build(case: Case, place: topology.Topology) -> tuple[EcDit, MegatronEngine | DeepSpeedEngine]:
    """This rank's part of the model, and its engine."""
    spread = RankSpread(
        place,
        linears=case.linears,
        dispatch_chunks=case.chunks,
        dispatch_fp8=case.dispatch_fp8,
        recomputed=case.recompute == "block",
    )
    with place.device:
        model = EcDit(case.recipe().model, spread=spread, recompute=case.recompute, compiled=case.compiled)
        randomize(model)
    model.to(case.precision)
    if case.zero is not None:
        return model, DeepSpeedEngine(model, place, SETTINGS, case.zero)
    return model, MegatronEngine(model, place, SETTINGS)


def whole(boxes: dict[str, Boxes]) -> dict[str, torch.Tensor]:
    """Whole tensors from every rank's boxes; each element must be there."""
    own = {name: (b.whole, [(at, v.cpu().clone()) for at, v in b.parts]) for name, b in boxes.items()}
    everyones = [own] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyones, own)
    found: dict[str, torch.Tensor] = {}
    for part in everyones:
        for name, (shape, parts) in part.items():
            tensor = found.setdefault(name, torch.full(shape, torch.nan))
            for at, values in parts:
                tensor[tuple(slice(o, o + n) for o, n in zip(at, values.shape, strict=True))] = values
    assert not any(tensor.isnan().any() for tensor in found.values())
    return found


def whole_kind(engine: Engine, kind: str) -> dict[str, torch.Tensor]:
    """One kind of an engine's state, such as weights, by parameter."""
    prefix = f"{kind}/"
    of_kind = {name: boxes for name, boxes in engine.state().items() if name.startswith(prefix)}
    return {name.removeprefix(prefix): tensor for name, tensor in whole(of_kind).items()}


def accumulate(case: Case, place: topology.Topology, engine: Engine, batch: MicroBatch) -> float:
    """Has the engine take this rank's part of a step's batch; the loss."""
    recipe, size = case.recipe(), case.micro_batch
    images = case.batch // place.data_ranks
    first = place.data_rank * images

    def loss(ddp, micro, hidden):
        per_image, extra, out = objective(ddp, micro, recipe, hidden)
        return to_differentiate(per_image, extra, out, len(micro.latents), case.batch)

    micros = [slice_of(batch, slice(i, i + size), place.device) for i in range(first, first + images, size)]
    tokens = recipe.model.tokens if micros[0].draws.keep is None else micros[0].draws.keep.shape[1]
    return engine.accumulate(micros, len(micros), loss, engine.model.hidden_shape(size, tokens)).item()


def train_case(case: Case) -> tuple[list[float], dict, dict]:
    """Losses of three steps, gradients of each step, and weights after them; on every rank of a running job."""
    place = topology.start(case.layout, 1)
    _, engine = build(case, place)
    losses, gradients = [], []
    for step in range(STEPS):
        losses.append(accumulate(case, place, engine, global_batch(case.recipe(), step)))
        gradients.append(whole(engine.gradients()))
        engine.update(LR)
    weights = whole_kind(engine, "weights")
    parallel_state.destroy_model_parallel()
    return losses, gradients, weights


def train_cases(cases: list[Case]) -> list:
    """All of them in one job; what the first rank found."""
    found = [train_case(case) for case in cases]
    first = torch.distributed.get_rank() == 0
    torch.distributed.destroy_process_group()
    return found if first else []


def train_oracle(case: Case) -> tuple[list[float], dict, dict]:
    """The same with `ecdit.reference`, autograd and the optimizer over whole tensors."""
    recipe = case.recipe()
    ours = EcDit(recipe.model)
    randomize(ours)
    config = reference.Config(**{field.name: getattr(recipe.model, field.name) for field in fields(reference.Config)})
    oracle = reference.EcDit(config)
    oracle.load_state_dict(ours.state_dict())
    weights = dict(oracle.named_parameters())
    units, decays = [], []
    for name, weight in weights.items():
        parts = weight.detach().unbind() if ".experts." in name else [weight.detach()]
        units += [part.view(-1) for part in parts]
        decays += [weight.ndim > 1] * len(parts)
    slices = [Slice(unit, i, decay) for i, (unit, decay) in enumerate(zip(units, decays, strict=True))]
    optimizer = RmspropMomentum(slices, [len(unit) for unit in units], weight_decay=SETTINGS.weight_decay)
    losses, gradients = [], []
    for step in range(STEPS):
        oracle.zero_grad()
        batch = global_batch(recipe, step)
        keep = batch.draws.keep
        x_t, target = reference.flow_pair(batch.latents, batch.draws.noise, batch.draws.t)
        velocity, aux = oracle(x_t, batch.draws.t, batch.text, batch.text_mask, recipe.model.group_tokens, keep)
        target = patchify(target, recipe.model.patch)
        target = target if keep is None else gather_tokens(target, keep)
        loss = reference.flow_loss(velocity, target) + recipe.model.aux_loss * aux
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: weight.grad.clone() for name, weight in weights.items()})
        flat = []
        for name, weight in weights.items():
            flat += [g.flatten() for g in (weight.grad.unbind() if ".experts." in name else [weight.grad])]
        scale = clip_scale(torch.stack([g.norm() for g in flat]).norm(), SETTINGS.clip)
        optimizer.step(flat, LR, scale=scale)
    return losses, gradients, {name: weight.detach() for name, weight in weights.items()}

"""docs/parallelism.md says what each axis sends; here the collectives of a step are counted."""

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.utils._python_dispatch import TorchDispatchMode

from ecdit.diffusion.objective import objective, to_differentiate
from parallel import topology
from parallel.topology import Layout
from tests.layouts import Case, build, global_batch, slice_of
from tests.ranks import run_on_ranks

IMAGES, TOKENS, WIDTH = 8, 16, 32


class Counter(TorchDispatchMode):
    """Bytes that this rank sends in collectives on token-sized tensors, by kind."""

    def __init__(self):
        super().__init__()
        self.sent = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            name = function._schema.name.removeprefix("c10d::").strip("_")
            tensors = [t for a in args for t in (a if isinstance(a, list | tuple) else [a]) if torch.is_tensor(t)]
            self.sent[name] = self.sent.get(name, 0) + max(t.numel() * t.element_size() for t in tensors)
        return function(*args, **(kwargs or {}))


def count(case):
    """Bytes of the largest tensor of each collective, summed by kind, in one forward and backward pass."""
    recipe = case.recipe()
    place = topology.start(case.layout, 1)
    model, _ = build(case, place)
    batch = slice_of(global_batch(recipe, 0), slice(0, IMAGES), place.device)
    with Counter() as counter:
        per_image, extra, out = objective(model, batch, recipe)
        to_differentiate(per_image, extra, out, IMAGES, IMAGES)[0].backward()
    parallel_state.destroy_model_parallel()
    return counter.sent


def traffic(cases):
    found = [count(case) for case in cases]
    dist.destroy_process_group()
    return found


def of(layout, layers, routing="expert_choice"):
    return Case(layout, 2, routing, batch=IMAGES * 2 // layout.tensor, model=(("layers", layers),))


def test_a_step_sends_what_the_documentation_says():
    tensor, sequence, expert = Layout(tensor=2), Layout(tensor=2, sequence=True), Layout(expert=2)
    cases = [of(tensor, 1), of(tensor, 2), of(sequence, 1), of(sequence, 2), of(expert, 2)]
    dense, both, dense_sequence, both_sequence, experts = run_on_ranks(traffic, 2, cases)[0]
    tokens = IMAGES * TOKENS * WIDTH * 4  # a micro-batch's, in fp32
    block = {kind: both.get(kind, 0) - dense.get(kind, 0) for kind in both}
    assert block["allreduce"] >= 4 * tokens and block["allreduce"] == pytest.approx(4 * tokens, rel=0.1)
    assert block["allgather_base"] == pytest.approx(2 * tokens, rel=0.3)
    moved = {kind: both_sequence[kind] - dense_sequence[kind] for kind in both_sequence}
    gathers = moved["allgather_base"] + moved["reduce_scatter_base"]
    assert gathers == pytest.approx(10 * tokens, rel=0.1)
    rows = 2 * tokens // 2  # of f_c = 2 times the tokens, half go to the other rank
    assert experts["alltoall_base"] == 4 * rows

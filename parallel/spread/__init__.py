"""How a model's layers are spread over ranks: what a model asks for its linears, experts, stages and conditioning.

A model written against a `Spread` knows no rank and no group. `Spread()`, here, is the model on one rank; `ranks.py`
has the same over the groups of a topology.

Under tensor parallelism all tensor ranks have the same micro-batch. Under sequence parallelism each of them holds,
outside of attention and feed-forward layers, the activations of its *own* images alone: an equal, contiguous share.

Shapes: `B` images of a micro-batch, `b` those that this rank holds, `n` tensor ranks, `N` tokens, `D` hidden, `E`
experts, `M` slots, `f` features.
"""

from collections.abc import Callable

from torch import Tensor, nn

from parallel.fp8_rows import Fp8Rows, plain
from parallel.layers import Linear, Linears, PlainLinears
from parallel.parameters import Split, is_whole
from parallel.precision import Fp8

ExpertFfn = Callable[[Tensor, Tensor, Tensor], Tensor]  # rows (e, R, D), up (e, F, D), down (e, D, F) -> (e, R, D)
ExpertFunction = Callable[[Tensor, int], Tensor]  # rows (e, rows, D) of the e experts of a chunk, its number -> same


class LocalExchange:
    """Slots whose experts are all here: nothing travels. See `parallel.dispatch.Exchange`."""

    chunks = 1

    def __init__(self, experts: int):
        self._experts = experts

    def arrange(self, of_slot: Tensor) -> Tensor:
        """Values of slots (M,), expert-major, in the order of the rows."""
        return of_slot

    def __call__(self, rows: Tensor | Fp8Rows, experts: ExpertFunction, **_unneeded: object) -> Tensor:
        """Every slot's row through its expert: (M, D) -> (M, D)."""
        rows = plain(rows)
        return experts(rows.view(self._experts, -1, rows.shape[-1]), 0).flatten(0, 1)


class Spread:
    """All of a model on one rank. `alone`: no other rank has a part of it."""

    alone = True
    tensor_ranks = 1
    tensor_rank = 0
    sequence = False
    first_stage = last_stage = True
    linears: Linears = PlainLinears()
    fp8 = Fp8()
    dispatch_fp8 = False  # whether tokens go to their experts as FP8, also where these are on their own rank

    # ------------------------------------------------------------------------------------------------- what is here

    def layers(self, count: int) -> range:
        """The layers of this rank's pipeline stage, of `count`."""
        return range(count)

    def expert_splits(self, hidden_dim: int) -> tuple[Split, ...]:
        """How an expert weight is cut: dim 0, the experts, over expert ranks; the hidden dimension within experts."""
        return ()

    def exchange(self, experts: int) -> LocalExchange:
        """What takes rows to their experts and back."""
        return LocalExchange(experts)

    def expert_ffns(self, experts: int, width: int, plain: ExpertFfn) -> nn.ModuleList | None:
        """What computes this rank's experts, one module a chunk, where that is a library's: called as `plain` is, which
        computes the same in the model's own type. None: the model's own code does."""
        return None

    def dense_ffn(self, width: int, plain: ExpertFfn) -> nn.Module | None:
        """What computes a dense layer as if it were the only expert; None: two of `linears` with a GELU between do."""
        return None

    def megatron_moe(self, width: int, experts: int, aux_loss: float) -> nn.Module:
        """megatron-core's MoE layer on `own_tokens`, (N, D) -> (N, D). It is made of process groups, so this spread,
        which has none, raises TypeError."""
        raise TypeError("megatron-core's MoE layer needs the groups of a topology")

    def mark_gradients(self, model: nn.Module) -> None:
        """Has megatron-core sum over tensor ranks what each of them has only its own tokens' part of: gradients of
        unsplit weights under sequence parallelism, and always of routers, which read `own_tokens`."""
        for weight in model.parameters():
            partial = self.sequence or (self.tensor_ranks > 1 and weight.reads_own_tokens)
            weight.sequence_parallel = partial and is_whole(weight) and not weight.expert

    # ----------------------------------------------------------------------------------- one stage after the other

    def receive(self, shape: tuple[int, ...], like: Tensor) -> Tensor | None:
        """What the stage before has sent, of this shape, in the type and on the device of `like`; None on the first."""
        return None

    def send(self, hidden: Tensor | None) -> None:
        """Sends it to the next stage, if there is one."""

    def share(self, result: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """The last stage's result of this shape, on all stages."""
        return result

    # ------------------------------------------------------------------------------------ own images and all of them

    def own(self, x: Tensor) -> Tensor:
        """This rank's images of an input without gradient: (B, ...) -> (b, ...)."""
        return x

    def conditioning(self, x: Tensor) -> Tensor:
        """What every block's split layers read, of all images: (b, ...) -> (B, ...).

        Its gradient is summed over the tensor ranks here, once for all layers.
        """
        return x

    def conditioned(self, fan_in: int, fan_out: int, *, bias: bool = False, std: float | None = None) -> nn.Module:
        """A column linear that reads `conditioning`: (B, ..., fan_in) -> (B, ..., fan_out / n)."""
        split = Split(0, self.tensor_rank, self.tensor_ranks)
        return Linear(fan_in, fan_out, bias=bias, std=std, split=split)

    def features(self, x: Tensor) -> Tensor:
        """All features of the images that this rank holds, from a `conditioned` linear's share of the features of all:
        (B, f / n) -> (b, f)."""
        return x

    def collect(self, x: Tensor) -> Tensor:
        """The result of all images, with which every tensor rank then does the same: (b, ...) -> (B, ...)."""
        return x

    # ---------------------------------------------------------------------------------------------- tokens of a MoE

    def own_tokens(self, x: Tensor) -> Tensor:
        """The tokens that this tensor rank routes and no other does, an equal share: (b S, D) -> (N, D)."""
        return x

    def collect_tokens(self, x: Tensor) -> Tensor:
        """The reverse of `own_tokens`."""
        return x

    def gather_scores(self, scores: Tensor) -> Tensor:
        """Scores of all tensor ranks' tokens, for groups that span them: (N, E) -> (n N, E)."""
        return scores

    def mean_over_tokens(self, value: Tensor) -> Tensor:
        """Mean over the tensor ranks of a scalar that each has of its own tokens, with the gradient of that mean."""
        return value

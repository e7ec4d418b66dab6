"""What a run's experts do while it draws: how the compute is spread over tokens, what experts prefer, how they overlap.

Everything is of the conditional halves of the pictures: what the experts do for the empty caption is left out.

Shapes: `V` times, `N` pictures, `S` tokens of an image, `L` text tokens, `E` experts, `W` words, `l` MoE layers.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ecdit.analyze.watch import Pass, watch_attention, watch_routing
from ecdit.errors import UserError
from ecdit.recipe import SampleRecipe
from ecdit.run import Run
from ecdit.sampling import Sampler, Samples


@dataclass
class Study:
    """What was found. `layers`: numbers of the MoE layers among the blocks, from 1.

    samples: the pictures, with experts per token (V, l, N, S). gate_mass (V, l, E): sum over the pictures' tokens of
    the weight with which an expert took part. both (l, E, E): how many tokens two experts both took, the diagonal
    what each took; chance (l, E, E): what it would be if each took as many of a picture's tokens, at random.
    reading (l, E, W): attention that a token taken by the expert gives the word, over what an average token gives it;
    NaN where the expert took no token of a picture whose prompt has the word. words: the W words.
    """

    layers: list[int]
    samples: Samples
    gate_mass: np.ndarray
    both: np.ndarray
    chance: np.ndarray
    words: list[str]
    reading: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        """(V, l, N, S)."""
        return self.samples.experts.numpy()

    @property
    def experts(self) -> int:
        """E."""
        return self.both.shape[-1]

    @property
    def lift(self) -> np.ndarray:
        """(l, E, E): tokens that two experts both took, over chance; NaN where chance is 0, and with oneself."""
        found = np.divide(self.both, self.chance, out=np.full(self.both.shape, np.nan), where=self.chance > 0)
        found[:, np.arange(self.experts), np.arange(self.experts)] = np.nan
        return found

    @property
    def time_profile(self) -> np.ndarray:
        """(V, l, E): an expert's gate mass at a time over its mean over the times; 0 for one that takes no part."""
        mean = self.gate_mass.mean(0)
        return np.divide(self.gate_mass, mean, out=np.zeros_like(self.gate_mass), where=mean > 0)

    def heterogeneity(self) -> dict[str, np.ndarray]:
        """How unevenly a picture's tokens share the experts, each (V, l) and over all pictures.

        unrouted: share of tokens that no expert took. mean, std: experts per token. largest: the largest share of the
        experts that took one token. largest_of_slots: the largest share that one token got of all slots that the
        layer's experts spent on the picture. The paper's 44% can only be the first: a token has at most one slot of
        each expert, so the second is bounded by E over those slots, a few percent.
        """
        counts = self.counts.astype(np.float64)
        slots = np.maximum(counts.sum(-1, keepdims=True), 1)
        return {
            "unrouted": (counts == 0).mean((2, 3)),
            "mean": counts.mean((2, 3)),
            "std": counts.std((2, 3)),
            "largest": counts.max((2, 3)) / self.experts,
            "largest_of_slots": (counts / slots).max((2, 3)),
        }

    def record(self) -> dict[str, Any]:
        """As JSON: what a reader asks for first; the arrays are in the npz."""
        uneven, lift = self.heterogeneity(), self.lift
        layers = [
            {
                "layer": layer,
                "experts": self.experts,
                "unrouted_share": float(uneven["unrouted"][:, i].mean()),
                "experts_per_token": float(uneven["mean"][:, i].mean()),
                "experts_per_token_std": float(uneven["std"][:, i].mean()),
                "largest_share_of_experts": float(uneven["largest"][:, i].max()),
                "largest_share_of_slots": float(uneven["largest_of_slots"][:, i].max()),
                "overlap_over_chance": {
                    "mean": _number(_mean(lift[i])),
                    "largest": self._pair(lift[i], np.nanargmax),
                    "smallest": self._pair(lift[i], np.nanargmin),
                },
                "experts_by_number": [self._expert(i, e) for e in range(self.experts)],
            }
            for i, layer in enumerate(self.layers)
        ]
        return {
            "prompts": self.samples.prompts,
            "seeds": self.samples.seeds,
            "times": self.samples.times,
            "unrouted_share": float(uneven["unrouted"].mean()),
            "largest_share_of_experts": float(uneven["largest"].max()),
            "layers": layers,
        }

    def _pair(self, lift: np.ndarray, pick) -> dict[str, Any] | None:
        if np.isnan(lift).all():
            return None
        a, b = np.unravel_index(pick(lift), lift.shape)
        return {"experts": [int(a), int(b)], "over_chance": float(lift[a, b])}

    def _expert(self, i: int, e: int) -> dict[str, Any]:
        profile, reading = self.time_profile[:, i, e], self.reading[i, e]
        ranked = [w for w in np.argsort(-np.nan_to_num(reading, nan=-1), kind="stable") if not np.isnan(reading[w])]
        return {
            "tokens": int(self.both[i, e, e]),
            "busiest_time": float(self.samples.times[int(profile.argmax())]),
            "busiest_time_over_mean": float(profile.max()),
            "words_over_average": {self.words[w]: float(reading[w]) for w in ranked[:5]},
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """What is saved as npz."""
        return {
            "times": np.array(self.samples.times),
            "layers": np.array(self.layers),
            "experts_per_token": self.counts,
            "gate_mass": self.gate_mass,
            "both": self.both,
            "chance": self.chance,
            "words": np.array(self.words),
            "reading": self.reading,
        }


def study(run: Run, prompts: list[str], n: int, seed: int, settings: SampleRecipe | None = None) -> Study:
    """Draws `n` pictures of each prompt from the run's averaged weights, in Euler steps, and watches its experts.

    Raises UserError for a run whose model has no experts, or none that this can see, and where there is no checkpoint.
    """
    model = run.recipe().model
    if not model.grouped:
        why = "has no experts" if model.routing == "dense" else "routes inside megatron-core, without groups"
        raise UserError(f"{run.folder}: model.routing: {model.routing} {why}; valid here: expert_choice, token_choice")
    sampler = Sampler.from_run(run)
    # Heun asks twice for most times, and its second half-steps are no part of the path
    settings = (settings or sampler.recipe.sample).model_copy(update={"solver": "euler"})
    pairs = [(prompt, seed + i) for i in range(n) for prompt in prompts]  # the first ones differ by their prompt
    seen = _Watcher(sampler, [prompt for prompt, _ in pairs])
    with watch_attention(sampler.model, seen.attention), watch_routing(sampler.model, seen.routing):
        samples = sampler.draw([p for p, _ in pairs], [s for _, s in pairs], settings)
    return seen.result(samples)


@dataclass
class _Watcher:
    """Adds up what the hooks tell; memory does not grow with the steps, but for the counts of experts per token."""

    sampler: Sampler
    prompts: list[str]
    _reads: dict[int, Tensor] = field(default_factory=dict)  # of the pass that is running, by layer
    _first: dict[float, int] = field(default_factory=lambda: defaultdict(int))  # pictures seen, by time
    _counts: dict[float, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    _mass: dict[float, Tensor] = field(default_factory=dict)
    _both: Tensor | float = 0.0
    _chance: Tensor | float = 0.0
    _taken_reading: Tensor | float = 0.0
    _taken: Tensor | float = 0.0
    _all_reading: Tensor | float = 0.0
    _all: Tensor | float = 0.0

    def __post_init__(self):
        words = [self.sampler.text_encoder.words(prompt) for prompt in self.prompts]
        self.words = list(dict.fromkeys(word for prompt in words for word in prompt))
        number = {word: w for w, word in enumerate(self.words)}
        length = self.sampler.recipe.model.text_tokens
        self._place = torch.zeros(len(words), length, len(self.words))  # (N, L, W): which word stands where
        for n, prompt in enumerate(words):
            for at, word in enumerate(prompt):
                self._place[n, at, number[word]] = 1.0

    def attention(self, layer: int, probabilities: Tensor) -> None:
        """(2 b, S, L)."""
        self._reads[layer] = probabilities[0::2]

    def routing(self, seen: Pass) -> None:
        """One time, for the next b pictures, each a conditional and an unconditional row, and for what fills up the
        last batch, which does not count."""
        t, tokens = float(seen.times[0]), self.sampler.recipe.model.tokens
        rows = len(seen.times) // 2
        place = self._place[self._first[t] : self._first[t] + rows].to(seen.times.device)
        wanted = slice(len(place))
        taken = torch.stack([r.taken.view(rows, 2, tokens, -1)[wanted, 0] for r in seen.layers]).float()
        gates = torch.stack([r.gates.view(rows, 2, tokens, -1)[wanted, 0] for r in seen.layers])
        self._first[t] += len(place)  # both (l, b, S, E)
        self._counts[t].append(taken.sum(-1).to("cpu", torch.uint8))
        self._mass[t] = self._mass.get(t, 0) + gates.sum((1, 2)).cpu()
        of_expert = taken.sum(2)  # (l, b, E)
        self._both += torch.einsum("lbse,lbsf->lef", taken, taken).double().cpu()
        self._chance += (torch.einsum("lbe,lbf->lef", of_expert, of_expert) / tokens).double().cpu()
        self._read(torch.stack([self._reads[r.layer][wanted] for r in seen.layers]), taken, place)

    def _read(self, reads: Tensor, taken: Tensor, place: Tensor) -> None:
        """reads (l, b, S, L), taken (l, b, S, E), place (b, L, W). Sums over pictures whose prompt has the word."""
        of_word = torch.einsum("lbsi,biw->lbsw", reads, place)
        present = place.amax(1)  # (b, W)
        self._taken_reading += torch.einsum("lbse,lbsw->lew", taken, of_word).double().cpu()
        self._taken += torch.einsum("lbe,bw->lew", taken.sum(2), present).double().cpu()
        self._all_reading += of_word.sum((1, 2)).double().cpu()
        self._all += (present.sum(0) * reads.shape[2]).double().cpu()

    def result(self, samples: Samples) -> Study:
        """With the pictures that were drawn meanwhile."""
        times = sorted(self._counts)
        samples.times, samples.experts = times, torch.stack([torch.cat(self._counts[t], dim=1) for t in times])
        average = (self._all_reading / self._all)[:, None]
        reading = self._taken_reading / self._taken / average  # 0 / 0: NaN
        model = self.sampler.recipe.model
        return Study(
            layers=[layer + 1 for layer in range(model.layers) if model.sparse(layer)],
            samples=samples,
            gate_mass=torch.stack([self._mass[t] for t in times]).numpy(),
            both=self._both.numpy(),
            chance=self._chance.numpy(),
            words=self.words,
            reading=reading.numpy(),
        )


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return None if np.isnan(value) else value

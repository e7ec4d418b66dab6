"""EC-DiT as a diffusers pipeline: prompts in, pictures out. It needs torch, numpy and diffusers, and travels with the
exported weights; `modeling_ecdit.py` beside them is the network.

A picture is a function of its prompt, its seed and the settings, whatever else is drawn with it: an image's
conditional and unconditional row form one routing group, its noise comes from a counter-based generator, a forward pass
always has `batch` pictures, filled up where there are fewer, and the encoders one, so that all are rounded alike.

Shapes: `N` pictures, `B` of them at once, `L` text tokens, `Y` width of the text embedding, `c` latent channels.
"""

import hashlib
import math
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor


class EcDitPipeline(DiffusionPipeline):
    """`text_encoder` and `tokenizer` are None for the hashed words, `vae` is None where pixels are the latents.

    The numbers are the defaults of a call."""

    _optional_components = ["vae", "text_encoder", "tokenizer"]  # noqa: RUF012 (diffusers reads a list)
    model_cpu_offload_seq = "text_encoder->transformer->vae"

    def __init__(
        self,
        transformer,
        vae=None,
        text_encoder=None,
        tokenizer=None,
        steps: int = 50,
        solver: str = "euler",
        guidance: float = 5.0,
        shift: float = 1.0,
        batch: int = 1,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer)
        self.register_to_config(steps=steps, solver=solver, guidance=guidance, shift=shift, batch=batch)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        seed: int | list[int] = 0,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        solver: str | None = None,
        shift: float | None = None,
        batch: int | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """One picture for each prompt. seed: of the noise, one for all or one each. latents (N, c, h, w): noise to
        start from instead. output_type: pil, np, pt (pictures in [0, 1]), or latent."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        seeds = [seed] * len(prompts) if isinstance(seed, int) else list(seed)
        config, size = self.transformer.config, or_else(batch, self.config.batch)
        noise = draw_noise(seeds, config.channels, config.side) if latents is None else latents
        count = or_else(num_inference_steps, self.config.steps)
        if min(size, count) < 1:
            raise ValueError(f"batch: {size} and num_inference_steps: {count} must be at least 1")
        steps = list(pairwise(time_grid(count, or_else(shift, self.config.shift))))
        found = []
        with self.progress_bar(total=len(steps) * -(-len(prompts) // size)) as progress:
            for first in range(0, len(prompts), size):
                part = [min(row, len(prompts) - 1) for row in range(first, first + size)]
                start = noise[part].to(self._execution_device, torch.float32)
                for x in self.denoise([prompts[row] for row in part], start, steps, guidance_scale, solver):
                    drawn = x
                    progress.update()
                drawn = drawn[: len(prompts) - first]
                found += [drawn] if output_type == "latent" else [self.decode(one) for one in drawn.split(1)]
        self.maybe_free_model_hooks()
        images = torch.cat(found)
        if output_type != "latent":
            images = VaeImageProcessor().postprocess(images, output_type=output_type)
        return ImagePipelineOutput(images=images)

    def denoise(
        self,
        prompts: list[str],
        x: Tensor,
        steps: list[tuple[float, float]],
        guidance_scale: float | None = None,
        solver: str | None = None,
    ) -> Iterator[Tensor]:
        """Latents (B, c, h, w) after each of the steps, from noise x; a step is its two times."""
        guidance, heun = or_else(guidance_scale, self.config.guidance), (solver or self.config.solver) == "heun"
        encoded = [self.encode([caption, ""], x.device) for caption in prompts]
        text, mask = (torch.cat(parts) for parts in zip(*encoded, strict=True))

        def velocity(x: Tensor, t: float) -> Tensor:
            pairs = x.repeat_interleave(2, dim=0)
            at = torch.full((len(pairs),), t, device=x.device)
            out = self.transformer(pairs, at, text, mask, 2 * self.transformer.tokens)
            return torch.lerp(out[1::2], out[0::2], guidance)

        for t, after in steps:
            v = velocity(x, t)
            if heun:
                v = (v + velocity(x + (after - t) * v, after)) / 2
            x = x + (after - t) * v
            yield x

    def encode(self, captions: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """(B, L, Y) in fp32 and (B, L), True where a token is real."""
        tokens, width = self.transformer.config.text_tokens, self.transformer.config.text_width
        if self.text_encoder is None:
            text, mask = hash_words(captions, tokens, width)
            return text.to(device), mask.to(device)
        batch = self.tokenizer(captions, padding="max_length", truncation=True, max_length=tokens, return_tensors="pt")
        mask = batch["attention_mask"].to(device).bool()
        mask[:, 0] = True  # a tokenizer without an end token makes nothing of the empty caption
        out = self.text_encoder(input_ids=batch["input_ids"].to(device), attention_mask=mask.long())
        return out.last_hidden_state.float() * mask[..., None], mask

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures in [-1, 1], (N, 3, R, R)."""
        if self.vae is None:
            return latents
        latents = latents / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)
        return self.vae.decode(latents.to(self.vae.dtype)).sample.float()


def or_else(given: float | None, default: float) -> float:
    """What was given, also where it is 0."""
    return default if given is None else given


def time_grid(steps: int, shift: float) -> list[float]:
    """steps + 1 times from noise (0) to data (1); `shift` > 1 spends more of them near noise (Stable Diffusion 3)."""
    noise = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return (1 - shift * noise / (1 + (shift - 1) * noise)).tolist()


def hash_words(captions: list[str], tokens: int, width: int) -> tuple[Tensor, Tensor]:
    """A fixed embedding of words: each a random vector drawn from its hash, plus sine-cosine features of its place."""
    half = torch.arange((width + 1) // 2, dtype=torch.float64)
    angles = torch.arange(tokens)[:, None] * torch.exp(-math.log(10_000.0) * half / len(half))
    places = (0.5 * math.sqrt(2) * torch.cat([angles.sin(), angles.cos()], dim=-1)[:, :width]).float()
    text, mask = torch.zeros(len(captions), tokens, width), torch.zeros(len(captions), tokens, dtype=torch.bool)
    for row, caption in enumerate(captions):
        words = "".join(letter if letter.isalnum() else " " for letter in caption.lower()).split()
        for place, word in enumerate(["<s>", *words][:tokens]):
            key = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=16).digest(), "little")
            vector = np.random.Generator(np.random.Philox(key=key)).standard_normal(width, np.float32)
            text[row, place] = torch.from_numpy(vector) + places[place]
            mask[row, place] = True
    return text, mask


def draw_noise(seeds: list[int], channels: int, side: int) -> Tensor:
    """Standard normals (N, c, h, w), each picture's from its own seed: Philox 4x32-10 (Salmon et al. 2011), whose
    counter is the seed and the number of the block, then Box-Muller."""
    wanted = channels * side**2
    blocks = np.arange(-(-wanted // 4), dtype=np.uint64)[None, :]
    of_seed = np.array(seeds, dtype=np.uint64)[:, None]
    low = np.uint64(0xFFFFFFFF)
    counter = np.broadcast_arrays(of_seed & low, of_seed >> np.uint64(32), blocks, np.uint64(0))
    key = int.from_bytes(hashlib.blake2b(b"0\0sample", digest_size=8).digest(), "little")
    words = torch.from_numpy(np.stack(_philox(counter, key), axis=-1).astype(np.int64)).flatten(1)
    unit = (((words >> 8).float() + 0.5) * 2.0**-24).clamp_(max=1 - 2.0**-24)
    radius, angle = (-2.0 * unit[:, 0::2].log()).sqrt(), 2 * math.pi * unit[:, 1::2]
    normals = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1).flatten(1)
    return normals[:, :wanted].reshape(len(seeds), channels, side, side)


def _philox(counter: list[np.ndarray], key: int) -> list[np.ndarray]:
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    a, b, c, d = counter
    first, second = key & 0xFFFFFFFF, key >> 32
    for _ in range(10):
        p, q = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
        a, b = (q >> shift) ^ b ^ np.uint64(first), q & low
        c, d = (p >> shift) ^ d ^ np.uint64(second), p & low
        first, second = (first + 0x9E3779B9) & 0xFFFFFFFF, (second + 0xBB67AE85) & 0xFFFFFFFF
    return [a, b, c, d]

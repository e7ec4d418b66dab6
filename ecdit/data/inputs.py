"""A batch's samples to what the model reads: latents and text embeddings, from whatever the shards hold.

Latents come from the shards or from the autoencoder, embeddings from the shards or from the text encoder. Captions are
dropped, and posteriors sampled, by counter-based draws of the step and the position in the global batch.

Shapes: `b` samples, `c` latent channels, `h` latents a side, `L` text tokens, `Y` their width.
"""

import sys

import torch
from torch import Tensor

from ecdit.data.cache import CacheSettings, default_folder
from ecdit.data.encoded import Encoded
from ecdit.data.encoders import check_latents, load_checked_autoencoder, load_text_encoder
from ecdit.data.pretrained import of_posterior
from ecdit.data.samples import Samples, pad
from ecdit.data.stream import TrainStream
from ecdit.diffusion.draws import dropped_captions, posterior_noise
from ecdit.errors import UserError
from ecdit.recipe import Recipe
from ecdit.recipe_data import DataRecipe
from parallel.device import to_device
from parallel.frozen import shard_frozen
from parallel.topology import Topology


class Inputs:
    """The recipe's way from samples to inputs. Encoders are loaded only for what the shards do not hold,
    and for pictures that are drawn in training; `autoencoder` and `text_encoder` are None where they are not.

    Raises UserError where the encoders, or those of the shards, are not what the recipe and the model are made for.
    """

    def __init__(self, recipe: Recipe, encoded: Encoded, place: Topology, dtype: torch.dtype):
        self._recipe, self._encoded, self._place = recipe, encoded, place
        data, model, draws = recipe.data, recipe.model, recipe.log.grid_every > 0
        self.autoencoder = self.text_encoder = self._empty = None
        if encoded.pictures is not None:
            _check_pictures(recipe, encoded)
        if encoded.text is not None:
            _check_text(recipe, encoded)
        if encoded.pictures is None or draws:
            self.autoencoder = load_checked_autoencoder(recipe, place.device, dtype)
        if encoded.text is None or draws:
            self.text_encoder = load_text_encoder(
                data.text_encoder, width=model.text_width, tokens=model.text_tokens, device=place.device, dtype=dtype
            )
            if hasattr(self.text_encoder, "model"):
                self._place_text_encoder()
        if encoded.text is not None:
            empty, mask = pad([encoded.text.empty_embedding()], model.text_tokens)
            self._empty = empty.to(place.device), mask.to(place.device)

    def _place_text_encoder(self) -> None:
        """Spreads it over the ranks where that is asked for; compiles it on a GPU else."""
        place, recipe = self._place, self._recipe
        if recipe.data.shard_encoders:
            shard_frozen(self.text_encoder.model, place)
        elif place.device.type == "cuda":
            compiled = self.text_encoder.compile(recipe.train.micro_batch // recipe.parallel.tensor)
            if place.first and not compiled:
                print("The text encoder could not be compiled and runs as it is, about half as fast.", file=sys.stderr)

    def latents(self, step: int, samples: Samples, positions: Tensor) -> Tensor:
        """(b, c, h, h) in fp32. positions (b,) on the CPU."""
        device = self._place.device
        noise = None
        if self._recipe.data.posterior == "sample":
            noise = posterior_noise(self._recipe, step, to_device(positions, device))
        if self._encoded.pictures is not None:
            mean, stored = samples.mean.to(device).float(), self._encoded.pictures
            logvar = None if noise is None else samples.logvar.to(device).float()
            return (of_posterior(mean, logvar, noise) - stored.shift) * stored.scale
        images = samples.image.to(device)

        def encode(rows: slice) -> tuple[Tensor]:
            return (self.autoencoder.encode(images[rows], None if noise is None else noise[rows]).float(),)

        pretrained = hasattr(self.autoencoder, "model")
        return (self._place.shared(len(images), encode) if pretrained else encode(slice(None)))[0]

    def text(self, step: int, samples: Samples, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(b, L, Y) in fp32, and (b, L), True where a token is real; the empty caption's where captions are dropped."""
        return self._text(samples, dropped_captions(self._recipe, step, positions))

    def whole_text(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """As `text`, with every caption."""
        return self._text(samples, torch.zeros(len(samples.keys), dtype=torch.bool))

    def _text(self, samples: Samples, dropped: Tensor) -> tuple[Tensor, Tensor]:
        if self._encoded.text is not None:
            device = self._place.device
            drop = to_device(dropped, device)[:, None]
            text, mask = samples.text.to(device), samples.text_mask.to(device)
            empty, empty_mask = self._empty
            return torch.where(drop[..., None], empty, text).float(), torch.where(drop, empty_mask, mask)
        captions = ["" if drop else c for drop, c in zip(dropped.tolist(), samples.captions, strict=True)]
        if not hasattr(self.text_encoder, "model"):
            return self.text_encoder(captions)
        return self._place.shared(len(captions), lambda rows: self.text_encoder(captions[rows]))


def open_stream(recipe: Recipe, data_rank: int, data_ranks: int) -> TrainStream:
    """The recipe's data for one rank; shards are checked first. Raises UserError for what is missing or damaged."""
    data = recipe.data
    return TrainStream(
        [stream.path for stream in data.streams],
        shares=data.shares,
        batch=recipe.train.batch,
        text_tokens=recipe.model.text_tokens,
        data_rank=data_rank,
        data_ranks=data_ranks,
        nodes=data.canonical_nodes,
        seed=recipe.train.seed,
        shuffle=data.shuffle,
        workers=data.workers,
        resolution=data.resolution,
        cache=cache_settings(data),
        predownload=data.cache.predownload,
    )


def cache_settings(data: DataRecipe) -> CacheSettings:
    """Where shards are cached."""
    limit = data.cache.limit
    return CacheSettings(data.cache_folder or default_folder(), None if limit is None else int(limit * 2**30))


def _check_pictures(recipe: Recipe, encoded: Encoded) -> None:
    stored, data = encoded.pictures, recipe.data
    if stored.autoencoder != data.autoencoder:
        raise UserError(
            f"data.autoencoder: {data.autoencoder} is not the one that the shards' latents come from, which is "
            f"{stored.autoencoder}; set it to that, for pictures are drawn with it"
        )
    if data.posterior == "sample" and stored.latents == "sample":
        raise UserError("data.posterior: sample needs shards with mean and log-variance; these hold one sample: mode")
    check_latents(recipe, stored.channels, stored.factor)


def _check_text(recipe: Recipe, encoded: Encoded) -> None:
    stored, model = encoded.text, recipe.model
    if stored.text_encoder != recipe.data.text_encoder:
        raise UserError(
            f"data.text_encoder: {recipe.data.text_encoder} is not the one that the shards' embeddings come from, "
            f"which is {stored.text_encoder}; set it to that, for prompts are read with it"
        )
    if model.text_width != stored.width:
        raise UserError(
            f"model.text_width: {model.text_width} does not fit the shards' embeddings, which have {stored.width}"
        )
    if stored.tokens > model.text_tokens:
        raise UserError(
            f"model.text_tokens: {model.text_tokens} is under the {stored.tokens} that the shards' embeddings may have"
        )

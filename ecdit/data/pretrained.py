"""Pretrained encoders, frozen: text encoders through transformers, AutoencoderKL through diffusers.

Shapes: `B` images or captions, `L` text tokens, `Y` width of the text embedding, `c` latent channels, `R` pixels and
`h` latents a side.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ecdit.data.torchvision_guard import hide_broken_torchvision
from ecdit.errors import UserError
from parallel.device import to_device

# transformers' class for each kind of text encoder, by its configuration's model_type
KINDS = {
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "t5gemma": "T5GemmaEncoderModel",
    "clip": "CLIPTextModel",
    "clip_text_model": "CLIPTextModel",
}
TEXT, PICTURES = "data.text_encoder", "data.autoencoder"


class PretrainedText:
    """A T5, T5Gemma or CLIP text encoder; captions are cut at L tokens. Runs in `dtype`, answers in fp32.

    Raises UserError where it cannot be had, is of another kind, or has fewer places than L.
    """

    def __init__(self, name: str, tokens: int, device: torch.device, dtype: torch.dtype):
        transformers = _package("transformers", TEXT, name)
        where = {"local_files_only": is_local(TEXT, name)}
        load = loader(TEXT, name, "a text encoder with its tokenizer")
        config = load(transformers.AutoConfig.from_pretrained, name, **where)
        kind = config.model_type
        if kind not in KINDS:
            raise UserError(f"{TEXT}: {name!r} is of the kind {kind!r}; valid: {', '.join(KINDS)}")
        if kind == "t5gemma":
            config.is_encoder_decoder = False  # or its encoder alone is refused
        if kind == "clip":
            config = config.text_config
        self._tokenizer = load(transformers.AutoTokenizer.from_pretrained, name, padding_side="right", **where)
        architecture = getattr(transformers, KINDS[kind])
        model = load(architecture.from_pretrained, name, config=config, dtype=dtype, **where)
        places = config.max_position_embeddings if kind.startswith("clip") else tokens
        if tokens > places:
            raise UserError(f"model.text_tokens: {tokens} is more than the {places} places of {TEXT}: {name}")
        self.model: nn.Module = model.to(device).eval().requires_grad_(False)
        self._run: Callable[..., Any] = self.model
        self.width: int = model.get_input_embeddings().embedding_dim
        self.tokens, self.device = tokens, device

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """(B, L, Y) and (B, L), True where a token is real."""
        batch = self._tokenizer(
            captions, padding="max_length", truncation=True, max_length=self.tokens, return_tensors="pt"
        )
        tokens, mask = (to_device(batch[key], self.device) for key in ("input_ids", "attention_mask"))
        mask = mask.bool()
        mask[:, 0] = True  # a tokenizer without an end token makes nothing of the empty caption
        out = self._run(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        return out.float() * mask[..., None], mask

    def words(self, caption: str) -> list[str]:
        """What the caption's tokens stand for, without the tokenizer's marks of where words begin and end."""
        pieces = self._tokenizer(caption, truncation=True, max_length=self.tokens)["input_ids"]
        names = self._tokenizer.convert_ids_to_tokens(pieces)
        return [name.lstrip("▁").removesuffix("</w>") or name for name in names]

    def save(self, folder: Path) -> dict[str, str]:
        """The model and the tokenizer, into folders of a diffusers pipeline; their classes, by name of the part."""
        self.model.save_pretrained(folder / "text_encoder")
        self._tokenizer.save_pretrained(folder / "tokenizer")
        return {"text_encoder": type(self.model).__name__, "tokenizer": type(self._tokenizer).__name__}

    def compile(self, captions: int) -> bool:
        """Compiles the model for so many captions at a time: it is nearly twice as fast then on a GPU. Returns False,
        and leaves it as it is, where that cannot be done (without a C compiler, say)."""
        self._run = torch.compile(self.model)
        try:
            self([""] * captions)
        except Exception:  # the compiler's errors are of many kinds, and none is worth a run
            self._run = self.model
        return self._run is not self.model


class KlLatents:
    """An AutoencoderKL. Its latents are scaled and shifted as its configuration says: (raw - shift) * scale."""

    def __init__(self, name: str, device: torch.device, dtype: torch.dtype):
        diffusers = _package("diffusers", PICTURES, name)
        load = loader(PICTURES, name, "an AutoencoderKL")
        local = is_local(PICTURES, name)
        subfolder = {"subfolder": "vae"} if local and (Path(name) / "vae").is_dir() else {}
        model = load(
            diffusers.AutoencoderKL.from_pretrained, name, torch_dtype=dtype, local_files_only=local, **subfolder
        )
        self.model: nn.Module = model.to(device).eval().requires_grad_(False)
        self._dtype = dtype
        self.channels: int = model.config.latent_channels
        self.factor: int = 2 ** (len(model.config.block_out_channels) - 1)
        self.scale: float = model.config.scaling_factor
        self.shift: float = model.config.shift_factor or 0.0

    @torch.no_grad()
    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, R, R) uint8 -> mean and log-variance (B, c, h, h), raw, in fp32."""
        found = self.model.encode((images.float() / 127.5 - 1).to(self._dtype)).latent_dist
        return found.mean.float(), found.logvar.float()

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """(B, 3, R, R) uint8 -> (B, c, h, h): the posterior's mode, or with noise (B, c, h, h) a sample of it."""
        mean, logvar = self.posterior(images)
        return (of_posterior(mean, logvar, noise) - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """(B, c, h, h) -> (B, 3, R, R) uint8."""
        return to_bytes(self.model.decode((latents / self.scale + self.shift).to(self._dtype)).sample)

    def save(self, folder: Path) -> dict[str, str]:
        """Into a folder of a diffusers pipeline; its class, by name of the part."""
        self.model.save_pretrained(folder / "vae")
        return {"vae": type(self.model).__name__}


def of_posterior(mean: Tensor, logvar: Tensor, noise: Tensor | None) -> Tensor:
    """The mode, or with noise a sample; all (B, c, h, h)."""
    return mean if noise is None else mean + torch.exp(0.5 * logvar) * noise


def to_bytes(pictures: Tensor) -> Tensor:
    """[-1, 1] -> uint8, cut off beyond."""
    return ((pictures.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def _package(package: str, key: str, name: str) -> Any:
    hide_broken_torchvision()
    try:
        return __import__(package)
    except ImportError:
        raise UserError(f"{key}: {name!r} needs the package {package}; install the extra `ecdit[encoders]`") from None


def is_local(key: str, name: str) -> bool:
    """Whether the name is a folder. Raises UserError where it looks like one and is not there."""
    path = Path(name).expanduser()
    if path.is_dir():
        return True
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        offline = {TEXT: "hash, ", PICTURES: "pixels, "}.get(key, "")
        raise UserError(f"{key}: {name!r}: no such folder; valid: {offline}a local folder, or a hub name")
    return False


def loader(key: str, name: str, kind: str) -> Callable[..., Any]:
    """Calls a `from_pretrained` with its many errors turned into one UserError."""

    def load(from_pretrained: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return from_pretrained(*args, **kwargs)
        except Exception as error:
            cause = " ".join(str(error).split())[:300]
            raise UserError(f"{key}: {name!r} cannot be loaded as {kind}: {cause}") from None

    return load

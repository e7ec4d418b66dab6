"""CLIP scores: how well a picture fits its prompt, by the cosine of their CLIP embeddings.

Shapes: `N` pictures of `R` pixels a side, each with its text; `B` at once.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ecdit.data.pretrained import is_local, loader
from ecdit.data.torchvision_guard import hide_broken_torchvision
from ecdit.evaluate.suite import Judgement, Options, Row, device, needed, packages, whole
from ecdit.pictures import read_pixels
from ecdit.prompts import Request, read_lines, repeat
from ecdit.recipe import Recipe

B = 64


class Clip:
    """A CLIP from a local folder or a hub name (transformers). Raises UserError where it cannot be had."""

    def __init__(self, name: str):
        hide_broken_torchvision()
        from transformers import CLIPModel, CLIPProcessor

        load, local = loader("--clip", name, "a CLIP with its processor"), is_local("--clip", name)
        # not the fast one, which torchvision must be there for: a score shall not depend on that
        self._processor = load(CLIPProcessor.from_pretrained, name, local_files_only=local, use_fast=False)
        self._model = whole(
            "--clip", name, load(CLIPModel.from_pretrained, name, local_files_only=local, output_loading_info=True)
        ).requires_grad_(False)

    @torch.no_grad()
    def scores(self, pictures: list[Path], texts: list[str]) -> Tensor:
        """(N,): 100 max(cos, 0) of each picture and its text (Hessel et al. 2021 with weight 100, as is usual)."""
        self._model.to(device())
        parts = [self._scores(pictures[i : i + B], texts[i : i + B]) for i in range(0, len(pictures), B)]
        return torch.cat(parts)

    def _scores(self, pictures: list[Path], texts: list[str]) -> Tensor:
        limit = self._model.config.text_config.max_position_embeddings
        images = [read_pixels(path).permute(2, 0, 1) for path in pictures]
        inputs = self._processor(
            text=texts, images=images, return_tensors="pt", padding=True, truncation=True, max_length=limit
        ).to(device())
        image = self._model.get_image_features(pixel_values=inputs["pixel_values"])
        text = self._model.get_text_features(inputs["input_ids"], inputs["attention_mask"])
        return (100 * torch.cosine_similarity(image, text)).clamp(min=0).cpu()


def captions(suite: str, options: Options) -> list[Request]:
    """The prompts of `--prompts`, `n` pictures of each, one if not given, with the file's seeds where it has any."""
    file = needed(suite, "--prompts", options.prompts, "a file of captions, such as 30,000 of MS-COCO, one a line")
    lines, n = read_lines(file), options.n or 1
    own = [None if seed is None else seed + i for _, seed in lines for i in range(n)]
    requests = repeat([prompt for prompt, _ in lines], n, options.seed)
    return [
        request if seed is None else Request(request.prompt, seed) for request, seed in zip(requests, own, strict=True)
    ]


class ClipSuite:
    """The mean CLIP score of captions' pictures. See `ecdit.evaluate.suite.Suite`."""

    def __init__(self, options: Options, recipe: Recipe):
        packages("clip", "transformers")
        self._name = needed("clip", "--clip", options.clip, "a CLIP's local folder or hub name")
        self._requests = captions("clip", options)

    def requests(self) -> list[Request]:
        """`n` pictures a caption."""
        return self._requests

    def load(self) -> None:
        """The CLIP."""
        self._clip = Clip(self._name)

    def judge(self, pictures: list[Path]) -> Judgement:
        """Each picture against its caption."""
        scores = self._clip.scores(pictures, [request.prompt for request in self._requests]).tolist()
        mean = sum(scores) / len(scores)
        summary = {"suite": "clip", "clip_score": mean, "clip": self._name, "pictures": len(scores)}
        return Judgement(summary, [{"clip": score} for score in scores])

    @staticmethod
    def rows(scores: dict[str, Any]) -> list[Row]:
        """The mean."""
        return [Row("CLIP score", f"{scores['clip_score']:.2f}", str(scores["pictures"]), "clip_score")]

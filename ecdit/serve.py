"""A page that draws what is typed: the picture as it appears over the steps, and where the experts work on it.

Shapes: `R` pixels a side, `S` tokens of an image.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image
from torch import Tensor

from ecdit.errors import UserError
from ecdit.prompts import check_seed
from ecdit.run import Run
from ecdit.sampling import Sampler, sample_settings

SHOWN = 12  # states of a picture that are decoded and sent, however many steps there are
SIDE = 512  # pixels that small pictures are enlarged to
MOST_STEPS = 250


def load_gradio() -> Any:
    """Raises UserError where the extra is missing."""
    try:
        import gradio
    except ImportError:
        raise UserError("ecdit serve needs the package gradio; install the extra `ecdit[serve]`") from None
    return gradio


def serve(folder: Path, host: str, port: int) -> None:
    """Serves the run until Ctrl-C. Raises UserError where there is no run, no checkpoint, or the port is taken."""
    gradio = load_gradio()
    app = build(Sampler.from_run(Run(folder)), folder.name)
    try:
        app.launch(server_name=host, server_port=port, **looks(gradio))
    except OSError as error:
        raise UserError(
            f"--port: {port} on {host} cannot be served: {_why(error)}; try another --port, or --host 127.0.0.1"
        ) from None
    except KeyboardInterrupt:  # gradio minds it once the page is served; it may come a moment before
        app.close()


def _why(error: OSError) -> str:
    """Gradio says no more than that it found no port."""
    return error.strerror or "another program has the port, or the address is not of this machine"


def looks(gradio: Any) -> dict[str, Any]:
    """Fonts of the system, so that the page asks no other host for any."""
    font, mono = (gradio.themes.Font(name) for name in ("system-ui", "monospace"))
    return {"theme": gradio.themes.Default(font=font, font_mono=mono), "footer_links": []}


def build(sampler: Sampler, name: str) -> Any:
    """The page, not yet served."""
    gradio = load_gradio()
    defaults, sparse = sampler.recipe.sample, sampler.recipe.model.grouped
    with gradio.Blocks(title=f"EC-DiT: {name}", analytics_enabled=False) as app:
        gradio.Markdown(f"# {name}")
        with gradio.Row():
            prompt = gradio.Textbox(label="Prompt", value=sampler.recipe.log.prompts[0], scale=4, autofocus=True)
            button = gradio.Button("Draw", variant="primary")
        with gradio.Row():
            seed = gradio.Number(label="Seed", value=0, precision=0)
            steps = gradio.Slider(1, MOST_STEPS, value=min(defaults.steps, MOST_STEPS), step=1, label="Steps")
            guidance = gradio.Slider(0, 15, value=min(defaults.guidance, 15), step=0.5, label="Guidance")
        with gradio.Row():
            plain = {"format": "png", "interactive": False, "buttons": ["download", "fullscreen"]}  # not: share
            picture = gradio.Image(label="Picture", **plain)
            heat = gradio.Image(label="Experts per token (dark: none, bright: many)", visible=sparse, **plain)
        told = gradio.Textbox(label="State", interactive=False)

        def draw(prompt: str, seed: float, steps: float, guidance: float) -> Iterator[tuple]:
            try:
                yield from states(sampler, prompt, int(seed or 0), int(steps), float(guidance))
            except UserError as error:
                raise gradio.Error(str(error), print_exception=False) from None

        inputs, outputs = [prompt, seed, steps, guidance], [picture, heat, told]
        gradio.on([button.click, prompt.submit], draw, inputs, outputs, api_name="draw", show_progress="hidden")
    return app


def states(
    sampler: Sampler, prompt: str, seed: int, steps: int, guidance: float
) -> Iterator[tuple[Image.Image, Image.Image | None, str]]:
    """The picture, the heat map over it (None for a model without groups) and what to say, at most SHOWN times and at
    the end. The last picture is what `ecdit sample` draws. Raises UserError for a bad number."""
    check_seed(seed)
    settings = sample_settings(sampler.recipe, steps=steps, guidance=guidance)
    shown = set(np.linspace(1, steps, min(steps, SHOWN)).round().astype(int).tolist())
    counts: list[Tensor] = []
    count = (lambda _, experts: counts.append(experts[:, 0])) if sampler.recipe.model.grouped else None
    for step, (t, latents) in enumerate(sampler.denoise([prompt], [seed], settings, count), start=1):
        if step in shown:
            image = sampler.decode(latents)[0].numpy()
            now = _heat(image, counts[-1].float().mean(0)) if counts else None
            yield _enlarged(image), now, f"step {step} of {steps}, t = {t:.2f}"


def _heat(image: np.ndarray, experts: Tensor) -> Image.Image:
    """Mean over the layers of the experts per token (S,) in colours over the grey picture (R, R, 3): black 0, white
    twice the mean."""
    side = round(experts.numel() ** 0.5)
    scaled = (experts / (2 * experts.mean())).clamp(0, 1).view(side, side).numpy()
    colours = Image.fromarray((matplotlib.colormaps["inferno"](scaled)[..., :3] * 255).astype(np.uint8))
    grey = Image.fromarray(image).convert("L").convert("RGB")
    return Image.blend(_enlarged(np.asarray(grey)), colours.resize(_size(image), Image.Resampling.NEAREST), 0.7)


def _enlarged(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image).resize(_size(image), Image.Resampling.NEAREST)


def _size(image: np.ndarray) -> tuple[int, int]:
    factor = max(1, SIDE // image.shape[0])
    return image.shape[1] * factor, image.shape[0] * factor

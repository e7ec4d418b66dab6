"""What tests on GPUs share."""

import torch

from ecdit.callbacks import Callback


def differences(found, expected):
    """Largest relative difference of a loss, a gradient of the first step, and a weight after the last."""
    losses = max(abs(a - b) / abs(b) for a, b in zip(found[0], expected[0], strict=True))
    gradients = max(((found[1][0][n] - g).norm() / g.norm()).item() for n, g in expected[1][0].items())
    weights = max(((found[2][n] - w).norm() / w.norm()).item() for n, w in expected[2].items())
    return losses, gradients, weights


class Curve(Callback):
    """Keeps the losses; from the third to the sixth step, whatever makes the host wait is an error."""

    def __init__(self):
        self.losses: list[float] = []

    def on_step(self, trainer, record):
        self.losses.append(record["loss"])
        if record["step"] in (3, 6):
            torch.cuda.set_sync_debug_mode("error" if record["step"] == 3 else "default")

    def on_message(self, message):
        print(message)

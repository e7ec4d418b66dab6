"""The learning rate as a function of the step."""

import math


def learning_rate(step: int, *, lr: float, warmup: int, steps: int, kind: str) -> float:
    """Rate of step `step`, counted from 0: linear over `warmup` steps, then constant, or a cosine to 0 at `steps`."""
    if step < warmup:
        return lr * (step + 1) / warmup
    if kind == "constant":
        return lr
    done = (step - warmup) / max(1, steps - warmup)
    return lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

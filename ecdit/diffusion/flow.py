"""Rectified flow: the path from noise to data, the density of the training time, the loss (1).

Time runs from noise (t = 0) to data (t = 1). The paper prints t = log(u / (1 - u)) for u normal, the inverse of what
it means: t is logit-normal, t = sigmoid(u) (Esser et al. 2024).

Shapes: `B` images, `c` latent channels, `K` tokens, `P` numbers in a patch.
"""

import math

import torch
from torch import Tensor


def interpolate(x: Tensor, eps: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """x_t = t x + (1 - t) eps and the velocity target x - eps. x, eps (B, c, h, w); t (B,)."""
    velocity = x - eps
    return torch.addcmul(eps, t.view(-1, 1, 1, 1), velocity), velocity


def velocity_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each image, in fp32 at least. (B, K, P) -> (B,)."""
    wide = torch.promote_types(target.dtype, torch.float32)
    return (predicted.to(wide) - target.to(wide)).square().flatten(1).mean(1)


def logit_normal(z: Tensor, mean: float, std: float) -> Tensor:
    """Standard normals -> times in (0, 1)."""
    return torch.sigmoid(mean + std * z)


def logit_normal_density(t: Tensor, mean: float, std: float) -> Tensor:
    """Density of `logit_normal` at times in (0, 1)."""
    z = (torch.logit(t) - mean) / std
    return torch.exp(-0.5 * z.square()) / (std * math.sqrt(2 * math.pi) * t * (1 - t))

"""Pictures to patches and back.

Shapes: `B` images, `S` tokens of an image, `c` latent channels, `P = p * p * c` numbers in a patch of side `p`.
"""

from torch import Tensor


def patchify(x: Tensor, patch: int) -> Tensor:
    """(B, c, h, w) -> (B, S, P): patches row by row; within one, row, column, channel."""
    b, c, h, w = x.shape
    x = x.view(b, c, h // patch, patch, w // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, -1, patch * patch * c)


def unpatchify(tokens: Tensor, patch: int, channels: int) -> Tensor:
    """(B, S, P) of a square picture -> (B, c, h, w)."""
    b, s, _ = tokens.shape
    side = round(s**0.5)
    x = tokens.view(b, side, side, patch, patch, channels)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, channels, side * patch, side * patch)

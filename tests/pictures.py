"""Pictures for tests that only need one to be there."""

from pathlib import Path

from PIL import Image


def save_square(path: Path) -> None:
    """A red one of 32x32."""
    Image.new("RGB", (32, 32), "red").save(path)

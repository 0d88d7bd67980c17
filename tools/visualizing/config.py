"""Settings of the command, in a module that imports nothing heavy."""

from dataclasses import dataclass
from pathlib import Path

__all__ = ["DrawConfig"]


@dataclass(frozen=True)
class DrawConfig:
    """Settings for the pictures and measures.

    Attributes:
        output: Directory of the results.
        block: Index of the block in its stage.
        token: Number of the token whose association and attention are drawn.
        pixel: Pixel (x, y) of the original image. The token at this pixel is drawn if `token` is None. If both are
            None, the token at the center is drawn.
        img_size: Largest width and height. Larger images are reduced.
        void: Value of unknown pixels in the masks.
        tolerance: Tolerance of boundary recall in pixels; None for 0.0025 times the diagonal.
    """

    output: Path
    block: int = -1
    token: int | None = None
    pixel: tuple[int, int] | None = None
    img_size: int = 1024
    void: int | None = None
    tolerance: int | None = None

"""Super tokens of one layer over one image.

Shapes: as in stvit/visualize/__init__.py
"""

import io
import math
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from PIL import Image

from stvit.visualize.draw import (
    MARK_COLOR,
    contact_sheet,
    display_scale,
    draw_boundaries,
    draw_heat,
    enlarge,
    find_lines,
    rescale,
)

__all__ = ["SuperTokens"]


@dataclass(frozen=True, eq=False)
class SuperTokens:
    """Super tokens of one layer over one image.

    All methods that take a `token` raise ValueError if no token has this number. Pictures have the size of the image,
    multiplied by `scale`.

    Attributes:
        image: RGB image that the model saw, without padding.
        layer: Name of the `SuperTokenAttention` layer in the model.
        stoken_size: Height and width of a cell, in pixels of the feature map.
        stride: Stride of the feature map, in image pixels.
        offset: Rows of padding above the image and columns to its left; (0, 0) except for detectors.
        association: Association of each pixel of the feature map with the nine super tokens around its cell, row by
            row, (9, h, w) (equation 3). The nine sum to 1. Entries outside the grid belong to no token.
        tokens: Super tokens after sampling, (C, Hs, Ws) (equation 4).
        features: Super tokens after self-attention, (C, Hs, Ws) (equation 6).
        queries: Queries of the self-attention, (heads, N, C / heads).
        keys: Keys of the self-attention, (heads, N, C / heads).
    """

    image: Image.Image
    layer: str
    stoken_size: tuple[int, int]
    stride: int
    offset: tuple[int, int]
    association: np.ndarray = field(repr=False)
    tokens: np.ndarray = field(repr=False)
    features: np.ndarray = field(repr=False)
    queries: np.ndarray = field(repr=False)
    keys: np.ndarray = field(repr=False)

    @property
    def grid(self) -> tuple[int, int]:
        """Number of rows and columns of super tokens, (Hs, Ws)."""
        return self.tokens.shape[1], self.tokens.shape[2]

    @cached_property
    def candidates(self) -> np.ndarray:
        """Numbers of the nine tokens in `association`, (9, h, w); -1 outside the grid."""
        _, h, w = self.association.shape
        rows, columns = np.arange(h)[:, None] // self.stoken_size[0], np.arange(w)[None] // self.stoken_size[1]
        numbers = []
        for i in (-1, 0, 1):
            for j in (-1, 0, 1):
                row, column = np.broadcast_arrays(rows + i, columns + j)
                inside = (0 <= row) & (row < self.grid[0]) & (0 <= column) & (column < self.grid[1])
                numbers.append(np.where(inside, row * self.grid[1] + column, -1))
        return np.stack(numbers)

    @cached_property
    def map_assignment(self) -> np.ndarray:
        """Token with the highest association for each pixel of the feature map, (h, w)."""
        inside = np.where(self.candidates >= 0, self.association, -1.0)
        return np.take_along_axis(self.candidates, inside.argmax(axis=0)[None], axis=0)[0]

    @cached_property
    def assignment(self) -> np.ndarray:
        """Token with the highest association for each pixel of the image, (H, W)."""
        return self.to_image(self.map_assignment)

    def association_map(self, token: int) -> np.ndarray:
        """Returns the association of each image pixel with one super token, (H, W).

        Args:
            token: Number of the token.
        """
        self._check_token(token)
        return self.to_image(np.where(self.candidates == token, self.association, 0.0).sum(axis=0))

    def attention_map(self, token: int, head: int | None = None) -> np.ndarray:
        """Returns the attention of one super token to all tokens, (Hs, Ws).

        The values sum to 1.

        Args:
            token: Number of the token.
            head: Number of the attention head; None for the mean of all heads.

        Raises:
            ValueError: If no token or head has this number.
        """
        self._check_token(token)
        heads, _, dim = self.queries.shape
        if head is not None and not 0 <= head < heads:
            raise ValueError(f"head must be from 0 to {heads - 1}, got {head}")
        scores = np.einsum("hnc,hc->hn", self.keys, self.queries[:, token]) * dim**-0.5
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        return (weights.mean(axis=0) if head is None else weights[head]).reshape(self.grid)

    def token_at(self, x: float, y: float) -> int:
        """Returns the number of the super token that a pixel of the image is assigned to.

        Args:
            x: Distance from the left edge, in pixels.
            y: Distance from the top edge, in pixels.

        Raises:
            ValueError: If the pixel is outside the image.
        """
        if not (0 <= x < self.image.width and 0 <= y < self.image.height):
            raise ValueError(f"pixel ({x}, {y}) is outside the image of {self.image.width}x{self.image.height} pixels")
        return int(self.assignment[int(y), int(x)])

    @property
    def center(self) -> int:
        """Number of the super token at the center of the image."""
        return self.token_at(self.image.width // 2, self.image.height // 2)

    @property
    def scale(self) -> int:
        """Factor by which pictures are larger than the image, 1 except for small images."""
        return display_scale(self.image)

    def to_image(self, values: np.ndarray) -> np.ndarray:
        """Resamples values of the feature map, (h, w), to the image, (H, W).

        Each pixel takes the nearest value. The receptive field of map pixel (i, j) is centered on image pixel (stride *
        i, stride * j), because the stem has 3x3 convolutions of stride 2 and padding 1.

        Raises:
            ValueError: If the shape is not (h, w).
        """
        if values.shape != self.association.shape[1:]:
            raise ValueError(
                f"values: expected the shape of the feature map, {self.association.shape[1:]}, got {values.shape}"
            )
        rows, columns = (
            np.minimum((np.arange(size) + before + self.stride // 2) // self.stride, limit - 1)
            for size, before, limit in zip(self.image.size[::-1], self.offset, values.shape, strict=True)
        )
        return values[rows[:, None], columns[None]]

    # -----------------------------------------------------------------------------------------------------------------
    # Pictures

    def draw(self, token: int | None = None, title: str | None = None) -> Image.Image:
        """Draws the four pictures of `panels` on one sheet.

        Args:
            token: Token whose association and attention are drawn (default: the center of the image).
            title: Text above the pictures.
        """
        return contact_sheet(self.panels(token), columns=2, title=title)

    def panels(self, token: int | None = None) -> list[tuple[str, Image.Image]]:
        """Returns captions and pictures of the super tokens.

        The pictures show boundaries, mean colors, one token's association and its attention.

        Args:
            token: Token whose association and attention are drawn (default: the center of the image).
        """
        token = self.center if token is None else token
        highest, attention = self.association_map(token).max(), self.attention_map(token)
        rows, columns = self.grid
        return [
            (f"{rows}x{columns} super tokens", self.draw_boundaries()),
            ("mean colors", self.draw_mean_colors()),
            (f"association with token {token}, up to {highest:.2f}", self.draw_association(token)),
            (f"attention of token {token}, {attention.min():.2g} to {attention.max():.2g}", self.draw_attention(token)),
        ]

    def draw_boundaries(self, token: int | None = None) -> Image.Image:
        """Draws the image with lines between the super tokens.

        Args:
            token: Token to outline in another color; None for no token.
        """
        return self._outline(draw_boundaries(self.image, self.assignment), token)

    def draw_mean_colors(self, token: int | None = None) -> Image.Image:
        """Draws each super token in the mean color of its pixels.

        Args:
            token: Token to outline; None for no token.
        """
        assignment, n = self.assignment.ravel(), math.prod(self.grid)
        pixels = np.asarray(self.image).reshape(-1, 3)
        sums = np.stack([np.bincount(assignment, weights=pixels[:, c], minlength=n) for c in range(3)], axis=1)
        means = sums / np.maximum(np.bincount(assignment, minlength=n), 1)[:, None]
        colors = means[self.assignment].round().astype(np.uint8)
        return self._outline(Image.fromarray(enlarge(colors, self.scale)), token)

    def draw_association(self, token: int | None = None) -> Image.Image:
        """Draws the association with one token as a heat map, and outlines the token.

        Args:
            token: Number of the token (default: the center of the image).
        """
        token = self.center if token is None else token
        return self._outline(draw_heat(self.image, rescale(self.association_map(token), 0.0)), token)

    def draw_attention(self, token: int | None = None, head: int | None = None) -> Image.Image:
        """Draws the attention of one token as a heat map, and outlines the token.

        Args:
            token: Number of the token (default: the center of the image).
            head: Number of the attention head; None for the mean of all heads.

        Raises:
            ValueError: If no token or head has this number.
        """
        token = self.center if token is None else token
        attention = self.attention_map(token, head)
        heat = rescale(attention, attention.min()).ravel()[self.assignment]
        return self._outline(draw_heat(self.image, heat), token)

    def _repr_png_(self) -> bytes:
        """Returns the picture that notebooks show."""
        file = io.BytesIO()
        self.draw().save(file, format="PNG")
        return file.getvalue()

    def _outline(self, picture: Image.Image, token: int | None) -> Image.Image:
        """Draws a line around the pixels that are assigned to a token."""
        if token is None:
            return picture
        self._check_token(token)
        pixels = np.array(picture)
        pixels[find_lines(enlarge(self.assignment == token, self.scale), extra=1)] = MARK_COLOR
        return Image.fromarray(pixels)

    def _check_token(self, token: int) -> None:
        if not isinstance(token, (int, np.integer)) or not 0 <= token < math.prod(self.grid):
            raise ValueError(f"token must be from 0 to {math.prod(self.grid) - 1}, got {token!r}")

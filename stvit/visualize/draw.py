"""Drawing functions that know images and arrays but no models."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

__all__ = [
    "LINE_COLOR",
    "MARK_COLOR",
    "contact_sheet",
    "display_scale",
    "draw_boundaries",
    "draw_heat",
    "enlarge",
    "find_lines",
    "rescale",
]

LINE_COLOR = (255, 225, 25)
MARK_COLOR = (0, 229, 255)
# Pictures of smaller images are enlarged.
MIN_DISPLAY_SIZE = 384
# Dark to bright in steps that look equally large. Red and green are never compared, for color-blind readers.
HEAT_COLORS = np.array(
    [(0, 0, 0), (40, 10, 90), (115, 20, 110), (190, 50, 85), (240, 105, 40), (252, 185, 55), (253, 255, 170)],
    dtype=np.float32,
)


def draw_boundaries(image: Image.Image, regions: np.ndarray) -> Image.Image:
    """Draws the lines between regions onto an image. Small images are enlarged.

    Args:
        image: Image of W x H pixels.
        regions: Region of each pixel, (H, W).

    Raises:
        ValueError: If the two differ in size.
    """
    if regions.shape != (image.height, image.width):
        raise ValueError(f"regions: expected shape ({image.height}, {image.width}) as the image, got {regions.shape}")
    scale = display_scale(image)
    picture = enlarge(np.asarray(image.convert("RGB")), scale)
    picture[find_lines(enlarge(regions, scale))] = LINE_COLOR
    return Image.fromarray(picture)


def draw_heat(image: Image.Image, heat: np.ndarray) -> Image.Image:
    """Draws a heat map over a gray copy of an image. Small images are enlarged.

    Args:
        image: Image of W x H pixels.
        heat: Values from 0 to 1, (H, W). The image shows through where they are low.
    """
    heat = np.clip(heat, 0, 1)[..., None]
    steps = np.arange(len(HEAT_COLORS)) / (len(HEAT_COLORS) - 1)
    color = np.stack([np.interp(heat[..., 0], steps, HEAT_COLORS[:, c]) for c in range(3)], axis=-1)
    gray = np.asarray(image.convert("L"), dtype=np.float32)[..., None] * 0.55
    pixels = (gray * (1 - heat) + color * heat).round().astype(np.uint8)
    return Image.fromarray(enlarge(pixels, display_scale(image)))


def contact_sheet(
    panels: Sequence[tuple[str, Image.Image]], columns: int, title: str | None = None, panel_width: int = 480
) -> Image.Image:
    """Arranges pictures in rows on a white sheet, with a caption below each.

    Args:
        panels: Captions and pictures.
        columns: Number of pictures in a row.
        title: Text above the pictures.
        panel_width: Width of the pictures in pixels. Tall pictures are narrower: their height is at most twice this.

    Raises:
        ValueError: If there are no panels, `columns` is less than 1, or `panel_width` is less than 100.
    """
    if not panels or columns < 1:
        raise ValueError(f"a sheet needs at least one picture and one column, got {len(panels)} and {columns}")
    if panel_width < 100:
        raise ValueError(f"panel_width must be at least 100 pixels, got {panel_width}")
    gap, columns = panel_width // 30, min(columns, len(panels))
    width = columns * panel_width + (columns + 1) * gap
    font_size = width // 36  # readable when the sheet is as wide as a phone
    pictures = [_resize(picture, panel_width) for _, picture in panels]
    font, captions = _fit_captions([caption for caption, _ in panels], font_size, panel_width)
    line = font_size * 3 // 2
    heights = [max(p.height for p in pictures[i : i + columns]) + line for i in range(0, len(pictures), columns)]
    top = gap if title is None else gap + line
    sheet = Image.new("RGB", (width, top + sum(heights) + len(heights) * gap), "white")
    draw = ImageDraw.Draw(sheet)
    if title is not None:
        title_font, (text,) = _fit_captions([title], font_size, width - 2 * gap)
        draw.text((width // 2, (gap + line) // 2), text, fill="black", font=title_font, anchor="mm")
    for row, height in enumerate(heights):
        for column, picture in enumerate(pictures[row * columns : (row + 1) * columns]):
            left = gap + column * (panel_width + gap)
            sheet.paste(picture, (left + (panel_width - picture.width) // 2, top))
            middle = (left + panel_width // 2, top + picture.height + line // 2)
            draw.text(middle, captions[row * columns + column], fill="black", font=font, anchor="mm")
        top += height + gap
    return sheet


def _resize(picture: Image.Image, panel_width: int) -> Image.Image:
    factor = min(panel_width / picture.width, 2 * panel_width / picture.height)
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    method = Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS
    return picture.convert("RGB").resize(size, method)


def _fit_captions(captions: Sequence[str], size: int, width: int) -> tuple[Any, list[str]]:
    """Chooses a font for captions of a limited width, and shortens long captions.

    Args:
        captions: One line each.
        size: Font size in pixels. The font is reduced to half of this at most.
        width: Largest width in pixels.

    Returns:
        The font and the captions.
    """
    smallest = size / 2
    font: Any = ImageFont.load_default(size)
    while font.size > smallest and any(font.getlength(caption) > width for caption in captions):
        # In small steps, because hinting makes the length not proportional to the size.
        font = ImageFont.load_default(max(smallest, font.size - 0.5))
    fitting = []
    for caption in captions:
        text = caption
        while font.getlength(text) > width and len(text) > 1:
            text = text[: -2 if text.endswith("…") else -1] + "…"
        fitting.append(text)
    return font, fitting


def display_scale(image: Image.Image) -> int:
    """Returns the factor by which pictures of an image are enlarged."""
    return math.ceil(MIN_DISPLAY_SIZE / max(image.size))


def enlarge(pixels: np.ndarray, scale: int) -> np.ndarray:
    """Repeats each pixel along both axes, (H, W, ...) to (scale * H, scale * W, ...)."""
    return pixels.repeat(scale, axis=0).repeat(scale, axis=1)


def rescale(values: np.ndarray, lowest: float) -> np.ndarray:
    """Rescales values linearly: `lowest` becomes 0 and the largest value becomes 1."""
    return (values - lowest) / max(values.max() - lowest, 1e-12)


def find_lines(regions: np.ndarray, extra: int = 0) -> np.ndarray:
    """Returns a mask of the lines between regions.

    The lines are thick enough to remain visible when the picture is reduced.

    Args:
        regions: Region of each pixel, (H, W).
        extra: Pixels by which the lines are thicker than usual.
    """
    lines = np.zeros(regions.shape, dtype=bool)
    lines[:, :-1] |= regions[:, :-1] != regions[:, 1:]
    lines[:-1] |= regions[:-1] != regions[1:]
    for _ in range(1, max(1, max(regions.shape) // 400) + extra):
        thicker = lines.copy()
        thicker[1:] |= lines[:-1]
        thicker[:, 1:] |= lines[:, :-1]
        lines = thicker
    return lines

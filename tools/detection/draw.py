"""Draws detections into an image."""

import colorsys
from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from stvit.safe_text import printable

from .inference import Detections

_OPACITY = 0.45
_MOST_CHARACTERS = 32


def draw_detections(image: Image.Image, found: Detections, names: Mapping[int, str]) -> Image.Image:
    """Returns the image with the mask, box, class name and score of each detection.

    Detections with higher scores are drawn over those with lower ones.

    Args:
        image: RGB image.
        found: Its detections.
        names: Class name of each category id.
    """
    pixels = np.array(image)
    order = np.argsort(found.scores, kind="stable").tolist()
    if found.masks is not None:
        for number in order:
            inside = found.mask(number).astype(bool)
            tint = np.array(category_color(int(found.categories[number])), dtype=np.float32)
            pixels[inside] = (pixels[inside] * (1 - _OPACITY) + tint * _OPACITY).astype(np.uint8)
    drawn = Image.fromarray(pixels)
    draw = ImageDraw.Draw(drawn)
    line = max(1, round(max(image.size) / 400))
    font = ImageFont.load_default(max(10, round(max(image.size) / 55)))
    for number in order:
        color = category_color(int(found.categories[number]))
        left, top, right, bottom = (float(value) for value in found.boxes[number])
        draw.rectangle((left, top, max(left, right), max(top, bottom)), outline=color, width=line)
        name = printable(names[int(found.categories[number])])[:_MOST_CHARACTERS]
        text = f"{name} {100 * float(found.scores[number]):.0f} %"
        _, _, width, height = (round(value) for value in draw.textbbox((0, 0), text, font=font))
        # The label is above the box, or inside it at the top of the picture. It never crosses the right border.
        x = max(0, min(round(left), image.width - width - 2 * line))
        y = round(top) - height - line
        y = y if y >= 0 else max(0, round(top))
        draw.rectangle((x, y, x + width + 2 * line, y + height + line), fill=color)
        draw.text((x + line, y), text, fill="black" if _is_light(color) else "white", font=font)
    return drawn


def category_color(number: int) -> tuple[int, int, int]:
    """Returns the color of a category. Neighboring numbers have different hues."""
    hue = number * 0.618033988749895 % 1.0
    value = (1.0, 0.85, 0.7)[number // 13 % 3]
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.75, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def _is_light(color: tuple[int, int, int]) -> bool:
    red, green, blue = color
    return 0.299 * red + 0.587 * green + 0.114 * blue > 140

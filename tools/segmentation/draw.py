"""Pictures of label maps.

Shapes:
    H, W     height and width of an image
    K        number of classes
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from stvit.safe_text import printable

# Most classes in a legend.
_MOST_CLASSES = 20
_MAX_NAME = 24


def palette(num_classes: int) -> np.ndarray:
    """Returns a color for each class, uint8 (K, 3).

    They are the colors of PASCAL VOC without black: the bits of a number are distributed over the three channels, so
    that neighboring numbers have very different colors.
    """
    numbers = np.arange(1, num_classes + 1)
    colors = np.zeros((num_classes, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            colors[:, channel] |= ((numbers >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return colors


def draw_overlay(
    image: Image.Image, classes: np.ndarray, names: Sequence[str] | None, num_classes: int, opacity: float
) -> Image.Image:
    """Draws the classes over an image, with a legend on the right.

    The legend lists the classes of the image, the largest first.

    Args:
        image: RGB image of W x H pixels.
        classes: Class of each pixel, (H, W).
        names: Class names; None for numbers.
        num_classes: Number of classes K.
        opacity: Opacity of the classes, from 0 to 1.
    """
    colors = palette(num_classes)
    mixed = (1 - opacity) * np.asarray(image, np.float32) + opacity * colors[classes]
    picture = Image.fromarray(mixed.round().astype(np.uint8))
    pixels = np.bincount(classes.ravel(), minlength=num_classes)
    order = [int(number) for number in np.argsort(-pixels, kind="stable") if pixels[number]]
    lines = [
        (tuple(colors[number].tolist()), f"{_name(number, names)} {100 * pixels[number] / classes.size:.1f} %")
        for number in order[:_MOST_CLASSES]
    ]
    if len(order) > _MOST_CLASSES:
        lines.append(((255, 255, 255), f"and {len(order) - _MOST_CLASSES} more"))
    return _add_legend(picture, lines)


def _add_legend(picture: Image.Image, lines: Sequence[tuple[tuple[int, ...], str]]) -> Image.Image:
    size = max(12, min(picture.height // 28, 40))
    font = ImageFont.load_default(size)
    row, gap = round(1.5 * size), size // 2
    width = max(round(font.getlength(text)) for _, text in lines) + row + 2 * gap
    sheet = Image.new("RGB", (picture.width + width, max(picture.height, row * len(lines) + 2 * gap)), "white")
    sheet.paste(picture, (0, 0))
    draw = ImageDraw.Draw(sheet)
    for place, (color, text) in enumerate(lines):
        left, top = picture.width + gap, gap + place * row
        draw.rectangle((left, top, left + size, top + size), fill=color)
        draw.text((left + row, top), text, fill="black", font=font)
    return sheet


def _name(number: int, names: Sequence[str] | None) -> str:
    return printable(names[number])[:_MAX_NAME] if names else str(number)

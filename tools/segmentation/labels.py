"""Label maps: image files whose values are class numbers, as in ADE20K.

Shapes:
    H, W     height and width of an image
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from stvit.images import UnreadableImageError, decode_image

from ..common.bad_images import MAX_PIXELS
from ..common.cli import CommandError, reason
from ..common.files import read_utf8

# Label of pixels that neither the loss nor a metric counts. Files may use another value for them.
IGNORED = 255
MAX_CLASSES = IGNORED
_MAX_VALUE = (1 << 16) - 1
_INVALID = -1


@dataclass(frozen=True)
class LabelRules:
    """Meaning of the values in the files of a dataset.

    Attributes:
        num_classes: Number of classes, numbered from 0.
        reduce_zero_label: Whether value 0 is ignored and value N is class N - 1, as in ADE20K.
        ignore_index: Value of pixels that are ignored.
    """

    num_classes: int
    reduce_zero_label: bool = False
    ignore_index: int = IGNORED

    def table(self) -> np.ndarray:
        """Returns the label of each value, int16 (65536,).

        A label is a class, `IGNORED`, or -1 for a wrong value.
        """
        table = np.full(_MAX_VALUE + 1, _INVALID, np.int16)
        first = 1 if self.reduce_zero_label else 0
        table[first : first + self.num_classes] = np.arange(self.num_classes)
        table[:first] = IGNORED
        if self.ignore_index <= _MAX_VALUE:
            table[self.ignore_index] = IGNORED
        return table

    def describe(self) -> str:
        """Returns the valid values for messages."""
        low = 0 if not self.reduce_zero_label else 1
        values = f"{low} to {low + self.num_classes - 1}"
        return f"{values}, {'0 or ' if self.reduce_zero_label else 'or '}{self.ignore_index} for ignored pixels"

    def describe_ignored(self) -> str:
        """Returns why all pixels are ignored, and the flags that decide it."""
        if self.reduce_zero_label:
            values, flags = f"0 or {self.ignore_index}, which are", "--reduce-zero-label and --ignore-index"
        else:
            values, flags = f"{self.ignore_index}, which is", "--ignore-index"
        return f"all values are {values} ignored; check {flags}"


class LabelReader:
    """Reads label maps of a dataset.

    Attributes:
        rules: Meaning of the values.
    """

    def __init__(self, rules: LabelRules) -> None:
        self.rules = rules
        self._table = rules.table()

    def read(self, path: Path, size: tuple[int, int] | None = None) -> np.ndarray:
        """Returns the labels of a file: classes, or `IGNORED`.

        Args:
            path: Label map.
            size: Width and height that it must have; None for any.

        Returns:
            Labels, uint8 (H, W).

        Raises:
            ValueError: If the file cannot be read, has colors, has another size, or contains a wrong value. The message
                does not contain the path.
        """
        image = _open(path, size)
        self._check_values(image)
        return self._table[np.asarray(image).astype(np.uint16, copy=False)].astype(np.uint8)

    def find_classes(self, path: Path, size: tuple[int, int] | None = None) -> np.ndarray:
        """Returns which classes a file contains, bool (K,). It is faster than `read`.

        `read` has the arguments.

        Raises:
            ValueError: As `read`.
        """
        values = self._check_values(_open(path, size))
        classes = self._table[values]
        return np.isin(np.arange(self.rules.num_classes), classes[classes != IGNORED])

    def _check_values(self, image: Image.Image) -> np.ndarray:
        """Returns the values in a label map.

        Raises:
            ValueError: If a value is neither a class nor ignored.
        """
        if image.mode in ("L", "P"):
            counts = np.asarray(image.histogram())  # ten times as fast as np.unique
            values = np.flatnonzero(counts)
            counts = counts[values]
        else:
            values, counts = np.unique(np.asarray(image), return_counts=True)
        values = values.astype(np.int64)
        is_wrong = (values < 0) | (values > _MAX_VALUE)
        is_wrong |= self._table[values.clip(0, _MAX_VALUE)] == _INVALID
        if is_wrong.any():
            more = f" (and {is_wrong.sum() - 1} other values)" if is_wrong.sum() > 1 else ""
            raise ValueError(
                f"value {values[is_wrong][0]} in {counts[is_wrong][0]} pixels{more}, expected {self.rules.describe()}"
            )
        return values


def _open(path: Path, size: tuple[int, int] | None) -> Image.Image:
    """Opens a label map. The values of a palette image are its indices.

    Raises:
        ValueError: If the file cannot be read, has colors, or has another size.
    """
    try:
        image = decode_image(path, MAX_PIXELS)
    except UnreadableImageError as error:
        raise ValueError(error.problem) from error
    except OSError as error:
        raise ValueError(error.strerror or reason(error)) from error
    if image.format in ("JPEG", "WEBP"):
        raise ValueError(f"a {image.format} file, whose compression changes the values; save the labels as PNG")
    if image.mode not in ("1", "L", "P", "I") and not image.mode.startswith("I;16"):
        raise ValueError(
            f"colors (mode {image.mode}), expected one channel of class numbers; convert each color to its class number"
        )
    if size is not None and image.size != size:
        turned = " (if the image has an EXIF orientation, turn its pixels and remove it)"
        raise ValueError(
            f"{image.width}x{image.height} pixels, but its image has {size[0]}x{size[1]}; make both the same"
            f"{turned if image.size == size[::-1] else ''}"
        )
    return image


def save_values(values: np.ndarray, path: Path) -> None:
    """Writes a label map as a gray PNG file.

    Args:
        values: Values from 0 to 65535, (H, W). The file has 8 bits if they are at most 255.
        path: File to write.
    """
    Image.fromarray(values.astype(np.uint8 if values.max(initial=0) <= 255 else np.uint16)).save(path, format="PNG")


def read_class_names(path: Path) -> list[str]:
    """Reads the names of the classes, in order.

    Args:
        path: Text file with one name per line, or ADE20K's objectInfo150.txt: columns separated by tabs, the last one
            with synonyms separated by commas. The first synonym is the name.

    Raises:
        CommandError: If the file cannot be read, or has no name or too many.
    """
    try:
        lines = [line for line in read_utf8(path).splitlines() if line.strip()]
    except FileNotFoundError as error:
        raise CommandError(f"--class-names {path} does not exist") from error
    except (OSError, ValueError) as error:
        raise CommandError(f"cannot read --class-names {path}: {reason(error)}") from error
    if lines and "\t" in lines[0]:
        rows = [line.split("\t") for line in lines]
        is_header = not rows[0][0].strip().isdecimal()
        names = [row[-1].partition(",")[0].strip() for row in (rows[1:] if is_header else rows)]
    else:
        names = [line.strip() for line in lines]
    if not names or not all(names):
        raise CommandError(f"--class-names {path} has no class names; write one name per line")
    if len(names) > MAX_CLASSES:
        raise CommandError(f"--class-names {path} has {len(names)} names, more than the limit of {MAX_CLASSES} classes")
    return names

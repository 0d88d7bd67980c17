"""Opens the images that a command shows to a model."""

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from stvit import images
from stvit.safe_text import one_line

from .cli import CommandError, reason
from .image_folders import find_image_files

__all__ = [
    "MAX_PIXELS",
    "ImageError",
    "check_skipped",
    "describe_skipped",
    "find_images",
    "fit",
    "open_image",
    "open_mask",
    "result_names",
]

# Largest image; time and memory of a model grow with the pixels.
MAX_PIXELS = 64 * 2**20


class ImageError(CommandError):
    """Raised when an image cannot be used. A command may go on with other images."""


def open_image(path: Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Opens an image file as RGB.

    Args:
        path: File in a format of `stvit.images.READERS`, with any name.
        max_pixels: Largest number of pixels. It is checked before the image is decoded.

    Raises:
        ImageError: If the file is damaged, too large or not an image.
    """
    with _image_errors(path):
        return images.open_image(path, max_pixels=max_pixels)


def open_mask(path: Path) -> np.ndarray:
    """Returns the stored values of an image file, (H, W) or (H, W, channels).

    Raises:
        ImageError: If the file is damaged, too large or not an image.
    """
    with _image_errors(path):
        return np.array(images.decode_image(path, MAX_PIXELS))


@contextmanager
def _image_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except images.UnreadableImageError as error:
        raise ImageError(str(error)) from error
    except OSError as error:
        raise ImageError(f"{path.name}: {error.strerror or reason(error)}") from error


def fit(image: Image.Image, size: int) -> Image.Image:
    """Returns the image, reduced to at most `size` pixels on its longer side."""
    if max(image.size) <= size:
        return image
    width, height = (max(1, round(side * size / max(image.size))) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def find_images(path: Path, out: Path) -> list[Path]:
    """Returns an image file, or the images in a folder and its subfolders.

    Prints a line about ignored files and folders.

    Args:
        path: File or folder.
        out: Folder of the results. If it is in `path`, its images are skipped.

    Raises:
        CommandError: If there is no image, or both folders are the same.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise CommandError(f"{path}: no such file or folder")
    if out.resolve() == path.resolve():
        raise CommandError(f"--output {out} is the folder of the images; choose another folder for the results")
    try:
        found, ignored = find_image_files(path, skipped=out.resolve())
    except OSError as error:
        raise CommandError(f"cannot read the folder {path}: {reason(error)}") from error
    if not found:
        raise CommandError(f"no images in {path}; their names must end in {', '.join(images.SUFFIXES)}")
    line = ignored.describe(path)
    if line is not None:
        print(line, flush=True)
    return [path / name for name in found]


def result_names(root: Path, images: Sequence[Path]) -> list[str]:
    """Returns a name without suffix for each image's results, with its subfolders.

    Images keep their suffix if they would have the same name without it, ignoring case.

    Args:
        root: Image file or folder of the images.
        images: The images.
    """
    base = root if root.is_dir() else root.parent
    paths = [path.relative_to(base) for path in images]
    stems = [path.with_suffix("").as_posix() for path in paths]
    counts = Counter(stem.casefold() for stem in stems)
    return [stem if counts[stem.casefold()] == 1 else path.as_posix() for stem, path in zip(stems, paths, strict=True)]


def describe_skipped(path: Path, error: ImageError) -> str:
    """Returns why an image is skipped, with its name."""
    message = str(error)
    return message if path.name in message else f"{path.name}: {message}"


def check_skipped(skipped: Sequence[str], images: int) -> None:
    """Reports skipped images at the end of a command, each of them once.

    Up to three are in the error. More of them are lines on standard error before it.

    Args:
        skipped: Descriptions of `describe_skipped`.
        images: Number of all images.

    Raises:
        CommandError: If an image was skipped.
    """
    if len(skipped) > 3:
        for line in skipped:
            print(f"skipped {one_line(line)}", file=sys.stderr)
        raise CommandError(f"{len(skipped)} of {images} images were skipped; the lines above name them")
    if skipped:
        raise CommandError(f"{len(skipped)} of {images} images were skipped: {'; '.join(skipped)}")

"""Models to look at: classifiers and detectors, of a run, a file, the Hub, or with random weights."""

import argparse
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

import stvit
from stvit import hub, visualize
from stvit.tools.common.cli import CommandError, reason
from stvit.tools.common.model import RECIPE_KEYS, choose_weights, create_model, read_weights

# Of an image that a model is shown; the network's time and memory grow with them.
MOST_PIXELS = 64 * 2**20
# How files of each format begin ('.' stands for any byte), and Pillow's reader of it. These alone: PIL.Image.open tries
# readers that few have tested, and where Ultralytics is imported it answers an unknown file by installing another one.
READERS: dict[str, tuple[bytes, type[ImageFile]]] = {
    "BMP": (rb"BM", BmpImageFile),
    "GIF": (rb"GIF8[79]a", GifImageFile),
    "JPEG": (rb"\xff\xd8\xff", JpegImageFile),
    "PNG": (rb"\x89PNG\r\n\x1a\n", PngImageFile),
    "TIFF": (rb"II\*\0|MM\0\*", TiffImageFile),
    "WebP": (rb"RIFF....WEBP", WebPImageFile),
}
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_PREFIXES = ("hf-hub:", "hf_hub:")


class ImageError(CommandError):
    """Something is wrong with one image; others may do."""


@dataclass
class Viewed:
    """A model, and what a reader of its results must know.

    Attributes:
        title: What it is, random weights included.
        model: Of timm's; or Ultralytics' YOLO.
        is_yolo: Whether it is that.
        is_random: Whether nothing has trained it.
    """

    title: str
    model: Any
    is_yolo: bool
    is_random: bool


def open_viewed(args: argparse.Namespace) -> Viewed:
    """The model of the flags of `add_model_arguments` and `pretrained`, for evaluation on the CPU.

    A detector is meant by a model file (`yolo26s-stvit_small.yaml`), a checkpoint or a run of Ultralytics, or a
    repository of one. None of a checkpoint's code is run.

    Raises:
        CommandError: If there is none such, or it cannot be read.
    """
    source, model = args.checkpoint, args.model
    if source is not None and source.startswith(_PREFIXES):
        return _open_hub(args)
    if source is not None:
        path = _detector_in(Path(source).expanduser())
        if path is not None:
            return Viewed(source, _open_detector(path), is_yolo=True, is_random=False)
    elif model is not None and model.endswith((".yaml", ".yml")):
        with _drawn():
            return Viewed(f"{Path(model).stem}, random weights", _yolo(model), is_yolo=True, is_random=True)
    return _open_classifier(args)


def _open_classifier(args: argparse.Namespace) -> Viewed:
    # Which sets flags, on this copy; those of images are asked of the model.
    weights = choose_weights(argparse.Namespace(**{**dict.fromkeys(RECIPE_KEYS), **vars(args)}))
    content = read_weights(weights.file, weights.use_ema)[0] if weights.file is not None else None
    pretrained = args.pretrained or args.checkpoint is not None
    with _drawn():
        model = create_model(
            weights.model,
            pretrained=pretrained,
            weights=content,
            num_classes=args.num_classes or weights.recipe.get("num_classes"),
            in_chans=args.in_chans or weights.recipe.get("in_chans"),
            model_kwargs={**(weights.recipe.get("model_kwargs") or {}), **args.model_kwargs},
        )
    title = args.checkpoint or (args.model if pretrained else f"{args.model}, random weights")
    return Viewed(title, model.eval().requires_grad_(False), is_yolo=False, is_random=not pretrained)


@contextmanager
def _drawn() -> Iterator[None]:
    """Random weights are the same each time, and take no number from others."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def _open_hub(args: argparse.Namespace) -> Viewed:
    try:
        return _open_classifier(args)
    except CommandError as error:
        repo_id, _, revision = args.checkpoint.partition(":")[2].partition("@")
        if hub.read_file(repo_id, "config.json", revision or None) is not None:
            raise
        try:
            return Viewed(args.checkpoint, _yolo(args.checkpoint), is_yolo=True, is_random=False)
        except CommandError as second:
            # What a repository that cannot be had is of, nobody knows.
            raise (error if isinstance(second.__cause__, stvit.PretrainedDownloadError) else second) from None


def is_detector(name: str) -> bool:
    """Whether a model file, or a run or a checkpoint of Ultralytics, is meant; of the Hub a name does not tell."""
    return name.endswith((".yaml", ".yml")) or _detector_in(Path(name).expanduser()) is not None


def _detector_in(path: Path) -> Path | None:
    """The checkpoint of Ultralytics that a path stands for: a run's folder, or the file; None if it is none."""
    if path.is_dir():
        found = [path / name for name in ("weights/best.pt", "weights/last.pt") if (path / name).is_file()]
        return found[0] if found else None
    if path.suffix != ".pt" or not path.is_file():
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [archive.read(name) for name in archive.namelist() if name.endswith("data.pkl")]
    except (OSError, zipfile.BadZipFile):  # what it is, is said where it is read
        return None
    return path if any(b"ultralytics.nn." in content for content in pickles) else None


def _open_detector(path: Path) -> Any:
    with _ultralytics():
        from stvit.adapters.yolo.hub import open_safely

        open_safely(path)
    return _yolo(str(path))


def _yolo(name: str) -> Any:
    with _ultralytics():
        from stvit.adapters.yolo import YOLO

        detector = YOLO(name)
        detector.model.eval()
        return detector


@contextmanager
def explained() -> Iterator[None]:
    """Words what a foreign model or library says as an error for the user."""
    try:
        yield
    except (ArithmeticError, AssertionError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise CommandError(reason(error)) from error


def stages_of(viewed: Viewed) -> list[int]:
    """The stages that have super tokens.

    Raises:
        CommandError: If none has.
    """
    with explained():
        stages = visualize.stages(viewed.model)
    if not stages:
        raise CommandError(f"{viewed.title} has no super tokens: choose an STViT, or a detector with one")
    return stages


@contextmanager
def _ultralytics() -> Iterator[None]:
    try:
        with explained():
            yield
    except ImportError as error:
        raise CommandError(f"detectors need Ultralytics, pip install 'stvit[yolo]': {reason(error)}") from error
    except OSError as error:
        raise CommandError(reason(error)) from error


# ---------------------------------------------------------------------------------------------------------------------
# Images


def open_image(path: Path, most_pixels: int = MOST_PIXELS) -> Image.Image:
    """An image of a file, RGB, upright, with white behind what is transparent.

    Args:
        path: Of a format of `READERS`, whatever its name.
        most_pixels: More than these are refused before any is decoded.

    Raises:
        ImageError: If it is none, damaged, or too large.
    """
    with _reading(path, most_pixels) as image:
        upright = ImageOps.exif_transpose(image)
    try:
        return visualize.to_rgb(upright)
    except ValueError as error:
        raise ImageError(f"{path.name}: {error}") from error


def open_mask(path: Path) -> np.ndarray:
    """The numbers in an image, (H, W) if there is one for each pixel.

    Raises:
        ImageError: If the file is no image, damaged, or too large.
    """
    with _reading(path, MOST_PIXELS) as image:
        return np.array(image)


@contextmanager
def _reading(path: Path, most_pixels: int) -> Iterator[ImageFile]:
    try:
        if not path.is_file():  # others may never end, or not begin
            raise ImageError(f"{path.name} is no file")
        with path.open("rb") as file:
            start = file.read(12)
        reader = next((kind for begin, kind in READERS.values() if re.match(begin, start, re.DOTALL)), None)
        if reader is None:
            *kinds, last = READERS
            raise ImageError(f"{path.name} is no image that can be read: give {', '.join(kinds)} or {last}")
        with reader(path) as image:
            if image.width * image.height > most_pixels:
                raise ImageError(
                    f"{path.name} has {image.width}x{image.height} pixels, more than the {most_pixels / 1e6:.0f} "
                    "million that are taken: make it smaller"
                )
            image.load()
            yield image
    except ImageError:
        raise
    except Exception as error:  # a damaged or hostile file makes a reader raise nearly everything
        why = error.strerror if isinstance(error, OSError) and error.strerror else "it is damaged or cut off"
        raise ImageError(f"{path.name} cannot be read: {why}") from error


def fitted(image: Image.Image, size: int) -> Image.Image:
    """The image, made smaller to at most so many pixels along each axis."""
    if max(image.size) <= size:
        return image
    width, height = (max(1, round(side * size / max(image.size))) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def find_images(path: Path, out: Path) -> list[Path]:
    """The image file itself, or all below a folder, in order of their names.

    Args:
        path: File or folder.
        out: Where results go; if that is a folder below, its images do not count.

    Raises:
        CommandError: If there is none.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise CommandError(f"{path}: there is no such file or folder")
    found = [
        Path(folder) / name
        for folder, _, names in sorted(os.walk(path, followlinks=True))
        if out.resolve() == path.resolve() or not Path(folder).resolve().is_relative_to(out.resolve())
        for name in sorted(names)
        if name.lower().endswith(SUFFIXES) and not name.startswith(".")
    ]
    if not found:
        raise CommandError(f"{path} holds no images: files that end in {', '.join(SUFFIXES)}")
    return found

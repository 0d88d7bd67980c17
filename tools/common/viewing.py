"""Models to look at: classifiers and detectors, of a run, a file, the Hub, or with random weights."""

import argparse
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import stvit
from stvit import hub, images, visualize
from stvit.tools.common.cli import CommandError, reason
from stvit.tools.common.image_folders import find_image_files
from stvit.tools.common.model import RECIPE_KEYS, choose_weights, create_model, read_weights
from stvit.weights.check import WeightsFileError, class_names

# Of an image that a model is shown; the network's time and memory grow with them.
MAX_PIXELS = 64 * 2**20
_PREFIXES = ("hf-hub:", "hf_hub:")


class ImageError(CommandError):
    """Something is wrong with one image; others may do."""


@dataclass
class LoadedModel:
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


def load_model(args: argparse.Namespace) -> LoadedModel:
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
            return LoadedModel(source, _open_detector(path), is_yolo=True, is_random=False)
    elif model is not None and model.endswith((".yaml", ".yml")):
        with _seeded_rng():
            return LoadedModel(f"{Path(model).stem}, random weights", _yolo(model), is_yolo=True, is_random=True)
    return _open_classifier(args)


def _open_classifier(args: argparse.Namespace) -> LoadedModel:
    # Which sets flags, on this copy; those of images are asked of the model.
    weights = choose_weights(argparse.Namespace(**{**dict.fromkeys(RECIPE_KEYS), **vars(args)}))
    content = read_weights(weights.file, weights.use_ema)[0] if weights.file is not None else None
    pretrained = args.pretrained or args.checkpoint is not None
    with _seeded_rng():
        model = create_model(
            weights.model,
            pretrained=pretrained,
            weights=content,
            num_classes=args.num_classes or weights.recipe.get("num_classes"),
            in_chans=args.in_chans or weights.recipe.get("in_chans"),
            img_size=weights.recipe.get("img_size"),
            model_kwargs={**(weights.recipe.get("model_kwargs") or {}), **args.model_kwargs},
        )
    title = args.checkpoint or (args.model if pretrained else f"{args.model}, random weights")
    return LoadedModel(title, model.eval().requires_grad_(False), is_yolo=False, is_random=not pretrained)


def open_downloaded(name: str, source: str) -> LoadedModel:
    """Opens a model of the Hub from the files that were downloaded. None of a checkpoint's code is run.

    Args:
        name: 'hf-hub:ORG/NAME', the title.
        source: 'local-dir:FOLDER' of a classifier, or the checkpoint of a detector.

    Raises:
        CommandError: If the files cannot be read.
    """
    if not source.startswith("local-dir:"):
        detector = _open_detector(Path(source))
        detector._forget_data()
        return LoadedModel(name, detector, is_yolo=True, is_random=False)
    flags = dict.fromkeys(("model", "use_ema", "num_classes", "in_chans"))
    viewed = _open_classifier(argparse.Namespace(**flags, checkpoint=source, model_kwargs={}, pretrained=False))
    viewed.title = name
    return viewed


_DRAWING = threading.Lock()


@contextmanager
def _seeded_rng() -> Iterator[None]:
    """Context in which random weights are the same each time; the state of the process's generator does not change.

    All threads share that generator, so that one thread at a time draws.
    """
    with _DRAWING, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def _open_hub(args: argparse.Namespace) -> LoadedModel:
    try:
        return _open_classifier(args)
    except CommandError as error:
        repo_id, _, revision = args.checkpoint.partition(":")[2].partition("@")
        try:
            repository = hub.Repository(repo_id)
        except hub.HubError:  # the name is not valid, which the first error says, too
            raise error from None
        if repository.read_file("config.json", revision or None) is not None:
            raise
        try:
            return LoadedModel(args.checkpoint, _yolo(args.checkpoint), is_yolo=True, is_random=False)
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
        names = class_names(path)
    except (OSError, WeightsFileError):  # the reader of the file says what is wrong
        return None
    return path if any(name.startswith("ultralytics.nn.") for name in names) else None


def _open_detector(path: Path) -> Any:
    with _ultralytics():
        from stvit.adapters.yolo.checkpoint import open_safely

        open_safely(path)
    return _yolo(str(path))


def _yolo(name: str) -> Any:
    with _ultralytics():
        from stvit.adapters.yolo import YOLO

        detector: Any = YOLO(name)
        detector.model.eval()
        return detector


@contextmanager
def explain_errors() -> Iterator[None]:
    """Words what a foreign model or library says as an error for the user."""
    try:
        yield
    except (ArithmeticError, AssertionError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise CommandError(reason(error)) from error


def stages_of(viewed: LoadedModel) -> list[int]:
    """The stages that have super tokens.

    Raises:
        CommandError: If none has.
    """
    with explain_errors():
        stages = visualize.stages(viewed.model)
    if not stages:
        raise CommandError(f"{viewed.title} has no super tokens: choose an STViT, or a detector with one")
    return stages


@contextmanager
def _ultralytics() -> Iterator[None]:
    try:
        with explain_errors():
            yield
    except ImportError as error:
        raise CommandError(f"detectors need Ultralytics, pip install 'stvit[yolo]': {reason(error)}") from error
    except OSError as error:
        raise CommandError(reason(error)) from error


# ---------------------------------------------------------------------------------------------------------------------
# Images


def open_image(path: Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Opens an image file by the rules of `stvit.images`, as RGB.

    Args:
        path: Of a format of `stvit.images.READERS`, whatever its name.
        max_pixels: Largest number of pixels, which is checked before any is decoded.

    Raises:
        ImageError: If the file is not an image, is damaged or too large.
    """
    with _explained_image(path):
        return images.open_image(path, max_pixels=max_pixels)


def open_mask(path: Path) -> np.ndarray:
    """Returns the values of an image file as they are stored, (H, W) if there is one for each pixel.

    Raises:
        ImageError: If the file is not an image, is damaged or too large.
    """
    with _explained_image(path):
        return np.array(images.decode_image(path, MAX_PIXELS))


@contextmanager
def _explained_image(path: Path) -> Iterator[None]:
    try:
        yield
    except images.UnreadableImageError as error:
        raise ImageError(str(error)) from error
    except OSError as error:
        raise ImageError(f"{path.name}: {error.strerror or reason(error)}") from error


def fitted(image: Image.Image, size: int) -> Image.Image:
    """The image, made smaller to at most so many pixels along each axis."""
    if max(image.size) <= size:
        return image
    width, height = (max(1, round(side * size / max(image.size))) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def find_images(path: Path, out: Path) -> list[Path]:
    """Finds the images to show: the file itself, or those in a folder and the folders below it.

    Prints a line on the files and folders that are ignored.

    Args:
        path: File or folder.
        out: Folder of the results. If it is below `path`, its images do not count.

    Raises:
        CommandError: If there is no image.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise CommandError(f"{path}: there is no such file or folder")
    try:
        found, ignored = find_image_files(path, skipped=out.resolve())
    except OSError as error:
        raise CommandError(f"cannot read the folder {path}: {reason(error)}") from error
    if not found:
        raise CommandError(f"{path} holds no images: files that end in {', '.join(images.SUFFIXES)}")
    line = ignored.describe(path)
    if line is not None:
        print(line, flush=True)
    return [path / name for name in found]

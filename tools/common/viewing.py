"""Loads classifiers and detectors for `stvit visualize` and `stvit demo`.

A model comes from a run, a file or the Hub, or has random weights.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import stvit
from stvit import hub, visualize
from stvit.weights import Source, WeightsFileError
from stvit.weights.check import class_names
from stvit.weights.packaged import PACKAGED

from .cli import CommandError, reason
from .config import ModelSource
from .model import open_model

__all__ = ["LoadedModel", "explain_errors", "is_detector", "load_downloaded", "load_model", "stages_of"]


@dataclass
class LoadedModel:
    """A model in eval mode on the CPU.

    Attributes:
        title: Name of the model for the user; says if the weights are random.
        model: Model of timm, or Ultralytics' YOLO.
        is_yolo: Whether the model is a YOLO.
        is_random: Whether the weights are random.
        trained_on: Data set of a model whose weights are part of the package; "" for others.
    """

    title: str
    model: Any
    is_yolo: bool
    is_random: bool
    trained_on: str = ""


def load_model(config: ModelSource) -> LoadedModel:
    """Loads a classifier or a detector without running code of its checkpoint.

    A model file (`yolo26s-stvit_small.yaml`), a checkpoint or run of Ultralytics, or a repository with such a
    checkpoint is a detector.

    Raises:
        CommandError: If the model does not exist or cannot be read.
    """
    if config.checkpoint is not None:
        source = Source.parse_hub(config.checkpoint)
        if source is not None:
            return _load_from_hub(config, source)
        path = _find_detector(Path(config.checkpoint).expanduser())
        if path is not None:
            return LoadedModel(config.checkpoint, _load_detector(path), is_yolo=True, is_random=False)
    elif config.model is not None and config.model.endswith((".yaml", ".yml")):
        with _seeded_rng():
            detector = _yolo(config.model)
        return LoadedModel(f"{Path(config.model).stem}, random weights", detector, is_yolo=True, is_random=True)
    return _load_classifier(config)


def load_downloaded(name: str, source: Source) -> LoadedModel:
    """Loads a downloaded model of the Hub without running code of its checkpoint.

    Args:
        name: Name of the model on the Hub, for the title.
        source: Folder of a classifier, or checkpoint of a detector.

    Raises:
        CommandError: If the files cannot be read.
    """
    if source.kind == "file":
        detector = _load_detector(source.path)
        detector._forget_data()
        return LoadedModel(name, detector, is_yolo=True, is_random=False)
    loaded = _load_classifier(ModelSource(checkpoint=str(source)))
    loaded.title = name
    return loaded


def _load_from_hub(config: ModelSource, source: Source) -> LoadedModel:
    """Loads a model of the Hub.

    A repository with a config.json contains a classifier. Any other repository contains a detector.
    """
    try:
        return _load_classifier(config)
    except CommandError as error:
        try:
            repository = hub.Repository(source.name)
        except hub.HubError:  # the first error reports the invalid name, too
            raise error from None
        if repository.read_file("config.json", source.revision) is not None:
            raise
        try:
            return LoadedModel(config.title, _yolo(str(source)), is_yolo=True, is_random=False)
        except CommandError as second:
            # After a failed download, the kind of the model is unknown. The error of the classifier is clearer.
            raise (error if isinstance(second.__cause__, stvit.PretrainedDownloadError) else second) from None


def _load_classifier(config: ModelSource) -> LoadedModel:
    is_random = config.checkpoint is None and not config.pretrained
    with _seeded_rng():
        model = open_model(config).model
    title = f"{config.title}, random weights" if is_random else config.title
    is_packaged = config.title in PACKAGED and not config.checkpoint and not is_random
    trained_on = PACKAGED[config.title].dataset if is_packaged else ""
    return LoadedModel(
        title, model.eval().requires_grad_(False), is_yolo=False, is_random=is_random, trained_on=trained_on
    )


_DRAWING = threading.Lock()


@contextmanager
def _seeded_rng() -> Iterator[None]:
    """Context manager: makes random weights the same each time.

    The random state of the process does not change. All threads share this state, hence the lock.
    """
    with _DRAWING, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def is_detector(name: str) -> bool:
    """Returns whether a name is a model file, run or checkpoint of Ultralytics.

    The name of a repository on the Hub does not show its kind. The result is then False.
    """
    return name.endswith((".yaml", ".yml")) or _find_detector(Path(name).expanduser()) is not None


def _find_detector(path: Path) -> Path | None:
    """Returns Ultralytics' checkpoint at a path or in a run directory, or None."""
    if path.is_dir():
        found = [path / name for name in ("weights/best.pt", "weights/last.pt") if (path / name).is_file()]
        return found[0] if found else None
    if path.suffix != ".pt" or not path.is_file():
        return None
    try:
        names = class_names(path)
    except (OSError, WeightsFileError):  # the error is reported when the file is loaded
        return None
    return path if any(name.startswith("ultralytics.nn.") for name in names) else None


def _load_detector(path: Path) -> Any:
    with _ultralytics_errors():
        from stvit.adapters.yolo.checkpoint import open_safely

        open_safely(path)
    return _yolo(str(path))


def _yolo(name: str) -> Any:
    with _ultralytics_errors():
        from stvit.adapters.yolo import YOLO

        detector: Any = YOLO(name)
        detector.model.eval()
        return detector


@contextmanager
def explain_errors() -> Iterator[None]:
    """Context manager: turns errors of a model or a library into `CommandError`."""
    try:
        yield
    except (ArithmeticError, AssertionError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise CommandError(reason(error)) from error


@contextmanager
def _ultralytics_errors() -> Iterator[None]:
    try:
        with explain_errors():
            yield
    except ImportError as error:
        raise CommandError(f"detectors need Ultralytics, pip install 'stvit[yolo]': {reason(error)}") from error
    except OSError as error:
        raise CommandError(reason(error)) from error


def stages_of(loaded: LoadedModel) -> list[int]:
    """Returns the stages with super tokens.

    Raises:
        CommandError: If the model has no super tokens.
    """
    with explain_errors():
        stages = visualize.stages(loaded.model)
    if not stages:
        raise CommandError(f"{loaded.title} has no super tokens; choose an STViT or a detector with STViT")
    return stages

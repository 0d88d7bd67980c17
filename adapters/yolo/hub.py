"""Publishes detectors on the Hugging Face Hub.

A detector's folder has a checkpoint in half precision, an example picture and a card.
"""

import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from huggingface_hub import ModelCardData
from ultralytics.utils import ASSETS

from stvit.hub import HubError, Pushed
from stvit.hub.card import CARD, NOT_MEASURED, TAGS, Card, class_list, table
from stvit.hub.files import file_sha256
from stvit.hub.push import mismatched_tensors
from stvit.ops import SuperTokenAttention
from stvit.safe_text import code_span, escape_markdown
from stvit.weights.create import verify
from stvit.weights.errors import PretrainedError
from stvit.weights.source import Source

from .checkpoint import CHECKPOINT, fetch_checkpoint, open_safely

__all__ = ["EXAMPLE", "Detector", "compare_with_hub", "prepare_checkpoint", "write_detector"]

EXAMPLE = "example.jpg"
# Entries of a checkpoint for resuming, and about the machine of the training.
_LEFT_OUT = ("optimizer", "scaler", "stopper", "updates", "ema", "best_fitness", "git")
# Ultralytics' tasks, and the names of the Hub.
_PIPELINES = {
    "detect": "object-detection",
    "obb": "object-detection",
    "segment": "image-segmentation",
    "semantic": "image-segmentation",
    "pose": "keypoint-detection",
    "depth": "depth-estimation",
    "classify": "image-classification",
}


@dataclass(frozen=True)
class Detector:
    """Facts about a published checkpoint, for the card.

    Attributes:
        task: Ultralytics' name of the task.
        names: Class names, in order.
        parameters: Number of parameters.
        imgsz: Training resolution in pixels; None if unknown.
        data: File name of the dataset's configuration; None if unknown.
        model: File name of the model's configuration; None if unknown.
        metrics: Results of the last validation, from 0 to 1, by Ultralytics' names.
        license: License in the checkpoint, in the Hub's spelling; None if unknown.
        version: Version of Ultralytics that wrote the checkpoint; None if unknown.
        image: File name of the example picture.
        is_stvit: Whether a layer is super token attention.
    """

    task: str
    names: list[str]
    parameters: int
    imgsz: int | None
    data: str | None
    model: str | None
    metrics: dict[str, float]
    license: str | None
    version: str | None
    image: str
    is_stvit: bool


def write_detector(
    source: Path, folder: Path, repo_id: str, *, license: str | None = None, example: Path | None = None
) -> str:
    """Writes a folder with the checkpoint, an example picture and the card.

    Args:
        source: Checkpoint of Ultralytics, such as best.pt.
        folder: Folder to write.
        repo_id: Id of the repository that the folder will be pushed to, for the card.
        license: License of the weights, in the Hub's spelling; None for the license in the checkpoint.
        example: Picture to draw the results on; None for Ultralytics' picture of a bus.

    Returns:
        Name of the model.

    Raises:
        PretrainedError: If the checkpoint is not safe to open.
        ValueError: If the picture cannot be read.
        OSError: If a file cannot be written.
    """
    detector = prepare_checkpoint(source, folder, example)
    (folder / CARD).write_text(_card(folder, repo_id, detector, license), encoding="utf-8")
    return Path(str(detector.model)).stem


def prepare_checkpoint(source: Path, folder: Path, image: Path | None = None) -> Detector:
    """Writes a checkpoint to publish, and a picture with its results.

    The files are model.pt and example.jpg.

    The checkpoint is in the form that Ultralytics publishes: half precision, without the state for resuming. Paths
    among the arguments of the training are reduced to file names, because they tell about the machine.

    Args:
        source: Checkpoint of Ultralytics, such as best.pt.
        folder: Folder to write.
        image: Picture to draw the results on; None for Ultralytics' picture of a bus.

    Raises:
        PretrainedError: If the checkpoint is not safe to open.
        ValueError: If the picture cannot be read.
    """
    from .engine import YOLO

    if not source.is_file():
        raise PretrainedError(f"checkpoint {source} does not exist")
    shown = image or ASSETS / "bus.jpg"
    if not shown.is_file():
        raise ValueError(f"picture {shown} does not exist")
    checkpoint = open_safely(source)
    model: Any = (checkpoint.get("ema") or checkpoint["model"]).half()
    model.criterion = None
    model.__dict__.pop("pt_path", None)
    if "yaml_file" in (getattr(model, "yaml", None) or {}):
        model.yaml["yaml_file"] = _without_paths(model.yaml["yaml_file"])
    if getattr(model, "args", None) is not None:
        model.args = _without_paths(dict(model.args if isinstance(model.args, dict) else vars(model.args)))
    arguments = _without_paths(dict(checkpoint.get("train_args") or {}))
    for parameter in model.parameters():
        parameter.requires_grad = False
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(
        {**checkpoint, **dict.fromkeys(_LEFT_OUT), "epoch": -1, "model": model, "train_args": arguments},
        folder / CHECKPOINT,
        pickle_module=_ORDERED_PICKLE,
    )
    open_safely(folder / CHECKPOINT)
    detector = YOLO(folder / CHECKPOINT)
    results: Any = detector.predict(str(shown), verbose=False, save=False)
    results[0].save(str(folder / EXAMPLE))
    return Detector(
        task=str(model.task if hasattr(model, "task") else detector.task),
        names=[str(name) for name in model.names.values()],
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        imgsz=arguments.get("imgsz"),
        data=arguments.get("data"),
        model=(getattr(model, "yaml", None) or {}).get("yaml_file", arguments.get("model")),
        metrics={
            key.removeprefix("metrics/"): float(value)
            for key, value in (checkpoint.get("train_metrics") or {}).items()
            if key.startswith("metrics/")
        },
        license="agpl-3.0" if "AGPL" in str(checkpoint.get("license")) else None,
        version=checkpoint.get("version"),
        image=shown.name,
        is_stvit=any(isinstance(module, SuperTokenAttention) for module in model.modules()),
    )


def _card(folder: Path, repo_id: str, detector: Detector, license: str | None) -> str:
    pipeline = _PIPELINES.get(detector.task, "object-detection")
    return Card(
        metadata=ModelCardData(
            license=license or detector.license,
            library_name="ultralytics",
            pipeline_tag=pipeline,
            tags=[pipeline, "ultralytics", *(TAGS if detector.is_stvit else ())],
        ),
        title=repo_id.rsplit("/", 1)[-1],
        summary=f"An Ultralytics model for the task {code_span(detector.task)}, in half precision. Its configuration "
        f"is {code_span(detector.model)}.",
        code="from stvit.adapters.yolo import YOLO\n\n"
        f'model = YOLO("{Source.hub(repo_id)}")  # runs no code from the checkpoint\n'
        'results = model.predict("photos")',
        image=f"![Results on {escape_markdown(detector.image)}]({EXAMPLE})",
        facts=[
            f"{detector.parameters / 1e6:.2f} M parameters",
            f"{len(detector.names)} classes: {class_list(detector.names, 20)}",
            f"sha256 of {CHECKPOINT}: `{file_sha256(folder / CHECKPOINT)}`",
        ],
        results=_results(detector),
        is_stvit=detector.is_stvit,
    ).render()


def _results(detector: Detector) -> str:
    if not detector.metrics:
        return NOT_MEASURED
    how = (
        f"Measured by Ultralytics {escape_markdown(detector.version)} during training, on the validation images of "
        f"{code_span(detector.data)} at {escape_markdown(detector.imgsz)} pixels. The same images chose the best "
        "epoch. Values are from 0 to 1."
    )
    rows = [[escape_markdown(name), f"{value:.4f}"] for name, value in detector.metrics.items()]
    return f"{how}\n\n{table(['metric', 'value'], rows)}"


def compare_with_hub(folder: Path, pushed: Pushed) -> int:
    """Loads a pushed detector by its commit, and compares tensors and checksums.

    The detector is downloaded to an empty cache.

    Returns:
        Number of equal tensors: all tensors.

    Raises:
        stvit.hub.HubError: If a tensor or file differs or the detector cannot be loaded.
    """
    name = str(Source.hub(pushed.repo_id, pushed.commit))
    with TemporaryDirectory() as cache:
        try:
            there = open_safely(fetch_checkpoint(name, cache))["model"].state_dict()
            wrong = verify(pushed.repo_id, pushed.commit, cache)
        except (OSError, RuntimeError, ValueError) as error:
            raise HubError(f"pushed, but loading it failed: {error}") from error
    here = open_safely(folder / CHECKPOINT)["model"].state_dict()
    wrong += mismatched_tensors(here, there)
    if wrong:
        raise HubError(f"pushed, but {name} differs from the folder: {', '.join(wrong[:5])}")
    return len(here)


_PythonPickler: Any = pickle._Pickler


class _OrderedPickler(_PythonPickler):
    """Pickler that writes sets in order.

    The same model gives the same file, and pushing it again uploads nothing.

    Python's own pickler is used, because the one in C does not let a subclass save sets.
    """

    def _save_set(self, obj: set[Any]) -> None:
        self.save_reduce(set, (sorted(obj, key=repr),), obj=obj)

    dispatch = {**_PythonPickler.dispatch, set: _save_set}  # noqa: RUF012  # as in the base class


_ORDERED_PICKLE = SimpleNamespace(__name__="pickle", Pickler=_OrderedPickler)


def _without_paths(value: Any) -> Any:
    """Returns a nested value with each path reduced to its last part.

    Paths of any system are recognized.
    """
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_without_paths(item) for item in value)
    if isinstance(value, Path):
        value = str(value)
    return re.split(r"[\\/]", value.rstrip("\\/"))[-1] if isinstance(value, str) else value

"""Saves and loads detectors and segmentation models as folders.

A folder contains:

- model.safetensors: the weights
- config.json: the function that builds the model, its arguments, and the class names
- README.md: the model card
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCardData, hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from stvit.hub import Details, HubError
from stvit.hub.card import CARD, NOT_MEASURED, TAGS, Card, class_list, is_edited, table
from stvit.hub.files import copy_file, file_sha256
from stvit.hub.folder import CONFIG, WEIGHTS
from stvit.hub.push import mismatched_tensors
from stvit.safe_text import clipped, code_span, escape_markdown
from stvit.weights.check import count_elements
from stvit.weights.config import SPARE_PARAMETERS, OtherModelError, check_model_args, limit_parameters, read_content
from stvit.weights.errors import PretrainedDownloadError, PretrainedError, describe_hub_error, describe_repository
from stvit.weights.source import Source

__all__ = [
    "FolderConfig",
    "Recipe",
    "copy_folder",
    "is_adapter_folder",
    "load_model",
    "load_pushed",
    "model_card",
    "read_config",
    "save_model",
    "write_card",
]

_MAX_CLASSES = 1 << 16
# The Hub's name of the task of each adapter.
_PIPELINES = {"torchvision": "object-detection", "segmentation": "image-segmentation"}


class _OverrideError(ValueError):
    """Raised when a model cannot be built with the arguments of the caller."""


@dataclass(frozen=True)
class Recipe:
    """How a model was built.

    Attributes:
        adapter: Folder of the adapter, such as 'torchvision'.
        builder: Function of the adapter, such as 'mask_rcnn'.
        args: Arguments of the function that JSON can store, without those about pretrained weights.
    """

    adapter: str
    builder: str
    args: dict[str, Any] = field(default_factory=dict)

    def call(self, builders: Mapping[str, Callable[..., Any]], overrides: Mapping[str, Any]) -> Any:
        """Builds the model without pretrained weights.

        Args:
            builders: Functions of the adapter by their names.
            overrides: Arguments that replace those of the recipe.

        Raises:
            ValueError: If the function does not exist, or an argument is wrong.
        """
        if self.builder not in builders:
            raise ValueError(f"builder must be one of {', '.join(builders)}, got {clipped(self.builder)}")
        check_model_args(self.args)
        for name, value in self.args.items():
            if isinstance(value, Mapping):
                check_model_args(value)
            elif name.startswith("pretrained"):
                raise ValueError(f"args.{name} is not allowed, because the folder contains the weights; remove it")
        try:
            return builders[self.builder](**{**self.args, **overrides})
        except TypeError as error:
            raise ValueError(str(error)) from error


@dataclass(frozen=True)
class FolderConfig:
    """Contents of config.json.

    Attributes:
        recipe: How the model is built.
        label_names: Class names in order, without the background.
        category_ids: Ids of the classes in the annotations, such as COCO's; None if they have none.
        details: Facts about the weights.
    """

    recipe: Recipe
    label_names: list[str] | None
    category_ids: list[int] | None
    details: Details


def save_model(
    model: Any,
    folder: str | Path,
    *,
    label_names: Sequence[str] | None = None,
    category_ids: Sequence[int] | None = None,
    details: Details | None = None,
) -> None:
    """Writes model.safetensors and config.json.

    Args:
        model: Model with a `recipe`, as the functions of the adapters return it.
        folder: Folder to write. Existing files of these names are replaced.
        label_names: Class names in order, without the background; None for those of the model.
        category_ids: Ids of the classes in the annotations; None for those of the model.
        details: Facts about the weights, for the model card.

    Raises:
        OSError, safetensors.SafetensorError: If a file cannot be written.
        ValueError: If the model has no recipe, JSON cannot store an argument, or the number of names or ids is not the
            number of classes.
    """
    recipe = getattr(model, "recipe", None)
    if not isinstance(recipe, Recipe):
        raise ValueError("the model does not know how it was built; create it with a function of stvit.adapters")
    label_names = label_names if label_names is not None else getattr(model, "label_names", None)
    category_ids = category_ids if category_ids is not None else getattr(model, "category_ids", None)
    _check_labels(recipe, label_names, category_ids)
    content = {
        **asdict(recipe),
        "label_names": None if label_names is None else list(label_names),
        "category_ids": None if category_ids is None else list(category_ids),
        "stvit": (details or Details()).to_dict(),
    }
    try:
        text = json.dumps(content, indent=2)
    except TypeError as error:
        raise ValueError(f"cannot write the arguments of {recipe.builder} as JSON: {error}") from error
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # safetensors writes only contiguous tensors
    save_file({key: value.contiguous().cpu() for key, value in model.state_dict().items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(text, encoding="utf-8")


def load_model(adapter: str, builders: Mapping[str, Callable[..., Any]], source: str | Path, **overrides: Any) -> Any:
    """Builds a saved model and loads its weights.

    Args:
        adapter: Folder of the adapter, such as 'torchvision'.
        builders: Functions of the adapter by their names.
        source: Model folder, run directory, or 'hf-hub:org/name' with an optional '@revision'.
        **overrides: Arguments of the builder that replace those of the folder.

    Returns:
        The model in evaluation mode, with the attributes `label_names` and `category_ids`.

    Raises:
        PretrainedError: If the source does not exist, is damaged, or belongs to another adapter. If it cannot be
            downloaded, the error is a `PretrainedDownloadError`.
    """
    folder = _find_folder(source)
    with _explain(source, list(overrides)):
        config = read_config(folder)
        if config.recipe.adapter != adapter:
            raise OtherModelError(asdict(config.recipe))
        elements = count_elements(folder / WEIGHTS)
        with limit_parameters(2 * elements + SPARE_PARAMETERS):
            try:
                model = config.recipe.call(builders, overrides)
            except ValueError as error:
                if not overrides:
                    raise
                raise _OverrideError(str(error)) from error
        weights = load_file(folder / WEIGHTS)
        own = model.state_dict()
        unfit = [key for key in sorted(own.keys() | weights.keys())
                 if key not in own or key not in weights or own[key].shape != weights[key].shape]  # fmt: skip
        if unfit:
            message = f"{len(unfit)} of {len(own)} tensors do not fit: {', '.join(unfit[:3])}"
            raise _OverrideError(f"{message}; remove the arguments") if overrides else ValueError(message)
        model.load_state_dict(weights)
    model.label_names, model.category_ids = config.label_names, config.category_ids
    return model.eval()


def read_config(folder: Path) -> FolderConfig:
    """Reads and checks config.json of a model folder.

    Raises:
        OSError: If the file cannot be read.
        OtherModelError: If the file describes a classifier.
        ValueError: If a field is missing, has a wrong type or contradicts another one.
    """
    content = read_content(folder / CONFIG)
    if "architecture" in content:
        raise OtherModelError(content)
    if content.get("adapter") not in _PIPELINES:
        raise ValueError(f"adapter must be one of {', '.join(_PIPELINES)}, got {clipped(content.get('adapter'))}")
    for key, kind in (("builder", str), ("args", dict)):
        if not isinstance(content.get(key), kind):
            raise ValueError(f"{key} must be {'text' if kind is str else 'a mapping'}, got {clipped(content.get(key))}")
    label_names = _read_list(content, "label_names", str)
    category_ids = _read_list(content, "category_ids", int)
    if label_names is not None and category_ids is not None and len(label_names) != len(category_ids):
        raise ValueError(f"{len(label_names)} label_names, but {len(category_ids)} category_ids")
    recipe = Recipe(content["adapter"], content["builder"], content["args"])
    _check_labels(recipe, label_names, category_ids)
    return FolderConfig(recipe, label_names, category_ids, Details.from_dict(content.get("stvit") or {}))


def is_adapter_folder(folder: Path) -> bool:
    """Returns whether config.json of a folder describes a model of an adapter."""
    try:
        return "adapter" in read_content(folder / CONFIG)
    except (OSError, ValueError):
        return False


def copy_folder(source: Path, folder: Path, name: str, license: str | None = None) -> FolderConfig:
    """Copies a model folder, and writes its card.

    A card that a person wrote or edited is copied instead.

    Args:
        source: Model folder.
        folder: Folder to write.
        name: Name that will load the model, such as 'hf-hub:org/name'.
        license: License of the weights, in the Hub's spelling; None for the license in the folder.

    Raises:
        HubError: If config.json is damaged, or a file is a link.
        OSError: If a file cannot be copied.
    """
    try:
        config = read_config(source)
    except ValueError as error:
        raise HubError(f"cannot read {source / CONFIG}: {error}; save the model again") from error
    for file in (WEIGHTS, CONFIG, CARD):
        if file != CARD or ((source / CARD).is_file() and is_edited(source / CARD)):
            copy_file(source, file, folder / file)
    if license is not None:
        content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        content["stvit"] = {**(content.get("stvit") or {}), "license": license}
        (folder / CONFIG).write_text(json.dumps(content, indent=2), encoding="utf-8")
    write_card(folder, name)
    return config


def load_pushed(folder: Path, builders: Mapping[str, Callable[..., Any]], repo_id: str, commit: str) -> int:
    """Loads a pushed model by its commit, and compares its tensors with the folder.

    Returns:
        Number of equal tensors: all tensors.

    Raises:
        HubError: If a tensor differs or the model cannot be loaded.
    """
    name = str(Source.hub(repo_id, commit))
    try:
        model = load_model(read_config(folder).recipe.adapter, builders, name)
    except (OSError, RuntimeError, ValueError) as error:
        raise HubError(f"pushed, but loading it failed: {error}") from error
    tensors = load_file(folder / WEIGHTS)
    wrong = mismatched_tensors(tensors, model.state_dict())
    if wrong:
        raise HubError(f"pushed, but {len(wrong)} tensors of {name} differ from the folder: {', '.join(wrong[:5])}")
    return len(tensors)


def _check_labels(recipe: Recipe, label_names: Sequence[str] | None, category_ids: Sequence[int] | None) -> None:
    """Checks the number of class names and ids.

    Raises:
        ValueError: If it is not the number of classes.
    """
    classes = recipe.args.get("num_classes")
    if not isinstance(classes, int):
        return
    if recipe.adapter == "torchvision":
        classes -= 1  # the background
    for name, values in (("label_names", label_names), ("category_ids", category_ids)):
        if values is not None and len(values) != classes:
            raise ValueError(f"{len(values)} {name}, but the model has {classes} classes; pass one for each class")


def _read_list(content: Mapping[str, Any], key: str, kind: type) -> list[Any] | None:
    values = content.get(key)
    is_valid = isinstance(values, list) and len(values) <= _MAX_CLASSES and all(type(v) is kind for v in values)
    if values is not None and not is_valid:
        raise ValueError(f"{key} must be a list of {'names' if kind is str else 'numbers'}, got {clipped(values)}")
    return values


def _find_folder(source: str | Path) -> Path:
    """Returns the folder of a source, downloaded if it is on the Hub."""
    try:
        parsed = Source.parse(source).with_config()
    except ValueError as error:
        raise PretrainedError(f"{source}: {error}") from error
    if parsed.kind == "folder":
        return parsed.path
    if parsed.kind != "hub":
        raise PretrainedError(f"{source} is not a model folder; pass a folder with {WEIGHTS} and {CONFIG}, or a run")
    try:
        files = [Path(hf_hub_download(parsed.name, name, revision=parsed.revision)) for name in (CONFIG, WEIGHTS)]
    except Exception as error:  # of any library below
        raise PretrainedDownloadError(
            f"{parsed}: cannot load the model of {describe_repository(parsed.name, parsed.revision)}: "
            f"{describe_hub_error(error, parsed.name, parsed.revision)}"
        ) from error
    return files[0].parent


@contextmanager
def _explain(source: str | Path, overrides: Sequence[str]) -> Iterator[None]:
    """Context manager that turns errors about a model folder into `PretrainedError`.

    Args:
        source: Source of the model.
        overrides: Names of arguments that the caller passed.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except OtherModelError as error:
        raise PretrainedError(f"cannot load {source}: {error}") from error
    except _OverrideError as error:
        raise PretrainedError(f"cannot load {source} with the given {', '.join(overrides)}: {error}") from error
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        raise PretrainedError(f"cannot load {source}: {error}; save or download the model again") from error


# ---------------------------------------------------------------------------------------------------------------------
# Card


def write_card(folder: Path, name: str) -> None:
    """Writes the card of a model folder, unless a person wrote or edited it.

    Args:
        folder: Folder with model.safetensors and config.json.
        name: Name that loads the model, such as 'hf-hub:org/name'.

    Raises:
        HubError: If config.json cannot be read.
    """
    path = folder / CARD
    if not path.exists() or not is_edited(path):
        path.write_text(model_card(folder, name), encoding="utf-8")


def model_card(folder: Path, name: str) -> str:
    """Returns the card of a detector or a segmentation model.

    `write_card` has the arguments.
    """
    try:
        config = read_config(folder)
    except (OSError, ValueError) as error:
        raise HubError(f"cannot read {folder / CONFIG}: {error}; save the model again") from error
    recipe, details = config.recipe, config.details
    backbone = str(recipe.args.get("backbone", "timm"))
    is_stvit = backbone.startswith("stvit")
    pipeline = _PIPELINES[recipe.adapter]
    title = Path(Source.parse_model_name(name).full_name).resolve().name
    names = config.label_names or []
    parameters = sum(value.numel() for value in load_file(folder / WEIGHTS).values())
    return Card(
        metadata=ModelCardData(
            license=details.license,
            library_name="stvit",
            pipeline_tag=pipeline,
            tags=[pipeline, "timm", *(TAGS if is_stvit else ())],
            datasets=details.datasets or None,
            model_name=title,
            eval_results=[_eval_result(metric, pipeline) for metric in details.metrics] or None,
        ),
        title=title,
        summary=f"{code_span(recipe.builder)} with the backbone {code_span(backbone)}.",
        code=f'from stvit.adapters import {recipe.adapter}\n\nmodel = {recipe.adapter}.load("{name}")',
        facts=[
            f"{parameters / 1e6:.2f} M parameters",
            *([f"{len(names)} classes: {class_list(names, 20)}"] if names else []),
            *([f"weights: {escape_markdown(details.weights)}"] if details.weights else []),
            f"sha256 of {WEIGHTS}: `{file_sha256(folder / WEIGHTS)}`",
            *([] if details.license else ["license: not stated by the owner"]),
        ],
        results=_results(details),
        is_stvit=is_stvit,
    ).render()


def _results(details: Details) -> str:
    rows = [[escape_markdown(m.name), f"{m.value:.2f}", escape_markdown(m.dataset), escape_markdown(m.how)]
            for m in details.metrics]  # fmt: skip
    return table(["metric", "value (%)", "dataset", "measured"], rows) if rows else NOT_MEASURED


def _eval_result(metric: Any, pipeline: str) -> EvalResult:
    return EvalResult(
        task_type=pipeline,
        dataset_type=re.sub(r"[^\w.-]+", "-", metric.dataset),
        dataset_name=metric.dataset,
        dataset_split=metric.split,
        metric_type=metric.name,
        metric_name=metric.name,
        metric_value=metric.value,
    )

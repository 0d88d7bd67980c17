"""Saves and reads model folders in timm's format.

A model folder contains model.safetensors and config.json.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from timm.models import save_for_hf
from torch import nn

from stvit.hub.files import HubError
from stvit.safe_text import clipped
from stvit.weights.config import read_config as read_timm_config

__all__ = ["CONFIG", "WEIGHTS", "Details", "FolderConfig", "Metric", "read_config", "save", "write_details"]

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
# Key of our facts in config.json. timm ignores it.
_KEY = "stvit"


@dataclass(frozen=True)
class Metric:
    """Accuracy of a model on a dataset.

    Attributes:
        name: Name of the metric, such as 'top-1'.
        value: Accuracy in percent.
        dataset: Name of the dataset.
        split: Split of the dataset; None if unknown.
        how: How the accuracy was measured: images, resolution, versions.
    """

    name: str
    value: float
    dataset: str
    split: str | None
    how: str


@dataclass
class Details:
    """Facts about weights that timm does not record. The model card shows them.

    Attributes:
        weights: Which weights these are, such as 'moving average (EMA), after epoch 300'.
        source: File that the weights were converted from.
        license: License of the weights, in the Hub's spelling.
        tag: timm's tag of published weights, such as 'in1k'.
        datasets: Ids of the training datasets on the Hub.
        metrics: Measured accuracies.
    """

    weights: str | None = None
    source: str | None = None
    license: str | None = None
    tag: str | None = None
    datasets: list[str] = field(default_factory=list)
    metrics: list[Metric] = field(default_factory=list)

    @classmethod
    def from_dict(cls, values: Any) -> "Details":
        """Reads the details in config.json. Unknown keys are ignored.

        Raises:
            ValueError: If a value has a wrong type.
        """
        _check(isinstance(values, Mapping), _KEY, "a mapping", values)
        for key in ("weights", "source", "license", "tag"):
            _check(isinstance(values.get(key), str | None), f"{_KEY}.{key}", "text", values.get(key))
        datasets, metrics = values.get("datasets") or [], values.get("metrics") or []
        _check(isinstance(datasets, list) and all(isinstance(name, str) for name in datasets), f"{_KEY}.datasets",
               "a list of names", datasets)  # fmt: skip
        _check(isinstance(metrics, list), f"{_KEY}.metrics", "a list", metrics)
        for metric in metrics:
            is_metric = (
                isinstance(metric, Mapping)
                and all(isinstance(metric.get(key), str) for key in ("name", "dataset", "how"))
                and isinstance(metric.get("split"), str | None)
                and isinstance(metric.get("value"), int | float)
            )
            _check(is_metric, f"{_KEY}.metrics", "a list of metrics with name, value, dataset, split and how", metric)
        known = {item.name: values[item.name] for item in fields(cls) if values.get(item.name) is not None}
        keys = [item.name for item in fields(Metric)]
        return cls(**{**known, "metrics": [Metric(**{key: metric.get(key) for key in keys}) for metric in metrics]})

    def to_dict(self) -> dict[str, Any]:
        """Returns the known facts in the form that config.json stores."""
        return {key: value for key, value in asdict(self).items() if value}


def _check(is_valid: bool, name: str, wanted: str, value: Any) -> None:
    if not is_valid:
        raise ValueError(f"{name} must be {wanted}, got {clipped(value)}")


@dataclass(frozen=True)
class FolderConfig:
    """Contents of config.json in a model folder.

    Attributes:
        architecture: Name of the model in timm.
        pretrained_cfg: Fields of timm's `PretrainedCfg`, with `num_classes` and `label_names`.
        details: Facts about the weights.
    """

    architecture: str
    pretrained_cfg: dict[str, Any]
    details: Details


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    label_names: Sequence[str] | None = None,
    data_config: Mapping[str, Any] | None = None,
    details: Details | None = None,
) -> None:
    """Writes model.safetensors and config.json.

    `timm.create_model("local-dir:FOLDER", pretrained=True)` loads the folder. `stvit.hub.push` uploads it.

    Args:
        model: Model created by timm.
        folder: Folder to write. Existing files of these names are replaced.
        label_names: Class names, in order.
        data_config: Preprocessing settings from `timm.data.resolve_data_config`; None for those of the model.
        details: Facts about the weights, for the model card.

    Raises:
        OSError, safetensors.SafetensorError: If a file cannot be written.
        ValueError: If an argument of the model cannot be written as JSON.
    """
    details = details or Details()
    known = details.to_dict()
    save_for_hf(
        # safetensors writes only contiguous tensors
        copy.deepcopy(model).to(memory_format=torch.contiguous_format),
        str(folder),
        model_config={
            **({"label_names": list(label_names)} if label_names else {}),
            **({_KEY: known} if known else {}),
            # The license in the model's own configuration belongs to the weights that the training started from.
            "pretrained_cfg": {"license": details.license},
        },
        safe_serialization=True,
        data_config=None if data_config is None else dict(data_config),
    )
    write_details(Path(folder), details)


def read_config(folder: Path) -> FolderConfig:
    """Reads and checks config.json of a model folder.

    Raises:
        HubError: If the file cannot be read, was not written by timm, or a field has a wrong type or range.
    """
    path = folder / CONFIG
    try:
        config = read_timm_config(path)
        if not isinstance(config.content.get("pretrained_cfg"), dict):
            raise ValueError("pretrained_cfg is missing")
        details = Details.from_dict(config.content.get(_KEY, {}))
        return FolderConfig(config.architecture, config.pretrained_cfg, details)
    except (OSError, KeyError, ValueError) as error:
        problem = f"{error.args[0]} is missing" if isinstance(error, KeyError) else error
        raise HubError(f"cannot read {path}: {problem}; save the model again") from error


def write_details(folder: Path, details: Details) -> None:
    """Updates the facts about the weights in config.json.

    It also removes a repeated model argument.

    timm writes the number of classes both as a field and as an argument of the model. transformers passes both to
    `timm.create_model`, which fails.

    Args:
        folder: Model folder.
        details: Facts to write. Other keys in config.json are kept.
    """
    path = folder / CONFIG
    old = json.loads(path.read_text(encoding="utf-8"))
    new = copy.deepcopy(old)
    new.get("model_args", {}).pop("num_classes", None)
    facts = {**new.get(_KEY, {}), **details.to_dict()}
    if facts:
        new[_KEY] = facts
    if new != old:
        path.write_text(json.dumps(new, indent=2), encoding="utf-8")

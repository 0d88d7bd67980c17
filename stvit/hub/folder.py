"""Model folders: model.safetensors and config.json, as timm reads them."""

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.models import save_for_hf
from torch import nn

from stvit.hub.files import HubError
from stvit.weights.config import read_config as check_config


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    label_names: Sequence[str] | None = None,
    data_config: Mapping[str, Any] | None = None,
    details: Mapping[str, Any] | None = None,
) -> None:
    """Writes model.safetensors and config.json, as `timm.create_model("local-dir:…")` and the Hub read them.

    Args:
        model: Made by `timm.create_model`.
        folder: Where to; what it holds of these names is replaced.
        label_names: Of the classes, in order.
        data_config: How images are prepared (`timm.data.resolve_data_config`); None for the model's own.
        details: What is known of the weights, for the card: `weights`, `source`, `metrics`, … (see `model_card`).

    Raises:
        OSError, safetensors.SafetensorError: If they cannot be written.
        ValueError: If an argument of the model cannot be written as JSON.
    """
    details, folder = dict(details or {}), Path(folder)
    save_for_hf(
        # safetensors takes contiguous tensors alone
        copy.deepcopy(model).to(memory_format=torch.contiguous_format),
        str(folder),
        model_config={
            **({"label_names": list(label_names)} if label_names else {}),
            **({"stvit": details} if details else {}),
            # Of the weights that this model began with, if any; not of these.
            "pretrained_cfg": {"license": details.get("license")},
        },
        safe_serialization=True,
        data_config=None if data_config is None else dict(data_config),
    )
    remove_repeated_arguments(folder)


def remove_repeated_arguments(folder: Path) -> None:
    """Removes the number of classes from the model's arguments in config.json, which states it beside them too.

    timm writes and reads both. transformers passes both to `timm.create_model`, which fails.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("model_args", {}).pop("num_classes", None) is not None:
        path.write_text(json.dumps(config, indent=2), encoding="utf-8")


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a folder.

    Raises:
        HubError: If it cannot be read, is not one of timm's, or a field has a wrong type or range.
    """
    path = folder / "config.json"
    try:
        check_config(path)
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config.get("pretrained_cfg"), dict):
            raise ValueError("it has no architecture and pretrained_cfg, as timm writes them")
    except (OSError, KeyError, ValueError) as error:
        problem = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise HubError(f"cannot read {path}: {problem}; make the folder anew") from error
    config["num_classes"] = config.get("num_classes", config["pretrained_cfg"].get("num_classes"))
    return config

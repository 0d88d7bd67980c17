"""Reads and checks config.json before a model is built from it.

A folder or a repository on the Hub may come from anybody. Type and range of each field that timm or this package reads
are checked. The parameters of a model are counted while it is built, and the tables that it computes.
"""

import json
import math
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stvit.safe_text import clipped

__all__ = [
    "ModelTooLargeError",
    "OtherModelError",
    "SavedConfig",
    "TensorLimit",
    "check_model_args",
    "check_pretrained_cfg",
    "limit_parameters",
    "read_config",
    "read_content",
]

MAX_CONFIG = 64 << 20  # bytes
MAX_IMAGE = 1 << 28  # values of an image: 1 GB in float32
MAX_SIDE = 1 << 14
MAX_CLASSES = 1 << 24
MAX_NUMBER = 1e9
MAX_LENGTH = 10_000
# Parameters of a model beyond twice the elements in its file, for a new classifier and the like: 1 GB.
SPARE_PARAMETERS = 1 << 28
# Largest number of modules and parameters; the largest models of timm have a few thousand.
MAX_PARTS = 20_000
# Elements of a tensor that a model computes when it is built; real models stay below 10 million.
MAX_TENSOR = 1 << 28


class ModelTooLargeError(ValueError):
    """Raised when a model has more parameters than its file of weights can explain."""


# Models of `stvit.adapters` by the name of the adapter: what they are, and the ending of their commands.
_ADAPTERS = {"torchvision": ("detector", "det"), "segmentation": ("segmentation model", "seg")}


class OtherModelError(ValueError):
    """Raised when config.json describes another kind of model.

    The message says what loads it.

    Attributes:
        kind: The model that it describes, such as 'a detector (mask_rcnn)'.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        """Creates the error from the contents of config.json."""
        if "architecture" in content:
            self.kind = f"a classifier ({_name(content['architecture'])})"
            use = (
                "load it with stvit.create_model, pass it to stvit validate, or as --pretrained-backbone to a training"
            )
        else:
            noun, command = _ADAPTERS[content["adapter"]]
            self.kind = f"a {noun} ({_name(content.get('builder'))})"
            use = (
                f"load it with stvit.adapters.{content['adapter']}.load, or pass it to stvit predict-{command} or "
                f"validate-{command}"
            )
        super().__init__(f"it is {self.kind}; {use}")


def _name(value: Any) -> str:
    return clipped(value).strip("'")


@dataclass(frozen=True)
class SavedConfig:
    """Contents of config.json.

    Attributes:
        architecture: Name of the model in timm's registry.
        pretrained_cfg: Fields of timm's `PretrainedCfg`, with `num_classes` and `label_names` of the top level.
        model_args: Arguments of the model.
        content: Unchanged content of the file.
    """

    architecture: str
    pretrained_cfg: dict[str, Any]
    model_args: dict[str, Any]
    content: dict[str, Any]


def read_content(path: Path, max_bytes: int = MAX_CONFIG) -> dict[str, Any]:
    """Returns the contents of config.json without checks of the fields.

    Args:
        path: Path of config.json, or of its folder.
        max_bytes: Largest size of the file.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not a regular file (reading a pipe could wait forever), too large or not a JSON object.
    """
    path = path / "config.json" if path.is_dir() else path
    status = path.stat()
    size = status.st_size
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file")
    if size > max_bytes:
        raise ValueError(f"{size:,} bytes, more than the limit of {max_bytes:,}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError(f"expected a mapping of names to values, got {clipped(content)}")
    return content


def read_config(path: Path) -> SavedConfig:
    """Reads config.json and checks its fields.

    Args:
        path: Path of config.json, or of its folder.

    Raises:
        OSError: If the file cannot be read.
        KeyError: If the architecture is missing.
        OtherModelError: If the file describes a model of `stvit.adapters`.
        ValueError: If the file is not JSON, or a field has a wrong type or range. The message names the field.
    """
    content = read_content(path)
    if "architecture" not in content:
        if content.get("adapter") in tuple(_ADAPTERS):  # a tuple, because the value may not be hashable
            raise OtherModelError(content)
        raise KeyError("architecture")
    if not isinstance(content["architecture"], str):
        raise ValueError(f"architecture must be the name of a model, got {clipped(content['architecture'])}")
    cfg = content.get("pretrained_cfg", content)  # older files have these fields at the top level
    if not isinstance(cfg, dict):
        raise ValueError(f"pretrained_cfg must be a mapping of names to values, got {clipped(cfg)}")
    cfg = {**cfg, **{key: content[key] for key in ("num_classes", "label_names") if content.get(key) is not None}}
    model_args = content.get("model_args") or {}
    check_pretrained_cfg(cfg)
    check_model_args(model_args)
    return SavedConfig(content["architecture"], cfg, model_args, content)


def check_pretrained_cfg(cfg: Mapping[str, Any]) -> None:
    """Checks the fields of timm's `PretrainedCfg`.

    Args:
        cfg: Fields by name. Missing fields and None mean timm's default.

    Raises:
        ValueError: If a field has a wrong type or range. The message names the field.
    """
    for key, (is_valid, wanted) in _FIELDS.items():
        value = cfg.get(key)
        if value is not None and not is_valid(value):
            raise ValueError(f"{key} must be {wanted}, got {clipped(value)}")


def check_model_args(args: Any) -> None:
    """Checks the model arguments in config.json (`model_args`).

    Arguments that all models share are checked for type and range; all others only for size. The model itself checks
    the rest.

    Raises:
        ValueError: If an argument has a wrong type or range. The message names the argument.
    """
    if not isinstance(args, Mapping):
        raise ValueError(f"model_args must be a mapping of names to values, got {clipped(args)}")
    for key, value in args.items():
        if key in _NO_ARGUMENTS:
            raise ValueError(f"{key} is not allowed in model_args because it {_NO_ARGUMENTS[key]}; remove it")
        if value is None:
            continue
        is_valid, wanted = _ARGUMENTS.get(key, (_is_modest, _MODEST))
        if "drop" in key and key.endswith("_rate"):
            is_valid, wanted = _is_rate, "a number from 0 to 1"
        if not is_valid(value):
            raise ValueError(f"{key} must be {wanted}, got {clipped(value)}")


@contextmanager
def limit_parameters(limit: int | None) -> Iterator[None]:
    """Context manager that limits the parameters of a model built by this thread.

    A layer registers a parameter before it initializes the values, and the system provides memory when the values are
    written. The error is therefore raised before the memory is used.

    Args:
        limit: Largest number of parameters; None for no limit.

    Raises:
        ModelTooLargeError: If the model has more parameters.
    """
    if limit is None:
        yield
        return
    thread, parameters, parts = threading.get_ident(), 0, 0

    def count(_module: Any, _name: str, part: Any) -> None:
        nonlocal parameters, parts
        if part is None or threading.get_ident() != thread:
            return
        parts += 1
        parameters += part.numel() if hasattr(part, "numel") else 0
        if parameters > limit or parts > MAX_PARTS:
            many = f"{limit:,} parameters" if parameters > limit else f"{MAX_PARTS:,} modules and parameters"
            raise ModelTooLargeError(
                f"architecture and model_args describe a model with more than {many}, too large for the weights; to "
                "build such a model, pass its arguments to timm.create_model with the name of the architecture"
            )

    handles = [
        register_module_parameter_registration_hook(count),
        register_module_module_registration_hook(count),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class TensorLimit(TorchDispatchMode):
    """Limits the tensors computed while a model is built on the meta device.

    Models compute position indices and other tables whose size grows with the square of the image's area. On the meta
    device these take no memory.

    Raises:
        ModelTooLargeError: If a tensor has more than `MAX_TENSOR` elements.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and value.numel() > MAX_TENSOR:
                raise ModelTooLargeError(
                    f"architecture and model_args describe a model with a table of {value.numel():,} elements, "
                    "too large; to build such a model, pass its arguments to timm.create_model with the name of the "
                    "architecture"
                )
        return result


# ---------------------------------------------------------------------------------------------------------------------
# Types and ranges


def _is_integer(value: Any, low: float = -math.inf, high: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_number(value: Any, low: float = -math.inf, high: float = math.inf) -> bool:
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and low <= value <= high
    )


def _is_rate(value: Any) -> bool:
    return _is_number(value, 0, 1)


def _is_list(value: Any, is_item: Callable[[Any], bool], low: int = 0, high: int = MAX_LENGTH) -> bool:
    return isinstance(value, list | tuple) and low <= len(value) <= high and all(map(is_item, value))


def _is_image_size(value: Any) -> bool:
    return _is_list(value, lambda side: _is_integer(side, 1), 3, 3) and math.prod(value) <= MAX_IMAGE


def _is_size(value: Any) -> bool:
    sides = [value, value] if _is_integer(value) else value
    return _is_list(sides, lambda side: _is_integer(side, 1), 2, 2) and math.prod(sides) * 3 <= MAX_IMAGE


def _is_std(value: Any) -> bool:
    return _is_number(value, 0, MAX_NUMBER) and value > 0


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_crop(value: Any) -> bool:
    return _is_number(value, 0.05, 2)


def _is_layer(value: Any) -> bool:
    return _is_text(value) or _is_list(value, _is_text)


def _is_modest(value: Any, depth: int = 0) -> bool:
    """Returns whether the numbers and lengths in a value are within the limits."""
    if depth > 10:
        return False
    if isinstance(value, int | float):
        return _is_number(value, -MAX_NUMBER, MAX_NUMBER) or isinstance(value, bool)
    if isinstance(value, Mapping):
        return len(value) <= MAX_LENGTH and all(_is_modest(item, depth + 1) for item in value.values())
    if isinstance(value, list | tuple):
        return len(value) <= MAX_LENGTH and all(_is_modest(item, depth + 1) for item in value)
    return True


_IMAGE = (_is_image_size, f"three integers of at least 1 (channels, height, width) with a product up to {MAX_IMAGE:,}")
_CROP = (_is_crop, "a number from 0.05 to 2")
_TEXT = (_is_text, "text")
_INTEGERS = (lambda value: _is_list(value, lambda item: _is_integer(item, 1, MAX_SIDE)), "a list of integers")
_LAYER = (_is_layer, "the name of a layer or a list of names")
_MODEST = f"made of finite numbers up to {MAX_NUMBER:g} and lists of at most {MAX_LENGTH:,} items"
_CLASSES = (lambda value: _is_integer(value, 0, MAX_CLASSES), f"an integer from 0 to {MAX_CLASSES:,}")
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "architecture": (_is_text, "the name of a model"),
    "input_size": _IMAGE,
    "test_input_size": _IMAGE,
    "min_input_size": _IMAGE,
    "fixed_input_size": (_is_bool, "true or false"),
    "interpolation": _TEXT,
    "crop_pct": _CROP,
    "test_crop_pct": _CROP,
    "crop_mode": _TEXT,
    "mean": (
        lambda value: _is_list(value, lambda item: _is_number(item, -MAX_NUMBER, MAX_NUMBER), 1),
        "a list of numbers",
    ),
    "std": (lambda value: _is_list(value, _is_std, 1), "a list of numbers above 0"),
    "num_classes": _CLASSES,
    "label_offset": (lambda value: _is_integer(value, 0, MAX_CLASSES), "an integer of at least 0"),
    "label_names": (
        lambda value: isinstance(value, Mapping) or _is_list(value, _is_text, 0, MAX_CLASSES),
        "a list of names",
    ),
    "label_descriptions": (lambda value: isinstance(value, Mapping | list | tuple), "a mapping of names to texts"),
    "pool_size": _INTEGERS,
    "test_pool_size": _INTEGERS,
    "first_conv": _LAYER,
    "classifier": _LAYER,
    "custom_load": (lambda value: _is_bool(value) or _is_text(value), "true or false"),
    "hf_hub_filename": _TEXT,
    "license": _TEXT,
}
_NO_ARGUMENTS = dict.fromkeys(
    ("cache_dir", "checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay"), "names a file"
) | dict.fromkeys(("device", "dtype"), "is chosen when the model is created")
_ARGUMENTS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "num_classes": _CLASSES,
    "in_chans": (lambda value: _is_integer(value, 1, MAX_SIDE), f"an integer from 1 to {MAX_SIDE:,}"),
    "img_size": (_is_size, f"an integer or a pair of integers of at least 1, with an area up to {MAX_IMAGE // 3:,}"),
    "features_only": (_is_bool, "true or false"),
    "out_indices": (
        lambda value: _is_integer(value, -1000, 1000) or _is_list(value, lambda item: _is_integer(item, -1000, 1000)),
        "an integer or a list of integers",
    ),
}

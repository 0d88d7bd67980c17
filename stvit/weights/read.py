"""Reads weights from any file without running the file's code.

A checkpoint is a file of safetensors, of timm, of the authors, of Lightning or of `tools/train_cls.py`. The weights may
be below a key such as `state_dict` or `model`, with their moving average (EMA) below another.
"""

import argparse
import pickle
import pickletools
import re
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from stvit.weights.check import WeightsFileError, check_file, find_corruption
from stvit.weights.errors import PretrainedError

__all__ = ["find_weight_keys", "pick_weights", "read_checkpoint", "read_file", "read_weights"]

# Keys of a checkpoint that wrap the weights, in timm's order.
_EMA_KEYS = ("state_dict_ema", "model_ema")
_PLAIN_KEYS = ("state_dict", "model")
# Names in a pickle that PyTorch itself restores.
_ALLOWED = re.compile(
    r"collections\.OrderedDict|argparse\.Namespace|torch\.\w*(Storage|Size|device)|torch\._utils\._rebuild\w+"
)


def read_weights(path: Path, use_ema: bool | None = None) -> tuple[dict[str, Any], bool]:
    """Returns the weights in a file, and whether they are a moving average (EMA).

    Args:
        path: File of safetensors or PyTorch.
        use_ema: Whether to take the EMA weights; None takes them if the file has them.

    Raises:
        PretrainedError: If the file cannot be read or lacks the requested weights.
    """
    return pick_weights(read_checkpoint(path), path, use_ema)


def read_checkpoint(path: Path) -> Mapping[str, Any]:
    """Returns the contents of a checkpoint by name.

    Args:
        path: File of safetensors or PyTorch with tensors, numbers, strings, containers and `argparse.Namespace`.

    Raises:
        PretrainedError: If the file is damaged, needs too much memory, or contains code. The message names the code.
    """
    if not path.is_file():
        raise PretrainedError(f"cannot read weights from {path}: it is not a file")
    try:
        content = read_file(path)
    except Exception as error:  # unpickling an arbitrary file raises nearly any error
        unsafe = _find_unsafe_names(path, error)
        if unsafe:
            raise PretrainedError(
                f"cannot read weights from {path}: loading it would run {', '.join(unsafe)}, and code in checkpoints "
                "is never run; ask the owner for a file with tensors only, or for safetensors"
            ) from error
        raise PretrainedError(f"cannot read weights from {path}: {_describe_damage(path, error)}") from error
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        raise PretrainedError(
            f"cannot read weights from {path}: expected a dictionary with names as keys, got {type(content).__name__}"
        )
    return content


def pick_weights(content: Mapping[str, Any], path: Path, use_ema: bool | None = None) -> tuple[dict[str, Any], bool]:
    """Returns the weights among the contents, and whether they are EMA weights.

    Args:
        content: Contents as `read_checkpoint` returns them.
        path: File of the checkpoint, for messages.
        use_ema: Whether to take the EMA weights; None takes them if the checkpoint has them.

    Raises:
        PretrainedError: If the checkpoint lacks the requested weights.
    """
    plain, ema = find_weight_keys(content)
    if use_ema and ema is None:
        raise PretrainedError(f"{path} has no EMA weights; remove --use-ema (use_ema=True)")
    if use_ema is False and ema is not None and plain is None:
        raise PretrainedError(f"{path} has only EMA weights; remove --no-use-ema (use_ema=False)")
    key = plain if ema is None or use_ema is False else ema
    weights = content if key is None else content[key]
    if not all(isinstance(name, str) for name in weights):
        raise PretrainedError(f"cannot read weights from {path}: the tensors below {key!r} have no names")
    return dict(weights), key is not None and key == ema


def find_weight_keys(content: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Returns the keys of the weights and of the EMA weights; None if missing."""

    def find(keys: tuple[str, ...]) -> str | None:
        return next((key for key in keys if isinstance(content.get(key), Mapping)), None)

    return find(_PLAIN_KEYS), find(_EMA_KEYS)


def read_file(path: Path) -> Any:
    """Returns whatever a file of safetensors or PyTorch contains, on the CPU.

    Raises:
        WeightsFileError: If the file is damaged or needs too much memory.
        OSError: If the file cannot be read.
        pickle.UnpicklingError: If the file contains anything but tensors and plain data.
    """
    check_file(path)
    if path.suffix == ".safetensors":
        return load_file(path)
    with _allow_namespace():
        return torch.load(path, map_location="cpu", weights_only=True)


_LOADING = threading.Lock()


@contextmanager
def _allow_namespace() -> Iterator[None]:
    """Context manager that lets PyTorch restore `argparse.Namespace`.

    Checkpoints of timm and of the authors contain one.

    The lock is needed because PyTorch's list of allowed classes and the warning filters belong to the process.
    """
    with _LOADING, torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the error of the caller says the same
        yield


def _describe_damage(path: Path, error: Exception) -> str:
    if isinstance(error, WeightsFileError):
        return find_corruption(path) or f"it {error.problem}"
    if isinstance(error, OSError):
        return " ".join(str(error).split())
    return find_corruption(path) or "it is damaged or not a file of weights"


def _find_unsafe_names(path: Path, error: Exception) -> list[str]:
    """Returns the functions and classes in a pickle that PyTorch does not allow."""
    if not isinstance(error, pickle.UnpicklingError):
        return []
    try:
        with _allow_namespace():
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # not PyTorch's present format
        return _find_names_in_pickle(path)


def _find_names_in_pickle(path: Path) -> list[str]:
    """Returns the functions and classes in a bare pickle, up to the first damage."""
    names, strings = set(), [""] * 2
    try:
        with path.open("rb") as file:
            # PyTorch's former format has four pickles in a row: a number, a version, the system, the contents.
            for opcode, value, _ in chain.from_iterable(pickletools.genops(file) for _ in range(4)):
                if opcode.name == "GLOBAL":
                    names.add(str(value).replace(" ", "."))
                elif opcode.name == "STACK_GLOBAL":
                    names.add(".".join(strings[-2:]))
                elif isinstance(value, str):
                    strings.append(value)
    except ValueError:  # the end of the readable part
        pass
    return sorted(name for name in names if not _ALLOWED.fullmatch(name))

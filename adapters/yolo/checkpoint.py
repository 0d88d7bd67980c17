"""Opens checkpoints of detectors without running code.

A checkpoint is a file or in a repository on the Hub.
"""

import os
import re
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

import torch
import torchvision
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from torch import nn
from ultralytics.nn import tasks
from ultralytics.nn.tasks import torch_safe_load
from ultralytics.utils import SETTINGS, checks
from ultralytics.utils.downloads import attempt_download_asset

from stvit.weights.check import WeightsFileError, check_file, find_corruption
from stvit.weights.errors import PretrainedDownloadError, PretrainedError, describe_hub_error, describe_repository
from stvit.weights.source import Source

from .registration import allow_modules

__all__ = ["CHECKPOINT", "check_local", "fetch_checkpoint", "is_trusting", "open_safely", "trusting"]

# File name of a published checkpoint.
CHECKPOINT = "model.pt"
# Environment variable that is set while files are trusted. Processes that training starts for more GPUs read it too.
_TRUST_VARIABLE = "STVIT_YOLO_TRUST"
# Globals that Ultralytics restores in a restricted form.
_RESTRICTED = {"builtins.getattr", "numpy.dtype"}
# Packages with layers. Whole models, which build themselves from a configuration of their own, are defined elsewhere.
_LAYERS = ("torch.nn.", "torchvision.ops.", "ultralytics.nn.modules.", "stvit.adapters.yolo.")


def fetch_checkpoint(name: str, cache_dir: str | Path | None = None) -> Path:
    """Downloads the checkpoint of a detector and checks that it is safe to open.

    Args:
        name: 'hf-hub:org/name' or 'hf-hub:org/name@revision'. The checkpoint is model.pt, best.pt or the only .pt file.
        cache_dir: Cache folder; None for that of huggingface_hub.

    Returns:
        Path in the cache.

    Raises:
        PretrainedDownloadError: If the checkpoint cannot be downloaded.
        PretrainedError: If the file is not a checkpoint of Ultralytics, or is not safe to open.
    """
    source = Source.parse_hub(name)
    if source is None:
        raise PretrainedError(f"{name} is not a model on the Hub; pass hf-hub:ORG/NAME")
    message = f"{source}: cannot load the detector of {describe_repository(source.name, source.revision)}"
    try:
        path = Path(_download(source.name, source.revision, cache_dir))
    except PretrainedError as error:
        raise PretrainedError(f"{message}: {error}") from error
    except Exception as error:  # of any library below
        raise PretrainedDownloadError(
            f"{message}: {describe_hub_error(error, source.name, source.revision)}"
        ) from error
    try:
        open_safely(path)
    except PretrainedError as error:
        raise PretrainedError(f"{message}: {error}") from error
    return path


def _download(repo_id: str, revision: str | None, cache_dir: str | Path | None) -> str:
    def download(file: str) -> str:
        return hf_hub_download(repo_id, file, revision=revision, cache_dir=cache_dir)

    try:
        return download(CHECKPOINT)
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError:
        files = [file for file in HfApi().list_repo_files(repo_id, revision=revision) if file.endswith(".pt")]
        if "best.pt" not in files and len(files) != 1:
            found = f"these files end in .pt: {', '.join(files)}" if files else "no file ends in .pt"
            raise PretrainedError(f"it has no {CHECKPOINT}, and {found}; pass a repository with one detector") from None
        return download("best.pt" if "best.pt" in files else files[0])


def check_local(name: Any, trust: bool = False) -> None:
    """Checks a checkpoint before Ultralytics opens it.

    Ultralytics runs any code in the file.

    Args:
        name: Model in any form that Ultralytics takes: a path, a name such as 'yolo26n.pt', or a URL, which is
            downloaded first. Only names of checkpoints (.pt) are checked.
        trust: Whether to skip the check.

    Raises:
        PretrainedError: If the file is damaged or not safe to open.
    """
    if trust or is_trusting() or not isinstance(name, str | Path):
        return
    text = str(name).strip()
    if text.lower().startswith(checks.REMOTE_FILE_PREFIXES):
        text = str(checks.check_file(text, download_dir=SETTINGS["weights_dir"]))
    text = str(checks.check_model_file_from_stem(text))
    if Path(text).suffix.lower() != ".pt":
        return
    path = Path(attempt_download_asset(text))
    if not path.is_file():  # Ultralytics reports the missing file
        return
    try:
        open_safely(path)
    except PretrainedError as error:
        raise PretrainedError(
            f"{error}. A file that is not safe to open runs code on your machine: if you trust the author, pass "
            "trust=True"
        ) from error


@contextmanager
def trusting(trust: bool) -> Iterator[None]:
    """Context manager that skips the check of `check_local`.

    It has an effect in this process and in the processes that it starts.
    """
    before = os.environ.get(_TRUST_VARIABLE)
    if trust:
        os.environ[_TRUST_VARIABLE] = "1"
    try:
        yield
    finally:
        if trust and before is None:
            os.environ.pop(_TRUST_VARIABLE, None)


def is_trusting() -> bool:
    """Returns whether `trusting(True)` is active here or in a parent process."""
    return os.environ.get(_TRUST_VARIABLE) == "1"


def open_safely(path: Path) -> dict[str, Any]:
    """Returns the contents of a checkpoint of Ultralytics; runs no code.

    Restored are tensors and modules of PyTorch, timm, Ultralytics and this package, plain containers, a plain
    configuration, and the losses and transforms that Ultralytics saves with its models. Hooks are refused. Ultralytics
    opens the file again in its ordinary way, and training builds the model again.

    Raises:
        PretrainedError: If the file is damaged, could exhaust the memory, or contains anything else. The message names
            what it contains.
    """
    broken = find_corruption(path)
    if broken is not None:
        raise PretrainedError(f"{path} {broken}")
    try:
        check_file(path)
    except WeightsFileError as error:
        raise PretrainedError(f"{path} is not a checkpoint of Ultralytics: it {error.problem}") from error
    try:
        allow_modules(path)
        checkpoint = torch_safe_load(path, safe_only=True)[0]
    except Exception as error:  # unpickling another kind of file raises nearly any error
        try:
            names = sorted(set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - _RESTRICTED)
        except Exception:  # not in PyTorch's current format
            names = []
        if names:
            raise PretrainedError(
                f"{path} wants to run {', '.join(names[:10])}, which is not part of a detector; no code was run"
            ) from error
        raise PretrainedError(f"{path} is not a checkpoint of Ultralytics ({type(error).__name__})") from error
    if type(checkpoint) is not dict or not any(isinstance(checkpoint.get(key), nn.Module) for key in ("ema", "model")):
        raise PretrainedError(f"{path} is not a checkpoint of Ultralytics: it contains no model")
    if checkpoint.get("modelopt") is not None:
        raise PretrainedError(f"{path} is from quantized training, which needs code from the file; export it instead")
    for key in ("ema", "model"):
        if isinstance(checkpoint.get(key), nn.Module):
            _check_module(path, checkpoint[key])
    return checkpoint


def _check_module(path: Path, module: nn.Module) -> None:
    """Checks that a module has only what its class defines, tensors and plain data.

    Restoring a module sets its attributes from the file. A container or hook of another type could run code.

    Raises:
        PretrainedError: If the module has anything else.
    """
    own = vars(module)
    for name in ("_parameters", "_buffers", "_modules"):
        if type(own.get(name)) not in (dict, OrderedDict) or _attributes(own[name]):
            raise PretrainedError(f"{path}: {name} of a {type(module).__name__} is not a plain mapping")
    hooks = [name for name, value in own.items() if "_hooks" in name and value]
    replaced = [name for name, value in own.items() if callable(value) and not _is_own_callable(module, name, value)]
    if hooks or replaced:
        raise PretrainedError(
            f"{path}: {', '.join([*hooks, *replaced])} of a {type(module).__name__} wants to run instead of the "
            "code of its class; no code was run"
        )
    config = getattr(module, "yaml", None)
    if config is not None:
        _check_config(path, config)
    for child in own["_modules"].values():
        if child is not None:
            if not isinstance(child, nn.Module):
                raise PretrainedError(
                    f"{path}: a {type(module).__name__} contains a {type(child).__name__} instead of a module"
                )
            _check_module(path, child)


def _is_own_callable(module: nn.Module, name: str, value: Any) -> bool:
    """Returns whether Ultralytics saves a callable attribute with its modules."""
    where = f"{type(value).__module__}."
    if name in ("criterion", "transforms"):  # of training and of classifiers
        return where.startswith(("ultralytics.utils.loss.", "torchvision.transforms."))
    if name == "detect":  # of heads for segmentation, poses and boxes: the forward of the head that they extend
        return (
            isinstance(value, FunctionType)
            and value.__name__ == "forward"
            and value.__module__ == "ultralytics.nn.modules.head"
        )
    # A fused layer replaces one method of its class with another.
    return (
        name == "forward"
        and isinstance(value, MethodType)
        and value.__self__ is module
        and value.__func__.__name__ in ("forward", "forward_fuse")
    )


def _attributes(value: Any) -> dict[str, Any]:
    """Returns the attributes of an object, or none if it cannot have any."""
    return getattr(value, "__dict__", {})


def _is_plain(value: Any) -> bool:
    """Returns whether a value consists of Python's own types.

    Subclasses could run code.
    """
    if type(value) is dict:
        return all(_is_plain(item) for pair in value.items() for item in pair)
    if type(value) in (list, tuple):
        return all(_is_plain(item) for item in value)
    return value is None or type(value) in (str, int, float, bool)


def _check_config(path: Path, config: Any) -> None:
    """Checks a model configuration.

    Training builds the model from it, and Ultralytics evaluates parts of it as code.

    Raises:
        PretrainedError: If the configuration is not plain data, the activation is not a module of PyTorch with numbers,
            or a layer is not a module.
    """
    if type(config) is not dict or not _is_plain(config):
        raise PretrainedError(f"{path}: the model configuration is not plain data")
    activation = config.get("activation")
    if activation is not None:
        call = re.fullmatch(r"(?:torch\.)?nn\.(\w+)\([\w\s=.,+-]*\)", str(activation))
        if call is None or not _is_module(getattr(nn, call[1], None)):
            raise PretrainedError(f"{path} wants to run {activation!r} as its activation; no code was run")
    for row in [*config.get("backbone", []), *config.get("head", [])]:
        name = str(row[2]) if isinstance(row, list | tuple) and len(row) > 2 else str(row)
        if name.startswith("nn."):
            layer = getattr(nn, name[3:], None)
        elif name.startswith("torchvision.ops."):
            layer = getattr(torchvision.ops, name[16:], None)
        else:
            layer = getattr(tasks, name, None)
        if not _is_module(layer) or not f"{layer.__module__}.".startswith(_LAYERS):
            raise PretrainedError(f"{path} wants to run {name!r} as a layer, which is not a layer; no code was run")


def _is_module(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module)

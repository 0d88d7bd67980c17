"""Detectors on the Hugging Face Hub: their checkpoint, made fit to be seen, and opened safely from there."""

import os
import pickle
import re
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType, MethodType, SimpleNamespace
from typing import Any

import torch
import torchvision
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from torch import nn
from ultralytics.nn import tasks
from ultralytics.nn.tasks import torch_safe_load
from ultralytics.utils import ASSETS, SETTINGS, checks
from ultralytics.utils.downloads import attempt_download_asset

from stvit.ops import SuperTokenAttention
from stvit.weights.check import WeightsFileError, check_file, find_corruption
from stvit.weights.errors import PretrainedDownloadError, PretrainedError, describe_hub_error

from .registration import allow_modules

__all__ = [
    "PREFIXES",
    "check_local",
    "fetch_checkpoint",
    "is_trusting",
    "open_safely",
    "prepare_checkpoint",
    "trusting",
]

PREFIXES = ("hf-hub:", "hf_hub:")
CHECKPOINT = "model.pt"
# What a checkpoint keeps for going on with training, and what tells of the machine that it was made on.
_LEFT_OUT = ("optimizer", "scaler", "stopper", "updates", "ema", "best_fitness", "git")


def fetch_checkpoint(name: str, cache_dir: str | Path | None = None) -> Path:
    """The checkpoint of a detector on the Hub, downloaded, and safe to open.

    Args:
        name: 'hf-hub:org/name' or 'hf-hub:org/name@revision'. Its checkpoint is model.pt, best.pt or the only .pt file.
        cache_dir: The cache; None for huggingface_hub's.

    Returns:
        Its path in the cache.

    Raises:
        PretrainedError: If it cannot be had (`PretrainedDownloadError`), or is no checkpoint of Ultralytics whose
            classes are all known; no code of it is run.
    """
    repo_id, _, revision = name.partition(":")[2].partition("@")
    what = f"{name}: cannot load the detector of the Hub repository {repo_id} (revision {revision or 'main'})"
    try:
        path = Path(_download(repo_id, revision or None, cache_dir))
    except PretrainedError as error:
        raise PretrainedError(f"{what}: {error}") from error
    except Exception as error:  # of the libraries below
        raise PretrainedDownloadError(f"{what}: {describe_hub_error(error, repo_id, revision)}") from error
    try:
        open_safely(path)
    except PretrainedError as error:
        raise PretrainedError(f"{what}: {error}") from error
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
            raise PretrainedError(f"it has no {CHECKPOINT}, and {found}. Give one that holds a detector") from None
        return download("best.pt" if "best.pt" in files else files[0])


# Set while files are trusted: training opens them in other processes too, one for each GPU.
_TRUST_VARIABLE = "STVIT_YOLO_TRUST"


def check_local(name: Any, trust: bool = False) -> None:
    """Checks a checkpoint before Ultralytics opens it, which runs whatever code is in the file.

    Args:
        name: What Ultralytics takes for a model: a path, a name such as 'yolo26n.pt' or a URL, which is downloaded
            first. Anything but the name of a checkpoint (.pt) is left to Ultralytics.
        trust: Whether to leave the file to Ultralytics as well.

    Raises:
        PretrainedError: If the file is damaged or holds more than `open_safely` allows; names it, and `trust`.
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
            f"{error}. A file that is not safe to open runs code on your machine: if you trust who made it, pass "
            "trust=True"
        ) from error


@contextmanager
def trusting(trust: bool) -> Iterator[None]:
    """Context manager: `check_local` lets every file pass, in this process and in those that it starts."""
    before = os.environ.get(_TRUST_VARIABLE)
    if trust:
        os.environ[_TRUST_VARIABLE] = "1"
    try:
        yield
    finally:
        if trust and before is None:
            os.environ.pop(_TRUST_VARIABLE, None)


def is_trusting() -> bool:
    """Returns whether the program is within `trusting(True)`, or was started there."""
    return os.environ.get(_TRUST_VARIABLE) == "1"


def open_safely(path: Path) -> dict[str, Any]:
    """Returns the contents of a checkpoint of Ultralytics; runs no code of it.

    Only tensors and modules of PyTorch, timm, Ultralytics and this package are restored, with plain containers, a plain
    configuration, and the losses and transforms that Ultralytics keeps with its models. Hooks are refused. Ultralytics
    opens the file once more in its ordinary way, and training builds the model again.

    Raises:
        PretrainedError: If the file is damaged, could exhaust the memory or holds anything else; names what.
    """
    broken = find_corruption(path)
    if broken is not None:
        raise PretrainedError(f"{path} {broken}")
    try:
        check_file(path)
    except WeightsFileError as error:
        raise PretrainedError(
            f"{path} is no checkpoint of Ultralytics that can be opened: it {error.problem}"
        ) from error
    try:
        allow_modules(path)
        checkpoint = torch_safe_load(path, safe_only=True)[0]
    except Exception as error:  # unpickling what is no checkpoint raises nearly everything
        try:
            names = sorted(set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - _RESTRICTED)
        except Exception:  # not of PyTorch's present format
            names = []
        if names:
            raise PretrainedError(
                f"{path} wants to run {', '.join(names[:10])}, which is no module of a detector; none of it was run"
            ) from error
        raise PretrainedError(f"{path} is no checkpoint of Ultralytics ({type(error).__name__})") from error
    if type(checkpoint) is not dict or not any(isinstance(checkpoint.get(key), nn.Module) for key in ("ema", "model")):
        raise PretrainedError(f"{path} is no checkpoint of Ultralytics: it holds no model")
    if checkpoint.get("modelopt") is not None:
        raise PretrainedError(f"{path} is of quantized training, which needs code of its own to be restored")
    for key in ("ema", "model"):
        if isinstance(checkpoint.get(key), nn.Module):
            _check_module(path, checkpoint[key])
    return checkpoint


def _check_module(path: Path, module: nn.Module) -> None:
    """Refuses a module that is more than its class, its tensors and plain data.

    Restoring sets a module's attributes as the file says: containers and hooks of another kind would answer for it.

    Raises:
        PretrainedError: If it is.
    """
    own = vars(module)
    for name in ("_parameters", "_buffers", "_modules"):
        if type(own.get(name)) not in (dict, OrderedDict) or _attributes(own[name]):
            raise PretrainedError(f"{path}: {name} of a {type(module).__name__} are no plain mapping")
    hooks = [name for name, value in own.items() if "_hooks" in name and value]
    replaced = [name for name, value in own.items() if callable(value) and not _is_own_callable(module, name, value)]
    if hooks or replaced:
        raise PretrainedError(
            f"{path}: {', '.join([*hooks, *replaced])} of a {type(module).__name__} wants to run in place of what its "
            "class does; none of it was run"
        )
    config = getattr(module, "yaml", None)
    if config is not None:
        _check_config(path, config)
    for child in own["_modules"].values():
        if child is not None:
            if not isinstance(child, nn.Module):
                raise PretrainedError(f"{path}: a {type(module).__name__} holds a {type(child).__name__} as a module")
            _check_module(path, child)


def _is_own_callable(module: nn.Module, name: str, value: Any) -> bool:
    """Returns whether a callable attribute is one that a version of Ultralytics saves with its modules."""
    where = f"{type(value).__module__}."
    if name in ("criterion", "transforms"):  # of training, and of classifiers
        return where.startswith(("ultralytics.utils.loss.", "torchvision.transforms."))
    if name == "detect":  # of heads for segmentation, poses and boxes: the forward of the head that they extend
        return (
            isinstance(value, FunctionType)
            and value.__name__ == "forward"
            and value.__module__ == "ultralytics.nn.modules.head"
        )
    # A fused layer: one method of the class in place of another.
    return (
        name == "forward"
        and isinstance(value, MethodType)
        and value.__self__ is module
        and value.__func__.__name__ in ("forward", "forward_fuse")
    )


def _attributes(value: Any) -> dict[str, Any]:
    """Attributes of an object; none where it can have none."""
    return getattr(value, "__dict__", {})


def _is_plain(value: Any) -> bool:
    """Whether a value is of Python's own types alone, whose subclasses may answer otherwise."""
    if type(value) is dict:
        return all(_is_plain(item) for pair in value.items() for item in pair)
    if type(value) in (list, tuple):
        return all(_is_plain(item) for item in value)
    return value is None or type(value) in (str, int, float, bool)


def _check_config(path: Path, config: Any) -> None:
    """Refuses a configuration that is more than layers: training builds the model from it, and evaluates parts of it.

    Raises:
        PretrainedError: If its activation is more than a module of PyTorch's with numbers, or a layer is no module.
    """
    if type(config) is not dict or not _is_plain(config):
        raise PretrainedError(f"{path}: its configuration is more than plain data")
    activation = config.get("activation")
    if activation is not None:
        call = re.fullmatch(r"(?:torch\.)?nn\.(\w+)\([\w\s=.,+-]*\)", str(activation))
        if call is None or not _is_module(getattr(nn, call[1], None)):
            raise PretrainedError(f"{path} wants to run {activation!r} as its activation; none of it was run")
    for row in [*config.get("backbone", []), *config.get("head", [])]:
        name = str(row[2]) if isinstance(row, list | tuple) and len(row) > 2 else str(row)
        if name.startswith("nn."):
            layer = getattr(nn, name[3:], None)
        elif name.startswith("torchvision.ops."):
            layer = getattr(torchvision.ops, name[16:], None)
        else:
            layer = getattr(tasks, name, None)
        if not _is_module(layer) or not f"{layer.__module__}.".startswith(_LAYERS):
            raise PretrainedError(f"{path} wants to run {name!r} as a layer, which is none; none of it was run")


def _is_module(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module)


def prepare_checkpoint(source: Path, folder: Path, image: Path | None = None) -> dict[str, Any]:
    """Writes model.pt and example.jpg: a checkpoint for others, and what it sees.

    As Ultralytics publishes them: half precision, without what is for going on with training. What tells of the machine
    is left out too: of the paths among the training's arguments the last parts alone stay.

    Args:
        source: Checkpoint of Ultralytics, best.pt.
        folder: Where to.
        image: To show its results on; None for Ultralytics' own picture of a bus.

    Returns:
        What a card needs: `task`, `names`, `parameters`, `imgsz`, `data`, `model`, `metrics` (by
        Ultralytics' names, fractions), `license`, `version`, `image`, `has_super_tokens`
        (whether a layer is super token attention).

    Raises:
        PretrainedError: If the checkpoint cannot be opened safely.
        ValueError: If the image cannot be read.
    """
    from .engine import YOLO

    if not source.is_file():
        raise PretrainedError(f"{source}: there is no such file")
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
    shown = image or ASSETS / "bus.jpg"
    if not shown.is_file():
        raise ValueError(f"{shown}: there is no such picture")
    detector = YOLO(folder / CHECKPOINT)
    results: Any = detector.predict(str(shown), verbose=False, save=False)
    results[0].save(str(folder / "example.jpg"))
    metrics = {
        key.removeprefix("metrics/"): float(value)
        for key, value in (checkpoint.get("train_metrics") or {}).items()
        if key.startswith("metrics/")
    }
    return {
        "task": model.task if hasattr(model, "task") else detector.task,
        "names": dict(model.names),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "imgsz": arguments.get("imgsz"),
        "data": arguments.get("data"),
        "model": (getattr(model, "yaml", None) or {}).get("yaml_file", arguments.get("model")),
        "metrics": metrics,
        "license": "agpl-3.0" if "AGPL" in str(checkpoint.get("license")) else None,
        "version": checkpoint.get("version"),
        "image": shown.name,
        "has_super_tokens": any(isinstance(module, SuperTokenAttention) for module in model.modules()),
    }


# Globals that Ultralytics restores in a restricted form.
_RESTRICTED = {"builtins.getattr", "numpy.dtype"}
# Where layers are defined; whole models, which build themselves from a configuration of their own, are elsewhere.
_LAYERS = ("torch.nn.", "torchvision.ops.", "ultralytics.nn.modules.", "stvit.adapters.yolo.")
_PythonPickler: Any = pickle._Pickler


class _OrderedPickler(_PythonPickler):
    """Writes sets in order: the same model is then the same file, whose push sends nothing.

    Python's own pickler in place of the one in C, which asks nobody about sets.
    """

    def _save_set(self, obj: set[Any]) -> None:
        self.save_reduce(set, (sorted(obj, key=repr),), obj=obj)

    dispatch = {**_PythonPickler.dispatch, set: _save_set}  # noqa: RUF012  # as there


_ORDERED_PICKLE = SimpleNamespace(__name__="pickle", Pickler=_OrderedPickler)


def _without_paths(value: Any) -> Any:
    """The same with the last part of each path, of whatever system, in place of it."""
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_without_paths(item) for item in value)
    if isinstance(value, Path):
        value = str(value)
    return re.split(r"[\\/]", value.rstrip("\\/"))[-1] if isinstance(value, str) else value

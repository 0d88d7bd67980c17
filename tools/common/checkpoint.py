"""Checkpoints to go on from: written so that the newest is always whole, and checked before they are believed."""

import os
import random
import re
import shutil
import sys
import time
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stvit.tools.common.cli import CommandError, reason
from stvit.weights.check import check_file

# The newest, and the one before it should the newest be damaged on the disk.
KEPT = 2
# Windows does not replace a file that another program has open, a virus scanner for example: seconds between attempts.
_WAITS_S = (0.02, 0.1, 0.3, 0.6)
# Names that a run writes, as for fnmatch.
NAMES = f"{'[0-9]' * 5}-{'[0-9]' * 8}.pt"
# Epochs done, and updates done of the next epoch.
_NAME = re.compile(r"(\d{5,})-(\d{8,})\.pt", re.ASCII)
# What every command that reads a checkpoint may rely on; see `find_mismatch`.
_LEAST: dict[str, Any] = {"progress": {"epoch": 0, "step": 0}, "recipe": {"epochs": 0, "model": ""}, "model": {}}


class Checkpoints:
    """The checkpoints of a run in its folder `checkpoints`. Other files in the folder are neither read nor removed.

    Args:
        folder: Folder of the checkpoints.
        keep_epochs: Epochs between the checkpoints that are kept for good; 0 for none.
    """

    def __init__(self, folder: Path, keep_epochs: int = 0) -> None:
        self.folder = folder
        self.keep_epochs = keep_epochs

    def paths(self) -> list[Path]:
        """Returns the checkpoints by their names, those of the earliest step first."""
        found = [path for path in self.folder.glob("*.pt") if _position(path) is not None and path.is_file()]
        return sorted(found, key=lambda path: _position(path) or (0, 0))

    def save(self, state: dict[str, Any], epoch: int, step: int) -> Path:
        """Writes the state after `step` updates of an epoch, and removes what is older than the last one before it.

        What is kept for good stays.

        Raises:
            CommandError: If it cannot be written; those before it are kept.
        """
        path = self.folder / _name(epoch, step)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            atomic_write(path, lambda fresh: torch.save(state, fresh))
        except (OSError, RuntimeError) as error:
            raise CommandError(
                f"cannot write checkpoint {path}: {_disk_reason(path, error)}; the checkpoints before it are kept: "
                "make room, and give the same command with --resume auto"
            ) from error
        for old in self.paths()[:-KEPT]:
            if not self._is_kept(old):
                with suppress(PermissionError):  # another program has it open; the next call removes it
                    old.unlink()
        return path

    def _is_kept(self, path: Path) -> bool:
        epoch, step = _position(path) or (0, 0)
        return self.keep_epochs > 0 and step == 0 and epoch % self.keep_epochs == 0

    def load(self) -> tuple[dict[str, Any], Path] | None:
        """Loads the newest checkpoint that is whole, and warns of damaged ones.

        Returns:
            The state and the path of its checkpoint; None if there is no checkpoint.

        Raises:
            CommandError: If there are checkpoints, but all of them are damaged.
        """
        paths = self.paths()
        for path in reversed(paths):
            try:
                return load_checkpoint(path), path
            except CommandError as error:
                instead = ", using the one before it" if path != paths[0] else ""
                print(f"warning: {error}{instead}", file=sys.stderr)
        if paths:
            raise CommandError(
                f"no checkpoint in {self.folder} can be read: start afresh with another --experiment, from the weights "
                "of this one if you like (--pretrained-path)"
            )
        return None


def _name(epoch: int, step: int) -> str:
    return f"{epoch:05d}-{step:08d}.pt"


def _position(path: Path) -> tuple[int, int] | None:
    """Returns the epochs and updates in the name of a checkpoint; None for a name that no run writes."""
    found = _NAME.fullmatch(path.name)
    if found is None:
        return None
    epoch, step = map(int, found.groups())
    return (epoch, step) if path.name == _name(epoch, step) else None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Loads the state in a checkpoint, of which no code is run.

    Args:
        path: The file.

    Returns:
        The state. It has at least the parts of `_LEAST`; whoever resumes from it checks the rest.

    Raises:
        CommandError: If the file is not a whole checkpoint.
    """
    try:
        check_file(path)
        # PyTorch does not look at the checksums that it writes.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"checksum error in {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
        mismatch = find_mismatch(state, _LEAST)
        if mismatch is not None:
            raise ValueError(f"it is not a checkpoint of this program: {mismatch}")
    except Exception as error:  # damage has many faces
        raise CommandError(f"checkpoint {path} is damaged ({reason(error)})") from error
    return state


def find_mismatch(value: Any, like: Any, name: str = "") -> str | None:
    """Compares the structure of a value from a file with that of a value of the same kind.

    Args:
        value: Value to check. A mapping may have more keys than `like`.
        like: Wanted types, lengths of sequences, and shapes and dtypes of tensors. A number need not have the same
            value. An empty sequence or mapping stands for any of its type, and None for None, a number or a text.
        name: Name of the value, for the message.

    Returns:
        The first difference, in words; None if there is none.
    """
    if isinstance(like, torch.Tensor):
        if not isinstance(value, torch.Tensor):
            return f"{name} is {_kind(value)}, expected a tensor"
        if (value.shape, value.dtype) != (like.shape, like.dtype):
            return f"{name} has shape {_shape(value)} and {value.dtype}, expected {_shape(like)} and {like.dtype}"
    elif isinstance(like, Mapping):
        if not isinstance(value, Mapping):
            return f"{name or 'the content'} is {_kind(value)}, expected a mapping"
        prefix = f"{name}." if name else ""
        for key, part in like.items():
            if key not in value:
                return f"{prefix}{key} is missing"
            mismatch = find_mismatch(value[key], part, f"{prefix}{key}")
            if mismatch is not None:
                return mismatch
    elif isinstance(like, list | tuple):
        if not isinstance(value, list | tuple):
            return f"{name} is {_kind(value)}, expected a list"
        if like and len(value) != len(like):
            return f"{name} has {len(value)} elements, expected {len(like)}"
        mismatches = (find_mismatch(*pair, f"{name}[{i}]") for i, pair in enumerate(zip(value, like, strict=False)))
        return next((mismatch for mismatch in mismatches if mismatch is not None), None)
    elif like is None:
        if value is not None and not isinstance(value, int | float | str):
            return f"{name} is {_kind(value)}, expected nothing, a number or a text"
    elif isinstance(like, float):
        if isinstance(value, bool) or not isinstance(value, int | float):
            return f"{name} is {_kind(value)}, expected a number"
    elif type(value) is not type(like):
        return f"{name} is {_kind(value)}, expected {type(like).__name__}"
    return None


# State of an optimizer that has the shape of its parameter, or is one number for it.
_LIKE_PARAMETER = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "grad_avg", "sum"}


def find_optimizer_mismatch(state: Any, optimizer: torch.optim.Optimizer) -> str | None:
    """Compares the structure of an optimizer's state from a file with that of an optimizer.

    `Optimizer.load_state_dict` only compares the numbers of parameters. Tensors of other shapes fail in a later step.

    Args:
        state: State to check.
        optimizer: Optimizer that is to load it. Options that only one of both has are not compared.

    Returns:
        The first difference, in words; None if there is none.
    """
    groups = optimizer.state_dict()["param_groups"]
    like = {"state": {}, "param_groups": [{"params": group["params"]} for group in groups]}
    mismatch = find_mismatch(state, like, "optimizer")
    if mismatch is not None:
        return mismatch
    for i, (group, own) in enumerate(zip(state["param_groups"], groups, strict=True)):
        common = {key: value for key, value in own.items() if key in group}
        mismatch = find_mismatch(group, common, f"optimizer.param_groups[{i}]")
        if mismatch is not None:
            return mismatch
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    by_number = dict(zip(numbers, parameters, strict=True))
    for number, values in state["state"].items():
        name = f"optimizer.state[{number!r}]"
        if number not in by_number or not isinstance(values, Mapping):
            return f"{name} belongs to no parameter"
        for key, value in values.items():
            shape = by_number[number].shape
            if isinstance(value, str):
                return f"{name}[{key!r}] is a text"
            if isinstance(value, torch.Tensor) and key in _LIKE_PARAMETER and value.ndim and value.shape != shape:
                return f"{name}[{key!r}] has shape {_shape(value)}, its parameter {_shape(by_number[number])}"
    return None


def _kind(value: Any) -> str:
    return "None" if value is None else f"of type {type(value).__name__}"


def _shape(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "()"


def atomic_write(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes a file atomically: readers see the old contents or the new ones, never a partial file.

    Args:
        path: File to write.
        write: Writes the contents to the path that it is called with.
    """
    fresh = path.with_name(path.name + ".tmp")
    try:
        write(fresh)
        _sync(fresh)
        _replace(fresh, path)
    except BaseException:
        with suppress(PermissionError):  # on Windows whoever has it open may be the reason of the failure
            fresh.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def atomic_replace_dir(fresh: Path, folder: Path) -> None:
    """Moves all files of one folder into another folder, each of them atomically."""
    folder.mkdir(exist_ok=True)
    for file in fresh.iterdir():
        _sync(file)
    for file in fresh.iterdir():
        _replace(file, folder / file.name)
    _sync_folder(folder)
    fresh.rmdir()


def cut_torn_line(path: Path) -> None:
    """Removes the end of a file that a kill left without its line break, lest the next line join it."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)


def _replace(source: Path, target: Path) -> None:
    """`os.replace`, repeated for about a second while another program has the target open."""
    for wait in _WAITS_S:
        try:
            os.replace(source, target)
            return
        except PermissionError:
            time.sleep(wait)
    os.replace(source, target)


def _sync(path: Path) -> None:
    """Waits until a file is on the disk."""
    with path.open("rb+") as file:  # Windows syncs only files that are open for writing
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    """Waits until the names in a folder are on the disk, where the system can do that."""
    with suppress(OSError):  # Windows does not open folders, and some file systems do not sync them
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _disk_reason(path: Path, error: Exception) -> str:
    """PyTorch words a full disk as an error of its own code."""
    free = shutil.disk_usage(path.parent).free if path.parent.exists() else None
    if isinstance(error, RuntimeError) and free is not None and free < 1 << 20:
        return "no space left on device"
    return reason(error)


def get_random_state(device: torch.device) -> dict[str, Any]:
    """Returns the states of Python's, NumPy's and PyTorch's generators, in types that are safe to unpickle."""
    version, words, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state()
    state = {
        "python": [version, list(words), gauss],
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    if device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Sets the generators to what `get_random_state` gave."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    if device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(state["mps"])

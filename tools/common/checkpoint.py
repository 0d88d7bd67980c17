"""Checkpoints to go on from: written so that the newest is always whole, and checked before they are believed."""

import os
import random
import shutil
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stvit.tools.common.cli import CommandError, reason
from stvit.weights_file import check_file

# The newest, and the one before it should the newest be damaged on the disk.
KEPT = 2
# Windows does not replace a file that another program has open, a virus scanner for example: seconds between attempts.
_WAITS_S = (0.02, 0.1, 0.3, 0.6)


class Checkpoints:
    """The checkpoints of a run, in a folder of their own, named so that they sort by age.

    Args:
        folder: Where they are.
        keep_epochs: Epochs between those that are kept for good; 0 for none.
    """

    def __init__(self, folder: Path, keep_epochs: int = 0) -> None:
        self.folder = folder
        self.keep_epochs = keep_epochs

    def paths(self) -> list[Path]:
        """Oldest first."""
        return sorted(self.folder.glob("*.pt"))

    def save(self, state: dict[str, Any], epoch: int, step: int) -> Path:
        """Writes the state after `step` updates of an epoch, and removes what is older than the last one before it.

        What is kept for good stays.

        Raises:
            CommandError: If it cannot be written; those before it are kept.
        """
        path = self.folder / f"{epoch:05d}-{step:08d}.pt"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_whole(path, lambda fresh: torch.save(state, fresh))
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
        epoch, _, step = path.stem.partition("-")
        return self.keep_epochs > 0 and int(step) == 0 and int(epoch) % self.keep_epochs == 0

    def load(self) -> tuple[dict[str, Any], Path] | None:
        """The newest whole state and where it was; None if there is no checkpoint. Names the damaged ones it passes.

        Raises:
            CommandError: If there are checkpoints, but all of them damaged.
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


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state in a checkpoint.

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
        if (
            not isinstance(state, dict)
            or not {"progress", "recipe", "model"} <= state.keys()
            or not isinstance(state["recipe"], dict)
        ):
            raise ValueError("it is not a checkpoint of this program")
    except Exception as error:  # damage has many faces
        raise CommandError(f"checkpoint {path} is damaged ({reason(error)})") from error
    return state


def replace_whole(path: Path, write: Callable[[Path], Any]) -> None:
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


def replace_files(fresh: Path, folder: Path) -> None:
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

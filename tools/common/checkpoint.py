"""Checkpoint files of a training run."""

import errno
import re
import shutil
import sys
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from stvit.weights.check import check_file

from .cli import CommandError, reason
from .files import atomic_write
from .structure import find_mismatch

# The newest, and the one before it in case the disk damages the newest.
KEPT = 2
# Pattern of checkpoint names, for fnmatch.
NAMES = f"{'[0-9]' * 5}-{'[0-9]' * 8}.pt"
# Epochs done, and updates done in the next epoch.
_NAME = re.compile(r"(\d{5,})-(\d{8,})\.pt", re.ASCII)
# Structure that every command that reads a checkpoint relies on; see `find_mismatch`.
_LEAST: dict[str, Any] = {"progress": {"epoch": 0, "step": 0}, "recipe": {"epochs": 0, "model": ""}, "model": {}}


class Checkpoints:
    """The checkpoints in the folder `checkpoints` of a run.

    Other files in the folder are ignored.

    Args:
        folder: Folder of the checkpoints.
        keep_epochs: Epochs between checkpoints that are kept permanently; 0 to keep none.
    """

    def __init__(self, folder: Path, keep_epochs: int = 0) -> None:
        self.folder = folder
        self.keep_epochs = keep_epochs

    def paths(self) -> list[Path]:
        """Returns the paths of the checkpoints, from the earliest to the latest step."""
        found = [path for path in self.folder.glob("*.pt") if _position(path) is not None and path.is_file()]
        return sorted(found, key=lambda path: _position(path) or (0, 0))

    def save(self, state: dict[str, Any], epoch: int, step: int) -> Path:
        """Writes a checkpoint and removes old ones.

        Args:
            state: State of the run.
            epoch: Epochs done.
            step: Updates done in the next epoch.

        Returns:
            Path of the checkpoint.

        Raises:
            CommandError: If it cannot be written. Earlier checkpoints are kept.
        """
        path = self.folder / _name(epoch, step)
        try:
            if self.folder.is_symlink():
                raise OSError(errno.ELOOP, "is a link; replace it by a folder", str(self.folder))
            self.folder.mkdir(parents=True, exist_ok=True)
            atomic_write(path, lambda fresh: torch.save(state, fresh))
        except (OSError, RuntimeError) as error:
            raise CommandError(
                f"cannot write checkpoint {path}: {_disk_reason(path, error)}; earlier checkpoints are kept: free some "
                "space, then run the same command with --resume auto"
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
        """Loads the newest undamaged checkpoint, and prints warnings about damaged ones.

        Returns:
            The state and the path of its checkpoint; None if there are no checkpoints.

        Raises:
            CommandError: If all checkpoints are damaged.
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
                f"no checkpoint in {self.folder} can be read; start a new run with another --experiment (to start from "
                "the weights of this one, pass --pretrained-path)"
            )
        return None


def _name(epoch: int, step: int) -> str:
    return f"{epoch:05d}-{step:08d}.pt"


def _position(path: Path) -> tuple[int, int] | None:
    """Returns the epochs and updates in a checkpoint's name; None for other names."""
    found = _NAME.fullmatch(path.name)
    if found is None:
        return None
    epoch, step = map(int, found.groups())
    return (epoch, step) if path.name == _name(epoch, step) else None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Loads the state in a checkpoint, without running code from it.

    Returns:
        The state. It has at least the structure of `_LEAST`; callers that resume from it check the rest.

    Raises:
        CommandError: If the file is not a complete checkpoint.
    """
    try:
        check_file(path)
        # PyTorch does not verify the checksums that it writes.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"checksum error in {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
        mismatch = find_mismatch(state, _LEAST)
        if mismatch is not None:
            raise ValueError(f"it is not a checkpoint of this program: {mismatch}")
    except Exception as error:  # damaged files raise nearly every exception
        raise CommandError(f"checkpoint {path} is damaged ({reason(error)})") from error
    return state


def _disk_reason(path: Path, error: Exception) -> str:
    """Returns why a write failed. PyTorch reports a full disk as an internal error."""
    free = shutil.disk_usage(path.parent).free if path.parent.exists() else None
    if isinstance(error, RuntimeError) and free is not None and free < 1 << 20:
        return "no space left on device"
    return reason(error)

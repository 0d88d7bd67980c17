"""Atomic writes, and bounded reads of text files."""

import os
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

# Windows does not replace a file that another program has open, such as a virus scanner: seconds between attempts.
_WAITS_S = (0.02, 0.1, 0.3, 0.6)


def atomic_write(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes a file atomically.

    Readers see the old contents or the new ones, never a partial file.

    Args:
        path: File to write.
        write: Writes the contents to the path that it receives.
    """
    fresh = path.with_name(path.name + ".tmp")
    try:
        write(fresh)
        _sync(fresh)
        _replace(fresh, path)
    except BaseException:
        with suppress(PermissionError):  # on Windows the program that has it open may have caused the failure
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
    """Removes an incomplete last line, which a killed process leaves behind."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        complete = file.read().rfind(b"\n") + 1
        file.truncate(complete)


def read_utf8(path: Path, max_bytes: int = 64 << 20) -> str:
    """Reads a text file in UTF-8.

    Args:
        path: The file. A byte order mark at its beginning is removed.
        max_bytes: Largest size.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not a regular file (reading a pipe could wait forever), too large, or not UTF-8.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file")
    if status.st_size > max_bytes:
        raise ValueError(f"{status.st_size} bytes, more than the limit of {max_bytes}")
    return path.read_text(encoding="utf-8-sig")


def _replace(source: Path, target: Path) -> None:
    """Calls `os.replace`, and retries while another program has the target open."""
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
    """Waits until the file names of a folder are on the disk, if possible."""
    with suppress(OSError):  # Windows does not open folders, and some file systems do not sync them
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

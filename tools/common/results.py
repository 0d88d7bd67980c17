"""Folders of results (--output): creates, locks and checks them."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TextIO

from .cli import CommandError, reason
from .files import atomic_write, open_append, read_utf8
from .image_folders import find_image_files
from .locks import InUseError, PathLock

__all__ = ["ResultFolder", "check_output", "create_output", "open_results"]

# File in a folder of results that lists what the commands wrote there: [name, bytes, time of change in ns] a line.
_WRITTEN = ".stvit.written"


def check_output(folder: Path) -> None:
    """Checks that a folder can be created or written to. Nothing is left behind.

    Raises:
        CommandError: If it cannot.
    """
    try:
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        with TemporaryDirectory(prefix=".stvit-", dir=existing):
            pass
    except OSError as error:
        raise _unwritable(folder, error) from error


def create_output(folder: Path, lock: PathLock) -> None:
    """Creates a folder of results, and locks it against other commands.

    Raises:
        CommandError: If the folder cannot be created or written to, or is in use.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(folder / ".stvit.lock")
    except InUseError as error:
        raise InUseError(f"{error}; choose another --output") from error
    except CommandError as error:
        raise CommandError(f"cannot write to --output {folder}: {error}; choose another --output") from error
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(folder: Path, error: OSError) -> CommandError:
    why = error.strerror or reason(error)
    for path in (folder, *folder.parents):
        if os.path.lexists(path):
            why = why if path.is_dir() else f"{path} is not a folder"
            break
    return CommandError(f"cannot write to --output {folder}: {why}; choose another --output")


class ResultFolder:
    """Folder of results in which a command replaces only files that a command wrote.

    A hidden file lists the written files with their size and time of change.

    Attributes:
        path: The folder.
    """

    def __init__(self, path: Path, file: TextIO) -> None:
        self.path = path
        self._file = file

    def write(self, name: str, write: Callable[[Path], Any]) -> None:
        """Writes a file atomically, and the folders that it needs.

        Args:
            name: Path of the file in the folder.
            write: Writes the contents to the path that it receives.

        Raises:
            CommandError: If the file cannot be written.
        """
        path = self.path / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, write)
            self._file.write(_line(name, _state(path)))
        except OSError as error:
            raise CommandError(f"cannot write to --output {self.path}: {reason(error)}") from error


@contextmanager
def open_results(folder: Path, names: Sequence[str], images: Path) -> Iterator[ResultFolder]:
    """Creates and locks a folder for the results of images, until the context ends.

    Files that no command wrote, or that were changed since, are never replaced.

    Args:
        folder: The folder.
        names: Paths of all files in the folder that the command will write.
        images: Image file or folder of images.

    Raises:
        CommandError: If the folder cannot be written to or is in use, a file would be replaced that no command wrote,
            or results would be among the images.
    """
    is_new = not folder.exists()
    with PathLock() as lock:
        create_output(folder, lock)
        try:
            written = _read_written(folder)
            _check_replaced(folder, names, written)
            _check_apart(folder, names, written, images)
            with _open_written(folder, written) as file:
                yield ResultFolder(folder, file)
        finally:
            lock.release()
            if is_new:
                _remove_empty(folder)


@contextmanager
def _open_written(folder: Path, written: dict[str, list[int]]) -> Iterator[TextIO]:
    """Opens the list of written files to append lines."""
    path = folder / _WRITTEN
    text = "".join(_line(name, state) for name, state in written.items())
    try:
        atomic_write(path, lambda fresh: fresh.write_text(text, encoding="utf-8"))
        file = open_append(path)
    except OSError as error:
        raise _unwritable(folder, error) from error
    with file:
        yield file


def _remove_empty(folder: Path) -> None:
    """Removes a folder without results."""
    with suppress(OSError):
        if (folder / _WRITTEN).stat().st_size == 0:
            (folder / _WRITTEN).unlink()
    with suppress(OSError):
        folder.rmdir()


def _line(name: str, state: list[int]) -> str:
    return json.dumps([name, *state]) + "\n"


def _state(path: Path) -> list[int]:
    """Returns the size of a file in bytes, and its time of change in nanoseconds.

    Links are not followed.
    """
    status = os.lstat(path)
    return [status.st_size, status.st_mtime_ns]


def _read_written(folder: Path) -> dict[str, list[int]]:
    """Returns the unchanged files in a folder that commands wrote, with their states."""
    written: dict[str, list[int]] = {}
    with suppress(OSError, ValueError):
        for line in read_utf8(folder / _WRITTEN).splitlines():
            with suppress(ValueError, TypeError):  # a damaged line
                name, *state = json.loads(line)
                written[str(name)] = state
    unchanged = {}
    for name, state in written.items():
        with suppress(OSError, ValueError):
            if _state(folder / name) == state:
                unchanged[name] = state
    return unchanged


def _check_replaced(folder: Path, names: Sequence[str], written: dict[str, list[int]]) -> None:
    """Checks that only files of commands would be replaced.

    Raises:
        CommandError: If another file would be replaced.
    """
    foreign = [name for name in names if name not in written and os.path.lexists(folder / name)]
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise CommandError(
            f"{folder / foreign[0]}{more} would be overwritten, but this command did not write it, or it was changed "
            "since; choose another --output"
        )


def _check_apart(folder: Path, names: Sequence[str], written: dict[str, list[int]], images: Path) -> None:
    """Checks that results are not among the images.

    The next command would read them as images. A folder of results inside the folder of the images is allowed, because
    it is not searched for images.

    Raises:
        CommandError: If they would be.
    """
    if not images.is_dir():
        return
    root, output = images.resolve(), folder.resolve()
    if root in output.parents:
        found, _ = find_image_files(folder)
        own = next((name for name in found if name not in written), None)
        if own is not None:
            raise CommandError(
                f"--output {folder} is in {images} and has images, such as {own}; choose a folder without images"
            )
    else:
        among = next((name for name in names if root in (output / name).resolve().parents), None)
        if among is not None:
            raise CommandError(
                f"--output {folder}: {among} would be among the images in {images}; choose another --output"
            )

"""Atomic writes, and bounded reads of text files."""

import errno
import os
import shutil
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# Windows does not replace a file that another program has open, such as a virus scanner: seconds between attempts.
_WAITS_S = (0.02, 0.1, 0.3, 0.6)
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)  # Windows has no such flag


def atomic_write(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes a file atomically.

    Readers see the old contents or the new ones, never a partial file. No link is followed: whatever stands at the name
    of the temporary file is removed first, except the temporary file of a process that is still writing.

    Args:
        path: File to write.
        write: Writes the contents to the path that it receives, an empty file.

    Raises:
        OSError: If the file cannot be written, another process is writing it, or there is a folder with the name of
            the temporary file.
    """
    fresh = path.with_name(path.name + ".tmp")
    lock = _create_locked(fresh)
    try:
        write(fresh)
        _sync(fresh)
        _replace(fresh, path)
    except BaseException:
        with suppress(PermissionError):  # on Windows the program that has it open may have caused the failure
            fresh.unlink(missing_ok=True)
        raise
    finally:
        if lock is not None:
            os.close(lock)
    _sync_folder(path.parent)


def atomic_replace_dir(fresh: Path, folder: Path) -> None:
    """Moves all files of one folder into another folder, each of them atomically.

    Raises:
        OSError: If a file cannot be moved, or the folder is a link.
    """
    if folder.is_symlink():
        raise OSError(errno.ELOOP, "is a link; replace it by a folder", str(folder))
    folder.mkdir(exist_ok=True)
    for file in fresh.iterdir():
        _sync(file)
    for file in fresh.iterdir():
        _replace(file, folder / file.name)
    _sync_folder(folder)
    fresh.rmdir()


def remove_tree(path: Path) -> None:
    """Removes a folder with its contents and ignores errors.

    Of a link, only the link is removed.
    """
    if path.is_symlink():
        path.unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def open_append(path: Path) -> TextIO:
    """Opens a text file to append lines, without following links.

    An incomplete last line, which a killed process leaves behind, is removed. Each line is written at once.

    Raises:
        OSError: If the file cannot be opened, or is a link or another special file.
    """
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise OSError(errno.EINVAL, "is a link or not a regular file; remove it", str(path))
        with open(path, "rb+", opener=_open_itself) as file:
            complete = file.read().rfind(b"\n") + 1
            file.truncate(complete)
    return open(path, "a", buffering=1, encoding="utf-8", opener=_open_itself)


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


def _create_locked(path: Path) -> int | None:
    """Creates an empty file in place of another one.

    Folders and locked files are not replaced.

    Returns:
        Descriptor that holds the lock; None on Windows, which does not remove a file that another process has open.

    Raises:
        OSError: If the file cannot be created, or another process holds the lock.
    """
    if fcntl is None:
        path.unlink(missing_ok=True)
        open(path, "xb", opener=_open_itself).close()
        return None
    try:
        earlier = os.open(path, os.O_RDONLY | os.O_NONBLOCK | _NO_FOLLOW)
    except OSError:  # nothing has the name, or a link has it
        path.unlink(missing_ok=True)
    else:
        try:
            _lock(earlier, path)
            path.unlink(missing_ok=True)
        finally:
            os.close(earlier)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | _NO_FOLLOW, 0o666)
    try:
        _lock(descriptor, path)
        if not os.path.samestat(os.fstat(descriptor), os.lstat(path)):  # removed before it was locked
            raise _busy(path)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _lock(descriptor: int, path: Path) -> None:
    """Locks an open file without waiting, if the file system has locks.

    Raises:
        OSError: If another process holds the lock.
    """
    assert fcntl is not None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise _busy(path) from error
    except OSError:  # some network drives have no locks
        pass


def _busy(path: Path) -> OSError:
    return OSError(errno.EBUSY, "another process is writing this file", str(path))


def _open_itself(path: str, flags: int) -> int:
    """Opens a file for `open`, but refuses links."""
    return os.open(path, flags | _NO_FOLLOW, 0o666)


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

"""A private folder for the files of one process.

Old files are deleted while the process runs, and the folder at its end.
"""

import os
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..common.cli import CommandError
from ..common.locks import InUseError, PathLock

_LOCK = "lock"
# Bytes of a block on the disk. A small file takes a whole block.
_BLOCK = 4096
# Seconds in which a request may use a file that it wrote.
_GRACE_S = 60.0


@contextmanager
def private_folder(prefix: str) -> Iterator[Path]:
    """Creates a folder that only this user can read, and removes it on exit.

    The folder contains a file `lock`, which shows whether its process still runs. A killed process leaves its folder
    behind. The next process removes it.

    Args:
        prefix: Start of the folder's name. The rest is random. The folder is in the system's temporary folder.

    Raises:
        OSError: If the folder cannot be created.
    """
    remove_leftovers(prefix)
    folder, lock = _create(prefix)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.release()
        shutil.rmtree(folder, ignore_errors=True)  # Windows does not delete open files, such as the lock


def _create(prefix: str) -> tuple[Path, PathLock]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix))  # mode 0700
        lock = PathLock()
        try:
            lock.acquire(folder / _LOCK, is_required=True)
            return folder, lock
        except InUseError:  # another process considers the new folder a leftover and removes it
            continue
        except CommandError as error:
            if folder.exists():
                shutil.rmtree(folder, ignore_errors=True)
                raise OSError(str(error)) from error


def remove_leftovers(prefix: str) -> None:
    """Removes the folders of `private_folder` whose processes have ended.

    Args:
        prefix: Start of the folders' names.
    """
    for folder in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        try:
            status = folder.lstat()
            is_own = not hasattr(os, "getuid") or status.st_uid == os.getuid()
            if not (stat.S_ISDIR(status.st_mode) and is_own and (folder / _LOCK).is_file()):
                continue
            with PathLock() as lock:
                lock.acquire(folder / _LOCK, is_required=True)
                for path in folder.iterdir():
                    if path.is_dir() and not path.is_symlink():
                        shutil.rmtree(path, ignore_errors=True)
                    elif path.name != _LOCK:
                        path.unlink()
            folder.rmdir()
        except (CommandError, OSError):  # the process still runs, or a file cannot be removed
            continue


class Storage:
    """Measures the files in a folder and deletes old ones.

    Attributes:
        limit: Disk space for all files, in bytes.
        stored: Disk space that the files took at the last sweep, in bytes.
    """

    def __init__(self, folder: Path, limit: int, max_age: float) -> None:
        """Stores the limits.

        Args:
            folder: Folder of the files. Subfolders are included.
            limit: Disk space for all files, in bytes.
            max_age: Age in seconds at which a file is deleted.
        """
        self.folder = folder
        self.limit = limit
        self.max_age = max_age
        self.stored = 0
        self._lock = threading.Lock()

    def sweep(self) -> None:
        """Deletes files that are too old.

        If the others take more than half of the limit, the oldest ones are deleted too. Files of the last minute are
        kept. A file that cannot be deleted is tried again in the next sweep.
        """
        with self._lock:
            self.stored = self._sweep()

    def _sweep(self) -> int:
        now = time.time()
        found: list[tuple[float, int, str]] = []
        for parent, folders, names in os.walk(self.folder, topdown=False):
            for name in (*names, *folders):
                path = os.path.join(parent, name)
                try:
                    status = os.lstat(path)
                    changed = _changed(status)
                    if stat.S_ISDIR(status.st_mode):
                        if now - changed > _GRACE_S:
                            os.rmdir(path)  # fails unless the folder is empty
                        continue
                except OSError:
                    continue
                found.append((changed, _room(status.st_size), path))
        stored = sum(size for _, size, _ in found)
        for changed, size, path in sorted(found):
            age = now - changed
            if age > self.max_age or (stored > self.limit / 2 and age > _GRACE_S):
                try:
                    os.remove(path)
                    stored -= size
                except OSError:
                    continue
        return stored

    @contextmanager
    def kept_small(self, seconds: float = 10.0) -> Iterator[None]:
        """Context manager: sweeps repeatedly in a background thread.

        Args:
            seconds: Time between two sweeps.
        """
        ended = threading.Event()

        def work() -> None:
            while not ended.wait(seconds):
                try:
                    self.sweep()
                except Exception as error:  # the next sweep may succeed
                    print(f"error: cannot delete old files in {self.folder}: {error!r}", flush=True)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def _changed(status: os.stat_result) -> float:
    """Returns the time when a file was written or moved here."""
    return max(status.st_mtime, status.st_ctime)


def _room(size: int) -> int:
    """Returns the disk space of a file and its folder, in bytes."""
    return max(size, _BLOCK) + _BLOCK

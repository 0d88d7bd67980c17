"""A private folder for the files of one process.

It is kept small while the process runs, and removed afterwards.
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
# Small files and folders take a block of the disk each.
_BLOCK = 4096
# Files younger than that may be in use by the request that wrote them.
_GRACE_S = 60.0


@contextmanager
def private_folder(prefix: str) -> Iterator[Path]:
    """Context with a new folder that only this user can read.

    The folder contains a file `lock`. A killed process leaves its folder behind. The next process removes it: the lock
    in a folder tells whether the process that made the folder still runs.

    Args:
        prefix: Of the folder's name, in the system's folder for temporary files. The rest of the name is random.

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
        except InUseError:  # another process took the new folder for a leftover, and removes it
            continue
        except CommandError as error:
            if folder.exists():
                shutil.rmtree(folder, ignore_errors=True)
                raise OSError(str(error)) from error


def remove_leftovers(prefix: str) -> None:
    """Removes the folders of `private_folder` whose processes have ended.

    Args:
        prefix: As for `private_folder`.
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
        except (CommandError, OSError):  # its process is running, or a file cannot be removed
            continue


class Storage:
    """The files in a folder: how much room they take, and the removal of old ones.

    Attributes:
        limit: Room in bytes for all files.
        stored: Room in bytes that the files took at the last look.
    """

    def __init__(self, folder: Path, limit: int, max_age: float) -> None:
        """
        Args:
            folder: Files in the folder and in folders below it.
            limit: Room in bytes for all files.
            max_age: Seconds after which a file is deleted.
        """
        self.folder = folder
        self.limit = limit
        self.max_age = max_age
        self.stored = 0
        self._lock = threading.Lock()

    def sweep(self) -> None:
        """Deletes files that are too old.

        While the rest takes more than half of the limit, it also deletes the oldest ones. Files of the last minute
        stay. What cannot be deleted stays until the next time.
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
        """Sweeps in a thread, again and again, until the end of the context.

        Args:
            seconds: From one time to the next.
        """
        ended = threading.Event()

        def work() -> None:
            while not ended.wait(seconds):
                try:
                    self.sweep()
                except Exception as error:  # whatever it is, the next time may do
                    print(f"error: cannot delete old files in {self.folder}: {error!r}", flush=True)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def _changed(status: os.stat_result) -> float:
    """Returns when a file was written, or moved to its place."""
    return max(status.st_mtime, status.st_ctime)


def _room(size: int) -> int:
    """Returns the bytes that a file takes on the disk, with its folder."""
    return max(size, _BLOCK) + _BLOCK

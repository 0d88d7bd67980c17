"""Locks on the folders that commands write to.

The system releases them when their process ends.
"""

import contextlib
import errno
import os
import socket
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from filelock import FileLock, Timeout

from .cli import CommandError, reason

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# Errors of file systems without locks, such as some network drives.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


class InUseError(CommandError):
    """Raised when another process holds the lock."""


class PathLock:
    """An exclusive lock, held through a lock file that is removed with the lock.

    On Unix the lock belongs to an open file (flock). Forked processes, such as loader workers, close their copy at
    once, so that they do not keep the lock after this process was killed. A lock file that a killed process left behind
    is not locked, and the next command takes it over. On Windows filelock does the same.

    Used as a context manager, it releases the lock at the end.

    Attributes:
        path: The lock file; None while this process holds no lock.
    """

    def __init__(self) -> None:
        self.path: Path | None = None
        self._descriptor: int | None = None
        self._file_lock: Any = None
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget)

    def __enter__(self) -> "PathLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def acquire(self, path: Path, is_required: bool = False) -> None:
        """Acquires the lock without waiting.

        Args:
            path: Lock file, in an existing folder.
            is_required: Whether a file system without locks is an error, not a warning.

        Raises:
            InUseError: If another process holds the lock.
            CommandError: If the lock file cannot be created.
        """
        self.release()
        try:
            if fcntl is None:
                self._file_lock = FileLock(path, timeout=0)
                self._file_lock.acquire()
            else:
                self._descriptor = self._lock_file(path, is_required)
            self.path = path
        except Timeout as error:
            self._file_lock = None
            raise InUseError(f"another process uses {path.parent}") from error
        except OSError as error:
            raise CommandError(f"cannot create the lock file {path}: {error.strerror or reason(error)}") from error

    def _lock_file(self, path: Path, is_required: bool) -> int:
        """Returns the descriptor of the locked file."""
        assert fcntl is not None
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:  # the latter on some file systems
                holder = os.pread(descriptor, 200, 0).decode("ascii", "replace")
                os.close(descriptor)
                named = f" ({holder})" if holder and holder.isprintable() else ""
                raise InUseError(f"another process{named} uses {path.parent}") from error
            except OSError as error:
                if is_required or error.errno not in _NO_LOCKS:
                    os.close(descriptor)
                    raise
                print(
                    f"warning: {path.parent} is on a file system without locks ({reason(error)}); do not start another "
                    "command that writes there",
                    file=sys.stderr,
                )
            # The previous holder may have removed the file between the two calls.
            if _is_file(descriptor, path):
                with contextlib.suppress(OSError):  # a full disk; the text only names the holder in messages
                    os.truncate(descriptor, 0)
                    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode("ascii", "replace"))
                return descriptor
            os.close(descriptor)

    def release(self) -> None:
        """Releases the lock and removes its file, if this process holds it."""
        if self._descriptor is not None:
            if self.path is not None and _is_file(self._descriptor, self.path):  # its folder may have been moved
                with contextlib.suppress(OSError):
                    self.path.unlink()
            os.close(self._descriptor)
        elif self._file_lock is not None:
            self._file_lock.release()
        self.path = self._descriptor = self._file_lock = None

    def _forget(self) -> None:
        """Closes the copy of the lock in a forked process. Its parent keeps the lock."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.close(self._descriptor)
        self.path = self._descriptor = self._file_lock = None


def _is_file(descriptor: int, path: Path) -> bool:
    """Returns whether a path still names the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except OSError:
        return False

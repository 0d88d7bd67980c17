"""Applies rules of Windows to Python processes on Linux.

Python imports this file when it starts, if the folder is on PYTHONPATH.

`sys.platform` and `os.name` keep their values, because torch selects compiled parts by them. The rules:

- modules, functions and signals that Windows lacks are missing, and SIGBREAK exists;
- processes are started by spawn;
- files that are open or mapped in the process cannot be replaced, renamed or removed;
- only files that are open for writing can be synced, and folders cannot be opened;
- names that Windows refuses cannot be created, and there are no links;
- filelock locks files through the system, which releases them when their process ends;
- text files are cp1252 and have CRLF lines, unless the code sets an encoding or a newline.
"""

import builtins
import errno
import fcntl as _fcntl  # imported before it is hidden
import importlib.abc
import io
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
import warnings
from typing import Any

_open, _os_open, _fsync, _mkdir = io.open, os.open, os.fsync, os.mkdir
_replace, _rename, _unlink = os.replace, os.rename, os.unlink
_HIDDEN_FILES = {"/proc/self/status", "/proc/self/clear_refs", "/proc/cpuinfo"}
_REFUSED = re.compile(r'.*[<>:"|?*\x00-\x1f].*|.*[. ]|(con|prn|aux|nul|com\d|lpt\d)(\..*)?', re.IGNORECASE | re.DOTALL)
# On Windows the standard library implements these modules differently.
_EXEMPT = ("multiprocessing.", "tempfile")


class _Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, *_: Any) -> None:
        if name in ("fcntl", "grp", "pwd", "resource", "termios"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def _denied(path: Any) -> PermissionError:
    return PermissionError(errno.EACCES, "the process cannot access the file because it is in use", str(path))


def _in_use(path: Any) -> bool:
    """Returns whether this process has a file, or a file in a folder, open.

    Mapped files count as open.
    """
    path = os.path.realpath(os.fsdecode(path))
    if not os.path.exists(path):
        return False
    own = os.stat(path)
    for entry in os.listdir("/proc/self/fd"):
        try:
            is_same = os.path.samestat(os.stat(int(entry)), own)
            if is_same or os.readlink(f"/proc/self/fd/{entry}").startswith(f"{path}/"):
                return True
        except OSError:  # descriptor of the listing itself
            pass
    with _open("/proc/self/maps", encoding="utf-8") as file:
        return any(line.rstrip("\n").endswith(f" {path}") or f" {path}/" in line for line in file)


def _is_exempt() -> bool:
    return str(sys._getframe(2).f_globals.get("__name__")).startswith(_EXEMPT)


def _check_name(path: Any) -> None:
    name = os.path.basename(os.fsdecode(path).rstrip("/"))
    if name not in ("", ".", "..") and _REFUSED.fullmatch(name):
        raise OSError(errno.EINVAL, "the file name is incorrect", str(path))


def _windows_open(
    file: Any,
    mode: str = "r",
    buffering: int = -1,
    encoding: Any = None,
    errors: Any = None,
    newline: Any = None,
    *rest: Any,
    **more: Any,
) -> Any:
    if isinstance(file, str | bytes | os.PathLike):
        if os.fsdecode(file) in _HIDDEN_FILES:
            raise FileNotFoundError(errno.ENOENT, "no such file", str(file))
        if set(mode) & set("wax"):
            _check_name(file)
    if "b" not in mode:
        encoding = "cp1252" if encoding in (None, "locale") else encoding
        if newline is None and set(mode) & set("wax") and "+" not in mode:
            newline = "\r\n"
    return _open(file, mode, buffering, encoding, errors, newline, *rest, **more)


def _windows_os_open(path: Any, flags: int, *rest: Any, **more: Any) -> int:
    if os.path.isdir(path):
        raise PermissionError(errno.EACCES, "permission denied", str(path))
    return _os_open(path, flags, *rest, **more)


def _windows_fsync(descriptor: Any) -> None:
    number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
    if _fcntl.fcntl(number, _fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, "bad file descriptor")
    _fsync(number)


def _windows_mkdir(path: Any, *rest: Any, **more: Any) -> None:
    _check_name(path)
    _mkdir(path, *rest, **more)


def _windows_replace(source: Any, target: Any, **more: Any) -> None:
    _check_name(target)
    if not _is_exempt() and (_in_use(source) or _in_use(target)):
        raise _denied(target)
    _replace(source, target, **more)


def _windows_rename(source: Any, target: Any, **more: Any) -> None:
    _check_name(target)
    if os.path.exists(target):
        raise FileExistsError(errno.EEXIST, "cannot create a file that exists", str(target))
    if not _is_exempt() and _in_use(source):
        raise _denied(source)
    _rename(source, target, **more)


def _windows_unlink(path: Any, **more: Any) -> None:
    if not _is_exempt() and not more and _in_use(path):
        raise _denied(path)
    _unlink(path, **more)


class _FileLock:
    """Locks files through the system, as filelock does on Windows.

    On Linux without fcntl, filelock would use a lock file that stays after a kill.
    """

    def __init__(self, lock_file: Any, timeout: float = -1, **_: Any) -> None:
        self.lock_file, self.timeout = os.fspath(lock_file), timeout
        self._descriptor: int | None = None

    def acquire(self, timeout: float | None = None, **_: Any) -> "_FileLock":
        wait = self.timeout if timeout is None else timeout
        since = time.monotonic()
        while self._descriptor is None:
            descriptor = _os_open(self.lock_file, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                _fcntl.flock(descriptor, _fcntl.LOCK_EX | _fcntl.LOCK_NB)
                self._descriptor = descriptor
            except BlockingIOError:
                os.close(descriptor)
                if 0 <= wait <= time.monotonic() - since:
                    raise filelock.Timeout(self.lock_file) from None
                time.sleep(0.05)
        return self

    def release(self, **_: Any) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
            _unlink(self.lock_file)

    def __enter__(self) -> "_FileLock":
        return self.acquire()

    def __exit__(self, *_: Any) -> None:
        self.release()


def _no_links(source: Any, target: Any, *_: Any, **__: Any) -> None:
    raise OSError(errno.EPERM, "a required privilege is not held by the client", str(target))


for name in (
    "fork",
    "forkpty",
    "geteuid",
    "getegid",
    "getgid",
    "getpgid",
    "getuid",
    "killpg",
    "sched_getaffinity",
    "setsid",
):
    delattr(os, name)
for name in ("pthread_sigmask", "sigwait", "sigwaitinfo", "sigtimedwait", "SIGHUP", "SIGKILL", "SIGUSR1", "SIGUSR2"):
    delattr(signal, name)
setattr(signal, "SIGBREAK", 21)  # noqa: B010
for name in ("fcntl", "grp", "pwd", "resource", "termios"):
    sys.modules.pop(name, None)
sys.meta_path.insert(0, _Hidden())
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # filelock warns that fcntl is missing
    import filelock
filelock.FileLock = _FileLock  # type: ignore[assignment]
for module in (builtins, io):
    setattr(module, "open", _windows_open)  # noqa: B010
for name, function in {
    "open": _windows_os_open,
    "fsync": _windows_fsync,
    "mkdir": _windows_mkdir,
    "replace": _windows_replace,
    "rename": _windows_rename,
    "unlink": _windows_unlink,
    "remove": _windows_unlink,
    "link": _no_links,
    "symlink": _no_links,
}.items():
    setattr(os, name, function)
tempfile.TemporaryFile = tempfile.NamedTemporaryFile  # type: ignore[assignment]
if "shutil" in sys.modules:
    sys.modules["shutil"]._use_fd_functions = False
multiprocessing.set_start_method("spawn", force=True)

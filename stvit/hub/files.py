"""Lists, copies and hashes the files of a folder without following links."""

import hashlib
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from stvit.safe_text import one_line

__all__ = ["HubError", "copy_file", "file_sha256", "list_files", "private_copy"]


class HubError(RuntimeError):
    """Raised when a model folder or a repository cannot be read or written.

    The message is one line without secrets. It says what failed, why, and what to do.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def file_sha256(path: Path) -> str:
    """Returns the sha256 of a file in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def list_files(folder: Path) -> dict[str, int]:
    """Returns the size in bytes of each file in a folder, by its path with slashes.

    Files and folders with a name that begins with a dot are skipped. The folder itself may be a link. A hard link looks
    like any other file and is not detected.

    Raises:
        HubError: If the folder contains a link, a pipe, a socket or a device, or cannot be read.
    """
    files = {}
    try:
        for place, folders, names in os.walk(folder, onerror=_raise):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in folders + [name for name in names if not name.startswith(".")]:
                path = Path(place, name)
                relative = path.relative_to(folder).as_posix()
                _refuse_link(folder, relative)
                mode = path.lstat().st_mode
                if stat.S_ISREG(mode):
                    files[relative] = path.lstat().st_size
                elif not stat.S_ISDIR(mode):
                    raise _special_file_error(folder, relative)
    except OSError as error:
        raise HubError(f"cannot read {folder}: {error.strerror or error}") from error
    return dict(sorted(files.items()))


def copy_file(folder: Path, name: str, target: Path, *, hard_link: bool = False) -> None:
    """Copies a file out of a folder without following links.

    A link that appears during the copy is not followed either.

    Args:
        folder: Folder of the file. It may itself be a link.
        name: Path of the file in the folder, with slashes.
        target: Path of the copy. Its folder is created if it is missing.
        hard_link: Whether to create a hard link where the file system supports it. Pass True only for files that
            programs replace and never modify.

    Raises:
        HubError: If the file, or a folder on its path, is a link, or if it is not a regular file.
        OSError: If the file cannot be read or the copy cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _refuse_link(folder, name)
    with _open_file(folder, name) as (descriptor, parent):
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise _special_file_error(folder, name)
        if hard_link and parent is not None:
            with suppress(OSError):  # another file system, or one without hard links
                os.link(PurePosixPath(name).name, target, src_dir_fd=parent, follow_symlinks=False)
                if os.path.samestat(target.lstat(), os.fstat(descriptor)):
                    return
                target.unlink()
        with open(descriptor, "rb", closefd=False) as source, target.open("wb") as copy:
            shutil.copyfileobj(source, copy, 1 << 20)


@contextmanager
def private_copy(folder: Path, names: Iterable[str]) -> Iterator[Path]:
    """Context manager: yields a private folder with copies of files.

    The folder is removed at the end.

    The copies are hard links where the file system supports them. Other programs cannot replace a file with a link
    between its check and its upload.

    Args:
        folder: Folder of the files.
        names: Paths of the files in the folder, with slashes.

    Raises:
        HubError: If a file is a link.
        OSError: If a file cannot be copied.
    """
    try:
        private = TemporaryDirectory(dir=folder.resolve().parent, prefix=f".{folder.resolve().name}-")
    except OSError:  # the parent folder is read-only
        private = TemporaryDirectory(prefix="stvit-")
    with private as place:
        for name in names:
            copy_file(folder, name, Path(place, name), hard_link=True)
        yield Path(place)


@contextmanager
def _open_file(folder: Path, name: str) -> Iterator[tuple[int, int | None]]:
    """Opens a file without following links below the folder.

    Yields:
        The descriptors of the file and of its parent folder. Windows cannot open folders: there the second is None, and
        links are only detected by `_refuse_link`.
    """
    if os.open not in os.supports_dir_fd:
        descriptor = os.open(folder / name, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        try:
            yield descriptor, None
        finally:
            os.close(descriptor)
        return
    opened = [os.open(folder, os.O_RDONLY | os.O_DIRECTORY)]
    try:
        *folders, last = PurePosixPath(name).parts
        try:
            for part in folders:
                opened.append(os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=opened[-1]))
            # O_NONBLOCK, because opening a pipe otherwise waits until a program writes to it.
            opened.append(os.open(last, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=opened[-1]))
        except OSError:
            _refuse_link(folder, name)  # its message says more if a link is the reason
            raise
        yield opened[-1], opened[-2]
    finally:
        for descriptor in opened:
            os.close(descriptor)


def _refuse_link(folder: Path, name: str) -> None:
    """Checks each part of a path below a folder for links.

    Raises:
        HubError: If one part is a link.
    """
    path = folder
    for part in PurePosixPath(name).parts:
        path = path / part
        if path.is_symlink() or getattr(os.path, "isjunction", os.path.islink)(path):
            raise HubError(
                f"{path.relative_to(folder).as_posix()} in {folder} is a link to {os.readlink(path)}; links are not "
                "followed, because they can publish files from outside the folder; replace the link with a copy of its "
                "target, or copy the whole folder with `cp -RL` (for example a snapshot in the cache of the Hub)"
            )


def _special_file_error(folder: Path, name: str) -> HubError:
    return HubError(f"{name} in {folder} is not a regular file but a pipe, a socket or a device; remove it")


def _raise(error: OSError) -> None:
    raise error

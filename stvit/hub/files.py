"""Files of a folder: listing, copying and hashing them, without following links."""

import hashlib
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from stvit.safe_text import one_line


class HubError(RuntimeError):
    """Raised when a push fails or when the uploaded files differ from the local ones.

    The message is one line without secrets. It says what failed, why, and what to do.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def file_sha256(path: Path) -> str:
    """sha256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def list_files(folder: Path) -> dict[str, int]:
    """Returns the size in bytes of each file of a folder, by its path there with slashes.

    Hidden files and folders, whose names begin with a dot, do not count. The folder itself may be a link. A hard link
    looks like any other file and cannot be recognized.

    Raises:
        HubError: If something in the folder is a link or is neither a file nor a folder, or cannot be read.
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
                    raise _not_a_file(folder, relative)
    except OSError as error:
        raise HubError(f"cannot read {folder}: {error.strerror or error}") from error
    return dict(sorted(files.items()))


def copy_file(folder: Path, name: str, target: Path, *, link: bool = False) -> None:
    """Copies a file of a folder and follows no link on the way, even if somebody puts one there meanwhile.

    Args:
        folder: The folder, which may itself be a link.
        name: Path of the file in the folder, with slashes.
        target: Path of the copy. Its folder is made if it is missing.
        link: Whether a hard link is as good as a copy. It is for a file that programs replace but never write to.

    Raises:
        HubError: If the file or a folder on the way is a link, or it is not a file.
        OSError: If it cannot be read or written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _refuse_link(folder, name)
    with _opened_file(folder, name) as (descriptor, parent):
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise _not_a_file(folder, name)
        if link and parent is not None:
            with suppress(OSError):  # another file system, or one without hard links
                os.link(PurePosixPath(name).name, target, src_dir_fd=parent, follow_symlinks=False)
                if os.path.samestat(target.lstat(), os.fstat(descriptor)):
                    return
                target.unlink()
        with open(descriptor, "rb", closefd=False) as source, target.open("wb") as copy:
            shutil.copyfileobj(source, copy, 1 << 20)


@contextmanager
def _opened_file(folder: Path, name: str) -> Iterator[tuple[int, int | None]]:
    """Opens a file without following links below the folder; gives its descriptor and that of the folder it is in.

    Windows opens no folders: there the second is None, and only `_refuse_link` looks for links.
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
            # Without O_NONBLOCK a pipe would wait for somebody to write to it.
            opened.append(os.open(last, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=opened[-1]))
        except OSError:
            _refuse_link(folder, name)  # where a link is the reason, its error says more
            raise
        yield opened[-1], opened[-2]
    finally:
        for descriptor in opened:
            os.close(descriptor)


def _refuse_link(folder: Path, name: str) -> None:
    """Refuses a link at any place of a path below a folder.

    Raises:
        HubError: If there is one.
    """
    path = folder
    for part in PurePosixPath(name).parts:
        path = path / part
        if path.is_symlink() or getattr(os.path, "isjunction", os.path.islink)(path):
            raise HubError(
                f"{path.relative_to(folder).as_posix()} in {folder} is a link to {os.readlink(path)}: links are not "
                "followed, because they can publish files from outside the folder; replace it by a copy of the file, "
                "or copy the whole folder with `cp -RL` (a snapshot of the Hub's cache, for example)"
            )


def _not_a_file(folder: Path, name: str) -> HubError:
    return HubError(f"{name} in {folder} is not a file but a pipe, a socket or a device: remove it")


def _raise(error: OSError) -> None:
    raise error


@contextmanager
def own_files(folder: Path, names: Iterable[str]) -> Iterator[Path]:
    """Copies files to a private folder for a push, so that no other program can replace one by a link meanwhile."""
    try:
        private = TemporaryDirectory(dir=folder.resolve().parent, prefix=f".{folder.resolve().name}-")
    except OSError:  # nothing can be written there
        private = TemporaryDirectory(prefix="stvit-")
    with private as place:
        for name in names:
            copy_file(folder, name, Path(place, name), link=True)
        yield Path(place)

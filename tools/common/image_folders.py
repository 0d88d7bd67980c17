"""Image folders and tar archives: images, their classes, and ignored files."""

import os
import posixpath
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any

from torchvision.datasets import ImageFolder as TorchvisionImageFolder

from stvit.images import SUFFIXES
from stvit.safe_text import printable

from .cli import CommandError, OneProcessError, reason

# Folders and files of operating systems, network drives and editors that are not hidden. In lower case.
_FOREIGN = {
    "#recycle",
    "#snapshot",
    "$recycle.bin",
    "@eadir",
    "@recently-snapshot",
    "@recycle",
    "__macosx",
    "__pycache__",
    "desktop.ini",
    "ehthumbs.db",
    "lost+found",
    "system volume information",
    "thumbs.db",
}
MOST_NAMED = 3


@dataclass
class Ignored:
    """Ignored files and folders below a folder, by their relative paths.

    Attributes:
        files: Hidden files, and files that are not images.
        folders: Hidden folders, folders of other programs, and links to a parent folder.
    """

    files: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)

    def describe(self, root: str | Path) -> str | None:
        """Returns a line about the ignored files and folders; None if there are none."""
        parts = []
        if self.files:
            parts.append(
                _count(self.files, "file that is hidden or not an image", "files that are hidden or not images")
            )
        if self.folders:
            kinds = "hidden folder or folder of another program", "hidden folders or folders of other programs"
            parts.append(_count(self.folders, *kinds))
        return f"ignored in {root}: {', '.join(parts)}" if parts else None


def is_foreign(name: str) -> bool:
    """Returns whether a file or folder is hidden or belongs to another program.

    Args:
        name: Name without its folder.
    """
    return name.startswith(".") or name.lower() in _FOREIGN


def is_image_name(name: str) -> bool:
    """Returns whether a file name is that of a supported, not hidden image."""
    return name.lower().endswith(SUFFIXES) and not is_foreign(name)


def find_image_files(root: str | Path, skipped: Path | None = None) -> tuple[list[str], Ignored]:
    """Finds the images in a folder and its subfolders, in natural order.

    Args:
        root: The folder. Links are followed.
        skipped: Resolved path of a folder that is neither searched nor reported.

    Returns:
        The paths of the images relative to `root`, with '/' between folders, and the ignored files and folders.

    Raises:
        OSError: If a folder cannot be read.
    """
    found: list[str] = []
    ignored = Ignored()

    def search(folder: str, prefix: str, parents: frozenset[tuple[int, int]]) -> None:
        status = os.stat(folder)
        here = (status.st_dev, status.st_ino)
        if here in parents:  # a link to a parent folder
            ignored.folders.append(prefix.rstrip("/"))
            return
        with os.scandir(folder) as entries:
            for entry in entries:
                path = prefix + entry.name
                if entry.is_dir():
                    if is_foreign(entry.name):
                        ignored.folders.append(path)
                    elif skipped is None or Path(entry.path).resolve() != skipped:
                        search(entry.path, f"{path}/", parents | {here})
                # A link without a target counts as an image, so that reading it fails with its path.
                elif is_image_name(entry.name) and (entry.is_file() or entry.is_symlink()):
                    found.append(path)
                else:
                    ignored.files.append(path)

    search(os.fspath(root), "", frozenset())
    return _in_order(found), ignored


class ImageFolder:
    """Images and class numbers of a folder with one subfolder for each class.

    Attributes:
        root: The folder.
        class_to_idx: Class numbers by name, in natural order of the names.
        ignored: The ignored files and folders.
    """

    def __init__(self, root: str | Path) -> None:
        """Finds the images and their classes.

        Args:
            root: Folder with one subfolder of images for each class.

        Raises:
            CommandError: If the folder cannot be read, a class has no image, or an image is not directly in a class
                folder.
        """
        self.root = Path(root)
        try:
            self._paths, self.ignored = find_image_files(root)
            folders = [entry.name for entry in os.scandir(root) if entry.is_dir() and not is_foreign(entry.name)]
        except OSError as error:
            raise CommandError(f"cannot read the image folder {root}: {reason(error)}") from error
        held = {path.split("/")[0] for path in self._paths if "/" in path}
        if any("/" not in path for path in self._paths):
            raise CommandError(f"{root} has images beside the class folders; move each into the folder of its class")
        if not folders:
            raise CommandError(f"{root} has no class folders; it must contain <class>/*")
        empty = _in_order(set(folders) - held)
        if empty:
            raise CommandError(
                f"class folder {self.root / empty[0]} has no image (a file that ends in {', '.join(SUFFIXES)}); add "
                "images, or remove the folder"
            )
        deep = next((path for path in self._paths if path.count("/") > 1), None)
        if deep is not None:
            raise CommandError(f"image {self.root / deep} is in a subfolder of its class folder; move it up")
        self.class_to_idx = {name: number for number, name in enumerate(_in_order(held))}

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[str, int]:
        """Returns the path of an image and its class number."""
        path = self._paths[index]
        return os.path.join(self.root, path), self.class_to_idx[path.split("/")[0]]

    def filename(self, index: int, absolute: bool = False) -> str:
        """Returns the path of an image, with `absolute` including the folder."""
        return os.path.join(self.root, self._paths[index]) if absolute else self._paths[index]

    def paths_and_labels(self) -> Iterator[tuple[str, int]]:
        """Yields the path of each image, from its class folder on, and its class number."""
        yield from ((path, self.class_to_idx[path.split("/")[0]]) for path in self._paths)


@dataclass(slots=True)
class _Member:
    """Path, offset and size in bytes of a file in an archive."""

    path: str
    offset: int
    size: int


class ImageTar:
    """Images and class numbers of a tar archive.

    The class of an image is the folder that contains it. An archive within the archive counts as a folder, as in
    ImageNet's archive of training images. Several processes can read at the same time.

    Attributes:
        root: The archive.
        class_to_idx: Class numbers by name, in natural order of the names.
        ignored: The ignored files and folders.
    """

    def __init__(self, root: str | Path) -> None:
        """Reads the index of the archive.

        Args:
            root: An uncompressed tar archive.

        Raises:
            CommandError: If the archive cannot be read, has no images, or has images outside of class folders.
        """
        self.root = Path(root)
        self.ignored = Ignored()
        try:
            self._state = _file_state(os.stat(root))
            with tarfile.open(root, "r:") as tar:
                members = list(self._search(tar, "", 0))
        except OSError as error:
            raise CommandError(f"cannot read the archive {root}: {reason(error)}") from error
        except (tarfile.TarError, ValueError, ArithmeticError, EOFError, RecursionError, MemoryError) as error:
            # tarfile raises all of these for a damaged header.
            why = reason(error) if isinstance(error, tarfile.TarError) else "damaged header"
            raise CommandError(
                f"cannot read the archive {root}: {why}; it must be a complete, uncompressed tar file: copy it again, "
                "or recreate it"
            ) from error
        by_path = {member.path: member for member in members}  # a later member replaces an earlier one
        self._members = [by_path[path] for path in _in_order(by_path)]
        depths = {member.path.count("/"): member.path for member in self._members}
        if not depths or 0 in depths:
            problem = f"image {depths[0]} is in no folder" if depths else "no images"
            ignored = self.ignored.describe(root)
            more = f" ({ignored})" if ignored and not depths else ""
            raise CommandError(f"archive {root}: {problem}{more}; it must contain <class>/*")
        if len(depths) > 1:
            one, other = depths[min(depths)], depths[max(depths)]
            raise CommandError(
                f"archive {root}: {one} and {other} are in folders of different depth; the class of an image is the "
                "folder that contains it"
            )
        names = _in_order({member.path.split("/")[-2] for member in self._members})
        self.class_to_idx = {name: number for number, name in enumerate(names)}

    def _search(self, tar: tarfile.TarFile, prefix: str, start: int) -> Iterator[_Member]:
        """Yields the images of an archive that begins at byte `start` of the file."""
        members: dict[str, _Member] = {}
        links: list[tuple[str, str]] = []
        position = -1
        for info in tar:
            # A damaged size may lead tarfile back to an earlier position, in an endless loop.
            if info.size < 0 or tar.offset <= position:
                raise tarfile.ReadError(f"damaged header at byte {start + info.offset}")
            position = tar.offset
            path = _normalized(f"{prefix}/{info.name}")
            parts = PurePosixPath(path).parts
            foreign = next((i for i, part in enumerate(parts[:-1]) if is_foreign(part)), None)
            if foreign is not None:
                folder = "/".join(parts[: foreign + 1])
                if folder not in self.ignored.folders:
                    self.ignored.folders.append(folder)
            elif not parts or info.isdir():
                continue
            elif info.isfile() and path.lower().endswith(".tar") and not is_foreign(parts[-1]):
                with tarfile.open(fileobj=tar.extractfile(info), mode="r:") as child:
                    yield from self._search(child, path[: -len(".tar")], start + info.offset_data)
            elif not is_image_name(parts[-1]):
                self.ignored.files.append(path)
            elif info.islnk() or info.issym():
                beside = posixpath.dirname(path) if info.issym() else prefix
                links.append((path, _normalized(f"{beside}/{info.linkname}")))
            elif info.isfile() and not info.issparse():
                members[path] = _Member(path, start + info.offset_data, info.size)
            else:
                self.ignored.files.append(path)
        # tarfile treats a damaged header as the end of the archive. The real end is a block of zeros.
        file: Any = tar.fileobj
        file.seek(tar.offset)
        end = file.read(tarfile.BLOCKSIZE)
        if end.strip(b"\0"):
            raise tarfile.ReadError(f"damaged header at byte {start + tar.offset}")
        if len(end) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError("the zero blocks at its end are missing, it may be cut off")
        for path, target in links:  # tar stores hard links by name
            if target in members:
                members[path] = _Member(path, members[target].offset, members[target].size)
            else:
                self.ignored.files.append(path)
        yield from members.values()

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, index: int) -> tuple[BytesIO, int]:
        """Returns the file of an image and its class number.

        Raises:
            OneProcessError: If the archive does not exist any more, or has changed.
        """
        member = self._members[index]
        content = b""
        try:
            # Checked before opening, because opening a pipe would wait forever.
            is_same = _file_state(os.stat(self.root)) == self._state
            if is_same:
                with open(self.root, "rb") as file:
                    file.seek(member.offset)
                    content = file.read(member.size)
        except OSError as error:
            raise OneProcessError(f"cannot read the archive {self.root} any more: {reason(error)}") from error
        if not is_same or len(content) < member.size:
            raise OneProcessError(
                f"the archive {self.root} was changed while it was in use; run the command again (for a training, with "
                "--resume auto)"
            )
        return BytesIO(content), self.class_to_idx[member.path.split("/")[-2]]

    def filename(self, index: int, absolute: bool = False) -> str:
        """Returns the path of an image, with `absolute` including the archive."""
        path = self._members[index].path
        return os.path.join(self.root, path) if absolute else path

    def paths_and_labels(self) -> Iterator[tuple[str, int]]:
        """Yields the path of each image, from its class folder on, and its class number."""
        for member in self._members:
            *_, name, file = member.path.split("/")
            yield f"{name}/{file}", self.class_to_idx[name]


class TorchImageFolder(TorchvisionImageFolder):
    """torchvision's image folder, with this module's formats and ignored folders.

    The class of an image is its outermost folder. Classes are in alphabetical order.

    Attributes:
        ignored: The ignored files and folders.
    """

    def __init__(self, root: str | Path, **kwargs: Any) -> None:
        def is_image(path: str) -> bool:
            *folders, name = Path(path).relative_to(root).parts
            return is_image_name(name) and not any(map(is_foreign, folders))

        super().__init__(os.fspath(root), is_valid_file=is_image, **kwargs)
        self.ignored = find_image_files(root)[1]

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """Returns the names of the class folders, and the class number of each."""
        names = sorted(entry.name for entry in os.scandir(directory) if entry.is_dir() and not is_foreign(entry.name))
        if not names:
            raise FileNotFoundError(f"{directory} has no class folders")
        return names, {name: number for number, name in enumerate(names)}


def _file_state(status: os.stat_result) -> tuple[int, int, int]:
    """Returns values that change when a file is written or replaced."""
    return status.st_mode, status.st_size, status.st_mtime_ns


def _normalized(path: str) -> str:
    """Removes '.', '..' and a leading '/' from a path in an archive."""
    return posixpath.normpath("/" + path.lstrip("/"))[1:]


def _in_order(names: Iterable[str]) -> list[str]:
    """Sorts names in timm's natural order, which compares numbers by value.

    Names that differ only in case or leading zeros are in alphabetical order. timm leaves their order undefined.
    """

    def key(name: str) -> tuple[list[Any], str]:
        parts = re.split(r"(\d+)", name.lower())
        return [int(part) if i % 2 else part for i, part in enumerate(parts)], name

    return sorted(names, key=key)


def _count(names: Sequence[str], one: str, several: str) -> str:
    """Returns the number of names, and the first names."""
    shown = [printable(name) for name in _in_order(names)[:MOST_NAMED]]
    more = ["…"] if len(names) > MOST_NAMED else []
    return f"{len(names)} {one if len(names) == 1 else several} ({', '.join(shown + more)})"

"""Datasets of images and label maps: files, checks, and what a run needs of them."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from stvit.images import UnreadableImageError, image_size

from ..common.cli import CommandError, progress_bar, reason
from ..common.data import Images
from ..common.distributed import Distributed
from ..common.examples import ExampleDataset
from ..common.image_folders import Ignored, find_image_files
from .config import ValidationDataConfig
from .labels import MAX_CLASSES, LabelReader, LabelRules, read_class_names

# Class names in ADE20K's folder.
_ADE_NAMES = "objectInfo150.txt"
_MOST_NAMED = 3


class LabeledImages:
    """Images of a folder with label maps of the same names in another folder.

    Attributes:
        images: Folder of the images.
        labels: Folder of the label maps.
        ignored: The ignored files and folders of both.
        contents: Digest of the label maps, after `check_labels` has read them.
    """

    contents: str | None = None

    def __init__(self, images: Path, labels: Path) -> None:
        """Finds the files.

        Names are compared without their suffix and from the folder on, so subfolders must be the same, too.

        Raises:
            CommandError: If a folder cannot be read, or a file has no counterpart.
        """
        self.images, self.labels = images, labels
        self.ignored: dict[Path, Ignored] = {}
        self._images, labels_found = self._find(images, "image"), self._find(labels, "label map")
        stems = {_stem(name): name for name in labels_found}
        _refuse_twins(images, self._images)
        _refuse_twins(labels, labels_found)
        missing = [name for name in self._images if _stem(name) not in stems]
        if missing:
            raise CommandError(
                f"{_count(missing, 'image has', 'images have')} no label map in {labels}: {_some(missing)}; add a PNG "
                "file of the same name, or remove the image"
            )
        known = {_stem(name) for name in self._images}
        missing = [name for name in labels_found if _stem(name) not in known]
        if missing:
            raise CommandError(
                f"{_count(missing, 'label map has', 'label maps have')} no image in {images}: {_some(missing)}; add "
                "the image, or remove the label map"
            )
        self._labels = [stems[_stem(name)] for name in self._images]

    def _find(self, folder: Path, kind: str) -> list[str]:
        if not folder.is_dir():
            raise CommandError(f"{folder} is not a folder; it must contain one {kind} per example")
        try:
            found, self.ignored[folder] = find_image_files(folder)
        except OSError as error:
            raise CommandError(f"cannot read the folder {folder}: {reason(error)}") from error
        if not found:
            raise CommandError(f"no {kind} in {folder}")
        return found

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[str, Path]:
        """Returns the paths of an image and of its label map."""
        return self.filename(index, absolute=True), self.labels / self._labels[index]

    def filename(self, index: int, absolute: bool = False) -> str:
        """Returns the path of an image, with `absolute` including the folder."""
        return os.path.join(self.images, self._images[index]) if absolute else self._images[index]

    def contents_digest(self) -> str | None:
        """Returns a digest of the label maps; None if they were not read."""
        return self.contents

    def names_and_labels(self) -> Iterator[tuple[str, str]]:
        """Yields the path of each image with the size of its label map.

        The path begins at the folder of the images. The second value, the label, is empty.
        """
        for name, labels in zip(self._images, self._labels, strict=True):
            yield f"{name} {(self.labels / labels).stat().st_size}", ""


def open_data(
    config: ValidationDataConfig,
    distributed: Distributed,
    *,
    in_chans: int = 3,
    seed: int = 42,
    is_training: bool = True,
    class_names: Sequence[str] | None = None,
    num_classes: int | None = None,
) -> tuple[Images, LabelRules]:
    """Opens the training and validation sets.

    Label maps are not read, see `check_data`.

    Args:
        config: The datasets.
        distributed: The processes that share the images.
        in_chans: Image channels, 1 or 3.
        seed: Seed of the augmentation.
        is_training: Whether to also open the training set.
        class_names: Class names of a trained model, which --class-names replaces.
        num_classes: Number of classes; None for the number of names.

    Returns:
        The datasets without transforms, and the meaning of the values in the label maps.

    Raises:
        CommandError: If a folder or file is missing.
    """
    names = _class_names(config, class_names)
    if names is not None and num_classes not in (None, len(names)):
        raise CommandError(f"there are {num_classes} classes, but {len(names)} class names; pass one name per class")
    count = len(names) if names is not None else num_classes
    if count is None:
        raise CommandError("the number of classes is unknown; pass --class-names FILE, or --num-classes N")
    if count > MAX_CLASSES:
        raise CommandError(f"--num-classes {count} is more than the limit of {MAX_CLASSES} classes")
    rules = LabelRules(count, bool(config.reduce_zero_label), config.ignore_index)
    splits = ["training", "validation"] if is_training else ["validation"]
    sources = [LabeledImages(*_folders(config, split)) for split in splits]
    for source in sources:
        for folder, ignored in source.ignored.items():
            line = ignored.describe(folder)
            if line is not None:
                distributed.print_primary(line)
    mode = "L" if in_chans == 1 else "RGB"
    datasets: list[Any] = [ExampleDataset(source, mode, seed) for source in sources]
    return Images(datasets[0] if is_training else None, datasets[-1], names), rules


def _class_names(config: ValidationDataConfig, known: Sequence[str] | None) -> list[str] | None:
    if config.class_names is not None:
        return read_class_names(Path(config.class_names).expanduser())
    if known is not None:
        return list(known)
    ade = None if config.data_dir is None else Path(config.data_dir).expanduser() / _ADE_NAMES
    return read_class_names(ade) if ade is not None and ade.is_file() else None


def _folders(config: ValidationDataConfig, split: str) -> tuple[Path, Path]:
    """Returns the folders of the images and the label maps of a split.

    Raises:
        CommandError: If a flag is missing, or a folder does not exist.
    """
    short = "train" if split == "training" else "val"
    folders = []
    for kind, subfolder in (("images", "images"), ("labels", "annotations")):
        given = getattr(config, f"{short}_{kind}")
        if given is not None:
            folder, flag = Path(given).expanduser(), f"--{short}-{kind}"
        elif config.data_dir is None:
            raise CommandError(f"no {split} {kind}; pass --data-dir, or --{short}-{kind}")
        else:
            folder, flag = Path(config.data_dir).expanduser() / subfolder / split, "--data-dir"
        if not folder.is_dir():
            thing = "image" if kind == "images" else "label map"
            raise CommandError(f"{folder} is not a folder; it must contain one {thing} per example; check {flag}")
        folders.append(folder)
    return folders[0], folders[1]


# ---------------------------------------------------------------------------------------------------------------------
# Checks


def check_data(config: ValidationDataConfig, images: Images, rules: LabelRules, distributed: Distributed) -> None:
    """Reads and checks all label maps.

    With --no-check-data, it does nothing.

    Args:
        config: The datasets.
        images: The training and validation sets of `open_data`.
        rules: Meaning of the values.
        distributed: The processes of the run. The primary process checks.

    Raises:
        CommandError: If a label map is wrong, or a set has no labeled pixel.
    """
    if config.check_data:
        sources = [dataset.source for dataset in (images.train, images.val) if dataset is not None]
        distributed.on_primary(partial(check_labels, sources, rules, config.workers, images.class_names))


def check_labels(
    sources: Sequence[LabeledImages], rules: LabelRules, workers: int, names: Sequence[str] | None = None
) -> None:
    """Reads all label maps, and checks their sizes and values.

    Prints the classes that the first source does not contain. Each source gets the digest of its label maps.

    Args:
        sources: The training and validation sets.
        rules: Meaning of the values.
        workers: Threads.
        names: Class names, for the message.

    Raises:
        CommandError: If a label map is wrong, or a set has no labeled pixel.
    """
    reader = LabelReader(rules)
    pairs = [source[index] for source in sources for index in range(len(source))]
    problems: list[str] = []
    found: list[np.ndarray] = []
    digests: list[bytes] = []
    executor = ThreadPoolExecutor(max_workers=max(1, workers))  # Pillow decodes without Python's lock
    try:
        with progress_bar(len(pairs), "label map", is_shown=True) as bar:
            for result in executor.map(partial(_check_pair, reader), *zip(*pairs, strict=True)):
                if isinstance(result, str):
                    problems.append(result)
                else:
                    found.append(result[0])
                    digests.append(result[1])
                bar.update()
    finally:
        executor.shutdown(cancel_futures=True)  # after an interrupt
    if problems:
        raise CommandError(f"{_count(problems, 'label map is', 'label maps are')} wrong: {_some(problems, '; ')}")
    place = 0
    for source in sources:
        present = np.any(found[place : place + len(source)], axis=0)
        source.contents = _digest(b"".join(digests[place : place + len(source)])).hex()
        place += len(source)
        if not present.any():
            raise CommandError(f"no label map in {source.labels} has a labeled pixel: {rules.describe_ignored()}")
        if source is sources[0] and len(sources) > 1 and not present.all():
            missing = [names[i] if names else str(i) for i in np.flatnonzero(~present).tolist()]
            print(f"{_count(missing, 'class is', 'classes are')} not in the training labels: {_some(missing)}")


def _check_pair(reader: LabelReader, image: str, labels: Path) -> tuple[np.ndarray, bytes] | str:
    """Returns the classes in a label map, bool (K,), and the digest of its file.

    If the label map is wrong, it returns the problem.
    """
    try:
        size = image_size(image)
    except (OSError, UnreadableImageError):
        size = None  # reading the image reports it, and --max-bad-images decides
    try:
        return reader.find_classes(labels, size), _digest(labels.read_bytes())
    except ValueError as error:
        return f"{labels}: {error}"


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _refuse_twins(folder: Path, names: Sequence[str]) -> None:
    """Checks that no two files differ only in their suffix.

    Raises:
        CommandError: If two files do.
    """
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(_stem(name), name)
        if other != name:
            raise CommandError(f"{folder} has both {other} and {name}; remove one of them")


def _count(items: Sequence[Any], one: str, many: str) -> str:
    return f"{len(items)} {one if len(items) == 1 else many}"


def _some(items: Sequence[str], separator: str = ", ") -> str:
    more = f"{separator}and {len(items) - _MOST_NAMED} more" if len(items) > _MOST_NAMED else ""
    return separator.join(items[:_MOST_NAMED]) + more

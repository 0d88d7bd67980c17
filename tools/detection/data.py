"""Opens the images and annotations of a training or an evaluation."""

import hashlib
import os
import sys
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
from .coco import MOST_NAMED, Coco
from .config import TrainDataConfig, ValidationDataConfig
from .transforms import describe_wrong_size

_YEAR = "2017"


class CocoSource:
    """Images of an annotation file, as pairs of a path and its target.

    `ExampleDataset` reads them.

    Attributes:
        coco: The annotations.
        folder: Folder of the images.
        indices: Numbers of the images in the file.
    """

    def __init__(self, coco: Coco, folder: Path, indices: Sequence[int], with_objects: bool) -> None:
        """Selects the images.

        Args:
            coco: The annotations.
            folder: Folder of the images.
            indices: Numbers of the images in the file.
            with_objects: Whether targets have boxes and masks. Otherwise they have only `image_id` and `size`.
        """
        self.coco, self.folder, self.with_objects = coco, folder, with_objects
        self.indices = np.asarray(indices, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[str, dict[str, Any]]:
        """Returns the path of an image and its target."""
        number = int(self.indices[index])
        image = self.coco.images[number]
        target = (
            self.coco.target(number)
            if self.with_objects
            else {"image_id": image.id, "size": (image.height, image.width)}
        )
        return self.filename(index, absolute=True), target

    def filename(self, index: int, absolute: bool = False) -> str:
        """Returns the path of an image, with `absolute` including the folder."""
        name = self.coco.images[int(self.indices[index])].file_name
        return os.path.join(self.folder, name) if absolute else name

    def find_wrong_size(self, index: int) -> str | None:
        """Returns what is wrong with the size of an image.

        None if it is right, or the file cannot be read.
        """
        image = self.coco.images[int(self.indices[index])]
        path = self.filename(index, absolute=True)
        try:
            problem = describe_wrong_size(image_size(path), (image.width, image.height))
        except (OSError, UnreadableImageError):
            return None
        return None if problem is None else f"{path} (image {image.id}) has {problem}"

    def aspect_ratios(self) -> list[float]:
        """Returns width divided by height of each image."""
        images = (self.coco.images[int(number)] for number in self.indices)
        return [image.width / image.height for image in images]

    def contents_digest(self) -> str | None:
        """Returns a digest of the areas and masks of the objects.

        `names_and_labels` leaves them out.
        """
        digest = hashlib.blake2b(digest_size=16)
        for number in self.indices:
            for part in self.coco.describe_shapes(int(number)):
                digest.update(part)
        return digest.hexdigest()

    def names_and_labels(self) -> Iterator[tuple[str, str]]:
        """Yields the name of each image with a digest of its objects, and an empty label."""
        for place, number in enumerate(self.indices):
            digest = hashlib.blake2b(digest_size=16)
            for box, label in self.coco.describe_objects(int(number)):
                digest.update(f"{label} {box}\n".encode())
            yield f"{self.filename(place)} {digest.hexdigest()}", ""


def open_images(
    config: ValidationDataConfig,
    distributed: Distributed,
    *,
    with_masks: bool,
    in_chans: int = 3,
    seed: int = 42,
    is_training: bool = True,
) -> Images:
    """Opens the validation images, and in training also the training images.

    Prints what is wrong with single objects.

    Args:
        config: The data.
        distributed: The processes that share the images.
        with_masks: Whether the model has masks.
        in_chans: Image channels, 1 or 3.
        seed: Seed of the augmentation.
        is_training: Whether to also open the training images.

    Raises:
        CommandError: If a file or folder is missing, or the annotations contradict themselves.
    """
    mode = "L" if in_chans == 1 else "RGB"
    val = _open_set(config, "val", distributed, with_masks)
    val_set = ExampleDataset(CocoSource(*val, range(len(val[0].images)), with_objects=False), mode)
    if not isinstance(config, TrainDataConfig) or not is_training:
        return Images(None, val_set, val[0].names)
    coco, folder = _open_set(config, "train", distributed, with_masks)
    _check_same_categories(coco, val[0])
    indices: Sequence[int] = range(len(coco.images))
    if not config.keep_empty_images:
        indices = [index for index in indices if len(coco.usable(index))]
        empty = len(coco.images) - len(indices)
        if empty:
            distributed.print_primary(
                f"{coco.path}: training leaves out {empty} of {len(coco.images)} images, which have no object "
                "(--keep-empty-images keeps them)"
            )
    if not any(len(coco.usable(index)) for index in indices):
        if with_masks:
            raise _missing_masks(coco.path, "to train on", "--train-annotations")
        raise CommandError(f"{coco.path} has no object to train on; check --train-annotations")
    if val[0].count_objects() == 0:
        raise CommandError(f"{val[0].path} has no object, so that no accuracy can be measured")
    train_set = ExampleDataset(CocoSource(coco, folder, indices, with_objects=True), mode, seed)
    return Images(train_set, val_set, coco.names)


def _open_set(
    config: ValidationDataConfig, split: str, distributed: Distributed, with_masks: bool
) -> tuple[Coco, Path]:
    """Returns the annotations and the image folder of a split, `train` or `val`."""
    annotations, folder = find_set(config, split)
    if not annotations.exists():
        flag = f"--{split}-annotations" if getattr(config, f"{split}_annotations") is not None else "--data-dir"
        raise CommandError(f"annotation file {annotations} does not exist; check {flag}")
    coco = Coco(annotations, with_masks)
    if split == "val" and with_masks and coco.count_objects() > 0 and not coco.has_masks:
        if isinstance(config, TrainDataConfig):
            raise _missing_masks(annotations, "to measure mask AP on", "--val-annotations")
        coco = Coco(annotations, with_masks=False)
        distributed.print_primary(f"{annotations} has no masks, so only boxes are evaluated")
    images_flag = f"--{split}-images" if getattr(config, f"{split}_images") is not None else "--data-dir"
    distributed.on_primary(partial(check_files, coco, folder, images_flag))
    if distributed.is_primary:
        use = "training leaves them out" if split == "train" else "in COCO's metrics they count as not detected"
        for problem in coco.unusable:
            print(f"warning: {annotations}: {problem}; {use}", file=sys.stderr)
        for problem in coco.clipped if split == "train" else ():
            print(f"warning: {annotations}: {problem}; training clips them", file=sys.stderr)
    if coco.has_gaps and split == "train":
        ids = coco.category_ids
        distributed.print_primary(
            f"{annotations}: {len(ids)} categories with ids from {ids[0]} to {ids[-1]} become labels 1 to {len(ids)}; "
            "results have the original ids"
        )
    return coco, folder


def _missing_masks(annotations: Path, use: str, flag: str) -> CommandError:
    return CommandError(
        f"{annotations} has no object with a mask {use}; choose a --model without masks, such as faster_rcnn, or check "
        f"{flag}"
    )


def find_set(config: ValidationDataConfig, split: str) -> tuple[Path, Path]:
    """Returns the annotation file and the image folder of a split, `train` or `val`.

    Raises:
        CommandError: If a flag is missing.
    """
    annotations, images = getattr(config, f"{split}_annotations"), getattr(config, f"{split}_images")
    if config.data_dir is None and (annotations is None or images is None):
        missing = f"--{split}-annotations" if annotations is None else f"--{split}-images"
        given = f"--{split}-images" if annotations is None else f"--{split}-annotations"
        has_one = annotations is not None or images is not None
        raise CommandError(
            f"{given} needs {missing}"
            if has_one
            else f"no {'training' if split == 'train' else 'validation'} images; pass --data-dir, or --{split}-images "
            f"and --{split}-annotations"
        )
    root = Path(config.data_dir or "").expanduser()
    if annotations is None or images is None:
        if not root.is_dir():
            raise CommandError(
                f"--data-dir {root} is not a folder; it must contain annotations/, train{_YEAR}/ and val{_YEAR}/"
            )
    annotations = annotations or root / "annotations" / f"instances_{split}{_YEAR}.json"
    return Path(annotations).expanduser(), Path(images or root / f"{split}{_YEAR}").expanduser()


def check_files(coco: Coco, folder: Path, flag: str) -> None:
    """Checks that all images of an annotation file exist.

    Args:
        coco: The annotations.
        folder: Folder of the images.
        flag: Flag that names the folder.

    Raises:
        CommandError: If some are missing.
    """
    if not folder.is_dir():
        raise CommandError(f"image folder {folder} is not a folder; check {flag}")
    listed: dict[str, set[str]] = {}
    missing = []
    for image in coco.images:
        parent, name = os.path.split(image.file_name)
        if parent not in listed:  # listing a folder takes far less time than asking for each file of it
            listed[parent] = _list_files(folder / parent)
        # A file system may ignore the case of names.
        if name not in listed[parent] and not os.path.isfile(folder / image.file_name):
            missing.append(image)
    if missing:
        examples = ", ".join(f"{image.file_name} (image {image.id})" for image in missing[:MOST_NAMED])
        raise CommandError(
            f"{len(missing)} of {len(coco.images)} images of {coco.path} are not in {folder}: {examples}"
            f"{', …' if len(missing) > MOST_NAMED else ''}; check {flag}"
        )


def check_sizes(config: ValidationDataConfig, images: Images, distributed: Distributed) -> None:
    """Compares the sizes of all images with the annotations.

    With --no-check-data, it does nothing. Only the headers of the files are read. Files that cannot be read are left
    out: the training reports them, and --max-bad-images decides.

    Args:
        config: The data.
        images: The training and validation sets of `open_images`.
        distributed: The processes of the run. The primary process checks.

    Raises:
        CommandError: If sizes differ.
    """
    if config.check_data:
        sources = [dataset.source for dataset in (images.train, images.val) if dataset is not None]
        distributed.on_primary(partial(_check_sizes, sources, config.workers))


def _check_sizes(sources: Sequence[CocoSource], workers: int) -> None:
    executor = ThreadPoolExecutor(max_workers=max(1, workers))  # files of a network drive arrive in parallel
    try:
        with progress_bar(sum(map(len, sources)), "image size", is_shown=True) as bar:
            for source in sources:
                wrong = []
                for problem in executor.map(source.find_wrong_size, range(len(source))):
                    if problem is not None:
                        wrong.append(problem)
                    bar.update()
                if wrong:
                    first = "; ".join(wrong[:MOST_NAMED]) + ("; …" if len(wrong) > MOST_NAMED else "")
                    raise CommandError(f"{source.coco.path}: image of another size ({len(wrong)}): {first}")
    finally:
        executor.shutdown(cancel_futures=True)  # after an interrupt


def _list_files(folder: Path) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except FileNotFoundError:
        return set()
    except OSError as error:
        raise CommandError(f"cannot read the image folder {folder}: {reason(error)}") from error


def _check_same_categories(train: Coco, val: Coco) -> None:
    """Checks that both files have the same categories.

    Raises:
        CommandError: If they differ.
    """
    ours, theirs = (set(zip(coco.category_ids, coco.names, strict=True)) for coco in (train, val))
    odd = sorted(ours ^ theirs)
    if odd:
        number, name = odd[0]
        has, lacks = (train, val) if odd[0] in ours else (val, train)
        raise CommandError(
            f"category {number} ({name!r}) is in {has.path} but not in {lacks.path}; both need the same categories"
        )

"""Image datasets: opens training and validation sets, and reads single images."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import create_dataset, resolve_input_data_config
from torch.utils.data import IterableDataset

from stvit.images import SUFFIXES, UnreadableImageError

from .cli import CommandError, OneProcessError, reason
from .config import DataConfig
from .distributed import Distributed
from .examples import ExampleDataset
from .image_folders import ImageFolder, ImageTar, TorchImageFolder
from .shards import ShardDataset, check_description, check_shards, restrict_webdataset

# Equivalent names of a split, as in timm.
_SPLITS = (("train", "training"), ("validation", "val", "valid", "eval", "evaluation"))


def resolve_data_config(settings: Mapping[str, Any], model: Any, use_test_size: bool = False) -> dict[str, Any]:
    """Returns timm's preprocessing settings for a model.

    Args:
        settings: Values of `ImageConfig` and `in_chans`. They override the model's own settings.
        model: Model whose settings replace values that are None. A model of a fixed input size decides the size.
        use_test_size: Whether to use the model's evaluation size, if it has one.

    Raises:
        CommandError: If the settings contradict the model.
    """
    try:
        config: dict[str, Any] = resolve_input_data_config(model, dict(settings), use_test_size=use_test_size)
    except ValueError as error:
        raise CommandError(f"the images do not fit the model: {reason(error)}") from error
    return config


class ImageDataset(ExampleDataset):
    """Images and class numbers of a source.

    An unreadable validation image gets class number -1, so that no metric counts it.
    """

    def example(self, image: Image.Image, target: Any) -> tuple[Any, int]:
        """Returns the transformed image and its class number."""
        return self.transform(image), target

    def unreadable(self, index: int) -> tuple[Any, int]:
        """Returns a blank image and class number -1."""
        return self._apply_transform(Image.new(self.mode, (8, 8)), -1, index)


class _ParquetImages:
    """Images and class numbers of a dataset of Hugging Face's `datasets`.

    timm's reader opens files that the dataset names without checking their type, and would wait for a pipe.
    """

    def __init__(self, reader: Any) -> None:
        """Takes over the dataset of timm's reader.

        Raises:
            ValueError: If the dataset lacks the image or the label column.
        """
        for column in (reader.image_key, reader.label_key):
            if column not in reader.dataset.column_names:
                raise ValueError(f"it has no column {column!r}")
        self.reader = reader
        self.class_to_idx: dict[str, int] = reader.class_to_idx

    def __len__(self) -> int:
        return len(self.reader.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Returns the path or the open file of an image, and its class number."""
        item = self.reader.dataset[index]
        image = item[self.reader.image_key] or {}
        if not image.get("bytes") and not image.get("path"):
            raise UnreadableImageError("empty")
        return BytesIO(image["bytes"]) if image.get("bytes") else image["path"], item[self.reader.label_key]

    def filename(self, index: int, absolute: bool = False) -> str | None:
        """Returns the file name that the dataset records for an image, or None."""
        name: str | None = (self.reader.dataset[index][self.reader.image_key] or {}).get("path")
        return name

    def paths_and_labels(self) -> Iterator[tuple[str, int]]:
        """Yields the file name of each image, or an empty text, and its class number."""
        image, label = self.reader.image_key, self.reader.label_key
        rows = self.reader.dataset.select_columns([image, label]).with_format("arrow")
        for table in rows.iter(batch_size=1000):
            columns = table.flatten()
            paths, labels = columns.column(f"{image}.path").to_pylist(), columns.column(label).to_pylist()
            yield from ((Path(path or "").name, number) for path, number in zip(paths, labels, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Opening


@dataclass
class Images:
    """The image datasets of a command.

    Attributes:
        train: Training set; None in commands that do not train.
        val: Validation set.
        class_names: Class names in the order of the class numbers; None if the dataset does not know them.
    """

    train: Any
    val: Any
    class_names: list[str] | None


def open_images(
    config: DataConfig, distributed: Distributed, *, in_chans: int = 3, seed: int = 42, is_training: bool = True
) -> Images:
    """Opens the training and validation sets.

    Args:
        config: The datasets.
        distributed: The processes that share the images.
        in_chans: Image channels, 1 or 3.
        seed: Seed of the order, the augmentation and the split of sklearn/digits.
        is_training: Whether to also open the training set.

    Raises:
        CommandError: If a set cannot be opened, or cannot train a classifier.
    """
    mode = "L" if in_chans == 1 else "RGB"
    if config.dataset == "sklearn/digits":
        train_digits, val_digits = digits(seed)
        names = [str(digit) for digit in range(10)]
        return Images(ImageDataset(train_digits, mode, seed), ImageDataset(val_digits, mode), names)
    _check_dataset(config)
    splits = [("--train-split", config.train_split, True)] if is_training else []
    splits.append(("--val-split", config.val_split, False))
    with distributed.primary_first():
        datasets = [_open_split(config, mode, seed, *split) for split in splits]
    if not config.dataset and is_training:
        _check_same_classes(config, *datasets)
    ignored = [dataset.ignored.describe(dataset.root) for dataset in datasets if hasattr(dataset, "ignored")]
    for line in dict.fromkeys(ignored):
        if line is not None:
            distributed.print_primary(line)
    class_names = _check_class_names(datasets, config.dataset or str(config.data_dir))

    samples: list[Any] = []
    for dataset, (_, _, training) in zip(datasets, splits, strict=True):
        source = getattr(dataset, "reader", dataset)
        samples.append(
            ShardDataset(source, distributed, training, seed, config.allow_shard_commands)
            if isinstance(dataset, IterableDataset)
            else ImageDataset(source, mode, seed)
        )
    return Images(samples[0] if is_training else None, samples[-1], class_names)


def _check_dataset(config: DataConfig) -> None:
    """Checks --dataset and --data-dir.

    Raises:
        CommandError: If the dataset is unknown, or the folder is missing.
    """
    if config.dataset.startswith("sklearn/"):
        raise CommandError(f"unknown dataset {config.dataset!r}; the only one of scikit-learn is 'sklearn/digits'")
    if config.dataset and not config.dataset.startswith(("torch/", "hfds/", "wds/")):
        raise CommandError(
            f"unknown dataset {config.dataset!r}; pass sklearn/digits, torch/…, hfds/… or wds/…, or remove --dataset "
            "to use the image folder --data-dir"
        )
    if config.dataset.startswith("hfds/"):
        _check_datasets_version()
    elif not config.data_dir:
        raise CommandError("no data; pass --data-dir, or --dataset sklearn/digits to try the program")
    if not config.dataset and not Path(str(config.data_dir)).is_dir():
        raise CommandError(
            f"--data-dir {config.data_dir} is not a folder; it must contain train/<class>/* and val/<class>/*"
        )


def _check_datasets_version() -> None:
    """Rejects releases of `datasets` that run code from datasets.

    Raises:
        CommandError: If the installed release runs code.
    """
    try:
        found = version("datasets")
    except PackageNotFoundError:  # timm reports it when it opens the dataset
        return
    if int(found.partition(".")[0]) < 4:
        raise CommandError(
            f"hfds/ needs datasets 4 or later, found {found}, which may run code from a dataset: "
            "pip install --upgrade datasets"
        )


def _open_split(config: DataConfig, mode: str, seed: int, flag: str, split: str, is_training: bool) -> Any:
    """Opens one split of a dataset; `flag` is the flag that names the split."""
    root: Any = config.data_dir
    is_shards = config.dataset.startswith("wds/")
    if is_shards:
        restrict_webdataset(config.allow_shard_commands)
        check_description(root, config.allow_shard_commands)
    if not config.dataset:
        return _open_folder(root, flag, split)
    try:
        if config.dataset.lower() in ("torch/image_folder", "torch/folder"):
            dataset: Any = TorchImageFolder(_find_split(root, split) or root)
        else:
            # The shard reader finds the image of a sample by these keys.
            keys: dict[str, Any] = {"input_key": ";".join(suffix[1:] for suffix in SUFFIXES)}
            dataset = create_dataset(
                config.dataset,
                root=root,
                split=split,
                is_training=is_training,
                batch_size=config.batch_size,
                seed=seed,
                input_img_mode=mode,
                download=config.dataset_download,
                **(keys if is_shards else {}),
            )
        if is_shards:
            check_shards(root, dataset.reader.split_info, config.allow_shard_commands)
        elif config.dataset.lower().startswith("hfds/"):
            dataset.reader = _ParquetImages(dataset.reader)
    except (RuntimeError, OSError, ValueError, AssertionError, ImportError, LookupError, TypeError) as error:
        why = reason(error).replace("download=True", "--dataset-download")
        raise CommandError(f"cannot open the {split} images of {config.dataset}: {why}") from error
    if hasattr(dataset, "loader"):  # torchvision's loader opens files by other rules
        dataset.loader = str
    return dataset


def _open_folder(root: str, flag: str, split: str) -> ImageFolder | ImageTar:
    """Opens a split as an archive or a folder.

    Raises:
        CommandError: If the split does not exist, is a pipe or another special file, or cannot be read.
    """
    tar = _find_split(root, split, ".tar")
    if tar is not None:
        return ImageTar(tar)
    folder = _find_split(root, split)
    if folder is not None:
        return ImageFolder(folder)
    for suffix in (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip"):
        packed = _find_split(root, split, suffix)
        if packed is not None:
            raise CommandError(
                f"{packed} is compressed, so its images cannot be read in random order; unpack it into a folder beside "
                f"it, or make it an uncompressed {packed.name.removesuffix(suffix)}.tar"
            )
    for path in _split_paths(root, split, ".tar"):
        if path.exists() and not path.is_dir():  # a pipe or a device
            raise CommandError(f"{path} is not a regular file; it must be an uncompressed tar file of {split} images")
    for path in _split_paths(root, split):
        if path.exists():
            raise CommandError(f"{path} is not a folder; it must contain <class>/*")
    raise CommandError(
        f"--data-dir {root} has no folder for {flag} {split}; it must contain train/<class>/* and val/<class>/*"
    )


def _find_split(root: str, split: str, suffix: str = "") -> Path | None:
    """Returns the folder or archive of a split; None if it does not exist."""
    paths = _split_paths(root, split, suffix)
    return next((path for path in paths if (path.is_file() if suffix else path.is_dir())), None)


def _split_paths(root: str, split: str, suffix: str = "") -> list[Path]:
    """Returns the possible paths of a split."""
    others = next((names for names in _SPLITS if split in names), ())
    return [Path(root) / f"{name}{suffix}" for name in dict.fromkeys([split, *others])]


def digits(seed: int) -> list[list[tuple[Image.Image, int]]]:
    """Returns scikit-learn's 1,797 handwritten digits, split 4 to 1 by the seed.

    Returns:
        Training and validation set, each a list of pairs of an 8x8 gray image and its class number. The classes are
        split in the same proportion.

    Raises:
        CommandError: If scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise CommandError("--dataset sklearn/digits needs scikit-learn: pip install scikit-learn") from error
    raw = load_digits()
    # Gray levels are from 0 to 16.
    samples = [
        (Image.fromarray((pixels * (255 / 16)).astype("uint8")), int(target))
        for pixels, target in zip(raw.images, raw.target, strict=True)
    ]
    return train_test_split(samples, test_size=0.2, random_state=seed, stratify=raw.target)


# ---------------------------------------------------------------------------------------------------------------------
# Classes


def _check_same_classes(config: DataConfig, train: ImageFolder | ImageTar, val: ImageFolder | ImageTar) -> None:
    """Checks that both splits have the same class folders.

    Raises:
        CommandError: If only one of them has a class.
    """
    odd = sorted(set(train.class_to_idx) ^ set(val.class_to_idx))
    if odd:
        has, lacks = config.train_split, config.val_split
        if odd[0] not in train.class_to_idx:
            has, lacks = lacks, has
        raise CommandError(
            f"class {odd[0]!r} is in the {has} images but not in the {lacks} images of {config.data_dir}; both need "
            "the same class folders"
        )


def _check_class_names(datasets: Sequence[Any], where: str) -> list[str] | None:
    """Returns the class names of the datasets; None if they have none.

    Raises:
        CommandError: If there are fewer than two, if the datasets have different ones, or if a name is not valid UTF-8
            (no result file could contain it).
    """
    names = _class_names(datasets[0])
    if names is None:
        return None
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise CommandError(
                f"class {name!a} of {where}: the name is not valid UTF-8; rename the class folder in the training and "
                "validation images"
            ) from None
    if len(names) < 2:
        raise CommandError(f"the images have only one class, {names[0]!r}; a classifier needs at least two")
    if _class_names(datasets[-1]) not in (None, names):
        raise CommandError("the training and validation images have different classes; both need the same")
    return names


def _class_names(dataset: Any) -> list[str] | None:
    class_to_idx = getattr(getattr(dataset, "reader", dataset), "class_to_idx", None)
    if class_to_idx:
        return [str(name) for name in sorted(class_to_idx, key=class_to_idx.__getitem__)]
    names = getattr(dataset, "classes", None)
    return [str(name) for name in names] if names else None


def check_targets(target: torch.Tensor, num_classes: int, split: str) -> None:
    """Checks that the model has a class for each class number (B,).

    -1 stands for an unreadable image.

    Raises:
        OneProcessError: If a number is out of range.
    """
    low, high = int(target.min()), int(target.max())
    if low < -1 or high >= num_classes:
        bad = low if low < -1 else high
        raise OneProcessError(
            f"a {split} image has class number {bad}, but the model has {num_classes} classes; pass --num-classes"
        )

"""Images: where they come from, in which order, how they are augmented, and what becomes of those that cannot be read.

What a training sample looks like depends on the seed, the epoch and its place in the epoch alone: not on the number of
processes and workers, nor on where a run was interrupted.
"""

import argparse
import copy
import json
import os
import random
import stat
import string
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from PIL.ImageFile import ImageFile
from timm.data import auto_augment, create_dataset, create_transform, resolve_input_data_config
from timm.data.loader import PrefetchLoader, fast_collate
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from stvit.images import READERS, SUFFIXES, UnreadableImageError, convert_image, open_image
from stvit.tools.common.checkpoint import cut_torn_line
from stvit.tools.common.cli import (
    CommandError,
    CommandLineSwitch,
    OneProcessError,
    Switch,
    above_zero,
    count,
    positive,
    read_utf8,
    reason,
)
from stvit.tools.common.image_folders import ImageFolder, ImageTar, TorchImageFolder
from stvit.tools.common.processes import World, obey_parent_alone

INTERPOLATIONS = ["bicubic", "bilinear", "lanczos", "nearest", "box", "hamming"]
# Largest image. Its decoding takes 3 to 12 bytes of memory for each pixel, in each of the processes that load images.
MAX_PIXELS = 1 << 27
# Unreadable images in a row after which the fault is not the images'.
MOST_BAD_IN_A_ROW = 10
# Names of a split that stand for each other, as in timm.
_SPLITS = (("train", "training"), ("validation", "val", "valid", "eval", "evaluation"))


def add_data_arguments(group: Any) -> None:
    """The flags that say which images to take, alike in every command."""
    group.add_argument(
        "--data-dir", metavar="DIR", help="folder with train/<class>/* and val/<class>/*, or the same in tar"
    )
    group.add_argument("--dataset", default="", metavar="NAME", help="sklearn/digits, torch/…, hfds/… or wds/…")
    group.add_argument("--val-split", default="validation", metavar="NAME", help="split to evaluate on")
    group.add_argument("--dataset-download", action=Switch, help="download a torch/… set into --data-dir")
    group.add_argument("--workers", "-j", type=count, default=4, metavar="N", help="processes that load images")
    group.add_argument(
        "--max-bad-images", type=count, default=0, metavar="N", help="unreadable images to skip before stopping"
    )
    group.add_argument(
        "--allow-shard-commands",
        action=CommandLineSwitch,
        help="run programs that addresses of wds/ shards ask for: pipe: any command, http: curl, gs: gsutil, …",
    )


def add_image_arguments(group: Any) -> None:
    """The flags that say how the model wants its images, alike in every command."""
    group.add_argument("--img-size", type=positive, metavar="N", help="image height and width (default: the model's)")
    group.add_argument("--mean", type=float, nargs="+", metavar="X", help="mean of the images' channels, from 0 to 1")
    group.add_argument("--std", type=above_zero, nargs="+", metavar="X", help="deviation of the images' channels")
    group.add_argument("--interpolation", choices=INTERPOLATIONS, help="resizing (default: the model's)")
    group.add_argument("--crop-pct", type=float, metavar="X", help="share of the resized image that evaluation crops")


def resolve_data_config(settings: Mapping[str, Any], model: Any, use_test_size: bool = False) -> dict[str, Any]:
    """Returns timm's preprocessing settings for a model.

    Args:
        settings: Flags of `add_image_arguments` and `in_chans`; they override the model's own settings.
        model: Model whose settings fill in flags that are None. A model of a fixed input size decides its size.
        use_test_size: Whether to use the model's evaluation size, if it has one.

    Raises:
        CommandError: If the flags contradict the model.
    """
    try:
        config: dict[str, Any] = resolve_input_data_config(model, dict(settings), use_test_size=use_test_size)
    except ValueError as error:
        raise CommandError(f"the images do not fit the model: {reason(error)}") from error
    return config


# ---------------------------------------------------------------------------------------------------------------------
# Samples


@dataclass
class BadImages:
    """The images that could not be read, each counted once, by all processes of a machine and over resumes.

    Attributes:
        limit: How many may be skipped.
        log: JSON lines of their names and what was wrong, the record of the count. None where nothing may be skipped.
    """

    limit: int = 0
    log: Path | None = None

    def add(self, name: str, why: str) -> None:
        """Counts an image.

        Raises:
            OneProcessError: If it is one more than may be skipped.
        """
        if self.limit == 0 or self.log is None:
            raise OneProcessError(
                f"cannot read image {name}: {why}; repair it or remove it, or let some be skipped with --max-bad-images"
            )
        with FileLock(f"{self.log}.lock"):
            known = self.names()
            if name in known:
                return
            if len(known) >= self.limit:
                raise OneProcessError(
                    f"cannot read image {name}: {why}; {len(known)} others were skipped (see {self.log}), more than "
                    f"--max-bad-images {self.limit} allows"
                )
            cut_torn_line(self.log)
            with self.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"image": name, "reason": why}) + "\n")

    def names(self) -> set[str]:
        """Returns the images skipped so far.

        Raises:
            OneProcessError: If the log is damaged.
        """
        if self.log is None or not self.log.exists():
            return set()
        try:
            whole_lines = read_utf8(self.log).rpartition("\n")[0].splitlines()
            return {str(json.loads(line)["image"]) for line in whole_lines}
        except (ValueError, LookupError, TypeError) as error:
            raise OneProcessError(
                f"{self.log} is damaged ({reason(error)}): repair it, or remove it to count the images anew"
            ) from error


@contextmanager
def _random_state(*key: int) -> Iterator[None]:
    """Makes all random numbers depend on the key, and leaves the generators as they were."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    low, high = (int(word) for word in np.random.SeedSequence(key).generate_state(2))
    try:  # from here on: a signal may end the block anywhere, and the run is saved with the states as they were
        random.seed(low)
        np.random.seed(low)
        # Not torch.manual_seed, which would reach for CUDA, out of a worker process too.
        torch.default_generator.manual_seed(high << 32 | low)
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class ImageDataset(Dataset):
    """Images and class numbers of a source, opened by the rules of `stvit.images`.

    Of an unreadable training image the next one takes the place; an unreadable validation image gets the class number
    -1, by which it is left out of every count. `transform` is set by the loaders' makers.

    Args:
        source: Gives an image of PIL, or the path or open file of one, and its class number.
        mode: Pillow's mode of the images, L or RGB.
        seed: Of the augmentation.
    """

    def __init__(self, source: Any, mode: str, seed: int = 0) -> None:
        self.source = source
        self.mode = mode
        self.seed = seed
        self.transform: Any = None
        self.bad_images = BadImages()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: int | tuple[int, int, int]) -> tuple[Any, int]:
        """The image of an index, or that of (epoch, place in the epoch, index), augmented."""
        if isinstance(key, tuple):
            epoch, place, index = key
            for offset in range(MOST_BAD_IN_A_ROW):
                image, target = self.read((index + offset) % len(self))
                if image is not None:
                    with _random_state(self.seed, epoch, place):
                        return self._transformed(image, index + offset), target
            raise OneProcessError(
                f"{MOST_BAD_IN_A_ROW} images in a row cannot be read, up to {self.name((index + offset) % len(self))}: "
                "look at where they are kept"
            )
        image, target = self.read(key)
        blank = Image.new(self.mode, (8, 8))
        return self._transformed(image or blank, key), -1 if image is None else target

    def read(self, index: int) -> tuple[Image.Image | None, int]:
        """The image and its class number; None for the image if it cannot be read and may be skipped."""
        given: Any = None
        try:
            given, target = self.source[index]
            if (
                isinstance(given, ImageFile) and type(given) not in READERS.values()
            ):  # opened elsewhere, not yet decoded
                raise UnreadableImageError(f"not an image of a supported format ({', '.join(READERS)})")
            if isinstance(given, Image.Image):
                return convert_image(given, self.mode), target
            return open_image(given, self.mode, MAX_PIXELS), target
        except CommandError:  # not of this image alone
            raise
        except Exception as error:  # of a damaged set nearly everything
            self.bad_images.add(given if isinstance(given, str) else self.name(index), _problem(error))
        return None, -1

    def _transformed(self, image: Image.Image, index: int) -> Any:
        try:
            return self.transform(image)
        except Exception as error:
            raise OneProcessError(
                f"cannot transform image {self.name(index % len(self))}: {reason(error)}; look at --aa and the flags "
                "beside it"
            ) from error

    def name(self, index: int) -> str:
        """The image's path, or its number where it has none."""
        name = self.source.filename(index, absolute=True) if hasattr(self.source, "filename") else None
        return name or f"number {index}"


class StreamSamples(IterableDataset):
    """Images and class numbers of a reader of shards, which only gives them in turn.

    Args:
        reader: timm's reader of a wds/ set.
        world: In training each process reads its own shards. In evaluation each reads all, and keeps its share of the
            images: shards are rarely as many as to be dealt out evenly, and so each image counts once.
        is_training: Whether the images are shuffled and augmented.
        seed: Of both.
        allow_commands: Whether addresses of shards may run programs.
    """

    def __init__(self, reader: Any, world: World, is_training: bool, seed: int, allow_commands: bool = False) -> None:
        self.reader = reader
        self.rank, self.world_size = world.rank, world.size
        self.is_training = is_training
        self.seed = seed
        self.allow_commands = allow_commands
        self.transform: Any = None
        self.bad_images = BadImages()
        reader.dist_rank, reader.dist_num_replicas = (world.rank, world.size) if is_training else (0, 1)

    def __len__(self) -> int:
        return len(self.reader)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the shards."""
        self.reader.set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        reader = copy.copy(self.reader)  # unopened, so that each epoch's order depends on the epoch alone
        epoch = reader.epoch_count.value
        worker = get_worker_info()
        worker_id = 0 if worker is None else worker.id
        if worker is None:
            reader.worker_seed = self.seed + epoch
        _watch_shards(self.bad_images)
        _prepare_webdataset(self.allow_commands)
        for place, (image, target) in enumerate(reader):
            if self.is_training:
                with _random_state(self.seed, epoch, self.rank, worker_id, place):
                    yield self.transform(image), target
            elif place % self.world_size == self.rank:
                yield self.transform(image), target


def _problem(error: Exception) -> str:
    """The reason why an image cannot be read, without its name."""
    return error.problem if isinstance(error, UnreadableImageError) else reason(error)


def _watch_shards(bad_images: BadImages) -> None:
    """Makes timm's reader of shards open images by the rules of `stvit.images` and count those that it cannot read.

    By itself the reader skips those with a warning.
    """
    from timm.data.readers import reader_wds

    plain = getattr(reader_wds._decode, "plain", reader_wds._decode)

    def decode(sample: dict[str, Any], **kwargs: Any) -> dict[str, Any] | None:
        # macOS adds a file "._1.jpg" for each "1.jpg". The key ends before the first dot, so it has only the folder.
        if str(sample.get("__key__")).endswith("/"):
            return None
        try:
            return plain(sample, **kwargs)
        except Exception as error:
            bad_images.add(f"{sample.get('__key__')} of {sample.get('__url__')}", _problem(error))
            return None

    def stop(error: Exception) -> bool:
        if isinstance(error, CommandError):
            raise error
        raise OneProcessError(f"cannot read a shard: {reason(error)}; fetch it again") from error

    decode.plain = plain  # type: ignore[attr-defined]
    reader_wds._decode = decode  # type: ignore[assignment]
    # The reader calls Image.open, then converts the image to its mode. RGB from `open_image` becomes the same L there.
    reader_wds.Image = SimpleNamespace(open=partial(open_image, max_pixels=MAX_PIXELS))  # type: ignore[assignment]
    reader_wds.log_and_continue = stop


_webdataset_schemes: dict[str, Any] = {}


def _prepare_webdataset(allow_commands: bool) -> None:
    """Makes webdataset open files on drives, and run no program to open a shard unless that is allowed.

    webdataset takes the letter of a drive for the scheme of a URL. It opens every scheme but file: by a program.
    """
    try:
        import webdataset
    except ImportError:  # timm says so when it opens the set
        return
    schemes = webdataset.gopen_schemes
    if not _webdataset_schemes:
        _webdataset_schemes.update(schemes)
    schemes.update(_webdataset_schemes if allow_commands else dict.fromkeys(_webdataset_schemes, _refuse_scheme))
    schemes.update(dict.fromkeys(string.ascii_lowercase, _open_local))


def _open_local(path: str, *_: Any, **__: Any) -> Any:
    return Path(path).open("rb")


def _refuse_scheme(url: str, *_: Any, **__: Any) -> Any:
    raise CommandError(_scheme_problem(url))


def _scheme_problem(url: str) -> str:
    return (
        f"wds/ address {url}: webdataset runs a program to read it (for pipe: the command in the address, for others "
        "curl, gsutil or ais), and whoever wrote a recipe or an _info.json could choose it; if you trust this address, "
        "pass --allow-shard-commands on the command line, or copy the shards to a folder"
    )


def _local_path(url: str) -> Path | None:
    """Returns the path that a shard's address stands for; None if webdataset opens it by a program."""
    parts = urlparse(url)
    if parts.scheme == "file":
        return Path(url2pathname(parts.path))
    return Path(url) if len(parts.scheme) <= 1 and url != "-" else None


def _check_shard_urls(urls: Sequence[str], allow_commands: bool, is_required: bool = True) -> None:
    """Checks the addresses of shards or their description before any is opened.

    Raises:
        CommandError: If one would run a program although that is not allowed, or is not a regular file.
    """
    for url in urls:
        path = _local_path(url)
        if path is None:
            if not allow_commands:
                raise CommandError(_scheme_problem(url))
        elif not path.exists():
            if is_required:
                raise CommandError(f"shard {path}, which _info.json lists, does not exist")
        elif not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait forever
            raise CommandError(f"{path} is not a regular file")


def _check_shards(root: str, info: Any, allow_commands: bool) -> None:
    """Checks what timm took from the description of a wds/ set.

    Raises:
        CommandError: If a value is of the wrong type, or a shard cannot be opened.
    """
    has_names = all(isinstance(name, str) for name in info.filenames)
    numbers = [info.num_samples, *info.shard_lengths]
    if not has_names or not all(type(number) is int and number >= 0 for number in numbers):
        raise CommandError(
            f"the description of the shards in {root} is wrong: filenames must be texts, num_samples and shard_lengths "
            "whole numbers"
        )
    _check_shard_urls([os.path.join(root, name) for name in info.filenames], allow_commands)


def _check_datasets_version() -> None:
    """Refuses releases of `datasets` that run programs which a set contains.

    Raises:
        CommandError: If the installed release is such a one.
    """
    try:
        found = version("datasets")
    except PackageNotFoundError:  # timm says so when it opens the set
        return
    if int(found.partition(".")[0]) < 4:
        raise CommandError(
            f"hfds/ needs datasets 4 or later, found {found}, which may run code that a set contains: "
            "pip install --upgrade datasets"
        )


class _ParquetImages:
    """Images and class numbers of a set that Hugging Face's `datasets` reads.

    timm's reader opens a file that the set names without a look at its kind: a pipe would be waited for.

    Args:
        reader: timm's reader of an hfds/ set.
    """

    def __init__(self, reader: Any) -> None:
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
        """Returns the name of an image as the set records it; None if it records none."""
        name: str | None = (self.reader.dataset[index][self.reader.image_key] or {}).get("path")
        return name

    def paths_and_labels(self) -> Iterator[tuple[str, int]]:
        """Yields the file name of each image without its folder, empty if there is none, and its class number."""
        image, label = self.reader.image_key, self.reader.label_key
        rows = self.reader.dataset.select_columns([image, label]).with_format("arrow")
        for table in rows.iter(batch_size=1000):
            columns = table.flatten()
            paths, labels = columns.column(f"{image}.path").to_pylist(), columns.column(label).to_pylist()
            yield from ((Path(path or "").name, number) for path, number in zip(paths, labels, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Sets


@dataclass
class Images:
    """The images of a run.

    Attributes:
        train: To train on, None if they were not asked for.
        val: To evaluate on.
        class_names: In the order of their numbers, None where the set does not know them.
    """

    train: Any
    val: Any
    class_names: list[str] | None


def open_images(args: argparse.Namespace, world: World, is_training: bool = True) -> Images:
    """The images that the flags name.

    Args:
        args: The data flags, `seed`, `in_chans`, `batch_size`, and for training `train_split`.
        world: The processes that share them.
        is_training: Whether training images are wanted beside those of the validation.

    Raises:
        CommandError: If they cannot be opened, or are not what a classifier can learn from.
    """
    mode = "L" if args.in_chans == 1 else "RGB"
    if args.dataset == "sklearn/digits":
        train_digits, val_digits = digits(args.seed)
        return Images(
            ImageDataset(train_digits, mode, args.seed),
            ImageDataset(val_digits, mode),
            [str(digit) for digit in range(10)],
        )
    if args.dataset.startswith("sklearn/"):
        raise CommandError(f"unknown dataset {args.dataset!r}: of scikit-learn's there is 'sklearn/digits'")
    if args.dataset and not args.dataset.startswith(("torch/", "hfds/", "wds/")):
        raise CommandError(
            f"unknown dataset {args.dataset!r}: give sklearn/digits, torch/…, hfds/… or wds/…, or leave --dataset out "
            "for the image folder --data-dir"
        )
    if args.dataset.startswith("hfds/"):
        _check_datasets_version()
    elif not args.data_dir:
        raise CommandError("no data: give --data-dir, or --dataset sklearn/digits to try the program out")
    if not args.dataset and not Path(args.data_dir).is_dir():
        raise CommandError(
            f"--data-dir {args.data_dir} is not a folder; it must hold train/<class>/* and val/<class>/*"
        )

    splits = [("--train-split", args.train_split, True)] if is_training else []
    splits.append(("--val-split", args.val_split, False))
    with world.first_goes_first():
        datasets = [_open_split(args, mode, *split) for split in splits]
    if not args.dataset and is_training:
        _check_classes(args, *datasets)
    ignored = [dataset.ignored.describe(dataset.root) for dataset in datasets if hasattr(dataset, "ignored")]
    for line in dict.fromkeys(ignored):
        if line is not None:
            world.say(line)

    names = _class_names(datasets[0])
    _check_names(names or [], args.dataset or args.data_dir)
    if names is not None and len(names) < 2:
        raise CommandError(f"the images have one class alone, {names[0]!r}: a classifier needs two or more")
    if names is not None and _class_names(datasets[-1]) not in (None, names):
        raise CommandError("the training and the validation images do not have the same classes")
    samples = []
    for dataset, (_, _, training) in zip(datasets, splits, strict=True):
        is_stream = isinstance(dataset, IterableDataset)
        source = getattr(dataset, "reader", dataset)
        samples.append(
            StreamSamples(source, world, training, args.seed, args.allow_shard_commands)
            if is_stream
            else ImageDataset(source, mode, args.seed)
        )
    return Images(samples[0] if is_training else None, samples[-1], names)


def _open_split(args: argparse.Namespace, mode: str, flag: str, split: str, is_training: bool) -> Any:
    """Opens one split of the images; `flag` is the one that names it."""
    is_shards = args.dataset.startswith("wds/")
    if is_shards:
        _prepare_webdataset(args.allow_shard_commands)
        descriptions = [os.path.join(args.data_dir, name) for name in ("_info.json", "info.json")]
        _check_shard_urls(descriptions, args.allow_shard_commands, is_required=False)
    if not args.dataset:
        return _open_folder(args, flag, split)
    try:
        if args.dataset.lower() in ("torch/image_folder", "torch/folder"):
            dataset: Any = TorchImageFolder(_find_split(args.data_dir, split) or args.data_dir)
        else:
            # The reader of shards knows the images of a sample by these keys.
            keys: dict[str, Any] = {"input_key": ";".join(suffix[1:] for suffix in SUFFIXES)}
            dataset = create_dataset(
                args.dataset,
                root=args.data_dir,
                split=split,
                is_training=is_training,
                batch_size=args.batch_size,
                seed=args.seed,
                input_img_mode=mode,
                download=args.dataset_download,
                **(keys if is_shards else {}),
            )
        if is_shards:
            _check_shards(args.data_dir, dataset.reader.split_info, args.allow_shard_commands)
        elif args.dataset.lower().startswith("hfds/"):
            dataset.reader = _ParquetImages(dataset.reader)
    except (RuntimeError, OSError, ValueError, AssertionError, ImportError, LookupError, TypeError) as error:
        where = args.dataset or args.data_dir
        why = reason(error).replace("download=True", "--dataset-download")
        raise CommandError(f"cannot open the {split} images of {where}: {why}") from error
    if hasattr(dataset, "loader"):  # torchvision's: it opens files by other rules
        dataset.loader = str
    return dataset


def _open_folder(args: argparse.Namespace, flag: str, split: str) -> ImageFolder | ImageTar:
    tar = _find_split(args.data_dir, split, ".tar")
    if tar is not None:
        return ImageTar(tar)
    folder = _find_split(args.data_dir, split)
    if folder is not None:
        return ImageFolder(folder)
    for suffix in (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip"):
        packed = _find_split(args.data_dir, split, suffix)
        if packed is not None:
            raise CommandError(
                f"{packed} is compressed, and its images cannot be read in any order; unpack it into a folder beside "
                f"it, or make it an uncompressed {packed.name.removesuffix(suffix)}.tar"
            )
    raise CommandError(
        f"--data-dir {args.data_dir} has no folder for {flag} {split}; it must hold train/<class>/* and val/<class>/*"
    )


def _find_split(root: str, split: str, suffix: str = "") -> Path | None:
    """Returns the folder of a split, or its archive with this suffix. Returns None if it does not exist."""
    others = next((names for names in _SPLITS if split in names), ())
    paths = [Path(root) / f"{name}{suffix}" for name in dict.fromkeys([split, *others])]
    return next((path for path in paths if (path.is_file() if suffix else path.is_dir())), None)


def digits(seed: int) -> list[list[tuple[Image.Image, int]]]:
    """scikit-learn's 1,797 handwritten digits, 8x8 gray, split 4 to 1 by the seed, equally in each class."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise CommandError("--dataset sklearn/digits needs scikit-learn: pip install scikit-learn") from error
    raw = load_digits()
    # The gray levels are 0 to 16, more ink is higher.
    samples = [
        (Image.fromarray((pixels * (255 / 16)).astype("uint8")), int(target))
        for pixels, target in zip(raw.images, raw.target, strict=True)
    ]
    return train_test_split(samples, test_size=0.2, random_state=seed, stratify=raw.target)


def _check_classes(args: argparse.Namespace, train: ImageFolder | ImageTar, val: ImageFolder | ImageTar) -> None:
    """Refuses a class that only one of the two splits has."""
    odd = sorted(set(train.class_to_idx) ^ set(val.class_to_idx))
    if odd:
        has, lacks = args.train_split, args.val_split
        if odd[0] not in train.class_to_idx:
            has, lacks = lacks, has
        raise CommandError(
            f"class {odd[0]!r} is in the {has} images but not in the {lacks} images of {args.data_dir}: both need "
            "the same class folders"
        )


def _class_names(dataset: Any) -> list[str] | None:
    class_to_idx = getattr(getattr(dataset, "reader", dataset), "class_to_idx", None)
    if class_to_idx:
        return [str(name) for name in sorted(class_to_idx, key=class_to_idx.__getitem__)]
    names = getattr(dataset, "classes", None)
    return [str(name) for name in names] if names else None


def _check_names(names: Sequence[str], where: str) -> None:
    """Refuses class names that are not valid text: no file of the results could contain them.

    Raises:
        CommandError: If a name is not valid UTF-8.
    """
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise CommandError(
                f"class {name!a} of {where}: its name is not valid UTF-8, so that no result could contain it; "
                "rename the class folder in the training and the validation images"
            ) from None


def check_targets(target: torch.Tensor, num_classes: int, what: str) -> None:
    """Refuses class numbers that the model does not have; -1 is nobody's."""
    low, high = int(target.min()), int(target.max())
    if low < -1 or high >= num_classes:
        bad = low if low < -1 else high
        raise OneProcessError(f"a {what} image has class number {bad}, the model has {num_classes}: set --num-classes")


# ---------------------------------------------------------------------------------------------------------------------
# Batches


class ResumableBatchSampler(Sampler[list[tuple[int, int, int]]]):
    """The batches of one process, as keys of `ImageDataset`.

    Each epoch's order is drawn from the seed and the epoch, and dealt out to the steps and within a step to the
    processes: the images of an update are the same however many processes and steps share them. What does not make a
    whole update is left over.

    Args:
        length: Number of images.
        batch_size: Images of a step of one process.
        world: The processes that share each step.
        accum_steps: Steps of an update.
        repeats: How often an image stands in a row, augmented anew each time (repeated augmentation, Hoffer et al.
            2020). The epoch does not become longer: it has fewer different images.
        seed: Of the order.
    """

    def __init__(
        self, length: int, batch_size: int, world: World, accum_steps: int = 1, repeats: int = 1, seed: int = 0
    ) -> None:
        self.length = length
        self.batch_size = batch_size
        self.rank, self.world_size = world.rank, world.size
        self.repeats = repeats
        self.seed = seed
        self.steps = length // (batch_size * world.size * accum_steps) * accum_steps
        self.epoch = 0
        self.first_step = 0

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        generator = torch.Generator().manual_seed(
            int(np.random.SeedSequence([self.seed, self.epoch]).generate_state(1)[0])
        )
        order = torch.randperm(self.length, generator=generator)
        order = order.repeat_interleave(self.repeats)[: self.length]
        size = self.batch_size * self.world_size
        for step in range(self.first_step, self.steps):
            places = range(step * size + self.rank, (step + 1) * size, self.world_size)
            yield [(self.epoch, place, int(order[place])) for place in places]


class TrainLoader:
    """Augmented training batches on the device, from any step of any epoch on.

    Args:
        args: The flags of data and augmentation, `batch_size`, `grad_accum_steps`, `aug_repeats`, `seed`.
        images: What `open_images` gave for training.
        data_config: timm's `input_size`, `mean`, `std` and `interpolation`.
        world: The processes that share each step.
        dtype: Of the images on the device.
    """

    def __init__(
        self, args: argparse.Namespace, images: Any, data_config: dict[str, Any], world: World, dtype: torch.dtype
    ) -> None:
        images.transform = _create_transform(args, data_config, is_training=True)
        self.images = images
        self.seed = args.seed
        self.is_stream = isinstance(images, IterableDataset)
        self.batches: ResumableBatchSampler | None = None
        options: dict[str, Any] = {"batch_size": args.batch_size, "drop_last": True}
        if self.is_stream:
            images.reader.set_loader_cfg(num_workers=args.workers)
        else:
            update = args.batch_size * world.size * args.grad_accum_steps
            if len(images) < update:
                raise CommandError(
                    f"an update takes {update} images (--batch-size {args.batch_size}"
                    + (f" x {world.size} processes" if world.size > 1 else "")
                    + (f" x --grad-accum-steps {args.grad_accum_steps}" if args.grad_accum_steps > 1 else "")
                    + f"), more than the {len(images)} training images: lower --batch-size"
                )
            self.batches = ResumableBatchSampler(
                len(images), args.batch_size, world, args.grad_accum_steps, args.aug_repeats, args.seed
            )
            options = {"batch_sampler": self.batches}
        # Workers that read shards are new in each epoch: what they shuffle with must depend on the epoch alone.
        self.generator = torch.Generator()
        self.loader = _create_loader(
            args.workers, images, data_config, world.device, dtype, not self.is_stream, self.generator, **options
        )
        self.steps = len(self.loader) // args.grad_accum_steps * args.grad_accum_steps

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The batches of an epoch: images (B, C, H, W), class numbers (B,)."""
        self.generator.manual_seed(self.seed + epoch)
        if self.batches is not None:
            self.batches.epoch, self.batches.first_step = epoch, first_step
            yield from self.loader
            return
        self.images.set_epoch(epoch)
        for step, batch in enumerate(self.loader):
            if step >= self.steps:
                break
            if step >= first_step:  # a stream has no other way to its middle
                yield batch


def create_val_loader(
    args: argparse.Namespace, images: Any, data_config: dict[str, Any], world: World, dtype: torch.dtype
) -> Any:
    """This process's share of the validation images, in order, on the device; the shares may differ in size by one."""
    images.transform = _create_transform(args, data_config, is_training=False)
    batch_size = getattr(args, "validation_batch_size", None) or args.batch_size
    options: dict[str, Any] = {"batch_size": batch_size}
    if isinstance(images, StreamSamples):
        images.reader.set_loader_cfg(num_workers=args.workers)
    else:
        options["sampler"] = range(world.rank, len(images), world.size)
    return _create_loader(args.workers, images, data_config, world.device, dtype, True, torch.Generator(), **options)


def _create_loader(
    workers: int,
    images: Any,
    data_config: dict[str, Any],
    device: torch.device,
    dtype: torch.dtype,
    keep_workers: bool,
    generator: torch.Generator,
    **options: Any,
) -> Any:
    loader = DataLoader(
        images,
        num_workers=workers,
        collate_fn=fast_collate,
        pin_memory=device.type == "cuda",
        persistent_workers=keep_workers and workers > 0,
        worker_init_fn=obey_parent_alone,
        generator=generator,  # its own: what it draws must not move the random state of the training
        **options,
    )
    return PrefetchLoader(
        loader,
        mean=data_config["mean"],
        std=data_config["std"],
        channels=data_config["input_size"][0],
        device=device,
        img_dtype=dtype,
    )


def _posterize(image: Image.Image, bits: int, **kwargs: Any) -> Image.Image:
    """timm's, which asks for 0 bits at full strength, and Pillow from version 13 on for at least 1."""
    return auto_augment.posterize(image, max(1, bits), **kwargs)


def _create_transform(args: argparse.Namespace, data_config: dict[str, Any], is_training: bool) -> Any:
    for policy in ("Posterize", "PosterizeIncreasing", "PosterizeOriginal"):
        auto_augment.NAME_TO_OP[policy] = _posterize
    options: dict[str, Any] = {key: data_config[key] for key in ("interpolation", "crop_pct", "crop_mode")}
    if is_training:
        options = {
            "no_aug": args.no_aug,
            "scale": args.scale,
            "ratio": args.ratio,
            "hflip": args.hflip,
            "vflip": args.vflip,
            "color_jitter": args.color_jitter,
            "auto_augment": args.aa,
            "interpolation": data_config["interpolation"] if args.no_aug else args.train_interpolation,
        }
    try:
        return create_transform(
            data_config["input_size"],
            is_training=is_training,
            mean=data_config["mean"],
            std=data_config["std"],
            use_prefetcher=True,  # bytes to the device, which turns them into numbers
            **options,
        )
    except (ValueError, AssertionError, KeyError, TypeError) as error:
        raise CommandError(f"cannot set up the images: {reason(error)}") from error

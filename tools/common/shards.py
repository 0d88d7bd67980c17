"""WebDataset shards (wds/), opened without running programs."""

import copy
import os
import stat
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

from torch.utils.data import IterableDataset, get_worker_info

from stvit.images import open_image

from . import timm_patches, webdataset_patches
from .bad_images import MAX_PIXELS, BadImages, describe_problem
from .cli import CommandError, OneProcessError, reason
from .distributed import Distributed
from .random_state import seeded_random


class ShardDataset(IterableDataset):
    """Images and class numbers of shards, which can only be read in sequence.

    In training each process reads its own shards. In evaluation each process reads all shards and keeps its share of
    the images: there are rarely enough shards to distribute them evenly, and each image must count once.

    Attributes:
        transform: Transform of the images, set by the loader.
        bad_images: Records images that cannot be read.
    """

    def __init__(
        self, reader: Any, distributed: Distributed, is_training: bool, seed: int, allow_commands: bool = False
    ) -> None:
        """Assigns shards to this process.

        Args:
            reader: timm's reader of a wds/ dataset.
            distributed: The processes that share the images.
            is_training: Whether the images are shuffled and augmented.
            seed: Seed of the order and the augmentation.
            allow_commands: Whether addresses of shards may run programs.
        """
        self.reader = reader
        self.rank, self.world_size = distributed.rank, distributed.size
        self.is_training = is_training
        self.seed = seed
        self.allow_commands = allow_commands
        self.transform: Any = None
        self.bad_images = BadImages()
        shares = (distributed.rank, distributed.size) if is_training else (0, 1)
        reader.dist_rank, reader.dist_num_replicas = shares

    def __len__(self) -> int:
        return len(self.reader)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the shards."""
        self.reader.set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        reader = copy.copy(self.reader)  # not opened yet, so that the order depends only on the epoch
        epoch = reader.epoch_count.value
        worker = get_worker_info()
        worker_id = 0 if worker is None else worker.id
        if worker is None:
            reader.worker_seed = self.seed + epoch
        _patch_reader(self.bad_images)
        restrict_webdataset(self.allow_commands)
        for place, (image, target) in enumerate(reader):
            if self.is_training:
                with seeded_random(self.seed, epoch, self.rank, worker_id, place):
                    yield self.transform(image), target
            elif place % self.world_size == self.rank:
                yield self.transform(image), target


def _patch_reader(bad_images: BadImages) -> None:
    """Makes timm's shard reader open images with `stvit.images`.

    It records images that it cannot read.
    """

    def skip_sample(sample: dict[str, Any], error: Exception) -> None:
        bad_images.add(f"{sample.get('__key__')} of {sample.get('__url__')}", describe_problem(error))

    def stop(error: Exception) -> bool:
        if isinstance(error, CommandError):
            raise error
        raise OneProcessError(f"cannot read a shard: {reason(error)}; download it again") from error

    timm_patches.patch_shard_reader(partial(open_image, max_pixels=MAX_PIXELS), skip_sample, stop)


def restrict_webdataset(allow_commands: bool) -> None:
    """Makes webdataset open files on drives, and run programs only if allowed."""
    webdataset_patches.replace_openers(_open_local, None if allow_commands else _refuse_scheme)


def _open_local(path: str, *_: Any, **__: Any) -> Any:
    return Path(path).open("rb")


def _refuse_scheme(url: str, *_: Any, **__: Any) -> Any:
    raise CommandError(_scheme_problem(url))


def _scheme_problem(url: str) -> str:
    return (
        f"wds/ address {url}: webdataset runs a program to read it (for pipe: the command in the address, otherwise "
        "curl, gsutil or ais), and the author of a recipe or an _info.json could choose the program; if you trust the "
        "address, pass --allow-shard-commands on the command line, or copy the shards to a folder"
    )


def _local_path(url: str) -> Path | None:
    """Returns the path of an address; None if webdataset opens it with a program."""
    parts = urlparse(url)
    if parts.scheme == "file":
        return Path(url2pathname(parts.path))
    return Path(url) if len(parts.scheme) <= 1 and url != "-" else None


def _check_urls(urls: Sequence[str], allow_commands: bool, is_required: bool = True) -> None:
    """Checks addresses before any of them is opened.

    Raises:
        CommandError: If an address would run a program without permission, or is not a regular file.
    """
    for url in urls:
        path = _local_path(url)
        if path is None:
            if not allow_commands:
                raise CommandError(_scheme_problem(url))
        elif not path.exists():
            if is_required:
                raise CommandError(f"shard {path}, listed in _info.json, does not exist")
        elif not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait forever
            raise CommandError(f"{path} is not a regular file")


def check_description(root: str, allow_commands: bool) -> None:
    """Checks the address of the description of a wds/ dataset, before it is read.

    Raises:
        CommandError: If the description would run a program without permission, or is not a regular file.
    """
    _check_urls([os.path.join(root, name) for name in ("_info.json", "info.json")], allow_commands, is_required=False)


def check_shards(root: str, info: Any, allow_commands: bool) -> None:
    """Checks the description of a wds/ dataset, as timm has read it.

    Raises:
        CommandError: If a value has a wrong type, or a shard cannot be opened.
    """
    has_names = all(isinstance(name, str) for name in info.filenames)
    numbers = [info.num_samples, *info.shard_lengths]
    if not has_names or not all(type(number) is int and number >= 0 for number in numbers):
        raise CommandError(
            f"the description of the shards in {root} is wrong: expected texts in filenames, and whole numbers in "
            "num_samples and shard_lengths"
        )
    _check_urls([os.path.join(root, name) for name in info.filenames], allow_commands)

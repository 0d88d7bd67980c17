"""images/s of the training loader, compared with a plain torchvision loader."""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset
from torchvision import transforms

from ..common.classification_flags import parse_args
from ..common.cli import CommandError, progress_bar, reason
from ..common.data import open_images
from ..common.distributed import Distributed
from ..common.image_folders import TorchImageFolder
from ..common.loaders import TrainLoader
from ..common.signals import ignore_signals_in_worker
from .config import LoaderConfig

__all__ = ["benchmark"]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def benchmark(config: LoaderConfig) -> Iterator[list[dict[str, Any]]]:
    """Yields one table: images/s of each loader with each number of workers."""
    rows = []
    for workers in config.workers:
        loaders = {
            "torchvision": _torchvision_loader(config, workers),
            "train_cls": _our_loader(config, workers, None),
        }
        if config.config:
            loaders[f"train_cls, {Path(config.config).stem}"] = _our_loader(config, workers, config.config)
        rows += _measure(config, workers, loaders)
    yield rows


def _measure(config: LoaderConfig, workers: int, loaders: dict[str, Callable[[int], int]]) -> list[dict[str, Any]]:
    """Returns a row for each loader. They run in turns."""
    speeds: dict[str, list[float]] = {name: [] for name in loaders}
    images = config.images // config.batch_size * config.batch_size
    with progress_bar((config.repeats + 1) * len(loaders), "epoch", True) as bar:
        for repeat in range(config.repeats + 1):
            for name, read_epoch in loaders.items():
                start = time.perf_counter()
                seen = read_epoch(repeat)
                assert seen == images, (name, seen)
                if repeat > 0:  # the first one starts the workers and fills the file cache
                    speeds[name].append(images / (time.perf_counter() - start))
                bar.update()
    processes = max(1, workers)  # without workers, the main process loads images
    return [
        {
            "loader": name,
            "workers": workers,
            "images": images,
            "batch_size": config.batch_size,
            "img_size": config.img_size,
            "images_per_second": round(statistics.median(values), 1),
            "per_worker": round(statistics.median(values) / processes, 1),
            "per_worker_min": round(min(values) / processes, 1),
            "per_worker_max": round(max(values) / processes, 1),
            "ratio": round(statistics.median(values) / statistics.median(speeds["torchvision"]), 3),
            "repeats": len(values),
        }
        for name, values in speeds.items()
    ]


def _choose_images(length: int, config: LoaderConfig) -> list[int]:
    """Returns the indices of the images, the same for every loader.

    Raises:
        CommandError: If there are fewer images than --images.
    """
    if config.images < config.batch_size or length < config.images:
        raise CommandError(
            f"--images {config.images} must be at least a batch ({config.batch_size}) and at most all images ({length})"
        )
    return torch.randperm(length, generator=torch.Generator().manual_seed(0))[: config.images].tolist()


def _torchvision_loader(config: LoaderConfig, workers: int) -> Callable[[int], int]:
    pipeline = [
        transforms.RandomResizedCrop(config.img_size, interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ]
    try:
        images = TorchImageFolder(os.path.join(config.data_dir, "train"), transform=transforms.Compose(pipeline))
    except (OSError, RuntimeError) as error:
        raise CommandError(
            f"cannot open the training images of --data-dir {config.data_dir}: {reason(error)}; it must contain "
            "train/<class>/*"
        ) from error
    loader: DataLoader[Any] = DataLoader(
        Subset(images, _choose_images(len(images), config)),
        config.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=ignore_signals_in_worker,
    )
    return lambda _: sum(len(image) for image, _ in loader)


def _our_loader(config: LoaderConfig, workers: int, recipe: str | None) -> Callable[[int], int]:
    flags = [f"--config={recipe}"] if recipe else ["--color-jitter=0", "--train-interpolation=bicubic"]
    flags += [f"--data-dir={config.data_dir}", f"--batch-size={config.batch_size}", f"--workers={workers}"]
    settings = parse_args([*flags, "--val-split=train"])
    distributed = Distributed(torch.device("cpu"))
    images = open_images(settings.data, distributed, seed=settings.run.seed).train
    images.source = Subset(images.source, _choose_images(len(images), config))
    data_config = {
        "input_size": (3, config.img_size, config.img_size),
        "mean": MEAN,
        "std": STD,
        "interpolation": "bicubic",
        "crop_pct": 0.875,
        "crop_mode": "center",
    }
    # Repeated augmentation, if the recipe has it, decodes as many images: it does not change the speed.
    loader = TrainLoader(images, settings.data, settings.augment, data_config, distributed, seed=settings.run.seed)
    return lambda epoch: sum(len(image) for image, _ in loader.epoch(epoch))

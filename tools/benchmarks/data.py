"""images/s of the loader of training images, beside torchvision's plain one."""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset
from torchvision import transforms

from stvit.tools import train_cls
from stvit.tools.common.cli import CommandError, Parser, count, positive, progress_bar, reason
from stvit.tools.common.data import TrainLoader, open_images
from stvit.tools.common.image_folders import TorchImageFolder
from stvit.tools.common.processes import World, obey_parent_alone

__all__ = ["add_flags", "benchmark"]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def add_flags(parser: Parser) -> None:
    parser.add_argument("--data-dir", required=True, metavar="DIR", help="folder with train/<class>/*")
    parser.add_argument("--config", "-c", metavar="FILE", help="also measure the augmentation of this recipe")
    parser.add_argument("--img-size", type=positive, default=224, metavar="N", help="height and width in pixels")
    parser.add_argument("--batch-size", "-b", type=positive, default=64, metavar="N", help="images of a batch")
    parser.add_argument("--images", type=positive, default=2000, metavar="N", help="images to load, drawn by a seed")
    parser.add_argument("--workers", "-j", type=count, nargs="+", default=[1], metavar="N", help="loading processes")
    parser.add_argument("--repeats", type=positive, default=5, metavar="N", help="times that each is measured")


def benchmark(args: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """Images/s of the loaders of training images, every batch read to its end."""
    rows = []
    for workers in args.workers:
        loaders = {
            "torchvision": _torchvision_loader(args, workers),
            "train_cls": _our_loader(args, workers, None),
        }
        if args.config:
            loaders[f"train_cls, {Path(args.config).stem}"] = _our_loader(args, workers, args.config)
        speeds: dict[str, list[float]] = {name: [] for name in loaders}
        images = args.images // args.batch_size * args.batch_size
        with progress_bar((args.repeats + 1) * len(loaders), "epoch", True) as bar:
            for repeat in range(args.repeats + 1):
                for name, read_epoch in loaders.items():
                    start = time.perf_counter()
                    seen = read_epoch(repeat)
                    assert seen == images, (name, seen)
                    if repeat > 0:  # the first starts the workers and fills the file cache
                        speeds[name].append(images / (time.perf_counter() - start))
                    bar.update()
        for name, values in speeds.items():
            processes = max(1, workers)  # without workers the main process loads
            rows.append(
                {
                    "loader": name,
                    "workers": workers,
                    "images": images,
                    "batch_size": args.batch_size,
                    "img_size": args.img_size,
                    "images_per_second": round(statistics.median(values), 1),
                    "per_worker": round(statistics.median(values) / processes, 1),
                    "per_worker_min": round(min(values) / processes, 1),
                    "per_worker_max": round(max(values) / processes, 1),
                    "ratio": round(statistics.median(values) / statistics.median(speeds["torchvision"]), 3),
                    "repeats": len(values),
                }
            )
    yield rows


def _drawn(length: int, args: argparse.Namespace) -> list[int]:
    """The same images for every loader."""
    if args.images < args.batch_size or length < args.images:
        raise CommandError(
            f"--images {args.images} must be at least a batch ({args.batch_size}) and at most the images there are "
            f"({length})"
        )
    return torch.randperm(length, generator=torch.Generator().manual_seed(0))[: args.images].tolist()


def _torchvision_loader(args: argparse.Namespace, workers: int) -> Callable[[int], int]:
    pipeline = [
        transforms.RandomResizedCrop(args.img_size, interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ]
    try:
        images = TorchImageFolder(os.path.join(args.data_dir, "train"), transform=transforms.Compose(pipeline))
    except (OSError, RuntimeError) as error:
        raise CommandError(
            f"cannot open the training images of --data-dir {args.data_dir}: {reason(error)}; it must hold "
            "train/<class>/*"
        ) from error
    loader: DataLoader[Any] = DataLoader(
        Subset(images, _drawn(len(images), args)),
        args.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=obey_parent_alone,
    )
    return lambda _: sum(len(image) for image, _ in loader)


def _our_loader(args: argparse.Namespace, workers: int, config: str | None) -> Callable[[int], int]:
    flags = [f"--config={config}"] if config else ["--color-jitter=0", "--train-interpolation=bicubic"]
    # A recipe's repeated augmentation would have the same number of images decoded: it shows no more of them.
    flags += [f"--data-dir={args.data_dir}", f"--batch-size={args.batch_size}", f"--workers={workers}"]
    recipe = train_cls.parse_args([*flags, "--grad-accum-steps=1", "--in-chans=3", "--val-split=train"])
    world = World(torch.device("cpu"))
    images = open_images(recipe, world).train
    images.source = Subset(images.source, _drawn(len(images), args))
    data_config = {
        "input_size": (3, args.img_size, args.img_size),
        "mean": MEAN,
        "std": STD,
        "interpolation": "bicubic",
        "crop_pct": 0.875,
        "crop_mode": "center",
    }
    loader = TrainLoader(recipe, images, data_config, world, torch.float32)
    return lambda epoch: sum(len(image) for image, _ in loader.epoch(epoch))

#!/usr/bin/env python3
"""Measures speed, beside what else does the same on the same machine at the same time.

    python tools/benchmark.py data --data-dir /data/imagenet --workers 1 2 4
    python tools/benchmark.py data --data-dir /data/imagenet --config configs/cls/stvit_small_in1k.yaml --csv data.csv
    python tools/benchmark.py yolo --img-size 640 --csv yolo.csv

`python -m stvit.tools.benchmark` is the same program. What is compared takes turns, so that whatever else the machine
does meets all alike: compare numbers of one run alone. Each is the median of the repeats, with the smallest and the
largest. With --csv rows are appended to a table, with what produced them.

data: images/s of a worker of tools/train_cls.py's loader, beside torchvision's plain one (ImageFolder in a DataLoader:
random crop and flip, normalization), and with --config under that recipe's augmentation.

yolo: parameters, GFLOPs (two for a multiplication and an addition; convolutions, matrices, attention) and latency of
YOLO26 detectors, fused, one image at a time, and the part of each that is the backbone's: the rows that stand under
`backbone` in a model file. Each scale on the STViT that pairs with it beside the stock model.
"""

import argparse
import csv
import logging
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Subset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from torchvision.datasets import ImageFolder

import stvit
from stvit.tools import train_cls
from stvit.tools.common.cli import CommandError, Parser, count, positive, progress_bar, reason, run
from stvit.tools.common.data import TrainLoader, open_images
from stvit.tools.common.processes import World, obey_parent_alone

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status: 0, 1 after an error, 130 after Ctrl-C."""
    logging.getLogger("timm").setLevel(logging.ERROR)
    return run(benchmark, create_parser().parse_args(argv))


def create_parser() -> Parser:
    """The subjects and their flags."""
    parser = Parser(prog="benchmark.py", description="Measures speed, beside what else does the same.")
    subjects = parser.add_subparsers(dest="subject", required=True, metavar="SUBJECT")
    data = subjects.add_parser("data", help="images/s of the loader of training images", add_help=True)
    data.add_argument("--data-dir", required=True, metavar="DIR", help="folder with train/<class>/*")
    data.add_argument("--config", "-c", metavar="FILE", help="also measure the augmentation of this recipe")
    data.add_argument("--img-size", type=positive, default=224, metavar="N", help="height and width in pixels")
    data.add_argument("--batch-size", "-b", type=positive, default=64, metavar="N", help="images of a batch")
    data.add_argument("--images", type=positive, default=2000, metavar="N", help="images to load, drawn by a seed")
    data.add_argument("--workers", "-j", type=count, nargs="+", default=[1], metavar="N", help="loading processes")
    yolo = subjects.add_parser("yolo", help="latency of YOLO26 detectors", add_help=True)
    pairs = [f"yolo26{scale}{backbone}.yaml" for scale in "nsmlx" for backbone in ("", "-stvit")]
    yolo.add_argument("--models", nargs="+", default=pairs, metavar="NAME", help="model files, ours or Ultralytics'")
    yolo.add_argument("--img-size", type=positive, default=640, metavar="N", help="height and width in pixels")
    for subject in (data, yolo):
        subject.add_argument("--repeats", type=positive, default=5, metavar="N", help="times that each is measured")
        subject.add_argument("--csv", metavar="FILE", help="table to append the results to")
    return parser


def benchmark(args: argparse.Namespace) -> None:
    """Measures, prints a table, and appends it to --csv.

    Raises:
        CommandError: If what is to be measured cannot be.
    """
    rows = {"data": benchmark_data, "yolo": benchmark_yolo}[args.subject](args)
    _print_table(rows)
    if args.csv:
        _append(Path(args.csv), [{**_circumstances(), **row} for row in rows])
        print(f"appended to {args.csv}")


def benchmark_data(args: argparse.Namespace) -> list[dict[str, Any]]:
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
    return rows


def benchmark_yolo(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Size and latency of detectors, from images of random pixels: weights and pixels do not change the time."""
    try:
        import ultralytics

        from stvit.adapters.yolo import YOLO

        models: dict[str, Any] = {name: YOLO(name) for name in args.models}
    except (ImportError, ValueError, FileNotFoundError) as error:
        raise CommandError(reason(error)) from error
    if args.img_size % 32:
        raise CommandError(f"--img-size must be a multiple of 32, got {args.img_size}")
    image = torch.rand(1, 3, args.img_size, args.img_size)
    rows: dict[str, dict[str, Any]] = {}
    for name, yolo in models.items():
        detector = yolo.model.eval()
        depth = len(detector.yaml["backbone"])
        parameters = [sum(p.numel() for p in layer.parameters()) for layer in detector.model]  # as trained, unfused
        yolo.fuse(verbose=False)
        flops = _count_flops(detector, image, len(detector.model))
        rows[name] = {
            "model": Path(name).stem,
            "backbone": getattr(detector.model[0], "name", "stock"),
            "img_size": args.img_size,
            "params_m": round(sum(parameters) / 1e6, 2),
            "params_backbone": round(sum(parameters[:depth]) / sum(parameters), 3),
            "gflops": round(flops / 1e9, 1),
            "gflops_backbone": round(_count_flops(detector, image, depth) / flops, 3),
        }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    with progress_bar((args.repeats + 1) * len(models), "model", True) as bar, torch.inference_mode():
        for repeat in range(args.repeats + 1):
            for name, yolo in models.items():
                measured = _time_layers(yolo.model, image, len(yolo.model.yaml["backbone"]))
                if repeat > 0:  # the first fills caches
                    times[name].append(measured)
                bar.update()
    for name, pairs in times.items():
        totals = [total for total, _ in pairs]
        rows[name] |= {
            "ms": round(1e3 * statistics.median(totals), 1),
            "ms_min": round(1e3 * min(totals), 1),
            "ms_max": round(1e3 * max(totals), 1),
            "ms_backbone": round(statistics.median(backbone / total for total, backbone in pairs), 3),
            "repeats": args.repeats,
            "ultralytics": ultralytics.__version__,
        }
    return list(rows.values())


def _count_flops(detector: Any, image: torch.Tensor, depth: int) -> int:
    """Floating-point operations of the detector's first layers."""
    counter = FlopCounterMode(display=False)
    hook = detector.model[depth - 1].register_forward_hook(lambda *_: counter.__exit__(None, None, None))
    # Attention by its formula: the fused one of the CPU is unknown to the counter.
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH):
        counter.__enter__()
        detector(image)
    hook.remove()
    return int(counter.get_total_flops())


def _time_layers(detector: Any, image: torch.Tensor, depth: int) -> tuple[float, float]:
    """Seconds of the detector, and of its first layers."""
    ends = []
    hook = detector.model[depth - 1].register_forward_hook(lambda *_: ends.append(time.perf_counter()))
    start = time.perf_counter()
    detector(image)
    total = time.perf_counter() - start
    hook.remove()
    return total, ends[0] - start


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
        images = ImageFolder(os.path.join(args.data_dir, "train"), transforms.Compose(pipeline))
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


def _circumstances() -> dict[str, Any]:
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "stvit": stvit.__version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _print_table(rows: list[dict[str, Any]]) -> None:
    widths = {key: max(len(key), *(len(str(row[key])) for row in rows)) for key in rows[0]}
    for row in [dict(zip(widths, widths, strict=True)), *rows]:
        cells = [
            str(row[key]).ljust(width) if isinstance(rows[0][key], str) else str(row[key]).rjust(width)
            for key, width in widths.items()
        ]
        print("  ".join(cells).rstrip())


def _append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Appends rows to a table, which must have their columns."""
    columns = list(rows[0])
    try:
        exists = path.exists() and path.stat().st_size > 0
        if exists:
            with path.open(newline="") as file:
                header = next(csv.reader(file))
            if header != columns:
                raise CommandError(f"--csv {path} has other columns ({', '.join(header)}): choose another file")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, columns)
            if not exists:
                writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise CommandError(f"cannot write --csv {path}: {reason(error)}") from error


if __name__ == "__main__":
    sys.exit(main())

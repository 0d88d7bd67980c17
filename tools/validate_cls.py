#!/usr/bin/env python3
"""Evaluates an image classifier: STViT, or any timm model.

    python tools/validate_cls.py --checkpoint runs/stvit_small_in1k --data-dir /data/imagenet
    python tools/validate_cls.py --checkpoint stvit_small_official.pth --model stvit_small --official-crop --data-dir …
    python tools/validate_cls.py --checkpoint hf-hub:ORG/NAME --data-dir /data/imagenet --real-labels --output report
    torchrun --nproc-per-node 8 tools/validate_cls.py --checkpoint … --data-dir …

`python -m stvit.tools.validate_cls` is the same program. A checkpoint is a run of tools/train_cls.py, a folder of
model.safetensors and config.json, a file of weights (ours, timm's or the authors'), or `hf-hub:…`. Data are named as
for tools/train_cls.py; each image counts once, on however many processes.

Prints top-1 and top-5 with 95 % confidence intervals, and images/s; with --output DIR writes them to results.json
there, those of each class to per_class.csv, and for up to 100 classes a picture of what is taken for what,
confusion.png.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # during the imports Ctrl-C ends the command without a traceback

import argparse
import csv
import json
import logging
import math
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
from timm.data import RealLabelsImagenet
from torch.utils.data import IterableDataset

import stvit
from stvit.safe_text import printable, redact_values
from stvit.tools.common.bad_images import BadImages
from stvit.tools.common.cli import CommandError, Parser, progress_bar, reason, run
from stvit.tools.common.config import DataConfig, DeviceConfig, ImageConfig
from stvit.tools.common.data import open_images, resolve_data_config
from stvit.tools.common.distributed import DTYPES, Distributed, autocast, check_dtype, join_processes
from stvit.tools.common.evaluation import (
    add_class_map_argument,
    class_names,
    confidence_interval,
    evaluate,
    map_classes,
    mapped,
)
from stvit.tools.common.files import atomic_write
from stvit.tools.common.flags import add_flags, from_flags
from stvit.tools.common.loaders import create_val_loader
from stvit.tools.common.locks import InUseError, PathLock
from stvit.tools.common.logs import has_matplotlib, save_plot
from stvit.tools.common.model import (
    Weights,
    add_model_arguments,
    check_img_size,
    choose_weights,
    create_model,
    read_weights,
)
from stvit.tools.common.recipes import parse_with_recipe

MOST_CLASSES_OF_A_PICTURE = 100


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status: 0, 1 after an error, 130 after Ctrl-C."""
    logging.getLogger("timm").setLevel(logging.ERROR)
    return run(validate, parse_args(argv))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the command line over those of the file `--config` over the defaults.

    Raises:
        SystemExit: With status 2 and one line on standard error, if a flag or a key is unknown or ill-typed.
    """
    return parse_with_recipe(create_parser, argv)


def create_parser() -> Parser:
    """The flags, under timm's names."""
    parser = Parser(prog="validate_cls.py", description="Evaluates an image classifier: STViT, or any timm model.")
    parser.add_argument("--config", "-c", metavar="FILE", help="YAML whose keys are flags of this program")

    group = parser.add_argument_group("model")
    add_model_arguments(group)

    group = parser.add_argument_group("data")
    add_flags(group, DataConfig, defaults={"batch_size": 64}, omit={"train_split", "validation_batch_size"})
    group.add_argument("--seed", "-s", type=int, default=42, metavar="N", help="of the run that held out the digits")
    add_flags(group, ImageConfig)
    group.add_argument(
        "--official-crop",
        action="store_true",
        help="the paper's evaluation: short side to 256 pixels for 224, to 384 for 384, bicubic, center crop",
    )
    add_class_map_argument(group)
    group.add_argument(
        "--real-labels",
        nargs="?",
        const="",
        metavar="FILE",
        help="also count by ImageNet's reassessed labels (Beyer et al. 2020), timm's or those of a JSON file",
    )

    group = parser.add_argument_group("device and speed")
    add_flags(group, DeviceConfig)

    group = parser.add_argument_group("results")
    group.add_argument("--output", metavar="DIR", help="folder for results.json, per_class.csv and confusion.png")
    return parser


def validate(args: argparse.Namespace) -> None:
    """Evaluates, prints and writes the results.

    Raises:
        CommandError: If the weights or the data are at fault.
    """
    if args.official_crop and (args.crop_pct is not None or args.interpolation is not None):
        raise CommandError("--official-crop sets the crop and the interpolation: leave --crop-pct, --interpolation out")
    if args.checkpoint is None and args.model is None:
        raise CommandError("no model: give --checkpoint, or --model for the published weights of one")
    output = Path(args.output).expanduser() if args.output else None
    with (
        join_processes(args.device, args.dist_backend) as distributed,
        TemporaryDirectory() as temporary,
        PathLock() as lock,
    ):
        if output is not None:
            distributed.on_primary(partial(_take_output, output, lock))
        check_dtype(distributed.device, args.model_dtype)
        model, weights, is_ema = _create_model(args, distributed)
        data_config = _data_config(args, model)
        check_img_size(model, data_config)
        in_chans = data_config["input_size"][0]
        if in_chans not in (1, 3):
            raise CommandError(f"images have 1 (gray) or 3 (color) channels, but the model takes {in_chans}")
        data, device = from_flags(DataConfig, args), from_flags(DeviceConfig, args)
        images = open_images(data, distributed, in_chans=in_chans, seed=args.seed, is_training=False)
        loader = create_val_loader(images.val, data, data_config, distributed, DTYPES[args.model_dtype])
        bad_images = BadImages(args.max_bad_images, Path(distributed.from_primary(temporary)) / "bad_images.jsonl")
        images.val.bad_images = bad_images
        num_classes = model.num_classes
        names = class_names(args.class_map, model)
        class_map = map_classes(names, images.class_names, num_classes, distributed)
        real_labels = None if args.real_labels is None else _open_real_labels(images.val, args.real_labels)
        source = f"{args.checkpoint or args.model}{' (EMA)' if is_ema else ''}"
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        distributed.print_primary(
            f"{source}, {parameters:.1f} M parameters, {num_classes} classes, {len(images.val)} images at "
            f"{data_config['input_size'][-1]} pixels (crop {data_config['crop_pct']:g}, "
            f"{data_config['interpolation']}), on {f'{distributed.size} x ' if distributed.size > 1 else ''}"
            f"{distributed.device.type}"
        )
        with_confusion = output is not None and num_classes <= MOST_CLASSES_OF_A_PICTURE
        counts = _Counts(num_classes, distributed, real_labels, with_confusion)
        with progress_bar(len(loader), "batch", distributed.is_primary) as bar:

            def on_batch(logits: torch.Tensor, target: torch.Tensor) -> None:
                counts.update(logits, target)
                bar.update()

            batches = mapped(loader, class_map)
            metrics = evaluate(
                model, batches, distributed, autocast(device, distributed.device), args.channels_last, on_batch
            )
        counts.sum_up()
        results = _results(counts, metrics["loss"])
        _say(results, distributed)
        if not distributed.is_primary:
            return
        for name in sorted(bad_images.names()):
            print(f"warning: {name} could not be read and was skipped", file=sys.stderr)
        if output is not None:
            results |= {
                "skipped": len(bad_images.names()),
                "model": weights.model,
                "checkpoint": args.checkpoint,
                "ema": is_ema,
                **{name: data_config[name] for name in ("input_size", "crop_pct", "interpolation", "mean", "std")},
                "dataset": args.dataset or "folder",
                "data_dir": args.data_dir,
                "split": args.val_split,
                "device": torch.cuda.get_device_name()
                if distributed.device.type == "cuda"
                else distributed.device.type,
                "dtype": f"{args.amp_dtype} (amp)" if args.amp else args.model_dtype,
                "batch_size": args.batch_size,
                "processes": distributed.size,
                "versions": {"stvit": stvit.__version__, "torch": torch.__version__, "timm": timm.__version__},
                "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            }
            _write(output, results, counts, names or images.class_names)


def _take_output(folder: Path, lock: PathLock) -> None:
    """Makes the folder of the results, and locks it against other evaluations.

    Raises:
        CommandError: If it cannot be made, holds results already, or another process writes there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(folder / ".stvit.lock")
    except InUseError as error:
        raise InUseError(f"{error}: choose another --output") from error
    except OSError as error:
        raise CommandError(f"cannot write to --output {folder}: {reason(error)}") from error
    if (folder / "results.json").exists():
        raise CommandError(f"{folder} holds the results of another evaluation: choose another --output")


# ---------------------------------------------------------------------------------------------------------------------
# What is evaluated


def _create_model(args: argparse.Namespace, distributed: Distributed) -> tuple[Any, Weights, bool]:
    """The model on the device, where it is from, and whether its weights are a moving average."""
    weights = choose_weights(args)
    content, is_ema = read_weights(weights.file, weights.use_ema) if weights.file is not None else (None, False)
    with distributed.primary_first():
        model: Any = create_model(
            weights.model,
            pretrained=True,
            weights=content,
            num_classes=args.num_classes,
            in_chans=args.in_chans,
            img_size=args.img_size,
            model_kwargs={**(weights.recipe.get("model_kwargs") or {}), **args.model_kwargs},
        )
    if args.num_classes is not None and content is not None and model.pretrained_cfg["num_classes"] != args.num_classes:
        raise CommandError(
            f"--num-classes is {args.num_classes}, but the weights have {model.pretrained_cfg['num_classes']} classes: "
            "leave it out, for a classifier of another size would be random"
        )
    model = model.to(device=distributed.device, dtype=DTYPES[args.model_dtype])
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)
    return model, weights, is_ema


def _data_config(args: argparse.Namespace, model: Any) -> dict[str, Any]:
    data_config = resolve_data_config(vars(args), model, use_test_size=True)
    if args.official_crop:
        crop_pct = 1.0 if data_config["input_size"][-1] >= 384 else 224 / 256
        data_config |= {"crop_pct": crop_pct, "interpolation": "bicubic", "crop_mode": "center"}
    return data_config


def _open_real_labels(images: Any, path: str) -> list[list[int]]:
    """The class numbers that are right for each image, none for an image that shows nothing clear."""
    if isinstance(images, IterableDataset):
        raise CommandError("--real-labels needs images with file names in order, which wds/ shards are not")
    names = [Path(images.name(index)).name for index in range(len(images))]
    if path and not Path(path).is_file():  # opening a pipe would wait forever
        raise CommandError(f"cannot read --real-labels {path}: it is not a file")
    try:
        labels = RealLabelsImagenet(names, real_json=path or None).real_labels
    except AssertionError:
        raise CommandError(
            f"--real-labels are for the 50,000 validation images of ImageNet, not {len(names)}"
        ) from None
    except (OSError, ValueError) as error:
        raise CommandError(f"cannot read --real-labels {path}: {reason(error)}") from error
    unknown = next((name for name in names if name not in labels), None)
    if unknown is not None:
        raise CommandError(f"--real-labels know images such as {next(iter(labels))}, not {unknown}")
    return [labels[name] for name in names]


# ---------------------------------------------------------------------------------------------------------------------
# What is found


class _Counts:
    """What was classified as what.

    Attributes:
        classes: Images, top-1 and top-5 correct of each class, (K, 3).
        confusion: Images of each class (row) that were taken for each class (column), None if it is not wanted.
        real: Images with reassessed labels, and how many of them are right at top-1 and top-5, (3,); None if they are
            not looked at.
        images_per_second: Images of all processes a second, the loading included.
    """

    def __init__(
        self, num_classes: int, distributed: Distributed, real_labels: list[list[int]] | None, with_confusion: bool
    ) -> None:
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=distributed.device)

        self.classes = zeros(num_classes, 3)
        self.confusion = zeros(num_classes, num_classes) if with_confusion else None
        self.real = None if real_labels is None else zeros(3)
        self.images_per_second = 0.0
        self._real_labels = real_labels
        self._distributed = distributed
        self._seen = 0
        self._first = 0, time.perf_counter()

    def update(self, logits: torch.Tensor, target: torch.Tensor) -> None:
        """Takes the logits (B, K) and class numbers (B,) of a batch; those of -1 do not count."""
        top = logits.topk(min(5, logits.shape[1])).indices
        if self.real is not None:
            self.real += self._real_hits(top.tolist(), target.tolist()).to(self.real.device)
        if self._seen == 0 and self._first[0] == 0:
            self._first = len(target), time.perf_counter()  # the first batch waits for the loader to start
        self._seen += len(target)
        top, target = top[target >= 0], target[target >= 0]
        right = top == target[:, None]
        hits = torch.stack([torch.ones_like(target), right[:, 0].long(), right.any(dim=1).long()], dim=1)
        self.classes.index_add_(0, target, hits)
        if self.confusion is not None:
            self.confusion.index_put_((target, top[:, 0]), torch.ones_like(target), accumulate=True)

    def _real_hits(self, top: list[list[int]], target: list[int]) -> torch.Tensor:
        assert self._real_labels is not None
        hits = torch.zeros(3, dtype=torch.int64)
        for place, (predicted, number) in enumerate(zip(top, target, strict=True)):
            # This process's share is every size-th image.
            labels = self._real_labels[self._distributed.rank + self._distributed.size * (self._seen + place)]
            if number >= 0 and labels:
                hits += torch.tensor([1, predicted[0] in labels, any(guess in labels for guess in predicted)])
        return hits

    def sum_up(self) -> None:
        """Adds up the counts of all processes."""
        first, since = self._first
        images = self._seen - first
        own = images / (time.perf_counter() - since) if images else 0.0
        self.images_per_second = sum(self._distributed.gather(own))
        for values in (self.classes, self.confusion, self.real):
            if values is not None:
                self._distributed.sum(values)


def _results(counts: _Counts, loss: float) -> dict[str, Any]:
    """Accuracies in percent, with their 95 % confidence intervals."""
    results: dict[str, Any] = {"loss": loss}
    sets = {"": counts.classes.sum(dim=0)} | ({} if counts.real is None else {"real_": counts.real})
    for prefix, sums in sets.items():
        images, *correct = sums.tolist()
        results[f"{prefix}images"] = images
        for name, right in zip(("top1", "top5"), correct, strict=True):
            results[prefix + name] = 100 * right / images if images else math.nan
            results[f"{prefix}{name}_interval"] = [100 * bound for bound in confidence_interval(right, images)]
    return results | {"images_per_second": counts.images_per_second}


def _say(results: dict[str, Any], distributed: Distributed) -> None:
    for prefix, title in (("", ""), ("real_", "reassessed labels: ")):
        if f"{prefix}images" not in results:
            continue
        parts = []
        for name in ("top1", "top5"):
            low, high = results[f"{prefix}{name}_interval"]
            parts.append(f"{name[:3]}-{name[3:]} {results[prefix + name]:.2f} % ({low:.2f} to {high:.2f})")
        loss = f", loss {results['loss']:.4f}" if not prefix else ""
        distributed.print_primary(
            f"{title}{', '.join(parts)}{loss}, of {results[f'{prefix}images']} images; 95 % confidence"
        )
    if results["images_per_second"]:
        distributed.print_primary(f"{results['images_per_second']:.1f} images/s, the loading included")


def _write(folder: Path, results: dict[str, Any], counts: _Counts, names: list[str] | None) -> None:
    def write_classes(path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["class", "name", "images", "top1", "top5"])
            for number, (images, *correct) in enumerate(counts.classes.tolist()):
                shares = [f"{100 * right / images:.4f}" if images else "" for right in correct]
                writer.writerow([number, names[number] if names else "", images, *shares])

    text = json.dumps(redact_values(results), indent=2) + "\n"
    try:
        atomic_write(folder / "per_class.csv", write_classes)
        # Before the picture, which says nothing else and may fail.
        atomic_write(folder / "results.json", lambda path: path.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise CommandError(f"cannot write to --output {folder}: {reason(error)}") from error
    if counts.confusion is None:
        print(f"no confusion.png: the model has more than {MOST_CLASSES_OF_A_PICTURE} classes")
    elif not has_matplotlib():
        print("no confusion.png, for which matplotlib is needed: pip install matplotlib")
    else:
        draw_confusion(counts.confusion.cpu(), names, folder / "confusion.png")
    print(f"results are in {folder}")


def draw_confusion(confusion: torch.Tensor, names: list[str] | None, path: Path) -> bool:
    """Draws what share of each class (row) is taken for each class (column).

    Args:
        confusion: Numbers of images, (K, K).
        names: Names of the classes; None to number them.
        path: PNG to write.

    Returns:
        Whether it was drawn: False without matplotlib, and after an error, which is printed as a warning.
    """
    num_classes = len(confusion)
    share = confusion / confusion.sum(dim=1, keepdim=True).clamp(min=1)
    side = max(5.0, 1.5 + 0.17 * num_classes + (2.0 if num_classes <= 20 else 0.0))
    labels = [_label(name) for name in names] if names else [str(number) for number in range(num_classes)]
    size = 9 if num_classes <= 20 else 6

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        image = axes.imshow(100 * share.numpy(), cmap="Blues", vmin=0, vmax=100)
        axes.set_xticks(range(num_classes), labels, rotation=90, fontsize=size)
        axes.set_yticks(range(num_classes), labels, fontsize=size)
        for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
            label.set_parse_math(False)  # dollar signs in the name of a class are no formula
        axes.set_xlabel("taken for")
        axes.set_ylabel("class")
        if num_classes <= 20:
            for row in range(num_classes):
                for column in range(num_classes):
                    value = 100 * share[row, column].item()
                    if value >= 0.05:
                        color = "white" if value > 50 else "black"
                        axes.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=7, color=color)
        figure.colorbar(image, ax=axes, label="share of the class (%)", shrink=0.8)

    return save_plot(path, draw, (side + 1, side))


def _label(name: str) -> str:
    """Returns the beginning of a class name, in characters that can be drawn in one line."""
    return printable(name)[:24]


if __name__ == "__main__":
    sys.exit(main())

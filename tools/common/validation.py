"""Evaluates a classifier and writes its results."""

import csv
import json
import math
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
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

from .bad_images import BadImages
from .cli import CommandError, progress_bar, reason
from .config import DeviceConfig, ModelSource, ValidationConfig
from .data import open_images, resolve_data_config
from .distributed import DTYPES, Distributed, autocast, check_dtype, join_processes
from .evaluation import class_names, confidence_interval, evaluate, map_classes, mapped
from .files import atomic_write
from .loaders import create_val_loader
from .locks import PathLock
from .logs import has_matplotlib, save_plot
from .model import OpenedModel, check_img_size, check_num_classes, open_model
from .results import create_output

MAX_CONFUSION_CLASSES = 100


def validate(config: ValidationConfig) -> None:
    """Evaluates the model, prints and writes the results.

    Raises:
        CommandError: If a flag, the weights or the data are wrong.
    """
    data, image, device = config.data, config.image, config.device
    if image.official_crop and (image.crop_pct is not None or image.interpolation is not None):
        raise CommandError("--official-crop sets crop and interpolation; remove --crop-pct and --interpolation")
    output = Path(config.output).expanduser() if config.output else None
    with (
        join_processes(device.device, device.dist_backend) as distributed,
        TemporaryDirectory() as temporary,
        PathLock() as lock,
    ):
        if output is not None:
            distributed.on_primary(partial(take_output, output, lock))
        check_dtype(distributed.device, device.model_dtype)
        opened = _open_model(replace(config.source, img_size=image.img_size), device, distributed)
        model = opened.model
        preprocessing = opened.fill({**vars(image), "in_chans": config.source.in_chans})
        data_config = _resolve_data_config(preprocessing, model, image.official_crop)
        check_img_size(model, data_config)
        in_chans = data_config["input_size"][0]
        if in_chans not in (1, 3):
            raise CommandError(f"images have 1 (gray) or 3 (color) channels, but the model takes {in_chans}")
        images = open_images(data, distributed, in_chans=in_chans, seed=data.seed, is_training=False)
        loader = create_val_loader(images.val, data, data_config, distributed, DTYPES[device.model_dtype])
        bad_images = BadImages(data.max_bad_images, Path(distributed.from_primary(temporary)) / "bad_images.jsonl")
        images.val.bad_images = bad_images
        num_classes = model.num_classes
        names = class_names(data.class_map, model)
        class_map = map_classes(names, images.class_names, num_classes, distributed)
        real_labels = None if data.real_labels is None else _open_real_labels(images.val, data.real_labels)
        _print_start(config.source.title, opened, data_config, len(images.val), distributed)
        with_confusion = output is not None and num_classes <= MAX_CONFUSION_CLASSES
        counts = _Counts(num_classes, distributed, real_labels, with_confusion)
        with progress_bar(len(loader), "batch", distributed.is_primary) as bar:

            def on_batch(logits: torch.Tensor, target: torch.Tensor) -> None:
                counts.update(logits, target)
                bar.update()

            batches = mapped(loader, class_map)
            metrics = evaluate(
                model, batches, distributed, autocast(device, distributed.device), device.channels_last, on_batch
            )
        counts.sum_up()
        results = _summarize(counts, metrics["loss"])
        _print_results(results, distributed)
        if not distributed.is_primary:
            return
        for name in sorted(bad_images.names()):
            print(f"warning: {name} cannot be read and was skipped", file=sys.stderr)
        if output is not None:
            results |= {"skipped": len(bad_images.names()), **_describe(config, opened, data_config, distributed)}
            _write_results(output, results, counts, names or images.class_names)


def take_output(folder: Path, lock: PathLock, *more: str) -> None:
    """Creates the folder of the results and locks it against other evaluations.

    Args:
        folder: The folder.
        lock: The lock to acquire.
        *more: Names of files that the evaluation writes in addition to those of all evaluations.

    Raises:
        CommandError: If the folder cannot be created, already has a file of such a name, or is in use.
    """
    create_output(folder, lock)
    if (folder / "results.json").exists():
        raise CommandError(f"{folder} already has results of another evaluation; choose another --output")
    for name in ("per_class.csv", "confusion.png", *more):
        if os.path.lexists(folder / name):
            raise CommandError(f"{folder / name} exists and would be overwritten; choose another --output")


# ---------------------------------------------------------------------------------------------------------------------
# Model and data


def _open_model(source: ModelSource, device: DeviceConfig, distributed: Distributed) -> OpenedModel:
    """Opens the model and moves it to the device."""
    with distributed.primary_first():
        opened = open_model(source)
    check_num_classes(source, opened.model)
    model = opened.model.to(device=distributed.device, dtype=DTYPES[device.model_dtype])
    if device.channels_last:
        model = model.to(memory_format=torch.channels_last)
    return replace(opened, model=model)


def _resolve_data_config(flags: Mapping[str, Any], model: Any, official_crop: bool) -> dict[str, Any]:
    """Returns the preprocessing, with `official_crop` that of the paper."""
    data_config = resolve_data_config(flags, model, use_test_size=True)
    if official_crop:
        crop_pct = 1.0 if data_config["input_size"][-1] >= 384 else 224 / 256
        data_config |= {"crop_pct": crop_pct, "interpolation": "bicubic", "crop_mode": "center"}
    return data_config


def _open_real_labels(images: Any, path: str) -> list[list[int]]:
    """Returns the correct classes of each image.

    An image without a clear class has an empty list.

    Raises:
        CommandError: If the labels cannot be read, or the images are not those of ImageNet.
    """
    if isinstance(images, IterableDataset):
        raise CommandError("--real-labels needs files in a fixed order, which wds/ shards do not have; use a folder")
    names = [Path(images.name(index)).name for index in range(len(images))]
    if path and not Path(path).is_file():  # reading a pipe could wait forever
        raise CommandError(f"cannot read --real-labels {path}: it is not a file")
    try:
        labels = RealLabelsImagenet(names, real_json=path or None).real_labels
    except AssertionError:
        raise CommandError(
            f"--real-labels: expected the 50,000 validation images of ImageNet, got {len(names)}"
        ) from None
    except (OSError, ValueError) as error:
        raise CommandError(f"cannot read --real-labels {path}: {reason(error)}") from error
    unknown = next((name for name in names if name not in labels), None)
    if unknown is not None:
        raise CommandError(f"--real-labels: expected image names such as {next(iter(labels))}, got {unknown}")
    return [labels[name] for name in names]


# ---------------------------------------------------------------------------------------------------------------------
# Results


class _Counts:
    """Counts of correct and wrong predictions.

    Attributes:
        classes: Number of images, correct top-1 and correct top-5 predictions of each class, (K, 3).
        confusion: Number of images by class (row) and prediction (column), (K, K); None if not needed.
        real: Number of images, correct top-1 and correct top-5 predictions with reassessed labels, (3,); None without
            these labels.
        images_per_second: Throughput of all processes, including data loading.
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
        """Counts a batch of logits (B, K) and classes (B,). Class -1 does not count."""
        top = logits.topk(min(5, logits.shape[1])).indices
        if self.real is not None:
            self.real += self._real_hits(top.tolist(), target.tolist()).to(self.real.device)
        if self._seen == 0 and self._first[0] == 0:
            self._first = len(target), time.perf_counter()  # the first batch includes the start of the loader
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
            # Each process has every size-th image.
            labels = self._real_labels[self._distributed.rank + self._distributed.size * (self._seen + place)]
            if number >= 0 and labels:
                hits += torch.tensor([1, predicted[0] in labels, any(guess in labels for guess in predicted)])
        return hits

    def sum_up(self) -> None:
        """Sums the counts of all processes."""
        first, since = self._first
        images = self._seen - first
        own = images / (time.perf_counter() - since) if images else 0.0
        self.images_per_second = sum(self._distributed.gather(own))
        for values in (self.classes, self.confusion, self.real):
            if values is not None:
                self._distributed.sum(values)


def _summarize(counts: _Counts, loss: float) -> dict[str, Any]:
    """Returns accuracies in percent with their 95 % confidence intervals."""
    results: dict[str, Any] = {"loss": loss}
    sets = {"": counts.classes.sum(dim=0)} | ({} if counts.real is None else {"real_": counts.real})
    for prefix, sums in sets.items():
        images, *correct = sums.tolist()
        results[f"{prefix}images"] = images
        for name, right in zip(("top1", "top5"), correct, strict=True):
            results[prefix + name] = 100 * right / images if images else math.nan
            results[f"{prefix}{name}_interval"] = [100 * bound for bound in confidence_interval(right, images)]
    return results | {"images_per_second": counts.images_per_second}


def _describe(
    config: ValidationConfig, opened: OpenedModel, data_config: dict[str, Any], distributed: Distributed
) -> dict[str, Any]:
    """Returns the settings that produced the results.

    They are the model, preprocessing, data, device, versions and time.
    """
    data, device = config.data, config.device
    is_cuda = distributed.device.type == "cuda"
    return {
        "model": opened.name,
        "checkpoint": config.source.checkpoint,
        "ema": opened.is_ema,
        **{name: data_config[name] for name in ("input_size", "crop_pct", "interpolation", "mean", "std")},
        "dataset": data.dataset or "folder",
        "data_dir": data.data_dir,
        "split": data.val_split,
        "device": torch.cuda.get_device_name() if is_cuda else distributed.device.type,
        "dtype": f"{device.amp_dtype} (amp)" if device.amp else device.model_dtype,
        "batch_size": data.batch_size,
        "processes": distributed.size,
        "versions": {"stvit": stvit.__version__, "torch": torch.__version__, "timm": timm.__version__},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _print_start(
    title: str, opened: OpenedModel, data_config: dict[str, Any], images: int, distributed: Distributed
) -> None:
    """Prints a line with the model, its preprocessing and the number of images."""
    parameters = sum(p.numel() for p in opened.model.parameters()) / 1e6
    distributed.print_primary(
        f"{title}{' (EMA)' if opened.is_ema else ''}, {parameters:.1f} M parameters, {opened.model.num_classes} "
        f"classes, {images} images at {data_config['input_size'][-1]} pixels (crop {data_config['crop_pct']:g}, "
        f"{data_config['interpolation']}), on {f'{distributed.size} x ' if distributed.size > 1 else ''}"
        f"{distributed.device.type}"
    )


def _print_results(results: dict[str, Any], distributed: Distributed) -> None:
    """Prints a line of accuracies for each set of labels, and the throughput."""
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
        distributed.print_primary(f"{results['images_per_second']:.1f} images/s, including data loading")


def _write_results(folder: Path, results: dict[str, Any], counts: _Counts, names: list[str] | None) -> None:
    """Writes results.json, per_class.csv and confusion.png.

    Raises:
        CommandError: If results.json or per_class.csv cannot be written.
    """

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
        # Before the confusion matrix, which may fail.
        atomic_write(folder / "results.json", lambda path: path.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise CommandError(f"cannot write to --output {folder}: {reason(error)}") from error
    if counts.confusion is None:
        print(f"no confusion.png, because the model has more than {MAX_CONFUSION_CLASSES} classes")
    elif not has_matplotlib():
        print("no confusion.png, because matplotlib is missing: pip install matplotlib")
    else:
        draw_confusion(counts.confusion.cpu(), names, folder / "confusion.png")
    print(f"results are in {folder}")


def draw_confusion(confusion: torch.Tensor, names: list[str] | None, path: Path) -> bool:
    """Draws the confusion matrix.

    A cell is the share of a class (row) that is predicted as a class (column).

    Args:
        confusion: Number of images, (K, K).
        names: Class names; None for numbers.
        path: PNG file to write.

    Returns:
        Whether the picture was written. It is not without matplotlib or after an error, which is printed.
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
            label.set_parse_math(False)  # a dollar sign in a class name does not start a formula
        axes.set_xlabel("prediction")
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
    """Returns the first characters of a class name, in a form that can be drawn."""
    return printable(name)[:24]

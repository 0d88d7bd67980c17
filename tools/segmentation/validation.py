"""Evaluates a segmentation model and writes its results."""

import csv
import json
import math
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import segmentation_models_pytorch as smp
import timm
import torch

import stvit
from stvit.safe_text import redact_values

from ..common.bad_images import BadImages
from ..common.cli import CommandError, progress_bar, reason
from ..common.distributed import DTYPES, Distributed, autocast, check_dtype, join_processes
from ..common.examples import create_example_val_loader
from ..common.files import atomic_write
from ..common.locks import PathLock
from ..common.logs import has_matplotlib
from ..common.validation import MAX_CONFUSION_CLASSES, draw_confusion, take_output
from .config import ValidationConfig
from .data import check_data, open_data
from .evaluation import evaluate
from .inference import Predictor
from .labels import LabelReader
from .metrics import Scores, compute_scores
from .model import open_model
from .prediction import scaling_of
from .transforms import ReadExample, collate_images

# Prefix and title of the results of each way to evaluate.
_SINGLE, _MULTI = ("", "single scale"), ("ms_", "multi-scale and flip")


def validate(config: ValidationConfig) -> None:
    """Evaluates the model, prints and writes the results.

    Raises:
        CommandError: If a flag, the weights or the data are wrong.
    """
    data, device = config.data, config.device
    output = Path(config.output).expanduser() if config.output else None
    with (
        join_processes(device.device, device.dist_backend) as distributed,
        TemporaryDirectory() as temporary,
        PathLock() as lock,
    ):
        if output is not None:
            distributed.on_primary(partial(take_output, output, lock))
        check_dtype(distributed.device, device.model_dtype)
        with distributed.primary_first():
            model = open_model(config.source.checkpoint)
        model = model.to(device=distributed.device, dtype=DTYPES[device.model_dtype])
        if device.channels_last:
            model = model.to(memory_format=torch.channels_last)
        if data.reduce_zero_label is None:  # the classes of such a model have the values 1, 2, …
            data.reduce_zero_label = model.category_ids is not None
        images, rules = open_data(
            data,
            distributed,
            in_chans=model.in_chans,
            is_training=False,
            class_names=model.label_names,
            num_classes=model.num_classes,
        )
        check_data(data, images, rules, distributed)
        bad_images = BadImages(data.max_bad_images, Path(distributed.from_primary(temporary)) / "bad_images.jsonl")
        images.val.bad_images = bad_images
        images.val.transform = ReadExample(LabelReader(rules))
        loader = create_example_val_loader(images.val, data, distributed, collate_images)
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        sides = scaling_of(config.source, model)
        distributed.print_primary(
            f"{config.source.checkpoint}, {parameters:.1f} M parameters, {rules.num_classes} classes, "
            f"{len(images.val)} images of at most {sides.short_side}x{sides.long_side} pixels, on "
            f"{f'{distributed.size} x ' if distributed.size > 1 else ''}{distributed.device.type}"
        )
        results: dict[str, Any] = {}
        per_class: dict[str, Scores] = {}
        confusion: torch.Tensor | None = None
        for prefix, title in [_SINGLE, _MULTI] if config.source.multi_scale else [_SINGLE]:
            predictor = Predictor(
                model,
                distributed.device,
                DTYPES[device.model_dtype],
                scaling=scaling_of(config.source, model, multi_scale=bool(prefix)),
                context=partial(autocast, device, distributed.device),
                channels_last=device.channels_last,
            )
            start = time.perf_counter()
            with progress_bar(len(loader), "batch", distributed.is_primary) as bar:
                counts = evaluate(predictor, loader, rules.num_classes, distributed, bar.update)
            speed = len(images.val) / (time.perf_counter() - start)
            confusion = counts if confusion is None else confusion
            found = per_class[prefix] = compute_scores(counts)
            results |= {f"{prefix}{name}": value for name, value in found.means().items()}
            results[f"{prefix}images_per_second"] = speed
            distributed.print_primary(
                f"{title}: mIoU {found.miou:.2f} %, mAcc {found.macc:.2f} %, aAcc {found.aacc:.2f} %, of "
                f"{len(images.val) - len(bad_images.names())} images; {speed:.1f} images/s, including data loading"
            )
        if not distributed.is_primary:
            return
        for name in sorted(bad_images.names()):
            print(f"warning: {name} cannot be read and was skipped", file=sys.stderr)
        if output is not None:
            skipped = len(bad_images.names())
            results |= {"images": len(images.val) - skipped, "skipped": skipped}
            results |= _describe(config, model, distributed)
            _write_results(output, results, per_class, images.class_names)
            assert confusion is not None
            _draw(confusion, images.class_names, output)
            print(f"results are in {output}")


def _describe(config: ValidationConfig, model: Any, distributed: Distributed) -> dict[str, Any]:
    """Returns what produced the results: model, data, device, versions and time."""
    data, device, recipe = config.data, config.device, model.recipe
    is_cuda = distributed.device.type == "cuda"
    return {
        "model": recipe.builder,
        "backbone": recipe.args.get("backbone"),
        "checkpoint": config.source.checkpoint,
        "short_side": config.source.short_side or model.short_side,
        "long_side": config.source.long_side or model.long_side,
        "mean": model.mean,
        "std": model.std,
        "data_dir": data.data_dir,
        "val_images": data.val_images,
        "val_labels": data.val_labels,
        "reduce_zero_label": data.reduce_zero_label,
        "ignore_index": data.ignore_index,
        "device": torch.cuda.get_device_name() if is_cuda else distributed.device.type,
        "dtype": f"{device.amp_dtype} (amp)" if device.amp else device.model_dtype,
        "batch_size": data.batch_size,
        "processes": distributed.size,
        "versions": {
            "stvit": stvit.__version__,
            "torch": torch.__version__,
            "timm": timm.__version__,
            "segmentation_models_pytorch": smp.__version__,
        },
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _write_results(
    folder: Path, results: dict[str, Any], per_class: dict[str, Scores], names: Sequence[str] | None
) -> None:
    """Writes results.json and per_class.csv.

    Raises:
        CommandError: If they cannot be written.
    """

    def write_classes(path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            columns = [f"{prefix}{name}" for prefix in per_class for name in ("iou", "acc")]
            writer.writerow(["class", "name", "pixels", *columns])
            for number, pixels in enumerate(per_class[""].pixels):
                values = [value for found in per_class.values() for value in (found.iou[number], found.acc[number])]
                shown = ["" if math.isnan(value) else f"{value:.4f}" for value in values]
                writer.writerow([number, names[number] if names else "", pixels, *shown])

    text = json.dumps(redact_values(results), indent=2) + "\n"
    try:
        atomic_write(folder / "per_class.csv", write_classes)
        atomic_write(folder / "results.json", lambda path: path.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise CommandError(f"cannot write to --output {folder}: {reason(error)}") from error


def _draw(confusion: torch.Tensor, names: list[str] | None, folder: Path) -> None:
    if len(confusion) > MAX_CONFUSION_CLASSES:
        print(f"no confusion.png, because the model has more than {MAX_CONFUSION_CLASSES} classes")
    elif not has_matplotlib():
        print("no confusion.png, because matplotlib is missing: pip install matplotlib")
    else:
        draw_confusion(confusion.cpu(), names, folder / "confusion.png")

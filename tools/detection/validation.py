"""Evaluates a detector and writes its results."""

import csv
import json
import math
import sys
import time
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
import torchvision

import stvit
from stvit.safe_text import redact_values

from ..common.bad_images import BadImages
from ..common.cli import CommandError, progress_bar, reason
from ..common.distributed import DTYPES, Distributed, autocast, check_dtype, join_processes
from ..common.examples import create_example_val_loader
from ..common.files import atomic_write
from ..common.locks import PathLock
from ..common.validation import take_output
from .coco import Coco
from .config import ValidationConfig
from .data import check_sizes, open_images
from .inference import Detections, detect, to_device
from .metrics import METRICS, Scores, compute_scores, gather_detections
from .source import OpenedDetector, open_detector
from .transforms import ValTransform, collate


def validate(config: ValidationConfig) -> None:
    """Evaluates the detector, prints and writes the results.

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
            distributed.on_primary(partial(take_output, output, lock, "detections.json"))
        check_dtype(distributed.device, device.model_dtype)
        detector = open_detector(config.source, device, distributed)
        if device.channels_last:
            detector.model.to(memory_format=torch.channels_last)
        images = open_images(
            data, distributed, with_masks=detector.has_masks, in_chans=detector.in_chans, is_training=False
        )
        check_sizes(data, images, distributed)
        images.val.transform = ValTransform()
        bad_images = BadImages(data.max_bad_images, Path(distributed.from_primary(temporary)) / "bad_images.jsonl")
        images.val.bad_images = bad_images
        coco = images.val.source.coco
        category_ids = match_categories(detector, coco, distributed)
        loader = create_example_val_loader(images.val, data, distributed, collate)
        distributed.print_primary(
            f"{detector.title}, {detector.parameters / 1e6:.1f} M parameters, {len(detector.label_names)} classes, "
            f"{len(images.val)} images, shorter side {detector.model.transform.min_size[-1]} and longer side at most "
            f"{detector.model.transform.max_size} pixels, on "
            f"{f'{distributed.size} x ' if distributed.size > 1 else ''}{distributed.device.type}"
        )
        found, speed = _detect_all(detector, loader, category_ids, config, distributed)
        gathered = gather_detections(found, distributed)
        if not distributed.is_primary:
            return
        scores = compute_scores(coco, gathered, coco.with_masks)
        for line in describe_scores(scores):
            print(line)
        if speed:
            print(f"{speed:.1f} images/s, including data loading")
        for name in sorted(bad_images.names()):
            print(f"warning: {name} cannot be read and was skipped", file=sys.stderr)
        if output is not None:
            results = {
                **scores.values,
                "images": scores.images,
                "objects": scores.objects,
                "skipped": len(bad_images.names()),
                "images_per_second": speed,
                **_describe(config, detector, coco, distributed),
            }
            write_results(output, results, scores, gathered)
            print(f"results are in {output}")


def match_categories(detector: OpenedDetector, coco: Coco, distributed: Distributed) -> list[int | None]:
    """Returns the category id in the annotations for each label of a detector.

    Categories are matched by their names. If the names do not identify them, ids and names must be the same.

    Args:
        detector: The detector.
        coco: The annotations.
        distributed: Prints a note about classes that the annotations do not have.

    Returns:
        Category id of each label, from label 1 on; None for a class that the annotations do not have.

    Raises:
        CommandError: If the annotations have categories that the detector does not know.
    """
    names, ids = detector.label_names, detector.category_ids
    if (ids, names) == (coco.category_ids, coco.names):
        return list(ids)
    by_name = dict(zip(coco.names, coco.category_ids, strict=True))
    if len(by_name) < len(coco.names) or len(set(names)) < len(names):
        raise CommandError(f"{coco.path} has other categories than the model, and class names that appear twice")
    unknown = [name for name in coco.names if name not in names]
    if unknown:
        raise CommandError(
            f"the model has no class {unknown[0]!r}, which is in {coco.path}; its classes are "
            f"{', '.join(names[:3])}{', …' if len(names) > 3 else ''}"
        )
    unused = [name for name in names if name not in by_name]
    if unused:
        distributed.print_primary(
            f"{len(unused)} classes of the model are not in {coco.path} and do not count: {', '.join(unused[:3])}"
            f"{', …' if len(unused) > 3 else ''}"
        )
    return [by_name.get(name) for name in names]


def _detect_all(
    detector: OpenedDetector,
    loader: Any,
    category_ids: Sequence[int | None],
    config: ValidationConfig,
    distributed: Distributed,
) -> tuple[list[Detections], float]:
    """Returns this process's detections, and all processes' images per second."""
    found: list[Detections] = []
    first, since = 0, time.perf_counter()
    with progress_bar(len(loader), "batch", distributed.is_primary) as bar:
        for images, targets in loader:
            moved = to_device(images, distributed.device, DTYPES[config.device.model_dtype])
            with autocast(config.device, distributed.device):
                found += detect(detector.model, moved, [target["image_id"] for target in targets], category_ids)
            if first == 0:
                first, since = len(found), time.perf_counter()  # the first batch includes the start of the loader
            bar.update()
    images_done = len(found) - first
    own = images_done / (time.perf_counter() - since) if images_done else 0.0
    return found, sum(distributed.gather(own))


# ---------------------------------------------------------------------------------------------------------------------
# Results


def describe_scores(scores: Scores) -> Iterable[str]:
    """Yields a line of metrics for the boxes and, if there are any, for the masks."""
    for kind in ("box", "mask"):
        if f"{kind}_AP" not in scores.values:
            continue
        parts = [
            f"{title} {value:.2f} %"
            for name, title in (
                ("AP", f"{kind} AP"),
                ("AP50", "AP50"),
                ("AP75", "AP75"),
                ("APs", "small"),
                ("APm", "medium"),
                ("APl", "large"),
                ("AR100", "recall of 100"),
            )
            if not math.isnan(value := scores.values[f"{kind}_{name}"])
        ]
        yield f"{', '.join(parts)}; {scores.objects} objects in {scores.images} images"


def write_results(folder: Path, results: dict[str, Any], scores: Scores, found: Sequence[Detections]) -> None:
    """Writes results.json, per_class.csv and detections.json.

    Raises:
        CommandError: If a file cannot be written.
    """
    names = [f"{kind}_{name}" for kind in ("box", "mask") for name in METRICS[:3] if f"{kind}_AP" in scores.values]

    def write_classes(path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["category_id", "name", "objects", *names])
            for one in scores.classes:
                values = [one.scores[name] for name in names]
                numbers = ["" if math.isnan(value) else f"{value:.4f}" for value in values]
                writer.writerow([one.category_id, one.name, one.objects, *numbers])

    try:
        atomic_write(folder / "per_class.csv", write_classes)
        found_results = [result for one in found for result in one.to_coco()]
        atomic_write(folder / "detections.json", partial(write_detections, found_results))
        text = json.dumps(redact_values(without_nan(results)), indent=2) + "\n"
        atomic_write(folder / "results.json", lambda path: path.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise CommandError(f"cannot write to --output {folder}: {reason(error)}") from error


def write_detections(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Writes detections in COCO's results format, one a line.

    Raises:
        OSError: If the file cannot be written.
    """
    with path.open("w", encoding="utf-8") as file:
        file.write("[\n")
        for place, result in enumerate(results):
            file.write(json.dumps(result) + (",\n" if place + 1 < len(results) else "\n"))
        file.write("]\n")


def without_nan(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the values with None instead of NaN, which JSON does not have."""
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in values.items()}


def _describe(
    config: ValidationConfig, detector: OpenedDetector, coco: Coco, distributed: Distributed
) -> dict[str, Any]:
    """Returns the settings that produced the results."""
    device, is_cuda = config.device, distributed.device.type == "cuda"
    recipe = detector.model.recipe
    return {
        "model": recipe.builder,
        "backbone": recipe.args["backbone"],
        "checkpoint": config.source.checkpoint,
        "test_size": detector.model.transform.min_size[-1],
        "max_size": detector.model.transform.max_size,
        "annotations": str(coco.path),
        "device": torch.cuda.get_device_name() if is_cuda else distributed.device.type,
        "dtype": f"{device.amp_dtype} (amp)" if device.amp else device.model_dtype,
        "batch_size": config.data.validation_batch_size or config.data.batch_size,
        "processes": distributed.size,
        "versions": {
            "stvit": stvit.__version__,
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "timm": timm.__version__,
        },
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }

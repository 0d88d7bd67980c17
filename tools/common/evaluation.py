"""Accuracy of a classifier on a dataset."""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from timm.task.evaluator import ClassificationEvaluator

from .cli import CommandError, reason
from .data import check_targets
from .distributed import Distributed
from .files import read_utf8

# Images (B, C, H, W) and their class numbers (B,), -1 for images that could not be read.
Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]


def class_names(class_map: str | None, model: Any) -> list[str] | None:
    """Returns the model's class names in order; None if they are unknown.

    Args:
        class_map: File of names, one per line; None for the names stored with the weights.
        model: The classifier.

    Raises:
        CommandError: If the file cannot be read, or its number of names is not the model's number of classes.
    """
    if class_map is None:
        known = model.pretrained_cfg.get("label_names")
        return list(known) if known is not None and len(known) == model.num_classes else None
    try:
        lines = read_utf8(Path(class_map)).splitlines()
    except FileNotFoundError as error:
        raise CommandError(f"--class-map {class_map} does not exist") from error
    except (OSError, ValueError) as error:
        raise CommandError(f"cannot read --class-map {class_map}: {reason(error)}") from error
    names = [line.strip() for line in lines if line.strip()]
    if len(names) != model.num_classes:
        raise CommandError(
            f"--class-map {class_map} has {len(names)} class names, but the model has {model.num_classes} classes"
        )
    return names


def map_classes(
    model_names: Sequence[str] | None, data_names: Sequence[str] | None, num_classes: int, distributed: Distributed
) -> torch.Tensor | None:
    """Returns the model's class number of each class of the dataset.

    Args:
        model_names: The model's class names, as `class_names` returns them.
        data_names: Class names of the dataset, in the order of its class numbers; None if it has none.
        num_classes: Number of classes of the model.
        distributed: Prints a note if the names are ignored.

    Returns:
        Class numbers (K,), on the device; None if the numbers of the model and the dataset are the same.

    Raises:
        CommandError: If the dataset has classes that the model does not have.
    """
    if data_names is None or data_names == model_names:
        return None
    if model_names is not None:
        numbers = {name: number for number, name in enumerate(model_names)}
        unknown = [name for name in data_names if name not in numbers]
        if not unknown:
            return torch.tensor([numbers[name] for name in data_names], device=distributed.device)
        if len(unknown) < len(data_names) or len(data_names) != num_classes:
            raise CommandError(
                f"the model has no class {unknown[0]!r}, which is in the dataset; its classes are "
                f"{', '.join(model_names[:3])}, …; rename the class folders, or pass --class-map"
            )
        distributed.print_primary(
            "no class name of the dataset is known to the model; assuming that both have the same class order"
        )
    if len(data_names) != num_classes:
        raise CommandError(
            f"the dataset has {len(data_names)} classes, but the model has {num_classes}; pass the model's class names "
            "in order with --class-map FILE"
        )
    return None


def mapped(loader: Batches, class_map: torch.Tensor | None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields batches with the model's class numbers. Class number -1 does not change."""
    for image, target in loader:
        yield image, target if class_map is None else torch.where(target < 0, target, class_map[target.clamp(min=0)])


def evaluate(
    model: Any,
    loader: Batches,
    distributed: Distributed,
    context: AbstractContextManager[Any] | None = None,
    channels_last: bool = False,
    on_batch: Callable[[torch.Tensor, torch.Tensor], None] | None = None,
) -> OrderedDict[str, float]:
    """Evaluates a classifier on the images of all processes.

    Every process must call this.

    Args:
        model: Maps images (B, C, H, W) to logits (B, K). It is put into evaluation mode.
        loader: This process's images and class numbers. Images of class -1 do not count.
        distributed: The processes that share the images. Their shares may differ in size.
        context: Context of the forward pass.
        channels_last: Whether to convert images to channels_last.
        on_batch: Receives the logits and class numbers of each batch.

    Returns:
        Mean cross-entropy `loss`, `top1` and `top5` in percent.

    Raises:
        CommandError: If no image can be read.
    """
    model.eval()
    evaluator = ClassificationEvaluator(device=distributed.device)
    with torch.no_grad():
        for image, target in loader:
            if channels_last:
                image = image.contiguous(memory_format=torch.channels_last)
            with context or nullcontext():
                output = model(image)
            if evaluator.num_samples == 0 or distributed.device.type == "cpu":
                check_targets(target, output.shape[1], "validation")
            counts = target >= 0
            evaluator.update(output[counts], target[counts])
            if on_batch is not None:
                on_batch(output, target)
    if sum(distributed.gather(evaluator.num_samples)) == 0:
        raise CommandError("no readable image in the validation set; check --data-dir and --val-split")
    return evaluator.compute(distributed=distributed.size > 1)


def confidence_interval(correct: int, images: int) -> tuple[float, float]:
    """Returns the 95 % confidence interval of an accuracy, from 0 to 1 (Wilson 1927).

    Args:
        correct: Number of correctly classified images.
        images: Number of images, drawn independently.
    """
    if images == 0:
        return 0.0, 1.0
    z = 1.959964  # 95 % of a normal distribution is within z standard deviations
    share = correct / images
    center = (share + z * z / (2 * images)) / (1 + z * z / images)
    half = z / (1 + z * z / images) * math.sqrt(share * (1 - share) / images + z * z / (4 * images * images))
    return max(0.0, center - half), min(1.0, center + half)

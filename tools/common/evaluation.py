"""Accuracy of a model on a set of images, each counted once under the model's number of its class."""

import argparse
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from timm.task.evaluator import ClassificationEvaluator

from stvit.tools.common.cli import CommandError, read_utf8, reason
from stvit.tools.common.data import check_targets
from stvit.tools.common.processes import World

# Images (B, C, H, W) and the numbers of their classes (B,), -1 of an image that could not be read.
Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]


def add_class_map_argument(group: Any) -> None:
    """The flag that `class_names` reads."""
    group.add_argument("--class-map", metavar="FILE", help="the model's class names, one a line, in order")


def class_names(args: argparse.Namespace, model: Any) -> list[str] | None:
    """The model's class names in its order: of the file `class_map`, or as its weights come with them.

    Raises:
        CommandError: If the file cannot be read, or has another number of names than the model has classes.
    """
    if args.class_map is None:
        known = model.pretrained_cfg.get("label_names")
        return list(known) if known is not None and len(known) == model.num_classes else None
    try:
        lines = read_utf8(Path(args.class_map)).splitlines()
    except (OSError, ValueError) as error:
        raise CommandError(f"cannot read --class-map {args.class_map}: {reason(error)}") from error
    names = [line.strip() for line in lines if line.strip()]
    if len(names) != model.num_classes:
        raise CommandError(
            f"--class-map {args.class_map} has {len(names)} class names, and the model {model.num_classes} classes"
        )
    return names


def map_classes(
    model_names: list[str] | None, data_names: list[str] | None, num_classes: int, world: World
) -> torch.Tensor | None:
    """The model's number of each of the images' classes (K,), on the device; None if they are the same.

    Args:
        model_names: As `class_names` returns them.
        data_names: Of the images, in the order of their numbers; None if they have none.
        num_classes: Of the model.
        world: To say that names were not used.

    Raises:
        CommandError: If the images have classes that the model has not.
    """
    if data_names is None or data_names == model_names:
        return None
    if model_names is not None:
        numbers = {name: number for number, name in enumerate(model_names)}
        unknown = [name for name in data_names if name not in numbers]
        if not unknown:
            return torch.tensor([numbers[name] for name in data_names], device=world.device)
        if len(unknown) < len(data_names) or len(data_names) != num_classes:
            raise CommandError(
                f"the model does not know the class {unknown[0]!r} of the images, its classes are "
                f"{', '.join(model_names[:3])}, …: rename the folders, or give --class-map"
            )
        world.say("none of the classes' names are the model's: they are taken to be in the model's order")
    if len(data_names) != num_classes:
        raise CommandError(
            f"the images have {len(data_names)} classes, the model {num_classes}: give its class names, in order, as "
            "--class-map FILE"
        )
    return None


def mapped(loader: Batches, class_map: torch.Tensor | None) -> Batches:
    """Batches under the model's class numbers; those of class -1 stay so."""
    for image, target in loader:
        yield image, target if class_map is None else torch.where(target < 0, target, class_map[target.clamp(min=0)])


def evaluate(
    model: Any,
    loader: Batches,
    world: World,
    context: AbstractContextManager[Any] | None = None,
    channels_last: bool = False,
    on_batch: Callable[[torch.Tensor, torch.Tensor], None] | None = None,
) -> OrderedDict[str, float]:
    """One pass over the images of all processes, whose shares may differ in size.

    Args:
        model: Images (B, C, H, W) to logits (B, K); put into evaluation mode.
        loader: Images and class numbers; those of class -1 are not counted.
        world: The processes that share the images. Each must call this.
        context: Context to compute the logits in.
        channels_last: Memory format of the images.
        on_batch: Called with the logits and the class numbers of each batch, before the next one is read. What it
            raises ends the pass.

    Returns:
        Mean cross-entropy `loss`, `top1` and `top5` in percent.

    Raises:
        CommandError: If there is nothing to count.
    """
    model.eval()
    evaluator = ClassificationEvaluator(device=world.device)
    with torch.no_grad():
        for image, target in loader:
            if channels_last:
                image = image.contiguous(memory_format=torch.channels_last)
            with context or nullcontext():
                output = model(image)
            if evaluator.num_samples == 0 or world.device.type == "cpu":
                check_targets(target, output.shape[1], "validation")
            counts = target >= 0
            evaluator.update(output[counts], target[counts])
            if on_batch is not None:
                on_batch(output, target)
    if sum(world.gather(evaluator.num_samples)) == 0:
        raise CommandError("none of the validation images could be counted: there is none, or none can be read")
    return evaluator.compute(distributed=world.size > 1)


def confidence_interval(correct: int, images: int) -> tuple[float, float]:
    """The 95 % confidence interval of an accuracy, from 0 to 1 (Wilson 1927).

    Args:
        correct: Images that were classified rightly.
        images: Of how many, drawn independently.
    """
    if images == 0:
        return 0.0, 1.0
    z = 1.959964  # of the normal distribution, 95 % lie within z deviations
    share = correct / images
    center = (share + z * z / (2 * images)) / (1 + z * z / images)
    half = z / (1 + z * z / images) * math.sqrt(share * (1 - share) / images + z * z / (4 * images * images))
    return max(0.0, center - half), min(1.0, center + half)

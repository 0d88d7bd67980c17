"""Accuracy of a model on a set of images, each counted once."""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from timm.task.evaluator import ClassificationEvaluator

from stvit.tools.common.cli import CommandError
from stvit.tools.common.data import check_targets
from stvit.tools.common.processes import World


def evaluate(
    model: Any,
    loader: Iterable[tuple[torch.Tensor, torch.Tensor]],
    world: World,
    context: AbstractContextManager[Any] | None = None,
    channels_last: bool = False,
    on_batch: Callable[[torch.Tensor, torch.Tensor], None] | None = None,
) -> OrderedDict[str, float]:
    """One pass over the images of all processes, whose shares may differ in size.

    Args:
        model: Images (B, C, H, W) to logits (B, K); put into evaluation mode.
        loader: Images and class numbers (B,); those of class -1 are not counted.
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

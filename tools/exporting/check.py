"""Compares an exported file with the model at three image sizes."""

import math
from pathlib import Path

import torch
import torch.nn.functional as F

from ..common.cli import CommandError, reason
from .config import TOLERANCES
from .formats import Runtime
from .sizes import Bounds, ServedSizes, Size
from .source import Outputs, SourceModel


def check_file(
    source: SourceModel, file: Runtime, sizes: ServedSizes, samples: torch.Tensor | None, dtype: str, path: Path
) -> str:
    """Checks that a file computes the same as the model.

    Args:
        source: The model.
        file: The opened file.
        sizes: Image sizes that the file accepts.
        samples: Real images (B, C, H, W) to compare on; None for noise.
        dtype: Precision of the file.
        path: Path of the file, for messages.

    Returns:
        A line with the differences.

    Raises:
        CommandError: If the file fails, or differs by more than the tolerance of the precision.
    """
    tolerance = TOLERANCES[dtype]
    generator = torch.Generator().manual_seed(0)
    found = []
    for batch, (height, width) in enumerate(_check_sizes(source, sizes), start=1):
        if samples is None:
            images = torch.randn(batch, source.channels, height, width, generator=generator)
        else:
            images = F.interpolate(
                samples[torch.arange(batch) % len(samples)], (height, width), mode="bicubic", antialias=True
            )
        expected = source(images)
        try:
            outputs = file(images)
        except Exception as error:  # each runtime has its own errors
            raise CommandError(
                f"{path} does not run on images of {height}x{width}: {reason(error)[:300]}; nothing was written"
            ) from error
        difference = _difference(outputs, expected)
        found.append(f"{batch}x{height}x{width} {difference:.1e}")
        if not difference <= tolerance:
            raise CommandError(
                f"{path} differs from the model: on {batch} images of {height}x{width} it differs by {difference:.2g} "
                f"standard deviations of the output, expected at most {tolerance:g} for {dtype}; nothing was written; "
                "pass another --format or --dtype, or --no-check to write the file anyway"
            )
    return f"largest difference in standard deviations of the output: {', '.join(found)} (at most {tolerance:g})"


def _check_sizes(source: SourceModel, sizes: ServedSizes) -> list[Size]:
    """Returns three image sizes for the check of a file.

    These are the model's own size, a rectangle, and a size that the stride does not divide: 224x224, 160x256 and
    203x171 for a model of 224 pixels. They are limited to the sizes that the file accepts.
    """

    def within(length: int, bounds: Bounds) -> int:
        return max(bounds[0], length if bounds[1] is None else min(length, bounds[1]))

    height, width = source.size
    lower, wider = max(1, height * 5 // 7 // 32) * 32, math.ceil(width * 8 / 7 / 32) * 32
    rectangle = within(lower, sizes.height), within(wider, sizes.width)
    if rectangle[0] == rectangle[1]:
        rectangle = within(lower * 3 // 4, sizes.height), rectangle[1]
    odd = within(height * 203 // 224 | 1, sizes.height), within(width * 171 // 224 | 1, sizes.width)
    # A model with windows accepts fewer sizes than its operations.
    return [source.size, *(size if source.accepts(*size) else source.size for size in (rectangle, odd))]


def _difference(outputs: Outputs, expected: Outputs) -> float:
    """Returns the largest difference of all outputs, in standard deviations.

    Each output has its own standard deviation. Different shapes give inf, and values that are not finite give nan.
    """
    if [y.shape for y in outputs] != [y.shape for y in expected]:
        return math.inf
    found = []
    for ours, model in zip(outputs, expected, strict=True):
        deviation = model.std(correction=0)
        found.append((ours - model).abs().max() / (deviation if deviation > 0 else model.abs().max() + 1e-12))
    return torch.stack(found).max().item()  # max() propagates nan

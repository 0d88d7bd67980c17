"""Compares exported files with the model over the validation images."""

from collections.abc import Mapping

import torch

from ..common.cli import CommandError, progress_bar
from ..common.data import check_targets
from ..common.evaluation import Batches
from .data import ExportData
from .formats import Runtime
from .source import SourceModel


def compare_files(source: SourceModel, files: Mapping[str, Runtime], data: ExportData, features: bool) -> list[str]:
    """Compares files with the model and returns lines to print.

    Args:
        source: The model.
        files: Opened files by name.
        data: Validation images.
        features: Whether the outputs are feature maps. If True, the lines contain the differences of the maps. If
            False, they contain the top-1 accuracies.

    Raises:
        CommandError: If no image can be read, or the model has fewer classes than the images.
    """
    loader = data.loader(data.images.val)
    with progress_bar(len(loader), "batch", True) as bar:
        batches = data.readable_batches(loader, bar)
        return _compare_features(source, files, batches) if features else _compare_accuracy(source, files, batches)


def _compare_accuracy(source: SourceModel, files: Mapping[str, Runtime], batches: Batches) -> list[str]:
    """Returns a line with the accuracy of the model and of each file."""
    # Numbers of images, by file name. The key "" is the model itself.
    seen, right, different = 0, dict.fromkeys(["", *files], 0), dict.fromkeys(files, 0)
    for image, target in batches:
        check_targets(target, source.model.num_classes, "validation")
        predicted = source(image)[0].argmax(dim=1)
        seen += len(target)
        right[""] += int((predicted == target).sum())
        for name, file in files.items():
            other = file(image)[0].argmax(dim=1)
            right[name] += int((other == target).sum())
            different[name] += int((other != predicted).sum())
    _check_seen(seen)
    lines = [f"top-1 of PyTorch in float32: {100 * right[''] / seen:.2f} % of {seen} images"]
    for name in files:
        accuracy = f"{100 * right[name] / seen:.2f} % of {seen} images"
        lines.append(f"top-1 of {name}: {accuracy}, {different[name]} different predictions")
    return lines


def _compare_features(source: SourceModel, files: Mapping[str, Runtime], batches: Batches) -> list[str]:
    """Returns a line for each file with the differences of its feature maps.

    The difference of a map is its root mean square error, divided by the standard deviation of the model's map.
    """
    seen = 0
    # Sums over images, by file name. The key "" holds the variances of the model's maps, the others squared errors.
    sums = {name: torch.zeros(len(source.names), dtype=torch.float64) for name in ["", *files]}
    for image, target in batches:
        seen += len(target)
        expected = source(image)
        sums[""] += torch.stack([y.double().var(correction=0) * len(target) for y in expected])
        for name, file in files.items():
            pairs = zip(file(image), expected, strict=True)
            sums[name] += torch.stack([(got - y).double().square().mean() * len(target) for got, y in pairs])
    _check_seen(seen)
    lines = []
    for name in files:
        shares = (sums[name] / sums[""]).sqrt().tolist()
        words = ", ".join(f"{output} {share:.1e}" for output, share in zip(source.names, shares, strict=True))
        lines.append(f"root mean square difference of {name} in standard deviations, {seen} images: {words}")
    return lines


def _check_seen(images: int) -> None:
    if images == 0:
        raise CommandError("no readable image in the validation set; check --data-dir and --val-split")

"""Measures how well super tokens and SLIC superpixels follow true masks."""

import csv
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image

import stvit
from stvit import visualize
from stvit.superpixels import boundaries, boundary_recall, undersegmentation_error

from ..common.cli import CommandError, reason
from ..common.files import atomic_write
from ..common.image_files import ImageError, open_mask
from .config import DrawConfig
from .pictures import save

__all__ = ["find_masks", "measure", "open_truth", "reduce_to_map", "require_slic", "write_measures"]


def require_slic() -> None:
    """Raises a `CommandError` if scikit-image, which has SLIC, is not installed."""
    try:
        import skimage.segmentation  # noqa: F401
    except ImportError as error:
        raise CommandError(f"--masks needs scikit-image for SLIC: pip install 'stvit[visualize]' ({error})") from error


def find_masks(folder: Path, images: Sequence[Path]) -> list[Path]:
    """Returns the mask of each image.

    Args:
        folder: Contains NAME.png or NAME_mask.png for an image NAME.jpg.
        images: Images in any folder.

    Raises:
        CommandError: If an image has no mask.
    """
    found = []
    for image in images:
        candidates = [folder / f"{image.stem}{end}" for end in (".png", "_mask.png")]
        mask = next((path for path in candidates if path.is_file()), None)
        if mask is None:
            names = f"{candidates[0].name} or {candidates[1].name}"
            raise CommandError(f"--masks {folder}: no mask for {image.name}; expected {names}")
        found.append(mask)
    return found


def open_truth(path: Path, image: Image.Image) -> np.ndarray:
    """Returns the values of a mask, (H, W).

    Raises:
        ImageError: If the file cannot be read or does not have one value per pixel of the image.
    """
    mask = open_mask(path)
    if mask.ndim != 2 or mask.shape != (image.height, image.width):
        raise ImageError(
            f"mask {path}: expected one value per pixel of the image, [{image.height}, {image.width}], got shape "
            f"{list(mask.shape)}; save the mask with one channel and the size of the image"
        )
    return mask


def measure(view: visualize.SuperTokens, mask: np.ndarray, path: Path, config: DrawConfig) -> list[dict[str, Any]]:
    """Compares super tokens, SLIC superpixels and cells with a mask.

    Cells are the regular grid from which super tokens start. The function also writes a picture with the regions of all
    methods.

    Args:
        view: Super tokens.
        mask: True segment of each pixel, (H, W), in the size of the original image.
        path: File of the picture.
        config: Settings.

    Returns:
        One dictionary for each method: number of regions, boundary recall and undersegmentation error.

    Raises:
        ImageError: If the mask has no boundary, or all of its pixels are void.
    """
    width, height = view.image.size
    truth = np.array(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))
    number = len(np.unique(view.assignment))
    h, w = view.map_assignment.shape
    cells = np.arange(h)[:, None] // view.stoken_size[0] * w + np.arange(w)[None] // view.stoken_size[1]
    methods = {
        "super tokens": view.assignment,
        "SLIC": _slic(view.image, number),
        "SLIC at the map's resolution": view.to_image(_slic(reduce_to_map(view), number)),
        "cells": view.to_image(cells),
    }
    rows, panels = [], []
    for method, regions in methods.items():
        try:
            recall = boundary_recall(regions, truth, config.tolerance, config.void)
            leak = undersegmentation_error(regions, truth, config.void)
        except ValueError as error:
            raise ImageError(str(error)) from error
        rows.append(
            {
                "method": method,
                "regions": len(np.unique(regions)),
                "boundary_recall": round(recall, 4),
                "undersegmentation_error": round(leak, 4),
            }
        )
        picture = np.array(visualize.draw_boundaries(view.image, regions))
        outline = boundaries(truth, config.void).repeat(view.scale, axis=0).repeat(view.scale, axis=1)
        picture[outline] = visualize.MARK_COLOR
        name = method.replace("SLIC at the map's resolution", "SLIC, coarse")
        panels.append((f"{name}: BR {recall:.3f}, UE {leak:.3f}", Image.fromarray(picture)))
    save(visualize.contact_sheet(panels, columns=2), path)
    return rows


def reduce_to_map(view: visualize.SuperTokens) -> Image.Image:
    """Reduces the image to the resolution of the feature map, (h, w).

    This is the reverse of `SuperTokens.to_image`: each value is the mean color of the image pixels that belong to this
    pixel of the feature map. At the borders, the image is continued with its outermost pixels.
    """
    pixels, stride = np.asarray(view.image), view.stride
    padding = []
    for size, before, cells in zip(pixels.shape, view.offset, view.map_assignment.shape, strict=False):
        start = before + stride // 2
        padding.append((start, max(0, cells * stride - start - size)))
    h, w = view.map_assignment.shape
    padded = np.pad(pixels, (*padding, (0, 0)), mode="edge")[: h * stride, : w * stride]
    means = padded.reshape(h, stride, w, stride, 3).mean(axis=(1, 3))
    return Image.fromarray(means.round().astype(np.uint8))


def _slic(image: Image.Image, number: int) -> np.ndarray:
    """Returns a map (H, W) of about `number` SLIC superpixels.

    SLIC rarely returns exactly the requested number. Up to eight requests are tried, and the closest result is kept.
    """
    from skimage.segmentation import slic

    pixels = np.asarray(image)
    best: np.ndarray | None = None
    requested = float(number)
    for _ in range(8):
        regions = slic(pixels, n_segments=max(1, round(requested)), start_label=0)
        found = len(np.unique(regions))
        if best is None or abs(found - number) < abs(len(np.unique(best)) - number):
            best = regions
        if found == number:
            break
        requested *= number / found
    assert best is not None
    return np.asarray(best)


def write_measures(title: str, rows: list[dict[str, Any]], config: DrawConfig) -> None:
    """Writes measures.csv and prints the means of each stage and method."""
    path = config.output / "measures.csv"
    origin = {
        "model": title,
        "img_size": config.img_size,
        "versions": f"stvit {stvit.__version__}, torch {torch.__version__}, timm {timm.__version__}",
        "date": datetime.now(timezone.utc).date().isoformat(),
    }

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*rows[0], *origin])
            writer.writeheader()
            writer.writerows({**row, **origin} for row in rows)

    try:
        atomic_write(path, write)
    except OSError as error:
        raise CommandError(f"cannot write {path}: {reason(error)}") from error
    print(f"{'stage':5}  {'method':30} {'regions':>8} {'boundary recall':>16} {'undersegmentation':>18}")
    for stage in sorted({row["stage"] for row in rows}):
        for method in dict.fromkeys(row["method"] for row in rows):
            selected = [row for row in rows if (row["stage"], row["method"]) == (stage, method)]
            columns = ("regions", "boundary_recall", "undersegmentation_error")
            means = [fmean(row[key] for row in selected) for key in columns]
            print(f"{stage:5}  {method:30} {means[0]:8.0f} {means[1]:16.3f} {means[2]:18.3f}")

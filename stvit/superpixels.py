"""Measures how well superpixels and super tokens follow the outlines of objects.

Every function compares a map of regions with the true segmentation. Both are (H, W) arrays of integers.

Sources:
    Boundary recall: Martin, Fowlkes and Malik, PAMI 2004, with the tolerance of Stutz, Hermans and Leibe, "Superpixels:
        an evaluation of the state of the art", CVIU 2018.
    Undersegmentation error: Neubert and Protzel, "Superpixel benchmark and comparison", 2012.
"""

import math

import numpy as np

__all__ = ["boundaries", "boundary_recall", "undersegmentation_error"]


def boundary_recall(
    regions: np.ndarray, truth: np.ndarray, tolerance: int | None = None, void: int | None = None
) -> float:
    """Returns the fraction of the true boundary that lies near a region boundary.

    1 is best. More regions never lower the value, so compare maps with the same number of regions.

    Args:
        regions: Region of each pixel, (H, W).
        truth: True segment of each pixel, (H, W).
        tolerance: Largest distance along each axis, in pixels (default: 0.0025 times the image diagonal).
        void: Value of unknown pixels in `truth`. Their boundaries do not count.

    Raises:
        ValueError: If the maps differ in shape, the tolerance is negative, or the segmentation has no boundary.
    """
    _check_maps(regions, truth)
    if tolerance is None:
        tolerance = round(0.0025 * math.hypot(*truth.shape))
    if tolerance < 0:
        raise ValueError(f"tolerance must be at least 0 pixels, got {tolerance}")
    true_boundary = boundaries(truth, void)
    if not true_boundary.any():
        raise ValueError("the segmentation has no boundary, so boundary recall is undefined")
    return float(_dilate(boundaries(regions), tolerance)[true_boundary].mean())


def undersegmentation_error(regions: np.ndarray, truth: np.ndarray, void: int | None = None) -> float:
    """Returns the fraction of pixels by which regions leak over true outlines.

    The range is 0 to 1, and 0 is best. A true segment divides each region that it overlaps into a part inside and a
    part outside the segment. The smaller part counts as the leak.

    Args:
        regions: Region of each pixel, (H, W).
        truth: True segment of each pixel, (H, W).
        void: Value of unknown pixels in `truth`. These pixels do not count.

    Raises:
        ValueError: If the maps differ in shape or all pixels are unknown.
    """
    _check_maps(regions, truth)
    known = np.ones(truth.shape, dtype=bool) if void is None else truth != void
    if not known.any():
        raise ValueError(f"all pixels of the segmentation are void ({void})")
    _, region = np.unique(regions[known], return_inverse=True)
    _, segment = np.unique(truth[known], return_inverse=True)
    pairs, inside = np.unique(np.stack([region, segment]), axis=1, return_counts=True)
    sizes = np.bincount(region)[pairs[0]]
    return float(np.minimum(inside, sizes - inside).sum() / known.sum())


def boundaries(regions: np.ndarray, void: int | None = None) -> np.ndarray:
    """Returns a mask (H, W) of the pixels at region boundaries.

    These pixels have a neighbor of another value above, below, left or right.

    Args:
        regions: Region of each pixel, (H, W).
        void: Value of unknown pixels. They have no boundary.
    """
    mask = np.zeros(regions.shape, dtype=bool)
    for axis in (0, 1):
        first, second = (np.take(regions, range(i, regions.shape[axis] - 1 + i), axis=axis) for i in (0, 1))
        differs = first != second
        if void is not None:
            differs &= (first != void) & (second != void)
        edge = np.zeros_like(np.take(mask, [0], axis=axis))
        mask |= np.concatenate([differs, edge], axis=axis) | np.concatenate([edge, differs], axis=axis)
    return mask


def _dilate(mask: np.ndarray, distance: int) -> np.ndarray:
    """Adds all pixels that are at most `distance` pixels away along each axis."""
    for axis in (0, 1):
        padding = [(distance, distance) if i == axis else (0, 0) for i in (0, 1)]
        padded = np.pad(mask, padding)
        windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * distance + 1, axis=axis)
        mask = np.asarray(windows.any(axis=-1))
    return mask


def _check_maps(regions: np.ndarray, truth: np.ndarray) -> None:
    if regions.ndim != 2 or regions.shape != truth.shape or regions.size == 0:
        raise ValueError(
            f"regions and truth must be (H, W) maps of the same shape, got {list(regions.shape)} and "
            f"{list(truth.shape)}"
        )

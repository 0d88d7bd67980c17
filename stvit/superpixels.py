"""How well regions of an image keep to the outlines of what is in it: measures for superpixels and super tokens.

Both compare a map of regions with a true segmentation, (H, W) each, of any integers.

Sources: boundary recall, Martin, Fowlkes and Malik, PAMI 2004, with the tolerance of Stutz, Hermans and Leibe,
"Superpixels: an evaluation of the state of the art", CVIU 2018; undersegmentation error, Neubert and Protzel,
"Superpixel benchmark and comparison", 2012.
"""

import math

import numpy as np

__all__ = ["boundaries", "boundary_recall", "undersegmentation_error"]


def boundary_recall(
    labels: np.ndarray, truth: np.ndarray, tolerance: int | None = None, void: int | None = None
) -> float:
    """The share of the true boundary that has a boundary of the regions near it, from 0 to 1; 1 is best.

    It never falls when regions are cut further: compare maps of as many regions.

    Args:
        labels: Regions, (H, W).
        truth: Segmentation, (H, W).
        tolerance: How far a boundary may be off, in pixels of each axis; None for 0.0025 times the diagonal.
        void: Value of `truth` where it is unknown: nothing is asked there.

    Raises:
        ValueError: If the two are not maps of one size, the tolerance is negative, or there is no true boundary.
    """
    _check(labels, truth)
    if tolerance is None:
        tolerance = round(0.0025 * math.hypot(*truth.shape))
    if tolerance < 0:
        raise ValueError(f"tolerance must be at least 0 pixels, got {tolerance}")
    wanted = boundaries(truth, void)
    if not wanted.any():
        raise ValueError("the segmentation has no boundary: boundary recall is not defined")
    return float(_grown(boundaries(labels), tolerance)[wanted].mean())


def undersegmentation_error(labels: np.ndarray, truth: np.ndarray, void: int | None = None) -> float:
    """The share of the pixels that leak over true outlines, from 0 to 1; 0 is best.

    Of each region and each true segment that it meets, the smaller one of its parts inside and outside counts.

    Args:
        labels: Regions, (H, W).
        truth: Segmentation, (H, W).
        void: Value of `truth` where it is unknown: those pixels are left out.

    Raises:
        ValueError: If the two are not maps of one size, or nothing is known.
    """
    _check(labels, truth)
    known = np.ones(truth.shape, dtype=bool) if void is None else truth != void
    if not known.any():
        raise ValueError(f"all of the segmentation is void ({void})")
    _, region = np.unique(labels[known], return_inverse=True)
    _, segment = np.unique(truth[known], return_inverse=True)
    pairs, inside = np.unique(np.stack([region, segment]), axis=1, return_counts=True)
    sizes = np.bincount(region)[pairs[0]]
    return float(np.minimum(inside, sizes - inside).sum() / known.sum())


def boundaries(labels: np.ndarray, void: int | None = None) -> np.ndarray:
    """Pixels that touch, above, below, left or right, one of another value; (H, W) of dtype bool.

    Args:
        labels: (H, W)
        void: A value beside which there is no boundary.
    """
    found = np.zeros(labels.shape, dtype=bool)
    for axis in (0, 1):
        first, second = (np.take(labels, range(i, labels.shape[axis] - 1 + i), axis=axis) for i in (0, 1))
        differ = first != second
        if void is not None:
            differ &= (first != void) & (second != void)
        missing = np.zeros_like(np.take(found, [0], axis=axis))
        found |= np.concatenate([differ, missing], axis=axis) | np.concatenate([missing, differ], axis=axis)
    return found


def _grown(mask: np.ndarray, distance: int) -> np.ndarray:
    """The mask and what is at most so many pixels away from it in each axis."""
    for axis in (0, 1):
        padding = [(distance, distance) if i == axis else (0, 0) for i in (0, 1)]
        padded = np.pad(mask, padding)
        windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * distance + 1, axis=axis)
        mask = np.asarray(windows.any(axis=-1))
    return mask


def _check(labels: np.ndarray, truth: np.ndarray) -> None:
    if labels.ndim != 2 or labels.shape != truth.shape or labels.size == 0:
        raise ValueError(
            f"regions and segmentation must be maps of one size, (H, W), got {list(labels.shape)} and "
            f"{list(truth.shape)}"
        )

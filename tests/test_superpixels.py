"""Compares stvit.superpixels with its definitions, pixel by pixel, and with scikit-image."""

import numpy as np
import pytest
from skimage.segmentation import find_boundaries

from stvit.superpixels import boundaries, boundary_recall, undersegmentation_error


def random_map(seed: int, shape: tuple[int, int] = (31, 23), values: int = 5) -> np.ndarray:
    """Returns blocks of 5x5 pixels with random values."""
    blocks = np.random.default_rng(seed).integers(0, values, (7, 5))
    return blocks.repeat(5, axis=0).repeat(5, axis=1)[: shape[0], : shape[1]]


def test_boundaries_are_those_of_scikit_image() -> None:
    for seed in range(5):
        regions = random_map(seed)
        assert np.array_equal(boundaries(regions), find_boundaries(regions, connectivity=1, mode="thick"))
    assert not boundaries(np.zeros((1, 1), dtype=int)).any()


def test_boundary_recall_by_definition() -> None:
    """Looks for a boundary around each pixel of the true boundary."""
    for seed, tolerance in ((1, 0), (2, 1), (3, 2)):
        regions, truth = random_map(seed), random_map(seed + 10, values=2)
        of_regions = boundaries(regions)
        found = [
            of_regions[max(0, i - tolerance) : i + tolerance + 1, max(0, j - tolerance) : j + tolerance + 1].any()
            for i, j in np.argwhere(boundaries(truth))
        ]
        assert 0 < np.mean(found) < 1
        assert boundary_recall(regions, truth, tolerance) == pytest.approx(np.mean(found))


def test_undersegmentation_error_by_definition() -> None:
    for seed in range(3):
        regions, truth = random_map(seed), random_map(seed + 10, values=3)
        leaks = 0
        for segment in np.unique(truth):
            for region in np.unique(regions):
                inside = np.count_nonzero((regions == region) & (truth == segment))
                outside = np.count_nonzero((regions == region) & (truth != segment))
                leaks += min(inside, outside) if inside else 0
        assert undersegmentation_error(regions, truth) == pytest.approx(leaks / truth.size)


def test_known_values() -> None:
    truth = np.zeros((40, 40), dtype=int)
    truth[:, 20:] = 7
    whole = np.zeros_like(truth)
    assert boundary_recall(truth, truth, 0) == 1 and undersegmentation_error(truth, truth) == 0
    assert boundary_recall(whole, truth) == 0 and undersegmentation_error(whole, truth) == 1
    shifted = np.roll(truth, 3, axis=1)  # one boundary is off by three pixels, the other is at column 3
    assert (boundary_recall(shifted, truth, 2), boundary_recall(shifted, truth, 3)) == (0.5, 1.0)
    # The default tolerance is 0.0025 diagonals: 0 pixels for 40x40, 6 pixels for 1600x1600.
    large = truth.repeat(40, axis=0).repeat(40, axis=1)
    moved = np.zeros_like(large)
    moved[:, 800 + 5 :] = 1
    assert boundary_recall(moved, large) == 1
    moved[:, 800 + 5 : 800 + 7] = 0
    assert boundary_recall(moved, large) == 0.5


def test_unknown_pixels_do_not_count() -> None:
    truth = np.zeros((10, 30), dtype=int)
    truth[:, 10:20] = 255
    truth[:5, 20:] = 1
    regions = np.zeros_like(truth)
    regions[:, 15:] = 1
    assert np.count_nonzero(boundaries(truth, void=255)) == 20  # between 0 and 1, at the right
    assert undersegmentation_error(regions, truth, void=255) == 100 / 200
    assert undersegmentation_error(regions, truth) > 100 / 200
    with pytest.raises(ValueError, match=r"all pixels of the segmentation are void \(255\)"):
        undersegmentation_error(regions, np.full_like(truth, 255), void=255)


def test_bad_arguments_are_named() -> None:
    regions = random_map(0)
    with pytest.raises(ValueError, match=r"\(H, W\) maps of the same shape, got \[31, 23\] and \[31, 22\]"):
        boundary_recall(regions, regions[:, 1:])
    with pytest.raises(ValueError, match="maps of the same shape"):
        undersegmentation_error(regions[None], regions[None])
    with pytest.raises(ValueError, match="at least 0 pixels, got -1"):
        boundary_recall(regions, regions, -1)
    with pytest.raises(ValueError, match="has no boundary"):
        boundary_recall(regions, np.zeros_like(regions))

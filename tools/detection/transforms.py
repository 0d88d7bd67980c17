"""Transforms of images with boxes and masks, and groups of similar shapes."""

import bisect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from ..common.examples import ExampleError


class TrainTransform:
    """Random size and horizontal flip of an image and its objects.

    The shorter side gets a random size of `min_size`. If the longer side would exceed `max_size`, it gets that size
    instead. Objects smaller than a pixel are removed.
    """

    def __init__(self, min_size: Sequence[int], max_size: int, hflip: float) -> None:
        """Creates the transform.

        Args:
            min_size: Sizes of the shorter side, in pixels.
            max_size: Largest size of the longer side, in pixels.
            hflip: Probability of a horizontal flip.
        """
        self.transform = v2.Compose(
            [
                v2.ToImage(),
                v2.ClampBoundingBoxes(),
                v2.RandomShortestSize(list(min_size), max_size),
                v2.RandomHorizontalFlip(hflip),
                v2.ClampBoundingBoxes(),
                v2.SanitizeBoundingBoxes(min_size=1.0),
                v2.ToPureTensor(),
            ]
        )

    def __call__(self, image: Image.Image, target: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
        """Returns an image (C, H, W), 0 to 255, and its objects as plain tensors."""
        _check_size(image, target["boxes"].canvas_size)
        result: tuple[torch.Tensor, dict[str, Any]] = self.transform(image, target)
        return result


class ValTransform:
    """Converts an image to a tensor. The model resizes it."""

    def __call__(self, image: Image.Image, target: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
        """Returns an image (C, H, W), 0 to 255, and its unchanged target."""
        if "size" in target:
            _check_size(image, target["size"])
        return v2.functional.pil_to_tensor(image), target


def describe_wrong_size(size: tuple[int, int], annotated: tuple[int, int]) -> str | None:
    """Returns what is wrong if an image has another size than annotated.

    None if the sizes are equal.

    Args:
        size: Width and height of the image, turned by its EXIF orientation.
        annotated: Width and height in the annotations.
    """
    if size == annotated:
        return None
    turned = ", or turn its pixels and remove its EXIF orientation" if size[::-1] == annotated else ""
    return (
        f"{size[0]}x{size[1]} pixels, but the annotations say {annotated[0]}x{annotated[1]}; correct its width and "
        f"height in the annotations{turned}"
    )


def _check_size(image: Image.Image, size: Sequence[int]) -> None:
    """Checks that an image has the height and width in its annotations.

    Raises:
        ExampleError: If it has another size.
    """
    height, width = size
    problem = describe_wrong_size(image.size, (width, height))
    if problem is not None:
        raise ExampleError(problem)


def aspect_ratio_groups(ratios: Sequence[float], factor: int) -> list[int]:
    """Returns the number of each image's group, by aspect ratio.

    The groups are those of torchvision's detection recipes.

    Args:
        ratios: Width divided by height of each image.
        factor: Groups between ratios 1 and 2, and between 1/2 and 1; 0 for two groups, portrait and landscape.
    """
    bounds = (2.0 ** np.linspace(-1, 1, 2 * factor + 1)).tolist() if factor > 0 else [1.0]
    return [bisect.bisect_right(bounds, ratio) for ratio in ratios]


def collate(examples: Sequence[Any]) -> tuple[list[torch.Tensor], list[dict[str, Any]]]:
    """Returns the images and the targets of a batch, as lists.

    Unreadable images (None) are left out.
    """
    read = [example for example in examples if example is not None]
    return [image for image, _ in read], [target for _, target in read]


def tensor_image(image: Image.Image) -> torch.Tensor:
    """Returns an image as numbers from 0 to 1, (C, H, W)."""
    return v2.functional.pil_to_tensor(image).float() / 255

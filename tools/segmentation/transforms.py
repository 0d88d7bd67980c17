"""Augmentation of images and label maps.

Shapes:
    C        channels of an image
    H, W     height and width of an image
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as VF

from ..common.cli import OneProcessError
from .config import ImageConfig
from .inference import Scaling
from .labels import IGNORED, LabelReader

# An image (C, H, W) and its labels (H, W), both uint8.
Example = tuple[torch.Tensor, torch.Tensor]
_CROP_TRIES = 10


class RandomScale(v2.Transform):
    """Resizes to the size of the evaluation times a random factor.

    Labels keep their values.
    """

    def __init__(self, scaling: Scaling, scale: Sequence[float]) -> None:
        """Sets the sizes.

        Args:
            scaling: Sizes of the evaluation.
            scale: Smallest and largest factor.
        """
        super().__init__()
        self.scaling = scaling
        self.low, self.high = scale

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Returns the random size."""
        scale = self.low + (self.high - self.low) * torch.rand(()).item()
        height, width = VF.get_size(flat_inputs[0])
        return {"size": list(self.scaling.size(height, width, scale))}

    def transform(self, value: Any, params: dict[str, Any]) -> Any:
        """Resizes an image bilinearly, or labels to the nearest value."""
        size = params["size"]
        if not isinstance(value, tv_tensors.Mask):
            return VF.resize(value, size, antialias=True)
        # v2 resizes a Mask with "nearest", which is half a pixel off the image.
        plain = value.as_subclass(torch.Tensor)[None]
        return tv_tensors.Mask(VF.resize_image(plain, size, interpolation=v2.InterpolationMode.NEAREST_EXACT)[0])


class RandomCrop(v2.Transform):
    """Cuts a square out of an image, without too much of one class.

    Small images are padded at the bottom and right.
    """

    def __init__(self, size: int, cat_max_ratio: float, fill: Sequence[int]) -> None:
        """Sets the size and the padding.

        Args:
            size: Height and width of the crop.
            cat_max_ratio: Share of the labeled pixels that one class must not reach. After ten tries, any crop is
                taken.
            fill: Values of padded pixels, one for each channel. Labels are padded with `IGNORED`.
        """
        super().__init__()
        self.size, self.cat_max_ratio = size, cat_max_ratio
        self.fill = list(fill)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Returns the random position."""
        labels = next(item for item in flat_inputs if isinstance(item, tv_tensors.Mask)).as_subclass(torch.Tensor)
        height, width = labels.shape[-2:]
        for _ in range(_CROP_TRIES):
            top = int(torch.randint(max(0, height - self.size) + 1, ()))
            left = int(torch.randint(max(0, width - self.size) + 1, ()))
            if self.cat_max_ratio >= 1 or self._is_mixed(labels[..., top : top + self.size, left : left + self.size]):
                break
        return {"top": top, "left": left, "height": min(self.size, height), "width": min(self.size, width)}

    def _is_mixed(self, labels: torch.Tensor) -> bool:
        """Returns whether no class has too large a share of the labels."""
        counts = torch.bincount(labels.flatten(), minlength=IGNORED + 1)[:IGNORED]
        return bool(counts.max() < self.cat_max_ratio * counts.sum())

    def transform(self, value: Any, params: dict[str, Any]) -> Any:
        """Crops and pads an image or labels."""
        cropped = VF.crop(value, **params)
        padding = [0, 0, self.size - params["width"], self.size - params["height"]]
        if not any(padding):
            return cropped
        fill: Any = IGNORED if isinstance(value, tv_tensors.Mask) else self.fill
        return VF.pad(cropped, padding, fill=fill)


class PhotometricDistortion(v2.RandomPhotometricDistort):
    """torchvision's random changes of brightness, contrast, saturation and hue.

    The channels keep their order.
    """

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Returns the random changes."""
        return super().make_params(flat_inputs) | {"channel_permutation": None}


class ReadExample:
    """Reads the label map of an image, and transforms both.

    Attributes:
        transform: Transform of both; None for none.
    """

    def __init__(self, reader: LabelReader, transform: v2.Transform | None = None) -> None:
        self.reader, self.transform = reader, transform

    def __call__(self, image: Image.Image, labels: Path) -> Example:
        """Returns the image and its labels.

        Args:
            image: The image.
            labels: Path of its label map.

        Raises:
            OneProcessError: If the label map is wrong.
        """
        try:
            values = self.reader.read(labels, image.size)
        except ValueError as error:
            raise OneProcessError(f"label map {labels}: {error}") from error
        pixels = tv_tensors.Image(VF.pil_to_tensor(image))
        mask = tv_tensors.Mask(torch.from_numpy(np.ascontiguousarray(values)))
        if self.transform is not None:
            pixels, mask = self.transform(pixels, mask)
        return pixels.as_subclass(torch.Tensor), mask.as_subclass(torch.Tensor)


def train_transform(config: ImageConfig, mean: Sequence[float]) -> v2.Transform:
    """Returns the augmentation of training images and labels.

    Args:
        config: The augmentation.
        mean: Mean of each channel, for pixels from 0 to 1. It is the color of padded pixels.
    """
    scaling = Scaling(config.short_side, config.long_side)
    fill = [round(255 * value) for value in mean]
    scale, cat_max_ratio = ((1.0, 1.0), 1.0) if config.no_aug else (config.scale, config.cat_max_ratio)
    transforms: list[Any] = [RandomScale(scaling, scale), RandomCrop(config.crop_size, cat_max_ratio, fill)]
    if not config.no_aug:
        transforms.append(v2.RandomHorizontalFlip(config.hflip))
        if config.photometric_distortion:
            transforms.append(PhotometricDistortion())
    return v2.Compose(transforms)


def collate_crops(examples: list[Example]) -> Example:
    """Returns a batch of crops: images (B, C, H, W) and labels (B, H, W)."""
    images, labels = zip(*examples, strict=True)
    return torch.stack(images), torch.stack(labels)


def collate_images(examples: list[Example | None]) -> list[Example]:
    """Returns the readable examples, which may have different sizes."""
    return [example for example in examples if example is not None]

"""Predicts the class of each pixel, at one or several scales.

Shapes:
    B        batch
    C        channels of an image
    H, W     height and width of an image
    h, w     height and width of an image as the model sees it
    K        number of classes
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as VF

# Scales of the multi-scale evaluation, relative to the single-scale one, as in mmsegmentation.
MULTI_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
# Classes that are resized to the size of the image at a time. Scores of all classes may not fit into the memory.
_CHUNK = 16


@dataclass(frozen=True)
class Scaling:
    """Sizes at which a model sees an image.

    Attributes:
        short_side: Largest length of the shorter side in pixels.
        long_side: Largest length of the longer side in pixels. One of the two sides gets its largest length.
        scales: Factors on these lengths. The predictions of all scales are averaged.
        flip: Whether to also average with the predictions of the mirrored image.
    """

    short_side: int = 512
    long_side: int = 2048
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False

    @property
    def is_single(self) -> bool:
        """Returns whether the model sees each image once."""
        return len(self.scales) == 1 and not self.flip

    def size(self, height: int, width: int, scale: float = 1.0) -> tuple[int, int]:
        """Returns height and width of the resized image. The aspect ratio is kept."""
        factor = scale * min(self.long_side / max(height, width), self.short_side / min(height, width))
        return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


class Predictor:
    """Predicts the classes of images with a model.

    Attributes:
        scaling: Sizes at which the model sees an image.
    """

    def __init__(
        self,
        model: Any,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        *,
        scaling: Scaling | None = None,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
        channels_last: bool = False,
    ) -> None:
        """Sets the model to evaluation mode.

        Args:
            model: Segmentation model with `mean` and `std`.
            device: Device of the model.
            dtype: Precision of the model.
            scaling: Sizes at which the model sees an image (default: those of `Scaling`).
            context: Returns the context of a forward pass, such as autocast.
            channels_last: Whether to convert images to channels_last.
        """
        self.model, self.device, self.dtype = model.eval(), device, dtype
        self.scaling = scaling or Scaling()
        self.context, self.channels_last = context, channels_last

    @torch.no_grad()
    def predict(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the classes of the pixels.

        Args:
            images: Images of one size with values from 0 to 255, uint8 (B, C, H, W).

        Returns:
            Classes, int64 (B, H, W), on the device.
        """
        images = images.to(self.device)
        size = (int(images.shape[-2]), int(images.shape[-1]))
        if self.scaling.is_single:
            return argmax_resized(self._logits(images, self.scaling.size(*size, self.scaling.scales[0])), size)
        # Mean probabilities at the resolution of scale 1.
        base = self.scaling.size(*size)
        total: torch.Tensor | None = None
        for scale in self.scaling.scales:
            for is_flipped in (False, True) if self.scaling.flip else (False,):
                seen = images.flip(-1) if is_flipped else images
                found = self._logits(seen, self.scaling.size(*size, scale)).float().softmax(dim=1)
                found = _resize(found.flip(-1) if is_flipped else found, base)
                total = found if total is None else total.add_(found)
        assert total is not None
        return argmax_resized(total, size)

    def _logits(self, images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Returns the logits (B, K, h, w) of images that are resized to `size`."""
        resized = normalize(VF.resize(images, list(size), antialias=True), self.model, self.dtype)
        if self.channels_last:
            resized = resized.contiguous(memory_format=torch.channels_last)
        with self.context():
            logits: torch.Tensor = self.model(resized)
        return logits


def normalize(images: torch.Tensor, model: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normalizes images with the mean and the standard deviation of a model.

    Args:
        images: Images with values from 0 to 255, uint8 (B, C, H, W).
        model: Segmentation model with `mean` and `std`.
        dtype: Precision of the result.
    """
    mean, std = (torch.tensor(values, device=images.device).view(-1, 1, 1) for values in (model.mean, model.std))
    return ((images.float() / 255 - mean) / std).to(dtype)


def argmax_resized(scores: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resizes the scores bilinearly; returns the class with the highest score.

    Args:
        scores: Logits or probabilities (B, K, h, w).
        size: Height H and width W of the result.

    Returns:
        Classes, int64 (B, H, W). Of equal scores the first class wins.
    """
    best: torch.Tensor | None = None
    classes: torch.Tensor | None = None
    for first in range(0, scores.shape[1], _CHUNK):
        values, found = _resize(scores[:, first : first + _CHUNK].float(), size).max(dim=1)
        found = found + first
        if best is None or classes is None:
            best, classes = values, found
        else:
            is_better = values > best
            best, classes = torch.where(is_better, values, best), torch.where(is_better, found, classes)
    assert classes is not None
    return classes


def _resize(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return maps if tuple(maps.shape[-2:]) == size else F.interpolate(maps, size=size, mode="bilinear")

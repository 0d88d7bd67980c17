"""Teaches `stvit.visualize` how Ultralytics wraps networks and pads images."""

from typing import Any

import torch
from torch import nn
from ultralytics.engine.model import Model
from ultralytics.nn.tasks import BaseModel

from stvit.visualize import Padding, register_library

__all__ = ["register"]

GRAY = 114 / 255  # color of Ultralytics' letterbox


def register() -> None:
    """Registers Ultralytics, so that `stvit.visualize` accepts its models."""
    register_library("ultralytics", _unwrap, _find_padding)


def _unwrap(model: nn.Module) -> Any:
    """Returns the network of a `YOLO` object.

    Calling the object itself would predict, and its `train` would train.
    """
    return model.model if isinstance(model, Model) else None


def _find_padding(net: nn.Module, size: tuple[int, int]) -> Padding | None:
    """Returns the letterbox of Ultralytics.

    The image is centered and padded to multiples of the largest stride.
    """
    stride = getattr(net, "stride", None)
    if not isinstance(net, BaseModel) or not isinstance(stride, torch.Tensor):
        return None
    multiple = int(stride.max())
    height, width = (-(-side // multiple) * multiple for side in size)
    # If the padding is an odd number of pixels, the larger half comes after the image.
    return Padding((height, width), ((height - size[0]) // 2, (width - size[1]) // 2), GRAY)

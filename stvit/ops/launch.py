"""Helpers to launch Triton kernels."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from typing import Any

import torch
import triton

__all__ = ["block_of_channels", "on_its_device"]


def on_its_device(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: launches on the device of the first argument.

    Triton itself launches on the current device.
    """

    @wraps(launch)
    def launch_there(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
            return launch(x, *args, **kwargs)

    return launch_there


def block_of_channels(C: int, widest: int) -> int:
    """Returns the smallest power of two from 16 to `widest` that covers C channels, or `widest`."""
    return min(max(16, triton.next_power_of_2(C)), widest)

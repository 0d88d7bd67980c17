"""Helpers to launch Triton kernels."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from typing import Any

import torch

__all__ = ["block_of_channels", "cdiv", "next_power_of_2", "on_its_device"]


# Triton's functions of these names also work inside kernels and take ten times as long.


def cdiv(a: int, b: int) -> int:
    """Returns a / b rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Returns the smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


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
    """Returns the smallest power of two from 16 on that covers C channels.

    It is at most `widest`.
    """
    return min(max(16, next_power_of_2(C)), widest)

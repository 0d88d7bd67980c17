"""Block sizes to try for each GPU kernel, which `stvit benchmark gpu` measures.

Shapes are those of stvit_small at 224 pixels and batch size 128 in bfloat16. On a CPU, Triton's interpreter runs the
same code at a tiny size.
"""

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from stvit.ops import why_not_triton

__all__ = ["Candidate", "block_choices", "candidates"]


@dataclass
class Candidate:
    """A kernel with block sizes, ready to be measured.

    Attributes:
        kernel: Name of the kernel.
        shape: Shape and other sizes, as a table shows them.
        blocks: Block sizes; those that are left out have their defaults.
        is_default: Whether the kernel uses these block sizes by itself.
        floor_bytes: Fewest bytes to read and write.
        run: Launches the kernel.
    """

    kernel: str
    shape: str
    blocks: Mapping[str, int]
    is_default: bool
    floor_bytes: int
    run: Callable[[], Any]


def candidates() -> Iterator[Candidate]:
    """Yields the candidates, one after the other, most important first.

    Tensors of a shape are created when its first candidate is asked for.

    Raises:
        ValueError: If the kernels cannot run on this machine.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reason = why_not_triton(torch.empty(0, device=device))
    if reason:
        raise ValueError(f"the kernels cannot run: {reason}")
    yield from _mean(device)


def block_choices(**sizes: Sequence[int]) -> Iterator[dict[str, int]]:
    """Yields {}, the defaults, and then all combinations of block sizes."""
    yield {}
    for values in itertools.product(*sizes.values()):
        yield dict(zip(sizes, values, strict=True))


def _mean(device: str) -> Iterator[Candidate]:
    from stvit.ops import kernels

    choices: list[dict[str, int]] = [{}]
    if "blocks" in inspect.signature(kernels.mean).parameters:
        choices = list(block_choices(block_p=(4, 16, 64), num_warps=(1, 2, 4, 8)))
    shapes = [(128, 64, 56, 8), (128, 128, 28, 4)] if device == "cuda" else [(1, 64, 16, 8)]
    for B, C, size, cell in shapes:
        x = _draw(B, C, size, device)
        floor_bytes = B * C * (size**2 + (size // cell) ** 2) * x.element_size()
        for blocks in choices:
            run = partial(kernels.mean, x, cell, cell, **({"blocks": blocks} if blocks else {}))
            yield Candidate("mean", f"{(B, C, size, size)}, cell {cell}", blocks, not blocks, floor_bytes, run)


def _draw(B: int, C: int, size: int, device: str) -> torch.Tensor:
    """Returns a random map (B, C, size, size) in bfloat16 and channels_last."""
    return torch.randn(B, size, size, C, device=device, dtype=torch.bfloat16).permute(0, 3, 1, 2)

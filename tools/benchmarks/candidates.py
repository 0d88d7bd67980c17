"""Block sizes to try for each GPU kernel, which `stvit benchmark gpu` measures.

Shapes are those of stvit_small at 224 pixels and batch size 128 in bfloat16. On a CPU, Triton's interpreter runs the
same code at a tiny size.
"""

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

    The tensors of a shape are created with its first candidate.

    Raises:
        ValueError: If the kernels cannot run on this machine.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reason = why_not_triton(torch.empty(0, device=device))
    if reason:
        raise ValueError(f"the kernels cannot run: {reason}")
    kernels = itertools.chain(_depthwise(device), _norm(device), _mean(device), _activate(device))
    if device == "cuda":
        yield from kernels
    else:  # the interpreter is slow
        for _, group in itertools.groupby(kernels, lambda candidate: candidate.kernel):
            yield from itertools.islice(group, 2)


def block_choices(**sizes: Sequence[int]) -> Iterator[dict[str, int]]:
    """Yields {}, the defaults, and then all combinations of block sizes."""
    yield {}
    for values in itertools.product(*sizes.values()):
        yield dict(zip(sizes, values, strict=True))


def _shapes(device: str) -> list[tuple[int, int, int]]:
    """Returns batch size, channels and map size of each stage."""
    return [(128, 64, 56), (128, 128, 28), (128, 320, 14), (128, 512, 7)] if device == "cuda" else [(1, 32, 3)]


def _depthwise(device: str) -> Iterator[Candidate]:
    """Yields the depthwise convolution of the MLPs, forward and backward, with GELU."""
    from stvit.ops import layer_kernels

    # Channels and numbers of a block, and warps.
    sizes = [(64, 256, 4), (64, 256, 2), (64, 512, 4), (128, 256, 2), (128, 512, 4), (256, 1024, 8)]
    sizes = sizes if device == "cuda" else sizes[:1]
    for B, dim, size in _shapes(device):
        C = 4 * dim
        x, grad = (_draw(B, C, size, device).permute(0, 2, 3, 1) for _ in range(2))
        weight, bias = torch.randn(C, 1, 3, 3, device=device), torch.randn(C, device=device)
        shape = f"{(B, C, size, size)}"
        rows = sorted({7, 14, size}) if device == "cuda" else [size]
        choices = [
            {"block_c": block_c, "block_s": block // block_c, "num_warps": warps, "rows": height}
            for (block_c, block, warps), height in itertools.product(sizes, rows)
            if height <= size
        ]
        map_bytes = x.numel() * x.element_size()
        for blocks in [{}, *choices]:
            forward = partial(layer_kernels.depthwise, x, weight, bias, True, blocks=blocks)
            yield Candidate("depthwise", shape, blocks, not blocks, 2 * map_bytes, forward)
        for blocks in [{}, *choices]:
            backward = partial(layer_kernels.depthwise_backward, grad, x, weight, True, blocks=blocks)
            yield Candidate("depthwise_backward", shape, blocks, not blocks, 3 * map_bytes, backward)


def _norm(device: str) -> Iterator[Candidate]:
    """Yields the normalized position encoding and the normalization's gradient."""
    from stvit.ops import layer_kernels

    for B, C, size in _shapes(device):
        x, grad = (_draw(B, C, size, device).permute(0, 2, 3, 1) for _ in range(2))
        weight, vector = torch.randn(C, 1, 3, 3, device=device), torch.randn(C, device=device)
        shape = f"{(B, C, size, size)}"
        map_bytes = x.numel() * x.element_size()
        for blocks in block_choices(block_s=(1, 2, 4, 8), num_warps=(1, 2, 4)):
            forward = partial(layer_kernels.depthwise, x, weight, vector, norm=(vector, vector, 1e-6), blocks=blocks)
            yield Candidate("depthwise, norm", shape, blocks, not blocks, 3 * map_bytes, forward)
        for blocks in block_choices(programs=(528, 1056, 2112), num_warps=(1, 2, 4)):
            backward = partial(layer_kernels.norm_backward, grad, grad, x, vector, 1e-6, blocks=blocks)
            yield Candidate("norm_backward", shape, blocks, not blocks, 4 * map_bytes, backward)


def _activate(device: str) -> Iterator[Candidate]:
    """Yields the activation of the stem, forward and backward."""
    from stvit.ops import layer_kernels

    for B, C, size in [(128, 32, 112), (128, 64, 56)] if device == "cuda" else [(1, 8, 4)]:
        x, grad = (_draw(B, C, size, device).permute(0, 2, 3, 1) for _ in range(2))
        vector = torch.randn(C, device=device)
        map_bytes = x.numel() * x.element_size()
        for blocks in block_choices(block_r=(16, 32, 64, 128), num_warps=(2, 4, 8)):
            forward = partial(layer_kernels.activate, x, vector, vector, vector, blocks=blocks)
            yield Candidate("activate", f"{(B, C, size, size)}", blocks, not blocks, 2 * map_bytes, forward)
        for blocks in block_choices(block_r=(16, 32, 64, 128), num_warps=(2, 4, 8)):
            backward = partial(layer_kernels.activate_backward, grad, x, vector, blocks=blocks)
            yield Candidate("activate_backward", f"{(B, C, size, size)}", blocks, not blocks, 3 * map_bytes, backward)


def _mean(device: str) -> Iterator[Candidate]:
    from stvit.ops import kernels

    shapes = [(128, 64, 56, 8), (128, 128, 28, 4)] if device == "cuda" else [(1, 64, 16, 8)]
    for B, C, size, cell in shapes:
        x = _draw(B, C, size, device)
        floor_bytes = B * C * (size**2 + (size // cell) ** 2) * x.element_size()
        for blocks in block_choices(block_p=(4, 8, 16, 64), num_warps=(1, 2, 4)):
            run = partial(kernels.mean, x, cell, cell, blocks=blocks)
            yield Candidate("mean", f"{(B, C, size, size)}, cell {cell}", blocks, not blocks, floor_bytes, run)


def _draw(B: int, C: int, size: int, device: str) -> torch.Tensor:
    """Returns a random map (B, C, size, size) in bfloat16 and channels_last."""
    return torch.randn(B, size, size, C, device=device, dtype=torch.bfloat16).permute(0, 3, 1, 2)

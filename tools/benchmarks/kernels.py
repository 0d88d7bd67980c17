"""Time of super token sampling and upsampling on a GPU.

It is compared with the time to copy the minimum number of bytes.
"""

import importlib.metadata
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import stvit

from ..common.cli import CommandError, progress_bar
from .config import KERNEL_SIZES, KernelConfig
from .measure import DTYPES, capture, require_device, significant

__all__ = ["benchmark", "measure_bandwidth"]

# Stages of stvit_small: number, channels, cell size, stride of the feature map.
STAGES = ((1, 64, 8, 4), (2, 128, 4, 8))


def benchmark(config: KernelConfig) -> Iterator[list[dict[str, Any]]]:
    """Yields a table for each stage and size; on a CPU, one table of byte counts."""
    device = require_device(config.device)
    if device.type not in ("cpu", "cuda"):
        raise CommandError(f"--device {config.device}: pass cuda to measure the kernels, or cpu to only count bytes")
    if device.type == "cpu" and config.csv:
        raise CommandError(f"--csv records times, but none can be measured here: {stvit.ops.why_not_triton()}")
    bandwidth = measure_bandwidth(device, config.repeats) if device.type == "cuda" else None
    counted = []
    for size in config.img_size:
        for stage, dim, cell, stride in STAGES:
            batch = config.batch_size or KERNEL_SIZES.get(size, max(1, 128 * 224**2 // size**2))
            shape = (batch, dim, -(-size // stride), -(-size // stride))
            forward, backward = count_bytes(shape, cell, DTYPES[config.dtype].itemsize)
            row = {
                "stage": stage,
                "batch_size": batch,
                "img_size": size,
                "dtype": config.dtype,
                "forward_mb": significant(forward / 1e6),
                "backward_mb": significant(backward / 1e6),
            }
            if bandwidth is None:
                counted.append(row)
            else:
                yield _measure(row, shape, cell, config, device, bandwidth)
    if counted:
        yield counted
        print(f"no times: {stvit.ops.why_not_triton()}")


def count_bytes(shape: tuple[int, int, int, int], cell: int, itemsize: int) -> tuple[int, int]:
    """Returns the minimum numbers of bytes to move, forward and backward.

    Forward reads x and writes y. It also writes and reads the tokens, because attention needs all of them in between.
    Backward reads the gradient of y, writes the gradient of x, and writes and reads the gradient of the tokens. It also
    needs the association, a constant with nine numbers per pixel, which forward writes and backward reads.

    Args:
        shape: Shape (B, C, H, W) of x.
        cell: Height and width of a super token's cell, in pixels.
        itemsize: Bytes per number.
    """
    B, C, H, W = shape
    pixels, tokens = H * W, -(-H // cell) * -(-W // cell)
    forward = 2 * (pixels + tokens) * C
    return forward * B * itemsize, (forward + 2 * 9 * pixels) * B * itemsize


def measure_bandwidth(device: torch.device, repeats: int) -> float:
    """Returns bytes per second, read and written, of a copy of 2 GiB."""
    source = torch.randn(2**29, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / statistics.median(_time(lambda: target.copy_(source)) for _ in range(repeats))


def make_step(
    way: str, shape: tuple[int, int, int, int], cell: int, dtype: torch.dtype, device: torch.device, part: str
) -> Callable[[bool], tuple[torch.Tensor, torch.Tensor | None]]:
    """Returns a step to measure.

    It takes `is_backward`, and returns the output and the gradient of x, or None without backward. Weights, pixels and
    the gradient of the output are the same for each way.

    Args:
        way: One of `KERNEL_WAYS`.
        shape: Shape (B, C, H, W) of x, which is channels_last as in the model.
        cell: Height and width of a super token's cell, in pixels.
        dtype: Precision of x and of the weights.
        device: Device of x.
        part: "functions" for sampling and upsampling, "operator" for both with attention between the tokens.
    """
    torch.manual_seed(0)
    backend = "triton" if way == "triton" else "reference"
    module: nn.Module
    if part == "operator":
        module = stvit.SuperTokenAttention(shape[1], cell, num_heads=shape[1] // 64, qkv_bias=True, backend=backend)
    else:
        module = Functions(cell, backend)
    module = module.to(device, dtype).requires_grad_(False)
    run = torch.compile(module, dynamic=False) if way == "compiled" else module
    x, grad = (_draw(shape, dtype, device) for _ in range(2))
    leaf = x.detach().requires_grad_()

    def step(is_backward: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not is_backward:
            with torch.no_grad():
                return run(x), None
        y = run(leaf)
        return y.detach(), torch.autograd.grad(y, leaf, grad)[0]

    return step


class Functions(nn.Module):
    """Sampling and upsampling without attention, (B, C, H, W) to (B, C, H, W)."""

    def __init__(self, cell: int, backend: str) -> None:
        super().__init__()
        self.cell, self.backend = cell, backend

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens, association = stvit.sample_super_tokens(x, self.cell, backend=self.backend)
        return stvit.upsample_super_tokens(tokens, association, self.cell, backend=self.backend)


def _draw(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    # Drawn on the CPU, so that they are the same on every device.
    pixels = F.normalize(torch.randn(shape), dim=1).mul_(shape[1] ** 0.5)  # as after LayerNorm
    return pixels.to(device, dtype, memory_format=torch.channels_last)


def _measure(
    row: dict[str, Any],
    shape: tuple[int, int, int, int],
    cell: int,
    config: KernelConfig,
    device: torch.device,
    bandwidth: float,
) -> list[dict[str, Any]]:
    """Returns a row for each part and way, measured in turns.

    Ratios are relative to the first way.
    """
    torch._dynamo.reset()
    dtype = DTYPES[config.dtype]
    forward, backward = count_bytes(shape, cell, dtype.itemsize)
    floors = {False: forward / bandwidth, True: (forward + backward) / bandwidth}
    rows = []
    for part in ("functions", "operator"):
        exact = make_step("reference", shape, cell, torch.float32, device, part)(True)
        steps = {way: make_step(way, shape, cell, dtype, device, part) for way in config.ways}
        errors = {way: _error(step(True), exact) for way, step in steps.items()}
        del exact
        replays = {(way, both): capture(partial(step, both)) for way, step in steps.items() for both in (False, True)}
        times: dict[tuple[str, bool], list[float]] = {key: [] for key in replays}
        with progress_bar(config.repeats * len(replays), "turn", True) as bar:
            for _ in range(config.repeats):
                for key, replay in replays.items():
                    times[key].append(_time(replay))
                    bar.update()
        for way in config.ways:
            measured = {**row, "part": part, "way": way, "error": f"{errors[way]:.1e}"}
            for both, name in ((False, "forward"), (True, "both")):
                seconds = times[way, both]
                median = statistics.median(seconds)
                measured |= {
                    f"{name}_us": significant(1e6 * median),
                    f"{name}_us_min": significant(1e6 * min(seconds)),
                    f"{name}_us_max": significant(1e6 * max(seconds)),
                    f"{name}_floor_us": significant(1e6 * floors[both]),
                    f"{name}_floors": significant(median / floors[both]),
                    f"{name}_ratio": significant(statistics.median(times[config.ways[0], both]) / median),
                }
            version = importlib.metadata.version("triton")
            rows.append({**measured, "tb_per_second": significant(bandwidth / 1e12), "triton": version})
    return rows


def _error(actual: tuple[torch.Tensor, torch.Tensor | None], exact: tuple[torch.Tensor, torch.Tensor | None]) -> float:
    """Returns the larger relative error of output and gradient, in norm."""
    pairs = [(a.float(), e) for a, e in zip(actual, exact, strict=True) if a is not None and e is not None]
    return max(((a - e).norm() / e.norm()).item() for a, e in pairs)


def _time(step: Callable[[], Any]) -> float:
    """Returns the seconds of a step, by the device's events.

    The cache is cleared before each repetition.
    """
    from triton.testing import do_bench

    return do_bench(step, warmup=10, rep=50, return_mode="median") / 1e3

"""Super token sampling and upsampling on a GPU: the fewest bytes, the time that these take, and what is taken."""

import argparse
import importlib.metadata
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import stvit
from stvit.tools.benchmarks.measure import DTYPES, require_device, significant
from stvit.tools.common.cli import CommandError, Parser, positive, progress_bar

__all__ = ["add_flags", "benchmark"]

WAYS = ("reference", "compiled", "triton")  # compiled: the reference
STAGES = ((1, 64, 8, 4), (2, 128, 4, 8))  # of stvit_small: number, channels, pixels of a cell's side, stride of the map
SIZES = {224: 128, 640: 16, 1280: 4}  # pixels of an image's side, and images: nearly the same number of pixels each


def add_flags(parser: Parser) -> None:
    """Flags of the subject kernels."""
    parser.add_argument(
        "--img-size", type=positive, nargs="+", default=list(SIZES), metavar="N", help="height and width"
    )
    parser.add_argument(
        "--batch-size", "-b", type=positive, metavar="N", help="images; without it 128 at 224, 16 at 640, 4 at 1280"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of pixels and products")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu: bytes alone")
    parser.add_argument("--repeats", type=positive, default=7, metavar="N", help="turns that each has")


def benchmark(args: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """On a GPU one table for each stage and size: the two functions alone, and the operator with its attention."""
    device = require_device(args.device)
    if device.type not in ("cpu", "cuda"):
        raise CommandError(f"--device {args.device}: the kernels are for cuda; on cpu the bytes are counted alone")
    if device.type == "cpu" and args.csv:
        raise CommandError(f"--csv is for times, which there are not on a CPU: {stvit.ops.why_not_triton()}")
    bandwidth = measure_bandwidth(device, args.repeats) if device.type == "cuda" else None
    counted = []
    for size in args.img_size:
        for stage, dim, cell, stride in STAGES:
            batch = args.batch_size or SIZES.get(size, max(1, 128 * 224**2 // size**2))
            shape = (batch, dim, -(-size // stride), -(-size // stride))
            forward, backward = count_bytes(shape, cell, DTYPES[args.dtype].itemsize)
            row = {
                "stage": stage,
                "batch_size": batch,
                "img_size": size,
                "dtype": args.dtype,
                "forward_mb": significant(forward / 1e6),
                "backward_mb": significant(backward / 1e6),
            }
            if bandwidth is None:
                counted.append(row)
            else:
                yield _measure(row, shape, cell, args, device, bandwidth)
    if counted:
        yield counted
        print(f"no times: {stvit.ops.why_not_triton()}")


def count_bytes(shape: tuple[int, int, int, int], cell: int, itemsize: int) -> tuple[int, int]:
    """The fewest bytes that go through memory, forward and backward.

    Forward reads x and writes y, and writes and reads the tokens, which attention changes as a whole in between.
    Backward reads the gradient of y, writes that of x, and writes and reads that of the tokens; and it needs the
    association, which is held constant: nine numbers a pixel, written by the forward before it and read.
    """
    B, C, H, W = shape
    pixels, tokens = H * W, -(-H // cell) * -(-W // cell)
    forward = 2 * (pixels + tokens) * C
    return forward * B * itemsize, (forward + 2 * 9 * pixels) * B * itemsize


def measure_bandwidth(device: torch.device, repeats: int) -> float:
    """Bytes a second, read and written, of a copy of 2 GiB."""
    source = torch.randn(2**29, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / statistics.median(_time(lambda: target.copy_(source)) for _ in range(repeats))


def make_step(
    way: str, shape: tuple[int, int, int, int], cell: int, dtype: torch.dtype, device: torch.device, part: str
) -> Callable[[bool], tuple[torch.Tensor, torch.Tensor | None]]:
    """What is measured: gives the output, and with an argument that is true the gradient of x too.

    Weights, pixels and the gradient of the output are the same for each way.

    Args:
        way: One of `WAYS`.
        shape: Of x, which is channels_last as in the model.
        cell: Pixels of a super token's cell on each side.
        dtype: Of x and of the weights.
        device: On which x is.
        part: "functions" for sampling and upsampling, "operator" for both with attention among the tokens.
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
    """The two functions without attention in between, (B, C, H, W) to the same."""

    def __init__(self, cell: int, backend: str) -> None:
        super().__init__()
        self.cell, self.backend = cell, backend

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens, association = stvit.sample_super_tokens(x, self.cell, backend=self.backend)
        return stvit.upsample_super_tokens(tokens, association, self.cell, backend=self.backend)


def _draw(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    # Drawn on the CPU: the same on every device.
    pixels = F.normalize(torch.randn(shape), dim=1).mul_(shape[1] ** 0.5)  # as LayerNorm leaves them
    return pixels.to(device, dtype, memory_format=torch.channels_last)


def _measure(
    row: dict[str, Any],
    shape: tuple[int, int, int, int],
    cell: int,
    args: argparse.Namespace,
    device: torch.device,
    bandwidth: float,
) -> list[dict[str, Any]]:
    """A row for each part and way, in turns; ratios are to the first way."""
    torch._dynamo.reset()
    dtype = DTYPES[args.dtype]
    forward, backward = count_bytes(shape, cell, dtype.itemsize)
    floors = {False: forward / bandwidth, True: (forward + backward) / bandwidth}
    rows = []
    for part in ("functions", "operator"):
        exact = make_step("reference", shape, cell, torch.float32, device, part)(True)
        steps = {way: make_step(way, shape, cell, dtype, device, part) for way in args.ways}
        errors = {way: _error(step(True), exact) for way, step in steps.items()}
        del exact
        replays = {(way, both): _capture(step, both) for way, step in steps.items() for both in (False, True)}
        times: dict[tuple[str, bool], list[float]] = {key: [] for key in replays}
        with progress_bar(args.repeats * len(replays), "turn", True) as bar:
            for _ in range(args.repeats):
                for key, replay in replays.items():
                    times[key].append(_time(replay))
                    bar.update()
        for way in args.ways:
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
                    f"{name}_ratio": significant(statistics.median(times[args.ways[0], both]) / median),
                }
            version = importlib.metadata.version("triton")
            rows.append({**measured, "tb_per_second": significant(bandwidth / 1e12), "triton": version})
    return rows


def _error(actual: tuple[torch.Tensor, torch.Tensor | None], exact: tuple[torch.Tensor, torch.Tensor | None]) -> float:
    """The larger of the errors of output and gradient, in norm."""
    pairs = [(a.float(), e) for a, e in zip(actual, exact, strict=True) if a is not None and e is not None]
    return max(((a - e).norm() / e.norm()).item() for a, e in pairs)


def _capture(step: Callable[[bool], Any], is_backward: bool) -> Callable[[], Any]:
    """Its kernels one after the other, without what Python does to launch them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, and takes libraries' work space
            step(is_backward)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(is_backward)
    return graph.replay


def _time(step: Callable[[], Any]) -> float:
    """Seconds by the device's own events, the cache emptied before each run."""
    from triton.testing import do_bench

    return do_bench(step, warmup=10, rep=50, return_mode="median") / 1e3

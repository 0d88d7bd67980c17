"""Measures the time that Python needs to launch kernels, on a machine without a GPU.

`python -m tests.launch_times` prints a table. The driver of tests/fake_driver.py takes the place of the GPU. Each
function is measured with the look-up of Triton and with the remembered kernel. They take turns.
"""

import time
from collections.abc import Callable
from contextlib import nullcontext
from statistics import median
from typing import Any
from unittest.mock import patch

import timm
import torch

from tests.fake_driver import install

ROUNDS = 15


def main() -> None:
    install(is_recorded=False)
    torch.set_num_threads(1)
    from stvit.ops.launch import Launch

    def look_up(self: Any, *tensors: torch.Tensor) -> None:
        self._compile((), tensors)

    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread, medians of {ROUNDS} rounds")
    print(f"{'':<28}{'Triton':>10}{'remembered':>12}{'ratio':>8}")
    for name, (step, count) in steps().items():
        times: dict[bool, list[float]] = {False: [], True: []}
        for is_remembered in [False, True] * ROUNDS:
            with nullcontext() if is_remembered else patch.object(Launch, "__call__", look_up):
                step()
                start = time.perf_counter()
                for _ in range(count):
                    step()
                times[is_remembered].append((time.perf_counter() - start) / count * 1e6)
        before, after = median(times[False]), median(times[True])
        print(f"{name:<28}{before:>7.0f} us{after:>9.0f} us{after / before:>8.2f}")


def steps() -> dict[str, tuple[Callable[[], Any], int]]:
    """Returns steps, and how often each runs in a round."""
    import stvit
    from stvit.ops import kernels, layer_kernels

    B, C, H, W, h, w = 1, 64, 8, 8, 4, 4
    x = torch.randn(B, C, H, W).bfloat16().to(memory_format=torch.channels_last)
    rows, vector, weight = x.permute(0, 2, 3, 1), torch.randn(C), torch.randn(C, 1, 3, 3)
    tokens, association = torch.randn(B, H // h, W // w, C).bfloat16(), torch.rand(B, 9, H, W).bfloat16()
    # All launches of stvit_small, with little to compute in between.
    model = timm.create_model("stvit_small", dims=(16, 16, 16, 16), num_heads=(1, 1, 1, 1)).eval().bfloat16()
    optimized = stvit.optimize_for_inference(model)
    images = torch.randn(1, 3, 32, 32).bfloat16()

    def forward(model: torch.nn.Module) -> Any:
        with torch.inference_mode():
            return model(images)

    return {
        "mean": (lambda: kernels.mean(x, h, w), 300),
        "associate_and_aggregate": (
            lambda: kernels.associate_and_aggregate(x, tokens, association, h, w, x.dtype),
            300,
        ),
        "upsample": (lambda: kernels.upsample(tokens, association, None, x, h, w), 300),
        "depthwise": (lambda: layer_kernels.depthwise(rows, weight, vector, True), 300),
        "depthwise_backward": (lambda: layer_kernels.depthwise_backward(rows, rows, weight, True), 300),
        "norm_backward": (lambda: layer_kernels.norm_backward(rows, rows, rows, vector, 1e-6), 300),
        "forward pass, eager": (lambda: forward(model), 4),
        "forward pass, optimized": (lambda: forward(optimized), 4),
    }


if __name__ == "__main__":
    main()

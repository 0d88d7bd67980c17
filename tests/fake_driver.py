"""A driver with which Triton compiles kernels for a GPU that is not present.

Kernels are compiled and loaded, and Triton's Python code runs as on a GPU. Launches are recorded, and nothing runs.
"""

from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget

from stvit.ops import backends

__all__ = ["Launched", "install"]


class Launched(NamedTuple):
    """One launch."""

    name: str
    hash: str
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]


def install(capability: int = 90, is_recorded: bool = True) -> list[Launched]:
    """Makes the kernels accept CPU tensors as if they were on a GPU.

    Call this function before `stvit.ops.kernels` is imported, without TRITON_INTERPRET.

    Args:
        capability: Compute capability, for example 90 for 9.0.
        is_recorded: Whether to record the launches. Recording takes time.

    Returns:
        All launches from now on.
    """
    launches: list[Launched] = []

    class Launcher:
        def __init__(self, src: Any, metadata: Any) -> None:
            self.name, self.hash = metadata.name, metadata.hash

        def __call__(self, x: int, y: int, z: int, *arguments: Any) -> None:
            if is_recorded:  # before the kernel's arguments: stream, function, metadata of two kinds, two hooks
                launches.append(Launched(self.name, self.hash, (x, y, z), arguments[6:]))

    class Utils:
        def load_binary(self, *arguments: Any) -> tuple[int, ...]:
            # Module, function, registers, spilled registers, and from Triton 3.4 on, threads.
            is_old = triton.__version__.startswith(("3.2.", "3.3."))
            return (1, 1, 32, 0) if is_old else (1, 1, 32, 0, 1024)

        def get_device_properties(self, device: int) -> dict[str, int]:
            return {"max_shared_mem": 232448}

        def unload_module(self, module: int) -> None:
            pass

    class Driver:
        utils, launcher_cls = Utils(), Launcher

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int | None = None) -> int:
            return 0

        def get_benchmarker(self) -> None:
            return None  # Triton 3.2 calls this method, but nothing is timed

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

    triton.runtime.driver.set_active(Driver())
    backends.why_no_kernels = lambda *arguments: ""
    return launches

"""Steps of models that `stvit benchmark gpu` measures.

Each runs in a process of its own.
"""

import cProfile
import gc
import pstats
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
import torch.nn.functional as F
from timm.layers import DropPath
from torch import nn
from torch.profiler import ProfilerActivity, profile

from stvit.cuda_graphs import use_cuda_graphs, why_not_cuda_graph

from .measure import DTYPES, significant, synchronize, time_turn
from .models import Case, input_shape, is_detector, is_ours, make_module, optimized, training_step
from .published import published

__all__ = [
    "PreparedStep",
    "prepare_inference",
    "prepare_training",
    "relative_gradient_error",
    "relative_output_error",
]

GIB = 2**30
COMPILE_THREADS = 4  # of each process; several compile at the same time
ERROR_IMAGES = 16  # images at a time in float32, which needs more memory


class PreparedStep:
    """A step of a case, ready to be measured."""

    def __init__(self, case: Case) -> None:
        """Takes a case and prepares nothing yet."""
        self.case = case
        self.device = torch.device(case.device)
        self._step: Callable[[], Any] | None = None

    def prepare(self) -> dict[str, Any]:
        """Creates the model, compiles and runs it.

        A second call after an error tries again.

        Returns:
            `prepare_seconds`, `step_seconds`, `relative_error` to float32 ("" if unknown), and on a GPU the peak memory
            of a step: `memory_gib` in tensors and `reserved_gib` with the unused rest of PyTorch's blocks.
        """
        self._step = None
        self._empty_cache()
        start = time.perf_counter()
        torch.manual_seed(0)
        torch._inductor.config.compile_threads = COMPILE_THREADS
        module = make_module(self.case, "cpu")
        image = torch.randn(input_shape(self.case))
        prepare = prepare_training if self.case.is_training else prepare_inference
        self._step, error = prepare(self.case, module, image)
        for _ in range(3):  # compiles, fills caches, captures graphs
            self._step()
        synchronize(self.device)
        gc.collect()  # the float32 reference may be in a cycle
        self._empty_cache()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        prepared = time.perf_counter()
        self._step()
        synchronize(self.device)
        info: dict[str, Any] = {
            "relative_error": error,
            "memory_gib": "",
            "reserved_gib": "",
            "prepare_seconds": round(prepared - start, 1),
            "step_seconds": time.perf_counter() - prepared,
        }
        if self.device.type == "cuda":
            info["memory_gib"] = significant(torch.cuda.max_memory_allocated() / GIB)
            info["reserved_gib"] = significant(torch.cuda.max_memory_reserved() / GIB)
        self._empty_cache()
        return info

    def turn(self, seconds: float) -> list[float]:
        """Returns the seconds of each step in a turn."""
        assert self._step is not None
        self._step()  # allocates again what the end of the last turn returned
        times = time_turn(self._step, self.device, seconds)
        self._empty_cache()  # the memory is another process's next
        return times

    def profile(self, steps: int = 3, rows: int = 25) -> str:
        """Returns tables of the slowest kernels and of the slowest Python functions.

        On a CPU, the first table contains operators. The second table shows why the host may queue a step more slowly
        than the kernels run.
        """
        assert self._step is not None
        is_gpu = self.device.type == "cuda"
        self._step()
        synchronize(self.device)
        start = time.perf_counter()
        for _ in range(steps):
            self._step()
        synchronize(self.device)
        wall = (time.perf_counter() - start) / steps
        with profile(activities=[ProfilerActivity.CUDA if is_gpu else ProfilerActivity.CPU]) as recorded:
            for _ in range(steps):
                self._step()
            synchronize(self.device)
        timed = []
        for event in recorded.key_averages():
            is_kernel = event.device_type == torch.autograd.DeviceType.CUDA
            is_label = getattr(event, "is_user_annotation", False) or event.key.startswith(("## ", "Torch-Compiled"))
            if is_kernel != is_gpu or is_label:
                continue
            microseconds = event.self_device_time_total if is_gpu else event.self_cpu_time_total
            timed.append((microseconds / steps / 1e3, event.count / steps, event.key))
        self._empty_cache()
        total, launches = sum(ms for ms, _, _ in timed), sum(count for _, count, _ in timed)
        kind = "kernels" if is_gpu else "operators"
        lines = [
            f"{total:.2f} ms in {launches:.0f} launches of {len(timed)} {kind}; a step takes {1e3 * wall:.2f} ms",
            "",
            *_table(timed, rows),
            "",
            *self._profile_host(steps, rows),
        ]
        return "\n".join(lines)

    def _profile_host(self, steps: int, rows: int) -> list[str]:
        """Returns a table of the Python functions that take the most time themselves."""
        assert self._step is not None
        queued = []
        profiler = cProfile.Profile()
        # Gradients are computed in this thread, because the profiler does not see others.
        with torch.autograd.set_multithreading_enabled(False):
            for _ in range(steps):
                synchronize(self.device)
                start = time.perf_counter()
                self._step()
                queued.append(time.perf_counter() - start)
            for _ in range(steps):
                synchronize(self.device)
                profiler.runcall(self._step)
        synchronize(self.device)
        self._empty_cache()
        functions = [
            (1e3 * seconds / steps, calls / steps, _name_function(*key))
            for key, (_, calls, seconds, *_) in pstats.Stats(profiler).stats.items()  # type: ignore[attr-defined]
        ]
        total = sum(ms for ms, _, _ in functions)
        return [
            f"The host queues a step in {1e3 * min(queued):.2f} ms. Python functions, {total:.2f} ms while profiled:",
            "",
            *_table(functions, rows),
        ]

    def _empty_cache(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _table(timed: list[tuple[float, float, str]], rows: int) -> list[str]:
    """Returns the lines of a table of the slowest entries.

    Args:
        timed: Milliseconds, number of calls and name of each entry.
        rows: Number of entries.
    """
    total = max(sum(ms for ms, _, _ in timed), 1e-9)
    lines = [f"{'ms':>9}  {'share':>6}  {'count':>6}  name"]
    for ms, count, name in sorted(timed, reverse=True)[:rows]:
        lines.append(f"{ms:9.3f}  {ms / total:6.1%}  {count:6g}  {name[:160]}")
    return lines


def _name_function(path: str, line: int, name: str) -> str:
    """Returns the name of a profiled function, with the end of its path."""
    return name if path == "~" else f"{name}  {'/'.join(Path(path).parts[-3:])}:{line}"


def prepare_inference(
    case: Case, module: nn.Module, image: torch.Tensor
) -> tuple[Callable[[], torch.Tensor], float | str]:
    """Returns the step of a case and its relative error to float32.

    All ways but the published formulation get weights and images in channels_last. CUDA graphs are those of
    `optimize_for_inference(cuda_graphs=True)`, for models of timm and detectors too.

    Args:
        case: The case.
        module: Module of the case in float32, on the CPU.
        image: Images (B, 3, H, W) in float32, on the CPU.

    Raises:
        ValueError: If the model cannot use a CUDA graph.
    """
    device, dtype = torch.device(case.device), DTYPES[case.dtype]
    module, image = module.to(device), image.to(device, dtype)
    exact = None if is_detector(case.model) else _run_in_float32(case, module, image)
    module = module.to(dtype).requires_grad_(False)
    if case.way != "published":
        module, image = module.to(memory_format=torch.channels_last), image.to(memory_format=torch.channels_last)
    if case.way in ("optimized", "compiled", "graphs"):
        module = optimized(module, case)
    if case.way == "graphs":
        use_cuda_graphs(module)
    if case.way == "compiled":
        module = torch.compile(module, dynamic=False, options={"freezing": True})  # type: ignore[assignment]

    def step() -> torch.Tensor:
        with torch.no_grad():
            return module(image)

    error = "" if exact is None else relative_output_error(step(), exact)
    if case.way == "graphs":
        with torch.no_grad():
            step()
            reason = why_not_cuda_graph(module, image)
        if reason:
            raise ValueError(f"no CUDA graph is used: {reason}")
    return step, error


def prepare_training(case: Case, module: nn.Module, image: torch.Tensor) -> tuple[Callable[[], Any], float | str]:
    """Prepares the training step of a case.

    Returns:
        The step and the relative error of its gradient to float32.

    The error of compiled steps and of detectors is not measured; it is "".

    Args:
        case: The case.
        module: Module of the case in float32, on the CPU.
        image: Images (B, 3, H, W) in float32, on the CPU.
    """
    device, dtype = torch.device(case.device), DTYPES[case.dtype]
    module, image = module.train().to(device), image.to(device)
    for child in module.modules():
        if isinstance(child, DropPath):  # Swin has it by default; skipped branches would make the ways differ
            child.drop_prob = 0.0
    error: float | str = ""
    if not case.way.startswith("compiled") and not is_detector(case.model):  # another batch size would compile again
        error = relative_gradient_error(case, module, image[:ERROR_IMAGES])
    if case.way != "published":
        module, image = module.to(memory_format=torch.channels_last), image.to(memory_format=torch.channels_last)
    return training_step(module, image, case, dtype), error


def relative_output_error(output: torch.Tensor, exact: torch.Tensor) -> float:
    """Returns the norm of the difference over the norm of `exact`."""
    return significant(((output.float() - exact).norm() / exact.norm()).item())


def relative_gradient_error(case: Case, module: nn.Module, image: torch.Tensor) -> float:
    """Returns the relative error of the gradient of all weights under autocast.

    The reference is the published formulation in float32. A model without one is compared with itself in float32.

    Args:
        case: A training case.
        module: Module of the case in training mode, in float32.
        image: Images (B, 3, H, W) in float32.
    """
    exact = _gradient(_reference(case, module), image, torch.float32)
    gradient = _gradient(module, image, DTYPES[case.dtype])
    return relative_output_error(gradient, exact)


def _gradient(module: nn.Module, image: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    target = torch.arange(len(image), device=image.device)
    with _precise():
        with torch.autocast(image.device.type, dtype, enabled=dtype != torch.float32):
            output = module(image)
        gradients = torch.autograd.grad(F.cross_entropy(output.float(), target), list(module.parameters()))
    return torch.cat([gradient.flatten() for gradient in gradients])


def _run_in_float32(case: Case, module: nn.Module, image: torch.Tensor) -> torch.Tensor:
    reference = _reference(case, module)
    with _precise(), torch.no_grad():
        return torch.cat([reference(part.float()) for part in image.split(ERROR_IMAGES)])


def _reference(case: Case, module: nn.Module) -> nn.Module:
    """Returns the published formulation, which none of our kernels run."""
    return published(module) if is_ours(case.model) and case.way != "published" else module


@contextmanager
def _precise() -> Iterator[None]:
    """Context manager: convolutions in float32 do not use TF32."""
    is_allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = is_allowed

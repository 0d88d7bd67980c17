"""How everything is measured: in turns, beside the device's own matrix rate, with the circumstances written down."""

import csv
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision

import stvit
from stvit.tools.common.cli import CommandError, progress_bar, reason

__all__ = [
    "DTYPES",
    "append",
    "circumstances",
    "matrix_peak",
    "peak_memory",
    "percentile",
    "print_table",
    "require_device",
    "significant",
    "synchronize",
    "take_turns",
]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MIB = 2**20


def require_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        CommandError: If it is not at hand.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise CommandError(f"--device {name} is not at hand: {reason(error)}") from error
    return device


def take_turns(
    steps: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device, min_seconds: float = 0.0
) -> dict[str, list[float]]:
    """Seconds that each step takes.

    In each round all have their turn, so that whatever else the machine does meets all alike. Nothing is measured in
    the first round, which compiles and fills caches.

    Args:
        steps: By name.
        repeats: Rounds that are measured.
        device: On which the steps run, waited for.
        min_seconds: Steps shorter than this are repeated within their turn until it is over.

    Returns:
        For each name the seconds of each single step.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    with progress_bar((repeats + 1) * len(steps), "turn", True) as bar:
        for repeat in range(repeats + 1):
            for name, step in steps.items():
                turn = time.perf_counter()
                while True:
                    synchronize(device)
                    start = time.perf_counter()
                    step()
                    synchronize(device)
                    end = time.perf_counter()
                    if repeat > 0:
                        times[name].append(end - start)
                    if repeat == 0 or end - turn >= min_seconds:
                        break
                bar.update()
    return times


def synchronize(device: torch.device) -> None:
    """Waits for the work that the device has been given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def matrix_peak(device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], Any], float]:
    """A product of two square matrices, which runs near the device's highest rate, and its floating-point operations.

    Measured in turn with everything else, its rate is what those could reach at the best.
    """
    size = 8192 if device.type == "cuda" else 2048 if dtype in (torch.float32, torch.float64) else 1024
    a = torch.randn(size, size, device=device).to(dtype)
    out = torch.empty_like(a)
    return lambda: torch.mm(a, a, out=out), 2.0 * size**3


def significant(value: float) -> float:
    """Rounded to four digits."""
    return float(f"{value:.4g}")


def percentile(values: list[float], percent: int) -> float:
    """The value that `percent` % of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


def peak_memory(
    prepare: Callable[..., Callable[[], Any]], *args: Any, device: torch.device, is_compiled: bool = False
) -> tuple[float, float] | None:
    """Measures the memory of one step in a new process.

    Args:
        prepare: Function of a module that makes the step from `args`; the new process imports it.
        args: Arguments of `prepare`, which are pickled.
        device: Device of the step.
        is_compiled: Whether the first step compiles, which takes memory of its own and is not measured.

    Returns:
        The peak in MiB and its increase during the step: of the process on the CPU, of the allocator on CUDA. None
        where the system does not tell the peak: on Windows and on mps.

    Raises:
        CommandError: If the process ends, for example because the memory is full.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(
                _measure_memory, prepare, args, device.type, is_compiled, torch.get_num_threads()
            ).result()
        except BrokenProcessPool as error:
            raise CommandError(f"the process that measures memory was ended, too little memory? {args}") from error


def _measure_memory(
    prepare: Callable[..., Callable[[], Any]], args: Any, device: str, is_compiled: bool, threads: int
) -> tuple[float, float] | None:
    torch.set_num_threads(threads)
    step = prepare(*args)
    if device == "cuda":
        step()  # libraries take their work space at first
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
        return peak / MIB, (peak - before) / MIB
    if is_compiled:
        step()
    start = _forget_peak()
    step()
    end = _process_memory("VmHWM")
    if device != "cpu" or start is None or end is None:
        return None
    return end / MIB, (end - start) / MIB


def _forget_peak() -> int | None:
    """Resets the peak of the process (on Linux); returns its memory in bytes, None if unknown."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        pass
    return _process_memory("VmRSS")


def _process_memory(name: str) -> int | None:
    """Returns the value of /proc/self/status in bytes; elsewhere the peak of the process, on Windows None."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def circumstances(device: torch.device) -> dict[str, Any]:
    """What produced a row."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "stvit": stvit.__version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def print_table(rows: list[dict[str, Any]]) -> None:
    """Prints rows under the names of their columns."""
    widths = {key: max(len(key), *(len(str(row[key])) for row in rows)) for key in rows[0]}
    for row in [dict(zip(widths, widths, strict=True)), *rows]:
        cells = [
            str(row[key]).ljust(width) if isinstance(rows[0][key], str) else str(row[key]).rjust(width)
            for key, width in widths.items()
        ]
        print("  ".join(cells).rstrip())


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Appends rows to a table, which must have their columns.

    Raises:
        CommandError: If it has others, or cannot be written.
    """
    columns = list(rows[0])
    try:
        exists = path.exists() and path.stat().st_size > 0
        if exists:
            with path.open(newline="", encoding="utf-8") as file:
                header = next(csv.reader(file))
            if header != columns:
                raise CommandError(f"--csv {path} has other columns ({', '.join(header)}): choose another file")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            if not exists:
                writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise CommandError(f"cannot write --csv {path}: {reason(error)}") from error

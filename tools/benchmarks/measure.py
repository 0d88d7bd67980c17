"""Measures time and memory, and records versions and hardware."""

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
from typing import Any, TypeVar

import timm
import torch
import torchvision

import stvit

from ..common.cli import CommandError, progress_bar, reason
from ..common.files import atomic_write
from . import config

__all__ = [
    "DTYPES",
    "append",
    "capture",
    "circumstances",
    "default_device",
    "matrix_peak",
    "peak_memory",
    "percentile",
    "print_table",
    "replace_table",
    "require_device",
    "significant",
    "synchronize",
    "take_turns",
    "time_turn",
    "write_table",
]

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in config.DTYPES}
MIB = 2**20
T = TypeVar("T")


def default_device() -> str:
    """Returns cuda if it is available, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def require_device(name: str) -> torch.device:
    """Returns the device of a name.

    Raises:
        CommandError: If it is not available.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first_sentence = reason(error).partition(". ")[0]  # a list of thousands of characters may follow
        raise CommandError(f"--device {name} is not available: {first_sentence}") from error
    return device


def take_turns(
    steps: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device, min_seconds: float = 0.0
) -> dict[str, list[float]]:
    """Measures the time of each step.

    All steps run once in each round, so that other load on the machine affects them equally. The first round compiles
    and fills caches, and is not measured.

    Args:
        steps: Steps by name.
        repeats: Measured rounds.
        device: Device of the steps. Each measurement waits for it.
        min_seconds: Least duration of a turn. Shorter steps are repeated within the turn.

    Returns:
        Seconds of each repetition, by name.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    with progress_bar((repeats + 1) * len(steps), "turn", True) as bar:
        for repeat in range(repeats + 1):
            for name, step in steps.items():
                measured = time_turn(step, device, min_seconds if repeat > 0 else 0.0)
                times[name] += measured if repeat > 0 else []
                bar.update()
    return times


def time_turn(step: Callable[[], Any], device: torch.device, min_seconds: float = 0.0) -> list[float]:
    """Runs a step for `min_seconds` or longer and returns the seconds of each run."""
    times: list[float] = []
    turn = time.perf_counter()
    while not times or time.perf_counter() - turn < min_seconds:
        synchronize(device)
        start = time.perf_counter()
        step()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return times


def capture(step: Callable[[], T]) -> Callable[[], T]:
    """Captures a step in a CUDA graph, so that Python does not slow its launches.

    Returns:
        Function that replays the graph and returns the step's output, which each replay overwrites.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, and allocates the workspaces of libraries
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step()

    def replay() -> T:
        graph.replay()
        return output

    return replay


def synchronize(device: torch.device) -> None:
    """Waits until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def matrix_peak(device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], Any], float]:
    """Returns a step that multiplies large matrices, and its number of operations.

    It runs near the highest rate of the device, an upper limit for all other steps.
    """
    size = 8192 if device.type == "cuda" else 2048 if dtype in (torch.float32, torch.float64) else 1024
    a = torch.randn(size, size, device=device).to(dtype)
    out = torch.empty_like(a)
    return lambda: torch.mm(a, a, out=out), 2.0 * size**3


def significant(value: float) -> float:
    """Rounds a number to four significant digits."""
    return float(f"{value:.4g}")


def percentile(values: list[float], percent: int) -> float:
    """Returns a percentile of the values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


def peak_memory(
    prepare: Callable[..., Callable[[], Any]], *args: Any, device: torch.device, is_compiled: bool = False
) -> tuple[float, float] | None:
    """Measures the memory of one step in a new process.

    Args:
        prepare: Function of a module that returns the step for `args`. The new process imports it.
        args: Arguments of `prepare`. They are pickled.
        device: Device of the step.
        is_compiled: Whether the first step compiles, whose memory is not measured.

    Returns:
        Peak memory in MiB and its increase during the step: of the process on the CPU, of the allocator on CUDA. None
        on Windows and mps, which do not report peak memory.

    Raises:
        CommandError: If the process ends, for example because memory is full.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(
                _measure_memory, prepare, args, device.type, is_compiled, torch.get_num_threads()
            ).result()
        except BrokenProcessPool as error:
            raise CommandError(
                f"the memory measurement of {args} was killed, most likely because memory was full"
            ) from error


def _measure_memory(
    prepare: Callable[..., Callable[[], Any]], args: Any, device: str, is_compiled: bool, threads: int
) -> tuple[float, float] | None:
    torch.set_num_threads(threads)
    step = prepare(*args)
    if device == "cuda":
        step()  # libraries allocate their workspace
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
    """Resets the peak memory of the process, on Linux.

    Returns the current memory in bytes; None if unknown.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        pass
    return _process_memory("VmRSS")


def _process_memory(name: str) -> int | None:
    """Returns a value of /proc/self/status in bytes.

    On macOS it returns the peak memory, on Windows None.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def circumstances(device: torch.device) -> dict[str, Any]:
    """Returns the date, hardware and versions for the rows of a table."""
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
    """Prints rows as a table with a header."""
    widths = {key: max(len(key), *(len(str(row[key])) for row in rows)) for key in rows[0]}
    for row in [dict(zip(widths, widths, strict=True)), *rows]:
        cells = [
            str(row[key]).ljust(width) if isinstance(rows[0][key], str) else str(row[key]).rjust(width)
            for key, width in widths.items()
        ]
        print("  ".join(cells).rstrip())


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Appends rows to a CSV file with the same columns.

    Raises:
        CommandError: If the file has other columns, or cannot be written.
    """
    columns = list(rows[0])
    try:
        exists = _check_columns(path, columns)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            if not exists:
                writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise CommandError(f"cannot write --csv {path}: {reason(error)}") from error


def replace_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes rows as a CSV file atomically, in place of an earlier table.

    Raises:
        CommandError: If the file has other columns, or cannot be written.
    """
    try:
        _check_columns(path, list(rows[0]))
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, lambda fresh: write_table(fresh, rows))
    except OSError as error:
        raise CommandError(f"cannot write --csv {path}: {reason(error)}") from error


def _check_columns(path: Path, columns: list[str]) -> bool:
    """Returns whether a file contains a table.

    Raises:
        CommandError: If the table has other columns.
    """
    if not path.exists() or path.stat().st_size == 0:
        return False
    with path.open(newline="", encoding="utf-8") as file:
        header = next(csv.reader(file))
    if header != columns:
        raise CommandError(f"--csv {path} has other columns ({', '.join(header)}); choose another file")
    return True


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes rows as a CSV file, in place of an earlier one."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)

"""Times the block sizes of tools/benchmarks/candidates.py in its own process."""

import itertools
import os
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .candidates import Candidate, candidates
from .kernels import measure_bandwidth
from .measure import capture, significant, time_turn

__all__ = ["CandidateCompiler", "CandidateTimer"]

RUNS = 10  # launches in a graph
REPEATS = 7  # replays of a graph
CANDIDATE_SECONDS = 0.05  # limit of the launches in a graph, for slow candidates


class CandidateCompiler:
    """Runs every n-th candidate once.

    This fills Triton's cache on the disk for the process that measures.
    """

    def __init__(self, part: int, parts: int) -> None:
        """Takes the candidates part, part + parts, part + 2 * parts and so on."""
        self.part, self.parts = part, parts

    def prepare(self) -> dict[str, Any]:
        """Compiles the candidates. Errors are left to the process that measures."""
        for candidate in itertools.islice(candidates(), self.part, None, self.parts):
            try:
                candidate.run()
            except Exception as error:
                print(f"{candidate.kernel} {candidate.shape} {candidate.blocks}: {error}", flush=True)
        return {}


class CandidateTimer:
    """Measures one candidate after the other."""

    def __init__(self, skip: int = 0) -> None:
        """Skips candidates that were measured before."""
        self._candidates: Iterator[Candidate] = itertools.islice(candidates(), skip, None)
        self._next: Candidate | None = None
        self._flush: Callable[[], Any] = lambda: None
        self._bandwidth: float | None = None
        self._is_gpu = torch.cuda.is_available()

    def prepare(self) -> dict[str, Any]:
        """Measures the bandwidth of a large copy, on a GPU.

        Returns:
            `tb_per_second`, or "" on a CPU.
        """
        if not self._is_gpu:
            return {"tb_per_second": ""}
        device = torch.device("cuda")
        self._bandwidth = measure_bandwidth(device, 3)
        torch.cuda.empty_cache()
        # Reading evicts the cache without leaving lines that have to be written back during the next kernel.
        size = 3 * getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 2**26)
        values, total = torch.ones(max(size, 2**26) // 4, device=device), torch.empty((), device=device)
        self._flush = lambda: torch.sum(values, dim=0, out=total)
        return {"tb_per_second": significant(self._bandwidth / 1e12)}

    def peek(self) -> dict[str, Any] | None:
        """Returns the columns that name the next candidate; None at the end."""
        self._next = next(self._candidates, None)
        if self._next is None:
            return None
        blocks = " ".join(f"{name}={value}" for name, value in self._next.blocks.items())
        return {
            "kernel": self._next.kernel,
            "shape": self._next.shape,
            "blocks": blocks or "default",
            "default": "yes" if self._next.is_default else "",
        }

    def measure(self) -> dict[str, Any]:
        """Measures the candidate that `peek` named.

        Returns:
            Microseconds and their ratio to the floor.

        On a GPU an error that the device keeps ends the process.
        """
        assert self._next is not None
        candidate, self._next = self._next, None
        try:
            seconds = self._time_on_gpu(candidate.run) if self._is_gpu else _time_on_cpu(candidate.run)
        except Exception:
            _end_if_device_is_lost()
            raise
        median = statistics.median(seconds)
        floor = candidate.floor_bytes / self._bandwidth if self._bandwidth else None
        return {
            "microseconds": significant(1e6 * median),
            "min": significant(1e6 * min(seconds)),
            "max": significant(1e6 * max(seconds)),
            "floor": significant(1e6 * floor) if floor else "",
            "floors": significant(median / floor) if floor else "",
            "floor_mb": significant(candidate.floor_bytes / 1e6),
        }

    def _time_on_gpu(self, run: Callable[[], Any]) -> list[float]:
        """Returns the seconds of one run, in each of several repeats.

        Each repeat replays a CUDA graph of several runs, with the cache emptied before each run. The time to empty the
        cache, that of a second graph, is subtracted.
        """
        run()
        torch.cuda.synchronize()
        once = _time_graph(run)
        runs = max(1, min(RUNS, int(CANDIDATE_SECONDS / max(once, 1e-6))))
        both, flush = capture(lambda: self._repeat(runs, run)), capture(lambda: self._repeat(runs, lambda: None))
        return [(_time_graph(both) - _time_graph(flush)) / runs for _ in range(REPEATS)]

    def _repeat(self, runs: int, run: Callable[[], Any]) -> None:
        for _ in range(runs):
            self._flush()
            run()


def _time_graph(replay: Callable[[], Any]) -> float:
    """Returns the seconds of a call, by the device's events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _time_on_cpu(run: Callable[[], Any]) -> list[float]:
    run()
    return time_turn(run, torch.device("cpu"))


def _end_if_device_is_lost() -> None:
    """Ends the process if the GPU answers every further call with the same error."""
    if torch.cuda.is_available():
        try:
            torch.ones(1, device="cuda").item()
        except RuntimeError:
            os._exit(1)

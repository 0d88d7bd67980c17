"""Tests calls in another process.

The tests cover results, errors, limits on time and memory, and the end of each process.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stvit.tools.common.cli import CommandError
from stvit.tools.demonstration.worker import Worker


def add(a: int, b: int) -> tuple[int, int]:
    return a + b, os.getpid()


def fail(error: BaseException) -> None:
    raise error


def hang(path: Path) -> None:
    path.touch()
    while True:
        time.sleep(0.1)


def allocate(size: int) -> int:
    return len(bytearray(size))


def end() -> None:
    os._exit(3)


def prepare() -> None:
    """Does nothing. To find this function, the process imports this module."""


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    worker = Worker(60, max_bytes=4 * 2**30, setup=prepare)
    yield worker
    worker.close()


def test_results_and_errors(worker: Worker, capfd: pytest.CaptureFixture[str]) -> None:
    result, process = worker.call(add, 1, 2)
    assert result == 3 and process != os.getpid()
    with pytest.raises(CommandError, match="choose another"):
        worker.call(fail, CommandError("choose another"))
    with pytest.raises(RuntimeError, match=r"^KeyError in the computing process$"):
        worker.call(fail, KeyError("secret"))
    assert "secret" in capfd.readouterr().err
    assert worker.call(add, 3, 4) == (7, process)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux only")
def test_memory_is_limited(worker: Worker) -> None:
    with pytest.raises(CommandError, match="this needs more memory than the limit of 4 GB; choose a smaller model"):
        worker.call(allocate, 8 * 2**30)


def test_a_call_that_hangs_is_stopped_and_others_continue(worker: Worker, tmp_path: Path) -> None:
    """A call that waited gets its result from the next process.

    A process that ends by itself is an error as well.
    """
    first = worker.call(add, 1, 1)[1]
    results: list[Any] = []

    def call(function: Any, *args: Any) -> None:
        try:
            results.append(worker.call(function, *args))
        except CommandError as error:
            results.append(str(error))

    worker.seconds = 2
    hanging = threading.Thread(target=call, args=(hang, tmp_path / "started"))
    hanging.start()
    while not (tmp_path / "started").exists():
        assert hanging.is_alive()
        time.sleep(0.01)
    worker.seconds = 60  # for the following calls
    waiting = threading.Thread(target=call, args=(add, 2, 2))
    waiting.start()
    hanging.join()
    waiting.join()
    assert results[0] == "stopped after 2 seconds, the limit for one request; choose a smaller model"
    assert results[1][0] == 4 and results[1][1] != first
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)
    with pytest.raises(CommandError, match="the computing process ended, possibly because memory was full"):
        worker.call(end)


def test_too_many_calls_are_refused(worker: Worker) -> None:
    for _ in range(8):
        assert worker._places.acquire(blocking=False)
    try:
        with pytest.raises(CommandError, match="too many requests are waiting; try again in a minute"):
            worker.call(add, 1, 2)
    finally:
        worker._places.release(8)


def parent(pipe: Any) -> None:
    worker = Worker(60)
    pipe.send(worker.call(add, 1, 2)[1])
    worker.call(hang, Path(os.devnull))


@pytest.mark.long
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the test forks a process, which Windows cannot")
def test_the_process_ends_with_its_parent() -> None:
    """The parent is killed during a call."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=parent, args=(theirs,))
    process.start()
    assert ours.poll(120)
    child = ours.recv()
    process.kill()
    process.join()
    for _ in range(600):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{child}/stat").exists() and " Z " in Path(f"/proc/{child}/stat").read_text():
            return  # the process has ended, and its parent has not asked for its status yet
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    raise AssertionError("the process runs on")

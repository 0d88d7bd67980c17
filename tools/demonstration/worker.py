"""Runs functions in another process, with limits on time and memory."""

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from ..common.cli import CommandError

# Longest start of a process, which imports PyTorch and other libraries.
START_S = 180.0


def _nothing() -> None:
    pass


class Worker:
    """A process that runs functions, one call at a time.

    Any thread may call it. The process starts with the first call. After a call that ended the process, the next call
    starts a new one.
    """

    def __init__(
        self,
        seconds: float,
        *,
        max_bytes: int | None = None,
        max_waiting: int = 8,
        setup: Callable[[], None] = _nothing,
    ) -> None:
        """Stores the limits; the process starts later.

        Args:
            seconds: Longest duration of a call, without waiting for other calls and for the start of the process.
            max_bytes: Largest memory of the process, on Linux only; None for no limit.
            max_waiting: Largest number of calls at a time, including the running one. Further calls are refused.
            setup: Function that runs first in the process. Its module imports the libraries that the calls need.
        """
        self.seconds = seconds
        self._max_bytes = max_bytes
        self._setup = setup
        self._places = threading.BoundedSemaphore(max_waiting)
        self._turn = threading.Lock()
        self._process: Any = None
        self._connection: Connection | None = None
        self._is_closed = False

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Runs a function in the process.

        Args:
            function: Function at the top level of a module.
            args: Arguments of the function. Arguments and result are pickled.

        Raises:
            CommandError: If the function raises it, the call takes too much time or memory, the process ends, or too
                many calls are waiting.
            RuntimeError: If the function raises another error. The process prints the traceback.
        """
        if not self._places.acquire(blocking=False):
            raise CommandError("too many requests are waiting; try again in a minute")
        try:
            with self._turn:
                kind, value = self._call(function, args)
        finally:
            self._places.release()
        if kind == "result":
            return value
        raise (RuntimeError if kind == "failed" else CommandError)(value)

    def start(self) -> None:
        """Starts the process in the background."""

        def work() -> None:
            try:
                self.call(_nothing)
            except CommandError:  # the first real call reports the same error
                pass

        threading.Thread(target=work, daemon=True).start()

    def close(self) -> None:
        """Ends the process and its running call, and refuses further calls."""
        self._is_closed = True
        process = self._process
        if process is not None:
            process.kill()
            process.join()

    def _call(self, function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[str, Any]:
        connection, seconds = self._connect(), self.seconds
        try:
            connection.send((function, args))
            if connection.poll(seconds):
                answer: tuple[str, Any] = connection.recv()
                if answer[0] == "too large":  # frees the memory
                    self._end()
                return answer
        except (EOFError, OSError) as error:
            self._end()
            raise CommandError(
                "the computing process ended, possibly because memory was full; choose a smaller model or image"
            ) from error
        self._end()
        raise CommandError(f"stopped after {seconds:g} seconds, the limit for one request; choose a smaller model")

    def _connect(self) -> Connection:
        if self._connection is not None and self._process.is_alive():
            return self._connection
        self._end()
        if self._is_closed:
            raise CommandError("the server is shutting down")
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self._max_bytes, self._setup), daemon=True)
        process.start()
        self._process = process
        theirs.close()
        try:
            if self._is_closed or not self._connection.poll(START_S):
                raise OSError("no answer")
            self._connection.recv()
        except (EOFError, OSError) as error:
            self._end()
            raise CommandError("the computing process does not start; see the log of the server") from error
        return self._connection

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
        if self._connection is not None:
            self._connection.close()
        self._process = self._connection = None


def _serve(connection: Connection, max_bytes: int | None, setup: Callable[[], None]) -> None:
    """Answers calls in the process until the connection is closed."""
    # A terminal sends these signals to all its processes. The parent ends this process.
    for name in ("SIGINT", "SIGHUP", "SIGBREAK"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the parent may ignore it, and a child inherits this
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if max_bytes is not None:
        _limit_memory(max_bytes)
    setup()
    connection.send("ready")
    while True:
        try:
            function, args = connection.recv()
        except (EOFError, OSError):
            return
        try:
            answer: tuple[str, Any] = "result", function(*args)
        except Exception as error:
            if max_bytes is not None and (isinstance(error, MemoryError) or "allocate memory" in str(error)):
                answer = (
                    "too large",
                    f"this needs more memory than the limit of {max_bytes / 2**30:g} GB; choose a smaller model",
                )
            elif isinstance(error, CommandError):
                answer = "refused", str(error)
            else:
                traceback.print_exc()
                answer = "failed", f"{type(error).__name__} in the computing process"
        connection.send(answer)


def _end_with_parent() -> None:
    """Ends the process when its parent ends, even by SIGKILL."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _limit_memory(max_bytes: int) -> None:
    if sys.platform != "linux":
        return
    import resource

    resource.setrlimit(resource.RLIMIT_DATA, (max_bytes, max_bytes))
    try:
        # If the memory of the machine is full, the kernel ends this process first, not the page.
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write("1000")
    except OSError:
        pass

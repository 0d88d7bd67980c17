"""Objects in processes of their own.

A crash or a full memory then ends one measurement and not all of them.
"""

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ..common.cli import reason

__all__ = ["Failure", "Iteration", "Remote"]

END_SECONDS = 3.0  # time for an idle process to end by itself


class Failure(Exception):
    """An error in the other process, or its end; the message is one line."""


class Remote:
    """An object in a process of its own, whose methods are called by name.

    Arguments and results are pickled. The process writes its output and its tracebacks to a log.
    """

    def __init__(self, make: Callable[..., Any], *args: Any, log: Path) -> None:
        """Starts the process.

        Args:
            make: Class or function of a module that returns the object. The first call of a method runs it.
            *args: Arguments of `make`.
            log: File to append the output to.
        """
        context = _context()
        self.connection: Connection
        self.connection, theirs = context.Pipe()
        self._log = log
        self._process: Any = context.Process(target=_serve, args=(theirs, make, args, str(log)), daemon=True)
        self._process.start()
        self._is_busy = False
        theirs.close()

    def send(self, method: str, *args: Any) -> None:
        """Starts a call. `receive` returns its result.

        Raises:
            Failure: If the process ended.
        """
        try:
            self.connection.send((method, args))
            self._is_busy = True
        except OSError as error:
            raise self._ended() from error

    def receive(self, seconds: float) -> Any:
        """Returns the result of the last `send`.

        Raises:
            Failure: If the call failed, the process ended, or no result arrived within `seconds`. In the last case the
                process is killed.
        """
        try:
            if not self.connection.poll(max(0.0, seconds)):
                self.close()
                raise Failure(f"no result within {max(0.0, seconds):.0f} s")
            is_result, value = self.connection.recv()
            self._is_busy = False
        except (EOFError, OSError) as error:
            raise self._ended() from error
        if not is_result:
            raise Failure(value)
        return value

    def call(self, method: str, *args: Any, seconds: float) -> Any:
        """Calls a method and returns its result, like `send` and `receive`."""
        self.send(method, *args)
        return self.receive(seconds)

    def is_alive(self) -> bool:
        """Returns whether the process can answer."""
        return not self.connection.closed and self._process.is_alive()

    def hang_up(self) -> None:
        """Lets the process end by itself, without waiting for it."""
        self.connection.close()

    def close(self, seconds: float = END_SECONDS) -> None:
        """Ends the process.

        It is killed if it is busy or does not end by itself within `seconds`.
        """
        self.connection.close()
        if not self._is_busy:
            self._process.join(max(0.0, seconds))
        self._process.kill()
        self._process.join()

    def _ended(self) -> Failure:
        self._process.join(5.0)
        return Failure(f"the process ended with exit code {self._process.exitcode}; see {self._log}")


class Iteration:
    """The items of a generator, for a process of its own that makes them one by one."""

    def __init__(self, make: Callable[..., Iterable[Any]], *args: Any) -> None:
        """Takes a function of a module that returns the items, and its arguments."""
        self._items = iter(make(*args))

    def next(self) -> Any:
        """Returns the next item; None at the end."""
        return next(self._items, None)


def _context() -> Any:
    """Returns a way to start processes without a copy of this process's GPU state.

    The server of `forkserver` imports the libraries once for all processes.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["stvit.tools.benchmarks.steps"])
    return context


def _serve(connection: Connection, make: Callable[..., Any], args: tuple[Any, ...], log: str) -> None:
    """Runs the calls that arrive, until the connection is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the command, which then kills this process
    with open(log, "a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    target: Any = None
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        try:
            if target is None:
                target = make(*args)
            answer = (True, getattr(target, method)(*arguments))
        except Exception as error:
            traceback.print_exc()
            traceback.clear_frames(error.__traceback__)  # they hold tensors
            answer = (False, f"{type(error).__name__}: {reason(error)}"[:400])
        connection.send(answer)

"""Signals that ask a command to stop."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class StopNow(BaseException):
    """Raised by a signal within `StopRequest.at_once`.

    It is not an Exception, which other code could catch.
    """


class StopRequest:
    """Remembers signals, so that a program stops when its state is complete.

    The signals are SIGTERM, Ctrl-C and (on Windows) Ctrl-Break. A second Ctrl-C raises KeyboardInterrupt immediately.

    Attributes:
        signum: The signal that was received; None if there was none.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._patience: float | None = None  # seconds, within `at_once`
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for signum in (signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGBREAK", None)):
            if signum is None:
                continue
            self._handlers[signum] = signal.signal(signum, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)

    @contextmanager
    def at_once(self, is_on: bool = True, patience: float = 0.0) -> Iterator[None]:
        """Context that a signal ends by `StopNow`, even while it waits.

        Args:
            is_on: Whether signals end the context. Otherwise they are only remembered.
            patience: Seconds after the signal in which the context may still finish. Windows has no such timer.

        Raises:
            StopNow: If a signal is received, or was received before the context.
        """
        self._patience = patience if is_on else None
        try:
            if is_on and self:
                raise StopNow
            yield
        finally:
            self._patience = None
            if getattr(signal, "SIGALRM", None) in self._handlers:
                signal.setitimer(signal.ITIMER_REAL, 0.0)
                signal.signal(signal.SIGALRM, self._handlers.pop(signal.SIGALRM))

    def _remember(self, signum: int, _: FrameType | None) -> None:
        if signum == signal.SIGINT and self.signum is not None:
            raise KeyboardInterrupt
        self.signum = signum
        if self._patience and hasattr(signal, "setitimer"):
            if signal.SIGALRM not in self._handlers:
                self._handlers[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._stop_now)
                signal.setitimer(signal.ITIMER_REAL, self._patience)
        elif self._patience is not None:
            self._stop_now()

    def _stop_now(self, *_: object) -> None:
        if self._patience is not None:
            self._patience = None
            raise StopNow

    def __bool__(self) -> bool:
        return self.signum is not None


def ignore_signals_in_worker(_: int) -> None:
    """Makes a loader's worker process end only when its main process ends it.

    Terminals and schedulers signal every process of a command, but the main process needs its workers until it has
    stopped. macOS and Windows have no `sigwaitinfo`, so SIGTERM ends the workers there.
    """
    for signum in (signal.SIGINT, getattr(signal, "SIGBREAK", None)):
        if signum is not None:
            signal.signal(signum, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()

"""The processes of a run: which there are, what they tell each other, and the signals that ask them to stop."""

import argparse
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeVar

import torch
from timm.utils.distributed import init_distributed_device_so
from torch import distributed

from stvit.tools.common.cli import CommandError, Switch, reason

T = TypeVar("T")

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_device_arguments(group: Any) -> None:
    """Adds the flags for device and precision, which are the same in every command."""
    group.add_argument("--device", metavar="NAME", help="cpu, cuda, mps, … (default: cuda if available, else cpu)")
    group.add_argument(
        "--dist-backend",
        metavar="NAME",
        help="(default: nccl for cuda if available, as it is not on Windows; else gloo)",
    )
    group.add_argument("--amp", action=Switch, help="mixed precision")
    group.add_argument("--amp-dtype", default="bfloat16", choices=["bfloat16", "float16"], help="its lower precision")
    group.add_argument("--model-dtype", default="float32", choices=list(DTYPES), help="of weights and images")
    group.add_argument("--channels-last", action=Switch, help="channels_last memory format")


@dataclass(frozen=True)
class World:
    """This process among those of the run.

    Attributes:
        device: What this process computes on.
        rank: Its number, 0 to size - 1, over all machines.
        size: Number of processes over all machines.
    """

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that speaks and writes."""
        return self.rank == 0

    def say(self, text: str) -> None:
        """Prints a line, if this is the first process."""
        if self.is_first:
            print(text, flush=True)

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in the order of their ranks, on every process."""
        values = [value]
        if self.size > 1:
            values *= self.size
            distributed.all_gather_object(values, value)
        return values

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            distributed.all_reduce(values)
        return values

    def any(self, value: bool) -> bool:
        """Whether the value is true for any process."""
        if self.size == 1:
            return value
        return bool(self.sum(torch.tensor(float(value), device=self.device)).item())

    def from_first(self, value: Any) -> Any:
        """The first process's value, on every process."""
        values = [value]
        if self.size > 1:
            distributed.broadcast_object_list(values, device=self.device)
        return values[0]

    def by_first(self, find: Callable[[], T]) -> T:
        """What the first process finds, on every process; its CommandError is everybody's."""
        found: Any = None
        if self.is_first:
            try:
                found = find()
            except CommandError as error:
                found = error
        found = self.from_first(found)
        if isinstance(found, CommandError):
            raise found
        return found

    @contextmanager
    def first_goes_first(self) -> Iterator[None]:
        """The others enter after the first has left: what it downloads they find."""
        if self.size > 1 and not self.is_first:
            distributed.barrier()
        yield
        if self.size > 1 and self.is_first:
            distributed.barrier()


def autocast(args: argparse.Namespace, world: World) -> AbstractContextManager[Any]:
    """Returns the context of a forward pass in the precision of the flags."""
    if not args.amp:
        return nullcontext()
    return torch.autocast(world.device.type, dtype=DTYPES[args.amp_dtype])


@contextmanager
def join_world(device: str | None, backend: str | None = None) -> Iterator[World]:
    """Joins the processes that torchrun (or Slurm) describes in the environment; without them this one is the only one.

    Args:
        device: Name of the device; None for CUDA if it is available, else the CPU.
        backend: Backend of torch.distributed; None for nccl on CUDA if it is available, else gloo.

    Raises:
        CommandError: If the device or the backend cannot be used.
    """
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("mps") and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise CommandError(f"--device {name} is for one process; run the command without torchrun")
    if backend is None and name.startswith("cuda") and not _has_nccl():
        backend = "gloo"
    try:
        torch.zeros(1, device=name).item()
        joined = init_distributed_device_so(name, dist_backend=backend)
        world = World(torch.device(joined["device"]), joined["global_rank"], joined["world_size"])
        torch.zeros(1, device=world.device).item()
    except (RuntimeError, AssertionError, ValueError) as error:
        raise CommandError(f"--device {name} cannot be used: {reason(error)}") from error
    # PyTorch warns of the layout in which it sums the gradients of 1x1 convolutions, of which nothing follows.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    if not world.is_first:
        warnings.simplefilter("ignore")
    try:
        yield world
    finally:
        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()


def _has_nccl() -> bool:
    return distributed.is_available() and distributed.is_nccl_available()


def check_dtype(device: torch.device, dtype: str) -> None:
    """Refuses a precision that the device does not have.

    Args:
        device: Device of the model.
        dtype: Value of `--model-dtype`.

    Raises:
        CommandError: If it is float64 on mps.
    """
    if device.type == "mps" and dtype == "float64":
        raise CommandError("--model-dtype float64: mps computes in float32 or less; pass float32, or --device cpu")


class StopNow(BaseException):
    """Raised by a signal within `StopRequest.at_once`. Not an Exception, which code in between could catch."""


class StopRequest:
    """Notes SIGTERM, Ctrl-C and (on Windows) Ctrl-Break, so that the program can stop where its state is whole.

    A second Ctrl-C raises KeyboardInterrupt at once.
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
        """Makes a signal end the block by `StopNow`, even while it waits for a file or another process.

        Args:
            is_on: Whether it does; without it signals are noted as elsewhere.
            patience: Seconds from the signal on in which the block may end by itself. Windows has no such timer.

        Raises:
            StopNow: If a signal has come, also one from before the block.
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


def obey_parent_alone(_: int) -> None:
    """Makes a loader's worker process end only when its main process ends it.

    Terminals and schedulers signal every process of a command, but the main process needs its workers until it has
    stopped. macOS and Windows have no `sigwaitinfo`: SIGTERM to all processes ends the workers first there.
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

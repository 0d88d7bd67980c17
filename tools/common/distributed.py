"""The processes of a command: devices, communication and precision."""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from timm.utils.distributed import init_distributed_device_so

from . import config
from .cli import CommandError, reason
from .config import DeviceConfig

T = TypeVar("T")

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in config.DTYPES}


@dataclass(frozen=True)
class Distributed:
    """This process and its place among the processes of the command.

    Attributes:
        device: Device of this process.
        rank: Number of this process over all machines, from 0 to size - 1.
        size: Number of processes over all machines.
    """

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_primary(self) -> bool:
        """True in the process that prints messages and writes files."""
        return self.rank == 0

    def print_primary(self, text: str) -> None:
        """Prints a line in the primary process."""
        if self.is_primary:
            print(text, flush=True)

    def gather(self, value: Any) -> list[Any]:
        """Returns the values of all processes, in order of their ranks."""
        values = [value]
        if self.size > 1:
            values *= self.size
            dist.all_gather_object(values, value)
        return values

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sums a tensor over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def any(self, value: bool) -> bool:
        """Returns whether the value is true in any process."""
        if self.size == 1:
            return value
        return bool(self.sum(torch.tensor(float(value), device=self.device)).item())

    def from_primary(self, value: Any) -> Any:
        """Returns the primary process's value in every process."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, device=self.device)
        return values[0]

    def on_primary(self, function: Callable[[], T]) -> T:
        """Calls a function in the primary process; returns its result in every process.

        Raises:
            CommandError: In every process, if the function raises it.
        """
        result: Any = None
        if self.is_primary:
            try:
                result = function()
            except CommandError as error:
                result = error
        result = self.from_primary(result)
        if isinstance(result, CommandError):
            raise result
        return result

    @contextmanager
    def primary_first(self) -> Iterator[None]:
        """Context that the primary process passes first.

        The others then find the files that it downloaded.
        """
        if self.size > 1 and not self.is_primary:
            dist.barrier()
        yield
        if self.size > 1 and self.is_primary:
            dist.barrier()


@contextmanager
def join_processes(device: str | None, backend: str | None = None) -> Iterator[Distributed]:
    """Joins the processes that torchrun or Slurm started, if they did.

    Args:
        device: Device name; None for CUDA if it is available, else the CPU.
        backend: torch.distributed backend; None for nccl on CUDA if it is available, else gloo.

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
        distributed = Distributed(torch.device(joined["device"]), joined["global_rank"], joined["world_size"])
        torch.zeros(1, device=distributed.device).item()
    except (RuntimeError, AssertionError, ValueError) as error:
        raise CommandError(f"--device {name} cannot be used: {reason(error)}") from error
    # PyTorch warns about the memory layout of the gradients of 1x1 convolutions, which has no effect on results.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    # PyTorch warns if there are more loader workers than cores, which does no harm: workers also wait for files.
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    if not distributed.is_primary:
        warnings.simplefilter("ignore")
    try:
        yield distributed
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


def _has_nccl() -> bool:
    return dist.is_available() and dist.is_nccl_available()


def autocast(device_config: DeviceConfig, device: torch.device) -> AbstractContextManager[Any]:
    """Returns the context of a forward pass: mixed precision, if it is on."""
    if not device_config.amp:
        return nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[device_config.amp_dtype])


def check_dtype(device: torch.device, dtype: str) -> None:
    """Checks that the device supports a precision.

    Args:
        device: Device of the model.
        dtype: Value of `--model-dtype`.

    Raises:
        CommandError: If it is float64 on mps.
    """
    if device.type == "mps" and dtype == "float64":
        raise CommandError("--model-dtype float64: mps computes in float32 or less; pass float32, or --device cpu")

"""Launches Triton kernels with little work in Python.

Triton looks up the compiled kernel in each launch. This takes longer than a small kernel runs. A `Launch` keeps what
depends on the shapes and remembers the compiled kernel.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache, wraps
from typing import Any, TypeVar

import torch
import triton
from torch._subclasses.functional_tensor import FunctionalTensor
from triton.compiler import CompiledKernel

from stvit.ops.operators import IS_INLINED

__all__ = ["Blocks", "Launch", "block_of_channels", "cdiv", "freeze", "next_power_of_2", "once_per_shape"]

# Launches that each function of kernels remembers. A model with fixed sizes needs a few dozen.
LAUNCHES = 4096
_ALIGNMENT = 16  # bytes; Triton compiles other kernels for pointers that are not aligned
# Triton 3.2 passes no constants to a compiled kernel.
_PASSES_CONSTANTS = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 3)

Blocks = tuple[tuple[str, int], ...]
_Prepared = TypeVar("_Prepared")


class Launch:
    """A kernel launch without its tensors: grid, numbers and constants.

    Create each `Launch` once and call it often. It remembers one compiled kernel for each device and each combination
    of dtypes.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], *numbers: float, **constants: Any) -> None:
        """
        Args:
            kernel: Function with the decorator `triton.jit`. Its parameters are tensors, then numbers, then constants.
            grid: Number of programs along each axis.
            numbers: Numbers, in the order of the kernel's parameters.
            constants: Constants of the kernel, and options such as `num_warps`.
        """
        self.kernel = kernel
        self.grid = (*grid, 1, 1)[:3]
        self.numbers = numbers
        self.constants = constants
        self._compiled: dict[tuple[Any, ...], tuple[CompiledKernel, tuple[Any, ...]]] = {}

    def __call__(self, *tensors: torch.Tensor) -> None:
        """Launches the kernel on the current stream of the first tensor's device.

        Args:
            tensors: Tensors on one device, in the order of the kernel's parameters.
        """
        if IS_INLINED and isinstance(tensors[0], FunctionalTensor):  # torch.compile records the launch
            torch.library.wrap_triton(self.kernel)[self.grid](*tensors, *self.numbers, **self.constants)
            return
        device = tensors[0].get_device()
        if device >= 0 and device != torch.cuda.current_device():  # Triton launches on the current device
            with torch.cuda.device(device):
                self(*tensors)
            return
        key = (device, *[x.dtype for x in tensors])
        remembered = self._compiled.get(key)
        if remembered is None or not _are_aligned(tensors):
            self._compile(key, tensors)
        else:
            compiled, values = remembered
            compiled[self.grid](*tensors, *values)

    def _compile(self, key: tuple[Any, ...], tensors: tuple[torch.Tensor, ...]) -> None:
        """Launches the kernel through Triton, which compiles it if necessary."""
        compiled = self.kernel[self.grid](*tensors, *self.numbers, **self.constants)
        if isinstance(compiled, CompiledKernel) and _are_aligned(tensors):  # the interpreter returns None
            names = self.kernel.arg_names[len(tensors) + len(self.numbers) :] if _PASSES_CONSTANTS else ()
            self._compiled[key] = compiled, (*self.numbers, *(self.constants[name] for name in names))


def _are_aligned(tensors: tuple[torch.Tensor, ...]) -> bool:
    bits = 0
    for x in tensors:
        bits |= x.data_ptr()
    return bits % _ALIGNMENT == 0


def once_per_shape(prepare: Callable[..., _Prepared]) -> Callable[..., _Prepared]:
    """Decorator: remembers the results of a function of shapes and dtypes."""
    remembered = lru_cache(maxsize=LAUNCHES)(prepare)
    if not IS_INLINED:
        return remembered

    @wraps(prepare)
    def prepare_symbolic(*arguments: Any) -> _Prepared:
        try:
            return remembered(*arguments)
        except TypeError:  # the symbolic sizes of torch.compile are not hashable
            return prepare(*arguments)

    return prepare_symbolic


def freeze(blocks: Mapping[str, int] | None) -> Blocks:
    """Returns block sizes as a hashable value."""
    return tuple(blocks.items()) if blocks else ()


# Triton's functions of these names also work inside kernels and take ten times as long.


def cdiv(a: int, b: int) -> int:
    """Returns a / b rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Returns the smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def block_of_channels(C: int, widest: int) -> int:
    """Returns the smallest power of two from 16 on that covers C channels.

    It is at most `widest`.
    """
    return min(max(16, next_power_of_2(C)), widest)

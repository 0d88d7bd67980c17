"""Chooses the backend of super token attention."""

import os
import sys
from functools import cache
from importlib import import_module
from types import FrameType, ModuleType

import torch
from torch.autograd import forward_ad

__all__ = [
    "BACKENDS",
    "can_run_triton",
    "check_backend",
    "choose_backend",
    "compute_dtype",
    "describe_context",
    "import_kernels",
    "is_autocast",
    "is_interpreted",
    "why_no_kernels",
    "why_not_triton",
]

BACKENDS = ("auto", "reference", "triton")
# Computed once, because comparing versions takes longer than launching a kernel.
_HIDES_EXPORT = torch.__version__ < "2.8"


def can_run_triton(x: torch.Tensor | None = None) -> bool:
    """Returns whether the Triton kernels can run on a tensor, see `why_not_triton`."""
    return not why_not_triton(x)


def why_not_triton(x: torch.Tensor | None = None) -> str:
    """Returns why the Triton kernels cannot run on a tensor, or "" if they can.

    The kernels need Triton with a C compiler, an NVIDIA GPU of compute capability 8.0 (Ampere) or newer, and float32,
    bfloat16 or float16. The kernels are custom operators. PyTorch does not support custom operators in ONNX export,
    TorchScript, the transforms of torch.func, and forward-mode differentiation. For tests, set TRITON_INTERPRET=1
    before Python starts: Triton then interprets the kernels on the CPU.

    Args:
        x: Tensor of any shape; None for a float32 tensor on the current device.
    """
    if x is None:
        index = torch.cuda.current_device() if torch.cuda.is_available() else -1
        return why_no_kernels("cuda" if index >= 0 or not is_interpreted() else "cpu", index, torch.float32)
    return _why_not_operators(x) or why_no_kernels(x.device.type, x.device.index, x.dtype)


def check_backend(name: str, source: str = "backend") -> str:
    """Returns the name of a backend unchanged.

    Args:
        name: Name to check.
        source: Name of the argument or variable, for the error message.

    Raises:
        ValueError: If the name is not in `BACKENDS`.
    """
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


def choose_backend(backend: str, x: torch.Tensor) -> str:
    """Returns the backend to run on a tensor: "reference" or "triton".

    "auto" selects Triton if it can run (`why_not_triton`), otherwise the reference. The environment variable
    STVIT_OPS_BACKEND overrides the argument. Compiled code keeps the backend that was chosen during compilation.

    Args:
        backend: One of `BACKENDS`.
        x: Tensor that the backend will process.

    Raises:
        ValueError: If the backend is unknown, or is "triton" and cannot run.
    """
    name, source = _forced_backend(), "STVIT_OPS_BACKEND"
    if not name:
        name, source = backend, "backend"
    if check_backend(name, source) == "reference":
        return "reference"
    reason = why_not_triton(x)
    if reason and name == "triton":
        raise ValueError(f"{source}={name} cannot run: {reason}; use 'auto' or 'reference'")
    return "reference" if reason else "triton"


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """Returns the dtype of matrix products with x: autocast's, or that of x."""
    return torch.get_autocast_dtype(x.device.type) if is_autocast(x) else x.dtype


def is_autocast(x: torch.Tensor) -> bool:
    """Returns whether x is on a CPU or a CUDA device for which autocast is on.

    For other devices the result is False, because `torch.is_autocast_enabled` raises an error for some, such as "meta".
    """
    return x.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(x.device.type)


def describe_context() -> tuple[str, str]:
    """Returns everything, apart from the input, that can change the backend.

    Returns:
        The value of STVIT_OPS_BACKEND, and the reason why PyTorch does not support custom operators here. Each is ""
        if it does not exist.
    """
    return _forced_backend(), _why_not_in_this_context()


def import_kernels(x: torch.Tensor, module: str) -> ModuleType:
    """Imports and returns a module of kernels that will run on x.

    Raises:
        ValueError: If the kernels cannot run on x. This happens if a program exported on a GPU runs on another machine.
    """
    reason = why_no_kernels(x.device.type, x.device.index, x.dtype)
    if reason:
        raise ValueError(
            f"the Triton operators cannot run: {reason}; if this is an exported program, export it again with "
            "STVIT_OPS_BACKEND=reference"
        )
    return _import(module)


_import = cache(import_module)  # the first import is slow; the search for an imported module also takes time


def _why_not_operators(x: torch.Tensor) -> str:
    """Returns why PyTorch does not support custom operators here, or "" if it does."""
    reason = _why_not_in_this_context()
    if not reason and not torch.compiler.is_compiling() and forward_ad.unpack_dual(x).tangent is not None:
        return "the kernels have no forward-mode derivatives"
    return reason


# The functions below depend on the machine and the process. torch.compile treats their results as constants.


@torch.compiler.assume_constant_result
def _forced_backend() -> str:
    return os.environ.get("STVIT_OPS_BACKEND", "")


@torch.compiler.assume_constant_result
def _why_not_in_this_context() -> str:
    if torch.onnx.is_in_onnx_export() or _is_in_hidden_onnx_export():
        return "ONNX has no operators for the kernels"
    if torch.jit.is_tracing():
        return "traced TorchScript must run without this package"
    # PyTorch has no public function for this.
    if getattr(torch._C, "_are_functorch_transforms_active", lambda: False)():
        return "the transforms of torch.func (grad, vmap, jvp, …) do not support custom operators"
    return ""


def _is_in_hidden_onnx_export() -> bool:
    """Returns whether `torch.onnx.export(dynamo=True)` of torch < 2.8 is running.

    There, `torch.onnx.is_in_onnx_export` returns False, so this function searches the call stack. With newer versions
    the result is always False.
    """
    frame: FrameType | None = sys._getframe() if _HIDES_EXPORT else None
    while frame is not None and not frame.f_globals.get("__name__", "").startswith("torch.onnx._internal.exporter"):
        frame = frame.f_back
    return frame is not None


@torch.compiler.assume_constant_result
def why_no_kernels(device: str, index: int | None, dtype: torch.dtype) -> str:
    """Returns why the kernels cannot run on a device and dtype, or "" if they can."""
    if device == "cpu" and not is_interpreted():
        return "the tensor is on the CPU (with TRITON_INTERPRET=1, Triton interprets the kernels there)"
    if device not in ("cpu", "cuda"):
        return f"the tensor is on {device}, expected cuda"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the dtype is {dtype}, expected float32, bfloat16 or float16"
    return (_why_not_gpu(index) if device == "cuda" else "") or _why_not_kernels(device)


def is_interpreted() -> bool:
    """Returns whether TRITON_INTERPRET selects Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


@cache
def _why_not_gpu(index: int | None) -> str:
    if not torch.cuda.is_available():
        return "torch.cuda finds no GPU"
    name = torch.cuda.get_device_name(index)
    if torch.version.hip is not None:
        return f"the kernels need an NVIDIA GPU, got {name}"
    capability = torch.cuda.get_device_capability(index)
    if capability < (8, 0):
        return "the kernels need compute capability 8.0 or newer, {} has {}.{}".format(name, *capability)
    return ""


@cache
def _why_not_kernels(device: str) -> str:
    try:
        kernels = import_module("stvit.ops.kernels")
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    if device == "cpu":
        if not kernels.IS_INTERPRETED:
            return "TRITON_INTERPRET=1 was set after the kernels were imported; set it before Python starts"
        return ""
    try:
        kernels.check_driver()
    except Exception as error:  # missing libraries and compilers raise exceptions of any type
        return f"Triton cannot use the GPU ({error})"
    return ""

"""Which implementation of the operator runs, and why not another."""

import os
import sys
from functools import cache
from importlib import import_module
from types import FrameType

import torch
from torch.autograd import forward_ad

__all__ = ["BACKENDS", "can_run_triton", "check_backend", "choose_backend", "why_no_kernels", "why_not_triton"]

BACKENDS = ("auto", "reference", "triton")


def can_run_triton(x: torch.Tensor | None = None) -> bool:
    """Whether the Triton kernels can run on a tensor; see `why_not_triton`."""
    return not why_not_triton(x)


def why_not_triton(x: torch.Tensor | None = None) -> str:
    """Why the Triton kernels cannot run on a tensor, or "" where they can.

    They want Triton with a C compiler for its launchers, a GPU of NVIDIA's Ampere generation or newer (compute
    capability 8.0), and float32, bfloat16 or float16. They are custom operators, which PyTorch does not take in ONNX,
    in TorchScript, under the transforms of torch.func, and in forward-mode differentiation. Where TRITON_INTERPRET=1
    is set before Python starts, Triton interprets them on the CPU: for tests.

    Args:
        x: Of any shape; None for this process' current device.
    """
    if x is None:
        index = torch.cuda.current_device() if torch.cuda.is_available() else -1
        return why_no_kernels("cuda" if index >= 0 or not _is_interpreted() else "cpu", index, torch.float32)
    return _why_not_operators(x) or why_no_kernels(x.device.type, x.device.index, x.dtype)


def check_backend(name: str, source: str = "backend") -> str:
    """The name, where it is a backend's or "auto".

    Raises:
        ValueError: If it is neither; `source` is where it comes from.
    """
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


def choose_backend(backend: str, x: torch.Tensor) -> str:
    """The backend that runs: "reference" or "triton".

    "auto" is Triton where it can run (`why_not_triton`), else the reference. The environment variable
    STVIT_OPS_BACKEND overrides what is asked for; what torch.compile has compiled keeps what was chosen then.

    Raises:
        ValueError: If there is no such backend, or if Triton is asked for and cannot run.
    """
    name, source = _forced_backend(), "STVIT_OPS_BACKEND"
    if not name:
        name, source = backend, "backend"
    if check_backend(name, source) == "reference":
        return "reference"
    reason = why_not_triton(x)
    if reason and name == "triton":
        raise ValueError(f"{source}={name} cannot run: {reason}; backend 'auto' or 'reference' can")
    return "reference" if reason else "triton"


def _why_not_operators(x: torch.Tensor) -> str:
    """Why PyTorch takes no custom operators here."""
    reason = _why_not_in_this_context()
    if not reason and not torch.compiler.is_compiling() and forward_ad.unpack_dual(x).tangent is not None:
        return "the kernels have no forward-mode derivative"
    return reason


# What follows asks the machine, and torch.compile takes the answers as they are at that moment.


@torch.compiler.assume_constant_result
def _forced_backend() -> str:
    return os.environ.get("STVIT_OPS_BACKEND", "")


@torch.compiler.assume_constant_result
def _why_not_in_this_context() -> str:
    if torch.onnx.is_in_onnx_export() or _is_in_hidden_onnx_export():
        return "ONNX has no operator for the kernels"
    if torch.jit.is_tracing():
        return "what TorchScript traces must run without this package"
    # There is no public way to ask.
    if getattr(torch._C, "_are_functorch_transforms_active", lambda: False)():
        return "the transforms of torch.func (grad, vmap, jvp, …) take no custom operators"
    return ""


def _is_in_hidden_onnx_export() -> bool:
    """Returns whether `torch.onnx.export(dynamo=True)` runs, which torch < 2.8 does not tell in any other way."""
    frame: FrameType | None = sys._getframe() if torch.__version__ < "2.8" else None
    while frame is not None and not frame.f_globals.get("__name__", "").startswith("torch.onnx._internal.exporter"):
        frame = frame.f_back
    return frame is not None


@torch.compiler.assume_constant_result
def why_no_kernels(device: str, index: int | None, dtype: torch.dtype) -> str:
    """Why there are no kernels for tensors of that device and dtype, or "" where there are."""
    if device == "cpu" and not _is_interpreted():
        return "tensors on the CPU are for the reference (TRITON_INTERPRET=1 lets Triton interpret its kernels there)"
    if device not in ("cpu", "cuda"):
        return f"there are no kernels for tensors on {device}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"there are no kernels for {dtype}, but for float32, bfloat16 and float16"
    return (_why_not_gpu(index) if device == "cuda" else "") or _why_not_kernels(device)


def _is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


@cache
def _why_not_gpu(index: int | None) -> str:
    if not torch.cuda.is_available():
        return "there is no GPU that torch.cuda can use"
    name = torch.cuda.get_device_name(index)
    if torch.version.hip is not None:
        return f"the kernels are for NVIDIA's GPUs, and {name} is not one"
    capability = torch.cuda.get_device_capability(index)
    if capability < (8, 0):
        return "the kernels want compute capability 8.0, {} has {}.{}".format(name, *capability)
    return ""


@cache
def _why_not_kernels(device: str) -> str:
    try:
        kernels = import_module("stvit.ops.kernels")
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    if device == "cpu":
        if not kernels.IS_INTERPRETED:
            return "TRITON_INTERPRET=1 was set when the kernels had been imported; set it before Python starts"
        return ""
    try:
        kernels.check_driver()
    except Exception as error:  # of any kind: libraries and compilers that are not found
        return f"Triton cannot use the GPU ({error})"
    return ""

"""Which implementation of the operator runs, and why not another."""

import os
from functools import cache
from importlib import import_module

import torch
from torch.autograd import forward_ad

__all__ = ["BACKENDS", "can_run_triton", "choose_backend", "why_not_triton"]

BACKENDS = ("auto", "reference", "triton")


def can_run_triton(x: torch.Tensor | None = None) -> bool:
    """Whether the Triton kernels can run on a tensor; see `why_not_triton`."""
    return not why_not_triton(x)


def why_not_triton(x: torch.Tensor | None = None) -> str:
    """Why the Triton kernels cannot run on a tensor, or "" where they can.

    They want Triton, a GPU of NVIDIA's Ampere generation or newer (compute capability 8.0), and float32, bfloat16 or
    float16. Where TRITON_INTERPRET=1 is set before their first use, Triton interprets them on the CPU: for tests.

    Args:
        x: Of any shape; None for this process' current device.
    """
    if x is None:
        index = torch.cuda.current_device() if torch.cuda.is_available() else -1
        return _why_not_triton("cuda" if index >= 0 or not _is_interpreted() else "cpu", index, torch.float32)
    return _why_not_triton(x.device.type, x.device.index, x.dtype)


def choose_backend(backend: str, x: torch.Tensor) -> str:
    """The backend that runs: "reference" or "triton".

    "auto" is Triton where it can run, else the reference; it is the reference too where PyTorch takes no custom
    operators: in ONNX, in TorchScript, under the transforms of torch.func, and in forward-mode differentiation. The
    environment variable STVIT_OPS_BACKEND overrides what is asked for.

    Raises:
        ValueError: If there is no such backend, or if Triton is asked for and cannot run.
    """
    name, source = _forced_backend(), "STVIT_OPS_BACKEND"
    if not name:
        name, source = backend, "backend"
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {name!r}")
    if name == "reference" or (name == "auto" and _wants_plain_pytorch(x)):
        return "reference"
    reason = _why_not_triton(x.device.type, x.device.index, x.dtype)
    if reason and name == "triton":
        raise ValueError(f"{source}={name} cannot run: {reason}; backend 'auto' or 'reference' can")
    return "reference" if reason else "triton"


def _wants_plain_pytorch(x: torch.Tensor) -> bool:
    if _is_exporting_or_transforming():
        return True
    return not torch.compiler.is_compiling() and forward_ad.unpack_dual(x).tangent is not None


# What follows asks the machine, and torch.compile takes the answers as they are at that moment.


@torch.compiler.assume_constant_result
def _forced_backend() -> str:
    return os.environ.get("STVIT_OPS_BACKEND", "")


@torch.compiler.assume_constant_result
def _is_exporting_or_transforming() -> bool:
    transforms = getattr(torch._C, "_are_functorch_transforms_active", None)  # there is no public way to ask
    return torch.jit.is_tracing() or torch.onnx.is_in_onnx_export() or (transforms is not None and transforms())


@torch.compiler.assume_constant_result
def _why_not_triton(device: str, index: int | None, dtype: torch.dtype) -> str:
    if device == "cpu" and not _is_interpreted():
        return "tensors on the CPU are for the reference (TRITON_INTERPRET=1 lets Triton interpret its kernels there)"
    if device not in ("cpu", "cuda"):
        return f"there are no kernels for tensors on {device}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"there are no kernels for {dtype}, but for float32, bfloat16 and float16"
    if device == "cuda" and (reason := _why_not_gpu(index)):
        return reason
    return _why_not_imported() or _why_not_interpreted(device)


def _is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def _why_not_interpreted(device: str) -> str:
    from stvit.ops import triton

    if device == "cpu" and not triton.IS_INTERPRETED:
        return "TRITON_INTERPRET=1 was set when the kernels had been imported; set it before Python starts"
    return ""


@cache
def _why_not_gpu(index: int | None) -> str:
    if not torch.cuda.is_available():
        return "there is no GPU that torch.cuda can use"
    if torch.version.hip is None and torch.cuda.get_device_capability(index) < (8, 0):
        major, minor = torch.cuda.get_device_capability(index)
        return f"the kernels want compute capability 8.0, {torch.cuda.get_device_name(index)} has {major}.{minor}"
    return ""


@cache
def _why_not_imported() -> str:
    try:
        import_module("stvit.ops.triton")  # which registers the operators
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    return ""

"""The layers around super token attention, fused on GPUs.

Each function has a definition in plain PyTorch (`*_reference`) and an operator that runs the Triton kernels of
stvit/ops/layer_kernels.py. The module `stvit.stvit` calls an operator only in place of plain layers (`why_not_fused`).

Memory: the forward pass of an MLP saves its input and one hidden map. The activated hidden map and the output of the
depthwise convolution are computed again in the backward pass.

Autograd: if gradients of gradients are requested, the backward pass differentiates the reference.

Shapes:
    B, C, H, W   batch size, channels, height and width; maps are (B, C, H, W)
    D            hidden channels of an MLP
"""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import timm.layers
import torch
import torch.nn.functional as F
from torch import nn

from stvit.ops.backends import choose_backend, compute_dtype, import_kernels, is_autocast, why_not_triton
from stvit.ops.operators import operator
from stvit.ops.portable import is_exporting

__all__ = [
    "activate",
    "depthwise",
    "depthwise_norm",
    "has_global_hooks",
    "is_depthwise",
    "is_gelu",
    "is_plain",
    "is_pointwise",
    "mlp",
    "pointwise",
    "why_not_fused",
    "why_not_residual",
]

# On a CPU, a pointwise convolution whose input and output have at least so many channels is a matrix product.
# docs/speed.md has the measurements.
CPU_PRODUCT_CHANNELS = 256

# ---------------------------------------------------------------------------------------------------------------------
# Choice


def is_plain(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Returns whether a module is of one of the given classes and unchanged.

    Calling a plain module does nothing but run the forward method of its class.

    Subclasses, hooks, parametrizations, pruning, LoRA wrappers and patched forward methods are not plain.
    """
    return bool(
        type(module) in kinds
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
        and "forward" not in module.__dict__
        and not has_global_hooks()
    )


def has_global_hooks() -> bool:
    """Returns whether a hook is registered for all modules."""
    hooks = nn.modules.module
    return bool(
        hooks._global_forward_hooks
        or hooks._global_forward_pre_hooks
        or hooks._global_backward_hooks
        or hooks._global_backward_pre_hooks
    )


def is_pointwise(conv: nn.Module) -> bool:
    """Returns whether a module is a plain 1x1 convolution."""
    return bool(
        is_plain(conv, nn.Conv2d)
        and conv.kernel_size == (1, 1)
        and conv.stride == (1, 1)
        and conv.padding in ((0, 0), "valid")
        and conv.groups == 1
    )


def is_depthwise(conv: nn.Module) -> bool:
    """Returns whether a module is a plain depthwise 3x3 convolution.

    It must have a bias, a stride of 1 and a padding of one pixel.
    """
    return bool(
        is_plain(conv, nn.Conv2d)
        and conv.kernel_size == (3, 3)
        and conv.stride == (1, 1)
        and conv.padding == (1, 1)
        and conv.dilation == (1, 1)
        and conv.groups == conv.in_channels == conv.out_channels
        and conv.padding_mode == "zeros"
        and conv.bias is not None
    )


def is_gelu(act: nn.Module) -> bool:
    """Returns whether a module is a plain, exact GELU."""
    return is_plain(act, nn.GELU, timm.layers.GELU) and bool(getattr(act, "approximate", "none") == "none")


def why_not_fused(x: torch.Tensor, backend: str, parameters: Sequence[torch.Tensor | None]) -> str:
    """Returns why the fused layers cannot process a tensor, or "" if they can.

    They need what the kernels of super token attention need (`stvit.ops.why_not_triton`), and parameters that PyTorch's
    layers would accept.

    Args:
        x: Input of the layers, (B, C, H, W).
        backend: Backend of super token attention in the same block. "reference" turns the fused layers off.
        parameters: Parameters of the layers.

    Raises:
        ValueError: If the backend is unknown, or is "triton" and cannot run.
    """
    if isinstance(x, torch.fx.Proxy):
        return "the model is being traced by torch.fx"
    if choose_backend(backend, x) == "reference":
        return why_not_triton(x) or "the backend is the reference"
    if x.dim() != 4 or x.numel() == 0:  # after the choice, because a trace would record the comparison
        return f"the input is empty or not (B, C, H, W), got shape {list(x.shape)}"
    for parameter in parameters:
        if parameter is None:
            continue
        if type(parameter) not in (torch.Tensor, nn.Parameter):
            return f"a parameter is a {type(parameter).__name__}"
        if parameter.device != x.device:
            return f"a parameter is on {parameter.device}, the input on {x.device}"
        if parameter.dtype != x.dtype and not (is_autocast(x) and parameter.is_floating_point()):
            return f"a parameter has the dtype {parameter.dtype}, the input {x.dtype}"
    if compute_dtype(x) not in (torch.float32, torch.bfloat16, torch.float16):
        return f"autocast computes in {compute_dtype(x)}"
    return ""


def why_not_residual(x: torch.Tensor) -> str:
    """Returns why a kernel must not add to x, or "".

    The kernel would round the residual to the dtype of autocast.
    """
    return f"autocast computes in {compute_dtype(x)}, the input is {x.dtype}" if compute_dtype(x) != x.dtype else ""


# ---------------------------------------------------------------------------------------------------------------------
# Pointwise convolution


def pointwise(conv: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Applies a 1x1 convolution, as a matrix product where this is faster.

    On a GPU, PyTorch's convolution adds the bias in a separate pass over the output. Its matrix product adds the bias
    before it writes the output. On a CPU, the product is faster for wide layers without gradients. The layer is called
    as usual if it is not plain, if the map is not channels_last, and during export.

    Args:
        conv: 1x1 convolution.
        x: Map (B, C, H, W).

    Returns:
        Map (B, conv.out_channels, H, W).
    """
    if not torch.jit.is_scripting():
        if _is_product(conv, x):
            weight: Any = conv.weight
            bias: Any = conv.bias
            return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)
    return conv(x)


@torch.jit.unused
def _is_product(conv: nn.Module, x: torch.Tensor) -> bool:
    if isinstance(x, torch.fx.Proxy) or x.dim() != 4 or is_exporting() or not is_pointwise(conv):
        return False
    if x.device.type == "cpu":
        weight: Any = conv.weight
        if min(weight.shape[:2]) < CPU_PRODUCT_CHANNELS or torch.compiler.is_compiling():
            return False
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            return False
    elif not x.is_cuda:
        return False
    return x.permute(0, 2, 3, 1).is_contiguous()


# ---------------------------------------------------------------------------------------------------------------------
# References


def depthwise_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, has_gelu: bool = False
) -> torch.Tensor:
    """Returns a + depthwise(a) with a = x, or a = gelu(x).

    Args:
        x: Map (B, C, H, W).
        weight: Weights (C, 1, 3, 3).
        bias: Bias (C,).
        has_gelu: Whether to activate x.
    """
    a = F.gelu(x) if has_gelu else x
    return a + F.conv2d(a, weight.to(a.dtype), bias.to(a.dtype), padding=1, groups=weight.shape[0])


def norm_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """Returns x (B, C, H, W), normalized over the channels, in the dtype of x."""
    x = x.permute(0, 2, 3, 1)
    return F.layer_norm(x, (x.shape[-1],), weight.to(x.dtype), bias.to(x.dtype), eps).permute(0, 3, 1, 2)


def mlp_reference(
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor | None,
) -> torch.Tensor:
    """Returns the result of `stvit.stvit.ConvMlp`, (B, C, H, W).

    The arguments are those of `mlp`.
    """
    hidden = _product(x, weight1, bias1)
    return _product(depthwise_reference(hidden, weight, bias, True), weight2, bias2)


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Returns a 1x1 convolution of x.

    Args:
        x: Map (B, C, H, W).
        weight: Weights (D, C).
        bias: Bias (D,).
    """
    bias = None if bias is None else bias.to(x.dtype)
    return F.linear(x.permute(0, 2, 3, 1), weight.to(x.dtype), bias).permute(0, 3, 1, 2)


def _differentiate(
    reference: Callable[..., Any], inputs: Sequence[Any], grads: Sequence[torch.Tensor | None]
) -> list[torch.Tensor | None]:
    """Returns the gradients of a reference, which can be differentiated again.

    Args:
        reference: Function that returns a tensor or a tuple of tensors.
        inputs: Arguments of the function.
        grads: Gradients of its outputs; None for zero.

    Returns:
        A gradient for each argument; None for arguments without one.
    """
    with torch.enable_grad():
        outputs = reference(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    pairs = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if grad is not None]
    wanted = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    found = iter(
        torch.autograd.grad(
            [output for output, _ in pairs], wanted, [grad for _, grad in pairs], create_graph=True, allow_unused=True
        )
    )
    return [next(found) if isinstance(x, torch.Tensor) and x.requires_grad else None for x in inputs]


# ---------------------------------------------------------------------------------------------------------------------
# Operators


def _kernels(x: torch.Tensor) -> ModuleType:
    return import_kernels(x, "stvit.ops.layer_kernels")


def _rows(x: torch.Tensor) -> torch.Tensor:
    """Permutes a map (B, C, H, W) to contiguous (B, H, W, C).

    Maps in channels_last are not copied.
    """
    return x.permute(0, 2, 3, 1).contiguous()


def _matrix(x: torch.Tensor) -> torch.Tensor:
    """Returns a map (B, C, H, W) as a matrix (B * H * W, C)."""
    return _rows(x).flatten(0, 2)


def _empty_like(x: torch.Tensor, C: int | None = None) -> torch.Tensor:
    """Allocates a channels_last map of the size of x (B, C, H, W)."""
    B, channels, H, W = x.shape
    return x.new_empty(B, H, W, C or channels).permute(0, 3, 1, 2)


@operator("stvit::depthwise")
def _depthwise(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, has_gelu: bool) -> torch.Tensor:
    """Implements `depthwise_reference`."""
    y, _ = _kernels(x).depthwise(_rows(x), weight, bias, has_gelu)
    return y.permute(0, 3, 1, 2)


@torch.library.register_fake("stvit::depthwise")
def _depthwise_fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, has_gelu: bool) -> torch.Tensor:
    return _empty_like(x)


@operator("stvit::depthwise_backward")
def _depthwise_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, has_gelu: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the gradients of `_depthwise`.

    Returns:
        The gradient of x, (B, C, H, W), and eleven sums (11, C) in float32: the gradients of the nine weights and of
        the bias, and the sum of the gradient of x over batch and pixels.
    """
    grad_x, sums = _kernels(x).depthwise_backward(_rows(grad), _rows(x), weight, has_gelu)
    return grad_x.permute(0, 3, 1, 2), sums


@torch.library.register_fake("stvit::depthwise_backward")
def _depthwise_backward_fake(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, has_gelu: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    return _empty_like(x), x.new_empty(11, x.shape[1], dtype=torch.float32)


def _split_sums(sums: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Splits the sums of `_depthwise_backward` into gradients.

    Returns:
        Gradients of the weights (C, 1, 3, 3) and of the bias (C,).
    """
    return sums[:9].t().reshape(weight.shape).to(weight.dtype), sums[9].to(bias.dtype)


def _save_depthwise(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, bias, ctx.has_gelu = inputs
    ctx.save_for_backward(x, weight, bias)


def _depthwise_grads(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    x, weight, bias = ctx.saved_tensors
    if torch.is_grad_enabled():
        return tuple(_differentiate(depthwise_reference, (x, weight, bias, ctx.has_gelu), (grad,)))
    grad_x, sums = _depthwise_backward(grad, x, weight, ctx.has_gelu)
    return grad_x, *_split_sums(sums, weight, bias), None


torch.library.register_autograd("stvit::depthwise", _depthwise_grads, setup_context=_save_depthwise)


@operator("stvit::depthwise_norm")
def _depthwise_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns x + depthwise(x) and its layer normalization, (B, C, H, W) each."""
    y, normalized = _kernels(x).depthwise(_rows(x), weight, bias, norm=(norm_weight, norm_bias, eps))
    return y.permute(0, 3, 1, 2), normalized.permute(0, 3, 1, 2)


@torch.library.register_fake("stvit::depthwise_norm")
def _depthwise_norm_fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _empty_like(x), _empty_like(x)


@operator("stvit::norm_backward")
def _norm_backward(
    grad: torch.Tensor, grad_y: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the gradients of the layer normalization of y.

    Args:
        grad: Gradient of the normalized map, (B, C, H, W).
        grad_y: Gradient of y from elsewhere, which is added.
        y: Map before the normalization.
        weight: Weight (C,).
        eps: Epsilon.

    Returns:
        The gradient of y, and three sums (3, C) in float32: the gradients of weight and bias, and the sum of the
        gradient of y over batch and pixels.
    """
    grad_x, sums = _kernels(y).norm_backward(_rows(grad), _rows(grad_y), _rows(y), weight, eps)
    return grad_x.permute(0, 3, 1, 2), sums


@torch.library.register_fake("stvit::norm_backward")
def _norm_backward_fake(
    grad: torch.Tensor, grad_y: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return _empty_like(y), y.new_empty(3, y.shape[1], dtype=torch.float32)


def _depthwise_norm_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    y = depthwise_reference(x, weight, bias)
    return y, norm_reference(y, norm_weight, norm_bias, eps)


def _save_depthwise_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, weight, bias, norm_weight, norm_bias, ctx.eps = inputs
    ctx.save_for_backward(x, weight, bias, norm_weight, norm_bias, output[0])


def _depthwise_norm_grads(ctx: Any, grad_y: torch.Tensor, grad: torch.Tensor) -> tuple[Any, ...]:
    x, weight, bias, norm_weight, norm_bias, y = ctx.saved_tensors
    if torch.is_grad_enabled():
        inputs = (x, weight, bias, norm_weight, norm_bias, ctx.eps)
        return tuple(_differentiate(_depthwise_norm_reference, inputs, (grad_y, grad)))
    grad_y, norm_sums = _norm_backward(grad, grad_y, y, norm_weight, ctx.eps)
    grad_x, sums = _depthwise_backward(grad_y, x, weight, False)
    grad_norm_weight, grad_norm_bias = norm_sums[0].to(norm_weight.dtype), norm_sums[1].to(norm_bias.dtype)
    return grad_x, *_split_sums(sums, weight, bias), grad_norm_weight, grad_norm_bias, None


torch.library.register_autograd("stvit::depthwise_norm", _depthwise_norm_grads, setup_context=_save_depthwise_norm)


@operator("stvit::mlp")
def _mlp(
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Implements `mlp_reference`.

    Returns:
        The output (B, C, H, W), and the hidden map before the activation, (B, D, H, W).
    """
    hidden = _product(x, weight1, bias1)
    y, _ = _kernels(x).depthwise(_rows(hidden), weight, bias, True)
    return _product(y.permute(0, 3, 1, 2), weight2, bias2), hidden


@torch.library.register_fake("stvit::mlp")
def _mlp_fake(
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _empty_like(x, weight2.shape[0]), _empty_like(x, weight1.shape[0])


@operator("stvit::mlp_backward")
def _mlp_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    hidden: torch.Tensor,
    weight1: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    weight2: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the gradients of `_mlp`.

    Returns:
        The gradients of x, weight1 and weight2, the sums (11, D) of `_depthwise_backward`, of which the last is the
        gradient of bias1, and the gradient of bias2, (C,) in float32.
    """
    kernels = _kernels(x)
    grad_rows, hidden_rows = _matrix(grad), _rows(hidden)
    y, _ = kernels.depthwise(hidden_rows, weight, bias, True)
    grad_weight2 = grad_rows.t() @ y.flatten(0, 2)
    del y
    grad_y = (grad_rows @ weight2).view(hidden_rows.shape)
    grad_hidden, sums = kernels.depthwise_backward(grad_y, hidden_rows, weight, True)
    del grad_y
    grad_hidden = grad_hidden.flatten(0, 2)
    grad_weight1 = grad_hidden.t() @ _matrix(x)
    B, C, H, W = x.shape
    return (
        (grad_hidden @ weight1).view(B, H, W, C).permute(0, 3, 1, 2),
        grad_weight1,
        grad_weight2,
        sums,
        kernels.sum_rows(grad_rows),
    )


@torch.library.register_fake("stvit::mlp_backward")
def _mlp_backward_fake(
    grad: torch.Tensor,
    x: torch.Tensor,
    hidden: torch.Tensor,
    weight1: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    weight2: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    D, C = weight1.shape
    return (
        _empty_like(x),
        x.new_empty(D, C),
        x.new_empty(weight2.shape),
        x.new_empty(11, D, dtype=torch.float32),
        x.new_empty(weight2.shape[0], dtype=torch.float32),
    )


def _save_mlp(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])


def _mlp_grads(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[Any, ...]:
    *inputs, hidden = ctx.saved_tensors
    if torch.is_grad_enabled():
        return tuple(_differentiate(mlp_reference, inputs, (grad,)))
    x, weight1, bias1, weight, bias, weight2, bias2 = inputs
    grad_x, grad_weight1, grad_weight2, sums, grad_bias2 = _mlp_backward(
        grad, x, hidden, weight1, weight, bias, weight2
    )
    return (
        grad_x,
        grad_weight1,
        None if bias1 is None else sums[10].to(bias1.dtype),
        *_split_sums(sums, weight, bias),
        grad_weight2,
        None if bias2 is None else grad_bias2.to(bias2.dtype),
    )


torch.library.register_autograd("stvit::mlp", _mlp_grads, setup_context=_save_mlp)


@operator("stvit::activate")
def _activate(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Returns gelu(x + bias) for a map x (B, C, H, W) and a bias (C,)."""
    return _kernels(x).activate(_rows(x), bias).permute(0, 3, 1, 2)


@torch.library.register_fake("stvit::activate")
def _activate_fake(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return _empty_like(x)


@operator("stvit::activate_backward")
def _activate_backward(grad: torch.Tensor, x: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the gradients of x and bias of `_activate`."""
    grad_x, total = _kernels(x).activate_backward(_rows(grad), _rows(x), bias)
    return grad_x.permute(0, 3, 1, 2), total.to(bias.dtype)


@torch.library.register_fake("stvit::activate_backward")
def _activate_backward_fake(
    grad: torch.Tensor, x: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return _empty_like(x), torch.empty_like(bias)


def _activate_reference(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.gelu(x + bias.to(x.dtype)[:, None, None])


def _save_activate(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _activate_grads(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    if torch.is_grad_enabled():
        return tuple(_differentiate(_activate_reference, ctx.saved_tensors, (grad,)))
    return _activate_backward(grad, *ctx.saved_tensors)


torch.library.register_autograd("stvit::activate", _activate_grads, setup_context=_save_activate)


# ---------------------------------------------------------------------------------------------------------------------
# Functions of the layers. Under autocast they cast the maps and the weights of matrix products. They do not cast
# vectors and depthwise weights.


def depthwise(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, has_gelu: bool = False) -> torch.Tensor:
    """Adds a depthwise convolution to x, or to gelu(x); see `depthwise_reference`."""
    return _depthwise(x.to(compute_dtype(x)), weight, bias, has_gelu)


def depthwise_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns x + depthwise(x) and its layer normalization over the channels.

    Args:
        x: Map (B, C, H, W).
        weight: Weights (C, 1, 3, 3) of the convolution.
        bias: Bias (C,) of the convolution.
        norm_weight: Weight (C,) of the normalization.
        norm_bias: Bias (C,) of the normalization.
        eps: Epsilon of the normalization.

    Returns:
        Two maps (B, C, H, W) in the dtype of the computation.
    """
    return _depthwise_norm(x.to(compute_dtype(x)), weight, bias, norm_weight, norm_bias, eps)


def mlp(
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor | None,
) -> torch.Tensor:
    """Runs an MLP with a residual depthwise convolution in the middle (section 3.1).

    Args:
        x: Map (B, C, H, W).
        weight1: Weights (D, C) of the first product.
        bias1: Bias (D,) of the first product; None for zero.
        weight: Weights (D, 1, 3, 3) of the depthwise convolution.
        bias: Bias (D,) of the depthwise convolution.
        weight2: Weights (C, D) of the second product.
        bias2: Bias (C,) of the second product; None for zero.

    Returns:
        Map (B, C, H, W) in the dtype of the computation.
    """
    dtype = compute_dtype(x)
    return _mlp(x.to(dtype), weight1.to(dtype), bias1, weight, bias, weight2.to(dtype), bias2)[0]


def activate(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Returns gelu(x + bias) in channels_last, (B, C, H, W).

    Args:
        x: Result (B, C, H, W) of a convolution without its bias.
        bias: Bias (C,).
    """
    return _activate(x, bias)

"""Super token sampling and upsampling in Triton: what the reference computes, with fewer bytes moved.

Source: "Vision Transformer with Super Token Sampling", https://arxiv.org/abs/2211.11167, sections 3.2 and 3.3. Here
are the operators that PyTorch sees; stvit/ops/kernels.py, and with it Triton, is imported when the first of them runs.

Bytes: sampling reads x for the means of the cells and again for the association, last tile first, so that what the
first reading has left in the cache is met again. The association is kept, in the dtype that is computed in: nine
numbers a pixel, where computing it again, for upsampling and for each backward, would read all C of its channels. So x
is read for sampling alone. What tiles owe to tokens goes through memory too: four float32 numbers for each cell and
channel.

Autograd: upsample, aggregate and compare are the partial derivatives of one form, the sum over pixels p and their
neighbors k of association[p, k] * <tokens[k], pixels[p]>, and therefore each other's backward, however often one
differentiates.

Shapes: as in stvit/ops/reference.py
"""

from types import ModuleType
from typing import Any

import torch

from stvit.ops.backends import why_no_kernels

__all__ = ["sample_super_tokens", "upsample_super_tokens"]

# ---------------------------------------------------------------------------------------------------------------------
# Operators, as torch.compile, export and autocast see them


def _kernels(x: torch.Tensor) -> ModuleType:
    """The module of the kernels.

    Raises:
        ValueError: If they cannot run on x: the operators may come out of a program that was exported elsewhere.
    """
    reason = why_no_kernels(x.device.type, x.device.index, x.dtype)
    if reason:
        raise ValueError(f"the operators of Triton cannot run: {reason}")
    from stvit.ops import kernels

    return kernels


def _grid_size(H: int, W: int, h: int, w: int) -> tuple[int, int]:
    return (H + h - 1) // h, (W + w - 1) // w


def _cells_last(tokens: torch.Tensor) -> torch.Tensor:
    """(B, C, Hs, Ws) to (B, Hs, Ws, C), contiguous; a copy of few, unless they are channels_last."""
    return tokens.permute(0, 2, 3, 1).contiguous()


def _new_map(like: torch.Tensor, B: int, C: int, H: int, W: int, dtype: torch.dtype) -> torch.Tensor:
    """(B, C, H, W), channels_last."""
    return like.new_empty(B, H, W, C, dtype=dtype).permute(0, 3, 1, 2)


@torch.library.custom_op("stvit::sample", mutates_args=())
def sample(
    x: torch.Tensor, h: int, w: int, n_iter: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Super tokens (B, C, Hs, Ws) of x's dtype, association (B, 9, H, W) of `dtype`, and each token's sum of weights.

    `dtype` is that of all products; the sums are (B, Hs, Ws).
    """
    if x.numel() == 0:
        return _sample_fake(x, h, w, n_iter, dtype)
    association = _new_map(x, x.shape[0], 9, x.shape[2], x.shape[3], dtype)
    kernels = _kernels(x)
    cells = kernels.mean(x, h, w)
    for _ in range(n_iter - 1):
        cells, _ = kernels.group(x, cells, None, h, w, dtype, is_softmax=True)
    cells, weights = kernels.group(x, cells, association, h, w, dtype, is_softmax=True)
    return cells.permute(0, 3, 1, 2), association, weights


@sample.register_fake
def _sample_fake(
    x: torch.Tensor, h: int, w: int, n_iter: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    B, C, H, W = x.shape
    Hs, Ws = _grid_size(H, W, h, w)
    association = _new_map(x, B, 9, H, W, dtype)
    return _new_map(x, B, C, Hs, Ws, x.dtype), association, x.new_empty(B, Hs, Ws, dtype=torch.float32)


@torch.library.custom_op("stvit::upsample", mutates_args=())
def upsample(
    tokens: torch.Tensor,
    association: torch.Tensor,
    weights: torch.Tensor | None,
    h: int,
    w: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Pixels (B, C, H, W) of `dtype`, products in that of the tokens; each token divided by its weight if given."""
    pixels = _upsample_fake(tokens, association, weights, h, w, dtype)
    if pixels.numel() == 0:
        return pixels
    _kernels(tokens).upsample(_cells_last(tokens), association, weights, pixels, h, w)
    return pixels


@upsample.register_fake
def _upsample_fake(
    tokens: torch.Tensor,
    association: torch.Tensor,
    weights: torch.Tensor | None,
    h: int,
    w: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    return _new_map(tokens, tokens.shape[0], tokens.shape[1], association.shape[2], association.shape[3], dtype)


@torch.library.custom_op("stvit::aggregate", mutates_args=())
def aggregate(
    pixels: torch.Tensor,
    association: torch.Tensor,
    weights: torch.Tensor | None,
    h: int,
    w: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Sums (B, C, Hs, Ws) of `dtype` of the pixels around, products in that of the pixels; over weights if given."""
    tokens = _aggregate_fake(pixels, association, weights, h, w, dtype)
    if pixels.numel() == 0:
        return tokens.zero_()
    cells, _ = _kernels(pixels).group(pixels, None, association, h, w, pixels.dtype, weights=weights, dtype=dtype)
    return cells.permute(0, 3, 1, 2)


@aggregate.register_fake
def _aggregate_fake(
    pixels: torch.Tensor,
    association: torch.Tensor,
    weights: torch.Tensor | None,
    h: int,
    w: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    B, C, H, W = pixels.shape
    return _new_map(pixels, B, C, *_grid_size(H, W, h, w), dtype)


@torch.library.custom_op("stvit::compare", mutates_args=())
def compare(pixels: torch.Tensor, tokens: torch.Tensor, h: int, w: int, dtype: torch.dtype) -> torch.Tensor:
    """Scalar products (B, 9, H, W) of `dtype` of each pixel with the tokens around, in that of the pixels."""
    products = _compare_fake(pixels, tokens, h, w, dtype)
    if pixels.numel() == 0:
        return products.zero_()
    _kernels(pixels).group(pixels, _cells_last(tokens), products, h, w, pixels.dtype, sums=False)
    return products


@compare.register_fake
def _compare_fake(pixels: torch.Tensor, tokens: torch.Tensor, h: int, w: int, dtype: torch.dtype) -> torch.Tensor:
    return _new_map(pixels, pixels.shape[0], 9, pixels.shape[2], pixels.shape[3], dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Autograd


def _keep_sample(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, ctx.h, ctx.w, _, _ = inputs
    ctx.dtype = x.dtype
    ctx.save_for_backward(*output[1:])


def _sample_backward(ctx: Any, grad_tokens: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
    association, weights = (kept.detach() for kept in ctx.saved_tensors)  # held constant (section 3.2)
    grad_x = upsample(grad_tokens.to(association.dtype), association, weights, ctx.h, ctx.w, ctx.dtype)
    return grad_x, None, None, None, None


def _keep_weighted(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    values, association, weights, ctx.h, ctx.w, _ = inputs
    ctx.save_for_backward(values, association, weights)


def _upsample_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    tokens, association, weights = ctx.saved_tensors
    grad_tokens = grad_association = None
    if ctx.needs_input_grad[0]:
        grad_tokens = aggregate(grad, association, weights, ctx.h, ctx.w, tokens.dtype)
    if ctx.needs_input_grad[1]:
        grad_association = compare(grad, tokens, ctx.h, ctx.w, association.dtype)
    return grad_tokens, grad_association, None, None, None, None


def _aggregate_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    pixels, association, weights = ctx.saved_tensors
    grad_pixels = grad_association = None
    if ctx.needs_input_grad[0]:
        grad_pixels = upsample(grad, association, weights, ctx.h, ctx.w, pixels.dtype)
    if ctx.needs_input_grad[1]:
        grad_association = compare(pixels, grad, ctx.h, ctx.w, association.dtype)
    return grad_pixels, grad_association, None, None, None, None


def _keep_compared(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    pixels, tokens, ctx.h, ctx.w, _ = inputs
    ctx.save_for_backward(pixels, tokens)


def _compare_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    pixels, tokens = ctx.saved_tensors
    grad_pixels = grad_tokens = None
    if ctx.needs_input_grad[0]:
        grad_pixels = upsample(tokens, grad, None, ctx.h, ctx.w, pixels.dtype)
    if ctx.needs_input_grad[1]:
        grad_tokens = aggregate(pixels, grad, None, ctx.h, ctx.w, tokens.dtype)
    return grad_pixels, grad_tokens, None, None, None


sample.register_autograd(_sample_backward, setup_context=_keep_sample)
upsample.register_autograd(_upsample_backward, setup_context=_keep_weighted)
aggregate.register_autograd(_aggregate_backward, setup_context=_keep_weighted)
compare.register_autograd(_compare_backward, setup_context=_keep_compared)


# ---------------------------------------------------------------------------------------------------------------------
# The backend's functions


def sample_super_tokens(
    x: torch.Tensor, stoken_size: tuple[int, int], n_iter: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `stvit.ops.sample_super_tokens`; the arguments have been checked there.

    Under autocast the products are of its dtype, and so is the association.
    """
    tokens, association, _ = sample(x, *stoken_size, n_iter, _compute_dtype(x))
    return tokens, association.detach()


def upsample_super_tokens(
    tokens: torch.Tensor, association: torch.Tensor, stoken_size: tuple[int, int]
) -> torch.Tensor:
    """See `stvit.ops.upsample_super_tokens`; the arguments have been checked there."""
    tokens = tokens.to(_compute_dtype(tokens))
    return upsample(tokens, association, None, *stoken_size, tokens.dtype)


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype

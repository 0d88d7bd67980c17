"""Super token sampling and upsampling in Triton, with little memory traffic.

Source: "Vision Transformer with Super Token Sampling", https://arxiv.org/abs/2211.11167, sections 3.2 and 3.3.

This module defines the custom operators that PyTorch sees. The first call of an operator imports stvit/ops/kernels.py
and Triton.

Memory traffic: sampling reads x twice, for the means of the cells and for the association. The second pass starts with
the last tile, which is still in the cache. The association is stored in the dtype of the products. It has nine numbers
per pixel; computing it again for upsampling and in each backward pass would read all channels of x. The partial sums of
the tiles take four float32 numbers per cell and channel.

Autograd: `upsample`, `aggregate` and `associate` are the partial derivatives of one trilinear form, the sum over pixels
p and neighbors k of association[p, k] * <tokens[k], pixels[p]>. Each is computed by the other two in its backward pass,
so derivatives of any order exist.

Shapes: as in stvit/ops/reference.py
"""

from types import ModuleType
from typing import Any

import torch

from stvit.ops.backends import compute_dtype, import_kernels
from stvit.ops.operators import operator

__all__ = ["add_super_tokens", "run_sampling", "sample_super_tokens", "upsample_super_tokens"]

# ---------------------------------------------------------------------------------------------------------------------
# Operators, which torch.compile, export and autocast see as a whole


def _kernels(x: torch.Tensor) -> ModuleType:
    return import_kernels(x, "stvit.ops.kernels")


def _grid_size(H: int, W: int, h: int, w: int) -> tuple[int, int]:
    return (H + h - 1) // h, (W + w - 1) // w


def _cells_last(tokens: torch.Tensor) -> torch.Tensor:
    """Permutes tokens (B, C, Hs, Ws) to contiguous (B, Hs, Ws, C).

    Tokens in channels_last are not copied.
    """
    return tokens.permute(0, 2, 3, 1).contiguous()


def _new_map(like: torch.Tensor, B: int, C: int, H: int, W: int, dtype: torch.dtype) -> torch.Tensor:
    """Allocates a tensor (B, C, H, W) in channels_last on the device of `like`."""
    return like.new_empty(B, H, W, C, dtype=dtype).permute(0, 3, 1, 2)


@operator("stvit::associate_and_aggregate")
def associate_and_aggregate(
    x: torch.Tensor, h: int, w: int, n_iter: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Samples super tokens, see `run_sampling`."""
    return run_sampling(x, h, w, n_iter, dtype)


def run_sampling(
    x: torch.Tensor, h: int, w: int, n_iter: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Samples super tokens: `n_iter` rounds of association and aggregation.

    This function runs the kernels directly. The operator `associate_and_aggregate` also has gradients, and PyTorch can
    compile it.

    Args:
        x: Pixels (B, C, H, W).
        h: Height of a cell.
        w: Width of a cell.
        n_iter: Number of rounds.
        dtype: Dtype of the products and of the association.

    Returns:
        Super tokens (B, C, Hs, Ws) in the dtype of x, association (B, 9, H, W), and the sum of weights of each token,
        (B, Hs, Ws) float32.
    """
    if x.numel() == 0:
        return _associate_and_aggregate_fake(x, h, w, n_iter, dtype)
    association = _new_map(x, x.shape[0], 9, x.shape[2], x.shape[3], dtype)
    kernels = _kernels(x)
    cells = kernels.mean(x, h, w)
    for _ in range(n_iter - 1):
        cells, _ = kernels.associate_and_aggregate(x, cells, None, h, w, dtype)
    cells, weights = kernels.associate_and_aggregate(x, cells, association, h, w, dtype)
    return cells.permute(0, 3, 1, 2), association, weights


@torch.library.register_fake("stvit::associate_and_aggregate")
def _associate_and_aggregate_fake(
    x: torch.Tensor, h: int, w: int, n_iter: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    B, C, H, W = x.shape
    Hs, Ws = _grid_size(H, W, h, w)
    association = _new_map(x, B, 9, H, W, dtype)
    return _new_map(x, B, C, Hs, Ws, x.dtype), association, x.new_empty(B, Hs, Ws, dtype=torch.float32)


@operator("stvit::upsample")
def upsample(
    tokens: torch.Tensor,
    association: torch.Tensor,
    weights: torch.Tensor | None,
    h: int,
    w: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Returns the association-weighted sum of tokens for each pixel, (B, C, H, W).

    Args:
        tokens: Super tokens (B, C, Hs, Ws). Their dtype is that of the products.
        association: Association (B, 9, H, W).
        weights: Divisor of each token, (B, Hs, Ws) float32; None for no division.
        h: Height of a cell.
        w: Width of a cell.
        dtype: Dtype of the result.
    """
    pixels = _upsample_fake(tokens, association, weights, h, w, dtype)
    if pixels.numel() == 0:
        return pixels
    _kernels(tokens).upsample(_cells_last(tokens), association, weights, pixels, h, w)
    return pixels


@operator("stvit::upsample_add")
def upsample_add(
    tokens: torch.Tensor,
    association: torch.Tensor,
    residual: torch.Tensor,
    scale: torch.Tensor | None,
    h: int,
    w: int,
) -> torch.Tensor:
    """Returns residual + scale * (weighted sum of tokens), (B, C, H, W).

    Args:
        tokens: Super tokens (B, C, Hs, Ws). Their dtype is that of the products.
        association: Association (B, 9, H, W).
        residual: Map (B, C, H, W), whose dtype is that of the result.
        scale: Factor of each image, (B,); None for one.
        h: Height of a cell.
        w: Width of a cell.
    """
    pixels = _upsample_add_fake(tokens, association, residual, scale, h, w)
    rows = residual.permute(0, 2, 3, 1).contiguous()
    _kernels(tokens).upsample(_cells_last(tokens), association, None, pixels, h, w, rows, scale)
    return pixels


@torch.library.register_fake("stvit::upsample_add")
def _upsample_add_fake(
    tokens: torch.Tensor,
    association: torch.Tensor,
    residual: torch.Tensor,
    scale: torch.Tensor | None,
    h: int,
    w: int,
) -> torch.Tensor:
    B, C, H, W = residual.shape
    return _new_map(residual, B, C, H, W, residual.dtype)


@torch.library.register_fake("stvit::upsample")
def _upsample_fake(
    tokens: torch.Tensor,
    association: torch.Tensor,
    weights: torch.Tensor | None,
    h: int,
    w: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    return _new_map(tokens, tokens.shape[0], tokens.shape[1], association.shape[2], association.shape[3], dtype)


@operator("stvit::aggregate")
def aggregate(
    pixels: torch.Tensor,
    association: torch.Tensor,
    weights: torch.Tensor | None,
    h: int,
    w: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Returns the association-weighted sums of pixels for each token, (B, C, Hs, Ws).

    Args:
        pixels: Pixels (B, C, H, W). Their dtype is that of the products.
        association: Association (B, 9, H, W).
        weights: Divisor of each token, (B, Hs, Ws) float32; None for plain sums.
        h: Height of a cell.
        w: Width of a cell.
        dtype: Dtype of the result.
    """
    tokens = _aggregate_fake(pixels, association, weights, h, w, dtype)
    if pixels.numel() == 0:
        return tokens.zero_()
    return _kernels(pixels).aggregate(pixels, association, weights, h, w, dtype).permute(0, 3, 1, 2)


@torch.library.register_fake("stvit::aggregate")
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


@operator("stvit::associate")
def associate(pixels: torch.Tensor, tokens: torch.Tensor, h: int, w: int, dtype: torch.dtype) -> torch.Tensor:
    """Returns the scalar products of each pixel with its neighbors, (B, 9, H, W).

    Unlike `reference.associate`, this operator applies no scale and no softmax.

    Args:
        pixels: Pixels (B, C, H, W). Their dtype is that of the products.
        tokens: Super tokens (B, C, Hs, Ws).
        h: Height of a cell.
        w: Width of a cell.
        dtype: Dtype of the result.
    """
    products = _associate_fake(pixels, tokens, h, w, dtype)
    if pixels.numel() == 0:
        return products.zero_()
    _kernels(pixels).associate(pixels, _cells_last(tokens), products, h, w)
    return products


@torch.library.register_fake("stvit::associate")
def _associate_fake(pixels: torch.Tensor, tokens: torch.Tensor, h: int, w: int, dtype: torch.dtype) -> torch.Tensor:
    return _new_map(pixels, pixels.shape[0], 9, pixels.shape[2], pixels.shape[3], dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Autograd


def _save_association(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, ctx.h, ctx.w, _, _ = inputs
    ctx.dtype = x.dtype
    ctx.save_for_backward(*output[1:])


def _associate_and_aggregate_backward(ctx: Any, grad_tokens: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
    association, weights = (saved.detach() for saved in ctx.saved_tensors)  # constants (section 3.2)
    grad_x = upsample(grad_tokens.to(association.dtype), association, weights, ctx.h, ctx.w, ctx.dtype)
    return grad_x, None, None, None, None


def _save_weighted_sum(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    values, association, weights, ctx.h, ctx.w, _ = inputs
    ctx.save_for_backward(values, association, weights)


def _upsample_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    tokens, association, weights = ctx.saved_tensors
    grad_tokens = grad_association = None
    if ctx.needs_input_grad[0]:
        grad_tokens = aggregate(grad, association, weights, ctx.h, ctx.w, tokens.dtype)
    if ctx.needs_input_grad[1]:
        grad_association = associate(grad, tokens, ctx.h, ctx.w, association.dtype)
    return grad_tokens, grad_association, None, None, None, None


def _save_scaled_sum(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    tokens, association, _, scale, ctx.h, ctx.w = inputs
    ctx.save_for_backward(tokens, association, scale)


def _upsample_add_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    tokens, association, scale = ctx.saved_tensors
    factor = 1.0 if scale is None else scale[:, None, None, None]
    products = grad.to(tokens.dtype)
    grad_tokens = grad_association = None
    if ctx.needs_input_grad[0]:
        grad_tokens = aggregate(products, association, None, ctx.h, ctx.w, tokens.dtype)
        grad_tokens = grad_tokens if scale is None else (grad_tokens * factor).to(tokens.dtype)
    if ctx.needs_input_grad[1]:
        grad_association = associate(products, tokens, ctx.h, ctx.w, association.dtype)
        grad_association = grad_association if scale is None else (grad_association * factor).to(association.dtype)
    return grad_tokens, grad_association, grad, None, None, None


def _aggregate_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    pixels, association, weights = ctx.saved_tensors
    grad_pixels = grad_association = None
    if ctx.needs_input_grad[0]:
        grad_pixels = upsample(grad, association, weights, ctx.h, ctx.w, pixels.dtype)
    if ctx.needs_input_grad[1]:
        grad_association = associate(pixels, grad, ctx.h, ctx.w, association.dtype)
    return grad_pixels, grad_association, None, None, None, None


def _save_products(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    pixels, tokens, ctx.h, ctx.w, _ = inputs
    ctx.save_for_backward(pixels, tokens)


def _associate_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    pixels, tokens = ctx.saved_tensors
    grad_pixels = grad_tokens = None
    if ctx.needs_input_grad[0]:
        grad_pixels = upsample(tokens, grad, None, ctx.h, ctx.w, pixels.dtype)
    if ctx.needs_input_grad[1]:
        grad_tokens = aggregate(pixels, grad, None, ctx.h, ctx.w, tokens.dtype)
    return grad_pixels, grad_tokens, None, None, None


torch.library.register_autograd(
    "stvit::associate_and_aggregate", _associate_and_aggregate_backward, setup_context=_save_association
)
torch.library.register_autograd("stvit::upsample_add", _upsample_add_backward, setup_context=_save_scaled_sum)
torch.library.register_autograd("stvit::upsample", _upsample_backward, setup_context=_save_weighted_sum)
torch.library.register_autograd("stvit::aggregate", _aggregate_backward, setup_context=_save_weighted_sum)
torch.library.register_autograd("stvit::associate", _associate_backward, setup_context=_save_products)


# ---------------------------------------------------------------------------------------------------------------------
# Functions of the backend


def sample_super_tokens(
    x: torch.Tensor, stoken_size: tuple[int, int], n_iter: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Implements `stvit.ops.sample_super_tokens`, which checks the arguments.

    Under autocast, products and association have the dtype of autocast.
    """
    tokens, association, _ = associate_and_aggregate(x, *stoken_size, n_iter, compute_dtype(x))
    return tokens, association.detach()


def upsample_super_tokens(
    tokens: torch.Tensor, association: torch.Tensor, stoken_size: tuple[int, int]
) -> torch.Tensor:
    """Implements `stvit.ops.upsample_super_tokens`, which checks the arguments."""
    tokens = tokens.to(compute_dtype(tokens))
    return upsample(tokens, association, None, *stoken_size, tokens.dtype)


def add_super_tokens(
    residual: torch.Tensor,
    tokens: torch.Tensor,
    association: torch.Tensor,
    stoken_size: tuple[int, int],
    scale: torch.Tensor | None,
) -> torch.Tensor:
    """Returns residual + scale * `upsample_super_tokens`, in one kernel.

    Args:
        residual: Map (B, C, H, W).
        tokens: Super tokens (B, C, Hs, Ws).
        association: Association (B, 9, H, W), which is a constant.
        stoken_size: Height and width of a cell.
        scale: Factor of each image, (B,); None for one.
    """
    return upsample_add(tokens.to(compute_dtype(tokens)), association, residual, scale, *stoken_size)

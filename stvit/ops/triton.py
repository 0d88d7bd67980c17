"""Super token sampling and upsampling in Triton: what the reference computes, with fewer bytes moved.

Source: "Vision Transformer with Super Token Sampling", https://arxiv.org/abs/2211.11167, sections 3.2 and 3.3. Imported
only when it is chosen (stvit/ops/backends.py); the kernels are in stvit/ops/kernels.py.

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

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl

from stvit.ops.kernels import finish_kernel, group_kernel, mean_kernel, upsample_kernel

__all__ = ["sample_super_tokens", "upsample_super_tokens"]

IS_INTERPRETED = not isinstance(mean_kernel, triton.JITFunction)  # by TRITON_INTERPRET=1, on a CPU
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

# ---------------------------------------------------------------------------------------------------------------------
# Launches


def _tile(h: int, w: int, C: int, *dtypes: torch.dtype) -> dict[str, Any]:
    """The shapes of a tile and of the blocks that it is worked through in, for numbers of the widest of these dtypes.

    Fixed, not searched for: another block would be another order of sums.
    """
    cells = 2 if h * w >= 16 else 4  # tiny cells would leave most of a block empty
    # Blocks of pixels and tokens, several at a time, in what a program of the smallest GPUs has: 99 KiB.
    is_narrow = max(dtype.itemsize for dtype in dtypes) == 2
    if is_narrow:
        numbers, widest = 8192, 128
    else:
        numbers, widest = (4096, 128) if cells == 2 else (2048, 64)
    block_c = min(max(16, triton.next_power_of_2(C)), widest)
    return {
        "h": h,
        "w": w,
        "TILE_H": cells,
        "TILE_W": cells,
        "SLOTS": triton.next_power_of_2((cells + 2) ** 2),
        "BLOCK_P": max(16, min(triton.next_power_of_2(cells * h * cells * w), numbers // block_c)),
        "BLOCK_C": block_c,
        "num_warps": 4 if is_narrow else 8,  # four would spill registers: three products stand for one
    }


def _index(*tensors: torch.Tensor | None) -> tl.dtype:
    """The integers that count the numbers of one image; 64 bits cost time."""
    spans = (
        sum((size - 1) * stride for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True))
        for x in tensors
        if x is not None
    )
    return tl.int32 if max(spans) < 2**31 else tl.int64


def _precision() -> str:
    """How float32 matrices are multiplied: all bits, unless torch.set_float32_matmul_precision allows fewer."""
    if IS_INTERPRETED:
        return "interpreted"
    if torch.version.cuda is None:
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _on(x: torch.Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whatever its arguments are on."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _cells_last(tokens: torch.Tensor) -> torch.Tensor:
    """(B, C, Hs, Ws) to (B, Hs, Ws, C), contiguous; a copy of few, unless they are channels_last."""
    return tokens.permute(0, 2, 3, 1).contiguous()


def _grid_size(H: int, W: int, h: int, w: int) -> tuple[int, int]:
    return (H + h - 1) // h, (W + w - 1) // w


def _new_map(like: torch.Tensor, B: int, C: int, H: int, W: int, dtype: torch.dtype) -> torch.Tensor:
    """(B, C, H, W), channels_last."""
    return like.new_empty(B, H, W, C, dtype=dtype).permute(0, 3, 1, 2)


def _mean(x: torch.Tensor, h: int, w: int) -> torch.Tensor:
    """The means of the cells, (B, Hs, Ws, C)."""
    B, C, H, W = x.shape
    Hs, Ws = _grid_size(H, W, h, w)
    tokens = x.new_empty(B, Hs, Ws, C)
    block_c = min(max(16, triton.next_power_of_2(C)), 128)
    block_p = max(1, min(triton.next_power_of_2(h * w), 8192 // block_c))
    grid = (B * Hs * Ws, triton.cdiv(C, block_c))
    mean_kernel[grid](
        x, tokens, H, W, Hs, Ws, C, *x.stride(), h=h, w=w, BLOCK_P=block_p, BLOCK_C=block_c, INDEX=_index(x)
    )
    return tokens


def _group(
    pixels: torch.Tensor,
    tokens: torch.Tensor | None,
    association: torch.Tensor | None,
    h: int,
    w: int,
    compute: torch.dtype,
    reads_association: bool = False,
    is_softmax: bool = False,
    sums: bool = True,
    weights: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compares pixels (B, C, H, W) with tokens (B, Hs, Ws, C) and sums them.

    Returns:
        The weighted sums (B, Hs, Ws, C) of that dtype: means with `is_softmax`, or divided by the weights given; and
        the weights (B, Hs, Ws). Without `sums`, both are empty.
    """
    B, C, H, W = pixels.shape
    Hs, Ws = _grid_size(H, W, h, w)
    tile = _tile(h, w, C, pixels.dtype, compute)
    cells, block_c = tile["TILE_H"], tile["BLOCK_C"]
    tiles = B * triton.cdiv(Hs, cells) * triton.cdiv(Ws, cells)
    slots = (cells + 2) ** 2
    parts = pixels.new_empty(tiles if sums else 0, slots, C, dtype=torch.float32)
    part_weights = pixels.new_empty(tiles if is_softmax else 0, slots, dtype=torch.float32)
    blocks = triton.cdiv(C, block_c)
    group_kernel[(tiles, blocks if sums else 1)](
        pixels,
        pixels if tokens is None else tokens,
        pixels if association is None else association,
        parts,
        part_weights,
        H,
        W,
        Hs,
        Ws,
        C,
        *pixels.stride(),
        *((0, 0, 0, 0) if association is None else association.stride()),
        C**-0.5 / math.log(2),
        **tile,
        IS_ONE_BLOCK=blocks == 1,
        READS_ASSOCIATION=reads_association,
        IS_SOFTMAX=is_softmax,
        WRITES_ASSOCIATION=association is not None and not reads_association,
        SUMS=sums,
        INDEX=_index(pixels, association),
        COMPUTE=DTYPES[compute],
        PRECISION=_precision(),
    )
    summed = pixels.new_empty(B, Hs, Ws, C, dtype=dtype) if sums else parts
    if weights is None:
        weights = pixels.new_empty((B, Hs, Ws) if is_softmax else 0, dtype=torch.float32)
        reads_weights = False
    else:
        reads_weights = True
    if sums:
        block_t = max(1, 2048 // block_c)
        finish_kernel[(triton.cdiv(B * Hs * Ws, block_t), blocks)](
            parts,
            part_weights,
            weights,
            summed,
            B * Hs * Ws,
            Hs,
            Ws,
            C,
            TILE_H=cells,
            TILE_W=cells,
            BLOCK_T=block_t,
            BLOCK_C=block_c,
            SUMS_WEIGHTS=is_softmax,
            READS_WEIGHTS=reads_weights,
        )
    return summed, weights


# ---------------------------------------------------------------------------------------------------------------------
# Operators, as torch.compile, export and autocast see them


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
    with _on(x):
        cells = _mean(x, h, w)
        for _ in range(n_iter - 1):
            cells, _ = _group(x, cells, None, h, w, dtype, is_softmax=True)
        cells, weights = _group(x, cells, association, h, w, dtype, is_softmax=True)
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
    B, C, H, W = pixels.shape
    Hs, Ws = tokens.shape[2:]
    tile = _tile(h, w, C, tokens.dtype, dtype)
    grid = (B * triton.cdiv(Hs, tile["TILE_H"]) * triton.cdiv(Ws, tile["TILE_W"]), triton.cdiv(C, tile["BLOCK_C"]))
    with _on(tokens):
        upsample_kernel[grid](
            _cells_last(tokens),
            association,
            tokens if weights is None else weights,
            pixels,
            H,
            W,
            Hs,
            Ws,
            C,
            *association.stride(),
            **tile,
            READS_WEIGHTS=weights is not None,
            INDEX=_index(pixels, association),
            COMPUTE=DTYPES[tokens.dtype],
            PRECISION=_precision(),
        )
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
    with _on(pixels):
        cells, _ = _group(
            pixels, None, association, h, w, pixels.dtype, reads_association=True, weights=weights, dtype=dtype
        )
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
    with _on(pixels):
        # A pixel's neighbors outside the grid are zero tokens, whose slots are masked out of what is read, not written.
        _group(pixels, _cells_last(tokens), products, h, w, pixels.dtype, sums=False)
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
    tokens, association, _ = sample(x, *stoken_size, n_iter, _autocast_dtype(x) or x.dtype)
    return tokens, association.detach()


def upsample_super_tokens(
    tokens: torch.Tensor, association: torch.Tensor, stoken_size: tuple[int, int]
) -> torch.Tensor:
    """See `stvit.ops.upsample_super_tokens`; the arguments have been checked there."""
    tokens = tokens.to(_autocast_dtype(tokens) or tokens.dtype)
    return upsample(tokens, association, None, *stoken_size, tokens.dtype)


def _autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None

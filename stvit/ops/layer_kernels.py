"""Triton kernels of stvit/ops/layers.py, and functions that launch them.

Each program of a depthwise kernel walks down a few *strips*. A strip is a column of a feature map that is a few pixels
wide. The pixels around the current row stay in registers, so each pixel is loaded and activated once or twice instead
of nine times. All sums are float32.

Two runs give equal results: each program writes one row of partial sums, and PyTorch adds the rows in a fixed order.

Shapes:
    B, H, W, C   batch size, height, width and channels; all maps are (B, H, W, C) and contiguous
    P            pixels of the whole batch, B * H * W
    S            in a kernel: a block of strips
    R            in a kernel: a block of pixels, as rows of the matrix (P, C)
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from stvit.ops.launch import Blocks, Launch, block_of_channels, cdiv, freeze, next_power_of_2, once_per_shape

__all__ = ["activate", "activate_backward", "depthwise", "depthwise_backward", "norm_backward", "sum_rows"]

SIZES = ["H", "W", "strips", "rows"]  # not specialized: one compiled kernel serves all sizes
FORWARD_WIDTH = 4  # pixels of a strip
BACKWARD_WIDTH = 2


@triton.jit
def _normal_cdf(x, IS_EXACT: tl.constexpr):
    """Returns the probability that a standard normal variable is below x.

    The approximation for 16-bit dtypes is the logistic function of an odd polynomial. GELU with it differs from the
    exact one by less than 4e-6. It takes a third of the instructions of `tl.erf`.
    """
    if IS_EXACT:
        return 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
    else:
        s = tl.minimum(x * x, 25.0)
        p = -2.302044 + s * (-0.1052300 + s * (3.620474e-4 + s * (8.791010e-5 - s * 3.210463e-6)))
        return 1.0 / (1.0 + tl.exp2(x * p))


@triton.jit
def _gelu_slope(x, cdf):
    """Returns the derivative of GELU at x from the normal distribution there."""
    return cdf + x * (0.3989422804014327 * tl.exp2(x * x * -0.7213475204444817))


@triton.jit
def _load_weights(
    weight_ptr,  # (C, 1, 3, 3), contiguous
    c,
    C,
):
    """Returns the nine weights of each channel, row by row, (1, channels) each."""
    at = weight_ptr + c * 9
    w0 = tl.load(at, mask=c < C, other=0.0).to(tl.float32)[None, :]
    w1 = tl.load(at + 1, mask=c < C, other=0.0).to(tl.float32)[None, :]
    w2 = tl.load(at + 2, mask=c < C, other=0.0).to(tl.float32)[None, :]
    w3 = tl.load(at + 3, mask=c < C, other=0.0).to(tl.float32)[None, :]
    w4 = tl.load(at + 4, mask=c < C, other=0.0).to(tl.float32)[None, :]
    w5 = tl.load(at + 5, mask=c < C, other=0.0).to(tl.float32)[None, :]
    w6 = tl.load(at + 6, mask=c < C, other=0.0).to(tl.float32)[None, :]
    w7 = tl.load(at + 7, mask=c < C, other=0.0).to(tl.float32)[None, :]
    w8 = tl.load(at + 8, mask=c < C, other=0.0).to(tl.float32)[None, :]
    return w0, w1, w2, w3, w4, w5, w6, w7, w8


@triton.jit
def _find_strips(strips, rows, H, W, WIDTH: tl.constexpr, BLOCK_S: tl.constexpr):
    """Locates strips of pixels.

    Returns:
        The first pixel of each strip, its row and column, and which strips exist, (S,) each.
    """
    strip = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    columns = tl.cdiv(W, WIDTH)
    chunks = tl.cdiv(H, rows)
    x = strip % columns * WIDTH
    y = strip // columns % chunks * rows
    b = strip // (columns * chunks)
    return (b.to(tl.int64) * H + y) * W + x, y, x, strip < strips


@triton.jit
def _load_pixel(
    x_ptr,  # (B, H, W, C), contiguous
    at,
    is_row,
    x,
    W,
    c,
    C,
):
    """Loads one pixel of each strip as float32, (S, channels).

    Pixels outside the map are zero.
    """
    mask = (is_row & (x >= 0) & (x < W))[:, None] & (c < C)[None, :]
    return tl.load(x_ptr + (at * C)[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_activated(
    x_ptr,  # (B, H, W, C), contiguous
    at,
    is_row,
    x,
    W,
    c,
    C,
    HAS_GELU: tl.constexpr,
    IS_EXACT: tl.constexpr,
):
    """Loads one pixel of each strip, (S, channels), and activates it with `HAS_GELU`."""
    value = _load_pixel(x_ptr, at, is_row, x, W, c, C)
    if HAS_GELU:
        value = value * _normal_cdf(value, IS_EXACT)
    return value


@triton.jit
def _store_pixel(
    y_ptr,  # (B, H, W, C), contiguous
    at,
    is_row,
    x,
    W,
    c,
    C,
    value,
):
    """Stores one pixel of each strip, (S, channels), except outside the map."""
    mask = (is_row & (x < W))[:, None] & (c < C)[None, :]
    tl.store(y_ptr + (at * C)[:, None] + c[None, :], value, mask=mask)


@triton.jit
def _normalize(value, weight, bias, is_channel, C, eps):
    """Returns each row normalized over its channels, (rows, channels)."""
    mean = tl.sum(value, axis=1) / C
    centered = tl.where(is_channel, value - mean[:, None], 0.0)
    variance = tl.sum(centered * centered, axis=1) / C
    return centered * tl.rsqrt(variance + eps)[:, None] * weight + bias


@triton.jit(do_not_specialize=SIZES)
def depthwise_kernel(
    x_ptr,  # (B, H, W, C)
    weight_ptr,  # (C, 1, 3, 3)
    bias_ptr,  # (C,)
    y_ptr,  # (B, H, W, C), output
    norm_weight_ptr,  # (C,); read if HAS_NORM
    norm_bias_ptr,  # (C,); read if HAS_NORM
    norm_ptr,  # (B, H, W, C), output; written if HAS_NORM
    shift_ptr,  # (C,), read if HAS_SHIFT
    H,
    W,
    C,
    strips,  # number of strips in the batch
    rows,  # height of a strip
    eps,  # of the layer normalization
    HAS_GELU: tl.constexpr,  # activates x
    HAS_NORM: tl.constexpr,  # writes the layer normalization of the output, too
    HAS_SHIFT: tl.constexpr,  # adds a vector to y, after the layer normalization has read y
    IS_EXACT: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Computes a + depthwise(a) + bias with a = x or a = gelu(x).

    The current input row contributes to three output rows. The sums of these rows move up by one in each step.
    """
    start, y, x, is_strip = _find_strips(strips, rows, H, W, 4, BLOCK_S)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    w0, w1, w2, w3, w4, w5, w6, w7, w8 = _load_weights(weight_ptr, c, C)
    w4 += 1.0  # the residual
    bias = tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    if HAS_NORM:
        norm_weight = tl.load(norm_weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
        norm_bias = tl.load(norm_bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    if HAS_SHIFT:
        shift = tl.load(shift_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    # Sums of the row above the current one (top) and of the current row (mid), for the four columns.
    top0 = tl.zeros((BLOCK_S, BLOCK_C), tl.float32) + bias
    top1 = top0
    top2 = top0
    top3 = top0
    mid0 = top0
    mid1 = top0
    mid2 = top0
    mid3 = top0
    for row in range(-1, rows + 1):
        is_row = is_strip & (y + row >= 0) & (y + row < H)
        at = start + row * W
        a = _load_activated(x_ptr, at - 1, is_row, x - 1, W, c, C, HAS_GELU, IS_EXACT)
        b = _load_activated(x_ptr, at, is_row, x, W, c, C, HAS_GELU, IS_EXACT)
        d = _load_activated(x_ptr, at + 1, is_row, x + 1, W, c, C, HAS_GELU, IS_EXACT)
        e = _load_activated(x_ptr, at + 2, is_row, x + 2, W, c, C, HAS_GELU, IS_EXACT)
        f = _load_activated(x_ptr, at + 3, is_row, x + 3, W, c, C, HAS_GELU, IS_EXACT)
        g = _load_activated(x_ptr, at + 4, is_row, x + 4, W, c, C, HAS_GELU, IS_EXACT)
        top0 += w6 * a + w7 * b + w8 * d
        top1 += w6 * b + w7 * d + w8 * e
        top2 += w6 * d + w7 * e + w8 * f
        top3 += w6 * e + w7 * f + w8 * g
        is_done = is_strip & (row >= 1) & (y + row - 1 < H)
        done = at - W
        if HAS_NORM:
            is_channel = (c < C)[None, :]
            _store_pixel(
                norm_ptr, done, is_done, x, W, c, C, _normalize(top0, norm_weight, norm_bias, is_channel, C, eps)
            )
            _store_pixel(
                norm_ptr,
                done + 1,
                is_done,
                x + 1,
                W,
                c,
                C,
                _normalize(top1, norm_weight, norm_bias, is_channel, C, eps),
            )
            _store_pixel(
                norm_ptr,
                done + 2,
                is_done,
                x + 2,
                W,
                c,
                C,
                _normalize(top2, norm_weight, norm_bias, is_channel, C, eps),
            )
            _store_pixel(
                norm_ptr,
                done + 3,
                is_done,
                x + 3,
                W,
                c,
                C,
                _normalize(top3, norm_weight, norm_bias, is_channel, C, eps),
            )
        if HAS_SHIFT:
            top0 += shift
            top1 += shift
            top2 += shift
            top3 += shift
        _store_pixel(y_ptr, done, is_done, x, W, c, C, top0)
        _store_pixel(y_ptr, done + 1, is_done, x + 1, W, c, C, top1)
        _store_pixel(y_ptr, done + 2, is_done, x + 2, W, c, C, top2)
        _store_pixel(y_ptr, done + 3, is_done, x + 3, W, c, C, top3)
        top0 = mid0 + w3 * a + w4 * b + w5 * d
        top1 = mid1 + w3 * b + w4 * d + w5 * e
        top2 = mid2 + w3 * d + w4 * e + w5 * f
        top3 = mid3 + w3 * e + w4 * f + w5 * g
        mid0 = bias + w0 * a + w1 * b + w2 * d
        mid1 = bias + w0 * b + w1 * d + w2 * e
        mid2 = bias + w0 * d + w1 * e + w2 * f
        mid3 = bias + w0 * e + w1 * f + w2 * g


@triton.jit(do_not_specialize=SIZES)
def depthwise_backward_kernel(
    grad_ptr,  # (B, H, W, C), gradient of the output
    x_ptr,  # (B, H, W, C), input of the forward pass
    weight_ptr,  # (C, 1, 3, 3)
    grad_x_ptr,  # (B, H, W, C), output
    sums_ptr,  # (11, programs, C) float32, output: gradients of the nine weights and the bias, and the sum of grad_x
    H,
    W,
    C,
    strips,  # number of strips in the batch
    rows,  # height of a strip
    HAS_GELU: tl.constexpr,
    IS_EXACT: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Computes all gradients of `depthwise_kernel` in one pass.

    The weight gradient pairs each pixel of the input with the nine gradients that its own gradient needs.
    """
    start, y, x, is_strip = _find_strips(strips, rows, H, W, 2, BLOCK_S)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    w0, w1, w2, w3, w4, w5, w6, w7, w8 = _load_weights(weight_ptr, c, C)
    w4 += 1.0  # the residual
    # Gradients of three rows (top, mid, low) and four columns, of which the strip owns the columns 1 and 2.
    is_row = is_strip & (y >= 1)
    top0 = _load_pixel(grad_ptr, start - W - 1, is_row, x - 1, W, c, C)
    top1 = _load_pixel(grad_ptr, start - W, is_row, x, W, c, C)
    top2 = _load_pixel(grad_ptr, start - W + 1, is_row, x + 1, W, c, C)
    top3 = _load_pixel(grad_ptr, start - W + 2, is_row, x + 2, W, c, C)
    mid0 = _load_pixel(grad_ptr, start - 1, is_strip, x - 1, W, c, C)
    mid1 = _load_pixel(grad_ptr, start, is_strip, x, W, c, C)
    mid2 = _load_pixel(grad_ptr, start + 1, is_strip, x + 1, W, c, C)
    mid3 = _load_pixel(grad_ptr, start + 2, is_strip, x + 2, W, c, C)
    s0 = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    s1 = s0
    s2 = s0
    s3 = s0
    s4 = s0
    s5 = s0
    s6 = s0
    s7 = s0
    s8 = s0
    sum_grad = s0
    sum_grad_x = s0
    for row in range(0, rows):
        at = start + row * W
        is_row = is_strip & (y + row < H)
        is_low = is_strip & (y + row + 1 < H)
        low0 = _load_pixel(grad_ptr, at + W - 1, is_low, x - 1, W, c, C)
        low1 = _load_pixel(grad_ptr, at + W, is_low, x, W, c, C)
        low2 = _load_pixel(grad_ptr, at + W + 1, is_low, x + 1, W, c, C)
        low3 = _load_pixel(grad_ptr, at + W + 2, is_low, x + 2, W, c, C)
        a = _load_pixel(x_ptr, at, is_row, x, W, c, C)
        b = _load_pixel(x_ptr, at + 1, is_row, x + 1, W, c, C)
        # The kernel is flipped: weight 0 belongs to the pixel below on the right.
        grad_a = (
            w0 * low2 + w1 * low1 + w2 * low0 + w3 * mid2 + w4 * mid1 + w5 * mid0 + w6 * top2 + w7 * top1 + w8 * top0
        )
        grad_b = (
            w0 * low3 + w1 * low2 + w2 * low1 + w3 * mid3 + w4 * mid2 + w5 * mid1 + w6 * top3 + w7 * top2 + w8 * top1
        )
        if HAS_GELU:
            cdf_a = _normal_cdf(a, IS_EXACT)
            cdf_b = _normal_cdf(b, IS_EXACT)
            grad_a *= _gelu_slope(a, cdf_a)
            grad_b *= _gelu_slope(b, cdf_b)
            a *= cdf_a
            b *= cdf_b
        _store_pixel(grad_x_ptr, at, is_row, x, W, c, C, grad_a)
        _store_pixel(grad_x_ptr, at + 1, is_row, x + 1, W, c, C, grad_b)
        s0 += a * low2 + b * low3
        s1 += a * low1 + b * low2
        s2 += a * low0 + b * low1
        s3 += a * mid2 + b * mid3
        s4 += a * mid1 + b * mid2
        s5 += a * mid0 + b * mid1
        s6 += a * top2 + b * top3
        s7 += a * top1 + b * top2
        s8 += a * top0 + b * top1
        sum_grad += mid1 + mid2
        sum_grad_x += tl.where(is_row[:, None], grad_a, 0.0)
        sum_grad_x += tl.where((is_row & (x + 1 < W))[:, None], grad_b, 0.0)
        top0 = mid0
        top1 = mid1
        top2 = mid2
        top3 = mid3
        mid0 = low0
        mid1 = low1
        mid2 = low2
        mid3 = low3
    step = tl.num_programs(0).to(tl.int64) * C
    at_sums = sums_ptr + tl.program_id(0).to(tl.int64) * C + c
    tl.store(at_sums, tl.sum(s0, axis=0), mask=c < C)
    tl.store(at_sums + step, tl.sum(s1, axis=0), mask=c < C)
    tl.store(at_sums + step * 2, tl.sum(s2, axis=0), mask=c < C)
    tl.store(at_sums + step * 3, tl.sum(s3, axis=0), mask=c < C)
    tl.store(at_sums + step * 4, tl.sum(s4, axis=0), mask=c < C)
    tl.store(at_sums + step * 5, tl.sum(s5, axis=0), mask=c < C)
    tl.store(at_sums + step * 6, tl.sum(s6, axis=0), mask=c < C)
    tl.store(at_sums + step * 7, tl.sum(s7, axis=0), mask=c < C)
    tl.store(at_sums + step * 8, tl.sum(s8, axis=0), mask=c < C)
    tl.store(at_sums + step * 9, tl.sum(sum_grad, axis=0), mask=c < C)
    tl.store(at_sums + step * 10, tl.sum(sum_grad_x, axis=0), mask=c < C)


@triton.jit(do_not_specialize=["P", "steps"])
def norm_backward_kernel(
    grad_ptr,  # (P, C), gradient of the normalized rows
    grad_y_ptr,  # (P, C), further gradient of y; read if HAS_GRAD_Y
    y_ptr,  # (P, C), rows before the normalization
    weight_ptr,  # (C,)
    grad_x_ptr,  # (P, C), output
    sums_ptr,  # (3, programs, C) float32, output: gradients of weight and bias, and the sum of grad_x
    P,
    C,
    eps,
    steps,  # blocks of rows of each program
    HAS_GRAD_Y: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Computes all gradients of a layer normalization over channels.

    Mean and variance are computed again.
    """
    c = tl.arange(0, BLOCK_C)
    weight = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    is_channel = (c < C)[None, :]
    sum_weight = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    sum_bias = sum_weight
    sum_grad_x = sum_weight
    for step in range(0, steps):
        row = (tl.program_id(0) * steps + step) * BLOCK_R + tl.arange(0, BLOCK_R)
        mask = (row < P)[:, None] & is_channel
        at = (row.to(tl.int64) * C)[:, None] + c[None, :]
        y = tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        mean = tl.sum(y, axis=1) / C
        centered = tl.where(mask, y - mean[:, None], 0.0)
        scale = tl.rsqrt(tl.sum(centered * centered, axis=1) / C + eps)[:, None]
        normalized = centered * scale
        scaled = grad * weight
        mean_grad = (tl.sum(scaled, axis=1) / C)[:, None]
        slope = (tl.sum(scaled * normalized, axis=1) / C)[:, None]
        grad_x = (scaled - mean_grad - normalized * slope) * scale
        if HAS_GRAD_Y:
            grad_x += tl.load(grad_y_ptr + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + at, grad_x, mask=mask)
        sum_weight += grad * normalized
        sum_bias += grad
        sum_grad_x += tl.where(mask, grad_x, 0.0)
    total = tl.num_programs(0).to(tl.int64) * C
    at_sums = sums_ptr + tl.program_id(0).to(tl.int64) * C + c
    tl.store(at_sums, tl.sum(sum_weight, axis=0), mask=c < C)
    tl.store(at_sums + total, tl.sum(sum_bias, axis=0), mask=c < C)
    tl.store(at_sums + total * 2, tl.sum(sum_grad_x, axis=0), mask=c < C)


@triton.jit(do_not_specialize=["P"])
def activate_kernel(
    x_ptr,  # (P, C)
    bias_ptr,  # (C,); read if HAS_BIAS
    scale_ptr,  # (C,); read if HAS_AFFINE
    shift_ptr,  # (C,); read if HAS_AFFINE
    y_ptr,  # (P, C), output
    P,
    C,
    HAS_BIAS: tl.constexpr,
    HAS_AFFINE: tl.constexpr,
    IS_EXACT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Computes gelu(x + bias) * scale + shift."""
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = (row < P)[:, None] & (c < C)[None, :]
    at = (row.to(tl.int64) * C)[:, None] + c[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    x *= _normal_cdf(x, IS_EXACT)
    if HAS_AFFINE:
        x *= tl.load(scale_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
        x += tl.load(shift_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + at, x, mask=mask)


@triton.jit(do_not_specialize=["P", "steps"])
def activate_backward_kernel(
    grad_ptr,  # (P, C)
    x_ptr,  # (P, C)
    bias_ptr,  # (C,); read if HAS_BIAS
    grad_x_ptr,  # (P, C), output
    sums_ptr,  # (programs, C) float32, output: sum of grad_x
    P,
    C,
    steps,  # blocks of rows of each program
    HAS_BIAS: tl.constexpr,
    IS_EXACT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Computes the gradients of gelu(x + bias)."""
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for step in range(0, steps):
        row = (tl.program_id(0) * steps + step) * BLOCK_R + tl.arange(0, BLOCK_R)
        mask = (row < P)[:, None] & (c < C)[None, :]
        at = (row.to(tl.int64) * C)[:, None] + c[None, :]
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            x += bias
        grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        grad *= _gelu_slope(x, _normal_cdf(x, IS_EXACT))
        tl.store(grad_x_ptr + at, grad, mask=mask)
        total += grad
    tl.store(sums_ptr + tl.program_id(0).to(tl.int64) * C + c, tl.sum(total, axis=0), mask=c < C)


@triton.jit(do_not_specialize=["P", "steps"])
def sum_rows_kernel(
    x_ptr,  # (P, C)
    sums_ptr,  # (programs, C) float32, output
    P,
    C,
    steps,  # blocks of rows of each program
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Adds the rows of each program."""
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for step in range(0, steps):
        row = (tl.program_id(0) * steps + step) * BLOCK_R + tl.arange(0, BLOCK_R)
        mask = (row < P)[:, None] & (c < C)[None, :]
        total += tl.load(x_ptr + (row.to(tl.int64) * C)[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(sums_ptr + tl.program_id(0).to(tl.int64) * C + c, tl.sum(total, axis=0), mask=c < C)


# ---------------------------------------------------------------------------------------------------------------------
# Launches. The functions `_prepare_*` compute what depends on the shapes. They run once for each shape.
# `blocks` replaces the block sizes, for measurements. Kernels read weights and vectors as contiguous memory.


# The defaults come from measurements on an H200, see docs/benchmarks/gpu.md. A few other settings were up to a tenth
# faster at one shape.

PROGRAMS = 1024  # enough to fill a large GPU; strips become shorter to reach it


class _Sums(NamedTuple):
    """A launch whose programs write partial sums, and the shape of these sums."""

    launch: Launch
    sums: tuple[int, ...]


def _strips(
    shape: tuple[int, ...], width: int, blocks: Mapping[str, int], block_s: int, block_c: int
) -> tuple[int, int]:
    """Returns the number of strips in a batch and their height in rows.

    Args:
        shape: Shape (B, H, W, C) of the map.
        width: Width of a strip in pixels.
        blocks: `rows`, optional.
        block_s: Strips of a program.
        block_c: Channels of a program.
    """
    B, H, W, C = shape
    columns = B * cdiv(W, width)
    rows = blocks.get("rows", 0)
    if not rows:
        groups = max(1, cdiv(columns, block_s) * cdiv(C, block_c))
        chunks = max(cdiv(H, 64), min(cdiv(H, 4), PROGRAMS // groups), 1)
        rows = cdiv(H, chunks)
    return columns * cdiv(H, rows), rows


def _share_rows(P: int, block_r: int, max_programs: int) -> tuple[int, int]:
    """Shares blocks of rows of a matrix (P, C) among programs.

    Returns:
        The number of programs and the number of blocks of each program.
    """
    blocks = cdiv(P, block_r)
    steps = cdiv(blocks, max_programs)
    return cdiv(blocks, steps), steps


def depthwise(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    has_gelu: bool = False,
    norm: tuple[torch.Tensor, torch.Tensor, float] | None = None,
    shift: torch.Tensor | None = None,
    blocks: Mapping[str, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs a residual depthwise convolution, after GELU or before LayerNorm.

    The result is a + depthwise(a) + bias + shift, where a is x or gelu(x).

    Args:
        x: Map (B, H, W, C).
        weight: Weights (C, 1, 3, 3).
        bias: Bias (C,).
        has_gelu: Whether to activate x.
        norm: Weight (C,), bias (C,) and epsilon of the layer normalization; None for no normalization.
        shift: Vector (C,) that is added to the first output, but not before the normalization.
        blocks: `rows`, `block_s`, `block_c` and `num_warps`, each optional.

    Returns:
        Two maps (B, H, W, C). Without `norm` the second is the first.
    """
    y = torch.empty_like(x)
    normalized = torch.empty_like(x) if norm else y
    bias = bias.contiguous()
    norm_weight, norm_bias, eps = norm or (bias, bias, 0.0)
    has_norm, has_shift = norm is not None, shift is not None
    launch = _prepare_depthwise(x.shape, x.dtype, eps, has_gelu, has_norm, has_shift, freeze(blocks))
    norm_weight, norm_bias = norm_weight.contiguous(), norm_bias.contiguous()
    launch(
        x,
        weight.contiguous(),
        bias,
        y,
        norm_weight,
        norm_bias,
        normalized,
        bias if shift is None else shift.contiguous(),
    )
    return y, normalized


@once_per_shape
def _prepare_depthwise(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    eps: float,
    has_gelu: bool,
    has_norm: bool,
    has_shift: bool,
    blocks: Blocks,
) -> Launch:
    _, H, W, C = shape
    chosen = dict(blocks)
    block_c = next_power_of_2(max(16, C)) if has_norm else chosen.get("block_c", block_of_channels(C, 128))
    block_s = chosen.get("block_s", max(1, (512 if has_norm else 256) // block_c))
    per_warp = 256 if has_norm and C > 128 and dtype.itemsize == 2 else 128  # 256 spills registers with few channels
    strips, rows = _strips(shape, FORWARD_WIDTH, chosen, block_s, block_c)
    return Launch(
        depthwise_kernel,
        (cdiv(strips, block_s), cdiv(C, block_c)),
        *(H, W, C, strips, rows, eps),
        HAS_GELU=has_gelu,
        HAS_NORM=has_norm,
        HAS_SHIFT=has_shift,
        IS_EXACT=dtype == torch.float32,
        BLOCK_S=block_s,
        BLOCK_C=block_c,
        num_warps=chosen.get("num_warps", max(1, block_s * block_c // per_warp)),
    )


def depthwise_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    has_gelu: bool = False,
    blocks: Mapping[str, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the gradients of `depthwise` without normalization.

    Args:
        grad: Gradient of the output, (B, H, W, C).
        x: Input of the forward pass, (B, H, W, C).
        weight: Weights (C, 1, 3, 3).
        has_gelu: Whether the forward pass activated x.
        blocks: As in `depthwise`.

    Returns:
        The gradient of x, (B, H, W, C), and eleven sums (11, C) in float32: the gradients of the nine weights and of
        the bias, and the sum of the gradient of x over all pixels.
    """
    launch, shape = _prepare_depthwise_backward(x.shape, x.dtype, has_gelu, freeze(blocks))
    grad_x = torch.empty_like(x)
    sums = x.new_empty(shape, dtype=torch.float32)
    launch(grad, x, weight.contiguous(), grad_x, sums)
    return grad_x, sums.sum(1)


@once_per_shape
def _prepare_depthwise_backward(shape: tuple[int, ...], dtype: torch.dtype, has_gelu: bool, blocks: Blocks) -> _Sums:
    _, H, W, C = shape
    chosen = dict(blocks)
    block_c = chosen.get("block_c", block_of_channels(C, 64))
    block_s = chosen.get("block_s", max(1, 256 // block_c))
    strips, rows = _strips(shape, BACKWARD_WIDTH, chosen, block_s, block_c)
    programs = cdiv(strips, block_s)
    launch = Launch(
        depthwise_backward_kernel,
        (programs, cdiv(C, block_c)),
        *(H, W, C, strips, rows),
        HAS_GELU=has_gelu,
        IS_EXACT=dtype == torch.float32,
        BLOCK_S=block_s,
        BLOCK_C=block_c,
        num_warps=chosen.get("num_warps", 4),
    )
    return _Sums(launch, (11, programs, C))


def norm_backward(
    grad: torch.Tensor,
    grad_y: torch.Tensor | None,
    y: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    blocks: Mapping[str, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the gradients of a layer normalization over the channels.

    Args:
        grad: Gradient of the normalized map, (B, H, W, C).
        grad_y: Gradient of y from elsewhere, (B, H, W, C), which is added; None for zero.
        y: Map before the normalization, (B, H, W, C).
        weight: Weight (C,).
        eps: Epsilon.
        blocks: `block_r`, `programs` and `num_warps`, each optional.

    Returns:
        The gradient of y, (B, H, W, C), and three sums (3, C) in float32: the gradients of weight and bias, and the
        sum of the gradient of y over all pixels.
    """
    C = y.shape[3]
    launch, shape = _prepare_norm_backward(y.numel() // C, C, eps, grad_y is not None, freeze(blocks))
    grad_x = torch.empty_like(y)
    sums = y.new_empty(shape, dtype=torch.float32)
    launch(grad, grad if grad_y is None else grad_y, y, weight.contiguous(), grad_x, sums)
    return grad_x, sums.sum(1)


@once_per_shape
def _prepare_norm_backward(P: int, C: int, eps: float, has_grad_y: bool, blocks: Blocks) -> _Sums:
    chosen = dict(blocks)
    block_c = next_power_of_2(max(16, C))
    block_r = chosen.get("block_r", max(1, 2048 // block_c))
    programs, steps = _share_rows(P, block_r, chosen.get("programs", 528))
    launch = Launch(
        norm_backward_kernel,
        (programs,),
        *(P, C, eps, steps),
        HAS_GRAD_Y=has_grad_y,
        BLOCK_R=block_r,
        BLOCK_C=block_c,
        num_warps=chosen.get("num_warps", 4),
    )
    return _Sums(launch, (3, programs, C))


def activate(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    blocks: Mapping[str, int] | None = None,
) -> torch.Tensor:
    """Returns gelu(x + bias) * scale + shift.

    Args:
        x: Map (B, H, W, C).
        bias: Bias (C,); None for zero.
        scale: Scale (C,); None for one.
        shift: Shift (C,), which must come with `scale`; None for zero.
        blocks: `block_r`, `block_c` and `num_warps`, each optional.
    """
    C = x.shape[3]
    launch = _prepare_activate(x.numel() // C, C, x.dtype, bias is not None, scale is not None, freeze(blocks))
    y = torch.empty_like(x)
    vectors = [x if vector is None else vector.contiguous() for vector in (bias, scale, shift)]
    launch(x, *vectors, y)
    return y


@once_per_shape
def _prepare_activate(P: int, C: int, dtype: torch.dtype, has_bias: bool, has_affine: bool, blocks: Blocks) -> Launch:
    chosen = dict(blocks)
    block_c, block_r = _row_blocks(C, chosen)
    return Launch(
        activate_kernel,
        (cdiv(P, block_r), cdiv(C, block_c)),
        *(P, C),
        HAS_BIAS=has_bias,
        HAS_AFFINE=has_affine,
        IS_EXACT=dtype == torch.float32,
        BLOCK_R=block_r,
        BLOCK_C=block_c,
        num_warps=chosen.get("num_warps", 4),
    )


def _row_blocks(C: int, blocks: Mapping[str, int]) -> tuple[int, int]:
    """Returns the channels and the rows of a block.

    C is the number of columns of the whole matrix.
    """
    block_c = blocks.get("block_c", block_of_channels(C, 128))
    return block_c, blocks.get("block_r", max(1, 2048 // block_c))


def activate_backward(
    grad: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, blocks: Mapping[str, int] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the gradients of gelu(x + bias).

    Args:
        grad: Gradient of the output, (B, H, W, C).
        x: Input of the forward pass, (B, H, W, C).
        bias: Bias (C,); None for zero.
        blocks: `block_r`, `block_c`, `programs` and `num_warps`, each optional.

    Returns:
        The gradient of x, (B, H, W, C), and its sum over all pixels, (C,) in float32.
    """
    C = x.shape[3]
    launch, shape = _prepare_activate_backward(x.numel() // C, C, x.dtype, bias is not None, freeze(blocks))
    grad_x = torch.empty_like(x)
    sums = x.new_empty(shape, dtype=torch.float32)
    launch(grad, x, x if bias is None else bias.contiguous(), grad_x, sums)
    return grad_x, sums.sum(0)


@once_per_shape
def _prepare_activate_backward(P: int, C: int, dtype: torch.dtype, has_bias: bool, blocks: Blocks) -> _Sums:
    is_exact = dtype == torch.float32
    return _prepare_sums(activate_backward_kernel, P, C, blocks, HAS_BIAS=has_bias, IS_EXACT=is_exact)


def _prepare_sums(kernel: Any, P: int, C: int, blocks: Blocks, **constants: bool) -> _Sums:
    """Returns the launch of a kernel whose programs add rows of a matrix (P, C)."""
    chosen = dict(blocks)
    block_c, block_r = _row_blocks(C, chosen)
    programs, steps = _share_rows(P, block_r, chosen.get("programs", 1056))
    launch = Launch(
        kernel,
        (programs, cdiv(C, block_c)),
        *(P, C, steps),
        **constants,
        BLOCK_R=block_r,
        BLOCK_C=block_c,
        num_warps=chosen.get("num_warps", 4),
    )
    return _Sums(launch, (programs, C))


def sum_rows(x: torch.Tensor, blocks: Mapping[str, int] | None = None) -> torch.Tensor:
    """Returns the sum of the rows of a matrix (P, C) as (C,) in float32.

    Args:
        x: Contiguous matrix.
        blocks: `block_r`, `block_c`, `programs` and `num_warps`, each optional.
    """
    launch, shape = _prepare_sum_rows(*x.shape, freeze(blocks))
    sums = x.new_empty(shape, dtype=torch.float32)
    launch(x, sums)
    return sums.sum(0)


@once_per_shape
def _prepare_sum_rows(P: int, C: int, blocks: Blocks) -> _Sums:
    return _prepare_sums(sum_rows_kernel, P, C, blocks)

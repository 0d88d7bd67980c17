"""Triton kernels of stvit/ops/triton.py, and functions that launch them.

No other module imports Triton. Each program processes one tile of cells. A tile of 2x2 cells has 4x4 super tokens in
and around it, and 16 is the smallest block of the matrix units. One matrix product multiplies a block of pixels with
all of these tokens, and a mask keeps the nine neighbors of each pixel. Gathering, padding and summing happen in
registers. Memory holds only inputs, outputs, and the partial sums of each tile for the tokens in and around it.

Two runs give equal results: every sum has a fixed order, and there are no atomic additions.

Shapes: as in stvit/ops/reference.py, and
    S        slots of a tile: the super tokens in and around it, row by row, padded to a power of two
    P, C     in a kernel: a block of pixels of a tile, a block of channels
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from stvit.ops.launch import Blocks, Launch, block_of_channels, cdiv, freeze, next_power_of_2, once_per_shape

__all__ = [
    "IS_INTERPRETED",
    "aggregate",
    "associate",
    "associate_and_aggregate",
    "check_driver",
    "mean",
    "upsample",
]

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
SIZES = ["H", "W", "Hs", "Ws"]  # not specialized: one compiled kernel serves all sizes


@triton.jit
def _find_tile(program, Hs, Ws, TILE: tl.constexpr):
    """Returns the image of a program, and the row and column of its tile."""
    tiles_y = tl.cdiv(Hs, TILE)
    tiles_x = tl.cdiv(Ws, TILE)
    return (program // (tiles_x * tiles_y)).to(tl.int64), (program // tiles_x) % tiles_y, program % tiles_x


@triton.jit
def _find_slots(b, tile_y, tile_x, Hs, Ws, TILE: tl.constexpr, SLOTS: tl.constexpr):
    """Returns the token number of each slot, and which slots have one, (S,) each."""
    slot = tl.arange(0, SLOTS)
    row = tile_y * TILE - 1 + slot // (TILE + 2)
    col = tile_x * TILE - 1 + slot % (TILE + 2)
    is_token = (slot < (TILE + 2) * (TILE + 2)) & (row >= 0) & (row < Hs) & (col >= 0) & (col < Ws)
    return (b * Hs + row) * Ws + col, is_token


@triton.jit
def _find_pixels(
    start,
    tile_y,
    tile_x,
    h: tl.constexpr,
    w: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Returns the positions of the pixels in a block.

    Returns:
        Row, column, slot of the first neighbor, and a mask of the pixels that belong to the tile, (P,) each.
    """
    q = start + tl.arange(0, BLOCK_P)
    y = q // (TILE * w)
    x = q % (TILE * w)
    first = y // h * (TILE + 2) + x // w
    return tile_y * (TILE * h) + y, tile_x * (TILE * w) + x, first, y < TILE * h


@triton.jit
def _find_neighbors(
    y, x, first, stride_k, stride_y, stride_x, TILE: tl.constexpr, SLOTS: tl.constexpr, INDEX: tl.constexpr
):
    """Returns offsets into an image's association, and a neighbor mask, (P, S) each."""
    # Unsigned: slots before the first neighbor become large numbers.
    ahead = (tl.arange(0, SLOTS)[None, :] - first[:, None]).to(tl.uint32)
    down = ahead // (TILE + 2)
    k = ahead - down * (TILE - 1)
    at = y.to(INDEX) * stride_y + x.to(INDEX) * stride_x
    return at[:, None] + k.to(INDEX) * stride_k, (down <= 2) & (ahead % (TILE + 2) <= 2)


@triton.jit
def _is_first_program(AXIS: tl.constexpr):
    """Returns a mask (1,) that is true in the first program of an axis.

    It compares a block because Triton 3.9 treats the result of a scalar comparison as an integer and rejects it in a
    mask.
    """
    return tl.full((1,), tl.program_id(AXIS), tl.int32) == 0


@triton.jit
def _dot(a, b, total, PRECISION: tl.constexpr):
    """Returns total + a @ b in float32."""
    if PRECISION == "interpreted":  # the interpreter would multiply the bits of bfloat16 numbers
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    else:
        return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit(do_not_specialize=SIZES)
def mean_kernel(
    x_ptr,  # (B, C, H, W), any strides
    tokens_ptr,  # (B, Hs, Ws, C), contiguous, output
    H,
    W,
    Hs,
    Ws,
    C,
    x_stride_b,
    x_stride_c,
    x_stride_y,
    x_stride_x,
    h: tl.constexpr,
    w: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Computes the mean of each cell, including padding zeros.

    Each program has one cell and one block of channels.
    """
    cell = tl.program_id(0)
    x_ptr += (cell // (Hs * Ws)).to(tl.int64) * x_stride_b
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, h * w, BLOCK_P):
        q = start + tl.arange(0, BLOCK_P)
        row = cell // Ws % Hs * h + q // w
        col = cell % Ws * w + q % w
        is_inside = (q < h * w) & (row < H) & (col < W)
        at = row.to(INDEX) * x_stride_y + col.to(INDEX) * x_stride_x
        pixels = tl.load(
            x_ptr + (at[:, None] + (c.to(INDEX) * x_stride_c)[None, :]),
            mask=is_inside[:, None] & (c < C)[None, :],
            other=0.0,
        )
        total += tl.sum(pixels.to(tl.float32), axis=0)
    tl.store(tokens_ptr + cell.to(tl.int64) * C + c, total / (h * w), mask=c < C)


@triton.jit(do_not_specialize=SIZES)
def associate_and_aggregate_kernel(
    pixels_ptr,  # (B, C, H, W), any strides
    tokens_ptr,  # (B, Hs, Ws, C), contiguous; read if ASSOCIATES
    association_ptr,  # (B, 9, H, W), any strides; read unless ASSOCIATES, else written if WRITES_ASSOCIATION
    sums_ptr,  # (tiles, slots, C) float32, contiguous: weighted pixel sums of each tile; written if AGGREGATES
    weights_ptr,  # (tiles, slots) float32, contiguous: sums of the weights; written if AGGREGATES and IS_SOFTMAX
    H,
    W,
    Hs,
    Ws,
    C,
    pixels_stride_b,
    pixels_stride_c,
    pixels_stride_y,
    pixels_stride_x,
    association_stride_b,
    association_stride_k,
    association_stride_y,
    association_stride_x,
    scale,  # factor on the products before the softmax, which uses powers of 2
    h: tl.constexpr,
    w: tl.constexpr,
    TILE: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    IS_ONE_BLOCK: tl.constexpr,  # whether one block has all channels
    ASSOCIATES: tl.constexpr,  # computes the association; otherwise reads it
    IS_SOFTMAX: tl.constexpr,  # applies the softmax to the products of pixels and tokens
    WRITES_ASSOCIATION: tl.constexpr,
    AGGREGATES: tl.constexpr,  # sums the pixels, weighted by the association
    INDEX: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Associates and aggregates the pixels of a tile.

    Each program aggregates one block of channels. For the association, every program reads all channels.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    b, tile_y, tile_x = _find_tile(tile, Hs, Ws, TILE)
    token, is_token = _find_slots(b, tile_y, tile_x, Hs, Ws, TILE, SLOTS)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_first = _is_first_program(1)  # all programs of a tile compute the association; the first writes it
    pixels_ptr += b * pixels_stride_b
    association_ptr += b * association_stride_b
    total = tl.zeros((SLOTS, BLOCK_C), tl.float32)
    weight = tl.zeros((SLOTS,), tl.float32)
    for start in range(0, TILE * h * TILE * w, BLOCK_P):
        y, x, first, is_tile = _find_pixels(start, tile_y, tile_x, h, w, TILE, BLOCK_P)
        is_inside = is_tile & (y < H) & (x < W)
        entry, is_near = _find_neighbors(
            y, x, first, association_stride_k, association_stride_y, association_stride_x, TILE, SLOTS, INDEX
        )
        at = y.to(INDEX) * pixels_stride_y + x.to(INDEX) * pixels_stride_x
        is_entry = is_near & is_inside[:, None]
        if AGGREGATES or IS_ONE_BLOCK:
            block = tl.load(
                pixels_ptr + (at[:, None] + (c.to(INDEX) * pixels_stride_c)[None, :]),
                mask=is_inside[:, None] & (c < C)[None, :],
                other=0.0,
            ).to(COMPUTE)
        if ASSOCIATES:
            logits = tl.zeros((BLOCK_P, SLOTS), tl.float32)
            if IS_ONE_BLOCK:
                near = tl.load(
                    tokens_ptr + (token * C)[:, None] + c[None, :], mask=is_token[:, None] & (c < C)[None, :], other=0.0
                ).to(COMPUTE)
                logits = _dot(block, tl.trans(near), logits, PRECISION)
            else:
                for offset in range(0, C, BLOCK_C):
                    d = offset + tl.arange(0, BLOCK_C)
                    some = tl.load(
                        pixels_ptr + (at[:, None] + (d.to(INDEX) * pixels_stride_c)[None, :]),
                        mask=is_inside[:, None] & (d < C)[None, :],
                        other=0.0,
                    ).to(COMPUTE)
                    near = tl.load(
                        tokens_ptr + (token * C)[:, None] + d[None, :],
                        mask=is_token[:, None] & (d < C)[None, :],
                        other=0.0,
                    ).to(COMPUTE)
                    logits = _dot(some, tl.trans(near), logits, PRECISION)
            if IS_SOFTMAX:
                # Neighbors outside the grid and padding pixels are zeros. They count in the softmax.
                logits = tl.where(is_near, logits, -1e38)
                powers = tl.exp2(logits * scale - (tl.max(logits, axis=1) * scale)[:, None])
                is_cell = is_tile & (y < Hs * h) & (x < Ws * w)
                share = tl.where(is_cell, 1.0 / tl.sum(powers, axis=1), 0.0)
                weights = (powers * share[:, None]).to(COMPUTE)
            else:
                weights = logits
            if WRITES_ASSOCIATION:
                tl.store(association_ptr + entry, weights, mask=is_entry & is_first[:, None])
        else:
            weights = tl.load(association_ptr + entry, mask=is_entry, other=0.0).to(COMPUTE)
        if AGGREGATES:
            total = _dot(tl.trans(weights), block, total, PRECISION)
            if IS_SOFTMAX:
                weight += tl.sum(weights.to(tl.float32), axis=0)
    if AGGREGATES:
        slots: tl.constexpr = (TILE + 2) * (TILE + 2)
        part = tile.to(tl.int64) * slots + tl.arange(0, SLOTS)
        tl.store(sums_ptr + (part * C)[:, None] + c[None, :], total, mask=is_token[:, None] & (c < C)[None, :])
        if IS_SOFTMAX:
            tl.store(weights_ptr + part, weight, mask=is_token & is_first)


@triton.jit(do_not_specialize=[*SIZES, "count"])
def sum_tiles_kernel(
    tile_sums_ptr,  # (tiles, slots, C) float32, contiguous: weighted pixel sums of each tile
    tile_weights_ptr,  # (tiles, slots) float32, contiguous: sums of the weights; read if SUMS_WEIGHTS
    weights_ptr,  # (B, Hs, Ws) float32, contiguous; written if SUMS_WEIGHTS, read if READS_WEIGHTS
    tokens_ptr,  # (B, Hs, Ws, C), contiguous, output
    count,  # number of tokens, B * Hs * Ws
    Hs,
    Ws,
    C,
    TILE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SUMS_WEIGHTS: tl.constexpr,
    READS_WEIGHTS: tl.constexpr,
):
    """Finishes an aggregation: sums the partial sums of all tiles for each token.

    SUMS_WEIGHTS also sums the weights, writes them, and divides by them. READS_WEIGHTS divides by the given weights.
    """
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = token // Ws % Hs
    col = token % Ws
    b = (token // (Hs * Ws)).to(tl.int64)
    tiles_y = tl.cdiv(Hs, TILE)
    tiles_x = tl.cdiv(Ws, TILE)
    total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    weight = tl.zeros((BLOCK_T,), tl.float32)
    # A token gets sums from its own tile and, at the edge of a tile, from the adjacent tile along each axis.
    next_y = tl.where(row % TILE == TILE - 1, 1, -1)
    next_x = tl.where(col % TILE == TILE - 1, 1, -1)
    for dy in tl.static_range(2):
        for dx in tl.static_range(2):
            tile_y = row // TILE + dy * next_y
            tile_x = col // TILE + dx * next_x
            i = row - (tile_y * TILE - 1)
            j = col - (tile_x * TILE - 1)
            is_tile = (tile_y >= 0) & (tile_y < tiles_y) & (tile_x >= 0) & (tile_x < tiles_x)
            has_share = (token < count) & is_tile & (i >= 0) & (i < TILE + 2) & (j >= 0) & (j < TILE + 2)
            part = ((b * tiles_y + tile_y) * tiles_x + tile_x) * ((TILE + 2) * (TILE + 2)) + i * (TILE + 2) + j
            total += tl.load(
                tile_sums_ptr + (part * C)[:, None] + c[None, :], mask=has_share[:, None] & (c < C)[None, :], other=0.0
            )
            if SUMS_WEIGHTS:
                weight += tl.load(tile_weights_ptr + part, mask=has_share, other=0.0)
    if SUMS_WEIGHTS:
        weight += 1e-12
        tl.store(weights_ptr + token, weight, mask=(token < count) & _is_first_program(1))
    if READS_WEIGHTS:
        weight = tl.load(weights_ptr + token, mask=token < count, other=1.0)
    if SUMS_WEIGHTS or READS_WEIGHTS:
        total = total / weight[:, None]
    tl.store(
        tokens_ptr + (token.to(tl.int64) * C)[:, None] + c[None, :],
        total,
        mask=(token < count)[:, None] & (c < C)[None, :],
    )


@triton.jit(do_not_specialize=SIZES)
def upsample_kernel(
    tokens_ptr,  # (B, Hs, Ws, C), contiguous
    association_ptr,  # (B, 9, H, W), any strides
    weights_ptr,  # (B, Hs, Ws) float32, contiguous; read if READS_WEIGHTS
    residual_ptr,  # (B, H, W, C), contiguous; read if HAS_RESIDUAL
    scale_ptr,  # (B,), read if HAS_SCALE
    pixels_ptr,  # (B, H, W, C), contiguous, output
    H,
    W,
    Hs,
    Ws,
    C,
    association_stride_b,
    association_stride_k,
    association_stride_y,
    association_stride_x,
    h: tl.constexpr,
    w: tl.constexpr,
    TILE: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    READS_WEIGHTS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    INDEX: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Computes the weighted sum of the nine neighbor tokens for each pixel.

    READS_WEIGHTS divides each token by its weight. The sum is multiplied by the scale of the image. The residual is
    added. It may be the output tensor.
    """
    b, tile_y, tile_x = _find_tile(tl.program_id(0), Hs, Ws, TILE)
    token, is_token = _find_slots(b, tile_y, tile_x, Hs, Ws, TILE, SLOTS)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    association_ptr += b * association_stride_b
    pixels_ptr += b * H * W * C
    if HAS_RESIDUAL:
        residual_ptr += b * H * W * C
    near = tl.load(
        tokens_ptr + (token * C)[:, None] + c[None, :], mask=is_token[:, None] & (c < C)[None, :], other=0.0
    ).to(COMPUTE)
    if READS_WEIGHTS:
        # Cell size over weight is near 1, where float16 is precise. The cell size is divided out after the product.
        share = h * w / tl.load(weights_ptr + token, mask=is_token, other=1.0)
    for start in range(0, TILE * h * TILE * w, BLOCK_P):
        y, x, first, is_tile = _find_pixels(start, tile_y, tile_x, h, w, TILE, BLOCK_P)
        is_inside = is_tile & (y < H) & (x < W)
        entry, is_near = _find_neighbors(
            y, x, first, association_stride_k, association_stride_y, association_stride_x, TILE, SLOTS, INDEX
        )
        mix = tl.load(association_ptr + entry, mask=is_near & is_inside[:, None], other=0.0)
        if READS_WEIGHTS:
            mix = mix.to(tl.float32) * share[None, :]
        block = _dot(mix.to(COMPUTE), near, tl.zeros((BLOCK_P, BLOCK_C), tl.float32), PRECISION)
        if READS_WEIGHTS:
            block = block * (1.0 / (h * w))
        at = ((y.to(INDEX) * W + x) * C)[:, None] + c[None, :]
        mask = is_inside[:, None] & (c < C)[None, :]
        if HAS_SCALE:
            block = block * tl.load(scale_ptr + b).to(tl.float32)
        if HAS_RESIDUAL:
            block += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(pixels_ptr + at, block, mask=mask)


# ---------------------------------------------------------------------------------------------------------------------
# Launches. The functions `_prepare_*` compute what depends on the shapes. They run once for each shape.

IS_INTERPRETED = not isinstance(mean_kernel, triton.JITFunction)  # with TRITON_INTERPRET=1, on a CPU


def _tile(h: int, w: int, C: int, *dtypes: torch.dtype) -> dict[str, Any]:
    """Returns the constexprs of a tile and its blocks, and the number of warps.

    The values are not tuned at run time, because other blocks would change the order of the sums.

    Args:
        h: Height of a cell.
        w: Width of a cell.
        C: Number of channels.
        dtypes: Dtypes of the numbers in a block. The widest counts.
    """
    cells = 2 if h * w >= 16 else 4  # with 2x2 tiny cells, most of a block would be empty
    # Several blocks of pixels and tokens must fit into the shared memory of the smallest GPUs, 99 KiB per program.
    is_narrow = max(dtype.itemsize for dtype in dtypes) == 2
    if is_narrow:
        numbers, widest = 8192, 128
    else:
        numbers, widest = (4096, 128) if cells == 2 else (2048, 64)
    block_c = block_of_channels(C, widest)
    slots = next_power_of_2((cells + 2) ** 2)
    pixels = min(next_power_of_2(cells * h * cells * w), numbers // block_c, numbers // slots)
    return {
        "h": h,
        "w": w,
        "TILE": cells,
        "SLOTS": slots,
        "BLOCK_P": max(16, pixels),
        "BLOCK_C": block_c,
        "num_warps": 4 if is_narrow else 8,  # four would spill registers, as one float32 product is three in TF32
    }


class _Layout(NamedTuple):
    """Shape and strides of a map (B, C, H, W)."""

    shape: tuple[int, int, int, int]
    strides: tuple[int, int, int, int]

    @classmethod
    def of(cls, x: torch.Tensor) -> "_Layout":
        """Returns the layout of x."""
        return cls(x.shape, x.stride())  # type: ignore[arg-type]  # torch.Size is a tuple


def _index(*maps: _Layout | None) -> tl.dtype:
    """Returns the dtype of offsets in one image: int32, or int64 if necessary."""
    spans = (
        sum((size - 1) * stride for size, stride in zip(x.shape[1:], x.strides[1:], strict=True))
        for x in maps
        if x is not None
    )
    return tl.int32 if max(spans) < 2**31 else tl.int64


def _precision(dtype: torch.dtype) -> str:
    """Returns the precision of matrix products, for float32 from PyTorch's settings."""
    if IS_INTERPRETED:
        return "interpreted"
    if dtype != torch.float32:
        return "ieee"
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # also reflects the older function below
        allowed = torch.backends.cuda.matmul.fp32_precision
        allowed = torch.backends.fp32_precision if allowed == "none" else allowed  # type: ignore[attr-defined]
    else:
        allowed = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return "tf32" if allowed == "tf32" else "tf32x3"


def mean(x: torch.Tensor, h: int, w: int, blocks: Mapping[str, int] | None = None) -> torch.Tensor:
    """Returns the mean of each cell.

    Args:
        x: Pixels (B, C, H, W).
        h: Height of a cell.
        w: Width of a cell.
        blocks: `block_p`, `block_c` and `num_warps`, each optional, for measurements.

    Returns:
        Means (B, Hs, Ws, C).
    """
    shape, launch = _prepare_mean(_Layout.of(x), h, w, freeze(blocks))
    tokens = x.new_empty(shape)
    launch(x, tokens)
    return tokens


@once_per_shape
def _prepare_mean(x: _Layout, h: int, w: int, blocks: Blocks) -> tuple[tuple[int, int, int, int], Launch]:
    """Returns the shape of the means, and the launch."""
    B, C, H, W = x.shape
    Hs, Ws = cdiv(H, h), cdiv(W, w)
    chosen = dict(blocks)
    block_c = chosen.get("block_c", block_of_channels(C, 64))
    launch = Launch(
        mean_kernel,
        (B * Hs * Ws, cdiv(C, block_c)),
        *(H, W, Hs, Ws, C),
        *x.strides,
        h=h,
        w=w,
        BLOCK_P=chosen.get("block_p", min(next_power_of_2(h * w), 512 // block_c)),
        BLOCK_C=block_c,
        INDEX=_index(x),
        num_warps=chosen.get("num_warps", 1),
    )
    return (B, Hs, Ws, C), launch


def associate_and_aggregate(
    pixels: torch.Tensor,
    tokens: torch.Tensor,
    association: torch.Tensor | None,
    h: int,
    w: int,
    compute: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs one round of `reference.associate` and `reference.aggregate`.

    Args:
        pixels: Pixels (B, C, H, W).
        tokens: Super tokens before the round, (B, Hs, Ws, C).
        association: Output (B, 9, H, W); None if it is not needed.
        h: Height of a cell.
        w: Width of a cell.
        compute: Dtype of the products.

    Returns:
        Super tokens after the round, (B, Hs, Ws, C), and the sum of weights of each token, (B, Hs, Ws) float32.
    """
    return _launch(pixels, tokens, association, h, w, compute, is_softmax=True)


def associate(pixels: torch.Tensor, tokens: torch.Tensor, products: torch.Tensor, h: int, w: int) -> None:
    """Computes the scalar products of each pixel with its nine neighbor tokens.

    Unlike `reference.associate`, this function applies no scale and no softmax.

    Args:
        pixels: Pixels (B, C, H, W).
        tokens: Super tokens (B, Hs, Ws, C).
        products: Output (B, 9, H, W).
        h: Height of a cell.
        w: Width of a cell.
    """
    _launch(pixels, tokens, products, h, w, pixels.dtype, aggregates=False)


def aggregate(
    pixels: torch.Tensor,
    association: torch.Tensor,
    weights: torch.Tensor | None,
    h: int,
    w: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Returns the association-weighted sums of pixels for each token, (B, Hs, Ws, C).

    Args:
        pixels: Pixels (B, C, H, W).
        association: Association (B, 9, H, W).
        weights: Divisor of each token, (B, Hs, Ws) float32; None for plain sums.
        h: Height of a cell.
        w: Width of a cell.
        dtype: Dtype of the result.
    """
    return _launch(pixels, None, association, h, w, pixels.dtype, weights=weights, dtype=dtype)[0]


class _Pass(NamedTuple):
    """One pass over the tiles: two launches and the shapes of what they write."""

    tile_sums: tuple[int, int, int]
    tile_weights: tuple[int, int]
    weights: tuple[int, ...]
    sums: tuple[int, int, int, int]
    process_tiles: Launch
    sum_tiles: Launch


def _launch(
    pixels: torch.Tensor,
    tokens: torch.Tensor | None,
    association: torch.Tensor | None,
    h: int,
    w: int,
    compute: torch.dtype,
    is_softmax: bool = False,
    aggregates: bool = True,
    weights: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launches `associate_and_aggregate_kernel` and, if needed, `sum_tiles_kernel`.

    Args:
        pixels: Pixels (B, C, H, W).
        tokens: Super tokens (B, Hs, Ws, C) to associate the pixels with; None to read the association.
        association: Association (B, 9, H, W), read without `tokens` and written with them; None to write nothing.
        h: Height of a cell.
        w: Width of a cell.
        compute: Dtype of the products.
        is_softmax: Whether to apply scale and softmax, and to divide the sums by the weights.
        aggregates: Whether to sum the pixels.
        weights: Divisor of each token, (B, Hs, Ws) float32; None for plain sums, or with `is_softmax`.
        dtype: Dtype of the sums; None for that of the pixels.

    Returns:
        Sums or means (B, Hs, Ws, C) and weights (B, Hs, Ws). Both are empty without `aggregates`.
    """
    layout = None if association is None else _Layout.of(association)
    has_tokens, reads_weights = tokens is not None, weights is not None
    prepared = _prepare_pass(
        *(_Layout.of(pixels), layout, h, w, pixels.dtype, compute, _precision(compute)),
        *(has_tokens, is_softmax, aggregates, reads_weights),
    )
    tile_sums = pixels.new_empty(prepared.tile_sums, dtype=torch.float32)
    tile_weights = pixels.new_empty(prepared.tile_weights, dtype=torch.float32)
    prepared.process_tiles(
        pixels,
        pixels if tokens is None else tokens,
        pixels if association is None else association,
        tile_sums,
        tile_weights,
    )
    sums = pixels.new_empty(prepared.sums, dtype=dtype) if aggregates else tile_sums
    if weights is None:
        weights = pixels.new_empty(prepared.weights, dtype=torch.float32)
    if aggregates:
        prepared.sum_tiles(tile_sums, tile_weights, weights, sums)
    return sums, weights


@once_per_shape
def _prepare_pass(
    pixels: _Layout,
    association: _Layout | None,
    h: int,
    w: int,
    dtype: torch.dtype,
    compute: torch.dtype,
    precision: str,
    has_tokens: bool,
    is_softmax: bool,
    aggregates: bool,
    reads_weights: bool,
) -> _Pass:
    """Returns the launches of `_launch`. `dtype` is that of the pixels."""
    B, C, H, W = pixels.shape
    Hs, Ws = cdiv(H, h), cdiv(W, w)
    tile = _tile(h, w, C, dtype, compute)
    cells, block_c = tile["TILE"], tile["BLOCK_C"]
    tiles = B * cdiv(Hs, cells) * cdiv(Ws, cells)
    slots = (cells + 2) ** 2
    blocks = cdiv(C, block_c)
    process_tiles = Launch(
        associate_and_aggregate_kernel,
        (tiles, blocks if aggregates else 1),
        *(H, W, Hs, Ws, C),
        *pixels.strides,
        *((0, 0, 0, 0) if association is None else association.strides),
        C**-0.5 / math.log(2),
        **tile,
        IS_ONE_BLOCK=blocks == 1,
        ASSOCIATES=has_tokens,
        IS_SOFTMAX=is_softmax,
        WRITES_ASSOCIATION=has_tokens and association is not None,
        AGGREGATES=aggregates,
        INDEX=_index(pixels, association),
        COMPUTE=DTYPES[compute],
        PRECISION=precision,
    )
    block_t = max(1, 2048 // block_c)
    sum_tiles = Launch(
        sum_tiles_kernel,
        (cdiv(B * Hs * Ws, block_t), blocks),
        *(B * Hs * Ws, Hs, Ws, C),
        TILE=cells,
        BLOCK_T=block_t,
        BLOCK_C=block_c,
        SUMS_WEIGHTS=is_softmax,
        READS_WEIGHTS=reads_weights,
    )
    return _Pass(
        tile_sums=(tiles if aggregates else 0, slots, C),
        tile_weights=(tiles if is_softmax else 0, slots),
        weights=(B, Hs, Ws) if is_softmax else (0,),
        sums=(B, Hs, Ws, C),
        process_tiles=process_tiles,
        sum_tiles=sum_tiles,
    )


def upsample(
    tokens: torch.Tensor,
    association: torch.Tensor,
    weights: torch.Tensor | None,
    pixels: torch.Tensor,
    h: int,
    w: int,
    residual: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
) -> None:
    """Computes residual + scale * (weighted sum of nine tokens) for each pixel.

    Args:
        tokens: Super tokens (B, Hs, Ws, C).
        association: Association (B, 9, H, W).
        weights: Divisor of each token, (B, Hs, Ws) float32; None for no division.
        pixels: Output (B, C, H, W), channels_last.
        h: Height of a cell.
        w: Width of a cell.
        residual: Map (B, H, W, C), contiguous, which may share its memory with `pixels`; None for zero.
        scale: Factor of each image, (B,); None for one.
    """
    has_weights, has_residual, has_scale = weights is not None, residual is not None, scale is not None
    launch = _prepare_upsample(
        *(_Layout.of(pixels), _Layout.of(association), h, w, pixels.dtype, tokens.dtype, _precision(tokens.dtype)),
        *(has_weights, has_residual, has_scale),
    )
    launch(
        tokens,
        association,
        tokens if weights is None else weights,
        tokens if residual is None else residual,
        tokens if scale is None else scale,
        pixels,
    )


@once_per_shape
def _prepare_upsample(
    pixels: _Layout,
    association: _Layout,
    h: int,
    w: int,
    dtype: torch.dtype,
    compute: torch.dtype,
    precision: str,
    has_weights: bool,
    has_residual: bool,
    has_scale: bool,
) -> Launch:
    """Returns the launch of `upsample`.

    `dtype` is that of the pixels, and `compute` that of the tokens.
    """
    B, C, H, W = pixels.shape
    Hs, Ws = cdiv(H, h), cdiv(W, w)
    tile = _tile(h, w, C, compute, dtype)
    return Launch(
        upsample_kernel,
        (B * cdiv(Hs, tile["TILE"]) * cdiv(Ws, tile["TILE"]), cdiv(C, tile["BLOCK_C"])),
        *(H, W, Hs, Ws, C),
        *association.strides,
        **tile,
        READS_WEIGHTS=has_weights,
        HAS_RESIDUAL=has_residual,
        HAS_SCALE=has_scale,
        INDEX=_index(pixels, association),
        COMPUTE=DTYPES[compute],
        PRECISION=precision,
    )


def check_driver() -> None:
    """Checks that Triton finds a GPU.

    Without a driver or a C compiler, Triton raises exceptions of any type.
    """
    triton.runtime.driver.active.get_current_target()

"""The kernels of stvit/ops/triton.py, and their launches. Nothing else imports Triton.

A program works on a tile of cells: with 2x2 cells, the 4x4 super tokens in and around them are as many as the matrix
units' smallest block. One product compares a block of the tile's pixels with all of them, and a mask keeps the nine
that are each pixel's own. Neighbors are gathered, padding is added and sums are made in registers; through memory go,
besides what comes in and out, the sums that a tile owes to the tokens around it.

Every sum has one order, so that two runs are equal: there are no atomic additions.

Shapes: as in stvit/ops/reference.py, and
    S        slots: the super tokens in and around a tile, row by row, and on to a power of two
    P, C     in a kernel: a block of a tile's pixels, and of the channels
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from typing import Any

import torch
import triton
import triton.language as tl

__all__ = ["IS_INTERPRETED", "check_driver", "group", "mean", "upsample"]

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
SIZES = ["H", "W", "Hs", "Ws"]  # one kernel for all


@triton.jit
def _find_tile(program, Hs, Ws, TILE: tl.constexpr):
    """Image, and row and column of its tile."""
    tiles_y = tl.cdiv(Hs, TILE)
    tiles_x = tl.cdiv(Ws, TILE)
    return (program // (tiles_x * tiles_y)).to(tl.int64), (program // tiles_x) % tiles_y, program % tiles_x


@triton.jit
def _find_slots(b, tile_y, tile_x, Hs, Ws, TILE: tl.constexpr, SLOTS: tl.constexpr):
    """Of each slot its number among all tokens, and whether there is such a token, (S,)."""
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
    """Of a block of a tile's pixels row, column, the slot of the first neighbor, and whether it is the tile's, (P,)."""
    q = start + tl.arange(0, BLOCK_P)
    y = q // (TILE * w)
    x = q % (TILE * w)
    first = y // h * (TILE + 2) + x // w
    return tile_y * (TILE * h) + y, tile_x * (TILE * w) + x, first, y < TILE * h


@triton.jit
def _find_weights(
    y, x, first, stride_k, stride_y, stride_x, TILE: tl.constexpr, SLOTS: tl.constexpr, INDEX: tl.constexpr
):
    """Where in the association of an image a pixel's weight for each slot is, and whether it is a neighbor, (P, S)."""
    ahead = (tl.arange(0, SLOTS)[None, :] - first[:, None]).to(tl.uint32)  # before the first: more than there are slots
    down = ahead // (TILE + 2)
    k = ahead - down * (TILE - 1)
    at = y.to(INDEX) * stride_y + x.to(INDEX) * stride_x
    return at[:, None] + k.to(INDEX) * stride_k, (down <= 2) & (ahead % (TILE + 2) <= 2)


@triton.jit
def _is_first_program(AXIS: tl.constexpr):
    """Returns whether this program is the first of its axis, (1,), to combine with masks.

    Compares a block, not a scalar: Triton 3.9 interprets a scalar comparison as an integer and rejects it in a mask.
    """
    return tl.full((1,), tl.program_id(AXIS), tl.int32) == 0


@triton.jit
def _dot(a, b, total, PRECISION: tl.constexpr):
    """total + a @ b, in float32 from the dtype of the two."""
    if PRECISION == "interpreted":  # which multiplies the bits of bfloat16
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    else:
        return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit(do_not_specialize=SIZES)
def mean_kernel(
    x,
    tokens,  # (B, Hs, Ws, C), contiguous
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
    """The means of the cells, padding zeros counted: one cell a program."""
    cell = tl.program_id(0)
    x += (cell // (Hs * Ws)).to(tl.int64) * x_stride_b
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, h * w, BLOCK_P):
        q = start + tl.arange(0, BLOCK_P)
        row = cell // Ws % Hs * h + q // w
        col = cell % Ws * w + q % w
        is_inside = (q < h * w) & (row < H) & (col < W)
        at = row.to(INDEX) * x_stride_y + col.to(INDEX) * x_stride_x
        pixels = tl.load(
            x + (at[:, None] + (c.to(INDEX) * x_stride_c)[None, :]),
            mask=is_inside[:, None] & (c < C)[None, :],
            other=0.0,
        )
        total += tl.sum(pixels.to(tl.float32), axis=0)
    tl.store(tokens + cell.to(tl.int64) * C + c, total / (h * w), mask=c < C)


@triton.jit(do_not_specialize=SIZES)
def group_kernel(
    pixels,
    tokens,  # (B, Hs, Ws, C), contiguous; not read if READS_ASSOCIATION
    association,  # (B, 9, H, W)
    parts,  # (tiles, slots, C) float32, contiguous: each tile's share of the token sums
    part_weights,  # (tiles, slots) float32: each tile's share of the token weights
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
    scale,  # multiplies the scalar products; the softmax uses powers of 2
    h: tl.constexpr,
    w: tl.constexpr,
    TILE: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    IS_ONE_BLOCK: tl.constexpr,  # one block holds all channels
    READS_ASSOCIATION: tl.constexpr,
    IS_SOFTMAX: tl.constexpr,
    WRITES_ASSOCIATION: tl.constexpr,
    SUMS: tl.constexpr,
    INDEX: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Computes or reads the association of a tile's pixels with its tokens, and sums the pixels weighted by it.

    Each program of a tile sums one block of channels. Each of them compares all channels.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    b, tile_y, tile_x = _find_tile(tile, Hs, Ws, TILE)
    token, is_token = _find_slots(b, tile_y, tile_x, Hs, Ws, TILE, SLOTS)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_first = _is_first_program(1)  # writes the results that all programs of a tile compute
    pixels += b * pixels_stride_b
    association += b * association_stride_b
    total = tl.zeros((SLOTS, BLOCK_C), tl.float32)
    weight = tl.zeros((SLOTS,), tl.float32)
    for start in range(0, TILE * h * TILE * w, BLOCK_P):
        y, x, first, is_tile = _find_pixels(start, tile_y, tile_x, h, w, TILE, BLOCK_P)
        is_inside = is_tile & (y < H) & (x < W)
        weights_at, is_near = _find_weights(
            y, x, first, association_stride_k, association_stride_y, association_stride_x, TILE, SLOTS, INDEX
        )
        at = y.to(INDEX) * pixels_stride_y + x.to(INDEX) * pixels_stride_x
        is_weight = is_near & is_inside[:, None]
        if SUMS or IS_ONE_BLOCK:
            block = tl.load(
                pixels + (at[:, None] + (c.to(INDEX) * pixels_stride_c)[None, :]),
                mask=is_inside[:, None] & (c < C)[None, :],
                other=0.0,
            ).to(COMPUTE)
        if READS_ASSOCIATION:
            weights = tl.load(association + weights_at, mask=is_weight, other=0.0).to(COMPUTE)
        else:
            logits = tl.zeros((BLOCK_P, SLOTS), tl.float32)
            if IS_ONE_BLOCK:
                near = tl.load(
                    tokens + (token * C)[:, None] + c[None, :], mask=is_token[:, None] & (c < C)[None, :], other=0.0
                ).to(COMPUTE)
                logits = _dot(block, tl.trans(near), logits, PRECISION)
            else:
                for offset in range(0, C, BLOCK_C):
                    d = offset + tl.arange(0, BLOCK_C)
                    some = tl.load(
                        pixels + (at[:, None] + (d.to(INDEX) * pixels_stride_c)[None, :]),
                        mask=is_inside[:, None] & (d < C)[None, :],
                        other=0.0,
                    ).to(COMPUTE)
                    near = tl.load(
                        tokens + (token * C)[:, None] + d[None, :], mask=is_token[:, None] & (d < C)[None, :], other=0.0
                    ).to(COMPUTE)
                    logits = _dot(some, tl.trans(near), logits, PRECISION)
            if IS_SOFTMAX:
                # Neighbors outside the grid and padding pixels are zeros, and they count in the softmax.
                logits = tl.where(is_near, logits, -1e38)
                powers = tl.exp2(logits * scale - (tl.max(logits, axis=1) * scale)[:, None])
                is_cell = is_tile & (y < Hs * h) & (x < Ws * w)
                share = tl.where(is_cell, 1.0 / tl.sum(powers, axis=1), 0.0)
                weights = (powers * share[:, None]).to(COMPUTE)
            else:
                weights = logits
            if WRITES_ASSOCIATION:
                tl.store(association + weights_at, weights, mask=is_weight & is_first[:, None])
        if SUMS:
            total = _dot(tl.trans(weights), block, total, PRECISION)
            if IS_SOFTMAX:
                weight += tl.sum(weights.to(tl.float32), axis=0)
    if SUMS:
        slots: tl.constexpr = (TILE + 2) * (TILE + 2)
        part = tile.to(tl.int64) * slots + tl.arange(0, SLOTS)
        tl.store(parts + (part * C)[:, None] + c[None, :], total, mask=is_token[:, None] & (c < C)[None, :])
        if IS_SOFTMAX:
            tl.store(part_weights + part, weight, mask=is_token & is_first)


@triton.jit(do_not_specialize=[*SIZES, "count"])
def finish_kernel(
    parts,
    part_weights,
    weights,  # (B, Hs, Ws) float32, contiguous
    tokens,  # (B, Hs, Ws, C), contiguous
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
    """Sums the tiles' shares of each token.

    SUMS_WEIGHTS sums the weights too, writes them and divides by them. READS_WEIGHTS divides by the given weights.
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
    # A token gets shares from its own tile and, at the edge of a tile, from the next tile of each axis.
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
                parts + (part * C)[:, None] + c[None, :], mask=has_share[:, None] & (c < C)[None, :], other=0.0
            )
            if SUMS_WEIGHTS:
                weight += tl.load(part_weights + part, mask=has_share, other=0.0)
    if SUMS_WEIGHTS:
        weight += 1e-12
        tl.store(weights + token, weight, mask=(token < count) & _is_first_program(1))
    if READS_WEIGHTS:
        weight = tl.load(weights + token, mask=token < count, other=1.0)
    if SUMS_WEIGHTS or READS_WEIGHTS:
        total = total / weight[:, None]
    tl.store(
        tokens + (token.to(tl.int64) * C)[:, None] + c[None, :], total, mask=(token < count)[:, None] & (c < C)[None, :]
    )


@triton.jit(do_not_specialize=SIZES)
def upsample_kernel(
    tokens,  # (B, Hs, Ws, C), contiguous
    association,
    weights,  # (B, Hs, Ws) float32, contiguous
    pixels,  # (B, H, W, C), contiguous
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
    INDEX: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The association-weighted sums of the tokens, each of them divided by its weight if there is one."""
    b, tile_y, tile_x = _find_tile(tl.program_id(0), Hs, Ws, TILE)
    token, is_token = _find_slots(b, tile_y, tile_x, Hs, Ws, TILE, SLOTS)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    association += b * association_stride_b
    pixels += b * H * W * C
    near = tl.load(tokens + (token * C)[:, None] + c[None, :], mask=is_token[:, None] & (c < C)[None, :], other=0.0).to(
        COMPUTE
    )
    if READS_WEIGHTS:
        # A cell's pixels over the weight is near 1, where float16 is good; they are taken out of the product.
        share = h * w / tl.load(weights + token, mask=is_token, other=1.0)
    for start in range(0, TILE * h * TILE * w, BLOCK_P):
        y, x, first, is_tile = _find_pixels(start, tile_y, tile_x, h, w, TILE, BLOCK_P)
        is_inside = is_tile & (y < H) & (x < W)
        mix_at, is_near = _find_weights(
            y, x, first, association_stride_k, association_stride_y, association_stride_x, TILE, SLOTS, INDEX
        )
        mix = tl.load(association + mix_at, mask=is_near & is_inside[:, None], other=0.0)
        if READS_WEIGHTS:
            mix = mix.to(tl.float32) * share[None, :]
        block = _dot(mix.to(COMPUTE), near, tl.zeros((BLOCK_P, BLOCK_C), tl.float32), PRECISION)
        if READS_WEIGHTS:
            block = block * (1.0 / (h * w))
        tl.store(
            pixels + (((y.to(INDEX) * W + x) * C)[:, None] + c[None, :]),
            block,
            mask=is_inside[:, None] & (c < C)[None, :],
        )


# ---------------------------------------------------------------------------------------------------------------------
# Launches

IS_INTERPRETED = not isinstance(mean_kernel, triton.JITFunction)  # by TRITON_INTERPRET=1, on a CPU


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
    block_c = _block_of_channels(C, widest)
    slots = triton.next_power_of_2((cells + 2) ** 2)
    pixels = min(triton.next_power_of_2(cells * h * cells * w), numbers // block_c, numbers // slots)
    return {
        "h": h,
        "w": w,
        "TILE": cells,
        "SLOTS": slots,
        "BLOCK_P": max(16, pixels),
        "BLOCK_C": block_c,
        "num_warps": 4 if is_narrow else 8,  # four would spill registers: three products stand for one
    }


def _block_of_channels(C: int, widest: int) -> int:
    return min(max(16, triton.next_power_of_2(C)), widest)


def _index(*tensors: torch.Tensor | None) -> tl.dtype:
    """The integers that count the numbers of one image; 64 bits cost time."""
    spans = (
        sum((size - 1) * stride for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True))
        for x in tensors
        if x is not None
    )
    return tl.int32 if max(spans) < 2**31 else tl.int64


def _precision(dtype: torch.dtype) -> str:
    """How matrices of a dtype are multiplied: float32 with all bits, unless PyTorch is allowed fewer for its own."""
    if IS_INTERPRETED:
        return "interpreted"
    if dtype != torch.float32:
        return "ieee"
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # which also knows what the older function has set
        allowed = torch.backends.cuda.matmul.fp32_precision
        allowed = torch.backends.fp32_precision if allowed == "none" else allowed  # type: ignore[attr-defined]
    else:
        allowed = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return "tf32" if allowed == "tf32" else "tf32x3"


def _on_its_device(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device, whatever its arguments are on."""

    @wraps(launch)
    def launch_there(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
            return launch(x, *args, **kwargs)

    return launch_there


@_on_its_device
def mean(x: torch.Tensor, h: int, w: int) -> torch.Tensor:
    """The means of the cells, (B, Hs, Ws, C)."""
    B, C, H, W = x.shape
    Hs, Ws = triton.cdiv(H, h), triton.cdiv(W, w)
    tokens = x.new_empty(B, Hs, Ws, C)
    block_c = _block_of_channels(C, 128)
    block_p = max(1, min(triton.next_power_of_2(h * w), 8192 // block_c))
    grid = (B * Hs * Ws, triton.cdiv(C, block_c))
    mean_kernel[grid](
        x, tokens, H, W, Hs, Ws, C, *x.stride(), h=h, w=w, BLOCK_P=block_p, BLOCK_C=block_c, INDEX=_index(x)
    )
    return tokens


@_on_its_device
def group(
    pixels: torch.Tensor,
    tokens: torch.Tensor | None,
    association: torch.Tensor | None,
    h: int,
    w: int,
    compute: torch.dtype,
    is_softmax: bool = False,
    sums: bool = True,
    weights: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compares pixels (B, C, H, W) with tokens (B, Hs, Ws, C), or without tokens reads the association; and sums them.

    Returns:
        The weighted sums (B, Hs, Ws, C) of that dtype: means with `is_softmax`, or divided by the weights given; and
        the weights (B, Hs, Ws). Without `sums`, both are empty.
    """
    B, C, H, W = pixels.shape
    Hs, Ws = triton.cdiv(H, h), triton.cdiv(W, w)
    tile = _tile(h, w, C, pixels.dtype, compute)
    cells, block_c = tile["TILE"], tile["BLOCK_C"]
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
        READS_ASSOCIATION=tokens is None,
        IS_SOFTMAX=is_softmax,
        WRITES_ASSOCIATION=tokens is not None and association is not None,
        SUMS=sums,
        INDEX=_index(pixels, association),
        COMPUTE=DTYPES[compute],
        PRECISION=_precision(compute),
    )
    summed = pixels.new_empty(B, Hs, Ws, C, dtype=dtype) if sums else parts
    reads_weights = weights is not None
    if weights is None:
        weights = pixels.new_empty((B, Hs, Ws) if is_softmax else 0, dtype=torch.float32)
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
            TILE=cells,
            BLOCK_T=block_t,
            BLOCK_C=block_c,
            SUMS_WEIGHTS=is_softmax,
            READS_WEIGHTS=reads_weights,
        )
    return summed, weights


@_on_its_device
def upsample(
    tokens: torch.Tensor, association: torch.Tensor, weights: torch.Tensor | None, pixels: torch.Tensor, h: int, w: int
) -> None:
    """Mixes tokens (B, Hs, Ws, C), over their weights (B, Hs, Ws) if given, into pixels (B, C, H, W)."""
    B, C, H, W = pixels.shape
    Hs, Ws = tokens.shape[1:3]
    tile = _tile(h, w, C, tokens.dtype, pixels.dtype)
    grid = (B * triton.cdiv(Hs, tile["TILE"]) * triton.cdiv(Ws, tile["TILE"]), triton.cdiv(C, tile["BLOCK_C"]))
    upsample_kernel[grid](
        tokens,
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
        PRECISION=_precision(tokens.dtype),
    )


def check_driver() -> None:
    """Asks Triton for the GPU that it compiles for; raises what Triton does without a driver or a C compiler."""
    triton.runtime.driver.active.get_current_target()

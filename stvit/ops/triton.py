"""Super token sampling and upsampling in Triton: what the reference computes, with fewer bytes moved.

Source: "Vision Transformer with Super Token Sampling", https://arxiv.org/abs/2211.11167, sections 3.2 and 3.3. Imported
only when it is chosen: see stvit/ops/backends.py.

A program works on a tile of cells, the 4x4 super tokens around whose 2x2 cells are as many as the matrix units' smallest
block: one product compares the tile's pixels with all of them, and a mask keeps the nine that are each pixel's own.

Bytes: sampling reads x for the cells' means and once more for the association, last tile first, so that what the
first reading left in the cache is met again. The association is kept, in the dtype that is computed in: nine numbers
a pixel, where computing it again for upsampling and for each backward would read all C of its channels. Neighbors are
gathered, padding is added and partial sums are made in registers. What goes through memory besides are the sums that
a tile owes to the tokens around it, one float32 for each of its tokens and channels.

Every sum has one order, so that two runs are equal; there are no atomic additions.

Autograd: the three functions upsample, aggregate and compare are the partial derivatives of one form,
sum over pixels p and their neighbors k of association[p, k] * <tokens[k], pixels[p]>,
and therefore each other's backward, as often as one likes to differentiate.

Shapes: as in stvit/ops/reference.py, and
    S        slots: the super tokens in and around a tile, row by row, and on to a power of two
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl

__all__ = ["sample_super_tokens", "upsample_super_tokens"]

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

# ---------------------------------------------------------------------------------------------------------------------
# Kernels


@triton.jit
def _find_tile(program, Hs, Ws, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """Image, and row and column of its tile."""
    tiles_y = tl.cdiv(Hs, TILE_H)
    tiles_x = tl.cdiv(Ws, TILE_W)
    return (program // (tiles_x * tiles_y)).to(tl.int64), (program // tiles_x) % tiles_y, program % tiles_x


@triton.jit
def _find_slots(b, tile_y, tile_x, Hs, Ws, TILE_H: tl.constexpr, TILE_W: tl.constexpr, SLOTS: tl.constexpr):
    """Row and column of each slot in the tile, its number among all tokens, and whether there is such a token, (S,)."""
    slot = tl.arange(0, SLOTS)
    i = slot // (TILE_W + 2)
    j = slot % (TILE_W + 2)
    row = tile_y * TILE_H - 1 + i
    col = tile_x * TILE_W - 1 + j
    is_token = (i < TILE_H + 2) & (row >= 0) & (row < Hs) & (col >= 0) & (col < Ws)
    return i, j, (b * Hs + row) * Ws + col, is_token


@triton.jit
def _find_neighbors(
    q, i, j, H, W, tile_y, tile_x, h: tl.constexpr, w: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr
):
    """Row, column and presence of a tile's pixels, (P,), and which neighbor of each a slot is, and whether, (P, S)."""
    y = q // (TILE_W * w)
    x = q % (TILE_W * w)
    di = i[None, :] - (y // h)[:, None]
    dj = j[None, :] - (x // w)[:, None]
    is_near = (di >= 0) & (di <= 2) & (dj >= 0) & (dj <= 2) & (y < TILE_H * h)[:, None]
    row = tile_y * (TILE_H * h) + y
    col = tile_x * (TILE_W * w) + x
    is_inside = (y < TILE_H * h) & (row < H) & (col < W)
    return row.to(tl.int64), col.to(tl.int64), is_inside, 3 * di + dj, is_near


@triton.jit
def _dot(a, b, total, PRECISION: tl.constexpr):
    """total + a @ b, in float32 from the dtype of the two."""
    if PRECISION == "interpreted":  # which multiplies the bits of bfloat16
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    else:
        return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def _mean_kernel(
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
):
    """The means of the cells, padding zeros counted: one cell a program."""
    cell = tl.program_id(0)
    b = (cell // (Hs * Ws)).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C).to(tl.int64)
    total = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, h * w, BLOCK_P):
        q = start + tl.arange(0, BLOCK_P)
        row = (cell // Ws % Hs * h + q // w).to(tl.int64)
        col = (cell % Ws * w + q % w).to(tl.int64)
        is_inside = (q < h * w) & (row < H) & (col < W)
        offset = b * x_stride_b + row * x_stride_y + col * x_stride_x
        pixels = tl.load(
            x + offset[:, None] + (c * x_stride_c)[None, :], mask=is_inside[:, None] & (c < C)[None, :], other=0.0
        )
        total += tl.sum(pixels.to(tl.float32), axis=0)
    tl.store(tokens + cell.to(tl.int64) * C + c, total / (h * w), mask=c < C)


@triton.jit
def _group_kernel(
    pixels,
    tokens,  # (B, Hs, Ws, C), contiguous; not read where the association is
    association,
    parts,  # (tiles, slots, C) float32, contiguous: what the tile owes to each token
    part_weights,  # (tiles, slots) float32
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
    scale,
    h: tl.constexpr,
    w: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    IS_ONE_BLOCK: tl.constexpr,  # of channels
    READS_ASSOCIATION: tl.constexpr,
    IS_SOFTMAX: tl.constexpr,
    WRITES_ASSOCIATION: tl.constexpr,
    SUMS: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The association of a tile's pixels with its tokens, read or computed, and the sums of pixels that it weighs.

    Programs of one tile differ in the channels that they sum; what they compare are all.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    b, tile_y, tile_x = _find_tile(tile, Hs, Ws, TILE_H, TILE_W)
    i, j, token, is_token = _find_slots(b, tile_y, tile_x, Hs, Ws, TILE_H, TILE_W, SLOTS)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C).to(tl.int64)
    total = tl.zeros((SLOTS, BLOCK_C), tl.float32)
    weight = tl.zeros((SLOTS,), tl.float32)
    for start in range(0, TILE_H * h * TILE_W * w, BLOCK_P):
        q = start + tl.arange(0, BLOCK_P)
        row, col, is_inside, k, is_near = _find_neighbors(q, i, j, H, W, tile_y, tile_x, h, w, TILE_H, TILE_W)
        offset = b * pixels_stride_b + row * pixels_stride_y + col * pixels_stride_x
        weights_at = association + (
            (b * association_stride_b + row * association_stride_y + col * association_stride_x)[:, None]
            + k.to(tl.int64) * association_stride_k
        )
        is_weight = is_near & is_inside[:, None]
        if SUMS or IS_ONE_BLOCK:
            block = tl.load(
                pixels + offset[:, None] + (c * pixels_stride_c)[None, :],
                mask=is_inside[:, None] & (c < C)[None, :],
                other=0.0,
            ).to(COMPUTE)
        if READS_ASSOCIATION:
            weights = tl.load(weights_at, mask=is_weight, other=0.0).to(COMPUTE)
        else:
            if IS_ONE_BLOCK:
                near = tl.load(
                    tokens + (token * C)[:, None] + c[None, :], mask=is_token[:, None] & (c < C)[None, :], other=0.0
                ).to(COMPUTE)
                logits = _dot(block, tl.trans(near), tl.zeros((BLOCK_P, SLOTS), tl.float32), PRECISION)
            else:
                logits = tl.zeros((BLOCK_P, SLOTS), tl.float32)
                for first in range(0, C, BLOCK_C):
                    d = first + tl.arange(0, BLOCK_C).to(tl.int64)
                    some = tl.load(
                        pixels + offset[:, None] + (d * pixels_stride_c)[None, :],
                        mask=is_inside[:, None] & (d < C)[None, :],
                        other=0.0,
                    ).to(COMPUTE)
                    near = tl.load(
                        tokens + (token * C)[:, None] + d[None, :], mask=is_token[:, None] & (d < C)[None, :], other=0.0
                    ).to(COMPUTE)
                    logits = _dot(some, tl.trans(near), logits, PRECISION)
            if IS_SOFTMAX:
                # Zeros stand for neighbors outside the grid, and for padding pixels: both take part.
                logits = tl.where(is_near, logits * scale, -1e38)
                weights = tl.exp(logits - tl.max(logits, axis=1)[:, None])
                weights = weights / tl.sum(weights, axis=1)[:, None]
                is_cell = (row < Hs * h) & (col < Ws * w)
                weights = tl.where(is_near & is_cell[:, None], weights, 0.0).to(COMPUTE)
            else:
                weights = logits
            if WRITES_ASSOCIATION:
                tl.store(weights_at, weights, mask=is_weight & (tl.program_id(1) == 0))
        if SUMS:
            total = _dot(tl.trans(weights), block, total, PRECISION)
            if IS_SOFTMAX:
                weight += tl.sum(weights.to(tl.float32), axis=0)
    if SUMS:
        slots: tl.constexpr = (TILE_H + 2) * (TILE_W + 2)
        part = tile.to(tl.int64) * slots + tl.arange(0, SLOTS)
        tl.store(parts + (part * C)[:, None] + c[None, :], total, mask=is_token[:, None] & (c < C)[None, :])
        if IS_SOFTMAX:
            tl.store(part_weights + part, weight, mask=is_token & (tl.program_id(1) == 0))


@triton.jit
def _finish_kernel(
    parts,
    part_weights,
    weights,  # (B, Hs, Ws) float32, contiguous
    tokens,  # (B, Hs, Ws, C), contiguous
    count,  # of tokens
    Hs,
    Ws,
    C,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SUMS_WEIGHTS: tl.constexpr,
    READS_WEIGHTS: tl.constexpr,
):
    """What the tiles owe to each token, summed; divided by the sum of weights, which is written, or by those given."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = token // Ws % Hs
    col = token % Ws
    b = (token // (Hs * Ws)).to(tl.int64)
    tiles_y = tl.cdiv(Hs, TILE_H)
    tiles_x = tl.cdiv(Ws, TILE_W)
    total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    weight = tl.zeros((BLOCK_T,), tl.float32)
    for dy in tl.static_range(-1, 2):
        for dx in tl.static_range(-1, 2):
            tile_y = row // TILE_H + dy
            tile_x = col // TILE_W + dx
            i = row - (tile_y * TILE_H - 1)
            j = col - (tile_x * TILE_W - 1)
            is_tile = (tile_y >= 0) & (tile_y < tiles_y) & (tile_x >= 0) & (tile_x < tiles_x)
            owes = (token < count) & is_tile & (i >= 0) & (i < TILE_H + 2) & (j >= 0) & (j < TILE_W + 2)
            part = ((b * tiles_y + tile_y) * tiles_x + tile_x) * ((TILE_H + 2) * (TILE_W + 2)) + i * (TILE_W + 2) + j
            total += tl.load(
                parts + (part * C)[:, None] + c[None, :], mask=owes[:, None] & (c < C)[None, :], other=0.0
            )
            if SUMS_WEIGHTS:
                weight += tl.load(part_weights + part, mask=owes, other=0.0)
    if SUMS_WEIGHTS:
        weight += 1e-12
        tl.store(weights + token, weight, mask=(token < count) & (tl.program_id(1) == 0))
    if READS_WEIGHTS:
        weight = tl.load(weights + token, mask=token < count, other=1.0)
    if SUMS_WEIGHTS or READS_WEIGHTS:
        total = total / weight[:, None]
    tl.store(
        tokens + (token.to(tl.int64) * C)[:, None] + c[None, :], total, mask=(token < count)[:, None] & (c < C)[None, :]
    )


@triton.jit
def _upsample_kernel(
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
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    READS_WEIGHTS: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The association-weighted sums of the tokens, each of them divided by its weight if there is one."""
    b, tile_y, tile_x = _find_tile(tl.program_id(0), Hs, Ws, TILE_H, TILE_W)
    i, j, token, is_token = _find_slots(b, tile_y, tile_x, Hs, Ws, TILE_H, TILE_W, SLOTS)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C).to(tl.int64)
    near = tl.load(
        tokens + (token * C)[:, None] + c[None, :], mask=is_token[:, None] & (c < C)[None, :], other=0.0
    ).to(COMPUTE)
    if READS_WEIGHTS:
        # A cell's pixels over the weight is near 1, where float16 is good; they are taken out of the product.
        share = h * w / tl.load(weights + token, mask=is_token, other=1.0)
    for start in range(0, TILE_H * h * TILE_W * w, BLOCK_P):
        q = start + tl.arange(0, BLOCK_P)
        row, col, is_inside, k, is_near = _find_neighbors(q, i, j, H, W, tile_y, tile_x, h, w, TILE_H, TILE_W)
        mix = tl.load(
            association
            + (
                (b * association_stride_b + row * association_stride_y + col * association_stride_x)[:, None]
                + k.to(tl.int64) * association_stride_k
            ),
            mask=is_near & is_inside[:, None],
            other=0.0,
        )
        if READS_WEIGHTS:
            mix = mix.to(tl.float32) * share[None, :]
        block = _dot(mix.to(COMPUTE), near, tl.zeros((BLOCK_P, BLOCK_C), tl.float32), PRECISION)
        if READS_WEIGHTS:
            block = block / (h * w)
        tl.store(
            pixels + (((b * H + row) * W + col) * C)[:, None] + c[None, :],
            block,
            mask=is_inside[:, None] & (c < C)[None, :],
        )


# ---------------------------------------------------------------------------------------------------------------------
# Launches


def _tile(h: int, w: int, C: int, dtype: torch.dtype) -> dict[str, Any]:
    """The shapes of a tile and of the blocks that it is worked through in.

    Fixed, not searched for: another block would be another order of sums.
    """
    cells = 2 if h * w >= 16 else 4  # tiny cells would leave most of a block empty
    block_c = min(max(16, triton.next_power_of_2(C)), 128)
    numbers = 8192 if dtype.itemsize == 2 else 4096
    return {
        "h": h,
        "w": w,
        "TILE_H": cells,
        "TILE_W": cells,
        "SLOTS": triton.next_power_of_2((cells + 2) ** 2),
        "BLOCK_P": max(16, min(triton.next_power_of_2(cells * h * cells * w), numbers // block_c)),
        "BLOCK_C": block_c,
    }


def _precision() -> str:
    """How float32 matrices are multiplied: all bits, unless torch.set_float32_matmul_precision allows fewer."""
    if triton.knobs.runtime.interpret:
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
    _mean_kernel[grid](x, tokens, H, W, Hs, Ws, C, *x.stride(), h=h, w=w, BLOCK_P=block_p, BLOCK_C=block_c)
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
        The weighted sums (B, Hs, Ws, C) of that dtype: means with `is_softmax`, or divided by the weights given; and the
        weights (B, Hs, Ws). Without `sums`, both are empty.
    """
    B, C, H, W = pixels.shape
    Hs, Ws = _grid_size(H, W, h, w)
    tile = _tile(h, w, C, compute)
    cells, block_c = tile["TILE_H"], tile["BLOCK_C"]
    tiles = B * triton.cdiv(Hs, cells) * triton.cdiv(Ws, cells)
    slots = (cells + 2) ** 2
    parts = pixels.new_empty(tiles if sums else 0, slots, C, dtype=torch.float32)
    part_weights = pixels.new_empty(tiles if is_softmax else 0, slots, dtype=torch.float32)
    blocks = triton.cdiv(C, block_c)
    _group_kernel[(tiles, blocks if sums else 1)](
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
        C**-0.5,
        **tile,
        IS_ONE_BLOCK=blocks == 1,
        READS_ASSOCIATION=reads_association,
        IS_SOFTMAX=is_softmax,
        WRITES_ASSOCIATION=association is not None and not reads_association,
        SUMS=sums,
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
        _finish_kernel[(triton.cdiv(B * Hs * Ws, block_t), blocks)](
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
    """Super tokens (B, C, Hs, Ws) of x's dtype, association (B, 9, H, W) of `dtype`, which is that of all products, and
    the sum of each token's weights (B, Hs, Ws)."""
    tokens, association, weights = _sample_fake(x, h, w, n_iter, dtype)
    if x.numel() == 0:
        return tokens, association, weights
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
    tile = _tile(h, w, C, tokens.dtype)
    grid = (B * triton.cdiv(Hs, tile["TILE_H"]) * triton.cdiv(Ws, tile["TILE_W"]), triton.cdiv(C, tile["BLOCK_C"]))
    with _on(tokens):
        _upsample_kernel[grid](
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
    """Sums (B, C, Hs, Ws) of `dtype` of the pixels around, products in that of the pixels; divided by weights if given."""
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

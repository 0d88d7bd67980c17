"""Super token sampling and upsampling in plain PyTorch: the definition every backend is held to.

Exported graphs use `stvit.ops.portable`, which needs fewer axes.

Source: "Vision Transformer with Super Token Sampling", https://arxiv.org/abs/2211.11167, sections 3.2 and 3.3.

Shapes:
    B        batch
    C        channels
    H, W     pixels
    h, w     pixels of one cell, the `stoken_size`
    P        pixels of one cell, h * w
    Hs, Ws   super tokens, ceil(H / h) and ceil(W / w): one for each cell
    9        the 3x3 super tokens around a cell, row by row; the cell's own is number 4

Every function is free of control flow on sizes, so that one trace serves all of them: padding and cropping
happen even where they change nothing.
"""

import torch
import torch.nn.functional as F

# The compiler of torch 2.6 mistakes the strides of what is cropped by padding: there, `_crop` slices as in eager mode.
_is_new_torch = hasattr(torch.compiler, "is_exporting")
_torch_is_compiling = torch.compiler.is_compiling if _is_new_torch else lambda: False


def sample_super_tokens(
    x: torch.Tensor, stoken_size: tuple[int, int], n_iter: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `stvit.ops.sample_super_tokens`; the arguments have been checked there."""
    height, width = x.shape[2], x.shape[3]
    cells = _to_cells(x, stoken_size)  # (B, Hs, Ws, P, C)
    # Only the last weighted sum is differentiated (section 3.2): detached pixels give constant associations.
    constant_cells = cells.detach()
    tokens = constant_cells.mean(dim=3)  # (B, Hs, Ws, C), padding zeros count as pixels
    for _ in range(n_iter - 1):
        tokens = aggregate(constant_cells, associate(constant_cells, tokens))
    association = associate(constant_cells, tokens)  # (B, Hs, Ws, P, 9)
    tokens = aggregate(cells, association)
    return tokens.permute(0, 3, 1, 2), _from_cells(association, stoken_size, height, width)


def upsample_super_tokens(
    tokens: torch.Tensor, association: torch.Tensor, stoken_size: tuple[int, int]
) -> torch.Tensor:
    """See `stvit.ops.upsample_super_tokens`; the arguments have been checked there."""
    height, width = association.shape[2], association.shape[3]
    weights = _to_cells(association.to(tokens.dtype), stoken_size)  # (B, Hs, Ws, P, 9)
    neighbors = _gather_neighbors(tokens.permute(0, 2, 3, 1))  # (B, Hs, Ws, 9, C)
    return _from_cells(torch.matmul(weights, neighbors), stoken_size, height, width)


def associate(cells: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Softmax over the nine neighbors of <pixel, token> / sqrt(C) (equation 3).

    Zeros stand for the neighbors outside the grid and take part in the softmax, as in the published weights.

    Args:
        cells: (B, Hs, Ws, P, C)
        tokens: (B, Hs, Ws, C)

    Returns:
        (B, Hs, Ws, P, 9)
    """
    # The factor goes to the few tokens, before the product: cheaper, and float16 does not overflow.
    neighbors = _gather_neighbors(tokens * tokens.shape[-1] ** -0.5)  # (B, Hs, Ws, 9, C)
    return torch.matmul(cells, neighbors.transpose(-1, -2)).softmax(dim=-1)


def aggregate(cells: torch.Tensor, association: torch.Tensor) -> torch.Tensor:
    """Association-weighted mean, for each super token, of the pixels of the 3x3 cells around it (equation 4).

    Args:
        cells: (B, Hs, Ws, P, C)
        association: (B, Hs, Ws, P, 9)

    Returns:
        (B, Hs, Ws, C)
    """
    # Sums over up to 9 * P pixels do not keep their precision in bfloat16, and over P alone may overflow float16.
    dtype = torch.float64 if cells.dtype == torch.float64 else torch.float32
    if cells.dtype == torch.float16:
        weighted = torch.matmul(association.transpose(-1, -2).to(dtype), cells.to(dtype))  # (B, Hs, Ws, 9, C)
    else:
        weighted = torch.matmul(association.transpose(-1, -2), cells).to(dtype)
    weight = association.sum(dim=3, dtype=dtype).unsqueeze(-1)  # (B, Hs, Ws, 9, 1)
    tokens = _sum_neighbors(weighted) / (_sum_neighbors(weight) + 1e-12)
    return tokens.to(cells.dtype)


def _to_cells(x: torch.Tensor, stoken_size: tuple[int, int]) -> torch.Tensor:
    """(B, C, H, W) to (B, Hs, Ws, P, C), with zeros at the right and at the bottom."""
    h, w = stoken_size
    B, C, H, W = x.shape
    Hs, Ws = (H + h - 1) // h, (W + w - 1) // w
    x = F.pad(x, (0, Ws * w - W, 0, Hs * h - H))
    x = x.reshape(B, C, Hs, h, Ws, w).permute(0, 2, 4, 3, 5, 1)  # (B, Hs, Ws, h, w, C)
    return x.reshape(B, Hs, Ws, h * w, C)


def _from_cells(cells: torch.Tensor, stoken_size: tuple[int, int], height: int, width: int) -> torch.Tensor:
    """(B, Hs, Ws, P, C) to (B, C, height, width), the inverse of `_to_cells`; strided as channels_last."""
    h, w = stoken_size
    B, Hs, Ws, _, C = cells.shape
    x = cells.reshape(B, Hs, Ws, h, w, C).permute(0, 1, 3, 2, 4, 5)  # (B, Hs, h, Ws, w, C)
    # Flat first: a dynamic graph needs no proof that Hs * h is divisible by Hs.
    x = x.contiguous().flatten().view(B * Hs * h * Ws * w, C).view(B, Hs * h, Ws * w, C)
    return _crop(x, height, width).permute(0, 3, 1, 2)


def _crop(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The first `height` rows and `width` columns of (B, H, W, C)."""
    if not torch.jit.is_scripting():
        if _torch_is_compiling():
            # The strides of a slice depend on whether anything is cut off, and torch.compile would need a graph for
            # each case. Padding by a negative number is a copy, which the compiler fuses away.
            return F.pad(x, (0, 0, 0, width - x.shape[2], 0, height - x.shape[1]))
    return x[:, :height, :width]


def _gather_neighbors(tokens: torch.Tensor) -> torch.Tensor:
    """(B, Hs, Ws, C) to (B, Hs, Ws, 9, C), zeros outside the grid."""
    Hs, Ws = tokens.shape[1], tokens.shape[2]
    # One axis after the other: six slices, and not nine in both axes, to trace and to compile.
    padded = F.pad(tokens, (0, 0, 1, 1, 1, 1))
    rows = torch.stack([padded[:, i : i + Hs] for i in range(3)], dim=3)  # (B, Hs, Ws + 2, 3, C)
    return torch.stack([rows[:, :, j : j + Ws] for j in range(3)], dim=4).flatten(3, 4)


def _sum_neighbors(parts: torch.Tensor) -> torch.Tensor:
    """What the cells give to their nine neighbors, (B, Hs, Ws, 9, C), summed where it arrives, (B, Hs, Ws, C).

    The adjoint of `_gather_neighbors`, also written as a gather: in-place additions to slices make
    torch.compile nest masks for minutes.
    """
    Hs, Ws = parts.shape[1], parts.shape[2]
    padded = F.pad(parts, (0, 0, 0, 0, 1, 1, 1, 1)).unflatten(3, (3, 3))
    rows = padded[:, 2 : 2 + Hs, :, 0] + padded[:, 1 : 1 + Hs, :, 1] + padded[:, :Hs, :, 2]  # (B, Hs, Ws + 2, 3, C)
    return rows[:, :, 2 : 2 + Ws, 0] + rows[:, :, 1 : 1 + Ws, 1] + rows[:, :, :Ws, 2]

"""Super token sampling and upsampling in plain PyTorch.

Every other backend must give the same results. Exported graphs use `stvit.ops.portable` instead, whose tensors have
fewer axes.

Source: "Vision Transformer with Super Token Sampling", https://arxiv.org/abs/2211.11167, sections 3.2 and 3.3.

Shapes:
    B        batch
    C        channels
    H, W     height and width of the feature map, in pixels
    h, w     height and width of a cell in pixels, the `stoken_size`
    P        pixels of a cell, h * w
    Hs, Ws   grid of super tokens, ceil(H / h) and ceil(W / w): one super token per cell
    9        the 3x3 super tokens around a cell, row by row; number 4 is the cell's own

No function branches on sizes, so that one trace serves all sizes. The functions therefore pad and crop even if this
changes nothing.
"""

import torch
import torch.nn.functional as F

__all__ = ["aggregate", "associate", "sample_super_tokens", "upsample_super_tokens"]

# torch.compile of torch 2.6 expects wrong strides after cropping by padding. There, `_crop` slices as in eager mode.
_is_new_torch = hasattr(torch.compiler, "is_exporting")
_torch_is_compiling = torch.compiler.is_compiling if _is_new_torch else lambda: False


def sample_super_tokens(
    x: torch.Tensor, stoken_size: tuple[int, int], n_iter: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Implements `stvit.ops.sample_super_tokens`, which checks the arguments."""
    height, width = x.shape[2], x.shape[3]
    cells = _to_cells(x, stoken_size)  # (B, Hs, Ws, P, C)
    # Gradients flow only through the last weighted sum (section 3.2). Detached pixels give constant associations.
    constant_cells = cells.detach()
    tokens = constant_cells.mean(dim=3)  # (B, Hs, Ws, C); padding zeros count as pixels
    for _ in range(n_iter - 1):
        tokens = aggregate(constant_cells, associate(constant_cells, tokens))
    association = associate(constant_cells, tokens)  # (B, Hs, Ws, P, 9)
    tokens = aggregate(cells, association)
    return tokens.permute(0, 3, 1, 2), _from_cells(association, stoken_size, height, width)


def upsample_super_tokens(
    tokens: torch.Tensor, association: torch.Tensor, stoken_size: tuple[int, int]
) -> torch.Tensor:
    """Implements `stvit.ops.upsample_super_tokens`, which checks the arguments."""
    height, width = association.shape[2], association.shape[3]
    weights = _to_cells(association.to(tokens.dtype), stoken_size)  # (B, Hs, Ws, P, 9)
    neighbors = _gather_neighbors(tokens.permute(0, 2, 3, 1))  # (B, Hs, Ws, 9, C)
    return _from_cells(torch.matmul(weights, neighbors), stoken_size, height, width)


def associate(cells: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Returns the association of pixels with their neighbor tokens (equation 3).

    The association is the softmax of <pixel, token> / sqrt(C) over the nine neighbors. Neighbors outside the grid are
    zeros and take part in the softmax, as in the authors' code.

    Args:
        cells: Pixels (B, Hs, Ws, P, C).
        tokens: Super tokens (B, Hs, Ws, C).

    Returns:
        Association (B, Hs, Ws, P, 9).
    """
    # Scaling the tokens before the product is cheaper than scaling the result, and keeps float16 from overflowing.
    neighbors = _gather_neighbors(tokens * tokens.shape[-1] ** -0.5)  # (B, Hs, Ws, 9, C)
    return torch.matmul(cells, neighbors.transpose(-1, -2)).softmax(dim=-1)


def aggregate(cells: torch.Tensor, association: torch.Tensor) -> torch.Tensor:
    """Returns super tokens, the weighted means of pixels (equation 4).

    Each mean includes the pixels of the 3x3 cells around the token.

    Args:
        cells: Pixels (B, Hs, Ws, P, C).
        association: Association of the pixels, (B, Hs, Ws, P, 9).

    Returns:
        Super tokens (B, Hs, Ws, C).
    """
    # Sums over 9 * P pixels would lose precision in bfloat16, and sums over P pixels could overflow in float16.
    dtype = torch.float64 if cells.dtype == torch.float64 else torch.float32
    if cells.dtype == torch.float16:
        weighted = torch.matmul(association.transpose(-1, -2).to(dtype), cells.to(dtype))  # (B, Hs, Ws, 9, C)
    else:
        weighted = torch.matmul(association.transpose(-1, -2), cells).to(dtype)
    weight = association.sum(dim=3, dtype=dtype).unsqueeze(-1)  # (B, Hs, Ws, 9, 1)
    tokens = _sum_neighbors(weighted) / (_sum_neighbors(weight) + 1e-12)
    return tokens.to(cells.dtype)


def _to_cells(x: torch.Tensor, stoken_size: tuple[int, int]) -> torch.Tensor:
    """Cuts pixels into zero-padded cells, (B, C, H, W) to (B, Hs, Ws, P, C)."""
    h, w = stoken_size
    B, C, H, W = x.shape
    Hs, Ws = (H + h - 1) // h, (W + w - 1) // w
    x = F.pad(x, (0, Ws * w - W, 0, Hs * h - H))
    x = x.reshape(B, C, Hs, h, Ws, w).permute(0, 2, 4, 3, 5, 1)  # (B, Hs, Ws, h, w, C)
    return x.reshape(B, Hs, Ws, h * w, C)


def _from_cells(cells: torch.Tensor, stoken_size: tuple[int, int], height: int, width: int) -> torch.Tensor:
    """Inverts `_to_cells`, (B, Hs, Ws, P, C) to (B, C, H, W) in channels_last."""
    h, w = stoken_size
    B, Hs, Ws, _, C = cells.shape
    x = cells.reshape(B, Hs, Ws, h, w, C).permute(0, 1, 3, 2, 4, 5)  # (B, Hs, h, Ws, w, C)
    # Flattening first spares a dynamic graph the proof that Hs * h is divisible by Hs.
    x = x.contiguous().flatten().view(B * Hs * h * Ws * w, C).view(B, Hs * h, Ws * w, C)
    return _crop(x, height, width).permute(0, 3, 1, 2)


def _crop(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Returns the first `height` rows and `width` columns of (B, H, W, C)."""
    if not torch.jit.is_scripting():
        if _torch_is_compiling():
            # The strides of a slice depend on whether it removes anything, so torch.compile would need two graphs.
            # Padding by a negative number always copies, and the compiler fuses the copy with other operations.
            return F.pad(x, (0, 0, 0, width - x.shape[2], 0, height - x.shape[1]))
    return x[:, :height, :width]


def _gather_neighbors(tokens: torch.Tensor) -> torch.Tensor:
    """Gathers the neighbors of each token, (B, Hs, Ws, C) to (B, Hs, Ws, 9, C).

    Neighbors outside the grid are zeros.
    """
    Hs, Ws = tokens.shape[1], tokens.shape[2]
    # One axis after the other needs six slices. Both axes at once would need nine.
    padded = F.pad(tokens, (0, 0, 1, 1, 1, 1))
    rows = torch.stack([padded[:, i : i + Hs] for i in range(3)], dim=3)  # (B, Hs, Ws + 2, 3, C)
    return torch.stack([rows[:, :, j : j + Ws] for j in range(3)], dim=4).flatten(3, 4)


def _sum_neighbors(parts: torch.Tensor) -> torch.Tensor:
    """Sums the parts that each cell contributes to its nine neighbors.

    The shapes are (B, Hs, Ws, 9, C) to (B, Hs, Ws, C). This is the adjoint of `_gather_neighbors`. It has no in-place
    additions to slices, because torch.compile would turn them into nested masks and compile for minutes.
    """
    Hs, Ws = parts.shape[1], parts.shape[2]
    padded = F.pad(parts, (0, 0, 0, 0, 1, 1, 1, 1)).unflatten(3, (3, 3))
    rows = padded[:, 2 : 2 + Hs, :, 0] + padded[:, 1 : 1 + Hs, :, 1] + padded[:, :Hs, :, 2]  # (B, Hs, Ws + 2, 3, C)
    return rows[:, :, 2 : 2 + Ws, 0] + rows[:, :, 1 : 1 + Ws, 1] + rows[:, :, :Ws, 2]

"""Super token sampling and upsampling for exported graphs.

The results are those of `stvit.ops.reference` up to rounding. The operators are supported by converters for phones and
embedded devices: Core ML accepts tensors of rank 5, ncnn of rank 4 with a batch of one. The reference cuts an image
into cells with a tensor of rank 6. Here, the columns of a cell and the channels share an axis, so cutting needs rank 5
and everything else rank 4 or less. The batch is always the first axis, because ncnn removes it.

No function branches on the value of a size, so that one graph serves all sizes.

Shapes: as in stvit/ops/reference.py, and
    S        number of super tokens, Hs * Ws
"""

import torch
import torch.nn.functional as F

__all__ = ["is_exporting", "sample_super_tokens", "upsample_super_tokens"]

# torch 2.6 cannot tell torch.export from torch.compile, so its exported programs use the reference.
_is_torch_export = getattr(torch.compiler, "is_exporting", lambda: False)


def is_exporting() -> bool:
    """Returns whether torch.jit.trace, torch.onnx or torch.export records a graph."""
    return torch.jit.is_tracing() or torch.onnx.is_in_onnx_export() or _is_torch_export()


def sample_super_tokens(
    x: torch.Tensor, stoken_size: tuple[int, int], n_iter: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Implements `stvit.ops.sample_super_tokens`, which checks the arguments."""
    B, C, H, W = x.shape
    Hs, Ws = _grid(H, W, stoken_size)
    cells = _to_cells(x, stoken_size)  # (B, S, P, C)
    # The association is a constant for the gradient, as in the reference.
    constant_cells = cells.detach()
    tokens = constant_cells.mean(dim=2).transpose(1, 2).reshape(B, C, Hs, Ws)
    for _ in range(n_iter - 1):
        tokens = _aggregate(constant_cells, _associate(constant_cells, tokens), Hs, Ws)
    association = _associate(constant_cells, tokens)  # (B, S, P, 9)
    return _aggregate(cells, association, Hs, Ws), _from_cells(association, stoken_size, H, W)


def upsample_super_tokens(
    tokens: torch.Tensor, association: torch.Tensor, stoken_size: tuple[int, int]
) -> torch.Tensor:
    """Implements `stvit.ops.upsample_super_tokens`, which checks the arguments."""
    H, W = association.shape[2], association.shape[3]
    if association.dtype != tokens.dtype:  # without this condition, a traced model could not be cast to another dtype
        association = association.to(tokens.dtype)
    weights = _to_cells(association, stoken_size)  # (B, S, P, 9)
    neighbors = _gather_neighbors(tokens).transpose(2, 3)  # (B, S, 9, C)
    return _from_cells(torch.matmul(weights, neighbors), stoken_size, H, W)


def _grid(H: int, W: int, stoken_size: tuple[int, int]) -> tuple[int, int]:
    h, w = stoken_size
    return (H + h - 1) // h, (W + w - 1) // w


def _associate(cells: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Returns the association of pixels with their neighbor tokens (equation 3).

    Args:
        cells: Pixels (B, S, P, C).
        tokens: Super tokens (B, C, Hs, Ws).

    Returns:
        Association (B, S, P, 9).
    """
    # Scaling the tokens before the product keeps float16 from overflowing, as in the reference.
    neighbors = _gather_neighbors(tokens * tokens.shape[1] ** -0.5)  # (B, S, C, 9)
    return torch.matmul(cells, neighbors).softmax(dim=3)


def _aggregate(cells: torch.Tensor, association: torch.Tensor, Hs: int, Ws: int) -> torch.Tensor:
    """Returns super tokens, the weighted means of pixels (equation 4).

    Args:
        cells: Pixels (B, S, P, C).
        association: Association (B, S, P, 9).
        Hs: Rows of super tokens.
        Ws: Columns of super tokens.

    Returns:
        Super tokens (B, C, Hs, Ws).
    """
    B, _, _, C = cells.shape
    dtype = cells.dtype
    is_reduced = dtype in (torch.float16, torch.bfloat16)
    if is_reduced:  # sums in reduced precision would overflow or lose precision
        cells, association = cells.float(), association.float()
    weighted = torch.matmul(association.transpose(2, 3), cells)  # (B, S, 9, C)
    weight = association.sum(dim=2).unsqueeze(3)  # (B, S, 9, 1)
    both = torch.cat([weighted, weight], dim=3).permute(0, 2, 3, 1).contiguous()  # (B, 9, C + 1, S)
    both = _sum_neighbors(both.reshape(B, 9 * (C + 1), Hs, Ws), C + 1)
    tokens = both[:, :C] / (both[:, C:] + 1e-12)
    return tokens.to(dtype) if is_reduced else tokens


def _to_cells(x: torch.Tensor, stoken_size: tuple[int, int]) -> torch.Tensor:
    """Cuts pixels into zero-padded cells, (B, C, H, W) to (B, S, P, C)."""
    h, w = stoken_size
    B, C, H, W = x.shape
    Hs, Ws = _grid(H, W, stoken_size)
    x = F.pad(x, (0, Ws * w - W, 0, Hs * h - H)).permute(0, 2, 3, 1)
    if _has_symbolic_sizes(x):
        x = x.unfold(2, w, w).transpose(3, 4).flatten(3)  # (B, Hs * h, Ws, w * C)
        x = x.unfold(1, h, h).transpose(3, 4)  # (B, Hs, Ws, h, w * C)
    else:
        x = x.reshape(B, Hs, h, Ws, w * C).transpose(2, 3)  # (B, Hs, Ws, h, w * C)
    return x.reshape(B, Hs * Ws, h * w, C)


def _from_cells(cells: torch.Tensor, stoken_size: tuple[int, int], H: int, W: int) -> torch.Tensor:
    """Inverts `_to_cells`, (B, S, P, C) to (B, C, H, W)."""
    h, w = stoken_size
    B, _, _, C = cells.shape
    Hs, Ws = _grid(H, W, stoken_size)
    x = cells.reshape(B, Hs, Ws, h, w * C).transpose(2, 3)  # (B, Hs, h, Ws, w * C)
    if _has_symbolic_sizes(cells):
        x = x.contiguous().flatten().view(B * Hs * h * Ws * w, C).view(B, Hs * h, Ws * w, C)
        x = F.pad(x, (0, 0, 0, W - Ws * w, 0, H - Hs * h))
    else:
        x = x.reshape(B, Hs * h, Ws * w, C)[:, :H, :W]
    return x.permute(0, 3, 1, 2)


def _has_symbolic_sizes(x: torch.Tensor) -> bool:
    """Returns whether torch.export records a graph for a range of sizes.

    torch.export must prove the conditions of each operation for all sizes. It cannot prove that Hs * h rows can be
    reshaped to (Hs, h), or that a slice of H rows ends inside them.
    """
    # In strict mode, which uses dynamo, symbolic sizes look like integers.
    return _is_torch_export() and (torch.compiler.is_dynamo_compiling() or not all(isinstance(n, int) for n in x.shape))


def _gather_neighbors(tokens: torch.Tensor) -> torch.Tensor:
    """Gathers the nine neighbors of each token, (B, C, Hs, Ws) to (B, S, C, 9).

    Neighbors outside the grid are zeros.
    """
    B, C, Hs, Ws = tokens.shape
    # One axis after the other needs six slices. Both axes at once would need nine.
    padded = F.pad(tokens, (1, 1, 1, 1))
    rows = torch.cat([padded[:, :, :, j : j + Ws] for j in range(3)], dim=1)  # (B, 3 * C, Hs + 2, Ws)
    neighbors = torch.cat([rows[:, :, i : i + Hs] for i in range(3)], dim=1)  # (B, 9 * C, Hs, Ws)
    return neighbors.reshape(B, 9, C, Hs * Ws).permute(0, 3, 2, 1)


def _sum_neighbors(parts: torch.Tensor, C: int) -> torch.Tensor:
    """Sums the parts that each cell contributes to its nine neighbors.

    Args:
        parts: Parts (B, 9 * C, Hs, Ws).
        C: Number of channels.

    Returns:
        Sums (B, C, Hs, Ws).
    """
    Hs, Ws = parts.shape[2], parts.shape[3]
    padded = F.pad(parts, (1, 1, 1, 1))
    up, middle, down = padded[:, : 3 * C], padded[:, 3 * C : 6 * C], padded[:, 6 * C :]
    rows = up[:, :, 2 : 2 + Hs] + middle[:, :, 1 : 1 + Hs] + down[:, :, :Hs]  # (B, 3 * C, Hs, Ws + 2)
    return rows[:, :C, :, 2 : 2 + Ws] + rows[:, C : 2 * C, :, 1 : 1 + Ws] + rows[:, 2 * C :, :, :Ws]

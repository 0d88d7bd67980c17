"""The published formulation of the model, the baseline of the benchmarks.

Convolutions with one-hot kernels gather and sum neighbors, attention matrices are materialized, and all tensors are
channel-first. The results are those of `stvit` with the same weights. Only the benchmarks use this module.

Shapes: those of stvit/ops/reference.py, and
    N        tokens, Hs * Ws
"""

import copy

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import nn

import stvit
from stvit.stvit import PixelAct

__all__ = ["PublishedAttention", "published"]


class PublishedAttention(nn.Module):
    """Super token attention (section 3 of the paper), (B, C, H, W) to (B, C, H, W)."""

    kernels: torch.Tensor

    def __init__(self, attention: stvit.SuperTokenAttention) -> None:
        """Takes over parameters and sizes.

        Args:
            attention: Module to copy them from.
        """
        super().__init__()
        self.stoken_size = attention.stoken_size
        self.n_iter = attention.n_iter
        self.num_heads = attention.num_heads
        self.qkv = attention.qkv
        self.attn_drop = attention.attn_drop
        self.proj = attention.proj
        self.proj_drop = attention.proj_drop
        # Kernel k selects neighbor k, row by row.
        self.register_buffer("kernels", torch.eye(9).to(attention.qkv.weight).reshape(9, 1, 3, 3), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.stoken_size == (1, 1):
            return self.attend(x)
        h, w = self.stoken_size
        B, C, height, width = x.shape
        x = F.pad(x, (0, -width % w, 0, -height % h))
        H, W = x.shape[2:]
        Hs, Ws = H // h, W // w

        tokens = F.adaptive_avg_pool2d(x, (Hs, Ws))
        pixels = x.reshape(B, C, Hs, h, Ws, w).permute(0, 2, 4, 3, 5, 1).reshape(B, Hs * Ws, h * w, C)
        with torch.no_grad():
            for i in range(self.n_iter):
                neighbors = self.unfold(tokens).transpose(1, 2).reshape(B, Hs * Ws, C, 9)
                association = (pixels @ neighbors * C**-0.5).softmax(dim=-1)  # (B, Hs * Ws, h * w, 9)
                weight = self.fold(association.sum(dim=2).transpose(1, 2).reshape(B, 9, Hs, Ws))
                if i < self.n_iter - 1:
                    tokens = self.average(pixels, association, weight)
        tokens = self.average(pixels, association, weight)

        tokens = self.attend(tokens)
        neighbors = self.unfold(tokens).transpose(1, 2).reshape(B, Hs * Ws, C, 9)
        out = neighbors @ association.transpose(2, 3)  # (B, Hs * Ws, C, h * w)
        out = out.reshape(B, Hs, Ws, C, h, w).permute(0, 3, 1, 4, 2, 5).reshape(B, C, H, W)
        return out[:, :, :height, :width].contiguous()

    def unfold(self, x: torch.Tensor) -> torch.Tensor:
        """Gathers the 9 neighbors of each token, (B, C, Hs, Ws) to (B, C * 9, Hs * Ws)."""
        B, C, Hs, Ws = x.shape
        return F.conv2d(x.reshape(B * C, 1, Hs, Ws), self.kernels, padding=1).reshape(B, C * 9, Hs * Ws)

    def fold(self, parts: torch.Tensor) -> torch.Tensor:
        """Sums contributions of cells to neighbors, (B, 9, Hs, Ws) to (B, 1, Hs, Ws)."""
        return F.conv_transpose2d(parts, self.kernels, padding=1)

    def average(self, pixels: torch.Tensor, association: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Returns the association-weighted means of the pixels, (B, C, Hs, Ws)."""
        B, _, Hs, Ws = weight.shape
        C = pixels.shape[3]
        parts = pixels.transpose(2, 3) @ association  # (B, Hs * Ws, C, 9)
        parts = parts.permute(0, 2, 3, 1).reshape(B * C, 9, Hs, Ws)
        return self.fold(parts).reshape(B, C, Hs, Ws) / (weight + 1e-12)

    def attend(self, tokens: torch.Tensor) -> torch.Tensor:
        """Applies multi-head self-attention over all positions of (B, C, Hs, Ws)."""
        B, C, Hs, Ws = tokens.shape
        qkv = self.qkv(tokens).reshape(B, self.num_heads, 3 * C // self.num_heads, Hs * Ws)
        q, k, v = qkv.chunk(3, dim=2)  # each (B, heads, C / heads, N)
        attention = (k.transpose(2, 3) @ q * (C // self.num_heads) ** -0.5).softmax(dim=2)  # (B, heads, N, N)
        tokens = (v @ self.attn_drop(attention)).reshape(B, C, Hs, Ws)
        return self.proj_drop(self.proj(tokens))


class PublishedLayerNorm(nn.Module):
    """Layer normalization over the channels of (B, C, H, W)."""

    def __init__(self, norm: LayerNorm2d) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(norm.normalized_shape, eps=norm.eps)
        self.norm.weight, self.norm.bias = norm.weight, norm.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2).contiguous()


def published(model: nn.Module) -> nn.Module:
    """Returns a copy of a model or module in the published formulation.

    Args:
        model: An `stvit.STViT`, or a module that contains `stvit.SuperTokenAttention`.

    Returns:
        A copy with the same outputs and the same training behavior.
    """
    model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    if isinstance(model, stvit.SuperTokenAttention):
        return PublishedAttention(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, stvit.SuperTokenAttention):
            model.set_submodule(name, PublishedAttention(module))
        elif isinstance(module, LayerNorm2d):
            model.set_submodule(name, PublishedLayerNorm(module))
        elif isinstance(module, PixelAct):
            model.set_submodule(name, module.act)  # keeps the maps channel-first
    return model

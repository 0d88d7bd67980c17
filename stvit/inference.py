"""Models rewritten for inference: everything that is constant then is folded away, in the fastest memory format.

Shapes: as in stvit/stvit.py, and
    D        hidden channels of an MLP
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from timm.layers import DropPath, LayerScale2d
from torch import nn

from stvit.fold import fold_batch_norms
from stvit.stvit import ConvMlp, ResidualDepthwiseConv, STViTBlock

__all__ = ["TiledConvMlp", "fold_constants", "optimize_for_inference"]

# Bytes of an MLP's hidden map computed at a time: of so much, the few maps that follow each other stay in the
# last-level cache. docs/speed.md has the sizes that were tried.
TILE_BYTES = 8 * 2**20
# A tile's first and last row are computed once more for its neighbors.
MIN_TILE_ROWS = 8


def optimize_for_inference(model: nn.Module) -> nn.Module:
    """A copy of a model that computes the same in less time and memory, and can no longer be trained.

    Batch normalizations go into the convolutions that they follow, or the 1x1 convolutions that they precede;
    `x + depthwise(x)` becomes one depthwise convolution (a 1 is added to the kernel's center); layer scale goes into
    the projection before it; dropout and stochastic depth go. Weights are laid out channels_last. On a CPU the MLPs
    compute their hidden maps in tiles. All of it is exact, to rounding: float32 outputs stay within 1e-4 of their
    standard deviation. A batch normalization after an activation and before a padded convolution (four, in the stem)
    stays, since the padding is not normalized.

    The result is a model of the same class, with the same methods, that exports, compiles, scripts and pickles. Its
    state dict is another one: load weights before, not after.

    Args:
        model: An `STViT`, or what contains one (`features_only=True`, a detector's backbone, …), in evaluation mode.
            Other models that torch.fx can trace have their batch normalizations folded.

    Raises:
        ValueError: If the model is in training mode, or torch.fx cannot trace it.
        TypeError: If it is compiled or scripted already.
    """
    if isinstance(model, (torch.jit.ScriptModule, torch._dynamo.OptimizedModule)):
        raise TypeError(
            f"optimize_for_inference wants a model that is not compiled yet, got {type(model).__name__}: optimize "
            "first, then compile or script"
        )
    training = [name or "the model itself" for name, module in model.named_modules() if module.training]
    if training:
        raise ValueError(
            f"optimize_for_inference wants a model in evaluation mode, call model.eval() before; in training mode: "
            f"{', '.join(training[:3])}{', …' if len(training) > 3 else ''}"
        )
    model = copy.deepcopy(model).requires_grad_(False)
    fold_constants(model)
    return model.eval().to(memory_format=torch.channels_last)


@torch.no_grad()
def fold_constants(model: nn.Module) -> int:
    """Does `optimize_for_inference`'s folding in place, whichever mode the model is in; the results are for evaluation.

    Returns:
        How many batch normalizations were folded.

    Raises:
        ValueError: If torch.fx cannot trace the model; it is then as it was.
    """
    folded = fold_batch_norms(model)
    blocks: list[Any] = [module for module in model.modules() if isinstance(module, STViTBlock)]
    for block in blocks:
        block.ls1 = _fold_layer_scale(block.attn.proj, block.ls1)
        if isinstance(block.mlp, ConvMlp):
            block.ls2 = _fold_layer_scale(block.mlp.fc2, block.ls2)
            block.mlp = TiledConvMlp(block.mlp)
        if isinstance(block.cpe, ResidualDepthwiseConv):
            block.cpe = _fold_residual(block.cpe)
        for module in (block, block.attn):  # others' may ask their dropout for its rate
            for name, child in module.named_children():
                if isinstance(child, (nn.Dropout, DropPath)):
                    setattr(module, name, nn.Identity())
        block.attn.attn_drop = 0.0
    return folded


class TiledConvMlp(nn.Module):
    """1x1 up, activation, depthwise 3x3, 1x1 down, (B, C, H, W) to the same, a part of the map after the other.

    The hidden map is four times as large as the input. Computed whole it goes through the memory three times; a tile
    of it stays in the cache, and no more than a tile is ever held. Where that is of no use (a GPU, gradients) or
    would freeze sizes (compilation, export, tracing), the map is computed whole.
    """

    def __init__(self, mlp: ConvMlp) -> None:
        """
        Args:
            mlp: Whose convolutions are taken over; its dropout is not.
        """
        super().__init__()
        self.fc1 = mlp.fc1
        self.act = mlp.act
        self.conv = _fold_residual(mlp.conv)
        self.fc2 = mlp.fc2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting() and _may_tile(x):
            return self._in_tiles(x)
        return self._whole(x)

    def _whole(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.conv(self.act(self.fc1(x))))

    @torch.jit.unused
    def _in_tiles(self, x: torch.Tensor) -> torch.Tensor:
        B, _, H, W = x.shape
        row_bytes = W * self.fc1.out_channels * x.element_size()
        if B * H * row_bytes <= TILE_BYTES:
            return self._whole(x)
        out = x.new_empty((B, self.fc2.out_channels, H, W)).to(memory_format=torch.channels_last)
        for images in _parts(B, max(1, TILE_BYTES // (H * row_bytes))):
            for rows in _parts(H, max(MIN_TILE_ROWS, TILE_BYTES // (len(images) * row_bytes))):
                # With the row above and the row below, which the depthwise convolution looks at.
                top, bottom = max(rows.start - 1, 0), min(rows.stop + 1, H)
                tile = x[images.start : images.stop, :, top:bottom]
                tile = self.conv(self.act(self.fc1(tile)))
                tile = self.fc2(tile[:, :, rows.start - top : rows.stop - top])
                out[images.start : images.stop, :, rows.start : rows.stop] = tile
        return out


@torch.jit.unused
def _may_tile(x: torch.Tensor) -> bool:
    return (
        not isinstance(x, torch.fx.Proxy)
        and x.device.type == "cpu"
        and not (torch.is_grad_enabled() and x.requires_grad)
        and not torch.jit.is_tracing()
        and not torch.compiler.is_compiling()
    )


def _parts(length: int, limit: int) -> Iterator[range]:
    """`range(length)` in as few parts as possible of at most `limit`, of equal size but for one."""
    count = -(-length // limit)
    for i in range(count):
        yield range(length * i // count, length * (i + 1) // count)


def _fold_residual(module: ResidualDepthwiseConv) -> nn.Conv2d:
    """x + conv(x) as one convolution."""
    conv = module.conv
    conv.weight[:, 0, conv.kernel_size[0] // 2, conv.kernel_size[1] // 2] += 1
    return conv


def _fold_layer_scale(conv: nn.Conv2d, scale: nn.Module) -> nn.Module:
    """Scales the outputs of the convolution; returns what takes the place of the layer scale."""
    if not isinstance(scale, LayerScale2d):
        return scale
    gamma = scale.gamma.double()
    conv.weight.copy_(conv.weight.double() * gamma.reshape(-1, 1, 1, 1))
    if conv.bias is not None:
        conv.bias.copy_(conv.bias.double() * gamma)
    return nn.Identity()

"""An optimized copy of a model for inference: constants folded, channels_last weights, tiled MLPs.

Shapes: as in stvit/stvit.py, and
    D        hidden channels of an MLP
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from timm.layers import DropPath, LayerScale2d
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from stvit.fold import fold_batch_norms
from stvit.stvit import ConvMlp, ResidualDepthwiseConv, STViTBlock

__all__ = ["FoldedResidualConv", "TiledConvMlp", "fold_constants", "optimize_for_inference"]

# Size of the part of an MLP's hidden map that is computed at a time. The few maps of this size that an MLP holds stay
# in the last-level cache. docs/speed.md lists the sizes that were tried.
TILE_BYTES = 8 * 2**20
# Neighboring tiles both compute the rows at their border, so short tiles waste work.
MIN_TILE_ROWS = 8


def optimize_for_inference(model: nn.Module) -> nn.Module:
    """Returns an optimized copy of a model for inference, which takes less time and memory and cannot be trained.

    - Batch normalizations are folded into the convolution before them, or into a 1x1 convolution after them.
    - `x + depthwise(x)` becomes one depthwise convolution, with a 1 added to the center of its kernel, in float32 and
      float64. A center in bfloat16 or float16 would lose bits to the 1: there, the addition stays.
    - Layer scale is folded into the projection before it. Dropout and stochastic depth are removed.
    - Computed weights (parametrizations, pruning masks, weight norm) are replaced by their values.
    - Weights become channels_last. On a CPU the MLPs compute their hidden maps in tiles.

    Convolutions with hooks and modules that replace a convolution (LoRA) are not folded.

    All of it is exact up to rounding: float32 outputs stay within 1e-4 of their standard deviation, and outputs in
    reduced precision are as close to float32 as those of the plain model. Four batch normalizations of the stem stay:
    each follows an activation and precedes a padded convolution, whose padding is not normalized.

    The copy is a model of the same class, with the same methods. It exports, compiles, scripts and pickles. Its state
    dict differs: load weights first.

    Args:
        model: An `STViT` in evaluation mode, or a module that contains one (`features_only=True`, a detector). The
            batch normalizations of other models are folded too, if torch.fx can trace them.

    Raises:
        ValueError: If the model is in training mode, or torch.fx cannot trace it.
        TypeError: If the model is already compiled or scripted.
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
    model = copy.deepcopy(model, _computed_tensors(model)).requires_grad_(False)
    fold_constants(model)
    return model.eval().to(memory_format=torch.channels_last)


@torch.no_grad()
def fold_constants(model: nn.Module) -> int:
    """Folds constants in place, see `optimize_for_inference`. The result is for evaluation.

    Args:
        model: In either mode.

    Returns:
        The number of batch normalizations folded.

    Raises:
        ValueError: If torch.fx cannot trace the model. The model is then unchanged.
    """
    for module in model.modules():
        _set_computed_weights(module)
    folded = fold_batch_norms(model)
    blocks: list[Any] = [module for module in model.modules() if isinstance(module, STViTBlock)]
    for block in blocks:
        block.ls1 = _fold_layer_scale(block.attn.proj, block.ls1)
        if isinstance(block.mlp, ConvMlp):
            block.ls2 = _fold_layer_scale(block.mlp.fc2, block.ls2)
            if all(map(_is_plain, (block.mlp.fc1, block.mlp.conv.conv, block.mlp.fc2))):
                block.mlp = TiledConvMlp(block.mlp)
        if isinstance(block.cpe, ResidualDepthwiseConv) and _is_plain(block.cpe.conv):
            block.cpe = FoldedResidualConv(block.cpe)
        block.attn.attn_drop.p = 0.0  # the fused attention reads it
        for module in (block, block.attn):  # modules of other models may read the rate of their dropout
            for name, child in module.named_children():
                if isinstance(child, (nn.Dropout, DropPath)) and name != "attn_drop":
                    setattr(module, name, nn.Identity())
    return folded


def _computed_tensors(model: nn.Module) -> dict[int, torch.Tensor]:
    """Returns copies, by id, of the weights that hooks computed with gradients: `copy.deepcopy` refuses these."""
    return {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, torch.Tensor) and not value.is_leaf
    }


def _set_computed_weights(module: nn.Module) -> None:
    """Replaces weights that are computed at each call by their present values, in place."""
    if parametrize.is_parametrized(module):
        # Not remove_parametrizations: it edits the class, which a copy shares with its original.
        parametrizations: Any = module.parametrizations
        values = {name: getattr(module, name).detach() for name in parametrizations}
        del module.parametrizations
        module.__class__ = type(module).__bases__[0]
        for name, value in values.items():
            module.register_parameter(name, nn.Parameter(value, requires_grad=False))
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, (BasePruningMethod, WeightNorm, SpectralNorm)):
            hook.remove(module)
            del module._forward_pre_hooks[key]


def _is_plain(conv: nn.Module) -> bool:
    """Returns whether a convolution is PyTorch's own and no hook takes part in it."""
    return type(conv) is nn.Conv2d and not conv._forward_hooks and not conv._forward_pre_hooks


class FoldedResidualConv(nn.Module):
    """x + depthwise(x), as one convolution in float32 and float64, (B, C, H, W) to the same shape.

    The 1 of the residual is added to the center of the kernel. In reduced precision the sum would cost the center
    three of its eight bits (bfloat16), so the addition stays there, under autocast too.
    """

    def __init__(self, module: ResidualDepthwiseConv) -> None:
        """
        Args:
            module: Its convolution is shared, not copied.
        """
        super().__init__()
        self.conv = module.conv
        self.folded = copy.deepcopy(module.conv)
        self._fold()

    def _fold(self) -> None:
        with torch.no_grad():
            self.folded.weight.copy_(self.conv.weight)
            self.folded.weight[:, 0, 1, 1] += 1

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "FoldedResidualConv":
        super()._apply(fn, recurse)
        self._fold()  # a cast to reduced precision and back must not leave a rounded sum
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # TorchScript cannot ask whether autocast is on: PyTorch crashes.
        if not torch.jit.is_scripting() and _is_precise(x):
            return self.folded(x)
        return x + self.conv(x)


@torch.jit.unused
def _is_precise(x: torch.Tensor) -> bool:
    """Returns whether a convolution of x computes in float32 or float64."""
    if isinstance(x, torch.fx.Proxy):  # the graph must serve every dtype
        return False
    device = x.device.type
    if device not in (
        "cpu",
        "cuda",
    ):  # autocast may not know others, and torch.compile cannot ask
        return False
    return x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(device)


class TiledConvMlp(nn.Module):
    """1x1 up, activation, residual depthwise 3x3, 1x1 down, computed in tiles, (B, C, H, W) to the same shape.

    The hidden map is four times as large as the input. A tile of it stays in the cache, while the whole map would
    pass through memory three times. The map is computed whole on a GPU and for gradients, where tiles gain nothing,
    and under compilation, export and tracing, where they would fix the sizes.
    """

    def __init__(self, mlp: ConvMlp) -> None:
        """
        Args:
            mlp: Its convolutions are shared, not copied. Its dropout is left out.
        """
        super().__init__()
        self.fc1 = mlp.fc1
        self.act = mlp.act
        self.conv = FoldedResidualConv(mlp.conv)
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
        halo = self.conv.conv.dilation[0]  # rows above and below that the depthwise convolution reads
        out = x.new_empty((B, self.fc2.out_channels, H, W)).to(memory_format=torch.channels_last)
        for images in _parts(B, max(1, TILE_BYTES // (H * row_bytes))):
            for rows in _parts(H, max(MIN_TILE_ROWS, TILE_BYTES // (len(images) * row_bytes))):
                top, bottom = max(rows.start - halo, 0), min(rows.stop + halo, H)
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
    """Splits `range(length)` into the fewest parts of at most `limit`, whose sizes differ by at most one."""
    count = -(-length // limit)
    for i in range(count):
        yield range(length * i // count, length * (i + 1) // count)


def _fold_layer_scale(conv: nn.Conv2d, scale: nn.Module) -> nn.Module:
    """Folds a layer scale into the convolution before it, and returns the module that replaces it."""
    if not isinstance(scale, LayerScale2d) or not _is_plain(conv):
        return scale
    gamma = scale.gamma.double()
    conv.weight.copy_(conv.weight.double() * gamma.reshape(-1, 1, 1, 1))
    if conv.bias is not None:
        conv.bias.copy_(conv.bias.double() * gamma)
    return nn.Identity()

"""Modules for the rows of Ultralytics model files.

Checkpoints of detectors refer to these classes by their module path, so the classes must stay in this module.

Shapes:
    B        batch
    C        channels of a feature map
    H, W     height and width of an image or feature map
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import nn
from ultralytics.nn.modules import C2PSA, RepVGGDW
from ultralytics.utils import LOGGER

import stvit
from stvit.adapters.backbone import create_net, feature_maps, image_stats
from stvit.inference import fold_constants

__all__ = ["C2STA", "BackboneBatchNorm2d", "StokenAttention", "TimmBackbone"]


class BackboneBatchNorm2d(nn.BatchNorm2d):
    """Batch normalization that keeps its eps and momentum in Ultralytics.

    Ultralytics sets eps to 1e-3 and momentum to 0.03 in all modules of the exact type `nn.BatchNorm2d`. This would
    change the outputs of a pretrained backbone. Subclasses are not affected.
    """


# torch.export returns only plain lists. torch 2.6 cannot tell it from torch.compile.
_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


class FeatureMaps(list[torch.Tensor]):
    """Feature maps that a row of a model file returns, each (B, C, H, W).

    `YOLO.embed` pools the output of a row with `torch.nn.functional.adaptive_avg_pool2d`, which expects one tensor.
    PyTorch passes this call on to `__torch_function__`, which pools each map and concatenates the channels. Ultralytics
    does the same with the maps of several rows.
    """

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> torch.Tensor:
        if func is not F.adaptive_avg_pool2d:
            return NotImplemented
        return torch.cat([func(x, *args[1:], **(kwargs or {})) for x in args[0]], dim=1)


# BaseModel.fuse() calls `fuse` only of a few classes, among them RepVGGDW. Nothing else of the base class is used.
class TimmBackbone(RepVGGDW):
    """Returns feature maps of a timm model, for images as Ultralytics passes them.

    The module is row 0 of a model file: `[-1, 1, TimmBackbone, [c2, stvit_small, [1, 2, 3]]]`. Ultralytics replaces c2
    by the number of image channels. Rows with Ultralytics' `Index`, such as `[0, 1, Index, [128, 0]]`, select a map.

    Attributes:
        net: timm model, without the layers after the last feature map.
        name: Name of the model in timm.
        channels: Channels of each feature map.
        reductions: Stride of each feature map, in image pixels.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self,
        in_chans: int,
        name: str,
        out_indices: list[int],
        model_args: dict[str, Any] | None = None,
    ) -> None:
        """Creates the timm model without pretrained weights.

        Args:
            in_chans: Channels of the images.
            name: Name of a timm model with feature maps.
            out_indices: Indices of the feature maps in the model's `feature_info`, in rising order.
            model_args: Other arguments of the timm model, such as `drop_path_rate`.

        Raises:
            ValueError: If the model, a feature map or an argument does not exist.
        """
        nn.Module.__init__(self)
        self.net = create_net(name, in_chans=in_chans, **(model_args or {}))
        feature_info = feature_maps(self.net, name)
        if not out_indices or not all(0 <= index < len(feature_info) for index in out_indices):
            raise ValueError(
                f"out_indices {out_indices}: the backbone {name} has feature maps 0 to {len(feature_info) - 1}"
            )
        if out_indices != sorted(set(out_indices)):  # timm always returns them in the order of depth
            raise ValueError(f"out_indices of the backbone {name} must be in rising order, got {out_indices}")
        self.name = name
        self.in_chans = in_chans
        self.out_indices = list(out_indices)
        self.model_args = dict(model_args or {})
        self.channels = [feature_info[index]["num_chs"] for index in out_indices]
        self.reductions = [feature_info[index]["reduction"] for index in out_indices]
        self.net.prune_intermediate_layers(self.out_indices, prune_head=True)
        for module in self.net.modules():
            if type(module) is nn.BatchNorm2d:
                module.__class__ = BackboneBatchNorm2d
        # Buffers, because Ultralytics turns on the gradient of every parameter.
        for stat, values in zip(("mean", "std"), image_stats(self.net, in_chans), strict=True):
            self.register_buffer(stat, torch.tensor(values).reshape(1, in_chans, 1, 1), persistent=False)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:  # type: ignore[override]
        """Returns the feature maps of images.

        Args:
            x: Images (B, in_chans, H, W) with values from 0 to 1.

        Returns:
            Feature maps, each (B, C, H / reduction, W / reduction).

        Raises:
            ValueError: If the number of channels is wrong, or there are several feature maps and H or W is not a
                multiple of the largest reduction. A neck could not combine such feature maps.
        """
        return self._features(x)

    def forward_fuse(self, x: torch.Tensor) -> list[torch.Tensor]:  # type: ignore[override]
        """Computes the same as `forward`. Ultralytics calls this method after `fuse`."""
        return self._features(x)

    def _features(self, x: torch.Tensor) -> list[torch.Tensor]:
        if not torch.jit.is_tracing() and not torch.compiler.is_compiling():
            self._check(x)
        x = (x - self.mean) / self.std
        try:
            maps = self.net.forward_intermediates(
                x, indices=self.out_indices, output_fmt="NCHW", intermediates_only=True
            )
        except (AssertionError, IndexError) as error:  # raised by timm's models for a wrong image size
            raise ValueError(
                f"the backbone {self.name} does not accept images of {x.shape[2]}x{x.shape[3]} pixels: {error}"
            ) from error
        return maps if _is_exporting() else FeatureMaps(maps)

    def _check(self, x: torch.Tensor) -> None:
        if x.shape[1] != self.in_chans:
            raise ValueError(
                f"the backbone {self.name} expects images of {self.in_chans} channels, got {x.shape[1]}; set "
                "`channels` in the data file, or build the model for this number of channels"
            )
        stride = max(self.reductions)
        if len(self.out_indices) > 1 and (x.shape[2] % stride or x.shape[3] % stride):
            raise ValueError(
                f"height and width of an image tensor must be multiples of {stride}, got {x.shape[2]}x{x.shape[3]}; "
                "pad the tensor, or pass image files to predict, val or train"
            )

    @torch.no_grad()
    def fuse(self) -> None:
        """Folds constants in place. `BaseModel.fuse()` calls this method."""
        try:
            fold_constants(self.net)
        except ValueError as error:
            LOGGER.warning(f"The backbone {self.name} is not fused: {error}")

    def extra_repr(self) -> str:
        return f"{self.name}, in_chans={self.in_chans}, out_indices={self.out_indices}"


class StokenAttention(nn.Module):
    """Super token attention as a row of a model file, (B, C, H, W) to (B, C, H, W).

    Example: `[-1, 1, StokenAttention, [c2, 4]]`. If `from` is -1, Ultralytics replaces c2 by the width of the previous
    row, at every scale.

    With `shortcut`, the module computes x + attention(norm(x)), as a block of STViT does (figure 2). A new module is
    the identity, so a trained network still gives the same outputs when the row is added. Without `shortcut`, the
    module is only the attention, as in the published class of this name.
    """

    def __init__(
        self,
        dim: int | None = None,
        stoken_size: int | list[int] = 4,
        n_iter: int = 1,
        num_heads: int | None = None,
        shortcut: bool = True,
    ) -> None:
        """Creates the attention, which starts as the identity with `shortcut`.

        Args:
            dim: Channels of the input and the output.
            stoken_size: Height and width of a super token's cell in pixels. 1 is attention among all pixels.
            n_iter: Rounds of association and averaging.
            num_heads: Number of attention heads, which must divide `dim` (default: one per 64 channels).
            shortcut: Whether the input is normalized before the attention and added to its output.

        Raises:
            ValueError: If an argument has a wrong type or value.
        """
        super().__init__()
        dim = _check_dim("StokenAttention", dim)
        self.attn = _attention(dim, stoken_size, n_iter, num_heads)
        self.shortcut = shortcut
        if shortcut:
            self.norm = LayerNorm2d(dim)
            for parameter in self.attn.proj.parameters():
                nn.init.zeros_(parameter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns a feature map of the same shape.

        Raises:
            ValueError: If the number of channels of `x` is not that of the row.
        """
        _check_channels("StokenAttention", x, self.attn.dim)
        return x + self.attn(self.norm(x)) if self.shortcut else self.attn(x)


class C2STA(C2PSA):
    """Ultralytics' C2PSA with super token attention, (B, C, H, W) to (B, C, H, W).

    Example: `[-1, 1, C2STA, [c2]]`. If `from` is -1, Ultralytics replaces c2 by the width of the previous row, at every
    scale. The second entry of a row repeats the whole module; the argument `n` is the number of blocks inside it.
    """

    def __init__(
        self,
        c1: int | None = None,
        c2: int | None = None,
        n: int = 1,
        e: float = 0.5,
        stoken_size: int | list[int] = 4,
        n_iter: int = 1,
        num_heads: int | None = None,
    ) -> None:
        """Creates the blocks of Ultralytics' C2PSA and replaces their attention.

        Args:
            c1: Channels of the input.
            c2: Channels of the output (default: `c1`). Must equal `c1`.
            n: Number of blocks of attention and feed-forward.
            e: Channels of the blocks, divided by `c1`.
            stoken_size: Height and width of a super token's cell in pixels. 1 is attention among all pixels.
            n_iter: Rounds of association and averaging.
            num_heads: Number of attention heads (default: one per 64 channels of the blocks).

        Raises:
            ValueError: If an argument has a wrong type or value.
        """
        c1 = _check_dim("C2STA", c1)
        if c2 is not None and c2 != c1:
            raise ValueError(
                f"C2STA cannot change the number of channels, got c1={c1} and c2={c2}; put a Conv row before it"
            )
        super().__init__(c1, c1, n, e)
        self.dim = c1
        for block in self.m:
            block.attn = _attention(self.c, stoken_size, n_iter, num_heads)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns a feature map of the same shape.

        Raises:
            ValueError: If the number of channels of `x` is not that of the row.
        """
        _check_channels("C2STA", x, self.dim)
        return super().forward(x)


def _attention(dim: int, stoken_size: int | list[int], n_iter: int, num_heads: int | None) -> stvit.SuperTokenAttention:
    if num_heads is None:
        num_heads = next(heads for heads in range(max(dim // 64, 1), 0, -1) if dim % heads == 0)
    size = (stoken_size[0], stoken_size[-1]) if isinstance(stoken_size, (list, tuple)) else stoken_size
    return stvit.SuperTokenAttention(dim, stoken_size=size, n_iter=n_iter, num_heads=num_heads, qkv_bias=True)


def _check_dim(kind: str, dim: int | None) -> int:
    if not isinstance(dim, int):
        raise ValueError(
            f"the first argument of a {kind} row must be a number of channels, or c2 for the width of the previous row "
            f"as in [-1, 1, {kind}, [c2]], got {dim!r}"
        )
    return dim


def _check_channels(kind: str, x: torch.Tensor, dim: int) -> None:
    if not torch.jit.is_tracing() and not torch.compiler.is_compiling() and x.shape[1] != dim:
        raise ValueError(
            f"a {kind} row of {dim} channels got {x.shape[1]} channels; write c2 as in [-1, 1, {kind}, [c2]] for the "
            "width of the previous row at every scale"
        )

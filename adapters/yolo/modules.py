"""Modules for the rows of Ultralytics model files.

A checkpoint of a detector holds these classes by their path: they stay in this module.

Shapes:
    B        batch
    C        channels of a map
    H, W     pixels of the map
"""

import difflib
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import LayerNorm2d
from torch import nn
from ultralytics.nn.modules import C2PSA, RepVGGDW
from ultralytics.utils import LOGGER

import stvit
from stvit.inference import fold_constants
from stvit.weights.config import check_model_args

__all__ = ["C2STA", "BackboneBatchNorm2d", "StokenAttention", "TimmBackbone"]


class BackboneBatchNorm2d(nn.BatchNorm2d):
    """A backbone's own batch normalization.

    Ultralytics sets eps to 1e-3 and momentum to 0.03 in every module whose type is `nn.BatchNorm2d` itself, which
    would change what a pretrained backbone computes; it leaves a subclass alone.
    """


# torch.export returns plain lists only. torch 2.6 does not distinguish it from torch.compile.
_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


class FeatureMaps(list[torch.Tensor]):
    """Feature maps that a row of a model file gives, each (B, C, H, W).

    `YOLO.embed` pools the output of any row with `torch.nn.functional.adaptive_avg_pool2d`, which takes one map.
    PyTorch hands the call to `__torch_function__`: each map is pooled, and their channels are concatenated, as
    Ultralytics does with the maps of several rows.
    """

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> torch.Tensor:
        if func is not F.adaptive_avg_pool2d:
            return NotImplemented
        return torch.cat([func(x, *args[1:], **(kwargs or {})) for x in args[0]], dim=1)


# BaseModel.fuse() asks a RepVGGDW to fuse itself, and no other kind of module that may stand in a row: this is one by
# name alone, with nothing of its layers.
class TimmBackbone(RepVGGDW):
    """Feature maps of a timm model, STViT among them, from images as Ultralytics feeds them.

    A model file has it as row 0, `[-1, 1, TimmBackbone, [c2, stvit_small, [1, 2, 3]]]`, where Ultralytics puts the
    images' channels in the place of c2. Rows of Ultralytics' `Index`, such as `[0, 1, Index, [128, 0]]`, pick a map.

    Attributes:
        net: The timm model, without what comes after the last of the maps.
        name: Its name in timm.
        channels: Channels of each map.
        reductions: Pixels of the image for a pixel of each map, along an axis.
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
        """
        Args:
            in_chans: Channels of the images.
            name: A timm model with feature maps.
            out_indices: Which of its maps, counted from 0 as in its `feature_info`.
            model_args: Further arguments of the timm model, such as `drop_path_rate`.

        Raises:
            ValueError: If timm has no such model, or it has no such maps or arguments.
        """
        nn.Module.__init__(self)
        self.net = create_net(name, in_chans=in_chans, **(model_args or {}))
        feature_info = feature_maps(self.net, name)
        if not out_indices or not all(0 <= index < len(feature_info) for index in out_indices):
            raise ValueError(
                f"the backbone {name} has feature maps 0 to {len(feature_info) - 1}, not all of {out_indices}"
            )
        if out_indices != sorted(set(out_indices)):  # timm gives them in the order of depth, whatever is asked for
            raise ValueError(
                f"the feature maps of the backbone {name} must be named in rising order, got {out_indices}"
            )
        self.name = name
        self.in_chans = in_chans
        self.out_indices = list(out_indices)
        self.model_args = dict(model_args or {})
        self.channels = [feature_info[index]["num_chs"] for index in out_indices]
        self.reductions = [feature_info[index]["reduction"] for index in out_indices]
        prune(self.net, self.out_indices)
        for module in self.net.modules():
            if type(module) is nn.BatchNorm2d:
                module.__class__ = BackboneBatchNorm2d
        # Ultralytics turns every parameter's gradient on; constants that must not drift are buffers.
        cfg = self.net.pretrained_cfg
        for stat, default in (("mean", IMAGENET_DEFAULT_MEAN), ("std", IMAGENET_DEFAULT_STD)):
            values = torch.tensor(_for_channels(cfg.get(stat) or default, in_chans)).reshape(1, in_chans, 1, 1)
            self.register_buffer(stat, values, persistent=False)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:  # type: ignore[override]
        """
        Args:
            x: Images (B, in_chans, H, W), from 0 to 1.

        Returns:
            The maps asked for, each (B, C, H / reduction, W / reduction).

        Raises:
            ValueError: If the images have other channels, or several maps are asked for and H or W is no multiple of
                the greatest reduction, so that the maps would not fit over each other in a neck.
        """
        return self._features(x)

    def forward_fuse(self, x: torch.Tensor) -> list[torch.Tensor]:  # type: ignore[override]
        """What Ultralytics puts in the place of `forward` after `fuse`."""
        return self._features(x)

    def _features(self, x: torch.Tensor) -> list[torch.Tensor]:
        if not torch.jit.is_tracing() and not torch.compiler.is_compiling():
            self._check(x)
        x = (x - self.mean) / self.std
        try:
            maps = self.net.forward_intermediates(
                x, indices=self.out_indices, output_fmt="NCHW", intermediates_only=True
            )
        except (AssertionError, IndexError) as error:  # how models of timm refuse a size
            raise ValueError(
                f"the backbone {self.name} does not take images of {x.shape[2]}x{x.shape[3]}: {error}"
            ) from error
        return maps if _is_exporting() else FeatureMaps(maps)

    def _check(self, x: torch.Tensor) -> None:
        if x.shape[1] != self.in_chans:
            raise ValueError(
                f"the backbone {self.name} was built for images of {self.in_chans} channels, got {x.shape[1]}: set "
                "`channels` in the data file, or build the model for them"
            )
        stride = max(self.reductions)
        if len(self.out_indices) > 1 and (x.shape[2] % stride or x.shape[3] % stride):
            raise ValueError(
                f"images must be multiples of {stride} pixels high and wide, got {x.shape[2]}x{x.shape[3]}: predict, "
                "val and train see to it, a tensor has to come so"
            )

    @torch.no_grad()
    def fuse(self) -> None:
        """Folds what is constant in inference, in place; `BaseModel.fuse()` calls it."""
        try:
            fold_constants(self.net)
        except ValueError as error:
            LOGGER.warning(f"The backbone {self.name} stays unfused: {error}")

    def extra_repr(self) -> str:
        return f"{self.name}, in_chans={self.in_chans}, out_indices={self.out_indices}"


class StokenAttention(nn.Module):
    """Super token attention as a row of a model file, (B, C, H, W) to the same.

    `[-1, 1, StokenAttention, [c2, 4]]`: Ultralytics puts the width of the row before in the place of c2, at every
    scale, where `from` is -1. With `shortcut` it is x + attention(norm(x)) as in a block of STViT (figure 2), and
    begins as the identity: put into a trained network it changes nothing until it has learned. Without, it is the
    attention alone, as in the published class of this name.
    """

    def __init__(
        self,
        dim: int | None = None,
        stoken_size: int | list[int] = 4,
        n_iter: int = 1,
        num_heads: int | None = None,
        shortcut: bool = True,
    ) -> None:
        """
        Args:
            dim: Channels of the input and of the output.
            stoken_size: Pixels of a super token's cell, or its height and width; 1 is attention among all pixels.
            n_iter: Rounds of association.
            num_heads: Attention heads, which must divide `dim`; None for one for every 64 channels.
            shortcut: Whether the input is normalized first and added at the end.

        Raises:
            ValueError: If an argument is not as described.
        """
        super().__init__()
        dim = _width("StokenAttention", dim)
        self.attn = _attention(dim, stoken_size, n_iter, num_heads)
        self.shortcut = shortcut
        if shortcut:
            self.norm = LayerNorm2d(dim)
            for parameter in self.attn.proj.parameters():
                nn.init.zeros_(parameter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Raises:
            ValueError: If `x` has other channels than the row says.
        """
        _check_width("StokenAttention", x, self.attn.dim)
        return x + self.attn(self.norm(x)) if self.shortcut else self.attn(x)


class C2STA(C2PSA):
    """Ultralytics' C2PSA with super token attention for its attention, (B, C, H, W) to the same.

    `[-1, 1, C2STA, [c2]]`: Ultralytics puts the width of the row before in the place of c2, at every scale, where
    `from` is -1. `n` of a row repeats the whole of it; that of the blocks inside is an argument.
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
        """
        Args:
            c1: Channels of the input.
            c2: Channels of the output, which must be those of the input.
            n: Blocks of attention and feed-forward.
            e: Channels that the blocks see, over those of the input.
            stoken_size: As for `StokenAttention`.
            n_iter: Rounds of association.
            num_heads: As for `StokenAttention`.

        Raises:
            ValueError: If an argument is not as described.
        """
        c1 = _width("C2STA", c1)
        if c2 is not None and c2 != c1:
            raise ValueError(f"C2STA gives as many channels as it gets, got c1={c1} and c2={c2}: change them before it")
        super().__init__(c1, c1, n, e)
        self.dim = c1
        for block in self.m:
            block.attn = _attention(self.c, stoken_size, n_iter, num_heads)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Raises:
            ValueError: If `x` has other channels than the row says.
        """
        _check_width("C2STA", x, self.dim)
        return super().forward(x)


def create_net(name: str, **kwargs: Any) -> Any:
    """A timm model without its classifier, not pretrained.

    Raises:
        ValueError: If timm has no such model or the model no such argument, or an argument has a wrong range.
    """
    if not isinstance(name, str) or not timm.is_model(name.split(".")[0]):
        near = difflib.get_close_matches(str(name).split(".")[0], timm.list_models(), n=3)
        hint = f", is it one of {', '.join(near)}?" if near else ": timm.list_models() lists them"
        raise ValueError(f"unknown backbone {name!r}{hint}")
    check_model_args(kwargs)  # a model file may be somebody else's
    kwargs = as_timm_takes_them(kwargs)
    try:
        return timm.create_model(name, pretrained=False, num_classes=0, **kwargs)
    except (TypeError, RuntimeError, AssertionError) as error:
        raise ValueError(f"the backbone {name} cannot be made with {kwargs}: {error}") from error


def as_timm_takes_them(model_args: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a model out of a YAML file, which has lists for tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in model_args.items()}


def feature_maps(net: Any, name: str) -> list[dict[str, Any]]:
    """timm's `feature_info` of a model: 'num_chs' and 'reduction' of each map.

    Raises:
        ValueError: If the model has none.
    """
    feature_info = getattr(net, "feature_info", None)
    if not feature_info or not hasattr(net, "forward_intermediates"):
        raise ValueError(
            f"the backbone {name} has no feature maps in timm: take one that works with features_only=True"
        )
    return list(feature_info)


def prune(net: Any, out_indices: list[int]) -> None:
    """Removes what comes after the last of the maps asked for."""
    net.prune_intermediate_layers(out_indices, prune_head=True)


def _for_channels(values: tuple[float, ...], in_chans: int) -> list[float]:
    """Mean or deviation of red, green and blue for another number of channels, as timm adapts a first convolution."""
    if in_chans == 1:
        return [sum(values) / len(values)]
    return [values[channel % len(values)] for channel in range(in_chans)]


def _attention(dim: int, stoken_size: int | list[int], n_iter: int, num_heads: int | None) -> stvit.SuperTokenAttention:
    if num_heads is None:
        num_heads = next(heads for heads in range(max(dim // 64, 1), 0, -1) if dim % heads == 0)
    size = (stoken_size[0], stoken_size[-1]) if isinstance(stoken_size, (list, tuple)) else stoken_size
    return stvit.SuperTokenAttention(dim, stoken_size=size, n_iter=n_iter, num_heads=num_heads, qkv_bias=True)


def _width(kind: str, dim: int | None) -> int:
    if not isinstance(dim, int):
        raise ValueError(
            f"a {kind} row needs its width, a number or c2 for that of the row before, [-1, 1, {kind}, [c2]], got "
            f"{dim!r}"
        )
    return dim


def _check_width(kind: str, x: torch.Tensor, dim: int) -> None:
    if not torch.jit.is_tracing() and not torch.compiler.is_compiling() and x.shape[1] != dim:
        raise ValueError(
            f"a {kind} row of {dim} channels gets {x.shape[1]}: write c2 for its width, [-1, 1, {kind}, [c2]], and "
            "Ultralytics puts that of the row before in its place, at every scale"
        )

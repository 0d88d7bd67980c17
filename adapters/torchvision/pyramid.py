"""Feature pyramid on a timm backbone, for torchvision's detectors."""

from collections.abc import Callable

import torch
from torch import nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from stvit.adapters.backbone import TimmFeatures

__all__ = ["Pyramid"]


class Pyramid(nn.Module):
    """Returns the maps of a feature pyramid by name.

    The maps of the backbone are named '0', '1' and so on, from the largest to the smallest. `extra_blocks` adds others.

    Attributes:
        body: timm backbone.
        fpn: Feature pyramid.
        in_chans: Channels of the images.
        out_channels: Channels of each map.
    """

    def __init__(
        self,
        body: TimmFeatures,
        in_chans: int,
        out_channels: int,
        extra_blocks: ExtraFPNBlock,
        norm_layer: Callable[[int], nn.Module] | None = None,
    ) -> None:
        """Creates the feature pyramid.

        Args:
            body: timm backbone.
            in_chans: Channels of the images.
            out_channels: Channels of each map.
            extra_blocks: Makes smaller maps from the last one.
            norm_layer: Creates the normalization after each convolution; None for none.
        """
        super().__init__()
        self.body = body
        self.fpn = FeaturePyramidNetwork(body.channels, out_channels, extra_blocks, norm_layer)
        self.in_chans = in_chans
        self.out_channels = out_channels

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns the maps of images.

        Args:
            x: Normalized images (B, in_chans, H, W).

        Returns:
            Maps (B, out_channels, height, width) in the precision of the weights, under autocast too: torchvision
            computes anchors in the precision of the maps, and float16 cannot hold each pixel of a large image.

        Raises:
            ValueError: If the images have another number of channels, or a size that the backbone does not accept.
        """
        if not torch.jit.is_scripting():
            self._check(x)
        dtype = self.fpn.inner_blocks[0][0].weight.dtype
        maps: dict[str, torch.Tensor] = {}
        for i, features in enumerate(self.body(x)):
            maps[str(i)] = features
        pyramid: dict[str, torch.Tensor] = {}
        for name, features in self.fpn(maps).items():
            pyramid[name] = features.to(dtype)
        return pyramid

    @torch.jit.unused
    def _check(self, x: torch.Tensor) -> None:
        if not torch.jit.is_tracing() and x.shape[1] != self.in_chans:
            raise ValueError(
                f"the detector has in_chans={self.in_chans}, but the images have {x.shape[1]} channels; convert the "
                f"images, or build the detector with in_chans={x.shape[1]}"
            )

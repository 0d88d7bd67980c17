"""Counts the operations of a detector."""

import copy
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["Macs", "count_macs"]


class Macs(NamedTuple):
    """Multiply-accumulates of a detector for one image.

    Attributes:
        layers: Those of convolutions and linear layers.
        attention: Those of products of two activations.
    """

    layers: int
    attention: int

    @property
    def total(self) -> int:
        """The number that Swin's tables call FLOPs."""
        return self.layers + self.attention


@torch.no_grad()
def count_macs(model: Any, height: int = 800, width: int = 1280, boxes: int = 1000, masks: int = 100) -> Macs:
    """Counts the multiply-accumulates of a detector for one image.

    The defaults are the convention of Swin's tables: an image of 800x1280 pixels, 1000 boxes in each box head and 100
    in the mask head. The count uses tensors without data, so that it takes little time and memory.

    Args:
        model: Detector of this package.
        height: Height of the image in pixels, a multiple of 32.
        width: Width of the image in pixels, a multiple of 32.
        boxes: Boxes that each box head receives.
        masks: Boxes that the mask head receives.
    """
    model = copy.deepcopy(model).to("meta").eval()
    with FlopCounterMode(display=False) as counter:
        maps = model.backbone(torch.empty(1, model.backbone.in_chans, height, width, device="meta"))
        if hasattr(model, "roi_heads"):
            model.rpn.head(list(maps.values()))
            _run_heads(model.roi_heads, model.backbone.out_channels, boxes, masks)
        else:
            model.head(list(maps.values()))
    attention = sum(count for op, count in counter.get_flop_counts()["Global"].items() if "bmm" in str(op))
    return Macs((counter.get_total_flops() - attention) // 2, attention // 2)


def _run_heads(heads: Any, channels: int, boxes: int, masks: int) -> None:
    """Runs the box heads and the mask head on features of boxes."""
    pooled = torch.empty(boxes, channels, *heads.box_roi_pool.output_size, device="meta")
    is_cascade = isinstance(heads.box_head, nn.ModuleList)
    box_heads = heads.box_head if is_cascade else [heads.box_head]
    predictors = heads.box_predictor if is_cascade else [heads.box_predictor]
    for box_head, predictor in zip(box_heads, predictors, strict=True):
        predictor(box_head(pooled))
    if heads.has_mask():
        pooled = torch.empty(masks, channels, *heads.mask_roi_pool.output_size, device="meta")
        heads.mask_predictor(heads.mask_head(pooled))

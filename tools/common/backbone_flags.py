"""Flags of models with a timm backbone: detectors and segmentation models."""

import argparse
from dataclasses import dataclass
from typing import Any

from .cli import KeyValues, count, positive, rate
from .flags import flag


@dataclass
class BackboneConfig:
    """Chooses the backbone and its initial weights.

    Attributes:
        pretrained_backbone: Source of the backbone's weights; empty for the published ones, None for random ones.
    """

    backbone: str = flag("stvit_small", "any timm model with feature maps of strides 4, 8, 16 and 32", metavar="NAME")
    pretrained_backbone: str | None = flag(
        None,
        "start from ImageNet weights: those published for the backbone, or those of a tag, run, folder, file or "
        "hf-hub:ORG/NAME",
        nargs="?",
        const="",
        metavar="SOURCE",
    )
    pretrained_path: str | None = flag(
        None,
        "start from a whole model: a run, model folder or hf-hub:ORG/NAME; layers for other classes stay random",
        metavar="SOURCE",
    )
    in_chans: int = flag(3, "image channels, 1 or 3", type=positive, metavar="N")
    drop_path: float | None = flag(None, "stochastic depth rate of the last block", type=rate, metavar="X")
    frozen_stages: int = flag(0, "stages, counted from the stem, that are not trained", type=count, metavar="N")
    norm_eval: bool | None = flag(
        None,
        "keep the statistics of the backbone's BatchNorm (default: if weights are loaded)",
        action=argparse.BooleanOptionalAction,
    )
    grad_checkpointing: bool = flag(False, "recompute the backbone's activations in the backward pass, to save memory")
    backbone_kwargs: dict[str, Any] = flag(
        {}, "further arguments of the backbone", nargs="*", action=KeyValues, metavar="K=V"
    )
    model_kwargs: dict[str, Any] = flag(
        {}, "further arguments of the model", nargs="*", action=KeyValues, metavar="K=V"
    )

    def keeps_statistics(self) -> bool:
        """Returns whether the backbone's BatchNorm keeps its statistics.

        Random weights have none to keep.
        """
        if self.norm_eval is None:
            return self.pretrained_backbone is not None or self.pretrained_path is not None
        return self.norm_eval

    def backbone_source(self) -> str | bool:
        """Returns `pretrained_backbone` as the adapters take it.

        False stands for random weights.
        """
        return False if self.pretrained_backbone is None else self.pretrained_backbone or True

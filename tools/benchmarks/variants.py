"""Variants of the model that only experiments need.

Importing this module registers them in timm. Their names do not begin with "stvit", so that they are not listed beside
the models of the package.
"""

from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from torch import nn

from stvit.inference import FoldedResidualConv, TiledConvMlp
from stvit.stvit import STViT, STViTBlock
from stvit.stvit import default_cfgs as stvit_cfgs
from stvit.weights.create import build_model

__all__ = ["BlockWithoutAttention", "STViTWithoutAttention", "no_attention_stvit_pico", "optimize_blocks"]


class BlockWithoutAttention(nn.Module):
    """Position encoding and MLP of a block, (B, C, H, W) to (B, C, H, W).

    The names of the parameters are those of `STViTBlock`.
    """

    def __init__(self, block: STViTBlock) -> None:
        """Takes over the layers of a block, except for its attention branch."""
        super().__init__()
        self.cpe = block.cpe
        self.norm2, self.mlp, self.ls2, self.drop_path2 = block.norm2, block.mlp, block.ls2, block.drop_path2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.cpe(x)
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class STViTWithoutAttention(STViT):
    """STViT whose blocks have no attention.

    Only depthwise and 1x1 convolutions mix pixels and channels.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Takes the arguments of `STViT`. Those of the attention have no effect."""
        super().__init__(*args, **kwargs)
        stages: Any = self.stages
        for stage in stages:
            stage.blocks = nn.Sequential(*map(BlockWithoutAttention, stage.blocks))


def optimize_blocks(model: nn.Module) -> nn.Module:
    """Optimizes blocks without attention in place, and returns the model.

    They get the layers that `stvit.optimize_for_inference` gives other blocks.
    """
    blocks: list[Any] = [module for module in model.modules() if isinstance(module, BlockWithoutAttention)]
    for block in blocks:
        block.mlp = TiledConvMlp(block.mlp)
        block.cpe = FoldedResidualConv(block.cpe)
    return model


default_cfgs = generate_default_cfgs({"no_attention_stvit_pico": stvit_cfgs["stvit_pico"].cfgs["in1k"]})


@register_model
def no_attention_stvit_pico(pretrained: bool = False, **kwargs: Any) -> STViT:
    """Creates STViT-Pico without attention."""
    model_args = {
        "dims": (32, 64, 128, 192),
        "depths": (1, 2, 3, 1),
        "num_heads": (1, 2, 4, 6),
        "head_hidden_size": 512,
    }
    return build_model(
        STViTWithoutAttention,
        "no_attention_stvit_pico",
        pretrained,
        feature_cfg={"out_indices": (0, 1, 2, 3), "flatten_sequential": True},
        **dict(model_args, **kwargs),
    )

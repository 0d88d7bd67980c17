"""Semantic segmentation with timm backbones and decoders of smp.

smp is segmentation_models.pytorch.

    from stvit.adapters import segmentation

    model = segmentation.upernet("stvit_small", num_classes=150, pretrained_backbone=True)
    logits = model.eval()(images)  # (B, 150, H, W), at the resolution of the images

Images are normalized with `model.mean` and `model.std`, as for all models of smp.
"""

import re

_MIN_VERSION = "0.5"
_HINT = f"pip install 'stvit[segmentation]' installs it (segmentation-models-pytorch>={_MIN_VERSION})"


def _parse_version(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)[:2]]


try:
    import segmentation_models_pytorch as _smp
except ModuleNotFoundError as error:
    if error.name != "segmentation_models_pytorch":
        raise
    raise ImportError(f"stvit.adapters.segmentation needs segmentation_models.pytorch: {_HINT}") from error
if _parse_version(_smp.__version__) < _parse_version(_MIN_VERSION):
    raise ImportError(
        f"stvit.adapters.segmentation needs segmentation_models.pytorch {_MIN_VERSION}, found {_smp.__version__}: "
        f"{_HINT}"
    )

from .models import (  # noqa: E402
    AUXILIARY_WEIGHT,
    BUILDERS,
    DeepLabV3Plus,
    FCNHead,
    SemanticFPN,
    UPerNet,
    deeplabv3plus,
    load,
    semantic_fpn,
    upernet,
)

__all__ = [
    "AUXILIARY_WEIGHT",
    "BUILDERS",
    "DeepLabV3Plus",
    "FCNHead",
    "SemanticFPN",
    "UPerNet",
    "deeplabv3plus",
    "load",
    "semantic_fpn",
    "upernet",
]

"""torchvision's detectors with timm backbones.

    from stvit.adapters.torchvision import mask_rcnn

    model = mask_rcnn("stvit_small", num_classes=91, pretrained_backbone=True)

The models have torchvision's calling convention: images and targets in, losses or detections out.
"""

try:
    import torchvision  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torchvision":
        raise
    raise ImportError(
        "stvit.adapters.torchvision needs torchvision: pip install 'stvit[detection]' installs it"
    ) from error

from .cascade import CascadeRoIHeads
from .models import (
    BUILDERS,
    FCOS,
    CascadeMaskRCNN,
    CascadeRCNN,
    FasterRCNN,
    MaskRCNN,
    RetinaNet,
    cascade_mask_rcnn,
    cascade_rcnn,
    faster_rcnn,
    fcos,
    load,
    mask_rcnn,
    retinanet,
)
from .pyramid import Pyramid

__all__ = [
    "BUILDERS",
    "FCOS",
    "CascadeMaskRCNN",
    "CascadeRCNN",
    "CascadeRoIHeads",
    "FasterRCNN",
    "MaskRCNN",
    "Pyramid",
    "RetinaNet",
    "cascade_mask_rcnn",
    "cascade_rcnn",
    "faster_rcnn",
    "fcos",
    "load",
    "mask_rcnn",
    "retinanet",
]

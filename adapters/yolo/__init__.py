"""YOLO26 of Ultralytics on STViT and other timm backbones, and super token attention inside YOLO26.

    from stvit.adapters.yolo import YOLO

    model = YOLO("yolo26s-stvit_small.yaml")
    model.train(data="coco8.yaml", imgsz=640, epochs=10, optimizer="MuSGD")

Importing this package registers its modules in Ultralytics, whose own `YOLO` then takes the paths of our model files
(`model_file`) and any checkpoint of them; unpickling a checkpoint imports it.
"""

import re

_NEEDED = "8.4.190"
_HINT = f"pip install 'stvit[yolo]' brings it (ultralytics>={_NEEDED})"

try:
    import ultralytics
except ModuleNotFoundError as error:
    if error.name != "ultralytics":
        raise
    raise ImportError(f"stvit.adapters.yolo needs Ultralytics: {_HINT}") from error
if [int(part) for part in re.findall(r"\d+", ultralytics.__version__)[:3]] < [int(part) for part in _NEEDED.split(".")]:
    raise ImportError(f"stvit.adapters.yolo needs Ultralytics {_NEEDED}, found {ultralytics.__version__}: {_HINT}")

from stvit.adapters.yolo.config import model_file, stoken_config, write_config, yolo_config  # noqa: E402
from stvit.adapters.yolo.engine import (  # noqa: E402
    YOLO,
    ClassificationTrainer,
    DepthTrainer,
    DetectionTrainer,
    OBBTrainer,
    PoseTrainer,
    SegmentationTrainer,
    SemanticSegmentationTrainer,
)
from stvit.adapters.yolo.modules import C2STA, StokenAttention, TimmBackbone  # noqa: E402
from stvit.adapters.yolo.registration import register  # noqa: E402

__all__ = [
    "C2STA",
    "YOLO",
    "ClassificationTrainer",
    "DepthTrainer",
    "DetectionTrainer",
    "OBBTrainer",
    "PoseTrainer",
    "SegmentationTrainer",
    "SemanticSegmentationTrainer",
    "StokenAttention",
    "TimmBackbone",
    "model_file",
    "stoken_config",
    "write_config",
    "yolo_config",
]

register()

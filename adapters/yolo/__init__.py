"""YOLO26 of Ultralytics with timm backbones and super token attention.

    from stvit.adapters.yolo import YOLO

    model = YOLO("yolo26s-stvit_small.yaml")
    model.train(data="coco8.yaml", imgsz=640, epochs=10, optimizer="MuSGD")

Importing this package registers its modules in Ultralytics. Ultralytics' own `YOLO` then also opens our checkpoints and
the paths of our model files (`model_file`). Unpickling a checkpoint imports this package.
"""

import re

_MIN_VERSION = "8.4.190"
_HINT = f"pip install 'stvit[yolo]' installs it (ultralytics>={_MIN_VERSION})"


def _parse_version(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)[:3]]


try:
    import ultralytics
except ModuleNotFoundError as error:
    if error.name != "ultralytics":
        raise
    raise ImportError(f"stvit.adapters.yolo needs Ultralytics: {_HINT}") from error
if _parse_version(ultralytics.__version__) < _parse_version(_MIN_VERSION):
    raise ImportError(f"stvit.adapters.yolo needs Ultralytics {_MIN_VERSION}, found {ultralytics.__version__}: {_HINT}")

from .config import model_file, stoken_config, write_config, yolo_config  # noqa: E402
from .engine import (  # noqa: E402
    YOLO,
    ClassificationTrainer,
    DepthTrainer,
    DetectionTrainer,
    OBBTrainer,
    PoseTrainer,
    SegmentationTrainer,
    SemanticSegmentationTrainer,
)
from .modules import C2STA, StokenAttention, TimmBackbone  # noqa: E402
from .registration import register  # noqa: E402

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

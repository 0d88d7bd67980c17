"""Settings of the detection commands."""

import argparse
from dataclasses import dataclass

from ..common.backbone_flags import BackboneConfig
from ..common.cli import Switch, above_zero, count, positive, rate
from ..common.config import (
    DTYPES,
    DeviceConfig,
    LoadingConfig,
    OptimConfig,
    RunConfig,
    TrainDeviceConfig,
    WarmupEpochs,
    check_sides,
)
from ..common.flags import flag, section

# Functions of stvit.adapters.torchvision, and whether their models predict masks. Importing them takes seconds.
MODELS = {
    "faster_rcnn": False,
    "mask_rcnn": True,
    "cascade_rcnn": False,
    "cascade_mask_rcnn": True,
    "retinanet": False,
    "fcos": False,
}
# Half precision weights: torchvision has no such kernels.
_DTYPES = [name for name in DTYPES if name in ("float32", "float64")]


@dataclass
class ValidationDataConfig(LoadingConfig):
    """Selects and loads the validation images.

    Attributes:
        train_images: Folder of the training images.
        train_annotations: Annotation file of the training images.
    """

    data_dir: str | None = flag(
        None,
        "folder of COCO: train2017/ and val2017/, and annotations/instances_train2017.json and …_val2017.json",
        metavar="DIR",
    )
    val_images: str | None = flag(None, "folder of the validation images", metavar="DIR")
    val_annotations: str | None = flag(None, "their annotations (JSON), in COCO's format", metavar="FILE")
    check_data: bool = flag(
        True, "compare the sizes of all images with the annotations before the start",
        action=argparse.BooleanOptionalAction,
    )  # fmt: skip
    batch_size: int = flag(2, "images per step and process", type=positive, metavar="N", short="-b")
    train_images: str | None = None
    train_annotations: str | None = None


@dataclass
class TrainDataConfig(ValidationDataConfig):
    """Selects and loads the images of a training."""

    train_images: str | None = flag(None, "folder of the training images", metavar="DIR")
    train_annotations: str | None = flag(None, "their annotations (JSON), in COCO's format", metavar="FILE")
    keep_empty_images: bool = flag(False, "also train on images without objects")
    aspect_ratio_groups: int = flag(
        3, "groups of aspect ratios from 1 to 2; a batch is of one group (0: portrait and landscape)", type=count,
        metavar="N",
    )  # fmt: skip


@dataclass
class ModelConfig(BackboneConfig):
    """Chooses the detector to train and its initial weights."""

    model: str = flag("mask_rcnn", "the detector", choices=list(MODELS))


@dataclass
class ImageConfig:
    """Size and random changes of the images."""

    min_size: list[int] = flag(
        list(range(480, 801, 32)), "shorter side in training, in pixels, one of these at random", type=positive,
        nargs="+", metavar="N",
    )  # fmt: skip
    max_size: int = flag(1333, "largest longer side, in pixels", type=positive, metavar="N")
    test_size: int = flag(800, "shorter side in the evaluation, in pixels", type=positive, metavar="N")
    hflip: float = flag(0.5, "probability of a horizontal flip", type=rate, metavar="X")

    def check(self) -> None:
        """Checks that no shorter side is larger than the longest side.

        Raises:
            CommandError: If one is.
        """
        check_sides("--min-size", max(self.min_size), "--max-size", self.max_size)
        check_sides("--test-size", self.test_size, "--max-size", self.max_size)


@dataclass
class DetectionOptimConfig(OptimConfig):
    """Length of the training, optimizer, learning rate schedule and moving average.

    The defaults are the 1x schedule.
    """

    epochs: int = flag(12, "epochs to train", type=positive, metavar="N")
    lr_base: float = flag(1e-4, "learning rate for updates of --lr-base-size images", type=above_zero, metavar="X")
    lr_base_size: int = flag(16, "images per update that --lr-base is for", type=positive, metavar="N")
    sched: str = flag("multistep", "any timm learning rate schedule", metavar="NAME")
    sched_on_updates: bool = flag(
        True, "change the learning rate after each update, not after each epoch", action=Switch
    )
    warmup_epochs: int = flag(
        0, "epochs of warmup from --warmup-lr to --lr, instead of --warmup-updates (0: none)", type=count,
        action=WarmupEpochs, metavar="N",
    )  # fmt: skip
    warmup_lr: float = flag(1e-7, "learning rate of the first step", type=above_zero, metavar="X")
    warmup_updates: int | None = flag(
        500, "updates of warmup (0: none); needs --sched-on-updates", type=count, metavar="N"
    )
    min_lr: float = flag(0.0, "lowest learning rate", type=rate, metavar="X")
    decay_milestones: list[int] | None = flag(
        [8, 11], "epochs after which the learning rate decays (multistep)", type=positive, nargs="+", metavar="E"
    )
    decay_rate: float | None = flag(0.1, "factor of each decay, or the power of poly", type=above_zero, metavar="X")


@dataclass
class DetectionDeviceConfig(TrainDeviceConfig):
    """Device and precision. Images of many sizes cannot be compiled."""

    model_dtype: str = flag("float32", "precision of weights and images", choices=_DTYPES)
    compile: bool = False


@dataclass
class DetectionConfig:
    """Settings of a detection training. Each section is a group of flags."""

    data: TrainDataConfig = section("data", TrainDataConfig)
    model: ModelConfig = section("model", ModelConfig)
    image: ImageConfig = section("images and augmentation", ImageConfig)
    optim: OptimConfig = section("optimizer and schedule", DetectionOptimConfig)
    device: TrainDeviceConfig = section("device and precision", DetectionDeviceConfig)
    run: RunConfig = section("run", RunConfig)


@dataclass
class SourceConfig:
    """Chooses a trained detector."""

    checkpoint: str = flag("", "run, model folder, or model on the Hub", required=True, metavar="PATH|hf-hub:ORG/NAME")
    test_size: int | None = flag(
        None, "shorter side of the images, in pixels (default: as in training)", type=positive, metavar="N"
    )
    max_size: int | None = flag(
        None, "largest longer side, in pixels (default: as in training)", type=positive, metavar="N"
    )


@dataclass
class PlainDeviceConfig(DeviceConfig):
    """Device and precision."""

    model_dtype: str = flag("float32", "precision of weights and images", choices=_DTYPES)


@dataclass
class ValidationConfig:
    """Settings of an evaluation of a detector. Each section is a group of flags."""

    source: SourceConfig = section("model", SourceConfig)
    data: ValidationDataConfig = section("data", ValidationDataConfig)
    device: DeviceConfig = section("device and precision", PlainDeviceConfig)
    output: str | None = flag(None, "folder for results.json, per_class.csv and detections.json", metavar="DIR")


@dataclass
class PredictionConfig:
    """Settings of the detection in a folder of images.

    Each section is a group of flags.
    """

    source: SourceConfig = section("model", SourceConfig)
    device: DeviceConfig = section("device and precision", PlainDeviceConfig)
    images: str = ""
    output: str = flag(
        "predictions",
        "folder for the pictures and detections.json; only files of earlier predictions are replaced there",
        metavar="DIR",
    )
    score_thresh: float = flag(0.5, "lowest score of a detection", type=rate, metavar="X")

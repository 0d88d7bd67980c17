"""Settings of the segmentation commands, in a module that imports nothing heavy."""

import argparse
from dataclasses import dataclass

from ..common.backbone_flags import BackboneConfig
from ..common.cli import above_zero, at_least_zero, count, number, positive, rate
from ..common.config import (
    DeviceConfig,
    LoadingConfig,
    OptimConfig,
    RunConfig,
    TrainDeviceConfig,
    WarmupEpochs,
    check_sides,
)
from ..common.flags import flag, section

# Functions of stvit.adapters.segmentation. Importing them takes seconds.
MODELS = ("upernet", "semantic_fpn", "deeplabv3plus")


@dataclass
class ValidationDataConfig(LoadingConfig):
    """Selects and loads the validation images.

    Attributes:
        train_images: Folder of the training images.
        train_labels: Folder of their label maps.
    """

    data_dir: str | None = flag(
        None, "folder of ADE20K: images/ and annotations/, each with training/ and validation/", metavar="DIR"
    )
    val_images: str | None = flag(None, "folder of the validation images", metavar="DIR")
    val_labels: str | None = flag(None, "folder of their label maps: PNG files of the same names", metavar="DIR")
    class_names: str | None = flag(
        None,
        "class names: one per line, or ADE20K's objectInfo150.txt (default: the latter in --data-dir, if present)",
        metavar="FILE",
    )
    reduce_zero_label: bool | None = flag(
        None,
        "ignore value 0 of the label maps; value N is class N - 1, as in ADE20K (default: as in training)",
        action=argparse.BooleanOptionalAction,
    )
    ignore_index: int = flag(255, "value of the label maps that is ignored", type=count, metavar="N")
    check_data: bool = flag(True, "read all label maps before the start", action=argparse.BooleanOptionalAction)
    batch_size: int = flag(1, "images per step and process", type=positive, metavar="N", short="-b")
    validation_batch_size: int | None = None
    train_images: str | None = None
    train_labels: str | None = None


@dataclass
class TrainDataConfig(ValidationDataConfig):
    """Selects and loads the images of a training."""

    batch_size: int = flag(2, "images per step and process", type=positive, metavar="N", short="-b")
    validation_batch_size: int | None = flag(
        1, "images per evaluation step and process; those of one size are evaluated at once", type=positive,
        metavar="N", short="-vb",
    )  # fmt: skip
    reduce_zero_label: bool = flag(False, "ignore value 0 of the label maps; value N is class N - 1, as in ADE20K")
    train_images: str | None = flag(None, "folder of the training images", metavar="DIR")
    train_labels: str | None = flag(None, "folder of their label maps: PNG files of the same names", metavar="DIR")
    num_classes: int | None = flag(
        None, "number of classes (default: number of class names)", type=positive, metavar="N"
    )


@dataclass
class ModelConfig(BackboneConfig):
    """Chooses the model to train and its initial weights."""

    model: str = flag("upernet", "the decoder", choices=list(MODELS))


@dataclass
class ImageConfig:
    """Size and random changes of the images."""

    short_side: int = flag(512, "largest shorter side, in pixels", type=positive, metavar="N")
    long_side: int = flag(2048, "largest longer side, in pixels", type=positive, metavar="N")
    crop_size: int = flag(512, "height and width of the training crops, in pixels", type=positive, metavar="N")
    scale: list[float] = flag(
        [0.5, 2.0], "range of the random scale of training images", type=above_zero, nargs=2, metavar="X"
    )
    cat_max_ratio: float = flag(
        0.75, "largest share of one class in a crop; other crops are tried up to ten times", type=rate, metavar="X"
    )
    hflip: float = flag(0.5, "probability of a horizontal flip", type=rate, metavar="X")
    photometric_distortion: bool = flag(
        True, "change brightness, contrast, saturation and hue at random", action=argparse.BooleanOptionalAction
    )
    no_aug: bool = flag(False, "only crop, without random scales, flips and colors", action="store_true")
    mean: list[float] | None = flag(
        None, "mean of each channel, for pixels from 0 to 1 (default: the backbone's)", type=number, nargs="+",
        metavar="X",
    )  # fmt: skip
    std: list[float] | None = flag(
        None, "standard deviation of each channel (default: the backbone's)", type=above_zero, nargs="+", metavar="X"
    )

    def check(self) -> None:
        """Checks that the shorter side is not larger than the longer side.

        Raises:
            CommandError: If it is.
        """
        check_sides("--short-side", self.short_side, "--long-side", self.long_side)


@dataclass
class SegmentationOptimConfig(OptimConfig):
    """Length of the training, optimizer, learning rate schedule and moving average.

    The defaults are those of UPerNet for 160,000 updates on ADE20K.
    """

    epochs: int = flag(127, "epochs to train", type=positive, metavar="N")
    weight_decay: float = flag(0.01, "weight decay of all parameters except 1-D ones", type=number, metavar="X")
    lr_base: float = flag(6e-5, "learning rate for updates of --lr-base-size images", type=at_least_zero, metavar="X")
    lr_base_size: int = flag(16, "images per update that --lr-base is for", type=positive, metavar="N")
    sched: str = flag("poly", "any timm learning rate schedule", metavar="NAME")
    sched_on_updates: bool = flag(
        True, "change the learning rate after each update, not after each epoch", action=argparse.BooleanOptionalAction
    )
    warmup_epochs: int = flag(
        1, "epochs of warmup from --warmup-lr to --lr (0: none)", type=count, action=WarmupEpochs, metavar="N"
    )
    warmup_lr: float = flag(1e-10, "learning rate of the first step", type=at_least_zero, metavar="X")
    min_lr: float = flag(0.0, "learning rate of the last update", type=at_least_zero, metavar="X")


@dataclass
class SegmentationConfig:
    """Settings of a segmentation training. Each section is a group of flags."""

    data: TrainDataConfig = section("data", TrainDataConfig)
    model: ModelConfig = section("model", ModelConfig)
    image: ImageConfig = section("images and augmentation", ImageConfig)
    optim: SegmentationOptimConfig = section("optimizer and schedule", SegmentationOptimConfig)
    device: TrainDeviceConfig = section("device and speed", TrainDeviceConfig)
    run: RunConfig = section("run", RunConfig)


@dataclass
class SourceConfig:
    """Chooses a trained model, and the size of its images."""

    checkpoint: str = flag("", "run, model folder, or model on the Hub", required=True, metavar="PATH|hf-hub:ORG/NAME")
    short_side: int | None = flag(
        None, "largest shorter side, in pixels (default: as in training)", type=positive, metavar="N"
    )
    long_side: int | None = flag(
        None, "largest longer side, in pixels (default: as in training)", type=positive, metavar="N"
    )
    multi_scale: bool = flag(False, "average six scales from 0.5 to 1.75, each also mirrored", action="store_true")


@dataclass
class ValidationConfig:
    """Settings of an evaluation of a segmentation model.

    Each section is a group of flags.
    """

    source: SourceConfig = section("model", SourceConfig)
    data: ValidationDataConfig = section("data", ValidationDataConfig)
    device: DeviceConfig = section("device and speed", DeviceConfig)
    output: str | None = flag(None, "folder for results.json, per_class.csv and confusion.png", metavar="DIR")


@dataclass
class PredictionConfig:
    """Settings of a prediction. Each section is a group of flags.

    Attributes:
        images: Image, or folder of images.
    """

    source: SourceConfig = section("model", SourceConfig)
    device: DeviceConfig = section("device and speed", DeviceConfig)
    images: str = ""
    output: str = flag(
        "predictions", "folder of the results; only files of earlier predictions are replaced there", metavar="DIR"
    )
    opacity: float = flag(0.5, "opacity of the classes over the image", type=rate, metavar="X")

"""Settings of the export command, in a module that imports nothing heavy."""

import argparse
from dataclasses import dataclass

from ..common.cli import positive
from ..common.config import EvaluationDataConfig, ImageConfig, ModelSource
from ..common.flags import flag, section

# File suffix of each format.
SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2", "torchscript": ".torchscript"}
# Largest accepted difference from the float32 model, in standard deviations of its output. Another order of summation
# changes 1e-6, and float16 changes 1e-2. The tolerance of int8 only detects wrong files; the accuracy shows its cost.
TOLERANCES = {"float32": 1e-3, "float16": 0.1, "int8": 2.0}
MIN_OPSET = 18  # of PyTorch's exporter


@dataclass
class ResultConfig:
    """Files to write, and their contents."""

    format: list[str] = flag(["onnx"], "one or more file formats", nargs="+", choices=list(SUFFIXES))
    output: str = flag(".", "file to write, or existing folder", metavar="PATH")
    features: bool = flag(False, "return the feature maps of the stages, not logits", action="store_true")
    dtype: str = flag("float32", "precision of the computation; int8 is only for ONNX", choices=list(TOLERANCES))
    opset: int | None = flag(None, "ONNX opset, at least 18 (default: PyTorch's)", type=positive, metavar="N")
    check: bool = flag(
        True, "load each file and compare it with the model at three sizes", action=argparse.BooleanOptionalAction
    )


@dataclass
class ExportDataConfig(EvaluationDataConfig):
    """Selects the images that calibrate int8, and those that measure the accuracy."""

    train_split: str = flag("train", "split to calibrate int8 on", metavar="NAME")
    batch_size: int = flag(16, "images per step", type=positive, metavar="N", short="-b")
    calibration_images: int = flag(128, "images to calibrate int8 on", type=positive, metavar="N")

    @property
    def is_given(self) -> bool:
        """True if the flags name images."""
        return bool(self.data_dir or self.dataset)


@dataclass
class ExportConfig:
    """Settings of an export. Each section is a group of flags."""

    source: ModelSource = section("model", ModelSource)
    result: ResultConfig = section("result", ResultConfig)
    data: ExportDataConfig = section("data, to calibrate int8 and to compare the accuracy", ExportDataConfig)
    image: ImageConfig = section("image preprocessing", ImageConfig)

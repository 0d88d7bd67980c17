"""Flags of tools/benchmark.py.

This module does not import PyTorch, so that --help is fast.
"""

from dataclasses import dataclass

from ..common.cli import Switch, above_zero, count, positive
from ..common.flags import flag

DTYPES = ("float32", "bfloat16", "float16")
# Ways to run a model, in the order of the tables. The first one is the baseline.
MODEL_WAYS = ("published", "eager", "optimized", "compiled", "onnxruntime")
# Ways of `stvit benchmark gpu`. graphs are CUDA graphs of the optimized copy.
# compiled_graphs are those of a compiled training step.
GPU_WAYS = ("published", "eager", "optimized", "graphs", "compiled", "compiled_graphs")
# Parts of `stvit benchmark gpu`, most important first.
GPU_PARTS = ("models", "training", "latency", "kernels", "operator", "yolo", "profile")
# Implementations of the kernels. compiled is the reference under torch.compile.
KERNEL_WAYS = ("reference", "compiled", "triton")
# Image size and batch size of the kernels. The number of pixels is nearly the same.
KERNEL_SIZES = {224: 128, 640: 16, 1280: 4}
# What `stvit benchmark accuracy` does, in this order.
ACCURACY_PARTS = ("train", "measure")
# Stock YOLO26 detectors, and those with STViT backbones.
DETECTORS = [f"yolo26{scale}{backbone}.yaml" for scale in "nsmlx" for backbone in ("", "-stvit")]

# Detectors with the backbones of the paper.
DENSE_MODELS = [
    f"{detector}(backbone='stvit_{size}')"
    for detector in ("mask_rcnn", "cascade_mask_rcnn")
    for size in ("small", "base")
]


@dataclass
class BenchmarkConfig:
    """Flags of every subject."""

    csv: str | None = flag(None, "table to append the results to", metavar="FILE")


@dataclass
class SpeedConfig(BenchmarkConfig):
    """Flags of the subjects op, model and train.

    Attributes:
        num_classes: Number of classes; None for that of the model.
        channels_last: Whether models and images are channels_last in all ways but the published formulation.
    """

    models: list[str] = flag(
        ["stvit_small"],
        "timm models, with arguments as 'NAME(key=value)', or model files of detectors",
        nargs="+",
        metavar="NAME",
    )
    ways: list[str] = flag(
        ["published", "eager", "optimized", "compiled"],
        "ways to run them; each model uses those that it supports",
        nargs="+",
        choices=MODEL_WAYS,
    )
    img_size: list[int] = flag([224], "image heights and widths in pixels", type=positive, nargs="+", metavar="N")
    batch_size: int = flag(8, "images per step", type=positive, metavar="N", short="-b")
    dtype: str = flag("float32", "precision; in training that of autocast", choices=DTYPES)
    device: str = flag("", "cpu or cuda (default: cuda if available, else cpu)", metavar="NAME")
    repeats: int = flag(7, "turns of each model and way", type=positive, metavar="N")
    min_seconds: float = flag(
        0.2, "shortest duration of a turn; steps are repeated until it is reached", type=above_zero, metavar="S"
    )
    memory: bool = flag(True, "measure memory, in new processes (not on Windows)", action=Switch)
    plot: str | None = flag(None, "plot of the results: .png, .pdf or .svg", metavar="FILE")
    num_classes: int | None = None
    channels_last: bool = False


@dataclass
class ResolutionConfig(SpeedConfig):
    """Flags of the subject resolution."""

    published_up_to: int = flag(1536, "largest size for the published formulation", type=count, metavar="N")


@dataclass
class LoaderConfig(BenchmarkConfig):
    """Flags of the subject data."""

    data_dir: str = flag("", "folder with train/<class>/*", required=True, metavar="DIR")
    config: str | None = flag(None, "also measure the augmentation of this recipe", metavar="FILE", short="-c")
    img_size: int = flag(224, "image height and width in pixels", type=positive, metavar="N")
    batch_size: int = flag(64, "images per batch", type=positive, metavar="N", short="-b")
    images: int = flag(2000, "images to load, chosen by a fixed seed", type=positive, metavar="N")
    workers: list[int] = flag([1], "image loading processes", type=count, nargs="+", metavar="N", short="-j")
    repeats: int = flag(5, "measurements of each loader", type=positive, metavar="N")


@dataclass
class KernelConfig(BenchmarkConfig):
    """Flags of the subject kernels."""

    img_size: list[int] = flag(
        list(KERNEL_SIZES), "image heights and widths in pixels", type=positive, nargs="+", metavar="N"
    )
    batch_size: int | None = flag(
        None, "images (default: 128 at 224 pixels, 16 at 640, 4 at 1280)", type=positive, metavar="N", short="-b"
    )
    dtype: str = flag("bfloat16", "precision of pixels and products", choices=DTYPES)
    ways: list[str] = flag(list(KERNEL_WAYS), "implementations to measure", nargs="+", choices=KERNEL_WAYS)
    device: str = flag("", "cuda, or cpu to only count bytes (default: cuda if available, else cpu)", metavar="NAME")
    repeats: int = flag(7, "turns of each implementation", type=positive, metavar="N")


@dataclass
class DetectorConfig(BenchmarkConfig):
    """Flags of the subject yolo."""

    models: list[str] = flag(DETECTORS, "model files, ours or Ultralytics'", nargs="+", metavar="NAME")
    img_size: int = flag(640, "image height and width in pixels", type=positive, metavar="N")
    repeats: int = flag(5, "measurements of each model", type=positive, metavar="N")


@dataclass
class DenseConfig(BenchmarkConfig):
    """Flags of the subject dense."""

    models: list[str] = flag(
        DENSE_MODELS,
        "functions of stvit.adapters.torchvision and stvit.adapters.segmentation, as 'NAME(backbone=\"stvit_small\")'",
        nargs="+",
        metavar="CALL",
    )
    img_size: list[int] = flag(
        [800, 1280], "image height and width in pixels", type=positive, nargs=2, metavar=("H", "W")
    )
    device: str = flag("", "cpu or cuda (default: cuda if available, else cpu)", metavar="NAME")
    repeats: int = flag(5, "measurements of each model; 0 to count only parameters and GMAC", type=count, metavar="N")


@dataclass
class AccuracyConfig(BenchmarkConfig):
    """Flags of the subject accuracy."""

    models: list[str] = flag(
        [], "timm models to compare, with arguments as 'NAME(key=value)'", nargs="+", required=True, metavar="NAME"
    )
    config: str = flag("", "recipe of `stvit train` for all models", required=True, metavar="FILE", short="-c")
    data_dir: str | None = flag(None, "folder with the images of the recipe", metavar="DIR")
    seeds: list[int] = flag([1, 2, 3], "seeds; each model is trained with each", type=count, nargs="+", metavar="N")
    output: str = flag("", "folder of the runs, continued if it exists", required=True, metavar="DIR")
    parts: list[str] = flag(
        list(ACCURACY_PARTS),
        "what to do: train the models, measure speed and memory",
        nargs="+",
        choices=ACCURACY_PARTS,
    )
    img_size: list[int] = flag(
        [64, 224],
        "image sizes for speed and memory in pixels, besides that of the recipe",
        type=positive,
        nargs="+",
        metavar="N",
    )
    batch_size: int = flag(16, "images per step in the measurements", type=positive, metavar="N", short="-b")
    way: str = flag("optimized", "way to run inference", choices=("eager", "optimized", "compiled"))
    dtype: str = flag("float32", "precision of inference", choices=DTYPES)
    device: str = flag("", "cpu or cuda (default: cuda if available, else cpu)", metavar="NAME")
    repeats: int = flag(7, "turns of each model in the measurements", type=positive, metavar="N")
    min_seconds: float = flag(
        0.2, "shortest duration of a turn; steps are repeated until it is reached", type=above_zero, metavar="S"
    )
    plot: str | None = flag(None, "plot of the results: .png, .pdf or .svg", metavar="FILE")


@dataclass
class GpuConfig:
    """Flags of the subject gpu."""

    output: str = flag("", "new folder for the tables, profiles and summary.md", required=True, metavar="DIR")
    minutes: float = flag(5.0, "time limit; tables that do not fit are skipped", type=above_zero, metavar="M")
    parts: list[str] = flag(list(GPU_PARTS), "parts to measure", nargs="+", choices=GPU_PARTS)
    compile: bool = flag(True, "measure torch.compile, which takes a minute or more", action=Switch)
    device: str = flag(
        "", "cuda, or cpu to try everything at tiny sizes (default: cuda if available, else cpu)", metavar="NAME"
    )

#!/usr/bin/env python3
"""Measures speed and memory, and compares them with alternatives.

    python tools/benchmark.py op --img-size 224 640
    python tools/benchmark.py model --ways published eager optimized compiled onnxruntime
    python tools/benchmark.py model --models stvit_small swin_tiny_patch4_window7_224 convnext_tiny --plot peers.png
    python tools/benchmark.py train --batch-size 16 --dtype bfloat16
    python tools/benchmark.py resolution --models stvit_small "stvit_small(stoken_size=(8, 4, 2, 1))" --plot sizes.png
    python tools/benchmark.py data --data-dir /data/imagenet --workers 1 2 4
    python tools/benchmark.py yolo --img-size 640
    python tools/benchmark.py dense --models "mask_rcnn(backbone='stvit_small')" --img-size 800 1280
    python tools/benchmark.py kernels --dtype bfloat16 --csv kernels.csv
    python tools/benchmark.py accuracy --config configs/cls/cifar10_short.yaml --data-dir DIR --output runs/series
        --models stvit_pico "stvit_pico(stoken_size=(1, 1, 1, 1))" --seeds 1 2 3 --csv series.csv --plot series.png
    python tools/benchmark.py gpu --output gpu --minutes 5

`python -m stvit.tools.benchmark` is the same program. All candidates of a table run in turns, so that other load on the
machine affects them equally: compare only numbers of the same run. Each number is the median of the repeats, with the
minimum and the maximum. --csv appends the rows to a table, with the versions and hardware that produced them. --plot
draws them.

op, model, train, resolution: The baseline is the published formulation (tools/benchmarks/published.py). Our models are
measured as they are (eager), after stvit.optimize_for_inference (optimized), also compiled with frozen weights
(compiled), and in onnxruntime. Other timm models are measured in the same ways. GMAC counts convolutions and matrix
products. `matrix` is the achieved share of the rate of large matrix products on the same device.

data: images/s per worker of the training loader of tools/train_cls.py, with the augmentation of a recipe if --config is
passed. The baseline is a plain torchvision loader: ImageFolder with random crop, flip and normalization.

yolo: parameters, GFLOPs (two per multiply-add, in convolutions, matrix products and attention) and latency of fused
YOLO26 detectors at batch size 1, and the share of the backbone. Each scale is measured with the stock backbone and with
an STViT.

dense: parameters, GMAC and latency of the detectors and segmentation models of stvit.adapters for one image, and those
of the backbone: params_backbone and ms_backbone are shares, backbone_gmac is a number of operations.

kernels: super token sampling and upsampling on a GPU, with Triton kernels, the reference and the compiled reference.
They are measured without attention (functions) and with it (operator), forward only and with backward (both). The
floor is the time to copy the minimum number of bytes, at the bandwidth of a large copy in the same run. Without a GPU
only the bytes are counted.

accuracy: top-1 accuracy of models that are trained with the same recipe and the same seeds, beside their speed and
memory. Each model and seed is a run of `stvit train` in --output. The same command continues an interrupted series and
repeats no complete run. Started twice, it trains two runs at a time. `--parts train` only trains, `--parts measure`
only measures, and a measurement on the same machine is not repeated. The accuracy is that of the validation images
after the last epoch, with a 95 % confidence interval of each run (Wilson). low and high are the interval of the mean
over the seeds (Student's t, with the standard deviation pooled over all models). Speed is in images/s and memory in MiB
that a training step adds. Their columns contain the image size. --csv and --plot are written again after each run.
`no_attention_stvit_pico` is stvit_pico without attention (tools/benchmarks/variants.py).

gpu: everything about a GPU in one run of limited time, most important first: inference and training of stvit_small and
its peers, peak memory, latency, block sizes of the kernels, the operator, a detector and profiles. Each table is a CSV
file in --output. Tables that do not fit in the time are skipped. It needs only torch, timm and this package. Without a
GPU everything runs at tiny sizes.
"""

import argparse
import importlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stvit.tools.benchmarks import config, plots
from stvit.tools.common.cli import Parser, run, silence_libraries
from stvit.tools.common.flags import add_flags, from_flags


@dataclass
class Subject:
    """Something to measure.

    Attributes:
        description: Help text.
        config: Dataclass of its flags.
        function: Module of tools/benchmarks and its function that yields tables of rows.
        defaults: Defaults that differ from those of the dataclass.
        is_growing: Whether each table contains the one before it, and replaces it in --csv and --plot.
    """

    description: str
    config: type
    function: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    is_growing: bool = False


SUBJECTS = {
    "op": Subject(
        "time of super token attention, forward and backward",
        config.SpeedConfig,
        "models.benchmark_op",
        {"ways": ["published", "eager", "compiled"]},
    ),
    "model": Subject("images/s and latency of models", config.SpeedConfig, "models.benchmark_model"),
    "train": Subject(
        "images/s and memory of training steps",
        config.SpeedConfig,
        "models.benchmark_train",
        {"ways": ["published", "eager", "compiled"], "batch_size": 16},
    ),
    "resolution": Subject(
        "time and memory over image sizes",
        config.ResolutionConfig,
        "models.benchmark_resolution",
        {
            "ways": ["published", "eager", "optimized"],
            "img_size": [224, 320, 448, 640, 896, 1024, 1536, 2048],
            "batch_size": 1,
        },
    ),
    "data": Subject("images/s of the training loader", config.LoaderConfig, "data.benchmark"),
    "kernels": Subject("time of the operator's GPU kernels", config.KernelConfig, "kernels.benchmark"),
    "yolo": Subject("latency of YOLO26 detectors", config.DetectorConfig, "yolo.benchmark"),
    "dense": Subject("size and latency of detectors and segmentation models", config.DenseConfig, "dense.benchmark"),
    "accuracy": Subject(
        "accuracy of models trained with the same recipe, beside their cost",
        config.AccuracyConfig,
        "accuracy.benchmark",
        is_growing=True,
    ),
    "gpu": Subject("everything about a GPU in limited time", config.GpuConfig, "gpu.benchmark"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status.

    0 on success, 1 after an error, 130 after Ctrl-C.
    """
    silence_libraries()
    return run(benchmark, create_parser().parse_args(argv))


def create_parser() -> Parser:
    """Returns the parser, with a subcommand for each subject."""
    parser = Parser(prog="benchmark.py", description="Measures speed and memory, together with alternatives.")
    subjects = parser.add_subparsers(dest="subject", required=True, metavar="SUBJECT")
    for name, subject in SUBJECTS.items():
        command = subjects.add_parser(name, help=subject.description, add_help=True)
        add_flags(command, subject.config, defaults=subject.defaults)
    return parser


def benchmark(args: argparse.Namespace) -> None:
    """Measures, prints tables, appends them to --csv and draws --plot.

    Raises:
        CommandError: If something cannot be measured.
    """
    import torch  # after the flags, so that --help is fast

    from stvit.tools.benchmarks.measure import append, circumstances, default_device, print_table, replace_table

    subject = SUBJECTS[args.subject]
    settings: Any = from_flags(subject.config, args)
    if hasattr(settings, "device"):
        settings.device = settings.device or default_device()
    plot, device = getattr(settings, "plot", None), getattr(settings, "device", "cpu")
    if plot:
        plots.check(Path(plot))  # before minutes of measuring
    module, function = subject.function.split(".")
    measure = getattr(importlib.import_module(f"stvit.tools.benchmarks.{module}"), function)
    rows: list[dict[str, Any]] = []
    for table in measure(settings):  # each table is saved before the next one may fail
        print_table(table)
        if getattr(settings, "csv", None):
            write = replace_table if subject.is_growing else append
            write(Path(settings.csv), [{**circumstances(torch.device(device)), **row} for row in table])
            print(f"{'written' if subject.is_growing else 'appended'} to {settings.csv}", flush=True)
        rows = table if subject.is_growing else [*rows, *table]
        if plot and subject.is_growing:
            plots.PLOTS[args.subject](rows, Path(plot))
    if plot:
        plots.PLOTS[args.subject](rows, Path(plot))
        print(f"drawn to {plot}")


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Measures speed and memory, beside what else does the same on the same machine at the same time.

    python tools/benchmark.py op --img-size 224 640
    python tools/benchmark.py model --ways published eager optimized compiled onnxruntime
    python tools/benchmark.py model --models stvit_small swin_tiny_patch4_window7_224 convnext_tiny --plot peers.png
    python tools/benchmark.py train --batch-size 16 --dtype bfloat16
    python tools/benchmark.py resolution --models stvit_small "stvit_small(stoken_size=(8, 4, 2, 1))" --plot sizes.png
    python tools/benchmark.py data --data-dir /data/imagenet --workers 1 2 4
    python tools/benchmark.py yolo --img-size 640
    python tools/benchmark.py kernels --dtype bfloat16 --csv kernels.csv

`python -m stvit.tools.benchmark` is the same program. What is compared takes turns, so that whatever else the machine
does meets all alike: compare numbers of one run alone. Each is the median of the repeats, with the smallest and the
largest. With --csv rows are appended to a table, with what produced them; with --plot they are drawn.

op, model, train, resolution: the baseline is the published formulation (tools/benchmarks/published.py). Ours stands
beside it as it is (eager), after stvit.optimize_for_inference (optimized), compiled on top of that with its weights
frozen (compiled), and in onnxruntime; any other model of timm likewise. GMAC are those of convolutions and matrix
products; `matrix` is the part of the device's own rate for products of large matrices, measured in turn with the rest.

data: images/s of a worker of tools/train_cls.py's loader, beside torchvision's plain one (ImageFolder in a DataLoader:
random crop and flip, normalization), and with --config under that recipe's augmentation.

yolo: parameters, GFLOPs (two for a multiplication and an addition; convolutions, matrices, attention) and latency of
YOLO26 detectors, fused, one image at a time, and the part of each that is the backbone's: the rows that stand under
`backbone` in a model file. Each scale on the STViT that pairs with it beside the stock model.

kernels: super token sampling and upsampling on a GPU, Triton's kernels beside the reference and the compiled reference,
alone (functions) and with attention in between (operator), forward alone and with backward (both). Beside the times is
the floor: the fewest bytes over the bandwidth of a large copy in the same run. Without a GPU the bytes stand alone.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # during the imports Ctrl-C ends the command without a traceback

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from stvit.tools.benchmarks import data, kernels, models, plots, yolo
from stvit.tools.benchmarks.measure import append, circumstances, print_table
from stvit.tools.common.cli import Parser, run

SUBJECTS = {
    "op": ("time of super token attention, forward and backward", models.add_op_flags, models.benchmark_op),
    "model": ("images/s and latency of models", models.add_model_flags, models.benchmark_model),
    "train": ("images/s and memory of training steps", models.add_train_flags, models.benchmark_train),
    "resolution": ("time and memory over image sizes", models.add_resolution_flags, models.benchmark_resolution),
    "data": ("images/s of the loader of training images", data.add_flags, data.benchmark),
    "kernels": ("time of the operator's kernels on a GPU, and the floor", kernels.add_flags, kernels.benchmark),
    "yolo": ("latency of YOLO26 detectors", yolo.add_flags, yolo.benchmark),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status: 0, 1 after an error, 130 after Ctrl-C."""
    logging.getLogger("timm").setLevel(logging.ERROR)
    return run(benchmark, create_parser().parse_args(argv))


def create_parser() -> Parser:
    """The subjects and their flags."""
    parser = Parser(prog="benchmark.py", description="Measures speed, beside what else does the same.")
    subjects = parser.add_subparsers(dest="subject", required=True, metavar="SUBJECT")
    for name, (description, add_flags, _) in SUBJECTS.items():
        subject = subjects.add_parser(name, help=description, add_help=True)
        add_flags(subject)
        subject.add_argument("--csv", metavar="FILE", help="table to append the results to")
        if name in plots.PLOTS:
            subject.add_argument("--plot", metavar="FILE", help="picture of the results, .png, .pdf or .svg")
    return parser


def benchmark(args: argparse.Namespace) -> None:
    """Measures, prints a table, appends it to --csv and draws it as --plot.

    Raises:
        CommandError: If what is to be measured cannot be.
    """
    plot = getattr(args, "plot", None)
    if plot:
        plots.check(Path(plot))  # before anything has been measured in vain
    rows: list[dict[str, Any]] = []
    for table in SUBJECTS[args.subject][2](args):  # each is kept, whatever becomes of the next
        print_table(table)
        if args.csv:
            device = torch.device(getattr(args, "device", "cpu"))
            append(Path(args.csv), [{**circumstances(device), **row} for row in table])
            print(f"appended to {args.csv}", flush=True)
        rows += table
    if plot:
        plots.PLOTS[args.subject](rows, Path(plot))
        print(f"drawn as {plot}")


if __name__ == "__main__":
    sys.exit(main())

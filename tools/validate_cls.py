#!/usr/bin/env python3
"""Evaluates an image classifier: STViT, or any timm model.

    python tools/validate_cls.py --checkpoint runs/stvit_small_in1k --data-dir /data/imagenet
    python tools/validate_cls.py --checkpoint stvit_small_official.pth --model stvit_small --official-crop --data-dir …
    python tools/validate_cls.py --checkpoint hf-hub:ORG/NAME --data-dir /data/imagenet --real-labels --output report
    torchrun --nproc-per-node 8 tools/validate_cls.py --checkpoint … --data-dir …

`python -m stvit.tools.validate_cls` is the same program. A checkpoint is a run of tools/train_cls.py, a folder with
model.safetensors and config.json, a file of weights (of this package, timm or the authors), or a model on the Hub. The
flags for data are those of tools/train_cls.py. Each image counts once, on any number of processes.

The command prints top-1 and top-5 accuracy with 95 % confidence intervals, and the throughput. With --output DIR it
writes them to results.json, the accuracy of each class to per_class.csv, and the confusion matrix of up to 100 classes
to confusion.png.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # during the imports Ctrl-C ends the command without a traceback

import logging
import sys
from collections.abc import Sequence

from stvit.tools.common.cli import Parser, run
from stvit.tools.common.config import DataConfig, DeviceConfig, ImageConfig, ModelSource, ValidationConfig
from stvit.tools.common.flags import add_flags, from_flags
from stvit.tools.common.recipes import parse_with_recipe


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status.

    The status is 0, 1 after an error, 130 after Ctrl-C.
    """
    logging.getLogger("timm").setLevel(logging.ERROR)
    return run(validate, parse_args(argv))


def parse_args(argv: Sequence[str] | None = None) -> ValidationConfig:
    """Parses the flags.

    The command line overrides the file `--config`, which overrides the defaults.

    Raises:
        SystemExit: If a flag or a key is unknown or has a wrong type. The status is 2, the error one line.
    """
    return from_flags(ValidationConfig, parse_with_recipe(create_parser, argv))


def create_parser() -> Parser:
    """Creates the parser; the flags have timm's names."""
    parser = Parser(prog="validate_cls.py", description="Evaluates an image classifier: STViT, or any timm model.")
    parser.add_argument("--config", "-c", metavar="FILE", help="YAML file with flags as keys")

    group = parser.add_argument_group("model")
    add_flags(group, ModelSource, omit={"pretrained"})

    group = parser.add_argument_group("data")
    add_flags(group, DataConfig, defaults={"batch_size": 64}, omit={"train_split", "validation_batch_size"})
    group.add_argument(
        "--seed", "-s", type=int, default=42, metavar="N", help="seed of the run, which splits --dataset sklearn/digits"
    )
    add_flags(group, ImageConfig)
    group.add_argument(
        "--official-crop",
        action="store_true",
        help="crop as in the paper: shorter side to 256 pixels for size 224, to 384 for 384, bicubic, center crop",
    )
    group.add_argument("--class-map", metavar="FILE", help="the model's class names in order, one per line")
    group.add_argument(
        "--real-labels",
        nargs="?",
        const="",
        metavar="FILE",
        help="also report accuracy on the reassessed ImageNet labels (Beyer et al. 2020), from timm or a JSON file",
    )

    group = parser.add_argument_group("device and speed")
    add_flags(group, DeviceConfig)

    group = parser.add_argument_group("results")
    group.add_argument("--output", metavar="DIR", help="folder for results.json, per_class.csv and confusion.png")
    return parser


def validate(config: ValidationConfig) -> None:
    """Evaluates the model, prints and writes the results.

    Raises:
        CommandError: If a flag, the weights or the data are wrong.
    """
    # Imported after the flags are parsed, so that --help and wrong flags do not wait for PyTorch.
    from stvit.tools.common import validation

    validation.validate(config)


if __name__ == "__main__":
    sys.exit(main())

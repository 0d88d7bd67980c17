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

import sys
from collections.abc import Sequence

from stvit.tools.common.cli import Parser, run, silence_libraries
from stvit.tools.common.config import ValidationConfig
from stvit.tools.common.flags import add_flags, add_sections, from_flags
from stvit.tools.common.recipes import parse_with_recipe


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status.

    The status is 0, 1 after an error, 130 after Ctrl-C.
    """
    silence_libraries()
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
    add_sections(parser, ValidationConfig)
    add_flags(parser.add_argument_group("results"), ValidationConfig)
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

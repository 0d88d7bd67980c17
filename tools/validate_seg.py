#!/usr/bin/env python3
"""Evaluates a semantic segmentation model.

    python tools/validate_seg.py --checkpoint runs/upernet --data-dir ADEChallengeData2016
    python tools/validate_seg.py --checkpoint hf-hub:ORG/NAME --data-dir … --multi-scale --output report
    torchrun --nproc-per-node 8 tools/validate_seg.py --checkpoint … --data-dir …

`python -m stvit.tools.validate_seg` is the same program. A checkpoint is a run of tools/train_seg.py, a model folder,
or a model on the Hub. The flags for data are those of tools/train_seg.py. Each image counts once, on any number of
processes.

The model sees whole images: the shorter side is resized to 512 pixels, the longer side to at most 2048. Predictions are
compared with the label maps at the resolution of the label maps. The command prints mIoU, mAcc and aAcc. With
--multi-scale it also prints them for the average of six scales, each also mirrored. With --output DIR it writes them to
results.json, those of each class to per_class.csv, and the confusion matrix of up to 100 classes to confusion.png.
"""

import sys
from collections.abc import Sequence

from stvit.tools.common.cli import Parser, run, silence_libraries
from stvit.tools.common.flags import add_flags, add_sections, from_flags
from stvit.tools.common.recipes import parse_with_recipe
from stvit.tools.segmentation.config import ValidationConfig


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
    """Creates the parser."""
    parser = Parser(prog="validate_seg.py", description="Evaluates a semantic segmentation model.")
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
    from stvit.tools.segmentation import validation

    validation.validate(config)


if __name__ == "__main__":
    sys.exit(main())

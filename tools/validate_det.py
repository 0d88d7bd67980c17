#!/usr/bin/env python3
"""Evaluates an object detector on COCO, or on images in COCO's format.

    python tools/validate_det.py --checkpoint runs/mask_rcnn_1x_stvit_small --data-dir /data/coco
    python tools/validate_det.py --checkpoint hf-hub:ORG/NAME --val-images photos --val-annotations val.json
    torchrun --nproc-per-node 8 tools/validate_det.py --checkpoint … --data-dir …

`python -m stvit.tools.validate_det` is the same program. A checkpoint is a run of tools/train_det.py, a folder with
model.safetensors and config.json, or a model on the Hub. Each image counts once, on any number of processes.

The command prints COCO's metrics of boxes and, if the model has them, masks. With --output DIR it writes them to
results.json, those of each class to per_class.csv, and all detections in COCO's results format to detections.json.
"""

import sys
from collections.abc import Sequence

from stvit.tools.common.cli import Parser, run, silence_libraries
from stvit.tools.common.flags import add_flags, add_sections, from_flags
from stvit.tools.common.recipes import parse_with_recipe
from stvit.tools.detection.config import ValidationConfig


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
    parser = Parser(prog="validate_det.py", description="Evaluates an object detector on images in COCO's format.")
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
    from stvit.tools.detection.requirements import require_detection

    require_detection()
    from stvit.tools.detection import validation

    validation.validate(config)


if __name__ == "__main__":
    sys.exit(main())

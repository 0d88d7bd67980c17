#!/usr/bin/env python3
"""Predicts the class of each pixel in images.

    python tools/predict_seg.py photos/ --checkpoint runs/upernet --output predictions
    python tools/predict_seg.py photo.jpg --checkpoint hf-hub:ORG/NAME --multi-scale

`python -m stvit.tools.predict_seg` is the same program. A checkpoint is a run of tools/train_seg.py, a model folder, or
a model on the Hub.

For each image, the command writes OUTPUT/labels/NAME.png, whose values are class numbers, and OUTPUT/overlays/NAME.png,
a picture with a color for each class and a legend. Of a model that was trained with --reduce-zero-label, the label maps
have the values of ADE20K, which begin at 1.
"""

import sys
from collections.abc import Sequence

from stvit.tools.common.cli import Parser, run, silence_libraries
from stvit.tools.common.flags import add_flags, add_sections, from_flags
from stvit.tools.segmentation.config import PredictionConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status.

    The status is 0, 1 after an error, 130 after Ctrl-C.
    """
    silence_libraries()
    return run(predict, parse_args(argv))


def parse_args(argv: Sequence[str] | None = None) -> PredictionConfig:
    """Parses the flags.

    Raises:
        SystemExit: If a flag is unknown or has a wrong type. The status is 2, the error one line.
    """
    args = create_parser().parse_args(argv)
    config = from_flags(PredictionConfig, args)
    config.images = args.images
    return config


def create_parser() -> Parser:
    """Creates the parser."""
    parser = Parser(prog="predict_seg.py", description="Predicts the class of each pixel in images.")
    parser.add_argument("images", metavar="IMAGES", help="image, or folder of images")
    add_sections(parser, PredictionConfig)
    add_flags(parser.add_argument_group("results"), PredictionConfig)
    return parser


def predict(config: PredictionConfig) -> None:
    """Writes label maps and pictures.

    Raises:
        CommandError: If a flag is wrong, the model cannot be loaded, or an image cannot be read.
    """
    # Imported after the flags are parsed, so that --help and wrong flags do not wait for PyTorch.
    from stvit.tools.segmentation import prediction

    prediction.predict(config)


if __name__ == "__main__":
    sys.exit(main())

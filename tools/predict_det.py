#!/usr/bin/env python3
"""Detects objects in an image or a folder of images, and draws them.

    python tools/predict_det.py photos --checkpoint runs/mask_rcnn_1x_stvit_small
    python tools/predict_det.py bus.jpg --checkpoint hf-hub:ORG/NAME --score-thresh 0.3 --output DIR

`python -m stvit.tools.predict_det` is the same program. It writes a picture of each image with boxes, class names,
scores and masks, and all detections in COCO's results format to detections.json. Images that cannot be read are
reported and skipped.
"""

import sys
from collections.abc import Sequence

from stvit.tools.common.cli import Parser, run, silence_libraries
from stvit.tools.common.flags import add_flags, add_sections, from_flags
from stvit.tools.detection.config import PredictionConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status.

    The status is 0, 1 after an error or if an image was skipped, 130 after Ctrl-C.
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
    parser = Parser(prog="predict_det.py", description="Detects objects in images, and draws them.")
    parser.add_argument("images", metavar="IMAGES", help="image, or folder of images")
    add_sections(parser, PredictionConfig)
    add_flags(parser.add_argument_group("results"), PredictionConfig)
    return parser


def predict(config: PredictionConfig) -> None:
    """Detects, draws and writes the results.

    Raises:
        CommandError: If a flag or the weights are wrong, or images were skipped.
    """
    # Imported after the flags are parsed, so that --help and wrong flags do not wait for PyTorch.
    from stvit.tools.detection.requirements import require_detection

    require_detection()
    from stvit.tools.detection import prediction

    prediction.predict(config)


if __name__ == "__main__":
    sys.exit(main())

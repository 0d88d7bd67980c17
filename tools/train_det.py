#!/usr/bin/env python3
"""Trains an object detector on COCO, or on images in COCO's format.

    torchrun --nproc-per-node 8 tools/train_det.py --config configs/det/mask_rcnn_1x_stvit_small.yaml --data-dir COCO
    python tools/train_det.py --config configs/det/mask_rcnn_stvit_pico.yaml --train-images photos \
        --train-annotations train.json --val-images photos --val-annotations val.json

`python -m stvit.tools.train_det` is the same program. Every key of a recipe is also a flag, and a flag on the command
line overrides the recipe. The detector (--model) is one of stvit.adapters.torchvision, on any timm backbone
(--backbone) with feature maps of strides 4 to 32. The annotations are checked before the training.

The run directory <output>/<experiment>/ contains:
    config.yaml             the complete recipe
    summary.csv, curve.png  losses and COCO's metrics after each epoch, as a table and as a plot
    log.jsonl               the same and more, for programs
    best/, last/, last_ema/ weights (model.safetensors) and the config.json to load them
    checkpoints/            states from which --resume auto continues
"""

import sys
from collections.abc import Sequence

from huggingface_hub.utils import disable_progress_bars

from stvit.tools.common.cli import Parser, run, silence_libraries
from stvit.tools.common.flags import add_sections, from_flags
from stvit.tools.common.recipes import parse_with_recipe
from stvit.tools.detection.config import DetectionConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status.

    0 on success, 1 after an error, 130 after Ctrl-C, 143 after SIGTERM.
    """
    config = parse_args(argv)
    silence_libraries()
    if not sys.stderr.isatty():
        disable_progress_bars()
    return run(train, config)


def parse_args(argv: Sequence[str] | None = None) -> DetectionConfig:
    """Parses the command line.

    It overrides the recipe (`--config`), which overrides the defaults.

    Raises:
        SystemExit: With status 2 and one line on standard error, if a flag or a key is unknown or has a wrong type.
    """
    return from_flags(DetectionConfig, parse_with_recipe(create_parser, argv))


def create_parser() -> Parser:
    """Returns the parser. Flags have timm's names."""
    parser = Parser(prog="train_det.py", description="Trains an object detector on images in COCO's format.")
    parser.add_argument("--config", "-c", metavar="FILE", help="recipe (YAML) whose keys are flags of this program")
    add_sections(parser, DetectionConfig)
    return parser


def train(config: DetectionConfig) -> None:
    """Trains, evaluates after each epoch, and writes the results.

    Raises:
        CommandError: If the data, the model or the run fails, or a signal ended it.
    """
    config.image.check()
    # Imported after the flags are parsed, so that --help and wrong flags do not wait for PyTorch.
    from stvit.tools.detection.requirements import require_detection

    require_detection()
    from stvit.tools.common.engine import Engine, open_session
    from stvit.tools.detection.job import prepare

    with open_session(config) as session:
        with session.preparing():
            engine = Engine(session, config, prepare(config, session.distributed))
        engine.train()


if __name__ == "__main__":
    sys.exit(main())

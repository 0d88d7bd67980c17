#!/usr/bin/env python3
"""Trains UPerNet, Semantic FPN or DeepLabV3+ on STViT or any timm backbone.

    python tools/train_seg.py --config configs/seg/upernet_160k_stvit_small_ade20k.yaml --data-dir ADEChallengeData2016
    torchrun --nproc-per-node 8 tools/train_seg.py --config … --data-dir …

`python -m stvit.tools.train_seg` is the same program. Every key of a recipe is also a flag, and a flag on the command
line overrides the recipe. The data are images and label maps: image files in one folder, and for each image a PNG file
of the same name in another folder, whose values are class numbers. --data-dir expects the folders of ADE20K:
images/training, images/validation, annotations/training and annotations/validation. --train-images, --train-labels,
--val-images and --val-labels name other folders.

The run directory <output>/<experiment>/ is that of tools/train_cls.py:
    config.yaml             the complete recipe
    summary.csv, curve.png  metrics of each epoch, as a table and as a plot
    log.jsonl               the same and more, for programs
    best/, last/, last_ema/ weights (model.safetensors) and the config.json with which stvit.adapters loads them
    checkpoints/            states from which --resume auto continues
"""

import sys
from collections.abc import Sequence

from huggingface_hub.utils import disable_progress_bars

from stvit.tools.common.cli import Parser, run, silence_libraries
from stvit.tools.common.flags import add_sections, from_flags
from stvit.tools.common.recipes import parse_with_recipe
from stvit.tools.segmentation.config import SegmentationConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status.

    0 on success, 1 after an error, 130 after Ctrl-C, 143 after SIGTERM.
    """
    config = parse_args(argv)
    silence_libraries()
    if not sys.stderr.isatty():
        disable_progress_bars()
    return run(train, config)


def parse_args(argv: Sequence[str] | None = None) -> SegmentationConfig:
    """Parses the command line.

    It overrides the recipe (`--config`), which overrides the defaults.

    Raises:
        SystemExit: With status 2 and one line on standard error, if a flag or a key is unknown or has a wrong type.
    """
    return from_flags(SegmentationConfig, parse_with_recipe(create_parser, argv))


def create_parser() -> Parser:
    """Returns the parser. Flags have timm's names where timm has them."""
    parser = Parser(
        prog="train_seg.py", description="Trains a semantic segmentation model on STViT, or on any timm backbone."
    )
    parser.add_argument("--config", "-c", metavar="FILE", help="recipe (YAML) whose keys are flags of this program")
    add_sections(parser, SegmentationConfig)
    return parser


def train(config: SegmentationConfig) -> None:
    """Trains, evaluates after each epoch, and writes the results.

    Raises:
        CommandError: If the data, the model or the run fails, or a signal ended it.
    """
    config.image.check()
    # Imported after the flags are parsed, so that --help and wrong flags do not wait for PyTorch.
    from stvit.tools.common.engine import Engine, open_session
    from stvit.tools.segmentation.job import prepare

    with open_session(config) as session:
        with session.preparing():
            engine = Engine(session, config, prepare(config, session.distributed))
        engine.train()


if __name__ == "__main__":
    sys.exit(main())

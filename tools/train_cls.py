#!/usr/bin/env python3
"""Trains an image classifier: STViT, or any timm model.

    python tools/train_cls.py --config configs/cls/stvit_pico_digits.yaml
    torchrun --nproc-per-node 8 tools/train_cls.py --config configs/cls/stvit_small_in1k.yaml --data-dir /data/imagenet

    # on two machines with eight devices each: the same command, except for --node-rank
    torchrun --nnodes 2 --node-rank 0 --master-addr HOST --nproc-per-node 8 tools/train_cls.py --config … -b 64

`python -m stvit.tools.train_cls` is the same program. Every key of a recipe is also a flag, and a flag on the command
line overrides the recipe. The data are an image folder (--data-dir) with train/<class>/* and val/<class>/*, or with
train.tar and val.tar, or a named dataset (--dataset): `sklearn/digits` (part of scikit-learn, no download), or timm's
`torch/…`, `hfds/…` and `wds/…`.

The run directory <output>/<experiment>/ contains:
    config.yaml             the complete recipe
    summary.csv, curve.png  metrics of each epoch, as a table and as a plot
    log.jsonl               the same and more, for programs
    best/, last/, last_ema/ weights (model.safetensors) and the config.json with which timm loads them
    checkpoints/            states from which --resume auto continues
"""

import logging
import sys
from collections.abc import Sequence

from huggingface_hub.utils import disable_progress_bars

from stvit.tools.common.cli import Parser, run
from stvit.tools.common.config import ClassificationConfig
from stvit.tools.common.flags import add_sections, from_flags
from stvit.tools.common.recipes import parse_with_recipe


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status.

    0 on success, 1 after an error, 130 after Ctrl-C, 143 after SIGTERM.
    """
    config = parse_args(argv)
    for library in ("timm", "huggingface_hub"):  # this program reports their errors itself
        logging.getLogger(library).setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        disable_progress_bars()
    return run(train, config)


def create_parser() -> Parser:
    """Returns the parser. Flags have timm's names."""
    parser = Parser(prog="train_cls.py", description="Trains an image classifier: STViT, or any timm model.")
    parser.add_argument("--config", "-c", metavar="FILE", help="recipe (YAML) whose keys are flags of this program")
    add_sections(parser, ClassificationConfig)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> ClassificationConfig:
    """Parses the command line.

    It overrides the recipe (`--config`), which overrides the defaults.

    Raises:
        SystemExit: With status 2 and one line on standard error, if a flag or a key is unknown or has a wrong type.
    """
    return from_flags(ClassificationConfig, parse_with_recipe(create_parser, argv))


def train(config: ClassificationConfig) -> None:
    """Trains, evaluates after each epoch, and writes the results.

    Raises:
        CommandError: If the data, the model or the run fails, or a signal ended it.
    """
    # Imported after the flags are parsed, so that --help and wrong flags do not wait for PyTorch.
    from stvit.tools.common.classification import prepare
    from stvit.tools.common.engine import Engine, open_session

    with open_session(config) as session:
        with session.preparing():
            engine = Engine(session, config, prepare(config, session.distributed))
        engine.train()


if __name__ == "__main__":
    sys.exit(main())

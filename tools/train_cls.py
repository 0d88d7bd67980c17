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

import sys
from collections.abc import Sequence

from huggingface_hub.utils import disable_progress_bars

from stvit.tools.common.classification_flags import create_parser as create_parser
from stvit.tools.common.classification_flags import parse_args
from stvit.tools.common.cli import run, silence_libraries
from stvit.tools.common.config import ClassificationConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status.

    0 on success, 1 after an error, 130 after Ctrl-C, 143 after SIGTERM.
    """
    config = parse_args(argv)
    silence_libraries()
    if not sys.stderr.isatty():
        disable_progress_bars()
    return run(train, config)


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

#!/usr/bin/env python3
"""Pushes a run, a model folder or a checkpoint to the Hugging Face Hub.

    python tools/push_to_hub.py runs/flowers --repo-id ORG/flowers --license apache-2.0 --dry-run
    python tools/push_to_hub.py weights/stvit_small.in1k --repo-id ORG/stvit_small.in1k --private --tag v1
    python tools/push_to_hub.py stvit_small_official.pth --use-ema --repo-id ORG/stvit_small.in1k
    python tools/push_to_hub.py --yolo runs/detect/train/weights/best.pt --repo-id ORG/detector
    python tools/push_to_hub.py --space runs/flowers --repo-id ORG/flowers-demo

`python -m stvit.tools.push_to_hub` is the same program. It pushes

- of a classifier: model.safetensors, config.json and the card README.md;
- of a run of train_det.py or train_seg.py: the same files;
- of a detector of Ultralytics (--yolo): model.pt, an example picture and the card. No code of the checkpoint is run;
- with --space: the page of tools/demo.py and the model, as a Space. SOURCE may also be hf-hub:ORG/NAME.

A card that a person wrote or edited is kept, in the folder and on the Hub. After the push the command loads the model
by its commit and compares every tensor and checksum. Pushing the same files again uploads nothing. An interrupted push
changes no file and can be repeated. The token is that of `hf auth login` or HF_TOKEN.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from huggingface_hub.utils import disable_progress_bars

from stvit.tools.common.cli import Parser, run, silence_libraries
from stvit.tools.common.config import PushConfig, WeightsFlags, add_source_arguments
from stvit.tools.common.flags import add_flags, from_flags


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns the exit status.

    It is 0, 1 after an error, or 130 after Ctrl-C.
    """
    silence_libraries()
    if not sys.stderr.isatty():
        disable_progress_bars()
    args = create_parser().parse_args(argv)
    config = from_flags(PushConfig, args)
    config.origin = WeightsFlags.from_args(args)
    return run(push_to_hub, config)


def create_parser() -> Parser:
    """Returns the parser of the flags."""
    parser = Parser(prog="push_to_hub.py", description="Pushes weights to the Hugging Face Hub.")
    add_source_arguments(parser)
    group = parser.add_argument_group("push")
    add_flags(group, PushConfig)
    # Known to the parser, so that the token is refused without being printed.
    group.add_argument("--token", "--hf-token", nargs="?", action=_NoToken, help=argparse.SUPPRESS)
    return parser


class _NoToken(argparse.Action):
    def __call__(self, parser: Any, *_: Any, **__: Any) -> None:
        parser.error(
            "a token on the command line is visible in `ps` and in the history of the shell; revoke this token, and "
            "log in with `hf auth login` or set HF_TOKEN"
        )


def push_to_hub(config: PushConfig) -> None:
    """Writes the folder, pushes it and compares it with the Hub.

    Raises:
        CommandError: If the weights cannot be read, or the push fails.
    """
    # Imported after the flags are parsed, so that --help and wrong flags do not wait for PyTorch.
    from stvit.tools.common.push import write_and_push

    write_and_push(config)


if __name__ == "__main__":
    sys.exit(main())

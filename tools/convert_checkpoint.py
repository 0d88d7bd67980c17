#!/usr/bin/env python3
"""Converts a checkpoint to a folder that timm loads: model.safetensors, config.json and a card.

    python tools/convert_checkpoint.py stvit_small.pth --use-ema --model stvit_small.in1k --output weights/small
    python tools/convert_checkpoint.py small_384.pth --use-ema --model stvit_small.in1k_384 --output weights/small_384
    python tools/convert_checkpoint.py runs/flowers/checkpoints/00100-00000000.pt --no-use-ema --output weights/flowers

`python -m stvit.tools.convert_checkpoint` is the same program. SOURCE is a file of the authors (a dictionary with
`model`, `model_ema`, an optimizer, the flags of the run), of timm's training script or of tools/train_cls.py, or bare
weights. The model is recognized by the shapes of its weights; a tag as --model, stvit_small.in1k, says that they are
the published ones, with the paper's license, image size and accuracy. Of a file that holds the weights and their moving
average, say which to take: --use-ema or --no-use-ema. No code in a pickle is run: one that needs it is refused.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # during the imports Ctrl-C ends the command without a traceback

import argparse
import logging
import sys
from collections.abc import Sequence

from stvit import hub
from stvit.tools.common.cli import CommandError, Parser, run
from stvit.tools.common.release import (
    PAPER_TOP1,
    add_source_arguments,
    describe_files,
    fresh_folder,
    open_release,
    write_release,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status: 0, 1 after an error, 130 after Ctrl-C."""
    logging.getLogger("timm").setLevel(logging.ERROR)
    return run(convert, create_parser().parse_args(argv))


def create_parser() -> Parser:
    """The flags."""
    parser = Parser(prog="convert_checkpoint.py", description="Converts a checkpoint to a folder that timm loads.")
    add_source_arguments(parser)
    group = parser.add_argument_group("result")
    group.add_argument("--output", required=True, metavar="DIR", help="folder to write, which must hold nothing yet")
    group.add_argument("--license", metavar="NAME", help="of the weights, as the Hub names it: mit, apache-2.0, …")
    return parser


def convert(args: argparse.Namespace) -> None:
    """Reads, checks and writes.

    Raises:
        CommandError: If the source cannot be read, or its model is not known.
    """
    try:
        hub.check_options(None, None, False, args.license)
    except hub.HubError as error:
        raise CommandError(str(error)) from error
    with fresh_folder(args.output) as folder:
        release = open_release(args)
        write_release(release, folder, f"local-dir:{folder}", args.license)
        parameters = sum(parameter.numel() for parameter in release.model.parameters())
        cfg = release.data_config
        print(f"{release.name}: {parameters:,} parameters, {release.model.num_classes} classes", end=", ")
        print(
            f"images {'x'.join(map(str, cfg['input_size']))}; a forward pass gives finite results, and the same again"
        )
        print(f"weights: {release.details.get('weights', 'those of the folder')}")
        print(describe_files(folder))
        if f"{release.name}.in1k" in PAPER_TOP1:
            print(f"if these are the authors' published weights, --model {release.name}.in1k says so in the card")
        print("load it with")
        print(f"import stvit, timm; model = timm.create_model({f'local-dir:{folder}'!r}, pretrained=True)")


if __name__ == "__main__":
    sys.exit(main())

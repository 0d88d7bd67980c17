#!/usr/bin/env python3
"""Converts a checkpoint to a model folder that timm loads.

The folder contains model.safetensors, config.json and a card.

    python tools/convert_checkpoint.py stvit_small.pth --use-ema --model stvit_small.in1k --output weights/small
    python tools/convert_checkpoint.py small_384.pth --use-ema --model stvit_small.in1k_384 --output weights/small_384
    python tools/convert_checkpoint.py runs/flowers/checkpoints/00100-00000000.pt --no-use-ema --output weights/flowers

`python -m stvit.tools.convert_checkpoint` is the same program. SOURCE is a checkpoint of the authors, of timm's
training script or of tools/train_cls.py, or a file with only weights. The model is detected from the shapes.

- A tag as --model, such as stvit_small.in1k, states that the weights are the published ones. The card then has the
  license, the image size and the accuracy of the paper.
- If a file contains weights and their moving average, pass --use-ema or --no-use-ema to choose.
- No code in a checkpoint is run. A checkpoint that needs code is refused.
"""

import argparse
import sys
from collections.abc import Sequence

from stvit.tools.common.cli import CommandError, Parser, run, silence_libraries
from stvit.tools.common.config import WeightsFlags, add_source_arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status.

    The status is 0, 1 after an error, 130 after Ctrl-C.
    """
    silence_libraries()
    return run(convert, create_parser().parse_args(argv))


def create_parser() -> Parser:
    """Returns the parser of the flags."""
    parser = Parser(prog="convert_checkpoint.py", description="Converts a checkpoint to a folder that timm loads.")
    add_source_arguments(parser)
    group = parser.add_argument_group("result")
    group.add_argument("--output", required=True, metavar="DIR", help="folder to write; it must be missing or empty")
    group.add_argument("--license", metavar="NAME", help="license of the weights on the Hub: mit, apache-2.0, …")
    return parser


def convert(args: argparse.Namespace) -> None:
    """Opens the weights, checks them and writes the folder.

    Raises:
        CommandError: If the weights cannot be read, or their model is unknown.
    """
    # Imported after the flags are parsed, so that --help and wrong flags do not wait for PyTorch.
    from stvit.hub import HubError
    from stvit.hub.push import check_license
    from stvit.tools.common.release import PAPER_TOP1, describe_files, open_output, open_release, write_release
    from stvit.weights.source import Source

    try:
        check_license(args.license)
    except HubError as error:
        raise CommandError(str(error)) from error
    with open_output(args.output) as output:
        release = open_release(WeightsFlags.from_args(args))
        write_release(release, output, str(Source.folder(output.path or output.fresh)), args.license)
        folder = output.finish()
    parameters = sum(parameter.numel() for parameter in release.model.parameters())
    size = "x".join(map(str, release.data_config["input_size"]))
    print(f"{release.name}: {parameters:,} parameters, {release.model.num_classes} classes, images {size}")
    print("checked: the outputs are finite, and equal after saving and loading")
    print(f"weights: {release.details.weights or 'unknown, as in the folder'}")
    print(describe_files(folder))
    if f"{release.name}.in1k" in PAPER_TOP1:
        print(f"if these are the published weights, pass --model {release.name}.in1k to state it in the card")
    print("to load the model:")
    print(f"import stvit, timm; model = timm.create_model({str(Source.folder(folder))!r}, pretrained=True)")


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Serves a page that shows the classes, boxes and super tokens of an image.

    python tools/demo.py                                  # the runs in runs/, stvit_pico.cifar10, a random detector
    python tools/demo.py runs/flowers hf-hub:ORG/detector yolo26s-stvit_small.yaml
    python tools/demo.py --port 8000 --max-megabytes 5

`python -m stvit.tools.demo` is the same program. It needs `pip install 'stvit[demo]'`.

The page is at http://127.0.0.1:7860. Only this machine can open it, and there is no share link. --host 0.0.0.0 opens
it to the network. The page answers only to its own addresses and to the names of --allow-host.

A model is a run, a file, hf-hub:ORG/NAME, or a name. A model that is given by its name has random weights, except for
stvit_pico.cifar10, whose weights are part of the package. Users can type further models of the Hub into the page,
unless --no-hub is passed. `push_to_hub.py --space` publishes the page and a model as a Space of the Hugging Face Hub.

Models run in two processes: one for the models of the list, and one for models that users type in. A request that takes
longer than --max-seconds ends its process. The next request starts a new one. Each process needs a few hundred MB,
and the memory of its models.
"""

import sys
from collections.abc import Sequence
from contextlib import closing

from stvit.tools.common.cli import CommandError, Parser, reason, run
from stvit.tools.common.flags import add_sections, from_flags
from stvit.tools.demonstration.config import DemoConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns the exit status: 0, or 1 after an error."""
    return run(serve, parse_args(argv))


def create_parser() -> Parser:
    """Returns the parser of the command's flags."""
    parser = Parser(
        prog="demo.py", description="Serves a page that shows the classes, boxes and super tokens of an image."
    )
    parser.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        help="run, file, hf-hub:ORG/NAME, or a name: stvit_pico.cifar10 is trained, stvit_small has random weights",
    )
    add_sections(parser, DemoConfig)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> DemoConfig:
    """Parses the command line.

    Raises:
        SystemExit: With status 2 and one line on standard error, if a flag is wrong.
    """
    args = create_parser().parse_args(argv)
    config = from_flags(DemoConfig, args)
    config.models.names = args.models
    return config


def serve(config: DemoConfig) -> None:
    """Serves the page until a signal ends the command.

    Raises:
        CommandError: If Gradio is missing, a model is unknown, or the port is in use.
    """
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise CommandError(f"the page needs Gradio, pip install 'stvit[demo]': {reason(error)}") from error
    # Imported after the flags are parsed, so that --help and wrong flags do not wait for PyTorch.
    from stvit.tools.demonstration.computing import Computer
    from stvit.tools.demonstration.models import ModelList
    from stvit.tools.demonstration.page import Page
    from stvit.tools.demonstration.server import end_by_signals, find_port, launch, open_storage

    config.limits.check()
    with end_by_signals(), open_storage(config.limits) as storage:
        models = ModelList(config.models)
        port = find_port(config.server)
        with closing(Computer(models, config.limits)) as computer:
            page = Page(models, computer, config.limits).blocks
            url = launch(page, config, port, storage)
            computer.start()
            print(f"the page is at {url} until Ctrl-C", flush=True)
            page.block_thread()


if __name__ == "__main__":
    sys.exit(main())

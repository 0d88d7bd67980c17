#!/usr/bin/env python3
"""The `yolo` command of Ultralytics, with STViT and other timm backbones.

    python -m stvit.tools.yolo detect train model=yolo26s-stvit_small.yaml data=coco8.yaml epochs=10 optimizer=MuSGD
    python -m stvit.tools.yolo detect train model=yolo26s-stvit_small.yaml data=coco8.yaml \
        pretrained_backbone=stvit_small.in1k stock_weights=yolo26s.pt backbone_lr_scale=0.1 layer_decay=0.9
    python -m stvit.tools.yolo train resume model=runs/detect/train/weights/last.pt
    python -m stvit.tools.yolo predict model=runs/detect/train/weights/best.pt source=photos

`python tools/yolo.py` is the same program. Arguments are those of `yolo`; `yolo help` of Ultralytics lists them. Names
of model files are ours too: yolo26{n,s,m,l,x}-BACKBONE{,-seg,-sem,-pose,-obb,-depth,-cls}.yaml, where BACKBONE is
stvit_pico to stvit_large, any timm model with feature maps, `stvit` for the one that pairs with the scale, or
`stokenattention`. Five arguments are added: pretrained_backbone (a timm tag, hf-hub:org/name, a file), stock_weights
(yolo26s.pt, of the same scale), backbone_lr_scale and layer_decay (factors on the learning rate of the backbone), and
trust=true, which opens local checkpoints that hold more than a detector, and runs the code in them.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # during the imports Ctrl-C ends the command without a traceback

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from stvit.tools.common.cli import CommandError, reason, run
from stvit.weights.errors import PretrainedError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    return run(command, argparse.Namespace(arguments=arguments))


def command(args: argparse.Namespace) -> None:
    """Hands everything but our own arguments to Ultralytics."""
    try:
        options, arguments = split_options(args.arguments)
        from ultralytics.cfg import entrypoint

        with our_yolo(options), command_line(arguments):
            entrypoint()
    except (ImportError, ValueError, SyntaxError, FileNotFoundError, PretrainedError) as error:
        if os.environ.get("STVIT_TRACEBACK"):
            raise
        raise CommandError(str(error).strip() or reason(error)) from error


def split_options(arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Our own arguments with their values, and the others.

    Raises:
        CommandError: If one of ours has no value, or one that is none, or cannot be given here.
    """
    from stvit.adapters.yolo.config import RATES
    from stvit.adapters.yolo.engine import OPTIONS

    options: dict[str, Any] = {}
    others = []
    trust = False
    for argument in arguments:
        key, equals, value = argument.lstrip("-").partition("=")
        if key == "trust":
            if value.lower() not in ("", "true", "false"):
                raise CommandError(f"trust must be true or false, got {value!r}")
            trust = value.lower() != "false"
        elif key not in OPTIONS:
            others.append(argument)
        elif not equals or not value:
            raise CommandError(f"{key} needs a value: {key}=…")
        elif key in RATES:
            try:
                options[key] = float(value)
            except ValueError:
                raise CommandError(f"{key} must be a number, got {value!r}") from None
        else:
            options[key] = True if key == "pretrained_backbone" and value.lower() == "true" else value
    if options and any(other == "resume" or other.startswith("resume=") for other in others):
        raise CommandError(f"resume goes on with the run's own {', '.join(options)}: leave it out")
    return options | ({"trust": True} if trust else {}), others


@contextmanager
def our_yolo(options: dict[str, Any]) -> Iterator[None]:
    """Within, `ultralytics.YOLO` is ours: its command takes the class by that name, and there is no other way in.

    The command takes other classes for names such as rtdetr-l.pt. They open the same files as ours.
    """
    import ultralytics

    from stvit.adapters.yolo import YOLO
    from stvit.adapters.yolo.hub import check_local

    class ConfiguredYOLO(YOLO):
        def __init__(self, model: Any, task: str | None = None) -> None:
            try:
                super().__init__(model, task=task, **options)
            except RuntimeError as error:  # weights that cannot be read or do not fit
                raise ValueError(str(error)) from error

    def checked(theirs: Any) -> Any:
        class Checked(theirs):
            def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
                check_local(model, options.get("trust", False))
                super().__init__(model, *args, **kwargs)

        return Checked

    theirs = {name: getattr(ultralytics, name) for name in ("YOLO", "RTDETR", "SAM", "FastSAM", "NAS")}
    for name, kind in theirs.items():
        setattr(ultralytics, name, ConfiguredYOLO if name == "YOLO" else checked(kind))
    try:
        yield
    finally:
        for name, kind in theirs.items():
            setattr(ultralytics, name, kind)


@contextmanager
def command_line(arguments: list[str]) -> Iterator[None]:
    """Within, these are the arguments of the process: Ultralytics keeps the list that `sys.argv` was at its import."""
    before = list(sys.argv)
    sys.argv[:] = ["yolo", *arguments]
    try:
        yield
    finally:
        sys.argv[:] = before


if __name__ == "__main__":
    sys.exit(main())

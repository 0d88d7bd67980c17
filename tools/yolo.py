#!/usr/bin/env python3
r"""Runs Ultralytics' `yolo` command with STViT and other timm backbones.

    stvit yolo detect train model=yolo26s-stvit_small.yaml data=coco8.yaml epochs=10 optimizer=MuSGD
    stvit yolo detect train model=yolo26s-stvit_small.yaml data=coco8.yaml \
        pretrained_backbone=stvit_small.in1k stock_weights=yolo26s.pt backbone_lr_scale=0.1 layer_decay=0.9
    stvit yolo train resume model=runs/detect/train/weights/last.pt
    stvit yolo predict model=runs/detect/train/weights/best.pt source=photos

`python tools/yolo.py` and `python -m stvit.tools.yolo` are the same command. It takes the arguments of `yolo`.
`yolo help` lists them.

model can also be yolo26{n,s,m,l,x}-BACKBONE{,-seg,-sem,-pose,-obb,-depth,-cls}.yaml. BACKBONE is one of
    stvit_pico to stvit_large, or another timm model with feature maps
    stvit: the STViT backbone whose size suits the scale
    stokenattention: Ultralytics' own backbone with super token attention

Additional arguments:
    pretrained_backbone  weights of the backbone: a timm tag, hf-hub:org/name, a file, or true for timm's default
    stock_weights        published YOLO26 weights for neck and head, such as yolo26s.pt, of the same scale
    backbone_lr_scale    factor on the learning rate of the backbone
    layer_decay          factor on the learning rate from each layer of the backbone to the layer before it
    trust=true           opens local checkpoints that contain more than a detector; this runs their code
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from stvit.tools.common.cli import CommandError, reason, run


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status (1 after an error, 130 after Ctrl-C)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    return run(command, argparse.Namespace(arguments=arguments))


def command(args: argparse.Namespace) -> None:
    """Runs the command of Ultralytics with our model class and options."""
    from stvit.weights.errors import PretrainedError  # imported here, so that --help answers without PyTorch

    try:
        options, arguments = split_options(args.arguments)
        from ultralytics.cfg import entrypoint

        from stvit.adapters.yolo.patches import replace_arguments, replace_classes

        with replace_classes(configured_classes(options)), replace_arguments(arguments):
            entrypoint()
    except (ImportError, ValueError, SyntaxError, FileNotFoundError, PretrainedError) as error:
        if os.environ.get("STVIT_TRACEBACK"):
            raise
        raise CommandError(str(error).strip() or reason(error)) from error


def split_options(arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Separates our own arguments from those of Ultralytics.

    Returns:
        Our options by name, and the other arguments.

    Raises:
        CommandError: If one of our arguments has a wrong value or no value, or cannot be combined with resume.
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
            raise CommandError(f"{key}: expected {key}=VALUE, got no value")
        elif key in RATES:
            try:
                options[key] = float(value)
            except ValueError:
                raise CommandError(f"{key} must be a number, got {value!r}") from None
        else:
            options[key] = True if key == "pretrained_backbone" and value.lower() == "true" else value
    if options and any(other == "resume" or other.startswith("resume=") for other in others):
        raise CommandError(
            f"{', '.join(options)} cannot be changed when a run is resumed; remove it, the run keeps its own value"
        )
    return options | ({"trust": True} if trust else {}), others


def configured_classes(options: dict[str, Any]) -> dict[str, type]:
    """Returns model classes for Ultralytics' command, by the names they replace.

    `YOLO` becomes ours, with the options. For some model names the command uses other classes, such as RTDETR. These
    open the same files, so their replacements check the files first.
    """
    import ultralytics

    from stvit.adapters.yolo import YOLO
    from stvit.adapters.yolo.checkpoint import check_local

    class ConfiguredYOLO(YOLO):
        def __init__(self, model: Any, task: str | None = None) -> None:
            try:
                super().__init__(model, task=task, **options)
            except RuntimeError as error:  # weights that cannot be read or do not fit
                raise ValueError(str(error)) from error

    def add_check(kind: Any) -> type:
        class Checked(kind):
            def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
                check_local(model, options.get("trust", False))
                super().__init__(model, *args, **kwargs)

        return Checked

    others = {name: add_check(getattr(ultralytics, name)) for name in ("RTDETR", "SAM", "FastSAM", "NAS")}
    return {"YOLO": ConfiguredYOLO, **others}


if __name__ == "__main__":
    sys.exit(main())

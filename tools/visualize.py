#!/usr/bin/env python3
"""Draws the super tokens of a model over images.

    python tools/visualize.py photo.jpg                   # stvit_pico.cifar10, whose weights are part of the package
    python tools/visualize.py photo.jpg --checkpoint runs/flowers
    python tools/visualize.py photos/ --checkpoint hf-hub:ORG/flowers --stage 1 --pixel 320 240 --output pictures
    python tools/visualize.py photo.jpg --checkpoint runs/detect/train --img-size 640
    python tools/visualize.py photo.jpg --checkpoints runs/flowers
    python tools/visualize.py photos/ --checkpoint runs/flowers --masks masks/

`python -m stvit.tools.visualize` is the same command.

For each image and stage, the command writes a sheet of four pictures, OUTPUT/IMAGE/stageS.png: boundaries, mean colors,
the association with one token, and the attention of this token. It also writes each picture to a file of its own,
stageS_boundaries.png and so on.

--checkpoints compares the checkpoints of a run, or several files. For each image and stage it writes a sheet with one
row per checkpoint, oldest first, OUTPUT/IMAGE/stageS_checkpoints.png. To keep checkpoints during training, use
--checkpoint-epochs of train_cls.py or save_period of Ultralytics.

--masks also measures how well the super tokens follow the outlines of true masks, compared with the same number of SLIC
superpixels. It writes boundary recall and undersegmentation error to OUTPUT/measures.csv, and a sheet
OUTPUT/IMAGE/stageS_measures.png. SLIC needs scikit-image: pip install 'stvit[visualize]'.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from stvit.tools.common.cli import CommandError, Parser, count, positive, progress_bar, run
from stvit.tools.common.config import ModelSource
from stvit.tools.common.flags import add_flags, from_flags
from stvit.tools.visualizing.config import DrawConfig

DEFAULT_MODEL = "stvit_pico.cifar10"  # its weights are part of the package


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status (1 after an error, 130 after Ctrl-C)."""
    return run(draw, create_parser().parse_args(argv))


def create_parser() -> Parser:
    """Returns the parser of the command's flags."""
    parser = Parser(prog="visualize.py", description="Draws the super tokens of a model over images.")
    parser.add_argument("image", metavar="IMAGE", help="image file or directory of images")
    group = parser.add_argument_group("model")
    add_flags(group, ModelSource)
    group.add_argument(
        "--checkpoints", nargs="+", metavar="PATH", help="run directories or checkpoints to compare on one sheet"
    )
    group = parser.add_argument_group("pictures")
    group.add_argument("--stage", type=count, nargs="+", metavar="S", help="stages (default: all with super tokens)")
    group.add_argument("--block", type=int, default=-1, metavar="B", help="block of the stage; -1 is the last")
    which = group.add_mutually_exclusive_group()
    which.add_argument(
        "--token", type=count, metavar="N", help="token of association and attention (default: at the center)"
    )
    which.add_argument(
        "--pixel", type=count, nargs=2, metavar=("X", "Y"), help="pixel of the image that selects the token"
    )
    group.add_argument(
        "--img-size",
        type=positive,
        default=DrawConfig.img_size,
        metavar="N",
        help="largest width and height; larger images are reduced",
    )
    group.add_argument("--output", default="super_tokens", metavar="DIR", help="directory of the results")
    group = parser.add_argument_group("measures")
    group.add_argument(
        "--masks",
        metavar="DIR",
        help="directory of true masks: NAME.png or NAME_mask.png for each image, one value per object or class",
    )
    group.add_argument("--void", type=count, metavar="N", help="value of unknown pixels in the masks (default: none)")
    group.add_argument(
        "--tolerance",
        type=count,
        metavar="N",
        help="tolerance of boundary recall in pixels (default: 0.0025 times the diagonal)",
    )
    return parser


def draw(args: argparse.Namespace) -> None:
    """Draws all images, and names the unreadable ones at the end.

    Raises:
        CommandError: If a flag is wrong, the model cannot be loaded, or an image cannot be read.
    """
    # Imported here, so that --help answers without PyTorch.
    from stvit.tools.common.image_files import (
        ImageError,
        check_skipped,
        describe_skipped,
        find_images,
        open_image,
    )
    from stvit.tools.common.results import check_output
    from stvit.tools.common.viewing import LoadedModel, load_model
    from stvit.tools.visualizing import measures, pictures

    if args.checkpoint is None and args.model is None and args.checkpoints is None:
        args.model = DEFAULT_MODEL
    if args.checkpoints is not None and (args.checkpoint or args.masks):
        raise CommandError("--checkpoints cannot be combined with --checkpoint or --masks; remove one of them")
    if args.masks is None and (args.void is not None or args.tolerance is not None):
        raise CommandError("--void and --tolerance need masks; pass --masks, too")
    config = DrawConfig(
        output=Path(args.output).expanduser(),
        block=args.block,
        token=args.token,
        pixel=None if args.pixel is None else (args.pixel[0], args.pixel[1]),
        img_size=args.img_size,
        void=args.void,
        tolerance=args.tolerance,
    )
    root = Path(args.image).expanduser()
    images = find_images(root, config.output)
    check_output(config.output)
    folders = pictures.output_folders(root, images, config.output)
    masks: list[Path | None] = [None] * len(images)
    if args.masks is not None:
        measures.require_slic()
        masks = list(measures.find_masks(Path(args.masks).expanduser(), images))

    model_source = from_flags(ModelSource, args)

    def load_checkpoint(path: Path) -> LoadedModel:
        return load_model(replace(model_source, checkpoint=str(path)))

    checkpoints = [] if args.checkpoints is None else pictures.find_checkpoints(args.checkpoints)
    loaded = load_checkpoint(checkpoints[0][1]) if checkpoints else load_model(model_source)
    stages = pictures.choose_stages(args.stage, loaded)
    if loaded.trained_on:
        print(f"{loaded.title} was trained on {loaded.trained_on}; pass --checkpoint for another model")
    if loaded.is_random:
        print(f"warning: {loaded.title}: the model is untrained; pass --checkpoint", file=sys.stderr)

    errors: list[str] = []
    rows: list[dict[str, Any]] = []
    steps = len(images) * max(1, len(checkpoints))
    with progress_bar(steps, "image" if not checkpoints else "checkpoint", is_shown=steps > 1) as bar:
        for path, folder, mask in zip(images, folders, masks, strict=True):
            try:
                image = open_image(path)
                if checkpoints:
                    pictures.draw_checkpoints(checkpoints, load_checkpoint, stages, image, folder, config, bar)
                    continue
                truth = None if mask is None else measures.open_truth(mask, image)
                for stage in stages:
                    view = pictures.compute_view(loaded, image, stage, config)
                    pictures.draw_view(view, f"{loaded.title}, stage {stage}", image, folder / f"stage{stage}", config)
                    if truth is not None:
                        found = measures.measure(view, truth, folder / f"stage{stage}_measures.png", config)
                        rows += [{"image": path.name, "stage": stage, **measure} for measure in found]
            except ImageError as error:
                errors.append(describe_skipped(path, error))
            finally:
                bar.update(0 if checkpoints else 1)
    if rows:
        measures.write_measures(loaded.title, rows, config)
    done = len(images) - len(errors)
    if done:
        print(f"wrote the pictures of {done} image{'s' if done > 1 else ''} to {args.output}")
    check_skipped(errors, len(images))


if __name__ == "__main__":
    sys.exit(main())

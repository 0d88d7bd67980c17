#!/usr/bin/env python3
"""Draws the super tokens that a model sees in images: boundaries, mean colors, one token's association and attention.

    python tools/visualize.py photo.jpg --checkpoint runs/flowers
    python tools/visualize.py photos/ --checkpoint hf-hub:ORG/flowers --stage 1 --pixel 320 240 --output pictures
    python tools/visualize.py photo.jpg --checkpoint runs/detect/train --img-size 640
    python tools/visualize.py photo.jpg --checkpoints runs/flowers
    python tools/visualize.py photos/ --checkpoint runs/flowers --masks masks/

`python -m stvit.tools.visualize` is the same program. For each image and stage it writes OUT/IMAGE/stageS.png, a sheet
of the four pictures, and each by itself, stageS_boundaries.png and so on.

With --checkpoints it writes OUT/IMAGE/stageS_checkpoints.png instead, a row for each checkpoint of a run (train_cls.py
keeps those of --checkpoint-epochs, Ultralytics those of save_period), oldest first, or of each file named.

With --masks it also measures how well the super tokens keep to the outlines of true masks, beside SLIC with as many
regions: boundary recall and undersegmentation error, in OUT/measures.csv, and a sheet stageS_measures.png. SLIC is
scikit-image's (`pip install 'stvit[visualize]'`).
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # during the imports Ctrl-C ends the command without a traceback

import argparse
import csv
import re
import sys
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from tqdm import tqdm

import stvit
from stvit import visualize
from stvit.superpixels import boundaries, boundary_recall, undersegmentation_error
from stvit.tools.common.checkpoint import Checkpoints, atomic_write
from stvit.tools.common.cli import CommandError, Parser, count, positive, progress_bar, reason, run
from stvit.tools.common.model import add_model_arguments
from stvit.tools.common.viewing import (
    ImageError,
    LoadedModel,
    explain_errors,
    find_images,
    fitted,
    load_model,
    open_image,
    open_mask,
    stages_of,
)

DEFAULT_MODEL = "stvit_small"
DEFAULT_SIZE = 1024
# As `SuperTokens.panels` has them.
PICTURES = ("boundaries", "mean_colors", "association", "attention")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status: 0, 1 after an error, 130 after Ctrl-C."""
    return run(draw, create_parser().parse_args(argv))


def create_parser() -> Parser:
    """The flags."""
    parser = Parser(prog="visualize.py", description="Draws the super tokens that a model sees in images.")
    parser.add_argument("image", metavar="IMAGE", help="image, or folder of them")
    group = parser.add_argument_group("model", "with neither --checkpoint nor --model: stvit_small, random weights")
    add_model_arguments(group)
    group.add_argument(
        "--pretrained", action=argparse.BooleanOptionalAction, default=True, help="--model has its published weights"
    )
    group.add_argument(
        "--checkpoints", nargs="+", metavar="PATH", help="runs or files: a sheet with a row for each checkpoint"
    )
    group = parser.add_argument_group("what is drawn")
    group.add_argument("--stage", type=count, nargs="+", metavar="S", help="stages (default: all with super tokens)")
    group.add_argument("--block", type=int, default=-1, metavar="B", help="block of the stage (default: the last)")
    which = group.add_mutually_exclusive_group()
    which.add_argument("--token", type=count, metavar="N", help="whose association and attention (default: the middle)")
    which.add_argument(
        "--pixel", type=count, nargs=2, metavar=("X", "Y"), help="the token there, in the image's pixels"
    )
    group.add_argument(
        "--img-size", type=positive, default=DEFAULT_SIZE, metavar="N", help="longest side; larger images are reduced"
    )
    group.add_argument("--output", default="super_tokens", metavar="DIR", help="where to")
    group = parser.add_argument_group("measure")
    group.add_argument(
        "--masks",
        metavar="DIR",
        help="true masks, of the images' names with .png or _mask.png: a number for each object or class",
    )
    group.add_argument("--void", type=count, metavar="N", help="number in the masks that stands for unknown")
    group.add_argument("--tolerance", type=count, metavar="N", help="pixels of a boundary (default: 0.0025 diagonals)")
    return parser


def draw(args: argparse.Namespace) -> None:
    """Draws all images; those that cannot be read are named at the end.

    Raises:
        CommandError: If the model or a flag is at fault, or an image could not be read.
    """
    if args.checkpoint is None and args.model is None and args.checkpoints is None:
        args.model, args.pretrained = DEFAULT_MODEL, False
    if args.checkpoints is not None and (args.checkpoint or args.masks):
        raise CommandError("--checkpoints is a sheet by itself: leave --checkpoint and --masks out")
    if args.masks is None and (args.void is not None or args.tolerance is not None):
        raise CommandError("--void and --tolerance are about masks: give --masks")
    root = Path(args.image).expanduser()
    out = Path(args.output).expanduser()
    images = find_images(root, out)
    folders = _folders(root, images, out)
    if args.masks is not None:
        _require_slic()
        masks: list[Path | None] = list(_find_masks(Path(args.masks).expanduser(), images))
    else:
        masks = [None] * len(images)

    checkpoints = [] if args.checkpoints is None else _find_checkpoints(args.checkpoints)
    first = load_model(args if not checkpoints else _with_checkpoint(args, checkpoints[0][1]))
    stages = _choose_stages(args.stage, first)
    if first.is_random:
        print(f"warning: {first.title}: nothing has trained it, give --checkpoint", file=sys.stderr)

    bad: list[str] = []
    rows: list[dict[str, Any]] = []
    steps = len(images) * max(1, len(checkpoints))
    with progress_bar(steps, "image" if not checkpoints else "checkpoint", is_shown=steps > 1) as bar:
        for path, folder, mask in zip(images, folders, masks, strict=True):
            try:
                image = open_image(path)
                if checkpoints:
                    _draw_checkpoints(args, checkpoints, stages, image, folder, bar)
                    continue
                truth = None if mask is None else _open_mask(mask, image)
                for stage in stages:
                    view = _look(args, first, image, stage)
                    _draw_view(args, view, f"{first.title}, stage {stage}", image, folder, stage)
                    if truth is not None:
                        measures = _measure(args, view, truth, folder / f"stage{stage}_measures.png")
                        rows += [{"image": path.name, "stage": stage, **measure} for measure in measures]
            except ImageError as error:
                message = str(error)
                bad.append(message if path.name in message else f"{path.name}: {message}")
            finally:
                bar.update(0 if checkpoints else 1)
    if rows:
        _write_measures(args, first, rows)
    done = len(images) - len(bad)
    if done:
        print(f"wrote the pictures of {done} image{'s' if done > 1 else ''} to {args.output}")
    if bad:
        more = f"; and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise CommandError(f"{len(bad)} of {len(images)} images were left out: {'; '.join(bad[:3])}{more}")


def _with_checkpoint(args: argparse.Namespace, path: Path) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(args), "checkpoint": str(path)})


def _look(args: argparse.Namespace, viewed: LoadedModel, image: Image.Image, stage: int) -> visualize.SuperTokens:
    with explain_errors():
        return visualize.super_tokens(viewed.model, fitted(image, args.img_size), stage, args.block)


def _token(args: argparse.Namespace, view: visualize.SuperTokens, image: Image.Image) -> int:
    """The number of the token to show."""
    if args.token is not None:
        last = view.grid[0] * view.grid[1] - 1
        if args.token > last:
            raise ImageError(f"--token must be from 0 to {last} there, got {args.token}")
        return int(args.token)
    if args.pixel is None:
        return view.center
    x, y = args.pixel
    if x >= image.width or y >= image.height:
        raise ImageError(f"--pixel {x} {y} lies outside an image of {image.width}x{image.height}")
    return view.token_at(x * view.image.width // image.width, y * view.image.height // image.height)


def _draw_view(
    args: argparse.Namespace, view: visualize.SuperTokens, title: str, image: Image.Image, folder: Path, stage: int
) -> None:
    panels = view.panels(_token(args, view, image))
    _save(visualize.contact_sheet(panels, columns=2, title=title), folder / f"stage{stage}.png")
    for name, (_, picture) in zip(PICTURES, panels, strict=True):
        _save(picture, folder / f"stage{stage}_{name}.png")


def _draw_checkpoints(
    args: argparse.Namespace,
    checkpoints: Sequence[tuple[str, Path]],
    stages: Sequence[int],
    image: Image.Image,
    folder: Path,
    bar: tqdm,
) -> None:
    panels: dict[int, list[tuple[str, Image.Image]]] = {stage: [] for stage in stages}
    for label, path in checkpoints:
        viewed = load_model(_with_checkpoint(args, path))  # one after the other: all of a long run may not fit
        for stage in _choose_stages(stages, viewed):
            view = _look(args, viewed, image, stage)
            token = _token(args, view, image)
            panels[stage] += [
                (f"{label}: boundaries", view.draw_boundaries()),
                ("mean colors", view.draw_mean_colors()),
                (f"association, up to {view.association(token).max():.2f}", view.draw_association(token)),
            ]
        bar.update()
    for stage, row in panels.items():
        _save(visualize.contact_sheet(row, columns=3, panel_width=360), folder / f"stage{stage}_checkpoints.png")


def _save(picture: Image.Image, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, lambda fresh: picture.save(fresh, format="PNG"))
    except OSError as error:
        raise CommandError(f"cannot write {path}: {reason(error)}") from error


# ---------------------------------------------------------------------------------------------------------------------
# What is looked at


def _folders(root: Path, images: Sequence[Path], out: Path) -> list[Path]:
    """Returns the folder of each image's pictures: its name, with the suffix if two names differ in that or in case."""
    names = [path.relative_to(root if root.is_dir() else root.parent) for path in images]
    stems = [name.with_suffix("") for name in names]
    counts = Counter(str(stem).casefold() for stem in stems)
    return [
        out / (stem if counts[str(stem).casefold()] == 1 else name) for name, stem in zip(names, stems, strict=True)
    ]


def _choose_stages(asked: Sequence[int] | None, viewed: LoadedModel) -> list[int]:
    """The stages to draw: those asked for, else all that have super tokens."""
    stages = stages_of(viewed)
    for stage in asked or []:
        if stage not in stages:
            raise CommandError(
                f"--stage {stage} of {viewed.title} has no super tokens, choose of {', '.join(map(str, stages))}"
            )
    return sorted(set(asked)) if asked else stages


def _find_checkpoints(sources: Sequence[str]) -> list[tuple[str, Path]]:
    """What to call each checkpoint, and its path: of a run all that it kept, oldest first."""
    found: list[tuple[str, Path]] = []
    for source in sources:
        path = Path(source).expanduser()
        if not path.exists():
            raise CommandError(f"--checkpoints {source}: there is no such file or folder")
        if path.is_file():
            found.append((_label(path), path))
            continue
        files = Checkpoints(path / "checkpoints").paths() + sorted(
            (path / "weights").glob("epoch*.pt"), key=lambda file: int(re.sub(r"\D", "", file.stem) or 0)
        )
        files = files or sorted(path.glob("*.pt")) or sorted((path / "weights").glob("*.pt"))
        if not files:
            raise CommandError(f"--checkpoints {source}: no checkpoints are in it, in checkpoints/ or in weights/")
        found += [(_label(file), file) for file in files]
    return found


def _label(path: Path) -> str:
    """What to call a checkpoint: its epoch, counted from 1, if its name tells it."""
    ours = re.fullmatch(r"(\d{5})-(\d{8})", path.stem)
    if ours:  # of train_cls.py: whole epochs behind it, and updates
        epoch, step = map(int, ours.groups())
        return f"epoch {epoch}" if step == 0 else f"epoch {epoch + 1}, update {step}"
    theirs = re.fullmatch(r"epoch(\d+)", path.stem)
    return f"epoch {int(theirs[1]) + 1}" if theirs else path.stem


# ---------------------------------------------------------------------------------------------------------------------
# The measure


def _require_slic() -> None:
    try:
        import skimage.segmentation  # noqa: F401
    except ImportError as error:
        raise CommandError(
            f"--masks compares with scikit-image's SLIC: pip install 'stvit[visualize]' ({error})"
        ) from error


def _find_masks(folder: Path, images: Sequence[Path]) -> list[Path]:
    found = []
    for image in images:
        places = [folder / f"{image.stem}{end}" for end in (".png", "_mask.png")]
        mask = next((place for place in places if place.is_file()), None)
        if mask is None:
            raise CommandError(
                f"--masks {folder} holds no mask of {image.name}: neither {places[0].name} nor {places[1].name}"
            )
        found.append(mask)
    return found


def _open_mask(path: Path, image: Image.Image) -> np.ndarray:
    mask = open_mask(path)
    if mask.ndim != 2 or mask.shape != (image.height, image.width):
        raise ImageError(
            f"the mask {path} must hold one number for each of the image's {image.width}x{image.height} pixels, it has "
            f"shape {list(mask.shape)}"
        )
    return mask


def _measure(
    args: argparse.Namespace, view: visualize.SuperTokens, mask: np.ndarray, path: Path
) -> list[dict[str, Any]]:
    """Measures of the super tokens and of what they are compared with; draws a sheet of them."""
    width, height = view.image.size
    truth = np.array(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))
    regions = len(np.unique(view.labels))
    h, w = view.hard.shape
    cells = np.arange(h)[:, None] // view.stoken_size[0] * w + np.arange(w)[None] // view.stoken_size[1]
    maps = {
        "super tokens": view.labels,
        "SLIC": _slic(view.image, regions),
        "SLIC at the map's resolution": view.to_image(_slic(reduced(view), regions)),
        "cells": view.to_image(cells),
    }
    rows, panels = [], []
    for method, labels in maps.items():
        try:
            recall = boundary_recall(labels, truth, args.tolerance, args.void)
            leak = undersegmentation_error(labels, truth, args.void)
        except ValueError as error:
            raise ImageError(str(error)) from error
        rows.append(
            {
                "method": method,
                "regions": len(np.unique(labels)),
                "boundary_recall": round(recall, 4),
                "undersegmentation_error": round(leak, 4),
            }
        )
        picture = np.array(visualize.draw_boundaries(view.image, labels))
        outline = boundaries(truth, args.void).repeat(view.scale, axis=0).repeat(view.scale, axis=1)
        picture[outline] = visualize.MARK
        name = method.replace("SLIC at the map's resolution", "SLIC, coarse")
        panels.append((f"{name}: BR {recall:.3f}, UE {leak:.3f}", Image.fromarray(picture)))
    _save(visualize.contact_sheet(panels, columns=2), path)
    return rows


def reduced(view: visualize.SuperTokens) -> Image.Image:
    """The image at the map's resolution, (h, w): each pixel the mean of those that `to_image` gives its value to."""
    pixels, stride = np.asarray(view.image), view.stride
    padding = []
    for size, before, cells in zip(pixels.shape, view.offset, view.hard.shape, strict=False):
        start = before + stride // 2
        padding.append((start, max(0, cells * stride - start - size)))
    h, w = view.hard.shape
    whole = np.pad(pixels, (*padding, (0, 0)), mode="edge")[: h * stride, : w * stride]
    means = whole.reshape(h, stride, w, stride, 3).mean(axis=(1, 3))
    return Image.fromarray(means.round().astype(np.uint8))


def _slic(image: Image.Image, regions: int) -> np.ndarray:
    """SLIC's regions, (H, W), of the number nearest to that asked for that a few tries find."""
    from skimage.segmentation import slic

    pixels = np.asarray(image)
    best: np.ndarray | None = None
    asked = float(regions)
    for _ in range(8):
        labels = slic(pixels, n_segments=max(1, round(asked)), start_label=0)
        got = len(np.unique(labels))
        if best is None or abs(got - regions) < abs(len(np.unique(best)) - regions):
            best = labels
        if got == regions:
            break
        asked *= regions / got
    assert best is not None
    return np.asarray(best)


def _write_measures(args: argparse.Namespace, viewed: LoadedModel, rows: list[dict[str, Any]]) -> None:
    path = Path(args.output).expanduser() / "measures.csv"
    made = {
        "model": viewed.title,
        "img_size": args.img_size,
        "versions": f"stvit {stvit.__version__}, torch {torch.__version__}, timm {timm.__version__}",
        "date": datetime.now(timezone.utc).date().isoformat(),
    }

    def write(fresh: Path) -> None:
        with fresh.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*rows[0], *made])
            writer.writeheader()
            writer.writerows({**row, **made} for row in rows)

    try:
        atomic_write(path, write)
    except OSError as error:
        raise CommandError(f"cannot write {path}: {reason(error)}") from error
    print(f"{'stage':5}  {'method':30} {'regions':>8} {'boundary recall':>16} {'undersegmentation':>18}")
    for stage in sorted({row["stage"] for row in rows}):
        for method in dict.fromkeys(row["method"] for row in rows):
            of = [row for row in rows if (row["stage"], row["method"]) == (stage, method)]
            means = [fmean(row[key] for row in of) for key in ("regions", "boundary_recall", "undersegmentation_error")]
            print(f"{stage:5}  {method:30} {means[0]:8.0f} {means[1]:16.3f} {means[2]:18.3f}")


if __name__ == "__main__":
    sys.exit(main())

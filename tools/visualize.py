#!/usr/bin/env python3
"""Draws the super tokens of a model over images.

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

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # during the imports, Ctrl-C ends the command without a traceback

import argparse
import csv
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
from stvit.tools.common.checkpoint import Checkpoints
from stvit.tools.common.cli import CommandError, Parser, count, positive, progress_bar, reason, run
from stvit.tools.common.config import ModelSource
from stvit.tools.common.files import atomic_write
from stvit.tools.common.flags import add_flags, from_flags
from stvit.tools.common.image_files import ImageError, find_images, fit, open_image, open_mask
from stvit.tools.common.viewing import LoadedModel, explain_errors, load_model, stages_of

DEFAULT_MODEL = "stvit_small"
# Endings of the file names, in the order of `SuperTokens.panels`.
PICTURES = ("boundaries", "mean_colors", "association", "attention")


@dataclass(frozen=True)
class DrawConfig:
    """Settings for the pictures and measures.

    Attributes:
        output: Directory of the results.
        block: Index of the block in its stage.
        token: Number of the token whose association and attention are drawn.
        pixel: Pixel (x, y) of the original image. The token at this pixel is drawn if `token` is None. If both are
            None, the token at the center is drawn.
        img_size: Largest width and height. Larger images are reduced.
        void: Value of unknown pixels in the masks.
        tolerance: Tolerance of boundary recall in pixels; None for 0.0025 times the diagonal.
    """

    output: Path
    block: int = -1
    token: int | None = None
    pixel: tuple[int, int] | None = None
    img_size: int = 1024
    void: int | None = None
    tolerance: int | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status (1 after an error, 130 after Ctrl-C)."""
    return run(draw, create_parser().parse_args(argv))


def create_parser() -> Parser:
    """Returns the parser of the command's flags."""
    parser = Parser(prog="visualize.py", description="Draws the super tokens of a model over images.")
    parser.add_argument("image", metavar="IMAGE", help="image file or directory of images")
    group = parser.add_argument_group("model", "default: stvit_small with random weights")
    add_flags(group, ModelSource)
    group.add_argument(
        "--checkpoints", nargs="+", metavar="PATH", help="run directories or checkpoints to compare on one sheet"
    )
    group = parser.add_argument_group("pictures")
    group.add_argument("--stage", type=count, nargs="+", metavar="S", help="stages (default: all with super tokens)")
    group.add_argument("--block", type=int, default=-1, metavar="B", help="block of the stage (default: the last)")
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
        help=f"largest width and height; larger images are reduced (default: {DrawConfig.img_size})",
    )
    group.add_argument(
        "--output", default="super_tokens", metavar="DIR", help="directory of the results (default: super_tokens)"
    )
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
    if args.checkpoint is None and args.model is None and args.checkpoints is None:
        args.model, args.pretrained = DEFAULT_MODEL, False
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
    folders = _output_folders(root, images, config.output)
    masks: list[Path | None] = [None] * len(images)
    if args.masks is not None:
        _require_slic()
        masks = list(_find_masks(Path(args.masks).expanduser(), images))

    model_source = from_flags(ModelSource, args)

    def load_checkpoint(path: Path) -> LoadedModel:
        return load_model(replace(model_source, checkpoint=str(path)))

    checkpoints = [] if args.checkpoints is None else _find_checkpoints(args.checkpoints)
    loaded = load_checkpoint(checkpoints[0][1]) if checkpoints else load_model(model_source)
    stages = _choose_stages(args.stage, loaded)
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
                    _draw_checkpoints(checkpoints, load_checkpoint, stages, image, folder, config, bar)
                    continue
                truth = None if mask is None else _open_mask(mask, image)
                for stage in stages:
                    view = _compute_view(loaded, image, stage, config)
                    _draw_view(view, f"{loaded.title}, stage {stage}", image, folder / f"stage{stage}", config)
                    if truth is not None:
                        measures = _measure(view, truth, folder / f"stage{stage}_measures.png", config)
                        rows += [{"image": path.name, "stage": stage, **measure} for measure in measures]
            except ImageError as error:
                message = str(error)
                errors.append(message if path.name in message else f"{path.name}: {message}")
            finally:
                bar.update(0 if checkpoints else 1)
    if rows:
        _write_measures(loaded.title, rows, config)
    done = len(images) - len(errors)
    if done:
        print(f"wrote the pictures of {done} image{'s' if done > 1 else ''} to {args.output}")
    if errors:
        more = f"; and {len(errors) - 3} more" if len(errors) > 3 else ""
        raise CommandError(f"{len(errors)} of {len(images)} images were skipped: {'; '.join(errors[:3])}{more}")


def _compute_view(loaded: LoadedModel, image: Image.Image, stage: int, config: DrawConfig) -> visualize.SuperTokens:
    with explain_errors():
        return visualize.super_tokens(loaded.model, fit(image, config.img_size), stage, config.block)


def _choose_token(view: visualize.SuperTokens, image: Image.Image, config: DrawConfig) -> int:
    """Returns the number of the token whose association and attention are drawn.

    Args:
        view: Super tokens of the reduced image.
        image: Original image, to which `config.pixel` refers.
        config: Settings.

    Raises:
        ImageError: If the token does not exist in this image.
    """
    if config.token is not None:
        last = view.grid[0] * view.grid[1] - 1
        if config.token > last:
            raise ImageError(f"--token must be from 0 to {last} for this image, got {config.token}")
        return config.token
    if config.pixel is None:
        return view.center
    x, y = config.pixel
    if x >= image.width or y >= image.height:
        raise ImageError(f"--pixel {x} {y} is outside the image of {image.width}x{image.height} pixels")
    return view.token_at(x * view.image.width // image.width, y * view.image.height // image.height)


def _draw_view(view: visualize.SuperTokens, title: str, image: Image.Image, path: Path, config: DrawConfig) -> None:
    """Writes the sheet and the four pictures.

    Args:
        view: Super tokens.
        title: Title of the sheet.
        image: Original image.
        path: Path of the sheet, without its suffix.
        config: Settings.
    """
    panels = view.panels(_choose_token(view, image, config))
    _save(visualize.contact_sheet(panels, columns=2, title=title), path.with_name(f"{path.name}.png"))
    for name, (_, picture) in zip(PICTURES, panels, strict=True):
        _save(picture, path.with_name(f"{path.name}_{name}.png"))


def _draw_checkpoints(
    checkpoints: Sequence[tuple[str, Path]],
    load_checkpoint: Callable[[Path], LoadedModel],
    stages: Sequence[int],
    image: Image.Image,
    folder: Path,
    config: DrawConfig,
    bar: tqdm,
) -> None:
    """Writes a sheet for each stage, with one row per checkpoint."""
    panels: dict[int, list[tuple[str, Image.Image]]] = {stage: [] for stage in stages}
    for label, path in checkpoints:
        loaded = load_checkpoint(path)  # one at a time: the models of a long run may not fit into memory
        for stage in _choose_stages(stages, loaded):
            view = _compute_view(loaded, image, stage, config)
            token = _choose_token(view, image, config)
            highest = view.association_map(token).max()
            panels[stage] += [
                (f"{label}: boundaries", view.draw_boundaries()),
                ("mean colors", view.draw_mean_colors()),
                (f"association, up to {highest:.2f}", view.draw_association(token)),
            ]
        bar.update()
    for stage, row in panels.items():
        _save(visualize.contact_sheet(row, columns=3, panel_width=360), folder / f"stage{stage}_checkpoints.png")


def _save(picture: Image.Image, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, lambda temporary: picture.save(temporary, format="PNG"))
    except OSError as error:
        raise CommandError(f"cannot write {path}: {reason(error)}") from error


# ---------------------------------------------------------------------------------------------------------------------
# Images, stages and checkpoints


def _output_folders(root: Path, images: Sequence[Path], output: Path) -> list[Path]:
    """Returns the directory of each image's pictures.

    It has the name of the image, without the suffix if no other name is the same without it, ignoring case.
    """
    names = [path.relative_to(root if root.is_dir() else root.parent) for path in images]
    stems = [name.with_suffix("") for name in names]
    counts = Counter(str(stem).casefold() for stem in stems)
    return [
        output / (stem if counts[str(stem).casefold()] == 1 else name) for name, stem in zip(names, stems, strict=True)
    ]


def _choose_stages(stages: Sequence[int] | None, loaded: LoadedModel) -> list[int]:
    """Returns the stages to draw: the given ones, or all with super tokens."""
    possible = stages_of(loaded)
    for stage in stages or []:
        if stage not in possible:
            raise CommandError(
                f"--stage {stage}: {loaded.title} has no super tokens there; choose from "
                f"{', '.join(map(str, possible))}"
            )
    return sorted(set(stages)) if stages else possible


def _find_checkpoints(sources: Sequence[str]) -> list[tuple[str, Path]]:
    """Returns the label and path of each checkpoint, oldest first in each run."""
    found: list[tuple[str, Path]] = []
    for source in sources:
        path = Path(source).expanduser()
        if not path.exists():
            raise CommandError(f"--checkpoints {source}: no such file or directory")
        if path.is_file():
            found.append((_label(path), path))
            continue
        files = Checkpoints(path / "checkpoints").paths() + sorted(
            (path / "weights").glob("epoch*.pt"), key=lambda file: int(re.sub(r"\D", "", file.stem) or 0)
        )
        files = files or sorted(path.glob("*.pt")) or sorted((path / "weights").glob("*.pt"))
        if not files:
            raise CommandError(f"--checkpoints {source}: no checkpoint found there, in checkpoints/ or in weights/")
        found += [(_label(file), file) for file in files]
    return found


def _label(path: Path) -> str:
    """Returns the epoch of a checkpoint, counted from 1, or its name if unknown."""
    ours = re.fullmatch(r"(\d{5})-(\d{8})", path.stem)
    if ours:  # named by train_cls.py: finished epochs, and steps of the next epoch
        epoch, step = map(int, ours.groups())
        return f"epoch {epoch}" if step == 0 else f"epoch {epoch + 1}, step {step}"
    theirs = re.fullmatch(r"epoch(\d+)", path.stem)  # named by Ultralytics, which counts from 0
    return f"epoch {int(theirs[1]) + 1}" if theirs else path.stem


# ---------------------------------------------------------------------------------------------------------------------
# Measures


def _require_slic() -> None:
    try:
        import skimage.segmentation  # noqa: F401
    except ImportError as error:
        raise CommandError(f"--masks needs scikit-image for SLIC: pip install 'stvit[visualize]' ({error})") from error


def _find_masks(folder: Path, images: Sequence[Path]) -> list[Path]:
    found = []
    for image in images:
        candidates = [folder / f"{image.stem}{end}" for end in (".png", "_mask.png")]
        mask = next((path for path in candidates if path.is_file()), None)
        if mask is None:
            names = f"{candidates[0].name} or {candidates[1].name}"
            raise CommandError(f"--masks {folder}: no mask for {image.name}; expected {names}")
        found.append(mask)
    return found


def _open_mask(path: Path, image: Image.Image) -> np.ndarray:
    mask = open_mask(path)
    if mask.ndim != 2 or mask.shape != (image.height, image.width):
        raise ImageError(
            f"mask {path}: expected one value per pixel of the image, [{image.height}, {image.width}], got shape "
            f"{list(mask.shape)}"
        )
    return mask


def _measure(view: visualize.SuperTokens, mask: np.ndarray, path: Path, config: DrawConfig) -> list[dict[str, Any]]:
    """Compares super tokens, SLIC superpixels and cells with a mask.

    Args:
        view: Super tokens.
        mask: True segments of the original image.
        path: Path of the sheet to write.
        config: Settings.

    Returns:
        Measures of each method.
    """
    width, height = view.image.size
    truth = np.array(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))
    number = len(np.unique(view.assignment))
    h, w = view.map_assignment.shape
    cells = np.arange(h)[:, None] // view.stoken_size[0] * w + np.arange(w)[None] // view.stoken_size[1]
    methods = {
        "super tokens": view.assignment,
        "SLIC": _slic(view.image, number),
        "SLIC at the map's resolution": view.to_image(_slic(reduce_to_map(view), number)),
        "cells": view.to_image(cells),
    }
    rows, panels = [], []
    for method, regions in methods.items():
        try:
            recall = boundary_recall(regions, truth, config.tolerance, config.void)
            leak = undersegmentation_error(regions, truth, config.void)
        except ValueError as error:
            raise ImageError(str(error)) from error
        rows.append(
            {
                "method": method,
                "regions": len(np.unique(regions)),
                "boundary_recall": round(recall, 4),
                "undersegmentation_error": round(leak, 4),
            }
        )
        picture = np.array(visualize.draw_boundaries(view.image, regions))
        outline = boundaries(truth, config.void).repeat(view.scale, axis=0).repeat(view.scale, axis=1)
        picture[outline] = visualize.MARK_COLOR
        name = method.replace("SLIC at the map's resolution", "SLIC, coarse")
        panels.append((f"{name}: BR {recall:.3f}, UE {leak:.3f}", Image.fromarray(picture)))
    _save(visualize.contact_sheet(panels, columns=2), path)
    return rows


def reduce_to_map(view: visualize.SuperTokens) -> Image.Image:
    """Reduces the image to the resolution of the feature map, (h, w).

    Each pixel of the result is the mean of the pixels to which `SuperTokens.to_image` gives its value.
    """
    pixels, stride = np.asarray(view.image), view.stride
    padding = []
    for size, before, cells in zip(pixels.shape, view.offset, view.map_assignment.shape, strict=False):
        start = before + stride // 2
        padding.append((start, max(0, cells * stride - start - size)))
    h, w = view.map_assignment.shape
    padded = np.pad(pixels, (*padding, (0, 0)), mode="edge")[: h * stride, : w * stride]
    means = padded.reshape(h, stride, w, stride, 3).mean(axis=(1, 3))
    return Image.fromarray(means.round().astype(np.uint8))


def _slic(image: Image.Image, number: int) -> np.ndarray:
    """Returns about `number` SLIC superpixels, (H, W), after a few attempts."""
    from skimage.segmentation import slic

    pixels = np.asarray(image)
    best: np.ndarray | None = None
    requested = float(number)
    for _ in range(8):
        regions = slic(pixels, n_segments=max(1, round(requested)), start_label=0)
        found = len(np.unique(regions))
        if best is None or abs(found - number) < abs(len(np.unique(best)) - number):
            best = regions
        if found == number:
            break
        requested *= number / found
    assert best is not None
    return np.asarray(best)


def _write_measures(title: str, rows: list[dict[str, Any]], config: DrawConfig) -> None:
    """Writes measures.csv and prints the means of each stage and method."""
    path = config.output / "measures.csv"
    origin = {
        "model": title,
        "img_size": config.img_size,
        "versions": f"stvit {stvit.__version__}, torch {torch.__version__}, timm {timm.__version__}",
        "date": datetime.now(timezone.utc).date().isoformat(),
    }

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*rows[0], *origin])
            writer.writeheader()
            writer.writerows({**row, **origin} for row in rows)

    try:
        atomic_write(path, write)
    except OSError as error:
        raise CommandError(f"cannot write {path}: {reason(error)}") from error
    print(f"{'stage':5}  {'method':30} {'regions':>8} {'boundary recall':>16} {'undersegmentation':>18}")
    for stage in sorted({row["stage"] for row in rows}):
        for method in dict.fromkeys(row["method"] for row in rows):
            selected = [row for row in rows if (row["stage"], row["method"]) == (stage, method)]
            columns = ("regions", "boundary_recall", "undersegmentation_error")
            means = [fmean(row[key] for row in selected) for key in columns]
            print(f"{stage:5}  {method:30} {means[0]:8.0f} {means[1]:16.3f} {means[2]:18.3f}")


if __name__ == "__main__":
    sys.exit(main())

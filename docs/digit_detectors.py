#!/usr/bin/env python3
"""Compares YOLO26 detectors with several backbones on digits on photographs.

    python docs/make_digit_scenes.py DATA
    python docs/digit_detectors.py train DATA RESULTS
    python docs/digit_detectors.py latency RESULTS
    python docs/digit_detectors.py picture DATA RESULTS

`train` skips finished runs, and continues a stopped run after its last complete epoch: after an interruption, run the
same command again. Commands with different --seeds can use the same RESULTS folder at the same time. `latency` measures
the trained detectors in turns and needs a quiet machine, but no data. The results are RESULTS/accuracy.csv,
RESULTS/latency.csv, and RESULTS/digits.png as soon as both tables exist. `picture` draws the first test images, with
their true boxes and those of each model, into RESULTS/detections.jpg.

All weights are random at first. All detectors have the same recipe, `RECIPE`, and the same number of epochs. The
accuracy is that of the last epoch. The test images choose no epoch.
"""

import argparse
import csv
import importlib.metadata
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("YOLO_AUTOINSTALL", "false")  # read when Ultralytics is imported

import torch

from stvit.adapters.yolo import YOLO
from stvit.hub.files import file_sha256
from stvit.images import open_image
from stvit.tools.benchmarks.accuracy import interval_of_means
from stvit.tools.benchmarks.config import DetectorConfig
from stvit.tools.benchmarks.measure import circumstances, print_table, replace_table
from stvit.tools.benchmarks.yolo import benchmark
from stvit.tools.common.cli import CommandError, Parser, count, positive, run
from stvit.tools.common.files import atomic_write

LabeledBox = tuple[str, tuple[float, ...]]  # text; left, top, right and bottom in pixels
LABEL_HEIGHT = 12  # pixels that a label needs above its box
MODELS = ["yolo26n", "yolo26n-stvit", "yolo26n-stokenattention"]
# Ultralytics' augmentation, without mirror images, because a mirrored digit is no digit.
RECIPE: dict[str, Any] = {
    "imgsz": 160,
    "batch": 16,
    "nbs": 16,
    "optimizer": "AdamW",
    "lr0": 0.002,
    "cos_lr": True,
    "warmup_epochs": 1,
    "close_mosaic": 4,
    "fliplr": 0.0,
    "device": "cpu",
    "amp": False,
    "workers": 0,
    "plots": False,
    "val": False,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    parser = Parser(prog="digit_detectors.py", description="Trains detectors on digits and measures them.")
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train the detectors, or continue")
    train.add_argument("data", type=Path, metavar="DATA", help="folder that make_digit_scenes.py wrote")
    train.add_argument("results", type=Path, metavar="RESULTS", help="folder of the runs and tables")
    train.add_argument("--epochs", type=positive, default=15, metavar="N", help="epochs of each run")
    train.add_argument(
        "--seeds", type=count, nargs="+", default=[1, 2], metavar="N", help="each model is trained once with each seed"
    )
    latency = commands.add_parser("latency", help="measure the latency of the trained detectors")
    latency.add_argument("results", type=Path, metavar="RESULTS", help="folder of the runs and tables")
    latency.add_argument(
        "--img-size", type=positive, nargs="+", default=[160, 640], metavar="N", help="image height and width in pixels"
    )
    latency.add_argument("--repeats", type=positive, default=15, metavar="N", help="measurements of each detector")
    picture = commands.add_parser("picture", help="draw test images with true and found boxes")
    picture.add_argument("data", type=Path, metavar="DATA", help="folder that make_digit_scenes.py wrote")
    picture.add_argument("results", type=Path, metavar="RESULTS", help="folder of the runs and tables")
    picture.add_argument("--images", type=positive, default=6, metavar="N", help="number of test images")
    for command in (train, latency, picture):
        command.add_argument("--models", nargs="+", default=MODELS, metavar="NAME", help="model files without .yaml")
    return run(_command, parser.parse_args(argv))


def _command(args: argparse.Namespace) -> None:
    if args.command == "train":
        train_detectors(args.data, args.results, args.models, args.seeds, args.epochs)
    elif args.command == "latency":
        measure_latency(args.results, args.models, args.img_size, args.repeats)
    else:
        draw_detections(args.data, args.results, args.models, args.images)


def train_detectors(data: Path, results: Path, models: Sequence[str], seeds: Sequence[int], epochs: int) -> None:
    """Trains a detector for each model and seed, and measures its accuracy.

    Args:
        data: Folder of the data set.
        results: Folder of the runs and tables.
        models: Names of model files, without suffix.
        seeds: Seeds of the runs of each model.
        epochs: Epochs of each run.

    Raises:
        CommandError: If there is no data set or no such model, or a run in `results` has other data or another recipe.
    """
    data_file = _require_data_file(data)
    _check_models(models)
    settings = {"epochs": epochs, "recipe": RECIPE, "data": _digest(data)}
    _write_accuracy(results)
    for seed in seeds:  # outer loop: after half the time there is one run of each model
        for model in models:
            folder = results.absolute() / f"{model}-seed{seed}"
            report = folder / "accuracy.json"
            _check_settings(folder, settings)
            if report.is_file():
                continue
            checkpoint = train_detector(data_file, folder, model, seed, epochs)
            accuracy = evaluate_detector(checkpoint, data_file)
            text = json.dumps({**_origin(), "model": model, "seed": seed, "epochs": epochs, **accuracy})
            atomic_write(report, lambda path, text=text: path.write_text(text, encoding="utf-8"))
            _write_accuracy(results)


def train_detector(data_file: Path, folder: Path, model: str, seed: int, epochs: int) -> Path:
    """Trains a detector to the end and returns its last checkpoint.

    A training that was interrupted continues after its last complete epoch, with other random numbers.

    Args:
        data_file: Ultralytics data file.
        folder: Run directory.
        model: Name of the model file, without suffix.
        seed: Seed of the weights, the order of the images and the augmentation.
        epochs: Number of epochs.
    """
    # Ultralytics writes last.pt in place, so a killed process can leave half a file. This copy is always complete.
    copy = folder / "weights" / "resume.pt"

    def keep(trainer: Any) -> None:
        atomic_write(copy, lambda path: shutil.copyfile(trainer.last, path))

    if copy.is_file():
        detector = YOLO(copy)
        if detector.ckpt["epoch"] + 1 == epochs:
            return copy
        arguments: dict[str, Any] = {"resume": True, "data": str(data_file), "save_dir": str(folder)}
    else:
        detector = YOLO(f"{model}.yaml")
        arguments = {**RECIPE, "data": str(data_file), "epochs": epochs, "seed": seed, "deterministic": True}
        arguments |= {"project": str(folder.parent), "name": folder.name, "exist_ok": True}
    detector.add_callback("on_model_save", keep)
    detector.train(**arguments)
    return copy


def evaluate_detector(checkpoint: Path, data_file: Path) -> dict[str, str | float]:
    """Returns the backbone of a detector and its accuracy on the test images.

    Args:
        checkpoint: Ultralytics checkpoint.
        data_file: Ultralytics data file.
    """
    settings = {key: RECIPE[key] for key in ("imgsz", "batch", "device", "workers", "plots")}
    folder = {"project": str(checkpoint.parents[1]), "name": "test", "exist_ok": True}
    detector = YOLO(checkpoint)
    backbone = getattr(detector.model.model[0], "name", "stock")
    box = detector.val(data=str(data_file), verbose=False, **folder, **settings).box
    return {"backbone": backbone, "map50_95": round(float(box.map), 4), "map50": round(float(box.map50), 4)}


def measure_latency(results: Path, models: Sequence[str], img_sizes: Sequence[int], repeats: int) -> None:
    """Measures the latency of one detector of each model, in turns.

    Args:
        results: Folder of the runs and tables.
        models: Names of model files, without suffix.
        img_sizes: Image heights and widths in pixels.
        repeats: Measurements of each detector.

    Raises:
        CommandError: If a detector has not been trained to the end.
    """
    checkpoints = [_find_checkpoint(results, model) for model in models]
    rows = []
    for img_size in img_sizes:
        (table,) = benchmark(DetectorConfig(models=list(map(str, checkpoints)), img_size=img_size, repeats=repeats))
        rows += [{**_origin(), **row, "model": model} for model, row in zip(models, table, strict=True)]
    replace_table(results / "latency.csv", rows)
    print_table([{key: row[key] for key in ("model", "img_size", "gflops", "ms", "ms_min", "ms_max")} for row in rows])
    draw(results)


def draw(results: Path) -> None:
    """Plots accuracy over latency, for each image size, if both tables exist.

    Latency is relative to that of the first model in the table.

    Args:
        results: Folder of the tables, and of the plot.
    """
    tables = []
    for name in ("accuracy", "latency"):
        if not (results / f"{name}.csv").is_file():
            return
        with (results / f"{name}.csv").open(newline="", encoding="utf-8") as file:
            tables.append(list(csv.DictReader(file)))
    accuracy, latency = tables
    from matplotlib.figure import Figure

    sizes = list(dict.fromkeys(row["img_size"] for row in latency))
    figure = Figure(figsize=(4.5 * len(sizes), 4), layout="constrained")
    for axes, size in zip(figure.subplots(1, len(sizes), squeeze=False)[0], sizes, strict=True):
        rows = [row for row in latency if row["img_size"] == size]
        for row in rows:
            scores = [100 * float(run["map50_95"]) for run in accuracy if run["model"] == row["model"]]
            ratio = float(row["ms"]) / float(rows[0]["ms"])
            axes.plot([ratio] * len(scores), scores, "o", label=row["model"])
        axes.set(xlabel=f"latency at {size}x{size}, relative to {rows[0]['model']}")
        axes.set(ylabel=f"mAP50-95 at {RECIPE['imgsz']}x{RECIPE['imgsz']} (%)")
        axes.set_ylim(bottom=max(0, axes.get_ylim()[0]))
        axes.set_xlim(left=0, right=1.15 * axes.get_xlim()[1])
        axes.grid(lw=0.3)
    figure.axes[0].legend(fontsize=8, title="one dot for each seed")
    atomic_write(results / "digits.png", lambda path: figure.savefig(path, dpi=150, format="png"))


def draw_detections(data: Path, results: Path, models: Sequence[str], count: int) -> None:
    """Draws the true boxes of the first test images, and those of each model.

    Args:
        data: Folder of the data set.
        results: Folder of the runs, and of the picture.
        models: Names of model files, without suffix.
        count: Number of images. All test images if there are fewer.

    Raises:
        CommandError: If there is no data set, or a detector has not been trained to the end.
    """
    folder = _require_data_file(data).parent
    coco = json.loads((folder / "val.json").read_text(encoding="utf-8"))
    images = coco["images"][:count]
    files = [folder / "images" / "val" / image["file_name"] for image in images]
    pictures = [open_image(file) for file in files]
    rows = {"true boxes": [_true_boxes(coco, image["id"]) for image in images]}
    for model in models:
        detector = YOLO(_find_checkpoint(results, model))
        found = detector.predict(files, imgsz=RECIPE["imgsz"], device=RECIPE["device"], verbose=False)
        rows[model] = [_found_boxes(result) for result in found]
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    figure = Figure(figsize=(2.5 * len(files), 2.5 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), len(files), squeeze=False)
    for axes_of_row, (title, boxes) in zip(grid, rows.items(), strict=True):
        axes_of_row[0].set_ylabel(title)
        for axes, picture, boxes_of_image in zip(axes_of_row, pictures, boxes, strict=True):
            axes.imshow(picture)
            axes.set(xticks=[], yticks=[])
            for label, (left, top, right, bottom) in boxes_of_image:
                axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, ec="yellow", lw=1))
                place = {"y": top, "va": "top" if top < LABEL_HEIGHT else "bottom"}
                axes.text(
                    x=left, s=label, size=7, clip_on=True, bbox={"fc": "yellow", "ec": "none", "pad": 0.5}, **place
                )
    atomic_write(results / "detections.jpg", lambda path: figure.savefig(path, dpi=100, format="jpg"))
    print(f"wrote {results / 'detections.jpg'}")


def _true_boxes(coco: dict[str, Any], image: int) -> list[LabeledBox]:
    """Returns the annotated boxes of an image, by its number."""
    boxes = []
    for annotation in coco["annotations"]:
        if annotation["image_id"] == image:
            left, top, width, height = annotation["bbox"]
            boxes.append((str(annotation["category_id"]), (left, top, left + width, top + height)))
    return boxes


def _found_boxes(result: Any) -> list[LabeledBox]:
    """Returns the boxes of an Ultralytics result, labeled with class and score."""
    return [
        (f"{result.names[int(label)]}: {score:.0%}", tuple(box)) for *box, score, label in result.boxes.data.tolist()
    ]


def _require_data_file(data: Path) -> Path:
    """Returns Ultralytics' data file of a data set.

    Raises:
        CommandError: If there is no data set.
    """
    file = data.absolute() / "digits.yaml"
    if not file.is_file():
        raise CommandError(f"{data} has no digits.yaml; make it: python docs/make_digit_scenes.py {data}")
    return file


def _check_models(models: Sequence[str]) -> None:
    """Checks that each model has a model file.

    Raises:
        CommandError: If one has none.
    """
    for model in models:
        try:
            YOLO(f"{model}.yaml")
        except (FileNotFoundError, ValueError) as error:
            raise CommandError(f"no model file {model}.yaml; correct --models") from error


def _digest(data: Path) -> list[str]:
    """Returns checksums of the annotations, which determine the images."""
    return [file_sha256(data / f"{split}.json") for split in ("train", "val")]


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Writes the settings of a new run, and compares those of a run that exists.

    Raises:
        CommandError: If they differ.
    """
    file = folder / "settings.json"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(file, lambda path: path.write_text(json.dumps(settings), encoding="utf-8"))
    for name, value in json.loads(file.read_text(encoding="utf-8")).items():
        if value != settings[name]:
            detail = f": {value}, not {settings[name]}" if name == "epochs" else ""
            raise CommandError(f"{folder} is a run with other settings ({name}{detail}); choose another RESULTS folder")


def _find_checkpoint(results: Path, model: str) -> Path:
    """Returns the last checkpoint of a model, from the run of the smallest seed.

    Raises:
        CommandError: If there is no complete run.
    """
    runs = {int(path.parent.name.rpartition("-seed")[2]): path for path in results.glob(f"{model}-seed*/accuracy.json")}
    if not runs:
        raise CommandError(f"{results} has no complete run of {model}; train it first or pass other --models")
    return runs[min(runs)].parent / "weights" / "resume.pt"


def _write_accuracy(results: Path) -> None:
    """Collects the finished runs, if there are any, in one table."""
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("*/accuracy.json"))]
    if not rows:
        return
    replace_table(results / "accuracy.csv", rows)
    columns = ("model", "backbone", "seed", "epochs", "map50_95", "map50")
    print_table([{key: row[key] for key in columns} for row in rows])
    _print_means(rows)
    draw(results)


def _print_means(rows: Sequence[dict[str, Any]]) -> None:
    """Prints the mean accuracy of each model with its 95 % interval."""
    scores: dict[str, list[float]] = {}
    for row in rows:
        scores.setdefault(row["model"], []).append(100 * row["map50_95"])
    table = []
    for (model, group), mean in zip(scores.items(), interval_of_means(list(scores.values())), strict=True):
        interval = "" if mean["low"] is None else "{low:.1f} to {high:.1f}".format(**mean)
        table.append({"model": model, "runs": len(group), "mAP50-95 (%)": f"{mean['top1']:.1f}", "95 %": interval})
    print_table(table)


def _origin() -> dict[str, Any]:
    """Returns the date, hardware and versions for a row."""
    return {**circumstances(torch.device("cpu")), "ultralytics": importlib.metadata.version("ultralytics")}


if __name__ == "__main__":
    sys.exit(main())

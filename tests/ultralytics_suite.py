#!/usr/bin/env python3
"""Runs Ultralytics' own tests, from its source archive, on our models.

    python tests/ultralytics_suite.py                      # all tests
    python tests/ultralytics_suite.py --fast               # a selection that takes half a minute
    python tests/ultralytics_suite.py tests/test_cli.py    # one file: arguments go to pytest
    python tests/ultralytics_suite.py --left-out           # the excluded tests, which must fail

The tests of Ultralytics name models and datasets by file names. This program makes a folder in which these names refer
to model files and initialized weights of YOLO26 on stvit_pico, and to small datasets of a few photographs. `LEFT_OUT`
lists the excluded tests and the reasons. Only pip uses the network, to download the archive.

The file is also a plugin of that pytest session and the `yolo` command that the tests call.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

NAME = Path(__file__).stem
BACKBONE = "stvit_pico"
MODELS = {
    "detect": "DetectionModel",
    "segment": "SegmentationModel",
    "semantic": "SemanticSegmentationModel",
    "pose": "PoseModel",
    "obb": "OBBModel",
    "depth": "DepthModel",
    "classify": "ClassificationModel",
}
DATA = {
    "detect": "coco8.yaml",
    "segment": "coco8-seg.yaml",
    "semantic": "cityscapes8.yaml",
    "pose": "coco8-pose.yaml",
    "obb": "dota8.yaml",
    "depth": "depth8.yaml",
    "classify": "imagenet10",
}
GROUPS = (("test_cli.py", "test_exports.py"), ("test_engine.py", "test_python.py"))  # both take the same time
FILES = tuple(name for group in GROUPS for name in group)
NEEDED = ("aiohttp", "lap", "onnx", "onnxruntime", "onnxslim", "openvino", "pytest_timeout", "shapely", "sklearn")

# Test ids without the folder `tests/`. A name without parameters stands for all parameters of the test.
LEFT_OUT = {
    "test_python.py::test_yoloe": "tests YOLOE, with weights that would be downloaded",
    "test_python.py::test_yoloe_vocab_head_switch": "tests YOLOE, with weights that would be downloaded",
    "test_python.py::test_yoloe_visual_prompt_verbose_false": "tests YOLOE, with weights that would be downloaded",
    "test_python.py::test_data_annotator": "tests SAM, with weights that would be downloaded",
    "test_cli.py::test_mobilesam": "tests SAM, with weights that would be downloaded",
    "test_cli.py::test_fastsam": "tests FastSAM, with weights that would be downloaded",
    "test_cli.py::test_rtdetr": "tests RT-DETR, with weights that would be downloaded",
    "test_exports.py::test_export_coreml_rtdetr": "tests RT-DETR, with weights that would be downloaded",
    "test_python.py::test_train_ndjson": "needs the network: a data set and its images",
    "test_python.py::test_data_converter": "needs the network: COCO's annotations, with no model",
    "test_exports.py::test_export_coreml": "needs coremltools",
    "test_exports.py::test_export_mnn": "needs MNN",
    "test_exports.py::test_export_ncnn": "needs ncnn and pnnx",
    "test_exports.py::test_export_imx": "needs model_compression_toolkit and Sony's converter",
    "test_exports.py::test_export_executorch": "needs executorch",
}
# This test predicts on a blank image of ten channels. Ultralytics cannot save crops of such images, so the model must
# detect nothing there.
SEES_NOTHING = "test_python.py::test_multichannel[False]"

FAST = (
    "test_python.py::test_model_forward[yolo26n.yaml]",
    "test_python.py::test_model_methods",
    "test_python.py::test_model_load_remaps_cls_head_by_names",
    "test_python.py::test_restricted_load_criterion",
    "test_python.py::test_model_embeddings",
)


class SuiteError(Exception):
    """Raised when the tests cannot run on the models of this package."""


# ------------------------------------------------------------------------------------------------ the command


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(description="Run Ultralytics' own tests on models of this package.")
    parser.add_argument("--fast", action="store_true", help="run a selection that takes half a minute")
    parser.add_argument(
        "--left-out", action="store_true", help="run only the excluded tests; fails if one of them passes"
    )
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="new folder of the run, which is kept (default: a temporary folder)"
    )
    args, pytest_args = parser.parse_known_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the test processes, too
    try:
        if args.keep is None:
            with tempfile.TemporaryDirectory(prefix="stvit-ultralytics-") as folder:
                return run_suite(Path(folder).resolve(), args, pytest_args)
        if args.keep.exists() and any(args.keep.iterdir()):
            raise SuiteError(f"{args.keep} is not empty; pass a new folder")
        args.keep.mkdir(parents=True, exist_ok=True)
        return run_suite(args.keep.resolve(), args, pytest_args)
    except SuiteError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run_suite(folder: Path, args: argparse.Namespace, pytest_args: Sequence[str]) -> int:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise SuiteError(f"the tests need {', '.join(missing)}: pip install {' '.join(missing)}")
    sys.path.append(str(Path(__file__).parents[1]))
    from tests import source_archive  # not importable in the processes of the tests

    try:
        archive = source_archive.fetch("ultralytics")
    except source_archive.ArchiveMissing as error:
        raise SuiteError(str(error)) from error
    environment = os.environ.copy()
    os.environ.clear()  # prepares the files with the settings of the tests
    os.environ.update(make_environment(folder / "made", environment))
    os.chdir(folder / "made")  # Ultralytics looks for model files here first
    prepare(archive, folder / "made")

    mode = "fast" if args.fast else "left out" if args.left_out else "all"
    chosen = any(".py" in arg for arg in pytest_args)
    whole = not chosen and not args.fast
    sessions = [list(group) for group in GROUPS] if whole else [[] if chosen else list(FILES)]
    running = []
    for i, files in enumerate(sessions):
        # Each session has its own folder, because tests write caches beside the data and results beside the weights.
        place = folder / f"session{i}"
        shutil.copytree(folder / "made", place, ignore=shutil.ignore_patterns("config"))
        session = make_environment(place, environment)
        plan = {"report": str(place / "report.json"), "mode": mode, "files": files if whole else []}
        session["STVIT_SUITE"] = json.dumps(plan)
        command = [sys.executable, "-m", "pytest", "-p", NAME, "--color=no", "--durations=10", "--timeout=900"]
        command += [f"--basetemp={place / 'tmp'}"]
        command += [*(f"tests/{name}" for name in files), *pytest_args]
        log = (place / "log.txt").open("w+", encoding="utf-8")
        output = log if i else None  # the first session prints while it runs, the others when they end
        process = subprocess.Popen(command, cwd=place, env=session, stdout=output, stderr=output)
        running.append((place, log, process))
    reports = []
    failed = False
    try:
        for place, log, process in running:
            status = process.wait()
            log.seek(0)
            print(log.read(), end="", flush=True)
            report = place / "report.json"
            if not report.exists():
                raise SuiteError(f"pytest ended without a report, with status {status}")
            reports.append(json.loads(report.read_text(encoding="utf-8")))
            failed = failed or status not in (0, 5)  # 5: no test of these files was selected
    finally:
        for _, log, process in running:
            process.kill()
            process.wait()
            log.close()
    return summarize(reports, failed, args.left_out)


def prepare(archive: Path, folder: Path) -> None:
    unpack_tests(archive, folder)
    write_plugin(folder)
    write_model_files(folder)
    write_datasets(folder / "datasets")
    write_clips(folder / "weights" / "solution_assets")
    write_weights(folder / "weights")


def summarize(reports: list[dict[str, Any]], failed: bool, left_out: bool) -> int:
    """Prints the outcomes of the tests and returns the exit status."""
    outcomes = {test: outcome for report in reports for test, outcome in report["outcomes"].items()}
    skipped = {test: reason for report in reports for test, reason in report["skipped"].items()}
    ours = {test for report in reports for test in report["ours"]}
    kept_out = [test for report in reports for test in report["left_out"]]
    errors = [error for report in reports for error in report["errors"]]
    counts = Counter(outcomes.values())
    on_ours = sum(outcome == "passed" and test in ours for test, outcome in outcomes.items())
    if left_out:
        passed = [test for test, outcome in outcomes.items() if outcome == "passed"]
        errors += [f"{test} passes, and need not be left out" for test in passed]
    elif not counts["passed"]:
        errors.append("no test ran")
    elif not on_ours:
        errors.append("no test ran our backbone")

    for title, table in (
        ("Left out", {test: LEFT_OUT[_entry(test) or ""] for test in kept_out}),
        ("Skipped by Ultralytics", skipped),
    ):
        if table:
            print(f"\n{title}:")
        for reason in dict.fromkeys(table.values()):
            print(f"  {reason}:")
            print("".join(f"    {test}\n" for test, why in table.items() if why == reason), end="")
    print(
        f"\nUltralytics {importlib.metadata.version('ultralytics')} on {BACKBONE}: {counts['passed']} passed, "
        f"{on_ours} of them on our backbone, {counts['failed']} failed, {counts['skipped']} skipped by Ultralytics, "
        f"{len(kept_out)} left out, {sum(report['slow'] for report in reports)} more with --slow"
    )
    for test, outcome in outcomes.items():
        if outcome == "failed" and not left_out:
            print(f"failed: {test}")
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    return 1 if errors or (failed and not left_out) else 0


# ------------------------------------------------------------------------------------------------ the folder


def make_environment(folder: Path, base: dict[str, str]) -> dict[str, str]:
    """Writes settings into the folder and returns the environment of a test session.

    Ultralytics installs no packages, and proxies refuse every connection.
    """
    config = folder / "config" / "Ultralytics"  # the folder that Ultralytics makes in YOLO_CONFIG_DIR
    config.mkdir(parents=True)
    settings = {"settings_version": "0.0.8", "sync": False, "api_key": "", "openai_api_key": "", "uuid": "0" * 64}
    settings |= {f"{kind}_dir": str(folder / kind) for kind in ("datasets", "weights", "runs")}
    settings |= dict.fromkeys(("clearml", "comet", "dvc", "mlflow", "raytune", "tensorboard", "wandb"), False)
    settings |= dict.fromkeys(("vscode_msg", "openvino_msg"), False)
    (config / "settings.json").write_text(json.dumps(settings))

    environment = {key: value for key, value in base.items() if key.lower() != "no_proxy"}
    environment.pop("ULTRALYTICS_API_KEY", None)
    environment.pop("GITHUB_ACTIONS", None)  # Ultralytics would assume that this is its own CI
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        environment[name] = environment[name.upper()] = "http://127.0.0.1:9"
    environment.update(
        YOLO_CONFIG_DIR=str(config.parent),
        YOLO_OFFLINE="true",
        YOLO_AUTOINSTALL="false",
        HF_HUB_OFFLINE="1",
        MPLCONFIGDIR=str(folder / "config" / "matplotlib"),
        MPLBACKEND="Agg",
        TORCH_HOME=str(folder / "torch"),
        CUDA_VISIBLE_DEVICES="",
        OMP_NUM_THREADS=environment.get("OMP_NUM_THREADS", "1"),
        PATH=os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), environment.get("PATH", "")]),
        PYTHONPATH=os.pathsep.join([str(folder / "plugin"), *filter(None, [environment.get("PYTHONPATH")])]),
    )
    return environment


def unpack_tests(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as tar:
        top = archive.name.removesuffix(".tar.gz")
        members = [member for member in tar.getmembers() if member.name.startswith(f"{top}/tests/")]
        for member in members:
            member.name = member.name.removeprefix(f"{top}/")
        tar.extractall(folder, members, filter="data")
    missing = [name for name in FILES if not (folder / "tests" / name).is_file()]
    if missing:
        raise SuiteError(f"{archive.name} holds no tests/{', tests/'.join(missing)}")
    # The settings of pytest in the archive.
    (folder / "pytest.ini").write_text(
        "[pytest]\nmarkers =\n    slow: runs with --slow\nfilterwarnings =\n    ignore\n"
    )


def write_plugin(folder: Path) -> None:
    """Copies this file as a pytest plugin, and writes a command `yolo`.

    The command registers our classes.
    """
    for name in ("plugin", "bin"):
        (folder / name).mkdir()
    shutil.copy(__file__, folder / "plugin")
    command = folder / "bin" / "yolo"
    command.write_text(
        f"#!/bin/sh\nexec '{sys.executable}' -c 'import {NAME}, sys; sys.exit({NAME}.yolo_command())' \"$@\"\n"
    )
    command.chmod(0o755)


def write_model_files(folder: Path) -> None:
    """Writes our model files under the names of Ultralytics' files."""
    import ultralytics

    from stvit.adapters.yolo import model_file
    from stvit.adapters.yolo.config import TASK_SUFFIXES

    for suffix in TASK_SUFFIXES.values():
        ours = model_file(f"yolo26n-{BACKBONE}{suffix}.yaml")
        for scale in ("n", ""):
            path = folder / f"yolo26{scale}{suffix}.yaml"
            shutil.copy(ours, path)
            check_backbone(ultralytics.YOLO(path).model, path)


def write_weights(folder: Path) -> None:
    """Writes initialized weights under the names of published weights."""
    import torch
    import torchvision

    from stvit.adapters.yolo.config import TASK_SUFFIXES

    for task, suffix in TASK_SUFFIXES.items():
        write_checkpoint(folder / f"yolo26n{suffix}.pt", task)
        if task in ("detect", "segment", "pose", "obb"):  # teachers of distillation
            write_checkpoint(folder / f"yolo26s{suffix}.pt", task)
    # Tests use these as a model without end-to-end detection and as a model of gray images.
    write_checkpoint(folder / "yolo11n.pt", "detect", end2end=False)
    write_checkpoint(folder / "yolo11n-grayscale.pt", "detect", channels=1)
    write_checkpoint(folder / "sees_nothing.pt", "detect", sure=False)
    # Some model files of Ultralytics load weights of torchvision.
    checkpoints = Path(os.environ["TORCH_HOME"]) / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    for weights in (torchvision.models.ResNet18_Weights.DEFAULT,):
        torch.save(torchvision.models.resnet18().state_dict(), checkpoints / Path(weights.url).name)
    (folder / "path with spaces").mkdir()
    shutil.copy(folder / "yolo26n.pt", folder / "path with spaces")


def write_checkpoint(path: Path, task: str, channels: int = 3, end2end: bool = True, sure: bool = True) -> None:
    import torch
    import ultralytics
    from ultralytics.nn import tasks
    from ultralytics.nn.tasks import yaml_model_load
    from ultralytics.utils import DEFAULT_CFG_DICT

    from stvit.adapters.yolo.config import TASK_SUFFIXES

    config = yaml_model_load(f"yolo26n{TASK_SUFFIXES[task]}.yaml")
    names = class_names(task)
    config.update(nc=len(names), end2end=end2end, scale="s" if path.stem.startswith("yolo26s") else "n")
    torch.manual_seed(0)
    model = getattr(tasks, MODELS[task])(config, ch=channels, nc=len(names), verbose=False)
    head = model.model[-1]
    for branch in ("cv3", "one2one_cv3"):
        # Untrained detectors have low confidence. This one detects its first class in every cell of the coarsest map,
        # so that the tests have boxes to draw, crop, track and suppress.
        if sure and getattr(head, branch, None) is not None:
            torch.nn.init.constant_(getattr(head, branch)[-1][-1].bias[:1], 1.0)
    model.names = names
    model.task = task
    train_args = {
        "task": task,
        "mode": "train",
        "model": f"yolo26n{TASK_SUFFIXES[task]}.yaml",
        "imgsz": 640,
        "epochs": 1,
    }
    train_args["data"] = DATA[task]
    model.args = {**DEFAULT_CFG_DICT, **train_args}
    checkpoint = {"epoch": -1, "best_fitness": None, "model": model.half(), "ema": None, "optimizer": None}
    torch.save({**checkpoint, "train_args": train_args, "date": "2026-01-01", "version": ultralytics.__version__}, path)
    check_backbone(ultralytics.YOLO(path).model, path)


def class_names(task: str) -> dict[int, str]:
    from ultralytics.utils import ROOT as PACKAGE
    from ultralytics.utils import YAML

    data = {**DATA, "classify": "ImageNet.yaml"}[task]
    return dict(YAML.load(PACKAGE / "cfg" / "datasets" / data)["names"])


def check_backbone(model: Any, path: Path) -> None:
    """Checks that a model has the backbone of this package.

    Raises:
        SuiteError: If the model has another backbone.
    """
    found = type(model.model[0]).__name__
    if found != "TimmBackbone" or not model.model[0].name.startswith(BACKBONE):
        raise SuiteError(f"{path.name} begins with {found}, not with TimmBackbone on {BACKBONE}")


# ------------------------------------------------------------------------------------------------ the data


class Thing(NamedTuple):
    """Object in a photograph.

    The box is (left, top, right, bottom), relative to the size of the photograph.
    """

    name: str
    box: tuple[float, float, float, float]


THINGS = {
    "bus": [
        Thing("bus", (0.012, 0.213, 0.988, 0.693)),
        Thing("person", (0.058, 0.369, 0.294, 0.836)),
        Thing("person", (0.276, 0.376, 0.428, 0.797)),
        Thing("person", (0.826, 0.359, 1.0, 0.815)),
    ],
    "zidane": [
        Thing("person", (0.580, 0.056, 0.900, 0.984)),
        Thing("person", (0.094, 0.282, 0.770, 0.990)),
        Thing("tie", (0.341, 0.607, 0.409, 0.985)),
    ],
    "flower": [Thing("potted plant", (0.263, 0.199, 0.697, 0.841)), Thing("potted plant", (0.45, 0.878, 0.731, 1.0))],
    "china": [Thing("boat", (0.573, 0.656, 0.589, 0.674)), Thing("boat", (0.666, 0.639, 0.677, 0.653))],
}
# Class numbers of objects in each dataset. DOTA has no class for flowers and people, Cityscapes none for boats.
COCO = {"person": 0, "bus": 5, "boat": 8, "tie": 27, "potted plant": 58}
DOTA = {"bus": 9, "boat": 1, "person": 10}  # large vehicle, ship, small vehicle
CITYSCAPES = {"person": 24, "bus": 28, "potted plant": 21}
ROAD, BUILDING, SKY = 7, 11, 23
METERS = {"person": 4.0, "tie": 3.9, "bus": 8.0, "potted plant": 0.6, "boat": 400.0}
IMAGENET = [
    *("n01440764", "n02102040", "n02979186", "n03000684", "n03028079"),
    *("n03394916", "n03417042", "n03425413", "n03445777", "n03888257"),
]
# Key points of a person, relative to the box: nose, then left and right of eyes, ears, shoulders, elbows, wrists, hips,
# knees, ankles. PORTRAIT has the first seven, for a person that is visible to the waist.
STANDING = (
    *((0.5, 0.07), (0.54, 0.05), (0.46, 0.05), (0.6, 0.07), (0.4, 0.07), (0.75, 0.2), (0.25, 0.2), (0.85, 0.35)),
    *((0.15, 0.35), (0.8, 0.48), (0.2, 0.48), (0.65, 0.52), (0.35, 0.52), (0.65, 0.75), (0.35, 0.75), (0.65, 0.95)),
    (0.35, 0.95),
)
PORTRAIT = ((0.5, 0.3), (0.58, 0.24), (0.42, 0.24), (0.68, 0.28), (0.32, 0.28), (0.9, 0.7), (0.1, 0.7))


class Scene(NamedTuple):
    """Photograph as an RGB array (H, W, 3), with the objects in it."""

    name: str
    image: Any
    things: list[Thing]


def scenes(width: int) -> list[Scene]:
    """Returns four photographs, and then their mirror images."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_sample_images
    from ultralytics.utils import ASSETS

    photos = {name: Image.open(ASSETS / f"{name}.jpg").convert("RGB") for name in ("bus", "zidane")}
    samples = load_sample_images()
    for path, pixels in zip(samples.filenames, samples.images, strict=True):
        photos[Path(path).stem] = Image.fromarray(pixels)
    found = []
    for mirrored in (False, True):
        for name, things in THINGS.items():
            photo = photos[name].resize((width, width * photos[name].height // photos[name].width))
            image = np.asarray(photo)
            if mirrored:
                image = image[:, ::-1]
                things = [
                    Thing(kind, (1 - right, top, 1 - left, bottom)) for kind, (left, top, right, bottom) in things
                ]
            found.append(Scene(f"{name}{'_mirrored' if mirrored else ''}", image, things))
    return found


def write_datasets(folder: Path) -> None:
    """Writes small datasets under the names of Ultralytics' datasets.

    Most have four images for training and their mirror images for validation.
    """
    import numpy as np
    from PIL import Image
    from ultralytics.data.converter import convert_to_multispectral
    from ultralytics.data.utils import save_depth_png

    for i, scene in enumerate(scenes(320)):
        split = "train" if i < 4 else "val"

        def save(data: str, kind: str, suffix: str, split: str = split, name: str = scene.name) -> Path:
            path = folder / data / kind / split / f"{name}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            return path

        for data, label in LABELS.items():
            Image.fromarray(scene.image).save(save(data, "images", ".jpg"))
            save(data, "labels", ".txt").write_text("".join(f"{row}\n" for row in label(scene)))
        # Images of Cityscapes are twice as wide as high.
        wide = Image.fromarray(scene.image).resize((320, 160))
        wide.save(save("cityscapes8", "images", ".jpg"))
        Image.fromarray(semantic_mask(scene, (160, 320))).save(save("cityscapes8", "masks", ".png"))
        Image.fromarray(scene.image).save(save("depth8-png", "images", ".jpg"))
        save_depth_png(save("depth8-png", "depth", ".png"), depth_map(scene))
        path = save("coco8-multispectral", "images", ".jpg")
        Image.fromarray(scene.image).save(path)
        convert_to_multispectral(path)
        path.unlink()
        for suffix in FORMATS[split]:
            if i % 4 == FORMATS[split].index(suffix) % 4:
                Image.fromarray(scene.image).save(save("coco12-formats", "images", f"_{suffix}.{suffix}"))
                rows = box_labels(scene)
                save("coco12-formats", "labels", f"_{suffix}.txt").write_text("".join(f"{row}\n" for row in rows))
    pictures = [scene.image for scene in scenes(160)]
    for i, name in enumerate(IMAGENET):
        for split in ("train", "val"):
            path = folder / "imagenet10" / split / name / f"{name}_0.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture = pictures[(i + (split == "val")) % len(pictures)]
            height = picture.shape[0]
            Image.fromarray(np.ascontiguousarray(picture[: height - 2 * i])).save(path)


def box_labels(scene: Scene, classes: dict[str, int] = COCO) -> list[str]:
    rows = []
    for name, (left, top, right, bottom) in scene.things:
        if name in classes:
            center = f"{(left + right) / 2:.6f} {(top + bottom) / 2:.6f}"
            rows.append(f"{classes[name]} {center} {right - left:.6f} {bottom - top:.6f}")
    return rows


def segment_labels(scene: Scene) -> list[str]:
    """Returns outlines with eight corners."""
    rows = []
    for name, (left, top, right, bottom) in scene.things:
        corners = []
        for i in range(8):
            x, y = math.cos(i * math.pi / 4), math.sin(i * math.pi / 4)
            corners += [(left + right + x * (right - left)) / 2, (top + bottom + y * (bottom - top)) / 2]
        rows.append(" ".join([str(COCO[name]), *(f"{value:.6f}" for value in corners)]))
    return rows


def pose_labels(scene: Scene) -> list[str]:
    people = [thing for thing in scene.things if thing.name == "person"]
    rows = box_labels(Scene(scene.name, scene.image, people))
    template = STANDING if scene.name.startswith("bus") else PORTRAIT
    for i, (_, (left, top, right, bottom)) in enumerate(people):
        for x, y in template:
            rows[i] += f" {left + x * (right - left):.6f} {top + y * (bottom - top):.6f} 2"
        rows[i] += " 0.0 0.0 0" * (len(STANDING) - len(template))
    return rows


def oriented_labels(scene: Scene) -> list[str]:
    """Returns boxes rotated by five degrees."""
    rows = []
    height, width = scene.image.shape[:2]
    cos, sin = math.cos(math.radians(5)), math.sin(math.radians(5))
    for name, (left, top, right, bottom) in scene.things:
        if name not in DOTA:
            continue
        half_w, half_h = 0.45 * (right - left) * width, 0.45 * (bottom - top) * height
        corners = []
        for x, y in ((-half_w, -half_h), (half_w, -half_h), (half_w, half_h), (-half_w, half_h)):
            corners.append((left + right) / 2 + (x * cos - y * sin) / width)
            corners.append((top + bottom) / 2 + (x * sin + y * cos) / height)
        rows.append(" ".join([str(DOTA[name]), *(f"{min(max(value, 0.0), 1.0):.6f}" for value in corners)]))
    return rows


def semantic_mask(scene: Scene, size: tuple[int, int]) -> Any:
    """Returns a mask with sky, building, road and the objects in front of them."""
    import numpy as np

    mask = np.full(size, BUILDING, dtype=np.uint8)
    mask[: size[0] // 5] = SKY
    mask[size[0] * 7 // 10 :] = ROAD
    for name, box in scene.things:
        if name in CITYSCAPES:
            mask[_pixels(box, size)] = CITYSCAPES[name]
    mask[-2:] = 0  # not labeled
    return mask


def depth_map(scene: Scene) -> Any:
    """Returns depth in meters, (H, W).

    The ground is nearer toward the bottom. Objects stand in front of it. The sky has no depth (0).
    """
    import numpy as np

    size = scene.image.shape[:2]
    depth = np.repeat(np.linspace(20.0, 2.0, size[0], dtype=np.float32)[:, None], size[1], axis=1)
    depth[: size[0] // 5] = 0.0
    for name, box in scene.things:
        depth[_pixels(box, size)] = min(METERS[name], 60.0)
    return depth


def _pixels(box: tuple[float, float, float, float], size: tuple[int, int]) -> tuple[slice, slice]:
    left, top, right, bottom = box
    return slice(int(top * size[0]), int(bottom * size[0])), slice(int(left * size[1]), int(right * size[1]))


LABELS: dict[str, Callable[[Scene], list[str]]] = {
    "coco8": box_labels,
    "coco8-grayscale": box_labels,
    "coco8-multispectral": box_labels,
    "coco8-seg": segment_labels,
    "coco8-pose": pose_labels,
    "dota8": oriented_labels,
}
FORMATS = {"train": ("bmp", "jpeg", "jpg", "png", "webp", "tif"), "val": ("tiff", "mpo", "jp2", "avif", "png", "jpg")}


def write_clips(folder: Path) -> None:
    """Writes the picture and the videos that tests would download.

    Each video pans over a photograph of people in four frames.
    """
    import cv2
    from PIL import Image

    folder.mkdir(parents=True)
    bus, _, _, china = scenes(480)[:4]
    Image.fromarray(china.image).save(folder / "boats.jpg")
    for name in ("solutions_ci_demo.mp4", "solution_ci_pose_demo.mp4", "decelera_portrait_min.mov"):
        writer = cv2.VideoWriter(str(folder / name), cv2.VideoWriter.fourcc(*"mp4v"), 8, (320, 416))
        for i in range(4):
            frame = bus.image[16 * i : 16 * i + 416, 32 * i : 32 * i + 320]
            writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
        writer.release()
        if not cv2.VideoCapture(str(folder / name)).read()[0]:
            raise SuiteError(f"OpenCV cannot write {name}")


# ---------------------------------------------------------------------- in the test processes

_suite: dict[str, Any] = {}


def _start() -> None:
    """Registers our classes and logs each test that calls the backbone."""
    import ultralytics.cfg

    from stvit.adapters.yolo import TimmBackbone

    forward = TimmBackbone._features

    def counted(self: Any, x: Any) -> Any:
        test = os.environ.get("PYTEST_CURRENT_TEST", "")
        log = Path(os.environ["YOLO_CONFIG_DIR"]) / "ours.txt"
        if test and test != _suite.get("counted"):
            _suite["counted"] = test
            with log.open("a", encoding="utf-8") as file:
                file.write(f"{test.removeprefix('tests/').rpartition(' (')[0]}\n")
        return forward(self, x)

    TimmBackbone._features = counted
    ultralytics.cfg.TESTS_RUNNING = False  # True would write results beside the installed package


def yolo_command() -> int:
    """Runs the command that the tests call as `yolo`."""
    _start()
    from stvit.tools.yolo import main as yolo_main

    return int(yolo_main() or 0)


def _entry(test: str) -> str | None:
    """Returns the entry of LEFT_OUT for a test, or None."""
    return next((name for name in (test, test.partition("[")[0]) if name in LEFT_OUT), None)


def _test_id(nodeid: str) -> str:
    return nodeid.removeprefix("tests/")


def pytest_configure(config: pytest.Config) -> None:
    _suite.update(json.loads(os.environ["STVIT_SUITE"]), outcomes={}, skipped={}, left_out=[], errors=[], slow=0)
    _start()


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Iterator[None]:
    """Collects tests that need a network, too.

    The files that they download already exist.
    """
    import ultralytics.utils
    import ultralytics.utils.checks
    import ultralytics.utils.events

    ultralytics.utils.ONLINE = True
    try:
        return (yield)
    finally:
        ultralytics.utils.ONLINE = False


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects the tests in LEFT_OUT.

    Afterwards Ultralytics' conftest deselects slow tests.
    """
    ids = {item: _test_id(item.nodeid) for item in items}
    entries = {_entry(test) for test in ids.values()}
    expected = [name for name in LEFT_OUT if name.partition("::")[0] in _suite["files"]]
    _suite["errors"] += [f"LEFT_OUT has {name}, no test of that name" for name in expected if name not in entries]
    names = {name for test in ids.values() for name in (test, test.partition("[")[0])}
    if _suite["mode"] == "fast":
        _suite["errors"] += [f"FAST has {name}, no test of that name" for name in FAST if name not in names]
        items[:] = [item for item in items if ids[item] in FAST or ids[item].partition("[")[0] in FAST]
    left_out = [item for item in items if _entry(ids[item])]
    if _suite["mode"] == "left out":
        items[:] = left_out
        return
    slow = config.getoption("--slow")
    _suite["slow"] = 0 if slow else sum("slow" in item.keywords and not _entry(ids[item]) for item in items)
    _suite["left_out"] = [ids[item] for item in left_out if slow or "slow" not in item.keywords]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if not _entry(ids[item])]


@pytest.fixture(autouse=True)
def _own_folders(request: pytest.FixtureRequest) -> Iterator[None]:
    """Copies our model files to the folder of a test, and restores the settings."""
    if {"monkeypatch", "tmp_path"} <= set(request.fixturenames):
        for path in request.config.rootpath.glob("yolo26*.yaml"):
            shutil.copy(path, request.getfixturevalue("tmp_path"))
    settings = Path(os.environ["YOLO_CONFIG_DIR"]) / "Ultralytics" / "settings.json"
    before = settings.read_text()
    if _test_id(request.node.nodeid) == SEES_NOTHING:
        shutil.copy(Path("weights", "sees_nothing.pt"), "yolo26n.pt")
    yield
    Path(request.config.rootpath, "yolo26n.pt").unlink(missing_ok=True)
    settings.write_text(before)
    os.chdir(request.config.rootpath)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    test = _test_id(report.nodeid)
    if report.failed or (report.when == "call" and report.passed):
        if _suite["outcomes"].get(test) != "failed":
            _suite["outcomes"][test] = report.outcome
    elif report.skipped:
        _suite["outcomes"][test] = "skipped"
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        _suite["skipped"][test] = reason.removeprefix("Skipped: ")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    log = Path(os.environ["YOLO_CONFIG_DIR"]) / "ours.txt"
    report = {key: _suite[key] for key in ("outcomes", "skipped", "left_out", "errors", "slow")}
    report["ours"] = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    Path(_suite["report"]).write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())

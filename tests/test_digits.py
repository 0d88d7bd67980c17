"""Tests the programs that make a data set of digits on photographs, and train detectors on it."""

import csv
import importlib.util
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from stvit.adapters.yolo import YOLO
from stvit.images import open_image
from stvit.tools.detection.coco import Coco

ROOT = Path(__file__).parents[1]
SIZES = {"train": 12, "val": 6}


def load_program(name: str) -> ModuleType:
    """Returns a program in docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"docs/{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for their types
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_program("make_digit_scenes")


@pytest.fixture(scope="module")
def detectors() -> ModuleType:
    return load_program("digit_detectors")


@pytest.fixture(scope="module")
def scenes(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small data set. Tests must not change it."""
    folder = tmp_path_factory.mktemp("scenes") / "digits"
    script.main([str(folder), "--train", str(SIZES["train"]), "--val", str(SIZES["val"])])
    return folder


@pytest.fixture(scope="module")
def instances(scenes: Path) -> dict[str, Any]:
    """Annotations of each split in COCO's format."""
    return {split: json.loads((scenes / f"{split}.json").read_text()) for split in SIZES}


def read_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------------------------------------------------------------
# The data set


def test_boxes_are_the_smallest_that_contain_the_ink(script: ModuleType) -> None:
    pictures, labels = script.load_digits()
    photos = list(script.load_photos("train").values())
    counts: Counter[int] = Counter()
    for number in range(60):
        rng = np.random.default_rng(number)
        image = script.crop_photo(photos[number % len(photos)], rng)
        before = image.copy()
        digits = script.draw_digits(image, pictures, labels, np.arange(len(labels)), rng)
        counts[len(digits)] += 1
        ink = (image != before).any(-1)
        outside = ink.copy()
        for digit in digits:
            left, top, right, bottom = digit.box
            outside[top:bottom, left:right] = False
            assert labels[digit.index] == digit.label
            for edge in (ink[top, left:right], ink[bottom - 1, left:right]):
                assert edge.any()
            for edge in (ink[top:bottom, left], ink[top:bottom, right - 1]):
                assert edge.any()
        assert not outside.any()
        assert image.min() >= 0 and image.max() <= 255
    assert counts.keys() == set(range(1, 7))


def test_ink_differs_from_every_background(script: ModuleType) -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        light, spread = rng.uniform(0, 255), rng.uniform(0, 100)
        region = np.clip(light + spread * rng.standard_normal((20, 12, 3)), 0, 255)
        ink = np.ones((20, 12))
        color = script.choose_color(region, ink, rng)
        assert color.min() >= 0 and color.max() <= 255
        assert abs(color @ script.LUMA - (region @ script.LUMA).mean()) > 40


def test_files_agree_with_each_other(scenes: Path, instances: dict[str, Any]) -> None:
    target = load_digits().target
    for split, count in SIZES.items():
        assert Coco(scenes / f"{split}.json", with_masks=False).count_objects() == len(instances[split]["annotations"])
        images = sorted((scenes / "images" / split).iterdir())
        assert len(images) == len(list((scenes / "labels" / split).iterdir())) == count
        boxes: dict[str, list[tuple[float, ...]]] = {}
        names = {image["id"]: image["file_name"] for image in instances[split]["images"]}
        for annotation in instances[split]["annotations"]:
            assert target[annotation["digit"]] == annotation["category_id"]
            left, top, width, height = annotation["bbox"]
            assert 0 <= left < left + width <= 160 and 0 <= top < top + height <= 160
            row = (annotation["category_id"], left + width / 2, top + height / 2, width, height)
            boxes.setdefault(names[annotation["image_id"]], []).append(row)
        for path in images:
            assert Image.open(path).size == (160, 160)
            lines = (scenes / "labels" / split / f"{path.stem}.txt").read_text().splitlines()
            rows = [[float(value) for value in line.split()] for line in lines]
            assert [(label, *(160 * value for value in box)) for label, *box in rows] == [
                pytest.approx(row, abs=1e-3) for row in boxes[path.name]
            ]


def test_no_digit_and_no_photo_is_in_both_splits(script: ModuleType, instances: dict[str, Any]) -> None:
    for items, key in (("annotations", "digit"), ("images", "photo")):
        used = [{item[key] for item in instances[split][items]} for split in SIZES]
        assert used[0] and used[1] and not used[0] & used[1]
    assert not set(script.load_photos("train")) & set(script.load_photos("val"))
    digits = load_digits()
    numbers = script.split_digits(digits.target)
    assert sorted([*numbers["train"], *numbers["val"]]) == list(range(len(digits.target)))
    pixels = [{picture.tobytes() for picture in digits.images[numbers[split]]} for split in SIZES]
    assert not pixels[0] & pixels[1]
    shares = np.bincount(digits.target[numbers["val"]]) / np.bincount(digits.target)
    assert np.abs(shares - 0.2).max() < 0.01


def test_same_seed_gives_the_same_bytes(script: ModuleType, scenes: Path, tmp_path: Path) -> None:
    script.write_scenes(tmp_path / "again", SIZES, seed=0)
    assert read_files(tmp_path / "again") == read_files(scenes)
    script.write_scenes(tmp_path / "other", {"train": 1, "val": 1}, seed=1)
    images = [folder / "images/train/00000.jpg" for folder in (scenes, tmp_path / "other")]
    assert images[0].read_bytes() != images[1].read_bytes()
    # More images do not change the earlier ones.
    script.write_scenes(tmp_path / "fewer", {"train": 2, "val": 1}, seed=0)
    for name, content in read_files(tmp_path / "fewer" / "images").items():
        assert content == (scenes / "images" / name).read_bytes()


@pytest.mark.parametrize("name", ["notes.txt", "images"])
def test_folder_that_is_not_empty_is_refused(script: ModuleType, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(SystemExit, match="not an empty folder; choose a new one"):
        script.main([str(tmp_path), "--train", "1", "--val", "1"])
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_missing_package_is_named_before_anything_is_written(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "skimage" else find(name))
    with pytest.raises(SystemExit, match="scikit-image is not installed; run: pip install scikit-learn scikit-image"):
        script.main([str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------------------------------------------------------------
# The detectors


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.long
def test_finished_runs_are_skipped_measured_and_drawn(
    detectors: ModuleType, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(detectors.RECIPE, "imgsz", 32)
    train = ["train", str(scenes), str(tmp_path), "--models", "yolo26n", "--seeds", "7", "--epochs"]
    assert detectors.main([*train, "1"]) == 0
    (run,) = read_rows(tmp_path / "accuracy.csv")
    assert (run["model"], run["backbone"], run["seed"], run["epochs"]) == ("yolo26n", "stock", "7", "1")
    settings = YOLO(tmp_path / "yolo26n-seed7" / "weights" / "resume.pt").ckpt["train_args"]
    assert (settings["seed"], settings["epochs"], settings["fliplr"], settings["mosaic"]) == (7, 1, 0, 1)

    # Also a run whose process was killed between the last epoch and the test trains no more.
    monkeypatch.setattr(detectors.YOLO, "train", None)
    report = tmp_path / "yolo26n-seed7" / "accuracy.json"
    for is_tested in (True, False):
        if not is_tested:
            report.unlink()
        assert detectors.main([*train, "3"]) == 1
        assert "is a run with other settings (epochs: 1, not 3); choose another" in capsys.readouterr().err
        assert detectors.main([*train, "1"]) == 0
        assert read_rows(tmp_path / "accuracy.csv")[0]["map50_95"] == run["map50_95"]

    assert not (tmp_path / "digits.png").exists()
    latency = ["latency", str(tmp_path), "--img-size", "32", "64", "--repeats", "1", "--models", "yolo26n"]
    assert detectors.main(latency) == 0
    rows = read_rows(tmp_path / "latency.csv")
    assert [(row["model"], row["img_size"]) for row in rows] == [("yolo26n", "32"), ("yolo26n", "64")]
    assert Image.open(tmp_path / "digits.png").width > 500
    picture = ["picture", str(scenes), str(tmp_path), "--images", "2", "--models", "yolo26n"]
    assert detectors.main(picture) == 0
    pixels = np.asarray(open_image(tmp_path / "detections.jpg"), int)
    yellow = (np.abs(pixels - (255, 255, 0)) < 32).all(-1)
    top, bottom = yellow[: len(yellow) // 2], yellow[len(yellow) // 2 :]
    assert top.any() and not bottom.any()  # the detector of one epoch finds nothing
    for command in (latency, picture):
        assert detectors.main([*command, "yolo26n-stvit"]) == 1
        assert "has no complete run of yolo26n-stvit; train it first" in capsys.readouterr().err


def test_mean_over_seeds(detectors: ModuleType, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for seed, score in ((1, 0.48), (2, 0.52)):
        report = {"model": "yolo26n", "backbone": "stock", "seed": seed, "epochs": 1, "map50_95": score, "map50": 0.7}
        (tmp_path / f"yolo26n-seed{seed}").mkdir()
        (tmp_path / f"yolo26n-seed{seed}" / "accuracy.json").write_text(json.dumps(report))
    flags = ["--models", "yolo26n", "--epochs", "1", "--seeds"]
    assert detectors.main(["train", str(scenes), str(tmp_path), *flags, "1", "2"]) == 0
    # Standard deviation 2.83 points, 12.7 standard errors with one degree of freedom.
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.split() == ["yolo26n", "2", "50.0", "24.6", "to", "75.4"]
    (tmp_path / "yolo26n-seed2" / "accuracy.json").unlink()
    assert detectors.main(["train", str(scenes), str(tmp_path), *flags, "1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["yolo26n", "1", "48.0"]


def test_run_of_other_data_is_not_continued(
    detectors: ModuleType, script: ModuleType, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    results = tmp_path / "results"
    folder = results / "yolo26n-seed2"
    folder.mkdir(parents=True)
    settings = {"epochs": 1, "recipe": detectors.RECIPE, "data": detectors._digest(scenes)}
    (folder / "settings.json").write_text(json.dumps(settings))
    script.write_scenes(tmp_path / "other", {"train": 1, "val": 1}, seed=1)
    flags = [str(results), "--models", "yolo26n", "--seeds", "2", "--epochs", "1"]
    assert detectors.main(["train", str(tmp_path / "other"), *flags]) == 1
    assert "is a run with other settings (data); choose another RESULTS folder" in capsys.readouterr().err


def test_unfinished_run_is_not_measured(
    detectors: ModuleType, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "yolo26n-seed1" / "weights").mkdir(parents=True)
    (tmp_path / "yolo26n-seed1" / "weights" / "resume.pt").touch()
    for command in (["latency"], ["picture", str(scenes)]):
        assert detectors.main([*command, str(tmp_path), "--models", "yolo26n"]) == 1
        assert "has no complete run of yolo26n" in capsys.readouterr().err


def test_unknown_model(detectors: ModuleType, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert detectors.main(["train", str(scenes), str(tmp_path / "results"), "--models", "yolo26n", "nosuch"]) == 1
    assert "no model file nosuch.yaml; correct --models" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("flag", ["--seed", "--train", "--val"])
def test_negative_numbers_are_refused(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture, flag: str
) -> None:
    with pytest.raises(SystemExit):
        script.main([str(tmp_path / "new"), flag, "-1"])
    assert f"argument {flag}" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.long
def test_killed_run_continues_after_its_last_complete_epoch(scenes: Path, tmp_path: Path) -> None:
    program = [sys.executable, str(ROOT / "docs/digit_detectors.py"), "train", str(scenes), str(tmp_path)]
    program += ["--models", "yolo26n-stvit", "--seeds", "1", "--epochs", "3"]
    saved = tmp_path / "yolo26n-stvit-seed1" / "weights" / "resume.pt"
    process = subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not saved.exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    stopped = YOLO(saved).ckpt["epoch"] + 1
    assert 1 <= stopped < 3 and not (tmp_path / "accuracy.csv").exists()
    # What a process leaves that is killed while it writes.
    (saved.parent / "last.pt").write_bytes(b"half")

    done = subprocess.run(program, capture_output=True, text=True, check=True)
    assert f"from epoch {stopped + 1} to 3 total epochs" in done.stdout + done.stderr
    assert YOLO(saved).ckpt["epoch"] == 2
    (run,) = read_rows(tmp_path / "accuracy.csv")
    assert run["model"] == "yolo26n-stvit" and run["backbone"].startswith("stvit_")


def test_missing_data_set(detectors: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for command in ("train", "picture"):
        assert detectors.main([command, str(tmp_path), str(tmp_path / "results")]) == 1
        assert "has no digits.yaml; make it: python docs/make_digit_scenes.py" in capsys.readouterr().err

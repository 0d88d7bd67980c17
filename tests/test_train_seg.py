"""Tests the segmentation commands: training, evaluation and prediction."""

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from stvit.adapters import segmentation
from stvit.tools import predict_seg, train_seg, validate_seg
from stvit.tools.common.checkpoint import load_checkpoint
from tests.hub_server import Hub
from tests.label_maps import CLASS_NAMES, write_labeled_photos
from tests.test_resume import same
from tests.torchrun import torchrun

CONFIGS = sorted((Path(train_seg.__file__).parents[1] / "configs/seg").glob("*.yaml"))
# Settings of a small model.
DATA = ["--workers=0"]
RUN = (
    "--reduce-zero-label --short-side=64 --backbone=test_stvit --crop-size=64 --no-norm-eval --batch-size=2 "
    "--warmup-epochs=0 --lr=3e-3 --checkpoint-steps=0"
).split()
SMALL = ["--model-kwargs", "decoder_channels=16"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dataset of four photographs. Tests must not change it."""
    return write_labeled_photos(tmp_path_factory.mktemp("data"), width=96)


def train(data: Path, output: Path, *flags: str) -> int:
    line = [*RUN, *DATA, f"--data-dir={data}", f"--class-names={data / 'names.txt'}", f"--output={output}"]
    return train_seg.main([*line, "--experiment=run", *SMALL, *flags])


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run. Tests must not change it."""
    folder = tmp_path_factory.mktemp("runs")
    assert train(data, folder, "--epochs=3", "--model-ema", "--model-ema-decay=0.5") == 0
    return folder / "run"


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def last_error(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.splitlines()[-1]


# Training


def test_training_records_losses_and_metrics(run: Path) -> None:
    history = rows(run / "summary.csv")
    assert len(history) == 3
    for row in history:
        parts = float(row["train_loss_decode"]) + float(row["train_loss_aux"])
        assert float(row["train_loss"]) == pytest.approx(parts, rel=1e-5)
        for kind in ("eval", "ema"):
            assert all(0 <= float(row[f"{kind}_{name}"]) <= 100 for name in ("miou", "macc", "aacc"))
    assert float(history[-1]["train_loss"]) < float(history[0]["train_loss"])
    (last,) = (run / "checkpoints").glob("00003-*.pt")
    assert all(load_checkpoint(last)["data"][split]["contents"] for split in ("train", "val"))
    config = json.loads((run / "best/config.json").read_text())
    assert config["label_names"] == CLASS_NAMES and config["category_ids"] == [1, 2, 3]
    best = max(float(row[f"{kind}_miou"]) for row in history for kind in ("eval", "ema"))
    (metric,) = config["stvit"]["metrics"]
    assert metric["name"] == "mIoU" and metric["value"] == pytest.approx(best)


def test_the_best_weights_have_the_recorded_mean_iou(run: Path, data: Path, tmp_path: Path) -> None:
    flags = [*DATA, f"--data-dir={data}", f"--checkpoint={run}", f"--output={tmp_path / 'report'}", "--multi-scale"]
    assert validate_seg.main(flags) == 0
    results = json.loads((tmp_path / "report/results.json").read_text())
    recorded = json.loads((run / "best/config.json").read_text())["stvit"]["metrics"][0]["value"]
    assert results["miou"] == pytest.approx(recorded, rel=1e-6)
    assert results["short_side"] == 64 and results["long_side"] == 2048
    assert results["images"] == 4 and results["model"] == "upernet" and results["backbone"] == "test_stvit"
    assert results["ms_miou"] != results["miou"] and 0 <= results["ms_aacc"] <= 100
    classes = rows(tmp_path / "report/per_class.csv")
    assert [row["name"] for row in classes] == CLASS_NAMES
    assert results["miou"] == pytest.approx(np.mean([float(row["iou"]) for row in classes]), abs=1e-3)
    assert results["ms_macc"] == pytest.approx(np.mean([float(row["ms_acc"]) for row in classes]), abs=1e-3)
    labels = [np.asarray(Image.open(path)) for path in (data / "annotations/validation").iterdir()]
    assert [int(row["pixels"]) for row in classes] == [sum((x == v).sum() for x in labels) for v in (1, 2, 3)]
    assert (tmp_path / "report/confusion.png").exists()
    assert validate_seg.main(flags) == 1  # the report is not overwritten


@pytest.mark.long
@pytest.mark.parametrize("processes", [2])
def test_metrics_are_exact_on_several_processes(processes: int, run: Path, data: Path, tmp_path: Path) -> None:
    # Three images for two processes.
    images, labels = tmp_path / "images", tmp_path / "labels"
    for source, target in ((data / "images/validation", images), (data / "annotations/validation", labels)):
        target.mkdir()
        for path in sorted(source.iterdir())[:3]:
            shutil.copy(path, target)
    flags = [*DATA, f"--val-images={images}", f"--val-labels={labels}", f"--checkpoint={run}"]
    assert validate_seg.main([*flags, f"--output={tmp_path / 'one'}"]) == 0
    line = [*torchrun(processes), "-m", "stvit.tools.validate_seg", *flags, f"--output={tmp_path / 'two'}"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    assert two["processes"] == processes and one["images"] == two["images"] == 3
    assert [one[name] for name in ("miou", "macc", "aacc")] == [two[name] for name in ("miou", "macc", "aacc")]


@pytest.mark.long  # test_distributed.py trains classifiers on several processes
@pytest.mark.parametrize("model", ["upernet", "semantic_fpn"])
def test_training_on_several_processes(model: str, data: Path, tmp_path: Path) -> None:
    flags = [*RUN, *DATA, f"--data-dir={data}", f"--class-names={data / 'names.txt'}", f"--output={tmp_path}"]
    flags += ["--experiment=run", "--epochs=2", f"--model={model}", "--model-ema", "--model-ema-decay=0.5"]
    line = [*torchrun(2), "-m", "stvit.tools.train_seg", *flags]
    done = subprocess.run(line, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    history = rows(tmp_path / "run/summary.csv")
    assert len(history) == 2 and all(np.isfinite(float(value)) for row in history for value in row.values())
    assert validate_seg.main([*DATA, f"--data-dir={data}", f"--checkpoint={tmp_path / 'run/best'}"]) == 0


def test_images_without_labels_give_a_loss_of_zero(data: Path, tmp_path: Path) -> None:
    mixed = Path(shutil.copytree(data, tmp_path / "data"))
    for path in (mixed / "annotations/training").glob("*_0.png"):
        Image.new("L", Image.open(path).size, 0).save(path)
    assert train(mixed, tmp_path, "--epochs=4", "--log-interval=1") == 0
    events = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    losses = [event["loss"] for event in events if event["event"] == "train"]
    assert losses and all(np.isfinite(losses))


def test_other_decoders_and_flags(data: Path, tmp_path: Path) -> None:
    flags = ["--model=semantic_fpn", "--batch-size=1", "--epochs=1", "--amp", "--channels-last", "--layer-decay=0.8"]
    small = ["--model-kwargs", "decoder_pyramid_channels=32", "decoder_segmentation_channels=32"]
    gray = ["--in-chans=1", "--mean", "0.4", "--std", "0.2", "--drop-path=0.1", "--grad-checkpointing"]
    assert train(data, tmp_path, *flags, *small, *gray, "--grad-accum-steps=2") == 0
    model = segmentation.load(tmp_path / "run")
    assert type(model).__name__ == "SemanticFPN" and model.in_chans == 1 and model.mean == [0.4]
    assert model.recipe.args["drop_path_rate"] == 0.1
    assert train(data, tmp_path, "--experiment=aspp", "--model=deeplabv3plus", "--epochs=1") == 0


def test_fine_tuning_for_other_classes(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [f"--pretrained-path={run}", "--epochs=1", "--lr=0"]
    assert train(data, tmp_path, *flags, "--class-names", str(four_names(tmp_path))) == 0
    assert "4 of other classes stay random" in capsys.readouterr().out
    before, after = segmentation.load(run), segmentation.load(tmp_path / "run")
    assert after.num_classes == 4 and before.num_classes == 3
    for key, value in before.named_parameters():
        if not key.startswith(("segmentation_head", "auxiliary_head.4")):
            assert torch.equal(after.get_parameter(key), value), key
    assert train(data, tmp_path, *flags, "--experiment=b", "--model-kwargs", "decoder_channels=8") == 1
    assert "is another model: " in last_error(capsys)


def four_names(folder: Path) -> Path:
    (folder / "four.txt").write_text("\n".join([*CLASS_NAMES, "other"]))
    return folder / "four.txt"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data-dir=nowhere"], "nowhere/images/training is not a folder; it must contain one image per example; che"),
        (["--class-names=nowhere"], "--class-names nowhere does not exist"),
        (["--no-reduce-zero-label"], "label maps are wrong"),
        (["--backbone=stvit_smal"], "unknown backbone 'stvit_smal'; did you mean stvit_small"),
        (["--model-kwargs", "channel=8"], "upernet has no argument 'channel'"),
        (["--model-kwargs", "in_chans=1"], "--model-kwargs in_chans: pass --in-chans instead"),
        (["--pretrained-path=nowhere"], "--pretrained-path: nowhere"),
        (["--in-chans=2"], "--in-chans must be 1 (gray) or 3 (color), got 2"),
        (["--batch-size=8"], "an update takes 8 images (--batch-size 8), but there are only 4 training images"),
        (["--batch-size=1"], "BatchNorm of upernet needs at least two images per step and process"),
        (["--lr=1e30"], "the loss became"),
        (["--long-side=50"], "--short-side 64 is larger than --long-side 50; lower it to at most 50"),
    ],
)
def test_mistakes_are_one_clear_line(
    flags: list[str], message: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(data, tmp_path, "--epochs=2", *flags) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]


def test_unchecked_labels_stop_the_training(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = Path(shutil.copytree(data, tmp_path / "data"))
    Image.new("L", (5, 5), 1).save(wrong / "annotations/training/bus_0.png")
    assert train(wrong, tmp_path, "--epochs=1") == 1
    assert "bus_0.png: 5x5 pixels, but its image has 96x128; make both the same" in last_error(capsys)
    assert train(wrong, tmp_path, "--epochs=1", "--no-check-data") == 1
    assert "annotations/training/bus_0.png: 5x5 pixels" in last_error(capsys)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--backbone=resnet99"], "unknown backbone 'resnet99'"),
        (["--in-chans=2"], "--in-chans must be 1 (gray) or 3 (color), got 2"),
        (["--model-kwargs", "channel=8"], "upernet has no argument 'channel'"),
        (["--pretrained-path=nowhere"], "--pretrained-path: nowhere"),
        (["--batch-size=1"], "BatchNorm of upernet needs at least two images per step and process"),
        (["--batch-size=1", "--model=deeplabv3plus"], "BatchNorm of deeplabv3plus needs at least two images"),
        (["--opt=adamx"], "cannot create optimizer adamx"),
        ([], "label maps are wrong"),
    ],
)
def test_flags_are_checked_before_the_label_maps(
    flags: list[str], message: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = [f"--val-labels={data / 'annotations/training'}", "--no-reduce-zero-label"]
    assert train(data, tmp_path, *wrong, *flags) == 1
    assert message in last_error(capsys)


def test_unreadable_images_are_skipped_up_to_a_limit(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = Path(shutil.copytree(data, tmp_path / "data"))
    for split in ("training", "validation"):
        (damaged / "images" / split / "bus_0.jpg").write_bytes(b"")
    assert train(damaged, tmp_path, "--epochs=1") == 1
    assert "bus_0.jpg: not an image of a supported format" in last_error(capsys)
    assert train(damaged, tmp_path, "--epochs=1", "--max-bad-images=2") == 0
    assert "2 images could not be read and were skipped" in capsys.readouterr().out


# Resume. Everything with a state: workers, accumulation, augmentation, dropout, drop path, EMA, a schedule by updates.
EPOCHS = 4
RESUMED = (
    f"--workers=1 --batch-size=2 --epochs={EPOCHS} --drop-path=0.2 --model-ema --model-ema-decay=0.9 "
    "--checkpoint-steps=1 --log-interval=1 --resume=auto"
).split()


def start(data: Path, folder: Path) -> subprocess.Popen[str]:
    line = [*RUN, *DATA, f"--data-dir={data}", f"--class-names={data / 'names.txt'}", f"--output={folder}"]
    command = [sys.executable, "-m", "stvit.tools.train_seg", *line, "--experiment=run", *RESUMED, *SMALL]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(data: Path, folder: Path) -> str:
    """Runs the command to its end, and returns its output."""
    process = start(data, folder)
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0, out
    return out


def updates_logged(folder: Path) -> int:
    log = folder / "run/log.jsonl"
    return log.read_bytes().count(b'"event": "train"') if log.exists() else 0


@pytest.fixture(scope="module")
def uninterrupted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert train(data, folder, *RESUMED) == 0
    return folder


@pytest.mark.parametrize("times", [1, pytest.param(3, marks=pytest.mark.long)])
def test_a_killed_run_is_the_same_run(times: int, data: Path, uninterrupted: Path, tmp_path: Path) -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    print("random moments of seed", seed)
    moments = random.Random(seed)
    for i in range(times):
        process, goal = start(data, tmp_path), updates_logged(tmp_path) + (1 if i else moments.randint(3, 4))
        while updates_logged(tmp_path) < goal and process.poll() is None:
            time.sleep(0.005)
        time.sleep(moments.uniform(0.0, 0.05))
        process.kill()
        out, _ = process.communicate()
        assert process.returncode == -signal.SIGKILL, out
    assert "resuming" in finish(data, tmp_path)
    for name in ("best", "last", "last_ema"):
        for file in ("model.safetensors", "config.json"):
            path = f"run/{name}/{file}"
            assert (tmp_path / path).read_bytes() == (uninterrupted / path).read_bytes(), path
    assert (tmp_path / "run/summary.csv").read_bytes() == (uninterrupted / "run/summary.csv").read_bytes()
    last = f"run/checkpoints/{EPOCHS:05d}-00000000.pt"
    assert same(load_checkpoint(tmp_path / last), load_checkpoint(uninterrupted / last))


def test_an_uploaded_run_loads_from_the_hub(hub: Hub, data: Path, tmp_path: Path) -> None:
    assert train(data, tmp_path, "--epochs=2", "--repo-id=org/segmenter", "--hub-every=1") == 0
    model, local = segmentation.load("hf-hub:org/segmenter"), segmentation.load(tmp_path / "run")
    assert model.label_names == CLASS_NAMES and model.category_ids == [1, 2, 3]
    assert all(map(torch.equal, model.state_dict().values(), local.state_dict().values()))
    card = hub.files("org/segmenter")["README.md"].decode()
    assert 'segmentation.load("hf-hub:org/segmenter")' in card and "pipeline_tag: image-segmentation" in card
    assert "mIoU" in card
    image = next((data / "images/validation").iterdir())
    assert predict_seg.main([str(image), "--checkpoint=hf-hub:org/segmenter", f"--output={tmp_path / 'out'}"]) == 0


# Evaluation


def test_evaluation_refuses_other_classes(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*DATA, f"--data-dir={data}", f"--checkpoint={run}"]
    assert validate_seg.main([*flags, f"--class-names={four_names(tmp_path)}"]) == 1
    assert "there are 3 classes, but 4 class names" in last_error(capsys)
    assert validate_seg.main([*flags, "--no-reduce-zero-label"]) == 1
    assert "expected 0 to 2, or 255 for ignored pixels" in last_error(capsys)
    assert validate_seg.main([*flags, f"--checkpoint={tmp_path}"]) == 1
    assert "--checkpoint: " in last_error(capsys)


# Prediction


@pytest.fixture
def photos(data: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(data / "images/validation", tmp_path / "photos"))
    (folder / "more").mkdir()
    shutil.copy(folder / "bus_0.jpg", folder / "more/bus.jpg")
    Image.open(folder / "bus_0.jpg").save(folder / "more/bus.png")
    return folder


def test_prediction_writes_label_maps_and_pictures(run: Path, data: Path, photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "predictions"
    assert predict_seg.main([str(photos), f"--checkpoint={run}", f"--output={output}"]) == 0
    names = sorted(path.relative_to(output / "labels").as_posix() for path in (output / "labels").rglob("*.png"))
    stems = ["bus_0.png", "bus_1.png", "more/bus.jpg.png", "more/bus.png.png", "zidane_0.png", "zidane_1.png"]
    assert names == stems
    # The label maps have the format of the dataset: they give the mIoU that the evaluation measures.
    intersection, union = np.zeros(4), np.zeros(4)
    for path in (data / "annotations/validation").iterdir():
        truth, found = (np.asarray(Image.open(folder / path.name)) for folder in (path.parent, output / "labels"))
        assert truth.shape == found.shape and found.min() >= 1
        for value in (1, 2, 3):
            intersection[value] += ((truth == value) & (found == value)).sum()
            union[value] += (((truth == value) | (found == value)) & (truth > 0)).sum()
    recorded = json.loads((run / "best/config.json").read_text())["stvit"]["metrics"][0]["value"]
    assert 100 * (intersection[1:] / union[1:]).mean() == pytest.approx(recorded, rel=1e-5)
    for name in names:
        picture, labels = (Image.open(output / kind / name) for kind in ("overlays", "labels"))
        assert picture.width > labels.width and picture.mode == "RGB"


def test_unreadable_images_are_named_at_the_end(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "bus_0.jpg").write_bytes(b"text")
    output = tmp_path / "predictions"
    flags = [f"--checkpoint={run}", f"--output={output}", "--multi-scale"]
    assert predict_seg.main([str(photos), *flags]) == 1
    captured = capsys.readouterr()
    assert "wrote the label maps and pictures of 5 images" in captured.out
    assert "1 of 6 images were skipped: bus_0.jpg: not an image" in captured.err.splitlines()[-1]
    assert captured.err.count("bus_0.jpg") == 1
    assert predict_seg.main([str(photos / "bus_1.jpg"), *flags]) == 0
    assert predict_seg.main([str(tmp_path / "nowhere"), *flags]) == 1


@pytest.mark.parametrize("command", [validate_seg, predict_seg])
def test_a_shorter_side_above_the_longer_one_is_refused(
    command: Any, run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [str(data / "images/validation")] if command is predict_seg else [*DATA, f"--data-dir={data}"]
    sides = ["--short-side=90", "--long-side=80"]
    assert command.main([*flags, f"--checkpoint={run}", *sides, f"--output={tmp_path / 'out'}"]) == 1
    assert last_error(capsys) == "error: --short-side 90 is larger than --long-side 80; lower it to at most 80"


# Recipes


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_recipes_are_valid(path: Path) -> None:
    config = train_seg.parse_args([f"--config={path}"])
    text = path.read_text(encoding="utf-8")
    assert text.startswith(("# torchrun", "# python")) and path.name in text.splitlines()[0]
    assert config.model.model in path.stem.replace("_160k", "").replace("_80k", "")
    assert config.model.backbone in path.stem
    builder: Callable[..., Any] = segmentation.BUILDERS[config.model.model]
    with torch.device("meta"):
        kwargs = {**config.model.model_kwargs, "backbone_kwargs": config.model.backbone_kwargs}
        model = builder(config.model.backbone, 150, drop_path_rate=config.model.drop_path, **kwargs)
    assert model.num_classes == 150
    unknown = {key for key in yaml.safe_load(text) if key not in vars(train_seg.create_parser().parse_args([]))}
    assert not unknown

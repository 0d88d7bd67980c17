"""Tests training, evaluating and using detectors, with real processes and photographs."""

import csv
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from stvit import hub
from stvit.adapters import torchvision as detectors
from stvit.tools import predict_det, train_det, validate_det
from stvit.tools.common.checkpoint import Checkpoints, load_checkpoint
from stvit.tools.detection import requirements
from stvit.tools.detection.config import MODELS
from stvit.tools.detection.metrics import METRICS
from tests.hub_server import Hub
from tests.torchrun import torchrun

CONFIGS = Path(__file__).parents[1] / "configs/det"
# A detector that trains in seconds.
SMALL = (
    "--backbone=test_stvit --model-kwargs fpn_channels=16 box_batch_size_per_image=16 rpn_pre_nms_top_n_train=200 "
    "rpn_pre_nms_top_n_test=200 rpn_post_nms_top_n_train=50 rpn_post_nms_top_n_test=20 --min-size 64 80 --max-size=128 "
    "--test-size=96 --batch-size=1 --warmup-updates=2 --log-interval=1"
).split()
# Everything with a state: workers, accumulation, EMA, stochastic depth, a schedule with a decay.
EPOCHS, UPDATES = 3, 2
RUN = [
    *SMALL,
    *"--model=mask_rcnn --workers=1 --grad-accum-steps=2 --lr=5e-4 --decay-milestones 2 --drop-path=0.2".split(),
    *f"--model-ema --model-ema-decay=0.5 --checkpoint-steps=1 --epochs={EPOCHS} --experiment=it --resume=auto".split(),
]


def data_flags(folder: Path, splits: Sequence[str] = ("train", "val")) -> list[str]:
    paths = {"images": folder / "images", "annotations": folder / "instances.json"}
    return [f"--{split}-{key}={path}" for split in splits for key, path in paths.items()]


def start(folder: Path, photos: Path, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "stvit.tools.train_det", *RUN, *data_flags(photos), f"--output={folder}", *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(folder: Path, photos: Path, *flags: str) -> str:
    """Runs the command to its end, and returns its output."""
    process = start(folder, photos, *flags)
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0, out
    return out


@pytest.fixture(scope="module")
def reference(coco_photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("reference")
    out = finish(folder, coco_photos)
    assert f"epoch {EPOCHS}/{EPOCHS}: training loss" in out and "; validation box AP " in out and ", mask AP " in out
    (folder / "stdout").write_text(out, encoding="utf-8")
    return folder


def rows(folder: Path) -> list[dict[str, float]]:
    with (folder / "it/summary.csv").open(newline="", encoding="utf-8") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


# ---------------------------------------------------------------------------------------------------------------------
# Training


def test_results_of_a_run(reference: Path, coco_photos: Path) -> None:
    history = rows(reference)
    parts = ["classifier", "box_reg", "mask", "objectness", "rpn_box_reg"]
    for row in history:
        assert row["train_loss"] == pytest.approx(sum(row[f"train_loss_{part}"] for part in parts), rel=1e-5)
        assert {
            f"{kind}_{iou}_{name}" for kind in ("eval", "ema") for iou in ("box", "mask") for name in METRICS
        } <= set(row)
        assert math.isnan(row["eval_box_APl"])  # the photographs have no large object
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    assert [row["lr"] for row in history] == pytest.approx([5e-4, 5e-5, 5e-5])
    said = (reference / "stdout").read_text(encoding="utf-8")
    assert "instances.json: 2 categories with ids from 3 to 7 become labels 1 to 2" in said
    assert "mask_rcnn on test_stvit, " in said and "2 classes, 4 training and 4 validation images, on cpu" in said
    assert f"model = torchvision.load('{reference / 'it/best'}')" in said.splitlines()[-1]
    for name in ("best", "last", "last_ema"):
        model = detectors.load(reference / "it" / name)
        assert model.label_names == ["person", "bus"] and model.category_ids == [3, 7]
    config = json.loads((reference / "it/last_ema/config.json").read_text(encoding="utf-8"))
    assert "moving average (EMA), after epoch 3" in json.dumps(config) and "_skip_resize" not in json.dumps(config)


@pytest.mark.long
def test_killed_at_random_is_the_same_run(reference: Path, coco_photos: Path, tmp_path: Path) -> None:
    """Weights, metrics, optimizer and random states."""
    seed = int.from_bytes(os.urandom(4), "little")
    print("random moments of seed", seed)
    moments = random.Random(seed)
    log = tmp_path / "it/log.jsonl"

    def updates() -> int:
        return log.read_bytes().count(b'"event": "train"') if log.exists() else 0

    goal = moments.randint(2, UPDATES * EPOCHS - 1)
    process = start(tmp_path, coco_photos)
    while updates() < goal:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    time.sleep(moments.uniform(0.0, 1.0))
    process.kill()
    process.communicate()
    assert "resuming " in finish(tmp_path, coco_photos)
    assert_same_run(tmp_path, reference)


def assert_same_run(folder: Path, reference: Path) -> None:
    files = ("model.safetensors", "config.json")
    names = [f"{model}/{file}" for model in ("best", "last", "last_ema") for file in files]
    for name in [*names, "summary.csv"]:
        assert (folder / "it" / name).read_bytes() == (reference / "it" / name).read_bytes(), name
    last = f"it/checkpoints/{EPOCHS:05d}-00000000.pt"
    assert same(load_checkpoint(folder / last), load_checkpoint(reference / last))


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b) or (a != a and b != b)  # NaN


@pytest.mark.long
def test_three_kills_and_a_signal(reference: Path, coco_photos: Path, tmp_path: Path) -> None:
    moments = random.Random(7)
    log = tmp_path / "it/log.jsonl"
    for how in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGKILL):
        process = start(tmp_path, coco_photos)
        before = log.read_bytes().count(b'"event": "train"') if log.exists() else 0
        while not log.exists() or log.read_bytes().count(b'"event": "train"') <= before:
            if process.poll() is not None:
                break
            time.sleep(0.01)
        time.sleep(moments.uniform(0.0, 2.0))
        process.send_signal(how)
        out, _ = process.communicate(timeout=120)
        if how == signal.SIGTERM and process.returncode != 0:
            assert process.returncode == 143
            assert "to continue, run the same command with --resume auto" in out.splitlines()[-1]
    finish(tmp_path, coco_photos)
    assert_same_run(tmp_path, reference)


def run_in_two_processes(module: str, *flags: str) -> subprocess.CompletedProcess[str]:
    line = [*torchrun(2), "-m", f"stvit.tools.{module}", *flags]
    return subprocess.run(line, capture_output=True, text=True, timeout=600)


@pytest.mark.long
def test_two_processes_train_on_one_batch(coco_photos: Path, tmp_path: Path) -> None:
    """Two processes with an image each do the updates of one process with two steps of an image."""
    # The samplers of proposals draw random numbers, so all proposals are used. The model is in float64.
    flags = [*SMALL, *data_flags(coco_photos), "--model=mask_rcnn", "--workers=0", "--epochs=1", "--hflip=0",
             "--model-dtype=float64", "--min-size", "64", "--decay-milestones", "1", "--lr=1e-3",
             f"--output={tmp_path}", "--drop-path=0", "--norm-eval", "--bn-eval"]  # fmt: skip
    more = ["box_batch_size_per_image=2000", "rpn_batch_size_per_image=20000", "fpn_channels=16",
            "rpn_pre_nms_top_n_train=200", "rpn_post_nms_top_n_train=50"]  # fmt: skip
    flags += ["--model-kwargs", *more]
    assert train_det.main([*flags, "--experiment=one", "--grad-accum-steps=2"]) == 0
    done = run_in_two_processes("train_det", *flags, "--experiment=two")
    assert done.returncode == 0, done.stderr
    one, two = (detectors.load(tmp_path / name / "last").state_dict() for name in ("one", "two"))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-4, atol=1e-6)
    summary = [(tmp_path / name / "summary.csv").read_text().splitlines()[1].split(",") for name in ("one", "two")]
    assert [float(value) for value in summary[0][:2]] == pytest.approx([float(value) for value in summary[1][:2]])


@pytest.mark.parametrize(
    "model",
    [
        "cascade_mask_rcnn",
        "retinanet",
        pytest.param("faster_rcnn", marks=pytest.mark.long),
        pytest.param("cascade_rcnn", marks=pytest.mark.long),
        pytest.param("fcos", marks=pytest.mark.long),
    ],
)
def test_each_detector_trains(model: str, coco_photos: Path, tmp_path: Path) -> None:
    """Mixed precision, layer decay, frozen stages and gradient clipping."""
    kwargs = ["fpn_channels=64"] + ["box_batch_size_per_image=16"] * ("rcnn" in model)
    flags = [*SMALL, *data_flags(coco_photos), f"--model={model}", "--model-kwargs", *kwargs, "--workers=0",
             "--epochs=1", "--amp", "--layer-decay=0.8", "--frozen-stages=1", "--clip-grad=5", "--batch-size=2",
             f"--output={tmp_path}", "--experiment=it", "--decay-milestones", "1"]  # fmt: skip
    assert train_det.main(flags) == 0
    (row,) = rows(tmp_path)
    assert math.isfinite(row["train_loss"]) and row["train_loss"] > 0
    assert ("eval_mask_AP" in row) == MODELS[model]
    loaded = detectors.load(tmp_path / "it/best")
    assert [f"train_{name}" for name in loaded.loss_names] == [key for key in row if key.startswith("train_")][1:]


def test_every_model_is_offered() -> None:
    """The list of models is written down, because --help must not wait for PyTorch."""
    from stvit.adapters.torchvision.models import BUILDERS

    assert list(BUILDERS) == list(MODELS)


def test_weights_of_the_backbone_are_counted(
    coco_photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backbone = timm.create_model("test_stvit", num_classes=2)
    hub.save(backbone, tmp_path / "backbone")
    flags = [*SMALL, *data_flags(coco_photos), f"--pretrained-backbone={tmp_path / 'backbone'}", f"--output={tmp_path}"]
    assert train_det.main([*flags, "--batch-size=9"]) == 1  # the training does not start
    assert " tensors of the backbone test_stvit from " in capsys.readouterr().out


def test_fine_tuning_for_other_classes(reference: Path, coco_photos: Path, tmp_path: Path, capsys: Any) -> None:
    content = json.loads((coco_photos / "instances.json").read_text(encoding="utf-8"))
    content["categories"].append({"id": 9, "name": "tie"})
    (tmp_path / "instances.json").write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / "images").symlink_to(coco_photos / "images")
    flags = [
        *RUN,
        *data_flags(tmp_path),
        f"--output={tmp_path}",
        "--workers=0",
        "--epochs=1",
        "--lr=0",
        "--drop-path=0",
    ]
    flags += ["--decay-milestones", "1", f"--pretrained-path={reference / 'it'}"]
    assert train_det.main(flags) == 0
    said = capsys.readouterr().out
    assert f"tensors of {reference / 'it'}; random: roi_heads.box_predictor.cls_score.weight, " in said
    before, after = (detectors.load(folder / "it").state_dict() for folder in (reference, tmp_path))
    different = {key for key in before if before[key].shape != after[key].shape}
    layers = ("box_predictor.cls_score", "box_predictor.bbox_pred", "mask_predictor.mask_fcn_logits")
    assert different == {f"roi_heads.{layer}.{kind}" for kind in ("weight", "bias") for layer in layers}
    for key in before.keys() - different:  # the warmup begins above a learning rate of 0
        torch.testing.assert_close(after[key], before[key], rtol=0, atol=1e-6)
    assert train_det.main([*flags, "--backbone=test_convnext", "--experiment=other"]) == 1
    assert "it must be a model of the same --model and --backbone" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--backbone=vit_tiny_patch16_224"],
            "cannot create --model mask_rcnn on --backbone vit_tiny_patch16_224",
        ),
        (["--backbone=stvit_smal"], "unknown backbone 'stvit_smal'; did you mean stvit_small"),
        (
            ["--model-kwargs", "box_score_tresh=0"],
            "mask_rcnn has no argument 'box_score_tresh'; did you mean",
        ),
        (["--model-kwargs", "min_size=100"], "--model-kwargs min_size: pass --test-size instead"),
        (["--model-kwargs", "num_classes=100"], "--model-kwargs num_classes: the annotations decide it; remove it"),
        (["--pretrained-backbone=nowhere"], "cannot create --model mask_rcnn on --backbone test_stvit: "),
        (["--pretrained-path=nowhere"], "--pretrained-path: "),
        (["--in-chans=4"], "--in-chans must be 1 (gray) or 3 (color), got 4"),
        (
            ["--batch-size=5"],
            "an update takes 10 images (--batch-size 5 x --grad-accum-steps 2), but",
        ),
        (["--val-annotations=nowhere.json"], "annotation file nowhere.json does not exist; check --val-annotations"),
        (["--model-kwargs", "fpn_channels=-1"], "fpn_channels must be a whole number of at least 1, got -1"),
        (["--model-kwargs", "mask_head=1"], "--model-kwargs mask_head: only Python code can set it; remove it"),
        (["--model-kwargs", "log=1"], "--model-kwargs log: only Python code can set it; remove it"),
        (["--frozen-stages=9"], "stages"),
        (["--min-size", "64", "500"], "--min-size 500 is larger than --max-size 128; lower it to at most 128"),
        (["--test-size=500"], "--test-size 500 is larger than --max-size 128; lower it to at most 128"),
    ],
)
def test_errors_are_one_line(
    flags: list[str], said: str, coco_photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_det.main([*RUN, *data_flags(coco_photos), f"--output={tmp_path}", *flags]) == 1
    err = capsys.readouterr().err.strip()
    assert err.startswith("error: ") and said in err and "\n" not in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag", ["--compile", "--model=yolo", "--model-dtype=float16", "--batch-siz=3"])
def test_flags_that_do_not_exist(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        train_det.main([flag])
    assert exit.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_a_broken_annotation_stops_before_the_training(
    write_coco: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = write_coco(tmp_path / "photos")
    text = (photos / "instances.json").read_text(encoding="utf-8")
    (photos / "instances.json").write_text(text.replace('"category_id": 7', '"category_id": 8', 1), encoding="utf-8")
    assert train_det.main([*RUN, *data_flags(photos), f"--output={tmp_path / 'runs'}"]) == 1
    path = photos / "instances.json"
    assert capsys.readouterr().err == f"error: {path}: unknown category_id (1): annotation 1 (8); correct the file\n"
    assert not (tmp_path / "runs").exists()


def test_an_image_of_another_size_is_named(
    write_coco: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = write_coco(tmp_path / "photos")
    path = photos / "images/zidane_1.jpg"
    flags = [*RUN, *data_flags(photos), f"--output={tmp_path}", "--workers=0"]
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    for size, options, hint in (
        ((50, 60), {}, ""),
        ((96, 54), {"exif": exif}, ", or turn its pixels and remove its EXIF orientation"),
    ):
        Image.open(path).resize(size).save(path, **options)
        pixels = "54x96" if options else "50x60"
        problem = f"{pixels} pixels, but the annotations say 96x54; correct its width and height in the annotations"
        assert train_det.main(flags) == 1
        found = f"{photos / 'instances.json'}: image of another size (1): {path} (image 103) has {problem}{hint}\n"
        assert capsys.readouterr().err.endswith(f"error: {found}") and not (tmp_path / "it").exists()
        assert train_det.main([*flags, "--no-check-data"]) == 1
        assert f"error: image {path}: {problem}{hint}" in capsys.readouterr().err
        shutil.rmtree(tmp_path / "it")


def test_changed_annotations_are_refused(
    reference: Path, write_coco: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run may be resumed after its data was moved, but not after an object was changed."""
    photos = write_coco(tmp_path / "photos")
    flags = [*RUN, *data_flags(photos), f"--output={reference}"]
    assert train_det.main(flags) == 0
    assert "is finished: 3 epochs are done" in capsys.readouterr().out
    text = (photos / "instances.json").read_text(encoding="utf-8")
    (photos / "instances.json").write_text(text.replace('"category_id": 7', '"category_id": 3', 1), encoding="utf-8")
    assert train_det.main(flags) == 1
    assert "the images have changed since" in capsys.readouterr().err


def test_changed_masks_are_refused(
    reference: Path, write_coco: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = write_coco(tmp_path / "photos")
    content = json.loads((photos / "instances.json").read_text(encoding="utf-8"))
    content["annotations"][0]["segmentation"][0][0] += 1
    (photos / "instances.json").write_text(json.dumps(content), encoding="utf-8")
    assert train_det.main([*RUN, *data_flags(photos), f"--output={reference}"]) == 1
    assert "training annotations: other masks, areas or label maps; validation anno" in capsys.readouterr().err


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(requirements, "find_spec", lambda name: None)
    for command, flags in (
        (train_det, []),
        (validate_det, ["--checkpoint=x"]),
        (predict_det, ["x.jpg", "--checkpoint=x"]),
    ):
        assert command.main(flags) == 1
        assert "detection needs torchvision and faster-coco-eval: pip install 'stvit[detection]'" in (
            capsys.readouterr().err
        )


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def test_validation_repeats_the_metrics_of_the_run(
    reference: Path, coco_photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also with pycocotools, on the detections that the command writes."""
    output = tmp_path / "report"
    flags = [*data_flags(coco_photos, ["val"]), "--workers=0", f"--output={output}"]
    assert validate_det.main([f"--checkpoint={reference / 'it/last'}", "--batch-size=3", *flags]) == 0
    out = capsys.readouterr().out
    assert "2 classes, 4 images, shorter side 96 and longer side at most 128 pixels, on cpu" in out
    assert "\nbox AP " in out and "\nmask AP " in out and "; 11 objects in 4 images" in out
    results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    last = rows(reference)[-1]
    for kind, iou in (("box", "bbox"), ("mask", "segm")):
        truth = COCO(str(coco_photos / "instances.json"))
        found = json.loads((output / "detections.json").read_text(encoding="utf-8"))
        assert len(found) > 0 and {result["category_id"] for result in found} <= {3, 7}
        if iou == "segm":
            found = [{key: value for key, value in result.items() if key != "bbox"} for result in found]
        evaluation = COCOeval(truth, truth.loadRes(found), iou)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        for name, value in zip(METRICS, evaluation.stats, strict=True):
            ours = results[f"{kind}_{name}"]
            assert (ours is None) == (value < 0) == math.isnan(last[f"eval_{kind}_{name}"])
            assert ours is None or ours == pytest.approx(100 * value, abs=1e-9)
            assert ours is None or ours == pytest.approx(
                last[f"eval_{kind}_{name}"], abs=1e-9
            )  # with another batch size
    assert results["images"] == 4 and results["objects"] == 11 and results["model"] == "mask_rcnn"
    with (output / "per_class.csv").open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [(row["category_id"], row["name"], row["objects"]) for row in table] == [
        ("3", "person", "9"),
        ("7", "bus", "2"),
    ]
    mean = np.mean([float(row["box_AP"]) for row in table])
    assert mean == pytest.approx(results["box_AP"], abs=1e-3)
    # Results are never overwritten.
    assert validate_det.main([f"--checkpoint={reference / 'it/last'}", *flags]) == 1
    assert "already has results of another evaluation" in capsys.readouterr().err


@pytest.mark.long
def test_two_processes_give_the_same_results(reference: Path, coco_photos: Path, tmp_path: Path) -> None:
    flags = [
        f"--checkpoint={reference / 'it/last'}",
        *data_flags(coco_photos, ["val"]),
        "--workers=0",
        "--batch-size=3",
    ]
    assert validate_det.main([*flags, f"--output={tmp_path / 'one'}"]) == 0
    done = run_in_two_processes("validate_det", *flags, f"--output={tmp_path / 'two'}")
    assert done.returncode == 0, done.stderr
    for name in ("detections.json", "per_class.csv"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    assert one["processes"] == 1 and two["processes"] == 2
    assert all(one[f"{kind}_{name}"] == two[f"{kind}_{name}"] for kind in ("box", "mask") for name in METRICS)


def test_categories_are_matched_by_name(
    reference: Path, coco_photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The data set may have other ids and fewer classes than the model, but not more."""
    content = json.loads((coco_photos / "instances.json").read_text(encoding="utf-8"))
    (tmp_path / "images").symlink_to(coco_photos / "images")

    def validate(categories: dict[int, str], numbers: dict[int, int]) -> int:
        annotations = [{**a, "category_id": numbers[a["category_id"]]} for a in content["annotations"]
                       if a["category_id"] in numbers]  # fmt: skip
        named = [{"id": number, "name": name} for number, name in categories.items()]
        changed = {**content, "annotations": annotations, "categories": named}
        (tmp_path / "instances.json").write_text(json.dumps(changed), encoding="utf-8")
        flags = [*data_flags(tmp_path, ["val"]), "--workers=0", f"--output={tmp_path / str(len(categories))}"]
        return validate_det.main([f"--checkpoint={reference / 'it/last'}", *flags])

    assert validate({55: "person"}, {3: 55}) == 0
    assert "1 classes of the model are not in " in capsys.readouterr().out
    found = json.loads((tmp_path / "1/detections.json").read_text(encoding="utf-8"))
    assert {result["category_id"] for result in found} <= {55}
    assert validate({3: "person", 7: "bus", 9: "tie"}, {3: 3, 7: 7}) == 1
    assert "the model has no class 'tie', which is in " in capsys.readouterr().err
    assert validate({3: "bus", 4: "bus"}, {3: 3, 7: 4}) == 1
    assert "class names that appear twice" in capsys.readouterr().err


def test_annotations_without_masks_evaluate_boxes_only(
    reference: Path, coco_photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads((coco_photos / "instances.json").read_text(encoding="utf-8"))
    for annotation in content["annotations"]:
        del annotation["segmentation"]
    (tmp_path / "instances.json").write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / "images").symlink_to(coco_photos / "images")
    flags = [*data_flags(tmp_path, ["val"]), "--workers=0", f"--output={tmp_path / 'report'}"]
    assert validate_det.main([f"--checkpoint={reference / 'it/last'}", *flags]) == 0
    said = capsys.readouterr()
    assert f"{tmp_path / 'instances.json'} has no masks, so only boxes are evaluated" in said.out
    assert "box AP " in said.out and "mask AP " not in said.out and "without a mask" not in said.err
    results = json.loads((tmp_path / "report/results.json").read_text(encoding="utf-8"))
    assert results["box_AP"] == pytest.approx(rows(reference)[-1]["eval_box_AP"], abs=1e-9) and "mask_AP" not in results


def test_unreadable_validation_images_do_not_count(
    reference: Path, write_coco: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = write_coco(tmp_path)
    bad = photos / "images/bus_1.jpg"
    bad.write_bytes(bad.read_bytes()[:100])
    flags = [f"--checkpoint={reference / 'it'}", *data_flags(photos, ["val"]), "--workers=0"]
    assert validate_det.main(flags) == 1
    assert f"error: cannot read image {bad}: " in capsys.readouterr().err
    assert validate_det.main([*flags, "--max-bad-images=1"]) == 0
    captured = capsys.readouterr()
    assert "; 7 objects in 3 images" in captured.out
    assert f"warning: {bad} cannot be read and was skipped" in captured.err


@pytest.mark.parametrize("command", [validate_det, predict_det])
def test_a_checkpoint_that_is_no_detector(
    command: Any, coco_photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [str(coco_photos / "images")] if command is predict_det else data_flags(coco_photos, ["val"])
    assert command.main([*data, "--checkpoint=nowhere", *([f"--output={tmp_path}"])]) == 1
    assert capsys.readouterr().err.startswith("error: --checkpoint: ")


def test_a_run_is_uploaded_and_loaded_from_the_hub(
    hub: Hub, coco_photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both branches load, and another machine continues the run."""
    flags = [*SMALL, *data_flags(coco_photos), "--model=mask_rcnn", "--workers=0", "--decay-milestones", "1"]
    flags += ["--experiment=it", "--repo-id=org/detector"]
    assert train_det.main([*flags, "--epochs=1", f"--output={tmp_path / 'first'}"]) == 0
    run = tmp_path / "first/it"
    assert hub.files("org/detector")["model.safetensors"] == (run / "best/model.safetensors").read_bytes()
    card = hub.files("org/detector")["README.md"].decode()
    assert "pipeline_tag: object-detection" in card and 'torchvision.load("hf-hub:org/detector")' in card
    assert "| box AP | " in card and "| mask AP | " in card and "person" in card and "bus" in card
    model = detectors.load("hf-hub:org/detector@last")
    for key, value in detectors.load(run / "last").state_dict().items():
        assert torch.equal(model.state_dict()[key], value)
    capsys.readouterr()
    val = data_flags(coco_photos, ["val"])
    assert validate_det.main(["--checkpoint=hf-hub:org/detector", *val, "--workers=0"]) == 0
    assert capsys.readouterr().out.startswith("hf-hub:org/detector, ")
    assert train_det.main([*flags, "--epochs=2", f"--output={tmp_path}", "--resume=hf-hub:org/detector@last"]) == 0
    assert "1 epochs and 0 updates are done" in capsys.readouterr().out
    assert len(rows(tmp_path)) == 2


# ---------------------------------------------------------------------------------------------------------------------
# Prediction


@pytest.mark.parametrize("command", [validate_det, predict_det])
def test_a_shorter_side_above_the_longest_is_refused(
    command: Any, reference: Path, coco_photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [str(coco_photos / "images")] if command is predict_det else data_flags(coco_photos, ["val"])
    assert command.main([*data, f"--checkpoint={reference / 'it'}", "--test-size=500", f"--output={tmp_path}"]) == 1
    assert capsys.readouterr().err == "error: --test-size 500 is larger than --max-size 128; lower it to at most 128\n"


def test_prediction_draws_and_reports(
    reference: Path, write_coco: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = write_coco(tmp_path / "photos") / "images"
    (images / "broken.jpg").write_bytes(b"no image")
    (images / "more").mkdir()
    Image.open(images / "bus_0.jpg").convert("L").save(images / "more/gray.png")
    flags = [str(images), f"--checkpoint={reference / 'it/last'}", "--score-thresh=0.1"]
    assert predict_det.main([*flags, f"--output={tmp_path / 'out'}"]) == 1
    captured = capsys.readouterr()
    assert "detections in 5 images; pictures and detections.json are in" in captured.out
    assert captured.err.splitlines()[-1].startswith("error: 1 of 6 images were skipped: broken.jpg: not an image")
    assert captured.err.count("broken.jpg") == 1
    names = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    pictures = {"bus_0.jpg", "bus_1.jpg", "zidane_0.jpg", "zidane_1.jpg", "more/gray.jpg"}
    assert names == {*pictures, "detections.json", ".stvit.written"}
    found = json.loads((tmp_path / "out/detections.json").read_text(encoding="utf-8"))
    assert found and all(result["score"] >= 0.1 and result["category_id"] in (3, 7) for result in found)
    first = found[0]["file_name"]
    picture, photo = Image.open(tmp_path / "out" / first), Image.open(images / first)
    assert picture.size == photo.size
    assert np.abs(np.asarray(picture, dtype=int) - np.asarray(photo, dtype=int)).max() > 100
    # Without detections the picture is the image.
    assert predict_det.main([str(images / "bus_0.jpg"), f"--checkpoint={reference / 'it/last'}", "--score-thresh=1",
                             f"--output={tmp_path / 'none'}"]) == 0  # fmt: skip
    assert json.loads((tmp_path / "none/detections.json").read_text(encoding="utf-8")) == []
    picture, photo = Image.open(tmp_path / "none/bus_0.jpg"), Image.open(images / "bus_0.jpg")
    assert np.abs(np.asarray(picture, dtype=int) - np.asarray(photo, dtype=int)).mean() < 5


# ---------------------------------------------------------------------------------------------------------------------
# Recipes


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    config = train_det.parse_args([f"--config={path}", "--data-dir=data"])
    assert f"configs/det/{path.name}" in text and "Hardware: " in text and "Time: " in text and "Expected: " in text
    assert config.run.experiment is None or config.run.experiment == path.stem
    if "pico" in path.stem:
        return
    optim = config.optim
    assert path.stem.startswith(f"{config.model.model}_{'3x' if optim.epochs == 36 else '1x'}_")
    assert config.model.backbone == "stvit_" + path.stem.rpartition("_")[2]
    assert (optim.epochs, optim.decay_milestones) in ((12, [8, 11]), (36, [27, 33]))
    assert (optim.opt, optim.lr_base, optim.lr_base_size, optim.weight_decay) == ("adamw", 1e-4, 16, 0.05)
    assert optim.sched == "multistep" and optim.decay_rate == 0.1 and config.data.batch_size == 2
    assert optim.warmup_updates in (500, 1000) and optim.sched_on_updates
    assert (config.image.test_size, config.image.max_size) == (800, 1333) and config.model.drop_path is not None


def test_there_are_recipes() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {
        *(f"{model}_stvit_{size}" for size in ("small", "base")
          for model in ("mask_rcnn_1x", "mask_rcnn_3x", "cascade_mask_rcnn_3x")),
        "retinanet_1x_stvit_small",
        "mask_rcnn_stvit_pico",
    }  # fmt: skip


def test_checkpoints_are_those_of_the_epochs(reference: Path) -> None:
    assert [path.name for path in Checkpoints(reference / "it/checkpoints").paths()] == [
        "00002-00000001.pt",
        "00003-00000000.pt",
    ]

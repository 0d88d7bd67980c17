"""Runs the command `python -m stvit.tools.yolo` in a new process."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
import ultralytics
from ultralytics.utils import ASSETS

import stvit  # noqa: F401  # registers the models
from stvit.tools.yolo import main

QUICK = ["imgsz=64", "epochs=1", "batch=4", "plots=False", "val=False", "amp=False", "device=cpu", "mosaic=0"]


def command(*arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "stvit.tools.yolo", *map(str, arguments)],
        cwd=folder,
        env={key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "STVIT_"))},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.long
def test_train_predict_export(photos: Path, tmp_path: Path) -> None:
    torch.save(timm.create_model("stvit_pico", num_classes=10).state_dict(), tmp_path / "pico.pth")
    # Directory names may contain spaces, and our arguments may be anywhere.
    folder = tmp_path / "my runs"
    folder.mkdir()
    done = command(
        "detect", "train", "model=yolo26n-stvit_pico.yaml", f"pretrained_backbone={tmp_path / 'pico.pth'}",
        "backbone_lr_scale=0.1", f"data={photos}", f"project={folder / 'out'}", "name=a", *QUICK, folder=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Loaded 182/182 tensors of the backbone stvit_pico" in done.stdout
    assert "trains at 0.1 to 0.1 times the learning rate of the other layers" in done.stdout
    best = next(folder.rglob("best.pt"))
    assert ultralytics.YOLO(best).model.yaml["backbone_lr_scale"] == 0.1

    done = command(
        "predict", f"model={best}", f"source={ASSETS / 'bus.jpg'}", "imgsz=64", f"project={folder}", folder=folder
    )
    assert done.returncode == 0, done.stderr
    assert next(folder.rglob("predict/bus.jpg"))
    done = command("export", f"model={best}", "format=torchscript", "imgsz=64", folder=folder)
    assert done.returncode == 0, done.stderr
    assert best.with_suffix(".torchscript").exists()


@pytest.mark.long
def test_killed_and_resumed(photos: Path, tmp_path: Path) -> None:
    arguments = [
        "model=yolo26n-stvit_pico.yaml",
        "backbone_lr_scale=0.1",
        f"data={photos}",
        f"project={tmp_path}",
        "name=a",
    ]
    quick = [*QUICK, "epochs=12", "optimizer=AdamW"]
    command_line = [sys.executable, "-m", "stvit.tools.yolo", "detect", "train", *arguments, *quick]
    last = tmp_path / "a" / "weights" / "last.pt"
    results = tmp_path / "a" / "results.csv"
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command_line, cwd=tmp_path, stdout=log, stderr=log)
        try:
            while not (results.exists() and results.read_text().count("\n") > 3):
                assert process.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.05)
        finally:
            process.kill()
            process.wait()
    done_before = results.read_text().count("\n") - 1
    assert done_before < 12
    resumed = command("train", "resume", f"model={last}", folder=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert "Resuming training" in resumed.stdout
    assert "trains at 0.1 to 0.1 times the learning rate of the other layers" in resumed.stdout
    epochs = [int(row.split(",")[0]) for row in results.read_text().splitlines()[1:]]
    assert set(epochs) == set(range(1, 13))


@pytest.mark.long
def test_help_and_commands_of_ultralytics(tmp_path: Path) -> None:
    assert "yolo26{n,s,m,l,x}-BACKBONE" in command("--help", folder=tmp_path).stdout
    assert ultralytics.__version__ in command("version", folder=tmp_path).stdout


def test_help_does_not_import_pytorch() -> None:
    program = [sys.executable, "-X", "importtime", "-m", "stvit.tools.yolo", "--help"]
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    assert "stvit.tools.common.cli" in done.stderr and " torch\n" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "model=yolo26n-stvit_pica.yaml"], "unknown backbone 'stvit_pica'; did you mean stvit_pico"),
        pytest.param(
            ["train", "model=yolo26n-stvit_pico.yaml", "pretrained_backbone=no.pth"],
            "no file, folder or timm model named 'no.pth'",
            marks=pytest.mark.long,
        ),
        pytest.param(["predict", "model=missing-model.yaml"], "missing-model.yaml", marks=pytest.mark.long),
    ],
)
def test_wrong_arguments_give_one_error_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = command(*arguments, folder=tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr + done.stdout
    assert done.stderr.startswith("error: ")
    assert message in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "backbone_lr_scale=high"], "backbone_lr_scale must be a number, got 'high'"),
        (["train", "backbone_lr_scale"], "backbone_lr_scale: expected backbone_lr_scale=VALUE, got no value"),
        (
            ["train", "resume", "model=last.pt", "backbone_lr_scale=0.1"],
            "backbone_lr_scale cannot be changed when a run is resumed; remove it",
        ),
    ],
)
def test_wrong_values_of_our_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 1
    assert message in capsys.readouterr().err

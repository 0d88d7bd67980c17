"""Tests `--img-size` in every command.

The models have a fixed input size, or do not support the size.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch

from stvit import hub as stvit_hub
from stvit.tools import benchmark, convert_checkpoint, export, push_to_hub, train_cls, validate_cls
from stvit.tools.demonstration.config import ModelsConfig
from stvit.tools.demonstration.models import ModelList, OpenedModels
from stvit.tools.demonstration.tasks import classify
from tests import hub_server

DATA = ["--dataset=sklearn/digits", "--workers=0"]
TRAIN = [*DATA, "--epochs=1", "--batch-size=256", "--lr=1e-3", "--warmup-epochs=0", "--experiment=it"]
MODEL = ["--model=vit_tiny_patch16_224", "--model-kwargs", "depth=1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory of a training at 32 pixels, of a model for 224 pixels."""
    folder = tmp_path_factory.mktemp("runs")
    assert train_cls.main([*TRAIN, *MODEL, "--img-size=32", f"--output={folder}"]) == 0
    return folder / "it"


def validated_size(capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[str, str]:
    """Runs validate_cls.py and returns its image size and accuracy."""
    capsys.readouterr()
    assert validate_cls.main([*DATA, *flags]) == 0
    first, second, *_ = capsys.readouterr().out.splitlines()
    return first.partition(" images at ")[2].partition(" (")[0], second.partition(" (")[0]


def test_all_commands_load_the_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = next((run / "checkpoints").glob("*.pt"))
    size, accuracy = validated_size(capsys, f"--checkpoint={run}")
    assert size == "32 pixels"
    assert validated_size(capsys, f"--checkpoint={checkpoint}") == (size, accuracy)
    assert validated_size(capsys, f"--checkpoint={run}", "--img-size=48")[0] == "48 pixels"

    assert export.main([f"--checkpoint={run}", f"--output={tmp_path / 'a.onnx'}"]) == 0
    assert "only height 32, only width 32" in capsys.readouterr().out
    flags = ["--img-size=64", "--format=torchscript", f"--output={tmp_path / 'b.torchscript'}"]
    assert export.main([f"--checkpoint={checkpoint}", *flags]) == 0
    assert "only height 64, only width 64" in capsys.readouterr().out

    assert convert_checkpoint.main([str(checkpoint), f"--output={tmp_path / 'converted'}"]) == 0
    assert "images 3x32x32" in capsys.readouterr().out
    assert push_to_hub.main([str(run), "--repo-id=org/run", "--dry-run", f"--output={tmp_path / 'pushed'}"]) == 0
    for folder in (run / "best", tmp_path / "converted", tmp_path / "pushed"):
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
        assert json.loads((folder / "config.json").read_text())["pretrained_cfg"]["input_size"] == [3, 32, 32]


def test_demo_shows_the_run(run: Path) -> None:
    image = next(iter(_digits()))
    opened = OpenedModels()
    for name in (str(run), str(next((run / "checkpoints").glob("*.pt")))):
        assert ModelList(ModelsConfig(names=[name])).check(name) == name
        assert len(classify(opened.get(name), image)) == 5


def _digits() -> Iterator:
    from stvit.tools.common.data import digits

    for image, _ in digits(0)[1]:
        yield image.convert("RGB")


def test_from_the_hub(
    run: Path, hub: hub_server.Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stvit_hub.push(run / "best", "org/run")
    size, accuracy = validated_size(capsys, "--checkpoint=hf-hub:org/run")
    assert size == "32 pixels"
    assert (size, accuracy) == validated_size(capsys, f"--checkpoint={run}")
    assert validated_size(capsys, "--checkpoint=hf-hub:org/run", "--img-size=64")[0] == "64 pixels"


def test_size_in_the_model_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Images have the size that the model arguments set."""
    flags = [*TRAIN, *MODEL, "img_size=32", f"--output={tmp_path}"]
    assert train_cls.main(flags) == 0
    assert validated_size(capsys, f"--checkpoint={tmp_path / 'it'}")[0] == "32 pixels"
    assert train_cls.main([*flags, "--img-size=48", "--experiment=other"]) == 1
    assert "--img-size 48 and the model argument img_size=32 differ; remove one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "img_size", "said"),
    [
        # This model supports any larger size.
        ("inception_v3", 32, "--img-size 32: inception_v3 does not take images of 32x32"),
        ("efficientformer_l1", 96, "--img-size 96: efficientformer_l1 does not take images of 96x96"),
        ("beit_base_patch16_224(depth=1)", 48, None),
        ("stvit_pico", 32, None),
        ("swin_tiny_patch4_window7_224", 64, None),
    ],
)
def test_sizes_of_other_models(model: str, img_size: int, said: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    """Uses the benchmark, which is the fastest command."""
    flags = [f"--models={model}", f"--img-size={img_size}", "--batch-size=1", "--repeats=1", "--no-memory"]
    status = benchmark.main(["model", *flags, "--ways=eager", "--min-seconds=0.001"])
    out, err = capsys.readouterr()
    if said is None:
        assert status == 0 and f" {img_size} " in out
    else:
        assert status == 1
        assert said in err.splitlines()[-1] and "unexpected" not in err


def test_every_command_names_the_flag(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands = {
        train_cls.main: [*TRAIN, "--model=inception_v3", f"--output={tmp_path}"],
        validate_cls.main: [*DATA, f"--checkpoint={run}"],
        export.main: [f"--checkpoint={run}", f"--output={tmp_path / 'a.onnx'}"],
        convert_checkpoint.main: [str(next((run / "checkpoints").glob("*.pt"))), f"--output={tmp_path / 'converted'}"],
    }
    for main, flags in commands.items():
        assert main([*flags, "--img-size=8"]) == 1
        line = capsys.readouterr().err.splitlines()[-1]
        assert "--img-size" in line and "unexpected" not in line

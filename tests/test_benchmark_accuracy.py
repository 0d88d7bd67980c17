"""Tests `stvit benchmark accuracy`: series of trainings, and the model without attention."""

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml

import stvit
from stvit.tools import benchmark, train_cls
from stvit.tools.benchmarks import models, variants
from stvit.tools.benchmarks.accuracy import interval_of_means
from stvit.tools.common.locks import PathLock
from stvit.tools.common.runs import RUN_LOCK
from tests.golden import fill

RECIPE = {
    "img_size": 32,
    "crop_pct": 1.0,
    "interpolation": "bicubic",
    "mean": [0.3],
    "std": [0.35],
    "workers": 0,
    "epochs": 1,
    "batch_size": 16,
    "lr": 1e-3,
}
COARSE = "test_stvit(stoken_size=(8, 8, 1, 1))"
FOLDERS = ["test_stvit-seed1", "test_stvit_stoken_size_8_8_1_1-seed1"]


def write_recipe(folder: Path, **changes: Any) -> str:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, **changes}))
    return f"--config={path}"


def read(table: Path) -> list[dict[str, str]]:
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


def test_series(digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs are those of `stvit train`, the same command repeats nothing, and more seeds are added."""
    table, plot, output = tmp_path / "series.csv", tmp_path / "series.png", tmp_path / "runs"
    flags = ["accuracy", write_recipe(tmp_path), f"--data-dir={digits_folder}", f"--output={output}", "--parts=train"]
    flags += ["--models", "test_stvit", COARSE.replace(" ", ""), f"--csv={table}", f"--plot={plot}"]
    assert benchmark.main([*flags, "--seeds", "1"]) == 0
    assert sorted(path.name for path in output.iterdir()) == FOLDERS
    rows = read(table)
    assert [row["model"] for row in rows] == ["test_stvit", COARSE]
    for row, folder in zip(rows, FOLDERS, strict=True):
        (epoch,) = read(output / folder / "summary.csv")
        assert float(row["top1"]) == round(float(epoch["eval_top1"]), 2)
        assert json.loads((output / folder / "result.json").read_text())["images"] == 20
        assert (row["runs"], row["seeds"], row["low"], row["inference_32"]) == ("1", "1", "", "")
        assert all(row[name] for name in ("date", "device", "torch", "timm", "stvit", "params_m", "gmac"))
        low, high = map(float, row["intervals"].split("-"))
        assert 0 <= low < float(row["top1"]) < high <= 100
    assert plot.read_bytes().startswith(b"\x89PNG")
    alone = [write_recipe(tmp_path), f"--data-dir={digits_folder}", f"--output={tmp_path / 'alone'}", "--seed=1"]
    assert train_cls.main([*alone, "--model=test_stvit", "--experiment=it"]) == 0
    assert (tmp_path / "alone/it/summary.csv").read_text() == (output / FOLDERS[0] / "summary.csv").read_text()
    capsys.readouterr()

    changed = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    assert benchmark.main([*flags, "--seeds", "1", "2"]) == 0
    assert {path: path.stat().st_mtime_ns for path in changed} == changed
    printed = capsys.readouterr().out
    assert "run 3 of 4: test_stvit, seed 2" in printed and "run 2 of 4" not in printed
    rows = read(table)
    assert [row["seeds"] for row in rows] == ["1 2"] * 2
    assert all(float(row["low"]) <= float(row["top1"]) <= float(row["high"]) for row in rows)


@pytest.mark.long
def test_measurement(digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Speed and memory are measured without a trained model, and only once on the same machine."""
    table, output = tmp_path / "series.csv", tmp_path / "runs"
    flags = ["accuracy", write_recipe(tmp_path), f"--data-dir={digits_folder}", f"--output={output}", f"--csv={table}"]
    flags += ["--models", "test_stvit", COARSE, "--parts=measure", "--img-size=32", "--repeats=1", "--min-seconds=0.01"]
    assert benchmark.main([*flags, "--batch-size=2"]) == 0
    rows = read(table)
    for row in rows:
        assert float(row["inference_32"]) > float(row["training_32"]) > 0
        assert row["memory_32"] and row["measured"] and row["threads"] == str(torch.get_num_threads())
    speed = read(output / "speed.csv")
    assert [(row["model"], row["step"], row["way"]) for row in speed] == [
        (model, *step)
        for step in (("inference", "optimized"), ("training", "eager"))
        for model in ("test_stvit", COARSE)
    ]
    assert {row["params_m"] for row in speed} == {row["params_m"] for row in rows}  # four classes, not 1000
    capsys.readouterr()
    assert benchmark.main([*flags, "--batch-size=2"]) == 0
    assert "speed and memory" not in capsys.readouterr().out
    assert [{**row, "date": ""} for row in read(table)] == [{**row, "date": ""} for row in rows]
    assert benchmark.main([*flags, "--batch-size=3"]) == 0
    assert "speed and memory" in capsys.readouterr().out
    assert [row["batch_size"] for row in read(output / "speed.csv")] == ["2"] * 4 + ["3"] * 4
    capsys.readouterr()
    fewer = [flag for flag in flags if flag != COARSE]
    assert benchmark.main([*fewer[:-1], "--min-seconds=0.01", "--batch-size=2"]) == 0  # part of the first measurement
    assert "speed and memory" not in capsys.readouterr().out
    assert [row["measured"] for row in read(table)] == [rows[0]["measured"]]


def test_runs_of_another_process_are_left_to_it(
    digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["accuracy", write_recipe(tmp_path), f"--data-dir={digits_folder}", f"--output={tmp_path / 'runs'}"]
    flags += ["--models", "test_stvit", COARSE, "--seeds=1", "--parts=train"]
    (tmp_path / "runs" / FOLDERS[0]).mkdir(parents=True)
    with PathLock() as lock:
        lock.acquire(tmp_path / "runs" / FOLDERS[0] / RUN_LOCK)
        assert benchmark.main(flags) == 0
    printed = capsys.readouterr().out
    assert f"uses {tmp_path / 'runs' / FOLDERS[0]}; continuing with the next run" in printed
    assert printed.splitlines()[-1].startswith("another process still trains 1 of the runs")
    assert [(tmp_path / "runs" / folder / "result.json").exists() for folder in FOLDERS] == [False, True]
    assert benchmark.main(flags) == 0
    assert all((tmp_path / "runs" / folder / "result.json").exists() for folder in FOLDERS)


def test_other_flags_are_refused(digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["accuracy", f"--data-dir={digits_folder}", f"--output={tmp_path / 'runs'}", "--parts=train", "--seeds=1"]
    flags += ["--models", "test_stvit"]
    assert benchmark.main([write_recipe(tmp_path) if flag == "" else flag for flag in [*flags, ""]]) == 0
    for change, text in (
        ({"batch_size": 20}, "batch_size 16, now 20"),
        ({"epochs": 2}, "epochs 1, now 2"),
        ({"hflip": 0.0}, "hflip 0.5, now 0.0"),
    ):
        assert benchmark.main([*flags, write_recipe(tmp_path, **change)]) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert f"was trained with other flags ({text}); pass the same flags, or choose another --output" in error
    assert benchmark.main([*flags, write_recipe(tmp_path, workers=1)]) == 0  # this changes no result


@pytest.mark.parametrize(
    ("names", "changes", "message"),
    [
        (["test_stvit"], {"mean": None, "crop_pct": None}, "does not set mean, crop_pct"),
        (["test_stvit()", "test_stvit"], {}, "--models test_stvit and test_stvit have the same run directory"),
        (["test_stvi"], {}, "unknown model 'test_stvi'"),
        (["test_stvit(stoken=8)"], {}, "cannot create model test_stvit"),
    ],
)
def test_wrong_flags(
    names: list[str], changes: dict[str, Any], message: str, digits_folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    flags = [f"--data-dir={digits_folder}", f"--output={tmp_path / 'runs'}", write_recipe(tmp_path, **changes)]
    assert benchmark.main(["accuracy", *flags, "--models", *names]) == 1
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "runs").exists()


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot send signals to a process")
def test_a_killed_series_continues_exactly(digits_folder: Path, tmp_path: Path) -> None:
    """SIGTERM saves the state, SIGKILL loses at most the steps since the last checkpoint."""
    recipe = write_recipe(tmp_path, epochs=6, checkpoint_steps=1)

    def start(output: str) -> subprocess.Popen[str]:
        flags = [recipe, f"--data-dir={digits_folder}", f"--output={tmp_path / output}", "--parts=train", "--seeds=1"]
        command = [sys.executable, "-m", "stvit.tools.benchmark", "accuracy", *flags, "--models", "test_stvit", COARSE]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def wait_for(pattern: str, process: subprocess.Popen[str]) -> None:
        end = time.monotonic() + 120
        while not list(tmp_path.glob(pattern)):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.005)

    assert start("whole").wait() == 0
    process = start("parts")
    wait_for(f"parts/{FOLDERS[0]}/checkpoints/00001-*.pt", process)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate()
    assert process.returncode == 143
    assert error.splitlines()[-1].endswith("to continue, run the same command")
    process = start("parts")
    wait_for(f"parts/{FOLDERS[1]}/checkpoints/00001-*.pt", process)
    process.kill()
    process.communicate()
    assert (tmp_path / "parts" / FOLDERS[0] / "result.json").exists()
    assert not (tmp_path / "parts" / FOLDERS[1] / "result.json").exists()
    assert start("parts").wait() == 0
    for folder in FOLDERS:
        for name in ("result.json", "summary.csv", "last/model.safetensors"):
            whole, parts = (tmp_path / output / folder / name for output in ("whole", "parts"))
            assert whole.read_bytes() == parts.read_bytes()


def test_interval_of_means() -> None:
    """Two groups with the variances 2 and 8 have 2 degrees of freedom, whose quantile is 4.303."""
    first, second = interval_of_means([[80.0, 82.0], [70.0, 74.0]])
    half = 4.303 * (5 / 2) ** 0.5
    assert first == pytest.approx({"top1": 81, "low": 81 - half, "high": 81 + half})
    assert second == pytest.approx({"top1": 72, "low": 72 - half, "high": 72 + half})
    assert interval_of_means([[80.0], []]) == [
        {"top1": 80.0, "low": None, "high": None},
        {"top1": None, "low": None, "high": None},
    ]
    many = interval_of_means([[0.0, 1.0] * 20])[0]
    assert many["high"] == pytest.approx(0.5 + 2.0227 * (10 / 39 / 40) ** 0.5, rel=1e-3)  # 39 degrees of freedom


# The model without attention


def test_no_attention_has_no_attention() -> None:
    model, plain = (timm.create_model(name, num_classes=10) for name in ("no_attention_stvit_pico", "stvit_pico"))
    names, expected = ({name: value.shape for name, value in net.state_dict().items()} for net in (model, plain))
    assert names == {
        name: shape for name, shape in expected.items() if not any(part in name for part in (".attn.", ".norm1."))
    }
    assert not any(isinstance(module, stvit.SuperTokenAttention) for module in model.modules())
    assert timm.get_pretrained_cfg("stvit_pico").architecture == "stvit_pico"
    costs = [
        models.count_gmac(models.Case(name, "eager", 1, 48, "float32", "cpu", num_classes=10))
        for name in ("no_attention_stvit_pico", "stvit_pico")
    ]
    assert 0.3 < costs[0] / costs[1] < 0.9


def test_no_attention_is_the_rest_of_the_block() -> None:
    """With projections of zero, the attention adds nothing, and both models are the same."""
    model, plain = (timm.create_model(name).eval() for name in ("no_attention_stvit_pico", "stvit_pico"))
    for name, value in plain.named_parameters():
        if ".attn.proj." in name:
            value.data.zero_()
    model.load_state_dict({name: value for name, value in plain.state_dict().items() if name in model.state_dict()})
    x = torch.from_numpy(fill.image(0, 2, 3, 64, 48))
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x))
        optimized = models.optimized(
            model, models.Case("no_attention_stvit_pico", "optimized", 2, 64, "float32", "cpu")
        )
        torch.testing.assert_close(optimized(x), model(x), rtol=1e-4, atol=1e-4)
    block: Any = optimized.stages[0].blocks[0]
    assert type(block) is variants.BlockWithoutAttention
    assert type(block.mlp) is variants.TiledConvMlp and type(block.cpe) is variants.FoldedResidualConv


def test_no_attention_trains_and_loads(digits_folder: Path, tmp_path: Path) -> None:
    flags = [write_recipe(tmp_path), f"--data-dir={digits_folder}", f"--output={tmp_path / 'runs'}", "--experiment=it"]
    assert train_cls.main([*flags, "--model=no_attention_stvit_pico"]) == 0
    saved = timm.create_model(f"local-dir:{tmp_path / 'runs/it/last'}", pretrained=True).eval()
    assert saved.num_classes == 4 and isinstance(saved, variants.STViTWithoutAttention)
    fresh = timm.create_model("no_attention_stvit_pico", num_classes=4)
    assert all(not torch.equal(value, fresh.get_parameter(name)) for name, value in saved.named_parameters())

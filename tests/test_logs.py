"""Reads logs of tools/train_cls.py with the programs that use them."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from stvit.tools import train_cls
from stvit.tools.common.logs import plot_history

SHORT = (
    "--model=test_stvit --img-size=32 --epochs=2 --batch-size=10 --workers=0 --lr=1e-3 --log-interval=2 "
    "--checkpoint-steps=3 --experiment=it --resume=auto"
).split()


def train(output: Path, data: Path, *flags: str) -> Path:
    assert train_cls.main([*SHORT, f"--data-dir={data}", f"--output={output}", *flags]) == 0
    return output / "it"


def forget_the_end(folder: Path) -> None:
    """Makes a run look as if it had been killed after update 3 of the second epoch."""
    newest = sorted((folder / "checkpoints").glob("*.pt"))[-1]
    assert newest.name == "00002-00000000.pt"
    newest.unlink()


def read_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_json_lines(digits_folder: Path, tmp_path: Path) -> None:
    folder = train(tmp_path, digits_folder)
    lines = read_lines(folder)
    events = [line["event"] for line in lines]
    assert events == ["start", "train", "train", "train", "epoch", "train", "train", "train", "epoch"]
    assert [line["update"] for line in lines if line["event"] == "train"] == [2, 4, 6, 8, 10, 12]
    for line in lines[1:]:
        assert line["time"] > lines[0]["time"]
        if line["event"] == "train":
            assert line["loss"] > 0 and line["lr"] > 0 and line["images_per_second"] > 0
        else:
            assert {"train_loss", "train_top1", "eval_loss", "eval_top1", "eval_top5", "lr"} <= set(line)
    forget_the_end(folder)
    train(tmp_path, digits_folder)
    more = read_lines(folder)[len(lines) :]
    assert [line["event"] for line in more] == ["resume", "train", "train", "epoch"]
    assert more[-1]["eval_loss"] == lines[-1]["eval_loss"]


def test_tensorboard(digits_folder: Path, tmp_path: Path) -> None:
    """TensorBoard shows updates that a resumed run repeats only once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = train(tmp_path, digits_folder, "--log-tensorboard")
    forget_the_end(folder)
    train(tmp_path, digits_folder, "--log-tensorboard")
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    losses = events.Scalars("train/loss")
    assert [event.step for event in losses] == [2, 4, 6, 8, 10, 12]
    assert [event.step for event in events.Scalars("epoch/eval_top1")] == [6, 12]
    logged = [line["eval_loss"] for line in read_lines(folder) if line["event"] == "epoch"]
    assert [event.value for event in events.Scalars("epoch/eval_loss")] == pytest.approx(logged[:1] + logged[-1:])


def test_wandb_offline(digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = train(tmp_path, digits_folder, "--log-wandb", "--wandb-project=digits")
    (first,) = folder.glob("wandb/offline-run-*")
    forget_the_end(folder)
    train(tmp_path, digits_folder, "--log-wandb", "--wandb-project=digits")
    runs = list(folder.glob("wandb/offline-run-*"))
    # The second run resumes the first one.
    assert len(runs) == 2 and len({path.name.rsplit("-", 1)[-1] for path in runs}) == 1
    (record,) = first.glob("*.wandb")
    content = record.read_bytes()
    assert b"train/loss" in content and b"epoch/eval_top1" in content


def test_loggers_that_are_not_installed(tmp_path: Path) -> None:
    names = ["tensorboard", "wandb"]
    program = f"import sys\nfor name in {names}: sys.modules[name] = None\nfrom stvit.tools import train_cls\n"
    program += f"for name in {names}: assert train_cls.main(['--dataset=sklearn/digits', '--log-' + name]) == 1"
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0
    assert result.stderr == "".join(f"error: --log-{name} needs {name}: pip install {name}\n" for name in names)


@pytest.mark.long
def test_without_matplotlib_only_the_curve_is_missing(tmp_path: Path, digits_folder: Path) -> None:
    flags = [*SHORT, f"--data-dir={digits_folder}", f"--output={tmp_path}"]
    program = "import sys\nsys.modules['matplotlib.figure'] = None\nfrom stvit.tools import train_cls\n"
    program += f"sys.exit(train_cls.main({flags!r}))"
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "no curve.png was drawn, because matplotlib is missing" in result.stdout
    assert (tmp_path / "it/summary.csv").exists() and not (tmp_path / "it/curve.png").exists()


def test_curve_shows_the_measured_values(tmp_path: Path) -> None:
    history = [
        {"epoch": i, "train_loss": 2 / (i + 1), "train_top1": 30.0 * i, "eval_loss": 2.1, "eval_top1": 31.0, "lr": 1e-3}
        for i in range(3)
    ]
    titles = {"top1": "accuracy"}
    assert plot_history(history, tmp_path / "a.png", titles)
    moved = [{**row, "eval_top1": row["eval_top1"] + 40} for row in history]
    assert plot_history(moved, tmp_path / "b.png", titles)
    with Image.open(tmp_path / "a.png") as a, Image.open(tmp_path / "b.png") as b:
        assert a.size == b.size == (1200, 480)
        left, right = (0, 0, 600, 480), (600, 0, 1200, 480)
        assert a.crop(left).tobytes() == b.crop(left).tobytes()  # the loss is the same
        assert a.crop(right).tobytes() != b.crop(right).tobytes()
    # Infinite values do not fail.
    assert plot_history([{**history[0], "eval_loss": math.inf}], tmp_path / "c.png", titles)


def test_summary_equals_the_log(digits_folder: Path, tmp_path: Path) -> None:
    folder = train(tmp_path, digits_folder)
    header, *rows = (folder / "summary.csv").read_text().splitlines()
    epochs = [line for line in read_lines(folder) if line["event"] == "epoch"]
    assert len(rows) == len(epochs) == 2
    for row, line in zip(rows, epochs, strict=True):
        assert [str(line[name]) for name in header.split(",")] == row.split(",")
    assert re.fullmatch(r"epoch,train_loss,train_top1,eval_loss,eval_top1,eval_top5,lr", header)

"""Training with several processes (torchrun, gloo), compared with one process."""

import csv
import os
import re
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stvit.tools import train_cls
from stvit.tools.common.cli import CommandError
from stvit.tools.common.distributed import Distributed, join_processes
from stvit.tools.common.engine import check_config
from tests.torchrun import torchrun

# No number of processes and no batch size divides these numbers of images.
TRAIN, VAL = 203, 101
RUN = (
    "--model=test_stvit --img-size=32 --in-chans=1 --workers=1 --epochs=2 --lr=2e-3 --warmup-epochs=0 "
    "--sched-on-updates --smoothing=0.1 --log-interval=1"
).split()


@pytest.fixture(scope="module")
def digits_folder(write_digits: Callable[[Path, int, int], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits"), TRAIN, VAL)


def test_more_workers_than_cores_are_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with join_processes("cpu"):
            torch.utils.data.DataLoader([0], num_workers=1000)


def command(processes: int) -> list[str]:
    if processes == 1:
        return [sys.executable, "-m", "stvit.tools.train_cls"]
    return [*torchrun(processes), "-m", "stvit.tools.train_cls"]


def train_on_two_machines(folder: Path, data: Path, *flags: str) -> Path:
    """Trains with two launchers of one process each, as on two machines."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = [*RUN, f"--data-dir={data}", f"--output={folder.parent}", f"--experiment={folder.name}", *flags]
    launchers = []
    for rank in range(2):
        torchrun = f"--nnodes=2 --node-rank={rank} --nproc-per-node=1 --master-addr=127.0.0.1 --master-port={port}"
        launcher = [sys.executable, "-m", "torch.distributed.run", *torchrun.split(), "-m", "stvit.tools.train_cls"]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        launchers.append(subprocess.Popen([*launcher, *line], **pipes))
    (out, err), (other_out, other_err) = (launcher.communicate(timeout=600) for launcher in launchers)
    assert [launcher.returncode for launcher in launchers] == [0, 0], err + other_err
    assert other_out == "" and "step/s" not in other_err and "Warning" not in err + other_err
    (folder / "stdout").write_text(out)
    return folder


def train(processes: int, folder: Path, data: Path, *flags: str) -> Path:
    """Trains, and returns the run directory."""
    line = [*command(processes), *RUN, f"--data-dir={data}", f"--output={folder.parent}", f"--experiment={folder.name}"]
    result = subprocess.run([*line, *flags], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    (folder / "stdout").write_text(result.stdout)
    return folder


def read_summary(folder: Path) -> list[dict[str, float]]:
    with (folder / "summary.csv").open(newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def weights(folder: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return load_file(folder / name / "model.safetensors")


@pytest.mark.long
def test_result_does_not_depend_on_how_the_batch_is_split(digits_folder: Path, tmp_path: Path) -> None:
    """Compares one process with 2n images, two processes with n, and two steps of n, in float64."""
    frozen = [
        "--bn-eval",
        "--model-dtype=float64",
        "--epochs=4",
        "--lr=1e-2",
        "--model-ema",
        "--model-ema-decay=0.9",
        "--reprob=0",
    ]
    one = train(1, tmp_path / "one", digits_folder, *frozen, "--batch-size=32")
    two = train_on_two_machines(tmp_path / "two", digits_folder, *frozen, "--batch-size=16", "--workers=0")
    steps = train(1, tmp_path / "steps", digits_folder, *frozen, "--batch-size=16", "--grad-accum-steps=2")
    for other in (two, steps):
        for row, wanted in zip(read_summary(other), read_summary(one), strict=True):
            assert row["train_loss"] == pytest.approx(wanted["train_loss"], rel=1e-9)
            assert row == pytest.approx(wanted, rel=1e-6)  # timm sums the validation loss in float32
        for name in ("last", "last_ema"):
            for key, value in weights(one, name).items():
                torch.testing.assert_close(weights(other, name)[key], value, rtol=1e-8, atol=1e-10)
    losses = [row["train_loss"] for row in read_summary(one)]
    assert losses[0] - losses[-1] > 1e-2, losses  # the model learns

    # Only one of two processes prints, and the same text.
    said = [(folder / "stdout").read_text().replace(str(folder), "") for folder in (one, two)]
    assert said[0].splitlines()[1:] == said[1].splitlines()[1:]
    assert "on cpu" in said[0].splitlines()[0] and "on 2 x cpu" in said[1].splitlines()[0]


@pytest.mark.long
def test_evaluation_counts_each_image_once(digits_folder: Path, tmp_path: Path) -> None:
    """With a learning rate of 0, all numbers of processes evaluate the same weights."""
    still = ["--lr=0", "--min-lr=0", "--bn-eval", "--batch-size=8", "--epochs=1", "--weight-decay=0"]
    rows = []
    for processes, batch in ((1, 101), (2, 7), (3, 10)):
        flags = [*still, f"--validation-batch-size={batch}", "--workers=0"]
        rows.append(read_summary(train(processes, tmp_path / f"p{processes}", digits_folder, *flags))[0])
    for row in rows:
        assert row["eval_top1"] == pytest.approx(rows[0]["eval_top1"], abs=1e-9)
        assert row["eval_top1"] * VAL / 100 == pytest.approx(round(row["eval_top1"] * VAL / 100), abs=1e-4)
        assert row["eval_loss"] == pytest.approx(rows[0]["eval_loss"], rel=1e-6)


@pytest.mark.long
def test_killed_and_resumed_processes_are_the_same_run(digits_folder: Path, tmp_path: Path) -> None:
    flags = ["--batch-size=16", "--mixup=0.5", "--drop-path=0.2", "--checkpoint-steps=2", "--resume=auto"]
    whole = train(2, tmp_path / "whole", digits_folder, *flags)
    folder = tmp_path / "killed"
    line = [*command(2), *RUN, f"--data-dir={digits_folder}", f"--output={tmp_path}", "--experiment=killed", *flags]
    process = subprocess.Popen(line, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(folder.glob("checkpoints/00000-00000004.pt")):
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    # torchrun starts each process in its own session. They end when they lose the connection.
    process.wait()
    deadline = time.monotonic() + 120
    while subprocess.run(["pgrep", "-f", "experiment=killed"], capture_output=True).stdout:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    train(2, folder, digits_folder, *flags)
    assert "resuming" in (folder / "stdout").read_text()
    assert (folder / "summary.csv").read_bytes() == (whole / "summary.csv").read_bytes()
    assert all(torch.equal(weights(folder)[key], value) for key, value in weights(whole).items())


@pytest.mark.long
def test_signal_to_the_launcher_saves(digits_folder: Path, tmp_path: Path) -> None:
    """torchrun forwards SIGTERM to its processes, and they stop at the same update."""
    flags = ["--batch-size=16", "--workers=1", "--epochs=60", "--checkpoint-steps=0", "--resume=auto"]
    line = [*command(2), *RUN, f"--data-dir={digits_folder}", f"--output={tmp_path}", "--experiment=it", *flags]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "it/log.jsonl"
    while not (log.exists() and log.read_text().count('"train"') > 8):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    said = [text for text in err.splitlines() if "to continue, run the same command with --resume auto" in text]
    assert len(said) == 1, err
    epoch, update = re.search(r"saved after epoch (\d+), update (\d+) of 6", said[0]).groups()
    assert (tmp_path / f"it/checkpoints/{int(epoch):05d}-{int(update):08d}.pt").exists()


def test_batch_norm_over_processes_needs_gpus() -> None:
    config = train_cls.parse_args([*RUN, "--data-dir=data", "--sync-bn"])
    for size in (1, 2):
        with pytest.raises(CommandError, match=r"--sync-bn needs several processes \(torchrun\), each with a GPU"):
            check_config(config, Distributed(torch.device("cpu"), size=size))


@pytest.mark.long
def test_one_process_resumes_a_run_of_two_processes(digits_folder: Path, tmp_path: Path) -> None:
    flags = ["--bn-eval", "--model-dtype=float64", "--checkpoint-steps=4", "--workers=0", "--resume=auto", "--epochs=2"]
    whole = train(2, tmp_path / "whole", digits_folder, *flags, "--batch-size=16")
    for path in (whole / "checkpoints").glob("00002-*"):  # as if the run had ended earlier
        path.unlink()
    other = train(1, whole, digits_folder, *flags, "--batch-size=16", "--grad-accum-steps=2")
    said = (other / "stdout").read_text()
    assert "resuming with 1 processes a run of 2 processes" in said
    assert len(read_summary(other)) == 2


@pytest.mark.long
def test_image_that_one_process_cannot_read(write_digits: Callable[[Path, int, int], Path], tmp_path: Path) -> None:
    data = write_digits(tmp_path / "data", 60, 20)
    bad = sorted((data / "val").rglob("*.png"))[1]  # the second process reads the second image
    bad.write_bytes(b"")
    line = [*command(2), *RUN, f"--data-dir={data}", f"--output={tmp_path}", "--batch-size=16", "--experiment=it"]
    result = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert result.returncode == 1
    # It may follow the progress bar of the first process in a line.
    said = [text.split("error: ", 1)[1] for text in result.stderr.splitlines() if "error: " in text]
    assert any(text.startswith(f"process 1: cannot read image {bad}") for text in said), result.stderr
    assert all("cannot read image" in text or "another process of the run ended" in text for text in said)
    assert not list(tmp_path.glob("it/best/*"))


@pytest.mark.long
def test_an_error_of_one_process_is_printed_once(digits_folder: Path, tmp_path: Path) -> None:
    line = [*command(2), *RUN, "--data-dir=nowhere", f"--output={tmp_path}"]
    result = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert result.returncode == 1
    said = [text for text in result.stderr.splitlines() if text.startswith("error: ")]
    assert said == ["error: --data-dir nowhere is not a folder; it must contain train/<class>/* and val/<class>/*"], (
        result.stderr
    )

"""Tests run directories.

The tests cover locks, changed images, files of other programs, and wrong checkpoints.
"""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from stvit.tools import push_to_hub, train_cls, train_det, train_seg, validate_cls
from stvit.tools.common import locks, runs
from stvit.tools.common.checkpoint import Checkpoints, load_checkpoint
from stvit.tools.common.classification import prepare
from stvit.tools.common.cli import CommandError
from stvit.tools.common.data import Images, open_images
from stvit.tools.common.distributed import Distributed
from stvit.tools.common.engine import Engine, Session
from stvit.tools.common.fingerprint import find_changes, fingerprint
from stvit.tools.common.flags import to_recipe
from stvit.tools.common.locks import InUseError, PathLock
from stvit.tools.common.signals import StopRequest
from stvit.tools.common.snapshots import fetch_run
from stvit.weights import Source
from tests.test_data import KINDS

CPU = Distributed(torch.device("cpu"))
SHORT = (
    "--model=test_stvit --img-size=32 --epochs=1 --batch-size=20 --workers=0 --lr=1e-3 --warmup-epochs=0 "
    "--checkpoint-steps=2 --experiment=it --resume=auto"
).split()


def open_of(*flags: str) -> Images:
    """Opens the datasets that flags of train_cls.py select."""
    config = train_cls.parse_args(list(flags))
    return open_images(config.data, CPU, in_chans=config.model.in_chans, seed=config.run.seed)


def fails(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """Runs the command, which must fail, and returns its only error line."""
    capsys.readouterr()
    assert train_cls.main([*SHORT, *flags]) == 1
    err = capsys.readouterr().err
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "unexpected" not in err and "Traceback" not in err, err
    return lines[0]


def test_a_failed_evaluation_loses_no_update(
    own_digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run continues with the evaluation, and its results are those of an undisturbed run."""
    flags = [f"--data-dir={own_digits_folder}", "--epochs=2", "--model-ema", "--model-ema-decay=0.5", "--drop-path=0.2",
             "--checkpoint-steps=0"]  # fmt: skip
    assert train_cls.main([*SHORT, *flags, f"--output={tmp_path / 'whole'}"]) == 0
    image = next((own_digits_folder / "val").rglob("*.png"))
    content = image.read_bytes()
    image.write_bytes(content[:80])
    line = fails(capsys, *flags, f"--output={tmp_path / 'runs'}")
    assert f"cannot read image {image}: " in line
    assert line.endswith("; the updates of epoch 1 are saved: then run the same command with --resume auto")
    image.write_bytes(content)
    assert train_cls.main([*SHORT, *flags, f"--output={tmp_path / 'runs'}"]) == 0
    assert "0 epochs and 3 updates are done" in capsys.readouterr().out
    for name in ("summary.csv", "last/model.safetensors", "last_ema/model.safetensors", "best/model.safetensors"):
        assert (tmp_path / "runs/it" / name).read_bytes() == (tmp_path / "whole/it" / name).read_bytes(), name


# ---------------------------------------------------------------------------------------------------------------------
# Locks


def test_a_second_run_is_refused_until_the_first_is_dead(
    digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The lock ends with the killed process, even if its loader workers still run."""
    flags = [f"--data-dir={digits_folder}", f"--output={tmp_path}", "--epochs=1000", "--workers=1"]
    process = subprocess.Popen([sys.executable, "-m", "stvit.tools.train_cls", *SHORT, *flags])
    workers = []
    try:
        while not (tmp_path / "it/summary.csv").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGSTOP)
        workers = children(process.pid)
        for worker in workers:
            os.kill(worker, signal.SIGSTOP)
        before = sorted(path.stat().st_mtime_ns for path in (tmp_path / "it").rglob("*"))
        for resume in ("--resume=auto", f"--resume={tmp_path / 'it'}", "--resume="):
            line = fails(capsys, *flags, resume)
            assert f"another process (process {process.pid} on " in line and f"uses {tmp_path / 'it'}; wait" in line
        # Commands that only read are allowed.
        evaluation = [f"--checkpoint={tmp_path / 'it'}", f"--data-dir={digits_folder}", "--workers=0"]
        assert validate_cls.main(evaluation) == 0
        assert (
            push_to_hub.main([str(tmp_path / "it"), "--repo-id=org/run", "--dry-run", f"--output={tmp_path / 'out'}"])
            == 0
        )
        assert before == sorted(path.stat().st_mtime_ns for path in (tmp_path / "it").rglob("*"))
        process.kill()
        process.wait()
        assert (tmp_path / "it/.stvit.lock").exists() and Path(f"/proc/{workers[0]}").exists()
        done = load_checkpoint(Checkpoints(tmp_path / "it/checkpoints").paths()[-1])["progress"]["epoch"]
        assert train_cls.main([*SHORT, *flags, "--workers=0", f"--epochs={done + 1}"]) == 0
        assert not (tmp_path / "it/.stvit.lock").exists()
    finally:
        process.kill()
        for worker in workers:
            os.kill(worker, signal.SIGKILL)


def children(pid: int) -> list[int]:
    """Returns the loader workers of a process."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found if "train_cls" in Path(f"/proc/{child}/cmdline").read_text()]


def test_runs_of_one_second_get_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Frozen(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> "Frozen":
            return cls(2026, 1, 2, 3, 4, 5, tzinfo=tz)

    monkeypatch.setattr(runs, "datetime", Frozen)
    config = train_cls.parse_args(["--model=test_stvit", f"--output={tmp_path}"])

    def find(lock: PathLock) -> str:
        return runs.find_run(config.run, to_recipe(config), "test_stvit-32", lock)[0].name

    with PathLock() as one, PathLock() as two, PathLock() as three:
        names = [find(lock) for lock in (one, two, three)]
    name = "20260102-030405-test_stvit-32"
    assert names == [name, f"{name}-2", f"{name}-3"]
    # A run that began in this second and has ended keeps its results.
    (tmp_path / name / "summary.csv").write_text("")
    with PathLock() as lock:
        assert find(lock) == f"{name}-2"
    assert sorted(path.name for path in tmp_path.rglob("*")) == [name, f"{name}-2", f"{name}-3", "summary.csv"]


def test_one_of_many_holds_the_lock(tmp_path: Path) -> None:
    """Several processes increase a number in a file under the lock, and lose no increment."""
    number = tmp_path / "number"
    number.write_text("0")
    pids = []
    for _ in range(4):
        pid = os.fork()
        if pid == 0:
            try:
                with PathLock() as lock:
                    for _ in range(100):
                        while True:
                            try:
                                lock.acquire(tmp_path / ".lock")
                                break
                            except InUseError:
                                pass
                        number.write_text(str(int(number.read_text()) + 1))
                        lock.release()
                os._exit(0)
            finally:
                os._exit(1)
        pids.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 4
    assert number.read_text() == "400" and not (tmp_path / ".lock").exists()


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        *((train_det, f"--{split}-{kind}") for split in ("train", "val") for kind in ("images", "annotations")),
        *((train_seg, flag) for flag in ("--train-labels", "--val-labels", "--class-names", "--data-dir")),
    ],
)
def test_runs_without_a_name_differ_in_their_data(command: Any, flag: str) -> None:
    def identity(path: Path) -> dict[str, Any]:
        return runs._identity(to_recipe(command.parse_args([f"{flag}={path}"])))

    assert identity(Path("one")) != identity(Path("two"))
    assert identity(Path("one")) == identity(Path("one").absolute())


def test_a_lock_that_was_moved_away_does_not_remove_another(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with PathLock() as one, PathLock() as two:
        one.acquire(tmp_path / "run/.lock")
        (tmp_path / "run").rename(tmp_path / "moved")
        (tmp_path / "run").mkdir()
        two.acquire(tmp_path / "run/.lock")
        one.release()
        assert (tmp_path / "run/.lock").exists()
        with PathLock() as three, pytest.raises(InUseError):
            three.acquire(tmp_path / "run/.lock")


def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    assert locks.fcntl is not None
    monkeypatch.setattr(locks.fcntl, "flock", flock)
    with PathLock() as lock:
        lock.acquire(tmp_path / ".lock")
    assert f"warning: {tmp_path} is on a file system without locks" in capsys.readouterr().err


def test_a_run_is_downloaded_by_one_process(tmp_path: Path) -> None:
    with PathLock() as lock:
        lock.acquire(tmp_path / ".org--run.lock")
        with pytest.raises(InUseError, match="another process is downloading this run"):
            fetch_run(Source.hub("org/run", "last"), tmp_path, None, lambda *_: None)
    assert not list(tmp_path.iterdir())


def test_two_evaluations_do_not_share_a_folder(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [f"--checkpoint={finished / 'it'}", f"--data-dir={finished / 'data'}", "--workers=0"]
    with PathLock() as lock:
        lock.acquire(tmp_path / ".stvit.lock")
        assert validate_cls.main([*flags, f"--output={tmp_path}"]) == 1
        assert f"uses {tmp_path}; choose another --output" in capsys.readouterr().err
    assert validate_cls.main([*flags, f"--output={tmp_path}"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["confusion.png", "per_class.csv", "results.json"]


# ---------------------------------------------------------------------------------------------------------------------
# Changed images


@pytest.fixture(scope="module")
def finished(digits_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch in `it`, and its images in `data`.

    Tests work on copies of it.
    """
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(digits_folder, folder / "data")
    assert train_cls.main([*SHORT, f"--data-dir={folder / 'data'}", f"--output={folder}"]) == 0
    return folder


@pytest.fixture
def own(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "own"))


def rename_class(data: Path) -> None:
    for split in ("train", "val"):
        (data / split / "digit_1").rename(data / split / "digit_7")


def swap_classes(data: Path) -> None:
    for split in ("train", "val"):
        (data / split / "digit_1").rename(data / split / "x")
        (data / split / "digit_2").rename(data / split / "digit_1")
        (data / split / "x").rename(data / split / "digit_2")


def first(folder: Path) -> Path:
    return min(folder.iterdir())


def move_image(data: Path) -> None:
    path = first(data / "train/digit_1")
    path.rename(data / "train/digit_2" / path.name)


def replace_image(data: Path) -> None:
    path = first(data / "train/digit_1")
    path.rename(path.with_name("999.png"))


def replace_validation_image(data: Path) -> None:
    path = first(data / "val/digit_3")
    path.rename(path.with_name("999.png"))


def remove_image(data: Path) -> None:
    first(data / "train/digit_0").unlink()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (rename_class, "class names: 'digit_1' is now 'digit_2', 'digit_2' is now 'digit_3', 'digit_3' is now"),
        (swap_classes, "training images: of class 'digit_1' 1"),
        (move_image, ", now"),
        (replace_image, "training images: of class 'digit_1' "),
        (replace_validation_image, "validation images: of class 'digit_3' "),
        (remove_image, "training images (60, now 59 in all): of class 'digit_0' "),
    ],
)
def test_changed_images_are_named_and_refused(
    change: Callable[[Path], None], said: str, own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(own / "data")
    flags = [f"--data-dir={own / 'data'}", f"--output={own}", "--epochs=2"]
    before = {path: path.read_bytes() for path in (own / "it").rglob("*.*") if path.is_file()}
    line = fails(capsys, *flags)
    assert said in line and "pass --allow-changed-data" in line
    assert before == {path: path.read_bytes() for path in (own / "it").rglob("*.*") if path.is_file()}
    # With the flag the run continues with the current images. The next resume does not need it.
    assert train_cls.main([*SHORT, *flags, "--allow-changed-data"]) == 0
    assert "continuing with changed data: " in capsys.readouterr().out
    names = json.loads((own / "it/last/config.json").read_text())["label_names"]
    assert names == sorted(path.name for path in (own / "data/train").iterdir())
    assert "allow_changed_data" not in yaml.safe_load((own / "it/config.yaml").read_text())
    assert train_cls.main([*SHORT, *flags]) == 0


def test_images_may_move_and_be_packed(own: Path, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_cls.main([*SHORT, f"--data-dir={own / 'data'}", f"--output={own}"]) == 0
    (own / "tar").mkdir()
    flags = KINDS["tar"](own / "data", own / "tar")
    assert train_cls.main([*SHORT, *flags, f"--output={own}", "--epochs=2"]) == 0
    assert "resuming" in capsys.readouterr().out


def test_checkpoints_of_earlier_versions(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They have no fingerprint of the images."""
    (*_, newest) = Checkpoints(own / "it/checkpoints").paths()
    state = load_checkpoint(newest)
    del state["data"]
    torch.save(state, newest)
    flags = [f"--data-dir={own / 'data'}", f"--output={own}", "--epochs=2"]
    remove_image(own / "data")
    assert "training images: 60, now 59" in fails(capsys, *flags)
    shutil.copy(first(own / "data/train/digit_0"), own / "data/train/digit_0/999.png")
    assert train_cls.main([*SHORT, *flags]) == 0
    assert "was written by an earlier version" in capsys.readouterr().out


def other_number_of_classes(data: Path) -> None:
    for split in ("train", "val"):
        shutil.rmtree(data / split / "digit_3")


def test_the_number_of_classes_cannot_change(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other_number_of_classes(own / "data")
    flags = [f"--data-dir={own / 'data'}", f"--output={own}", "--epochs=2", "--allow-changed-data"]
    assert "num_classes 4, now 3" in fails(capsys, *flags)


def as_torch_folder(folder: Path, _: Path) -> list[str]:
    return ["--dataset=torch/image_folder", f"--data-dir={folder}"]


@pytest.mark.parametrize("kind", [*KINDS, "torch"])
def test_every_kind_of_set_has_a_fingerprint(
    kind: str, own_digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")

    def look(name: str) -> dict[str, Any]:
        (tmp_path / name).mkdir()
        shutil.copytree(own_digits_folder, tmp_path / name / "data")
        make = KINDS.get(kind, as_torch_folder)
        flags = make(tmp_path / name / "data", tmp_path / name)
        return fingerprint(open_of("--in-chans=3", *flags))

    one, moved = look("one"), look("moved")
    assert find_changes(one, moved) == []
    shutil.copy(first(own_digits_folder / "train/digit_1"), own_digits_folder / "train/digit_1/999.png")
    (change,) = find_changes(one, look("more"))
    if kind == "wds":
        assert change == "training images: the list of shards in _info.json"
    else:
        assert "training images (60, now 61 in all): of class 'digit_1' 1" in change


def test_sets_without_paths_have_labels(tmp_path: Path) -> None:
    digits = open_of("--dataset=sklearn/digits", "--in-chans=1")
    one = fingerprint(digits)
    other = open_of("--dataset=sklearn/digits", "--in-chans=1", "--seed=1")
    assert one["train"]["labels"].keys() == {str(i) for i in range(10)}
    assert find_changes(one, fingerprint(digits)) == [] and find_changes(one, fingerprint(other))


# ---------------------------------------------------------------------------------------------------------------------
# Files of other programs


def test_foreign_files_are_neither_read_nor_removed(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = own / "it/checkpoints"
    oldest, newest = Checkpoints(folder).paths()
    foreign = [
        "backup.pt",
        "0-mine.pt",
        "9-9.pt",
        "000099-00000000.pt",
        "00009-00000000 (copy).pt",
        "99999-00000000.PT",
    ]
    for name in foreign:
        shutil.copy(oldest, folder / name)
    (folder / "00099-00000000.pt").mkdir()
    os.mkfifo(folder / "00098-00000000.pt")
    assert Checkpoints(folder).paths() == [oldest, newest]
    flags = [f"--data-dir={own / 'data'}", f"--output={own}", "--epochs=3"]
    capsys.readouterr()
    assert train_cls.main([*SHORT, *flags]) == 0
    assert f"resuming {newest}" in capsys.readouterr().out
    left = {path.name for path in folder.iterdir()}
    assert left == {*foreign, "00099-00000000.pt", "00098-00000000.pt", "00002-00000002.pt", "00003-00000000.pt"}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("checkpoints/00002-00000000.pt.tmp", "link"),
        ("checkpoints/00002-00000000.pt.tmp", "pipe"),
        ("config.yaml.tmp", "link"),
        ("summary.csv.tmp", "link"),
        ("last.tmp", "folder link"),
    ],
)
def test_temporary_files_of_strangers_are_replaced(name: str, kind: str, own: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("keep")
    if kind == "pipe":
        os.mkfifo(own / "it" / name)
    else:
        (own / "it" / name).symlink_to(outside if kind == "folder link" else outside / "file")
    assert train_cls.main([*SHORT, f"--data-dir={own / 'data'}", f"--output={own}", "--epochs=2"]) == 0
    assert [path.name for path in outside.iterdir()] == ["file"] and (outside / "file").read_text() == "keep"
    assert not (own / "it" / name).is_symlink()


@pytest.mark.parametrize("name", ["log.jsonl", "last", "checkpoints"])
def test_a_run_does_not_write_through_links(
    name: str, own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run directory may contain links of another person.

    Training writes only inside the directory.
    """
    target = tmp_path / "target"
    (own / "it" / name).rename(target)
    (own / "it" / name).symlink_to(target)
    files = [path for path in ([target] if target.is_file() else target.rglob("*")) if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    said = fails(capsys, f"--data-dir={own / 'data'}", f"--output={own}", "--epochs=2")
    assert "is a link" in said and str(own / "it" / name) in said
    assert {path: path.read_bytes() for path in files} == before


def test_checkpoints_beyond_the_width_of_their_names_are_in_order(tmp_path: Path) -> None:
    for name in ("100000-00000000.pt", "99999-00000000.pt", "99999-100000000.pt"):
        (tmp_path / name).write_bytes(b"")
    names = [path.name for path in Checkpoints(tmp_path).paths()]
    assert names == ["99999-00000000.pt", "99999-100000000.pt", "100000-00000000.pt"]


def test_names_that_begin_like_tokens_are_not_hidden(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Folders called hf_… are common. Only real tokens are hidden."""
    flags = [f"--data-dir={own / 'hf_datasetA'}", f"--output={own}", "--resume=auto"]
    command = [flag for flag in SHORT if "experiment" not in flag]
    for name in ("hf_datasetA", "hf_datasetB"):
        shutil.copytree(own / "data", own / name)
        flags[0] = f"--data-dir={own / name}"
        assert train_cls.main([*command, *flags]) == 0
        assert "is finished" not in capsys.readouterr().out
    recipes = [yaml.safe_load(path.read_text())["data_dir"] for path in own.glob("2*/config.yaml")]
    assert sorted(Path(path).name for path in recipes) == ["hf_datasetA", "hf_datasetB"]


def test_runs_of_others_do_not_stop_the_search(own: Path, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--resume auto reads the recipes of all runs, and ignores invalid ones."""
    flags = [f"--data-dir={finished / 'data'}", f"--output={own}"]
    for number, recipe in enumerate(["a: [", "[" * 3000, "data_dir: [1]", "data_dir: {}", "\0", "- 1"]):
        (own / f"{number}/checkpoints").mkdir(parents=True)
        (own / f"{number}/config.yaml").write_text(recipe)
    os.mkfifo(own / "0/pipe")
    (own / "pipe/checkpoints").mkdir(parents=True)
    os.mkfifo(own / "pipe/config.yaml")
    (own / "gone").mkdir()
    (own / "gone/checkpoints").symlink_to("nowhere")
    command = [flag for flag in SHORT if "experiment" not in flag]
    assert train_cls.main([*command, *flags]) == 0
    assert f"{own / 'it'} is finished" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# Wrong checkpoints


def without(*path: Any) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        for key in path[:-1]:
            state = state[key]
        del state[path[-1]]

    return change


def with_value(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        for key in path[:-1]:
            state = state[key]
        state[path[-1]] = value

    return change


def too_many_steps(state: dict[str, Any]) -> None:
    state["progress"]["step"] = state["processes"][0]["images"] = 1000


def of_another_model(state: dict[str, Any]) -> None:
    for values in state["optimizer"]["state"].values():
        values["exp_avg"] = torch.zeros(3, 5)


def one_parameter_less(state: dict[str, Any]) -> None:
    state["optimizer"]["param_groups"][0]["params"].pop()


WRONG_STATES: dict[str, Callable[[dict[str, Any]], None]] = {
    **{f"without {key}": without(key) for key in ("progress", "recipe", "model", "processes", "images")},
    **{f"without {key}": without(key) for key in ("optimizer", "scheduler", "update_images")},
    **{f"without progress.{key}": without("progress", key) for key in ("epoch", "step", "history", "best", "images")},
    **{f"without processes[0].{key}": without("processes", 0, key) for key in ("random", "images", "loss_sum")},
    **{f"without random.{key}": without("processes", 0, "random", key) for key in ("python", "numpy", "torch")},
    "without recipe.epochs": without("recipe", "epochs"),
    "without data.train": without("data", "train"),
    "without lr": without("optimizer", "param_groups", 0, "lr"),
    "epoch a text": with_value("progress", "epoch", value="1"),
    "epoch true": with_value("progress", "epoch", value=True),
    "epoch negative": with_value("progress", "epoch", value=-1),
    "another epoch": with_value("progress", "epoch", value=0),
    "steps without images": with_value("progress", "step", value=2),
    "more steps than an epoch has": too_many_steps,
    "best too short": with_value("progress", "best", value=[1]),
    "history of numbers": with_value("progress", "history", value=[1]),
    "history without loss": with_value("progress", "history", value=[{"epoch": 0}]),
    "history of a text": with_value("progress", "history", 0, "lr", value="fast"),
    "no processes": with_value("processes", value=[]),
    "processes a number": with_value("processes", value=1),
    "random too short": with_value("processes", 0, "random", "python", 1, value=[1, 2]),
    "random out of range": with_value("processes", 0, "random", "python", 1, value=[-1] * 625),
    "random of another kind": with_value("processes", 0, "random", "numpy", 0, value="SFC64"),
    "random of another shape": with_value("processes", 0, "random", "torch", value=torch.zeros(3)),
    "weights of another shape": with_value("model", "head.fc.weight", value=torch.zeros(7, 7)),
    "weights of whole numbers": with_value("model", "head.fc.bias", value=torch.zeros(4, dtype=torch.int64)),
    "weights a text": with_value("model", "head.fc.weight", value="none"),
    "weights too many": with_value("model", "more", value=torch.zeros(1)),
    "recipe a list": with_value("recipe", value=[]),
    "scheduler a list": with_value("scheduler", value=[]),
    "scheduler of a text": with_value("scheduler", "t_initial", value="soon"),
    "optimizer of another model": of_another_model,
    "optimizer with a parameter less": one_parameter_less,
    "optimizer of a stranger": with_value("optimizer", "state", 10_000, value={}),
    "optimizer of a text": with_value("optimizer", "state", 0, "step", value="one"),
    "learning rate a text": with_value("optimizer", "param_groups", 0, "lr", value="fast"),
    "optimizer of None": with_value("optimizer", "state", 0, "exp_avg", value=None),
    "epsilon too large": with_value("optimizer", "param_groups", 0, "eps", value=10**30),
    "correct too large": with_value("processes", 0, "correct", value=10**30),
    "data labels of numbers": with_value("data", "train", "labels", value={1: [1, "x"]}),
    "data labels of many digits": with_value("data", "train", "labels", value={"1" * 5000: [1, "x"]}),
    "data of numbers": with_value("data", "class_names", value=[1, 2, 3, 4]),
    "data labels of texts": with_value("data", "train", "labels", value={"0": "many"}),
}


@pytest.mark.parametrize("step", [4, pytest.param(1, marks=pytest.mark.long)])
def test_checkpoints_with_wrong_contents_give_one_error_line(
    step: int, own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Undamaged files with wrong contents, such as those of another program."""
    path = own / "it/checkpoints/00001-00000000.pt"
    right = path.read_bytes()
    flags = [f"--data-dir={own / 'data'}", f"--output={own}", "--epochs=2", f"--resume={path}"]
    with StopRequest() as stop, PathLock() as lock:
        config = train_cls.parse_args([*SHORT, *flags])
        engine = Engine(Session(CPU, stop, lock), config, prepare(config, CPU))
        for name, change in list(WRONG_STATES.items())[::step]:
            path.write_bytes(right)
            state = torch.load(path, weights_only=True)
            change(state)
            torch.save(state, path)
            with pytest.raises(CommandError, match=r"does not fit this run|is damaged") as error:
                engine.state.resume(path)
            assert str(path) in str(error.value), name
    for name in ("without progress.epoch", "without random.torch", "weights a text"):
        path.write_bytes(right)
        state = torch.load(path, weights_only=True)
        WRONG_STATES[name](state)
        torch.save(state, path)
        assert str(path) in fails(capsys, *flags)
    contents: list[Any] = [[], "text", 1, {"model": {}}, {1: 2}]
    for content in contents:
        torch.save(content, path)
        with pytest.raises(CommandError, match=r"is damaged .it is not a checkpoint of this program"):
            load_checkpoint(path)
    path.write_bytes(right)
    assert train_cls.main([*SHORT, *flags]) == 0


def test_a_pipe_is_refused_as_a_checkpoint(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "00001-00000000.pt")
    with pytest.raises(CommandError, match="is not a file"):
        load_checkpoint(tmp_path / "00001-00000000.pt")

"""Tests resuming after signals, kills, damaged files and full disks."""

import csv
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from timm.utils import NativeScaler

from stvit.tools import train_cls
from stvit.tools.common import engine
from stvit.tools.common.checkpoint import Checkpoints, load_checkpoint
from stvit.tools.common.cli import CommandError

# Everything with a state: workers, accumulation, all random augmentations, dropout, EMA, a schedule by updates.
EPOCHS, UPDATES = 3, 22
BATCH_SIZE, ACCUMULATED = 8, 2
RUN = (
    f"--model=test_stvit --img-size=32 --in-chans=1 --workers=2 --batch-size={BATCH_SIZE} "
    f"--grad-accum-steps={ACCUMULATED} --epochs={EPOCHS} --lr=3e-3 --warmup-epochs=1 --sched-on-updates --drop=0.1 "
    "--drop-path=0.2 --drop-path-schedule 1:0.1 --mixup=0.2 --cutmix=1 --mixup-prob=0.8 --mixup-off-epoch=2 "
    "--reprob=0.5 --aa=rand-m5-mstd0.5 --aug-repeats=2 --model-ema --model-ema-decay=0.9 --clip-grad=5 "
    "--checkpoint-steps=4 --log-interval=1 --experiment=it --resume=auto"
).split()


@pytest.fixture(scope="module")
def recipe(write_digits: Callable[[Path, int, int], Path], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of a run, with just enough images."""
    folder = write_digits(tmp_path_factory.mktemp("digits"), UPDATES * BATCH_SIZE * ACCUMULATED, 40)
    return [*RUN, f"--data-dir={folder}"]


def start(recipe: list[str], folder: Path, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "stvit.tools.train_cls", *recipe, f"--output={folder}", *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(recipe: list[str], folder: Path, *flags: str) -> str:
    """Runs the command to its end, and returns its output."""
    process = start(recipe, folder, *flags)
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0, out
    return out


def updates_logged(folder: Path) -> int:
    log = folder / "it/log.jsonl"
    return log.read_bytes().count(b'"event": "train"') if log.exists() else 0


def wait_for_updates(process: subprocess.Popen[str], folder: Path, updates: int) -> None:
    """Waits until the process has done this number of additional updates."""
    goal = updates_logged(folder) + updates
    while updates_logged(folder) < goal:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)


def results(folder: Path) -> dict[str, bytes]:
    """Returns all results of a run except its logs, which contain times."""
    files = ("model.safetensors", "config.json")
    names = [f"{model}/{file}" for model in ("best", "last", "last_ema") for file in files]
    return {name: (folder / "it" / name).read_bytes() for name in [*names, "summary.csv"]}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def assert_same_run(folder: Path, reference: Path, epochs: int = EPOCHS) -> None:
    ours, wanted = results(folder), results(reference)
    assert [name for name in wanted if ours[name] != wanted[name]] == []
    # Also optimizer, schedule and random states.
    last = f"it/checkpoints/{epochs:05d}-00000000.pt"
    assert same(load_checkpoint(folder / last), load_checkpoint(reference / last))


@pytest.fixture(scope="module")
def reference(recipe: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run.

    It also shows that --resume auto starts a new run if no run exists.
    """
    folder = tmp_path_factory.mktemp("reference")
    out = finish(recipe, folder)
    assert "resuming" not in out
    return folder


@pytest.fixture(scope="module")
def halfway(recipe: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed in the middle. Tests work on copies of it."""
    folder = tmp_path_factory.mktemp("halfway")
    process = start(recipe, folder)
    wait_for_updates(process, folder, UPDATES + 10)
    process.kill()
    process.communicate()
    return folder


@pytest.fixture
def killed(halfway: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(halfway, tmp_path / "runs"))


@pytest.mark.long  # `killed` is a run killed at one moment
@pytest.mark.parametrize("times", [3, 10])
def test_killed_at_random_is_the_same_run(recipe: list[str], times: int, reference: Path, tmp_path: Path) -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    print("random moments of seed", seed)
    moments = random.Random(seed)
    resumed = set()
    for i in range(times):
        process = start(recipe, tmp_path)
        # The first kill waits for the first checkpoint, after four updates.
        wait_for_updates(process, tmp_path, moments.randint(1 if i else 5, 9))
        time.sleep(moments.uniform(0.0, 0.05))
        process.kill()
        out, _ = process.communicate()
        assert process.returncode == -signal.SIGKILL, out
        resumed |= {line for line in out.splitlines() if line.startswith("resuming")}
    out = finish(recipe, tmp_path)
    resumed |= {line for line in out.splitlines() if line.startswith("resuming")}
    # Some resumes were in the middle of an epoch.
    assert any(" and 0 updates" not in line for line in resumed), resumed
    assert_same_run(tmp_path, reference)


@pytest.fixture(scope="module")
def short(recipe: list[str]) -> list[str]:
    """Flags of a run of one epoch."""
    return [*recipe, "--epochs=1", "--warmup-epochs=0", "--checkpoint-steps=1000"]


@pytest.fixture(scope="module")
def finished(short: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of one epoch."""
    folder = tmp_path_factory.mktemp("finished")
    assert train_cls.main([*short, f"--output={folder}"]) == 0
    return folder


def test_killed_between_the_results_and_the_checkpoint_of_the_first_epoch(
    short: list[str], finished: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "it"
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from stvit.tools import train_cls; from stvit.tools.common.engine import Engine\n"
        "save = Engine._save_checkpoint\n"
        "def save_or_die(self):\n"
        f"    if Path({str(folder / 'summary.csv')!r}).exists(): os.kill(os.getpid(), signal.SIGKILL)\n"
        "    save(self)\n"
        "Engine._save_checkpoint = save_or_die\n"
        "train_cls.main(sys.argv[1:])"
    )
    flags = [*short, f"--output={tmp_path}"]
    process = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert (folder / "summary.csv").exists()
    assert train_cls.main(flags) == 0
    assert_same_run(tmp_path, finished, epochs=1)


@pytest.mark.long  # test_distributed.py and test_train_cls.py send these signals to other runs
@pytest.mark.parametrize(
    ("signum", "status", "word"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]
)
def test_signal_saves_and_prints_how_to_resume(
    recipe: list[str], signum: int, status: int, word: str, reference: Path, tmp_path: Path
) -> None:
    process = start(recipe, tmp_path, "--checkpoint-steps=0")
    wait_for_updates(process, tmp_path, UPDATES + 5)
    process.send_signal(signum)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == status
    (path,) = Checkpoints(tmp_path / "it/checkpoints").paths()[-1:]
    state = load_checkpoint(path)["progress"]
    said = f"{word}; saved after epoch {state['epoch']}, update {state['step']} of {UPDATES}"
    assert out.splitlines()[-1] == f"{said}: to continue, run the same command with --resume auto"
    assert state["epoch"] * UPDATES + state["step"] > UPDATES
    finish(recipe, tmp_path)
    assert_same_run(tmp_path, reference)


@pytest.mark.long
def test_mixed_precision_resumes_with_its_loss_scale(
    digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss scaler of float16 begins with too high a scale, skips updates, and lowers the scale."""

    def scale_too_much(device: str) -> NativeScaler:
        scaler = NativeScaler(device)
        scaler.load_state_dict(scaler.state_dict() | {"scale": 2.0**20})
        return scaler

    monkeypatch.setattr(engine, "NativeScaler", scale_too_much)
    flags = ["--model=test_stvit", "--img-size=32", f"--data-dir={digits_folder}", "--workers=0", "--batch-size=4"]
    flags += ["--epochs=1", "--amp", "--amp-dtype=float16", "--checkpoint-steps=8", "--lr=1e-3", "--warmup-epochs=0"]
    flags += [f"--output={tmp_path}", "--experiment=it", "--resume=auto"]
    assert train_cls.main(flags) == 0
    weights = tmp_path / "it/last/model.safetensors"
    whole, (middle, end) = weights.read_bytes(), Checkpoints(tmp_path / "it/checkpoints").paths()
    scale = load_checkpoint(middle)["scaler"]["scale"]
    assert 1.0 < scale < 2.0**20
    end.unlink()
    assert train_cls.main(flags) == 0
    assert weights.read_bytes() == whole
    # Another scale gives another run.
    state = load_checkpoint(middle)
    torch.save(state | {"scaler": state["scaler"] | {"scale": 2.0**40}}, middle)
    end.unlink()
    assert train_cls.main(flags) == 0
    assert weights.read_bytes() != whole


def test_finished_run_is_unchanged(short: list[str], finished: Path) -> None:
    before = results(finished)
    assert "is finished: 1 epochs are done" in finish(short, finished)
    assert results(finished) == before


def damage(path: Path, kind: str) -> None:
    content = bytearray(path.read_bytes())
    if kind == "flipped":
        content[len(content) // 2] ^= 0xFF
    path.write_bytes({"flipped": content, "cut": content[:-1000], "empty": b""}[kind])


@pytest.mark.parametrize("kind", ["flipped", "cut", "empty"])
def test_damaged_checkpoint_is_named(kind: str, killed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = Checkpoints(killed / "it/checkpoints")
    before, newest = checkpoints.paths()
    damage(newest, kind)
    loaded = checkpoints.load()
    assert loaded is not None and loaded[1] == before
    said = capsys.readouterr().err
    assert f"warning: checkpoint {newest} is damaged" in said and "using the one before it" in said


@pytest.mark.long
def test_damaged_checkpoint_changes_nothing(recipe: list[str], killed: Path, reference: Path) -> None:
    newest = Checkpoints(killed / "it/checkpoints").paths()[-1]
    damage(newest, "flipped")
    # The path of the run directory has priority over --experiment.
    out = finish(recipe, killed, f"--resume={killed / 'it'}", "--experiment=other")
    assert f"warning: checkpoint {newest} is damaged" in out
    assert_same_run(killed, reference)


@pytest.mark.long
def test_incomplete_files_beside_the_checkpoints_are_ignored(recipe: list[str], killed: Path, reference: Path) -> None:
    """A kill in the middle of a write leaves half a temporary file and half a line."""
    checkpoints = killed / "it/checkpoints"
    (checkpoints / "00003-00000000.pt.tmp").write_bytes(b"PK\x03\x04")
    with (killed / "it/log.jsonl").open("a") as log:
        log.write('{"event": "tra')
    finish(recipe, killed)
    assert [json.loads(line)["event"] for line in (killed / "it/log.jsonl").read_text().splitlines()][-1] == "epoch"
    assert_same_run(killed, reference)


def test_all_checkpoints_damaged(recipe: list[str], killed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in Checkpoints(killed / "it/checkpoints").paths():
        path.write_bytes(b"")
    assert train_cls.main([*recipe, f"--output={killed}"]) == 1
    assert "no checkpoint in" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.long
def test_full_disk_loses_nothing(recipe: list[str], killed: Path, reference: Path) -> None:
    """A limit on file sizes makes a write fail in the middle."""
    before = set(Checkpoints(killed / "it/checkpoints").paths())
    process = start(recipe, killed)
    wait_for_updates(process, killed, 1)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (300_000, 300_000))
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    line = out.splitlines()[-1]
    assert line.startswith("error: cannot write checkpoint") and "--resume auto" in line, line
    after = Checkpoints(killed / "it/checkpoints").paths()
    assert after and all(load_checkpoint(path) for path in after)
    assert before & set(after)
    assert not list((killed / "it/checkpoints").glob("*.tmp"))
    finish(recipe, killed)
    assert_same_run(killed, reference)


@pytest.mark.long
def test_full_disk_keeps_the_weights_before(recipe: list[str], killed: Path, reference: Path) -> None:
    """Weights are written completely or not at all, and the run resumes from the previous checkpoint."""
    before = results(killed)
    process = start(recipe, killed, "--checkpoint-steps=0")
    wait_for_updates(process, killed, 1)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (300_000, 300_000))
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    line = out.splitlines()[-1]
    assert line.startswith("error: cannot write the weights to") and "--resume auto" in line, line
    assert results(killed) == before
    assert not list((killed / "it").glob("*.tmp"))
    finish(recipe, killed)
    assert_same_run(killed, reference)


def test_other_flags_are_refused(recipe: list[str], killed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flag, said in (
        ("--lr=0.1", "was started with other flags (lr 0.003, now 0.1)"),
        ("--grad-accum-steps=1", f"with {BATCH_SIZE * ACCUMULATED} images per update, but this one has {BATCH_SIZE}"),
        ("--resume=", "contains the results of another run"),
        ("--resume=nowhere", "no checkpoint there"),
    ):
        assert train_cls.main([*recipe, f"--output={killed}", flag]) == 1
        assert said in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.long
def test_resume_by_the_path_of_a_file(recipe: list[str], killed: Path, reference: Path) -> None:
    checkpoint = Checkpoints(killed / "it/checkpoints").paths()[0]
    out = finish(recipe, killed, f"--resume={checkpoint}", "--experiment=other")
    assert f"resuming {checkpoint}" in out
    assert_same_run(killed, reference)


@pytest.mark.long
def test_auto_finds_the_run_without_its_name(killed: Path, reference: Path) -> None:
    # The recipe that the run wrote, without its name.
    recipe = yaml.safe_load((killed / "it/config.yaml").read_text())
    del recipe["experiment"]
    (killed / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "stvit.tools.train_cls", f"--config={killed / 'recipe.yaml'}", "--resume=auto"]
    command.append(f"--output={killed}")
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"resuming {killed / 'it'}" in out
    assert sorted(path.name for path in killed.iterdir()) == ["it", "recipe.yaml"]
    assert results(killed) == results(reference)


SHORT = (
    "--model=test_stvit --img-size=32 --epochs=2 --batch-size=20 --workers=0 --lr=1e-3 --checkpoint-steps=2 "
    "--resume=auto"
).split()


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "summary.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("sched", "on_updates"),
    [
        ("cosine", True),
        *(
            pytest.param(sched, on_updates, marks=pytest.mark.long)
            for sched in ("cosine", "step", "poly", "constant", "plateau", "none")
            for on_updates in (False, True)
            if (sched, on_updates) not in (("cosine", True), ("plateau", True))
        ),
    ],
)
def test_an_extended_run_has_the_learning_rates_of_a_longer_run(
    sched: str, on_updates: bool, digits_folder: Path, tmp_path: Path
) -> None:
    flags = [*SHORT, f"--data-dir={digits_folder}", f"--sched={sched}", "--warmup-epochs=1", "--log-interval=1"]
    flags += ["--checkpoint-steps=0", f"--output={tmp_path}"] + ["--sched-on-updates"] * on_updates
    assert train_cls.main([*flags, "--epochs=4", "--experiment=whole"]) == 0
    assert train_cls.main([*flags, "--epochs=2", "--experiment=extended"]) == 0
    assert train_cls.main([*flags, "--epochs=4", "--experiment=extended"]) == 0
    whole, extended = (rates(tmp_path / name) for name in ("whole", "extended"))
    assert len(whole) == len(extended) == 12
    assert extended[6:] == whole[6:]
    assert (extended == whole) == (sched not in ("cosine", "poly"))


@pytest.mark.long
def test_a_plateau_is_remembered(digits_folder: Path, tmp_path: Path) -> None:
    """Epochs without progress before the interruption count."""
    flags = [*SHORT, f"--data-dir={digits_folder}", "--sched=plateau", "--warmup-epochs=0"]
    flags += ["--opt=sgd", "--lr=1e-7", "--min-lr=1e-9", "--no-aug", "--checkpoint-steps=0", f"--output={tmp_path}"]
    assert train_cls.main([*flags, "--epochs=14", "--experiment=whole"]) == 0
    for epochs in (6, 14):
        assert train_cls.main([*flags, f"--epochs={epochs}", "--experiment=extended"]) == 0
    whole, extended = ([row["lr"] for row in rows(tmp_path / name)] for name in ("whole", "extended"))
    assert len(set(whole)) > 1  # the schedule has reduced the learning rate
    assert extended == whole


def rates(folder: Path) -> list[float]:
    """Returns the learning rate after each update."""
    lines = map(json.loads, (folder / "log.jsonl").read_text(encoding="utf-8").splitlines())
    return [line["lr"] for line in lines if line["event"] == "train"]


def test_a_finished_run_is_extended(digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*SHORT, f"--data-dir={digits_folder}", f"--output={tmp_path}", "--experiment=it", "--warmup-epochs=0"]
    assert train_cls.main([*flags, "--epochs=1"]) == 0
    first = rows(tmp_path / "it")
    capsys.readouterr()
    assert train_cls.main([*flags, "--epochs=3"]) == 0
    out = capsys.readouterr().out
    assert "extending the run from 1 to 3 epochs: the learning rate continues at 0.0007525 " in out
    assert "with the cosine schedule for 1 epochs it was 1e-05" in out
    # The results are those of one run.
    summary = rows(tmp_path / "it")
    assert summary[:1] == first and [row["epoch"] for row in summary] == ["0", "1", "2"]
    assert yaml.safe_load((tmp_path / "it/config.yaml").read_text(encoding="utf-8"))["epochs"] == 3
    best = max(summary, key=lambda row: float(row["eval_top1"]))
    details = json.loads((tmp_path / "it/best/config.json").read_text(encoding="utf-8"))["stvit"]
    assert f"after epoch {int(best['epoch']) + 1}" in details["weights"]
    assert details["metrics"][0]["value"] == pytest.approx(float(best["eval_top1"]))
    # The same command again has nothing to do. Fewer epochs than are done are an error.
    assert train_cls.main([*flags, "--epochs=3"]) == 0
    assert "is finished: 3 epochs are done" in capsys.readouterr().out
    assert train_cls.main([*flags, "--epochs=2"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"--epochs 2: {tmp_path / 'it'} has already done 3 epochs; pass --epochs 3 or more" in line


@pytest.mark.long
def test_a_run_in_the_middle_is_extended_and_shortened(
    digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*SHORT, f"--data-dir={digits_folder}", f"--output={tmp_path}", "--experiment=it", "--warmup-epochs=0"]
    assert train_cls.main([*flags, "--epochs=2"]) == 0
    end = tmp_path / "it/checkpoints/00002-00000000.pt"
    end.unlink()  # now 1 epoch and 2 of 3 updates are done
    capsys.readouterr()
    assert train_cls.main([*flags, "--epochs=1"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "has already done 1 epochs and 2 updates; pass --epochs 2 or more" in line
    assert train_cls.main([*flags, "--epochs=3"]) == 0
    assert "extending the run from 2 to 3 epochs" in capsys.readouterr().out
    assert len(rows(tmp_path / "it")) == 3
    # Three epochs were planned. Now the run stopped at the end of the second, and four are planned.
    state = load_checkpoint(tmp_path / "it/checkpoints/00003-00000000.pt")
    assert state["recipe"]["epochs"] == 3
    for path in (tmp_path / "it/checkpoints").glob("00003*.pt"):
        path.unlink()
    for path in (tmp_path / "it/checkpoints").glob("*.pt"):
        assert path.name == "00002-00000002.pt"
    assert train_cls.main([*flags, "--epochs=4"]) == 0
    assert "extending the run from 3 to 4 epochs" in capsys.readouterr().out


def test_auto_names_the_shorter_run(digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run without a name is not extended, because it may be one of several."""
    flags = [*SHORT, f"--data-dir={digits_folder}", f"--output={tmp_path}"]
    assert train_cls.main([*flags, "--epochs=1"]) == 0
    (run,) = tmp_path.iterdir()
    capsys.readouterr()
    assert train_cls.main([*flags, "--epochs=2", "--experiment=second"]) == 0
    assert "is the same run" not in capsys.readouterr().out
    shutil.rmtree(tmp_path / "second")
    assert train_cls.main([*flags, "--epochs=2"]) in (0, 1)  # 1 if both runs began in the same second
    assert f"{run} is the same run with --epochs 1; to change its epochs, pass --experiment {run.name}" in (
        capsys.readouterr().out
    )


def test_auto_takes_no_run_on_other_images(
    digits_folder: Path, own_digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    flags = [*SHORT, f"--output={runs}"]
    assert train_cls.main([*flags, f"--data-dir={digits_folder}", "--experiment=one"]) == 0
    assert train_cls.main([*flags, f"--data-dir={own_digits_folder}"]) == 0
    assert "resuming" not in capsys.readouterr().out
    # With its name the run is found even if the images have moved, but they must be the same.
    assert train_cls.main([*flags, f"--data-dir={own_digits_folder}", "--experiment=one"]) == 0
    assert "is finished: 2 epochs are done" in capsys.readouterr().out
    next((own_digits_folder / "train").rglob("*.png")).unlink()
    assert train_cls.main([*flags, f"--data-dir={own_digits_folder}", "--experiment=one"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "training images (60, now 59 in all): of class " in line


def test_auto_does_not_repeat_a_finished_run(
    digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run is found without its name, from another folder and by a relative data path."""
    flags = [*SHORT, f"--output={tmp_path / 'runs'}"]
    assert train_cls.main([*flags, f"--data-dir={digits_folder}"]) == 0
    capsys.readouterr()
    monkeypatch.chdir(digits_folder.parent)
    assert train_cls.main([*flags, f"--data-dir={digits_folder.name}"]) == 0
    assert "is finished: 2 epochs are done" in capsys.readouterr().out
    assert len(list((tmp_path / "runs").iterdir())) == 1


def test_resume_by_the_bare_name_of_a_checkpoint(
    digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*SHORT, f"--data-dir={digits_folder}", f"--output={tmp_path}", "--experiment=it"]
    assert train_cls.main(flags) == 0
    checkpoints = tmp_path / "it/checkpoints"
    middle, end = Checkpoints(checkpoints).paths()
    end.unlink()
    monkeypatch.chdir(checkpoints)
    assert train_cls.main([*flags, f"--resume={middle.name}"]) == 0
    assert end.exists() and not (checkpoints / "checkpoints").exists() and not (checkpoints / "last").exists()
    moved = tmp_path / middle.name
    shutil.copy(middle, moved)
    assert train_cls.main([*flags, f"--resume={moved}"]) == 1
    assert "must be in the folder checkpoints/ of its run" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04"])
def test_files_that_are_not_checkpoints(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(CommandError, match="is damaged"):
        load_checkpoint(tmp_path / "a.pt")


def test_checkpoint_runs_no_code(tmp_path: Path) -> None:
    """A pickle may name any function to call. This one would end the process."""

    class Evil:
        def __reduce__(self) -> tuple[Any, Sequence[Any]]:
            return os._exit, (7,)

    torch.save({"progress": Evil()}, tmp_path / "a.pt")
    with pytest.raises(CommandError, match="is damaged"):
        load_checkpoint(tmp_path / "a.pt")

"""Tests hostile and broken datasets.

The tests cover programs, pipes, changing archives, and lost processes.
"""

import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from stvit.tools import train_cls, validate_cls
from stvit.tools.common import data
from stvit.tools.common.bad_images import BadImages
from stvit.tools.common.cli import CommandError, OneProcessError
from stvit.tools.common.data import ImageDataset
from stvit.tools.common.image_folders import ImageTar
from stvit.tools.common.signals import StopNow, StopRequest
from tests.test_data import KINDS, as_shards
from tests.test_runs import as_torch_folder, children, first, open_of

SHORT = "--model=test_stvit --img-size=32 --epochs=1 --batch-size=20 --workers=0 --lr=1e-3 --experiment=it".split()
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")


def fails(capsys: pytest.CaptureFixture[str], *flags: str, command: Callable[[list[str]], int] = train_cls.main) -> str:
    """Runs a command, which must fail, and returns its only error line."""
    capsys.readouterr()
    try:
        status = command([*(SHORT if command is train_cls.main else []), *flags])
    except SystemExit as error:
        status = int(str(error.code))
    assert status in (1, 2)
    err = capsys.readouterr().err
    lines = [line for line in err.replace("\r", "\n").splitlines() if "error: " in line]
    assert len(lines) == 1 and "unexpected" not in err and "Traceback" not in err, err
    return lines[0]


# ---------------------------------------------------------------------------------------------------------------------
# Programs


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns a file that appears when one of these programs starts."""
    marker = tmp_path / "started"
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("gs", "curl", "gsutil", "ais"):
        (folder / name).write_text(f"#!/bin/sh\necho {name} >> {marker}\nexit 1\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return marker


def test_pillow_starts_ghostscript(marker: Path) -> None:
    """Pillow starts Ghostscript for the file that the next test uses."""
    with pytest.raises(Exception, match=r".*"):
        Image.open(io.BytesIO(POSTSCRIPT)).load()
    assert marker.exists()


@pytest.mark.parametrize("kind", [*KINDS, "torch"])
def test_postscript_never_reaches_ghostscript(
    kind: str, own_digits_folder: Path, tmp_path: Path, marker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in own_digits_folder.rglob("*.png"):
        path.write_bytes(POSTSCRIPT)
    (tmp_path / "made").mkdir()
    flags = KINDS.get(kind, as_torch_folder)(own_digits_folder, tmp_path / "made")
    line = fails(capsys, *flags, f"--output={tmp_path}")
    assert "cannot read image" in line and "not an image of a supported format" in line
    assert not marker.exists()


def test_an_image_that_a_set_opened_itself(marker: Path) -> None:
    image = Image.open(io.BytesIO(POSTSCRIPT))
    with pytest.raises(OneProcessError, match="not an image of a supported format"):
        ImageDataset([(image, 0)], "RGB").read(0)
    assert not marker.exists()


ADDRESSES = [
    "pipe:touch {marker}; cat x",
    "http://127.0.0.1:9",
    "s3://bucket",
    "gs://bucket",
    "ais://bucket",
    "hf://a/b",
]


@pytest.mark.parametrize("address", [*ADDRESSES, "hdfs://bucket", "PIPE:touch {marker}", " pipe:touch {marker}"])
def test_a_recipe_starts_no_program(
    address: str, marker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"dataset": "wds/x", "data_dir": address.format(marker=marker), "num_classes": 4}))
    line = fails(capsys, f"--config={recipe}")
    assert "webdataset runs a program" in line and "--allow-shard-commands on the command line" in line
    assert not marker.exists()


@pytest.mark.parametrize("split", ["--train-split", "--val-split"])
def test_a_description_of_shards_starts_no_program(
    split: str, digits_folder: Path, marker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shard names in _info.json or in the flag of the split cannot run programs either."""
    (tmp_path / "made").mkdir()
    flags = as_shards(digits_folder, tmp_path / "made")
    path = tmp_path / "made/_info.json"
    info = json.loads(path.read_text())
    info["splits"]["train"]["filenames"] = [f"pipe:touch {marker}", f"../{{a,pipe:touch {marker}}}.tar"]
    path.write_text(json.dumps(info))
    assert "does not exist" in fails(capsys, *flags)
    assert "no data; pass --data-dir" in fails(capsys, "--dataset=wds/x", "--data-dir=", "--num-classes=4")
    line = fails(capsys, *flags, f"{split}=a-0.tar::pipe:touch {marker} .tar|60")
    assert "does not exist" in line and not marker.exists()


def test_the_command_line_allows_programs(
    digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    as_shards(digits_folder, tmp_path)
    # webdataset appends file names to the folder. Here they become arguments of a command.
    flags = ["--dataset=wds/x", f"--data-dir=pipe:cd {tmp_path}; touch ran; cat .", "--num-classes=4"]
    output = f"--output={tmp_path / 'runs'}"
    fails(capsys, *flags, output)
    assert not (tmp_path / "ran").exists()
    assert train_cls.main([*SHORT, *flags, output, "--allow-shard-commands"]) == 0
    assert (tmp_path / "ran").exists()
    # Neither the recipe that the run wrote nor another recipe can allow programs.
    assert "allow_shard_commands" not in (tmp_path / "runs/it/config.yaml").read_text()
    line = fails(capsys, f"--config={tmp_path / 'runs/it/config.yaml'}", "--experiment=again")
    assert "webdataset runs a program" in line
    for text in ("allow_shard_commands: true", "allow-changed-data: true"):
        (tmp_path / "recipe.yaml").write_text(text)
        line = fails(capsys, f"--config={tmp_path / 'recipe.yaml'}")
        assert "must be decided by whoever runs the recipe" in line
    for text in ("mean: ['--allow-shard-commands']", "model_kwargs: {'--allow-shard-commands ': 1}"):
        (tmp_path / "recipe.yaml").write_text(text)
        assert "recipe.yaml: m" in fails(capsys, f"--config={tmp_path / 'recipe.yaml'}")


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_samples", "60"), ("num_samples", -1), ("filenames", [1]), ("shard_lengths", ["30"]), ("filenames", 7)],
)
def test_wrong_descriptions_of_shards(
    key: str, value: object, digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = as_shards(digits_folder, tmp_path)
    info = json.loads((tmp_path / "_info.json").read_text())
    info["splits"]["train"][key] = value
    (tmp_path / "_info.json").write_text(json.dumps(info))
    assert re.search("the description of the shards|cannot open the train images", fails(capsys, *flags))


def test_releases_of_datasets_that_run_code_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(data, "version", lambda _: "3.6.0")
    assert "hfds/ needs datasets 4 or later, found 3.6.0" in fails(capsys, f"--dataset=hfds/{tmp_path}")


class Evil:
    """Writes a file when it is unpickled without checks."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("import pathlib; pathlib.Path('unpickled').touch()",)


@pytest.mark.parametrize(
    "arguments",
    [
        {"checkpoint_path": "evil.pth"},
        {"pretrained_cfg": {"file": "evil.pth"}},
        {"pretrained_cfg": {"file": "evil.npz", "custom_load": True}},
        {"act_layer": "__import__('pathlib').Path('unpickled').touch()"},
    ],
)
def test_arguments_of_the_model_run_no_code(
    arguments: dict[str, Any],
    digits_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("evil.pth", "evil.npz"):
        torch.save({"state_dict": Evil()}, tmp_path / name)
    (tmp_path / "recipe.yaml").write_text(json.dumps({"model_kwargs": arguments, "data_dir": str(digits_folder)}))
    fails(capsys, f"--config={tmp_path / 'recipe.yaml'}", "--pretrained")
    assert not (tmp_path / "unpickled").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Pipes


def test_pipes_do_not_block(own_digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    folder = f"--data-dir={own_digits_folder}"
    assert f"cannot read --config {pipe}: not a regular file" in fails(capsys, f"--config={pipe}")
    assert f"cannot read weights from {pipe}: it is not a file" in fails(capsys, folder, f"--pretrained-path={pipe}")
    assert "not a folder" in fails(capsys, f"--data-dir={pipe}")
    # A link to a pipe among the images counts as an image.
    (first(own_digits_folder / "train/digit_1")).unlink()
    (own_digits_folder / "train/digit_1/pipe.png").symlink_to(pipe)
    line = fails(capsys, folder, f"--output={tmp_path}", "--batch-size=60")
    assert "pipe.png: not a regular file" in line
    # A pipe instead of an archive, a shard, and a description of shards.
    (tmp_path / "tar").mkdir()
    os.mkfifo(tmp_path / "tar/train.tar")
    assert "tar/train.tar is not a regular file" in fails(capsys, f"--data-dir={tmp_path / 'tar'}")
    (tmp_path / "tar/train.tar").rename(tmp_path / "tar/train")
    assert "tar/train is not a folder" in fails(capsys, f"--data-dir={tmp_path / 'tar'}")
    (tmp_path / "wds").mkdir()
    flags = as_shards(own_digits_folder, tmp_path / "wds")
    for name in ("train-000001.tar", "_info.json"):
        (tmp_path / "wds" / name).unlink()
        os.mkfifo(tmp_path / "wds" / name)
        assert f"{name} is not a regular file" in fails(capsys, *flags)


def test_a_pipe_that_a_table_names(tmp_path: Path) -> None:
    """A Parquet file may contain the path of an image instead of its bytes."""
    import datasets

    os.mkfifo(tmp_path / "pipe.png")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"image": [{"bytes": None, "path": str(tmp_path / "pipe.png")}, None], "label": [0, 1]}
    for split in ("train", "validation"):
        (tmp_path / "set").mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / f"set/{split}-00000-of-00001.parquet")
    flags = ["--in-chans=3", f"--dataset=hfds/{tmp_path / 'set'}", f"--data-dir={tmp_path / 'cache'}"]
    images = open_of(*flags)
    for index, problem in enumerate(["pipe.png: not a regular file", "number 1: empty"]):
        with pytest.raises(OneProcessError, match=problem):
            images.val.read(index)


def test_pipes_in_evaluation(digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert train_cls.main([*SHORT, f"--data-dir={digits_folder}", f"--output={tmp_path}"]) == 0
    flags = [f"--checkpoint={tmp_path / 'it'}", f"--data-dir={digits_folder}", "--workers=0"]
    line = fails(capsys, *flags, f"--class-map={pipe}", command=validate_cls.main)
    assert f"cannot read --class-map {pipe}: not a regular file" in line
    line = fails(capsys, *flags, f"--real-labels={pipe}", command=validate_cls.main)
    assert f"cannot read --real-labels {pipe}: it is not a file" in line


@pytest.mark.long
def test_a_signal_ends_a_run_that_waits_for_images(digits_folder: Path, tmp_path: Path) -> None:
    """Shards become pipes during the run, so that a loader worker waits forever."""
    flags = [*as_shards(digits_folder, tmp_path), f"--output={tmp_path}", "--epochs=1000", "--workers=1"]
    command = [sys.executable, "-m", "stvit.tools.train_cls", *SHORT, *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_for_checkpoint(process, tmp_path)
        pipes = [tmp_path / f"train-00000{i}.tar" for i in range(2)]
        for path in pipes:
            os.mkfifo(path.with_suffix(".new"))
            path.with_suffix(".new").replace(path)
        writer = wait_for_reader(process, pipes)  # the worker waits for data
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=120)
        os.close(writer)
    finally:
        process.kill()
    assert process.returncode == 143
    assert re.match(r"terminated; saved after epoch \d+, update 0 of 3: to continue", err.splitlines()[-1]), err
    assert "Traceback" not in err


def wait_for_checkpoint(process: subprocess.Popen[str], folder: Path) -> None:
    while not list(folder.glob("it/checkpoints/*.pt")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def wait_for_reader(process: subprocess.Popen[str], pipes: list[Path]) -> int:
    """Waits until a process reads a pipe.

    Returns a descriptor that keeps the process waiting.
    """
    while True:
        assert process.poll() is None
        for path in pipes:
            try:
                return os.open(path, os.O_WRONLY | os.O_NONBLOCK)
            except OSError:  # no process has opened the pipe yet
                time.sleep(0.01)


def test_a_signal_ends_the_preparation_at_once() -> None:
    with StopRequest() as stop:
        with pytest.raises(StopNow), stop.at_once():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(60)
            except Exception:  # like code that reads untrusted images
                pytest.fail("the signal was taken for an error")
        assert stop.signum == signal.SIGTERM
        with pytest.raises(StopNow), stop.at_once():
            pytest.fail("the signal was forgotten")
        with stop.at_once(is_on=False):
            os.kill(os.getpid(), signal.SIGTERM)
    with StopRequest() as stop, stop.at_once(patience=60.0):
        os.kill(os.getpid(), signal.SIGTERM)  # the block may end by itself


# ---------------------------------------------------------------------------------------------------------------------
# Archives


@pytest.fixture
def archive(own_digits_folder: Path, tmp_path: Path) -> Path:
    (tmp_path / "made").mkdir()
    KINDS["tar"](own_digits_folder, tmp_path / "made")
    return tmp_path / "made/val.tar"


def test_archives_cut_anywhere(archive: Path) -> None:
    whole = archive.read_bytes()
    assert len(ImageTar(archive)) == 20
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512  # end of the last image
    for size in range(0, end + 1, 512):
        archive.write_bytes(whole[:size])
        with pytest.raises(CommandError, match=r"cannot read the archive .*: copy it again, or recreate it"):
            ImageTar(archive)


# Sizes in tar headers: negative (one leads back to its own header), too large, not a number.
SIZES = (b"\xff" * 12, b"\xff" * 10 + b"\xfe\0", b"\x80" + b"\xff" * 11, b"-0000001000\0", b"77777777777\0")


def test_archives_with_a_damaged_index(archive: Path) -> None:
    """Each header gets each of the wrong sizes."""
    whole = archive.read_bytes()
    with tarfile.open(archive) as tar:
        members = tar.getmembers()
    # Headers of images, and the extended headers before them.
    for offset in sorted({place for member in members for place in (member.offset, member.offset_data - 512)}):
        for size in SIZES:
            header = bytearray(whole[offset : offset + 512])
            header[124:136] = size
            header[148:156] = b" " * 8
            header[148:156] = b"%06o\0 " % sum(header)  # a correct checksum
            archive.write_bytes(whole[:offset] + header + whole[offset + 512 :])
            with pytest.raises(CommandError, match="cannot read the archive"):
                ImageTar(archive)


def test_archives_within_archives_without_end(tmp_path: Path) -> None:
    content = b""
    for depth in range(300):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as tar:
            member = tarfile.TarInfo(f"{depth}.tar")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        content = file.getvalue()
    (tmp_path / "train.tar").write_bytes(content)
    with pytest.raises(CommandError, match=r"archive .*train\.tar"):
        ImageTar(tmp_path / "train.tar")


@pytest.mark.parametrize("change", ["cut", "replaced", "removed", "a pipe", "written to"])
def test_archives_that_change_during_the_run(change: str, archive: Path, tmp_path: Path) -> None:
    images = open_of("--in-chans=3", f"--data-dir={archive.parent}")
    images.val.bad_images = BadImages(1000, tmp_path / "bad_images.jsonl")
    assert images.val.read(0)[0] is not None
    content = archive.read_bytes()
    if change == "cut":
        os.truncate(archive, 5000)
    elif change == "written to":
        archive.write_bytes(bytes(len(content)))
        os.utime(archive, ns=(0, 0))
    else:
        archive.unlink()
        if change == "a pipe":
            os.mkfifo(archive)
        elif change == "replaced":
            archive.write_bytes(content + bytes(512))
    with pytest.raises(OneProcessError, match=r"was changed while it was in use|any more"):
        images.val.read(19)
    assert not images.val.bad_images.names()  # the error does not concern one image


# ---------------------------------------------------------------------------------------------------------------------
# Memory


@pytest.mark.long
def test_a_killed_loader_is_named(digits_folder: Path, tmp_path: Path) -> None:
    """The system kills a worker like this when memory is full."""
    flags = [f"--data-dir={digits_folder}", f"--output={tmp_path}", "--epochs=1000", "--workers=1"]
    command = [sys.executable, "-m", "stvit.tools.train_cls", *SHORT, *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_for_checkpoint(process, tmp_path)
        pid = children(process.pid)[0]
        os.kill(pid, signal.SIGKILL)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 1
    (line,) = [line for line in err.replace("\r", "\n").splitlines() if "error: " in line]
    assert re.match(rf"error: image loading lost worker process {pid}( \(Killed\))?: most likely the system", line)
    assert "--workers" in line and "--resume auto" in line and "Traceback" not in err


def test_an_image_of_169_megapixels(
    own_digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = first(own_digits_folder / "train/digit_1")
    Image.new("1", (13_000, 13_000)).save(path)
    line = fails(capsys, f"--data-dir={own_digits_folder}", f"--output={tmp_path}", "--batch-size=60")
    assert f"cannot read image {path}: 13000x13000 pixels, more than the limit of 134 million" in line
    (tmp_path / "wds").mkdir()
    flags = as_shards(own_digits_folder, tmp_path / "wds")
    line = fails(capsys, *flags, f"--output={tmp_path}")
    assert "13000x13000 pixels, more than the limit of 134 million" in line

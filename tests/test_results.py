"""Tests the folders of results (--output)."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from stvit.tools import (
    predict_det,
    predict_seg,
    train_cls,
    train_det,
    train_seg,
    validate_cls,
    validate_det,
    validate_seg,
    visualize,
)
from stvit.tools.common.cli import CommandError
from stvit.tools.common.results import check_output, open_results

PREDICT = pytest.mark.parametrize("command", [predict_det, predict_seg])


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder photos/ with a.jpg and b.jpg, in the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (8, 8)).save(f"photos/{name}")
    return Path("photos")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(command: Any, *flags: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Returns the error of a command that changes no file. Its checkpoint does not exist, so it is not opened."""
    before = contents(Path.cwd())
    assert command.main([*flags, "--checkpoint=nowhere"]) == 1
    assert contents(Path.cwd()) == before
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("command", [predict_det, predict_seg, visualize])
def test_the_folder_of_the_images_is_refused(command: Any, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(command, "photos", "--output=photos/../photos", capsys=capsys)
    assert line.startswith("error: --output photos/../photos is the folder of the images; choose another folder")


@pytest.mark.parametrize(
    ("command", "image", "flags", "kept"),
    [
        (predict_seg, "photos", "--output=.", "labels/a.png"),
        (predict_seg, "photos", "--output=.", "overlays/b.png"),
        (predict_det, "photos", "--output=other", "other/a.jpg"),
        (predict_det, "photos", "--output=other", "other/detections.json"),
        (predict_det, "photos", "--output=photos/sub", "photos/sub/a.jpg"),
        (predict_det, "photos/a.jpg", "--output=photos", "photos/a.jpg"),
    ],
)
def test_files_of_the_user_are_kept(
    command: Any, image: str, flags: str, kept: str, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(kept).parent.mkdir(exist_ok=True)
    Path(kept).write_bytes(Path("photos/a.jpg").read_bytes())
    line = refusal(command, image, flags, capsys=capsys)
    assert f"{kept} would be overwritten, but this command did not write it" in line


@pytest.mark.parametrize(
    ("command", "image", "flags", "words"),
    [
        (
            predict_det,
            "photos",
            "--output=photos/sub",
            "--output photos/sub is in photos and has images, such as c.png",
        ),
        (predict_seg, "photos/labels", "--output=photos", "labels/c.png would be among the images in photos/labels"),
    ],
)
def test_results_are_not_among_the_images(
    command: Any, image: str, flags: str, words: str, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, name in (("sub", "c.png"), ("labels", "c.jpg")):
        (photos / folder).mkdir()
        Image.new("RGB", (8, 8)).save(photos / folder / name)
    assert words in refusal(command, image, flags, capsys=capsys)


@PREDICT
@pytest.mark.parametrize("flag", ["--output=train.json", "--output=train.json/sub"])
def test_a_file_as_output_is_refused_before_the_model_is_opened(
    command: Any, flag: str, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("train.json").write_text("{}")
    line = refusal(command, "photos", flag, capsys=capsys)
    assert "train.json is not a folder; choose another --output" in line


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        (train_cls, ["--model=test_stvit", "--data-dir=photos"]),
        (train_det, ["--data-dir=photos"]),
        (train_seg, ["--data-dir=photos"]),
        (validate_det, ["--checkpoint=nowhere"]),
        (validate_seg, ["--checkpoint=nowhere"]),
        (visualize, ["photos"]),
    ],
)
def test_other_commands_refuse_a_file_as_output_first(
    command: Any, flags: list[str], photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("train.json").write_text("{}")
    assert command.main([*flags, "--output=train.json"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: cannot write to --output train.json") and line.endswith("choose another --output")


@pytest.mark.parametrize(
    ("command", "name"),
    [(validate_cls, "confusion.png"), (validate_det, "detections.json"), (validate_seg, "per_class.csv")],
)
def test_evaluations_keep_files_of_the_user(
    command: Any, name: str, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / name).write_text("mine")
    line = refusal(command, "--data-dir=photos", "--output=photos", capsys=capsys)
    assert f"photos/{name} exists and would be overwritten; choose another --output" in line


def write(text: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(text)


def test_own_files_are_replaced_until_they_are_changed(photos: Path) -> None:
    names = ["labels/a.png", "b.json"]
    for text in ("first", "second"):
        with open_results(Path("out"), names, photos) as results:
            results.write("labels/a.png", write(text))
            results.write("b.json", write(text))
            with pytest.raises(CommandError, match="another process"), open_results(Path("out"), names, photos):
                pass
    assert Path("out/labels/a.png").read_text() == "second"
    Path("out/labels/a.png").write_text("corrected")
    with (
        pytest.raises(CommandError, match=r"labels/a\.png would be overwritten"),
        open_results(Path("out"), names, photos),
    ):
        pass
    with open_results(Path("out"), ["b.json"], photos) as results:
        results.write("b.json", write("third"))
    assert Path("out/labels/a.png").read_text() == "corrected"


def test_results_inside_the_images_are_found_again(photos: Path) -> None:
    """The folder of earlier results is not one of the user's images."""
    for _ in range(2):
        with open_results(photos / "predictions", ["a.jpg"], photos) as results:
            results.write("a.jpg", lambda path: Image.new("RGB", (8, 8)).save(path, format="JPEG"))


def test_a_killed_command_leaves_its_files_replaceable(photos: Path) -> None:
    """The list of written files ends in an incomplete line."""
    with open_results(Path("out"), ["a", "b"], photos) as results:
        results.write("a", write("one"))
    with Path("out/.stvit.written").open("a") as file:
        file.write('["b", 1')
    with open_results(Path("out"), ["a", "b"], photos) as results:
        results.write("a", write("two"))
    assert Path("out/a").read_text() == "two"


def test_nothing_is_left_behind_without_results(photos: Path) -> None:
    with pytest.raises(ZeroDivisionError), open_results(Path("out"), ["a"], photos):
        raise ZeroDivisionError
    check_output(Path("new/runs"))
    assert {path.name for path in Path().iterdir()} == {"photos"}


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc, where no folder can be created")
def test_a_folder_that_cannot_be_created(photos: Path) -> None:
    with pytest.raises(CommandError, match=r"cannot write to --output /proc/x: .*; choose another --output"):
        check_output(Path("/proc/x"))
    with (
        pytest.raises(CommandError, match=r"cannot write to --output /proc/x: .*; choose another --output"),
        open_results(Path("/proc/x"), ["a"], photos),
    ):
        pass

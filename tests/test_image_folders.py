"""Tests supported formats, ignored files and class numbers of image folders.

Also tests archives.
"""

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from ultralytics.utils import ASSETS

from stvit.images import SUFFIXES
from stvit.tools import train_cls, validate_cls, visualize
from stvit.tools.common.bad_images import BadImages
from stvit.tools.common.cli import CommandError
from stvit.tools.common.config import ClassificationConfig
from stvit.tools.common.data import Images, open_images
from stvit.tools.common.distributed import Distributed
from stvit.tools.common.image_folders import ImageFolder, ImageTar, find_image_files
from stvit.tools.common.loaders import create_val_loader

CPU = Distributed(torch.device("cpu"))
CLASSES = ["class2", "class10"]  # in natural order
# Files in folders of other programs.
FOREIGN = [
    ".git/config.png",
    ".ipynb_checkpoints/0-checkpoint.png",
    "class2/.ipynb_checkpoints/0-checkpoint.png",
    "class2/@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg",
    "class10/.thumbnails/0.jpg",
    "__MACOSX/class2/._0.png",
    "lost+found/0.png",
    "$RECYCLE.BIN/0.png",
    "System Volume Information/0.png",
]
OTHERS = ["class2/._0.png", "class2/Thumbs.db", "class10/.DS_Store", "class2/notes.txt", "readme.md", "class10/a.heic"]


def image(number: int, side: int = 16) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def write_split(folder: Path) -> list[str]:
    """Writes an image with each suffix in each class, in lower and upper case.

    Returns their paths.
    """
    names = []
    for number, name in enumerate(f"{kind}/{suffix[1:]}{suffix}" for kind in CLASSES for suffix in SUFFIXES):
        for path in (folder / name, folder / f"{name[:-4]}{name[-4:].upper()}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            image(number).save(path)
            names.append(path.relative_to(folder).as_posix())
    return names


def add_foreign(folder: Path) -> None:
    for name in FOREIGN + OTHERS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"not an image")


def pack(folder: Path, archive: Path, prefix: str = "") -> None:
    with tarfile.open(archive, "w") as tar:
        for path in sorted(folder.rglob("*")):
            tar.add(path, f"{prefix}{path.relative_to(folder)}", recursive=False)


def open_packed(folder: Path, prefix: str = "") -> ImageTar:
    archive = folder.parent / f"{len(list(folder.parent.iterdir()))}.tar"
    pack(folder, archive, prefix)
    return ImageTar(archive)


SOURCES: dict[str, Callable[[Path], ImageFolder | ImageTar]] = {
    "folder": ImageFolder,
    "tar": open_packed,
    "tar of .": lambda folder: open_packed(folder, "./"),
    "tar of the folder": lambda folder: open_packed(folder, "data/train/"),
}


@pytest.mark.parametrize("kind", list(SOURCES))
def test_every_format_and_nothing_else(kind: str, tmp_path: Path) -> None:
    names = write_split(tmp_path / "in")
    assert len(names) == 2 * 2 * len(SUFFIXES) and len(SUFFIXES) == 8
    clean = SOURCES[kind](tmp_path / "in")
    assert clean.ignored.describe("in") is None
    add_foreign(tmp_path / "in")
    source = SOURCES[kind](tmp_path / "in")
    for each in (clean, source):
        assert each.class_to_idx == {"class2": 0, "class10": 1}
        found = [each.filename(i).removeprefix("data/train/") for i in range(len(each))]
        assert sorted(found) == sorted(names)
        for name, (file, target) in zip(found, map(each.__getitem__, range(len(each))), strict=True):
            content = Path(file).read_bytes() if isinstance(file, str) else file.read()
            assert content == (tmp_path / "in" / name).read_bytes() and CLASSES[target] == name.split("/")[0]
    said = source.ignored.describe("in")
    assert said is not None and said.replace("data/train/", "") == (
        "ignored in in: 6 files that are hidden or not images (class2/._0.png, class2/notes.txt, class2/Thumbs.db, …), "
        "9 hidden folders or folders of other programs ($RECYCLE.BIN, .git, .ipynb_checkpoints, …)"
    )
    assert len(source.ignored.files) == len(OTHERS)


def test_commands_list_ignored_files_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Training and validation count all images, and list the ignored files once."""
    for split in ("train", "val"):
        count = len(write_split(tmp_path / split))
    (tmp_path / "train/class2/.ipynb_checkpoints").mkdir()
    shutil.copy(tmp_path / "train/class2/png.png", tmp_path / "train/class2/.ipynb_checkpoints/png-checkpoint.png")
    (tmp_path / "val/class2/Thumbs.db").write_bytes(b"")
    flags = [f"--data-dir={tmp_path}", "--workers=0"]
    more = ["--model=test_stvit", "--img-size=32", "--epochs=1", "--batch-size=16", f"--output={tmp_path}"]
    assert train_cls.main([*flags, *more, "--experiment=run"]) == 0
    printed = capsys.readouterr().out.splitlines()
    train = f"ignored in {tmp_path / 'train'}: 1 hidden folder or folder of another program (class2/.ipynb_checkpoints)"
    val = f"ignored in {tmp_path / 'val'}: 1 file that is hidden or not an image (class2/Thumbs.db)"
    assert [line for line in printed if line.startswith("ignored")] == [train, val]
    assert any(f"2 classes, {count} training and {count} validation images" in line for line in printed)
    assert validate_cls.main([*flags, f"--checkpoint={tmp_path / 'run'}"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if line.startswith("ignored")] == [val]
    assert any(f"{count} images" in line for line in printed)


def test_visualize_ignores_folders_of_other_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.TIF", "sub/b.gif", ".ipynb_checkpoints/a-checkpoint.png", "sub/@eaDir/b.png", "sub/._b.gif"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        image(0).save(tmp_path / "in" / name)
    out = tmp_path / "out"
    flags = ["--model=test_stvit", "--no-pretrained", "--stage=0", f"--output={out}"]
    assert visualize.main([str(tmp_path / "in"), *flags]) == 0
    assert {path.parent.relative_to(out).as_posix() for path in out.rglob("stage0.png")} == {"a", "sub/b"}
    said = capsys.readouterr().out.splitlines()
    assert said[0] == (
        f"ignored in {tmp_path / 'in'}: 1 file that is hidden or not an image (sub/._b.gif), 2 hidden folders or "
        "folders of other programs (.ipynb_checkpoints, sub/@eaDir)"
    )


def config_of(*flags: str) -> ClassificationConfig:
    return train_cls.parse_args(["--workers=0", *flags])


def open_of(*flags: str) -> Images:
    return open_images(config_of(*flags).data, CPU)


def read_all(flags: list[str]) -> list[bytes]:
    """Returns the pixels of the validation images, in order."""
    data = config_of(*flags).data
    images = open_images(data, CPU)
    data_config = {
        "input_size": (3, 16, 16), "mean": (0.0,) * 3, "std": (1.0,) * 3, "interpolation": "nearest", "crop_pct": 1.0,
        "crop_mode": "center",
    }  # fmt: skip
    found = []
    for x, target in create_val_loader(images.val, data, data_config, CPU):
        assert (target >= 0).all()
        found += [(each * 255).round().byte().permute(1, 2, 0).numpy().tobytes() for each in x]
    return found


def write_shards(folder: Path, splits: dict[str, list[tuple[str, bytes, int]]]) -> list[str]:
    """Writes a shard of each split, from suffixes, contents and class numbers.

    Returns the flags to open them.
    """
    info = {}
    for split, files in splits.items():
        with tarfile.open(folder / f"{split}.tar", "w") as tar:
            for number, (suffix, content, target) in enumerate(files):
                companion = f"._{number}{suffix}", b"\0\5\x16\7"  # as macOS writes it
                for name, value in (companion, (f"{number}{suffix}", content), (f"{number}.cls", str(target).encode())):
                    member = tarfile.TarInfo(f"images/{name}")
                    member.size = len(value)
                    tar.addfile(member, io.BytesIO(value))
        shards = {"filenames": [f"{split}.tar"], "shard_lengths": [len(files)]}
        info[split] = {"name": split, "num_samples": len(files), **shards}
    (folder / "_info.json").write_text(json.dumps({"splits": info}))
    return ["--dataset=wds/it", f"--data-dir={folder}", "--num-classes=2"]


KINDS = ["folder", "tar", "torch/image_folder", "hfds", "wds"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_set_gives_the_same_pixels(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind of dataset handles 16 bits, orientation and transparency."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    gray = np.arange(256, dtype=np.uint8).reshape(16, 16)
    deep = Image.fromarray(gray.astype(np.uint16) << 8)
    turned = Image.Exif()
    turned[0x0112] = 3
    clear = image(0)
    clear.putalpha(0)
    for split in ("train", "val"):
        for name in ("digit_0", "digit_1"):
            (tmp_path / split / name).mkdir(parents=True)
        deep.save(tmp_path / split / "digit_0/000.png")
        image(1).save(tmp_path / split / "digit_1/001.png", exif=turned)
        clear.save(tmp_path / split / "digit_1/002.png")
    white = np.full((16, 16, 3), 255, np.uint8)
    expected = [np.repeat(gray[..., None], 3, axis=2), np.array(image(1))[::-1, ::-1], white]
    made = tmp_path / "made"
    made.mkdir()
    flags = [f"--data-dir={tmp_path}"]
    if kind == "tar":
        for split in ("train", "val"):
            pack(tmp_path / split, made / f"{split}.tar")
        flags = [f"--data-dir={made}"]
    elif kind == "torch/image_folder":
        flags.append(f"--dataset={kind}")
        add_foreign(tmp_path / "val")
        for name in ("class2", "class10"):
            shutil.rmtree(tmp_path / "val" / name)
    elif kind == "hfds":
        shutil.copytree(tmp_path / "train", made / "train")
        shutil.copytree(tmp_path / "val", made / "validation")
        flags = [f"--dataset=hfds/{made}", f"--data-dir={tmp_path / 'cache'}"]
    elif kind == "wds":
        paths = sorted((tmp_path / "val").rglob("*.png"))
        files = [(".png", path.read_bytes(), int(path.parent.name[-1])) for path in paths]
        flags = write_shards(made, {"train": files, "validation": files})
    assert sorted(read_all(flags)) == sorted(pixels.tobytes() for pixels in expected)


def test_shards_with_every_format(tmp_path: Path) -> None:
    files = []
    for number, suffix in enumerate(SUFFIXES):
        file = io.BytesIO()
        image(number).save(file, format=Image.registered_extensions()[suffix])
        files.append((suffix.upper(), file.getvalue(), 0))
    found = read_all(write_shards(tmp_path, {"train": files, "validation": files}))
    assert len(found) == len(SUFFIXES) and image(4).tobytes() in found


@pytest.mark.parametrize("kind", ["folder", "tar"])
@pytest.mark.parametrize("limit", [0, 2])
def test_float_and_damaged_images_follow_the_rule(kind: str, limit: int, tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_split(tmp_path / split)
    Image.fromarray(np.zeros((8, 8), np.float32)).save(tmp_path / "val/class2/tif.tif")
    (tmp_path / "val/class10/bmp.bmp").write_bytes(b"BM")
    data = tmp_path
    if kind == "tar":
        data = tmp_path / "made"
        data.mkdir()
        for split in ("train", "val"):
            pack(tmp_path / split, data / f"{split}.tar")
    images = open_of(f"--data-dir={data}")
    log = tmp_path / "bad_images.jsonl"
    images.val.bad_images = BadImages(limit, log)
    names = [images.val.name(i) for i in range(len(images.val))]
    bad = [next(i for i, name in enumerate(names) if name.endswith(end)) for end in ("s2/tif.tif", "s10/bmp.bmp")]
    if limit == 0:
        words = [r"tif\.tif: floating point pixels.*convert the image to 8 or 16 bits", r"bmp\.bmp: damaged, truncated"]
        for number, message in zip(bad, words, strict=True):
            with pytest.raises(CommandError, match=f"cannot read image .*{message}.*--max-bad-images"):
                images.val.read(number)
    else:
        assert [images.val.read(number) for number in bad] == [(None, -1)] * 2
        assert images.val.bad_images.names() == {names[number] for number in bad}
        assert all(images.val.read(i)[0] is not None for i in range(len(names)) if i not in bad)


def test_special_files_and_links(tmp_path: Path) -> None:
    """Pipes and links to parent folders are ignored. A broken link is a bad image."""
    image(0).save(tmp_path / "kept.png")
    root = tmp_path / "in"
    (root / "class2").mkdir(parents=True)
    image(1).save(root / "class2/own.png")
    os.mkfifo(root / "class2/pipe.png")
    (root / "class2/link.png").symlink_to(tmp_path / "kept.png")
    (root / "class2/broken.png").symlink_to(tmp_path / "missing.png")
    (root / "class2/loop").symlink_to(root)
    (root / "class10").symlink_to(root / "class2")
    found, ignored = find_image_files(root)
    names = ["broken.png", "link.png", "own.png"]
    assert found == [f"class2/{name}" for name in names] + [f"class10/{name}" for name in names]
    assert set(ignored.files) == {"class2/pipe.png", "class10/pipe.png"}
    assert set(ignored.folders) == {"class2/loop", "class10/loop"}


def test_classes_with_one_natural_key_keep_their_numbers(tmp_path: Path) -> None:
    """timm orders such names like a Python set, which differs between processes."""
    names = ["a01", "a1", "A1", "a001", "A01", "b²", "²"]
    for name in names:
        (tmp_path / name).mkdir()
        image(0).save(tmp_path / name / "1.png")
    expected = ["A01", "A1", "a001", "a01", "a1", "b²", "²"]
    assert list(ImageFolder(tmp_path).class_to_idx) == expected


def test_archives_within_an_archive_and_second_names(tmp_path: Path) -> None:
    """ImageNet's training archive contains an archive for each class.

    Hard links are images, too.
    """
    for number, name in enumerate(CLASSES):
        folder = tmp_path / "in" / name
        folder.mkdir(parents=True)
        image(number).save(folder / "one.png")
        os.link(folder / "one.png", folder / "two.png")
        (folder / "three.png").symlink_to("one.png")
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            for path in sorted(folder.iterdir()):
                tar.add(path, path.name)
            tar.add(folder / "one.png", "._one.png")
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for name in CLASSES:
            tar.add(tmp_path / f"{name}.tar", f"{name}.tar")
    source = ImageTar(tmp_path / "train.tar")
    assert source.class_to_idx == {"class2": 0, "class10": 1}
    assert [source.filename(i) for i in range(len(source))] == [
        f"{name}/{file}.png" for name in CLASSES for file in ("one", "three", "two")
    ]
    for i in range(6):
        file, target = source[i]
        assert target == i // 3 and np.array_equal(np.array(Image.open(file)), np.array(image(target)))
    assert source.ignored.files == ["class2/._one.png", "class10/._one.png"]


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([], "train.tar: no images; it must contain"),
        (["a/1.heic"], r"no images \(ignored in .*: 1 file that is hidden or not an image \(a/1\.heic\)\)"),
        (["1.png"], "image 1.png is in no folder; it must contain <class>/*"),
        (["a/1.png", "a/b/1.png"], "a/1.png and a/b/1.png are in folders of different depth"),
    ],
)
def test_archives_that_are_refused(members: list[str], words: str, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for name in members:
            tar.addfile(tarfile.TarInfo(name))
    with pytest.raises(CommandError, match=words):
        ImageTar(tmp_path / "train.tar")


def test_damaged_and_compressed_archives_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "train.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for name in ("bus.jpg", "zidane.jpg"):
            tar.add(ASSETS / name, f"class2/{name}")
    whole = (tmp_path / "train.tar").read_bytes()
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as tar:
        tar.add(ASSETS / "bus.jpg", "class2/bus.jpg")
    damaged = bytearray(whole)
    second = whole.index(b"class2/zidane.jpg")
    damaged[second : second + 512] = bytes(range(256)) * 2  # tarfile treats it as the end
    for content in (whole[:20_000], b"", b"x" * 3000, bytes(damaged), (tmp_path / "packed.tar").read_bytes()):
        (tmp_path / "train.tar").write_bytes(content)
        with pytest.raises(CommandError, match=r"cannot read the archive .*a complete, uncompressed tar file"):
            ImageTar(tmp_path / "train.tar")


def test_the_split_is_found_by_its_synonyms(tmp_path: Path) -> None:
    for split in ("training", "valid"):
        write_split(tmp_path / split)
    images = open_of(f"--data-dir={tmp_path}", "--val-split=val")
    assert (len(images.train), len(images.val)) == (32, 32) and images.class_names == CLASSES
    with pytest.raises(CommandError, match="has no folder for --val-split test; it must contain"):
        open_of(f"--data-dir={tmp_path}", "--val-split=test")


@pytest.mark.parametrize("suffix", [".tar.gz", ".zip"])
def test_compressed_archives_are_refused_by_name(suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"train{suffix}").write_bytes(b"")
    said = f"train{suffix} is compressed.* unpack it .* or make it an uncompressed train.tar"
    with pytest.raises(CommandError, match=said):
        open_of(f"--data-dir={tmp_path}", "--val-split=val")

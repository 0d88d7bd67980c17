"""Tests image datasets: each kind, unreadable images, and reproducible batches."""

import csv
import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import stvit
from stvit.tools import train_cls
from stvit.tools.common.bad_images import BadImages
from stvit.tools.common.cli import CommandError
from stvit.tools.common.data import open_images
from stvit.tools.common.distributed import Distributed
from stvit.tools.common.examples import ResumableBatchSampler
from stvit.tools.common.loaders import TrainLoader
from tests.hub_server import REPOSITORY, serve

# Numbers of two training images and one validation image in `digits_folder`.
BAD = (3, 17, 70)
SHORT = "--model=test_stvit --img-size=32 --epochs=2 --batch-size=20 --workers=0 --lr=1e-3 --experiment=it".split()


def spoil(folder: Path) -> list[Path]:
    """Truncates the bad images."""
    paths = [path for number in BAD for path in folder.rglob(f"{number:03d}.png")]
    for path in paths:
        path.write_bytes(path.read_bytes()[:60])
    assert len(paths) == len(BAD)
    return paths


def as_folder(folder: Path, _: Path) -> list[str]:
    return [f"--data-dir={folder}"]


def as_tar(folder: Path, target: Path) -> list[str]:
    for split in ("train", "val"):
        with tarfile.open(target / f"{split}.tar", "w") as tar:
            for path in sorted((folder / split).rglob("*.png")):
                tar.add(path, path.relative_to(folder / split))
    return [f"--data-dir={target}"]


def as_shards(folder: Path, target: Path) -> list[str]:
    """Writes two shards of each split, with the description that timm expects."""
    info: dict[str, dict[str, object]] = {}
    for split, name in (("train", "train"), ("val", "validation")):
        paths = sorted((folder / split).rglob("*.png"))
        shards = {f"{name}-{i:06d}.tar": paths[i::2] for i in range(2)}
        for shard, held in shards.items():
            with tarfile.open(target / shard, "w") as tar:
                for path in held:
                    tar.add(path, path.name)
                    label = path.parent.name.removeprefix("digit_").encode()
                    member = tarfile.TarInfo(f"{path.stem}.cls")
                    member.size = len(label)
                    tar.addfile(member, io.BytesIO(label))
        info[name] = {
            "name": name,
            "num_samples": len(paths),
            "filenames": list(shards),
            "shard_lengths": [len(held) for held in shards.values()],
        }
    (target / "_info.json").write_text(json.dumps({"splits": info}))
    return ["--dataset=wds/digits", f"--data-dir={target}", "--num-classes=4", "--workers=1"]


def as_parquet(folder: Path, target: Path) -> list[str]:
    """Writes Parquet files like those on the Hub.

    The columns are the image, as bytes and name, and the class label.
    """
    import datasets

    names = [f"digit_{i}" for i in range(4)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    for split, name in (("train", "train"), ("val", "validation")):
        paths = sorted((folder / split).rglob("*.png"))
        rows = {
            "image": [{"bytes": path.read_bytes(), "path": path.name} for path in paths],
            "label": [names.index(path.parent.name) for path in paths],
        }
        (target / "set").mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows, features).to_parquet(target / f"set/{name}-00000-of-00001.parquet")
    return [f"--dataset=hfds/{target / 'set'}", f"--data-dir={target / 'cache'}"]


KINDS: dict[str, Callable[[Path, Path], list[str]]] = {
    "folder": as_folder,
    "tar": as_tar,
    "wds": as_shards,
    "parquet": as_parquet,
}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")


def read_bad(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "bad_images.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", list(KINDS))
def test_bad_images_are_skipped_counted_and_named(
    kind: str, own_digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(own_digits_folder)
    (tmp_path / "made").mkdir()
    flags = [*SHORT, *KINDS[kind](own_digits_folder, tmp_path / "made"), f"--output={tmp_path}"]

    # By default the first bad image ends the run, and the error names it.
    assert train_cls.main(flags) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "error: cannot read image" in error and "--max-bad-images" in error
    assert any(f"{number:03d}" in error for number in BAD)

    # The third one exceeds the limit of two.
    assert train_cls.main([*flags, "--max-bad-images=2", "--experiment=two"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "2 others were skipped" in error and "and --max-bad-images is 2" in error

    # A resumed run may change the limit.
    assert train_cls.main([*flags, "--max-bad-images=3", "--experiment=two", "--resume=auto"]) == 0
    printed = capsys.readouterr()
    log = tmp_path / "two/bad_images.jsonl"
    assert f"3 images could not be read and were skipped: {log}" in printed.out
    named = read_bad(tmp_path / "two")
    assert len(named) == 3 and all(entry["reason"] for entry in named)
    assert all(any(f"{number:03d}" in entry["image"] for entry in named) for number in BAD)

    # Only the 19 readable validation images count.
    with (tmp_path / "two/summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2
    for row in rows:
        right = float(row["eval_top1"]) * 19 / 100
        assert right == pytest.approx(round(right), abs=1e-6)


@pytest.mark.parametrize("kind", list(KINDS))
def test_whole_images_of_each_kind(kind: str, digits_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    flags = [*SHORT, *KINDS[kind](digits_folder, tmp_path / "made"), f"--output={tmp_path}"]
    assert train_cls.main(flags) == 0
    config = json.loads((tmp_path / "it/best/config.json").read_text())
    assert config["num_classes"] == 4
    if kind != "wds":  # shards have no class names
        assert config["label_names"] == [f"digit_{i}" for i in range(4)]
    assert not (tmp_path / "it/bad_images.jsonl").exists()


@pytest.mark.long
def test_hub_dataset_in_a_process_of_its_own(digits_folder: Path, tmp_path: Path) -> None:
    as_parquet(digits_folder, tmp_path)
    flags = [*SHORT, f"--dataset=hfds/{REPOSITORY}", f"--output={tmp_path}"]
    with serve(tmp_path / "set", tmp_path / "home") as env:
        command = [sys.executable, "-m", "stvit.tools.train_cls", *flags]
        result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "4 classes, 60 training and 20 validation images" in result.stdout
    config = json.loads((tmp_path / "it/best/config.json").read_text())
    assert config["label_names"] == [f"digit_{i}" for i in range(4)]


def test_incomplete_line_in_the_log_of_bad_images(tmp_path: Path) -> None:
    """An incomplete line, left by a full disk, does not count and is removed."""
    log = tmp_path / "bad_images.jsonl"
    bad_images = BadImages(3, log)
    bad_images.add("a", "empty")
    log.write_text(log.read_text() + '{"image": "b')
    assert bad_images.names() == {"a"}
    bad_images.add("c", "empty")
    assert bad_images.names() == {"a", "c"} and len(log.read_text().splitlines()) == 2


@pytest.mark.parametrize("text", ["no JSON\n", "[]\n", "{}\n", "\xff\n"])
def test_damaged_log_of_bad_images(text: str, tmp_path: Path) -> None:
    """The log may be downloaded with a run from an unknown author."""
    log = tmp_path / "bad_images.jsonl"
    log.write_text(text, encoding="latin-1")
    with pytest.raises(CommandError, match=r"is damaged .*remove it to count the images again"):
        BadImages(3, log).add("a", "empty")


def test_only_bad_images(own_digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Many unreadable images in a row are an error, as when a disk is disconnected."""
    for path in (own_digits_folder / "train").rglob("*.png"):
        path.write_bytes(b"")
    flags = [*SHORT, f"--data-dir={own_digits_folder}", f"--output={tmp_path}", "--max-bad-images=1000"]
    assert train_cls.main(flags) == 1
    assert "10 images in a row cannot be read" in capsys.readouterr().err.splitlines()[-1]


def test_no_validation_image_can_be_read(
    own_digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (own_digits_folder / "val").rglob("*.png"):
        path.write_bytes(b"")
    flags = [*SHORT, f"--data-dir={own_digits_folder}", f"--output={tmp_path}", "--max-bad-images=1000"]
    assert train_cls.main(flags) == 1
    assert "no readable image in the validation set" in capsys.readouterr().err.splitlines()[-1]


def test_shard_that_is_cut_short(digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*SHORT, *as_shards(digits_folder, tmp_path), f"--output={tmp_path}", "--max-bad-images=1000"]
    shard = tmp_path / "train-000001.tar"
    shard.write_bytes(shard.read_bytes()[:5000])
    assert train_cls.main(flags) == 1
    assert "error: cannot read a shard" in capsys.readouterr().err.splitlines()[-1]


# Reproducible batches


def loader(folder: Path, *flags: str) -> TrainLoader:
    line = [*SHORT, f"--data-dir={folder}", "--batch-size=8", "--in-chans=1", "--color-jitter=0.4", *flags]
    config = train_cls.parse_args(line)
    distributed = Distributed(torch.device("cpu"))
    data_config = {
        "input_size": (1, 32, 32), "mean": (0.5,), "std": (0.5,), "interpolation": "bicubic", "crop_pct": 1.0,
        "crop_mode": "center",
    }  # fmt: skip
    images = open_images(config.data, distributed, in_chans=1, seed=config.run.seed).train
    return TrainLoader(images, config.data, config.augment, data_config, distributed, seed=config.run.seed)


def test_samples_depend_only_on_seed_epoch_and_position(digits_folder: Path) -> None:
    batches = list(loader(digits_folder).epoch(3))
    assert len(batches) == 7
    for other in (
        list(loader(digits_folder, "--workers=2").epoch(3)),
        [*list(loader(digits_folder).epoch(3))[:4], *loader(digits_folder).epoch(3, first_step=4)],
    ):
        for (image, target), (wanted, labels) in zip(other, batches, strict=True):
            assert torch.equal(image, wanted) and torch.equal(target, labels)
    for other in (list(loader(digits_folder, "--seed=7").epoch(3)), list(loader(digits_folder).epoch(4))):
        assert not torch.equal(other[0][0], batches[0][0])


@pytest.mark.parametrize("kind", ["tar", "wds"])
def test_resumed_within_an_epoch(kind: str, digits_folder: Path, tmp_path: Path) -> None:
    """A run resumes in the middle of a tar and of shards.

    Shards are read from their beginning.
    """
    (tmp_path / "made").mkdir()
    flags = [*SHORT, *KINDS[kind](digits_folder, tmp_path / "made"), f"--output={tmp_path}", "--batch-size=10"]
    flags += ["--checkpoint-steps=2", "--resume=auto"]
    assert train_cls.main(flags) == 0
    whole = {path: path.read_bytes() for path in [tmp_path / "it/summary.csv", *tmp_path.glob("it/*/*.safetensors")]}
    middle, end = sorted((tmp_path / "it/checkpoints").glob("*.pt"))
    assert middle.name == "00001-00000004.pt"
    end.unlink()
    for path in whole:
        path.unlink()
    assert train_cls.main(flags) == 0
    assert [path.name for path, content in whole.items() if path.exists() and path.read_bytes() != content] == []
    assert (tmp_path / "it/last/model.safetensors").exists()


def test_batches_of_groups() -> None:
    """An update has images of one group, except for those that are left over."""
    groups = [index % 3 == 0 for index in range(100)]  # 34 and 66 images
    sampler = ResumableBatchSampler(100, 4, Distributed(torch.device("cpu")), accum_steps=2, groups=groups)
    batches = list(sampler)
    assert len(batches) == sampler.steps == 24
    mixed = [len({groups[index] for _, _, index in batch}) > 1 for batch in batches]
    assert sum(mixed) <= 2  # one update, from 2 + 2 images that are left over
    assert [place for batch in batches for _, place, _ in batch] == list(range(96))
    assert len({index for batch in batches for _, _, index in batch}) == 96
    kinds = [groups[batch[0][2]] for batch in batches[::2]]
    assert kinds != sorted(kinds) and kinds != sorted(kinds, reverse=True)  # in random order
    shares = [
        list(ResumableBatchSampler(100, 4, Distributed(torch.device("cpu"), rank, 2), groups=groups))
        for rank in range(2)
    ]
    for first, second, one, two in zip(batches[::2], batches[1::2], *shares, strict=True):
        assert sorted(first + second) == sorted(one + two)
    sampler.first_step = 5
    assert list(sampler) == batches[5:]


def test_repeated_augmentation_gives_different_views(digits_folder: Path) -> None:
    plain = ResumableBatchSampler(60, 12, Distributed(torch.device("cpu")))
    repeated = ResumableBatchSampler(60, 12, Distributed(torch.device("cpu")), repeats=3)
    assert len(plain) == len(repeated) == 5
    assert sorted(index for batch in plain for _, _, index in batch) == list(range(60))
    indices = [index for batch in repeated for _, _, index in batch]
    assert indices[0::3] == indices[1::3] == indices[2::3] and len(set(indices)) == 20
    images = next(iter(loader(digits_folder, "--aug-repeats=3").epoch(0)))[0]
    assert not torch.equal(images[0], images[1])
    # Each process gets one view of an image.
    shares = [
        list(ResumableBatchSampler(60, 4, Distributed(torch.device("cpu"), rank, 3), repeats=3)) for rank in range(3)
    ]
    assert [[index for _, _, index in batch] for batch in shares[0]] == [
        [index for _, _, index in batch] for batch in shares[1]
    ]


def test_an_update_does_not_depend_on_processes_and_steps() -> None:
    """An update has the same images for any number of processes and steps."""
    one = list(ResumableBatchSampler(100, 24, Distributed(torch.device("cpu"))))
    shares = [list(ResumableBatchSampler(100, 8, Distributed(torch.device("cpu"), rank, 3))) for rank in range(3)]
    steps = list(ResumableBatchSampler(100, 6, Distributed(torch.device("cpu")), accum_steps=4))
    assert len(one) == len(shares[0]) == len(steps) // 4 == 4
    for update, batch in enumerate(one):
        assert sorted(key for share in shares for key in share[update]) == sorted(batch)
        assert [key for step in steps[4 * update : 4 * update + 4] for key in step] == batch


def test_a_stream_that_ends_within_an_update_leaves_no_gradients(own_digits_folder: Path, tmp_path: Path) -> None:
    """Gradients of an incomplete update do not enter the next epoch."""
    (tmp_path / "made").mkdir()
    flags = as_shards(own_digits_folder, tmp_path / "made")
    info = json.loads((tmp_path / "made/_info.json").read_text())
    # Two workers share one shard. The second has no images, so the stream ends after half of its length.
    info["splits"]["train"] |= {"filenames": ["train-000000.tar"], "shard_lengths": [60]}
    (tmp_path / "made/_info.json").write_text(json.dumps(info))
    held: list[bool] = []

    def note(module: torch.nn.Module, _: object) -> None:
        if isinstance(module, stvit.STViT) and module.training:
            held.append(any(parameter.grad is not None for parameter in module.parameters()))

    hook = torch.nn.modules.module.register_module_forward_pre_hook(note)
    try:
        more = ["--batch-size=10", "--workers=2", "--grad-accum-steps=2", f"--output={tmp_path}"]
        assert train_cls.main([*SHORT, *flags, *more]) == 0
    finally:
        hook.remove()
    # Each of the two epochs has one update of two batches, and one batch of an incomplete update.
    assert held == 2 * [False, True, False]

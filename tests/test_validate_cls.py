"""Compares tools/validate_cls.py with the training and direct computations."""

import argparse
import csv
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.stats import binomtest
from torchvision import transforms
from torchvision.datasets import ImageFolder

from stvit.tools import train_cls, validate_cls
from stvit.tools.common import validation
from stvit.tools.common.evaluation import confidence_interval
from tests.golden.fill import draw
from tests.hub_server import REPOSITORY, serve
from tests.torchrun import torchrun

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def run_folder(digits_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory in which the EMA weights differ clearly from the weights."""
    output = tmp_path_factory.mktemp("runs")
    flags = "--model=test_stvit --img-size=32 --in-chans=1 --epochs=4 --batch-size=10 --workers=0 --lr=3e-3"
    more = f"--warmup-epochs=0 --model-ema --model-ema-decay=0.97 --output={output} --experiment=it"
    assert train_cls.main([*flags.split(), *more.split(), f"--data-dir={digits_folder}"]) == 0
    return output / "it"


@pytest.fixture
def validate(digits_folder: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Returns a function that runs the command and returns its results."""

    def validate(*flags: str, data: Path = digits_folder) -> dict[str, Any]:
        output = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
        common = [f"--data-dir={data}", f"--output={output}", "--workers=0", "--batch-size=7"]
        assert validate_cls.main([*common, *flags]) == 0
        results: dict[str, Any] = json.loads((output / "results.json").read_text())
        return results | {"folder": output}

    return validate


def refused(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    capsys.readouterr()
    assert validate_cls.main(["--workers=0", *flags]) == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return err.splitlines()[-1]


def last_row(run_folder: Path) -> dict[str, float]:
    with (run_folder / "summary.csv").open(newline="") as file:
        return {key: float(value) for key, value in list(csv.DictReader(file))[-1].items()}


def reference(
    model: torch.nn.Module, folder: Path, resize: int, size: int, mode: str, mean: Any, std: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns logits and class numbers, with images prepared by torchvision."""
    gray = [transforms.Grayscale()] if mode == "L" else []
    pipeline = [
        *gray,
        transforms.Resize(resize, transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(size),
        transforms.ToTensor(),
        transforms.Normalize(mean, std),
    ]
    images = ImageFolder(str(folder), transforms.Compose(pipeline))
    x, y = zip(*images, strict=True)
    with torch.no_grad():
        return model.eval()(torch.stack(x)), torch.tensor(y)


# Checkpoints


def test_every_form_of_our_checkpoints(run_folder: Path, validate: Callable[..., dict[str, Any]]) -> None:
    row = last_row(run_folder)
    assert row["eval_loss"] != pytest.approx(row["ema_loss"], rel=1e-3)
    newest = sorted((run_folder / "checkpoints").glob("*.pt"))[-1]
    for flags, kind in (
        ([f"--checkpoint={run_folder / 'last'}"], "eval"),
        ([f"--checkpoint=local-dir:{run_folder / 'last'}"], "eval"),
        ([f"--checkpoint={run_folder / 'last/model.safetensors'}"], "eval"),
        ([f"--checkpoint={run_folder / 'last_ema'}"], "ema"),
        ([f"--checkpoint={newest}"], "ema"),
        ([f"--checkpoint={newest}", "--use-ema"], "ema"),
        ([f"--checkpoint={newest}", "--no-use-ema"], "eval"),
    ):
        results = validate(*flags)
        for name in ("loss", "top1", "top5"):
            assert results[name] == pytest.approx(row[f"{kind}_{name}"], rel=1e-6), flags
        assert results["images"] == 20 and results["images_per_second"] > 0
        assert results["ema"] == (kind == "ema" and newest.name in flags[0])
        assert results["input_size"] == [1, 32, 32]

    with (run_folder / "summary.csv").open(newline="") as file:
        best = max(max(float(row["eval_top1"]), float(row["ema_top1"])) for row in csv.DictReader(file))
    assert validate(f"--checkpoint={run_folder}")["top1"] == pytest.approx(best)


@pytest.mark.long
def test_official_weights_and_crop(
    digits_folder: Path, tmp_path: Path, validate: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Compares a checkpoint in the authors' format with a direct computation.

    torchvision prepares the images as the paper describes.
    """
    keys = json.loads((ROOT / "tests/golden/official_keys.json").read_text())["stvit_small"]
    weights = {key: torch.from_numpy(draw(key, tuple(shape))) for key, shape in keys.items()}
    other = {key: torch.zeros_like(value) for key, value in weights.items()}
    content = {"model": weights, "model_ema": other, "args": argparse.Namespace(lr=1.0), "epoch": 3}
    torch.save(content, tmp_path / "official.pth")
    names = [f"digit_{i}" for i in range(4)]
    (tmp_path / "names.txt").write_text("\n".join([*(f"other {i}" for i in range(996)), *names]))

    flags = [f"--checkpoint={tmp_path / 'official.pth'}", "--model=stvit_small", "--no-use-ema", "--official-crop"]
    results = validate(*flags, f"--class-map={tmp_path / 'names.txt'}")
    assert "at 224 pixels (crop 0.875, bicubic)" in capsys.readouterr().out

    model = timm.create_model("stvit_small", pretrained=True, pretrained_cfg_overlay={"state_dict": weights})
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    logits, target = reference(model, digits_folder / "val", 256, 224, "RGB", mean, std)
    target = target + 996
    wanted = torch.nn.functional.cross_entropy(logits, target).item()
    assert results["loss"] == pytest.approx(wanted, rel=1e-4)
    top = logits.topk(5).indices == target[:, None]
    assert results["top1"] == pytest.approx(100 * top[:, 0].float().mean().item())
    assert results["top5"] == pytest.approx(100 * top.any(1).float().mean().item())
    assert not (results["folder"] / "confusion.png").exists()  # not drawn for 1000 classes

    # At 384 pixels the crop has the whole short side, also if the model's configuration has another crop.
    parsed = validate_cls.parse_args(["--official-crop", "--img-size=384"])
    config = validation._resolve_data_config(vars(parsed.image), model, parsed.image.official_crop)
    assert (config["crop_pct"], config["interpolation"], config["input_size"]) == (1.0, "bicubic", (3, 384, 384))


def test_official_file_without_ema(digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "a.pth")
    flags = [f"--checkpoint={tmp_path / 'a.pth'}", "--model=stvit_small", f"--data-dir={digits_folder}"]
    assert "has no EMA weights; remove --use-ema" in refused(capsys, *flags, "--use-ema")
    assert "missing key" in refused(capsys, *flags)


@pytest.mark.long
def test_hub_id_in_a_new_process(run_folder: Path, digits_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools/validate_cls.py"), f"--data-dir={digits_folder}", "--workers=0"]
    with serve(run_folder / "last", tmp_path / "home") as env:
        options: dict[str, Any] = {"env": env, "capture_output": True, "text": True, "timeout": 300}
        result = subprocess.run(
            [*command, f"--checkpoint=hf-hub:{REPOSITORY}", f"--output={tmp_path / 'out'}"], **options
        )
        missing = subprocess.run([*command, "--checkpoint=hf-hub:someone/else"], **options)
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["loss"] == pytest.approx(last_row(run_folder)["eval_loss"], rel=1e-6)
    assert missing.returncode == 1 and "Traceback" not in missing.stderr
    assert "cannot load the pretrained weights of the Hub repository someone/else" in missing.stderr.splitlines()[-1]


# Results


def test_results_equal_a_direct_computation(
    run_folder: Path, digits_folder: Path, validate: Callable[..., dict[str, Any]]
) -> None:
    results = validate(f"--checkpoint={run_folder / 'last'}")
    model = timm.create_model(f"local-dir:{run_folder / 'last'}", pretrained=True)
    config = model.pretrained_cfg
    logits, target = reference(model, digits_folder / "val", 36, 32, "L", config["mean"], config["std"])
    right = logits.argmax(1) == target
    assert results["top1"] == pytest.approx(100 * right.float().mean().item())
    with (results["folder"] / "per_class.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [f"digit_{i}" for i in range(4)]
    for number, row in enumerate(rows):
        assert int(row["images"]) == int((target == number).sum())
        assert float(row["top1"]) == pytest.approx(100 * right[target == number].float().mean().item(), abs=1e-3)
    with Image.open(results["folder"] / "confusion.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 300


@pytest.mark.parametrize(("correct", "images"), [(0, 7), (7, 7), (3, 7), (8360, 10000), (1, 50000)])
def test_confidence_interval(correct: int, images: int) -> None:
    wanted = binomtest(correct, images).proportion_ci(0.95, method="wilson")
    assert confidence_interval(correct, images) == pytest.approx((wanted.low, wanted.high), abs=1e-7)


def test_real_labels(
    run_folder: Path, own_digits_folder: Path, tmp_path: Path, validate: Callable[..., dict[str, Any]]
) -> None:
    """An image may have several labels or none. Images without labels do not count.

    One of the images is unreadable.
    """
    paths = sorted((own_digits_folder / "val").rglob("*.png"))
    for number, path in enumerate(paths):
        path.rename(path.with_name(f"ILSVRC2012_val_{number + 1:08d}.JPEG"))
    paths = sorted((own_digits_folder / "val").rglob("*.JPEG"))
    model = timm.create_model(f"local-dir:{run_folder / 'last'}", pretrained=True)
    config = model.pretrained_cfg
    logits, _ = reference(model, own_digits_folder / "val", 36, 32, "L", config["mean"], config["std"])
    predicted = logits.argmax(1).tolist()
    right = 0
    by_name: dict[str, list[int]] = {}
    for number, path in enumerate(paths):
        choices = {0: [], 1: [predicted[number], (predicted[number] + 1) % 4], 2: [(predicted[number] + 1) % 4]}
        by_name[path.name] = choices[number % 3]
        right += number % 3 == 1 and number != 4
    labels = [by_name[name] for name in sorted(by_name)]
    (tmp_path / "real.json").write_text(json.dumps(labels))
    paths[4].write_bytes(b"")  # an image with a correct prediction
    counted = sum(1 for number in range(len(paths)) if number % 3 and number != 4)

    results = validate(
        f"--checkpoint={run_folder / 'last'}",
        f"--real-labels={tmp_path / 'real.json'}",
        "--max-bad-images=1",
        data=own_digits_folder,
    )
    assert results["real_images"] == counted and results["images"] == 19 and results["skipped"] == 1
    assert results["real_top1"] == pytest.approx(100 * right / counted)
    assert results["real_top5"] == pytest.approx(100.0)  # the top 5 contain all four classes


@pytest.mark.long
def test_several_processes_count_the_same(
    run_folder: Path, own_digits_folder: Path, tmp_path: Path, validate: Callable[..., dict[str, Any]]
) -> None:
    bad = sorted((own_digits_folder / "val").rglob("*.png"))[7]
    bad.write_bytes(b"")
    flags = [f"--checkpoint={run_folder}", "--max-bad-images=1"]
    one = validate(*flags, data=own_digits_folder)
    command = [*torchrun(3), "-m", "stvit.tools.validate_cls", *flags, f"--data-dir={own_digits_folder}"]
    output = tmp_path / "three"
    result = subprocess.run(
        [*command, "--workers=1", "--batch-size=4", f"--output={output}"], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert sum("top-1" in line for line in result.stdout.splitlines()) == 1
    assert f"{bad} cannot be read" in result.stderr
    three = json.loads((output / "results.json").read_text())
    for name in ("images", "top1", "top5", "skipped"):
        assert three[name] == one[name]
    assert three["loss"] == pytest.approx(one["loss"], rel=1e-5) and three["images"] == 19
    assert (output / "per_class.csv").read_text() == (one["folder"] / "per_class.csv").read_text()


def test_classes_are_matched_by_name(run_folder: Path, tmp_path: Path, validate: Callable[..., dict[str, Any]]) -> None:
    """The classes of the model and the folders have different orders."""
    folder = Path(shutil.copytree(run_folder / "last", tmp_path / "reversed"))
    weights = load_file(folder / "model.safetensors")
    for key in ("head.fc.weight", "head.fc.bias"):
        weights[key] = weights[key].flip(0).contiguous()
    save_file(weights, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["label_names"] = config["label_names"][::-1]
    (folder / "config.json").write_text(json.dumps(config))
    wanted, results = validate(f"--checkpoint={run_folder / 'last'}"), validate(f"--checkpoint={folder}")
    assert results["top1"] == wanted["top1"] and results["loss"] == pytest.approx(wanted["loss"], rel=1e-6)


@pytest.mark.parametrize("flags", [["--amp"], ["--model-dtype=bfloat16"], ["--channels-last"]], ids=str)
def test_precision_and_memory_format(
    flags: list[str], run_folder: Path, validate: Callable[..., dict[str, Any]]
) -> None:
    wanted = validate(f"--checkpoint={run_folder / 'last'}")
    results = validate(f"--checkpoint={run_folder / 'last'}", *flags)
    assert results["loss"] == pytest.approx(wanted["loss"], rel=1e-5 if flags == ["--channels-last"] else 0.05)


# Errors


def test_errors_are_one_line(
    run_folder: Path, digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, last = f"--data-dir={digits_folder}", f"--checkpoint={run_folder / 'last'}"
    weights = f"--checkpoint={tmp_path / 'w.pth'}"
    torch.save(load_file(run_folder / "last/model.safetensors"), tmp_path / "w.pth")
    for flags, said in (
        ([data], "no model; pass --checkpoint"),
        ([last], "no data; pass --data-dir"),
        ([data, "--checkpoint=org/name"], "named 'org/name'; for a model on the Hub, pass hf-hub:org/name"),
        ([data, f"--checkpoint={tmp_path}"], f"no config.json in {tmp_path} or {tmp_path / 'best'}"),
        ([data, weights], "does not name its model; pass --model"),
        ([data, weights, "--model=test_stvti"], "unknown model 'test_stvti', did you mean test_stvit"),
        ([data, weights, "--model=stvit_small"], "mismatches; these are weights of test_stvit"),
        ([data, weights, "--model=test_stvit", "--in-chans=1", "--num-classes=5"], "the weights have 4 classes"),
        ([data, last, "--model=stvit_small"], "last, which is a test_stvit; remove --model"),
        ([data, last, "--use-ema"], "are for a file of weights; remove the flag"),
        ([data, last, "--official-crop", "--crop-pct=0.9"], "remove --crop-pct and --interpolation"),
        ([data, last, "--real-labels"], "expected the 50,000 validation images of ImageNet, got 20"),
        ([data, last, "--class-map=nowhere.txt"], "--class-map nowhere.txt does not exist"),
        ([data, "--model=stvit_small"], "of the Hub repository stvit/stvit_small.in1k (revision main): offline"),
        ([data, "--model=test_stvit"], "test_stvit: no pretrained weights of this model are published"),
        ([f"--data-dir={tmp_path}", last], "has no folder for --val-split validation"),
    ):
        assert said in refused(capsys, *flags), flags
    (tmp_path / "names.txt").write_text("a\nb\n")
    assert "has 2 class names, but the model has 4 classes" in refused(
        capsys, data, last, f"--class-map={tmp_path / 'names.txt'}"
    )


def test_images_of_other_classes(run_folder: Path, own_digits_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [f"--checkpoint={run_folder / 'last'}", f"--data-dir={own_digits_folder}"]
    shutil.rmtree(own_digits_folder / "val/digit_3")
    assert validate_cls.main(["--workers=0", *flags]) == 0  # three of the model's four classes
    (own_digits_folder / "val/digit_2").rename(own_digits_folder / "val/two")
    assert "the model has no class 'two', which is in the dataset" in refused(capsys, *flags)


def test_unreadable_image(run_folder: Path, own_digits_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = sorted((own_digits_folder / "val").rglob("*.png"))[3]
    bad.write_bytes(b"")
    line = refused(capsys, f"--checkpoint={run_folder}", f"--data-dir={own_digits_folder}")
    assert f"cannot read image {bad}" in line


def test_results_are_never_overwritten(
    run_folder: Path, digits_folder: Path, validate: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = validate(f"--checkpoint={run_folder}")["folder"]
    line = refused(capsys, f"--checkpoint={run_folder}", f"--data-dir={digits_folder}", f"--output={folder}")
    assert "already has results of another evaluation; choose another --output" in line


def test_code_of_a_checkpoint_is_not_run(
    digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.mkdir, (str(tmp_path / "harm"),)

    flags = ["--model=test_stvit", f"--data-dir={digits_folder}", f"--checkpoint={tmp_path / 'evil.pth'}"]
    torch.save({"model": Evil()}, tmp_path / "evil.pth")
    assert "cannot read weights from" in refused(capsys, *flags)
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Evil()))
    assert "cannot read weights from" in refused(capsys, *flags)
    assert not (tmp_path / "harm").exists()


# Unusual names of classes and files


def with_class(folder: Path, name: bytes) -> Path:
    """Renames a class in both splits and returns the folder.

    The name need not be valid UTF-8.
    """
    for split in (b"train", b"val"):
        place = os.fsencode(folder) + b"/" + split + b"/"
        os.rename(place + b"digit_0", place + name)
    return folder


@pytest.mark.parametrize("name", ["$a__b$", "$", r"$\frac{", "a\nb", "犬", "_" * 200])
def test_unusual_class_names(
    name: str, own_digits_folder: Path, run_folder: Path, validate: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Matplotlib treats text between dollar signs as a formula."""
    data = with_class(own_digits_folder, name.encode())
    map_file = own_digits_folder / "names.txt"
    map_file.write_text("\n".join([name, "digit_1", "digit_2", "digit_3"]))
    flags = [f"--checkpoint={run_folder}"]
    if "\n" not in name:
        flags.append(f"--class-map={map_file}")
        results = validate(*flags, data=data)
        assert name in (results["folder"] / "per_class.csv").read_text()
        with Image.open(results["folder"] / "confusion.png") as picture:
            assert picture.width > 500
    confusion = torch.eye(2, dtype=torch.int64)
    assert validation.draw_confusion(confusion, [name, "b"], own_digits_folder / "a.png")
    assert "warning" not in capsys.readouterr().err


def test_a_failed_plot_is_a_warning(
    run_folder: Path, validate: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from matplotlib.figure import Figure

    def savefig(*_: object, **__: object) -> None:
        raise ValueError("a font is missing")

    monkeypatch.setattr(Figure, "savefig", savefig)
    results = validate(f"--checkpoint={run_folder}")
    assert results["images"] == 20 and (results["folder"] / "per_class.csv").exists()
    assert not list(results["folder"].glob("confusion*"))
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"warning: cannot draw {results['folder'] / 'confusion.png'}: a font is missing"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_names_that_are_not_utf8(
    own_digits_folder: Path, run_folder: Path, validate: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Image names may be invalid UTF-8.

    Class names must be valid, because results contain them.
    """
    train = [*"--model=test_stvit --img-size=32 --epochs=1 --batch-size=20 --workers=0 --max-bad-images=1".split()]
    train += [f"--data-dir={own_digits_folder}", f"--output={tmp_path}", "--experiment=it"]
    place = os.fsencode(own_digits_folder / "val/digit_0")
    name = min(os.listdir(place))
    os.rename(place + b"/" + name, place + b"/\xff" + name)
    shutil.copy(place + b"/\xff" + name, os.fsencode(own_digits_folder / "train/digit_0") + b"/\xfe.png")
    Path(os.fsdecode(os.fsencode(own_digits_folder / "train/digit_0") + b"/\xfe.png")).write_bytes(b"")
    assert train_cls.main(train) == 0
    assert validate(f"--checkpoint={tmp_path / 'it'}", data=own_digits_folder)["images"] == 20
    (line,) = (tmp_path / "it/bad_images.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["image"].endswith("\udcfe.png")
    capsys.readouterr()
    data = with_class(own_digits_folder, b"caf\xe9")
    for command, flags in (
        (train_cls.main, [*train, "--experiment=other"]),
        (validate_cls.main, [f"--checkpoint={run_folder}", f"--data-dir={data}", "--workers=0"]),
    ):
        assert command(flags) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: class 'caf\\udce9' of {data}: the name is not valid UTF-8")
    assert not (tmp_path / "other").exists()


def test_a_data_folder_that_is_not_utf8(own_digits_folder: Path, tmp_path: Path) -> None:
    moved = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    own_digits_folder.rename(moved)
    flags = "--model=test_stvit --img-size=32 --epochs=1 --batch-size=20 --workers=0 --experiment=it".split()
    assert train_cls.main([*flags, f"--data-dir={moved}", f"--output={tmp_path}"]) == 0
    details = json.loads((tmp_path / "it/best/config.json").read_text(encoding="utf-8"))["stvit"]
    assert details["metrics"][0]["dataset"] == "images in caf\N{REPLACEMENT CHARACTER}"
    assert train_cls.main([f"--config={tmp_path / 'it/config.yaml'}", "--epochs=2", "--resume=auto"]) == 0

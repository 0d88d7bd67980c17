"""Tests tools/export.py.

Exported files load in their own runtimes, accept any size and give the outputs of the model.
"""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform

import stvit
from stvit.hub import save
from stvit.tools import export, train_cls
from stvit.tools.exporting import source
from stvit.tools.exporting.config import SUFFIXES
from stvit.tools.exporting.data import EvenSubset

ROOT = Path(__file__).parents[1]
# One block with super tokens, because each block makes the export slower.
SMALL = ["dims=(32,)", "depths=(1,)", "num_heads=(1,)", "stoken_size=(4,)"]
OTHER_SIZES = [(1, 32, 32), (2, 47, 61), (5, 96, 33), (1, 18, 130)]
Runtime = Callable[[torch.Tensor], list[torch.Tensor]]


@pytest.fixture(scope="module")
def best(digits_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trains a model on the digits 0 to 3 and returns its folder."""
    output = tmp_path_factory.mktemp("runs")
    flags = "--model=test_stvit --img-size=32 --in-chans=1 --epochs=12 --batch-size=10 --workers=0 --lr=3e-3 --hflip=0"
    more = f"--warmup-epochs=0 --scale 0.8 1 --color-jitter=0 --output={output} --experiment=it"
    line = [*flags.split(), *more.split(), f"--data-dir={digits_folder}", "--model-kwargs", *SMALL]
    assert train_cls.main(line) == 0
    return output / "it/best"


@pytest.fixture(scope="module")
def model(best: Path) -> Any:
    return timm.create_model(f"local-dir:{best}", pretrained=True).eval()


@pytest.fixture(scope="module")
def exported(best: Path, digits_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """Returns the folder of three exported files, standard output and standard error."""
    folder = tmp_path_factory.mktemp("exported")
    command = [sys.executable, str(ROOT / "tools/export.py"), f"--checkpoint={best}", f"--output={folder}"]
    command += [f"--data-dir={digits_folder}", "--workers=0", "--format", "onnx", "torch-export", "torchscript"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return folder, result.stdout, result.stderr


def open_file(path: Path) -> tuple[Runtime, dict[str, Any]]:
    """Opens a file; returns its runtime and its metadata."""
    if path.suffix == ".onnx":
        texts = ("model", "dtype", "interpolation", "crop_mode", "stvit", "torch", "timm")
        props = {prop.key: prop.value for prop in onnx.load(path).metadata_props}
        metadata = {key: value if key in texts else json.loads(value) for key, value in props.items()}
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return lambda x: [torch.from_numpy(y) for y in session.run(None, {"images": x.numpy()})], metadata
    extra: dict[str, Any] = {"metadata.json": ""}
    if path.suffix == ".pt2":
        module: Any = torch.export.load(path, extra_files=extra).module()
    else:
        module = torch.jit.load(path, _extra_files=extra)

    def run(x: torch.Tensor) -> list[torch.Tensor]:
        y = module(x)
        return [y] if isinstance(y, torch.Tensor) else list(y)

    return run, json.loads(extra["metadata.json"])


def assert_same(file: Runtime, model: Any, tolerance: float, sizes: list[tuple[int, int, int]], chans: int = 1) -> None:
    """Checks that all outputs are equal, within `tolerance` standard deviations."""
    for batch, height, width in sizes:
        x = torch.randn(batch, chans, height, width)
        with torch.no_grad():
            wanted = model(x)
            got = file(x)
        wanted = [wanted] if isinstance(wanted, torch.Tensor) else wanted
        assert len(got) == len(wanted)
        for mine, theirs in zip(got, wanted, strict=True):
            assert mine.dtype == torch.float32 and mine.shape == theirs.shape
            assert (mine - theirs).abs().max() <= tolerance * theirs.std(), (batch, height, width)


def refused(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """Runs the command and returns its error, which is one line."""
    capsys.readouterr()
    assert export.main(list(flags)) == 1
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    return line


def read_images(folder: Path, model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the validation images, preprocessed by timm's transform, and their class numbers."""
    config = {key: model.pretrained_cfg[key] for key in ("interpolation", "crop_pct", "mean", "std")}
    transform: Any = create_transform((1, 32, 32), is_training=False, **config)
    paths = sorted((folder / "val").rglob("*.png"))
    x = torch.stack([transform(Image.open(path).convert("L")) for path in paths])
    return x, torch.tensor([int(path.parent.name[-1]) for path in paths])


# ---------------------------------------------------------------------------------------------------------------------
# The three formats


@pytest.mark.parametrize("suffix", ["onnx", "pt2", "torchscript"])
def test_classifier(suffix: str, exported: tuple[Path, str, str], model: Any) -> None:
    path = exported[0] / f"test_stvit.{suffix}"
    file, metadata = open_file(path)
    assert_same(file, model, 1e-4, OTHER_SIZES)
    assert metadata["model"] == "test_stvit" and metadata["dtype"] == "float32"
    assert metadata["num_classes"] == 4 and metadata["class_names"] == [f"digit_{i}" for i in range(4)]
    assert metadata["input_size"] == [1, 32, 32] and metadata["stvit"] == stvit.__version__
    for key in ("mean", "std", "interpolation", "crop_pct"):
        wanted = model.pretrained_cfg[key]
        assert metadata[key] == (list(wanted) if isinstance(wanted, tuple) else wanted)
    if suffix == "pt2":
        assert metadata["heights"] == metadata["widths"] == [17, None]  # at least two super tokens


def test_onnx_axes(exported: tuple[Path, str, str]) -> None:
    content = (exported[0] / "test_stvit.onnx").read_bytes()
    proto = onnx.load_from_string(content)
    onnx.checker.check_model(proto, full_check=True)
    (x,), (y,) = proto.graph.input, proto.graph.output
    assert (x.name, y.name) == ("images", "logits")
    axes = [dim.dim_param or dim.dim_value for dim in x.type.tensor_type.shape.dim]
    assert axes == ["batch", 1, "height", "width"]
    assert [dim.dim_param or dim.dim_value for dim in y.type.tensor_type.shape.dim] == ["batch", 4]
    assert str(ROOT).encode() not in content  # no paths of this machine
    assert str(ROOT).encode() not in (exported[0] / "test_stvit.pt2").read_bytes()


def test_printed_lines(exported: tuple[Path, str, str], model: Any, digits_folder: Path) -> None:
    """Prints a line for the model, two for each file and one for each accuracy.

    Libraries print nothing.
    """
    folder, out, err = exported
    lines = out.splitlines()
    assert len(lines) == 1 + 2 * 3 + 1 + 3
    assert all("batch/s]" in line for line in err.splitlines() if line)  # the progress bar
    sizes = ["1x32x32", "2x32x64", "3x29x25"]
    for kind, line, check in zip(("onnx", "torch-export", "torchscript"), lines[1:7:2], lines[2:7:2], strict=True):
        assert f": {kind}, float32, " in line and "any batch" in line
        found = re.findall(r"(\d+x\d+x\d+) (\d\.\de[-+]\d+)", check)
        assert [size for size, _ in found] == sizes and all(float(value) < 1e-4 for _, value in found)
        assert check.endswith("(at most 0.001)")
    x, target = read_images(digits_folder, model)
    with torch.no_grad():
        accuracy = 100 * (model(x).argmax(1) == target).float().mean().item()
    assert accuracy >= 75  # otherwise equal accuracies would show nothing
    assert lines[7] == f"top-1 of PyTorch in float32: {accuracy:.2f} % of 20 images"
    for suffix, line in zip(("onnx", "pt2", "torchscript"), lines[8:], strict=True):
        assert line == f"top-1 of test_stvit.{suffix}: {accuracy:.2f} % of 20 images, 0 different predictions"
    assert not list(folder.glob("*.tmp"))


@pytest.mark.long
def test_features(digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kwargs: dict[str, Any] = {"dims": (32, 64), "depths": (1, 1), "num_heads": (1, 2), "stoken_size": 1}
    save(timm.create_model("test_stvit", in_chans=1, num_classes=4, **kwargs), tmp_path / "it")
    line = [f"--checkpoint={tmp_path / 'it'}", "--features", f"--output={tmp_path}", "--format", *SUFFIXES]
    line += [f"--data-dir={digits_folder}", "--workers=0", "--img-size=40"]
    assert export.main([*line, "--model-kwargs", "out_indices=(0,1)"]) == 0
    out = capsys.readouterr().out
    name = f"local-dir:{tmp_path / 'it'}"
    model = timm.create_model(name, pretrained=True, features_only=True, out_indices=(0, 1)).eval()
    for suffix in SUFFIXES.values():
        path = tmp_path / f"test_stvit-features{suffix}"
        file, metadata = open_file(path)
        assert_same(file, model, 1e-4, OTHER_SIZES)
        assert metadata["strides"] == [4, 8] and metadata["channels"] == [32, 64]
        assert metadata["input_size"] == [1, 40, 40] and "class_names" not in metadata
        found = re.search(
            rf"of {path.name} in standard deviations, 20 images: features_0 (\S+), features_1 (\S+)$", out, re.M
        )
        assert found and all(float(value) < 1e-4 for value in found.groups())
    session = onnxruntime.InferenceSession(str(tmp_path / "test_stvit-features.onnx"))
    assert [y.name for y in session.get_outputs()] == ["features_0", "features_1"]


# ---------------------------------------------------------------------------------------------------------------------
# Lower precision


@pytest.mark.parametrize(
    ("kind", "stoken_size"),
    [
        ("onnx", 1),
        ("torchscript", 4),
        pytest.param("onnx", 4, marks=pytest.mark.long),
        pytest.param("torch-export", 4, marks=pytest.mark.long),
    ],
)
def test_float16(kind: str, stoken_size: int, best: Path, tmp_path: Path) -> None:
    line = [f"--checkpoint={best}", "--dtype=float16", f"--output={tmp_path}", f"--format={kind}"]
    assert export.main([*line, "--model-kwargs", f"stoken_size={stoken_size}"]) == 0
    model: Any = timm.create_model(f"local-dir:{best}", pretrained=True, stoken_size=stoken_size).eval()
    path = tmp_path / f"test_stvit-float16{SUFFIXES[kind]}"
    file, metadata = open_file(path)
    assert metadata["dtype"] == "float16"
    assert_same(file, model, 0.05, OTHER_SIZES)
    with pytest.raises(AssertionError):
        assert_same(file, model, 1e-6, OTHER_SIZES)  # shows that the file computes in float16
    if kind == "onnx":
        weights = [x for x in onnx.load(path).graph.initializer if x.name.endswith("weight")]
        assert len(weights) > 5 and {x.data_type for x in weights} == {onnx.TensorProto.FLOAT16}
    if kind == "torchscript":
        weights = [tensor for tensor in torch.jit.load(path).state_dict().values() if tensor.is_floating_point()]
        assert {tensor.dtype for tensor in weights} == {torch.float16}


@pytest.mark.long
def test_int8(best: Path, model: Any, digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "digits.onnx"
    line = [f"--checkpoint={best}", "--dtype=int8", f"--output={path}", f"--data-dir={digits_folder}", "--workers=0"]
    assert export.main([*line, "--calibration-images=40"]) == 0
    captured = capsys.readouterr()
    assert "3/3" in captured.err  # 40 images in batches of 16
    file, metadata = open_file(path)
    x, target = read_images(digits_folder, model)
    with torch.no_grad():
        wanted = model(x)
    (got,) = file(x)
    right, otherwise = int((got.argmax(1) == target).sum()), int((got.argmax(1) != wanted.argmax(1)).sum())
    assert f"top-1 of digits.onnx: {5 * right:.2f} % of 20 images, {otherwise} different predictions" in captured.out
    assert otherwise <= 1
    assert 1e-5 < (got - wanted).abs().max() / wanted.std() < 0.8
    assert file(torch.randn(3, 1, 47, 61))[0].shape == (3, 4)
    proto = onnx.load(path)
    kinds = [initializer.data_type for initializer in proto.graph.initializer]
    convolutions = sum(isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)) for module in model.modules())
    # Each weight has a zero point of the same type.
    assert kinds.count(onnx.TensorProto.INT8) == 2 * convolutions
    assert metadata["dtype"] == "int8" and metadata["class_names"][3] == "digit_3"


def test_calibration_images_are_from_all_classes() -> None:
    spread = EvenSubset(list(range(100)), 8)
    assert [spread[i] for i in range(len(spread))] == [0, 12, 25, 37, 50, 62, 75, 87]
    assert len(EvenSubset(list(range(5)), 8)) == 5


# ---------------------------------------------------------------------------------------------------------------------
# Other models


def test_model_of_fixed_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--model=test_vit", "--no-pretrained", f"--output={tmp_path}", "--format", *SUFFIXES]
    assert export.main([*line, "--model-kwargs", "dynamic_img_size=False"]) == 0
    out = capsys.readouterr().out
    assert out.count("any batch, only height 160, only width 160") == 3
    assert out.count(": 1x160x160 ") == out.count(", 2x160x160 ") == out.count(", 3x160x160 ") == 3


def test_onnx_of_another_model_without_onnxruntime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["--model=test_resnet", "--no-pretrained", f"--output={tmp_path / 'r.onnx'}", "--opset=18"]
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "onnxruntime", None)
        assert "needs onnxruntime: pip install 'stvit[export]', or" in refused(capsys, *line)
        assert export.main([*line, "--no-check"]) == 0
        without.setitem(sys.modules, "onnxscript", None)
        assert "needs onnxscript: pip install 'stvit[export]'" in refused(capsys, *line)
    assert onnx.load(tmp_path / "r.onnx").opset_import[0].version == 18
    assert [y.shape for y in open_file(tmp_path / "r.onnx")[0](torch.randn(2, 3, 70, 90))] == [(2, 1000)]


@pytest.mark.long
def test_small_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """32 pixels are one super token of the first stage.

    The torch.export program accepts no larger images.
    """
    line = ["--model=test_stvit", "--no-pretrained", "--img-size=32", f"--output={tmp_path}", "--format", "onnx"]
    assert export.main([*line, "torch-export", "--seed=1"]) == 0
    out = capsys.readouterr().out
    assert "torch-export" in out and "height 17 to 32, width 17 to 32" in out and "2x24x32" in out
    assert "any batch, any height, any width" in out
    assert len(open_file(tmp_path / "test_stvit.onnx")[0](torch.randn(2, 3, 130, 97))[0]) == 2


# ---------------------------------------------------------------------------------------------------------------------
# Errors


class WrongEverywhere(source.Classifier):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images.to(self.dtype)).float() * 1.02


class WrongOnRectangles(source.Classifier):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        y = self.model(images.to(self.dtype)).float()
        if images.shape[2] * 2 == images.shape[3]:
            y = y * 1.02
        return y


class WrongOnOddSizes(source.Classifier):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        y = self.model(images.to(self.dtype)).float()
        if images.shape[2] % 32 != 0:
            y = y * 1.02
        return y


class NotFinite(source.Classifier):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images.to(self.dtype)).float() * float("nan")


class OtherShape(source.Classifier):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images.to(self.dtype)).float()[:, :1]


class Unscriptable(source.Classifier):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(**{"x": images})


@pytest.mark.parametrize(
    ("wrapper", "message"),
    [
        (WrongEverywhere, "on 1 images of 32x32 it differs by"),
        (WrongOnRectangles, "on 2 images of 32x64 it differs by"),
        (WrongOnOddSizes, "on 3 images of 29x25 it differs by"),
        (NotFinite, "on 1 images of 32x32 it differs by nan"),
        (OtherShape, "on 1 images of 32x32 it differs by inf"),
        (Unscriptable, "the model cannot be exported by TorchScript"),
    ],
)
def test_wrong_file_is_not_written(
    wrapper: Any,
    message: str,
    best: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "it.torchscript"
    path.write_bytes(b"the former")
    monkeypatch.setattr(source, "Classifier", wrapper)
    line = [f"--checkpoint={best}", "--format=torchscript", f"--output={path}"]
    assert message in refused(capsys, *line)
    assert path.read_bytes() == b"the former" and list(tmp_path.iterdir()) == [path]
    if wrapper is WrongEverywhere:
        assert export.main([*line, "--no-check"]) == 0
        assert path.read_bytes() != b"the former"


def test_errors_are_one_line(best: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = f"--checkpoint={best}"
    (tmp_path / "empty").mkdir()
    (tmp_path / "a_file").touch()
    for flags, message in (
        ([], "no model; pass --checkpoint, or --model"),
        (["--checkpoint=nowhere"], "--checkpoint: no file, folder or timm model named 'nowhere'"),
        (["--model=test_stvot", "--no-pretrained"], "unknown model 'test_stvot', did you mean test_stvit"),
        ([checkpoint, "--num-classes=7"], "--num-classes 7: the weights have 4 classes"),
        ([checkpoint, "--dtype=int8"], "--dtype int8 is calibrated on real images; pass --data-dir"),
        ([checkpoint, "--dtype=int8", "--format=torchscript"], "int8 is for --format onnx, not for torchscript"),
        ([checkpoint, "--dtype=int8", "--data-dir=nowhere"], "--data-dir nowhere is not a folder"),
        ([checkpoint, "--dtype=int8", f"--data-dir={tmp_path / 'empty'}"], "has no folder for --train-split train"),
        ([checkpoint, "--opset=17"], "--opset must be at least 18, the oldest one of PyTorch, got 17"),
        (
            [checkpoint, "--opset=18", "--format=torchscript"],
            "--opset is for --format onnx, not for torchscript",
        ),
        (
            [checkpoint, f"--output={tmp_path / 'no/it.onnx'}"],
            f"folder {tmp_path / 'no'} does not exist; create",
        ),
        ([checkpoint, f"--output={tmp_path / 'no'}/"], "is not a folder; create it first"),
        ([checkpoint, f"--output={tmp_path / 'it.pt2'}"], "has the suffix of --format torch-export"),
        (
            [checkpoint, f"--output={tmp_path / 'it'}", "--format", "onnx", "torchscript"],
            "is not a folder; create it first",
        ),
        ([checkpoint, f"--output={tmp_path / 'a_file/it.onnx'}"], "create it first"),
        ([checkpoint, "--dataset=sklearn/digits"], "the model has no class '0', which is in the dataset"),
        ([checkpoint, "--dataset=sklearn/digits", "--class-map=nowhere.txt"], "--class-map nowhere.txt does not exist"),
    ):
        output = [] if any(flag.startswith("--output") for flag in flags) else [f"--output={tmp_path / 'it'}"]
        if "--dataset=sklearn/digits" in flags:
            output += ["--format=torchscript", "--workers=0"]
        assert message in refused(capsys, *flags, *output), flags
    with pytest.raises(SystemExit):
        export.main([checkpoint, "--format=tflite"])
    assert "invalid choice: 'tflite'" in capsys.readouterr().err


def test_full_disk(
    best: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "it.torchscript"
    path.write_bytes(b"the former")

    def write_bytes(self: Path, content: bytes) -> int:
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    line = refused(capsys, f"--checkpoint={best}", "--format=torchscript", f"--output={path}")
    assert f"cannot write {path}: [Errno 28] No space left on device" in line
    assert path.read_bytes() == b"the former" and list(tmp_path.iterdir()) == [path]


def test_unreadable_images(
    best: Path, own_digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = next((own_digits_folder / "val").rglob("*.png"))
    bad.write_bytes(b"no picture")
    line = [f"--checkpoint={best}", "--format=torchscript", f"--output={tmp_path / 'it'}", "--workers=0"]
    line += [f"--data-dir={own_digits_folder}"]
    assert f"cannot read image {bad}" in refused(capsys, *line)
    assert export.main([*line, "--max-bad-images=1"]) == 0
    captured = capsys.readouterr()
    assert "% of 19 images, 0 different predictions" in captured.out
    assert f"warning: {bad} cannot be read and was skipped" in captured.err


def test_class_map(best: Path, own_digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Class folders with other names and another order get the model's class numbers."""
    line = [f"--checkpoint={best}", "--format=torchscript", f"--output={tmp_path / 'it'}", "--workers=0", "--no-check"]
    line += [f"--data-dir={own_digits_folder}"]
    assert export.main(line) == 0
    before = capsys.readouterr().out.splitlines()[-2:]
    names = ["zero", "one", "two", "three"]
    for number, name in enumerate(names):
        for split in ("train", "val"):
            (own_digits_folder / split / f"digit_{number}").rename(own_digits_folder / split / name)
    (tmp_path / "names.txt").write_text("\n".join(names))
    assert export.main([*line, f"--class-map={tmp_path / 'names.txt'}"]) == 0
    after = capsys.readouterr().out.splitlines()[-2:]
    assert after == before and "top-1 of PyTorch" in before[0]
    assert open_file(tmp_path / "it")[1]["class_names"] == names


def test_other_channels_and_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "it.torchscript"
    line = ["--model=test_stvit", "--no-pretrained", "--in-chans=1", "--num-classes=10", "--format=torchscript"]
    assert export.main([*line, f"--output={path}"]) == 0
    assert "images of 1x160x160" in capsys.readouterr().out
    run, metadata = open_file(path)
    assert run(torch.zeros(1, 1, 32, 32))[0].shape == (1, 10)
    assert metadata["input_size"] == [1, 160, 160] and len(metadata["mean"]) == 1

"""Tests the measurements and flags of tools/benchmark.py."""

import csv
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers import LayerNorm2d
from torch import nn

import stvit
from stvit.tools import benchmark
from stvit.tools.benchmarks import models
from stvit.tools.benchmarks.measure import peak_memory, take_turns
from stvit.tools.benchmarks.published import PublishedAttention, published
from tests.golden import fill

ROOT = Path(__file__).parents[1]
GPU = (ROOT / "docs/benchmarks/gpu.md").read_text()
CPU = torch.device("cpu")
SMALL = ["--img-size=32", "--batch-size=8", "--images=20", "--repeats=2"]


def read(table: Path) -> list[dict[str, str]]:
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


def test_help_does_not_import_pytorch() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "stvit.tools.benchmark", "kernels", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--ways" in shown.stdout and " torch\n" not in shown.stderr and " timm\n" not in shown.stderr


def test_data(digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = ROOT / "configs/cls/stvit_small_in1k.yaml"
    table = tmp_path / "docs/data.csv"
    flags = ["data", f"--data-dir={digits_folder}", *SMALL, f"--csv={table}", f"--config={recipe}"]
    assert benchmark.main([*flags, "--workers", "0", "1"]) == 0
    printed = capsys.readouterr().out.splitlines()
    rows = read(table)
    names = ["torchvision", "train_cls", "train_cls, stvit_small_in1k"]
    assert [row["loader"] for row in rows] == names * 2
    assert [row["workers"] for row in rows] == ["0"] * 3 + ["1"] * 3
    assert printed[0].split()[:2] == ["loader", "workers"] and len(printed) == 8
    for row in rows:
        assert row["images"] == "16" and row["repeats"] == "2"  # complete batches; the first epoch is not measured
        assert 0 < float(row["per_worker_min"]) <= float(row["per_worker"]) <= float(row["per_worker_max"])
        assert all(row[name] for name in ("date", "device", "cores", "torch", "torchvision", "timm"))
        if row["loader"] == "torchvision":
            assert float(row["ratio"]) == 1.0

    assert benchmark.main([*flags, "--workers=0"]) == 0
    with table.open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 9


def test_yolo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["yolo26n.yaml", "yolo26n-stvit_pico.yaml", "yolo26n-resnet18.yaml"]
    table = tmp_path / "yolo.csv"
    assert benchmark.main(["yolo", "--models", *names, "--img-size=64", "--repeats=2", f"--csv={table}"]) == 0
    rows = read(table)
    assert [row["backbone"] for row in rows] == ["stock", "stvit_pico", "resnet18"]
    assert [float(row["params_m"]) for row in rows[:2]] == [2.57, 3.09]
    for row in rows:
        for share in ("params_backbone", "gflops_backbone", "ms_backbone"):
            assert 0.2 < float(row[share]) < 1.0
        assert float(row["gflops"]) > 0
        assert 0 < float(row["ms_min"]) <= float(row["ms"]) <= float(row["ms_max"])
    # stvit_pico has 0.39 GMAC at 224 pixels. At 64 pixels that is 0.064 GFLOPs, without its classifier.
    ours = float(rows[1]["gflops"]) * float(rows[1]["gflops_backbone"])
    assert 0.05 < ours < 0.11


def test_kernels_without_a_gpu_counts_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    """The numbers are those in docs/benchmarks/gpu.md."""
    assert benchmark.main(["kernels", "--device=cpu"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert lines.pop().startswith("no times: ")
    rows = [dict(zip(header.split(), line.split(), strict=True)) for line in lines]
    assert [(row["stage"], row["img_size"], row["batch_size"]) for row in rows] == [
        (stage, size, batch) for size, batch in (("224", "128"), ("640", "16"), ("1280", "4")) for stage in "12"
    ]
    # 128 feature maps of 56x56 pixels and 7x7 tokens, with 64 channels of two bytes, read and written.
    assert float(rows[0]["forward_mb"]) == pytest.approx(2 * 128 * 64 * (56**2 + 7**2) * 2 / 1e6, rel=1e-3)
    added = float(rows[0]["backward_mb"]) - float(rows[0]["forward_mb"])
    assert added == pytest.approx(2 * 128 * 9 * 56**2 * 2 / 1e6, abs=0.1)
    written = re.findall(r"^\| ([12]) \| (\d+) \| (\d+) \| ([\d.]+) \| ([\d.]+) \|", GPU, re.M)
    columns = ("stage", "img_size", "batch_size", "forward_mb", "backward_mb")
    assert written == [tuple(row[column] for column in columns) for row in rows]


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--models", "yolo26n-stvit_pica.yaml"], "unknown backbone"), (["--img-size=100"], "a multiple of 32, got 100")],
)
def test_wrong_flags_of_yolo(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["yolo", "--models", "yolo26n.yaml", *flags]) == 1
    assert message in capsys.readouterr().err


def test_a_table_of_something_else_is_kept(
    digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    flags = ["data", f"--data-dir={digits_folder}", *SMALL, "--workers=0", f"--csv={tmp_path / 'other.csv'}"]
    assert benchmark.main(flags) == 1
    assert "has other columns (a, b); choose another file" in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / "other.csv").read_text() == "a,b\n1,2\n"


def test_errors_are_one_line(digits_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, said in (
        (["--data-dir=nowhere"], "cannot open the training images of --data-dir nowhere"),
        ([f"--data-dir={digits_folder}", "--images=61"], "and at most all images (60)"),
        ([f"--data-dir={digits_folder}", "--images=5"], "must be at least a batch (64)"),
    ):
        assert benchmark.main(["data", *flags]) == 1
        assert said in capsys.readouterr().err.splitlines()[-1]
    for argv in ([], ["dat"], ["data"]):
        with pytest.raises(SystemExit):
            benchmark.main(argv)


# The baseline


@pytest.mark.parametrize("kwargs", [{}, {"n_iter": 3, "stoken_size": (8, (4, 2), 2, 1), "ls_init_values": 0.1}])
@pytest.mark.parametrize("size", [(64, 96), (75, 50)])
def test_published_formulation_is_the_same_model(kwargs: dict[str, Any], size: tuple[int, int]) -> None:
    model = timm.create_model("test_stvit", **kwargs).double()
    baseline = published(model)
    x = torch.from_numpy(fill.image(0, 2, 3, *size)).double()
    outputs = [net(x) for net in (model, baseline)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-9, atol=1e-12)
    for output in outputs:
        output.square().sum().backward()
    expected = dict(model.named_parameters())
    for name, parameter in baseline.named_parameters():
        gradient = expected[name.replace(".norm.", ".")].grad
        assert (parameter.grad - gradient).norm() <= 1e-9 * gradient.norm() + 1e-12, name
        assert parameter is not expected[name.replace(".norm.", ".")]


def test_published_formulation_is_channel_first_and_holds_its_matrices() -> None:
    baseline = published(timm.create_model("test_stvit").eval())
    kinds = [type(module) for module in baseline.modules()]
    assert kinds.count(PublishedAttention) == 4
    assert stvit.SuperTokenAttention not in kinds and LayerNorm2d not in kinds
    formats = []
    for module in baseline.modules():
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d, PublishedAttention)):
            module.register_forward_hook(lambda module, args, out: formats.append(out.is_contiguous()))
    with torch.no_grad():
        baseline(torch.randn(2, 3, 64, 96))
    assert formats and all(formats)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        baseline.stages[3].blocks[0].attn(torch.randn(1, 64, 16, 16))
    assert max(saved) == 2 * 256**2  # two heads


# Measuring


def test_candidates_run_in_turns() -> None:
    order: list[str] = []
    steps: dict[str, Callable[[], Any]] = {name: lambda name=name: order.append(name) for name in "ab"}
    times = take_turns(steps, 3, CPU)
    assert order == ["a", "b"] * 4
    assert all(len(times[name]) == 3 and min(times[name]) > 0 for name in "ab")
    times = take_turns(steps, 1, CPU, min_seconds=0.05)
    assert len(times["a"]) > 10


def fill_memory(mebibytes: int) -> Callable[[], Any]:
    kept = torch.ones(10 * 2**18)
    return lambda: kept.sum() + torch.ones(mebibytes * 2**18).sum()


def test_memory_is_measured_in_a_new_process() -> None:
    total, step = peak_memory(fill_memory, 300, device=CPU)
    assert 290 < step < 330
    assert total > step + 100  # Python and torch


# Subjects


@pytest.mark.long
def test_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, plot = tmp_path / "models.csv", tmp_path / "models.png"
    names = ["test_stvit", "test_stvit(stoken_size=(8, 4, 2, 1))", "resnet18"]
    flags = [
        "--ways",
        "published",
        "eager",
        "optimized",
        "--img-size=64",
        "--batch-size=2",
        "--repeats=2",
        "--no-memory",
    ]
    assert benchmark.main(["model", "--models", *names, *flags, f"--csv={table}", f"--plot={plot}"]) == 0
    rows = read(table)
    ways = ["published", "eager", "optimized"]
    assert [(row["model"], row["way"]) for row in rows] == [
        *((name, way) for name in names[:2] for way in ways),
        *(("resnet18", way) for way in ways[1:]),
    ]
    assert float(rows[0]["ratio"]) == 1.0
    for row in rows:
        assert all(
            row[name] for name in ("date", "device", "threads", "torch", "timm", "dtype", "batch_size", "img_size")
        )
        assert 0 < float(row["slowest"]) <= float(row["images_per_second"]) <= float(row["fastest"])
        assert float(row["ms_p50"]) <= float(row["ms_p90"]) <= float(row["ms_p99"])
        assert float(row["images_per_second"]) == pytest.approx(2000 / float(row["ms_p50"]), rel=0.01)
        # The achieved rate, relative to the matrix product.
        gflops = 2 * float(row["gmac"]) * float(row["images_per_second"])
        assert float(row["matrix"]) == pytest.approx(gflops / float(row["matrix_gflops"]), abs=1e-3)
        assert int(row["steps"]) >= 2
    # ResNet-18 has 1.82 GMAC at 224 pixels (paper: 1.8). All but the classifier are proportional to the pixels.
    assert float(rows[-1]["gmac"]) == pytest.approx(1.814 * (64 / 224) ** 2, rel=0.01)
    assert plot.read_bytes().startswith(b"\x89PNG") and "drawn to" in capsys.readouterr().out


@pytest.mark.long
def test_op_and_train(tmp_path: Path) -> None:
    flags = [
        "--models=test_stvit",
        "--img-size=64",
        "--batch-size=2",
        "--repeats=1",
        "--min-seconds=0.01",
    ]
    table = tmp_path / "op.csv"
    assert benchmark.main(["op", *flags, "--no-memory", "--ways", "published", "eager", f"--csv={table}"]) == 0
    rows = read(table)
    assert [(row["stage"], row["step"], row["way"]) for row in rows] == [
        (stage, step, way) for stage in "12" for step in ("inference", "training") for way in ("published", "eager")
    ]
    table = tmp_path / "train.csv"
    assert benchmark.main(["train", *flags, "--ways", "eager", "--dtype=bfloat16", f"--csv={table}"]) == 0
    (row,) = read(table)
    assert (row["step"], row["dtype"], row["memory_ratio"]) == ("training", "bfloat16", "1.0")
    assert int(row["memory_mib"]) > int(row["step_mib"]) > 1


@pytest.mark.long
def test_detectors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Detectors are measured in inference, and in training with their own loss."""
    table = tmp_path / "detectors.csv"
    flags = ["--models=yolo26n-stvit_pico.yaml", "--img-size=64", "--batch-size=2", "--repeats=1", "--min-seconds=0.01"]
    ways = ["--no-memory", f"--csv={table}", "--ways", "published", "eager"]
    assert benchmark.main(["model", *flags, *ways, "optimized"]) == 0
    assert benchmark.main(["train", *flags, *ways]) == 0
    rows = read(table)
    assert [(row["step"], row["way"]) for row in rows] == [
        *(("inference", way) for way in ("published", "eager", "optimized")),
        *(("training", way) for way in ("published", "eager")),
    ]
    assert {row["params_m"] for row in rows} == {"3.09"} and len({row["gmac"] for row in rows}) == 1
    assert benchmark.main(["model", *flags, *ways, "--models=yolo26n.yaml", "--ways=published"]) == 1
    assert "none of --models supports --ways published" in capsys.readouterr().err
    case = models.Case("yolo26n-stvit_pico.yaml", "published", 2, 64, "float32", "cpu", is_training=True)
    kinds = [type(module) for module in models.make_module(case, "cpu").modules()]
    assert kinds.count(PublishedAttention) == 7 and stvit.SuperTokenAttention not in kinds


def test_dense(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Detectors and segmentation models in one table; 0 repeats measure no time."""
    table = tmp_path / "dense.csv"
    models = ["mask_rcnn(backbone='test_stvit', min_size=64)", "upernet(backbone='test_stvit')"]
    flags = ["dense", "--models", *models, "--img-size", "64", "96", "--device", "cpu", f"--csv={table}"]
    assert benchmark.main([*flags, "--repeats", "1"]) == 0
    rows = read(table)
    assert [row["model"] for row in rows] == models
    for row in rows:
        assert (row["height"], row["width"]) == ("64", "96")
        assert 0 < float(row["backbone_gmac"]) <= float(row["gmac"])
        assert 0 < float(row["ms_backbone"]) < 1 and float(row["ms"]) > 0
    assert benchmark.main([*flags[:-1], "--repeats", "0"]) == 0
    assert "gmac" in (said := capsys.readouterr().out.splitlines()[-3]) and "ms" not in said.split()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--models", "mask_rcn(backbone='test_stvit')"], "unknown model 'mask_rcn'"),
        (["--models", "mask_rcnn(backbone='test_stvi')"], "unknown backbone 'test_stvi'"),
        (["--models", "upernet()"], "missing 1 required positional argument: 'backbone'"),
        (
            ["--models", "upernet(backbone='test_stvit')", "--img-size", "50", "64"],
            "must be multiples of 32, got 50 64",
        ),
    ],
)
def test_wrong_flags_of_dense(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["dense", "--repeats", "0", *flags]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_training_step_trains() -> None:
    case = models.Case("test_stvit", "eager", 2, 32, "float32", "cpu", is_training=True)
    net: list[nn.Module] = []
    made = models.make_module
    try:
        models.make_module = lambda *args: net.append(made(*args)) or net[-1]
        step = models.prepare(case)
    finally:
        models.make_module = made
    before = {name: value.clone() for name, value in net[0].named_parameters()}
    step()
    assert all(not torch.equal(value, before[name]) for name, value in net[0].named_parameters())


def test_resolution(tmp_path: Path) -> None:
    table, plot = tmp_path / "sizes.csv", tmp_path / "sizes.svg"
    flags = [
        "--models=test_stvit",
        "--ways",
        "published",
        "optimized",
        "--repeats=1",
        "--min-seconds=0.01",
        "--no-memory",
    ]
    sizes = ["--img-size", "32", "64", "--published-up-to=32"]
    assert benchmark.main(["resolution", *flags, *sizes, f"--csv={table}", f"--plot={plot}"]) == 0
    rows = read(table)
    assert [(row["img_size"], row["way"]) for row in rows] == [
        ("32", "published"),
        ("32", "optimized"),
        ("64", "optimized"),
    ]
    assert {row["memory_mib"] for row in rows} == {""}
    assert b"<svg" in plot.read_bytes()


@pytest.mark.long
def test_compiled_and_onnxruntime(tmp_path: Path) -> None:
    table = tmp_path / "models.csv"
    flags = ["--models=test_stvit", "--img-size=64", "--batch-size=2", "--repeats=2", "--no-memory", f"--csv={table}"]
    assert benchmark.main(["model", *flags, "--ways", "eager", "compiled", "onnxruntime"]) == 0
    assert [row["way"] for row in read(table)] == ["eager", "compiled", "onnxruntime"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["model", "--models=stvit_smal"], "unknown model 'stvit_smal', did you mean"),
        (["model", "--models=stvit_small(8)"], "must be a name, or 'NAME(key=value)' with Python literals"),
        (["model", "--models=test_stvit(stoken=8)"], "cannot create model test_stvit"),
        (["train", "--models=test_stvit", "--dtype=float16"], "pass bfloat16"),
        (["model", "--models=resnet18", "--ways=published"], "none of --models supports --ways published"),
        (["op", "--models=resnet18"], "resnet18 has no super token attention"),
        (["model", "--plot=nowhere/plot.png"], "the folder does not exist"),
        (["model", "--plot=plot.bmp"], "must end in .png, .pdf or .svg"),
        (["model", "--models=test_stvit", "--device=gpu"], "--device gpu is not available"),
        (["model", "--models=test_stvit", "--device=cuda"], "--device cuda is not available"),
        (["kernels", "--device=cuda"], "--device cuda is not available"),
        (["model", "--models=yolo26n-stvit_pica.yaml"], "unknown backbone"),
        (["model", "--models=yolo26n-stvit_pico.yaml", "--img-size=100"], "must be a multiple of 32"),
        (["kernels", "--device=cpu", "--csv=kernels.csv"], "--csv records times, but none can be measured here"),
        (["kernels", "--device=meta"], "pass cuda to measure the kernels"),
    ],
)
def test_wrong_flags_of_models(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    no_memory = [] if flags[0] == "kernels" else ["--no-memory"]
    assert benchmark.main([*flags, *no_memory, "--repeats=1"]) == 1
    assert message in capsys.readouterr().err.splitlines()[-1]

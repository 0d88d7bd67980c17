"""tools/benchmark.py: that it measures what it says, not how fast that is."""

import csv
from pathlib import Path

import pytest

from stvit.tools import benchmark

ROOT = Path(__file__).parents[1]
SMALL = ["--img-size=32", "--batch-size=8", "--images=20", "--repeats=2"]


def test_data(digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = ROOT / "configs/cls/stvit_small_in1k.yaml"
    table = tmp_path / "docs/data.csv"
    flags = ["data", f"--data-dir={digits_folder}", *SMALL, f"--csv={table}", f"--config={recipe}"]
    assert benchmark.main([*flags, "--workers", "0", "1"]) == 0
    printed = capsys.readouterr().out.splitlines()
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = ["torchvision", "train_cls", "train_cls, stvit_small_in1k"]
    assert [row["loader"] for row in rows] == names * 2
    assert [row["workers"] for row in rows] == ["0"] * 3 + ["1"] * 3
    assert printed[0].split()[:2] == ["loader", "workers"] and len(printed) == 8
    for row in rows:
        assert row["images"] == "16" and row["repeats"] == "2"  # whole batches; the first reading is not measured
        assert 0 < float(row["per_worker_min"]) <= float(row["per_worker"]) <= float(row["per_worker_max"])
        assert all(row[name] for name in ("date", "device", "cores", "torch", "torchvision", "timm"))
        if row["loader"] == "torchvision":
            assert float(row["ratio"]) == 1.0

    assert benchmark.main([*flags, "--workers=0"]) == 0
    with table.open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 9


def test_yolo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["yolo26n.yaml", "yolo26n-stvit.yaml", "yolo26n-resnet18.yaml"]
    table = tmp_path / "yolo.csv"
    assert benchmark.main(["yolo", "--models", *names, "--img-size=64", "--repeats=2", f"--csv={table}"]) == 0
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["backbone"] for row in rows] == ["stock", "stvit_pico", "resnet18"]
    assert [float(row["params_m"]) for row in rows[:2]] == [2.57, 3.09]
    for row in rows:
        for share in ("params_backbone", "gflops_backbone", "ms_backbone"):
            assert 0.2 < float(row[share]) < 1.0
        assert float(row["gflops"]) > 0
        assert 0 < float(row["ms_min"]) <= float(row["ms"]) <= float(row["ms_max"])
    # One image at 224 is 0.39 GMAC for stvit_pico: at 64 pixels that is 0.064 GFLOPs, without its classifier.
    ours = float(rows[1]["gflops"]) * float(rows[1]["gflops_backbone"])
    assert 0.05 < ours < 0.11


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
    assert "has other columns (a, b): choose another file" in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / "other.csv").read_text() == "a,b\n1,2\n"


def test_trouble_is_one_clear_line(digits_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, said in (
        (["--data-dir=nowhere"], "cannot open the training images of --data-dir nowhere"),
        ([f"--data-dir={digits_folder}", "--images=61"], "and at most the images there are (60)"),
        ([f"--data-dir={digits_folder}", "--images=5"], "must be at least a batch (64)"),
    ):
        assert benchmark.main(["data", *flags]) == 1
        assert said in capsys.readouterr().err.splitlines()[-1]
    for argv in ([], ["dat"], ["data"]):
        with pytest.raises(SystemExit):
            benchmark.main(argv)

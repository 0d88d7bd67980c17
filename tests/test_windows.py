"""Tests commands under the rules of Windows, file names, encodings and devices.

The rules are in tests/windows_rules.
"""

import argparse
import ast
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

import stvit
from stvit import hub
from stvit.hub.card import model_card
from stvit.tools import train_cls
from stvit.tools.benchmarks import measure
from stvit.tools.common import cli
from stvit.tools.common.cli import CommandError
from stvit.tools.common.distributed import check_dtype, join_processes
from stvit.tools.common.flags import to_recipe
from stvit.tools.common.locks import PathLock
from stvit.tools.common.runs import find_run, run_label
from stvit.tools.visualizing import pictures
from tests.test_data import as_shards

ROOT = Path(__file__).parents[1]
# cp1252 cannot encode this name.
NAME = "犬"
TRAIN = ["--model=test_stvit", "--img-size=32", "--batch-size=20", "--lr=1e-3", "--warmup-epochs=0"]


def environment(**more: str) -> dict[str, str]:
    rules = {"PYTHONPATH": str(ROOT / "tests/windows_rules"), "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    return {**os.environ, **rules, "USERNAME": "user", "OMP_NUM_THREADS": "1", **more}


def start(*command: object, **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        env=environment(**more),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="cp1252",
        errors="backslashreplace",
    )


def run(*command: object, status: int = 0, **more: str) -> str:
    """Runs Python under the rules of Windows and returns its output."""
    process = start(*command, **more)
    out, _ = process.communicate(timeout=400)
    assert process.returncode == status, out
    return out


@pytest.fixture(scope="module")
def folder(write_digits: Callable[[Path, int, int], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with images, a recipe, and a run that was extended to two epochs."""
    folder = tmp_path_factory.mktemp("windows") / NAME
    data = write_digits(folder / "data", 40, 20)
    for split in ("train", "val"):
        (data / split / "digit_0").rename(data / split / NAME)
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"data_dir": str(data)}, allow_unicode=True), encoding="utf-8")
    flags = ["tools/train_cls.py", f"--config={recipe}", *TRAIN, f"--output={folder}", "--experiment=run"]
    flags += ["--resume=auto", "--checkpoint-steps=1", "--model-ema"]
    assert "best validation accuracy" in run(*flags, "--epochs=1", "--workers=1")
    out = run(*flags, "--epochs=2", "--workers=0")
    assert "extending the run from 1 to 2 epochs" in out
    assert NAME not in out and NAME.encode("unicode_escape").decode() in out
    return folder


@pytest.mark.long
def test_training_and_resume(folder: Path) -> None:
    config = json.loads((folder / "run/best/config.json").read_text(encoding="utf-8"))
    assert config["label_names"][-1] == NAME
    recipe = yaml.safe_load((folder / "run/config.yaml").read_text(encoding="utf-8"))
    assert (recipe["epochs"], recipe["data_dir"]) == (2, str(folder / "data"))
    assert len((folder / "run/summary.csv").read_text(encoding="utf-8").splitlines()) == 3
    assert sorted(path.name for path in (folder / "run/checkpoints").iterdir()) == [
        "00001-00000001.pt",
        "00002-00000000.pt",
    ]
    assert not list(folder.rglob("*.tmp"))


@pytest.mark.long
def test_the_other_commands(folder: Path, tmp_path: Path) -> None:
    checkpoint = folder / "run/checkpoints/00002-00000000.pt"
    image = next((folder / "data/val" / NAME).iterdir())
    (tmp_path / "exported").mkdir()
    names = "\n".join(json.loads((folder / "run/best/config.json").read_text(encoding="utf-8"))["label_names"])
    (tmp_path / "names.txt").write_text(names, encoding="utf-8-sig")  # encoding of the Windows editor
    data = [f"--data-dir={folder / 'data'}", "--workers=0", f"--class-map={tmp_path / 'names.txt'}"]
    benchmark = ["model", "--models=test_stvit", "--ways=eager", "--img-size=32", "--batch-size=1", "--repeats=1"]
    commands: dict[str, list[object]] = {
        "validate_cls": [f"--checkpoint={folder / 'run'}", *data, f"--output={tmp_path / 'report'}"],
        "export": [
            f"--checkpoint={folder / 'run'}",
            "--format=torchscript",
            f"--output={tmp_path / 'exported'}",
            *data,
        ],
        "convert_checkpoint": [checkpoint, "--no-use-ema", f"--output={tmp_path / 'converted'}"],
        "push_to_hub": [folder / "run", "--repo-id=org/run", "--dry-run", f"--output={tmp_path / 'pushed'}"],
        "visualize": [image, f"--checkpoint={folder / 'run'}", f"--output={tmp_path / 'pictures'}"],
        "benchmark": [*benchmark, "--min-seconds=0.001", f"--csv={tmp_path / 'benchmark.csv'}"],
    }
    script = tmp_path / "script.py"
    calls = json.dumps({name: list(map(str, flags)) for name, flags in commands.items()})
    script.write_text(
        f"""
import importlib

if __name__ == "__main__":
    for name, flags in {calls}.items():
        print(name, importlib.import_module("stvit.tools." + name).main(flags), flush=True)
""",
        encoding="utf-8",
    )
    out = run(script)
    for name in commands:
        assert f"\n{name} 0\n" in f"\n{out}", out
    assert (tmp_path / "report/results.json").exists() and NAME in (tmp_path / "report/per_class.csv").read_text(
        "utf-8"
    )
    for made in (tmp_path / "converted", tmp_path / "pushed"):
        assert {"README.md", "config.json", "model.safetensors"} == {path.name for path in made.iterdir()}
    # Peak memory needs another package on Windows. These columns are empty.
    table = (tmp_path / "benchmark.csv").read_text(encoding="utf-8").splitlines()
    row = dict(zip(table[0].split(","), table[1].split(","), strict=True))
    assert row["memory_mib"] == row["step_mib"] == "" and float(row["images_per_second"]) > 0


@pytest.mark.long
def test_ctrl_break_saves_and_stops(folder: Path, tmp_path: Path) -> None:
    flags = [*TRAIN, f"--data-dir={folder / 'data'}", f"--output={tmp_path}", "--experiment=it", "--epochs=1000"]
    flags += ["--workers=0", "--log-interval=1"]
    process = start("tools/train_cls.py", *flags)
    log = tmp_path / "it/log.jsonl"
    while not log.exists() or '"train"' not in log.read_text(encoding="utf-8"):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(21)  # SIGBREAK
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + 21, out
    assert "terminated; saved after epoch" in out.splitlines()[-1]
    assert list((tmp_path / "it/checkpoints").glob("*.pt"))


@pytest.mark.long
def test_a_killed_run_leaves_no_lock(folder: Path, tmp_path: Path) -> None:
    flags = ["tools/train_cls.py", *TRAIN, f"--data-dir={folder / 'data'}", f"--output={tmp_path}", "--experiment=it"]
    flags += ["--epochs=1000", "--workers=1", "--checkpoint-steps=1", "--resume=auto"]
    process = start(*flags)
    try:
        while not (tmp_path / "it/summary.csv").exists():
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.05)
        assert f"error: another process uses {tmp_path / 'it'}; wait until it ends" in run(*flags, status=1)
    finally:
        process.kill()
        process.communicate()
    (newest,) = sorted((tmp_path / "it/checkpoints").glob("*.pt"))[-1:]
    out = run(*flags, f"--epochs={int(newest.name[:5]) + 1}")
    assert "resuming" in out and not (tmp_path / "it/.stvit.lock").exists()


@pytest.mark.long
def test_compile_without_a_compiler(folder: Path, tmp_path: Path) -> None:
    flags = [*TRAIN, f"--data-dir={folder / 'data'}", f"--output={tmp_path}", "--epochs=1", "--workers=0", "--compile"]
    out = run("tools/train_cls.py", *flags, status=1, CXX="nowhere", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    assert "error: --compile: torch.compile does not work here" in out
    assert out.splitlines()[-1].endswith("or remove --compile") and "unexpected" not in out


@pytest.mark.long
def test_yolo_training(photos: Path, tmp_path: Path) -> None:
    flags = ["epochs=1", "imgsz=64", "batch=2", "workers=1", "plots=False", "optimizer=AdamW", f"project={tmp_path}"]
    run("tools/yolo.py", "detect", "train", "model=yolo26n-stvit_pico.yaml", f"data={photos}", *flags)
    (best,) = tmp_path.rglob("best.pt")
    out = run("tools/yolo.py", "detect", "val", f"model={best}", f"data={photos}", "imgsz=64", f"project={tmp_path}")
    assert "mAP50" in out


# ---------------------------------------------------------------------------------------------------------------------
# Names and texts


def test_text_files_are_utf8() -> None:
    """All code of the package that opens text files sets an encoding.

    The default of Windows is not UTF-8.
    """
    found = []
    for path in (file for name in ("stvit", "adapters", "configs", "tools") for file in (ROOT / name).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and _opens_text(node):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert found == []


def _opens_text(call: ast.Call) -> bool:
    """Returns whether a call opens, reads or writes a text file without an encoding."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name not in ("open", "read_text", "write_text", "NamedTemporaryFile", "TemporaryFile", "fdopen"):
        return False
    if any(keyword.arg == "encoding" for keyword in call.keywords):
        return False
    if name in ("read_text", "write_text"):
        return True
    owner = getattr(getattr(call.func, "value", None), "id", "")
    if owner in ("os", "Image", "tarfile", "webbrowser", "models", "format", "self") or name == "NamedTemporaryFile":
        return False
    place = 1 if isinstance(call.func, ast.Name) else 0
    modes = [argument for argument in call.args[place:] if isinstance(argument, ast.Constant)]
    modes += [keyword.value for keyword in call.keywords if keyword.arg == "mode"]
    return not any("b" in str(getattr(mode, "value", "")) for mode in modes)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (r'data_dir: "C:\data"', "write Windows paths without quotes, or in single quotes"),
        (r'data_dir: "C:\new\table"', "data_dir contains control characters"),
        (r"data_dir: C:\new\images", None),
        (r"data_dir: 'C:\new\images'", None),
        ("\ufeffdata_dir: C:\\new\\images", None),  # the Windows editor writes UTF-8 with a byte order mark
    ],
)
def test_windows_paths_in_recipes(
    text: str, said: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text, encoding="utf-8")
    if said is None:
        data_dir = train_cls.parse_args([f"--config={recipe}"]).data.data_dir
        assert data_dir == r"C:\new\images"
        # The recipe that a run writes has the same path.
        again = tmp_path / "again.yaml"
        again.write_text(yaml.safe_dump({"data_dir": data_dir}, allow_unicode=True), encoding="utf-8")
        assert train_cls.parse_args([f"--config={again}"]).data.data_dir == data_dir
    else:
        with pytest.raises(SystemExit):
            train_cls.parse_args([f"--config={recipe}"])
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (r"local-dir:C:\models\flowers", "C_models_flowers"),
        ("hf-hub:org/flowers@v1", "org_flowers_v1"),
        ("vit_tiny_patch16_224.augreg_in21k", "vit_tiny_patch16_224.augreg_in21k"),
        ("local-dir:../what?.", "what"),
    ],
)
def test_run_directory_names_are_valid_on_windows(model: str, name: str, tmp_path: Path) -> None:
    """Names contain no path separators and no characters that Windows refuses."""
    config = train_cls.parse_args([f"--model={model}", f"--output={tmp_path}"])
    with PathLock() as lock:
        folder, _ = find_run(config.run, to_recipe(config), run_label(model, 32), lock)
    assert folder.parent == tmp_path and folder.name.split("-", 2)[2] == f"{name}-32"


def test_card_of_a_windows_folder(tmp_path: Path) -> None:
    """The Python code of a card escapes the backslashes of the path."""
    hub.save(stvit.create_model("test_stvit", num_classes=2), tmp_path)
    name = r"local-dir:C:\Users\new\flowers"
    card = model_card(tmp_path, name)
    code = card.partition("```python\n")[2].partition("```")[0]
    values = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    assert values.count(name) == 2


def test_model_files_of_ultralytics_keep_backslashes(tmp_path: Path) -> None:
    from stvit.adapters.yolo.config import write_config

    row = [-1, 1, "TimmBackbone", [64, "test_stvit", [1, 2, 3], {"path": r"C:\new\table", "text": NAME}]]
    path = write_config({"nc": 2, "backbone": [row], "head": []}, tmp_path / "model.yaml")
    assert yaml.safe_load(path.read_text(encoding="utf-8"))["backbone"][0] == row


def test_shards_on_a_drive(own_digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """webdataset treats C:/shards/x.tar as a URL.

    On Linux, a folder named 'C:' stands for the drive.
    """
    shards = tmp_path / "C:/shards"
    shards.mkdir(parents=True)
    flags = as_shards(own_digits_folder, shards)
    monkeypatch.chdir(tmp_path)
    flags = [flag.replace(str(shards), "C:/shards") for flag in flags]
    assert train_cls.main([*TRAIN, *flags, "--workers=0", "--epochs=1", "--experiment=it"]) == 0
    assert (tmp_path / "runs/it/best/model.safetensors").exists()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] data. DefaultCPUAllocator: not enough memory: you tried to…"),
    ],
)
def test_out_of_memory_on_every_device(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(_: argparse.Namespace) -> None:
        raise error

    assert cli.run(fail, argparse.Namespace()) == 1
    assert "error: out of memory: lower --batch-size" in capsys.readouterr().err


def test_names_that_differ_only_in_case_get_separate_folders(tmp_path: Path) -> None:
    images = [tmp_path / name for name in ("a.jpg", "A.png", "b.jpg")]
    folders = pictures.output_folders(tmp_path, images, tmp_path / "out")
    assert [folder.name for folder in folders] == ["a.jpg", "A.png", "b"]
    assert len({folder.name.casefold() for folder in folders}) == 3


# ---------------------------------------------------------------------------------------------------------------------
# mps


def test_unsupported_uses_of_mps_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CommandError, match="--model-dtype float64: mps computes in float32"):
        check_dtype(torch.device("mps"), "float64")
    check_dtype(torch.device("mps"), "float32")
    if not torch.backends.mps.is_available():
        assert train_cls.main(["--dataset=sklearn/digits", "--device=mps"]) == 1
        assert "--device mps cannot be used" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(CommandError, match="--device mps is for one process"), join_processes("mps"):
        pass


def test_benchmark_waits_for_mps() -> None:
    """The benchmark synchronizes the device.

    Otherwise it would time only the launches.
    """
    if torch.backends.mps.is_available():
        measure.synchronize(torch.device("mps"))
    else:
        with pytest.raises(RuntimeError):  # PyTorch was called
            measure.synchronize(torch.device("mps"))

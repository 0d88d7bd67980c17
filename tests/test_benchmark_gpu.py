"""Tests of `stvit benchmark gpu`: that it measures everything, survives failures and ends in time."""

import csv
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stvit.tools import benchmark
from stvit.tools.benchmarks import candidate_times, gpu, gpu_run, steps
from stvit.tools.benchmarks.config import GpuConfig
from stvit.tools.benchmarks.models import Case, input_shape, make_module
from stvit.tools.benchmarks.remote import Failure, Iteration, Remote

ROOT = Path(__file__).parents[1]


def read(table: Path) -> list[dict[str, str]]:
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


# The whole run


@pytest.mark.long
def test_everything_runs_on_a_cpu_without_installation(tmp_path: Path) -> None:
    """The package is a folder of links, as `make lint` makes it, and matplotlib is missing."""
    package, missing = tmp_path / "path/stvit", tmp_path / "path/matplotlib"
    missing.mkdir(parents=True)
    (missing / "__init__.py").write_text("raise ImportError('missing')")
    package.mkdir()
    for source in [*(ROOT / "stvit").iterdir(), *(ROOT / name for name in ("adapters", "configs", "tools"))]:
        (package / source.name).symlink_to(source)
    environment = {
        **os.environ,
        "PYTHONPATH": str(package.parent),
        "CUDA_VISIBLE_DEVICES": "",
        "TRITON_INTERPRET": "1",  # of the block sizes only: models are slow in the interpreter
        "STVIT_OPS_BACKEND": "reference",
    }
    output = tmp_path / "output"
    command = [sys.executable, "-m", "stvit.tools.benchmark", "gpu", f"--output={output}", "--minutes=8"]
    done = subprocess.run(
        [*command, "--no-compile"], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    tables = {path.stem: read(path) for path in output.glob("*.csv")}
    assert set(tables) == {"models", "training", "latency", "kernels", "operator", "yolo", "yolo_training"}
    summary = (output / "summary.md").read_text()
    for name, rows in tables.items():
        assert f"\n{name}: " in done.stdout and f"\n## {name}\n" in summary
        for row in rows:
            assert all(row[key] for key in ("date", "device", "torch", "triton", "command"))
            assert row.get("failure", "") == ""
    assert [(row["model"], row["way"]) for row in tables["models"]] == [
        *(("test_stvit", way) for way in ("published", "eager", "optimized")),
        ("test_convnext", "eager"),
    ]
    steps_of_models = [
        row for name in ("models", "training", "latency", "yolo", "yolo_training") for row in tables[name]
    ]
    for row in steps_of_models:
        assert row["sizes"] == "tiny, for a test without a GPU"
        assert 0 < float(row["slowest"]) <= float(row["images_per_second"]) <= float(row["fastest"])
        assert int(row["steps"]) >= gpu_run.ROUNDS
        if not row["model"].endswith(".yaml"):
            assert 1e-4 < float(row["relative_error"]) < 0.1
    assert {row["batch_size"] for row in tables["latency"]} == {"1"}
    first = tables["models"][0]
    assert float(first["to_published"]) == 1.0
    ratio = float(first["images_per_second"]) / float(tables["models"][-1]["images_per_second"])
    assert float(first["to_peer"]) == pytest.approx(ratio, rel=0.01)
    (kernel,) = (row for row in tables["kernels"] if row["kernel"] == "mean" and row["default"])
    assert float(kernel["microseconds"]) > 0 and kernel["to_default"] == "1.0"
    assert tables["operator"][0]["forward_mb"] == "104.4"
    for name in ("inference_optimized", "training_eager"):
        header, *lines = (output / f"profile_{name}.txt").read_text().splitlines()
        assert header.startswith("test_stvit, ") and any(line.startswith("command: stvit") for line in lines)
        titles = [i for i, line in enumerate(lines) if line.endswith("  name")]
        host = next(i for i, line in enumerate(lines) if line.startswith("The host queues a step in "))
        kernels, functions = lines[titles[0] + 1 : host - 1], lines[titles[1] + 1 :]
        for top in (kernels, functions):
            milliseconds = [float(line.split()[0]) for line in top]
            assert len(top) == 25 and milliseconds == sorted(milliseconds, reverse=True) and milliseconds[0] > 0
        assert "aten::" in kernels[0]
        assert any(re.search(r"nn/modules/module.py:\d+$", line) for line in functions)


@pytest.mark.long
def test_compiled_steps(tmp_path: Path) -> None:
    flags = ["--minutes=9", "--device=cpu", "--parts", "models", "training"]
    assert benchmark.main(["gpu", f"--output={tmp_path}", *flags]) == 0
    for table in ("models_compiled", "training_compiled"):
        rows = {(row["model"], row["way"]): row for row in read(tmp_path / f"{table}.csv")}
        row = rows["test_stvit", "compiled"]
        assert row["failure"] == "" and float(row["images_per_second"]) > 0 and float(row["to_peer"]) > 0
    assert 1e-4 < float(read(tmp_path / "models_compiled.csv")[0]["relative_error"]) < 0.1


@pytest.mark.parametrize("minutes", [0.1, 0.2])
def test_the_run_ends_in_time(minutes: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line names each skipped table.

    A step that is not ready has a row with the reason.
    """
    start = time.monotonic()
    assert benchmark.main(["gpu", f"--output={tmp_path}", f"--minutes={minutes}", "--no-compile", "--device=cpu"]) == 0
    assert time.monotonic() - start < 60 * minutes + 3  # the last processes may take a while to end
    printed, summary = capsys.readouterr().out, (tmp_path / "summary.md").read_text()
    for name in ("models", "training", "latency", "kernels", "operator", "yolo", "profile"):
        assert re.search(rf"^(## |- |- `){name}", summary, re.M), name
    assert "skipped, it takes at least" in summary and "skipped, it takes at least" in printed


def test_wrong_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/models.csv").touch()
    (tmp_path / "file").touch()
    for flags, message in (
        ([f"--output={tmp_path / 'full'}"], "is not empty; choose a new folder"),
        ([f"--output={tmp_path / 'file'}"], "cannot write --output"),
        ([f"--output={tmp_path / 'new'}", "--device=meta"], "pass cuda, or cpu to try everything at tiny sizes"),
        ([f"--output={tmp_path / 'new'}", "--device=xla"], "--device xla is not available: "),
    ):
        assert benchmark.main(["gpu", "--device=cpu", *flags]) == 1
        line = capsys.readouterr().err.splitlines()[-1]
        assert message in line and len(line) < 300
    assert not (tmp_path / "new").exists()
    for flags in (["--minutes=0"], ["--parts", "model"], []):
        with pytest.raises(SystemExit):
            benchmark.main(["gpu", *flags, *([f"--output={tmp_path / 'new'}"] if flags else [])])


# Failures


class Unstable:
    """An object whose methods fail in several ways."""

    def __init__(self, first: int = 0) -> None:
        self.first, self.calls = first, 0

    def prepare(self) -> dict[str, Any]:
        self.calls += 1
        if self.calls == 1:
            raise RuntimeError("CUDA out of memory.\nTried to allocate 20.00 GiB")
        return {"step_seconds": 0.01, "tb_per_second": 2.5}

    def turn(self, seconds: float) -> list[float]:
        return [seconds]

    def crash(self) -> None:
        os._exit(3)

    def sleep(self) -> None:
        time.sleep(60)


class Broken(Unstable):
    """Cannot be prepared."""

    def prepare(self) -> dict[str, Any]:
        raise ValueError("no such kernel")


class Crashing(Unstable):
    """Ends its process in a turn."""

    def prepare(self) -> dict[str, Any]:
        return {"step_seconds": 0.01}

    def turn(self, seconds: float) -> list[float]:
        os._exit(3)


class Timer(Unstable):
    """Times four candidates.

    The second one ends the process, and the third one fails.
    """

    def prepare(self) -> dict[str, Any]:
        return {"tb_per_second": 2.5}

    def peek(self) -> dict[str, Any] | None:
        self.first += 1
        default = "yes" if self.first == 1 else ""
        return {"kernel": "k", "shape": "s", "blocks": str(self.first), "default": default} if self.first < 5 else None

    def measure(self) -> dict[str, Any]:
        if self.first == 2:
            os._exit(3)
        if self.first == 3:
            raise ValueError("too many registers")
        return {name: 4.0 / self.first for name in gpu.MEASURED}


def test_remote_objects(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    remote = Remote(Unstable, log=log)
    with pytest.raises(Failure, match=r"^RuntimeError: CUDA out of memory. Tried to allocate 20.00 GiB$"):
        remote.call("prepare", seconds=60)
    assert remote.call("prepare", seconds=60)["tb_per_second"] == 2.5  # the same object
    with pytest.raises(Failure, match="ended with exit code 3; see"):
        remote.call("crash", seconds=60)
    assert not remote.is_alive()
    remote = Remote(Unstable, log=log)
    start = time.monotonic()
    with pytest.raises(Failure, match="no result within 1 s"):
        remote.call("sleep", seconds=1)
    assert time.monotonic() - start < 5 and not remote.is_alive()
    items = Remote(Iteration, range, 2, log=log)
    assert [items.call("next", seconds=60) for _ in range(3)] == [0, 1, None]
    items.close()
    items.close()
    assert "Traceback" in log.read_text()


def start(tmp_path: Path) -> gpu_run.Run:
    return gpu_run.Run(GpuConfig(output=str(tmp_path / "output"), device="cpu", minutes=2))


def test_a_failed_step_does_not_end_the_run(tmp_path: Path) -> None:
    run = start(tmp_path)
    jobs = [gpu_run.Job(kind, ()) for kind in (Unstable, Broken, Crashing)]
    run.prepare(jobs, 60)
    assert [job.failure for job in jobs] == ["", "ValueError: no such kernel", ""]  # out of memory is tried again
    run.measure(jobs)
    run.close()
    assert [len(job.times) for job in jobs] == [gpu_run.ROUNDS, 0, 0]
    assert jobs[2].failure.startswith("the process ended with exit code 3")


def test_steps_that_are_not_ready_in_time(tmp_path: Path) -> None:
    run = start(tmp_path)
    job = gpu_run.Job(Unstable, ())
    run.prepare([job], 0)
    run.measure([job])
    assert job.failure == "not ready after 0 s" and job.remote is None


def test_candidates_after_a_failed_one_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "CandidateTimer", Timer)
    rows = gpu._time_candidates(start(tmp_path))
    assert [row["microseconds"] for row in rows] == [4.0, "", "", 1.0]
    assert [row["to_default"] for row in rows] == [1.0, "", "", 4.0]
    assert "exit code 3" in rows[1]["failure"] and rows[2]["failure"] == "ValueError: too many registers"
    assert all(list(row) == list(rows[0]) for row in rows)
    assert gpu._defaults_and_fastest(rows) == rows
    rows = [{**rows[0], "blocks": str(time), "default": "", "microseconds": time} for time in (3.0, 2.0, 5.0)]
    assert [row["blocks"] for row in gpu._defaults_and_fastest(rows)] == ["2.0"]


def test_candidates_leave_time_for_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "CandidateTimer", Timer)
    run = start(tmp_path)
    left = iter(range(120, 0, -10))
    monkeypatch.setattr(run, "left", lambda: float(next(left)))
    rows = gpu._time_candidates(run)
    assert 1 <= len(rows) < 4 and next(left) > 20
    assert run.notes == [f"kernels: stopped after {len(rows)} candidates to leave time for the rest"]


# Steps


def prepared(case: Case) -> tuple[Any, torch.Tensor]:
    return make_module(case, "cpu"), torch.randn(input_shape(case))


@pytest.mark.parametrize("model", ["test_stvit", "test_convnext"])
@pytest.mark.parametrize(("dtype", "low", "high"), [("float32", 0.0, 1e-5), ("bfloat16", 1e-4, 0.1)])
def test_errors_are_those_beside_float32(model: str, dtype: str, low: float, high: float) -> None:
    ways = ["published", "eager", "optimized"] if model == "test_stvit" else ["eager", "optimized"]
    for way in ways:
        case = Case(model, way, 3, 64, dtype, "cpu")
        step, error = steps.prepare_inference(case, *prepared(case))
        assert step().shape == (3, 1000) and low <= float(error) < high, way
        case = Case(model, way, 3, 64, dtype, "cpu", is_training=True)
        module, image = prepared(case)
        if way != "optimized":
            assert low <= steps.relative_gradient_error(case, module.train(), image) < high, way


def test_graphs_that_are_not_used_are_an_error() -> None:
    case = Case("test_stvit", "graphs", 2, 64, "float32", "cpu")
    with pytest.raises(ValueError, match="no CUDA graph is used: argument 0 is on cpu, expected cuda"):
        steps.prepare_inference(case, *prepared(case))


def test_swin_trains_without_drop_path() -> None:
    case = Case("swin_tiny_patch4_window7_224", "eager", 1, 224, "float32", "cpu", is_training=True)
    _, error = steps.prepare_training(case, *prepared(case))
    assert float(error) < 1e-5


def test_time_of_a_candidate_is_that_without_the_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    """A simulated GPU, on which each flush takes 90 us and each run of the candidate 7 us."""
    clock = [0.0]

    def take(seconds: float) -> None:
        clock[0] += seconds

    def timed(replay: Callable[[], Any]) -> float:
        start = clock[0]
        replay()
        return clock[0] - start

    monkeypatch.setattr(candidate_times, "capture", lambda step: step)
    monkeypatch.setattr(candidate_times, "_time_graph", timed)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    timer = candidate_times.CandidateTimer()
    timer._flush = lambda: take(90e-6)
    assert timer._time_on_gpu(lambda: take(7e-6)) == pytest.approx([7e-6] * candidate_times.REPEATS)
    assert timer._time_on_gpu(lambda: take(0.2)) == pytest.approx([0.2] * candidate_times.REPEATS)


def test_a_wrong_output_has_a_large_error(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("test_stvit", "optimized", 2, 64, "float32", "cpu")
    monkeypatch.setattr(steps, "optimized", lambda module, case: torch.nn.Sequential(module, torch.nn.ReLU()))
    _, error = steps.prepare_inference(case, *prepared(case))
    assert float(error) > 0.1


def test_the_process_server_does_not_use_cuda() -> None:
    """A process that is forked after CUDA was used cannot use it."""
    program = (
        "import torch\n"
        "used = []\n"
        "torch._C._cuda_getDeviceCount = lambda: used.append(1) or 0\n"
        "torch._C._cuda_init = lambda: used.append(1)\n"
        "import stvit.tools.benchmarks.steps\n"
        "assert not used and not torch.cuda.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


# On a GPU


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_run, "Sizes", lambda: gpu_run.TINY)  # stvit_small is not ready in time beside other tests
    start = time.monotonic()
    flags = ["--minutes=0.7", "--parts", "latency", "kernels"]
    assert benchmark.main(["gpu", f"--output={tmp_path}", *flags]) == 0
    assert time.monotonic() - start < 50
    rows = {(row["model"], row["way"]): row for row in read(tmp_path / "latency.csv")}
    for row in rows.values():
        assert row["failure"] == "" and float(row["ms"]) > 0 and float(row["memory_gib"]) > 0
        assert 1e-4 < float(row["relative_error"]) < 0.05
    assert ("test_stvit", "graphs") in rows
    kernels = read(tmp_path / "kernels.csv")
    assert kernels[0]["failure"] == "" and float(kernels[0]["floors"]) > 0.5


@pytest.mark.gpu
def test_on_a_gpu_with_little_time(tmp_path: Path) -> None:
    start = time.monotonic()
    assert benchmark.main(["gpu", f"--output={tmp_path}", "--minutes=0.3"]) == 0
    assert time.monotonic() - start < 25
    assert "models" in (tmp_path / "summary.md").read_text()

"""Runs everything outside the kernels on a GPU: commands, training, detectors, exports, streams, threads and memory.

With a GPU, `make test-gpu` runs these tests. Without one they are skipped. STVIT_TEST_GPU_ON_CPU=1 runs most of them on
the CPU, where it shows mistakes in the tests themselves.
"""

import copy
import csv
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import load_file
from timm.layers.norm_act import convert_sync_batchnorm
from timm.task import ClassificationTask
from torch import nn

import stvit
from stvit.cuda_graphs import why_not_cuda_graph
from stvit.tools import train_cls, validate_cls
from stvit.tools.common.checkpoint import load_checkpoint
from tests.torchrun import torchrun

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
ON_CPU = not HAS_GPU and os.environ.get("STVIT_TEST_GPU_ON_CPU") == "1"
pytestmark = [] if ON_CPU else [pytest.mark.gpu]
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="measures the memory or the streams of a GPU")

SIZE, TRAIN, VAL = 64, 48, 15
# 6 steps in each of two epochs.
RUN = (
    f"--model=test_stvit --img-size={SIZE} --epochs=2 --batch-size=8 --lr=1e-3 --warmup-epochs=0 --log-interval=1 "
    f"--experiment=it --device={DEVICE}"
).split()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of three colors with noise, train/<color>/* and val/<color>/*."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for i in range(TRAIN + VAL):
        pixels = rng.integers(0, 160, (SIZE, SIZE, 3), dtype=np.uint8)
        pixels[..., i % 3] += 60
        path = folder / ("train" if i < TRAIN else "val") / ("red", "green", "blue")[i % 3] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return folder


@pytest.fixture(autouse=True)
def precise() -> Iterator[None]:
    """Computes float32 products in float32.

    TF32 is less exact than what the tests expect.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends.cudnn, "allow_tf32", False)
        yield


def train(data: Path, output: Path, *flags: str) -> Path:
    """Trains in this process and returns the run directory."""
    assert train_cls.main([*RUN, "--workers=0", f"--data-dir={data}", f"--output={output}", *flags]) == 0
    return output / "it"


def read_summary(folder: Path) -> list[dict[str, float]]:
    with (folder / "summary.csv").open(newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def create(**kwargs: Any) -> Any:
    return timm.create_model("test_stvit", **kwargs).to(DEVICE)


def images(batch: int = 2, *size: int) -> torch.Tensor:
    return torch.randn(batch, 3, *(size or (SIZE, SIZE)), device=DEVICE)


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return ((actual.double() - exact).square().mean().sqrt() / exact.std()).item()


# Training


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_training_in_mixed_precision(dtype: str, data: Path, tmp_path: Path) -> None:
    folder = train(
        data, tmp_path, "--amp", f"--amp-dtype={dtype}", "--channels-last", "--grad-checkpointing", "--clip-grad=1",
        "--model-ema", "--model-ema-decay=0.5", "--mixup=0.2", "--cutmix=1", "--drop-path=0.1", "--reprob=0.5",
    )  # fmt: skip
    rows = read_summary(folder)
    assert len(rows) == 2 and all(np.isfinite(list(row.values())).all() for row in rows)
    state = load_checkpoint(sorted((folder / "checkpoints").glob("*.pt"))[-1])
    assert (state["scaler"] is not None) == (dtype == "float16")
    if state["scaler"] is not None:
        assert state["scaler"]["scale"] > 0
    steps = {float(value["step"]) for value in state["optimizer"]["state"].values()}
    assert min(steps) > 0  # the loss scaler skips some
    for name in ("last", "last_ema"):
        weights = load_file(folder / name / "model.safetensors")
        assert all(value.isfinite().all() for value in weights.values())
        assert timm.create_model(f"local-dir:{folder / name}", pretrained=True).num_classes == 3


def test_compiled_training(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled model learns like the plain one.

    On a GPU, training replays CUDA graphs.
    """
    graphs: list[str] = []

    class Counted(torch.cuda.CUDAGraph):
        def replay(self) -> None:
            graphs.append("replay")
            super().replay()

    if HAS_GPU:
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Counted)
    monkeypatch.setattr(torch._inductor.config, "compile_threads", 4)  # other tests run beside this one
    torch._dynamo.reset()
    flags = ["--amp", "--model-ema", "--grad-accum-steps=2", "--no-aug", "--reprob=0", "--channels-last"]
    flags += ["--model-kwargs", "depths=(0,1,1,0)"]  # a block with super tokens and one without
    plain = read_summary(train(data, tmp_path / "plain", *flags))
    compiled = read_summary(train(data, tmp_path / "compiled", *flags, "--compile"))
    # 12 steps forward and backward, of which a few come before the capture.
    assert len(graphs) >= 12 or not HAS_GPU
    for row, wanted in zip(compiled, plain, strict=True):
        for name in ("train_loss", "eval_loss", "ema_loss"):
            assert row[name] == pytest.approx(wanted[name], rel=3e-2), name


# PyTorch has deterministic versions of most operations, which a flag selects.
DETERMINISTIC = """
import sys, torch
torch.use_deterministic_algorithms(True, warn_only=True)
torch.backends.cudnn.deterministic = True
for kind in ("flash", "mem_efficient", "cudnn"):
    getattr(torch.backends.cuda, f"enable_{kind}_sdp")(False)
from stvit.tools import train_cls
sys.exit(train_cls.main())
"""


def start(data: Path, output: Path) -> subprocess.Popen[str]:
    flags = "--amp --model-ema --mixup=0.2 --drop-path=0.1 --workers=1 --checkpoint-steps=2 --resume=auto --epochs=4"
    line = [sys.executable, "-c", DETERMINISTIC, *RUN, *flags.split(), f"--data-dir={data}", f"--output={output}"]
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(
        line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def test_killed_run_resumes_exactly(data: Path, tmp_path: Path) -> None:
    """The result equals that of a run without a break, or is close if two such runs differ."""
    processes = [start(data, tmp_path / name) for name in ("whole", "again", "killed")]
    checkpoints = tmp_path / "killed/it/checkpoints"
    while not list(checkpoints.glob("00001-00000004.pt")):
        assert processes[2].poll() is None, processes[2].communicate()[0]
        time.sleep(0.002)
    os.killpg(processes[2].pid, signal.SIGKILL)
    for process in processes[:2]:
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said
    processes[2].communicate()
    assert processes[2].returncode == -signal.SIGKILL
    said, _ = (process := start(data, tmp_path / "killed")).communicate(timeout=300)
    assert process.returncode == 0 and "resuming" in said, said

    whole, again, killed = (tmp_path / name / "it" for name in ("whole", "again", "killed"))
    files = ("summary.csv", "last/model.safetensors", "last_ema/model.safetensors")
    if all((whole / file).read_bytes() == (again / file).read_bytes() for file in files):
        assert [file for file in files if (whole / file).read_bytes() != (killed / file).read_bytes()] == []
    for row, wanted in zip(read_summary(killed), read_summary(whole), strict=True):
        assert row["lr"] == wanted["lr"]
        for name in ("train_loss", "eval_loss", "ema_loss"):
            assert row[name] == pytest.approx(wanted[name], rel=5e-3), name


def test_validation(data: Path, tmp_path: Path) -> None:
    """Mixed precision on the device gives the results of float32 on the CPU."""
    folder = train(data, tmp_path, "--epochs=1")
    results: list[dict[str, Any]] = []
    for device, flags in ((DEVICE, ["--amp", "--channels-last"]), (DEVICE, []), ("cpu", [])):
        output = tmp_path / f"results{len(results)}"
        line = [f"--checkpoint={folder / 'last'}", f"--data-dir={data}", "--workers=0", "--batch-size=4"]
        assert validate_cls.main([*line, f"--device={device}", f"--output={output}", *flags]) == 0
        results.append(json.loads((output / "results.json").read_text()))
    assert results[1]["loss"] == pytest.approx(results[2]["loss"], rel=1e-4)
    assert results[0]["loss"] == pytest.approx(results[2]["loss"], rel=3e-2)


# Several processes


def test_one_process_of_torchrun(data: Path, tmp_path: Path) -> None:
    backend = "nccl" if HAS_GPU else "gloo"
    flags = ["--workers=1", f"--data-dir={data}", f"--output={tmp_path}", f"--dist-backend={backend}", "--amp"]
    line = [*torchrun(1), "-m", "stvit.tools.train_cls", *RUN, *flags]
    result = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert len(read_summary(tmp_path / "it")) == 2


def test_ddp_and_sync_batch_norm(tmp_path: Path) -> None:
    """One process is no different from a model without both."""
    model = create(num_classes=3).train()
    plain = copy.deepcopy(model)
    device = torch.device(DEVICE, 0) if HAS_GPU else torch.device("cpu")
    dist.init_process_group(
        "nccl" if HAS_GPU else "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        if HAS_GPU:  # PyTorch refuses it on a CPU
            model = convert_sync_batchnorm(model)
            assert any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
        task = ClassificationTask(model, device=device, verbose=False)
        task.prepare_distributed(device_ids=[device] if HAS_GPU else None)
        x, labels = images(4), torch.arange(4, device=DEVICE) % 3
        task(x, labels)["loss"].backward()
        nn.functional.cross_entropy(plain(x), labels).backward()
    finally:
        dist.destroy_process_group()
    for (name, p), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, expected.grad, rtol=1e-3, atol=1e-5, msg=name)


# Detectors


def test_detector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    pytest.importorskip("ultralytics", exc_type=ImportError)
    from ultralytics.engine import trainer

    from stvit.adapters.yolo import YOLO

    # Ultralytics changes it for the whole process. The fixture restores it.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", "0"))
    # It would download a model to compare both precisions.
    monkeypatch.setattr(trainer, "check_amp", lambda model: True)
    monkeypatch.chdir(tmp_path)
    photos = request.getfixturevalue("photos")
    model = YOLO("yolo26n-stvit_pico.yaml")
    model.train(
        data=photos, imgsz=64, epochs=1, batch=4, workers=0, amp=True, plots=False, device=0 if HAS_GPU else "cpu",
        project=str(tmp_path), name="it", exist_ok=True, mosaic=0,
    )  # fmt: skip
    weights = tmp_path / "it/weights/last.pt"
    assert all(x.isfinite().all() for x in YOLO(weights).model.state_dict().values())
    detector, x = YOLO(weights).model.float().eval(), torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        expected = detector(x)[1]["one2many"]["scores"]
        torch.testing.assert_close(
            detector.to(DEVICE)(x.to(DEVICE))[1]["one2many"]["scores"].cpu(), expected, rtol=1e-3, atol=1e-3
        )


# Inference, exports and pictures


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 5e-3)], ids=str
)
@pytest.mark.parametrize("way", ["cast", "autocast"])
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_optimized_model(way: str, cuda_graphs: bool, dtype: torch.dtype, tolerance: float) -> None:
    model, x = create().eval(), images(2, 75, 50)
    exact = copy.deepcopy(model).double().cpu()
    fast = stvit.optimize_for_inference(model, cuda_graphs=cuda_graphs)
    if way == "cast":
        fast = fast.to(dtype)
        x = x.to(dtype)
    with torch.inference_mode(), torch.autocast(DEVICE, dtype, enabled=way == "autocast" and dtype != torch.float32):
        for _ in range(2):
            assert relative_error(fast(x).cpu(), exact(x.double().cpu())) < tolerance
        if cuda_graphs and HAS_GPU:
            assert why_not_cuda_graph(fast, x) == ""


def exported(model: nn.Module, x: torch.Tensor, folder: Path) -> Callable[[torch.Tensor], Any]:
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", max=16)},))
    torch.export.save(program, folder / "model.pt2")
    return torch.export.load(folder / "model.pt2").module()


def scripted(model: nn.Module, x: torch.Tensor, folder: Path) -> Callable[[torch.Tensor], Any]:
    torch.jit.script(model).save(folder / "model.pt")
    return torch.jit.load(folder / "model.pt")


def traced(model: nn.Module, x: torch.Tensor, folder: Path) -> Callable[[torch.Tensor], Any]:
    torch.jit.trace(model, x).save(folder / "model.pt")
    return torch.jit.load(folder / "model.pt")


def in_onnx(dynamo: bool) -> Callable[[nn.Module, torch.Tensor, Path], Callable[[torch.Tensor], Any]]:
    def export(model: nn.Module, x: torch.Tensor, folder: Path) -> Callable[[torch.Tensor], Any]:
        pytest.importorskip("onnx")
        pytest.importorskip("onnxscript")
        onnxruntime = pytest.importorskip("onnxruntime")
        shapes: dict[str, Any] = {"dynamic_axes": {"x": {0: "batch"}}}
        if dynamo:
            shapes = {"dynamic_shapes": ({0: torch.export.Dim("batch", max=16)},)}
        torch.onnx.export(model, (x,), folder / "model.onnx", dynamo=dynamo, input_names=["x"], **shapes)
        session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        return lambda x: torch.from_numpy(session.run(None, {"x": x.cpu().numpy()})[0]).to(DEVICE)

    return export


@pytest.mark.parametrize(
    ("export", "cuda_graphs"),
    [
        pytest.param(exported, False, id="export"),
        pytest.param(scripted, False, id="script"),
        pytest.param(traced, False, id="trace"),
        pytest.param(in_onnx(False), True, id="onnx-graphs"),  # test_cuda_graphs.py has the other formats
        pytest.param(in_onnx(True), False, id="dynamo"),
    ],
)
def test_exports(export: Callable[..., Callable[[torch.Tensor], Any]], cuda_graphs: bool, tmp_path: Path) -> None:
    model = stvit.optimize_for_inference(create().eval(), cuda_graphs=cuda_graphs)
    with torch.no_grad():
        program = export(model, images(3), tmp_path)
        for batch in (3, 5):
            x = images(batch)
            torch.testing.assert_close(program(x), model(x), rtol=1e-3, atol=1e-4)


def test_visualize() -> None:
    model = create().eval()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (75, 90, 3), dtype=np.uint8))
    view = stvit.visualize.super_tokens(model, picture, stage=0)
    expected = stvit.visualize.super_tokens(copy.deepcopy(model).cpu(), picture, stage=0)
    np.testing.assert_allclose(view.association, expected.association, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(view.features, expected.features, rtol=1e-3, atol=1e-4)
    assert view.draw().size == expected.draw().size


# Streams, threads and memory


def stream() -> Any:
    return torch.cuda.stream(torch.cuda.Stream()) if HAS_GPU else nullcontext()


def synchronize() -> None:
    if HAS_GPU:
        torch.cuda.synchronize()


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_streams(cuda_graphs: bool) -> None:
    """Both streams have a long queue, so that their work overlaps."""
    model = stvit.optimize_for_inference(create().eval(), cuda_graphs=cuda_graphs)
    given = [images(8, 128, 128) for _ in range(12)]
    with torch.no_grad():
        expected = [model.forward.plain(x) if cuda_graphs else model(x) for x in given]
        model(given[0])
        synchronize()
        outputs, streams = [], [stream(), stream()]
        for i, x in enumerate(given):
            with streams[i % 2]:
                delay = torch.ones(1500, 1500, device=DEVICE) if HAS_GPU else torch.ones(1)
                for _ in range(3):
                    delay = delay * 0 + delay.sum() * 0
                outputs.append(model(x + delay.flatten()[0]))
        synchronize()
    for y, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_threads(cuda_graphs: bool) -> None:
    model = stvit.optimize_for_inference(create().eval(), cuda_graphs=cuda_graphs)
    given = [images(1 + i % 3) for i in range(24)]
    with torch.no_grad():
        expected = [model.forward.plain(x) if cuda_graphs else model(x) for x in given]
    synchronize()
    outputs: dict[int, torch.Tensor] = {}

    def work(first: int) -> None:
        with torch.inference_mode(), stream():
            for i in range(first, len(given), 2):
                outputs[i] = model(given[i]).cpu()

    threads = [threading.Thread(target=work, args=(first,)) for first in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, wanted in enumerate(expected):
        torch.testing.assert_close(outputs[i], wanted.cpu(), rtol=1e-4, atol=1e-5)


@contextmanager
def limited_memory(more: int) -> Iterator[None]:
    """Context in which this process can allocate only so many bytes more."""
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + more) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@needs_gpu
@pytest.mark.parametrize("way", ["training", "optimized", "CUDA graphs"])
def test_missing_memory(way: str) -> None:
    """After the error the model works and the memory is free."""
    model = create().eval()
    if way != "training":
        model = stvit.optimize_for_inference(model, cuda_graphs=way == "CUDA graphs")

    def run(x: torch.Tensor) -> torch.Tensor:
        with torch.set_grad_enabled(way == "training"):
            y = model(x)
        if way == "training":
            y.sum().backward()
            model.zero_grad()
        return y.detach().clone()

    small, large = images(), images(32, 768, 768)
    expected = run(small)
    run(small)
    gc.collect()
    before = torch.cuda.memory_allocated()
    with limited_memory(200 * 2**20):  # less than one feature map, more than the workspace of matrix products
        with pytest.raises(torch.OutOfMemoryError):
            run(large)
        gc.collect()
        assert torch.cuda.memory_allocated() <= before
        torch.testing.assert_close(run(small), expected, rtol=1e-4, atol=1e-5)
    if way == "CUDA graphs":
        with torch.no_grad():
            assert why_not_cuda_graph(model, small) == ""
            assert why_not_cuda_graph(model, large).startswith("the GPU has too little memory for a graph (")
        del model
        gc.collect()
        torch.cuda.empty_cache()
        assert torch.cuda.memory_allocated() < before


@needs_gpu
def test_a_failed_capture_leaves_a_working_process() -> None:
    """An operation that CUDA cannot capture ends the capture, and nothing else."""

    class Synchronizes(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if len(x) == 2:
                torch.cuda.current_stream().synchronize()
            return 2 * x

    bad = Synchronizes().eval()
    stvit.cuda_graphs.use_cuda_graphs(bad)
    good = stvit.optimize_for_inference(create().eval(), cuda_graphs=True)
    x = images()
    with torch.no_grad():
        expected = good(x)
        for batch in (1, 2, 3, 2, 1):
            given = images(batch)
            assert torch.equal(bad(given), 2 * given)
        assert why_not_cuda_graph(bad, x).startswith("the capture failed (")
        # Other inputs of the same model have graphs.
        assert [why_not_cuda_graph(bad, images(batch)) for batch in (1, 3)] == ["", ""]
        for batch in (1, 2, 3):  # later captures work, and memory that other streams used is free again
            torch.testing.assert_close(good(x[:1].expand(batch, -1, -1, -1))[:1], expected[:1], rtol=1e-4, atol=1e-5)
            assert why_not_cuda_graph(good, x[:1].expand(batch, -1, -1, -1)) == ""
    assert torch.rand(3, device=DEVICE).isfinite().all()  # PyTorch's generator no longer captures
    torch.cuda.synchronize()


@needs_gpu
def test_a_graph_keeps_its_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.compile(mode="reduce-overhead")` frees the workspaces of all streams."""
    monkeypatch.setenv("STVIT_OPS_BACKEND", "reference")
    model = timm.create_model("stvit_small").eval().to(DEVICE)
    model, x = stvit.optimize_for_inference(model, cuda_graphs=True), images(1, 224, 224)
    with torch.no_grad():
        expected = model(x)
        torch.cuda.synchronize()
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        filler = torch.zeros(2**28, dtype=torch.uint8, device=DEVICE)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
        assert why_not_cuda_graph(model, x) == "" and not filler.any()

"""Tests exports to the runtimes of phones, boards and servers.

Each file is run by its own runtime and compared with the model in PyTorch. Core ML runs on macOS only, so its tests
look at the converted program.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from torch import nn
from ultralytics.nn.autobackend import AutoBackend

from stvit.adapters.yolo import YOLO
from stvit.adapters.yolo.engine import check_format

ODD = (1, 3, 97, 130)
Runtime = Callable[[torch.Tensor], torch.Tensor]
each_classifier = pytest.mark.parametrize("name", ["test_stvit", "test_convnext"])


def create(name: str) -> nn.Module:
    kwargs: dict[str, Any] = {}
    if name == "test_stvit":  # one stage of super tokens in rectangular cells, one of full attention
        kwargs = {"dims": (32, 32), "depths": (1, 1), "num_heads": (1, 2), "stoken_size": ((3, 5), 1), "n_iter": 2}
    return timm.create_model(name, num_classes=10, **kwargs).eval().requires_grad_(False)


def assert_same(file: Runtime, model: nn.Module, tolerance: float, *shapes: tuple[int, ...]) -> None:
    """Compares outputs, with a tolerance in standard deviations."""
    for shape in shapes:
        x = torch.rand(shape)
        wanted, got = model(x), file(x)
        assert got.shape == wanted.shape
        assert (got - wanted).abs().max() <= tolerance * wanted.std(), shape


@pytest.fixture
def coremltools(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Module coremltools with a patch.

    Version 9.0 with numpy 2.4 cannot convert an array of one element to a number.
    """
    coremltools = pytest.importorskip("coremltools")
    from coremltools.converters.mil import Builder
    from coremltools.converters.mil.frontend.torch import ops

    cast = ops._cast

    def cast_arrays(context: Any, node: Any, dtype: Any, dtype_name: str) -> None:
        (x,) = ops._get_inputs(context, node, expected=1)
        if isinstance(x.val, np.ndarray) and x.val.size == 1:
            context.add(Builder.const(val=dtype(x.val.item()), name=node.name), node.name)
        else:
            cast(context, node, dtype, dtype_name)

    monkeypatch.setattr(ops, "_cast", cast_arrays)
    return coremltools


def assert_core_ml_supports(program: Any) -> None:
    """Checks that tensors have at most five axes and that attention is exported.

    Core ML supports five axes.
    """
    outputs = [output for operation in program.functions["main"].operations for output in operation.outputs]
    assert max(len(output.shape) for output in outputs if hasattr(output, "shape")) <= 5
    assert {"matmul", "softmax"} <= {operation.op_type for operation in program.functions["main"].operations}


# Classifiers


@each_classifier
def test_torchscript_trace(name: str, tmp_path: Path) -> None:
    model = create(name)
    torch.jit.trace(model, torch.rand(ODD)).save(tmp_path / "model.pt")
    assert_same(torch.jit.load(tmp_path / "model.pt"), model, 1e-4, ODD, (2, 3, 64, 64), (3, 3, 33, 259))


@each_classifier
def test_onnx_of_the_older_exporter(name: str, tmp_path: Path) -> None:
    model, path = create(name), tmp_path / "model.onnx"
    axes = {"dynamic_axes": {"x": {0: "batch", 2: "height", 3: "width"}}}
    torch.onnx.export(model, (torch.rand(2, *ODD[1:]),), path, dynamo=False, input_names=["x"], **axes)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])

    assert_same(run, model, 1e-4, ODD, (2, 3, 64, 64), (3, 3, 33, 259))


@each_classifier
def test_openvino(name: str) -> None:
    openvino = pytest.importorskip("openvino")
    model = create(name)
    converted = openvino.convert_model(model, example_input=torch.rand(ODD))
    compiled = openvino.compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert_same(lambda x: torch.from_numpy(compiled(x.numpy())[0]), model, 1e-4, ODD, (2, 3, 64, 64), (3, 3, 33, 259))


@each_classifier
def test_ncnn(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ncnn, pnnx = pytest.importorskip("ncnn"), pytest.importorskip("pnnx")
    monkeypatch.chdir(tmp_path)  # pnnx writes files there
    model = create(name)
    pnnx.export(model, "model.pt", inputs=torch.rand(ODD), fp16=False)
    net = ncnn.Net()
    assert net.load_param("model.ncnn.param") == 0 and net.load_model("model.ncnn.bin") == 0

    def run(x: torch.Tensor) -> torch.Tensor:
        with net.create_extractor() as extractor:
            extractor.input(net.input_names()[0], ncnn.Mat(x[0].numpy()).clone())
            return torch.from_numpy(np.array(extractor.extract(net.output_names()[0])[1]))[None]

    assert_same(run, model, 1e-2, ODD)  # ncnn approximates GELU


def test_core_ml(coremltools: Any) -> None:
    model = create("test_stvit")
    traced = torch.jit.trace(model, torch.rand(ODD))
    inputs = [coremltools.TensorType("x", shape=ODD)]
    converted = coremltools.convert(traced, inputs=inputs, convert_to="mlprogram", skip_model_load=True)
    assert list(converted.get_spec().description.output[0].type.multiArrayType.shape) == [1, 10]
    assert_core_ml_supports(converted._mil_program)


def test_core_ml_of_another_model(coremltools: Any) -> None:
    traced = torch.jit.trace(create("test_convnext"), torch.rand(ODD))
    inputs = [coremltools.TensorType("x", shape=ODD)]
    converted = coremltools.convert(traced, inputs=inputs, convert_to="mlprogram", skip_model_load=True)
    assert list(converted.get_spec().description.output[0].type.multiArrayType.shape) == [1, 10]


# Detectors

SMALL = """
nc: 2
scales:
  n: [0.50, 0.25, 1024]
backbone:
  - [-1, 1, Conv, [32, 3, 2]]
  - [-1, 1, Conv, [64, 3, 4]]
  - [-1, 1, StokenAttention, [c2, [3, 5], 2]]
  - [-1, 1, C2STA, [c2, c2, 1, 0.5, 4]]
  - [-1, 1, Conv, [128, 3, 2]]
  - [-1, 1, Conv, [128, 3, 2]]
head:
  - [[3, 4, 5], 1, Detect, [nc]]
"""
SIZE = (64, 96)


def save_detector(name: str, folder: Path) -> Path:
    """Saves a detector with random weights, in which super token attention changes the result."""
    if name == "small":
        (folder / "yolo26n-small.yaml").write_text(SMALL)
        name = str(folder / "yolo26n-small.yaml")
    model = YOLO(name)
    for module in model.model.modules():
        if type(module).__name__ == "SuperTokenAttention":
            nn.init.normal_(module.proj.weight, std=0.1)
    model.save(folder / "model.pt")
    return folder / "model.pt"


def check_detector(name: str, kind: str, folder: Path) -> None:
    pytest.importorskip({"torchscript": "torch", "onnx": "onnx"}.get(kind, kind))
    checkpoint = save_detector(name, folder)
    path = YOLO(checkpoint).export(format=kind, imgsz=SIZE, device="cpu")
    model = YOLO(checkpoint).model.eval()
    if kind == "ncnn":  # Ultralytics exports this branch of the head for formats that cannot select detections
        model.end2end = False
    pixels = torch.rand(1, 3, *SIZE)
    with torch.no_grad():
        wanted = model(pixels)[0]
        found = AutoBackend(path, device=torch.device("cpu"))(pixels)
    found = found[0] if isinstance(found, (list, tuple)) else found
    assert found.shape == wanted.shape
    # OpenVINO uses the fastest precision of the processor.
    torch.testing.assert_close(found[:, :4], wanted[:, :4], rtol=0, atol=0.5 if kind == "openvino" else 2e-3)
    torch.testing.assert_close(found[:, 4:], wanted[:, 4:], rtol=0, atol=2e-2 if kind == "openvino" else 1e-4)


@pytest.mark.parametrize("kind", ["ncnn", "torchscript"])
def test_small_detector(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_detector("small", kind, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["ncnn", "torchscript", "onnx", "openvino"])
@pytest.mark.parametrize("name", ["yolo26n-stvit_pico.yaml", "yolo26n-stokenattention.yaml", "yolo26n.yaml"])
def test_detector(name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_detector(name, kind, tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "small",
        *(
            pytest.param(name, marks=pytest.mark.long)
            for name in ("yolo26n-stvit_pico.yaml", "yolo26n-stokenattention.yaml", "yolo26n.yaml")
        ),
    ],
)
def test_core_ml_of_a_detector(name: str, coremltools: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = YOLO(save_detector(name, tmp_path)).export(format="coreml", imgsz=SIZE, device="cpu")
    spec = coremltools.models.MLModel(str(path), skip_model_load=True).get_spec()
    (function,) = spec.mlProgram.functions.values()
    (block,) = function.block_specializations.values()
    ranks = [output.type.tensorType.rank for operation in block.operations for output in operation.outputs]
    assert max(ranks) <= 5
    assert {"matmul", "softmax"} <= {operation.type for operation in block.operations}


def test_refused_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The export is refused before Ultralytics installs Java and a compiler."""
    monkeypatch.chdir(tmp_path)
    checkpoint = save_detector("small", tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for model, said in (
        (YOLO("yolo26n-stvit_pico.yaml"), "TimmBackbone"),
        (YOLO(checkpoint), "C2STA, StokenAttention"),
    ):
        with pytest.raises(ValueError, match=f"format='imx' is not supported for a model with {said}, because "):
            model.export(format="IMX", imgsz=SIZE, device="cpu")
    assert sorted(tmp_path.rglob("*")) == before
    check_format(YOLO("yolo11n.yaml").model, "imx")  # models of Ultralytics are left to Ultralytics
    check_format(YOLO(checkpoint).model, "onnx")

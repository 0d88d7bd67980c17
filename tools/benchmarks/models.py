"""Speed and memory of models and of super token attention."""

import ast
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import stvit

from ..common.cli import CommandError
from ..common.model import check_img_size, create_model
from .config import MODEL_WAYS, ResolutionConfig, SpeedConfig
from .measure import (
    DTYPES,
    matrix_peak,
    peak_memory,
    percentile,
    require_device,
    significant,
    take_turns,
)
from .published import published
from .variants import optimize_blocks
from .yolo import check_detector_size, create_detector, detection_loss

__all__ = [
    "Case",
    "benchmark_model",
    "benchmark_op",
    "benchmark_resolution",
    "benchmark_train",
    "check_size",
    "count_gmac",
    "count_parameters",
    "input_shape",
    "is_detector",
    "is_ours",
    "make_module",
    "optimized",
    "parse_call",
    "training_step",
]

# Top-1 on ImageNet-1k at 224 pixels in percent, trained only on ImageNet-1k, as published by the authors.
TOP1 = {
    "stvit_small": 83.6,
    "stvit_base": 84.8,
    "stvit_large": 85.3,
    "caformer_s18": 83.6,
    "convnext_tiny": 82.1,
    "davit_tiny": 82.8,
    "focalnet_tiny_lrf": 82.3,
    "hiera_tiny_224": 82.8,
    "mambaout_tiny": 82.7,
    "maxvit_tiny_tf_224": 83.4,
    "rdnet_tiny": 82.8,
    "swin_tiny_patch4_window7_224": 81.3,
    "tiny_vit_21m_224": 83.1,
}


@dataclass(frozen=True)
class Case:
    """One thing to measure: a model, or only the attention of one of its stages.

    Attributes:
        model: Name of the model, or a detector's model file.
        way: One of `MODEL_WAYS`, or of `GPU_WAYS` for `stvit benchmark gpu`.
        batch_size: Images per step.
        img_size: Image height and width in pixels.
        dtype: Precision; in training that of autocast.
        device: Name of the device.
        is_training: Whether a step includes backward and the optimizer.
        stage: Stage whose attention is measured; None for the whole model.
        num_classes: Number of classes; None for that of the model.
        channels_last: Whether the model and the images are channels_last.
    """

    model: str
    way: str
    batch_size: int
    img_size: int
    dtype: str
    device: str
    is_training: bool = False
    stage: int | None = None
    num_classes: int | None = None
    channels_last: bool = False


# ---------------------------------------------------------------------------------------------------------------------
# Subjects


def benchmark_op(config: SpeedConfig) -> Iterator[list[dict[str, Any]]]:
    """Yields tables for the attention of each stage with super tokens.

    Each stage has one table for inference and one for training.
    """
    for img_size in config.img_size:
        for model in config.models:
            net = _create(model, "meta", img_size)
            if not isinstance(net, stvit.STViT):
                raise CommandError(f"--models {model} has no super token attention; pass an STViT model")
            all_stages: Any = net.stages
            tokens = [{block.attn.stoken_size for block in stage.blocks} for stage in all_stages]
            stages = [i for i, sizes in enumerate(tokens) if sizes - {(1, 1)}]
            for stage in stages:
                for is_training in (False, True):
                    cases = [
                        Case(model, way, config.batch_size, img_size, config.dtype, config.device, is_training, stage)
                        for way in MODEL_WAYS
                        if way in config.ways and way in ("published", "eager", "compiled")
                    ]
                    yield _measure(cases, config)


def benchmark_model(config: SpeedConfig) -> Iterator[list[dict[str, Any]]]:
    """Yields a table of inference for each image size."""
    for img_size in config.img_size:
        yield _measure(_cases(config, img_size, MODEL_WAYS), config)


def benchmark_train(config: SpeedConfig) -> Iterator[list[dict[str, Any]]]:
    """Yields a table of training steps for each image size.

    A step is forward, backward and AdamW.
    """
    for img_size in config.img_size:
        yield _measure(_cases(config, img_size, ("published", "eager", "compiled"), is_training=True), config)


def benchmark_resolution(config: ResolutionConfig) -> Iterator[list[dict[str, Any]]]:
    """Yields a table of inference for each image size.

    Large sizes leave out the published formulation.
    """
    for img_size in config.img_size:
        ways = MODEL_WAYS if img_size <= config.published_up_to else MODEL_WAYS[1:]
        yield _measure(_cases(config, img_size, ways), config)


def _cases(config: SpeedConfig, img_size: int, ways: Iterable[str], is_training: bool = False) -> list[Case]:
    """Returns the cases of a table.

    Raises:
        CommandError: If no model supports any of the ways.
    """
    cases = []
    for model in config.models:
        for way in ways:
            if way in config.ways and (way != "published" or is_ours(model)):
                case = Case(model, way, config.batch_size, img_size, config.dtype, config.device, is_training)
                channels_last = config.channels_last and way != "published"
                cases.append(replace(case, num_classes=config.num_classes, channels_last=channels_last))
    if not cases:
        raise CommandError(f"nothing to measure: none of --models supports --ways {' '.join(config.ways)}")
    return cases


def _measure(cases: list[Case], config: SpeedConfig) -> list[dict[str, Any]]:
    """Returns a table with time and memory of all cases.

    Time is measured in turns. Ratios are relative to the first case.
    """
    device = require_device(config.device)
    torch._dynamo.reset()  # each table is compiled for its own sizes
    peak_step, peak_flops = matrix_peak(device, DTYPES[config.dtype])
    steps: dict[str, Callable[[], Any]] = {"matrix": peak_step}
    for i, case in enumerate(cases):
        steps[str(i)] = prepare(case)
    times = take_turns(steps, config.repeats, device, config.min_seconds)
    del steps
    peak = peak_flops / statistics.median(times["matrix"])
    baseline = statistics.median(times["0"])
    rows: list[dict[str, Any]] = []
    for i, case in enumerate(cases):
        seconds = times[str(i)]
        median = statistics.median(seconds)
        gmac = count_gmac(case)
        memory = (
            peak_memory(prepare, case, device=device, is_compiled=case.way == "compiled") if config.memory else None
        )
        row = {
            "model": case.model,
            **({"stage": case.stage + 1} if case.stage is not None else {}),
            "way": case.way,
            "step": "training" if case.is_training else "inference",
            "dtype": case.dtype,
            "batch_size": case.batch_size,
            "img_size": case.img_size,
            "params_m": round(count_parameters(case) / 1e6, 2),
            "gmac": significant(gmac),
            "images_per_second": significant(case.batch_size / median),
            "slowest": significant(case.batch_size / max(seconds)),
            "fastest": significant(case.batch_size / min(seconds)),
            "ms_p50": significant(1e3 * median),
            "ms_p90": significant(1e3 * percentile(seconds, 90)),
            "ms_p99": significant(1e3 * percentile(seconds, 99)),
            "ratio": round(baseline / median, 3),
            "matrix": round(2e9 * gmac * (3 if case.is_training else 1) * case.batch_size / median / peak, 3),
            "matrix_gflops": significant(peak / 1e9),
            "memory_mib": round(memory[0]) if memory else "",
            "step_mib": round(memory[1]) if memory else "",
            "memory_ratio": round(memory[1] / rows[0]["step_mib"], 3) if memory and rows else 1.0 if memory else "",
            "top1": TOP1.get(case.model, "") if case.img_size == 224 and case.stage is None else "",
            "steps": len(seconds),
        }
        rows.append(row)
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Steps


def prepare(case: Case) -> Callable[[], Any]:
    """Returns the step of a case, with random weights and pixels.

    Raises:
        CommandError: If the model is unknown, or does not support the case.
    """
    torch.manual_seed(0)
    device, dtype = torch.device(case.device), DTYPES[case.dtype]
    check_size(case)
    if case.is_training and case.dtype == "float16":
        raise CommandError("--dtype float16 is only for inference, because training needs a loss scaler; pass bfloat16")
    module = make_module(case, case.device).train(case.is_training)
    image = torch.randn(input_shape(case), device=device)
    if case.channels_last:
        module = module.to(memory_format=torch.channels_last)
    if case.channels_last or (case.stage is not None and case.way != "published"):  # a stage: as in the model
        image = image.to(memory_format=torch.channels_last)
    if case.is_training:
        return training_step(module, image, case, dtype)
    image = image.to(dtype)
    if case.way == "onnxruntime":
        return _onnxruntime_step(module, image, case)
    module = module.to(dtype).requires_grad_(False)
    if case.way in ("optimized", "compiled") and case.stage is None:
        module = optimized(module, case)
        image = image.to(memory_format=torch.channels_last)
    if case.way == "compiled":
        module = torch.compile(module, dynamic=False, options={"freezing": True})  # type: ignore[assignment]

    def step() -> None:
        with torch.no_grad():
            module(image)

    return step


def check_size(case: Case) -> None:
    """Checks that a model exists and takes images of its size.

    Raises:
        CommandError: If the model is unknown or does not take the size.
    """
    if is_detector(case.model):
        check_detector_size(case.img_size)
    elif case.stage is None:
        check_img_size(_create(case.model, "meta", case.img_size), {"input_size": input_shape(case)[1:]})


def training_step(module: nn.Module, image: torch.Tensor, case: Case, dtype: torch.dtype) -> Callable[[], Any]:
    """Returns a step of a module in training mode: forward, backward and AdamW.

    Args:
        module: Module of the case.
        image: Images (B, 3, H, W) in float32.
        case: The case.
        dtype: Dtype of autocast; float32 for none.
    """
    run = module
    if case.way.startswith("compiled"):
        mode = "reduce-overhead" if case.way == "compiled_graphs" else None
        run = torch.compile(module, dynamic=False, mode=mode)  # type: ignore[assignment]
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)
    target = torch.zeros(case.batch_size, dtype=torch.long, device=image.device)
    if case.stage is not None:
        image.requires_grad_()

    def step() -> None:
        with torch.autocast(image.device.type, dtype) if dtype != torch.float32 else nullcontext():
            output = run(image)
        if case.stage is not None:  # only the attention, without an optimizer
            output.backward(torch.ones_like(output))
            module.zero_grad()
            image.grad = None
            return
        if is_detector(case.model):
            loss = detection_loss(module, output, image)
        else:
            loss = F.cross_entropy(output.float(), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _onnxruntime_step(module: nn.Module, image: torch.Tensor, case: Case) -> Callable[[], Any]:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise CommandError("--ways onnxruntime needs more packages: pip install 'stvit[export]'") from error
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(optimized(module, case), (image,), path, dynamo=True, verbose=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    inputs = {session.get_inputs()[0].name: image.numpy()}
    return lambda: session.run(None, inputs)


def optimized(module: Any, case: Case) -> nn.Module:
    """Returns an optimized copy of a model, or a detector after its `fuse()`."""
    if is_detector(case.model):
        return module.fuse(verbose=False).to(memory_format=torch.channels_last)
    try:
        return optimize_blocks(stvit.optimize_for_inference(module))
    except ValueError:  # torch.fx cannot trace this timm model, so only the memory format changes
        return module.to(memory_format=torch.channels_last)


def make_module(case: Case, device: str) -> nn.Module:
    """Returns the module of a case in evaluation mode, with random weights."""
    model: Any = _create(case.model, device, case.img_size, case.num_classes)
    module: nn.Module = model if case.stage is None else model.stages[case.stage].blocks[0].attn
    return published(module) if case.way == "published" else module.eval()


def input_shape(case: Case) -> tuple[int, int, int, int]:
    """Returns the shape (B, C, H, W) of the input of a case."""
    if case.stage is None:
        return (case.batch_size, 3, case.img_size, case.img_size)
    size = case.img_size
    for _ in range(case.stage + 2):  # the stem halves the size twice, each further stage once
        size = (size + 1) // 2
    module: Any = make_module(case, "meta")
    return (case.batch_size, module.qkv.in_channels, size, size)


def count_parameters(case: Case) -> int:
    """Returns the number of parameters of a case."""
    return sum(parameter.numel() for parameter in make_module(case, "meta").parameters())


def count_gmac(case: Case) -> float:
    """Returns the multiply-adds for one image, in 1e9.

    Only convolutions and matrix products count.
    """
    one = replace(case, way="eager", batch_size=1, dtype="float32", device="cpu", is_training=False)
    device = "cpu" if is_detector(case.model) else "meta"  # a detector's head reads values
    module, image = make_module(one, device), torch.zeros(input_shape(one), device=device)
    # The counter does not know all fused attention kernels.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        module(image)
    return counter.get_total_flops() / 2e9


def is_detector(spec: str) -> bool:
    """Returns whether a model is a model file of a detector."""
    return spec.endswith((".yaml", ".yml"))


def is_ours(spec: str) -> bool:
    """Returns whether a model has a published formulation."""
    if is_detector(spec):
        return "-stvit" in spec or "-stokenattention" in spec
    return parse_call(spec)[0].startswith(("stvit_", "test_stvit"))


def _create(spec: str, device: str, img_size: int, num_classes: int | None = None) -> nn.Module:
    if is_detector(spec):
        return create_detector(spec).to(device)
    name, kwargs = parse_call(spec)
    return create_model(name, img_size=img_size, num_classes=num_classes, model_kwargs=kwargs).to(device)


def parse_call(spec: str) -> tuple[str, dict[str, Any]]:
    """Returns the name and the arguments of a model, written like a Python call."""
    try:
        call = ast.parse(spec, mode="eval").body
        if isinstance(call, ast.Name):
            return call.id, {}
        assert isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.args
        return call.func.id, {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, AssertionError) as error:
        raise CommandError(f"--models {spec!r} must be a name, or 'NAME(key=value)' with Python literals") from error

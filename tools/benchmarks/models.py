"""Speed and memory of models and of super token attention, beside the published formulation and timm's models."""

import argparse
import ast
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import stvit
from stvit.tools.benchmarks.measure import (
    DTYPES,
    matrix_peak,
    peak_memory,
    percentile,
    require_device,
    significant,
    take_turns,
)
from stvit.tools.benchmarks.published import published
from stvit.tools.benchmarks.yolo import check_detector_size, create_detector, detection_loss
from stvit.tools.common.cli import CommandError, Parser, Switch, above_zero, count, positive
from stvit.tools.common.model import check_img_size, create_model

__all__ = [
    "add_model_flags",
    "add_op_flags",
    "add_resolution_flags",
    "add_train_flags",
    "benchmark_model",
    "benchmark_op",
    "benchmark_resolution",
    "benchmark_train",
]

# The ways to run a model, in the order in which they stand in a table; the first is the baseline.
WAYS = ("published", "eager", "optimized", "compiled", "onnxruntime")
# Top-1 on ImageNet-1k at 224 pixels, trained on it alone, in percent: as their authors published it.
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
    """What one step runs: whole models, or with `stage` the attention of one of a model's stages alone."""

    model: str
    way: str
    batch_size: int
    img_size: int
    dtype: str
    device: str
    is_training: bool = False
    stage: int | None = None


# ---------------------------------------------------------------------------------------------------------------------
# Flags


def add_op_flags(parser: Parser) -> None:
    """Flags of the subject op."""
    _add_common_flags(parser, ["stvit_small"], ["published", "eager", "compiled"], [224], 8)


def add_model_flags(parser: Parser) -> None:
    """Flags of the subject model."""
    _add_common_flags(parser, ["stvit_small"], ["published", "eager", "optimized", "compiled"], [224], 8)


def add_train_flags(parser: Parser) -> None:
    """Flags of the subject train."""
    _add_common_flags(parser, ["stvit_small"], ["published", "eager", "compiled"], [224], 16)


def add_resolution_flags(parser: Parser) -> None:
    """Flags of the subject resolution."""
    sizes = [224, 320, 448, 640, 896, 1024, 1536, 2048]
    _add_common_flags(parser, ["stvit_small"], ["published", "eager", "optimized"], sizes, 1)
    parser.add_argument(
        "--published-up-to", type=count, default=1536, metavar="N", help="largest size for the published formulation"
    )


def _add_common_flags(parser: Parser, models: list[str], ways: list[str], sizes: list[int], batch_size: int) -> None:
    parser.add_argument(
        "--models",
        nargs="+",
        default=models,
        metavar="NAME",
        help="of timm, with arguments 'NAME(key=value)', or a YOLO's .yaml",
    )
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=ways, help="of which each model takes those it can")
    parser.add_argument("--img-size", type=positive, nargs="+", default=sizes, metavar="N", help="height and width")
    parser.add_argument("--batch-size", "-b", type=positive, default=batch_size, metavar="N", help="images of a step")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="in training: autocast")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--repeats", type=positive, default=7, metavar="N", help="turns that each has")
    parser.add_argument(
        "--min-seconds", type=above_zero, default=0.2, metavar="S", help="shorter steps are repeated within a turn"
    )
    parser.add_argument(
        "--memory", action=Switch, default=True, help="measure memory in new processes (not on Windows)"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Subjects


def benchmark_op(args: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """The attention of each stage that has super tokens, forward alone and with backward."""
    for img_size in args.img_size:
        for model in args.models:
            net = _create(model, "meta", img_size)
            if not isinstance(net, stvit.STViT):
                raise CommandError(f"--models {model} has no super token attention: benchmark op is for STViT's stages")
            all_stages: Any = net.stages
            stages = [i for i, stage in enumerate(all_stages) if stage.blocks[0].attn.stoken_size != (1, 1)]
            for stage in stages:
                for is_training in (False, True):
                    cases = [
                        Case(model, way, args.batch_size, img_size, args.dtype, args.device, is_training, stage)
                        for way in WAYS
                        if way in args.ways and way in ("published", "eager", "compiled")
                    ]
                    yield _measure(cases, args)


def benchmark_model(args: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """Inference, all models and ways in turn."""
    for img_size in args.img_size:
        yield _measure(_cases(args, img_size, WAYS), args)


def benchmark_train(args: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """Training steps: forward, backward, AdamW."""
    for img_size in args.img_size:
        yield _measure(_cases(args, img_size, ("published", "eager", "compiled"), is_training=True), args)


def benchmark_resolution(args: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """Inference of one size after the other."""
    for img_size in args.img_size:
        ways = WAYS if img_size <= args.published_up_to else WAYS[1:]
        yield _measure(_cases(args, img_size, ways), args)


def _cases(args: argparse.Namespace, img_size: int, ways: Iterable[str], is_training: bool = False) -> list[Case]:
    cases = []
    for model in args.models:
        is_ours = _is_ours(model)
        for way in ways:
            if way in args.ways and (is_ours or way != "published"):
                cases.append(Case(model, way, args.batch_size, img_size, args.dtype, args.device, is_training))
    if not cases:
        raise CommandError(f"nothing to measure: none of --models can be run so: --ways {' '.join(args.ways)}")
    return cases


def _measure(cases: list[Case], args: argparse.Namespace) -> list[dict[str, Any]]:
    """One table: all cases in turns, and memory after that; ratios are to the first."""
    device = require_device(args.device)
    torch._dynamo.reset()  # each table is compiled for its own sizes
    peak_step, peak_flops = matrix_peak(device, DTYPES[args.dtype])
    steps: dict[str, Callable[[], Any]] = {"matrix": peak_step}
    for i, case in enumerate(cases):
        steps[str(i)] = prepare(case)
    times = take_turns(steps, args.repeats, device, args.min_seconds)
    del steps
    peak = peak_flops / statistics.median(times["matrix"])
    baseline = statistics.median(times["0"])
    rows: list[dict[str, Any]] = []
    for i, case in enumerate(cases):
        seconds = times[str(i)]
        median = statistics.median(seconds)
        gmac = _gmac(case)
        memory = peak_memory(prepare, case, device=device, is_compiled=case.way == "compiled") if args.memory else None
        row = {
            "model": case.model,
            **({"stage": case.stage + 1} if case.stage is not None else {}),
            "way": case.way,
            "step": "training" if case.is_training else "inference",
            "dtype": case.dtype,
            "batch_size": case.batch_size,
            "img_size": case.img_size,
            "params_m": round(sum(p.numel() for p in _module(case, "meta").parameters()) / 1e6, 2),
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
# What a step runs


def prepare(case: Case) -> Callable[[], Any]:
    """The step of a case, on random pixels: neither they nor the weights change the time.

    Raises:
        CommandError: If there is no such model, or it cannot be run so.
    """
    torch.manual_seed(0)
    device, dtype = torch.device(case.device), DTYPES[case.dtype]
    if _is_detector(case.model):
        check_detector_size(case.img_size)
    elif case.stage is None:
        check_img_size(_create(case.model, "meta", case.img_size), {"input_size": _input_shape(case)[1:]})
    if case.is_training and case.dtype == "float16":
        raise CommandError("--dtype float16 is for inference: training under it wants a loss scaler, take bfloat16")
    module = _module(case, case.device).train(case.is_training)
    image = torch.randn(_input_shape(case), device=device)
    if case.stage is not None and case.way != "published":
        image = image.to(memory_format=torch.channels_last)  # as the model's other layers give it
    if case.is_training:
        return _training_step(module, image, case, dtype)
    image = image.to(dtype)
    if case.way == "onnxruntime":
        return _onnxruntime_step(module, image, case)
    module = module.to(dtype).requires_grad_(False)
    if case.way in ("optimized", "compiled") and case.stage is None:
        module = _optimized(module, case)
        image = image.to(memory_format=torch.channels_last)
    if case.way == "compiled":
        module = torch.compile(module, dynamic=False, options={"freezing": True})  # type: ignore[assignment]

    def step() -> None:
        with torch.no_grad():
            module(image)

    return step


def _training_step(module: nn.Module, image: torch.Tensor, case: Case, dtype: torch.dtype) -> Callable[[], Any]:
    run = torch.compile(module, dynamic=False) if case.way == "compiled" else module
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)
    target = torch.zeros(case.batch_size, dtype=torch.long, device=image.device)
    if case.stage is not None:
        image.requires_grad_()

    def step() -> None:
        with torch.autocast(image.device.type, dtype) if dtype != torch.float32 else nullcontext():
            output = run(image)
        if case.stage is not None:  # the attention alone, without an optimizer
            output.backward(torch.ones_like(output))
            module.zero_grad()
            image.grad = None
            return
        if _is_detector(case.model):
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
        raise CommandError("--ways onnxruntime wants its packages: pip install 'stvit[export]'") from error
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(_optimized(module, case), (image,), path, dynamo=True, verbose=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    inputs = {session.get_inputs()[0].name: image.numpy()}
    return lambda: session.run(None, inputs)


def _optimized(module: Any, case: Case) -> nn.Module:
    if _is_detector(case.model):
        return module.fuse(verbose=False).to(memory_format=torch.channels_last)
    try:
        return stvit.optimize_for_inference(module)
    except ValueError:  # a model of timm's that torch.fx cannot trace: what is left is the memory format
        return module.to(memory_format=torch.channels_last)


def _module(case: Case, device: str) -> nn.Module:
    model: Any = _create(case.model, device, case.img_size)
    module: nn.Module = model if case.stage is None else model.stages[case.stage].blocks[0].attn
    return published(module) if case.way == "published" else module.eval()


def _input_shape(case: Case) -> tuple[int, int, int, int]:
    if case.stage is None:
        return (case.batch_size, 3, case.img_size, case.img_size)
    size = case.img_size
    for _ in range(case.stage + 2):  # the stem halves it twice, each further stage once
        size = (size + 1) // 2
    module: Any = _module(case, "meta")
    return (case.batch_size, module.qkv.in_channels, size, size)


def _gmac(case: Case) -> float:
    """Multiplications and additions of convolutions and matrix products for one image, in 1e9 pairs."""
    one = Case(case.model, "eager", 1, case.img_size, "float32", "cpu", stage=case.stage)
    device = "cpu" if _is_detector(case.model) else "meta"  # a detector's head asks for numbers
    module, image = _module(one, device), torch.zeros(_input_shape(one), device=device)
    # Attention by its formula: the fused ones are not all known to the counter.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        module(image)
    return counter.get_total_flops() / 2e9


def _is_detector(spec: str) -> bool:
    return spec.endswith((".yaml", ".yml"))


def _is_ours(spec: str) -> bool:
    """Whether there is a published formulation of it."""
    if _is_detector(spec):
        return "-stvit" in spec or "-stokenattention" in spec
    return _parse(spec)[0].startswith(("stvit_", "test_stvit"))


def _create(spec: str, device: str, img_size: int) -> nn.Module:
    if _is_detector(spec):
        return create_detector(spec).to(device)
    name, kwargs = _parse(spec)
    return create_model(name, img_size=img_size, model_kwargs=kwargs).to(device)


def _parse(spec: str) -> tuple[str, dict[str, Any]]:
    """The name and the arguments of a model, which stand as in a call of Python."""
    try:
        call = ast.parse(spec, mode="eval").body
        if isinstance(call, ast.Name):
            return call.id, {}
        assert isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.args
        return call.func.id, {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, AssertionError) as error:
        raise CommandError(f"--models {spec!r} must be a name, or 'NAME(key=value)' with plain values") from error

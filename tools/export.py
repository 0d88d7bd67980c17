#!/usr/bin/env python3
"""Exports a model, STViT or any of timm's, to ONNX, torch.export or TorchScript, and checks what it wrote.

    python tools/export.py --checkpoint runs/digits --output digits.onnx
    python tools/export.py --checkpoint runs/digits --format onnx torch-export torchscript --output exported
    python tools/export.py --checkpoint hf-hub:ORG/NAME --features --dtype float16 --output features.onnx
    python tools/export.py --checkpoint runs/flowers --dtype int8 --data-dir /data/flowers --output flowers.onnx

`python -m stvit.tools.export` is the same program. A checkpoint is a run of tools/train_cls.py, a folder of
model.safetensors and config.json, a file of weights (ours, timm's or the authors'), or `hf-hub:…`; data are named as
for tools/validate_cls.py.

A file takes float32 `images` (batch, channels, height, width), normalized, and gives float32 `logits` (batch, classes),
or with --features the maps `features_0`, `features_1`, … of the stages, whatever precision it computes in: float16, or
int8, which onnxruntime calibrates on real images. Batch, height and width are free in ONNX and TorchScript; a program
of torch.export serves a range of sizes, which is printed. What a user needs to prepare images goes into the file too:
metadata_props in ONNX, the extra file metadata.json in the others.

Each file is loaded by its own runtime and compared with the PyTorch model at three sizes before it is put in its
place; with data, also over the validation images.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # during the imports Ctrl-C ends the command without a traceback

import argparse
import contextlib
import copy
import importlib
import io
import json
import logging
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import nn

import stvit
from stvit.tools.common.bad_images import BadImages
from stvit.tools.common.cli import CommandError, Parser, positive, progress_bar, reason, run
from stvit.tools.common.config import DataConfig, ImageConfig, ModelSource
from stvit.tools.common.data import Images, check_targets, open_images, resolve_data_config
from stvit.tools.common.distributed import Distributed
from stvit.tools.common.evaluation import Batches, add_class_map_argument, class_names, map_classes, mapped
from stvit.tools.common.files import atomic_write
from stvit.tools.common.flags import add_flags, from_flags
from stvit.tools.common.loaders import create_val_loader
from stvit.tools.common.model import (
    OpenedModel,
    check_img_size,
    check_num_classes,
    open_model,
)

SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2", "torchscript": ".torchscript"}
# Largest difference from the float32 model that is let pass, in standard deviations of its output. Sums in another
# order differ by 1e-6, float16 by 1e-2. That of int8 only finds files of something else: its price is the accuracy.
TOLERANCES = {"float32": 1e-3, "float16": 0.1, "int8": 2.0}
LEAST_OPSET = 18  # of PyTorch's exporter

# Of images (B, C, H, W), the outputs of a model or of a file.
Outputs = list[torch.Tensor]
Runtime = Callable[[torch.Tensor], Outputs]
Size = tuple[int, int]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status: 0, 1 after an error, 130 after Ctrl-C."""
    logging.getLogger("timm").setLevel(logging.ERROR)
    return run(export, create_parser().parse_args(argv))


def create_parser() -> Parser:
    """The flags, under the names of tools/validate_cls.py."""
    parser = Parser(prog="export.py", description="Exports a model to ONNX, torch.export or TorchScript.")

    group = parser.add_argument_group("model")
    add_flags(group, ModelSource)

    group = parser.add_argument_group("result")
    group.add_argument("--format", nargs="+", default=["onnx"], choices=list(SUFFIXES), help="one or several")
    group.add_argument("--output", default=".", metavar="PATH", help="file to write, or a folder that there is")
    group.add_argument("--features", action="store_true", help="the stages' feature maps, and not the classifier")
    group.add_argument("--dtype", default="float32", choices=list(TOLERANCES), help="to compute in; int8: ONNX alone")
    group.add_argument("--opset", type=positive, metavar="N", help="of ONNX, 18 or more (default: PyTorch's)")
    group.add_argument(
        "--check",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="load the file and compare it with the model at three sizes",
    )

    group = parser.add_argument_group("data, to calibrate int8 and to compare the accuracy")
    add_flags(group, DataConfig, defaults={"batch_size": 16}, omit={"train_split", "validation_batch_size"})
    group.add_argument("--train-split", default="train", metavar="NAME", help="split to calibrate on")
    group.add_argument("--calibration-images", type=positive, default=128, metavar="N", help="how many of it")
    group.add_argument("--seed", "-s", type=int, default=42, metavar="N", help="of the run that held out the digits")
    add_flags(group, ImageConfig)
    add_class_map_argument(group)
    return parser


def export(args: argparse.Namespace) -> None:
    """Exports, checks, puts the files in their place, and compares the accuracy.

    Raises:
        CommandError: If the flags, the model or the data are at fault, or a file is not the model's equal.
    """
    _check_flags(args)
    _check_output(args)
    _check_packages(args)
    opened = _open_model(replace(from_flags(ModelSource, args), img_size=args.img_size), args.features)
    model, name = opened.model, str(opened.model.pretrained_cfg.get("architecture") or opened.name)
    args = argparse.Namespace(**opened.fill(vars(args)))
    data_config = resolve_data_config(vars(args), model, use_test_size=True)
    check_img_size(model, data_config)
    with TemporaryDirectory() as temporary:
        bad_images = BadImages(args.max_bad_images, Path(temporary) / "bad_images.jsonl")
        images = _open_images(args, data_config, bad_images)
        class_map = None
        if images is not None and not args.features:
            class_map = map_classes(
                class_names(args.class_map, model), images.class_names, model.num_classes, _THIS_PROCESS
            )
        shape = "x".join(map(str, data_config["input_size"]))
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        print(f"{args.checkpoint or args.model}: {name}, {parameters:.1f} M parameters, images of {shape}", flush=True)
        source = _Source(model, args.features, args.dtype, data_config["input_size"])
        files = _write(args, source, images, data_config, _metadata(args, model, name, data_config))
        if images is not None:
            loader = create_val_loader(images.val, from_flags(DataConfig, args), data_config, _THIS_PROCESS)
            with progress_bar(len(loader), "batch", True) as bar:
                batches = _readable(mapped(loader, class_map), bar)
                lines = (
                    _compare_features(source, files, batches)
                    if args.features
                    else _compare_accuracy(source, files, batches)
                )
            print("\n".join(lines), flush=True)
        for image in sorted(bad_images.names()):
            print(f"warning: {image} could not be read and was skipped", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# What is exported


def _check_flags(args: argparse.Namespace) -> None:
    others = [kind for kind in args.format if kind != "onnx"]
    if args.dtype == "int8" and others:
        raise CommandError(f"--dtype int8 is for --format onnx, not for {others[0]}: take float16 or float32 there")
    if args.dtype == "int8" and not (args.data_dir or args.dataset):
        raise CommandError("--dtype int8 is calibrated on real images: give --data-dir, or --dataset sklearn/digits")
    if args.opset is not None and others == args.format:
        raise CommandError(f"--opset is of ONNX, and --format {' '.join(args.format)} is not: leave it out")
    if args.opset is not None and args.opset < LEAST_OPSET:
        raise CommandError(
            f"--opset must be at least {LEAST_OPSET}, which is as far back as PyTorch goes: {args.opset}"
        )


def _check_output(args: argparse.Namespace) -> None:
    """Refuses at once what would fail after minutes."""
    output = Path(args.output).expanduser()
    if output.is_dir():
        folder = output
    elif len(set(args.format)) > 1 or args.output.endswith(("/", os.sep)):
        raise CommandError(f"--output {args.output} is not a folder: create it first")
    else:
        folder = output.parent
        wrong = next(
            (kind for kind, suffix in SUFFIXES.items() if output.suffix == suffix != SUFFIXES[args.format[0]]), ""
        )
        if wrong:
            raise CommandError(
                f"--output {args.output} is named like a file of --format {wrong}: give that, or rename it"
            )
    if not folder.is_dir():
        raise CommandError(f"--output {args.output}: there is no folder {folder}, create it first")
    if not os.access(folder, os.W_OK):
        raise CommandError(f"--output {args.output}: nothing can be written to {folder}, choose another folder")


def _check_packages(args: argparse.Namespace) -> None:
    if "onnx" not in args.format:
        return
    needs_runtime = args.check or args.dtype == "int8" or args.data_dir or args.dataset
    for package in ["onnx", "onnxscript", *(["onnxruntime"] if needs_runtime else [])]:
        try:
            importlib.import_module(package)
        except ImportError as error:
            hint = (
                ", or leave the check out with --no-check" if package == "onnxruntime" and args.dtype != "int8" else ""
            )
            raise CommandError(f"--format onnx needs {package}: pip install 'stvit[export]'{hint}") from error


def _path(args: argparse.Namespace, kind: str, name: str) -> Path:
    output = Path(args.output).expanduser()
    if not output.is_dir():
        return output
    details = ["features"] * args.features + [args.dtype] * (args.dtype != "float32")
    return output / ("-".join([name, *details]) + SUFFIXES[kind])


def _open_model(source: ModelSource, features: bool) -> OpenedModel:
    """Opens the model on the CPU, in eval mode; with `features` it returns the feature maps of its stages."""
    opened = open_model(source, **({"features_only": True} if features else {}))
    check_num_classes(source, opened.model)
    opened.model.eval().requires_grad_(False)
    return opened


def _metadata(args: argparse.Namespace, model: Any, name: str, data_config: dict[str, Any]) -> dict[str, Any]:
    """What a user of the file needs to know, in types of JSON."""
    metadata: dict[str, Any] = {"model": name, "dtype": args.dtype}
    if args.features:
        # A model of feature maps has them in the order of its outputs.
        metadata |= {"strides": model.feature_info.reduction(), "channels": model.feature_info.channels()}
    else:
        metadata["num_classes"] = model.num_classes
        names = class_names(args.class_map, model)
        if names is not None:
            metadata["class_names"] = names
    for key in ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode"):
        metadata[key] = list(data_config[key]) if isinstance(data_config[key], tuple) else data_config[key]
    return metadata | {"stvit": stvit.__version__, "torch": str(torch.__version__), "timm": timm.__version__}


class _Classifier(nn.Module):
    """A model that computes in some precision, and takes and gives float32: one interface for every file."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.dtype = dtype

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images.to(self.dtype)).float()


class _Features(_Classifier):
    """The same of a list of maps, which TorchScript wants to be told."""

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:  # type: ignore[override]
        maps: list[torch.Tensor] = self.model(images.to(self.dtype))
        return [each.float() for each in maps]


class _Serves:
    """The image sizes that a file takes.

    Attributes:
        height: Least and greatest, None for no bound.
        width: Likewise.
    """

    def __init__(self, height: tuple[int, int | None], width: tuple[int, int | None]) -> None:
        self.height, self.width = height, width

    def __str__(self) -> str:
        def words(low: int, high: int | None, axis: str) -> str:
            if low == high:
                return f"{axis} {low} alone"
            return f"any {axis}" if low <= 2 and high is None else f"{axis} {low} {f'to {high}' if high else 'or more'}"

        return f"any batch, {words(*self.height, 'height')}, {words(*self.width, 'width')}"

    @property
    def is_bounded(self) -> bool:
        """Whether some size is too large."""
        return self.height[1] is not None or self.width[1] is not None


class _Source:
    """The model to export, and what is made of it once for all formats.

    Attributes:
        model: In float32, the yardstick of every file.
        channels: Of the images.
        size: Height and width of the images that it was made for.
        names: Of the outputs.
    """

    def __init__(self, model: Any, features: bool, dtype: str, input_size: tuple[int, int, int]) -> None:
        wrapper = _Features if features else _Classifier
        self.model = model
        self.channels = input_size[0]
        self.size: Size = input_size[1:]
        self.names = [f"features_{i}" for i in range(len(model.feature_info.channels()))] if features else ["logits"]
        folded = _folded(model)
        if dtype == "float16":
            self.portable = wrapper(folded.half(), torch.float16).eval()
        else:
            self.portable = wrapper(folded, torch.float32).eval()
        self._programs: dict[Size, Any] = {}

    def __call__(self, images: torch.Tensor) -> Outputs:
        """The outputs of the float32 model."""
        with torch.inference_mode():
            return _as_list(self.model(images))

    def takes(self, height: int, width: int) -> bool:
        """Whether the model itself takes such images: some of timm's are of one size."""
        try:
            self(torch.zeros(1, self.channels, height, width))
        except (AssertionError, RuntimeError, ValueError):
            return False
        return True

    def program(self, size: Size) -> tuple[Any, _Serves]:
        """The program of torch.export that is traced at a size, and what it serves."""
        if size not in self._programs:
            auto = torch.export.Dim.AUTO  # which is not refused where a model fixes its size
            dims = {0: torch.export.Dim("batch", min=1), 2: auto, 3: auto}
            example = torch.randn(2, self.channels, *size)
            with _quiet(), _explained("torch.export"):
                program = torch.export.export(self.portable, (example,), dynamic_shapes=(dims,), strict=False)
            for node in program.graph.nodes:
                node.meta.pop("stack_trace", None)  # lines of code, with paths of this machine
            self._programs[size] = program
        program = self._programs[size]
        (images,) = (node for node in program.graph.find_nodes(op="placeholder") if node.name == "images")
        return program, _Serves(*(_range(length, program) for length in images.meta["val"].shape[2:]))

    def widest_program(self) -> tuple[Any, _Serves]:
        """The program that serves the largest sizes.

        Where an image is a single super token the graph is another one than where it is several: a program that is
        traced on small images serves no others.
        """
        for factor in (1, 2, 4):
            size = self.size[0] * factor, self.size[1] * factor
            if factor > 1 and not self.takes(*size):
                break
            program, serves = self.program(size)
            if not serves.is_bounded:
                return program, serves
        return self.program(self.size)


def _folded(model: nn.Module) -> nn.Module:
    """A copy with what is constant folded, where torch.fx can trace the model; the yardstick stays as it is."""
    try:
        return stvit.optimize_for_inference(model)
    except ValueError:
        return copy.deepcopy(model)


def _range(length: Any, program: Any) -> tuple[int, int | None]:
    """The least and the greatest value of a program's size, None for no bound."""
    if isinstance(length, int):
        return length, length
    expression = length.node.expr
    if expression.is_number:
        return int(expression), int(expression)
    bounds = program.range_constraints.get(expression)
    if bounds is None:  # a multiple of something
        return 1, None
    return int(bounds.lower), int(bounds.upper) if bounds.upper < sys.maxsize else None


def _as_list(outputs: Any) -> Outputs:
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps to itself what the libraries print, log and warn of while they work."""
    disabled = logging.root.manager.disable
    silent = io.StringIO()
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Says in one line that a library cannot do it."""
    try:
        yield
    except (CommandError, OSError):
        raise
    except Exception as error:  # a foreign model may fail in any way
        why = reason(error)
        why = why if len(why) <= 300 else f"{why[:300]}…"
        raise CommandError(f"the model cannot be exported by {what}: {type(error).__name__}: {why}") from error


# ---------------------------------------------------------------------------------------------------------------------
# What is written


def _write(
    args: argparse.Namespace,
    source: _Source,
    images: Images | None,
    data_config: dict[str, Any],
    metadata: Mapping[str, Any],
) -> dict[str, Runtime]:
    """Writes a file of each format, each put in its place when it is found to be right; returns them opened, by name.

    Those that nobody asks to be opened are left out.
    """
    samples = None if images is None else _samples(args, images, data_config)
    quantize = None
    if args.dtype == "int8" and images is not None:
        quantize = partial(_quantized, args=args, images=images, data_config=data_config)
    writers: dict[str, Callable[[_Source, Path, Mapping[str, Any]], _Serves]] = {
        "onnx": partial(_write_onnx, opset=args.opset, quantize=quantize),
        "torch-export": _write_torch_export,
        "torchscript": _write_torchscript,
    }
    paths = {kind: _path(args, kind, metadata["model"]) for kind in dict.fromkeys(args.format)}
    files: dict[str, Runtime] = {}
    for kind, path in paths.items():
        lines: list[str] = []

        def write(fresh: Path, kind: str = kind, path: Path = path, lines: list[str] = lines) -> None:
            serves = writers[kind](source, fresh, metadata)
            lines.append(f"{path}: {kind}, {args.dtype}, {fresh.stat().st_size / 1e6:.1f} MB, {serves}")
            if args.check or images is not None:
                try:
                    files[path.name] = _open(kind, fresh)
                except Exception as error:  # every runtime has its own
                    raise CommandError(
                        f"{path} cannot be loaded again: {reason(error)[:300]}; nothing was written"
                    ) from error
            if args.check:
                lines.append(_check(source, files[path.name], serves, samples, args.dtype, path))

        try:
            atomic_write(path, write)
        except OSError as error:
            raise CommandError(f"cannot write {path}: {reason(error)}") from error
        print("\n".join(lines), flush=True)
    return files


def _write_torchscript(source: _Source, path: Path, metadata: Mapping[str, Any]) -> _Serves:
    with _quiet(), _explained("TorchScript"):
        scripted = torch.jit.script(source.portable)
        content = io.BytesIO()  # on the disk PyTorch would word a full one as an error of its own code
        torch.jit.save(scripted, content, _extra_files={"metadata.json": json.dumps(metadata, indent=2)})
    path.write_bytes(content.getvalue())
    height, width = source.size
    if source.takes(height + 32, width + 64):
        return _Serves((1, None), (1, None))
    return _Serves((height, height), (width, width))


def _write_torch_export(source: _Source, path: Path, metadata: Mapping[str, Any]) -> _Serves:
    program, serves = source.program(source.size)
    metadata = {**metadata, "heights": serves.height, "widths": serves.width}
    content = io.BytesIO()
    with _quiet(), _explained("torch.export"):
        torch.export.save(program, content, extra_files={"metadata.json": json.dumps(metadata, indent=2)})
    path.write_bytes(content.getvalue())
    return serves


def _write_onnx(
    source: _Source,
    path: Path,
    metadata: Mapping[str, Any],
    opset: int | None,
    quantize: Callable[[Any], Any] | None,
) -> _Serves:
    import onnx

    program, serves = source.widest_program()
    with _quiet(), _explained("ONNX"):
        exported = torch.onnx.export(
            program,
            dynamo=True,
            input_names=["images"],
            output_names=source.names,
            opset_version=opset,
            verbose=False,
        )
        assert exported is not None
        proto = exported.model_proto
        _tidy(proto)
        # The graph itself has no least size: its operations take axes of length 1.
        serves = serves if serves.is_bounded else _Serves((1, None), (1, None))
    if quantize is not None:
        proto = quantize(proto)
    with _quiet(), _explained("ONNX"):
        text = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
        del proto.metadata_props[:]
        onnx.helper.set_model_props(proto, text)
        onnx.checker.check_model(proto, full_check=True)
    path.write_bytes(proto.SerializeToString())
    return serves


def _tidy(proto: Any) -> None:
    """Names the free axes, and removes the exporter's notes, which hold paths of this machine."""
    graph = proto.graph
    axes = graph.input[0].type.tensor_type.shape.dim
    names = {dim.dim_param: name for dim, name in zip(axes, ("batch", "channels", "height", "width"), strict=True)}
    names.pop("", None)
    for value in [*graph.input, *graph.output, *graph.value_info]:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(r"\w+", lambda match: names.get(match[0], match[0]), dim.dim_param)
    for part in [graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer]:
        part.doc_string = ""
        del part.metadata_props[:]


def _quantized(proto: Any, args: argparse.Namespace, images: Images, data_config: dict[str, Any]) -> Any:
    """The model with convolutions and linear layers in int8, calibrated on training images.

    Args:
        proto: The model in float32.
        args: The data flags and `calibration_images`.
        images: Of which the training images are taken.
        data_config: How the model wants its images.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    loader = _calibration_loader(args, images, data_config)

    class Reader(CalibrationDataReader):
        def __init__(self, bar: Any) -> None:
            self.batches = iter(loader)
            self.bar = bar

        def get_next(self) -> dict[str, Any] | None:
            for image, target in self.batches:
                self.bar.update()
                if bool((target >= 0).any()):  # not of unreadable images alone
                    return {"images": image[target >= 0].numpy()}
            return None

    with TemporaryDirectory() as temporary, progress_bar(len(loader), "batch", True) as bar:
        reader = Reader(bar)
        path = Path(temporary) / "int8.onnx"
        with _quiet(), _explained("onnxruntime's quantization"):
            quantize_static(
                proto,
                str(path),
                reader,
                quant_format=QuantFormat.QDQ,
                # All weights are in these. Softmax, normalizations, means over super tokens and the products of two
                # activations (association, attention) keep float32: they hold no weights to make smaller.
                op_types_to_quantize=["Conv", "Gemm", "MatMul"],
                extra_options={"MatMulConstBOnly": True},
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                # Weights of 7 bits. CPUs without VNNI add pairs of products of 8 bits in 16, which saturates: the
                # file would give other results there than on newer ones.
                reduce_range=True,
            )
        return onnx.load(str(path))


class _Spread:
    """So many images of a source, evenly from all of it: image folders are sorted by class.

    Args:
        source: That of `ImageDataset`.
        number: How many.
    """

    def __init__(self, source: Any, number: int) -> None:
        self.source = source
        number = min(number, len(source))
        self.places = [i * len(source) // number for i in range(number)]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Any:
        return self.source[self.places[index]]

    def filename(self, index: int, absolute: bool = False) -> str | None:
        """The image's path, None where it has none."""
        if not hasattr(self.source, "filename"):
            return None
        return self.source.filename(self.places[index], absolute=absolute)


def _calibration_loader(args: argparse.Namespace, images: Images, data_config: dict[str, Any]) -> Any:
    samples = images.train
    if not hasattr(samples, "source"):
        raise CommandError("--dtype int8 takes calibration images from all over a set, which wds/ shards do not give")
    samples.source = _Spread(samples.source, args.calibration_images)
    return create_val_loader(samples, from_flags(DataConfig, args), data_config, _THIS_PROCESS)


# ---------------------------------------------------------------------------------------------------------------------
# Whether it is right

_THIS_PROCESS = Distributed(torch.device("cpu"))


def _open(kind: str, path: Path) -> Runtime:
    """The file as its own runtime runs it."""
    with _quiet():
        if kind == "onnx":
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3  # errors alone
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            return lambda images: [torch.from_numpy(y) for y in session.run(None, {"images": images.numpy()})]
        if kind == "torch-export":
            with path.open("rb") as file:
                module = torch.export.load(file).module()
        else:
            module = torch.jit.load(str(path))

    def run(images: torch.Tensor) -> Outputs:
        with torch.inference_mode():
            return _as_list(module(images))

    return run


def _check(
    source: _Source, file: Runtime, serves: _Serves, samples: torch.Tensor | None, dtype: str, path: Path
) -> str:
    """Compares a file with the model at three sizes, and says by how much they differ.

    Args:
        source: The model.
        file: The file.
        serves: The sizes that the file takes.
        samples: Real images (B, C, H, W) to compare on, None for noise.
        dtype: That the file computes in.
        path: Of the file, for messages.

    Raises:
        CommandError: If they differ by more than the precision explains.
    """
    tolerance = TOLERANCES[dtype]
    generator = torch.Generator().manual_seed(0)
    found = []
    for batch, (height, width) in enumerate(_check_sizes(source, serves), start=1):
        if samples is None:
            images = torch.randn(batch, source.channels, height, width, generator=generator)
        else:
            images = F.interpolate(
                samples[torch.arange(batch) % len(samples)], (height, width), mode="bicubic", antialias=True
            )
        wanted = source(images)
        try:
            got = file(images)
        except Exception as error:  # every runtime has its own
            raise CommandError(
                f"{path} does not run on images of {height}x{width}: {reason(error)[:300]}; nothing was written"
            ) from error
        difference = _difference(got, wanted)
        found.append(f"{batch}x{height}x{width} {difference:.1e}")
        if not difference <= tolerance:
            raise CommandError(
                f"{path} would not be what the model is: on {batch} images of {height}x{width} it differs by "
                f"{difference:.2g} standard deviations of the output, and {dtype} explains {tolerance:g}; nothing was "
                "written"
            )
    return f"largest difference in deviations of the output: {', '.join(found)} (at most {tolerance:g})"


def _check_sizes(source: _Source, serves: _Serves) -> list[Size]:
    """The model's own size, a rectangle, and one that the stride does not divide: 224x224, 160x256 and 203x171.

    A file that serves fewer sizes is checked on such as it serves.
    """

    def within(length: int, bounds: tuple[int, int | None]) -> int:
        return max(bounds[0], length if bounds[1] is None else min(length, bounds[1]))

    height, width = source.size
    lower, wider = max(1, height * 5 // 7 // 32) * 32, math.ceil(width * 8 / 7 / 32) * 32
    rectangle = within(lower, serves.height), within(wider, serves.width)
    if rectangle[0] == rectangle[1]:
        rectangle = within(lower * 3 // 4, serves.height), rectangle[1]
    odd = within(height * 203 // 224 | 1, serves.height), within(width * 171 // 224 | 1, serves.width)
    # Some models take fewer sizes than their operations: those that were made for windows of the image.
    return [source.size, *(size if source.takes(*size) else source.size for size in (rectangle, odd))]


def _difference(got: Outputs, wanted: Outputs) -> float:
    """The largest difference over all outputs, each in its own standard deviations; nan where one is not finite."""
    if [y.shape for y in got] != [y.shape for y in wanted]:
        return math.inf
    found = []
    for mine, model in zip(got, wanted, strict=True):
        deviation = model.std(correction=0)
        found.append((mine - model).abs().max() / (deviation if deviation > 0 else model.abs().max() + 1e-12))
    return torch.stack(found).max().item()  # max() hands a nan on


# ---------------------------------------------------------------------------------------------------------------------
# What it costs


def _open_images(args: argparse.Namespace, data_config: dict[str, Any], bad_images: BadImages) -> Images | None:
    if not args.data_dir and not args.dataset:
        return None
    in_chans = data_config["input_size"][0]
    if in_chans not in (1, 3):
        raise CommandError(f"images have 1 (gray) or 3 (color) channels, but the model takes {in_chans}")
    is_training = args.dtype == "int8"
    data = from_flags(DataConfig, args)
    images = open_images(data, _THIS_PROCESS, in_chans=in_chans, seed=args.seed, is_training=is_training)
    for samples in (images.train, images.val):
        if samples is not None:
            samples.bad_images = bad_images
    return images


def _samples(args: argparse.Namespace, images: Images, data_config: dict[str, Any]) -> torch.Tensor:
    """The first validation images (B, C, H, W)."""
    batch = next(iter(create_val_loader(images.val, from_flags(DataConfig, args), data_config, _THIS_PROCESS)), None)
    if batch is None:
        raise CommandError("there is no validation image to compare the file and the model on")
    return batch[0]


def _readable(
    loader: Iterable[tuple[torch.Tensor, torch.Tensor]], bar: Any
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches without the images that cannot be read."""
    for image, target in loader:
        if bool((target >= 0).any()):
            yield image[target >= 0], target[target >= 0]
        bar.update()


def _compare_accuracy(
    source: _Source,
    files: Mapping[str, Runtime],
    batches: Batches,
) -> list[str]:
    """Accuracies of the model and the files, and how many predictions differ."""
    seen, right, different = 0, dict.fromkeys(["", *files], 0), dict.fromkeys(files, 0)
    for image, target in batches:
        check_targets(target, source.model.num_classes, "validation")
        predicted = source(image)[0].argmax(dim=1)
        seen += len(target)
        right[""] += int((predicted == target).sum())
        for name, file in files.items():
            other = file(image)[0].argmax(dim=1)
            right[name] += int((other == target).sum())
            different[name] += int((other != predicted).sum())
    if seen == 0:
        raise CommandError("no readable image in the validation set; check --data-dir and --val-split")
    lines = [f"top-1 of PyTorch in float32: {100 * right[''] / seen:.2f} % of {seen} images"]
    for name in files:
        lines.append(
            f"top-1 of {name}: {100 * right[name] / seen:.2f} % of {seen} images, {different[name]} predicted otherwise"
        )
    return lines


def _compare_features(source: _Source, files: Mapping[str, Runtime], batches: Batches) -> list[str]:
    """By how much the maps of the files differ from the model's."""
    seen = 0
    sums = {name: torch.zeros(len(source.names), dtype=torch.float64) for name in ["", *files]}
    for image, target in batches:
        seen += len(target)
        wanted = source(image)
        sums[""] += torch.stack([y.double().var(correction=0) * len(target) for y in wanted])
        for name, file in files.items():
            pairs = zip(file(image), wanted, strict=True)
            sums[name] += torch.stack([(got - y).double().square().mean() * len(target) for got, y in pairs])
    if seen == 0:
        raise CommandError("no readable image in the validation set; check --data-dir and --val-split")
    lines = []
    for name in files:
        shares = (sums[name] / sums[""]).sqrt().tolist()
        words = ", ".join(f"{output} {share:.1e}" for output, share in zip(source.names, shares, strict=True))
        lines.append(f"root mean square difference of {name} in deviations, {seen} images: {words}")
    return lines


if __name__ == "__main__":
    sys.exit(main())

"""File formats: how each one is written and opened."""

import io
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

from .config import SUFFIXES
from .errors import explain_failure, silence
from .sizes import ServedSizes
from .source import Outputs, SourceModel, as_list

# An opened file: maps images (B, C, H, W) to outputs.
Runtime = Callable[[torch.Tensor], Outputs]


class Format(ABC):
    """A file format.

    Attributes:
        name: Name of the format, as in --format.
    """

    name: ClassVar[str]

    @property
    def suffix(self) -> str:
        """Suffix of the files."""
        return SUFFIXES[self.name]

    @abstractmethod
    def write(self, source: SourceModel, path: Path, metadata: Mapping[str, Any]) -> ServedSizes:
        """Writes the model to a file and returns the image sizes that the file accepts.

        Args:
            source: The model.
            path: File to write.
            metadata: Information for users of the file, in JSON types.

        Raises:
            CommandError: If the model cannot be exported.
            OSError: If the file cannot be written.
        """

    @abstractmethod
    def open(self, path: Path) -> Runtime:
        """Opens a file with its own runtime.

        Raises:
            Exception: Any error of the runtime.
        """


class Onnx(Format):
    """ONNX, for onnxruntime and others. The metadata are in metadata_props."""

    name = "onnx"

    def __init__(self, opset: int | None = None, quantize: Callable[[Any], Any] | None = None) -> None:
        """Sets the options of the format.

        Args:
            opset: ONNX opset; None for PyTorch's default.
            quantize: Function that returns the int8 model of a float32 one; None to keep the precision.
        """
        self.opset = opset
        self.quantize = quantize

    def write(self, source: SourceModel, path: Path, metadata: Mapping[str, Any]) -> ServedSizes:
        """Writes the ONNX file; see `Format.write`."""
        import onnx

        program, sizes = source.widest_program()
        with silence(), explain_failure("ONNX"):
            exported = torch.onnx.export(
                program,
                dynamo=True,
                input_names=["images"],
                output_names=source.names,
                opset_version=self.opset,
                verbose=False,
            )
            assert exported is not None
            proto = exported.model_proto
            _clean(proto)
        if self.quantize is not None:
            proto = self.quantize(proto)
        with silence(), explain_failure("ONNX"):
            text = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
            del proto.metadata_props[:]
            onnx.helper.set_model_props(proto, text)
            onnx.checker.check_model(proto, full_check=True)
        path.write_bytes(proto.SerializeToString())
        # The graph has no minimum size, because its operations accept axes of length 1.
        return sizes if sizes.is_bounded else ServedSizes()

    def open(self, path: Path) -> Runtime:
        """Opens the file with onnxruntime."""
        import onnxruntime

        with silence():
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3  # only errors
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return lambda images: [torch.from_numpy(y) for y in session.run(None, {"images": images.numpy()})]


class TorchExport(Format):
    """A program of torch.export. The metadata are in the extra file metadata.json."""

    name = "torch-export"

    def write(self, source: SourceModel, path: Path, metadata: Mapping[str, Any]) -> ServedSizes:
        """Writes the torch.export program; see `Format.write`."""
        program, sizes = source.program(source.size)
        text = json.dumps({**metadata, "heights": sizes.height, "widths": sizes.width}, indent=2)
        content = io.BytesIO()
        with silence(), explain_failure("torch.export"):
            torch.export.save(program, content, extra_files={"metadata.json": text})
        path.write_bytes(content.getvalue())
        return sizes

    def open(self, path: Path) -> Runtime:
        """Opens the file with PyTorch."""
        with silence(), path.open("rb") as file:
            return _torch_runtime(torch.export.load(file).module())


class TorchScript(Format):
    """TorchScript, for C++ programs.

    The metadata are in the extra file metadata.json.
    """

    name = "torchscript"

    def write(self, source: SourceModel, path: Path, metadata: Mapping[str, Any]) -> ServedSizes:
        """Writes the TorchScript file; see `Format.write`."""
        with silence(), explain_failure("TorchScript"):
            scripted = torch.jit.script(source.portable)
            content = io.BytesIO()  # written to disk below, so that a full disk raises OSError
            torch.jit.save(scripted, content, _extra_files={"metadata.json": json.dumps(metadata, indent=2)})
        path.write_bytes(content.getvalue())
        height, width = source.size
        if source.accepts(height + 32, width + 64):
            return ServedSizes()
        return ServedSizes((height, height), (width, width))

    def open(self, path: Path) -> Runtime:
        """Opens the file with PyTorch."""
        with silence():
            return _torch_runtime(torch.jit.load(str(path)))


def _torch_runtime(module: Any) -> Runtime:
    def run(images: torch.Tensor) -> Outputs:
        with torch.inference_mode():
            return as_list(module(images))

    return run


def _clean(proto: Any) -> None:
    """Names the dynamic axes, and removes the exporter's notes.

    The notes contain paths of this machine.
    """
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

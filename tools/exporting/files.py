"""Writes files that are checked before they appear."""

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..common.cli import CommandError, reason
from ..common.files import atomic_write
from .check import check_file
from .config import ResultConfig
from .data import ExportData
from .formats import Format, Onnx, Runtime, TorchExport, TorchScript
from .preflight import output_path
from .quantize import quantize
from .source import SourceModel


def write_files(
    source: SourceModel, result: ResultConfig, metadata: Mapping[str, Any], data: ExportData | None
) -> dict[str, Runtime]:
    """Writes a file of each format and prints two lines about it.

    The lines contain the size of the file, the accepted image sizes and the differences from the model. A file that
    fails its check does not replace an older one.

    Args:
        source: The model.
        result: Formats, precision, path, and whether to check the files.
        metadata: Information for users of the files.
        data: Images to calibrate int8 and to check the files on; None for noise.

    Returns:
        The opened files by name; empty if there is neither a check nor data.

    Raises:
        CommandError: If a file cannot be written, opened or differs from the model.
    """
    samples = None if data is None else data.first_batch()
    opened: dict[str, Runtime] = {}
    for format in _formats(result, data):
        path = output_path(result, format.name, metadata["model"])
        runtime = _write_file(path, format, source, result, metadata, samples)
        if runtime is not None:
            opened[path.name] = runtime
    return opened


def _write_file(
    path: Path, format: Format, source: SourceModel, result: ResultConfig, metadata: Mapping[str, Any],
    samples: torch.Tensor | None,
) -> Runtime | None:  # fmt: skip
    """Writes and checks a file of one format, and prints its lines.

    Args:
        path: File to write.
        format: Its format.
        source: The model.
        result: Precision, and whether to check the file.
        metadata: Information for users of the file.
        samples: Images (B, C, H, W) to check the file on; None for noise.

    Returns:
        The opened file; None without a check and without images.

    Raises:
        CommandError: If the file cannot be written, opened or differs from the model.
    """
    lines: list[str] = []
    runtime: Runtime | None = None

    def write(fresh: Path) -> None:
        nonlocal runtime
        sizes = format.write(source, fresh, metadata)
        lines.append(f"{path}: {format.name}, {result.dtype}, {fresh.stat().st_size / 1e6:.1f} MB, {sizes}")
        if result.check or samples is not None:
            runtime = _open(format, fresh, path)
        if result.check and runtime is not None:
            lines.append(check_file(source, runtime, sizes, samples, result.dtype, path))

    try:
        atomic_write(path, write)
    except OSError as error:
        raise CommandError(f"cannot write {path}: {reason(error)}") from error
    print("\n".join(lines), flush=True)
    return runtime


def _formats(result: ResultConfig, data: ExportData | None) -> Iterable[Format]:
    to_int8 = partial(quantize, data=data) if result.dtype == "int8" and data is not None else None
    formats: list[Format] = [Onnx(result.opset, to_int8), TorchExport(), TorchScript()]
    by_name = {format.name: format for format in formats}
    return [by_name[name] for name in dict.fromkeys(result.format)]


def _open(format: Format, fresh: Path, path: Path) -> Runtime:
    try:
        return format.open(fresh)
    except Exception as error:  # each runtime has its own errors
        raise CommandError(f"{path} cannot be loaded again: {reason(error)[:300]}; nothing was written") from error

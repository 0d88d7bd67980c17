"""Checks of flags, paths and packages that need no model."""

import importlib
import os
from pathlib import Path

from ..common.cli import CommandError
from .config import MIN_OPSET, SUFFIXES, ExportDataConfig, ResultConfig


def check_flags(result: ResultConfig, data: ExportDataConfig) -> None:
    """Checks that the flags do not contradict each other.

    Raises:
        CommandError: If they do.
    """
    others = [name for name in result.format if name != "onnx"]
    if result.dtype == "int8" and others:
        raise CommandError(f"--dtype int8 is for --format onnx, not for {others[0]}; pass --dtype float16 or float32")
    if result.dtype == "int8" and not data.is_given:
        raise CommandError("--dtype int8 is calibrated on real images; pass --data-dir, or --dataset sklearn/digits")
    if result.opset is not None and others == result.format:
        raise CommandError(f"--opset is for --format onnx, not for {' '.join(others)}; remove --opset")
    if result.opset is not None and result.opset < MIN_OPSET:
        raise CommandError(f"--opset must be at least {MIN_OPSET}, the oldest one of PyTorch, got {result.opset}")


def check_output(result: ResultConfig) -> None:
    """Checks that the files can be written, before minutes of work.

    Raises:
        CommandError: If a folder does not exist or cannot be written, or the name is that of another format.
    """
    output = Path(result.output).expanduser()
    if output.is_dir():
        folder = output
    elif len(set(result.format)) > 1 or result.output.endswith(("/", os.sep)):
        raise CommandError(f"--output {result.output} is not a folder; create it first")
    else:
        folder = output.parent
        suffix = SUFFIXES[result.format[0]]
        wrong = next((name for name, other in SUFFIXES.items() if output.suffix == other != suffix), "")
        if wrong:
            raise CommandError(
                f"--output {result.output} has the suffix of --format {wrong}; pass this format or another file name"
            )
    if not folder.is_dir():
        raise CommandError(f"--output {result.output}: folder {folder} does not exist; create it first")
    if not os.access(folder, os.W_OK):
        raise CommandError(f"--output {result.output}: cannot write to {folder}; choose another folder")


def check_packages(result: ResultConfig, data: ExportDataConfig) -> None:
    """Checks that the packages of the formats are installed.

    Raises:
        CommandError: If one is missing.
    """
    if "onnx" not in result.format:
        return
    needs_runtime = result.check or result.dtype == "int8" or data.is_given
    for package in ["onnx", "onnxscript", *(["onnxruntime"] if needs_runtime else [])]:
        try:
            importlib.import_module(package)
        except ImportError as error:
            can_skip = package == "onnxruntime" and result.dtype != "int8"
            hint = ", or pass --no-check to skip the check" if can_skip else ""
            raise CommandError(f"--format onnx needs {package}: pip install 'stvit[export]'{hint}") from error


def output_path(result: ResultConfig, format: str, model: str) -> Path:
    """Returns the path of a file.

    Args:
        result: Flags of the result.
        format: Name of the format.
        model: Name of the model, for a file in a folder.
    """
    output = Path(result.output).expanduser()
    if not output.is_dir():
        return output
    details = ["features"] * result.features + [result.dtype] * (result.dtype != "float32")
    return output / ("-".join([model, *details]) + SUFFIXES[format])

"""Reads a file of weights without running code and without exhausting memory."""

import argparse
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from stvit.weights.check import check_file

__all__ = ["allowing_flags", "read_file"]


def read_file(path: Path) -> Any:
    """Returns the contents of a file of weights, on the CPU; runs no code.

    Args:
        path: File of safetensors or of `torch.save`: tensors, numbers, strings, containers and `argparse.Namespace`.

    Raises:
        WeightsFileError: If the file is damaged, or could exhaust the memory.
        OSError: If it cannot be read.
        pickle.UnpicklingError: If the file holds anything else.
    """
    check_file(path)
    if path.suffix == ".safetensors":
        return load_file(path)
    with allowing_flags():
        return torch.load(path, map_location="cpu", weights_only=True)


_LOADING = threading.Lock()


@contextmanager
def allowing_flags() -> Iterator[None]:
    """Context in which PyTorch restores the flags of a run, which checkpoints of timm and of the authors hold.

    One thread at a time: what PyTorch allows, and which warnings it prints, is a state of the process.
    """
    with _LOADING, torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the caller's error says the same
        yield

#!/usr/bin/env python3
"""Stores the weights of a folder in the package, in half precision.

    python docs/package_weights.py runs/cifar10/last_ema stvit_pico.cifar10

Prints the sha256 for stvit/weights/packaged.py.
"""

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from stvit.weights import Source, read_weights
from stvit.weights.packaged import packaged_file


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the file."""
    parser = argparse.ArgumentParser(description="Stores the weights of a folder in the package.")
    parser.add_argument("folder", help="folder with model.safetensors, or run directory for its best weights")
    parser.add_argument("name", help="model with its tag, such as stvit_pico.cifar10")
    args = parser.parse_args(argv)
    weights, _ = read_weights(Source.parse(args.folder).path / "model.safetensors")
    path = Path(packaged_file(args.name))
    path.parent.mkdir(exist_ok=True)
    save_file({name: _halve(tensor) for name, tensor in weights.items()}, path, metadata={"format": "pt"})
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}")


def _halve(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a tensor in float16, or unchanged if it contains integers."""
    if not tensor.is_floating_point():
        return tensor
    half = tensor.half()
    if not half.isfinite().all():
        raise ValueError("a weight is too large for float16")
    return half.contiguous()


if __name__ == "__main__":
    main()

"""Marks for tests that need a newer PyTorch than the oldest supported one."""

import pytest
import torch
from packaging.version import Version

_is_old = Version(torch.__version__) < Version("2.14")

needs_newer_torch = pytest.mark.skipif(
    _is_old, reason="needs the exports with dynamic sizes and the compiled order of additions of torch 2.14"
)
needs_gloo_average = pytest.mark.skipif(
    _is_old, reason="Ultralytics needs averages over processes, which this Gloo lacks"
)

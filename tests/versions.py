"""Marks for tests that need a newer release than the oldest one that is supported."""

import pytest
import torch
from packaging.version import Version

_is_old = Version(torch.__version__) < Version("2.14")

needs_newer_torch = pytest.mark.skipif(
    _is_old, reason="exports of dynamic sizes and the order of compiled additions are those of torch 2.14 and newer"
)
needs_gloo_average = pytest.mark.skipif(_is_old, reason="Ultralytics averages over processes, which Gloo learned later")

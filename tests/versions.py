"""Marks for tests that need a newer release than the oldest one that is supported."""

import pytest
import torch
from packaging.version import Version

needs_newer_torch = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.14"),
    reason="exports of dynamic sizes and the order of compiled additions are those of torch 2.14 and newer",
)

import sys
from pathlib import Path

import pytest
import torch

# The golden files come with the code that rebuilds their inputs, `fill.py`.
sys.path.insert(0, str(Path(__file__).parent / "golden"))


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)

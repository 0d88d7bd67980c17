import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

# The golden files come with the code that rebuilds their inputs, `fill.py`.
sys.path.insert(0, str(Path(__file__).parent / "golden"))


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def write_digits() -> Callable[[Path, int, int], Path]:
    """Writes scikit-learn's digits 0 to 3 as PNG files, train/<class>/* and val/<class>/*, so many of each split."""

    def write_digits(folder: Path, train: int, val: int) -> Path:
        digits = load_digits(n_class=4)
        for i, (pixels, target) in enumerate(zip(digits.images, digits.target, strict=True)):
            if i == train + val:
                break
            path = folder / ("train" if i < train else "val") / f"digit_{target}" / f"{i:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((pixels * 15.9).astype("uint8")).resize((16, 16)).save(path)
        return folder

    return write_digits


@pytest.fixture(scope="session")
def digits_folder(write_digits: Callable[[Path, int, int], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 and 20 digits. Not to be changed: see `own_digits_folder`."""
    return write_digits(tmp_path_factory.mktemp("digits"), 60, 20)


@pytest.fixture
def own_digits_folder(write_digits: Callable[[Path, int, int], Path], tmp_path: Path) -> Path:
    """The same to spoil."""
    return write_digits(tmp_path / "data", 60, 20)

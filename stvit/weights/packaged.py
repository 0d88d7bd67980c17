"""Weights that are part of the package."""

import hashlib
from pathlib import Path
from typing import NamedTuple

from stvit.weights.check import WeightsFileError

__all__ = ["CIFAR10_CLASSES", "PACKAGED", "PackagedWeights", "check_packaged", "packaged_file"]

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

_FOLDER = Path(__file__).parent / "packaged"


class PackagedWeights(NamedTuple):
    """Weights of a model.

    Attributes:
        dataset: Name of the data that the model was trained on.
        sha256: Checksum of the file, which docs/package_weights.py prints.
    """

    dataset: str
    sha256: str


PACKAGED = {
    "stvit_pico.cifar10": PackagedWeights(
        "CIFAR-10", "f5a7a6976c97b9a56f6bd6d94e4a1ad0c43f8d153aa2ca7d659f1906e2ea7c82"
    ),
}


def packaged_file(name: str) -> str:
    """Returns the path of the weights of a model, such as 'stvit_pico.cifar10'."""
    return str(_FOLDER / f"{name}.safetensors")


def check_packaged(path: str | Path) -> None:
    """Compares a file of the package with its checksum. Other files are not read.

    Args:
        path: File of weights.

    Raises:
        WeightsFileError: If a file of the package is missing or has other contents than in the release.
    """
    path = Path(path)
    if path.parent != _FOLDER or path.stem not in PACKAGED:
        return
    try:
        checksum = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise WeightsFileError(f"cannot read {path} ({error.strerror}); install stvit again") from error
    if checksum != PACKAGED[path.stem].sha256:
        raise WeightsFileError(f"{path} is not the file of this release (sha256 {checksum}); install stvit again")

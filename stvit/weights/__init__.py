"""Finds, reads and checks weights, and explains why a load failed.

- `source`: the names of weights, such as `stvit_small.in1k`, `hf-hub:org/name` or a run directory
- `read`, `check`: files of weights, read without running code
- `prefix`, `official`: key names of other training programs and of the authors
- `config`: config.json
- `create`: models with pretrained weights
- `errors`: the reason for a failure and the next step
"""

from stvit.weights.check import WeightsFileError
from stvit.weights.config import read_config
from stvit.weights.create import create_model, verify
from stvit.weights.errors import PretrainedDownloadError, PretrainedError
from stvit.weights.official import find_variant
from stvit.weights.read import read_checkpoint, read_weights
from stvit.weights.source import Source

__all__ = [
    "PretrainedDownloadError",
    "PretrainedError",
    "Source",
    "WeightsFileError",
    "create_model",
    "find_variant",
    "read_checkpoint",
    "read_config",
    "read_weights",
    "verify",
]

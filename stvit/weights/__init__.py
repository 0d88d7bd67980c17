"""Names, reads and checks weights, and explains why a load failed."""

from stvit.weights.create import create_model, verify
from stvit.weights.errors import PretrainedDownloadError, PretrainedError
from stvit.weights.official import find_variant

__all__ = ["PretrainedDownloadError", "PretrainedError", "create_model", "find_variant", "verify"]

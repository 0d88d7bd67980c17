"""Super Token Vision Transformer (STViT): super token attention and its timm-style backbones.

Importing this package registers the models in timm: `import stvit; timm.create_model("stvit_small")`.
"""

import signal
import sys

# `python -m stvit.tools.NAME` imports this file before the command. Until the command begins, Ctrl-C ends it without a
# traceback.
if (
    sys.argv[:1] == ["-m"]
    and any(argument.startswith("stvit.tools.") for argument in sys.orig_argv[:9])
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from stvit import visualize
from stvit.inference import optimize_for_inference
from stvit.ops import SuperTokenAttention, sample_super_tokens, upsample_super_tokens
from stvit.stvit import STViT
from stvit.weights import PretrainedDownloadError, PretrainedError, create_model

__all__ = [
    "PretrainedDownloadError",
    "PretrainedError",
    "STViT",
    "SuperTokenAttention",
    "create_model",
    "optimize_for_inference",
    "sample_super_tokens",
    "upsample_super_tokens",
    "visualize",
]
__version__ = "0.1.0"

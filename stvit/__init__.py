"""Super Token Vision Transformer (STViT): operator and timm-style backbones.

Importing this package registers the models in timm: `import stvit; timm.create_model("stvit_small")`.
"""

import importlib
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

# In a checkout, adapters, configs and tools are beside this folder; an installed package contains them. Without this
# path, Python started in the checkout would not find `stvit.adapters`, because it imports the checkout's `stvit`.
_parent = Path(__file__).resolve().parent.parent
if (_parent / "pyproject.toml").is_file() and (_parent / "adapters" / "yolo").is_dir():
    __path__.append(str(_parent))


def _is_command() -> bool:
    """Returns whether Python runs a command of this package.

    That is `stvit`, `python -m stvit.tools.NAME` or `python tools/NAME.py`.
    """
    program = Path(sys.argv[0]) if sys.argv and sys.argv[0] else Path("-c")
    if str(program) == "-m":  # Python replaces it by the path of the module after importing the package
        return any(argument.startswith("stvit.tools.") for argument in sys.orig_argv[:9])
    here = Path(__file__).resolve().parent
    return program.stem == "stvit" or program.resolve().parent in (here / "tools", here.parent / "tools")


if TYPE_CHECKING or not _is_command():
    from stvit import visualize
    from stvit.inference import optimize_for_inference
    from stvit.ops import SuperTokenAttention, sample_super_tokens, upsample_super_tokens
    from stvit.stvit import STViT
    from stvit.weights import PretrainedDownloadError, PretrainedError, create_model
else:
    # PyTorch takes seconds to import. A command first reads its flags, so that it answers `--help` and wrong flags at
    # once. `stvit.tools.common.cli.run` then registers the models. Until then, Ctrl-C ends it without a traceback.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def __getattr__(name: str) -> Any:
        """Imports a public name at its first use."""
        if name not in __all__:
            raise AttributeError(f"module 'stvit' has no attribute {name!r}")
        importlib.import_module("stvit.stvit")  # registers the models in timm
        if name == "visualize":
            return importlib.import_module("stvit.visualize")
        modules = map(importlib.import_module, ("stvit.stvit", "stvit.weights", "stvit.ops", "stvit.inference"))
        return next(vars(module)[name] for module in modules if name in vars(module))

"""Registers the classes of this package in Ultralytics and PyTorch."""

import importlib
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from ultralytics.nn.tasks import load_checkpoint
from ultralytics.utils import LOGGER
from ultralytics.utils.torch_utils import unwrap_model

from stvit.inference import FoldedResidualConv, OptimizedBlock, OptimizedStem, TiledConvMlp

from . import modules, patches, visualize
from .config import RATES

__all__ = ["allow_modules", "register"]

# Packages whose modules our checkpoints can contain. Ultralytics itself allows its own modules and those of PyTorch.
_TRUSTED = ("stvit.", "timm.layers.", "timm.models.")


def register() -> None:
    """Registers our classes. Importing the package calls this function once.

    Model files, restricted loading, the processes of a distributed run and `stvit.visualize` then know them.
    """
    patches.add_modules(_row_modules())
    patches.add_callbacks(
        {"on_pretrain_routine_start": refuse_lost_rates, "on_pretrain_routine_end": warn_of_lost_rates}
    )
    torch.serialization.add_safe_globals(_stvit_classes())
    visualize.register()


def allow_modules(path: str | Path) -> None:
    """Allows the timm modules of a checkpoint in ULTRALYTICS_SAFE_LOAD mode."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except ValueError:  # not an archive of torch.save; the loader reports it
        return
    allowed: list[Any] = []
    for name in names:
        module, _, attribute = name.rpartition(".")
        if f"{module}.".startswith(_TRUSTED):
            kind = getattr(importlib.import_module(module), attribute, None)
            if isinstance(kind, type) and issubclass(kind, nn.Module) and kind.__module__ == module:
                allowed.append(kind)
    torch.serialization.add_safe_globals(allowed)


def refuse_lost_rates(trainer: Any) -> None:
    """Callback: refuses to resume a run whose backbone learning rates would be lost.

    Raises:
        RuntimeError: If the trainer is Ultralytics' own and the run has such rates. Ultralytics would raise an unclear
            error later, because the checkpoint has more parameter groups than its optimizer.
    """
    if trainer.resume and not _is_ours(trainer) and _find_rates(load_checkpoint(trainer.args.resume)[0]):
        raise RuntimeError(
            "this run has separate learning rates for its backbone; resume it with stvit.adapters.yolo.YOLO or "
            "python -m stvit.tools.yolo"
        )


def warn_of_lost_rates(trainer: Any) -> None:
    """Callback: warns if a trainer ignores the backbone learning rates of a model."""
    if rates := ({} if _is_ours(trainer) else _find_rates(unwrap_model(trainer.model))):
        LOGGER.warning(
            f"{', '.join(rates)} of the model file is ignored: this trainer of Ultralytics trains the backbone like "
            "the other layers. Use stvit.adapters.yolo.YOLO to train with it."
        )


def _is_ours(trainer: Any) -> bool:
    from .engine import BackboneTrainer

    return isinstance(trainer, BackboneTrainer)


def _find_rates(model: Any) -> dict[str, float]:
    """Returns the backbone learning rates in the configuration of a model."""
    config = getattr(model, "yaml", None) or {}
    return {key: config[key] for key in RATES if config.get(key) is not None}


def _row_modules() -> list[type[nn.Module]]:
    return [getattr(modules, name) for name in modules.__all__]


def _stvit_classes() -> list[Any]:
    """Returns the classes in checkpoints of detectors with an STViT backbone."""
    with torch.device("meta"):
        net = timm.create_model("stvit_base", drop_path_rate=0.1)  # a variant with layer scale
    kinds: set[type[nn.Module]] = {type(module) for module in net.modules()}
    kinds |= {FoldedResidualConv, OptimizedBlock, OptimizedStem, TiledConvMlp}  # after fusing
    ours = [kind for kind in kinds if f"{kind.__module__}.".startswith(_TRUSTED)]
    return [*_row_modules(), *sorted(ours, key=lambda kind: kind.__name__)]

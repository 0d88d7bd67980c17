"""What Ultralytics and PyTorch must know of our classes; done once, when this package is imported."""

import importlib
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from ultralytics.nn import tasks
from ultralytics.nn.tasks import load_checkpoint
from ultralytics.utils import LOGGER, callbacks
from ultralytics.utils.torch_utils import unwrap_model

from stvit.adapters.yolo import modules
from stvit.adapters.yolo.config import RATES
from stvit.inference import FoldedResidualConv, TiledConvMlp

__all__ = ["allow_modules", "register"]

# Packages whose modules a checkpoint of ours may hold, next to PyTorch's and Ultralytics', which it allows itself.
_TRUSTED = ("stvit.", "timm.layers.", "timm.models.")


def register() -> None:
    """Makes our classes known to model files, to restricted loading and to the processes of a distributed run."""
    for name in modules.__all__:
        setattr(tasks, name, getattr(modules, name))
    torch.serialization.add_safe_globals(_classes_of_stvit())
    # Pickled by reference with a trainer, they carry the import of this package into each process of a run.
    for event, callback in (
        ("on_pretrain_routine_start", refuse_lost_rates),
        ("on_pretrain_routine_end", warn_of_lost_rates),
    ):
        if callback not in callbacks.default_callbacks[event]:
            callbacks.default_callbacks[event].append(callback)


def allow_modules(path: str | Path) -> None:
    """Allows the timm modules of a checkpoint under ULTRALYTICS_SAFE_LOAD, as Ultralytics does for its own."""
    try:
        needed = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except ValueError:  # no archive of torch.save; the loader says so
        return
    allowed: list[Any] = []
    for name in needed:
        module, _, attribute = name.rpartition(".")
        if f"{module}.".startswith(_TRUSTED):
            found = getattr(importlib.import_module(module), attribute, None)
            if isinstance(found, type) and issubclass(found, nn.Module) and found.__module__ == module:
                allowed.append(found)
    torch.serialization.add_safe_globals(allowed)


def refuse_lost_rates(trainer: Any) -> None:
    """Says what to do where Ultralytics' own trainer would fail on a checkpoint with more groups than it makes."""
    if trainer.resume and not _is_ours(trainer) and _rates(load_checkpoint(trainer.args.resume)[0]):
        raise RuntimeError(
            "this run trains its backbone with learning rates of its own: resume it with stvit.adapters.yolo.YOLO or "
            "python -m stvit.tools.yolo"
        )


def warn_of_lost_rates(trainer: Any) -> None:
    """Says that Ultralytics' own trainer knows no learning rates of a backbone."""
    if rates := ({} if _is_ours(trainer) else _rates(unwrap_model(trainer.model))):
        LOGGER.warning(
            f"{', '.join(rates)} of the model file needs the trainers of stvit.adapters.yolo.YOLO: Ultralytics' own "
            "trains the backbone like the rest."
        )


def _is_ours(trainer: Any) -> bool:
    from stvit.adapters.yolo.engine import BackboneTrainer

    return isinstance(trainer, BackboneTrainer)


def _rates(model: Any) -> dict[str, float]:
    config = getattr(model, "yaml", None) or {}
    return {key: config[key] for key in RATES if config.get(key) is not None}


def _classes_of_stvit() -> list[Any]:
    with torch.device("meta"):
        net = timm.create_model("stvit_base", drop_path_rate=0.1)  # a variant with layer scale
    found = {type(module) for module in net.modules()} | {FoldedResidualConv, TiledConvMlp}  # as made, and as fused
    ours = [getattr(modules, name) for name in modules.__all__]
    return [
        *ours,
        *sorted((cls for cls in found if f"{cls.__module__}.".startswith(_TRUSTED)), key=lambda cls: cls.__name__),
    ]

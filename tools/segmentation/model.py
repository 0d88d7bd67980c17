"""Creates and opens the models of the segmentation commands."""

from collections.abc import Mapping
from typing import Any

import torch

from stvit.adapters import segmentation
from stvit.weights import PretrainedError

from ..common.cli import CommandError, reason
from ..common.config import check_in_chans
from ..common.distributed import Distributed
from .config import ImageConfig, ModelConfig


def create_model(config: ModelConfig, image: ImageConfig, num_classes: int, distributed: Distributed) -> Any:
    """Creates the model to train, on the CPU.

    Args:
        config: The model and its initial weights.
        image: Normalization and size of the images, which the model stores.
        num_classes: Number of classes.
        distributed: The primary process downloads weights first.

    Raises:
        CommandError: If an argument is wrong, or the weights cannot be loaded.
    """
    check_in_chans(config.in_chans)
    builder = segmentation.BUILDERS[config.model]
    arguments: dict[str, Any] = {
        "pretrained_backbone": config.backbone_source(),
        "frozen_stages": config.frozen_stages,
        "norm_eval": config.keeps_statistics(),
        "drop_path_rate": config.drop_path,
        "in_chans": config.in_chans,
        "mean": image.mean,
        "std": image.std,
        "short_side": image.short_side,
        "long_side": image.long_side,
        "backbone_kwargs": config.backbone_kwargs or None,
    }
    for key in config.model_kwargs:
        if key == "log":
            raise CommandError("--model-kwargs log: only Python code can set it; remove it")
        if key in arguments or key in ("backbone", "num_classes"):
            raise CommandError(f"--model-kwargs {key}: pass --{key.replace('_', '-')} instead")
    with distributed.primary_first():
        try:
            model = builder(
                config.backbone, num_classes, log=distributed.print_primary, **arguments, **config.model_kwargs
            )
        except (ValueError, TypeError, RuntimeError) as error:
            raise CommandError(f"cannot create the model: {reason(error)}") from error
        if config.pretrained_path is not None:
            _load_weights(model, config.pretrained_path, distributed)
    if config.grad_checkpointing:
        model.set_grad_checkpointing()
    return model


def _load_weights(model: Any, source: str, distributed: Distributed) -> None:
    """Loads the weights of another segmentation model.

    Layers for other classes stay random.

    Raises:
        CommandError: If the weights cannot be loaded, or belong to another decoder or backbone.
    """
    given: Mapping[str, torch.Tensor] = open_model(source, "--pretrained-path").state_dict()
    own = model.state_dict()
    unfit = [key for key in own if key not in given or given[key].shape != own[key].shape]
    wrong = [key for key in unfit if not key.startswith(("segmentation_head.", "auxiliary_head."))]
    if wrong:
        raise CommandError(
            f"--pretrained-path {source} is another model: {len(wrong)} of {len(own)} tensors are missing or have "
            f"another shape, such as {wrong[0]}; pass its --model, --backbone and --model-kwargs"
        )
    model.load_state_dict({key: value for key, value in given.items() if key in own and key not in unfit}, strict=False)
    rest = f"; {len(unfit)} of other classes stay random" if unfit else ""
    distributed.print_primary(f"loaded {len(own) - len(unfit)} of {len(own)} tensors of {source}{rest}")


def open_model(source: str, flag: str = "--checkpoint") -> Any:
    """Loads a trained model, on the CPU.

    Args:
        source: Run, model folder, or model on the Hub.
        flag: Flag that names it, for the message.

    Raises:
        CommandError: If it does not exist, is damaged, or is not a segmentation model.
    """
    try:
        return segmentation.load(source)
    except PretrainedError as error:
        raise CommandError(f"{flag}: {error}") from error

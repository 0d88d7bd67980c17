"""Opens the model that the flags of a command describe."""

import difflib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from timm.models import clean_state_dict, get_pretrained_cfg_value, resolve_model_input_args
from torch import nn

import stvit
from stvit.weights import PretrainedError, Source, read_checkpoint
from stvit.weights.official import strip_model_prefix
from stvit.weights.read import pick_weights

from .checkpoint import load_checkpoint
from .cli import CommandError, reason
from .config import ModelSource

# Flags about the model and its images that a run's checkpoint contains.
RECIPE_KEYS = ("in_chans", "num_classes", "img_size", "mean", "std", "interpolation", "crop_pct")


@dataclass(frozen=True)
class OpenedModel:
    """A model with its weights.

    Attributes:
        model: The model, on the CPU.
        name: Name of the model for timm: a model or tag, a folder or a repository with its prefix.
        is_ema: Whether the weights are a moving average.
        recipe: Flags of the run that made the weights, those of `RECIPE_KEYS`; empty for other weights.
    """

    model: Any
    name: str
    is_ema: bool = False
    recipe: Mapping[str, Any] = field(default_factory=dict)

    def fill(self, flags: Mapping[str, Any]) -> dict[str, Any]:
        """Returns flags in which the run's recipe replaces unset values of `RECIPE_KEYS`."""
        unset = {key: self.recipe.get(key) for key in RECIPE_KEYS if flags.get(key) is None}
        return {**flags, **unset}


@contextmanager
def weights_errors() -> Iterator[None]:
    """Context manager that turns errors of `stvit.weights` into `CommandError`."""
    try:
        yield
    except PretrainedError as error:
        raise CommandError(str(error)) from error


def open_model(source: ModelSource, **model_kwargs: Any) -> OpenedModel:
    """Creates a model and loads its weights.

    Args:
        source: Model and weights.
        **model_kwargs: Arguments of the model that the command needs; `source.model_kwargs` override them.

    Raises:
        CommandError: If the weights do not exist, cannot be read, do not fit the model or are those of another one.
    """
    name, weights, is_ema, recipe = _find_weights(source)
    model = create_model(
        name,
        pretrained=source.pretrained or source.checkpoint is not None,
        weights=weights,
        num_classes=source.num_classes or recipe.get("num_classes"),
        in_chans=source.in_chans or recipe.get("in_chans"),
        img_size=source.img_size or recipe.get("img_size"),
        model_kwargs={**(recipe.get("model_kwargs") or {}), **model_kwargs, **source.model_kwargs},
    )
    _check_architecture(source, model)
    return OpenedModel(model, name, is_ema, recipe)


def _find_weights(wanted: ModelSource) -> tuple[str, dict[str, Any] | None, bool, dict[str, Any]]:
    """Returns name of the model, weights of a file, whether they are EMA, and recipe."""
    source = None
    if wanted.checkpoint is not None:
        source = find_source(wanted.checkpoint, wanted.model)
    elif wanted.model is None:
        raise CommandError("no model; pass --checkpoint, or --model for the published weights of a model")
    if source is None or source.kind != "file":
        if wanted.use_ema is not None:
            raise CommandError("--use-ema and --no-use-ema are for a file of weights; remove the flag")
        return str(source or wanted.model), None, False, {}
    recipe: dict[str, Any] = {}
    model = wanted.model
    with weights_errors():
        if model is None:
            content: Mapping[str, Any] = load_checkpoint(source.path)
            recipe = {key: content["recipe"].get(key) for key in (*RECIPE_KEYS, "model_kwargs")}
            model = content["recipe"]["model"]
        else:
            content = read_checkpoint(source.path)
        weights, is_ema = pick_weights(content, source.path, wanted.use_ema)
    return model, weights, is_ema, recipe


def _check_architecture(source: ModelSource, model: Any) -> None:
    """Refuses a --model that is not the architecture of the checkpoint.

    Raises:
        CommandError: If they differ.
    """
    if source.checkpoint is None or source.model is None:
        return
    found = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    if found is not None and found != source.model.partition(".")[0]:
        raise CommandError(
            f"--model {source.model} does not match --checkpoint {source.checkpoint}, which is a {found}; "
            "remove --model"
        )


def find_source(checkpoint: str, model: str | None = None) -> Source:
    """Returns the source of a checkpoint.

    Args:
        checkpoint: Value of --checkpoint.
        model: Value of --model.

    Raises:
        CommandError: If there is no such checkpoint, or the model of a file is unknown.
    """
    try:
        source = Source.parse(checkpoint)
    except ValueError as error:
        raise CommandError(f"--checkpoint: {error}") from error
    if model is not None or source.kind != "file":
        return source
    source = source.with_config()
    is_of_run = source.kind == "file" and source.path.suffix == ".pt" and source.path.parent.name == "checkpoints"
    if source.kind == "file" and not is_of_run:
        raise CommandError(f"--checkpoint {checkpoint} does not name its model; pass --model")
    return source


def check_num_classes(source: ModelSource, model: Any) -> None:
    """Refuses a number of classes that differs from the weights.

    The classifier would be random.

    Raises:
        CommandError: If the numbers differ.
    """
    if source.num_classes is None or not (source.pretrained or source.checkpoint):
        return
    found = model.pretrained_cfg.get("num_classes", source.num_classes)
    if source.num_classes != found:
        raise CommandError(
            f"--num-classes {source.num_classes}: the weights have {found} classes, and a new classifier would be "
            "random; remove --num-classes"
        )


def strip_weights(model: str, weights: Mapping[str, Any]) -> dict[str, Any]:
    """Removes a prefix such as Lightning's `model.` and prints it.

    Args:
        model: Name of the model for timm.
        weights: State dict.

    Raises:
        CommandError: If the model's tensors are under several prefixes.
    """
    try:
        stripped, summary = strip_model_prefix(model, weights)
    except ValueError as error:
        raise CommandError(f"cannot read the weights of {model}: {error}") from error
    if summary and int(os.environ.get("RANK", "0")) == 0:
        print(f"weights: {summary}")
    return clean_state_dict(stripped)  # for prefixes that only timm knows


def create_model(
    name: str,
    *,
    pretrained: bool = False,
    weights: Mapping[str, Any] | None = None,
    num_classes: int | None = None,
    in_chans: int | None = None,
    img_size: int | None = None,
    grad_checkpointing: bool = False,
    model_kwargs: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Creates a timm model on the CPU.

    Args:
        name: Name of the model for timm: a model or tag, a folder or a repository with its prefix.
        pretrained: Whether to load the weights that the name stands for.
        weights: State dict to load instead, under this package's or the authors' key names.
        num_classes: Number of classes; None for the number in the weights.
        in_chans: Image channels; None for the channels in the weights.
        img_size: Image size in pixels; None for the size in the weights. It matters for models of a fixed size.
        grad_checkpointing: Whether to recompute activations in the backward pass, which saves memory.
        model_kwargs: Other arguments of the model.

    Raises:
        CommandError: If the model is unknown, an argument is wrong, or the weights do not fit.
    """
    if Source.parse_model_name(name).kind == "timm" and not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f", did you mean {' or '.join(near)}?" if near else "; timm.list_models() lists all models"
        raise CommandError(f"unknown model {name!r}{hint}")
    overlay: dict[str, Any] = {}
    if weights is not None:
        weights = strip_weights(name, weights)
        overlay["state_dict"] = weights
        # timm keeps the classifier if the configuration has the number of classes of the weights.
        for layer in (get_pretrained_cfg_value(name, "classifier"), "head"):
            if f"{layer}.weight" in weights:
                overlay["num_classes"] = len(weights[f"{layer}.weight"])
    if num_classes is None:
        num_classes = overlay.get("num_classes")
    kwargs = dict(model_kwargs or {})
    for key in ("num_classes", "in_chans"):
        if key in kwargs:
            raise CommandError(f"--model-kwargs {key}={kwargs[key]}: pass --{key.replace('_', '-')} instead")
    size = _img_size_argument(name, img_size, kwargs)
    given: dict[str, Any] = {"num_classes": num_classes, "in_chans": in_chans, "img_size": size}
    kwargs |= {key: value for key, value in given.items() if value is not None}
    try:
        model: Any = stvit.create_model(
            name,
            pretrained=pretrained or weights is not None,
            pretrained_cfg_overlay=overlay,
            **kwargs,
        )
        if grad_checkpointing:
            model.set_grad_checkpointing()
    except PretrainedError as error:
        hint = "" if size is None else f"; if the image size is the reason, remove --img-size {size} or pass another"
        raise CommandError(f"{error}{hint}") from error
    except Exception as error:  # models of other libraries, files and networks fail in many ways
        hint = "" if size is None else f"; remove --img-size {size} or pass another size"
        raise CommandError(f"cannot create model {name}: {reason(error)}{hint}") from error
    model.pretrained_cfg.pop("state_dict", None)  # a second copy of the weights
    return model


def _img_size_argument(name: str, img_size: int | None, model_kwargs: Mapping[str, Any]) -> int | None:
    """Returns `img_size` if the model takes it as an argument, else None.

    Raises:
        CommandError: If `model_kwargs` asks for another size.
    """
    if img_size is None:
        return None
    asked = model_kwargs.get("img_size")
    if asked is not None:
        is_fixed = not model_kwargs.get("dynamic_img_size", False) and model_kwargs.get("strict_img_size", True)
        if is_fixed and {img_size} != set(asked if isinstance(asked, list | tuple) else [asked]):
            raise CommandError(f"--img-size {img_size} and the model argument img_size={asked} differ; remove one")
        return None
    try:
        arguments = resolve_model_input_args(name, {"img_size": img_size}, **model_kwargs)
    except Exception:  # an unknown model, which the caller reports
        return None
    return img_size if "img_size" in arguments else None


def check_img_size(model: nn.Module, data_config: Mapping[str, Any]) -> None:
    """Checks that the model takes images of another size than its own.

    Runs the model on a blank image if the size differs.

    Args:
        model: The model, on any device.
        data_config: Preprocessing with `input_size` (C, H, W), as `resolve_data_config` returns it.

    Raises:
        CommandError: If the model does not take images of this size.
    """
    config: Any = model.pretrained_cfg
    size = tuple(data_config["input_size"])
    own = tuple(config["input_size"])
    if size[1:] in (own[1:], tuple(config.get("test_input_size") or own)[1:]):
        return
    parameter = next(model.parameters())
    was_training = model.training
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, *size, device=parameter.device, dtype=parameter.dtype))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # models of other libraries fail in many ways
        name = config.get("architecture") or type(model).__name__
        raise CommandError(
            f"--img-size {size[-1]}: {name} does not take images of {size[1]}x{size[2]} ({reason(error)}); pass "
            f"another size, its own is {own[-1]}"
        ) from error
    finally:
        model.train(was_training)

"""Models, with weights from wherever they are: a run, a file of anybody's, a folder, the Hub."""

import argparse
import difflib
import os
import pickle
import pickletools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import clean_state_dict, get_pretrained_cfg_value, resolve_model_input_args
from torch import nn

import stvit
from stvit.tools.common.checkpoint import load_checkpoint
from stvit.tools.common.cli import CommandError, KeyValues, positive, reason
from stvit.weights.check import WeightsFileError, find_corruption
from stvit.weights.official import strip_prefix_of
from stvit.weights.read import allowing_flags, read_file

# What a run's checkpoint tells of its model and of the images that it was made for.
RECIPE_KEYS = ("in_chans", "num_classes", "img_size", "mean", "std", "interpolation", "crop_pct")


@dataclass
class Weights:
    """Where a model's weights are, and what is known of the model there.

    Attributes:
        model: timm's name of the model, `local-dir:…` and `hf-hub:…` included.
        file: File of the weights, None where timm finds them by the name.
        recipe: Flags that the weights ask for, of `RECIPE_KEYS` and `model_kwargs`.
        use_ema: Whether to take the moving average of the file or not; None for: if it has one.
    """

    model: str
    file: Path | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    use_ema: bool | None = None


def add_model_arguments(group: Any) -> None:
    """The flags that say which weights and which model to take, alike in every command that only uses them."""
    group.add_argument(
        "--checkpoint",
        metavar="PATH|hf-hub:ORG/NAME",
        help="run, folder or file of weights (default: those of --model)",
    )
    group.add_argument("--model", metavar="NAME", help="model, any of timm's; for a file that does not say it")
    group.add_argument(
        "--use-ema",
        action=argparse.BooleanOptionalAction,
        help="take the moving average of a file that holds both (default: if there is one)",
    )
    group.add_argument("--num-classes", type=positive, metavar="N", help="(default: those of the weights)")
    group.add_argument("--in-chans", type=positive, metavar="N", help="image channels (default: those of the weights)")
    group.add_argument("--model-kwargs", nargs="*", default={}, action=KeyValues, metavar="K=V", help="more of its")


def choose_weights(args: argparse.Namespace) -> Weights:
    """Finds the weights of the flags of `add_model_arguments`, and sets the flags that those ask for, if unset.

    Raises:
        CommandError: If there are none such, or there is nothing that --use-ema could choose between.
    """
    weights = find_weights(args.checkpoint, args.model, args.use_ema) if args.checkpoint else Weights(args.model)
    if args.use_ema is not None and weights.file is None:
        raise CommandError("--use-ema chooses between the weights in one file, and here there is no such file")
    for key in RECIPE_KEYS:
        if getattr(args, key) is None:
            setattr(args, key, weights.recipe.get(key))
    return weights


def find_weights(source: str, model: str | None, use_ema: bool | None = None) -> Weights:
    """What a user means by a checkpoint.

    Args:
        source: A run's folder, a folder of model.safetensors and config.json, a file (of a run, of timm's, the
            authors'), `local-dir:…` or `hf-hub:…`.
        model: timm's name of the model; needed for a file that does not tell.
        use_ema: Whether to take the moving average, which only a file can hold beside the weights.

    Raises:
        CommandError: If there is no such thing, or no telling which model it is of.
    """
    if source.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        return Weights(source)
    path = Path(source).expanduser()
    if not path.exists():
        hint = "; of the Hub it is hf-hub:ORG/NAME" if source.count("/") == 1 else ""
        raise CommandError(f"--checkpoint {source}: there is no such file or folder{hint}")
    if path.is_dir():
        for folder in (path, path / "best"):
            if (folder / "config.json").is_file():
                return Weights(f"local-dir:{folder}")
        raise CommandError(f"--checkpoint {source}: neither it nor its folder best/ holds a config.json")
    config = path.parent / "config.json"
    if path.name == "model.safetensors" and config.is_file() and model is None:
        return Weights(f"local-dir:{path.parent}")
    if path.suffix == ".pt" and path.parent.name == "checkpoints" and model is None:
        recipe = load_checkpoint(path)["recipe"]
        return Weights(recipe["model"], path, {key: recipe.get(key) for key in (*RECIPE_KEYS, "model_kwargs")}, use_ema)
    if model is None:
        raise CommandError(f"--checkpoint {source} does not say which model it is of: give --model")
    return Weights(model, path, use_ema=use_ema)


def read_weights(path: Path, use_ema: bool | None = None) -> tuple[dict[str, Any], bool]:
    """The weights in a file, and whether they are a moving average.

    Args:
        path: safetensors, or PyTorch's format, of which nothing is run.
        use_ema: Whether to take the moving average; None for: if there is one.

    Raises:
        CommandError: If the file cannot be read, or does not hold the kind that is wanted.
    """
    return pick_weights(open_file(path), path, use_ema)


_NO_WEIGHTS = "it is no file of weights, or a damaged one"


def open_file(path: Path) -> Mapping[str, Any]:
    """What a file of weights holds, none of whose code is run.

    Args:
        path: safetensors, or PyTorch's format: tensors, numbers, strings, and the flags of a run.

    Raises:
        CommandError: If the file cannot be read, could exhaust the memory, or holds more than that; names what.
    """
    if not path.is_file():
        raise CommandError(f"cannot read weights from {path}: it is not a file")
    try:
        content = read_file(path)
    except Exception as error:  # unpickling what is no checkpoint raises nearly everything
        wanted = _wanted_code(path, error)
        if wanted:
            raise CommandError(
                f"cannot read weights from {path}: it wants to run {', '.join(wanted)}, and no code of a checkpoint is "
                "run here: ask its owner for the tensors alone, or safetensors"
            ) from error
        if isinstance(error, WeightsFileError):
            why = find_corruption(path) or f"it {error.problem}"
        else:
            why = reason(error) if isinstance(error, OSError) else find_corruption(path) or _NO_WEIGHTS
        raise CommandError(f"cannot read weights from {path}: {why}") from error
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        raise CommandError(f"cannot read weights from {path}: it holds a {type(content).__name__}, not weights by name")
    return content


def _wanted_code(path: Path, error: Exception) -> list[str]:
    """The functions and classes beyond tensors that a pickle asks for, none of which is run."""
    if not isinstance(error, pickle.UnpicklingError):
        return []
    try:
        with allowing_flags():
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # not of PyTorch's present format
        return _named_code(path)


# What PyTorch itself restores.
_ALLOWED = re.compile(
    r"collections\.OrderedDict|argparse\.Namespace|torch\.\w*(Storage|Size|device)|torch\._utils\._rebuild\w+"
)


def _named_code(path: Path) -> list[str]:
    """What a bare pickle names, as far as it can be read."""
    names, strings = set(), [""] * 2
    try:
        with path.open("rb") as file:
            # PyTorch's former format is a row of pickles: a number, a version, the system, what was saved.
            for opcode, value, _ in chain.from_iterable(pickletools.genops(file) for _ in range(4)):
                if opcode.name == "GLOBAL":
                    names.add(str(value).replace(" ", "."))
                elif opcode.name == "STACK_GLOBAL":
                    names.add(".".join(strings[-2:]))
                elif isinstance(value, str):
                    strings.append(value)
    except ValueError:  # where it stops being one
        pass
    return sorted(name for name in names if not _ALLOWED.fullmatch(name))


def pick_weights(content: Mapping[str, Any], path: Path, use_ema: bool | None = None) -> tuple[dict[str, Any], bool]:
    """The weights among what a file holds, and whether they are a moving average.

    Args:
        content: Weights by name, or such below `state_dict`, `state_dict_ema`, `model`, `model_ema`.
        path: The file, for messages.
        use_ema: Whether to take the moving average; None for: if there is one.

    Raises:
        CommandError: If it does not hold the kind that is wanted.
    """
    plain, ema = weights_in(content)
    if use_ema and ema is None:
        raise CommandError(f"{path} holds no moving average of the weights: leave --use-ema out")
    if use_ema is False and ema is not None and plain is None:
        raise CommandError(f"{path} holds a moving average of the weights alone: leave --no-use-ema out")
    key = plain if ema is None or use_ema is False else ema
    weights = content if key is None else content[key]
    if not all(isinstance(name, str) for name in weights):
        raise CommandError(f"cannot read weights from {path}: what it holds has no names")
    return dict(weights), key is not None and key == ema


def strip_weights(model: str, weights: Mapping[str, Any]) -> dict[str, Any]:
    """Removes a prefix of the tensors' names, such as Lightning's `model.`, and prints what it removed and left out.

    Args:
        model: timm's name of the model.
        weights: Tensors by name.

    Raises:
        CommandError: If the model is there under several prefixes.
    """
    try:
        stripped, said = strip_prefix_of(model, weights)
    except ValueError as error:
        raise CommandError(f"cannot read the weights of {model}: {error}") from error
    if said and int(os.environ.get("RANK", "0")) == 0:
        print(f"weights: {said}")
    return clean_state_dict(stripped)  # for tensors under names that only the model's own code in timm knows


def weights_in(content: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Below which keys of a checkpoint the weights and their moving average are, None for nowhere."""
    inside = [key for key, value in content.items() if isinstance(value, Mapping)]
    ema = next((key for key in ("state_dict_ema", "model_ema") if key in inside), None)
    return next((key for key in ("state_dict", "model") if key in inside), None), ema


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
        name: Model name, `local-dir:FOLDER` or `hf-hub:ORG/NAME`.
        pretrained: Whether to load the weights that timm finds by the name.
        weights: Weights to load instead, under our key names or the authors'.
        num_classes: Number of classes; None for that of the weights.
        in_chans: Number of image channels; None for that of the weights.
        img_size: Height and width of the images, in pixels; None for those of the weights. Models of a fixed input
            size are built for this size, and all others take any size.
        grad_checkpointing: Whether to recompute activations in the backward pass, to save memory.
        model_kwargs: Further arguments of the model.

    Raises:
        CommandError: If the model is unknown, cannot be created with these arguments, or does not fit the weights.
    """
    if not timm.is_model(name) and not name.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f", did you mean {' or '.join(near)}?" if near else "; timm.list_models() lists them"
        raise CommandError(f"unknown model {name!r}{hint}")
    overlay: dict[str, Any] = {}
    if weights is not None:
        weights = strip_weights(name, weights)
        overlay["state_dict"] = weights
        # timm keeps a classifier if it has the classes of the weights, which it does not ask the file for.
        for layer in (get_pretrained_cfg_value(name, "classifier"), "head"):
            if f"{layer}.weight" in weights:
                overlay["num_classes"] = len(weights[f"{layer}.weight"])
    if num_classes is None:
        num_classes = overlay.get("num_classes")
    kwargs = dict(model_kwargs or {})
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
    except stvit.PretrainedError as error:
        hint = "" if size is None else f"; if the image size is the reason, remove --img-size {size} or pass another"
        raise CommandError(f"{error}{hint}") from error
    except Exception as error:  # a foreign model, file or network may fail in any way
        hint = "" if size is None else f"; remove --img-size {size} or pass another size"
        raise CommandError(f"cannot create model {name}: {reason(error)}{hint}") from error
    model.pretrained_cfg.pop("state_dict", None)  # held once is enough
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
    except Exception:  # the name cannot be resolved: the caller fails for the same reason, and explains it
        return None
    return img_size if "img_size" in arguments else None


def check_img_size(model: nn.Module, data_config: Mapping[str, Any]) -> None:
    """Runs the model on one blank image if its size is not the one that the weights were made for.

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
    except Exception as error:  # foreign models fail in many ways
        name = config.get("architecture") or type(model).__name__
        raise CommandError(
            f"--img-size {size[-1]}: {name} does not take images of {size[1]}x{size[2]} ({reason(error)}); pass "
            f"another size, its own is {own[-1]}"
        ) from error
    finally:
        model.train(was_training)

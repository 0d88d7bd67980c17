"""Renames the authors' checkpoints and detects the variant of weights.

The authors' code (https://github.com/hhb072/STViT) names the same tensors differently and keeps constant one-hot
kernels in its checkpoints.
"""

import logging
import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import timm
import torch

from stvit.weights.prefix import strip_prefix, tensor_names
from stvit.weights.read import find_weight_keys
from stvit.weights.source import is_own_model

__all__ = ["checkpoint_filter_fn", "find_variant", "is_official", "official_key", "strip_model_prefix"]

_logger = logging.getLogger(__name__)
# One-hot kernels with which the authors' code gathers neighbors.
_FIXED_KERNELS = (".attn.unfold.weights", ".attn.fold.weights")
_CLASSIFIER = ("head.fc.weight", "head.fc.bias")


def is_official(state_dict: Mapping[str, Any]) -> bool:
    """Returns whether a state dict has the authors' key names."""
    return any(key.startswith(("patch_embed.", "layers.")) for key in state_dict)


def official_key(key: str) -> str:
    """Returns the authors' name for a parameter or buffer of STViT."""
    parts = key.split(".")
    if parts[0] == "stem":
        return ".".join(["patch_embed", "proj", *parts[1:]])
    if parts[0] != "stages":
        top = {"final_conv": "proj", "final_norm": "norm", "head": "head"}[parts[0]]
        return f"{top}.{parts[-1]}"
    stage, kind, rest = int(parts[1]), parts[2], parts[3:]
    if kind == "downsample":  # the last layer of a stage there, the first layer of the next stage here
        return ".".join(["layers", str(stage - 1), "downsample", "proj", *rest])
    block, layer, rest = rest[0], rest[1], rest[2:]
    names = {
        "cpe": ["pos_embed", *rest],
        "norm1": ["norm1", "norm", *rest],
        "attn": ["attn", "stoken_refine", *rest],
        "ls1": ["gamma_1"],
        "norm2": ["norm2", *rest],
        "mlp": ["mlp2", *rest],
        "ls2": ["gamma_2"],
    }
    return ".".join(["layers", str(stage), "blocks", block, *names[layer]])


def checkpoint_filter_fn(state_dict: dict[str, Any], model: Any) -> dict[str, torch.Tensor]:
    """Renames and checks the weights in a checkpoint for a model.

    timm calls this function after reading a file. It then adapts the classifier and the first convolution itself.
    Everything else is checked here, because timm ignores missing tensors if `num_classes` differs.

    Args:
        state_dict: Weights under this package's or the authors' names. They may be below a key such as 'model_ema' or
            have a prefix such as Lightning's `model.`, which is removed with a warning. The authors' one-hot kernels
            may be missing.
        model: The `STViT` to load the weights into.

    Raises:
        RuntimeError: If a key is missing or unexpected, or a tensor has a wrong shape. The message names the keys.
        ValueError: If the weights are under several prefixes.
    """
    plain, ema = find_weight_keys(state_dict)
    wrapper = ema or plain
    state_dict = state_dict[wrapper] if wrapper else state_dict
    pretrained_cfg: Any = getattr(model, "pretrained_cfg", {})
    names = model.state_dict().keys()
    state_dict, summary = strip_prefix(state_dict, {*names, *map(official_key, names)})
    if summary:
        _logger.warning("%s: %s", pretrained_cfg.get("architecture", "STViT"), summary)
    if pretrained_cfg.get("classifier") not in (None, "head.fc"):  # timm would leave the classifier random
        raise RuntimeError(f"expected head.fc as the classifier in config.json, got {pretrained_cfg['classifier']}")
    weights, problems = _match_keys(state_dict, model)
    if problems:
        shown = "; ".join(problems[:10]) + ("; …" if len(problems) > 10 else "")
        count = f"{len(problems)} mismatch{'es' if len(problems) > 1 else ''}"
        raise RuntimeError(f"The weights do not fit the model ({count}; {_hint(state_dict, model)}): {shown}")
    return weights


def _match_keys(state_dict: Mapping[str, Any], model: Any) -> tuple[dict[str, Any], list[str]]:
    """Renames weights; returns them and a description of each mismatch."""
    official = is_official(state_dict)
    rest = dict(state_dict)
    if official:
        _remove_fixed_kernels(rest)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    # timm loads a classifier of the model's size unchanged and replaces any other.
    is_loaded = model.num_classes > 0 and model.num_classes == getattr(model, "pretrained_cfg", {}).get("num_classes")
    classifier = () if is_loaded else _CLASSIFIER
    weights, problems = {}, []
    for key in [*(key for key in shapes if key not in classifier), *classifier]:
        name = official_key(key) if official else key
        if name not in rest:
            if key not in classifier:
                problems.append(f"missing key {name}")
            continue
        value = rest.pop(name)
        if official and name.endswith((".gamma_1", ".gamma_2")):
            value = value.flatten()  # (1, C, 1, 1) to (C,)
        shape = tuple(value.shape)
        if key == "stem.0.weight":  # timm adapts the number of image channels
            fits = shape[:1] + shape[2:] == shapes[key][:1] + shapes[key][2:]
        else:
            fits = key in classifier or shape == shapes[key]
        if not fits:
            problems.append(f"key {name} has shape {shape}, expected {shapes[key]}")
        weights[key] = value
    return weights, problems + [f"unexpected key {name}" for name in rest]


def _remove_fixed_kernels(state_dict: dict[str, Any]) -> None:
    """Removes the one-hot kernels, which are constants in this package.

    Raises:
        RuntimeError: If a kernel has other values.
    """
    for key in [key for key in state_dict if key.endswith(_FIXED_KERNELS)]:
        kernel = state_dict.pop(key)
        if not torch.equal(kernel.cpu().float().reshape(9, -1), torch.eye(9)):
            raise RuntimeError(
                f"The weights do not fit the model: expected the authors' nine one-hot 3x3 kernels in {key}, got other "
                "values"
            )


def _hint(state_dict: Mapping[str, Any], model: Any) -> str:
    """Returns what the weights belong to, and what to do."""
    variant = find_variant(state_dict)
    if variant is None:
        return "check that the variant is right"
    if variant != getattr(model, "pretrained_cfg", {}).get("architecture"):
        return f"these are weights of {variant}; create that model"
    classifier = state_dict.get("head.fc.weight", state_dict.get("head.weight"))
    classes = 0 if classifier is None else len(classifier)
    if classes != model.num_classes:
        return (
            f"these weights have {classes} classes; pass pretrained_cfg_overlay=dict(num_classes={classes}), or load "
            "them by a name with a config.json, hf-hub:ORG/NAME or local-dir:FOLDER"
        )
    return f"these are weights of {variant} with default arguments; check the arguments of the model"


def find_variant(state_dict: Mapping[str, Any]) -> str | None:
    """Returns the model that weights belong to; None if it is not of this package.

    Names and shapes of the tensors determine the model.

    Args:
        state_dict: Weights under this package's or the authors' names, with or without a prefix such as Lightning's
            `model.`. Number of classes and image channels are ignored.
    """
    state_dict = strip_prefix(state_dict, _known_keys())[0]
    found = {
        key: tuple(value.shape)
        for key, value in state_dict.items()
        if isinstance(value, torch.Tensor) and not key.endswith(_FIXED_KERNELS)
    }
    official = is_official(found)
    for variant in timm.list_models(module="stvit"):
        shapes = {official_key(key) if official else key: shape for key, shape in _shapes_of(variant).items()}
        if shapes.keys() - {"head.weight", "head.bias", *_CLASSIFIER} <= found.keys() and all(
            _fits_any_task(key, found[key], shapes.get(key)) for key in found
        ):
            return variant
    return None


def strip_model_prefix(model_name: str, state_dict: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Calls `strip_prefix` with the key names of a model.

    For models of this package these include the authors' names.

    Args:
        model_name: Model or tag of timm. The state dict of an unknown model is returned unchanged.
        state_dict: Tensors by key.

    Returns:
        The state dict without the prefix, and a sentence about the change; empty if nothing changed.

    Raises:
        ValueError: If the model's tensors are under several prefixes.
    """
    if is_own_model(model_name):
        return strip_prefix(state_dict, _known_keys())
    return strip_prefix(state_dict, tensor_names(model_name) if timm.is_model(model_name) else ())


@cache
def _known_keys() -> frozenset[str]:
    """Returns the keys of all models of this package, under both names."""
    keys = {key for variant in timm.list_models(module="stvit") for key in _shapes_of(variant)}
    return frozenset({*keys, *map(official_key, keys)})


@cache
def _shapes_of(variant: str) -> dict[str, tuple[int, ...]]:
    model: Any = timm.create_model(variant, device="meta")
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def _fits_any_task(key: str, shape: tuple[int, ...], expected: tuple[int, ...] | None) -> bool:
    """Returns whether a shape fits, apart from classes and image channels."""
    if expected is None:
        return False
    if key in ("stem.0.weight", "patch_embed.proj.0.weight"):
        return shape[:1] + shape[2:] == expected[:1] + expected[2:]
    if key.startswith("head."):
        return shape[1:] == expected[1:]
    if key.endswith((".gamma_1", ".gamma_2")):
        return math.prod(shape) == math.prod(expected)
    return shape == expected

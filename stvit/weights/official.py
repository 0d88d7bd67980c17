"""The key names of the authors' checkpoints, and the model that weights are of."""

import logging
import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import timm
import torch

from stvit.weights.errors import is_own_model
from stvit.weights.prefix import strip_prefix, tensor_names

__all__ = ["checkpoint_filter_fn", "find_variant", "is_official", "official_key", "strip_prefix_of"]

_logger = logging.getLogger(__name__)
_FIXED_KERNELS = (".attn.unfold.weights", ".attn.fold.weights")


def is_official(state_dict: Mapping[str, Any]) -> bool:
    return any(key.startswith(("patch_embed.", "layers.")) for key in state_dict)


def official_key(key: str) -> str:
    """The published code's name for a parameter or buffer of STViT."""
    parts = key.split(".")
    if parts[0] == "stem":
        return ".".join(["patch_embed", "proj", *parts[1:]])
    if parts[0] != "stages":
        top = {"final_conv": "proj", "final_norm": "norm", "head": "head"}[parts[0]]
        return f"{top}.{parts[-1]}"
    stage, kind, rest = int(parts[1]), parts[2], parts[3:]
    if kind == "downsample":  # theirs ends a stage, ours begins the next
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
    """Renames the published code's weights to ours, and checks that the weights are the model's, all of them.

    timm calls this between reading a file and adapting its classifier and first convolution to the model; those two
    are left to it. The rest is checked here because timm loads without complaint what is missing once `num_classes`
    differs.

    Args:
        state_dict: Weights under our names or the published code's, bare or below 'model_ema', 'model', …, with or
            without a prefix such as Lightning's `model.`, which is removed with a warning. The published code's
            one-hot kernels `fold` and `unfold` are constants, and may be absent.
        model: What they are for.

    Returns:
        The weights under our names.

    Raises:
        RuntimeError: If a key is missing, left over, or of another shape; names it.
        ValueError: If the weights are under several prefixes.
    """
    for wrapper in ("state_dict_ema", "model_ema", "state_dict", "model"):  # timm's order
        if isinstance(state_dict.get(wrapper), Mapping):
            state_dict = state_dict[wrapper]
            break
    names = model.state_dict().keys()
    state_dict, said = strip_prefix(state_dict, {*names, *map(official_key, names)})
    if said:
        _logger.warning("%s: %s", getattr(model, "pretrained_cfg", {}).get("architecture", "STViT"), said)
    official = is_official(state_dict)
    left = dict(state_dict)
    if official:
        _take_fixed_kernels(left)

    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    classifier: tuple[str, ...] = ("head.fc.weight", "head.fc.bias")
    pretrained_cfg: Any = getattr(model, "pretrained_cfg", {})
    if pretrained_cfg.get("classifier") not in (None, "head.fc"):
        # timm leaves at random what this names
        raise RuntimeError(f"The classifier is head.fc, and not {pretrained_cfg['classifier']} as config.json says")
    if model.num_classes > 0 and model.num_classes == pretrained_cfg.get("num_classes"):
        classifier = ()  # it is loaded as it is, and so checked like the rest
    out_dict, problems = {}, []
    for key in [*(key for key in shapes if key not in classifier), *classifier]:
        name = official_key(key) if official else key
        if name not in left:
            if key not in classifier:
                problems.append(f"missing key {name}")
            continue
        value = left.pop(name)
        if official and name.endswith((".gamma_1", ".gamma_2")):
            value = value.flatten()  # (1, C, 1, 1), ours is 1-D
        shape = tuple(value.shape)
        if key == "stem.0.weight":
            fits = shape[:1] + shape[2:] == shapes[key][:1] + shapes[key][2:]
        else:
            fits = key in classifier or shape == shapes[key]
        if not fits:
            problems.append(f"key {name} has shape {shape}, the model's is {shapes[key]}")
        out_dict[key] = value
    problems += [f"left-over key {name}" for name in left]
    if problems:
        shown = "; ".join(problems[:10]) + ("; …" if len(problems) > 10 else "")
        mismatches = f"{len(problems)} mismatch{'es' if len(problems) > 1 else ''}"
        raise RuntimeError(f"The weights do not fit the model ({mismatches}, {_hint(state_dict, model)}): {shown}")
    return out_dict


def _hint(state_dict: Mapping[str, Any], model: Any) -> str:
    """What weights that do not fit a model are of instead."""
    variant = find_variant(state_dict)
    if variant is None:
        return "is it the right variant?"
    if variant != getattr(model, "pretrained_cfg", {}).get("architecture"):
        return f"they are those of {variant}: create that"
    classifier = state_dict.get("head.fc.weight", state_dict.get("head.weight"))
    classes = 0 if classifier is None else len(classifier)
    if classes != model.num_classes:
        return (
            f"they have {classes} classes: load them by a name whose config.json says so, hf-hub:… or local-dir:…, or "
            f"with pretrained_cfg_overlay=dict(num_classes={classes})"
        )
    return f"they are those of {variant} as it is: was it created with other arguments?"


def find_variant(state_dict: Mapping[str, Any]) -> str | None:
    """The model of this package that weights are of, by their names and shapes; None if it is none of them.

    Args:
        state_dict: Weights under our names or the published code's, with or without a prefix such as Lightning's
            `model.`. Classifier and image channels may be of any size: they do not tell.
    """
    state_dict = strip_prefix(state_dict, _known_names())[0]
    found = {
        key: tuple(value.shape)
        for key, value in state_dict.items()
        if isinstance(value, torch.Tensor) and not key.endswith(_FIXED_KERNELS)
    }
    official = is_official(found)
    for variant in timm.list_models(module="stvit"):
        shapes = {official_key(key) if official else key: shape for key, shape in _shapes_of(variant).items()}
        if shapes.keys() - {"head.weight", "head.bias", "head.fc.weight", "head.fc.bias"} <= found.keys() and all(
            _fits_any_task(key, found[key], shapes.get(key)) for key in found
        ):
            return variant
    return None


def strip_prefix_of(model_name: str, state_dict: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """`stvit.weights.prefix.strip_prefix` for a model of timm, and for one of this package under the published names too.

    Args:
        model_name: timm's name of the model, with or without a tag. The weights of an unknown model stay as they are.
        state_dict: Tensors by name.
    """
    if is_own_model(model_name):
        return strip_prefix(state_dict, _known_names())
    return strip_prefix(state_dict, tensor_names(model_name) if timm.is_model(model_name) else ())


@cache
def _known_names() -> frozenset[str]:
    """Names of the tensors of all models of this package, ours and the published code's."""
    names = {name for variant in timm.list_models(module="stvit") for name in _shapes_of(variant)}
    return frozenset({*names, *map(official_key, names)})


@cache
def _shapes_of(variant: str) -> dict[str, tuple[int, ...]]:
    model: Any = timm.create_model(variant, device="meta")
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def _fits_any_task(key: str, shape: tuple[int, ...], expected: tuple[int, ...] | None) -> bool:
    if expected is None:
        return False
    if key in ("stem.0.weight", "patch_embed.proj.0.weight"):
        return shape[:1] + shape[2:] == expected[:1] + expected[2:]
    if key.startswith("head."):
        return shape[1:] == expected[1:]
    if key.endswith((".gamma_1", ".gamma_2")):
        return math.prod(shape) == math.prod(expected)
    return shape == expected


def _take_fixed_kernels(state_dict: dict[str, Any]) -> None:
    """Removes the one-hot kernels by which the published code gathers neighbors, constants that we do not keep."""
    for key in [key for key in state_dict if key.endswith(_FIXED_KERNELS)]:
        kernel = state_dict.pop(key)
        if not torch.equal(kernel.cpu().float().reshape(9, -1), torch.eye(9)):
            raise RuntimeError(
                f"The weights do not fit the model: key {key} must hold the nine one-hot 3x3 kernels of the published "
                "code, and has been changed"
            )

"""State dicts of other training programs, which hold a model's tensors under a prefix."""

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import timm
import torch

__all__ = ["strip_prefix", "tensor_names"]

_COMPILED = "_orig_mod."  # torch.compile adds it to the name of each module that it wraps


def strip_prefix(state_dict: Mapping[str, Any], names: Collection[str]) -> tuple[dict[str, Any], str]:
    """Removes the prefix under which a state dict holds a model's tensors.

    Lightning writes `model.stem.0.weight` for a model in its attribute `model`. Other programs write `module.`,
    `backbone.`, `ema.module.` or `net._orig_mod.`. The prefix is the one under which most of the model's names are.
    Tensors without the prefix belong to other modules, such as losses and metrics, and are left out.

    Args:
        state_dict: Tensors by name.
        names: Names of the model's own tensors.

    Returns:
        The tensors without the prefix, and a sentence that says what was removed and left out. The sentence is empty
        if the state dict has no prefix, or holds no tensors of this model; it is then unchanged.

    Raises:
        ValueError: If the model is under several prefixes.
    """
    weights = {key.replace(_COMPILED, ""): value for key, value in state_dict.items()}
    found: Counter[str] = Counter()
    for key in weights:
        start = 0
        while True:
            if key[start:] in names:
                found[key[:start]] += 1
            start = key.find(".", start) + 1
            if not start:
                break
    most = max(found.values(), default=0)
    prefixes = [prefix for prefix, count in found.items() if count == most]
    prefix = "" if "" in prefixes or not prefixes else prefixes[0]
    inside = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    if 2 * most < len(inside):  # another model, of which some names are alike
        return dict(state_dict), ""
    if prefix and len(prefixes) > 1:
        if 2 * most * len(prefixes) < len(weights):  # parts of modules that have the name of another one
            return dict(state_dict), ""
        raise ValueError(
            f"the model's tensors are under several prefixes, {' and '.join(map(repr, prefixes))}; save those of one "
            "prefix in a file of their own"
        )
    removed = [prefix] if prefix else []
    removed += [_COMPILED] if any(_COMPILED in key for key in state_dict) else []
    if not removed:
        return dict(state_dict), ""
    said = f"removed the prefix {' and '.join(map(repr, removed))} from the names of {len(inside)} tensors"
    left = [key for key in weights if not key.startswith(prefix)]
    if left:
        said += f"; left out {len(left)} tensors without it: {', '.join(left[:5])}{', …' if len(left) > 5 else ''}"
    return inside, said


def tensor_names(model_name: str) -> set[str]:
    """Returns the names of the parameters and buffers of a timm model. Allocates no memory for them."""
    with torch.device("meta"):
        return set(timm.create_model(model_name).state_dict())

"""Removes prefixes such as Lightning's `model.` from the keys of a state dict."""

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import timm
import torch

__all__ = ["strip_prefix", "tensor_names"]

_COMPILED = "_orig_mod."  # torch.compile adds it to the name of each module that it wraps


def strip_prefix(state_dict: Mapping[str, Any], names: Collection[str]) -> tuple[dict[str, Any], str]:
    """Removes a prefix from the keys of a state dict.

    Lightning writes `model.stem.0.weight` for a model in its attribute `model`. Other programs write `module.`,
    `backbone.`, `ema.module.` or `net._orig_mod.`. This function finds the prefix under which most tensors of the model
    are, and removes it. It drops tensors without this prefix, because they belong to other modules, such as losses.

    Args:
        state_dict: Tensors by key.
        names: Keys of the model's state dict.

    Returns:
        The new state dict, and a message about the removed prefix and the dropped tensors. If there is no prefix, or if
        the state dict belongs to another model, it is unchanged and the message is empty.

    Raises:
        ValueError: If two or more prefixes hold equally many of the model's tensors, such as a student and a teacher.
    """
    weights = {key.replace(_COMPILED, ""): value for key, value in state_dict.items()}
    # Splits each key at every dot. Counts the left part as a prefix if the right part is a key of the model.
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
    if 2 * most < len(inside):  # most keys are unknown: another model that shares some keys
        return dict(state_dict), ""
    if prefix and len(prefixes) > 1:
        if 2 * most * len(prefixes) < len(weights):  # submodules with equal names, not several models
            return dict(state_dict), ""
        raise ValueError(
            f"the model's tensors are under several prefixes, {' and '.join(map(repr, prefixes))}; save the tensors of "
            "one prefix in a separate file"
        )
    removed = [prefix] if prefix else []
    removed += [_COMPILED] if any(_COMPILED in key for key in state_dict) else []
    if not removed:
        return dict(state_dict), ""
    summary = f"removed the prefix {' and '.join(map(repr, removed))} from {len(inside)} keys"
    dropped = [key for key in weights if not key.startswith(prefix)]
    if dropped:
        shown = f"{', '.join(dropped[:5])}{', …' if len(dropped) > 5 else ''}"
        summary += f"; dropped {len(dropped)} tensors without this prefix: {shown}"
    return inside, summary


def tensor_names(model_name: str) -> set[str]:
    """Returns the keys of a timm model's state dict, without allocating its tensors."""
    with torch.device("meta"):
        return set(timm.create_model(model_name).state_dict())

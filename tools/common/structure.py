"""Structure checks of values from untrusted files: types, keys and shapes."""

from collections.abc import Mapping
from typing import Any

import torch


def find_mismatch(value: Any, like: Any, name: str = "") -> str | None:
    """Compares the structure of a value from a file with that of a similar value.

    Args:
        value: Value to check. A mapping may have more keys than `like`.
        like: Expected types, lengths of sequences, and shapes and dtypes of tensors. Numbers may have other values. An
            empty sequence or mapping matches any of its type. None matches None, a number or a text.
        name: Name of the value, for the message.

    Returns:
        A description of the first difference; None if the structures are equal.
    """
    if isinstance(like, torch.Tensor):
        if not isinstance(value, torch.Tensor):
            return f"{name} is {_kind(value)}, expected a tensor"
        if (value.shape, value.dtype) != (like.shape, like.dtype):
            return f"{name} has shape {_shape(value)} and {value.dtype}, expected {_shape(like)} and {like.dtype}"
    elif isinstance(like, Mapping):
        if not isinstance(value, Mapping):
            return f"{name or 'the content'} is {_kind(value)}, expected a mapping"
        prefix = f"{name}." if name else ""
        for key, part in like.items():
            if key not in value:
                return f"{prefix}{key} is missing"
            mismatch = find_mismatch(value[key], part, f"{prefix}{key}")
            if mismatch is not None:
                return mismatch
    elif isinstance(like, list | tuple):
        if not isinstance(value, list | tuple):
            return f"{name} is {_kind(value)}, expected a list"
        if like and len(value) != len(like):
            return f"{name} has {len(value)} elements, expected {len(like)}"
        mismatches = (find_mismatch(*pair, f"{name}[{i}]") for i, pair in enumerate(zip(value, like, strict=False)))
        return next((mismatch for mismatch in mismatches if mismatch is not None), None)
    elif like is None:
        if value is not None and not isinstance(value, int | float | str):
            return f"{name} is {_kind(value)}, expected None, a number or a text"
        if _is_too_large(value):
            return f"{name} is too large a number"
    elif isinstance(like, float):
        if isinstance(value, bool) or not isinstance(value, int | float):
            return f"{name} is {_kind(value)}, expected a number"
        if _is_too_large(value):
            return f"{name} is too large a number"
    elif type(value) is not type(like):
        return f"{name} is {_kind(value)}, expected {type(like).__name__}"
    elif _is_too_large(value):
        return f"{name} is too large a number"
    return None


def _is_too_large(value: Any) -> bool:
    """Returns whether a whole number does not fit into 64 bits.

    Tensors and floats cannot hold it.
    """
    return isinstance(value, int) and not -(2**63) <= value < 2**63


# Optimizer state that has the shape of its parameter, or is one number for the parameter.
_LIKE_PARAMETER = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "grad_avg", "sum"}


def find_optimizer_mismatch(state: Any, optimizer: torch.optim.Optimizer) -> str | None:
    """Compares the structure of an optimizer state with that of an optimizer.

    `Optimizer.load_state_dict` only compares the numbers of parameters. Tensors of wrong shapes would fail in a later
    step.

    Args:
        state: State to check.
        optimizer: Optimizer that will load the state. Options that only one of the two has are not compared.

    Returns:
        A description of the first difference; None if the structures are equal.
    """
    groups = optimizer.state_dict()["param_groups"]
    like = {"state": {}, "param_groups": [{"params": group["params"]} for group in groups]}
    mismatch = find_mismatch(state, like, "optimizer")
    if mismatch is not None:
        return mismatch
    for i, (group, own) in enumerate(zip(state["param_groups"], groups, strict=True)):
        common = {key: value for key, value in own.items() if key in group}
        mismatch = find_mismatch(group, common, f"optimizer.param_groups[{i}]")
        if mismatch is not None:
            return mismatch
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    by_number = dict(zip(numbers, parameters, strict=True))
    for number, values in state["state"].items():
        name = f"optimizer.state[{number!r}]"
        if number not in by_number or not isinstance(values, Mapping):
            return f"{name} belongs to no parameter"
        for key, value in values.items():
            shape = by_number[number].shape
            if isinstance(value, str):
                return f"{name}[{key!r}] is a text"
            if value is None and key != "momentum_buffer":  # SGD without momentum has none
                return f"{name}[{key!r}] is None"
            if isinstance(value, torch.Tensor) and key in _LIKE_PARAMETER and value.ndim and value.shape != shape:
                return f"{name}[{key!r}] has shape {_shape(value)}, its parameter {_shape(by_number[number])}"
    return None


def _kind(value: Any) -> str:
    return "None" if value is None else f"of type {type(value).__name__}"


def _shape(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "()"

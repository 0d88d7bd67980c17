"""Defines operators that PyTorch sees as a whole.

With the environment variable STVIT_OPS_INLINE=1, torch.compile sees the kernels inside the operators.
"""

import os
from collections.abc import Callable
from typing import Any

import torch

from stvit.ops.backends import is_interpreted

__all__ = ["IS_INLINED", "operator"]

# Whether torch.compile sees the kernels. Not the default, because it has not been measured on a GPU.
IS_INLINED = os.environ.get("STVIT_OPS_INLINE") == "1" and not is_interpreted()


def operator(name: str) -> Callable[[Callable[..., Any]], torch._ops.OpOverload]:
    """Defines an operator that allocates its results and changes no argument.

    Unlike `torch.library.custom_op`, it does not compare the results with the arguments in each call. With torch 2.11
    this took a third of a millisecond, ten times as long as a launch. `torch.library.opcheck` checks the same once, in
    the tests.

    Args:
        name: Name with a namespace.
    """

    def define(function: Callable[..., Any]) -> torch._ops.OpOverload:
        schema = torch.library.infer_schema(function, mutates_args=())
        torch.library.define(name, schema, tags=torch.Tag.pt2_compliant_tag)
        torch.library.impl(name, "default", function)
        namespace, short = name.split("::")
        overload = getattr(getattr(torch.ops, namespace), short).default
        overload.__wrapped__ = function
        if IS_INLINED:
            _inline(name, function)
        return overload

    return define


def _inline(name: str, function: Callable[..., Any]) -> None:
    """Lets torch.compile see the kernels of an operator.

    `torch.library.triton_op` does the same. It is not used here because its operators compare their results with their
    arguments in each call.
    """
    from torch._subclasses.functional_tensor import FunctionalTensorMode

    def decompose(mode: Any, overload: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if getattr(torch.compiler, "is_exporting", lambda: False)():  # exported programs contain the operator
            return mode.__torch_dispatch__(overload, types, args, kwargs)
        with mode:
            return function(*args, **kwargs)

    torch.library.register_torch_dispatch(name, FunctionalTensorMode, decompose)

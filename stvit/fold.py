"""Folding of batch normalizations into the convolutions beside them, for inference.

Works on any timm model that torch.fx can trace. What it computes stays the same, to rounding.
"""

import threading
from typing import Any

import torch
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import fx, nn

__all__ = ["fold_batch_norms"]


# Two tracers at a time would restore what the other one has replaced.
_TRACING = threading.Lock()


class _Tracer(fx.Tracer):
    """Traces every module but PyTorch's own and normalizations.

    torch.fx replaces `nn.Module.__call__` of the whole process while it traces. Modules that run in other threads are
    called as always.
    """

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.BatchNorm2d) or super().is_leaf_module(m, module_qualified_name)


class _CarefulTracer(_Tracer):
    """Looks into those modules alone that hold a batch normalization: others may branch on sizes."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        holds = any(isinstance(module, nn.BatchNorm2d) for module in m.modules())
        return not holds or super().is_leaf_module(m, module_qualified_name)


@torch.no_grad()
def fold_batch_norms(model: nn.Module) -> int:
    """Folds each batch normalization into the convolution before it, or the 1x1 convolution after it, in place.

    Folded are those of which nothing else sees the input (or the output). The statistics are those of evaluation
    mode, whichever mode the model is in. Names of the convolutions stay; a normalization gives way to the identity,
    or to its activation.

    Args:
        model: Traceable by torch.fx.

    Returns:
        How many were folded.

    Raises:
        ValueError: If the model cannot be traced; it is then as it was.
    """
    graph = _trace(model)
    modules = dict(model.named_modules())
    calls = [node for node in graph.nodes if node.op == "call_module"]
    targets = [node.target for node in calls]
    folded = 0
    for node in calls:
        bn = modules.get(str(node.target))
        if not isinstance(bn, nn.BatchNorm2d) or targets.count(node.target) > 1 or bn.running_var is None:
            continue
        before = _only_conv(node.args[0] if node.args else None, modules, targets)
        after = _only_conv(next(iter(node.users)) if len(node.users) == 1 else None, modules, targets)
        scale, shift = _scale_and_shift(bn)
        if before is not None and len(node.args[0].users) == 1:
            _scale_outputs(before, scale, shift)
        elif after is not None and _is_pointwise(after) and not isinstance(bn, BatchNormAct2d):
            _scale_inputs(after, scale, shift)
        else:
            continue
        model.set_submodule(
            str(node.target), nn.Sequential(bn.drop, bn.act) if isinstance(bn, BatchNormAct2d) else nn.Identity()
        )
        folded += 1
    return folded


def _trace(model: nn.Module) -> fx.Graph:
    with _TRACING:
        try:
            return _Tracer().trace(model)
        except Exception:  # a model's own code runs, and may raise anything on a symbolic tensor
            try:
                return _CarefulTracer().trace(model)
            except Exception as error:
                raise ValueError(
                    f"torch.fx cannot trace the model ({type(error).__name__}: {error}); pass its backbone instead"
                ) from error


def _only_conv(node: Any, modules: dict[str, nn.Module], targets: list[Any]) -> nn.Conv2d | None:
    """The plain convolution that a node calls, if nothing else calls it."""
    if not isinstance(node, fx.Node) or node.op != "call_module" or targets.count(node.target) > 1:
        return None
    module = modules.get(str(node.target))
    # Other subclasses may change their weight on the way, as weight standardization does.
    return module if type(module) in (nn.Conv2d, Conv2dSame) else None  # type: ignore[return-value]


def _is_pointwise(conv: nn.Conv2d) -> bool:
    return conv.kernel_size == (1, 1) and conv.padding in ((0, 0), "valid") and conv.groups == 1


def _scale_and_shift(bn: nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    """The normalization as scale * x + shift, in float64."""
    assert bn.running_mean is not None and bn.running_var is not None
    scale = (bn.running_var.double() + bn.eps).rsqrt()
    if bn.weight is not None:
        scale = scale * bn.weight.double()
    shift = -bn.running_mean.double() * scale
    return scale, shift if bn.bias is None else shift + bn.bias.double()


def _scale_outputs(conv: nn.Conv2d, scale: torch.Tensor, shift: torch.Tensor) -> None:
    bias = 0.0 if conv.bias is None else conv.bias.double()
    _set_bias(conv, bias * scale + shift)
    conv.weight.copy_(conv.weight.double() * scale.reshape(-1, 1, 1, 1))


def _scale_inputs(conv: nn.Conv2d, scale: torch.Tensor, shift: torch.Tensor) -> None:
    weight = conv.weight.double()
    bias = 0.0 if conv.bias is None else conv.bias.double()
    _set_bias(conv, bias + weight.flatten(1) @ shift)
    conv.weight.copy_(weight * scale.reshape(1, -1, 1, 1))


def _set_bias(conv: nn.Conv2d, bias: torch.Tensor) -> None:
    if conv.bias is None:
        conv.bias = nn.Parameter(bias.to(conv.weight), requires_grad=conv.weight.requires_grad)
    else:
        conv.bias.copy_(bias)

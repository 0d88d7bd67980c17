"""Optimizes a model for inference.

Constants are folded, weights become channels_last, and MLPs are computed in tiles. Batch normalizations are folded with
torch.fx. This works for any timm model that torch.fx can trace.

Shapes: as in stvit/stvit.py
"""

import copy
import gc
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, Conv2dSame, DropPath, LayerScale2d
from torch import fx, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from stvit.cuda_graphs import no_garbage_collection, use_cuda_graphs
from stvit.ops import SuperTokenAttention, layers, triton
from stvit.ops.backends import choose_backend, describe_context, import_kernels, is_autocast
from stvit.stvit import (
    ConvMlp,
    ResidualDepthwiseConv,
    Stem,
    STViTBlock,
    fused_mlp,
    why_not_activate,
    why_not_fused_mlp,
)

__all__ = [
    "FoldedResidualConv",
    "OptimizedBlock",
    "OptimizedStem",
    "TiledConvMlp",
    "fold_batch_norms",
    "fold_constants",
    "optimize_for_inference",
]

# Size of one tile of an MLP's hidden map. An MLP holds a few maps of this size, which fit in the last-level cache.
# docs/speed.md lists the sizes that were tried.
TILE_BYTES = 8 * 2**20
# Neighboring tiles both compute the rows at their common border, so short tiles waste work.
MIN_TILE_ROWS = 8


def optimize_for_inference(model: nn.Module, cuda_graphs: bool = False) -> nn.Module:
    """Returns a copy that is faster and smaller in inference but cannot be trained.

    - Batch normalizations are folded into the convolution before them, or into a 1x1 convolution after them.
    - `x + depthwise(x)` becomes one depthwise convolution whose kernel has a 1 added at its center. This applies to
      float32 and float64. In bfloat16 and float16 the sum would lose bits, so the addition stays.
    - Layer scale is folded into the projection before it. Dropout and stochastic depth are removed.
    - Computed weights (parametrizations, pruning masks, weight norm) are replaced by their values.
    - Weights become channels_last. On a CPU, MLPs compute their hidden maps in tiles.

    Layers with hooks, subclasses and modules that replace a layer (LoRA) are not folded or replaced. Four batch
    normalizations of the stem are not folded either: each follows an activation and precedes a convolution that pads
    with zeros.

    The outputs are the same up to rounding. In float32 they differ by less than 1e-4 standard deviations. In reduced
    precision they are as close to float32 as the outputs of the plain model.

    The copy has the same class and the same methods. It can be exported, compiled, scripted and pickled. Its state
    dict has other keys, so load weights before optimizing. Do not change weights afterwards: some are part of others.

    Args:
        model: `STViT` in evaluation mode, or a module that contains one (`features_only=True`, a detector). Batch
            normalizations of other models are also folded if torch.fx can trace the model.
        cuda_graphs: Whether the copy replays CUDA graphs, which removes the launch overhead of small batches on a GPU.
            The first call with each input shape takes seconds. `stvit.cuda_graphs` describes the conditions.

    Raises:
        ValueError: If the model is in training mode or torch.fx cannot trace it.
        TypeError: If the model is already compiled or scripted.
    """
    if not isinstance(model, nn.Module) or isinstance(model, (torch.jit.ScriptModule, torch._dynamo.OptimizedModule)):
        raise TypeError(
            f"optimize_for_inference expected a plain model, got {type(model).__name__}; optimize first, then compile "
            "or script"
        )
    training = [name or "the model" for name, module in model.named_modules() if module.training]
    if training:
        raise ValueError(
            "optimize_for_inference expected a model in evaluation mode; call model.eval() first (in training mode: "
            f"{', '.join(training[:3])}{', …' if len(training) > 3 else ''})"
        )
    model = copy.deepcopy(model, _computed_tensors(model)).requires_grad_(False)
    fold_constants(model)
    model = model.eval().to(memory_format=torch.channels_last)
    use_cuda_graphs(model, cuda_graphs)
    return model


@torch.no_grad()
def fold_constants(model: nn.Module) -> int:
    """Folds constants in place and returns the number of folded batch normalizations.

    `optimize_for_inference` lists what is folded. The folded model can be used in evaluation mode only.

    Args:
        model: Model in training or evaluation mode.

    Raises:
        ValueError: If torch.fx cannot trace the model. Its batch normalizations and layer scales are then unchanged.
    """
    for module in model.modules():
        _set_computed_weights(module)
    folded = fold_batch_norms(model)
    for stem in [module for module in model.modules() if type(module) is Stem]:
        OptimizedStem.convert(stem)
    blocks: list[Any] = [module for module in model.modules() if isinstance(module, STViTBlock)]
    for block in blocks:
        if layers.is_plain(block.attn, SuperTokenAttention) and layers.is_plain(block.attn.proj_drop, nn.Dropout):
            block.ls1 = _fold_layer_scale(block.attn.proj, block.ls1)
        if layers.is_plain(block.mlp, ConvMlp) and layers.is_plain(block.mlp.drop2, nn.Dropout):
            block.ls2 = _fold_layer_scale(block.mlp.fc2, block.ls2)
            convs = (block.mlp.fc1, block.mlp.conv.conv, block.mlp.fc2)
            is_plain = all(layers.is_plain(conv, nn.Conv2d) for conv in convs)
            is_plain = is_plain and layers.is_plain(block.mlp.conv, ResidualDepthwiseConv)
            if is_plain and layers.is_plain(block.mlp.drop1, nn.Dropout):
                block.mlp = TiledConvMlp(block.mlp)
        if layers.is_plain(block.cpe, ResidualDepthwiseConv) and layers.is_plain(block.cpe.conv, nn.Conv2d):
            block.cpe = FoldedResidualConv(block.cpe)
        if type(block) is STViTBlock:
            OptimizedBlock.convert(block)
        if isinstance(block.attn.attn_drop, nn.Dropout):
            block.attn.attn_drop.p = 0.0  # fused attention reads the rate
        for module in (block, block.attn):  # other models' modules may read the rate of their dropout
            for name, child in module.named_children():
                if layers.is_plain(child, nn.Dropout, DropPath) and name != "attn_drop":
                    setattr(module, name, nn.Identity())
    return folded


# ---------------------------------------------------------------------------------------------------------------------
# Batch normalization


# torch.fx patches the process while it traces. Two tracers at a time would restore each other's patches.
_TRACING = threading.Lock()


class _Tracer(fx.Tracer):
    """Traces all modules except PyTorch's own and batch normalizations.

    While torch.fx traces, it replaces `nn.Module.__call__` in the whole process. This tracer passes calls from other
    threads on unchanged.
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
    """Traces only modules that contain a batch normalization.

    Other modules may branch on sizes, which torch.fx cannot trace.
    """

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        has_batch_norm = any(isinstance(module, nn.BatchNorm2d) for module in m.modules())
        return not has_batch_norm or super().is_leaf_module(m, module_qualified_name)


@torch.no_grad()
def fold_batch_norms(model: nn.Module) -> int:
    """Folds batch normalizations into convolutions in place and returns their number.

    A batch normalization is folded into the convolution before it, or into a 1x1 convolution after it, if no other
    module uses the tensor between them. The running statistics are used, also in training mode. The convolutions keep
    their names. An identity or the activation replaces the batch normalization.

    Args:
        model: Model that torch.fx can trace.

    Raises:
        ValueError: If torch.fx cannot trace the model. The model is then unchanged.
    """
    graph = _trace(model)
    modules = dict(model.named_modules())
    calls = [node for node in graph.nodes if node.op == "call_module"]
    targets = [node.target for node in calls]
    folded = 0
    for node in calls:
        bn: Any = modules.get(str(node.target))
        if not isinstance(bn, nn.BatchNorm2d) or not layers.is_plain(bn, type(bn)):
            continue
        if type(bn).forward not in (nn.BatchNorm2d.forward, BatchNormAct2d.forward):  # a subclass of another kind
            continue
        if targets.count(node.target) > 1 or bn.running_var is None:
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
    with _TRACING, no_garbage_collection():
        try:
            graph = _Tracer().trace(model)
        except Exception:  # the model's code may raise anything when it meets a symbolic tensor
            try:
                graph = _CarefulTracer().trace(model)
            except Exception as error:
                raise ValueError(
                    f"torch.fx cannot trace the model ({type(error).__name__}: {error}); pass its backbone instead"
                ) from error
        # torch.fx leaves reference cycles, which would keep the memory of a deleted model. All of them are young,
        # because nothing was collected before.
        gc.collect(0)
    return graph


def _only_conv(node: Any, modules: dict[str, nn.Module], targets: list[Any]) -> nn.Conv2d | None:
    """Returns the plain convolution that only this node calls, or None."""
    if not isinstance(node, fx.Node) or node.op != "call_module" or targets.count(node.target) > 1:
        return None
    module: Any = modules.get(str(node.target))
    # Other subclasses may change their weight in forward, as weight standardization does. Hooks see the outputs.
    return module if module is not None and layers.is_plain(module, nn.Conv2d, Conv2dSame) else None


def _is_pointwise(conv: nn.Conv2d) -> bool:
    return conv.kernel_size == (1, 1) and conv.padding in ((0, 0), "valid") and conv.groups == 1


def _scale_and_shift(bn: nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns a batch normalization as scale * x + shift, each (C,) in float64."""
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


# ---------------------------------------------------------------------------------------------------------------------
# Other constants


def _computed_tensors(model: nn.Module) -> dict[int, torch.Tensor]:
    """Returns copies of the weights that hooks computed with gradients, by id.

    `copy.deepcopy` refuses such tensors. With this dictionary as its memo it takes the copies.
    """
    return {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, torch.Tensor) and not value.is_leaf
    }


def _set_computed_weights(module: nn.Module) -> None:
    """Replaces computed weights by their current values in place."""
    if parametrize.is_parametrized(module):
        # remove_parametrizations would edit the class, which a copy shares with its original.
        parametrizations: Any = module.parametrizations
        values = {name: getattr(module, name).detach() for name in parametrizations}
        del module.parametrizations
        module.__class__ = type(module).__bases__[0]
        for name, value in values.items():
            module.register_parameter(name, nn.Parameter(value, requires_grad=False))
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, (BasePruningMethod, WeightNorm, SpectralNorm)):
            hook.remove(module)
            del module._forward_pre_hooks[key]


class FoldedResidualConv(ResidualDepthwiseConv):
    """Computes x + depthwise(x) with one convolution, (B, C, H, W) to (B, C, H, W).

    The residual is a 1 that is added to the center of the kernel. In bfloat16 the sum would cost the center three of
    its eight bits. In reduced precision and under autocast, the addition therefore stays separate. On a GPU, a kernel
    adds in float32 (`why_not_fused`).
    """

    def __init__(self, module: ResidualDepthwiseConv) -> None:
        """Takes the convolution of a plain module.

        Args:
            module: Module to replace. Its convolution is shared, not copied.
        """
        nn.Module.__init__(self)
        self.backend = module.backend
        self.conv = module.conv
        self.folded = copy.deepcopy(module.conv)
        self._fold()

    def _fold(self) -> None:
        with torch.no_grad():
            self.folded.weight.copy_(self.conv.weight)
            self.folded.weight[:, 0, 1, 1] += 1

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "FoldedResidualConv":
        super()._apply(fn, recurse)
        self._fold()  # otherwise a cast to reduced precision and back would leave a rounded sum
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():  # PyTorch crashes when TorchScript asks whether autocast is on
            if not self.why_not_fused(x):
                return layers.depthwise(x, self.conv.weight, self.conv.bias)  # type: ignore[arg-type]
            if _is_precise(x):
                return self.folded(x)
        return x + self.conv(x)


@torch.jit.unused
def _is_precise(x: torch.Tensor) -> bool:
    """Returns whether a convolution of x computes in float32 or float64."""
    if isinstance(x, torch.fx.Proxy):  # the traced graph must work for every dtype
        return False
    device = x.device.type
    if device not in ("cpu", "cuda"):  # autocast may not know other devices, and torch.compile cannot ask
        return False
    return x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(device)


class TiledConvMlp(nn.Module):
    """Computes the MLP of `ConvMlp` in tiles, (B, C, H, W) to (B, C, H, W).

    The hidden map is four times as large as the input. The whole map would pass through memory three times, while a
    tile stays in the cache. There are no tiles on a GPU, where kernels are fused instead, with gradients, where tiles
    gain nothing, or during compilation, export and tracing, where they would fix the sizes.
    """

    def __init__(self, mlp: ConvMlp) -> None:
        """Takes the convolutions of a plain MLP.

        Args:
            mlp: MLP to replace. Its convolutions are shared, not copied. Its dropout is dropped.
        """
        super().__init__()
        self.fc1 = mlp.fc1
        self.act = mlp.act
        self.conv = FoldedResidualConv(mlp.conv)
        self.fc2 = mlp.fc2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            if not self.why_not_fused(x):
                return fused_mlp(x, self.fc1, self.conv, self.fc2)
            if _may_tile(x) and self._is_plain():
                return self._in_tiles(x)
        return self._whole(x)

    @torch.jit.unused
    def why_not_fused(self, x: torch.Tensor) -> str:
        """Returns why the layers are called one by one, or "" if they are fused.

        Args:
            x: Input (B, C, H, W).
        """
        if not layers.is_plain(self.conv, FoldedResidualConv):
            return "the convolution is not a plain FoldedResidualConv"
        return why_not_fused_mlp(x, self.fc1, self.act, self.conv, self.fc2)

    def _whole(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting():
            return self.fc2(self.conv(self.act(self.fc1(x))))
        return layers.pointwise(self.fc2, self.conv(self.act(layers.pointwise(self.fc1, x))))

    @torch.jit.unused
    def _is_plain(self) -> bool:
        """Returns whether no hook and no replaced layer must see whole maps."""
        convs = (self.fc1, self.conv.conv, self.fc2)
        return layers.is_plain(self.conv, FoldedResidualConv) and all(
            layers.is_plain(conv, nn.Conv2d) for conv in convs
        )

    @torch.jit.unused
    def _in_tiles(self, x: torch.Tensor) -> torch.Tensor:
        B, _, H, W = x.shape
        row_bytes = W * self.fc1.out_channels * x.element_size()
        if B * H * row_bytes <= TILE_BYTES:
            return self._whole(x)
        halo = self.conv.conv.dilation[0]  # rows above and below that the depthwise convolution reads
        out = x.new_empty((B, self.fc2.out_channels, H, W)).to(memory_format=torch.channels_last)
        for images in _parts(B, max(1, TILE_BYTES // (H * row_bytes))):
            for rows in _parts(H, max(MIN_TILE_ROWS, TILE_BYTES // (len(images) * row_bytes))):
                top, bottom = max(rows.start - halo, 0), min(rows.stop + halo, H)
                tile = x[images.start : images.stop, :, top:bottom]
                tile = self.conv(self.act(layers.pointwise(self.fc1, tile)))
                tile = layers.pointwise(self.fc2, tile[:, :, rows.start - top : rows.stop - top])
                out[images.start : images.stop, :, rows.start : rows.stop] = tile
        return out


@torch.jit.unused
def _may_tile(x: torch.Tensor) -> bool:
    return (
        not isinstance(x, torch.fx.Proxy)
        and x.device.type == "cpu"
        and not (torch.is_grad_enabled() and x.requires_grad)
        and not torch.jit.is_tracing()
        and not torch.compiler.is_compiling()
    )


class OptimizedBlock(STViTBlock):
    """Block whose residual additions and biases take no pass of their own on a GPU.

    Matrix products add to the residual in place. A product that adds to a matrix has no room for a bias. The biases of
    `attn.proj` (stages without super tokens) and `mlp.fc2` are therefore added to the residual by the kernel of `cpe`,
    as `shift`, and the bias of `mlp.fc1` compensates (`fc1_bias`).

    With gradients, under autocast, during compilation, and if a layer is not plain, the layers are called one by one.
    """

    _position_types = (FoldedResidualConv,)
    shift: torch.Tensor
    fc1_bias: torch.Tensor

    @classmethod
    def convert(cls, block: Any) -> None:
        """Changes the class of a folded `STViTBlock` in place."""
        mlp: Any = block.mlp
        if not isinstance(mlp, TiledConvMlp) or not layers.is_plain(block.norm2, nn.Identity):
            return
        if mlp.fc1.bias is None or mlp.fc2.bias is None or block.attn.proj.bias is None:
            return
        block.__class__ = cls
        shift = mlp.fc2.bias.double()
        weight = mlp.fc1.weight.flatten(1).double()
        # `shift` reaches fc1 before its time. The attention branch does not see it.
        block.register_buffer("fc1_bias", (mlp.fc1.bias.double() - weight @ shift).to(mlp.fc1.bias))
        if block.attn.stoken_size == (1, 1):
            shift = shift + block.attn.proj.bias.double()
        block.register_buffer("shift", shift.to(mlp.fc2.bias))

    @torch.jit.unused
    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_tracing():  # a trace records comparisons of sizes
            return super()._forward(x)
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or isinstance(x, torch.fx.Proxy):
            if self.why_not_in_place(x):
                return super()._forward(x)
            with torch.no_grad():
                return self._in_place(x)
        return self._in_place(x) if self._may_add_in_place(x) else super()._forward(x)

    def _may_add_in_place(self, x: torch.Tensor) -> bool:
        """Returns whether `why_not_in_place` returns "", without gradients.

        The complete check takes longer than a kernel. It runs again when something that it depends on has changed.
        """
        context = (
            x.dtype,
            x.device,
            x.dim() == 4 and x.numel() > 0,
            is_autocast(x),
            describe_context(),
            layers.has_global_hooks(),
        )
        checked: _Checked | None = self.__dict__.get("_checked")
        if checked is None or checked.context != context or not all(seen.is_unchanged() for seen in checked.modules):
            modules = [_SeenModule.of(module) for module in self.modules()]
            checked = _Checked(context, modules, not self.why_not_in_place(x))
            if all(seen.is_unchanged() for seen in modules):  # with a hook, each call checks again
                self.__dict__["_checked"] = checked
        return checked.may_add

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "OptimizedBlock":
        self.__dict__.pop("_checked", None)  # the parameters may move or change their dtype
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_checked"}

    @torch.jit.unused
    def why_not_in_place(self, x: torch.Tensor) -> str:
        """Returns why the block does not add in place, or "" if it does.

        Args:
            x: Input (B, C, H, W).
        """
        if torch.compiler.is_compiling():
            return "the model is being compiled or exported"
        if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters())):
            return "gradients are needed"
        if not isinstance(x, torch.fx.Proxy) and is_autocast(x):
            return "autocast is on"
        for module in (self.ls1, self.drop_path1, self.norm2, self.ls2, self.drop_path2, self.attn.proj_drop):
            if not layers.is_plain(module, nn.Identity):
                return "a layer after a branch is not plain"
        if not layers.is_plain(self.mlp, TiledConvMlp) or not layers.is_plain(self.attn, SuperTokenAttention):
            return "the attention or the MLP is not plain"
        if not layers.is_pointwise(self.attn.proj) or not layers.is_pointwise(self.attn.qkv):
            return "a projection of the attention is not plain"
        if choose_backend(self.attn.backend, x) == "reference":
            return "the backend of the attention is the reference"
        return self.why_not_fused(x) or self.mlp.why_not_fused(x)

    def _in_place(self, x: torch.Tensor) -> torch.Tensor:
        kernels = import_kernels(x, "stvit.ops.layer_kernels")
        cpe, norm, attn, mlp = self.cpe.conv, self.norm1, self.attn, self.mlp
        y, normalized = kernels.depthwise(
            x.permute(0, 2, 3, 1).contiguous(),
            cpe.weight,
            cpe.bias,
            norm=(norm.weight, norm.bias, norm.eps),
            shift=self.shift,
        )  # (B, H, W, C) each
        B, H, W, C = y.shape
        rows = y.view(-1, C)  # (B * H * W, C), shares its memory with y
        if attn.stoken_size == (1, 1):
            rows.addmm_(self._attend(normalized), attn.proj.weight.reshape(C, C).t())
        else:
            h, w = attn.stoken_size
            pixels = normalized.permute(0, 3, 1, 2)
            tokens, association, _ = triton.run_sampling(pixels, h, w, attn.n_iter, x.dtype)
            tokens = tokens.permute(0, 2, 3, 1)  # (B, Hs, Ws, C), contiguous
            attended = F.linear(self._attend(tokens), attn.proj.weight.reshape(C, C), attn.proj.bias).view(tokens.shape)
            upsample = import_kernels(x, "stvit.ops.kernels").upsample
            upsample(attended, association, None, y.permute(0, 3, 1, 2), h, w, residual=y)
        hidden = F.linear(rows, mlp.fc1.weight.reshape(-1, C), self.fc1_bias).view(B, H, W, -1)
        hidden, _ = kernels.depthwise(hidden, mlp.conv.conv.weight, mlp.conv.conv.bias, has_gelu=True)
        rows.addmm_(hidden.view(rows.shape[0], -1), mlp.fc2.weight.reshape(C, -1).t())
        return y.permute(0, 3, 1, 2)

    def _attend(self, tokens: torch.Tensor) -> torch.Tensor:
        """Returns the attention among tokens before its projection.

        Args:
            tokens: Tokens (B, Hs, Ws, C), contiguous.

        Returns:
            Matrix (B * Hs * Ws, C).
        """
        B, Hs, Ws, C = tokens.shape
        qkv = F.linear(tokens.view(-1, C), self.attn.qkv.weight.reshape(-1, C), self.attn.qkv.bias)
        mixed = self.attn.mix_heads(*self.attn.split_heads(qkv.view(B, Hs * Ws, -1)))
        return mixed.reshape(-1, C)


@dataclass(frozen=True)
class _SeenModule:
    """State of a module at the time of a check."""

    module: nn.Module
    kind: type[nn.Module]
    children: dict[str, nn.Module | None]
    backend: str | None

    @classmethod
    def of(cls, module: nn.Module) -> "_SeenModule":
        """Returns the present state of a module."""
        return cls(module, type(module), module._modules.copy(), module.__dict__.get("backend"))

    def is_unchanged(self) -> bool:
        """Returns whether the module is in the same state and has no hooks.

        The state is its class, its children and its backend.
        """
        now = self.module.__dict__
        return not (
            now["_forward_hooks"]
            or now["_forward_pre_hooks"]
            or now["_backward_hooks"]
            or now["_backward_pre_hooks"]
            or "forward" in now
            or type(self.module) is not self.kind
            or now["_modules"] != self.children
            or now.get("backend") != self.backend
        )


@dataclass(frozen=True)
class _Checked:
    """Result of a check, and what it depends on."""

    context: tuple[Any, ...]
    modules: list[_SeenModule]
    may_add: bool


class OptimizedStem(Stem):
    """Stem in which one kernel adds the bias, activates and normalizes.

    The kernel runs on a GPU and without gradients.
    """

    @classmethod
    def convert(cls, stem: nn.Module) -> None:
        """Changes the class of a stem in place."""
        stem.__class__ = cls
        for i, norm in enumerate(stem.children()):
            if isinstance(norm, nn.BatchNorm2d) and norm.running_var is not None:
                scale, shift = _scale_and_shift(norm)
                stem.register_buffer(f"scale{i}", scale.to(norm.running_var))
                stem.register_buffer(f"shift{i}", shift.to(norm.running_var))

    @torch.jit.unused
    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling() or (
            torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters()))
        ):
            return super()._forward(x)
        modules: list[Any] = list(self)
        i = 0
        while i < len(modules):
            act, norm = [*modules[i + 1 : i + 3], None, None][:2]
            scale = getattr(self, f"scale{i + 2}", None)
            is_folded = scale is not None and layers.is_plain(norm, nn.BatchNorm2d)
            if not is_folded or why_not_activate(x, self.backend, modules[i], act):
                x = modules[i](x)
                i += 1
                continue
            conv = modules[i]
            x = conv._conv_forward(x, conv.weight, None).permute(0, 2, 3, 1).contiguous()
            kernels = import_kernels(x, "stvit.ops.layer_kernels")
            x = kernels.activate(x, conv.bias, scale, getattr(self, f"shift{i + 2}")).permute(0, 3, 1, 2)
            i += 3
        return x


def _parts(length: int, limit: int) -> Iterator[range]:
    """Splits `range(length)` into as few parts of at most `limit` as possible.

    The lengths differ by at most one.
    """
    count = -(-length // limit)
    for i in range(count):
        yield range(length * i // count, length * (i + 1) // count)


def _fold_layer_scale(conv: nn.Conv2d, scale: nn.Module) -> nn.Module:
    """Folds a layer scale into the convolution before it.

    Returns:
        The module that replaces the layer scale.
    """
    if not layers.is_plain(scale, LayerScale2d) or not layers.is_plain(conv, nn.Conv2d):
        return scale
    gamma = cast(LayerScale2d, scale).gamma.double()
    conv.weight.copy_(conv.weight.double() * gamma.reshape(-1, 1, 1, 1))
    if conv.bias is not None:
        conv.bias.copy_(conv.bias.double() * gamma)
    return nn.Identity()

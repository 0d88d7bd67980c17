"""Super Token Vision Transformer (STViT)

Paper: `Vision Transformer with Super Token Sampling` - https://arxiv.org/abs/2211.11167 (CVPR 2023)
@inproceedings{huang2023stvit,
  author    = {Huaibo Huang and Xiaoqiang Zhou and Jie Cao and Ran He and Tieniu Tan},
  title     = {Vision Transformer with Super Token Sampling},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year      = {2023},
}

The model follows the paper and the authors' implementation, https://github.com/hhb072/STViT (MIT license). The authors'
checkpoints load unchanged. Variants small, base and large come from the paper; femto, pico, nano, tiny and test from
this project.

Shapes:
    B        batch size
    C        channels
    H, W     height and width of the feature map: 1/4, 1/8, 1/16 and 1/32 of the image, rounded up
"""

import numbers
from collections.abc import Callable, Mapping
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    ClassifierHead,
    DropPath,
    LayerNorm2d,
    LayerScale2d,
    LayerType,
    calculate_drop_path_rates,
    get_act_layer,
    get_device_dtype,
    get_norm_layer,
    trunc_normal_,
)
from timm.models import (
    checkpoint_seq,
    generate_default_cfgs,
    register_model,
)
from torch import nn

from stvit.ops import SuperTokenAttention, layers
from stvit.ops.portable import is_exporting
from stvit.weights.create import build_model
from stvit.weights.official import checkpoint_filter_fn, is_official
from stvit.weights.packaged import CIFAR10_CLASSES, packaged_file

__all__ = ["STViT", "checkpoint_filter_fn"]

Device = torch.device | str | None


class PixelAct(nn.Module):
    """Applies an activation and returns the result in channels_last memory format.

    The shape stays (B, C, H, W).

    The activation receives a contiguous tensor (B, H, W, C), because PyTorch's GELU is faster on it on CPUs, forward
    and backward. The first activation thus makes all later feature maps channels_last, whatever the memory format of
    the images. Normalization over channels, attention and most convolutions are fastest in this format.
    """

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            if not is_exporting():  # the runtime of an exported graph chooses the layout
                return self._in_channels_last(x)
        return self.act(x)

    @torch.jit.unused
    def _in_channels_last(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():  # a permuted view would prevent fusion with the convolution
            return self.act(x.contiguous(memory_format=torch.channels_last))
        # contiguous(memory_format=channels_last) fails in torch.func.vmap and does nothing for a single channel.
        return self.act(x.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2)


class Stem(nn.Sequential):
    """Convolutions, each followed by an activation and a normalization.

    On a GPU, one kernel adds the bias and activates, unless the backend is "reference".
    """

    def __init__(self, *modules: nn.Module, backend: str = "auto") -> None:
        super().__init__(*modules)
        self.backend = backend

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            return self._forward(x)
        for module in self:
            x = module(x)
        return x

    @torch.jit.unused
    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        modules = list(self)
        while modules:
            if not why_not_activate(x, self.backend, *modules[:2]):
                conv: Any = modules[0]
                x = layers.activate(conv._conv_forward(x, conv.weight, None), conv.bias)
                modules = modules[2:]
            else:
                x = modules.pop(0)(x)
        return x


def why_not_activate(x: torch.Tensor, backend: str, conv: nn.Module, act: nn.Module | None = None) -> str:
    """Returns why a convolution and its activation are called one by one, or ""."""
    if not layers.is_plain(conv, nn.Conv2d) or conv.bias is None:
        return "the convolution is not plain or has no bias"
    if act is None or not layers.is_plain(act, PixelAct) or not layers.is_gelu(act.act):  # type: ignore[arg-type]
        return "the activation is not a plain, exact GELU"
    return layers.why_not_fused(x, backend, (conv.weight, conv.bias))  # type: ignore[arg-type]


class ResidualDepthwiseConv(nn.Module):
    """Adds a depthwise 3x3 convolution to its input (B, C, H, W).

    This encodes the position (section 3.1). One kernel computes it on a GPU (`why_not_fused`).
    """

    def __init__(
        self,
        dim: int,
        dilation: int = 1,
        backend: str = "auto",
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.backend = backend
        self.conv = nn.Conv2d(
            dim, dim, kernel_size=3, padding=dilation, dilation=dilation, groups=dim, device=device, dtype=dtype
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            if not self.why_not_fused(x):
                return layers.depthwise(x, self.conv.weight, self.conv.bias)  # type: ignore[arg-type]
        return x + self.conv(x)

    @torch.jit.unused
    def why_not_fused(self, x: torch.Tensor, others: tuple[torch.Tensor, ...] = ()) -> str:
        """Returns why the layers are called one by one, or "" if one kernel runs.

        Args:
            x: Input (B, C, H, W).
            others: Further parameters of the kernel.
        """
        if not layers.is_depthwise(self.conv):
            return "the convolution is not a plain depthwise 3x3 convolution"
        reason = layers.why_not_fused(x, self.backend, (self.conv.weight, self.conv.bias, *others))
        return reason or layers.why_not_residual(x)


class ConvMlp(nn.Module):
    """MLP with a residual depthwise 3x3 convolution in the middle (section 3.1).

    Input and output have the shape (B, C, H, W). On a GPU, activation, convolution and addition are one kernel, and
    training saves one hidden map (`why_not_fused`).
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        dilation: int = 1,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        drop: float = 0.0,
        backend: str = "auto",
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.fc1 = nn.Conv2d(dim, hidden_dim, kernel_size=1, **dd)
        self.act = PixelAct(act_layer())
        self.drop1 = nn.Dropout(drop)
        self.conv = ResidualDepthwiseConv(hidden_dim, dilation=dilation, backend=backend, **dd)
        self.fc2 = nn.Conv2d(hidden_dim, dim, kernel_size=1, **dd)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            if not self.why_not_fused(x):
                return self.drop2(fused_mlp(x, self.fc1, self.conv, self.fc2))
        x = self.drop1(self.act(self.fc1(x)))
        return self.drop2(self.fc2(self.conv(x)))

    @torch.jit.unused
    def why_not_fused(self, x: torch.Tensor) -> str:
        """Returns why the layers are called one by one, or "" if they are fused.

        Args:
            x: Input (B, C, H, W).
        """
        if not layers.is_plain(self.drop1, nn.Dropout) or (self.training and self.drop1.p > 0):
            return "there is dropout after the activation"
        if not layers.is_plain(self.conv, ResidualDepthwiseConv):
            return "the convolution is not a plain ResidualDepthwiseConv"
        return why_not_fused_mlp(x, self.fc1, self.act, self.conv, self.fc2)


def why_not_fused_mlp(
    x: torch.Tensor, fc1: nn.Module, act: nn.Module, conv: ResidualDepthwiseConv, fc2: nn.Module
) -> str:
    """Returns why the layers of an MLP are called one by one, or ""."""
    if not layers.is_pointwise(fc1) or not layers.is_pointwise(fc2):
        return "fc1 or fc2 is not a plain 1x1 convolution"
    if not layers.is_plain(act, PixelAct) or not layers.is_gelu(act.act):  # type: ignore[arg-type]
        return "the activation is not a plain, exact GELU"
    if not layers.is_depthwise(conv.conv):
        return "the convolution is not a plain depthwise 3x3 convolution"
    parameters = [parameter for module in (fc1, conv.conv, fc2) for parameter in module.parameters()]
    return layers.why_not_fused(x, conv.backend, parameters)


def fused_mlp(x: torch.Tensor, fc1: nn.Conv2d, conv: ResidualDepthwiseConv, fc2: nn.Conv2d) -> torch.Tensor:
    """Runs the layers of an MLP on x (B, C, H, W), see `stvit.ops.layers.mlp`."""
    assert conv.conv.bias is not None
    return layers.mlp(
        x,
        fc1.weight.flatten(1),
        fc1.bias,
        conv.conv.weight,
        conv.conv.bias,
        fc2.weight.flatten(1),
        fc2.bias,
    )


class STViTBlock(nn.Module):
    """Position encoding, super token attention and MLP (figure 2).

    Input and output have the shape (B, C, H, W).
    """

    _position_types: tuple[type[nn.Module], ...] = (ResidualDepthwiseConv,)  # types of `cpe` that may be fused

    def __init__(
        self,
        dim: int,
        num_heads: int,
        stoken_size: int | tuple[int, int] = 1,
        n_iter: int = 1,
        dilation: int = 1,
        mlp_ratio: float = 4.0,
        ls_init_value: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
        attn_norm_layer: Callable[..., nn.Module] = LayerNorm2d,
        backend: str = "auto",
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.cpe = ResidualDepthwiseConv(dim, dilation=dilation, backend=backend, **dd)

        self.norm1 = attn_norm_layer(dim, **dd)
        self.attn = SuperTokenAttention(
            dim,
            stoken_size=stoken_size,
            n_iter=n_iter,
            num_heads=num_heads,
            qkv_bias=True,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            backend=backend,
            **dd,
        )
        self.ls1 = LayerScale2d(dim, ls_init_value, **dd) if ls_init_value is not None else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

        self.norm2 = norm_layer(dim, **dd)
        self.mlp = ConvMlp(
            dim, int(dim * mlp_ratio), dilation=dilation, act_layer=act_layer, drop=proj_drop, backend=backend, **dd
        )
        self.ls2 = LayerScale2d(dim, ls_init_value, **dd) if ls_init_value is not None else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            return self._forward(x)
        x = self.cpe(x)
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return x

    @torch.jit.unused
    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        x, normalized = self._encode_position(x)
        x = self._add_attention(x, normalized)
        return _add_branch(x, self.ls2(self.mlp(self.norm2(x))), self.drop_path2)

    def _encode_position(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the position encoding of x and its normalization.

        One kernel computes both if possible.
        """
        if not self.why_not_fused(x):
            conv, norm = self.cpe.conv, self.norm1
            return layers.depthwise_norm(x, conv.weight, conv.bias, norm.weight, norm.bias, norm.eps)  # type: ignore
        x = self.cpe(x)
        return x, self.norm1(x)

    @torch.jit.unused
    def why_not_fused(self, x: torch.Tensor) -> str:
        """Returns why `cpe` and `norm1` are called one by one, or "".

        Args:
            x: Input (B, C, H, W).
        """
        norm: Any = self.norm1
        if not layers.is_plain(norm, LayerNorm2d) or norm.weight is None or norm.bias is None:
            return "the normalization is not a plain LayerNorm2d with weight and bias"
        if not layers.is_plain(self.cpe, *self._position_types):
            return "the position encoding is not a plain ResidualDepthwiseConv"
        return self.cpe.why_not_fused(x, (norm.weight, norm.bias))

    def _add_attention(self, x: torch.Tensor, normalized: torch.Tensor) -> torch.Tensor:
        """Adds the attention branch to x.

        The kernel that upsamples super tokens adds to x if possible.
        """
        if (
            layers.is_plain(self.attn, SuperTokenAttention)
            and layers.is_plain(self.ls1, nn.Identity)
            and layers.is_plain(self.drop_path1, nn.Identity, DropPath)
            and self.attn.can_add(x, normalized)
        ):
            scale = None
            if self.training and isinstance(self.drop_path1, DropPath):
                scale = self.drop_path1(x.new_ones(x.shape[0], 1, 1, 1)).flatten()
            return self.attn.add_to(x, normalized, scale)
        return _add_branch(x, self.ls1(self.attn(normalized)), self.drop_path1)


def _add_branch(x: torch.Tensor, branch: torch.Tensor, drop_path: nn.Module) -> torch.Tensor:
    """Returns x + drop_path(branch), on a GPU without a pass over the branch."""
    if drop_path.training and layers.is_plain(drop_path, DropPath) and not isinstance(x, torch.fx.Proxy) and x.is_cuda:
        return torch.addcmul(x, branch, drop_path(branch.new_ones(branch.shape[0], 1, 1, 1)))
    return x + drop_path(branch)


class STViTStage(nn.Module):
    """Optional downsampling, then blocks at one resolution."""

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        depth: int,
        drop_path_rates: list[float],
        downsample: bool = True,
        stride: int = 2,
        dilation: tuple[int, int] = (1, 1),
        norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
        device: Device = None,
        dtype: torch.dtype | None = None,
        **block_kwargs: Any,
    ) -> None:
        """
        Args:
            in_chs: Input channels.
            out_chs: Channels of the blocks and the output.
            depth: Number of blocks.
            drop_path_rates: Stochastic depth rate of each block.
            downsample: Whether the stage begins with a 3x3 convolution from `in_chs` to `out_chs`.
            stride: Stride of this convolution.
            dilation: Dilation of this convolution, and of the depthwise convolutions in the blocks.
            norm_layer: Normalization after this convolution and before the MLPs.
            device: Device of the parameters.
            dtype: Dtype of the parameters.
            block_kwargs: Other arguments of `STViTBlock`.
        """
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.grad_checkpointing = False
        self.downsample: nn.Module = nn.Identity()
        if downsample:
            self.downsample = nn.Sequential(
                nn.Conv2d(
                    in_chs, out_chs, kernel_size=3, stride=stride, padding=dilation[0], dilation=dilation[0], **dd
                ),
                norm_layer(out_chs, **dd),
            )
        self.blocks = nn.Sequential(
            *[
                STViTBlock(
                    out_chs,
                    dilation=dilation[1],
                    drop_path=drop_path_rates[i],
                    norm_layer=norm_layer,
                    **block_kwargs,
                    **dd,
                )
                for i in range(depth)
            ]
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return x


class STViT(nn.Module):
    """Super Token Vision Transformer.

    A hierarchical backbone with four stages at strides 4, 8, 16 and 32. The early stages attend globally between super
    tokens. A stage with token size 1 attends between all pixels of its feature map.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        output_stride: int = 32,
        dims: tuple[int, ...] = (64, 128, 320, 512),
        depths: tuple[int, ...] = (3, 5, 9, 3),
        num_heads: tuple[int, ...] = (1, 2, 5, 8),
        stoken_size: int | tuple[int | tuple[int, int], ...] = (8, 4, 1, 1),
        n_iter: int | tuple[int, ...] = 1,
        mlp_ratio: float = 4.0,
        ls_init_values: float | tuple[float | None, ...] | None = None,
        head_hidden_size: int = 1024,
        act_layer: LayerType = "gelu",
        norm_layer: LayerType = "batchnorm2d",
        attn_norm_layer: LayerType = "layernorm2d",
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        backend: str = "auto",
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            in_chans: Image channels.
            num_classes: Number of classes; 0 for no classifier.
            global_pool: Pooling before the classifier; '' for none.
            output_stride: Largest stride of a feature map: 8, 16 or 32. Stages beyond it keep the resolution and use
                dilated convolutions with the same weights.
            dims: Channels of each stage.
            depths: Number of blocks of each stage.
            num_heads: Attention heads of each stage; each must divide the channels of the stage.
            stoken_size: Cell size of a super token in pixels, for all stages or for each stage. The value for a stage
                may be a (height, width) pair. 1 means attention between all pixels.
            n_iter: Rounds of association, for all stages or for each stage.
            mlp_ratio: Hidden channels of the MLP divided by the channels of the stage.
            ls_init_values: Initial layer scale, for all stages or for each stage; None for no layer scale.
            head_hidden_size: Channels of the 1x1 projection before pooling.
            act_layer: Activation in the stem and the MLPs.
            norm_layer: Normalization after convolutions and before the MLPs.
            attn_norm_layer: Normalization before the attention, over the channels of (B, C, H, W).
            drop_rate: Dropout rate before the classifier.
            attn_drop_rate: Dropout rate of the attention weights.
            proj_drop_rate: Dropout rate after the attention projection and in the MLP.
            drop_path_rate: Stochastic depth rate of the last block. The rate grows linearly from 0 at the first block.
            backend: Backend of super token attention in all blocks; see `stvit.sample_super_tokens`.
            device: Device of the parameters.
            dtype: Dtype of the parameters.

        Raises:
            ValueError: If an argument has a wrong type or range or does not fit the number of stages.
        """
        super().__init__()
        if not isinstance(output_stride, int) or output_stride not in (8, 16, 32):
            raise ValueError(f"output_stride must be 8, 16 or 32, got {output_stride!r}")
        if not isinstance(dims, (tuple, list)) or not 1 <= len(dims) <= _MAX_STAGES:
            raise ValueError(f"dims must be a sequence with the channels of 1 to {_MAX_STAGES} stages, got {dims!r}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        num_stages = len(dims)
        per_stage = {
            name: _per_stage(name, value, num_stages)
            for name, value in (
                ("depths", depths),
                ("num_heads", num_heads),
                ("stoken_size", stoken_size),
                ("n_iter", n_iter),
                ("ls_init_values", ls_init_values),
            )
        }
        _check_integers("in_chans", [in_chans], 1, _MAX_CHANNELS)
        _check_integers("num_classes", [num_classes], 0, _MAX_CLASSES)
        _check_integers("dims", dims, 2, _MAX_CHANNELS)
        _check_integers("depths", per_stage["depths"], 0, _MAX_DEPTH)
        _check_integers("num_heads", per_stage["num_heads"], 1, _MAX_CHANNELS)
        _check_integers("head_hidden_size", [head_hidden_size], 1, _MAX_CHANNELS)
        _check_number("mlp_ratio", mlp_ratio, 1 / min(dims), _MAX_RATIO)
        for value in per_stage["ls_init_values"]:
            if value is not None:
                _check_number("ls_init_values", value, -_MAX_RATIO, _MAX_RATIO)
        for name, rate in (
            ("drop_rate", drop_rate),
            ("attn_drop_rate", attn_drop_rate),
            ("proj_drop_rate", proj_drop_rate),
            ("drop_path_rate", drop_path_rate),
        ):
            _check_number(name, rate, 0.0, 1.0)
        if not isinstance(global_pool, str) or global_pool.lower() not in _POOLS:
            raise ValueError(f"global_pool must be one of {', '.join(map(repr, _POOLS))}, got {global_pool!r}")
        act: Any = _find_layer("act_layer", get_act_layer, act_layer)
        norm: Any = _find_layer("norm_layer", get_norm_layer, norm_layer)
        attn_norm: Any = _find_layer("attn_norm_layer", get_norm_layer, attn_norm_layer)

        self.num_classes = num_classes
        self.in_chans = in_chans
        self.feature_info: list[dict[str, Any]] = []

        stem_chs = (dims[0] // 2, dims[0] // 2, dims[0], dims[0])
        stem: list[nn.Module] = []
        prev_chs = in_chans
        for i, chs in enumerate(stem_chs):
            stride = 2 if i % 2 == 0 else 1
            stem += [nn.Conv2d(prev_chs, chs, 3, stride=stride, padding=1, **dd), PixelAct(act()), norm(chs, **dd)]
            prev_chs = chs
        self.stem = Stem(*stem, backend=backend)

        drop_path_rates: Any = calculate_drop_path_rates(drop_path_rate, list(per_stage["depths"]), stagewise=True)
        stages = []
        reduction, dilation = 4, 1
        for i in range(num_stages):
            # Removing a stride of 2 doubles the dilation of all later layers. Every second row and column of each
            # output is then the same as with the stride.
            stride, first_dilation = (2 if i > 0 else 1), dilation
            if reduction * stride > output_stride:
                dilation, stride = dilation * stride, 1
            reduction *= stride
            stages.append(
                STViTStage(
                    prev_chs,
                    dims[i],
                    depth=per_stage["depths"][i],
                    drop_path_rates=drop_path_rates[i],
                    downsample=i > 0,
                    stride=stride,
                    dilation=(first_dilation, dilation),
                    num_heads=per_stage["num_heads"][i],
                    stoken_size=per_stage["stoken_size"][i],
                    n_iter=per_stage["n_iter"][i],
                    mlp_ratio=mlp_ratio,
                    ls_init_value=per_stage["ls_init_values"][i],
                    attn_drop=attn_drop_rate,
                    proj_drop=proj_drop_rate,
                    act_layer=act,
                    norm_layer=norm,
                    attn_norm_layer=attn_norm,
                    backend=backend,
                    **dd,
                )
            )
            prev_chs = dims[i]
            self.feature_info.append({"num_chs": prev_chs, "reduction": reduction, "module": f"stages.{i}"})
        self.stages = nn.Sequential(*stages)

        self.num_features = head_hidden_size
        self.final_conv: nn.Module = nn.Conv2d(prev_chs, head_hidden_size, kernel_size=1, **dd)
        self.final_norm: nn.Module = norm(head_hidden_size, **dd)
        self.final_act: nn.Module = nn.SiLU()
        self.head = ClassifierHead(head_hidden_size, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.head_hidden_size = self.head.num_features

        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initializes the weights like the authors' code.

        Linear layers get a truncated normal distribution, all other layers PyTorch's default.

        Args:
            needs_reset: Whether to reset all layers to PyTorch's default first. A model that was created on the meta
                device and materialized with `to_empty` needs this.
        """
        for module in self.modules():
            reset_parameters = getattr(module, "reset_parameters", None)
            if needs_reset and callable(reset_parameters):
                reset_parameters()
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Returns the parameters without weight decay, beyond those with one dimension."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Returns patterns that group parameters by depth, for layer decay.

        Args:
            coarse: Whether a group is a stage instead of a block.
        """
        return {
            "stem": r"^stem",
            "blocks": [(r"^stages\.(\d+)", None), (r"^final_", (99999,))]
            if coarse
            else [
                (r"^stages\.(\d+)\.downsample", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^final_", (99999,)),
            ],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Turns gradient checkpointing of each block on or off."""
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Returns the classifier layer."""
        return self.head.fc

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier.

        Args:
            num_classes: Number of classes; 0 for no classifier.
            global_pool: Pooling; '' for none, None for the present one.
        """
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool, in_features=self.num_features, **get_device_dtype(self))
        self.head_hidden_size = self.head.num_features

    @torch.jit.ignore
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads a state dict; the error for key names of the authors is short.

        Raises:
            RuntimeError: If the keys do not fit, or have the authors' names.
        """
        if is_official(state_dict):
            raise RuntimeError(
                "The state dict has the key names of the authors' code. Load it with timm.create_model(<name>, "
                "pretrained=True, pretrained_cfg_overlay=dict(file=<path>)), which renames the keys "
                "(checkpoint_path=<path> does not), or call stvit.stvit.checkpoint_filter_fn first."
            )
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Returns the feature maps of stages.

        Args:
            x: Images (B, in_chans, H, W).
            indices: Indices of the stages; an int n means the last n stages, None means all.
            norm: No effect, because there is no normalization after a stage.
            stop_early: Whether to stop after the last requested stage.
            output_fmt: Must be 'NCHW'.
            intermediates_only: Whether to return only the feature maps.

        Returns:
            The feature maps (B, C, H / stride, W / stride), or a tuple of the final features and the feature maps.
        """
        assert output_fmt == "NCHW", "Output format must be NCHW."
        intermediates = []
        take_indices, max_index = _take_indices(len(self.stages), indices)

        x = self.stem(x)
        last_idx = len(self.stages) - 1
        if torch.jit.is_scripting() or not stop_early:  # TorchScript cannot slice stages
            stages = self.stages
        else:
            stages = self.stages[: max_index + 1]
        feat_idx = 0
        for feat_idx, stage in enumerate(stages):
            x = stage(x)
            if feat_idx in take_indices:
                intermediates.append(x)

        if intermediates_only:
            return intermediates
        if feat_idx == last_idx:
            x = self._project(x)
        return x, intermediates

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Removes the layers that the requested feature maps do not need.

        Args:
            indices: As in `forward_intermediates`.
            prune_norm: Whether to remove the projection before pooling, with its normalization.
            prune_head: Whether to remove the classifier and the projection before it.

        Returns:
            The indices of the requested stages.
        """
        take_indices, max_index = _take_indices(len(self.stages), indices)
        if prune_norm or prune_head or max_index < len(self.stages) - 1:
            self.final_conv = nn.Identity()
            self.final_norm = nn.Identity()
            self.final_act = nn.Identity()
            self.num_features = self.feature_info[max_index]["num_chs"]
            self.reset_classifier(0, "")
        self.stages = self.stages[: max_index + 1]
        return take_indices

    def _project(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting():
            x = self.final_conv(x)
        else:
            x = layers.pointwise(self.final_conv, x)
        return self.final_act(self.final_norm(x))

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Computes features before pooling from images (B, in_chans, H, W).

        The shape is (B, num_features, H / 32, W / 32).
        """
        x = self.stem(x)
        x = self.stages(x)
        return self._project(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Computes logits (B, num_classes), or pooled features if `pre_logits`."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns logits (B, num_classes) for images (B, in_chans, H, W) of any size."""
        x = self.forward_features(x)
        return self.forward_head(x)


# Far above the published models, and small enough that no argument alone fills the memory.
_MAX_STAGES = 16
_MAX_DEPTH = 512
_MAX_CHANNELS = 1 << 14
_MAX_CLASSES = 1 << 24
_MAX_RATIO = 100.0
_POOLS = ("", "avg", "max", "avgmax", "catavgmax", "fast", "fastavg", "fastmax", "fastavgmax", "fastcatavgmax")


def _check_integers(name: str, values: Any, low: int, high: int) -> None:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not low <= int(value) <= high:
            kind = "an integer" if len(values) == 1 else "integers"
            raise ValueError(f"{name} must be {kind} from {low} to {high:,}, got {value!r}")


def _check_number(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not low <= float(value) <= high:  # NaN too
        raise ValueError(f"{name} must be a number from {low:g} to {high:g}, got {value!r}")


def _find_layer(name: str, find: Callable[..., Any], layer: Any) -> Any:
    """Returns timm's layer of a name. A layer is returned unchanged."""
    try:
        found = find(layer)
    except (AssertionError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{name} must be a layer or a name that timm knows, got {layer!r}") from error
    if not callable(found):
        raise ValueError(f"{name} must be a layer or a name that timm knows, got {layer!r}")
    return found


def _per_stage(name: str, value: Any, num_stages: int) -> tuple[Any, ...]:
    if not isinstance(value, (tuple, list)):
        return (value,) * num_stages
    if len(value) != num_stages:
        raise ValueError(f"{name} must be one value or a value for each of the {num_stages} stages, got {value}")
    return tuple(tuple(v) if isinstance(v, list) else v for v in value)


def _take_indices(num_stages: int, indices: int | list[int] | None) -> tuple[list[int], int]:
    """Returns the stages for `indices`, counted from 0, and the largest of them."""
    if indices is None:
        indices = num_stages
    taken: list[int] = []
    if isinstance(indices, int):
        if not 0 < indices <= num_stages:
            raise ValueError(f"indices must be from 1 to {num_stages} if it is an integer, got {indices}")
        for i in range(num_stages - indices, num_stages):
            taken.append(i)
    else:
        if len(indices) == 0:
            raise ValueError("indices must contain at least one stage, got an empty list")
        for i in indices:
            if not -num_stages <= i < num_stages:
                raise ValueError(f"indices must be from {-num_stages} to {num_stages - 1}, got {i}")
            taken.append(i % num_stages)
    return taken, max(taken)


def _create_stvit(variant: str, pretrained: bool = False, **kwargs: Any) -> STViT:
    return build_model(
        STViT,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "flatten_sequential": True},
        **kwargs,
    )


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.0",
        "classifier": "head.fc",
        "paper_ids": "arXiv:2211.11167",
        "paper_name": "Vision Transformer with Super Token Sampling",
        "origin_url": "https://github.com/hhb072/STViT",
        **kwargs,
    }


_CFG_384 = {"input_size": (3, 384, 384), "pool_size": (12, 12), "crop_pct": 1.0}
_CFG_CIFAR10 = {
    "num_classes": 10,
    "label_names": CIFAR10_CLASSES,
    "input_size": (3, 64, 64),
    "pool_size": (2, 2),
    "crop_pct": 1.0,
    "mean": (0.4914, 0.4822, 0.4465),
    "std": (0.2470, 0.2435, 0.2616),
    "license": "apache-2.0",
    "origin_url": None,
}


# Tags with published weights have a repository on the Hub or a file in the package. '*' marks the default tag, because
# timm would choose one with weights.
default_cfgs = generate_default_cfgs(
    {
        # With a filename timm does not look for a pickle.
        tag: {"hf_hub_filename": "model.safetensors", **cfg}
        for tag, cfg in {
            "stvit_small.in1k": _cfg(hf_hub_id="stvit/stvit_small.in1k", license="mit"),
            "stvit_small.in1k_384": _cfg(hf_hub_id="stvit/stvit_small.in1k_384", license="mit", **_CFG_384),
            "stvit_base.in1k": _cfg(hf_hub_id="stvit/stvit_base.in1k", license="mit"),
            "stvit_base.in1k_384": _cfg(hf_hub_id="stvit/stvit_base.in1k_384", license="mit", **_CFG_384),
            "stvit_large.in1k": _cfg(hf_hub_id="stvit/stvit_large.in1k", license="mit"),
            "stvit_large.in1k_384": _cfg(hf_hub_id="stvit/stvit_large.in1k_384", license="mit", **_CFG_384),
            "stvit_femto.in1k": _cfg(),
            "stvit_pico.cifar10": _cfg(file=packaged_file("stvit_pico.cifar10"), **_CFG_CIFAR10),
            "stvit_pico.in1k*": _cfg(),
            "stvit_nano.in1k": _cfg(),
            "stvit_tiny.in1k": _cfg(),
            "test_stvit.in1k": _cfg(input_size=(3, 160, 160), pool_size=(5, 5)),
        }.items()
    }
)


@register_model
def stvit_small(pretrained: bool = False, **kwargs: Any) -> STViT:
    """Creates STViT-S (table 1)."""
    model_args = {"dims": (64, 128, 320, 512), "depths": (3, 5, 9, 3), "num_heads": (1, 2, 5, 8)}
    return _create_stvit("stvit_small", pretrained, **dict(model_args, **kwargs))


@register_model
def stvit_base(pretrained: bool = False, **kwargs: Any) -> STViT:
    """Creates STViT-B (table 1)."""
    model_args = {
        "dims": (96, 192, 384, 512),
        "depths": (4, 6, 14, 6),
        "num_heads": (2, 3, 6, 8),
        "ls_init_values": (None, None, 1e-6, 1e-6),
    }
    return _create_stvit("stvit_base", pretrained, **dict(model_args, **kwargs))


@register_model
def stvit_large(pretrained: bool = False, **kwargs: Any) -> STViT:
    """Creates STViT-L (table 1)."""
    model_args = {
        "dims": (96, 192, 448, 640),
        "depths": (4, 7, 19, 8),
        "num_heads": (2, 3, 7, 10),
        "ls_init_values": (None, None, 1e-6, 1e-6),
    }
    return _create_stvit("stvit_large", pretrained, **dict(model_args, **kwargs))


@register_model
def stvit_femto(pretrained: bool = False, **kwargs: Any) -> STViT:
    """Creates STViT-Femto: 1 M parameters, for detectors as fast as YOLO26-N.

    At stride 4 it has only the stem, because a block costs the most there. In the later stages the cell of a super
    token covers 32x32 image pixels.
    """
    model_args = {
        "dims": (32, 64, 96, 160),
        "depths": (0, 1, 2, 1),
        "num_heads": (1, 2, 3, 5),
        "stoken_size": (8, 4, 2, 1),
        "mlp_ratio": 3.0,
        "head_hidden_size": 256,
    }
    return _create_stvit("stvit_femto", pretrained, **dict(model_args, **kwargs))


@register_model
def stvit_pico(pretrained: bool = False, **kwargs: Any) -> STViT:
    """Creates STViT-Pico: 2 M parameters, 1/3 of the depth of small, half the width."""
    model_args = {
        "dims": (32, 64, 128, 192),
        "depths": (1, 2, 3, 1),
        "num_heads": (1, 2, 4, 6),
        "head_hidden_size": 512,
    }
    return _create_stvit("stvit_pico", pretrained, **dict(model_args, **kwargs))


@register_model
def stvit_nano(pretrained: bool = False, **kwargs: Any) -> STViT:
    """Creates STViT-Nano: 5 M parameters, 2/3 of the depth of small, half the width."""
    model_args = {
        "dims": (32, 64, 160, 256),
        "depths": (2, 3, 6, 2),
        "num_heads": (1, 2, 5, 8),
        "head_hidden_size": 768,
    }
    return _create_stvit("stvit_nano", pretrained, **dict(model_args, **kwargs))


@register_model
def stvit_tiny(pretrained: bool = False, **kwargs: Any) -> STViT:
    """Creates STViT-Tiny: 12 M parameters, two thirds of the depth of small."""
    model_args = {"dims": (64, 128, 256, 384), "depths": (2, 3, 6, 2), "num_heads": (1, 2, 4, 6)}
    return _create_stvit("stvit_tiny", pretrained, **dict(model_args, **kwargs))


@register_model
def test_stvit(pretrained: bool = False, **kwargs: Any) -> STViT:
    """Creates a model for tests, with less than 0.5 M parameters."""
    model_args = {
        "dims": (32, 32, 64, 64),
        "depths": (1, 1, 1, 1),
        "num_heads": (1, 1, 2, 2),
        "head_hidden_size": 128,
    }
    return _create_stvit("test_stvit", pretrained, **dict(model_args, **kwargs))

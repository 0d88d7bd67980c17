"""Runs a model up to a layer and reads its super tokens.

The model itself never changes: its modules are copied, without their tensors, and the copies run in evaluation mode.
Other threads can use the model meanwhile.
"""

import copy
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, resolve_data_config
from torch import nn

from stvit.images import convert_image, open_image
from stvit.ops import SuperTokenAttention, sample_super_tokens
from stvit.stvit import STViT
from stvit.visualize.view import SuperTokens

__all__ = ["Padding", "find_layers", "register_library", "stages", "super_tokens"]

_COMPILED = torch._dynamo.OptimizedModule
_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)

# ---------------------------------------------------------------------------------------------------------------------
# Other libraries


@dataclass(frozen=True)
class Padding:
    """Padding that a library adds around an image before its network sees it.

    Attributes:
        size: Height and width of the padded image.
        offset: Rows of padding above the image and columns to its left.
        value: Gray value of the padding, from 0 (black) to 1 (white).
    """

    size: tuple[int, int]
    offset: tuple[int, int]
    value: float


Unwrap = Callable[[nn.Module], Any]
FindPadding = Callable[[nn.Module, tuple[int, int]], Padding | None]


@dataclass(frozen=True)
class _Library:
    unwrap: Unwrap
    find_padding: FindPadding


_LIBRARIES: dict[str, _Library] = {}


def register_library(name: str, unwrap: Unwrap, find_padding: FindPadding) -> None:
    """Teaches this module how another library wraps its networks and pads its images.

    An adapter calls this function when it is imported. `stvit.adapters.yolo` does so for Ultralytics.

    Args:
        name: Name of the library. A second registration replaces the first.
        unwrap: Returns the network inside an object of the library, or None for any other module. The network can be
            wrapped again.
        find_padding: Takes a network and the height and width of an image. Returns the padding that the library would
            add, or None for no padding and for networks of other libraries.
    """
    _LIBRARIES[name] = _Library(unwrap, find_padding)


# ---------------------------------------------------------------------------------------------------------------------
# Public functions


def super_tokens(
    model: nn.Module,
    image: Any,
    stage: int = 0,
    block: int = -1,
    *,
    data_config: Mapping[str, Any] | None = None,
) -> SuperTokens:
    """Returns the super tokens that a model computes for an image.

    Only the layers before the chosen layer run, in evaluation mode. The model does not change.

    Args:
        model: Classifier, feature extractor (`features_only=True`), detector, `YOLO` object, or any other module that
            contains super token attention.
        image: Path, PIL image, uint8 array (H, W, 3) or (H, W), or normalized tensor (C, H, W) or (1, C, H, W). The
            image can have any size and is not resized. Paths and PIL images become RGB by the rules of `stvit.images`.
        stage: Index into `find_layers(model)`. For an STViT this is the index into `model.stages`, without the stages
            that have no blocks. For other models it is the number of the layer. Negative values count from the end.
        block: Index of the block in the stage. Negative values count from the end.
        data_config: 'mean' and 'std' of each channel (default: those of the timm model that the model is or contains).
            Without a timm model, or if a layer of the model normalizes its input, values from 0 to 1 are used.

    Raises:
        ValueError: If the stage or block does not exist or has no super tokens, or if the image has a wrong type or
            shape. For a file that is damaged or not an image, this is an `UnreadableImageError`.
        TypeError: If the model is scripted or not a module.
        OSError: If the image file cannot be opened.
    """
    net = _unwrap(model)
    layer = _choose_layer(net, stage, block)
    attention: Any = net.get_submodule(layer)
    normalization = _find_normalization(net, data_config)
    x, shown = _prepare_image(image, normalization)
    x, offset = _pad(x, net, normalization)
    parameter = next(net.parameters())
    arrays = _run_up_to(net, attention, x.to(parameter.device, parameter.dtype))
    stride = _find_stride(x.shape[2:], arrays["association"].shape[1:])
    return SuperTokens(shown, layer, attention.stoken_size, stride, offset, **arrays)


def stages(model: nn.Module) -> list[int]:
    """Returns the stages that `super_tokens` accepts.

    In other stages, every pixel is its own token.

    Raises:
        TypeError: If the model is scripted or not a module.
    """
    net = _unwrap(model)
    return [i for i, names in enumerate(find_layers(net)) if _has_super_tokens(net, names[-1])]


def find_layers(model: nn.Module) -> list[list[str]]:
    """Returns the names of the super token attention layers, one list per stage.

    Layers outside the stages of an STViT have a list each.

    Raises:
        TypeError: If the model is scripted or not a module.
    """
    layers: dict[str, list[str]] = {}
    for name, module in _unwrap(model).named_modules():
        if isinstance(module, SuperTokenAttention):
            stage = re.match(r"(.*\b)?stages[._]\d+(?=\.)", name)  # feature extractors name stages with "_"
            layers.setdefault(stage.group() if stage else name, []).append(name)
    return list(layers.values())


# ---------------------------------------------------------------------------------------------------------------------
# Layers


def _unwrap(model: Any) -> nn.Module:
    """Removes compilation, parallel copies and objects of other libraries."""
    if isinstance(model, torch.jit.ScriptModule) or not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module that is not scripted or traced, got {type(model).__name__}")
    if isinstance(model, (_COMPILED, *_PARALLEL)):
        return _unwrap(_unwrap_torch(model))
    for library in _LIBRARIES.values():
        inner = library.unwrap(model)
        if inner is not None:
            return _unwrap(inner)
    return model


def _unwrap_torch(module: Any) -> nn.Module:
    """Removes the wrappers of torch.compile and of parallel training from a module."""
    while isinstance(module, (_COMPILED, *_PARALLEL)):
        module = module._orig_mod if isinstance(module, _COMPILED) else module.module
    return module


def _choose_layer(net: nn.Module, stage: int, block: int) -> str:
    layers = find_layers(net)
    if not layers:
        raise ValueError("the model has no super token attention")
    if not isinstance(stage, int) or not -len(layers) <= stage < len(layers):
        raise ValueError(f"stage must be from {-len(layers)} to {len(layers) - 1}, got {stage!r}")
    blocks = layers[stage]
    if not isinstance(block, int) or not -len(blocks) <= block < len(blocks):
        raise ValueError(f"block of stage {stage} must be from {-len(blocks)} to {len(blocks) - 1}, got {block!r}")
    if not _has_super_tokens(net, blocks[block]):
        others = [str(i) for i in stages(net)]
        hint = f"choose one of the stages {', '.join(others)}" if others else "no stage of this model has any"
        raise ValueError(f"stage {stage} has no super tokens, because every pixel is its own token; {hint}")
    return blocks[block]


def _has_super_tokens(net: nn.Module, layer: str) -> bool:
    attention: Any = net.get_submodule(layer)
    return attention.stoken_size != (1, 1)


def _find_stride(image: Sequence[int], feature_map: Sequence[int]) -> int:
    """Returns the stride of a feature map, from the sizes of image and map."""
    for stride in (2**i for i in range(12)):
        if all(-(-size // stride) == count for size, count in zip(image, feature_map, strict=True)):
            return stride
    return max(1, round(max(image) / max(feature_map)))


# ---------------------------------------------------------------------------------------------------------------------
# Images


@dataclass(frozen=True)
class _Normalization:
    """Mean and standard deviation of each channel, (1, C, 1, 1) each."""

    mean: torch.Tensor
    std: torch.Tensor

    @property
    def in_chans(self) -> int:
        return self.mean.shape[1]


def _find_normalization(net: nn.Module, data_config: Mapping[str, Any] | None) -> _Normalization:
    conv = next((module for module in net.modules() if isinstance(module, nn.Conv2d)), None)
    in_chans = 3 if conv is None else conv.in_channels
    mean, std = _default_statistics(net) if data_config is None else _check_data_config(data_config, in_chans)
    values = [torch.tensor(_adapt_channels(stat, in_chans)).reshape(1, in_chans, 1, 1) for stat in (mean, std)]
    return _Normalization(*values)


def _default_statistics(net: nn.Module) -> tuple[Sequence[float], Sequence[float]]:
    """Returns the mean and standard deviation that a model expects."""
    modules = list(net.modules())
    if any(hasattr(module, "mean") and hasattr(module, "std") for module in modules):  # a layer normalizes the image
        return (0.0,), (1.0,)
    cfg = next((module.pretrained_cfg for module in modules if getattr(module, "pretrained_cfg", None)), None)
    if cfg is not None:
        config = resolve_data_config(pretrained_cfg=cfg)
        return config["mean"], config["std"]
    if any(isinstance(module, STViT) for module in modules):
        return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    return (0.0,), (1.0,)


def _check_data_config(data_config: Mapping[str, Any], in_chans: int) -> tuple[Sequence[float], Sequence[float]]:
    try:
        mean, std = ([float(value) for value in data_config[name]] for name in ("mean", "std"))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"data_config must have 'mean' and 'std' with one number per channel, got {data_config}"
        ) from error
    if not (len(mean) == len(std) == in_chans and all(value > 0 for value in std)):
        raise ValueError(
            f"data_config must have a mean and a positive std for each of the {in_chans} channels, got {mean} and {std}"
        )
    return mean, std


def _adapt_channels(values: Sequence[float], in_chans: int) -> list[float]:
    """Adapts a mean or standard deviation to another number of channels.

    timm adapts the weights of a first convolution in the same way.
    """
    if in_chans == 1:
        return [sum(values) / len(values)]
    return [float(values[channel % len(values)]) for channel in range(in_chans)]


def _prepare_image(image: Any, normalization: _Normalization) -> tuple[torch.Tensor, Image.Image]:
    """Returns an image as the model takes it, (1, C, H, W), and as RGB."""
    channels, mean, std = normalization.in_chans, normalization.mean, normalization.std
    if isinstance(image, torch.Tensor):
        x = image[None] if image.dim() == 3 else image
        if x.dim() != 4 or x.shape[0] != 1 or x.shape[1] != channels or 0 in x.shape or not x.is_floating_point():
            raise ValueError(
                f"image: expected one normalized image ({channels}, H, W) or (1, {channels}, H, W) of a floating "
                f"dtype, got a tensor {list(image.shape)} of {image.dtype}"
            )
        x = x.detach().float().cpu()
        pixels = (x * std + mean)[0, :3]
        pixels = pixels if len(pixels) == 3 else pixels[:1].expand(3, -1, -1)
        pixels = (pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
        return x, Image.fromarray(pixels.numpy())
    shown = _open_as_rgb(image)
    if channels not in (1, 3):
        raise ValueError(f"the model takes images of {channels} channels; pass a normalized tensor ({channels}, H, W)")
    pixels = torch.from_numpy(np.array(shown.convert("L" if channels == 1 else "RGB")))
    pixels = pixels.reshape(1, *pixels.shape[:2], channels).permute(0, 3, 1, 2)
    return (pixels.float() / 255 - mean) / std, shown


def _open_as_rgb(image: Any) -> Image.Image:
    if isinstance(image, (str, Path)):
        return open_image(Path(image).expanduser())
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.shape[2:] not in ((), (3,)) or image.ndim < 2 or 0 in image.shape:
            raise ValueError(
                f"image: expected an array (H, W, 3) or (H, W) of dtype uint8, got {list(image.shape)} of {image.dtype}"
            )
        return Image.fromarray(np.ascontiguousarray(image)).convert("RGB")
    if isinstance(image, Image.Image):
        return convert_image(image)
    raise ValueError(f"image: expected a path, PIL image, array or tensor, got {type(image).__name__}")


def _pad(x: torch.Tensor, net: nn.Module, normalization: _Normalization) -> tuple[torch.Tensor, tuple[int, int]]:
    """Pads a normalized image as the library of the network would.

    Returns:
        The padded image, and the offset of the image in it.
    """
    size = (x.shape[2], x.shape[3])
    paddings = (library.find_padding(net, size) for library in _LIBRARIES.values())
    padding = next((padding for padding in paddings if padding is not None), None)
    if padding is None:
        return x, (0, 0)
    top, left = padding.offset
    gray = (padding.value - normalization.mean) / normalization.std
    padded = gray.expand(1, x.shape[1], *padding.size).clone()
    padded[:, :, top : top + size[0], left : left + size[1]] = x
    return padded, (top, left)


# ---------------------------------------------------------------------------------------------------------------------
# Running


class _ReachedLayer(Exception):
    """Stops the model at the chosen layer, so that later layers do not run."""


def _run_up_to(net: nn.Module, attention: SuperTokenAttention, x: torch.Tensor) -> dict[str, np.ndarray]:
    """Runs a copied model up to a layer and returns the arrays of `SuperTokens`."""
    arrays: dict[str, np.ndarray] = {}

    def read(module: Any, args: tuple[torch.Tensor, ...]) -> None:
        tokens, association = sample_super_tokens(args[0], module.stoken_size, module.n_iter, module.backend)
        queries, keys, _ = module.project(tokens)
        batches = {"association": association, "tokens": tokens, "features": module.attend(tokens)}
        for name, batch in {**batches, "queries": queries, "keys": keys}.items():
            arrays[name] = batch[0].detach().float().cpu().numpy()
        raise _ReachedLayer

    copies = _copy_modules(net)
    copies[id(attention)].register_forward_pre_hook(read)
    with torch.no_grad():
        try:
            copies[id(net)](x)
        except _ReachedLayer:
            pass
    if not arrays:
        raise ValueError("the model does not call the layer in its forward pass")
    return arrays


def _copy_modules(net: nn.Module) -> dict[int, nn.Module]:
    """Copies the modules of a model, but not their tensors.

    The copies are in evaluation mode. They keep the hooks of the originals, and refer to each other where the originals
    do. The copy of a compiled or parallel module is the copy of the plain module inside.

    Returns:
        The copies, by the ids of the originals.
    """
    originals = list(net.modules())
    copies: dict[int, nn.Module] = {}
    for module in originals:
        if isinstance(module, torch.jit.ScriptModule):
            copies[id(module)] = copy.copy(module).eval()
        else:
            copies[id(module)] = object.__new__(type(module))
    for module in originals:
        copies[id(module)] = copies[id(_unwrap_torch(module))]
    for module in originals:
        if isinstance(module, (torch.jit.ScriptModule, _COMPILED, *_PARALLEL)):
            continue
        attributes = {name: _replace_modules(value, copies) for name, value in vars(module).items()}
        attributes.pop("_compiled_call_impl", None)  # set by Module.compile; it would call the original
        vars(copies[id(module)]).update({**attributes, "training": False})
    return copies


def _replace_modules(value: Any, copies: Mapping[int, nn.Module], depth: int = 3) -> Any:
    """Replaces modules by their copies in an attribute of a module.

    Args:
        value: Attribute. Dictionaries, lists and tuples become new ones. A method of a module becomes the method of its
            copy.
        copies: Copies by the ids of the originals.
        depth: Number of nested containers to look into.
    """
    if isinstance(value, nn.Module):
        return copies.get(id(value), value)
    if isinstance(value, MethodType):
        return MethodType(value.__func__, _replace_modules(value.__self__, copies, 0))
    if depth == 0:
        return value
    if type(value) is partial:
        func, args, keywords = (
            _replace_modules(part, copies, depth - 1) for part in (value.func, value.args, value.keywords)
        )
        return partial(func, *args, **keywords)
    if type(value) in (dict, OrderedDict):
        return type(value)((key, _replace_modules(item, copies, depth - 1)) for key, item in value.items())
    if type(value) in (list, tuple):
        return type(value)(_replace_modules(item, copies, depth - 1) for item in value)
    return value

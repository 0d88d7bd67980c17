"""timm backbones in models of other libraries.

Feature maps, pretrained weights, frozen layers and layer decay.

Shapes:
    B        batch
    C        channels of a feature map
    H, W     height and width of an image or feature map
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import get_pretrained_cfg_value, group_parameters, load_state_dict
from torch import nn

import stvit
from stvit.weights.check import check_file
from stvit.weights.config import OtherModelError, check_model_args
from stvit.weights.official import strip_model_prefix
from stvit.weights.source import Source

__all__ = [
    "STRIDES",
    "TimmBackboneMixin",
    "TimmFeatures",
    "check_backbone",
    "create_features",
    "create_net",
    "feature_maps",
    "freeze_stages",
    "image_stats",
    "lists_to_tuples",
    "load_backbone",
    "pyramid_indices",
]

# Strides of the feature maps that detectors and segmentation decoders expect.
STRIDES = (4, 8, 16, 32)


# ---------------------------------------------------------------------------------------------------------------------
# Feature maps


class TimmFeatures(nn.Module):
    """Feature maps of a timm model.

    It differs from timm's `features_only=True` in keeping the whole model, with its own methods for layer decay and
    gradient checkpointing.

    Attributes:
        net: timm model without the layers after the last feature map.
        name: Name of the model in timm.
        channels: Channels of each feature map.
        reductions: Stride of each feature map, in image pixels.
    """

    def __init__(self, net: Any, name: str, out_indices: Sequence[int]) -> None:
        """Removes the layers after the last feature map.

        Args:
            net: timm model.
            name: Name of the model in timm.
            out_indices: Indices of the feature maps in the model's `feature_info`, in rising order.
        """
        super().__init__()
        info = feature_maps(net, name)
        self.name = name
        self.out_indices = list(out_indices)
        self.channels: list[int] = [info[index]["num_chs"] for index in out_indices]
        self.reductions: list[int] = [info[index]["reduction"] for index in out_indices]
        # DDP fails if a layer is not used, and some models have a norm after the last feature map.
        net.prune_intermediate_layers(self.out_indices, prune_norm=True, prune_head=True)
        self.net = net

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Returns the feature maps of images.

        Args:
            x: Normalized images (B, in_chans, H, W).

        Returns:
            Feature maps, each (B, C, ceil(H / reduction), ceil(W / reduction)).

        Raises:
            ValueError: If the model does not accept the size of the images.
        """
        if not torch.jit.is_scripting():
            return self._forward(x)
        maps = self.net.forward_intermediates(x, indices=self.out_indices, output_fmt="NCHW", intermediates_only=True)
        assert isinstance(maps, list)
        return maps

    @torch.jit.unused
    def _forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        try:
            return self.net.forward_intermediates(
                x, indices=self.out_indices, output_fmt="NCHW", intermediates_only=True
            )
        except AssertionError as error:  # raised by timm's models for a wrong image size
            raise ValueError(
                f"the backbone {self.name} does not accept images of {x.shape[2]}x{x.shape[3]} pixels: {error}"
            ) from error

    def extra_repr(self) -> str:
        return f"{self.name}, out_indices={self.out_indices}"


def create_features(
    name: str,
    *,
    in_chans: int = 3,
    out_indices: Sequence[int] | None = None,
    output_stride: int | None = None,
    **model_args: Any,
) -> TimmFeatures:
    """Creates a timm backbone without pretrained weights.

    Args:
        name: Name of a timm model.
        in_chans: Channels of the images.
        out_indices: Indices of the feature maps; None for those of strides 4, 8, 16 and 32.
        output_stride: Largest stride of a feature map; None for that of the model.
        **model_args: Other arguments of the timm model, such as `drop_path_rate`.

    Raises:
        ValueError: If the model or an argument does not exist, or the model has no such feature maps.
    """
    if output_stride is not None:
        model_args["output_stride"] = output_stride
    net = create_net(name, in_chans=in_chans, **model_args)
    info = feature_maps(net, name)
    if out_indices is None:
        out_indices = pyramid_indices(info, name, output_stride)
    elif not out_indices or not all(0 <= index < len(info) for index in out_indices):
        raise ValueError(f"out_indices {list(out_indices)}: the backbone {name} has feature maps 0 to {len(info) - 1}")
    elif list(out_indices) != sorted(set(out_indices)):  # timm always returns them in the order of depth
        raise ValueError(f"out_indices of the backbone {name} must be in rising order, got {list(out_indices)}")
    return TimmFeatures(net, name, out_indices)


def create_net(name: str, **kwargs: Any) -> Any:
    """Creates a timm model without classifier and without pretrained weights.

    Raises:
        ValueError: If the model or an argument does not exist, or an argument has a wrong value.
    """
    check_backbone(name, kwargs)
    kwargs = lists_to_tuples(kwargs)
    try:
        return timm.create_model(name, pretrained=False, num_classes=0, **kwargs)
    except (TypeError, RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"cannot create the backbone {name} with {kwargs}: {error}") from error


def check_backbone(name: str, model_args: Mapping[str, Any]) -> None:
    """Checks that timm has a model, and that its arguments are safe.

    Raises:
        ValueError: If the model does not exist, or an argument has a wrong type or range.
    """
    if not isinstance(name, str) or not timm.is_model(name.split(".")[0]):
        near = difflib.get_close_matches(str(name).split(".")[0], timm.list_models(), n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() lists all"
        raise ValueError(f"unknown backbone {name!r}; {hint}")
    check_model_args(model_args)  # the arguments may come from another person's file


def lists_to_tuples(model_args: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces lists in model arguments by tuples.

    YAML and JSON files have only lists, but timm expects tuples.
    """
    return {key: tuple(value) if isinstance(value, list) else value for key, value in model_args.items()}


def feature_maps(net: Any, name: str) -> list[dict[str, Any]]:
    """Returns timm's `feature_info` of a model.

    It has a dictionary with 'num_chs' and 'reduction' for each feature map.

    Raises:
        ValueError: If the model has no feature maps.
    """
    feature_info = getattr(net, "feature_info", None)
    if not feature_info or not hasattr(net, "forward_intermediates"):
        raise ValueError(
            f"the backbone {name} has no feature maps in timm; choose a model that supports features_only=True"
        )
    return list(feature_info)


def pyramid_indices(
    feature_info: Sequence[Mapping[str, Any]], name: str, output_stride: int | None = None
) -> list[int]:
    """Returns the indices of the four feature maps of strides 4, 8, 16 and 32.

    Args:
        feature_info: Feature maps of the model.
        name: Name of the model, for the message.
        output_stride: Largest stride of a feature map. Later maps keep it.

    Raises:
        ValueError: If the model lacks one of them.
    """
    strides = [info["reduction"] for info in feature_info]
    indices = [index for index, stride in enumerate(strides) if stride >= STRIDES[0]]
    expected = [min(stride, output_stride or stride) for stride in STRIDES]
    if [strides[index] for index in indices] != expected:
        raise ValueError(
            f"the backbone {name} has feature maps of strides {', '.join(map(str, strides))}; expected "
            f"{', '.join(map(str, expected))}: choose a hierarchical model, such as stvit_small or convnext_tiny"
        )
    return indices


def image_stats(net: Any, in_chans: int = 3) -> tuple[list[float], list[float]]:
    """Returns mean and standard deviation of each channel, for pixels from 0 to 1.

    Args:
        net: timm model, or a module with its `pretrained_cfg`.
        in_chans: Channels of the images.
    """
    cfg = net.pretrained_cfg
    pairs = (("mean", IMAGENET_DEFAULT_MEAN), ("std", IMAGENET_DEFAULT_STD))
    mean, std = (_adapt_channels(cfg.get(stat) or default, in_chans) for stat, default in pairs)
    return mean, std


def _adapt_channels(values: Sequence[float], in_chans: int) -> list[float]:
    """Adapts a mean or standard deviation to another number of channels.

    timm adapts the weights of a first convolution in the same way.
    """
    if in_chans == 1:
        return [sum(values) / len(values)]
    return [values[channel % len(values)] for channel in range(in_chans)]


# ---------------------------------------------------------------------------------------------------------------------
# Pretrained weights


def load_backbone(
    net: nn.Module,
    name: str,
    source: str | Path | bool,
    *,
    in_chans: int = 3,
    model_args: Mapping[str, Any] | None = None,
    log: Callable[[str], None] = print,
) -> int:
    """Loads pretrained weights of a timm model into a backbone.

    If a tensor is missing or does not fit, an error is raised and the backbone is not changed.

    Args:
        net: timm model to load into. It may lack the last layers.
        name: Name of the model in timm.
        source: Tag of timm ('stvit_small.in1k'), model on the Hub ('hf-hub:org/name' or 'org/name'), folder, run
            directory or file of weights; True for the published weights of the model.
        in_chans: Channels of the images.
        model_args: Other arguments that the model was created with.
        log: Receives a line with the number of loaded tensors.

    Returns:
        Number of loaded tensors.

    Raises:
        ValueError: If the source does not exist or belongs to another model.
        RuntimeError: If the weights cannot be read or do not fit.
    """
    source_name, kwargs = _timm_arguments(name, source, lists_to_tuples(model_args or {}))
    try:
        loaded: Any = stvit.create_model(source_name, pretrained=True, in_chans=in_chans, **kwargs)
    except Exception as error:  # of the network, the Hub or an arbitrary file
        other = error.__cause__
        if isinstance(other, OtherModelError):
            raise ValueError(
                f"pretrained_backbone={str(source)!r} is {other.kind}, not a classifier; pass a classifier, or start "
                "from the whole model with --pretrained-path"
            ) from error
        raise RuntimeError(f"cannot load pretrained_backbone={str(source)!r} into {name}: {error}") from error
    expected = timm.models.model_entrypoint(name.split(".")[0])
    found = timm.models.model_entrypoint(str(loaded.pretrained_cfg.get("architecture") or source_name.split(".")[0]))
    if found is not expected:
        raise ValueError(
            f"pretrained_backbone={str(source)!r} is a {found.__name__} checkpoint, but the backbone is {name}"
        )
    weights, target = loaded.state_dict(), net.state_dict()
    unfit = [key for key, value in target.items() if key not in weights or weights[key].shape != value.shape]
    if unfit or not target:
        raise RuntimeError(
            f"pretrained_backbone={str(source)!r} does not fit {name}: {len(unfit)} of {len(target)} tensors "
            f"are missing or have another shape: {', '.join(unfit[:5])}; pass weights of {name}"
        )
    net.load_state_dict({key: weights[key] for key in target})
    log(f"Loaded {len(target)}/{len(target)} tensors of the backbone {name} from {source}")
    return len(target)


def _timm_arguments(name: str, source: str | Path | bool, model_args: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Returns the name and arguments with which timm loads the weights of a source.

    Raises:
        ValueError: If the source does not exist or belongs to another model.
        RuntimeError: If a file cannot be read.
    """
    if source is True:
        return name, model_args
    if not isinstance(source, (str, Path)) or not str(source):
        raise ValueError(f"pretrained_backbone must be a timm tag, a Hub id, a folder, a file or True, got {source!r}")
    try:
        parsed = Source.parse(source, allow_bare_repo_id=True)
    except ValueError as error:
        raise ValueError(f"pretrained_backbone: {error}, or a tag of {name}") from error
    if parsed.kind == "file":
        num_classes = _count_classes(parsed.path, name)
        overlay = {"file": str(parsed.path), "num_classes": num_classes}
        return name, {**model_args, "num_classes": num_classes, "pretrained_cfg_overlay": overlay}
    architecture = parsed.name.split(".")[0]
    if parsed.kind == "timm" and architecture != name.split(".")[0]:
        raise ValueError(
            f"pretrained_backbone={parsed.name!r} is a {architecture} checkpoint, but the backbone is {name}"
        )
    return str(parsed), model_args


def _count_classes(path: Path, name: str) -> int:
    """Returns the number of classes in a file of weights; 0 without a classifier.

    timm must create the model with this number. Otherwise timm would ignore missing keys in the file.
    """
    try:
        check_file(path)
        state_dict = load_state_dict(str(path))
    except Exception as error:  # an arbitrary file
        first_line = str(error).strip().partition("\n")[0]
        raise RuntimeError(
            f"pretrained_backbone={str(path)!r}: cannot read weights of a classifier ({type(error).__name__}: "
            f"{first_line}); pass weights of {name}, not of a whole detector"
        ) from error
    try:
        state_dict = strip_model_prefix(name, state_dict)[0]
    except ValueError as error:
        raise RuntimeError(f"pretrained_backbone={str(path)!r}: {error}") from error
    classifier = get_pretrained_cfg_value(name, "classifier")
    names = [classifier] if isinstance(classifier, str) else list(classifier or ())
    for layer in [*names, "head"]:  # 'head' in the authors' code
        weight = state_dict.get(f"{layer}.weight")
        if isinstance(weight, torch.Tensor):
            return int(weight.shape[0])
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# Fine-tuning


def freeze_stages(net: Any, stages: int) -> None:
    """Excludes the stem and the first stages from training.

    Args:
        net: timm model.
        stages: Number of stages, as many as the feature maps of stride 4 and more; 0 freezes nothing.

    Raises:
        ValueError: If the model has fewer stages.
    """
    ends = [info["module"] for info in net.feature_info if info["reduction"] >= STRIDES[0]]
    if not isinstance(stages, int) or not 0 <= stages <= len(ends):
        raise ValueError(f"frozen_stages must be from 0 to {len(ends)}, got {stages!r}")
    if stages == 0:
        return
    # Layers are registered in the order of their use, which timm's own feature extractors assume, too.
    parameters = list(net.named_parameters())
    last = max((i for i, (key, _) in enumerate(parameters) if key.startswith(f"{ends[stages - 1]}.")), default=-1)
    for _, parameter in parameters[: last + 1]:
        parameter.requires_grad_(False)


class TimmBackboneMixin:
    """Methods of timm's models, for a model with a timm backbone.

    Training code expects them.

    Attributes:
        backbone_path: Path of the timm model in the module, such as 'backbone.body.net'.
        norm_eval: Whether the BatchNorm layers of the backbone keep their statistics in training.
    """

    backbone_path: str
    norm_eval: bool = False

    @property
    def net(self: Any) -> Any:
        """The timm model."""
        return self.get_submodule(self.backbone_path)

    @torch.jit.ignore
    def group_matcher(self: Any, coarse: bool = False) -> Callable[[str], tuple[float, ...]]:
        """Returns a function that groups parameters by depth, for timm's layer decay.

        The layers of the backbone come in their order. All other layers are the last group.

        Args:
            coarse: Whether a group is a stage instead of a block.
        """
        prefix = f"{self.backbone_path}."
        groups: dict[str, int] = {}
        if hasattr(self.net, "group_matcher"):
            groups = group_parameters(self.net, self.net.group_matcher(coarse=coarse), reverse=True)

        def match(name: str) -> tuple[float, ...]:
            depth = groups.get(name[len(prefix) :]) if name.startswith(prefix) else None
            return (float("inf"),) if depth is None else (float(depth),)

        return match

    @torch.jit.ignore
    def no_weight_decay(self: Any) -> set[str]:
        """Returns the names of parameters without weight decay."""
        names = self.net.no_weight_decay() if hasattr(self.net, "no_weight_decay") else ()
        return {f"{self.backbone_path}.{name}" for name in names}

    @torch.jit.ignore
    def set_grad_checkpointing(self: Any, enable: bool = True) -> None:
        """Turns gradient checkpointing of the backbone's blocks on or off."""
        self.net.set_grad_checkpointing(enable)

    def train(self: Any, mode: bool = True) -> Any:
        """Sets training mode, except for layers that keep their statistics.

        These are frozen layers and, with `norm_eval`, the backbone's BatchNorm.
        """
        super().train(mode)  # type: ignore[misc]
        if mode:
            set_eval(self.net, self.norm_eval)
        return self


def set_eval(net: nn.Module, norm_eval: bool) -> None:
    """Puts frozen layers into evaluation mode.

    Args:
        net: timm model.
        norm_eval: Whether all BatchNorm layers are put into evaluation mode, too.
    """
    for module in net.modules():
        is_norm = isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm)
        parameters = list(module.parameters())
        is_frozen = bool(parameters) and not any(p.requires_grad for p in parameters)
        if is_frozen or (norm_eval and is_norm):
            module.eval()

"""UPerNet, Semantic FPN and DeepLabV3+ on a timm backbone.

Shapes:
    B        batch
    C        channels of a feature map
    H, W     height and width of an image
    K        number of classes
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from timm.models import FeatureInfo
from torch import nn

from stvit.adapters.backbone import (
    TimmBackboneMixin,
    TimmFeatures,
    check_backbone,
    create_net,
    feature_maps,
    freeze_stages,
    image_stats,
    lists_to_tuples,
    load_backbone,
    pyramid_indices,
)
from stvit.adapters.folder import Recipe, load_model

# Weight of the auxiliary head in the loss, as in mmsegmentation.
AUXILIARY_WEIGHT = 0.4


class FCNHead(nn.Sequential):
    """Auxiliary head of mmsegmentation's UPerNet.

    It is a 3x3 convolution, dropout, and a 1x1 convolution to the classes.

    It maps (B, C, H, W) to (B, K, H, W).
    """

    def __init__(self, in_chs: int, num_classes: int, hidden_chs: int = 256, drop_rate: float = 0.1) -> None:
        """Creates the layers.

        Args:
            in_chs: Channels of the feature map.
            num_classes: Number of classes K.
            hidden_chs: Channels between the convolutions.
            drop_rate: Probability to drop a channel before the last convolution.
        """
        super().__init__(
            nn.Conv2d(in_chs, hidden_chs, 3, padding=1, bias=False),
            nn.BatchNorm2d(hidden_chs),
            nn.ReLU(inplace=True),
            nn.Dropout2d(drop_rate),
            nn.Conv2d(hidden_chs, num_classes, 1),
        )


class Features(TimmFeatures):
    """Feature extractor for timm's `features_only=True` (`feature_cls=Features`).

    timm's own extractors take the layers out of the model, or do not return maps in the layout that smp expects.

    Attributes:
        feature_info: Channels and strides of the feature maps, as smp reads them.
        is_channels_last: Whether the maps are (B, H, W, C).
    """

    def __init__(self, net: Any, out_indices: Sequence[int], output_fmt: str = "NCHW", **_: Any) -> None:
        """Removes the layers after the last feature map.

        Args:
            net: timm model.
            out_indices: Indices of the feature maps in the model's `feature_info`.
            output_fmt: Layout of the returned maps. timm passes that of the model.
        """
        super().__init__(net, str(net.pretrained_cfg.get("architecture")), out_indices)
        self.feature_info = FeatureInfo(net.feature_info, tuple(out_indices))
        self.is_channels_last = str(output_fmt).upper().endswith("NHWC")

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Returns the feature maps of images."""
        maps = super().forward(x)
        return [y.permute(0, 2, 3, 1) for y in maps] if self.is_channels_last else maps


class _SegmentationModel(TimmBackboneMixin):
    """Base class of our models, in addition to smp's.

    Attributes:
        num_classes: Number of classes K.
        in_chans: Channels of the images.
        mean: Mean of each image channel, for pixels from 0 to 1.
        std: Standard deviation of each image channel.
        short_side: Largest length of the shorter side of an image, to which the commands resize images.
        long_side: Largest length of the longer side.
        auxiliary_head: Head on the feature map of stride 16 that only the training uses, or None.
        recipe: Builder and arguments that create the model again.
    """

    backbone_path = "encoder.model.net"
    num_classes: int
    in_chans: int
    mean: list[float]
    std: list[float]
    short_side: int
    long_side: int
    auxiliary_head: FCNHead | None
    recipe: Recipe

    def forward(self: Any, x: torch.Tensor) -> Any:
        """Returns the logits of each pixel.

        Args:
            x: Normalized images (B, in_chans, H, W) of any size. They are padded to a multiple of the stride, and the
                logits are cropped.

        Returns:
            Logits (B, K, H, W). In training mode, a model with an auxiliary head returns a pair: these logits, and
            those of the auxiliary head (B, K, H, W).

        Raises:
            ValueError: If the images have another shape.
        """
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f"expected images (B, {self.in_chans}, H, W), got {tuple(x.shape)}")
        height, width = x.shape[-2:]
        stride = self.encoder.output_stride
        bottom, right = -height % stride, -width % stride
        if bottom or right:
            x = F.pad(x, (0, right, 0, bottom))
        features = self.encoder(x)
        logits = self.segmentation_head(self.decoder(features))[..., :height, :width]
        if not self.training or self.auxiliary_head is None:
            return logits
        auxiliary = F.interpolate(self.auxiliary_head(features[-2]), size=x.shape[-2:], mode="bilinear")
        return logits, auxiliary[..., :height, :width]


class UPerNet(_SegmentationModel, smp.UPerNet):
    """smp's UPerNet for images of any size, with an optional auxiliary head."""


class SemanticFPN(_SegmentationModel, smp.FPN):
    """smp's FPN for images of any size, with an optional auxiliary head."""


class DeepLabV3Plus(_SegmentationModel, smp.DeepLabV3Plus):
    """smp's DeepLabV3+ for images of any size, with an optional auxiliary head."""


def upernet(
    backbone: str,
    num_classes: int,
    *,
    pretrained_backbone: str | Path | bool | None = None,
    frozen_stages: int = 0,
    norm_eval: bool | None = None,
    drop_path_rate: float | None = None,
    in_chans: int = 3,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    short_side: int = 512,
    long_side: int = 2048,
    auxiliary_head: bool = True,
    backbone_kwargs: Mapping[str, Any] | None = None,
    log: Callable[[str], None] = print,
    **kwargs: Any,
) -> UPerNet:
    """Creates a UPerNet (Xiao et al. 2018) on a timm backbone.

    Args:
        backbone: Name of a timm model with feature maps.
        num_classes: Number of classes K.
        pretrained_backbone: Weights of the backbone: True for the published ones, a timm tag, 'hf-hub:org/name', a
            folder, a run directory or a file; None for random weights.
        frozen_stages: Number of stages, after the stem, that are not trained; 0 trains everything.
        norm_eval: Whether the BatchNorm layers of the backbone keep their statistics in training (default: if
            pretrained weights are loaded).
        drop_path_rate: Stochastic depth rate of the backbone's last block (default: the backbone's).
        in_chans: Channels of the images.
        mean: Mean of each image channel, for pixels from 0 to 1 (default: the backbone's).
        std: Standard deviation of each image channel (default: the backbone's).
        short_side: Largest length of the shorter side of an image, in pixels. The commands resize images to it; the
            model itself accepts any size.
        long_side: Largest length of the longer side.
        auxiliary_head: Whether to add an `FCNHead` to the feature map of stride 16. Its weight in the loss is
            `AUXILIARY_WEIGHT`.
        backbone_kwargs: Other arguments of the timm model.
        log: Receives a line with the number of loaded tensors of the backbone.
        **kwargs: Arguments of `segmentation_models_pytorch.UPerNet`, such as `decoder_channels`.

    Raises:
        ValueError: If an argument is wrong, or the weights are of another model.
        RuntimeError: If the weights cannot be read.
    """
    return _build("upernet", UPerNet, locals())


def semantic_fpn(
    backbone: str,
    num_classes: int,
    *,
    pretrained_backbone: str | Path | bool | None = None,
    frozen_stages: int = 0,
    norm_eval: bool | None = None,
    drop_path_rate: float | None = None,
    in_chans: int = 3,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    short_side: int = 512,
    long_side: int = 2048,
    auxiliary_head: bool = False,
    backbone_kwargs: Mapping[str, Any] | None = None,
    log: Callable[[str], None] = print,
    **kwargs: Any,
) -> SemanticFPN:
    """Creates a Semantic FPN (Kirillov et al. 2019) on a timm backbone.

    The arguments are those of `upernet`. Other arguments are those of `segmentation_models_pytorch.FPN`.

    Raises:
        ValueError: If an argument is wrong, or the weights are of another model.
        RuntimeError: If the weights cannot be read.
    """
    return _build("semantic_fpn", SemanticFPN, locals())


def deeplabv3plus(
    backbone: str,
    num_classes: int,
    *,
    output_stride: int = 16,
    pretrained_backbone: str | Path | bool | None = None,
    frozen_stages: int = 0,
    norm_eval: bool | None = None,
    drop_path_rate: float | None = None,
    in_chans: int = 3,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    short_side: int = 512,
    long_side: int = 2048,
    auxiliary_head: bool = False,
    backbone_kwargs: Mapping[str, Any] | None = None,
    log: Callable[[str], None] = print,
    **kwargs: Any,
) -> DeepLabV3Plus:
    """Creates a DeepLabV3+ (Chen et al. 2018) on a timm backbone.

    The stride of the last feature map, `output_stride`, is 8 or 16. Only some timm models support it. The other
    arguments are those of `upernet`, and those of `segmentation_models_pytorch.DeepLabV3Plus`.

    Raises:
        ValueError: If an argument is wrong, or the weights are of another model.
        RuntimeError: If the weights cannot be read.
    """
    return _build("deeplabv3plus", DeepLabV3Plus, locals())


BUILDERS: dict[str, Callable[..., Any]] = {
    "upernet": upernet,
    "semantic_fpn": semantic_fpn,
    "deeplabv3plus": deeplabv3plus,
}


def load(source: str | Path, **overrides: Any) -> Any:
    """Loads a trained model in evaluation mode.

    Args:
        source: Run directory or model folder of `stvit train-seg`, or a model on the Hub ('hf-hub:org/name').
        **overrides: Arguments of the builder that differ from the saved ones.

    Returns:
        The model, with the class names as `label_names`.

    Raises:
        stvit.weights.PretrainedError: If the source does not exist, is damaged, or is not a segmentation model.
    """
    return load_model("segmentation", BUILDERS, source, **overrides)


def _build(name: str, model_class: Any, arguments: dict[str, Any]) -> Any:
    """Creates a model from the arguments of its builder."""
    kwargs, log = arguments.pop("kwargs"), arguments.pop("log")
    given = {**arguments, **kwargs}
    source = given.pop("pretrained_backbone")
    if given["norm_eval"] is None:
        given["norm_eval"] = source is not None and source is not False
    recipe = Recipe("segmentation", name, {key: value for key, value in given.items() if value is not None})
    backbone, num_classes, in_chans = given.pop("backbone"), given.pop("num_classes"), given.pop("in_chans")
    frozen_stages, norm_eval = given.pop("frozen_stages"), given.pop("norm_eval")
    drop_path_rate, backbone_kwargs = given.pop("drop_path_rate"), dict(given.pop("backbone_kwargs") or {})
    mean, std, has_auxiliary_head = given.pop("mean"), given.pop("std"), given.pop("auxiliary_head")
    sides = {key: given.pop(key) for key in ("short_side", "long_side")}
    if drop_path_rate is not None:
        backbone_kwargs["drop_path_rate"] = drop_path_rate
    for key, value in {"num_classes": num_classes, **sides}.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{key} must be a whole number of at least 1, got {value!r}")
    check_backbone(backbone, backbone_kwargs)
    if "output_stride" in given:
        given["encoder_output_stride"] = given.pop("output_stride")
    _check_smp_arguments(name, model_class, given)
    try:
        model = model_class(
            encoder_name=f"tu-{backbone}",
            encoder_weights=None,
            in_channels=in_chans,
            classes=num_classes,
            feature_cls=Features,
            **lists_to_tuples(backbone_kwargs),
            **given,
        )
    except (ValueError, TypeError, KeyError, RuntimeError, AssertionError, NotImplementedError) as error:
        _explain_backbone(name, backbone, error, in_chans=in_chans, **backbone_kwargs)
        raise ValueError(f"cannot create {name} on the backbone {backbone}: {error}") from error
    model.num_classes, model.in_chans, model.norm_eval, model.recipe = num_classes, in_chans, norm_eval, recipe
    model.short_side, model.long_side = sides.values()
    model.mean, model.std = image_stats(model.net, in_chans)
    for key, values in (("mean", mean), ("std", std)):
        if values is not None:
            setattr(model, key, _check_stats(key, values, in_chans))
    model.auxiliary_head = FCNHead(model.encoder.out_channels[-2], num_classes) if has_auxiliary_head else None
    if source is not None and source is not False:
        load_backbone(model.net, backbone, source, in_chans=in_chans, model_args=backbone_kwargs, log=log)
    freeze_stages(model.net, frozen_stages)
    return model.train()


def _explain_backbone(name: str, backbone: str, error: Exception, **model_args: Any) -> None:
    """Raises a clearer error if a backbone does not have what a decoder needs.

    Raises:
        ValueError: If the backbone lacks a feature map or the argument `output_stride`.
    """
    try:
        net = create_net(backbone, **model_args)
    except ValueError:
        return
    pyramid_indices(feature_maps(net, backbone), backbone)
    if "output_stride" in str(error) and "output_stride" not in model_args:
        raise ValueError(
            f"{name} needs a backbone with the argument output_stride, which {backbone} does not have; choose a "
            "backbone such as stvit_small, convnext_tiny or resnet50, or another decoder"
        ) from error


# Arguments of smp's models that the builders set, or that would change the output.
_NO_ARGUMENTS = {
    *("self", "kwargs", "encoder_name", "encoder_weights", "encoder_output_stride", "in_channels", "classes"),
    *("activation", "aux_params", "upsampling"),
}


def _check_smp_arguments(name: str, model_class: Any, arguments: Mapping[str, Any]) -> None:
    """Refuses arguments that smp's model does not have, and widths below 1.

    smp would pass unknown arguments on to timm.

    Raises:
        ValueError: If there is one.
    """
    # In Python 3.10, the signature of the class is that of its `__new__`.
    known = sorted(set(inspect.signature(model_class.__init__).parameters) - _NO_ARGUMENTS)
    for key in arguments:
        if key not in known and key != "encoder_output_stride":
            raise ValueError(
                f"{name} has no argument {key!r}, expected one of {', '.join(known)}; pass arguments of the backbone "
                "as backbone_kwargs"
            )
        value = arguments[key]
        if key.endswith("channels") and isinstance(value, int) and value < 1:
            raise ValueError(f"{key} must be a whole number of at least 1, got {value!r}")


def _check_stats(name: str, values: Sequence[float], in_chans: int) -> list[float]:
    numbers = [float(value) for value in values]
    if len(numbers) not in (1, in_chans):
        raise ValueError(f"{name} must have 1 or {in_chans} values, got {len(numbers)}")
    return numbers * in_chans if len(numbers) == 1 else numbers

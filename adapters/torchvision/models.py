"""torchvision's detectors on timm backbones

`mask_rcnn` and the other functions build a detector. The classes are torchvision's, with the methods that training code
expects of timm's models (`TimmBackboneMixin`).

Shapes:
    B        batch size
    C        channels
    H, W     height and width of an image or feature map
"""

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from stvit.adapters.backbone import (
    TimmBackboneMixin,
    TimmFeatures,
    create_net,
    feature_maps,
    freeze_stages,
    image_stats,
    load_backbone,
    pyramid_indices,
)
from stvit.adapters.folder import Recipe, load_model

from .cascade import BOX_WEIGHTS, IOU_THRESHOLDS, LOSS_WEIGHTS, CascadePredictor, CascadeRoIHeads
from .pyramid import Pyramid

__all__ = [
    "BUILDERS",
    "FCOS",
    "CascadeMaskRCNN",
    "CascadeRCNN",
    "FasterRCNN",
    "MaskRCNN",
    "RetinaNet",
    "cascade_mask_rcnn",
    "cascade_rcnn",
    "faster_rcnn",
    "fcos",
    "load",
    "mask_rcnn",
    "retinanet",
]

_Model = TypeVar("_Model", bound="Detector")
_RPN_LOSSES = ("loss_objectness", "loss_rpn_box_reg")
# Width of torchvision's box heads, and of the convolutions of its heads.
_HEAD_WIDTH = 1024
_CONV_WIDTH = 256
# Groups of GroupNorm, as in the paper (Wu and He 2018, arXiv 1803.08494).
_GROUPS = 32


# ---------------------------------------------------------------------------------------------------------------------
# Heads whose outputs keep the precision of the weights under autocast: torchvision computes boxes in it


class _RPNHead(RPNHead):
    def forward(self, x: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        logits: list[torch.Tensor] = []
        deltas: list[torch.Tensor] = []
        dtype = self.cls_logits.weight.dtype
        for features in x:
            hidden = self.conv(features)
            logits.append(self.cls_logits(hidden).to(dtype))
            deltas.append(self.bbox_pred(hidden).to(dtype))
        return logits, deltas


class _BoxPredictor(FastRCNNPredictor):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = self.cls_score.weight.dtype
        return self.cls_score(x).to(dtype), self.bbox_pred(x).to(dtype)


class _RetinaNetHead(RetinaNetHead):
    def forward(self, x: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        dtype = self.regression_head.bbox_reg.weight.dtype
        return {
            "cls_logits": self.classification_head(x).to(dtype),
            "bbox_regression": self.regression_head(x).to(dtype),
        }


class _FCOSHead(FCOSHead):
    def forward(self, x: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        dtype = self.regression_head.bbox_reg.weight.dtype
        deltas, centerness = self.regression_head(x)
        return {
            "cls_logits": self.classification_head(x).to(dtype),
            "bbox_regression": deltas.to(dtype),
            "bbox_ctrness": centerness.to(dtype),
        }


# ---------------------------------------------------------------------------------------------------------------------
# Models


class Detector(TimmBackboneMixin):
    """Base class of the detectors.

    Attributes:
        recipe: Function and arguments that built the model.
        loss_names: Keys of the losses that the model returns in training.
        label_names: Names of the labels 1, 2 and so on; None if unknown.
        category_ids: Ids of the labels 1, 2 and so on in the annotations; None if unknown.
        hidden_arguments: Arguments of torchvision's class that this package sets itself.
    """

    # Names that TorchScript leaves out of a scripted model.
    __jit_unused_properties__ = ["net"]  # noqa: RUF012
    __jit_ignored_attributes__ = ["recipe", "loss_names", "label_names", "category_ids"]  # noqa: RUF012
    backbone_path = "backbone.body.net"
    recipe: Recipe
    loss_names: tuple[str, ...]
    label_names: list[str] | None = None
    category_ids: list[int] | None = None
    hidden_arguments: tuple[str, ...] = (
        *("self", "args", "kwargs", "backbone", "num_classes"),
        *("head", "rpn_head", "box_predictor", "mask_predictor", "norm"),
    )


class FasterRCNN(Detector, detection.FasterRCNN):
    """torchvision's Faster R-CNN on a timm backbone; see `faster_rcnn`."""

    loss_names = ("loss_classifier", "loss_box_reg", *_RPN_LOSSES)

    def __init__(
        self,
        backbone: Pyramid,
        num_classes: int,
        *,
        norm: str | None = None,
        box_convs: int = 0,
        anchor_sizes: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        parts = _rcnn_parts(backbone, num_classes, norm, box_convs, anchor_sizes, kwargs)
        super().__init__(backbone, **parts)


class MaskRCNN(Detector, detection.MaskRCNN):
    """torchvision's Mask R-CNN on a timm backbone; see `mask_rcnn`."""

    loss_names = ("loss_classifier", "loss_box_reg", "loss_mask", *_RPN_LOSSES)

    def __init__(
        self,
        backbone: Pyramid,
        num_classes: int,
        *,
        norm: str | None = None,
        box_convs: int = 0,
        anchor_sizes: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        parts = _rcnn_parts(backbone, num_classes, norm, box_convs, anchor_sizes, kwargs)
        masks = {
            "mask_head": _mask_head(backbone.out_channels, norm),
            "mask_predictor": MaskRCNNPredictor(_CONV_WIDTH, _CONV_WIDTH, num_classes),
        }
        super().__init__(backbone, **{**masks, **parts})


class CascadeRCNN(Detector, detection.FasterRCNN):
    """Cascade R-CNN on a timm backbone; see `cascade_rcnn`."""

    hidden_arguments = (
        *Detector.hidden_arguments,
        *("box_head", "box_fg_iou_thresh", "box_bg_iou_thresh", "bbox_reg_weights"),
    )

    def __init__(
        self,
        backbone: Pyramid,
        num_classes: int,
        *,
        iou_thresholds: Sequence[float] = IOU_THRESHOLDS,
        box_weights: Sequence[Sequence[float]] = BOX_WEIGHTS,
        loss_weights: Sequence[float] = LOSS_WEIGHTS,
        norm: str | None = None,
        box_convs: int = 0,
        anchor_sizes: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        parts = _rcnn_parts(backbone, num_classes, norm, box_convs, anchor_sizes, kwargs)
        super().__init__(backbone, **{**parts, "box_head": nn.Identity(), "box_predictor": nn.Identity()})
        single: Any = self.get_submodule("roi_heads")
        size = single.box_roi_pool.output_size[0]
        self.roi_heads = CascadeRoIHeads(
            single.box_roi_pool,
            [_box_head(backbone.out_channels, size, box_convs, norm) for _ in iou_thresholds],
            [CascadePredictor(_HEAD_WIDTH, num_classes) for _ in iou_thresholds],
            batch_size_per_image=single.fg_bg_sampler.batch_size_per_image,
            positive_fraction=single.fg_bg_sampler.positive_fraction,
            score_thresh=single.score_thresh,
            nms_thresh=single.nms_thresh,
            detections_per_img=single.detections_per_img,
            iou_thresholds=iou_thresholds,
            box_weights=box_weights,
            loss_weights=loss_weights,
        )
        losses = [f"loss_{kind}_{i + 1}" for i in range(len(iou_thresholds)) for kind in ("classifier", "box_reg")]
        self.loss_names = (*losses, *_RPN_LOSSES)


class CascadeMaskRCNN(CascadeRCNN):
    """Cascade Mask R-CNN on a timm backbone; see `cascade_mask_rcnn`."""

    def __init__(
        self,
        backbone: Pyramid,
        num_classes: int,
        *,
        mask_roi_pool: MultiScaleRoIAlign | None = None,
        mask_head: nn.Module | None = None,
        norm: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, num_classes, norm=norm, **kwargs)
        heads = self.roi_heads
        heads.mask_roi_pool = mask_roi_pool or MultiScaleRoIAlign(["0", "1", "2", "3"], 14, sampling_ratio=2)
        heads.mask_head = mask_head or _mask_head(backbone.out_channels, norm)
        heads.mask_predictor = MaskRCNNPredictor(_CONV_WIDTH, _CONV_WIDTH, num_classes)
        self.loss_names = ("loss_mask", *self.loss_names)


class RetinaNet(Detector, detection.RetinaNet):
    """torchvision's RetinaNet on a timm backbone; see `retinanet`."""

    loss_names = ("classification", "bbox_regression")

    def __init__(self, backbone: Pyramid, num_classes: int, *, norm: str | None = None, **kwargs: Any) -> None:
        super().__init__(backbone, num_classes, head=nn.Identity(), **kwargs)
        anchors = self.anchor_generator.num_anchors_per_location()[0]
        self.head = _RetinaNetHead(backbone.out_channels, anchors, num_classes, _norm_layer(norm))


class FCOS(Detector, detection.FCOS):
    """torchvision's FCOS on a timm backbone; see `fcos`.

    Its heads always have GroupNorm.
    """

    loss_names = ("classification", "bbox_regression", "bbox_ctrness")

    def __init__(self, backbone: Pyramid, num_classes: int, *, norm: str | None = None, **kwargs: Any) -> None:
        super().__init__(backbone, num_classes, head=nn.Identity(), **kwargs)
        self.head = _FCOSHead(backbone.out_channels, 1, num_classes)


def _rcnn_parts(
    backbone: Pyramid,
    num_classes: int,
    norm: str | None,
    box_convs: int,
    anchor_sizes: Sequence[int] | None,
    kwargs: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns the arguments of torchvision's R-CNN classes with our heads."""
    anchors = kwargs.get("rpn_anchor_generator") or _anchor_generator(anchor_sizes)
    pool = kwargs.get("box_roi_pool")
    parts = {
        "rpn_anchor_generator": anchors,
        "rpn_head": _RPNHead(backbone.out_channels, anchors.num_anchors_per_location()[0]),
        "box_head": _box_head(backbone.out_channels, pool.output_size[0] if pool else 7, box_convs, norm),
        "box_predictor": _BoxPredictor(_HEAD_WIDTH, num_classes),
    }
    return {**parts, **kwargs}


def _anchor_generator(sizes: Sequence[int] | None) -> AnchorGenerator:
    """Returns one size for each map of the pyramid, in three aspect ratios.

    Raises:
        ValueError: If there are not five sizes.
    """
    sizes = (32, 64, 128, 256, 512) if sizes is None else sizes
    if len(sizes) != 5 or not all(isinstance(size, int | float) and size > 0 for size in sizes):
        raise ValueError(f"anchor_sizes must be five numbers of pixels, got {sizes!r}")
    return AnchorGenerator(tuple((size,) for size in sizes), ((0.5, 1.0, 2.0),) * 5)


def _norm_layer(norm: str | None) -> Callable[[int], nn.Module] | None:
    """Returns the class of a normalization layer, which takes a number of channels.

    Raises:
        ValueError: If the name is unknown.
    """
    if norm not in (None, "bn", "gn"):
        raise ValueError(f"norm must be 'gn', 'bn' or None, got {norm!r}")
    return {None: None, "bn": nn.BatchNorm2d, "gn": partial(nn.GroupNorm, _GROUPS)}[norm]


def _box_head(in_channels: int, size: int, convs: int, norm: str | None) -> nn.Module:
    if not convs:
        return TwoMLPHead(in_channels * size**2, _HEAD_WIDTH)
    widths = [_CONV_WIDTH] * convs
    return FastRCNNConvFCHead((in_channels, size, size), widths, [_HEAD_WIDTH], norm_layer=_norm_layer(norm or "bn"))


def _mask_head(in_channels: int, norm: str | None) -> nn.Module:
    return MaskRCNNHeads(in_channels, (_CONV_WIDTH,) * 4, dilation=1, norm_layer=_norm_layer(norm))


# ---------------------------------------------------------------------------------------------------------------------
# Functions that build a model


def faster_rcnn(
    backbone: str,
    num_classes: int,
    *,
    pretrained_backbone: str | Path | bool | None = None,
    in_chans: int = 3,
    frozen_stages: int = 0,
    norm_eval: bool | None = None,
    drop_path_rate: float | None = None,
    backbone_kwargs: Mapping[str, Any] | None = None,
    fpn_channels: int = 256,
    norm: str | None = None,
    log: Callable[[str], None] = print,
    **kwargs: Any,
) -> FasterRCNN:
    """Builds a Faster R-CNN on the feature maps of strides 4 to 32 of a timm model.

    Images, targets and detections are those of `torchvision.models.detection`. Mean and standard deviation of the
    images are those of the backbone.

    Args:
        backbone: Name of a timm model with feature maps.
        num_classes: Number of labels; the background, label 0, counts.
        pretrained_backbone: Weights of the backbone: a tag of timm ('stvit_small.in1k'), a model on the Hub
            ('hf-hub:org/name'), a folder, run directory or file; True for the published weights of the backbone.
        in_chans: Channels of the images; 1 for grayscale.
        frozen_stages: Stages of the backbone that are not trained, together with the stem; 0 for none.
        norm_eval: Whether the BatchNorm layers of the backbone keep their statistics in training (default: if
            pretrained weights are loaded).
        drop_path_rate: Stochastic depth rate of the backbone; None for its default.
        backbone_kwargs: Other arguments of the timm model.
        fpn_channels: Channels of the feature pyramid.
        norm: Normalization in the feature pyramid and the heads: 'gn' (GroupNorm), 'bn' (BatchNorm) or None. Training
            without pretrained weights needs it (He et al. 2019, arXiv 1811.08883).
        log: Receives a line with the number of loaded tensors of the backbone.
        **kwargs: Arguments of torchvision's class, such as `min_size` and `box_score_thresh`, and of its
            `GeneralizedRCNNTransform`. In addition, `box_convs`: number of 3x3 convolutions in the box head, before one
            fully connected layer instead of two; and `anchor_sizes`: five numbers of pixels, smaller ones for smaller
            images (default: 32, 64, 128, 256, 512).

    Returns:
        The model in training mode. `recipe` stores the arguments.

    Raises:
        ValueError: If an argument does not exist, or the backbone has no such feature maps or weights.
        RuntimeError: If weights cannot be read or do not fit.
    """
    return _build(FasterRCNN, "faster_rcnn", locals(), kwargs)


def mask_rcnn(
    backbone: str,
    num_classes: int,
    *,
    pretrained_backbone: str | Path | bool | None = None,
    in_chans: int = 3,
    frozen_stages: int = 0,
    norm_eval: bool | None = None,
    drop_path_rate: float | None = None,
    backbone_kwargs: Mapping[str, Any] | None = None,
    fpn_channels: int = 256,
    norm: str | None = None,
    log: Callable[[str], None] = print,
    **kwargs: Any,
) -> MaskRCNN:
    """Builds a Mask R-CNN on a timm model. The arguments are those of `faster_rcnn`.

    Raises:
        ValueError, RuntimeError: As in `faster_rcnn`.
    """
    return _build(MaskRCNN, "mask_rcnn", locals(), kwargs)


def cascade_rcnn(
    backbone: str,
    num_classes: int,
    *,
    pretrained_backbone: str | Path | bool | None = None,
    in_chans: int = 3,
    frozen_stages: int = 0,
    norm_eval: bool | None = None,
    drop_path_rate: float | None = None,
    backbone_kwargs: Mapping[str, Any] | None = None,
    fpn_channels: int = 256,
    norm: str | None = None,
    log: Callable[[str], None] = print,
    **kwargs: Any,
) -> CascadeRCNN:
    """Builds a Cascade R-CNN on a timm model, see `CascadeRoIHeads`.

    The arguments are those of `faster_rcnn`, and in addition `iou_thresholds`, `box_weights` and `loss_weights`, which
    have a value for each head. Swin's detectors have `box_convs=4`.

    Raises:
        ValueError, RuntimeError: As in `faster_rcnn`.
    """
    return _build(CascadeRCNN, "cascade_rcnn", locals(), kwargs)


def cascade_mask_rcnn(
    backbone: str,
    num_classes: int,
    *,
    pretrained_backbone: str | Path | bool | None = None,
    in_chans: int = 3,
    frozen_stages: int = 0,
    norm_eval: bool | None = None,
    drop_path_rate: float | None = None,
    backbone_kwargs: Mapping[str, Any] | None = None,
    fpn_channels: int = 256,
    norm: str | None = None,
    log: Callable[[str], None] = print,
    **kwargs: Any,
) -> CascadeMaskRCNN:
    """Builds a Cascade Mask R-CNN on a timm model.

    The arguments are those of `cascade_rcnn`.

    Raises:
        ValueError, RuntimeError: As in `faster_rcnn`.
    """
    return _build(CascadeMaskRCNN, "cascade_mask_rcnn", locals(), kwargs)


def retinanet(
    backbone: str,
    num_classes: int,
    *,
    pretrained_backbone: str | Path | bool | None = None,
    in_chans: int = 3,
    frozen_stages: int = 0,
    norm_eval: bool | None = None,
    drop_path_rate: float | None = None,
    backbone_kwargs: Mapping[str, Any] | None = None,
    fpn_channels: int = 256,
    norm: str | None = None,
    log: Callable[[str], None] = print,
    **kwargs: Any,
) -> RetinaNet:
    """Builds a RetinaNet on the feature maps of strides 8 to 32 of a timm model.

    The arguments are those of `faster_rcnn`, and those of torchvision's `RetinaNet`.

    Raises:
        ValueError, RuntimeError: As in `faster_rcnn`.
    """
    return _build(RetinaNet, "retinanet", locals(), kwargs)


def fcos(
    backbone: str,
    num_classes: int,
    *,
    pretrained_backbone: str | Path | bool | None = None,
    in_chans: int = 3,
    frozen_stages: int = 0,
    norm_eval: bool | None = None,
    drop_path_rate: float | None = None,
    backbone_kwargs: Mapping[str, Any] | None = None,
    fpn_channels: int = 256,
    norm: str | None = None,
    log: Callable[[str], None] = print,
    **kwargs: Any,
) -> FCOS:
    """Builds an FCOS on the feature maps of strides 8 to 32 of a timm model.

    The arguments are those of `faster_rcnn`, and those of torchvision's `FCOS`.

    Raises:
        ValueError, RuntimeError: As in `faster_rcnn`.
    """
    return _build(FCOS, "fcos", locals(), kwargs)


def _build(cls: type[_Model], builder: str, args: dict[str, Any], kwargs: dict[str, Any]) -> _Model:
    """Builds a model.

    Args:
        cls: Class of the model.
        builder: Name of the function that the user called.
        args: Its named arguments.
        kwargs: Its other arguments, for `cls`.
    """
    args = {key: value for key, value in args.items() if key != "kwargs"}
    log = args.pop("log")
    name, num_classes, in_chans = args["backbone"], args["num_classes"], args["in_chans"]
    _check(cls, builder, num_classes, args, kwargs)
    source = args.pop("pretrained_backbone")
    if args["norm_eval"] is None:
        args["norm_eval"] = bool(source)

    model_args = dict(args["backbone_kwargs"] or {})
    if args["drop_path_rate"] is not None:
        model_args["drop_path_rate"] = args["drop_path_rate"]
    net = create_net(name, in_chans=in_chans, **model_args)
    indices = pyramid_indices(feature_maps(net, name), name)
    channels = args["fpn_channels"]
    if issubclass(cls, RetinaNet | FCOS):
        body, extra_blocks = TimmFeatures(net, name, indices[1:]), LastLevelP6P7(channels, channels)
    else:
        body, extra_blocks = TimmFeatures(net, name, indices), LastLevelMaxPool()
    if source:
        load_backbone(net, name, source, in_chans=in_chans, model_args=model_args, log=log)
    freeze_stages(net, args["frozen_stages"])

    mean, std = image_stats(net, in_chans)
    defaults = {"image_mean": mean, "image_std": std, "norm": args["norm"]}
    pyramid = Pyramid(body, in_chans, channels, extra_blocks, _norm_layer(args["norm"]))
    create: Callable[..., Any] = cls
    model = create(pyramid, num_classes, **{**defaults, **kwargs})
    model.norm_eval = args["norm_eval"]
    model.recipe = Recipe("torchvision", builder, {**args, **kwargs})
    return model.train()


def _check(cls: type[Any], builder: str, num_classes: int, args: Mapping[str, Any], kwargs: Mapping[str, Any]) -> None:
    """Checks the arguments of a model.

    Raises:
        ValueError: If an argument does not exist, or `num_classes` or `fpn_channels` is too small.
    """
    known = _keyword_arguments(cls)
    for key in kwargs:
        if key not in known:
            near = difflib.get_close_matches(key, [*known, *args], n=1)
            own = ", ".join([*list(args)[2:], *_own_arguments(cls)])
            hint = f"did you mean {near[0]}?" if near else f"pass {own}, or an argument of torchvision's class"
            raise ValueError(f"{builder} has no argument {key!r}; {hint}")
    if not isinstance(num_classes, int) or num_classes < 2:
        raise ValueError(f"num_classes counts the background, so it must be at least 2, got {num_classes!r}")
    if not isinstance(args["fpn_channels"], int) or args["fpn_channels"] < 1:
        raise ValueError(f"fpn_channels must be a whole number of at least 1, got {args['fpn_channels']!r}")
    channels, has_groups = args["fpn_channels"], args["norm"] == "gn" or issubclass(cls, FCOS)
    if has_groups and (channels < 2 * _GROUPS or channels % _GROUPS):
        # A group of one channel of a map of one pixel is a single value.
        raise ValueError(
            f"{builder} has GroupNorm with {_GROUPS} groups, so fpn_channels must be a multiple of {_GROUPS} and at "
            f"least {2 * _GROUPS}, got {channels!r}"
        )


def _own_arguments(cls: type[Any]) -> list[str]:
    """Returns the arguments of our classes that torchvision's do not have.

    Arguments that are modules are left out.
    """
    ours = [parent for parent in cls.__mro__ if parent.__module__ == __name__]
    names = dict.fromkeys(name for parent in ours for name in inspect.signature(parent).parameters)
    return [name for name in names if name not in cls.hidden_arguments and not name.endswith(("_head", "_pool"))]


def _keyword_arguments(cls: type[Any]) -> list[str]:
    """Returns the names that a user may pass to a class of this module.

    They are those of torchvision's class and its transform, and those that our class adds.
    """
    names: dict[str, None] = {}
    for parent in cls.__mro__:
        names.update(dict.fromkeys(inspect.signature(parent).parameters))
        if parent.__module__.startswith("torchvision."):
            break
    names.update(dict.fromkeys([*inspect.signature(GeneralizedRCNNTransform).parameters, "_skip_resize"]))
    return [name for name in names if name not in cls.hidden_arguments]


BUILDERS: dict[str, Callable[..., Any]] = {
    "faster_rcnn": faster_rcnn,
    "mask_rcnn": mask_rcnn,
    "cascade_rcnn": cascade_rcnn,
    "cascade_mask_rcnn": cascade_mask_rcnn,
    "retinanet": retinanet,
    "fcos": fcos,
}


def load(source: str | Path, **overrides: Any) -> Any:
    """Loads a detector that a training run or `save_model` wrote.

    Args:
        source: Model folder, run directory, or 'hf-hub:org/name' with an optional '@revision'.
        **overrides: Arguments of the function that built the model, such as `box_score_thresh`.

    Returns:
        The model in evaluation mode, with the attributes `label_names` and `category_ids`.

    Raises:
        PretrainedError: If the model cannot be found, downloaded or read.
    """
    return load_model("torchvision", BUILDERS, source, **overrides)

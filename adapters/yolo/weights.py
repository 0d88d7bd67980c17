"""Loads pretrained weights into a detector.

The backbone takes the weights of a timm model. Neck and head take the weights of Ultralytics' YOLO26.
"""

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from timm.models import adapt_input_conv
from torch import nn
from ultralytics.nn.modules import Detect
from ultralytics.nn.tasks import BaseModel, load_checkpoint
from ultralytics.utils import LOGGER

from stvit.adapters.backbone import load_backbone as load_timm_backbone
from stvit.weights.source import Source

from .checkpoint import check_local, fetch_checkpoint
from .modules import TimmBackbone

__all__ = ["align", "find_backbone", "load_backbone", "load_stock", "transfer"]


def find_backbone(model: Any) -> TimmBackbone | None:
    """Returns the backbone of a detector if it is a timm model, else None."""
    layers = getattr(model, "model", None)
    first = layers[0] if isinstance(layers, nn.Sequential) and len(layers) else None
    return first if isinstance(first, TimmBackbone) else None


def load_backbone(backbone: TimmBackbone, source: str | Path | bool) -> int:
    """Loads pretrained weights into a backbone.

    If a tensor is missing or does not fit, an error is raised and the backbone is not changed.

    Args:
        backbone: Backbone to load into.
        source: Tag of timm ('stvit_small.in1k'), model on the Hub ('hf-hub:org/name' or 'org/name'), folder, run
            directory or file of weights; True for the published weights of the backbone.

    Returns:
        Number of loaded tensors.

    Raises:
        ValueError: If the source does not exist or belongs to another model.
        RuntimeError: If the weights cannot be read or do not fit.
    """
    return load_timm_backbone(
        backbone.net,
        backbone.name,
        source,
        in_chans=backbone.in_chans,
        model_args=backbone.model_args,
        log=LOGGER.info,
    )


def load_stock(model: BaseModel, source: str | Path | nn.Module, *, trust: bool = False) -> list[str]:
    """Loads YOLO26 weights into the layers that a model shares with YOLO26.

    Args:
        model: Detector from a model file of this package.
        source: Checkpoint of the same scale, such as 'yolo26s.pt', or a loaded model.
        trust: Whether to open a file that contains other objects than a detector. Opening such a file can run its code.

    Returns:
        Names of the loaded tensors.

    Raises:
        ValueError: If the weights are not of YOLO26 or have another scale, or no tensor fits.
        RuntimeError: If the checkpoint cannot be read.
    """
    weights = source if isinstance(source, nn.Module) else _load_detector(source, trust)
    configs = [getattr(m, "yaml", {}) for m in (model, weights)]
    if isinstance(weights.model[-1], Detect) and isinstance(model.model[-1], Detect):  # type: ignore[index]
        families = [(config.get("end2end"), config.get("reg_max")) for config in configs]
        if families[0] != families[1]:
            raise ValueError(
                f"stock_weights={_label(source)} is of another generation of YOLO than the model; pass a YOLO26 "
                "checkpoint such as yolo26s.pt"
            )
    scales = [config.get("scale", "") for config in configs]
    if scales[0] != scales[1]:
        raise ValueError(
            f"stock_weights={_label(source)} has scale {scales[1]!r}, but the model has {scales[0]!r}; pass weights of "
            "the model's scale"
        )
    aligned = align(weights, model)
    # The class names of a new model are placeholders. With the names from the weights, `BaseModel.load` can match
    # classes by name later.
    names = dict(getattr(weights, "names", {}))
    if len(names) == len(model.names):
        model.names = names
    model.load(aligned, verbose=False)
    offered, own = aligned.state_dict(), model.state_dict()
    stock = _stock_layers(model)
    of_stock = [key for key in own if stock[int(key.split(".")[1])] >= 0]
    loaded = [key for key in of_stock if key in offered and torch.equal(own[key].float(), offered[key].float())]
    if not loaded:
        raise ValueError(
            f"stock_weights={_label(source)}: no tensor fits any of the {len(of_stock)} tensors of neck and head"
        )
    LOGGER.info(f"Loaded {len(loaded)}/{len(of_stock)} tensors of Ultralytics' own layers from {_label(source)}")
    return loaded


def _load_detector(source: str | Path, trust: bool) -> Any:
    if not isinstance(source, (str, Path)) or not str(source):
        raise ValueError(f"stock_weights must be a checkpoint of Ultralytics such as yolo26s.pt, got {source!r}")
    if Source.parse_hub(source) is not None:
        source = fetch_checkpoint(str(source))
    else:
        try:
            check_local(source, trust)
        except (OSError, RuntimeError, TypeError) as error:
            raise RuntimeError(f"cannot load stock_weights={_label(source)}: {error}") from error
    try:
        weights = load_checkpoint(source)[0]
    except Exception as error:  # of the network or an arbitrary file
        raise RuntimeError(
            f"cannot load stock_weights={_label(source)}; pass a checkpoint of Ultralytics such as yolo26s.pt: {error}"
        ) from error
    if not isinstance(getattr(weights, "model", None), nn.Sequential):
        raise ValueError(f"expected a YOLO26 as stock_weights={_label(source)}, got a {type(weights).__name__}")
    return weights


def align(weights: nn.Module, model: nn.Module) -> nn.Module:
    """Returns a trained model with its layers reordered like those of another model.

    `BaseModel.load` matches tensors by name, and each name contains the index of a layer. A layer that the trained
    model does not have becomes `nn.Identity`.

    Args:
        weights: Trained model.
        model: Model to load into.
    """
    ours, theirs = _stock_layers(model), _stock_layers(weights)
    if ours == theirs:
        return weights
    aligned = deepcopy(weights)
    layers: Any = aligned.model
    own: Any = model.model
    places = {stock: place for place, stock in enumerate(theirs) if stock >= 0}
    kept: list[nn.Module] = [nn.Identity() for _ in ours]
    for place, stock in enumerate(ours):
        if stock in places and _alike(layers[places[stock]], own[place]):
            kept[place] = layers[places[stock]]
    aligned.model = nn.Sequential(*kept)
    return aligned


def _alike(layer: nn.Module, target: nn.Module) -> bool:
    """Returns whether two layers have the same type.

    All detection heads count as the same type.
    """
    return type(layer) is type(target) or (isinstance(layer, Detect) and isinstance(target, Detect))


def transfer(weights: nn.Module, model: BaseModel, keys: list[str] | None = None) -> None:
    """Copies the weights of a detector to one with other classes or channels.

    Args:
        weights: Detector with the weights.
        model: New detector.
        keys: Tensors of `weights` that were loaded from a checkpoint; None for all. The other tensors are random. They
            are not copied, so that the seed of the new model determines them.

    Raises:
        RuntimeError: If both have the same backbone and a tensor of it was not copied.
    """
    aligned = align(weights, model)
    if keys is not None:
        aligned, own, loaded = deepcopy(aligned), model.state_dict(), set(keys)
        for key, value in aligned.state_dict().items():
            if key not in loaded and key in own and own[key].shape == value.shape:
                value.copy_(own[key])
        layers: Any = aligned.model
        if not any(key.startswith(f"model.{len(layers) - 1}.") for key in keys):
            # The head of `weights` is random. `BaseModel.load` would rebuild the classification branch in its width.
            layers[-1] = nn.Identity()
    if keys is None or keys:
        model.load(aligned, verbose=keys is None)  # the log would count random tensors as loaded
    source, target = find_backbone(weights), find_backbone(model)
    if source is None or target is None or source.name != target.name or source.out_indices != target.out_indices:
        return
    _adapt_images(source, target)
    if keys is None or any(key.startswith("model.0.") for key in keys):
        _check_arrival(source, target)


def _adapt_images(source: TimmBackbone, target: TimmBackbone) -> None:
    """Adapts the first convolution to another number of image channels, as timm does.

    Ultralytics would leave its weights random.
    """
    if source.in_chans == target.in_chans:
        return
    for name in _first_convs(target):
        weight = source.net.get_parameter(f"{name}.weight").detach()
        if source.in_chans == 3:
            adapted = adapt_input_conv(target.in_chans, weight)
        else:  # timm adapts 3 channels only; here each new channel gets an equal share of the summed weights
            adapted = weight.sum(1, keepdim=True).repeat(1, target.in_chans, 1, 1) / target.in_chans
        target.net.get_parameter(f"{name}.weight").data.copy_(adapted)


def _check_arrival(source: TimmBackbone, target: TimmBackbone) -> None:
    """Checks that all tensors of the backbone were copied, and logs their number."""
    first = {f"{name}.weight" for name in _first_convs(target)} if source.in_chans != target.in_chans else set()
    here, there = target.net.state_dict(), source.net.state_dict()
    lost = [
        key for key, value in here.items() if key not in first and not torch.equal(value.float(), there[key].float())
    ]
    if lost:
        raise RuntimeError(f"{len(lost)} of {len(here)} tensors of the backbone were not copied: {lost[:5]}")
    adapted = f", the first convolution adapted to {target.in_chans} channels" if first else ""
    LOGGER.info(f"Transferred {len(here)}/{len(here)} tensors of the backbone {target.name}{adapted}")


def _first_convs(backbone: TimmBackbone) -> list[str]:
    first = backbone.net.pretrained_cfg.get("first_conv") or ()
    return [first] if isinstance(first, str) else list(first)


def _stock_layers(model: nn.Module) -> list[int]:
    """Returns the row number of each layer in Ultralytics' model file.

    A layer that Ultralytics' file does not have gets -1. If the model does not store the numbers, its layers are
    numbered from 0.
    """
    layers: Any = getattr(model, "model", ())
    stock = getattr(model, "yaml", {}).get("stock_layers")
    if isinstance(stock, list) and len(stock) == len(layers):
        return stock
    return [-1 if isinstance(layer, TimmBackbone) else place for place, layer in enumerate(layers)]


def _label(source: str | Path | nn.Module) -> str:
    return type(source).__name__ if isinstance(source, nn.Module) else repr(str(source))

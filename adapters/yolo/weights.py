"""Weights from elsewhere for a detector: a timm model's for its backbone, Ultralytics' own for its neck and head."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import adapt_input_conv, load_state_dict
from torch import nn
from ultralytics.nn.modules import Detect
from ultralytics.nn.tasks import BaseModel, load_checkpoint
from ultralytics.utils import LOGGER

import stvit
from stvit.weights.check import check_file
from stvit.weights.official import strip_prefix_of

from .checkpoint import PREFIXES, check_local, fetch_checkpoint
from .modules import TimmBackbone, lists_to_tuples, prune

# Ends of the names of files of weights.
_FILES = (".bin", ".ckpt", ".pt", ".pth", ".safetensors")

__all__ = ["align", "find_backbone", "load_backbone", "load_stock", "transfer"]


def find_backbone(model: Any) -> TimmBackbone | None:
    """The backbone of a detector, if it is a timm model."""
    layers = getattr(model, "model", None)
    first = layers[0] if isinstance(layers, nn.Sequential) and len(layers) else None
    return first if isinstance(first, TimmBackbone) else None


def load_backbone(backbone: TimmBackbone, source: str | Path | bool) -> int:
    """Loads pretrained weights into a backbone, all of them or none.

    Args:
        backbone: What they are for.
        source: A timm tag ('stvit_small.in1k'), a model on the Hub ('hf-hub:org/name') or of a folder
            ('local-dir:…'), a file of weights; True for timm's own of the backbone's name.

    Returns:
        How many tensors were loaded.

    Raises:
        ValueError: If the weights are of another model.
        RuntimeError: If they cannot be read or do not fit.
    """
    name, kwargs = _pretrained_model(backbone, source)
    try:
        net: Any = stvit.create_model(name, pretrained=True, in_chans=backbone.in_chans, **lists_to_tuples(kwargs))
    except Exception as error:  # the network, a file, a Hub's answer
        raise RuntimeError(
            f"pretrained_backbone={str(source)!r} could not be loaded into {backbone.name}: {error}"
        ) from error
    expected = timm.models.model_entrypoint(backbone.name.split(".")[0])
    found = timm.models.model_entrypoint(str(net.pretrained_cfg.get("architecture") or name.split(".")[0]))
    if found is not expected:
        raise ValueError(f"pretrained_backbone={str(source)!r} is a {found.__name__}, the backbone is {backbone.name}")
    prune(net, backbone.out_indices)
    weights, target = net.state_dict(), backbone.net.state_dict()
    unfit = [key for key, value in target.items() if key not in weights or weights[key].shape != value.shape]
    if unfit or not target:
        raise RuntimeError(
            f"pretrained_backbone={str(source)!r} does not fit {backbone.name}: of {len(target)} tensors "
            f"{len(unfit)} are missing or of another shape, {', '.join(unfit[:5])}"
        )
    backbone.net.load_state_dict({key: weights[key] for key in target})
    LOGGER.info(f"Loaded {len(target)}/{len(target)} tensors of the backbone {backbone.name} from {source}")
    return len(target)


def load_stock(model: BaseModel, source: str | Path | nn.Module, *, trust: bool = False) -> list[str]:
    """Loads Ultralytics' own YOLO26 weights into those layers of a detector that are Ultralytics' own.

    Args:
        model: The detector, made from one of our model files.
        source: 'yolo26s.pt', of the same scale, or the model itself.
        trust: Whether to open a file that holds more than a detector, which runs its code.

    Returns:
        Names of the tensors that were loaded.

    Raises:
        ValueError: If the scale or the generation differs, or nothing fits.
        RuntimeError: If they cannot be read.
    """
    weights = source if isinstance(source, nn.Module) else _load_detector(source, trust)
    configs = [getattr(m, "yaml", {}) for m in (model, weights)]
    if isinstance(weights.model[-1], Detect) and isinstance(model.model[-1], Detect):  # type: ignore[index]
        families = [(config.get("end2end"), config.get("reg_max")) for config in configs]
        if families[0] != families[1]:
            raise ValueError(f"stock_weights={_label(source)} is another generation of YOLO than the model")
    scales = [config.get("scale", "") for config in configs]
    if scales[0] != scales[1]:
        raise ValueError(f"stock_weights={_label(source)} is of scale {scales[1]!r}, the model of scale {scales[0]!r}")
    aligned = align(weights, model)
    # A YAML-built model has placeholders for names; with those of the weights none of its classes is moved.
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
            f"stock_weights={_label(source)}: none of its tensors fits the {len(of_stock)} of neck and head"
        )
    LOGGER.info(f"Loaded {len(loaded)}/{len(of_stock)} tensors of Ultralytics' own layers from {_label(source)}")
    return loaded


def _load_detector(source: str | Path, trust: bool) -> Any:
    if not isinstance(source, (str, Path)) or not str(source):
        raise ValueError(f"stock_weights must be a checkpoint of Ultralytics such as yolo26s.pt, got {source!r}")
    if str(source).startswith(PREFIXES):
        source = fetch_checkpoint(str(source))
    else:
        try:
            check_local(source, trust)
        except (OSError, RuntimeError, TypeError) as error:
            raise RuntimeError(f"stock_weights={_label(source)} could not be loaded: {error}") from error
    try:
        weights = load_checkpoint(source)[0]
    except Exception as error:  # a suffix, the network, a file of any kind
        raise RuntimeError(
            f"stock_weights={_label(source)} could not be loaded, it must be a checkpoint of Ultralytics such as "
            f"yolo26s.pt: {error}"
        ) from error
    if not isinstance(getattr(weights, "model", None), nn.Sequential):
        raise ValueError(f"stock_weights={_label(source)} is no YOLO26 but a {type(weights).__name__}")
    return weights


def align(weights: nn.Module, model: nn.Module) -> nn.Module:
    """A trained model with its layers where another has them, for `BaseModel.load`, which goes by names."""
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
    """Whether two layers are of a kind; heads of detection are, whatever else they give."""
    return type(layer) is type(target) or (isinstance(layer, Detect) and isinstance(target, Detect))


def transfer(weights: nn.Module, model: BaseModel, keys: list[str] | None = None) -> None:
    """Loads one detector's weights into another, built anew by a trainer for other classes or channels.

    Args:
        weights: The detector that has them.
        model: The new one.
        keys: Those tensors of `weights` that were loaded; the others are as random as the new model's, which stay for
            the sake of its seed. None if all count.

    Raises:
        RuntimeError: If the backbone is the same and not all of it arrives.
    """
    aligned = align(weights, model)
    if keys is not None:
        aligned, own, loaded = deepcopy(aligned), model.state_dict(), set(keys)
        for key, value in aligned.state_dict().items():
            if key not in loaded and key in own and own[key].shape == value.shape:
                value.copy_(own[key])
        layers: Any = aligned.model
        if not any(key.startswith(f"model.{len(layers) - 1}.") for key in keys):
            layers[-1] = nn.Identity()  # else a head for other classes is rebuilt at the width of one that is random
    if keys is None or keys:
        model.load(aligned, verbose=keys is None)  # of a part it would count the random ones in
    source, target = find_backbone(weights), find_backbone(model)
    if source is None or target is None or source.name != target.name or source.out_indices != target.out_indices:
        return
    _adapt_images(source, target)
    if keys is None or any(key.startswith("model.0.") for key in keys):
        _check_arrival(source, target)


def _adapt_images(source: TimmBackbone, target: TimmBackbone) -> None:
    """The first convolution for other channels, which Ultralytics leaves at random: as timm does it."""
    if source.in_chans == target.in_chans:
        return
    for name in _first_convs(target):
        weight = source.net.get_parameter(f"{name}.weight").detach()
        if source.in_chans == 3:
            adapted = adapt_input_conv(target.in_chans, weight)
        else:  # what it makes of a gray image, shared among the channels
            adapted = weight.sum(1, keepdim=True).repeat(1, target.in_chans, 1, 1) / target.in_chans
        target.net.get_parameter(f"{name}.weight").data.copy_(adapted)


def _check_arrival(source: TimmBackbone, target: TimmBackbone) -> None:
    first = {f"{name}.weight" for name in _first_convs(target)} if source.in_chans != target.in_chans else set()
    here, there = target.net.state_dict(), source.net.state_dict()
    lost = [
        key for key, value in here.items() if key not in first and not torch.equal(value.float(), there[key].float())
    ]
    if lost:
        raise RuntimeError(f"{len(lost)} of {len(here)} tensors of the backbone were lost on the way: {lost[:5]}")
    adapted = f", the first convolution adapted to {target.in_chans} channels" if first else ""
    LOGGER.info(f"Transferred {len(here)}/{len(here)} tensors of the backbone {target.name}{adapted}")


def _first_convs(backbone: TimmBackbone) -> list[str]:
    first = backbone.net.pretrained_cfg.get("first_conv") or ()
    return [first] if isinstance(first, str) else list(first)


def _stock_layers(model: nn.Module) -> list[int]:
    """For each layer the row of Ultralytics' file that it is, or -1; of a model that does not say, its own number."""
    layers: Any = getattr(model, "model", ())
    stock = getattr(model, "yaml", {}).get("stock_layers")
    if isinstance(stock, list) and len(stock) == len(layers):
        return stock
    return [-1 if isinstance(layer, TimmBackbone) else place for place, layer in enumerate(layers)]


def _pretrained_model(backbone: TimmBackbone, source: str | Path | bool) -> tuple[str, dict[str, Any]]:
    """What timm's create_model takes for a source of weights."""
    if source is True:
        return backbone.name, dict(backbone.model_args)
    if not isinstance(source, (str, Path)) or not str(source):
        raise ValueError(f"pretrained_backbone must be a timm tag, a Hub id, a file or True, got {source!r}")
    text = str(source)
    if text.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        return text, dict(backbone.model_args)
    path = Path(text).expanduser()
    if path.is_dir():
        return f"local-dir:{path}", dict(backbone.model_args)
    if path.is_file():
        num_classes = _classes_of(path, backbone)
        overlay = {"file": str(path), "num_classes": num_classes}
        return backbone.name, {**backbone.model_args, "num_classes": num_classes, "pretrained_cfg_overlay": overlay}
    if timm.is_model(text.split(".")[0]) and path.suffix.lower() not in _FILES:
        if text.split(".")[0] != backbone.name.split(".")[0]:
            raise ValueError(f"pretrained_backbone={text!r} is of another model than the backbone, {backbone.name}")
        return text, dict(backbone.model_args)
    if text.count("/") == 1 and not path.suffix:
        return f"hf-hub:{text}", dict(backbone.model_args)
    raise ValueError(
        f"pretrained_backbone={text!r} is no file and no timm model: pass a path, a tag of {backbone.name}, or "
        "hf-hub:org/name"
    )


def _classes_of(path: Path, backbone: TimmBackbone) -> int:
    """Classes of the classifier in a file of weights, or 0: told these, timm checks the file to the last key."""
    try:
        check_file(path)
        state_dict = load_state_dict(str(path))
    except Exception as error:  # a file of any kind
        what = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        raise RuntimeError(
            f"pretrained_backbone={str(path)!r} cannot be read as weights of a classifier ({what}); a detector's "
            "checkpoint is for YOLO(…) itself, or for pretrained="
        ) from error
    try:
        state_dict = strip_prefix_of(backbone.name, state_dict)[0]
    except ValueError as error:
        raise RuntimeError(f"pretrained_backbone={str(path)!r}: {error}") from error
    classifier = backbone.net.pretrained_cfg.get("classifier")
    names = [classifier] if isinstance(classifier, str) else list(classifier or ())
    for name in [*names, "head"]:  # the published code's name
        weight = state_dict.get(f"{name}.weight")
        if isinstance(weight, torch.Tensor):
            return int(weight.shape[0])
    return 0


def _label(source: str | Path | nn.Module) -> str:
    return type(source).__name__ if isinstance(source, nn.Module) else repr(str(source))

"""Size and latency of the adapters' models, for one image."""

import copy
import importlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from stvit.adapters.backbone import TimmBackboneMixin

from ..common.cli import CommandError, progress_bar, reason
from .config import DenseConfig
from .measure import require_device, significant, synchronize
from .models import parse_call

__all__ = ["benchmark", "create", "measure_size"]

# Classes of COCO, with the background, and of ADE20K.
_CLASSES = {"torchvision": 81, "segmentation": 150}


def benchmark(config: DenseConfig) -> Iterator[list[dict[str, Any]]]:
    """Yields one table with size and latency of the models.

    Weights and pixels are random.
    """
    device = require_device(config.device)
    height, width = config.img_size
    models = {spec: create(spec).eval() for spec in config.models}
    if height % 32 or width % 32:
        raise CommandError(f"--img-size must be multiples of 32, got {height} {width}")
    rows = {spec: {"model": spec, **measure_size(model, height, width)} for spec, model in models.items()}
    times: dict[str, list[tuple[float, float]]] = {spec: [] for spec in models}
    with progress_bar((config.repeats + 1) * len(models), "model", config.repeats > 0) as bar, torch.inference_mode():
        for repeat in range(config.repeats + 1 if config.repeats else 0):
            for spec, model in models.items():
                seconds = _time(model.to(device), _input(model, height, width, device), device)
                if repeat > 0:  # the first one fills caches
                    times[spec].append(seconds)
                bar.update()
    for spec, pairs in times.items():
        if pairs:
            totals = [total for total, _ in pairs]
            rows[spec] |= {
                "ms": round(1e3 * statistics.median(totals), 1),
                "ms_min": round(1e3 * min(totals), 1),
                "ms_max": round(1e3 * max(totals), 1),
                "ms_backbone": round(statistics.median(backbone / total for total, backbone in pairs), 3),
            }
        rows[spec]["repeats"] = config.repeats
    yield list(rows.values())


def create(spec: str) -> Any:
    """Returns a model of an adapter with random weights.

    Args:
        spec: Call of a function of the adapters, such as 'mask_rcnn(backbone="stvit_small")'. `num_classes` is that of
            COCO or ADE20K by default.

    Raises:
        CommandError: If the function or an argument does not exist, or a package is missing.
    """
    name, kwargs = parse_call(spec)
    try:
        for adapter, num_classes in _CLASSES.items():
            builders: Mapping[str, Callable[..., Any]] = importlib.import_module(f"stvit.adapters.{adapter}").BUILDERS
            if name in builders:
                if adapter == "torchvision":
                    # Detections of random weights have low scores. All are kept, so that the mask head has work.
                    kwargs = {"box_score_thresh" if "rcnn" in name else "score_thresh": 0.0, **kwargs}
                return builders[name](**{"num_classes": num_classes, **kwargs})
    except (ImportError, ValueError, TypeError) as error:
        raise CommandError(f"--models {spec!r}: {reason(error)}") from error
    raise CommandError(f"--models {spec!r}: unknown model {name!r}; pass a function of stvit.adapters.torchvision or "
                       "stvit.adapters.segmentation")  # fmt: skip


def measure_size(model: Any, height: int, width: int) -> dict[str, Any]:
    """Returns parameters and multiply-adds of a model in evaluation mode.

    The multiply-adds are for an image of a size in pixels.

    Multiply-adds are those of convolutions and matrix products. Papers call them FLOPs. Two-stage detectors are counted
    by the convention of Swin's tables: 1,000 boxes in each box head, 100 in the mask head.
    """
    parameters = sum(p.numel() for p in model.parameters())
    on_meta = copy.deepcopy(model).to("meta").eval()
    image = torch.empty(1, _channels(model), height, width, device="meta")
    gmac_backbone = _count(lambda: on_meta.net.forward_intermediates(image, intermediates_only=True, output_fmt="NCHW"))
    if hasattr(model, "transform"):
        from stvit.adapters.torchvision.complexity import count_macs

        gmac = count_macs(model, height, width).total / 1e9
    else:
        gmac = _count(lambda: on_meta(image))
    return {
        "height": height,
        "width": width,
        "params_m": round(parameters / 1e6, 2),
        "params_backbone": round(sum(p.numel() for p in model.net.parameters()) / parameters, 3),
        "gmac": significant(gmac),
        "backbone_gmac": significant(gmac_backbone),
    }


def _count(run: Callable[[], Any]) -> float:
    """Returns the multiply-adds of a function, in 1e9."""
    # The counter does not know the fused attention of the CPU.
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 2e9


def _channels(model: Any) -> int:
    return int(model.backbone.in_chans if hasattr(model, "transform") else model.in_chans)


def _input(model: Any, height: int, width: int, device: torch.device) -> Any:
    """Returns the input of a model: one random image of a size in pixels."""
    image = torch.rand(_channels(model), height, width, device=device)
    if not hasattr(model, "transform"):
        return image[None]
    model.transform.fixed_size = (width, height)  # a detector would resize the image
    return [image]


def _time(model: TimmBackboneMixin, images: Any, device: torch.device) -> tuple[float, float]:
    """Returns the seconds of a model and of its backbone."""
    spent = 0.0
    original = model.net.forward_intermediates

    def timed(*args: Any, **kwargs: Any) -> Any:
        nonlocal spent
        synchronize(device)
        start = time.perf_counter()
        maps = original(*args, **kwargs)
        synchronize(device)
        spent += time.perf_counter() - start
        return maps

    model.net.forward_intermediates = timed
    try:
        synchronize(device)
        start = time.perf_counter()
        model(images)  # type: ignore[operator]
        synchronize(device)
        return time.perf_counter() - start, spent
    finally:
        del model.net.forward_intermediates

"""Size and latency of detectors and segmentation models of the adapters, for one image."""

import importlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from stvit.adapters.backbone import TimmBackboneMixin

from ..common.cli import CommandError, progress_bar, reason
from .config import DenseConfig
from .measure import require_device, synchronize
from .models import parse_call

__all__ = ["benchmark", "create", "measure_size"]

# Classes of COCO with the background, and of ADE20K.
_CLASSES = {"torchvision": 91, "segmentation": 150}


def benchmark(config: DenseConfig) -> Iterator[list[dict[str, Any]]]:
    """Yields one table with size and latency of the models.

    Weights and pixels are random.
    """
    device = require_device(config.device)
    height, width = config.img_size
    models = {spec: create(spec).eval() for spec in config.models}
    rows = {spec: {"model": spec, **measure_size(model, height, width)} for spec, model in models.items()}
    times: dict[str, list[tuple[float, float]]] = {spec: [] for spec in models}
    image = torch.rand(3, height, width, device=device)
    with progress_bar((config.repeats + 1) * len(models), "model", config.repeats > 0) as bar, torch.inference_mode():
        for repeat in range(config.repeats + 1 if config.repeats else 0):
            for spec, model in models.items():
                seconds = _time(model.to(device), _as_input(model, image), device)
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
    """Returns parameters and multiply-adds of a model in evaluation mode, for an image of a size in pixels.

    Multiply-adds are those of convolutions and matrix products. Papers call them FLOPs. Detectors do not resize the
    image. The two-stage heads see as many proposals as are left after non-maximum suppression, up to 1,000, and the
    mask head up to 100 boxes.
    """
    image = torch.rand(3, height, width, generator=torch.Generator().manual_seed(0))
    _fix_size(model, height, width)
    counts = {}
    for part in ("gmac", "gmac_backbone"):
        counter = FlopCounterMode(display=False)
        # The counter does not know the fused attention of the CPU.
        with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH):
            if part == "gmac":
                with counter:
                    model(_as_input(model, image))
            else:
                with counter:
                    model.net.forward_intermediates(image[None], intermediates_only=True, output_fmt="NCHW")
        counts[part] = round(counter.get_total_flops() / 2e9, 1)
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "height": height,
        "width": width,
        "params_m": round(parameters / 1e6, 2),
        "params_backbone": round(sum(p.numel() for p in model.net.parameters()) / parameters, 3),
        **counts,
    }


def _fix_size(model: Any, height: int, width: int) -> None:
    """Lets a detector of torchvision keep the size of its images."""
    transform = getattr(model, "transform", None)
    if transform is not None:
        transform.fixed_size = (width, height)


def _as_input(model: nn.Module, image: torch.Tensor) -> Any:
    """Returns the input of a model for one image (3, H, W)."""
    return [image] if hasattr(model, "transform") else image[None]


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

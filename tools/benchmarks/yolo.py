"""Size and latency of YOLO26 detectors with STViT and stock backbones."""

import importlib.metadata
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..common.cli import CommandError, progress_bar, reason
from .config import DetectorConfig

__all__ = ["benchmark", "check_detector_size", "create_detector", "detection_loss"]


def benchmark(config: DetectorConfig) -> Iterator[list[dict[str, Any]]]:
    """Yields one table with size and latency of detectors.

    Weights and pixels are random: they do not change the time.
    """
    models = {name: _create(name) for name in config.models}
    ultralytics = importlib.metadata.version("ultralytics")
    check_detector_size(config.img_size)
    image = torch.rand(1, 3, config.img_size, config.img_size)
    rows: dict[str, dict[str, Any]] = {}
    for name, yolo in models.items():
        detector = yolo.model.eval()
        depth = len(detector.yaml["backbone"])
        parameters = [sum(p.numel() for p in layer.parameters()) for layer in detector.model]  # as trained, unfused
        yolo.fuse(verbose=False)
        flops = _count_flops(detector, image, len(detector.model))
        rows[name] = {
            "model": Path(name).stem,
            "backbone": getattr(detector.model[0], "name", "stock"),
            "img_size": config.img_size,
            "params_m": round(sum(parameters) / 1e6, 2),
            "params_backbone": round(sum(parameters[:depth]) / sum(parameters), 3),
            "gflops": round(flops / 1e9, 1),
            "gflops_backbone": round(_count_flops(detector, image, depth) / flops, 3),
        }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    with progress_bar((config.repeats + 1) * len(models), "model", True) as bar, torch.inference_mode():
        for repeat in range(config.repeats + 1):
            for name, yolo in models.items():
                measured = _time_layers(yolo.model, image, len(yolo.model.yaml["backbone"]))
                if repeat > 0:  # the first one fills caches
                    times[name].append(measured)
                bar.update()
    for name, pairs in times.items():
        totals = [total for total, _ in pairs]
        rows[name] |= {
            "ms": round(1e3 * statistics.median(totals), 1),
            "ms_min": round(1e3 * min(totals), 1),
            "ms_max": round(1e3 * max(totals), 1),
            "ms_backbone": round(statistics.median(backbone / total for total, backbone in pairs), 3),
            "repeats": config.repeats,
            "ultralytics": ultralytics,
        }
    yield list(rows.values())


def check_detector_size(img_size: int) -> None:
    """Checks that a detector accepts images of a size.

    Raises:
        CommandError: If the size is not a multiple of 32.
    """
    if img_size % 32:
        raise CommandError(f"--img-size must be a multiple of 32, got {img_size}")


def create_detector(name: str) -> nn.Module:
    """Returns the PyTorch module of a model file.

    Raises:
        CommandError: If the file does not exist, or Ultralytics is not installed.
    """
    yolo = _create(name)
    yolo.model.args = SimpleNamespace(**yolo.model.args)  # the loss expects the type that a trainer sets
    return yolo.model


def detection_loss(detector: Any, predictions: Any, images: torch.Tensor) -> torch.Tensor:
    """Returns the detector's own loss for eight fixed boxes in each image."""
    count = len(images)
    batch = {
        "img": images,
        "batch_idx": torch.arange(count, device=images.device).repeat_interleave(8),
        "cls": torch.zeros(8 * count, 1, device=images.device),
        "bboxes": torch.linspace(0.2, 0.5, 8 * count * 4, device=images.device).view(8 * count, 4),
    }
    loss, _ = detector.loss(batch, predictions)
    return loss.sum()


def _create(name: str) -> Any:
    try:
        from stvit.adapters.yolo import YOLO

        return YOLO(name)
    except (ImportError, ValueError, FileNotFoundError) as error:
        raise CommandError(reason(error)) from error


def _count_flops(detector: Any, image: torch.Tensor, depth: int) -> int:
    """Counts the floating-point operations of the detector's first layers."""
    counter = FlopCounterMode(display=False)
    hook = detector.model[depth - 1].register_forward_hook(lambda *_: counter.__exit__(None, None, None))
    # The counter does not know the fused attention of the CPU.
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH):
        counter.__enter__()
        detector(image)
    hook.remove()
    return int(counter.get_total_flops())


def _time_layers(detector: Any, image: torch.Tensor, depth: int) -> tuple[float, float]:
    """Returns the seconds of the detector and of its first layers."""
    ends = []
    hook = detector.model[depth - 1].register_forward_hook(lambda *_: ends.append(time.perf_counter()))
    start = time.perf_counter()
    detector(image)
    total = time.perf_counter() - start
    hook.remove()
    return total, ends[0] - start

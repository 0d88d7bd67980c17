"""Detects objects in a folder of images, and writes pictures and detections."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torchvision.transforms import v2

from stvit.images import convert_image

from ..common.cli import CommandError, progress_bar
from ..common.distributed import DTYPES, Distributed, autocast, check_dtype, join_processes
from ..common.image_files import ImageError, check_skipped, describe_skipped, find_images, open_image, result_names
from ..common.results import open_results
from .config import PredictionConfig
from .draw import draw_detections
from .inference import Detections, detect, to_device
from .source import OpenedDetector, open_detector
from .validation import write_detections

_DETECTIONS = "detections.json"


def predict(config: PredictionConfig) -> None:
    """Detects, draws and writes the results.

    Raises:
        CommandError: If a flag or the weights are wrong, or a file of the user would be overwritten. If images were
            skipped, after all others are done.
    """
    root, output = Path(config.images).expanduser(), Path(config.output).expanduser()
    images = find_images(root, output)
    names = result_names(root, images)
    ids = image_ids(images)
    written = [*(f"{name}.jpg" for name in names), _DETECTIONS]
    with join_processes(config.device.device, config.device.dist_backend) as distributed:
        if distributed.size > 1:
            raise CommandError("predict_det.py runs in one process; start it without torchrun")
        check_dtype(distributed.device, config.device.model_dtype)
        with open_results(output, written, root) as folder:
            detector = open_detector(config.source, config.device, distributed)
            if config.device.channels_last:
                detector.model.to(memory_format=torch.channels_last)
            results: list[dict[str, Any]] = []
            skipped: list[str] = []
            by_id = dict(zip(detector.category_ids, detector.label_names, strict=True))
            with progress_bar(len(images), "image", is_shown=len(images) > 1) as bar:
                for path, name, image_id in zip(images, names, ids, strict=True):
                    try:
                        image = open_image(path)
                    except ImageError as error:
                        skipped.append(describe_skipped(path, error))
                    else:
                        found = _detect_one(detector, image, image_id, config, distributed)
                        relative = path.relative_to(root if root.is_dir() else root.parent).as_posix()
                        results += [{"file_name": relative, **result} for result in found.to_coco()]
                        drawn = draw_detections(image, found, by_id)
                        folder.write(f"{name}.jpg", partial(drawn.save, format="JPEG", quality=92))
                    bar.update()
            folder.write(_DETECTIONS, partial(write_detections, results))
    done = len(images) - len(skipped)
    images_done = f"{done} image{'s' if done != 1 else ''}"
    print(f"{len(results)} detections in {images_done}; pictures and detections.json are in {output}")
    check_skipped(skipped, len(images))


def _detect_one(
    detector: OpenedDetector, image: Any, image_id: int, config: PredictionConfig, distributed: Distributed
) -> Detections:
    """Returns the detections in an image whose scores reach the threshold."""
    gray_or_color = convert_image(image, "L" if detector.in_chans == 1 else "RGB")
    pixels = [v2.functional.pil_to_tensor(gray_or_color)]
    moved = to_device(pixels, distributed.device, DTYPES[config.device.model_dtype])
    with autocast(config.device, distributed.device):
        (found,) = detect(detector.model, moved, [image_id], detector.category_ids)
    return found.select(found.scores >= config.score_thresh)


def image_ids(images: Sequence[Path]) -> list[int]:
    """Returns the id of each image.

    It is the name if all names are different numbers, as in COCO; else 1, 2, 3, …
    """
    stems = [path.stem for path in images]
    if all(stem.isascii() and stem.isdecimal() and len(stem) < 19 for stem in stems):
        numbers = [int(stem) for stem in stems]
        if len(set(numbers)) == len(numbers):
            return numbers
    return list(range(1, len(images) + 1))

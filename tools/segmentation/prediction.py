"""Predicts the label maps of image files."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torchvision.transforms.v2 import functional as VF

from stvit.images import convert_image

from ..common.cli import CommandError, progress_bar
from ..common.config import check_sides
from ..common.distributed import DTYPES, autocast, check_dtype, join_processes
from ..common.image_files import ImageError, check_skipped, describe_skipped, find_images, open_image, result_names
from ..common.results import ResultFolder, open_results
from .config import PredictionConfig, SourceConfig
from .draw import draw_overlay
from .inference import MULTI_SCALES, Predictor, Scaling
from .labels import save_values
from .model import open_model


def scaling_of(source: SourceConfig, model: Any, multi_scale: bool = False) -> Scaling:
    """Returns the sizes of the flags, or those that the model was trained for.

    Raises:
        CommandError: If the shorter side of the flags is larger than the longer side.
    """
    short_side, long_side = source.short_side or model.short_side, source.long_side or model.long_side
    if source.short_side is not None:
        check_sides("--short-side", short_side, "--long-side", long_side)
    return Scaling(short_side, long_side, MULTI_SCALES, flip=True) if multi_scale else Scaling(short_side, long_side)


def predict(config: PredictionConfig) -> None:
    """Writes a label map and a picture for each image.

    The unreadable images are named at the end.

    Raises:
        CommandError: If a flag is wrong, the model cannot be loaded, a file of the user would be overwritten, or an
            image cannot be read.
    """
    root, output = Path(config.images).expanduser(), Path(config.output).expanduser()
    images = find_images(root, output)
    names = result_names(root, images)
    written = [f"{folder}/{name}.png" for name in names for folder in ("labels", "overlays")]
    with join_processes(config.device.device, config.device.dist_backend) as distributed:
        if distributed.size > 1:
            raise CommandError("this command runs in one process; run it without torchrun")
        check_dtype(distributed.device, config.device.model_dtype)
        dtype = DTYPES[config.device.model_dtype]
        with open_results(output, written, root) as results:
            model = open_model(config.source.checkpoint).to(device=distributed.device, dtype=dtype)
            predictor = Predictor(
                model,
                distributed.device,
                dtype,
                scaling=scaling_of(config.source, model, config.source.multi_scale),
                context=partial(autocast, config.device, distributed.device),
                channels_last=config.device.channels_last,
            )
            errors: list[str] = []
            with progress_bar(len(images), "image", is_shown=len(images) > 1) as bar:
                for path, name in zip(images, names, strict=True):
                    try:
                        _predict_file(path, results, name, predictor, config.opacity)
                    except ImageError as error:
                        errors.append(describe_skipped(path, error))
                    bar.update()
    done = len(images) - len(errors)
    if done:
        print(f"wrote the label maps and pictures of {done} image{'s' if done > 1 else ''} to {output}")
    check_skipped(errors, len(images))


def _predict_file(path: Path, results: ResultFolder, name: str, predictor: Predictor, opacity: float) -> None:
    image, model = open_image(path), predictor.model
    seen = convert_image(image, "L") if model.in_chans == 1 else image
    classes = predictor.predict(VF.pil_to_tensor(seen)[None])[0].cpu().numpy()
    values = classes if model.category_ids is None else np.asarray(model.category_ids)[classes]
    overlay = draw_overlay(image, classes, model.label_names, model.num_classes, opacity)
    results.write(f"labels/{name}.png", partial(save_values, values))
    results.write(f"overlays/{name}.png", partial(overlay.save, format="PNG"))

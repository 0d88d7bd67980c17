"""The tasks of the page's buttons. They run in a computing process."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform

from stvit import visualize

from ..common.cli import CommandError
from ..common.data import resolve_data_config
from ..common.image_files import fit
from ..common.viewing import LoadedModel, explain_errors, stages_of

__all__ = ["classify", "compute_view", "describe", "detect"]

# Bytes of the super tokens that a session keeps. The models of this package need a few MB.
MAX_VIEW = 64 * 2**20


@torch.inference_mode()
def classify(loaded: LoadedModel, image: Image.Image) -> dict[str, float]:
    """Returns the five most likely classes and their probabilities.

    Raises:
        CommandError: If the model is not a classifier.
    """
    model = loaded.model
    if loaded.is_yolo:
        raise CommandError(f"{loaded.title} is a detector; choose a classifier, or open the tab Detect")
    if model.num_classes < 1:
        raise CommandError(f"{loaded.title} has no classes; choose another model")
    config = resolve_data_config({"in_chans": getattr(model, "in_chans", None)}, model, use_test_size=True)
    image = image.convert("L") if config["input_size"][0] == 1 else image
    with explain_errors():
        x = create_transform(**config)(image)[None]  # (1, C, H, W)
        probabilities = model(x).float().softmax(dim=1)[0]
    top, classes = probabilities.topk(min(5, len(probabilities)))
    names = [_class_name(model, int(i)) for i in classes]
    # Two classes may have the same name.
    names = [
        f"{name} ({i})" if names.count(name) > 1 else name for name, i in zip(names, classes.tolist(), strict=True)
    ]
    return dict(zip(names, top.tolist(), strict=True))


def _class_name(model: Any, index: int) -> str:
    names = model.pretrained_cfg.get("label_names")
    if names is not None and len(names) == model.num_classes:
        return str(names[index])
    if model.num_classes == 1000:
        return str(ImageNetInfo("imagenet-1k").index_to_description(index))
    return f"class {index}"


def detect(loaded: LoadedModel, image: Image.Image, confidence: float, img_size: int) -> tuple[Image.Image, str]:
    """Returns the image with the detections drawn on it, and a sentence about them.

    Args:
        loaded: Detector.
        image: Image to search.
        confidence: Smallest confidence of a detection, from 0 to 1.
        img_size: Longest side of the image in the detector, in pixels. It is rounded up to a multiple of 32.

    Raises:
        CommandError: If the model is not a detector.
    """
    if not loaded.is_yolo:
        raise CommandError(f"{loaded.title} is a classifier, which finds no boxes; choose a detector")
    with explain_errors():
        size = -(-img_size // 32) * 32
        (result,) = loaded.model.predict(image, conf=confidence, imgsz=size, verbose=False, save=False)
    found = result.verbose().strip(" ,")
    if result.boxes is not None and len(result.boxes) == 0:
        words = f"No detection with a confidence of {confidence:g} or more."
    else:  # results without boxes, such as depth maps, may have no words
        words = f"Found: {found}." if found else "The picture shows the result."
    return Image.fromarray(np.ascontiguousarray(result.plot()[..., ::-1])), words


def compute_view(loaded: LoadedModel, image: Image.Image, stage: int, img_size: int) -> visualize.SuperTokens:
    """Returns the super tokens of a stage.

    Args:
        loaded: Model with super tokens.
        image: Image to show to the model.
        stage: Number of the stage.
        img_size: Largest width and height in the model, in pixels. A larger image is reduced.

    Raises:
        CommandError: If the model has no such stage, or its super tokens need too much memory.
    """
    stages_of(loaded)
    with explain_errors():
        view = visualize.super_tokens(loaded.model, fit(image, img_size), stage)
    size = sum(array.nbytes for array in (view.association, view.tokens, view.features, view.queries, view.keys))
    if size > MAX_VIEW:
        raise CommandError(
            f"the super tokens of stage {stage} take {size // 2**20} MB, more than the {MAX_VIEW // 2**20} MB that "
            "this page keeps; choose another stage"
        )
    return view


def describe(view: visualize.SuperTokens, token: int) -> str:
    """Describes a super token in Markdown.

    Args:
        view: Super tokens of a stage.
        token: Number of the token.
    """
    row, column = divmod(token, view.grid[1])
    share = np.count_nonzero(view.assignment == token) / view.assignment.size
    return (
        f"**Token {token}**, row {row + 1}, column {column + 1} of {view.grid[0]}x{view.grid[1]}: {share:.1%} of the "
        f"pixels are assigned to this token. Its largest association with a pixel is "
        f"{view.association_map(token).max():.0%}. Its largest attention to a token is "
        f"{view.attention_map(token).max():.1%}."
    )

"""Writes a small dataset in the layout of ADE20K: real photographs with label maps of rectangles."""

from pathlib import Path

import numpy as np
from PIL import Image

from tests.conftest import BOXES

# Value 0 is not labeled, as in ADE20K.
BACKGROUND, PERSON, BUS = 1, 2, 3
CLASS_NAMES = ["background", "person", "bus"]


def write_labeled_photos(folder: Path, width: int = 128) -> Path:
    """Writes two photographs of Ultralytics and their mirror images, each as training and validation image.

    Args:
        folder: Folder to write.
        width: Width of the images in pixels.
    """
    from ultralytics.utils import ASSETS

    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (folder / kind / split).mkdir(parents=True, exist_ok=True)
        for name, boxes in BOXES.items():
            photo = Image.open(ASSETS / f"{name}.jpg").convert("RGB")
            photo = photo.resize((width, width * photo.height // photo.width))
            labels = draw_boxes(photo.size, boxes)
            for mirrored in (False, True):
                picture = photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else photo
                picture.save(folder / "images" / split / f"{name}_{int(mirrored)}.jpg")
                values = labels[:, ::-1] if mirrored else labels
                Image.fromarray(values.copy()).save(folder / "annotations" / split / f"{name}_{int(mirrored)}.png")
    (folder / "names.txt").write_text("\n".join(CLASS_NAMES))
    return folder


def draw_boxes(size: tuple[int, int], boxes: list[tuple[int, float, float, float, float]]) -> np.ndarray:
    """Returns a label map with a filled rectangle for each box, and an unlabeled line at the top."""
    width, height = size
    labels = np.full((height, width), BACKGROUND, np.uint8)
    for number, x, y, w, h in boxes:
        rows = slice(int((y - h / 2) * height), int((y + h / 2) * height))
        columns = slice(max(0, int((x - w / 2) * width)), int((x + w / 2) * width))
        labels[rows, columns] = PERSON if number == 0 else BUS
    labels[:2] = 0
    return labels

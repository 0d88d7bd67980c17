#!/usr/bin/env python3
"""Makes a detection data set: real handwritten digits on real photographs.

    python docs/make_digit_scenes.py OUTPUT
    stvit yolo detect train model=yolo26n-stvit.yaml data=OUTPUT/digits.yaml imgsz=160 fliplr=0
    stvit train-det --train-images OUTPUT/images/train --train-annotations OUTPUT/train.json …

2,000 training and 500 test images of 160x160 pixels show one to six digits each. The same seed, versions of the
packages and machine give the same files. It needs scikit-learn, scikit-image and ultralytics, and no network.

OUTPUT has Ultralytics' layout: images/{train,val}, labels/{train,val} and digits.yaml, in which val is the test set.
train.json and val.json have the same boxes in COCO's format. There, each image names its photograph, and each box its
number in `sklearn.datasets.load_digits`.

No digit and no photograph is in both splits. The digits come from 13 people, but the data do not say who wrote which.
Digits of one person seem to follow each other, so the last fifth of each class is for the test: probably few people
wrote digits of both splits. A digit appears about five times in its split, each time with another size, angle, color
and background. The photographs are few, nine and five, so the test says little about other backgrounds.
"""

import argparse
import importlib.util
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from stvit.images import open_image
from stvit.tools.common.cli import count, positive

IMG_SIZE = 160  # pixels
# Photographs in the installed packages. They must not show digits, as the license plate on Ultralytics' bus.jpg does.
PHOTOS: dict[str, dict[str, list[str]]] = {
    "train": {
        "sklearn": ["datasets/images/china.jpg"],
        "skimage": [
            f"data/{name}.png" for name in ("astronaut", "brick", "camera", "coffee", "coins", "gravel", "moon")
        ]
        + ["data/hubble_deep_field.jpg"],
    },
    "val": {
        "sklearn": ["datasets/images/flower.jpg"],
        "skimage": ["data/chelsea.png", "data/grass.png", "data/rocket.jpg"],
        "ultralytics": ["assets/zidane.jpg"],
    },
}
DISTRIBUTIONS = {"sklearn": "scikit-learn", "skimage": "scikit-image", "ultralytics": "ultralytics"}
LUMA = np.array([0.299, 0.587, 0.114])  # weights of red, green and blue
Box = tuple[int, int, int, int]  # left, top, right and bottom in pixels


@dataclass(frozen=True)
class Digit:
    """A digit in an image.

    Attributes:
        index: Number of the digit in `load_digits`.
        label: Class, 0 to 9.
        box: Smallest box that contains the ink.
    """

    index: int
    label: int
    box: Box


def main(argv: Sequence[str] | None = None) -> None:
    """Writes a data set."""
    parser = argparse.ArgumentParser(description="Makes a detection data set of digits on photographs.")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="new or empty folder")
    parser.add_argument("--train", type=positive, default=2000, metavar="N", help="training images (default: 2000)")
    parser.add_argument("--val", type=positive, default=500, metavar="N", help="test images (default: 500)")
    parser.add_argument("--seed", type=count, default=0, metavar="N", help="random seed (default: 0)")
    args = parser.parse_args(argv)
    try:
        write_scenes(args.output, {"train": args.train, "val": args.val}, args.seed)
    except (ValueError, ImportError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"wrote {args.train} training and {args.val} test images; the data file is {args.output / 'digits.yaml'}")


def write_scenes(output: Path, sizes: Mapping[str, int], seed: int = 0) -> None:
    """Writes the data set.

    Args:
        output: New or empty folder.
        sizes: Number of images of the splits "train" and "val".
        seed: Seed of all random numbers. An image depends on the seed, its split and its number only.

    Raises:
        ValueError: If the folder is not empty, or a split has no image.
        ImportError: If a package is missing.
        OSError: If the files cannot be written.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} is not an empty folder; choose a new one")
    if min(sizes.values()) < 1:
        raise ValueError(f"each split needs at least 1 image, got {dict(sizes)}")
    photos = {split: load_photos(split) for split in PHOTOS}
    pictures, labels = load_digits()
    for split, indices in split_digits(labels).items():
        for kind in ("images", "labels"):
            (output / kind / split).mkdir(parents=True)
        content: dict[str, list[dict[str, Any]]] = {
            "images": [],
            "annotations": [],
            "categories": [{"id": number, "name": str(number)} for number in range(10)],
        }
        for number in range(sizes[split]):
            rng = np.random.default_rng([seed, list(PHOTOS).index(split), number])
            photo = str(rng.choice(sorted(photos[split])))
            image = crop_photo(photos[split][photo], rng)
            digits = draw_digits(image, pictures, labels, indices, rng)
            name = f"{number:05d}"
            Image.fromarray(image.round().astype(np.uint8)).save(output / f"images/{split}/{name}.jpg", quality=90)
            lines = [_to_yolo(digit) + "\n" for digit in digits]
            (output / f"labels/{split}/{name}.txt").write_text("".join(lines), encoding="utf-8")
            size = {"height": IMG_SIZE, "width": IMG_SIZE}
            content["images"].append({"id": number, "file_name": f"{name}.jpg", "photo": photo, **size})
            for digit in digits:
                content["annotations"].append(_to_coco(digit, len(content["annotations"]) + 1, number))
        (output / f"{split}.json").write_text(json.dumps(content), encoding="utf-8")
    names = "".join(f'  {number}: "{number}"\n' for number in range(10))
    # Without the key `path`, Ultralytics looks beside this file, so the folder can be moved.
    (output / "digits.yaml").write_text(f"train: images/train\nval: images/val\nnames:\n{names}", encoding="utf-8")


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Returns scikit-learn's digits: ink (N, 8, 8) from 0 to 1, and classes (N,).

    Raises:
        ImportError: If scikit-learn is missing.
    """
    _find_package("sklearn")
    from sklearn import datasets

    digits = datasets.load_digits()
    return digits.images.astype(np.float32) / 16, digits.target


def split_digits(labels: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the numbers of the digits of each split.

    The last fifth of each class is for the test. A random choice would put digits of every person into both splits.

    Args:
        labels: Classes (N,).
    """
    is_test = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        numbers = np.flatnonzero(labels == label)
        is_test[numbers[-len(numbers) // 5 :]] = True
    return {"train": np.flatnonzero(~is_test), "val": np.flatnonzero(is_test)}


def load_photos(split: str) -> dict[str, Image.Image]:
    """Returns the photographs of a split by name.

    Raises:
        ImportError: If a package, or a photograph in it, is missing.
    """
    photos = {}
    for package, files in PHOTOS[split].items():
        folder = _find_package(package)
        for file in files:
            if not (folder / file).is_file():
                raise ImportError(
                    f"{DISTRIBUTIONS[package]} has no file {file}; install its newest release from the registry"
                )
            photos[Path(file).stem] = open_image(folder / file)
    return photos


def crop_photo(photo: Image.Image, rng: np.random.Generator) -> np.ndarray:
    """Cuts a random square of a photograph.

    The square has random size, place, brightness and contrast. Half of the squares are mirrored.

    Returns:
        Pixels (160, 160, 3) from 0 to 255.
    """
    side = int(math.exp(rng.uniform(math.log(IMG_SIZE), math.log(min(photo.size)))))
    left, top = (int(rng.integers(length - side + 1)) for length in photo.size)
    crop = photo.resize((IMG_SIZE, IMG_SIZE), Image.Resampling.LANCZOS, (left, top, left + side, top + side))
    pixels = np.asarray(crop, np.float32)[:, :: rng.choice([-1, 1])]
    return np.clip((pixels - 128) * rng.uniform(0.7, 1.1) + 128 + rng.uniform(-20, 20), 0, 255)


def draw_digits(
    image: np.ndarray, pictures: np.ndarray, labels: np.ndarray, indices: np.ndarray, rng: np.random.Generator
) -> list[Digit]:
    """Draws one to six digits into an image.

    Boxes overlap by at most a tenth of the smaller one. A digit that finds no place is left out.

    Args:
        image: Pixels (160, 160, 3) from 0 to 255, which are changed.
        pictures: Ink of all digits (N, 8, 8) from 0 to 1.
        labels: Classes (N,).
        indices: Numbers of the digits to choose from.
        rng: Source of the random numbers.
    """
    digits: list[Digit] = []
    # All classes are equally frequent, with any number of digits.
    for label in rng.integers(10, size=rng.integers(1, 7)):
        index = int(rng.choice(indices[labels[indices] == label]))
        ink = render_ink(pictures[index], size=math.exp(rng.uniform(math.log(20), math.log(64))), rng=rng)
        height, width = ink.shape
        for _ in range(20):
            left, top = int(rng.integers(IMG_SIZE - width + 1)), int(rng.integers(IMG_SIZE - height + 1))
            box = (left, top, left + width, top + height)
            if all(_overlap(box, other.box) <= 0.1 for other in digits):
                region = image[top : top + height, left : left + width]
                region += ink[..., None] * rng.uniform(0.85, 1) * (choose_color(region, ink, rng) - region)
                digits.append(Digit(index, int(label), box))
                break
    return digits


def render_ink(picture: np.ndarray, size: float, rng: np.random.Generator) -> np.ndarray:
    """Enlarges a digit and rotates it by up to 15 degrees.

    Args:
        picture: Ink (8, 8) from 0 to 1.
        size: Height and width of the enlarged picture, in pixels.
        rng: Source of the random numbers.

    Returns:
        Opacity (H, W) from 0 to 1, without an empty border.
    """
    padded = Image.fromarray(np.pad(picture, 2))
    side = round(size * 12 / 8)
    large = padded.resize((side, side), Image.Resampling.BICUBIC)
    large = large.rotate(rng.uniform(-15, 15), Image.Resampling.BICUBIC)
    # Edges of about two pixels at every size: the interpolation blurs those of large digits.
    ink = np.clip((np.asarray(large) - 0.45) * size / 10 + 0.5, 0, 1)
    ink[ink < 0.1] = 0
    rows, columns = (np.flatnonzero(ink.any(axis)) for axis in (1, 0))
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def choose_color(region: np.ndarray, ink: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Chooses a random color that is lighter or darker than the background.

    The difference is larger on a background of strong contrast.

    Args:
        region: Background (H, W, 3) from 0 to 255.
        ink: Opacity of the digit (H, W).
        rng: Source of the random numbers.

    Returns:
        Red, green and blue (3,) from 0 to 255.
    """
    luma = region @ LUMA
    mean, spread = float(np.average(luma, weights=ink)), float(luma.std())
    contrast = rng.uniform(45, 110) + 0.6 * spread
    targets = [mean + contrast, mean - contrast]
    possible = [target for target in targets if 10 <= target <= 245]
    target = rng.choice(possible) if possible else (10.0 if mean > 127 else 245.0)
    color = rng.uniform(0, 255, 3)
    # Black and white have every luma in between: move the color toward one of them until its luma is the target.
    luma_of_color = float(color @ LUMA)
    end, distance = (0.0, luma_of_color) if target < luma_of_color else (255.0, 255 - luma_of_color)
    return color + (end - color) * abs(target - luma_of_color) / distance


def _overlap(a: Box, b: Box) -> float:
    """Returns the common area of two boxes, divided by the area of the smaller one."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return max(0, width) * max(0, height) / smaller


def _to_yolo(digit: Digit) -> str:
    """Returns class, center and size of a digit, relative to the image."""
    left, top, right, bottom = digit.box
    values = ((left + right) / 2, (top + bottom) / 2, right - left, bottom - top)
    return " ".join([str(digit.label), *(f"{value / IMG_SIZE:.6f}" for value in values)])


def _to_coco(digit: Digit, number: int, image: int) -> dict[str, Any]:
    left, top, right, bottom = digit.box
    width, height = right - left, bottom - top
    return {
        "id": number,
        "image_id": image,
        "category_id": digit.label,
        "bbox": [left, top, width, height],
        "area": width * height,
        "iscrowd": 0,
        "digit": digit.index,
    }


def _find_package(name: str) -> Path:
    """Returns the folder of an installed package, without importing it.

    Raises:
        ImportError: If it is missing.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ImportError(
            f"{DISTRIBUTIONS[name]} is not installed; run: pip install {' '.join(DISTRIBUTIONS.values())}"
        )
    return Path(spec.origin).parent


if __name__ == "__main__":
    main()

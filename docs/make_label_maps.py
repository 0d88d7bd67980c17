#!/usr/bin/env python3
"""Makes segmentation datasets in ADE20K's layout of other annotations.

    python docs/make_label_maps.py coco instances.json images/ OUTPUT --classes 10
    pip download --no-deps icedata==0.0.3
    python docs/make_label_maps.py penn-fudan icedata-0.0.3-py3-none-any.whl OUTPUT

Training and validation images are the same: the datasets show that a model learns, not how accurate it is. Class 0 is
the background. COCO needs pycocotools.
"""

import argparse
import shutil
import zipfile
from collections import Counter
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

IGNORED = 255
PENN_FUDAN = "icedata/datasets/pennfudan/sample_data"


def main(argv: Sequence[str] | None = None) -> None:
    """Writes a dataset."""
    parser = argparse.ArgumentParser(description="Makes segmentation datasets in ADE20K's layout.")
    commands = parser.add_subparsers(dest="source", required=True)
    coco = commands.add_parser("coco", help="polygons and RLE of an instances JSON")
    coco.add_argument("annotations", type=Path)
    coco.add_argument("images", type=Path)
    coco.add_argument("output", type=Path)
    coco.add_argument("--classes", type=int, default=80, metavar="N", help="categories with the most pixels")
    penn_fudan = commands.add_parser("penn-fudan", help="five photographs with masks of pedestrians, from a wheel")
    penn_fudan.add_argument("wheel", type=Path)
    penn_fudan.add_argument("output", type=Path)
    args = parser.parse_args(argv)
    if args.source == "coco":
        convert_coco(args.annotations, args.images, args.output, args.classes)
    else:
        convert_penn_fudan(args.wheel, args.output)


def convert_coco(annotations: Path, images: Path, output: Path, num_classes: int) -> None:
    """Draws the objects of COCO as label maps.

    Small objects are in front of large ones. Crowds and categories that are left out are ignored.

    Args:
        annotations: Instances JSON.
        images: Folder of the images.
        output: Folder to write.
        num_classes: Number of categories, those with the most pixels.
    """
    from pycocotools.coco import COCO

    coco = COCO(str(annotations))
    pixels: Counter[int] = Counter()
    for item in coco.loadAnns(coco.getAnnIds(iscrowd=False)):
        pixels[item["category_id"]] += int(item["area"])
    chosen = sorted(category for category, _ in pixels.most_common(num_classes))
    numbers = {category: number for number, category in enumerate(chosen, start=1)}
    for image in coco.loadImgs(coco.getImgIds()):
        labels = np.zeros((image["height"], image["width"]), np.uint8)
        items = coco.loadAnns(coco.getAnnIds(imgIds=image["id"]))
        for item in sorted(items, key=lambda item: (not item["iscrowd"], -item["area"])):
            number = IGNORED if item["iscrowd"] else numbers.get(item["category_id"], IGNORED)
            labels[coco.annToMask(item).astype(bool)] = number
        _write(output, images / image["file_name"], labels)
    names = ["background", *(category["name"] for category in coco.loadCats(chosen))]
    (output / "class_names.txt").write_text("\n".join(names) + "\n")


def convert_penn_fudan(wheel: Path, output: Path) -> None:
    """Extracts the photographs and masks of Penn-Fudan from the wheel of icedata.

    Args:
        wheel: File of icedata 0.0.3.
        output: Folder to write.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith(f"{PENN_FUDAN}/PNGImages/")]
        for name in names:
            stem = Path(name).stem
            mask = Image.open(BytesIO(archive.read(f"{PENN_FUDAN}/PedMasks/{stem}_mask.png")))
            image = output / f"{stem}.png"
            output.mkdir(parents=True, exist_ok=True)
            image.write_bytes(archive.read(name))
            # Each pedestrian has a number of its own.
            _write(output, image, (np.asarray(mask) > 0).astype(np.uint8))
            image.unlink()
    (output / "class_names.txt").write_text("background\nperson\n")


def _write(output: Path, image: Path, labels: np.ndarray) -> None:
    """Writes an image and its label map as training and validation example."""
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (output / kind / split).mkdir(parents=True, exist_ok=True)
        shutil.copy(image, output / "images" / split)
        Image.fromarray(labels).save(output / "annotations" / split / f"{image.stem}.png")


if __name__ == "__main__":
    main()

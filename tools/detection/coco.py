"""Reads annotations in COCO's format, and checks them before anything is trained.

A file that contradicts itself is an error: missing or twice used ids, references to nothing, values of a wrong type,
masks of another size than their image. A single object that nothing can be learned from only leaves the training: a box
without area or outside its image, a mask that is no polygon. The message names the first such objects.

Memory: the objects are columns of numbers, about 0.6 GB for COCO's 118,287 training images. Worker processes that are
forked share them.

    N   objects of the file
    P   polygons of all objects; run lengths of a mask (RLE) count as one polygon
"""

import json
import math
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from faster_coco_eval.core import mask as mask_api
from torchvision import tv_tensors

from stvit.safe_text import clipped

from ..common.bad_images import MAX_PIXELS
from ..common.cli import CommandError, reason
from ..common.files import read_utf8

# COCO's own file has 0.45 GB, and takes 5 GB of memory while it is read.
MAX_BYTES = 4 << 30
MOST_NAMED = 3
# COCO's boxes and polygons exceed the images by fractions of a pixel.
TOLERANCE = 1.0


@dataclass(frozen=True, slots=True)
class CocoImage:
    """An image of an annotation file.

    Attributes:
        id: Id in the file.
        file_name: Path relative to the folder of the images.
        width: Width in pixels.
        height: Height in pixels.
    """

    id: int
    file_name: str
    width: int
    height: int


class Problems:
    """Problems of a file, counted by kind. The first few of each kind are named."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, list[str]]] = {}

    def __bool__(self) -> bool:
        return bool(self._found)

    def add(self, kind: str, where: str) -> None:
        """Counts a problem.

        Args:
            kind: What is wrong.
            where: The image or annotation, with its value.
        """
        number, examples = self._found.get(kind, (0, []))
        if number < MOST_NAMED:
            examples.append(where)
        self._found[kind] = number + 1, examples

    def describe(self) -> list[str]:
        """Returns a phrase for each kind: its number and the first examples."""
        return [
            f"{kind} ({number}): {', '.join(examples)}{', …' if number > len(examples) else ''}"
            for kind, (number, examples) in self._found.items()
        ]


class Coco:
    """Images, categories and objects of an annotation file.

    Category ids may have gaps. Label i + 1 of a model is `category_ids[i]`, and label 0 is the background.

    Attributes:
        path: The file.
        images: Images in the order of the file.
        category_ids: Category ids, sorted.
        names: Category names, in the order of `category_ids`.
        with_masks: Whether the masks of the objects were read.
        unusable: Phrases about objects that cannot be learned from.
        clipped: Phrases about boxes that exceed their images.
    """

    def __init__(self, path: Path, with_masks: bool = True) -> None:
        """Reads and checks a file.

        Args:
            path: JSON file with `images`, `annotations` and `categories`.
            with_masks: Whether to read the masks. Otherwise objects need only boxes.

        Raises:
            CommandError: If the file cannot be read, or contradicts itself.
        """
        self.path, self.with_masks = path, with_masks
        content = _read_json(path)
        errors, unusable, exceeding = Problems(), Problems(), Problems()
        self.images = list(_read_images(content["images"], errors))
        categories = sorted(_read_categories(content["categories"], errors), key=lambda category: category[0])
        self.category_ids = [number for number, _ in categories]
        self.names = [name for _, name in categories]
        self._columns = _Columns(self.images, self.category_ids, with_masks)
        self._columns.read(content["annotations"], errors, unusable, exceeding)
        if errors:
            raise CommandError(f"{path}: {'; '.join(errors.describe())}; correct the file")
        if not self.images:
            raise CommandError(f"{path} has no images")
        if not self.names:
            raise CommandError(f"{path} has no categories")
        self._columns.finish()
        self.unusable, self.clipped = unusable.describe(), exceeding.describe()

    @property
    def has_gaps(self) -> bool:
        """Returns whether the category ids are not 1, 2, 3, …"""
        return self.category_ids != list(range(1, len(self.category_ids) + 1))

    @property
    def has_masks(self) -> bool:
        """Returns whether any object has a mask that was read."""
        return self.with_masks and self._columns.any_mask()

    def usable(self, index: int) -> np.ndarray:
        """Returns the numbers of an image's objects to train on.

        Crowds and unusable objects are left out.
        """
        columns = self._columns
        numbers = columns.of_image(index)
        return numbers[columns.usable[numbers] & ~columns.crowds[numbers]]

    def count_objects(self) -> int:
        """Returns the number of objects that are no crowds."""
        return int((~self._columns.crowds).sum())

    def target(self, index: int) -> dict[str, Any]:
        """Returns the objects of an image to train on.

        Args:
            index: Number of the image, from 0.

        Returns:
            `image_id`, `boxes` (N, 4) as left, top, right and bottom in pixels, `labels` (N,), and with masks `masks`
            (N, H, W), 0 or 1.
        """
        image, columns = self.images[index], self._columns
        numbers = self.usable(index)
        boxes = torch.from_numpy(columns.boxes[numbers].astype(np.float32))
        boxes[:, 2:] += boxes[:, :2]
        size = (image.height, image.width)
        target: dict[str, Any] = {
            "image_id": image.id,
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
            "labels": torch.from_numpy(columns.labels[numbers].astype(np.int64)),
        }
        if self.with_masks:
            masks = torch.zeros((len(numbers), *size), dtype=torch.uint8)
            for mask, number in zip(masks, numbers, strict=True):
                mask.copy_(torch.from_numpy(mask_api.decode(columns.rle(number, *size))))
            target["masks"] = tv_tensors.Mask(masks)
        return target

    def ground_truth(self, indices: Sequence[int]) -> dict[str, Any]:
        """Returns the annotations of some images, as COCO's evaluation reads them.

        Crowds and unusable objects are included. A missing area is computed.
        """
        columns = self._columns
        annotations: list[dict[str, Any]] = []
        for index in indices:
            image = self.images[index]
            for number in columns.of_image(index):
                annotation = {
                    "id": len(annotations) + 1,  # 0 stands for no match in the evaluation
                    "image_id": image.id,
                    "category_id": self.category_ids[columns.labels[number] - 1],
                    "bbox": columns.boxes[number].tolist(),
                    "area": float(columns.areas[number]),
                    "iscrowd": int(columns.crowds[number]),
                }
                if self.with_masks:
                    annotation["segmentation"] = columns.rle(number, image.height, image.width)
                if math.isnan(annotation["area"]):
                    has_mask = self.with_masks and columns.has_mask(number)
                    width, height = annotation["bbox"][2:]
                    annotation["area"] = (
                        float(mask_api.area(annotation["segmentation"])) if has_mask else width * height
                    )
                annotations.append(annotation)
        return {
            "images": [
                {"id": image.id, "width": image.width, "height": image.height}
                for image in (self.images[index] for index in indices)
            ],
            "annotations": annotations,
            "categories": [
                {"id": number, "name": name} for number, name in zip(self.category_ids, self.names, strict=True)
            ],
        }

    def describe_objects(self, index: int) -> Iterator[tuple[str, int]]:
        """Yields box and label of each object of an image, for the data's fingerprint."""
        columns = self._columns
        for number in columns.of_image(index):
            box = " ".join(f"{value:g}" for value in columns.boxes[number])
            yield f"{box} {int(columns.crowds[number])}", int(columns.labels[number])

    def describe_shapes(self, index: int) -> Iterator[bytes]:
        """Yields areas and masks of the objects of an image, for the data's fingerprint."""
        columns = self._columns
        numbers = columns.of_image(index)
        yield columns.areas[numbers].tobytes()
        if self.with_masks:
            for number in numbers:
                yield from columns.shape_parts(number)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def _read_json(path: Path) -> dict[str, list[Any]]:
    try:
        content = json.loads(read_utf8(path, MAX_BYTES))
    except FileNotFoundError as error:
        raise CommandError(f"annotation file {path} does not exist") from error
    except json.JSONDecodeError as error:
        raise CommandError(f"{path} is not JSON: {reason(error)}; it must be an annotation file of COCO") from error
    except (OSError, ValueError) as error:
        raise CommandError(f"cannot read the annotation file {path}: {reason(error)}") from error
    except RecursionError as error:
        raise CommandError(f"{path} is nested too deeply; it must be an annotation file of COCO") from error
    except MemoryError as error:
        size = path.stat().st_size / 2**30
        raise CommandError(f"{path} with {size:.1f} GiB does not fit into memory; split it") from error
    wrong = None
    if not isinstance(content, dict):
        wrong = f"expected an object with images, annotations and categories, got {_kind(content)}"
    else:
        for key in ("images", "annotations", "categories"):
            if key not in content:
                wrong = f"{key} is missing"
            elif not isinstance(content[key], list):
                wrong = f"{key} must be a list, got {_kind(content[key])}"
            elif not all(isinstance(item, dict) for item in content[key]):
                wrong = f"each item of {key} must be an object"
            if wrong is not None:
                break
    if wrong is not None:
        raise CommandError(f"{path}: {wrong}; it must be an annotation file of COCO (instances)")
    return content


def _read_images(items: list[dict[str, Any]], errors: Problems) -> Iterator[CocoImage]:
    ids: set[int] = set()
    names: set[str] = set()
    for place, item in enumerate(items):
        where = f"image {item['id']}" if _is_id(item.get("id")) else f"images[{place}]"
        wrong = _find_wrong_types(item, {"id": _is_id, "file_name": _is_text, "width": _is_side, "height": _is_side})
        if wrong is not None:
            errors.add(*wrong, where)
            continue
        number, name = item["id"], item["file_name"]
        if number in ids:
            errors.add("image id used twice", str(number))
        elif name in names:
            errors.add("file name used twice", clipped(name))
        if not is_inside(name):
            errors.add("file name that leads out of the image folder", f"{where} ({clipped(name)})")
        if item["width"] * item["height"] > MAX_PIXELS:
            errors.add(
                f"image of more than {MAX_PIXELS / 1e6:.0f} million pixels",
                f"{where} ({item['width']}x{item['height']})",
            )
        ids.add(number)
        names.add(name)
        yield CocoImage(number, name, item["width"], item["height"])


def _read_categories(items: list[dict[str, Any]], errors: Problems) -> Iterator[tuple[int, str]]:
    ids: set[int] = set()
    for place, item in enumerate(items):
        wrong = _find_wrong_types(item, {"id": _is_category_id, "name": _is_text})
        if wrong is not None:
            errors.add(*wrong, f"category {item['id']}" if _is_id(item.get("id")) else f"categories[{place}]")
            continue
        if item["id"] in ids:
            errors.add("category id used twice", str(item["id"]))
        ids.add(item["id"])
        yield item["id"], item["name"]


def is_inside(name: str) -> bool:
    """Returns whether a path stays in the folder that it is joined to."""
    is_relative = not PurePath(name).anchor and "\0" not in name
    return is_relative and ".." not in re.split(r"[\\/]", name) and name not in ("", ".")


class _Columns:
    """The objects of a file as columns of numbers, sorted by image.

    Attributes:
        labels: Labels from 1, (N,).
        boxes: Left, top, width and height in pixels, (N, 4).
        areas: Areas in pixels, NaN if the file has none, (N,).
        crowds: Whether each object is a crowd, (N,).
        usable: Whether each object can be learned from, (N,).
    """

    def __init__(self, images: Sequence[CocoImage], category_ids: Sequence[int], with_masks: bool) -> None:
        self._images, self._with_masks = images, with_masks
        self._image_index = {image.id: index for index, image in enumerate(images)}
        self._labels = {number: label for label, number in enumerate(category_ids, start=1)}
        # Python's arrays, because their length is not known before.
        self._image, self._label, self._flags = array("q"), array("i"), array("b")
        self._box, self._area = array("d"), array("d")
        # Numbers of the polygons, their ends, and the end of each object's polygons. Run lengths are exact as float64.
        self._numbers, self._polygon_ends, self._object_ends, self._is_rle = (
            array("d"),
            array("q"),
            array("q"),
            array("b"),
        )

    def read(self, items: list[dict[str, Any]], errors: Problems, unusable: Problems, exceeding: Problems) -> None:
        """Reads the annotations of a file.

        Args:
            items: The annotations.
            errors: Receives annotations that contradict the file.
            unusable: Receives objects that cannot be learned from.
            exceeding: Receives boxes that exceed their images.
        """
        ids: set[int] = set()
        types = {"id": _is_id, "image_id": _is_id, "category_id": _is_id, "bbox": _is_box}
        for place, item in enumerate(items):
            number: Any = item.get("id")
            where = f"annotation {number}" if _is_id(number) else f"annotations[{place}]"
            wrong = _find_wrong_types(item, types)
            if wrong is not None:
                errors.add(*wrong, where)
                continue
            if number in ids:
                errors.add("annotation id used twice", str(number))
            ids.add(number)
            index = self._image_index.get(item["image_id"])
            label = self._labels.get(item["category_id"])
            crowd, area = item.get("iscrowd", 0), item.get("area", math.nan)
            if index is None:
                errors.add("unknown image_id", f"{where} ({item['image_id']})")
            if label is None:
                errors.add("unknown category_id", f"{where} ({item['category_id']})")
            if crowd not in (0, 1) or isinstance(crowd, float):
                errors.add("iscrowd must be 0 or 1", where)
                continue
            if area is None:
                area = math.nan
            elif "area" in item and not _is_number(area):
                errors.add("area must be a number", where)
                continue
            if index is None or label is None:
                continue
            image = self._images[index]
            box = [float(value) for value in item["bbox"]]
            problem = _find_box_problem(box, image)
            shape_problem = (
                self._read_shape(item.get("segmentation"), image, where, errors) if self._with_masks else None
            )
            if problem is not None:
                unusable.add(problem, f"{where} of image {image.id} ({_format(box)})")
            elif shape_problem is not None:
                unusable.add(shape_problem, f"{where} of image {image.id}")
            if problem is None and _exceeds(box, image):
                exceeding.add("box partly outside the image", f"{where} of image {image.id} ({_format(box)})")
            self._image.append(index)
            self._label.append(label)
            self._box.extend(box)
            self._area.append(float(area))
            self._flags.append(bool(crowd) | 2 * (problem is None and shape_problem is None))

    def _read_shape(self, shape: Any, image: CocoImage, where: str, errors: Problems) -> str | None:
        """Reads polygons or run lengths of one object.

        Returns why they are unusable, or None.
        """
        problem = None
        if isinstance(shape, dict):
            counts, problem = _read_rle(shape, image, where, errors)
            if counts is not None:
                self._add_numbers(counts)
        elif isinstance(shape, list):
            read = [_read_polygon(polygon, image) for polygon in shape]
            for polygon in read:
                if polygon is not None:
                    self._add_numbers(polygon)
            if not shape:
                problem = "object without a mask"
            elif None in [None if polygon is None else 0 for polygon in read]:
                problem = "malformed polygon (it needs three or more points, as x and y in pixels of the image)"
                if any(polygon is not None for polygon in read):
                    problem = None  # the other polygons show the object
        elif shape is None:
            problem = "object without a mask"
        else:
            errors.add("segmentation must be a list of polygons or an RLE", where)
        self._object_ends.append(len(self._polygon_ends))
        self._is_rle.append(isinstance(shape, dict))
        return problem

    def _add_numbers(self, values: np.ndarray) -> None:
        self._numbers.frombytes(values.astype(np.float64).tobytes())
        self._polygon_ends.append(len(self._numbers))

    def finish(self) -> None:
        """Sorts the objects by image."""
        images = np.array(self._image, dtype=np.int64)
        order = np.argsort(images, kind="stable")
        flags = np.array(self._flags, dtype=np.int8)[order]
        self._starts = np.searchsorted(images[order], np.arange(len(self._images) + 1))
        self.labels = np.array(self._label, dtype=np.int32)[order]
        self.boxes = np.array(self._box, dtype=np.float64).reshape(-1, 4)[order]
        self.areas = np.array(self._area, dtype=np.float64)[order]
        self.crowds, self.usable = (flags & 1).astype(bool), (flags & 2).astype(bool)
        if self._with_masks:
            # Only places in the long columns are sorted, not the columns.
            ends = np.array(self._object_ends, dtype=np.int64)
            self._first_polygon, self._last_polygon = np.concatenate([[0], ends[:-1]])[: len(ends)][order], ends[order]
            self._polygon_bounds = np.concatenate([[0], np.array(self._polygon_ends, dtype=np.int64)])
            self._values = np.frombuffer(self._numbers, dtype=np.float64)
            self._rle = np.array(self._is_rle, dtype=bool)[order]
        del self._image, self._label, self._flags, self._box, self._area, self._numbers, self._polygon_ends
        del self._object_ends, self._is_rle, self._image_index

    def of_image(self, index: int) -> np.ndarray:
        """Returns the numbers of an image's objects."""
        return np.arange(self._starts[index], self._starts[index + 1])

    def any_mask(self) -> bool:
        """Returns whether any object has polygons or run lengths."""
        return bool((self._last_polygon > self._first_polygon).any())

    def has_mask(self, number: int) -> bool:
        """Returns whether an object has polygons or run lengths."""
        return bool(self._last_polygon[number] > self._first_polygon[number])

    def shape_parts(self, number: int) -> Iterator[bytes]:
        """Yields the polygons or run lengths of an object, each after its length."""
        for place in range(self._first_polygon[number], self._last_polygon[number]):
            values = self._values[self._polygon_bounds[place] : self._polygon_bounds[place + 1]]
            yield f"{'rle' if self._rle[number] else 'polygon'} {len(values)}\n".encode()
            yield values.tobytes()

    def rle(self, number: int, height: int, width: int) -> dict[str, Any]:
        """Returns the mask of an object as compressed RLE.

        It is empty if the object has none.
        """
        places = range(self._first_polygon[number], self._last_polygon[number])
        parts = [self._values[self._polygon_bounds[i] : self._polygon_bounds[i + 1]] for i in places]
        if self._rle[number] or not parts:
            counts = parts[0].astype(np.int64).tolist() if parts else [height * width]
            rle: dict[str, Any] = mask_api.frPyObjects({"size": [height, width], "counts": counts}, height, width)
            return rle
        merged: dict[str, Any] = mask_api.merge(mask_api.frPyObjects([p.tolist() for p in parts], height, width))
        return merged


def _find_box_problem(box: Sequence[float], image: CocoImage) -> str | None:
    left, top, width, height = box
    if width <= 0 or height <= 0:
        return "box without area"
    if left >= image.width or top >= image.height or left + width <= 0 or top + height <= 0:
        return "box outside the image"
    return None


def _exceeds(box: Sequence[float], image: CocoImage) -> bool:
    """Returns whether a box exceeds its image by more than the tolerance.

    The box is (left, top, width, height).
    """
    left, top, width, height = box
    return (
        min(left, top) < -TOLERANCE or left + width > image.width + TOLERANCE or top + height > image.height + TOLERANCE
    )


def _read_polygon(polygon: Any, image: CocoImage) -> np.ndarray | None:
    """Returns x and y of the points, in turn; None if they are no polygon."""
    try:
        values = np.asarray(polygon)
    except ValueError:  # lists of different lengths
        return None
    if values.ndim != 1 or values.dtype.kind not in "iuf" or values.size < 6 or values.size % 2:
        return None
    # The rasterizer takes memory in proportion to the coordinates.
    longest = max(image.width, image.height)
    if not np.isfinite(values).all() or values.min() < -longest or values.max() > 2 * longest:
        return None
    return values


def _read_rle(
    shape: dict[str, Any], image: CocoImage, where: str, errors: Problems
) -> tuple[np.ndarray | None, str | None]:
    """Returns the run lengths of a mask, and why it is unusable."""
    size, counts = shape.get("size"), shape.get("counts")
    if not isinstance(size, list) or not isinstance(counts, list | str):
        errors.add("an RLE needs size [height, width] and counts", where)
        return None, None
    if size != [image.height, image.width]:
        wanted = f"[{image.height}, {image.width}]"
        errors.add("mask of another size than its image", f"{where} of image {image.id} ({size}, expected {wanted})")
        return None, None
    lengths = decode_counts(counts) if isinstance(counts, str) else np.asarray(counts if _is_counts(counts) else [])
    if lengths is None or lengths.dtype.kind not in "iu" or lengths.min(initial=0) < 0:
        return None, "damaged RLE"
    if lengths.sum() != image.height * image.width:
        return None, "damaged RLE (its run lengths do not sum up to the pixels of the image)"
    return lengths, None


def decode_counts(text: str) -> np.ndarray | None:
    """Returns the run lengths of a compressed RLE; None if it is damaged.

    Each length is written as groups of five bits, least significant first; bit 5 says that another group follows. From
    the fourth on, a length is stored as its difference to the length two places before.
    """
    try:
        groups = np.frombuffer(text.encode("ascii"), dtype=np.uint8).astype(np.int64) - 48
    except UnicodeEncodeError:
        return None
    if groups.size == 0 or groups.min() < 0 or groups.max() > 63 or groups[-1] & 32:
        return None
    ends = np.flatnonzero(groups & 32 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    sizes = ends - starts + 1
    if sizes.max() > 7:  # more than 32 bits
        return None
    places = np.arange(groups.size) - np.repeat(starts, sizes)
    values = np.add.reduceat((groups & 31) << (5 * places), starts)
    values -= np.where(groups[ends] & 16, 1 << (5 * sizes), 0)
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values


# ---------------------------------------------------------------------------------------------------------------------
# Types


def _find_wrong_types(item: dict[str, Any], types: dict[str, Any]) -> tuple[str] | None:
    """Returns the first missing or wrong value of an item, as the kind of a problem."""
    for key, is_right in types.items():
        if key not in item:
            return (f"{key} is missing",)
        if not is_right(item[key]):
            return (f"{key} must be {_EXPECTED[is_right]}",)
    return None


def _is_id(value: Any) -> bool:
    return type(value) is int and -(2**63) <= value < 2**63


def _is_category_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_side(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


def _is_text(value: Any) -> bool:
    if not isinstance(value, str) or not value:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which no file name or result file can contain
        return False
    return True


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e15  # NaN compares as false


def _is_box(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(map(_is_number, value))


def _is_counts(values: list[Any]) -> bool:
    return bool(values) and all(type(value) is int and 0 <= value < 2**31 for value in values)


_EXPECTED = {
    _is_id: "a whole number",
    _is_category_id: "a whole number of at least 0",
    _is_side: "a whole number above 0",
    _is_text: "text",
    _is_box: "four numbers (left, top, width, height)",
}


def _kind(value: Any) -> str:
    names: dict[type, str] = {dict: "an object", list: "a list", str: "text"}
    return names.get(type(value), type(value).__name__)


def _format(box: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in box)

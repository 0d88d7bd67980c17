"""COCO's metrics of boxes and masks, of all classes and of each class."""

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from faster_coco_eval import COCO
from faster_coco_eval.core.faster_eval_api import COCOeval_faster

from ..common.cli import CommandError
from ..common.distributed import Distributed
from .coco import Coco
from .inference import Detections

# COCO's twelve: average precision (of IoU 0.5 to 0.95, 0.5, 0.75; of small, medium and large objects), and average
# recall (of 1, 10 and 100 detections of an image; of small, medium and large objects).
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


@dataclass(frozen=True)
class ClassScores:
    """Metrics of a class, in percent; NaN if the images have no object of the class.

    Attributes:
        name: Name of the class.
        category_id: Id of the class in the annotation file.
        objects: Number of objects, without crowds.
        scores: `box_AP`, `box_AP50`, `box_AP75`, and with masks the same of the masks.
    """

    name: str
    category_id: int
    objects: int
    scores: dict[str, float]


@dataclass(frozen=True)
class Scores:
    """Metrics of a model on a set of images.

    Attributes:
        images: Number of images that were read.
        objects: Number of their objects, without crowds.
        values: The twelve metrics in percent, as `box_AP`, …, and with masks `mask_AP`, …; NaN if the images have no
            object that counts.
        classes: Metrics of each class.
    """

    images: int
    objects: int
    values: dict[str, float]
    classes: list[ClassScores]


def gather_detections(found: Sequence[Detections], distributed: Distributed) -> list[Detections]:
    """Returns the detections of all processes, once per image, sorted by image id.

    Every process must call this.

    Raises:
        CommandError: If no process could read an image.
    """
    by_image = {one.image_id: one for part in distributed.gather(list(found)) for one in part}
    if not by_image:
        raise CommandError("no readable image in the validation set; check --val-images")
    return [by_image[image_id] for image_id in sorted(by_image)]


def compute_scores(coco: Coco, found: Sequence[Detections], with_masks: bool) -> Scores:
    """Returns the metrics of detections.

    Args:
        coco: Annotations of the images.
        found: Detections of each image that was read. Other images do not count.
        with_masks: Whether to also evaluate masks.
    """
    index = {image.id: i for i, image in enumerate(coco.images)}
    truth = coco.ground_truth([index[one.image_id] for one in found])
    counts = dict.fromkeys(coco.category_ids, 0)
    for annotation in truth["annotations"]:
        counts[annotation["category_id"]] += not annotation["iscrowd"]
    results = [result for one in found for result in one.to_coco()]
    values: dict[str, float] = {}
    by_class: dict[int, dict[str, float]] = {number: {} for number in coco.category_ids}
    for kind, iou in (("box", "bbox"), ("mask", "segm"))[: 1 + with_masks]:
        evaluated = _run(truth, results, iou)
        values |= {f"{kind}_{name}": _percent(v) for name, v in zip(METRICS, evaluated.stats[:12], strict=True)}
        # Precision by IoU threshold, recall, class, area and number of detections: all areas, 100 detections.
        precision = evaluated.eval["precision"][:, :, :, 0, -1]
        for place, number in enumerate(evaluated.params.catIds):
            for name, threshold in (("AP", slice(None)), ("AP50", slice(0, 1)), ("AP75", slice(5, 6))):
                known = precision[threshold, :, place]
                known = known[known > -1]
                by_class[int(number)][f"{kind}_{name}"] = _percent(known.mean() if known.size else -1.0)
    classes = [
        ClassScores(name, number, counts[number], by_class[number])
        for name, number in zip(coco.names, coco.category_ids, strict=True)
    ]
    return Scores(len(found), sum(counts.values()), values, classes)


def _run(truth: dict[str, Any], results: Iterable[dict[str, Any]], iou: str) -> COCOeval_faster:
    """Evaluates boxes (`bbox`) or masks (`segm`)."""
    # With a box, the evaluation of masks would take the area of the box to tell small from large detections.
    unused = "bbox" if iou == "segm" else "segmentation"
    own = [{key: value for key, value in result.items() if key != unused} for result in results]
    # The evaluation writes to the annotations.
    annotations = [dict(annotation) for annotation in truth["annotations"]]
    ground = COCO({**truth, "annotations": annotations})
    logging.getLogger("faster_coco_eval").setLevel(logging.WARNING)
    evaluation = COCOeval_faster(ground, ground.loadRes(own), iou)
    evaluation.run()
    return evaluation


def _percent(value: float) -> float:
    """Returns a score in percent; NaN for COCO's -1, which stands for no object."""
    return math.nan if value < 0 else 100 * float(np.float64(value))

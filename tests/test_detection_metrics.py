"""Compares COCO's metrics with pycocotools, on recorded detections."""

import contextlib
import copy
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faster_coco_eval.core import mask as mask_api
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn
from torchvision.models import mobilenet_v3_small
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

from stvit.tools.common.cli import CommandError
from stvit.tools.common.distributed import Distributed
from stvit.tools.detection import inference
from stvit.tools.detection.coco import Coco
from stvit.tools.detection.inference import Detections, detect
from stvit.tools.detection.metrics import METRICS, compute_scores, gather_detections

ONE = Distributed(torch.device("cpu"))


@pytest.fixture(scope="module")
def recorded(coco_photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Detections]]:
    """Annotations of 24 images with small to large objects, and imperfect detections of them.

    The images are those of `coco_photos` in several sizes. Objects are moved, missed, found twice and mistaken for
    another class, and some scores are equal.
    """
    random = np.random.default_rng(0)
    content = json.loads((coco_photos / "instances.json").read_text(encoding="utf-8"))
    content["categories"].append({"id": 40, "name": "tie"})  # without objects
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for scale in (0.5, 1, 2, 3, 4, 6):
        for image in content["images"]:
            number = len(images) + 1
            size = {key: int(image[key] * scale) for key in ("width", "height")}
            images.append({"id": number, "file_name": f"{number}.jpg", **size})
            for old in content["annotations"]:
                if old["image_id"] != image["id"]:
                    continue
                box = [value * scale for value in old["bbox"]]
                left, top, width, height = box
                polygon = [left, top, left + width, top + height / 5, left + width, top + height, left, top + height]
                annotations.append(
                    {**old, "id": len(annotations) + 1, "image_id": number, "bbox": box, "segmentation": [polygon],
                     "area": width * height * 0.9}
                )  # fmt: skip
    path = tmp_path_factory.mktemp("recorded") / "instances.json"
    path.write_text(json.dumps({**content, "images": images, "annotations": annotations}), encoding="utf-8")
    coco = Coco(path)
    found = []
    for index, one in enumerate(coco.images):
        rows: list[tuple[list[float], float, int, str]] = []
        for annotation in coco.ground_truth([index])["annotations"]:
            mask = mask_api.decode(annotation["segmentation"])
            for _ in range(random.integers(0, 3)):
                left, top, width, height = annotation["bbox"]
                moved = random.normal(0, 0.06, 4) * [width, height, width, height]
                box = [left + moved[0], top + moved[1], left + width + moved[2], top + height + moved[3]]
                shift = [int(value) for value in random.integers(-2, 3, 2)]
                rle = mask_api.encode(np.asfortranarray(np.roll(mask, shift, (0, 1))))
                category = annotation["category_id"] if random.random() < 0.8 else int(random.choice([3, 7, 40]))
                counts = rle["counts"]
                text = counts.decode() if isinstance(counts, bytes) else counts
                rows.append((box, round(float(random.random()), 1), category, text))
        boxes, scores, categories, masks = zip(*rows, strict=True) if rows else ((), (), (), ())
        found.append(
            Detections(
                one.id,
                (one.height, one.width),
                np.array(boxes, dtype=np.float32).reshape(-1, 4),
                np.array(scores, dtype=np.float32),
                np.array(categories, dtype=np.int64),
                list(masks),
            )
        )
    return path, found


def by_pycocotools(path: Path, results: list[dict[str, Any]], iou: str, images: Sequence[int] | None = None) -> Any:
    """Returns the evaluation of pycocotools."""
    unused = "bbox" if iou == "segm" else "segmentation"
    own = [{key: copy.deepcopy(value) for key, value in r.items() if key != unused} for r in results]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
        evaluation = COCOeval(truth, truth.loadRes(own), iou)
        if images is not None:
            evaluation.params.imgIds = list(images)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def percent(values: Sequence[float]) -> list[float]:
    return [math.nan if value < 0 else 100 * value for value in values]


def test_equal_to_pycocotools(recorded: tuple[Path, list[Detections]]) -> None:
    """All twelve metrics of boxes and masks, and those of each class."""
    path, found = recorded
    scores = compute_scores(Coco(path), found, with_masks=True)
    results = [result for one in found for result in one.to_coco()]
    assert scores.images == 24 and scores.objects == 66
    for kind, iou in (("box", "bbox"), ("mask", "segm")):
        theirs = by_pycocotools(path, results, iou)
        ours = [scores.values[f"{kind}_{name}"] for name in METRICS]
        np.testing.assert_allclose(ours, percent(theirs.stats), rtol=0, atol=1e-12)
        assert len({round(value, 6) for value in ours}) >= 10  # the metrics differ
        precision = theirs.eval["precision"][:, :, :, 0, -1]
        for place, one in enumerate(scores.classes[:2]):
            wanted = [precision[:, :, place].mean(), precision[0, :, place].mean(), precision[5, :, place].mean()]
            ours = [one.scores[f"{kind}_{name}"] for name in METRICS[:3]]
            np.testing.assert_allclose(ours, percent(wanted), rtol=0, atol=1e-12)
    assert [(one.name, one.category_id, one.objects) for one in scores.classes] == [
        ("person", 3, 54),
        ("bus", 7, 12),
        ("tie", 40, 0),
    ]
    assert all(math.isnan(value) for value in scores.classes[2].scores.values())


def test_areas_of_masks_are_not_those_of_boxes(recorded: tuple[Path, list[Detections]]) -> None:
    """If results had boxes, pycocotools would sort detected masks into small and large ones by the areas of boxes."""
    path, found = recorded
    scores = compute_scores(Coco(path), found, with_masks=True)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
        with_boxes = COCOeval(truth, truth.loadRes([r for one in found for r in one.to_coco()]), "segm")
        with_boxes.evaluate()
        with_boxes.accumulate()
        with_boxes.summarize()
    ours, theirs = [scores.values[f"mask_{name}"] for name in METRICS], percent(with_boxes.stats)
    assert ours[:3] == pytest.approx(theirs[:3])
    assert ours[3:6] != pytest.approx(theirs[3:6], abs=0.1)


def test_images_that_could_not_be_read_do_not_count(recorded: tuple[Path, list[Detections]]) -> None:
    path, found = recorded
    read = found[5:20]
    scores = compute_scores(Coco(path), read, with_masks=False)
    theirs = by_pycocotools(path, [r for one in read for r in one.to_coco()], "bbox", [one.image_id for one in read])
    np.testing.assert_allclose(list(scores.values.values()), percent(theirs.stats), rtol=0, atol=1e-12)
    assert scores.images == 15 and set(scores.values) == {f"box_{name}" for name in METRICS}


def test_no_detections(recorded: tuple[Path, list[Detections]]) -> None:
    path, found = recorded
    nothing = [one.select(np.zeros(len(one.scores), dtype=bool)) for one in found]
    scores = compute_scores(Coco(path), nothing, with_masks=True)
    assert set(scores.values.values()) == {0.0}


def test_metrics_without_objects_are_nan(coco_photos: Path) -> None:
    """No object of the photographs is smaller than 32x32 pixels, or larger than 96x96."""
    coco = Coco(coco_photos / "instances.json")
    found = [Detections(image.id, (image.height, image.width), np.zeros((0, 4), np.float32), np.zeros(0, np.float32),
                        np.zeros(0, np.int64), []) for image in coco.images]  # fmt: skip
    scores = compute_scores(coco, found, with_masks=True)
    assert math.isnan(scores.values["box_APl"]) and math.isnan(scores.values["mask_ARl"])
    assert scores.values["box_APm"] == 0.0


def test_gathered_once_for_each_image(recorded: tuple[Path, list[Detections]]) -> None:
    _, found = recorded
    gathered = gather_detections([*found[::2], *found[1::2], found[3]], ONE)
    assert [one.image_id for one in gathered] == list(range(1, 25))
    with pytest.raises(CommandError, match="no readable image in the validation set"):
        gather_detections([], ONE)


# ---------------------------------------------------------------------------------------------------------------------
# Inference


@pytest.fixture(scope="module")
def body() -> nn.Module:
    torch.manual_seed(0)
    body: Any = mobilenet_v3_small().features
    body.out_channels = 576
    return body


@pytest.fixture(scope="module")
def photos() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.rand(3, 60, 80), torch.rand(3, 90, 41)]


def test_masks_are_those_of_the_model(body: Any, photos: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks are pasted into the image in small groups, which gives the same pixels."""
    monkeypatch.setattr(inference, "MASK_PIXELS", 3 * 60 * 80)
    anchors = AnchorGenerator(((16, 32, 64),), ((0.5, 1.0, 2.0),))
    pools = {"box_roi_pool": MultiScaleRoIAlign(["0"], 7, 2), "mask_roi_pool": MultiScaleRoIAlign(["0"], 14, 2)}
    sizes = {"min_size": 64, "max_size": 96}
    model = MaskRCNN(body, 4, rpn_anchor_generator=anchors, box_score_thresh=0.0, box_detections_per_img=40,
                     **pools, **sizes).eval()  # fmt: skip
    with torch.no_grad():  # labels and masks that differ
        nn.init.zeros_(model.roi_heads.box_predictor.cls_score.weight)
        nn.init.zeros_(model.roi_heads.box_predictor.cls_score.bias)
        model.roi_heads.mask_predictor.mask_fcn_logits.weight.normal_(std=30)
        wanted = [model([photo])[0] for photo in photos]
    found = detect(model, photos, [7, 9], [30, None, 50])
    for ours, output, photo, image_id in zip(found, wanted, photos, (7, 9), strict=True):
        kept = output["labels"] != 2  # a label without a category
        assert ours.image_id == image_id and 0 < kept.sum() < len(kept)
        np.testing.assert_array_equal(ours.boxes, output["boxes"][kept])
        np.testing.assert_array_equal(ours.scores, output["scores"][kept])
        np.testing.assert_array_equal(ours.categories, torch.tensor([0, 30, 0, 50])[output["labels"][kept]])
        for number, mask in enumerate(output["masks"][kept]):
            np.testing.assert_array_equal(ours.mask(number), mask[0] > 0.5)
            assert ours.mask(number).shape == photo.shape[1:]
        assert any(0 < ours.mask(number).mean() < 0.5 for number in range(len(ours.scores)))


def test_detections_that_are_no_numbers_are_left_out(body: Any, photos: list[torch.Tensor]) -> None:
    anchors = AnchorGenerator(((16, 32, 64),), ((0.5, 1.0, 2.0),))
    pool = MultiScaleRoIAlign(["0"], 7, 2)
    model: Any = FasterRCNN(body, 3, rpn_anchor_generator=anchors, box_roi_pool=pool, min_size=64, box_score_thresh=0.0)
    model.eval()
    (found,) = detect(model, photos[:1], [1], [1, 2])
    assert found.masks is None and len(found.boxes) > 0
    assert set(found.to_coco()[0]) == {"image_id", "category_id", "bbox", "score"}

    def broken(images: Any) -> list[dict[str, torch.Tensor]]:
        boxes = torch.tensor([[0.0, 0.0, 5.0, 5.0], [0.0, math.nan, 5.0, 5.0], [0.0, 0.0, math.inf, 5.0]])
        return [{"boxes": boxes, "scores": torch.ones(3), "labels": torch.ones(3, dtype=torch.int64)}]

    (found,) = detect(broken, photos[:1], [1], [1, 2])
    assert found.boxes.tolist() == [[0.0, 0.0, 5.0, 5.0]]

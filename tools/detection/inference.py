"""Detections of a model, with masks as run lengths.

Shapes:
    N        detections of an image
    H, W     height and width of the image
    M        side of a predicted mask before it is pasted into the image
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from faster_coco_eval.core import mask as mask_api
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.models.detection.transform import resize_boxes

# Pixels of the masks that are in memory at the same time; each takes about six bytes.
MASK_PIXELS = 1 << 24
MASK_THRESHOLD = 0.5


@dataclass(frozen=True, slots=True)
class Detections:
    """Detections of an image.

    Attributes:
        image_id: Id of the image in its annotation file.
        size: Height and width of the image, in pixels.
        boxes: Left, top, right and bottom in pixels, (N, 4).
        scores: Scores from 0 to 1, (N,).
        categories: Category id of each detection, (N,).
        masks: Compressed run lengths of each mask; None if the model has no masks.
    """

    image_id: int
    size: tuple[int, int]
    boxes: np.ndarray
    scores: np.ndarray
    categories: np.ndarray
    masks: list[str] | None

    def mask(self, number: int) -> np.ndarray:
        """Returns the mask of a detection, 0 or 1, (H, W)."""
        assert self.masks is not None
        mask: np.ndarray = mask_api.decode({"size": list(self.size), "counts": self.masks[number]})
        return mask

    def select(self, kept: np.ndarray) -> "Detections":
        """Returns some of the detections.

        Args:
            kept: Whether each detection is selected, (N,).
        """
        masks = (
            None if self.masks is None else [mask for mask, is_kept in zip(self.masks, kept, strict=True) if is_kept]
        )
        return replace(
            self, boxes=self.boxes[kept], scores=self.scores[kept], categories=self.categories[kept], masks=masks
        )

    def to_coco(self) -> list[dict[str, Any]]:
        """Returns the detections in COCO's results format."""
        results = []
        columns = (self.boxes.tolist(), self.scores.tolist(), self.categories.tolist())
        for number, (box, score, category) in enumerate(zip(*columns, strict=True)):
            left, top, right, bottom = box
            result: dict[str, Any] = {
                "image_id": self.image_id,
                "category_id": category,
                "bbox": [left, top, right - left, bottom - top],
                "score": score,
            }
            if self.masks is not None:
                result["segmentation"] = {"size": list(self.size), "counts": self.masks[number]}
            results.append(result)
        return results


def to_device(images: Iterable[torch.Tensor], device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """Returns images of 0 to 255 as numbers from 0 to 1, on the device."""
    return [image.to(device, non_blocking=True).to(dtype) / 255 for image in images]


@torch.no_grad()
def detect(
    model: Any, images: Sequence[torch.Tensor], image_ids: Sequence[int], category_ids: Sequence[int | None]
) -> list[Detections]:
    """Returns the detections in some images.

    The model sees one image at a time. In a batch, smaller images would be padded, which changes their feature maps a
    little, so that results would depend on the batch size and the number of processes.

    torchvision's models paste all masks into images of full size. Here only a few of these exist at the same time.

    Args:
        model: torchvision detector in evaluation mode.
        images: Images with values from 0 to 1, (C, H, W), on the device of the model.
        image_ids: Id of each image.
        category_ids: Category id of each label, from label 1 on. Detections of labels with None are left out.
    """
    # -1 stands for no category: label 0 is the background.
    categories = np.array([-1, *(-1 if number is None else number for number in category_ids)], dtype=np.int64)
    has_masks = isinstance(model, GeneralizedRCNN) and model.roi_heads.has_mask()
    detections = []
    for image, image_id in zip(images, image_ids, strict=True):
        size = (int(image.shape[-2]), int(image.shape[-1]))
        output = _run_without_pasting(model, image, size) if has_masks else model([image])[0]
        # A model that has diverged returns NaN.
        kept = output["boxes"].isfinite().all(dim=1) & output["scores"].isfinite()
        boxes, scores, labels = (output[key][kept] for key in ("boxes", "scores", "labels"))
        masks = _encode_masks(output["masks"][kept], boxes, size) if has_masks else None
        numbers = categories[labels.cpu().numpy()]
        one = Detections(image_id, size, boxes.float().cpu().numpy(), scores.float().cpu().numpy(), numbers, masks)
        detections.append(one.select(numbers >= 0))
    return detections


def _run_without_pasting(model: Any, image: torch.Tensor, size: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Does what `GeneralizedRCNN.forward` does, except that masks stay (N, 1, M, M)."""
    batch, _ = model.transform([image])
    features = model.backbone(batch.tensors)
    if isinstance(features, torch.Tensor):
        features = {"0": features}
    proposals, _ = model.rpn(batch, features)
    output: dict[str, torch.Tensor] = model.roi_heads(features, proposals, batch.image_sizes)[0][0]
    output["boxes"] = resize_boxes(output["boxes"], list(batch.image_sizes[0]), list(size))
    return output


def _encode_masks(masks: torch.Tensor, boxes: torch.Tensor, size: tuple[int, int]) -> list[str]:
    """Returns the run lengths of predicted masks (N, 1, M, M) in the image."""
    height, width = size
    at_once = max(1, MASK_PIXELS // (height * width))
    encoded: list[str] = []
    for start in range(0, len(masks), at_once):
        part = slice(start, start + at_once)
        pasted = paste_masks_in_image(masks[part].float(), boxes[part].float(), size)[:, 0] > MASK_THRESHOLD
        pixels = np.asfortranarray(pasted.permute(1, 2, 0).cpu().numpy().astype(np.uint8))
        encoded += [_text(rle["counts"]) for rle in mask_api.encode(pixels)]
    return encoded


def _text(counts: str | bytes) -> str:
    return counts.decode("ascii") if isinstance(counts, bytes) else counts

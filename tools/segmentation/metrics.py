"""Metrics of semantic segmentation: mIoU, mAcc and aAcc.

Shapes:
    H, W     height and width of an image
    K        number of classes
"""

from dataclasses import dataclass

import torch
from torchmetrics.classification import MulticlassConfusionMatrix

from ..common.distributed import Distributed
from .labels import IGNORED


@dataclass(frozen=True)
class Scores:
    """Metrics of a set of images, in percent.

    A class without labeled and without predicted pixels has no IoU, and a class without labeled pixels has no accuracy.
    Their values are NaN. The means do not count them, as in mmsegmentation.

    Attributes:
        miou: Mean IoU over the classes.
        macc: Mean accuracy over the classes.
        aacc: Share of all labeled pixels that are predicted correctly.
        iou: IoU of each class, K values.
        acc: Accuracy of each class: share of its labeled pixels that are predicted correctly, K values.
        pixels: Labeled pixels of each class, K values.
    """

    miou: float
    macc: float
    aacc: float
    iou: list[float]
    acc: list[float]
    pixels: list[int]

    def means(self) -> dict[str, float]:
        """Returns the three metrics over all classes by their names."""
        return {"miou": self.miou, "macc": self.macc, "aacc": self.aacc}


class SegmentationMetrics:
    """Counts pixels by label and prediction, exactly on any number of processes."""

    def __init__(self, num_classes: int, distributed: Distributed) -> None:
        self.distributed = distributed
        self._confusion = MulticlassConfusionMatrix(
            num_classes, ignore_index=IGNORED, validate_args=False, sync_on_compute=False
        ).to(distributed.device)

    def update(self, predicted: torch.Tensor, labels: torch.Tensor) -> None:
        """Counts the pixels of images.

        Args:
            predicted: Predicted classes, integers of any shape.
            labels: Labels of the same shape. `IGNORED` does not count.
        """
        self._confusion.update(predicted.long(), labels.long())

    def sum_up(self) -> torch.Tensor:
        """Returns the pixels of all processes by label (row) and prediction (column).

        Every process must call this.

        Returns:
            Pixels, int64 (K, K).
        """
        # torchmetrics' own `compute` would warn in a process without an image.
        counts: torch.Tensor = self._confusion.confmat.long().clone()
        return self.distributed.sum(counts)


def compute_scores(confusion: torch.Tensor) -> Scores:
    """Computes the metrics of a confusion matrix.

    Args:
        confusion: Number of pixels by label (row) and prediction (column), (K, K).
    """
    counts = confusion.cpu().double()
    correct, labeled, predicted = counts.diag(), counts.sum(dim=1), counts.sum(dim=0)
    iou = 100 * correct / (labeled + predicted - correct)  # 0 / 0 is NaN
    acc = 100 * correct / labeled
    return Scores(
        miou=iou.nanmean().item(),
        macc=acc.nanmean().item(),
        aacc=(100 * correct.sum() / counts.sum()).item(),
        iou=iou.tolist(),
        acc=acc.tolist(),
        pixels=[int(value) for value in labeled.tolist()],
    )

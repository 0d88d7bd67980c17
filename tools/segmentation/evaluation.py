"""mIoU of a segmentation model on a dataset."""

from collections.abc import Callable, Iterable

import torch

from ..common.cli import CommandError
from ..common.distributed import Distributed
from .inference import Predictor
from .metrics import SegmentationMetrics
from .transforms import Example


def evaluate(
    predictor: Predictor,
    batches: Iterable[list[Example]],
    num_classes: int,
    distributed: Distributed,
    on_batch: Callable[[], object] | None = None,
) -> torch.Tensor:
    """Compares predictions with label maps, at the resolution of the label maps.

    Every process must call this.

    Args:
        predictor: The model and the sizes of its images.
        batches: This process's images and label maps.
        num_classes: Number of classes K.
        distributed: The processes that share the images. Their shares may differ in size.
        on_batch: Called after each batch.

    Returns:
        Number of pixels by label (row) and prediction (column), of all processes, int64 (K, K).

    Raises:
        CommandError: If no image can be read, or no pixel is labeled.
    """
    metrics = SegmentationMetrics(num_classes, distributed)
    for batch in batches:
        by_size: dict[torch.Size, list[Example]] = {}
        for example in batch:
            by_size.setdefault(example[0].shape, []).append(example)
        for examples in by_size.values():
            images, labels = (torch.stack(tensors) for tensors in zip(*examples, strict=True))
            metrics.update(predictor.predict(images), labels.to(distributed.device))
        if on_batch is not None:
            on_batch()
    confusion = metrics.sum_up()
    if int(confusion.sum()) == 0:
        raise CommandError(
            "the validation set has no readable image with labeled pixels; check the folders of the validation set, "
            "--ignore-index and --reduce-zero-label"
        )
    return confusion

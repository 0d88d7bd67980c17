"""Images that calibrate int8 and that compare files with the model."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..common.bad_images import BadImages
from ..common.cli import CommandError
from ..common.data import Images, open_images
from ..common.distributed import Distributed
from ..common.evaluation import class_names, map_classes, mapped
from ..common.loaders import create_val_loader
from .config import ExportDataConfig

_THIS_PROCESS = Distributed(torch.device("cpu"))


@dataclass(frozen=True)
class ExportData:
    """Images of an export.

    Attributes:
        config: Data flags.
        images: Validation images, and training images if int8 needs them.
        data_config: Preprocessing of the model.
        class_map: The model's class number of each class of the dataset (K,); None if they are the same.
    """

    config: ExportDataConfig
    images: Images
    data_config: dict[str, Any]
    class_map: torch.Tensor | None = None

    def loader(self, dataset: Any) -> Any:
        """Returns a loader of the images of a dataset, preprocessed as in an evaluation."""
        return create_val_loader(dataset, self.config, self.data_config, _THIS_PROCESS)

    def first_batch(self) -> torch.Tensor:
        """Returns the first validation images (B, C, H, W).

        Raises:
            CommandError: If there are none.
        """
        batch = next(iter(self.loader(self.images.val)), None)
        if batch is None:
            raise CommandError("the validation set has no images to compare the file on; check --val-split")
        return batch[0]

    def readable_batches(self, loader: Any, bar: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yields batches without the unreadable images, with the model's class numbers."""
        return _drop_unreadable(mapped(loader, self.class_map), bar)

    def calibration_loader(self) -> Any:
        """Returns a loader of training images to calibrate int8 on.

        Raises:
            CommandError: If the images are in shards.
        """
        dataset = self.images.train
        if not hasattr(dataset, "source"):
            raise CommandError("--dtype int8 calibrates on images from a whole set, but wds/ shards are read in order")
        dataset.source = EvenSubset(dataset.source, self.config.calibration_images)
        return self.loader(dataset)


def open_data(
    config: ExportDataConfig, model: Any, data_config: dict[str, Any], *, features: bool, calibrate: bool,
    bad_images: BadImages,
) -> ExportData | None:  # fmt: skip
    """Opens the images that the flags name; returns None if they name none.

    Args:
        config: Data flags.
        model: The model.
        data_config: Preprocessing of the model.
        features: Whether the model returns feature maps. Then the classes of the images do not matter.
        calibrate: Whether to open training images, too.
        bad_images: Records unreadable images.

    Raises:
        CommandError: If the images cannot be opened or do not fit the model.
    """
    if not config.is_given:
        return None
    in_chans = data_config["input_size"][0]
    if in_chans not in (1, 3):
        raise CommandError(f"images have 1 (gray) or 3 (color) channels, but the model takes {in_chans}")
    images = open_images(config, _THIS_PROCESS, in_chans=in_chans, seed=config.seed, is_training=calibrate)
    for dataset in (images.train, images.val):
        if dataset is not None:
            dataset.bad_images = bad_images
    class_map = None
    if not features:
        names = class_names(config.class_map, model)
        class_map = map_classes(names, images.class_names, model.num_classes, _THIS_PROCESS)
    return ExportData(config, images, data_config, class_map)


class EvenSubset:
    """Evenly spaced subset of a dataset.

    Image folders are sorted by class, so that the first images would all be of the same class.
    """

    def __init__(self, source: Any, number: int) -> None:
        """Selects the images.

        Args:
            source: Source of an `ImageDataset`.
            number: Number of images; all if the source has fewer.
        """
        self.source = source
        number = min(number, len(source))
        self.places = [i * len(source) // number for i in range(number)]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Any:
        return self.source[self.places[index]]

    def filename(self, index: int, absolute: bool = False) -> str | None:
        """Returns the path of an image; None if the source has no paths."""
        if not hasattr(self.source, "filename"):
            return None
        return self.source.filename(self.places[index], absolute=absolute)


def _drop_unreadable(
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]], bar: Any
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for image, target in batches:
        if bool((target >= 0).any()):
            yield image[target >= 0], target[target >= 0]
        bar.update()

"""Opens trained detectors."""

from dataclasses import dataclass
from typing import Any

from stvit.adapters import torchvision as detectors
from stvit.weights.errors import PretrainedError

from ..common.cli import CommandError, reason
from ..common.config import DeviceConfig, check_sides
from ..common.distributed import DTYPES, Distributed
from .config import SourceConfig


@dataclass(frozen=True)
class OpenedDetector:
    """A trained detector on its device, in evaluation mode.

    Attributes:
        model: The detector.
        title: Name of its source.
        has_masks: Whether it predicts masks.
        label_names: Names of the labels 1, 2 and so on.
        category_ids: Ids of these labels in annotation files.
    """

    model: Any
    title: str
    has_masks: bool
    label_names: list[str]
    category_ids: list[int]

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def in_chans(self) -> int:
        """Channels of the images."""
        return len(self.model.transform.image_mean)


def open_detector(config: SourceConfig, device: DeviceConfig, distributed: Distributed) -> OpenedDetector:
    """Loads a detector and moves it to the device.

    Raises:
        CommandError: If it cannot be loaded, or --test-size is larger than the longest side.
    """
    sizes = {"min_size": config.test_size, "max_size": config.max_size}
    try:
        with distributed.primary_first():
            model = detectors.load(config.checkpoint, **{key: size for key, size in sizes.items() if size})
    except PretrainedError as error:
        raise CommandError(f"--checkpoint: {reason(error)}") from error
    if config.test_size is not None:
        check_sides("--test-size", config.test_size, "--max-size", model.transform.max_size)
    model = model.to(device=distributed.device, dtype=DTYPES[device.model_dtype])
    labels = model.recipe.args["num_classes"] - 1
    names = model.label_names or [f"label {label}" for label in range(1, labels + 1)]
    category_ids = model.category_ids or list(range(1, labels + 1))
    if model.category_ids is None and model.label_names is None:
        distributed.print_primary(f"{config.checkpoint} has no class names; label N becomes category N")
    return OpenedDetector(model, config.checkpoint, "loss_mask" in model.loss_names, names, category_ids)

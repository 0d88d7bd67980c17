"""The interface between a training command and the engine."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from .data import Images


class TrainBatches(Protocol):
    """Training batches, such as a `TrainLoader`.

    Attributes:
        steps: Steps of an epoch.
        is_stream: Whether images can only be read in sequence.
    """

    steps: int
    is_stream: bool

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Any]:
        """Yields the batches of an epoch, from a step on."""
        ...


@dataclass
class StepResult:
    """Result of one training step.

    Attributes:
        loss: Mean loss over the images of the batch, with gradients.
        images: Number of images.
        counts: Numbers of images by the names in `Job.counts`, such as correctly classified ones; scalar tensors.
        losses: Parts of the loss by the names in `Job.losses`; scalar tensors.
    """

    loss: torch.Tensor
    images: int
    counts: dict[str, torch.Tensor] = field(default_factory=dict)
    losses: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass
class SavedWeights:
    """Describes weights that are being saved.

    Attributes:
        epoch: Epochs done.
        is_ema: Whether they are the moving average.
        is_best: Whether they are the best of the run so far.
        value: Value of `Job.best_metric`, in percent.
    """

    epoch: int
    is_ema: bool
    is_best: bool
    value: float


class Job(ABC):
    """A task to train: model, data, loss, evaluation and one step function.

    A training command subclasses this, and the engine does everything else. `task` is a timm `TrainingTask`: it
    connects the model with its loss, and wraps it for DDP, `torch.compile` and EMA.

    Attributes:
        model: The model, on the device.
        task: The model with its loss.
        images: Training and validation sets.
        train_loader: Training batches.
        val_loader: Validation batches.
        label: Part of the name of the run directory; see `run_label`.
        description: Model and data, for the first line of the log.
        best_metric: Metric of `evaluate` that chooses the best weights. Higher is better.
        titles: Names of the metrics to show, in percent, by their keys in the results of `evaluate`.
        counts: Names of the counts of `step`, and the metric that each becomes as a percentage of the images.
        losses: Names of the parts of the loss, whose means are recorded.
    """

    model: nn.Module
    task: Any
    images: Images
    train_loader: TrainBatches
    val_loader: Iterable[Any]
    label: str
    description: str
    best_metric: str
    titles: Mapping[str, str]
    counts: Mapping[str, str]
    losses: Sequence[str] = ()

    def check_data(self) -> None:  # noqa: B027
        """Reads files of the data to find mistakes before the training.

        The engine calls it when all flags are checked, because it may take minutes. By default, nothing is checked.

        Raises:
            CommandError: If a file is wrong.
        """

    @abstractmethod
    def begin_epoch(self, epoch: int) -> None:
        """Changes settings that depend on the epoch. The task is in training mode."""

    @abstractmethod
    def step(self, batch: Any, is_first: bool) -> StepResult:
        """Computes the loss of a batch.

        Args:
            batch: A batch of `train_loader`.
            is_first: Whether this is the first update of an epoch, in which slow checks are acceptable.
        """

    @abstractmethod
    def evaluate(self, model: nn.Module, batches: Iterable[Any]) -> Mapping[str, float]:
        """Returns metrics of a model: `best_metric`, and possibly `loss` and others.

        Args:
            model: The model, or its moving average.
            batches: The batches of `val_loader`.
        """

    @abstractmethod
    def save(self, model: nn.Module, folder: Path, saved: SavedWeights) -> None:
        """Writes the weights and everything needed to load them to an empty folder."""

    @abstractmethod
    def write_card(self, folder: Path, name: str) -> None:
        """Writes the model card of saved weights, for the Hub.

        Args:
            folder: Folder that `save` wrote.
            name: Name that loads the model, such as 'hf-hub:org/name'.
        """

    @abstractmethod
    def usage(self, folder: Path) -> str:
        """Returns a line of Python that loads saved weights."""

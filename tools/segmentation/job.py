"""Semantic segmentation, as a job of the training engine.

Shapes:
    B        batch
    C        channels of an image
    H, W     height and width of a crop
    K        number of classes
"""

import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.task import ClassificationTask
from torch import nn

from stvit.adapters import segmentation
from stvit.adapters.folder import save_model, write_card
from stvit.hub import Details, Metric

from ..common.cli import CommandError
from ..common.data import Images
from ..common.distributed import DTYPES, Distributed, autocast
from ..common.engine import check_config, prepare_model
from ..common.examples import ExampleLoader, create_example_val_loader
from ..common.job import Job, SavedWeights, StepResult
from ..common.runs import run_label
from .config import SegmentationConfig
from .data import check_data, open_data
from .evaluation import evaluate
from .inference import Predictor, Scaling, normalize
from .labels import IGNORED, LabelReader, LabelRules
from .metrics import compute_scores
from .model import create_model
from .transforms import Example, ReadExample, collate_crops, collate_images, train_transform

_BATCH_NORM = "BatchNorm of {} needs at least two images per step and process; increase --batch-size, or pass --bn-eval"


def prepare(config: SegmentationConfig, distributed: Distributed) -> "Segmentation":
    """Opens the data and creates the model.

    Raises:
        CommandError: If flags, data or model are wrong.
    """
    check_config(config, distributed)
    data = config.data
    images, rules = open_data(
        data, distributed, in_chans=config.model.in_chans, seed=config.run.seed, num_classes=data.num_classes
    )
    model = create_model(config.model, config.image, rules.num_classes, distributed)
    return Segmentation(config, distributed, images, rules, prepare_model(model, config, distributed))


class SegmentationTask(ClassificationTask):
    """A segmentation model with its loss."""

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns the `loss` and its parts by the names in `Segmentation.losses`.

        Args:
            input: Normalized images (B, C, H, W).
            target: Labels (B, H, W).
        """
        output = self.trainable_module(input)
        if not isinstance(output, tuple):
            loss = segmentation_loss(output, target)
            return {"loss": loss, "loss_decode": loss}
        decode, auxiliary = (segmentation_loss(logits, target) for logits in output)
        auxiliary = segmentation.AUXILIARY_WEIGHT * auxiliary
        return {"loss": decode + auxiliary, "loss_decode": decode, "loss_aux": auxiliary}


def segmentation_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Returns the mean cross-entropy of the labeled pixels; 0 without any.

    Args:
        logits: Logits (B, K, H, W).
        labels: Labels (B, H, W). `IGNORED` does not count.
    """
    labels = labels.long()
    if logits.dtype in (torch.bfloat16, torch.float16):  # a sum over many pixels needs more digits
        logits = logits.float()
    total = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp(min=1)


def _check_batch_size(config: SegmentationConfig, model: Any) -> None:
    """Checks that BatchNorm after a global pooling sees several values of a channel.

    Raises:
        CommandError: If a step has one image.
    """
    optim = config.optim
    if config.data.batch_size > 1 or optim.bn_eval or optim.sync_bn:
        return
    for part in model.decoder.modules():
        layers = list(part.children()) if isinstance(part, nn.Sequential) else []
        pools = any(isinstance(layer, nn.AdaptiveAvgPool2d) and layer.output_size in (1, (1, 1)) for layer in layers)
        if pools and any(isinstance(layer, nn.BatchNorm2d) for layer in part.modules()):
            raise CommandError(_BATCH_NORM.format(config.model.model))


class Segmentation(Job):
    """Semantic segmentation with cross-entropy.

    The best weights are those with the highest mIoU.
    """

    best_metric = "miou"
    titles = {"miou": "mIoU", "macc": "mAcc", "aacc": "aAcc"}  # noqa: RUF012
    counts = {}  # noqa: RUF012

    def __init__(
        self, config: SegmentationConfig, distributed: Distributed, images: Images, rules: LabelRules, model: Any
    ) -> None:
        """Creates the loaders, the augmentation and the loss.

        Args:
            config: The settings.
            distributed: The processes of the run.
            images: Training and validation sets of `open_data`.
            rules: Meaning of the values in the label maps.
            model: The model, on the device.
        """
        self.config, self.distributed = config, distributed
        self.images, self.rules = images, rules
        self.model: Any = model
        self.dtype = DTYPES[config.device.model_dtype]
        self.scaling = Scaling(config.image.short_side, config.image.long_side)
        _check_batch_size(config, model)
        self.losses = ("loss_decode",) if model.auxiliary_head is None else ("loss_decode", "loss_aux")
        reader = LabelReader(rules)
        images.train.transform = ReadExample(reader, train_transform(config.image, model.mean))
        images.val.transform = ReadExample(reader)
        self.train_loader = ExampleLoader(
            images.train,
            config.data,
            distributed,
            collate_crops,
            accum_steps=config.optim.grad_accum_steps,
            seed=config.run.seed,
        )
        self.val_loader = create_example_val_loader(images.val, config.data, distributed, collate_images)
        self.task = SegmentationTask(
            model, segmentation_loss, device=distributed.device, dtype=self.dtype, verbose=False
        )
        self.label = run_label(f"{config.model.model}_{config.model.backbone}", config.image.crop_size)
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        self.description = (
            f"{config.model.model} on {config.model.backbone}, {parameters:.1f} M parameters, {rules.num_classes} "
            f"classes, {len(images.train)} training and {len(images.val)} validation images"
        )

    def check_data(self) -> None:
        """Reads and checks all label maps.

        Raises:
            CommandError: If a label map is wrong.
        """
        check_data(self.config.data, self.images, self.rules, self.distributed)

    def begin_epoch(self, epoch: int) -> None:
        """Does nothing: no setting depends on the epoch."""

    def step(self, batch: Example, is_first: bool) -> StepResult:
        """Computes the loss of a batch.

        Args:
            batch: Images (B, C, H, W) and labels (B, H, W), both uint8.
            is_first: Whether this is the first update of an epoch.

        Raises:
            CommandError: If BatchNorm needs more images, for example because the crops are small.
        """
        images, labels = (tensor.to(self.distributed.device, non_blocking=True) for tensor in batch)
        normalized = normalize(images, self.model, self.dtype)
        if self.config.device.channels_last:
            normalized = normalized.contiguous(memory_format=torch.channels_last)
        try:
            with autocast(self.config.device, self.distributed.device):
                result = self.task(normalized, labels)
        except ValueError as error:
            if "Expected more than 1 value per channel" not in str(error):
                raise
            raise CommandError(_BATCH_NORM.format(self.config.model.model)) from error
        parts = {name: result[name].detach() for name in self.losses}
        return StepResult(result["loss"], len(images), losses=parts)

    def evaluate(self, model: nn.Module, batches: Iterable[list[Example]]) -> dict[str, float]:
        """Returns `miou`, `macc` and `aacc` in percent, at the label maps' resolution."""
        device = self.config.device
        predictor = Predictor(
            model,
            self.distributed.device,
            self.dtype,
            scaling=self.scaling,
            context=partial(autocast, device, self.distributed.device),
            channels_last=device.channels_last,
        )
        confusion = evaluate(predictor, batches, self.rules.num_classes, self.distributed)
        return compute_scores(confusion).means()

    def save(self, model: nn.Module, folder: Path, saved: SavedWeights) -> None:
        """Writes model.safetensors and config.json.

        config.json has class names, values of the classes and mIoU.
        """
        data, epochs = self.config.data, self.config.optim.epochs
        name = os.fsencode(Path(data.val_images or data.data_dir or "").name).decode("utf-8", "replace")
        how = (
            f"{len(self.images.val)} images, shorter side {self.scaling.short_side}, single scale; tools/train_seg.py "
            f"after epoch {saved.epoch} of {epochs}{', the best of the run on these images' if saved.is_best else ''}"
        )
        details = Details(
            weights=f"{'moving average (EMA)' if saved.is_ema else 'as trained'}, after epoch {saved.epoch}",
            metrics=[Metric("mIoU", saved.value, f"images in {name}", "validation", how)],
        )
        values = [number + 1 for number in range(self.rules.num_classes)] if self.rules.reduce_zero_label else None
        save_model(model, folder, label_names=self.images.class_names, category_ids=values, details=details)

    def write_card(self, folder: Path, name: str) -> None:
        """Writes the card of a segmentation model."""
        write_card(folder, name)

    def usage(self, folder: Path) -> str:
        """Returns a line of Python that loads the model."""
        return f"from stvit.adapters import segmentation; model = segmentation.load({str(folder)!r})"

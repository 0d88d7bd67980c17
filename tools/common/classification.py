"""Image classification, as a job of the training engine."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.layers import DropPath
from timm.task import ClassificationTask
from torch import nn

from stvit import hub
from stvit.weights import Source, read_weights

from .cli import CommandError
from .config import AugmentConfig, ClassificationConfig, ModelConfig, check_channels
from .data import Images, check_targets, open_images, resolve_data_config
from .distributed import DTYPES, Distributed, autocast
from .engine import check_config, prepare_model
from .evaluation import Batches, evaluate
from .job import Job, SavedWeights, StepResult
from .loaders import TrainLoader, create_val_loader
from .model import check_img_size, create_model, weights_errors
from .runs import run_label


def prepare(config: ClassificationConfig, distributed: Distributed) -> "Classification":
    """Opens the data and creates the model.

    Settings that are None and depend on the data are replaced.

    Raises:
        CommandError: If flags, data or model are wrong.
    """
    config.model.in_chans = config.model.in_chans or 3
    _check_flags(config)
    check_config(config, distributed)
    images = open_images(config.data, distributed, in_chans=config.model.in_chans, seed=config.run.seed)
    config.model.num_classes = _num_classes(config.model.num_classes, images.class_names)
    model = prepare_model(_create_model(config), config, distributed)
    return Classification(config, distributed, images, model)


class Classification(Job):
    """Image classification with cross-entropy.

    The best weights are those with the highest top-1 accuracy.
    """

    best_metric = "top1"
    titles = {"top1": "accuracy"}  # noqa: RUF012
    counts = {"correct": "top1"}  # noqa: RUF012

    def __init__(self, config: ClassificationConfig, distributed: Distributed, images: Images, model: Any) -> None:
        """Creates the loaders, the augmentation on the device, and the loss.

        Args:
            config: Settings without None for `in_chans` and `num_classes`.
            distributed: The processes of the run.
            images: Training and validation sets.
            model: The model, on the device.
        """
        self.config, self.distributed = config, distributed
        self.images = images
        self.model: Any = model
        settings = {**asdict(config.image), "in_chans": config.model.in_chans}
        self.data_config = resolve_data_config(settings, model)
        check_img_size(model, self.data_config)
        dtype = DTYPES[config.device.model_dtype]
        self.train_loader = TrainLoader(
            images.train,
            config.data,
            config.augment,
            self.data_config,
            distributed,
            accum_steps=config.optim.grad_accum_steps,
            seed=config.run.seed,
            dtype=dtype,
        )
        self.val_loader = create_val_loader(images.val, config.data, self.data_config, distributed, dtype)
        self.mixup = create_mixup(config.augment, config.data.batch_size, model.num_classes)
        reprob, remode = config.augment.reprob, config.augment.remode
        self.erase = RandomErasing(reprob, mode=remode, max_count=1, device=distributed.device) if reprob else None
        criterion = {"smoothing": config.augment.smoothing} if self.mixup is None else {"soft_targets": True}
        self.task = ClassificationTask(
            model, criterion_kwargs=criterion, device=distributed.device, dtype=dtype, verbose=False
        )
        # The model was created with the highest rate of the schedule, because a block of rate 0 has no DropPath.
        self.drop_paths = [(module, module.drop_prob) for module in model.modules() if isinstance(module, DropPath)]
        self.label = run_label(config.model.model, self.data_config["input_size"][-1])
        self.description = (
            f"{config.model.model}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, "
            f"{config.model.num_classes} classes, {len(images.train)} training and {len(images.val)} validation images"
        )

    def begin_epoch(self, epoch: int) -> None:
        """Sets the stochastic depth rate, and turns mixup off."""
        if self.config.model.drop_path_schedule:
            share = drop_path_at(self.config.model, epoch) / highest_drop_path(self.config.model)
            for module, highest in self.drop_paths:
                module.drop_prob = highest * share
        if self.mixup is not None and self.config.augment.mixup_off_epoch:
            self.mixup.mixup_enabled = epoch < self.config.augment.mixup_off_epoch

    def step(self, batch: tuple[torch.Tensor, torch.Tensor], is_first: bool) -> StepResult:
        """Augments a batch on the device, and computes its loss.

        Args:
            batch: Images (B, C, H, W) and class numbers (B,).
            is_first: Whether this is the first update of an epoch.
        """
        image, labels = batch
        if is_first or self.distributed.device.type == "cpu":  # the check would wait for a GPU
            check_targets(labels, self.model.num_classes, "training")
        target: Any = labels
        if self.erase is not None:
            image = self.erase(image)
        if self.mixup is not None:
            image, target = self.mixup(image, labels)
        if self.config.device.channels_last:
            image = image.contiguous(memory_format=torch.channels_last)
        with autocast(self.config.device, self.distributed.device):
            result = self.task(image, target)
        correct = (result["output"].argmax(dim=1) == labels).sum()
        return StepResult(result["loss"], len(image), {"correct": correct})

    def evaluate(self, model: nn.Module, batches: Batches) -> dict[str, float]:
        """Returns mean cross-entropy `loss`, `top1` and `top5` in percent."""
        context = autocast(self.config.device, self.distributed.device)
        return evaluate(model, batches, self.distributed, context, self.config.device.channels_last)

    def save(self, model: nn.Module, folder: Path, saved: SavedWeights) -> None:
        """Writes model.safetensors and config.json.

        config.json contains class names, preprocessing and accuracy.
        """
        data, epochs = self.config.data, self.config.optim.epochs
        data_folder = os.fsencode(Path(data.data_dir or "").name).decode("utf-8", "replace")
        how = (
            f"{len(self.images.val)} images of {data.val_split} at {self.data_config['input_size'][-1]} pixels, crop "
            f"{self.data_config['crop_pct']:g}, {self.data_config['interpolation']}; tools/train_cls.py after epoch "
            f"{saved.epoch} of {epochs}{', the best of the run on these images' if saved.is_best else ''}"
        )
        details = hub.Details(
            weights=f"{'moving average (EMA)' if saved.is_ema else 'as trained'}, after epoch {saved.epoch}",
            metrics=[hub.Metric("top-1", saved.value, data.dataset or f"images in {data_folder}", data.val_split, how)],
        )
        hub.save(model, folder, label_names=self.images.class_names, data_config=self.data_config, details=details)

    def write_card(self, folder: Path, name: str) -> None:
        """Writes the card of a classifier."""
        hub.write_card(folder, name)

    def usage(self, folder: Path) -> str:
        """Returns a line of Python that creates the model with its weights."""
        return f"import stvit, timm; model = timm.create_model({str(Source.folder(folder))!r}, pretrained=True)"


# ---------------------------------------------------------------------------------------------------------------------
# Parts


def _check_flags(config: ClassificationConfig) -> None:
    """Checks flags that only classification has.

    Raises:
        CommandError: If flags contradict each other.
    """
    check_channels(config.model.in_chans or 3, config.image)
    if config.model.drop_path_schedule and highest_drop_path(config.model) == 0:
        raise CommandError("--drop-path-schedule needs a rate above 0")
    if config.augment.aug_repeats > 1 and config.data.dataset.startswith("wds/"):
        raise CommandError("--aug-repeats needs images in random order, but wds/ shards are read in sequence")


def _num_classes(asked: int | None, class_names: list[str] | None) -> int:
    if class_names is None:
        if asked is None:
            raise CommandError("the dataset does not contain its number of classes; pass --num-classes")
        return asked
    if asked is not None and asked != len(class_names):
        raise CommandError(f"--num-classes is {asked}, but the images have {len(class_names)} classes; remove it")
    return len(class_names)


def _create_model(config: ClassificationConfig) -> nn.Module:
    """Returns the model on the CPU."""
    model = config.model
    drop_path = highest_drop_path(model) if model.drop_path_schedule else model.drop_path
    with weights_errors():
        weights = read_weights(Path(model.pretrained_path))[0] if model.pretrained_path else None
    return create_model(
        model.model,
        pretrained=model.pretrained,
        weights=weights,
        num_classes=model.num_classes,
        in_chans=model.in_chans,
        img_size=config.image.img_size,
        grad_checkpointing=model.grad_checkpointing,
        model_kwargs={"drop_rate": model.drop, "drop_path_rate": drop_path, **model.model_kwargs},
    )


def drop_path_at(model: ModelConfig, epoch: int) -> float:
    """Returns the stochastic depth rate of the last block in an epoch."""
    steps = sorted((int(e), float(x)) for e, x in (text.split(":") for text in model.drop_path_schedule or ()))
    return [model.drop_path or 0.0, *(value for start, value in steps if start <= epoch)][-1]


def highest_drop_path(model: ModelConfig) -> float:
    """Returns the highest stochastic depth rate of all epochs."""
    return max(model.drop_path or 0.0, *(float(text.split(":")[1]) for text in model.drop_path_schedule or ("0:0",)))


def create_mixup(augment: AugmentConfig, batch_size: int, num_classes: int) -> Mixup | None:
    """Returns mixup and cutmix; None if both are off.

    Raises:
        CommandError: If the batch size is odd.
    """
    if augment.mixup <= 0.0 and augment.cutmix <= 0.0:
        return None
    if batch_size % 2 != 0:
        raise CommandError(f"--mixup and --cutmix need an even --batch-size, got {batch_size}")
    return Mixup(
        mixup_alpha=augment.mixup,
        cutmix_alpha=augment.cutmix,
        prob=augment.mixup_prob,
        switch_prob=augment.mixup_switch_prob,
        label_smoothing=augment.smoothing,
        num_classes=num_classes,
    )

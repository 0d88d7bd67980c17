"""Object detection and instance segmentation, as a job of the training engine."""

import os
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.task.task import TrainingTask
from torch import nn

from stvit import hub
from stvit.adapters import torchvision as detectors
from stvit.adapters.folder import save_model, write_card
from stvit.adapters.torchvision.models import BUILDERS
from stvit.weights.errors import PretrainedError

from ..common.cli import CommandError, reason
from ..common.config import check_in_chans
from ..common.data import Images
from ..common.distributed import DTYPES, Distributed, autocast
from ..common.engine import check_config, prepare_model
from ..common.examples import ExampleLoader, create_example_val_loader
from ..common.job import Job, SavedWeights, StepResult
from ..common.runs import run_label
from .coco import Coco
from .config import MODELS, DetectionConfig, ModelConfig
from .data import check_sizes, open_images
from .inference import Detections, detect, to_device
from .metrics import compute_scores, gather_detections
from .transforms import TrainTransform, ValTransform, aspect_ratio_groups, collate

# Images of this process, (C, H, W) with values 0 to 255, and their targets.
Batch = tuple[list[torch.Tensor], list[dict[str, Any]]]


def prepare(config: DetectionConfig, distributed: Distributed) -> "Detection":
    """Opens the data and creates the model.

    Raises:
        CommandError: If flags, data or model are wrong.
    """
    check_in_chans(config.model.in_chans)
    check_config(config, distributed)
    with_masks = MODELS[config.model.model]
    images = open_images(
        config.data, distributed, with_masks=with_masks, in_chans=config.model.in_chans, seed=config.run.seed
    )
    with distributed.primary_first():
        model = create_model(
            config.model,
            num_classes=1 + len(images.class_names or ()),
            min_size=config.image.test_size,
            max_size=config.image.max_size,
            log=distributed.print_primary,
        )
    # The data set resizes the training images, together with their masks.
    model.transform._skip_resize = True
    return Detection(config, distributed, images, prepare_model(model, config, distributed))


def create_model(config: ModelConfig, *, num_classes: int, min_size: int, max_size: int, log: Any = print) -> Any:
    """Returns a detector on the CPU.

    Args:
        config: The model and its initial weights.
        num_classes: Number of labels; the background counts.
        min_size: Shorter side of the images in the evaluation, in pixels.
        max_size: Largest longer side, in pixels.
        log: Receives lines about loaded weights.

    Raises:
        CommandError: If an argument is wrong, or weights cannot be loaded.
    """
    arguments: dict[str, Any] = {
        "pretrained_backbone": config.backbone_source(),
        "in_chans": config.in_chans,
        "frozen_stages": config.frozen_stages,
        "norm_eval": config.keeps_statistics(),
        "drop_path_rate": config.drop_path,
        "backbone_kwargs": config.backbone_kwargs,
        "min_size": min_size,
        "max_size": max_size,
    }
    for key in config.model_kwargs:
        _check_model_kwarg(key, arguments)
    try:
        model = BUILDERS[config.model](config.backbone, num_classes, log=log, **arguments, **config.model_kwargs)
        if config.grad_checkpointing:
            model.set_grad_checkpointing()
    except (ValueError, TypeError, RuntimeError, AssertionError) as error:
        raise CommandError(
            f"cannot create --model {config.model} on --backbone {config.backbone}: {reason(error)}"
        ) from error
    if config.pretrained_path:
        _load_weights(model, config.pretrained_path, log)
    return model


def _check_model_kwarg(key: str, arguments: Mapping[str, Any]) -> None:
    """Checks that --model-kwargs may set an argument.

    Args:
        key: The argument.
        arguments: Arguments that other flags set.

    Raises:
        CommandError: If another flag sets it, or no text can express its values.
    """
    if key == "num_classes":
        raise CommandError("--model-kwargs num_classes: the annotations decide it; remove it")
    if key in arguments or key == "backbone":
        own = {"min_size": "test-size", "drop_path_rate": "drop-path"}.get(key, key.replace("_", "-"))
        raise CommandError(f"--model-kwargs {key}: pass --{own} instead")
    if key in ("log", "_skip_resize") or key.endswith(("_generator", "_head", "_pool")):
        raise CommandError(f"--model-kwargs {key}: only Python code can set it; remove it")


def _load_weights(model: nn.Module, source: str, log: Any) -> None:
    """Loads the weights of another detector, except layers of another shape.

    Raises:
        CommandError: If the weights cannot be loaded, or none fits.
    """
    try:
        weights = detectors.load(source).state_dict()
    except PretrainedError as error:
        raise CommandError(f"--pretrained-path: {reason(error)}") from error
    own = model.state_dict()
    fitting = {key: value for key, value in weights.items() if key in own and own[key].shape == value.shape}
    if len(fitting) < len(own) / 2:
        raise CommandError(
            f"--pretrained-path {source}: only {len(fitting)} of {len(own)} tensors fit; it must be a model of the "
            "same --model and --backbone"
        )
    model.load_state_dict(fitting, strict=False)
    missing = [key for key in own if key not in fitting]
    rest = f"; random: {', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}" if missing else ""
    log(f"loaded {len(fitting)} of {len(own)} tensors of {source}{rest}")


class DetectionTask(TrainingTask):
    """A detector, which computes its own losses."""

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(device=device, dtype=dtype, verbose=False)
        self.trainable_module: Any = model

    def prepare_distributed(self, device_ids: list[Any] | None = None, **ddp_kwargs: Any) -> "DetectionTask":
        """Wraps the model in DistributedDataParallel."""
        wrapper = nn.parallel.DistributedDataParallel
        self.trainable_module = wrapper(self.trainable_module, device_ids=device_ids, **ddp_kwargs)
        return self

    def forward(self, images: Any, targets: Any) -> dict[str, torch.Tensor]:
        """Returns the losses by name."""
        losses: dict[str, torch.Tensor] = self.trainable_module(images, targets)
        return losses


class Detection(Job):
    """Object detection with the losses of torchvision's models.

    The best weights are those with the highest mask AP, or box AP if the model has no masks.
    """

    counts = {}  # noqa: RUF012

    def __init__(self, config: DetectionConfig, distributed: Distributed, images: Images, model: Any) -> None:
        """Creates the loaders.

        Args:
            config: The settings.
            distributed: The processes of the run.
            images: Training and validation sets of `open_images`.
            model: The model, on the device.
        """
        self.config, self.distributed = config, distributed
        self.images, self.model = images, model
        self.coco: Coco = images.val.source.coco
        self.with_masks = MODELS[config.model.model]
        self.best_metric = "mask_AP" if self.with_masks else "box_AP"
        self.titles = {"box_AP": "box AP"} | ({"mask_AP": "mask AP"} if self.with_masks else {})
        self.losses = model.loss_names
        self.dtype = DTYPES[config.device.model_dtype]
        images.train.transform = TrainTransform(config.image.min_size, config.image.max_size, config.image.hflip)
        images.val.transform = ValTransform()
        self.train_loader = ExampleLoader(
            images.train,
            config.data,
            distributed,
            collate,
            accum_steps=config.optim.grad_accum_steps,
            seed=config.run.seed,
            groups=aspect_ratio_groups(images.train.source.aspect_ratios(), config.data.aspect_ratio_groups),
        )
        self._measured: dict[bool, dict[str, float]] = {}  # last metrics of the model and of its moving average (True)
        self.val_loader = create_example_val_loader(images.val, config.data, distributed, collate)
        self.task = DetectionTask(model, distributed.device, self.dtype)
        self.label = run_label(f"{config.model.model}_{config.model.backbone}", config.image.test_size)
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        self.description = (
            f"{config.model.model} on {config.model.backbone}, {parameters:.1f} M parameters, {len(self.coco.names)} "
            f"classes, {len(images.train)} training and {len(images.val)} validation images"
        )

    def check_data(self) -> None:
        """Compares the sizes of the images with the annotations.

        Raises:
            CommandError: If sizes differ.
        """
        check_sizes(self.config.data, self.images, self.distributed)

    def begin_epoch(self, epoch: int) -> None:
        """Does nothing: no setting depends on the epoch."""

    def step(self, batch: Batch, is_first: bool) -> StepResult:
        """Computes the losses of a batch."""
        images = to_device(batch[0], self.distributed.device, self.dtype)
        targets = [self._move(target) for target in batch[1]]
        with autocast(self.config.device, self.distributed.device):
            losses = self.task(images, targets)
        return StepResult(torch.stack(list(losses.values())).sum(), len(images), losses=losses)

    def _move(self, target: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Returns boxes, labels and masks on the device, in the precision of the model."""
        tensors = {key: target[key] for key in ("boxes", "labels", "masks") if key in target}
        moved = {key: value.to(self.distributed.device, non_blocking=True) for key, value in tensors.items()}
        return moved | {"boxes": moved["boxes"].to(self.dtype)}

    def evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
        """Returns COCO's twelve metrics of the boxes and of the masks, in percent.

        They are named `box_AP`, `mask_AP` and so on.
        """
        model.eval()
        found: list[Detections] = []
        for images, targets in batches:
            with autocast(self.config.device, self.distributed.device):
                found += detect(
                    model,
                    to_device(images, self.distributed.device, self.dtype),
                    [target["image_id"] for target in targets],
                    self.coco.category_ids,
                )
        gathered = gather_detections(found, self.distributed)
        scores = self.distributed.on_primary(partial(compute_scores, self.coco, gathered, self.with_masks))
        self._measured[model is not self.model] = scores.values
        return scores.values

    def save(self, model: nn.Module, folder: Path, saved: SavedWeights) -> None:
        """Writes model.safetensors and config.json.

        config.json contains how the model is built, class names, category ids and accuracy.
        """
        epochs, image, values = self.config.optim.epochs, self.config.image, self._measured[saved.is_ema]
        name = os.fsencode(self.coco.path.stem).decode("utf-8", "replace")
        how = (
            f"{len(self.images.val)} images of {name}, shorter side {image.test_size} and longer side "
            f"at most {image.max_size} pixels; tools/train_det.py after epoch {saved.epoch} of {epochs}"
            f"{', the best of the run on these images' if saved.is_best else ''}"
        )
        details = hub.Details(
            weights=f"{'moving average (EMA)' if saved.is_ema else 'as trained'}, after epoch {saved.epoch}",
            metrics=[hub.Metric(title, values[key], name, "validation", how) for key, title in self.titles.items()],
        )
        save_model(model, folder, label_names=self.coco.names, category_ids=self.coco.category_ids, details=details)

    def write_card(self, folder: Path, name: str) -> None:
        """Writes the model card of saved weights."""
        write_card(folder, name)

    def usage(self, folder: Path) -> str:
        """Returns a line of Python that loads the model."""
        return f"from stvit.adapters import torchvision; model = torchvision.load({str(folder)!r})"

"""Batches of images: order, augmentation and data loaders."""

from collections.abc import Iterator
from typing import Any

import torch
from timm.data import create_transform
from timm.data.loader import PrefetchLoader, fast_collate
from torch.utils.data import DataLoader

from .cli import CommandError, reason
from .config import AugmentConfig, DataConfig
from .distributed import Distributed
from .examples import ResumableBatchSampler, check_update_size
from .shards import ShardDataset
from .signals import ignore_signals_in_worker
from .timm_patches import patch_posterize


class TrainLoader:
    """Augmented training batches on the device, from any step of any epoch on.

    Attributes:
        steps: Steps of an epoch, a multiple of the steps per update.
        is_stream: Whether images are read in sequence (wds/). The length of an epoch then depends on the workers.
    """

    def __init__(
        self,
        images: Any,
        data: DataConfig,
        augment: AugmentConfig,
        data_config: dict[str, Any],
        distributed: Distributed,
        *,
        accum_steps: int = 1,
        seed: int = 42,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Creates the loader and sets the transform of the images.

        Args:
            images: Training set of `open_images`.
            data: Batch size and workers.
            augment: Augmentation.
            data_config: timm's `input_size`, `mean`, `std` and `interpolation`.
            distributed: The processes that share each step.
            accum_steps: Steps per update.
            seed: Seed of the order.
            dtype: Precision of the images on the device.

        Raises:
            CommandError: If there are fewer images than an update needs, or the augmentation is wrong.
        """
        images.transform = _train_transform(augment, data_config)
        self.images = images
        self.seed = seed
        self.is_stream = isinstance(images, ShardDataset)
        self.batches: ResumableBatchSampler | None = None
        options: dict[str, Any] = {"batch_size": data.batch_size, "drop_last": True}
        if self.is_stream:
            images.reader.set_loader_cfg(num_workers=data.workers)
        else:
            check_update_size(len(images), data, distributed, accum_steps)
            self.batches = ResumableBatchSampler(
                len(images), data.batch_size, distributed, accum_steps, augment.aug_repeats, seed
            )
            options = {"batch_sampler": self.batches}
        # Workers that read shards start again in each epoch: their shuffling must depend only on the epoch.
        self.generator = torch.Generator()
        self.loader = _create_loader(
            images,
            data.workers,
            data_config,
            distributed.device,
            dtype,
            keep_workers=not self.is_stream,
            generator=self.generator,
            **options,
        )
        self.steps = len(self.loader) // accum_steps * accum_steps

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yields the batches of an epoch: images (B, C, H, W) and class numbers (B,)."""
        self.generator.manual_seed(self.seed + epoch)
        if self.batches is not None:
            self.batches.epoch, self.batches.first_step = epoch, first_step
            yield from self.loader
            return
        self.images.set_epoch(epoch)
        for step, batch in enumerate(self.loader):
            if step >= self.steps:
                break
            if step >= first_step:  # a stream can only be read from its beginning
                yield batch


def create_val_loader(
    images: Any,
    data: DataConfig,
    data_config: dict[str, Any],
    distributed: Distributed,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """Returns a loader of this process's share of the validation images, in order.

    Args:
        images: Validation set of `open_images`. Its transform is set.
        data: Batch size and workers.
        data_config: timm's preprocessing settings.
        distributed: The processes that share the images. Their shares differ in size by at most one image.
        dtype: Precision of the images on the device.
    """
    images.transform = _val_transform(data_config)
    options: dict[str, Any] = {"batch_size": data.validation_batch_size or data.batch_size}
    if isinstance(images, ShardDataset):
        images.reader.set_loader_cfg(num_workers=data.workers)
    else:
        options["sampler"] = range(distributed.rank, len(images), distributed.size)
    return _create_loader(images, data.workers, data_config, distributed.device, dtype, **options)


def _create_loader(
    images: Any,
    workers: int,
    data_config: dict[str, Any],
    device: torch.device,
    dtype: torch.dtype,
    *,
    keep_workers: bool = True,
    generator: torch.Generator | None = None,
    **options: Any,
) -> Any:
    loader = DataLoader(
        images,
        num_workers=workers,
        collate_fn=fast_collate,
        pin_memory=device.type == "cuda",
        persistent_workers=keep_workers and workers > 0,
        worker_init_fn=ignore_signals_in_worker,
        generator=generator or torch.Generator(),  # the loader must not change the random state of the training
        **options,
    )
    return PrefetchLoader(
        loader,
        mean=data_config["mean"],
        std=data_config["std"],
        channels=data_config["input_size"][0],
        device=device,
        img_dtype=dtype,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Transforms


def _train_transform(augment: AugmentConfig, data_config: dict[str, Any]) -> Any:
    options = {
        "no_aug": augment.no_aug,
        "scale": augment.scale,
        "ratio": augment.ratio,
        "hflip": augment.hflip,
        "vflip": augment.vflip,
        "color_jitter": augment.color_jitter,
        "auto_augment": augment.aa,
        "interpolation": data_config["interpolation"] if augment.no_aug else augment.train_interpolation,
    }
    return _create_transform(data_config, is_training=True, **options)


def _val_transform(data_config: dict[str, Any]) -> Any:
    options = {key: data_config[key] for key in ("interpolation", "crop_pct", "crop_mode")}
    return _create_transform(data_config, is_training=False, **options)


def _create_transform(data_config: dict[str, Any], is_training: bool, **options: Any) -> Any:
    patch_posterize()
    try:
        return create_transform(
            data_config["input_size"],
            is_training=is_training,
            mean=data_config["mean"],
            std=data_config["std"],
            use_prefetcher=True,  # images go to the device as bytes and are normalized there
            **options,
        )
    except (ValueError, AssertionError, KeyError, TypeError) as error:
        raise CommandError(
            f"cannot create the image transform: {reason(error)}; check --aa and the other image flags"
        ) from error

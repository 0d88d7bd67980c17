"""Images with annotations: reading, augmentation and batches, for any task."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.ImageFile import ImageFile
from torch.utils.data import DataLoader, Dataset, Sampler

from stvit.images import READERS, UnreadableImageError, convert_image, open_image

from .bad_images import MAX_BAD_IN_A_ROW, MAX_PIXELS, BadImages, describe_problem
from .cli import CommandError, OneProcessError, reason
from .config import LoadingConfig
from .distributed import Distributed
from .random_state import seeded_random
from .signals import ignore_signals_in_worker

# (epoch, place in the epoch, index) of an image in training.
TrainKey = tuple[int, int, int]


class ExampleError(ValueError):
    """Raised by a transform if an image and its annotations contradict each other."""


class ExampleDataset(Dataset):
    """Images and targets of a source, opened by `stvit.images`.

    The next image replaces an unreadable training image. An unreadable validation image gives None.

    Attributes:
        transform: Makes an example of an image and its target, set by the task.
        bad_images: Records images that cannot be read.
    """

    def __init__(self, source: Any, mode: str = "RGB", seed: int = 0) -> None:
        """Wraps a source.

        Args:
            source: Sequence of pairs of an image and its target. The image is a PIL image, a path or an open file.
            mode: Pillow mode of the images, L or RGB.
            seed: Seed of the augmentation.
        """
        self.source = source
        self.mode = mode
        self.seed = seed
        self.transform: Any = None
        self.bad_images = BadImages()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: int | TrainKey) -> Any:
        """Returns an example.

        The key is an index, or (epoch, place in the epoch, index) in training. The augmentation depends only on the
        seed, the epoch and the place. So it is the same with any number of processes and workers, and in a resumed run.
        """
        if not isinstance(key, tuple):
            image, target = self.read(key)
            return self.unreadable(key) if image is None else self._apply_transform(image, target, key)
        epoch, place, index = key
        for offset in range(MAX_BAD_IN_A_ROW):
            image, target = self.read((index + offset) % len(self))
            if image is not None:
                with seeded_random(self.seed, epoch, place):
                    return self._apply_transform(image, target, index + offset)
        raise OneProcessError(
            f"{MAX_BAD_IN_A_ROW} images in a row cannot be read, the last one is "
            f"{self.name((index + offset) % len(self))}; check the disk or network drive"
        )

    def read(self, index: int) -> tuple[Image.Image | None, Any]:
        """Returns an image and its target.

        For an unreadable image that may be skipped, it returns (None, -1).
        """
        given: Any = None
        try:
            given, target = self.source[index]
            # A file that another library opened and has not decoded yet.
            if isinstance(given, ImageFile) and type(given) not in READERS.values():
                raise UnreadableImageError(f"not an image of a supported format ({', '.join(READERS)})")
            if isinstance(given, Image.Image):
                return convert_image(given, self.mode), target
            return open_image(given, self.mode, MAX_PIXELS), target
        except CommandError:  # does not concern only this image
            raise
        except Exception as error:  # damaged images raise nearly every exception
            self.bad_images.add(given if isinstance(given, str) else self.name(index), describe_problem(error))
        return None, -1

    def example(self, image: Image.Image, target: Any) -> Any:
        """Returns the example of an image and its target."""
        return self.transform(image, target)

    def unreadable(self, index: int) -> Any:
        """Returns what takes the place of an unreadable validation image."""
        return None

    def _apply_transform(self, image: Image.Image, target: Any, index: int) -> Any:
        try:
            return self.example(image, target)
        except CommandError:
            raise
        except ExampleError as error:
            raise OneProcessError(f"image {self.name(index % len(self))}: {error}") from error
        except Exception as error:
            raise OneProcessError(
                f"cannot transform image {self.name(index % len(self))}: {reason(error)}; check the augmentation flags"
            ) from error

    def name(self, index: int) -> str:
        """Returns the path of an image, or its number if it has no path."""
        name = self.source.filename(index, absolute=True) if hasattr(self.source, "filename") else None
        return name or f"number {index}"


class ResumableBatchSampler(Sampler[list[TrainKey]]):
    """Batches of one process, from any step of any epoch on.

    A batch is a list of keys of `ExampleDataset`. The order of an epoch depends only on the seed and the epoch. Its
    images are distributed first to the steps, then to the processes of a step. So an update has the same images,
    however many processes and steps share it. Images that do not fill an update are left out.

    Attributes:
        steps: Steps of an epoch.
        epoch: Epoch to iterate over.
        first_step: Step to begin with.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        distributed: Distributed,
        accum_steps: int = 1,
        repeats: int = 1,
        seed: int = 0,
        groups: Sequence[int] | None = None,
    ) -> None:
        """Computes the number of steps.

        Args:
            length: Number of images.
            batch_size: Images per step and process.
            distributed: The processes that share each step.
            accum_steps: Steps per update.
            repeats: Views of an image in a row, each augmented differently (repeated augmentation, Hoffer et al. 2020).
                An epoch keeps its length, so it has fewer different images.
            seed: Seed of the order.
            groups: Group of each image, such as its aspect ratio. The images of an update are of one group, if there
                are enough of them; None for no groups.
        """
        self.length = length
        self.batch_size = batch_size
        self.rank, self.world_size = distributed.rank, distributed.size
        self.repeats = repeats
        self.seed = seed
        self.groups = None if groups is None else torch.as_tensor(groups)
        self.update_size = batch_size * distributed.size * accum_steps
        self.steps = length // self.update_size * accum_steps
        self.epoch = 0
        self.first_step = 0

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[TrainKey]]:
        generator = torch.Generator().manual_seed(
            int(np.random.SeedSequence([self.seed, self.epoch]).generate_state(1)[0])
        )
        order = torch.randperm(self.length, generator=generator)
        order = order.repeat_interleave(self.repeats)[: self.length]
        if self.groups is not None:
            order = self._sort_into_updates(order, generator)
        size = self.batch_size * self.world_size
        for step in range(self.first_step, self.steps):
            places = range(step * size + self.rank, (step + 1) * size, self.world_size)
            yield [(self.epoch, place, int(order[place])) for place in places]

    def _sort_into_updates(self, order: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Returns an order of the images in which most updates have images of one group."""
        assert self.groups is not None
        whole, rest = [], []
        for group in self.groups.unique():
            images = order[self.groups[order] == group]
            end = len(images) // self.update_size * self.update_size
            whole += list(images[:end].split(self.update_size))
            rest.append(images[end:])
        # The images that are left over in each group keep their order, so that neighbors have similar shapes.
        leftover = torch.cat(rest)
        end = len(leftover) // self.update_size * self.update_size
        updates = [*whole, *leftover[:end].split(self.update_size)]
        shuffled = torch.randperm(len(updates), generator=generator).tolist()
        return torch.cat([*(updates[index] for index in shuffled), leftover[end:]])


class ExampleLoader:
    """Training batches of any task, from any step of any epoch on.

    Attributes:
        steps: Steps of an epoch, a multiple of the steps per update.
        is_stream: Whether images are read in sequence: never.
    """

    is_stream = False

    def __init__(
        self,
        dataset: ExampleDataset,
        data: LoadingConfig,
        distributed: Distributed,
        collate: Callable[[list[Any]], Any],
        *,
        accum_steps: int = 1,
        seed: int = 42,
        groups: Sequence[int] | None = None,
    ) -> None:
        """Creates the loader.

        Args:
            dataset: Training set, with its transform.
            data: Batch size and workers.
            distributed: The processes that share each step.
            collate: Makes a batch of a list of examples.
            accum_steps: Steps per update.
            seed: Seed of the order.
            groups: Group of each image, see `ResumableBatchSampler`.

        Raises:
            CommandError: If there are fewer images than an update needs.
        """
        check_update_size(len(dataset), data, distributed, accum_steps)
        self.batches = ResumableBatchSampler(
            len(dataset), data.batch_size, distributed, accum_steps, seed=seed, groups=groups
        )
        self.steps = self.batches.steps
        self.loader = _create_loader(dataset, data, distributed, collate, keep_workers=True, batch_sampler=self.batches)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Any]:
        """Yields the batches of an epoch."""
        self.batches.epoch, self.batches.first_step = epoch, first_step
        yield from self.loader


def create_example_val_loader(
    dataset: ExampleDataset,
    data: LoadingConfig,
    distributed: Distributed,
    collate: Callable[[list[Any]], Any],
) -> DataLoader[Any]:
    """Returns a loader of this process's share of the validation images, in order.

    Args:
        dataset: Validation set, with its transform.
        data: Batch size and workers.
        distributed: The processes that share the images. Their shares differ in size by at most one image.
        collate: Makes a batch of a list of examples, without those that are None.
    """
    return _create_loader(
        dataset,
        data,
        distributed,
        collate,
        batch_size=data.validation_batch_size or data.batch_size,
        sampler=range(distributed.rank, len(dataset), distributed.size),
    )


def check_update_size(images: int, data: LoadingConfig, distributed: Distributed, accum_steps: int) -> None:
    """Checks that there are as many images as an update takes.

    Raises:
        CommandError: If there are fewer.
    """
    update = data.batch_size * distributed.size * accum_steps
    if images < update:
        raise CommandError(
            f"an update takes {update} images (--batch-size {data.batch_size}"
            + (f" x {distributed.size} processes" if distributed.size > 1 else "")
            + (f" x --grad-accum-steps {accum_steps}" if accum_steps > 1 else "")
            + f"), but there are only {images} training images; lower --batch-size"
        )


def _create_loader(
    dataset: ExampleDataset,
    data: LoadingConfig,
    distributed: Distributed,
    collate: Callable[[list[Any]], Any],
    keep_workers: bool = False,
    **options: Any,
) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        num_workers=data.workers,
        collate_fn=collate,
        pin_memory=distributed.device.type == "cuda",
        persistent_workers=keep_workers and data.workers > 0,
        worker_init_fn=ignore_signals_in_worker,
        generator=torch.Generator(),  # the loader must not change the random state of the training
        **options,
    )

"""State of a training run: saved to checkpoints, and resumed exactly."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.utils import random_seed, unwrap_model

from .checkpoint import load_checkpoint
from .cli import CommandError, reason
from .config import TrainConfig
from .distributed import Distributed
from .fingerprint import find_changes, find_fingerprint_mismatch, keep_contents
from .flags import to_recipe
from .job import Job, StepResult
from .optimization import current_lr, resume_schedule, schedule_state
from .random_state import get_random_state, set_random_state
from .runs import recipe_key
from .structure import find_mismatch, find_optimizer_mismatch


@dataclass
class Progress:
    """Training progress saved in each checkpoint.

    Attributes:
        epoch: Epochs done, including their evaluations.
        step: Updates done in the next epoch.
        loss_sum: Sum of the losses of this process's images in that epoch.
        images: Number of those images.
        counts: Other counts of those images, by the names in `Job.counts`.
        losses: Sums of the parts of the loss of those images, by the names in `Job.losses`.
        history: Metrics of each epoch done.
        best: Epoch, metric and kind of weights ("", "EMA") of the best evaluation.
        wandb_id: Weights & Biases run.
    """

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    images: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    best: list[Any] = field(default_factory=lambda: [-1, -1.0, ""])
    wandb_id: str | None = None

    def begin_epoch(self) -> None:
        """Resets the sums of the previous epoch."""
        self.step = self.images = 0
        self.loss_sum = 0.0
        self.counts = dict.fromkeys(self.counts, 0)
        self.losses = dict.fromkeys(self.losses, 0.0)

    def sums(self) -> dict[str, Any]:
        """Returns the sums over this process's images of the epoch."""
        return {"loss_sum": self.loss_sum, "images": self.images, **self.counts, **self.losses}

    def load_sums(self, values: Mapping[str, Any]) -> None:
        """Loads sums that `sums` returned."""
        self.loss_sum, self.images = values["loss_sum"], values["images"]
        self.counts = {name: values[name] for name in self.counts}
        self.losses = {name: values[name] for name in self.losses}

    def to_dict(self) -> dict[str, Any]:
        """Returns the progress for a checkpoint, with the sums beside the other values."""
        values = dict(vars(self))
        return values | values.pop("counts") | values.pop("losses")

    def load(self, values: dict[str, Any]) -> None:
        """Loads what `to_dict` returned."""
        for name in vars(self).keys() - {"counts", "losses"}:
            setattr(self, name, values[name])
        self.load_sums(values)


class EpochSums:
    """Sums over the images of an epoch, on the device.

    Reading them waits for the device.
    """

    def __init__(self, progress: Progress, device: torch.device) -> None:
        self._progress = progress
        dtype = torch.float64 if device.type != "mps" else torch.float32
        self._loss = torch.tensor(progress.loss_sum, dtype=dtype, device=device)
        self._counts = {name: torch.tensor(value, device=device) for name, value in progress.counts.items()}
        self._losses = {
            name: torch.tensor(value, dtype=dtype, device=device) for name, value in progress.losses.items()
        }

    def add(self, result: StepResult) -> None:
        """Adds the result of a step."""
        self._loss += result.loss.detach() * result.images
        for name in self._counts:
            self._counts[name] += result.counts[name]
        for name in self._losses:
            self._losses[name] += result.losses[name].detach() * result.images
        self._progress.images += result.images

    def store(self) -> None:
        """Copies the sums to the progress."""
        self._progress.loss_sum = self._loss.item()
        self._progress.counts = {name: int(value) for name, value in self._counts.items()}
        self._progress.losses = {name: value.item() for name, value in self._losses.items()}


class TrainState:
    """Everything in a run that changes, saved to and restored from checkpoints.

    Attributes:
        progress: Epochs and updates done, and their results.
        optimizer: The optimizer.
        scheduler: The learning rate schedule, or None.
        scaler: The loss scaler for float16, or None.
        changes: Changes of the images since the checkpoint, with which the run continues.
        former_epochs: Number of epochs in the checkpoint, if this command changes it.
    """

    def __init__(
        self,
        job: Job,
        config: TrainConfig,
        distributed: Distributed,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        scaler: Any,
        fingerprint: dict[str, Any],
    ) -> None:
        self.job, self.config, self.distributed = job, config, distributed
        self.optimizer, self.scheduler, self.scaler = optimizer, scheduler, scaler
        self.fingerprint = fingerprint
        self.updates = job.train_loader.steps // config.optim.grad_accum_steps
        self.progress = Progress(counts=dict.fromkeys(job.counts, 0), losses=dict.fromkeys(job.losses, 0.0))
        self.changes: list[str] = []
        self.former_epochs: int | None = None

    @property
    def update(self) -> int:
        """Updates done, over all epochs."""
        return self.progress.epoch * self.updates + self.progress.step

    @property
    def ema_model(self) -> Any:
        """The moving average of the model; None if there is none."""
        return unwrap_model(self.job.task.get_trainable_module(ema=True)) if self.job.task.has_ema() else None

    def update_images(self) -> int:
        """Returns the images per update, over all processes."""
        return self.config.data.batch_size * self.config.optim.grad_accum_steps * self.distributed.size

    def state_dict(self) -> dict[str, Any]:
        """Returns the contents of a checkpoint. Every process must call this."""
        processes = self.distributed.gather(self._process_state())
        return self._shared_state() | {"processes": processes}

    def _process_state(self) -> dict[str, Any]:
        """Returns the state that differs between processes."""
        return {"random": get_random_state(self.distributed.device), **self.progress.sums()}

    def _shared_state(self) -> dict[str, Any]:
        """Returns the state that is the same in all processes."""
        state = {
            "progress": self.progress.to_dict(),
            "recipe": recipe_key(to_recipe(self.config)),
            "update_images": self.update_images(),
            "images": self._image_counts(),
            "data": self.fingerprint,
            "model": self.job.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": schedule_state(self.scheduler),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
        }
        if self.ema_model is not None:
            state["model_ema"] = self.ema_model.state_dict()
        return state

    def _image_counts(self) -> list[int]:
        return [len(self.job.images.train), len(self.job.images.val)]

    # Resume

    def resume(self, path: Path) -> None:
        """Loads a checkpoint.

        Raises:
            CommandError: If the checkpoint is damaged or belongs to another run.
        """
        state = load_checkpoint(path)
        mismatch = self._find_mismatch(state)
        if mismatch is not None:
            raise CommandError(
                f"{path} does not fit this run: {mismatch}; resume from another checkpoint (--resume PATH), or start a "
                "new run with another --experiment (to start from its weights, pass --pretrained-path)"
            )
        if state["update_images"] != self.update_images():
            raise CommandError(
                f"{path} belongs to a run with {state['update_images']} images per update, but this one has "
                f"{self.update_images()}; make processes x --batch-size x --grad-accum-steps the same"
            )
        self.changes = self._check_changes(state, path)
        try:
            self._load(state)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise CommandError(f"{path} does not fit this run: {reason(error)}") from error
        progress = self.progress
        self.distributed.print_primary(f"resuming {path}: {progress.epoch} epochs and {progress.step} updates are done")

    def _load(self, state: dict[str, Any]) -> None:
        self.job.model.load_state_dict(state["model"])
        if self.ema_model is not None:
            self.ema_model.load_state_dict(state["model_ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        progress = self.progress
        progress.load(state["progress"])
        if progress.step > self.updates:
            # Changed images may be fewer, and the length of a stream depends on the number of workers.
            if not self.changes and not self.job.train_loader.is_stream:
                raise ValueError(f"progress.step is {progress.step}, of {self.updates} updates")
            progress.step = self.updates
        self._load_schedule(state)
        self._load_process(state["processes"])

    def _load_schedule(self, state: dict[str, Any]) -> None:
        then, now = state["recipe"]["epochs"], self.config.optim.epochs
        before = current_lr(self.optimizer)
        is_same = then == now and not self.changes
        resume_schedule(self.scheduler, state["scheduler"], is_same, self.progress.epoch, self.update)
        if then == now:
            return
        self.former_epochs = then
        after = current_lr(self.optimizer)
        self.distributed.print_primary(
            f"{'extending' if now > then else 'shortening'} the run from {then} to {now} epochs: the learning rate "
            f"continues at {after:.4g}"
            + (
                f" (with the {self.config.optim.sched} schedule for {then} epochs it was {before:.4g})"
                if after != before
                else ""
            )
        )

    def _load_process(self, processes: list[dict[str, Any]]) -> None:
        """Loads the state of this process, also from another number of processes."""
        progress, rank = self.progress, self.distributed.rank
        if len(processes) == self.distributed.size:
            own = processes[rank]
            set_random_state(own["random"], self.distributed.device)
            progress.load_sums(own)
            return
        # The data stay the same. Random numbers that each process draws (dropout, mixup, …) cannot.
        progress.load_sums(
            {name: sum(process[name] for process in processes) if rank == 0 else 0 for name in progress.sums()}
        )
        random_seed(self.config.run.seed + self.update, rank)
        self.distributed.print_primary(
            f"resuming with {self.distributed.size} processes a run of {len(processes)} processes"
        )

    def _find_mismatch(self, state: dict[str, Any]) -> str | None:
        """Returns the first structural difference to the state of this run, or None."""
        like = self._shared_state()
        for key in ("recipe", "optimizer", "data"):  # compared below and in `find_run`
            del like[key]
        mismatch = find_mismatch(state, {**like, "processes": []})
        mismatch = mismatch or find_optimizer_mismatch(state.get("optimizer"), self.optimizer)
        if mismatch is None and "data" in state:  # checkpoints of earlier versions have none
            mismatch = find_fingerprint_mismatch(state["data"])
        if mismatch is not None:
            return mismatch
        own = self._process_state()
        own["random"] = get_random_state(torch.device("cpu"))  # a run may continue on another device
        own["random"]["python"][2] = None  # a number or None
        for i, process in enumerate(state["processes"]):
            mismatch = find_mismatch(process, own, f"processes[{i}]")
            if mismatch is not None:
                return mismatch
        return self._find_wrong_progress(state)

    def _find_wrong_progress(self, state: dict[str, Any]) -> str | None:
        """Returns an impossible value in the progress of a state, or None."""
        progress, processes = state["progress"], state["processes"]
        epoch, step, history = progress["epoch"], progress["step"], progress["history"]
        if not processes:
            return "processes is empty"
        if min(epoch, step, *(process["images"] for process in processes)) < 0:
            return "progress is negative"
        if (step > 0) != (sum(process["images"] for process in processes) > 0):
            return f"progress.step is {step}, but the processes have seen {'no' if step else 'some'} images since"
        metrics = ["train_loss", *(f"train_{name}" for name in (*self.job.counts.values(), *self.job.losses))]
        metrics.append(f"eval_{self.job.best_metric}")
        measured = {"epoch": 0, **dict.fromkeys(metrics, 0.0)}
        if len(history) != epoch:
            return f"progress.history has {len(history)} epochs, expected {epoch}"
        for i, row in enumerate(history):
            mismatch = find_mismatch(row, measured, f"progress.history[{i}]")
            mismatch = mismatch or find_mismatch(row, dict.fromkeys(history[0], 0.0), f"progress.history[{i}]")
            if mismatch is not None or len(row) != len(history[0]):
                return mismatch or f"progress.history[{i}] has other columns than the first row"
        return None

    def _check_changes(self, state: dict[str, Any], path: Path) -> list[str]:
        """Returns how the images have changed since the checkpoint.

        Raises:
            CommandError: If they have changed without --allow-changed-data.
        """
        if "data" in state:
            changes = find_changes(state["data"], self.fingerprint)
            keep_contents(state["data"], self.fingerprint)
        else:
            kinds = zip(("training", "validation"), state["images"], self._image_counts(), strict=True)
            changes = [f"{kind} images: {old}, now {new}" for kind, old, new in kinds if old != new]
            self.distributed.print_primary(
                f"{path} was written by an earlier version, which did not record the names of images and classes; make "
                "sure that they have not changed"
            )
        if changes and not self.config.run.allow_changed_data:
            raise CommandError(
                f"the images have changed since {path} was written ({'; '.join(changes)}), so results would mix both "
                "datasets, and class names could be wrong; restore the images, start a new run with another "
                "--experiment (to start from the weights of this one, pass --pretrained-path), or pass "
                "--allow-changed-data to continue with the current images and names"
            )
        for change in changes:
            self.distributed.print_primary(f"continuing with changed data: {change}")
        return changes

"""The training engine: everything in a training that no task changes.

A training command opens a session, prepares a `Job` in it, and trains it:

    with open_session(config) as session:
        with session.preparing():
            engine = Engine(session, config, create_job(config, session.distributed))
        engine.train()
"""

import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from safetensors import SafetensorError
from timm.layers.norm_act import convert_sync_batchnorm
from timm.utils import NativeScaler, distribute_bn, random_seed
from torch import nn

from .bad_images import BadImages
from .checkpoint import Checkpoints
from .cli import CommandError, Interrupted, progress_bar, reason
from .config import TrainConfig
from .distributed import DTYPES, Distributed, check_dtype, join_processes
from .files import atomic_replace_dir, remove_tree
from .fingerprint import fingerprint
from .flags import to_recipe
from .job import Job, SavedWeights
from .locks import PathLock
from .logs import RunLog, has_matplotlib, require_loggers
from .optimization import (
    backward,
    create_optimizer,
    current_lr,
    find_schedule_problems,
    learning_rate,
    zero_gradients,
)
from .runs import check_hub, check_remote_run, check_run_folder, find_run, write_recipe
from .signals import StopNow, StopRequest
from .snapshots import Snapshots
from .state import EpochSums, TrainState

# A signal ends the run within about a second. If images do not arrive, it ends after this time.
PATIENCE_S = 3.0


class _Stopped(Exception):
    """Raised between updates after a signal in any process.

    The state is complete then.
    """

    def __init__(self, stop: StopRequest) -> None:
        self.signum = stop.signum or signal.SIGTERM  # another process may have received the signal
        super().__init__("interrupted" if self.signum == signal.SIGINT else "terminated")


# ---------------------------------------------------------------------------------------------------------------------
# Session


@dataclass
class Session:
    """Resources of a training command, released at its end.

    Attributes:
        distributed: The processes of the run.
        stop: Signals that ask the run to stop.
        lock: Lock of the run directory, acquired by the primary process.
    """

    distributed: Distributed
    stop: StopRequest
    lock: PathLock

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """Context of the work before the training, which a signal ends immediately.

        Raises:
            Interrupted: If a signal is received.
        """
        try:
            with self.stop.at_once():
                yield
        except StopNow:
            stopped = _Stopped(self.stop)
            raise Interrupted(f"{stopped} before the training started", stopped.signum) from None


@contextmanager
def open_session(config: TrainConfig) -> Iterator[Session]:
    """Joins the processes of a run, and handles signals until its end.

    Raises:
        CommandError: If the device cannot be used, a flag contradicts it, or a logger is not installed.
    """
    require_loggers(config.run.log_tensorboard, config.run.wandb_project if config.run.log_wandb else None)
    device = config.device
    with join_processes(device.device, device.dist_backend) as distributed, StopRequest() as stop, PathLock() as lock:
        yield Session(distributed, stop, lock)


def check_config(config: TrainConfig, distributed: Distributed) -> None:
    """Checks flags that every training has, and seeds the random generators.

    Raises:
        CommandError: If the device or the number of processes does not support a flag, or --output cannot be written.
    """
    check_dtype(distributed.device, config.device.model_dtype)
    if config.optim.sync_bn and (distributed.size == 1 or distributed.device.type == "cpu"):
        raise CommandError("--sync-bn needs several processes (torchrun), each with a GPU; remove --sync-bn")
    distributed.on_primary(partial(check_run_folder, config.run))
    distributed.on_primary(partial(check_hub, config.run.repo_id))
    random_seed(config.run.seed)


def prepare_model(model: nn.Module, config: TrainConfig, distributed: Distributed) -> nn.Module:
    """Moves a model to the device, in the precision and memory format of the flags."""
    model = model.to(device=distributed.device, dtype=DTYPES[config.device.model_dtype])
    if config.device.channels_last:
        model = model.to(memory_format=torch.channels_last)
    return convert_sync_batchnorm(model) if config.optim.sync_bn else model


def check_compiler(device: torch.device) -> None:
    """Compiles a small function.

    Raises:
        CommandError: If torch.compile does not work, for example because Windows has no C++ compiler.
    """
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except Exception as error:  # missing compilers, missing Triton, incompatible versions
        why = reason(error)
        raise CommandError(
            f"--compile: torch.compile does not work here ({why if len(why) <= 300 else f'{why[:300]}…'}); install a "
            "C++ compiler (and Triton for GPUs), or remove --compile"
        ) from error


# ---------------------------------------------------------------------------------------------------------------------
# Training


class Engine:
    """Trains a job: epochs, evaluation, checkpoints, logs and uploads.

    Attributes:
        folder: The run directory.
        state: Everything that checkpoints contain.
    """

    def __init__(self, session: Session, config: TrainConfig, job: Job) -> None:
        """Creates the optimizer, finds the run directory, and resumes if asked to.

        Args:
            session: Processes, signals and lock.
            config: Settings of the command. A learning rate of None is replaced by its value.
            job: The task to train.

        Raises:
            CommandError: If flags are wrong, the run directory is in use, or the checkpoint does not fit.
        """
        distributed, device = session.distributed, session.distributed.device
        self.session, self.config, self.job, self.distributed = session, config, job, distributed
        optim, run = config.optim, config.run
        self.updates = job.train_loader.steps // optim.grad_accum_steps
        if self.updates == 0:
            raise CommandError(
                f"the training set is smaller than one update ({len(job.images.train)} images, batch size "
                f"{config.data.batch_size}); lower --batch-size or --workers"
            )
        optim.lr = learning_rate(optim, config.data.batch_size, distributed.size)
        optimizer, scheduler = create_optimizer(optim, job.model, self.updates)
        for problem in find_schedule_problems(optim, self.updates) if distributed.is_primary else ():
            print(f"warning: {problem}", file=sys.stderr)
        scaler = NativeScaler(device.type) if config.device.amp and config.device.amp_dtype == "float16" else None
        if optim.model_ema:
            job.task.setup_ema(optim.model_ema_decay, use_warmup=optim.model_ema_warmup)
        # The compiled model replays its forward and its backward pass as CUDA graphs. The evaluation is not compiled.
        self.has_graphs = config.device.compile and device.type == "cuda"
        self.keep_gradients = self.has_graphs and optim.grad_accum_steps > 1
        if config.device.compile:
            check_compiler(device)
            job.task.compile(mode="reduce-overhead" if self.has_graphs else None)
        if distributed.size > 1:
            job.task.prepare_distributed(device_ids=[device] if device.type == "cuda" else None)
        job.check_data()
        data = distributed.on_primary(partial(fingerprint, job.images))
        self.state = TrainState(job, config, distributed, optimizer, scheduler, scaler, data)

        recipe = to_recipe(config)
        self.folder, resumed = distributed.on_primary(partial(find_run, run, recipe, job.label, session.lock))
        distributed.on_primary(partial(check_remote_run, run.repo_id, recipe, is_resumed=resumed is not None))
        self.checkpoints = Checkpoints(self.folder / "checkpoints", run.checkpoint_epochs)
        random_seed(run.seed, distributed.rank)
        if resumed is not None:
            self.state.resume(resumed)
        self.bad_images = BadImages(config.data.max_bad_images, self.folder / "bad_images.jsonl")
        job.images.train.bad_images = job.images.val.bad_images = self.bad_images
        self.log: RunLog | None = None
        self.snapshots: Snapshots | None = None

    def train(self) -> None:
        """Trains to the last epoch.

        Raises:
            Interrupted: If a signal ended the run. A checkpoint is saved.
            CommandError: If the data, the loss or the disk fails.
        """
        progress, epochs = self.state.progress, self.config.optim.epochs
        if progress.epoch >= epochs:
            self._finish_again()
            return
        self._open_records()
        self._print_start()
        self.bar = progress_bar(epochs * self.updates, "step", self.distributed.is_primary, self.state.update)
        try:
            with self.bar:
                while progress.epoch < epochs:
                    self._train_epoch()
                    self._finish_epoch()
                    self._save_checkpoint()
                    if self.snapshots is not None:
                        self.snapshots.after_epoch(progress.epoch)
            if self.snapshots is not None:
                self.snapshots.finish(progress.epoch)
        except _Stopped as stopped:
            self._save_checkpoint()
            if self.snapshots is not None:
                self.snapshots.abandon()
            place = f"epoch {progress.epoch}, update {progress.step} of {self.updates}"
            raise Interrupted(
                f"{stopped}; saved after {place}: to continue, run the same command with --resume auto", stopped.signum
            ) from stopped
        finally:
            if self.log is not None:
                self.log.close()
        self._print_end()

    # One epoch

    def _train_epoch(self) -> None:
        """Does the remaining updates of an epoch."""
        progress, run = self.state.progress, self.config.run
        if progress.step == self.updates:  # resumed before the evaluation
            return
        self.job.task.train()
        if self.config.optim.bn_eval:
            freeze_batch_norm(self.job.model)
        self.job.begin_epoch(progress.epoch)
        zero_gradients(self.state.optimizer, self.keep_gradients)
        sums = EpochSums(progress, self.distributed.device)
        speed = _Speed(progress.images, self.distributed.size)
        batches = self.job.train_loader.epoch(progress.epoch, progress.step * self.config.optim.grad_accum_steps)
        try:
            while progress.step < self.updates and self._update(batches, sums):
                self.bar.update()
                is_logged = progress.step % run.log_interval == 0 or progress.step == self.updates
                is_saved = run.checkpoint_steps and progress.step % run.checkpoint_steps == 0
                if is_logged:
                    sums.store()
                    self._log_step(speed.measure(progress.images))
                if is_saved and progress.step < self.updates:
                    sums.store()
                    self._save_checkpoint()
                self._check_stop(is_logged)
        except _Stopped:
            sums.store()
            raise
        if progress.images == 0:
            raise CommandError("the training set contains no complete batch; lower --batch-size or --workers")
        sums.store()
        progress.step = self.updates
        if self._saves_before_evaluation():
            self._save_checkpoint()

    def _update(self, batches: Iterator[Any], sums: EpochSums) -> bool:
        """Does one update. Returns False if the batches ended before it was complete."""
        optim, state, job = self.config.optim, self.state, self.job
        for micro_step in range(1, optim.grad_accum_steps + 1):
            is_last = micro_step == optim.grad_accum_steps
            # Within an update the state is incomplete, so only its first step can be stopped.
            batch = self._read(batches, can_stop=micro_step == 1)
            if batch is None:  # a stream may be shorter than its description says
                return False  # the next epoch begins with gradients of zero
            if self.has_graphs:
                torch.compiler.cudagraph_mark_step_begin()  # no result of the previous step is used any more
            with nullcontext() if is_last else job.task.no_sync():
                result = job.step(batch, is_first=state.progress.step == 0)
                loss = result.loss / optim.grad_accum_steps
                clipped = job.task.get_clip_parameters(exclude_head=optim.clip_mode == "agc")
                backward(loss, state.optimizer, optim, clipped, state.scaler, is_last, self.keep_gradients)
            sums.add(result)
        state.progress.step += 1
        job.task.update_ema(step=state.update)
        if state.scheduler is not None:
            state.scheduler.step_update(state.update)
        return True

    def _read(self, batches: Iterator[Any], can_stop: bool = True) -> Any:
        """Returns the next batch; None at the end.

        Raises:
            _Stopped: If a signal is received and `can_stop`, even while images do not arrive.
        """
        try:
            # If one process stopped while the others continue, they would wait for it.
            with self.session.stop.at_once(can_stop and self.distributed.size == 1, PATIENCE_S):
                return next(batches, None)
        except StopNow:
            raise _Stopped(self.session.stop) from None

    def _check_stop(self, is_logged: bool) -> None:
        """Raises _Stopped after a signal.

        Several processes must agree on it. They do so only when they log, to save messages.
        """
        is_stopped = bool(self.session.stop)
        if self.distributed.size > 1:
            is_stopped = is_logged and self.distributed.any(is_stopped)
        if is_stopped:
            raise _Stopped(self.session.stop)

    def _finish_epoch(self) -> None:
        """Evaluates the weights, saves them, and records the results of the epoch."""
        state, progress, job = self.state, self.state.progress, self.job
        row: dict[str, Any] = {"epoch": progress.epoch}
        row |= {f"train_{name}": value for name, value in self._train_metrics().items()}
        models: dict[str, Any] = {"eval": job.model}
        if state.ema_model is not None:
            models["ema"] = state.ema_model
        for prefix, model in models.items():
            if self.distributed.size > 1:
                # DDP, too, uses the primary process's BatchNorm statistics in every forward pass.
                distribute_bn(model, self.distributed.size, reduce=False)
            metrics = self._evaluate(model)
            self._check_loss(metrics.get("loss", 0.0), f"in the validation after epoch {progress.epoch + 1}")
            row |= {f"{prefix}_{name}": value for name, value in metrics.items()}
        if state.scheduler is not None:
            state.scheduler.step(progress.epoch + 1, row[f"eval_{job.best_metric}"])
        row["lr"] = current_lr(state.optimizer)

        best = max(models, key=lambda prefix: row[f"{prefix}_{job.best_metric}"])
        best_value = row[f"{best}_{job.best_metric}"]
        is_best = best_value > progress.best[1]
        if self.distributed.is_primary:
            for prefix, model in models.items():
                self._save_weights(model, "last_ema" if prefix == "ema" else "last", prefix, row)
            if is_best:
                self._save_weights(models[best], "best", best, row)
        if is_best:
            progress.best = [progress.epoch, best_value, "EMA" if best == "ema" else ""]
        progress.history.append(row)
        progress.epoch += 1
        progress.begin_epoch()
        if self.log is not None:
            self.log.epoch(state.update, progress.history)
            self.bar.write(self._describe_epoch(row), file=sys.stdout)

    def _saves_before_evaluation(self) -> bool:
        """Returns whether a checkpoint is saved right before the evaluation.

        Several processes cannot stop within an evaluation. In the first epoch, results are written before any
        checkpoint exists: a run that is killed between them must be able to continue.
        """
        return self.distributed.size > 1 or self.state.progress.epoch == 0

    def _evaluate(self, model: nn.Module) -> Mapping[str, float]:
        """Returns the metrics of a model.

        If the evaluation fails, the updates of the epoch are saved first. Those of the first epoch and of several
        processes are saved already.
        """
        job, progress = self.job, self.state.progress
        try:
            return job.evaluate(model, iter(partial(self._read, iter(job.val_loader)), None))
        except _Stopped:  # `train` saves
            raise
        except Exception as error:
            is_saved = self._saves_before_evaluation()
            with suppress(Exception):  # the disk may be full, or the device lost: the first error counts
                if not is_saved:
                    self._save_checkpoint()
                    is_saved = True
            if not is_saved or not isinstance(error, CommandError):
                raise
            saved = f"the updates of epoch {progress.epoch + 1} are saved"
            raise type(error)(f"{error}; {saved}: then run the same command with --resume auto") from error

    # Metrics

    def _train_metrics(self) -> dict[str, float]:
        """Returns mean losses and percentages of the epoch so far, over all processes."""
        progress, device = self.state.progress, self.distributed.device
        dtype = torch.float64 if device.type != "mps" else torch.float32
        sums = progress.sums()
        totals = self.distributed.sum(torch.tensor(list(sums.values()), dtype=dtype, device=device)).tolist()
        sums = dict(zip(sums, totals, strict=True))
        images = sums["images"]
        metrics = {"loss": sums["loss_sum"] / images}
        metrics |= {self.job.counts[name]: 100 * sums[name] / images for name in progress.counts}
        metrics |= {name: sums[name] / images for name in progress.losses}
        self._check_loss(metrics["loss"], f"in epoch {progress.epoch + 1}, at or before step {progress.step}")
        return metrics

    def _check_loss(self, loss: float, when: str) -> None:
        if not math.isfinite(loss):
            raise CommandError(
                f"the loss became {loss} {when}: lower --lr (it is {self.config.optim.lr:g}), increase "
                "--warmup-epochs, or pass --clip-grad 1"
            )

    def _log_step(self, images_per_second: float) -> None:
        progress, metrics = self.state.progress, self._train_metrics()
        self.bar.set_postfix_str(
            f"epoch {progress.epoch + 1}/{self.config.optim.epochs}, {self._format(metrics, digits=1)}, "
            f"{images_per_second:.0f} images/s",
            refresh=False,
        )
        if self.log is not None:
            values = {
                "epoch": progress.epoch,
                "step": progress.step,
                **metrics,
                "lr": current_lr(self.state.optimizer),
                "images_per_second": images_per_second,
            }
            self.log.step(self.state.update, values)

    def _format(self, metrics: Mapping[str, float], prefix: str = "", digits: int = 2) -> str:
        parts = [f"loss {metrics[f'{prefix}loss']:.4f}"] if f"{prefix}loss" in metrics else []
        parts += [
            f"{title} {metrics[prefix + name]:.{digits}f} %"
            for name, title in self.job.titles.items()
            if prefix + name in metrics
        ]
        return ", ".join(parts)

    def _describe_epoch(self, row: dict[str, Any]) -> str:
        ema = f" (EMA {row[f'ema_{self.job.best_metric}']:.2f} %)" if f"ema_{self.job.best_metric}" in row else ""
        return (
            f"epoch {row['epoch'] + 1}/{self.config.optim.epochs}: training {self._format(row, 'train_')}; validation "
            f"{self._format(row, 'eval_')}{ema}"
        )

    # Files

    def _open_records(self) -> None:
        """Writes the recipe, and opens the log and the uploads, in the primary process."""
        if not self.distributed.is_primary:
            return
        run, state, progress = self.config.run, self.state, self.state.progress
        write_recipe(self.folder, to_recipe(self.config))
        self.log = RunLog(
            self.folder,
            titles=self.job.titles,
            tensorboard=run.log_tensorboard,
            wandb_project=run.wandb_project if run.log_wandb else None,
            config=to_recipe(self.config),
            wandb_id=progress.wandb_id,
            start_update=state.update,
        )
        progress.wandb_id = self.log.wandb_id
        self.log.event(
            "resume" if progress.epoch or progress.step else "start",
            {
                "epoch": progress.epoch,
                "step": progress.step,
                "processes": self.distributed.size,
                "torch": torch.__version__,
            },
        )
        if state.changes:
            self.log.event("changed_data", {"changes": state.changes})
        if state.former_epochs is not None:
            lr = current_lr(state.optimizer)
            self.log.event("epochs", {"from": state.former_epochs, "to": self.config.optim.epochs, "lr": lr})
        if run.repo_id:
            self.snapshots = self._create_snapshots(self.log.event)

    def _create_snapshots(self, event: Callable[[str, dict[str, Any]], None]) -> Snapshots:
        run = self.config.run
        return Snapshots(
            str(run.repo_id),
            run.hub_every,
            self.folder,
            run.hub_private,
            write_card=self.job.write_card,
            event=event,
            is_stopped=lambda: bool(self.session.stop),
        )

    def _save_checkpoint(self) -> None:
        """Writes a checkpoint. Every process must call this."""
        state = self.state.state_dict()
        if self.distributed.is_primary:
            self.checkpoints.save(state, self.state.progress.epoch, self.state.progress.step)

    def _save_weights(self, model: nn.Module, name: str, prefix: str, row: dict[str, Any]) -> None:
        """Replaces saved weights atomically.

        Raises:
            CommandError: If they cannot be written. Earlier weights and checkpoints are kept.
        """
        value = float(row[f"{prefix}_{self.job.best_metric}"])
        saved = SavedWeights(row["epoch"] + 1, prefix == "ema", name == "best", value)
        folder = self.folder / name
        fresh = folder.with_name(f"{name}.tmp")
        remove_tree(fresh)
        try:
            self.job.save(model, fresh, saved)
            atomic_replace_dir(fresh, folder)
        except (OSError, SafetensorError) as error:
            remove_tree(fresh)
            raise CommandError(
                f"cannot write the weights to {folder}: {reason(error)}; earlier weights and checkpoints are kept: "
                "free some space, then run the same command with --resume auto"
            ) from error

    # Messages

    def _print_start(self) -> None:
        size, device = self.distributed.size, self.distributed.device.type
        self.distributed.print_primary(
            f"{self.job.description}, on {f'{size} x {device}' if size > 1 else device}; results in {self.folder}"
        )

    def _finish_again(self) -> None:
        """Reports a run that was already complete, and uploads it if necessary."""
        progress, run = self.state.progress, self.config.run
        self.distributed.print_primary(f"{self.folder} is finished: {self.config.optim.epochs} epochs are done")
        if self.distributed.is_primary and self.state.former_epochs is not None:
            write_recipe(self.folder, to_recipe(self.config))
        if self.distributed.is_primary and run.repo_id:
            # Its records do not change, so that files which are on the Hub already are not uploaded again.
            self._create_snapshots(lambda *_: None).finish(progress.epoch)
        self._print_best()

    def _print_end(self) -> None:
        if self.distributed.is_primary:
            if not has_matplotlib():
                print("no curve.png was drawn, because matplotlib is missing: pip install matplotlib")
            bad = len(self.bad_images.names())
            if bad:
                print(f"{bad} images could not be read and were skipped: {self.bad_images.log}")
        self._print_best()

    def _print_best(self) -> None:
        epoch, value, kind = self.state.progress.best
        title = self.job.titles.get(self.job.best_metric, self.job.best_metric)
        best = self.folder / "best"
        self.distributed.print_primary(
            f"best validation {title} {value:.2f} % (epoch {epoch + 1}{', ' + kind if kind else ''}); its weights are "
            f"in {best}:"
        )
        self.distributed.print_primary(self.job.usage(best))


class _Speed:
    """Images per second of all processes, between two calls."""

    def __init__(self, images: int, processes: int) -> None:
        self._since, self._images, self._processes = time.perf_counter(), images, processes

    def measure(self, images: int) -> float:
        """Returns the speed since the last call.

        `images` is the number of this process's images.
        """
        now = time.perf_counter()
        speed = (images - self._images) * self._processes / (now - self._since)
        self._since, self._images = now, images
        return speed


def freeze_batch_norm(model: nn.Module) -> None:
    """Puts all BatchNorm layers into evaluation mode, which keeps their statistics."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm):
            module.eval()

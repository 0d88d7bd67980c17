#!/usr/bin/env python3
"""Trains an image classifier: STViT, or any timm model.

    python tools/train_cls.py --config configs/cls/stvit_pico_digits.yaml
    torchrun --nproc-per-node 8 tools/train_cls.py --config configs/cls/stvit_small_in1k.yaml --data-dir /data/imagenet

    # two machines of eight devices each, the same on both but for --node-rank
    torchrun --nnodes 2 --node-rank 0 --master-addr HOST --nproc-per-node 8 tools/train_cls.py --config … -b 64

`python -m stvit.tools.train_cls` is the same program. Every key of a recipe is a flag too, and a flag on the command
line wins. Data are a folder with train/<class>/* and val/<class>/* images or train.tar and val.tar (--data-dir), or a
named set (--dataset): `sklearn/digits` (shipped with scikit-learn, nothing to download) or timm's `torch/…`, `hfds/…`
and `wds/…`.

Results go to <output>/<experiment>/: config.yaml, the resolved recipe; summary.csv, a line for each epoch; curve.png,
the same drawn; log.jsonl, the same and more for machines; best/ and last/ (and last_ema/), weights (model.safetensors)
and the config.json by which timm loads them; checkpoints/, from which --resume auto goes on after whatever ended the
run.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # during the imports Ctrl-C ends the command without a traceback

import argparse
import itertools
import logging
import math
import os
import re
import shutil
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub.utils import disable_progress_bars
from safetensors import SafetensorError
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.layers import DropPath
from timm.layers.norm_act import convert_sync_batchnorm
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import PlateauLRScheduler, create_scheduler_v2, scheduler_kwargs
from timm.task import ClassificationTask
from timm.utils import NativeScaler, dispatch_clip_grad, distribute_bn, random_seed, unwrap_model
from torch import nn
from tqdm import tqdm

from stvit import hub
from stvit.safe_text import redact_values
from stvit.tools.common.checkpoint import (
    Checkpoints,
    atomic_replace_dir,
    atomic_write,
    find_mismatch,
    find_optimizer_mismatch,
    get_random_state,
    load_checkpoint,
    set_random_state,
)
from stvit.tools.common.cli import (
    CommandError,
    CommandLineSwitch,
    Interrupted,
    KeyValues,
    Parser,
    Switch,
    count,
    load_yaml,
    parse_with_recipe,
    positive,
    progress_bar,
    rate,
    read_utf8,
    reason,
    run,
)
from stvit.tools.common.data import (
    INTERPOLATIONS,
    BadImages,
    TrainLoader,
    add_data_arguments,
    add_image_arguments,
    check_targets,
    create_val_loader,
    open_images,
    resolve_data_config,
)
from stvit.tools.common.evaluation import evaluate
from stvit.tools.common.fingerprint import find_changes, find_fingerprint_mismatch, fingerprint
from stvit.tools.common.locks import InUseError, PathLock
from stvit.tools.common.logs import RunLog, has_matplotlib, require_loggers
from stvit.tools.common.model import check_img_size, create_model, read_weights
from stvit.tools.common.processes import (
    DTYPES,
    StopNow,
    StopRequest,
    World,
    add_device_arguments,
    autocast,
    check_dtype,
    join_world,
)
from stvit.tools.common.snapshots import Snapshots, fetch_run, read_remote_recipe

# A signal ends the run within a second or so, unless images do not arrive: then after so many seconds.
PATIENCE_S = 3.0
# Images (B, C, H, W) and class numbers (B,).
Batch = tuple[torch.Tensor, torch.Tensor]
# File in the folder of a run by which its process locks it; see `PathLock`.
RUN_LOCK = ".stvit.lock"
# Flags that a resumed run may change: they say where and how fast, not what.
RESUME_MUTABLE = {
    "batch_size",
    "checkpoint_epochs",
    "checkpoint_steps",
    "compile",
    "config",
    "data_dir",
    "device",
    "dist_backend",
    "experiment",
    "grad_accum_steps",
    "grad_checkpointing",
    "hub_every",
    "hub_private",
    "repo_id",
    "log_interval",
    "log_tensorboard",
    "log_wandb",
    "max_bad_images",
    "output",
    "resume",
    "validation_batch_size",
    "wandb_project",
    "workers",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status: 0, 1 after an error, 130 after Ctrl-C, 143 after SIGTERM."""
    # Errors are ours to word, once; timm's log of ordinary steps is not for this program's users.
    for library in ("timm", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        disable_progress_bars()
    return run(train, parse_args(argv))


# ---------------------------------------------------------------------------------------------------------------------
# Arguments


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the command line over those of the recipe (`--config`) over the defaults.

    Raises:
        SystemExit: With status 2 and one line on standard error, if a flag or a key is unknown or ill-typed.
    """
    return parse_with_recipe(create_parser, argv)


def create_parser() -> Parser:
    """The flags, under timm's names."""
    parser = Parser(prog="train_cls.py", description="Trains an image classifier: STViT, or any timm model.")
    parser.add_argument("--config", "-c", metavar="FILE", help="recipe (YAML) whose keys are flags of this program")

    group = parser.add_argument_group("data")
    add_data_arguments(group)
    group.add_argument("--train-split", default="train", metavar="NAME", help="split to train on")

    group = parser.add_argument_group("model")
    group.add_argument("--model", default="stvit_small", metavar="NAME", help="model to train, any of timm's")
    group.add_argument("--pretrained", action=Switch, help="start from the published weights")
    group.add_argument("--pretrained-path", metavar="FILE", help="start from these weights, ours or the authors'")
    group.add_argument("--num-classes", type=positive, metavar="N", help="classes (default: those of the data)")
    group.add_argument("--in-chans", type=positive, metavar="N", help="image channels, 1 or 3")
    add_image_arguments(group)
    group.add_argument("--drop", type=rate, default=0.0, metavar="X", help="dropout rate before the classifier")
    group.add_argument("--drop-path", type=rate, metavar="X", help="stochastic depth rate of the last block")
    group.add_argument(
        "--drop-path-schedule",
        nargs="+",
        type=_from_epoch,
        metavar="E:X",
        help="rate X instead from epoch E (0-based) on",
    )
    group.add_argument("--bn-eval", action=Switch, help="keep BatchNorm in evaluation mode: its statistics stay")
    group.add_argument("--sync-bn", action=Switch, help="BatchNorm statistics over all processes (GPUs)")
    group.add_argument("--grad-checkpointing", action=Switch, help="recompute activations, to save memory")
    group.add_argument("--model-kwargs", nargs="*", default={}, action=KeyValues, metavar="K=V", help="more of them")

    group = parser.add_argument_group("optimizer and schedule")
    group.add_argument("--epochs", type=positive, default=300, metavar="N", help="epochs to train")
    group.add_argument(
        "--batch-size", "-b", type=positive, default=128, metavar="N", help="images of a step, of each process"
    )
    group.add_argument("--validation-batch-size", "-vb", type=positive, metavar="N", help="(default: --batch-size)")
    group.add_argument("--grad-accum-steps", type=positive, default=1, metavar="N", help="steps of an update")
    group.add_argument("--opt", default="adamw", metavar="NAME", help="optimizer, any of timm's")
    group.add_argument("--opt-eps", type=float, metavar="X", help="optimizer epsilon (default: the optimizer's)")
    group.add_argument("--opt-betas", type=float, nargs="+", metavar="X", help="(default: the optimizer's)")
    group.add_argument("--momentum", type=float, default=0.9, metavar="X", help="where the optimizer has one")
    group.add_argument("--weight-decay", type=float, default=0.05, metavar="X", help="not on 1-D parameters")
    group.add_argument("--layer-decay", type=float, metavar="X", help="factor of the learning rate, layer by layer")
    group.add_argument("--clip-grad", type=float, metavar="X", help="clip gradients to this")
    group.add_argument("--clip-mode", default="norm", choices=["norm", "value", "agc"], help="what to clip")
    group.add_argument("--lr", type=float, metavar="X", help="learning rate (default: from --lr-base)")
    group.add_argument("--lr-base", type=float, default=5e-4, metavar="X", help="rate for --lr-base-size images")
    group.add_argument("--lr-base-size", type=positive, default=512, metavar="N", help="update --lr-base is meant for")
    group.add_argument("--sched", default="cosine", metavar="NAME", help="learning rate schedule, any of timm's")
    group.add_argument("--sched-on-updates", action=Switch, help="step the schedule each update, not each epoch")
    group.add_argument("--warmup-epochs", type=count, default=5, metavar="N", help="epochs from --warmup-lr to --lr")
    group.add_argument("--warmup-lr", type=float, default=1e-6, metavar="X", help="learning rate of the first step")
    group.add_argument("--min-lr", type=float, default=1e-5, metavar="X", help="learning rate of the last epoch")
    group.add_argument("--model-ema", action=Switch, help="keep a moving average of the weights, evaluate and save it")
    group.add_argument("--model-ema-decay", type=rate, default=0.9998, metavar="X", help="its decay, each update")
    group.add_argument("--model-ema-warmup", action=Switch, help="let the decay grow to that from 0")

    group = parser.add_argument_group("augmentation and regularization")
    group.add_argument("--no-aug", action="store_true", help="resize and crop as in evaluation, nothing else")
    group.add_argument("--aug-repeats", type=positive, default=1, metavar="N", help="views of an image in a row")
    group.add_argument("--scale", type=float, nargs=2, default=[0.08, 1.0], metavar="X", help="area of random crops")
    group.add_argument("--ratio", type=float, nargs=2, default=[3 / 4, 4 / 3], metavar="X", help="their aspect ratio")
    group.add_argument("--hflip", type=rate, default=0.5, metavar="X", help="probability of a horizontal flip")
    group.add_argument("--vflip", type=rate, default=0.0, metavar="X", help="probability of a vertical flip")
    group.add_argument("--color-jitter", type=float, default=0.4, metavar="X", help="strength of color jitter")
    group.add_argument("--aa", metavar="POLICY", help="augmentation policy, e.g. rand-m9-mstd0.5-inc1")
    choices = ["random", *INTERPOLATIONS]
    group.add_argument("--train-interpolation", default="random", choices=choices, help="resizing in training")
    group.add_argument("--reprob", type=rate, default=0.0, metavar="X", help="probability of random erasing")
    group.add_argument("--remode", default="pixel", choices=["const", "rand", "pixel"], help="what erases")
    group.add_argument("--mixup", type=float, default=0.0, metavar="X", help="mixup alpha, 0 for none")
    group.add_argument("--cutmix", type=float, default=0.0, metavar="X", help="cutmix alpha, 0 for none")
    group.add_argument("--mixup-prob", type=rate, default=1.0, metavar="X", help="probability of either")
    group.add_argument("--mixup-switch-prob", type=rate, default=0.5, metavar="X", help="of cutmix, if both are on")
    group.add_argument("--mixup-off-epoch", type=count, default=0, metavar="N", help="turn both off from then on")
    group.add_argument("--smoothing", type=rate, default=0.1, metavar="X", help="label smoothing")

    group = parser.add_argument_group("device and speed")
    add_device_arguments(group)
    group.add_argument("--compile", action=Switch, help="torch.compile the model")

    group = parser.add_argument_group("run")
    group.add_argument("--seed", "-s", type=count, default=42, metavar="N", help="random seed")
    group.add_argument("--output", default="runs", metavar="DIR", help="folder of all runs")
    group.add_argument("--experiment", metavar="NAME", help="folder of this run (default: time, model and size)")
    group.add_argument(
        "--resume",
        metavar="auto|PATH|hf-hub:ORG/NAME@last",
        help="go on from a run's folder, a checkpoint or what --repo-id uploaded; auto: from what this command last "
        "wrote, if anything; another --epochs extends or shortens the run",
    )
    group.add_argument(
        "--allow-changed-data",
        action=CommandLineSwitch,
        help="resume although the images or the names of their classes have changed",
    )
    group.add_argument(
        "--checkpoint-steps", type=count, default=500, metavar="N", help="updates between checkpoints within an epoch"
    )
    group.add_argument(
        "--checkpoint-epochs",
        type=count,
        default=0,
        metavar="N",
        help="epochs between checkpoints that are kept for good, to look at (0: the last two alone are kept)",
    )
    group.add_argument(
        "--log-interval", type=positive, default=10, metavar="N", help="updates between looks at the loss"
    )
    group.add_argument("--log-tensorboard", action=Switch, help="log to <run>/tensorboard")
    group.add_argument("--log-wandb", action=Switch, help="log to Weights & Biases")
    group.add_argument("--wandb-project", default="stvit", metavar="NAME", help="its project")
    group.add_argument("--repo-id", metavar="ORG/NAME", help="upload the run to this repository, in the background")
    group.add_argument("--hub-every", type=positive, default=10, metavar="N", help="epochs between uploads")
    group.add_argument("--hub-private", action=Switch, help="make a new repository private")
    return parser


def _from_epoch(text: str) -> str:
    epoch, _, value = text.partition(":")
    try:
        return f"{count(epoch)}:{rate(value)}"
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"must be EPOCH:RATE, such as 260:0.6, got {text!r}") from error


# ---------------------------------------------------------------------------------------------------------------------
# Training


@dataclass
class Progress:
    """How far a run is, and what it has found.

    Attributes:
        epoch: Epochs done, each with its evaluation.
        step: Updates done of the next epoch.
        loss_sum: Of this process's images of that epoch.
        correct: Of those images, how many were classified rightly.
        images: Their number.
        history: The numbers of each epoch done.
        best: Epoch, top-1 and kind of weights ("", "EMA") of the best evaluation.
        wandb_id: Run of Weights & Biases.
    """

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    correct: int = 0
    images: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    best: list[Any] = field(default_factory=lambda: [-1, -1.0, ""])
    wandb_id: str | None = None

    def begin_epoch(self) -> None:
        """Forgets the sums of the epoch before."""
        self.step = self.images = self.correct = 0
        self.loss_sum = 0.0


def train(args: argparse.Namespace) -> None:
    """Trains, evaluates after each epoch, and writes the results.

    Raises:
        CommandError: If the data, the model or the run is at fault, or a signal ended it.
    """
    require_loggers(args.log_tensorboard, args.wandb_project if args.log_wandb else None)
    with join_world(args.device, args.dist_backend) as world, StopRequest() as stop, PathLock() as lock:
        try:
            with stop.at_once():
                training = _Training(args, world, stop, lock)
        except StopNow:
            stopped = _Stopped(stop)
            raise Interrupted(f"{stopped} before the training began", stopped.signum) from None
        training.run()


class _Training:
    """One run: what it is made of, and its steps from top to bottom."""

    def __init__(self, args: argparse.Namespace, world: World, stop: StopRequest, lock: PathLock) -> None:
        """Prepares the run.

        Args:
            args: The flags; flags that were left out are filled in.
            world: The processes of the run.
            stop: Signals that ask the run to end.
            lock: Lock to take on the folder of the run, by the first process.

        Raises:
            CommandError: If the flags, the data or the model are at fault, or the folder is in use.
        """
        self.args, self.world, self.stop = args, world, stop
        _check_args(args, world)
        world.by_first(partial(_check_hub, args))
        random_seed(args.seed)
        images = open_images(args, world)
        self.data = world.by_first(partial(fingerprint, images))
        self.train_set, self.val_set, self.class_names = images.train, images.val, images.class_names
        args.num_classes = _num_classes(args.num_classes, self.class_names)

        self.model = _create_model(args).to(device=world.device, dtype=DTYPES[args.model_dtype])
        # A block of rate 0 has no such module: with a schedule the model is made with the highest rate.
        self.drop_paths = [
            (module, module.drop_prob) for module in self.model.modules() if isinstance(module, DropPath)
        ]
        if args.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        if args.sync_bn:
            self.model = convert_sync_batchnorm(self.model)
        self.data_config = resolve_data_config(vars(args), self.model)
        check_img_size(self.model, self.data_config)
        dtype = DTYPES[args.model_dtype]
        self.loader = TrainLoader(args, self.train_set, self.data_config, world, dtype)
        self.val_loader = create_val_loader(args, self.val_set, self.data_config, world, dtype)
        self.updates = self.loader.steps // args.grad_accum_steps
        if self.updates == 0:
            raise CommandError("the training set gives no whole update: lower --batch-size or --workers")

        self.mixup = create_mixup(args)
        self.erase = (
            RandomErasing(args.reprob, mode=args.remode, max_count=1, device=world.device) if args.reprob else None
        )
        criterion = {"smoothing": args.smoothing} if self.mixup is None else {"soft_targets": True}
        self.task = ClassificationTask(
            self.model, criterion_kwargs=criterion, device=world.device, dtype=dtype, verbose=False
        )
        self.optimizer, self.scheduler = create_optimizer(args, self.model, self.updates, world.size)
        self.scaler = NativeScaler(world.device.type) if args.amp and args.amp_dtype == "float16" else None
        if args.model_ema:
            self.task.setup_ema(args.model_ema_decay, use_warmup=args.model_ema_warmup)
        if args.compile:
            _check_compiler(world.device)
            self.task.compile()
        if world.size > 1:
            self.task.prepare_distributed(device_ids=[world.device] if world.device.type == "cuda" else None)

        self.folder, resumed = world.by_first(partial(find_run, args, self.data_config["input_size"], lock))
        world.by_first(partial(_check_remote_run, args, is_resumed=resumed is not None))
        self.checkpoints = Checkpoints(self.folder / "checkpoints", args.checkpoint_epochs)
        self.progress = Progress()
        self.changes: list[str] = []  # of the images, on which the run goes on all the same
        self.former_epochs: int | None = None  # of a run whose number of epochs this command changes
        random_seed(args.seed, world.rank)
        if resumed is not None:
            self._resume(resumed)
        bad_images = BadImages(args.max_bad_images, self.folder / "bad_images.jsonl")
        self.train_set.bad_images = self.val_set.bad_images = bad_images
        self.bad_images = bad_images

    def run(self) -> None:
        """Trains to the end."""
        args, world, progress = self.args, self.world, self.progress
        if progress.epoch >= args.epochs:
            world.say(f"{self.folder} is finished: {args.epochs} epochs are done")
            if world.is_first and self.former_epochs is not None:
                self._write_recipe()
            if world.is_first and args.repo_id:
                # Its records stay as they are: what the Hub has already is not sent again.
                self._snapshots(lambda *_: None).finish(progress.epoch)
            self._say_result()
            return
        log = self._open_log() if world.is_first else None
        snapshots = self._snapshots(log.event) if log is not None and args.repo_id else None
        world.say(
            f"{args.model}, {sum(p.numel() for p in self.model.parameters()) / 1e6:.1f} M parameters, "
            f"{args.num_classes} classes, {len(self.train_set)} training and {len(self.val_set)} validation images, on "
            f"{world.size if world.size > 1 else ''}{' x ' if world.size > 1 else ''}{world.device.type}; results in "
            f"{self.folder}"
        )
        done = progress.epoch * self.updates + progress.step
        bar = progress_bar(args.epochs * self.updates, "step", world.is_first, done)
        try:
            with bar:
                while progress.epoch < args.epochs:
                    if progress.step < self.updates:
                        self._train_epoch(bar, log)
                        if world.size > 1:  # several processes cannot leave an evaluation early
                            self._save_checkpoint()
                    self._finish_epoch(bar, log)
                    self._save_checkpoint()
                    if snapshots is not None:
                        snapshots.after_epoch(progress.epoch)
            if snapshots is not None:
                snapshots.finish(progress.epoch)
        except _Stopped as stopped:
            self._save_checkpoint()
            if snapshots is not None:
                snapshots.abandon()
            raise Interrupted(
                f"{stopped}; saved after epoch {progress.epoch}, update {progress.step} of {self.updates}: to go on, "
                "give the same command with --resume auto",
                stopped.signum,
            ) from stopped
        finally:
            if log is not None:
                log.close()
        if world.is_first:
            if not has_matplotlib():
                print("there is no curve.png, for which matplotlib is needed: pip install matplotlib")
            bad = len(self.bad_images.names())
            if bad:
                print(f"{bad} images could not be read and were skipped: {self.bad_images.log}")
        self._say_result()

    def _snapshots(self, event: Callable[[str, dict[str, Any]], None]) -> Snapshots:
        args = self.args
        options = (args.repo_id, args.hub_every, self.folder, args.hub_private)
        return Snapshots(*options, event=event, is_stopped=lambda: bool(self.stop))

    def _open_log(self) -> RunLog:
        args, progress = self.args, self.progress
        self._write_recipe()
        log = RunLog(
            self.folder,
            tensorboard=args.log_tensorboard,
            wandb_project=args.wandb_project if args.log_wandb else None,
            config=_resolved(args),
            wandb_id=progress.wandb_id,
            start_update=progress.epoch * self.updates + progress.step,
        )
        progress.wandb_id = log.wandb_id
        log.event(
            "resume" if progress.epoch or progress.step else "start",
            {"epoch": progress.epoch, "step": progress.step, "processes": self.world.size, "torch": torch.__version__},
        )
        if self.changes:
            log.event("changed_data", {"changes": self.changes})
        if self.former_epochs is not None:
            log.event("epochs", {"from": self.former_epochs, "to": args.epochs, "lr": self._lr()})
        return log

    def _write_recipe(self) -> None:
        recipe = yaml.safe_dump(_resolved(self.args), sort_keys=False, allow_unicode=True)
        atomic_write(self.folder / "config.yaml", lambda path: path.write_text(recipe, encoding="utf-8"))

    def _say_result(self) -> None:
        epoch, top1, kind = self.progress.best
        best = self.folder / "best"
        self.world.say(
            f"best validation accuracy {top1:.2f} % (epoch {epoch + 1}{', ' + kind if kind else ''}); its weights are "
            f"in {best}:"
        )
        source = f"local-dir:{best}"
        self.world.say(f"import stvit, timm; model = timm.create_model({source!r}, pretrained=True)")

    # One epoch

    def _train_epoch(self, bar: tqdm, log: RunLog | None) -> None:
        """The updates of an epoch that are still to do."""
        args, progress, task, world = self.args, self.progress, self.task, self.world
        self._begin_epoch()
        accum = args.grad_accum_steps
        loss_sum = torch.tensor(progress.loss_sum, dtype=torch.float64 if world.device.type != "mps" else None)
        loss_sum = loss_sum.to(world.device)
        correct = torch.tensor(progress.correct, device=world.device)
        since, images_before = time.perf_counter(), progress.images
        batches = self.loader.epoch(progress.epoch, progress.step * accum)
        while progress.step < self.updates:
            for micro_step in range(1, accum + 1):
                try:
                    # Within an update the state is not whole.
                    image, target, labels = self._next_batch(batches, can_stop=micro_step == 1)
                except _Stopped:
                    progress.loss_sum, progress.correct = loss_sum.item(), int(correct)
                    raise
                if image is None:
                    break
                with task.no_sync() if micro_step < accum else nullcontext():
                    with autocast(args, world):
                        result = task(image, target)
                    self._backward(result["loss"] / accum, is_last=micro_step == accum)
                loss_sum += result["loss"].detach() * len(image)
                correct += (result["output"].argmax(dim=1) == labels).sum()
                progress.images += len(image)
            if image is None:  # the stream is shorter than it says
                # The gradients of an update that is not whole must not enter the next epoch.
                self.optimizer.zero_grad()
                break
            progress.step += 1
            update = progress.epoch * self.updates + progress.step
            task.update_ema(step=update)
            if self.scheduler is not None:
                self.scheduler.step_update(update)
            bar.update()

            is_look = progress.step % args.log_interval == 0 or progress.step == self.updates
            if is_look:  # not at each update: it waits for the device
                progress.loss_sum, progress.correct = loss_sum.item(), int(correct)
                metrics = self._train_metrics()
                now = time.perf_counter()
                speed = (progress.images - images_before) * world.size / (now - since)
                since, images_before = now, progress.images
                self._show(bar, log, metrics, speed)
            is_saving = args.checkpoint_steps and progress.step % args.checkpoint_steps == 0
            if is_saving and progress.step < self.updates:
                progress.loss_sum, progress.correct = loss_sum.item(), int(correct)
                self._save_checkpoint()
            # Several processes must agree to stop, which costs a message: at looks alone.
            if world.any(bool(self.stop)) if world.size > 1 and is_look else world.size == 1 and self.stop:
                progress.loss_sum, progress.correct = loss_sum.item(), int(correct)
                raise _Stopped(self.stop)
        if progress.images == 0:
            raise CommandError("the training set gave no whole batch: lower --batch-size or --workers")
        progress.step = self.updates
        progress.loss_sum, progress.correct = loss_sum.item(), int(correct)

    def _begin_epoch(self) -> None:
        """Sets what depends on the epoch."""
        args, epoch = self.args, self.progress.epoch
        self.task.train()
        if args.bn_eval:
            for module in self.model.modules():
                if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm):
                    module.eval()
        if args.drop_path_schedule:
            share = _drop_path_at(args, epoch) / _highest_drop_path(args)
            for module, highest in self.drop_paths:
                module.drop_prob = highest * share
        if self.mixup is not None and args.mixup_off_epoch:
            self.mixup.mixup_enabled = epoch < args.mixup_off_epoch

    def _read(self, batches: Iterator[Batch], can_stop: bool = True) -> Batch | None:
        """Reads the next batch; returns None at the end.

        Raises:
            _Stopped: If `can_stop` and a signal has come, also while it waits: images may be where nothing answers.
        """
        try:
            # One process of several must not leave alone: the others would wait for it.
            with self.stop.at_once(can_stop and self.world.size == 1, PATIENCE_S):
                return next(batches, None)
        except StopNow:
            raise _Stopped(self.stop) from None

    def _next_batch(self, batches: Iterator[Batch], can_stop: bool) -> tuple[Any, Any, Any]:
        """Images, what to learn, and class numbers; None for the images at the end."""
        batch = self._read(batches, can_stop)
        if batch is None:
            return None, None, None
        image, labels = batch
        if self.progress.step == 0 or self.world.device.type == "cpu":  # elsewhere a look waits for the device
            check_targets(labels, self.args.num_classes, "training")
        target = labels
        if self.erase is not None:
            image = self.erase(image)
        if self.mixup is not None:
            image, target = self.mixup(image, labels)
        if self.args.channels_last:
            image = image.contiguous(memory_format=torch.channels_last)
        return image, target, labels

    def _backward(self, loss: torch.Tensor, is_last: bool) -> None:
        """Gradients, and in the last step of an update the update."""
        args = self.args
        parameters = None
        if args.clip_grad is not None:
            parameters = list(self.task.get_clip_parameters(exclude_head=args.clip_mode == "agc"))
        if self.scaler is not None:
            self.scaler(loss, self.optimizer, args.clip_grad, args.clip_mode, parameters, need_update=is_last)
        else:
            loss.backward()
            if is_last:
                if parameters is not None:
                    dispatch_clip_grad(parameters, args.clip_grad, args.clip_mode)
                self.optimizer.step()
        if is_last:
            self.optimizer.zero_grad()

    def _train_metrics(self) -> OrderedDict[str, float]:
        """Mean loss and accuracy in percent of the epoch so far, over all processes."""
        progress = self.progress
        dtype = torch.float64 if self.world.device.type != "mps" else torch.float32
        sums = torch.tensor(
            [progress.loss_sum, progress.correct, progress.images], dtype=dtype, device=self.world.device
        )
        loss_sum, correct, images = self.world.sum(sums).tolist()
        metrics = OrderedDict(loss=loss_sum / images, top1=100 * correct / images)
        self._check_loss(metrics["loss"], f"in epoch {progress.epoch + 1}, at or before step {progress.step}")
        return metrics

    def _check_loss(self, loss: float, when: str) -> None:
        if not math.isfinite(loss):
            raise CommandError(
                f"the loss became {loss} {when}: lower --lr (it is {self.args.lr:g}), lengthen --warmup-epochs, or set "
                "--clip-grad 1"
            )

    def _show(self, bar: tqdm, log: RunLog | None, metrics: OrderedDict[str, float], speed: float) -> None:
        progress = self.progress
        bar.set_postfix_str(
            f"epoch {progress.epoch + 1}/{self.args.epochs}, loss {metrics['loss']:.4f}, accuracy "
            f"{metrics['top1']:.1f} %, {speed:.0f} images/s",
            refresh=False,
        )
        if log is not None:
            values = {
                "epoch": progress.epoch,
                "step": progress.step,
                **metrics,
                "lr": self._lr(),
                "images_per_second": speed,
            }
            log.step(progress.epoch * self.updates + progress.step, values)

    def _lr(self) -> float:
        return max(group["lr"] for group in self.optimizer.param_groups)

    def _finish_epoch(self, bar: tqdm, log: RunLog | None) -> None:
        """Evaluates, and writes the results of the epoch."""
        args, progress, world = self.args, self.progress, self.world
        train_metrics = self._train_metrics()
        row: dict[str, Any] = {"epoch": progress.epoch, **{f"train_{k}": v for k, v in train_metrics.items()}}
        kinds = {"": self.model}
        if self.task.has_ema():
            kinds["EMA"] = unwrap_model(self.task.get_trainable_module(ema=True))
        for kind, model in kinds.items():
            if world.size > 1:
                # The statistics of BatchNorm are those of the first process, in every forward pass of DDP too.
                distribute_bn(model, world.size, reduce=False)
            metrics = self._evaluate(model)
            self._check_loss(metrics["loss"], f"in the validation after epoch {progress.epoch + 1}")
            row |= {f"{'ema' if kind else 'eval'}_{k}": v for k, v in metrics.items()}
        if self.scheduler is not None:
            self.scheduler.step(progress.epoch + 1, row["eval_top1"])
        row["lr"] = self._lr()

        best_kind = max(kinds, key=lambda kind: row["ema_top1" if kind else "eval_top1"])
        best_top1 = row["ema_top1" if best_kind else "eval_top1"]
        is_best = best_top1 > progress.best[1]
        if world.is_first:
            for kind, model in kinds.items():
                self._save_model(model, "last_ema" if kind else "last", kind, row)
            if is_best:
                self._save_model(kinds[best_kind], "best", best_kind, row)
        if is_best:
            progress.best = [progress.epoch, best_top1, best_kind]
        progress.history.append(row)
        progress.epoch += 1
        progress.begin_epoch()
        if log is not None:
            log.epoch(progress.epoch * self.updates, progress.history)
            ema = f" (EMA {row['ema_top1']:.2f} %)" if self.task.has_ema() else ""
            bar.write(
                f"epoch {progress.epoch}/{args.epochs}: training loss {row['train_loss']:.4f}, accuracy "
                f"{row['train_top1']:.2f} %; validation loss {row['eval_loss']:.4f}, accuracy "
                f"{row['eval_top1']:.2f} %{ema}",
                file=sys.stdout,
            )

    def _evaluate(self, model: nn.Module) -> OrderedDict[str, float]:
        def batches() -> Iterator[Batch]:
            iterator = iter(self.val_loader)
            while (batch := self._read(iterator)) is not None:
                yield batch

        return evaluate(model, batches(), self.world, autocast(self.args, self.world), self.args.channels_last)

    # Checkpoints

    def _save_model(self, model: nn.Module, name: str, kind: str, row: dict[str, Any]) -> None:
        args = self.args
        folder = os.fsencode(Path(args.data_dir or "").name).decode("utf-8", "replace")
        dataset = args.dataset or f"images in {folder}"
        how = (
            f"{len(self.val_set)} images of {args.val_split} at {self.data_config['input_size'][-1]} pixels, crop "
            f"{self.data_config['crop_pct']:g}, {self.data_config['interpolation']}; tools/train_cls.py after epoch "
            f"{row['epoch'] + 1} of {args.epochs}"
        )
        metric = {"name": "top-1", "value": float(row["ema_top1" if kind else "eval_top1"])}
        if name == "best":
            how += ", the best of the run on these images"
        details = {
            "weights": f"{'moving average (EMA)' if kind else 'as trained'}, after epoch {row['epoch'] + 1}",
            "metrics": [{**metric, "dataset": dataset, "split": args.val_split, "how": how}],
        }
        save_model(model, self.folder / name, self.class_names, self.data_config, details)

    def _save_checkpoint(self) -> None:
        """Writes all that the rest of the run depends on."""
        progress = self.progress
        processes = self.world.gather(self._own_state())
        if not self.world.is_first:
            return
        state = self._shared_state() | {"processes": processes}
        self.checkpoints.save(state, progress.epoch, progress.step)

    def _own_state(self) -> dict[str, Any]:
        """Returns the state that each process has for itself."""
        progress = self.progress
        return {
            "random": get_random_state(self.world.device),
            "loss_sum": progress.loss_sum,
            "correct": progress.correct,
            "images": progress.images,
        }

    def _shared_state(self) -> dict[str, Any]:
        """Returns the state that is the same in each process."""
        state = {
            "progress": asdict(self.progress),
            "recipe": _recipe_key(self.args),
            "update_images": self._update_images(),
            "images": [len(self.train_set), len(self.val_set)],
            "data": self.data,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else _schedule_state(self.scheduler),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
        }
        if self.task.has_ema():
            state["model_ema"] = unwrap_model(self.task.get_trainable_module(ema=True)).state_dict()
        return state

    def _update_images(self) -> int:
        return self.args.batch_size * self.args.grad_accum_steps * self.world.size

    def _resume(self, path: Path) -> None:
        """Loads the state of a checkpoint.

        Raises:
            CommandError: If the checkpoint is damaged or is of another run.
        """
        state = load_checkpoint(path)
        mismatch = self._find_mismatch(state)
        if mismatch is not None:
            raise CommandError(
                f"{path} does not fit this run: {mismatch}; resume from another checkpoint (--resume PATH), or start "
                "afresh with another --experiment, from its weights if you like (--pretrained-path)"
            )
        if state["update_images"] != self._update_images():
            raise CommandError(
                f"{path} is of a run with {state['update_images']} images an update, this one has "
                f"{self._update_images()}: let processes x --batch-size x --grad-accum-steps be the same"
            )
        self.changes = self._find_changes(state, path)
        try:
            self.model.load_state_dict(state["model"])
            if self.task.has_ema():
                unwrap_model(self.task.get_trainable_module(ema=True)).load_state_dict(state["model_ema"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.scaler is not None:
                self.scaler.load_state_dict(state["scaler"])
            self.progress = Progress(**{key: state["progress"][key] for key in asdict(Progress())})
            if self.progress.step > self.updates:
                # Changed images may be fewer, and the length of a stream depends on the number of workers.
                if not self.changes and not self.loader.is_stream:
                    raise ValueError(f"progress.step is {self.progress.step}, of {self.updates} updates")
                self.progress.step = self.updates
            self._resume_schedule(state)
            self._resume_process(state["processes"])
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise CommandError(f"{path} does not fit this run: {reason(error)}") from error
        self.world.say(f"resuming {path}: {self.progress.epoch} epochs and {self.progress.step} updates are done")

    def _find_mismatch(self, state: dict[str, Any]) -> str | None:
        """Compares a state with the one that this run would save; returns the first difference in structure."""
        like = self._shared_state()
        for key in ("recipe", "optimizer", "data"):  # are compared elsewhere
            del like[key]
        mismatch = find_mismatch(state, {**like, "processes": []})
        mismatch = mismatch or find_optimizer_mismatch(state.get("optimizer"), self.optimizer)
        if mismatch is None and "data" in state:  # which checkpoints of earlier versions lack
            mismatch = find_fingerprint_mismatch(state["data"])
        if mismatch is not None:
            return mismatch
        own = self._own_state()
        own["random"] = get_random_state(torch.device("cpu"))  # a run may go on on another device
        own["random"]["python"][2] = None  # a number or nothing
        for i, process in enumerate(state["processes"]):
            mismatch = find_mismatch(process, own, f"processes[{i}]")
            if mismatch is not None:
                return mismatch
        return _find_wrong_progress(state)

    def _find_changes(self, state: dict[str, Any], path: Path) -> list[str]:
        """Returns what has changed of the images since a checkpoint was written.

        Raises:
            CommandError: If something has, and --allow-changed-data is not given.
        """
        if "data" in state:
            changes = find_changes(state["data"], self.data)
        else:
            then, now = state["images"], [len(self.train_set), len(self.val_set)]
            kinds = zip(("training", "validation"), then, now, strict=True)
            changes = [f"{kind} images: {old}, now {new}" for kind, old, new in kinds if old != new]
            self.world.say(
                f"{path} was written by an earlier version, which did not note the names of the images and classes: "
                "make sure that they are the same as before"
            )
        if changes and not self.args.allow_changed_data:
            raise CommandError(
                f"the images are not those that {path} was trained on ({'; '.join(changes)}): results would mix both, "
                "and class names could be wrong; put the images back, start afresh with another --experiment, from "
                "the weights of this run if you like (--pretrained-path), or pass --allow-changed-data to go on "
                "with the images and names as they are now"
            )
        for change in changes:
            self.world.say(f"going on with changed data: {change}")
        return changes

    def _resume_process(self, processes: list[dict[str, Any]]) -> None:
        """Loads what each process has for itself, or deals it out to another number of processes."""
        rank = self.world.rank
        if len(processes) == self.world.size:
            own = processes[rank]
            set_random_state(own["random"], self.world.device)
            for name in ("loss_sum", "correct", "images"):
                setattr(self.progress, name, own[name])
            return
        # The data stay the same, what each process draws by itself (dropout, mixup, …) cannot.
        for name in ("loss_sum", "correct", "images"):
            total = sum(process[name] for process in processes)
            setattr(self.progress, name, total if rank == 0 else 0)
        random_seed(self.args.seed + self.progress.epoch * self.updates + self.progress.step, rank)
        self.world.say(f"resuming on {self.world.size} processes what {len(processes)} began")

    def _resume_schedule(self, state: dict[str, Any]) -> None:
        """Loads the schedule's state, or moves a schedule for another number of epochs to where the run is."""
        args, progress = self.args, self.progress
        then = state["recipe"]["epochs"]
        before = self._lr()
        if self.scheduler is not None:
            # Only the plateau schedule has a state that does not follow from the position; it knows no end either.
            if isinstance(self.scheduler, PlateauLRScheduler):
                self.scheduler.restore_lr = state["scheduler"]["restore_lr"]
                self.scheduler.lr_scheduler.load_state_dict(state["scheduler"]["plateau"])
            elif then == args.epochs and not self.changes:
                self.scheduler.load_state_dict(state["scheduler"])
            else:  # each call does nothing if the schedule counts in the other unit
                self.scheduler.step(progress.epoch)
                self.scheduler.step_update(progress.epoch * self.updates + progress.step)
        if then == args.epochs:
            return
        self.former_epochs = then
        after = self._lr()
        self.world.say(
            f"{'extending' if args.epochs > then else 'shortening'} the run from {then} to {args.epochs} epochs: the "
            f"learning rate goes on at {after:.4g}"
            + (f"; under the {args.sched} schedule for {then} epochs it was {before:.4g}" if after != before else "")
        )


def _schedule_state(scheduler: Any) -> dict[str, Any]:
    """Returns the state of a schedule. timm's own state of a plateau schedule lacks the epochs without progress."""
    if isinstance(scheduler, PlateauLRScheduler):
        return {"plateau": scheduler.lr_scheduler.state_dict(), "restore_lr": scheduler.restore_lr}
    state: dict[str, Any] = scheduler.state_dict()
    return state


def _find_wrong_progress(state: dict[str, Any]) -> str | None:
    """Returns what is impossible in the progress of a state of the right structure; None if nothing is."""
    progress, processes = state["progress"], state["processes"]
    epoch, step, history = progress["epoch"], progress["step"], progress["history"]
    if not processes:
        return "processes is empty"
    if min(epoch, step, *(process["images"] for process in processes)) < 0:
        return "progress is negative"
    if (step > 0) != (sum(process["images"] for process in processes) > 0):
        return f"progress.step is {step}, but the processes have seen {'no' if step else 'some'} images since"
    measured = {"epoch": 0, "train_loss": 0.0, "train_top1": 0.0, "eval_loss": 0.0, "eval_top1": 0.0}
    if len(history) != epoch:
        return f"progress.history has {len(history)} epochs, expected {epoch}"
    for i, row in enumerate(history):
        mismatch = find_mismatch(row, measured, f"progress.history[{i}]")
        mismatch = mismatch or find_mismatch(row, dict.fromkeys(history[0], 0.0), f"progress.history[{i}]")
        if mismatch is not None or len(row) != len(history[0]):
            return mismatch or f"progress.history[{i}] has other columns than the first row"
    return None


class _Stopped(Exception):
    """The wish to stop was seen, and the state is that after a whole update."""

    def __init__(self, stop: StopRequest) -> None:
        # Another process may have seen the signal.
        self.signum = stop.signum or signal.SIGTERM
        super().__init__("interrupted" if self.signum == signal.SIGINT else "terminated")


def _check_args(args: argparse.Namespace, world: World) -> None:
    """Fills in flags whose default depends on others.

    Raises:
        CommandError: If flags contradict each other.
    """
    check_dtype(world.device, args.model_dtype)
    if args.in_chans is None:
        args.in_chans = 3
    if args.in_chans not in (1, 3):
        raise CommandError(f"--in-chans must be 1 (gray) or 3 (color), got {args.in_chans}")
    for name, values in (("mean", args.mean), ("std", args.std)):
        if values is not None and len(values) not in (1, args.in_chans):
            raise CommandError(
                f"--{name} must be one number, or one for each of {args.in_chans} channels, got {values}"
            )
    if args.sync_bn and (world.size == 1 or world.device.type == "cpu"):
        raise CommandError("--sync-bn needs several processes (torchrun), each with a GPU: leave it out here")
    if args.drop_path_schedule and _highest_drop_path(args) == 0:
        raise CommandError("--drop-path-schedule needs a rate above 0")
    if args.aug_repeats > 1 and args.dataset.startswith("wds/"):
        raise CommandError("--aug-repeats needs images that can be read in any order, which wds/ shards cannot")


def _check_compiler(device: torch.device) -> None:
    """Compiles a small function.

    Raises:
        CommandError: If torch.compile does not work here, for example because Windows has no C++ compiler.
    """
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except Exception as error:  # missing compilers and Triton, and versions that do not fit
        why = reason(error)
        raise CommandError(
            f"--compile: torch.compile does not work here ({why if len(why) <= 300 else f'{why[:300]}…'}); install a "
            "C++ compiler (on GPUs Triton too), or remove --compile"
        ) from error


def _check_hub(args: argparse.Namespace) -> None:
    """Refuses what can never be uploaded, before anything is trained."""
    if not args.repo_id:
        return
    try:
        hub.check_repo_id(args.repo_id)
        hub.check_token()
    except hub.HubError as error:
        raise CommandError(f"--repo-id: {error}") from error


def _check_remote_run(args: argparse.Namespace, is_resumed: bool) -> None:
    """Refuses to upload over the snapshots of another run, if the Hub can be asked."""
    remote = read_remote_recipe(args.repo_id) if args.repo_id else None
    if remote is None:
        return
    if not is_resumed:
        raise CommandError(
            f"--repo-id: {args.repo_id} holds a run already: go on with it by --resume hf-hub:{args.repo_id}@last, "
            "or choose another repository"
        )
    own = _recipe_key(args)
    changed = [
        key
        for key in own
        if key != "epochs" and key in remote and remote[key] != yaml.safe_load(yaml.safe_dump(own[key]))
    ]
    if changed:
        raise CommandError(
            f"--repo-id: {args.repo_id} holds another run, with another {', '.join(changed)}: choose another repository"
        )


def _drop_path_at(args: argparse.Namespace, epoch: int) -> float:
    steps = sorted((int(e), float(x)) for e, x in (text.split(":") for text in args.drop_path_schedule or ()))
    return [args.drop_path or 0.0, *(value for start, value in steps if start <= epoch)][-1]


def _highest_drop_path(args: argparse.Namespace) -> float:
    return max(args.drop_path or 0.0, *(float(text.split(":")[1]) for text in args.drop_path_schedule or ("0:0",)))


def _create_model(args: argparse.Namespace) -> nn.Module:
    """The model of the flags, on the CPU."""
    drop_path = _highest_drop_path(args) if args.drop_path_schedule else args.drop_path
    return create_model(
        args.model,
        pretrained=args.pretrained,
        weights=read_weights(Path(args.pretrained_path))[0] if args.pretrained_path else None,
        num_classes=args.num_classes,
        in_chans=args.in_chans,
        img_size=args.img_size,
        grad_checkpointing=args.grad_checkpointing,
        model_kwargs={"drop_rate": args.drop, "drop_path_rate": drop_path, **args.model_kwargs},
    )


def _num_classes(asked: int | None, class_names: list[str] | None) -> int:
    if class_names is None:
        if asked is None:
            raise CommandError("the dataset does not say how many classes it has: set --num-classes")
        return asked
    if asked is not None and asked != len(class_names):
        raise CommandError(f"--num-classes is {asked}, but the images have {len(class_names)} classes: leave it out")
    return len(class_names)


def create_optimizer(
    args: argparse.Namespace, model: nn.Module, updates_per_epoch: int, processes: int = 1
) -> tuple[torch.optim.Optimizer, Any]:
    """Optimizer and schedule (None for none) of the flags."""
    if args.lr is None:
        args.lr = args.lr_base * args.batch_size * args.grad_accum_steps * processes / args.lr_base_size
    try:
        optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args))
        schedule = scheduler_kwargs(args) | {"warmup_prefix": False}
        scheduler, _ = create_scheduler_v2(optimizer, **schedule, updates_per_epoch=updates_per_epoch)
    except (TypeError, ValueError, AssertionError, RuntimeError, LookupError) as error:
        raise CommandError(f"cannot create optimizer {args.opt} with schedule {args.sched}: {reason(error)}") from error
    return optimizer, scheduler


def create_mixup(args: argparse.Namespace) -> Mixup | None:
    """Mixup and cutmix of the flags, None if both are off."""
    if args.mixup <= 0.0 and args.cutmix <= 0.0:
        return None
    if args.batch_size % 2 != 0:
        raise CommandError(f"--mixup and --cutmix need an even --batch-size, got {args.batch_size}")
    return Mixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        label_smoothing=args.smoothing,
        num_classes=args.num_classes,
    )


# ---------------------------------------------------------------------------------------------------------------------
# The run's folder


def find_run(args: argparse.Namespace, input_size: Sequence[int], lock: PathLock) -> tuple[Path, Path | None]:
    """Finds the folder of this run, and locks it.

    Args:
        args: The flags.
        input_size: (C, H, W) of the images.
        lock: Lock to take, so that no other process writes to the folder.

    Returns:
        The folder, and the checkpoint to go on from; None for the latter to begin.

    Raises:
        CommandError: If the folder is in use, holds another run, or cannot be made, or there is no checkpoint.
    """
    output = Path(args.output).expanduser()
    if args.resume and args.resume.startswith(("hf-hub:", "hf_hub:")):
        folder, path = fetch_run(
            args.resume, output, args.experiment, lambda state, name: _check_same_recipe(args, state, name)
        )
        _lock_run(folder, lock)
        return folder, path
    if args.resume and args.resume != "auto":
        path = Path(args.resume).expanduser()
        if path.is_dir():
            folder = path
            _lock_run(folder, lock)
            found = Checkpoints(folder / "checkpoints").load()
        else:
            path = path.resolve()
            if path.is_file() and path.parent.name != "checkpoints":
                raise CommandError(f"--resume {path} must be in the folder checkpoints/ of its run, to go on there")
            folder = path.parent.parent
            found = None
            if path.is_file():
                _lock_run(folder, lock)
                found = load_checkpoint(path), path
        if found is None:
            raise CommandError(
                f"--resume {args.resume}: no checkpoint there; give a run's folder, a checkpoint, or auto"
            )
        _check_same_recipe(args, found[0], folder)
        return folder, found[1]

    if args.experiment is None and args.resume == "auto":
        own = _comparable(_resolved(args))
        others: dict[Path, Any] = {}  # that differ in the number of epochs only, newest first
        for checkpoints in sorted(filter(Path.is_dir, output.glob("*/checkpoints")), key=_changed_at, reverse=True):
            recipe = _recipe_of(checkpoints.parent)
            if recipe == own:
                _lock_run(checkpoints.parent, lock)
                found = Checkpoints(checkpoints).load()
                if found is not None:
                    return checkpoints.parent, found[1]
                lock.release()
            elif recipe is not None and {**recipe, "epochs": own["epochs"]} == own:
                others[checkpoints.parent] = recipe.get("epochs")
        for run, epochs in list(others.items())[:1]:
            print(f"{run} is the same run with --epochs {epochs}; to change its epochs, pass --experiment {run.name}")
    if args.experiment is None:
        return _make_unnamed_run(args, output, input_size, lock), None
    folder = output / args.experiment
    _make_folder(folder)
    _lock_run(folder, lock)
    found = Checkpoints(folder / "checkpoints").load() if args.resume == "auto" else None
    if found is not None:
        _check_same_recipe(args, found[0], folder)
    elif _holds_run(folder, args.resume):
        raise CommandError(
            f"{folder} holds the results of another run: choose another --experiment, move it away, or go on with it "
            "by --resume auto"
        )
    return folder, None if found is None else found[1]


def _make_unnamed_run(args: argparse.Namespace, output: Path, input_size: Sequence[int], lock: PathLock) -> Path:
    """Makes and locks a folder named after the time, the model and the image size, and if need be a number."""
    # Of 'local-dir:C:\\models\\x' and 'hf-hub:org/name' too, as one name that every system takes.
    model = re.sub(r"[^\w.-]+", "_", args.model.partition(":")[2] or args.model).strip("_.")
    name = f"{datetime.now():%Y%m%d-%H%M%S}-{model}-{input_size[-1]}"
    for number in itertools.count(1):
        folder = output / (name if number == 1 else f"{name}-{number}")
        _make_folder(folder)
        try:
            _lock_run(folder, lock)
        except InUseError:  # by a run that began in the same second
            continue
        if not _holds_run(folder, args.resume):
            return folder
        lock.release()
    raise AssertionError("unreachable")


def _lock_run(folder: Path, lock: PathLock) -> None:
    """Locks the folder of a run.

    Raises:
        InUseError: If another process trains in it.
    """
    try:
        lock.acquire(folder / RUN_LOCK)
    except InUseError as error:
        raise InUseError(f"{error}: wait for it to end, or choose another --experiment to begin another run") from error


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"cannot make the folder {folder}: {error.strerror}") from error


def _holds_run(folder: Path, resume: str | None) -> bool:
    """Returns whether a folder has results that a new run would overwrite; with `resume` checkpoints are none."""
    return (folder / "summary.csv").exists() or ((folder / "checkpoints").exists() and resume is None)


def _changed_at(path: Path) -> float:
    """Returns when a folder was last changed, in seconds since 1970; 0 for one that is gone."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _recipe_of(folder: Path) -> dict[str, Any] | None:
    try:
        recipe = load_yaml(read_utf8(folder / "config.yaml"))
        return _comparable(recipe) if isinstance(recipe, dict) else None
    except (OSError, ValueError, TypeError, RuntimeError):  # not one that a run wrote
        return None


def _comparable(recipe: dict[str, Any]) -> dict[str, Any]:
    """What makes a run another one, if nobody says by its name which one it is: the data too, wherever one stands."""
    data = recipe.get("data_dir")
    return {
        **{key: value for key, value in recipe.items() if key not in RESUME_MUTABLE},
        "data_dir": None if data is None else str(Path(data).expanduser().resolve()),
    }


def _check_same_recipe(args: argparse.Namespace, state: dict[str, Any], folder: Path | str) -> None:
    """Checks that a run can go on with these flags; the number of epochs may change.

    Raises:
        CommandError: If another flag differs, or the run has done more epochs already.
    """
    progress = state["progress"]
    begun = progress["epoch"] + (progress["step"] > 0)
    if args.epochs < begun:
        updates = f" and {progress['step']} updates" if progress["step"] else ""
        raise CommandError(
            f"--epochs {args.epochs}: {folder} has already done {progress['epoch']} epochs{updates}; pass --epochs "
            f"{begun} or more"
        )
    then, now = state["recipe"], _recipe_key(args)
    changed = [
        f"{key} {then.get(key)!r}, now {now.get(key)!r}"
        for key in now
        if key != "epochs" and then.get(key) != now.get(key)
    ]
    if changed:
        raise CommandError(
            f"{folder} was begun with other flags ({'; '.join(changed)}): go on with the same, or start afresh with "
            "another --experiment, from its weights if you like (--pretrained-path)"
        )


def _recipe_key(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the flags that a resumed run must share with its checkpoint; `epochs` is compared separately."""
    return {key: value for key, value in _resolved(args).items() if key not in RESUME_MUTABLE}


def _resolved(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the recipe that repeats the run: every flag except --config and those that hold for one command.

    Secrets in URLs are left out, because the recipe is uploaded with the run.
    """
    left_out = ("config", "resume", "allow_changed_data", "allow_shard_commands")
    return redact_values({key: value for key, value in vars(args).items() if key not in left_out})


def save_model(
    model: nn.Module,
    folder: Path,
    class_names: list[str] | None,
    data_config: dict[str, Any],
    details: dict[str, Any] | None = None,
) -> None:
    """Writes model.safetensors and config.json, as `timm.create_model("local-dir:…")` reads them."""
    fresh = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        hub.save(model, fresh, label_names=class_names, data_config=data_config, details=details)
        atomic_replace_dir(fresh, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(fresh, ignore_errors=True)
        raise CommandError(
            f"cannot write the weights to {folder}: {reason(error)}; what was there and the checkpoints are kept: make "
            "room, and give the same command with --resume auto"
        ) from error


if __name__ == "__main__":
    sys.exit(main())

"""Optimizer, learning rate schedule and gradient clipping of a training."""

from collections.abc import Iterable
from typing import Any

import torch
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import PlateauLRScheduler, create_scheduler_v2, scheduler_kwargs
from timm.utils import NativeScaler, dispatch_clip_grad
from torch import nn

from .cli import CommandError, reason
from .config import OptimConfig


def learning_rate(config: OptimConfig, batch_size: int, processes: int) -> float:
    """Returns the learning rate: --lr, or --lr-base scaled by the images per update.

    Args:
        config: The learning rates.
        batch_size: Images per step and process.
        processes: Number of processes.
    """
    if config.lr is not None:
        return config.lr
    return config.lr_base * batch_size * config.grad_accum_steps * processes / config.lr_base_size


def create_optimizer(
    config: OptimConfig, model: nn.Module, updates_per_epoch: int
) -> tuple[torch.optim.Optimizer, Any]:
    """Returns the optimizer and the schedule of a model. The schedule may be None.

    Raises:
        CommandError: If timm cannot create them.
    """
    if config.warmup_updates and not config.sched_on_updates:
        raise CommandError(
            f"--warmup-updates {config.warmup_updates} needs --sched-on-updates, which changes the learning rate in "
            "each update; pass --sched-on-updates, or --warmup-epochs N instead (0: no warmup)"
        )
    if config.sched == "multistep" and not config.decay_milestones:
        raise CommandError("--sched multistep needs --decay-milestones, the epochs after which the rate decays")
    try:
        optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=config))
        schedule = schedule_arguments(config, updates_per_epoch)
        scheduler, _ = create_scheduler_v2(optimizer, **schedule, updates_per_epoch=updates_per_epoch)
    except (TypeError, ValueError, AssertionError, RuntimeError, LookupError) as error:
        raise CommandError(
            f"cannot create optimizer {config.opt} with schedule {config.sched}: {reason(error)}"
        ) from error
    return optimizer, scheduler


def schedule_arguments(config: OptimConfig, updates_per_epoch: int) -> dict[str, Any]:
    """Returns the arguments of timm's `create_scheduler_v2` for a schedule.

    Args:
        config: The schedule.
        updates_per_epoch: Updates of an epoch.
    """
    arguments: dict[str, Any] = scheduler_kwargs(config) | {"warmup_prefix": False}
    if config.decay_rate is None:
        arguments["decay_rate"] = 1.0 if config.sched == "poly" else 0.1
    if config.warmup_updates is not None:
        # timm multiplies it by the updates of an epoch.
        arguments["warmup_epochs"] = config.warmup_updates / updates_per_epoch
    if config.decay_milestones is None:
        del arguments["decay_milestones"]
    elif not config.sched_on_updates:
        # timm counts epochs from 1 here, and would decay an epoch earlier than a schedule of updates.
        arguments["decay_milestones"] = [epoch + 1 for epoch in config.decay_milestones]
    return arguments


def find_schedule_problems(config: OptimConfig, updates_per_epoch: int) -> list[str]:
    """Returns what in a schedule does not fit the length of the training.

    Args:
        config: The schedule.
        updates_per_epoch: Updates of an epoch.
    """
    problems = []
    total = config.epochs * updates_per_epoch
    length = f"{config.epochs} epoch{'s' if config.epochs > 1 else ''} of {updates_per_epoch} updates"
    flag, value, warmup = "--warmup-updates", config.warmup_updates, config.warmup_updates
    if warmup is None:
        flag, value, warmup = "--warmup-epochs", config.warmup_epochs, config.warmup_epochs * updates_per_epoch
    if warmup >= total:
        problems.append(
            f"{flag} {value} is not shorter than the training of {length}, so the learning rate stays below its value; "
            f"pass a smaller {flag}, 0 for no warmup"
        )
    late = [epoch for epoch in config.decay_milestones or () if epoch >= config.epochs]
    if config.sched == "multistep" and late:
        problems.append(
            f"the learning rate does not decay after epoch {', '.join(map(str, late))} (--decay-milestones), because "
            f"the training has {length}"
        )
    return problems


def current_lr(optimizer: torch.optim.Optimizer) -> float:
    """Returns the learning rate, the highest of all parameter groups."""
    return max(group["lr"] for group in optimizer.param_groups)


def backward(
    loss: torch.Tensor,
    optimizer: torch.optim.Optimizer,
    config: OptimConfig,
    clip_parameters: Iterable[nn.Parameter],
    scaler: NativeScaler | None,
    is_last: bool,
    keep_gradients: bool = False,
) -> None:
    """Computes gradients, and updates the weights in the last step of an update.

    Args:
        loss: Loss of this step, divided by the number of steps per update.
        optimizer: The optimizer.
        config: Gradient clipping.
        clip_parameters: Parameters whose gradients are clipped.
        scaler: Loss scaler for float16; None without it.
        is_last: Whether this is the last step of the update.
        keep_gradients: Whether gradients keep their memory, see `zero_gradients`.
    """
    parameters = None if config.clip_grad is None else list(clip_parameters)
    if scaler is not None:
        scaler(loss, optimizer, config.clip_grad, config.clip_mode, parameters, need_update=is_last)
    else:
        loss.backward()
        if is_last:
            if config.clip_grad is not None and parameters is not None:
                dispatch_clip_grad(parameters, config.clip_grad, config.clip_mode)
            optimizer.step()
    if is_last:
        zero_gradients(optimizer, keep_gradients)


def zero_gradients(optimizer: torch.optim.Optimizer, keep_memory: bool = False) -> None:
    """Sets all gradients to zero.

    Args:
        optimizer: Optimizer of the parameters.
        keep_memory: Whether gradients remain tensors with their own memory. By default they become None, and the
            backward pass provides their memory. If it is a CUDA graph, the next step overwrites that memory. Gradients
            of several steps can then be added only in memory of their own.
    """
    optimizer.zero_grad(set_to_none=not keep_memory)
    if keep_memory:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.requires_grad and p.grad is None:
                    p.grad = torch.zeros_like(p)


def schedule_state(scheduler: Any) -> dict[str, Any] | None:
    """Returns the state of a schedule.

    timm's state of a plateau schedule lacks the epochs without progress.
    """
    if scheduler is None:
        return None
    if isinstance(scheduler, PlateauLRScheduler):
        return {"plateau": scheduler.lr_scheduler.state_dict(), "restore_lr": scheduler.restore_lr}
    state: dict[str, Any] = scheduler.state_dict()
    return state


def resume_schedule(scheduler: Any, state: Any, is_same: bool, epoch: int, update: int) -> None:
    """Loads the state of a schedule, or moves a changed schedule forward.

    Args:
        scheduler: The schedule; None if there is none.
        state: State that `schedule_state` returned.
        is_same: Whether the number of epochs and the images are those of the state.
        epoch: Epochs done.
        update: Updates done, over all epochs.
    """
    if scheduler is None:
        return
    # Only the plateau schedule has a state that does not follow from the position. It has no fixed end either.
    if isinstance(scheduler, PlateauLRScheduler):
        scheduler.restore_lr = state["restore_lr"]
        scheduler.lr_scheduler.load_state_dict(state["plateau"])
    elif is_same:
        scheduler.load_state_dict(state)
    else:  # each call does nothing if the schedule counts in the other unit
        scheduler.step(epoch)
        scheduler.step_update(update)

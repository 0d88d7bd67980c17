#!/usr/bin/env python3
"""Trains an image classifier: STViT, or any timm model.

    python tools/train_cls.py --config configs/cls/stvit_pico_digits.yaml
    python tools/train_cls.py --model stvit_small --data-dir /data/imagenet --epochs 300 --batch-size 128

`python -m stvit.tools.train_cls` is the same program. Every key of a recipe is a flag too, and a flag on the command
line wins. Data are a folder with train/<class>/* and val/<class>/* images (--data-dir), or a named set (--dataset):
`sklearn/digits` (shipped with scikit-learn, nothing to download) or timm's `torch/…`, `hfds/…` and `wds/…`.

Results go to <output>/<experiment>/: config.yaml, the resolved recipe; summary.csv, a line for each epoch; best/ and
last/, the weights (model.safetensors) and the config.json by which timm loads them.
"""

import argparse
import copy
import difflib
import logging
import math
import os
import shutil
import sys
import time
from collections import OrderedDict
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from PIL import Image, UnidentifiedImageError
from timm.data import Mixup, auto_augment, create_dataset, create_loader, resolve_data_config
from timm.models import get_pretrained_cfg_value, load_state_dict, save_for_hf
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import ClassificationTask
from timm.utils import ParseKwargs, dispatch_clip_grad, random_seed, update_summary
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from tqdm import tqdm

import stvit  # noqa: F401  registers the models in timm

INTERPOLATIONS = ["bicubic", "bilinear", "lanczos", "nearest", "box", "hamming"]


class TrainingError(Exception):
    """What went wrong and what to do about it, in one line for the user."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status: 0, 1 after an error of the data or the run, 130 after Ctrl-C."""
    # Errors are ours to word, once; timm's log of ordinary steps is not for this program's users.
    logging.getLogger("timm").setLevel(logging.ERROR)
    args = parse_args(argv)
    try:
        train(args)
    except TrainingError as error:
        # From a loader's worker process an error comes wrapped in that process's traceback, itself the last line.
        print("error:", str(error).strip().splitlines()[-1].split("TrainingError: ")[-1], file=sys.stderr)
        return 1
    except torch.OutOfMemoryError as error:
        print(
            f"error: out of memory: lower --batch-size or set --grad-checkpointing ({_reason(error)})", file=sys.stderr
        )
        return 1
    except OSError as error:
        print(f"error: {_reason(error)}: the run cannot go on, what it had written is kept", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted: what the run had written is kept", file=sys.stderr)
        return 130
    except Exception as error:
        if os.environ.get("STVIT_TRACEBACK"):
            raise
        print(
            f"error: unforeseen {type(error).__name__}: {_reason(error)}; please report it, with what the same command "
            "prints under STVIT_TRACEBACK=1",
            file=sys.stderr,
        )
        return 1
    return 0


def _reason(error: BaseException) -> str:
    """The message of somebody else's error in one line."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__} {message}".strip() if isinstance(error, KeyError) or not message else message


# ---------------------------------------------------------------------------------------------------------------------
# Arguments


def create_parser() -> argparse.ArgumentParser:
    """The flags, under timm's names."""
    parser = _Parser(
        prog="train_cls.py",
        description="Trains an image classifier: STViT, or any timm model.",
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", "-c", metavar="FILE", help="recipe (YAML) whose keys are flags of this program")

    group = parser.add_argument_group("data")
    group.add_argument("--data-dir", metavar="DIR", help="folder with train/<class>/* and val/<class>/* images")
    group.add_argument("--dataset", default="", metavar="NAME", help="sklearn/digits, torch/…, hfds/… or wds/…")
    group.add_argument("--train-split", default="train", metavar="NAME", help="split to train on")
    group.add_argument("--val-split", default="validation", metavar="NAME", help="split to evaluate on")
    group.add_argument("--dataset-download", action=_Switch, help="download a torch/… set into --data-dir")
    group.add_argument("--workers", "-j", type=_count, default=4, metavar="N", help="processes that load images")

    group = parser.add_argument_group("model")
    group.add_argument("--model", default="stvit_small", metavar="NAME", help="model to train, any of timm's")
    group.add_argument("--pretrained", action=_Switch, help="start from the published weights")
    group.add_argument("--pretrained-path", metavar="FILE", help="start from these weights, ours or the authors'")
    group.add_argument("--num-classes", type=_positive, metavar="N", help="classes (default: those of the data)")
    group.add_argument("--in-chans", type=_positive, metavar="N", help="image channels, 1 or 3")
    group.add_argument("--img-size", type=_positive, metavar="N", help="image height and width in pixels")
    group.add_argument("--mean", type=float, nargs="+", metavar="X", help="mean of the images' channels, from 0 to 1")
    group.add_argument("--std", type=float, nargs="+", metavar="X", help="deviation of the images' channels")
    group.add_argument("--interpolation", choices=INTERPOLATIONS, help="resizing (default: the model's)")
    group.add_argument("--crop-pct", type=float, metavar="X", help="share of the resized image that evaluation crops")
    group.add_argument("--drop", type=_rate, default=0.0, metavar="X", help="dropout rate before the classifier")
    group.add_argument("--drop-path", type=_rate, metavar="X", help="stochastic depth rate of the last block")
    group.add_argument("--grad-checkpointing", action=_Switch, help="recompute activations, to save memory")
    group.add_argument("--model-kwargs", nargs="*", default={}, action=_KeyValues, metavar="K=V", help="more of them")

    group = parser.add_argument_group("optimizer and schedule")
    group.add_argument("--epochs", type=_positive, default=300, metavar="N", help="epochs to train")
    group.add_argument("--batch-size", "-b", type=_positive, default=128, metavar="N", help="images of a step")
    group.add_argument("--validation-batch-size", "-vb", type=_positive, metavar="N", help="(default: --batch-size)")
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
    group.add_argument("--lr-base-size", type=_positive, default=512, metavar="N", help="batch --lr-base is meant for")
    group.add_argument("--sched", default="cosine", metavar="NAME", help="learning rate schedule, any of timm's")
    group.add_argument("--sched-on-updates", action=_Switch, help="step the schedule each update, not each epoch")
    group.add_argument("--warmup-epochs", type=_count, default=5, metavar="N", help="epochs from --warmup-lr to --lr")
    group.add_argument("--warmup-lr", type=float, default=1e-6, metavar="X", help="learning rate of the first step")
    group.add_argument("--min-lr", type=float, default=1e-5, metavar="X", help="learning rate of the last epoch")

    group = parser.add_argument_group("augmentation and regularization")
    group.add_argument("--no-aug", action="store_true", help="resize and crop as in evaluation, nothing else")
    group.add_argument("--scale", type=float, nargs=2, default=[0.08, 1.0], metavar="X", help="area of random crops")
    group.add_argument("--ratio", type=float, nargs=2, default=[3 / 4, 4 / 3], metavar="X", help="their aspect ratio")
    group.add_argument("--hflip", type=_rate, default=0.5, metavar="X", help="probability of a horizontal flip")
    group.add_argument("--vflip", type=_rate, default=0.0, metavar="X", help="probability of a vertical flip")
    group.add_argument("--color-jitter", type=float, default=0.4, metavar="X", help="strength of color jitter")
    group.add_argument("--aa", metavar="POLICY", help="augmentation policy, e.g. rand-m9-mstd0.5-inc1")
    choices = ["random", *INTERPOLATIONS]
    group.add_argument("--train-interpolation", default="random", choices=choices, help="resizing in training")
    group.add_argument("--reprob", type=_rate, default=0.0, metavar="X", help="probability of random erasing")
    group.add_argument("--remode", default="pixel", choices=["const", "rand", "pixel"], help="what erases")
    group.add_argument("--mixup", type=float, default=0.0, metavar="X", help="mixup alpha, 0 for none")
    group.add_argument("--cutmix", type=float, default=0.0, metavar="X", help="cutmix alpha, 0 for none")
    group.add_argument("--mixup-prob", type=_rate, default=1.0, metavar="X", help="probability of either")
    group.add_argument("--mixup-switch-prob", type=_rate, default=0.5, metavar="X", help="of cutmix, if both are on")
    group.add_argument("--mixup-off-epoch", type=_count, default=0, metavar="N", help="turn both off from then on")
    group.add_argument("--smoothing", type=_rate, default=0.1, metavar="X", help="label smoothing")

    group = parser.add_argument_group("run")
    group.add_argument("--seed", "-s", type=_count, default=42, metavar="N", help="random seed")
    group.add_argument("--device", metavar="NAME", help="(default: cuda where there is one, else cpu)")
    group.add_argument("--channels-last", action=_Switch, help="channels_last memory format")
    group.add_argument(
        "--log-interval", type=_positive, default=10, metavar="N", help="steps between looks at the loss"
    )
    group.add_argument("--output", default="runs", metavar="DIR", help="folder of all runs")
    group.add_argument("--experiment", metavar="NAME", help="folder of this run (default: time, model and size)")
    return parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default or action.default == 0 else action.help


class _KeyValues(ParseKwargs):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        for value in values:
            if "=" not in value:
                parser.error(f"argument {option_string}: must be key=value, got {value!r}")
        super().__call__(parser, namespace, values, option_string)


class _Switch(argparse.BooleanOptionalAction):
    """A flag that is off unless given, and that `--no-…` turns off again where a recipe has it on."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, dest, **{**kwargs, "default": False})


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, at least 0, got {text!r}")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, at least 1, got {text!r}")
    return int(text)


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 1, got {text!r}")
    return value


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the command line over those of the recipe (`--config`) over the defaults.

    Raises:
        SystemExit: With status 2 and one line on standard error, if a flag or a key is unknown or ill-typed.
    """
    parser = create_parser()
    argv = list(sys.argv[1:] if argv is None else argv)
    config_parser = _Parser(prog=parser.prog, add_help=False, allow_abbrev=False)
    config_parser.add_argument("--config", "-c")
    config = config_parser.parse_known_args(argv)[0].config
    # A recipe is turned into flags, and so meets the same checks as they do.
    recipe = _recipe_flags(parser, Path(config)) if config else []
    return parser.parse_args(recipe + argv)


def _recipe_flags(parser: argparse.ArgumentParser, path: Path) -> list[str]:
    try:
        recipe = yaml.safe_load(path.read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        parser.error(f"cannot read --config {path}: {_reason(error)}")
    if not isinstance(recipe, dict):
        parser.error(f"{path}: a recipe is a mapping of flags to values, got {type(recipe).__name__}")
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    flags: list[str] = []
    for key, value in recipe.items():
        action = actions.get(str(key).replace("-", "_"))
        if action is None:
            near = difflib.get_close_matches(str(key).replace("-", "_"), actions, n=1)
            parser.error(f"{path}: unknown key {key!r}" + (f", did you mean {near[0]!r}?" if near else ""))
        if value is None:
            continue
        option = action.option_strings[0]
        if action.nargs == 0:
            if not isinstance(value, bool):
                parser.error(f"{path}: {key} must be true or false, got {value!r}")
            flags += [option] if value else []
        elif isinstance(action, ParseKwargs):
            if not isinstance(value, dict):
                parser.error(f"{path}: {key} must be a mapping, got {value!r}")
            flags += [option, *(f"{k}={v!r}" for k, v in value.items())]
        else:
            values = value if isinstance(value, list) and action.nargs else [value]
            for item in values:
                # YAML reads 1e-3, without a point, as text: numbers may be either, text must be text.
                wanted = str if action.type is None else (int, float, str)
                if isinstance(item, bool) or not isinstance(item, wanted):
                    parser.error(f"{path}: {key} must be {'text' if wanted is str else 'a number'}, got {value!r}")
            if action.nargs:
                flags += [option, *map(str, values)]
            else:
                flags.append(f"{option}={value}")  # the value may begin with a dash
    # So that a value of the wrong type is reported with the name of the file that holds it.
    checker = create_parser()
    checker.error = lambda message: parser.error(f"{path}: {message}")  # type: ignore[method-assign]
    checker.parse_args(flags)
    return flags


# ---------------------------------------------------------------------------------------------------------------------
# Training


def train(args: argparse.Namespace) -> None:
    """Trains, evaluates after each epoch, and writes the results.

    Raises:
        TrainingError: If the data, the model or the run is at fault.
    """
    device = _device(args.device)
    random_seed(args.seed)
    if args.in_chans is None:
        args.in_chans = 3
    if args.in_chans not in (1, 3):
        raise TrainingError(f"--in-chans must be 1 (gray) or 3 (color), got {args.in_chans}")
    for name, values in (("mean", args.mean), ("std", args.std)):
        if values is not None and len(values) not in (1, args.in_chans):
            raise TrainingError(
                f"--{name} must be one number, or one for each of {args.in_chans} channels, got {values}"
            )

    train_set, val_set, class_names = open_datasets(args)
    args.num_classes = _num_classes(args.num_classes, class_names)
    model = create_model(args).to(device=device)
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)
    data_config = resolve_data_config(vars(args), model=model)
    if args.in_chans == 1 and args.mean is None:
        data_config |= {name: (sum(data_config[name]) / len(data_config[name]),) for name in ("mean", "std")}
    train_loader, val_loader = create_loaders(args, train_set, val_set, data_config, device)

    mixup = create_mixup(args)
    criterion = {"smoothing": args.smoothing} if mixup is None else {"soft_targets": True}
    task = ClassificationTask(model, criterion_kwargs=criterion, device=device, verbose=False)
    optimizer, scheduler = create_optimizer(args, model, len(train_loader))

    folder = create_run_folder(args, data_config["input_size"])
    (folder / "config.yaml").write_text(yaml.safe_dump(_resolved(args), sort_keys=False))
    print(
        f"{args.model}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {args.num_classes} "
        f"classes, {len(train_set)} training and {len(val_set)} validation images, on {device}; results in {folder}"
    )

    best_top1, best_epoch = -1.0, 0
    # Where it is not a terminal that shows the bar, a line now and then is enough.
    interval = 0.1 if sys.stderr.isatty() else 10.0
    with tqdm(total=args.epochs * len(train_loader), unit="step", mininterval=interval, dynamic_ncols=True) as bar:
        for epoch in range(args.epochs):
            if mixup is not None and args.mixup_off_epoch:
                mixup.mixup_enabled = epoch < args.mixup_off_epoch
            train_metrics = train_epoch(args, epoch, task, train_loader, mixup, optimizer, scheduler, bar)
            eval_metrics = evaluate(task, val_loader)
            _check_loss(args, eval_metrics["loss"], f"in the validation after epoch {epoch + 1}")
            if scheduler is not None:
                scheduler.step(epoch + 1, eval_metrics["top1"])

            update_summary(
                epoch, train_metrics, eval_metrics, str(folder / "summary.csv"), lr=optimizer.param_groups[0]["lr"]
            )
            save_model(model, folder / "last", class_names, data_config)
            if eval_metrics["top1"] > best_top1:
                best_top1, best_epoch = eval_metrics["top1"], epoch
                save_model(model, folder / "best", class_names, data_config)
            bar.write(
                f"epoch {epoch + 1}/{args.epochs}: training loss {train_metrics['loss']:.4f}, accuracy "
                f"{train_metrics['top1']:.2f} %; validation loss {eval_metrics['loss']:.4f}, accuracy "
                f"{eval_metrics['top1']:.2f} %",
                file=sys.stdout,
            )

    print(f"best validation accuracy {best_top1:.2f} % (epoch {best_epoch + 1}); its weights are in {folder / 'best'}:")
    source = f"local-dir:{folder / 'best'}"
    print(f"import stvit, timm; model = timm.create_model({source!r}, pretrained=True)")


def _device(name: str | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise TrainingError(f"--device {name} cannot be used: {_reason(error)}") from error
    return device


def create_model(args: argparse.Namespace) -> nn.Module:
    """The model of the flags, on the CPU."""
    if not timm.is_model(args.model) and not args.model.startswith(("hf-hub:", "local-dir:")):
        near = difflib.get_close_matches(args.model, timm.list_models(), n=3)
        hint = f", did you mean {' or '.join(near)}?" if near else "; timm.list_models() lists them"
        raise TrainingError(f"unknown model {args.model!r}{hint}")
    if args.pretrained_path and not Path(args.pretrained_path).is_file():
        raise TrainingError(f"--pretrained-path {args.pretrained_path} is not a file")
    kwargs: dict[str, Any] = {"drop_path_rate": args.drop_path, **args.model_kwargs}
    overlay: dict[str, Any] = {}
    try:
        if args.pretrained_path:
            overlay["file"] = args.pretrained_path
            # timm keeps a classifier if it has the classes of the weights, which it does not ask the file for.
            weights = load_state_dict(args.pretrained_path)
            for name in (get_pretrained_cfg_value(args.model, "classifier"), "head"):
                if f"{name}.weight" in weights:
                    overlay["num_classes"] = len(weights[f"{name}.weight"])
        model: Any = timm.create_model(
            args.model,
            pretrained=args.pretrained or args.pretrained_path is not None,
            pretrained_cfg_overlay=overlay,
            num_classes=args.num_classes,
            in_chans=args.in_chans,
            drop_rate=args.drop,
            **kwargs,
        )
        if args.grad_checkpointing:
            model.set_grad_checkpointing()
    except Exception as error:  # unpickling a file that holds no weights raises nearly everything
        raise TrainingError(f"cannot create model {args.model}: {_reason(error)}") from error
    return model


def create_optimizer(
    args: argparse.Namespace, model: nn.Module, updates_per_epoch: int
) -> tuple[torch.optim.Optimizer, Any]:
    """Optimizer and schedule (None for none) of the flags."""
    if args.lr is None:
        args.lr = args.lr_base * args.batch_size / args.lr_base_size
    try:
        optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args))
        schedule = scheduler_kwargs(args) | {"warmup_prefix": False}
        scheduler, _ = create_scheduler_v2(optimizer, **schedule, updates_per_epoch=updates_per_epoch)
    except (TypeError, ValueError, AssertionError, RuntimeError, LookupError) as error:
        raise TrainingError(
            f"cannot create optimizer {args.opt} with schedule {args.sched}: {_reason(error)}"
        ) from error
    return optimizer, scheduler


def create_mixup(args: argparse.Namespace) -> Mixup | None:
    """Mixup and cutmix of the flags, None if both are off."""
    if args.mixup <= 0.0 and args.cutmix <= 0.0:
        return None
    if args.batch_size % 2 != 0:
        raise TrainingError(f"--mixup and --cutmix need an even --batch-size, got {args.batch_size}")
    return Mixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        label_smoothing=args.smoothing,
        num_classes=args.num_classes,
    )


def train_epoch(
    args: argparse.Namespace,
    epoch: int,
    task: ClassificationTask,
    loader: DataLoader,
    mixup: Mixup | None,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    bar: tqdm,
) -> OrderedDict[str, float]:
    """One pass over the training images; returns its mean loss, and its accuracy in percent."""
    task.train()
    loss_sum = torch.zeros((), device=task.device)
    correct = torch.zeros((), device=task.device)
    images = images_before = 0
    since = time.perf_counter()
    steps = len(loader)
    for step, (image, target) in enumerate(loader, start=1):
        if step == 1 or task.device.type == "cpu":  # elsewhere a look at each batch would wait for the device
            _check_targets(target, args.num_classes, "training")
        labels = target
        if mixup is not None:
            image, target = mixup(image, target)
        if args.channels_last:
            image = image.contiguous(memory_format=torch.channels_last)
        result = task(image, target)
        loss = result["loss"]
        optimizer.zero_grad()
        loss.backward()
        if args.clip_grad is not None:
            parameters = task.get_clip_parameters(exclude_head=args.clip_mode == "agc")
            dispatch_clip_grad(parameters, args.clip_grad, args.clip_mode)
        optimizer.step()
        if scheduler is not None:
            scheduler.step_update(epoch * steps + step)

        loss_sum += loss.detach() * len(image)
        correct += (result["output"].argmax(dim=1) == labels).sum()
        images += len(image)
        if step % args.log_interval == 0 or step == steps:  # not at each step: it waits for the device
            metrics = OrderedDict(loss=loss_sum.item() / images, top1=100 * correct.item() / images)
            _check_loss(args, metrics["loss"], f"in epoch {epoch + 1}, at or before step {step}")
            now = time.perf_counter()
            bar.set_postfix_str(
                f"epoch {epoch + 1}/{args.epochs}, loss {metrics['loss']:.4f}, accuracy {metrics['top1']:.1f} %, "
                f"{(images - images_before) / (now - since):.0f} images/s",
                refresh=False,
            )
            since, images_before = now, images
        bar.update()
    if images == 0:
        raise TrainingError("the training set gave no whole batch: lower --batch-size or --workers")
    metrics = OrderedDict(loss=loss_sum.item() / images, top1=100 * correct.item() / images)
    _check_loss(args, metrics["loss"], f"in epoch {epoch + 1}")
    return metrics


def _check_loss(args: argparse.Namespace, loss: float, when: str) -> None:
    if not math.isfinite(loss):
        raise TrainingError(
            f"the loss became {loss} {when}: lower --lr (it is {args.lr:g}), lengthen --warmup-epochs, or set "
            "--clip-grad 1"
        )


@torch.no_grad()
def evaluate(task: ClassificationTask, loader: DataLoader) -> OrderedDict[str, float]:
    """One pass over the validation images; returns their mean loss, and top-1 and top-5 accuracy in percent."""
    task.eval()
    model: Any = task.get_eval_model()
    evaluator = task.create_evaluator()
    for image, target in loader:
        output = model(image)
        if evaluator.num_samples == 0 or task.device.type == "cpu":
            _check_targets(target, output.shape[1], "validation")
        evaluator.update(output, target)
    return evaluator.compute()


# ---------------------------------------------------------------------------------------------------------------------
# Data


class ImageSamples(Dataset):
    """Images and class numbers of a source that gives PIL images or files; an unreadable image stops the run.

    timm's own dataset goes on with the next image instead. `transform` is set by `create_loader`.
    """

    def __init__(self, source: Any, mode: str) -> None:
        self.source = source
        self.mode = mode
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        try:
            image, target = self.source[index]
            if not isinstance(image, Image.Image):
                image = Image.open(image)
            image = image.convert(self.mode)
        except UnidentifiedImageError as error:
            raise TrainingError(
                f"cannot read image {self.name(index)}: not an image that Pillow knows; repair it or remove it"
            ) from error
        except Exception as error:  # Pillow raises nearly everything at damaged files
            raise TrainingError(
                f"cannot read image {self.name(index)}: {_reason(error)}; repair it or remove it"
            ) from error
        try:
            return self.transform(image), target
        except Exception as error:
            raise TrainingError(
                f"cannot transform image {self.name(index)}: {_reason(error)}; look at --aa and the flags beside it"
            ) from error

    def name(self, index: int) -> str:
        """The image's path, or its number where it has none."""
        return self.source.filename(index, absolute=True) if hasattr(self.source, "filename") else f"number {index}"


def open_datasets(args: argparse.Namespace) -> tuple[Any, Any, list[str] | None]:
    """Training and validation images, and the names of their classes where they are known."""
    mode = "L" if args.in_chans == 1 else "RGB"
    if args.dataset == "sklearn/digits":
        train_digits, val_digits = _digits(args.seed)
        return ImageSamples(train_digits, mode), ImageSamples(val_digits, mode), [str(digit) for digit in range(10)]
    if args.dataset.startswith("sklearn/"):
        raise TrainingError(f"unknown dataset {args.dataset!r}: of scikit-learn's there is 'sklearn/digits'")

    if args.dataset and not args.dataset.startswith(("torch/", "hfds/", "wds/")):
        raise TrainingError(
            f"unknown dataset {args.dataset!r}: give sklearn/digits, torch/…, hfds/… or wds/…, or leave --dataset out "
            "for the image folder --data-dir"
        )
    is_folder = not args.dataset
    if args.data_dir is None and not args.dataset.startswith("hfds/"):
        raise TrainingError("no data: give --data-dir, or --dataset sklearn/digits to try the program out")
    if is_folder and not Path(args.data_dir).is_dir():
        raise TrainingError(
            f"--data-dir {args.data_dir} is not a folder; it must hold train/<class>/* and val/<class>/*"
        )
    datasets = []
    for split, is_training in ((args.train_split, True), (args.val_split, False)):
        try:
            dataset = create_dataset(
                args.dataset,
                root=args.data_dir,
                split=split,
                is_training=is_training,
                batch_size=args.batch_size,
                seed=args.seed,
                input_img_mode=mode,
                download=args.dataset_download,
            )
        except (RuntimeError, OSError, ValueError, AssertionError, ImportError, LookupError, TypeError) as error:
            where = args.dataset or args.data_dir
            reason = _reason(error).replace("download=True", "--dataset-download")
            raise TrainingError(f"cannot open the {split} images of {where}: {reason}") from error
        datasets.append(dataset)
    if is_folder:
        _check_folders(args, datasets[0].reader, datasets[1].reader)

    names = _class_names(datasets[0])
    if names is not None and len(names) < 2:
        raise TrainingError(f"the images have one class alone, {names[0]!r}: a classifier needs two or more")
    if names is not None and _class_names(datasets[1]) not in (None, names):
        raise TrainingError("the training and the validation images do not have the same classes")
    samples = [
        dataset if isinstance(dataset, IterableDataset) else ImageSamples(getattr(dataset, "reader", dataset), mode)
        for dataset in datasets
    ]
    return samples[0], samples[1], names


def _digits(seed: int) -> list[list[tuple[Image.Image, int]]]:
    """scikit-learn's 1,797 handwritten digits, 8x8 gray, split 4 to 1 by the seed, equally in each class."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise TrainingError("--dataset sklearn/digits needs scikit-learn: pip install scikit-learn") from error
    digits = load_digits()
    # The gray levels are 0 to 16, more ink is higher.
    samples = [
        (Image.fromarray((pixels * (255 / 16)).astype("uint8")), int(target))
        for pixels, target in zip(digits.images, digits.target, strict=True)
    ]
    return train_test_split(samples, test_size=0.2, random_state=seed, stratify=digits.target)


def _check_folders(args: argparse.Namespace, train_reader: Any, val_reader: Any) -> None:
    """Refuses what timm's image folders let pass: a split that is missing, a class with no image."""
    for reader, flag, split in (
        (train_reader, "--train-split", args.train_split),
        (val_reader, "--val-split", args.val_split),
    ):
        if Path(reader.root).samefile(args.data_dir):  # timm's way out where it finds no such folder
            raise TrainingError(
                f"--data-dir {args.data_dir} has no folder for {flag} {split}; it must hold train/<class>/* and "
                "val/<class>/*"
            )
    for reader in (train_reader, val_reader):
        root = Path(reader.root)
        held = {reader.filename(i).split(os.sep)[0] for i in range(len(reader))}
        if "" in reader.class_to_idx:
            raise TrainingError(f"{root} holds images beside the class folders: move each into the folder of its class")
        empty = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and entry.name not in held)
        if empty:
            raise TrainingError(f"class folder {root / empty[0]} has no image: add some, or remove the folder")
        deep = next((name for name in map(reader.filename, range(len(reader))) if name.count(os.sep) > 1), None)
        if deep is not None:  # timm would name the class after the folder that holds the image
            raise TrainingError(f"image {root / deep} is in a folder within its class folder: move it up")
    train_classes, val_classes = set(train_reader.class_to_idx), set(val_reader.class_to_idx)
    if train_classes != val_classes:
        odd = sorted(train_classes ^ val_classes)[0]
        has, lacks = (train_reader, val_reader) if odd in train_classes else (val_reader, train_reader)
        raise TrainingError(f"class {odd!r} is in {has.root} but not in {lacks.root}: both need the same class folders")


def _class_names(dataset: Any) -> list[str] | None:
    class_to_idx = getattr(getattr(dataset, "reader", None), "class_to_idx", None) or getattr(
        dataset, "class_to_idx", None
    )
    if class_to_idx:
        return [str(name) for name in sorted(class_to_idx, key=class_to_idx.__getitem__)]
    names = getattr(dataset, "classes", None)
    return [str(name) for name in names] if names else None


def _num_classes(asked: int | None, class_names: list[str] | None) -> int:
    if class_names is None:
        if asked is None:
            raise TrainingError("the dataset does not say how many classes it has: set --num-classes")
        return asked
    if asked is not None and asked != len(class_names):
        raise TrainingError(f"--num-classes is {asked}, but the images have {len(class_names)} classes: leave it out")
    return len(class_names)


def _check_targets(target: torch.Tensor, num_classes: int, what: str) -> None:
    low, high = int(target.min()), int(target.max())
    if low < 0 or high >= num_classes:
        bad = low if low < 0 else high
        raise TrainingError(f"a {what} image has class number {bad}, the model has {num_classes}: set --num-classes")


def _posterize(image: Image.Image, bits: int, **kwargs: Any) -> Image.Image:
    """timm's, which asks for 0 bits at full strength, and Pillow from version 13 on for at least 1."""
    return auto_augment.posterize(image, max(1, bits), **kwargs)


def create_loaders(
    args: argparse.Namespace, train_set: Any, val_set: Any, data_config: dict[str, Any], device: torch.device
) -> tuple[DataLoader, DataLoader]:
    """timm's loaders: augmented and shuffled for training, in order for validation."""
    if not isinstance(train_set, IterableDataset) and len(train_set) < args.batch_size:
        raise TrainingError(
            f"--batch-size {args.batch_size} is more than the {len(train_set)} training images: lower it"
        )
    for policy in ("Posterize", "PosterizeIncreasing", "PosterizeOriginal"):
        auto_augment.NAME_TO_OP[policy] = _posterize
    common = {
        "input_size": data_config["input_size"],
        "mean": data_config["mean"],
        "std": data_config["std"],
        "num_workers": args.workers,
        "pin_memory": device.type == "cuda",
        "device": device,
    }
    try:
        train_loader = create_loader(
            train_set,
            batch_size=args.batch_size,
            is_training=True,
            no_aug=args.no_aug,
            re_prob=args.reprob,
            re_mode=args.remode,
            scale=args.scale,
            ratio=args.ratio,
            hflip=args.hflip,
            vflip=args.vflip,
            color_jitter=args.color_jitter,
            auto_augment=args.aa,
            interpolation=data_config["interpolation"] if args.no_aug else args.train_interpolation,
            **common,
        )
        val_loader = create_loader(
            val_set,
            batch_size=args.validation_batch_size or args.batch_size,
            interpolation=data_config["interpolation"],
            crop_pct=data_config["crop_pct"],
            **common,
        )
    except (ValueError, AssertionError, KeyError, TypeError) as error:
        raise TrainingError(f"cannot set up the images: {_reason(error)}") from error
    return train_loader, val_loader


# ---------------------------------------------------------------------------------------------------------------------
# Results


def create_run_folder(args: argparse.Namespace, input_size: Sequence[int]) -> Path:
    """A new folder for the results of this run."""
    model = args.model.split(":")[-1].replace("/", "_")
    name = args.experiment or f"{datetime.now():%Y%m%d-%H%M%S}-{model}-{input_size[-1]}"
    folder = Path(args.output).expanduser() / name
    if (folder / "summary.csv").exists():
        raise TrainingError(f"{folder} holds the results of another run: choose another --experiment, or move it away")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"cannot make the folder {folder}: {error.strerror}") from error
    return folder


def _resolved(args: argparse.Namespace) -> dict[str, Any]:
    """The recipe that repeats the run: every flag but --config, which it stands for."""
    return {key: value for key, value in vars(args).items() if key != "config"}


def save_model(model: nn.Module, folder: Path, class_names: list[str] | None, data_config: dict[str, Any]) -> None:
    """Writes model.safetensors and config.json, as `timm.create_model("local-dir:…")` reads them."""
    fresh = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    save_for_hf(
        # safetensors takes contiguous tensors alone
        copy.deepcopy(model).to(memory_format=torch.contiguous_format),
        str(fresh),
        model_config={"label_names": class_names} if class_names else None,
        safe_serialization=True,
        data_config=data_config,
    )
    # Whole files take the place of the old ones, so that a reader never sees half of one.
    folder.mkdir(exist_ok=True)
    for file in fresh.iterdir():
        os.replace(file, folder / file.name)
    fresh.rmdir()


if __name__ == "__main__":
    sys.exit(main())

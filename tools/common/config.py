"""Settings of commands, filled by the command line and by recipes."""

import argparse
from collections.abc import Set
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

from .cli import (
    CommandError,
    CommandLineSwitch,
    KeyValues,
    Parser,
    above_zero,
    at_least_zero,
    below_one,
    count,
    number,
    positive,
    rate,
    up_to_one,
)
from .flags import add_flags, flag, from_flags, section

INTERPOLATIONS = ["bicubic", "bilinear", "lanczos", "nearest", "box", "hamming"]
DTYPES = ("float64", "float32", "bfloat16", "float16")


@dataclass
class LoadingConfig:
    """Loads the images of any task in batches."""

    batch_size: int = flag(128, "images per step and process", type=positive, metavar="N", short="-b")
    validation_batch_size: int | None = flag(
        None, "images per evaluation step and process (default: --batch-size)", type=positive, metavar="N", short="-vb"
    )
    workers: int = flag(4, "image loading processes", type=count, metavar="N", short="-j")
    max_bad_images: int = flag(0, "unreadable images to skip before stopping", type=count, metavar="N")


@dataclass
class DataConfig(LoadingConfig):
    """Selects and loads the images of a classifier."""

    data_dir: str | None = flag(
        None, "folder with train/<class>/* and val/<class>/*, or train.tar and val.tar", metavar="DIR"
    )
    dataset: str = flag("", "sklearn/digits, torch/…, hfds/… or wds/…, instead of an image folder", metavar="NAME")
    train_split: str = flag("train", "split to train on", metavar="NAME")
    val_split: str = flag("validation", "split to evaluate on", metavar="NAME")
    dataset_download: bool = flag(False, "download a torch/… dataset into --data-dir")
    allow_shard_commands: bool = flag(
        False,
        "run the programs that addresses of wds/ shards name: any command for pipe:, curl for http:, gsutil for gs:",
        action=CommandLineSwitch,
    )


@dataclass
class EvaluationDataConfig(DataConfig):
    """Selects the images of an evaluation.

    Fields without a flag are for training.
    """

    train_split: str = "train"
    validation_batch_size: int | None = None
    seed: int = flag(42, "seed of the run, which splits --dataset sklearn/digits", type=count, metavar="N", short="-s")
    class_map: str | None = flag(None, "the model's class names in order, one per line", metavar="FILE")


@dataclass
class ValidationDataConfig(EvaluationDataConfig):
    """Selects the images and labels of `ValidationConfig`.

    Attributes:
        real_labels: File of the reassessed ImageNet labels; empty for those of timm, None for none.
    """

    batch_size: int = flag(64, "images per step and process", type=positive, metavar="N", short="-b")
    real_labels: str | None = flag(
        None,
        "also report accuracy on the reassessed ImageNet labels (Beyer et al. 2020), from timm or a JSON file",
        nargs="?",
        const="",
        metavar="FILE",
    )


@dataclass
class ImageConfig:
    """Overrides the preprocessing settings of a model."""

    img_size: int | None = flag(
        None, "image height and width in pixels (default: the model's)", type=positive, metavar="N"
    )
    mean: list[float] | None = flag(
        None, "mean of each channel, for pixels from 0 to 1 (default: the model's)", type=number, nargs="+", metavar="X"
    )
    std: list[float] | None = flag(
        None, "standard deviation of each channel (default: the model's)", type=above_zero, nargs="+", metavar="X"
    )
    interpolation: str | None = flag(None, "resizing filter (default: the model's)", choices=INTERPOLATIONS)
    crop_pct: float | None = flag(
        None, "center crop of the evaluation, relative to the resized image (default: the model's)", type=above_zero,
        metavar="X",
    )  # fmt: skip


@dataclass
class AugmentConfig:
    """Random changes of the training images."""

    no_aug: bool = flag(False, "only resize and crop, as in evaluation", action="store_true")
    aug_repeats: int = flag(1, "augmented views of an image in a row", type=positive, metavar="N")
    scale: list[float] = flag(
        [0.08, 1.0], "range of the random crop's relative area", type=above_zero, nargs=2, metavar="X"
    )
    ratio: list[float] = flag(
        [3 / 4, 4 / 3], "range of the random crop's aspect ratio", type=above_zero, nargs=2, metavar="X"
    )
    hflip: float = flag(0.5, "probability of a horizontal flip", type=rate, metavar="X")
    vflip: float = flag(0.0, "probability of a vertical flip", type=rate, metavar="X")
    color_jitter: float = flag(0.4, "strength of color jitter", type=at_least_zero, metavar="X")
    aa: str | None = flag(None, "augmentation policy, e.g. rand-m9-mstd0.5-inc1", metavar="POLICY")
    train_interpolation: str = flag("random", "resizing filter in training", choices=["random", *INTERPOLATIONS])
    reprob: float = flag(0.0, "probability of random erasing", type=rate, metavar="X")
    remode: str = flag("pixel", "fill of erased rectangles", choices=["const", "rand", "pixel"])
    mixup: float = flag(0.0, "mixup alpha (0: off)", type=at_least_zero, metavar="X")
    cutmix: float = flag(0.0, "cutmix alpha (0: off)", type=at_least_zero, metavar="X")
    mixup_prob: float = flag(1.0, "probability of mixup or cutmix", type=rate, metavar="X")
    mixup_switch_prob: float = flag(
        0.5, "probability of cutmix instead of mixup, if both are on", type=rate, metavar="X"
    )
    mixup_off_epoch: int = flag(0, "epoch that turns mixup and cutmix off (0: never)", type=count, metavar="N")
    smoothing: float = flag(0.1, "label smoothing", type=below_one, metavar="X")


@dataclass
class ValidationImageConfig(ImageConfig):
    """Overrides the preprocessing settings of a model, also with those of the paper."""

    official_crop: bool = flag(
        False,
        "crop as in the paper: shorter side to 256 pixels for size 224, to 384 for 384, bicubic, center crop",
        action="store_true",
    )


def _epoch_and_rate(text: str) -> str:
    epoch, _, value = text.partition(":")
    try:
        return f"{count(epoch)}:{rate(value)}"
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"expected EPOCH:RATE, such as 260:0.6, got {text!r}") from error


@dataclass
class ModelConfig:
    """Chooses the model to train and its initial weights."""

    model: str = flag("stvit_small", "any timm model", metavar="NAME")
    pretrained: bool = flag(False, "start from the published weights")
    pretrained_path: str | None = flag(
        None, "start from the weights in this file, ours or the authors'", metavar="FILE"
    )
    num_classes: int | None = flag(None, "number of classes (default: that of the data)", type=positive, metavar="N")
    in_chans: int | None = flag(None, "image channels, 1 or 3 (default: 3)", type=positive, metavar="N")
    drop: float = flag(0.0, "dropout rate before the classifier", type=rate, metavar="X")
    drop_path: float | None = flag(None, "stochastic depth rate of the last block", type=rate, metavar="X")
    drop_path_schedule: list[str] | None = flag(
        None, "stochastic depth rate X from epoch E (0-based) on", nargs="+", metavar="E:X",
        type=_epoch_and_rate,
    )  # fmt: skip
    grad_checkpointing: bool = flag(False, "recompute activations in the backward pass, to save memory")
    model_kwargs: dict[str, Any] = flag(
        {}, "further arguments of the model", nargs="*", action=KeyValues, metavar="K=V"
    )


@dataclass(frozen=True)
class ModelSource:
    """Chooses a trained model and its weights.

    Attributes:
        img_size: Image size in pixels; None for the size in the weights.
    """

    checkpoint: str | None = flag(
        None,
        "run, folder or file of weights, or a model on the Hub (default: published weights of --model)",
        metavar="PATH|hf-hub:ORG/NAME",
    )
    model: str | None = flag(None, "timm model; needed for a file that does not name its model", metavar="NAME")
    pretrained: bool = flag(
        True,
        "load the published weights of --model, not random ones",
        action=argparse.BooleanOptionalAction,
    )
    use_ema: bool | None = flag(
        None,
        "use the moving average (EMA) in a file with both (default: use it if present)",
        action=argparse.BooleanOptionalAction,
    )
    num_classes: int | None = flag(None, "number of classes (default: as in the weights)", type=positive, metavar="N")
    in_chans: int | None = flag(None, "image channels (default: as in the weights)", type=positive, metavar="N")
    model_kwargs: dict[str, Any] = flag(
        {}, "further arguments of the model", nargs="*", action=KeyValues, metavar="K=V"
    )
    img_size: int | None = None

    @property
    def title(self) -> str:
        """Name of the weights in messages."""
        return self.checkpoint or self.model or ""


@dataclass(frozen=True)
class TrainedSource(ModelSource):
    """Chooses a model and its weights, which cannot be random."""

    pretrained: bool = True


@dataclass
class WeightsFlags(ImageConfig):
    """Selects the weights to convert or push.

    Some flags state facts that the file of the weights does not store.

    Attributes:
        source: Run directory, model folder or file.
    """

    use_ema: bool | None = flag(
        None,
        "use the moving average of a file that has both, or the weights themselves (--no-use-ema)",
        action=argparse.BooleanOptionalAction,
    )
    model: str | None = flag(None, "any timm model or tag (default: detected from the shapes)", metavar="NAME")
    model_kwargs: dict[str, Any] = flag(
        {}, "further arguments of the model", nargs="*", action=KeyValues, metavar="K=V"
    )
    in_chans: int | None = flag(None, "image channels (default: those of the weights)", type=positive, metavar="N")
    results: str | None = flag(None, "results.json of tools/validate_cls.py, for the card", metavar="FILE")
    source: str = ""

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> "WeightsFlags":
        """Returns the values of parsed flags."""
        flags = from_flags(cls, args)
        flags.source = args.source
        return flags

    def check_unused(self, source: str, allowed: Set[str] = frozenset()) -> None:
        """Checks that no flag repeats what a source already stores.

        Args:
            source: Name of the source, for the message.
            allowed: Names of flags that can be used with this source.

        Raises:
            CommandError: If a flag is set.
        """
        names = [item.name for item in fields(self) if item.name not in {"source", *allowed}]
        used = [f"--{name.replace('_', '-')}" for name in names if getattr(self, name) not in (None, {})]
        if used:
            raise CommandError(
                f"{', '.join(used)} cannot be combined with {source}, which stores its own configuration; remove "
                f"{', '.join(used)}"
            )


def add_source_arguments(parser: Parser) -> None:
    """Adds the flags of `WeightsFlags` to a parser."""
    parser.add_argument("source", metavar="SOURCE", help="run directory, model folder or file of weights")
    add_flags(parser.add_argument_group("model"), WeightsFlags)


@dataclass
class PushConfig:
    """Settings of a push to the Hub.

    Attributes:
        origin: Weights to push.
    """

    weights: str = flag("best", "weights of a run to push", choices=["best", "last", "last_ema"])
    yolo: bool = flag(False, "SOURCE is a checkpoint of Ultralytics", action="store_true")
    example: str | None = flag(
        None, "picture to show detections on, for the card (default: Ultralytics' bus)", metavar="IMAGE"
    )
    space: bool = flag(False, "push the page of tools/demo.py with the model, as a Space", action="store_true")
    repo_id: str = flag("", "repository, created if it is missing", required=True, metavar="ORG/NAME")
    revision: str | None = flag(None, "branch, created if it is missing (default: main)", metavar="BRANCH")
    tag: str | None = flag(None, "tag for the commit", metavar="NAME")
    private: bool = flag(False, "make a new repository private", action="store_true")
    create_pr: bool = flag(False, "open a pull request instead of committing to main", action="store_true")
    license: str | None = flag(None, "license of the weights on the Hub: mit, apache-2.0, …", metavar="NAME")
    message: str | None = flag(None, "commit message (default: Add MODEL)", metavar="TEXT")
    dry_run: bool = flag(False, "write and show the folder and the card, push nothing", action="store_true")
    output: str | None = flag(None, "folder to keep (default with --dry-run: hub/ORG/NAME)", metavar="DIR")
    origin: WeightsFlags = field(default_factory=WeightsFlags)


class WarmupEpochs(argparse.Action):
    """A warmup in epochs, which replaces an earlier one in updates.

    A default, a recipe or another flag may have set the latter.
    """

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, values)
        namespace.warmup_updates = None


@dataclass
class OptimConfig:
    """Length of the training, optimizer, learning rate schedule and moving average."""

    epochs: int = flag(300, "epochs to train", type=positive, metavar="N")
    grad_accum_steps: int = flag(1, "steps per update", type=positive, metavar="N")
    opt: str = flag("adamw", "any timm optimizer", metavar="NAME")
    opt_eps: float | None = flag(None, "epsilon (default: the optimizer's)", type=at_least_zero, metavar="X")
    opt_betas: list[float] | None = flag(None, "betas (default: the optimizer's)", type=number, nargs="+", metavar="X")
    momentum: float = flag(0.9, "momentum, if the optimizer has one", type=number, metavar="X")
    weight_decay: float = flag(0.05, "weight decay of all parameters except 1-D ones", type=number, metavar="X")
    layer_decay: float | None = flag(
        None, "factor of the learning rate from layer to layer, at most 1", type=up_to_one, metavar="X"
    )
    clip_grad: float | None = flag(
        None, "gradient clipping threshold (default: no clipping)", type=above_zero, metavar="X"
    )
    clip_mode: str = flag("norm", "gradient clipping mode", choices=["norm", "value", "agc"])
    lr: float | None = flag(None, "learning rate (default: computed from --lr-base)", type=at_least_zero, metavar="X")
    lr_base: float = flag(5e-4, "learning rate for updates of --lr-base-size images", type=at_least_zero, metavar="X")
    lr_base_size: int = flag(512, "images per update that --lr-base is for", type=positive, metavar="N")
    sched: str = flag("cosine", "any timm learning rate schedule", metavar="NAME")
    sched_on_updates: bool = flag(False, "change the learning rate after each update, not after each epoch")
    warmup_epochs: int = flag(
        5, "epochs of warmup from --warmup-lr to --lr (0: none)", type=count, action=WarmupEpochs, metavar="N"
    )
    warmup_lr: float = flag(1e-6, "learning rate of the first step", type=at_least_zero, metavar="X")
    warmup_updates: int | None = flag(
        None, "updates of warmup, instead of --warmup-epochs; needs --sched-on-updates", type=count, metavar="N"
    )
    min_lr: float = flag(1e-5, "learning rate of the last epoch", type=at_least_zero, metavar="X")
    decay_epochs: float | None = flag(
        None, "epochs between decays (step, default: 90), or of the last phase (wsd, default: 0.2 of all)",
        type=above_zero, metavar="X",
    )  # fmt: skip
    decay_milestones: list[int] | None = flag(
        None, "epochs after which the learning rate decays (multistep)", type=positive, nargs="+", metavar="E"
    )
    decay_rate: float | None = flag(
        None, "factor of each decay (default: 0.1), or the power of poly (default: 1)", type=above_zero, metavar="X"
    )
    bn_eval: bool = flag(False, "keep BatchNorm in evaluation mode, so that its statistics do not change")
    sync_bn: bool = flag(False, "compute BatchNorm statistics over all processes (GPUs)")
    model_ema: bool = flag(False, "keep an exponential moving average of the weights, evaluate it and save it")
    model_ema_decay: float = flag(0.9998, "decay of the moving average at each update", type=rate, metavar="X")
    model_ema_warmup: bool = flag(False, "increase the decay of the moving average from 0")


@dataclass
class DeviceConfig:
    """Device and precision."""

    device: str | None = flag(None, "cpu, cuda, mps, … (default: cuda if available, else cpu)", metavar="NAME")
    dist_backend: str | None = flag(
        None, "torch.distributed backend (default: nccl for cuda, except on Windows; else gloo)", metavar="NAME"
    )
    amp: bool = flag(False, "mixed precision")
    amp_dtype: str = flag("bfloat16", "lower precision of --amp", choices=["bfloat16", "float16"])
    model_dtype: str = flag("float32", "precision of weights and images", choices=list(DTYPES))
    channels_last: bool = flag(False, "channels_last memory format")


@dataclass
class TrainDeviceConfig(DeviceConfig):
    """Device, precision and speed of a training."""

    compile: bool = flag(False, "compile the model with torch.compile, on a GPU with CUDA graphs")


@dataclass
class RunConfig:
    """Run directory, checkpoints, logs and uploads of a training."""

    seed: int = flag(42, "random seed", type=count, metavar="N", short="-s")
    output: str = flag("runs", "folder of all runs", metavar="DIR")
    experiment: str | None = flag(None, "name of the run directory (default: time, model and size)", metavar="NAME")
    resume: str | None = flag(
        None,
        "resume from a run directory, a checkpoint, or an upload of --repo-id; auto: the last run of the same command, "
        "if there is one; another --epochs extends or shortens the run",
        in_recipe=False,
        metavar="auto|PATH|hf-hub:ORG/NAME@last",
    )
    allow_changed_data: bool = flag(
        False, "resume even if the images or the class names have changed", action=CommandLineSwitch
    )
    checkpoint_steps: int = flag(500, "updates between checkpoints within an epoch", type=count, metavar="N")
    checkpoint_epochs: int = flag(
        0, "epochs between checkpoints that are kept permanently (0: keep only the last two)", type=count, metavar="N"
    )
    log_interval: int = flag(10, "updates between log lines", type=positive, metavar="N")
    log_tensorboard: bool = flag(False, "log to <run>/tensorboard")
    log_wandb: bool = flag(False, "log to Weights & Biases")
    wandb_project: str = flag("stvit", "Weights & Biases project", metavar="NAME")
    repo_id: str | None = flag(None, "upload the run to this Hub repository, in the background", metavar="ORG/NAME")
    hub_every: int = flag(10, "epochs between uploads", type=positive, metavar="N")
    hub_private: bool = flag(False, "make a new repository private")


class TrainConfig(Protocol):
    """Sections that the settings of every training command have."""

    @property
    def data(self) -> LoadingConfig:
        """Batch size and workers."""
        ...

    @property
    def optim(self) -> OptimConfig:
        """Optimizer and schedule."""
        ...

    @property
    def device(self) -> TrainDeviceConfig:
        """Device and precision."""
        ...

    run: RunConfig


@dataclass
class ClassificationConfig:
    """Settings of a classification training. Each section is a group of flags."""

    data: DataConfig = section("data", DataConfig)
    model: ModelConfig = section("model", ModelConfig)
    image: ImageConfig = section("image preprocessing", ImageConfig)
    augment: AugmentConfig = section("augmentation and regularization", AugmentConfig)
    optim: OptimConfig = section("optimizer and schedule", OptimConfig)
    device: TrainDeviceConfig = section("device and speed", TrainDeviceConfig)
    run: RunConfig = section("run", RunConfig)


@dataclass
class ValidationConfig:
    """Settings of an evaluation of a classifier. Each section is a group of flags."""

    source: TrainedSource = section("model", TrainedSource)
    data: ValidationDataConfig = section("data", ValidationDataConfig)
    image: ValidationImageConfig = section("image preprocessing", ValidationImageConfig)
    device: DeviceConfig = section("device and speed", DeviceConfig)
    output: str | None = flag(None, "folder for results.json, per_class.csv and confusion.png", metavar="DIR")


def check_in_chans(in_chans: int) -> None:
    """Checks the number of image channels.

    Raises:
        CommandError: If it is neither 1 nor 3.
    """
    if in_chans not in (1, 3):
        raise CommandError(f"--in-chans must be 1 (gray) or 3 (color), got {in_chans}")


def check_sides(short_flag: str, short: int, long_flag: str, long: int) -> None:
    """Checks that the shorter side of an image is not larger than its longer side.

    Raises:
        CommandError: If it is larger, so that it would have no effect.
    """
    if short > long:
        raise CommandError(f"{short_flag} {short} is larger than {long_flag} {long}; lower it to at most {long}")


def check_channels(in_chans: int, images: ImageConfig) -> None:
    """Checks the number of image channels, and the lengths of --mean and --std.

    Raises:
        CommandError: If they are wrong.
    """
    check_in_chans(in_chans)
    for name, values in (("mean", images.mean), ("std", images.std)):
        if values is not None and len(values) not in (1, in_chans):
            raise CommandError(f"--{name} must be one number, or one for each of {in_chans} channels, got {values}")

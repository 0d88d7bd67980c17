"""Accuracy of models that are trained with the same recipe, beside their cost.

Each model is trained with each seed by the engine of `stvit train`, in a run directory of its own:

    <output>/<model>-seed<N>/   the run, with result.json when it is complete
    <output>/speed.csv          measurements of speed and memory

Several processes may run the same command. Each takes the next run that no other process trains.
"""

import csv
import gc
import json
import math
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from ..common.classification import prepare
from ..common.classification_flags import parse_args
from ..common.cli import CommandError, Interrupted, reason
from ..common.config import ClassificationConfig
from ..common.data import open_images
from ..common.distributed import Distributed
from ..common.engine import Engine, open_session
from ..common.evaluation import confidence_interval
from ..common.files import atomic_write, read_utf8
from ..common.flags import to_recipe
from ..common.locks import InUseError
from ..common.recipes import load_yaml
from ..common.runs import RESUME_MUTABLE
from .config import AccuracyConfig, SpeedConfig
from .measure import append, circumstances
from .models import (
    Case,
    benchmark_model,
    benchmark_train,
    check_size,
    count_gmac,
    count_parameters,
    parse_call,
    significant,
)

__all__ = ["benchmark", "interval_of_means"]

# Flags that the recipe must set. Otherwise each model would use its own value.
SHARED_FLAGS = ("img_size", "mean", "std", "interpolation", "crop_pct")
# Flags that may change when a series continues. The results do not depend on them.
MUTABLE = RESUME_MUTABLE - {"batch_size", "grad_accum_steps"}
# Flags whose value a run determines if it is None.
DETERMINED = ("lr", "num_classes", "in_chans")
# Columns that identify a measurement, beside the model, the image size and the machine.
SETTINGS = ("way", "dtype", "batch_size")

# 97.5 % quantiles of Student's t distribution with 1 to 30 degrees of freedom.
_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


@dataclass(frozen=True)
class Result:
    """Result of a complete run.

    Attributes:
        top1: Top-1 accuracy after the last epoch, in percent.
        images: Number of validation images.
        num_classes: Number of classes.
    """

    top1: float
    images: int
    num_classes: int

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of `top1`, in percent, for independently drawn images."""
        low, high = confidence_interval(round(self.top1 / 100 * self.images), self.images)
        return 100 * low, 100 * high


@dataclass(frozen=True, eq=False)
class Run:
    """A model and a seed to train.

    Attributes:
        model: Model as a Python call.
        seed: Seed of weights, order and augmentation.
        settings: Settings of the training.
    """

    model: str
    seed: int
    settings: ClassificationConfig

    @property
    def folder(self) -> Path:
        """The run directory."""
        return Path(self.settings.run.output) / str(self.settings.run.experiment)

    def read(self) -> Result | None:
        """Returns the result; None if the run is not complete.

        Raises:
            CommandError: If result.json is damaged.
        """
        path = self.folder / "result.json"
        try:
            return Result(**json.loads(read_utf8(path)))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise CommandError(f"cannot read {path}: {reason(error)}; remove the file, and run it again") from error


def benchmark(config: AccuracyConfig) -> Iterator[list[dict[str, Any]]]:
    """Yields tables of all models: first what exists, then after each step.

    A step is a run, or the measurement. The runs are done seed by seed, so that after an interruption the numbers
    of runs of two models differ by at most one. Runs that another process trains are left to it.
    """
    models = _unique([_normalized(spec) for spec in config.models])
    runs = [_create_run(config, model, seed) for seed in dict.fromkeys(config.seeds) for model in models]
    for run in runs:
        _check_same_flags(run)
    settings = runs[0].settings
    cases = {model: _case(config, model, settings, _num_classes(runs)) for model in models}
    for case in cases.values():
        check_size(case)
    costs = {
        model: {
            "params_m": round(count_parameters(case) / 1e6, 2),
            "gmac": significant(count_gmac(case)),
            "img_size": case.img_size,
            "epochs": settings.optim.epochs,
        }
        for model, case in cases.items()
    }
    speed = Speed(config, settings, cases)
    yield _table(costs, runs, speed)
    in_use = []
    for number, run in enumerate(runs if "train" in config.parts else [], 1):
        if run.read() is not None:
            continue
        print(f"\nrun {number} of {len(runs)}: {run.model}, seed {run.seed}", flush=True)
        try:
            _train(run)
        except InUseError as error:
            print(f"{error.args[0].partition(';')[0]}; continuing with the next run", flush=True)
            in_use.append(run)
            continue
        gc.collect()  # the loaders and their processes, before the next ones start
        yield _table(costs, runs, speed)
    left = sum(run.read() is None for run in in_use)
    if left:  # a measurement would be disturbed
        print(f"another process still trains {left} of the runs; when it has finished, run the command again")
    elif "measure" in config.parts and not speed.is_current():
        speed.measure()
        yield _table(costs, runs, speed)


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def _normalized(spec: str) -> str:
    """Returns a model as a Python call in one spelling."""
    name, kwargs = parse_call(spec)
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in kwargs.items())})" if kwargs else name


def _unique(models: Sequence[str]) -> list[str]:
    """Returns the models.

    Raises:
        CommandError: If two of them are the same, or would have the same run directory.
    """
    names: dict[str, str] = {}
    for model in models:
        name = _folder_name(model)
        if name in names:
            raise CommandError(f"--models {names[name]} and {model} have the same run directory; remove one")
        names[name] = model
    return list(models)


def _folder_name(model: str) -> str:
    return re.sub(r"[^\w.-]+", "_", model).strip("_")


def _create_run(config: AccuracyConfig, model: str, seed: int) -> Run:
    """Returns a run with the settings of the recipe.

    Raises:
        CommandError: If the recipe leaves something to the model that all models must share.
    """
    data = [] if config.data_dir is None else [f"--data-dir={config.data_dir}"]
    name = f"--experiment={_folder_name(model)}-seed{seed}"
    flags = [f"--config={config.config}", f"--output={config.output}", name, f"--seed={seed}", "--resume=auto"]
    settings = parse_args([*flags, f"--device={config.device}", *data])
    settings.model.model, settings.model.model_kwargs = parse_call(model)
    own = [name for name in SHARED_FLAGS if getattr(settings.image, name) is None]
    if own:
        raise CommandError(
            f"--config {config.config} does not set {', '.join(own)}, for which each model has its own value; add "
            f"{'it' if len(own) == 1 else 'them'} to the recipe"
        )
    return Run(model, seed, settings)


def _check_same_flags(run: Run) -> None:
    """Checks that the run on the disk, if there is one, has the same flags.

    Raises:
        CommandError: If another flag would give another result.
    """
    path = run.folder / "config.yaml"
    try:
        then = load_yaml(read_utf8(path))
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise CommandError(f"cannot read {path}: {reason(error)}; remove the folder to start the run again") from error
    now = yaml.safe_load(yaml.safe_dump(to_recipe(run.settings)))  # the file has lists instead of tuples
    changed = [
        f"{key} {then.get(key)!r}, now {value!r}"
        for key, value in now.items()
        if key not in MUTABLE and then.get(key) != value and not (key in DETERMINED and value is None)
    ]
    if changed:
        raise CommandError(
            f"{run.folder} was trained with other flags ({'; '.join(changed)}); pass the same flags, or choose another "
            "--output"
        )


def _train(run: Run) -> None:
    """Trains, or continues a run, and writes its result.

    Raises:
        InUseError: If another process trains it.
        Interrupted: If a signal ended the run. Its state is saved.
        CommandError: If the run fails.
    """
    try:
        with open_session(run.settings) as session:
            with session.preparing():
                job = prepare(run.settings, session.distributed)
                engine = Engine(session, run.settings, job)
            engine.train()
            last = engine.state.progress.history[-1]
            result = Result(last["eval_top1"], len(job.images.val), job.model.num_classes)
    except Interrupted as error:  # the flag is that of `stvit train`
        raise Interrupted(str(error).removesuffix(" with --resume auto"), error.status - 128) from error
    text = json.dumps(asdict(result))
    atomic_write(run.folder / "result.json", lambda path: path.write_text(text + "\n", encoding="utf-8"))


def _num_classes(runs: Sequence[Run]) -> int:
    """Returns the number of classes.

    It is that of a complete run, of the recipe, or of the validation images.
    """
    for run in runs:
        result = run.read()
        if result is not None:
            return result.num_classes
    settings = runs[0].settings
    if settings.model.num_classes is not None:
        return settings.model.num_classes
    in_chans = settings.model.in_chans or 3
    names = open_images(
        settings.data, Distributed(torch.device("cpu")), in_chans=in_chans, is_training=False
    ).class_names
    if names is None:
        raise CommandError("the dataset does not contain its number of classes; add num_classes to the recipe")
    return len(names)


# ---------------------------------------------------------------------------------------------------------------------
# Speed and memory


class Speed:
    """Speed and memory of all models, measured in turns.

    Attributes:
        sizes: Image sizes in pixels.
        rows: Rows of the last measurement that has all models and sizes; empty without one.
    """

    def __init__(self, config: AccuracyConfig, settings: ClassificationConfig, cases: dict[str, Case]) -> None:
        """Reads the last measurement.

        Args:
            config: Settings of the series.
            settings: Settings of a training.
            cases: A training step of each model.
        """
        self.sizes = sorted({int(settings.image.img_size or 0), *config.img_size})
        self.path = Path(config.output) / "speed.csv"
        self._device = torch.device(config.device)
        self._cases = cases
        case = next(iter(cases.values()))
        common: dict[str, Any] = {
            "models": list(cases),
            "img_size": self.sizes,
            "batch_size": config.batch_size,
            "device": config.device,
            "repeats": config.repeats,
            "min_seconds": config.min_seconds,
            "num_classes": case.num_classes,
            "channels_last": case.channels_last,
        }
        self._inference = SpeedConfig(**common, ways=[config.way], dtype=config.dtype, memory=False)
        self._training = SpeedConfig(**common, ways=["eager"], dtype=case.dtype, memory=True)
        self.rows = self._read()

    def _read(self) -> dict[tuple[str, str, int], dict[str, Any]]:
        try:
            with self.path.open(newline="", encoding="utf-8") as file:
                table = list(csv.DictReader(file))
        except FileNotFoundError:
            return {}
        by_date: dict[str, dict[tuple[str, str, int], dict[str, Any]]] = {}
        for row in table:
            wanted = self._training if row["step"] == "training" else self._inference
            if [row[key] for key in SETTINGS] == [wanted.ways[0], wanted.dtype, str(wanted.batch_size)]:
                rows = by_date.setdefault(row["date"], {})  # those of a measurement have the same date
                rows[row["model"], row["step"], int(row["img_size"])] = row
        needed = {(m, step, size) for m in self._cases for step in ("inference", "training") for size in self.sizes}
        return next((rows for _, rows in sorted(by_date.items(), reverse=True) if needed <= rows.keys()), {})

    def is_current(self) -> bool:
        """Returns whether the measurement has this machine, versions and threads."""
        if not self.rows:
            return False
        now = {key: str(value) for key, value in circumstances(self._device).items() if key != "date"}
        return all(row[key] == value for row in self.rows.values() for key, value in now.items())

    def measure(self) -> None:
        """Measures all models, and adds the measurement to the file."""
        print("\nspeed and memory", flush=True)
        tables = [*benchmark_model(self._inference), *benchmark_train(self._training)]
        here = circumstances(self._device)
        append(self.path, [{**here, **row} for table in tables for row in table])
        self.rows = self._read()

    def columns(self, model: str) -> dict[str, Any]:
        """Returns the columns of a model; "" for what is not measured.

        They are images/s of inference and of training, MiB that a training step adds, and date and threads of the
        measurement.
        """
        columns: dict[str, Any] = {}
        for name, step, key in (
            ("inference", "inference", "images_per_second"),
            ("training", "training", "images_per_second"),
            ("memory", "training", "step_mib"),
        ):
            for size in self.sizes:
                value = self.rows.get((model, step, size), {}).get(key, "")
                columns[f"{name}_{size}"] = float(value) if value else ""
        row = self.rows.get((model, "inference", self.sizes[0]), {})
        return columns | {"measured": row.get("date", ""), "threads": row.get("threads", "")}


def _case(config: AccuracyConfig, model: str, settings: ClassificationConfig, num_classes: int) -> Case:
    """Returns a step of the training of a model, in its precision and format."""
    device = settings.device
    return Case(
        model,
        "eager",
        config.batch_size,
        int(settings.image.img_size or 0),
        device.amp_dtype if device.amp else "float32",
        config.device,
        is_training=True,
        num_classes=num_classes,
        channels_last=device.channels_last,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Table


def _table(costs: dict[str, dict[str, Any]], runs: Sequence[Run], speed: Speed) -> list[dict[str, Any]]:
    """Returns a row for each model, with the results that exist now."""
    by_model: dict[str, dict[int, Result]] = {model: {} for model in costs}
    for run in runs:
        result = run.read()
        if result is not None:
            by_model[run.model][run.seed] = result
    means = interval_of_means([[result.top1 for result in by_model[model].values()] for model in costs])
    rows = []
    for (model, cost), mean in zip(costs.items(), means, strict=True):
        done = by_model[model]
        rows.append(
            {
                "model": model,
                **cost,
                "runs": len(done),
                **{name: "" if value is None else round(value, 2) for name, value in mean.items()},
                "seeds": " ".join(map(str, done)),
                "top1_runs": " ".join(f"{result.top1:.2f}" for result in done.values()),
                "intervals": " ".join("{:.2f}-{:.2f}".format(*result.interval) for result in done.values()),
                **speed.columns(model),
            }
        )
    return rows


def interval_of_means(groups: Sequence[Sequence[float]]) -> list[dict[str, float | None]]:
    """Returns the mean of each model's accuracies, and its 95 % confidence interval.

    The interval is that of Student's t distribution for the mean over seeds. A few seeds give a poor standard
    deviation, so that of all models is pooled, as if it were the same for each of them. The interval says how much the
    mean depends on the seeds. It does not contain the choice of the images, which are the same for all models.

    Args:
        groups: Accuracies of each model, one for each seed.

    Returns:
        `top1`, `low` and `high` of each model; None without accuracies, or if no model has two of them.
    """
    freedom = sum(len(group) - 1 for group in groups if group)
    squares = sum((len(group) - 1) * statistics.variance(group) for group in groups if len(group) > 1)
    found: list[dict[str, float | None]] = []
    for group in groups:
        mean = statistics.mean(group) if group else None
        low = high = None
        if mean is not None and freedom > 0:
            quantile = _T[freedom - 1] if freedom <= len(_T) else 1.96 + 2.4 / freedom
            half = quantile * math.sqrt(squares / freedom / len(group))
            low, high = mean - half, mean + half
        found.append({"top1": mean, "low": low, "high": high})
    return found

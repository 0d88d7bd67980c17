"""Records of a run: table, JSON lines, curves, TensorBoard, Weights & Biases."""

import csv
import json
import math
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stvit.safe_text import redact_values

from .cli import CommandError, reason
from .files import atomic_write, open_append


def require_loggers(tensorboard: bool, wandb_project: str | None) -> None:
    """Checks that the requested loggers are installed.

    Raises:
        CommandError: If one is missing.
    """
    for flag, asked, module in (
        ("--log-tensorboard", tensorboard, "tensorboard"),
        ("--log-wandb", wandb_project is not None, "wandb"),
    ):
        if asked and find_spec(module) is None:
            raise CommandError(f"{flag} needs {module}: pip install {module}")


class RunLog:
    """Writes the records of a run to its directory.

    Args:
        folder: The run directory.
        titles: Metrics to draw over the epochs, and their labels.
        tensorboard: Whether to also write TensorBoard events, to <folder>/tensorboard.
        wandb_project: Weights & Biases project to log to; None to not use it.
        config: The recipe.
        wandb_id: Weights & Biases run to resume.
        start_update: Updates done before. TensorBoard hides its records of later updates.

    Attributes:
        wandb_id: Weights & Biases run, to pass again when the run is resumed.
    """

    def __init__(
        self,
        folder: Path,
        *,
        titles: Mapping[str, str],
        tensorboard: bool = False,
        wandb_project: str | None = None,
        config: Mapping[str, Any],
        wandb_id: str | None = None,
        start_update: int = 0,
    ) -> None:
        self.folder = folder
        self.titles = titles
        self.wandb_id = wandb_id
        self._wandb: Any = None
        self._tensorboard: Any = None
        path = folder / "log.jsonl"
        self._lines = open_append(path)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=start_update + 1)
        if wandb_project is not None:
            import wandb

            try:
                self._wandb = wandb.init(
                    project=wandb_project,
                    name=folder.name,
                    dir=str(folder),
                    id=wandb_id,
                    resume="allow",
                    config=redact_values(config),
                )
            except Exception as error:  # network errors and many others
                self._lines.close()
                raise CommandError(
                    f"cannot log to Weights & Biases: {reason(error)}; log in (wandb login), set WANDB_MODE=offline, "
                    "or remove --log-wandb"
                ) from error
            self.wandb_id = self._wandb.id

    def step(self, update: int, values: Mapping[str, Any]) -> None:
        """Records training metrics after an update."""
        self._write("train", {"update": update, **values})
        self._send(update, "train", values)

    def event(self, name: str, values: Mapping[str, Any]) -> None:
        """Records an event, only in log.jsonl."""
        self._write(name, values)

    def epoch(self, update: int, history: Sequence[Mapping[str, Any]]) -> None:
        """Records the last epoch of a history, and writes summary.csv and curve.png."""
        row = history[-1]
        self._write("epoch", {"update": update, **row})
        self._send(update, "epoch", row)
        table = self.folder / "summary.csv"
        try:
            atomic_write(table, lambda path: _write_table(path, history))
        except PermissionError as error:  # on Windows a spreadsheet has it open; the next epoch writes the whole table
            print(
                f"warning: cannot write {table}: {reason(error)}; close the program that has it open", file=sys.stderr
            )
        plot_history(history, self.folder / "curve.png", self.titles)

    def close(self) -> None:
        """Writes buffered records and closes the loggers."""
        self._lines.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _write(self, event: str, values: Mapping[str, Any]) -> None:
        # JSON has no infinity and NaN. The file is uploaded, and network errors may contain secrets.
        values = {
            k: None if isinstance(v, float) and not math.isfinite(v) else redact_values(v) for k, v in values.items()
        }
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        self._lines.write(json.dumps({"event": event, "time": now, **values}) + "\n")

    def _send(self, update: int, group: str, values: Mapping[str, Any]) -> None:
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(f"{group}/{name}", value, update)
        if self._wandb is not None:
            # The step of Weights & Biases must not decrease, but a resumed run repeats some updates.
            self._wandb.log({f"{group}/{name}": value for name, value in values.items()} | {"update": update})


def _write_table(path: Path, history: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(history[0]))
        writer.writeheader()
        writer.writerows(history)


def plot_history(history: Sequence[Mapping[str, Any]], path: Path, titles: Mapping[str, str]) -> bool:
    """Plots the loss and other metrics over the epochs.

    Args:
        history: Metrics of each epoch, named as in summary.csv.
        path: PNG file to write.
        titles: Metrics to plot beside the loss, and their labels.

    Returns:
        Whether the plot was drawn: False without matplotlib, or after an error, which is printed as a warning.
    """
    measures = {"loss": "loss", **{name: f"{title} (%)" for name, title in titles.items()}}

    def draw(figure: Any) -> None:
        from matplotlib.ticker import MaxNLocator

        epochs = [row["epoch"] + 1 for row in history]
        panels = figure.subplots(1, len(measures), squeeze=False)[0]
        for axes, (measure, label) in zip(panels, measures.items(), strict=True):
            kinds = {"train": "training (augmented)", "eval": "validation", "ema": "validation, EMA"}
            for kind, name in kinds.items():
                if f"{kind}_{measure}" in history[0]:
                    axes.plot(epochs, [row[f"{kind}_{measure}"] for row in history], label=name, marker=".")
            axes.set_xlabel("epoch")
            axes.set_ylabel(label)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(alpha=0.3)
            axes.legend()

    return save_plot(path, draw, (5 * len(measures), 4))


def has_matplotlib() -> bool:
    """Returns whether matplotlib can be imported."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def save_plot(path: Path, draw: Callable[[Any], None], size: tuple[float, float]) -> bool:
    """Draws a figure with matplotlib.

    A failure is only a warning, because other files contain the numbers.

    Args:
        path: PNG file to write.
        draw: Draws on the `matplotlib.figure.Figure` that it receives.
        size: Width and height of the figure, in inches.

    Returns:
        Whether the figure was drawn: False without matplotlib, or after an error.
    """
    if not has_matplotlib():
        return False
    from matplotlib.figure import Figure

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one for each character that the font lacks
            figure = Figure(figsize=size, layout="constrained")
            draw(figure)
            atomic_write(path, lambda fresh: figure.savefig(fresh, format="png", dpi=120))
    except Exception as error:  # fonts, names and sizes fail in many ways
        print(f"warning: cannot draw {path}: {reason(error)}", file=sys.stderr)
        return False
    return True

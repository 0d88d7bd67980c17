"""What a run writes down of its progress: a table, JSON lines, curves, TensorBoard and Weights & Biases."""

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
from stvit.tools.common.checkpoint import atomic_write, cut_torn_line
from stvit.tools.common.cli import CommandError, reason


def require_loggers(tensorboard: bool, wandb_project: str | None) -> None:
    """Checks that the loggers that were asked for can be imported.

    Raises:
        CommandError: If one is not installed.
    """
    for flag, asked, module in (
        ("--log-tensorboard", tensorboard, "tensorboard"),
        ("--log-wandb", wandb_project is not None, "wandb"),
    ):
        if asked and find_spec(module) is None:
            raise CommandError(f"{flag} needs {module}: pip install {module}")


class RunLog:
    """The records of a run, in its folder.

    Args:
        folder: The run's.
        tensorboard: Whether to write events for TensorBoard too, to <folder>/tensorboard.
        wandb_project: Project of Weights & Biases to log to, None for none.
        config: The resolved recipe.
        wandb_id: Run of Weights & Biases to go on with.
        start_update: Updates done before; what a TensorBoard log holds beyond them is hidden.

    Attributes:
        wandb_id: Run of Weights & Biases, to be given again on going on.
    """

    def __init__(
        self,
        folder: Path,
        *,
        tensorboard: bool = False,
        wandb_project: str | None = None,
        config: Mapping[str, Any],
        wandb_id: str | None = None,
        start_update: int = 0,
    ) -> None:
        self.folder = folder
        self.wandb_id = wandb_id
        self._wandb: Any = None
        self._tensorboard: Any = None
        path = folder / "log.jsonl"
        cut_torn_line(path)
        self._lines = path.open("a", buffering=1, encoding="utf-8")
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
            except Exception as error:  # its errors are of many kinds, the network's among them
                self._lines.close()
                raise CommandError(
                    f"cannot log to Weights & Biases: {reason(error)}; log in (wandb login), set WANDB_MODE=offline, "
                    "or leave --log-wandb out"
                ) from error
            self.wandb_id = self._wandb.id

    def step(self, update: int, values: Mapping[str, Any]) -> None:
        """Records numbers of the training after an update."""
        self._write("train", {"update": update, **values})
        self._send(update, "train", values)

    def event(self, name: str, values: Mapping[str, Any]) -> None:
        """Records that something happened, in log.jsonl alone."""
        self._write(name, values)

    def epoch(self, update: int, history: Sequence[Mapping[str, Any]]) -> None:
        """Records the last epoch of a history, and writes summary.csv and curve.png of all its epochs."""
        row = history[-1]
        self._write("epoch", {"update": update, **row})
        self._send(update, "epoch", row)
        table = self.folder / "summary.csv"
        try:
            atomic_write(table, lambda path: _write_table(path, history))
        except PermissionError as error:  # on Windows a spreadsheet has it open; the next epoch writes all of it again
            print(
                f"warning: cannot write {table}: {reason(error)}; close the program that has it open", file=sys.stderr
            )
        plot_history(history, self.folder / "curve.png")

    def close(self) -> None:
        """Hands on what is still buffered."""
        self._lines.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _write(self, event: str, values: Mapping[str, Any]) -> None:
        # JSON has no word for what is not finite. The file is uploaded: errors of the network may hold secrets.
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
            # Its step must not go back, which it does where a resumed run repeats some updates.
            self._wandb.log({f"{group}/{name}": value for name, value in values.items()} | {"update": update})


def _write_table(path: Path, history: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(history[0]))
        writer.writeheader()
        writer.writerows(history)


def plot_history(history: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Draws loss and accuracy over the epochs.

    Args:
        history: A row of numbers for each epoch, named as in summary.csv.
        path: PNG to write.

    Returns:
        Whether it was drawn: False without matplotlib, and after an error, which is printed as a warning.
    """

    def draw(figure: Any) -> None:
        from matplotlib.ticker import MaxNLocator

        epochs = [row["epoch"] + 1 for row in history]
        panels = figure.subplots(1, 2)
        for axes, measure, label in zip(panels, ("loss", "top1"), ("loss", "top-1 accuracy (%)"), strict=True):
            kinds = {"train": "training (augmented)", "eval": "validation", "ema": "validation, EMA"}
            for kind, name in kinds.items():
                if f"{kind}_{measure}" in history[0]:
                    axes.plot(epochs, [row[f"{kind}_{measure}"] for row in history], label=name, marker=".")
            axes.set_xlabel("epoch")
            axes.set_ylabel(label)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(alpha=0.3)
            axes.legend()

    return save_plot(path, draw, (10, 4))


def has_matplotlib() -> bool:
    """Returns whether matplotlib can be imported."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def save_plot(path: Path, draw: Callable[[Any], None], size: tuple[float, float]) -> bool:
    """Draws a picture with matplotlib. A failure is a warning, because the numbers are in other files.

    Args:
        path: PNG to write.
        draw: Draws on the `matplotlib.figure.Figure` that it is called with.
        size: Width and height of the figure, in inches.

    Returns:
        Whether it was drawn: False without matplotlib, and after an error.
    """
    if not has_matplotlib():
        return False
    from matplotlib.figure import Figure

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of characters that the font lacks, a warning for each
            figure = Figure(figsize=size, layout="constrained")
            draw(figure)
            atomic_write(path, lambda fresh: figure.savefig(fresh, format="png", dpi=120))
    except Exception as error:  # fonts, names and sizes may fail in many ways
        print(f"warning: cannot draw {path}: {reason(error)}", file=sys.stderr)
        return False
    return True

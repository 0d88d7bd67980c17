"""Plots of the results of tools/benchmark.py."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..common.cli import CommandError, reason

__all__ = ["PLOTS", "check"]

Rows = list[dict[str, Any]]


def check(path: Path) -> None:
    """Checks that a plot can be written.

    Raises:
        CommandError: If matplotlib or the folder is missing, or the suffix is unknown.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise CommandError("--plot needs matplotlib: pip install matplotlib") from error
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise CommandError(f"--plot {path} must end in .png, .pdf or .svg")
    if not path.absolute().parent.is_dir():
        raise CommandError(f"--plot {path}: the folder does not exist; create it first")


def draw_models(rows: Rows, path: Path) -> None:
    """Plots published accuracy over images/s.

    If an accuracy is unknown, it draws bars of images/s instead.
    """
    if len({row["model"] for row in rows}) > 1 and all(row["top1"] for row in rows):
        _draw_accuracy(rows, path)
    else:
        draw_bars(rows, path)


def _draw_accuracy(rows: Rows, path: Path) -> None:
    figure, axes = _figure(8.0, 5.5)
    ways = list(dict.fromkeys(row["way"] for row in rows))
    markers = dict(zip(ways, "osD^v", strict=False))
    for way in ways:
        drawn = [row for row in rows if row["way"] == way]
        for is_ours, color in ((False, "tab:gray"), (True, "tab:red")):
            points = [row for row in drawn if row["model"].startswith("stvit") == is_ours]
            axes.scatter(
                [row["images_per_second"] for row in points],
                [row["top1"] for row in points],
                marker=markers[way],
                facecolors=color if way != "published" else "none",
                edgecolors=color,
                zorder=3 if is_ours else 2,
            )
        axes.scatter([], [], marker=markers[way], color="black", label=way)
    labels: list[tuple[float, float]] = []
    for model in dict.fromkeys(row["model"] for row in rows):
        points = sorted((row for row in rows if row["model"] == model), key=lambda row: row["images_per_second"])
        axes.plot(
            [row["images_per_second"] for row in points], [row["top1"] for row in points], lw=0.8, color="lightgray"
        )
        x, y = points[-1]["images_per_second"], points[-1]["top1"]
        crowd = sum(abs(y - other) < 0.15 and abs(x - left) < 0.25 * x for left, other in labels)
        labels.append((x, y))
        axes.annotate(model, (x, y), (5, 4 - 11 * crowd), textcoords="offset points", size=8)
    axes.set(xlabel=f"images/s ({_shape(rows[0])})", ylabel="published top-1 on ImageNet-1k (%)")
    axes.margins(x=0.15)
    axes.legend()
    _save(figure, path)


def draw_bars(rows: Rows, path: Path) -> None:
    """Draws a bar for the speed of each row, relative to the first one."""
    figure, axes = _figure(8.0, 0.35 * len(rows) + 1.2)
    names = [
        " ".join(str(row[key]) for key in ("model", "stage", "way", "step", "img_size") if key in row) for row in rows
    ]
    axes.barh(names, [row["ratio"] for row in rows], color="tab:blue")
    axes.axvline(1.0, color="black", lw=0.8)
    axes.invert_yaxis()
    axes.set(xlabel=f"speed relative to the first of the same size ({rows[0]['dtype']}, batch {rows[0]['batch_size']})")
    _save(figure, path)


def draw_resolution(rows: Rows, path: Path) -> None:
    """Plots time and memory over the number of pixels.

    Axes are logarithmic. Dotted lines show linear growth.
    """
    from matplotlib.figure import Figure

    quantities = [("ms_p50", 1e-3, "seconds")] + ([("step_mib", 1.0, "MiB per step")] if rows[0]["step_mib"] else [])
    figure = Figure(figsize=(5.5 * len(quantities), 4.5), layout="constrained")
    for i, (key, factor, label) in enumerate(quantities):
        axes = figure.add_subplot(1, len(quantities), i + 1)
        for name in dict.fromkeys((row["model"], row["way"]) for row in rows):
            points = [row for row in rows if (row["model"], row["way"]) == name]
            pixels = [row["img_size"] ** 2 / 1e6 for row in points]
            (line,) = axes.plot(pixels, [factor * row[key] for row in points], "o-", ms=4, label=", ".join(name))
            linear = [factor * points[0][key] * p / pixels[0] for p in pixels]
            axes.plot(pixels, linear, ":", lw=0.8, color=line.get_color())
        axes.set(xscale="log", yscale="log", xlabel=f"megapixels ({rows[0]['dtype']}, batch {rows[0]['batch_size']})")
        axes.set(ylabel=label)
        axes.grid(which="both", lw=0.3)
    figure.axes[0].legend(fontsize=8, title="dotted: linear in pixels")
    _save(figure, path)


def draw_accuracy(rows: Rows, path: Path) -> None:
    """Plots accuracy over images/s in inference.

    Without a measurement, it is over MMAC. Dashes are runs. A point is the mean over the seeds, with its confidence
    interval. If all models have one run, the interval is that of the run.
    """
    figure, axes = _figure(9.0, 5.0)
    size = rows[0]["img_size"]
    is_measured = bool(rows[0][f"inference_{size}"])
    for i, row in enumerate(rows):
        x = row[f"inference_{size}"] if is_measured else 1e3 * row["gmac"]
        runs = [float(value) for value in row["top1_runs"].split()]
        if not runs:
            continue
        color, marker = f"C{i % 10}", "o" if row["model"].startswith("stvit") else "s"
        axes.scatter([x] * len(runs), runs, s=80, color=color, marker="_")
        of_run = row["low"] == ""
        low, high = map(float, row["intervals"].split("-")) if of_run else (row["low"], row["high"])
        axes.vlines(x, low, high, color=color, lw=1.2)
        axes.scatter([x], [row["top1"]], s=60, color=color, marker=marker, label=row["model"], zorder=3)
    throughput = f"images/s in inference ({size}x{size} pixels, threads: {rows[0]['threads']})"
    axes.set(xlabel=throughput if is_measured else f"MMAC at {size}x{size} pixels", xscale="log")
    axes.set(ylabel=f"top-1 of the validation images after epoch {rows[0]['epochs']} (%)")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.grid(which="both", lw=0.3)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside right upper", fontsize=8)
    _save(figure, path)


PLOTS: dict[str, Callable[[Rows, Path], None]] = {
    "op": draw_bars,
    "model": draw_models,
    "train": draw_bars,
    "resolution": draw_resolution,
    "accuracy": draw_accuracy,
}


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _shape(row: dict[str, Any]) -> str:
    return f"{row['dtype']}, batch {row['batch_size']}, {row['img_size']}x{row['img_size']}"


def _save(figure: Any, path: Path) -> None:
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise CommandError(f"cannot write --plot {path}: {reason(error)}") from error

"""State of a run of `stvit benchmark gpu`: clock, processes and files."""

import importlib.util
import multiprocessing.connection
import os
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..common.cli import CommandError, reason
from .config import GPU_PARTS, GpuConfig
from .measure import circumstances, require_device, write_table
from .models import Case
from .remote import END_SECONDS, Failure, Remote

__all__ = ["MIN_SECONDS", "Job", "Row", "Run", "Sizes", "close_all"]

ROUNDS = 5
PREPARE_SHARE = 0.65  # limit for the preparation of all steps, relative to the remaining time
MIN_SECONDS = 5.0  # no table takes less
MARGIN = 2.0  # seconds to end the processes and to write the summary

Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """Models and sizes of the tables.

    Attributes:
        model: Our model.
        peers: timm models to compare with; ratios are relative to the first.
        batch_size: Images per step.
        img_size: Image height and width in pixels.
        detectors: Model files of detectors, the stock one first.
        detector_batch_size: Images per step of detectors.
        detector_img_size: Image height and width of detectors.
        operator_sizes: Image sizes of the operator's tables.
        turn_seconds: Duration of a turn.
    """

    model: str = "stvit_small"
    peers: tuple[str, ...] = ("convnext_tiny", "swin_tiny_patch4_window7_224", "caformer_s18")
    batch_size: int = 128
    img_size: int = 224
    detectors: tuple[str, str] = ("yolo26s.yaml", "yolo26s-stvit_small.yaml")
    detector_batch_size: int = 16
    detector_img_size: int = 640
    operator_sizes: tuple[int, ...] = (224, 640)
    turn_seconds: float = 0.25


TINY = Sizes(
    model="test_stvit",
    peers=("test_convnext",),
    batch_size=2,
    img_size=64,
    detectors=("yolo26n.yaml", "yolo26n-stvit_pico.yaml"),
    detector_batch_size=1,
    detector_img_size=64,
    operator_sizes=(224,),
    turn_seconds=0.02,
)


@dataclass
class Job:
    """A process that prepares something, and what it said.

    Attributes:
        make: Class of the object in the process; it has a method `prepare`.
        args: Its arguments.
        remote: The process; None before it starts and after it failed.
        info: Result of `prepare`.
        failure: Error message of `prepare` or of a turn; "" if there was none.
        times: Seconds of each measured step.
    """

    make: Any
    args: tuple[Any, ...]
    remote: Remote | None = None
    info: Row = field(default_factory=dict)
    failure: str = ""
    times: list[float] = field(default_factory=list)

    @property
    def case(self) -> Case:
        """The case of a `PreparedStep`."""
        return self.args[0]

    def close(self, seconds: float = END_SECONDS) -> None:
        """Ends the process, if there is one."""
        if self.remote is not None:
            self.remote.close(seconds)
            self.remote = None

    def fail(self, message: str) -> None:
        """Ends the process and keeps the first error message."""
        self.failure = self.failure or message
        self.close()


class Run:
    """State of a run: its clock, processes, folder and summary."""

    def __init__(self, config: GpuConfig) -> None:
        """Checks the flags and starts the clock.

        Raises:
            CommandError: If the device is not available, or the folder contains results.
        """
        self.config = config
        self._start = time.monotonic()
        self.device = require_device(config.device)
        if self.device.type not in ("cpu", "cuda"):
            raise CommandError(f"--device {config.device}: pass cuda, or cpu to try everything at tiny sizes")
        self.is_gpu = self.device.type == "cuda"
        self.sizes = Sizes() if self.is_gpu else TINY
        self.folder = Path(config.output)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if any(self.folder.iterdir()):
                raise CommandError(f"--output {self.folder} is not empty; choose a new folder")
        except OSError as error:
            raise CommandError(f"cannot write --output {self.folder}: {reason(error)}") from error
        self.log = self.folder / "log.txt"
        self.origin = _origin(config, self.device)
        self.jobs: list[Job] = []
        self.notes: list[str] = []
        self.tables: dict[str, list[Row]] = {}
        self.profiles: dict[str, str] = {}
        # The other processes share the cores with this one.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.at_once = max(1, cores - 1)

    def wants(self, part: str) -> bool:
        """Returns whether a part was chosen."""
        return part in self.config.parts

    def left(self) -> float:
        """Returns the remaining seconds."""
        return self._start + 60 * self.config.minutes - MARGIN - time.monotonic()

    def fits(self, name: str, seconds: float = MIN_SECONDS) -> bool:
        """Returns whether so many seconds remain.

        Otherwise it reports the table as skipped.
        """
        if self.left() >= seconds:
            return True
        self.note(f"{name}: skipped, it takes at least {seconds:.0f} s and {max(0.0, self.left()):.0f} s are left")
        return False

    def note(self, text: str) -> None:
        """Prints a line and adds it to the summary."""
        self.notes.append(text)
        print(text, flush=True)

    def prepare(self, jobs: Sequence[Job], seconds: float) -> None:
        """Prepares jobs, several at the same time, in their order.

        Jobs that ran out of memory are tried again, one at a time.

        Args:
            jobs: Jobs without a process.
            seconds: Time limit. Some of the remaining time is always left to measure.
        """
        limit = max(0.0, min(seconds, PREPARE_SHARE * self.left()))
        end = time.monotonic() + limit
        print(f"\npreparing {len(jobs)} steps, at most {limit:.0f} s", flush=True)
        self.jobs += jobs
        waiting, active = list(jobs), dict[Any, Job]()
        while waiting or active:
            while waiting and len(active) < self.at_once:
                job = waiting.pop(0)
                job.remote = Remote(job.make, *job.args, log=self.log)
                job.remote.send("prepare")
                active[job.remote.connection] = job
            ready = multiprocessing.connection.wait(list(active), max(0.0, end - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                _receive(active.pop(connection), 1.0)
        for job in [*active.values(), *waiting]:
            job.fail(f"not ready after {limit:.0f} s")
        for job in jobs:
            if "out of memory" in job.failure.lower() and job.remote is not None and end > time.monotonic():
                job.failure = ""
                _prepare_again(job, end - time.monotonic())
        for job in jobs:
            if job.failure:
                job.close()

    def measure(self, jobs: Sequence[Job]) -> None:
        """Measures prepared steps in turns.

        It takes as many rounds as fit in half of the remaining time.
        """
        ready = [job for job in jobs if job.remote is not None]
        turn = self.sizes.turn_seconds
        estimate = sum(max(turn, job.info["step_seconds"]) + job.info["step_seconds"] + 0.05 for job in ready)
        rounds = min(ROUNDS, int(max(0.0, self.left()) / 2 / max(estimate, 1e-3)))
        if rounds < 1:
            for job in ready:
                job.fail(f"a turn of all steps takes {estimate:.0f} s and {max(0.0, self.left()):.0f} s are left")
        for _ in range(rounds):
            for job in ready:
                if job.remote is None:
                    continue
                try:
                    job.times += job.remote.call("turn", turn, seconds=min(60.0, self.left()))
                except Failure as failure:
                    job.fail(str(failure))

    def profile(self, name: str, job: Job) -> None:
        """Writes profile_<name>.txt for a prepared step, once."""
        if not self.wants("profile") or name in self.profiles or job.remote is None or self.left() < MIN_SECONDS:
            return
        try:
            text = job.remote.call("profile", seconds=min(30.0, self.left()))
        except Failure as failure:
            self.note(f"profile of {name}: {failure}")
            return
        case = job.case
        step = f"{case.model}, {case.way}, {'training' if case.is_training else 'inference'}"
        sizes = f"{case.dtype}, batch size {case.batch_size}, {case.img_size} pixels"
        origin = "\n".join(f"{key}: {value}" for key, value in self.origin.items())
        path = self.folder / f"profile_{name}.txt"
        path.write_text(f"{step}, {sizes}\n{origin}\n\n{text}\n", encoding="utf-8")
        self.profiles[name] = text.partition("\n")[0]
        print(f"{path.name}: {self.profiles[name]}", flush=True)

    def finish(
        self, name: str, rows: list[Row], jobs: Sequence[Job] = (), shown: list[Row] | None = None
    ) -> Iterator[list[Row]]:
        """Writes a table and yields the columns to print.

        Args:
            name: Name of the table.
            rows: All rows. An empty list is ignored.
            jobs: Jobs of the table, whose processes end.
            shown: Rows to print and for the summary; all by default.
        """
        close_all(jobs)
        self.jobs = [job for job in self.jobs if job not in jobs]
        if not rows:
            return
        write_table(self.folder / f"{name}.csv", [{**self.origin, **row} for row in rows])
        self.tables[name] = shown or rows
        self.write_summary()
        columns, constants = _to_print(self.tables[name])
        print(f"\n{name}: {constants} ({self.seconds():.0f} s)", flush=True)
        yield columns

    def seconds(self) -> float:
        """Returns the seconds since the start."""
        return time.monotonic() - self._start

    def write_summary(self) -> None:
        """Writes summary.md.

        It contains all tables, the names of skipped ones and the first lines of the profiles.
        """
        lines = [f"# {self.origin['device']}", ""]
        lines += [f"- {key}: {value}" for key, value in self.origin.items() if key != "device"]
        lines += [f"- seconds: {self.seconds():.0f}"]
        for name, rows in self.tables.items():
            columns, constants = _to_print(rows)
            lines += ["", f"## {name}", "", constants, ""]
            lines += [f"| {' | '.join(columns[0])} |", f"|{'---|' * len(columns[0])}"]
            lines += [f"| {' | '.join(str(value).replace('|', '/') for value in row.values())} |" for row in columns]
        if self.profiles:
            lines += ["", "## Profiles", ""]
            lines += [f"- `profile_{name}.txt`: {text}" for name, text in self.profiles.items()]
        if self.notes:
            lines += ["", "## Skipped", "", *(f"- {note}" for note in self.notes)]
        (self.folder / "summary.md").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def close(self) -> None:
        """Ends all processes."""
        close_all(self.jobs)
        self.jobs = []


def close_all(jobs: Sequence[Job]) -> None:
    """Ends processes, all at the same time."""
    end = time.monotonic() + END_SECONDS
    for job in jobs:
        if job.remote is not None:
            job.remote.hang_up()
    for job in jobs:
        job.close(end - time.monotonic())


def _prepare_again(job: Job, seconds: float) -> None:
    assert job.remote is not None
    try:
        job.info = job.remote.call("prepare", seconds=seconds)
    except Failure as failure:
        job.failure = str(failure)


def _receive(job: Job, seconds: float) -> None:
    """Takes the result of `prepare`.

    The process stays after an error, for a second try.
    """
    assert job.remote is not None
    try:
        job.info = job.remote.receive(seconds)
    except Failure as failure:
        job.failure = str(failure)


def _origin(config: GpuConfig, device: torch.device) -> Row:
    """Returns the columns that tell what produced a row."""
    triton = importlib.util.find_spec("triton")
    flags = ["--minutes", f"{config.minutes:g}"]
    if config.parts != list(GPU_PARTS):
        flags += ["--parts", *config.parts]
    if not config.compile:
        flags += ["--no-compile"]
    return {
        **circumstances(device),
        "cuda": torch.version.cuda or "",
        "triton": importlib.import_module("triton").__version__ if triton else "",
        "command": shlex.join(["stvit", "benchmark", "gpu", *flags, "--device", config.device]),
    }


def _to_print(rows: list[Row]) -> tuple[list[Row], str]:
    """Splits rows into the columns that differ and a text with the other ones."""
    names = list(rows[0])
    same = [name for name in names if len(rows) > 1 and len({str(row[name]) for row in rows}) == 1]
    constants = ", ".join(f"{name} {rows[0][name]}" for name in same if rows[0][name] != "")
    columns = [{name: _short(row[name]) for name in names if name not in same} for row in rows]
    return columns, constants


def _short(value: Any) -> Any:
    return value[:77] + "..." if isinstance(value, str) and len(value) > 80 else value

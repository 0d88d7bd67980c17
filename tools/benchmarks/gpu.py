"""Everything about a GPU in one run of limited time, most important first.

Each step is prepared in a process of its own, many at the same time. Then the steps of a table take turns. A failed
step has its error in its row. Steps that are compiled follow after the quick tables, because compiling takes long; a
few steps of the quick tables are measured again beside them.
"""

import importlib.util
import math
import multiprocessing.connection
import os
import shlex
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..common.cli import CommandError, reason
from . import kernels
from .candidate_times import CandidateCompiler, CandidateTimer
from .config import GPU_PARTS, GpuConfig, KernelConfig
from .measure import circumstances, percentile, require_device, significant, write_table
from .models import TOP1, Case, is_detector
from .remote import END_SECONDS, Failure, Iteration, Remote
from .steps import PreparedStep

__all__ = ["benchmark"]

ROUNDS = 5
PREPARE_SECONDS = 90.0  # limit for steps that are not compiled
PREPARE_SHARE = 0.65  # limit for all steps, relative to the remaining time
COMPILE_SECONDS = 30.0  # least time for compiled steps on a GPU
CANDIDATE_SECONDS = 30.0  # limit for one candidate, with its compilation
CANDIDATES_SHARE = 0.6  # limit for all candidates, relative to the remaining time
TABLE_SECONDS = 90.0  # limit for one table of the operator
MIN_SECONDS = 5.0  # no table takes less
PROFILES = ("inference_optimized", "training_eager", "training_compiled", "inference_compiled")
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


def benchmark(config: GpuConfig) -> Iterator[list[Row]]:
    """Yields the columns to print of each table, after the table was written.

    Raises:
        CommandError: If the device is not available, or the folder contains results.
    """
    run = Run(config)
    print(f"{run.origin['device']}: at most {config.minutes:g} minutes, results in {run.folder}", flush=True)
    try:
        for part in (_quick, _compiled_and_kernels, _operator, _detectors, _profiles):
            yield from part(run)
    finally:
        run.close()
        run.write_summary()
    print(f"\n{run.folder / 'summary.md'} has all tables", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# The run


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
    """State of a run: its clock, its processes, its folder and the text of its summary."""

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
        """Returns whether so many seconds remain, and reports the table as skipped otherwise."""
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
        """Measures prepared steps in turns, in as many rounds as fit in half of the remaining time."""
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
            rows: All rows. Nothing happens if there is none.
            jobs: Jobs of the table, whose processes end.
            shown: Rows to print and for the summary; all by default.
        """
        _close(jobs)
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
        """Writes summary.md, which contains all tables, skipped ones and the first lines of the profiles."""
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
        _close(self.jobs)
        self.jobs = []


def _close(jobs: Sequence[Job]) -> None:
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
    """Takes the result of `prepare`. The process stays after an error, for a second try."""
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
    """Splits rows into the columns that differ, with short texts, and a text with the other ones."""
    names = list(rows[0])
    same = [name for name in names if len(rows) > 1 and len({str(row[name]) for row in rows}) == 1]
    constants = ", ".join(f"{name} {rows[0][name]}" for name in same if rows[0][name] != "")
    columns = [{name: _short(row[name]) for name in names if name not in same} for row in rows]
    return columns, constants


def _short(value: Any) -> Any:
    return value[:77] + "..." if isinstance(value, str) and len(value) > 80 else value


# ---------------------------------------------------------------------------------------------------------------------
# Tables of models


def _quick(run: Run) -> Iterator[list[Row]]:
    """Yields the tables of models, of training and of latency, without compiled steps."""
    sizes = run.sizes
    ours, peers = sizes.model, sizes.peers
    graphs = ["graphs"] if run.is_gpu else []
    if run.wants("models"):
        steps = [(ours, way) for way in ["published", "eager", "optimized", *graphs]]
        steps += [(peer, way) for peer in peers for way in ["eager", *graphs]]
        yield from _compare(run, "models", [_case(run, *step) for step in steps])
    if run.wants("training"):
        steps = [(ours, "published"), (ours, "eager"), *((peer, "eager") for peer in peers)]
        yield from _compare(run, "training", [_case(run, *step, is_training=True) for step in steps])
    if run.wants("latency"):
        steps = [(ours, way) for way in ["eager", "optimized", *graphs]]
        steps += [(peers[0], way) for way in ["eager", *graphs]]
        yield from _compare(run, "latency", [_case(run, *step, batch_size=1) for step in steps])


def _compiled_and_kernels(run: Run) -> Iterator[list[Row]]:
    """Yields the tables of compiled models and of the kernels' block sizes.

    Both take long to compile, so they compile at the same time and before anything is measured.
    """
    ours, peers = run.sizes.model, run.sizes.peers
    models, training, compilers = list[Job](), list[Job](), list[Job]()
    if run.config.compile and run.wants("models"):
        steps = [(ours, "compiled"), (ours, "optimized"), (peers[0], "eager"), *((peer, "compiled") for peer in peers)]
        models = [Job(PreparedStep, (_case(run, *step),)) for step in steps]
    if run.config.compile and run.wants("training"):
        graphs = ["compiled_graphs"] if run.is_gpu else []
        steps = [(ours, way) for way in ["compiled", *graphs, "eager"]]
        steps += [(peers[0], "eager"), *((peer, "compiled") for peer in peers)]
        training = [Job(PreparedStep, (_case(run, *step, is_training=True),)) for step in steps]
    if run.wants("kernels") and run.is_gpu:
        parts = max(1, run.at_once // 3)
        compilers = [Job(CandidateCompiler, (part, parts)) for part in range(parts)]
    # Ours first, then the kernels, and the peers last: with few cores or little time, the last ones do not get ready.
    jobs = [*models[:3], *training[:4], *compilers, *models[3:], *training[4:]]
    is_compiled = bool(models or training)
    needed = COMPILE_SECONDS if is_compiled and run.is_gpu else MIN_SECONDS
    if jobs and run.fits("compiled models and training" if is_compiled else "compiling the kernels", needed):
        run.prepare(jobs, run.left())
        _close(compilers)
        for name, table in (("models_compiled", models), ("training_compiled", training)):
            if table:
                yield from _compare(run, name, [job.case for job in table], table)
    if run.wants("kernels") and run.fits("kernels"):
        rows = _time_candidates(run)
        yield from run.finish("kernels", rows, shown=_defaults_and_fastest(rows))


def _detectors(run: Run) -> Iterator[list[Row]]:
    """Yields the tables of detectors, inference and training."""
    if not run.wants("yolo"):
        return
    if importlib.util.find_spec("ultralytics") is None:
        run.note("yolo: skipped, ultralytics is not installed")
        return
    stock, ours = run.sizes.detectors
    graphs = ["graphs"] if run.is_gpu else []
    steps = [(stock, "eager"), *((ours, way) for way in ["published", "eager", "optimized", *graphs])]
    yield from _compare(run, "yolo", [_case(run, *step) for step in steps])
    steps = [(stock, "eager"), (ours, "published"), (ours, "eager")]
    yield from _compare(run, "yolo_training", [_case(run, *step, is_training=True) for step in steps])


def _profiles(run: Run) -> Iterator[list[Row]]:
    """Writes the profiles that the tables did not write."""
    if not run.wants("profile"):
        return
    missing: dict[str, Job] = {}
    for name in PROFILES:
        step, _, way = name.partition("_")
        if name not in run.profiles and (run.config.compile or way != "compiled"):
            missing[name] = Job(PreparedStep, (_case(run, run.sizes.model, way, is_training=step == "training"),))
    if missing and run.fits("profile"):
        jobs = list(missing.values())
        run.prepare(jobs, run.left())
        for name, job in missing.items():
            run.profile(name, job)
            if job.failure:
                run.note(f"profile of {name}: {job.failure}")
        yield from run.finish("profile", [], jobs)


def _case(run: Run, model: str, way: str, batch_size: int = 0, is_training: bool = False) -> Case:
    sizes = run.sizes
    batch, size = sizes.batch_size, sizes.img_size
    if is_detector(model):
        batch, size = sizes.detector_batch_size, sizes.detector_img_size
    return Case(model, way, batch_size or batch, size, "bfloat16", run.config.device, is_training)


def _compare(run: Run, name: str, cases: Sequence[Case], jobs: Sequence[Job] = ()) -> Iterator[list[Row]]:
    """Yields a table of steps, measured in turns.

    Args:
        run: The run.
        name: Name of the table.
        cases: Steps, in the order of the rows.
        jobs: The same steps if they are prepared already.
    """
    if not run.fits(name):
        _close(jobs)
        return
    if not jobs:
        jobs = [Job(PreparedStep, (case,)) for case in cases]
        run.prepare(jobs, PREPARE_SECONDS)
    run.measure(jobs)
    for job in jobs:
        if job.case.model == run.sizes.model and job.case.batch_size == run.sizes.batch_size:
            profile = f"{'training' if job.case.is_training else 'inference'}_{job.case.way}"
            if profile in PROFILES:
                run.profile(profile, job)
    rows = [_row(run, job) for job in jobs]
    first = run.sizes.detectors[0] if is_detector(cases[0].model) else run.sizes.peers[0]
    speeds = {(row["model"], row["way"]): row["images_per_second"] for row in rows}
    published, peer = speeds.get((run.sizes.model, "published")), speeds.get((first, "eager"))
    if is_detector(cases[0].model):
        published = speeds.get((run.sizes.detectors[1], "published"))
    for row in rows:
        for column, base in (("to_published", published), ("to_peer", peer)):
            row[column] = round(row["images_per_second"] / base, 3) if base and row["images_per_second"] else ""
    failures = [row.pop("failure") for row in rows]
    for row, failure in zip(rows, failures, strict=True):
        row["failure"] = failure  # the last column, because it may be long
    yield from run.finish(name, rows, jobs)


def _row(run: Run, job: Job) -> Row:
    """Returns the row of a measured step. Numbers are "" after a failure."""
    case, times = job.case, job.times
    median = statistics.median(times) if times else math.nan
    return {
        "model": case.model,
        "way": case.way,
        "step": "training" if case.is_training else "inference",
        "dtype": case.dtype,
        "batch_size": case.batch_size,
        "img_size": case.img_size,
        "images_per_second": significant(case.batch_size / median) if times else "",
        "slowest": significant(case.batch_size / max(times)) if times else "",
        "fastest": significant(case.batch_size / min(times)) if times else "",
        "ms": significant(1e3 * median) if times else "",
        "ms_p90": significant(1e3 * percentile(times, 90)) if times else "",
        "relative_error": job.info.get("relative_error", ""),
        "memory_gib": job.info.get("memory_gib", ""),
        "reserved_gib": job.info.get("reserved_gib", ""),
        "prepare_seconds": job.info.get("prepare_seconds", ""),
        "steps": len(times),
        "top1": TOP1.get(case.model, "") if case.img_size == 224 else "",
        "sizes": "full" if run.is_gpu else "tiny, for a test without a GPU",
        "failure": job.failure,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Tables of kernels


def _time_candidates(run: Run) -> list[Row]:
    """Returns a row for each candidate. After a crash a new process goes on with the next candidate."""
    rows: list[Row] = []
    left_after = (1 - CANDIDATES_SHARE) * run.left()
    crashes = 0
    remote: Remote | None = None
    numbers: Row = {}
    try:
        while True:
            if run.left() < max(MIN_SECONDS, left_after):
                run.note(f"kernels: stopped after {len(rows)} candidates to leave time for the rest")
                break
            named: Row | None = None
            try:
                if remote is None:
                    remote = Remote(CandidateTimer, len(rows), log=run.log)
                    numbers = remote.call("prepare", seconds=min(CANDIDATE_SECONDS, run.left()))
                named = remote.call("peek", seconds=min(CANDIDATE_SECONDS, run.left()))
                if named is None:
                    break
                measured = remote.call("measure", seconds=min(CANDIDATE_SECONDS, run.left()))
                rows.append({**named, **measured, **numbers, "failure": ""})
            except Failure as failure:
                if named is None:  # the list itself fails
                    run.note(f"kernels: {failure}")
                    break
                rows.append({**named, **dict.fromkeys(MEASURED, ""), **numbers, "failure": str(failure)})
                crashes += 1
                if crashes > 20:
                    run.note("kernels: stopped after 20 failures")
                    break
                if remote is not None and not remote.is_alive():
                    remote = None
    finally:
        if remote is not None:
            remote.close()
    for row in rows:
        default = [other["microseconds"] for other in rows if other["default"] and _same_shape(row, other)]
        is_known = default and default[0] and row["microseconds"]
        row["to_default"] = round(default[0] / row["microseconds"], 3) if is_known else ""
    return rows


def _defaults_and_fastest(rows: list[Row]) -> list[Row]:
    """Returns the default and the fastest candidate of each kernel and shape, and all that failed."""
    shown = []
    for row in rows:
        times = [other["microseconds"] for other in rows if _same_shape(row, other) and other["microseconds"] != ""]
        if row["default"] or row["failure"] or row["microseconds"] == min(times):
            shown.append(row)
    return shown


MEASURED = ("microseconds", "min", "max", "floor", "floors", "floor_mb")


def _same_shape(row: Row, other: Row) -> bool:
    return (row["kernel"], row["shape"]) == (other["kernel"], other["shape"])


def _operator(run: Run) -> Iterator[list[Row]]:
    """Yields the tables of `stvit benchmark kernels`, without the compiled reference."""
    if not run.wants("operator") or not run.fits("operator"):
        return
    config = KernelConfig(
        img_size=list(run.sizes.operator_sizes), ways=["reference", "triton"], device=run.config.device, repeats=3
    )
    remote = Remote(Iteration, kernels.benchmark, config, log=run.log)
    rows: list[Row] = []
    try:
        while run.left() > MIN_SECONDS:
            table = remote.call("next", seconds=min(TABLE_SECONDS, run.left()))
            if table is None:
                break
            rows += table
    except Failure as failure:
        run.note(f"operator: {failure}")
    finally:
        remote.close()
    yield from run.finish("operator", rows)

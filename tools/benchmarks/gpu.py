"""Everything about a GPU in one run of limited time, most important first.

Each step is prepared in a process of its own, many at the same time. Then the steps of a table take turns. A failed
step has its error in its row. Steps that are compiled follow after the quick tables, because compiling takes long; a
few steps of the quick tables are measured again beside them.
"""

import importlib.util
import math
import statistics
from collections.abc import Iterator, Sequence

from . import kernels
from .candidate_times import CandidateCompiler, CandidateTimer
from .config import GpuConfig, KernelConfig
from .gpu_run import MIN_SECONDS, Job, Row, Run, close_all
from .measure import percentile, significant
from .models import TOP1, Case, is_detector
from .remote import Failure, Iteration, Remote
from .steps import PreparedStep

__all__ = ["benchmark"]

PREPARE_SECONDS = 90.0  # limit for steps that are not compiled
COMPILE_SECONDS = 30.0  # least time for compiled steps on a GPU
CANDIDATE_SECONDS = 30.0  # limit for one candidate, with its compilation
CANDIDATES_SHARE = 0.6  # limit for all candidates, relative to the remaining time
TABLE_SECONDS = 90.0  # limit for one table of the operator
PROFILES = ("inference_optimized", "training_eager", "training_compiled", "inference_compiled")


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
# Tables of models


def _quick(run: Run) -> Iterator[list[Row]]:
    """Yields the tables that need no compiled steps."""
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
    # With few cores or little time, the last ones do not get ready. First what needs no compiler, then our models, the
    # kernels, and the peers.
    jobs = [*models[:3], *training[:4], *compilers, *models[3:], *training[4:]]
    jobs.sort(key=lambda job: job in compilers or "compiled" in job.case.way)
    is_compiled = bool(models or training)
    needed = COMPILE_SECONDS if is_compiled and run.is_gpu else MIN_SECONDS
    if jobs and run.fits("compiled models and training" if is_compiled else "compiling the kernels", needed):
        run.prepare(jobs, run.left())
        close_all(compilers)
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
        close_all(jobs)
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
    """Returns a row for each candidate.

    After a crash a new process goes on with the next candidate.
    """
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
    """Selects the default, the fastest and all failed candidates of each shape."""
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

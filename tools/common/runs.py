"""Run directories: finding, naming and locking them, and what to resume."""

import itertools
import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from stvit import hub
from stvit.weights.source import Source

from .checkpoint import Checkpoints, load_checkpoint
from .cli import CommandError
from .config import RunConfig
from .files import atomic_write, read_utf8
from .locks import InUseError, PathLock
from .recipes import load_yaml
from .results import check_output
from .snapshots import fetch_run, read_remote_recipe

# Lock file in a run directory; see `PathLock`.
RUN_LOCK = ".stvit.lock"
# Settings that name the data. The data of a named run may move; runs without a name are distinguished by them.
_DATA_PATHS = (
    "class_names",
    "data_dir",
    "train_annotations",
    "train_images",
    "train_labels",
    "val_annotations",
    "val_images",
    "val_labels",
)
# Flags that a resumed run may change. They affect where and how fast it runs, but not its results.
RESUME_MUTABLE = {
    *_DATA_PATHS,
    "batch_size",
    "check_data",
    "checkpoint_epochs",
    "checkpoint_steps",
    "compile",
    "device",
    "dist_backend",
    "experiment",
    "grad_accum_steps",
    "grad_checkpointing",
    "hub_every",
    "hub_private",
    "repo_id",
    "log_interval",
    "log_tensorboard",
    "log_wandb",
    "max_bad_images",
    "output",
    "validation_batch_size",
    "wandb_project",
    "workers",
}

Recipe = Mapping[str, Any]


def check_run_folder(config: RunConfig) -> None:
    """Checks that the run directory can be created.

    A training calls it before it opens the data and the model.

    Raises:
        CommandError: If it cannot.
    """
    if config.resume in (None, "auto") or Source.parse_hub(config.resume) is not None:
        check_output(Path(config.output).expanduser() / (config.experiment or ""))


def find_run(config: RunConfig, recipe: Recipe, label: str, lock: PathLock) -> tuple[Path, Path | None]:
    """Finds or creates the run directory, and locks it.

    Args:
        config: The run directory and what to resume.
        recipe: Recipe of this command.
        label: Text for the name of a new directory, see `run_label`.
        lock: Lock to acquire, so that no other process writes to the directory.

    Returns:
        The run directory, and the checkpoint to resume from; None to start a new run.

    Raises:
        CommandError: If the directory is in use, contains another run or cannot be created, or if there is no
            checkpoint.
    """
    output = Path(config.output).expanduser()
    source = Source.parse_hub(config.resume)
    if source is not None:
        folder, path = fetch_run(
            source, output, config.experiment, lambda state, name: _check_same_recipe(recipe, state, name)
        )
        _lock_run(folder, lock)
        return folder, path
    if config.resume and config.resume != "auto":
        return _open_resumed(config.resume, recipe, lock)
    if config.experiment is None:
        found = _find_same_run(output, recipe, lock) if config.resume == "auto" else None
        return found or (_create_unnamed_run(config, output, label, lock), None)

    folder = output / config.experiment
    _create_folder(folder)
    _lock_run(folder, lock)
    checkpoint = Checkpoints(folder / "checkpoints").load() if config.resume == "auto" else None
    if checkpoint is not None:
        _check_same_recipe(recipe, checkpoint[0], folder)
        return folder, checkpoint[1]
    if _contains_run(folder, config.resume):
        raise CommandError(
            f"{folder} contains the results of another run; choose another --experiment, move the folder away, or "
            "resume the run with --resume auto"
        )
    return folder, None


def run_label(model: str, img_size: int) -> str:
    r"""Returns model and image size as a folder name that every system accepts.

    Args:
        model: Name of the model, also 'local-dir:C:\models\x' or 'hf-hub:org/name'.
        img_size: Width of the images in pixels.
    """
    name = re.sub(r"[^\w.-]+", "_", Source.parse_model_name(model).full_name).strip("_.")
    return f"{name}-{img_size}"


def _open_resumed(resume: str, recipe: Recipe, lock: PathLock) -> tuple[Path, Path]:
    """Locks the run directory of --resume PATH, and returns it with the checkpoint."""
    path = Path(resume).expanduser()
    found: tuple[dict[str, Any], Path] | None = None
    if path.is_dir():
        folder = path
        _lock_run(folder, lock)
        found = Checkpoints(folder / "checkpoints").load()
    else:
        path = path.resolve()
        if path.is_file() and path.parent.name != "checkpoints":
            raise CommandError(f"--resume {path} must be in the folder checkpoints/ of its run directory")
        folder = path.parent.parent
        if path.is_file():
            _lock_run(folder, lock)
            found = load_checkpoint(path), path
    if found is None:
        raise CommandError(f"--resume {resume}: no checkpoint there; pass a run directory, a checkpoint, or auto")
    _check_same_recipe(recipe, found[0], folder)
    return folder, found[1]


def _find_same_run(output: Path, recipe: Recipe, lock: PathLock) -> tuple[Path, Path] | None:
    """Locks and returns the newest run of the same recipe, or None."""
    own = _identity(recipe)
    others: dict[Path, Any] = {}  # runs that differ only in the number of epochs, newest first
    for checkpoints in sorted(filter(Path.is_dir, output.glob("*/checkpoints")), key=_changed_at, reverse=True):
        folder = checkpoints.parent
        identity = _read_identity(folder)
        if identity == own:
            _lock_run(folder, lock)
            found = Checkpoints(checkpoints).load()
            if found is not None:
                return folder, found[1]
            lock.release()
        elif identity is not None and {**identity, "epochs": own["epochs"]} == own:
            others[folder] = identity.get("epochs")
    for folder, epochs in list(others.items())[:1]:
        print(f"{folder} is the same run with --epochs {epochs}; to change its epochs, pass --experiment {folder.name}")
    return None


def _create_unnamed_run(config: RunConfig, output: Path, label: str, lock: PathLock) -> Path:
    """Creates and locks a directory named after the time and the label.

    The name gets a number if it is in use.
    """
    name = f"{datetime.now():%Y%m%d-%H%M%S}-{label}"
    for number in itertools.count(1):
        folder = output / (name if number == 1 else f"{name}-{number}")
        _create_folder(folder)
        try:
            _lock_run(folder, lock)
        except InUseError:  # by a run that started in the same second
            continue
        if not _contains_run(folder, config.resume):
            return folder
        lock.release()
    raise AssertionError("unreachable")


def _lock_run(folder: Path, lock: PathLock) -> None:
    """Locks a run directory.

    Raises:
        InUseError: If another process trains in it.
    """
    try:
        lock.acquire(folder / RUN_LOCK)
    except InUseError as error:
        raise InUseError(f"{error}; wait until it ends, or choose another --experiment for another run") from error


def _create_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"cannot create the folder {folder}: {error.strerror}") from error


def _contains_run(folder: Path, resume: str | None) -> bool:
    """Returns whether a folder has results that a new run would overwrite.

    With `resume`, checkpoints do not count.
    """
    return (folder / "summary.csv").exists() or ((folder / "checkpoints").exists() and resume is None)


def _changed_at(path: Path) -> float:
    """Returns when a folder was last changed, in seconds; 0 if it does not exist."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


# ---------------------------------------------------------------------------------------------------------------------
# Recipes of runs


def recipe_key(recipe: Recipe) -> dict[str, Any]:
    """Returns the flags that a resumed run must share with its checkpoint.

    Only `epochs` may change, within limits.
    """
    return {key: value for key, value in recipe.items() if key not in RESUME_MUTABLE}


def write_recipe(folder: Path, recipe: Recipe) -> None:
    """Writes config.yaml, the recipe that repeats the run."""
    text = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)
    atomic_write(folder / "config.yaml", lambda path: path.write_text(text, encoding="utf-8"))


def _identity(recipe: Recipe) -> dict[str, Any]:
    """Returns the flags that distinguish runs without a name.

    The files and folders of the data count, as absolute paths.
    """
    paths = {key: recipe.get(key) for key in _DATA_PATHS}
    return recipe_key(recipe) | {
        key: None if path is None else str(Path(path).expanduser().resolve()) for key, path in paths.items()
    }


def _read_identity(folder: Path) -> dict[str, Any] | None:
    """Returns the identity of the run in a directory; None if there is no recipe."""
    try:
        recipe = load_yaml(read_utf8(folder / "config.yaml"))
        return _identity(recipe) if isinstance(recipe, dict) else None
    except (OSError, ValueError, TypeError, RuntimeError):
        return None


def _check_same_recipe(recipe: Recipe, state: dict[str, Any], folder: Path | str) -> None:
    """Checks that a run can be resumed with these flags.

    The number of epochs may change.

    Raises:
        CommandError: If another flag differs, or the run has done more epochs already.
    """
    progress = state["progress"]
    begun = progress["epoch"] + (progress["step"] > 0)
    if recipe["epochs"] < begun:
        updates = f" and {progress['step']} updates" if progress["step"] else ""
        raise CommandError(
            f"--epochs {recipe['epochs']}: {folder} has already done {progress['epoch']} epochs{updates}; pass "
            f"--epochs {begun} or more"
        )
    then, now = state["recipe"], recipe_key(recipe)
    changed = [
        f"{key} {then.get(key)!r}, now {now.get(key)!r}"
        for key in now
        if key != "epochs" and then.get(key) != now.get(key)
    ]
    if changed:
        raise CommandError(
            f"{folder} was started with other flags ({'; '.join(changed)}); pass the same flags, or start a new run "
            "with another --experiment (to start from the weights of this one, pass --pretrained-path)"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Runs on the Hub


def check_hub(repo_id: str | None) -> None:
    """Checks the repository id and the token, before anything is trained.

    Raises:
        CommandError: If the run could never be uploaded.
    """
    if not repo_id:
        return
    try:
        hub.check_repo_id(repo_id)
        hub.check_token()
    except hub.HubError as error:
        raise CommandError(f"--repo-id: {error}") from error


def check_remote_run(repo_id: str | None, recipe: Recipe, is_resumed: bool) -> None:
    """Checks that uploads do not overwrite another run.

    Without a connection, nothing is checked.

    Raises:
        CommandError: If the repository contains another run.
    """
    if not repo_id:
        return
    remote = read_remote_recipe(repo_id)
    if remote is None:
        return
    if not is_resumed:
        raise CommandError(
            f"--repo-id: {repo_id} already contains a run; resume it with --resume "
            f"{Source.hub(repo_id, 'last')}, or choose another repository"
        )
    own = recipe_key(recipe)
    changed = [
        key
        for key in own
        if key != "epochs" and key in remote and remote[key] != yaml.safe_load(yaml.safe_dump(own[key]))
    ]
    if changed:
        raise CommandError(
            f"--repo-id: {repo_id} contains another run, with a different {', '.join(changed)}; choose another "
            "repository"
        )

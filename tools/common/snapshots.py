"""A run on the Hugging Face Hub: snapshots uploaded in the background, and going on from one."""

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.utils import disable_progress_bars
from tqdm import tqdm

from stvit import hub
from stvit.tools.common.checkpoint import Checkpoints
from stvit.tools.common.cli import CommandError, reason

# Branch of what a run is gone on from; main holds the best weights.
BRANCH = "last"
_RECORDS = ("config.yaml", "summary.csv", "log.jsonl", "curve.png", "bad_images.jsonl")
_WEIGHTS = ("best", "last", "last_ema")
# A scheduler that ends a job does not wait long.
PATIENCE_S = 10.0


class Snapshots:
    """Uploads a run's folder after some of its epochs, in the background; a failure is a warning.

    The branch `last` gets the newest checkpoint, the records, and all weights, with the last ones as its model; main
    gets the best weights. Both load in timm.

    Args:
        repo_id: Repository, made if it is missing.
        every: Epochs between snapshots.
        folder: Of the run.
        private: Whether a new repository is private.
        event: Records that something happened: `RunLog.event`.
    """

    def __init__(
        self, repo_id: str, every: int, folder: Path, private: bool, event: Callable[[str, dict[str, Any]], None]
    ) -> None:
        self.repo_id, self.every, self.folder, self.private = repo_id, every, folder, private
        self._event = event
        self._thread: threading.Thread | None = None
        self._outcome: tuple[str, dict[str, Any]] | None = None
        self._is_due = False
        # Their lines would tear that of the training.
        disable_progress_bars()
        shutil.rmtree(self._place, ignore_errors=True)  # of a run that was killed

    @property
    def _place(self) -> Path:
        return self.folder / "hub.tmp"

    def after_epoch(self, epoch: int) -> None:
        """Begins an upload if one is due, and the one before it has ended.

        Args:
            epoch: Epochs done; their checkpoint is written.
        """
        self._is_due |= epoch % self.every == 0
        if self._thread is not None and self._thread.is_alive():
            return  # the next epoch's snapshot holds this one's results
        self._report()
        if self._is_due:
            self._begin(epoch)

    def finish(self, epoch: int) -> None:
        """Uploads the end of the run, and waits for it."""
        self._join()
        if self._is_due or epoch % self.every != 0:
            self._begin(epoch)
            self._join()

    def abandon(self) -> None:
        """Gives an upload that is under way a moment to end; if it does not, the Hub keeps the snapshot before it."""
        self._join(PATIENCE_S)

    def _join(self, patience: float | None = None) -> None:
        if self._thread is not None:
            self._thread.join(patience)
            if not self._thread.is_alive():
                self._report()

    def _begin(self, epoch: int) -> None:
        self._is_due = False
        try:
            self._copy()
        except OSError as error:
            self._outcome = "hub_failed", {"epoch": epoch, "error": reason(error)}
            self._report()
            return
        # A daemon, for the end of the program does not wait for the network.
        self._thread = threading.Thread(target=self._upload, args=(epoch,), daemon=True)
        self._thread.start()

    def _copy(self) -> None:
        """Sets aside what is to be uploaded, which the training may replace at any moment."""
        shutil.rmtree(self._place, ignore_errors=True)
        last, main = self._place / BRANCH, self._place / "main"
        for name in _RECORDS:
            if (self.folder / name).is_file():
                _copy(self.folder / name, last / name)
        newest = Checkpoints(self.folder / "checkpoints").paths()[-1]
        _link(newest, last / "checkpoints" / newest.name)
        for name in _WEIGHTS:
            for file in (self.folder / name).glob("*.*"):
                _link(file, last / name / file.name)
        for part, target in (("last", last), ("best", main)):
            for file in (self.folder / part).glob("*.*"):
                _link(file, target / file.name)

    def _upload(self, epoch: int) -> None:
        since = time.perf_counter()
        try:
            hub.write_card(self._place / "main", f"hf-hub:{self.repo_id}")
            hub.write_card(self._place / BRANCH, f"hf-hub:{self.repo_id}@{BRANCH}")
            message = f"After epoch {epoch}"
            hub.push(self._place / "main", self.repo_id, private=self.private, message=message)
            pushed = hub.push(
                self._place / BRANCH,
                self.repo_id,
                revision=BRANCH,
                message=message,
                pickles=True,
                delete=["checkpoints/*"],
            )
            values = {"epoch": epoch, "commit": pushed.commit, "seconds": time.perf_counter() - since}
            self._outcome = "hub_upload", values
        except Exception as error:  # nothing of the network's stops a training
            self._outcome = "hub_failed", {"epoch": epoch, "error": reason(error)}
        finally:
            shutil.rmtree(self._place, ignore_errors=True)

    def _report(self) -> None:
        if self._outcome is None:
            return
        name, values = self._outcome
        self._outcome = None
        self._event(name, values)
        if name == "hub_failed":
            tqdm.write(
                f"warning: the snapshot after epoch {values['epoch']} was not uploaded: {values['error']}; the "
                "training goes on, and the next snapshot holds its results too",
                file=sys.stderr,
            )


def _link(source: Path, target: Path) -> None:
    """A second name for a file that is replaced whole, never written to; a copy where names cannot be had."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source, target)


def fetch_run(source: str, output: Path, experiment: str | None) -> Path:
    """Downloads a run's snapshot, to go on from.

    Args:
        source: 'hf-hub:org/name@last'.
        output: Folder of all runs.
        experiment: Name of the run's folder; None for the one it had.

    Returns:
        The run's folder, with its newest checkpoint below checkpoints/.

    Raises:
        CommandError: If it cannot be had, holds no run, or would overwrite one.
    """
    repo_id, _, revision = source.partition(":")[2].partition("@")
    fresh = output / f".{repo_id.replace('/', '--')}.tmp"
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        output.mkdir(parents=True, exist_ok=True)
        patterns = [*_RECORDS, "checkpoints/*.pt", *(f"{name}/*" for name in _WEIGHTS)]
        hub.fetch(repo_id, revision or None, fresh, patterns)
        if not Checkpoints(fresh / "checkpoints").paths():
            hint = "" if revision == BRANCH else f"; its branch is {BRANCH}, hf-hub:{repo_id}@{BRANCH}"
            raise CommandError(f"--resume {source}: no checkpoint there, as --hub-repo uploads it{hint}")
        folder = output / (experiment or _experiment(fresh) or repo_id.rsplit("/", 1)[-1])
        if folder.exists():
            raise CommandError(
                f"{folder} is there already: go on with it by --resume auto --experiment {folder.name}, or choose "
                "another --experiment for what is on the Hub"
            )
        os.replace(fresh, folder)
        return folder
    except hub.HubError as error:
        raise CommandError(f"--resume {source}: {error}") from error
    except OSError as error:
        raise CommandError(f"--resume {source}: {reason(error)}") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _experiment(folder: Path) -> str | None:
    """The name that the run had; a name alone, whatever the file says."""
    try:
        name = yaml.safe_load((folder / "config.yaml").read_text()).get("experiment")
    except (OSError, yaml.YAMLError, AttributeError):
        return None
    return Path(str(name)).name or None if name else None

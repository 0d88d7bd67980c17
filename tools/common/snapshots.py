"""Uploads a run to the Hub while it trains, and downloads it to resume."""

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub.utils import disable_progress_bars
from tqdm import tqdm

from stvit.hub import HubError, Repository
from stvit.hub.files import copy_file
from stvit.weights.source import Source

from .checkpoint import NAMES, Checkpoints, load_checkpoint
from .cli import CommandError, reason
from .files import read_utf8, remove_tree
from .locks import InUseError, PathLock
from .recipes import load_yaml

# Branch with the newest checkpoint. The branch main has the best weights.
BRANCH = "last"
_RECORDS = ("config.yaml", "summary.csv", "log.jsonl", "curve.png", "bad_images.jsonl")
_WEIGHTS = ("best", "last", "last_ema")
_WEIGHT_FILES = ("config.json", "model.safetensors")
# A scheduler that stops a job waits only for a short time.
PATIENCE_S = 10.0
# An upload has no timeout of its own. A stalled upload is abandoned after this time. If it still commits later, the Hub
# refuses the commit, because the branch has moved.
STALLED_S = 1800.0


class Snapshots:
    """Uploads a run directory in the background, every few epochs.

    A failure is a warning.

    The branch `last` gets the newest checkpoint, the records and all weights, with the last weights as its model. The
    branch main gets the best weights. Both branches can be loaded.

    Args:
        repo_id: Id of the repository. A missing repository is created.
        every: Epochs between snapshots.
        folder: Run directory.
        private: Whether a new repository is private.
        write_card: Writes the card of a model folder. It takes the folder and the name that loads the model.
        event: Records an event in the log of the run.
        is_stopped: Returns whether the user or the scheduler wants the program to end.
    """

    def __init__(
        self,
        repo_id: str,
        every: int,
        folder: Path,
        private: bool,
        write_card: Callable[[Path, str], object],
        event: Callable[[str, dict[str, Any]], None],
        is_stopped: Callable[[], bool],
    ) -> None:
        self.repo_id, self.every, self.folder, self.private = repo_id, every, folder, private
        self._write_card, self._event, self._is_stopped = write_card, event, is_stopped
        self._upload: _Upload | None = None
        self._uploaded: int | None = None
        self._is_due = False
        # They would interrupt the progress bar of the training.
        disable_progress_bars()
        remove_tree(self._place)  # of a run that was killed

    @property
    def _place(self) -> Path:
        return self.folder / "hub.tmp"

    def after_epoch(self, epoch: int) -> None:
        """Starts an upload if one is due and the previous upload has ended.

        Args:
            epoch: Number of epochs done. Their checkpoint is written.
        """
        self._is_due |= epoch % self.every == 0
        # If an upload is still running, the next snapshot contains the results of this epoch too.
        if self._has_ended() and self._is_due:
            self._start(epoch)

    def finish(self, epoch: int) -> None:
        """Uploads the end of the run, in up to two attempts.

        It waits for the upload unless the program is stopped.
        """
        self._wait()
        for _ in range(2):
            if self._uploaded != epoch and not self._is_stopped():
                self._start(epoch)
                self._wait()
        self._abandon_upload()
        if self._uploaded != epoch:
            print(
                f"the end of the run is not on the Hub ({self.repo_id}); run the same command with --resume auto to "
                "upload it",
                flush=True,
            )

    def abandon(self) -> None:
        """Waits a moment for a running upload, then abandons it.

        The Hub keeps the previous snapshot.
        """
        if self._upload is not None:
            self._upload.join(PATIENCE_S)
        self._abandon_upload()

    def _wait(self) -> None:
        since, is_announced = time.monotonic(), False
        while not self._has_ended() and not self._is_stopped():
            assert self._upload is not None
            self._upload.join(0.2)
            if not is_announced and time.monotonic() - since > PATIENCE_S:
                print(f"the run is done; uploading it to {self.repo_id}, press Ctrl-C to skip the upload", flush=True)
                is_announced = True

    def _abandon_upload(self) -> None:
        if not self._has_ended():
            assert self._upload is not None
            self._report("hub_failed", {"epoch": self._upload.epoch, "error": "the upload was abandoned"})
            self._upload = None
        remove_tree(self._place)

    def _has_ended(self) -> bool:
        """Returns whether no upload is running.

        It reports the result of an upload that has ended.
        """
        upload = self._upload
        if upload is None:
            return True
        if upload.is_alive():
            if time.monotonic() - upload.since < STALLED_S:
                return False
            self._report("hub_failed", {"epoch": upload.epoch, "error": f"it did not end within {STALLED_S:g} s"})
        elif upload.error is not None:
            self._report("hub_failed", {"epoch": upload.epoch, "error": upload.error})
        else:
            seconds = upload.until - upload.since
            self._uploaded = upload.epoch
            self._report("hub_upload", {"epoch": upload.epoch, "commit": upload.commit, "seconds": seconds})
        self._upload = None
        return True

    def _start(self, epoch: int) -> None:
        self._is_due = False
        place = self._place / str(epoch)
        try:
            self._place.mkdir(mode=0o700, exist_ok=True)  # no other user can replace a file during the upload
            _copy_run(self.folder, place)
        except (OSError, HubError) as error:
            remove_tree(place)
            self._report("hub_failed", {"epoch": epoch, "error": reason(error)})
            return
        self._upload = _Upload(self.repo_id, self.private, place, epoch, self._write_card)
        self._upload.start()

    def _report(self, name: str, values: dict[str, Any]) -> None:
        self._event(name, values)
        if name == "hub_failed":
            tqdm.write(
                f"warning: the snapshot after epoch {values['epoch']} was not uploaded: {values['error']}",
                file=sys.stderr,
            )


class _Upload(threading.Thread):
    """Thread that uploads a copy of the run.

    It is a daemon, so that the program can end without waiting for the network.

    Attributes:
        since: Start of the upload, in seconds of `time.monotonic`.
        until: End of the upload.
        commit: Commit of the branch `last`, after a successful upload.
        error: Reason of the failure, after a failed upload.
    """

    def __init__(
        self, repo_id: str, private: bool, place: Path, epoch: int, write_card: Callable[[Path, str], object]
    ) -> None:
        super().__init__(daemon=True, name="hub-upload")
        self.write_card = write_card
        self.repo_id, self.private, self.place, self.epoch = repo_id, private, place, epoch
        self.since = self.until = time.monotonic()
        self.commit: str | None = None
        self.error: str | None = None

    def run(self) -> None:
        main, last, message = self.place / "main", self.place / BRANCH, f"After epoch {self.epoch}"
        try:
            self.write_card(main, str(Source.hub(self.repo_id)))
            self.write_card(last, str(Source.hub(self.repo_id, BRANCH)))
            # The copy is private already, so that `stvit.hub.push` would only copy it again.
            repository = Repository(self.repo_id)
            repository.upload(main, private=self.private, message=message)
            pushed = repository.upload(last, revision=BRANCH, message=message, delete=[f"checkpoints/{NAMES}"])
            self.commit = pushed.commit
        except Exception as error:  # no failure of the network stops a training
            self.error = reason(error)
        finally:
            self.until = time.monotonic()
            remove_tree(self.place)


def _copy_run(folder: Path, place: Path) -> None:
    """Copies the files to upload.

    The training may replace the originals at any moment.

    Only the files of a run are copied. Other files in the run directory are not uploaded.

    Raises:
        stvit.hub.HubError: If a file is a link.
        OSError: If a file cannot be copied.
    """

    def weights_of(part: str, target: str) -> dict[str, str]:
        return {f"{target}{name}": f"{part}/{name}" for name in _WEIGHT_FILES if os.path.lexists(folder / part / name)}

    newest = f"checkpoints/{Checkpoints(folder / 'checkpoints').paths()[-1].name}"
    last = {name: name for name in _RECORDS if os.path.lexists(folder / name)} | {newest: newest}
    for name in _WEIGHTS:
        last |= weights_of(name, f"{name}/")
    last |= weights_of("last", "")
    for part, files in ((BRANCH, last), ("main", weights_of("best", ""))):
        for name, source in files.items():
            # Weights and checkpoints are replaced and never modified: a hard link keeps the present contents. Windows
            # does not replace a file that an upload has open.
            is_replaced = source not in _RECORDS and os.name != "nt"
            copy_file(folder, source, place / part / name, hard_link=is_replaced)


def read_remote_recipe(repo_id: str) -> dict[str, Any] | None:
    """Returns the recipe of the run in a repository; None if it cannot be read.

    The repository may contain no run, or the Hub may not answer.
    """
    text = Repository(repo_id).read_file("config.yaml", BRANCH)
    try:
        recipe = None if text is None else load_yaml(text.decode())
    except ValueError:
        return None
    return recipe if isinstance(recipe, dict) else None


def fetch_run(
    source: Source, output: Path, experiment: str | None, check: Callable[[dict[str, Any], str], None]
) -> tuple[Path, Path]:
    """Downloads the snapshot of a run, to resume it.

    Args:
        source: Repository and branch on the Hub.
        output: Folder of all runs.
        experiment: Name of the run directory; None for the name that the run had.
        check: Raises an error for a checkpoint that cannot be resumed. It takes the state and the name of the source.

    Returns:
        The run directory and its newest checkpoint.

    Raises:
        CommandError: If the run cannot be downloaded, the repository contains no run, the run directory exists, or
            another process downloads the same run.
    """
    place = f".{source.name.replace('/', '--')}"
    fresh = output / f"{place}.tmp"
    with PathLock() as lock:
        try:
            output.mkdir(parents=True, exist_ok=True)
            lock.acquire(output / f"{place}.lock")
        except InUseError as error:
            raise InUseError(f"--resume {source}: another process is downloading this run to {output}") from error
        except OSError as error:
            raise CommandError(f"--resume {source}: {reason(error)}") from error
        remove_tree(fresh)
        try:
            weights = [f"{name}/{file}" for name in _WEIGHTS for file in _WEIGHT_FILES]
            patterns = [*_RECORDS, f"checkpoints/{NAMES}", *weights]
            Repository(source.name).download(fresh, patterns, source.revision)
            paths = Checkpoints(fresh / "checkpoints").paths()
            if not paths:
                branch = Source.hub(source.name, BRANCH)
                hint = "" if source == branch else f"; pass the branch {BRANCH}, {branch}"
                raise CommandError(f"--resume {source}: no checkpoint of a run with --repo-id{hint}")
            check(load_checkpoint(paths[-1]), str(source))
            folder = output / (experiment or _read_name(fresh) or source.name.rsplit("/", 1)[-1])
            if folder.exists():
                raise CommandError(
                    f"{folder} already exists; resume it with --resume auto --experiment {folder.name}, or pass "
                    "another --experiment for the run on the Hub"
                )
            os.replace(fresh, folder)
            return folder, folder / "checkpoints" / paths[-1].name
        except HubError as error:
            raise CommandError(f"--resume {source}: {error}") from error
        except OSError as error:
            raise CommandError(f"--resume {source}: {reason(error)}") from error
        finally:
            remove_tree(fresh)


def _read_name(folder: Path) -> str | None:
    """Returns the name of a run from its recipe.

    Only the last part of a path counts, because the file may come from anybody.
    """
    try:
        name = load_yaml(read_utf8(folder / "config.yaml")).get("experiment")
    except (OSError, AttributeError, ValueError):
        return None
    return Path(str(name)).name or None if name else None

"""A run on the Hugging Face Hub: snapshots uploaded in the background, and going on from one."""

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub.utils import disable_progress_bars
from tqdm import tqdm

from stvit import hub
from stvit.tools.common.checkpoint import NAMES, Checkpoints, load_checkpoint
from stvit.tools.common.cli import CommandError, reason
from stvit.tools.common.files import read_utf8
from stvit.tools.common.locks import InUseError, PathLock
from stvit.tools.common.recipes import load_yaml

# Branch of what a run is gone on from; main holds the best weights.
BRANCH = "last"
_RECORDS = ("config.yaml", "summary.csv", "log.jsonl", "curve.png", "bad_images.jsonl")
_WEIGHTS = ("best", "last", "last_ema")
_WEIGHT_FILES = ("config.json", "model.safetensors")
# A scheduler that ends a job does not wait long.
PATIENCE_S = 10.0
# The client's uploads know no timeout: one that lasts so long is given up. Should it still come to its commit, the Hub
# refuses that once the branch has moved on.
STALLED_S = 1800.0


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
        is_stopped: Whether somebody wants the program to end.
    """

    def __init__(
        self,
        repo_id: str,
        every: int,
        folder: Path,
        private: bool,
        event: Callable[[str, dict[str, Any]], None],
        is_stopped: Callable[[], bool],
    ) -> None:
        self.repo_id, self.every, self.folder, self.private = repo_id, every, folder, private
        self._event, self._is_stopped = event, is_stopped
        self._upload: _Upload | None = None
        self._uploaded: int | None = None
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
        # The next epoch's snapshot holds this one's results too.
        if self._has_ended() and self._is_due:
            self._begin(epoch)

    def finish(self, epoch: int) -> None:
        """Uploads the end of the run, if need be twice, and waits for it, unless somebody wants the program to end."""
        self._wait()
        for _ in range(2):
            if self._uploaded != epoch and not self._is_stopped():
                self._begin(epoch)
                self._wait()
        self._leave()
        if self._uploaded != epoch:
            print(
                f"{self.repo_id} lacks the end of the run: the same command with --resume auto uploads it", flush=True
            )

    def abandon(self) -> None:
        """Gives an upload that is under way a moment to end; if it does not, the Hub keeps the snapshot before it."""
        if self._upload is not None:
            self._upload.join(PATIENCE_S)
        self._leave()

    def _wait(self) -> None:
        since, is_told = time.monotonic(), False
        while not self._has_ended() and not self._is_stopped():
            assert self._upload is not None
            self._upload.join(0.2)
            if not is_told and time.monotonic() - since > PATIENCE_S:
                print(f"uploading to {self.repo_id}; Ctrl-C leaves it, the run itself is done", flush=True)
                is_told = True

    def _leave(self) -> None:
        if not self._has_ended():
            assert self._upload is not None
            self._report("hub_failed", {"epoch": self._upload.epoch, "error": "it was left unfinished"})
            self._upload = None
        shutil.rmtree(self._place, ignore_errors=True)

    def _has_ended(self) -> bool:
        """Whether no upload is under way; tells what became of the one that was."""
        upload = self._upload
        if upload is None:
            return True
        if upload.is_alive():
            if time.monotonic() - upload.since < STALLED_S:
                return False
            self._report("hub_failed", {"epoch": upload.epoch, "error": f"it has not ended in {STALLED_S:g} s"})
        elif upload.error is not None:
            self._report("hub_failed", {"epoch": upload.epoch, "error": upload.error})
        else:
            seconds = upload.until - upload.since
            self._uploaded = upload.epoch
            self._report("hub_upload", {"epoch": upload.epoch, "commit": upload.commit, "seconds": seconds})
        self._upload = None
        return True

    def _begin(self, epoch: int) -> None:
        self._is_due = False
        place = self._place / str(epoch)
        try:
            _set_aside(self.folder, place)
        except (OSError, hub.HubError) as error:
            shutil.rmtree(place, ignore_errors=True)
            self._report("hub_failed", {"epoch": epoch, "error": reason(error)})
            return
        self._upload = _Upload(self.repo_id, self.private, place, epoch)
        self._upload.start()

    def _report(self, name: str, values: dict[str, Any]) -> None:
        self._event(name, values)
        if name == "hub_failed":
            tqdm.write(
                f"warning: the snapshot after epoch {values['epoch']} was not uploaded: {values['error']}",
                file=sys.stderr,
            )


class _Upload(threading.Thread):
    """The upload of what was set aside. A daemon, for the end of the program does not wait for the network.

    Attributes:
        since: When it began, in seconds of `time.monotonic`; `until`: when it ended.
        commit: Commit of the branch `last`, once it has ended well.
        error: Why it failed, once it has.
    """

    def __init__(self, repo_id: str, private: bool, place: Path, epoch: int) -> None:
        super().__init__(daemon=True, name="hub-upload")
        self.repo_id, self.private, self.place, self.epoch = repo_id, private, place, epoch
        self.since = self.until = time.monotonic()
        self.commit: str | None = None
        self.error: str | None = None

    def run(self) -> None:
        main, last, message = self.place / "main", self.place / BRANCH, f"After epoch {self.epoch}"
        try:
            hub.write_card(main, f"hf-hub:{self.repo_id}")
            hub.write_card(last, f"hf-hub:{self.repo_id}@{BRANCH}")
            hub.push(main, self.repo_id, private=self.private, message=message)
            options: dict[str, Any] = {"revision": BRANCH, "pickles": True, "delete": [f"checkpoints/{NAMES}"]}
            self.commit = hub.push(last, self.repo_id, message=message, **options).commit
        except Exception as error:  # nothing of the network's stops a training
            self.error = reason(error)
        finally:
            self.until = time.monotonic()
            shutil.rmtree(self.place, ignore_errors=True)


def _set_aside(folder: Path, place: Path) -> None:
    """Copies the files of a run that are to be uploaded: the training may replace them at any moment.

    Files of others in the folder are left out.

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
            # Weights and checkpoints are replaced but never written to: a hard link keeps the present contents. Windows
            # does not replace a file that an upload has open.
            is_replaced = source not in _RECORDS and os.name != "nt"
            hub.copy_file(folder, source, place / part / name, link=is_replaced)


def read_remote_recipe(repo_id: str) -> dict[str, Any] | None:
    """The recipe of the run whose snapshots a repository holds; None if it holds none, or cannot be asked."""
    text = hub.read_file(repo_id, "config.yaml", BRANCH)
    try:
        recipe = None if text is None else load_yaml(text.decode())
    except ValueError:
        return None
    return recipe if isinstance(recipe, dict) else None


def fetch_run(
    source: str, output: Path, experiment: str | None, check: Callable[[dict[str, Any], str], None]
) -> tuple[Path, Path]:
    """Downloads a run's snapshot, to go on from.

    Args:
        source: 'hf-hub:org/name@last'.
        output: Folder of all runs.
        experiment: Name of the run's folder; None for the name that the run had.
        check: Refuses, by raising, a checkpoint that this command cannot go on from. It takes the state and the name of
            the source.

    Returns:
        The run's folder, and its newest checkpoint.

    Raises:
        CommandError: If the run cannot be downloaded, is no run, would overwrite a folder, or another process downloads
            it to the same place.
    """
    repo_id, _, revision = source.partition(":")[2].partition("@")
    place = f".{repo_id.replace('/', '--')}"
    fresh = output / f"{place}.tmp"
    with PathLock() as lock:
        try:
            output.mkdir(parents=True, exist_ok=True)
            lock.acquire(output / f"{place}.lock")
        except InUseError as error:
            raise InUseError(f"--resume {source}: another process is downloading this run to {output}") from error
        except OSError as error:
            raise CommandError(f"--resume {source}: {reason(error)}") from error
        shutil.rmtree(fresh, ignore_errors=True)
        try:
            weights = [f"{name}/{file}" for name in _WEIGHTS for file in _WEIGHT_FILES]
            hub.fetch(repo_id, revision or None, fresh, [*_RECORDS, f"checkpoints/{NAMES}", *weights])
            paths = Checkpoints(fresh / "checkpoints").paths()
            if not paths:
                hint = "" if revision == BRANCH else f"; its branch is {BRANCH}, hf-hub:{repo_id}@{BRANCH}"
                raise CommandError(f"--resume {source}: no checkpoint there, as --repo-id uploads it{hint}")
            check(load_checkpoint(paths[-1]), source)
            folder = output / (experiment or _experiment(fresh) or repo_id.rsplit("/", 1)[-1])
            if folder.exists():
                raise CommandError(
                    f"{folder} is there already: go on with it by --resume auto --experiment {folder.name}, or choose "
                    "another --experiment for what is on the Hub"
                )
            os.replace(fresh, folder)
            return folder, folder / "checkpoints" / paths[-1].name
        except hub.HubError as error:
            raise CommandError(f"--resume {source}: {error}") from error
        except OSError as error:
            raise CommandError(f"--resume {source}: {reason(error)}") from error
        finally:
            shutil.rmtree(fresh, ignore_errors=True)


def _experiment(folder: Path) -> str | None:
    """The name that the run had; a name alone, whatever the file says."""
    try:
        name = load_yaml(read_utf8(folder / "config.yaml")).get("experiment")
    except (OSError, AttributeError, ValueError):
        return None
    return Path(str(name)).name or None if name else None

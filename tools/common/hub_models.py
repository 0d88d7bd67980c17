"""Models of the Hub that users of a page ask for: downloaded once for all who wait, within limits."""

import json
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from stvit.ops import SuperTokenAttention
from stvit.weights.errors import describe_hub_error, is_network_error

from .cli import CommandError

# Largest numbers in the arguments of a model; other numbers are limited by `_MAX_NUMBER`, lists by `_MAX_LENGTH`.
LIMITS = {
    "n_iter": 8,
    "stoken_size": 64,
    "depths": 64,
    "img_size": 1024,
    "input_size": 1024,
    "test_input_size": 1024,
    "num_classes": 100_000,
}
_MAX_NUMBER = 4096
_MAX_LENGTH = 64
_MAX_CONFIG = 4 * 2**20
_CONFIG = "config.json"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_CHECKPOINTS = ("model.pt", "best.pt")
# So many downloads at a time, and so many requests that wait for one.
_MAX_DOWNLOADS = 8
_MAX_WAITING = 12
_REQUEST_S = 10.0
_OWN_PAGE = "run the page on your own machine, with the model on its command line"


class Downloads:
    """Downloads of models, in threads: those who ask for the same model share one."""

    def __init__(self, seconds: float, max_bytes: int, max_total: int) -> None:
        """
        Args:
            seconds: A request waits no longer; the download goes on.
            max_bytes: Size of the largest model that users may have downloaded.
            max_total: Size of all models that users may have downloaded; what was in the cache before does not count.
        """
        self.seconds = seconds
        self.max_bytes = max_bytes
        self.max_total = max_total
        self._total = 0
        self._lock = threading.Lock()
        self._running: dict[str, Future[str]] = {}
        self._places = threading.BoundedSemaphore(_MAX_WAITING)

    def get(self, name: str, is_limited: bool = True) -> str:
        """Returns where a model is, once it is downloaded: `local-dir:FOLDER`, or the checkpoint of a detector.

        Args:
            name: 'hf-hub:ORG/NAME' or 'hf-hub:ORG/NAME@REVISION'.
            is_limited: Whether the limits hold.

        Raises:
            CommandError: If the model cannot be downloaded, is too large, or is not there in time.
        """
        if not self._places.acquire(blocking=False):
            raise CommandError("too many models are being downloaded; try again in a minute")
        try:
            return self._start(name, is_limited).result(self.seconds)
        except FutureTimeoutError:
            raise CommandError(
                f"{name}: downloading takes longer than {self.seconds:g} seconds and goes on; try again in a minute"
            ) from None
        finally:
            self._places.release()

    def close(self) -> None:
        """Ends all waiting."""
        with self._lock:
            for future in self._running.values():
                if not future.done():
                    future.set_exception(CommandError("the server is shutting down"))

    def _start(self, name: str, is_limited: bool) -> "Future[str]":
        with self._lock:
            future = self._running.get(name)
            if future is None:
                if len(self._running) >= _MAX_DOWNLOADS:
                    raise CommandError("too many models are being downloaded; try again in a minute")
                future = self._running[name] = Future()
                threading.Thread(target=self._work, args=(name, is_limited, future), daemon=True).start()
            return future

    def _work(self, name: str, is_limited: bool, future: "Future[str]") -> None:
        found: str | BaseException
        try:
            found = self._download(name, is_limited)
        except BaseException as error:
            found = error
        with self._lock:
            del self._running[name]
            if future.done():
                return
            if isinstance(found, BaseException):
                future.set_exception(found)
            else:
                future.set_result(found)

    def _download(self, name: str, is_limited: bool) -> str:
        repo_id, _, revision = name.partition(":")[2].partition("@")
        try:
            try:
                info = HfApi().model_info(repo_id, revision=revision or None, files_metadata=True, timeout=_REQUEST_S)
            except Exception as error:
                if not (isinstance(error, OfflineModeIsEnabled) or is_network_error(error)):
                    raise
                return _find_in_cache(repo_id, revision or None, error)
            files = {file.rfilename: file.size or 0 for file in info.siblings or []}
            wanted = _choose(name, files)
            if is_limited:
                self._reserve(name, repo_id, info.sha, {file: files[file] for file in wanted})
            paths = [Path(hf_hub_download(repo_id, file, revision=info.sha)) for file in wanted]
        except CommandError:
            raise
        except Exception as error:  # of the libraries below
            raise CommandError(f"cannot take {name}: {describe_hub_error(error, repo_id, revision or None)}") from error
        return _source(paths[0])

    def _reserve(self, name: str, repo_id: str, commit: str | None, sizes: Mapping[str, int]) -> None:
        size = sum(
            size
            for file, size in sizes.items()
            if not isinstance(try_to_load_from_cache(repo_id, file, revision=commit), str)
        )
        if sum(sizes.values()) > self.max_bytes:
            raise CommandError(
                f"{name} has {sum(sizes.values()) / 2**20:.0f} MB, more than the {self.max_bytes / 2**20:.0f} MB that "
                f"this page downloads; {_OWN_PAGE}"
            )
        with self._lock:
            if self._total + size > self.max_total:
                raise CommandError(
                    f"cannot take {name}: this page has downloaded its {self.max_total / 2**30:.0f} GB of models; "
                    "choose one of the list, or one that was shown before"
                )
            self._total += size


def _choose(name: str, files: Mapping[str, int]) -> list[str]:
    """Returns the files of a model: configuration and weights of timm, or a checkpoint of Ultralytics."""
    if _CONFIG in files:
        weights = next((file for file in _WEIGHTS if file in files), None)
        if weights is None:
            raise CommandError(f"cannot take {name}: it has a {_CONFIG}, but no {' or '.join(_WEIGHTS)}")
        return [_CONFIG, weights]
    checkpoints = [file for file in files if file.endswith(".pt")]
    known = next((file for file in _CHECKPOINTS if file in files), checkpoints[0] if len(checkpoints) == 1 else None)
    if known is None:
        found = f"these files end in .pt: {', '.join(checkpoints[:10])}" if checkpoints else "no file ends in .pt"
        raise CommandError(f"cannot take {name}: it has no {_CONFIG} and no {_CHECKPOINTS[0]}, and {found}")
    return [known]


def _find_in_cache(repo_id: str, revision: str | None, reason: Exception) -> str:
    """Returns where a model is in the cache of downloads.

    Raises:
        Exception: `reason`, if it is not there.
    """

    def find(file: str) -> Path | None:
        try:
            return Path(hf_hub_download(repo_id, file, revision=revision, local_files_only=True))
        except LocalEntryNotFoundError:
            return None

    config = find(_CONFIG)
    found = _WEIGHTS if config is not None else _CHECKPOINTS
    path = next((path for path in map(find, found) if path is not None), None)
    if path is None:
        raise reason
    return _source(config or path)


def _source(path: Path) -> str:
    return f"local-dir:{path.parent}" if path.name == _CONFIG else str(path)


# ---------------------------------------------------------------------------------------------------------------------
# Limits


def check_config(name: str, source: str) -> None:
    """Refuses a model whose arguments would make it take long to build or to run.

    Args:
        name: For the message.
        source: As `Downloads.get` returns it. The checkpoint of a detector has no arguments: see `check_modules`.

    Raises:
        CommandError: If a number is too large, or config.json cannot be read.
    """
    if not source.startswith("local-dir:"):
        return
    path = Path(source.partition(":")[2]) / _CONFIG
    try:
        if path.stat().st_size > _MAX_CONFIG:
            raise ValueError(f"it has more than {_MAX_CONFIG // 2**20} MB")
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"it is a {type(config).__name__}")
        details = config.get("pretrained_cfg")
        details = details if isinstance(details, dict) else {}
        for values in (config, details):
            for key in ("num_classes", "num_features", "input_size", "test_input_size", "model_args"):
                _check_values(name, values.get(key), key)
    except (OSError, RecursionError, ValueError) as error:
        raise CommandError(
            f"cannot take {name}: its {_CONFIG} cannot be read ({error}); it must be pushed again"
        ) from error


def _check_values(name: str, values: Any, key: str | None) -> None:
    limit = LIMITS.get(key or "", _MAX_NUMBER)
    if isinstance(values, dict):
        for inner, value in values.items():
            _check_values(name, value, inner)
    elif isinstance(values, list):
        if len(values) > _MAX_LENGTH:
            raise _too_much(name, f"{key} of {len(values)} values", _MAX_LENGTH)
        for value in values:
            _check_values(name, value, key)
    elif isinstance(values, int | float) and not -limit <= values <= limit:  # nor NaN
        raise _too_much(name, f"{key}={values!r:.40}", limit)


def check_modules(name: str, model: Any) -> None:
    """Refuses a model with layers of super token attention that would take long to run.

    Args:
        name: For the message.
        model: Of timm; or Ultralytics' YOLO, whose checkpoint brings its layers along.

    Raises:
        CommandError: If a size of a layer is too large.
    """
    for module in getattr(model, "model", model).modules():
        if isinstance(module, SuperTokenAttention):
            for key in ("n_iter", "stoken_size"):
                value = getattr(module, key)
                _check_values(name, list(value) if isinstance(value, tuple) else value, key)


def _too_much(name: str, what: str, limit: int) -> CommandError:
    return CommandError(f"{name} has {what}, more than the {limit} that this page takes; {_OWN_PAGE}")

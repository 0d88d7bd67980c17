"""Downloads the models that users name, and limits size and arguments."""

import threading
from collections.abc import Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from stvit.ops import SuperTokenAttention
from stvit.weights import Source
from stvit.weights.config import read_content
from stvit.weights.errors import describe_hub_error, is_network_error

from ..common.cli import CommandError

__all__ = ["Downloads", "check_config", "check_modules"]

# Largest values of these model arguments. `_MAX_NUMBER` limits all other numbers, `_MAX_LENGTH` the length of lists.
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
# Limits on parallel downloads and on requests that wait for one.
_MAX_DOWNLOADS = 8
_MAX_WAITING = 12
_REQUEST_S = 10.0
_OWN_PAGE = "run the page on your own machine, with the model on its command line"


class Downloads:
    """Downloads models in background threads.

    Users who ask for the same model share a download.
    """

    def __init__(self, seconds: float, max_bytes: int, max_total: int) -> None:
        """Stores the limits.

        Args:
            seconds: Longest wait of a request. The download continues after it.
            max_bytes: Largest model that users can download.
            max_total: Largest size of all models that users download, in bytes. Files in the cache do not count.
        """
        self.seconds = seconds
        self.max_bytes = max_bytes
        self.max_total = max_total
        self._total = 0
        self._lock = threading.Lock()
        self._running: dict[Source, Future[Source]] = {}
        self._places = threading.BoundedSemaphore(_MAX_WAITING)

    def get(self, source: Source, is_limited: bool = True) -> Source:
        """Downloads a model and returns its local source.

        The source is the folder of a classifier or the checkpoint of a detector.

        Args:
            source: Repository on the Hub.
            is_limited: Whether the size limits apply.

        Raises:
            CommandError: If the model cannot be downloaded, is too large, or the download takes too long.
        """
        if not self._places.acquire(blocking=False):
            raise CommandError("too many models are being downloaded; try again in a minute")
        try:
            return self._start(source, is_limited).result(self.seconds)
        except FutureTimeoutError:
            raise CommandError(
                f"{source}: the download takes longer than {self.seconds:g} seconds and continues; try again in a "
                "minute"
            ) from None
        finally:
            self._places.release()

    def close(self) -> None:
        """Ends all waiting requests."""
        with self._lock:
            for future in self._running.values():
                if not future.done():
                    future.set_exception(CommandError("the server is shutting down"))

    def _start(self, source: Source, is_limited: bool) -> "Future[Source]":
        with self._lock:
            future = self._running.get(source)
            if future is None:
                if len(self._running) >= _MAX_DOWNLOADS:
                    raise CommandError("too many models are being downloaded; try again in a minute")
                future = self._running[source] = Future()
                threading.Thread(target=self._work, args=(source, is_limited, future), daemon=True).start()
            return future

    def _work(self, source: Source, is_limited: bool, future: "Future[Source]") -> None:
        found: Source | BaseException
        try:
            found = self._download(source, is_limited)
        except BaseException as error:
            found = error
        with self._lock:
            del self._running[source]
            if future.done():
                return
            if isinstance(found, BaseException):
                future.set_exception(found)
            else:
                future.set_result(found)

    def _download(self, source: Source, is_limited: bool) -> Source:
        try:
            try:
                info = HfApi().model_info(
                    source.name, revision=source.revision, files_metadata=True, timeout=_REQUEST_S
                )
            except Exception as error:
                if not (isinstance(error, OfflineModeIsEnabled) or is_network_error(error)):
                    raise
                return _find_in_cache(source, error)
            files = {file.rfilename: file.size or 0 for file in info.siblings or []}
            wanted = _choose_files(source, files)
            if is_limited:
                self._reserve(source, info.sha, {file: files[file] for file in wanted})
            paths = [Path(hf_hub_download(source.name, file, revision=info.sha)) for file in wanted]
        except CommandError:
            raise
        except Exception as error:  # huggingface_hub, the network or the disk
            raise CommandError(
                f"cannot open {source}: {describe_hub_error(error, source.name, source.revision)}"
            ) from error
        return _to_source(paths[0])

    def _reserve(self, source: Source, commit: str | None, sizes: Mapping[str, int]) -> None:
        """Counts a download against the limits.

        Raises:
            CommandError: If a limit is exceeded.
        """
        size = sum(
            size
            for file, size in sizes.items()
            if not isinstance(try_to_load_from_cache(source.name, file, revision=commit), str)
        )
        if sum(sizes.values()) > self.max_bytes:
            raise CommandError(
                f"{source} has {sum(sizes.values()) / 2**20:.0f} MB, more than the limit of "
                f"{self.max_bytes / 2**20:.0f} MB; {_OWN_PAGE}"
            )
        with self._lock:
            if self._total + size > self.max_total:
                raise CommandError(
                    f"cannot open {source}: the limit of {self.max_total / 2**30:.0f} GB for all downloads is reached; "
                    "choose a model from the list, or one that was used before"
                )
            self._total += size


def _choose_files(source: Source, files: Mapping[str, int]) -> list[str]:
    """Returns the files to download.

    A classifier needs its configuration and weights, a detector its checkpoint.

    Raises:
        CommandError: If the repository has neither, or several checkpoints.
    """
    if _CONFIG in files:
        weights = next((file for file in _WEIGHTS if file in files), None)
        if weights is None:
            raise CommandError(f"cannot open {source}: it has a {_CONFIG}, but no {' or '.join(_WEIGHTS)}")
        return [_CONFIG, weights]
    checkpoints = [file for file in files if file.endswith(".pt")]
    known = next((file for file in _CHECKPOINTS if file in files), checkpoints[0] if len(checkpoints) == 1 else None)
    if known is None:
        found = f"these files end in .pt: {', '.join(checkpoints[:10])}" if checkpoints else "no file ends in .pt"
        raise CommandError(f"cannot open {source}: it has no {_CONFIG} and no {_CHECKPOINTS[0]}, and {found}")
    return [known]


def _find_in_cache(source: Source, error: Exception) -> Source:
    """Returns the local source of a model in the cache of downloads.

    Raises:
        Exception: `error`, if the model is not in the cache.
    """

    def find(file: str) -> Path | None:
        try:
            return Path(hf_hub_download(source.name, file, revision=source.revision, local_files_only=True))
        except LocalEntryNotFoundError:
            return None

    config = find(_CONFIG)
    found = _WEIGHTS if config is not None else _CHECKPOINTS
    path = next((path for path in map(find, found) if path is not None), None)
    if path is None:
        raise error
    return _to_source(config or path)


def _to_source(path: Path) -> Source:
    return Source.folder(path.parent) if path.name == _CONFIG else Source.file(path)


# ---------------------------------------------------------------------------------------------------------------------
# Limits


def check_config(name: str, source: Source) -> None:
    """Refuses a model whose arguments would make it slow to build or run.

    Args:
        name: Name of the model, for the message.
        source: Source from `Downloads.get`. The checkpoint of a detector has no arguments; see `check_modules`.

    Raises:
        CommandError: If a number is too large, or config.json cannot be read.
    """
    if source.kind != "folder":
        return
    try:
        config = read_content(source.path, _MAX_CONFIG)
        details = config.get("pretrained_cfg")
        details = details if isinstance(details, dict) else {}
        for values in (config, details):
            for key in ("num_classes", "num_features", "input_size", "test_input_size", "model_args"):
                _check_values(name, values.get(key), key)
    except (OSError, RecursionError, ValueError) as error:
        raise CommandError(f"cannot open {name}: cannot read its {_CONFIG} ({error}); push it again") from error


def _check_values(name: str, values: Any, key: str | None) -> None:
    limit = LIMITS.get(key or "", _MAX_NUMBER)
    if isinstance(values, dict):
        for inner, value in values.items():
            _check_values(name, value, inner)
    elif isinstance(values, list):
        if len(values) > _MAX_LENGTH:
            raise _too_large(name, f"{key} of {len(values)} values", _MAX_LENGTH)
        for value in values:
            _check_values(name, value, key)
    elif isinstance(values, int | float) and not -limit <= values <= limit:  # NaN too
        raise _too_large(name, f"{key}={values!r:.40}", limit)


def check_modules(name: str, model: Any) -> None:
    """Refuses a model with layers of super token attention that would be slow to run.

    Args:
        name: Name of the model, for the message.
        model: Model of timm, or Ultralytics' YOLO, whose checkpoint contains the layers.

    Raises:
        CommandError: If an argument of a layer is too large.
    """
    for module in getattr(model, "model", model).modules():
        if isinstance(module, SuperTokenAttention):
            for key in ("n_iter", "stoken_size"):
                value = getattr(module, key)
                _check_values(name, list(value) if isinstance(value, tuple) else value, key)


def _too_large(name: str, value: str, limit: int) -> CommandError:
    return CommandError(f"{name} has {value}, more than the limit of {limit}; {_OWN_PAGE}")

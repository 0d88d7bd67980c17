"""Explains why weights could not be loaded, and what to do.

timm finds, downloads and loads weights with the help of several libraries. Few of their errors name the model or the
next step. `explain_errors` turns them into a `PretrainedError` that does.
"""

import errno
import pickle
import re
import traceback
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import constants, errors, get_token, try_to_load_from_cache
from safetensors import SafetensorError

from stvit.safe_text import one_line
from stvit.weights.check import find_corruption
from stvit.weights.config import ModelTooLargeError, OtherModelError
from stvit.weights.source import NAMESPACE_VARIABLE, is_own_model

__all__ = [
    "PretrainedDownloadError",
    "PretrainedError",
    "describe_hub_error",
    "describe_repository",
    "explain",
    "explain_config_errors",
    "explain_errors",
    "is_network_error",
]

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# Functions of timm that load weights. An error outside of them has another cause.
_LOADERS = {"load_pretrained", "load_model_config_from_hf", "load_model_config_from_path"}
_HTTP_LIBRARIES = {"httpx", "httpx2", "httpcore", "requests", "urllib3"}


class PretrainedError(RuntimeError):
    """Raised when pretrained weights cannot be loaded.

    The message is one line without secrets. It names the source and the reason, and says what to do.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class PretrainedDownloadError(PretrainedError, OSError):
    """Raised when a download fails: an error of the Hub, the network or the disk."""


@contextmanager
def explain_errors(model: str, cfg: Mapping[str, Any], cache_dir: str | Path | None = None) -> Iterator[None]:
    """Context manager that turns timm's errors about weights into `PretrainedError`.

    Other errors pass unchanged.

    Args:
        model: Name of the model, for the message.
        cfg: Location of the weights as in timm's `PretrainedCfg`: `source`, `hf_hub_id`, `hf_hub_filename`, `file`,
            `state_dict`, `url`.
        cache_dir: Cache of downloads; None for huggingface_hub's.
    """
    try:
        yield
    except (PretrainedError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        frames = {
            frame.f_code.co_name
            for frame, _ in traceback.walk_tb(error.__traceback__)
            if frame.f_globals.get("__name__", "").startswith("timm.models.")
        }
        # With a source, an unknown architecture or field is an error in config.json. Without a source, it is a mistake
        # of the caller.
        loaders = _LOADERS | ({"_resolve_model_source", "resolve_pretrained_cfg"} if cfg.get("source") else set())
        if not frames & loaders:
            raise
        kind, message = explain(error, cfg, cache_dir, is_of_config="load_pretrained" not in frames)
        raise kind(f"{model}: {message}") from error


@contextmanager
def explain_config_errors(
    model: str, cfg: Mapping[str, Any], cache_dir: str | Path | None = None, names: Collection[str] | None = None
) -> Iterator[None]:
    """Context manager that turns errors about config.json into `PretrainedError`.

    Args:
        model: Name of the model, for the message.
        cfg: As for `explain_errors`.
        cache_dir: As for `explain_errors`.
        names: Arguments that come from config.json; None for all. Errors about other arguments pass unchanged. The
            message of an error begins with the name of the argument, or is Python's about an unexpected argument.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        unexpected = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if isinstance(error, TypeError) and not unexpected:
            raise
        name = unexpected[1] if unexpected else str(error).split(" ", 1)[0]
        is_of_file = names is None or isinstance(error, ModelTooLargeError) or name in names
        if not cfg.get("source") or not is_of_file:
            raise
        kind, message = explain(error, cfg, cache_dir, is_of_config=True)
        raise kind(f"{model}: {message}") from error


def explain(
    error: Exception, cfg: Mapping[str, Any], cache_dir: str | Path | None, is_of_config: bool
) -> tuple[type[PretrainedError], str]:
    """Returns type and message of the error to raise, without the model's name.

    Args:
        error: Error of timm or of a library below it.
        cfg: As for `explain_errors`.
        cache_dir: As for `explain_errors`.
        is_of_config: Whether the error occurred while config.json was read.
    """
    hub_id = cfg.get("hf_hub_id")
    given = cfg.get("state_dict") or cfg.get("file") or (None if hub_id else cfg.get("url"))
    if not hub_id and not given and not cfg.get("source"):
        return PretrainedError, _explain_unpublished(cfg)
    if hub_id and (cfg.get("source") == "hf-hub" or not given):
        repo_id, _, revision = str(hub_id).partition("@")
        subject = f"cannot load the pretrained weights of {describe_repository(repo_id, revision)}"
        if not _is_about_content(error):
            return PretrainedDownloadError, f"{subject}: {_explain_download(error, cfg, repo_id, revision)}"
        path = _find_in_cache(repo_id, revision, cfg.get("hf_hub_filename"), cache_dir)
        remedy = "delete it and load again; if that does not help, its owner must push it again"
    else:
        subject = f"cannot load pretrained weights from {'the given state_dict' if cfg.get('state_dict') else given}"
        path, remedy = _find_locally(cfg.get("file")), "copy or convert it again"
    if isinstance(error, FileNotFoundError):
        missing = f"no such file, or no config.json in the folder ({error})" if str(error) else "no such file"
        return PretrainedDownloadError, f"{subject}: {missing}. Pass the path of the weights"
    if isinstance(error, OSError):
        return PretrainedDownloadError, f"{subject}: {describe_hub_error(error, str(given))}"
    return PretrainedError, f"{subject}: {_explain_content(error, path, remedy, is_of_config)}"


def _explain_unpublished(cfg: Mapping[str, Any]) -> str:
    """Returns the message for a model without published weights."""
    message = "no pretrained weights of this model are published. Pass pretrained=False for random weights. "
    published = timm.list_pretrained(f"{cfg.get('architecture')}.*")
    if published:
        message += f"{' and '.join(published)} can be loaded. "
    message += (
        "To load your own, pass 'hf-hub:ORG/NAME' or 'local-dir:FOLDER' as the name, or "
        "pretrained_cfg_overlay=dict(file=PATH)"
    )
    if is_own_model(cfg.get("architecture")):
        repository = f"ORG/{cfg['architecture']}.{cfg.get('tag')}"
        message += f". Set {NAMESPACE_VARIABLE}=ORG if they are in the Hub repository {repository}"
    return message


def _explain_download(error: Exception, cfg: Mapping[str, Any], repo_id: str, revision: str) -> str:
    message = describe_hub_error(error, repo_id, revision)
    if not cfg.get("source") and is_own_model(cfg.get("architecture")):  # a tag of this package
        if isinstance(error, errors.EntryNotFoundError | errors.RepositoryNotFoundError):
            message += (
                ". If you have the weights, such as the authors' file, convert them with python -m "
                "stvit.tools.convert_checkpoint FILE --output FOLDER, and load the folder with "
                "timm.create_model('local-dir:FOLDER', pretrained=True)"
            )
        owner = repo_id.rpartition("/")[0]
        message += f". Set {NAMESPACE_VARIABLE} if the weights have another owner than {owner!r}"
    return message


def _explain_content(error: Exception, path: Path | None, remedy: str, is_of_config: bool) -> str:
    """Returns the reason and the next step for an error in the contents of a file.

    Args:
        error: The error.
        path: File of the weights, if known.
        remedy: The next step for a damaged file.
        is_of_config: As for `explain`.
    """
    defect = None if path is None else find_corruption(path)
    if path is not None and defect is not None:
        return f"{path.resolve()} {defect}; {remedy}"  # resolved, because the cache contains links to its files
    code = _find_code(error)
    if code is not None:
        return (
            f"loading the file would run {code}, and code in files of weights is never run. Ask the owner for "
            "safetensors, or convert a checkpoint with python -m stvit.tools.convert_checkpoint"
        )
    if isinstance(error, OtherModelError):
        return str(error)
    if is_of_config:
        defect = f"has no {error}" if isinstance(error, KeyError) else f"cannot be used ({_join_lines(error)})"
        return f"config.json {defect}; create or push it again"
    if isinstance(error, SafetensorError | pickle.UnpicklingError | EOFError):
        return f"{path.resolve() if path is not None else 'the file'} is damaged ({_join_lines(error)}); {remedy}"
    return _join_lines(error)


def _is_about_content(error: Exception) -> bool:
    """Returns whether the file was found and its contents caused the error."""
    return not isinstance(error, OSError | errors.EntryNotFoundError | errors.HFValidationError) and not _is_http(error)


def _is_http(error: BaseException) -> bool:
    return any(kind.__module__.partition(".")[0] in _HTTP_LIBRARIES for kind in type(error).__mro__)


def _find_code(error: Exception) -> str | None:
    """Returns the code that a pickle would run; None for another error.

    PyTorch and timm name the code in their messages.
    """
    message = _join_lines(error)
    if "weights_only" not in message and "Weights only load failed" not in message:
        return None
    found = re.search(r"Unsupported globals: (.*?)\. No |GLOBAL (\S+)", message)
    return next(filter(None, found.groups())) if found else "code"


def describe_repository(repo_id: str, revision: str | None) -> str:
    """Returns the name of a repository and its revision, for a message."""
    return f"the Hub repository {repo_id} (revision {revision or 'main'})"


def describe_hub_error(
    error: BaseException, repo_id: str, revision: str | None = None, *, from_cache: bool = True
) -> str:
    """Returns why a request to the Hub failed, and what to do.

    Args:
        error: Error of huggingface_hub or of a library below it.
        repo_id: 'org/name' of the repository.
        revision: Branch, tag or commit; None or '' for main.
        from_cache: Whether cached files would have been enough.

    Returns:
        Reason and next step in one line, without a full stop at the end and without secrets.
    """
    return one_line(_describe_hub_error(error, repo_id, revision, from_cache))


def _describe_hub_error(error: BaseException, repo_id: str, revision: str | None, from_cache: bool) -> str:
    chain = _chain(error)
    status = next((code for code in map(_status, chain) if code is not None), None)

    def find(*kinds: type[BaseException]) -> BaseException | None:
        return next((link for link in chain if isinstance(link, kinds)), None)

    if find(errors.HFValidationError):
        return f"{repo_id!r} is not a repository id; pass ORG/NAME"
    if find(errors.GatedRepoError):
        return f"access is restricted. Request access at {constants.ENDPOINT}/{repo_id}, and log in"
    if status == 401 and "invalid credentials" in str(error).lower():
        return (
            "the Hub does not know the access token (HF_TOKEN or the login). Log in again with `hf auth login`, or set "
            "HF_TOKEN to a valid token"
        )
    if find(errors.RepositoryNotFoundError) or status == 401:
        token = "the token in use has no access" if get_token() else "no token was sent"
        return (
            f"it does not exist, or it is private and {token}. Check the name, or log in with `hf auth login` or "
            "HF_TOKEN to an account with access"
        )
    if find(errors.RevisionNotFoundError):
        return f"revision {revision or 'main'!r} does not exist. Pass an existing branch, tag or commit"
    missing = find(errors.RemoteEntryNotFoundError)
    if missing is not None:
        file = str(getattr(getattr(missing, "response", None), "url", "")).rsplit("/", 1)[-1].partition("?")[0]
        return f"the file {file or 'with the weights'} is missing. Its owner must push it"
    if status == 403:
        return (
            f"permission denied (403: {_server_message(chain)}). Log in with a token that has the right; writing needs "
            "a token of type 'write'"
        )
    if status == 412:
        return "somebody else pushed at the same time. Look at the changes, and push again"
    if status is not None:
        later = ". Try again later" if status >= 500 or status == 429 else ""
        return f"the Hub answered with status {status} ({_server_message(chain)}){later}"
    if find(errors.OfflineModeIsEnabled):
        if not from_cache:
            return "offline mode is on (HF_HUB_OFFLINE), but this needs the Hub. Unset HF_HUB_OFFLINE"
        return (
            f"offline mode is on (HF_HUB_OFFLINE), and it is not in the cache, {constants.HF_HUB_CACHE}. Unset "
            "HF_HUB_OFFLINE to download it once, or copy the cache of another machine"
        )
    if find(errors.FileMetadataError):
        return (
            f"the server at {constants.ENDPOINT} is not a Hub. Check HF_ENDPOINT, and that no proxy or login page of "
            "the network answers instead"
        )
    if is_network_error(error):
        return (
            f"no connection to {constants.ENDPOINT}, or it broke ({_join_lines(chain[-1])}). Check the network, the "
            "proxy and HF_ENDPOINT, and run the same command again"
            + ("; HF_HUB_OFFLINE=1 uses only the cache" if from_cache else "")
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        place = f", or set HF_HOME to a disk with more space: {constants.HF_HUB_CACHE}" if from_cache else ""
        return f"the disk is full. Free some space{place}"
    if "Consistency check failed" in str(error):
        return "the download was truncated. Run the same command again"
    return _join_lines(error)


def is_network_error(error: BaseException) -> bool:
    """Returns whether a request got no answer: no connection, or a broken one."""
    chain = _chain(error)
    return all(_status(link) is None for link in chain) and any(
        _is_http(link) or isinstance(link, ConnectionError | TimeoutError) for link in chain
    )


def _chain(error: BaseException) -> list[BaseException]:
    """Returns the error and its causes, the first cause last."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    return chain


def _status(error: BaseException) -> int | None:
    response = getattr(error, "response", None)
    return getattr(response, "status_code", None)


def _server_message(chain: list[BaseException]) -> str:
    for link in chain:
        message = getattr(link, "server_message", None)
        if message:
            return " ".join(str(message).split())[:300]
    return _join_lines(chain[0])[:300]


def _join_lines(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _find_in_cache(repo_id: str, revision: str, filename: str | None, cache_dir: str | Path | None) -> Path | None:
    for name in (filename,) if filename else _WEIGHTS:
        found = try_to_load_from_cache(repo_id, name, cache_dir=cache_dir, revision=revision or None)
        if isinstance(found, str):
            return Path(found)
    return None


def _find_locally(file: Any) -> Path | None:
    if not file:
        return None
    path = Path(file)
    if path.is_dir():
        return next((path / name for name in _WEIGHTS if (path / name).is_file()), None)
    return path

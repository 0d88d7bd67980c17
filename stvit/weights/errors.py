"""Errors of loading pretrained weights, and their explanations."""

import errno
import pickle
import re
import traceback
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, errors, get_token, try_to_load_from_cache
from safetensors import SafetensorError
from timm.models import is_model_in_modules

from stvit.safe_text import one_line
from stvit.weights.check import find_corruption
from stvit.weights.config import ModelTooLargeError

__all__ = [
    "NAMESPACE_VARIABLE",
    "PretrainedDownloadError",
    "PretrainedError",
    "describe_hub_error",
    "describe_repository",
    "explain",
    "explain_config_errors",
    "explain_errors",
    "is_network_error",
    "is_own_model",
]

# Names another owner of the weights on the Hub than this project. Read when a model is created.
NAMESPACE_VARIABLE = "STVIT_HUB_NAMESPACE"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# The functions of timm in which weights are loaded; what fails outside of them is not about weights.
_LOADERS = {"load_pretrained", "load_model_config_from_hf", "load_model_config_from_path"}
_HTTP_LIBRARIES = {"httpx", "httpx2", "httpcore", "requests", "urllib3"}


class PretrainedError(RuntimeError):
    """Raised when pretrained weights cannot be loaded.

    The message is one line without secrets. It names the model, the source and the reason, and says what to do.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class PretrainedDownloadError(PretrainedError, OSError):
    """Raised when weights cannot be downloaded: an error of the Hub, the network or the disk."""


@contextmanager
def explain_errors(model: str, cfg: Mapping[str, Any], cache_dir: str | Path | None = None) -> Iterator[None]:
    """Within it a failure of timm's to load pretrained weights is raised as `PretrainedError`, any other as it is.

    Args:
        model: Name of the model, for the message.
        cfg: Where its weights are, of timm's `PretrainedCfg`: `source`, `hf_hub_id`, `hf_hub_filename`, `file`,
            `state_dict`, `url`.
        cache_dir: The cache of downloads; None for huggingface_hub's.
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
        # Of a name that was given, an architecture that nobody knows is the name's mistake, of a source config.json's.
        loaders = _LOADERS | ({"_resolve_model_source"} if cfg.get("source") else set())
        if not frames & loaders:
            raise
        kind, message = explain(error, cfg, cache_dir, is_of_config="load_pretrained" not in frames)
        raise kind(f"{model}: {message}") from error


@contextmanager
def explain_config_errors(
    model: str, cfg: Mapping[str, Any], cache_dir: str | Path | None = None, names: Collection[str] | None = None
) -> Iterator[None]:
    """Context manager that turns errors about the fields of config.json into a `PretrainedError` with its name.

    Args:
        model: Name of the model, for the message.
        cfg: As for `explain_errors`.
        cache_dir: As for `explain_errors`.
        names: Names of the arguments that config.json sets; None for all. An error about another argument, whose
            message begins with its name, is not changed.
    """
    try:
        yield
    except (KeyError, ValueError) as error:
        is_of_file = names is None or isinstance(error, ModelTooLargeError) or str(error).split(" ", 1)[0] in names
        if not cfg.get("source") or not is_of_file:
            raise
        kind, message = explain(error, cfg, cache_dir, is_of_config=True)
        raise kind(f"{model}: {message}") from error


def explain(
    error: Exception, cfg: Mapping[str, Any], cache_dir: str | Path | None, is_of_config: bool
) -> tuple[type[PretrainedError], str]:
    """Type and message, without the model's name."""
    hub_id = cfg.get("hf_hub_id")
    given = cfg.get("state_dict") or cfg.get("file") or (None if hub_id else cfg.get("url"))
    if not hub_id and not given and not cfg.get("source"):
        return PretrainedError, _unpublished(cfg)
    if hub_id and (cfg.get("source") == "hf-hub" or not given):
        repo_id, _, revision = str(hub_id).partition("@")
        what = f"cannot load the pretrained weights of {describe_repository(repo_id, revision)}"
        if not _is_of_content(error):
            message = f"{what}: {describe_hub_error(error, repo_id, revision)}"
            if not cfg.get("source") and is_own_model(cfg.get("architecture")):  # a tag of this package
                if isinstance(error, errors.EntryNotFoundError | errors.RepositoryNotFoundError):
                    message += (
                        ". Or convert weights that you have, the authors' for example: python -m "
                        "stvit.tools.convert_checkpoint FILE --output FOLDER makes of them what "
                        "timm.create_model('local-dir:FOLDER', pretrained=True) loads"
                    )
                owner = repo_id.rpartition("/")[0]
                message += f". {NAMESPACE_VARIABLE} names another owner of the weights than {owner!r}"
            return PretrainedDownloadError, message
        path = _cached(repo_id, revision, cfg.get("hf_hub_filename"), cache_dir)
        again = "delete it and load again; if that does not help, its owner must push it again"
    else:
        what = f"cannot load pretrained weights from {'the state_dict given' if cfg.get('state_dict') else given}"
        path, again = _local(cfg.get("file")), "copy or convert it again"
    if isinstance(error, FileNotFoundError):
        wanted = f": there is no such file, or no config.json in it ({error})" if str(error) else ": there is no file"
        return PretrainedDownloadError, f"{what}{wanted}. Give the path of what holds the weights"
    if isinstance(error, OSError):
        return PretrainedDownloadError, f"{what}: {describe_hub_error(error, str(given))}"
    found = None if path is None else find_corruption(path)
    if path is not None and found is not None:
        # What is to be deleted is the file, and not the cache's link to it.
        return PretrainedError, f"{what}: {path.resolve()} {found}; {again}"
    code = _code(error)
    if code is not None:
        return PretrainedError, (
            f"{what}: the file wants to run {code}, and no code of a file of weights is run. Ask its owner for "
            "safetensors, or convert a checkpoint with python -m stvit.tools.convert_checkpoint"
        )
    if is_of_config:
        lack = f"lacks {error}" if isinstance(error, KeyError) else f"cannot be used ({_one_line(error)})"
        return PretrainedError, f"{what}: its config.json {lack}; it must be made or pushed again"
    if isinstance(error, SafetensorError | pickle.UnpicklingError | EOFError):
        at = f"{path.resolve()} " if path is not None else "the file "
        return PretrainedError, f"{what}: {at}is damaged ({_one_line(error)}); {again}"
    return PretrainedError, f"{what}: {_one_line(error)}"


def _unpublished(cfg: Mapping[str, Any]) -> str:
    """Returns the error for a model without published weights, with the ways to load other weights."""
    message = (
        "no pretrained weights of this model are published. Pass pretrained=False for random weights. To load your "
        "own, pass 'hf-hub:ORG/NAME' or 'local-dir:FOLDER' as the name, or pretrained_cfg_overlay=dict(file=PATH)"
    )
    if is_own_model(cfg.get("architecture")):
        repository = f"ORG/{cfg['architecture']}.{cfg.get('tag')}"
        message += f". Set {NAMESPACE_VARIABLE}=ORG if they are in the Hub repository {repository}"
    return message


def is_own_model(architecture: str | None) -> bool:
    """Returns whether this package defines a model of timm's registry."""
    return architecture is not None and is_model_in_modules(architecture, ["stvit"])


def _is_of_content(error: Exception) -> bool:
    """Whether the file was there, and what it holds is at fault."""
    return not isinstance(error, OSError | errors.EntryNotFoundError | errors.HFValidationError) and not _is_http(error)


def _is_http(error: BaseException) -> bool:
    return any(kind.__module__.partition(".")[0] in _HTTP_LIBRARIES for kind in type(error).__mro__)


def _code(error: Exception) -> str | None:
    """What a pickle asks for beyond tensors, if that is the failure, by PyTorch's or timm's message."""
    message = _one_line(error)
    if "weights_only" not in message and "Weights only load failed" not in message:
        return None
    found = re.search(r"Unsupported globals: (.*?)\. No |GLOBAL (\S+)", message)
    return next(filter(None, found.groups())) if found else "code"


def describe_hub_error(
    error: BaseException, repo_id: str, revision: str | None = None, *, from_cache: bool = True
) -> str:
    """Returns why a request to the Hub failed, and what to do.

    Args:
        error: What huggingface_hub, or a library below it, raised.
        repo_id: 'org/name' of the repository it was about.
        revision: Branch, tag or commit; None or '' for main.
        from_cache: Whether the cache would have served as well.

    Returns:
        Reason and next step in one line, without the last full stop and without secrets.
    """
    return one_line(_describe_hub_error(error, repo_id, revision, from_cache))


def _describe_hub_error(error: BaseException, repo_id: str, revision: str | None, from_cache: bool) -> str:
    chain = _chain(error)
    status = next((code for code in map(_status, chain) if code is not None), None)

    def find(*kinds: type[BaseException]) -> BaseException | None:
        return next((link for link in chain if isinstance(link, kinds)), None)

    if find(errors.HFValidationError):
        return f"{repo_id!r} is no name of a repository: give it as ORG/NAME"
    if find(errors.GatedRepoError):
        return f"access to it must be asked for. Ask for it at {constants.ENDPOINT}/{repo_id}, and log in"
    if status == 401 and "invalid credentials" in str(error).lower():
        return (
            "the Hub does not know the token that was sent (HF_TOKEN or the login). Log in again with `hf auth login`, "
            "or set HF_TOKEN to a token that is valid"
        )
    if find(errors.RepositoryNotFoundError) or status == 401:
        token = "the token in use may not read it" if get_token() else "no token was sent"
        return (
            f"it does not exist, or is private and {token}. Check the name, or log in with `hf auth login`, or set "
            "HF_TOKEN, of an account that may read it"
        )
    if find(errors.RevisionNotFoundError):
        return f"it has no revision {revision or 'main'!r}. Give a branch, tag or commit that it has"
    missing = find(errors.RemoteEntryNotFoundError)
    if missing is not None:
        file = str(getattr(getattr(missing, "response", None), "url", "")).rsplit("/", 1)[-1].partition("?")[0]
        return f"the file {file or 'of the weights'} is missing there. Its owner must push it"
    if status == 403:
        return (
            f"the Hub forbids it (403: {_server_message(chain)}). Log in with a token that has the right, for writing "
            "one of the kind 'write'"
        )
    if status == 412:
        return "somebody else has pushed there meanwhile. Look at what it is, and push again"
    if status is not None:
        later = ". Try again later" if status >= 500 or status == 429 else ""
        return f"the Hub answered with status {status} ({_server_message(chain)}){later}"
    if find(errors.OfflineModeIsEnabled):
        if not from_cache:
            return "offline mode is on (HF_HUB_OFFLINE). This needs the Hub: unset it"
        return (
            f"offline mode is on (HF_HUB_OFFLINE) and it is not in the cache, {constants.HF_HUB_CACHE}. Go online once "
            "to download it (unset HF_HUB_OFFLINE), or copy the cache of a machine that has it there"
        )
    if find(errors.FileMetadataError):
        return (
            f"what answers at {constants.ENDPOINT} is no Hub. Check HF_ENDPOINT, and whether a proxy or a login page "
            "of the network answers instead"
        )
    if is_network_error(error):
        return (
            f"{constants.ENDPOINT} cannot be reached, or the connection broke ({_one_line(chain[-1])}). Check the "
            "network, the proxy and HF_ENDPOINT, and give the same command again"
            + ("; HF_HUB_OFFLINE=1 uses the cache alone" if from_cache else "")
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        place = f", or set HF_HOME to a disk that has it: {constants.HF_HUB_CACHE}" if from_cache else ""
        return f"the disk is full. Make room there{place}"
    if "Consistency check failed" in str(error):
        return "the file came truncated. Give the same command again"
    return _one_line(error)


def is_network_error(error: BaseException) -> bool:
    """Whether no answer came: the Hub cannot be reached, or the connection broke."""
    chain = _chain(error)
    return all(_status(link) is None for link in chain) and any(
        _is_http(link) or isinstance(link, ConnectionError | TimeoutError) for link in chain
    )


def _chain(error: BaseException) -> list[BaseException]:
    """The error and what it was raised from, the first cause last."""
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
    return _one_line(chain[0])[:300]


def describe_repository(repo_id: str, revision: str | None) -> str:
    return f"the Hub repository {repo_id} (revision {revision or 'main'})"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _cached(repo_id: str, revision: str, filename: str | None, cache_dir: str | Path | None) -> Path | None:
    for name in (filename,) if filename else _WEIGHTS:
        found = try_to_load_from_cache(repo_id, name, cache_dir=cache_dir, revision=revision or None)
        if isinstance(found, str):
            return Path(found)
    return None


def _local(file: Any) -> Path | None:
    if not file:
        return None
    path = Path(file)
    if path.is_dir():
        return next((path / name for name in _WEIGHTS if (path / name).is_file()), None)
    return path

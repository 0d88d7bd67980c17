"""Loading pretrained weights: `create_model`, and in words what can go wrong.

timm finds, downloads and loads the weights; each library below it has errors of its own, few of which name the model or
the next step. Here each becomes a `PretrainedError` that does, chained to the original.
"""

import errno
import json
import logging
import pickle
import re
import struct
import traceback
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
import torch
from huggingface_hub import constants, errors, get_token, hf_hub_download, try_to_load_from_cache
from safetensors import SafetensorError
from timm.models import get_pretrained_cfg, is_model_in_modules, load_state_dict, parse_model_name
from torch import nn

from stvit.model_config import (
    SPARE_PARAMETERS,
    ModelTooLargeError,
    check_model_args,
    check_pretrained_cfg,
    limit_parameters,
    read_config,
)
from stvit.safe_text import one_line
from stvit.state_dict import strip_prefix, tensor_names
from stvit.weights_file import WeightsFileError, check_file, count_elements

__all__ = [
    "NAMESPACE_VARIABLE",
    "PretrainedDownloadError",
    "PretrainedError",
    "check_source",
    "create_model",
    "describe_hub_error",
    "explain_config_errors",
    "explain_errors",
    "find_corruption",
    "is_network_error",
    "is_own_model",
    "verify",
]

_logger = logging.getLogger(__name__)
# Names another owner of the weights on the Hub than this project. Read when a model is created.
NAMESPACE_VARIABLE = "STVIT_HUB_NAMESPACE"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# The functions of timm in which weights are loaded; what fails outside of them is not about weights.
_LOADERS = {"load_pretrained", "load_model_config_from_hf", "load_model_config_from_path"}
# Files of safetensors that timm prefers to a pickle of a name; of any other name it is the one of the same name.
_SAFE_NAMES = {
    "pytorch_model.bin": "model.safetensors",
    "open_clip_pytorch_model.bin": "open_clip_model.safetensors",
}
# Of a model that is built from somebody's config.json without the weights.
_MAX_PARAMETERS = 1 << 30
# Ends of the names of files of weights in which timm looks for those of a folder.
_SUFFIXES = {".bin", ".pth", ".safetensors", ".tar"}
_HTTP_LIBRARIES = {"httpx", "httpx2", "httpcore", "requests", "urllib3"}


class PretrainedError(RuntimeError):
    """Raised when pretrained weights cannot be loaded.

    The message is one line without secrets. It names the model, the source and the reason, and says what to do.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class PretrainedDownloadError(PretrainedError, OSError):
    """Raised when weights cannot be downloaded: an error of the Hub, the network or the disk."""


def create_model(model_name: str, pretrained: bool = False, *, verify: bool = False, **kwargs: Any) -> nn.Module:
    """`timm.create_model`, with every failure of a pretrained load explained, and a check for flipped bits.

    Weights and config.json of somebody else can neither run code nor exhaust the memory: the structure of the file,
    the fields of config.json and the size of the model are checked before anything is built.

    A file (`pretrained_cfg_overlay=dict(file=…)`) may hold the weights under a prefix such as Lightning's `model.`.
    The models of this package explain their failures through `timm.create_model` as well, all but one: of
    `hf-hub:org/name` timm reads the configuration before it asks any model.

    Args:
        model_name: As timm takes it: a tag such as 'stvit_small.in1k', 'hf-hub:org/name', 'local-dir:folder'.
        pretrained: Whether to load the weights.
        verify: Whether to compare the downloaded files with the Hub's record of their sha256. The download itself
            only compares lengths.
        **kwargs: More arguments of `timm.create_model`.

    Returns:
        The model, on the CPU unless `device` says otherwise.

    Raises:
        PretrainedError: If the weights cannot be loaded or config.json is refused. It is a `PretrainedDownloadError` if
            the network or the disk is at fault.
        ValueError: If `verify` is asked for without pretrained weights of the Hub.
    """
    if verify and not pretrained:
        raise ValueError("verify=True compares pretrained weights with the Hub's record: it needs pretrained=True")
    overlay = kwargs.get("pretrained_cfg_overlay") or {}
    cfg = {**_source_of(model_name), **overlay}
    if pretrained and overlay.get("file") and not overlay.get("state_dict") and not overlay.get("custom_load"):
        kwargs["pretrained_cfg_overlay"] = {**overlay, **_stripped_file(model_name, overlay["file"])}
    with explain_errors(model_name, cfg, kwargs.get("cache_dir")):
        if kwargs.get("checkpoint_path") and Path(kwargs["checkpoint_path"]).is_file():
            try:
                check_file(Path(kwargs["checkpoint_path"]))
            except WeightsFileError as error:
                raise PretrainedError(f"{model_name}: cannot load the weights: {error}") from error
        limit = _check_foreign(model_name, cfg, pretrained, kwargs.get("cache_dir"))
        with limit_parameters(limit):
            model: Any = timm.create_model(model_name, pretrained=pretrained, **kwargs)
    if verify:
        cfg = model.pretrained_cfg
        if not cfg.get("hf_hub_id") or cfg.get("file") or cfg.get("state_dict"):
            raise ValueError(f"verify=True compares with the Hub's record, and {model_name} was not loaded from there")
        _verify(model_name, cfg["hf_hub_id"], kwargs.get("cache_dir"))
    return model


def _check_foreign(
    model_name: str, cfg: Mapping[str, Any], pretrained: bool, cache_dir: str | Path | None
) -> int | None:
    """Calls `check_source` for a model of timm; the models of this package call it themselves.

    Returns:
        Limit of the model's parameters, None for no limit.

    Raises:
        PretrainedError: If the weights or config.json are refused.
    """
    args: Any = {}
    architecture = str(cfg.get("architecture"))
    if cfg.get("source"):
        if cfg["source"] == "local-dir":
            path = Path(str(cfg["file"])) / "config.json"
        else:
            try:
                path = Path(_download(str(cfg["hf_hub_id"]), "config.json", cache_dir))
            except Exception as error:  # of huggingface_hub or the network
                kind, message = _explain(error, cfg, cache_dir, is_of_config=True)
                raise kind(f"{model_name}: {message}") from error
        try:
            with explain_config_errors(model_name, cfg, cache_dir):
                architecture, more, args = read_config(path)
        except OSError:  # timm reports the missing file
            return None
        cfg = {**more, **cfg}
    if is_own_model(architecture) or not timm.is_model(architecture):  # timm refuses an unknown one
        return None
    limit = check_source(model_name, cfg, args, pretrained, cache_dir)
    if cfg.get("source"):
        with explain_config_errors(model_name, cfg, cache_dir), torch.random.fork_rng(devices=[]), torch.device("meta"):
            with limit_parameters(limit):
                try:
                    timm.create_model(architecture, pretrained_cfg=dict(cfg), **args)
                except ModelTooLargeError:
                    raise
                except Exception:  # some models cannot be built there; timm says what is wrong with the others
                    pass
    return limit


def check_source(
    model: str, cfg: Mapping[str, Any], args: Any, pretrained: bool, cache_dir: str | Path | None = None
) -> int | None:
    """Checks the configuration of a model, and the file of its weights, which is downloaded first if need be.

    Args:
        model: Name of the model, for the message.
        cfg: timm's `PretrainedCfg` as a mapping.
        args: Arguments of the model in config.json (`model_args`); empty for a model that was named.
        pretrained: Whether the weights will be loaded.
        cache_dir: The cache of downloads; None for huggingface_hub's.

    Returns:
        The number of parameters that a model of these weights has at most; None for no limit.

    Raises:
        PretrainedError: If a field of the configuration has a wrong type or range, or the file of weights is damaged or
            could exhaust the memory. It is a `PretrainedDownloadError` if the file cannot be downloaded.
    """
    if cfg.get("source") or is_own_model(cfg.get("architecture")):
        with explain_config_errors(model, cfg, cache_dir):
            check_pretrained_cfg(cfg)
            check_model_args(args or {})
    if not pretrained:
        return _MAX_PARAMETERS if cfg.get("source") else None
    try:
        elements = [count_elements(path) for path in _weight_files(cfg, cache_dir)]
    except Exception as error:  # of the Hub, the network or a file of any kind
        kind, message = _explain(error, cfg, cache_dir, is_of_config=False)
        raise kind(f"{model}: {message}") from error
    return 2 * max(elements) + SPARE_PARAMETERS if elements else None


def _weight_files(cfg: Mapping[str, Any], cache_dir: str | Path | None) -> list[Path]:
    """Returns the files of weights that timm may read. Missing files are left out, because timm reports them."""
    source, hub_id = cfg.get("source"), cfg.get("hf_hub_id")
    if cfg.get("custom_load") or (not source and cfg.get("state_dict")):
        return []
    if source == "local-dir":
        folder = Path(str(cfg["file"]))
        if (folder / "model.safetensors").exists():
            return [folder / "model.safetensors"]
        return [path for path in sorted(folder.iterdir()) if path.suffix in _SUFFIXES] if folder.is_dir() else []
    if not source and cfg.get("file"):
        return [path for path in [Path(str(cfg["file"]))] if path.exists()]
    if not hub_id:
        return []
    name = cfg.get("hf_hub_filename") or "pytorch_model.bin"
    if not source and name.endswith(".safetensors"):  # of a model that was named: there is nothing to check
        return []
    if name.endswith(".bin"):
        try:
            return [Path(_download(str(hub_id), _SAFE_NAMES.get(name, f"{name[:-4]}.safetensors"), cache_dir))]
        except errors.EntryNotFoundError:
            pass
    return [Path(_download(str(hub_id), name, cache_dir))]


def _download(hub_id: str, name: str, cache_dir: str | Path | None) -> str:
    """Downloads a file of 'org/name' or 'org/name@revision'; returns its path in the cache."""
    repo_id, _, revision = hub_id.partition("@")
    return hf_hub_download(repo_id, name, revision=revision or None, cache_dir=cache_dir)


def _stripped_file(model_name: str, file: str | Path) -> dict[str, Any]:
    """Returns the weights in a file that have a prefix such as Lightning's `model.`, as an entry of a `PretrainedCfg`.

    It returns nothing for a file without a prefix and for models of this package, which remove prefixes themselves.

    Raises:
        PretrainedError: If the model is in the file under several prefixes.
    """
    if not timm.is_model(model_name) or is_own_model(model_name):
        return {}
    try:
        check_file(Path(file))
        state_dict = load_state_dict(str(file))
    except Exception:  # the file is checked and read again, and the error is explained
        return {}
    try:
        weights, said = strip_prefix(state_dict, tensor_names(model_name))
    except ValueError as error:
        raise PretrainedError(f"{model_name}: cannot load pretrained weights from {file}: {error}") from error
    if not said:
        return {}
    _logger.warning("%s", one_line(f"{file}: {said}"))
    return {"state_dict": weights}


def verify(repo_id: str, revision: str | None = None, cache_dir: str | Path | None = None) -> list[str]:
    """Compares the files of a repository in the cache with the Hub's record of their checksums.

    Args:
        repo_id: 'org/name'.
        revision: Branch, tag or commit; None for main.
        cache_dir: The cache; None for huggingface_hub's.

    Returns:
        A line for each file that differs, with the path of what the cache holds of it; none if all is well.

    Raises:
        OSError, ValueError: As huggingface_hub raises them, if the Hub cannot be asked or nothing is in the cache.
    """
    found = huggingface_hub.HfApi().verify_repo_checksums(repo_id, revision=revision, cache_dir=cache_dir)
    return [
        f"{(found.verified_path / file['path']).resolve()} (its {file['algorithm']} is {file['actual']}, and should be "
        f"{file['expected']})"
        for file in found.mismatches
    ]


def _verify(model: str, hub_id: str, cache_dir: str | Path | None) -> None:
    repo_id, _, revision = hub_id.partition("@")
    try:
        wrong = verify(repo_id, revision or None, cache_dir)
    except Exception as error:
        raise PretrainedDownloadError(
            f"{model}: verify=True could not compare with {_repository(repo_id, revision)}: "
            f"{describe_hub_error(error, repo_id, revision, from_cache=False)}"
        ) from error
    if wrong:
        raise PretrainedError(
            f"{model}: files in the cache differ from {_repository(repo_id, revision)}, bits have flipped: "
            f"{'; '.join(wrong)}. Delete what is there, and load again to download it anew"
        )


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
        kind, message = _explain(error, cfg, cache_dir, is_of_config="load_pretrained" not in frames)
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
        kind, message = _explain(error, cfg, cache_dir, is_of_config=True)
        raise kind(f"{model}: {message}") from error


def _source_of(model_name: str) -> dict[str, Any]:
    try:
        source, name = parse_model_name(model_name)
    except ValueError:
        return {}  # timm refuses it in words of its own
    if source == "hf-hub":
        return {"source": source, "hf_hub_id": name}
    if source == "local-dir":
        return {"source": source, "file": name}
    cfg = get_pretrained_cfg(name, allow_unregistered=True)
    return {} if cfg is None else cfg.to_dict()


def _explain(
    error: Exception, cfg: Mapping[str, Any], cache_dir: str | Path | None, is_of_config: bool
) -> tuple[type[PretrainedError], str]:
    """Type and message, without the model's name."""
    hub_id = cfg.get("hf_hub_id")
    given = cfg.get("state_dict") or cfg.get("file") or (None if hub_id else cfg.get("url"))
    if not hub_id and not given and not cfg.get("source"):
        return PretrainedError, _unpublished(cfg)
    if hub_id and (cfg.get("source") == "hf-hub" or not given):
        repo_id, _, revision = str(hub_id).partition("@")
        what = f"cannot load the pretrained weights of {_repository(repo_id, revision)}"
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


def _repository(repo_id: str, revision: str | None) -> str:
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


def find_corruption(path: Path) -> str | None:
    """What is wrong with a file of weights at first sight, as the rest of a sentence; None if nothing is."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(64)
        if size == 0:
            return "is empty"
        if start.startswith(b"version https://git-lfs"):
            return (
                "is a Git LFS pointer, the few lines that stand for the weights and not the weights (in a clone, `git "
                "lfs pull` fetches them)"
            )
        if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
            return "is a web page, not weights"
        if path.suffix != ".safetensors":
            return None
        try:
            # The header's length, the header, and the tensors: https://github.com/huggingface/safetensors#format
            (length,) = struct.unpack("<Q", start[:8])
            file.seek(8)
            # safetensors refuses a header of more than 100 MB.
            header = json.loads(file.read(length) if length < min(size, 100_000_000) else b"")
            end = 8 + length + max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        except (struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
            return f"is truncated or no safetensors at all ({size} bytes)"
    return f"is truncated: it has {size} bytes of {end}" if size < end else None

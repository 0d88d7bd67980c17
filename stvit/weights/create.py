"""Creates models with pretrained weights.

timm finds, downloads and loads the weights; each library below it has errors of its own, few of which name the model or
the next step. Here each becomes a `PretrainedError` that does, chained to the original.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
import torch
from huggingface_hub import errors, hf_hub_download
from timm.models import get_pretrained_cfg, load_state_dict, parse_model_name
from torch import nn

from stvit.safe_text import one_line
from stvit.weights.check import WeightsFileError, check_file, count_elements
from stvit.weights.config import (
    SPARE_PARAMETERS,
    ModelTooLargeError,
    check_model_args,
    check_pretrained_cfg,
    limit_parameters,
    read_config,
)
from stvit.weights.errors import (
    PretrainedDownloadError,
    PretrainedError,
    describe_hub_error,
    describe_repository,
    explain,
    explain_config_errors,
    explain_errors,
    is_own_model,
)
from stvit.weights.prefix import strip_prefix, tensor_names

__all__ = ["check_source", "create_model", "verify"]

_logger = logging.getLogger(__name__)
# Files of safetensors that timm prefers to a pickle of a name; of any other name it is the one of the same name.
_SAFE_NAMES = {
    "pytorch_model.bin": "model.safetensors",
    "open_clip_pytorch_model.bin": "open_clip_model.safetensors",
}
# Of a model that is built from somebody's config.json without the weights.
_MAX_PARAMETERS = 1 << 30
# Ends of the names of files of weights in which timm looks for those of a folder.
_SUFFIXES = {".bin", ".pth", ".safetensors", ".tar"}


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
                kind, message = explain(error, cfg, cache_dir, is_of_config=True)
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
        kind, message = explain(error, cfg, cache_dir, is_of_config=False)
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
            f"{model}: verify=True could not compare with {describe_repository(repo_id, revision)}: "
            f"{describe_hub_error(error, repo_id, revision, from_cache=False)}"
        ) from error
    if wrong:
        raise PretrainedError(
            f"{model}: files in the cache differ from {describe_repository(repo_id, revision)}, bits have flipped: "
            f"{'; '.join(wrong)}. Delete what is there, and load again to download it anew"
        )


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

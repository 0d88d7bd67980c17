"""Creates models with pretrained weights.

Files of weights and config.json are not trusted. Loading them cannot run code and cannot use all memory. Before a
model is built, this module checks the structure of the file, the fields of config.json and the size of the model.
"""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import huggingface_hub
import timm
import torch
from huggingface_hub import errors, hf_hub_download
from timm.models import PretrainedCfg, build_model_with_cfg, get_pretrained_cfg, load_state_dict, resolve_pretrained_cfg
from torch import nn

from stvit.safe_text import clipped, one_line
from stvit.weights.check import WeightsFileError, check_file, count_elements
from stvit.weights.config import (
    SPARE_PARAMETERS,
    ModelTooLargeError,
    TensorLimit,
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
)
from stvit.weights.packaged import check_packaged
from stvit.weights.prefix import strip_prefix, tensor_names
from stvit.weights.source import NAMESPACE_VARIABLE, Source, is_own_model

__all__ = ["build_model", "check_source", "create_model", "verify"]

_logger = logging.getLogger(__name__)
_Model = TypeVar("_Model", bound=nn.Module)
# If a repository has a pickle and a safetensors file, timm loads the latter. This is its name for each pickle. For
# other pickles, only the suffix differs.
_SAFE_NAMES = {
    "pytorch_model.bin": "model.safetensors",
    "open_clip_pytorch_model.bin": "open_clip_model.safetensors",
}
# Largest number of parameters of a model that is built from a config.json without loading weights.
_MAX_PARAMETERS = 1 << 30
# Suffixes of the files in a folder that timm takes for weights.
_SUFFIXES = {".bin", ".pth", ".safetensors", ".tar"}


def create_model(model_name: str, pretrained: bool = False, *, verify: bool = False, **kwargs: Any) -> nn.Module:
    """Calls `timm.create_model` with checked weights and explained errors.

    A file (`pretrained_cfg_overlay=dict(file=…)`) may have a prefix such as Lightning's `model.` in its keys.

    Models of this package raise the same errors if you call `timm.create_model` yourself, except for `hf-hub:org/name`:
    timm then reads config.json before it calls this package.

    Args:
        model_name: Name as timm takes it: 'stvit_small.in1k', 'hf-hub:org/name', 'local-dir:folder'.
        pretrained: Whether to load pretrained weights.
        verify: Whether to compare the sha256 of the downloaded files with the Hub. If False, only the file sizes are
            compared, during the download.
        **kwargs: Arguments of `timm.create_model`.

    Returns:
        The model, on the CPU unless `device` is given.

    Raises:
        PretrainedError: If the weights cannot be loaded, or config.json is refused. A network or disk error is a
            `PretrainedDownloadError`.
        ValueError: If `verify` is true but no weights are loaded from the Hub.
    """
    if verify and not pretrained:
        raise ValueError("verify=True compares pretrained weights with the Hub; pass pretrained=True")
    overlay = kwargs.get("pretrained_cfg_overlay") or {}
    cfg = {**_locate(model_name), **overlay}
    if pretrained and overlay.get("file") and not overlay.get("state_dict") and not overlay.get("custom_load"):
        kwargs["pretrained_cfg_overlay"] = {**overlay, **_strip_file(model_name, overlay["file"])}
    with explain_errors(model_name, cfg, kwargs.get("cache_dir")):
        if kwargs.get("checkpoint_path") and Path(kwargs["checkpoint_path"]).is_file():
            try:
                check_file(Path(kwargs["checkpoint_path"]))
            except WeightsFileError as error:
                raise PretrainedError(f"{model_name}: cannot load the weights: {error}") from error
        limit = _check_other_model(model_name, cfg, pretrained, kwargs.get("cache_dir"))
        with limit_parameters(limit):
            model: Any = timm.create_model(model_name, pretrained=pretrained, **kwargs)
    if verify:
        cfg = model.pretrained_cfg
        if not cfg.get("hf_hub_id") or cfg.get("file") or cfg.get("state_dict"):
            raise ValueError(f"verify=True compares with the Hub, but {model_name} was not loaded from there")
        _verify(model_name, Source.hub(cfg["hf_hub_id"]), kwargs.get("cache_dir"))
    return model


def build_model(model_cls: type[_Model], variant: str, pretrained: bool, **kwargs: Any) -> _Model:
    """Builds a model of this package with checked weights and explained errors.

    The environment variable STVIT_HUB_NAMESPACE names another owner of the published weights.

    Args:
        model_cls: Class of the model.
        variant: Name of the model in timm's registry.
        pretrained: Whether to load pretrained weights.
        **kwargs: Arguments of `build_model_with_cfg` and of the model.

    Raises:
        PretrainedError: If the weights cannot be loaded, or config.json is refused.
        ValueError: If an argument has a wrong type or range.
    """
    given = kwargs.get("pretrained_cfg")
    if not isinstance(given, str | dict | PretrainedCfg | None):
        raise ValueError(f"pretrained_cfg must be a tag or a dict, got {clipped(given)}")
    overlay = {
        **_locate_in_namespace(variant, given),
        **(kwargs.pop("pretrained_cfg_overlay", None) or {}),
    }
    cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), overlay).to_dict()
    cache_dir = kwargs.get("cache_dir")
    saved_args = kwargs.get("pretrained_model_args")  # from config.json
    limit = check_source(variant, cfg, saved_args, pretrained, cache_dir)
    check_model_args({key: kwargs[key] for key in ("features_only", "out_indices") if key in kwargs})
    # Arguments from config.json. An error about another argument is the caller's mistake and is raised unchanged.
    names = [key for key, value in (saved_args or {}).items() if kwargs.get(key) == value]
    with (
        explain_config_errors(variant, cfg, cache_dir, names),
        explain_errors(variant, cfg, cache_dir),
        limit_parameters(limit),
    ):
        model: _Model = build_model_with_cfg(model_cls, variant, pretrained, pretrained_cfg_overlay=overlay, **kwargs)
        return model


def _locate(model_name: str) -> dict[str, Any]:
    """Returns where the weights of a model are, as fields of timm's `PretrainedCfg`."""
    source = Source.parse_model_name(model_name)
    if source.kind == "hub":
        return {"source": "hf-hub", "hf_hub_id": source.full_name}
    if source.kind == "folder":
        return {"source": "local-dir", "file": source.name}
    cfg = get_pretrained_cfg(source.name, allow_unregistered=True)
    return {} if cfg is None else cfg.to_dict()


def _locate_in_namespace(variant: str, pretrained_cfg: Any) -> dict[str, str]:
    """Returns the Hub repository of a tag if STVIT_HUB_NAMESPACE is set.

    Args:
        variant: Name of the model.
        pretrained_cfg: A tag; None for the default tag. A dict or `PretrainedCfg` has its own location.

    Returns:
        The field `hf_hub_id` for timm's `PretrainedCfg`. It is empty if the variable is not set, or if `pretrained_cfg`
        is not a tag.
    """
    namespace = os.environ.get(NAMESPACE_VARIABLE)
    if not namespace or not isinstance(pretrained_cfg, str | None):
        return {}
    return {"hf_hub_id": f"{namespace}/{variant}.{resolve_pretrained_cfg(variant, pretrained_cfg).tag}"}


def _check_other_model(
    model_name: str, cfg: Mapping[str, Any], pretrained: bool, cache_dir: str | Path | None
) -> int | None:
    """Checks weights and config.json of a model that is not from this package.

    For models of this package, `build_model` calls `check_source`. A model that config.json describes is also built on
    the meta device first, where it needs no memory.

    Returns:
        Largest number of parameters of the model; None for no limit.

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
                config = read_config(path)
        except OSError:  # timm reports the missing file
            return None
        architecture, args = config.architecture, config.model_args
        cfg = {**config.pretrained_cfg, **cfg}
    if is_own_model(architecture) or not timm.is_model(architecture):  # timm reports an unknown architecture
        return None
    limit = check_source(model_name, cfg, args, pretrained, cache_dir)
    if cfg.get("source"):
        with explain_config_errors(model_name, cfg, cache_dir), torch.random.fork_rng(devices=[]), torch.device("meta"):
            with limit_parameters(limit), TensorLimit():
                try:
                    timm.create_model(architecture, pretrained_cfg=dict(cfg), **args)
                except ModelTooLargeError:
                    raise
                except Exception:  # some models do not support the meta device; timm reports real errors later
                    pass
    return limit


def check_source(
    model: str, cfg: Mapping[str, Any], args: Any, pretrained: bool, cache_dir: str | Path | None = None
) -> int | None:
    """Checks the configuration of a model and its file of weights.

    The file is downloaded if necessary.

    Args:
        model: Name of the model, for the message.
        cfg: timm's `PretrainedCfg` as a mapping.
        args: Arguments of the model in config.json (`model_args`); empty without a config.json.
        pretrained: Whether the weights will be loaded.
        cache_dir: Cache of downloads; None for huggingface_hub's.

    Returns:
        Largest number of parameters that the model may have: twice the number in the file plus `SPARE_PARAMETERS`, or
        `_MAX_PARAMETERS` for a config.json without weights; None for no limit.

    Raises:
        PretrainedError: If a field of the configuration has a wrong type or range, or the file of weights is damaged or
            could fill the memory. A failed download is a `PretrainedDownloadError`.
    """
    architecture = cfg.get("architecture")
    if cfg.get("source") or not isinstance(architecture, str | None) or is_own_model(architecture):
        with explain_config_errors(model, cfg, cache_dir):
            check_pretrained_cfg(cfg)
            check_model_args(args or {})
    if not pretrained:
        return _MAX_PARAMETERS if cfg.get("source") else None
    if cfg.get("file"):
        try:
            check_packaged(cfg["file"])
        except WeightsFileError as error:
            name = Path(cfg["file"]).stem  # with the tag, as 'stvit_pico.cifar10'
            raise PretrainedError(f"{name}: cannot load the pretrained weights: {error}") from error
    try:
        elements = [count_elements(path) for path in _find_weight_files(cfg, cache_dir)]
    except Exception as error:  # of the Hub, the network or an arbitrary file
        kind, message = explain(error, cfg, cache_dir, is_of_config=False)
        raise kind(f"{model}: {message}") from error
    return 2 * max(elements) + SPARE_PARAMETERS if elements else None


def _find_weight_files(cfg: Mapping[str, Any], cache_dir: str | Path | None) -> list[Path]:
    """Returns the files of weights that timm may read.

    Files on the Hub are downloaded. Missing local files are left out, because timm reports them.
    """
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
    if not source and name.endswith(".safetensors"):  # a registered model; safetensors contain no code
        return []
    if name.endswith(".bin"):
        try:
            return [Path(_download(str(hub_id), _SAFE_NAMES.get(name, f"{name[:-4]}.safetensors"), cache_dir))]
        except errors.EntryNotFoundError:
            pass
    return [Path(_download(str(hub_id), name, cache_dir))]


def _download(hub_id: str, name: str, cache_dir: str | Path | None) -> str:
    """Downloads a file of 'org/name' or 'org/name@revision'; returns its path."""
    source = Source.hub(hub_id)
    return hf_hub_download(source.name, name, revision=source.revision, cache_dir=cache_dir)


def _strip_file(model_name: str, file: str | Path) -> dict[str, Any]:
    """Reads a file and removes a prefix such as Lightning's `model.` from its keys.

    Returns:
        The weights without the prefix, as the field `state_dict` of timm's `PretrainedCfg`. The result is empty if the
        keys have no prefix, and for models of this package, which remove prefixes later.

    Raises:
        PretrainedError: If the model's tensors are under several prefixes.
    """
    if not timm.is_model(model_name) or is_own_model(model_name):
        return {}
    try:
        check_file(Path(file))
        state_dict = load_state_dict(str(file))
    except Exception:  # the file is read again later, and then the error is explained
        return {}
    try:
        weights, summary = strip_prefix(state_dict, tensor_names(model_name))
    except ValueError as error:
        raise PretrainedError(f"{model_name}: cannot load pretrained weights from {file}: {error}") from error
    if not summary:
        return {}
    _logger.warning("%s", one_line(f"{file}: {summary}"))
    return {"state_dict": weights}


def verify(repo_id: str, revision: str | None = None, cache_dir: str | Path | None = None) -> list[str]:
    """Compares the cached files of a repository with the checksums on the Hub.

    Args:
        repo_id: 'org/name'.
        revision: Branch, tag or commit; None for main.
        cache_dir: Cache of downloads; None for huggingface_hub's.

    Returns:
        A line for each file that differs, with its path in the cache; empty if all files are equal.

    Raises:
        OSError, ValueError: Errors of huggingface_hub, if the Hub cannot be reached or the cache is empty.
    """
    found = huggingface_hub.HfApi().verify_repo_checksums(repo_id, revision=revision, cache_dir=cache_dir)
    return [
        f"{(found.verified_path / file['path']).resolve()} ({file['algorithm']} is {file['actual']}, expected "
        f"{file['expected']})"
        for file in found.mismatches
    ]


def _verify(model: str, source: Source, cache_dir: str | Path | None) -> None:
    repository = describe_repository(source.name, source.revision)
    try:
        wrong = verify(source.name, source.revision, cache_dir)
    except Exception as error:
        raise PretrainedDownloadError(
            f"{model}: verify=True could not compare with {repository}: "
            f"{describe_hub_error(error, source.name, source.revision, from_cache=False)}"
        ) from error
    if wrong:
        raise PretrainedError(
            f"{model}: corrupt files in the cache, which differ from {repository}: {'; '.join(wrong)}. Delete these "
            "files, and load again to download them"
        )

"""Parses the names by which users select weights.

| text | source |
|---|---|
| `stvit_small`, `stvit_small.in1k` | model or tag of timm |
| `hf-hub:org/name`, `hf-hub:org/name@revision` | repository on the Hub (`hf_hub:` is the former spelling) |
| `local-dir:folder`, `folder`, `run` | folder with config.json; a run directory stands for its folder best/ |
| `weights.safetensors`, `model.pth` | file |
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import timm
from timm.models import is_model_in_modules, parse_model_name

__all__ = ["NAMESPACE_VARIABLE", "Source", "find_model_folder", "is_own_model"]

# Environment variable: user or organization on the Hub to load this package's pretrained weights from, instead of
# "stvit". It is read when a model is created.
NAMESPACE_VARIABLE = "STVIT_HUB_NAMESPACE"

_HUB = "hf-hub"
_FOLDER = "local-dir"
_CONFIG = "config.json"
# timm would read stvit_small.pth as the model stvit_small with the tag pth. Names with these suffixes are files.
_FILE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".safetensors", ".tar")


@dataclass(frozen=True)
class Source:
    """Weights as a user names them.

    `str(source)` is the name that `timm.create_model` takes, or the path of a file.

    Attributes:
        kind: Where the weights are: 'timm' (published for a model or tag), 'hub', 'folder' or 'file'.
        name: Model or tag, repository id, or path.
        revision: Branch, tag or commit of the repository; None for main.
    """

    kind: Literal["timm", "hub", "folder", "file"]
    name: str
    revision: str | None = None

    @classmethod
    def hub(cls, repo_id: str, revision: str | None = None) -> "Source":
        """Returns the source for a repository: 'org/name' or 'org/name@revision'."""
        name, _, inner = repo_id.partition("@")
        return cls("hub", name, revision or inner or None)

    @classmethod
    def folder(cls, path: str | Path) -> "Source":
        """Returns the source for a folder with model.safetensors and config.json."""
        return cls("folder", str(path))

    @classmethod
    def file(cls, path: str | Path) -> "Source":
        """Returns the source for a file of weights."""
        return cls("file", str(path))

    @classmethod
    def parse(cls, text: str | Path, *, allow_bare_repo_id: bool = False) -> "Source":
        """Parses any name of weights: timm model, repository, folder, run or file.

        If a path and a timm model have the same name, the path is used.

        Args:
            text: Name of the weights.
            allow_bare_repo_id: Whether 'org/name' without a prefix names a repository on the Hub.

        Raises:
            ValueError: If nothing has this name, or a folder has no config.json.
        """
        text = str(text)
        source = cls._parse_prefix(text)
        if source is not None:
            return source
        path = Path(text).expanduser()
        if path.is_dir():
            return cls.folder(find_model_folder(path))
        if path.exists():
            return cls.file(path)
        if timm.is_model(text) and path.suffix.lower() not in _FILE_SUFFIXES:
            return cls("timm", text)
        is_repo_id = text.count("/") == 1 and not path.suffix and not path.is_absolute()
        if is_repo_id and allow_bare_repo_id:
            return cls.hub(text)
        repo_id = text if is_repo_id else "ORG/NAME"
        raise ValueError(f"no file, folder or timm model named {text!r}; for a model on the Hub, pass {_HUB}:{repo_id}")

    @classmethod
    def parse_model_name(cls, text: str) -> "Source":
        """Parses a name in the same way as `timm.create_model`.

        A name without a prefix is a timm model, with or without a tag. It is never a path.
        """
        return cls._parse_prefix(text) or cls("timm", text)

    @classmethod
    def parse_hub(cls, text: object) -> "Source | None":
        """Returns the source for a name with the prefix 'hf-hub:'; None for others."""
        source = cls._parse_prefix(str(text).strip())
        return source if source is not None and source.kind == "hub" else None

    @classmethod
    def _parse_prefix(cls, text: str) -> "Source | None":
        try:
            prefix, name = parse_model_name(text)
        except ValueError:  # a path, or an unknown prefix
            return None
        if prefix == _HUB:
            return cls.hub(name)
        return cls.folder(name) if prefix == _FOLDER else None

    @property
    def full_name(self) -> str:
        """Name with the revision, such as 'org/name@v1'; timm's `hf_hub_id`."""
        return f"{self.name}@{self.revision}" if self.revision else self.name

    @property
    def path(self) -> Path:
        """Path of the folder or file."""
        if self.kind not in ("folder", "file"):
            raise ValueError(f"{self} is not a path")
        return Path(self.name).expanduser()

    @property
    def model_name(self) -> str | None:
        """Name for `timm.create_model`; None for a file, whose model is unknown."""
        return None if self.kind == "file" else str(self)

    def with_config(self) -> "Source":
        """Returns the folder of a model.safetensors if it also has a config.json.

        All other sources are returned unchanged.
        """
        if self.kind == "file" and self.path.name == "model.safetensors" and (self.path.parent / _CONFIG).is_file():
            return self.folder(self.path.parent)
        return self

    def __str__(self) -> str:
        if self.kind == "hub":
            return f"{_HUB}:{self.full_name}"
        return f"{_FOLDER}:{self.name}" if self.kind == "folder" else self.name


def find_model_folder(path: Path, part: str = "best") -> Path:
    """Returns the folder that contains config.json.

    This is `path` itself, or the subfolder `part` if `path` is a run directory.

    Args:
        path: Model folder or run directory.
        part: Subfolder of the run directory: 'best', 'last' or 'last_ema'.

    Raises:
        ValueError: If neither folder has a config.json.
    """
    for folder in (path, path / part):
        if (folder / _CONFIG).is_file():
            return folder
    raise ValueError(f"no config.json in {path} or {path / part}; pass a run directory, or a folder with config.json")


def is_own_model(architecture: str | None) -> bool:
    """Returns whether an architecture of timm's registry is defined by this package."""
    return architecture is not None and is_model_in_modules(architecture, ["stvit"])

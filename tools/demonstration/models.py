"""Models of the page: the list to choose from, and the models in memory."""

import re
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import timm

from stvit.weights import Source
from stvit.weights.packaged import PACKAGED

from ..common.cli import CommandError
from ..common.config import ModelSource
from ..common.model import find_source
from ..common.viewing import LoadedModel, is_detector, load_downloaded, load_model
from .config import ModelsConfig
from .hub_models import check_config, check_modules

__all__ = ["ModelList", "OpenedModels", "parse_hub"]

# No weights of a detector are published, so the example of a detector has random ones.
EXAMPLES = (*PACKAGED, "yolo26n-stvit_pico.yaml")
# Repository ids that users can type in, with a revision.
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?")


class ModelList:
    """The models that the page offers.

    Attributes:
        names: Names of the models in the list.
        takes_hub_ids: Whether users can type in further models of the Hub.
    """

    def __init__(self, config: ModelsConfig) -> None:
        """Finds the models.

        Args:
            config: Settings of the list.

        Raises:
            CommandError: If a model is unknown, or the list is empty.
        """
        self.takes_hub_ids = config.hub
        examples = EXAMPLES if config.examples else ()
        self.names = list(dict.fromkeys([*config.names, *_find_runs(config.runs), *examples]))
        if not self.names and not self.takes_hub_ids:
            raise CommandError("no model to offer; pass a MODEL, or remove --no-examples")
        for name in self.names:
            _check_exists(name)

    def choices(self, of_detectors: bool | None = None) -> list[tuple[str, str]]:
        """Returns the label and the name of each model.

        Args:
            of_detectors: True for detectors, False for classifiers, None for both. A model of the Hub may be either
                and is always included.
        """
        wanted = [
            name for name in self.names if of_detectors is None or parse_hub(name) or is_detector(name) == of_detectors
        ]
        return [(_label(name), name) for name in wanted]

    def check(self, name: Any) -> str:
        """Returns the name of a model in the list or on the Hub.

        Args:
            name: Name that the user chose or typed in.

        Raises:
            CommandError: If the page does not offer the model.
        """
        name = name.strip() if isinstance(name, str) else ""
        if name in self.names:
            return name
        source = parse_hub(name) if self.takes_hub_ids else None
        if source is None:
            hub = ", or type hf-hub:ORG/NAME" if self.takes_hub_ids else ""
            raise CommandError(f"there is no model {name[:80]!r} here; choose a model from the list{hub}")
        return str(source)


def _label(name: str) -> str:
    """Returns the label of a model in the list. It says where the weights are from."""
    if _is_source(name):
        return name
    note = f"trained on {PACKAGED[name].dataset}" if name in PACKAGED else "random weights"
    return f"{name.removesuffix('.yaml')} ({note})"


def _find_runs(root: str) -> list[str]:
    """Returns the run directories of classifiers and detectors in a folder."""
    if not root:
        return []
    folder = Path(root).expanduser()
    files = [*folder.glob("*/best/config.json"), *folder.glob("**/weights/best.pt")]
    return sorted(str(file.parents[1]) for file in files)


def _check_exists(name: str) -> None:
    """Checks that a name is a run, a file or a model.

    Raises:
        CommandError: If it is not, or if a file is missing in it.
    """
    if not name or not (_is_source(name) or is_detector(name) or timm.is_model(name)):
        raise CommandError(f"{name!r}: no such run, file or model; for a model on the Hub, pass hf-hub:ORG/NAME")
    if _is_source(name) and not is_detector(name):
        find_source(name)


def _is_source(name: str) -> bool:
    """Returns whether a name stands for weights, not only for a model."""
    is_path = not name.endswith((".yaml", ".yml")) and Path(name).expanduser().exists()
    return is_path or Source.parse_hub(name) is not None


def parse_hub(name: str) -> Source | None:
    """Returns the source of a model on the Hub.

    The result is None if the name is another kind of name or contains unusual characters.
    """
    source = Source.parse_hub(name)
    return source if source is not None and HUB_ID.fullmatch(source.full_name) else None


class OpenedModels:
    """The models in memory.

    Threads that ask for the same model share it. The model that was used least recently is removed first.
    """

    def __init__(self, size: int = 3) -> None:
        """Creates the store without a model.

        Args:
            size: Largest number of models in memory.
        """
        self.size = size
        self._models: OrderedDict[tuple[str, Source | None], LoadedModel] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, name: str, downloaded: Source | None = None, is_limited: bool = False) -> LoadedModel:
        """Opens a model, or returns the open model of this name.

        Args:
            name: Name of the model on the page.
            downloaded: Folder or file of a downloaded model; None for a model of this machine.
            is_limited: Whether to refuse a model that is slow to build or run.

        Raises:
            CommandError: If the model cannot be opened or is refused.
        """
        with self._lock:
            loaded = self._models.pop((name, downloaded), None)
            if loaded is None:
                while len(self._models) >= self.size:  # frees memory for the next model
                    self._models.popitem(last=False)
                loaded = _open(name, downloaded, is_limited)
            self._models[name, downloaded] = loaded
            return loaded


def _open(name: str, downloaded: Source | None, is_limited: bool) -> LoadedModel:
    if downloaded is not None:
        if is_limited:
            check_config(name, downloaded)
        loaded = load_downloaded(name, downloaded)
    elif _is_source(name):
        loaded = load_model(ModelSource(checkpoint=name))
    else:
        loaded = load_model(ModelSource(model=name, pretrained=name in PACKAGED))
    if is_limited:
        check_modules(name, loaded.model)
    return loaded

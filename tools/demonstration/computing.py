"""Runs models in other processes: a slow or large one cannot stop the page."""

import importlib
from collections.abc import Callable
from typing import Any

from stvit.weights import Source

from ..common.cli import CommandError
from .config import MAX_DOWNLOAD, MAX_DOWNLOADS, LimitsConfig
from .hub_models import Downloads
from .models import ModelList, OpenedModels, parse_hub
from .worker import Worker

__all__ = ["Computer"]

# Longest wait of a request for a download.
DOWNLOAD_S = 120.0
# Models of a computing process.
_opened = OpenedModels()


class Computer:
    """Runs tasks on models in two processes.

    One process is for the models of the list, the other one for models that users type in.
    """

    def __init__(self, models: ModelList, limits: LimitsConfig) -> None:
        """Prepares the processes, which start later.

        Args:
            models: Models of the page.
            limits: Time of a request, and memory for models that users type in.
        """
        self._models = models
        self._downloads = Downloads(DOWNLOAD_S, MAX_DOWNLOAD, MAX_DOWNLOADS)
        self._offered = Worker(limits.max_seconds, setup=_prepare)
        self._typed = Worker(limits.max_seconds, setup=_prepare, max_bytes=limits.max_gigabytes * 2**30)

    def start(self) -> None:
        """Starts the process for the models of the list in the background."""
        if self._models.names:
            self._offered.start()

    def close(self) -> None:
        """Ends the processes and all waiting requests."""
        self._downloads.close()
        self._offered.close()
        self._typed.close()

    def run(self, task: Callable[..., Any], name: Any, *inputs: Any) -> tuple[Any, bool]:
        """Runs a function on a model.

        Args:
            task: Function at the top level of a module. It takes the model and the inputs.
            name: Name of the model.
            inputs: Further arguments.

        Returns:
            The result, and whether the model has random weights.

        Raises:
            CommandError: If the page does not offer the model, the model cannot be opened, the computation takes too
                long, or the task raises it.
        """
        name = self._models.check(name)
        is_limited = name not in self._models.names
        source = parse_hub(name)
        downloaded = None if source is None else self._downloads.get(source, is_limited)
        worker = self._typed if is_limited else self._offered
        result: tuple[Any, bool] = worker.call(_work, task, name, downloaded, is_limited, *inputs)
        return result


def _prepare() -> None:
    """Registers the models in timm.

    To find this function, a new process imports this module and the libraries that it needs.
    """
    importlib.import_module("stvit.stvit")
    importlib.import_module(f"{__package__}.tasks")


def _work(
    task: Callable[..., Any], name: str, downloaded: Source | None, is_limited: bool, *inputs: Any
) -> tuple[Any, bool]:
    """Runs a task in a computing process."""
    try:
        loaded = _opened.get(name, downloaded, is_limited)
        return task(loaded, *inputs), loaded.is_random
    except CommandError as error:
        if downloaded is None:
            raise
        # Users of the page must not see paths of this machine.
        message = str(error).replace(str(downloaded), name).replace(downloaded.name, name)
        raise CommandError(message) from error

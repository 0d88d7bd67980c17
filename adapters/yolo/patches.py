"""All changes that this package makes to Ultralytics while a program runs.

Ultralytics has no public way to do the same. Each function below states the reason, the version of Ultralytics it was
written for, and the test that fails when the change is no longer needed. The files of Ultralytics are never changed.

Some classes in `modules.py` also depend on how Ultralytics works, without changing it:

- `TimmBackbone` subclasses `RepVGGDW`, because `BaseModel.fuse` calls the method `fuse` of a few classes only.
  Version: 8.4.190
  Test: test_yolo_patches.py::test_ultralytics_fuses_only_its_own_modules
- `BackboneBatchNorm2d` is a subclass, because Ultralytics changes eps and momentum of every plain `nn.BatchNorm2d`.
  Version: 8.4.190
  Test: test_yolo_modules.py::test_batch_normalization_keeps_eps_and_momentum
- `FeatureMaps` is a list that can be pooled, because `YOLO.embed` pools the output of each row as one tensor.
  Version: 8.4.190
  Test: test_yolo_patches.py::test_ultralytics_pools_only_tensors
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ultralytics
from torch import nn
from ultralytics.nn import tasks
from ultralytics.utils import callbacks

__all__ = ["add_callbacks", "add_modules", "replace_arguments", "replace_classes"]


def add_modules(kinds: Sequence[type[nn.Module]]) -> None:
    """Adds module classes that rows of model files can name.

    Reason: `parse_model` looks up the names in the globals of `ultralytics.nn.tasks`.
    Version: 8.4.190
    Test: test_yolo_patches.py::test_ultralytics_finds_only_its_own_modules
    """
    for kind in kinds:
        setattr(tasks, kind.__name__, kind)


def add_callbacks(functions: Mapping[str, Callable[[Any], None]]) -> None:
    """Adds default callbacks to all trainers of Ultralytics.

    A second call with the same functions has no effect.

    Reason: Ultralytics' own trainers ignore learning rates for a backbone in a model file, and a user should learn
        about that. Pickling a trainer also pickles references to its callbacks, so each process of a distributed run
        imports this package.
    Version: 8.4.190
    Test: test_yolo_patches.py::test_ultralytics_ignores_the_rates_of_a_backbone

    Args:
        functions: Functions that take the trainer, by the event that calls them.
    """
    for event, function in functions.items():
        if function not in callbacks.default_callbacks[event]:
            callbacks.default_callbacks[event].append(function)


@contextmanager
def replace_classes(classes: Mapping[str, type]) -> Iterator[None]:
    """Context manager: replaces classes such as `ultralytics.YOLO`.

    Reason: the command of Ultralytics imports the model class from its package and takes no other.
    Version: 8.4.190
    Test: test_yolo_patches.py::test_the_command_of_ultralytics_takes_no_class

    Args:
        classes: New classes by the names of the classes they replace.
    """
    originals = {name: getattr(ultralytics, name) for name in classes}
    for name, kind in classes.items():
        setattr(ultralytics, name, kind)
    try:
        yield
    finally:
        for name, kind in originals.items():
            setattr(ultralytics, name, kind)


@contextmanager
def replace_arguments(arguments: Sequence[str]) -> Iterator[None]:
    """Context manager: replaces the arguments that the command of Ultralytics reads.

    Reason: Ultralytics keeps the list `sys.argv` when it is imported. Its command reads that list, and takes arguments
        only as one text that it splits at spaces.
    Version: 8.4.190
    Test: test_yolo_patches.py::test_the_command_of_ultralytics_takes_no_list_of_arguments

    Args:
        arguments: Arguments without the name of the command.
    """
    before = list(sys.argv)
    sys.argv[:] = ["yolo", *arguments]
    try:
        yield
    finally:
        sys.argv[:] = before

"""Packages that only the detection commands need."""

from importlib.util import find_spec

from ..common.cli import CommandError


def require_detection() -> None:
    """Checks that torchvision and faster-coco-eval are installed.

    Raises:
        CommandError: If one is missing.
    """
    missing = [name for name in ("torchvision", "faster_coco_eval") if find_spec(name) is None]
    if missing:
        names = " and ".join(name.replace("_", "-") for name in missing)
        raise CommandError(f"detection needs {names}: pip install 'stvit[detection]' installs all it needs")

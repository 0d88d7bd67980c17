"""All changes that the commands make to webdataset while a program runs."""

import string
from collections.abc import Callable
from typing import Any

__all__ = ["replace_openers"]

_original: dict[str, Any] = {}


def replace_openers(open_local: Callable[..., Any], refuse: Callable[..., Any] | None) -> None:
    """Replaces the functions with which webdataset opens addresses, in this process.

    A second call replaces the functions of the first. Nothing happens if webdataset is not installed.

    Reason: webdataset runs a program for every scheme except file:, and treats the letter of a drive as a scheme.
    Version: 1.0.2
    Test: test_webdataset_patches.py::test_webdataset_runs_programs

    Args:
        open_local: Opens paths on drives.
        refuse: Function for all schemes that run a program; None for those of webdataset.
    """
    try:
        import webdataset
    except ImportError:  # timm reports it when it opens the dataset
        return
    schemes = webdataset.gopen_schemes
    if not _original:
        _original.update(schemes)
    schemes.update(_original if refuse is None else dict.fromkeys(_original, refuse))
    schemes.update(dict.fromkeys(string.ascii_lowercase, open_local))

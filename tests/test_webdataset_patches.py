"""Shows that webdataset still needs the changes in stvit.tools.common.webdataset_patches."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from stvit.tools.common import webdataset_patches

webdataset = pytest.importorskip("webdataset")


@pytest.fixture(autouse=True)
def originals() -> Iterator[None]:
    """Restores the functions of webdataset before and after each test."""
    before = dict(webdataset.gopen_schemes)
    webdataset.gopen_schemes.update(webdataset_patches._original)
    yield
    webdataset.gopen_schemes.clear()
    webdataset.gopen_schemes.update(before)


def test_webdataset_runs_programs(tmp_path: Path) -> None:
    """If this test fails, remove the change."""
    with webdataset.gopen(f"pipe:echo program > {tmp_path / 'ran'}") as stream:
        stream.read()
    assert (tmp_path / "ran").read_text() == "program\n"


def test_refused_and_allowed_schemes() -> None:
    original = dict(webdataset.gopen_schemes)

    def refuse(url: str, *_: object, **__: object) -> None:
        raise PermissionError(url)

    webdataset_patches.replace_openers(open, refuse)
    with pytest.raises(PermissionError, match="pipe:ls"):
        webdataset.gopen("pipe:ls")
    assert webdataset.gopen_schemes["c"] is open
    webdataset_patches.replace_openers(open, None)
    assert webdataset.gopen_schemes["pipe"] is original["pipe"]

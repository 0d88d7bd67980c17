"""Shows that timm still needs each change in stvit.tools.common.timm_patches. If a test fails, remove the change."""

import importlib.util
import inspect
from types import ModuleType

import PIL.Image
import pytest
from timm.data.readers import reader_wds


@pytest.fixture
def unpatched() -> ModuleType:
    """Second copy of timm's module, which no other test has changed."""
    spec = importlib.util.spec_from_file_location(f"{reader_wds.__package__}.reader_wds_copy", reader_wds.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_shard_reader_of_timm_skips_errors(unpatched: ModuleType) -> None:
    pytest.importorskip("webdataset")
    assert unpatched.Image is PIL.Image
    with pytest.raises(PIL.UnidentifiedImageError):
        unpatched._decode({"cls": b"0", "jpg": b"not an image"})
    assert unpatched.log_and_continue(PIL.UnidentifiedImageError()) is True
    arguments = inspect.signature(unpatched.ReaderWds).parameters
    assert not {name for name in arguments if "decode" in name or "handler" in name or "open" in name}

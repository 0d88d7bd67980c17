"""Shows that timm still needs each change in stvit.tools.common.timm_patches.

If a test fails, remove the change.
"""

import importlib.util
import inspect
import io
from types import ModuleType

import PIL.Image
import pytest
from timm.data import auto_augment
from timm.data.readers import reader_wds

from stvit.tools.common.timm_patches import patch_posterize


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
    # A truncated image: Ultralytics changes what PIL does with a file that is no image, in tests that import it.
    file = io.BytesIO()
    PIL.Image.effect_noise((64, 64), 64).save(file, "png")
    with pytest.raises(OSError, match="truncated"):
        unpatched._decode({"cls": b"0", "jpg": file.getvalue()[:1000]})
    assert unpatched.log_and_continue(PIL.UnidentifiedImageError()) is True
    arguments = inspect.signature(unpatched.ReaderWds).parameters
    assert not {name for name in arguments if "decode" in name or "handler" in name or "open" in name}


def test_posterize_of_timm_asks_for_no_bits() -> None:
    bits = auto_augment.LEVEL_TO_ARG["PosterizeIncreasing"](10, {})
    assert bits == (0,)
    image = PIL.Image.new("RGB", (2, 2), (255, 128, 0))
    patch_posterize()
    kept = auto_augment.NAME_TO_OP["PosterizeIncreasing"](image, *bits)
    assert kept.getpixel((0, 0)) == (128, 128, 0)  # 1 bit per color

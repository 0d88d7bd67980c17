"""All changes that the commands make to timm while a program runs.

timm has no public way to do the same. Each function states the reason, the version of timm it was written for, and the
test that fails when the change is no longer needed. The files of timm are never changed.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from PIL import Image
from timm.data import auto_augment

__all__ = ["patch_posterize", "patch_shard_reader"]


def patch_shard_reader(
    open_image: Callable[[Any], Image.Image],
    skip_sample: Callable[[dict[str, Any], Exception], None],
    stop: Callable[[Exception], bool],
) -> None:
    """Replaces three functions that timm's reader of shards uses, in this process.

    A second call replaces the functions of the first.

    Reason: the reader opens images with `PIL.Image.open`, and skips unreadable images and shards with only a warning.
    Version: 1.0.31
    Test: test_timm_patches.py::test_the_shard_reader_of_timm_skips_errors

    Args:
        open_image: Opens an image from a file object. Its RGB images become the same gray images as files do.
        skip_sample: Takes a sample that cannot be read and the exception.
        stop: Takes the exception of a shard that cannot be read, and raises another one.
    """
    from timm.data.readers import reader_wds

    plain = getattr(reader_wds._decode, "plain", reader_wds._decode)

    def decode(sample: dict[str, Any], **kwargs: Any) -> dict[str, Any] | None:
        # macOS adds a file "._1.jpg" for each "1.jpg". The key ends before the first dot, so it is only the folder.
        if str(sample.get("__key__")).endswith("/"):
            return None
        try:
            return plain(sample, **kwargs)
        except Exception as error:
            skip_sample(sample, error)
            return None

    decode.plain = plain  # type: ignore[attr-defined]
    reader_wds._decode = decode  # type: ignore[assignment]
    reader_wds.Image = SimpleNamespace(open=open_image)  # type: ignore[assignment]
    reader_wds.log_and_continue = stop


def patch_posterize() -> None:
    """Makes the augmentation Posterize keep at least 1 bit per color.

    Reason: at full strength timm asks Pillow for 0 bits, which Pillow 13 rejects.
    Version: 1.0.31
    Test: test_timm_patches.py::test_posterize_of_timm_asks_for_no_bits
    """
    for policy in ("Posterize", "PosterizeIncreasing", "PosterizeOriginal"):
        auto_augment.NAME_TO_OP[policy] = _posterize


def _posterize(image: Image.Image, bits: int, **kwargs: Any) -> Image.Image:
    return auto_augment.posterize(image, max(1, bits), **kwargs)

"""Opens image files. All commands use it, so that they see the same pixels.

Every image becomes RGB or gray (L) with 8 bits per channel. The rules:

    formats        only those of `READERS`, recognized by the content of the file
    orientation    EXIF orientation is applied to files, but not to PIL images
    16-bit gray    0 to 65535 becomes 0 to 255: the upper 8 bits are kept, as Pillow does for 16-bit color. In a 12-bit
                   TIFF file, 0 to 4095 becomes 0 to 255. Values are not stretched to the range of one image: 12-bit
                   values in a 16-bit file stay dark.
    32-bit gray    read as 16-bit gray if all values are from 0 to 65535, otherwise refused
    float          refused, because the values of black and white are unknown
    transparency   the image is drawn over white, as browsers and viewers show it
    palette        replaced by its colors
    animation      only the first frame is read, or the first page of a TIFF file
    other modes    1-bit, CMYK, YCbCr, LAB and HSV become RGB as Pillow converts them; color profiles are ignored
    gray model     mode L is computed from RGB
"""

import os
import re
import stat
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import ImageFileDirectory_v2, TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

__all__ = ["READERS", "SUFFIXES", "UnreadableImageError", "convert_image", "decode_image", "image_size", "open_image"]

# Pillow's reader of each format. PIL.Image.open would try all of Pillow's readers. Some are rarely tested, and the one
# for PostScript starts Ghostscript. Ultralytics also replaces PIL.Image.open with a function that installs packages.
READERS: dict[str, type[ImageFile]] = {
    "BMP": BmpImageFile,
    "GIF": GifImageFile,
    "JPEG": JpegImageFile,
    "PNG": PngImageFile,
    "TIFF": TiffImageFile,
    "WebP": WebPImageFile,
}
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_STARTS = {
    b"BM": "BMP",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",  # BigTIFF
    b"MM\0+": "TIFF",
}
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
BACKGROUND = "white"
# A JPEG file can contain any number of scans, each of a few bytes but over the whole image. Encoders write about ten.
MAX_SCANS = 100
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_JPEG_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}
FLOAT_PROBLEM = "floating point pixels, whose values of black and white are unknown; convert the image to 8 or 16 bits"


class UnreadableImageError(ValueError):
    """Raised when a file is not a readable image or an image cannot be converted.

    Attributes:
        problem: Message without the name of the file.
    """

    def __init__(self, problem: str, name: str = "image") -> None:
        super().__init__(f"{name}: {problem}")
        self.problem = problem


def open_image(source: str | Path | BinaryIO, mode: str = "RGB", max_pixels: int | None = None) -> Image.Image:
    """Opens an image file as RGB or gray, following the rules of this module.

    Args:
        source: Path, or file opened in binary mode.
        mode: 'RGB' or 'L'.
        max_pixels: Largest number of pixels (default: twice `PIL.Image.MAX_IMAGE_PIXELS`, Pillow's own limit).

    Raises:
        OSError: If the file cannot be opened or read.
        UnreadableImageError: If the format is not in `READERS`, or the file is damaged, too large or has floating
            point pixels.
    """
    image = decode_image(source, max_pixels)
    try:
        converted = convert_image(image, mode)
    except UnreadableImageError as error:
        raise UnreadableImageError(error.problem, _name(source)) from error
    method = _TRANSPOSITIONS.get(_orientation(image))
    return converted if method is None else converted.transpose(method)


def image_size(path: str | Path) -> tuple[int, int]:
    """Returns width and height of the image that `open_image` returns.

    The pixels are not decoded.

    Args:
        path: Image file.

    Raises:
        OSError: If the file cannot be opened or read.
        UnreadableImageError: If the format is not in `READERS`, or the header is damaged.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait forever
        raise UnreadableImageError("not a regular file", _name(path))
    with open(path, "rb") as file:
        kind = _find_kind(file, _name(path))
        try:
            image = READERS[kind](file)
            width, height = image.size
            return (height, width) if _orientation(image) >= 5 else (width, height)
        except Exception as error:  # a damaged file makes Pillow raise nearly everything
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise UnreadableImageError(f"damaged header ({error})", _name(path)) from error


def convert_image(image: Image.Image, mode: str = "RGB") -> Image.Image:
    """Converts an image to RGB or gray, following the rules of this module.

    The image is not rotated.

    Args:
        image: Image of any mode.
        mode: 'RGB' or 'L'.

    Raises:
        ValueError: If `mode` is neither.
        UnreadableImageError: If the image is empty or has floating point pixels.
    """
    if mode not in ("RGB", "L"):
        raise ValueError(f"mode must be 'RGB' or 'L', got {mode!r}")
    if 0 in image.size:
        raise UnreadableImageError(f"empty, {image.width}x{image.height} pixels")
    if image.mode == "F":
        raise UnreadableImageError(FLOAT_PROBLEM)
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _to_eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image)
    if image.mode != mode:
        image = image.convert("RGB")
    return image.convert(mode)


def decode_image(source: str | Path | BinaryIO, max_pixels: int | None = None) -> ImageFile:
    """Decodes an image file without changing its mode or orientation.

    Args:
        source: Path, or file opened in binary mode.
        max_pixels: Largest number of pixels (default: twice `PIL.Image.MAX_IMAGE_PIXELS`, Pillow's own limit).

    Raises:
        OSError: If the file cannot be opened or read.
        UnreadableImageError: If the format is not in `READERS`, or the file is damaged or too large.
    """
    if not isinstance(source, str | Path):
        return _decode(source, _name(source), max_pixels)
    if not stat.S_ISREG(os.stat(source).st_mode):  # opening a pipe would wait forever
        raise UnreadableImageError("not a regular file", _name(source))
    with open(source, "rb") as file:
        return _decode(file, _name(source), max_pixels)


def _find_kind(file: BinaryIO, name: str) -> str:
    """Returns the format of a file by its first bytes, a key of `READERS`.

    Raises:
        UnreadableImageError: If the format is not supported.
    """
    start = file.read(12)
    file.seek(0)
    if start[:4] == b"RIFF" and start[8:] == b"WEBP":
        return "WebP"
    kind = next((kind for begin, kind in _STARTS.items() if start.startswith(begin)), None)
    if kind is None:
        *kinds, last = READERS
        raise UnreadableImageError(f"not an image of a supported format ({', '.join(kinds)} or {last})", name)
    return kind


def _decode(file: BinaryIO, name: str, max_pixels: int | None) -> ImageFile:
    kind = _find_kind(file, name)
    if max_pixels is None and Image.MAX_IMAGE_PIXELS is not None:
        max_pixels = 2 * Image.MAX_IMAGE_PIXELS
    try:
        image = READERS[kind](file)
        if max_pixels is not None and image.width * image.height > max_pixels:
            raise UnreadableImageError(
                f"{image.width}x{image.height} pixels, more than the limit of {max_pixels / 1e6:.0f} million; reduce "
                "the image",
                name,
            )
        if kind == "JPEG":
            _check_scans(file, name)
        _scale_transparency(image)
        image.load()
    except UnreadableImageError:
        raise
    except Exception as error:  # a damaged file makes Pillow raise nearly everything
        if isinstance(error, OSError) and error.errno is not None:
            raise
        if kind == "TIFF" and _has_float_samples(file):  # Pillow reads only 32-bit floats
            raise UnreadableImageError(FLOAT_PROBLEM, name) from error
        why = " ".join(str(error).split()) or type(error).__name__
        problem = f"damaged, truncated, or a kind of {kind} that Pillow does not support ({why})"
        raise UnreadableImageError(problem, name) from error
    return image


def _check_scans(file: BinaryIO, name: str) -> None:
    """Refuses a JPEG file with too many scans.

    A small file with many scans takes minutes to decode.

    Raises:
        UnreadableImageError: If the file has more than `MAX_SCANS` scans.
    """
    position = file.tell()
    file.seek(0)
    scans = _count_scans(file.read())
    file.seek(position)
    if scans > MAX_SCANS:
        raise UnreadableImageError(
            f"{scans} scans, more than the limit of {MAX_SCANS}; save the image as a plain JPEG", name
        )


def _count_scans(content: bytes) -> int:
    """Returns the number of scans of a JPEG file.

    The number is 1 if the first scan contains the whole image.
    """
    position, scans, components, is_progressive = 2, 0, b"", False
    while (match := _JPEG_MARKER.search(content, position)) is not None:
        marker, position = match[0][1], match.end()
        if marker == 0xD9:  # end of the image
            break
        if marker == 0xDA:
            scans += 1
            if not is_progressive and content[position + 2 : position + 3] == components:
                break
        elif marker in _JPEG_FRAMES:
            components, is_progressive = content[position + 7 : position + 8], marker in _PROGRESSIVE
        position += int.from_bytes(content[position : position + 2], "big")
    return scans


def _has_float_samples(file: BinaryIO) -> bool:
    """Returns whether the first page of a TIFF file has floating point samples."""
    try:
        file.seek(0)
        header = file.read(8)
        directory = ImageFileDirectory_v2(header + file.read(8) if b"+" in header[:4] else header)
        file.seek(directory.next)
        directory.load(file)
        return 3 in directory.get(ExifTags.Base.SampleFormat, ())
    except Exception:  # a damaged file makes Pillow raise nearly everything
        return False


def _scale_transparency(image: ImageFile) -> None:
    """Scales the transparent color of a PNG file as Pillow scales its pixels.

    Args:
        image: Image that is opened but not loaded.
    """
    transparent = image.info.get("transparency")
    if not isinstance(image, PngImageFile) or transparent is None or not image.tile:
        return
    raw_mode = image.tile[0][3]
    if raw_mode in ("L;2", "L;4"):
        image.info["transparency"] = transparent * (85 if raw_mode == "L;2" else 17)
    elif raw_mode == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in transparent)


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Converts 16-bit gray to L, or to LA if the file names a transparent gray value."""
    values = np.asarray(image)
    bits, is_inverted = 16, False
    if image.mode == "I":
        if isinstance(image, TiffImageFile) and image.tag_v2.get(ExifTags.Base.SampleFormat, (1,))[0] == 1:
            values = values.view(np.uint32)  # Pillow reads unsigned samples as signed ones
        if values.min() < 0 or values.max() > 65535:
            raise UnreadableImageError(
                f"32-bit pixels: expected values from 0 to 65535, got {values.min()} to {values.max()}; convert the "
                "image to 8 or 16 bits"
            )
    elif isinstance(image, TiffImageFile):
        bits = image.tag_v2.get(ExifTags.Base.BitsPerSample, (16,))[0]
        is_inverted = image.tag_v2.get(ExifTags.Base.PhotometricInterpretation) == 0  # Pillow inverts 8 bits only
    gray = Image.fromarray((values >> (bits - 8)).astype(np.uint8))
    if is_inverted:
        gray = ImageOps.invert(gray)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        gray.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return gray


def _orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation, or 1 (upright) if it is missing or unreadable."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF data makes Pillow raise nearly everything; the pixels are readable
        return 1


def _name(source: str | Path | BinaryIO) -> str:
    path = source if isinstance(source, str | Path) else getattr(source, "name", None)
    return Path(path).name if isinstance(path, str | Path) else "image"

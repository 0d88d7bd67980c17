"""Tests the pixels that stvit.images reads from each kind of file, and that all commands use it."""

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from ultralytics.utils import ASSETS

from stvit import STViT
from stvit.images import READERS, SUFFIXES, UnreadableImageError, convert_image, open_image
from stvit.tools import export, train_cls, validate_cls, visualize
from stvit.tools.common.cli import CommandError
from stvit.tools.demonstration.computing import Computer
from stvit.tools.demonstration.config import LimitsConfig, ModelsConfig
from stvit.tools.demonstration.models import ModelList, OpenedModels
from stvit.tools.demonstration.tasks import classify

SIDE = 32
Y, X = np.mgrid[:SIDE, :SIDE]
GRAY = (5 * X + 2 * Y).astype(np.uint8)
COLOR = np.stack([GRAY, 255 - GRAY, 8 * Y], axis=2).astype(np.uint8)
# EXIF orientations and functions that turn the stored pixels upright, from the table of the EXIF standard.
UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[:, ::-1],
    7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
    8: lambda a: a.swapaxes(0, 1)[::-1],
}


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def rgb(gray: np.ndarray) -> np.ndarray:
    return np.repeat(gray[..., None], 3, axis=2)


def decoded(path: Path) -> np.ndarray:
    """Returns the pixels of a lossy file as Pillow decodes them."""
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


def write_images(folder: Path) -> dict[str, np.ndarray]:
    """Writes a 32x32 image of each kind and returns the pixels (32, 32, 3) that commands must see, by name."""
    folder.mkdir(parents=True, exist_ok=True)
    color, opaque = Image.fromarray(COLOR), X >= SIDE // 2
    rgba = Image.fromarray(np.dstack([COLOR, np.where(opaque, 255, 0).astype(np.uint8)]))
    over_white = np.where(opaque[..., None], COLOR, 255).astype(np.uint8)
    expected: dict[str, np.ndarray] = {}

    def save(name: str, image: Image.Image, pixels: np.ndarray | None, **options: Any) -> None:
        image.save(folder / name, **options)
        expected[name] = decoded(folder / name) if pixels is None else pixels

    save("turned.jpg", color, None, exif=exif(6), quality=95)
    expected["turned.jpg"] = UPRIGHT[6](expected["turned.jpg"])
    save("turned.png", color, UPRIGHT[8](COLOR), exif=exif(8))
    save("turned.tif", color, UPRIGHT[5](COLOR), exif=exif(5), compression="tiff_deflate")
    deep = Image.fromarray(GRAY.astype(np.uint16) << 8 | 77)
    save("deep.png", deep, rgb(GRAY))
    save("deep.tif", deep, rgb(GRAY))
    save("deep_big_endian.tiff", Image.fromarray((GRAY.astype(">u2") << 8).astype(">u2")), rgb(GRAY))
    save("deep_turned.tif", deep, rgb(UPRIGHT[3](GRAY)), exif=exif(3))
    save("clear.png", rgba, over_white)
    save("clear.webp", rgba, over_white, lossless=True)
    save("clear_gray.png", rgba.convert("LA"), np.where(opaque[..., None], rgb(np.array(color.convert("L"))), 255))
    palette = color.quantize(16)
    colors = np.array(palette.convert("RGB"))
    save("palette.png", palette, colors)
    clear = np.where((np.array(palette) == 3)[..., None], 255, colors)
    save("palette_clear.png", palette, clear, transparency=3)
    save("palette_clear.gif", palette, clear, transparency=3)
    # Adobe's JPEG files store CMYK inverted.
    save("cmyk.jpg", color.convert("CMYK"), None, quality=95)
    assert np.abs(expected["cmyk.jpg"].astype(int) - COLOR).mean() < 3
    red = [Image.new("RGB", color.size, "red")]
    save("moving.webp", color, COLOR, save_all=True, append_images=red, lossless=True)
    save("moving.gif", palette, colors, save_all=True, append_images=red)
    save("two_tone.png", Image.fromarray(GRAY > 100), rgb(np.where(GRAY > 100, 255, 0)))
    save("plain.bmp", color, COLOR)
    return {name: pixels.astype(np.uint8) for name, pixels in expected.items()}


def gray(pixels: np.ndarray) -> np.ndarray:
    return np.array(Image.fromarray(pixels).convert("L"))


# ---------------------------------------------------------------------------------------------------------------------
# All commands


@contextmanager
def recorded(channels: int) -> Iterator[dict[str, set[bytes]]]:
    """Context manager: records the pixels of every image that an STViT sees, in training and evaluation."""
    seen: dict[str, set[bytes]] = {"training": set(), "evaluation": set()}
    cfg: Any = timm.create_model("test_stvit").pretrained_cfg
    mean, std = (np.array(cfg[name]) for name in ("mean", "std"))
    if channels == 1:
        mean, std = mean.mean(keepdims=True), std.mean(keepdims=True)

    def look(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        if isinstance(module, STViT) and inputs[0].any():  # a check of the image size runs on a blank image
            seen["training" if module.training else "evaluation"] |= pixels_of(inputs[0], mean, std)

    hook = torch.nn.modules.module.register_module_forward_pre_hook(look)
    try:
        yield seen
    finally:
        hook.remove()


def pixels_of(x: Any, mean: np.ndarray, std: np.ndarray) -> set[bytes]:
    """Returns the pixels of normalized images (B, C, H, W) as bytes."""
    values = np.asarray(x, dtype=np.float64).transpose(0, 2, 3, 1) * std + mean
    return {image.tobytes() for image in (values * 255).round().astype(np.uint8)}


@pytest.mark.long
@pytest.mark.parametrize("channels", [3, 1])
def test_all_commands_see_the_same_pixels(channels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training, validation, calibration, visualize and the demo read the same pixels from each kind of file."""
    pytest.importorskip("gradio")
    from stvit.tools.demonstration.page import Page

    for split in ("train", "val"):
        for name in ("a", "b"):  # the classes
            expected = write_images(tmp_path / split / name)
    wanted = {(pixels if channels == 3 else gray(pixels)).tobytes() for pixels in expected.values()}
    assert len(wanted) >= 10  # some files contain the same image

    data = [f"--data-dir={tmp_path}", "--workers=0"]
    with recorded(channels) as seen:
        line = ["--model=test_stvit", f"--img-size={SIDE}", "--crop-pct=1", f"--in-chans={channels}", "--no-aug"]
        line += ["--epochs=1", f"--batch-size={2 * len(expected)}", f"--output={tmp_path}", "--experiment=run"]
        line += ["--model-kwargs", "dims=(32,)", "depths=(1,)", "num_heads=(1,)", "stoken_size=(4,)"]
        assert train_cls.main([*data, *line]) == 0
    assert seen == {"training": wanted, "evaluation": wanted}

    run = f"--checkpoint={tmp_path / 'run'}"
    with recorded(channels) as seen:
        assert validate_cls.main([*data, run]) == 0
    assert seen["evaluation"] == wanted

    with recorded(channels) as seen:
        flags = ["--stage=0", f"--output={tmp_path / 'out'}"]
        assert visualize.main([str(tmp_path / "val/a"), run, *flags]) == 0
    assert seen["evaluation"] == wanted

    uploads = tmp_path / "uploads"
    write_images(uploads)
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(uploads))
    limits = LimitsConfig()
    models = ModelList(ModelsConfig(names=[str(tmp_path / "run")], runs="", examples=False))
    page = Page(models, Computer(models, limits), limits).blocks
    classifier = OpenedModels().get(str(tmp_path / "run"))
    receive = next(function.fn for function in page.fns.values() if function.name == "receive")
    with recorded(channels) as seen:
        for name in expected:
            session = SimpleNamespace(image=None, view=None)
            receive({"path": str(uploads / name)}, session)
            classify(classifier, session.image)
    assert seen["evaluation"] == wanted

    if channels == 3:
        import onnxruntime.quantization

        cfg: Any = timm.create_model("test_stvit").pretrained_cfg
        calibrated: set[bytes] = set()

        def quantize_static(proto: Any, path: str, reader: Any, **options: Any) -> None:
            while (batch := reader.get_next()) is not None:
                calibrated.update(pixels_of(batch["images"], np.array(cfg["mean"]), np.array(cfg["std"])))
            raise CommandError("all calibration images are read")  # the rest takes long

        monkeypatch.setattr(onnxruntime.quantization, "quantize_static", quantize_static)
        assert export.main([*data, run, "--dtype=int8", f"--output={tmp_path / 'int8.onnx'}"]) == 1
        assert calibrated == wanted


# ---------------------------------------------------------------------------------------------------------------------
# The rules


def test_pixels_of_each_kind(tmp_path: Path) -> None:
    for name, pixels in write_images(tmp_path).items():
        assert np.array_equal(np.array(open_image(tmp_path / name)), pixels), name
        assert np.array_equal(np.array(open_image(str(tmp_path / name), "L")), gray(pixels)), name
        with (tmp_path / name).open("rb") as file:
            assert np.array_equal(np.array(open_image(file)), pixels), name


def test_formats_are_recognized_by_content(tmp_path: Path) -> None:
    image = Image.open(ASSETS / "bus.jpg").convert("RGB").resize((60, 80))
    for kind in READERS:
        image.save(tmp_path / kind, format=kind.upper(), **({"quality": 95} if kind == "JPEG" else {}))
        assert np.abs(np.array(open_image(tmp_path / kind)).astype(int) - np.array(image)).mean() < 30
    assert all(Image.registered_extensions()[suffix] in {kind.upper() for kind in READERS} for suffix in SUFFIXES)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_every_orientation(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"image.{suffix}"
    pixels = COLOR[:24]
    for orientation, upright in UPRIGHT.items():
        options = {"webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}}.get(suffix, {})
        Image.fromarray(pixels).save(path, exif=exif(orientation), **options)
        got = np.array(open_image(path)).astype(int)
        assert got.shape == upright(pixels).shape
        assert np.abs(got - upright(pixels)).max() <= (4 if suffix == "jpg" else 0), orientation


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("damage", [b"Exif\0\0XX*\0\x08\0\0\0", b"Exif\0\0", b"Exif\0\0MM\0*\0\0\xff\xff"])
def test_images_with_damaged_exif_are_read(damage: bytes, tmp_path: Path) -> None:
    """ImageNet has such files."""
    Image.fromarray(COLOR).save(tmp_path / "a.jpg", exif=damage)
    assert np.array_equal(np.array(open_image(tmp_path / "a.jpg")), decoded(tmp_path / "a.jpg"))


def png(bits: int, kind: int, row: bytes, width: int, transparent: bytes) -> bytes:
    """Returns a PNG file of one row; kind 0 is gray and 2 is color."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, 1, bits, kind, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"tRNS", transparent), (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)


@pytest.mark.parametrize(
    ("bits", "kind", "row", "transparent", "expected"),
    [
        (16, 0, struct.pack(">2H", 0x1234, 0x4567), struct.pack(">H", 0x1234), [255, 0x45]),
        (16, 2, struct.pack(">6H", 256, 512, 768, *3 * [0x4567]), struct.pack(">3H", 256, 512, 768), [255, 0x45]),
        (8, 0, bytes([5, 0x45]), struct.pack(">H", 5), [255, 0x45]),
        (4, 0, bytes([0x5A]), struct.pack(">H", 5), [255, 0xAA]),
        (2, 0, bytes([0b01100000]), struct.pack(">H", 1), [255, 0xAA]),
        (1, 0, bytes([0b01000000]), struct.pack(">H", 0), [255, 255]),
    ],
)
def test_transparent_color_of_each_depth(
    bits: int, kind: int, row: bytes, transparent: bytes, expected: list[int]
) -> None:
    image = open_image(io.BytesIO(png(bits, kind, row, 2, transparent)), "L")
    assert np.array(image).tolist() == [expected]


def tiff(bits: int, photometric: int, content: bytes, width: int, sample_format: int = 1) -> bytes:
    """Returns an uncompressed TIFF file of one row of gray samples."""
    tags = [(256, width), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 0), (277, 1), (278, 1)]
    tags += [(279, len(content)), (339, sample_format)]
    offset = 8 + 2 + 12 * len(tags) + 4
    entries = [struct.pack("<HHIHH", tag, 3, 1, offset if tag == 273 else value, 0) for tag, value in tags]
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(entries) + struct.pack("<I", 0) + content


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        (tiff(16, 1, struct.pack("<2H", 0x1234, 0xFF00), 2), [0x12, 0xFF]),
        (tiff(16, 0, struct.pack("<2H", 0x1234, 0xFF00), 2), [255 - 0x12, 0]),  # 0 is white
        (tiff(12, 1, bytes([0x12, 0x3F, 0xFF]), 2), [0x12, 0xFF]),
        (tiff(16, 1, struct.pack("<2H", 0x0123, 0x0FFF), 2), [1, 15]),  # 12-bit values in a 16-bit file
        (tiff(32, 1, struct.pack("<2I", 0x1234, 0xFFFF), 2), [0x12, 0xFF]),
        (tiff(8, 0, bytes([1, 250]), 2), [254, 5]),
    ],
)
def test_deep_gray_is_scaled_by_the_range_of_the_file(file: bytes, expected: list[int]) -> None:
    assert np.array(open_image(io.BytesIO(file), "L")).tolist() == [expected]


@pytest.mark.parametrize(
    ("file", "words"),
    [
        (tiff(32, 1, struct.pack("<2f", 0, 1), 2, sample_format=3), "floating point pixels"),
        (
            tiff(16, 1, struct.pack("<2h", -5, 300), 2, sample_format=2),
            "32-bit pixels: expected values from 0 to 65535, got -5 to 300",
        ),
        (tiff(32, 1, struct.pack("<2I", 5, 65536), 2), "32-bit pixels: .*got 5 to 65536"),
        (tiff(32, 1, struct.pack("<2I", 5, 4294967295), 2), "32-bit pixels: .*got 5 to 4294967295"),
        (tiff(64, 1, bytes(16), 2, sample_format=3), "floating point pixels"),
        (tiff(16, 1, bytes(4), 2, sample_format=3), "floating point pixels"),
        (tiff(64, 1, bytes(16), 2), "a kind of TIFF that Pillow does not support"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image of a supported format"),
        (b"", "not an image of a supported format"),
    ],
)
def test_refused_files(file: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(file)
    with pytest.raises(UnreadableImageError, match=rf"^a\.tif: .*{words}") as caught:
        open_image(tmp_path / "a.tif")
    assert str(caught.value) == f"a.tif: {caught.value.problem}"


@pytest.mark.parametrize("image", [Image.new("RGB", (8, 8), "red"), Image.new("I;16", (8, 8), 0x1234)], ids=["8", "16"])
def test_big_tiff(image: Image.Image, tmp_path: Path) -> None:
    for big in (False, True):
        image.save(tmp_path / f"{big}.tif", big_tiff=big)
    assert open_image(tmp_path / "True.tif").tobytes() == open_image(tmp_path / "False.tif").tobytes()


def test_size_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default is Pillow's own limit, which Pillow's readers do not check."""
    Image.new("1", (200, 100)).save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png", max_pixels=20_000).size == (200, 100)
    with pytest.raises(UnreadableImageError, match="200x100 pixels, more than the limit"):
        open_image(tmp_path / "a.png", max_pixels=19_999)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9_999)
    with pytest.raises(UnreadableImageError, match="200x100 pixels, more than the limit"):
        open_image(tmp_path / "a.png")


@pytest.mark.parametrize("mode", "1 L P LA PA RGB RGBA RGBX RGBa CMYK YCbCr LAB HSV I;16 I;16B I".split())
def test_every_mode_becomes_rgb_and_gray(mode: str) -> None:
    for wanted in ("RGB", "L"):
        converted = convert_image(Image.new(mode, (3, 2)), wanted)
        assert (converted.mode, converted.size) == (wanted, (3, 2))
    with pytest.raises(ValueError, match="mode must be 'RGB' or 'L', got 'RGBA'"):
        convert_image(Image.new(mode, (3, 2)), "RGBA")


def test_jpeg_files_with_many_scans_are_refused(tmp_path: Path) -> None:
    """Scans of a few bytes let a small file decode for minutes.

    Common files have one or ten scans.
    """
    photo = Image.open(ASSETS / "bus.jpg").convert("RGB").resize((64, 64))
    for flags in ({}, {"progressive": True}):
        file = io.BytesIO()
        # Phones append videos after the end of the image. These bytes do not count as scans.
        photo.save(file, "JPEG", **flags)
        file.write(b"\xff\xda\0\x08" * 500)
        file.seek(0)
        assert open_image(file).size == (64, 64)
    whole = file.getvalue()
    whole = whole[: whole.rindex(b"\xff\xd9")]
    last = whole[whole.rindex(b"\xff\xda") :]
    (tmp_path / "scans.jpg").write_bytes(whole + last * 200 + b"\xff\xd9")
    with pytest.raises(
        UnreadableImageError, match=r"scans\.jpg: 2\d\d scans, more than the limit of 100; save the image"
    ):
        open_image(tmp_path / "scans.jpg")
    # Truncated files are damaged, wherever they end.
    for size in range(2, len(whole), 97):
        with pytest.raises(UnreadableImageError):
            open_image(io.BytesIO(whole[:size]))

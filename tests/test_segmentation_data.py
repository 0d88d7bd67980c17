"""Tests label maps, the checks of a dataset, augmentation, inference and metrics."""

import importlib.util
import json
import re
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex
from torchvision import tv_tensors

from stvit.images import UnreadableImageError, image_size
from stvit.tools.common.cli import CommandError, OneProcessError
from stvit.tools.common.distributed import Distributed
from stvit.tools.common.fingerprint import find_changes, fingerprint, keep_contents
from stvit.tools.segmentation.config import ImageConfig, ValidationDataConfig
from stvit.tools.segmentation.data import LabeledImages, check_data, check_labels, open_data
from stvit.tools.segmentation.draw import draw_overlay, palette
from stvit.tools.segmentation.inference import MULTI_SCALES, Predictor, Scaling, argmax_resized
from stvit.tools.segmentation.job import SegmentationTask, segmentation_loss
from stvit.tools.segmentation.labels import IGNORED, LabelReader, LabelRules, read_class_names, save_values
from stvit.tools.segmentation.metrics import SegmentationMetrics, compute_scores
from stvit.tools.segmentation.transforms import RandomCrop, RandomScale, ReadExample, train_transform
from tests.label_maps import write_labeled_photos

ROOT = Path(__file__).parents[1]
CPU = Distributed(torch.device("cpu"))
ADE = LabelRules(3, reduce_zero_label=True)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_labeled_photos(tmp_path / "data")


def open_source(data: Path, split: str = "training") -> LabeledImages:
    return LabeledImages(data / "images" / split, data / "annotations" / split)


# Values of label maps


def test_values_become_classes(tmp_path: Path) -> None:
    values = np.array([[0, 1, 2], [3, 255, 0]])
    save_values(values, tmp_path / "a.png")
    assert LabelReader(ADE).read(tmp_path / "a.png").tolist() == [[255, 0, 1], [2, 255, 255]]
    assert LabelReader(LabelRules(4)).read(tmp_path / "a.png").tolist() == [[0, 1, 2], [3, 255, 0]]
    other = LabelRules(256 - 2, ignore_index=3)
    with pytest.raises(ValueError, match="value 255 in 1 pixels, expected 0 to 253, or 3 for ignored pixels"):
        LabelReader(other).read(tmp_path / "a.png")


@pytest.mark.parametrize("mode", ["1", "L", "P", "I;16", "I"])
def test_one_channel_formats(mode: str, tmp_path: Path) -> None:
    values = np.array([[0, 1], [1, 0]])
    if mode == "P":  # colors do not matter
        image = Image.fromarray(values.astype(np.uint8))
        image.putpalette([200, 0, 0, 0, 200, 0])
        image = image.copy() if image.mode == "P" else image.convert("P")
    elif mode == "1":
        image = Image.fromarray(values.astype(bool))
    else:
        image = Image.fromarray(values.astype({"L": np.uint8, "I;16": np.uint16, "I": np.int32}[mode]))
    assert image.mode == mode
    image.save(tmp_path / "a.png")
    assert LabelReader(LabelRules(2)).read(tmp_path / "a.png").tolist() == values.tolist()


def test_large_values_are_written_with_16_bits(tmp_path: Path) -> None:
    save_values(np.array([[7, 300]]), tmp_path / "a.png")
    assert np.asarray(Image.open(tmp_path / "a.png")).tolist() == [[7, 300]]
    with pytest.raises(ValueError, match="value 300 in 1 pixels, expected 0 to 9, or 255 for ignored pixels"):
        LabelReader(LabelRules(10)).read(tmp_path / "a.png")


def test_class_names(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_text("wall\n\n  building, edifice \n", encoding="utf-8")
    assert read_class_names(path) == ["wall", "building, edifice"]
    path.write_text("Idx\tRatio\tTrain\tVal\tStuff\tName\n1\t0.1\t1\t1\t1\twall\n2\t0.1\t1\t1\t1\tbuilding, edifice\n")
    assert read_class_names(path) == ["wall", "building"]
    path.write_text("\n")
    with pytest.raises(CommandError, match="has no class names"):
        read_class_names(path)
    with pytest.raises(CommandError, match=r"--class-names .*missing does not exist"):
        read_class_names(tmp_path / "missing")


def test_image_size_needs_no_pixels(tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 300, 3), dtype=np.uint8))
    exif = image.getexif()
    exif[0x0112] = 6  # rotated by 90 degrees
    image.save(tmp_path / "a.jpg", exif=exif)
    content = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(content[: len(content) // 2])
    assert image_size(tmp_path / "a.jpg") == (200, 300)
    (tmp_path / "b.jpg").write_text("text")
    with pytest.raises(UnreadableImageError, match="not an image of a supported format"):
        image_size(tmp_path / "b.jpg")


# Checks of a dataset


def test_missing_files_are_named(data: Path) -> None:
    (data / "annotations/training/bus_0.png").rename(data / "annotations/training/other.png")
    with pytest.raises(CommandError, match=r"1 image has no label map in .*: bus_0.jpg; add a PNG"):
        open_source(data)
    (data / "images/training/bus_0.jpg").unlink()
    with pytest.raises(CommandError, match=r"1 label map has no image in .*: other.png; add the image"):
        open_source(data)
    (data / "annotations/training/other.png").rename(data / "annotations/training/bus_1.tif")
    with pytest.raises(CommandError, match=r"has both bus_1.png and bus_1.tif; remove one of them"):
        open_source(data)
    with pytest.raises(CommandError, match="is not a folder; it must contain one image per example"):
        open_source(data, "test")


def test_wrong_label_maps_are_named(data: Path) -> None:
    folder = data / "annotations/training"
    Image.new("L", (10, 20), 1).save(folder / "bus_0.png")
    values = np.asarray(Image.open(folder / "bus_1.png")).copy()
    values[5:7, 5:9] = 9
    Image.fromarray(values).save(folder / "bus_1.png")
    Image.new("RGB", (10, 20)).save(folder / "zidane_0.png")
    image = Image.open(folder / "zidane_1.png")
    image.save(folder / "zidane_1.jpg")
    (folder / "zidane_1.png").unlink()
    with pytest.raises(CommandError) as error:
        check_labels([open_source(data)], ADE, workers=2)
    said = str(error.value)
    assert said.startswith("4 label maps are wrong: ") and said.endswith("; and 1 more"), said
    height = 128 * 1080 // 810
    assert f"bus_0.png: 10x20 pixels, but its image has 128x{height}" in said
    assert "bus_1.png: value 9 in 8 pixels, expected 1 to 3, 0 or 255 for ignored pixels" in said
    assert "zidane_0.png: colors (mode RGB), expected one channel of class numbers" in said
    for name in ("bus_0", "bus_1", "zidane_0"):
        for kind in ("images", "annotations"):
            next((data / kind / "training").glob(f"{name}.*")).unlink()
    with pytest.raises(CommandError, match=r"zidane_1.jpg: a JPEG file, whose compression changes the values"):
        check_labels([open_source(data)], ADE, workers=2)


@pytest.mark.parametrize(
    ("rules", "value", "message"),
    [
        (ADE, 0, "all values are 0 or 255, which are ignored; check --reduce-zero-label and --ignore-index"),
        (LabelRules(4, ignore_index=9), 9, "all values are 9, which is ignored; check --ignore-index"),
    ],
)
def test_a_set_without_labeled_pixels(rules: LabelRules, value: int, message: str, data: Path) -> None:
    for path in (data / "annotations/validation").iterdir():
        Image.new("L", Image.open(path).size, value).save(path)
    with pytest.raises(CommandError, match=rf"no label map in .*validation has a labeled pixel: {message}$"):
        check_labels([open_source(data), open_source(data, "validation")], rules, workers=1)


def test_turned_photographs_are_explained(data: Path) -> None:
    path = data / "images/training/bus_0.jpg"
    image = Image.open(path)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(path, exif=exif)
    with pytest.raises(
        CommandError, match=r"make both the same \(if the image has an EXIF orientation, turn its pixels"
    ):
        check_labels([open_source(data)], ADE, workers=1)


def test_missing_classes_are_printed(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rules = LabelRules(5, reduce_zero_label=True)
    check_labels([open_source(data), open_source(data, "validation")], rules, 1, ["a", "b", "c", "d", "e"])
    assert capsys.readouterr().out == "2 classes are not in the training labels: d, e\n"


def test_changed_label_maps_change_the_fingerprint(data: Path) -> None:
    """Also label maps of the same file size, if they are read."""
    config = ValidationDataConfig(data_dir=str(data), reduce_zero_label=True)
    path = data / "annotations/training/bus_0.png"
    labels = np.asarray(Image.open(path))
    found = []
    for values, config.check_data in ((labels, True), (labels[:, ::-1], True), (labels[:, ::-1], False)):
        Image.fromarray(values).save(path, compress_level=0)
        images, rules = open_data(config, CPU, num_classes=3)
        check_data(config, images, rules, CPU)
        found.append(fingerprint(images))
    before, after, unread = found
    assert find_changes(before, after) == ["training annotations: other masks, areas or label maps"]
    assert find_changes(before, unread) == find_changes(unread, before) == []
    keep_contents(before, unread)
    assert unread == before


def test_classes_must_be_known(data: Path) -> None:
    config = ValidationDataConfig(data_dir=str(data), reduce_zero_label=True)
    with pytest.raises(CommandError, match="the number of classes is unknown; pass --class-names FILE, or --num-cl"):
        open_data(config, CPU)
    assert open_data(config, CPU, num_classes=3)[0].class_names is None
    config.class_names = str(data / "names.txt")
    with pytest.raises(CommandError, match="there are 4 classes, but 3 class names; pass"):
        open_data(config, CPU, is_training=False, num_classes=4)
    images, rules = open_data(config, CPU, is_training=False)
    assert images.train is None and images.class_names == ["background", "person", "bus"] and rules == ADE
    (data / "names.txt").rename(data / "objectInfo150.txt")
    config.class_names = None
    assert open_data(config, CPU)[0].class_names == images.class_names
    with pytest.raises(CommandError, match="no training images; pass --data-dir, or --train-images"):
        open_data(ValidationDataConfig(), CPU, num_classes=3)


def test_a_label_map_that_changed_after_the_check(data: Path) -> None:
    path, labels = open_source(data)[0]
    Image.new("L", (3, 3)).save(labels)
    with pytest.raises(OneProcessError, match=r"label map .*bus_0.png: 3x3 pixels, but its image has"):
        ReadExample(LabelReader(ADE))(Image.open(path), labels)


# Augmentation


def example(height: int, width: int) -> tuple[Any, Any]:
    """Returns an image whose values are 80 times its labels, of large areas."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    labels = ((rows * 2 // height) + (columns * 2 // width)).to(torch.uint8)
    return tv_tensors.Image((80 * labels)[None].expand(3, -1, -1).contiguous()), tv_tensors.Mask(labels)


@pytest.mark.parametrize("scale", [0.5, 1.3, 2.0])
def test_scaled_labels_keep_their_values(scale: float) -> None:
    image, labels = RandomScale(Scaling(60, 500), (scale, scale))(*example(120, 80))
    assert image.shape[-2:] == labels.shape == (round(90 * scale), round(60 * scale))
    assert set(labels.unique().tolist()) == {0, 1, 2}
    is_sharp = image[0] % 80 == 0
    assert is_sharp.float().mean() > 0.9 and torch.equal(image[0][is_sharp] // 80, labels[is_sharp])


def test_scaled_labels_are_not_shifted() -> None:
    """At no border does a label differ from the value of most pixels that it stands for."""
    labels = torch.zeros(60, 80, dtype=torch.uint8)
    for border in (9, 21, 39, 53, 67):
        labels[:, border:] = 1 - labels[:, border:]
    image, mask = RandomScale(Scaling(60, 500), (0.25, 0.25))(
        tv_tensors.Image(200 * labels[None]), tv_tensors.Mask(labels)
    )
    assert image.shape == (1, 15, 20) and torch.equal((image[0] > 100).to(torch.uint8), mask.as_subclass(torch.Tensor))


def test_small_images_are_padded() -> None:
    transform = train_transform(
        ImageConfig(short_side=20, crop_size=40, hflip=0.0, photometric_distortion=False, scale=[1.0, 1.0]),
        [0.5, 0.25, 0.0],
    )
    image, labels = transform(*example(30, 20))
    assert image.shape == (3, 40, 40) and labels.shape == (40, 40)
    assert (labels[30:] == IGNORED).all() and (labels[:, 20:] == IGNORED).all() and (labels[:30, :20] < 3).all()
    assert image[:, -1, -1].tolist() == [128, 64, 0]


def test_crops_have_several_classes() -> None:
    image, labels = example(40, 400)
    labels.fill_(0)
    labels[:, 300:] = 1
    images = torch.zeros(2)
    for limit in (1.0, 0.75):
        transform = RandomCrop(40, limit, [0, 0, 0])
        found = [transform(image, labels)[1].float().mean().item() for _ in range(300)]
        images[int(limit < 1)] = sum(0.25 < share < 0.75 for share in found) / 300
    # A crop with one class is repeated up to nine times.
    assert images[0] < 0.15 and images[1] > 3 * images[0]


def test_ignored_pixels_do_not_count_for_crops() -> None:
    crop = RandomCrop(4, 0.75, [0])
    assert crop._is_mixed(torch.tensor([[0, 1, 255, 255, 255, 255, 255, 255]], dtype=torch.uint8))
    assert not crop._is_mixed(torch.tensor([[0, 0, 255, 255]], dtype=torch.uint8))
    assert not crop._is_mixed(torch.tensor([[255, 255]], dtype=torch.uint8))


def test_flips_and_colors() -> None:
    image, labels = example(40, 40)
    image = tv_tensors.Image(torch.stack([image[0], image[0] // 2, image[0] // 3]))
    config = ImageConfig(short_side=40, crop_size=40, scale=[1.0, 1.0], cat_max_ratio=1.0)
    transform = train_transform(config, [0.5] * 3)
    flipped = changed = 0
    for _ in range(40):
        pixels, mask = transform(image, labels)
        is_flipped = torch.equal(mask, labels.flip(-1))
        assert is_flipped or torch.equal(mask, labels)
        flipped += is_flipped
        changed += not torch.equal(pixels.flip(-1) if is_flipped else pixels, image)
        assert (pixels[0].float().mean() >= pixels[1:].float().mean()).all()  # channels keep their order
    assert 8 <= flipped <= 32 and changed > 20
    plain = train_transform(ImageConfig(short_side=40, crop_size=40, no_aug=True), [0.5] * 3)
    assert all(torch.equal(plain(image, labels)[0], image) for _ in range(5))


# Inference


def test_sizes_of_the_evaluation() -> None:
    scaling = Scaling(512, 2048)
    assert scaling.size(512, 683) == (512, 683)
    assert scaling.size(768, 1024) == (512, 683)  # 682.67
    assert scaling.size(100, 1000) == (205, 2048)  # the longer side decides
    assert scaling.size(512, 683, 1.75) == (896, 1195)


def test_argmax_of_many_classes_needs_no_large_memory() -> None:
    scores = torch.randn(2, 37, 6, 5)
    wanted = nn.functional.interpolate(scores, size=(13, 17), mode="bilinear").argmax(dim=1)
    assert torch.equal(argmax_resized(scores, (13, 17)), wanted)
    assert argmax_resized(torch.zeros(1, 20, 2, 2), (2, 2)).tolist() == [[[0, 0], [0, 0]]]


class Brightness(nn.Module):
    """Logits of three classes that depend only on the brightness of a pixel."""

    mean, std = [0.5], [0.25]

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[int, int]] = []
        self.columns: list[float] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.sizes.append((x.shape[-2], x.shape[-1]))
        self.columns.append(float(x[..., : x.shape[-1] // 2].mean() - x[..., x.shape[-1] // 2 :].mean()))
        gray = x[:, :1] * 0.25 + 0.5
        return torch.cat([-50 * (gray - level).square() for level in (0.0, 0.5, 1.0)], dim=1)


def test_multi_scale_and_flip() -> None:
    image = torch.zeros(1, 1, 24, 48, dtype=torch.uint8)
    image[..., 16:32], image[..., 32:] = 128, 255
    wanted = (image[:, 0].float() / 127.5).round().long()
    model = Brightness()
    assert torch.equal(Predictor(model, CPU.device, scaling=Scaling(24, 100)).predict(image), wanted)
    assert model.sizes == [(24, 48)]
    model = Brightness()
    scaling = Scaling(24, 100, MULTI_SCALES, flip=True)
    found = Predictor(model, CPU.device, scaling=scaling).predict(image)
    assert model.sizes == [(int(24 * s + 0.5), int(48 * s + 0.5)) for s in MULTI_SCALES for _ in range(2)]
    assert [column > 0 for column in model.columns] == [False, True] * 6
    assert (found != wanted).float().mean() < 0.05
    # Unflipped, the predictions of mirrored images would be wrong.
    assert torch.equal(found[..., :12], wanted[..., :12]) and torch.equal(found[..., 36:], wanted[..., 36:])


# Loss and metrics


def test_loss_of_labeled_pixels() -> None:
    logits = torch.randn(2, 3, 4, 5, requires_grad=True)
    labels = torch.randint(0, 3, (2, 4, 5), dtype=torch.uint8)
    labels[0, :2] = IGNORED
    wanted = nn.functional.cross_entropy(logits, labels.long(), ignore_index=IGNORED)
    torch.testing.assert_close(segmentation_loss(logits, labels), wanted)
    loss = segmentation_loss(logits, torch.full_like(labels, IGNORED))
    loss.backward()
    assert loss == 0 and torch.equal(logits.grad, torch.zeros_like(logits))


def test_the_auxiliary_head_counts_less() -> None:
    logits, auxiliary = torch.randn(2, 2, 3, 4, 5).unbind()
    labels = torch.randint(0, 3, (2, 4, 5))
    model = nn.Module()
    model.forward = lambda images: (logits, auxiliary)
    result = SegmentationTask(model, segmentation_loss, verbose=False)(torch.zeros(2, 3, 4, 5), labels)
    wanted = nn.functional.cross_entropy(logits, labels), 0.4 * nn.functional.cross_entropy(auxiliary, labels)
    torch.testing.assert_close((result["loss_decode"], result["loss_aux"]), wanted)
    torch.testing.assert_close(result["loss"], wanted[0] + wanted[1])


def test_scores_by_hand() -> None:
    """Class 2 is neither labeled nor predicted. Class 3 is only predicted."""
    metrics = SegmentationMetrics(4, CPU)
    labels = torch.tensor([[0, 0, 0, 1], [1, 1, IGNORED, IGNORED]], dtype=torch.uint8)
    predicted = torch.tensor([[0, 0, 1, 1], [1, 3, 2, 0]])
    metrics.update(predicted, labels)
    scores = compute_scores(metrics.sum_up())
    assert scores.iou[:2] == pytest.approx([200 / 3, 50.0]) and np.isnan(scores.iou[2]) and scores.iou[3] == 0
    assert scores.acc[:2] == pytest.approx([200 / 3, 200 / 3]) and np.isnan(scores.acc[2:]).all()
    assert scores.miou == pytest.approx((200 / 3 + 50 + 0) / 3)
    assert scores.macc == pytest.approx(200 / 3) and scores.aacc == pytest.approx(400 / 6)
    assert scores.pixels == [3, 3, 0, 0]


def test_scores_equal_torchmetrics() -> None:
    metrics = SegmentationMetrics(7, CPU)
    iou, accuracy = MulticlassJaccardIndex(7, ignore_index=IGNORED), MulticlassAccuracy(7, ignore_index=IGNORED)
    for _ in range(3):
        labels = torch.randint(0, 7, (2, 30, 40), dtype=torch.uint8)
        labels[:, :3] = IGNORED
        predicted = torch.where(torch.rand(labels.shape) < 0.5, labels.long() % 7, torch.randint(0, 7, labels.shape))
        for metric in (metrics, iou, accuracy):
            metric.update(predicted, labels.long())
    scores = compute_scores(metrics.sum_up())
    assert scores.miou == pytest.approx(100 * iou.compute().item())
    assert scores.macc == pytest.approx(100 * accuracy.compute().item())


# Pictures


def test_palette_has_distinct_colors() -> None:
    colors = palette(255)
    assert len({tuple(color) for color in colors.tolist()} | {(0, 0, 0)}) == 256


def test_overlay_shows_image_classes_and_legend() -> None:
    image = Image.new("RGB", (60, 40), (200, 200, 200))
    classes = np.zeros((40, 60), np.int64)
    classes[:, 30:] = 1
    picture = draw_overlay(image, classes, ["wall", "a\x1b[31m long name " + 30 * "x"], 2, 0.5)
    colors = palette(2)
    for column, number in ((5, 0), (50, 1)):
        wanted = (200 + colors[number].astype(float)) / 2
        assert np.abs(np.asarray(picture)[20, column] - wanted).max() <= 1
    assert picture.width > 60
    legend = np.asarray(picture)[:, 60:].reshape(-1, 3).tolist()
    assert all(color.tolist() in legend for color in colors)


def test_every_class_number_has_a_place_in_a_picture() -> None:
    classes = np.arange(150).reshape(10, 15)
    picture = draw_overlay(Image.new("RGB", (15, 10)), classes, None, 150, 1.0)
    assert re.fullmatch(r"\d+x\d+", f"{picture.width}x{picture.height}")
    assert np.array_equal(np.asarray(picture)[:10, :15].reshape(150, 3), palette(150))


# The script that makes label maps of other annotations


@pytest.fixture
def script() -> ModuleType:
    """Returns the program docs/make_label_maps.py as a module."""
    spec = importlib.util.spec_from_file_location("make_label_maps", ROOT / "docs/make_label_maps.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_label_maps_of_coco(script: ModuleType, tmp_path: Path) -> None:
    def square(left: int, side: int) -> list[list[int]]:
        return [[left, 0, left + side, 0, left + side, side, left, side]]

    Image.new("RGB", (12, 8)).save(tmp_path / "a.png")
    shapes = [(7, square(0, 2), 0), (5, square(0, 8), 0), (7, square(8, 2), 0), (9, square(10, 1), 0)]
    shapes.append((5, {"size": [8, 12], "counts": [88, 8]}, 1))  # the last column, which is a crowd
    items = [
        {
            "id": number,
            "image_id": 1,
            "category_id": category,
            "segmentation": shape,
            "iscrowd": crowd,
            "area": 8 if crowd else (shape[0][2] - shape[0][0]) ** 2,
            "bbox": [0, 0, 12, 8],
        }
        for number, (category, shape, crowd) in enumerate(shapes, start=1)
    ]
    categories = [{"id": number, "name": f"class {number}"} for number in (5, 7, 9)]
    images = [{"id": 1, "file_name": "a.png", "width": 12, "height": 8}]
    content = {"images": images, "annotations": items, "categories": categories}
    (tmp_path / "instances.json").write_text(json.dumps(content))
    arguments = ["coco", str(tmp_path / "instances.json"), str(tmp_path), str(tmp_path / "out"), "--classes", "2"]
    script.main(arguments)
    assert read_class_names(tmp_path / "out/class_names.txt") == ["background", "class 5", "class 7"]
    labels = LabelReader(LabelRules(3)).read(tmp_path / "out/annotations/training/a.png", (12, 8))
    # The small square is in front of the large one. The category with the fewest pixels is ignored, as is the crowd.
    assert labels[0].tolist() == [2, 2, 1, 1, 1, 1, 1, 1, 2, 2, 255, 255]
    assert labels[7].tolist() == [1] * 8 + [0, 0, 0, 255]
    config = ValidationDataConfig(data_dir=str(tmp_path / "out"))
    check_data(config, *open_data(config, CPU, num_classes=3), CPU)


def test_label_maps_of_penn_fudan(script: ModuleType, tmp_path: Path) -> None:
    for name, value in (("PNGImages/a", 0), ("PedMasks/a_mask", 2)):
        Image.new("L", (4, 3), value).save(tmp_path / "file.png")
        with zipfile.ZipFile(tmp_path / "wheel.whl", "a") as wheel:
            wheel.write(tmp_path / "file.png", f"{script.PENN_FUDAN}/{name}.png")
    script.main(["penn-fudan", str(tmp_path / "wheel.whl"), str(tmp_path / "out")])
    source = open_source(tmp_path / "out", "validation")
    assert len(source) == 1 and (LabelReader(LabelRules(2)).read(source[0][1]) == 1).all()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["annotations", "class_names.txt", "images"]

"""Tests transforms and groups of images with boxes and masks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from stvit.tools.common.distributed import Distributed
from stvit.tools.common.examples import ExampleLoader
from stvit.tools.detection.coco import Coco
from stvit.tools.detection.config import TrainDataConfig
from stvit.tools.detection.data import open_images
from stvit.tools.detection.transforms import TrainTransform, ValTransform, aspect_ratio_groups, collate

ONE = Distributed(torch.device("cpu"))


@pytest.fixture
def coco(coco_photos: Path) -> Coco:
    return Coco(coco_photos / "instances.json")


def photo(folder: Path, coco: Coco, index: int) -> Image.Image:
    return Image.open(folder / "images" / coco.images[index].file_name)


@pytest.mark.parametrize("hflip", [0.0, 1.0])
def test_boxes_and_masks_follow_the_image(hflip: float, coco: Coco, coco_photos: Path) -> None:
    """The polygons touch the borders of their boxes, in the resized and mirrored image, too."""
    transform = TrainTransform([192], 1000, hflip)
    for index, size in ((0, (256, 192)), (2, (192, 341))):
        image, target = transform(photo(coco_photos, coco, index), coco.target(index))
        assert image.shape == (3, *size) and image.dtype == torch.uint8 and type(image) is torch.Tensor
        assert target["masks"].shape == (len(target["boxes"]), *size) and set(target["masks"].unique().tolist()) == {
            0,
            1,
        }
        assert all(type(target[key]) is torch.Tensor for key in ("boxes", "labels", "masks"))
        for box, mask in zip(target["boxes"], target["masks"], strict=True):
            y, x = mask.nonzero(as_tuple=True)
            around = torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1]).float()
            assert (box - around).abs().max() <= 4
    left = TrainTransform([96], 1000, 1.0)(photo(coco_photos, coco, 0), coco.target(0))[1]["boxes"]
    right = TrainTransform([96], 1000, 0.0)(photo(coco_photos, coco, 1), coco.target(1))[1]["boxes"]
    torch.testing.assert_close(left, right, atol=0.02, rtol=0)  # image 1 is the mirror image of image 0


def test_sizes_are_drawn_at_random(coco: Coco, coco_photos: Path) -> None:
    """The longer side limits the size."""
    transform = TrainTransform(range(96, 193, 32), 200, 0.5)
    sizes = {tuple(transform(photo(coco_photos, coco, 0), coco.target(0))[0].shape) for _ in range(40)}
    assert sizes == {(3, 128, 96), (3, 170, 128), (3, 200, 150)}


def test_objects_smaller_than_a_pixel_are_removed(coco: Coco, coco_photos: Path) -> None:
    target = coco.target(0)
    boxes = tv_tensors.wrap(torch.tensor([[5.0, 5, 9, 9], [5, 5, 5.5, 9], [90, 5, 120, 9], [-9, -9, 5, 5]]),
                            like=target["boxes"])  # fmt: skip
    _, after = TrainTransform([96], 500, 0.0)(photo(coco_photos, coco, 0), {**target, "boxes": boxes})
    assert after["boxes"].tolist() == [[5, 5, 9, 9], [90, 5, 96, 9], [0, 0, 5, 5]]
    assert len(after["labels"]) == len(after["masks"]) == 3
    assert torch.equal(after["labels"], target["labels"][[0, 2, 3]])


def test_images_without_objects_and_gray_images(coco: Coco, coco_photos: Path) -> None:
    target = coco.target(0)
    empty = {
        "image_id": 1,
        "boxes": tv_tensors.wrap(target["boxes"][:0], like=target["boxes"]),
        "labels": target["labels"][:0],
        "masks": tv_tensors.Mask(target["masks"][:0]),
    }
    image, after = TrainTransform([48], 500, 1.0)(photo(coco_photos, coco, 0).convert("L"), empty)
    assert image.shape == (1, 64, 48)
    assert after["boxes"].shape == (0, 4) and after["masks"].shape == (0, 64, 48) and after["labels"].shape == (0,)


@pytest.mark.parametrize("transform", [TrainTransform([96], 500, 0.5), ValTransform()])
def test_an_image_of_another_size_is_an_error(transform: Any, coco: Coco, coco_photos: Path) -> None:
    target = {**coco.target(0), "size": (128, 96)}
    image = photo(coco_photos, coco, 0)
    with pytest.raises(
        ValueError, match=r"^96x64 pixels, but .* 96x128; correct its width and height in the annotations$"
    ):
        transform(image.resize((96, 64)), target)
    with pytest.raises(ValueError, match=r"in the annotations, or turn its pixels and remove its EXIF orientation$"):
        transform(image.transpose(Image.Transpose.ROTATE_90), target)


def test_groups_are_those_of_torchvision() -> None:
    """Bounds between 1/2 and 2 for three groups to an octave: 0.5, 0.63, 0.79, 1, 1.26, 1.59, 2."""
    assert aspect_ratio_groups([0.4, 0.5, 0.7, 0.99, 1.0, 1.3, 2.5], 3) == [0, 1, 2, 3, 4, 5, 7]
    assert aspect_ratio_groups([0.4, 0.99, 1.0, 3.0], 0) == [0, 0, 1, 1]


def test_a_batch_has_images_of_one_group(coco_photos: Path) -> None:
    folder = str(coco_photos / "images")
    file = str(coco_photos / "instances.json")
    data = TrainDataConfig(
        train_images=folder, train_annotations=file, val_images=folder, val_annotations=file, batch_size=2, workers=0
    )
    train = open_images(data, ONE, with_masks=True).train
    train.transform = TrainTransform([64], 200, 0.5)
    groups = aspect_ratio_groups(train.source.aspect_ratios(), 3)
    assert groups == [2, 2, 6, 6]
    loader = ExampleLoader(train, data, ONE, collate, groups=groups)
    for epoch in range(4):
        batches = list(loader.epoch(epoch))
        assert sorted(target["image_id"] for _, targets in batches for target in targets) == [100, 101, 102, 103]
        for images, _ in batches:
            assert images[0].shape == images[1].shape
    assert collate([None, (1, 2), None]) == ([1], [2])

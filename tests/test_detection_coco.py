"""Tests reading and checking annotations in COCO's format."""

import copy
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as pycoco_mask
from pycocotools.coco import COCO

from stvit.tools.common.cli import CommandError
from stvit.tools.common.distributed import Distributed
from stvit.tools.common.fingerprint import find_changes, fingerprint
from stvit.tools.detection import coco as coco_module
from stvit.tools.detection.coco import Coco, decode_counts, is_inside
from stvit.tools.detection.config import TrainDataConfig
from stvit.tools.detection.data import CocoSource, open_images

ONE = Distributed(torch.device("cpu"))
Content = dict[str, Any]


@pytest.fixture
def content(coco_photos: Path) -> Content:
    """The annotations of the photographs, to be changed by a test."""
    return json.loads((coco_photos / "instances.json").read_text(encoding="utf-8"))


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Coco]:
    """Returns a function that writes annotations to a file and reads them."""

    def read(content: Any, with_masks: bool = True) -> Coco:
        path = tmp_path / "instances.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return Coco(path, with_masks)

    return read


def compress(rle: dict[str, Any]) -> dict[str, Any]:
    """Returns the RLE of pycocotools, with its counts as text."""
    compressed = pycoco_mask.frPyObjects(rle, *rle["size"])
    return {"size": list(compressed["size"]), "counts": compressed["counts"].decode()}


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def test_targets_have_the_masks_of_pycocotools(coco_photos: Path) -> None:
    """Polygons and RLE; crowds are no targets. Category ids 3 and 7 become labels 1 and 2."""
    coco = Coco(coco_photos / "instances.json")
    theirs = COCO(str(coco_photos / "instances.json"))
    assert coco.category_ids == [3, 7] and coco.names == ["person", "bus"] and coco.has_gaps
    seen = 0
    for index, image in enumerate(coco.images):
        target = coco.target(index)
        wanted = [a for a in theirs.imgToAnns[image.id] if not a["iscrowd"]]
        assert len(target["boxes"]) == len(wanted) and target["image_id"] == image.id
        for annotation, box, label, mask in zip(
            wanted, target["boxes"].tolist(), target["labels"].tolist(), target["masks"].numpy(), strict=True
        ):
            left, top, width, height = annotation["bbox"]
            assert box == pytest.approx([left, top, left + width, top + height])
            assert coco.category_ids[label - 1] == annotation["category_id"]
            np.testing.assert_array_equal(mask, theirs.annToMask(annotation))
            seen += 1
    assert seen == 11 and coco.count_objects() == 11


def test_ground_truth_is_that_of_the_file(coco_photos: Path, content: Content) -> None:
    """The ground truth contains crowds, too."""
    coco = Coco(coco_photos / "instances.json")
    truth = coco.ground_truth(range(len(coco.images)))
    assert len(truth["annotations"]) == len(content["annotations"]) == 12
    theirs = COCO(str(coco_photos / "instances.json"))
    for ours, wanted in zip(truth["annotations"], content["annotations"], strict=True):
        assert {key: ours[key] for key in ("image_id", "category_id", "bbox", "area", "iscrowd")} == {
            key: wanted[key] for key in ("image_id", "category_id", "bbox", "area", "iscrowd")
        }
        np.testing.assert_array_equal(pycoco_mask.decode(ours["segmentation"]), theirs.annToMask(wanted))


def test_annotations_in_any_order(content: Content, read: Callable[..., Coco]) -> None:
    ordered = read(content)
    mixed = copy.deepcopy(content)
    mixed["annotations"] = [mixed["annotations"][i] for i in np.random.default_rng(0).permutation(12)]
    other = read(mixed)
    for index in range(4):
        for ours, wanted in zip(_sorted(other.target(index)), _sorted(ordered.target(index)), strict=True):
            np.testing.assert_array_equal(ours, wanted)


def _sorted(target: dict[str, Any]) -> list[np.ndarray]:
    order = np.lexsort(target["boxes"].numpy().T)
    return [target[key].numpy()[order] for key in ("boxes", "labels", "masks")]


def test_compressed_counts(content: Content, read: Callable[..., Coco]) -> None:
    """A compressed RLE gives the same mask as the uncompressed one."""
    plain = read(content)
    for annotation in content["annotations"]:
        if isinstance(annotation["segmentation"], dict):
            annotation["segmentation"] = compress(annotation["segmentation"])
    packed = read(content)
    for index in range(4):
        assert torch.equal(packed.target(index)["masks"], plain.target(index)["masks"])


def test_counts_of_random_masks() -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        height, width = random.integers(1, 70, 2)
        mask = (random.random((height, width)) < random.random()).astype(np.uint8)
        mask[: height // 2] = random.integers(0, 2)
        encoded = pycoco_mask.encode(np.asfortranarray(mask))["counts"].decode()
        changes = np.flatnonzero(np.diff(mask.ravel(order="F"), prepend=0, append=2))
        assert decode_counts(encoded).tolist() == np.diff(changes, prepend=0).tolist()


def test_without_masks_no_segmentation_is_needed(content: Content, read: Callable[..., Coco]) -> None:
    for annotation in content["annotations"]:
        del annotation["segmentation"]
    coco = read(content, with_masks=False)
    assert coco.unusable == [] and "masks" not in coco.target(0) and len(coco.target(0)["boxes"]) == 4
    assert "segmentation" not in coco.ground_truth([0])["annotations"][0]
    # A mask model cannot learn from these objects.
    coco = read(content)
    assert coco.unusable == ["object without a mask (12): annotation 1 of image 100, annotation 2 of image 100, "
                             "annotation 3 of image 100, …"]  # fmt: skip
    assert len(coco.target(0)["boxes"]) == 0


def test_a_missing_area_is_computed(content: Content, read: Callable[..., Coco]) -> None:
    wanted = [pycoco_mask.area(a["segmentation"]) for a in read(content).ground_truth(range(4))["annotations"]]
    for annotation in content["annotations"]:
        annotation.pop("area")
    assert [a["area"] for a in read(content).ground_truth(range(4))["annotations"]] == wanted
    box = content["annotations"][0]["bbox"]
    assert read(content, with_masks=False).ground_truth([0])["annotations"][0]["area"] == box[2] * box[3]


# ---------------------------------------------------------------------------------------------------------------------
# Errors


def first(content: Content, key: str = "annotations") -> dict[str, Any]:
    return content[key][0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: first(c).update(category_id=4), "unknown category_id (1): annotation 1 (4)"),
        (lambda c: first(c).update(image_id=5), "unknown image_id (1): annotation 1 (5)"),
        (lambda c: first(c).update(id=2), "annotation id used twice (1): 2"),
        (lambda c: first(c).pop("id"), "id is missing (1): annotations[0]"),
        (lambda c: first(c).pop("bbox"), "bbox is missing (1): annotation 1"),
        (lambda c: first(c).update(bbox=[1, 2, 3]), "bbox must be four numbers (left, top, width, height) (1)"),
        (lambda c: first(c).update(bbox=[1, 2, "3", 4]), "bbox must be four numbers"),
        (lambda c: first(c).update(bbox=[1, 2, float("nan"), 4]), "bbox must be four numbers"),
        (lambda c: first(c).update(category_id="person"), "category_id must be a whole number (1): annotation 1"),
        (lambda c: first(c).update(image_id=True), "image_id must be a whole number"),
        (lambda c: first(c).update(iscrowd=2), "iscrowd must be 0 or 1 (1): annotation 1"),
        (lambda c: first(c).update(area="12"), "area must be a number (1): annotation 1"),
        (lambda c: first(c).update(segmentation="M"), "segmentation must be a list of polygons or an RLE (1)"),
        (lambda c: first(c).update(segmentation={"counts": [3]}), "an RLE needs size [height, width] and counts (1)"),
        (
            lambda c: c["annotations"][1]["segmentation"].update(size=[7, 9]),
            "mask of another size than its image (1): annotation 2 of image 100 ([7, 9], expected [128, 96])",
        ),
        (lambda c: first(c, "images").update(id=101), "image id used twice (1): 101"),
        (lambda c: first(c, "images").update(file_name="bus_1.jpg"), "file name used twice (1): 'bus_1.jpg'"),
        (lambda c: first(c, "images").pop("width"), "width is missing (1): image 100"),
        (lambda c: first(c, "images").update(height=0), "height must be a whole number above 0 (1): image 100"),
        (lambda c: first(c, "images").update(height=10**8), "image of more than 134 million pixels (1): image 100"),
        (lambda c: first(c, "images").update(file_name=5), "file_name must be text (1): image 100"),
        (lambda c: first(c, "images").update(file_name="\ud800.jpg"), "file_name must be text (1): image 100"),
        (
            lambda c: first(c, "images").update(file_name="../../etc/passwd"),
            "file name that leads out of the image folder (1): image 100 ('../../etc/passwd')",
        ),
        (lambda c: first(c, "images").update(file_name="/etc/passwd"), "file name that leads out of the image folder"),
        (lambda c: first(c, "categories").update(id=7), "category id used twice (1): 7"),
        (lambda c: first(c, "categories").pop("name"), "name is missing (1): category 3"),
        (lambda c: c.update(images=[]), "unknown image_id (12): annotation 1 (100), annotation 2 (100), "),
        (lambda c: c.update(images=[], annotations=[]), "has no images"),
        (lambda c: c.update(categories=[], annotations=[]), "has no categories"),
        (lambda c: c.pop("categories"), "categories is missing; it must be an annotation file of COCO (instances)"),
        (lambda c: c.update(annotations={}), "annotations must be a list, got an object"),
        (lambda c: c["annotations"].append(1), "each item of annotations must be an object"),
    ],
)
def test_a_file_that_contradicts_itself(
    change: Callable[[Content], object], said: str, content: Content, read: Callable[..., Coco], tmp_path: Path
) -> None:
    change(content)
    with pytest.raises(CommandError) as error:
        read(content)
    assert said in str(error.value) and str(error.value).startswith(str(tmp_path / "instances.json"))
    assert "\n" not in str(error.value)


def test_all_kinds_of_errors_are_named_at_once(content: Content, read: Callable[..., Coco]) -> None:
    for annotation in content["annotations"][:5]:
        annotation["category_id"] = 90
    content["images"][1]["file_name"] = "../a.jpg"
    with pytest.raises(CommandError) as error:
        read(content)
    assert "unknown category_id (5): annotation 1 (90), annotation 2 (90), annotation 3 (90), …; correct" in str(
        error.value
    )
    assert "file name that leads out of the image folder (1): image 101 ('../a.jpg'); " in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("no JSON", "is not JSON: Expecting value: line 1 column 1"),
        ('{"images": [', "is not JSON"),
        ("[1, 2]", "expected an object with images, annotations and categories, got a list"),
        ("[" * 100_000, "is nested too deeply"),
        ("", "is not JSON"),
        ('{"images": [{"id": ' + "9" * 5000 + "}]}", "cannot read the annotation file"),
    ],
)
def test_a_file_that_is_no_annotation_file(text: str, said: str, read: Callable[..., Coco]) -> None:
    with pytest.raises(CommandError) as error:
        read(text)
    assert said in str(error.value)


def test_a_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CommandError, match=r"missing\.json does not exist"):
        Coco(tmp_path / "missing.json")
    with pytest.raises(CommandError, match="not a regular file"):
        Coco(tmp_path)
    (tmp_path / "latin.json").write_bytes(b'{"\xe9": 1}')
    with pytest.raises(CommandError, match="byte 2 is not UTF-8 text"):
        Coco(tmp_path / "latin.json")
    monkeypatch.setattr(coco_module, "MAX_BYTES", 3)
    with pytest.raises(CommandError, match="8 bytes, more than the limit of 3"):
        Coco(tmp_path / "latin.json")


@pytest.mark.parametrize(
    ("name", "inside"),
    [
        ("a.jpg", True),
        ("val/a..b.jpg", True),
        ("..", False),
        ("a/../../b.jpg", False),
        ("a\\..\\..\\b.jpg", False),
        ("/a.jpg", False),
        ("", False),
        ("a\0.jpg", False),
    ],
)
def test_names_stay_in_the_folder(name: str, inside: bool) -> None:
    assert is_inside(name) == inside


# ---------------------------------------------------------------------------------------------------------------------
# Objects that cannot be learned from


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"bbox": [5, 5, 0, 9]}, "box without area (1): annotation 1 of image 100 (5, 5, 0, 9)"),
        ({"bbox": [5, 5, 9, -1]}, "box without area"),
        ({"bbox": [96, 5, 9, 9]}, "box outside the image (1): annotation 1 of image 100 (96, 5, 9, 9)"),
        ({"bbox": [5, -9, 9, 8]}, "box outside the image"),
        ({"segmentation": []}, "object without a mask (1): annotation 1 of image 100"),
        ({"segmentation": [[1, 2, 3, 4]]}, "malformed polygon"),
        ({"segmentation": [[1, 2, 3, 4, 5, 6, 7]]}, "malformed polygon"),
        ({"segmentation": [[1, 2, 3, 4, 5, "6"]]}, "malformed polygon"),
        ({"segmentation": [[1, 2, 3, 4, 5, float("inf")]]}, "malformed polygon"),
        ({"segmentation": [[1, 2, 3, 4, 5, 1e9]]}, "malformed polygon"),
        ({"segmentation": [[[1, 2], [3, 4], [5, 6]]]}, "malformed polygon"),
        ({"segmentation": [[1, 2, 3, 4, 5, [6]]]}, "malformed polygon"),
        ({"segmentation": [7]}, "malformed polygon"),
        ({"segmentation": {"size": [128, 96], "counts": [5, 6]}}, "damaged RLE (its run lengths do not sum up"),
        ({"segmentation": {"size": [128, 96], "counts": [-5, 12293]}}, "damaged RLE"),
        ({"segmentation": {"size": [128, 96], "counts": "é"}}, "damaged RLE"),
        ({"segmentation": {"size": [128, 96], "counts": "oooooooooo"}}, "damaged RLE"),
        ({"segmentation": {"size": [128, 96], "counts": ""}}, "damaged RLE"),
    ],
)
def test_an_unusable_object_leaves_the_training(
    change: dict[str, Any], said: str, content: Content, read: Callable[..., Coco]
) -> None:
    """The other objects of the image stay. In the metrics the object counts, as in COCO's own evaluation."""
    content["annotations"][0].update(change)
    coco = read(content)
    assert len(coco.unusable) == 1 and said in coco.unusable[0]
    target = coco.target(0)
    assert len(target["boxes"]) == len(target["masks"]) == 3
    truth = coco.ground_truth([0])["annotations"]
    assert len(truth) == 4
    mask = pycoco_mask.decode(truth[0]["segmentation"])
    assert mask.shape == (128, 96) and ("bbox" in change) == bool(mask.any())


def test_a_good_polygon_beside_a_malformed_one(content: Content, read: Callable[..., Coco]) -> None:
    before = read(content).target(0)["masks"]
    content["annotations"][0]["segmentation"].append([1, 2])
    coco = read(content)
    assert coco.unusable == [] and torch.equal(coco.target(0)["masks"], before)


def test_boxes_partly_outside_are_reported(content: Content, read: Callable[..., Coco]) -> None:
    content["annotations"][0]["bbox"] = [90, 5, 20, 9]
    content["annotations"][1]["bbox"] = [90, 5, 6.5, 9]  # COCO's own boxes exceed their images by less than a pixel
    coco = read(content)
    assert coco.clipped == ["box partly outside the image (1): annotation 1 of image 100 (90, 5, 20, 9)"]
    assert coco.unusable == [] and len(coco.target(0)["boxes"]) == 4


# ---------------------------------------------------------------------------------------------------------------------
# Images


def data(folder: Path, **changes: Any) -> TrainDataConfig:
    paths = {"images": str(folder / "images"), "annotations": str(folder / "instances.json")}
    flags = {f"{split}_{key}": path for split in ("train", "val") for key, path in paths.items()}
    return TrainDataConfig(**{**flags, **changes})


def test_missing_images_are_named(write_coco: Callable[..., Path], tmp_path: Path) -> None:
    folder = write_coco(tmp_path)
    (folder / "images/bus_1.jpg").unlink()
    (folder / "images/zidane_0.jpg").unlink()
    (folder / "images/zidane_0.jpg").symlink_to("nowhere.jpg")
    with pytest.raises(CommandError) as error:
        open_images(data(folder), ONE, with_masks=True)
    assert f"2 of 4 images of {folder / 'instances.json'} are not in {folder / 'images'}: bus_1.jpg (image 101), " in (
        str(error.value)
    )
    assert str(error.value).endswith("zidane_0.jpg (image 102); check --val-images")


def test_images_in_subfolders(write_coco: Callable[..., Path], tmp_path: Path) -> None:
    folder = write_coco(tmp_path)
    text = (folder / "instances.json").read_text(encoding="utf-8")
    (folder / "instances.json").write_text(text.replace('"bus_1.jpg"', '"more/bus_1.jpg"'), encoding="utf-8")
    (folder / "images/more").mkdir()
    (folder / "images/bus_1.jpg").rename(folder / "images/more/bus_1.jpg")
    images = open_images(data(folder), ONE, with_masks=True)
    assert images.train.read(1)[0].size == (96, 128)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"train_images": None, "train_annotations": None}, "no training images; pass --data-dir, or --train-images"),
        ({"train_images": None}, "--train-annotations needs --train-images"),
        ({"val_annotations": None}, "--val-images needs --val-annotations"),
        ({"val_images": "nowhere"}, "image folder nowhere is not a folder; check --val-images"),
        ({"val_annotations": None, "data_dir": "."}, "instances_val2017.json does not exist; check --data-dir"),
        ({"val_images": None, "data_dir": "."}, "image folder val2017 is not a folder; check --data-dir"),
        ({"val_images": None, "data_dir": "nowhere"}, "--data-dir nowhere is not a folder; it must contain annotation"),
    ],
)
def test_flags_that_name_no_data(flags: dict[str, Any], said: str, coco_photos: Path) -> None:
    with pytest.raises(CommandError) as error:
        open_images(data(coco_photos, **flags), ONE, with_masks=True)
    assert said in str(error.value)


def test_the_folders_of_coco(coco_photos: Path, tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    for split in ("train", "val"):
        (tmp_path / f"{split}2017").symlink_to(coco_photos / "images")
        (tmp_path / f"annotations/instances_{split}2017.json").symlink_to(coco_photos / "instances.json")
    images = open_images(TrainDataConfig(data_dir=str(tmp_path)), ONE, with_masks=True)
    assert len(images.train) == len(images.val) == 4 and images.class_names == ["person", "bus"]


def test_images_without_objects(
    content: Content, coco_photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The training leaves them out by default; a crowd is no object. The evaluation does not."""
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in (100, 102)]
    content["annotations"][-1].update(image_id=103, iscrowd=1)
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    flags = data(coco_photos, train_annotations=str(path), val_annotations=str(path))
    images = open_images(flags, ONE, with_masks=True)
    assert [images.train.source.filename(i) for i in range(len(images.train))] == ["bus_0.jpg", "zidane_0.jpg"]
    assert len(images.val) == 4
    said = capsys.readouterr().out
    assert f"{path}: training leaves out 2 of 4 images, which have no object (--keep-empty-images keeps them)" in said
    assert f"{path}: 2 categories with ids from 3 to 7 become labels 1 to 2" in said
    flags.keep_empty_images = True
    assert len(open_images(flags, ONE, with_masks=True).train) == 4

    content["annotations"] = content["annotations"][-1:]
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(CommandError, match="has no object to train on; check --train-annotations"):
        open_images(data(coco_photos, train_annotations=str(path)), ONE, with_masks=False)
    with pytest.raises(CommandError, match="has no object with a mask to train on; choose a --model without masks"):
        open_images(data(coco_photos, train_annotations=str(path)), ONE, with_masks=True)
    with pytest.raises(CommandError, match="has no object, so that no accuracy can be measured"):
        open_images(data(coco_photos, val_annotations=str(path)), ONE, with_masks=True)


def test_a_mask_model_needs_masks_to_measure_it(content: Content, coco_photos: Path, tmp_path: Path) -> None:
    for annotation in content["annotations"]:
        annotation["segmentation"] = []
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    flags = data(coco_photos, val_annotations=str(path))
    with pytest.raises(CommandError, match=r"boxes\.json has no object with a mask to measure mask AP on; choose"):
        open_images(flags, ONE, with_masks=True)
    assert open_images(flags, ONE, with_masks=False).val


def test_both_files_need_the_same_categories(content: Content, coco_photos: Path, tmp_path: Path) -> None:
    content["categories"].append({"id": 9, "name": "tie"})
    path = tmp_path / "other.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(CommandError) as error:
        open_images(data(coco_photos, val_annotations=str(path)), ONE, with_masks=True)
    assert f"category 9 ('tie') is in {path} but not in {coco_photos / 'instances.json'}" in str(error.value)


def test_warnings_name_file_and_annotation(
    content: Content, coco_photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content["annotations"][0]["bbox"] = [5, 5, 0, 9]
    content["annotations"][1]["bbox"] = [90, 5, 20, 9]
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    open_images(data(coco_photos, train_annotations=str(path), val_annotations=str(path)), ONE, with_masks=True)
    problem = f"warning: {path}: box without area (1): annotation 1 of image 100 (5, 5, 0, 9)"
    clipped = f"warning: {path}: box partly outside the image (1): annotation 2 of image 100 (90, 5, 20, 9)"
    assert capsys.readouterr().err.splitlines() == [
        f"{problem}; in COCO's metrics they count as not detected",
        f"{problem}; training leaves them out",
        f"{clipped}; training clips them",
    ]


def test_changed_objects_change_the_fingerprint(content: Content, coco_photos: Path, tmp_path: Path) -> None:
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    before = fingerprint(open_images(data(coco_photos, train_annotations=str(path)), ONE, with_masks=True))
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
    same = fingerprint(open_images(data(coco_photos, train_annotations=str(path)), ONE, with_masks=True))
    assert find_changes(before, same) == []
    content["annotations"][0]["bbox"][0] += 1
    path.write_text(json.dumps(content), encoding="utf-8")
    after = fingerprint(open_images(data(coco_photos, train_annotations=str(path)), ONE, with_masks=True))
    assert find_changes(before, after) == ["training images: 4, different or in another order"]
    content["annotations"][0]["bbox"][0] -= 1
    content["annotations"][1]["segmentation"]["counts"][0] -= 1
    content["annotations"][1]["segmentation"]["counts"][-1] += 1
    path.write_text(json.dumps(content), encoding="utf-8")
    after = fingerprint(open_images(data(coco_photos, train_annotations=str(path)), ONE, with_masks=True))
    assert find_changes(before, after) == ["training annotations: other masks, areas or label maps"]
    del before["train"]["contents"]  # an earlier version wrote no digest of the masks
    assert find_changes(before, after) == []


def test_a_source_can_be_sent_to_another_process(coco_photos: Path) -> None:
    """Worker processes on Windows and macOS receive it as a pickle."""
    coco = Coco(coco_photos / "instances.json")
    source = pickle.loads(pickle.dumps(CocoSource(coco, coco_photos / "images", [2, 0], with_objects=True)))
    path, target = source[0]
    assert path == os.path.join(coco_photos / "images", "zidane_0.jpg") and target["image_id"] == 102
    assert torch.equal(target["masks"], coco.target(2)["masks"])
    assert source.aspect_ratios() == [96 / 54, 96 / 128]

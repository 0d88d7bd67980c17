"""Saving and loading models of the adapters."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import stvit
from stvit.adapters.folder import Recipe, load_model, model_card, read_config, save_model, write_card
from stvit.hub import Details, Metric
from stvit.weights import PretrainedError


class Net(nn.Module):
    def __init__(self, backbone: str, width: int) -> None:
        super().__init__()
        self.recipe = Recipe("torchvision", "net", {"backbone": backbone, "width": width})
        self.layer = nn.Conv2d(3, width, 1)


def net(backbone: str, width: int = 4) -> Net:
    return Net(backbone, width)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    details = Details(weights="after epoch 3", metrics=[Metric("box AP", 41.5, "COCO", "val2017", "5,000 images")])
    model = Net("stvit_pico", 6).to(memory_format=torch.channels_last)
    save_model(model, tmp_path / "model", label_names=["cat", "dog"], category_ids=[17, 18], details=details)
    return tmp_path / "model"


def load(source: Any, **overrides: Any) -> Any:
    return load_model("torchvision", {"net": net}, source, **overrides)


def test_save_and_load(folder: Path) -> None:
    model = load(folder)
    assert model.layer.out_channels == 6 and not model.training
    assert model.label_names == ["cat", "dog"] and model.category_ids == [17, 18]
    again = folder.parent / "again"
    save_model(model, again)  # keeps the names
    assert read_config(again).label_names == ["cat", "dog"]
    reloaded = load(again).state_dict()
    assert all(torch.equal(value, reloaded[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"adapter": "segmentation"},
            r"it is a segmentation model \(net\); load it with stvit.adapters.segmentation.load, or pass it to stvit "
            "predict-seg or validate-seg$",
        ),
        ({"adapter": None}, "adapter must be one of torchvision, segmentation, got None"),
        ({"builder": "os.system"}, "builder must be one of net, got 'os.system'"),
        ({"args": {"backbone": "x", "wide": 6}}, "unexpected keyword argument 'wide'"),
        ({"args": {"backbone": "x", "width": 5}}, "2 of 2 tensors do not fit: layer.bias, layer.weight"),
        ({"args": {"backbone": "x", "width": 1 << 29}}, "more than .* parameters"),
        ({"args": {"pretrained_backbone": "/etc/passwd"}}, "args.pretrained_backbone is not allowed"),
        ({"args": [1]}, "args must be a mapping"),
        ({"label_names": [1]}, "label_names must be a list of names"),
        ({"category_ids": [1]}, "2 label_names, but 1 category_ids"),
        ({"stvit": {"metrics": 3}}, "stvit.metrics must be a list"),
        ({"architecture": "stvit_pico"}, r"it is a classifier \(stvit_pico\); load it with stvit.create_model"),
        (
            {"args": {"backbone": "x", "num_classes": 4}},
            "2 label_names, but the model has 3 classes; pass one for each class; save or download",
        ),
    ],
)
def test_wrong_configuration(folder: Path, change: dict[str, Any], message: str) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(PretrainedError, match=message):
        load(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_damaged_file(folder: Path, name: str) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:-20])
    with pytest.raises(PretrainedError, match=f"cannot load {folder}"):
        load(folder)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(PretrainedError, match="no file, folder or timm model named"):
        load(tmp_path / "none")
    (tmp_path / "weights.pth").write_bytes(b"x")
    with pytest.raises(PretrainedError, match="is not a model folder"):
        load(tmp_path / "weights.pth")


@pytest.mark.parametrize(
    ("adapter", "names", "ids", "message"),
    [
        ("segmentation", ["a", "b", "c"], None, "3 label_names, but the model has 2 classes"),
        ("segmentation", ["a"], None, "1 label_names, but the model has 2 classes"),
        ("torchvision", ["a", "b"], None, "2 label_names, but the model has 1 classes"),
        ("torchvision", None, [5, 6], "2 category_ids, but the model has 1 classes"),
    ],
)
def test_names_of_other_classes_are_refused(
    adapter: str, names: list[str] | None, ids: list[int] | None, message: str, tmp_path: Path
) -> None:
    model = Net("stvit_pico", 4)
    model.recipe = Recipe(adapter, "net", {"num_classes": 2})
    with pytest.raises(ValueError, match=message):
        save_model(model, tmp_path / "model", label_names=names, category_ids=ids)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"wide": 6}, "with the given wide: .* unexpected keyword argument 'wide'$"),
        ({"width": 5}, "with the given width: 2 of 2 tensors do not fit: .*; remove the arguments$"),
    ],
)
def test_wrong_arguments_of_the_caller(folder: Path, overrides: dict[str, Any], message: str) -> None:
    """The folder is fine, so the message does not say that it should be saved again."""
    with pytest.raises(PretrainedError, match=message):
        load(folder, **overrides)


def test_commands_of_classifiers_name_those_of_the_model(folder: Path) -> None:
    with pytest.raises(PretrainedError, match=r"it is a detector \(net\); .* stvit predict-det or validate-det$"):
        stvit.create_model(f"local-dir:{folder}", pretrained=True)


def test_model_without_recipe(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not know how it was built"):
        save_model(nn.Linear(2, 2), tmp_path)


def test_card(folder: Path) -> None:
    card = model_card(folder, "hf-hub:org/name")
    for text in (
        "box AP",
        "41.50",
        "`cat`, `dog`",
        "object-detection",
        'torchvision.load("hf-hub:org/name")',
        "@inpro",
    ):
        assert text in card, text
    write_card(folder, "hf-hub:org/name")
    (folder / "README.md").write_text("mine")
    write_card(folder, "hf-hub:org/name")
    assert (folder / "README.md").read_text() == "mine"

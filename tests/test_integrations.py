"""Other libraries on the models and folders of this package, beside another model of timm."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hub_server import Hub
from PIL import Image
from timm.models import save_for_hf
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline

import stvit  # noqa: F401  registers the models in timm
from stvit import hub as hub_module
from stvit.tools import push_to_hub, train_cls

# A folder of weights, in transformers


def check_both_libraries(folder: Path, labels: list[str], image: Path) -> None:
    """Loads a folder with timm and with transformers, and compares pixels, logits and labels."""
    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert model.num_classes == len(labels)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    photo = Image.open(image).convert("RGB")
    pixels = transform(photo)[None]
    assert torch.equal(AutoImageProcessor.from_pretrained(folder)(photo)["pixel_values"], pixels)
    with torch.inference_mode():
        logits = model(pixels)
        wrapped = AutoModelForImageClassification.from_pretrained(folder).eval()
        assert torch.equal(wrapped(pixels).logits, logits)
        features = AutoModel.from_pretrained(folder).eval()(pixels).last_hidden_state
        assert torch.equal(features, model.forward_features(pixels))
    assert wrapped.config.id2label == dict(enumerate(labels))
    scores = {
        row["label"]: row["score"] for row in pipeline("image-classification", str(folder))(str(image), top_k=None)
    }
    expected = logits.softmax(-1)[0].tolist()
    assert [scores[label] for label in labels] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", ["test_stvit", "test_convnext"])
def test_a_run_and_its_push_open_in_transformers(name: str, hub: Hub, digits_folder: Path, tmp_path: Path) -> None:
    flags = f"--model={name} --img-size=32 --epochs=1 --batch-size=20 --workers=0 --warmup-epochs=0"
    more = [f"--data-dir={digits_folder}", f"--output={tmp_path}", "--experiment=run", "--mean", "0.4", "--std", "0.3"]
    assert train_cls.main([*flags.split(), *more]) == 0
    labels, image = [f"digit_{n}" for n in range(4)], next((digits_folder / "val").rglob("*.png"))
    check_both_libraries(tmp_path / "run/best", labels, image)
    assert push_to_hub.main([str(tmp_path / "run"), "--repo-id=org/net"]) == 0
    (tmp_path / "pushed").mkdir()
    for file, content in hub.files("org/net").items():
        (tmp_path / "pushed" / file).write_bytes(content)
    check_both_libraries(tmp_path / "pushed", labels, image)


def test_arguments_that_are_not_repeated_stay(tmp_path: Path) -> None:
    model = timm.create_model("test_stvit", num_classes=3, in_chans=1, global_pool="max", stoken_size=(4, 2, 1, 1))
    hub_module.save(model, tmp_path / "own")
    config = json.loads((tmp_path / "own/config.json").read_text())
    assert config["num_classes"] == 3
    assert config["model_args"] == {"in_chans": 1, "global_pool": "max", "stoken_size": [4, 2, 1, 1]}
    image = torch.randn(1, 1, 64, 64)
    for loaded in (
        timm.create_model(f"local-dir:{tmp_path / 'own'}", pretrained=True),
        AutoModelForImageClassification.from_pretrained(tmp_path / "own"),
    ):
        logits = loaded.eval()(image)
        assert torch.equal(logits if isinstance(logits, torch.Tensor) else logits.logits, model.eval()(image))


def test_a_folder_that_timm_wrote_opens_in_transformers_once_it_is_pushed(hub: Hub, tmp_path: Path) -> None:
    save_for_hf(timm.create_model("test_stvit", num_classes=3), str(tmp_path / "timm"), safe_serialization=True)
    with pytest.raises(TypeError, match="num_classes"):
        AutoModelForImageClassification.from_pretrained(tmp_path / "timm")
    assert push_to_hub.main([str(tmp_path / "timm"), "--repo-id=org/net"]) == 0
    for file, content in hub.files("org/net").items():
        (tmp_path / "timm" / file).write_bytes(content)
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "timm").num_labels == 3


@pytest.mark.parametrize("name", ["test_stvit", "test_convnext"])
def test_what_transformers_saves_opens_in_timm(name: str, tmp_path: Path) -> None:
    hub_module.save(timm.create_model(name, num_classes=3), tmp_path / "ours", label_names=["a", "b", "c"])
    wrapped = AutoModelForImageClassification.from_pretrained(tmp_path / "ours").eval()
    wrapped.save_pretrained(tmp_path / "theirs")
    model: Any = timm.create_model(f"local-dir:{tmp_path / 'theirs'}", pretrained=True).eval()
    image = torch.randn(1, 3, 160, 160)
    assert torch.equal(model(image), wrapped(image).logits)
    assert model.pretrained_cfg["label_names"] == ["a", "b", "c"]

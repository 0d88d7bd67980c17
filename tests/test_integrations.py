"""Uses models and folders of this package in other libraries.

Most tests also use another timm model for comparison.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from PIL import Image
from timm.models import save_for_hf
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    DetrConfig,
    DetrForObjectDetection,
    TimmBackboneConfig,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    pipeline,
)

import stvit  # noqa: F401  registers the models in timm
from stvit import hub as hub_module
from stvit.tools import push_to_hub, train_cls
from tests.hub_server import Hub

# Model folders in transformers


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
    for file in ("config.json", "model.safetensors"):  # the files that were checked above
        assert hub.files("org/net")[file] == (tmp_path / "run/best" / file).read_bytes()


def test_arguments_that_are_not_repeated_are_kept(tmp_path: Path) -> None:
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
def test_folders_saved_by_transformers_open_in_timm(name: str, tmp_path: Path) -> None:
    hub_module.save(timm.create_model(name, num_classes=3), tmp_path / "ours", label_names=["a", "b", "c"])
    wrapped = AutoModelForImageClassification.from_pretrained(tmp_path / "ours").eval()
    wrapped.save_pretrained(tmp_path / "theirs")
    model: Any = timm.create_model(f"local-dir:{tmp_path / 'theirs'}", pretrained=True).eval()
    image = torch.randn(1, 3, 160, 160)
    assert torch.equal(model(image), wrapped(image).logits)
    assert model.pretrained_cfg["label_names"] == ["a", "b", "c"]


# Backbones in models of other libraries

BACKBONES = pytest.mark.parametrize("name", ["test_stvit", "test_convnext"])
IMAGES = (2, 3, 64, 96)


def check_trained(backbone: nn.Module, loss: torch.Tensor) -> None:
    """Checks that a loss is finite and that each parameter of the backbone learns from it."""
    assert torch.isfinite(loss)
    loss.backward()
    gradients = {key: value.grad for key, value in backbone.named_parameters() if value.requires_grad}
    assert gradients
    for key, gradient in gradients.items():
        assert gradient is not None and torch.isfinite(gradient).all() and gradient.abs().sum() > 0, key


def timm_config(name: str, *out_indices: int) -> TimmBackboneConfig:
    options: dict[str, Any] = {"out_indices": list(out_indices)}
    return TimmBackboneConfig(backbone=name, **options)


@BACKBONES
def test_detection_in_transformers(name: str) -> None:
    options: dict[str, Any] = {
        "d_model": 32,
        "num_queries": 5,
        "num_labels": 3,
        "backbone_config": timm_config(name, 3),
    }
    for part in ("encoder", "decoder"):
        options |= {f"{part}_layers": 1, f"{part}_ffn_dim": 32, f"{part}_attention_heads": 2}
    model = DetrForObjectDetection(DetrConfig(**options))
    labels = [{"class_labels": torch.tensor([n]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.3]])} for n in range(2)]
    output = model(torch.randn(IMAGES), labels=labels)
    assert output.logits.shape == (2, 5, 4) and output.pred_boxes.shape == (2, 5, 4)
    assert torch.isfinite(output.logits).all() and torch.isfinite(output.pred_boxes).all()
    check_trained(model.model.backbone, output.loss)


@BACKBONES
def test_segmentation_in_transformers(name: str) -> None:
    options: dict[str, Any] = {"hidden_size": 32, "num_labels": 4, "use_auxiliary_head": False}
    model = UperNetForSemanticSegmentation(UperNetConfig(backbone_config=timm_config(name, 0, 1, 2, 3), **options))
    output = model(torch.randn(IMAGES), labels=torch.randint(0, 4, (2, 64, 96)))
    assert output.logits.shape == (2, 4, 64, 96) and torch.isfinite(output.logits).all()
    check_trained(model.backbone, output.loss)


def check_decoder(decoder: str, name: str) -> None:
    model = getattr(smp, decoder)(encoder_name=f"tu-{name}", encoder_weights=None, classes=4)
    masks = model(torch.randn(2, 3, 128, 160))  # smallest size for PAN
    assert masks.shape == (2, 4, 128, 160) and torch.isfinite(masks).all()
    check_trained(model.encoder, nn.functional.cross_entropy(masks, torch.randint(0, 4, (2, 128, 160))))


@pytest.mark.parametrize("name", ["stvit_pico", "test_convnext"])
@pytest.mark.parametrize("decoder", ["Unet", "UPerNet", "FPN"])
def test_segmentation_models_pytorch(decoder: str, name: str) -> None:
    check_decoder(decoder, name)


@pytest.mark.parametrize("name", ["stvit_pico", "test_convnext"])
@pytest.mark.parametrize("decoder", ["DeepLabV3", "DeepLabV3Plus", "PAN"])
def test_dilated_decoders_of_segmentation_models_pytorch(decoder: str, name: str) -> None:
    """These decoders need a backbone with a stride of 8 or 16."""
    check_decoder(decoder, name)

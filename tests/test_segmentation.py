"""Tests the segmentation models on timm backbones."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from stvit import hub
from stvit.adapters import segmentation
from stvit.adapters.folder import save_model
from stvit.weights import PretrainedError

SMALL: dict[str, dict[str, Any]] = {
    "upernet": {"decoder_channels": 32},
    "semantic_fpn": {"decoder_pyramid_channels": 32, "decoder_segmentation_channels": 32},
    "deeplabv3plus": {"decoder_channels": 32},
}
SMP = {"upernet": smp.UPerNet, "semantic_fpn": smp.FPN, "deeplabv3plus": smp.DeepLabV3Plus}
MODELS = pytest.mark.parametrize("name", list(segmentation.BUILDERS))


def create(name: str, backbone: str = "test_stvit", num_classes: int = 4, **kwargs: Any) -> Any:
    return segmentation.BUILDERS[name](backbone, num_classes, **{**SMALL[name], "norm_eval": False, **kwargs})


@MODELS
@pytest.mark.parametrize("backbone", ["test_stvit", "test_convnext", "test_resnet"])
def test_all_parameters_learn_at_any_size(name: str, backbone: str) -> None:
    model = create(name, backbone, auxiliary_head=True)
    logits, auxiliary = model(torch.randn(2, 3, 70, 101))
    assert logits.shape == auxiliary.shape == (2, 4, 70, 101)
    (logits.square().mean() + auxiliary.square().mean()).backward()
    # Dead ReLU channels have gradients of zero, but no parameter is unused.
    assert [key for key, value in model.named_parameters() if value.grad is None] == []
    assert all(torch.isfinite(value.grad).all() for value in model.parameters())
    with torch.no_grad():
        assert model.eval()(torch.randn(1, 3, 33, 40)).shape == (1, 4, 33, 40)


@MODELS
def test_only_upernet_has_an_auxiliary_head_by_default(name: str) -> None:
    output = create(name)(torch.randn(2, 3, 64, 64))
    assert isinstance(output, tuple) == (name == "upernet")


@MODELS
@pytest.mark.parametrize("backbone", ["test_stvit", "test_convnext"])
@torch.no_grad()
def test_outputs_equal_smp(name: str, backbone: str) -> None:
    model = create(name, backbone).eval()
    other = SMP[name](f"tu-{backbone}", encoder_weights=None, classes=4, **SMALL[name]).eval()
    weights = [value for key, value in model.state_dict().items() if not key.startswith("auxiliary_head.")]
    # smp's encoder has the same layers in the same order under other names.
    other.load_state_dict(dict(zip(other.state_dict(), weights, strict=True)))
    images = torch.randn(2, 3, 64, 96)
    torch.testing.assert_close(model(images), other(images), rtol=1e-5, atol=1e-5)
    assert torch.equal(model(images), model(images))


@torch.no_grad()
def test_other_sizes_are_padded_and_cropped() -> None:
    model = create("upernet").eval()
    images = torch.randn(1, 3, 50, 70)
    padded = nn.functional.pad(images, (0, 96 - 70, 0, 64 - 50))
    assert torch.equal(model(images), model(padded)[..., :50, :70])


@torch.no_grad()
def test_channels_last_backbone() -> None:
    """Maps of a Swin are (B, H, W, C) in timm."""
    arguments = {"img_size": 64, "window_size": 2, "embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}
    model = create("upernet", "swin_tiny_patch4_window7_224", backbone_kwargs=arguments).eval()
    images = torch.randn(1, 3, 64, 64)
    features = model.encoder(images)
    wanted = model.net.forward_intermediates(images, indices=[0, 1, 2, 3], intermediates_only=True)
    assert [tuple(y.shape) for y in features[2:]] == [(1, 16, 16, 16), (1, 32, 8, 8), (1, 64, 4, 4), (1, 128, 2, 2)]
    assert all(map(torch.equal, features[2:], wanted))
    assert model(images).shape == (1, 4, 64, 64)
    with pytest.raises(ValueError, match="the backbone swin_tiny_patch4_window7_224 does not accept images of 96x64"):
        model(torch.randn(1, 3, 70, 64))
    # The norm after the last block has no effect on the maps.
    assert not [key for key, _ in model.named_parameters() if key.startswith("encoder.model.net.norm.")]


def test_gray_images_and_statistics() -> None:
    model = create("upernet", in_chans=1).eval()
    assert model(torch.randn(1, 1, 64, 64)).shape == (1, 4, 64, 64)
    assert model.mean == pytest.approx([0.449]) and model.std == pytest.approx([0.226])
    assert create("upernet", mean=[0.5], std=[0.1, 0.2, 0.3]).mean == [0.5] * 3


@pytest.mark.parametrize("stride", [8, 16])
def test_deeplab_has_an_output_stride(stride: int) -> None:
    model = create("deeplabv3plus", output_stride=stride).eval()
    assert model.encoder(torch.randn(1, 3, 64, 64))[-1].shape[-1] == 64 // stride
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 4, 64, 64)


# Weights


@pytest.fixture
def backbone_folder(tmp_path: Path) -> Path:
    hub.save(timm.create_model("test_stvit", num_classes=7), tmp_path / "backbone")
    return tmp_path / "backbone"


def test_pretrained_backbone(backbone_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = create("upernet", pretrained_backbone=backbone_folder)
    wanted = timm.create_model(f"local-dir:{backbone_folder}", pretrained=True).state_dict()
    own = model.net.state_dict()
    assert own and all(torch.equal(value, wanted[key]) for key, value in own.items())
    assert f"Loaded {len(own)}/{len(own)} tensors of the backbone test_stvit" in capsys.readouterr().out
    with pytest.raises(ValueError, match="is a test_stvit checkpoint, but the backbone is stvit_pico"):
        create("upernet", "stvit_pico", pretrained_backbone=backbone_folder)
    save_model(model, backbone_folder.parent / "whole")
    with pytest.raises(
        ValueError, match=r"is a segmentation model \(upernet\), not a classifier; pass a classifier, or "
    ):
        create("upernet", pretrained_backbone=backbone_folder.parent / "whole")


def test_a_saved_model_loads_with_its_arguments(backbone_folder: Path, tmp_path: Path) -> None:
    stoken_size = (4, 2, 1, 1)
    model = create(
        "upernet",
        pretrained_backbone=backbone_folder,
        in_chans=1,
        drop_path_rate=0.2,
        mean=[0.3],
        backbone_kwargs={"stoken_size": stoken_size},
    ).eval()
    save_model(model, tmp_path / "saved", label_names=["a", "b", "c", "d"])
    loaded = segmentation.load(tmp_path / "saved")
    assert not loaded.training and loaded.label_names == ["a", "b", "c", "d"]
    assert loaded.mean == [0.3] and loaded.recipe.args["backbone_kwargs"] == {"stoken_size": list(stoken_size)}
    images = torch.randn(1, 1, 40, 64)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))


def test_load_refuses_other_folders(backbone_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(PretrainedError, match=r"it is a classifier \(test_stvit\); load it with stvit.create_model"):
        segmentation.load(backbone_folder)
    with pytest.raises(PretrainedError, match="no config"):
        segmentation.load(tmp_path)


# Fine-tuning


def test_statistics_are_kept_if_weights_are_loaded(backbone_folder: Path, tmp_path: Path) -> None:
    """As in the detectors. The saved model has the same setting."""
    for source, expected in ((None, False), (backbone_folder, True)):
        model = create("semantic_fpn", pretrained_backbone=source, norm_eval=None)
        assert model.norm_eval is expected
        norms = [module for module in model.net.modules() if isinstance(module, nn.BatchNorm2d)]
        assert norms and all(module.training is not expected for module in norms)
        save_model(model, tmp_path / str(expected))
        assert segmentation.load(tmp_path / str(expected)).norm_eval is expected
    assert create("semantic_fpn", pretrained_backbone=backbone_folder, norm_eval=False).norm_eval is False


def test_frozen_stages_and_batch_norm_do_not_change() -> None:
    model = create("upernet", frozen_stages=2, norm_eval=True)
    norms = {key: value.clone() for key, value in model.net.named_buffers()}
    assert norms
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {key: value.clone() for key, value in model.net.named_parameters()}
    logits, _ = model.train()(torch.randn(2, 3, 64, 64))
    logits.square().sum().backward()
    optimizer.step()
    assert all(torch.equal(value, norms[key]) for key, value in model.net.named_buffers())
    changed = {key for key, value in model.net.named_parameters() if not torch.equal(value, before[key])}
    assert not any(key.startswith(("stem.", "stages.0.", "stages.1.")) for key in changed)
    assert any(key.startswith("stages.2.") for key in changed) and any(key.startswith("stages.3.") for key in changed)
    assert model.decoder.psp.out_conv[1].training


def test_layer_decay_has_one_group_for_the_decoder() -> None:
    model = create("upernet")
    scales = {
        id(parameter): group["lr_scale"]
        for group in param_groups_layer_decay(model, layer_decay=0.5)
        for parameter in group["params"]
    }
    of = {key: scales[id(value)] for key, value in model.named_parameters()}
    heads = ("decoder.", "segmentation_head.", "auxiliary_head.")
    assert {scale for key, scale in of.items() if key.startswith(heads)} == {1.0}
    backbone = [scale for key, scale in of.items() if not key.startswith(heads)]
    assert backbone == sorted(backbone) and backbone[0] < backbone[-1] < 1.0


def test_drop_path_and_gradient_checkpointing() -> None:
    model = create("upernet", drop_path_rate=0.3)
    assert max(getattr(module, "drop_prob", 0.0) or 0.0 for module in model.net.modules()) == pytest.approx(0.3)
    model = create("semantic_fpn")
    images = torch.randn(2, 3, 64, 64)
    gradients = []
    for enable in (False, True):
        torch.manual_seed(0)
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(images).square().mean().backward()
        gradients.append([value.grad.clone() for value in model.net.parameters()])
    assert all(map(torch.allclose, *gradients))


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backbone": "stvit_smal"}, "unknown backbone 'stvit_smal'; did you mean stvit_small"),
        ({"num_classes": 0}, "num_classes must be a whole number of at least 1, got 0"),
        ({"short_side": 0}, "short_side must be a whole number of at least 1, got 0"),
        ({"decoder_chanels": 8}, "upernet has no argument 'decoder_chanels', expected one of decoder_channels, "),
        ({"decoder_channels": -1}, "decoder_channels must be a whole number of at least 1, got -1"),
        ({"activation": "softmax"}, "upernet has no argument 'activation'"),
        ({"backbone_kwargs": {"stoken": 8}}, "cannot create upernet on the backbone test_stvit: .*stoken"),
        (
            {"backbone": "test_vit"},
            "the backbone test_vit has feature maps of strides 16, .*; expected 4, 8, 16, 32: choose a hierarchical",
        ),
        ({"frozen_stages": 5}, "frozen_stages must be from 0 to 4, got 5"),
        ({"mean": [0.1, 0.2]}, "mean must have 1 or 3 values, got 2"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        segmentation.upernet(**{"backbone": "test_stvit", "num_classes": 4, **arguments})


def test_wrong_images() -> None:
    model = create("upernet").eval()
    with pytest.raises(ValueError, match=r"expected images \(B, 3, H, W\), got \(1, 1, 64, 64\)"):
        model(torch.randn(1, 1, 64, 64))


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (
            "mobilenetv3_small_050",
            "needs a backbone with the argument output_stride, which mobilenetv3_small_050 does not",
        ),
        ("test_vit", "the backbone test_vit has feature maps of strides 16, "),
    ],
)
def test_deeplab_says_what_the_backbone_lacks(backbone: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create("deeplabv3plus", backbone)


def test_missing_smp_is_named() -> None:
    code = "import sys; sys.modules['segmentation_models_pytorch'] = None; import stvit.adapters.segmentation"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install 'stvit[segmentation]'" in done.stderr.splitlines()[-1]

"""timm backbones with feature maps, for models of other libraries."""

from pathlib import Path

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch import nn

from stvit import hub
from stvit.adapters.backbone import (
    TimmBackboneMixin,
    create_features,
    create_net,
    freeze_stages,
    image_stats,
    load_backbone,
)

BACKBONES = ["stvit_pico", "convnext_atto", "resnet18", "swin_tiny_patch4_window7_224", "mobilenetv4_conv_small"]


@pytest.mark.parametrize("name", BACKBONES)
def test_feature_maps_of_four_strides(name: str) -> None:
    features = create_features(name).eval()
    with torch.no_grad():
        maps = features(torch.rand(1, 3, 224, 224))
    assert [m.shape[1] for m in maps] == features.channels
    assert (
        [224 // m.shape[2] for m in maps] == [224 // m.shape[3] for m in maps] == features.reductions == [4, 8, 16, 32]
    )


def test_feature_maps_are_those_of_timm() -> None:
    torch.manual_seed(0)
    features = create_features("stvit_pico", in_chans=1, drop_path_rate=0.3).eval()
    torch.manual_seed(0)
    expected = timm.create_model("stvit_pico", in_chans=1, num_classes=0, features_only=True).eval()
    image = torch.rand(2, 1, 75, 107)
    with torch.no_grad():
        for a, b in zip(features(image), expected(image), strict=True):
            torch.testing.assert_close(a, b)


def test_output_stride() -> None:
    assert create_features("stvit_pico", output_stride=16).reductions == [4, 8, 16, 16]


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("stvit_smal", {}, "unknown backbone 'stvit_smal'; did you mean stvit_small"),
        ("vit_tiny_patch16_224", {}, "has feature maps of strides 16, .*choose a hierarchical model"),
        ("stvit_pico", {"depht": 3}, "cannot create the backbone stvit_pico .*depht"),
        ("stvit_pico", {"out_indices": [0, 4]}, "has feature maps 0 to 3"),
        ("stvit_pico", {"out_indices": [1, 0]}, "must be in rising order"),
        ("stvit_pico", {"output_stride": 12}, "output_stride must be 8, 16 or 32"),
    ],
)
def test_wrong_arguments(name: str, kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_features(name, **kwargs)


def test_image_of_a_wrong_size() -> None:
    with pytest.raises(ValueError, match="swin_tiny_patch4_window7_224 does not accept images of 96x96 pixels"):
        create_features("swin_tiny_patch4_window7_224")(torch.rand(1, 3, 96, 96))


def test_image_statistics() -> None:
    mean, std = image_stats(create_net("stvit_pico"), in_chans=1)
    assert mean == pytest.approx([0.449]) and len(std) == 1


def test_pretrained_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(1)
    classifier = timm.create_model("stvit_pico", num_classes=7)
    hub.save(classifier, tmp_path / "model")
    features = create_features("stvit_pico")
    loaded = load_backbone(features.net, "stvit_pico", tmp_path / "model")
    assert loaded == len(features.net.state_dict())
    assert f"Loaded {loaded}/{loaded} tensors of the backbone stvit_pico" in capsys.readouterr().out
    for key, value in features.net.state_dict().items():
        assert torch.equal(value, classifier.state_dict()[key]), key
    with pytest.raises(ValueError, match="is a stvit_pico checkpoint, but the backbone is stvit_nano"):
        load_backbone(create_net("stvit_nano"), "stvit_nano", str(tmp_path / "model"))


class Detector(TimmBackboneMixin, nn.Module):
    backbone_path = "body.net"

    def __init__(self, name: str, norm_eval: bool = False) -> None:
        super().__init__()
        self.body = create_features(name)
        self.head = nn.Linear(8, 8)
        self.norm_eval = norm_eval


@pytest.mark.parametrize("name", BACKBONES)
def test_frozen_stages(name: str) -> None:
    model = Detector(name)
    freeze_stages(model.net, 0)
    assert all(p.requires_grad for p in model.parameters())
    freeze_stages(model.net, 2)
    model.train()
    model.body(torch.rand(2, 3, 224, 224))[-1].mean().backward()
    trained = [key for key, p in model.named_parameters() if p.grad is not None]
    ends = [info["module"] for info in model.net.feature_info if info["reduction"] >= 4]
    assert not any(key.startswith((f"body.net.{ends[0]}.", f"body.net.{ends[1]}.")) for key in trained)
    assert any(key.startswith(f"body.net.{ends[2]}.") for key in trained)
    frozen = model.get_submodule(f"body.net.{ends[1]}")
    assert not any(module.training for module in frozen.modules())
    assert model.head.training
    with pytest.raises(ValueError, match="frozen_stages must be from 0 to 4, got 5"):
        freeze_stages(model.net, 5)


@pytest.mark.parametrize("norm_eval", [False, True])
def test_batch_norm_of_the_backbone(norm_eval: bool) -> None:
    model = Detector("resnet18", norm_eval).train()
    norms = [module for module in model.net.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {module.training for module in norms} == {not norm_eval}
    model.body(torch.rand(2, 3, 64, 64))
    assert {int(module.num_batches_tracked) for module in norms} == {0 if norm_eval else 1}
    assert not any(module.training for module in model.eval().modules())


def test_layer_decay_lowers_the_learning_rate_of_early_layers() -> None:
    model = Detector("stvit_pico")
    optimizer = create_optimizer_v2(model, "adamw", lr=1.0, layer_decay=0.5, weight_decay=0.1)
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    rates = {key: scale[id(p)] for key, p in model.named_parameters()}
    assert rates["head.weight"] == rates["head.bias"] == 1.0
    stem = [rate for key, rate in rates.items() if key.startswith("body.net.stem")]
    last = [rate for key, rate in rates.items() if key.startswith("body.net.stages.3.blocks.0")]
    assert len(set(stem)) == len(set(last)) == 1 and stem[0] < last[0] < 1.0


def test_gradient_checkpointing() -> None:
    model = Detector("stvit_pico")
    model.set_grad_checkpointing()
    assert all(stage.grad_checkpointing for stage in model.net.stages)

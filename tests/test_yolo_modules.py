"""Compares the modules of model files with timm, with the operator and with Ultralytics' modules."""

import copy
import re

import pytest
import timm
import torch
from torch import nn

import stvit
from stvit.adapters.yolo import C2STA, StokenAttention, TimmBackbone
from stvit.adapters.yolo.modules import BackboneBatchNorm2d


@pytest.mark.parametrize(
    "name", ["stvit_pico", "stvit_base", "convnext_atto", "resnet18", "swin_tiny_patch4_window7_224"]
)
def test_backbone_returns_the_features_of_timm_for_normalized_images(name: str) -> None:
    kwargs = {"strict_img_size": False} if name.startswith("swin") else {}
    backbone = TimmBackbone(3, name, [1, 2, 3], kwargs).eval()
    net = timm.create_model(name, features_only=True, out_indices=(1, 2, 3), **kwargs).eval()
    weights = {re.sub(r"[._]", "", key): value for key, value in backbone.net.state_dict().items()}
    net.load_state_dict({key: weights[re.sub(r"[._]", "", key)] for key in net.state_dict()})  # stages.0 or stages_0
    images = torch.rand(2, 3, 64, 96)
    cfg = net.pretrained_cfg if hasattr(net, "pretrained_cfg") else timm.get_pretrained_cfg(name).to_dict()
    mean, std = (torch.tensor(cfg[stat]).reshape(1, 3, 1, 1) for stat in ("mean", "std"))
    with torch.no_grad():
        expected = net((images - mean) / std)
        found = backbone(images)
    assert [x.shape[1] for x in found] == backbone.channels
    for x, y in zip(found, expected, strict=True):
        y = y if y.shape == x.shape else y.permute(0, 3, 1, 2)
        torch.testing.assert_close(x, y)


def test_normalization_is_adapted_to_the_channels() -> None:
    assert TimmBackbone(1, "stvit_pico", [3]).mean.flatten().tolist() == pytest.approx([0.449], abs=1e-3)
    four = TimmBackbone(4, "stvit_pico", [3]).std.flatten().tolist()
    assert four == pytest.approx([0.229, 0.224, 0.225, 0.229])
    assert TimmBackbone(3, "swin_tiny_patch4_window7_224", [3]).state_dict().keys().isdisjoint({"mean", "std"})


def test_batch_normalization_keeps_eps_and_momentum() -> None:
    from ultralytics.utils.torch_utils import initialize_weights

    model = nn.Sequential(TimmBackbone(3, "resnet18", [1]), nn.BatchNorm2d(8))
    initialize_weights(model)
    inside = [module for module in model[0].modules() if isinstance(module, nn.BatchNorm2d)]
    assert inside
    assert all(
        type(module) is BackboneBatchNorm2d and (module.eps, module.momentum) == (1e-5, 0.1) for module in inside
    )
    assert (model[1].eps, model[1].momentum) == (1e-3, 0.03)


@pytest.mark.parametrize("stoken_size", [1, 4, [4, 2]])
def test_stoken_attention_is_the_operator(stoken_size: int | list[int]) -> None:
    row = StokenAttention(96, stoken_size, n_iter=2, num_heads=3, shortcut=False)
    size = tuple(stoken_size) if isinstance(stoken_size, list) else stoken_size
    operator = stvit.SuperTokenAttention(96, size, n_iter=2, num_heads=3, qkv_bias=True)
    operator.load_state_dict(row.attn.state_dict())
    x = torch.randn(2, 96, 10, 12)
    torch.testing.assert_close(row(x), operator(x))


def test_stoken_attention_starts_as_the_identity_and_learns() -> None:
    row = StokenAttention(64)
    x = torch.randn(2, 64, 12, 8)
    torch.testing.assert_close(row(x), x, rtol=0, atol=0)
    row(x).square().sum().backward()
    assert row.attn.proj.weight.grad.abs().sum() > 0
    nn.init.normal_(row.attn.proj.weight)
    expected = x + row.attn(row.norm(x))
    torch.testing.assert_close(row(x), expected)
    assert (expected - x).abs().max() > 0.01


@pytest.mark.parametrize(("dim", "heads"), [(32, 1), (64, 1), (96, 1), (128, 2), (200, 2), (384, 6), (768, 12)])
def test_heads_divide_every_width(dim: int, heads: int) -> None:
    assert StokenAttention(dim).attn.num_heads == heads


def test_c2sta_is_c2psa_with_super_token_attention() -> None:
    from ultralytics.nn.modules import C2PSA

    ours, theirs = C2STA(128, n=2, stoken_size=2), C2PSA(128, 128, n=2)
    assert isinstance(ours, C2PSA)
    assert all(isinstance(block.attn, stvit.SuperTokenAttention) for block in ours.m)
    shared = {key for key in theirs.state_dict() if ".attn." not in key}
    assert {key for key in ours.state_dict() if ".attn." not in key} == shared

    class Whole(nn.Module):  # Ultralytics' C2PSA with our attention put in
        def __init__(self) -> None:
            super().__init__()
            self.block = copy.deepcopy(theirs)

    whole = Whole().block
    for block, own in zip(whole.m, ours.m, strict=True):
        block.attn = copy.deepcopy(own.attn)
    whole.load_state_dict(ours.state_dict())
    x = torch.randn(1, 128, 6, 10)
    torch.testing.assert_close(ours.eval()(x), whole.eval()(x))
    with pytest.raises(ValueError, match="cannot change the number of channels, got c1=64 and c2=128"):
        C2STA(64, 128)


def test_backbone_refuses_unknown_feature_maps_and_arguments() -> None:
    with pytest.raises(ValueError, match=r"out_indices \[4\]: the backbone stvit_pico has feature maps 0 to 3"):
        TimmBackbone(3, "stvit_pico", [4])
    with pytest.raises(ValueError, match="cannot create the backbone stvit_pico with"):
        TimmBackbone(3, "stvit_pico", [3], {"depth": 3})

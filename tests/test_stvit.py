"""Tests the model: published results, checkpoints and the interface of timm."""

import argparse
import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.optim import create_optimizer_v2
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import stvit
from stvit import STViT
from stvit.stvit import checkpoint_filter_fn
from stvit.weights.official import official_key
from tests.golden import fill
from tests.versions import needs_newer_torch

GOLDEN = Path(__file__).parent / "golden"
OFFICIAL_SHAPES: dict[str, dict[str, list[int]]] = json.loads((GOLDEN / "official_keys.json").read_text())
PUBLISHED = ("stvit_small", "stvit_base", "stvit_large")
OURS = ("stvit_femto", "stvit_pico", "stvit_nano", "stvit_tiny", "test_stvit")
KERNELS = (".unfold.weights", ".fold.weights")


def create(name: str = "test_stvit", **kwargs: Any) -> STViT:
    return timm.create_model(name, **kwargs)


def load(file: Path, name: str = "test_stvit", **kwargs: Any) -> STViT:
    """Creates a model from a file. timm applies the checkpoint filter."""
    return create(name, pretrained=True, pretrained_cfg_overlay={"file": str(file)}, **kwargs)


def images(*size: int, batch: int = 2, in_chans: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(fill.image(seed, batch, in_chans, *size))


def assert_parity(actual: torch.Tensor, golden: np.ndarray, std: float) -> None:
    """Compares with a golden tensor, to 1e-4 of its standard deviation.

    The published code has an error of 7e-6.
    """
    assert tuple(actual.shape) == golden.shape
    error = np.abs(actual.detach().numpy() - golden).max()
    assert error <= 1e-4 * std, f"{error / std:.1e} standard deviations"


def assert_close(actual: float, golden: float) -> None:
    """Compares to a relative error of 1e-4 and an absolute error of 1e-6.

    The gradient of a bias before a batch normalization is zero except for rounding.
    """
    assert abs(actual - golden) <= 1e-4 * golden + 1e-6


def to_official(model: STViT) -> dict[str, torch.Tensor]:
    """Returns the weights of a model in the format of the published code."""
    state_dict = {}
    for key, value in model.state_dict().items():
        name = official_key(key)
        state_dict[name] = value.view(1, -1, 1, 1) if ".gamma_" in name else value
    for prefix in {name.split("stoken_refine.")[0] for name in state_dict if "stoken_refine." in name}:
        for kernel in ("unfold.weights", "fold.weights"):
            state_dict[prefix + kernel] = torch.eye(9).view(9, 1, 3, 3)
    return state_dict


def assert_equal_weights(model: STViT, expected: STViT, but: tuple[str, ...] = ()) -> None:
    """Compares all weights except those whose keys start with one of `but`.

    `model` may lack these.
    """
    actual = model.state_dict()
    for key, value in expected.state_dict().items():
        if not key.startswith(but):
            assert torch.equal(actual.pop(key), value), key
    assert all(key.startswith(but) for key in actual)


def train_step(model: STViT, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns the output in training mode and all gradients."""
    x = x.detach().requires_grad_()
    model.train().zero_grad()
    y = model(x)
    (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)).sum().backward()
    gradients = {name.removeprefix("_orig_mod."): p.grad for name, p in model.named_parameters()}
    return {"y": y.detach(), "x": x.grad, **gradients}


# Parity with the published code


@pytest.fixture(scope="module")
def official_small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint in the authors' format with the stvit_small of the golden files."""
    shapes = OFFICIAL_SHAPES["stvit_small"]
    state_dict = {key: torch.from_numpy(np.asarray(fill.draw(key, tuple(shape)))) for key, shape in shapes.items()}
    file = tmp_path_factory.mktemp("official") / "stvit_small.pth"
    torch.save({"model": state_dict}, file)
    return file


def test_golden_evaluation(official_small: Path) -> None:
    golden = np.load(GOLDEN / "stvit_small_224x224.npz")
    model = load(official_small, "stvit_small").eval()
    x = torch.from_numpy(fill.image(int(golden["seed"]), *golden["shape"]))
    with torch.inference_mode():
        features, stages = model.forward_intermediates(x)
        logits = model.forward_head(features)
        assert torch.equal(logits, model(x))
    assert_parity(logits, golden["logits"], golden["logits"].std())
    assert len(stages) == 4
    for i, stage in enumerate(stages):
        assert tuple(stage.shape) == tuple(golden[f"stage{i}_shape"])
        flat = stage.reshape(len(x), -1)
        sample = flat[:, :: max(1, flat.shape[1] // 512)][:, :512]
        assert_parity(sample, golden[f"stage{i}_sample"], float(golden[f"stage{i}_std"]))


def test_golden_training(official_small: Path) -> None:
    golden = np.load(GOLDEN / "stvit_small_train_96x96.npz")
    model = load(official_small, "stvit_small").train()
    x = torch.from_numpy(fill.image(int(golden["seed"]), *golden["shape"])).requires_grad_()
    logits = model(x)
    loss = nn.functional.cross_entropy(logits, torch.arange(len(x)) * 7)
    loss.backward()
    assert_parity(logits, golden["logits"], golden["logits"].std())
    assert_close(loss.item(), float(golden["loss"]))
    assert_close(x.grad.norm().item(), float(golden["x_grad_norm"]))
    norms = {official_key(name): p.grad.norm().item() for name, p in model.named_parameters()}
    assert len(norms) == 354 and set(norms) == set(golden["names"])
    for name, norm in zip(golden["names"], golden["grad_norms"], strict=True):
        assert_close(norms[name], norm)


# Checkpoints


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_official_key_is_used(name: str) -> None:
    weights = {}
    for key, shape in OFFICIAL_SHAPES[name].items():
        dtype = torch.int64 if key.endswith("num_batches_tracked") else torch.float32
        weights[key] = torch.zeros((), dtype=dtype).expand(shape)  # takes no memory
        if key.endswith(KERNELS):
            weights[key] = torch.eye(9).view(shape)
    model = create(name, device="meta")
    expected = {key: (value.shape, value.dtype) for key, value in model.state_dict().items()}
    loaded = checkpoint_filter_fn(dict(weights), model)
    assert {key: (value.shape, value.dtype) for key, value in loaded.items()} == expected
    assert {official_key(key) for key in expected} == {key for key in weights if not key.endswith(KERNELS)}
    assert len({official_key(key) for key in expected}) == len(expected)
    key = next(key for key in weights if key.endswith("3.blocks.0.norm2.running_var"))
    del weights[key]
    with pytest.raises(RuntimeError, match=f"missing key {key}"):
        checkpoint_filter_fn(weights, model)


@pytest.fixture(scope="module")
def source() -> STViT:
    """Model with random weights and statistics, and with every kind of parameter."""
    model = create(ls_init_values=(None, None, 0.5, 0.5)).train()
    model(images(64, 64))
    return model.eval()


@pytest.fixture
def official(source: STViT) -> dict[str, torch.Tensor]:
    return to_official(source)


LAYER_SCALE = {"ls_init_values": (None, None, 1e-6, 1e-6)}


@pytest.mark.parametrize(
    "form",
    [
        lambda weights, other: {"model": weights},
        lambda weights, other: {"model_ema": weights, "model": other},
        lambda weights, other: {"state_dict": weights, "epoch": 3},
        lambda weights, other: {"model": weights, "optimizer": {}, "args": argparse.Namespace(model="stvit")},
        lambda weights, other: weights,
        lambda weights, other: {"model": {f"module.{key}": value for key, value in weights.items()}},
    ],
    ids=["model", "model_ema", "state_dict", "args", "bare", "distributed"],
)
@pytest.mark.parametrize("ours", [False, True], ids=["official", "ours"])
def test_checkpoint_forms(
    ours: bool, form: Callable[..., dict[str, Any]], source: STViT, official: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    weights = source.state_dict() if ours else official
    torch.save(form(weights, {key: 2 * value for key, value in weights.items()}), tmp_path / "weights.pth")
    assert_equal_weights(load(tmp_path / "weights.pth", **LAYER_SCALE), source)


@pytest.mark.parametrize("ours", [False, True], ids=["official", "ours"])
def test_safetensors(ours: bool, source: STViT, official: dict[str, torch.Tensor], tmp_path: Path) -> None:
    weights = source.state_dict() if ours else official
    save_file({key: value.clone() for key, value in weights.items()}, tmp_path / "weights.safetensors")
    assert_equal_weights(load(tmp_path / "weights.safetensors", **LAYER_SCALE), source)


@pytest.mark.parametrize("wrapper", ["model_ema", "model", None])
def test_filter_function_unwraps(wrapper: str | None, source: STViT, official: dict[str, torch.Tensor]) -> None:
    given = dict(official)
    weights = checkpoint_filter_fn({"model": {}, wrapper: official} if wrapper else official, source)
    assert given.keys() == official.keys()  # the caller's state dict is unchanged
    model = create(**LAYER_SCALE)
    model.load_state_dict(weights)
    assert_equal_weights(model, source)


def test_checkpoint_path(source: STViT, official: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """timm applies no filter to checkpoint_path.

    Our checkpoints load, those of the authors are refused.
    """
    torch.save(source.state_dict(), tmp_path / "ours.pth")
    assert_equal_weights(create(checkpoint_path=str(tmp_path / "ours.pth"), **LAYER_SCALE), source)
    torch.save({"model": official}, tmp_path / "official.pth")
    with pytest.raises(RuntimeError, match=r"pretrained=True, pretrained_cfg_overlay=dict\(file="):
        create(checkpoint_path=str(tmp_path / "official.pth"), **LAYER_SCALE)


def without(key: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda weights: weights.__delitem__(key)


def with_shape(key: str, *shape: int) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda weights: weights.update({key: torch.zeros(shape)})


@pytest.mark.parametrize("num_classes", [1000, 10])  # with 10 classes, timm alone ignores mismatched keys
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("layers.1.blocks.0.mlp2.fc1.bias"), r"missing key layers\.1\.blocks\.0\.mlp2\.fc1\.bias"),
        (without("layers.3.blocks.0.gamma_1"), r"missing key layers\.3\.blocks\.0\.gamma_1"),
        (without("norm.running_var"), r"missing key norm\.running_var"),
        (without("patch_embed.proj.0.weight"), r"missing key patch_embed\.proj\.0\.weight"),
        (with_shape("layers.1.blocks.1.mlp2.fc1.bias", 128), r"unexpected key layers\.1\.blocks\.1\.mlp2\.fc1\.bias"),
        (with_shape("relative_position", 1), "unexpected key relative_position"),
        (with_shape("proj.weight", 64, 128, 1, 1), r"proj\.weight .*\(64, 128, 1, 1\).*\(128, 64, 1, 1\)"),
        (with_shape("layers.3.blocks.0.gamma_1", 1, 32, 1, 1), r"layers\.3\.blocks\.0\.gamma_1 .*\(32,\).*\(64,\)"),
        (with_shape("patch_embed.proj.0.weight", 16, 3, 7, 7), r"patch_embed\.proj\.0\.weight .*7, 7.*3, 3"),
        (with_shape("layers.0.blocks.0.attn.fold.weights", 9, 1, 3, 3), r"layers\.0\.blocks\.0\.attn\.fold\.weights"),
        (with_shape("layers.1.blocks.0.attn.unfold.weights", 9, 1, 3, 3), r"layers\.1\.\S*\.unfold\.weights"),
        (with_shape("layers.0.blocks.0.attn.fold.weights", 9, 1, 5, 5), r"layers\.0\.blocks\.0\.attn\.fold\.weights"),
    ],
)
def test_weights_that_do_not_fit(
    change: Callable[[dict[str, torch.Tensor]], None],
    message: str,
    num_classes: int,
    official: dict[str, torch.Tensor],
    tmp_path: Path,
) -> None:
    change(official)
    torch.save({"model": official}, tmp_path / "weights.pth")
    with pytest.raises(RuntimeError, match=message):
        load(tmp_path / "weights.pth", num_classes=num_classes, **LAYER_SCALE)


@pytest.mark.parametrize("num_classes", [1000, 10])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("stages.1.blocks.0.mlp.fc1.bias"), r"missing key stages\.1\.blocks\.0\.mlp\.fc1\.bias"),
        (with_shape("extra", 1), "unexpected key extra"),
        (with_shape("final_conv.bias", 3), r"final_conv\.bias .*\(3,\).*\(128,\)"),
    ],
)
def test_own_weights_that_do_not_fit(
    change: Callable[[dict[str, torch.Tensor]], None], message: str, num_classes: int, source: STViT, tmp_path: Path
) -> None:
    weights = dict(source.state_dict())
    change(weights)
    torch.save(weights, tmp_path / "weights.pth")
    with pytest.raises(RuntimeError, match=message):
        load(tmp_path / "weights.pth", num_classes=num_classes, **LAYER_SCALE)


def test_missing_classifier(official: dict[str, torch.Tensor], tmp_path: Path) -> None:
    del official["head.weight"]
    torch.save(official, tmp_path / "weights.pth")
    with pytest.raises(RuntimeError, match=r"missing key head\.weight"):
        load(tmp_path / "weights.pth", **LAYER_SCALE)


def test_weights_of_another_variant(official: dict[str, torch.Tensor], tmp_path: Path) -> None:
    torch.save(official, tmp_path / "weights.pth")
    for name, kwargs in (("stvit_pico", LAYER_SCALE), ("test_stvit", {})):
        with pytest.raises(RuntimeError, match="check that the variant is right"):
            load(tmp_path / "weights.pth", name, **kwargs)


@pytest.mark.parametrize("kwargs", [{"num_classes": 10}, {"num_classes": 0}, {"in_chans": 1}, {"in_chans": 4}], ids=str)
def test_fine_tuning_from_official_weights(
    kwargs: dict[str, int], source: STViT, official: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    torch.save({"model": official}, tmp_path / "weights.pth")
    model = load(tmp_path / "weights.pth", **kwargs, **LAYER_SCALE)
    assert_equal_weights(model, source, but=("stem.0.weight",) if "in_chans" in kwargs else ("head.fc.",))
    weight, rgb = model.stem[0].weight, source.stem[0].weight
    if model.in_chans == 1:
        torch.testing.assert_close(weight, rgb.sum(dim=1, keepdim=True))
    if model.in_chans == 4:
        torch.testing.assert_close(weight, 0.75 * torch.cat([rgb, rgb[:, :1]], dim=1))
    y = model(images(64, 64, in_chans=model.in_chans))
    assert y.shape == (2, kwargs.get("num_classes", 1000) or 128)


def test_features_only_from_official_weights(source: STViT, official: dict[str, torch.Tensor], tmp_path: Path) -> None:
    torch.save({"model": official}, tmp_path / "weights.pth")
    backbone = load(tmp_path / "weights.pth", features_only=True, **LAYER_SCALE).eval()
    x = images(64, 96)
    for actual, expected in zip(backbone(x), source.forward_intermediates(x, intermediates_only=True), strict=True):
        assert torch.equal(actual, expected)


# Variants


@pytest.mark.parametrize(
    ("name", "params", "gmacs", "published_gmacs"),
    [
        ("stvit_small", 25.5, 4.34, 4.4),
        ("stvit_base", 51.7, 9.82, 9.9),
        ("stvit_large", 95.0, 15.54, 15.6),
        ("stvit_femto", 1.03, 0.18, None),
        ("stvit_pico", 2.13, 0.39, None),
        ("stvit_nano", 5.16, 0.82, None),
        ("stvit_tiny", 11.87, 2.29, None),
        ("test_stvit", 0.35, 0.15, None),
    ],
)
def test_size(name: str, params: float, gmacs: float, published_gmacs: float | None) -> None:
    model = create(name, device="meta").eval()
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert round(count, 1 if name in PUBLISHED else 2) == params
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 224, 224, device="meta"))
    macs = counter.get_total_flops() / 2e9
    assert round(macs, 2) == gmacs
    if published_gmacs is not None:  # the published number includes element-wise operations
        assert macs == pytest.approx(published_gmacs, rel=0.015)


@pytest.mark.parametrize(
    ("name", "dims", "depths", "heads"),
    [
        ("stvit_small", (64, 128, 320, 512), (3, 5, 9, 3), (1, 2, 5, 8)),
        ("stvit_base", (96, 192, 384, 512), (4, 6, 14, 6), (2, 3, 6, 8)),
        ("stvit_large", (96, 192, 448, 640), (4, 7, 19, 8), (2, 3, 7, 10)),
    ],
)
def test_published_variants(name: str, dims: tuple[int, ...], depths: tuple[int, ...], heads: tuple[int, ...]) -> None:
    model = create(name, device="meta")
    assert tuple(info["num_chs"] for info in model.feature_info) == dims
    assert tuple(len(stage.blocks) for stage in model.stages) == depths
    for i, (stage, size) in enumerate(zip(model.stages, (8, 4, 1, 1), strict=True)):
        for block in stage.blocks:
            assert block.attn.num_heads == heads[i]
            assert block.attn.stoken_size == (size, size) and block.attn.n_iter == 1
            assert block.mlp.fc1.weight.shape == (4 * dims[i], dims[i], 1, 1)
    assert model.num_features == model.head_hidden_size == 1024
    assert isinstance(model.final_norm, nn.BatchNorm2d) and isinstance(model.final_act, nn.SiLU)


@pytest.mark.parametrize("name", PUBLISHED)
def test_layer_scale(name: str) -> None:
    """The model is built on the CPU, because the test compares values."""
    model = create(name, depths=(1, 1, 1, 1))
    scales = {key: value for key, value in model.state_dict().items() if key.endswith(".gamma")}
    stages = (2, 3) if name != "stvit_small" else ()
    assert set(scales) == {f"stages.{i}.blocks.0.ls{j}.gamma" for i in stages for j in (1, 2)}
    for key, value in scales.items():
        assert torch.equal(value, torch.full((model.feature_info[int(key[7])]["num_chs"],), 1e-6))


@pytest.mark.parametrize("name", OURS)
def test_head_widths_of_own_variants(name: str) -> None:
    model = create(name, device="meta")
    widths = {(block.attn.dim, block.attn.num_heads) for stage in model.stages for block in stage.blocks}
    assert {dim / heads for dim, heads in widths} <= {32, 64}
    assert model.num_features == model.head_hidden_size == model.final_conv.out_channels


def test_stage_without_blocks() -> None:
    """Stage 0 of femto returns the output of the stem."""
    model = create("stvit_femto", drop_path_rate=0.1)
    x = images(64, 96)
    assert torch.equal(model.eval().forward_intermediates(x, intermediates_only=True)[0], model.stem(x))
    expected = model(x)
    for other in (torch.jit.script(model), stvit.optimize_for_inference(model)):
        assert torch.allclose(other(x), expected, atol=1e-5)
    model.set_grad_checkpointing()
    model.train()(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_normalization_constants() -> None:
    """Golden files do not reliably show another epsilon or momentum."""
    model = create(device="meta")
    eps = {(type(m).__name__, m.eps) for m in model.modules() if hasattr(m, "eps")}
    assert eps == {("BatchNorm2d", 1e-5), ("LayerNorm2d", 1e-6)}
    assert {m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {0.1}


# timm's interface


def test_registration() -> None:
    assert set(timm.list_models(module="stvit")) == {*PUBLISHED, *OURS}
    assert set(timm.list_models("stvit*")) == {*PUBLISHED, *OURS} - {"test_stvit"}
    assert all(timm.is_model(name) for name in (*PUBLISHED, *OURS))


def test_timm_offers_published_weights_only() -> None:
    tags = {f"{name}.{tag}" for name in PUBLISHED for tag in ("in1k", "in1k_384")} | {"stvit_pico.cifar10"}
    assert {name for name in timm.list_pretrained() if name.split(".")[0] in (*PUBLISHED, *OURS)} == tags
    assert set(timm.list_models(module="stvit", pretrained=True)) == tags
    assert [name for name in (*PUBLISHED, *OURS) if timm.is_model_pretrained(name)] == list(PUBLISHED)


@pytest.mark.parametrize("name", (*PUBLISHED, *OURS))
def test_pretrained_cfg(name: str) -> None:
    tags = ["in1k", "in1k_384"] if name in PUBLISHED else ["in1k"]
    for tag in tags:
        cfg = create(f"{name}.{tag}", device="meta").pretrained_cfg
        data = timm.data.resolve_data_config(pretrained_cfg=cfg)
        size = {"in1k": 224, "in1k_384": 384}[tag] if name != "test_stvit" else 160
        assert cfg["tag"] == tag and cfg["num_classes"] == 1000
        assert data["input_size"] == (3, size, size) and cfg["pool_size"] == (size // 32, size // 32)
        assert data["crop_pct"] == (1.0 if tag == "in1k_384" else 0.875) and data["interpolation"] == "bicubic"
        assert data["mean"] == (0.485, 0.456, 0.406) and data["std"] == (0.229, 0.224, 0.225)
        assert (cfg["first_conv"], cfg["classifier"]) == ("stem.0", "head.fc")
        assert cfg.get("hf_hub_id") == (f"stvit/{name}.{tag}" if name in PUBLISHED else None)
        assert cfg["hf_hub_filename"] == "model.safetensors"
    assert create(name, device="meta").pretrained_cfg["tag"] == "in1k"
    with pytest.raises(RuntimeError, match=r"Invalid pretrained tag \(in22k\)"):
        create(f"{name}.in22k")


def test_unknown_keyword() -> None:
    with pytest.raises(TypeError, match="stoken_sizes"):
        create(stoken_sizes=4)


@pytest.mark.parametrize("feature_cls", ["list", "dict", "hook", "getter", "fx"])
@pytest.mark.parametrize("out_indices", [(0,), (1, 3), (-1,), (0, 1, 2, 3)], ids=str)
def test_features_only(feature_cls: str, out_indices: tuple[int, ...]) -> None:
    model = create(features_only=True, feature_cls=feature_cls, out_indices=out_indices).eval()
    stages = [i % 4 for i in out_indices]
    strides, dims = [(4, 8, 16, 32)[i] for i in stages], [(32, 32, 64, 64)[i] for i in stages]
    assert model.feature_info.reduction() == strides and model.feature_info.channels() == dims
    maps = model(images(64, 96))
    maps = list(maps.values()) if isinstance(maps, dict) else maps
    assert [f.shape for f in maps] == [(2, dim, 64 // s, 96 // s) for s, dim in zip(strides, dims, strict=True)]


@pytest.mark.parametrize("feature_cls", ["list", "getter"])
def test_script_features_only(feature_cls: str) -> None:
    model = create(features_only=True, feature_cls=feature_cls, out_indices=(1, 3)).eval()
    scripted = torch.jit.script(model)
    for size in ((64, 64), (75, 40)):
        x = images(*size)
        torch.testing.assert_close(list(scripted(x)), list(model(x)))


@pytest.mark.parametrize("output_stride", [8, 16, 32])
@pytest.mark.parametrize("name", ["test_stvit", "test_convnext", "resnet18"])
def test_output_stride(name: str, output_stride: int) -> None:
    model = create(name, features_only=True, output_stride=output_stride).eval()
    strides = [min(stride, output_stride) for stride in (4, 8, 16, 32)]
    assert model.feature_info.reduction()[-4:] == strides
    for height, width in ((64, 96), (75, 50)):
        maps = model(images(height, width))[-4:]
        if name == "test_stvit" or height == 64:  # test_convnext rounds other sizes down
            assert [tuple(f.shape[2:]) for f in maps] == [(-(-height // s), -(-width // s)) for s in strides]


@pytest.mark.parametrize("output_stride", [8, 16])
def test_output_stride_keeps_the_outputs_of_convolutions(output_stride: int) -> None:
    """Compares the pixels that dilated and plain maps share, without attention."""
    plain, dilated = create().eval(), create(output_stride=output_stride).eval()
    for name, p in plain.named_parameters():
        if ".attn.proj." in name:
            nn.init.zeros_(p)
    dilated.load_state_dict(plain.state_dict())
    for size in ((64, 96), (75, 50)):
        x = images(*size)
        with torch.inference_mode():
            coarse, fine = (model.forward_intermediates(x, intermediates_only=True) for model in (plain, dilated))
        for stride, expected, actual in zip((4, 8, 16, 32), coarse, fine, strict=True):
            step = max(1, stride // output_stride)
            torch.testing.assert_close(actual[:, :, ::step, ::step], expected, rtol=1e-4, atol=1e-5)


def test_output_stride_trains_and_scripts() -> None:
    model = create(output_stride=8, num_classes=3)
    x = images(75, 50)
    model(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))


def test_backend_reaches_every_block() -> None:
    model = create(backend="reference", features_only=True)
    attentions = [module for module in model.modules() if isinstance(module, stvit.SuperTokenAttention)]
    assert [module.backend for module in attentions] == ["reference"] * 4
    assert {block.attn.backend for stage in create().stages for block in stage.blocks} == {"auto"}


@pytest.mark.parametrize("indices", [0, 5, -1, [4], [0, -5]], ids=str)
def test_forward_intermediates_refuses_other_stages(indices: int | list[int]) -> None:
    with pytest.raises(ValueError, match=rf"indices.*{indices if isinstance(indices, int) else indices[-1]}"):
        create().forward_intermediates(images(32, 32), indices=indices)


def test_prune_intermediate_layers() -> None:
    model = create().eval()
    x = images(64, 64)
    expected = model.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
    assert model.prune_intermediate_layers([0, 1]) == [0, 1]
    assert len(model.stages) == 2 and not any(name.startswith(("final_", "head.")) for name in model.state_dict())
    for actual, before in zip(model.forward_intermediates(x, [0, 1], intermediates_only=True), expected, strict=True):
        assert torch.equal(actual, before)


def test_rates() -> None:
    model = create("stvit_pico", drop_rate=0.1, attn_drop_rate=0.2, proj_drop_rate=0.3, drop_path_rate=0.6)
    blocks = [block for stage in model.stages for block in stage.blocks]
    for block in blocks:
        assert block.attn.attn_drop.p == 0.2
        assert block.attn.proj_drop.p == block.mlp.drop1.p == block.mlp.drop2.p == 0.3
    for paths in ([block.drop_path1 for block in blocks], [block.drop_path2 for block in blocks]):
        rates = [getattr(path, "drop_prob", 0.0) for path in paths]
        assert rates == pytest.approx(np.linspace(0, 0.6, 7))
    dropouts = [m.p for name, m in model.head.named_modules() if isinstance(m, nn.Dropout)]
    assert (dropouts or [model.head.drop_rate]) == [0.1]
    x = images(64, 64)
    assert not torch.equal(model.train()(x), model(x)) and torch.equal(model.eval()(x), model(x))


def test_layers() -> None:
    model = create(act_layer="relu", norm_layer="layernorm2d", attn_norm_layer="batchnorm2d")
    types = {name: type(m).__name__ for name, m in model.named_modules()}
    acts = {t for name, t in types.items() if name.endswith(".act.act") or name in ("stem.1.act", "stem.7.act")}
    assert acts == {"ReLU"}
    assert types["final_act"] == "SiLU" and "GELU" not in types.values()
    norms = {name: t for name, t in types.items() if "Norm" in t}
    assert {t for name, t in norms.items() if name.endswith("norm1")} == {"BatchNorm2d"}
    assert {t for name, t in norms.items() if not name.endswith("norm1")} == {"LayerNorm2d"}
    assert model(images(64, 64)).shape == (2, 1000)


@pytest.mark.parametrize(
    ("kwargs", "stoken_size", "n_iter"),
    [
        ({"stoken_size": 2}, [(2, 2)] * 4, [1] * 4),
        ({"stoken_size": (4, 3, 2, 1)}, [(4, 4), (3, 3), (2, 2), (1, 1)], [1] * 4),
        ({"stoken_size": [[4, 2], 3, (1, 2), 1]}, [(4, 2), (3, 3), (1, 2), (1, 1)], [1] * 4),
        ({"n_iter": 2}, [(8, 8), (4, 4), (1, 1), (1, 1)], [2] * 4),
        ({"n_iter": (3, 2, 1, 1)}, [(8, 8), (4, 4), (1, 1), (1, 1)], [3, 2, 1, 1]),
    ],
    ids=str,
)
def test_attention_overrides(kwargs: dict[str, Any], stoken_size: list[tuple[int, int]], n_iter: list[int]) -> None:
    model = create(**kwargs).eval()
    assert [stage.blocks[0].attn.stoken_size for stage in model.stages] == stoken_size
    assert [stage.blocks[0].attn.n_iter for stage in model.stages] == n_iter
    default = create().eval()
    default.load_state_dict(model.state_dict())
    x = images(64, 96)
    assert model(x).shape == (2, 1000) and not torch.allclose(model(x), default(x))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"stoken_size": (8, 4)}, r"stoken_size.*4 stages.*\(8, 4\)"),
        ({"stoken_size": (8, 4, (1, 1, 1), 1)}, r"stoken_size.*\(1, 1, 1\)"),
        ({"stoken_size": (8, 4, 0, 1)}, r"stoken_size.*\b0"),
        ({"n_iter": (1, 1, 1)}, r"n_iter.*4 stages.*\(1, 1, 1\)"),
        ({"n_iter": 0}, r"n_iter.*\b0\b"),
        ({"depths": (1, 1)}, r"depths.*4 stages.*\(1, 1\)"),
        ({"num_heads": (1, 1, 5, 2)}, r"num_heads.*\b5\b"),
        ({"ls_init_values": (None, 1e-6)}, r"ls_init_values.*4 stages.*\(None, 1e-06\)"),
        ({"output_stride": 4}, r"output_stride must be 8, 16 or 32, got 4"),
        ({"backend": "cuda"}, r"backend must be one of .*'cuda'"),
    ],
    ids=str,
)
def test_overrides_that_do_not_fit(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create(**kwargs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_dtype(dtype: torch.dtype) -> None:
    model = create(dtype=dtype, **LAYER_SCALE).eval()
    assert {value.dtype for value in model.state_dict().values() if value.is_floating_point()} == {dtype}
    y = model(images(64, 64).to(dtype))
    assert y.dtype == dtype and y.isfinite().all()


def test_initialization_after_meta_device() -> None:
    model = create(device="meta", **LAYER_SCALE)
    assert all(value.is_meta for value in model.state_dict().values())
    model.to_empty(device="cpu")
    for value in model.state_dict().values():
        value.fill_(float("nan") if value.is_floating_point() else -1)
    model.init_weights()
    assert all(value.isfinite().all() for value in model.state_dict().values())
    # Values that are not random equal those of a model created on the CPU.
    random = {name for name, p in model.named_parameters() if name.endswith((".weight", ".bias")) and p.std() > 0}
    expected = create(**LAYER_SCALE).state_dict()
    for name, value in model.state_dict().items():
        assert name in random or torch.equal(value, expected[name]), name
    for name in random:
        assert torch.allclose(model.state_dict()[name].std(), expected[name].std(), rtol=0.6), name
    assert 0.019 < model.head.fc.weight.std() < 0.021 and not model.head.fc.bias.any()


def test_heads() -> None:
    x = images(64, 96)
    model = create(num_classes=7).eval()
    features = model.forward_features(x)
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, features.mean((2, 3)))
    torch.testing.assert_close(model(x), pooled @ model.head.fc.weight.T + model.head.fc.bias)
    assert model.get_classifier() is model.head.fc and model.get_classifier().out_features == 7

    assert torch.equal(create_like(model, num_classes=0)(x), pooled)
    assert torch.equal(create_like(model, num_classes=0, global_pool="")(x), features)
    both = create_like(model, num_classes=0, global_pool="catavgmax")
    torch.testing.assert_close(both(x), torch.cat([features.mean((2, 3)), features.amax((2, 3))], dim=1))
    assert create(num_classes=7, global_pool="catavgmax")(x).shape == (2, 7)
    assert create(in_chans=1)(x[:, :1]).shape == (2, 1000)


def create_like(model: STViT, **kwargs: Any) -> STViT:
    """Creates a model with the weights of `model`, except the classifier."""
    other = create(**kwargs).eval()
    other.load_state_dict({key: value for key, value in model.state_dict().items() if not key.startswith("head.fc")})
    return other


def test_reset_classifier() -> None:
    x = images(64, 64)
    model = create(dtype=torch.float64)
    for num_classes, pool, shape in [
        (5, None, (2, 5)),
        (5, "catavgmax", (2, 5)),
        (0, None, (2, 256)),
        (3, "avg", (2, 3)),
    ]:
        model.reset_classifier(num_classes, pool)
        assert model.num_classes == num_classes
        assert model.head_hidden_size == (256 if (num_classes, pool) in ((5, "catavgmax"), (0, None)) else 128)
        assert model(x.double()).shape == shape
    model.reset_classifier(0, "")
    assert model(x.double()).shape == (2, 128, 2, 2)


@pytest.mark.parametrize("coarse", [False, True])
def test_group_matcher(coarse: bool) -> None:
    model = create("stvit_pico", device="meta", **LAYER_SCALE)
    groups = timm.models.group_parameters(model, model.group_matcher(coarse=coarse))
    depth = {name: group for group, names in groups.items() for name in names}
    names = [name for name, _ in model.named_parameters()]
    assert set(depth) == set(names)
    assert [depth[name] for name in names] == sorted(depth.values())  # groups are ordered by depth
    units = ["stem", *(f"stages.{i}" for i in range(4)), "head"]
    if not coarse:
        units[1:5] = [f"stages.{i}.blocks.{j}" for i, d in enumerate((1, 2, 3, 1)) for j in range(d)]
    assert len({depth[next(name for name in names if name.startswith(unit))] for unit in units}) == len(units)
    assert depth["final_conv.weight"] == depth["final_norm.weight"]


def test_parameter_groups_of_the_optimizer() -> None:
    model = create(**LAYER_SCALE)
    assert model.no_weight_decay() == set()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: decay[id(p)] for name, p in model.named_parameters()} == {
        name: 0.05 if p.ndim > 1 else 0.0 for name, p in model.named_parameters()
    }
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.75)
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    scales = [scale[id(p)] for p in model.parameters()]
    assert scales == sorted(scales) and scales[-1] == 1.0 and scales[0] <= 0.75**5


def test_grad_checkpointing() -> None:
    model = create()
    x = images(64, 64)
    expected = train_step(model, x)
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    for stage in model.stages:
        stage.blocks[0].cpe.register_forward_pre_hook(count)
    model.set_grad_checkpointing()
    for name, actual in train_step(model, x).items():
        torch.testing.assert_close(actual, expected[name], rtol=1e-4, atol=1e-5)
    assert calls == 8  # once forward and once backward
    model.set_grad_checkpointing(False)
    train_step(model, x)
    assert calls == 12


def test_copies() -> None:
    model = create(**LAYER_SCALE).eval()
    x = images(64, 64)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(x), model(x))


def test_images_do_not_mix() -> None:
    model = create().eval()
    x = images(64, 96)
    torch.testing.assert_close(model(x), torch.cat([model(x[:1]), model(x[1:])]))


@pytest.mark.parametrize("size", [(1, 1), (32, 32), (33, 57), (225, 161)], ids=str)
def test_sizes(size: tuple[int, int]) -> None:
    model = create().eval()
    x = images(*size)
    features, maps = model.forward_intermediates(x)
    assert [f.shape[2:] for f in maps] == [(-(-size[0] // s), -(-size[1] // s)) for s in (4, 8, 16, 32)]
    assert features.shape[2:] == maps[-1].shape[2:]
    y = model(x)
    assert y.shape == (2, 1000) and y.isfinite().all()


def test_channels_last() -> None:
    model = create().eval()
    x = images(75, 64)
    expected = model(x)
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), expected, rtol=1e-5, atol=1e-5)


# Compilation and export


@pytest.mark.timeout(300)
def test_compile() -> None:
    torch._dynamo.reset()
    model = create()
    x = images(64, 64)
    expected = train_step(model, x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for name, actual in train_step(compiled, x).items():
        torch.testing.assert_close(actual, expected[name], rtol=1e-3, atol=1e-4)
    with torch.compiler.set_stance("fail_on_recompile"):
        train_step(compiled, x)


OTHER_SIZES = [(1, 64, 64), (3, 75, 50), (2, 130, 97)]


def make_exportable() -> tuple[STViT, torch.Tensor]:
    return create().eval(), images(96, 80)


@needs_newer_torch
@pytest.mark.timeout(300)
@pytest.mark.long
@pytest.mark.parametrize("named", [True, False], ids=["Dim", "Dim.AUTO"])
def test_export(named: bool) -> None:
    model, x = make_exportable()
    dims = dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO)
    if named:
        dims = {0: torch.export.Dim("batch", min=1)}
        dims |= {2: torch.export.Dim("height", min=33), 3: torch.export.Dim("width", min=33)}
    exported = torch.export.export(model, (x,), dynamic_shapes=(dims,), strict=False).module()
    for batch, *size in OTHER_SIZES:
        x = images(*size, batch=batch)
        torch.testing.assert_close(exported(x), model(x))


@pytest.mark.long
@pytest.mark.timeout(300)
def test_onnx(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model, x = make_exportable()
    dims = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    file = tmp_path / "model.onnx"
    torch.onnx.export(model, (x,), file, dynamo=True, dynamic_shapes=(dims,), input_names=["x"])
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for batch, *size in OTHER_SIZES:
        x = images(*size, batch=batch)
        (y,) = session.run(None, {"x": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), model(x), rtol=0, atol=1e-5)

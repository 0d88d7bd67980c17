"""Tests that all readers of weights remove key prefixes.

Lightning and wrappers of PyTorch add these prefixes.
"""

import logging
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

import stvit
from stvit.adapters.yolo import YOLO
from stvit.tools import convert_checkpoint, export, train_cls, validate_cls, visualize
from stvit.weights.official import find_variant, official_key
from stvit.weights.prefix import strip_prefix, tensor_names

PREFIXES = ["model.", "module.", "_orig_mod.", "backbone.", "net.", "ema.module.", "model._orig_mod.module.", "a.b.c."]
LEFT_OUT = {"criterion.weight": torch.ones(4), "accuracy.tp": torch.tensor(3)}


def lightning(path: Path, weights: dict[str, torch.Tensor], prefix: str = "model.") -> Path:
    """Writes a checkpoint like Lightning 2.6.

    The module has a model, a loss and a metric.
    """
    state_dict = OrderedDict({**{f"{prefix}{key}": value for key, value in weights.items()}, **LEFT_OUT})
    progress = {"total": {"ready": 2, "completed": 2}, "current": {"ready": 2, "completed": 2}}
    checkpoint = {
        "epoch": 1,
        "global_step": 2,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": state_dict,
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": progress}},
        "callbacks": {
            "ModelCheckpoint{'monitor': None}": {"best_model_path": "", "kth_value": torch.tensor(torch.inf)}
        },
        "optimizer_states": [{"state": {0: {"momentum_buffer": None}}, "param_groups": [{"lr": 1e-3, "params": [0]}]}],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": {"name": "test_stvit", "lr": 1e-3},
    }
    torch.save(checkpoint, path)
    return path


def removal_message(prefix: str, tensors: int) -> str:
    return (
        f"removed the prefix {prefix!r} from {tensors} keys; dropped 2 tensors without this prefix: "
        "criterion.weight, accuracy.tp"
    )


# strip_prefix


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("name", ["test_stvit", "resnet18", "test_vit", "test_convnext"])
def test_a_prefix_is_removed(name: str, prefix: str) -> None:
    weights = timm.create_model(name, num_classes=7).state_dict()
    stripped, said = strip_prefix({f"{prefix}{key}": weights[key] for key in weights}, tensor_names(name))
    assert list(stripped) == list(weights) and all(stripped[key] is weights[key] for key in weights)
    assert said.startswith("removed the prefix ") and said.endswith(f" from {len(weights)} keys")
    assert all(repr(part) in said for part in ([prefix] if "_orig_mod" not in prefix else ["_orig_mod."]))
    unchanged, said = strip_prefix(weights, tensor_names(name))
    assert unchanged == weights and said == ""


def test_tensors_of_other_modules_are_dropped_and_named() -> None:
    weights = timm.create_model("test_stvit").state_dict()
    under = {f"model.{key}": value for key, value in weights.items()}
    stripped, said = strip_prefix({**under, **LEFT_OUT}, weights)
    assert stripped == weights and said == removal_message("model.", len(weights))
    more = {f"loss.{n}": torch.ones(1) for n in range(7)}
    assert strip_prefix({**under, **more}, weights)[1].endswith(
        "dropped 7 tensors without this prefix: " + ", ".join([*(f"loss.{n}" for n in range(5)), "…"])
    )


def test_compiled_modules() -> None:
    model: Any = timm.create_model("test_stvit")
    names = list(model.state_dict())
    model.stages[1] = torch.compile(model.stages[1])
    wrapped = nn.Sequential(OrderedDict(net=torch.compile(model)))
    stripped, said = strip_prefix(wrapped.state_dict(), names)
    assert set(stripped) == set(names) and "'net.' and '_orig_mod.'" in said


def test_weights_of_another_model_are_unchanged() -> None:
    for other in ("resnet18", "test_vit", "convnext_atto"):
        weights = {f"blocks.{key}": value for key, value in timm.create_model(other).state_dict().items()}
        assert strip_prefix(weights, tensor_names("test_stvit")) == (weights, "")
    assert strip_prefix({}, tensor_names("test_stvit")) == ({}, "")


def test_several_prefixes_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = timm.create_model("test_stvit").state_dict()
    both = {f"{part}.{key}": value for part in ("student", "teacher") for key, value in model.items()}
    said = "under several prefixes, 'student.' and 'teacher.'; save the tensors of one prefix in a separate file"
    with pytest.raises(ValueError, match=said):
        strip_prefix(both, model)
    torch.save({"state_dict": both}, tmp_path / "both.ckpt")
    overlay = {"file": str(tmp_path / "both.ckpt")}
    with pytest.raises(stvit.PretrainedError, match=f"both.ckpt: the model's tensors are {said}"):
        timm.create_model("test_stvit", pretrained=True, pretrained_cfg_overlay=overlay)
    assert convert_checkpoint.main([str(tmp_path / "both.ckpt"), f"--output={tmp_path / 'out'}"]) == 1
    assert said in capsys.readouterr().err
    torch.save({f"{part}.{key}": value for part in "ab" for key, value in resnet().items()}, tmp_path / "both.ckpt")
    with pytest.raises(stvit.PretrainedError, match=r"test_resnet: .*both.ckpt: .* several prefixes, 'a.' and 'b.'"):
        stvit.create_model("test_resnet", pretrained=True, pretrained_cfg_overlay=overlay)


@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_features_are_not_taken_for_several_models(prefix: str, tmp_path: Path) -> None:
    """Feature models have keys with stages_0 in place of stages.0.

    Only the ends of some keys match.
    """
    features = timm.create_model("test_stvit", features_only=True).state_dict()
    torch.save({f"{prefix}{key}": value for key, value in features.items()}, tmp_path / "features.pt")
    with pytest.raises(stvit.PretrainedError, match=r"missing key stem\.0\.weight"):
        timm.create_model("test_stvit", pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "features.pt")})


def resnet() -> dict[str, torch.Tensor]:
    return timm.create_model("test_resnet").state_dict()


# Readers of weights


@pytest.mark.parametrize("official", [False, True])
def test_timm_loads_the_file(tmp_path: Path, caplog: pytest.LogCaptureFixture, official: bool) -> None:
    weights = timm.create_model("test_stvit").state_dict()
    named = {official_key(key) if official else key: value for key, value in weights.items()}
    overlay = {"file": str(lightning(tmp_path / "it.ckpt", named))}
    with caplog.at_level(logging.WARNING):
        model: Any = timm.create_model("test_stvit", pretrained=True, pretrained_cfg_overlay=overlay)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert f"test_stvit: {removal_message('model.', len(weights))}" in caplog.text
    with pytest.raises(stvit.PretrainedError, match="these are weights of test_stvit; create that model"):
        timm.create_model("stvit_pico", pretrained=True, pretrained_cfg_overlay=overlay)
    assert find_variant(torch.load(tmp_path / "it.ckpt")["state_dict"]) == "test_stvit"


def test_create_model_loads_the_file_of_another_timm_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = resnet()
    overlay = {"file": str(lightning(tmp_path / "it.ckpt", weights))}
    with caplog.at_level(logging.WARNING):
        model = stvit.create_model("test_resnet", pretrained=True, pretrained_cfg_overlay=overlay)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert removal_message("model.", len(weights)) in caplog.text


@pytest.mark.parametrize("prefix", ["model.", "module.", "net._orig_mod."])
@pytest.mark.parametrize(("name", "flags"), [("test_stvit", []), ("test_resnet", ["--model=test_resnet"])])
def test_convert_checkpoint(
    name: str, flags: list[str], prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = timm.create_model(name, num_classes=4, in_chans=1).state_dict()
    source = lightning(tmp_path / "it.ckpt", weights, prefix)
    assert convert_checkpoint.main([str(source), *flags, "--in-chans=1", f"--output={tmp_path / 'out'}"]) == 0
    converted = load_file(tmp_path / "out/model.safetensors")
    assert converted.keys() == weights.keys() and all(torch.equal(converted[key], weights[key]) for key in weights)
    said = capsys.readouterr().out
    assert said.count("removed the prefix") == 1 and "dropped 2 tensors without this prefix" in said


def test_commands_load_the_file(digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = timm.create_model("test_stvit", num_classes=4).state_dict()
    source = f"--checkpoint={lightning(tmp_path / 'it.ckpt', weights)}"
    image = str(next(digits_folder.rglob("*.png")))
    data, model = f"--data-dir={digits_folder}", "--model=test_stvit"
    run = f"--experiment=run --output={tmp_path} --img-size=32 --epochs=1 --batch-size=20 --workers=0 --lr=0"
    for main, flags in (
        (validate_cls.main, [source, model, data, "--img-size=32", "--workers=0"]),
        (
            export.main,
            [source, model, "--format=torchscript", "--img-size=64", f"--output={tmp_path / 'it.torchscript'}"],
        ),
        (visualize.main, [image, source, model, f"--output={tmp_path / 'pictures'}"]),
        (train_cls.main, [f"--pretrained-path={tmp_path / 'it.ckpt'}", model, data, *run.split()]),
    ):
        assert main(flags) == 0, flags
        assert capsys.readouterr().out.count(removal_message("model.", len(weights))) == 1, flags


@pytest.mark.parametrize("name", ["stvit_pico", "resnet18"])
def test_pretrained_backbone_of_a_detector(name: str, tmp_path: Path) -> None:
    weights = timm.create_model(name, num_classes=3).state_dict()
    source = lightning(tmp_path / "it.ckpt", weights, "encoder.net.")
    detector = YOLO(f"yolo26n-{name}.yaml", pretrained_backbone=source)
    state = detector.model.model[0].net.state_dict()
    assert state and all(torch.equal(value, weights[key]) for key, value in state.items())

"""Tests the checks of config.json and of model arguments before a model is built."""

import json
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import stvit
from stvit import hub
from stvit.hub.folder import read_config
from stvit.tools import push_to_hub
from stvit.weights.config import ModelTooLargeError, check_model_args, check_pretrained_cfg, limit_parameters

NAN = float("nan")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a model of this package and of a timm model.

    Tests change only config.json.
    """
    folder = tmp_path_factory.mktemp("folders")
    for name in ("test_stvit", "test_vit"):
        hub.save(timm.create_model(name, num_classes=4), folder / name)
        (folder / name / "config.json").rename(folder / name / "own.json")
    return {name: folder / name for name in ("test_stvit", "test_vit")}


def configured(folder: Path, args: dict[str, Any] | None = None, **cfg: Any) -> str:
    """Writes a changed config.json and returns the name of the model."""
    config = json.loads((folder / "own.json").read_text())
    config["pretrained_cfg"] |= cfg
    config["num_classes"] = cfg.get("num_classes", config["num_classes"])
    config.setdefault("model_args", {}).update(args or {})
    (folder / "config.json").write_text(json.dumps(config))
    return f"local-dir:{folder}"


MORE = "a model with more than"
CFG = [
    ({"std": [0, 0, 0]}, "std must be a list of numbers above 0, got [0, 0, 0]"),
    ({"std": []}, "std must be a list of numbers above 0"),
    ({"mean": "abc"}, "mean must be a list of numbers, got 'abc'"),
    ({"mean": [NAN, 0, 0]}, "mean must be a list of numbers, got [nan, 0, 0]"),
    ({"input_size": [3, 200_000, 200_000]}, "input_size must be three integers of at least 1"),
    ({"input_size": [3, 0, 224]}, "input_size must be three integers of at least 1"),
    ({"input_size": 224}, "input_size must be three integers of at least 1"),
    ({"crop_pct": 1e-9}, "crop_pct must be a number from 0.05 to 2"),
    ({"crop_pct": "1"}, "crop_pct must be a number from 0.05 to 2"),
    ({"num_classes": -5}, "num_classes must be an integer from 0"),
    ({"num_classes": 10**12}, "num_classes must be an integer from 0"),
    ({"interpolation": 3}, "interpolation must be text"),
    ({"first_conv": 3}, "first_conv must be the name of a layer"),
    ({"label_names": 3}, "label_names must be a list of names"),
    ({"pool_size": [-1, 7]}, "pool_size must be a list of integers"),
    ({"fixed_input_size": "no"}, "fixed_input_size must be true or false"),
    ({"architecture": ["test_stvit"]}, "architecture must be the name of a model, got ['test_stvit']"),
    ({"unknown": 3}, "unexpected keyword argument 'unknown'"),
]
ARGS = [
    ({"features_only": "x"}, "features_only must be true or false, got 'x'"),
    ({"out_indices": "x"}, "out_indices must be an integer or a list of integers"),
    ({"drop_path_rate": 2}, "drop_path_rate must be a number from 0 to 1, got 2"),
    ({"drop_rate": NAN}, "drop_rate must be a number from 0 to 1, got nan"),
    ({"checkpoint_path": "/etc/passwd"}, "checkpoint_path is not allowed in model_args"),
    ({"in_chans": 0}, "in_chans must be an integer from 1"),
    ({"num_classes": -5}, "num_classes must be an integer from 0"),
    ({"img_size": 200_000}, "img_size must be an integer or a pair of integers"),
    ({"device": 3}, "device is not allowed in model_args because it is chosen when the model is created"),
    ({"dtype": "x"}, "dtype is not allowed in model_args"),
]
OURS = [
    ({"depths": [100_000, 1, 1, 1]}, "depths must be integers from 0 to 512, got 100000"),
    ({"depths": [-1, 1, 1, 1]}, "depths must be integers from 0 to 512, got -1"),
    ({"depths": "1111"}, "depths must be integers"),
    ({"dims": [1e9] * 4}, "dims must be integers from 2 to 16,384, got 1000000000.0"),
    ({"dims": [16384] * 4}, MORE),
    ({"depths": [500] * 4}, MORE),
    ({"dims": []}, "dims must be a sequence with the channels of 1 to 16 stages"),
    ({"num_heads": [0, 1, 2, 2]}, "num_heads must be integers from 1"),
    ({"stoken_size": 200_000}, "stoken_size must be at most 512"),
    ({"n_iter": 10**8}, "n_iter must be at most 100"),
    ({"n_iter": -1}, "n_iter must be an integer of at least 1"),
    ({"mlp_ratio": NAN}, "mlp_ratio must be made of finite numbers"),
    ({"mlp_ratio": 1e6}, "mlp_ratio must be a number from"),
    ({"head_hidden_size": 10**9}, "head_hidden_size must be an integer from 1"),
    ({"ls_init_values": "x"}, "ls_init_values must be a number"),
    ({"act_layer": "evil"}, "act_layer must be a layer or a name that timm knows, got 'evil'"),
    ({"norm_layer": 3}, "norm_layer must be a layer"),
    ({"global_pool": "evil"}, "global_pool must be one of"),
    ({"output_stride": "8"}, "output_stride must be 8, 16 or 32"),
    ({"unknown": 3}, "unexpected keyword argument 'unknown'"),
]
THEIRS = [
    ({"depth": 100_000}, MORE),
    ({"embed_dim": 10**6}, "a model with"),
    ({"embed_dim": 10**12}, "embed_dim must be made of finite numbers"),
]


@pytest.mark.parametrize(
    ("architecture", "args"),
    [
        ("swin_tiny_patch4_window7_224", {"window_size": 120, "img_size": 3840}),
        ("beit_base_patch16_224", {"img_size": 4000}),
        ("vit_small_patch16_rope_224", {"img_size": 6000, "patch_size": 1}),
        ("levit_128s", {"img_size": 8000}),
    ],
)
def test_sizes_of_position_tables_are_limited(architecture: str, args: dict[str, Any], tmp_path: Path) -> None:
    """Position tables grow with the square of the image area.

    They are refused before they use memory.
    """
    config = {"architecture": architecture, "model_args": args, "pretrained_cfg": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(stvit.PretrainedError, match=r"a table of .* elements|a model with more than"):
        stvit.create_model(f"local-dir:{tmp_path}")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 500_000  # KB


@pytest.mark.parametrize("pretrained", [True, False])
def test_every_field_of_config_json_is_checked(folders: dict[str, Path], pretrained: bool) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, folder in folders.items():
        for cfg, said in CFG:
            refused(name, configured(folder, **cfg), said, pretrained)
        for args, said in ARGS + (OURS if name == "test_stvit" else THEIRS):
            if pretrained or said != MORE:  # without weights a model may have a billion parameters
                refused(name, configured(folder, args), said, pretrained)
        configured(folder)
        assert stvit.create_model(f"local-dir:{folder}", pretrained=pretrained, num_classes=7).num_classes == 7
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 3_000_000


def refused(name: str, source: str, said: str, pretrained: bool) -> None:
    with pytest.raises(stvit.PretrainedError) as caught:
        stvit.create_model(source, pretrained=pretrained)
    assert (
        said in str(caught.value)
        and "config.json cannot be used" in str(caught.value)
        and source[10:] in str(caught.value)
    )
    if name == "test_stvit":  # timm itself builds this model from the file
        with pytest.raises((stvit.PretrainedError, TypeError)) as caught_of_timm:
            timm.create_model(source, pretrained=pretrained)
        text = str(caught_of_timm.value)  # timm replaces in_chans with input_size
        assert said in text or "subscriptable" in text or "in_chans" in said


def test_invalid_config_files(folders: dict[str, Path]) -> None:
    folder = folders["test_stvit"]
    for content, said in (
        ("[" * 100_000, "nested too deeply"),
        ("[1]", "expected a mapping of names to values, got \\[1\\]"),
        ('{"architecture": "test_stvit", "pretrained_cfg": 3}', "pretrained_cfg must be a mapping"),
        ('{"architecture": "test_stvit", "pretrained_cfg": {}, "model_args": [1]}', "model_args must be a mapping"),
    ):
        (folder / "config.json").write_text(content)
        with pytest.raises(stvit.PretrainedError, match=said):
            stvit.create_model(f"local-dir:{folder}")
        with pytest.raises(hub.HubError, match=said):
            read_config(folder)
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")  # reading it would wait forever
    with pytest.raises(stvit.PretrainedError, match=r"config.json cannot be used \(not a regular file\)"):
        stvit.create_model(f"local-dir:{folder}")
    with pytest.raises(hub.HubError, match="not a regular file"):
        read_config(folder)
    (folder / "config.json").unlink()


def test_errors_of_a_command_are_one_line(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    for args, cfg, said in (({"features_only": "x"}, {}, "features_only must"), ({}, {"mean": "x"}, "mean must")):
        source = configured(folders["test_stvit"], args, **cfg)
        assert push_to_hub.main([source.removeprefix("local-dir:"), "--repo-id=a/b", "--dry-run"]) == 1
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1 and "unexpected" not in error


@pytest.mark.parametrize(("args", "said"), [case for case in [*ARGS, *OURS] if case[1] != MORE])
def test_arguments_of_the_model_are_checked(args: dict[str, Any], said: str) -> None:
    if args.keys() & {"img_size", "checkpoint_path", "device", "dtype", "unknown"}:  # not arguments of this model
        return
    said = {"mlp_ratio must be made of finite numbers": "mlp_ratio must be a number"}.get(said, said)
    with pytest.raises(ValueError) as caught:
        timm.create_model("test_stvit", **args)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"pretrained_cfg": {"architecture": ["x"]}}, "architecture must be the name of a model, got ['x']"),
        ({"pretrained_cfg_overlay": {"architecture": 3}}, "architecture must be the name of a model, got 3"),
        ({"pretrained_cfg": ["in1k"]}, "pretrained_cfg must be a tag or a dict, got ['in1k']"),
    ],
)
def test_configurations_of_a_wrong_type(given: dict[str, Any], said: str) -> None:
    for create in (timm.create_model, stvit.create_model):
        with pytest.raises(ValueError) as caught:
            create("test_stvit", **given)
        assert str(caught.value) == said


def test_valid_arguments_of_timm_are_accepted() -> None:
    for args in (
        {"num_classes": 0},
        {"in_chans": 13},
        {"drop_path_rate": 1.0},
        {"drop_rate": 0},
        {"global_pool": ""},
        {"ls_init_values": 1e-6},
        {"act_layer": torch.nn.ReLU},
        {"depths": [1, 0, 1, 1]},
        {"features_only": True, "out_indices": (0, -1)},
        {"dims": [32, 32, 64, 64], "stoken_size": [[8, 4], 4, 1, 1]},
    ):
        timm.create_model("test_stvit", device="meta", **args)
    check_model_args({"window_size": [7, 7], "act_layer": "gelu", "scale": -1e-3, "pos": None, "stem": {"a": [1]}})
    for name in timm.list_models(pretrained=True):
        cfg = timm.get_pretrained_cfg(name)
        check_pretrained_cfg(cfg.to_dict() | {"num_classes": max(cfg.num_classes, 0)})


def test_the_limit_ends_with_its_block() -> None:
    with pytest.raises(ModelTooLargeError, match="more than 100 parameters"), limit_parameters(100):
        torch.nn.Linear(10, 10)
    with limit_parameters(110):
        torch.nn.Linear(10, 10)
    torch.nn.Linear(100, 100)

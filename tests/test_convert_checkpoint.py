"""Tests of the command that converts checkpoints of the authors, of timm and of our training."""

import argparse
import json
import os
import pickle
import resource
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from stvit.hub.files import file_sha256
from stvit.tools import convert_checkpoint, train_cls
from stvit.weights import read_checkpoint
from stvit.weights.official import official_key

Convert = Callable[..., Path]


@pytest.fixture
def convert(tmp_path: Path) -> Convert:
    """Returns a function that runs the command and returns the folder."""

    def convert(source: Path, *flags: str, name: str = "out") -> Path:
        folder = tmp_path / name
        assert convert_checkpoint.main([str(source), f"--output={folder}", *flags]) == 0
        return folder

    return convert


def refused(capsys: pytest.CaptureFixture[str], *flags: object) -> str:
    """Runs the command, which must fail, and returns its error."""
    capsys.readouterr()
    try:
        status = convert_checkpoint.main([str(flag) for flag in flags])
    except SystemExit as error:
        status = int(str(error.code))
    assert status != 0
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("error: ")
    return said


def official(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Returns a state dict as the published code saves it, with its one-hot kernels."""
    state = {}
    for key, value in model.state_dict().items():
        name = official_key(key)
        state[name] = value.reshape(1, -1, 1, 1) if name.endswith(("gamma_1", "gamma_2")) else value.clone()
        if name.endswith("attn.stoken_refine.qkv.weight"):
            kernel = torch.eye(9).reshape(9, 1, 3, 3)
            state[name.replace("stoken_refine.qkv.weight", "unfold.weights")] = kernel
            state[name.replace("stoken_refine.qkv.weight", "fold.weights")] = kernel.clone()
    return state


def authors(path: Path, name: str = "test_stvit", **flags: Any) -> dict[str, torch.Tensor]:
    """Writes a checkpoint as the authors' code does, and returns the weights.

    The moving average is half of them.
    """
    model = timm.create_model(name)
    weights = official(model)
    average = {
        key: value * 0.5 if value.is_floating_point() and "fold" not in key else value for key, value in weights.items()
    }
    optimizer = {"state": {0: {"step": 3, "exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]}
    namespace = argparse.Namespace(model=name, lr=1e-3, data_path="/data/imagenet", **flags)
    torch.save({"model": weights, "model_ema": average, "optimizer": optimizer, "epoch": 299, "args": namespace}, path)
    return model.state_dict()


def loaded(folder: Path) -> Any:
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


@pytest.mark.parametrize("use_ema", [True, False])
def test_authors_checkpoint(
    convert: Convert, tmp_path: Path, use_ema: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = authors(tmp_path / "small.pth")
    assert "contains weights (model) and their moving average (model_ema); pass --no-use-ema or --use-ema" in refused(
        capsys, tmp_path / "small.pth", f"--output={tmp_path / 'out'}"
    )
    assert not (tmp_path / "out").exists()
    folder = convert(tmp_path / "small.pth", "--use-ema" if use_ema else "--no-use-ema")
    said = capsys.readouterr().out
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    factor = 0.5 if use_ema else 1.0
    for key, value in load_file(folder / "model.safetensors").items():
        assert torch.equal(value, weights[key] * factor if value.is_floating_point() else weights[key]), key
    assert "test_stvit: 354,392 parameters, 1000 classes, images 3x160x160" in said
    assert f"weights: {'moving average (EMA)' if use_ema else 'as trained, not the moving average'}" in said
    assert f"sha256 {file_sha256(folder / 'model.safetensors')}  model.safetensors" in said
    code = said.strip().splitlines()[-1]
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["model"].num_classes == 1000


@pytest.mark.long
def test_published_weights(convert: Convert, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only --model can state that weights are the published ones.

    The base model has layer scale.
    """
    authors(tmp_path / "base.pth", "stvit_base", input_size=224)
    folder = convert(tmp_path / "base.pth", "--use-ema")
    said = capsys.readouterr().out
    assert "stvit_base: 51,691,288 parameters" in said
    assert "if these are the published weights, pass --model stvit_base.in1k to state it in the card" in said
    card = (folder / "README.md").read_text()
    assert "Not measured." in card and "imagenet" not in card.lower() and "license: not stated" in card

    authors(tmp_path / "small.pth", "stvit_small")
    folder = convert(tmp_path / "small.pth", "--use-ema", "--model=stvit_small.in1k_384", name="384")
    assert "stvit_small.in1k_384: 25,495,624 parameters" in capsys.readouterr().out
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == "stvit_small" and config["pretrained_cfg"]["input_size"] == [3, 384, 384]
    assert config["pretrained_cfg"]["crop_pct"] == 1.0
    card = (folder / "README.md").read_text()
    assert "license: mit" in card and "- imagenet-1k" in card
    assert "| top-1 | 85.00 % | ImageNet-1k | reported in the paper; not measured again" in card

    model = timm.create_model("stvit_small", num_classes=10)
    torch.save({"model": official(model)}, tmp_path / "ten.pth")
    output = f"--output={tmp_path / 'new'}"
    assert "cannot be the published stvit_small.in1k: expected 1000 classes and images of 3x224x224, got 10" in refused(
        capsys, tmp_path / "ten.pth", output, "--model=stvit_small.in1k"
    )
    flags = ["--use-ema", "--model=stvit_small.in1k", "--img-size=96"]
    assert "got 1000 classes and 3x96x96" in refused(capsys, tmp_path / "small.pth", output, *flags)


def test_flags_of_the_run(convert: Convert, tmp_path: Path) -> None:
    authors(tmp_path / "w.pth", input_size=96, mean=(0.5, 0.5, 0.5), interpolation="bilinear", crop_pct=0.9)
    cfg = loaded(convert(tmp_path / "w.pth", "--use-ema")).pretrained_cfg
    assert (cfg["input_size"], cfg["interpolation"], cfg["crop_pct"]) == ((3, 96, 96), "bilinear", 0.9)
    assert list(cfg["mean"]) == [0.5] * 3
    cfg = loaded(convert(tmp_path / "w.pth", "--use-ema", "--img-size=64", name="given")).pretrained_cfg
    assert cfg["input_size"] == (3, 64, 64)
    # Flags without a usable value are ignored.
    authors(
        tmp_path / "w.pth", input_size="big", mean="foo", std=["a"], crop_pct=None, interpolation="none", in_chans=[]
    )
    cfg = loaded(convert(tmp_path / "w.pth", "--use-ema", name="odd")).pretrained_cfg
    assert cfg["input_size"] == (3, 160, 160) and cfg["interpolation"] == "bicubic"


def test_checkpoint_of_timms_training(convert: Convert, tmp_path: Path) -> None:
    model = timm.create_model("stvit_pico", num_classes=5, in_chans=1, stoken_size=(4, 2, 1, 1))
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    flags = argparse.Namespace(model="stvit_pico", img_size=96, mean=(0.5,), std=(0.25,), crop_pct=0.9)
    torch.save({"epoch": 3, "arch": "stvit_pico", "state_dict": state, "args": flags}, tmp_path / "it.pth.tar")
    folder = convert(tmp_path / "it.pth.tar", "--model-kwargs", "stoken_size=(4,2,1,1)")
    again = loaded(folder)
    cfg = again.pretrained_cfg
    assert (cfg["input_size"], cfg["mean"], cfg["std"], cfg["crop_pct"]) == ((1, 96, 96), [0.5], [0.25], 0.9)
    image = torch.randn(1, 1, 96, 96)
    assert torch.equal(again(image), model.eval()(image))


def test_foreign_model(convert: Convert, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = timm.create_model("test_resnet", num_classes=4)
    save_file(model.state_dict(), tmp_path / "r.safetensors")
    source = tmp_path / "r.safetensors"
    assert "the shapes fit no model of stvit; for another timm model, pass --model NAME" in refused(
        capsys, source, f"--output={tmp_path / 'out'}"
    )
    folder = convert(source, "--model=test_resnet")
    assert loaded(folder).num_classes == 4
    card = (folder / "README.md").read_text()
    assert "An image classifier for timm" in card and "- stvit" not in card


def test_checkpoint_of_our_training(
    convert: Convert, digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = "--model=test_stvit --img-size=32 --in-chans=1 --epochs=1 --batch-size=20 --workers=0 --model-ema"
    more = f"--output={tmp_path} --experiment=run --mean 0.4 --std 0.3 --data-dir={digits_folder}"
    assert train_cls.main([*flags.split(), *more.split()]) == 0
    checkpoint = max((tmp_path / "run/checkpoints").glob("*.pt"))
    assert "pass --no-use-ema or --use-ema" in refused(capsys, checkpoint, f"--output={tmp_path / 'out'}")
    for flag, part in (("--no-use-ema", "last"), ("--use-ema", "last_ema")):
        folder = convert(checkpoint, flag, name=part)
        ours, theirs = load_file(folder / "model.safetensors"), load_file(tmp_path / "run" / part / "model.safetensors")
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
        config, written = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "run" / part))
        assert config["label_names"] == [f"digit_{n}" for n in range(4)]
        for key in ("input_size", "mean", "std", "crop_pct", "interpolation"):
            assert config["pretrained_cfg"][key] == written["pretrained_cfg"][key], key
        assert config["stvit"]["weights"].endswith("after epoch 1")


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_no_code_of_a_file_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil, source = Evil(tmp_path / "harm"), tmp_path / "evil.pth"
    output = f"--output={tmp_path / 'out'}"
    torch.save({"model": official(timm.create_model("test_stvit")), "args": evil, "more": argparse.Action}, source)
    said = refused(capsys, source, output)
    assert "loading it would run argparse.Action, posix.mkdir, and code in checkpoints is never run" in said
    for content in (pickle.dumps({"model": evil}), pickle.dumps(evil, protocol=0)):
        source.write_bytes(content)
        assert "would run posix.mkdir" in refused(capsys, source, output)
    weights = timm.create_model("test_stvit").state_dict()
    torch.save({"model": weights, "x": evil}, source, _use_new_zipfile_serialization=False)
    assert "would run posix.mkdir, and" in refused(capsys, source, output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.pth"]


def test_errors_name_the_reason(convert: Convert, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = tmp_path / "w.pth", f"--output={tmp_path / 'out'}"
    assert f"{source}: no such file or folder" in refused(capsys, source, output)
    for content, said in (
        (b"nothing", "it is damaged or not a file of weights"),
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    ):
        source.write_bytes(content)
        assert f"cannot read weights from {source}: {said}" in refused(capsys, source, output)
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), source)
    assert "it is a TorchScript program" in refused(capsys, source, output)
    for nameless in ({1: torch.ones(2)}, {"model": {1: torch.ones(2)}}):
        torch.save(nameless, source)
        assert f"cannot read weights from {source}: " in refused(capsys, source, output)
    torch.save(torch.ones(3), source)
    assert "expected a dictionary with names as keys, got Tensor" in refused(capsys, source, output)
    weights = timm.create_model("test_stvit").state_dict()
    torch.save(weights, source)
    assert "'A b' is not an identifier of the Hub" in refused(capsys, source, output, "--license=A b")
    assert "has no EMA weights; remove --use-ema" in refused(capsys, source, output, "--use-ema")
    assert "mismatches; these are weights of test_stvit" in refused(capsys, source, output, "--model=stvit_pico")
    assert "did you mean stvit_pico" in refused(capsys, source, output, "--model=stvit_pic")
    torch.save({**weights, "stem.0.bias": torch.full((16,), torch.nan)}, source)
    assert "test_stvit: NaN or infinity in stem.0.bias; use an earlier checkpoint" in refused(capsys, source, output)
    assert f"no config.json in {tmp_path} or {tmp_path / 'best'}" in refused(capsys, tmp_path, output)
    torch.save(weights, source)
    folder = convert(source)
    (folder / "own.txt").write_text("mine")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert f"--output {folder} already exists; choose another" in refused(capsys, source, output)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert "which stores its own configuration; remove --img-size, --use-ema" in refused(
        capsys, folder, f"--output={tmp_path / 'new'}", "--use-ema", "--img-size=64"
    )


def test_full_disk_leaves_nothing_behind(convert: Convert, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(timm.create_model("test_stvit").state_dict(), tmp_path / "w.pth")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))  # largest size of a file that a process can write
    try:
        said = refused(capsys, tmp_path / "w.pth", f"--output={tmp_path / 'out'}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"cannot write {tmp_path / 'out'}: " in said and "File too large" in said
    assert not list((tmp_path).rglob("*.safetensors"))
    convert(tmp_path / "w.pth")


def test_threads_open_files_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each thread allows `argparse.Namespace`.

    The first thread to end does not forbid it for the second.
    """
    torch.save({"args": argparse.Namespace(lr=1), "model": {}}, tmp_path / "a.pt")
    load, inside, started = torch.load, threading.Event(), threading.Event()
    results: list[Any] = []

    def load_late(*args: Any, **kwargs: Any) -> Any:
        if threading.current_thread() is first:
            inside.set()
            assert started.wait(60)
            second.join(0.5)  # it opens the file meanwhile, if nothing stops it
        return load(*args, **kwargs)

    def work() -> None:
        results.append(read_checkpoint(tmp_path / "a.pt"))

    monkeypatch.setattr(torch, "load", load_late)
    first, second = threading.Thread(target=work), threading.Thread(target=work)
    first.start()
    assert inside.wait(60)
    second.start()
    started.set()
    first.join()
    second.join()
    assert [result["args"].lr for result in results] == [1, 1]

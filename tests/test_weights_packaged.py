"""Weights that are part of the package."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import stvit
from stvit import PretrainedError
from stvit.weights import packaged

NAME = "stvit_pico.cifar10"


def test_the_model_classifies_without_a_network(tmp_path: Path) -> None:
    # skimage's wheel contains the photograph. No proxy answers at this port, and the cache is empty.
    code = (
        "import stvit, timm; from PIL import Image; from timm.data import create_transform, resolve_data_config\n"
        "from skimage.data import chelsea\n"
        f"model = timm.create_model('{NAME}', pretrained=True).eval()\n"
        "transform = create_transform(**resolve_data_config(model=model))\n"
        "scores = model(transform(Image.fromarray(chelsea()))[None]).softmax(dim=1)[0]\n"
        "print(model.pretrained_cfg['label_names'][int(scores.argmax())])"
    )
    nowhere = {f"{kind}_proxy": "http://127.0.0.1:9" for kind in ("http", "https", "all")}
    environment = {**os.environ, **nowhere, "HF_HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.stdout == "cat\n", result.stderr


def test_the_weights_are_in_half_precision() -> None:
    path = Path(packaged.packaged_file(NAME))
    weights = load_file(path)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16, torch.int64}
    assert path.stat().st_size < 3.5e6
    model = timm.create_model(NAME, pretrained=True)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name].to(tensor.dtype)), name


def test_the_default_tag_has_a_thousand_classes() -> None:
    assert timm.create_model("stvit_pico").num_classes == 1000
    assert NAME in timm.list_pretrained()
    with pytest.raises(PretrainedError, match=f"random weights. {NAME} can be loaded. To load your own"):
        timm.create_model("stvit_pico", pretrained=True)


def test_another_number_of_classes_keeps_the_backbone() -> None:
    plain, other = timm.create_model(NAME, pretrained=True), timm.create_model(NAME, pretrained=True, num_classes=3)
    assert other.head.fc.out_features == 3
    assert torch.equal(other.stages[0].blocks[0].attn.qkv.weight, plain.stages[0].blocks[0].attn.qkv.weight)
    maps = timm.create_model(NAME, pretrained=True, features_only=True)(torch.randn(1, 3, 64, 64))
    assert [m.shape[-1] for m in maps] == [16, 8, 4, 2]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("missing", "No such file or directory"),
        ("truncated", "is not the file of this release"),
        ("changed", "is not the file of this release"),
    ],
)
def test_other_weights_are_refused(damage: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / f"{NAME}.safetensors"
    content = Path(packaged.packaged_file(NAME)).read_bytes()
    if damage == "truncated":
        path.write_bytes(content[:-100])
    elif damage == "changed":
        save_file({"head.fc.bias": torch.zeros(10)}, path)
    monkeypatch.setattr(packaged, "_FOLDER", tmp_path)
    for create in (timm.create_model, stvit.create_model):
        with pytest.raises(PretrainedError, match=rf"^{NAME}: .*{words}.*; install stvit again$") as raised:
            create(NAME, pretrained=True, pretrained_cfg_overlay={"file": str(path)})
        assert str(path) in str(raised.value)

"""Tests that weights of backbone, neck and head are loaded and counted."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import ultralytics
from timm.models import save_for_hf

from stvit.adapters.yolo import YOLO
from stvit.adapters.yolo.weights import load_backbone
from tests import hub_server

QUICK = {"imgsz": 64, "epochs": 1, "batch": 4, "plots": False, "val": False, "amp": False, "device": "cpu"}


@pytest.fixture(scope="module")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of a stvit_pico with ten classes."""
    torch.manual_seed(7)
    path = tmp_path_factory.mktemp("weights") / "pico.pth"
    torch.save({"state_dict": timm.create_model("stvit_pico", num_classes=10).state_dict()}, path)
    return path


def state_at_start(model: YOLO, **kwargs: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """Trains and returns the initial weights and the model that the trainer built."""
    seen = {}

    def keep(trainer: Any) -> None:
        seen["state"] = {key: value.clone() for key, value in trainer.model.state_dict().items()}
        seen["model"] = trainer.model

    model.add_callback("on_train_start", keep)
    model.train(**QUICK, **kwargs)
    return seen["state"], seen["model"]


@pytest.mark.parametrize("channels", [3, 1, 4])
def test_pretrained_backbone_reaches_the_trained_model(
    channels: int,
    pico: Path,
    write_photos: Callable[..., Path],
    tmp_path: Path,
    ultralytics_log: pytest.LogCaptureFixture,
) -> None:
    data = write_photos(tmp_path / "photos", nc=3)
    if channels != 3:
        data = write_photos(tmp_path / "photos", channels=channels, nc=3)
    model = YOLO("yolo26n-stvit_pico.yaml", pretrained_backbone=pico)
    kwargs: dict[str, Any] = {"pretrained_cfg_overlay": {"file": str(pico), "num_classes": 10}, "num_classes": 10}
    expected = timm.create_model("stvit_pico", pretrained=True, in_chans=channels, **kwargs).state_dict()
    if channels == 4:  # Ultralytics reads only images with one or three channels, so no training runs
        rebuilt = model._smart_load("trainer")(
            overrides={**QUICK, "model": "yolo26n.yaml", "data": str(data), "project": str(tmp_path)}
        )
        rebuilt.data["channels"] = 4
        state = rebuilt.get_model(weights=model.model, cfg={**model.model.yaml}).state_dict()
    else:
        state, built = state_at_start(model, data=str(data), project=str(tmp_path))
        assert built.yaml["nc"] == 3
        assert built.yaml["channels"] == channels
    arrived = {key.removeprefix("model.0.net."): value for key, value in state.items() if key.startswith("model.0.")}
    assert len(arrived) > 150
    for key, value in arrived.items():
        assert torch.equal(value, expected[key]), key
    assert (
        f"Loaded {len(arrived)}/{len(arrived)} tensors of the backbone stvit_pico from {pico}" in ultralytics_log.text
    )
    assert f"Transferred {len(arrived)}/{len(arrived)} tensors of the backbone stvit_pico" in ultralytics_log.text


@pytest.mark.long
def test_the_seed_determines_weights_that_are_not_loaded(pico: Path, photos: Path, tmp_path: Path) -> None:
    begun = []
    for seed in (3, 3, 4):
        torch.manual_seed(torch.randint(1000, ()).item())
        model = YOLO("yolo26n-stvit_pico.yaml")
        state, _ = state_at_start(model, data=str(photos), project=str(tmp_path), seed=seed, pretrained_backbone=pico)
        begun.append(state)
    assert all(torch.equal(begun[0][key], begun[1][key]) for key in begun[0])
    neck = "model.13.cv1.conv.weight"
    assert not torch.equal(begun[0][neck], begun[2][neck])


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_backbone_from_a_folder_and_a_file(kind: str, tmp_path: Path) -> None:
    net = timm.create_model("stvit_pico", num_classes=5)
    save_for_hf(net, tmp_path / "pico", safe_serialization=True)
    backbone = YOLO("yolo26n-stvit_pico.yaml").model.model[0]
    count = load_backbone(backbone, tmp_path / "pico" / ("model.safetensors" if kind == "file" else ""))
    state = backbone.net.state_dict()
    assert count == len(state)
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in state.items())


def test_backbone_from_the_hub(tmp_path: Path) -> None:
    net = timm.create_model("stvit_pico", num_classes=5)
    save_for_hf(net, tmp_path / "pico", safe_serialization=True)
    script = (
        "import sys; from stvit.adapters.yolo import YOLO\n"
        "for n, source in enumerate(sys.argv[1:]):\n"
        "    YOLO('yolo26n-stvit_pico.yaml', pretrained_backbone=source).save(f'{n}.pt')"
    )
    with hub_server.serve(tmp_path / "pico", tmp_path / "home") as env:
        sources = [f"hf-hub:{hub_server.REPOSITORY}", hub_server.REPOSITORY]
        subprocess.run([sys.executable, "-c", script, *sources], env=env, cwd=tmp_path, check=True, timeout=120)
    for n in range(2):
        state = ultralytics.YOLO(tmp_path / f"{n}.pt").model.model[0].net.state_dict()
        assert all(torch.equal(value.half(), net.state_dict()[key].half()) for key, value in state.items())


def test_backbone_of_another_timm_model(tmp_path: Path) -> None:
    net = timm.create_model("resnet18", num_classes=4)
    torch.save(net.state_dict(), tmp_path / "resnet.pth")
    model = YOLO("yolo26n-resnet18.yaml", pretrained_backbone=tmp_path / "resnet.pth")
    state = model.model.model[0].net.state_dict()
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in state.items())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("other", r"cannot load .* into stvit_pico: .*The weights do not fit the model .*weights of stvit_nano"),
        ("garbage", r"cannot read weights of a classifier \(.*pass weights of stvit_pico, not of a whole detector"),
        ("empty", r"cannot load pretrained_backbone=.* into stvit_pico"),
    ],
)
def test_weights_that_do_not_fit(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    if content == "garbage":
        path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    else:
        torch.save({} if content == "empty" else timm.create_model("stvit_nano").state_dict(), path)
    model = YOLO("yolo26n-stvit_pico.yaml")
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    with pytest.raises(RuntimeError, match=message):
        load_backbone(model.model.model[0], path)
    assert all(torch.equal(value, before[key]) for key, value in model.model.state_dict().items())


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("stvit_nano.in1k", "is a stvit_nano checkpoint, but the backbone is stvit_pico"),
        (
            "nowhere.pth",
            r"no file, folder or timm model named 'nowhere.pth'; .*hf-hub:ORG/NAME, or a tag of stvit_pico",
        ),
        ("stvit_pico.ckpt", "no file, folder or timm model named 'stvit_pico.ckpt'"),
        ("", "must be a timm tag, a Hub id, a folder, a file or True"),
    ],
)
def test_invalid_sources_of_backbone_weights(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        YOLO("yolo26n-stvit_pico.yaml", pretrained_backbone=source)


def test_a_folder_of_another_model(tmp_path: Path) -> None:
    save_for_hf(timm.create_model("stvit_nano"), tmp_path / "nano")
    with pytest.raises(ValueError, match="is a stvit_nano checkpoint, but the backbone is stvit_pico"):
        YOLO("yolo26n-stvit_pico.yaml", pretrained_backbone=tmp_path / "nano")


def test_a_folder_of_a_smaller_variant(tmp_path: Path) -> None:
    args = {"depths": (1, 1, 1, 1)}
    save_for_hf(timm.create_model("stvit_pico", **args), tmp_path / "small", model_args=args, safe_serialization=True)
    with pytest.raises(
        RuntimeError, match=r"does not fit stvit_pico: \d+ of 182 tensors are missing or have another shape"
    ):
        YOLO("yolo26n-stvit_pico.yaml", pretrained_backbone=tmp_path / "small")


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """yolo26n.pt with random weights."""
    torch.manual_seed(11)
    path = tmp_path_factory.mktemp("stock") / "yolo26n.pt"
    model = ultralytics.YOLO("yolo26n.yaml")
    model.model.names = {i: f"class {i}" for i in range(80)}
    model.save(path)
    return path


def test_stock_weights_fill_neck_and_head(stock: Path, ultralytics_log: pytest.LogCaptureFixture) -> None:
    theirs = ultralytics.YOLO(stock).model
    model = YOLO("yolo26n-stvit_pico.yaml", stock_weights=stock).model
    own = model.state_dict()
    for key, value in theirs.state_dict().items():
        if int(key.split(".")[1]) >= 9 and own[key].shape == value.shape:
            assert torch.equal(own[key], value), key
    total = sum(int(key.split(".")[1]) >= 9 for key in own)
    other = [key for key in own if int(key.split(".")[1]) >= 9 and own[key].shape != theirs.state_dict()[key].shape]
    assert {key.rsplit(".", 2)[0] for key in other} == {"model.9.cv1", "model.9.cv2", "model.16.cv1"}
    assert len(other) == 7  # layers whose inputs are feature maps of the backbone, with other widths
    loaded = total - len(other)
    assert f"Loaded {loaded}/{total} tensors of Ultralytics' own layers from '{stock}'" in ultralytics_log.text
    assert model.names[3] == "class 3"


def test_stock_weights_are_kept_when_training_changes_the_classes(stock: Path, photos: Path, tmp_path: Path) -> None:
    model = YOLO("yolo26n-stvit_pico.yaml", stock_weights=stock)
    state, _ = state_at_start(model, data=str(photos), project=str(tmp_path))
    theirs = ultralytics.YOLO(stock).model.state_dict()
    same = [
        key
        for key in state
        if int(key.split(".")[1]) >= 9 and torch.equal(state[key], theirs.get(key, torch.tensor(0)))
    ]
    assert len(same) > 500
    assert state["model.23.one2one_cv3.0.2.weight"].shape[0] == 2


@pytest.mark.parametrize("way", ["stock_weights", "load"])
def test_stokenattention_starts_as_the_stock_model(
    way: str, stock: Path, ultralytics_log: pytest.LogCaptureFixture
) -> None:
    if way == "load":
        ours = YOLO("yolo26n-stokenattention.yaml").load(stock).model.eval()
    else:
        ours = YOLO("yolo26n-stokenattention.yaml", stock_weights=stock).model.eval()
    theirs = ultralytics.YOLO(stock).model.eval()
    total = len(theirs.state_dict())
    assert way == "load" or f"Loaded {total}/{total} tensors of Ultralytics' own layers" in ultralytics_log.text
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(ours(images)[0], theirs(images)[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (
            "nowhere.pth",
            RuntimeError,
            "cannot load stock_weights='nowhere.pth'; pass a checkpoint of Ultralytics such as",
        ),
        ("junk.pt", RuntimeError, "cannot load stock_weights='junk.pt'"),
        ("", ValueError, "stock_weights must be a checkpoint of Ultralytics such as yolo26s.pt, got ''"),
        (True, ValueError, "stock_weights must be a checkpoint of Ultralytics such as yolo26s.pt, got True"),
        ("yolo11n.pt", ValueError, "stock_weights='yolo11n.pt' is of another generation of YOLO than the model"),
    ],
)
def test_invalid_stock_weights(
    source: Any, error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "junk.pt").write_bytes(b"junk")
    if source == "yolo11n.pt":
        ultralytics.YOLO("yolo11n.yaml").save(source)
    with pytest.raises(error, match=message):
        YOLO("yolo26n-stvit_pico.yaml", stock_weights=source)


@pytest.mark.long
def test_gray_weights_are_adapted_to_color_images(
    write_photos: Callable[..., Path], photos: Path, tmp_path: Path
) -> None:
    gray = YOLO("yolo26n-stvit_pico.yaml")
    gray.train(data=str(write_photos(tmp_path / "gray", channels=1)), project=str(tmp_path), name="first", **QUICK)
    weight = YOLO(tmp_path / "first" / "weights" / "best.pt").model.model[0].net.stem[0].weight
    state, _ = state_at_start(YOLO(tmp_path / "first" / "weights" / "best.pt"), data=str(photos), project=str(tmp_path))
    torch.testing.assert_close(state["model.0.net.stem.0.weight"].sum(1, keepdim=True), weight)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("yolo26s-stvit_pico.yaml", "has scale 'n', but the model has 's'"),
        ("yolo26n-stvit_pico-cls.yaml", None),
    ],
)
def test_stock_weights_of_another_scale_or_task(name: str, message: str | None, stock: Path) -> None:
    with pytest.raises(ValueError, match=message or "no tensor fits any of"):
        YOLO(name, stock_weights=stock)


def test_options_that_contradict_each_other(pico: Path, photos: Path, stock: Path) -> None:
    model = YOLO("yolo26n-stvit_pico.yaml", pretrained_backbone=pico)
    for pretrained in (False, str(stock)):
        with pytest.raises(ValueError, match="would discard the weights loaded by pretrained_backbone"):
            model.train(data=str(photos), pretrained=pretrained, **QUICK)
    with pytest.raises(ValueError, match="pretrained_backbone cannot be changed when a run is resumed; remove it"):
        model.train(resume=True, pretrained_backbone=pico)
    with pytest.raises(ValueError, match="pretrained_backbone needs a model with a timm backbone"):
        YOLO("yolo26n.yaml", pretrained_backbone=pico)

"""Tests that detectors are published on a Hub, and that opening one runs no code."""

import io
import os
import pickle
import re
import shutil
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import ultralytics
from huggingface_hub import ModelCard, constants
from PIL import Image
from ultralytics.utils import ASSETS

from stvit import PretrainedDownloadError, PretrainedError
from stvit.adapters.yolo import YOLO
from stvit.adapters.yolo.checkpoint import open_safely
from stvit.adapters.yolo.hub import _OrderedPickler, _without_paths
from stvit.tools import push_to_hub
from stvit.tools import yolo as yolo_command
from tests.hub_server import OWNER, Hub

REPO = "org/detector"
QUICK = {"imgsz": 64, "batch": 4, "plots": False, "amp": False, "device": "cpu", "mosaic": 0.0, "optimizer": "AdamW"}
Push = Callable[..., str]


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the weights of a detector trained for an epoch.

    Tests must not change them.
    """
    folder = tmp_path_factory.mktemp("runs")
    YOLO("yolo26n-stvit_pico.yaml").train(data=str(photos), epochs=1, project=str(folder), name="run", nbs=4, **QUICK)
    return folder / "run/weights"


@pytest.fixture
def push(capsys: pytest.CaptureFixture[str]) -> Push:
    """Returns a function that runs the command and returns its output, or its error if it must fail."""

    def push(source: Path, *flags: str, fails: bool = False) -> str:
        capsys.readouterr()
        status = push_to_hub.main(["--yolo", str(source), f"--repo-id={REPO}", *flags])
        said = capsys.readouterr()
        assert (status != 0) == fails and OWNER not in said.out + said.err, said.err + said.out
        return said.err if fails else said.out

    return push


def same(a: Any, b: Any) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in ours.items())


def test_publish_and_load(hub: Hub, run: Path, push: Push, tmp_path: Path) -> None:
    said = push(run / "best.pt")
    files = hub.files(REPO)
    assert files.keys() == {".gitattributes", "README.md", "example.jpg", "model.pt"}
    own = YOLO(run / "best.pt")
    assert f"all {len(own.model.state_dict())} tensors and the checksums are equal" in said
    names: dict[str, Any] = {}
    exec(said.strip().splitlines()[-1], names)
    detector = names["model"]
    assert type(detector) is YOLO and same(detector.model, own.model) and detector.names == {0: "person", 1: "bus"}
    ours, theirs = (
        m.predict(ASSETS / "bus.jpg", conf=1e-3, imgsz=128, verbose=False)[0].boxes.data for m in (detector, own)
    )
    assert len(ours) and torch.equal(ours, theirs)
    # Ultralytics' own class loads the file, too.
    assert same(ultralytics.YOLO(detector.ckpt_path).model, own.model)

    with Image.open(ASSETS / "bus.jpg") as shown:
        size = shown.size
    (tmp_path / "example.jpg").write_bytes(files["example.jpg"])
    with Image.open(tmp_path / "example.jpg") as example:
        assert example.size == size
    before = hub.history(REPO)
    assert "nothing to push" in push(run / "best.pt") and hub.history(REPO) == before


def test_same_checkpoint_gives_the_same_file() -> None:
    """The order of a set can differ between processes, and with the order in which 0 and 8 are added."""

    def pickled(value: Any, pickler: Any) -> bytes:
        file = io.BytesIO()
        pickler(file, 2).dump(value)
        return file.getvalue()

    a, b = set([0, 8]), set([8, 0])
    assert pickled(a, pickle.Pickler) != pickled(b, pickle.Pickler)
    assert pickled(a, _OrderedPickler) == pickled(b, _OrderedPickler)
    assert pickle.loads(pickled(b, _OrderedPickler)) == a


def test_card_and_private_paths(hub: Hub, run: Path, push: Push, photos: Path) -> None:
    push(run / "best.pt")
    text = hub.files(REPO)["README.md"].decode()
    card = ModelCard(text)
    assert (card.data.library_name, card.data.license, card.data.pipeline_tag) == (
        "ultralytics",
        "agpl-3.0",
        "object-detection",
    )
    assert "stvit" in (card.data.tags or []) and "](example.jpg)" in text and "2 classes: `person`, `bus`" in text
    assert "yolo26n-stvit_pico.yaml" in text and "on the validation images of `photos.yaml` at 64 pixels" in text
    expected = torch.load(run / "best.pt", weights_only=False)["train_metrics"]["metrics/mAP50(B)"]
    assert f"| mAP50(B) | {expected:.4f} |" in text and "@inproceedings{huang2023stvit" in text
    snippet = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)[0].replace('"photos"', repr(str(ASSETS)))
    names: dict[str, Any] = {}
    exec(snippet, names)
    assert snippet.startswith("from stvit.adapters.yolo import YOLO") and len(names["results"]) == 2
    # The checkpoint of the run contains paths of this machine. The published one does not.
    assert str(photos.parent).encode() in (run / "best.pt").read_bytes()
    assert not any(
        str(Path(place)).encode() in hub.files(REPO)["model.pt"]
        for place in (photos.parent, run, Path.home(), Path.cwd())
    )
    for place in ({"data": [r"C:\\Users\\bob\\a.yaml", "../bob/b.yaml"]}, {"cfg": Path("/home/bob/c.yaml")}):
        assert "bob" not in str(_without_paths(place)) and ".yaml" in str(_without_paths(place))
    published = torch.load(YOLO(f"hf-hub:{REPO}").ckpt_path, weights_only=False)
    assert published["optimizer"] is None and published["train_args"]["data"] == "photos.yaml"


@pytest.mark.parametrize(
    ("model", "is_stvit"),
    [
        ("yolo26n-stvit_pico.yaml", True),
        ("yolo26n-stokenattention.yaml", True),
        ("yolo26n-convnext_atto.yaml", False),
        ("yolo26n.yaml", False),
    ],
)
def test_only_the_card_of_a_detector_with_super_tokens_names_stvit(
    hub: Hub, push: Push, tmp_path: Path, model: str, is_stvit: bool
) -> None:
    YOLO(model).save(tmp_path / "model.pt")
    push(tmp_path / "model.pt", "--dry-run", f"--output={tmp_path / 'folder'}")
    text = (tmp_path / "folder/README.md").read_text(encoding="utf-8")
    tags = ["object-detection", "ultralytics", *(["stvit", "super-token-attention"] if is_stvit else [])]
    assert ModelCard(text).data.tags == tags
    assert ("@inproceedings{huang2023stvit" in text) == ("## Citation" in text) == is_stvit


def test_state_for_resuming_is_not_published(hub: Hub, run: Path, push: Push, tmp_path: Path) -> None:
    """The last.pt of an interrupted run contains the optimizer, and the model as the moving average."""
    checkpoint = torch.load(run / "last.pt", weights_only=False)
    average = checkpoint["model"]
    checkpoint |= {"ema": average, "model": None, "optimizer": {"state": {0: {"exp_avg": torch.ones(3_000_000)}}}}
    torch.save(checkpoint, tmp_path / "last.pt")
    push(tmp_path / "last.pt", "--license=agpl-3.0", "--private", "--tag=v1")
    assert len(hub.files(REPO)["model.pt"]) < 8_000_000 < (tmp_path / "last.pt").stat().st_size
    assert same(YOLO(f"hf-hub:{REPO}@v1").model, average.float())


def test_dry_run_and_own_example(hub: Hub, run: Path, push: Push, tmp_path: Path, photos: Path) -> None:
    picture = sorted((photos.parent / "images").glob("zidane_*.jpg"))[0]
    said = push(run / "best.pt", "--dry-run", f"--output={tmp_path / 'out'}", f"--example={picture}")
    assert hub.requests == [] and f"![Results on {picture.name}]" in said
    with Image.open(picture) as shown, Image.open(tmp_path / "out/example.jpg") as example:
        assert example.size == shown.size
    assert "picture none.jpg does not exist" in push(run / "best.pt", "--example=none.jpg", fails=True)
    assert "--img-size cannot be combined with a checkpoint of a detector, which stores its own configuration" in push(
        run / "best.pt", "--img-size=64", fails=True
    )
    assert "none.pt does not exist" in push(run / "none.pt", fails=True)


@pytest.mark.long
def test_other_ways_to_load(
    hub: Hub, run: Path, push: Push, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    push(run / "best.pt")
    source = f"hf-hub:{REPO}"
    arguments = ["predict", f"model={source}", f"source={ASSETS / 'bus.jpg'}", f"project={tmp_path}", "imgsz=64"]
    assert yolo_command.main(arguments) == 0
    assert list(tmp_path.rglob("bus.jpg"))
    own = YOLO(run / "best.pt")
    assert same(YOLO("yolo26n-stvit_pico.yaml").load(source).model.model[0], own.model.model[0])
    filled = YOLO("yolo26n-stvit_pico.yaml", stock_weights=source)
    key = "cv3.0.0.0.conv.weight"
    assert torch.equal(filled.model.model[-1].state_dict()[key], own.model.model[-1].state_dict()[key])
    assert yolo_command.main(["predict", "model=hf-hub:org/none", f"source={ASSETS}"]) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(
        "error: hf-hub:org/none: cannot load the detector of the Hub repository org/none (revision main)"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert same(YOLO(source).model, own.model)


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_no_code_is_run(hub: Hub, run: Path, push: Push, tmp_path: Path) -> None:
    checkpoint = torch.load(run / "best.pt", weights_only=False)
    harm, evil = tmp_path / "harm", tmp_path / "evil.pt"
    hub.create_repo("org/evil")
    for spoiled in (
        checkpoint | {"more": Evil(harm)},
        {"model": Evil(harm)},
        checkpoint | {"train_args": {"data": Evil(harm)}},
    ):
        torch.save(spoiled, evil)
        hub.commit("org/evil", {"best.pt": evil.read_bytes()})
        for load in (YOLO, lambda name: YOLO("yolo26n-stvit_pico.yaml").load(name)):
            with pytest.raises(
                PretrainedError, match=r"org/evil.*wants to run posix.mkdir, which is not part of a detector"
            ):
                load("hf-hub:org/evil")
        assert "wants to run posix.mkdir" in push(evil, fails=True)
    assert not harm.exists()
    # A class whose name begins with a trusted name is not trusted.
    module = type(sys)("timm.models.evil")
    module.Evil = type("Evil", (), {"__module__": "timm.models.evil"})
    sys.modules["timm.models.evil"] = module
    try:
        torch.save({"model": module.Evil()}, evil)
        with pytest.raises(PretrainedError, match=r"wants to run timm.models.evil.Evil"):
            open_safely(evil)
    finally:
        del sys.modules["timm.models.evil"]


@pytest.mark.long
def test_no_code_is_run_when_training_builds_the_model(
    hub: Hub, run: Path, push: Push, tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training builds the model from its configuration, and Ultralytics evaluates parts of it as code."""
    harm, evil = tmp_path / "harm", tmp_path / "evil.pt"
    hub.create_repo("org/evil")
    code = f"__import__('os').mkdir({str(harm)!r}) or nn.SiLU()"
    for key, value, said in (
        ("activation", code, r"wants to run .__import__.* as its activation"),
        ("activation", "nn.init.zeros_()", "as its activation"),
        ("head", [[-1, 1, "torch_safe_load", ["evil.pt"]]], "wants to run 'torch_safe_load' as a layer"),
        ("backbone", [[-1, 1, "nn.modules", []]], "wants to run 'nn.modules' as a layer"),
        ("head", "x", "wants to run 'x' as a layer"),
    ):
        checkpoint = torch.load(run / "best.pt", weights_only=False)
        checkpoint["model"].yaml = {**checkpoint["model"].yaml, key: value}
        torch.save(checkpoint, evil)
        hub.commit("org/evil", {"model.pt": evil.read_bytes()})
        with pytest.raises(PretrainedError, match=said):
            YOLO("hf-hub:org/evil")
        assert "wants to run" in push(evil, fails=True)

    def spoiled(spoil: Callable[[dict[str, Any]], Any]) -> None:
        checkpoint = torch.load(run / "best.pt", weights_only=False)
        spoil(checkpoint)
        torch.save(checkpoint, evil)
        with pytest.raises(PretrainedError):
            open_safely(evil)

    def hide(checkpoint: dict[str, Any]) -> None:
        """`vars` does not show the configuration, but the module finds it."""
        own = vars(checkpoint["model"])
        own["_buffers"]["yaml"] = {**own.pop("yaml"), "activation": code}

    def disguise(checkpoint: dict[str, Any]) -> None:
        checkpoint["model"].yaml = OrderedDict(checkpoint["model"].yaml)

    def nest(checkpoint: dict[str, Any]) -> None:
        """The layer is a whole model that builds itself from its own configuration."""
        checkpoint["model"].yaml["head"] = [
            [-1, 1, "DetectionModel", [{"activation": code, "backbone": [], "head": []}]]
        ]

    spoiled(hide)
    spoiled(disguise)
    spoiled(nest)
    spoiled(lambda checkpoint: checkpoint.update(modelopt={"state": 1}))
    spoiled(lambda checkpoint: vars(checkpoint["model"]).update(forward=torch.nn.Linear))
    spoiled(lambda checkpoint: vars(checkpoint["model"])["_forward_hooks"].update({0: torch.nn.Linear}))
    spoiled(lambda checkpoint: vars(checkpoint["model"]).update(_modules=torch.nn.ParameterDict()))
    checkpoint = torch.load(run / "best.pt", weights_only=False)
    checkpoint["model"].yaml["activation"] = "torch.nn.LeakyReLU(0.1)"
    # A data file may contain a download script. The data file of the publisher is not used.
    (tmp_path / "evil.yaml").write_text(
        f"train: none\nval: none\nnames: [a]\ndownload: import os; os.mkdir({str(harm)!r})\n"
    )
    checkpoint["train_args"] |= {"data": str(tmp_path / "evil.yaml")}
    torch.save(checkpoint | {"epoch": 0, "optimizer": {}}, evil)
    hub.commit("org/evil", {"model.pt": evil.read_bytes()})
    assert YOLO(Path("hf-hub:org/evil")).overrides["data"] == "evil.yaml"
    detector = YOLO("hf-hub:org/evil")
    assert detector.overrides["data"] == "evil.yaml"
    monkeypatch.chdir(photos.parent)
    with pytest.raises(FileNotFoundError, match=r"evil\.yaml"):
        detector.val(plots=False)
    with pytest.raises(ValueError, match="has no training state to resume"):
        detector.train(resume=True)
    detector.train(data=str(photos), epochs=1, project=str(tmp_path), name="again", **QUICK)  # with own data
    assert (tmp_path / "again/weights/best.pt").exists() and not harm.exists()


def test_repositories_without_a_detector(hub: Hub, run: Path) -> None:
    def fails(name: str, kind: type[Exception] = PretrainedError) -> str:
        with pytest.raises(kind, match=name.split("@")[0]) as caught:
            YOLO(f"hf-hub:{name}")
        assert type(caught.value) is kind and caught.value.__cause__ is not None
        return str(caught.value)

    assert "it does not exist, or it is private" in fails("org/none", PretrainedDownloadError)
    hub.create_repo("org/some")
    assert "it has no model.pt, and no file ends in .pt" in fails("org/some")
    content = (run / "best.pt").read_bytes()
    hub.commit("org/some", {"a.pt": content, "b.pt": content})
    assert "these files end in .pt: a.pt, b.pt" in fails("org/some")
    assert "revision 'v9' does not exist" in fails("org/some@v9", PretrainedDownloadError)
    hub.commit("org/some", {"a.pt": None})
    assert YOLO("hf-hub:org/some").names[1] == "bus"  # the only .pt file
    for spoiled, said in (
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        (content[: len(content) // 2], "is not a checkpoint of Ultralytics"),
    ):
        shutil.rmtree(constants.HF_HUB_CACHE)
        hub.commit("org/some", {"b.pt": spoiled})
        assert said in fails("org/some")
    torch.save({"model": torch.ones(2)}, run.parent / "tensor.pt")
    hub.commit("org/some", {"b.pt": (run.parent / "tensor.pt").read_bytes()})
    assert "it contains no model" in fails("org/some")

"""Tests that opening a checkpoint runs no code, unless the user trusts the file."""

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import ultralytics
from ultralytics.nn.modules import Detect
from ultralytics.utils import ASSETS, IterableSimpleNamespace
from ultralytics.utils.loss import v8DetectionLoss

from stvit import PretrainedError
from stvit.adapters.yolo import YOLO
from stvit.adapters.yolo.checkpoint import check_local, is_trusting, open_safely, trusting
from stvit.adapters.yolo.engine import DetectionTrainer
from stvit.adapters.yolo.weights import load_stock
from stvit.tools import yolo as yolo_command

REFUSED = r"evil\S*\.(pt|PT) wants to run posix\.mkdir.*pass trust=True"
QUICK = {"imgsz": 64, "batch": 4, "plots": False, "val": False, "amp": False, "device": "cpu", "mosaic": 0.0}
NEW = "yolo26n-stvit_pico.yaml"


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of Ultralytics' own model. Tests must not change it."""
    path = tmp_path_factory.mktemp("stock") / "stock.pt"
    ultralytics.YOLO("yolo26n.yaml").save(path)
    return path


@pytest.fixture
def harm(tmp_path: Path) -> Path:
    """Directory that the code of the checkpoint creates."""
    return tmp_path / "harm"


@pytest.fixture
def evil(stock: Path, harm: Path, tmp_path: Path) -> Path:
    """Checkpoint of a detector that also contains code."""
    checkpoint = torch.load(stock, weights_only=False)
    torch.save(checkpoint | {"more": Evil(harm), "epoch": 0, "optimizer": {}}, tmp_path / "evil.pt")
    return tmp_path / "evil.pt"


def test_no_way_in_runs_the_code_of_a_file(
    evil: Path,
    harm: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("evil-world.pt", "evil-yoloe.pt", "evil.PT"):  # of which Ultralytics makes objects of other classes
        (tmp_path / name).write_bytes(evil.read_bytes())
    (tmp_path / "args.yaml").write_text(f"pretrained: {evil}\n")
    (tmp_path / "distill.yaml").write_text(f"distill_model: {evil}\n")
    monkeypatch.chdir(tmp_path)
    settings = {"data": str(photos), "epochs": 1, "project": str(tmp_path / "runs"), **QUICK}
    ways: list[Callable[[], Any]] = [
        lambda: YOLO(evil),
        lambda: YOLO("evil.pt"),
        lambda: YOLO(" evil.pt "),
        lambda: YOLO("evil-world.pt"),
        lambda: YOLO("evil-yoloe.pt"),
        lambda: YOLO("evil.PT"),
        lambda: YOLO(NEW).load(evil),
        lambda: YOLO(NEW, stock_weights=evil),
        lambda: load_stock(YOLO(NEW).model, evil),
        lambda: YOLO(NEW).train(pretrained=str(evil), **settings),
        lambda: YOLO(NEW).train(cfg=str(tmp_path / "args.yaml"), **settings),
        lambda: YOLO(NEW).train(distill_model=str(evil), **settings),
        lambda: YOLO(NEW).train(cfg=str(tmp_path / "distill.yaml"), **settings),
        lambda: YOLO(NEW).train(resume=str(evil), **settings),
        lambda: YOLO(NEW).train(stock_weights=evil, **settings),
        lambda: YOLO(NEW).tune(pretrained=str(evil), iterations=1, **settings),
        lambda: DetectionTrainer(overrides={"model": NEW, "resume": str(evil), **settings}),
        lambda: DetectionTrainer(overrides={"model": str(evil), **settings}).setup_model(),
        lambda: DetectionTrainer(overrides={"model": NEW, "pretrained": str(evil), **settings}).setup_model(),
    ]
    for way in ways:
        with pytest.raises(RuntimeError, match=REFUSED):
            way()
        assert not harm.exists()
    new = f"model={NEW}"
    for name in (
        "evil-rtdetr.pt",
        "evil-fastsam.pt",
        "evil-sam_b.pt",
        "evil-yolo_nas.pt",
    ):  # other classes of Ultralytics' command
        (tmp_path / name).write_bytes(evil.read_bytes())
        assert yolo_command.main(["predict", f"model={name}", f"source={ASSETS / 'bus.jpg'}"]) == 1
        assert f"{name} wants to run posix.mkdir" in capsys.readouterr().err
    for arguments in ([f"model={evil}"], [new, f"stock_weights={evil}"], [new, f"pretrained={evil}"]):
        capsys.readouterr()
        assert yolo_command.main(["train", *arguments, f"data={photos}", "epochs=1", "imgsz=64"]) == 1
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith("error: ") and "pass trust=True" in said and "unexpected" not in said
    assert not harm.exists()


def test_trust_opens_it(evil: Path, harm: Path, tmp_path: Path) -> None:
    source = f"source={ASSETS / 'bus.jpg'}"
    for way in (
        lambda: YOLO(evil, trust=True),
        lambda: YOLO(NEW, trust=True).load(evil),
        lambda: YOLO("yolo26n.yaml", stock_weights=evil, trust=True),
        lambda: load_stock(YOLO("yolo26n.yaml").model, evil, trust=True),
        lambda: yolo_command.main(["predict", f"model={evil}", "trust=true", source, "imgsz=64", "save=False"]),
        lambda: ultralytics.YOLO(evil),  # stays as Ultralytics made it
    ):
        way()
        harm.rmdir()
    assert yolo_command.main(["predict", f"model={evil}", "trust=false", f"source={ASSETS}"]) == 1
    assert yolo_command.main(["predict", f"model={evil}", "trust=maybe"]) == 1
    assert not harm.exists()


@pytest.mark.long
def test_trust_reaches_the_processes_of_a_training(evil: Path, harm: Path) -> None:
    script = "import sys; from stvit.adapters.yolo.checkpoint import check_local; check_local(sys.argv[1])"
    for trust, status in ((True, 0), (False, 1)):
        with trusting(trust):
            assert is_trusting() is trust
            done = subprocess.run([sys.executable, "-c", script, str(evil)], capture_output=True, timeout=300)
            assert done.returncode == status
    assert not is_trusting() and not harm.exists()


def test_training_from_a_trusted_file_and_resuming(stock: Path, photos: Path, tmp_path: Path) -> None:
    """A run opens its own last.pt without trust, with and without the optimizer."""
    settings = {"data": str(photos), "project": str(tmp_path), "name": "run", **QUICK}

    class Stop(Exception):
        pass

    def stop(trainer: Any) -> None:
        if trainer.epoch == 0:
            raise Stop

    model = YOLO(stock)
    model.add_callback("on_model_save", stop)
    with pytest.raises(Stop):
        model.train(epochs=2, **settings)
    last = tmp_path / "run/weights/last.pt"
    assert torch.load(last, weights_only=False)["optimizer"] is not None
    YOLO(last).train(resume=True)
    assert YOLO(last).ckpt["optimizer"] is None and YOLO(tmp_path / "run/weights/best.pt").ckpt["train_args"]


def test_checkpoints_of_older_versions_are_opened(stock: Path, tmp_path: Path) -> None:
    """Ultralytics 8.0 had its modules in other files, and saved losses, methods and namespaces with the model."""
    checkpoint = torch.load(stock, weights_only=False)
    model = checkpoint["model"].float()
    model.args = IterableSimpleNamespace(**{"box": 7.5, "cls": 0.5, "dfl": 1.5, "overlap_mask": True})
    model.model[-1].detect = Detect.forward
    model.model[0].forward = model.model[0].forward_fuse
    model.criterion = v8DetectionLoss(ultralytics.YOLO("yolov8n.yaml").model)
    checkpoint["train_args"] = {"project": Path("runs"), "model": "yolov8n.pt"}
    checkpoint["best_fitness"] = np.float64(0.5)
    torch.save(checkpoint, tmp_path / "new.pt")
    with zipfile.ZipFile(tmp_path / "new.pt") as new, zipfile.ZipFile(tmp_path / "old.pt", "w") as old:
        for name in new.namelist():
            content = new.read(name)
            if name.endswith("data.pkl"):
                for theirs, ours in (
                    (b"ultralytics.yolo.utils\nIter", b"ultralytics.utils\nIter"),
                    (b"ultralytics.nn.modules\nConv", b"ultralytics.nn.modules.conv\nConv"),
                    (b"ultralytics.nn.modules\nBottleneck", b"ultralytics.nn.modules.block\nBottleneck"),
                ):
                    assert ours in content
                    content = content.replace(ours, theirs)
            old.writestr(name, content)
    assert open_safely(tmp_path / "old.pt")["model"].args.box == 7.5
    assert YOLO(tmp_path / "old.pt").predict(ASSETS / "bus.jpg", imgsz=64, verbose=False)


@pytest.mark.parametrize(
    ("name", "value"), [("detect", torch.nn.Linear), ("forward", Detect.forward), ("criterion", torch.nn.Linear)]
)
def test_objects_in_place_of_a_method_are_refused(stock: Path, tmp_path: Path, name: str, value: Any) -> None:
    checkpoint = torch.load(stock, weights_only=False)
    vars(checkpoint["model"].model[-1])[name] = value
    torch.save(checkpoint, tmp_path / "evil.pt")
    with pytest.raises(PretrainedError, match=f"{name} of a Detect wants to run"):
        open_safely(tmp_path / "evil.pt")


@pytest.mark.long
@pytest.mark.parametrize("task", ["", "-seg", "-sem", "-pose", "-obb", "-depth", "-cls"])
def test_stock_checkpoints_of_every_task_and_version_are_opened(tmp_path: Path, task: str) -> None:
    for version in ("yolov5n", "yolov8n", "yolo11n", "yolo26n"):
        try:
            ultralytics.YOLO(f"{version}{task}.yaml").save(tmp_path / "stock.pt")
        except FileNotFoundError:  # not every version has every task
            continue
        open_safely(tmp_path / "stock.pt")


def test_a_compressed_checkpoint_is_refused(stock: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(stock) as plain, zipfile.ZipFile(tmp_path / "evil.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    with pytest.raises(PretrainedError, match=r"compressed or encrypted.*pass trust=True"):
        check_local(tmp_path / "evil.pt")

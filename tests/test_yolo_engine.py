"""Runs every mode of Ultralytics with our models on real photographs."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnxruntime
import pytest
import torch
import ultralytics
from torch import nn
from ultralytics.utils import ASSETS

from stvit.adapters.yolo import YOLO, DetectionTrainer, TimmBackbone, model_file
from stvit.adapters.yolo.modules import BackboneBatchNorm2d
from tests.torchrun import torchrun
from tests.versions import needs_gloo_average

QUICK = {"imgsz": 64, "batch": 4, "plots": False, "val": False, "amp": False, "device": "cpu", "mosaic": 0.0}
RATES = {"backbone_lr_scale": 0.1, "layer_decay": 0.8}


def fresh(script: str, *arguments: Any, **env: str) -> str:
    """Runs a script in a new Python process and returns its output."""
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")} | env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory of a detector that trained for two epochs with backbone rates.

    Tests must not change it.
    """
    folder = tmp_path_factory.mktemp("runs")
    model = YOLO("yolo26n-stvit_pico.yaml", **RATES)
    model.train(
        data=str(photos), epochs=2, project=str(folder), name="run", nbs=4, optimizer="AdamW", save_period=1, **QUICK
    )
    return folder / "run"


@pytest.fixture(scope="module")
def best(run: Path) -> Path:
    return run / "weights" / "best.pt"


@pytest.fixture
def detector(best: Path) -> YOLO:
    return YOLO(best)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Photograph (1, 3, 64, 96) with values from 0 to 1."""
    photo = cv2.resize(cv2.imread(str(ASSETS / "bus.jpg")), (96, 64))[..., ::-1]
    return torch.from_numpy(np.ascontiguousarray(photo)).permute(2, 0, 1)[None].float() / 255


def raw(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Returns the raw output of a model before detections are selected, (B, 4 + classes, N)."""
    with torch.no_grad():
        return model.eval()(images)[0]


# Training


def groups(trainer: Any) -> dict[str, list[tuple[float, str]]]:
    """Returns the relative learning rate and the kind of the parameter group, for each parameter."""
    names = {id(param): name for name, param in trainer.model.named_parameters()}
    base = trainer.args.lr0
    return {
        names[id(param)]: (group["initial_lr"] / base, group["param_group"])
        for group in trainer.optimizer.param_groups
        for param in group["params"]
    }


@pytest.mark.parametrize(
    "optimizer", ["AdamW", *(pytest.param(name, marks=pytest.mark.long) for name in ("MuSGD", "SGD"))]
)
def test_backbone_has_its_own_learning_rates(optimizer: str, photos: Path, tmp_path: Path) -> None:
    def trained(**rates: float) -> dict[str, Any]:
        seen = {}
        model = YOLO("yolo26n-stvit_pico.yaml", **rates)
        model.add_callback("on_train_start", lambda trainer: seen.update(groups(trainer)))
        model.train(data=str(photos), epochs=1, optimizer=optimizer, lr0=0.01, project=str(tmp_path), **QUICK)
        return seen

    plain, factor, decayed = trained(), trained(backbone_lr_scale=0.1), trained(**RATES)
    assert plain.keys() == factor.keys() == decayed.keys()  # no parameter lost, none twice
    last = "model.0.net.stages.3.blocks.0.mlp.fc1.weight"
    first = "model.0.net.stem.0.weight"
    for name, (rate, kind) in plain.items():
        inside = name.startswith("model.0.")
        assert factor[name][0] == pytest.approx(rate * (0.1 if inside else 1.0)), name
        # Warm-up starts with a high rate for groups named 'bias', which the backbone must not have.
        assert factor[name][1] == ("backbone_bias" if inside and kind == "bias" else kind)
    assert decayed[last][0] == pytest.approx(plain[last][0] * 0.1)
    assert decayed[first][0] == pytest.approx(plain[first][0] * 0.1 * 0.8**7, rel=0.3)
    assert decayed[first][0] < decayed["model.0.net.stages.1.blocks.0.mlp.fc1.weight"][0] < decayed[last][0]


@pytest.mark.long
def test_rates_are_kept_by_checkpoints_and_resume(run: Path, photos: Path, tmp_path: Path) -> None:
    seen: dict[str, Any] = {}
    first = YOLO("yolo26n-stvit_pico.yaml", **RATES)

    def stop(trainer: Any) -> None:
        seen["first"] = groups(trainer)
        raise KeyboardInterrupt

    first.add_callback("on_model_save", stop)
    with pytest.raises(KeyboardInterrupt):
        first.train(data=str(photos), epochs=3, project=str(tmp_path), name="cut", optimizer="AdamW", **QUICK)
    last = tmp_path / "cut" / "weights" / "last.pt"

    again = YOLO(last)
    assert {key: again.model.yaml[key] for key in RATES} == RATES
    again.add_callback("on_train_start", lambda trainer: seen.update(again=groups(trainer), start=trainer.start_epoch))
    again.train(resume=True)
    assert seen["start"] == 1
    assert seen["again"] == seen["first"]
    assert (tmp_path / "cut" / "results.csv").read_text().count("\n") == 4  # a header and three epochs
    assert YOLO(tmp_path / "cut" / "weights" / "best.pt").model.yaml["layer_decay"] == 0.8


def test_lost_rates_are_announced(
    run: Path, photos: Path, tmp_path: Path, ultralytics_log: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(RuntimeError, match=r"resume it with stvit\.adapters\.yolo\.YOLO"):
        ultralytics.YOLO(run / "weights" / "epoch0.pt").train(resume=True)
    ultralytics.YOLO(run / "weights" / "best.pt").train(data=str(photos), epochs=1, project=str(tmp_path), **QUICK)
    assert "Use stvit.adapters.yolo.YOLO to train with it" in ultralytics_log.text


def test_freeze_1_freezes_all_of_the_backbone(photos: Path, tmp_path: Path) -> None:
    states: list[dict[str, torch.Tensor]] = []

    def keep(trainer: Any) -> None:
        states.append({key: value.clone() for key, value in trainer.model.state_dict().items()})

    model = YOLO("yolo26n-stvit_pico.yaml")
    for event in ("on_train_start", "on_train_end"):
        model.add_callback(event, keep)
    model.train(
        data=str(photos), epochs=2, nbs=4, freeze=1, optimizer="SGD", warmup_epochs=0, project=str(tmp_path), **QUICK
    )
    changed = [key for key in states[0] if not torch.equal(states[0][key], states[1][key])]
    assert not [key for key in changed if key.startswith("model.0.")]
    assert "model.13.cv1.conv.weight" in changed


@pytest.mark.parametrize("task", ["segment", "semantic", "pose", "obb", "depth", "classify"])
def test_every_task_has_our_trainer(task: str) -> None:
    suffix = {"segment": "seg", "semantic": "sem", "classify": "cls"}.get(task, task)
    model = YOLO(f"yolo26n-stvit_pico-{suffix}.yaml")
    trainer = model.task_map[task]["trainer"]
    assert trainer.__module__ == "stvit.adapters.yolo.engine"
    assert issubclass(trainer, ultralytics.YOLO("yolo26n.yaml").task_map[task]["trainer"])


@pytest.mark.long
def test_the_script_of_the_article(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    script = f"""
import warnings
warnings.filterwarnings('ignore')
from stvit.adapters.yolo import YOLO

if __name__ == '__main__':
    model = YOLO('yolo26-stokenattention.yaml')
    model.train(data=r'{photos}',
                imgsz=640,
                epochs=1,
                single_cls=False,
                batch=8,
                close_mosaic=10,
                workers=0,
                device='cpu',
                optimizer='MuSGD',
                amp=False,
                project='runs/train',
                name='exp',
                )
"""
    own = {"YOLO_CONFIG_DIR": str(tmp_path / "config")}  # whose settings keep the runs in this folder
    fresh(f"import ultralytics; ultralytics.settings.update({{'runs_dir': {str(tmp_path / 'runs')!r}}})", **own)
    fresh(script, **own)
    trained = next(tmp_path.rglob("exp/weights/best.pt"))
    layers = ultralytics.YOLO(trained).model.model
    assert sum(type(layer).__name__ == "StokenAttention" for layer in layers) == 5


# Checkpoints

RELOAD = """
import sys, torch
from ultralytics import YOLO
assert not any(name.startswith('stvit') for name in sys.modules)
model = YOLO(sys.argv[1])
assert 'stvit.adapters.yolo' in sys.modules
images = torch.load(sys.argv[2])
torch.save(model.model.eval()(images)[0].detach(), sys.argv[3])
print(type(model.model.model[0]).__name__)
"""


def test_a_process_that_imports_only_ultralytics_loads_a_checkpoint(
    best: Path, detector: YOLO, images: torch.Tensor, tmp_path: Path
) -> None:
    torch.save(images, tmp_path / "in.pt")
    assert "TimmBackbone" in fresh(RELOAD, best, tmp_path / "in.pt", tmp_path / "out.pt")
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), raw(detector.model, images), rtol=0, atol=1e-4)


SAFELY = """
import sys, stvit.adapters.yolo, ultralytics
for kind, path in zip((ultralytics.YOLO, stvit.adapters.yolo.YOLO), sys.argv[1:]):
    print(type(kind(path).model.model[0]).__name__)
"""


def test_restricted_loading(best: Path, tmp_path: Path) -> None:
    YOLO("yolo26n-resnet18.yaml").save(tmp_path / "resnet.pt")
    said = fresh(SAFELY, best, tmp_path / "resnet.pt", ULTRALYTICS_SAFE_LOAD="1")
    assert said.count("TimmBackbone") == 2


def test_reloaded_checkpoints_keep_their_normalization(best: Path, detector: YOLO) -> None:
    net = detector.model.model[0].net
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert all(type(module) is BackboneBatchNorm2d and module.eps == 1e-5 for module in norms)
    assert detector.names == {0: "person", 1: "bus"}


# Inference


def test_fuse_folds_the_backbone(detector: YOLO, images: torch.Tensor) -> None:
    before = raw(detector.model, images)
    layers = len(list(detector.model.modules()))
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in detector.model.model[0].modules())
    detector.fuse()
    left = sum(isinstance(module, nn.BatchNorm2d) for module in detector.model.model[0].modules())
    assert (norms, left) == (14, 4)  # those of the stem are between an activation and a padded convolution
    assert len(list(detector.model.modules())) < layers
    assert detector.model.is_fused()
    after = raw(detector.model, images)
    assert before.shape == (1, 6, 126)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    detector.fuse()  # fusing again changes nothing
    torch.testing.assert_close(raw(detector.model, images), after, rtol=0, atol=0)


def test_half(detector: YOLO, images: torch.Tensor) -> None:
    backbone = detector.model.model[0]
    before = backbone(images)
    after = backbone.half()(images.half())
    assert all(x.dtype == torch.float16 for x in after)
    for x, y in zip(after, before, strict=True):
        assert (x.float() - y).abs().mean() < 0.02 * y.std()


@pytest.mark.parametrize(
    "name", ["yolo26n.yaml", "yolo26n-stvit_pico.yaml", "yolo26n-convnext_atto.yaml", "yolo26n-stvit_pico-cls.yaml"]
)
def test_every_row_can_be_embedded(name: str, tmp_path: Path) -> None:
    """Tests all rows but the head, whose outputs Ultralytics does not pool."""
    model = YOLO(name)
    model.save(tmp_path / "model.pt")
    for detector in (model, ultralytics.YOLO(tmp_path / "model.pt")):
        net = detector.model.eval()
        for row in range(len(net.model) - 1):
            [vector] = detector.embed(ASSETS / "bus.jpg", embed=[row], imgsz=64, verbose=False)
            assert vector.ndim == 1 and torch.isfinite(vector).all(), row
    if name == "yolo26n.yaml":
        return
    image = torch.rand(2, 3, 64, 64)
    maps = net.model[0](image)
    assert isinstance(maps, list) and len(maps) == len(net.model[0].out_indices)
    expected = torch.cat([x.mean((2, 3)) for x in maps], dim=1)
    for row in range(4):
        torch.testing.assert_close(torch.stack(net(image, embed=[row])), expected)
    both = torch.stack(net(image, embed=[0, 4]))
    torch.testing.assert_close(both, torch.cat([expected, maps[0].mean((2, 3))], dim=1))


def test_feature_maps_support_only_pooling() -> None:
    maps = TimmBackbone(3, "test_resnet", [1, 2])(torch.rand(1, 3, 64, 64))
    with pytest.raises(TypeError, match="max_pool2d"):
        torch.nn.functional.max_pool2d(maps, 2)


def test_val_predict_embed(detector: YOLO, photos: Path, tmp_path: Path) -> None:
    metrics = detector.val(data=str(photos), imgsz=64, plots=False, project=str(tmp_path), device="cpu")
    assert 0.0 <= metrics.box.map50 <= 1.0
    one = detector.predict(ASSETS / "bus.jpg", imgsz=64, conf=0.0001, verbose=False)
    assert len(one) == 1
    assert len(one[0].boxes) > 0
    assert one[0].orig_shape == (1080, 810)
    many = detector.predict(photos.parent / "images", imgsz=64, batch=2, verbose=False)
    assert len(many) == 4
    vectors = detector.embed([ASSETS / "bus.jpg", ASSETS / "zidane.jpg"], imgsz=64, verbose=False)
    assert len(vectors) == 2
    assert vectors[0].shape == vectors[1].shape
    assert not torch.equal(vectors[0], vectors[1])


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """Video of six frames that pans over a photograph."""
    photo = cv2.resize(cv2.imread(str(ASSETS / "bus.jpg")), (320, 426))
    path = tmp_path / "pan.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 5, (256, 256))
    for step in range(6):
        writer.write(np.ascontiguousarray(photo[20 * step : 20 * step + 256, 8 * step : 8 * step + 256]))
    writer.release()
    return path


def test_video_and_tracking(detector: YOLO, video: Path) -> None:
    frames = list(detector.predict(video, imgsz=64, stream=True, verbose=False))
    assert len(frames) == 6
    # The detector is hardly trained, so boxes of any confidence count.
    tracker = video.parent / "tracker.yaml"
    tracker.write_text(
        "tracker_type: bytetrack\ntrack_high_thresh: 0.0001\ntrack_low_thresh: 0.00001\nnew_track_thresh: 0.0001\n"
        "track_buffer: 30\nmatch_thresh: 0.8\nfuse_score: false\n"
    )
    tracked = detector.track(video, imgsz=64, conf=0.00001, tracker=str(tracker), persist=True, verbose=False)
    assert len(tracked) == 6
    assert any(frame.boxes.is_track for frame in tracked)


# Export


def same_detections(found: np.ndarray, expected: torch.Tensor) -> None:
    """Compares boxes in pixels and scores from 0 to 1, (B, 4 + classes, N)."""
    np.testing.assert_allclose(found[:, :4], expected[:, :4].numpy(), atol=2e-3)
    np.testing.assert_allclose(found[:, 4:], expected[:, 4:].numpy(), atol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("dynamic", [False, True])
def test_onnx(dynamic: bool, detector: YOLO, best: Path, tmp_path: Path) -> None:
    copied = tmp_path / "best.pt"
    copied.write_bytes(best.read_bytes())
    path = YOLO(copied).export(format="onnx", imgsz=64, dynamic=dynamic, device="cpu")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    photo = cv2.imread(str(ASSETS / "zidane.jpg"))[..., ::-1]
    for height, width, batch in [(64, 64, 1), (96, 160, 2)] if dynamic else [(64, 64, 1)]:
        pixels = np.repeat(cv2.resize(photo, (width, height)).transpose(2, 0, 1)[None], batch, 0) / np.float32(255)
        found = session.run(None, {session.get_inputs()[0].name: pixels.astype(np.float32)})[0]
        same_detections(found, raw(detector.model, torch.from_numpy(pixels.astype(np.float32))))
    assert len(ultralytics.YOLO(path).predict(ASSETS / "bus.jpg", imgsz=64, verbose=False)) == 1


WITH_ATTENTION = """
nc: 2
scales:
  n: [0.50, 0.25, 1024]
backbone:
  - [-1, 1, Conv, [64, 3, 2]]
  - [-1, 1, Conv, [128, 3, 2]]
  - [-1, 1, StokenAttention, [c2, 8, 2]]
  - [-1, 1, Conv, [256, 3, 2]]
  - [-1, 1, C2STA, [c2, c2, 1, 0.5, 4]]
  - [-1, 1, Conv, [512, 3, 2]]
  - [-1, 1, Conv, [512, 3, 2]]
head:
  - [[4, 5, 6], 1, Detect, [nc]]
"""


def test_onnx_of_super_token_attention(tmp_path: Path) -> None:
    """Exports rows of a user's model file with dynamic sizes, and weights that change the output."""
    (tmp_path / "yolo26n-mine.yaml").write_text(WITH_ATTENTION)
    model = YOLO(tmp_path / "yolo26n-mine.yaml")
    attention = model.model.model[2].attn
    nn.init.normal_(attention.proj.weight)
    model.save(tmp_path / "mine.pt")
    path = YOLO(tmp_path / "mine.pt").export(format="onnx", imgsz=64, dynamic=True, device="cpu")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    reloaded = YOLO(tmp_path / "mine.pt").model
    for height, width in ((64, 64), (160, 96)):
        pixels = torch.rand(1, 3, height, width)
        found = session.run(None, {session.get_inputs()[0].name: pixels.numpy()})[0]
        expected = raw(reloaded, pixels)
        same_detections(found, expected)
    nn.init.zeros_(reloaded.model[2].attn.proj.weight)
    assert (raw(reloaded, pixels) - expected).abs().max() > 1e-2  # the attention changes the output


@pytest.mark.parametrize("format", ["torchscript", pytest.param("openvino", marks=pytest.mark.long)])
def test_other_exports(format: str, detector: YOLO, best: Path, images: torch.Tensor, tmp_path: Path) -> None:
    if format == "openvino":
        pytest.importorskip("openvino")
    copied = tmp_path / "best.pt"
    copied.write_bytes(best.read_bytes())
    path = YOLO(copied).export(format=format, imgsz=[64, 96], device="cpu")
    if format == "torchscript":
        found = torch.jit.load(path)(images)
        found = (found[0] if isinstance(found, tuple) else found).numpy()
        same_detections(found, raw(detector.model, images))
    exported = ultralytics.YOLO(path, task="detect").predict(
        ASSETS / "bus.jpg", imgsz=[64, 96], conf=0.0001, verbose=False
    )
    own = detector.predict(ASSETS / "bus.jpg", imgsz=[64, 96], conf=0.0001, rect=False, verbose=False)
    assert len(exported[0].boxes) == len(own[0].boxes)


@pytest.mark.long
def test_benchmark(best: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "best.pt").write_bytes(best.read_bytes())
    for format in ("-", "torchscript", "onnx"):
        table = YOLO("best.pt").benchmark(data=str(photos), imgsz=64, format=format, device="cpu")
        assert table.height == 1


@pytest.mark.long
def test_tune(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = YOLO("yolo26n-stvit_pico.yaml")
    model.tune(data=str(photos), iterations=2, epochs=1, project=str(tmp_path), name="tune", **{**QUICK, "val": True})
    assert next(tmp_path.rglob("best_hyperparameters.yaml"))


# Several processes


@pytest.mark.long
@pytest.mark.parametrize("whose", ["ours", "Ultralytics'"])
def test_worker_of_a_distributed_run_needs_no_import_of_ours(whose: str, photos: Path, tmp_path: Path) -> None:
    """Runs the file that Ultralytics writes for each process of a multi-GPU run."""
    from ultralytics.utils.dist import ddp_cleanup, generate_ddp_file

    name = model_file("yolo26n-stvit_pico.yaml")
    model = YOLO(name, **RATES) if whose == "ours" else ultralytics.YOLO(name)
    arguments = {**QUICK, "data": str(photos), "epochs": 1, "project": str(tmp_path), "model": str(name)}
    trainer = model._smart_load("trainer")(overrides=arguments, _callbacks=model.callbacks)
    if whose == "ours":
        trainer.model = trainer.get_model(weights=model.model, cfg=model.model.yaml)
    file = generate_ddp_file(trainer)
    try:
        done = subprocess.run([sys.executable, file], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    finally:
        ddp_cleanup(trainer, file)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (trainer.save_dir / "weights" / "last.pt").exists()


TWO_PROCESSES = """
import os, sys
import torch
import torch.distributed as dist
from stvit.adapters.yolo import YOLO, DetectionTrainer

class OnCpus(DetectionTrainer):
    # Ultralytics distributes runs only over GPUs. These three changes allow CPUs.
    def _setup_ddp(self):
        dist.init_process_group("gloo", rank=int(os.environ["RANK"]), world_size=2)

    def final_eval(self):
        pass

class OnCpu(torch.nn.parallel.DistributedDataParallel):
    def __init__(self, module, device_ids=None, **kwargs):
        super().__init__(module, **kwargs)

torch.nn.parallel.DistributedDataParallel = OnCpu
data, folder = sys.argv[1:]
model = YOLO("yolo26n-stvit_pico.yaml", backbone_lr_scale=0.1)
trainer = OnCpus(overrides={"model": model.overrides["model"], "data": data, "epochs": 2, "imgsz": 64, "batch": 4,
    "nbs": 4, "plots": False, "val": False, "amp": False, "device": "cpu", "project": folder, "name": "two",
    "exist_ok": True, "mosaic": 0.0, "optimizer": "SGD", "warmup_epochs": 0})
trainer.world_size = 2
trainer.model = trainer.get_model(weights=model.model, cfg=model.model.yaml)
torch.manual_seed(int(os.environ["RANK"]))
trainer.train()
state = trainer.model.module.state_dict()
torch.save({key: value for key, value in state.items()}, f"{folder}/rank{os.environ['RANK']}.pt")
torch.save(trainer.train_loader.sampler.num_samples, f"{folder}/count{os.environ['RANK']}.pt")
dist.destroy_process_group()
"""


@pytest.mark.long
@needs_gloo_average
def test_two_processes_train_one_model(photos: Path, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(TWO_PROCESSES)
    done = subprocess.run(
        [*torchrun(2), script, photos, tmp_path],
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    states = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    weights = [key for key in states[0] if not key.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    assert all(torch.equal(states[0][key], states[1][key]) for key in weights)
    assert [torch.load(tmp_path / f"count{rank}.pt") for rank in range(2)] == [2, 2]
    assert (tmp_path / "two" / "weights" / "last.pt").exists()
    assert issubclass(DetectionTrainer, ultralytics.models.yolo.detect.DetectionTrainer)


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (
            None,
            r"stvit.adapters.yolo needs Ultralytics: pip install 'stvit\[yolo\]' installs it \(ultralytics>=8.4.190\)",
        ),
        pytest.param(
            "8.4.189",
            r"needs Ultralytics 8.4.190, found 8.4.189: pip install 'stvit\[yolo\]'",
            marks=pytest.mark.long,
        ),
    ],
)
def test_ultralytics_missing_or_too_old(version: str | None, message: str, tmp_path: Path) -> None:
    blocked = "import sys; sys.modules['ultralytics'] = None"
    old = f"import ultralytics; ultralytics.__version__ = {version!r}"
    attempt = "try:\n    import stvit.adapters.yolo\nexcept ImportError as error:\n    print(error)"
    script = f"{old if version else blocked}\n{attempt}"
    assert re.search(message, fresh(script))


@pytest.mark.long
def test_a_set_of_several_data_files_is_trained_by_our_trainer(
    write_photos: Callable[..., Path], tmp_path: Path
) -> None:
    datas = [str(write_photos(tmp_path / name)) for name in ("one", "two")]
    model = YOLO("yolo26n-stvit_pico.yaml", **RATES)
    results = model.train(data=datas, epochs=1, project=str(tmp_path / "runs"), **QUICK)
    assert len(results) == 2
    assert all(value is not None for value in results.values())

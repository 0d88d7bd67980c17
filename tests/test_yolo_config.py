"""Tests model files that are made from those of the installed Ultralytics."""

from pathlib import Path
from typing import Any

import pytest
import torch
import ultralytics
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from ultralytics.nn.tasks import DetectionModel, parse_model, yaml_model_load
from ultralytics.utils import ROOT, YAML

from stvit.adapters.yolo import YOLO, model_file, stoken_config, yolo_config
from stvit.adapters.yolo.config import TASK_SUFFIXES, check_config

BACKBONES = ("stvit_femto", "stvit_pico", "stvit_nano", "stvit_tiny", "stvit_small", "stvit_base", "stvit_large")
PAIRS = {"n": "stvit_femto", "s": "stvit_pico", "m": "stvit_nano", "l": "stvit_tiny", "x": "stvit_small"}
HEADS = {
    "detect": "Detect",
    "segment": "Segment26",
    "semantic": "SemanticSegment",
    "pose": "Pose26",
    "obb": "OBB26",
    "depth": "Depth",
    "classify": "Classify",
}


def stock_rows(task: str) -> list[Any]:
    config = YAML.load(ROOT / "cfg" / "models" / "26" / f"yolo26{TASK_SUFFIXES[task]}.yaml")
    return config["backbone"] + config["head"]


@pytest.mark.parametrize("task", TASK_SUFFIXES)
def test_neck_and_head_are_unchanged(task: str) -> None:
    config = yolo_config("stvit_pico", task)
    rows = config["backbone"] + config["head"]
    stock = stock_rows(task)
    assert len(rows) == len(stock)
    kept = [i for i, source in enumerate(config["stock_layers"]) if source >= 0]
    assert [rows[i] for i in kept] == [stock[config["stock_layers"][i]] for i in kept]
    assert kept == list(range(9, len(stock)))
    assert rows[0][2] == "TimmBackbone"
    assert rows[-1][2] == HEADS[task]


@pytest.mark.parametrize("task", TASK_SUFFIXES)
def test_every_task_builds_and_runs(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # found by name from any working folder
    model = YOLO(f"yolo26n-stvit_pico{TASK_SUFFIXES[task]}.yaml")
    assert model.task == task
    assert type(model.model.model[0]).__name__ == "TimmBackbone"
    assert list(tmp_path.iterdir()) == []
    with torch.no_grad():
        output = model.model.eval()(torch.rand(2, 3, 64, 96))
    first = output if isinstance(output, torch.Tensor) else output[0]
    while not isinstance(first, torch.Tensor):
        first = first[0]
    assert first.shape[0] == 2
    assert first.isfinite().all()


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("task", TASK_SUFFIXES)
def test_every_backbone_has_a_model_file(backbone: str, task: str) -> None:
    path = model_file(f"yolo26s-{backbone}{TASK_SUFFIXES[task]}.yaml")
    config = yaml_model_load(path)
    assert config["scale"] == "s"
    assert config["backbone"][0][3][1] == backbone
    check_config(config)
    with torch.device("meta"):
        layers, _ = parse_model(config, ch=3, verbose=False)
    assert len(layers) == len(config["stock_layers"])


@pytest.mark.parametrize("scale", PAIRS)
def test_scales_pair_with_backbones(scale: str) -> None:
    config = yaml_model_load(model_file(f"yolo26{scale}-stvit.yaml"))
    assert config["scale"] == scale
    assert config["backbone"][0][3][1] == PAIRS[scale]


@pytest.mark.parametrize(
    "scale", [pytest.param(scale, marks=pytest.mark.long if scale in "lx" else []) for scale in PAIRS]
)
def test_pairs_cost_at_most_a_quarter_more(scale: str) -> None:
    """Latency, which has the same limit, depends on the machine: docs/results.md lists it."""
    flops = [count_flops(f"yolo26{scale}{backbone}.yaml") for backbone in ("", "-stvit")]
    assert 0.5 * flops[0] < flops[1] <= 1.25 * flops[0]


def count_flops(name: str) -> int:
    """Counts the operations of a fused detector for a 640x640 image, without computing them."""
    model = YOLO(name)
    model.fuse(verbose=False)
    detector = model.model.eval()
    detector.model[-1].training = True  # returns before it selects boxes, which needs values
    counter = FlopCounterMode(display=False)
    # The counter does not know the fused attention of the CPU.
    with FakeTensorMode(allow_non_fake_inputs=True), sdpa_kernel(SDPBackend.MATH), counter, torch.inference_mode():
        detector(torch.empty(1, 3, 640, 640))
    return counter.get_total_flops()


def test_ultralytics_own_yolo_takes_the_path() -> None:
    path = model_file("yolo26n-stvit_pico.yaml")
    model = ultralytics.YOLO(path)
    assert type(model) is ultralytics.YOLO
    assert type(model.model.model[0]).__name__ == "TimmBackbone"
    assert model.model.yaml["scale"] == "n"


def test_files_in_the_working_directory_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    own = model_file("yolo26n-stvit_pico.yaml").read_text().replace("nc: 80", "nc: 7")
    (tmp_path / "yolo26n-stvit_pico.yaml").write_text(own)
    assert YOLO("yolo26n-stvit_pico.yaml").model.yaml["nc"] == 7


def test_model_files_of_ultralytics_are_unchanged() -> None:
    assert type(YOLO("yolo26n-seg.yaml").model.model[0]).__name__ == "Conv"
    assert type(YOLO("yolo26n.yaml").model.model[0]).__name__ == "Conv"


@pytest.mark.parametrize(
    ("backbone", "channels"),
    [("convnext_atto", [80, 160, 320]), ("resnet18", [128, 256, 512]), ("efficientnet_b0", [40, 112, 320])],
)
def test_any_timm_backbone_with_a_pyramid(backbone: str, channels: list[int]) -> None:
    config = yolo_config(backbone=backbone, task="detect", scale="n")
    assert [row[3] for row in config["backbone"] if row[2] == "Index"] == [[c, i] for i, c in enumerate(channels)]
    model = YOLO(config)
    assert model.model.model[0].channels == channels
    assert model.model.yaml["scale"] == "n"
    assert model.model.stride.tolist() == [8, 16, 32]
    assert YOLO(f"yolo26n-{backbone}.yaml").info() == model.info()


def test_backbone_arguments() -> None:
    config = yolo_config("stvit_pico", scale="n", stoken_size=(8, 4, 2, 1), drop_path_rate=0.2)
    net = YOLO(config).model.model[0].net
    assert [stage.blocks[0].attn.stoken_size for stage in net.stages] == [(8, 8), (4, 4), (2, 2), (1, 1)]
    assert net.stages[3].blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)


@pytest.mark.parametrize("scale", PAIRS)
def test_stokenattention_at_every_scale(scale: str) -> None:
    config = yaml_model_load(model_file(f"yolo26{scale}-stokenattention.yaml"))
    layers, _ = parse_model(config, ch=3, verbose=False)
    kinds = [type(layer).__name__ for layer in layers]
    backbone = len(config["backbone"])
    assert kinds[:backbone].count("StokenAttention") == 2
    assert kinds[backbone:].count("StokenAttention") == 3
    assert [row for row, source in zip(kinds, config["stock_layers"], strict=True) if source >= 0] == [
        row[2].removeprefix("nn.") for row in stock_rows("detect")
    ]


@pytest.mark.parametrize("task", TASK_SUFFIXES)
def test_stokenattention_for_every_task(task: str) -> None:
    model = YOLO(f"yolo26n-stokenattention{TASK_SUFFIXES[task]}.yaml")
    assert model.task == task
    kinds = [type(layer).__name__ for layer in model.model.model]
    assert kinds.count("StokenAttention") == {"semantic": 4, "classify": 2}.get(task, 5)
    assert [type(layer).__name__ for layer in model.model.model][-1] == HEADS[task]
    assert stoken_config(task)["stock_layers"].count(-1) == kinds.count("StokenAttention")


USERS_OWN = """
nc: 3
scales:
  n: [0.50, 0.25, 1024]
  s: [0.50, 0.50, 1024]
backbone:
  - [-1, 1, Conv, [64, 3, 2]]
  - [-1, 1, Conv, [128, 3, 2]]
  - [-1, 1, StokenAttention, [c2, 8, 2]]
  - [-1, 1, Conv, [256, 3, 2]]
  - [-1, 2, C2STA, [c2]]
  - [-1, 1, Conv, [512, 3, 2]]
  - [-1, 1, C2STA, [c2, c2, 2, 0.5, [4, 2]]]
  - [-1, 1, Conv, [1024, 3, 2]]
  - [-1, 1, StokenAttention, [c2, 1, 1, 2, False]]
head:
  - [[4, 6, 8], 1, Detect, [nc]]
"""


@pytest.mark.parametrize("scale", ["n", "s"])
def test_rows_in_a_model_file_of_a_user(scale: str, tmp_path: Path) -> None:
    path = tmp_path / f"yolo26{scale}-mine.yaml"
    path.write_text(USERS_OWN)
    model = ultralytics.YOLO(path).model
    width = {"n": 1, "s": 2}[scale]
    assert [model.model[i].dim for i in (4, 6)] == [64 * width, 128 * width]
    assert len(model.model[6].m) == 2
    assert model.model[2].attn.dim == 32 * width
    assert model.model[2].attn.n_iter == 2
    assert not model.model[8].shortcut
    output = model(torch.rand(1, 3, 96, 64))
    assert output["boxes"].isfinite().all() if "boxes" in output else output


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("yolo26n-stvit_pica.yaml", "unknown backbone 'stvit_pica'; did you mean stvit_"),
        ("yolo26n-nothing_like_it.yaml", "unknown backbone 'nothing_like_it'"),
        ("yolo26n-vit_tiny_patch16_224.yaml", "does not accept images of any size"),
        ("yolo26n-vgg11.yaml", None),
        ("yolo26n-xcit_nano_12_p8_224.yaml", r"feature maps at strides \[8.*needs \[8, 16, 32\]"),
        ("yolo26n-stokenatention.yaml", "did you mean yolo26n-stokenattention.yaml"),
    ],
)
def test_wrong_names_of_model_files(name: str, message: str | None) -> None:
    if message is None:
        assert YOLO(name).model.stride.tolist() == [8, 16, 32]
        return
    with pytest.raises(ValueError, match=message):
        YOLO(name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backbone": "stvit_pico", "task": "detection"}, "task must be one of detect, segment"),
        ({"backbone": "stvit_pico", "scale": "h"}, "scale must be one of n, s, m, l, x"),
        (
            {"backbone": "stvit_pico", "backbone_lr_scale": 0.0},
            "backbone_lr_scale must be a positive number, got 0.0; pass freeze=1",
        ),
        ({"backbone": "stvit_pico", "layer_decay": 1.5}, "layer_decay must be at most 1"),
        ({"backbone": "stvit_pico", "drop_path": 0.1}, "cannot create the backbone stvit_pico with"),
        ({"backbone": "stvit_pico", "dims": (1, 2)}, "."),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        yolo_config(**arguments)


def test_wrong_rows_in_a_model_file_of_a_user(tmp_path: Path) -> None:
    path = tmp_path / "yolo26n-mine.yaml"
    text = model_file("yolo26n-stvit_pico.yaml").read_text()
    path.write_text(text.replace("Index, [128, 1]", "Index, [100, 1]"))
    with pytest.raises(
        ValueError, match="row 6 of the model file: feature map 1 of stvit_pico has 128 channels, got 100"
    ):
        YOLO(path)
    path.write_text(text.replace("Index, [192, 2]", "Index, [192, 3]"))
    with pytest.raises(ValueError, match="row 8 of the model file selects feature map 3, but row 0 returns 3"):
        YOLO(path)
    path.write_text(text.replace("stvit_pico, [1, 2, 3]", "stvit_pico, [3, 2, 1]").replace("[64, 0]", "[192, 0]"))
    with pytest.raises(ValueError, match=r"must be in rising order, got \[3, 2, 1\]|channels, got 192"):
        YOLO(path)
    path.write_text(text.replace("stvit_pico, [1, 2, 3]", "stvit_pico, [1, 2, 7]"))
    with pytest.raises(ValueError, match=r"out_indices \[1, 2, 7\]: .* has feature maps 0 to 3"):
        YOLO(path)


def test_an_index_row_without_number_selects_the_first_map(tmp_path: Path) -> None:
    path = tmp_path / "yolo26n-mine.yaml"
    path.write_text(model_file(Path("yolo26n-stvit_pico.yaml")).read_text().replace("Index, [64, 0]", "Index, [64]"))
    assert YOLO(path).model.stride.tolist() == [8, 16, 32]


@pytest.mark.parametrize("config", [{}, {"nc": 3}, {"backbone": [], "head": None}])
def test_a_configuration_without_rows(config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must have the lists 'backbone' and 'head'"):
        YOLO(config)


@pytest.mark.parametrize("kind", ["StokenAttention", "C2STA"])
def test_a_row_without_width(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "yolo26n-mine.yaml"
    path.write_text(USERS_OWN.replace("[-1, 1, StokenAttention, [c2, 8, 2]]", f"[-1, 1, {kind}, []]"))
    with pytest.raises(ValueError, match=f"first argument of a {kind} row must be a number of channels, or c2"):
        YOLO(path)


def test_a_rate_read_as_text(tmp_path: Path) -> None:
    path = tmp_path / "yolo26n-mine.yaml"
    path.write_text(model_file("yolo26n-stvit_pico.yaml").read_text() + "backbone_lr_scale: 1e-1\n")
    with pytest.raises(
        ValueError, match="backbone_lr_scale must be a positive number, got '1e-1'; YAML reads 1e-1 as text"
    ):
        YOLO(path)


def test_a_backbone_that_refuses_an_image_size() -> None:
    with pytest.raises(ValueError, match="the backbone mvitv2_tiny does not accept images of 256x256 pixels: index"):
        YOLO("yolo26n-mvitv2_tiny.yaml")


def test_a_row_with_the_wrong_width(tmp_path: Path) -> None:
    path = tmp_path / "yolo26n-mine.yaml"
    for kind, wrong in (("StokenAttention, [c2, 8, 2]", "StokenAttention, [128]"), ("C2STA, [c2]", "C2STA, [256]")):
        path.write_text(USERS_OWN.replace(kind, wrong, 1))
        with pytest.raises(ValueError, match=r"write c2 as in \[-1, 1, \w+, \[c2\]\]"):
            YOLO(path)


def test_images_of_a_wrong_size_or_number_of_channels() -> None:
    model = DetectionModel(yolo_config("stvit_pico", scale="n"), verbose=False)
    with pytest.raises(ValueError, match="must be multiples of 32, got 64x100"):
        model(torch.rand(1, 3, 64, 100))
    with pytest.raises(ValueError, match="expects images of 3 channels, got 1"):
        model(torch.rand(1, 1, 64, 64))

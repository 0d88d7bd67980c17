"""torchvision's detectors on timm backbones."""

import csv
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import timm
import torch
from PIL import Image
from timm.optim import create_optimizer_v2
from torch import nn
from torchvision.transforms.functional import pil_to_tensor
from ultralytics.utils import ASSETS

from stvit.adapters import torchvision as detectors
from stvit.adapters.folder import save_model
from stvit.adapters.torchvision.complexity import count_macs
from stvit.adapters.torchvision.models import BUILDERS
from stvit.weights.errors import PretrainedError

ROOT = Path(__file__).parents[1]
RECORDED = list(csv.DictReader((ROOT / "docs/benchmarks/detectors.csv").open()))
# People and bus in Ultralytics' photo bus.jpg of 810x1080 pixels, and their labels.
BOXES = torch.tensor([[48.0, 399, 245, 903], [670, 392, 810, 878], [222, 405, 345, 861], [17, 231, 802, 768]])
LABELS = torch.tensor([1, 1, 1, 2])
SMALL: dict[str, Any] = {"min_size": 96, "max_size": 160, "fpn_channels": 64}
FEW_BOXES: dict[str, Any] = {
    "rpn_post_nms_top_n_train": 100,
    "rpn_post_nms_top_n_test": 100,
    "box_batch_size_per_image": 32,
    "box_detections_per_img": 20,
}
ALL_MODELS = pytest.mark.parametrize("builder", BUILDERS)
# The other two are parts of them.
EXPORTED_MODELS = pytest.mark.parametrize(
    "builder", ["mask_rcnn", pytest.param("cascade_mask_rcnn", marks=pytest.mark.long), "retinanet", "fcos"]
)


def create(builder: str, backbone: str = "test_stvit", **kwargs: Any) -> Any:
    torch.manual_seed(0)
    few = {"detections_per_img": 20} if builder in ("retinanet", "fcos") else FEW_BOXES
    model = BUILDERS[builder](backbone, 3, **{**SMALL, **few, **kwargs})
    if builder == "retinanet":  # all scores of the first weights are close to 0.01
        nn.init.normal_(model.head.classification_head.cls_logits.weight, std=0.3)
    return model


def photo(width: int, height: int, mode: str = "RGB") -> torch.Tensor:
    image = Image.open(ASSETS / "bus.jpg").convert(mode).resize((width, height))
    return pil_to_tensor(image).float() / 255


def target(width: int, height: int, objects: int = 4) -> dict[str, torch.Tensor]:
    boxes = BOXES[:objects] * torch.tensor([width / 810, height / 1080] * 2)
    masks = torch.zeros(objects, height, width, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.round().int().tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    return {"boxes": boxes, "labels": LABELS[:objects], "masks": masks}


def score_threshold(model: nn.Module, value: float) -> None:
    (model.roi_heads if hasattr(model, "roi_heads") else model).score_thresh = value


def check_detections(found: dict[str, torch.Tensor], width: int, height: int) -> None:
    assert len(found["boxes"]) == len(found["scores"]) == len(found["labels"]) > 0
    assert torch.isfinite(found["boxes"]).all() and found["boxes"].min() >= 0
    assert (found["boxes"] <= torch.tensor([width, height] * 2) + 1e-3).all()
    assert found["labels"].dtype == torch.int64 and set(found["labels"].tolist()) <= {0, 1, 2}
    if "masks" in found:
        assert found["masks"].shape == (len(found["boxes"]), 1, height, width)


@ALL_MODELS
def test_training_and_detection(builder: str) -> None:
    model = create(builder)
    losses = model([photo(120, 160), photo(101, 77)], [target(120, 160), target(101, 77)])
    assert set(losses) == set(model.loss_names)
    total = sum(losses.values())
    assert torch.isfinite(total)
    total.backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), key
    assert all(p.grad.abs().sum() > 0 for p in model.backbone.body.parameters())
    score_threshold(model.eval(), 0.005)
    for (width, height), found in zip([(120, 160), (101, 77)], model([photo(120, 160), photo(101, 77)]), strict=True):
        check_detections(found, width, height)


@ALL_MODELS
def test_images_without_objects(builder: str) -> None:
    """One of a batch, and all of them; `iscrowd` and other keys of a target have no effect."""
    model = create(builder)
    images = [photo(120, 160), photo(96, 96)]
    for objects in (2, 0):
        targets = [
            {**target(120, 160, objects), "iscrowd": torch.zeros(objects, dtype=torch.int64)},
            {**target(96, 96, 0), "image_id": torch.tensor(7)},
        ]
        total = sum(model(images, targets).values())
        assert torch.isfinite(total)
        total.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_feature_pyramid() -> None:
    model = create("mask_rcnn", image_mean=[0.5, 0.5, 0.5])
    maps = model.backbone(torch.rand(1, 3, 64, 128))
    assert {name: tuple(value.shape[1:]) for name, value in maps.items()} == {
        "0": (64, 16, 32), "1": (64, 8, 16), "2": (64, 4, 8), "3": (64, 2, 4), "pool": (64, 1, 2),
    }  # fmt: skip
    assert model.transform.image_mean == [0.5, 0.5, 0.5]
    for builder in ("retinanet", "fcos"):
        maps = create(builder).backbone(torch.rand(1, 3, 64, 128))
        assert {name: tuple(value.shape[2:]) for name, value in maps.items()} == {
            "0": (8, 16), "1": (4, 8), "2": (2, 4), "p6": (1, 2), "p7": (1, 1),
        }  # fmt: skip


@pytest.mark.parametrize(
    ("backbone", "kwargs"),
    [
        ("stvit_pico", {}),
        ("convnext_atto", {}),
        ("resnet18", {}),  # five feature maps, the first of stride 2
        ("mobilenetv4_conv_small", {}),
        ("swin_tiny_patch4_window7_224", {"backbone_kwargs": {"strict_img_size": False}}),  # channels come last
    ],
)
def test_backbones(backbone: str, kwargs: dict[str, Any]) -> None:
    model = create("faster_rcnn", backbone, drop_path_rate=0.1, **kwargs)
    sum(model([photo(120, 160)], [target(120, 160)]).values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    score_threshold(model.eval(), 0.0)
    check_detections(model([photo(101, 77)])[0], 101, 77)


def test_backbone_of_one_image_size() -> None:
    model = create("faster_rcnn", "swin_tiny_patch4_window7_224").eval()
    with pytest.raises(ValueError, match="swin_tiny_patch4_window7_224 does not accept images of 96x128 pixels"):
        model([photo(120, 90)])


@ALL_MODELS
def test_grayscale(builder: str) -> None:
    model = create(builder, in_chans=1)
    assert model.transform.image_mean == pytest.approx([0.449]) and model.transform.image_std == pytest.approx([0.226])
    assert torch.isfinite(sum(model([photo(120, 160, "L")], [target(120, 160)]).values()))
    with pytest.raises(ValueError, match="has in_chans=1, but the images have 3 channels; convert the images"):
        model([photo(120, 160)], [target(120, 160)])


@pytest.mark.parametrize(
    ("builder", "kwargs", "message"),
    [
        (
            "mask_rcnn",
            {"box_score_tresh": 0.1},
            "mask_rcnn has no argument 'box_score_tresh'; did you mean box_score_t",
        ),
        ("retinanet", {"box_score_thresh": 0.1}, "retinanet has no argument 'box_score_thresh'; did you mean score_th"),
        (
            "fcos",
            {"zzz": 1},
            "fcos has no argument 'zzz'; pass pretrained_backbone, in_chans, .*, norm, or an argument of",
        ),
        (
            "cascade_mask_rcnn",
            {"zzz": 1},
            "norm, iou_thresholds, box_weights, loss_weights, box_convs, anchor_sizes, or",
        ),
        ("mask_rcnn", {"fpn_channels": -1}, "fpn_channels must be a whole number of at least 1, got -1"),
        ("cascade_rcnn", {"bbox_reg_weights": (1, 1, 1, 1)}, "has no argument 'bbox_reg_weights'; did you mean box_we"),
        ("cascade_rcnn", {"mask_head": None}, "has no argument 'mask_head'"),
        ("cascade_rcnn", {"iou_thresholds": (0.5, 0.6)}, "must have the same length"),
        ("faster_rcnn", {"num_classes": 1}, "num_classes counts the background, so it must be at least 2, got 1"),
        ("faster_rcnn", {"backbone": "stvit_smal"}, "unknown backbone 'stvit_smal'; did you mean stvit_small"),
        ("faster_rcnn", {"backbone": "vit_tiny_patch16_224"}, "feature maps of strides 16, .*hierarchical model"),
        ("faster_rcnn", {"backbone_kwargs": {"depht": 3}}, "cannot create the backbone test_stvit .*depht"),
        ("faster_rcnn", {"frozen_stages": 5}, "frozen_stages must be from 0 to 4, got 5"),
        ("mask_rcnn", {"norm": "gn", "fpn_channels": 32}, "multiple of 32 and at least 64, got 32"),
        ("fcos", {"fpn_channels": 80}, "fcos has GroupNorm with 32 groups, so fpn_channels must be .*, got 80"),
        ("retinanet", {"norm": "ln"}, "norm must be 'gn', 'bn' or None, got 'ln'"),
        ("mask_rcnn", {"anchor_sizes": [8, 16]}, r"anchor_sizes must be five numbers of pixels, got \[8, 16\]"),
        ("faster_rcnn", {"pretrained_backbone": "resnet18.a1_in1k"}, "is a resnet18 checkpoint"),
    ],
)
def test_wrong_arguments(builder: str, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BUILDERS[builder](**{"backbone": "test_stvit", "num_classes": 3, **kwargs})


# Weights


@pytest.fixture(scope="module")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of a stvit_pico with ten classes."""
    torch.manual_seed(7)
    path = tmp_path_factory.mktemp("weights") / "pico.pth"
    torch.save({"state_dict": timm.create_model("stvit_pico", num_classes=10).state_dict()}, path)
    return path


@ALL_MODELS
def test_pretrained_backbone(builder: str, pico: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = create(builder, "stvit_pico", pretrained_backbone=pico, frozen_stages=1)
    own, expected = model.net.state_dict(), torch.load(pico)["state_dict"]
    assert len(own) > 150 and all(torch.equal(value, expected[key]) for key, value in own.items())
    assert f"Loaded {len(own)}/{len(own)} tensors of the backbone stvit_pico from {pico}" in capsys.readouterr().out
    assert model.norm_eval and "pretrained_backbone" not in model.recipe.args
    # Frozen stages and the BatchNorm layers of the backbone stay in evaluation mode.
    frozen = {key for key, parameter in model.net.named_parameters() if not parameter.requires_grad}
    assert frozen == {key for key, _ in model.net.named_parameters() if key.startswith(("stem.", "stages.0."))}
    assert not any(m.training for m in model.net.modules() if isinstance(m, nn.BatchNorm2d))
    assert model.net.stages[1].training and not model.net.stages[0].training
    assert create(builder, "stvit_pico").net.stem[2].training


@ALL_MODELS
@pytest.mark.parametrize("norm", ["gn", "bn"])
def test_normalization(builder: str, norm: str) -> None:
    """Each convolution of the pyramid and of the heads has a normalization, except those that predict."""
    convs = {"box_convs": 1} if "rcnn" in builder else {}
    model = create(builder, norm=norm, **convs)
    kind = nn.GroupNorm if norm == "gn" else nn.BatchNorm2d
    norms = [name for name, layer in model.named_modules() if isinstance(layer, kind) and ".body." not in name]
    assert sum(name.startswith("backbone.fpn.") for name in norms) == (6 if builder in ("retinanet", "fcos") else 8)
    heads = {name.split(".")[1] for name in norms if name.startswith(("roi_heads.", "head."))}
    expected = {"box_head"} if "rcnn" in builder else {"classification_head", "regression_head"}
    if builder == "fcos" and norm == "bn":
        expected = set()  # FCOS always has GroupNorm
    assert heads == expected | ({"mask_head"} if "mask" in builder else set())
    assert not [layer for layer in create(builder).backbone.fpn.modules() if isinstance(layer, kind)]


def test_anchor_sizes() -> None:
    model = create("mask_rcnn", anchor_sizes=[8, 16, 32, 64, 128])
    assert model.rpn.anchor_generator.sizes == ((8,), (16,), (32,), (64,), (128,))
    assert model.recipe.args["anchor_sizes"] == [8, 16, 32, 64, 128]


@ALL_MODELS
def test_saved_models(builder: str, tmp_path: Path) -> None:
    kwargs = {"in_chans": 1, "drop_path_rate": 0.1, "backbone_kwargs": {"stoken_size": (4, 2, 1, 1)}}
    if builder.startswith("cascade"):
        kwargs |= {"box_convs": 1, "loss_weights": (1.0, 1.0, 1.0), "norm": "gn"}
    model = create(builder, **kwargs).eval()
    save_model(model, tmp_path / "saved", label_names=["person", "bus"], category_ids=[1, 6])
    loaded = detectors.load(tmp_path / "saved")
    assert type(loaded) is type(model) and not loaded.training
    assert (loaded.label_names, loaded.category_ids) == (["person", "bus"], [1, 6])
    score_threshold(model, 0.005)
    score_threshold(loaded, 0.005)
    for found, expected in zip(loaded([photo(120, 90, "L")]), model([photo(120, 90, "L")]), strict=True):
        assert len(found["boxes"]) and all(torch.equal(found[key], value) for key, value in expected.items())
    threshold = {"score_thresh" if builder in ("retinanet", "fcos") else "box_score_thresh": 1.0}
    assert len(detectors.load(tmp_path / "saved", **threshold)([photo(120, 90, "L")])[0]["boxes"]) == 0


def test_damaged_models(tmp_path: Path) -> None:
    save_model(create("mask_rcnn"), tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"mask_rcnn"', '"mask_rcn"'))
    with pytest.raises(PretrainedError, match=r"builder must be one of faster_rcnn, .*got 'mask_rcn'"):
        detectors.load(tmp_path)
    (tmp_path / "config.json").write_text(text.replace('"max_size"', '"maxsize"'))
    with pytest.raises(PretrainedError, match="mask_rcnn has no argument 'maxsize'; did you mean max_size"):
        detectors.load(tmp_path)


# Training code of timm


def test_layer_decay() -> None:
    model = create("mask_rcnn")
    groups = create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.05, layer_decay=0.5).param_groups
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    by_name = {key: scales[id(p)] for key, p in model.named_parameters()}
    assert len(by_name) == len(scales)
    assert by_name["backbone.body.net.stem.0.weight"] == min(by_name.values()) < 0.1
    assert by_name["backbone.fpn.inner_blocks.0.0.weight"] == by_name["roi_heads.mask_head.0.0.weight"] == 1
    stages = [by_name[f"backbone.body.net.stages.{i}.blocks.0.mlp.fc1.weight"] for i in range(4)]
    assert stages == sorted(set(stages)) and stages[-1] < 1
    assert decays[id(model.backbone.body.net.stages[0].blocks[0].norm1.weight)] == 0
    assert decays[id(model.roi_heads.box_head.fc6.weight)] == 0.05


def test_gradient_checkpointing() -> None:
    losses, gradients = [], []
    for enable in (False, True):
        model = create("retinanet", norm_eval=True)
        model.set_grad_checkpointing(enable)
        loss = sum(model([photo(120, 160)], [target(120, 160)]).values())
        loss.backward()
        losses.append(loss.detach())
        gradients.append(model.net.stem[0].weight.grad)
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(gradients[0], gradients[1])


@ALL_MODELS
def test_autocast(builder: str) -> None:
    """Boxes have the precision of the weights: bfloat16 would round coordinates above 256 to 2 pixels and more."""
    model = create(builder, min_size=320, max_size=480).eval()
    score_threshold(model, 0.005)
    image = photo(300, 400)
    proposals: list[torch.Tensor] = []
    if hasattr(model, "rpn"):
        model.rpn.register_forward_hook(lambda _module, _args, output: proposals.extend(output[0]))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = model([image])[0]
        maps = model.backbone(torch.rand(1, 3, 64, 64))
    assert found["boxes"].dtype == torch.float32 and all(value.dtype == torch.float32 for value in maps.values())
    assert (found["boxes"][found["boxes"] > 257] % 2 > 0.01).any()
    assert all(boxes.dtype == torch.float32 for boxes in proposals)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sum(model.train()([image], [target(300, 400)]).values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


# Operations


def test_operations_of_the_heads() -> None:
    """Multiply-accumulates of five boxes in three box heads and of two masks, counted by hand."""
    model = create("cascade_mask_rcnn")
    none, boxes, masks = (
        count_macs(model, 64, 64, boxes=boxes, masks=masks) for boxes, masks in ((0, 0), (5, 0), (0, 2))
    )
    assert boxes.layers - none.layers == 3 * 5 * (64 * 49 * 1024 + 1024 * 1024 + 1024 * (3 + 4))
    convs = 14 * 14 * 9 * (64 * 256 + 3 * 256 * 256)
    assert masks.layers - none.layers == 2 * (convs + 14 * 14 * 4 * 256 * 256 + 28 * 28 * 256 * 3)
    assert none.attention == masks.attention > 0


@pytest.mark.parametrize("row", RECORDED, ids=lambda row: f"{row['model']}-{row['backbone']}-{row['box_convs']}")
def test_recorded_operations(row: dict[str, str]) -> None:
    """Counts the models of docs/benchmarks/detectors.csv again, and compares the table in docs/results.md."""
    kwargs: dict[str, Any] = {"box_convs": int(row["box_convs"])} if row["box_convs"] != "0" else {}
    if row["backbone"].startswith("swin"):
        kwargs["backbone_kwargs"] = {"strict_img_size": False}
    with torch.device("meta"):
        model = BUILDERS[row["model"]](row["backbone"], 81, **kwargs)
    macs = count_macs(model, int(row["height"]), int(row["width"]))
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    assert (macs.layers / 1e9, macs.attention / 1e9, parameters) == pytest.approx(
        (float(row["gmac_layers"]), float(row["gmac_attention"]), float(row["params_m"])), abs=0.051
    )
    total = float(row["gmac_layers"]) + float(row["gmac_attention"])
    assert f" {parameters:.1f} | {total:.1f} |" in (ROOT / "docs/results.md").read_text()


# Export


def check_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Compares detections. Their order and the last ones may differ, because random weights give similar scores."""
    assert found.keys() == expected.keys() and len(found["boxes"]) == len(expected["boxes"]) > 0
    rows = [torch.cat((d["boxes"], d["labels"][:, None], 100 * d["scores"][:, None]), 1) for d in (found, expected)]
    distance, nearest = torch.cdist(rows[1], rows[0], p=float("inf")).min(1)
    same = distance < 0.01
    assert same.float().mean() > 0.8
    if "masks" in found:
        torch.testing.assert_close(found["masks"][nearest[same]], expected["masks"][same], atol=1e-3, rtol=0)


# Sizes that TorchScript and ONNX, which compute the scale in float32, resize to the same as PyTorch.
SIZES = [(120, 160), (128, 96), (64, 64)]


@EXPORTED_MODELS
def test_torchscript(builder: str) -> None:
    model = create(builder).eval()
    score_threshold(model, 0.005)
    scripted = torch.jit.script(model)
    for width, height in SIZES:
        check_same(scripted([photo(width, height)])[1][0], model([photo(width, height)])[0])
    losses = scripted.train()([photo(120, 160)], [target(120, 160)])[0]
    assert set(losses) == set(model.loss_names)


@EXPORTED_MODELS
def test_onnx(builder: str, tmp_path: Path) -> None:
    model = create(builder).eval()
    score_threshold(model, 0.005)
    file = tmp_path / "model.onnx"
    torch.onnx.export(
        model, ([photo(120, 160)],), file, dynamo=False, opset_version=17, input_names=["image"],
        dynamic_axes={"image": {1: "height", 2: "width"}},
    )  # fmt: skip
    session = onnxruntime.InferenceSession(file)
    for width, height in SIZES:
        image = photo(width, height)
        with torch.no_grad():
            expected = model([image])[0]
        found = [torch.from_numpy(value) for value in session.run(None, {"image": image.numpy()})]
        check_same(dict(zip(expected, found, strict=True)), expected)

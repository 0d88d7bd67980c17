"""Cascade R-CNN heads, compared with numbers computed by hand."""

from math import log
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign

from stvit.adapters.torchvision import CascadeRoIHeads
from stvit.adapters.torchvision.cascade import CascadePredictor

# Height and width of the image.
SHAPE = (80, 100)
FEATURES = {"0": torch.ones(1, 8, 20, 25)}
OBJECT = torch.tensor([10.0, 10, 50, 50])
TARGET = {"boxes": OBJECT[None], "labels": torch.tensor([1]), "masks": torch.ones(1, *SHAPE)}
NO_OBJECTS = {
    "boxes": torch.zeros(0, 4),
    "labels": torch.zeros(0, dtype=torch.int64),
    "masks": torch.zeros(0, *SHAPE),
}


def create_heads(
    probabilities: list[tuple[float, ...]], deltas: list[tuple[float, ...]], masks: bool = False, **kwargs: Any
) -> CascadeRoIHeads:
    """Returns three heads that predict the same probabilities and deltas for every box."""
    predictors = []
    for classes, box in zip(probabilities, deltas, strict=True):
        predictor = CascadePredictor(8, len(classes))
        with torch.no_grad():
            for layer, bias in ((predictor.cls_score, torch.tensor(classes).log()), (predictor.bbox_pred, box)):
                layer.weight.zero_()
                layer.bias.copy_(torch.as_tensor(bias))
        predictors.append(predictor)
    if masks:
        kwargs["mask_roi_pool"] = MultiScaleRoIAlign(["0"], 14, sampling_ratio=2)
        kwargs["mask_head"] = MaskRCNNHeads(8, (8,), dilation=1)
        kwargs["mask_predictor"] = MaskRCNNPredictor(8, 8, len(probabilities[0]))
    pool = MultiScaleRoIAlign(["0"], 1, sampling_ratio=1)
    return CascadeRoIHeads(pool, [nn.Flatten() for _ in predictors], predictors, **kwargs)


def record_boxes(pool: nn.Module) -> list[torch.Tensor]:
    """Returns a list that receives the boxes of the first image at each call of a pooling layer."""
    boxes: list[torch.Tensor] = []
    pool.register_forward_hook(lambda _module, args, _output: boxes.append(args[1][0]))
    return boxes


def test_detections() -> None:
    heads = create_heads(
        [(0.2, 0.5, 0.3), (0.1, 0.8, 0.1), (0.3, 0.2, 0.5)],
        [
            (1, -1, 5 * log(1.5), 0),
            (2, 2, 0, 10 * log(2.5)),
            (3, 0, 15 * log(0.5), 15 * log(0.5)),
        ],
    ).eval()
    boxes = record_boxes(heads.box_roi_pool)
    found, losses = heads(FEATURES, [torch.tensor([[10.0, 20, 30, 60]])], [SHAPE])
    assert losses == {}
    # 20x40 at (20, 40). The first head moves it by 1/10 of its width and -1/10 of its height, and widens it by 1.5.
    torch.testing.assert_close(boxes[1], torch.tensor([[7.0, 16, 37, 56]]))
    # 30x40 at (22, 36). The second moves it by 2/20 of both and makes it 2.5 times as high: -10 to 90, then clipped.
    torch.testing.assert_close(boxes[2], torch.tensor([[10.0, 0, 40, 80]]))
    # 30x80 at (25, 40). The third moves it by 3/30 of its width and halves both sides.
    expected = torch.tensor([20.5, 20, 35.5, 60])
    torch.testing.assert_close(found[0]["boxes"], expected.expand(2, 4))
    assert found[0]["labels"].tolist() == [1, 2]
    # Means of the probabilities: (0.5 + 0.8 + 0.2) / 3 and (0.3 + 0.1 + 0.5) / 3.
    torch.testing.assert_close(found[0]["scores"], torch.tensor([0.5, 0.3]))


def test_losses() -> None:
    heads = create_heads([(0.5, 0.25, 0.25)] * 3, [(0, 0, 0, 0)] * 3)
    # Intersection over union with the object: 0.75, 0.55 and 0.
    proposals = torch.tensor([[10.0, 10, 50, 40], [10, 10, 50, 32], [60, 60, 90, 80]])
    found, losses = heads(FEATURES, [proposals], [SHAPE], [TARGET])
    assert found == []
    assert list(losses) == [f"loss_{kind}_{i}" for i in (1, 2, 3) for kind in ("classifier", "box_reg")]
    # Each head sees the three proposals and the object. A positive costs log 4, a negative log 2.
    # Positives: 0.75, 0.55 and the object for the first head, 0.75 and the object for the others.
    expected = {
        "loss_classifier_1": (3 * log(4) + 1 * log(2)) / 4,
        "loss_classifier_2": (2 * log(4) + 2 * log(2)) / 4 * 0.5,
        "loss_classifier_3": (2 * log(4) + 2 * log(2)) / 4 * 0.25,
    }
    # The object has center 30 and height 40; the proposals have centers 25 and 21, heights 30 and 22. Only dy and dh
    # differ from 0. Smooth L1 with beta 1/9 of x > 1/9 is x - 1/18.
    first = 10 * 5 / 30 + 5 * log(40 / 30) - 1 / 9
    second = 10 * 9 / 22 + 5 * log(40 / 22) - 1 / 9
    expected["loss_box_reg_1"] = (first + second) / 4
    expected["loss_box_reg_2"] = (20 * 5 / 30 + 10 * log(40 / 30) - 1 / 9) / 4 * 0.5
    expected["loss_box_reg_3"] = (30 * 5 / 30 + 15 * log(40 / 30) - 1 / 9) / 4 * 0.25
    assert {key: value.item() for key, value in losses.items()} == pytest.approx(expected)


def test_heads_are_trained_on_refined_proposals_and_the_objects() -> None:
    heads = create_heads([(0.5, 0.5)] * 3, [(1, 0, 5 * log(2), 0)] * 3, masks=True)
    boxes, mask_boxes = record_boxes(heads.box_roi_pool), record_boxes(heads.mask_roi_pool)
    proposals = torch.tensor([[10.0, 10, 50, 40], [60, 60, 90, 80]])
    heads(FEATURES, [proposals], [SHAPE], [TARGET])
    torch.testing.assert_close(boxes[0], torch.cat((proposals, OBJECT[None])))
    # 40x30 at (30, 25) moves by 1/10 of its width to 34 and becomes 80 wide: -6 to 74, then clipped.
    # 30x20 at (75, 70) moves to 78 and becomes 60 wide: 48 to 108, then clipped.
    refined = torch.tensor([[0.0, 10, 74, 40], [48, 60, 100, 80]])
    torch.testing.assert_close(boxes[1], torch.cat((refined, OBJECT[None])))
    assert len(boxes) == 3 and not any(b.requires_grad for b in boxes)
    # Positives of the first head.
    torch.testing.assert_close(mask_boxes[0], torch.cat((proposals[:1], OBJECT[None])))


@pytest.mark.parametrize("target", [TARGET, NO_OBJECTS])
def test_boxes_that_leave_the_image(target: dict[str, torch.Tensor]) -> None:
    """They have no area, and are background."""
    heads = create_heads([(0.5, 0.5)] * 3, [(100, 0, 0, 0), (0, 0, 0, 0), (0, 0, 0, 0)], masks=True)
    boxes = record_boxes(heads.box_roi_pool)
    proposals = [torch.tensor([[10.0, 10, 50, 40]])]
    _, losses = heads(FEATURES, proposals, [SHAPE], [target])
    assert boxes[1][0].tolist() == [100, 10, 100, 40]
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert all(torch.isfinite(p.grad).all() for p in heads.parameters() if p.grad is not None)
    found, _ = heads.eval()(FEATURES, proposals, [SHAPE])
    assert found[0]["boxes"].shape == (0, 4) and found[0]["masks"].shape == (0, 1, 28, 28)


def test_images_without_objects_or_proposals() -> None:
    heads = create_heads([(0.5, 0.25, 0.25)] * 3, [(0, 0, 0, 0)] * 3, masks=True)
    features, proposals = {"0": torch.ones(2, 8, 20, 25)}, [torch.tensor([[10.0, 10, 50, 40]]), torch.zeros(0, 4)]
    _, losses = heads(features, proposals, [SHAPE] * 2, [NO_OBJECTS] * 2)
    assert losses["loss_classifier_1"].item() == pytest.approx(log(2))
    assert all(losses[key] == 0 for key in ("loss_box_reg_1", "loss_box_reg_2", "loss_box_reg_3", "loss_mask"))
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in heads.parameters())  # DDP waits for each of them
    found, _ = heads.eval()(features, proposals, [SHAPE] * 2)
    assert [len(image["boxes"]) for image in found] == [2, 0]


def test_new_heads_hardly_move_boxes() -> None:
    torch.manual_seed(0)
    heads = CascadeRoIHeads(
        MultiScaleRoIAlign(["0"], 1, 1), [nn.Flatten() for _ in range(3)], [CascadePredictor(8, 91) for _ in range(3)]
    ).eval()
    boxes = record_boxes(heads.box_roi_pool)
    proposals = torch.tensor([[10.0, 20, 30, 60]])
    heads(FEATURES, [proposals], [SHAPE])
    torch.testing.assert_close(boxes[2], proposals, atol=0.1, rtol=0)


def test_torchscript() -> None:
    torch.manual_seed(0)
    heads = create_heads([(0.2, 0.5, 0.3)] * 3, [(1, 1, 0, 0)] * 3, masks=True).eval()
    scripted = torch.jit.script(heads)
    proposals = [torch.tensor([[10.0, 20, 30, 60], [40, 10, 90, 70]])]
    found, expected = scripted(FEATURES, proposals, [SHAPE])[0][0], heads(FEATURES, proposals, [SHAPE])[0][0]
    assert found.keys() == expected.keys() == {"boxes", "labels", "scores", "masks"}
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value)
    losses = scripted.train()(FEATURES, proposals, [SHAPE], [TARGET])[1]
    assert set(losses) >= {"loss_classifier_3", "loss_box_reg_3", "loss_mask"}


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="must have the same length, got 2, 2, 3, 3, 3"):
        create_heads([(0.5, 0.5)] * 2, [(0, 0, 0, 0)] * 2)
    heads = create_heads([(0.5, 0.5)] * 3, [(0, 0, 0, 0)] * 3, masks=True)
    with pytest.raises(ValueError, match="masks key"):
        heads(FEATURES, [OBJECT[None]], [SHAPE], [{"boxes": OBJECT[None], "labels": torch.tensor([1])}])

"""Tests stvit.visualize and its command.

The tests compare arrays with the definition, check pictures, and check that the model does not change.
"""

import copy
import csv
import io
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from ultralytics.utils import ASSETS

import stvit
from stvit import hub as stvit_hub
from stvit import visualize
from stvit.adapters.yolo import YOLO
from stvit.ops import upsample_super_tokens
from stvit.tools import train_cls
from stvit.tools import visualize as command
from stvit.tools.common import viewing
from stvit.tools.visualizing import measures
from stvit.tools.visualizing.pictures import PICTURES, find_checkpoints
from stvit.visualize import draw, super_tokens
from tests.hub_server import Hub

BUS = ASSETS / "bus.jpg"


def photo(width: int = 120, height: int = 160) -> Image.Image:
    return Image.open(BUS).convert("RGB").resize((width, height))


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return timm.create_model("test_stvit", num_classes=10).eval()


@pytest.fixture(scope="module")
def detectors() -> dict[str, Any]:
    torch.manual_seed(0)
    return {name: YOLO(f"yolo26n-{name}.yaml") for name in ("stvit_pico", "stokenattention")}


def run_through(layer: nn.Module, run: Callable[[], Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the input and output of a layer during a call of `run`."""
    seen: list[Any] = []
    hook = layer.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    with torch.no_grad():
        run()
    hook.remove()
    return seen[0]


# ---------------------------------------------------------------------------------------------------------------------
# Arrays


@pytest.mark.parametrize("size", [(160, 120), (33, 61), (1, 1)])
@pytest.mark.parametrize("stage", [0, 1])
def test_arrays_equal_the_computation_of_the_layer(model: Any, stage: int, size: tuple[int, int]) -> None:
    """The arrays follow from the input by the definition, and give the output of the layer."""
    x = torch.randn(1, 3, *size)
    view = super_tokens(model, x, stage)
    attention = model.stages[stage].blocks[-1].attn
    inside, output = run_through(attention, lambda: model(x))
    height, width = inside.shape[2:]
    assert view.association.shape == (9, height, width)
    assert view.stride == (4 * 2**stage if max(size) > 1 else 1)  # one pixel does not show the stride
    assert view.layer == f"stages.{stage}.blocks.0.attn" and view.stoken_size == (8 // 2**stage,) * 2
    upsampled = upsample_super_tokens(
        torch.tensor(view.features)[None], torch.tensor(view.association)[None], view.stoken_size
    )
    torch.testing.assert_close(upsampled, output)

    # Association of some pixels, computed from the means of the cells (one round).
    cell = view.stoken_size[0]
    pixels = torch.nn.functional.pad(inside[0], (0, -width % cell, 0, -height % cell)).double().numpy()
    rows, columns = view.grid
    assert pixels.shape[1:] == (rows * cell, columns * cell)
    means = pixels.reshape(len(pixels), rows, cell, columns, cell).mean(axis=(2, 4))
    for i, j in [(0, 0), (height - 1, width - 1), (height // 2, width // 3)]:
        scores, numbers = [], []
        for row in range(i // cell - 1, i // cell + 2):
            for column in range(j // cell - 1, j // cell + 2):
                is_there = 0 <= row < rows and 0 <= column < columns
                scores.append(pixels[:, i, j] @ means[:, row, column] / len(pixels) ** 0.5 if is_there else 0.0)
                numbers.append(row * columns + column if is_there else -1)
        weights = np.exp(scores) / np.exp(scores).sum()
        np.testing.assert_allclose(view.association[:, i, j], weights, atol=1e-5)
        assert view.candidates[:, i, j].tolist() == numbers
        best = max((weight, number) for weight, number in zip(weights, numbers, strict=True) if number >= 0)
        assert view.map_assignment[i, j] == best[1]
        for token in set(numbers) - {-1}:
            assert (
                view.association_map(token)[min(i * view.stride, size[0] - 1), min(j * view.stride, size[1] - 1)]
                == (view.association[numbers.index(token), i, j])
            )


def test_features_follow_from_the_attention() -> None:
    model: Any = timm.create_model("stvit_pico")
    view = super_tokens(model, photo(200, 200), 1)
    attention = model.stages[1].blocks[-1].attn
    n, heads = view.grid[0] * view.grid[1], attention.num_heads
    assert n > 36 and heads == 2
    weights = np.stack([[view.attention_map(token, head).ravel() for token in range(n)] for head in range(heads)])
    np.testing.assert_allclose(weights.sum(axis=2), 1, rtol=1e-5)
    np.testing.assert_allclose(view.attention_map(3).ravel(), weights.mean(axis=0)[3], rtol=1e-5)
    with torch.no_grad():
        values = attention.project(torch.tensor(view.tokens)[None])[2][0]  # (heads, N, C / heads)
        mixed = torch.tensor(weights).float() @ values
        features = attention.proj(mixed.transpose(0, 1).reshape(1, *view.grid, -1).permute(0, 3, 1, 2))[0]
    np.testing.assert_allclose(features.numpy(), view.features, atol=1e-5)


def test_every_type_of_image(model: Any, tmp_path: Path) -> None:
    image = photo()
    image.save(tmp_path / "photo.png")
    turned = image.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees, to be shown upright
    turned.save(tmp_path / "turned.png", exif=exif)
    mean, std = (torch.tensor(model.pretrained_cfg[name]).reshape(3, 1, 1) for name in ("mean", "std"))
    tensor = (torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - mean) / std
    views = [
        super_tokens(model, given)
        for given in (
            image,
            np.array(image),
            tensor,
            tensor[None],
            tmp_path / "photo.png",
            str(tmp_path / "turned.png"),
        )
    ]
    for view in views:
        np.testing.assert_allclose(view.association, views[0].association, atol=1e-6)
        assert np.array_equal(np.array(view.image), np.array(image))
    assert not np.allclose(super_tokens(model, tensor * std + mean).association, views[0].association, atol=1e-3)
    other = super_tokens(model, image, data_config={"mean": (0.5,) * 3, "std": (0.5,) * 3})
    assert not np.allclose(other.association, views[0].association, atol=1e-3)


def test_other_channels() -> None:
    gray = timm.create_model("test_stvit", in_chans=1)
    view = super_tokens(gray, photo())
    mean = sum(gray.pretrained_cfg["mean"]) / 3, sum(gray.pretrained_cfg["std"]) / 3
    pixels = (torch.from_numpy(np.array(photo().convert("L")))[None, None] / 255 - mean[0]) / mean[1]
    np.testing.assert_allclose(super_tokens(gray, pixels).association, view.association, atol=1e-6)
    assert super_tokens(gray, pixels).image.mode == "RGB"
    assert np.array_equal(super_tokens(gray, np.array(photo())).association, view.association)
    four = timm.create_model("test_stvit", in_chans=4)
    assert super_tokens(four, torch.randn(4, 64, 64)).image.size == (64, 64)
    with pytest.raises(ValueError, match=r"takes images of 4 channels; pass a normalized tensor \(4, H, W\)"):
        super_tokens(four, photo())


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (37, 53), (64, 64), (129, 97)])
def test_any_size(model: Any, detectors: dict[str, Any], size: tuple[int, int]) -> None:
    """Each pixel has one token, and associations that sum to 1.

    Detectors pad the image.
    """
    image = photo(*size)
    for net in (model, *detectors.values()):
        for stage in visualize.stages(net):
            view = super_tokens(net, image, stage)
            n = view.grid[0] * view.grid[1]
            assert view.assignment.shape == size[::-1] == view.association_map(0).shape
            padded = tuple(side if net is model else -(-side // 32) * 32 for side in size[::-1])
            assert view.association.shape[1:] == tuple(-(-side // view.stride) for side in padded)
            np.testing.assert_allclose(view.association.sum(axis=0), 1, rtol=1e-5)
            shares = np.stack([view.association_map(token) for token in range(n)])
            assert (shares.sum(axis=0) <= 1 + 1e-5).all()
            assert np.array_equal(shares.argmax(axis=0), view.assignment) or np.allclose(
                shares.max(axis=0), np.take_along_axis(shares, view.assignment[None], 0)[0]
            )
            assert max(view.draw().size) < 3000


def test_map_pixels_are_placed_at_the_center_of_their_receptive_field(model: Any) -> None:
    """The gradient of a map pixel is centered on the image pixel where `to_image` puts it."""
    image = torch.randn(1, 3, 96, 96, requires_grad=True)
    view = super_tokens(model, image)
    numbers = view.to_image(np.arange(24 * 24).reshape(24, 24))
    for i, j in [(10, 7), (12, 15)]:
        (gradient,) = torch.autograd.grad(model.stem(image)[0, :, i, j].sum(), image)
        rows, columns = torch.nonzero(gradient[0].abs().sum(0), as_tuple=True)
        middle = (int(rows.min() + rows.max()) // 2, int(columns.min() + columns.max()) // 2)
        assert middle == (4 * i, 4 * j) and numbers[middle] == i * 24 + j
        lines, places = np.nonzero(numbers == i * 24 + j)
        assert (lines.min(), lines.max(), places.min(), places.max()) == (4 * i - 2, 4 * i + 1, 4 * j - 2, 4 * j + 1)


def test_later_layers_do_not_run() -> None:
    """Later layers would cost most for a large image."""
    model: Any = timm.create_model("test_stvit")
    ran: list[Any] = []
    model.stages[1].register_forward_pre_hook(lambda *args: ran.append(args))
    super_tokens(model, photo(), 0)
    assert not ran
    super_tokens(model, photo(), 1)
    assert ran


# ---------------------------------------------------------------------------------------------------------------------
# Models


def test_every_form_of_a_model_gives_the_same_arrays(model: Any) -> None:
    x = torch.randn(1, 3, 96, 128)
    expected = super_tokens(model, x, 1)
    features = timm.create_model("test_stvit", features_only=True, out_indices=(1, 2))
    features.load_state_dict(
        {k.replace("stages.", "stages_", 1).replace("stem.", "stem_", 1): v for k, v in model.state_dict().items()},
        strict=False,
    )
    pruned = timm.create_model("test_stvit")
    pruned.load_state_dict(model.state_dict() | {k: v for k, v in pruned.state_dict().items() if "head" in k})
    pruned.prune_intermediate_layers([1])
    dressed = {
        "features": features,
        "pruned": pruned,
        "optimized": stvit.optimize_for_inference(model),
        "compiled": torch.compile(model),
        "parallel": nn.DataParallel(model),
        "inside": nn.Sequential(nn.Identity(), model),
    }
    for name, net in dressed.items():
        assert visualize.stages(net) == [0, 1], name
        view = super_tokens(net, x, 1)
        np.testing.assert_allclose(view.association, expected.association, atol=1e-4, err_msg=name)
        np.testing.assert_allclose(view.features, expected.features, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("size", [(480, 313), (313, 480), (160, 160)])
def test_detectors(size: tuple[int, int]) -> None:
    """Tests `YOLO` objects and their networks, of both kinds.

    The padded image is that of Ultralytics.
    """
    for name, stages in (("stvit_pico", [0, 1]), ("stokenattention", [0, 1, 2, 3])):  # in the fifth, pixels are tokens
        yolo = YOLO(f"yolo26n-{name}.yaml")
        assert visualize.stages(yolo) == visualize.stages(yolo.model) == stages
        view = super_tokens(yolo, photo(*size), 1)
        layer = yolo.model.get_submodule(view.layer)
        seen: list[torch.Tensor] = []
        images = yolo.model.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].clone()))
        yolo.predict(photo(*size), imgsz=max(size), verbose=False)
        images.remove()
        inside, output = run_through(layer, lambda yolo=yolo, seen=seen: yolo.model.eval()(seen[-1]))
        features, association = (torch.tensor(a)[None] for a in (view.features, view.association))
        expected = upsample_super_tokens(features, association, view.stoken_size)
        torch.testing.assert_close(expected, output, rtol=1e-4, atol=1e-5)
        assert view.association.shape[1:] == inside.shape[2:]
        top, left = view.offset
        pixels = (seen[-1][0, :, top : top + size[1], left : left + size[0]] * 255).round().byte()
        assert np.array_equal(pixels.permute(1, 2, 0), np.array(photo(*size)))
        place = (100, 60)
        pixel = [(i + before + view.stride // 2) // view.stride for i, before in zip(place, view.offset, strict=True)]
        assert view.assignment[place] == view.map_assignment[tuple(pixel)]


def test_wrappers_keep_the_normalization(model: Any) -> None:
    """Images are normalized for the model inside a wrapper, unless a layer does it."""
    from torch.optim.swa_utils import AveragedModel
    from torchvision.transforms import Normalize

    other = timm.create_model("test_stvit", pretrained_cfg_overlay={"mean": (0.3, 0.4, 0.5), "std": (0.1, 0.2, 0.3)})
    for net in (model, other.eval()):
        expected = super_tokens(net, photo())
        for dressed in (nn.Sequential(net), AveragedModel(net), timm.utils.ModelEmaV3(net), nn.DataParallel(net)):
            np.testing.assert_allclose(super_tokens(dressed, photo()).association, expected.association, atol=1e-6)
        cfg = net.pretrained_cfg
        inside = nn.Sequential(Normalize(cfg["mean"], cfg["std"]), net)
        np.testing.assert_allclose(super_tokens(inside, photo()).association, expected.association, atol=1e-5)
    assert not np.allclose(
        super_tokens(model, photo()).association, super_tokens(other, photo()).association, atol=1e-3
    )
    bare = stvit.STViT(dims=(16, 32), depths=(1, 1), num_heads=(1, 1), stoken_size=(8, 4)).eval()
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    pixels = (torch.from_numpy(np.array(photo())).permute(2, 0, 1) / 255 - mean) / std
    np.testing.assert_allclose(
        super_tokens(bare, photo()).association, super_tokens(bare, pixels).association, atol=1e-6
    )


def test_attributes_of_yolo_do_not_make_a_yolo(model: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.predictor, self.model = model, nn.Linear(2, 2), nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.backbone(x)

    np.testing.assert_array_equal(super_tokens(Net(), photo()).association, super_tokens(model, photo()).association)


def test_pixels_of_other_depths(model: Any, tmp_path: Path) -> None:
    """16 bits become 8 and transparent pixels white.

    Float pixels and values above 65535 are refused.
    """
    gray = np.array(photo().convert("L"))
    deep = Image.fromarray(gray.astype(np.uint16) << 8 | 77)
    deep.save(tmp_path / "deep.png")
    for given in (deep, tmp_path / "deep.png"):
        assert np.array_equal(np.array(super_tokens(model, given).image), np.repeat(gray[..., None], 3, axis=2))
    clear = Image.new("RGBA", (40, 40), (255, 0, 0, 0))
    assert (np.array(super_tokens(model, clear).image) == 255).all()
    for mode, value, words in (("I", 65536, "expected values from 0 to 65535"), ("F", 0, "floating point pixels")):
        with pytest.raises(ValueError, match=f"{words}.*convert the image to 8 or 16 bits"):
            super_tokens(model, Image.new(mode, (40, 40), value))
    with pytest.raises(ValueError, match="empty, 0x5 pixels"):
        super_tokens(model, Image.new("RGB", (0, 5)))
    (tmp_path / "junk.png").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"junk\.png: not an image"):
        super_tokens(model, tmp_path / "junk.png")
    with pytest.raises(FileNotFoundError, match=r"missing\.png"):
        super_tokens(model, tmp_path / "missing.png")


def test_blocks_of_a_stage() -> None:
    model = timm.create_model("stvit_pico")
    assert [len(names) for names in visualize.find_layers(model)] == [1, 2, 3, 1]
    last, first = super_tokens(model, photo(), 1), super_tokens(model, photo(), 1, block=0)
    assert (first.layer, last.layer) == ("stages.1.blocks.0.attn", "stages.1.blocks.1.attn")
    assert not np.allclose(first.association, last.association, atol=1e-3)
    assert super_tokens(model, photo(), -3).layer == last.layer


def test_stages_without_blocks_are_not_counted() -> None:
    model = timm.create_model("stvit_femto")
    assert len(model.stages[0].blocks) == 0
    assert visualize.stages(model) == [0, 1]
    assert [super_tokens(model, photo(), stage).layer for stage in (0, 1)] == [
        "stages.1.blocks.0.attn",
        "stages.2.blocks.1.attn",
    ]


def test_cells_of_two_sizes_and_more_rounds() -> None:
    model = timm.create_model("test_stvit", stoken_size=((4, 6), 1, (2, 1), 1), n_iter=2).eval()
    assert visualize.stages(model) == [0, 2]
    for stage in (0, 2):
        x = torch.randn(1, 3, 100, 140)
        view = super_tokens(model, x, stage)
        _, output = run_through(model.stages[stage].blocks[-1].attn, lambda x=x: model(x))
        features, association = (torch.tensor(a)[None] for a in (view.features, view.association))
        torch.testing.assert_close(upsample_super_tokens(features, association, view.stoken_size), output)


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_the_model_does_not_change(error: type[BaseException] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modes, statistics and hooks stay the same after success, after an error of the model, and after Ctrl-C."""
    model: Any = timm.create_model("test_stvit").train()
    model.stages[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    if error is not None:

        def fail(*_: Any) -> None:
            raise error("of the model")

        monkeypatch.setattr(model.stages[1].blocks[0].attn, "attend", fail)
        with pytest.raises(error, match="of the model"):
            super_tokens(model, photo(), 1)
    else:
        super_tokens(model, photo(), 1)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("dress", ["plain", "compiled", "parallel"])
def test_other_threads_can_use_the_model(dress: str) -> None:
    """While two threads view a model in training mode, another thread evaluates it."""
    torch.manual_seed(0)
    net: Any = timm.create_model("test_stvit", num_classes=10)
    alone, x = copy.deepcopy(net).eval(), torch.randn(1, 3, 64, 96)
    expected = [super_tokens(alone, x, stage) for stage in (0, 1)]
    model = {"plain": lambda m: m, "compiled": torch.compile, "parallel": nn.DataParallel}[dress](net)
    views: dict[int, Any] = {}
    inside, go_on = {stage: threading.Event() for stage in (0, 1)}, threading.Event()

    def stop(*_: Any) -> None:
        if threading.current_thread() in viewers:
            inside[viewers.index(threading.current_thread())].set()
            assert go_on.wait(60)

    def view(stage: int) -> None:
        views[stage] = super_tokens(model, x, stage)

    net.stem.register_forward_pre_hook(stop)
    viewers = [threading.Thread(target=view, args=(stage,)) for stage in (0, 1)]
    try:
        for stage, viewer in enumerate(viewers):
            viewer.start()
            assert inside[stage].wait(60)
        assert all(module.training for module in net.modules())
        for module in net.modules():
            assert not module._forward_pre_hooks or module is net.stem
        with torch.no_grad():
            torch.testing.assert_close(net.eval()(x), alone(x))
    finally:
        go_on.set()
        for viewer in viewers:
            viewer.join()
    for stage in (0, 1):
        for name in ("association", "tokens", "features", "queries", "keys"):
            np.testing.assert_array_equal(getattr(views[stage], name), getattr(expected[stage], name))


def test_modules_that_refer_to_their_parts(model: Any) -> None:
    """Attributes that refer to modules, such as lists and methods, refer to the copies."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model
            self.parts = [model]
            self.run = self.run_parts
            self.late = partial(self.run_parts)

        def run_parts(self, x: torch.Tensor) -> torch.Tensor:
            assert not self.training
            return self.parts[0](x)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.run(x) if x.shape[2] > 64 else self.late(x)

    net = Net().train()
    model.eval()
    for size in (64, 96):
        x = torch.randn(1, 3, size, size)
        np.testing.assert_array_equal(super_tokens(net, x).association, super_tokens(model, x).association)
    # Modules that are compiled in place or contain scripted modules.
    x = torch.randn(1, 3, 64, 64)
    scripted = torch.jit.script(nn.Sequential(nn.Identity(), nn.Dropout(0.9)))
    compiled: Any = torch.compile(model)
    inside = nn.Sequential(scripted, compiled).train()
    model.eval().compile()
    try:
        np.testing.assert_array_equal(super_tokens(inside, x).association, super_tokens(net, x).association)
        assert scripted.training
    finally:
        model._compiled_call_impl = None


def test_random_weights_are_the_same_in_every_thread() -> None:
    """All threads share one generator, so only one thread at a time may seed it."""
    results: dict[int, torch.Tensor] = {}
    is_second_inside = threading.Event()

    def draw_first() -> None:
        with viewing._seeded_rng():
            number = torch.rand(())
            second.start()
            is_second_inside.wait(0.3)  # gives the second thread time to draw, if it can
            results[0] = torch.stack([number, torch.rand(())])

    def draw_second() -> None:
        with viewing._seeded_rng():
            number = torch.rand(())
            is_second_inside.set()
            first.join()
            results[1] = torch.stack([number, torch.rand(())])

    first, second = threading.Thread(target=draw_first), threading.Thread(target=draw_second)
    state = torch.get_rng_state()
    first.start()
    first.join()
    second.join()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(0)
    expected = torch.rand(2)
    assert torch.equal(results[0], expected) and torch.equal(results[1], expected)


def test_low_precision(model: Any) -> None:
    view = super_tokens(timm.create_model("test_stvit").to(torch.bfloat16), photo())
    assert view.association.dtype == view.features.dtype == np.float32


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            {"stage": 2},
            "stage 2 has no super tokens, because every pixel is its own token; choose one of the stages 0, 1",
        ),
        ({"stage": 4}, "stage must be from -4 to 3, got 4"),
        ({"block": 1}, "block of stage 0 must be from -1 to 0, got 1"),
        ({"image": torch.zeros(2, 3, 8, 8)}, r"one normalized image \(3, H, W\) or .* got a tensor \[2, 3, 8, 8\]"),
        ({"image": torch.zeros(1, 1, 8, 8)}, "one normalized image"),
        ({"image": torch.zeros(3, 8, 8, dtype=torch.uint8)}, "of torch.uint8"),
        ({"image": np.zeros((8, 8, 3))}, r"expected an array \(H, W, 3\) .* got \[8, 8, 3\] of float64"),
        ({"image": np.zeros((0, 8, 3), np.uint8)}, "expected an array"),
        ({"image": 5}, "image: expected a path, PIL image, array or tensor, got int"),
        ({"stage": 0.5}, "stage must be from -4 to 3, got 0.5"),
        ({"data_config": {"mean": (0,)}}, "data_config must have 'mean' and 'std' with one number per channel"),
        ({"data_config": {"mean": 0.5, "std": 0.5}}, "one number per channel"),
        ({"data_config": {"mean": (), "std": ()}}, "for each of the 3 channels"),
        ({"data_config": {"mean": (0, 0, 0), "std": (1, 1, 0)}}, "positive std for each of the 3 channels"),
    ],
)
def test_bad_arguments_are_named(model: Any, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        super_tokens(model, **{"image": photo(), **arguments})


def test_bad_models_are_named(model: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no super token attention"):
        super_tokens(timm.create_model("resnet18"), photo())
    with pytest.raises(ValueError, match="every pixel is its own token; no stage of this model has any"):
        super_tokens(timm.create_model("test_stvit", stoken_size=1), photo())
    with pytest.raises(TypeError, match="not scripted or traced, got TopLevelTracedModule"):
        super_tokens(torch.jit.trace(model, torch.zeros(1, 3, 64, 64), check_trace=False), photo())
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module .* got str"):
        super_tokens("stvit_small", photo())
    idle = nn.Sequential(nn.Conv2d(3, 8, 1))
    idle.register_module("aside", stvit.SuperTokenAttention(8, num_heads=1))
    idle.forward = lambda x: x
    with pytest.raises(ValueError, match="does not call the layer"):
        super_tokens(idle, photo())
    with pytest.raises(OSError, match="no such file"):
        super_tokens(model, tmp_path / "no such file.png")


def test_bad_tokens_are_named(model: Any) -> None:
    view = super_tokens(model, photo())
    last = view.grid[0] * view.grid[1] - 1
    for token in (-1, last + 1, 1.5):
        with pytest.raises(ValueError, match=f"token must be from 0 to {last}, got"):
            view.association_map(token)
    with pytest.raises(ValueError, match="head must be from 0 to 0, got 1"):
        view.attention_map(0, head=1)
    with pytest.raises(ValueError, match=r"pixel \(120, 0\) is outside the image of 120x160 pixels"):
        view.token_at(120, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def test_pictures_show_the_arrays(model: Any) -> None:
    image = photo(500, 400)
    view = super_tokens(model, image)
    assert view.scale == 1
    original = np.array(image).astype(int)

    lines = np.array(view.draw_boundaries())
    painted = (lines == visualize.LINE_COLOR).all(axis=2)
    differs = np.zeros_like(painted)
    differs[:, :-1] |= view.assignment[:, :-1] != view.assignment[:, 1:]
    differs[:-1] |= view.assignment[:-1] != view.assignment[1:]
    assert np.array_equal(painted, differs) and np.array_equal(lines[~painted], original[~painted])

    colors = np.array(view.draw_mean_colors()).astype(int)
    for token in np.unique(view.assignment):
        where = view.assignment == token
        assert np.abs(colors[where] - original[where].mean(axis=0)).max() <= 0.5 + 1e-9

    marked = np.array(view.draw_boundaries(view.center)), np.array(view.draw_mean_colors(view.center))
    for pixels, plain in zip(marked, (lines, colors), strict=True):
        changed = (pixels != plain).any(axis=2)
        assert changed.any() and (pixels[changed] == visualize.MARK_COLOR).all()

    token = view.token_at(250, 200)
    assert token == view.center == view.assignment[200, 250]
    association, weights = view.association_map(token), view.attention_map(token)
    attention = (weights - weights.min()) / (weights.max() - weights.min())
    gray = np.array(image.convert("L")) * 0.55
    for picture, heat in (
        (view.draw_association(token), association / association.max()),
        (view.draw_attention(token), attention.ravel()[view.assignment]),
    ):
        pixels = np.array(picture).astype(int)
        marked = (pixels == visualize.MARK_COLOR).all(axis=2)
        assert marked.any() and (view.assignment == token)[1:, 1:][marked[1:, 1:]].any()
        for channel in range(3):
            color = np.interp(heat, np.linspace(0, 1, len(draw.HEAT_COLORS)), draw.HEAT_COLORS[:, channel])
            expected = gray * (1 - heat) + color * heat
            assert np.abs(pixels[..., channel] - expected)[~marked].max() <= 0.51


def test_small_images_are_enlarged(model: Any) -> None:
    view = super_tokens(model, photo(33, 20))
    assert view.scale == 12 and view.draw_mean_colors().size == (396, 240) == view.draw_attention().size
    colors = np.array(view.draw_mean_colors())
    assert (colors.reshape(20, 12, 33, 12, 3) == colors[::12, None, ::12, None]).all()


def test_sheet(model: Any) -> None:
    view = super_tokens(model, photo())
    sheet = Image.open(io.BytesIO(view._repr_png_()))
    assert sheet.format == "PNG" and np.array_equal(np.array(sheet), np.array(view.draw()))
    assert sheet.width == 2 * 480 + 3 * 16
    # Captions are below each picture and the title is above all. Their height is 1/36 of the width.
    titled = view.draw(token=3, title="a title")
    assert titled.height > sheet.height and np.array(titled)[:30].min() < 100 < np.array(sheet)[:16].min()
    for column in (0, 1):
        left, top = 16 + column * 496, 16 + 640
        below = np.array(sheet)[top : top + sheet.width // 36 * 3 // 2, left : left + 480]
        assert below.min() < 50 and below.max() == 255
    long = visualize.contact_sheet([("a caption much wider than its picture " * 3, photo())] * 3, columns=5)
    assert long.width == 3 * 480 + 4 * 16
    gaps = np.concatenate([np.array(long)[:, i * 496 : i * 496 + 16] for i in range(4)], axis=1)
    assert gaps.min() == 255  # no caption leaves its column
    # A caption is shortened only if it does not fit at half of the font size.
    for length in range(20, 60):
        caption = ("attention of token 128, 0.0029 to 0.0031" * 2)[:length]
        assert draw._fit_captions([caption], 28, 480)[1] == [caption]
    # The sheet stays small for narrow and for flat pictures.
    for size in ((1, 1000), (1000, 1)):
        assert max(super_tokens(model, photo(*size)).draw().size) < 3000
    assert len(repr(view)) < 400
    with pytest.raises(ValueError, match="panel_width must be at least 100"):
        visualize.contact_sheet([("a", photo())], columns=1, panel_width=5)
    with pytest.raises(ValueError, match=r"regions: expected shape \(160, 120\) as the image, got \(3, 3\)"):
        visualize.draw_boundaries(photo(), np.zeros((3, 3), int))
    with pytest.raises(ValueError, match="at least one picture and one column, got 0 and 2"):
        visualize.contact_sheet([], columns=2)


# ---------------------------------------------------------------------------------------------------------------------
# The command


def trained(folder: Path, digits_folder: Path, *flags: str) -> Path:
    """Trains on digits for three epochs and returns the run directory."""
    assert (
        train_cls.main(
            [
                "--model=test_stvit",
                "--img-size=32",
                "--epochs=3",
                "--batch-size=20",
                "--workers=0",
                f"--data-dir={digits_folder}",
                f"--output={folder}",
                "--experiment=it",
                *flags,
            ]
        )
        == 0
    )
    return folder / "it"


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory: pytest.TempPathFactory, digits_folder: Path) -> Path:
    return trained(tmp_path_factory.mktemp("runs"), digits_folder, "--checkpoint-epochs=1", "--checkpoint-steps=1")


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def pictures(*stages: int) -> set[str]:
    return {f"stage{stage}{name}.png" for stage in stages for name in ("", *(f"_{p}" for p in PICTURES))}


def test_training_keeps_the_requested_epochs(digits_run: Path, digits_folder: Path, tmp_path: Path) -> None:
    """Training keeps them in addition to the last two checkpoints."""
    kept = {path.name for path in (digits_run / "checkpoints").iterdir()}
    assert kept == {"00001-00000000.pt", "00002-00000000.pt", "00002-00000002.pt", "00003-00000000.pt"}
    none = trained(tmp_path, digits_folder, "--checkpoint-steps=1")
    assert {path.name for path in (none / "checkpoints").iterdir()} == {"00002-00000002.pt", "00003-00000000.pt"}
    second = trained(tmp_path / "second", digits_folder, "--checkpoint-epochs=2", "--checkpoint-steps=0")
    assert {path.name for path in (second / "checkpoints").iterdir()} == {"00002-00000000.pt", "00003-00000000.pt"}


def test_help_does_not_import_pytorch() -> None:
    program = [sys.executable, "-X", "importtime", "-m", "stvit.tools.visualize", "--help"]
    result = subprocess.run(program, capture_output=True, text=True, check=True)
    assert "--checkpoints" in result.stdout and " torch\n" not in result.stderr


def test_one_image_as_the_readme_says(digits_run: Path, tmp_path: Path) -> None:
    """Runs the command in a new process and compares the sheet and each picture."""
    shutil.copy(BUS, tmp_path / "photo.jpg")
    flags = ["photo.jpg", "--checkpoint", digits_run, "--img-size", "200", "--pixel", "400", "700", "--output", "out"]
    script = Path(command.__file__)
    result = subprocess.run([sys.executable, script, *flags], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "wrote the pictures of 1 image to out"
    assert files(tmp_path / "out/photo") == pictures(0, 1)
    assert "warning" not in result.stderr and "image/s" not in result.stderr
    image = Image.open(BUS).convert("RGB").resize((150, 200), Image.Resampling.LANCZOS)
    model = timm.create_model(f"local-dir:{digits_run}/best", pretrained=True)
    view = super_tokens(model, image, 1)
    token = view.token_at(400 * 150 // 810, 700 * 200 // 1080)
    expected = [
        view.draw_boundaries(),
        view.draw_mean_colors(),
        view.draw_association(token),
        view.draw_attention(token),
    ]
    for name, picture in zip(PICTURES, expected, strict=True):
        assert np.array_equal(np.array(Image.open(tmp_path / f"out/photo/stage1_{name}.png")), np.array(picture)), name
    sheet = view.draw(token, f"{digits_run}, stage 1")
    assert np.array_equal(np.array(Image.open(tmp_path / "out/photo/stage1.png")), np.array(sheet))


def test_random_weights_are_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    photo(64, 64).save("a.png")
    flags = ["a.png", "--stage", "1", "--model", "test_stvit", "--no-pretrained"]
    assert command.main(flags) == 0
    assert files(tmp_path / "super_tokens/a") == pictures(1)
    assert "warning: test_stvit, random weights: the model is untrained; pass --checkpoint" in capsys.readouterr().err
    # The random weights are the same each time.
    first = Path("super_tokens/a/stage1.png").read_bytes()
    assert command.main(flags) == 0
    assert Path("super_tokens/a/stage1.png").read_bytes() == first


def test_without_a_model_the_weights_of_the_package_are_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo(64, 64).save(tmp_path / "a.png")
    assert command.main([str(tmp_path / "a.png"), "--stage", "1", f"--output={tmp_path / 'out'}"]) == 0
    said = capsys.readouterr()
    assert "stvit_pico.cifar10 was trained on CIFAR-10; pass --checkpoint for another model" in said.out
    assert "warning" not in said.err
    model = timm.create_model("stvit_pico.cifar10", pretrained=True)
    sheet = visualize.super_tokens(model, tmp_path / "a.png", stage=1).draw_boundaries()
    assert np.array_equal(np.array(Image.open(tmp_path / "out/a/stage1_boundaries.png")), np.array(sheet))


def test_a_folder_with_unreadable_files(digits_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Images in subfolders and images with the same name are drawn.

    Files that are not images are named.
    """
    source, out = tmp_path / "in", tmp_path / "out"
    (source / "sub").mkdir(parents=True)
    photo(40, 30).save(source / "a.png")
    photo(30, 40).save(source / "a.jpg")
    photo(30, 40).save(source / "sub/b.PNG")
    (source / "notes.txt").write_text("none")
    (source / "broken.jpg").write_bytes(BUS.read_bytes()[:3000])
    (source / "text.png").write_text("none")
    assert command.main([str(source), f"--checkpoint={digits_run}", "--stage", "0", f"--output={out}"]) == 1
    said = capsys.readouterr()
    assert "5/5" in said.err and said.out.splitlines() == [
        f"ignored in {source}: 1 file that is hidden or not an image (notes.txt)",
        f"wrote the pictures of 3 images to {out}",
    ]
    error = said.err.splitlines()[-1]
    assert error.startswith("error: 2 of 5 images were skipped: broken.jpg: damaged, truncated, or a kind of JPEG")
    assert error.endswith("; text.png: not an image of a supported format (BMP, GIF, JPEG, PNG, TIFF or WebP)")
    assert files(out) == {f"{folder}/{name}" for folder in ("a.png", "a.jpg", "sub/b") for name in pictures(0)}


def test_earlier_results_are_not_drawn(
    digits_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    photo(40, 30).save("a.png")
    for _ in range(2):
        assert command.main([".", f"--checkpoint={digits_run}", "--stage=0"]) == 0
        assert capsys.readouterr().out.strip() == "wrote the pictures of 1 image to super_tokens"


def test_a_sheet_of_the_checkpoints_of_a_run(digits_run: Path, tmp_path: Path) -> None:
    photo(60, 60).save(tmp_path / "a.png")
    flags = [str(tmp_path / "a.png"), f"--checkpoints={digits_run}", f"--output={tmp_path}"]
    assert command.main(flags) == 0
    assert files(tmp_path / "a") == {"stage0_checkpoints.png", "stage1_checkpoints.png"}
    sheet = np.array(Image.open(tmp_path / "a/stage0_checkpoints.png"))
    rows = 4
    assert sheet.shape[1] == 3 * 360 + 4 * 12
    height = (sheet.shape[0] - 12) // rows
    views = []
    for row, name in enumerate(["00001-00000000", "00002-00000000", "00002-00000002", "00003-00000000"]):
        state = torch.load(digits_run / f"checkpoints/{name}.pt", weights_only=True)
        model = timm.create_model("test_stvit", num_classes=4)
        model.load_state_dict(state["model"])
        views.append(
            super_tokens(
                model,
                photo(60, 60),
                0,
                data_config={"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
            )
        )
        picture = views[-1].draw_boundaries().resize((360, 360), Image.Resampling.LANCZOS)
        top = 12 + row * height
        assert np.array_equal(sheet[top : top + 360, 12 : 12 + 360], np.array(picture)), name
    assert not np.array_equal(views[0].association, views[-1].association)
    assert [label for label, _ in find_checkpoints([str(digits_run)])] == [
        "epoch 1",
        "epoch 2",
        "epoch 3, step 2",
        "epoch 3",
    ]


@pytest.mark.long
def test_checkpoints_of_ultralytics(detectors: dict[str, Any], tmp_path: Path) -> None:
    """Draws the checkpoints of save_period in the order of their epochs, and one checkpoint alone."""
    photo(60, 60).save(tmp_path / "a.png")
    weights = tmp_path / "train/weights"
    weights.mkdir(parents=True)
    for name in ("epoch0", "epoch9", "epoch10", "best", "last"):
        detectors["stokenattention"].save(weights / f"{name}.pt")
    found = find_checkpoints([str(tmp_path / "train")])
    assert [label for label, _ in found] == ["epoch 1", "epoch 10", "epoch 11"]
    flags = [str(tmp_path / "a.png"), "--stage", "3", f"--output={tmp_path}"]
    assert command.main([*flags, f"--checkpoints={tmp_path}/train"]) == 0
    assert command.main([*flags, f"--checkpoint={tmp_path}/train"]) == 0
    assert files(tmp_path / "a") == {"stage3_checkpoints.png"} | pictures(3)
    view = super_tokens(YOLO(weights / "best.pt"), photo(60, 60), 3)
    assert np.array_equal(np.array(Image.open(tmp_path / "a/stage3_boundaries.png")), np.array(view.draw_boundaries()))


def test_models_of_the_hub(
    model: Any, detectors: dict[str, Any], hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Draws a classifier and a detector of the Hub.

    Other and missing repositories are explained.
    """
    stvit_hub.save(model, tmp_path / "model")
    detectors["stokenattention"].save(tmp_path / "model.pt")
    contents = {
        "org/classifier": {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()},
        "org/detector": {"model.pt": (tmp_path / "model.pt").read_bytes()},
        "org/text": {"notes.txt": b"nothing"},
    }
    for repo, content in contents.items():
        hub.create_repo(repo)
        hub.commit(repo, content)
    photo(60, 60).save(tmp_path / "a.png")
    for name in ("classifier", "detector"):
        flags = [str(tmp_path / "a.png"), f"--checkpoint=hf-hub:org/{name}", "--stage=0", f"--output={tmp_path / name}"]
        assert command.main(flags) == 0, capsys.readouterr().err
        assert files(tmp_path / name / "a") == pictures(0)
    for name, words in (("text", "no file ends in .pt"), ("missing", "org/missing")):
        capsys.readouterr()
        assert command.main([str(tmp_path / "a.png"), f"--checkpoint=hf-hub:org/{name}"]) == 1
        (line,) = capsys.readouterr().err.splitlines()[-1:]
        assert line.startswith("error: ") and "unexpected" not in line and words in line, line


def masks_of(folder: Path) -> None:
    """Writes boxes as the true segments of a photograph."""
    folder.mkdir()
    mask = Image.new("L", (120, 160))
    mask.paste(1, (0, 40, 120, 110))
    mask.paste(2, (60, 80, 90, 150))
    mask.paste(255, (0, 0, 10, 160))
    mask.save(folder / "a_mask.png")


def test_measures_compared_with_slic(digits_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo().save(tmp_path / "a.png")
    masks_of(tmp_path / "masks")
    flags = [str(tmp_path / "a.png"), f"--checkpoint={digits_run}", f"--masks={tmp_path}/masks", f"--output={tmp_path}"]
    assert command.main([*flags, "--void=255", "--tolerance=1"]) == 0
    assert files(tmp_path / "a") == pictures(0, 1) | {"stage0_measures.png", "stage1_measures.png"}
    rows = list(csv.DictReader((tmp_path / "measures.csv").open()))
    methods = ["super tokens", "SLIC", "SLIC at the map's resolution", "cells"]
    assert [(row["stage"], row["method"]) for row in rows] == [(s, method) for s in "01" for method in methods]
    model = timm.create_model(f"local-dir:{digits_run}/best", pretrained=True)
    truth = np.array(Image.open(tmp_path / "masks/a_mask.png"))
    for stage in (0, 1):
        view = super_tokens(model, photo(), stage)
        ours, slic = rows[4 * stage : 4 * stage + 2]
        assert float(ours["boundary_recall"]) == pytest.approx(
            stvit.superpixels.boundary_recall(view.assignment, truth, 1, void=255), abs=1e-4
        )
        assert float(ours["undersegmentation_error"]) == pytest.approx(
            stvit.superpixels.undersegmentation_error(view.assignment, truth, void=255), abs=1e-4
        )
        assert int(ours["regions"]) == len(np.unique(view.assignment))
        assert abs(int(slic["regions"]) - int(ours["regions"])) <= 0.2 * int(ours["regions"])
        assert int(rows[4 * stage + 3]["regions"]) == view.grid[0] * view.grid[1]
        coarse = measures._slic(measures.reduce_to_map(view), int(ours["regions"]))
        assert float(rows[4 * stage + 2]["boundary_recall"]) == pytest.approx(
            stvit.superpixels.boundary_recall(view.to_image(coarse), truth, 1, void=255), abs=1e-4
        )
    assert rows[0]["model"] == str(digits_run) and rows[0]["versions"].startswith("stvit ") and rows[0]["date"]
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table[1:9]] == list("00001111")


def test_images_that_cannot_be_measured_are_skipped(
    digits_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mask of another size, one without an outline and a damaged one do not stop the command."""
    masks_of(tmp_path / "masks")
    (tmp_path / "in").mkdir()
    for name in "abc":
        photo().save(tmp_path / f"in/{name}.png")
    Image.new("L", (120, 160)).save(tmp_path / "masks/b.png")
    Image.new("L", (12, 16)).save(tmp_path / "masks/c.png")
    photo().save(tmp_path / "in/d.png")
    (tmp_path / "masks/d.png").write_bytes(b"junk")
    flags = [f"--checkpoint={digits_run}", f"--masks={tmp_path}/masks", f"--output={tmp_path}/out", "--stage=0"]
    assert command.main([str(tmp_path / "in"), *flags]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "error: 3 of 4 images were skipped: b.png: the segmentation has no boundary, so boundary recall" in line
    assert "c.png: expected one value per pixel of the image, [160, 120], got shape [16, 12]" in line
    assert "d.png: not an image of a supported format" in line
    assert {row["image"] for row in csv.DictReader((tmp_path / "out/measures.csv").open())} == {"a.png"}


def test_reduced_images_match_the_map(model: Any) -> None:
    """Each pixel is the mean of the pixels that `to_image` fills, also for a detector with padding."""
    for net, stage in ((model, 1), (YOLO("yolo26n-stokenattention.yaml"), 0)):
        view = super_tokens(net, photo(130, 99), stage)
        h, w = view.map_assignment.shape
        place = view.to_image(np.arange(h * w).reshape(h, w))
        small = np.array(measures.reduce_to_map(view)).astype(int)
        inner = [number for number in np.unique(place) if (place == number).sum() == view.stride**2]
        assert len(inner) > 100
        for number in inner:
            mean = np.array(view.image)[place == number].mean(axis=0)
            assert np.abs(small.reshape(-1, 3)[number] - mean).max() <= 0.51


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["missing.png"], "no such file or folder"),
        (["empty"], "no images in empty"),
        (["a.png", "--stage=2"], "--stage 2: RUN has no super tokens there; choose from 0, 1"),
        (["a.png", "--block=5"], "block of stage 0 must be from -1 to 0, got 5"),
        (["a.png", "--token=999"], "token must be from 0 to"),
        (["a.png", "--pixel", "120", "0"], "--pixel 120 0 is outside the image of 120x160 pixels"),
        (["a.png", "--checkpoints=x"], "cannot be combined with --checkpoint or --masks"),
        (["a.png", "--void=1"], "pass --masks"),
        (["a.png", "--masks=empty"], "no mask for a.png; expected a.png or a_mask.png"),
        (["a.png", "--masks=other"], "one value per pixel of the image, [160, 120], got shape [8, 8]"),
        (["a.png", "--output=a.png"], "cannot write"),
    ],
)
def test_bad_flags_are_named(
    flags: list[str],
    words: str,
    digits_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    photo().save("a.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    Image.new("L", (8, 8)).save("other/a.png")
    assert command.main([*flags, f"--checkpoint={digits_run}"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ") and words in line.replace(str(digits_run), "RUN"), line
    assert "unexpected" not in line


def test_models_without_super_tokens_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo(40, 40).save(tmp_path / "a.png")
    image = str(tmp_path / "a.png")
    for flags, words in (
        (["--model=resnet18", "--no-pretrained"], "resnet18, random weights has no super tokens"),
        (["--model=stvit_smal"], "unknown model 'stvit_smal', did you mean stvit_small"),
        (["--model=yolo26n-resnet1.yaml"], "resnet1"),
        ([f"--checkpoint={tmp_path / 'no'}"], "no file, folder or timm model named"),
        ([f"--checkpoints={tmp_path}"], "no checkpoint found there"),
        ([f"--checkpoints={tmp_path / 'no'}"], "no such file or directory"),
    ):
        assert command.main([image, *flags]) == 1, flags
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("error: ") and words in line and "unexpected" not in line, line


def test_a_hostile_detector_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The checkpoint contains classes of Ultralytics and a function of another module."""

    class Evil:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    photo(40, 40).save(tmp_path / "a.png")
    detector = YOLO("yolo26n-stokenattention.yaml")
    torch.save({"model": detector.model, "evil": Evil()}, tmp_path / "evil.pt")
    assert command.main([str(tmp_path / "a.png"), f"--checkpoint={tmp_path / 'evil.pt'}"]) == 1
    assert "no code was run" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()

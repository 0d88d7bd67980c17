"""Tests stvit.inference: equal outputs and lower cost.

Also tests memory formats and graphs of the plain model.
"""

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.layers import DropPath, LayerScale2d
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import stvit
from stvit import inference
from stvit.stvit import ResidualDepthwiseConv, STViTBlock
from tests.golden import fill
from tests.versions import needs_newer_torch

SIZES = [(2, 64, 96), (1, 75, 50), (3, 33, 130)]


def create(name: str = "test_stvit", **kwargs: Any) -> nn.Module:
    """Creates a model in evaluation mode.

    No value is left at 0 or 1, where folding would have no effect.
    """
    model = timm.create_model(name, **kwargs).eval()
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.3, 2.0, generator=generator)
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(0, 0.3, generator=generator)
        elif isinstance(module, LayerScale2d):
            module.gamma.data.uniform_(0.1, 1.0, generator=generator)
    return model


def unsettle(model: nn.Module) -> None:
    """Sets random statistics and weights in batch normalizations, as training would."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.5)
            nn.init.uniform_(module.running_var, 0.3, 3.0)
            nn.init.uniform_(module.weight, 0.5, 2.0)
            nn.init.normal_(module.bias)


def images(batch: int, *size: int, in_chans: int = 3) -> torch.Tensor:
    return torch.from_numpy(fill.image(0, batch, in_chans, *size))


def assert_same(actual: Any, expected: Any, tolerance: float = 1e-4) -> None:
    """Compares tensors, with a tolerance in standard deviations of each expected tensor."""
    actual, expected = ([x] if isinstance(x, torch.Tensor) else x for x in (actual, expected))
    assert len(actual) == len(expected)
    for x, y in zip(actual, expected, strict=True):
        assert x.shape == y.shape
        error = ((x - y).abs().max() / y.std()).item()
        assert error <= tolerance, f"{error:.1e} standard deviations"


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes tiles so small that the test images need several."""
    monkeypatch.setattr(inference, "TILE_BYTES", 2**13)
    monkeypatch.setattr(inference, "MIN_TILE_ROWS", 2)


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("test_stvit", {}),
    ("stvit_pico", {"ls_init_values": (None, None, 0.1, 0.1), "drop_path_rate": 0.1, "proj_drop_rate": 0.1}),
    ("test_stvit", {"in_chans": 1, "act_layer": "silu", "num_classes": 0}),
    ("test_stvit", {"norm_layer": "layernorm2d", "n_iter": 2, "stoken_size": (8, (4, 2), 2, 1)}),
    ("test_stvit", {"features_only": True, "out_indices": (0, 2, 3), "ls_init_values": 0.1}),
    ("test_stvit", {"features_only": True, "output_stride": 8}),
]


@pytest.mark.parametrize(("name", "kwargs"), VARIANTS)
@pytest.mark.parametrize("tiles", ["whole", "tiles"])
def test_outputs_are_equal(name: str, kwargs: dict[str, Any], tiles: str, request: pytest.FixtureRequest) -> None:
    if tiles == "tiles":
        request.getfixturevalue("small_tiles")
    model = create(name, **kwargs)
    optimized = stvit.optimize_for_inference(model)
    assert type(optimized) is type(model)
    with torch.inference_mode():
        for batch, *size in SIZES:
            x = images(batch, *size, in_chans=kwargs.get("in_chans", 3))
            assert_same(optimized(x), model(x))


def test_float64_outputs_are_equal_up_to_rounding() -> None:
    model = create("stvit_pico", ls_init_values=0.1).double()
    optimized = stvit.optimize_for_inference(model)
    with torch.inference_mode():
        x = images(2, 64, 96).double()
        assert_same(optimized(x), model(x), 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", ["cast first", "optimize first", "autocast"])
def test_reduced_precision(way: str, dtype: torch.dtype) -> None:
    """The optimized model is as close to float32 as the plain model."""
    model = create("stvit_pico")
    for module in model.modules():
        # Small weights as in trained models: a folded center, near 1, would round them away.
        if isinstance(module, ResidualDepthwiseConv):
            module.conv.weight.data *= 0.02
    x = images(2, 96, 64)
    cast = dtype if way != "autocast" else torch.float32
    plain = copy.deepcopy(model).to(cast)
    optimized = stvit.optimize_for_inference(plain if way == "cast first" else model).to(cast)
    with torch.inference_mode():
        exact = model.forward_features(x)
        with torch.autocast("cpu", dtype, enabled=way == "autocast"):
            outputs = [net.forward_features(x.to(cast)) for net in (plain, optimized)]
    assert outputs[1].dtype == outputs[0].dtype
    errors = [(y.float() - exact).square().mean().sqrt() / exact.std() for y in outputs]
    assert errors[1] < 1.1 * errors[0] < 0.1


def test_the_residual_is_exact_in_reduced_precision() -> None:
    module = ResidualDepthwiseConv(64).bfloat16()
    module.conv.weight.data.mul_(1e-3)  # lost when added to 1
    folded = inference.FoldedResidualConv(module)
    x = torch.randn(1, 64, 8, 8, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(folded(x), module(x))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(folded.float()(x.float()), module.float()(x.float()))
        torch.testing.assert_close(folded.float()(x.float()), module.float()(x.float()))


@pytest.mark.parametrize(
    "reparametrize",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        lambda conv: nn.utils.prune.l1_unstructured(conv, "weight", 0.5),
    ],
    ids=["weight_norm", "spectral_norm", "old weight_norm", "old spectral_norm", "prune"],
)
@pytest.mark.parametrize("name", ["test_stvit", "resnet18"])
def test_computed_weights(name: str, reparametrize: Callable[[nn.Conv2d], object]) -> None:
    model = create(name)
    for module in list(model.modules()):
        if isinstance(module, nn.Conv2d):
            reparametrize(module)
    x = images(2, 64, 64)
    model.train()(x).sum().backward()  # leaves weights that copy.deepcopy refuses
    model.eval()
    optimized = stvit.optimize_for_inference(model)
    with torch.no_grad():
        assert_same(optimized(x), model(x))
    model.train()(x).sum().backward()  # the original still trains


def test_replaced_and_hooked_convolutions() -> None:
    peft = pytest.importorskip("peft")
    model, x = create(ls_init_values=0.1), images(2, 64, 64)
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["fc1", "cpe.conv"], r=64), model)
    for name, p in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, std=0.05)
    block = model.eval().stages[1].blocks[0]
    for conv in (block.mlp.conv.conv, block.attn.proj):
        conv.register_forward_hook(lambda module, inputs, output: 1.5 * output)
    with torch.no_grad():
        assert_same(stvit.optimize_for_inference(model)(x), model(x))


BLOCK = "stages.0.blocks.0"
CHANGED = [
    *(f"{BLOCK}.{name}" for name in ("cpe", "norm2", "attn", "attn.proj_drop", "ls1", "drop_path1", "mlp", "mlp.conv")),
    *(f"{BLOCK}.mlp.{name}" for name in ("fc1", "drop1", "drop2", "conv.conv")),
    *("stem.0", "final_conv", "final_norm", "stages.1.downsample.0", "stages.1.downsample.1"),
]


@torch.no_grad()
def changed_model() -> Any:
    model = timm.create_model("test_stvit", num_classes=5, ls_init_values=0.5, drop_path_rate=0.1).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model


def assert_optimized_is_equal(model: nn.Module) -> None:
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(stvit.optimize_for_inference(model)(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CHANGED)
def test_hooks_see_the_same_maps(name: str) -> None:
    model = changed_model()
    model.get_submodule(name).register_forward_hook(lambda module, args, output: 1.5 * output + 0.1)
    assert_optimized_is_equal(model)


@pytest.mark.parametrize("name", ["cpe", "norm2", "attn", "mlp", "mlp.conv", "mlp.fc1"])
@pytest.mark.parametrize("way", ["subclass", "patch"])
def test_changed_forward_methods_are_kept(name: str, way: str) -> None:
    model = changed_model()
    module = model.get_submodule(f"{BLOCK}.{name}")
    forward = type(module).forward
    if way == "subclass":
        module.__class__ = type("Doubled", (type(module),), {"forward": lambda self, x: 2 * forward(self, x)})
    else:
        module.forward = lambda x: 2 * forward(module, x)
    assert_optimized_is_equal(model)


def test_layers_replaced_afterwards_see_whole_maps(small_tiles: None) -> None:
    model = stvit.optimize_for_inference(timm.create_model("test_stvit").eval())
    x, mlp, sizes = torch.randn(1, 3, 64, 64), model.get_submodule(f"{BLOCK}.mlp"), []
    with torch.no_grad():
        expected = model(x)
        mlp.fc1 = nn.Sequential(mlp.fc1)  # a wrapper without the attributes of a convolution
        mlp.fc1.register_forward_hook(lambda module, args, output: sizes.append(output.shape[2:]))
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert sizes == [(16, 16)]


def test_folded_and_removed_modules() -> None:
    model = create("stvit_pico", ls_init_values=0.1, drop_path_rate=0.1, proj_drop_rate=0.1, attn_drop_rate=0.1)
    optimized = stvit.optimize_for_inference(model)
    left = [name for name, module in optimized.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert left == ["stem.2", "stem.5", "stem.8", "stem.11"]  # after an activation, before a padded convolution
    gone = (LayerScale2d, ResidualDepthwiseConv, nn.Dropout, DropPath)
    for name, module in optimized.named_modules():
        if name.endswith(".attn_drop"):
            assert module.p == 0
        else:
            assert type(module) not in gone or module is optimized.head.drop, name
    assert not any(p.requires_grad for p in optimized.parameters())
    for module in optimized.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.is_contiguous(memory_format=torch.channels_last)


def test_the_original_is_unchanged() -> None:
    model = create("stvit_pico", ls_init_values=0.1)
    before = copy.deepcopy(model)
    stvit.optimize_for_inference(model)
    assert str(model) == str(before)
    for (name, value), expected in zip(model.state_dict().items(), before.state_dict().values(), strict=True):
        assert torch.equal(value, expected) and value.stride() == expected.stride(), name
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("features_only", [False, True])
def test_a_deleted_copy_is_free_at_once(features_only: bool) -> None:
    """Nothing that torch.fx leaves refers to the copy."""
    model = timm.create_model("test_stvit", features_only=features_only).eval()
    gc.collect()
    gc.disable()
    try:
        optimized = stvit.optimize_for_inference(model)
        reference = weakref.ref(next(optimized.parameters()))
        del optimized
        assert reference() is None
    finally:
        gc.enable()


def test_optimizing_twice_changes_nothing() -> None:
    once = stvit.optimize_for_inference(create(ls_init_values=0.1))
    twice = stvit.optimize_for_inference(once)
    for name, value in twice.state_dict().items():
        assert torch.equal(value, once.state_dict()[name]), name


def test_refused_models() -> None:
    with pytest.raises(ValueError, match=r"call model.eval\(\) first \(in training mode: the model, stem, stem.0, …\)"):
        stvit.optimize_for_inference(create().train())
    model = create()
    model.stages[1].train()
    with pytest.raises(ValueError, match=r"in training mode: stages.1, stages.1.downsample"):
        stvit.optimize_for_inference(model)
    with pytest.raises(TypeError, match="expected a plain model, got OptimizedModule; optimize first"):
        stvit.optimize_for_inference(torch.compile(create()))
    with pytest.raises(TypeError, match="expected a plain model, got RecursiveScriptModule"):
        stvit.optimize_for_inference(torch.jit.script(create()))


def test_other_timm_models() -> None:
    model = create("resnet18", num_classes=5)
    optimized = stvit.optimize_for_inference(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in optimized.modules())
    with torch.inference_mode():
        assert_same(optimized(images(2, 64, 64)), model(images(2, 64, 64)))


@pytest.mark.parametrize(
    ("name", "folded", "left"),
    [
        ("stvit_pico", 10, 4),
        ("stvit_base", 33, 4),
        ("resnet18", 15, 0),
        ("efficientnet_b0", 33, 0),
        ("convnext_atto", 0, 0),
    ],
)
def test_folding_keeps_the_outputs(name: str, folded: int, left: int) -> None:
    net = timm.create_model(name, num_classes=0).eval()
    net.prune_intermediate_layers([1, 3], prune_head=True)
    unsettle(net)
    images = torch.randn(2, 3, 64, 96)
    before = net.forward_intermediates(images, indices=[1, 3], intermediates_only=True)
    assert inference.fold_batch_norms(net) == folded
    after = net.forward_intermediates(images, indices=[1, 3], intermediates_only=True)
    for x, y in zip(after, before, strict=True):
        assert (x - y).abs().max() < 1e-4 * y.std()
    assert sum(isinstance(module, nn.BatchNorm2d) for module in net.modules()) == left


def test_shared_layers_are_not_folded() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
            self.shared, self.twice = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
            self.bn3, self.wide = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            x = self.bn(y) + y  # the sum also reads the convolution's output
            x = self.twice(self.shared(x)) + self.twice(self.shared(2 * x))
            return self.wide(self.bn3(x))  # the padding zeros are not normalized

    model = Shared().eval()
    unsettle(model)
    images = torch.randn(1, 3, 8, 8)
    before = model(images)
    assert inference.fold_batch_norms(model) == 0
    torch.testing.assert_close(model(images), before, rtol=0, atol=0)


def test_untraceable_models_are_explained() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.bn(x) if x.sum() > 0 else x

    with pytest.raises(ValueError, match=r"torch.fx cannot trace the model \(TraceError"):
        inference.fold_batch_norms(Branches())


def _pickled(model: nn.Module) -> Callable[..., Any]:
    return pickle.loads(pickle.dumps(model))


def _scripted(model: nn.Module) -> Callable[..., Any]:
    return torch.jit.script(model)


def _exported(model: nn.Module) -> Callable[..., Any]:
    dims = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    return torch.export.export(model, (images(2, 96, 80),), dynamic_shapes=(dims,)).module()


def _compiled(model: nn.Module) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)


@pytest.mark.parametrize(
    "through", [_pickled, _scripted, *(pytest.param(way, marks=pytest.mark.long) for way in (_exported, _compiled))]
)
def test_optimized_models_can_be_pickled_scripted_exported_and_compiled(
    through: Callable[[nn.Module], Callable[..., Any]], small_tiles: None
) -> None:
    model = stvit.optimize_for_inference(create(ls_init_values=0.1))
    other = through(model)
    with torch.no_grad():
        for batch, *size in SIZES:
            assert_same(other(images(batch, *size)), model(images(batch, *size)))


def test_optimized_models_return_features_and_gradients(small_tiles: None) -> None:
    model = create()
    optimized = stvit.optimize_for_inference(model)
    x = images(2, 64, 64)
    with torch.no_grad():
        final, maps = optimized.forward_intermediates(x)
        assert_same([final, *maps], [model.forward_features(x), *model.forward_intermediates(x)[1]])
    gradients = []
    for net in (optimized, model):  # gradients of the image, as in saliency maps
        x = images(2, 64, 64).requires_grad_()
        net(x).square().sum().backward()
        gradients.append(x.grad)
    assert_same(*gradients)


# The plain model


class Allocations(TorchDispatchMode):
    """Records the largest tensor and all copies, including those of the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.copied: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes() // max(x.element_size(), 1))
        if func in (torch.ops.aten.clone.default, torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default):
            self.copied.append(out.numel())
        return out


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("given", [torch.contiguous_format, torch.channels_last])
def test_channels_last_between_all_layers(in_chans: int, given: torch.memory_format) -> None:
    model = create(in_chans=in_chans)
    seen = []

    def look(module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        seen.append(module)
        for x in (*inputs, output):
            assert x.is_contiguous(memory_format=torch.channels_last), module

    for module in model.modules():
        if isinstance(module, (STViTBlock, nn.Conv2d, nn.LayerNorm, nn.BatchNorm2d)) and module not in list(model.stem):
            module.register_forward_hook(look)
    with torch.no_grad():
        model(images(2, 96, 64, in_chans=in_chans).to(memory_format=given))
    assert sum(isinstance(module, STViTBlock) for module in seen) == 4


def test_no_layout_copy() -> None:
    """A block whose tokens are single pixels copies no tensor."""
    block = create().stages[3].blocks[0]
    x = torch.randn(2, 64, 12, 12).to(memory_format=torch.channels_last)
    with torch.no_grad(), Allocations() as seen:
        block(x)
    assert seen.copied == []


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("given", [torch.contiguous_format, torch.channels_last])
def test_no_attention_matrix_is_allocated(training: bool, given: torch.memory_format) -> None:
    attention = stvit.SuperTokenAttention(64, stoken_size=1, num_heads=2).train(training)
    x = torch.randn(1, 64, 48, 48).to(memory_format=given).requires_grad_(training)
    with Allocations() as seen:
        out = attention(x)
        if training:
            out.sum().backward()
    tokens = 48 * 48
    assert seen.largest <= 4 * 64 * tokens < 2 * tokens**2


def test_tiles_never_hold_the_whole_hidden_map(small_tiles: None) -> None:
    model = create()
    x = torch.randn(1, 32, 64, 64).to(memory_format=torch.channels_last)
    with torch.no_grad():
        with Allocations() as plain:
            model.stages[0].blocks[0](x)
        block = stvit.optimize_for_inference(model).stages[0].blocks[0]
        with Allocations() as tiled:
            block(x)
    assert plain.largest >= 4 * x.numel()
    assert tiled.largest <= 2 * x.numel()


# Compilation: the tests count graphs, because timings vary


class Graphs:
    """A torch.compile backend that counts the graphs it compiles, forward and backward."""

    def __init__(self) -> None:
        self.count = 0
        self.backend = "aot_eager"

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.count += 1
        return torch._dynamo.lookup_backend(self.backend)(graph, inputs)


@pytest.fixture
def graphs() -> Graphs:
    torch._dynamo.reset()
    return Graphs()


@pytest.mark.parametrize("optimized", [True, pytest.param(False, marks=pytest.mark.long)])
def test_one_graph_for_marked_batch_sizes(optimized: bool, graphs: Graphs) -> None:
    model = stvit.optimize_for_inference(create()) if optimized else create()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    with torch.no_grad():
        for batch in (2, 3, 5, 8):
            x = images(batch, 64, 64)
            torch._dynamo.mark_dynamic(x, 0)
            assert_same(compiled(x), model(x))
    assert graphs.count == 1


@pytest.mark.long
def test_two_graphs_for_unmarked_batch_sizes(graphs: Graphs) -> None:
    """One graph for the first batch size, and one for all others."""
    model = stvit.optimize_for_inference(create())
    graphs.backend = "eager"
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    with torch.no_grad():
        for batch in (2, 3, 5, 8):
            compiled(images(batch, 64, 64))
    assert graphs.count == 2


@needs_newer_torch
@pytest.mark.long
@pytest.mark.parametrize("optimized", [True, False])
def test_one_graph_for_image_sizes(optimized: bool, graphs: Graphs) -> None:
    """If the first image is square, torch.compile assumes that all are and needs a second graph."""
    model = stvit.optimize_for_inference(create()) if optimized else create()
    graphs.backend = "eager"  # later stages do not depend on the sizes
    compiled = torch.compile(model, backend=graphs, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for batch, *size in ((2, 96, 64), (3, 64, 64), (2, 75, 130)):
            x = images(batch, *size)
            assert_same(compiled(x), model(x))
    assert graphs.count == 1


def test_other_models_run_while_one_is_optimized() -> None:
    """While it traces, torch.fx replaces `nn.Module.__call__`, but other threads keep calling and optimizing models."""
    inside, go_on = threading.Event(), threading.Event()

    class Stopping(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if threading.current_thread() is threads[0]:
                inside.set()
                assert go_on.wait(60)
            return super().forward(x)

    model, x = create(), images(1, 64, 96)
    nets = [Stopping(create(), nn.Identity()).eval() for _ in range(2)]
    expected = model(x)
    results: dict[int, nn.Module] = {}

    def work(i: int) -> None:
        results[i] = stvit.optimize_for_inference(nets[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    try:
        threads[0].start()
        assert inside.wait(60)
        torch.testing.assert_close(model(x), expected)
        threads[1].start()
        threads[1].join(0.3)  # waits for the first: two tracers at a time would restore each other's patches
    finally:
        go_on.set()
        for thread in filter(threading.Thread.is_alive, threads):
            thread.join()
    for i in range(2):
        assert_same(results[i](x), nets[i](x))
    assert nn.Module.__call__.__qualname__ == "Module._wrapped_call_impl"

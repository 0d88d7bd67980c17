"""Compares the fused layers with plain PyTorch in float64, and tests when they are used.

Without a GPU, Triton interprets the kernels. With a GPU, all tests run natively, and `make test-gpu` selects them.
"""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn.utils import parametrizations, prune

import stvit
from stvit.inference import OptimizedBlock, OptimizedStem
from stvit.ops import layers
from stvit.ops.triton import add_super_tokens
from stvit.stvit import ConvMlp, ResidualDepthwiseConv, STViTBlock

pytest.importorskip("triton")

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
pytestmark = [pytest.mark.usefixtures("interpreter"), *([pytest.mark.gpu] if HAS_GPU else [])]

# A few times the rounding error of each dtype.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}
each_dtype = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)

# Batch, channels, height, width: odd sizes, one pixel, single rows and columns, channels that are no power of two or
# fill several blocks, several strips below each other.
SHAPES = [(2, 24, 7, 9), (1, 3, 1, 1), (2, 33, 1, 6), (1, 150, 5, 3), (1, 20, 70, 2)]


def cases() -> Iterator[Any]:
    """Yields each shape with each dtype.

    `make test` interprets each shape with one of them.
    """
    for i, shape in enumerate(SHAPES):
        for j, dtype in enumerate(TOLERANCES):
            marks = [] if HAS_GPU or i % 3 == j else [pytest.mark.long]
            yield pytest.param(shape, dtype, marks=marks, id=f"{shape}-{dtype}")


each_case = pytest.mark.parametrize(("shape", "dtype"), list(cases()))


def draw(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    x = (torch.randn(*shape, device=DEVICE) * scale).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x


def error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    assert actual.shape == exact.shape
    return float((actual.detach().double() - exact.detach().double()).norm() / exact.double().norm().clamp_min(1e-12))


def compare(
    function: Callable[..., Any], reference: Callable[..., Any], inputs: list[torch.Tensor], tolerance: float
) -> None:
    """Compares the outputs, and the gradients of all inputs, with those of the reference in float64."""
    results: list[list[torch.Tensor]] = []
    for run, dtype in ((function, None), (reference, torch.float64)):
        leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
        outputs = run(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if not results:
            grads = [torch.randn_like(output) for output in outputs]
        gradients = torch.autograd.grad(outputs, leaves, [grads[i].to(y.dtype) for i, y in enumerate(outputs)])
        results.append([*outputs, *gradients])
    for i, (actual, exact) in enumerate(zip(*results, strict=True)):
        assert error(actual, exact) <= tolerance, (i, error(actual, exact))  # fails for NaN


@each_case
@pytest.mark.parametrize("has_gelu", [False, True])
@pytest.mark.usefixtures("poison")
def test_depthwise(shape: tuple[int, ...], has_gelu: bool, dtype: torch.dtype) -> None:
    C = shape[1]
    inputs = [draw(*shape, dtype=dtype), draw(C, 1, 3, 3), draw(C)]
    compare(
        partial(layers.depthwise, has_gelu=has_gelu),
        partial(layers.depthwise_reference, has_gelu=has_gelu),
        inputs,
        TOLERANCES[dtype],
    )


@each_case
@pytest.mark.usefixtures("poison")
def test_depthwise_and_normalization(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    C = max(shape[1], 16)  # the normalization of three numbers would amplify rounding errors
    shape = (shape[0], C, *shape[2:])
    inputs = [draw(*shape, dtype=dtype), draw(C, 1, 3, 3), draw(C), draw(C), draw(C)]

    def reference(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, nw: torch.Tensor, nb: torch.Tensor) -> Any:
        y = x + F.conv2d(x, w, b, padding=1, groups=C)
        return y, F.layer_norm(y.permute(0, 2, 3, 1), (C,), nw, nb, 1e-6).permute(0, 3, 1, 2)

    compare(partial(layers.depthwise_norm, eps=1e-6), reference, inputs, TOLERANCES[dtype])


@each_case
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.usefixtures("poison")
def test_mlp(shape: tuple[int, ...], has_bias: bool, dtype: torch.dtype) -> None:
    C, D = shape[1], 2 * shape[1]
    w1, w2 = draw(D, C, dtype=dtype, scale=C**-0.5), draw(C, D, dtype=dtype, scale=D**-0.5)
    x, w, b = draw(*shape, dtype=dtype), draw(D, 1, 3, 3, scale=0.3), draw(D)
    if has_bias:
        compare(layers.mlp, layers.mlp_reference, [x, w1, draw(D), w, b, w2, draw(C)], TOLERANCES[dtype])
    else:
        compare(
            lambda x, w1, w, b, w2: layers.mlp(x, w1, None, w, b, w2, None),
            lambda x, w1, w, b, w2: layers.mlp_reference(x, w1, None, w, b, w2, None),
            [x, w1, w, b, w2],
            TOLERANCES[dtype],
        )


@each_case
@pytest.mark.usefixtures("poison")
def test_activate(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = [draw(*shape, dtype=dtype), draw(shape[1])]
    compare(layers.activate, lambda x, b: F.gelu(x + b[:, None, None]), inputs, TOLERANCES[dtype])


@each_dtype
def test_adding_super_tokens(dtype: torch.dtype) -> None:
    residual, tokens = draw(2, 24, 7, 9, dtype=dtype), draw(2, 24, 3, 3, dtype=dtype)
    association = torch.rand(2, 9, 7, 9, device=DEVICE).to(dtype)
    scale = torch.tensor([0.0, 1.25], device=DEVICE, dtype=dtype)
    for factor in (None, scale):

        def reference(residual: torch.Tensor, tokens: torch.Tensor, factor: Any = factor) -> torch.Tensor:
            y = stvit.upsample_super_tokens(tokens, association.double(), (3, 3), "reference")
            return residual + (y if factor is None else y * factor.double()[:, None, None, None])

        compare(
            lambda residual, tokens, factor=factor: add_super_tokens(residual, tokens, association, (3, 3), factor),
            reference,
            [residual, tokens],
            TOLERANCES[dtype],
        )


@pytest.mark.parametrize("stoken_size", [(2, 2), (1, 1)])
def test_vectors_of_any_strides(stoken_size: tuple[int, int]) -> None:
    """Vectors are columns of a matrix, or one number for all channels."""
    block = STViTBlock(16, 2, stoken_size).to(DEVICE)
    x = draw(1, 16, 6, 6)
    # PyTorch's own batch normalization (norm2) returns wrong gradients for such weights, at least on CPUs.
    names = [name for name, p in block.named_parameters() if p.dim() == 1 and not name.startswith("norm2")]
    assert block.why_not_fused(x) == "" and len(names) > 6
    for make in (lambda p: draw(len(p), 2)[:, 1], lambda p: draw(1).expand(len(p))):
        strided = {name: make(block.get_parameter(name)).requires_grad_() for name in names}
        dense = {name: value.detach().clone().contiguous().requires_grad_() for name, value in strided.items()}
        results = []
        for parameters in (strided, dense):
            y = torch.func.functional_call(block, parameters, (x,))
            results.append([y, *torch.autograd.grad(y.square().sum(), list(parameters.values()))])
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_fast_gelu_is_as_exact_as_16_bits() -> None:
    """The approximation is far more exact than float16, from the middle of the curve to its tails."""
    x = torch.linspace(-12, 12, 4096, device=DEVICE).half().reshape(1, 1, 64, 64)
    exact = F.gelu(x.double())
    y = layers.activate(x, torch.zeros(1, device=DEVICE)).double()
    assert ((y - exact).abs() <= exact.abs() * 2**-11 + 5e-6).all()


def test_second_derivatives() -> None:
    C, D = 6, 12
    inputs = [draw(1, C, 3, 4), draw(D, C), draw(D), draw(D, 1, 3, 3), draw(D), draw(C, D), draw(C)]
    results = []
    for function, dtype in ((layers.mlp, None), (layers.mlp_reference, torch.float64)):
        leaves = [x.to(dtype or x.dtype).requires_grad_() for x in inputs]
        first = torch.autograd.grad(function(*leaves).square().sum(), leaves, create_graph=True)
        results.append(torch.autograd.grad(sum(grad.square().sum() for grad in first), leaves))
    for actual, exact in zip(*results, strict=True):
        assert error(actual, exact) <= 1e-5


def test_two_runs_are_equal() -> None:
    C, D = 8, 32
    inputs = [draw(2, C, 9, 9), draw(D, C), draw(D), draw(D, 1, 3, 3), draw(D), draw(C, D), draw(C)]
    leaves = [x.requires_grad_() for x in inputs]
    first, second = (torch.autograd.grad(layers.mlp(*leaves).square().sum(), leaves) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def operators() -> Iterator[tuple[Any, tuple[Any, ...]]]:
    def leaf(*shape: int) -> torch.Tensor:
        return draw(*shape).requires_grad_()

    yield layers._depthwise, (leaf(2, 6, 5, 4), leaf(6, 1, 3, 3), leaf(6), True)
    yield layers._depthwise_norm, (leaf(2, 6, 5, 4), leaf(6, 1, 3, 3), leaf(6), leaf(6), leaf(6), 1e-6)
    yield (
        layers._mlp,
        (leaf(2, 6, 5, 4), leaf(12, 6), leaf(12), leaf(12, 1, 3, 3), leaf(12), leaf(6, 12), leaf(6)),
    )
    yield layers._activate, (leaf(2, 6, 5, 4), leaf(6))


@pytest.mark.parametrize("case", range(4))
def test_opcheck(case: int) -> None:
    operator, arguments = list(operators())[case]
    assert set(torch.library.opcheck(operator, arguments).values()) == {"SUCCESS"}


# The model


def make_model(**kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """Returns a model with random statistics that runs the kernels, and a float64 copy that runs the reference."""
    torch.manual_seed(0)
    model = timm.create_model("test_stvit", num_classes=5, **kwargs)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
        for parameter in module.parameters(recurse=False):
            if parameter.ndim == 1:
                nn.init.normal_(parameter, 0.5, 0.3)
    exact = copy.deepcopy(model).double()
    for module in exact.modules():
        if hasattr(module, "backend"):
            module.backend = "reference"  # type: ignore[assignment]
    return model.to(DEVICE), exact.to(DEVICE)


def count(run: Callable[[], Any]) -> dict[str, int]:
    """Returns how often each operator of this package runs."""
    from torch.utils._python_dispatch import TorchDispatchMode

    counts: dict[str, int] = {}

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = str(func)
            if name.startswith("stvit."):
                counts[name.split(".")[1]] = counts.get(name.split(".")[1], 0) + 1
            return func(*args, **(kwargs or {}))

    with Count():
        run()
    return counts


def test_backend_of_a_model_reaches_every_layer() -> None:
    model = timm.create_model("test_stvit", backend="reference").eval()
    for net in (model, stvit.optimize_for_inference(model)):
        with torch.no_grad():
            assert count(lambda net=net: net(draw(1, 3, 40, 24))) == {}


@pytest.mark.long
@pytest.mark.timeout(300)
def test_training_step() -> None:
    """Outputs and gradients agree with the reference, with the same random stochastic depth."""
    model, _ = make_model(drop_path_rate=0.4)
    plain = copy.deepcopy(model)  # in float32, because random numbers depend on the dtype
    for module in plain.modules():
        if hasattr(module, "backend"):
            module.backend = "reference"  # type: ignore[assignment]
    x = draw(2, 3, 40, 24)

    def step(net: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
        torch.manual_seed(1)
        y = net.train()(x)
        y.square().sum().backward()
        return y, {name: p.grad for name, p in net.named_parameters()}

    results = [step(plain)]
    counts = count(lambda: results.append(step(model)))
    (expected, expected_gradients), (y, gradients) = results
    assert error(y, expected) < 1e-5
    for name, gradient in gradients.items():
        difference = (gradient - expected_gradients[name]).norm()
        assert difference < 3e-4 * (expected_gradients[name].norm() + 0.1), name  # some biases have almost no gradient
    assert counts == {
        "activate": 4,
        "activate_backward": 4,
        "depthwise_norm": 4,
        "norm_backward": 4,
        "depthwise_backward": 4,
        "mlp": 4,
        "mlp_backward": 4,
        "associate_and_aggregate": 2,
        "upsample_add": 2,
        "aggregate": 2,
        "upsample": 2,
    }


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, pytest.param(torch.float16, marks=[] if HAS_GPU else pytest.mark.long)],
    ids=str,
)
def test_autocast(dtype: torch.dtype) -> None:
    model, exact = make_model()
    x = draw(2, 3, 32, 16)
    expected = exact.eval()(x.double())
    model.eval()
    with torch.autocast(DEVICE, dtype):
        fused = model(x)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("STVIT_OPS_BACKEND", "reference")
            plain = model(x)
    assert error(fused, expected) <= 1.5 * error(plain, expected) + 1e-4
    with torch.autocast(DEVICE, dtype):
        model.train()(x).float().square().sum().backward()
    # PyTorch's convolutions in bfloat16 on a CPU read memory that was not written, for maps of one pixel.
    assert all(p.grad.isfinite().all() for name, p in model.named_parameters() if ".blocks." in name)


def make_mlp() -> tuple[ConvMlp, torch.Tensor]:
    torch.manual_seed(0)
    return ConvMlp(8, 16).to(DEVICE), draw(1, 8, 4, 4)


def add_hook(mlp: ConvMlp) -> None:
    mlp.conv.conv.register_forward_hook(lambda module, args, output: output * 2)


def add_backward_hook(mlp: ConvMlp) -> None:
    mlp.act.register_full_backward_hook(lambda module, grad_in, grad_out: (grad_in[0] * 2,))


def add_pruning(mlp: ConvMlp) -> None:
    prune.l1_unstructured(mlp.fc1, "weight", 0.5)


def add_weight_norm(mlp: ConvMlp) -> None:
    parametrizations.weight_norm(mlp.conv.conv)


def add_adapter(mlp: ConvMlp) -> None:
    class Adapter(nn.Module):
        def __init__(self, conv: nn.Conv2d) -> None:
            super().__init__()
            self.conv, self.low = conv, nn.Conv2d(conv.in_channels, conv.out_channels, 1, device=DEVICE)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x) + self.low(x)

    mlp.fc2 = Adapter(mlp.fc2)  # type: ignore[assignment]


def add_subclass(mlp: ConvMlp) -> None:
    class Scaled(nn.GELU):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    mlp.act.act = Scaled()


def add_tanh(mlp: ConvMlp) -> None:
    mlp.act.act = nn.GELU("tanh")


def add_dropout(mlp: ConvMlp) -> None:
    mlp.drop1.p = 0.5


def add_dilation(mlp: ConvMlp) -> None:
    mlp.conv = ResidualDepthwiseConv(16, dilation=2).to(DEVICE)


def patch_forward(mlp: ConvMlp) -> None:
    forward = mlp.fc1.forward
    mlp.fc1.forward = lambda input: forward(input) * 2


CHANGES = [
    add_hook,
    add_backward_hook,
    add_pruning,
    add_weight_norm,
    add_adapter,
    add_subclass,
    add_tanh,
    add_dropout,
    add_dilation,
    patch_forward,
]


@pytest.mark.parametrize("change", CHANGES)
def test_layers_that_are_not_plain_are_called_one_by_one(change: Callable[[ConvMlp], None]) -> None:
    mlp, x = make_mlp()
    x.requires_grad_()
    assert mlp.train().why_not_fused(x) == ""
    change(mlp)
    assert mlp.why_not_fused(x) != ""
    results = []
    for backend in ("auto", "reference"):
        mlp.conv.backend = backend
        torch.manual_seed(0)
        y = mlp(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), [x, *mlp.parameters()])))
    for actual, expected in zip(*results, strict=True):
        assert error(actual, expected) < 1e-5


def test_global_hooks_are_called() -> None:
    mlp, x = make_mlp()
    seen: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, y: seen.append(type(m).__name__))
    try:
        assert mlp.why_not_fused(x) != ""
        mlp(x)
    finally:
        handle.remove()
    assert seen.count("Conv2d") == 3


@pytest.mark.parametrize("name", ["cpe", "norm1", "attn", "ls1", "drop_path1", "cpe.conv"])
def test_hooks_in_a_block(name: str) -> None:
    torch.manual_seed(0)
    block = STViTBlock(16, 2, stoken_size=3, drop_path=0.1).to(DEVICE)
    x = draw(2, 16, 7, 5)
    fused = block.eval()(x)
    seen: list[torch.Tensor] = []
    block.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append(output))
    assert error(block(x), fused) < 1e-5
    assert len(seen) == 1


def test_reasons() -> None:
    mlp, x = make_mlp()
    assert mlp.why_not_fused(x) == ""
    assert "float64" in mlp.double().why_not_fused(x.double())
    assert "parameter has the dtype" in mlp.why_not_fused(x)
    mlp.float().conv.backend = "reference"
    assert "reference" in mlp.why_not_fused(x)
    block = STViTBlock(16, 2).to(DEVICE)
    x = draw(1, 16, 4, 4)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert "autocast" in block.why_not_fused(x)  # the residual would be rounded
    assert block.why_not_fused(x) == ""
    assert "shape" in block.why_not_fused(x[:0])


def test_the_meta_device_uses_plain_layers() -> None:
    """PyTorch raises an error if it is asked whether autocast is on for the device "meta"."""
    model = timm.create_model("test_stvit", device="meta").eval()
    assert model(torch.randn(1, 3, 32, 32, device="meta")).shape == (1, 1000)
    optimized = stvit.optimize_for_inference(make_model()[0].eval()).to("meta")
    with torch.no_grad():
        assert optimized(torch.randn(1, 3, 32, 32, device="meta")).shape == (1, 5)


def test_transforms_use_plain_layers() -> None:
    mlp, _ = make_mlp()
    parameters = {name: p.detach() for name, p in mlp.named_parameters()}

    def loss(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(mlp, parameters, (x[None],)).square().sum()

    images = draw(3, 8, 4, 4)
    per_image = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, images)
    mlp(images).square().sum().backward()
    for name, p in mlp.named_parameters():
        assert error(per_image[name].sum(0), p.grad) < 1e-5


@pytest.mark.timeout(300)
@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.long)])
def test_compiled_graphs_contain_the_operators(dynamic: bool) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    block = STViTBlock(16, 2, stoken_size=3).to(DEVICE).train()
    plain = copy.deepcopy(block)
    for module in plain.modules():
        if hasattr(module, "backend"):
            module.backend = "reference"  # type: ignore[assignment]
    seen: list[str] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        seen.extend(str(node.target).split(".")[1] for node in graph.graph.nodes if "stvit." in str(node.target))
        return make_boxed_func(graph.forward)

    compiled = torch.compile(
        block, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep), fullgraph=True, dynamic=dynamic
    )
    for i, batch in enumerate((2, 3, 4)):
        x = draw(batch, 16, 7, 8)
        with torch.compiler.set_stance("fail_on_recompile" if dynamic and i > 0 else "default"):
            gradients = []
            for net in (compiled, plain):
                leaf = x.clone().requires_grad_()
                net.zero_grad()
                net(leaf).square().sum().backward()
                gradients.append([leaf.grad, *(p.grad for p in net.parameters())])
        for actual, expected in zip(*gradients, strict=True):
            assert (actual - expected).norm() < 1e-4 * (expected.norm() + 1e-2)
        if not dynamic:
            break
    assert {"depthwise_norm", "mlp", "upsample_add", "mlp_backward", "norm_backward"} <= set(seen)


# The optimized copy


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float32, marks=[] if HAS_GPU else pytest.mark.long),
        torch.bfloat16,
        pytest.param(torch.float16, marks=[] if HAS_GPU else pytest.mark.long),
    ],
    ids=str,
)
def test_optimized_copy(dtype: torch.dtype) -> None:
    model, exact = make_model(ls_init_values=0.5)
    x = draw(1, 3, 40, 24)
    expected = exact.eval()(x.double())
    model = model.eval().to(dtype)
    optimized = stvit.optimize_for_inference(model)
    assert isinstance(optimized.stem, OptimizedStem)
    assert all(isinstance(stage.blocks[0], OptimizedBlock) for stage in optimized.stages)
    with torch.no_grad():
        plain = error(model(x.to(dtype)), expected)
        y = optimized(x.to(dtype))
        assert error(y, expected) <= 2 * plain + 1e-6
        assert torch.equal(optimized(x.to(dtype)), y)
        assert torch.equal(copy.deepcopy(optimized)(x.to(dtype)), y)
        for stage in optimized.stages:
            block = stage.blocks[0]
            assert block.why_not_in_place(draw(1, block.shift.numel(), 5, 6, dtype=dtype)) == ""


def test_optimized_copy_does_not_change_its_input() -> None:
    optimized = stvit.optimize_for_inference(make_model()[0].eval())
    block = optimized.stages[2].blocks[0]
    x = draw(2, block.shift.numel(), 5, 6)
    before = x.clone()
    with torch.no_grad():
        block(x)
    assert torch.equal(x, before)


def test_optimized_copy_notices_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hook, a replaced layer, a cast and another backend are noticed after the first call, also in a copy."""
    calls: list[int] = []
    add_in_place = OptimizedBlock._in_place

    def count(self: OptimizedBlock, x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return add_in_place(self, x)

    monkeypatch.setattr(OptimizedBlock, "_in_place", count)
    optimized = copy.deepcopy(stvit.optimize_for_inference(make_model()[0].eval()))
    block = optimized.stages[0].blocks[0]
    x = draw(1, block.shift.numel(), 5, 6)
    with torch.no_grad():
        expected = block(x)
        assert torch.equal(block(x), expected)
        seen: list[torch.Tensor] = []
        handle = block.mlp.fc1.register_forward_hook(lambda module, args, output: seen.append(output))
        assert error(block(x), expected) < 1e-5
        assert len(seen) == 1
        handle.remove()
        assert torch.equal(block(x), expected)
        assert len(seen) == 1
        half = copy.deepcopy(block).bfloat16()
        assert error(half(x.bfloat16()), expected) < 0.05
        block.mlp.act.act = nn.Identity()
        assert error(block(x), expected) > 1e-3
        block.mlp.act.act = nn.GELU()
        assert torch.equal(block(x), expected)
        for module in (block.attn, block.cpe):
            module.backend = "reference"
            assert "reference" in block.why_not_in_place(x)
            launched = calls.copy()
            assert error(block(x), expected) < 1e-5
            assert calls == launched
            module.backend = "auto"
            assert torch.equal(block(x), expected)
            assert calls != launched
        block.attn.fused_attn = False
        assert error(block(x), expected) < 1e-5


@pytest.mark.long
def test_optimized_copy_in_other_situations() -> None:
    """Gradients, autocast, hooks and compilation use other code with the same result."""
    model, exact = make_model()
    optimized = stvit.optimize_for_inference(model.eval())
    x = draw(1, 3, 40, 24)
    expected = exact.eval()(x.double())
    leaf = x.clone().requires_grad_()
    y = optimized(leaf)
    assert error(y, expected) < 1e-5
    (gradient,) = torch.autograd.grad(y.sum(), leaf)
    double = x.double().requires_grad_()
    assert error(gradient, torch.autograd.grad(exact(double).sum(), double)[0]) < 1e-4
    block = optimized.stages[0].blocks[0]
    features = draw(1, block.shift.numel(), 5, 6)
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        assert "autocast" in block.why_not_in_place(features)
        assert error(optimized(x), expected) < 0.05
    seen: list[torch.Tensor] = []
    block.attn.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        assert block.why_not_in_place(features) != ""
        assert error(optimized(x), expected) < 1e-5
    assert len(seen) == 1

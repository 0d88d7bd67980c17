"""Compares the Triton kernels with the reference in float64, and tests the choice of the backend.

Without a GPU, Triton interprets the kernels and compiles them for GPUs of five generations.
With a GPU, all tests run natively. `make test-gpu` selects those marked `gpu`. They cover each kernel in each dtype,
with two and four cells per tile side and with one and several blocks of channels.
"""

import copy
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import stvit
from stvit.ops import (
    SuperTokenAttention,
    backends,
    can_run_triton,
    reference,
    sample_super_tokens,
    upsample_super_tokens,
)
from stvit.ops import triton as backend
from stvit.tools.benchmarks import kernels as benchmark_of_kernels
from tests.conftest import run_without_interpreter as run

pytest.importorskip("triton")

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
pytestmark = pytest.mark.usefixtures("interpreter")

# Marks a test that `-m gpu` selects where there is a GPU. Without a GPU the test runs in `make test`, interpreted.
also_on_gpu: Callable[[Any], Any] = pytest.mark.gpu if HAS_GPU else lambda test: test

# A few times the rounding error of each dtype. Hardware rounds bfloat16, the interpreter truncates: twice the error.
TOLERANCES = {torch.float32: 5e-6, torch.bfloat16: 1e-2 if HAS_GPU else 2e-2, torch.float16: 1.5e-3}

# Channels, map size and cell size: even division, primes, partial cells and tiles, one pixel, less than one cell,
# rectangular cells, cells of one pixel. The channels fill one block, part of a block, or several blocks.
SHAPES = [
    (64, (24, 32), (8, 8)),
    (128, (8, 12), (4, 4)),
    (5, (13, 7), (3, 3)),
    (96, (11, 5), (2, 3)),
    (1, (1, 1), (1, 1)),
    (16, (1, 1), (4, 2)),
    (33, (3, 5), (8, 8)),
    (20, (7, 2), (1, 5)),
    (7, (5, 7), (1, 1)),
    (31, (23, 19), (7, 5)),
    (150, (11, 9), (4, 4)),
    (260, (5, 9), (3, 7)),
    (24, (25, 41), (20, 37)),
    (140, (7, 8), (2, 3)),
]
# Each kind of kernel once, because compilation takes most of the time on a GPU: four and two cells per tile side, with
# one and with several blocks of channels.
SHAPES_ON_GPU = [(5, (13, 7), (3, 3)), (140, (7, 8), (2, 3)), (31, (23, 19), (7, 5)), (260, (5, 9), (3, 7))]
LARGE = [  # dtypes, batch, channels, map size, cell size; the first two are stages 1 and 2 of stvit_small
    (("float32", "bfloat16", "float16"), 128, 64, (56, 56), (8, 8)),
    (("float32", "bfloat16", "float16"), 128, 128, (28, 28), (4, 4)),
    (("bfloat16",), 16, 64, (160, 160), (8, 8)),
    (("bfloat16",), 16, 128, (80, 80), (4, 4)),
    (("float32", "bfloat16"), 3, 192, (317, 211), (8, 8)),
    (("float16",), 1, 64, (1031, 997), (16, 16)),
]


@pytest.fixture
def seed() -> int:
    """Sets a random seed and prints it. Pytest shows it when a test fails."""
    seed = torch.seed() % 2**32
    print(f"torch.manual_seed({seed})")
    torch.manual_seed(seed)
    return seed


def kernels() -> ModuleType:
    """Imports the kernels, after the fixture `interpreter` has set the environment."""
    from stvit.ops import kernels

    return kernels


def contiguous(x: torch.Tensor) -> torch.Tensor:
    return x


def channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def cut_out(x: torch.Tensor) -> torch.Tensor:
    """Returns a view that is not dense along any axis."""
    wide = x.new_full((x.shape[0], 2 * x.shape[1], x.shape[2] + 3, 2 * x.shape[3]), 7.0)
    view = wide[:, ::2, 1:-2, 1::2]
    view.copy_(x)
    return view


def differentiate(
    functions: ModuleType, x: torch.Tensor, stoken_size: tuple[int, int], n_iter: int, given: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Returns outputs and gradients of both functions.

    Other inputs are drawn on first use and stored in `given`.
    """

    def draw(name: str, shape: torch.Size) -> torch.Tensor:
        if name not in given:
            given[name] = torch.randn(shape, device=x.device).to(x.dtype)
        return given[name].to(x)

    x = x.requires_grad_()
    tokens, association = functions.sample_super_tokens(x, stoken_size, n_iter)
    (grad_x,) = torch.autograd.grad(tokens, x, draw("grad_tokens", tokens.shape))
    assert not association.requires_grad
    refined = draw("refined", tokens.shape).requires_grad_()
    mix = draw("mix", association.shape).requires_grad_()
    y = functions.upsample_super_tokens(refined, mix, stoken_size)
    grad_refined, grad_mix = torch.autograd.grad(y, (refined, mix), draw("grad_y", y.shape))
    return {
        "tokens": tokens.detach(),
        "association": association,
        "grad_x": grad_x,
        "y": y.detach(),
        "grad_refined": grad_refined,
        "grad_mix": grad_mix,
    }


def assert_close(actual: dict[str, torch.Tensor], exact: dict[str, torch.Tensor], tolerance: float) -> None:
    assert actual.keys() == exact.keys()
    for name, expected in exact.items():
        assert actual[name].shape == expected.shape, name
        error = (actual[name].double() - expected).norm() / expected.norm()
        assert error <= tolerance, f"{name}: {error:.1e}"  # fails for NaN


def check(x: torch.Tensor, stoken_size: tuple[int, int], n_iter: int) -> None:
    given: dict[str, torch.Tensor] = {}
    actual = differentiate(backend, x, stoken_size, n_iter, given)
    assert {value.dtype for value in actual.values()} == {x.dtype}
    exact = differentiate(reference, x.detach().double(), stoken_size, n_iter, given)
    assert_close(actual, exact, TOLERANCES[x.dtype])


# The kernels


def parity_cases() -> Iterator[Any]:
    """Yields each shape with each dtype and memory format.

    `make test` takes each shape with one of the dtypes.
    """
    for number, (dim, size, stoken_size) in enumerate(SHAPES):
        for i, dtype in enumerate(TOLERANCES):
            for n_iter, strided in ((1, channels_last), (2, contiguous), (3, cut_out)):
                if HAS_GPU:
                    is_selected = n_iter == i + 1 and (dim, size, stoken_size) in SHAPES_ON_GPU
                    marks = [pytest.mark.gpu] if is_selected else []
                else:
                    is_selected = n_iter == i + 1 and number % 3 == i
                    marks = [] if is_selected else [pytest.mark.long]
                sizes = "-".join(f"{height}x{width}" for height, width in (size, stoken_size))
                name = f"{dim}-{sizes}-{dtype}-{n_iter}-{strided.__name__}"
                yield pytest.param(dim, size, stoken_size, dtype, n_iter, strided, marks=marks, id=name)


@pytest.mark.parametrize(("dim", "size", "stoken_size", "dtype", "n_iter", "strided"), parity_cases())
def test_parity(
    dim: int,
    size: tuple[int, int],
    stoken_size: tuple[int, int],
    dtype: torch.dtype,
    n_iter: int,
    strided: Callable[[torch.Tensor], torch.Tensor],
    poison: None,
    seed: int,
) -> None:
    check(strided(torch.randn(2, dim, *size, device=DEVICE).to(dtype)), stoken_size, n_iter)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "batch", "dim", "size", "stoken_size"), [(name, *shape) for names, *shape in LARGE for name in names]
)
def test_parity_of_large_shapes(
    dtype: str, batch: int, dim: int, size: tuple[int, int], stoken_size: tuple[int, int], poison: None, seed: int
) -> None:
    x = torch.randn(batch, dim, *size, device="cuda").to(getattr(torch, dtype))
    check(channels_last(x), stoken_size, n_iter=1)


@also_on_gpu
@pytest.mark.parametrize(
    "dtype",
    [pytest.param(x, marks=[] if HAS_GPU or x == torch.bfloat16 else pytest.mark.long) for x in TOLERANCES],
    ids=str,
)
def test_two_runs_are_equal(dtype: torch.dtype) -> None:
    x = channels_last(torch.randn(2, 64, 19, 13, device=DEVICE).to(dtype))
    given: dict[str, torch.Tensor] = {}
    first = differentiate(backend, x, (4, 4), 2, given)
    for _ in range(5 if HAS_GPU else 1):
        second = differentiate(backend, x, (4, 4), 2, given)
        assert all(torch.equal(first[name], second[name]) for name in first)


@also_on_gpu
@pytest.mark.parametrize(("dim", "stoken_size", "size"), [(512, 8, 16), (16, 16, 48), (16, 40, 40)])
def test_float16_does_not_overflow(dim: int, stoken_size: int, size: int) -> None:
    x = 50 * torch.ones(1, dim, size, size, dtype=torch.float16, device=DEVICE)
    tokens, association = sample_super_tokens(x.requires_grad_(), stoken_size, 2, backend="triton")
    y = upsample_super_tokens(tokens, association, stoken_size, backend="triton")
    y.mean().backward()
    assert x.grad.isfinite().all() and association.isfinite().all()
    torch.testing.assert_close(tokens, torch.full_like(tokens, 50), rtol=2e-3, atol=0)
    torch.testing.assert_close(y, torch.full_like(y, 50), rtol=5e-3, atol=0)


def test_small_gradients_in_float16() -> None:
    """The backward pass divides by the weights of tokens.

    In float16, results below 6e-8 would be lost.
    """
    x = torch.randn(1, 16, 64, 64, device=DEVICE)
    v = 1e-4 * torch.randn(1, 16, 2, 2, device=DEVICE)
    grads: list[torch.Tensor] = []
    for functions, dtype in ((backend, torch.float16), (reference, torch.float64)):
        leaf = x.to(dtype).requires_grad_()
        tokens, _ = functions.sample_super_tokens(leaf, (32, 32), 1)
        grads += torch.autograd.grad(tokens, leaf, v.to(dtype))
    # The rounding error of a sum of the smallest float16 numbers.
    assert (grads[0].double() - grads[1]).abs().max() <= 2**-24


@also_on_gpu
def test_indices_of_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Needed for maps with 2^31 numbers per image, which are too large for a test."""
    import triton.language as tl

    huge = torch.empty(1, 64, 2**13, 2**13, device="meta")
    layouts = [kernels()._Layout.of(x) for x in (huge, huge[:, :31])]
    assert [kernels()._index(layout) for layout in layouts] == [tl.int64, tl.int32]
    used: list[Any] = []

    def index(*maps: Any) -> Any:
        used.extend(maps)
        return tl.int64

    monkeypatch.setattr(kernels(), "_index", index)
    check(torch.randn(2, 150, 17, 10, device=DEVICE), (4, 4), 2)  # no other test has prepared launches of this size
    assert used


@also_on_gpu
@pytest.mark.parametrize(("tokens_dtype", "dtype"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_upsampling_takes_two_dtypes(tokens_dtype: torch.dtype, dtype: torch.dtype) -> None:
    """The output has the dtype of the tokens. The association can have another dtype."""
    tokens = torch.randn(2, 20, 3, 4, device=DEVICE).to(tokens_dtype).requires_grad_()
    association = torch.rand(2, 9, 11, 13, device=DEVICE).to(dtype).requires_grad_()
    y = upsample_super_tokens(tokens, association, 4, backend="triton")
    exact = upsample_super_tokens(tokens.double(), association.double(), 4, backend="reference")
    v = torch.randn_like(y)
    actual = torch.autograd.grad(y, (tokens, association), v)
    expected = torch.autograd.grad(exact, (tokens, association), v.double())
    assert (y.dtype, actual[0].dtype, actual[1].dtype) == (tokens_dtype, tokens_dtype, dtype)
    results = dict(zip("ytai", (y.detach(), *actual), strict=False))
    assert_close(results, dict(zip("ytai", (exact.detach(), *expected), strict=False)), 2e-2)


class Allocations(TorchDispatchMode):
    """Records the size in bytes of each tensor that PyTorch allocates."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and not func.is_view:
            self.bytes.append(made.numel() * made.itemsize)
        return made


def test_no_large_tensor_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators allocate no padded or unfolded tensor, and the association has the dtype of the input."""
    # The interpreter would allocate copies.
    monkeypatch.setattr(kernels().Launch, "__call__", lambda self, *tensors: None)
    B, C, H, W, h = 2, 64, 39, 31, 8
    x = channels_last(torch.randn(B, C, H, W, device=DEVICE).to(torch.bfloat16))
    pixels, maps = 2 * B * C * H * W, 2 * 9 * B * H * W
    tokens_bytes = 2 * B * C * 5 * 4
    parts = 4 * B * (3 * 2) * 16 * (C + 1)  # 3x2 tiles of 16 slots in float32
    with Allocations() as sampled:
        tokens, association, weights = backend.associate_and_aggregate.__wrapped__(x, h, h, 1, x.dtype)
    assert association.dtype == torch.bfloat16
    assert sum(sampled.bytes) == maps + parts + 2 * tokens_bytes + 4 * weights.numel()
    with Allocations() as upsampled:
        backend.upsample.__wrapped__(tokens, association, weights, h, h, x.dtype)
    assert sum(upsampled.bytes) == pixels
    with Allocations() as aggregated:
        backend.aggregate.__wrapped__(x, association, None, h, h, x.dtype)
    assert sum(aggregated.bytes) == parts - 4 * B * 3 * 2 * 16 + tokens_bytes * 2  # without the weights of the tiles


@pytest.mark.parametrize(("dim", "size", "stoken_size"), [SHAPES[i] for i in (2, 3, 8, 11)])
def test_kernels_write_only_into_their_outputs(
    dim: int, size: tuple[int, int], stoken_size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checks the memory around each allocated tensor."""
    new_empty = torch.Tensor.new_empty
    fences: list[tuple[torch.Tensor, torch.Tensor]] = []

    def fenced(like: torch.Tensor, *shape: Any, **kwargs: Any) -> torch.Tensor:
        numel = new_empty(like, *shape, device="meta").numel()
        buffer = new_empty(like, numel + 2 * 4096, **kwargs).fill_(7)
        fences.append((buffer[:4096], buffer[4096 + numel :]))
        return buffer[4096 : 4096 + numel].view(new_empty(like, *shape, device="meta").shape)

    monkeypatch.setattr(torch.Tensor, "new_empty", fenced)
    check(torch.randn(2, dim, *size, device=DEVICE).to(torch.bfloat16), stoken_size, 2)
    assert len(fences) > 10 and all((fence == 7).all() for pair in fences for fence in pair)


def test_memory_formats() -> None:
    x = torch.randn(2, 16, 13, 9, device=DEVICE)
    for strided in (contiguous, channels_last, cut_out):
        tokens, association = sample_super_tokens(strided(x), (4, 3), backend="triton")
        y = upsample_super_tokens(tokens, association, (4, 3), backend="triton")
        for made in (tokens, association, y):
            assert made.is_contiguous(memory_format=torch.channels_last)


def test_empty_batch() -> None:
    x = torch.zeros(0, 16, 9, 14, device=DEVICE, requires_grad=True)
    tokens, association = sample_super_tokens(x, 4, backend="triton")
    y = upsample_super_tokens(tokens, association, 4, backend="triton")
    y.sum().backward()
    assert (tokens.shape, association.shape) == ((0, 16, 3, 4), (0, 9, 9, 14))
    assert y.shape == x.grad.shape == (0, 16, 9, 14)


@also_on_gpu
def test_second_derivatives() -> None:
    """Second derivatives for all pairs of inputs, through both functions."""
    given = [
        torch.randn(shape, device=DEVICE)
        for shape in ((1, 6, 5, 7), (1, 6, 2, 3), (1, 6, 2, 3), (1, 9, 5, 7), (1, 6, 5, 7))
    ]
    results = []
    for functions, dtype in ((backend, torch.float32), (reference, torch.float64)):
        x, v, refined, mix, u = (t.to(dtype).requires_grad_() for t in given)
        tokens, _ = functions.sample_super_tokens(x, (3, 3), 1)
        (grad_x,) = torch.autograd.grad(tokens, x, v, create_graph=True)
        y = functions.upsample_super_tokens(refined, mix, (3, 3))
        grads = torch.autograd.grad(y, (refined, mix), u, create_graph=True)
        scalar = grad_x.square().sum() + sum(grad.square().sum() for grad in grads) + (grads[0] * v).sum()
        results.append(torch.autograd.grad(scalar, (v, refined, mix, u)))
    names = ("v", "refined", "mix", "u")
    actual, exact = (dict(zip(names, result, strict=True)) for result in results)
    assert_close(actual, exact, 1e-5)


# Operators in PyTorch


def arguments_of_operators() -> Iterator[tuple[str, tuple[Any, ...]]]:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=DEVICE, requires_grad=True)

    weights = torch.rand(2, 3, 4, device=DEVICE) + 1
    yield "associate_and_aggregate", (draw(2, 6, 7, 11), 3, 3, 2, torch.float32)
    yield (
        "associate_and_aggregate",
        (channels_last(draw(2, 6, 7, 11).detach()).requires_grad_(), 3, 3, 1, torch.float16),
    )
    yield "upsample", (draw(2, 6, 3, 4), draw(2, 9, 7, 11), None, 3, 3, torch.float32)
    yield "upsample", (draw(2, 6, 3, 4), draw(2, 9, 7, 11).detach(), weights, 3, 3, torch.float16)
    yield "aggregate", (draw(2, 6, 7, 11), draw(2, 9, 7, 11), None, 3, 3, torch.float32)
    yield "aggregate", (draw(2, 6, 7, 11), draw(2, 9, 7, 11).detach(), weights, 3, 3, torch.float32)
    yield "associate", (draw(2, 6, 7, 11), draw(2, 6, 3, 4), 3, 3, torch.float32)


@pytest.mark.parametrize("case", range(7))
def test_opcheck(case: int) -> None:
    name, arguments = list(arguments_of_operators())[case]
    results = torch.library.opcheck(getattr(backend, name), arguments)
    assert set(results.values()) == {"SUCCESS"}


def operators(graph: torch.fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if str(node.target).startswith("stvit.")]


def assert_same_gradients(actual: nn.Module, expected: nn.Module, x: torch.Tensor, tolerance: float = 1e-5) -> None:
    results = []
    for module in (actual, expected):
        leaf = x.clone().requires_grad_()
        module.zero_grad()
        y = module(leaf)
        y.square().sum().backward()
        gradients = {name.removeprefix("_orig_mod."): p.grad for name, p in module.named_parameters()}
        results.append({"y": y.detach(), "x": leaf.grad, **gradients})
    assert_close(results[0], {name: value.double() for name, value in results[1].items()}, tolerance)


def make_attention(**kwargs: Any) -> tuple[SuperTokenAttention, SuperTokenAttention]:
    """Returns a module that uses the kernels and a copy that uses the reference."""
    fast = SuperTokenAttention(16, (4, 3), num_heads=2, **kwargs).to(DEVICE)
    plain = copy.deepcopy(fast)
    plain.backend = "reference"
    return fast, plain


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_graphs_contain_the_operators(dynamic: bool) -> None:
    torch._dynamo.reset()
    fast, plain = make_attention()
    seen: list[str] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        seen.extend(operators(graph.graph))
        return make_boxed_func(graph.forward)

    compiled = torch.compile(
        fast, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep), fullgraph=True, dynamic=dynamic
    )
    for i, shape in enumerate([(2, 16, 9, 14), (3, 16, 23, 7), (2, 16, 8, 12)]):
        with torch.compiler.set_stance("fail_on_recompile" if dynamic and i > 0 else "default"):
            assert_same_gradients(compiled, plain, torch.randn(shape, device=DEVICE))
    # Upsampling is also the backward pass of sampling.
    forward = ["stvit.associate_and_aggregate.default", "stvit.upsample.default"]
    backward = ["stvit.aggregate.default", "stvit.upsample.default"]
    assert seen == (forward + backward) * (1 if dynamic else 3)


def test_exported_graphs_contain_the_operators() -> None:
    fast, plain = make_attention()
    x = torch.randn(2, 16, 9, 14, device=DEVICE)
    dims = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height", min=5), 3: torch.export.Dim("width", min=4)}
    program = torch.export.export(fast.eval(), (x,), dynamic_shapes=(dims,), strict=False)
    assert operators(program.graph) == ["stvit.associate_and_aggregate.default", "stvit.upsample.default"]
    for shape in (x.shape, (1, 16, 21, 8)):
        x = torch.randn(shape, device=DEVICE)
        torch.testing.assert_close(program.module()(x), plain(x))


@pytest.mark.long
def test_exported_programs_need_only_this_package(tmp_path: Path) -> None:
    fast, plain = make_attention()
    x = torch.randn(2, 16, 9, 14, device=DEVICE)
    torch.export.save(torch.export.export(fast.eval(), (x,)), tmp_path / "program.pt2")
    torch.save((x, plain(x)), tmp_path / "expected.pt")
    program = f"""
import stvit, torch
x, expected = torch.load({str(tmp_path / "expected.pt")!r})
program = torch.export.load({str(tmp_path / "program.pt2")!r}).module()
try:
    print(torch.allclose(program(x), expected, atol=1e-5))
except ValueError as error:
    print(error)
"""
    if not HAS_GPU:
        assert run(program, TRITON_INTERPRET="1") == ["True"]
        (line,) = run(program)
        assert line.startswith("the Triton operators cannot run: the tensor is on the CPU")


@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx_contains_the_reference(dynamo: bool, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    fast, _ = make_attention()
    file = tmp_path / "module.onnx"
    torch.onnx.export(fast.eval(), (torch.randn(2, 16, 9, 14, device=DEVICE),), file, dynamo=dynamo)
    domains = {node.domain for node in onnx.load(file).graph.node}
    assert domains <= {"", "ai.onnx", "pkg.onnxscript.torch_lib"}  # torch 2.6 has a separate domain for functions


def test_transforms_use_the_reference() -> None:
    """Functional transforms and forward-mode differentiation do not support custom operators."""
    fast, plain = make_attention()
    x, v = torch.randn(2, 3, 16, 9, 14, device=DEVICE)
    gradients = [torch.func.grad(lambda x, m=module: m(x).square().sum())(x) for module in (fast, plain)]
    torch.testing.assert_close(*gradients)
    mapped = torch.vmap(lambda image: fast(image[None])[0])(x)
    torch.testing.assert_close(mapped, plain(x))
    with sdpa_kernel(SDPBackend.MATH):  # PyTorch's fused attention has no forward mode
        y, tangent = torch.func.jvp(fast, (x,), (v,))
    with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        dual = forward_ad.unpack_dual(fast(forward_ad.make_dual(x, v)))
    torch.testing.assert_close(dual.primal, y)
    torch.testing.assert_close(dual.tangent, tangent)
    fast.backend = "triton"
    for transformed in (torch.func.grad(lambda x: fast(x).sum()), lambda x: torch.func.jvp(fast, (x,), (v,))):
        with pytest.raises(ValueError, match=r"backend=triton cannot run: the transforms of torch\.func"):
            transformed(x)
    with forward_ad.dual_level(), pytest.raises(ValueError, match="have no forward-mode derivatives"):
        fast(forward_ad.make_dual(x, v))
    fast.backend = "auto"
    traced = torch.jit.trace(fast, x)
    assert "stvit::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), plain(x))


@also_on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    fast, plain = make_attention(n_iter=2)
    x = torch.randn(2, 16, 9, 14, device=DEVICE)
    exact = copy.deepcopy(plain).double()
    results = []
    for module, dtypes in ((fast, {torch.float32}), (exact, {torch.float64})):
        leaf = x.to(next(module.parameters()).dtype, copy=True).requires_grad_()
        with torch.autocast(DEVICE, dtype, enabled=module is fast):
            y = module(leaf)
            if module is fast:
                assert y.dtype == dtype
                tokens, association = sample_super_tokens(x, (4, 3))
                assert (tokens.dtype, association.dtype) == (torch.float32, dtype)
                expected, _ = sample_super_tokens(x, (4, 3), backend="reference")
                assert expected.dtype == tokens.dtype
        y.float().square().sum().backward()
        gradients = {name: p.grad for name, p in module.named_parameters()}
        assert {grad.dtype for grad in (leaf.grad, *gradients.values())} == dtypes
        results.append({"y": y.detach(), "x": leaf.grad, **gradients})
    assert_close(results[0], results[1], 2 * TOLERANCES[dtype])


@pytest.mark.long
def test_float32_products_follow_pytorchs_settings() -> None:
    """Tests the older and the newer setting of PyTorch, which must not be mixed in one process."""
    program = """
import torch
from stvit.ops import kernels
for setting in {settings}:
    exec(setting)
    print(*(kernels._precision(dtype) for dtype in (torch.float32, torch.bfloat16)))
"""
    older = [f"torch.set_float32_matmul_precision({name!r})" for name in ("highest", "high", "medium")]
    assert run(program.format(settings=["", *older])) == ["tf32x3 ieee"] * 2 + ["tf32 ieee"] * 2
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        newer = [f"torch.backends.cuda.matmul.fp32_precision = {name!r}" for name in ("tf32", "ieee")]
        assert run(program.format(settings=newer)) == ["tf32 ieee", "tf32x3 ieee"]
        assert run(program.format(settings=["torch.backends.fp32_precision = 'tf32'"])) == ["tf32 ieee"]


@(pytest.mark.gpu if HAS_GPU else pytest.mark.long)
def test_whole_model() -> None:
    model = timm.create_model("test_stvit", stoken_size=(8, (4, 2), 2, 1), n_iter=(1, 2, 1, 1)).to(DEVICE).eval()
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if isinstance(module, SuperTokenAttention):
            module.backend = "reference"
    assert can_run_triton(torch.empty(0, device=DEVICE))
    x = torch.randn(2, 3, 43, 35, device=DEVICE)
    assert_same_gradients(model, plain, x, 1e-4)
    fast = stvit.optimize_for_inference(model)
    with torch.inference_mode():
        torch.testing.assert_close(fast(x), plain(x), rtol=1e-3, atol=1e-5)


# The benchmark


@pytest.mark.long
@also_on_gpu
def test_benchmark_measures_the_same_function_in_each_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU, the timer and the CUDA graphs are replaced."""
    if not HAS_GPU:
        monkeypatch.setattr(benchmark_of_kernels, "capture", lambda step: step)
        monkeypatch.setattr(benchmark_of_kernels, "_time", lambda step: 1e-6 * len(step()))
    config = benchmark_of_kernels.KernelConfig(dtype="float32", ways=["reference", "triton"], repeats=2)
    rows = benchmark_of_kernels._measure({"stage": 1}, (2, 64, 12, 9), 4, config, torch.device(DEVICE), bandwidth=1e12)
    assert [(row["part"], row["way"]) for row in rows] == [
        (part, way) for part in ("functions", "operator") for way in ("reference", "triton")
    ]
    forward, backward = benchmark_of_kernels.count_bytes((2, 64, 12, 9), 4, 4)
    for row in rows:
        assert float(row["error"]) < 1e-5
        assert row["both_floor_us"] == pytest.approx((forward + backward) / 1e6, rel=1e-3)
        assert row["forward_floors"] == pytest.approx(row["forward_us"] / row["forward_floor_us"], rel=1e-3)
        assert row["forward_us_min"] <= row["forward_us"] <= row["forward_us_max"]
    used: list[str] = []
    sample = backend.associate_and_aggregate
    monkeypatch.setattr(backend, "associate_and_aggregate", lambda *args: used.append("triton") or sample(*args))
    for way in ("reference", "triton"):
        benchmark_of_kernels.make_step(way, (1, 64, 8, 8), 4, torch.float32, torch.device(DEVICE), "functions")(False)
    assert used == ["triton"]


# Choice of the backend


CHOICE = """
import sys, torch, stvit
from stvit.ops import can_run_triton, sample_super_tokens, why_not_triton
from stvit.ops.backends import choose_backend
x = torch.randn(1, 8, 6, 6)
print(can_run_triton(x), why_not_triton(x))
for backend in ("auto", "reference", "triton"):
    try:
        print(choose_backend(backend, x))
        sample_super_tokens(x, 3, backend=backend)
    except ValueError as error:
        print("ValueError:", error)
print("stvit.ops.kernels" in sys.modules)
"""


def test_on_a_cpu_the_reference_runs_and_triton_is_not_imported() -> None:
    lines = run(CHOICE)
    assert lines[0].startswith("False the tensor is on the CPU")
    assert lines[1:3] == ["reference", "reference"]
    assert lines[3].startswith("ValueError: backend=triton cannot run: the tensor is on the CPU")
    assert lines[4:] == ["False"]


@also_on_gpu
def test_the_environment_variable_overrides_the_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 8, 6, 6, device=DEVICE)
    choose = backends.choose_backend
    assert [choose(name, x) for name in ("auto", "reference", "triton")] == ["triton", "reference", "triton"]
    for forced in ("reference", "triton"):
        monkeypatch.setenv("STVIT_OPS_BACKEND", forced)
        assert [choose(name, x) for name in ("auto", "reference", "triton")] == [forced] * 3
    with pytest.raises(ValueError, match=r"STVIT_OPS_BACKEND=triton cannot run: .*float64.*; use 'auto'"):
        sample_super_tokens(x.double(), 3)
    monkeypatch.setenv("STVIT_OPS_BACKEND", "cuda")
    with pytest.raises(ValueError, match="STVIT_OPS_BACKEND must be one of auto, reference, triton, got 'cuda'"):
        sample_super_tokens(x, 3)


@also_on_gpu
def test_reasons_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    for x, reason in (
        (torch.empty(1, dtype=torch.float64, device=DEVICE), "the dtype is torch.float64, expected float32"),
        (torch.empty(1, device="meta"), "the tensor is on meta, expected cuda"),
    ):
        assert reason in stvit.ops.why_not_triton(x) and not can_run_triton(x)
        assert backends.choose_backend("auto", x) == "reference"
    for gpu, hip, capability, reason in (
        (False, None, (9, 0), "torch.cuda finds no GPU"),
        (True, "7.0", (9, 0), "the kernels need an NVIDIA GPU, got Quadro"),
        (True, None, (7, 5), "need compute capability 8.0 or newer, Quadro has 7.5"),
        (True, None, (9, 0), "" if HAS_GPU else "Triton cannot use the GPU ("),
    ):
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index, capability=capability: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Quadro")
        backends._why_not_gpu.cache_clear()
        said = backends.why_no_kernels("cuda", 0, torch.float32)
        assert said == reason if not reason else reason in said
    backends._why_not_gpu.cache_clear()
    backends._why_not_kernels.cache_clear()
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"the Triton operators cannot run: the dtype is .*float64"):
        x = torch.randn(1, 4, 6, 6, dtype=torch.float64, device=DEVICE)
        torch.ops.stvit.associate_and_aggregate(x, 3, 3, 1, torch.float64)


def test_without_triton_the_reference_runs() -> None:
    program = "import sys; sys.modules['triton'] = None" + CHOICE
    lines = run(program, TRITON_INTERPRET="1")
    assert lines[0].startswith("False Triton cannot be imported (")
    assert lines[1:3] == ["reference", "reference"]
    assert lines[3].startswith("ValueError: backend=triton cannot run: Triton cannot be imported (")


def test_the_interpreter_must_be_selected_before_python_starts() -> None:
    program = "import os, stvit.ops.kernels; os.environ['TRITON_INTERPRET'] = '1'" + CHOICE
    lines = run(program)
    assert lines[0].startswith("False TRITON_INTERPRET=1 was set after the kernels were imported")
    assert lines[1] == "reference"


# Compilation for GPUs that are not present

SHARED_KIB = {80: 163, 86: 99, 90: 227, 100: 227, 120: 99}  # shared memory per program, by compute capability
LAYER_KERNELS = {
    "activate_kernel",
    "activate_backward_kernel",
    "depthwise_kernel",
    "depthwise_backward_kernel",
    "norm_backward_kernel",
    "sum_rows_kernel",
}
COMPILE = """
import json, re, subprocess, sys, tempfile, torch, triton
from pathlib import Path
from tests.fake_driver import install

install(int(sys.argv[1]))
made, run = [], triton.JITFunction.run

def compile(self, *args, grid, warmup, **kwargs):
    kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
    made.append({"name": self.__name__, "ptx": kernel.asm["ptx"], "shared": kernel.metadata.shared})
    made[-1]["spilled"] = count_spilled_bytes(kernel.asm["cubin"])
    return kernel

def count_spilled_bytes(cubin):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        run = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    return int(re.search(r"STACK:(\\d+)", run.stdout + run.stderr)[1])

triton.JITFunction.run = compile
from stvit.ops import kernels, layer_kernels, triton as backend
shapes = {
    "bfloat16": [(64, 56, 8, 8), (320, 14, 2, 2)],
    "float16": [(96, 50, 20, 7), (1, 5, 1, 1), (16, 13, 3, 5)],
    "float32": [(128, 28, 4, 4), (300, 14, 2, 2), (5, 13, 3, 3)],
}
if "--few" in sys.argv:
    shapes = {"bfloat16": shapes["bfloat16"][:1]}
for name, cases in shapes.items():
    dtype = getattr(torch, name)
    for dim, size, h, w in cases:
        x = torch.randn(2, dim, size, size).to(dtype, memory_format=torch.channels_last)
        tokens, association, weights = backend.associate_and_aggregate(x, h, w, 1, dtype)
        backend.upsample(tokens, association, weights, h, w, dtype)
        backend.aggregate(x, association, weights, h, w, dtype)
        backend.associate(x, tokens, h, w, dtype)
    backend.associate_and_aggregate(x.contiguous(), h, w, 2, torch.bfloat16)
    backend.upsample(tokens, association, None, h, w, torch.float32)
    backend.aggregate(x, association, None, h, w, dtype)
sizes = [("bfloat16", 64, 56), ("float16", 128, 28), ("bfloat16", 320, 14), ("float32", 96, 20), ("float16", 5, 3)]
for name, dim, size in sizes[:1] if "--few" in sys.argv else sizes:
    x = torch.randn(2, size, size, dim).to(getattr(torch, name))
    weight, vector = torch.randn(dim, 1, 3, 3), torch.randn(dim)
    y, _ = layer_kernels.depthwise(x, weight, vector, norm=(vector, vector, 1e-6), shift=vector)
    layer_kernels.norm_backward(x, x, y, vector, 1e-6)
    for has_gelu in (False, True):
        layer_kernels.depthwise(x, weight, vector, has_gelu)
        layer_kernels.depthwise_backward(x, x, weight, has_gelu)
    layer_kernels.activate(x, vector, vector, vector)
    layer_kernels.activate_backward(x, x, vector)
    layer_kernels.sum_rows(x.flatten(0, 2))
kernels._index = lambda *maps: triton.language.int64
backend.associate_and_aggregate(x, h, w, 1, dtype)
print(json.dumps(made))
"""


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("capability", "flags"),
    [(90, ["--few"]), *(pytest.param(c, [], marks=pytest.mark.long) for c in (80, 86, 90, 100, 120))],
)
def test_compiled_for(capability: int, flags: list[str], tmp_path: Path) -> None:
    """The compiler accepts the kernels and emits the fast instructions."""
    compiled = json.loads(run(COMPILE, str(capability), *flags, TRITON_CACHE_DIR=str(tmp_path / "cache"))[-1])
    assert {kernel["name"] for kernel in compiled} == {
        "mean_kernel",
        "associate_and_aggregate_kernel",
        "sum_tiles_kernel",
        "upsample_kernel",
        *LAYER_KERNELS,
    }
    for kernel in compiled:
        assert not re.search(r"(?<![\w.])(atom|red)\.\S*global", kernel["ptx"]), kernel["name"]
        assert kernel["shared"] <= SHARED_KIB[capability] * 1024
        if kernel["name"] in LAYER_KERNELS:
            assert kernel["spilled"] == 0, kernel["name"]
    mean, associate, *_ = (kernel["ptx"] for kernel in compiled)
    assert "ld.global.v4.b32" in mean  # 16 bytes at once
    assert "cp.async.cg.shared.global" in associate and "mma" in associate

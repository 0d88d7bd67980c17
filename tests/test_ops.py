"""Compares the reference with the authors' code and with a naive definition, and tests every way to run or export it.

tests/test_triton.py compares the other backends with the reference.
"""

import copy
import inspect
import io
import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table

from stvit import ops
from stvit.ops import SuperTokenAttention, portable, reference, sample_super_tokens, upsample_super_tokens
from tests.golden import fill
from tests.versions import needs_newer_torch

GOLDEN = np.load(Path(__file__).parent / "golden" / "op.npz")

# Map size and cell size: even division, primes, one pixel, less than one cell, rectangular cells, cells of one pixel.
SIZES = [
    ((8, 8), (4, 4)),
    ((13, 7), (3, 3)),
    ((11, 5), (2, 3)),
    ((1, 1), (1, 1)),
    ((1, 1), (4, 2)),
    ((3, 5), (8, 8)),
    ((7, 2), (1, 5)),
    ((5, 7), (1, 1)),
]
each_size = pytest.mark.parametrize(("size", "stoken_size"), SIZES, ids=lambda v: "x".join(map(str, v)))
each_n_iter = pytest.mark.parametrize("n_iter", [1, 2, 3])


def assert_parity(actual: torch.Tensor, golden: np.ndarray) -> None:
    """Compares with a golden tensor, to 1e-4 of its standard deviation.

    The authors' code has an error of 7e-6.
    """
    assert tuple(actual.shape) == golden.shape
    error = np.abs(actual.detach().numpy() - golden).max()
    assert error <= 1e-4 * golden.std(), f"{error / golden.std():.1e} standard deviations"


def backward(module: nn.Module, x: torch.Tensor, v: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Returns the output, and the gradients of (output * v).sum() for the input and every parameter."""
    module.zero_grad()
    x = x.detach().requires_grad_()
    y = module(x)
    if v is None:
        v = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)  # exact in any dtype
    (y * v.to(y)).sum().backward()
    return {"y": y.detach(), "x": x.grad, **{name: p.grad for name, p in module.named_parameters()}}


def assert_same(
    actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], rtol: float = 1e-4, atol: float = 1e-5
) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            actual[name], expected[name], rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}"
        )


def neighbors(cell: tuple[int, int], grid: tuple[int, int]) -> list[tuple[int, tuple[int, int]]]:
    """Returns the 3x3 cells around a cell that are inside the grid, each with its number, row by row."""
    around = itertools.product((-1, 0, 1), repeat=2)
    cells = [(k, (cell[0] + i, cell[1] + j)) for k, (i, j) in enumerate(around)]
    return [(k, (i, j)) for k, (i, j) in cells if 0 <= i < grid[0] and 0 <= j < grid[1]]


def naive_matrices(x: np.ndarray, stoken_size: tuple[int, int], n_iter: int) -> tuple[np.ndarray, np.ndarray]:
    """Computes section 3.2 of the paper in loops over pixels and tokens, for one image (C, H, W) in float64.

    Returns:
        Weights of the pixels in each token, (Hs, Ws, H, W), and association of pixels with tokens, (H, W, 9).
    """
    (C, H, W), (h, w) = x.shape, stoken_size
    grid = math.ceil(H / h), math.ceil(W / w)
    pixels = np.zeros((C, grid[0] * h, grid[1] * w))
    pixels[:, :H, :W] = x
    positions = list(np.ndindex(pixels.shape[1:]))
    tokens = {(i, j): pixels[:, i * h : (i + 1) * h, j * w : (j + 1) * w].mean((1, 2)) for i, j in np.ndindex(grid)}
    association, weights = np.zeros((*pixels.shape[1:], 9)), np.zeros(())
    for _ in range(n_iter):
        for p in positions:
            logits = np.zeros(9)  # tokens outside the grid are zeros
            for k, token in neighbors((p[0] // h, p[1] // w), grid):
                logits[k] = pixels[:, p[0], p[1]] @ tokens[token] / math.sqrt(C)
            e = np.exp(logits - logits.max())
            association[p] = e / e.sum()
        weights = np.zeros((*grid, *pixels.shape[1:]))
        for p in positions:
            for k, token in neighbors((p[0] // h, p[1] // w), grid):
                weights[token][p] = association[p][k]
        weights /= weights.sum((2, 3), keepdims=True) + 1e-12
        tokens = {t: (pixels * weights[t]).sum((1, 2)) for t in np.ndindex(grid)}
    return weights[:, :, :H, :W], association[:H, :W]


def naive_upsample(association: np.ndarray, stoken_size: tuple[int, int], grid: tuple[int, int]) -> np.ndarray:
    """Computes section 3.3 for one image; returns the weights of the tokens in each pixel, (H, W, Hs, Ws)."""
    (H, W, _), (h, w) = association.shape, stoken_size
    weights = np.zeros((H, W, *grid))
    for p in np.ndindex(H, W):
        for k, token in neighbors((p[0] // h, p[1] // w), grid):
            weights[p][token] = association[p][k]
    return weights


def plain_attention(module: SuperTokenAttention, x: torch.Tensor) -> torch.Tensor:
    """Computes multi-head self-attention over all positions with the weights of a module."""
    B, C, H, W = x.shape
    d = C // module.num_heads
    qkv = torch.einsum("oc,bcn->bon", module.qkv.weight[:, :, 0, 0], x.flatten(2))
    if module.qkv.bias is not None:
        qkv = qkv + module.qkv.bias[:, None]
    heads = []
    for head in qkv.split(3 * d, dim=1):  # order of the authors' code: q, k and v of the first head, then of the next
        q, k, v = head.split(d, dim=1)
        weights = (torch.einsum("bdn,bdm->bnm", q, k) / math.sqrt(d)).softmax(dim=2)
        heads.append(torch.einsum("bnm,bdm->bdn", weights, v))
    y = torch.einsum("oc,bcn->bon", module.proj.weight[:, :, 0, 0], torch.cat(heads, dim=1))
    return (y + module.proj.bias[:, None]).view(B, C, H, W)


# The definition


@pytest.mark.parametrize("case", range(4))
def test_golden(case: int) -> None:
    golden = {key.removeprefix(f"{case}_"): GOLDEN[key] for key in GOLDEN if key.startswith(f"{case}_")}
    module = SuperTokenAttention(
        int(golden["dim"]),
        tuple(golden["stoken_size"].tolist()),
        int(golden["n_iter"]),
        int(golden["num_heads"]),
        qkv_bias=True,
    )
    for name, p in module.named_parameters():
        p.data = torch.from_numpy(fill.draw(f"op{case}.stoken_refine.{name}", tuple(p.shape)))
    x = torch.from_numpy(fill.image(100 + case, *golden["shape"]))
    v = torch.from_numpy(fill.image(200 + case, *golden["y"].shape))
    results = backward(module, x, v)
    assert len(results) == 6
    for name, actual in results.items():
        assert_parity(actual, golden[{"y": "y", "x": "x_grad"}.get(name, f"grad_stoken_refine.{name}")])


@each_n_iter
@each_size
def test_sample_equals_the_paper(size: tuple[int, int], stoken_size: tuple[int, int], n_iter: int) -> None:
    """Compares outputs and gradients.

    The map is linear, because the association is a constant.
    """
    x = torch.randn(2, 5, *size, dtype=torch.float64, requires_grad=True)
    tokens, association = reference.sample_super_tokens(x, stoken_size, n_iter)
    v = torch.randn_like(tokens)
    (tokens * v).sum().backward()
    for b in range(2):
        image = x[b].detach().numpy()
        weights, naive_association = naive_matrices(image, stoken_size, n_iter)
        expected = {
            "tokens": np.einsum("ijyx,cyx->cij", weights, image),
            "association": naive_association.transpose(2, 0, 1),
            "x.grad": np.einsum("ijyx,cij->cyx", weights, v[b].numpy()),
        }
        for name, actual in {"tokens": tokens, "association": association, "x.grad": x.grad}.items():
            np.testing.assert_allclose(actual[b].detach(), expected[name], rtol=1e-9, atol=1e-11, err_msg=name)


@each_size
def test_upsample_equals_the_paper(size: tuple[int, int], stoken_size: tuple[int, int]) -> None:
    grid = math.ceil(size[0] / stoken_size[0]), math.ceil(size[1] / stoken_size[1])
    tokens = torch.randn(2, 5, *grid, dtype=torch.float64, requires_grad=True)
    association = torch.rand(2, 9, *size, dtype=torch.float64)
    y = reference.upsample_super_tokens(tokens, association, stoken_size)
    v = torch.randn_like(y)
    (y * v).sum().backward()
    for b in range(2):
        weights = naive_upsample(association[b].permute(1, 2, 0).numpy(), stoken_size, grid)
        expected = np.einsum("yxij,cij->cyx", weights, tokens[b].detach().numpy())
        np.testing.assert_allclose(y[b].detach(), expected, rtol=1e-9, atol=1e-11)
        expected = np.einsum("yxij,cyx->cij", weights, v[b].numpy())
        np.testing.assert_allclose(tokens.grad[b], expected, rtol=1e-9, atol=1e-11)


@each_n_iter
def test_module_is_sample_attend_upsample(n_iter: int) -> None:
    module = SuperTokenAttention(8, (3, 2), n_iter, num_heads=2)
    x = torch.randn(2, 8, 7, 9)
    tokens, association = sample_super_tokens(x, (3, 2), n_iter)
    expected = upsample_super_tokens(plain_attention(module, tokens), association, (3, 2))
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize("qkv_bias", [False, True])
def test_cells_of_one_pixel_give_plain_attention(qkv_bias: bool) -> None:
    module = SuperTokenAttention(24, 1, num_heads=3, qkv_bias=qkv_bias).double()
    plain = copy.deepcopy(module)
    plain.forward = lambda x: plain_attention(plain, x)
    x = 3 * torch.randn(2, 24, 5, 4, dtype=torch.float64)
    assert_same(backward(module, x), backward(plain, x), rtol=1e-9, atol=1e-11)


@each_size
def test_properties_of_sampled_tokens(size: tuple[int, int], stoken_size: tuple[int, int]) -> None:
    x = torch.randn(2, 5, *size, requires_grad=True)
    tokens, association = sample_super_tokens(x, stoken_size)
    assert tokens.shape == (2, 5, math.ceil(size[0] / stoken_size[0]), math.ceil(size[1] / stoken_size[1]))
    assert association.shape == (2, 9, *size)
    assert tokens.requires_grad and not association.requires_grad
    torch.testing.assert_close(association.sum(dim=1), torch.ones(2, *size))
    assert torch.equal(upsample_super_tokens(tokens, association, stoken_size).isfinite(), torch.ones(2, 5, *size) > 0)


def test_an_integer_stoken_size_is_square() -> None:
    x = torch.randn(2, 4, 7, 5)
    tokens, association = sample_super_tokens(x, 3)
    for actual, expected in zip((tokens, association), sample_super_tokens(x, (3, 3), 1), strict=True):
        assert torch.equal(actual, expected)
    y = upsample_super_tokens(tokens, association, 3)
    assert torch.equal(y, upsample_super_tokens(tokens, association, (3, 3)))
    module = SuperTokenAttention(4, 3, num_heads=2)
    square = SuperTokenAttention(4, (3, 3), num_heads=2)
    square.load_state_dict(module.state_dict())
    assert torch.equal(module(x), square(x))


# Gradients


@pytest.mark.parametrize("n_iter", [1, 2])
@pytest.mark.parametrize(("size", "stoken_size"), [((5, 4), (2, 3)), ((3, 2), (4, 4))])
def test_gradcheck_with_constant_association(
    size: tuple[int, int], stoken_size: tuple[int, int], n_iter: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = SuperTokenAttention(4, stoken_size, n_iter, num_heads=2, qkv_bias=True).double()
    x = torch.randn(1, 4, *size, dtype=torch.float64)
    results = backward(module, x)

    rounds: list[torch.Tensor] = []
    associate = reference.associate
    with monkeypatch.context() as patch:
        patch.setattr(reference, "associate", lambda *args: rounds.append(associate(*args)) or rounds[-1])
        module(x)
    assert len(rounds) == n_iter
    constant = itertools.cycle(rounds)
    monkeypatch.setattr(reference, "associate", lambda *args: next(constant).detach())

    names, parameters = zip(*module.named_parameters(), strict=True)

    def function(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), x)

    assert torch.autograd.gradcheck(function, (x.requires_grad_(), *parameters))
    assert_same(backward(module, x), results, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("stoken_size", [1, 3])
def test_gradient_reaches_input_and_weights(stoken_size: int) -> None:
    results = backward(SuperTokenAttention(8, stoken_size, 2, num_heads=2, qkv_bias=True), torch.randn(2, 8, 7, 5))
    assert set(results) == {"y", "x", "qkv.weight", "qkv.bias", "proj.weight", "proj.bias"}
    # Only the biases of the keys have no gradient, because they do not change the softmax.
    for name, value in results.items():
        assert value.isfinite().all() and (value.abs() > 1e-7).float().mean() > (0.6 if name == "qkv.bias" else 0.99)


def test_two_runs_are_equal() -> None:
    module = SuperTokenAttention(16, (4, 3), 2, num_heads=2)
    x = torch.randn(2, 16, 13, 17)
    assert_same(backward(module, x), backward(module, x), rtol=0, atol=0)


# Dtypes and memory formats


def assert_close_in_norm(actual: dict[str, torch.Tensor], exact: dict[str, torch.Tensor], tolerance: float) -> None:
    for name in exact:
        error = (actual[name].double() - exact[name]).norm() / exact[name].norm()
        assert error <= tolerance, f"{name}: {error:.1e}"


# A few times the rounding error of each dtype, which is 2^-24, 2^-8 and 2^-11.
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 1.5e-3)], ids=str
)
@pytest.mark.parametrize(("stoken_size", "n_iter"), [(1, 1), (4, 1), ((2, 3), 2), (32, 2)])
def test_dtypes(stoken_size: int | tuple[int, int], n_iter: int, dtype: torch.dtype, tolerance: float) -> None:
    module = SuperTokenAttention(32, stoken_size, n_iter, num_heads=2, qkv_bias=True).to(dtype)
    x = torch.randn(2, 32, 13, 14).to(dtype)
    exact = backward(copy.deepcopy(module).double(), x.double())
    results = backward(module, x)
    assert {value.dtype for value in results.values()} == {dtype}
    assert_close_in_norm(results, exact, tolerance)
    for tensor in sample_super_tokens(x, stoken_size, n_iter):
        assert tensor.dtype == dtype


@pytest.mark.parametrize(
    ("dim", "stoken_size", "size"),
    [
        (512, 8, 16),  # scalar products before scaling
        (16, 16, 48),  # sums over 3x3 cells
        (16, 40, 40),  # sum over a cell
    ],
)
def test_float16_does_not_overflow(dim: int, stoken_size: int, size: int) -> None:
    x = 50 * torch.ones(1, dim, size, size, dtype=torch.float16)
    tokens, association = sample_super_tokens(x.requires_grad_(), stoken_size, 2)
    y = upsample_super_tokens(tokens, association, stoken_size)
    y.mean().backward()
    assert x.grad.isfinite().all() and association.isfinite().all()
    torch.testing.assert_close(tokens, torch.full_like(tokens, 50), rtol=2e-3, atol=0)
    # Compared with products of 50 * 50 * sqrt(dim), the zero tokens outside the grid have no weight.
    torch.testing.assert_close(y, torch.full_like(y, 50), rtol=5e-3, atol=0)


@pytest.mark.parametrize("stoken_size", [1, 4])
def test_autocast(stoken_size: int) -> None:
    module = SuperTokenAttention(32, stoken_size, 2, num_heads=2)
    x = torch.randn(2, 32, 13, 14)
    exact = backward(copy.deepcopy(module).double(), x.double())
    with torch.autocast("cpu", torch.bfloat16):
        results = backward(module, x)
    for name, actual in results.items():
        assert actual.dtype == (torch.bfloat16 if name == "y" else torch.float32)
    assert_close_in_norm(results, exact, 1e-2)


@pytest.mark.parametrize("stoken_size", [1, (4, 3)])
def test_channels_last_equals_contiguous(stoken_size: int | tuple[int, int]) -> None:
    module = SuperTokenAttention(16, stoken_size, 2, num_heads=2)
    x = torch.randn(2, 16, 9, 14)
    channels_last = x.to(memory_format=torch.channels_last)
    assert not channels_last.is_contiguous()
    assert_same(backward(module, channels_last), backward(module, x))


@pytest.mark.parametrize("stoken_size", [1, (4, 3)])
def test_empty_batch(stoken_size: int | tuple[int, int]) -> None:
    results = backward(SuperTokenAttention(16, stoken_size, 2, num_heads=2), torch.zeros(0, 16, 9, 14))
    assert results.pop("y").shape == results.pop("x").shape == (0, 16, 9, 14)
    assert len(results) == 3 and not any(grad.any() for grad in results.values())


# torch.compile


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("stoken_size", "dynamic"),
    [(1, False), ((4, 3), False), (1, True), pytest.param((4, 3), True, marks=pytest.mark.long)],
)
def test_compile(stoken_size: int | tuple[int, int], dynamic: bool) -> None:
    """There are no graph breaks, and with dynamic shapes one graph serves all sizes."""
    torch._dynamo.reset()
    module = SuperTokenAttention(16, stoken_size, num_heads=2)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    # Sizes that the cells divide along no axis (also the first), along both axes, and along one axis.
    for i, shape in enumerate([(2, 16, 9, 14), (3, 16, 23, 7), (5, 16, 20, 12), (4, 16, 12, 10), (3, 16, 7, 9)]):
        x = torch.randn(shape)
        with torch.compiler.set_stance("fail_on_recompile" if dynamic and i > 0 else "default"):
            actual = backward(compiled, x)
        assert_same({name.removeprefix("_orig_mod."): g for name, g in actual.items()}, backward(module, x))


@pytest.mark.timeout(300)
@pytest.mark.long
def test_compile_with_inductor() -> None:
    torch._dynamo.reset()
    module = SuperTokenAttention(16, (4, 3), 2, num_heads=2)
    x = torch.randn(2, 16, 9, 14)
    actual = backward(torch.compile(module, fullgraph=True, dynamic=False), x)
    assert_same({name.removeprefix("_orig_mod."): value for name, value in actual.items()}, backward(module, x))


def longest_chain_of_scatters(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> int:
    """Returns how often parts of one tensor are written, in the forward or backward graph of inductor.

    In-place additions to slices become scatters. Each writes into the result of the last scatter, through views.
    """
    longest = 0

    def measure(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        nonlocal longest
        chain: dict[torch.fx.Node, int] = {}
        for node in graph.graph.nodes:
            name = str(node.target)
            written = "scatter" in name or "index_put" in name or "copy" in name
            passed_on = written or any(view in name for view in ("slice", "select", "view", "permute", "add"))
            sources = node.all_input_nodes if passed_on else []
            chain[node] = max([chain[source] for source in sources], default=0) + written
        longest = max(longest, *chain.values())
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=measure, bw_compiler=measure, decompositions=select_decomp_table())
    torch._dynamo.reset()
    torch.compile(function, backend=backend, fullgraph=True)(x.requires_grad_()).sum().backward()
    return longest


def add_to_slices(parts: torch.Tensor) -> torch.Tensor:
    """Computes the sums of `reference._sum_neighbors` with nine in-place additions, which compile slowly."""
    B, Hs, Ws, _, C = parts.shape
    total = parts.new_zeros(B, Hs + 2, Ws + 2, C)
    for k in range(9):
        total[:, k // 3 : k // 3 + Hs, k % 3 : k % 3 + Ws] += parts[:, :, :, k]
    return total[:, 1:-1, 1:-1]


@needs_newer_torch
@pytest.mark.timeout(300)
def test_compiled_graphs_have_no_chain_of_in_place_additions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor turns such a chain into nested masks and compiles for more than ten minutes."""
    module = SuperTokenAttention(16, (4, 3), 2, num_heads=2)
    x = torch.randn(2, 16, 9, 14)
    assert longest_chain_of_scatters(module, x) <= 4  # the gradient of a selection and a slice on each axis
    parts = torch.randn(2, 3, 4, 9, 5)
    torch.testing.assert_close(add_to_slices(parts), reference._sum_neighbors(parts))
    monkeypatch.setattr(reference, "_sum_neighbors", add_to_slices)
    assert longest_chain_of_scatters(module, x) > 9


# Exports

OTHER_SHAPES = [(2, 16, 12, 12), (3, 16, 13, 17), (1, 16, 29, 8)]
each_stoken_size = pytest.mark.parametrize("stoken_size", [1, 4, (3, 5)], ids=str)


def make_exportable(stoken_size: int | tuple[int, int], n_iter: int = 2) -> tuple[SuperTokenAttention, torch.Tensor]:
    """Returns a module and an input whose shape differs from OTHER_SHAPES."""
    return SuperTokenAttention(16, stoken_size, n_iter, num_heads=2).eval(), torch.randn(2, 16, 9, 14)


@each_size
@each_n_iter
def test_portable_equals_the_reference(size: tuple[int, int], stoken_size: tuple[int, int], n_iter: int) -> None:
    """Compares outputs and the gradient of the pixels, through the super tokens and the upsampled map."""
    found = {}
    for module in (reference, portable):
        x = torch.randn(2, 5, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        tokens, association = module.sample_super_tokens(x, stoken_size, n_iter)
        y = module.upsample_super_tokens(tokens.sin(), association, stoken_size)
        (y * y.detach().cos()).sum().backward()
        assert not association.requires_grad
        found[module.__name__] = {"tokens": tokens, "association": association, "y": y, "x": x.grad}
    actual, expected = found["stvit.ops.portable"], found["stvit.ops.reference"]
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_portable_in_low_precision(dtype: torch.dtype) -> None:
    """The error is that of the reference, even if sums over a cell exceed the range of float16."""
    x = (torch.randn(1, 4, 70, 90) * 5 + 150).to(dtype)
    wanted, _ = reference.sample_super_tokens(x.double(), (32, 32), 2)
    errors = []
    for module in (reference, portable):
        tokens, association = module.sample_super_tokens(x, (32, 32), 2)
        assert tokens.dtype == association.dtype == dtype and tokens.isfinite().all()
        errors.append((tokens.double() - wanted).abs().max())
    assert errors[1] <= 2 * errors[0]


def trace_ranks(module: nn.Module, x: torch.Tensor) -> list[int]:
    """Returns the number of axes of each tensor in the graph of torch.jit.trace."""
    graph = torch.jit.trace(module, x).inlined_graph
    values = [value for node in graph.nodes() for value in node.outputs()]
    return [value.type().dim() for value in values if value.type().kind() == "TensorType" and value.type().dim()]


def export_ranks(module: nn.Module, x: torch.Tensor) -> list[int]:
    """Returns the number of axes of each tensor in the graph of torch.export."""
    values = [node.meta.get("val") for node in torch.export.export(module, (x,), strict=False).graph.nodes]
    return [value.dim() for value in values if isinstance(value, torch.Tensor)]


@each_stoken_size
@pytest.mark.parametrize("ranks", [trace_ranks, pytest.param(export_ranks, marks=needs_newer_torch)])
def test_exported_graphs_have_few_axes(
    ranks: Callable[[nn.Module, torch.Tensor], list[int]], stoken_size: int | tuple[int, int]
) -> None:
    """Core ML supports five axes, ncnn four in addition to the batch."""
    found = ranks(*make_exportable(stoken_size))
    assert len(found) > 10 and max(found) == (4 if stoken_size == 1 else 5)


@each_stoken_size
def test_trace(stoken_size: int | tuple[int, int]) -> None:
    """One trace serves all sizes."""
    module, x = make_exportable(stoken_size)
    traced = torch.jit.trace(module, x)
    for shape in [x.shape, *OTHER_SHAPES, (1, 16, 2, 1)]:
        x = torch.randn(shape)
        assert_same(backward(traced, x), backward(module, x))


@each_stoken_size
@pytest.mark.parametrize("trace", [False, True], ids=["module", "fx"])
def test_script(stoken_size: int | tuple[int, int], trace: bool) -> None:
    module, x = make_exportable(stoken_size)
    scripted = torch.jit.script(torch.fx.symbolic_trace(module) if trace else module)
    buffer = io.BytesIO()
    torch.jit.save(scripted, buffer)
    buffer.seek(0)
    scripted = torch.jit.load(buffer)
    for shape in [x.shape, *OTHER_SHAPES]:
        x = torch.randn(shape)
        for _ in range(2):  # TorchScript optimizes the second run
            assert_same(backward(scripted, x), backward(module, x))


def test_script_functions() -> None:
    x = torch.randn(2, 4, 7, 9)
    tokens, association = torch.jit.script(sample_super_tokens)(x, (3, 2), 2)
    expected = sample_super_tokens(x, (3, 2), 2)
    torch.testing.assert_close((tokens, association), expected)
    y = torch.jit.script(upsample_super_tokens)(tokens, association, (3, 2))
    torch.testing.assert_close(y, upsample_super_tokens(*expected, (3, 2)))


@each_stoken_size
def test_fx(stoken_size: int | tuple[int, int]) -> None:
    module, x = make_exportable(stoken_size)
    traced = torch.fx.symbolic_trace(module)
    called = {node.target for node in traced.graph.nodes if node.op == "call_function"}
    functions = {sample_super_tokens, upsample_super_tokens}
    assert called & functions == (set() if stoken_size == 1 else functions)
    for shape in [x.shape, *OTHER_SHAPES]:
        x = torch.randn(shape)
        assert torch.equal(traced(x), module(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_trace_can_be_cast(dtype: torch.dtype) -> None:
    module = SuperTokenAttention(16, stoken_size=4, num_heads=2).eval()
    x = torch.randn(2, 16, 13, 17)
    expected = module(x)
    traced = torch.jit.trace(module, x).to(dtype)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(traced(x.to(dtype)).float(), expected, rtol=tolerance, atol=tolerance)


@needs_newer_torch
@each_stoken_size
@pytest.mark.parametrize("named", [True, False], ids=["Dim", "Dim.AUTO"])
def test_export(stoken_size: int | tuple[int, int], named: bool) -> None:
    module, x = make_exportable(stoken_size)
    h, w = module.stoken_size
    if named:
        dims = {0: torch.export.Dim("batch", min=1)}
        dims |= {2: torch.export.Dim("height", min=h + 1), 3: torch.export.Dim("width", min=w + 1)}
    else:
        dims = dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO)
    program = torch.export.export(module, (x,), dynamic_shapes=(dims,), strict=False)
    symbols = [size for size in program.graph.find_nodes(op="placeholder")[-1].meta["val"].shape]
    assert [isinstance(size, torch.SymInt) for size in symbols] == [True, False, True, True]
    exported = program.module()
    for shape in [x.shape, *OTHER_SHAPES]:
        x = torch.randn(shape)
        torch.testing.assert_close(exported(x), module(x))


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("stoken_size", "dynamo"),
    [
        (1, True),
        *(pytest.param(size, True, marks=pytest.mark.long) for size in (4, (3, 5))),
        (1, False),
        (4, False),
        ((3, 5), False),
    ],
)
def test_onnx(stoken_size: int | tuple[int, int], dynamo: bool, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    module, x = make_exportable(stoken_size)
    if dynamo:
        axes = {"dynamic_shapes": (dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC),)}
    else:
        axes = {"dynamic_axes": {"x": [0, 2, 3], "y": [0, 2, 3]}}
    file = tmp_path / "module.onnx"
    torch.onnx.export(module, (x,), file, dynamo=dynamo, input_names=["x"], output_names=["y"], **axes)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for shape in [x.shape, *OTHER_SHAPES]:
        x = torch.randn(shape)
        (y,) = session.run(None, {"x": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), module(x), rtol=0, atol=1e-5)


# The interface


@pytest.mark.parametrize("qkv_bias", [False, True])
def test_state_dict(qkv_bias: bool) -> None:
    module = SuperTokenAttention(16, 4, num_heads=2, qkv_bias=qkv_bias)
    shapes = {"qkv.weight": (48, 16, 1, 1), "proj.weight": (16, 16, 1, 1), "proj.bias": (16,)}
    if qkv_bias:
        shapes["qkv.bias"] = (48,)
    assert {name: tuple(p.shape) for name, p in module.state_dict().items()} == shapes
    assert {name for name, _ in module.named_parameters()} == set(shapes)
    assert not list(module.buffers())


def test_signature() -> None:
    parameters = inspect.signature(SuperTokenAttention).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    assert list(defaults.items()) == [
        ("dim", inspect.Parameter.empty),
        ("stoken_size", 8),
        ("n_iter", 1),
        ("num_heads", 8),
        ("qkv_bias", False),
        ("attn_drop", 0.0),
        ("proj_drop", 0.0),
        ("backend", "auto"),
        ("device", None),
        ("dtype", None),
    ]
    assert set(ops.__all__) == {
        "SuperTokenAttention",
        "can_run_triton",
        "sample_super_tokens",
        "upsample_super_tokens",
        "why_not_triton",
    }


def test_device_and_dtype() -> None:
    module = SuperTokenAttention(16, num_heads=2, qkv_bias=True, device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in module.parameters())
    assert module(torch.zeros(2, 16, 9, 14, device="meta", dtype=torch.bfloat16)).shape == (2, 16, 9, 14)


@pytest.mark.parametrize("rate", ["attn_drop", "proj_drop"])
@pytest.mark.parametrize("stoken_size", [1, 4])
def test_dropout_is_for_training(stoken_size: int, rate: str) -> None:
    module = SuperTokenAttention(16, stoken_size, num_heads=2, **{rate: 0.5})
    plain = SuperTokenAttention(16, stoken_size, num_heads=2)
    plain.load_state_dict(module.state_dict())
    x = torch.randn(2, 16, 9, 14)
    assert not torch.equal(module(x), module(x))
    assert torch.equal(module.eval()(x), plain(x))


X = torch.zeros(2, 8, 6, 6)
TOKENS, ASSOCIATION = torch.zeros(2, 8, 2, 2), torch.zeros(2, 9, 6, 6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sample_super_tokens(X[0], 3), r"\bx\b.*\[8, 6, 6\]"),
        (lambda: sample_super_tokens(X.int(), 3), r"\bx\b.*torch\.int32"),
        (lambda: sample_super_tokens(X[:, :0], 3), r"\bx\b.*one channel.*\[2, 0, 6, 6\]"),
        (lambda: upsample_super_tokens(TOKENS, ASSOCIATION.to("meta"), 3), r"same device, got cpu and meta"),
        (lambda: sample_super_tokens(X, 0), r"stoken_size.*\b0"),
        (lambda: sample_super_tokens(X, (3, 0)), r"stoken_size.*\b3(, |x)0\b"),
        (lambda: sample_super_tokens(X, (-1, 3)), r"stoken_size.*-1(, |x)3\b"),
        (lambda: sample_super_tokens(X, (3, 3, 3)), r"stoken_size.*\(3, 3, 3\)"),
        (lambda: sample_super_tokens(X, (3,)), r"stoken_size.*\(3,\)"),
        (lambda: sample_super_tokens(X, 3, backend="cuda"), r"backend.*auto, reference, triton.*'cuda'"),
        (lambda: upsample_super_tokens(TOKENS, ASSOCIATION, 3, backend=""), r"backend.*auto, reference, triton.*''"),
        (lambda: SuperTokenAttention(8, 3, num_heads=2, backend="cuda"), r"backend.*auto, reference, triton.*'cuda'"),
        (lambda: sample_super_tokens(X, 3, 0), r"n_iter.*\b0\b"),
        (lambda: upsample_super_tokens(TOKENS[0], ASSOCIATION, 3), r"tokens.*\[8, 2, 2\]"),
        (lambda: upsample_super_tokens(TOKENS.int(), ASSOCIATION, 3), r"tokens.*torch\.int32"),
        (lambda: upsample_super_tokens(TOKENS, ASSOCIATION[0], 3), r"association.*\[9, 6, 6\]"),
        (lambda: upsample_super_tokens(TOKENS, ASSOCIATION.long(), 3), r"association.*torch\.int64"),
        (lambda: upsample_super_tokens(TOKENS, ASSOCIATION[:, :8], 3), r"association.*\[2, 8, 6, 6\]"),
        (lambda: upsample_super_tokens(TOKENS, ASSOCIATION[:1], 3), r"tokens and association.*\b2 and 1\b"),
        (lambda: upsample_super_tokens(TOKENS, ASSOCIATION[:, :, :3], 3), r"tokens.*\b1x2\b.*\b3x6\b.*\b2x2\b"),
        (lambda: upsample_super_tokens(TOKENS, ASSOCIATION, 2), r"tokens.*\b3x3\b.*\b2x2\b"),
        (lambda: upsample_super_tokens(TOKENS, ASSOCIATION, (0, 3)), r"stoken_size.*\b0(, |x)3\b"),
        (lambda: upsample_super_tokens(TOKENS, ASSOCIATION, (3, 3, 3)), r"stoken_size.*\(3, 3, 3\)"),
        (lambda: SuperTokenAttention(8, 3, num_heads=3), r"dim.*\b8\b.*num_heads.*\b3\b"),
        (lambda: SuperTokenAttention(8, 3, num_heads=0), r"num_heads.*\b0\b"),
        (lambda: SuperTokenAttention(8, 0, num_heads=2), r"stoken_size.*\b0"),
        (lambda: SuperTokenAttention(8, (3, -2), num_heads=2), r"stoken_size.*\b3(, |x)-2\b"),
        (lambda: SuperTokenAttention(8, (3, 3, 3), num_heads=2), r"stoken_size.*\(3, 3, 3\)"),
        (lambda: SuperTokenAttention(8, (3,), num_heads=2), r"stoken_size.*\(3,\)"),
        (lambda: SuperTokenAttention(8, 3, n_iter=0, num_heads=2), r"n_iter.*\b0\b"),
        (lambda: SuperTokenAttention(8, 3, num_heads=2, attn_drop=1.5), r"attn_drop.*\b1\.5"),
        (lambda: SuperTokenAttention(8, 3, num_heads=2, proj_drop=-1), r"proj_drop.*-1"),
        (lambda: SuperTokenAttention(8, 3, num_heads=2)(X[0]), r"\bx\b.*\[8, 6, 6\]"),
        (lambda: SuperTokenAttention(8, 1, num_heads=2)(X[0]), r"\bx\b.*\[8, 6, 6\]"),
        (lambda: SuperTokenAttention(8, 3, num_heads=2)(X[:, :7]), r"\bx\b.*\b8\b.*\[2, 7, 6, 6\]"),
        (lambda: SuperTokenAttention(8, 3, num_heads=2)(X.int()), r"\bx\b.*torch\.int32"),
        (lambda: SuperTokenAttention(8, 1, num_heads=2)(X.int()), r"\bx\b.*torch\.int32"),
    ],
)
def test_errors(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()

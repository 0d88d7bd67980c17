"""Tests that layers behave like those of timm models."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
from timm.layers import set_fused_attn, use_fused_attn
from timm.utils import AttentionExtract
from torch import nn
from torch.func import functional_call, grad, hessian, jvp, vmap
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.utils._python_dispatch import TorchDispatchMode

import stvit
from stvit.ops import layers

MODELS = ("test_stvit", "test_convnext")
ATTENTION_MODELS = ("test_stvit", "test_vit")


def create(name: str, **kwargs: Any) -> nn.Module:
    return timm.create_model(name, num_classes=5, **kwargs).eval()


def images(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 160, 160)


def convs(model: nn.Module) -> dict[str, nn.Conv2d]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}


@pytest.fixture
def unfused() -> Iterator[None]:
    """Switches off timm's fused attention for the models that a test creates."""
    assert use_fused_attn()
    set_fused_attn(False)
    yield
    set_fused_attn(True)


class Operators(TorchDispatchMode):
    """Records the operators that reach PyTorch's dispatcher, and the dtypes of the convolutions among them."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.convolutions: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        if func is torch.ops.aten.convolution.default:
            self.convolutions.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


# Convolutions


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_forward_hooks_see_every_convolution(name: str, dtype: torch.dtype, autocast: bool) -> None:
    model = create(name).to(dtype)
    called: list[str] = []
    for key, conv in convs(model).items():
        assert type(conv) is nn.Conv2d  # tools that map types to rules, such as FLOP counters, skip subclasses
        conv.register_forward_hook(lambda *_, key=key: called.append(key))
    with Operators() as operators, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(images().to(dtype))
    assert sorted(called) == sorted(convs(model))
    assert operators.convolutions == [torch.bfloat16 if autocast else dtype] * len(called)


@pytest.mark.parametrize("name", MODELS)
def test_operators_do_not_depend_on_precision(name: str) -> None:
    def operators(dtype: torch.dtype, autocast: bool = False) -> list[str]:
        model, x = create(name).to(dtype), images().to(dtype)
        with Operators() as seen, torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            model(x)
        return [operator for operator in seen.names if operator != "aten._to_copy.default"]

    expected = operators(torch.float32)
    assert operators(torch.bfloat16) == expected
    assert operators(torch.float32, autocast=True) == expected


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "reparametrize",
    [
        lambda conv: prune.l1_unstructured(conv, "weight", 0.3),
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
    ],
    ids=["prune", "weight_norm", "spectral_norm"],
)
def test_reparametrized_convolutions_train(name: str, reparametrize: Callable[[nn.Conv2d], object]) -> None:
    model = create(name).train()
    for conv in convs(model).values():
        reparametrize(conv)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        model(images()).square().sum().backward()
        optimizer.step()
    assert any(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wide_pointwise_convolutions_are_products_in_inference(dtype: torch.dtype) -> None:
    conv = nn.Conv2d(256, 512, 1).to(dtype)
    x = torch.randn(2, 256, 7, 5).to(dtype, memory_format=torch.channels_last)

    def run(conv: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, bool]:
        with Operators() as seen:
            y = layers.pointwise(conv, x)
        torch.testing.assert_close(y, conv(x))
        assert y.stride() == conv(x).stride()
        return y, not seen.convolutions

    with torch.no_grad():
        assert run(conv, x)[1]
        assert not run(conv, x.contiguous())[1]  # a product would need a copy
        assert not run(nn.Conv2d(128, 512, 1).to(dtype), x[:, :128].contiguous(memory_format=torch.channels_last))[1]
        conv.register_forward_hook(lambda module, args, output: 2 * output)
        assert not run(conv, x)[1]
        conv._forward_hooks.clear()
    assert not run(conv, x)[1]  # with gradients
    assert run(conv.requires_grad_(False), x)[1]
    leaf = x.clone().requires_grad_()
    assert not run(conv, leaf)[1]


def test_exported_graphs_have_convolutions() -> None:
    model = stvit.optimize_for_inference(create("stvit_pico"))
    x = torch.randn(1, 3, 64, 64)
    program = torch.export.export(model, (x,))
    products = [node for node in program.graph.nodes if node.target is torch.ops.aten.linear.default]
    assert len(products) == 1  # the head


# peft needs a rank that is divisible by the groups of every convolution.
@pytest.mark.parametrize(("name", "rank"), [("test_stvit", 256), ("test_convnext", 192)])
@pytest.mark.parametrize("config", ["LoraConfig", "LoHaConfig"])
def test_adapters_on_convolutions(name: str, rank: int, config: str) -> None:
    peft = pytest.importorskip("peft")
    model, x = create(name), images()
    expected = model(x)
    targets = list(convs(model))
    adapted = peft.get_peft_model(model, getattr(peft, config)(target_modules=targets, r=rank))
    torch.testing.assert_close(adapted(x), expected)
    adapted.train()
    for _ in range(2):  # the first step moves one of the two factors away from zero
        adapted(x).square().sum().backward()
        torch.optim.SGD(adapted.parameters(), lr=1.0).step()
    gradients = {key: p.grad for key, p in adapted.named_parameters() if p.requires_grad}
    for target in targets:
        assert any(gradient.abs().sum() > 0 for key, gradient in gradients.items() if f".{target}." in key), target
    adapted.eval()
    trained = adapted(x)
    assert not torch.allclose(trained, expected)
    if config != "LoraConfig":  # peft cannot merge LoRA into depthwise convolutions
        torch.testing.assert_close(adapted.merge_and_unload()(x), trained)


# Derivatives


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_each_image(name: str) -> None:
    model, x = create(name), images()
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())

    def loss(parameters: dict[str, torch.Tensor], image: torch.Tensor) -> torch.Tensor:
        return functional_call(model, (parameters, buffers), (image[None],)).square().sum()

    gradients = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i, image in enumerate(x):
        model.zero_grad()
        model(image[None]).square().sum().backward()
        for key, p in model.named_parameters():
            torch.testing.assert_close(gradients[key][i], p.grad, rtol=1e-3, atol=1e-5 * p.grad.abs().max().item())


@pytest.mark.parametrize(("name", "kwargs"), [("test_stvit", {"stoken_size": 1}), ("test_vit", {})])
def test_gradient_penalty(name: str, kwargs: dict[str, Any], unfused: None) -> None:
    """The gradient of |gradient with respect to the images|² equals its difference quotient."""
    model, x = create(name, **kwargs).double(), images().double().requires_grad_()

    def penalty(x: torch.Tensor) -> torch.Tensor:
        gradient = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)[0]
        return gradient.square().sum()

    gradient = torch.autograd.grad(penalty(x), x)[0]
    direction, step = torch.randn_like(x), 1e-4
    quotient = (penalty(x + step * direction) - penalty(x - step * direction)) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), quotient, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ATTENTION_MODELS)
def test_derivatives_of_every_mode(name: str, unfused: None) -> None:
    model, x = create(name).double(), images(1).double()
    direction, weights = torch.randn_like(x), torch.randn(1, 5, dtype=torch.float64)
    _, tangent = jvp(model, (x,), (direction,))
    gradient = grad(lambda x: (model(x) * weights).sum())(x)
    torch.testing.assert_close((tangent * weights).sum(), (gradient * direction).sum())

    def along(t: torch.Tensor) -> torch.Tensor:
        return (model(x + t * direction) * weights).sum()

    zero = torch.zeros((), dtype=torch.float64)
    forward_over_reverse = hessian(along)(zero)
    reverse_over_reverse = grad(grad(along))(zero)
    torch.testing.assert_close(forward_over_reverse, reverse_over_reverse)
    assert reverse_over_reverse != 0
    assert grad(grad(grad(along)))(zero).isfinite()


# timm's switch for fused attention


@pytest.mark.parametrize("name", ATTENTION_MODELS)
def test_timms_switch_selects_the_attention(name: str, unfused: None) -> None:
    plain = create(name)
    set_fused_attn(True)
    fused = create(name)
    fused.load_state_dict(plain.state_dict())
    attentions = [
        [module.fused_attn for module in model.modules() if hasattr(module, "fused_attn")] for model in (fused, plain)
    ]
    assert set(attentions[0]) == {True} and set(attentions[1]) == {False}
    x = images()
    torch.testing.assert_close(plain(x), fused(x))
    torch.testing.assert_close(torch.jit.script(plain)(x), fused(x))


@pytest.mark.parametrize(
    ("dtype", "size", "train", "fused"),
    [
        (torch.bfloat16, 4, True, 0),
        (torch.float16, 14, True, 0),
        (torch.bfloat16, 15, True, 1),  # 225 tokens
        (torch.bfloat16, 4, False, 1),
        (torch.float32, 4, True, 1),
    ],
)
def test_few_tokens_in_16_bits_are_trained_without_fused_attention(
    dtype: torch.dtype, size: int, train: bool, fused: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    sdpa = F.scaled_dot_product_attention

    def count(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        return sdpa(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", count)
    module = stvit.SuperTokenAttention(16, 1, num_heads=2)
    x = torch.randn(2, 16, size, size)
    expected = torch.autograd.grad(module(x).sum(), list(module.parameters()))
    calls.clear()
    with torch.set_grad_enabled(train):
        y = module.to(dtype)(x.to(dtype))
    assert len(calls) == fused
    if train:
        for got, want in zip(torch.autograd.grad(y.float().sum(), list(module.parameters())), expected, strict=True):
            assert (got - want).norm() <= 0.02 * want.norm() + 0.02 * size**2


def test_timms_environment_variable_selects_the_attention() -> None:
    code = "import stvit; print(stvit.SuperTokenAttention(8).fused_attn)"
    environment = dict(os.environ, TIMM_FUSED_ATTN="0")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.stdout.strip() == "False", result.stderr


@pytest.mark.parametrize("name", ATTENTION_MODELS)
@pytest.mark.parametrize("method", ["hook", "fx"])
def test_attention_maps_can_be_extracted(name: str, method: str, unfused: None) -> None:
    maps = AttentionExtract(create(name), method=method)(images())
    assert maps
    for attention in maps.values():
        torch.testing.assert_close(attention.sum(dim=-1), torch.ones(attention.shape[:-1]))


@pytest.mark.parametrize("name", ATTENTION_MODELS)
@pytest.mark.parametrize("fused", [False, True])
def test_attention_dropout(name: str, fused: bool, unfused: None) -> None:
    set_fused_attn(fused)
    model, x = create(name, attn_drop_rate=0.5), images()
    assert torch.equal(model(x), model(x))
    for module in model.modules():  # other layers must not be random or keep statistics
        module.training = hasattr(module, "fused_attn") or (isinstance(module, nn.Dropout) and module.p == 0.5)
    assert not torch.equal(model(x), model(x))

"""Compares launches through `Launch` with those of Triton, with a driver that records them."""

import pytest

from tests.conftest import run_without_interpreter

pytest.importorskip("triton")

# Launches each kernel twice. `asked` lists the launches for which Triton looked up the kernel.
PROGRAM = """
import torch, triton
from tests.fake_driver import install

launches, asked, run = install(), [], triton.JITFunction.run

def count(self, *args, **kwargs):
    asked.append(self.__name__)
    return run(self, *args, **kwargs)

triton.JITFunction.run = count
from stvit.ops import kernels, layer_kernels

def describe(launch):
    return launch._replace(arguments=[
        (x.dtype, x.shape) if isinstance(x, torch.Tensor) else x for x in launch.arguments
    ])

def launched(step):
    "Runs a step and returns its launches, and the names of the kernels that Triton looked up."
    del launches[:], asked[:]
    step()
    return [describe(launch) for launch in launches], list(asked)

B, C, H, W, h, w = 2, 64, 12, 8, 4, 4
x = torch.randn(B, C, H, W).bfloat16().to(memory_format=torch.channels_last)
rows, vector, weight = x.permute(0, 2, 3, 1), torch.randn(C), torch.randn(C, 1, 3, 3)
tokens = torch.randn(B, H // h, W // w, C).bfloat16()
association = torch.rand(B, 9, H, W).bfloat16()
"""
STEPS = {
    "mean": "kernels.mean(x, h, w)",
    "associate_and_aggregate": "kernels.associate_and_aggregate(x, tokens, association, h, w, x.dtype)",
    "associate": "kernels.associate(x, tokens, association, h, w)",
    "aggregate": "kernels.aggregate(x, association, None, h, w, x.dtype)",
    "upsample": "kernels.upsample(tokens, association, None, x, h, w)",
    "depthwise": "layer_kernels.depthwise(rows, weight, vector, True)",
    "depthwise, norm": "layer_kernels.depthwise(rows, weight, vector, norm=(vector, vector, 1e-6), shift=vector)",
    "depthwise_backward": "layer_kernels.depthwise_backward(rows, rows, weight, True)",
    "norm_backward": "layer_kernels.norm_backward(rows, rows, rows, vector, 1e-6)",
    "activate": "layer_kernels.activate(rows, vector, vector, vector)",
    "activate_backward": "layer_kernels.activate_backward(rows, rows, vector)",
    "sum_rows": "layer_kernels.sum_rows(rows.flatten(0, 2))",
}


def run(program: str, **environment: str) -> None:
    """Runs a program after `PROGRAM`."""
    run_without_interpreter(PROGRAM + program, **environment)


def test_remembered_launch() -> None:
    """The second launch has the arguments of the first one, and Triton does not look up the kernel again."""
    program = """
for name, step in STEPS.items():
    step = eval("lambda: " + step)
    first, looked_up = launched(step)
    assert first and len(first) == len(looked_up), name
    assert all(launch.name == kernel for launch, kernel in zip(first, looked_up)), name
    second, looked_up = launched(step)
    assert second == first and not looked_up, name
"""
    run(f"STEPS = {STEPS!r}{program}")


def test_other_kernel() -> None:
    """Another dtype, shape or alignment of a tensor selects another compiled kernel, as in Triton."""
    run("""
def hashes(x, bias):
    launches, asked = launched(lambda: layer_kernels.activate(x, bias))
    return launches[0].hash, len(asked)

matrix = torch.randn(1, 4, 4, 64)
usual, lookups = hashes(matrix, vector)
assert lookups == 1
assert hashes(matrix, vector) == (usual, 0)
half, lookups = hashes(matrix, vector.half())
assert half != usual and lookups == 1
assert hashes(matrix, vector.half()) == (half, 0)

shifted = torch.randn(65)[1:]  # 4 bytes after an aligned address
for _ in range(2):
    unaligned, lookups = hashes(matrix, shifted)
    assert unaligned not in (usual, half) and lookups == 1
assert hashes(matrix, vector) == (usual, 0)

narrow, lookups = hashes(matrix[..., :9].contiguous(), vector[:9].clone())
assert narrow != usual and lookups == 1
bfloat16, lookups = hashes(matrix.bfloat16(), vector)
assert bfloat16 != usual and lookups == 1
""")


def test_unaligned_first_launch() -> None:
    """A kernel for unaligned tensors is not remembered for aligned ones."""
    run("""
def hashes(bias):
    launches, asked = launched(lambda: layer_kernels.activate(torch.zeros(1, 4, 4, 64), bias))
    return launches[0].hash, len(asked)

unaligned, lookups = hashes(torch.randn(65)[1:])
aligned, lookups = hashes(vector)
assert aligned != unaligned and lookups == 1
""")


COMPILED = """
import timm
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

graphs = []

def keep(graph, inputs):
    graphs.append(graph)
    return make_boxed_func(graph.forward)

def train(model, images):
    "Returns the launches of a step, without tensors."
    model(images).sum().backward()  # prepares all launches
    found, _ = launched(lambda: model(images).sum().backward())
    return sorted((x.name, x.grid, str([a for a in x.arguments if not isinstance(a, tuple)])) for x in found)

model = timm.create_model("test_stvit").to(memory_format=torch.channels_last).train()
compiled = torch.compile(model, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep), dynamic=IS_DYNAMIC)
for batch_size in (2, 5)[: 1 + IS_DYNAMIC]:
    images = torch.randn(batch_size, 3, 64, 64)
    assert train(compiled, images) == train(model, images)
targets = [str(node.target) for graph in graphs for node in graph.graph.nodes]
operators = {target.split(".")[1] for target in targets if target.startswith("stvit.")}
kernels = sum("triton_kernel_wrapper_functional" in target for target in targets)
assert (bool(operators), kernels > 0) == (not IS_INLINED, IS_INLINED), (operators, kernels)
"""


@pytest.mark.long
@pytest.mark.parametrize(("is_inlined", "is_dynamic"), [(True, False), (False, False), (True, True)])
def test_compiled_training(is_inlined: bool, is_dynamic: bool) -> None:
    """A compiled training step launches the same kernels as an eager one.

    With STVIT_OPS_INLINE=1 the graph contains the kernels, otherwise the operators.
    """
    program = f"IS_INLINED, IS_DYNAMIC = {is_inlined}, {is_dynamic}\n" + COMPILED
    run(program, STVIT_OPS_INLINE=str(int(is_inlined)))

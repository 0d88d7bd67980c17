"""Tests stvit.cuda_graphs: equal outputs, what makes a graph invalid, and when the model runs without one.

With a GPU, all tests capture real graphs. Without one, a graph records PyTorch's operations and repeats them in the
same memory.
"""

import copy
import gc
import inspect
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import stvit
from stvit import cuda_graphs
from stvit.cuda_graphs import CudaGraphs, use_cuda_graphs, why_not_cuda_graph

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
also_on_gpu: Callable[[Any], Any] = pytest.mark.gpu if HAS_GPU else lambda test: test


class RecordedGraph(TorchDispatchMode):
    """Repeats the operations of one forward pass in the same memory, as a CUDA graph does."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    @torch.inference_mode(False)
    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Stream:
    """Stands for a CUDA stream and an event."""

    def __init__(self, device: Any = None) -> None:
        self.device = device
        self.waited_for: list[Stream] = []

    def wait_stream(self, stream: "Stream") -> None:
        self.waited_for.append(stream)

    def record(self, stream: "Stream") -> None:
        pass

    def synchronize(self) -> None:
        pass


RECOVER = cuda_graphs._recover


@contextmanager
def record(graph: RecordedGraph, **_: Any) -> Iterator[None]:
    assert not gc.isenabled()  # the end of another graph would end a real capture
    with graph:
        yield


@pytest.fixture(autouse=True)
def simulation(monkeypatch: pytest.MonkeyPatch) -> Stream | None:
    """Replaces CUDA where there is no GPU, and returns the current stream."""
    monkeypatch.setenv("STVIT_OPS_BACKEND", "reference")  # compiling Triton kernels takes most of the time
    if HAS_GPU:
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
        return None
    stream = Stream()
    monkeypatch.setattr(cuda_graphs, "_DEVICE", "cpu")
    monkeypatch.setattr(cuda_graphs, "_recover", lambda pool, failed: None)
    for name, value in {
        "CUDAGraph": RecordedGraph,
        "graph": record,
        "graph_pool_handle": lambda: (0, 1),
        "Stream": Stream,
        "Event": Stream,
        "stream": lambda stream: nullcontext(),
        "device": lambda device: nullcontext(),
        "current_stream": lambda device: stream,
        "empty_cache": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return stream


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Graphs in the order of their captures."""
    made: list[Any] = []
    real = torch.cuda.CUDAGraph

    def create() -> Any:
        made.append(real())
        return made[-1]

    monkeypatch.setattr(torch.cuda, "CUDAGraph", create)
    return made


def create(cuda_graphs: bool = True, **kwargs: Any) -> Any:
    model = timm.create_model("test_stvit", **kwargs).eval().to(DEVICE)
    return stvit.optimize_for_inference(model, cuda_graphs=cuda_graphs)


def images(batch: int = 2, *size: int) -> torch.Tensor:
    return torch.randn(batch, 3, *(size or (64, 64)), device=DEVICE)


def assert_same(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


# Outputs


@also_on_gpu
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_outputs_are_equal(mode: Callable[[], Any], captures: list[Any]) -> None:
    model = create()
    plain = stvit.optimize_for_inference(model)
    batches = [images(), images(), images(1, 75, 50), images()]
    with mode():
        outputs = [model(x) for x in batches]
        expected = [plain(x) for x in batches]
    assert_same(outputs, expected)  # a later replay does not overwrite an earlier output
    assert len(captures) == 2 and outputs[0].is_inference() == (mode is torch.inference_mode)
    with torch.no_grad():  # the modes share graphs
        assert_same(model(batches[0]), expected[0])
        assert why_not_cuda_graph(model, batches[0]) == ""
    assert len(captures) == 2


@also_on_gpu
def test_feature_maps(captures: list[Any]) -> None:
    model = create(features_only=True, out_indices=(0, 2, 3))
    plain = stvit.optimize_for_inference(model)
    with torch.no_grad():
        for x in (images(), images()):
            maps = model(x)
            assert type(maps) is list
            assert_same(maps, plain(x))
    assert len(captures) == 1


class Nested(nn.Module):
    """Returns every kind of container, and constants."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor, scale: float = 1.0, *, other: torch.Tensor | None = None) -> Any:
        y = scale * self.conv(x)
        z = None if other is None else y.mean() + other
        return {"list": [y, (y[:, 0], z)], "count": 3, "max": y.max(1)}


@also_on_gpu
def test_nested_outputs_and_other_arguments(captures: list[Any]) -> None:
    model = Nested().eval().to(DEVICE)
    use_cuda_graphs(model)
    calls: list[Any] = [((images(),), {}), ((images(), 1), {}), ((images(), True), {}), ((images(), 2.0), {})]
    calls.append(((images(), 2), {"other": torch.ones(1, device=DEVICE)}))
    with torch.no_grad():
        for args, kwargs in [*calls, *calls]:
            outputs, expected = model(*args, **kwargs), type(model).forward(model, *args, **kwargs)
            assert type(outputs["max"]) is type(expected["max"]) and outputs["count"] == 3
            assert_same(tree_leaves(outputs), tree_leaves(expected))
    assert len(captures) == 5


@also_on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_has_graphs_of_its_own(dtype: torch.dtype, captures: list[Any]) -> None:
    model, x = create(), images()
    plain = stvit.optimize_for_inference(model)
    with torch.no_grad():
        for enabled in (True, False, True):
            with torch.autocast(DEVICE, dtype, enabled=enabled):
                assert model(x).dtype == (dtype if enabled else torch.float32)
                torch.testing.assert_close(model(x), plain(x), rtol=0.1, atol=0.1)
    assert len(captures) == 2


@also_on_gpu
def test_channels_last_images(captures: list[Any]) -> None:
    model, x = create(), images()
    plain = stvit.optimize_for_inference(model)
    with torch.no_grad():
        for given in (x, x.to(memory_format=torch.channels_last), x[:, :, ::2], x.flip(0).transpose(2, 3)):
            assert_same(model(given), plain(given))
    assert len(captures) == 3  # strides other than channels_last become contiguous


class Detector(nn.Module):
    """Keeps the grid of the last image size, like the heads of Ultralytics."""

    def __init__(self) -> None:
        super().__init__()
        self.shape: Any = None
        self.grid = torch.empty(0)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.shape != x.shape:
            self.grid = torch.arange(x.shape[-1], device=x.device) * 2.0
            self.shape = x.shape
        self.last = x + self.grid
        self.calls += 1
        return self.last


@also_on_gpu
def test_tensors_that_modules_keep_for_one_shape(captures: list[Any]) -> None:
    model = Detector().eval()
    use_cuda_graphs(model)
    small, large = images(1, 8, 8), images(1, 8, 16)
    with torch.no_grad():
        for x in (small, large, small, large):
            filler = [torch.full((n,), 7.0, device=DEVICE) for n in (8, 16)]  # takes memory that was freed
            assert_same(model(x), x + 2.0 * torch.arange(x.shape[-1], device=DEVICE))
            del filler
        # The module keeps no memory of a graph, whose values change.
        kept = model.last.clone()
        model(large + 1)
        assert torch.equal(model.last, kept)
        assert_same(model.forward.plain(small), small + 2.0 * torch.arange(8, device=DEVICE))
    assert len(captures) == 2


@also_on_gpu
@pytest.mark.parametrize("end2end", [True, False])
def test_detector(end2end: bool, captures: list[Any]) -> None:
    pytest.importorskip("ultralytics", exc_type=ImportError)
    from stvit.adapters.yolo import YOLO

    detector = YOLO("yolo26n-stvit_pico.yaml").model.eval()
    detector.end2end = end2end
    detector = detector.fuse(verbose=False).eval().requires_grad_(False).to(DEVICE)
    model = copy.deepcopy(detector)
    use_cuda_graphs(model)
    with torch.no_grad():
        for size in ((64, 64), (64, 96), (64, 64), (64, 96)):
            x = images(1, *size).sigmoid()
            outputs, expected = model(x, augment=False, embed=None), detector(x)
            assert_same(tree_leaves(outputs), tree_leaves(expected))
            assert why_not_cuda_graph(model, x, augment=False, embed=None) == ""
    assert len(captures) == 2


@also_on_gpu
def test_the_least_recently_used_graph_is_replaced(captures: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", 2)
    model = create()
    plain = stvit.optimize_for_inference(model)
    with torch.no_grad():
        for batch, graphs in ((1, 1), (2, 2), (1, 2), (3, 3), (1, 3), (2, 4)):
            x = images(batch)
            assert_same(model(x), plain(x))
            assert len(captures) == graphs
    made = [weakref.ref(graph) for graph in captures]
    captures.clear()
    gc.collect()
    assert sum(graph() is not None for graph in made) == 2


@also_on_gpu
def test_threads(captures: list[Any]) -> None:
    model = create()
    plain = stvit.optimize_for_inference(model)
    given = [images(1 + i % 2) for i in range(8)]
    outputs: dict[int, torch.Tensor] = {}

    def work(start: int) -> None:
        with torch.no_grad():
            for i in range(start, 8, 4):
                outputs[i] = model(given[i])

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with torch.no_grad():
        for i, x in enumerate(given):
            assert_same(outputs[i], plain(x))
    assert len(captures) == 2


# Changed models


def replace_data(model: Any) -> None:
    model.head.fc.weight.data = 2 * model.head.fc.weight


def replace_parameter(model: Any) -> None:
    model.head.fc.weight = nn.Parameter(2 * model.head.fc.weight, requires_grad=False)


def replace_module(model: Any) -> None:
    model.head.fc = nn.Linear(model.head.fc.in_features, 7, device=DEVICE).eval()


def load_others(model: Any) -> None:
    model.load_state_dict({name: x + 0.01 for name, x in model.state_dict().items()})


def assign_others(model: Any) -> None:
    model.load_state_dict({name: x + 0.01 for name, x in model.state_dict().items()}, assign=True)


@also_on_gpu
@pytest.mark.parametrize("change", [replace_data, replace_parameter, replace_module, load_others, assign_others])
def test_changed_weights(change: Callable[[Any], None], captures: list[Any]) -> None:
    model, x = create(), images()
    with torch.no_grad():
        before = model(x)
        change(model)
        expected = model.forward.plain(x)
        for _ in range(3):
            assert_same(model(x), expected)
        assert before.shape != expected.shape or not torch.allclose(before, expected)
        assert why_not_cuda_graph(model, x) == ""
    assert len(captures) == 2


@also_on_gpu
def test_casts(captures: list[Any]) -> None:
    model, x = create(), images()
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16, torch.float32):
            model.to(dtype)
            for _ in range(3):
                y = model(x.to(dtype))
                assert y.dtype == dtype
            expected = model.forward.plain(x.to(dtype))
            torch.testing.assert_close(y, expected, rtol=1e-2, atol=1e-4 if dtype == torch.float32 else 1e-2)
    assert len(captures) == 3


@also_on_gpu
def test_weights_that_change_on_every_call_are_never_captured(captures: list[Any]) -> None:
    model, x = create(), images()
    with torch.no_grad():
        model(x)
        for scale in (1.0, 1.01, 1.02):  # much larger weights would amplify rounding errors
            weights = {name: scale * p for name, p in model.named_parameters()}
            y = torch.func.functional_call(model, weights, (x,))
            assert_same(y, torch.func.functional_call(stvit.optimize_for_inference(model), weights, (x,)))
    assert len(captures) == 1


@also_on_gpu
def test_hooks_and_training_mode(captures: list[Any]) -> None:
    model, x = create(), images()
    fc = model.head.fc
    with torch.no_grad():
        before = model(x)
        handle = fc.register_forward_hook(lambda module, args, output: 2 * output)
        assert why_not_cuda_graph(model, x) == "a forward hook of a module must run"
        assert_same(model(x), 2 * before)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(captures[0]), "replay", lambda self: pytest.fail("a replay for nothing"))
            assert_same(model(x), 2 * before)
        handle.remove()
        assert_same(model(x), before)
        handle = model.register_forward_hook(lambda module, args, output: 3 * output)  # runs outside the graph
        assert_same(model(x), 3 * before)
        assert why_not_cuda_graph(model, x) == ""
        handle.remove()
        handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
        assert why_not_cuda_graph(model, x) == "a global forward hook must run"
        handle.remove()
        model.stages[0].train()
        assert why_not_cuda_graph(model, x) == "a module is in training mode; call model.eval()"
        model(x)
        model.eval()
        assert_same(model(x), before)
    assert len(captures) == 1


@also_on_gpu
def test_clear_and_remove(captures: list[Any]) -> None:
    model, x = create(), images()
    with torch.no_grad():
        expected = model(x)
        model.forward.clear()
        assert_same(model(x), expected)
        assert len(captures) == 2
        use_cuda_graphs(model, False)
        assert_same(model(x), expected)
    assert "forward" not in vars(model) and len(captures) == 2
    assert why_not_cuda_graph(model, x) == "the model was not optimized with cuda_graphs=True"


@also_on_gpu
def test_a_replaced_forward_method_is_kept(captures: list[Any]) -> None:
    model, x = create(cuda_graphs=False), images()
    with torch.no_grad():
        expected = 2 * model(x)
        model.forward = lambda x: 2 * type(model).forward(model, x)
        use_cuda_graphs(model)
        for _ in range(2):
            assert_same(model(x), expected)
        use_cuda_graphs(model, False)
        assert_same(model(x), expected)
    assert len(captures) == 1


@also_on_gpu
def test_a_deleted_model_is_free_at_once() -> None:
    gc.collect()
    gc.disable()
    try:
        model = create()
        with torch.no_grad():
            model(images())
        reference = weakref.ref(model.head.fc.weight)
        del model
        assert reference() is None
    finally:
        gc.enable()


# Calls without a graph


@also_on_gpu
def test_reasons(captures: list[Any]) -> None:
    model, x = create(), images()
    for given, reason in (
        ((torch.zeros(2, 3, 64, 64, device="meta"),), f"argument 0 is on meta, expected {DEVICE}"),
        (([x],), "argument 0 is a list, expected a tensor, a number, a string or None"),
        ((), "no argument is a tensor"),
        ((x[:0],), "argument 0 is empty"),
        ((x.to_sparse(),), "argument 0 is a Tensor (torch.sparse_coo), expected a dense tensor"),
        ((x.clone().requires_grad_(),), "gradients of argument 0 are needed; call the model under torch.no_grad()"),
    ):
        assert why_not_cuda_graph(model, *given) == reason
    assert why_not_cuda_graph(model, x) == ""  # optimized weights need no gradients
    model.requires_grad_()
    assert why_not_cuda_graph(model, x) == "gradients of the weights are needed; call the model under torch.no_grad()"
    leaf = images().requires_grad_()
    model(leaf).sum().backward()
    assert leaf.grad is not None
    with torch.no_grad():
        assert why_not_cuda_graph(model, leaf) == ""
        with torch.autograd.forward_ad.dual_level():
            assert why_not_cuda_graph(model, x) == "forward-mode differentiation is active"
        with RecordedGraph():
            assert why_not_cuda_graph(model, x) == "a TorchDispatchMode must see each operation"
    reasons = []
    torch.func.vmap(lambda x: reasons.append(why_not_cuda_graph(model, x)) or x)(x)
    assert reasons == ["a transform of torch.func (grad, vmap, jvp, …) is active"]
    assert captures == []


@also_on_gpu
def test_weights_on_another_device() -> None:
    model = create()
    model.head.fc.weight = nn.Parameter(model.head.fc.weight.to("meta"))
    reason = why_not_cuda_graph(model, images())
    assert reason.startswith("the input is on ") and reason.endswith(", meta, expected one device")


@pytest.mark.skipif(HAS_GPU, reason="the model is on a GPU")
def test_on_a_cpu_the_model_runs_as_usual(monkeypatch: pytest.MonkeyPatch, captures: list[Any]) -> None:
    monkeypatch.setattr(cuda_graphs, "_DEVICE", "cuda")
    model, x = create(), images()
    assert why_not_cuda_graph(model, x) == "argument 0 is on cpu, expected cuda"
    with torch.no_grad():
        assert torch.equal(model(x), create(cuda_graphs=False)(x)) or captures == []


class ReadsValues(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.last = 0.0
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> Any:
        if self.way == "first call":  # makes something that later calls use
            self.last = self.last or x.sum().item()
            return x + self.last
        if self.way == "value":
            return x + (1 if x.sum() > 0 else 2)
        if self.way == "shape":
            return x[x > 0]
        if self.way == "buffer":
            self.count.add_(1)
            return x + self.count
        return [x, inspect.signature(len)]


@also_on_gpu
@pytest.mark.parametrize(
    ("way", "reason"),
    [
        ("value", "the forward pass reads a tensor on the CPU (aten."),
        ("shape", "the forward pass has shapes that depend on values (aten.index.Tensor)"),
        ("buffer", "the forward pass changes weights, buffers or modules"),
        ("object", "the model returns a Signature, which cannot be copied"),
    ],
)
def test_models_that_cannot_be_captured(way: str, reason: str, captures: list[Any], simulation: Stream | None) -> None:
    model = ReadsValues(way).eval().to(DEVICE)
    use_cuda_graphs(model)
    x = images()
    with torch.no_grad():
        for _ in range(2):
            output = model(x)
            if simulation is not None:  # the warm-up ran on another stream
                assert simulation.waited_for == [model.forward._stream]
            if way in ("value", "shape"):
                assert torch.equal(output, model.forward.plain(x))
        if way != "buffer":
            assert why_not_cuda_graph(model, x).startswith(reason)
        else:
            count = model.count.item()
            model(x)
            assert model.count.item() == count + 1 or captures == []
    assert captures == []


@also_on_gpu
@pytest.mark.parametrize("during", ["warm-up", "capture"])
def test_missing_memory(during: str, captures: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, small = create(), images(), images(1)
    with torch.no_grad():
        expected = model(small), model(x)
        model.forward.clear()
        model(small)
        calls = iter(range(100))
        fails = {"warm-up": 0, "capture": cuda_graphs.WARM_UPS}[during]
        hungry = type(model).forward

        def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
            if next(calls) == fails:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return hungry(self, x)

        monkeypatch.setattr(type(model), "forward", forward)
        assert_same(model(x), expected[1])
        reason = "the GPU has too little memory for a graph (CUDA out of memory. Tried to allocate 2.00 GiB.)"
        assert why_not_cuda_graph(model, x) == reason
        assert_same([model(small), model(x)], expected)
        assert why_not_cuda_graph(model, small) == ""  # its graph was released, and captured again
    assert len(captures) == (4 if during == "warm-up" else 5)


def test_later_captures_use_other_memory_than_a_failed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch refuses a second capture into the memory of a failed one.

    The models of a GPU are in tests/test_gpu.py.
    """
    pools: list[Any] = []

    @contextmanager
    def fail_once(graph: RecordedGraph, pool: Any = None, **_: Any) -> Iterator[None]:
        pools.append(pool)
        yield
        if len(pools) == 2:
            raise RuntimeError("operation not permitted when stream is capturing")

    handles = ((0, number) for number in range(1, 100))
    ended: list[Any] = []
    monkeypatch.setattr(cuda_graphs, "_recover", RECOVER)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *pool: ended.append(pool), raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *pool: ended.append(pool), raising=False)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
    monkeypatch.setattr(torch.cuda, "graph", fail_once)
    model = create()
    with torch.no_grad():
        for batch in (1, 2, 3):
            model(images(batch))
        assert [why_not_cuda_graph(model, images(batch)) for batch in (1, 3)] == ["", ""]
        assert why_not_cuda_graph(model, images(2)).startswith("the capture failed (operation not permitted ")
    assert pools == [(0, 1), (0, 1), None, (0, 2)]  # the third one resets PyTorch's generator
    assert ended == [(None, (0, 1))] * 2


@pytest.mark.skipif(not cuda_graphs._HAS_LOCKED_WORKSPACES, reason="this PyTorch has no lock for its workspaces")
def test_each_capture_has_a_workspace_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    @contextmanager
    def log(graph: RecordedGraph, **_: Any) -> Iterator[None]:
        events.append("capture")
        with graph:
            yield
        events.append("end")

    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: events.append("clear"), raising=False)
    monkeypatch.setattr(torch.cuda, "graph", log)
    with torch.no_grad():
        create()(images())
    assert events == ["clear", "capture", "end", "clear"]


@also_on_gpu
def test_errors_of_the_model_are_its_own() -> None:
    model = create()
    with torch.no_grad():
        with pytest.raises(RuntimeError, match=r"to have 3 channels, but got 5 channels"):
            model(torch.zeros(1, 5, 64, 64, device=DEVICE))
        model(images())


@also_on_gpu
def test_the_first_call_may_read_values(captures: list[Any]) -> None:
    model = ReadsValues("first call").eval().to(DEVICE)
    use_cuda_graphs(model)
    x = images()
    with torch.no_grad():
        for _ in range(2):
            assert_same(model(x), x + x.sum())
    assert len(captures) == 1


# The model stays the same


@also_on_gpu
@pytest.mark.parametrize("make", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_graphs_of_their_own(make: Callable[[Any], Any], captures: list[Any]) -> None:
    model, x = create(), images()
    with torch.no_grad():
        expected = model(x)
        copied = make(model)
        model.head.fc.weight.zero_()
        assert_same(copied(x), expected)
        assert why_not_cuda_graph(copied, x) == ""
        assert copied.forward is not model.forward and copied.forward._model() is copied
        assert len(captures) == 2
        assert_same(copied(x), expected)
        model(x)
    plain = create(cuda_graphs=False)
    assert list(copied.state_dict()) == list(plain.state_dict()) and type(copied) is type(plain)
    assert str(copied) == str(plain)
    assert inspect.signature(copied.forward) == inspect.signature(plain.forward)


@also_on_gpu
def test_optimizing_again() -> None:
    model = create()
    assert isinstance(stvit.optimize_for_inference(model, cuda_graphs=True).forward, CudaGraphs)
    assert "forward" not in vars(stvit.optimize_for_inference(model))
    assert isinstance(model.forward, CudaGraphs)


def scripted(model: nn.Module, x: torch.Tensor) -> Callable[..., Any]:
    return torch.jit.script(model)


def traced(model: nn.Module, x: torch.Tensor) -> Callable[..., Any]:
    return torch.jit.trace(model, x, check_trace=False)


def exported(model: nn.Module, x: torch.Tensor) -> Callable[..., Any]:
    shapes = {"x": {0: torch.export.Dim("batch", max=64)}}
    return torch.export.export(model, (x,), dynamic_shapes=shapes, strict=False).module()


def exported_strictly(model: nn.Module, x: torch.Tensor) -> Callable[..., Any]:
    return torch.export.export(model, (x,), strict=True).module()


def compiled(model: nn.Module, x: torch.Tensor) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(model, backend="aot_eager", fullgraph=True)


@also_on_gpu
@pytest.mark.parametrize("is_used", [pytest.param(False, marks=pytest.mark.long), True])
@pytest.mark.parametrize("through", [scripted, traced, exported, exported_strictly, compiled])
def test_exporters_see_the_original_method(
    through: Callable[..., Callable[..., Any]], is_used: bool, captures: list[Any]
) -> None:
    model, x = create(), images()
    with torch.no_grad():
        expected = model.forward.plain(x)
        if is_used:
            model(x)
        other = through(model, x)
        assert_same(other(x), expected)
        assert len(captures) == is_used
        assert_same(model(x), expected)
        assert why_not_cuda_graph(model, x) == ""

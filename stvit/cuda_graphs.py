"""Replays the forward pass of a model as a CUDA graph.

A forward pass of a small batch takes as long as Python needs to launch its kernels. A CUDA graph launches all of them
at once. `stvit.optimize_for_inference(model, cuda_graphs=True)` uses this module.

The first call with inputs of a new kind captures a graph: it runs the forward pass three times and takes up to a few
seconds. Inputs are of one kind if their shapes, dtypes and memory formats, the autocast state and the arguments that
are not tensors are equal. Later calls copy the inputs, replay the graph, and return copies of the outputs.

- The model must have the same values in the same order on every call: it must not read tensors on the CPU, and its
  outputs must depend on tensors only. Models with such reads run as usual.
- Replaced weights, buffers and modules are noticed, and graphs are captured again. Other settings are not noticed:
  attributes of modules, and settings of PyTorch such as TF32. Call `model.forward.clear()` after changing them. It also
  releases the memory of the graphs and of replaced weights, which the next call would do.
- Replays of one model never overlap. A replay follows the work of the stream that is current when the model is called,
  and the previous replay, on whichever stream that was. Any number of threads can call the model. While one of them
  captures, the others must not synchronize the device.
"""

import gc
import inspect
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

__all__ = ["CudaGraphs", "use_cuda_graphs", "why_not_cuda_graph"]

# Graphs of one model. A new one replaces the least recently used.
MAX_GRAPHS = 8
# Forward passes before a capture. The first initializes libraries, compiles kernels, and may fill caches of the model.
WARM_UPS = 2

# Tests simulate graphs on another device.
_DEVICE = "cuda"
_PLAIN_TENSORS = (torch.Tensor, nn.Parameter, nn.Buffer)
_CONSTANTS = (type(None), bool, int, float, str)


def use_cuda_graphs(model: nn.Module, enabled: bool = True) -> None:
    """Makes a model replay CUDA graphs, or restores its own forward method.

    The class, the state dict and the other methods of the model do not change. Copies and pickled models have graphs
    of their own. TorchScript, torch.compile and exporters see the original forward method.

    Args:
        model: Model in evaluation mode.
        enabled: Whether to use graphs.
    """
    graphs = model.__dict__.get("forward")
    if isinstance(graphs, CudaGraphs):
        graphs.remove()
    if enabled:
        graphs = CudaGraphs(model)
        model.__dict__["forward"] = graphs
        model.__dict__["__prepare_scriptable__"] = graphs.plain_model


def why_not_cuda_graph(model: nn.Module, *args: Any, **kwargs: Any) -> str:
    """Returns why a call of a model does not replay a CUDA graph, or "" if it does.

    Some reasons are known only after the first call with such arguments. A graph needs CUDA tensors, a model in
    evaluation mode without forward hooks, and no gradients. It is not used inside another capture, torch.compile,
    export, tracing or the transforms of torch.func.

    Args:
        model: Result of `optimize_for_inference(model, cuda_graphs=True)`.
        *args: Arguments of the model.
        **kwargs: Keyword arguments of the model.
    """
    graphs = model.__dict__.get("forward")
    if not isinstance(graphs, CudaGraphs):
        return "the model was not optimized with cuda_graphs=True"
    return graphs.why_not(*args, **kwargs)


class CudaGraphs:
    """Forward method of one model that captures and replays CUDA graphs.

    It refers to the model weakly, so that the memory of a deleted model is free at once.
    """

    def __init__(self, model: nn.Module) -> None:
        """Captures nothing yet.

        Args:
            model: The model. Its present forward method is called where no graph can be used.
        """
        self.__setstate__({"model": model, "inner": model.__dict__.get("forward")})

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self._model(), "inner": self._inner}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._model = weakref.ref(state["model"])
        self._inner = state["inner"]
        self._lock = threading.Lock()
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._refused: dict[Hashable, str] = {}
        self._state: _State | None = None
        self._is_paused = False  # whether the last call could not use a graph, for example because of a hook
        self._pool: _Pool | None = None
        # Captures of one model use one stream, because PyTorch keeps freed memory for each stream.
        self._stream: torch.cuda.Stream | None = None

    @property
    def _original(self) -> Any:
        model: Any = self._model()
        return type(model).forward if self._inner is None else self._inner

    # Exporters read the signature and the code of a forward method.

    @property
    def __signature__(self) -> inspect.Signature:
        signature = inspect.signature(self._original)
        skipped = int(self._inner is None)  # self
        return signature.replace(parameters=list(signature.parameters.values())[skipped:])

    @property
    def __code__(self) -> Any:
        return self._original.__code__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model."""
        if torch.compiler.is_compiling():
            return self.plain(*args, **kwargs)
        if _why_not_here():
            return self.plain(*args, **kwargs)
        if _why_not_arguments(args, kwargs):
            self._release_if_moved()
            return self.plain(*args, **kwargs)
        with self._lock:
            outputs = self._replay(args, kwargs)
        return self.plain(*args, **kwargs) if outputs is None else outputs[0]

    def plain(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model without a graph."""
        if self._inner is not None:
            return self._inner(*args, **kwargs)
        model: Any = self._model()
        return type(model).forward(model, *args, **kwargs)

    def plain_model(self) -> nn.Module:
        """Returns a shallow copy of the model that has the original forward method."""
        model: Any = self._model()
        copied = model.__new__(type(model))
        copied.__dict__.update(model.__dict__)
        _restore(copied, self._inner)
        return copied

    def remove(self) -> None:
        """Releases all graphs, and restores the forward method of the model."""
        self.clear()
        _restore(self._model(), self._inner)

    def clear(self) -> None:
        """Releases all graphs and their memory.

        The next call captures a new one.
        """
        with self._lock:
            self._clear()

    def why_not(self, *args: Any, **kwargs: Any) -> str:
        """Returns why a call does not replay a graph, see `why_not_cuda_graph`."""
        reason = _why_not_here() or _why_not_arguments(args, kwargs)
        if reason:
            return reason
        model: Any = self._model()
        return _State(model).why_not(_tensors(args, kwargs)) or self._refused.get(_kind(args, kwargs), "")

    def _replay(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any] | None:
        """Returns the outputs in a tuple; None if no graph can be used."""
        kind, tensors = _kind(args, kwargs), _tensors(args, kwargs)
        graph = None if self._is_paused else self._graphs.get(kind)
        outputs = None if graph is None else (graph.replay(tensors),)
        # The comparison takes a tenth of a millisecond. It runs while the GPU computes. A graph keeps the memory that
        # it reads, so its result can be thrown away.
        if self._state is not None and not self._state.is_current():
            # Weights that change on every call must not cause a capture on every call: wait for the next one.
            self._clear()
            self._remember()
            return None
        state = self._state or self._remember()
        self._is_paused = bool(state.why_not(tensors))
        if self._is_paused or kind in self._refused:
            return None
        if outputs is None:
            graph = self._graphs.get(kind) or self._capture(kind, args, kwargs)
            outputs = None if graph is None else (graph.replay(tensors),)
        if graph is not None:
            self._graphs.move_to_end(kind)
        return outputs

    def _capture(self, kind: Hashable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "_Graph | None":
        """Returns a new graph; None if the model cannot be captured."""
        assert self._state is not None
        device = _tensors(args, kwargs)[0].device
        if self._pool is not None and self._pool.device != device:  # only a model without weights runs on two devices
            self._release()
        while len(self._graphs) >= MAX_GRAPHS:
            self._graphs[next(iter(self._graphs))].wait()
            self._graphs.popitem(last=False)
        if self._stream is None or self._stream.device != device:
            self._stream = torch.cuda.Stream(device)
        if self._pool is None or not self._graphs:
            self._pool = _Pool(device, self._stream)
        try:
            self._graphs[kind] = _Graph(self, self._state, self._pool, args, kwargs)
            return self._graphs[kind]
        except _Refused as refused:
            reason, needs_memory = str(refused), refused.needs_memory
        except torch.OutOfMemoryError as error:
            reason, needs_memory = f"the GPU has too little memory for a graph ({_first_line(error)})", True
        # Here the exception no longer refers to tensors of the forward pass.
        if len(self._refused) >= 100 * MAX_GRAPHS:
            self._refused.clear()
        self._refused[kind] = reason
        if needs_memory:
            self._release()
            torch.cuda.empty_cache()
        return None

    def _remember(self) -> "_State":
        model: Any = self._model()
        self._state = _State(model)
        return self._state

    def _release_if_moved(self) -> None:
        """Releases the graphs of a model after, for example, `model.cpu()`."""
        if self._state is not None and not self._state.is_current():
            self.clear()

    def _release(self) -> None:
        """Releases all graphs and their memory."""
        for graph in self._graphs.values():
            graph.wait()
        self._graphs.clear()
        self._pool = None

    def _clear(self) -> None:
        self._release()
        self._refused.clear()
        self._state = None


def _restore(model: nn.Module | None, forward: Any) -> None:
    """Restores the forward method of a model."""
    if model is None:
        return
    for name in ("forward", "__prepare_scriptable__"):
        model.__dict__.pop(name, None)
    if forward is not None:
        model.__dict__["forward"] = forward


# ---------------------------------------------------------------------------------------------------------------------
# When graphs can be used

_THREAD = threading.local()


def _is_busy() -> bool:
    return getattr(_THREAD, "is_capturing", False)


@contextmanager
def _busy() -> Iterator[None]:
    """Marks this thread as capturing.

    Models inside the captured model then run as usual.
    """
    _THREAD.is_capturing = True
    try:
        yield
    finally:
        _THREAD.is_capturing = False


def _why_not_here() -> str:
    """Returns why no graph can be used in the present context, or "" if one can."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return "the model is being compiled, exported or traced"
    # PyTorch has no public functions for the next two.
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func (grad, vmap, jvp, …) is active"
    if torch._C._len_torch_dispatch_stack():
        return "a TorchDispatchMode must see each operation"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    if nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks:
        return "a global forward hook must run"
    if _is_busy() or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()):
        return "a capture is already under way"
    return ""


def _why_not_arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Returns why arguments cannot be copied to a graph, or "" if they can."""
    tensors = _tensors(args, kwargs)
    for name, value in chain(enumerate(args), kwargs.items()):
        if isinstance(value, torch.Tensor):
            if type(value) not in _PLAIN_TENSORS or value.layout is not torch.strided:
                return f"argument {name} is a {type(value).__name__} ({value.layout}), expected a dense tensor"
            if value.device.type != _DEVICE:
                return f"argument {name} is on {value.device}, expected {_DEVICE}"
            if value.device != tensors[0].device:
                return f"the arguments are on {tensors[0].device} and {value.device}, expected one device"
            if value.numel() == 0:
                return f"argument {name} is empty"
            if value.requires_grad and torch.is_grad_enabled():
                return f"gradients of argument {name} are needed; call the model under torch.no_grad()"
        elif type(value) not in _CONSTANTS:
            return f"argument {name} is a {type(value).__name__}, expected a tensor, a number, a string or None"
    return "" if tensors else "no argument is a tensor"


def _tensors(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    return [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]


def _kind(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Hashable:
    """Returns everything about a call that a graph is captured for."""
    values = (
        (value.shape, value.dtype, value.device, _memory_format(value))
        if isinstance(value, torch.Tensor)
        else (type(value), value)  # 1, 1.0 and True are equal
        for value in (*args, *kwargs.values())
    )
    dtype = torch.get_autocast_dtype(_DEVICE) if torch.is_autocast_enabled(_DEVICE) else None
    return (*values, *kwargs, dtype)


def _memory_format(x: torch.Tensor) -> torch.memory_format:
    """Returns the memory format of the copy of an input in a graph."""
    if x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


class _State:
    """Modules, weights and buffers of a model at one moment."""

    def __init__(self, model: nn.Module) -> None:
        # The attributes of the model refer to this object. A cycle would delay the end of a deleted model.
        self._model = weakref.ref(model)
        self._submodules = [module.__dict__ for module in model.modules() if module is not model]
        self._members = list(_members(self._modules()))
        self._tensors = [member for member in self._members if isinstance(member, torch.Tensor)]
        self._devices = {x.device for x in self._tensors if x.dim() > 0 or x.device.type == _DEVICE}
        self.unusual = sorted({type(x).__name__ for x in self._tensors if type(x) not in _PLAIN_TENSORS})
        if self.unusual:
            return
        self._pointers = list(map(torch.Tensor.data_ptr, self._tensors))
        self._versioned = [x for x in self._tensors if not x.is_inference()]
        self._versions = [x._version for x in self._versioned]
        # While a graph exists, no other tensor may take the memory that it reads. This holds for weights, and for
        # tensors that modules keep between calls, such as the anchors of a detector.
        with torch.inference_mode(False), torch.no_grad():
            self._memory = [x.detach() for x in self._tensors]

    def _modules(self) -> list[dict[str, Any]]:
        """Returns the attributes of each module. The first is the model."""
        model: Any = self._model()
        return [model.__dict__, *self._submodules]

    def is_current(self) -> bool:
        """Returns whether the model still has the same modules, weights and buffers."""
        members = list(_members(self._modules()))
        if len(members) != len(self._members) or not all(map(is_, members, self._members)):
            return False
        # A module that stores a result in place would change it in each forward pass. Kernels may also have prepared
        # copies of the weights, so changed values count, too.
        return bool(self.unusual) or (
            list(map(torch.Tensor.data_ptr, self._tensors)) == self._pointers
            and [x._version for x in self._versioned] == self._versions
        )

    def why_not(self, inputs: Sequence[torch.Tensor]) -> str:
        """Returns why the model cannot be captured for inputs, or "" if it can."""
        if self.unusual:
            return f"the model has weights of type {self.unusual[0]}, expected plain tensors"
        if self._devices - {inputs[0].device}:
            devices = ", ".join(sorted(map(str, self._devices)))
            return f"the input is on {inputs[0].device} and the weights are on {devices}, expected one device"
        if torch.is_grad_enabled() and any(x.requires_grad for x in self._tensors):
            return "gradients of the weights are needed; call the model under torch.no_grad()"
        for i, own in enumerate(self._modules()):
            if own["training"]:
                return "a module is in training mode; call model.eval()"
            if i and (own["_forward_hooks"] or own["_forward_pre_hooks"]):  # the model's own hooks run outside
                return "a forward hook of a module must run"
        return ""

    def attributes(self) -> list[dict[str, Any]]:
        """Returns a shallow copy of the attributes of each module."""
        return [dict(own) for own in self._modules()]

    def restore(self, attributes: Sequence[dict[str, Any]]) -> None:
        """Sets the attributes of all modules to those that `attributes` returned."""
        for own, saved in zip(self._modules(), attributes, strict=True):
            for name in own.keys() - saved.keys():
                del own[name]
            for name, value in saved.items():
                if own.get(name) is not value:
                    own[name] = value


def _members(modules: Sequence[dict[str, Any]]) -> Iterator[Any]:
    """Yields the submodules, weights and buffers in the attributes of modules."""
    for own in modules:
        yield from own["_parameters"].values()
        yield from own["_buffers"].values()
        yield from own["_modules"].values()


# ---------------------------------------------------------------------------------------------------------------------
# Capture and replay

# PyTorch supports one capture at a time: each begins by synchronizing the device, which would end another.
_CAPTURE = threading.Lock()


class _Refused(Exception):
    """Raised when a model cannot be captured. The message is the reason.

    Args:
        reason: The reason.
        needs_memory: Whether memory was missing.
    """

    def __init__(self, reason: str, needs_memory: bool = False) -> None:
        super().__init__(reason)
        self.needs_memory = needs_memory


class _Pool:
    """Memory that the graphs of a model share, and the order of their replays.

    Graphs may share memory because their replays never overlap and their outputs are copied at once.
    """

    def __init__(self, device: torch.device, stream: torch.cuda.Stream) -> None:
        self.device = device
        self.handle = torch.cuda.graph_pool_handle()
        self.stream = stream  # freed memory is only used again on the same stream
        self._done = torch.cuda.Event()
        self._last: torch.cuda.Stream | None = None

    @contextmanager
    def turn(self) -> Iterator[torch.cuda.Stream]:
        """Context of a replay on the current stream, which waits for the previous replay."""
        stream = torch.cuda.current_stream(self.device)
        if self._last is not None and self._last != stream:
            stream.wait_event(self._done)
        try:
            yield stream
        finally:
            self._done.record(stream)
            self._last = stream

    def wait(self) -> None:
        """Waits for the last replay."""
        if self._last is not None:
            self._done.synchronize()


class _Graph:
    """CUDA graph of the forward pass for one kind of inputs."""

    def __init__(
        self, graphs: CudaGraphs, state: _State, pool: _Pool, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Captures a forward pass.

        Args:
            graphs: The model's forward method.
            state: State of the model.
            pool: Memory of the graph.
            args: Arguments of the model.
            kwargs: Keyword arguments of the model.

        Raises:
            _Refused: If the model cannot be captured.
            torch.OutOfMemoryError: If the GPU has too little memory.
        """
        self._pool = pool
        dtype, enabled = torch.get_autocast_dtype(_DEVICE), torch.is_autocast_enabled(_DEVICE)
        with (
            _CAPTURE,
            _busy(),
            torch.cuda.device(pool.device),
            torch.inference_mode(False),  # the graph outlives the present mode
            torch.no_grad(),
            # Weights that autocast has converted before are freed at the end of the user's context.
            torch.autocast(_DEVICE, dtype=dtype, enabled=enabled, cache_enabled=False),
        ):
            self._arguments = [_static(value) for value in args]
            self._keywords = {name: _static(value) for name, value in kwargs.items()}
            self._inputs = _tensors(tuple(self._arguments), self._keywords)
            self._streams = {torch.cuda.current_stream(pool.device)}
            for static, x in zip(self._inputs, _tensors(args, kwargs), strict=True):
                static.copy_(x)
            pool.wait()
            pool.stream.wait_stream(torch.cuda.current_stream(pool.device))
            try:
                with torch.cuda.stream(pool.stream):  # torch.cuda.graph does not restore the stream after an error
                    outputs = self._warm_up(graphs, state)
                    attributes = state.attributes()
                    # Tensors that modules made in the warm-up; the graph reads them.
                    self._memory = [x for x in tree_leaves(attributes) if isinstance(x, torch.Tensor)]
                    del outputs
                    try:
                        outputs = self._capture(graphs)
                    finally:
                        # Tensors that modules made in the capture have no values outside a replay.
                        state.restore(attributes)
            finally:
                # Also without a graph: the next call reads what modules keep from the warm-up.
                torch.cuda.current_stream(pool.device).wait_stream(pool.stream)
        self._outputs, self._spec = outputs

    def _forward(self, graphs: CudaGraphs) -> Any:
        return graphs.plain(*self._arguments, **self._keywords)

    def _warm_up(self, graphs: CudaGraphs, state: _State) -> tuple[list[Any], TreeSpec]:
        """Runs the forward pass, and returns its outputs.

        Raises:
            _Refused: If it does something that cannot be captured.
        """
        for _ in range(WARM_UPS - 1):
            self._forward(graphs)
        with _Watch():
            outputs = tree_flatten(self._forward(graphs))
        for leaf in outputs[0]:
            if not isinstance(leaf, (torch.Tensor, *_CONSTANTS)):
                raise _Refused(f"the model returns a {type(leaf).__name__}, which cannot be copied")
        if not state.is_current():
            raise _Refused("the forward pass changes weights, buffers or modules")
        return outputs

    def _capture(self, graphs: CudaGraphs) -> tuple[list[Any], TreeSpec]:
        """Captures the forward pass, and returns the tensors that each replay writes.

        Raises:
            _Refused: If it cannot be captured.
            torch.OutOfMemoryError: If the GPU has too little memory.
        """
        self._graph = torch.cuda.CUDAGraph()
        try:
            with (
                no_garbage_collection(),
                _own_workspace(),
                torch.cuda.graph(
                    self._graph, pool=self._pool.handle, stream=self._pool.stream, capture_error_mode="thread_local"
                ),
            ):
                return tree_flatten(self._forward(graphs))
        except Exception as error:
            _recover(self._pool, self._graph)
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise _Refused(f"the capture failed ({_first_line(error)})", "out of memory" in str(error)) from error

    def replay(self, inputs: Sequence[torch.Tensor]) -> Any:
        """Returns the outputs for inputs of the same kind, on the current stream."""
        with torch.cuda.device(self._pool.device), self._pool.turn() as stream:
            if stream not in self._streams:
                for static in self._inputs:
                    static.record_stream(stream)
                self._streams.add(stream)
            for static, x in zip(self._inputs, inputs, strict=True):
                static.copy_(x)
            self._graph.replay()
            leaves = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in self._outputs]
        return tree_unflatten(leaves, self._spec)

    def wait(self) -> None:
        """Waits for the last replay of the graphs that share the memory of this one."""
        self._pool.wait()


def _static(value: Any) -> Any:
    """Returns memory for copies of a tensor; other values unchanged."""
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty(value.shape, dtype=value.dtype, device=value.device, memory_format=_memory_format(value))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Context without automatic garbage collection.

    During a capture, it could delete another CUDA graph. CUDA forbids this, and the capture would fail.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


# PyTorch keeps a workspace for matrix products for each stream. Before this version, no lock protects the workspaces.
_HAS_LOCKED_WORKSPACES = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 11)


@contextmanager
def _own_workspace() -> Iterator[None]:
    """Context of a capture with a new workspace for matrix products.

    The workspace lies in the memory of the graph. Graphs that share the workspace of their stream could use freed
    memory: PyTorch (2.14, perhaps earlier) frees it with each graph of this stream, and
    `torch.compile(mode="reduce-overhead")` frees the workspaces of all streams.
    """
    clear: Callable[[], None] | None = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if clear is None or not _HAS_LOCKED_WORKSPACES:
        yield
        return
    clear()
    try:
        yield
    finally:
        clear()


# Graphs of failed captures. PyTorch's allocator of pinned memory may still refer to them.
_FAILED: list[torch.cuda.CUDAGraph] = []


def _recover(pool: _Pool, failed: torch.cuda.CUDAGraph) -> None:
    """Makes the process usable after an invalid operation has ended a capture.

    PyTorch then leaves its allocators and its random generator in the state of a capture. If it could end the capture
    itself, the first call raises an exception, and nothing is left to do.
    """
    end: Any = getattr(torch._C, "_cuda_endAllocateToPool", None)  # its name in torch 2.6 was another one
    end = end or vars(torch._C)["_cuda_endAllocateCurrentStreamToPool"]
    with suppress(RuntimeError):
        end(pool.device.index, pool.handle)
        _FAILED.append(failed)
        torch._C._cuda_releasePool(pool.device.index, pool.handle)
        # The allocator of pinned memory still records to the old memory, and refuses a second capture into it.
        pool.handle = torch.cuda.graph_pool_handle()
        with (
            no_garbage_collection(),
            torch.cuda.graph(torch.cuda.CUDAGraph(), stream=pool.stream, capture_error_mode="thread_local"),
        ):
            torch.zeros(1, device=pool.device)  # the end of a capture resets the generator


class _Watch(TorchDispatchMode):
    """Refuses operations that CUDA cannot capture.

    PyTorch raises exceptions for them, too, but only after they have made the capture invalid.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        devices = {x.device.type for x in tensors}
        if _DEVICE in devices:
            name = str(func)
            if torch.Tag.data_dependent_output in func.tags:
                raise _Refused(f"the forward pass reads a tensor on the CPU ({name})")
            if torch.Tag.dynamic_output_shape in func.tags and _depends_on_values(name, args):
                raise _Refused(f"the forward pass has shapes that depend on values ({name})")
            if len(devices) > 1 and name in ("aten._to_copy.default", "aten.copy_.default"):
                raise _Refused(f"the forward pass copies a tensor between the CPU and the GPU ({name})")
        return out


def _depends_on_values(name: str, args: tuple[Any, ...]) -> bool:
    """Returns whether the output shape of an operation depends on values.

    Masks and indices differ in their dtype.
    """
    if not name.startswith("aten.index"):
        return True
    return any(isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8) for x in tree_leaves(args[1:]))

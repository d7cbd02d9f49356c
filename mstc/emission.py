"""Graphs compiled to what Inductor writes, without building a kernel: for simulation.

Inductor compiles a graph to a Python module that allocates buffers, launches kernels and frees
buffers. Here it writes the same module, of which everything runs but the kernels; called with fake
tensors, it allocates and frees exactly what it would.

Nothing of it can reach a real run: PyTorch's caches of compiled graphs are off meanwhile, the
modules are kept out of its table of loaded ones, and a call outside `FakeTensorMode` is an error.

Works with torch 2.11 to 2.13.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
import torch._inductor.config as inductor_config
from torch._guards import active_fake_mode  # whether tensors are fake
from torch._inductor.codecache import PyCodeCache  # loads the modules that Inductor writes
from torch._inductor.compile_fx import compile_fx_inner  # compiles one aten graph
from torch._inductor.virtualized import V  # the graph that is being compiled, and its buffers
from torch.fx import GraphModule, Node

from passes.source import op_name, source_of

EMITTED = "mst_emitted"  # name of the modules
ORIGINS = "mst_origins"  # in such a module: name of a buffer -> `Origin`
VIEWS = frozenset(  # ops that make no memory; a kernel is named after another that it is for
    f"aten.{name}"
    for name in (
        *("t", "view", "_unsafe_view", "reshape", "permute", "transpose", "expand"),
        *("slice", "select", "squeeze", "unsqueeze", "alias", "detach"),
    )
)
_BUILDER = "async_compile = AsyncCompile()"
_EVENT = "torch.Event()"  # with which the host waits for a copy from a device


@dataclass(frozen=True)
class Origin:
    """What a value comes from."""

    op: str  # that makes it, as the model's author would call it: before decompositions
    source: str  # "file:line  code" of the user, or ""


def emit(graph: GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Callable[[list[Any]], Any]:
    """In the place of `torch._inductor.compile_fx.compile_fx_inner`.

    Returns:
        a callable as that would return, for fake tensors.

    Raises:
        whatever Inductor raises; RuntimeError, if the callable is called outside
        `FakeTensorMode`.
    """
    with _collected() as modules, inductor_config.patch(fx_graph_cache=False):
        compile_fx_inner(graph, inputs, **kwargs)
    return _Emitted(modules[-1])


class _Emitted:
    """A graph's module as a callable."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module
        # AOTAutograd hands over a list, which the module empties as it goes; wrappers around this
        # take over what is in its `__dict__`.
        self._boxed_call = True

    def __call__(self, args: list[Any]) -> Any:
        if active_fake_mode() is None:
            raise RuntimeError("a graph without kernels was called outside a simulation")
        return self._module.call(args)


@contextmanager
def _collected() -> Iterator[list[ModuleType]]:
    """The modules that this thread compiles meanwhile, loaded without kernels."""
    modules: list[ModuleType] = []
    own = threading.get_ident()
    original = PyCodeCache.load_by_key_path

    def load(cls: type, key: str, path: str, *args: Any, **kwargs: Any) -> ModuleType:
        if threading.get_ident() != own:
            return original(key, path, *args, **kwargs)
        modules.append(_load(path, kwargs.get("attrs") or {}))
        return modules[-1]

    with patch.object(PyCodeCache, "load_by_key_path", classmethod(load)):
        yield modules


def _load(path: str, constants: dict[str, Any]) -> ModuleType:
    module = ModuleType(EMITTED)
    module.__file__ = path
    text = Path(path).read_text()
    assert _BUILDER in text, "Inductor writes its modules in another way"
    text = text.replace(_BUILDER, "async_compile = without_kernels")
    text = text.replace(_EVENT, "without_events")
    scope = vars(module)
    scope["without_kernels"] = _Builder()
    scope["without_events"] = _Event()
    scope[ORIGINS] = _origins()
    exec(compile(text, path, "exec"), scope)  # what Inductor wrote
    scope.update({name: stand_in for name, stand_in in _STAND_INS.items() if name in scope})
    scope.update(constants)
    return module


def _origins() -> dict[str, Origin]:
    """Of the buffers in the graph whose module is being loaded, and in its subgraphs."""
    found: dict[str, Origin] = {}
    graphs: list[Any] = [V.graph]
    while graphs:
        lowered = graphs.pop()
        found |= _own_origins(lowered)
        called = getattr(lowered, "seen_subgraphs", {}).values()  # not before torch 2.13
        graphs += [part.graph for part in called if part.graph is not None]
    return found


def _own_origins(lowered: Any) -> dict[str, Origin]:
    order = {node: i for i, node in enumerate(lowered.graph.nodes)}
    found: dict[str, Origin] = {}
    for buffer in lowered.buffers:
        fused = sorted(buffer.origins, key=lambda node: order.get(node, -1))
        nodes = [*fused, buffer.origin_node] if buffer.origin_node is not None else fused
        if nodes:
            node = next((n for n in reversed(nodes) if _op(n) not in VIEWS), nodes[-1])
            found[buffer.get_name()] = Origin(_op(node), source_of(node))
    return found


def _op(node: Node) -> str:
    original = node.meta.get("original_aten")
    return str(getattr(original, "overloadpacket", None) or op_name(node))


def _nothing(*args: Any, **kwargs: Any) -> None:
    """A kernel, or a check of what a kernel needs."""


class _Kernel:
    run = staticmethod(_nothing)
    __call__ = staticmethod(_nothing)


class _Builder:
    """In the place of ``AsyncCompile``: every kernel is nothing."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return _nothing if name == "wait" else lambda *_, **__: _Kernel()


class _Event:
    record = staticmethod(_nothing)
    synchronize = staticmethod(_nothing)


class _Libraries:
    """In the place of ``extern_kernels``: products write into the buffer that they are given."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, out: torch.Tensor | None = None, **kwargs: Any) -> Any:
            if out is None:
                return getattr(torch.ops.aten, name)(*args, **kwargs)
            # Nothing is written; but who watches hears of the op, and what it takes while it runs.
            op: Any = getattr(torch.ops.aten, name, None)
            return op.out(*args, out=out, **kwargs) if hasattr(op, "out") else out

        return call


def _empty_on(device: str) -> Callable[..., torch.Tensor]:
    return lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype, device=device)


def _view(
    tensor: torch.Tensor, size: Sequence[int], stride: Sequence[int], offset: int = 0
) -> torch.Tensor:
    return torch.as_strided(tensor, size, stride, int(tensor.storage_offset()) + offset)


_STAND_INS: dict[str, Any] = {  # of names in a module that Inductor writes, which want real memory
    "assert_size_stride": _nothing,
    "assert_alignment": _nothing,
    "copy_if_misaligned": lambda tensor, *_: tensor,
    "empty_strided_cpu": _empty_on("cpu"),
    "empty_strided_cpu_pinned": _empty_on("cpu"),
    "empty_strided_cuda": _empty_on("cuda"),
    "reinterpret_tensor": _view,
    "extern_kernels": _Libraries(),
}

"""Everything that reaches into PyTorch's private parts to compile, in one file, with the reason for
each import.

Works with torch 2.11 to 2.13.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, cast, get_origin
from unittest.mock import patch
from uuid import uuid4

import sympy
import torch
import torch._functorch.config as functorch_config
import torch._inductor.compile_fx as inductor_frontend  # has the call that writes code
import torch._inductor.config as inductor_config
from torch._C._dynamo.eval_frame import (
    _debug_get_cache_entry_list,
    reset_code,
)  # what was compiled for a function, and how to forget it
from torch._dynamo import convert_frame  # knows which functions were compiled
from torch._dynamo.backends.common import (
    aot_autograd,
)  # AOTAutograd as a backend, for the lowering without Inductor
from torch._dynamo.source import (
    AttrSource,
    ConstantSource,
)  # where an input comes from; names of the symbols of a body's sizes
from torch._dynamo.utils import get_metrics_context  # what is recorded of a compilation
from torch._functorch.compile_utils import fx_graph_cse  # what the partitioner does first
from torch._functorch.partitioners import (
    min_cut_rematerialization_partition,
)  # the partitioner Inductor uses
from torch._guards import (
    TracingContext,
    detect_fake_mode,
    tracing,
)  # a body is compiled in a context of its own; what Dynamo traced under
from torch._inductor.async_compile import AsyncCompile  # builds kernels in parallel
from torch._inductor.compile_fx import (
    compile_fx,
    compile_fx_inner,
)  # the outer graph; one aten graph
from torch._inductor.cpp_builder import get_cpp_compiler  # what kernels on a CPU are built with
from torch._inductor.custom_graph_pass import (
    CustomGraphPass,
    CustomPartitionerFn,
    get_hash_for_files,
)  # the hooks, and their cache key
from torch._inductor.decomposition import select_decomp_table  # same ops for both lowerings
from torch._inductor.fx_passes.joint_graph import (
    joint_graph_passes,
)  # what Inductor does before partitioning
from torch._inductor.runtime.cache_dir_utils import cache_dir  # where compiled graphs are kept
from torch._inductor.virtualized import V  # where Inductor finds the fake mode
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx._lazy_graph_module import (
    _use_lazy_graph_module,
)  # which of its two classes of graph modules is made: Inductor's cache tells them apart
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv  # symbolic sizes of a body
from torch.fx.graph import _BoxedCodeGen  # frees dead intermediates
from torch.torch_version import TorchVersion  # compares like a version

from mstc.emission import emit
from mstc.inplace import in_place
from mstc.repairs import mend
from mstc.runtime.gather import gather_op
from passes.gathers import gather_from_products

__all__ = [
    "AfterPartition",
    "CompiledBody",
    "CustomGraphPass",
    "PendingKernels",
    "attribute_source",
    "backward_ahead",
    "cache_folder",
    "compile_body",
    "compile_outer",
    "compile_outer_eager",
    "cpp_compiler",
    "detect_fake_mode",
    "forget_cuda_graphs",
    "forgotten_frames",
    "get_hash_for_files",
    "hide_autocast",
    "inductor_option_type",
    "known_inductor_options",
    "mode_options",
    "show_outer",
    "unrecorded",
    "without_duplicates",
]

Tensors = list[torch.Tensor]
AfterPartition = Callable[[GraphModule, GraphModule, int], None]


@contextmanager
def forgotten_frames() -> Iterator[None]:
    """What Dynamo compiles meanwhile does not count against its limit of recompilations later.

    Functions that were compiled before keep what they have, and what is added to it.
    """

    def compiled() -> dict[int, Any]:
        codes = [reference() for reference in convert_frame.input_codes.seen]
        return {id(c): c for c in codes if c is not None and _debug_get_cache_entry_list(c)}

    before = compiled()
    try:
        yield
    finally:
        for identity, code in compiled().items():
            if identity not in before:
                reset_code(code)


def forget_cuda_graphs() -> None:
    """Give back the memory of whatever CUDA graphs were recorded, if any were."""
    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    if trees is not None:  # it starts CUDA where there is one
        trees.reset_cudagraph_trees()


@contextmanager
def unrecorded() -> Iterator[None]:
    """For a compilation within a compilation: PyTorch's metrics expect every figure once."""
    metrics = get_metrics_context()
    with ExitStack() as stack:
        for name in ("set", "update", "increment", "add_top_n", "set_key_value", "add_to_set"):
            if hasattr(metrics, name):
                stack.enter_context(patch.object(metrics, name, lambda *_, **__: None))
        yield


def backward_ahead() -> AbstractContextManager[object]:
    """AOTAutograd compiles the backward with the forward.

    Otherwise its first run does. On a GPU that is another thread, which would wait for the lock
    under which this one compiles, for ever.
    """
    return functorch_config.patch(force_non_lazy_backward_lowering=True)


def wants_eager_random_numbers() -> bool:
    """Whether the numbers that `rand` draws have to be those of eager code, which a generator gives
    in one order only."""
    return bool(inductor_config.fallback_random)


def without_duplicates(graph: Graph) -> Graph:
    """A copy in which equal computations are done once, as AOTAutograd's partitioner will have
    it."""
    return fx_graph_cse(graph)


def attribute_source(node: Node) -> Callable[[str], object]:
    """Dynamo's source of an attribute of a graph input."""
    base = getattr(node, "_dynamo_source", None)
    return lambda name: None if base is None else AttrSource(base, name)


def hide_autocast() -> AbstractContextManager[object]:
    """AOTAutograd has resolved autocast when a loop runs: casting again would change dtypes."""
    return torch._C._DisableAutocast()


def cache_folder() -> Path | None:
    """Where PyTorch keeps compiled graphs between processes; None where it was told not to."""
    return None if inductor_config.force_disable_caches else Path(cache_dir())


def cpp_compiler() -> str:
    """The compiler that Inductor builds a CPU's kernels with.

    Raises:
        whatever Inductor raises where it finds none.
    """
    return get_cpp_compiler()


def known_inductor_options() -> frozenset[str]:
    """The names that ``torch.compile(options=...)`` may set for Inductor."""
    return frozenset(inductor_config.get_config_copy())


def inductor_option_type(name: str) -> type:
    """The type of an Inductor option, `object` where Inductor itself does not check it."""
    wanted = cast("Any", inductor_config).get_type(name)
    return wanted if isinstance(wanted, type) and get_origin(wanted) is None else object


def mode_options(mode: str) -> dict[str, object]:
    """What ``torch.compile(mode=...)`` means to Inductor.

    Raises:
        RuntimeError: an unknown mode (PyTorch's own message names the known ones).
    """
    return dict(torch._inductor.list_mode_options(mode))


class PendingKernels:
    """Kernels that are being built while more graphs are lowered.

    Inductor builds the kernels of one graph in parallel and waits for them as it loads the graph's
    module. Graphs with two kernels each keep two cores busy, one after the other; collected, their
    waits come later and all kernels are built side by side. The graphs must not run before `wait`.

    For C++ kernels only: Triton's have to be there when PyTorch's cache takes the graph.
    """

    def __init__(self) -> None:
        self._waits: list[Callable[[], None]] = []

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Collect the waits of graphs that this thread compiles meanwhile."""
        original = AsyncCompile.wait
        own = threading.get_ident()

        def later(compiler: AsyncCompile, scope: dict[str, Any]) -> None:
            if threading.get_ident() == own:
                self._waits.append(lambda: original(compiler, scope))
            else:
                original(compiler, scope)

        AsyncCompile.wait = later  # type: ignore[method-assign]
        try:
            yield
        finally:
            AsyncCompile.wait = original  # type: ignore[method-assign]

    def wait(self) -> None:
        """Until all are built.

        Raises:
            what the first wait that fails raises.
        """
        while self._waits:
            self._waits.pop(0)()


class CompiledBody:
    """A body compiled for certain sizes: all fixed, or some left open."""

    def __init__(
        self,
        call: Callable[[list[Any]], Sequence[torch.Tensor]],
        sizes: Sequence[int],
        dynamic: tuple[int, ...],
        guards: tuple[sympy.Basic, ...],
        symbols: tuple[sympy.Symbol, ...],
    ) -> None:
        self._call = call
        self._sizes = tuple(sizes)
        self._dynamic = dynamic
        self._guards = guards
        self._symbols = symbols

    @property
    def is_open(self) -> bool:
        """Whether it may accept other sizes than those that it was compiled with."""
        return bool(self._dynamic)

    def accepts(self, sizes: Sequence[int]) -> bool:
        """Whether what was assumed while compiling holds for these sizes."""
        for i, (own, size) in enumerate(zip(self._sizes, sizes, strict=True)):
            if size != own and (i not in self._dynamic or size < 2):  # 0 and 1 are always special
                return False
        values = {s: sizes[i] for s, i in zip(self._symbols, self._dynamic, strict=True)}
        return all(g.xreplace(values) == sympy.true for g in self._guards)

    def __call__(self, sizes: Sequence[int], tensors: list[torch.Tensor]) -> Sequence[torch.Tensor]:
        """`tensors` is emptied: what is a copy, of a slice, goes when it is read last."""
        arguments = [*(sizes[i] for i in self._dynamic), *tensors]
        tensors.clear()
        return self._call(arguments)


def compile_body(
    body: Callable[..., Sequence[torch.Tensor]],
    sizes: Sequence[int],
    tensors: Tensors,
    shapes: Sequence[Sequence[Sequence[int]]],
    dynamic: Sequence[int],
    config: Mapping[str, object],
    *,
    build: bool = True,
) -> CompiledBody:
    """Compile one body with Inductor.

    Args:
        body: ``body(*sizes, *tensors)``, made of aten ops.
        sizes: the sizes of its axes, the chunk's first.
        tensors: inputs as the first call has them.
        shapes: for every tensor and dim, the indices into `sizes` whose product the dim is.
        dynamic: indices into `sizes` to leave open.
        config: Inductor options.
        build: False writes the code only, for simulation (`mstc.emission`).

    Raises:
        whatever Inductor raises.
    """
    mend()
    shape_env = ShapeEnv()
    mode = FakeTensorMode(shape_env=shape_env)
    open_sizes: dict[int, Any] = {}
    for i in dynamic:
        source = ConstantSource(f"a{i}")
        symbol = shape_env.create_symbol(sizes[i], source=source, dynamic_dim=DimDynamic.DYNAMIC)
        open_sizes[i] = shape_env.create_symintnode(symbol, hint=sizes[i], source=source)
    all_sizes = [open_sizes.get(i, s) for i, s in enumerate(sizes)]
    with mode:
        fakes = [
            _fake(t, dims, all_sizes, frozenset(open_sizes))
            for t, dims in zip(tensors, shapes, strict=True)
        ]
    arguments = [*open_sizes.values(), *fakes]

    def call(*args: Any) -> Sequence[torch.Tensor]:
        opened = dict(zip(open_sizes, args, strict=False))
        return body(*(opened.get(i, s) for i, s in enumerate(sizes)), *args[len(open_sizes) :])

    with (
        torch.no_grad(),
        tracing(TracingContext(mode)),
        V.set_fake_mode(mode),
        inductor_config.patch(dict(config)),
        hide_autocast(),
        in_place(),
        _use_lazy_graph_module(True),  # as under Dynamo: compiled ahead or late, one cache entry
    ):
        with mode:
            graph = make_fx(call, _STRETCHED if open_sizes else None)(*arguments)
        if any(t.device.type != "cpu" for t in tensors):  # the code for CPUs gathers early, too
            graph.graph = gather_from_products(graph.graph, gather_op)
            graph.recompile()
        _ask_for_no_layout(graph)
        if build:
            with _simplified_if_new(graph):
                compiled = compile_fx_inner(graph, arguments, is_inference=True)
        else:
            compiled = emit(_simplified(graph), arguments, is_inference=True)
    symbols = tuple(s.node.expr for s in open_sizes.values())
    guards = [g.expr for g in shape_env.guards]
    guards += [sympy.Eq(s, r) for s, r in shape_env.replacements.items() if s in symbols]
    kept = tuple(sympy.simplify(g) if g.free_symbols else g for g in map(sympy.sympify, guards))
    return CompiledBody(cast("Any", compiled), sizes, tuple(open_sizes), kept, symbols)


def _ask_for_no_layout(graph: GraphModule) -> None:
    """The loop takes any strides."""
    (output,) = graph.graph.find_nodes(op="output")
    output.meta["user_visible_output_idxs"] = []


def _simplified(graph: GraphModule) -> GraphModule:
    """What Inductor does to a joint graph, done to a body's."""
    graph = joint_graph_passes(graph)
    _ask_for_no_layout(graph)
    return graph


_WRITING = threading.RLock()  # bodies may be compiled on first use, by any thread


@contextmanager
def _simplified_if_new(graph: GraphModule) -> Iterator[None]:
    """Simplify a graph only if Inductor does not find it in its cache.

    As with AOTAutograd's cache, the key is that of the graph before. A process with warm caches
    saves loading the patterns that simplify.
    """

    def simplify_and_write(given: GraphModule, *args: Any, **kwargs: Any) -> Any:
        return write(_simplified(given) if given is graph else given, *args, **kwargs)

    with _WRITING:
        write = inductor_frontend.fx_codegen_and_compile
        with patch.object(inductor_frontend, "fx_codegen_and_compile", simplify_and_write):
            yield


def _baddbmm(bias: torch.Tensor, left: torch.Tensor, right: torch.Tensor, **scales: Any) -> Any:
    """The bias stretched beforehand: PyTorch's own shape function cannot stretch one of fixed
    sizes to a size that is left open (positions biases of a fixed number of keys)."""
    shape = left.shape[0], left.shape[1], right.shape[2]
    sizes = [s for s in bias.shape if isinstance(s, int)]
    if len(sizes) < bias.dim() or all(isinstance(s, int) for s in shape) or 1 not in sizes:
        return NotImplemented  # as it is
    return torch.ops.aten.baddbmm.default(bias.expand(shape), left, right, **scales)


_STRETCHED: dict[Any, Callable[..., Any]] = {torch.ops.aten.baddbmm.default: _baddbmm}


def _fake(
    tensor: torch.Tensor,
    dims: Sequence[Sequence[int]],
    sizes: Sequence[Any],
    dynamic: frozenset[int],
) -> torch.Tensor:
    if not any(i in dynamic for dim in dims for i in dim):
        if tensor.is_contiguous():  # whatever the strides of its dims of size one
            return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        return torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
        )
    shape: list[Any] = []
    for dim in dims:
        total: Any = 1
        for i in dim:
            total = total * sizes[i]
        shape.append(total)
    return torch.empty(shape, dtype=tensor.dtype, device=tensor.device)


def compile_outer(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    graph_pass: CustomGraphPass | None,
    config: Mapping[str, object],
    *,
    build: bool = True,
    activation_budget: float = 1.0,
    after_partition: Sequence[AfterPartition] = (),
    offloads: bool = False,
) -> Callable[..., Any]:
    """Compile a Dynamo graph with Inductor.

    Args:
        gm, example_inputs: the graph.
        graph_pass: run on its joint (or inference) graph.
        config: Inductor's options.
        build: False for simulation only (`mstc.emission`).
        activation_budget: AOTAutograd's `activation_memory_budget`: of what the partitioner would
            keep for the backward, the share that it may keep.
        after_partition: change the graphs of the forward and the backward in place, given how many
            of the forward's outputs are the model's; what they do is in the key of `graph_pass`.
        offloads: whether one of them has saved values wait in the host's memory.
    """
    patches = dict(config)
    if graph_pass is not None:
        patches["joint_custom_pre_pass"] = graph_pass
    if after_partition:
        assert graph_pass is not None, "or PyTorch's caches would not know"
        users = config.get("custom_partitioner_fn", inductor_config.custom_partitioner_fn)
        patches["custom_partitioner_fn"] = _Partitioner(
            after_partition, graph_pass.uuid(), cast("CustomPartitionerFn | None", users)
        )
    if offloads:
        # It takes memory on the host for the device's, and fetches everything at once.
        patches["reorder_for_peak_memory"] = False
    with _partitioned_within(activation_budget):
        return _compile_outer(gm, example_inputs, patches, build=build)


class _Partitioner(CustomPartitionerFn):
    """The user's partitioner, or Inductor's, and what comes after it."""

    def __init__(
        self, after: Sequence[AfterPartition], key: object, users: CustomPartitionerFn | None
    ) -> None:
        self._after = after
        self._key = key
        self._users = users

    def uuid(self) -> object:
        if self._users is None:
            return ("mst", self._key)
        own = self._users.uuid()
        return None if own is None else ("mst", self._key, own)  # None: not to be cached

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        """PyTorch's keys hold what is pickled of every option, of this one too."""
        key = self.uuid()
        return str, (repr(key) if key is not None else f"not to be cached: {uuid4()}",)

    def __call__(
        self, gm: GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[GraphModule, GraphModule]:
        partition = self._users or min_cut_rematerialization_partition
        forward, backward = partition(gm, joint_inputs, **kwargs)
        for change in self._after:
            change(forward, backward, kwargs["num_fwd_outputs"])
        return forward, backward


def calls_subgraphs(config: Mapping[str, object]) -> bool:
    """Whether graphs that are compiled with these options may call subgraphs of their own.

    Inductor's C++ wrapper cannot; with CUDA graphs, and before torch 2.13, nobody has tried.
    """
    wrapper = config.get("cpp_wrapper", inductor_config.cpp_wrapper)
    cudagraphs = config.get("triton.cudagraphs", inductor_config.triton.cudagraphs)
    return not wrapper and not cudagraphs and TorchVersion(torch.__version__) >= "2.13"


def _partitioned_within(activation_budget: float) -> AbstractContextManager[object]:
    if activation_budget == 1:  # whatever the user has set
        return nullcontext()
    return functorch_config.patch(activation_memory_budget=activation_budget)


def _compile_outer(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    patches: Mapping[str, object],
    *,
    build: bool,
) -> Callable[..., Any]:
    mend()
    if build:
        compiled = compile_fx(gm, list(example_inputs), config_patches=cast("Any", patches))
    else:
        with functorch_config.patch(enable_autograd_cache=False):
            compiled = compile_fx(
                gm,
                list(example_inputs),
                inner_compile=cast("Any", emit),
                config_patches=cast("Any", patches),
            )
    return cast("Callable[..., Any]", compiled)


def compile_outer_eager(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    graph_pass: CustomGraphPass | None,
    activation_budget: float = 1.0,
    after_partition: Sequence[AfterPartition] = (),
) -> Callable[..., Any]:
    """The same road without Inductor: AOTAutograd, our pass, the partitioner, then the graphs run
    op by op."""

    def partition(
        joint: GraphModule, inputs: Sequence[object], **kwargs: Any
    ) -> tuple[GraphModule, GraphModule]:
        if graph_pass is not None:
            graph_pass(joint.graph)
            joint.recompile()
        kwargs.pop("static_lifetime_input_indices", None)
        graphs = min_cut_rematerialization_partition(joint, inputs, compiler="inductor", **kwargs)
        for change in after_partition:
            change(*graphs, kwargs["num_fwd_outputs"])
        return graphs

    def forward(graph: GraphModule, inputs: Sequence[object]) -> Callable[..., Any]:
        return _boxed(graph)

    def inference(graph: GraphModule, inputs: Sequence[object]) -> Callable[..., Any]:
        if graph_pass is not None:
            graph_pass(graph.graph)
            graph.recompile()
        return _boxed(graph)

    compiler = aot_autograd(
        fw_compiler=forward,
        bw_compiler=forward,
        inference_compiler=inference,
        partition_fn=partition,
        decompositions=_decompositions(),
        keep_inference_input_mutations=True,
    )
    with _partitioned_within(activation_budget):
        return cast("Callable[..., Any]", compiler(gm, list(example_inputs)))


class _Seen(Exception):
    """The pass has seen the graph: nothing else of the compilation is wanted."""


def show_outer(gm: GraphModule, example_inputs: Sequence[Any], graph_pass: CustomGraphPass) -> None:
    """Run `graph_pass` on the joint (or inference) graph that `compile_outer_eager` would run it
    on, and nothing after it: the partitioner takes seconds where layers are many."""

    def stop(graph: GraphModule, inputs: Sequence[object], **kwargs: Any) -> Any:
        graph_pass(graph.graph)
        raise _Seen

    compiler = aot_autograd(
        fw_compiler=stop,  # never reached
        inference_compiler=stop,
        partition_fn=stop,
        decompositions=_decompositions(),
        keep_inference_input_mutations=True,
    )
    with suppress(_Seen):
        compiler(gm, list(example_inputs))


def _decompositions() -> dict[Any, Callable[..., Any]]:
    table = dict(select_decomp_table())
    table.pop(torch.ops.aten.detach.default, None)  # or a detached output would require grad
    return table


def _boxed(graph: GraphModule) -> Callable[[list[Any]], Any]:
    """The calling convention that lets intermediates be freed as soon as they are dead."""
    graph.graph.set_codegen(_BoxedCodeGen())
    graph.recompile()
    return graph

"""Take outputs that the caller probably drops out of a Dynamo graph.

A language model returns its logits beside the loss. Most training loops never look at them, but an
output stays alive until the caller drops it, and AOTAutograd adds a zero tangent and a gradient of
the same size. So the output leaves the graph here, before AOTAutograd sees it, together with a
recipe for making it later.

Terms
-----
loss        an output that is a 0-dim floating tensor.
candidate   an output of at least `min_bytes` that a loss is computed from; in a graph that has no
            loss, any output of that size that requires grad: the loss may be in another graph.
            Where gradients are off, any of at least `MANY_ROWS` rows.
closure     the few operations that make a candidate again, as a graph module of its own.
frontier    what a closure starts from: inputs of the graph (free: the caller holds them anyway) and
            intermediates (paid for: they become new outputs of the graph).
deferred    said of a candidate that has left the graph. Any other is refused, with a reason.

Steps
-----
1. Find the candidates.
2. Find the memory that the graph writes to in place. None of it may be in a closure or a frontier:
   a closure runs later, and must see the values that the graph saw.
3. For each candidate walk back over operations that are pure, deterministic and few (the table
   `_REPEATABLE`, at most `max_nodes`). There, a minimum cut separates the candidate from the rest
   of the graph; a node costs the bytes that it would keep alive as an output. Of equal cuts the
   one nearest to the candidate is the frontier. It must cost a quarter of the candidate or less
   (an eighth, where the graph has no loss).
4. Copy the closure out. In-graph autocast regions are entered and left again inside it.
5. Copy the graph, without the deferred outputs and with the frontier as new ones.

Not handled, and so refused: candidates that share memory with an input or another output; closures
that need random, mutating, higher-order or unlisted operations (dropout, a checkpointed head), or
operations run with gradients off while the candidate requires grad, or under a `torch.func`
transform or in-graph inference mode; tensor subclasses; shapes that depend on data.
"""

from __future__ import annotations

import functools
import math
import operator
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import networkx as nx
import sympy
import torch
from torch import fx
from torch.amp.autocast_mode import _exit_autocast  # pyright: ignore[reportPrivateUsage]

from passes.dynamo import (
    has_bare_symbols,
    is_floating,
    is_loss,
    is_plain,
    label_of,
    loss_sources,
    share_memory,
    storage_nbytes,
    storage_of,
    tensor_of,
    value_of,
    with_outputs,
    written_storages,
)
from passes.records import Refusal
from passes.source import hint, op_name, source_of

__all__ = ["DeferResult", "DeferredOutput", "Source", "defer_outputs"]

FRONTIER_SHARE = 4
"""A frontier's intermediates may have at most one part in this many of the output's bytes."""
FAR_SHARE = 8
"""The same where the graph has no loss: the output is surely used, so the gain has to be large."""

MANY_ROWS = 256
"""Rows of an output from which on it is deferred where gradients are off."""

Extent = int | sympy.Expr
"""A size or stride in elements: a number, or an expression in the graph's size symbols."""


@dataclass(frozen=True)
class Source:
    """Where one value of a frontier comes from at run time."""

    kind: Literal["input", "output"]  # an argument or a result of `DeferResult.graph_module`
    index: int  # position among them
    name: str  # for people: "L['self'].weight", or a node's name


@dataclass(frozen=True)
class DeferredOutput:
    """One output that left the graph, and how to make it again."""

    indices: tuple[int, ...]  # positions among the original outputs; two: the same tensor twice
    closure: fx.GraphModule  # called with the frontier's values in order, returns the output
    frontier: tuple[Source, ...]  # tensors, and ints where sizes are dynamic
    shape: tuple[Extent, ...]
    stride: tuple[Extent, ...]
    storage_offset: Extent
    symbols: tuple[
        tuple[sympy.Symbol, int, int | None], ...
    ]  # symbol, input, its dim (None: an int)
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool  # if the graph runs with gradients enabled
    nbytes: int  # bytes the output would keep alive, by the hints of symbolic sizes
    frontier_nbytes: int  # bytes of the frontier's intermediates, likewise
    source: str  # "file:line  code" of the user who makes it, or ""

    def geometry(self, args: Sequence[Any]) -> tuple[tuple[int, ...], tuple[int, ...], int]:
        """Shape, stride and storage offset for the graph inputs `args`, in elements."""
        symbols = tuple(symbol for symbol, _, _ in self.symbols)
        sizes = (args[i] if dim is None else args[i].shape[dim] for _, i, dim in self.symbols)
        extents = (*self.shape, *self.stride, self.storage_offset)
        numbers = _evaluate(extents, symbols, tuple(map(int, sizes)))
        ndim = len(self.shape)
        return numbers[:ndim], numbers[ndim : 2 * ndim], numbers[-1]


@dataclass(frozen=True)
class DeferResult:
    """What `defer_outputs` did."""

    graph_module: fx.GraphModule  # what to compile; the given graph when nothing is deferred
    num_outputs: int  # outputs of the original graph
    deferred: tuple[DeferredOutput, ...]
    refusals: tuple[Refusal, ...]  # candidates that stay


def defer_outputs(
    gm: fx.GraphModule, *, min_bytes: int = 1 << 20, max_nodes: int = 24
) -> DeferResult:
    """Take the large outputs that a loss is made from out of `gm`, which is not changed.

    Args:
        gm: a Dynamo graph: a flat tuple of outputs, fake tensors in ``meta["example_value"]``.
        min_bytes: outputs smaller than this stay.
        max_nodes: most operations in one closure.

    Returns:
        The new graph has the remaining outputs in their order, then the frontiers' intermediates,
        each once. It has all inputs of the old one, so it is called in the same way.
        `mstc.runtime.deferred.wrap_outputs` puts the original outputs together again.
    """
    (outputs,) = gm.graph.output_node().args
    assert isinstance(outputs, list | tuple), "a Dynamo graph returns a flat tuple"
    facts = _Facts(gm)
    closures: dict[fx.Node, _Closure] = {}
    refusals: list[Refusal] = []
    has_loss = any(map(is_loss, outputs))
    share = FRONTIER_SHARE if has_loss else FAR_SHARE
    for node in _candidates(outputs, min_bytes):
        found = facts.why_kept(node, outputs) or _find_closure(node, facts, max_nodes, share)
        if isinstance(found, str) and not has_loss:
            continue  # an output like any other
        if isinstance(found, str):
            subject = f"output {outputs.index(node)} ({node.name})"
            refusals.append(Refusal(subject, found, source_of(node), storage_nbytes(node) or 0))
        else:
            closures[node] = found
    if not closures:
        return DeferResult(gm, len(outputs), (), tuple(refusals))

    new_outputs = [n for n in outputs if not (isinstance(n, fx.Node) and n in closures)]
    for closure in closures.values():
        new_outputs += [node for node in closure.frontier if node not in new_outputs]
    deferred: list[DeferredOutput] = []
    for node, closure in closures.items():
        indices = tuple(i for i, out in enumerate(outputs) if out is node)
        deferred.append(_record(indices, closure, facts, new_outputs))
    graph_module = with_outputs(gm, new_outputs)
    return DeferResult(graph_module, len(outputs), tuple(deferred), tuple(refusals))


# --- step 1: candidates ---------------------------------------------------------------------------


def _candidates(outputs: Sequence[Any], min_bytes: int) -> list[fx.Node]:
    """Output nodes, each once and in order, that are large and that a loss is computed from (or may
    be, elsewhere)."""
    nodes = dict.fromkeys(n for n in outputs if isinstance(n, fx.Node))
    tensors = [n for n in nodes if is_floating(n)]
    losses = list(filter(is_loss, tensors))
    if not losses:
        own = [n for n in tensors if n.op != "placeholder"]
        wanted = [n for n in own if tensor_of(n).requires_grad]
        if not wanted:  # gradients are off: a reference model's logits, say
            wanted = [n for n in own if _has_many_rows(n)]
        return [n for n in wanted if (storage_nbytes(n) or 0) >= min_bytes]
    above = loss_sources(losses)
    sizes = {n: storage_nbytes(n) for n in tensors if n in above}
    return [n for n, nbytes in sizes.items() if nbytes is None or nbytes >= min_bytes]


def _has_many_rows(node: fx.Node) -> bool:
    """Not the few that are read one after the other while text is generated."""
    sizes = [hint(s) for s in tensor_of(node).shape]
    if len(sizes) < 2 or any(s is None for s in sizes):
        return False
    return math.prod(s for s in sizes[:-1] if s is not None) >= MANY_ROWS


# --- step 2: facts about the graph ----------------------------------------------------------------


class _Facts:
    """What the whole graph says about its nodes: order, contexts, sizes, writes."""

    def __init__(self, gm: fx.GraphModule):
        self.order = {node: i for i, node in enumerate(gm.graph.nodes)}
        self.inputs = [node for node in self.order if node.op == "placeholder"]
        self.written = written_storages(gm)
        self.autocast: dict[fx.Node, tuple[fx.Node, ...]] = {}  # in-graph regions, outermost first
        self.grad_off: set[fx.Node] = set()
        self.transformed: set[fx.Node] = set()  # under vmap, grad, ..., or in inference mode
        self._read_contexts()
        self.numbers: dict[sympy.Expr, fx.Node] = {}  # inputs that are sizes
        self.symbols: dict[sympy.Basic, tuple[int, int | None]] = {}  # input, and dim of it or None
        self._read_sizes()

    def _read_contexts(self) -> None:
        autocast: tuple[fx.Node, ...] = ()
        grad_off, depth = False, 0
        for node in self.order:
            name = op_name(node)
            if name == "_enter_autocast":
                autocast = (*autocast, node)
            elif name == "_exit_autocast":
                autocast = tuple(enter for enter in autocast if enter is not node.args[0])
            elif name == "_set_grad_enabled":
                grad_off = not node.args[0]
            depth += name.endswith(("_increment_nesting", "_enter_inference_mode"))
            depth -= name.endswith(("_decrement_nesting", "_exit_inference_mode"))
            self.autocast[node] = autocast
            if grad_off:
                self.grad_off.add(node)
            if depth:
                self.transformed.add(node)

    def _read_sizes(self) -> None:
        told: list[tuple[Any, int, int | None]] = []
        for i, node in enumerate(self.inputs):
            value = value_of(node)
            if isinstance(value, torch.SymInt):
                self.numbers.setdefault(_expr(value), node)
                told.insert(0, (value, i, None))  # an int is easier to read than a shape
            elif isinstance(value, torch.Tensor):
                told += [(size, i, dim) for dim, size in enumerate(value.shape)]
        for size, i, dim in told:
            if isinstance(symbol := _expr(size), sympy.Symbol):
                self.symbols.setdefault(symbol, (i, dim))

    def why_kept(self, node: fx.Node, outputs: Sequence[Any]) -> str | None:
        """A reason to keep an output that needs no look at what makes it."""
        if not is_plain(node):
            return f"it is a {type(value_of(node)).__name__}, not a plain tensor"
        if node.op == "placeholder":
            return "it is an input of the graph"
        for other in (*self.inputs, *outputs):
            if isinstance(other, fx.Node) and other is not node and share_memory(node, other):
                return f"it shares memory with {label_of(other)}, an input or output of the graph"
        if unknown := _free_symbols(_extents(tensor_of(node))) - self.symbols.keys():
            return f"its size depends on data ({', '.join(sorted(map(str, unknown)))})"
        return None

    def why_not_repeated(self, node: fx.Node, output: fx.Node) -> str | None:
        """Why a closure that makes `output` cannot repeat `node`, or read it if it is an input."""
        if self._is_written(node):
            return f"{label_of(node)} is changed in place in the graph"
        if node.op == "placeholder":
            return None
        if not _is_repeatable(node):
            container = node.args[0] if node.target is operator.getitem else None
            name = op_name(container if isinstance(container, fx.Node) else node)
            return f"{name} cannot be repeated later"
        if node in self.transformed:
            return f"{node.name} is computed under torch.func or in inference mode"
        if node in self.grad_off and tensor_of(output).requires_grad:
            return f"{node.name} is computed with gradients off"
        return None

    def cost(self, node: fx.Node) -> int | None:
        """What `node` costs as an output, only to compare; None when it cannot be one."""
        nbytes = storage_nbytes(node) if node.op.startswith("call_") and is_plain(node) else None
        if nbytes is None or self._is_written(node) or node in self.transformed:
            return None
        # A view keeps the same bytes alive as the tensor behind it: then rather that tensor.
        return 2 * nbytes + any(share_memory(node, source) for source in node.all_input_nodes)

    def stand_in(self, node: fx.Node) -> int | fx.Node | None:
        """A number, or an input that has it, to use in place of a node that computes a size."""
        value = value_of(node)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, torch.SymInt):
            return self.numbers.get(_expr(value))
        return None

    def needs(self, node: fx.Node) -> list[fx.Node]:
        """The nodes whose values a closure must have to repeat `node`."""
        needed: list[fx.Node] = []
        for source in node.all_input_nodes:
            standing = self.stand_in(source)
            if not isinstance(standing, int):
                needed.append(standing or source)
        return needed

    def _is_written(self, node: fx.Node) -> bool:
        return isinstance(value_of(node), torch.Tensor) and storage_of(node) in self.written


# --- step 3: the closure and its frontier ---------------------------------------------------------


@dataclass(frozen=True)
class _Closure:
    """Nodes of the original graph, in its order."""

    nodes: list[fx.Node]  # operations to repeat; the last one makes the output
    inputs: list[fx.Node]  # graph inputs that they read
    frontier: list[fx.Node]  # intermediates that they read


def _find_closure(output: fx.Node, facts: _Facts, max_nodes: int, share: int) -> _Closure | str:
    """The closure with the smallest frontier, or the reason why there is none."""
    network = nx.DiGraph()  # an edge without a capacity cannot be cut
    network.add_edge((output, "made"), "output")
    obstacles: dict[fx.Node, str] = {}  # what only the rest of the graph can make
    found: set[fx.Node] = set()
    num_nodes = 0
    queue = deque([output])
    while queue:
        if (node := queue.popleft()) in found:
            continue
        found.add(node)
        obstacle = facts.why_not_repeated(node, output)
        if obstacle is None and node.op != "placeholder":
            num_nodes += 1
            if num_nodes > max_nodes:
                obstacle = f"{node.name} is more than {max_nodes} operations away"
        if obstacle is not None:
            obstacles[node] = obstacle
            network.add_edge("rest", (node, "make"))
        elif node.op != "placeholder":
            for source in facts.needs(node):
                network.add_edge((source, "made"), (node, "make"))
                queue.append(source)
        cost = None if node is output else facts.cost(node)
        capacity = {} if cost is None else {"capacity": cost}
        network.add_edge((node, "make"), (node, "made"), **capacity)

    cut: set[fx.Node] = set()
    if obstacles:
        try:
            _, (rest, _) = nx.minimum_cut(network, "rest", "output")
        except nx.NetworkXUnbounded:
            return next(w for n, w in obstacles.items() if n is output or facts.cost(n) is None)
        cut = {n for n in found if (n, "make") in rest and (n, "made") not in rest}
    closure = _closure_above(output, cut, facts)
    size, kept = storage_nbytes(output) or 0, _frontier_nbytes(closure)
    if kept * share > size:
        names = ", ".join(node.name for node in closure.frontier)
        why = [obstacles[n] for n in closure.frontier if n in obstacles]
        why = "; ".join(why or [next(iter(obstacles.values()))])
        return f"its {size:,} bytes can only be made again from the {kept:,} of {names}: {why}"
    return closure


def _closure_above(output: fx.Node, cut: set[fx.Node], facts: _Facts) -> _Closure:
    reached: set[fx.Node] = set()
    stack = [output]
    while stack:
        if (node := stack.pop()) not in reached:
            reached.add(node)
            if node not in cut:
                stack.extend(facts.needs(node))
    ordered = sorted(reached, key=facts.order.__getitem__)
    return _Closure(
        nodes=[n for n in ordered if n not in cut and n.op != "placeholder"],
        inputs=[n for n in ordered if n.op == "placeholder"],
        frontier=[n for n in ordered if n in cut],
    )


def _frontier_nbytes(closure: _Closure) -> int:
    return sum({storage_of(node): storage_nbytes(node) or 0 for node in closure.frontier}.values())


_REPEATABLE = frozenset(
    """
    linear matmul mm bmm addmm baddbmm einsum __matmul__
    add sub mul div true_divide truediv floordiv neg pow square tanh sigmoid clamp
    __add__ __radd__ __sub__ __mul__ __rmul__ __truediv__
    float double half bfloat16 to type_as
    contiguous view reshape flatten unflatten permute transpose t squeeze unsqueeze narrow select
    detach size dim
    """.split()  # noqa: SIM905
)
"""Names of tensor methods, and of functions of `operator`, `torch` and `torch.nn.functional`."""


def _is_repeatable(node: fx.Node) -> bool:
    """Whether `node` is one of the operations that a closure may repeat, used as one."""
    value, source = value_of(node), node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        source = next(iter(node.all_input_nodes), node)
    is_number = isinstance(value, int | float | torch.SymInt | torch.SymFloat | torch.Size)
    if not (is_number or is_plain(node)) or node.kwargs.get("out") is not None:
        return False
    if has_bare_symbols(node):
        return False
    name = op_name(node)
    if node.target is operator.getitem:
        return isinstance(value_of(source), torch.Tensor | torch.Size)
    if node.op == "call_method" and name == "item":  # how Dynamo passes a float of the module
        return source.op == "placeholder" and tensor_of(source).device.type == "cpu"
    if node.target is getattr:
        return node.args[1] in ("T", "mT")
    if name in ("to", "type_as") and tensor_of(source).device != tensor_of(node).device:
        return False
    if node.op == "call_function":
        namespaces = (operator, torch, torch.nn.functional)
        known = any(getattr(space, name, None) is node.target for space in namespaces)
        return known and name in _REPEATABLE
    return node.op == "call_method" and name in _REPEATABLE


# --- steps 4 and 5: new graphs --------------------------------------------------------------------


def _record(
    indices: tuple[int, ...], closure: _Closure, facts: _Facts, new_outputs: list[Any]
) -> DeferredOutput:
    output = closure.nodes[-1]
    tensor, ndim = tensor_of(output), tensor_of(output).dim()
    inputs = [Source("input", facts.inputs.index(n), label_of(n)) for n in closure.inputs]
    kept = [Source("output", new_outputs.index(n), label_of(n)) for n in closure.frontier]
    extents = _extents(tensor)
    symbols = sorted(_free_symbols(extents), key=str)
    return DeferredOutput(
        indices=indices,
        closure=_closure_module(closure, facts),
        frontier=(*inputs, *kept),
        shape=extents[:ndim],
        stride=extents[ndim:-1],
        storage_offset=extents[-1],
        symbols=tuple((symbol, *facts.symbols[symbol]) for symbol in symbols),
        dtype=tensor.dtype,
        device=tensor.device,
        requires_grad=tensor.requires_grad,
        nbytes=storage_nbytes(output) or 0,
        frontier_nbytes=_frontier_nbytes(closure),
        source=source_of(output),
    )


def _closure_module(closure: _Closure, facts: _Facts) -> fx.GraphModule:
    """The closure as a module that takes graph inputs, then intermediates."""
    graph = fx.Graph()
    new = {node: graph.placeholder(node.name) for node in (*closure.inputs, *closure.frontier)}
    active: list[fx.Node] = []  # autocast regions that are open

    def translate(node: fx.Node) -> Any:
        standing = facts.stand_in(node)
        return standing if isinstance(standing, int) else new[standing or node]

    for node in (*closure.nodes, None):
        wanted = facts.autocast[node] if node is not None else ()
        while tuple(active) != wanted[: len(active)]:
            graph.call_function(_exit_autocast, (new[active.pop()],))
        for enter in wanted[len(active) :]:
            new[enter] = graph.node_copy(enter)
            active.append(enter)
        if node is not None:
            new[node] = graph.node_copy(node, translate)
    graph.output(new[closure.nodes[-1]])
    for node in graph.nodes:  # the closure outlives the compilation: no fake tensors in it
        node.meta = {key: node.meta[key] for key in ("stack_trace",) if key in node.meta}
    graph.lint()
    return fx.GraphModule(torch.nn.Module(), graph, class_name="Closure")


# --- reading nodes --------------------------------------------------------------------------------


def _extents(tensor: torch.Tensor) -> tuple[Extent, ...]:
    """Shape, stride and storage offset, one after the other."""
    extents: tuple[Any, ...] = (*tensor.shape, *tensor.stride(), tensor.storage_offset())
    return tuple(map(_expr, extents))


def _expr(number: Any) -> Any:
    """A SymInt's expression; an int as it is."""
    return number.node.expr if isinstance(number, torch.SymInt) else number


def _free_symbols(extents: Iterable[Extent]) -> set[Any]:
    return {symbol for e in extents if isinstance(e, sympy.Expr) for symbol in e.free_symbols}


@functools.lru_cache(maxsize=1024)
def _evaluate(
    extents: tuple[Extent, ...], symbols: tuple[sympy.Symbol, ...], values: tuple[int, ...]
) -> tuple[int, ...]:
    known: dict[Any, Any] = dict(zip(symbols, values, strict=True))
    return tuple(int(sympy.sympify(extent).subs(known)) for extent in extents)

"""Take outputs that the caller probably drops out of a Dynamo graph.

A language model returns its logits beside the loss. Most training loops never look at them, but an output stays
alive until the caller drops it, and AOTAutograd adds a zero tangent and a gradient of the same size. So the
output leaves the graph here, before AOTAutograd sees it, together with a recipe for making it later.

Terms
-----
loss        an output that is a 0-dim floating tensor.
candidate   an output that a loss is computed from and that is at least `min_bytes` large. The caller probably wants
            the loss and drops this.
closure     the few operations that make a candidate again, as a graph module of its own.
frontier    what a closure starts from: inputs of the graph (free: the caller holds them anyway) and intermediate
            tensors (paid for: they become new outputs of the graph).
deferred    said of a candidate that has left the graph. What is not deferred is refused, with a reason.

Steps
-----
1. Find the candidates.
2. Find which tensors are changed in place anywhere in the graph. None of them may be in a closure or its frontier:
   a closure runs later and must see the values that the graph saw.
3. For each candidate walk back over operations that are cheap to describe, pure and deterministic (the table
   `_REPEATABLE`), at most `max_nodes` of them. In that neighbourhood a minimum cut (bytes of storage that an output would
   keep alive) separates the candidate from everything else; the cut nearest to the candidate is the frontier.
   Defer when the frontier's intermediates have at most a quarter of the candidate's bytes.
4. Copy the closure out. In-graph autocast regions are entered and left again inside it.
5. Copy the graph with the deferred outputs removed and the frontier appended.

Not handled, and so refused: candidates that share memory with an input or with another output; closures with random,
mutating, unlisted or higher-order operations (dropout, a checkpointed head); operations run with gradients off or
under a `torch.func` transform when the candidate requires grad; tensor subclasses; shapes that depend on data.
"""

import dataclasses
import functools
import inspect
import operator
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import networkx as nx
import sympy
import torch
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensor

MIN_BYTES = 1 << 20
"""Outputs under this many bytes are not worth deferring."""

MAX_CLOSURE_NODES = 24
"""Operations in one closure. The longest known head (slice, linear, three for the soft cap, casts) has nine."""

FRONTIER_SHARE = 4
"""A frontier may have at most one part in this many of the output's bytes."""

Extent = int | sympy.Expr
"""A size or a stride: a number, or an expression in the graph's size symbols."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Where one value of a frontier comes from at run time."""

    kind: Literal["input", "output"]  # an argument, or a return value, of DeferResult.graph_module
    index: int  # position among them
    name: str  # what a person would call it: "L['self'].lm_head.weight", or the node's name


@dataclasses.dataclass(frozen=True)
class DeferredOutput:
    """One output that left the graph, and how to make it again."""

    indices: tuple[int, ...]  # positions in the original output tuple (more than one: the same tensor twice)
    closure: fx.GraphModule  # called with the frontier's values in order, returns the output
    frontier: tuple[Source, ...]  # tensors, and ints where shapes are dynamic
    shape: tuple[Extent, ...]  # elements
    stride: tuple[Extent, ...]  # elements
    storage_offset: Extent  # elements
    symbols: tuple[tuple[sympy.Symbol, int, int | None], ...]  # (symbol, input index, dim of it or None: an int)
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool  # when the graph runs with gradients enabled
    nbytes: int  # bytes that the output would keep alive, by the hints of symbolic sizes
    frontier_nbytes: int  # bytes of the frontier's intermediates, likewise
    where: str  # the user's line that makes it, "file.py:12, in forward: logits = self.head(h)"

    def geometry(self, args: Sequence[Any]) -> tuple[tuple[int, ...], tuple[int, ...], int]:
        """Shape, stride and storage offset (in elements) for the graph inputs `args`."""
        values = tuple(
            int(args[index] if dim is None else args[index].shape[dim]) for _, index, dim in self.symbols
        )
        extents = (*self.shape, *self.stride, self.storage_offset)
        numbers = _evaluate(extents, tuple(symbol for symbol, _, _ in self.symbols), values)
        ndim = len(self.shape)
        return numbers[:ndim], numbers[ndim : 2 * ndim], numbers[-1]


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A candidate that stays in the graph."""

    index: int  # position in the output tuple
    reason: str  # why, in words
    where: str  # the user's line that makes it, or "" when unknown
    nbytes: int  # bytes that it keeps alive, by the hints of symbolic sizes


@dataclasses.dataclass(frozen=True)
class DeferResult:
    """What `defer_outputs` did."""

    graph_module: fx.GraphModule  # the graph to compile: a new one, or the given one when nothing is deferred
    num_outputs: int  # outputs of the original graph
    deferred: tuple[DeferredOutput, ...]
    refusals: tuple[Refusal, ...]


def defer_outputs(
    gm: fx.GraphModule, *, min_bytes: int = MIN_BYTES, max_nodes: int = MAX_CLOSURE_NODES
) -> DeferResult:
    """Take large outputs that the loss is made from out of `gm`.

    Args:
        gm: a Dynamo graph, with fake tensors in `node.meta["example_value"]` and a flat tuple of outputs. It is
            not changed.
        min_bytes: outputs smaller than this stay.
        max_nodes: most operations in one closure.

    Returns:
        The new graph has the remaining outputs in their order, then the frontier's intermediates, each once. Every
        input is kept, so it is called as before. `mstc.runtime.deferred.wrap_outputs` puts the original list of
        outputs together again.
    """
    outputs = _output_list(gm.graph)
    facts = _Facts(gm)
    deferred: list[tuple[fx.Node, tuple[int, ...], _Closure]] = []
    refusals: list[Refusal] = []
    for node in _candidates(outputs, min_bytes):
        indices = tuple(i for i, out in enumerate(outputs) if out is node)
        reason = facts.why_not_deferrable(node, outputs)
        closure = reason or _find_closure(node, facts, max_nodes)
        if isinstance(closure, _Closure) and (unknown := facts.unknown_symbols(node)):
            closure = f"its shape depends on {unknown}, which no input of the graph tells"
        if isinstance(closure, str):
            refusals.append(Refusal(indices[0], closure, _where(node), _hinted_nbytes(node) or 0))
        else:
            deferred.append((node, indices, closure))
    if not deferred:
        return DeferResult(gm, len(outputs), (), tuple(refusals))

    gone = {node for node, _, _ in deferred}
    new_outputs = [out for out in outputs if out not in gone]
    for _, _, closure in deferred:
        new_outputs += [node for node in closure.frontier if node not in new_outputs]
    records = tuple(_record(*item, facts, new_outputs) for item in deferred)
    return DeferResult(_with_outputs(gm, new_outputs), len(outputs), records, tuple(refusals))


# --- step 1: candidates -----------------------------------------------------------------------------------------


def _output_list(graph: fx.Graph) -> list[Any]:
    (outputs,) = graph.output_node().args
    assert isinstance(outputs, (tuple, list)), "a Dynamo graph returns a flat tuple"
    return list(outputs)


def _candidates(outputs: list[Any], min_bytes: int) -> list[fx.Node]:
    """Output nodes, each once and in order, that are large and that a loss is computed from."""
    tensors = dict.fromkeys(n for n in outputs if isinstance(n, fx.Node) and _is_floating(n))
    made_from: set[fx.Node] = set()
    for loss in tensors:
        if _tensor(loss).dim() == 0:
            made_from |= _ancestors(loss)
    return [n for n in tensors if n in made_from and (_hinted_nbytes(n) or 0) >= min_bytes]


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = list(node.all_input_nodes)
    while stack:
        if (above := stack.pop()) not in found:
            found.add(above)
            stack.extend(above.all_input_nodes)
    return found


# --- step 2: facts about the graph ------------------------------------------------------------------------------


class _Facts:
    """What the whole graph says about its nodes: order, memory, mutations, contexts."""

    def __init__(self, gm: fx.GraphModule):
        self.order = {node: position for position, node in enumerate(gm.graph.nodes)}
        self.placeholders = gm.graph.find_nodes(op="placeholder")
        self.changed = _changed_storages(gm)
        self.autocast: dict[fx.Node, tuple[fx.Node, ...]] = {}  # the in-graph regions around a node
        self.no_grad: set[fx.Node] = set()
        self.transformed: set[fx.Node] = set()  # under vmap, grad, ...
        self.scalars: dict[Any, fx.Node] = {}  # size expression -> the input that is this number
        self.symbols: dict[sympy.Symbol, tuple[int, int | None]] = {}
        self._read_contexts(gm.graph)
        self._read_sizes()

    def _read_contexts(self, graph: fx.Graph) -> None:
        autocast: tuple[fx.Node, ...] = ()
        grad_off, depth = False, 0
        for node in graph.nodes:
            name = _name(node)
            if name == "_enter_autocast":
                autocast = (*autocast, node)
            elif name == "_exit_autocast":
                autocast = tuple(enter for enter in autocast if enter is not node.args[0])
            elif name == "_set_grad_enabled":
                grad_off = not node.args[0]
            elif name.endswith("_increment_nesting"):
                depth += 1
            elif name.endswith("_decrement_nesting"):
                depth -= 1
            self.autocast[node] = autocast
            if grad_off:
                self.no_grad.add(node)
            if depth:
                self.transformed.add(node)

    def _read_sizes(self) -> None:
        for index, node in enumerate(self.placeholders):
            value = _value(node)
            if isinstance(value, torch.SymInt):
                self.scalars.setdefault(value.node.expr, node)
                self._bind(value, index, None)
        for index, node in enumerate(self.placeholders):
            if isinstance(value := _value(node), torch.Tensor):
                for dim, size in enumerate(value.shape):
                    self._bind(size, index, dim)

    def _bind(self, size: int | torch.SymInt, index: int, dim: int | None) -> None:
        if isinstance(size, torch.SymInt) and isinstance(size.node.expr, sympy.Symbol):
            self.symbols.setdefault(size.node.expr, (index, dim))

    def why_not_deferrable(self, node: fx.Node, outputs: list[Any]) -> str | None:
        """A reason to leave an output where it is that needs no look at what makes it."""
        if not _is_plain_tensor(node):
            return f"it is a {type(_value(node)).__name__}, not a plain tensor"
        if node.op == "placeholder":
            return "it is an input of the graph"
        for other in (*self.placeholders, *outputs):
            if other is not node and isinstance(other, fx.Node) and _share_memory(node, other):
                kind = "input" if other.op == "placeholder" else "output"
                return f"it shares memory with the {kind} {_label(other)}"
        return None

    def unknown_symbols(self, node: fx.Node) -> str:
        """The symbols in the output's sizes that no input tells, as text; empty when there are none."""
        unknown = _free_symbols(_extents(_tensor(node))) - self.symbols.keys()
        return ", ".join(sorted(map(str, unknown)))

    def stand_in(self, node: fx.Node) -> Any:
        """What a closure uses in place of the number that `node` is: a literal, an input, or None for neither."""
        value = _value(node)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, torch.SymInt):
            return int(value.node.expr) if value.node.expr.is_number else self.scalars.get(value.node.expr)
        return None

    def why_not_free(self, node: fx.Node) -> str | None:
        """Why an input cannot be read when the closure runs; None when it can."""
        return f"{_label(node)} is changed in place in the graph" if self._is_changed(node) else None

    def why_not_repeatable(self, node: fx.Node, output: fx.Node) -> str | None:
        """Why `node` cannot be in a closure that makes `output`; None when it can."""
        if self._is_changed(node):
            return f"{_label(node)} is changed in place in the graph"
        if not _is_repeatable(node):
            return f"{_name(node) or node.op} is not an operation that can be repeated later"
        if node in self.transformed:
            return f"{_label(node)} is under a torch.func transform"
        if node in self.no_grad and _tensor(output).requires_grad:
            return f"{_label(node)} is computed with gradients off"
        return None

    def cost(self, node: fx.Node) -> int | None:
        """What keeping `node` as an output costs, to compare; None when it cannot be an output."""
        if node.op in ("placeholder", "get_attr") or not _is_plain_tensor(node):
            return None
        nbytes = _hinted_nbytes(node)
        if nbytes is None or self._is_changed(node) or node in self.transformed:
            return None
        is_view = any(_share_memory(node, source) for source in node.all_input_nodes)
        return 2 * nbytes + is_view  # a view keeps the same bytes alive: then rather the tensor itself

    def _is_changed(self, node: fx.Node) -> bool:
        return isinstance(_value(node), torch.Tensor) and _storage(node) in self.changed


def _changed_storages(gm: fx.GraphModule) -> set[int]:
    """Storages of fake tensors that some node of the graph writes to."""
    changed: set[int] = set()
    for node in gm.graph.nodes:
        value = _value(node)
        if isinstance(value, torch.Tensor) and not value.is_inference() and value._version > 0:
            changed.add(_storage(node))
        changed.update(_storage(arg) for arg in _written(gm, node) if isinstance(_value(arg), torch.Tensor))
    return changed


def _written(gm: fx.GraphModule, node: fx.Node) -> Iterable[fx.Node]:
    """Arguments that `node` may write to. Most writes also show in a fake tensor's version; these need not."""
    target, name = node.target, _name(node)
    if node.op not in ("call_function", "call_method"):
        return ()
    if isinstance(target, HigherOrderOperator):
        pure = "mutation" not in name and not any(
            _changes_inputs(getattr(gm, str(arg.target))) for arg in node.all_input_nodes if arg.op == "get_attr"
        )
        return () if pure else node.all_input_nodes
    if isinstance(target, (OpOverload, OpOverloadPacket)):
        overloads = [target] if isinstance(target, OpOverload) else _overloads(target)
        return node.all_input_nodes if any(op._schema.is_mutable for op in overloads) else ()
    if name in ("batch_norm", "instance_norm"):
        return node.all_input_nodes  # the running statistics
    if name == "embedding" and node.kwargs.get("max_norm", node.args[3:4] or None) not in (None, (None,)):
        return node.all_input_nodes  # renormalises the weight
    in_place = (name.endswith("_") and not name.startswith("_")) or name in _IN_PLACE_OPERATORS
    if in_place or node.kwargs.get("out") is not None or _says_inplace(node):
        return node.all_input_nodes
    return ()


def _changes_inputs(module: Any) -> bool:
    if not isinstance(module, fx.GraphModule):
        return False
    changed = _changed_storages(module)
    inputs = module.graph.find_nodes(op="placeholder")
    return any(isinstance(_value(n), torch.Tensor) and _storage(n) in changed for n in inputs)


def _overloads(packet: OpOverloadPacket) -> list[OpOverload]:
    return [getattr(packet, name) for name in packet.overloads()]


def _says_inplace(node: fx.Node) -> bool:
    """Whether a call like `relu(x, inplace=True)` asks for an in-place result."""
    if "inplace" in node.kwargs:
        return bool(node.kwargs["inplace"])
    if node.op != "call_function" or True not in node.args:
        return False
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # a builtin without a signature has no such parameter
        return False
    return bool(bound.arguments.get("inplace", False))


_IN_PLACE_OPERATORS = frozenset(
    "setitem delitem iadd isub imul imatmul itruediv ifloordiv imod ipow iand ior ixor ilshift irshift".split()
)


# --- step 3: the closure and its frontier -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Closure:
    nodes: tuple[fx.Node, ...]  # in the graph's order; the last one is the output
    inputs: tuple[fx.Node, ...]  # graph inputs that it reads, in order
    frontier: tuple[fx.Node, ...]  # intermediates that it reads, in the graph's order


def _find_closure(output: fx.Node, facts: _Facts, max_nodes: int) -> _Closure | str:
    """The closure with the smallest frontier, or the reason why there is none."""
    network = nx.DiGraph()
    network.add_edge((output, "made"), "output")  # an edge without a capacity cannot be cut
    obstacles: dict[fx.Node, str] = {}  # nodes that only the rest of the graph can make
    found: dict[fx.Node, None] = {}
    num_nodes = 0
    queue = deque([output])
    while queue:
        node = queue.popleft()
        if node in found:
            continue
        found[node] = None
        if node.op == "placeholder":
            obstacle = facts.why_not_free(node)
        else:
            obstacle = facts.why_not_repeatable(node, output)
            if obstacle is None and num_nodes == max_nodes:
                obstacle = f"{_label(node)} is more than {max_nodes} operations away"
            if obstacle is None:
                num_nodes += 1
                for source in _needs(node, facts):
                    network.add_edge((source, "made"), (node, "make"))
                    queue.append(source)
        if obstacle is not None:
            obstacles[node] = obstacle
            network.add_edge("rest", (node, "make"))
        cost = None if node is output else facts.cost(node)
        network.add_edge((node, "make"), (node, "made"), **({} if cost is None else {"capacity": cost}))

    frontier: list[fx.Node] = []
    if obstacles:
        try:
            _, (rest, _) = nx.minimum_cut(network, "rest", "output")
        except nx.NetworkXUnbounded:
            stuck = (why for node, why in obstacles.items() if node is output or facts.cost(node) is None)
            return next(stuck)
        frontier = [n for n in found if (n, "make") in rest and (n, "made") not in rest]
    closure = _closure_above(output, frontier, facts)
    size, kept = _hinted_nbytes(output) or 0, _frontier_nbytes(closure.frontier)
    if kept * FRONTIER_SHARE > size:
        names = ", ".join(_label(n) + (f" ({obstacles[n]})" if n in obstacles else "") for n in closure.frontier)
        return f"it has {size:,} bytes and can only be made again from {kept:,} bytes: {names}"
    return closure


def _closure_above(output: fx.Node, frontier: list[fx.Node], facts: _Facts) -> _Closure:
    nodes: set[fx.Node] = set()
    inputs: set[fx.Node] = set()
    stack = [output]
    while stack:
        node = stack.pop()
        if node.op == "placeholder":
            inputs.add(node)
        elif node not in frontier and node not in nodes:
            nodes.add(node)
            stack.extend(_needs(node, facts))
    in_order = functools.partial(sorted, key=facts.order.__getitem__)
    reached = {source for node in nodes for source in _needs(node, facts)}
    return _Closure(
        tuple(in_order(nodes)), tuple(in_order(inputs)), tuple(in_order(n for n in frontier if n in reached))
    )


def _needs(node: fx.Node, facts: _Facts) -> list[fx.Node]:
    """The nodes whose values `node` reads when a closure repeats it; numbers that an input tells need no node."""
    needed: list[fx.Node] = []
    for source in node.all_input_nodes:
        stand_in = facts.stand_in(source)
        if stand_in is None or isinstance(stand_in, fx.Node):
            needed.append(stand_in or source)
    return needed


def _frontier_nbytes(frontier: Iterable[fx.Node]) -> int:
    return sum({_storage(node): _hinted_nbytes(node) or 0 for node in frontier}.values())


_REPEATABLE_FUNCTIONS: frozenset[Any] = frozenset(
    [torch.nn.functional.linear, torch.nn.functional.tanh, torch.nn.functional.sigmoid]
    + [torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, torch.einsum]
    + [torch.add, torch.sub, torch.mul, torch.div, torch.true_divide, torch.neg, torch.pow, torch.square]
    + [torch.tanh, torch.sigmoid, torch.clamp, torch.reshape, torch.permute, torch.transpose, torch.t]
    + [torch.flatten, torch.unflatten, torch.squeeze, torch.unsqueeze, torch.narrow, torch.select]
    + [operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.neg]
    + [operator.pow, operator.matmul]
)

_REPEATABLE_METHODS = frozenset(
    "add sub mul div true_divide neg pow square tanh sigmoid clamp matmul mm bmm addmm __add__ __radd__ __mul__"
    " __rmul__ __sub__ __truediv__ __matmul__ float double half bfloat16 to type_as contiguous view reshape permute"
    " transpose t flatten unflatten squeeze unsqueeze narrow select size dim".split()
)


def _is_repeatable(node: fx.Node) -> bool:
    """Whether `node` is in the table of operations that a closure may repeat, used in a way that is."""
    value = _value(node)
    is_number = isinstance(value, (int, float, torch.SymInt, torch.SymFloat, torch.Size))
    if not is_number and not _is_plain_tensor(node):
        return False
    if node.kwargs.get("out") is not None or _has_bare_symbols(node):
        return False
    source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    if node.target is operator.getitem:
        return source is not None and _can_index(source, node.args[1])
    if node.target is getattr:
        return node.args[1] in ("T", "mT", "shape")
    if node.op == "call_method" and node.target == "item":  # how Dynamo passes a float of the module
        return source is not None and source.op == "placeholder" and _tensor(source).device.type == "cpu"
    if node.op == "call_method" and node.target in ("to", "type_as"):
        return source is not None and _tensor(source).device == _tensor(node).device
    if node.op == "call_method":
        return node.target in _REPEATABLE_METHODS
    return node.op == "call_function" and node.target in _REPEATABLE_FUNCTIONS


def _can_index(source: fx.Node, index: Any) -> bool:
    """Whether `source[index]` is a slice, a gather, or an element of a shape (a mask's result size is data)."""
    masks: list[fx.Node] = []

    def look(node: fx.Node) -> fx.Node:
        if isinstance(value := _value(node), torch.Tensor) and value.dtype in (torch.bool, torch.uint8):
            masks.append(node)
        return node

    fx.map_arg(index, look)
    return isinstance(_value(source), (torch.Tensor, torch.Size)) and not masks


def _has_bare_symbols(node: fx.Node) -> bool:
    """Whether a symbolic number is written into the arguments and not passed by a node."""
    found: list[Any] = []
    symbolic = (torch.SymInt, torch.SymFloat, torch.SymBool)
    fx.node.map_aggregate((node.args, node.kwargs), lambda a: found.append(a) if isinstance(a, symbolic) else a)
    return bool(found)


# --- steps 4 and 5: new graphs ----------------------------------------------------------------------------------


def _record(
    node: fx.Node, indices: tuple[int, ...], closure: _Closure, facts: _Facts, new_outputs: list[Any]
) -> DeferredOutput:
    tensor = _tensor(node)
    sources = [Source("input", facts.placeholders.index(n), _label(n)) for n in closure.inputs]
    sources += [Source("output", new_outputs.index(n), _label(n)) for n in closure.frontier]
    extents = _extents(tensor)
    symbols = sorted(_free_symbols(extents), key=str)
    return DeferredOutput(
        indices=indices,
        closure=_closure_module(closure, facts),
        frontier=tuple(sources),
        shape=extents[: tensor.dim()],
        stride=extents[tensor.dim() : 2 * tensor.dim()],
        storage_offset=extents[-1],
        symbols=tuple((symbol, *facts.symbols[symbol]) for symbol in symbols),
        dtype=tensor.dtype,
        device=tensor.device,
        requires_grad=tensor.requires_grad,
        nbytes=_hinted_nbytes(node) or 0,
        frontier_nbytes=_frontier_nbytes(closure.frontier),
        where=_where(node),
    )


def _closure_module(closure: _Closure, facts: _Facts) -> fx.GraphModule:
    """The closure as a module: inputs first, then the frontier's intermediates; returns the output."""
    graph = fx.Graph()
    new = {node: graph.placeholder(node.name) for node in (*closure.inputs, *closure.frontier)}

    def translate(node: fx.Node) -> Any:
        stand_in = facts.stand_in(node)
        return new[node] if stand_in is None else new.get(stand_in, stand_in)

    active: tuple[fx.Node, ...] = ()  # autocast regions of the original graph that are open in the new one

    def switch_autocast(wanted: tuple[fx.Node, ...]) -> None:
        nonlocal active
        while active != wanted[: len(active)]:
            graph.call_function(torch.amp.autocast_mode._exit_autocast, (new[active[-1]],))
            active = active[:-1]
        for enter in wanted[len(active) :]:
            new[enter] = graph.node_copy(enter, translate)
            active = (*active, enter)

    for node in closure.nodes:
        switch_autocast(facts.autocast[node])
        new[node] = graph.node_copy(node, translate)
    switch_autocast(())
    for node in graph.nodes:  # a closure lives as long as the compiled function: no fake tensors in it
        node.meta = {key: node.meta[key] for key in ("stack_trace",) if key in node.meta}
    graph.output(new[closure.nodes[-1]])
    graph.lint()
    return fx.GraphModule(torch.nn.Module(), graph, class_name="Closure")


def _with_outputs(gm: fx.GraphModule, outputs: list[Any]) -> fx.GraphModule:
    """A copy of `gm` that returns `outputs`."""
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        if node.op != "output":
            new[node] = graph.node_copy(node, new.__getitem__)
        else:
            results = fx.map_arg(tuple(outputs), new.__getitem__)
            graph.output(results).meta = dict(node.meta)
    graph.lint()
    copy = fx.GraphModule(gm, graph)
    copy.meta = dict(gm.meta)
    for key, value in vars(gm).items():  # what Dynamo and AOTAutograd leave on a graph module
        vars(copy).setdefault(key, value)
    return copy


# --- reading nodes ----------------------------------------------------------------------------------------------


def _value(node: fx.Node) -> Any:
    return node.meta.get("example_value")


def _tensor(node: fx.Node) -> torch.Tensor:
    value = _value(node)
    assert isinstance(value, torch.Tensor), f"{node} is not a tensor"
    return value


def _is_floating(node: fx.Node) -> bool:
    value = _value(node)
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _is_plain_tensor(node: fx.Node) -> bool:
    value = _value(node)
    plain = type(value) is FakeTensor or type(value) in (torch.Tensor, torch.nn.Parameter)
    return plain and value.layout is torch.strided


def _storage(node: fx.Node) -> int:
    """An identity for the memory behind a tensor; views have their base's."""
    return _tensor(node).untyped_storage()._cdata


def _share_memory(node: fx.Node, other: fx.Node) -> bool:
    return isinstance(_value(other), torch.Tensor) and _storage(node) == _storage(other)


def _hinted_nbytes(node: fx.Node) -> int | None:
    """Bytes of the whole storage that `node` keeps alive; None when a size has no hint."""
    nbytes: Any = _tensor(node).untyped_storage().nbytes()
    if isinstance(nbytes, torch.SymInt):
        return nbytes.node.hint if nbytes.node.has_hint() else None
    return nbytes


def _extents(tensor: torch.Tensor) -> tuple[Extent, ...]:
    """Shape, stride and storage offset, one after the other."""
    extents: Sequence[Any] = (*tensor.shape, *tensor.stride(), tensor.storage_offset())
    return tuple(e.node.expr if isinstance(e, torch.SymInt) else e for e in extents)


def _free_symbols(extents: Iterable[Extent]) -> set[sympy.Symbol]:
    return {symbol for e in extents if isinstance(e, sympy.Expr) for symbol in e.free_symbols}  # type: ignore[misc]


@functools.lru_cache(maxsize=1024)
def _evaluate(
    extents: tuple[Extent, ...], symbols: tuple[sympy.Symbol, ...], values: tuple[int, ...]
) -> tuple[int, ...]:
    known = {symbol: sympy.Integer(value) for symbol, value in zip(symbols, values, strict=True)}
    return tuple(int(e.xreplace(known)) if isinstance(e, sympy.Expr) else e for e in extents)


def _name(node: fx.Node) -> str:
    """The bare name of what a node calls; empty for inputs and outputs."""
    if node.op == "call_method":
        return str(node.target)
    if isinstance(node.target, OpOverload):
        return node.target._schema.name
    return getattr(node.target, "__name__", str(node.target)) if node.op == "call_function" else ""


def _label(node: fx.Node) -> str:
    """A person's name for a node: where an input comes from, or the variable it was assigned to."""
    grapharg = node.meta.get("grapharg")
    if grapharg is None:
        return node.name
    name: str | Callable[[], str] = grapharg.source.name  # a method before torch 2.12
    return name() if callable(name) else name


def _where(node: fx.Node) -> str:
    """The innermost user line that made a node, `file.py:12, in forward: code`; empty when unknown."""
    lines = [line.strip() for line in node.meta.get("stack_trace", "").splitlines() if line.strip()]
    last = max((i for i, line in enumerate(lines) if line.startswith("File ")), default=None)
    if last is None:
        return ""
    file, _, place = lines[last].removeprefix("File ").partition(", line ")
    code = lines[last + 1] if last + 1 < len(lines) else ""
    return f"{file.strip(chr(34))}:{place}" + (f": {code}" if code else "")

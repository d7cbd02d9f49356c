"""A new graph in which every planned region is one forward loop node and one backward loop node.

The one hard idea: a region's nodes leave the graph, and what outside nodes read of them is read
from a loop node instead. A region is convex, so the loop node has a place: after all that it reads
and before all that reads it. The new order is a stable topological sort in which a loop stands
where the last of its nodes stood.

Steps
    1. For every plan, write the bodies (`passes.modes`, `passes.body`).
    2. Sort the units (nodes that stay, loops) topologically.
    3. Copy what stays; for a loop emit one call of the loop op, a ``getitem`` per output, and a
       cast where a sum was accumulated in a wider type, or a product with the tangent where
       gradients were made in the forward.
    4. Drop what nobody reads any more.

The input graph is never edited: to fall back is to drop the result.

Not handled: a region whose boundary input is changed in place by the graph (``copy_`` to an input):
the backward loop would read the new value. Such a region is refused (`mutated_inputs`).
"""

from __future__ import annotations

import heapq
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import networkx as nx
import sympy
import torch
from torch.fx import Graph, Node, Proxy
from torch.fx.node import map_arg
from torch.fx.proxy import GraphAppendingTracer
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from passes.axes import Axes
from passes.body import Body, sizes_of
from passes.copies import copy_node
from passes.liveness import tangent_nodes
from passes.modes import Bodies
from passes.records import LoopPlan

aten = torch.ops.aten
prims = torch.ops.prims

_CHUNK_ARGUMENT = 2  # of the loop op


@dataclass(frozen=True)
class _Loop:
    plan: LoopPlan
    bodies: Bodies
    body: Body
    label: str
    is_backward: bool


@dataclass(frozen=True)
class LoopNode:
    """A loop in the new graph."""

    node: Node
    plan: LoopPlan
    body: Body
    label: str


class UnorderedLoops(Exception):
    """Loops of regions that are convex each by itself, but read each other's results.

    Attributes:
        plans: those whose loops wait for each other.
    """

    def __init__(self, plans: tuple[LoopPlan, ...]) -> None:
        super().__init__("loops wait for each other")
        self.plans = plans


class ChunkedGraph:
    """The rewritten graph and its loop nodes."""

    def __init__(self, graph: Graph, loops: tuple[LoopNode, ...]) -> None:
        self.graph = graph
        self.loops = loops

    def resized(self, plans: Mapping[LoopPlan, LoopPlan]) -> ChunkedGraph:
        """The same loops with other chunk sizes. The graph is shared and changed in place: what was
        planned with the old sizes must not be used any more."""
        loops: list[LoopNode] = []
        for loop in self.loops:
            plan = plans[loop.plan]
            loop.node.update_arg(_CHUNK_ARGUMENT, plan.chunk)
            loops.append(LoopNode(loop.node, plan, loop.body, loop.label))
        return ChunkedGraph(self.graph, tuple(loops))


def mutated_inputs(graph: Graph) -> set[Node]:
    """Graph inputs that the graph writes to (AOTAutograd leaves these as trailing ``copy_``), or
    whoever calls it, from one of its outputs (which AOTAutograd's descriptors tell)."""
    (output,) = graph.find_nodes(op="output")
    described = (getattr(d, "mutated_input", None) for d in output.meta.get("desc") or ())
    from_outside = {d for d in described if d is not None}
    found = {n for n in graph.find_nodes(op="placeholder") if n.meta.get("desc") in from_outside}
    for node in graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        for argument, value in zip(node.target._schema.arguments, node.args, strict=False):
            if (
                argument.alias_info is not None
                and argument.alias_info.is_write
                and isinstance(value, Node)
            ):
                found.add(value)
    return found


class _Rewriter:
    def __init__(
        self,
        graph: Graph,
        axes: Axes,
        plans: Mapping[LoopPlan, Bodies],
        loop_op: Callable[..., object],
        lowering: str,
    ) -> None:
        self.old = graph
        self.axes = axes
        self.loop_op = loop_op
        self.lowering = lowering
        self.order = {n: i for i, n in enumerate(graph.nodes)}
        self.new = Graph()
        self.map: dict[Node, Node] = {}
        self.loops: list[_Loop] = []
        self.owner: dict[Node, _Loop] = {}  # region output -> the loop that makes it
        self.inside: set[Node] = set()
        self.made: list[LoopNode] = []
        self.tangents = tangent_nodes(graph)
        self.size_nodes: dict[sympy.Expr, Node] = {}
        self.units: dict[
            Node, Node
        ] = {}  # gradient-in-forward: scalar -> its value for a tangent of one
        for plan, bodies in plans.items():
            self.inside |= plan.region.nodes
            for body, is_backward in ((bodies.forward, False), (bodies.backward, True)):
                if body is not None:
                    loop = _Loop(plan, bodies, body, f"{bodies.mode}", is_backward)
                    self.loops.append(loop)
                    for out in body.outputs:
                        self.owner[out.node] = loop

    # -- order

    def reads(self, unit: Node | _Loop) -> list[Node]:
        if isinstance(unit, Node):
            return unit.all_input_nodes
        chain = unit.bodies.chain
        if unit.bodies.mode != "gradient-in-forward":
            return [*unit.body.inputs]
        inputs = [n for n in unit.body.inputs if n not in chain and n is not unit.bodies.tangent]
        return inputs + [
            i
            for n in chain
            for i in n.all_input_nodes
            if i not in chain and i is not unit.bodies.tangent
        ]

    def scheduled(self) -> list[Node | _Loop]:
        units: list[Node | _Loop] = [n for n in self.old.nodes if n not in self.inside]
        units += self.loops
        place: dict[int, int] = {}
        for unit in units:
            if isinstance(unit, Node):
                place[id(unit)] = self.order[unit]
            else:
                work = unit.body.work
                own = [n for n in work if n in unit.plan.region.forward] or list(work)
                if unit.is_backward:
                    own = [o.node for o in unit.body.outputs]
                place[id(unit)] = max(self.order[n] for n in own)
        waiting: dict[int, int] = {}
        readers: dict[int, list[Node | _Loop]] = {}
        ready: list[tuple[int, int, Node | _Loop]] = []
        for serial, unit in enumerate(units):
            needs = {id(self.owner.get(i, i)) for i in self.reads(unit)}
            waiting[id(unit)] = len(needs)
            for need in needs:
                readers.setdefault(need, []).append(unit)
            if not needs:
                ready.append((place[id(unit)], serial, unit))
        serials = {id(u): i for i, u in enumerate(units)}
        heapq.heapify(ready)
        out: list[Node | _Loop] = []
        while ready:
            _, _, unit = heapq.heappop(ready)
            out.append(unit)
            for reader in readers.get(id(unit), ()):
                waiting[id(reader)] -= 1
                if waiting[id(reader)] == 0:
                    heapq.heappush(ready, (place[id(reader)], serials[id(reader)], reader))
        if len(out) < len(units):
            raise UnorderedLoops(self.circle(units, set(map(id, out))))
        return out

    def circle(self, units: list[Node | _Loop], done: set[int]) -> tuple[LoopPlan, ...]:
        """The plans whose loops wait for each other."""
        waits = nx.DiGraph()
        loops = {id(u): u for u in units if isinstance(u, _Loop)}
        for unit in units:
            if id(unit) not in done:
                waits.add_edges_from((id(self.owner.get(i, i)), id(unit)) for i in self.reads(unit))
        stuck = [c for c in nx.strongly_connected_components(waits) if len(c) > 1]
        plans = [loops[i].plan for c in stuck for i in c if i in loops]
        assert plans, "a region is not convex"
        return tuple(dict.fromkeys(plans))

    # -- emission

    def run(self) -> ChunkedGraph:
        for unit in self.scheduled():
            if isinstance(unit, Node):
                self.map[unit] = self.copy(unit, self.map.__getitem__)
            else:
                self.emit(unit)
        self.new.eliminate_dead_code()
        self.new.lint()
        alive = set(self.new.nodes)
        return ChunkedGraph(self.new, tuple(m for m in self.made if m.node in alive))

    def copy(self, node: Node, look: Callable[[Node], Node]) -> Node:
        return copy_node(self.new, node, look)

    def call(
        self, like: Node, target: Callable[..., object], *args: object, backward: bool
    ) -> Node:
        """A new call whose fake value comes from running it on the operands' fake values."""
        node = self.new.call_function(target, cast("Any", args))
        values = map_arg(cast("Any", args), lambda n: n.meta["val"])
        fake_mode = _fake_mode(like)
        with fake_mode:
            node.meta["val"] = target(*values)
        for key in (
            "stack_trace",
            "nn_module_stack",
            "fwd_nn_module_stack",
            "seq_nr",
            "original_aten",
        ):
            if key in like.meta:
                node.meta[key] = like.meta[key]
        node.meta["partitioner_tag"] = "is_backward" if backward else "is_forward"
        return node

    def unit_chain(self, loop: _Loop) -> dict[Node, Node]:
        """The scalars of the chain, for a tangent of one."""
        tangent = loop.bodies.tangent
        assert tangent is not None
        if tangent not in self.units:
            value = tangent.meta["val"]
            one = self.new.call_function(
                aten.full.default,
                (list(value.shape), 1),
                {"dtype": value.dtype, "device": value.device},
            )
            one.meta = {"val": value, "partitioner_tag": "is_forward"}
            self.units[tangent] = one
        for node in loop.bodies.chain:
            if node not in self.units:
                copy = self.copy(node, lambda n: self.units.get(n) or self.map[n])
                copy.meta["partitioner_tag"] = "is_forward"
                self.units[node] = copy
        return self.units

    def emit(self, loop: _Loop) -> None:
        body, tangent = loop.body, loop.bodies.tangent
        units = self.unit_chain(loop) if tangent is not None else {}
        inputs = [units.get(n) or self.map[n] for n in body.inputs]
        like = loop.plan.region.seed if not loop.is_backward else body.outputs[0].node
        sizes = [self.size_argument(s) for s in sizes_of(body, self.axes)]
        node = self.call(
            like,
            self.loop_op,
            inputs,
            sizes,
            loop.plan.chunk,
            body.spec,
            self.lowering,
            backward=loop.is_backward,
        )
        self.made.append(LoopNode(node, loop.plan, body, loop.label))
        for index, out in enumerate(body.outputs):
            in_backward = loop.is_backward or out.node in self.tangent_made(loop)
            value = self.new.call_function(operator.getitem, (node, index))
            value.meta = {
                "val": node.meta["val"][index],
                "partitioner_tag": "is_backward" if loop.is_backward else "is_forward",
            }
            if in_backward and tangent is not None:
                # keyed to the tangent so that the product is the backward's, and exact when the
                # tangent is one
                scale = self.map[tangent]
                if tangent.meta["val"].dim():
                    scale = self.call(out.node, aten.reshape.default, scale, [], backward=True)
                value = self.call(out.node, aten.mul.Tensor, value, scale, backward=True)
            if value.meta["val"].dtype != out.dtype:
                value = self.call(
                    out.node,
                    prims.convert_element_type.default,
                    value,
                    out.dtype,
                    backward=in_backward,
                )
            self.map[out.node] = value

    def tangent_made(self, loop: _Loop) -> frozenset[Node]:
        return loop.plan.region.backward if loop.bodies.tangent is not None else frozenset()

    def size_argument(self, size: object) -> object:
        """An int, or a node that carries the symbolic size, computed from the graph's inputs."""
        if isinstance(size, int):
            return size
        expr = cast("sympy.Expr", size)
        if expr not in self.size_nodes:
            self.size_nodes[expr] = self.compute_size(expr)
        return self.size_nodes[expr]

    def compute_size(self, expr: sympy.Expr) -> Node:
        if isinstance(expr, sympy.Symbol):
            return self.symbol_node(expr)
        operands = {s: self.symbol_node(s) for s in cast("set[sympy.Symbol]", expr.free_symbols)}
        seen = set(self.new.nodes)
        tracer = GraphAppendingTracer(self.new)
        proxies = {s: Proxy(node, tracer) for s, node in operands.items()}
        result = sympy_interp(PythonReferenceAnalysis, cast("Any", proxies), expr)
        for node in self.new.nodes:
            if node not in seen:
                assert callable(node.target)
                node.meta["val"] = node.target(*map_arg(node.args, lambda n: n.meta["val"]))
                node.meta["partitioner_tag"] = "is_forward"
        return result.node

    def symbol_node(self, symbol: sympy.Symbol) -> Node:
        """A node that has the value of a size symbol and needs no tangent."""
        available = [n for n in self.map if n not in self.tangents]
        for node in available:
            value = node.meta.get("val")
            if isinstance(value, torch.SymInt) and value.node.expr == symbol:
                return self.map[node]
        for node in available:
            value = node.meta.get("val")
            for dim, one in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
                if isinstance(one, torch.SymInt) and one.node.expr == symbol:
                    return self.call(node, aten.sym_size.int, self.map[node], dim, backward=False)
        raise AssertionError(f"no value in the graph has the size {symbol}")


def _fake_mode(node: Node) -> torch._subclasses.FakeTensorMode:
    value = node.meta["val"]
    values = value if isinstance(value, (list, tuple)) else [value]
    return next(v.fake_mode for v in values if isinstance(v, torch._subclasses.FakeTensor))


def chunk_graph(
    graph: Graph,
    axes: Axes,
    plans: Mapping[LoopPlan, Bodies],
    loop_op: Callable[..., object],
    lowering: str,
) -> ChunkedGraph:
    """Rewrite the planned regions of `graph` into loops.

    Args:
        graph: a functional aten graph, joint or inference; left as it is.
        axes: its axis analysis.
        plans: what to do with each region, and its bodies.
        loop_op: ``op(Tensor[] inputs, SymInt[] sizes, int chunk, str spec, str lowering) ->
            Tensor[]``, the runtime's loop.
        lowering: passed on to the loop op.
    """
    return _Rewriter(graph, axes, plans, loop_op, lowering).run()

"""The body of a loop: the part of a region that one chunk runs, as a graph of its own.

Terms
    boundary input   a value from outside that the body reads: *split* (each chunk gets its slice)
                     or *whole*.
    prelude          cheap outside nodes that are computed again inside, because their inputs are a
                     better boundary: views (so that the storage itself is passed), conversions to
                     a wider type (what is passed, and saved, has the narrow one), constants, small
                     tangent-dependent values (so that a tangent enters as the scalar that it is
                     made from), and pointwise values that would only be kept for the loop while
                     what they are made from is kept anyhow (`passes.modes`).
    accumulator      an output that is a sum over the loop axis. A matrix product over the loop axis
                     leaves the body as its two operands, and the loop adds their product in place,
                     which spares a buffer of the result's size. So do split outputs that are
                     matrix products (`passes.products`).

The body takes the sizes of its axes as arguments, the loop axis' being the chunk's, so that one
text serves any length; explicit sizes (``view``, ``expand``, ``full``) are rewritten in terms of
them. Names and order are canonical: equal layers give equal text, and are compiled once.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch.fx import Graph, Node

from passes import rules
from passes.axes import Axes, Dims, Product, Size
from passes.groups import group_size
from passes.products import Products, sum_of_products
from passes.source import elements, nbytes, op_name, packet_of

aten = torch.ops.aten

_SINKABLE_VIEWS = {
    *rules.shape.RESHAPES,
    aten.permute,
    aten.transpose,
    aten.t,
    aten.alias,
    aten.detach,
    aten.expand,
}
_CONVERSIONS = {aten._to_copy, torch.ops.prims.convert_element_type}
_NARROW = 64  # a prelude value is at least this many times smaller than the region's seed


class BodyError(Exception):
    """The region cannot be written as a body; the message says why."""


OutputKind = Literal["split", "sum", "matmul"]


@dataclass(frozen=True)
class BodyOutput:
    """One value that the loop makes."""

    node: Node  # the node of the outer graph that it stands for
    kind: OutputKind
    dims: tuple[tuple[int, ...], ...]  # per dim, indices into the body's axes
    dtype: torch.dtype  # as in the outer graph
    accumulate: torch.dtype  # of the buffer that the loop fills
    order: tuple[int, ...]  # dims from outermost to innermost in memory
    in_groups: bool  # whether its sum over very many chunks gains from two steps
    products: Products | None = None  # split outputs: how the loop makes it, if not the body

    @property
    def leaving(self) -> tuple[Node, ...]:
        """The values that leave the body for it."""
        if self.kind == "matmul":
            return _operands(self.node)
        return _leaving(self.node, self.products)

    @property
    def terms(self) -> list[int]:
        """Of every matrix product that the loop makes for it, how many values it takes."""
        if self.kind == "matmul":
            return [2]
        return [len(term) for term in self.products.terms] if self.products else []

    @property
    def made_outside(self) -> tuple[Node, ...]:
        """What the loop does for it after the body."""
        if self.kind == "matmul":
            return (self.node,)
        return self.products.nodes if self.products else ()


def _operands(product: Node) -> tuple[Node, ...]:
    """Of a matrix product: a value with itself has one input node and two operands."""
    operands = product.all_input_nodes
    return tuple(operands * (3 - len(operands)))


def _leaving(node: Node, products: Products | None) -> tuple[Node, ...]:
    return tuple(i for term in products.terms for i in term) if products else (node,)


@dataclass(frozen=True)
class Body:
    """One chunk's work, and how chunks make the whole."""

    spec: str  # everything the runtime needs, as canonical JSON
    graph: Graph
    inputs: tuple[Node, ...]  # boundary inputs, nodes of the outer graph
    outputs: tuple[BodyOutput, ...]
    axes: tuple[int, ...]  # axis ids, the loop axis first
    nodes: tuple[Node, ...] = field(repr=False)  # outer nodes computed inside, in order
    split_inputs: tuple[Node, ...] = field(repr=False)  # those of which a chunk gets its slice

    @property
    def work(self) -> tuple[Node, ...]:
        """The outer nodes that a chunk computes, in the body or after it."""
        return (*self.nodes, *(n for o in self.outputs for n in o.made_outside))

    @property
    def sums_nbytes(self) -> int:
        """What its sums take, while the loop runs."""
        sums = (o for o in self.outputs if o.kind != "split")
        return sum(elements(o.node.meta["val"]) * o.accumulate.itemsize for o in sums)

    def groups_nbytes(self, num_chunks: int) -> int:
        """What its sums take once more, where they are made in two steps (`passes.groups`)."""
        sums = sum(nbytes(o.node.meta["val"]) for o in self.outputs if o.in_groups)
        along = (*self.split_inputs, *(o.node for o in self.outputs if o.kind == "split"))
        split = sum(nbytes(n.meta["val"]) for n in along)
        return sums if sums and group_size(num_chunks, sums, split) else 0


def _is_passthrough(node: Node, axes: Axes) -> bool:
    """A ``slice`` of everything, or a tensor that a reader sees in another role."""
    if node.target is rules.shape.cut:
        return True
    packet = packet_of(node)
    return packet is aten.slice and axes.dims(node) == axes.dims(node.all_input_nodes[0])


def is_widening(node: Node) -> bool:
    """A conversion to a wider type, of which a slice is made faster than it is read."""
    if packet_of(node) not in _CONVERSIONS or len(node.all_input_nodes) != 1:
        return False
    narrow, wide = (n.meta.get("val") for n in (*node.all_input_nodes, node))
    if not (isinstance(narrow, torch.Tensor) and isinstance(wide, torch.Tensor)):
        return False
    same = narrow.device == wide.device and narrow.layout == wide.layout
    return same and narrow.element_size() < wide.element_size()


def _accumulate(node: Node) -> torch.dtype:
    """The dtype in which a sum over chunks is added up."""
    dtype = node.meta["val"].dtype
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


class _BodyBuilder:
    def __init__(
        self,
        axes: Axes,
        axis: int,
        inside: frozenset[Node],
        prelude: frozenset[Node],
        foreign: frozenset[Node],
        tangent: set[Node],
        narrow_bytes: float,
    ) -> None:
        self.axes = axes
        self.inside = inside
        self.foreign = foreign
        self.prelude = prelude
        self.tangent = tangent
        self.narrow_bytes = narrow_bytes
        self.axis = axis
        self.index: dict[int, int] = {axis: 0}  # axis id -> position among the body's sizes
        self.graph = Graph()
        self.map: dict[Node, Node] = {}
        self.inputs: dict[Node, Node] = {}
        self.nodes: list[Node] = []
        self.sizes: dict[int, Node] = {}
        self.sums: set[Node] = set()  # outputs that are complete only after the last chunk

    def dims(self, node: Node) -> tuple[tuple[int, ...], ...]:
        return tuple(self.product(p) for p in self.axes.dims(node))

    def product(self, product: Product) -> tuple[int, ...]:
        product = self.axes.table.unpermuted(product)
        return tuple(self.index.setdefault(a, len(self.index)) for a in product)

    # -- what is computed inside
    # ---------------------------------------------------------------------------------

    def computed(self, node: Node) -> bool:
        if node.op != "call_function":
            return False
        if node in self.inside:
            # a sum over the axis is read from the loop that makes it, never a chunk's part of it
            return node in self.sums or self.axes.role(node, self.axis) != "sum"
        if node in self.foreign:
            return False
        if node.target is operator.getitem and not self.computed(node.all_input_nodes[0]):
            return False  # one of several values can be passed, all of them together cannot
        if (
            any(self.is_symbolic(a) for a in node.all_input_nodes)
            and rules.size_argument(node) is None
        ):
            return False
        role = self.axes.role(node, self.axis)
        if role not in ("absent", "parallel") or self.axes.count(node, self.axis) > 1:
            return False
        if self.axes.is_relative(node, self.axis):
            return False
        if node in self.prelude or rules.is_creation(node) or op_name(node) == "aten.scalar_tensor":
            return True
        packet = packet_of(node)
        if packet in _SINKABLE_VIEWS:
            return not any(self.axes.count(i, self.axis) > 1 for i in node.all_input_nodes)
        if is_widening(node):
            return role == "parallel" and node.all_input_nodes[0] not in self.inside
        narrow = nbytes(node.meta.get("val")) <= self.narrow_bytes
        return node in self.tangent and narrow and rules.is_pointwise(node) and role == "parallel"

    @staticmethod
    def is_symbolic(node: Node) -> bool:
        return not isinstance(node.meta.get("val"), (torch.Tensor, tuple, list))

    # -- emission

    def order(self, roots: Iterable[Node]) -> list[Node]:
        """Inside nodes that the roots need, inputs first; depth first, so that equal regions
        agree."""
        seen: set[Node] = set()
        out: list[Node] = []
        stack: list[tuple[Node, bool]] = [(r, False) for r in reversed(list(roots))]
        while stack:
            node, done = stack.pop()
            if done:
                out.append(node)
                continue
            if node in seen:
                continue
            seen.add(node)
            stack.append((node, True))
            if self.computed(node):
                size_at = rules.size_argument(node)
                for i in reversed(self.axes.operands(node)):
                    if not (size_at is not None and self.is_symbolic(i)):
                        stack.append((i, False))
        return out

    def size(self, product: Product, sizes: dict[int, Node]) -> int | Node:
        """The number of positions of a product, as an expression of the body's size arguments."""
        value: int | Node = 1
        for axis in self.product(product):
            one = sizes[axis]
            value = one if value == 1 else self.graph.call_function(operator.mul, (value, one))
        return value

    def look(self, node: Node) -> Node:
        if node not in self.map:
            raise BodyError(f"{op_name(node)} is a size that is known at run time only")
        return self.map[node]

    def operand(self, node: Node, operand: Node, sizes: dict[int, Node]) -> Node:
        """What a call reads: a value, or a constant made anew in the shape of the call's own."""
        if not self.axes.is_remade(node, operand):
            return self.map[operand]
        args = rules.resized(operand, [self.size(p, sizes) for p in self.axes.dims(node)])
        target = cast("Callable[..., object]", operand.target)
        return self.graph.call_function(target, cast("Any", args), dict(operand.kwargs))

    def emit(self, node: Node, sizes: dict[int, Node]) -> Node:
        if _is_passthrough(node, self.axes):
            return self.map[node.all_input_nodes[0]]
        size_at = rules.size_argument(node)
        target = cast("Callable[..., object]", node.target)
        if size_at is None:
            if any(self.is_symbolic(i) for i in node.all_input_nodes):
                raise BodyError(f"{op_name(node)} reads a size that is known at run time only")
            args = torch.fx.map_arg(node.args, lambda n: self.operand(node, n, sizes))
            kwargs = torch.fx.map_arg(node.kwargs, self.map.__getitem__)
            if packet_of(node) is aten.sum and self.axes.role(node, self.axis) == "sum":
                kwargs = {
                    **kwargs,
                    "dtype": _accumulate(node),
                }  # a chunk's sum is not rounded before it is added
            return self.graph.call_function(target, args, kwargs)
        shape = [self.size(p, sizes) for p in self.axes.dims(node)]
        if rules.is_reshape(node):
            # reshape, not view: a slice is contiguous where the whole may have had other strides
            return self.graph.call_function(
                aten.reshape.default, (self.map[node.all_input_nodes[0]], shape)
            )
        args = list(node.args)
        args[size_at] = shape
        others = (a if i == size_at else torch.fx.map_arg(a, self.look) for i, a in enumerate(args))
        return self.graph.call_function(target, tuple(others), dict(node.kwargs))

    def products(self, kinds: dict[Node, OutputKind]) -> dict[Node, Products]:
        """The split outputs that the loop can make of operands."""
        split = [node for node, kind in kinds.items() if kind == "split"]
        made = {n: sum_of_products(n, self.axes, self.axis, self.computed) for n in split}
        return {node: one for node, one in made.items() if one is not None}

    def build(self, outputs: Sequence[Node]) -> Body:
        kinds: dict[Node, OutputKind] = {}
        for node in outputs:
            kinds[node] = "split"
            if self.axes.role(node, self.axis) in ("sum", "tally"):
                kinds[node] = "matmul" if packet_of(node) is aten.mm else "sum"
            elif self.axes.is_relative(node, self.axis):
                raise BodyError(f"{op_name(node)} is in an order that one chunk has for itself")
            if self.axes.role(node, self.axis) == "sum":
                self.sums.add(node)
        products = self.products(kinds)
        while True:
            roots = [
                i
                for node, kind in kinds.items()
                for i in (
                    _operands(node) if kind == "matmul" else _leaving(node, products.get(node))
                )
            ]
            order = self.order(roots)
            needed = {n for n, made in products.items() if not set(order).isdisjoint(made.nodes)}
            if not needed:
                break
            products = {n: made for n, made in products.items() if n not in needed}
        boundary = [n for n in order if not self.computed(n)]
        if not boundary:
            raise BodyError("it reads no tensor")
        for node in boundary:
            if self.is_symbolic(node):
                raise BodyError(f"{op_name(node)} reads a size that is known at run time only")
            if not isinstance(node.meta.get("val"), torch.Tensor):
                raise BodyError(f"{op_name(node)} makes several values, of which one is read")
            if self.axes.count(node, self.axis) > 1:
                raise BodyError(f"{node} has the loop axis twice")
            if self.axes.is_relative(node, self.axis):
                raise BodyError(f"{op_name(node)} is in an order that belongs to the whole")
        self.nodes = [n for n in order if self.computed(n)]
        for node in (*self.nodes, *(n for made in products.values() for n in made.nodes)):
            if self.sums.intersection(node.all_input_nodes):
                raise BodyError(f"{op_name(node)} reads a sum over the axis inside the loop")
        # every axis gets its number before code is written, so that size arguments come first
        for node in (*boundary, *self.nodes, *outputs):
            self.dims(node)
        sizes = {i: self.graph.placeholder(f"a{i}") for i in range(len(self.index))}
        for i, node in enumerate(boundary):
            self.map[node] = self.graph.placeholder(f"t{i}")
        for node in self.nodes:
            self.map[node] = self.emit(node, sizes)
        self.graph.output(tuple(self.map[i] for i in roots))
        self.graph.lint()
        made = tuple(self._describe(n, kind, products.get(n)) for n, kind in kinds.items())
        spec = {
            "body": self.graph.python_code("self").src,
            "inputs": [
                {"slice": self._slicing(self.axes.dims(n)), "dims": self.dims(n)} for n in boundary
            ],
            "outputs": [
                {
                    "kind": o.kind,
                    "dims": o.dims,
                    "dtype": str(o.accumulate).removeprefix("torch."),
                    "order": o.order,
                    "slice": self._slicing(self.axes.dims(o.node)) if o.kind == "split" else None,
                    "in_groups": o.in_groups,
                    "terms": o.terms,
                }
                for o in made
            ],
        }
        return Body(
            spec=json.dumps(spec, separators=(",", ":")),
            graph=self.graph,
            inputs=tuple(boundary),
            outputs=made,
            axes=tuple(self.index),
            nodes=tuple(self.nodes),
            split_inputs=tuple(n for n in boundary if self._slicing(self.axes.dims(n))),
        )

    def _slicing(self, dims: Dims) -> list[object] | None:
        """[dim, factors, position]: the dim that holds the loop axis, its factors, and where among
        them the axis is."""
        for dim, product in enumerate(dims):
            if self.axis in product:
                return [dim, list(self.product(product)), product.index(self.axis)]
        return None

    def _describe(self, node: Node, kind: OutputKind, products: Products | None) -> BodyOutput:
        value = node.meta["val"]
        accumulate: torch.dtype = value.dtype if kind == "split" else _accumulate(node)
        strides = [int(s) if isinstance(s, int) else s.node.hint for s in value.stride()]
        order = tuple(range(value.dim()))
        if kind != "matmul":  # a product is added in place, row by row
            order = tuple(sorted(order, key=lambda d: (-strides[d], d)))
        terms = node.all_input_nodes if kind == "matmul" else [node]
        in_groups = kind != "split" and all(t.meta["val"].dtype == torch.float32 for t in terms)
        dims = self.dims(node)
        return BodyOutput(node, kind, dims, value.dtype, accumulate, order, in_groups, products)


def build_body(
    outputs: Sequence[Node],
    *,
    axes: Axes,
    axis: int,
    inside: frozenset[Node],
    tangent: set[Node],
    seed: Node,
    prelude: frozenset[Node] = frozenset(),
    foreign: frozenset[Node] = frozenset(),
) -> Body:
    """The body that makes `outputs`, each split along `axis` or a sum over it.

    Args:
        outputs: nodes of the region that outside nodes read.
        axes: the graph's axis analysis.
        axis: the loop axis.
        inside: nodes that the body computes where it needs them.
        tangent: nodes that depend on a tangent.
        seed: the region's widest node, against which the prelude's values are called small.
        prelude: further outside nodes to compute again.
        foreign: nodes of other regions, which are read as those make them.

    Raises:
        BodyError: a size that only run time knows is read inside, or a boundary input has the axis
            twice.
    """
    narrow = nbytes(seed.meta.get("val")) / _NARROW
    return _BodyBuilder(axes, axis, inside, prelude, foreign, tangent, narrow).build(outputs)


def sizes_of(body: Body, axes: Axes) -> list[Size]:
    """The sizes of the body's axes, the loop axis first."""
    return [axes.table.sizes[a] for a in body.axes]

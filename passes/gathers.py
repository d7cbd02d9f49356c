"""One entry per row of a body's product is read from the product itself, before all else.

A cross entropy reads the labels' entries of the softmax's logarithm. A code generator computes that
where the loss is added up, from the logits, which have to stay for it: the gradient, already
written by then, has memory of its own, and a chunk takes twice what it needs. Here the entries are
gathered from the product, and the pointwise ops that were between are done to these alone; the
gradient can then be written in the logits' place. Every entry goes through the same ops, so that
its bits are the same.

The gather is an op of its own, since a code generator would move any other to its reader.

Not handled: several entries per row; operands that differ along the columns (a bias that is added
apart from the product); a source other than a product of two matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.fx import Graph, Node
from torch.fx.node import Argument, map_arg

from passes import rules
from passes.axes import shape_of
from passes.copies import call_like, copy_graph
from passes.rules.arguments import dim_of
from passes.source import packet_of

aten = torch.ops.aten

_VIEWS = (aten.view, aten._unsafe_view, aten.reshape)
_PRODUCTS = (aten.mm.default, aten.addmm.default)
_MANY = 16  # ops between the product and the gather; more are not worth doing twice


def _of_gather(node: Node) -> tuple[Node, Node] | None:
    """What a gather of one entry per row reads, and by which index."""
    if node.target is not aten.gather.default:
        return None
    value, _, index = node.args[:3]
    assert isinstance(value, Node)
    assert isinstance(index, Node)
    whole = shape_of(value)
    if not whole or dim_of(node, len(whole)) != len(whole) - 1:
        return None
    return (value, index) if shape_of(index) == [*whole[:-1], 1] else None


def _operands(node: Node) -> dict[Node, bool] | None:
    """What a pointwise op (or a view of rows) reads, and of each whether it has the columns; None
    for any other op, and where an operand is neither as large, nor one per row, nor one value."""
    own = shape_of(node)
    if own is None or node.op != "call_function":
        return None
    if packet_of(node) in _VIEWS:
        before = node.all_input_nodes[0]
        return {before: True} if (shape_of(before) or [None])[-1:] == own[-1:] else None
    if not rules.is_pointwise(node):
        return None
    found: dict[Node, bool] = {}
    for operand in node.all_input_nodes:
        shape = shape_of(operand)
        if shape is None or shape not in ([], own, [*own[:-1], 1]):
            return None
        found[operand] = shape == own
    return found


def _between(value: Node) -> list[Node] | None:
    """The products that a value is made of, and the ops since, in order; None if there is something
    else, or much."""
    found: dict[Node, None] = {}
    met: set[Node] = set()  # of the ops
    stack = [(value, False)]
    while stack:
        node, done = stack.pop()
        if done:
            found[node] = None
            continue
        if node in found:
            continue
        if node.target in _PRODUCTS:
            found[node] = None
            continue
        operands = _operands(node)
        met.add(node)
        if operands is None or len(met) > _MANY:
            return None
        stack.append((node, True))
        stack += [(operand, False) for operand, has_columns in operands.items() if has_columns]
    return list(found)


class _Rows:
    """Writes ops again, for one entry per row."""

    def __init__(self, graph: Graph, op: Callable[..., torch.Tensor], index: Node) -> None:
        self.graph, self.op = graph, op
        self.index = index
        self.made: dict[Node, Node] = {}

    def flat(self, node: Node) -> Node:
        """One per row as a column."""
        if len(shape_of(node) or ()) in (0, 2):
            return node
        return call_like(self.graph, node, aten.reshape.default, (node, [-1, 1]), {})

    def write(self, node: Node) -> None:
        if node.target in _PRODUCTS:
            made = call_like(self.graph, node, self.op, (node, self.flat(self.index)), {})
        elif packet_of(node) in _VIEWS:
            made = self.made[node.all_input_nodes[0]]
        else:
            operands = _operands(node)
            assert operands is not None
            own = {n: self.made[n] if large else self.flat(n) for n, large in operands.items()}
            args = map_arg(node.args, own.__getitem__)
            kwargs = map_arg(node.kwargs, own.__getitem__)
            assert callable(node.target)
            made = call_like(self.graph, node, node.target, args, kwargs)
        self.made[node] = made


def gather_from_products(graph: Graph, gather: Callable[..., torch.Tensor]) -> Graph:
    """A graph in which what is gathered from pointwise values of a matrix product is gathered from
    the product; `graph` itself if there is no such gather.

    Args:
        graph: a functional aten graph with fake values in ``meta["val"]``; left as it is.
        gather: an op ``(rows x columns, rows x 1) -> rows x 1``.
    """
    wanted: dict[Node, Sequence[Node]] = {}
    for node in graph.nodes:
        read = _of_gather(node)
        between = None if read is None else _between(read[0])
        shape = shape_of(node) or []
        known = len(shape) == 2 or all(isinstance(size, int) for size in shape)
        if between is not None and known:
            wanted[node] = between
    if not wanted:
        return graph
    new, copied = copy_graph(graph)
    for node, between in wanted.items():
        _, index = _of_gather(node) or (None, None)
        assert index is not None
        with new.inserting_before(copied[node]):
            rows = _Rows(new, gather, copied[index])
            for one in between:
                rows.write(copied[one])
            made: Node = rows.made[copied[between[-1]]]
            if len(shape := shape_of(node) or []) != 2:
                sizes: list[Argument] = [size for size in shape if isinstance(size, int)]
                made = call_like(new, node, aten.reshape.default, (made, sizes), {})
        copied[node].replace_all_uses_with(made)
        new.erase_node(copied[node])
        copied[node] = made
    new.eliminate_dead_code()
    new.lint()
    return new

"""Results of a body that are sums of matrix products: the loop makes them, in their place.

A chunk's result has to come into its slice of the whole. A code generator's kernels could write
there, but the last op of a chunk is mostly a matrix product (an MLP's output, the gradient of its
input), or a sum of some, which a library computes into a buffer of its own, to be copied. Such a
result leaves the body as the operands, and the loop multiplies into the slice: the first product
with ``mm(out=)``, further ones added to it. That spares the copy, and of every product the buffer.
(Of several sequences a slice is no matrix; there the loop makes one buffer, and copies.)

Only where rows, or columns, are what the loop goes along, and where nobody else reads a product. As
for sums over chunks, see `passes.body`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.fx import Node

from passes.axes import Axes, Product
from passes.rules.arguments import argument
from passes.source import packet_of

aten = torch.ops.aten

_FLATTENING = (aten.view, aten._unsafe_view, aten.reshape)


@dataclass(frozen=True)
class Products:
    """A value that is a sum of matrix products."""

    terms: tuple[tuple[Node, ...], ...]  # of each the operands: left and right, of the first one
    # perhaps a bias before
    nodes: tuple[Node, ...]  # what the loop does for it, the value's own node last


class _Reader:
    def __init__(self, axes: Axes, axis: int, is_inside: Callable[[Node], bool]) -> None:
        self.axes = axes
        self.axis = axis
        self.is_inside = is_inside

    def read(self, node: Node, reader: Node | None) -> Products | None:
        """`reader` is the one node that may read it."""
        if not self.is_inside(node) or (reader is not None and set(node.users) != {reader}):
            return None
        if packet_of(node) in _FLATTENING:
            return self._reshaped(node)
        if node.target is aten.add.Tensor:
            return self._added(node)
        if node.target is aten.mm.default:
            left, right = node.all_input_nodes * (3 - len(node.all_input_nodes))
            return self._product(node, left, right)
        if (
            node.target is aten.addmm.default
            and argument(node, "beta") == argument(node, "alpha") == 1
        ):
            bias, left, right = (node.args[i] for i in range(3))
            assert isinstance(bias, Node)
            assert isinstance(left, Node)
            assert isinstance(right, Node)
            if bias.meta["val"].dim() == 1 and self.axes.count(bias, self.axis) == 0:
                return self._product(node, left, right, bias)
        return None

    def _product(
        self, node: Node, left: Node, right: Node, bias: Node | None = None
    ) -> Products | None:
        of_rows = self.axis in self.axes.dims(left)[0]
        of_columns = self.axes.dims(right)[1] == (self.axis,)
        counts = self.axes.count(left, self.axis), self.axes.count(right, self.axis)
        if of_rows == of_columns or counts != (of_rows, of_columns):
            return None
        operands = (left, right) if bias is None else (bias, left, right)
        return Products((operands,), (node,))

    def _reshaped(self, node: Node) -> Products | None:
        """Other dims before the last one, which stays."""
        (operand,) = node.all_input_nodes[:1]
        if self._rows_and_columns(operand) != self._rows_and_columns(node):
            return None
        made = self.read(operand, node)
        return made and Products(made.terms, (*made.nodes, node))

    def _rows_and_columns(self, node: Node) -> tuple[Product, Product]:
        dims = [self.axes.table.unpermuted(d) for d in self.axes.dims(node)]
        rows = tuple(axis for dim in dims[:-1] for axis in dim)
        return rows, tuple(dims[-1]) if dims else ()

    def _added(self, node: Node) -> Products | None:
        one, other = node.args[:2]
        if not isinstance(one, Node) or not isinstance(other, Node) or one is other:
            return None
        value = node.meta["val"]
        for term in (one, other):
            own = term.meta.get("val")
            if not isinstance(own, torch.Tensor) or own.dtype != value.dtype:
                return None
            if self.axes.dims(term) != self.axes.dims(node):
                return None
        if argument(node, "alpha") != 1:
            return None
        first, second = self.read(one, node), self.read(other, node)
        if first is None or second is None:
            return None
        # what is added to the rest comes last, so that sums are made in the order that was written
        if not _is_one_product(second):
            first, second = second, first
        if not _is_one_product(second):
            return None
        return Products((*first.terms, *second.terms), (*first.nodes, *second.nodes, node))


def _is_one_product(made: Products) -> bool:
    return len(made.terms) == 1 and len(made.terms[0]) == 2


def sum_of_products(
    node: Node, axes: Axes, axis: int, is_inside: Callable[[Node], bool]
) -> Products | None:
    """What the loop can make of a body's result by matrix products; None if it is no sum of such.

    Args:
        node: the result, split along `axis`.
        axes: the graph's axis analysis.
        axis: the loop axis.
        is_inside: whether the body computes a node.
    """
    return _Reader(axes, axis, is_inside).read(node, None)

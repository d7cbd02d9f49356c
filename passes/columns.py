"""Chunks of logits are kept by columns.

On a CPU a product ``x @ weight.T`` of few rows is slower than ``weight @ x.T``: the library puts
the weight into another order first, in every call, which so few rows do not pay for. Its result by
columns, and the gradient that is made of it by columns as well, suit the products that come after
it too: the weight's gradient, ``gradient.T @ x``, reads the gradient as it lies.

Values stay what they are; only the order of their elements in memory changes. What leaves the body
as an operand of a product may have any (`passes.products`). A body from which such a value leaves
in another way stays as it is, since a copy into its place would change the order again; so does one
in which another product of that size lies by rows, since a kernel that reads both orders is slow.

Only in float32, where sizes are known, and where each row is reduced, as by a softmax: an MLP's
products were measured to take as long in either order.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch.fx import Graph, Node

from passes import rules
from passes.axes import Size, shape_of
from passes.copies import call_like, copy_graph
from passes.liveness import is_fusible, output_nodes
from passes.source import packet_of

aten = torch.ops.aten
prims = torch.ops.prims

_VIEWS = (aten.view, aten._unsafe_view, aten.reshape, aten.permute, aten.t)
_FEW = 8  # as many columns as rows at least; with fewer, either order is as fast


def _is_turned(node: Node) -> bool:
    turned = node.target is aten.permute.default and list(cast("list[int]", node.args[1])) == [1, 0]
    return turned or node.target is aten.t.default


def _weight(node: Node) -> Node | None:
    """Of ``x @ weight.T`` in float32, of few rows, the weight, if it is an input."""
    right, shape = node.args[1], shape_of(node)
    assert isinstance(right, Node)
    assert shape is not None
    rows, columns = shape
    if not (isinstance(rows, int) and isinstance(columns, int) and _FEW * rows <= columns):
        return None
    if node.meta["val"].dtype != torch.float32 or not _is_turned(right):
        return None
    weight = right.all_input_nodes[0]
    known = weight.op == "placeholder" and weight.meta["val"].is_contiguous()
    return weight if known else None


def _made(node: Node) -> Node:
    """What a view shows."""
    while packet_of(node) in _VIEWS:
        node = node.all_input_nodes[0]
    return node


def _is_reduced(node: Node) -> bool:
    """Whether its rows are reduced."""
    readers = list(node.users)
    while readers:
        reader = readers.pop()
        if packet_of(reader) in _VIEWS:
            readers += reader.users
        elif rules.is_reduction(reader):
            return True
    return False


def _matrices(graph: Graph, sizes: set[tuple[Size, ...]]) -> set[Node] | None:
    """The pointwise values of these sizes that leave as matrices; None where one leaves in another
    way, or a product of such a size does."""
    found: set[Node] = set()
    elements = {math.prod(cast("tuple[int, ...]", size)) for size in sizes}
    for node in output_nodes(graph):
        matrix = node.all_input_nodes[0] if _is_turned(node) else node
        if tuple(shape_of(matrix) or ()) in sizes and is_fusible(_made(matrix)):
            found.add(matrix)
        elif _made(matrix).op != "placeholder" and matrix.meta["val"].numel() in elements:
            return None
    return found


def keep_by_columns(graph: Graph) -> Graph:
    """A graph in which logits, and what leaves it as matrices of their size, are in memory column
    by column; `graph` itself if it has none, or they cannot be.

    Args:
        graph: a functional aten graph of a body, with fake values in ``meta["val"]``; left as it
            is.
    """
    products = graph.find_nodes(op="call_function", target=aten.mm.default)
    turned = {n: w for n in products if _is_reduced(n) and (w := _weight(n)) is not None}
    sizes = {tuple(shape_of(n) or ()) for n in turned}
    if not turned or any(n not in turned and tuple(shape_of(n) or ()) in sizes for n in products):
        return graph
    matrices = _matrices(graph, sizes)
    if matrices is None:
        return graph
    new, copied = copy_graph(graph)
    for node, weight in turned.items():
        left = node.args[0]
        assert isinstance(left, Node)
        with new.inserting_before(copied[node]):
            right = call_like(new, left, aten.permute.default, (copied[left], [1, 0]), {})
            product = call_like(new, node, aten.mm.default, (copied[weight], right), {})
            own = call_like(new, node, aten.permute.default, (product, [1, 0]), {})
        copied[node].replace_all_uses_with(own)
        new.erase_node(copied[node])
        copied[node] = own
    for matrix in matrices:
        own = copied[matrix]
        strides = (1, matrix.meta["val"].shape[0])
        with new.inserting_after(own):
            forced = new.call_function(prims.inductor_force_stride_order.default, (own, strides))
        forced.meta = dict(own.meta)
        own.replace_all_uses_with(forced, lambda user, forced=forced: user is not forced)
    new.eliminate_dead_code()
    new.lint()
    return new

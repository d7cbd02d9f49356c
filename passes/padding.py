"""Attention masks that are the same for every query are read as one row.

Models of padded sequences stretch a mask of the keys over all queries: a value that grows with the
square of the length, that attention's forward and backward read, and that says nothing new from its
second row on.

Algorithm
    1. For every attention call with a mask, and for its backward, say along which dims the mask may
       differ: positions and what is compared with them by `passes.positions`; a pointwise op or a
       view along those of its operands; what is stretched not along the stretched dims; any other
       value along all of its dims that are larger than one.
    2. If that of the queries is not among them, the call reads the first row: the mask's ops are
       written once more for that row, back to values that are made otherwise, and these are cut.
       A GPU's kernel wants the mask's whole size, and gets the row stretched with a stride of zero.

Not handled: masks of packed documents, which differ by query; cuDNN's attention; on a GPU, lengths
that PyTorch pads masks for (no multiples of eight) and open ones; attention written out.

Source: both are what PyTorch gives its kernels for a mask of one row, in
``aten/src/ATen/native/transformers/attention.cpp``. The numbers of the kernel for CPUs
are the same to the bit (`tests/passes/test_padding.py`).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import cast

import torch
from torch.fx import Graph, Node
from torch.fx.node import Argument

from passes import rules
from passes.axes import as_size, dims_kept, shape_of
from passes.causal import attention_mask, set_mask
from passes.copies import call_like, copy_graph
from passes.positions import Prover
from passes.records import Rewrite
from passes.rules import shape
from passes.rules.arguments import argument
from passes.source import nbytes, op_name, packet_of, source_of

aten = torch.ops.aten

_AS_ROW = (
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention_for_cpu_backward,
)
_STRETCHED = (
    aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_efficient_attention_backward,
)
_RESHAPES = (aten.view, aten._unsafe_view, aten.reshape, aten.unsqueeze)


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _larger_than_one(node: Node) -> list[int]:
    return [d for d, size in enumerate(node.meta["val"].shape) if as_size(size) != 1]


def _places(operand: Node, node: Node) -> dict[int, int] | None:
    """Which dim of an op's result each dim of an operand is, by the dim of the operand, for dims
    larger than one; None where that cannot be said."""
    if node.op != "call_function":
        return None
    packet, larger = packet_of(node), _larger_than_one(operand)
    if rules.is_pointwise(node) or packet in shape.SIZE_ARGUMENT:  # aligned from the right
        lead = node.meta["val"].dim() - operand.meta["val"].dim()
        return {dim: dim + lead for dim in larger}
    if packet in _RESHAPES:
        before, after = shape_of(operand), shape_of(node)
        assert before is not None
        assert after is not None
        return dims_kept(before, after)
    if packet is aten.permute:
        order = argument(node, "dims")
        assert isinstance(order, (list, tuple))
        rank = len(order)
        return {operator.index(dim) % rank: place for place, dim in enumerate(order)}
    return None


class _Dims:
    """Along which dims values may differ."""

    def __init__(self) -> None:
        self._prover = Prover()
        self._known: dict[Node, frozenset[int]] = {}

    def of(self, node: Node) -> frozenset[int]:
        if node not in self._known:
            found = self._prover.varies(node)
            self._known[node] = self._from_operands(node) if found is None else found
        return self._known[node]

    def _from_operands(self, node: Node) -> frozenset[int]:
        found: set[int] = set()
        operands = [i for i in node.all_input_nodes if _is_tensor(i)]
        for operand in operands:
            places = _places(operand, node)
            if places is None:
                return frozenset(_larger_than_one(node))
            found |= {places[dim] for dim in self.of(operand) if dim in places}
        return frozenset(found if operands else _larger_than_one(node))


class _FirstRow:
    """The first row of values along a dim, from the first rows of what they are made from."""

    def __init__(self, graph: Graph, copied: dict[Node, Node]) -> None:
        self._graph = graph
        self._copied = copied
        self._made: dict[tuple[Node, int], Node] = {}

    def of(self, node: Node, dim: int) -> Node:
        """For a node of the old graph, one of the new graph with size one at `dim`; made at the
        graph's insertion point."""
        if dim not in _larger_than_one(node):
            return self._copied[node]
        if (node, dim) not in self._made:
            row = self._from_operands(node, dim)
            self._made[node, dim] = self._cut(node, dim) if row is None else row
        return self._made[node, dim]

    def _from_operands(self, node: Node, dim: int) -> Node | None:
        rows: dict[Node, Node] = {}
        for operand in node.all_input_nodes:
            places = _places(operand, node) if _is_tensor(operand) else {}
            if places is None:
                return None
            at = [old for old, new in places.items() if new == dim]
            rows[operand] = self.of(operand, at[0]) if at else self._copied[operand]
        if not (rows or rules.is_creation(node)):
            return None
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), rows.__getitem__)
        size_at = None if packet_of(node) is aten.unsqueeze else rules.size_argument(node)
        if size_at is not None:
            sizes = list(cast("Sequence[Argument]", args[size_at]))
            sizes[dim] = 1
            args = (*args[:size_at], sizes, *args[size_at + 1 :])
        return call_like(self._graph, node, node.target, args, kwargs)

    def stretched(self, row: Node, mask: Node) -> Node:
        """The row in the whole mask's size, which takes no memory."""
        sizes = list(mask.meta["val"].shape)
        return call_like(self._graph, mask, aten.expand.default, (row, sizes), {})

    def _cut(self, node: Node, dim: int) -> Node:
        args = (self._copied[node], dim, 0, 1)
        return call_like(self._graph, node, aten.slice.Tensor, args, {})


def _takes_one_row(call: Node, mask: Node) -> bool:
    packet = packet_of(call)
    if packet in _STRETCHED:  # sizes are written down
        return all(isinstance(size, int) for size in mask.meta["val"].shape)
    return packet in _AS_ROW


def keep_one_row(graph: Graph, *, min_bytes: int) -> tuple[Graph, tuple[Rewrite, ...]]:
    """A graph whose attention reads one row of masks that are the same for every query, and what
    was done; `graph` itself if there are none.

    Args:
        graph: a functional aten graph; left as it is.
        min_bytes: smallest mask that is worth it.
    """
    dims = _Dims()
    found: dict[Node, tuple[Node, int]] = {}  # attention call -> mask, and the queries' dim in it
    for node in graph.nodes:
        mask = attention_mask(node)
        if mask is None or not _takes_one_row(node, mask):
            continue
        value = mask.meta["val"]
        queries = value.dim() - 2
        if queries not in _larger_than_one(mask) or nbytes(value) < min_bytes:
            continue
        if queries not in dims.of(mask):
            found[node] = mask, queries
    if not found:
        return graph, ()
    new, copied = copy_graph(graph)
    rows = _FirstRow(new, copied)
    for node, (mask, queries) in found.items():
        with new.inserting_before(copied[node]):
            row = rows.of(mask, queries)
            if packet_of(node) in _STRETCHED:
                row = rows.stretched(row, mask)
            set_mask(copied[node], row)
    new.eliminate_dead_code()
    new.lint()
    return new, tuple(
        Rewrite(
            op_name(mask),
            "this attention mask is the same for every query: one row is read",
            source_of(mask),
            nbytes(mask.meta["val"]),
        )
        for mask, _ in dict.fromkeys(found.values())
    )

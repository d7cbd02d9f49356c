"""Attention masks that are the same for every query are read as one row.

Models of padded sequences stretch a mask of the keys over all queries: a value that grows with the
square of the length, that attention's forward and backward read, and that says nothing new from its
second row on.

Algorithm
    1. For every attention call with a mask, and for its backward, say along which dims the mask may
       differ: positions and what is compared with them by `passes.causal`; a pointwise op along
       those of its operands; what is stretched not along the stretched dims; any other value along
       all of its dims that are larger than one.
    2. If that of the queries is not among them, the call reads the first row. The slice of it needs
       no whole mask: all that it is made from is fused.

Not handled: masks of packed documents, which differ by query; attention on a GPU, whose kernels
want a mask of whole rows (nothing is known of their speed with one).

Source: that a mask may have one row is what `torch.nn.functional.scaled_dot_product_attention`
documents (it is broadcast); the numbers of PyTorch's kernel for CPUs are the same to the bit
(`tests/passes/test_padding.py`).
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from passes import rules
from passes.axes import as_size
from passes.causal import Prover, attention_mask, set_argument
from passes.copies import copy_graph
from passes.records import Rewrite
from passes.rules import shape
from passes.source import nbytes, op_name, packet_of, source_of

aten = torch.ops.aten

_ATTENTION = (
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention_for_cpu_backward,
)
_RANK, _QUERIES = 4, 2  # of the masks of these


class _Dims:
    """Along which dims values may differ."""

    def __init__(self) -> None:
        self._prover = Prover()
        self._known: dict[Node, frozenset[int]] = {}

    def of(self, node: Node) -> frozenset[int]:
        if node not in self._known:
            self._known[node] = self._found(node) & self._larger_than_one(node)
        return self._known[node]

    def _larger_than_one(self, node: Node) -> frozenset[int]:
        sizes = map(as_size, node.meta["val"].shape)
        return frozenset(dim for dim, size in enumerate(sizes) if size != 1)

    def _found(self, node: Node) -> frozenset[int]:
        proven = self._prover.varies(node)
        if proven is not None:
            return proven
        if node.op == "call_function" and rules.is_pointwise(node):
            return frozenset().union(*(self._of_operand(i, node) for i in node.all_input_nodes))
        if node.op == "call_function" and packet_of(node) in shape.SIZE_ARGUMENT:  # expand
            return self._of_operand(node.all_input_nodes[0], node)
        return self._larger_than_one(node)

    def _of_operand(self, operand: Node, node: Node) -> frozenset[int]:
        """At the dims of the result, which a smaller operand has from the right."""
        if not isinstance(operand.meta.get("val"), torch.Tensor):
            return frozenset()
        lead = node.meta["val"].dim() - operand.meta["val"].dim()
        return frozenset(dim + lead for dim in self.of(operand))


def keep_one_row(graph: Graph, *, min_bytes: int) -> tuple[Graph, tuple[Rewrite, ...]]:
    """A graph whose attention reads one row of masks that are the same for every query, and what
    was done; `graph` itself if there are none.

    Args:
        graph: a functional aten graph; left as it is.
        min_bytes: smallest mask that is worth it.
    """
    dims = _Dims()
    found: dict[str, Node] = {}  # attention call -> mask
    for node in graph.nodes:
        mask = attention_mask(node)
        if mask is None or packet_of(node) not in _ATTENTION:
            continue
        value = mask.meta["val"]
        if value.dim() != _RANK or as_size(value.shape[_QUERIES]) == 1:
            continue
        if nbytes(value) >= min_bytes and _QUERIES not in dims.of(mask):
            found[node.name] = mask
    if not found:
        return graph, ()
    new, copied = copy_graph(graph)
    rows: dict[Node, Node] = {}
    for mask in dict.fromkeys(found.values()):
        with new.inserting_after(copied[mask]):
            rows[mask] = new.call_function(aten.slice.Tensor, (copied[mask], _QUERIES, 0, 1))
        rows[mask].meta = dict(mask.meta) | {"val": mask.meta["val"][:, :, :1]}
    for node, copy in copied.items():
        if node.name in found:
            set_argument(copy, "attn_mask", rows[found[node.name]])
    new.lint()
    return new, tuple(
        Rewrite(
            op_name(mask),
            "this attention mask is the same for every query: one row is read",
            source_of(mask),
            nbytes(mask.meta["val"]),
        )
        for mask in rows
    )

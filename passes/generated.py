"""Values that cost less to make than to keep: each reader makes its own.

Terms
    generated    much larger than all that it is made from, by pointwise ops, views and gathers
                 only: an attention mask from positions and a padding mask, a position bias from a
                 table, random numbers from a seed.

A model makes such a value once and all layers read it, so it lives through the whole step, and no
region can hold all of its readers. After this pass every reader in the forward has its own copy of
the ops behind it, back to what is small, and so has every reader in the backward; a loop around the
reader then makes a chunk of it at a time. Where no loop comes of it, the copies are equal ops of
equal operands, and become one again in the partitioner.

Not handled: generated values with a single reader in the forward, which a region holds as it is.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.fx import Graph, Node

from passes import rules
from passes.liveness import phases
from passes.source import elements, nbytes

RATIO = 8  # a generated value is at least this many times larger than what it is made from
PER_ELEMENT = 8  # bytes: a mask of bits is as much in the way as what it masks
NARROW = 64  # what is this many times smaller is not made again


def is_cheap(node: Node) -> bool:
    """Whether the op only moves or combines values, with no reduction and no product."""
    if node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor):
        return False
    return (
        rules.is_pointwise(node)
        or rules.is_creation(node)
        or rules.is_positions(node)
        or rules.is_gather(node)
        or (rules.is_view(node) and all(is_tensor(i) for i in node.all_input_nodes[:1]))
    )


def is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _closure(value: Node) -> list[Node] | None:
    """The ops behind a generated value back to what is small, in graph order; None for another
    value."""
    whole = nbytes(value.meta["val"])
    found: set[Node] = set()
    small: set[Node] = set()
    stack = [value]
    made_from = 0
    while stack:
        node = stack.pop()
        if node in found or node in small:
            continue
        size = node.meta.get("val")
        if not isinstance(size, torch.Tensor):
            continue  # a size
        narrow = elements(size) * size.element_size() <= whole / NARROW
        if node is not value and (narrow or not is_cheap(node)):
            small.add(node)
            made_from += nbytes(size)
            if made_from > whole / RATIO:
                return None
            continue
        found.add(node)
        stack.extend(node.all_input_nodes)
    return [n for n in value.graph.nodes if n in found]


def _readers(value: Node, chains: set[Node]) -> Iterable[Node]:
    return (u for u in value.users if u.op == "call_function" and u not in chains)


def remake_generated(graph: Graph, *, min_bytes: int) -> Graph:
    """A graph in which readers of generated values make them themselves; `graph` itself if there
    are none that several forward ops read.

    Args:
        graph: a functional aten graph; left as it is.
        min_bytes: smallest value that is worth it.
    """
    closures: dict[Node, list[Node]] = {}
    for node in graph.nodes:
        if (
            is_cheap(node)
            and not rules.is_creation(node)
            and elements(node.meta["val"]) * PER_ELEMENT >= min_bytes
            and (closure := _closure(node)) is not None
        ):
            closures[node] = closure
    chains = {n for closure in closures.values() for n in closure}
    phase = phases(graph)
    shared: dict[Node, list[Node]] = {}
    for value, closure in closures.items():
        readers = list(_readers(value, chains))
        if sum(phase[r] == "forward" for r in readers) > 1:
            shared[value] = closure
    if not shared:
        return graph
    new = Graph()
    copied: dict[Node, Node] = {}

    def remade(value: Node) -> Node:
        made = dict(copied)
        for node in shared[value]:
            made[node] = new.node_copy(node, made.__getitem__)
        return made[value]

    for node in graph.nodes:
        own = {
            i: remade(i)
            for i in node.all_input_nodes
            if i in shared and node.op == "call_function" and node not in chains
        }
        copied[node] = new.node_copy(node, lambda i, own=own: own.get(i) or copied[i])
    new.eliminate_dead_code()
    new.lint()
    return new

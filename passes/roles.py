"""The same positions in two roles: queries and keys of self-attention become two axes.

Attention compares every token with every token. Its scores, masks and position biases have the
token axis twice, so no loop can run along it: a slice would be cut out of both dims. But for a loop
over the queries the keys are just a tensor that every chunk reads whole. So the reader of the keys
gets a *copy* of their token axis, through a `cut`: an identity that says "from here on, these
positions are another axis". To a loop over the queries a cut is a wall: keys are computed before
the loop, and their gradients, which are sums over the queries, are complete only behind it.

Algorithm, until nothing needs to be cut
    1. Analyse the axes (`passes.axes`).
    2. An op that makes a tensor with an axis twice from operands that have it once (scores, a mask
       by comparison of positions): cut the operand of the last such dim.
    3. An op that would unify a copy with what it is a copy of (the gradient of the keys meets
       something of the tokens again): cut the operand that has one of both.
    4. Where none of these is left: an op because of which an operand has an axis twice (scores with
       a sink, cut to the keys again, times the values): cut the other operand.
If that does not come to an end, the graph stays uncut, and such values stay whole, as refusals say.

Cuts are for the analysis only: `join` takes them out of the finished graph.
"""

from __future__ import annotations

from torch.fx import Graph, Node

from passes.axes import Axes, analyze_axes
from passes.copies import copy_node
from passes.generated import PER_ELEMENT
from passes.rules import find_rule, is_creation
from passes.rules.shape import cut
from passes.source import nbytes

_ROUNDS = 12


def _worth_it(reader: Node, min_bytes: int) -> bool:
    value = reader.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else (value,)
    operands = [i.meta.get("val") for i in reader.all_input_nodes]
    return any(
        nbytes(v) // v.element_size() * PER_ELEMENT >= min_bytes
        for v in (*values, *operands)
        if v is not None and nbytes(v)
    )


def separate(graph: Graph, *, min_bytes: int) -> tuple[Graph, Axes]:
    """A graph in which positions in two roles are two axes, and its axis analysis; `graph` itself
    if there are none.

    Args:
        graph: a functional aten graph; left as it is.
        min_bytes: smallest value that is worth it.
    """
    uncut = axes = analyze_axes(graph, find_rule, freeze=False)
    current = graph
    for _ in range(_ROUNDS):
        for wanted in (axes.cuts, axes.late_cuts):
            cuts = [c for c in wanted if _worth_it(c.reader, min_bytes)]
            if cuts:
                break
        else:
            break
        current = _with_cuts(current, {(c.reader, c.operand): c.dim for c in cuts})
        axes = analyze_axes(current, find_rule, freeze=False)
    else:
        current, axes = graph, uncut
    axes.freeze()
    return current, axes


def _with_cuts(graph: Graph, cuts: dict[tuple[Node, Node], int]) -> Graph:
    new = Graph()
    copied: dict[Node, Node] = {}
    made: dict[tuple[Node, int], Node] = {}

    def seen_by(reader: Node, operand: Node) -> Node:
        dim = cuts.get((reader, operand))
        if dim is None:
            return copied[operand]
        if (operand, dim) not in made:
            if is_creation(operand):  # a constant has axes of its own wherever it is made
                node = copy_node(new, operand, copied.__getitem__)
            else:
                node = new.call_function(cut, (copied[operand], dim))
                node.meta = dict(operand.meta)
            made[(operand, dim)] = node
        return made[(operand, dim)]

    for node in graph.nodes:
        for operand in node.all_input_nodes:
            seen_by(node, operand)  # cuts stand before their reader
        copied[node] = copy_node(new, node, lambda operand, node=node: seen_by(node, operand))
    new.lint()
    return new


def join(graph: Graph) -> None:
    """Take the cuts out, in place."""
    for node in graph.find_nodes(op="call_function", target=cut):
        node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)

"""A copy of a graph to change, for passes that leave their input as it is.

Not `torch.fx.Graph.graph_copy`: that leaves the output node, and what AOTAutograd wrote on it, to
the caller.
"""

from __future__ import annotations

from torch.fx import Graph, Node


def copy_graph(graph: Graph) -> tuple[Graph, dict[Node, Node]]:
    """The copy, and for every node of the original its own."""
    new = Graph()
    copied: dict[Node, Node] = {}
    for node in graph.nodes:
        copied[node] = new.node_copy(node, copied.__getitem__)
    return new, copied

"""A copy of a graph to change, for passes that leave their input as it is.

Not `torch.fx.Graph.graph_copy`: that leaves the output node, and what AOTAutograd wrote on it, to
the caller.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch.fx import Graph, Node
from torch.fx.node import Argument, Target, map_arg

aten = torch.ops.aten
_OTHER_NAMES = (aten.detach.default, aten.alias.default)


def copy_node(graph: Graph, node: Node, look: Callable[[Node], Argument]) -> Node:
    """As `torch.fx.Graph.node_copy`, in less than half of the time: arguments that a node of
    another graph has are not searched for symbolic sizes once more, and none are set where it has
    none."""
    made = graph.create_node(node.op, node.target, name=node.name, type_expr=node.type)
    if node.args:
        made.args = map_arg(node.args, look)
    if node.kwargs:
        made.kwargs = map_arg(node.kwargs, look)
    made.meta = dict(node.meta)
    return made


def call_like(
    graph: Graph,
    like: Node,
    target: Target,
    args: tuple[Argument, ...],
    kwargs: dict[str, Argument],
) -> Node:
    """A call at the graph's insertion point that does for another shape what `like` does: with its
    place in the user's code, and the fake value that comes of it."""
    assert callable(target)
    node = graph.call_function(target, args, kwargs)
    fake_args, fake_kwargs = map_arg(cast("Any", (args, kwargs)), lambda n: n.meta["val"])
    with like.meta["val"].fake_mode:
        value = target(*fake_args, **fake_kwargs)
    node.meta = dict(like.meta) | {"val": value}
    return node


def copy_graph(graph: Graph) -> tuple[Graph, dict[Node, Node]]:
    """The copy, and for every node of the original its own."""
    new = Graph()
    copied: dict[Node, Node] = {}
    for node in graph.nodes:
        copied[node] = copy_node(new, node, copied.__getitem__)
    return new, copied


def drop_other_names(graph: Graph) -> Graph:
    """A graph whose ops read a tensor itself and no `detach` or `alias` of it; `graph` itself if
    there is nothing to drop.

    Checkpointed layers are traced with many. Two things hide behind them: that a value is a
    constant, which is to be made by each of its readers, and that two ops read the same value.
    What the graph returns stays: autograd has yet to see that it is detached.
    """
    names = [
        n
        for n in graph.nodes
        if n.target in _OTHER_NAMES and any(user.op != "output" for user in n.users)
    ]
    if not names:
        return graph
    new, copied = copy_graph(graph)
    for node in names:
        name = copied[node]
        whole = name.all_input_nodes[0]
        name.replace_all_uses_with(whole, lambda user: user.op != "output")
        if not name.users:
            new.erase_node(name)
    return new

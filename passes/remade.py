"""Values that need not be saved for the backward, because what they are made from is.

A norm's output is read by matrix products, whose backward reads it again. AOTAutograd's partitioner
saves it: it takes making a value again for free only where it is fused into its reader, and a
product's operand has to be in memory. But the norm's input is saved as well, for the norm's own
backward, and so are the few numbers per row: to make the output again is one pass over memory, and
what it takes lives no longer than the product. Of six values of its size that a layer of a
transformer saves beside its loops, that is one.

Algorithm
    1. Find what is saved and made by at most a few pointwise ops of values that are saved anyhow,
       or of graph inputs (`passes.liveness`).
    2. Leave out what comes, however far, from an input that the model writes to, which has other
       values by the time of the backward; and what would have the backward read an input that it
       does not read without, unless that is trained. (The caller may have changed it by then. Who
       changes what is trained between forward and backward fails in eager code as well.)
    3. Tell the partitioner to make the rest again, as `torch.utils.checkpoint` would.

Only for graphs that get loops: whatever is left alone is left alone.

Not handled: values that need something more to be saved (queries after their rotation: their
product before it is needed nowhere else); what a checkpointed model makes again as it is.

Source: `torch._functorch.partitioners` (``ban_recompute_materialized_backward``, and what
``node.meta["recompute"]`` means to it).
"""

from __future__ import annotations

from collections.abc import Iterator, Set

import torch
from torch.fx import Graph, Node
from torch.utils.checkpoint import CheckpointPolicy

from passes import rules
from passes.chunk import mutated_inputs
from passes.liveness import REMADE, phases, saved_beside_sources

_RECOMPUTE = "recompute"  # in a node's meta, for the partitioner


def _inputs_of(value: Node, borders: Set[Node] = frozenset()) -> Iterator[Node]:
    """The graph inputs that a value is made of, by whatever ops, but not beyond `borders`."""
    seen: set[Node] = {value}
    stack = [value]
    while stack:
        node = stack.pop()
        if node.op == "placeholder":
            yield node
        for i in node.all_input_nodes:
            if i not in seen and i not in borders:
                seen.add(i)
                stack.append(i)


def _trained(graph: Graph) -> set[Node]:
    """The graph inputs that get a gradient, as AOTAutograd's descriptors have it."""
    (output,) = graph.find_nodes(op="output")
    results = output.args[0]
    assert isinstance(results, (list, tuple))
    described = output.meta.get("desc") or ()
    of = {
        getattr(d, "grad_of", None)
        for value, d in zip(results, described, strict=False)
        if value is not None
    } - {None}
    return {n for n in graph.find_nodes(op="placeholder") if n.meta.get("desc") in of}


def _read_later(graph: Graph) -> set[Node]:
    """The graph inputs that the backward reads."""
    phase = phases(graph)

    def is_read(node: Node) -> bool:
        return any(
            is_read(user) if rules.is_view(user) else phase[user] == "backward"
            for user in node.users
            if user.op == "call_function"
        )

    return {n for n in graph.find_nodes(op="placeholder") if is_read(n)}


def make_again(graph: Graph) -> None:
    """Mark what need not be saved, in place.

    Args:
        graph: a functional joint graph of the caller's own.
    """
    found, saved = saved_beside_sources(graph)
    found = [n for n in found if _RECOMPUTE not in n.meta]  # the user's checkpointing has decided
    if not found:
        return
    written = mutated_inputs(graph)
    there = _trained(graph) | _read_later(graph)
    for node in found:
        if written and not written.isdisjoint(_inputs_of(node)):
            continue
        tensors = {n for n in _inputs_of(node, saved) if isinstance(n.meta["val"], torch.Tensor)}
        if tensors <= there:
            node.meta[REMADE] = True
            node.meta[_RECOMPUTE] = CheckpointPolicy.PREFER_RECOMPUTE

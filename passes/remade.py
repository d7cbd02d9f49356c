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
    2. Tell the partitioner to make it again, as `torch.utils.checkpoint` would.

Only for graphs that get loops: whatever is left alone is left alone.

Not handled: what is made of an input that the model writes to, which has other values by then;
values that need something more to be saved (queries after their rotation: their
product before it is needed nowhere else); what a checkpointed model makes again as it is.

Source: `torch._functorch.partitioners` (``ban_recompute_materialized_backward``, and what
``node.meta["recompute"]`` means to it).
"""

from __future__ import annotations

from torch.fx import Graph, Node
from torch.utils.checkpoint import CheckpointPolicy

from passes import rules
from passes.chunk import mutated_inputs
from passes.liveness import REMADE, is_fusible, saved_beside_sources

_RECOMPUTE = "recompute"  # in a node's meta, for the partitioner


def _reads(value: Node, inputs: set[Node]) -> bool:
    """Whether a value may be made of one of these graph inputs by pointwise ops."""
    seen: set[Node] = set()
    stack = [value]
    while stack:
        node = stack.pop()
        if node in inputs:
            return True
        if node not in seen and (is_fusible(node) or rules.is_view(node)):
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return False


def make_again(graph: Graph) -> None:
    """Mark what need not be saved, in place.

    Args:
        graph: a functional joint graph of the caller's own.
    """
    written = mutated_inputs(graph)
    for node in saved_beside_sources(graph):
        # the user's checkpointing may have decided
        if _RECOMPUTE not in node.meta and not (written and _reads(node, written)):
            node.meta[REMADE] = True
            node.meta[_RECOMPUTE] = CheckpointPolicy.PREFER_RECOMPUTE

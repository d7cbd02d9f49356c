"""Fake values tell again which tensors share memory.

AOTAutograd's partitioner merges equal computations, but never two that the graph returns: whoever
gets two gradients may write to one of them. It finds these by the storages of the fake values.
A rewritten graph must therefore keep this true: a view's fake value shares the storage of what it
is a view of. Nodes that were copied while their operands were made anew still have their old ones.

Two loops with equal operands would be merged too, since a node of several outputs has no storage
that the partitioner could know; what they return is copied.

Source: `torch._functorch.compile_utils.fx_graph_cse`.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable
from typing import Any, cast

import torch
from torch.fx import Graph, Node

from passes import rules
from passes.liveness import output_nodes

aten = torch.ops.aten


def _storage(value: object) -> int | None:
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else None


def _first(value: object) -> object:
    return value[0] if isinstance(value, (tuple, list)) and value else value


def refresh_views(graph: Graph) -> None:
    """Give views whose operand was made anew a fake value that shares its storage, in place."""
    for node in graph.nodes:
        if node.op != "call_function" or not node.all_input_nodes:
            continue
        source = node.all_input_nodes[0]
        whole = source.meta.get("val")
        picked = node.target is operator.getitem
        if picked and isinstance(whole, (tuple, list)):
            node.meta["val"] = whole[node.args[1]]
        elif not picked and _is_stale(node, whole):
            node.meta["val"] = _recomputed(node, whole)


def _is_stale(node: Node, whole: object) -> bool:
    if not (isinstance(whole, torch.Tensor) and rules.is_view(node)):
        return False
    return _storage(_first(node.meta["val"])) != _storage(whole)


def _recomputed(node: Node, whole: torch.Tensor) -> Any:
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    target = cast("Callable[..., Any]", node.target)
    mode = cast("Any", whole).fake_mode
    unguarded = mode.shape_env.suppress_guards() if mode.shape_env else contextlib.nullcontext()
    with mode, unguarded:  # what holds for the view already is not asked again
        return target(*args, **kwargs)


def separate_twins(graph: Graph, loop_op: Callable[..., object]) -> None:
    """Copy what is returned of a loop that has the operands of an earlier one, in place."""
    seen: set[object] = set()
    twins: set[Node] = set()
    for node in graph.find_nodes(op="call_function", target=loop_op):
        key = str(node.args), str(node.kwargs)
        twins |= {node} if key in seen else set()
        seen.add(key)
    (output,) = graph.find_nodes(op="output")
    for node in dict.fromkeys(output_nodes(graph)):
        source = node
        while source not in twins and (
            source.target is operator.getitem
            or (source.op != "placeholder" and rules.is_view(source))
        ):
            source = source.all_input_nodes[0]
        if source not in twins:
            continue
        with graph.inserting_before(output):
            copy = graph.call_function(aten.clone.default, (node,))
        copy.meta = dict(node.meta)
        with node.meta["val"].fake_mode:
            copy.meta["val"] = node.meta["val"].clone()
        output.replace_input_with(node, copy)

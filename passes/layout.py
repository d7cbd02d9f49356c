"""Outputs keep the strides that the caller of the original graph would see.

A rewrite may make an output anew: dense, where it was a view into something larger
(``x[..., 5:]``). Its values are the same, but ``view`` and ``as_strided`` on it would not be. Such
an output is copied into memory of the original strides.

Gradients are left as they are: autograd takes them in any layout.

Not handled: symbolic strides that differ (`LayoutError`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from passes.liveness import tangent_nodes

aten = torch.ops.aten


class LayoutError(ValueError):
    """An output would have other strides, and these are not known before the graph runs."""


def _strides(node: Node) -> list[Any]:
    """Strides of the dims that have more than one position."""
    value = node.meta["val"]
    return [st for s, st in zip(value.shape, value.stride(), strict=True) if str(s) != "1"]


def keep_strides(old: Graph, new: Graph) -> None:
    """Give the forward outputs of `new` the strides of those of `old`; `new` is changed.

    Raises:
        LayoutError: the strides of an output differ and are symbolic.
    """
    tangents = tangent_nodes(old)
    (old_output,), (new_output,) = old.find_nodes(op="output"), new.find_nodes(op="output")
    wanted, made = old_output.args[0], new_output.args[0]
    assert isinstance(wanted, (list, tuple))
    assert isinstance(made, (list, tuple))
    copies: dict[tuple[Node, str], Node] = {}
    results: list[Any] = []
    for before, after in zip(wanted, made, strict=True):
        results.append(after)
        if not isinstance(before, Node) or not isinstance(after, Node) or before in tangents:
            continue
        value = before.meta.get("val")
        if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
            continue
        if str(_strides(before)) == str(_strides(after)):
            continue
        extents = (*value.shape, *value.stride())
        if not all(isinstance(e, int) for e in extents):
            raise LayoutError(f"the strides of {before.name} are symbolic")
        key = (after, str(value.stride()))
        if key not in copies:
            with new.inserting_before(new_output):
                copies[key] = _copied(new, after, value)
        results[-1] = copies[key]
    new_output.args = (type(made)(results),)


def _copied(graph: Graph, node: Node, like: torch.Tensor) -> Node:
    empty = graph.call_function(
        aten.empty_strided.default,
        (list(like.shape), list(like.stride())),
        {"dtype": like.dtype, "device": like.device},
    )
    copy = graph.call_function(aten.copy.default, (empty, node))
    for made in (empty, copy):
        made.meta = {k: v for k, v in node.meta.items() if k not in ("val", "tensor_meta")}
        made.meta["val"] = like
    return copy

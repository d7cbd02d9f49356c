"""Put the closure of a deferred output into the Dynamo graph that reads it.

A model may return its logits and leave the loss to another graph: after a graph break, or in a loss
function that is compiled by itself. The logits arrive there as a deferred tensor. Its closure
(``linear(hidden, weight)``) is computed inside the graph instead, from the tensors that it starts
from, so that the matrix product and the loss meet in one joint graph and become a region; and the
gradient goes to these tensors, with nothing of the logits' size in between.

Terms (see also `passes.defer`)
-----
opened      said of an input of the graph that is replaced in this way.
parts       the tensors that the closure starts from: they become inputs in the opened one's place.

The graph is copied; the given one is not changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.amp.autocast_mode import (
    _enter_autocast,  # pyright: ignore[reportPrivateUsage]
    _exit_autocast,  # pyright: ignore[reportPrivateUsage]
)
from torch.fx.node import map_arg

from passes.dynamo import copy_extras

__all__ = ["Opening", "open_inputs"]


@dataclass(frozen=True)
class Opening:
    """What an input of a Dynamo graph stands for."""

    closure: fx.GraphModule  # called with the parts, returns the value
    casts: tuple[torch.dtype, ...]  # applied to what the closure returns, in order
    autocast: tuple[tuple[str, bool, torch.dtype], ...]  # device type, whether on, dtype
    parts: tuple[torch.Tensor, ...]  # fake
    sources: tuple[object, ...]  # where Dynamo finds each part, for AOTAutograd


def open_inputs(
    gm: fx.GraphModule,
    openings: Mapping[int, Opening],
    plain: Mapping[int, torch.Tensor] | None = None,
) -> fx.GraphModule:
    """A copy of `gm` that computes some of its inputs.

    Args:
        gm: a Dynamo graph, fake tensors in ``meta["example_value"]``.
        openings: by position among the inputs.
        plain: new ``example_value``s of inputs that stay, by position.

    Returns:
        a graph whose inputs are those of `gm`, with the parts of each opened one in its place.
    """
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    parts: dict[int, list[fx.Node]] = {}
    inputs = gm.graph.find_nodes(op="placeholder")
    for index, node in enumerate(inputs):
        if index not in openings:
            new[node] = _copy(graph, node, new)
            if plain and index in plain:
                new[node].meta["example_value"] = plain[index]
            continue
        parts[index] = []
        for number, tensor in enumerate(openings[index].parts):
            part = graph.placeholder(f"{node.name}_part{number}")
            part.meta = {"example_value": tensor}
            part._dynamo_source = openings[index].sources[number]  # type: ignore[attr-defined]
            parts[index].append(part)
    for index, opening in openings.items():
        new[inputs[index]] = _inline(graph, opening, parts[index])
    for node in gm.graph.nodes:
        if node.op != "placeholder":
            new[node] = _copy(graph, node, new)
    graph.lint()
    copy = fx.GraphModule(gm, graph)
    copy.meta = dict(gm.meta)
    copy_extras(gm, copy)
    return copy


def _copy(graph: fx.Graph, node: fx.Node, new: dict[fx.Node, fx.Node]) -> fx.Node:
    if node.op == "output":
        copy = graph.output(map_arg(node.args[0], new.__getitem__))
    else:
        copy = graph.node_copy(node, new.__getitem__)
    copy.meta = dict(node.meta)
    copy_extras(node, copy)
    return copy


def _inline(graph: fx.Graph, opening: Opening, parts: list[fx.Node]) -> fx.Node:
    """Append the closure's operations; each is run on fake tensors for its ``example_value``."""
    values: dict[fx.Node, Any] = {p: p.meta["example_value"] for p in parts}

    def append(node: fx.Node) -> fx.Node:
        args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
        if node.op == "call_method":
            values[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            assert callable(node.target)
            values[node] = node.target(*args, **kwargs)
        if isinstance(values[node], torch.Tensor | torch.SymInt | int | float):
            node.meta["example_value"] = values[node]
        return node

    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        contexts: list[fx.Node] = []
        for device_type, enabled, dtype in opening.autocast:
            entered = graph.call_function(_enter_autocast, (device_type, dtype, enabled, False))
            contexts.append(append(entered))
        new: dict[fx.Node, fx.Node] = {}
        given = iter(parts)
        result: fx.Node | None = None
        for node in opening.closure.graph.nodes:
            if node.op == "placeholder":
                new[node] = next(given)
            elif node.op == "output":
                result = new[node.args[0]]
            else:
                copy = graph.node_copy(node, new.__getitem__)
                copy.meta = dict(node.meta)
                new[node] = append(copy)
        assert result is not None
        for dtype in opening.casts:
            result = append(graph.call_method("to", (result, dtype)))
        for context in reversed(contexts):
            append(graph.call_function(_exit_autocast, (context,)))
    return result

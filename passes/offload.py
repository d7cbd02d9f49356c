"""What the forward saves for the backward waits in the host's memory.

Terms
    saved value   an output of the forward graph that the backward graph takes.
    base          the node whose memory a node's value lies in: itself, or what it is a view of.

Algorithm, on the two graphs that the partitioner made of a joint graph
    1. A saved value moves if it is large, on an accelerator, and dense in some order of its dims.
    2. Bases that something else keeps on the device (an input, an output of the model, a saved
       value that does not move) free nothing, so none of their values move.
    3. After the last reader of a value's base the forward copies it to pinned memory, dims in the
       order in which they lie in memory; before the first reader the backward copies it back.

Both copies are ordinary ops of a functional graph, on the stream on which everything else runs, so
they are right wherever they stand; where they stand decides how much memory is freed, and
`mstc.watch` sees it.

PyTorch has such a pass (`torch._functorch._activation_offloading`), from which op and places are.
It takes neither views, nor outputs of ops that have several (loops, attention), nor values whose
dims lie in another order, which is most of what a decoder saves beside loops. All of it moves here.

Not handled: copies beside the computation, on a stream of their own; values with holes, or
expanded; sizes that are left open.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch.fx import Graph, Node

from passes import rules
from passes.copies import copy_node
from passes.liveness import output_nodes

HOST = torch.device("cpu")
_MIN_NBYTES = 2**20  # of a value; smaller ones free little for a launch and a wait


@dataclass(frozen=True)
class Offloaded:
    """Two graphs between which saved values wait on the host."""

    forward: Graph
    backward: Graph
    nbytes: int  # of the values that move
    stays: int  # bytes of intermediate values that are saved on the device nevertheless


def offload_saved_values(
    forward: Graph, backward: Graph, num_outputs: int, *, min_nbytes: int = _MIN_NBYTES
) -> Offloaded | None:
    """Rewrite both; None if nothing moves. The graphs that are given stay as they are.

    Args:
        forward, backward: with fake values in ``meta["val"]``; the backward's inputs have the names
            of the forward's outputs.
        num_outputs: how many of the forward's outputs are the model's; the others are saved.
        min_nbytes: of the smallest value that moves.
    """
    (output,) = forward.find_nodes(op="output")
    returned: Any = output.args[0]
    saved = [n for n in dict.fromkeys(returned[num_outputs:]) if isinstance(n, Node)]
    moving = {n: order for n in saved if (order := _order(n, min_nbytes)) is not None}
    held = {_base(n) for n in output_nodes(forward) if n not in moving}
    held |= {_base(n) for n in returned[:num_outputs] if isinstance(n, Node)}
    moving = {n: o for n, o in moving.items() if (b := _base(n)) not in held and _is_made(b)}
    if not moving:
        return None
    names = {node.name: order for node, order in moving.items()}
    made = {_base(n): _nbytes(n) for n in saved if _is_made(_base(n))}
    for node in moving:
        made.pop(_base(node), None)
    return Offloaded(
        _sent(forward, moving, num_outputs),
        _fetched(backward, names),
        sum(map(_nbytes, moving)),
        sum(made.values()),
    )


def is_far(device: torch.device) -> bool:
    """Whether a device has memory of its own, beside the host's."""
    return device.type not in ("cpu", "meta")


def _is_made(node: Node) -> bool:
    return node.op == "call_function"


def _base(node: Node) -> Node:
    while _is_made(node) and rules.is_view(node):
        node = node.all_input_nodes[0]
    return node


def _nbytes(node: Node) -> int:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not all(isinstance(s, int) for s in value.shape):
        return 0
    return prod(value.shape) * value.dtype.itemsize


def _order(node: Node, min_nbytes: int) -> list[int] | None:
    """The order in which the dims of a value that may move lie in memory."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
        return None
    if _nbytes(node) < min_nbytes or not is_far(value.device):
        return None
    strides = value.stride()
    order = sorted(range(value.dim()), key=lambda dim: (value.shape[dim] > 1, -strides[dim]))
    return order if value.permute(order).is_contiguous() else None


def _sent(graph: Graph, moving: dict[Node, list[int]], num_outputs: int) -> Graph:
    """The forward, with copies to the host."""
    last: dict[Node, Node] = {}  # base -> its last reader
    for node in graph.nodes:
        if node.op != "output":
            for source in (node, *node.all_input_nodes):
                last[_base(source)] = node
    due: dict[Node, list[Node]] = {}
    for node in moving:
        due.setdefault(last[_base(node)], []).append(node)
    new = Graph()
    copied: dict[Node, Node] = {}
    hosts: dict[Node, Node] = {}
    for node in graph.nodes:
        copied[node] = copy_node(new, node, copied.__getitem__)
        for value in due.get(node, ()):
            lying = _permuted(new, copied[value], moving[value])
            hosts[value] = _put(new, lying, HOST, _host_name(value.name))
    (old,), (output,) = graph.find_nodes(op="output"), new.find_nodes(op="output")
    before, after = list(old.args[0]), list(output.args[0])
    for i in range(num_outputs, len(after)):
        after[i] = hosts.get(before[i], after[i])
    output.args = (type(old.args[0])(after),)
    new.lint()
    return new


def _fetched(graph: Graph, orders: dict[str, list[int]]) -> Graph:
    """The backward, with copies from the host."""
    new = Graph()
    copied: dict[Node, Node] = {}
    waiting: dict[Node, Node] = {}  # of the graph that was given -> what comes from the host
    for node in graph.nodes:
        if node.op == "placeholder" and node.name in orders:
            waiting[node] = _host_input(new, node, orders[node.name])
            continue
        for value in node.all_input_nodes:
            if value in waiting:
                whole = value.meta["val"]
                back = _put(new, waiting.pop(value), whole.device, value.name)
                copied[value] = _permuted(new, back, _inverse(orders[value.name]))
        copied[node] = copy_node(new, node, copied.__getitem__)
    new.lint()
    return new


def _host_name(name: str) -> str:
    return f"host_{name}"


def _inverse(order: list[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


def _host_input(graph: Graph, node: Node, order: list[int]) -> Node:
    made = graph.placeholder(_host_name(node.name))
    value = node.meta["val"]
    made.meta = _meta_like(node)
    made.meta["val"] = _like(value.permute(order), HOST)
    return made


def _put(graph: Graph, node: Node, device: torch.device, name: str) -> Node:
    made = graph.create_node(
        "call_function",
        torch.ops.prims.device_put.default,
        (node, device, True),  # without a wait: what reads it on the device is on the same stream
        name=name,
    )
    made.meta = _meta_like(node)
    made.meta["val"] = _like(node.meta["val"], device)
    return made


def _permuted(graph: Graph, node: Node, order: list[int]) -> Node:
    if order == sorted(order):
        return node
    made = graph.call_function(torch.ops.aten.permute.default, (node, order))
    made.meta = _meta_like(node)
    made.meta["val"] = node.meta["val"].permute(order)
    return made


def _meta_like(node: Node) -> dict[str, Any]:
    return {k: v for k, v in node.meta.items() if k not in ("val", "tensor_meta")}


def _like(value: Any, device: torch.device) -> Any:
    with value.fake_mode:
        return torch.empty(value.shape, dtype=value.dtype, device=device)

"""Whether values are linear in one scalar: the proof that gradient-in-forward needs.

A backward pass is linear in its tangent, so with a single scalar tangent the gradients can be made
with the tangent set to one and scaled later. A custom autograd function may break that (clip,
quantise), so it is proven op by op: every op on the way must be linear in its operand that depends
on the scalar. An op that is not listed refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch.fx import Node

from passes.rules.arguments import argument
from passes.source import packet_of

aten = torch.ops.aten
prims = torch.ops.prims

_FIRST = {  # linear in the first operand when no other depends on the scalar
    aten.view,
    aten._unsafe_view,
    aten.reshape,
    aten.squeeze,
    aten.unsqueeze,
    aten.permute,
    aten.transpose,
    aten.t,
    aten.expand,
    aten.slice,
    aten.select,
    aten.alias,
    aten.detach,
    aten.clone,
    aten.neg,
    aten.sum,
    aten.div,
    aten.gather,
    aten.index_select,
    aten.constant_pad_nd,
    aten.tanh_backward,
    aten.sigmoid_backward,
    aten.gelu_backward,
    aten.silu_backward,
    aten.threshold_backward,
    aten._softmax_backward_data,
    aten._log_softmax_backward_data,
}
_BILINEAR = {aten.mul, aten.mm, aten.bmm}  # linear in either operand, not in both
_ADDITIVE = {
    aten.add,
    aten.sub,
    aten.where,
}  # linear when every value operand depends on the scalar or is zero


def _is_zero(arg: object) -> bool:
    if isinstance(arg, (int, float)):
        return bool(arg == 0)
    if not isinstance(arg, Node) or arg.op != "call_function":
        return False
    packet = packet_of(arg)
    if packet in (aten.zeros, aten.zeros_like, aten.new_zeros):
        return True
    if packet is aten.scalar_tensor:
        return _is_zero(argument(arg, "s"))
    if packet in (aten.full, aten.full_like, aten.new_full):
        value = argument(arg, "fill_value")
        return isinstance(value, (int, float)) and value == 0
    return packet in (aten.expand, aten.view, aten.alias, prims.convert_element_type) and _is_zero(
        arg.args[0]
    )


def _keeps(node: Node, depends: Callable[[object], bool]) -> bool:
    packet = packet_of(node)
    operands = [depends(a) for a in node.args]
    if any(depends(v) for v in node.kwargs.values()):
        return False
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return False  # rounded to integers, or a choice
    if packet is prims.convert_element_type:
        return True
    if packet is aten.constant_pad_nd and not _is_zero(argument(node, "value")):
        return False
    if packet in _FIRST and node.target is not aten.view.dtype:
        return operands[0] and sum(operands) == 1 and not node.kwargs.get("rounding_mode")
    if packet in _BILINEAR:
        return sum(operands) == 1
    if packet in _ADDITIVE:
        if packet is aten.where:
            return not operands[0] and all(depends(a) or _is_zero(a) for a in node.args[1:3])
        return all(depends(a) or _is_zero(a) for a in node.args[:2])
    return False


def is_linear_in(scalar: Node, nodes: Iterable[Node]) -> bool:
    """Whether every node of `nodes` (in topological order) that depends on `scalar` is linear in
    it."""
    dependent = {scalar}

    def depends(arg: object) -> bool:
        if isinstance(arg, Node):
            return arg in dependent
        return isinstance(arg, (list, tuple)) and any(depends(a) for a in arg)

    for node in nodes:
        if any(i in dependent for i in node.all_input_nodes):
            if not _keeps(node, depends):
                return False
            dependent.add(node)
    return True

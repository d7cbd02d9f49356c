"""Fused attention: queries are independent of each other, keys and values are read whole.

Along the queries the op is parallel: every query sees all keys. Their gradients are so too, and the
gradients of keys and values are sums over the queries. Batch and heads are parallel for all.

Not handled: attention that is told to be causal, where a slice of queries would begin somewhere
else (nothing of queries x keys is in memory there); dropout inside the kernel; kernels whose
statistics are padded.
"""

from __future__ import annotations

from typing import cast

import torch
from torch.fx import Node

from passes.axes import Cut, Dims, OpAxes, OpCall, Product, Rule
from passes.rules.arguments import argument

aten = torch.ops.aten


def is_deterministic(node: Node) -> bool:
    """Whether a fused attention drops nothing: kernels are tagged as random for their dropout."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    return target.overloadpacket in RULES and argument(node, "dropout_p") == 0


def _operand(call: OpCall, name: str) -> Dims:
    return call.dims(cast("Node", argument(call.node, name)))


def _aligned(call: OpCall) -> tuple[Dims, Dims, Dims] | None:
    """Query, key and value with batch, heads, features and keys aligned, and the mask with both."""
    query, key, value = (_operand(call, name) for name in ("query", "key", "value"))
    unify = call.table.unify
    for other in (key, value):
        if not all(unify(query[d], other[d]) for d in (0, 1)):
            return None
    if not (unify(query[3], key[3]) and unify(key[2], value[2])):
        return None
    mask = argument(call.node, "attn_mask")
    if isinstance(mask, Node):
        scores = (query[0], query[1], query[2], key[2])
        for product, wanted in zip(call.dims(mask), scores, strict=True):
            if product and not unify(product, wanted):
                return None
    return query, key, value


def _roles_are_apart(call: OpCall) -> bool:
    """Whether queries and keys are different axes; asks for a copy where they are not."""
    query = set(_operand(call, "query")[2])
    shared = False
    for name in ("key", "value"):
        if query & set(_operand(call, name)[2]):
            call.cuts.append(Cut(call.node, cast("Node", argument(call.node, name)), 2))
            shared = True
    return not shared


def _entangled(call: OpCall, query: Dims, key: Dims, value: Dims) -> tuple[Product, ...]:
    closed = (query[3], key[2], value[3])
    if argument(call.node, "is_causal") or argument(call.node, "dropout_p"):
        return (*closed, query[2])
    return closed


def forward(call: OpCall) -> OpAxes | None:
    """``-> output [b, h, q, e], logsumexp [b, h, q]``"""
    if not _roles_are_apart(call) or (found := _aligned(call)) is None:
        return None
    query, key, value = found
    out = (*query[:3], value[3])
    return OpAxes((out, query[:3]), entangled=_entangled(call, query, key, value))


def backward(call: OpCall) -> OpAxes | None:
    """``-> gradients of query, key and value``"""
    if not _roles_are_apart(call) or (found := _aligned(call)) is None:
        return None
    query, key, value = found
    for name, dims in (
        ("grad_out", (*query[:3], value[3])),
        ("out", (*query[:3], value[3])),
        ("logsumexp", query[:3]),
    ):
        for left, right in zip(_operand(call, name), dims, strict=True):
            if not call.table.unify(left, right):
                return None
    over_queries = (query[2],)
    return OpAxes(
        (query, key, value),
        entangled=_entangled(call, query, key, value),
        partial=((), over_queries, over_queries),
    )


RULES: dict[object, Rule] = {
    aten._scaled_dot_product_flash_attention_for_cpu: forward,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
}

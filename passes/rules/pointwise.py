"""Pointwise ops: every dim of every operand aligns with the output's, by broadcasting from the
right.

Covers every op with ``torch.Tag.pointwise`` (hundreds), and the few untagged ones in `RULES`.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from passes.axes import Dims, OpAxes, OpCall, Product, Rule, as_size

aten = torch.ops.aten
prims = torch.ops.prims


def broadcast(call: OpCall) -> OpAxes | None:
    """One output; operands broadcast from the right, a dim of size one stretches."""
    (value,) = call.outputs
    assert value is not None
    rank = value.dim()
    dims: list[Product | None] = [None] * rank
    for operand in call.node.all_input_nodes:
        if not isinstance(operand.meta.get("val"), torch.Tensor):
            continue  # a SymInt scalar
        operand_dims = call.dims(operand)
        for position, product in enumerate(operand_dims, start=rank - len(operand_dims)):
            size = call.table.size(product)
            if size == 1:
                continue
            known = dims[position]
            if known is None:
                dims[position] = product
            elif not call.table.unify(known, product):
                return None
    out: Dims = tuple(
        call.table.fresh(as_size(size)) if product is None else product
        for product, size in zip(dims, value.shape, strict=True)
    )
    return OpAxes((out,))


def like(call: OpCall) -> OpAxes:
    """``full_like`` and its kin: the operand's shape, none of its values."""
    node = call.node.args[0]
    assert isinstance(node, Node)
    return OpAxes((call.dims(node),))


RULES: dict[object, Rule] = {
    prims.convert_element_type: broadcast,
    aten._to_copy: broadcast,
    aten.alias: broadcast,
    aten.detach: broadcast,
    aten.clone: broadcast,
    aten.copy: broadcast,
    aten.lift_fresh_copy: broadcast,
    aten.fill: broadcast,
    aten.masked_fill: broadcast,
    aten.isnan: broadcast,
    aten.contiguous: broadcast,
    aten.full_like: like,
    aten.zeros_like: like,
    aten.ones_like: like,
}

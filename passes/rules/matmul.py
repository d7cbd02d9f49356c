"""Matrix products: rows, columns and batch pass through, the contracted axis is summed."""

from __future__ import annotations

import torch

from passes.axes import OpAxes, OpCall, Rule

aten = torch.ops.aten


def mm(call: OpCall) -> OpAxes | None:
    left, right = (call.dims(a) for a in call.node.args[:2])
    if not call.table.unify(left[1], right[0]):
        return None
    return OpAxes(((left[0], right[1]),), summed=(left[1],))


def bmm(call: OpCall) -> OpAxes | None:
    left, right = (call.dims(a) for a in call.node.args[:2])
    if not (call.table.unify(left[0], right[0]) and call.table.unify(left[2], right[1])):
        return None
    return OpAxes(((left[0], left[1], right[2]),), summed=(left[2],))


def addmm(call: OpCall) -> OpAxes | None:
    """``bias + a @ b``; along the contracted axis the bias would be added once per chunk, so that
    one is closed."""
    bias, left, right = (call.dims(a) for a in call.node.args[:3])
    out = (left[0], right[1])
    if not call.table.unify(left[1], right[0]):
        return None
    for product, position in zip(reversed(bias), (1, 0), strict=False):
        if product and not call.table.unify(product, out[position]):
            return None
    return OpAxes((out,), entangled=(left[1],))


def mv(call: OpCall) -> OpAxes | None:
    left, right = (call.dims(a) for a in call.node.args[:2])
    return OpAxes(((left[0],),), summed=(left[1],)) if call.table.unify(left[1], right[0]) else None


def dot(call: OpCall) -> OpAxes | None:
    left, right = (call.dims(a) for a in call.node.args[:2])
    return OpAxes(((),), summed=(left[0],)) if call.table.unify(left[0], right[0]) else None


RULES: dict[object, Rule] = {
    aten.mm: mm,
    aten.bmm: bmm,
    aten.addmm: addmm,
    aten.mv: mv,
    aten.dot: dot,
}

"""Matrix products: rows, columns and batch pass through, the contracted axis is summed."""

from __future__ import annotations

import torch

from passes.axes import Dims, OpAxes, OpCall, Product, Rule

aten = torch.ops.aten


def _product(call: OpCall, left: Dims, right: Dims) -> tuple[Dims, Product] | None:
    """Dims of ``a @ b``, with or without a batch dim, and the contracted one."""
    inner = left[-1]
    both = ((inner, right[-2]), *zip(left[:-2], right[:-2], strict=True))
    if not all(call.table.unify(a, b) for a, b in both):
        return None
    return (*left[:-1], right[-1]), inner


def mm(call: OpCall) -> OpAxes | None:
    """``a @ b``, with or without a batch dim."""
    left, right = (call.dims(a) for a in call.node.args[:2])
    found = _product(call, left, right)
    return found and OpAxes((found[0],), summed=(found[1],))


def addmm(call: OpCall) -> OpAxes | None:
    """``bias + a @ b``, with or without a batch dim; along the contracted axis the bias would be
    added once per chunk, so that one is closed."""
    bias, left, right = (call.dims(a) for a in call.node.args[:3])
    found = _product(call, left, right)
    if found is None:
        return None
    out, inner = found
    for product, dim in zip(reversed(bias), reversed(out), strict=False):
        if product and not call.table.unify(product, dim):
            return None
    return OpAxes((out,), entangled=(inner,))


def mv(call: OpCall) -> OpAxes | None:
    left, right = (call.dims(a) for a in call.node.args[:2])
    return OpAxes(((left[0],),), summed=(left[1],)) if call.table.unify(left[1], right[0]) else None


def dot(call: OpCall) -> OpAxes | None:
    left, right = (call.dims(a) for a in call.node.args[:2])
    return OpAxes(((),), summed=(left[0],)) if call.table.unify(left[0], right[0]) else None


RULES: dict[object, Rule] = {
    aten.mm: mm,
    aten.bmm: mm,
    aten.addmm: addmm,
    aten.baddbmm: addmm,
    aten.mv: mv,
    aten.dot: dot,
}

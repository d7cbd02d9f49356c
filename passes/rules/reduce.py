"""Reductions and normalisations: sums can be spread over a loop, the rest mixes its axes."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from passes.axes import Dims, OpAxes, OpCall, Product, Rule
from passes.rules.arguments import argument, dim_of

aten = torch.ops.aten
prims = torch.ops.prims


def _reduced(call: OpCall, dims: Dims) -> set[int]:
    """The dims that a call reduces: ``dim``, ``[dims]``, or all of them."""
    wanted = argument(call.node, "dim")
    if wanted is None:
        wanted = argument(call.node, "dims")  # as `prims` call it
    if wanted is None or wanted == []:
        return set(range(len(dims)))
    assert isinstance(wanted, (int, Iterable))
    listed = [wanted] if isinstance(wanted, int) else list(wanted)
    out: set[int] = set()
    for d in listed:
        assert isinstance(d, int)
        out.add(d + len(dims) if d < 0 else d)
    return out


def _reduce(call: OpCall) -> tuple[tuple[Dims | None, ...], tuple[Product, ...]]:
    dims = call.dims(call.node.args[0])
    reduced = _reduced(call, dims)
    outputs: list[Dims | None] = []
    for value in call.outputs:
        if value is None:
            outputs.append(None)
        elif value.dim() == len(dims):  # keepdim
            outputs.append(tuple(() if i in reduced else p for i, p in enumerate(dims)))
        else:
            outputs.append(tuple(p for i, p in enumerate(dims) if i not in reduced))
    return tuple(outputs), tuple(dims[i] for i in sorted(reduced))


def total(call: OpCall) -> OpAxes:
    outputs, reduced = _reduce(call)
    return OpAxes(outputs, summed=reduced)


def other(call: OpCall) -> OpAxes:
    """max, min, argmax, mean, variance, any, all: no sum over chunks gives the whole."""
    outputs, reduced = _reduce(call)
    return OpAxes(outputs, entangled=reduced)


def along(call: OpCall) -> OpAxes:
    """softmax, cumsum, sort: the shape stays, the positions of `dim` mix."""
    dims = call.dims(call.node.args[0])
    position = dim_of(call.node, len(dims))
    return OpAxes((dims,) * len(call.outputs), entangled=(dims[position],))


def topk(call: OpCall) -> OpAxes:
    dims = call.dims(call.node.args[0])
    position = dim_of(call.node, len(dims))
    piece = call.fresh_dims()[position]
    out = (*dims[:position], piece, *dims[position + 1 :])
    return OpAxes((out, out), entangled=(dims[position], piece))


def softmax_backward(call: OpCall) -> OpAxes | None:
    grad, out = (call.dims(a) for a in call.node.args[:2])
    position = dim_of(call.node, len(out))
    for left, right in zip(grad, out, strict=True):
        if not call.table.unify(left, right):
            return None
    return OpAxes((out,), entangled=(out[position],))


RULES: dict[object, Rule] = {
    aten.sum: total,
    prims.sum: total,
    aten.mean: other,
    aten.amax: other,
    aten.amin: other,
    aten.max: other,
    aten.min: other,
    aten.argmax: other,
    aten.argmin: other,
    aten.any: other,
    aten.all: other,
    aten.prod: other,
    aten.var: other,
    aten.var_mean: other,
    aten.std: other,
    aten.logsumexp: other,
    aten._softmax: along,
    aten._log_softmax: along,
    aten.cumsum: along,
    aten.sort: along,
    aten.topk: topk,
    aten._softmax_backward_data: softmax_backward,
    aten._log_softmax_backward_data: softmax_backward,
}

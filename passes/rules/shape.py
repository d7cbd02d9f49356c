"""Ops that move, split, merge, stretch or cut dims and compute nothing."""

from __future__ import annotations

from typing import cast

import torch
from torch.fx import Node

from passes.axes import Dims, OpAxes, OpCall, Product, Rule, as_size
from passes.rules.arguments import argument, dim_of

aten = torch.ops.aten

BITCAST = aten.view.dtype  # reads the same bytes as another type
# Only the grouping of dims changes: written as ``reshape`` to an explicit size.
RESHAPES = {aten.view, aten._unsafe_view, aten.reshape, aten.squeeze, aten.unsqueeze, aten.flatten}
# The output shares the input's storage.
VIEWS = {
    *RESHAPES,
    aten.permute,
    aten.t,
    aten.transpose,
    aten.expand,
    aten.slice,
    aten.select,
    aten.alias,
    aten.detach,
    aten.split,
    aten.split_with_sizes,
    aten.unbind,
}
SIZE_ARGUMENT: dict[object, int] = {aten.expand: 1}


def reshape(call: OpCall) -> OpAxes | None:
    (value,) = call.outputs
    assert value is not None
    flat: Product = tuple(axis for product in call.dims(call.node.args[0]) for axis in product)
    dims = call.table.regroup(flat, [as_size(s) for s in value.shape])
    return None if dims is None else OpAxes((dims,))


def permute(call: OpCall) -> OpAxes:
    dims = call.dims(call.node.args[0])
    order = cast("list[int]", argument(call.node, "dims"))
    return OpAxes((tuple(dims[d] for d in order),))


def transpose(call: OpCall) -> OpAxes:
    dims = list(call.dims(call.node.args[0]))
    first, second = (dim_of(call.node, len(dims), name) for name in ("dim0", "dim1"))
    dims[first], dims[second] = dims[second], dims[first]
    return OpAxes((tuple(dims),))


def t(call: OpCall) -> OpAxes:
    return OpAxes((tuple(reversed(call.dims(call.node.args[0]))),))


def expand(call: OpCall) -> OpAxes:
    """A stretched dim is a new axis along which every slice is the same."""
    (value,) = call.outputs
    assert value is not None
    dims = call.dims(call.node.args[0])
    lead = value.dim() - len(dims)
    out: list[Product] = []
    for position, size in enumerate(value.shape):
        product: Product = dims[position - lead] if position >= lead else ()
        wanted = as_size(size)
        out.append(product if call.table.size(product) == wanted else call.table.fresh(wanted))
    return OpAxes((tuple(out),))


def _cut(call: OpCall, dim: int, dims: Dims) -> OpAxes:
    """Along `dim` every output is a piece of the input; the other dims pass through."""
    outputs: list[Dims | None] = []
    entangled: list[Product] = [dims[dim]]
    for value in call.outputs:
        if value is None:
            outputs.append(None)
            continue
        piece = call.table.fresh(as_size(value.shape[dim]))
        entangled.append(piece)
        outputs.append((*dims[:dim], piece, *dims[dim + 1 :]))
    return OpAxes(tuple(outputs), entangled=tuple(entangled))


def slice_(call: OpCall) -> OpAxes:
    (value,) = call.outputs
    assert value is not None
    dims = call.dims(call.node.args[0])
    dim = dim_of(call.node, len(dims))
    start, end, step = (argument(call.node, name) for name in ("start", "end", "step"))
    if (
        (start is None or start == 0)
        and step == 1
        and call.table.size(dims[dim]) == as_size(value.shape[dim])
        and (end is None or (isinstance(end, int) and end > 0))
    ):
        return OpAxes((dims,))  # the whole of it; an `end` past a slice's own end still is
    return _cut(call, dim, dims)


def split(call: OpCall) -> OpAxes:
    dims = call.dims(call.node.args[0])
    return _cut(call, dim_of(call.node, len(dims)), dims)


def select(call: OpCall) -> OpAxes:
    dims = call.dims(call.node.args[0])
    dim = dim_of(call.node, len(dims))
    return OpAxes(((*dims[:dim], *dims[dim + 1 :]),), entangled=(dims[dim],))


def cat(call: OpCall) -> OpAxes | None:
    """Along the cut dim nothing is known; the others align."""
    (value,) = call.outputs
    assert value is not None
    parts = [call.dims(part) for part in cast("list[Node]", call.node.args[0])]
    dim = dim_of(call.node, value.dim())
    if any(len(part) != value.dim() for part in parts):
        return None  # the legacy empty operand
    out = list(parts[0])
    for part in parts[1:]:
        for position, product in enumerate(part):
            if position != dim and not call.table.unify(out[position], product):
                return None
    out[dim] = call.table.fresh(as_size(value.shape[dim]))
    return OpAxes((tuple(out),), entangled=(out[dim], *(part[dim] for part in parts)))


def pad(call: OpCall) -> OpAxes:
    (value,) = call.outputs
    assert value is not None
    dims = call.dims(call.node.args[0])
    out = tuple(
        product if call.table.size(product) == as_size(size) else call.table.fresh(as_size(size))
        for product, size in zip(dims, value.shape, strict=True)
    )
    padding = cast("list[int]", argument(call.node, "pad"))
    touched = {len(dims) - 1 - i // 2 for i, amount in enumerate(padding) if amount != 0}
    changed = tuple(p for i in touched for p in (dims[i], out[i]))
    return OpAxes((out,), entangled=changed)


def slice_scatter(call: OpCall) -> OpAxes | None:
    """Along `dim` the source lands in a piece; the other dims align."""
    base, source = (call.dims(a) for a in call.node.args[:2])
    dim = dim_of(call.node, len(base))
    for position, (left, right) in enumerate(zip(base, source, strict=True)):
        if position != dim and not call.table.unify(left, right):
            return None
    return OpAxes((base,), entangled=(base[dim], source[dim]))


def select_scatter(call: OpCall) -> OpAxes | None:
    """The source lands at one position of `dim`; the other dims align."""
    base, source = (call.dims(a) for a in call.node.args[:2])
    dim = dim_of(call.node, len(base))
    for left, right in zip((*base[:dim], *base[dim + 1 :]), source, strict=True):
        if not call.table.unify(left, right):
            return None
    return OpAxes((base,), entangled=(base[dim],))


RULES: dict[object, Rule] = {
    **dict.fromkeys(RESHAPES, reshape),
    aten.permute: permute,
    aten.transpose: transpose,
    aten.t: t,
    aten.expand: expand,
    aten.slice: slice_,
    aten.split: split,
    aten.split_with_sizes: split,
    aten.select: select,
    aten.cat: cat,
    aten.constant_pad_nd: pad,
    aten.slice_scatter: slice_scatter,
    aten.select_scatter: select_scatter,
}

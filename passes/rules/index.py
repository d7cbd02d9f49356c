"""Gathers and scatters: the indexed axis mixes, the others align."""

from __future__ import annotations

from typing import cast

import torch
from torch.fx import Node

from passes.axes import Dims, OpAxes, OpCall, Product, Rule, as_size
from passes.rules.arguments import argument, dim_of

aten = torch.ops.aten

_MASKS = (torch.bool, torch.uint8)  # as indices these pick where they are true


GATHERS = {aten.gather, aten.embedding, aten.index_select, aten.index}


def gather(call: OpCall) -> OpAxes | None:
    """``gather(x, dim, index)``: index may be shorter than x along the other dims, where only equal
    sizes align."""
    source, index = call.dims(call.node.args[0]), call.dims(call.node.args[2])
    dim = dim_of(call.node, len(source))
    entangled: list[Product] = [source[dim], index[dim]]
    if not _align(call, source, index, dim, entangled):
        return None
    return OpAxes((index,), entangled=tuple(entangled))


def scatter(call: OpCall) -> OpAxes | None:
    """``scatter(x, dim, index, src)`` with a tensor or a value; the output has x's dims."""
    base, index = call.dims(call.node.args[0]), call.dims(call.node.args[2])
    dim = dim_of(call.node, len(base))
    entangled: list[Product] = [base[dim], index[dim]]
    if not _align(call, base, index, dim, entangled):
        return None
    source = argument(call.node, "src")
    if isinstance(source, Node) and isinstance(source.meta.get("val"), torch.Tensor):
        values = call.dims(source)
        if values:
            entangled.append(values[dim])
            if not _align(call, values, index, dim, entangled):
                return None
    return OpAxes((base,), entangled=tuple(entangled))


def embedding(call: OpCall) -> OpAxes:
    weight, index = call.dims(call.node.args[0]), call.dims(call.node.args[1])
    return OpAxes(((*index, *weight[1:]),), entangled=(weight[0],))


def index_select(call: OpCall) -> OpAxes:
    source, index = call.dims(call.node.args[0]), call.dims(call.node.args[2])
    dim = dim_of(call.node, len(source))
    picked: Product = index[0] if index else ()
    return OpAxes(((*source[:dim], picked, *source[dim + 1 :]),), entangled=(source[dim],))


def index_tensor(call: OpCall) -> OpAxes | None:
    """``x[i, j]`` with index tensors in the leading dims only; masks (data-dependent sizes)
    refuse."""
    (value,) = call.outputs
    assert value is not None
    source = call.dims(call.node.args[0])
    indices = cast("list[Node | None]", call.node.args[1])
    if any(i is None or i.meta["val"].dtype in _MASKS for i in indices):
        return None
    rank = max(len(call.dims(i)) for i in indices)
    out: list[Product | None] = [None] * rank
    for one in indices:
        dims = call.dims(one)
        for position, product in enumerate(dims, start=rank - len(dims)):
            known = out[position]
            if call.table.size(product) == 1:
                continue
            if known is None:
                out[position] = product
            elif not call.table.unify(known, product):
                return None
    lead = tuple(
        call.table.fresh(as_size(s)) if p is None else p
        for p, s in zip(out, value.shape[:rank], strict=True)
    )
    return OpAxes(((*lead, *source[len(indices) :]),), entangled=source[: len(indices)])


def _align(call: OpCall, left: Dims, right: Dims, dim: int, entangled: list[Product]) -> bool:
    for position, (a, b) in enumerate(zip(left, right, strict=True)):
        if position == dim:
            continue
        if call.table.size(a) != call.table.size(b):
            entangled += [a, b]
        elif not call.table.unify(a, b):
            return False
    return True


RULES: dict[object, Rule] = {
    aten.gather: gather,
    aten.scatter: scatter,
    aten.scatter_add: scatter,
    aten.embedding: embedding,
    aten.index_select: index_select,
    aten.index: index_tensor,
}

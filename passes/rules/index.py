"""Gathers and scatters: the indexed axis mixes, the others align."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from passes.axes import Dims, OpAxes, OpCall, Product, Rule, Size
from passes.rules.arguments import argument, dim_of
from passes.rules.shape import is_constant_base

aten = torch.ops.aten

_MASKS = (torch.bool, torch.uint8)  # as indices these pick where they are true


GATHERS = {aten.gather, aten.embedding, aten.index_select, aten.index}


def gather(call: OpCall) -> OpAxes | None:
    """``gather(x, dim, index)``: index may be shorter than x along the other dims, where only equal
    sizes align."""
    source, index = call.dims(call.node.args[0]), call.dims(call.node.args[2])
    dim = dim_of(call.node, len(source))
    entangled: list[Product] = [source[dim], index[dim]]
    if not align(call, source, index, dim, entangled):
        return None
    return OpAxes((index,), entangled=tuple(entangled))


def scatter(call: OpCall) -> OpAxes | None:
    """``scatter(x, dim, index, src)`` with a tensor or a value; the output has x's dims."""
    base, index = call.dims(call.node.args[0]), call.dims(call.node.args[2])
    dim = dim_of(call.node, len(base))
    entangled: list[Product] = [base[dim], index[dim]]
    if not align(call, base, index, dim, entangled):
        return None
    source = argument(call.node, "src")
    if isinstance(source, Node) and isinstance(source.meta.get("val"), torch.Tensor):
        values = call.dims(source)
        if values:
            entangled.append(values[dim])
            if not align(call, values, index, dim, entangled):
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


def index_add(call: OpCall) -> OpAxes | None:
    """``x.index_add(dim, index, y)``: onto zeros a sum over the positions of the index; the other
    dims align."""
    base, index, values = (cast("Node", call.node.args[i]) for i in (0, 2, 3))
    dims, places = call.dims(values), call.dims(index)
    dim = dim_of(call.node, len(dims))
    if not places or not call.table.unify(dims[dim], places[0]):
        return None
    (bins,) = call.fresh_dims()[dim : dim + 1]
    op = onto(call, base, (*dims[:dim], bins, *dims[dim + 1 :]))
    if op is None:
        return None
    if op.remade and is_zeros(base):
        return replace(op, summed=(dims[dim],), entangled=(bins,))
    return replace(op, entangled=(bins, dims[dim]))


def index_tensor(call: OpCall) -> OpAxes | None:
    """``x[i, j]`` with index tensors in the leading dims only; masks (data-dependent sizes)
    refuse."""
    source = call.dims(call.node.args[0])
    indices = cast("list[Node | None]", call.node.args[1])
    if any(i is None or i.meta["val"].dtype in _MASKS for i in indices):
        return None
    rank = max(len(call.dims(i)) for i in indices)
    lead = lead_dims(call, indices, [None] * rank)
    if lead is None:
        return None
    return OpAxes(((*lead, *source[len(indices) :]),), entangled=source[: len(indices)])


def lead_dims(
    call: OpCall, indices: Sequence[Node | None], known: Sequence[Product | None]
) -> tuple[Product, ...] | None:
    """The dims that index tensors broadcast to, beside what is `known` of them."""
    out = list(known)
    sizes: list[Size] = [1] * len(out)
    for one in indices:
        dims = call.dims(one)
        for position, product in enumerate(dims, start=len(out) - len(dims)):
            size = call.table.size(product)
            if size == 1:
                continue
            sizes[position] = size
            found = out[position]
            if found is None:
                out[position] = product
            elif not call.table.unify(found, product):
                return None
    return tuple(
        call.table.fresh(size) if product is None else product
        for product, size in zip(out, sizes, strict=True)
    )


def align(call: OpCall, left: Dims, right: Dims, dim: int, entangled: list[Product]) -> bool:
    for position, (a, b) in enumerate(zip(left, right, strict=True)):
        if position == dim:
            continue
        if call.table.size(a) != call.table.size(b):
            entangled += [a, b]
        elif not call.table.unify(a, b):
            return False
    return True


def is_zeros(node: Node) -> bool:
    """Whether an operand is a constant of zeros."""
    if not is_constant_base(node):
        return False
    packet = node.target.overloadpacket  # type: ignore[union-attr]
    return packet is aten.zeros or (packet is aten.full and bool(node.args[1] == 0))


def onto(call: OpCall, base: Node, out: Dims, *, reads: tuple[Node, ...] = ()) -> OpAxes | None:
    """An op that writes to positions of `base`, whose result has the dims `out`."""
    uses = sum(leaf is base for leaf in tree_leaves((call.node.args, call.node.kwargs)))
    if is_constant_base(base) and uses == 1:
        return OpAxes((out,), reads=reads, remade=(base,))
    dims = call.dims(base)
    if len(dims) != len(out):
        return None
    if not all(call.table.unify(a, b) for a, b in zip(dims, out, strict=True)):
        return None
    return OpAxes((out,), reads=reads)


def accumulate(call: OpCall) -> OpAxes | None:
    """``zeros.index_put([i, j], values, accumulate=True)``: a sum over the positions of the
    indices. Onto anything but zeros, what was there would be added once per chunk."""
    base, indices, values = cast("tuple[Node, list[Node | None], Node]", call.node.args[:3])
    if argument(call.node, "accumulate") is not True:
        return None
    return _added(call, base, indices, values)


def masked_accumulate(call: OpCall) -> OpAxes | None:
    """The same, where a mask is true."""
    base, mask, indices, values = cast(
        "tuple[Node, Node, list[Node | None], Node]", call.node.args[:4]
    )
    if base is mask:
        return None
    op = _added(call, base, indices, values)
    return op if op is not None and _covers(call, mask, call.dims(values)) else None


def masked_read(call: OpCall) -> OpAxes | None:
    """``x[i, j]`` where a mask is true, and a number elsewhere."""
    source = call.dims(call.node.args[0])
    mask, indices = cast("tuple[Node, list[Node | None]]", call.node.args[1:3])
    if any(i is None or i.meta["val"].dtype in _MASKS for i in indices):
        return None
    lead = lead_dims(call, indices, [None] * max(len(call.dims(i)) for i in indices))
    if lead is None or not _covers(call, mask, (*lead, *source[len(indices) :])):
        return None
    return OpAxes(((*lead, *source[len(indices) :]),), entangled=source[: len(indices)])


def _covers(call: OpCall, mask: Node, out: Dims) -> bool:
    """Whether a mask, stretched from the right, is as the dims `out`."""
    dims = call.dims(mask)
    return len(dims) <= len(out) and all(
        call.table.size(a) == 1 or call.table.unify(a, b)
        for a, b in zip(reversed(dims), reversed(out), strict=False)
    )


def _added(call: OpCall, base: Node, indices: list[Node | None], values: Node) -> OpAxes | None:
    if not is_zeros(base) or base is values or base in indices:
        return None
    if any(i is None or i.meta["val"].dtype in _MASKS for i in indices):
        return None
    source = call.dims(values)
    lead = lead_dims(call, indices, source[: max(len(call.dims(i)) for i in indices)])
    if lead is None:
        return None
    (value,) = call.outputs
    assert value is not None
    rest = source[len(lead) :]
    if len(rest) != value.dim() - len(indices):
        return None
    bins = call.fresh_dims()[: len(indices)]
    return OpAxes((bins + rest,), summed=lead, entangled=bins, remade=(base,))


LOOKUPS = {aten.embedding, aten.index, aten.index_select, aten._unsafe_masked_index}

RULES: dict[object, Rule] = {
    aten.gather: gather,
    aten.scatter: scatter,
    aten.scatter_add: scatter,
    aten.index_add: index_add,
    aten.embedding: embedding,
    aten.index_select: index_select,
    aten.index: index_tensor,
    aten._unsafe_masked_index: masked_read,
    aten._unsafe_masked_index_put_accumulate: masked_accumulate,
}

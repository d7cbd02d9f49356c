"""Rows in the order of sorted keys: how they are made, read, multiplied in groups and put back.

    keys                     integers, one per element of a product of axes (token, choice)
    sort(keys)               the keys in order, and `Rows`: where each came from; a permuted axis
    rows // n                which outer position (token) a row belongs to, if the innermost factors
                             of the source are `n` positions
    x[rows]                  values of the positions, in sorted order
    zeros[rows] += y         sums of rows, per position
    empty[rows] = arange     `Places`: the inverse; ``argsort(rows)`` as well
    y[places]                rows back in the order of the positions
    histc(keys), cumsum      `Tally`: how many rows each group has, and where it ends
    grouped_mm(y, w, ends)   one matrix per group of rows; its weight gradient sums within groups

What is needed for a chunk's groups to be the groups of the whole: rows are ascending in the key; a
row's bin depends on its key alone and does not fall as the key rises; no key lies below the first
bin (keys above the last come after all groups, in a chunk as in the whole). Keys are therefore
asked to be indices (of ``topk`` or ``argmax``), which are not negative.

Not handled: groups padded to a multiple, rows dropped at a capacity, keys sorted in descending
order or along one of several dims.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import cast

import torch
from torch.fx import Node

from passes import grouped
from passes.axes import Dims, OpAxes, OpCall, Places, Product, Rows, Rule, Tally, divide
from passes.rules import create, index, pointwise, reduce, shape
from passes.rules.arguments import argument, dim_of
from passes.source import packet_of

aten = torch.ops.aten
prims = torch.ops.prims

GROUPED = {aten._grouped_mm, grouped.grouped_mm.overloadpacket}

_ORDERED = (torch.int32, torch.int64, torch.float32, torch.float64)
"""A cast between these keeps the order of integers, if not their difference."""

_CASTS = {prims.convert_element_type, aten._to_copy}
_SAME = {aten.alias, aten.detach, aten.clone, aten.lift_fresh_copy}
_PICKS = {aten.topk, aten.argmax, aten.argmin, aten.sort}  # whose indices are not negative


def _root(node: Node) -> Node:
    """The value whose entries a view, a copy, a cast or a sort of it holds, order kept."""
    while True:
        packet = packet_of(node)
        cast_ = packet in _CASTS and node.meta["val"].dtype in _ORDERED
        if packet in shape.RESHAPES or packet in _SAME or cast_:
            node = node.all_input_nodes[0]
        elif _is_output(node, 0, {aten.sort}):
            node = node.all_input_nodes[0].all_input_nodes[0]
        else:
            return node


def _is_output(node: Node, position: int, of: Collection[object]) -> bool:
    picks = node.target is operator.getitem and bool(node.args[1] == position)
    return picks and packet_of(node.all_input_nodes[0]) in of


def _is_index(node: Node) -> bool:
    """Whether a value can be seen to be integers that are not negative."""
    return _is_output(node, 1, _PICKS) or packet_of(node) in _PICKS


def sort(call: OpCall) -> OpAxes | None:
    keys = call.node.args[0]
    assert isinstance(keys, Node)
    dims, value = call.dims(keys), keys.meta["val"]
    if len(dims) != 1 or value.is_floating_point() or argument(call.node, "descending"):
        return reduce.along(call)
    content = call.content(keys)
    table = call.table
    if isinstance(content, Rows):
        whole = table.resolve(table.permuted[content.axis].source)
        unread = all(u.args[1] == 1 for u in call.node.users)
        if dims != ((content.axis,),) or table.resolve(content.target) != whole or not unread:
            return None
        back = Places(content.axis)
        return OpAxes(((whole,), (whole,)), contents=(None, back), reads=(keys,))
    if content is not None or any(a in table.permuted for a in dims[0]) or not dims[0]:
        return reduce.along(call)
    out = table.permute(dims[0], _root(keys))
    return OpAxes(((out,), (out,)), contents=(None, Rows(out[0], dims[0])))


def getitem(call: OpCall) -> OpAxes | None:
    op = create.getitem(call)
    source, position = call.node.args
    if op is None or not any(call.facts.contents(cast("Node", source))):
        return op
    content = call.content(source, cast("int", position))
    return OpAxes(op.outputs, contents=(content,), reads=(cast("Node", source),))


def carrying(rule: Rule) -> Rule:
    """The rule of an op that moves or casts one tensor's entries: what they tell stays true."""

    def wrapped(call: OpCall) -> OpAxes | None:
        op = rule(call)
        source = call.node.args[0] if call.node.args else None
        content = call.content(source)
        if op is None or content is None:
            return op
        (value,) = call.outputs
        if packet_of(call.node) in _CASTS and (value is None or value.dtype not in _ORDERED):
            return op
        return OpAxes(
            op.outputs,
            op.summed,
            op.entangled,
            contents=(content,),
            reads=(cast("Node", source),),
        )

    return wrapped


def floor_divide(call: OpCall) -> OpAxes | None:
    """``rows // n``: the outer position, where the factors below it hold `n` positions."""
    rows, by = call.node.args[:2]
    content = call.content(rows)
    mode = argument(call.node, "rounding_mode")
    if not isinstance(content, Rows) or not isinstance(by, int) or by < 1 or mode is None:
        return pointwise.broadcast(call)
    outer = divide(call.table.size(content.target), by)
    if outer is None:
        return pointwise.broadcast(call)
    parts = call.table.regroup(content.target, [outer, by])
    if parts is None:
        return pointwise.broadcast(call)
    kept, dropped = parts
    return OpAxes(
        (call.dims(rows),),
        entangled=(dropped,),  # a slice of it would hold fewer than `n` positions
        contents=(Rows(content.axis, kept),),
        reads=(cast("Node", rows),),
    )


def histogram(call: OpCall) -> OpAxes | None:
    """``histc`` of keys, sorted or not: a tally, if no key lies below the first bin."""
    keys = cast("Node", call.node.args[0])
    least, most = argument(call.node, "min"), argument(call.node, "max")
    root = _root(keys)
    if not isinstance(least, (int, float)) or not isinstance(most, (int, float)):
        return None
    if least > 0 or most <= least or not _is_index(root):
        return None
    axes = tuple(a for p in call.dims(keys) for a in p)
    return OpAxes(
        (call.fresh_dims(),),
        contents=(Tally(root, call.table.unpermuted(axes), running=False),),
    )


def running_sum(call: OpCall) -> OpAxes | None:
    counts = cast("Node", call.node.args[0])
    content = call.content(counts)
    (value,) = call.outputs
    if not isinstance(content, Tally) or content.running or value is None:
        return reduce.along(call)
    if value.dim() != 1 or value.dtype not in _ORDERED:
        return reduce.along(call)
    dims = call.dims(counts)
    ends = Tally(content.keys, content.source, running=True)
    return OpAxes((dims,), entangled=dims, contents=(ends,), reads=(counts,))


def grouped_mm(call: OpCall) -> OpAxes | None:
    """``grouped_mm(a, b, ends)``, PyTorch's or ours: rows of `a` by groups times `b`'s matrices,
    or, contracted over the rows, one matrix per group."""
    left, right = (call.dims(a) for a in call.node.args[:2])
    ends = argument(call.node, "offs")
    content = call.content(ends)
    own = call.node.target is grouped.grouped_mm
    if not isinstance(ends, Node) or not (own or argument(call.node, "bias") is None):
        return None
    if not isinstance(content, Tally) or not content.running:
        return None
    (groups,) = call.dims(ends)
    first, second = cast("tuple[Node, Node]", call.node.args[:2])
    if len(left) == 2 and len(right) == 3:
        apart = own or _rows_apart(first, 0)
        rows, inner, other = left[0], left[1], right[1]
        out: Dims = (rows, right[2])
        aligned = call.table.unify(groups, right[0])
    elif len(left) == 2 and len(right) == 2:
        apart = own or (_rows_apart(first, 1) and _rows_apart(second, 0))
        rows, inner, other = left[1], left[1], right[0]
        out = (groups, left[0], right[1])
        aligned = True
    else:
        return None
    if (
        not apart
        or not aligned
        or not call.table.unify(inner, other)
        or not _sorted_by(call, rows, content)
    ):
        return None
    return OpAxes((out,), summed=(inner,), entangled=(groups,), reads=(ends,))


def _rows_apart(node: Node, dim: int) -> bool:
    """Whether every row lies in one piece. Were rows side by side, a group would have to be a
    multiple of 16 bytes long on CUDA, and a chunk's groups are not, if those of the whole are."""
    stride = node.meta["val"].stride(1 - dim)
    return isinstance(stride, int) and stride == 1


def _sorted_by(call: OpCall, rows: Product, ends: Tally) -> bool:
    found = call.table.permuted.get(rows[0]) if len(rows) == 1 else None
    return found is not None and found.keys is ends.keys


def read(call: OpCall) -> OpAxes | None:
    """``x[rows]`` and ``y[places]``."""
    source = call.dims(call.node.args[0])
    indices = cast("list[Node | None]", call.node.args[1])
    op = index.index_tensor(call)
    content = call.content(indices[0]) if len(indices) == 1 else None
    if op is None or call.content(call.node.args[0]) is not None:
        return op
    if not _leads(call, content, source[0]):
        return op
    return OpAxes(op.outputs, reads=(cast("Node", indices[0]),))


def _leads(call: OpCall, content: object, dim: Product) -> bool:
    """Whether an index is one into `dim`, by what its entries tell."""
    if isinstance(content, Rows):
        return call.table.unify(dim, content.target)
    return isinstance(content, Places) and dim == (content.axis,)


def select(call: OpCall) -> OpAxes | None:
    """``index_select(x, dim, rows)``."""
    op, (source, _, at) = index.index_select(call), call.node.args[:3]
    dims = call.dims(source)
    dim = dim_of(call.node, len(dims))
    if call.content(source) is not None or not _leads(call, call.content(at), dims[dim]):
        return op
    return OpAxes(op.outputs, reads=(cast("Node", at),))


def gather(call: OpCall) -> OpAxes | None:
    source, at = call.node.args[0], cast("Node", call.node.args[2])
    content = call.content(at)
    if content is None or call.content(source) is not None:
        return index.gather(call)
    dims, picked = call.dims(source), call.dims(at)
    dim = dim_of(call.node, len(dims))
    entangled: list[Product] = []
    if not _leads(call, content, dims[dim]) or not index.align(call, dims, picked, dim, entangled):
        return index.gather(call)
    return OpAxes((call.dims(at),), entangled=tuple(entangled), reads=(at,))


def write(call: OpCall) -> OpAxes | None:
    """``index_put`` into a constant, or into values of its own positions."""
    indices = cast("list[Node | None]", call.node.args[1])
    at = indices[0] if len(indices) == 1 else None
    content = call.content(at)
    if at is not None and isinstance(content, (Rows, Places)):
        return _write_rows(call, at, content)
    return index.accumulate(call)


def _write_rows(call: OpCall, at: Node, content: Rows | Places) -> OpAxes | None:
    base, _, values = cast("tuple[Node, object, Node]", call.node.args[:3])
    table = call.table
    if call.content(values) is not None or call.content(base) is not None:
        return None
    whole = table.resolve(table.permuted[content.axis].source)
    once = isinstance(content, Places) or table.resolve(content.target) == whole
    adds = argument(call.node, "accumulate") is True
    constant = shape.is_constant_base(base) and base is not values
    if isinstance(content, Rows) and once and not adds and constant and _counts_up(values):
        return OpAxes(
            ((whole,),), contents=(Places(content.axis),), reads=(at,), remade=(base, values)
        )
    if not (once or adds):
        return None  # which of several rows stays is not said
    own = table.resolve((content.axis,)) if isinstance(content, Rows) else whole
    dims, places = call.dims(values), call.dims(at)
    if tuple(a for p in places for a in p) != own or len(dims) < len(places):
        return None
    if not all(table.unify(a, b) for a, b in zip(dims, places, strict=False)):
        return None
    target = content.target if isinstance(content, Rows) else (content.axis,)
    out: Dims = (target, *dims[len(places) :])
    return index.onto(call, base, out, reads=(at,))


def _counts_up(node: Node) -> bool:
    start, step = (node.kwargs.get(name) for name in ("start", "step"))
    return node.target is prims.iota.default and bool(start == 0 and step == 1)


def add_rows(call: OpCall) -> OpAxes | None:
    """``scatter_add(x, dim, rows, y)`` and ``index_add(x, dim, rows, y)``."""
    base, _, at, values = cast("tuple[Node, int, Node, Node]", call.node.args[:4])
    content = call.content(at)
    by_row = packet_of(call.node) is aten.index_add
    if not isinstance(content, Rows):
        return index.index_add(call) if by_row else index.scatter(call)
    if call.content(values) is not None or call.content(base) is not None:
        return None
    source, places = call.dims(values), call.dims(at)
    dim = dim_of(call.node, len(source))
    if source[dim] != (content.axis,) or places[0 if by_row else dim] != (content.axis,):
        return None
    if not by_row and not all(map(call.table.unify, source, places)):
        return None
    out = (*source[:dim], content.target, *source[dim + 1 :])
    return index.onto(call, base, out, reads=(at,))


_MOVES: dict[object, Rule] = {
    **{op: carrying(rule) for op, rule in shape.RULES.items() if op in shape.RESHAPES},
    **{op: carrying(shape.RULES[op]) for op in (aten.permute, aten.transpose, aten.t, aten.expand)},
    **{op: carrying(pointwise.RULES[op]) for op in (*_CASTS, *_SAME)},
}

RULES: dict[object, Rule] = {
    **_MOVES,
    operator.getitem: getitem,
    aten.sort: sort,
    aten.div.Tensor_mode: floor_divide,
    aten.histc: histogram,
    aten.cumsum: running_sum,
    **dict.fromkeys(GROUPED, grouped_mm),
    aten.index: read,
    aten.index_put: write,
    aten.gather: gather,
    aten.index_select: select,
    aten.scatter_add: add_rows,
    aten.index_add: add_rows,
}

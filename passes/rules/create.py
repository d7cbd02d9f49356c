"""Ops that make a tensor out of nothing: any slice of a constant is a smaller constant."""

from __future__ import annotations

import operator

import torch
from torch.fx import Node

from passes.axes import OpAxes, OpCall, Rule

aten = torch.ops.aten
prims = torch.ops.prims

SIZE_ARGUMENT: dict[object, int] = {
    aten.full: 0,
    aten.zeros: 0,
    aten.ones: 0,
    aten.new_full: 1,
    aten.new_zeros: 1,
    aten.new_ones: 1,
}
POSITIONS = {aten.arange, prims.iota}


def constant(call: OpCall) -> OpAxes:
    return OpAxes(call.all_fresh())


def positions(call: OpCall) -> OpAxes:
    """``arange``: the values tell the position, so a slice is another tensor."""
    dims = call.fresh_dims()
    return OpAxes((dims,), entangled=dims)


def getitem(call: OpCall) -> OpAxes | None:
    """One of several outputs; its dims were found with the op's."""
    source, index = call.node.args
    assert isinstance(source, Node)
    assert isinstance(index, int)
    dims = call.output_dims(source)[index]
    return None if dims is None else OpAxes((dims,), summed=call.partial(source, index))


RULES: dict[object, Rule] = {
    **dict.fromkeys(SIZE_ARGUMENT, constant),
    aten.scalar_tensor: constant,
    **dict.fromkeys(POSITIONS, positions),
    operator.getitem: getitem,
}

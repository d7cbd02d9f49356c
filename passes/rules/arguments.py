"""Reading a call's arguments as its schema has them: by position, by name, or the default."""

from __future__ import annotations

import torch
from torch.fx import Node


def argument(node: Node, name: str) -> object:
    """The argument `name` of a call, however given; None when the overload has none such."""
    assert isinstance(node.target, torch._ops.OpOverload)
    for position, described in enumerate(node.target._schema.arguments):
        if described.name == name:
            if position < len(node.args):
                return node.args[position]
            return node.kwargs.get(name, described.default_value)
    return None


def dim_of(node: Node, rank: int, name: str = "dim") -> int:
    """The dim that a call names, counted from the front."""
    value = argument(node, name)
    assert isinstance(value, int)
    assert -rank <= value < rank
    return value + rank if value < 0 else value

"""What every op does to axes: one small rule per op family.

A rule takes an `OpCall` (the operands' dims, and a table to unify them in) and returns `OpAxes`
(the outputs' dims, and the axes along which the op is not parallel), or None to refuse. An op
without a rule refuses; it is never guessed.

Each family has a property test (``tests/passes/test_rules.py``): for random shapes and any axis
whose role is ``parallel``, the op on slices equals the slice of the op; for ``sum``, the slices'
results add up to the whole.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence

import torch
from torch.fx import Node

from passes.axes import Rule
from passes.rules import attention, create, index, matmul, permuted, pointwise, reduce, shape

_TABLE: dict[object, Rule] = {
    **pointwise.RULES,
    **shape.RULES,
    **create.RULES,
    **reduce.RULES,
    **matmul.RULES,
    **index.RULES,
    **attention.RULES,
    **permuted.RULES,  # in place of some above, which these ask where no rows are read
}


def find_rule(node: Node) -> Rule | None:
    """The rule of a call, by overload, then by op (all overloads), then by tag; None when there is
    none."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return _TABLE.get(target)
    if torch.Tag.nondeterministic_seeded in target.tags and not attention.is_deterministic(node):
        return None  # a slice of a random tensor is not the random tensor of a slice
    if target._schema.is_mutable or target is shape.BITCAST:
        return None  # a write to a slice's copy would be lost; bits are no values
    rule = _TABLE.get(target) or _TABLE.get(target.overloadpacket)
    if rule is None and torch.Tag.pointwise in target.tags and len(target._schema.returns) == 1:
        return pointwise.broadcast
    return rule


def size_argument(node: Node) -> int | None:
    """The position of an explicit output size among a call's arguments (``view``, ``expand``,
    ``full``), which a slice of the output must rewrite; None where the op has none."""
    packet = _packet(node)
    if packet in shape.RESHAPES:
        return 1
    return shape.SIZE_ARGUMENT.get(packet, create.SIZE_ARGUMENT.get(packet))


def _packet(node: Node) -> object:
    target = node.target
    if target is shape.BITCAST:
        return target  # shares a name with `view`, and nothing else
    return target.overloadpacket if isinstance(target, torch._ops.OpOverload) else target


def resized(node: Node, shape: Sequence[object]) -> tuple[object, ...]:
    """The arguments of a constant (or of ``arange``) for another shape."""
    if node.target is torch.ops.prims.iota.default:
        (length,) = shape
        return (length, *node.args[1:])
    position = 0 if _packet(node) is torch.ops.aten.empty else size_argument(node)
    assert position is not None
    return (*node.args[:position], list(shape), *node.args[position + 1 :])


def is_reshape(node: Node) -> bool:
    """Whether only the grouping of dims changes, so that ``reshape`` to the output's size says it
    all."""
    return _packet(node) in shape.RESHAPES


def is_view(node: Node) -> bool:
    """Whether the output shares its input's storage (no bytes of its own)."""
    if node.target is operator.getitem:
        return all(is_view(i) for i in node.all_input_nodes)
    return _packet(node) in shape.VIEWS


def is_creation(node: Node) -> bool:
    """Whether the op makes a tensor of one value out of nothing."""
    return _packet(node) in create.SIZE_ARGUMENT


def is_positions(node: Node) -> bool:
    """Whether the values are positions made out of nothing."""
    return _packet(node) in create.POSITIONS


def is_matmul(node: Node) -> bool:
    packet = _packet(node)
    return packet in matmul.RULES or packet in permuted.GROUPED


def is_lookup(node: Node) -> bool:
    """Whether the op reads rows of a table by their indices."""
    return _packet(node) in index.LOOKUPS


def is_attention(node: Node) -> bool:
    return _packet(node) in attention.RULES


def is_pointwise(node: Node) -> bool:
    """Whether a code generator can fuse the op into its reader."""
    return isinstance(node.target, torch._ops.OpOverload) and _fuses(node.target)


@functools.cache  # asked for every node of a graph many times, and reading tags takes long
def _fuses(target: torch._ops.OpOverload) -> bool:
    tags = target.tags
    if torch.Tag.nondeterministic_seeded in tags:
        return False
    return torch.Tag.pointwise in tags or target.overloadpacket in pointwise.RULES


def is_gather(node: Node) -> bool:
    """Whether the op only reads values at given positions."""
    return _packet(node) in index.GATHERS


def is_reduction(node: Node) -> bool:
    return _packet(node) in reduce.RULES

"""Sums over one-hot rows are read off instead of added up.

Terms
    one-hot    along a dim, a value that is zero but for one element of every row: zeros into which
               one element per row was scattered, as a gather's backward does, and what a factor of
               the row, a change of type or a sign makes of such a value, or dims of size one that
               come and go.

The gradient of a softmax's logarithm subtracts ``softmax * gradient.sum(-1)``. Of a cross entropy
the gradient there is one-hot, so the sum is over a vocabulary of zeros: no memory, but in every row
one more pass over all columns, which no compiler takes out. A kernel written by hand never makes
it (Liger Kernel, Hsu et al. 2024).

The sum is the one element, to the bit: adding zeros rounds nothing. (Two things differ. The sum of
a row that is all zeros may be a zero of another sign. Where a factor is infinite the rest of its
row is no number, and so was the sum; here it is infinite.)

Not handled: several elements per row; rows of which only some are given an element; a gradient with
something added to all of it (label smoothing); a factor that differs within a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch.fx import Graph, Node
from torch.fx.node import Argument

from passes.axes import dims_kept, shape_of
from passes.copies import call_like, copy_graph
from passes.rules.arguments import argument, dim_of
from passes.source import packet_of

aten = torch.ops.aten
prims = torch.ops.prims

_SCATTERS = (aten.scatter, aten.scatter_add)
_VIEWS = (aten.view, aten._unsafe_view, aten.reshape)
_ONE_BY_ONE = (aten.neg, prims.convert_element_type)  # zero stays zero
_EXACT = 2**8  # integers up to here are exact in every floating-point type that sums are made in


@dataclass(frozen=True)
class _Step:
    """An op that makes one one-hot value of another."""

    node: Node
    dim: int  # along which its result is one-hot
    factor: Node | None = None  # of the row, if it is a product


@dataclass(frozen=True)
class _OneHot:
    """How a one-hot value was made."""

    scatter: Node
    steps: tuple[_Step, ...] = ()  # since, in order


def _rank(node: object) -> int:
    return len(shape_of(node) or ())


def _is_one_per_row(operand: object, node: Node, dim: int) -> bool:
    """Whether `operand` has the shape of `node` (dims of size one may be missing in front), but
    size one at `dim`."""
    whole, own = shape_of(node), shape_of(operand)
    if whole is None or own is None:
        return False
    whole[dim] = 1
    return [1] * (len(whole) - len(own)) + own == whole


def _is_zeros(node: object) -> bool:
    packet = packet_of(node) if isinstance(node, Node) else None
    if packet in (aten.full, aten.full_like):
        assert isinstance(node, Node)
        fill = argument(node, "fill_value")
        return not isinstance(fill, Node) and fill == 0
    return packet in (aten.zeros, aten.zeros_like)


def _is_one_hot_scatter(node: Node, dim: int) -> bool:
    """Whether one element of every row along `dim` goes into zeros."""
    if packet_of(node) not in _SCATTERS or argument(node, "reduce") is not None:
        return False
    rank = node.meta["val"].dim()
    if dim_of(node, rank) != dim or not _is_zeros(node.args[0]):
        return False
    elements = [one for one in (argument(node, "index"), argument(node, "src")) if one is not None]
    return all(_rank(one) == rank and _is_one_per_row(one, node, dim) for one in elements)


def _dim_before(node: Node, dim: int) -> int | None:
    """Which dim of its operand a dim of a reshape's result is, where all that comes and goes is
    dims of size one; None where it is not."""
    before, after = shape_of(node.all_input_nodes[0]), shape_of(node)
    assert before is not None
    assert after is not None
    kept = dims_kept(before, after) or {}
    return next((old for old, new in kept.items() if new == dim), None)


def _one_hot(node: Node, dim: int) -> _OneHot | None:
    """How a value that is one-hot along `dim` was made; None for any other."""
    if node.op != "call_function" or shape_of(node) is None:
        return None
    if _is_one_hot_scatter(node, dim):
        return _OneHot(node)
    packet, step = packet_of(node), _Step(node, dim)
    if packet in _VIEWS:
        before = _dim_before(node, dim)
        made = None if before is None else _one_hot(node.all_input_nodes[0], before)
    elif packet in _ONE_BY_ONE:
        made = _one_hot(node.all_input_nodes[0], dim)
    elif node.target is aten.mul.Tensor and len(node.all_input_nodes) == 2:
        operand, factor = node.all_input_nodes
        if not _is_one_per_row(factor, node, dim):
            operand, factor = factor, operand
        if not _is_one_per_row(factor, node, dim) or shape_of(operand) != shape_of(node):
            return None
        step, made = _Step(node, dim, factor), _one_hot(operand, dim)
    else:
        return None
    return made and _OneHot(made.scatter, (*made.steps, step))


def _can_be_read(made: _OneHot) -> bool:
    """Whether the elements are in the graph: a tensor, or a number that a factor is multiplied
    with."""
    number = argument(made.scatter, "value")
    if number is None:
        return True
    if not isinstance(number, (int, float)) or not abs(number) <= _EXACT or number != int(number):
        return False
    first = made.steps[0] if made.steps else None
    if first is None or first.factor is None:
        return False
    own, whole = first.factor.meta["val"], first.node.meta["val"]
    return own.dtype == whole.dtype and own.dim() == whole.dim()


def _of_sum(node: Node) -> tuple[_OneHot, int] | None:
    """The one-hot value that a sum adds up, and its dim along which it does."""
    if node.target is not aten.sum.dim_IntList:
        return None
    summed, dims = node.all_input_nodes[0], argument(node, "dim")
    if not (isinstance(dims, Sequence) and len(dims) == 1 and isinstance(dims[0], int)):
        return None
    value = summed.meta["val"]
    if not value.is_floating_point() or value.dtype != node.meta["val"].dtype:
        return None
    dim = dims[0] % max(1, value.dim())
    found = _one_hot(summed, dim)
    return None if found is None or not _can_be_read(found) else (found, dim)


def _one_at(node: Node, dim: int, copied: dict[Node, Node]) -> list[Argument]:
    """The sizes that a reshape asks for, with one at `dim`."""
    sizes = node.args[1]
    assert isinstance(sizes, (list, tuple))
    own = [copied[size] if isinstance(size, Node) else size for size in sizes]
    own[dim] = 1
    return own


def _elements(graph: Graph, copied: dict[Node, Node], made: _OneHot) -> Node:
    """The element of every row, with size one along the dim; made at the graph's insertion
    point."""
    source, number = argument(made.scatter, "src"), argument(made.scatter, "value")
    element: Argument = copied[source] if isinstance(source, Node) else cast("float", number)
    for step in made.steps:
        node = step.node
        args: tuple[Argument, ...] = (element, *node.args[1:])
        if step.factor is not None:
            args = (copied[step.factor], element)
        elif packet_of(node) in _VIEWS:
            args = (element, _one_at(node, step.dim, copied))
        element = call_like(graph, node, node.target, args, dict(node.kwargs))
    assert isinstance(element, Node)
    return element


def read_off_sums(graph: Graph) -> Graph:
    """A graph in which sums over one-hot rows are the rows' elements; `graph` itself if there are
    none.

    Args:
        graph: a functional aten graph; left as it is.
    """
    found = {node: one for node in graph.nodes if (one := _of_sum(node)) is not None}
    if not found:
        return graph
    new, copied = copy_graph(graph)
    for node, (made, dim) in found.items():
        with new.inserting_before(copied[node]):
            result = _elements(new, copied, made)
            if not argument(node, "keepdim"):
                result = call_like(new, node, aten.squeeze.dim, (result, dim), {})
        copied[node].replace_all_uses_with(result)
        new.erase_node(copied[node])
        copied[node] = result  # a factor of a later one, perhaps
    new.lint()
    return new

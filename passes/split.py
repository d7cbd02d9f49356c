"""The state of all nodes of a graph along one loop axis: who is split, who is a sum, how wide."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from passes import rules
from passes.axes import Axes
from passes.generated import RATIO, is_cheap
from passes.source import nbytes, op_name


@dataclass
class Split:
    """The state of all nodes along one loop axis."""

    axes: Axes
    axis: int
    length: int

    def __post_init__(self) -> None:
        self._known: dict[Node, str] = {}
        self._widths: dict[Node, float] = {}
        self._origins: dict[Node, float] = {}

    def status(self, node: Node) -> str:
        """``whole`` (does not touch the axis), ``split``, ``partial``, ``tally`` (counts that a
        chunk may use for itself), or why it cannot be chunked."""
        if node not in self._known:
            self._known[node] = self._status(node)
        return self._known[node]

    def _status(self, node: Node) -> str:
        role = self.axes.role(node, self.axis)
        if role == "absent" or (rules.is_creation(node) and not node.all_input_nodes):
            return "whole"  # a constant is made wherever it is read
        if self.axes.is_opaque(node):
            return f"{op_name(node)} has no rule for the loop axis"
        if role == "entangled" and node.target is rules.shape.cut:
            return "attention reads these positions as keys, all of them for every query"
        if role == "entangled":
            return f"{op_name(node)} mixes positions of the loop axis"
        if any(n > 1 for i in self.axes.operands(node) for n in self._counts(i)):
            return f"{op_name(node)} reads a tensor that has the loop axis twice"
        counts = self._counts(node)
        if role == "sum":
            return (
                "partial"
                if not any(counts)
                else f"{op_name(node)} sums over the loop axis and keeps it"
            )
        if role == "tally" and not any(counts):
            return "tally"
        if any(n != 1 and not self._sums(node, i, n) for i, n in enumerate(counts)):
            return f"{op_name(node)} drops the loop axis, or has it twice"
        return "split"

    def _sums(self, node: Node, output: int, count: int) -> bool:
        """Whether one of several outputs is a sum over the axis."""
        partial = self.axes.partial(node, output)
        return count == 0 and any(self.axis in product for product in partial)

    def _counts(self, node: Node) -> list[int]:
        """How often each of a node's output tensors has the axis, in its own order or another."""
        outputs, carriers = self.axes.output_dims(node), self.axes.carriers(self.axis)
        return [sum(a in carriers for p in d for a in p) for d in outputs if d is not None]

    def is_relative(self, node: Node) -> bool:
        """Whether the value is a chunk's own: outside the loop it says nothing."""
        return self.axes.is_relative(node, self.axis)

    def is_split(self, node: Node) -> bool:
        if node.op == "placeholder":
            return self.axes.axes(node).count(self.axis) == 1
        return node.op == "call_function" and self.status(node) == "split"

    def width(self, node: Node) -> float:
        if node not in self._widths:
            value = node.meta.get("val")
            values = value if isinstance(value, (tuple, list)) else (value,)
            self._widths[node] = sum(map(nbytes, values)) / self.length
        return self._widths[node]

    def width_as(self, node: Node, other: Node) -> float:
        """The width that the value would have if its floating-point type were at least as wide as
        another's: what is converted to a narrower type is no less of the same."""
        value, like = node.meta.get("val"), other.meta["val"]
        if not (isinstance(value, torch.Tensor) and value.is_floating_point()):
            return self.width(node)
        return self.width(node) * max(1, like.element_size() / value.element_size())

    def origin(self, node: Node) -> float:
        """The width of what a value is made from, if that is much narrower and the way cheap; else
        its own."""
        if node not in self._origins:
            own = self._origins[node] = self.width(node)
            if is_cheap(node):
                made = sum(
                    self.origin(i) if self.is_split(i) else self.width(i)
                    for i in node.all_input_nodes
                )
                if made * RATIO <= own:
                    self._origins[node] = made
        return self._origins[node]

    def is_generated(self, node: Node) -> bool:
        return is_cheap(node) and self.origin(node) < self.width(node)

"""Move a slice of a wide value to the narrow value that it is made from.

A loss that predicts the next token often cuts the logits: ``logits[:, :-1]``. The logits then exist
whole before the cut, and in the backward their gradient exists whole again, padded with zeros, so
no loop can keep them small. A slice commutes with every op that is parallel along the sliced axis,
and so does its backward, the zero padding, with every op that is also linear in the padded operand.
So the cut moves to the hidden state, and the padding to its gradient.

Terms
    sliced(x)    the value of ``x`` with the axis cut, computed from sliced operands instead of by
                 cutting ``x``.
    unpadded(x)  for a value ``x`` that is zero outside the cut: what is inside it.

Steps
    1. For every cut of a wide value along one axis: rebuild ``sliced`` of it, back to operands that
       are narrow.
    2. For every zero padding (``slice_scatter`` into zeros) along the same axis: rebuild its
       readers ``unpadded``; a sum over the axis needs no padding any more, a narrow value is padded
       at last.
    3. If the wide value is still needed as a whole, drop the attempt.

Not handled: symbolic sizes, steps other than one, an axis that shares its dim with another; such
slices stay where they are.

Source: the same motion that XLA's algebraic simplifier makes for slices of dots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from passes import rules
from passes.axes import Axes, analyze_axes
from passes.copies import call_like, copy_graph
from passes.linear import is_linear_in
from passes.liveness import tangent_nodes
from passes.regions import AMPLIFY
from passes.source import nbytes, packet_of

aten = torch.ops.aten


@dataclass(frozen=True)
class _Cut:
    axis: int
    start: int
    stop: int
    wide_bytes: int

    @property
    def size(self) -> int:
        return self.stop - self.start


def _static(node: Node) -> bool:
    values = [node.meta.get("val"), *(i.meta.get("val") for i in node.all_input_nodes)]
    return all(
        isinstance(v, torch.Tensor) and all(isinstance(s, int) for s in v.shape) for v in values
    )


def _bounds(node: Node, first: int, size: int) -> tuple[int, int, int] | None:
    """dim, start and stop of a slice-like call whose ``dim`` is argument `first`."""
    given = list(node.args[first:])
    dim, start, stop, step = (given + [0, None, None, 1][len(given) :])[:4]
    if not isinstance(dim, int) or step != 1:
        return None
    start, stop = start or 0, size if stop is None else stop
    if not isinstance(start, int) or not isinstance(stop, int):
        return None
    start, stop = (max(0, v + size) if v < 0 else min(v, size) for v in (start, stop))
    return dim, start, stop


class _Mover:
    def __init__(self, graph: Graph, axes: Axes) -> None:
        self.graph = graph
        self.axes = axes
        self.cache: dict[tuple[Node, _Cut], Node] = {}

    # -- building

    def sizes(self, node: Node, cut: _Cut) -> list[int]:
        """The node's shape with the axis cut."""
        table = self.axes.table
        shape: list[int] = []
        for product in self.axes.dims(node):
            total = 1
            for axis in product:
                size = cut.size if axis == cut.axis else table.sizes[axis]
                assert isinstance(size, int)
                total *= size
            shape.append(total)
        return shape

    def apart(self, node: Node, cut: _Cut) -> tuple[list[int], int]:
        """The shape with the axis in a dim of its own, and that dim."""
        shape: list[int] = []
        where = -1
        for product in self.axes.dims(node):
            if cut.axis not in product:
                shape.append(_length(self.axes, product))
                continue
            at = product.index(cut.axis)
            for part in (product[:at], (cut.axis,), product[at + 1 :]):
                if part == (cut.axis,):
                    where = len(shape)
                if part:
                    shape.append(_length(self.axes, part))
        return shape, where

    def rebuild(self, node: Node, operands: dict[Node, Node], cut: _Cut) -> Node:
        look = lambda n: operands.get(n, n)  # noqa: E731
        size_at = rules.size_argument(node)
        if rules.is_reshape(node):
            source = look(node.all_input_nodes[0])
            return call_like(
                self.graph, node, aten.reshape.default, (source, self.sizes(node, cut)), {}
            )
        args = list(torch.fx.map_arg(node.args, look))
        if size_at is not None:
            args[size_at] = self.sizes(node, cut)
        return call_like(
            self.graph, node, node.target, tuple(args), torch.fx.map_arg(dict(node.kwargs), look)
        )

    def movable(self, node: Node, cut: _Cut) -> bool:
        return (
            node.op == "call_function"
            and _static(node)
            and self.axes.role(node, cut.axis) == "parallel"
            and self.axes.axes(node).count(cut.axis) == 1
            and all(self.axes.axes(i).count(cut.axis) <= 1 for i in node.all_input_nodes)
        )

    def sliced(self, node: Node, cut: _Cut) -> Node:
        if cut.axis not in self.axes.axes(node):
            return node
        key = (node, cut)
        if key not in self.cache:
            narrow = nbytes(node.meta["val"]) * AMPLIFY < cut.wide_bytes
            if self.movable(node, cut) and (rules.is_view(node) or not narrow):
                operands = {i: self.sliced(i, cut) for i in node.all_input_nodes}
                self.cache[key] = self.rebuild(node, operands, cut)
            else:
                shape, dim = self.apart(node, cut)
                whole = call_like(self.graph, node, aten.reshape.default, (node, shape), {})
                piece = call_like(
                    self.graph, node, aten.slice.Tensor, (whole, dim, cut.start, cut.stop), {}
                )
                self.cache[key] = call_like(
                    self.graph, node, aten.reshape.default, (piece, self.sizes(node, cut)), {}
                )
        return self.cache[key]

    def padded(self, node: Node, inside: Node, cut: _Cut) -> Node:
        """`node`'s value from what is inside the cut."""
        shape, dim = self.apart(node, cut)
        value = node.meta["val"]
        like = {"dtype": value.dtype, "device": value.device}
        zeros = call_like(self.graph, node, aten.full.default, (shape, 0), dict(like))
        piece = call_like(
            self.graph,
            node,
            aten.reshape.default,
            (inside, [cut.size if i == dim else s for i, s in enumerate(shape)]),
            {},
        )
        whole = call_like(
            self.graph,
            node,
            aten.slice_scatter.default,
            (zeros, piece, dim, cut.start, cut.stop),
            {},
        )
        return call_like(self.graph, node, aten.reshape.default, (whole, list(value.shape)), {})

    # -- the two directions
    # --------------------------------------------------------------------------------------

    def forward(self, node: Node, cut: _Cut) -> None:
        with self.graph.inserting_before(node):
            node.replace_all_uses_with(self.sliced(node.all_input_nodes[0], cut))

    def backward(self, padding: Node, cut: _Cut) -> None:
        inside: dict[Node, Node] = {padding: padding.args[1]}  # type: ignore[dict-item]
        settled: set[Node] = set()  # readers that need the padding no more
        stop: set[Node] = set()  # narrow: padded again
        node = padding.next
        while node.op != "output":
            following = node.next
            sources = [i for i in node.all_input_nodes if i in inside and i not in stop]
            if sources and self.commutes(node, sources, cut):
                with self.graph.inserting_before(node):
                    operands = {
                        i: inside[i] if i in sources else self.sliced(i, cut)
                        for i in node.all_input_nodes
                    }
                    rebuilt = self.rebuild(node, operands, cut)
                settled.add(node)
                if self.axes.role(node, cut.axis) == "sum":
                    node.replace_all_uses_with(rebuilt)
                else:
                    inside[node] = rebuilt
                    if nbytes(node.meta["val"]) * AMPLIFY < nbytes(
                        padding.meta["val"]
                    ) and not rules.is_view(node):
                        stop.add(node)
            node = following
        for old, new in inside.items():
            readers = [u for u in old.users if u not in settled]
            if old is padding or not readers:
                continue
            with self.graph.inserting_before(old.next):
                whole = self.padded(old, new, cut)
            for reader in readers:
                if reader is not whole and reader not in _between(old, whole):
                    reader.replace_input_with(old, whole)

    def commutes(self, node: Node, sources: list[Node], cut: _Cut) -> bool:
        role = self.axes.role(node, cut.axis)
        if node.op != "call_function" or role not in ("parallel", "sum") or not _static(node):
            return False
        if any(self.axes.axes(i).count(cut.axis) > 1 for i in (node, *node.all_input_nodes)):
            return False
        return len(sources) == 1 and is_linear_in(sources[0], [node])


def _between(first: Node, last: Node) -> set[Node]:
    found: set[Node] = set()
    node = first.next
    while node is not last:
        found.add(node)
        node = node.next
    return found


def _length(axes: Axes, product: tuple[int, ...]) -> int:
    size = axes.table.size(product)
    assert isinstance(size, int)
    return size


def _may_move(node: Node, tangent: set[Node], min_bytes: int) -> bool:
    """What can be told without axes: fixed sizes, large, really cut, and the only forward
    reader."""
    if not _static(node) or nbytes(node.meta["val"]) < min_bytes or node in tangent:
        return False
    source = node.all_input_nodes[0]
    if source.op == "placeholder" or source.meta["val"].shape == node.meta["val"].shape:
        return False
    # where the whole is needed too (the halves of a rotary embedding), nothing is gained
    return all(u is node or u in tangent for u in source.users)


def _cut_of(node: Node, axes: Axes, tangent: set[Node], min_bytes: int) -> _Cut | None:
    """The cut that a ``slice`` makes, if it is one that can move."""
    if packet_of(node) is not aten.slice or not _may_move(node, tangent, min_bytes):
        return None
    source = node.all_input_nodes[0]
    bounds = _bounds(node, 1, source.meta["val"].shape[node.args[1]] if len(node.args) > 1 else 0)  # type: ignore[index]
    if bounds is None:
        return None
    product = axes.dims(source)[bounds[0]]
    if len(product) != 1 or axes.dims(node) == axes.dims(source):
        return None
    return _Cut(product[0], bounds[1], bounds[2], nbytes(node.meta["val"]))


def _padding_of(node: Node, axes: Axes, cut: _Cut) -> bool:
    """Whether a node pads with zeros exactly what the cut cut off."""
    if packet_of(node) is not aten.slice_scatter or not _static(node):
        return False
    base = node.args[0]
    if not (isinstance(base, Node) and rules.is_creation(base) and base.args[1:2] == (0,)):
        return False
    dim = node.args[2] if len(node.args) > 2 else 0
    bounds = _bounds(node, 2, node.meta["val"].shape[dim])  # type: ignore[index]
    return (
        bounds is not None
        and axes.dims(node)[bounds[0]] == (cut.axis,)
        and bounds[1:] == (cut.start, cut.stop)
    )


def move_slices(graph: Graph, *, min_bytes: int) -> Graph:
    """A graph in which cuts of wide values have moved to what these are made from; `graph` itself
    if there are none.

    Args:
        graph: a functional aten graph; left as it is.
        min_bytes: smallest cut value that is worth moving.
    """
    tangent = tangent_nodes(graph)
    slices = graph.find_nodes(op="call_function", target=aten.slice.Tensor)
    if not any(_may_move(n, tangent, min_bytes) for n in slices):
        return graph
    current = graph
    moved: set[str] = set()
    while True:
        trial, _ = copy_graph(current)
        axes, tangent = analyze_axes(trial, rules.find_rule), tangent_nodes(trial)
        found = next(
            (
                (n, cut)
                for n in trial.nodes
                if n.op == "call_function"
                and n.name not in moved
                and (cut := _cut_of(n, axes, tangent, min_bytes)) is not None
            ),
            None,
        )
        if found is None:
            return current
        node, cut = found
        moved.add(node.name)
        wide = node.all_input_nodes[0]
        while rules.is_view(wide) and wide.all_input_nodes:
            wide = wide.all_input_nodes[0]
        mover = _Mover(trial, axes)
        if not mover.movable(wide, cut):
            continue
        mover.forward(node, cut)
        for padding in [
            n for n in trial.nodes if n.op == "call_function" and _padding_of(n, axes, cut)
        ]:
            mover.backward(padding, cut)
        name = wide.name
        trial.eliminate_dead_code()
        if all(n.name != name for n in trial.nodes):
            trial.lint()
            current = trial

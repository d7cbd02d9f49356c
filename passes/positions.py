"""What the values of a graph are at every position, as far as that follows from positions.

`Prover` walks from a value to what it is made from, and says which of the kinds of `passes.forms`
it is at coordinates (.., i, j). An op that is not known here, or a value that is read from an
input, ends the proof.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch.fx import Node

from passes.axes import Size, as_size
from passes.forms import (
    Choice,
    Condition,
    Linear,
    Value,
    add,
    choose,
    compare,
    condition_of,
    conjunction,
    false,
    holds_always,
    is_constant,
    is_exact,
    moved,
    multiply,
    negated,
    number_of,
    reads,
    shifted,
)
from passes.rules import shape
from passes.rules.arguments import argument, dim_of
from passes.source import packet_of

aten = torch.ops.aten
prims = torch.ops.prims

# Ops that make a tensor of one value: the position of the value, or what it is.
_CONSTANTS: dict[object, int | Callable[[Node], int]] = {
    aten.full: 1,
    aten.new_full: 2,
    aten.full_like: 1,
    aten.scalar_tensor: 0,
    aten.zeros: lambda node: 0,
    aten.zeros_like: lambda node: 0,
    aten.new_zeros: lambda node: 0,
    aten.ones: lambda node: 1,
    aten.ones_like: lambda node: 1,
    aten.new_ones: lambda node: 1,
}


def _constant_of(node: Node, number: object) -> Value | None:
    """The value of a tensor that is `number` everywhere."""
    if isinstance(number, (int, float)) and node.meta["val"].dtype is torch.bool:
        number = bool(number)
    return number_of(number)


def _fits(number: object, node: Node) -> bool:
    """Whether a number is itself in the integer dtypes of an op's operands, which it is cast to."""
    if not isinstance(number, int):
        return True
    values = [operand.meta["val"] for operand in node.all_input_nodes]
    dtypes = {value.dtype for value in values if isinstance(value, torch.Tensor)} - {torch.bool}
    if any(dtype.is_floating_point or dtype.is_complex for dtype in dtypes):
        return True
    bounds = [torch.iinfo(dtype) for dtype in dtypes]
    return all(b.min <= number <= b.max for b in bounds)


class Prover:
    """What every value is, at the coordinates of its own dims."""

    def __init__(self) -> None:
        self.known: dict[Node, Value | None] = {}

    def value(self, arg: object) -> Value | None:
        if not isinstance(arg, Node):
            return number_of(arg)
        if arg not in self.known:
            self.known[arg] = None  # while it is looked at
            made = self.made(arg)
            if made is not None:
                sizes = tuple(as_size(s) for s in arg.meta["val"].shape)
                if isinstance(made, Linear) and not is_exact(made, arg.meta["val"].dtype, sizes):
                    return None
                # a dim of size one has one coordinate, zero, and keeps it where it is stretched
                made = moved(made, lambda dim: -1 if sizes[dim] == 1 else dim)
            self.known[arg] = made
        return self.known[arg]

    def varies(self, node: Node) -> frozenset[int] | None:
        """The dims along which a value differs; None for one that is not known."""
        value = self.value(node)
        if value is None:
            return None
        if isinstance(value, Choice):
            value = value.condition
        forms: frozenset[Linear] = frozenset()
        if isinstance(value, Linear):
            forms = frozenset({value})
        elif isinstance(value, Condition):
            sizes = tuple(as_size(size) for size in node.meta["val"].shape)
            forms = frozenset(f for f in value.forms if not holds_always(f, sizes))
        return frozenset(dim for form in forms for dim, _ in form.factors)

    def operand(self, node: Node, position: int) -> Value | None:
        """An operand of a pointwise op, at the coordinates of the result."""
        arg = node.args[position]
        value = self.value(arg)
        if not isinstance(arg, Node):
            return value if _fits(arg, node) else None
        if value is None:
            return None
        lead = node.meta["val"].dim() - arg.meta["val"].dim()
        return moved(value, lambda dim: dim + lead)

    def made(self, node: Node) -> Value | None:
        if node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor):
            return None
        packet = packet_of(node)
        if node.target is shape.BITCAST:
            return None
        name = getattr(packet, "__name__", "")
        if packet in (prims.iota, aten.arange):
            return self.positions(node)
        if packet in _CONSTANTS:
            given = _CONSTANTS[packet]
            return _constant_of(node, node.args[given] if isinstance(given, int) else given(node))
        if packet in (aten.triu, aten.tril):
            return self.triangle(node, packet is aten.triu)
        if packet is aten.slice or packet in shape.SIZE_ARGUMENT or packet in shape.RESHAPES:
            return self.viewed(node)
        if packet in (aten.permute, aten.transpose, aten.t):
            return self.permuted(node)
        if packet in (aten.alias, aten.detach, aten.clone, aten.lift_fresh_copy):
            return self.operand(node, 0)
        if packet in (prims.convert_element_type, aten._to_copy):
            return self.converted(node)
        if name in ("le", "lt", "ge", "gt", "eq", "ne"):
            return compare(name, self.operand(node, 0), self.operand(node, 1))
        if packet is aten.cat:
            return self.joined(node)
        if packet is aten.cumsum:
            return self.summed(node)
        if packet is aten.index:
            value = self.value(node.args[0])  # a constant is the same wherever it is read
            return value if is_constant(value) else None
        if name in ("add", "sub") and not node.kwargs:
            return add(
                self.operand(node, 0), self.operand(node, 1), times=1 if name == "add" else -1
            )
        if packet is aten.mul:
            return multiply(self.operand(node, 0), self.operand(node, 1))
        if packet in (aten.bitwise_and, aten.logical_and):
            return conjunction(self.operand(node, 0), self.operand(node, 1))
        if packet in (aten.bitwise_not, aten.logical_not):
            return negated(self.operand(node, 0))
        if packet is aten.where and len(node.args) == 3:
            return choose(*(self.operand(node, i) for i in range(3)))
        if packet is aten.masked_fill:
            return choose(self.operand(node, 1), self.operand(node, 2), self.operand(node, 0))
        return None

    def positions(self, node: Node) -> Value | None:
        if node.meta["val"].is_floating_point():
            return None
        if packet_of(node) is aten.arange:
            start, step = argument(node, "start"), argument(node, "step")
            start, step = (0 if start is None else start), (1 if step is None else step)
        else:
            start, step = node.kwargs["start"], node.kwargs["step"]
        if type(start) is not int or type(step) is not int:
            return None
        return Linear.of({0: step}, start)

    def triangle(self, node: Node, upper: bool) -> Value | None:
        """The upper (``column - row >= diagonal``) or lower triangle, zero elsewhere."""
        diagonal = argument(node, "diagonal")
        if type(diagonal) is not int:
            return None
        rank = node.meta["val"].dim()
        form = Linear.of({rank - 1: 1, rank - 2: -1}, -diagonal)
        kept = condition_of(form if upper else form.scaled(-1))
        return choose(kept, self.operand(node, 0), _constant_of(node, 0))

    def joined(self, node: Node) -> Value | None:
        """``cat``: one linear form that all the pieces agree with, where they are. The size of the
        last may be open."""
        parts = node.args[0]
        assert isinstance(parts, (list, tuple))
        dim = dim_of(node, node.meta["val"].dim())
        pieces: list[tuple[int, Size, Linear]] = []
        start: Size = 0
        for part in parts:
            assert isinstance(part, Node)
            value, size = self.value(part), as_size(part.meta["val"].shape[dim])
            if not isinstance(value, Linear) or not isinstance(start, int):
                return None
            pieces.append((start, size, value))
            start = start + size
        # one that is longer than one position says what the others have to agree with
        first, _, form = next((p for p in reversed(pieces) if p[1] != 1), pieces[-1])
        whole = shifted(form, dim, -first)
        assert isinstance(whole, Linear)
        for start, size, value in pieces:
            here = shifted(whole, dim, start)
            if size == 1:
                here = moved(here, lambda d: -1 if d == dim else d)
            if here != value:
                return None
        return whole

    def summed(self, node: Node) -> Value | None:
        """``cumsum`` of nothing but zeros."""
        value = self.value(node.args[0])
        zero = Linear.of({}, 0)
        return zero if value in (false(), zero) else None

    def converted(self, node: Node) -> Value | None:
        value, source = self.operand(node, 0), node.args[0]
        assert isinstance(source, Node)
        old, new = source.meta["val"].dtype, node.meta["val"].dtype
        if old == new:
            return value
        if isinstance(value, Linear) and not new.is_floating_point and new is not torch.bool:
            # positions fit any integer type that is used for them but the smallest
            return value if new in (torch.int64, torch.int32) else None
        if isinstance(value, Choice) and new.is_floating_point:
            low = torch.finfo(new).min
            kept = [c for c in (value.yes, value.no) if c == 0 or c == -torch.inf or c >= low]
            return value if len(kept) == 2 else None
        return None

    def viewed(self, node: Node) -> Value | None:
        """Dims of size one come and go, stretched ones repeat; a slice starts somewhere."""
        source = node.args[0]
        assert isinstance(source, Node)
        if _undoes_padding(node, source):
            return self.value(source.args[0])
        value = self.value(source)
        if value is None or isinstance(value, float):
            return value
        before, after = source.meta["val"].shape, node.meta["val"].shape
        packet = packet_of(node)
        if packet is aten.slice:
            start, step = argument(node, "start"), argument(node, "step")
            dim = dim_of(node, len(before))
            if step == 1 and isinstance(start, int) and start >= 0:
                return shifted(value, dim, start)
            return value if (start is None and step == 1) or not reads(value, dim) else None
        if packet in shape.SIZE_ARGUMENT:  # expand: from the right
            lead = len(after) - len(before)
            return moved(value, lambda dim: dim + lead)
        old = [d for d, size in enumerate(before) if as_size(size) != 1]
        new = [d for d, size in enumerate(after) if as_size(size) != 1]
        if [as_size(before[d]) for d in old] != [as_size(after[d]) for d in new]:
            return None
        places = dict(zip(old, new, strict=True))
        return moved(value, lambda dim: places.get(dim, -1))

    def permuted(self, node: Node) -> Value | None:
        source = node.args[0]
        assert isinstance(source, Node)
        value, rank = self.value(source), source.meta["val"].dim()
        order = list(range(rank))
        packet = packet_of(node)
        if packet is aten.permute:
            dims = argument(node, "dims")
            assert isinstance(dims, (list, tuple))
            order = [operator.index(d) % rank for d in dims]
        elif packet is aten.transpose:
            first, second = dim_of(node, rank, "dim0"), dim_of(node, rank, "dim1")
            order[first], order[second] = second, first
        else:
            order.reverse()
        return None if value is None else moved(value, order.index)


def _undoes_padding(node: Node, source: Node) -> bool:
    """Whether a slice takes off what was padded at the end, as attention kernels that want aligned
    masks have it."""
    if packet_of(node) is not aten.slice:
        return False
    if packet_of(source) is not aten.constant_pad_nd:
        return False
    start, step, padding = (
        argument(node, "start"),
        argument(node, "step"),
        argument(source, "pad"),
    )
    assert isinstance(padding, (list, tuple))
    inner = source.args[0]
    assert isinstance(inner, Node)
    sizes = [[as_size(s) for s in n.meta["val"].shape] for n in (node, inner)]
    return (
        start in (None, 0)
        and step == 1
        and sizes[0] == sizes[1]
        and all(isinstance(n, int) and n >= 0 for n in padding)
        and not any(padding[::2])  # nothing before the first
    )

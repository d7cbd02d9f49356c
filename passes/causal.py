"""Attention masks that the graph proves to be causal become attention's own `is_causal`.

Models build a mask of tokens x tokens from comparisons of positions, and attention then reads it: a
value that grows with the square of the length, that all layers keep alive, and that keeps attention
off the kernel which skips what is masked.

Terms
    linear form  an integer that is a sum of multiples of the coordinates of its position, and a
                 constant: ``arange`` and what is added to, subtracted from or multiplied with it.
    condition    a conjunction of inequalities ``linear form >= 0``: what comparing linear forms
                 gives.
    choice       one constant where a condition holds, another one elsewhere.

Algorithm
    1. For every attention call with a mask, and for its backward, walk from the mask to what it is
       made from, and say for every value which of the three it is at coordinates (.., i, j). An op
       that is not known here, or a value that is read from an input, ends the proof.
    2. Inequalities that hold for all coordinates (a window wider than the sequence) are dropped.
    3. If what is left is ``i - j >= 0``, queries and keys are equally many, and the mask is 0 where
       it holds and minus infinity (or the dtype's lowest number) elsewhere, the call gets
       `is_causal` and no mask. If nothing is left, it gets no mask.

Not handled: masks that depend on data (padding: `passes.padding`; packed documents), windows
shorter than the sequence, attention written out as matrix products.

Source: the meaning of `is_causal` is the documented one of
    `torch.nn.functional.scaled_dot_product_attention`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from passes.axes import Size, as_size
from passes.copies import copy_graph
from passes.records import Rewrite
from passes.rules import shape
from passes.rules.arguments import argument, dim_of
from passes.source import nbytes, op_name, packet_of, source_of

aten = torch.ops.aten
prims = torch.ops.prims

# Attention ops that take a mask and can be told that it is causal: the mask's argument.
_ATTENTION: dict[object, str] = {
    aten._scaled_dot_product_flash_attention_for_cpu: "attn_mask",
    aten._scaled_dot_product_flash_attention_for_cpu_backward: "attn_mask",
    aten._scaled_dot_product_efficient_attention: "attn_bias",
    aten._scaled_dot_product_efficient_attention_backward: "attn_bias",
    aten._scaled_dot_product_cudnn_attention: "attn_bias",
    aten._scaled_dot_product_cudnn_attention_backward: "attn_bias",
}


@dataclass(frozen=True)
class _Linear:
    """``constant + sum of factor * coordinate``."""

    factors: frozenset[tuple[int, int]]  # (dim, factor), factors not zero
    constant: int

    @staticmethod
    def of(factors: Mapping[int, int], constant: int) -> _Linear:
        return _Linear(frozenset((d, f) for d, f in factors.items() if f), constant)

    def plus(self, other: _Linear, times: int = 1) -> _Linear:
        factors = dict(self.factors)
        for dim, factor in other.factors:
            factors[dim] = factors.get(dim, 0) + times * factor
        return _Linear.of(factors, self.constant + times * other.constant)

    def scaled(self, by: int) -> _Linear:
        return _Linear.of({d: f * by for d, f in self.factors}, self.constant * by)


@dataclass(frozen=True)
class _Condition:
    """All of these linear forms are at least zero."""

    forms: frozenset[_Linear]


@dataclass(frozen=True)
class _Choice:
    """`yes` where the condition holds, `no` elsewhere."""

    condition: _Condition
    yes: float
    no: float


_Value = _Linear | _Condition | _Choice | float  # a float is a constant that is no integer
_ALWAYS = _Condition(frozenset())


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


def _constant_of(node: Node, number: object) -> _Value | None:
    """The value of a tensor that is `number` everywhere."""
    if isinstance(number, (int, float)) and node.meta["val"].dtype is torch.bool:
        number = bool(number)
    return _number(number)


def _compare(name: str, left: _Value | None, right: _Value | None) -> _Condition | None:
    if not isinstance(left, _Linear) or not isinstance(right, _Linear):
        return None
    up, down = right.plus(left, -1), left.plus(right, -1)
    form = {
        "le": up,
        "lt": up.plus(_Linear.of({}, -1)),
        "ge": down,
        "gt": down.plus(_Linear.of({}, -1)),
        "eq": up,
        "ne": up,
    }[name]
    if name == "eq" and up.factors:
        return _Condition(_condition(up).forms | _condition(down).forms)
    if name in ("eq", "ne"):
        if up.factors:
            return None  # not equal: above or below
        return _ALWAYS if (up.constant == 0) == (name == "eq") else _false()
    return _condition(form)


def _condition(form: _Linear) -> _Condition:
    """``form >= 0``, in lowest terms: coordinates are whole numbers."""
    divisor = math.gcd(*(f for _, f in form.factors))
    if divisor > 1:
        factors = {d: f // divisor for d, f in form.factors}
        form = _Linear.of(factors, form.constant // divisor)
    return _Condition(frozenset({form}))


def _not(value: _Value | None) -> _Condition | None:
    if not isinstance(value, _Condition) or len(value.forms) != 1:
        return None  # the opposite of a conjunction is none
    (form,) = value.forms
    return _condition(form.scaled(-1).plus(_Linear.of({}, -1)))


def _and(left: _Value | None, right: _Value | None) -> _Condition | None:
    if isinstance(left, _Condition) and isinstance(right, _Condition):
        return _Condition(left.forms | right.forms)
    return None


def _constant(value: _Value | None) -> float | None:
    """The number behind a constant."""
    if isinstance(value, float):
        return value
    if isinstance(value, _Linear) and not value.factors:
        return float(value.constant)
    return None


def _where(condition: _Value | None, yes: _Value | None, no: _Value | None) -> _Value | None:
    if not isinstance(condition, _Condition):
        return None
    if no == _false() and isinstance(yes, _Condition):
        return _and(condition, yes)
    if yes == _false() and no == _ALWAYS:
        return _not(condition)
    a, b = _constant(yes), _constant(no)
    return None if a is None or b is None else _Choice(condition, a, b)


def _false() -> _Condition:
    return _Condition(frozenset({_Linear.of({}, -1)}))


def _number(value: object) -> _Value | None:
    if isinstance(value, bool):
        return _ALWAYS if value else _false()
    if isinstance(value, int):
        return _Linear.of({}, value)
    return value if isinstance(value, float) else None


def _add(left: _Value | None, right: _Value | None, times: int = 1) -> _Value | None:
    if isinstance(left, _Linear) and isinstance(right, _Linear):
        return left.plus(right, times)
    return None


def _multiply(left: _Value | None, right: _Value | None) -> _Value | None:
    if isinstance(left, _Condition) and isinstance(right, _Condition):
        return _and(left, right)
    for one, other in ((left, right), (right, left)):
        if isinstance(one, _Linear) and isinstance(other, _Linear) and not other.factors:
            return one.scaled(other.constant)
    return None


def _is_exact(form: _Linear, dtype: torch.dtype) -> bool:
    """Whether a dtype holds all values: small integers wrap, and floats round."""
    if form.factors:
        return dtype in (torch.int64, torch.int32)
    try:
        return torch.tensor(form.constant, dtype=dtype).item() == form.constant
    except RuntimeError:  # does not fit
        return False


class Prover:
    """What every value is, at the coordinates of its own dims."""

    def __init__(self) -> None:
        self.known: dict[Node, _Value | None] = {}

    def value(self, arg: object) -> _Value | None:
        if not isinstance(arg, Node):
            return _number(arg)
        if arg not in self.known:
            self.known[arg] = None  # while it is looked at
            made = self.made(arg)
            if isinstance(made, _Linear) and not _is_exact(made, arg.meta["val"].dtype):
                made = None
            if made is not None:
                # a dim of size one has one coordinate, zero, and keeps it where it is stretched
                sizes = [as_size(s) for s in arg.meta["val"].shape]
                made = _moved(made, lambda dim: -1 if sizes[dim] == 1 else dim)
            self.known[arg] = made
        return self.known[arg]

    def varies(self, node: Node) -> frozenset[int] | None:
        """The dims along which a value differs; None for one that is not known."""
        value = self.value(node)
        if value is None:
            return None
        if isinstance(value, _Choice):
            value = value.condition
        forms: frozenset[_Linear] = frozenset()
        if isinstance(value, _Linear):
            forms = frozenset({value})
        elif isinstance(value, _Condition):
            sizes = tuple(as_size(size) for size in node.meta["val"].shape)
            forms = frozenset(f for f in value.forms if not _holds_always(f, sizes))
        return frozenset(dim for form in forms for dim, _ in form.factors)

    def operand(self, node: Node, position: int) -> _Value | None:
        """An operand of a pointwise op, at the coordinates of the result."""
        arg = node.args[position]
        value = self.value(arg)
        if not isinstance(arg, Node) or value is None:
            return value
        lead = node.meta["val"].dim() - arg.meta["val"].dim()
        return _moved(value, lambda dim: dim + lead)

    def made(self, node: Node) -> _Value | None:
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
            return _compare(name, self.operand(node, 0), self.operand(node, 1))
        if packet is aten.cat:
            return self.joined(node)
        if packet is aten.cumsum:
            return self.summed(node)
        if packet is aten.index:
            value = self.value(node.args[0])  # a constant is the same wherever it is read
            return value if _is_constant(value) else None
        if name in ("add", "sub") and not node.kwargs:
            return _add(
                self.operand(node, 0), self.operand(node, 1), times=1 if name == "add" else -1
            )
        if packet is aten.mul:
            return _multiply(self.operand(node, 0), self.operand(node, 1))
        if packet in (aten.bitwise_and, aten.logical_and):
            return _and(self.operand(node, 0), self.operand(node, 1))
        if packet in (aten.bitwise_not, aten.logical_not):
            return _not(self.operand(node, 0))
        if packet is aten.where and len(node.args) == 3:
            return _where(*(self.operand(node, i) for i in range(3)))
        if packet is aten.masked_fill:
            return _where(self.operand(node, 1), self.operand(node, 2), self.operand(node, 0))
        return None

    def positions(self, node: Node) -> _Value | None:
        if node.meta["val"].is_floating_point():
            return None
        if packet_of(node) is aten.arange:
            start, step = argument(node, "start"), argument(node, "step")
            start, step = (0 if start is None else start), (1 if step is None else step)
        else:
            start, step = node.kwargs["start"], node.kwargs["step"]
        if type(start) is not int or type(step) is not int:
            return None
        return _Linear.of({0: step}, start)

    def triangle(self, node: Node, upper: bool) -> _Value | None:
        """The upper (``column - row >= diagonal``) or lower triangle, zero elsewhere."""
        diagonal = argument(node, "diagonal")
        if type(diagonal) is not int:
            return None
        rank = node.meta["val"].dim()
        form = _Linear.of({rank - 1: 1, rank - 2: -1}, -diagonal)
        kept = _condition(form if upper else form.scaled(-1))
        return _where(kept, self.operand(node, 0), _constant_of(node, 0))

    def joined(self, node: Node) -> _Value | None:
        """``cat``: one linear form that all the pieces agree with, where they are. The size of the
        last may be open."""
        parts = node.args[0]
        assert isinstance(parts, (list, tuple))
        dim = dim_of(node, node.meta["val"].dim())
        pieces: list[tuple[int, Size, _Linear]] = []
        start: Size = 0
        for part in parts:
            assert isinstance(part, Node)
            value, size = self.value(part), as_size(part.meta["val"].shape[dim])
            if not isinstance(value, _Linear) or not isinstance(start, int):
                return None
            pieces.append((start, size, value))
            start = start + size
        # one that is longer than one position says what the others have to agree with
        first, _, form = next((p for p in reversed(pieces) if p[1] != 1), pieces[-1])
        whole = _shifted(form, dim, -first)
        assert isinstance(whole, _Linear)
        for start, size, value in pieces:
            here = _shifted(whole, dim, start)
            if size == 1:
                here = _moved(here, lambda d: -1 if d == dim else d)
            if here != value:
                return None
        return whole

    def summed(self, node: Node) -> _Value | None:
        """``cumsum`` of nothing but zeros."""
        value = self.value(node.args[0])
        zero = _Linear.of({}, 0)
        return zero if value in (_false(), zero) else None

    def converted(self, node: Node) -> _Value | None:
        value, source = self.operand(node, 0), node.args[0]
        assert isinstance(source, Node)
        old, new = source.meta["val"].dtype, node.meta["val"].dtype
        if old == new:
            return value
        if isinstance(value, _Linear) and not new.is_floating_point and new is not torch.bool:
            # positions fit any integer type that is used for them but the smallest
            return value if new in (torch.int64, torch.int32) else None
        if isinstance(value, _Choice) and new.is_floating_point:
            low = torch.finfo(new).min
            kept = [c for c in (value.yes, value.no) if c == 0 or c == -torch.inf or c >= low]
            return value if len(kept) == 2 else None
        return None

    def viewed(self, node: Node) -> _Value | None:
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
                return _shifted(value, dim, start)
            return value if (start is None and step == 1) or not _reads(value, dim) else None
        if packet in shape.SIZE_ARGUMENT:  # expand: from the right
            lead = len(after) - len(before)
            return _moved(value, lambda dim: dim + lead)
        old = [d for d, size in enumerate(before) if as_size(size) != 1]
        new = [d for d, size in enumerate(after) if as_size(size) != 1]
        if [as_size(before[d]) for d in old] != [as_size(after[d]) for d in new]:
            return None
        places = dict(zip(old, new, strict=True))
        return _moved(value, lambda dim: places.get(dim, -1))

    def permuted(self, node: Node) -> _Value | None:
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
        return None if value is None else _moved(value, order.index)


def _shifted(value: _Value, dim: int, by: int) -> _Value:
    """The value as seen from `by` positions further along a dim."""

    def linear(form: _Linear) -> _Linear:
        factor = dict(form.factors).get(dim, 0)
        return form.plus(_Linear.of({}, factor * by))

    if isinstance(value, _Linear):
        return linear(value)
    if isinstance(value, _Condition):
        return _Condition(frozenset(map(linear, value.forms)))
    if isinstance(value, _Choice):
        forms = frozenset(map(linear, value.condition.forms))
        return _Choice(_Condition(forms), value.yes, value.no)
    return value


def _is_constant(value: _Value | None) -> bool:
    """Whether a value is the same at all positions."""
    if isinstance(value, _Linear):
        return not value.factors
    if isinstance(value, _Condition):
        return not any(form.factors for form in value.forms)
    return isinstance(value, float)


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


def _moved(value: _Value, place: Callable[[int], int]) -> _Value | None:
    """The same value with its dims at other places; a place below zero is a dim of size one, whose
    coordinate is zero."""

    def linear(form: _Linear) -> _Linear:
        moved = {place(d): f for d, f in form.factors}
        return _Linear.of({d: f for d, f in moved.items() if d >= 0}, form.constant)

    if isinstance(value, _Linear):
        return linear(value)
    if isinstance(value, _Condition):
        return _Condition(frozenset(map(linear, value.forms)))
    if isinstance(value, _Choice):
        return _Choice(
            _Condition(frozenset(map(linear, value.condition.forms))), value.yes, value.no
        )
    return value


def _reads(value: _Value, dim: int) -> bool:
    """Whether a value depends on a coordinate."""
    if isinstance(value, _Choice):
        value = value.condition
    forms = value.forms if isinstance(value, _Condition) else {value}
    return any(isinstance(f, _Linear) and dim in dict(f.factors) for f in forms)


def _holds_always(form: _Linear, sizes: tuple[object, ...]) -> bool:
    """Whether an inequality holds at all coordinates of a tensor."""
    least = form.constant
    for dim, factor in form.factors:
        size = sizes[dim]
        if factor < 0:
            if not isinstance(size, int):
                return False
            least += factor * (size - 1)
    return least >= 0


def _lowest(value: float, dtype: torch.dtype) -> bool:
    return value == -torch.inf or value == torch.finfo(dtype).min


def _is_causal(mask: Node, prover: Prover) -> bool | None:
    """True for a causal mask, False for one that masks nothing, None for what is neither."""
    value, found = mask.meta["val"], prover.value(mask)
    if isinstance(found, _Choice) and value.is_floating_point():
        condition: _Value | None = None
        if found.yes == 0 and _lowest(found.no, value.dtype):
            condition = found.condition
        elif found.no == 0 and _lowest(found.yes, value.dtype):
            condition = _not(found.condition)
    else:
        condition = found if value.dtype is torch.bool else None
    if not isinstance(condition, _Condition) or value.dim() < 2:
        return None
    sizes = tuple(as_size(s) for s in value.shape)
    forms = {f for f in condition.forms if not _holds_always(f, sizes)}
    queries, keys = value.dim() - 2, value.dim() - 1
    if not forms:
        return False
    return True if forms == {_Linear.of({queries: 1, keys: -1}, 0)} else None


def _as_many_queries_as_keys(node: Node) -> bool:
    queries, keys = (argument(node, name) for name in ("query", "key"))
    assert isinstance(queries, Node)
    assert isinstance(keys, Node)
    return as_size(queries.meta["val"].shape[-2]) == as_size(keys.meta["val"].shape[-2])


def attention_mask(node: Node) -> Node | None:
    """The mask that an attention call reads and may do without."""
    name = _ATTENTION.get(packet_of(node))
    if name is None or node.op != "call_function":
        return None
    mask = argument(node, name)
    if not isinstance(mask, Node) or argument(node, "is_causal"):
        return None
    wanted = argument(node, "grad_input_mask")
    if isinstance(wanted, (list, tuple)) and wanted[-1]:
        return None  # the mask's own gradient
    return mask


def set_mask(call: Node, mask: Node | None) -> None:
    """Give an attention call another mask."""
    _set_argument(call, _ATTENTION[packet_of(call)], mask)


def _set_argument(node: Node, name: str, value: bool | Node | None) -> None:
    """Give an argument of a call another value, by position or by name as the schema has it."""
    assert isinstance(node.target, torch._ops.OpOverload)
    described = node.target._schema.arguments
    position = next(i for i, a in enumerate(described) if a.name == name)
    if position < len(node.args):
        node.update_arg(position, value)
    elif described[position].kwarg_only or name in node.kwargs:
        node.update_kwarg(name, value)
    else:
        given = [*node.args, *(a.default_value for a in described[len(node.args) : position])]
        node.args = (*given, value)


def drop_causal_masks(graph: Graph, *, min_bytes: int) -> tuple[Graph, tuple[Rewrite, ...]]:
    """A graph whose attention does without masks that it can do without, and what was done; `graph`
    itself if there are none.

    Args:
        graph: a functional aten graph; left as it is.
        min_bytes: smallest mask that is worth it.
    """
    prover = Prover()
    found: dict[str, bool] = {}
    rewrites: dict[Node, Rewrite] = {}
    for node in graph.nodes:
        mask = attention_mask(node)
        if mask is None or nbytes(mask.meta["val"]) < min_bytes:
            continue
        causal = _is_causal(mask, prover)
        if causal is not None and _as_many_queries_as_keys(node):
            found[node.name] = causal
            what = "is causal: attention skips what it masks" if causal else "masks nothing"
            rewrites[mask] = Rewrite(
                op_name(mask),
                f"this attention mask {what}",
                source_of(mask),
                nbytes(mask.meta["val"]),
            )
    if not found:
        return graph, ()
    new, copied = copy_graph(graph)
    for node, copy in copied.items():
        if node.name in found:
            set_mask(copy, None)
            _set_argument(copy, "is_causal", found[node.name])
    new.eliminate_dead_code()
    new.lint()
    return new, tuple(rewrites.values())

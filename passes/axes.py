"""Which dims of which tensors are the same axis, and what every op does to them.

Terms
    axis       an *atomic* axis: an index space with a size. Named by an integer.
    product    an ordered tuple of axes, outermost first: what one dim of a tensor is made of, as in
               einops' ``(b s) h``. A dim of size one is the empty product.
    copy       an axis of its own for one reader of a tensor, where the same positions play two
               roles (queries and keys of attention): see `passes.roles`. A copy and what it is a
               copy of are kept apart: they are never unified.
    role       what an op does along an axis: ``parallel`` (the op on slices is the slice of the
               op), ``sum`` (the op adds over the axis), ``tally`` (the op counts over the axis: a
               sum that a chunk may also use for itself, see below) or ``entangled`` (anything
               else, so no loop may run along it).
    permuted   an axis whose rows are those of a *source* product in another order, the one that
               sorting integer keys gave them. A loop along an axis of the source sorts the keys of
               its own chunk: its rows are the same rows, in an order of its own.
    relative   a value that tells positions or counts, so that a chunk's own differs from the slice
               of the whole: the permutation that a sort gives (`Rows`), its inverse (`Places`),
               how many keys there are of each kind (`Tally`).

Algorithm
    1. Graph inputs get fresh axes, one per dim that is not of size one.
    2. Every op's rule (`passes.rules`) relates its operands: pointwise ops *unify* dims, ``view``
       regroups products, ``permute`` reorders, ``mm`` contracts, ``sum`` reduces.
    3. Unifying two products splits an axis where one side is finer than the other (*refinement*),
       so axes are kept in a union-find whose roots may expand into a product.

Permuted axes
    Along an axis of the source, a value with a permuted axis is right per chunk *as a set of rows*:
    there is one bijection between a chunk's rows and the rows of the whole that come from the
    chunk's positions, the same for all values of one permuted axis. An op that treats rows alike
    (parallel along the permuted axis) keeps that, a sum over the rows is a sum over the chunks'
    rows, and anything that knows places (a slice, a running sum, a softmax over rows) is entangled.
    Rows enter by reading ``x[rows]`` and leave by reading ``y[places]``, or by adding to
    ``zeros[rows]``; both relate positions of the source, so they hold per chunk. A grouped matrix
    product takes rows by offsets: its groups are the same per chunk when the offsets are running
    counts of the very keys that were sorted. A relative value means something only to an op whose
    rule says that it understood it (`OpAxes.reads`); for any other reader the source is entangled.
    No permuted value and no relative one may enter or leave a loop (`passes.regions`), but counts
    may leave, as sums. A permuted axis is never the same as any other, and never split.

Sizes alone prove nothing: two axes of equal length stay different until an op equates them. An axis
analysis is a set of facts about alignment only; that a loop along an axis is right follows from the
per-op roles (see `passes.regions`).

Not handled: ops without a rule (their outputs get fresh axes, and every axis of the op is
entangled); a ``view`` that regroups across factors which no integer division separates; sizes known
only at run time (unbacked).

Source: the named-axis view of einops (Rogozhnikov, ICLR 2022) and of sharding propagation (GSPMD,
    Xu et al. 2021).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import sympy
import torch
from torch.fx import Graph, Node

Size = int | sympy.Expr
Product = tuple[int, ...]
Dims = tuple[Product, ...]
Role = Literal["absent", "parallel", "sum", "tally", "entangled"]


def as_size(size: object) -> Size:
    """An int, or the sympy expression behind a SymInt."""
    if isinstance(size, torch.SymInt):
        expr = sympy.expand(size.node.expr)
        return int(expr) if expr.is_Integer else expr
    assert isinstance(size, int), size
    return size


def shape_of(node: object) -> list[Size] | None:
    """The sizes of a node's tensor; None for whatever has none."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return [as_size(s) for s in value.shape] if isinstance(value, torch.Tensor) else None


def dims_kept(before: Sequence[Size], after: Sequence[Size]) -> dict[int, int] | None:
    """Of a reshape that adds and drops dims of size one: for every other dim, which one of the
    result it is; None for any other reshape."""
    old, new = ([d for d, size in enumerate(shape) if size != 1] for shape in (before, after))
    if [before[d] for d in old] != [after[d] for d in new]:
        return None
    return dict(zip(old, new, strict=True))


def size_product(sizes: Iterable[Size]) -> Size:
    total: Size = 1
    for size in sizes:
        total = total * size
    if isinstance(total, sympy.Expr):
        total = sympy.expand(total)
        return int(total) if isinstance(total, sympy.Integer) else total
    return total


def divide(numerator: Size, denominator: Size) -> Size | None:
    """The exact quotient, or None when it is not known to be a whole number."""
    if isinstance(numerator, int) and isinstance(denominator, int):
        return numerator // denominator if denominator and numerator % denominator == 0 else None
    quotient = sympy.cancel(sympy.sympify(numerator) / sympy.sympify(denominator))
    _, bottom = sympy.fraction(quotient)
    if bottom != 1:
        return None
    quotient = sympy.expand(quotient)
    return int(quotient) if quotient.is_Integer else quotient


class RolesMeet(Exception):
    """An op would unify a copy of an axis with what it is a copy of.

    Attributes:
        axes: the two, as roots.
    """

    def __init__(self, axes: tuple[int, int]) -> None:
        super().__init__("two roles of the same positions meet")
        self.axes = axes


@dataclass(frozen=True)
class Permuted:
    """What a permuted axis is made of."""

    source: Product
    keys: Node  # the value by whose entries it was sorted, behind views and casts


@dataclass(frozen=True)
class Rows:
    """A relative value: for every row of `axis`, the position in `target` that it came from;
    `target` holds the outermost factors of the axis' source, or all of them."""

    axis: int
    target: Product


@dataclass(frozen=True)
class Places:
    """A relative value: for every position of the source of `axis`, the row that came from it."""

    axis: int


@dataclass(frozen=True)
class Tally:
    """A relative value: how many of `keys`' entries fall into each of some bins, in ascending
    order without gaps from below the least entry; `running`: into this bin or an earlier one."""

    keys: Node
    source: Product  # the axes that were counted over
    running: bool


Content = Rows | Places | Tally


class AxisTable:
    """A union-find over axes whose roots may be refined into products of finer axes."""

    def __init__(self) -> None:
        self.sizes: list[Size] = []
        self._copied: set[tuple[int, int]] = set()  # roots: a copy, and what it must not become
        self._parent: list[Product] = []  # (i,) for a root, else what axis i stands for now
        self.permuted: dict[int, Permuted] = {}

    def fresh(self, size: Size) -> Product:
        """A new axis of `size` elements; the empty product when the size is one."""
        if isinstance(size, int) and size == 1:
            return ()
        axis = len(self.sizes)
        self.sizes.append(size)
        self._parent.append((axis,))
        return (axis,)

    def permute(self, source: Product, keys: Node) -> Product:
        """A new axis whose rows are those of `source`, sorted by `keys`."""
        made = self.fresh(self.size(source))
        for axis in made:
            self.permuted[axis] = Permuted(source, keys)
        return made

    def unpermuted(self, product: Product) -> Product:
        """The product with permuted axes replaced by what they are made of: of the same size, for a
        chunk as for the whole."""
        out: list[int] = []
        for axis in self.resolve(product):
            found = self.permuted.get(axis)
            out.extend((axis,) if found is None else self.resolve(found.source))
        return tuple(out)

    def resolve(self, product: Product) -> Product:
        """The product in terms of today's roots."""
        out: list[int] = []
        for axis in product:
            parent = self._parent[axis]
            if parent == (axis,):
                out.append(axis)
            else:
                parent = self.resolve(parent)
                self._parent[axis] = parent
                out.extend(parent)
        return tuple(out)

    def size(self, product: Product) -> Size:
        return size_product(self.sizes[a] for a in self.resolve(product))

    def _refine(self, axis: int, outer: Size, inner: Size) -> None:
        self._parent[axis] = (*self.fresh(outer), *self.fresh(inner))

    def unify(self, left: Product, right: Product) -> bool:
        """Make two products the same axes. False when their factors cannot be matched."""
        while True:
            a, b = self.resolve(left), self.resolve(right)
            mismatch = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
            if mismatch is None:
                rest = a[len(b) :] or b[len(a) :]
                return not rest or size_product(self.sizes[r] for r in rest) == 1
            x, y = a[mismatch], b[mismatch]
            if x in self.permuted or y in self.permuted:
                return False
            size_x, size_y = self.sizes[x], self.sizes[y]
            if size_x == size_y:
                self._merge(min(x, y), max(x, y))
            elif (q := divide(size_x, size_y)) is not None:
                self._refine(x, size_y, q)
            elif (q := divide(size_y, size_x)) is not None:
                self._refine(y, size_x, q)
            else:
                return False

    def copy(self, product: Product) -> Product:
        """A new axis for the same positions, kept apart from these."""
        made = self.fresh(self.size(product))
        self._copied |= {(axis, other) for axis in made for other in self.resolve(product)}
        return made

    def is_copy(self, axis: int, of: int) -> bool:
        """Whether the first of two roots was made as a copy of the second."""
        return (axis, of) in self._copied

    def _merge(self, kept: int, gone: int) -> None:
        if self.is_copy(kept, gone) or self.is_copy(gone, kept):
            raise RolesMeet((kept, gone))
        self._parent[gone] = (kept,)
        for pair in [p for p in self._copied if gone in p]:
            self._copied.discard(pair)
            copy, source = (kept if axis == gone else axis for axis in pair)
            self._copied.add((copy, source))

    def regroup(self, axes: Product, sizes: Sequence[Size]) -> Dims | None:
        """Deal `axes`, outermost first, into dims of the given sizes (what ``view`` does), refining
        where a dim ends inside an axis. None when a dim ends where no whole factor does."""
        queue = list(self.resolve(axes))
        dims: list[Product] = []
        for size in sizes:
            need: Size = size
            dim: list[int] = []
            while need != 1:
                if not queue:
                    return None
                axis = queue.pop(0)
                have = self.sizes[axis]
                if (rest := divide(need, have)) is not None:
                    dim.append(axis)
                    need = rest
                elif axis in self.permuted:
                    return None
                elif (inner := divide(have, need)) is not None:
                    self._refine(axis, need, inner)
                    queue[:0] = self.resolve((axis,))
                else:
                    return None
            dims.append(tuple(dim))
        return tuple(dims) if not queue else None


@dataclass(frozen=True)
class OpAxes:
    """What one op does: the dims of its outputs, and the axes along which it is not parallel."""

    outputs: tuple[Dims | None, ...]  # one per output tensor; None for an output that is no tensor
    summed: tuple[Product, ...] = ()  # the op adds over these
    entangled: tuple[Product, ...] = ()  # the op mixes positions of these
    partial: tuple[tuple[Product, ...], ...] = ()  # per output: it lacks and sums over these
    opaque: bool = False  # no rule: every axis of the op is entangled
    contents: tuple[Content | None, ...] = ()  # per output, if it is relative; () for none
    reads: tuple[Node, ...] = ()  # relative operands that the rule has understood
    remade: tuple[Node, ...] = ()
    """Constant operands of the output's shape that a chunk makes again at its own size."""


@dataclass(frozen=True)
class Cut:
    """A reader for whom a dim of an operand must be an axis of its own (see `passes.roles`)."""

    reader: Node
    operand: Node
    dim: int


@dataclass
class OpCall:
    """One call of an op, as its rule sees it."""

    table: AxisTable
    node: Node
    facts: Axes
    outputs: tuple[torch.Tensor | None, ...]  # fake values
    cuts: list[Cut] = field(default_factory=list)  # operands that need a copy of an axis

    def dims(self, arg: object) -> Dims:
        assert isinstance(arg, Node)
        return self.facts.dims(arg)

    def output_dims(self, node: Node) -> tuple[Dims | None, ...]:
        return self.facts.output_dims(node)

    def partial(self, node: Node, output: int) -> tuple[Product, ...]:
        return self.facts.partial(node, output)

    def content(self, arg: object, output: int = 0) -> Content | None:
        return self.facts.content(arg, output) if isinstance(arg, Node) else None

    def fresh_dims(self, index: int = 0) -> Dims:
        value = self.outputs[index]
        assert value is not None
        return tuple(self.table.fresh(as_size(s)) for s in value.shape)

    def all_fresh(self) -> tuple[Dims | None, ...]:
        return tuple(None if v is None else self.fresh_dims(i) for i, v in enumerate(self.outputs))


Rule = Callable[[OpCall], OpAxes | None]


def tensor_outputs(node: Node) -> tuple[torch.Tensor | None, ...]:
    """The fake tensors a node makes, one entry per output."""
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else (value,)
    return tuple(v if isinstance(v, torch.Tensor) else None for v in values)


class Axes:
    """The facts of one graph: `dims(node)` and `role(node, axis)`.

    While the analysis runs, axes are still refined; `freeze` ends it, and answers are remembered
    from then on.
    """

    def __init__(self, table: AxisTable) -> None:
        self.table = table
        self._dims: dict[Node, tuple[Dims | None, ...]] = {}
        self._ops: dict[Node, OpAxes] = {}
        self.cuts: list[Cut] = []
        self.late_cuts: list[Cut] = []  # may come to nothing once `cuts` are made
        self._frozen = False
        self._axes: dict[Node, tuple[int, ...]] = {}
        self._roles: dict[tuple[Node, int], Role] = {}
        self._carriers: dict[int, frozenset[int]] = {}

    def record(self, node: Node, op: OpAxes) -> None:
        assert not self._frozen
        self._dims[node] = op.outputs
        self._ops[node] = op

    def freeze(self) -> None:
        """Resolve everything once; nothing may be unified after this."""

        def resolved(product: Product) -> Product:
            return self.table.resolve(product)

        for node, entry in self._dims.items():
            self._dims[node] = tuple(None if d is None else tuple(map(resolved, d)) for d in entry)
            self._axes[node] = tuple(a for d in self._dims[node] if d for p in d for a in p)
        self._frozen = True

    def dims(self, node: Node, output: int = 0) -> Dims:
        """The dims of a node's value, resolved; () for a scalar."""
        entry = self._dims.get(node)
        dims = entry[output] if entry and output < len(entry) else None
        if dims is None:
            return ()
        return dims if self._frozen else tuple(self.table.resolve(p) for p in dims)

    def output_dims(self, node: Node) -> tuple[Dims | None, ...]:
        return self._dims[node]

    def partial(self, node: Node, output: int) -> tuple[Product, ...]:
        """The axes that an output lacks because it is a sum over them."""
        op = self._ops.get(node)
        entries = op.partial if op else ()
        return tuple(map(self.table.resolve, entries[output])) if output < len(entries) else ()

    def content(self, node: Node, output: int = 0) -> Content | None:
        """What a relative value tells; None for any other."""
        op = self._ops.get(node)
        return op.contents[output] if op is not None and output < len(op.contents) else None

    def contents(self, node: Node) -> tuple[Content | None, ...]:
        op = self._ops.get(node)
        return () if op is None else op.contents

    def operands(self, node: Node) -> list[Node]:
        """The inputs of a node that a chunk reads, those left out that it makes again."""
        op = self._ops.get(node)
        if op is None or not op.remade:
            return node.all_input_nodes
        return [i for i in node.all_input_nodes if i not in op.remade]

    def is_remade(self, node: Node, operand: Node) -> bool:
        op = self._ops.get(node)
        return op is not None and operand in op.remade

    def source(self, content: Content) -> Product:
        """The axes along which a chunk's own value differs from the slice of the whole."""
        if isinstance(content, Tally):
            return self.table.resolve(content.source)
        return self.table.resolve(self.table.permuted[content.axis].source)

    def carriers(self, axis: int) -> frozenset[int]:
        """The axis, and the permuted axes that hold its positions in another order."""
        if axis not in self._carriers:
            permuted = self.table.permuted.items()
            found = {p for p, made in permuted if axis in self.table.resolve(made.source)}
            if not self._frozen:
                return frozenset({axis, *found})
            self._carriers[axis] = frozenset({axis, *found})
        return self._carriers[axis]

    def count(self, node: Node, axis: int) -> int:
        """How often a node's outputs have the axis, in its own order or another."""
        carriers = self.carriers(axis)
        return sum(a in carriers for a in self.axes(node))

    def is_relative(self, node: Node, axis: int) -> bool:
        """Whether a value means something only within one chunk of the axis."""
        if any(a in self.table.permuted for a in self.axes(node) if a in self.carriers(axis)):
            return True
        op = self._ops.get(node)
        return op is not None and any(axis in self.source(c) for c in op.contents if c is not None)

    def axes(self, node: Node) -> tuple[int, ...]:
        """Every axis of every output of the node, with repetition."""
        if self._frozen:
            return self._axes.get(node, ())
        entry = self._dims.get(node, ())
        return tuple(a for dims in entry if dims for p in dims for a in self.table.resolve(p))

    def is_opaque(self, node: Node) -> bool:
        op = self._ops.get(node)
        return op is None or op.opaque

    def role(self, node: Node, axis: int) -> Role:
        """What `node` does along `axis` (which must be a root)."""
        if not self._frozen:
            return self._role(node, axis)
        key = (node, axis)
        if key not in self._roles:
            self._roles[key] = self._role(node, axis)
        return self._roles[key]

    def _role(self, node: Node, axis: int) -> Role:
        op = self._ops.get(node)
        carriers = self.carriers(axis)

        def touched(products: Iterable[Product]) -> bool:
            return any(a in carriers for p in products for a in self.table.resolve(p))

        here = any(self.count(n, axis) for n in (node, *node.all_input_nodes))
        if not here and not any(self.is_relative(n, axis) for n in (node, *self.operands(node))):
            return "absent"
        if axis in self.table.permuted:
            return "entangled"  # its order belongs to the whole; loops run along its source
        if op is None or op.opaque or touched(op.entangled):
            return "entangled"
        if touched(op.summed):
            return "sum"
        counts = any(isinstance(c, Tally) and axis in self.source(c) for c in op.contents)
        return "tally" if counts else "parallel"


def analyze_axes(
    graph: Graph, find_rule: Callable[[Node], Rule | None], *, freeze: bool = True
) -> Axes:
    """Give every dim of every tensor in `graph` its axes.

    Args:
        graph: a functional aten graph whose nodes carry fake values in ``meta["val"]``.
        find_rule: the table of op rules, `passes.rules.find_rule`.
        freeze: False where only the cuts are wanted, until `Axes.freeze` is called.
    """
    table = AxisTable()
    facts = Axes(table)
    for node in graph.nodes:
        if node.op == "output":
            continue
        call = OpCall(table, node, facts, tensor_outputs(node))
        if node.op in ("placeholder", "get_attr"):
            facts.record(node, OpAxes(call.all_fresh()))
            continue
        rule = find_rule(node)
        twice = _operands_with_an_axis_twice(call)
        try:
            op = rule(call) if rule is not None else None
        except RolesMeet as meeting:
            op = None
            call.cuts += _cut_where_roles_meet(call, meeting.axes)
        except (AssertionError, NotImplementedError, ValueError, LookupError, TypeError):
            op = None  # a rule that meets a form it does not know refuses, it never guesses
        if op is not None:
            op = _checked(call, op)
        if op is not None:
            call.cuts += _cut_where_an_axis_comes_twice(call, op)
            facts.late_cuts += _cut_where_an_operand_gets_one_twice(call, twice)
            op = _understood(call, op)
        facts.cuts += call.cuts
        facts.record(node, op or OpAxes(call.all_fresh(), opaque=True))
    if freeze:
        facts.freeze()
    return facts


def _understood(call: OpCall, op: OpAxes) -> OpAxes:
    """Where the op reads a relative value that its rule knows nothing of, the source is
    entangled."""
    facts = call.facts
    misread: list[Product] = []
    for node in call.node.all_input_nodes:
        if node not in op.reads and node not in op.remade:
            misread += [facts.source(c) for c in facts.contents(node) if c is not None]
    return replace(op, entangled=(*op.entangled, *misread)) if misread else op


def _checked(call: OpCall, op: OpAxes) -> OpAxes | None:
    """A rule's dims must have the sizes that tracing found, or the op counts as one without a
    rule."""
    if len(op.outputs) != len(call.outputs):
        return None
    for dims, value in zip(op.outputs, call.outputs, strict=True):
        if (dims is None) != (value is None):
            return None
        if dims is not None and value is not None:
            if len(dims) != value.dim():
                return None
            if any(
                call.table.size(p) != as_size(s) for p, s in zip(dims, value.shape, strict=True)
            ):
                return None
    return op


def _cut_where_roles_meet(call: OpCall, axes: tuple[int, int]) -> list[Cut]:
    """The operand that needs a copy so that two roles do not meet: never one that has both, rather
    the one whose role is the copy's, so that it takes the other's again. Where each is a copy of
    the other (a copy of the copy became the original again), the later one: every cut of the
    original would make a role that meets the next one."""
    found: list[tuple[bool, int, Cut]] = []
    for operand in call.node.all_input_nodes:
        dims = call.dims(operand)
        own = {a for product in dims for a in product} & set(axes)
        if len(own) != 1:
            continue
        (axis,) = own
        (other,) = set(axes) - own
        for dim, product in enumerate(dims):
            if axis in product:
                is_copy = call.table.is_copy(axis, other)
                found.append((is_copy, axis, Cut(call.node, operand, dim)))
    return [max(found, key=lambda f: f[:2])[2]] if found else []


def _operands_with_an_axis_twice(call: OpCall) -> set[tuple[Node, int]]:
    found: set[tuple[Node, int]] = set()
    if len(call.node.all_input_nodes) < 2:
        return found  # nothing that one could take from another
    for operand in call.node.all_input_nodes:
        for dims in call.output_dims(operand):
            flat = [a for product in dims or () for a in call.table.resolve(product)]
            found |= {(operand, axis) for axis in flat if flat.count(axis) > 1}
    return found


def _cut_where_an_operand_gets_one_twice(call: OpCall, before: set[tuple[Node, int]]) -> list[Cut]:
    """Scores whose keys were cut and padded (an attention sink) have an unknown axis there, until
    the values say that it is the tokens: these need the copy."""
    found: list[Cut] = []
    known = {axis for _, axis in before}
    for twice, axis in _operands_with_an_axis_twice(call) - before:
        if axis in known:
            continue  # taken over from an operand that has it twice
        for operand in call.node.all_input_nodes:
            if operand is not twice:
                dims = call.dims(operand)
                at = [i for i, p in enumerate(dims) if axis in call.table.resolve(p)]
                if len(at) == 1:
                    found.append(Cut(call.node, operand, at[0]))
    return found


def _cut_where_an_axis_comes_twice(call: OpCall, op: OpAxes) -> list[Cut]:
    """An op that makes a tensor of positions x positions: the operand of its last such dim."""
    found: list[Cut] = []
    for dims in op.outputs:
        flat = [a for product in dims or () for a in call.table.resolve(product)]
        for axis in {a for a in flat if flat.count(a) > 1}:
            assert dims is not None
            last = max(d for d, p in enumerate(dims) if axis in call.table.resolve(p)) - len(dims)
            for operand in reversed(call.node.all_input_nodes):
                own = call.dims(operand)
                holding = [d - len(own) for d, product in enumerate(own) if axis in product]
                if holding == [last] and own[last].count(axis) == 1:
                    found.append(Cut(call.node, operand, last + len(own)))
                    break
    return found

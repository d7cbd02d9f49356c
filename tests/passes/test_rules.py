"""Every op rule, held to its word: the op on chunks, put together, is the op on the whole.

For random calls of every op in the table, and for every axis that a rule calls ``parallel`` or
``sum``, the call becomes the body of a loop (`passes.body`), which the runtime runs with several
chunk sizes. Operands are also given in factored form and viewed together: dims become products.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from passes import rules
from passes.axes import Axes, analyze_axes
from passes.body import build_body
from passes.grouped import grouped_mm
from passes.rules import find_rule, permuted
from tests.passes.graphs import Sketch, assert_close, run_body

aten = torch.ops.aten
prims = torch.ops.prims

Draw = Callable[[st.SearchStrategy[Any]], Any]
Call = tuple[Any, tuple[Any, ...], Mapping[str, Any]]  # overload, args, kwargs

SIZES = st.sampled_from([2, 3, 4, 6, 1])
QUICK = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


# -- the check -----------------------------------------------------------------------------------


def loops_over(axes: Axes, node: Any, axis: int) -> bool:
    """Whether a region may run the call along the axis (what `passes.regions` asks of a node)."""
    role = axes.role(node, axis)
    if role not in ("parallel", "sum"):
        return False
    per_output = [
        sum(p.count(axis) for p in dims)
        for i, dims in enumerate(axes.output_dims(node) or ())
        if dims is not None and (axis,) not in axes.partial(node, i)
    ]
    if any(axes.axes(i).count(axis) > 1 for i in node.all_input_nodes):
        return False
    return not any(per_output) if role == "sum" else all(n == 1 for n in per_output)


@dataclass(frozen=True)
class Zeros:
    """An operand that is a constant of the graph."""

    shape: tuple[int, ...]


def check(call: Call, factors: Sequence[int] = ()) -> dict[int, str]:
    """Hold every axis of one call to its role; the roles that were run, by axis."""
    op, args, kwargs = call
    sketch = Sketch()
    plan = list(factors)

    def lift(value: Any) -> Any:
        if isinstance(value, Zeros):
            return sketch.call(aten.full.default, list(value.shape), 0, dtype=torch.float64)
        if not isinstance(value, torch.Tensor):
            return value
        factor = plan.pop(0) if plan else 1
        for dim, size in enumerate(value.shape):
            if factor > 1 and size % factor == 0 and size > factor:
                apart = sketch.input(value.unflatten(dim, (factor, size // factor)))
                return sketch.call(aten.view.default, apart, list(value.shape))
        return sketch.input(value)

    args, kwargs = pytree.tree_map(lift, (args, dict(kwargs)))
    node = sketch.call(op, *args, **kwargs)
    outputs = sketch.outputs_of(node)
    if not sketch.values:  # a constant has a place in a loop only beside a tensor
        node = sketch.call(
            aten.mul.Tensor, node, torch.ones_like(torch.empty(node.meta["val"].shape))
        )
        outputs = [node]
    expected = sketch.finish(outputs)
    axes = analyze_axes(sketch.graph, find_rule)
    inside = frozenset(n for n in sketch.graph.nodes if n.op == "call_function")
    touched = {a for n in (node, *node.all_input_nodes) for a in axes.axes(n)}
    ran: dict[int, str] = {}
    for axis in sorted(touched):
        size = axes.table.sizes[axis]
        assert isinstance(size, int)
        members = [n for n in inside if n.target is not operator.getitem]
        if size < 2 or axes.role(node, axis) == "absent":
            continue
        if not all(axes.role(n, axis) == "absent" or loops_over(axes, n, axis) for n in members):
            continue
        if any(axes.axes(n).count(axis) > 1 for n in sketch.values):
            continue  # an input that has the axis twice: regions refuse it
        wanted = [
            (o, e)
            for o, e in zip(outputs, expected, strict=True)
            if axes.role(o, axis) in ("parallel", "sum")
        ]
        body = build_body(
            [o for o, _ in wanted], axes=axes, axis=axis, inside=inside, tangent=set(), seed=node
        )
        for chunk in {1, 2, 3, size}:
            got = run_body(body, axes, sketch.values, chunk)
            assert_close(
                [g.to(o.dtype) for g, o in zip(got, body.outputs, strict=True)],
                [e for _, e in wanted],
            )
        ran[axis] = axes.role(node, axis)
    return ran


# -- random calls --------------------------------------------------------------------------------


def real(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def below(high: int, *shape: int) -> torch.Tensor:
    return torch.randint(high, shape)


def shape_of(draw: Draw, rank: int | None = None, least: int = 1) -> list[int]:
    count: int = draw(st.integers(least, 3)) if rank is None else rank
    return [draw(SIZES) for _ in range(count)]


def a_dim(draw: Draw, rank: int) -> int:
    """A dim, sometimes counted from the end."""
    return draw(st.integers(-rank, rank - 1))


def stretched(draw: Draw, shape: Sequence[int]) -> list[int]:
    """A shape that broadcasts to `shape`: ones for sizes, leading dims missing."""
    keep = draw(st.integers(0, len(shape)))
    return [1 if draw(st.integers(0, 3)) == 0 else s for s in shape[len(shape) - keep :]]


def unary(op: Any, **kwargs: Any) -> Callable[[Draw], Call]:
    return lambda draw: (op, (real(*shape_of(draw, least=0)),), kwargs)


def dims_or_none(draw: Draw, rank: int) -> list[int]:
    chosen = draw(st.lists(st.integers(0, rank - 1), unique=True, max_size=rank))
    return [d - rank if draw(st.booleans()) else d for d in chosen]


def reduction(*forms: str) -> Callable[[Any], Callable[[Draw], Call]]:
    """``op(x)``, ``op(x, dim)`` and ``op(x, [dims])``, the ones that the op has."""

    def make(packet: Any) -> Callable[[Draw], Call]:
        def call(draw: Draw) -> Call:
            shape = shape_of(draw, least=2)
            x = real(*shape)
            form = draw(st.sampled_from(forms))
            overload = getattr(packet, form)
            if form == "default" and packet not in (aten.amax, aten.amin, aten.logsumexp):
                return overload, (x,), {}
            keepdim = draw(st.booleans())
            if form in ("dim_IntList", "dims", "default", "correction") or (
                packet in (aten.mean,) and form == "dim"
            ):
                dims = dims_or_none(draw, len(shape))
                if packet is aten.logsumexp or form == "dims":
                    dims = dims or [0]
                if form == "correction":
                    return overload, (x, dims), {"correction": 0, "keepdim": keepdim}
                return overload, (x, dims, keepdim), {}
            return overload, (x, a_dim(draw, len(shape)), keepdim), {}

        return call

    return make


def arg_extremum(packet: Any) -> Callable[[Draw], Call]:
    def call(draw: Draw) -> Call:
        shape = shape_of(draw)
        dim = draw(st.one_of(st.none(), st.integers(-len(shape), len(shape) - 1)))
        return packet.default, (real(*shape), dim, draw(st.booleans())), {}

    return call


def truth(packet: Any) -> Callable[[Draw], Call]:
    def call(draw: Draw) -> Call:
        op, (x, *rest), kwargs = reduction("default", "dim", "dims")(packet)(draw)
        return op, (x > 0, *rest), kwargs

    return call


def var_mean(packet: Any) -> Callable[[Draw], Call]:
    def call(draw: Draw) -> Call:
        shape = shape_of(draw)
        dims = draw(st.one_of(st.none(), st.just(dims_or_none(draw, len(shape)))))
        correction = draw(st.sampled_from([0, 1]))
        keepdim = draw(st.booleans())
        if draw(st.integers(0, 3)) == 0:
            return packet.default, (real(*shape), draw(st.booleans())), {}
        return (
            packet.correction,
            (real(*shape), dims),
            {"correction": correction, "keepdim": keepdim},
        )

    return call


def softmax(packet: Any) -> Callable[[Draw], Call]:
    return lambda draw: (
        packet.default,
        ((x := real(*shape_of(draw))), a_dim(draw, x.dim()), False),
        {},
    )


def softmax_backward(packet: Any) -> Callable[[Draw], Call]:
    def call(draw: Draw) -> Call:
        shape = shape_of(draw)
        dim = a_dim(draw, len(shape))
        return packet.default, (real(*shape), real(*shape).softmax(dim), dim, torch.float64), {}

    return call


def a_reshape(packet: Any) -> Callable[[Draw], Call]:
    def call(draw: Draw) -> Call:
        sizes = shape_of(draw, 3)
        forms = [
            sizes,
            [sizes[0] * sizes[1], sizes[2]],
            [sizes[0], sizes[1] * sizes[2]],
            [sizes[0] * sizes[1] * sizes[2]],
            [1, *sizes, 1],
            [sizes[0], 1, sizes[1] * sizes[2]],
            [sizes[1], sizes[0], sizes[2]],  # regroups across, if sizes allow
            [-1, sizes[2]],
        ]
        before = [abs(s) for s in draw(st.sampled_from(forms[:-1]))]
        after = draw(st.sampled_from(forms))
        return packet.default, (real(*before), after), {}

    return call


def squeeze(draw: Draw) -> Call:
    shape = shape_of(draw)
    x = real(*shape)
    form = draw(st.sampled_from(["default", "dim", "dims"]))
    if form == "default":
        return aten.squeeze.default, (x,), {}
    dim = a_dim(draw, len(shape))
    return getattr(aten.squeeze, form), (x, [dim] if form == "dims" else dim), {}


def unsqueeze(draw: Draw) -> Call:
    shape = shape_of(draw)
    return (
        aten.unsqueeze.default,
        (real(*shape), draw(st.integers(-len(shape) - 1, len(shape)))),
        {},
    )


def flatten(draw: Draw) -> Call:
    shape = shape_of(draw)
    first, last = sorted(draw(st.integers(0, len(shape) - 1)) for _ in range(2))
    return aten.flatten.using_ints, (real(*shape), first, last - len(shape)), {}


def permute(draw: Draw) -> Call:
    shape = shape_of(draw)
    order = draw(st.permutations(range(len(shape))))
    order = [d - len(shape) if draw(st.booleans()) else d for d in order]
    return aten.permute.default, (real(*shape), order), {}


def transpose(draw: Draw) -> Call:
    shape = shape_of(draw)
    return aten.transpose.int, (real(*shape), a_dim(draw, len(shape)), a_dim(draw, len(shape))), {}


def expand(draw: Draw) -> Call:
    shape = shape_of(draw)
    x = real(*stretched(draw, shape))
    lead = len(shape) - x.dim()
    asked = [
        -1 if i >= lead and x.shape[i - lead] == s and draw(st.booleans()) else s
        for i, s in enumerate(shape)
    ]
    return aten.expand.default, (x, asked), {}


def slice_(draw: Draw) -> Call:
    shape = shape_of(draw)
    dim = a_dim(draw, len(shape))
    bound = st.one_of(st.none(), st.integers(-7, 7), st.just(2**63 - 1))
    args: list[Any] = [
        real(*shape),
        dim,
        draw(bound),
        draw(bound),
        draw(st.sampled_from([1, 1, 2])),
    ]
    args = args[: draw(st.integers(1, 5))]
    names = ["self", "dim", "start", "end", "step"][: len(args)]
    by_name = draw(st.integers(1, len(args)))
    return aten.slice.Tensor, tuple(args[:by_name]), dict(zip(names[by_name:], args[by_name:]))


def split(draw: Draw) -> Call:
    shape = shape_of(draw)
    dim = a_dim(draw, len(shape))
    args = (real(*shape), draw(st.integers(1, 4)))
    form = draw(st.sampled_from(["none", "args", "kwargs"]))
    if form == "none":
        return aten.split.Tensor, args, {}
    return (
        aten.split.Tensor,
        (*args, dim) if form == "args" else args,
        ({"dim": dim} if form == "kwargs" else {}),
    )


def split_with_sizes(draw: Draw) -> Call:
    shape = shape_of(draw)
    dim = a_dim(draw, len(shape))
    first = draw(st.integers(0, shape[dim]))
    x, sizes = real(*shape), [first, shape[dim] - first]
    if draw(st.booleans()):
        return aten.split_with_sizes.default, (x, sizes), {"dim": dim}
    return aten.split_with_sizes.default, (x, sizes, dim), {}


def select(draw: Draw) -> Call:
    shape = shape_of(draw)
    dim = a_dim(draw, len(shape))
    return aten.select.int, (real(*shape), dim, draw(st.integers(-shape[dim], shape[dim] - 1))), {}


def cat(draw: Draw) -> Call:
    shape = shape_of(draw)
    dim = a_dim(draw, len(shape))
    parts: list[torch.Tensor] = []
    for _ in range(draw(st.integers(1, 3))):
        own = list(shape)
        own[dim] = draw(st.integers(0, 3))
        parts.append(real(*own))
    if draw(st.booleans()):
        return aten.cat.default, (parts,), {"dim": dim}
    return aten.cat.default, (parts, dim), {}


def pad(draw: Draw) -> Call:
    shape = shape_of(draw)
    amounts: list[int] = []
    for size in reversed(shape[draw(st.integers(0, len(shape) - 1)) :]):
        left = draw(st.integers(-1, 2))
        right = draw(st.integers(-1, 2))
        amounts += [left, right] if size + left + right > 0 and size > 2 else [0, 0]
    return (
        aten.constant_pad_nd.default,
        (real(*shape), amounts, draw(st.sampled_from([0, 0.5]))),
        {},
    )


def slice_scatter(draw: Draw) -> Call:
    shape = shape_of(draw)
    dim = a_dim(draw, len(shape))
    start = draw(st.integers(0, shape[dim] - 1))
    end = draw(st.integers(start + 1, shape[dim]))
    part = list(shape)
    part[dim] = end - start
    return aten.slice_scatter.default, (real(*shape), real(*part), dim, start, end), {}


def unbind(draw: Draw) -> Call:
    shape = shape_of(draw)
    return aten.unbind.int, (real(*shape), a_dim(draw, len(shape))), {}


def cut(draw: Draw) -> Call:
    shape = shape_of(draw)
    return rules.shape.cut, (real(*shape), draw(st.integers(0, len(shape) - 1))), {}


def attention(*, backward: bool) -> Callable[[Draw], Call]:
    def call(draw: Draw) -> Call:
        batch, heads, queries, keys, features = (draw(SIZES) for _ in range(5))
        query = real(batch, heads, queries, features)
        key, value = (real(batch, heads, keys, features) for _ in range(2))
        causal = draw(st.booleans())
        named: dict[str, Any] = {"scale": 0.7}
        if not causal and draw(st.booleans()):
            sizes = (batch, heads, queries, keys)
            named["attn_mask"] = real(*(s if draw(st.booleans()) else 1 for s in sizes))
        forward = aten._scaled_dot_product_flash_attention_for_cpu.default
        if not backward:
            return forward, (query, key, value, 0.0, causal), named
        out, statistics = forward(query, key, value, 0.0, causal, **named)
        op = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
        grad = real(*out.shape)
        return op, (grad, query, key, value, out, statistics, 0.0, causal), named

    return call


def select_scatter(draw: Draw) -> Call:
    shape = shape_of(draw)
    dim = a_dim(draw, len(shape))
    source = real(*shape).select(dim, 0).clone()
    at = draw(st.integers(-shape[dim], shape[dim] - 1))
    return aten.select_scatter.default, (real(*shape), source, dim, at), {}


def copy(draw: Draw) -> Call:
    shape = shape_of(draw)
    return aten.copy.default, (real(*shape), real(*stretched(draw, shape)).float()), {}


def creation(packet: Any) -> Callable[[Draw], Call]:
    def call(draw: Draw) -> Call:
        shape = shape_of(draw)
        if packet in (aten.full, aten.zeros, aten.ones):
            value = (2,) if packet is aten.full else ()
            return packet.default, (shape, *value), {"dtype": torch.float64, "device": "cpu"}
        value = (2,) if packet is aten.new_full else ()
        return packet.default, (real(*shape_of(draw)), shape, *value), {}

    return call


def gather(draw: Draw) -> Call:
    shape = shape_of(draw, least=2)
    dim = a_dim(draw, len(shape))
    own = [s if draw(st.booleans()) else draw(st.integers(1, s)) for s in shape]
    own[dim] = draw(SIZES)
    return aten.gather.default, (real(*shape), dim, below(shape[dim], *own)), {}


def scatter(form: str) -> Callable[[Draw], Call]:
    def call(draw: Draw) -> Call:
        shape = shape_of(draw)
        dim = a_dim(draw, len(shape))
        own = [s if draw(st.booleans()) else draw(st.integers(1, s)) for s in shape]
        # each place is written once, or the result would depend on the order of writing
        own[dim] = draw(st.integers(1, shape[dim]))
        index = real(*own[:dim], shape[dim], *(own[dim:][1:])).argsort(dim).narrow(dim, 0, own[dim])
        values = real(*(s + draw(st.integers(0, 1)) for s in own))
        x = real(*shape)
        if form == "any":
            kind = draw(st.sampled_from(["value", "src", "reduce", "value_reduce"]))
            if kind.startswith("value"):
                extra = {"reduce": "add"} if kind == "value_reduce" else {}
                return getattr(aten.scatter, kind), (x, dim, index, 0.5), extra
            extra = {"reduce": "multiply"} if kind == "reduce" else {}
            return getattr(aten.scatter, kind), (x, dim, index, values), extra
        index = below(shape[dim], *own)
        return aten.scatter_add.default, (x, dim, index, values), {}

    return call


def embedding(draw: Draw) -> Call:
    rows, width = draw(SIZES), draw(SIZES)
    index = below(rows, *shape_of(draw, least=0))
    return aten.embedding.default, (real(rows, width), index), {"padding_idx": -1}


def index_select(draw: Draw) -> Call:
    shape = shape_of(draw)
    dim = a_dim(draw, len(shape))
    index = below(shape[dim], *shape_of(draw, draw(st.integers(0, 1))))
    return aten.index_select.default, (real(*shape), dim, index), {}


def index_tensor(draw: Draw) -> Call:
    shape = shape_of(draw, 3)
    out = shape_of(draw, draw(st.integers(0, 2)))
    count = draw(st.integers(1, 3))
    indices = [below(shape[i], *stretched(draw, out)) for i in range(count)]
    if count < 3 and draw(st.integers(0, 4)) == 0:
        return aten.index.Tensor, (real(3, *shape), [None, *indices]), {}
    return aten.index.Tensor, (real(*shape), indices), {}


def repeat(draw: Draw) -> Call:
    shape = shape_of(draw)
    counts = [draw(st.integers(1, 3)) for _ in range(len(shape) + draw(st.integers(0, 1)))]
    return aten.repeat.default, (real(*shape), counts), {}


def slice_scatter_any(draw: Draw) -> Call:
    op, (base, *rest), kwargs = slice_scatter(draw)
    return op, (Zeros(tuple(base.shape)) if draw(st.booleans()) else base, *rest), kwargs


def a_table(draw: Draw) -> tuple[list[int], list[int], list[torch.Tensor], int]:
    """A shape, the shape of an index into its first dims, and these indices."""
    shape, out = shape_of(draw, 3), shape_of(draw, draw(st.integers(1, 2)))
    count = draw(st.integers(1, 2))
    return shape, out, [below(shape[i], *stretched(draw, out)) for i in range(count)], count


def index_put(draw: Draw) -> Call:
    shape, out, indices, count = a_table(draw)
    indices[0] = below(shape[0], *out)
    values = real(*out, *shape[count:])
    return aten.index_put.default, (Zeros(tuple(shape)), indices, values, True), {}


def index_add(draw: Draw) -> Call:
    shape = shape_of(draw)
    dim, count = a_dim(draw, len(shape)), draw(SIZES)
    values = list(shape)
    values[dim] = count
    x = Zeros(tuple(shape)) if draw(st.booleans()) else real(*shape)
    extra = draw(st.sampled_from([{}, {"alpha": 2}]))
    return aten.index_add.default, (x, dim, below(shape[dim], count), real(*values)), extra


def masked_index(draw: Draw) -> Call:
    shape, out, indices, _ = a_table(draw)
    mask = real(*stretched(draw, [*out, *shape[len(indices) :]])) > 0
    return aten._unsafe_masked_index.default, (real(*shape), mask, indices, 0.5), {}


def masked_index_put(draw: Draw) -> Call:
    shape, out, indices, count = a_table(draw)
    indices[0] = below(shape[0], *out)
    values = real(*out, *shape[count:])
    mask = real(*stretched(draw, list(values.shape))) > 0
    op = aten._unsafe_masked_index_put_accumulate.default
    return op, (Zeros(tuple(shape)), mask, indices, values), {}


def whole_division(draw: Draw) -> Call:
    mode = draw(st.sampled_from(["floor", "trunc"]))
    return aten.div.Tensor_mode, (below(9, *shape_of(draw)), 2), {"rounding_mode": mode}


def small(*shape: int) -> torch.Tensor:
    """Whole numbers of which bfloat16 holds sums of products."""
    return torch.randint(-1, 2, shape).bfloat16()


def grouped(draw: Draw) -> Call:
    rows, inner, groups = 6, draw(SIZES), 2
    ends = torch.tensor([draw(st.integers(0, rows)), rows], dtype=torch.int32)
    x, weights = small(rows, 8 * inner), small(groups, 8 * inner, 8)
    return aten._grouped_mm.default, (x, weights, ends), {}


def own_grouped(draw: Draw) -> Call:
    _, (x, weights, ends), _ = grouped(draw)
    return grouped_mm, (x.float(), weights.float(), ends), {}


def mm(draw: Draw) -> Call:
    m, k, n = shape_of(draw, 3)
    return aten.mm.default, (real(m, k), real(k, n)), {}


def bmm(draw: Draw) -> Call:
    b, m, k = shape_of(draw, 3)
    return aten.bmm.default, (real(b, m, k), real(b, k, draw(SIZES))), {}


def addmm(draw: Draw) -> Call:
    m, k, n = shape_of(draw, 3)
    shapes = [(n,), (1,), (), (m, n), (1, n), (m, 1), (1, 1)]
    bias = real(*draw(st.sampled_from(shapes)))
    scale = draw(st.sampled_from([{}, {"beta": 0.5}, {"alpha": -2.0, "beta": 3.0}]))
    return aten.addmm.default, (bias, real(m, k), real(k, n)), scale


def baddbmm(draw: Draw) -> Call:
    b, m, k, n = shape_of(draw, 4)
    bias = real(*draw(st.sampled_from([(n,), (m, n), (1, n), (b, 1, n), (b, m, n), (b, m, 1)])))
    scale = draw(st.sampled_from([{}, {"beta": 0.5, "alpha": 2.0}]))
    return aten.baddbmm.default, (bias, real(b, m, k), real(b, k, n)), scale


def pointwise_binary(op: Any) -> Callable[[Draw], Call]:
    def call(draw: Draw) -> Call:
        shape = shape_of(draw)
        operands = [real(*shape), real(*stretched(draw, shape))]
        return op, tuple(operands[:: draw(st.sampled_from([1, -1]))]), {}

    return call


def where(draw: Draw) -> Call:
    shape = shape_of(draw)
    condition, left, right = (real(*stretched(draw, shape)) for _ in range(3))
    return aten.where.self, (condition > 0, left, right), {}


def masked_fill(draw: Draw) -> Call:
    shape = shape_of(draw)
    x, mask = real(*stretched(draw, shape)), real(*stretched(draw, shape)) > 0
    if draw(st.booleans()):
        return aten.masked_fill.Scalar, (x, mask, -1.5), {}
    return aten.masked_fill.Tensor, (x, mask, torch.tensor(2.0, dtype=torch.float64)), {}


def fill(draw: Draw) -> Call:
    x = real(*shape_of(draw))
    if draw(st.booleans()):
        return aten.fill.Scalar, (x, 3), {}
    return aten.fill.Tensor, (x, torch.tensor(3.0, dtype=torch.float64)), {}


def sort(draw: Draw) -> Call:
    x = real(*shape_of(draw))
    dim, descending = a_dim(draw, x.dim()), draw(st.booleans())
    form = draw(st.sampled_from(["args", "kwargs", "none", "stable"]))
    if form == "stable":
        return aten.sort.stable, (x,), {"stable": True, "dim": dim, "descending": descending}
    if form == "none":
        return aten.sort.default, (x,), {}
    return (
        aten.sort.default,
        (x, dim, descending) if form == "args" else (x,),
        ({"dim": dim} if form == "kwargs" else {}),
    )


def topk(draw: Draw) -> Call:
    x = real(*shape_of(draw))
    dim = a_dim(draw, x.dim())
    form = draw(st.sampled_from(["args", "kwargs", "none"]))
    k = draw(st.integers(1, x.shape[-1 if form == "none" else dim]))
    args = (x, k, dim) if form == "args" else (x, k)
    return aten.topk.default, args, {"dim": dim} if form == "kwargs" else {}


def a_sum(draw: Draw) -> Call:
    op, args, kwargs = reduction("default", "dim_IntList")(aten.sum)(draw)
    kind = draw(st.sampled_from(["real", "int", "bool", "none", "dtype", "kwargs"]))
    if kind == "int":
        args = (below(9, *args[0].shape), *args[1:])
    elif kind == "bool":
        args = (args[0] > 0, *args[1:])
    elif kind == "dtype":
        kwargs = {"dtype": torch.float64}
        args = (args[0].float(), *args[1:])
    elif op is aten.sum.dim_IntList and kind == "none":
        args = (args[0], None)
    elif op is aten.sum.dim_IntList and kind == "kwargs":
        args, kwargs = args[:2], {"keepdim": args[2]}
    return op, args, kwargs


def cast(draw: Draw) -> Call:
    dtype = draw(st.sampled_from([torch.float32, torch.int64, torch.float64]))
    return aten._to_copy.default, (real(*shape_of(draw)),), {"dtype": dtype}


CALLS: dict[object, Callable[[Draw], Call]] = {
    # pointwise
    prims.convert_element_type: lambda d: (
        prims.convert_element_type.default,
        (real(*shape_of(d)), torch.float32),
        {},
    ),
    aten._to_copy: cast,
    aten.alias: unary(aten.alias.default),
    aten.detach: unary(aten.detach.default),
    aten.clone: unary(aten.clone.default, memory_format=torch.contiguous_format),
    aten.copy: copy,
    aten.lift_fresh_copy: unary(aten.lift_fresh_copy.default),
    aten.fill: fill,
    aten.masked_fill: masked_fill,
    aten.isnan: unary(aten.isnan.default),
    aten.contiguous: unary(aten.contiguous.default),
    aten.full_like: lambda d: (aten.full_like.default, (real(*shape_of(d)), 2), {}),
    aten.zeros_like: unary(aten.zeros_like.default),
    aten.ones_like: unary(aten.ones_like.default, dtype=torch.int64),
    # shape
    aten.view: a_reshape(aten.view),
    aten._unsafe_view: a_reshape(aten._unsafe_view),
    aten.reshape: a_reshape(aten.reshape),
    aten.squeeze: squeeze,
    aten.unsqueeze: unsqueeze,
    aten.flatten: flatten,
    aten.permute: permute,
    aten.transpose: transpose,
    aten.t: lambda d: (aten.t.default, (real(*shape_of(d, d(st.integers(0, 2)))),), {}),
    aten.expand: expand,
    aten.slice: slice_,
    aten.split: split,
    aten.split_with_sizes: split_with_sizes,
    aten.select: select,
    aten.unbind: unbind,
    rules.shape.cut: cut,
    aten.cat: cat,
    aten.constant_pad_nd: pad,
    aten.slice_scatter: slice_scatter_any,
    aten.repeat: repeat,
    aten.select_scatter: select_scatter,
    # create
    **{p: creation(p) for p in (aten.full, aten.zeros, aten.ones)},
    **{p: creation(p) for p in (aten.new_full, aten.new_zeros, aten.new_ones)},
    aten.scalar_tensor: lambda d: (aten.scalar_tensor.default, (2.0,), {}),
    aten.arange: lambda d: (aten.arange.start, (1, d(SIZES) + 2), {}),
    prims.iota: lambda d: (
        prims.iota.default,
        (d(SIZES),),
        {"start": 0, "step": 1, "dtype": torch.int64, "device": "cpu", "requires_grad": False},
    ),
    operator.getitem: lambda d: reduction("dim")(aten.max)(d),
    # reduce
    aten.sum: a_sum,
    prims.sum: lambda d: (
        prims.sum.default,
        ((x := real(*shape_of(d))), [d(st.integers(0, x.dim() - 1))]),
        {},
    ),
    aten.mean: reduction("default", "dim")(aten.mean),
    aten.amax: reduction("default")(aten.amax),
    aten.amin: reduction("default")(aten.amin),
    aten.max: reduction("default", "dim")(aten.max),
    aten.min: reduction("default", "dim")(aten.min),
    aten.argmax: arg_extremum(aten.argmax),
    aten.argmin: arg_extremum(aten.argmin),
    aten.any: truth(aten.any),
    aten.all: truth(aten.all),
    aten.prod: reduction("default", "dim_int")(aten.prod),
    aten.var: var_mean(aten.var),
    aten.var_mean: var_mean(aten.var_mean),
    aten.std: var_mean(aten.std),
    aten.logsumexp: reduction("default")(aten.logsumexp),
    aten._softmax: softmax(aten._softmax),
    aten._log_softmax: softmax(aten._log_softmax),
    aten.cumsum: lambda d: (
        aten.cumsum.default,
        ((x := real(*shape_of(d))), a_dim(d, x.dim())),
        {},
    ),
    aten.sort: sort,
    aten.topk: topk,
    aten._softmax_backward_data: softmax_backward(aten._softmax_backward_data),
    aten._log_softmax_backward_data: softmax_backward(aten._log_softmax_backward_data),
    # matmul
    aten.mm: mm,
    aten.bmm: bmm,
    aten.addmm: addmm,
    aten.baddbmm: baddbmm,
    aten.mv: lambda d: (aten.mv.default, ((x := real(*shape_of(d, 2))), real(x.shape[1])), {}),
    aten.dot: lambda d: (aten.dot.default, ((x := real(*shape_of(d, 1))), real(len(x))), {}),
    # index
    aten.gather: gather,
    aten.scatter: scatter("any"),
    aten.scatter_add: scatter("add"),
    aten.embedding: embedding,
    aten.index_select: index_select,
    aten.index: index_tensor,
    # attention
    aten._scaled_dot_product_flash_attention_for_cpu: attention(backward=False),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: attention(backward=True),
    aten._unsafe_masked_index: masked_index,
    aten._unsafe_masked_index_put_accumulate: masked_index_put,
    aten.index_add: index_add,
    # rows in the order of keys: these as they are elsewhere, what they say of rows is further down
    aten.index_put: index_put,
    aten.div.Tensor_mode: whole_division,
    aten.histc: lambda d: (aten.histc.default, (real(*shape_of(d)), 4, 0, 3), {}),
    aten._grouped_mm: grouped,
    grouped_mm.overloadpacket: own_grouped,
}

# Table entries that may never loop along an axis of their own.
NEVER = {aten.scalar_tensor, aten.arange, prims.iota, aten.histc, *permuted.GROUPED}


def test_every_rule_is_tested():
    assert set(CALLS) == set(rules._TABLE), "a rule without a property test, or a test without rule"


@pytest.mark.parametrize("key", CALLS, ids=lambda key: getattr(key, "__qualname__", str(key)))
def test_chunks_make_the_whole(key: object):
    ran: set[str] = set()

    @QUICK
    @given(st.data())
    def run(data: st.DataObject) -> None:
        torch.manual_seed(data.draw(st.integers(0, 99)))
        call = CALLS[key](data.draw)
        factors = data.draw(st.lists(st.sampled_from([1, 2, 3]), max_size=3))
        ran.update(check(call, factors).values())

    run()
    if key in NEVER:
        assert not ran
    else:
        assert ran, "no axis of any call could be looped over: the test says nothing"


# -- rows in the order of sorted keys ------------------------------------------------------------

EXPERTS = 4


@dataclass
class Sorted:
    """Choices of `k` experts for every one of ``b s`` tokens, sorted by expert."""

    b: int = 2
    s: int = 3
    k: int = 2
    skewed: bool = False  # every token's first choice is the same
    stable: bool = False
    own_base: bool = False  # rows are added to values, not to zeros
    counted: str = "keys"  # what the histogram is made of
    most: int = EXPERTS - 1  # the last of its bins

    def __post_init__(self) -> None:
        self.sketch = Sketch()
        self.tokens, self.count = self.b * self.s, self.b * self.s * self.k
        scores = real(self.b, self.s, EXPERTS)
        if self.skewed:
            scores[..., 2] += 9
        apart = self.sketch.input(scores)
        flat = self.call(aten.view.default, apart, [self.tokens, EXPERTS])
        picked = self.call(aten.topk.default, flat, self.k)
        self.choice = self.call(operator.getitem, picked, 1)
        self.keys = self.call(aten.view.default, self.choice, [-1])
        if self.stable:
            order = self.call(aten.sort.stable, self.keys, stable=True)
        else:
            order = self.call(aten.sort.default, self.keys)
        self.in_order = self.call(operator.getitem, order, 0)
        self.rows = self.call(operator.getitem, order, 1)
        self.owner = self.call(aten.div.Tensor_mode, self.rows, self.k, rounding_mode="floor")

    def call(self, op: Any, *args: Any, **kwargs: Any) -> Any:
        return self.sketch.call(op, *args, **kwargs)

    def values(self, *shape: int) -> torch.Tensor:
        return real(*shape)

    def zeros(self, *shape: int) -> Any:
        return self.call(aten.full.default, list(shape), 0, dtype=torch.float64)

    def of_tokens(self, width: int = 2, values: Callable[..., torch.Tensor] = real) -> Any:
        """An input per token, read in sorted order."""
        x = self.sketch.input(values(self.b, self.s, width))
        flat = self.call(aten.view.default, x, [self.tokens, width])
        return self.call(aten.index.Tensor, flat, [self.owner])

    def places(self) -> Any:
        base = self.call(aten.empty.memory_format, [self.count], dtype=torch.int64)
        up = {"start": 0, "step": 1, "dtype": torch.int64, "device": "cpu", "requires_grad": False}
        iota = self.call(prims.iota.default, self.count, **up)
        return self.call(aten.index_put.default, base, [self.rows], iota)

    def back(self, y: Any) -> Any:
        """Rows in the order of tokens, every token's choices added."""
        width = y.meta["val"].shape[1]
        y = self.call(aten.index.Tensor, y, [self.places()])
        y = self.call(aten.view.default, y, [self.tokens, self.k, width])
        return self.call(aten.sum.dim_IntList, y, [1])

    def ends(self) -> Any:
        keys = getattr(self, self.counted)
        real_keys = self.call(prims.convert_element_type.default, keys, torch.float32)
        self.counts = self.call(aten.histc.default, real_keys, EXPERTS, 0, self.most)
        return self.call(aten.cumsum.default, self.counts, 0, dtype=torch.int32)


def _read_rows(g: Sorted) -> list[Any]:
    return [g.back(g.call(aten.tanh.default, g.of_tokens()))]


def _read_choices(g: Sorted) -> list[Any]:
    weights = g.sketch.input(g.values(g.tokens, g.k))
    flat = g.call(aten.view.default, weights, [-1])
    one = g.call(aten.unsqueeze.default, g.call(aten.index.Tensor, flat, [g.rows]), 1)
    return [g.back(g.call(aten.mul.Tensor, g.of_tokens(), one))]


def _add_to_tokens(g: Sorted) -> list[Any]:
    y = g.call(aten.mul.Tensor, g.of_tokens(), g.call(aten.unsqueeze.default, g.in_order, 1))
    base = g.sketch.input(g.values(g.tokens, 2)) if g.own_base else g.zeros(g.tokens, 2)
    return [g.call(aten.index_put.default, base, [g.owner], y, True)]


def _add_to_places(g: Sorted) -> list[Any]:
    """What the gradient of ``y[places]`` does."""
    grad = g.sketch.input(g.values(g.count, 2))
    y = g.call(aten.index_put.default, g.zeros(g.count, 2), [g.places()], grad, True)
    y = g.call(aten.mul.Tensor, y, g.of_tokens())
    return [g.call(aten.index_put.default, g.zeros(g.count, 2), [g.rows], y, g.own_base)]


def _argsort_twice(g: Sorted) -> list[Any]:
    places = g.call(operator.getitem, g.call(aten.sort.default, g.rows), 1)
    y = g.call(aten.index.Tensor, g.of_tokens(), [places])
    return [g.call(aten.view.default, y, [g.tokens, g.k, 2])]


def _gather_and_scatter(g: Sorted) -> list[Any]:
    x = g.sketch.input(g.values(g.tokens, 3))
    at = g.call(aten.expand.default, g.call(aten.unsqueeze.default, g.owner, 1), [g.count, 3])
    y = g.call(aten.neg.default, g.call(aten.gather.default, x, 0, at))
    return [g.call(aten.scatter_add.default, g.zeros(g.tokens, 3), 0, at, y)]


def _select_and_add(g: Sorted) -> list[Any]:
    x = g.sketch.input(g.values(3, g.tokens))
    y = g.call(aten.neg.default, g.call(aten.index_select.default, x, 1, g.owner))
    base = x if g.own_base else g.zeros(3, g.tokens)
    return [g.call(aten.index_add.default, base, 1, g.owner, y)]


def _table_by_key(g: Sorted) -> list[Any]:
    """A bias per expert, and its gradient."""
    bias = g.sketch.input(g.values(EXPERTS, 2))
    y = g.call(aten.mul.Tensor, g.of_tokens(), g.call(aten.index.Tensor, bias, [g.in_order]))
    grad = g.call(aten.index_put.default, g.zeros(EXPERTS, 2), [g.in_order], y, True)
    return [g.back(y), grad]


def _sums_of_rows(g: Sorted) -> list[Any]:
    y = g.of_tokens()
    product = g.call(aten.mm.default, g.call(aten.permute.default, y, [1, 0]), g.of_tokens(3))
    return [g.call(aten.sum.dim_IntList, y, [0]), product]


def _groups(g: Sorted) -> list[Any]:
    weights = g.sketch.input(small(EXPERTS, 8, 16))
    y = g.call(aten._grouped_mm.default, g.of_tokens(8, small), weights, g.ends())
    return [g.back(y), g.counts]


def _gradient_of_groups(g: Sorted) -> list[Any]:
    left = g.call(aten.permute.default, g.of_tokens(8, small), [1, 0])
    return [g.call(aten._grouped_mm.default, left, g.of_tokens(16, small), g.ends())]


def _own_groups(g: Sorted) -> list[Any]:
    weights = g.sketch.input(real(EXPERTS, 3, 2))
    return [g.back(g.call(grouped_mm, g.of_tokens(3), weights, g.ends()))]


def _gradient_of_own_groups(g: Sorted) -> list[Any]:
    left = g.call(aten.permute.default, g.of_tokens(3), [1, 0])
    return [g.call(grouped_mm, left, g.of_tokens(2), g.ends())]


SORTED: list[Callable[[Sorted], list[Any]]] = [
    _read_rows,
    _read_choices,
    _add_to_tokens,
    _add_to_places,
    _argsort_twice,
    _gather_and_scatter,
    _select_and_add,
    _table_by_key,
    _sums_of_rows,
    _groups,
    _gradient_of_groups,
    _own_groups,
    _gradient_of_own_groups,
]


SORTS = st.builds(
    Sorted,
    b=st.integers(1, 3),
    s=st.integers(1, 4),
    k=st.integers(1, 3),
    skewed=st.booleans(),
    stable=st.booleans(),
    own_base=st.booleans(),
    counted=st.sampled_from(["keys", "choice", "in_order"]),
    most=st.sampled_from([EXPERTS - 1, EXPERTS]),
)


def runs_sorted(g: Sorted, outputs: Sequence[Any]) -> set[int]:
    """Run the graph along every axis that its ops allow; the sizes of these axes."""
    expected = g.sketch.finish(outputs)
    axes = analyze_axes(g.sketch.graph, find_rule)
    inside = frozenset(n for n in g.sketch.graph.nodes if n.op == "call_function")
    needed: set[Any] = set()
    stack = list(outputs)
    while stack:
        node = stack.pop()
        if node in inside and node not in needed:
            needed.add(node)
            stack += axes.operands(node)
    ran: set[int] = set()
    for axis in axes.axes(g.keys):
        roles = {axes.role(n, axis) for n in needed}
        if "entangled" in roles or any(axes.is_relative(n, axis) for n in outputs[:1]):
            continue
        body = build_body(
            outputs, axes=axes, axis=axis, inside=inside, tangent=set(), seed=outputs[0]
        )
        size = axes.table.sizes[axis]
        assert isinstance(size, int)
        for chunk in {1, 2, 3, size}:
            got = run_body(body, axes, g.sketch.values, chunk)
            assert_close([a.to(b.dtype) for a, b in zip(got, expected, strict=True)], expected)
        ran.add(axis)
    return ran


@pytest.mark.parametrize("make", SORTED, ids=lambda f: f.__name__.strip("_"))
def test_chunks_sort_their_own_rows(make: Callable[[Sorted], list[Any]]):
    most: list[int] = []

    @QUICK
    @given(st.data())
    def run(data: st.DataObject) -> None:
        torch.manual_seed(data.draw(st.integers(0, 99)))
        g = data.draw(SORTS)
        outputs = make(g)
        ran = runs_sorted(g, outputs)
        long = [n for n in (g.b, g.s) if n > 1]
        assert len(ran) >= len(long), "tokens can be looped over"
        most.append(len(ran))

    run()
    assert max(most) >= 2


def test_a_choice_is_no_loop_axis_where_rows_are_divided_by_its_size():
    g = Sorted()
    g.sketch.finish([g.back(g.of_tokens())])
    axes = analyze_axes(g.sketch.graph, find_rule)
    (choice,) = axes.dims(g.choice)[1]
    assert axes.role(g.owner, choice) == "entangled"


def test_rows_side_by_side_are_refused():
    """Their groups would have to be aligned, which those of a chunk are not."""
    g = Sorted(b=2, s=4, k=2)
    left = g.call(aten.permute.default, g.of_tokens(8, small), [1, 0])
    beside = g.call(aten.clone.default, left, memory_format=torch.contiguous_format)
    right, ends = g.of_tokens(16, small), g.ends()
    nodes = [g.call(aten._grouped_mm.default, x, right, ends) for x in (left, beside)]
    g.sketch.graph.output(tuple(nodes))
    axes = analyze_axes(g.sketch.graph, find_rule)
    assert [axes.is_opaque(n) for n in nodes] == [False, True]


# What looks into rows in the order of keys, or takes positions for something else.
LOOKS: dict[str, Callable[[Sorted], Any]] = {
    "the first rows": lambda g: g.call(aten.slice.Tensor, g.of_tokens(), 0, 0, 2),
    "a softmax over rows": lambda g: g.call(aten._softmax.default, g.of_tokens(), 0, False),
    "a running sum of rows": lambda g: g.call(aten.cumsum.default, g.of_tokens(), 0),
    "rows beside tokens": lambda g: g.call(
        aten.add.Tensor, g.of_tokens(), g.sketch.input(g.values(g.count, 2))
    ),
    "rows beside choices": lambda g: g.call(
        aten.mul.Tensor, g.in_order, g.call(aten.alias.default, g.keys)
    ),
    "rows cut apart": lambda g: g.call(aten.view.default, g.in_order, [g.tokens, g.k]),
    "positions as numbers": lambda g: g.call(aten.mul.Tensor, g.rows, 2),
    "positions compared": lambda g: g.call(aten.lt.Scalar, g.rows, 3),
    "positions modulo": lambda g: g.call(aten.remainder.Scalar, g.rows, g.k),
    "a division by something else": lambda g: g.call(
        aten.div.Tensor_mode, g.rows, g.k + 1, rounding_mode="floor"
    ),
    "a rounded division": lambda g: g.call(aten.div.Tensor_mode, g.rows, 2, rounding_mode=None),
    "another table's rows": lambda g: g.call(
        aten.index.Tensor, g.sketch.input(g.values(g.count + 1, 2)), [g.rows]
    ),
    "positions of positions": lambda g: g.call(aten.index.Tensor, g.rows, [g.rows]),
    "positions added up": lambda g: g.call(aten.sum.default, g.rows),
    "places as numbers": lambda g: g.call(aten.neg.default, g.places()),
    "counts as numbers": lambda g: g.call(aten.mul.Tensor, g.ends() and g.counts, 2),
    "ends as numbers": lambda g: g.call(aten.gt.Scalar, g.ends(), 2),
    "counts, run twice": lambda g: g.call(aten.cumsum.default, g.ends(), 0),
    "one row of several": lambda g: g.call(
        aten.index_put.default, g.zeros(g.tokens, 2), [g.owner], g.of_tokens()
    ),
    "keys in descending order": lambda g: g.call(
        operator.getitem, g.call(aten.sort.default, g.keys, 0, True), 0
    ),
    "scores in order": lambda g: g.call(
        operator.getitem,
        g.call(aten.sort.default, g.call(aten.mul.Tensor, g.keys, g.values(g.count)), 0),
        0,
    ),
    "the best tokens of every expert": lambda g: g.call(
        operator.getitem, g.call(aten.topk.default, g.choice, 2, 0), 0
    ),
}


@pytest.mark.parametrize("look", LOOKS)
def test_who_looks_at_the_order_is_refused(look: str):
    torch.manual_seed(0)
    g = Sorted()
    node = LOOKS[look](g)
    g.sketch.graph.output((node,))
    axes = analyze_axes(g.sketch.graph, find_rule)
    made = node.all_input_nodes[0] if node.target is operator.getitem else node
    roles = {axes.role(made, axis) for axis in axes.dims(g.choice)[0]}
    assert roles == {"entangled"}


# -- pointwise ops by their tag ------------------------------------------------------------------


def tagged() -> list[Any]:
    """Every overload of aten and prims that `find_rule` takes for pointwise because of its tag."""
    found: list[Any] = []
    for schema in torch._C._jit_get_all_schemas():
        namespace, _, name = schema.name.partition("::")
        if namespace in ("aten", "prims") and not schema.is_mutable:
            overload = getattr(
                getattr(getattr(torch.ops, namespace), name), schema.overload_name or "default"
            )
            rule = rules._TABLE.get(overload) or rules._TABLE.get(overload.overloadpacket)
            if torch.Tag.pointwise in overload.tags and rule is None:
                found.append(overload)
    return sorted(found, key=str)


def made_up(op: Any, values: Callable[..., torch.Tensor]) -> Call | None:
    """A call with operands of shapes that broadcast; None if a parameter is of an unknown kind."""
    shapes = iter([(4, 1, 6), (3, 6), (4, 3, 1), (1,)])
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for described in op._schema.arguments:
        kind = str(described.type)
        if kind == "Tensor":
            value: Any = values(*next(shapes))
        elif described.has_default_value():
            continue
        elif kind in ("number", "Scalar", "float", "int"):
            value = 2 if kind == "int" or values is INTS else 0.75
        elif kind in ("Optional[Tensor]",):
            value = None
        else:
            return None
        if described.kwarg_only:
            kwargs[described.name] = value
        else:
            args.append(value)
    return op, tuple(args), kwargs


def UNIT(*shape: int) -> torch.Tensor:
    return torch.rand(shape, dtype=torch.float64) * 0.8 + 0.1


def INTS(*shape: int) -> torch.Tensor:
    return torch.randint(1, 5, shape)


def BOOLS(*shape: int) -> torch.Tensor:
    return torch.rand(shape) > 0.5


def test_ops_with_the_pointwise_tag():
    """All of them at once: a tag that is wrong in some release of PyTorch must not pass unseen."""
    torch.manual_seed(0)
    ran: list[str] = []
    for op in tagged():
        for values in (UNIT, INTS, BOOLS):
            call = made_up(op, values)
            if call is None:
                break
            try:
                with torch.no_grad():
                    made = op(*call[1], **call[2])
            except (RuntimeError, NotImplementedError, TypeError):
                continue  # not for this dtype
            if not isinstance(made, torch.Tensor) or op is prims.signbit.default:
                break  # `aten.equal`; and torch's fake signbit has another dtype than the real one
            roles = check(call)
            if roles:
                assert set(roles.values()) == {"parallel"}
                ran.append(str(op))
            break
    assert len(ran) > 150, "few ops were tried"
    assert {"aten.gelu.default", "aten.lerp.Tensor", "aten.native_dropout_backward.default"} <= set(
        ran
    )


# -- what each rule says, once per family --------------------------------------------------------

X = (4, 3, 6)  # axes 0, 1, 2 of the first operand in what follows


def roles_of(call: Call) -> list[str]:
    """The role of the op along every dim of its first operand."""
    op, args, kwargs = call
    sketch = Sketch()
    node = sketch.call(op, *args, **kwargs)
    sketch.finish(sketch.outputs_of(node))
    axes = analyze_axes(sketch.graph, find_rule)
    return [
        axes.role(node, *product) if product else "-"
        for product in axes.dims(node.all_input_nodes[0])
    ]


ROLES: list[tuple[str, Call]] = [
    ("parallel parallel parallel", (aten.add.Tensor, (real(*X), real(3, 1)), {})),
    ("parallel parallel parallel", (aten.view.default, (real(*X), [12, 6]), {})),
    ("parallel parallel -", (aten.squeeze.dim, (real(4, 3, 1), 2), {})),
    ("parallel parallel parallel", (aten.permute.default, (real(*X), [2, 0, 1]), {})),
    ("parallel parallel -", (aten.expand.default, (real(4, 3, 1), [4, 3, 5]), {})),
    ("parallel entangled parallel", (aten.slice.Tensor, (real(*X), 1, 0, 2), {})),
    ("parallel parallel parallel", (aten.slice.Tensor, (real(*X), 1, 0, 3), {})),
    ("parallel parallel parallel", (aten.slice.Tensor, (real(*X), 1, None, 2**63 - 1), {})),
    ("parallel entangled parallel", (aten.slice.Tensor, (real(*X), 1, 0, -1), {})),
    ("parallel entangled parallel", (aten.select.int, (real(*X), -2, 0), {})),
    ("parallel parallel entangled", (aten.split.Tensor, (real(*X), 2, -1), {})),
    ("entangled parallel parallel", (aten.cat.default, ([real(*X), real(*X)],), {})),
    ("parallel parallel entangled", (aten.constant_pad_nd.default, (real(*X), [1, 0, 0, 0]), {})),
    ("parallel sum parallel", (aten.sum.dim_IntList, (real(*X), [-2], True), {})),
    ("sum sum sum", (aten.sum.default, (real(*X),), {})),
    ("parallel parallel entangled", (aten.mean.dim, (real(*X), [2]), {})),
    ("parallel parallel entangled", (aten.var_mean.correction, (real(*X), [2]), {"correction": 0})),
    ("entangled parallel parallel", (aten._softmax.default, (real(*X), 0, False), {})),
    ("parallel entangled parallel", (aten.topk.default, (real(*X), 2), {"dim": 1})),
    ("entangled parallel parallel", (aten.sort.stable, (real(*X),), {"stable": True, "dim": 0})),
    ("parallel sum", (aten.mm.default, (real(4, 3), real(3, 5)), {})),
    ("parallel parallel sum", (aten.bmm.default, (real(*X), real(4, 6, 5)), {})),
    ("parallel", (aten.addmm.default, (real(5), real(4, 3), real(3, 5)), {})),
    ("parallel sum", (aten.mv.default, (real(4, 3), real(3)), {})),
    ("parallel entangled", (aten.gather.default, (real(4, 3), 1, below(3, 4, 2)), {})),
    ("entangled entangled", (aten.gather.default, (real(4, 3), 1, below(3, 2, 2)), {})),
    ("parallel entangled", (aten.scatter.value, (real(4, 3), 1, below(3, 4, 1), 1.0), {})),
    ("entangled parallel", (aten.embedding.default, (real(4, 3), below(4, 5)), {})),
    ("entangled parallel", (aten.index.Tensor, (real(4, 3), [below(4, 5)]), {})),
    ("parallel entangled", (aten.index_select.default, (real(4, 3), 1, below(3, 2)), {})),
]


@pytest.mark.parametrize(("roles", "call"), ROLES, ids=lambda v: str(v[0]) if v[0] else None)
def test_roles(roles: str, call: Call):
    assert " ".join(roles_of(call)) == roles


def test_contracted_axis_of_addmm_is_closed():
    """The bias would be added once per chunk."""
    sketch = Sketch()
    node = sketch.call(aten.addmm.default, real(5), real(4, 3), real(3, 5))
    sketch.finish([node])
    axes = analyze_axes(sketch.graph, find_rule)
    (inner,) = axes.dims(node.all_input_nodes[1])[1]
    assert axes.role(node, inner) == "entangled"


# -- what is refused -----------------------------------------------------------------------------

REFUSED: list[Call] = [
    (aten.roll.default, (real(4, 3), [1]), {}),
    (aten.as_strided.default, (real(4, 3), [3, 4], [1, 3]), {}),
    (aten.flip.default, (real(4, 3), [0]), {}),
    (aten.index_put.default, (real(4, 3), [below(4, 2)], real(2, 3)), {}),
    (aten.index.Tensor, (real(3, 4, 2), [None, below(4, 5)]), {}),
    (aten.rand_like.default, (real(4, 3),), {}),
    (aten.bernoulli.p, (real(4, 3), 0.5), {}),
    (aten.native_dropout.default, (real(4, 3), 0.5, True), {}),
    (aten.rrelu.default, (real(4, 3), 0.1, 0.3, True), {}),
    (aten.view.dtype, (real(4, 3), torch.int64), {}),
    (aten.view.default, (real(4, 6), [6, 4]), {}),
    (aten.max.other, (real(4, 3), real(4, 3)), {}),
    (aten.floor_divide.default, (real(4, 3), real(4, 3)), {}),
]


@pytest.mark.parametrize("call", REFUSED, ids=lambda c: str(c[0]))
def test_refused(call: Call):
    op, args, kwargs = call
    sketch = Sketch()
    node = sketch.call(op, *args, **kwargs)
    axes = analyze_axes(sketch.graph, find_rule)
    assert axes.is_opaque(node)
    first = node.all_input_nodes[0]
    for axis in {*axes.axes(first), *axes.axes(node)}:
        assert axes.role(node, axis) == "entangled"


def test_writes_are_refused():
    for op in (aten.add_.Tensor, aten.copy_.default, aten.mul.out):
        sketch = Sketch()
        node = sketch.graph.call_function(op, (sketch.input(real(3)), sketch.input(real(3))))
        assert find_rule(node) is None, op


def test_masks_are_refused_as_indices():
    for mask in (torch.tensor([True, False, True, True]), torch.tensor([1, 0, 1, 1]).byte()):
        sketch = Sketch()
        x, index = sketch.input(real(4, 3)), sketch.input(mask)
        node = sketch.graph.call_function(aten.index.Tensor, (x, [index]))
        node.meta["val"] = x.meta["val"].narrow(0, 0, 3)
        assert analyze_axes(sketch.graph, find_rule).is_opaque(node)


def test_bits_are_no_values():
    """``view(dtype)`` shares its name with ``view`` alone: a body keeps the call as it is."""
    sketch = Sketch()
    table = sketch.input(below(2**50, 3))
    bits = sketch.call(aten.view.dtype, table, torch.float64)
    node = sketch.call(aten.mul.Tensor, sketch.input(real(4, 3)), bits)
    (expected,) = sketch.finish([node])
    axes = analyze_axes(sketch.graph, find_rule)
    (rows,) = axes.dims(node)[0]
    body = build_body(
        [node], axes=axes, axis=rows, inside=frozenset([node]), tangent=set(), seed=node
    )
    assert_close(run_body(body, axes, sketch.values, 3), [expected])
    assert not rules.is_view(bits)
    assert rules.size_argument(bits) is None

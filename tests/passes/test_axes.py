"""Axes: what unifies, what splits into factors, what stays apart."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch

import passes
from passes.axes import AxisTable, analyze_axes, divide
from passes.rules import find_rule
from tests.passes.graphs import Sketch, trace

aten = torch.ops.aten


# -- the table -----------------------------------------------------------------------------------


def test_fresh_axes_are_different():
    table = AxisTable()
    a, b = table.fresh(6), table.fresh(6)
    assert table.resolve(a) != table.resolve(b), "sizes alone prove nothing"
    assert table.fresh(1) == (), "a dim of size one is the empty product"


def test_unify_equal_sizes():
    table = AxisTable()
    a, b, c = (table.fresh(6) for _ in range(3))
    assert table.unify(a, b)
    assert table.resolve(a) == table.resolve(b)
    assert table.resolve(a) != table.resolve(c)
    assert table.unify(b, c)
    assert table.resolve(a) == table.resolve(c)


def test_unify_refines_the_coarser_side():
    table = AxisTable()
    b, s = table.fresh(2), table.fresh(5)
    flat = table.fresh(10)
    assert table.unify(flat, (*b, *s))
    assert table.resolve(flat) == (*b, *s)
    assert table.size(flat) == 10


def test_unify_refines_both_sides():
    """(2 6) and (6 2) have the common factors (2 3 2)."""
    table = AxisTable()
    left = (*table.fresh(2), *table.fresh(6))
    right = (*table.fresh(6), *table.fresh(2))
    assert table.unify(left, right)
    assert table.resolve(left) == table.resolve(right)
    assert [table.sizes[a] for a in table.resolve(left)] == [2, 3, 2]


def test_unify_refuses_factors_that_do_not_match():
    table = AxisTable()
    left = (*table.fresh(2), *table.fresh(3))
    right = (*table.fresh(3), *table.fresh(2))
    assert not table.unify(left, right)
    assert not table.unify(table.fresh(4), table.fresh(6))
    assert not table.unify(table.fresh(4), table.fresh(5))


def test_unify_with_the_empty_product():
    table = AxisTable()
    assert table.unify((), ())
    assert not table.unify((), table.fresh(3))


def test_order_of_factors_matters():
    """(b s) and (s b) of the same axes are aligned only where b and s are the same axis."""
    table = AxisTable()
    b, s = table.fresh(4), table.fresh(4)
    assert table.unify((*b, *s), (*s, *b))
    assert table.resolve(b) == table.resolve(s), "the op that equated them says so"


def test_regroup_splits_and_merges():
    table = AxisTable()
    b, s, h = table.fresh(2), table.fresh(5), table.fresh(6)
    assert table.regroup((*b, *s, *h), [10, 6]) == ((*b, *s), h)
    assert table.regroup((*b, *s, *h), [2, 1, 5, 6]) == (b, (), s, h)
    split = table.regroup((*b, *s, *h), [10, 2, 3])
    assert split is not None
    assert [table.size(p) for p in split] == [10, 2, 3]
    assert table.resolve(h) == (*split[1], *split[2])


def test_regroup_refuses_to_cut_a_factor():
    table = AxisTable()
    a, b = table.fresh(4), table.fresh(6)
    assert table.regroup((*a, *b), [6, 4]) is None
    assert table.regroup((*a, *b), [24, 2]) is None, "more elements than there are"
    assert table.regroup((*a, *b), [4]) is None, "fewer"


def test_symbolic_sizes():
    s = sympy.Symbol("s", positive=True, integer=True)
    table = AxisTable()
    batch, tokens = table.fresh(2), table.fresh(s)
    flat = table.fresh(2 * s)
    assert table.unify(flat, (*batch, *tokens))
    assert table.resolve(flat) == (*batch, *tokens)
    heads = table.fresh(8 * s)
    dims = table.regroup(heads, [s, 4, 2])
    assert dims is not None
    assert [table.size(p) for p in dims] == [s, 4, 2]
    assert not table.unify(table.fresh(s), table.fresh(7)), "equal by chance is not equal"


@pytest.mark.parametrize(
    ("top", "bottom", "quotient"),
    [(6, 3, 2), (6, 4, None), (6, 0, None), ("4*s", "s", 4), ("s", 2, None), ("s*t", "t", "s")],
)
def test_divide(top: object, bottom: object, quotient: object):
    def of(x: Any) -> Any:
        return sympy.sympify(x) if isinstance(x, str) else x

    assert divide(of(top), of(bottom)) == of(quotient)


# -- graphs --------------------------------------------------------------------------------------


def test_equal_sizes_are_different_axes_until_an_op_equates_them():
    graph = trace(lambda x, y: (x * 2, y * 2), torch.randn(4, 4), torch.randn(4))
    x, y = graph.find_nodes(op="placeholder")
    axes = analyze_axes(graph, find_rule)
    assert len({*axes.axes(x), *axes.axes(y)}) == 3

    graph = trace(lambda x, y: x + y, torch.randn(4, 4), torch.randn(4))
    x, y = graph.find_nodes(op="placeholder")
    axes = analyze_axes(graph, find_rule)
    assert axes.dims(y)[0] == axes.dims(x)[1] != axes.dims(x)[0]


def test_view_of_batch_and_tokens():
    """[B, S, H] -> [B*S, H] -> linear -> back: b, s are the same axes all along."""

    def fn(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return (x.view(10, 4) @ w).view(2, 5, 6)

    graph = trace(fn, torch.randn(2, 5, 4), torch.randn(4, 6))
    x, w = graph.find_nodes(op="placeholder")
    axes = analyze_axes(graph, find_rule)
    (matmul,) = graph.find_nodes(op="call_function", target=aten.mm.default)
    b, s, _ = axes.dims(x)
    assert axes.dims(matmul) == ((*b, *s), axes.dims(w)[1])
    assert axes.dims(list(graph.nodes)[-2]) == (b, s, axes.dims(w)[1])
    assert axes.role(matmul, *s) == "parallel"
    assert axes.role(matmul, *axes.dims(w)[0]) == "sum"


def test_a_later_op_refines_an_earlier_tensor():
    """A flat tensor learns from what is added to it that it has two axes."""

    def fn(flat: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return flat.exp() + x.view(10)

    graph = trace(fn, torch.randn(10), torch.randn(2, 5))
    flat, x = graph.find_nodes(op="placeholder")
    axes = analyze_axes(graph, find_rule)
    assert axes.dims(flat)[0] == axes.dims(x)[0] + axes.dims(x)[1]


def test_roles_without_the_axis_are_absent():
    graph = trace(lambda x, w: x @ w.exp(), torch.randn(5, 4), torch.randn(4, 6))
    x, _ = graph.find_nodes(op="placeholder")
    axes = analyze_axes(graph, find_rule)
    (exp,) = graph.find_nodes(op="call_function", target=aten.exp.default)
    assert axes.role(exp, *axes.dims(x)[0]) == "absent"


def test_symbolic_graph():
    def fn(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        b, s, h = x.shape
        return (x.view(b * s, h) @ w).view(b, s, 6)

    graph = trace(fn, torch.randn(2, 5, 4), torch.randn(4, 6), symbolic=True)
    x = next(n for n in graph.find_nodes(op="placeholder") if n.meta["val"].dim() == 3)
    axes = analyze_axes(graph, find_rule)
    (matmul,) = graph.find_nodes(op="call_function", target=aten.mm.default)
    assert axes.dims(matmul)[0] == axes.dims(x)[0] + axes.dims(x)[1]
    assert not any(axes.is_opaque(n) for n in graph.find_nodes(op="call_function", target=aten.mm))


# -- not handled, and so refused (the module's list) ---------------------------------------------


def test_an_op_without_a_rule_is_opaque():
    graph = trace(lambda x: x.roll(1, 0) * 2, torch.randn(4, 3))
    (x,) = graph.find_nodes(op="placeholder")
    axes = analyze_axes(graph, find_rule)
    (roll,) = graph.find_nodes(op="call_function", target=aten.roll.default)
    assert axes.is_opaque(roll)
    assert not set(axes.axes(roll)) & set(axes.axes(x)), "fresh axes"
    for axis in (*axes.axes(x), *axes.axes(roll)):
        assert axes.role(roll, axis) == "entangled"


def test_a_view_across_factors_is_opaque():
    graph = trace(lambda x: x.view(6, 4), torch.randn(4, 6))
    (view,) = graph.find_nodes(op="call_function", target=aten.view.default)
    assert analyze_axes(graph, find_rule).is_opaque(view)


def test_unbacked_sizes_unify_with_nothing():
    """The number of true values is known at run time only: its axis is one of its own."""
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        graph = trace(lambda x: x.nonzero().exp(), torch.randn(4), symbolic=True)
    (nonzero,) = graph.find_nodes(op="call_function", target=aten.nonzero.default)
    axes = analyze_axes(graph, find_rule)
    assert axes.is_opaque(nonzero)


def test_a_rule_that_meets_an_unknown_form_refuses():
    """A rule's dims that are not those of the traced value are not believed."""
    sketch = Sketch()
    node = sketch.call(aten.sum.dim_IntList, torch.randn(4, 3), [0])
    node.meta["val"] = sketch.mode.from_tensor(torch.randn(7))
    assert analyze_axes(sketch.graph, find_rule).is_opaque(node)


# -- the house -----------------------------------------------------------------------------------


def test_passes_never_import_mstc():
    root = Path(passes.__file__).parent
    files = sorted(root.rglob("*.py"))
    assert len(files) > 10
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            assert not any(n.split(".")[0] == "mstc" for n in names), path.name

"""Bodies: canonical text, rewritten sizes, and what goes in and out."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx import Graph, Node
from torch.nn import functional as F

from passes.axes import Axes, analyze_axes
from passes.body import Body, BodyError, build_body, is_widening, sizes_of
from passes.rules import find_rule
from tests.passes.graphs import Recorder, Sketch, assert_close, compiled, run_body, trace

aten = torch.ops.aten
Tensor = torch.Tensor


def real(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def body_of(graph: Graph, axes: Axes, axis: int, outputs: list[Node], **more: Any) -> Body:
    calls = [n for n in graph.nodes if n.op == "call_function"]
    more = {"inside": frozenset(calls), **more}
    return build_body(outputs, axes=axes, axis=axis, tangent=set(), seed=calls[-1], **more)


def bodies(fn: Callable[..., Any], *inputs: Tensor, **options: Any) -> list[Body]:
    """The bodies of the loops that the passes make of a function."""
    recorder = Recorder(**{"chunk_rows": 3, **options})
    compiled(fn, inputs, recorder)
    made: list[Body] = []
    for planned in recorder.planned:
        made += [loop.body for loop in planned.chunked.loops] if planned.chunked else []
    return made


def mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.gelu(x @ up) @ down


def leaf(*shape: int) -> Tensor:
    return real(*shape).requires_grad_()


def test_equal_layers_give_equal_text():
    def fn(x: Tensor, *weights: Tensor) -> Tensor:
        for up, down in zip(weights[::2], weights[1::2], strict=True):
            x = x + mlp(x.tanh(), up, down)
        return x.square().sum()

    weights = [leaf(4, 32), leaf(32, 4)] * 3
    made = bodies(fn, leaf(2, 11, 4), *[w.detach().requires_grad_() for w in weights])
    assert len(made) == 6, "forward and backward of three layers"
    assert len({b.spec for b in made}) == 2, "one text each"


def test_another_length_gives_the_same_text():
    """Sizes are arguments: one text serves any length."""
    specs = [
        {b.spec for b in bodies(lambda *p: mlp(*p).sum(), leaf(n, 4), leaf(4, 32), leaf(32, 4))}
        for n in (11, 23)
    ]
    assert specs[0] == specs[1]


def test_text_names_no_sizes_of_axes():
    sketch = Sketch()
    x = sketch.input(real(7, 5))
    view = sketch.call(aten.view.default, x, [35])
    wide = sketch.call(aten.expand.default, sketch.call(aten.unsqueeze.default, view, 1), [35, 3])
    full = sketch.call(aten.full.default, [35, 3], 2.0, dtype=torch.float64, device="cpu")
    node = sketch.call(aten.mul.Tensor, wide, full)
    (expected,) = sketch.finish([node])
    axes = analyze_axes(sketch.graph, find_rule)
    for dim in range(2):
        (axis,) = axes.dims(x)[dim]
        body = body_of(sketch.graph, axes, axis, [node])
        text = json.loads(body.spec)["body"]
        assert not any(size in text for size in ("35", "7,", "5,"))
        for chunk in (1, 2, 4):
            assert_close(run_body(body, axes, sketch.values, chunk), [expected])


def test_a_slice_of_everything_is_left_out():
    graph = trace(lambda x: x[:, 0:5].exp(), real(7, 5))
    (x,) = graph.find_nodes(op="placeholder")
    out = list(graph.nodes)[-2]
    axes = analyze_axes(graph, find_rule)
    (axis,) = axes.dims(x)[1]
    body = body_of(graph, axes, axis, [out])
    assert "slice" not in json.loads(body.spec)["body"]
    values = {x: real(7, 5)}
    assert_close(run_body(body, axes, values, 2), [values[x].exp()])


def test_a_matrix_product_over_the_axis_leaves_as_its_operands():
    sketch = Sketch()
    x, g = sketch.input(real(11, 4)), sketch.input(real(11, 6))
    node = sketch.call(aten.mm.default, sketch.call(aten.t.default, x), g)
    (expected,) = sketch.finish([node])
    axes = analyze_axes(sketch.graph, find_rule)
    (axis,) = axes.dims(x)[0]
    body = body_of(sketch.graph, axes, axis, [node])
    assert [o.kind for o in body.outputs] == ["matmul"]
    assert "mm" not in json.loads(body.spec)["body"]
    for chunk in (1, 4, 11):
        assert_close(run_body(body, axes, sketch.values, chunk), [expected])


def test_sums_of_low_precision_accumulate_in_float32():
    sketch = Sketch()
    x = sketch.input(real(4096, 2).bfloat16())
    node = sketch.call(aten.sum.dim_IntList, x, [0])
    (expected,) = sketch.finish([node])
    axes = analyze_axes(sketch.graph, find_rule)
    (axis,) = axes.dims(x)[0]
    body = body_of(sketch.graph, axes, axis, [node])
    (output,) = body.outputs
    assert (output.dtype, output.accumulate) == (torch.bfloat16, torch.float32)
    (got,) = run_body(body, axes, sketch.values, 1)
    assert got.dtype == torch.float32
    exact = sketch.values[x].double().sum(0)
    assert (got.double() - exact).abs().max() <= (expected.double() - exact).abs().max()
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-4)


def test_memory_order_of_outputs_is_kept():
    sketch = Sketch()
    x = sketch.input(real(6, 4).t())
    node = sketch.call(aten.exp.default, x)
    (expected,) = sketch.finish([node])
    axes = analyze_axes(sketch.graph, find_rule)
    (axis,) = axes.dims(x)[1]
    (got,) = run_body(body_of(sketch.graph, axes, axis, [node]), axes, sketch.values, 2)
    assert_close([got], [expected])
    assert got.stride() == expected.stride()


def test_slices_through_a_merged_dim():
    """A boundary tensor [(b s), h] is cut along s, in the middle of its first dim."""
    sketch = Sketch()
    flat, x = sketch.input(real(6, 4)), sketch.input(real(2, 3, 4))
    node = sketch.call(aten.add.Tensor, flat, sketch.call(aten.view.default, x, [6, 4]))
    (expected,) = sketch.finish([node])
    axes = analyze_axes(sketch.graph, find_rule)
    (tokens,) = axes.dims(x)[1]
    body = body_of(sketch.graph, axes, tokens, [node])
    entries = {n: i["slice"] for n, i in zip(body.inputs, json.loads(body.spec)["inputs"])}
    assert entries[flat][0] == 0
    assert entries[flat][2] == 1, "the inner factor"
    for chunk in (1, 2, 3):
        assert_close(run_body(body, axes, sketch.values, chunk), [expected])


def test_sizes_start_with_the_loop_axis():
    graph = trace(mlp, real(11, 4), real(4, 32), real(32, 4))
    axes = analyze_axes(graph, find_rule)
    x = next(iter(graph.nodes))
    (axis,) = axes.dims(x)[0]
    body = body_of(graph, axes, axis, [list(graph.nodes)[-2]])
    assert body.axes[0] == axis
    assert sorted(map(int, sizes_of(body, axes))) == [4, 4, 11, 32]
    assert sizes_of(body, axes)[0] == 11


# -- refused -------------------------------------------------------------------------------------


def test_a_sum_read_inside_is_refused():
    sketch = Sketch()
    x = sketch.input(real(6, 4))
    total = sketch.call(aten.sum.dim_IntList, x, [0])
    node = sketch.call(aten.mul.Tensor, x, sketch.call(aten.view.default, total, [1, 4]))
    axes = analyze_axes(sketch.graph, find_rule)
    (axis,) = axes.dims(x)[0]
    with pytest.raises(BodyError, match="reads a sum over the axis"):
        body_of(sketch.graph, axes, axis, [total, node])
    alone = body_of(sketch.graph, axes, axis, [node])
    assert total in alone.inputs, "made by another loop, it comes in whole"


def test_an_input_with_the_axis_twice_is_refused():
    sketch = Sketch()
    x = sketch.input(real(4, 4))
    added = sketch.call(aten.add.Tensor, x, sketch.call(aten.t.default, x))
    axes = analyze_axes(sketch.graph, find_rule)
    (axis,) = axes.dims(x)[0]
    with pytest.raises(BodyError, match="twice"):
        body_of(sketch.graph, axes, axis, [added])


def test_a_pick_without_its_op_is_refused():
    sketch = Sketch()
    node = sketch.call(aten.max.dim, real(6, 4), 1)
    (first, _) = sketch.outputs_of(node)
    axes = analyze_axes(sketch.graph, find_rule)
    (axis,) = axes.dims(first)[0]
    with pytest.raises(BodyError, match="several values"):
        body_of(sketch.graph, axes, axis, [first], inside=frozenset([first]))


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x.exp() * x.shape[0],
        lambda x: x.exp() * torch.full((x.shape[0], 1), x.shape[0] * 1.0, dtype=torch.float64),
    ],
    ids=["operand", "filled with"],
)
def test_a_size_that_only_run_time_knows_is_refused(fn: Callable[..., Tensor]):
    graph = trace(fn, real(6, 4), symbolic=True)
    x = next(n for n in graph.find_nodes(op="placeholder") if n.meta["val"].dim() == 2)
    axes = analyze_axes(graph, find_rule)
    (axis,) = axes.dims(x)[0]
    with pytest.raises(BodyError, match="known at run time only"):
        body_of(graph, axes, axis, [list(graph.nodes)[-2]])


def test_nodes_of_other_regions_are_read_not_made_again():
    sketch = Sketch()
    x = sketch.input(real(6, 4))
    inner = sketch.call(aten.exp.default, x)
    view = sketch.call(aten.view.default, inner, [6, 4, 1])
    node = sketch.call(aten.mul.Tensor, view, real(4, 5))
    axes = analyze_axes(sketch.graph, find_rule)
    (axis,) = axes.dims(x)[0]
    mine = frozenset([node])
    sunk = body_of(sketch.graph, axes, axis, [node], inside=mine)
    assert inner in sunk.inputs, "a view is made again inside"
    read = body_of(sketch.graph, axes, axis, [node], inside=mine, foreign=frozenset([inner, view]))
    assert view in read.inputs


def test_a_wider_copy_is_made_inside():
    """A norm in float32 reads a stream in bfloat16: that is what a loop is given, and keeps."""

    def layer(x: Tensor, w: Tensor, up: Tensor, down: Tensor) -> Tensor:
        stream = x @ w
        wide = stream.float()
        normed = (wide * wide.square().mean(-1, keepdim=True).rsqrt()).to(x.dtype)
        return (stream + mlp(normed, up, down)).square().sum()

    shapes = (11, 4), (4, 4), (4, 32), (32, 4)
    inputs = [real(*s).bfloat16().requires_grad_() for s in shapes]
    forward, backward = bodies(layer, *inputs)
    for body in (forward, backward):
        split = [n.meta["val"] for n in body.split_inputs if n.meta["val"].shape == (11, 4)]
        assert split
        assert all(value.dtype == torch.bfloat16 for value in split)


def test_a_wider_copy_that_stays_is_read():
    """The graph returns it: what it is made of need not stay as well."""

    def fn(x: Tensor, w: Tensor, up: Tensor, down: Tensor) -> Any:
        wide = (x @ w).double()
        return mlp(wide, up, down).square().sum(), wide

    inputs = [real(11, 4).float(), real(4, 4).float(), real(4, 32), real(32, 4)]
    made = bodies(fn, *(i.requires_grad_() for i in inputs))
    assert made
    for body in made:
        assert all(n.meta["val"].dtype == torch.float64 for n in body.split_inputs)


def test_a_wider_copy_of_what_is_written_to_is_read():
    """Else the loop would read what the model has changed, and be refused."""

    def fn(buffer: Tensor, up: Tensor, down: Tensor) -> Tensor:
        wide = buffer.double()
        made = mlp(wide, up, down)
        buffer.add_(1)
        return made.square().sum() + (wide @ down.t()[:, :6]).sin().sum()

    inputs = [real(11, 4).float(), leaf(4, 32), leaf(32, 4)]
    made = bodies(fn, *inputs)
    assert made
    for body in made:
        assert all(n.meta["val"].dtype == torch.float64 for n in body.split_inputs)


def test_a_wider_copy_on_another_device_is_read():
    node = Graph().placeholder("x")
    node.meta["val"] = torch.empty(4, dtype=torch.bfloat16, device="meta")
    for device, widens in (("meta", True), ("cpu", False)):
        made = node.graph.call_function(
            aten._to_copy.default, (node,), {"dtype": torch.float32, "device": device}
        )
        made.meta["val"] = torch.empty(4, device=device)
        assert is_widening(made) == widens

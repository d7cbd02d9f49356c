"""Copies of graphs, and tensors under other names."""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from passes.copies import drop_other_names
from tests.passes.graphs import Sketch, run_graph

aten = torch.ops.aten


def ops(graph: Graph) -> list[str]:
    return [str(n.target) for n in graph.nodes if n.op == "call_function"]


def values(sketch: Sketch) -> list[torch.Tensor]:
    return list(sketch.values.values())


def test_readers_get_the_tensor_itself():
    """Names of names, several readers, a view of a name, an operand that is read twice."""
    sketch = Sketch()
    x = sketch.input(torch.randn(4, 6))
    name = sketch.call(aten.detach.default, sketch.call(aten.alias.default, x))
    twice = sketch.call(aten.mul.Tensor, name, name)
    turned = sketch.call(aten.permute.default, name, [1, 0])
    before = sketch.finish([twice, sketch.call(aten.mm.default, turned, x)])
    graph = drop_other_names(sketch.graph)
    assert ops(graph) == ["aten.mul.Tensor", "aten.permute.default", "aten.mm.default"]
    graph.lint()
    for old, new in zip(before, run_graph(graph, values(sketch)), strict=True):
        assert torch.equal(old, new)


def test_what_is_returned_keeps_its_name():
    sketch = Sketch()
    sine = sketch.call(aten.sin.default, sketch.input(torch.randn(3)))
    name = sketch.call(aten.detach.default, sine)
    sketch.finish([name, sketch.call(aten.cos.default, name)])
    graph = drop_other_names(sketch.graph)
    assert ops(graph) == ["aten.sin.default", "aten.detach.default", "aten.cos.default"]
    (output,) = graph.find_nodes(op="output")
    returned, cosine = output.args[0]
    assert isinstance(returned, Node)
    assert returned.target is aten.detach.default
    assert cosine.args[0] is returned.args[0]


def test_the_graph_that_is_given_stays():
    sketch = Sketch()
    name = sketch.call(aten.detach.default, sketch.input(torch.randn(3)))
    sketch.finish([sketch.call(aten.cos.default, name)])
    before = str(sketch.graph)
    assert drop_other_names(sketch.graph) is not sketch.graph
    assert str(sketch.graph) == before


def test_nothing_to_drop():
    sketch = Sketch()
    x = sketch.input(torch.randn(3))
    sketch.finish([sketch.call(aten.detach.default, sketch.call(aten.cos.default, x))])
    assert drop_other_names(sketch.graph) is sketch.graph

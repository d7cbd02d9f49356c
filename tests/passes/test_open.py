"""Closures are computed inside the graphs that read their results."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from passes.open import Opening, open_inputs

MODE = FakeTensorMode()


def fake(*shape: int, **kwargs: Any) -> Tensor:
    with MODE:
        return torch.randn(*shape, **kwargs)


def dynamo_graph(fn: Any, *examples: Tensor) -> fx.GraphModule:
    """As Dynamo makes it: torch functions, a flat tuple of outputs, ``example_value``s."""
    gm = fx.symbolic_trace(fn)
    values: dict[fx.Node, Any] = {}
    given = (t if isinstance(t, FakeTensor) else MODE.from_tensor(t) for t in examples)
    for number, node in enumerate(gm.graph.nodes):
        if node.op == "placeholder":
            values[node] = next(given)
            node._dynamo_source = number
        elif node.op != "output":
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = (
                getattr(args[0], node.target)(*args[1:], **kwargs)
                if node.op == "call_method"
                else node.target(*args, **kwargs)
            )
        if node in values:
            node.meta["example_value"] = values[node]
    return gm


def closure() -> fx.GraphModule:
    return fx.symbolic_trace(lambda hidden, weight: F.linear(hidden, weight).tanh())


def opening(**changes: Any) -> Opening:
    fields: dict[str, Any] = {
        "closure": closure(),
        "casts": (),
        "autocast": (),
        "parts": (fake(4, 3), fake(5, 3)),
        "sources": ("hidden", "weight"),
    }
    return Opening(**(fields | changes))


def loss_graph(dtype: torch.dtype = torch.float32) -> fx.GraphModule:
    return dynamo_graph(
        lambda labels, logits: (F.cross_entropy(logits, labels), labels + 1),
        torch.empty(4, dtype=torch.int64),
        fake(4, 5, dtype=dtype),
    )


H, W, LABELS = torch.randn(4, 3), torch.randn(5, 3), torch.tensor([0, 4, 2, 1])


def test_parts_take_the_place_of_the_input():
    gm = loss_graph()
    before = str(gm.graph)
    opened = open_inputs(gm, {1: opening()})
    assert str(gm.graph) == before
    inputs = opened.graph.find_nodes(op="placeholder")
    assert [n.name for n in inputs] == ["labels", "logits_part0", "logits_part1"]
    assert [n._dynamo_source for n in inputs] == [0, "hidden", "weight"]
    loss, more = opened(LABELS, H, W)
    torch.testing.assert_close(loss, F.cross_entropy(F.linear(H, W).tanh(), LABELS))
    assert torch.equal(more, LABELS + 1)


def test_what_is_inlined_has_values_and_lines():
    made = closure()
    for node in made.graph.nodes:
        node.meta["stack_trace"] = f"line of {node.name}"
    opened = open_inputs(loss_graph(), {1: opening(closure=made)})
    inlined = [n for n in opened.graph.nodes if n.meta.get("stack_trace")]
    assert [n.meta["stack_trace"] for n in inlined] == ["line of linear", "line of tanh"]
    assert all(n.meta["example_value"].shape == (4, 5) for n in inlined)


def test_casts_and_autocast_of_the_call_that_returned_it():
    given = opening(casts=(torch.float64,), autocast=(("cpu", True, torch.bfloat16),))
    opened = open_inputs(loss_graph(torch.float64), {1: given})
    with torch.autocast("cpu", torch.bfloat16):
        expected = F.linear(H, W).tanh().double()
    depth = torch.autocast_increment_nesting()
    loss, _ = opened(LABELS, H, W)
    assert torch.autocast_increment_nesting() == depth + 1
    for _ in range(2):
        torch.autocast_decrement_nesting()
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, F.cross_entropy(expected, LABELS))
    assert not torch.is_autocast_enabled("cpu")


def test_two_opened_inputs_and_one_that_stays():
    gm = dynamo_graph(lambda a, b, c: ((a * b).sum() + c,), fake(4, 5), fake(4, 5), torch.empty(()))
    opened = open_inputs(gm, {0: opening(), 1: opening()}, {2: fake(())})
    assert len(opened.graph.find_nodes(op="placeholder")) == 5
    (got,) = opened(H, W, H + 1, W, torch.tensor(2.0))
    expected = (F.linear(H, W).tanh() * F.linear(H + 1, W).tanh()).sum() + 2
    torch.testing.assert_close(got, expected)

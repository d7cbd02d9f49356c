"""A rewritten graph with another interface never gets through."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.fx import Graph

from passes.verify import VerificationError, verify_same_interface
from tests.passes.graphs import trace

Tensor = torch.Tensor
T = torch.randn(4, 3)


def graph_of(fn: Callable[..., object]) -> Graph:
    return trace(fn, torch.randn(4, 3), torch.randn(4, 3))


def test_the_same_interface():
    verify_same_interface(
        graph_of(lambda x, y: (x + y, x.sum())), graph_of(lambda x, y: (y + x, (x * 1).sum()))
    )


@pytest.mark.parametrize(
    ("message", "changed"),
    [
        ("output 0 was", lambda x, y: ((x + y).t(), x.sum())),
        ("output 1 was", lambda x, y: (x + y, x.double().sum())),
        ("output 1 was", lambda x, y: (x + y, x.sum(0))),
        ("2 outputs became 1", lambda x, y: (x + y,)),
    ],
)
def test_a_changed_output_is_named(message: str, changed: Callable[..., object]):
    with pytest.raises(VerificationError, match=message):
        verify_same_interface(graph_of(lambda x, y: (x + y, x.sum())), graph_of(changed))


def test_an_output_that_became_none():
    old, new = (graph_of(lambda x, y: (x + y, x.sum())) for _ in range(2))
    (output,) = new.find_nodes(op="output")
    output.args = ((None, output.args[0][1]),)  # type: ignore[index]
    with pytest.raises(VerificationError, match="output 0 was"):
        verify_same_interface(old, new)


def test_changed_inputs():
    old = graph_of(lambda x, y: (x + y,))
    new = trace(lambda x: (x + x,), torch.randn(4, 3))
    with pytest.raises(VerificationError, match="inputs changed"):
        verify_same_interface(old, new)


def test_a_malformed_graph():
    old, new = (graph_of(lambda x, y: (x + y,)) for _ in range(2))
    add = next(n for n in new.nodes if n.op == "call_function")
    new.find_nodes(op="output")[0].prepend(add)
    placeholder = new.find_nodes(op="placeholder")[1]
    new.find_nodes(op="output")[0].prepend(placeholder)  # after the node that reads it
    with pytest.raises((RuntimeError, VerificationError)):
        verify_same_interface(old, new)


def test_a_forward_output_that_waits_for_the_backward():
    """The partitioner would fail on it, where nothing of ours could fall back any more."""

    def joint(late: bool) -> Graph:
        graph = trace(lambda p, t: (p.sin() * t.sum() if late else p.sin(), t * 2), T, T.clone())
        graph.find_nodes(op="placeholder")[1].target = "tangents_1"
        return graph

    verify_same_interface(joint(late=False), joint(late=False))
    with pytest.raises(VerificationError, match=r"output 0 .* tangent"):
        verify_same_interface(joint(late=False), joint(late=True))

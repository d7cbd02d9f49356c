"""Outputs have the strides that they had before the rewrite."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mstc
from passes.layout import LayoutError, keep_strides
from tests.models import (
    compile_mst,
    fresh_compiler,  # noqa: F401  (an autouse fixture)
    has_loops,
    tokens,
)
from tests.passes.graphs import run_graph, trace

X = torch.arange(24.0).view(4, 6)


def test_an_output_is_copied_into_the_old_strides():
    old = trace(lambda x: (x[:, 2:], x.t(), x * 2), X)
    new = trace(lambda x: (x[:, 2:].clone(), x.t(), x * 2), X)
    keep_strides(old, new)
    new.lint()
    results = run_graph(new, [X])
    assert [r.stride() for r in results] == [(6, 1), (1, 6), (6, 1)]
    for result, expected in zip(results, run_graph(old, [X]), strict=True):
        assert torch.equal(result, expected)
    (output,) = new.find_nodes(op="output")
    assert output.args[0][0].meta["val"].stride() == (6, 1)
    assert len(new.find_nodes(op="call_function", target=torch.ops.aten.copy.default)) == 1


def test_the_same_output_twice_is_copied_once():
    old = trace(lambda x: (lambda y: (y, y))(x[:, 2:]), X)
    new = trace(lambda x: (lambda y: (y, y))(x[:, 2:].clone()), X)
    keep_strides(old, new)
    (output,) = new.find_nodes(op="output")
    assert output.args[0][0] is output.args[0][1]


def test_equal_strides_change_nothing():
    old, new = (trace(lambda x: (x.t() + 1, x[:1, 2:]), X) for _ in range(2))
    before = str(new)
    keep_strides(old, new)
    assert str(new) == before


def test_symbolic_strides_that_differ():
    old = trace(lambda x: (x[:, 2:],), X, symbolic=True)
    new = trace(lambda x: (x[:, 2:].clone(),), X, symbolic=True)
    with pytest.raises(LayoutError, match="symbolic"):
        keep_strides(old, new)


class Cut(nn.Module):
    """Logits that are a view into more logits are returned; the cut moves into the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, 16)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(ids)
        logits = (F.linear(x, self.embed.weight) * 0.5)[..., 5:]
        more = F.linear(x, self.embed.weight)[1:].clone()
        targets = torch.arange(38, device=ids.device)
        loss = F.cross_entropy(more.flatten(0, -2), targets) + logits.softmax(-1).square().sum()
        return loss, logits


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_returned_view_through_the_backend(dynamic: bool):
    model, ids = Cut().double(), tokens(2, 38)
    call = compile_mst(model, defer_outputs=False, dynamic=dynamic)
    loss, logits = call(ids)
    expected_loss, expected = model(ids)
    assert logits.stride() == expected.stride() == (3648, 96, 1)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(loss, expected_loss)
    assert dynamic or has_loops([mstc.last_report()])

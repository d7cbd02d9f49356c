"""Gradients that are equal are two tensors, whoever merged what made them."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mstc.runtime.loop import loop_op
from passes.aliases import refresh_views
from passes.liveness import output_nodes
from passes.rules import is_view
from tests.models import fresh_compiler  # noqa: F401  (an autouse fixture)
from tests.passes.graphs import Recorder, gradients_of


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def two_biases(x: Tensor, up: Tensor, one: Tensor, two: Tensor, head: Tensor) -> Tensor:
    """What both add is the same, and the head's rows are cut."""
    x = x + F.gelu(x @ up) @ up.T + one + two
    logits = (x @ head)[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), torch.zeros(logits[..., 0].numel()).long())


def two_equal_layers(x: Tensor, up: Tensor, one: Tensor, two: Tensor, head: Tensor) -> Tensor:
    """The gradients of `one` and `two` are made by loops with the same operands."""
    wide = x @ head
    return sum((F.gelu(wide) @ part).square().sum() for part in (head.T + one, head.T + two))  # type: ignore[return-value]


@pytest.mark.parametrize("fn", [two_biases, two_equal_layers], ids=lambda f: f.__name__)
def test_no_two_gradients_share_memory(fn: Callable[..., Tensor]) -> None:
    bias = (8,) if fn is two_biases else (64, 8)
    one = leaf(*bias)
    values = [leaf(2, 33, 8), leaf(8, 64), one, one.detach().clone().requires_grad_(), leaf(8, 64)]
    recorder = Recorder(chunk_rows=8)
    got = gradients_of(fn, values, recorder)
    assert recorder.modes
    torch.testing.assert_close(got, gradients_of(fn, values, None))
    grads = [g for g in got if isinstance(g, Tensor) and g.dim()]
    assert len({g.untyped_storage().data_ptr() for g in grads}) == len(grads)


def test_views_share_their_operands_storage() -> None:
    values = [leaf(2, 33, 8), leaf(8, 64), leaf(8), leaf(8), leaf(8, 64)]
    recorder = Recorder(chunk_rows=8)
    gradients_of(two_biases, values, recorder)
    (planned,) = recorder.planned
    assert planned.chunked is not None
    graph = planned.chunked.graph
    assert graph.find_nodes(op="call_function", target=loop_op)
    views = [n for n in graph.nodes if n.op == "call_function" and is_view(n)]
    before = [n.meta["val"] for n in views]
    refresh_views(graph)
    assert all(n.meta["val"] is b for n, b in zip(views, before, strict=True)), "nothing is stale"
    assert output_nodes(graph)

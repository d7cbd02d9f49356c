"""What is multiplied twice."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import mstc
from passes.cost import flops


def _total(fn: Callable[..., Tensor], *args: Tensor) -> int:
    graph = make_fx(fn, tracing_mode="fake")(*args).graph
    return sum(map(flops, graph.nodes))


def test_products_and_nothing_else() -> None:
    a, b = torch.ones(3, 5), torch.ones(5, 7)
    assert _total(lambda a, b: torch.relu(a @ b).sum(), a, b) == 2 * 3 * 5 * 7


def test_attention_on_a_cpu() -> None:
    """Two products of tokens x tokens forward, five backward."""
    q = torch.ones(2, 4, 8, 16, requires_grad=True)
    product = 2 * 2 * 4 * 8 * 8 * 16

    def step(q: Tensor) -> Tensor:
        return torch.autograd.grad(F.scaled_dot_product_attention(q, q, q).sum(), q)[0]

    assert _total(lambda q: F.scaled_dot_product_attention(q, q, q), q.detach()) == 2 * product
    assert _total(step, q) == 7 * product


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 512), nn.Linear(512, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x))).square().sum(-1)


def test_a_recomputed_layer() -> None:
    """Its forward's first product once more: one of the six that its step has (the input wants a
    gradient, too)."""
    options = {"min_peak_bytes": 0, "min_region_bytes": 1024, "min_chunk_rows": 8}
    report = mstc.explain(Wide(), torch.ones(4096, 16, requires_grad=True), options=options)
    (graph,) = report.graphs
    assert [loop.mode for loop in graph.loops] == ["recompute"]
    assert graph.extra_work == 1 / 6
    assert graph.floor <= graph.peak_after


def test_sizes_that_are_left_open_stay_open() -> None:
    """Counted by their hints, and no guard is made of them."""
    graph = make_fx(lambda x: x @ x.t(), tracing_mode="symbolic")(torch.ones(6, 5)).graph
    (product,) = graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)
    sizes = product.meta["val"].shape
    assert isinstance(sizes[0], torch.SymInt)
    guards = list(sizes[0].node.shape_env.guards)
    assert flops(product) == 2 * 6 * 6 * 5
    assert sizes[0].node.shape_env.guards == guards

"""What is multiplied twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import mstc
from mstc import device
from mstc.report import GraphReport, Report
from passes.cost import Machine, flops


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


# -- time


def _time(machine: Machine, monkeypatch: pytest.MonkeyPatch, chunk_rows: int = 1024) -> GraphReport:
    monkeypatch.setattr(device, "CPU_IN_FLOAT32", machine)
    options = {"min_peak_bytes": 0, "min_region_bytes": 1024, "chunk_rows": chunk_rows}
    given = torch.ones(4096, 16, requires_grad=True)
    (graph,) = mstc.explain(Wide(), given, options=options).graphs
    assert graph.relative_time is not None
    return graph


@pytest.mark.parametrize("chunk_rows", [512, 2048])
def test_what_every_chunk_reads_again(chunk_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, in both loops, and their gradients, which are read and written; but of the second
    bias: the backward does not need it, and its gradient is no part of the loop."""
    graph = _time(Machine(written=0, reread=1, near_nbytes=0), monkeypatch, chunk_rows)
    parameters = sum(p.nbytes for p in Wide().parameters())
    further = 4096 // chunk_rows - 1
    more = further * (4 * parameters - 3 * 16 * 4) / graph.flops
    assert graph.relative_time == pytest.approx(1 + graph.extra_work + more)


def test_what_stays_near_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing, a share of a chunk that is too large, or all that is inside."""

    def kept(near_nbytes: int) -> float:
        graph = _time(Machine(written=1e12, reread=0, near_nbytes=near_nbytes), monkeypatch)
        assert graph.relative_time is not None
        return 1 - graph.relative_time

    assert kept(0) == pytest.approx(0, abs=1e-6)
    assert kept(1 << 30) == kept(1 << 40) > 0.95, "next to nothing is outside"
    assert kept(1 << 19) == pytest.approx(2 * kept(1 << 18), rel=1e-6)
    assert kept(1 << 18) < 0.1


def test_no_time_where_nobody_has_measured() -> None:
    given = torch.ones(4096, 16, dtype=torch.bfloat16)
    (graph,) = mstc.explain(
        Wide().bfloat16(), given, options={"min_peak_bytes": 0, "min_region_bytes": 1024}
    ).graphs
    assert graph.loops
    assert graph.relative_time is None


def test_graphs_count_by_what_they_multiply() -> None:
    (one,) = mstc.explain(Wide(), torch.ones(64, 16)).graphs
    other = replace(one, flops=3 * one.flops, relative_time=2.0)
    assert one.relative_time == 1.0, "untouched"
    assert Report([one, other]).relative_time == pytest.approx(7 / 4)
    assert Report([one, replace(one, relative_time=None)]).relative_time is None
    assert Report().relative_time is None

"""Regions: what a loop takes in, where it stops, and why there is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx import Graph, Node
from torch.nn import functional as F

from passes.axes import Axes, analyze_axes
from passes.records import Refusal, Region
from passes.regions import RegionFinder, find_regions
from passes.rules import find_rule
from tests.passes.graphs import Recorder, compiled, trace

aten = torch.ops.aten
Tensor = torch.Tensor


def found(graph: Graph, min_bytes: int = 1) -> tuple[list[Region], list[Refusal], Axes]:
    axes = analyze_axes(graph, find_rule)
    regions, refusals = find_regions(graph, axes, min_bytes=min_bytes)
    return regions, refusals, axes


def joint(fn: Callable[..., Any], *inputs: Tensor) -> Graph:
    """The joint graph that the passes see."""
    recorder = Recorder(min_peak_bytes=2**60)  # looks, and leaves the graph alone
    compiled(fn, inputs, recorder)
    return recorder.graphs[0]


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape).requires_grad_()


def names(nodes: frozenset[Node]) -> list[str]:
    graph = next(iter(nodes)).graph
    return [n.name for n in graph.nodes if n in nodes]


def mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.relu(x @ up) @ down


def test_forward_region_of_an_mlp():
    graph = trace(mlp, torch.randn(10, 4), torch.randn(4, 32), torch.randn(32, 4))
    (region,), refusals, axes = found(graph)
    assert names(region.nodes) == ["mm", "relu", "mm_1"]
    assert region.seed.name == "mm"
    assert region.backward == frozenset()
    assert region.length == 10
    x = next(iter(graph.nodes))
    assert axes.dims(x)[0] == (region.axis,), "along the rows, of which there are no weights"
    assert region.inside_bytes == 10 * 32 * 4 * 2, "the product, and the operand of the next one"
    assert refusals == []


def test_forward_and_backward_are_found_together():
    graph = joint(lambda *p: mlp(*p).square().sum(), leaf(10, 4), leaf(4, 32), leaf(32, 4))
    regions, _, _ = found(graph)
    (region,) = regions
    assert region.forward
    assert region.backward
    for part in (region.forward, region.backward):
        assert_convex(part)
    targets = [n.target for n in graph.nodes if n in region.nodes]
    assert targets.count(aten.mm.default) == 6, "two forward; two gradients of each"


def assert_convex(part: frozenset[Node]) -> None:
    """No path leaves the part and enters it again."""
    graph = next(iter(part)).graph
    after: set[Node] = set()  # outside, and depends on the part
    for node in graph.nodes:
        inputs = set(node.all_input_nodes)
        if node in part:
            assert not inputs & after, node
        elif inputs & (part | after):
            after.add(node)


def test_nodes_of_a_region_are_parallel_or_sums_nobody_inside_reads():
    graph = joint(
        lambda h, w, y: F.cross_entropy(h @ w, y),
        leaf(10, 4),
        leaf(4, 160),
        torch.randint(160, (10,)),
    )
    (region,), _, axes = found(graph)
    for node in region.nodes:
        role = axes.role(node, region.axis)
        assert role in ("parallel", "sum")
        if role == "sum":
            assert not set(node.users) & region.nodes


@pytest.mark.parametrize("batch", [(), (2,)], ids=["rows", "views of rows"])
def test_two_gradients_that_are_added_leave_as_one(batch: tuple[int, ...]):
    """Those of a gated MLP's two projections; of a batch, each comes by a view of its own."""

    def gated(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        wide = F.silu(F.linear(x, gate)) * F.linear(x, up)
        return (F.linear(wide, down) ** 2).sum()

    graph = joint(gated, leaf(*batch, 10, 4), leaf(32, 4), leaf(32, 4), leaf(4, 32))
    (region,), _, axes = found(graph)
    split = [n for n in region.backward if region.axis in axes.axes(n)]
    (leaving,) = (n for n in split if any(u not in region.nodes for u in n.users))
    assert leaving.target is aten.add.Tensor


def test_constants_stay_outside():
    """They are made again wherever they are read; no loop has to give them to another."""
    graph = joint(
        lambda h, w, y: F.cross_entropy(h @ w, y),
        leaf(10, 4),
        leaf(4, 160),
        torch.randint(160, (10,)),
    )
    (region,), _, _ = found(graph)
    assert aten.full.default in {n.target for n in graph.nodes}
    assert aten.full.default not in {n.target for n in region.nodes}


def test_regions_do_not_overlap():
    def fn(x: Tensor, *w: Tensor) -> Tensor:
        for up, down in zip(w[::2], w[1::2], strict=True):
            x = x + mlp(x.tanh(), up, down)
        return x.square().sum()

    graph = joint(fn, leaf(10, 4), leaf(4, 32), leaf(32, 4), leaf(4, 48), leaf(48, 4))
    regions, _, _ = found(graph)
    assert len(regions) == 2
    assert not regions[0].nodes & regions[1].nodes
    assert regions[0].inside_bytes > regions[1].inside_bytes, "largest first"


def test_small_values_seed_nothing():
    graph = trace(mlp, torch.randn(10, 4), torch.randn(4, 32), torch.randn(32, 4))
    assert found(graph, min_bytes=10 * 32 * 4 + 1)[0] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_values_are_large_in_any_precision(dtype: torch.dtype):
    graph = trace(mlp, *(torch.randn(n, dtype=dtype) for n in ((10, 4), (4, 32), (32, 4))))
    limit = 10 * 32 * 4
    axes = analyze_axes(graph, find_rule)
    finder = RegionFinder(graph, axes, limit)
    assert [n.name for n in graph.nodes if finder.may_seed(n)] == ["mm", "relu"]
    assert not any(RegionFinder(graph, axes, limit + 1).may_seed(n) for n in graph.nodes)


def test_no_amplification_no_region():
    graph = trace(mlp, torch.randn(4, 4), torch.randn(4, 4), torch.randn(4, 4))
    regions, refusals, _ = found(graph)
    assert regions == []
    assert refusals == [], "nothing was to be gained, so nothing was refused"


def test_batch_axis_where_tokens_mix():
    """Attention mixes tokens; the sequences of a batch are still apart."""

    def fn(x: Tensor, w: Tensor) -> Tensor:
        wide = (x @ w).cumsum(1).sort(-1).values
        return wide.sum(-1)

    graph = trace(fn, torch.randn(3, 10, 4), torch.randn(4, 32))
    (region,), _, _ = found(graph)
    assert region.length == 3


@pytest.mark.parametrize("written_out", [False, True])
def test_heads_where_scores_are_large(written_out: bool):
    """A loop along heads computes projections and attention again: for scores of tokens x tokens,
    but not for projections that are no wider than what all heads read."""

    def fn(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, wo: Tensor) -> Tensor:
        q, k, v = ((x @ w).view(40, 4, 8).transpose(0, 1) for w in (wq, wk, wv))
        if written_out:
            out = (q @ k.mT).softmax(-1) @ v
        else:
            out = F.scaled_dot_product_attention(q[None], k[None], v[None])[0]
        return (x + out.transpose(0, 1).reshape(40, 32) @ wo).cumsum(0).square().sum()

    inputs = leaf(40, 32), *(leaf(32, 32) for _ in range(4))
    regions, _, axes = found(joint(fn, *inputs))
    assert [r.length for r in regions] == ([4] if written_out else [])
    assert all(axes.axes(r.seed)[0] == r.axis for r in regions)


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "fn"),
    [
        ("an output of the graph", lambda x, w: F.relu(x @ w)),
        ("mixes positions of the loop axis", lambda x, w: (x @ w).softmax(-1).softmax(0).sum(-1)),
        ("has no rule", lambda x, w: (x @ w).roll((1, 1), (0, 1)).sum(-1)),
    ],
    ids=["output", "mixes", "no rule"],
)
def test_a_refusal_says_why(reason: str, fn: Callable[..., Tensor]):
    graph = trace(fn, torch.randn(10, 4), torch.randn(4, 32))
    regions, refusals, _ = found(graph)
    assert regions == []
    assert any(reason in r.reason for r in refusals), refusals


def test_an_axis_cannot_be_cut_in_two_places():
    """Every row meets every column, and both are one axis."""
    graph = trace(lambda x: (x @ x.t()).exp().sum(0), torch.randn(10, 4))
    assert found(graph)[0] == []


def test_a_refusal_knows_its_bytes_and_its_line():
    graph = joint(lambda x, w: F.relu(x @ w), leaf(10, 4), leaf(4, 32))
    _, refusals, _ = found(graph)
    assert refusals[0].nbytes == 10 * 32 * 4
    assert refusals[0].subject.startswith("aten.")


# -- not handled (the module's list) -------------------------------------------------------------


def test_normalisation_over_the_axis_is_cut():
    def fn(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        wide = (x @ w).softmax(-1)
        return (wide - wide.mean(0)) @ v

    graph = trace(fn, torch.randn(10, 4), torch.randn(4, 32), torch.randn(32, 4))
    regions, refusals, _ = found(graph)
    for region in regions:
        assert aten.mean.dim not in {n.target for n in region.nodes}
    assert any("aten.mean" in r.reason for r in refusals)


def test_one_loop_axis_per_region_and_no_region_in_a_region():
    graph = trace(mlp, torch.randn(3, 10, 4), torch.randn(4, 32), torch.randn(32, 4))
    regions, _, axes = found(graph)
    for index, region in enumerate(regions):
        for node in region.nodes:
            assert axes.axes(node).count(region.axis) <= 1
            assert not any(node in other.nodes for other in regions[index + 1 :])


@pytest.mark.parametrize(("min_rows", "length"), [(0, 20), (12, 20), (20, 16), (100, 16)])
def test_the_outermost_axis_that_is_fine_enough(min_rows: int, length: int):
    """Slices of the batch are contiguous; but one sequence may be more than a chunk should have."""
    graph = trace(mlp, torch.randn(16, 20, 4), torch.randn(4, 32), torch.randn(32, 4))
    axes = analyze_axes(graph, find_rule)
    regions, _ = find_regions(graph, axes, min_bytes=1, min_rows=min_rows)
    assert [r.length for r in regions] == [length]


def test_the_axis_that_keeps_most_inside():
    """Values per row are inputs beside the weights: fewest inputs have the columns."""

    def fn(x: Tensor, w: Tensor, a: Tensor, b: Tensor, index: Tensor) -> Tensor:
        wide = torch.exp((x @ w) * a - b)
        return (wide + torch.zeros(20, 64).scatter_add(-1, index, a)).t() @ x

    column = torch.randn(20, 1)
    index = torch.zeros(20, 1, dtype=torch.int64)
    graph = trace(fn, torch.randn(20, 4), torch.randn(4, 64), column, column.clone(), index)
    axes = analyze_axes(graph, find_rule)
    x, w = list(graph.nodes)[:2]
    ((first, *_), _), ((best, *_), _) = (
        find_regions(graph, axes, min_bytes=1, all_axes=every) for every in (False, True)
    )
    assert axes.dims(w)[1] == (first.axis,)
    assert axes.dims(x)[0] == (best.axis,)
    assert best.inside_bytes > first.inside_bytes


WIDENED: dict[str, Callable[[Tensor], Tensor]] = {
    "cast": lambda logits: logits.float(),
    "sum with a wider type": lambda logits: logits + torch.linspace(0, 1, logits.shape[-1]),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("widened", WIDENED.values(), ids=WIDENED.keys())
def test_a_wider_type_seeds_nothing(dtype: torch.dtype, widened: Callable[[Tensor], Tensor]):
    """``logits.float()`` is twice as wide as the logits: these would stay outside of its region."""

    def loss(x: Tensor, head: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(widened(x @ head), labels)

    x, head = (t.detach().to(dtype).requires_grad_() for t in (leaf(12, 4), leaf(4, 96)))
    graph = joint(loss, x, head, torch.randint(96, (12,)))
    (region,), _, _ = found(graph, min_bytes=12 * 96)
    assert region.seed.target is aten.mm.default
    products = [n for n in graph.nodes if n.target is aten.mm.default]
    assert len(products) == 3
    assert set(products) <= region.nodes


def test_a_narrower_type_ends_nothing():
    """Under autocast a wide value goes on in half the bytes: no wider than what it is made from,
    by bytes."""

    def fn(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return F.relu((x @ up).bfloat16()) @ down

    inputs = torch.randn(10, 4), torch.randn(4, 8), torch.randn(8, 4).bfloat16()
    (region,), _, _ = found(trace(fn, *inputs))
    assert names(region.nodes) == ["mm", "_to_copy", "relu", "mm_1"]


def test_picked_gradients_seed_nothing():
    """The backward of ``max`` writes next to nothing into a wide tensor."""

    def loss(x: Tensor, head: Tensor) -> Tensor:
        wide = x @ head
        wide = torch.cat([wide, x[:, :1]], dim=-1)  # one column more: the widest
        return (wide - wide.max(-1, keepdim=True).values).exp().sum()

    regions, _, _ = found(joint(loss, leaf(12, 4), leaf(4, 96)), min_bytes=12 * 96)
    assert {r.seed.target for r in regions} == {aten.mm.default}


def test_what_a_region_drops_may_seed_another():
    """One mask in two layers: the flood from the first reaches the second, which a path through the
    rest of the network keeps out."""

    def loss(x: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        mask = torch.cat([x.detach() * 0.1] * 24, dim=-1).sin()
        y = x + F.relu(x @ a + mask) @ b
        y = y / y.norm(dim=0)  # no loop along the rows goes through here
        return (F.relu(y @ c + mask) @ d).sum()

    shapes = [(12, 4), (4, 96), (96, 4), (4, 96), (96, 4)]
    regions, _, _ = found(joint(loss, *(leaf(*s) for s in shapes)), min_bytes=12 * 96)
    assert len(regions) == 2
    assert len({r.axis for r in regions}) == 1


def test_an_op_with_several_results_seeds_nothing():
    """However small a region may be: its results do, one by one."""

    def fn(x: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        return mlp(x, up, down), F.batch_norm(x, None, None, training=True)

    graph = trace(fn, torch.randn(10, 4), torch.randn(4, 32), torch.randn(32, 4))
    assert any(isinstance(n.meta.get("val"), tuple) for n in graph.nodes)
    (region,), _, _ = found(graph, min_bytes=0)
    assert names(region.nodes) == ["mm", "relu", "mm_1"]

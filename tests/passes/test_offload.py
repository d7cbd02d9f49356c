"""What moves to the host, what does not, and that both graphs compute what they did."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.fx import Graph, Node

import passes.offload
from passes.offload import HOST, Offloaded, is_far, offload_saved_values
from tests.passes.graphs import Sketch, run_graph

aten = torch.ops.aten
PUT = torch.ops.prims.device_put.default
SMALLEST = 256  # bytes


@pytest.fixture(autouse=True)
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the CPU for an accelerator."""
    monkeypatch.setattr(passes.offload, "is_far", lambda device: True)


class Pair:
    """A forward whose saved values a backward adds up, whatever their shapes."""

    def __init__(self) -> None:
        self.forward = Sketch()
        self.x = self.forward.input(torch.randn(8, 16))

    def close(self, outputs: Sequence[Node], saved: Sequence[Node]) -> None:
        self.num_outputs = len(outputs)
        self.results = self.forward.finish([*outputs, *saved])
        self.backward = Sketch()
        sums: list[Node] = []
        for node, value in zip(saved, self.results[self.num_outputs :], strict=True):
            given = self.backward.input(value, name=node.name)
            sums.append(self.backward.call(aten.sum.default, given))
        tangent = self.backward.input(torch.ones(()), name="tangents_1")
        self.sums = self.backward.finish(
            [self.backward.call(aten.mul.Tensor, s, tangent) for s in sums]
        )

    def offloaded(self) -> Offloaded | None:
        before = str(self.forward.graph), str(self.backward.graph)
        found = offload_saved_values(
            self.forward.graph, self.backward.graph, self.num_outputs, min_nbytes=SMALLEST
        )
        assert (str(self.forward.graph), str(self.backward.graph)) == before
        if found is not None:
            self._same(found)
        return found

    def _same(self, found: Offloaded) -> None:
        results = run_graph(found.forward, list(self.forward.values.values()))
        for before, after in zip(self.results[: self.num_outputs], results, strict=False):
            assert torch.equal(before, after)
        sums = run_graph(found.backward, [*results[self.num_outputs :], torch.ones(())])
        for before, after in zip(self.sums, sums, strict=True):
            assert torch.equal(before, after)
        names = [n.name for n in found.forward.find_nodes(op="output")[0].args[0]]
        inputs = [n.name for n in found.backward.find_nodes(op="placeholder")]
        assert names[self.num_outputs :] == inputs[:-1], "the partitioner's order stays"


def puts(graph: Graph) -> list[Node]:
    return graph.find_nodes(op="call_function", target=PUT)


def test_a_large_value_moves() -> None:
    """After its last reader, and back before the first; a small one stays."""
    pair = Pair()
    wide = pair.forward.call(aten.sin.default, pair.x)
    small = pair.forward.call(aten.sum.dim_IntList, wide, [1])
    cosine = pair.forward.call(aten.cos.default, wide)
    pair.close([cosine], [wide, small])
    found = pair.offloaded()
    assert found is not None
    assert (found.nbytes, found.stays) == (8 * 16 * 4, 8 * 4)
    (sent,), (fetched,) = puts(found.forward), puts(found.backward)
    assert sent.args[1:] == (HOST, True)
    assert sent.prev.name == cosine.name
    assert fetched.next.target is aten.sum.default
    assert sent.meta["val"].device == HOST


@pytest.mark.parametrize("order", [(1, 0, 2), (2, 0, 1), (0, 2, 1)])
def test_dims_in_another_order(order: tuple[int, ...]) -> None:
    """They cross as they lie in memory, and come back as they were."""
    pair = Pair()
    wide = pair.forward.call(aten.sin.default, torch.randn(3, 5, 7))
    turned = pair.forward.call(aten.permute.default, wide, list(order))
    made = pair.forward.call(aten.cos.default, turned)
    assert not made.meta["val"].is_contiguous()
    pair.close([], [made])
    found = pair.offloaded()
    assert found is not None
    (sent,), (fetched,) = puts(found.forward), puts(found.backward)
    assert sent.meta["val"].is_contiguous()
    assert sent.meta["val"].shape == (3, 5, 7)
    assert fetched.next.meta["val"].stride() == made.meta["val"].stride()


def test_views_and_parts_of_several_results() -> None:
    pair = Pair()
    product = pair.forward.call(aten.mm.default, pair.x, torch.randn(16, 12))
    seen = pair.forward.call(aten.view.default, product, [4, 2, 12])
    several = pair.forward.call(aten.max.dim, pair.forward.call(aten.sin.default, pair.x), 0, True)
    values = pair.forward.call(operator.getitem, several, 0)
    large = pair.forward.call(aten.topk.default, pair.x, 16)
    part = pair.forward.call(operator.getitem, large, 0)
    pair.close([], [seen, values, part])
    found = pair.offloaded()
    assert found is not None
    assert [n.name for n in puts(found.forward)] == ["host_view_default", f"host_{part.name}"]


def test_a_view_of_it_is_read_later() -> None:
    pair = Pair()
    wide = pair.forward.call(aten.sin.default, pair.x)
    turned = pair.forward.call(aten.permute.default, wide, [1, 0])
    product = pair.forward.call(aten.mm.default, pair.x, turned)
    pair.close([product], [wide])
    found = pair.offloaded()
    assert found is not None
    assert puts(found.forward)[0].prev.name == product.name


def test_what_is_kept_anyway_stays() -> None:
    """Inputs, views of them, outputs of the model, what shares memory with something small."""
    pair = Pair()
    turned = pair.forward.call(aten.permute.default, pair.x, [1, 0])
    returned = pair.forward.call(aten.sin.default, pair.x)
    behind = pair.forward.call(aten.cos.default, pair.x)
    wide = pair.forward.call(aten.exp.default, pair.x)
    row = pair.forward.call(aten.slice.Tensor, wide, 0, 0, 1)
    seen = pair.forward.call(aten.view.default, behind, [16, 8])
    pair.close([returned, seen], [pair.x, turned, returned, behind, wide, row])
    assert pair.offloaded() is None


def test_what_is_not_dense_stays() -> None:
    pair = Pair()
    wide = pair.forward.call(aten.sin.default, pair.x)
    stretched = pair.forward.call(aten.expand.default, wide, [4, 8, 16])
    other = pair.forward.call(aten.cos.default, pair.x)
    half = pair.forward.call(aten.slice.Tensor, other, 1, 0, 8)
    pair.close([], [stretched, half])
    assert pair.offloaded() is None


def test_whole_numbers_move_too() -> None:
    pair = Pair()
    mask = pair.forward.call(aten.gt.Scalar, torch.randn(16, 32), 0)
    pair.close([], [mask])
    found = pair.offloaded()
    assert found is not None
    assert found.nbytes == 16 * 32


def test_nothing_on_the_host_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes.offload, "is_far", is_far)
    pair = Pair()
    pair.close([], [pair.forward.call(aten.sin.default, pair.x)])
    assert pair.offloaded() is None


def test_devices() -> None:
    assert not is_far(torch.device("cpu"))
    assert not is_far(torch.device("meta"))
    assert is_far(torch.device("cuda", 0))


def test_what_nobody_reads_is_not_fetched() -> None:
    pair = Pair()
    wide = pair.forward.call(aten.sin.default, pair.x)
    pair.forward.finish([wide])
    backward = Sketch()
    backward.input(torch.randn(8, 16), name=wide.name)
    tangent = backward.input(torch.ones(3), name="tangents_1")
    backward.finish([tangent])
    found = offload_saved_values(pair.forward.graph, backward.graph, 0, min_nbytes=SMALLEST)
    assert found is not None
    assert not puts(found.backward)
    (same,) = run_graph(found.backward, [torch.randn(8, 16), torch.ones(3)])
    assert isinstance(same, Tensor)

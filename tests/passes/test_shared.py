"""Equal runs between loops share one subgraph, and compute what they computed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from passes.shared import NAME, share_equal_runs

aten = torch.ops.aten
REGION = torch.ops.higher_order.invoke_subgraph


@torch.library.custom_op("mst_tests::loop", mutates_args=())
def loop(x: Tensor) -> tuple[Tensor, Tensor]:
    """Stands for a loop: nothing is fused with it."""
    return x * 2, x + 1


@loop.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


Layer = Callable[[Tensor, Tensor, int], tuple[Tensor, list[Tensor]]]
"""What is between two loops: the stream, a weight, which layer; gives the stream and more."""


def plain(x: Tensor, weight: Tensor, layer: int) -> tuple[Tensor, list[Tensor]]:
    y = (x - x.mean(-1, keepdim=True)) @ weight.t()
    return x + y.sigmoid() * y, []


def views_are_read(x: Tensor, weight: Tensor, layer: int) -> tuple[Tensor, list[Tensor]]:
    """Views of operands and of results, and views of views, leave beside the stream."""
    turned = weight.t()
    y = x @ turned
    parts = y.unflatten(-1, (2, -1)).transpose(0, 1)
    return x + y.sigmoid(), [turned, parts, parts[0], y]


def several_outputs(x: Tensor, weight: Tensor, layer: int) -> tuple[Tensor, list[Tensor]]:
    variance, mean = torch.var_mean(x @ weight, -1, keepdim=True)
    first, second = (x * variance.rsqrt()).chunk(2, -1)
    return x - mean, [variance, mean, second + 1, first]


def nothing_but_views_leave(x: Tensor, weight: Tensor, layer: int) -> tuple[Tensor, list[Tensor]]:
    y = (x @ weight).relu() * 3
    return (y + x.tanh()).view(-1, 2).view(x.shape), []


def model(layer: Layer, layers: int = 5) -> Callable[..., list[Tensor]]:
    def run(x: Tensor, *weights: Tensor) -> list[Tensor]:
        made: list[Tensor] = []
        for i in range(layers):
            x, more = layer(x, weights[i], i)
            made += more
            x, beside = loop(x)
            made.append(beside)
        return [x, *made]

    return run


def operands(layers: int = 5, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(6, 4, dtype=dtype), *torch.randn(layers, 4, 4, dtype=dtype)]


def traced(run: Callable[..., list[Tensor]], inputs: list[Tensor]) -> GraphModule:
    return make_fx(run, tracing_mode="fake")(*inputs)


def calls(module: GraphModule) -> list[str]:
    return [str(node.args[1]) for node in module.graph.nodes if node.target is REGION]


def share(module: GraphModule) -> int:
    return share_equal_runs(module, min_runs=2, min_ops=1)


@pytest.mark.parametrize("layer", [plain, views_are_read, several_outputs, nothing_but_views_leave])
def test_the_same_numbers(layer: Layer) -> None:
    module = traced(model(layer), operands())
    wanted = module(*operands())
    ops = len(module.graph.nodes)
    assert share(module) == 5
    module.recompile()
    assert calls(module) == [f"{NAME}_0"] * 5
    assert [name for name, _ in module.named_children()] == [f"{NAME}_0"]
    assert layer is not plain or len(module.graph.nodes) < ops
    for found, expected in zip(module(*operands()), wanted, strict=True):
        assert torch.equal(found, expected)
        assert found.stride() == expected.stride()


@pytest.mark.parametrize("layer", [plain, views_are_read, several_outputs, nothing_but_views_leave])
def test_results_are_memory_of_their_own(layer: Layer) -> None:
    """Neither an operand's nor another result's, or who writes to one would write to both."""
    module = traced(model(layer), operands())
    share(module)
    subgraph = getattr(module, f"{NAME}_0")
    values = [n.meta["val"] for n in subgraph.graph.nodes if n.op == "placeholder"]
    given = [torch.rand(v.shape).as_strided(v.shape, v.stride()) for v in values]
    results = subgraph(*given)
    storages = [t.untyped_storage().data_ptr() for t in (*given, *results)]
    assert len(set(storages[len(given) :])) == len(results)
    assert not {*storages[: len(given)]} & {*storages[len(given) :]}


def test_fake_values_are_those_of_the_graph() -> None:
    module = traced(model(several_outputs), operands())
    before = {n.name: n.meta["val"] for n in module.graph.nodes if "val" in n.meta}
    share(module)
    for node in module.graph.nodes:
        if node.target is REGION or node.op == "get_attr":
            continue
        if node.name in before and isinstance(before[node.name], Tensor):
            assert node.meta["val"].shape == before[node.name].shape
            assert node.meta["val"].stride() == before[node.name].stride()


def by_layer(x: Tensor, weight: Tensor, layer: int) -> tuple[Tensor, list[Tensor]]:
    return (x @ weight).relu() * (layer + 2), []


def by_operands(x: Tensor, weight: Tensor, layer: int) -> tuple[Tensor, list[Tensor]]:
    """Once the same operand twice, once two."""
    other = weight if layer % 2 else weight.clone()
    return x @ weight @ weight.relu() if layer % 2 else x @ weight @ other, []


def by_what_leaves(x: Tensor, weight: Tensor, layer: int) -> tuple[Tensor, list[Tensor]]:
    y = (x @ weight).relu()
    return y.tanh() + x, [y] * (layer % 2)


@pytest.mark.parametrize(
    ("layer", "shared", "bodies"), [(by_layer, 0, 0), (by_operands, 5, 2), (by_what_leaves, 5, 2)]
)
def test_runs_that_differ_do_not_share(layer: Layer, shared: int, bodies: int) -> None:
    module = traced(model(layer), operands())
    wanted = module(*operands())
    assert share(module) == shared
    module.recompile()
    assert len(set(calls(module))) == bodies
    assert all(map(torch.equal, module(*operands()), wanted))


def test_layouts_that_differ_do_not_share() -> None:
    """Of shape, strides, dtype, and where in its memory a view begins."""

    def run(*inputs: Tensor) -> list[Tensor]:
        return [loop((x.exp() + 1).sum(0))[0] for x in inputs]

    wide = torch.randn(6, 8)
    inputs = [wide, wide.t().contiguous().t(), wide.double(), torch.randn(6, 9)]
    assert share(traced(run, inputs)) == 0
    assert share(traced(run, [wide, torch.randn(6, 8)])) == 2

    def of_parts(x: Tensor) -> list[Tensor]:
        first, second = loop(x)
        parts = torch.ops.mst_tests.parts(first, second)
        return [loop((part.exp() + 1).sum(0))[0] for part in parts]

    assert share(traced(of_parts, [wide])) == 2
    assert share(traced(of_parts, [torch.randn(6, 9)])) == 0  # the second is not aligned


@torch.library.custom_op("mst_tests::parts", mutates_args=())
def parts(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The second begins elsewhere in its memory."""
    return torch.cat([x, x])[: len(x)], torch.cat([y, y])[len(y) :]


@parts.register_fake
def _(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cat([x, x])[: len(x)], torch.cat([y, y])[len(y) :]


def random(x: Tensor, weight: Tensor, layer: int) -> tuple[Tensor, list[Tensor]]:
    return (x @ weight).relu() + torch.rand_like(x), []


def in_place(x: Tensor, weight: Tensor, layer: int) -> tuple[Tensor, list[Tensor]]:
    return (x @ weight).relu().tanh().add_(1), []


@pytest.mark.parametrize("layer", [random, in_place])
def test_what_is_not_functional_stays_between_runs(layer: Layer) -> None:
    module = traced(model(layer), operands())
    share(module)
    subgraphs = [child for child in module.children() if isinstance(child, GraphModule)]
    assert subgraphs
    for subgraph in subgraphs:
        targets = [node.target for node in subgraph.graph.nodes]
        assert not {aten.rand_like.default, aten.add_.Tensor} & {*targets}
    torch.manual_seed(3)
    wanted = model(layer)(*operands())
    module.recompile()
    torch.manual_seed(3)
    assert all(map(torch.equal, module(*operands()), wanted))


def test_open_sizes_are_left_alone() -> None:
    module = make_fx(model(plain), tracing_mode="symbolic")(*operands())
    graph = module.graph
    assert share(module) == 0
    assert module.graph is graph


def test_few_and_short_runs_are_left_alone() -> None:
    module = traced(model(plain), operands())
    assert share_equal_runs(module, min_runs=6, min_ops=1) == 0
    assert share_equal_runs(module, min_runs=2, min_ops=9) == 0
    assert not calls(module)
    assert share_equal_runs(module, min_runs=5, min_ops=5) == 5


def test_graphs_with_subgraphs_are_left_alone() -> None:
    module = traced(model(plain), operands())
    assert share(module) == 5
    assert share(module) == 0

"""Logits of a body lie by columns where that is faster, and are the same."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from passes.columns import keep_by_columns
from tests.passes.graphs import run_graph, trace

ROWS, HIDDEN, COLUMNS = 4, 3, 32
aten = torch.ops.aten
prims = torch.ops.prims
Function = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


def softmax(logits: Tensor) -> Tensor:
    powers = (logits - logits.amax(-1, keepdim=True)).exp()
    return powers / powers.sum(-1, keepdim=True)


def head(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """As a head's gradient leaves for two products."""
    gradient = softmax(torch.mm(x, weight.t()))
    return gradient.sum(), gradient.t(), x, gradient, weight


def of_sequences(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    gradient = softmax(torch.mm(x, weight.t()).view(2, ROWS // 2, COLUMNS)).view(ROWS, COLUMNS)
    return gradient.t(), x, gradient, weight


def loss_alone(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return (softmax(torch.mm(x, weight.t())).amax(),)


def twice(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """Of two heads."""
    gradient = softmax(torch.mm(x, weight.t())) - softmax(torch.mm(x * 2, weight.t()))
    return gradient.t(), x


KEPT: dict[Function, int] = {head: 1, of_sequences: 1, loss_alone: 0, twice: 1}


def not_reduced(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return torch.mm(x, weight.t()).sigmoid().t(), x


def leaves_itself(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    logits = torch.mm(x, weight.t())
    return logits, softmax(logits).t(), x


def leaves_as_sequences(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return softmax(torch.mm(x, weight.t())).view(2, ROWS // 2, COLUMNS), x


def beside_rows(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """A product of the same size whose weight lies as it is."""
    other = torch.mm(x, weight.view(HIDDEN, COLUMNS))
    return (softmax(torch.mm(x, weight.t())) * other).t(), x


def made_inside(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """The weight is no input."""
    return softmax(torch.mm(x, (weight * 2).t())).t(), x


STAYS: list[Function] = [
    *(not_reduced, leaves_itself, leaves_as_sequences, beside_rows, made_inside)
]


def inputs(rows: int = ROWS, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(rows, HIDDEN, dtype=dtype), torch.randn(COLUMNS, HIDDEN, dtype=dtype)


@pytest.mark.parametrize("fn", KEPT, ids=lambda f: f.__name__)
def test_kept_by_columns(fn: Function) -> None:
    graph = trace(fn, *inputs())
    text = str(graph)
    changed = keep_by_columns(graph)
    assert str(graph) == text, "the input is left as it is"
    products = changed.find_nodes(op="call_function", target=aten.mm.default)
    assert products
    assert all(node.args[0].op == "placeholder" for node in products), "the weight, on the left"
    forced = changed.find_nodes(
        op="call_function", target=prims.inductor_force_stride_order.default
    )
    assert [node.args[1] for node in forced] == [(1, ROWS)] * KEPT[fn]
    theirs = run_graph(graph, inputs())
    for ours, other in zip(run_graph(_unforced(changed), inputs()), theirs, strict=True):
        torch.testing.assert_close(ours, other)


def _unforced(graph: torch.fx.Graph) -> torch.fx.Graph:
    """What asks Inductor for an order has no kernel of its own."""
    for node in list(graph.nodes):
        if node.target is prims.inductor_force_stride_order.default:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    return graph


@pytest.mark.parametrize("fn", STAYS, ids=lambda f: f.__name__)
def test_stays(fn: Function) -> None:
    graph = trace(fn, *inputs())
    assert keep_by_columns(graph) is graph


def test_many_rows_stay() -> None:
    graph = trace(head, *inputs(rows=COLUMNS // 4))
    assert keep_by_columns(graph) is graph


def test_other_precisions_stay() -> None:
    graph = trace(head, *inputs(dtype=torch.bfloat16))
    assert keep_by_columns(graph) is graph


def test_open_sizes_stay() -> None:
    graph = trace(head, *inputs(), symbolic=True)
    assert keep_by_columns(graph) is graph

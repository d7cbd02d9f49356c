"""One entry per row is gathered from the product, to the bit; any other gather stays."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mstc.runtime.gather import gather_op
from passes.gathers import gather_from_products
from tests.passes.graphs import run_graph, trace

ROWS, HIDDEN, COLUMNS = 6, 4, 9
aten = torch.ops.aten

Function = Callable[[Tensor, Tensor, Tensor], Tensor]


def logarithm(logits: Tensor) -> Tensor:
    """Of the softmax, as AOTAutograd decomposes it."""
    centered = logits - logits.amax(-1, keepdim=True)
    return centered - centered.exp().sum(-1, keepdim=True).log()


def chosen(values: Tensor, labels: Tensor) -> Tensor:
    return values.gather(-1, labels.unsqueeze(-1))


def plain(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return chosen(logarithm(torch.mm(x, weight)), labels)


def with_a_bias(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return chosen(logarithm(torch.addmm(weight[0], x, weight)), labels)


def in_float32(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return chosen(logarithm(torch.mm(x, weight).float()), labels)


def capped(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return chosen(logarithm(torch.tanh(torch.mm(x, weight) / 30) * 30), labels)


def gated(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The product twice."""
    logits = torch.mm(x, weight)
    return chosen(logarithm(logits * torch.sigmoid(logits)), labels)


def of_sequences(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = torch.mm(x, weight).view(2, ROWS // 2, COLUMNS)
    return chosen(logarithm(logits.float()), labels.view(2, -1))


def one_sequence(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    sizes = x.shape[0], weight.shape[1]
    logits = torch.mm(x, weight).view(1, *sizes).float()
    return chosen(logarithm(logits.view(sizes)), labels)


def of_one_number(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return chosen(logarithm(torch.mm(x, weight) * x.sum()), labels)


MOVED: list[Function] = [
    *(plain, with_a_bias, in_float32, capped, gated),
    *(of_sequences, one_sequence, of_one_number),
]


def several(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return logarithm(torch.mm(x, weight)).gather(1, labels.view(-1, 1).expand(-1, 2))


def of_few_rows(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return logarithm(torch.mm(x, weight)).gather(1, labels[:2].view(-1, 1))


def along_rows(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return logarithm(torch.mm(x, weight)).gather(0, labels.view(-1, 1) % ROWS)


def of_columns(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """An operand that differs along the columns."""
    return chosen(logarithm(torch.mm(x, weight) + weight[1]), labels)


def of_no_product(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return chosen(logarithm(weight.sum(0).expand(ROWS, COLUMNS)), labels)


def turned(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """A view that changes what a row is."""
    return chosen(torch.mm(x, weight).view(ROWS * COLUMNS // 3, 3), labels.repeat(3) % 3)


def long(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    value = torch.mm(x, weight)
    for _ in range(20):
        value = value * 2
    return chosen(value, labels)


STAY: list[Function] = [
    *(several, of_few_rows, along_rows),
    *(of_columns, of_no_product, turned, long),
]


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x, weight = torch.randn(ROWS, HIDDEN).to(dtype), torch.randn(HIDDEN, COLUMNS).to(dtype)
    return x, weight, torch.randint(COLUMNS, (ROWS,))


def gathers(graph: torch.fx.Graph, op: object) -> list[torch.fx.Node]:
    return graph.find_nodes(op="call_function", target=op)


@pytest.mark.parametrize("fn", MOVED, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("symbolic", [False, True])
def test_moved(fn: Function, dtype: torch.dtype, symbolic: bool) -> None:
    tensors = inputs(dtype)
    graph = trace(lambda *given: (fn(*given),), *tensors, symbolic=symbolic)
    if symbolic and fn is of_sequences:
        assert gather_from_products(graph, gather_op) is graph, "sizes are not known"
        return
    text = str(graph)
    changed = gather_from_products(graph, gather_op)
    assert str(graph) == text, "the input is left as it is"
    assert not gathers(changed, aten.gather.default)
    (early,) = gathers(changed, gather_op)
    product, index = early.args
    assert product.target in (aten.mm.default, aten.addmm.default)
    assert index.meta["val"].shape == early.meta["val"].shape
    (ours,), (theirs,) = (run_graph(g, tensors) for g in (changed, graph))
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("fn", STAY, ids=lambda f: f.__name__)
def test_stays(fn: Function) -> None:
    graph = trace(lambda *given: (fn(*given),), *inputs(torch.float32))
    assert gathers(graph, aten.gather.default)
    assert gather_from_products(graph, gather_op) is graph


def test_labels_out_of_bounds_are_an_error() -> None:
    x, weight, labels = inputs(torch.float32)
    graph = trace(lambda *given: (plain(*given),), x, weight, labels)
    labels[2] = COLUMNS
    with pytest.raises(RuntimeError, match="out of bounds"):
        run_graph(gather_from_products(graph, gather_op), (x, weight, labels))

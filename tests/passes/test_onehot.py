"""Sums over one-hot rows are their elements, to the bit; any other sum stays."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from passes.onehot import read_off_sums
from tests.passes.graphs import Recorder, assert_close, gradients_of, run_graph, trace

ROWS, COLUMNS = 5, 9
aten = torch.ops.aten


def labels(*shape: int, columns: int = COLUMNS) -> Tensor:
    return torch.randint(columns, shape)


def traced(fn: Callable[..., Tensor], *inputs: Tensor) -> torch.fx.Graph:
    return trace(lambda *given: (fn(*given),), *inputs)


def sums(graph: torch.fx.Graph) -> int:
    return len(graph.find_nodes(op="call_function", target=aten.sum.dim_IntList))


def assert_read_off(graph: torch.fx.Graph, *inputs: Tensor) -> None:
    """No sum is left, and the numbers are the same to the bit."""
    changed = read_off_sums(graph)
    assert sums(graph)
    assert not sums(changed)
    (ours,), (whole,) = (run_graph(g, inputs) for g in (changed, graph))
    assert ours.dtype == whole.dtype
    assert ours.shape == whole.shape
    assert torch.equal(ours, whole)


def scattered(index: Tensor, source: Tensor | float, dim: int, columns: int = COLUMNS) -> Tensor:
    shape = list(index.shape)
    shape[dim] = columns
    dtype = source.dtype if isinstance(source, Tensor) else torch.float32
    return torch.zeros(shape, dtype=dtype).scatter(dim, index, source)


def added(index: Tensor, source: Tensor) -> Tensor:
    return torch.zeros(len(index), COLUMNS, dtype=source.dtype).scatter_add(1, index, source)


def number(index: Tensor, factor: Tensor) -> Tensor:
    return (scattered(index, -1.0, 1) * factor).sum(1, keepdim=True)


def number_on_the_right(index: Tensor, factor: Tensor) -> Tensor:
    return (factor * scattered(index, 3.0, 1)).sum(-1)


def source(index: Tensor, factor: Tensor) -> Tensor:
    return scattered(index, factor, 1).sum(1, keepdim=True)


def source_added(index: Tensor, factor: Tensor) -> Tensor:
    return added(index, factor).sum(1)


def negated_twice_scaled(index: Tensor, factor: Tensor) -> Tensor:
    return (-(scattered(index, -1.0, 1) * factor) * factor.exp()).sum(1)


def in_other_types(index: Tensor, factor: Tensor) -> Tensor:
    narrow = scattered(index, factor.bfloat16(), 1) * factor.bfloat16()
    wide = torch.ops.prims.convert_element_type(narrow, torch.float32)
    return (wide * factor).sum(1, keepdim=True)


def columns_first(index: Tensor, factor: Tensor) -> Tensor:
    return (scattered(index.t(), -1.0, 0) * factor.t()).sum(0)


def with_another_dim(index: Tensor, factor: Tensor) -> Tensor:
    return (scattered(index, factor, 1).view(1, ROWS, 1, COLUMNS) * factor[:, None]).sum(3)


def with_a_dim_less(index: Tensor, factor: Tensor) -> Tensor:
    return scattered(index[:, :, None], factor[:, :, None], 1).view(ROWS, COLUMNS).sum(1)


ONE_HOT = [
    number,
    number_on_the_right,
    source,
    source_added,
    negated_twice_scaled,
    in_other_types,
    columns_first,
    with_another_dim,
    with_a_dim_less,
]


@pytest.mark.parametrize("fn", ONE_HOT, ids=lambda fn: fn.__name__)
def test_read_off_to_the_bit(fn: Callable[..., Tensor]) -> None:
    index, factor = labels(ROWS, 1), torch.randn(ROWS, 1)
    assert_read_off(traced(fn, index, factor), index, factor)


def into_other_values(index: Tensor, factor: Tensor) -> Tensor:
    return torch.ones(ROWS, COLUMNS).scatter(1, index, factor).sum(1)


def infinite(index: Tensor, factor: Tensor) -> Tensor:
    return (scattered(index, float("-inf"), 1) * factor).sum(1)


def no_number(index: Tensor, factor: Tensor) -> Tensor:
    return (scattered(index, float("nan"), 1) * factor).sum(1)


def of_one_row(index: Tensor, factor: Tensor) -> Tensor:
    return torch.zeros(COLUMNS).scatter(0, index[0, 0], factor[0, 0]).sum(0, keepdim=True)


def along_the_other_dim(index: Tensor, factor: Tensor) -> Tensor:
    return scattered(index, factor, 1).sum(0)


def over_all(index: Tensor, factor: Tensor) -> Tensor:
    return scattered(index, factor, 1).sum((0, 1))


def some_rows(index: Tensor, factor: Tensor) -> Tensor:
    return torch.zeros(ROWS + 1, COLUMNS).scatter(1, index, factor).sum(1)


def two_per_row(index: Tensor, factor: Tensor) -> Tensor:
    both = torch.cat([index, (index + 1) % COLUMNS], 1)
    return added(both, factor.expand(-1, 2)).sum(1)


def multiplied_in(index: Tensor, factor: Tensor) -> Tensor:
    zeros = torch.zeros(ROWS, COLUMNS)
    return aten.scatter.reduce(zeros, 1, index, factor, reduce="add").sum(1)


def factor_within_a_row(index: Tensor, factor: Tensor) -> Tensor:
    return (scattered(index, -1.0, 1) * factor.expand(ROWS, COLUMNS).exp().cumsum(1)).sum(1)


def one_factor_for_all(index: Tensor, factor: Tensor) -> Tensor:
    return (scattered(index, -1.0, 1) * factor[0, 0]).sum(1)


def something_added(index: Tensor, factor: Tensor) -> Tensor:
    return (scattered(index, factor, 1) + 0.5).sum(1)


def exponentiated(index: Tensor, factor: Tensor) -> Tensor:
    return scattered(index, factor, 1).exp().sum(1)


def a_number_alone(index: Tensor, factor: Tensor) -> Tensor:
    return scattered(index, -1.0, 1).sum(1) + factor


def a_number_that_is_rounded(index: Tensor, factor: Tensor) -> Tensor:
    return (scattered(index, 0.1, 1) * factor).sum(1)


def counts(index: Tensor, factor: Tensor) -> Tensor:
    return scattered(index, (factor > 0).long(), 1).sum(1)


def source_is_larger(index: Tensor, factor: Tensor) -> Tensor:
    return torch.zeros(ROWS, COLUMNS).scatter(1, index, factor.expand(-1, 2)).sum(1)


def in_other_rows(index: Tensor, factor: Tensor) -> Tensor:
    return scattered(index, factor, 1).view(COLUMNS, ROWS).sum(1)


def a_number_and_a_dim_less(index: Tensor, factor: Tensor) -> Tensor:
    return (scattered(index[None], -1.0, 2) * factor).sum(2)


OTHERS = [
    into_other_values,
    infinite,
    no_number,
    of_one_row,
    along_the_other_dim,
    over_all,
    some_rows,
    two_per_row,
    multiplied_in,
    factor_within_a_row,
    one_factor_for_all,
    something_added,
    exponentiated,
    a_number_alone,
    a_number_that_is_rounded,
    counts,
    source_is_larger,
    in_other_rows,
    a_number_and_a_dim_less,
]


@pytest.mark.parametrize("fn", OTHERS, ids=lambda fn: fn.__name__)
def test_any_other_sum_stays(fn: Callable[..., Tensor]) -> None:
    graph = traced(fn, labels(ROWS, 1), torch.randn(ROWS, 1))
    assert sums(graph) == 1
    assert read_off_sums(graph) is graph


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=3),
    st.data(),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_any_shape_and_dim(shape: list[int], data: st.DataObject, dtype: torch.dtype) -> None:
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    keepdim = data.draw(st.booleans())
    rows = list(shape)
    rows[dim] = 1
    index, factor = labels(*rows, columns=shape[dim]), torch.randn(rows, dtype=dtype)

    def fn(index: Tensor, factor: Tensor) -> Tensor:
        made = torch.zeros(shape, dtype=dtype).scatter(dim, index, factor)
        return (made * factor).sum(dim, keepdim=keepdim)

    assert_read_off(traced(fn, index, factor), index, factor)


def mean(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target)


def per_token(logits: Tensor, target: Tensor) -> Tensor:
    return (F.cross_entropy(logits, target, reduction="none") ** 2).sum()


def of_sequences(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.reshape(2, -1, COLUMNS).transpose(1, 2), target.reshape(2, -1))


def looked_up(logits: Tensor, target: Tensor) -> Tensor:
    return -logits.log_softmax(-1).gather(-1, target[:, None].clamp_min(0)).mean()


LOSSES = [mean, per_token, of_sequences, looked_up]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda fn: fn.__name__)
@pytest.mark.parametrize("ignored", [0, 2, 8])
def test_losses_have_one_sum_over_the_vocabulary(loss: Callable[..., Tensor], ignored: int) -> None:
    x = torch.randn(8, 4, dtype=torch.float64, requires_grad=True)
    head = torch.randn(COLUMNS, 4, dtype=torch.float64, requires_grad=True)
    target = labels(8)
    target[:ignored] = -100

    def model(x: Tensor, head: Tensor, target: Tensor) -> Tensor:
        return loss(x @ head.t(), target)

    recorder = Recorder(chunk_rows=3)
    ours = gradients_of(model, [x, head, target], recorder)
    assert_close(ours, gradients_of(model, [x, head, target], None))
    (graph,) = recorder.graphs
    assert sums(read_off_sums(graph)) == sums(graph) - 1
    (planned,) = recorder.planned
    assert planned.chunked is not None
    for loop in planned.chunked.loops:
        over_zeros = [
            node
            for node in loop.body.graph.find_nodes(op="call_function", target=aten.scatter.value)
            if any(user.target is aten.sum.dim_IntList for user in node.users)
        ]
        assert not over_zeros


def test_one_sum_may_be_the_factor_of_another() -> None:
    def fn(index: Tensor, factor: Tensor) -> Tensor:
        first = scattered(index, factor, 1).sum(1, keepdim=True)
        return (scattered(index, 1.0, 1) * first).sum(1)

    index, factor = labels(ROWS, 1), torch.randn(ROWS, 1)
    graph = traced(fn, index, factor)
    assert sums(graph) == 2
    assert_read_off(graph, index, factor)

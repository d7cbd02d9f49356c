"""Results that are sums of matrix products are multiplied into their place; others are copied."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.passes.graphs import Recorder, assert_close, gradients_of

ROWS, HIDDEN, WIDE = 24, 3, 40


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).requires_grad_()


def inputs(*batch: int) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = ((*batch, ROWS, HIDDEN), (HIDDEN, WIDE), (HIDDEN, WIDE), (WIDE, HIDDEN), (HIDDEN,))
    return [leaf(*shape) for shape in shapes]


def mlp(x: Tensor, up: Tensor, gate: Tensor, down: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x @ up) @ down


def gated(x: Tensor, up: Tensor, gate: Tensor, down: Tensor, bias: Tensor) -> Tensor:
    return (F.silu(x @ gate) * (x @ up)) @ down


def biased(x: Tensor, up: Tensor, gate: Tensor, down: Tensor, bias: Tensor) -> Tensor:
    return F.linear(F.gelu(x @ up), down.t(), bias)


def two_sums(x: Tensor, up: Tensor, gate: Tensor, down: Tensor, bias: Tensor) -> Tensor:
    """The sum begins with the bias, wherever it stands."""
    wide = F.gelu(x @ up)
    return wide @ down + F.linear(wide * (x @ gate), down.t(), bias)


def doubled(x: Tensor, up: Tensor, gate: Tensor, down: Tensor, bias: Tensor) -> Tensor:
    wide = F.gelu(x @ up)
    return torch.add(wide @ down, wide.square() @ down, alpha=2)


def twice_biased(x: Tensor, up: Tensor, gate: Tensor, down: Tensor, bias: Tensor) -> Tensor:
    wide = F.gelu(x @ up)
    return F.linear(wide, down.t(), bias) + F.linear(wide.square(), down.t(), bias)


def in_another_order(x: Tensor, up: Tensor, gate: Tensor, down: Tensor, bias: Tensor) -> Tensor:
    """What two sums make is added up in their own order."""
    wide = F.gelu(x @ up)
    one = wide @ down + wide.square() @ down
    return one + (wide.sin() @ down + wide.cos() @ down)


Model = Callable[..., Tensor]
# the model; the products of the forward's result, and of the input's gradient
CASES: list[tuple[Model, list[int], list[int]]] = [
    (mlp, [2], [2]),
    (gated, [2], [2, 2]),
    (biased, [3], [2]),
    (two_sums, [3, 2], [2, 2]),
]
COPIED = [doubled, twice_biased, in_another_order]


def terms(recorder: Recorder) -> list[list[int]]:
    """Of every split output of every loop, in their order."""
    (planned,) = recorder.planned
    assert planned.chunked is not None
    return [
        o.terms for loop in planned.chunked.loops for o in loop.body.outputs if o.kind == "split"
    ]


@pytest.mark.parametrize("batch", [(), (1,), (2,)], ids=["rows", "one", "two"])
@pytest.mark.parametrize("chunk", [5, 8])
@pytest.mark.parametrize(
    ("fn", "forward", "backward"), CASES, ids=lambda c: getattr(c, "__name__", None)
)
def test_written_in_place(
    fn: Model, forward: list[int], backward: list[int], chunk: int, batch: tuple[int, ...]
) -> None:
    values = inputs(*batch)
    recorder = Recorder(chunk_rows=chunk)
    ours = gradients_of(fn, values, recorder)
    assert_close(ours, gradients_of(fn, values, None))
    assert terms(recorder) == [forward, backward]


@pytest.mark.parametrize("batch", [(), (2,)], ids=["rows", "two"])
@pytest.mark.parametrize("fn", COPIED, ids=lambda fn: fn.__name__)
def test_other_results_are_copied(fn: Model, batch: tuple[int, ...]) -> None:
    values = inputs(*batch)
    recorder = Recorder(chunk_rows=8)
    ours = gradients_of(fn, values, recorder)
    assert_close(ours, gradients_of(fn, values, None))
    assert [] in terms(recorder)


def test_what_is_read_inside_is_made_inside() -> None:
    """The narrow product leaves, and is what the wide value after it is made of."""

    def fn(
        x: Tensor, up: Tensor, gate: Tensor, down: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        narrow = F.gelu(x @ up) @ down
        return narrow, F.silu(narrow @ gate) @ down

    values = inputs()
    recorder = Recorder(chunk_rows=8)
    ours = gradients_of(fn, values, recorder)
    assert_close(ours, gradients_of(fn, values, None))
    (planned,) = recorder.planned
    assert planned.chunked is not None
    for loop in planned.chunked.loops:
        inside = set(loop.body.nodes)
        assert all(inside.isdisjoint(o.made_outside) for o in loop.body.outputs)
        assert len(set(loop.body.work)) == len(loop.body.work)


@pytest.mark.parametrize("batch", [(), (2,)], ids=["rows", "two"])
@pytest.mark.parametrize(("fn", "weights"), [(mlp, 2), (gated, 3)], ids=["mlp", "gated"])
def test_rows_and_columns(fn: Model, weights: int, batch: tuple[int, ...]) -> None:
    """Along features the gradients of weights are rows or columns: all are written in place."""
    values = inputs(*batch)
    recorder = Recorder(chunk_rows=24, loop_axes="weights")
    assert_close(gradients_of(fn, values, recorder), gradients_of(fn, values, None))
    assert terms(recorder) == [[2]] * weights


def test_a_part_of_the_columns_is_copied() -> None:
    """Where columns hold the loop's axis beside another, its slices are no matrix; rows may."""

    def fn(x: Tensor, up: Tensor, gate: Tensor, down: Tensor, bias: Tensor) -> Tensor:
        return (x @ up).unflatten(-1, (5, -1)).softmax(-1).flatten(-2) @ down

    values = inputs()
    recorder = Recorder(chunk_rows=8, loop_axes="weights")
    assert_close(gradients_of(fn, values, recorder), gradients_of(fn, values, None))
    assert terms(recorder) == [[2], []]

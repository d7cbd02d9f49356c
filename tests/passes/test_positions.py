"""What the prover says of a value is what the value is, at every position."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from passes.forms import Choice, Condition, Linear, Value
from passes.positions import Prover
from tests.passes.graphs import run_graph, trace

LENGTH = 200  # more than an int8 holds
Step = Callable[[Tensor], Tensor]

NUMBERS = st.sampled_from([-129, -3, -1, 0, 1, 2, 9, 40_000, 2**31])
DTYPES = st.sampled_from(
    [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bfloat16, torch.float32]
)
STEPS: st.SearchStrategy[Step] = st.one_of(
    NUMBERS.map(lambda n: lambda x: x + n),
    NUMBERS.map(lambda n: lambda x: x * n),
    NUMBERS.map(lambda n: lambda x: n - x),
    DTYPES.map(lambda dtype: lambda x: x.to(dtype)),
    st.just(lambda x: x.view(x.dtype)),
    st.just(lambda x: x.unsqueeze(0)),
    st.just(lambda x: x[..., 3:]),
    st.just(lambda x: x[..., :1]),
    st.just(lambda x: x[..., ::2]),
    st.just(lambda x: x.flatten()[None].t()),
    st.just(lambda x: torch.cat([x[..., :1] - 1, x], -1)),
)
ENDS: st.SearchStrategy[Step] = st.one_of(
    st.just(lambda x: x),
    NUMBERS.map(lambda n: lambda x: x <= n),
    NUMBERS.map(lambda n: lambda x: ~(x.unsqueeze(-1) > x.unsqueeze(-2) + n)),
    NUMBERS.map(lambda n: lambda x: torch.where(x == n, 0.0, -torch.inf)),
)


def at_every_position(value: Value, like: Tensor) -> Tensor:
    """A proven value, written out."""
    if isinstance(value, Linear):
        out = torch.full(like.shape, value.constant, dtype=torch.int64)
        for dim, factor in value.factors:
            shape = [1] * like.dim()
            shape[dim] = -1
            out = out + factor * torch.arange(like.shape[dim]).view(shape)
        return out
    if isinstance(value, Condition):
        holds = torch.ones(like.shape, dtype=torch.bool)
        for form in value.forms:
            holds = holds & (at_every_position(form, like) >= 0)
        return holds
    if isinstance(value, Choice):
        holds = at_every_position(value.condition, like)
        return torch.where(holds, value.yes, value.no)
    return torch.full(like.shape, value)


def proven(make: Callable[[], Tensor]) -> tuple[Value | None, Tensor]:
    graph = trace(lambda x: [make()], torch.zeros(()))
    (output,) = graph.find_nodes(op="output")
    (real,) = run_graph(graph, [torch.zeros(())])
    return Prover().value(output.args[0][0]), real


@settings(max_examples=120, deadline=None)
@given(st.lists(STEPS, max_size=4), ENDS)
def test_what_is_proven_is_so(steps: list[Step], end: Step) -> None:
    def make() -> Tensor:
        x = torch.arange(LENGTH)
        for step in steps:
            x = step(x)
        return end(x)

    value, real = proven(make)
    if value is not None:
        assert torch.equal(at_every_position(value, real).to(torch.float64), real.double())


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.arange(LENGTH).to(torch.int8),
        lambda: torch.arange(LENGTH, dtype=torch.int16) * 300,
        lambda: torch.arange(LENGTH).to(torch.bfloat16) + 200,
        lambda: torch.arange(LENGTH).view(torch.int32),
        lambda: torch.full((4,), 300).to(torch.uint8),
        lambda: torch.arange(LENGTH, dtype=torch.int32) * 40_000 * 40_000,
        lambda: torch.arange(LENGTH) * 2**60,
        lambda: torch.arange(LENGTH, dtype=torch.int32) <= 2**40,
    ],
)
def test_nothing_is_said_of_what_wraps_or_rounds(make: Callable[[], Tensor]) -> None:
    assert proven(make)[0] is None


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.arange(LENGTH) * 3 - 7,
        lambda: torch.arange(LENGTH).to(torch.int32)[:, None] >= torch.arange(LENGTH),
        lambda: torch.triu(torch.full((9, 9), -torch.inf), 1),
        lambda: torch.ones(3, 4, dtype=torch.bool),
    ],
)
def test_positions_are_known(make: Callable[[], Tensor]) -> None:
    value, real = proven(make)
    assert value is not None
    assert torch.equal(at_every_position(value, real).to(torch.float64), real.double())

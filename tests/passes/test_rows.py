"""How many rows a chunk has at least: enough for each of the products that its rows are shared
among, or that each of its positions has a row in."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from passes import plan
from passes.grouped import grouped_mm
from passes.plan import TILE
from tests.passes.graphs import Recorder, assert_close, gradients_of

TOKENS, HIDDEN, HEADS, EXPERTS = 512, 16, 8, 4
MIN_ROWS = 16


@pytest.fixture(autouse=True)
def no_room_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks are as small as may be."""
    monkeypatch.setattr(plan, "TRANSIENT_SHARE", 0)


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).mul_(0.5).requires_grad_()


def mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return (x + F.gelu(x @ up) @ down).square().mean()


def experts(x: Tensor, up: Tensor, down: Tensor, choice: Tensor) -> Tensor:
    """The largest entry of `choice` says which expert a token goes to."""
    keys, rows = choice.argmax(-1).sort()
    ends = torch.histc(keys.double(), EXPERTS, 0, EXPERTS - 1).cumsum(0).to(torch.int32)
    y = grouped_mm(F.gelu(grouped_mm(x[rows], up, ends)), down, ends)
    return (x + torch.zeros_like(x).index_add(0, rows, y)).square().mean()


def attention(x: Tensor, *weights: Tensor) -> Tensor:
    q, k, v = ((x @ w).unflatten(-1, (HEADS, -1)).transpose(-2, -3) for w in weights)
    mixed = (q @ k.mT).softmax(-1) @ v
    return (x + mixed.transpose(-2, -3).flatten(-2)).square().mean()


def chunk(fn: Callable[..., Tensor], inputs: list[Tensor], min_rows: int, **options: object) -> int:
    """Positions of a chunk of the only loop, which has the gradients of a step without."""
    torch.manual_seed(0)
    recorder = Recorder(min_rows=min_rows, gradient_in_forward=False, **options)
    assert_close(gradients_of(fn, inputs, recorder), gradients_of(fn, inputs, None))
    ((loop,),) = [planned.plan.loops for planned in recorder.planned]
    return loop.chunk


def of_experts(hidden: int, wide: int) -> list[Tensor]:
    weights = leaf(EXPERTS, hidden, wide), leaf(EXPERTS, wide, hidden)
    return [leaf(TOKENS, hidden), *weights, torch.randn(TOKENS, EXPERTS, dtype=torch.float64)]


def test_rows_of_one_product() -> None:
    weights = leaf(HIDDEN, 8 * HIDDEN), leaf(8 * HIDDEN, HIDDEN)
    assert chunk(mlp, [leaf(TOKENS, HIDDEN), *weights], MIN_ROWS) == MIN_ROWS


def test_every_expert_has_its_rows() -> None:
    assert chunk(experts, of_experts(4 * HIDDEN, 8 * HIDDEN), MIN_ROWS) == EXPERTS * MIN_ROWS


def test_experts_chunks_are_small_beside_their_gradients() -> None:
    """Where the weights are small, a chunk of many rows would be the larger part of memory."""
    inputs = of_experts(2, 32)
    found = chunk(experts, inputs, MIN_ROWS)
    assert MIN_ROWS <= found < EXPERTS * MIN_ROWS
    gradients = sum(w.nbytes for w in inputs[1:3])
    assert found * inputs[1].shape[-1] * inputs[1].itemsize <= gradients


@pytest.mark.parametrize("min_rows", [MIN_ROWS, 4 * TILE])
def test_every_head_has_its_rows(min_rows: int) -> None:
    inputs = [leaf(TOKENS, HIDDEN), *(leaf(HIDDEN, HIDDEN) for _ in range(3))]
    assert chunk(attention, inputs, min_rows) == min(min_rows, TILE)


def test_a_chunk_of_heads_has_few() -> None:
    """A head is a product by itself, not a row of each."""
    inputs = [leaf(TOKENS, HIDDEN), *(leaf(HIDDEN, HIDDEN) for _ in range(3))]
    assert chunk(attention, inputs, TOKENS, loop_axes="weights") == 1


def test_a_chunk_of_sequences_has_few() -> None:
    """Nor is a sequence."""
    inputs = [leaf(4 * MIN_ROWS, 24, HIDDEN), *(leaf(HIDDEN, HIDDEN) for _ in range(3))]
    assert chunk(attention, inputs, MIN_ROWS) == 1


def test_features_of_experts_are_columns() -> None:
    """However many rows there are, a product has enough columns."""
    inputs = of_experts(4 * HIDDEN, 8 * HIDDEN)
    assert chunk(experts, inputs, MIN_ROWS, loop_axes="weights") == MIN_ROWS

"""Sums over very many chunks, in two steps."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import mstc
from mstc import watch
from mstc.runtime.loop import program_of
from mstc.simulate import simulate_step
from mstc.watch import SimulatedTrace, Watch
from passes import groups
from passes.groups import MANY, group_size
from tests.models import (
    EAGER,
    compile_mst,
    fresh_compiler,  # noqa: F401  (an autouse fixture)
)
from tests.mstc.test_loop import EAGER_LOWERING, SQUARE, expected

FEATURES = 6


def _run(x: Tensor, w: Tensor, chunk: int, only: Any = list) -> list[Tensor]:
    program = program_of(json.dumps(SQUARE), EAGER_LOWERING)
    return program.run([x, w], list(x.shape), chunk, only=only)


@pytest.mark.parametrize("num_chunks", [MANY, MANY + 1, 72, 73, 80, 81, 82, 99, 100, 257])
@pytest.mark.parametrize("last", [1, 2, 3])
def test_every_chunk_counts_once(num_chunks: int, last: int) -> None:
    """Of small integers, sums are exact in any order."""
    length = 3 * (num_chunks - 1) + last
    x = torch.randint(-3, 4, (length, FEATURES)).float()
    w = torch.randint(-3, 4, (FEATURES,)).float()
    for ours, whole in zip(_run(x, w, 3), expected(x, w), strict=True):
        assert torch.equal(ours, whole)


def test_they_are_nearer_to_the_exact_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding grows with the root of the number of terms; two steps have 16 each here, not 256."""
    torch.manual_seed(0)
    x, w = torch.randn(256 * 4, FEATURES), torch.randn(FEATURES)
    exact = expected(x.double(), w.double())

    def errors() -> list[float]:
        made = zip(_run(x, w, 4), exact, strict=True)
        return [((m.double() - e).norm() / e.norm()).item() for m, e in made][1:]

    in_groups = errors()
    monkeypatch.setattr(groups, "MANY", 256)
    running = errors()
    assert all(0 < a < 0.6 * b for a, b in zip(in_groups, running, strict=True))


@pytest.mark.parametrize("last", [1, 4])
def test_three_chunks_hold_what_all_hold(last: int) -> None:
    """So a simulation runs no more."""

    def simulated(only: Any) -> SimulatedTrace:
        with FakeTensorMode():
            x, w = torch.empty(4 * 80 + last, FEATURES), torch.empty(FEATURES)
            heard = Watch([x, w])
            with heard:
                outputs = _run(x, w, 4, only)
            del outputs
            return heard.summary([])

    some, every = simulated(watch._first_and_last), simulated(list)
    assert some.peak_nbytes == every.peak_nbytes
    assert len(some.changes) < len(every.changes)


def test_not_where_the_second_buffer_would_show() -> None:
    assert group_size(MANY, 1, 1000) == 0
    assert group_size(MANY + 1, 1, 8) == math.isqrt(MANY + 1)
    assert group_size(MANY + 1, 1, 7) == 0
    assert group_size(400, 1, 1000) == 20


class Head(nn.Module):
    """A vocabulary projection and its loss; one loop makes all gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(64, 16))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(x @ self.weight.t(), labels)


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_what_is_predicted_simulated_and_done(
    lowering: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second buffer for the head's weight gradient, in all three; 80 chunks."""
    options = {"lowering": lowering}
    length = 8 * 80
    batch = torch.randn(length, 16), torch.randint(64, (length,))
    found, gradients = [], []
    for many in (10**6, MANY):
        monkeypatch.setattr(groups, "MANY", many)
        compile_cache = tmp_path / str(many)  # a plan of one setting is none of the other
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(compile_cache))
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Head()
        call = compile_mst(model, **options)

        def step(model: nn.Module = model, call: Any = call) -> None:
            model.zero_grad()
            call(*batch).backward()

        step()
        trace = mstc.measure_peak(step, parameters=model.parameters())
        gradients.append(model.weight.grad)
        (graph,) = mstc.last_report().graphs
        assert [one.num_chunks for one in graph.loops] == [80]
        torch._dynamo.reset()
        simulated = simulate_step(model, *batch, backend="mst", options=EAGER | options)
        found.append((graph.peak_after, trace.peak_nbytes, simulated.peak_nbytes))
    weight = 64 * 16 * 4
    more = [b - a for a, b in zip(*found, strict=True)]
    assert all(weight <= one < weight + 256 for one in more), (found, more)
    if lowering == "inductor":
        assert found[1][1] == found[1][2]
    assert not torch.equal(*gradients)
    torch.testing.assert_close(*gradients)

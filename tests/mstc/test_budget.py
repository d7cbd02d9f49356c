"""A step takes no more than its budget, a smaller budget no more than a larger one, and numbers are
the same."""

from __future__ import annotations

import functools
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import mstc
from mstc import budget, device
from mstc.budget import CHUNKED, LADDER, budget_bytes, worth_trying
from mstc.errors import BudgetWarning, OptionError
from mstc.options import Options, Setting, parse_options
from mstc.runtime.memory import measure_step
from mstc.simulate import simulate_step
from passes.cost import Machine
from tests.models import (
    NON_LEAF,
    TinyLM,
    fresh_compiler,  # noqa: F401  (an autouse fixture)
    lm_batch,
)

SMALL: dict[str, Any] = {
    "min_region_bytes": 1024,
    "min_deferred_bytes": 1024,
    "min_chunk_rows": 16,
    "min_peak_bytes": 1024,
}


class Deep(nn.Module):
    """A vocabulary projection over a stack of layers whose inside is wide."""

    def __init__(self, vocab: int = 256, hidden: int = 32, layers: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, hidden)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden))
            for _ in range(layers)
        )
        self.head = nn.Linear(hidden, vocab, bias=False)

    def forward(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.embed(ids)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        logits = self.head(hidden)
        return nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten()), logits


BATCH = functools.partial(lm_batch, 301, vocab=256)


def _step(model: nn.Module, **options: Any) -> Any:
    compiled = torch.compile(model, backend="mst", options=SMALL | options)
    batch = BATCH()
    return lambda: compiled(*batch)[0].backward()


def _peak(**options: Any) -> int:
    torch._dynamo.reset()
    torch.manual_seed(0)
    trace = simulate_step(Deep(), *BATCH(), options=SMALL | options)
    return trace.peak_nbytes


# -- what a budget is


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (None, None),
        ("auto", None),
        (1 << 30, 1 << 30),
        ("24GiB", 24 << 30),
        (" 1.5 GB ", 1_500_000_000),
        (0.25, 0.25),
        ("25%", 0.25),
        (1.0, 1.0),
    ],
)
def test_budgets(given: Any, meant: Any) -> None:
    assert parse_options({"memory_budget": given}, None).memory_budget == meant


@pytest.mark.parametrize(
    "given",
    [
        *(0, -1, 0.0, -0.5, 1.5, float("nan"), float("inf"), True, [1], {"bytes": 1}),
        *("", "0GiB", "-3MiB", "10 apples", "120%", "0%", "x%", "GiB"),
    ],
)
def test_budgets_that_are_none(given: Any) -> None:
    with pytest.raises(OptionError, match='options\\["memory_budget"\\] is'):
        parse_options({"memory_budget": given}, None)


def test_a_share_is_of_the_device() -> None:
    whole = budget_bytes(1.0, torch.device("cpu"))
    assert whole > 1 << 28
    assert budget_bytes(0.5, torch.device("cpu")) == whole // 2
    assert budget_bytes(whole, torch.device("cpu")) == whole
    with pytest.raises(OptionError, match=r"is .*, and cpu has"):
        budget_bytes(whole + 1, torch.device("cpu"))


def test_a_share_of_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert budget_bytes(80 << 30, torch.device("cuda")) == 80 << 30
    with pytest.raises(OptionError, match="not known here; give bytes"):
        budget_bytes(0.5, torch.device("cuda"))


def test_a_plan_leaves_nothing_to_a_budget() -> None:
    with pytest.raises(OptionError, match="give one of them"):
        Options(plan="[]", memory_budget=1 << 30)


def test_an_unknown_wish() -> None:
    with pytest.raises(OptionError, match='must be "raise" or "warn"'):
        parse_options({"memory_budget": "1GiB", "over_budget": "pray"}, None)


# -- what it does


@NON_LEAF
def test_peaks_within_budgets() -> None:
    """From no loops to less than the planner's own choice."""
    without = _peak(memory_budget="1GiB")
    budgets = [int(without * share) for share in (0.95, 0.4, 0.32, 0.22)]
    peaks = [_peak(memory_budget=nbytes) for nbytes in budgets]
    assert all(peak <= nbytes for peak, nbytes in zip(peaks, budgets, strict=True))
    assert peaks == sorted(peaks, reverse=True)
    assert len({without, *peaks}) == 5


@NON_LEAF
def test_the_measured_peak_is_within_the_budget() -> None:
    model = Deep()
    nbytes = int(0.5 * _peak(memory_budget="1GiB"))
    step = _step(model, memory_budget=nbytes)
    step()
    trace = measure_step(step, model.parameters())
    assert trace.peak_nbytes <= nbytes
    (note,) = [n for n in mstc.last_report().notes if n.startswith("memory budget")]
    assert "simulated peak" in note


@NON_LEAF
def test_a_budget_that_is_large_enough_changes_nothing() -> None:
    report = mstc.explain(Deep(), *BATCH(), options=SMALL | {"memory_budget": "1GiB"})
    assert [loop for graph in report.graphs for loop in graph.loops] == []
    assert "no loops needed" in "".join(report.notes)


@NON_LEAF
@pytest.mark.parametrize("setting", [LADDER[4], LADDER[9], LADDER[11], LADDER[-1]], ids=str)
def test_numbers_are_those_without(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kind of setting against float64."""
    chosen: list[Setting] = []

    def search(*args: Any) -> tuple[Setting, int]:
        chosen.append(setting)
        return setting, 1

    monkeypatch.setattr(budget, "_search", search)
    monkeypatch.setattr(budget, "_kept", lambda key: None)
    model = Deep().double()
    reference = _gradients(model, BATCH())
    _step(model, memory_budget="1GiB", lowering="eager")()
    assert chosen == [setting]
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, reference[name], rtol=1e-12, atol=1e-14)


def _gradients(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    model(*batch)[0].backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@NON_LEAF
def test_a_budget_that_cannot_be_met() -> None:
    model = Deep()
    with pytest.raises(BackendCompilerFailed, match=r"BudgetError: a step of .* takes .* at least"):
        _step(model, memory_budget="64KiB")()
    torch._dynamo.reset()
    with pytest.warns(BudgetWarning, match=r"takes .* at least"):
        _step(model, memory_budget="64KiB", over_budget="warn")()
    assert all(p.grad is not None for p in model.parameters())


def test_a_budget_larger_than_the_device() -> None:
    with pytest.raises(BackendCompilerFailed, match=r"OptionError: .* and cpu has"):
        _step(Deep(), memory_budget="4000TiB")()


@NON_LEAF
def test_what_was_chosen_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    options = SMALL | {"memory_budget": int(0.6 * _peak(memory_budget="1GiB"))}
    first = mstc.explain(Deep(), *BATCH(), options=options)

    def again(*args: Any) -> int:
        raise AssertionError("simulated once more")

    monkeypatch.setattr(budget, "graph_peak", again)
    torch._dynamo.reset()
    assert mstc.explain(Deep(), *BATCH(), options=options).notes == first.notes


@NON_LEAF
def test_a_step_that_cannot_be_simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """It trains, with the smallest chunks, and says so."""

    def fail(*args: Any) -> int:
        raise ZeroDivisionError("of ours")

    monkeypatch.setattr(budget, "graph_peak", fail)
    model = Deep()
    with pytest.warns(BudgetWarning, match=r"cannot be simulated \(ZeroDivisionError: of ours\)"):
        _step(model, memory_budget=123_457, lowering="eager")()
    assert all(p.grad is not None for p in model.parameters())
    assert mstc.last_report().graphs[0].loops


@NON_LEAF
def test_the_search_draws_no_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout drops the same with a budget as without."""
    monkeypatch.setattr(budget, "_kept", lambda key: None)
    model = nn.Sequential(nn.Linear(32, 256), nn.Dropout(0.5), nn.Linear(256, 32))
    compiled = torch.compile(
        model, backend="mst", options=SMALL | {"memory_budget": "1GiB", "lowering": "eager"}
    )
    state = torch.get_rng_state()
    compiled(torch.ones(64, 32)).sum().backward()  # searches, compiles and runs
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    compiled(torch.ones(64, 32)).sum().backward()  # runs
    assert torch.equal(torch.get_rng_state(), after)


@NON_LEAF
def test_without_gradients() -> None:
    model = Deep().eval()
    with torch.no_grad():
        compiled = torch.compile(model, backend="mst", options=SMALL | {"memory_budget": 90_000})
        expected = model(*BATCH())[0]
        torch.testing.assert_close(compiled(*BATCH())[0], expected)
    (graph,) = mstc.last_report().graphs
    assert graph.kind == "inference"
    assert graph.loops


@NON_LEAF
def test_sizes_that_are_left_open() -> None:
    compiled = torch.compile(
        TinyLM(),
        backend="mst",
        dynamic=True,
        options=SMALL | {"memory_budget": "1GiB", "lowering": "eager"},
    )
    compiled(*lm_batch(67, vocab=32)).backward()
    assert "its sizes are left open" in "".join(mstc.last_report().notes)


# -- the ladder


def test_the_ladder_goes_down() -> None:
    """Every setting computes at least as much again as the one before."""
    assert CHUNKED[0].tightness == 0
    assert CHUNKED[-1].tightness == 1
    keys = [(s.tightness or 0, s.least_divisor, -s.activation_budget) for s in LADDER]
    for before, after in pairwise(keys):
        assert all(a <= b for a, b in zip(before, after, strict=True))
        assert before != after


@pytest.mark.parametrize(
    ("times", "kept"),
    [
        ([1.0, 0.8, 0.9, 0.95], [0, 1, 2, 3]),  # the larger, the faster
        ([1.0, 0.9, 0.85, 0.8], [0, 3]),  # the smallest are fastest
        ([1.0, 0.99, 0.9, 1.1], [0, 2, 3]),
        ([0.5, 0.99, 0.99, 1.0], [0, 3]),  # not by enough
        ([1.0, None, 0.9, 0.8], [0, 1, 3]),
        ([None, None, None, None], [0, 1, 2, 3]),
    ],
    ids=str,
)
def test_settings_that_are_worth_trying(times: list[float | None], kept: list[int]) -> None:
    settings = CHUNKED[:4]
    assert worth_trying(settings, times) == tuple(settings[i] for i in kept)


@NON_LEAF
def test_chunks_that_save_no_time_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values of small chunks stay in a CPU's caches; with sums in float64, nothing is known."""
    tried: list[Setting] = []

    def search(*args: Any) -> tuple[Setting, int]:
        tried[:] = args[-1][0]
        return CHUNKED[-1], 1

    monkeypatch.setattr(budget, "_search", search)
    monkeypatch.setattr(budget, "_kept", lambda key: None)
    monkeypatch.setattr(budget, "save_entry", lambda *_: None)

    def settings_of(dtype: torch.dtype, machine: Machine) -> list[Setting]:
        monkeypatch.setattr(device, "CPU_IN_FLOAT32", machine)
        torch._dynamo.reset()
        _step(Deep().to(dtype), memory_budget="1GiB", lowering="eager")()
        return list(tried)

    near = Machine(written=1000, reread=0, near_nbytes=1 << 12)
    far = Machine(written=0, reread=1000, near_nbytes=0)
    assert settings_of(torch.float32, near) == [CHUNKED[0], CHUNKED[-1]]
    assert len(settings_of(torch.float32, far)) > 4, "the larger, the fewer bytes are read again"
    assert settings_of(torch.float64, near) == list(CHUNKED)

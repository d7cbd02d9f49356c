"""A small share of the random models of `tests.fuzz`, and proof that the check can fail;
``python -m tests.fuzz`` runs as many as one likes."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.fuzz import check as judge
from tests.fuzz.case import Case, Layer, draw
from tests.fuzz.check import check
from tests.fuzz.masks import LENGTH, Mask, draw_mask, rewritten
from tests.fuzz.model import make_model
from tests.fuzz.rates import Rates, measure, surprises
from tests.fuzz.shrink import shrink
from tests.fuzz.ways import Compiler
from tests.models import NON_LEAF, fresh_compiler  # noqa: F401  (an autouse fixture)

SEEDS = range(11)
MLP = Case(layers=(Layer(ffn="gelu"),))
DROPOUT = Case(layers=(Layer(ffn="gelu", ffn_dropout=0.3),))
APART = replace(MLP, way="outside_compiled", dynamic="true", loss="mse", shift="slice", batch=1)
"""The loss in a function of its own, on logits of any length."""


@NON_LEAF
@pytest.mark.parametrize("seed", SEEDS)
def test_random_model(seed: int) -> None:
    verdict = check(draw(seed))
    assert verdict.kind in ("right", "skipped"), f"{verdict.detail}: {draw(seed).to_json()}"


def test_most_cases_have_loops() -> None:
    """Cases that never loop would prove nothing."""
    for case in (MLP, DROPOUT):
        verdict = check(case)
        assert (verdict.kind, verdict.loops > 0) == ("right", True), verdict


def test_guards_on_sizes_are_no_frames_of_the_user() -> None:
    """They read the parts of a deferred output, and Dynamo took that for a function to compile."""
    case = replace(APART, length=31, vocab=251, logits_out=True, chunk_rows=29, min_region_bytes=1)
    verdict = check(case)
    assert verdict.kind == "right", verdict


class _Bent(torch.autograd.Function):
    """Identity with a gradient that is a little too large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * 1.001


def _bent(case: Case) -> Compiler:
    def compiler(model: Any) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            out = model(*args)
            return out | {"loss": _Bent.apply(out["loss"])}

        return call

    return compiler


@pytest.mark.parametrize("case", [MLP, DROPOUT], ids=["exact", "dropout"])
def test_a_wrong_gradient_is_seen(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "ours", _bent)
    assert check(case).kind == "wrong"


def test_another_seed_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout that does not follow the seed."""
    monkeypatch.setattr(judge, "ours", lambda case: lambda model: _unseeded(model))
    verdict = check(DROPOUT)
    assert verdict.kind == "wrong"
    assert "the same seed" in verdict.detail


def _unseeded(model: nn.Module) -> Callable[..., Any]:
    calls: list[int] = []

    def call(*args: Any) -> Any:
        calls.append(1)
        torch.manual_seed(len(calls))
        return model(*args)

    return call


def test_a_crash_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Any:
        raise ValueError("planted")

    monkeypatch.setattr(judge, "ours", lambda case: lambda model: broken)
    assert check(MLP).kind == "crashed"


def test_cases_are_written_and_read() -> None:
    for seed in range(200):
        case = draw(seed)
        assert Case.from_json(case.to_json()) == case
        assert draw(seed) == case


def test_shrinking_keeps_what_fails() -> None:
    big = draw(3)
    assert big.head_bias or big.length != 24

    def fails(case: Case) -> bool:
        return case.length == big.length

    assert shrink(big, fails, trials=200) == Case(seed=3, length=big.length)


def test_models_have_the_parts_that_are_asked_for() -> None:
    model = make_model(Case(layers=(Layer(core="fused", qk_norm=True, ffn="swiglu"),), tied=True))
    names = dict(model.named_parameters())
    assert "blocks.0.branches.0.query_norm.weight" in names
    assert model.head.weight is model.embed.weight


def test_random_masks() -> None:
    """A mask that is taken for causal is causal, and one that is taken for one row is one row."""
    rewrites: Counter[str] = Counter()
    for seed in range(100):
        mask = draw_mask(random.Random(seed))
        changed, right = rewritten(mask)
        rewrites["one row" if "one row" in changed else changed] += 1
        assert right, f"seed {seed}: {mask.text}"
    del rewrites[""]  # left alone
    assert rewrites["one row"] > 2
    assert rewrites.total() - rewrites["one row"] > 5


def test_a_single_position_is_no_row_of_positions() -> None:
    def against(one: Callable[[], Tensor]) -> Mask:
        def everything() -> Tensor:
            return (torch.arange(LENGTH)[:, None] >= one()).expand(LENGTH, LENGTH)

        return Mask(everything, "all seen")

    for one in (lambda: torch.arange(LENGTH)[:1], lambda: torch.arange(1)):
        assert rewritten(against(one))[1]


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_in_loops_drops_what_it_should(rate: float) -> None:
    found = measure(rate, chunk_rows=7, seed=3)
    assert found.loops > 0
    assert not surprises(found, rate)


def test_alike_dropouts_are_seen() -> None:
    alike = Rates(1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01)
    assert surprises(alike, 0.1) == ["both: 0.1"]


def test_equal_gradients_have_storages_of_their_own() -> None:
    """Two biases on one stream, under a loss that moves slices."""
    case = draw(2086)
    assert case.shift == "flat_slice"
    assert case.layers[0].residual == "parallel"
    assert check(replace(case, dtype="float64")).kind == "right"

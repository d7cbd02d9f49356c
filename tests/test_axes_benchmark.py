"""benchmarks/axes.py, as far as it needs no compiler."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import axes, axes_page, measure
from tests.models import fresh_compiler  # noqa: F401  (an autouse fixture)

pytest.importorskip("transformers")

KINDS = {case.kind: case for case in axes.CASES}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_trained(kind: str):
    wide = 512 if kind == "vocabulary" else 8
    case = replace(KINDS[kind], tokens=24, hidden=128, wide=wide)
    model, batch = axes.build(case)
    loss = measure.training_step(model, batch)()
    assert torch.isfinite(loss)
    assert all(p.grad is not None for p in model.parameters())


def test_what_is_planned_is_found():
    small, large = axes.Case("gated", 16, 64, 256), axes.Case("gated", 512, 1024, 4096)
    assert axes.planned(small) == []
    assert [loop["axis_length"] for loop in axes.planned(large)] == [4096]


def test_the_page_is_that_of_the_results():
    results = json.loads(axes.RESULTS.read_text())
    assert list(results["records"]) == [case.key for case in axes.CASES]
    assert axes_page.PAGE.read_text() == axes_page.page(results)

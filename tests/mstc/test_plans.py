"""A plan that was written is made again: the same loops, the same numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import mstc
from mstc.errors import FallbackWarning, OptionError
from mstc.options import Options, parse_options
from mstc.plans import differences, read_plan
from passes.records import FixedLoop
from tests.models import (
    EAGER,
    TinyLM,
    compile_mst,
    fresh_compiler,  # noqa: F401  (an autouse fixture)
    lm_batch,
)

AUTO: dict[str, Any] = EAGER | {"chunk_rows": None, "min_chunk_rows": 16}


def _report(model: TinyLM, batch: tuple[Any, ...], **options: Any) -> mstc.Report:
    torch._dynamo.reset()
    model.zero_grad()
    compile_mst(model, **options)(*batch).backward()
    return mstc.last_report()


def test_replayed(tmp_path: Path) -> None:
    """Another chunk size by default; with the plan, the chunks and the gradients of before."""
    path = tmp_path / "plan.json"
    model, batch = TinyLM(layers=2), lm_batch(96, vocab=32)
    first = _report(model, batch, **EAGER)
    wanted = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    first.save_plan(path)
    assert _report(model, batch, **AUTO).graphs[0].loops != first.graphs[0].loops
    again = _report(model, batch, **AUTO, plan=str(path))
    assert again.graphs[0].loops == first.graphs[0].loops
    assert again.graphs[0].peak_after == first.graphs[0].peak_after
    found = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(map(torch.equal, found, wanted))
    assert not [note for note in again.notes if "plan" in note]


def test_modes_and_missing_loops(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    model, batch = TinyLM(layers=1), lm_batch(96, vocab=32)
    report = _report(model, batch, **EAGER)
    (head,) = [f for f in report.fixed_loops() if f.mode == "gradient-in-forward"]
    entry = {"seed": head.seed, "source": head.source, "axis_length": 96, "chunk": 24}
    elsewhere = entry | {"source": "other.py:3  x", "mode": "recompute"}
    plan = {"mstc": mstc.__version__, "loops": [entry | {"mode": "recompute"}, elsewhere]}
    path.write_text(json.dumps(plan))
    again = _report(model, batch, **AUTO, plan=path)
    (loop,) = again.graphs[0].loops
    assert (loop.mode, loop.chunk, loop.num_chunks) == ("recompute", 24, 4)
    assert [n for n in again.notes if n.endswith(f"does not have: {head.seed} at other.py:3  x")]


def test_a_mode_that_is_not_proven(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    model, batch = TinyLM(layers=1), lm_batch(96, vocab=32)
    report = _report(model, batch, **EAGER)
    loops = [f for f in report.fixed_loops() if f.mode == "recompute"]
    assert loops
    entries = [vars(loop) | {"mode": "gradient-in-forward"} for loop in loops]
    path.write_text(json.dumps({"mstc": mstc.__version__, "loops": entries}))
    with pytest.warns(FallbackWarning, match="made for another model"):
        again = _report(model, batch, **AUTO, plan=path)
    assert not again.graphs[0].loops
    reasons = [refusal.reason for refusal in again.graphs[0].refusals]
    assert "the plan wants gradient-in-forward, which is not proven right here" in reasons


def test_without_gradients(tmp_path: Path) -> None:
    """A plan of training serves an evaluation, where there is one mode."""
    path = tmp_path / "plan.json"
    model, batch = TinyLM(layers=1), lm_batch(96, vocab=32)
    _report(model, batch, **EAGER).save_plan(path)
    torch._dynamo.reset()
    with torch.no_grad():
        loss = compile_mst(model, **AUTO, plan=path)(*batch)
    torch.testing.assert_close(loss, model(*batch))
    loops = mstc.last_report().graphs[0].loops
    assert loops
    assert {(loop.mode, loop.chunk) for loop in loops} == {("forward-only", 8)}


def test_other_lengths(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    model = TinyLM(layers=1)
    _report(model, lm_batch(96, vocab=32), **EAGER).save_plan(path)
    for loop in _report(model, lm_batch(200, vocab=32), **AUTO, plan=path).graphs[0].loops:
        assert (loop.axis_length, loop.chunk, loop.num_chunks) == (200, 8, 25)


LOOP: dict[str, Any] = {"seed": "aten.mm", "source": "a.py:1  x", "mode": "recompute"}
LOOP |= {"axis_length": 8, "chunk": 2}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("{", "it is no JSON"),
        ("[]", "it is no plan"),
        ({"mstc": "0.0.1", "loops": []}, "mstc 0.0.1 made it, and this is"),
        ({"loops": [LOOP | {"chunk": 0}]}, "loop 0 is not one"),
        ({"loops": [LOOP, LOOP | {"mode": "guess"}]}, "loop 1 is not one"),
        ({"loops": [{"seed": "aten.mm"}]}, "loop 0 is not one"),
        ({"loops": [3]}, "loop 0 is not one"),
        ({"loops": 3}, "it is no plan"),
        ({"loops": [LOOP | {"chunk": "2"}]}, "loop 0 is not one"),
    ],
)
def test_files_that_are_no_plans(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    if isinstance(content, dict):
        content = json.dumps({"mstc": mstc.__version__} | content)
    if content is not None:
        path.write_text(content)
    with pytest.raises(OptionError, match=message) as caught:
        parse_options({"plan": path}, None)
    assert "\n" not in str(caught.value)


def test_a_plan_names_what_is_compiled(tmp_path: Path) -> None:
    """Two contents of one file are two keys of PyTorch's caches."""
    path = tmp_path / "plan.json"
    keys: list[Options] = []
    for chunk in (2, 4):
        loops = [LOOP | {"chunk": chunk}]
        path.write_text(json.dumps({"mstc": mstc.__version__, "loops": loops}))
        keys.append(parse_options({"plan": path}, None))
    assert keys[0] != keys[1]
    assert keys[1].fixed_loops == (FixedLoop(**(LOOP | {"chunk": 4})),)


def test_differences(tmp_path: Path) -> None:
    one, two = FixedLoop(**LOOP), FixedLoop(**(LOOP | {"source": "b.py:2  y"}))
    assert differences([one, two], [two, one]) == []
    changed = differences([one], [FixedLoop(**(LOOP | {"chunk": 4})), two])
    assert [(c.loop, c.before, c.after) for c in changed] == [
        ("aten.mm at a.py:1  x", "recompute, 8 in chunks of 2", "recompute, 8 in chunks of 4"),
        ("aten.mm at b.py:2  y", "", "recompute, 8 in chunks of 2"),
    ]
    assert read_plan(_written(tmp_path, [one])) == (one,)


def _written(tmp_path: Path, loops: list[FixedLoop]) -> Path:
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"mstc": mstc.__version__, "loops": [vars(f) for f in loops]}))
    return path

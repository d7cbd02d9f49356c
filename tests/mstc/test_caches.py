"""PyTorch's compile caches on disk: a second process starts warm and gets the same numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

import mstc
from mstc.driver import ChunkPass
from mstc.options import parse_options
from mstc.report import Report
from mstc.saved import report_key
from tests.models import (
    MLP,
    TinyLM,
    compile_mst,
    fresh_compiler,  # noqa: F401  (an autouse fixture)
    lm_batch,
    train,
)

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = textwrap.dedent(
    """
    import json
    import sys
    from pathlib import Path
    import torch
    import mstc
    from torch._dynamo.utils import counters
    from torch._inductor.fx_passes.joint_graph import pass_patterns
    from tests.models import INDUCTOR, TinyLM, lm_batch

    do, artifacts = (*sys.argv[1:], "", "")[:2]
    if do == "load":
        torch.compiler.load_cache_artifacts(Path(artifacts).read_bytes())
    patterns = sum(len(group.patterns) for group in pass_patterns)
    torch.manual_seed(0)
    model = TinyLM(hidden=8, vocab=64)
    batch = lm_batch(2, 40, vocab=64)
    eager = model(*batch)
    eager.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    call = torch.compile(model, backend="mst", options=INDUCTOR)
    loss = call(*batch)
    loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=name)
    report = mstc.last_report()
    if do == "save":
        Path(artifacts).write_bytes(torch.compiler.save_cache_artifacts()[0])
    print(json.dumps({
        "loss": loss.item(),
        "eager": eager.item(),
        "gradients": {n: p.grad.double().sum().item() for n, p in model.named_parameters()},
        "hits": sum(n for name, n in counters["aot_autograd"].items() if "hit" in name),
        "lowered": counters["inductor"]["fxgraph_cache_miss"],
        "bypassed": counters["inductor"]["fxgraph_cache_bypass"],
        "notes": report.notes,
        "loops": sum(len(g.loops) for g in report.graphs),
        "report": str(report),
        "patterns": sum(len(group.patterns) for group in pass_patterns) - patterns,
        "bodies": mstc.runtime.loop.counters.bodies_compiled,
    }))
    """
)


def _run(cache: Path, *arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        cwd=ROOT,
        env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_second_process_starts_warm(tmp_path: Path) -> None:
    """With the first folder; elsewhere with a bundle of `torch.compiler.save_cache_artifacts`,
    as clusters use it; and where the report is lost."""
    bundle = str(tmp_path / "bundle")
    cold = _run(tmp_path / "one", "save", bundle)
    assert cold["hits"] == 0
    assert cold["loops"] == 2
    assert cold["loss"] == pytest.approx(cold["eager"], rel=1e-5)
    assert cold["lowered"] > cold["bodies"] > 0
    assert cold["bypassed"] == 0
    assert cold["patterns"] > 0
    _starts_warm(cold, _run(tmp_path / "one"))

    elsewhere = _run(tmp_path / "other", "load", bundle)
    assert elsewhere["hits"] >= 1
    assert elsewhere["lowered"] == 0
    assert elsewhere["gradients"] == cold["gradients"]

    (kept,) = (tmp_path / "one" / "mst_reports").iterdir()
    for spoil in (lambda: kept.write_text('{"graphs": [{"kind"'), kept.unlink):
        spoil()
        _has_lost_the_report(cold, _run(tmp_path / "one"))


def _starts_warm(cold: dict[str, Any], warm: dict[str, Any]) -> None:
    assert warm["hits"] >= 1, "the caches do not work: is the pass's uuid stable?"
    assert (warm["loss"], warm["gradients"]) == (cold["loss"], cold["gradients"])
    # bodies are made ahead in one process and on first use in the other, from the same entries
    assert warm["lowered"] == warm["bypassed"] == 0
    assert warm["patterns"] == 0, "patterns loaded for nothing"
    (note,) = warm["notes"]
    assert note == "the compiled graph came from PyTorch's cache, with this report"
    assert warm["report"] == f"{cold['report']}\nnote: {note}"


def _has_lost_the_report(cold: dict[str, Any], warm: dict[str, Any]) -> None:
    """Neither a missing nor a broken file costs more."""
    assert warm["hits"] >= 1
    assert warm["loss"] == cold["loss"]
    (note,) = warm["notes"]
    assert "was not kept: mstc.explain(model, ...)" in note


def test_a_report_as_json_and_back() -> None:
    model, batch = TinyLM(), lm_batch(2, 37)
    train(model, compile_mst(model), batch)
    report = mstc.last_report()
    assert report.graphs
    assert Report.from_json(json.loads(report.to_json())) == report


def test_the_report_key_knows_what_the_passes_see() -> None:
    """Shapes, dtypes, gradients wanted, options: each changes the key; the same call does not."""
    keys: list[str] = []

    def backend(gm: Any, example_inputs: Any) -> Any:
        keys.append(report_key(gm, "pass", {}))
        keys.append(report_key(gm, "another pass", {}))
        keys.append(report_key(gm, "pass", {"max_autotune": True}))
        return gm.forward

    def run(model: torch.nn.Module, x: torch.Tensor) -> list[str]:
        torch._dynamo.reset()
        keys.clear()
        torch.compile(model, backend=backend)(x)
        return list(keys)

    model, x = MLP(), torch.randn(40, 16)
    first = run(model, x)
    assert run(model, x) == first
    every = first + run(model, x[:39]) + run(MLP(wide=32), x) + run(MLP().double(), x.double())
    with torch.no_grad():
        every += run(model, x)
    every += run(MLP().requires_grad_(False), x)
    assert len(set(every)) == len(every)


def _key(**options: Any) -> object:
    return ChunkPass(parse_options(options, None), Report()).uuid()


def test_the_cache_key() -> None:
    """It tells our options apart; Inductor's are in Inductor's own key."""
    assert _key() == _key() == _key(chunk_rows=None)
    different = [
        _key(),
        _key(chunk_rows=8),
        _key(chunk_rows=9),
        _key(min_chunk_rows=8),
        _key(min_peak_bytes=0),
        _key(min_region_bytes=0),
        _key(gradient_in_forward=False),
        _key(lowering="eager"),
    ]
    assert len(set(map(str, different))) == len(different)
    assert _key(max_autotune=True) == _key()


def test_the_cache_key_covers_our_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    from mstc import driver

    names = {Path(p).relative_to(ROOT).as_posix() for p in driver._SOURCES}
    assert {"passes/regions.py", "passes/rules/shape.py", "mstc/runtime/loop.py"} <= names
    before = _key()
    monkeypatch.setattr(driver, "_SOURCES", driver._SOURCES[1:])
    assert _key() != before


def test_the_pass_can_be_pickled_for_the_key() -> None:
    """What Inductor asks of a custom pass."""
    graph_pass = ChunkPass(parse_options({}, None), Report())
    assert isinstance(graph_pass, torch._inductor.custom_graph_pass.CustomGraphPass)
    assert isinstance(graph_pass.uuid(), (str, bytes))

"""`mstc.explain`, `mstc.last_report`, the logs and the trace: what a user can find out."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import mstc
from mstc import history
from mstc.errors import OptionError
from tests.models import (
    EAGER,
    MLP,
    NON_LEAF,
    TinyLM,
    compile_mst,
    fresh_compiler,  # noqa: F401  (an autouse fixture)
    has_loops,
    lm_batch,
    train,
)

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20


class Broken(TinyLM):
    """Two graphs: the head is in the second."""

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.hidden(ids)
        torch._dynamo.graph_break()
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


# -- explain ------------------------------------------------------------------------------------


def test_explain_says_what_the_backend_does() -> None:
    model, batch = TinyLM(), lm_batch(2, 37)
    explained = mstc.explain(model, *batch, options=EAGER)
    train(model, compile_mst(model), batch)
    assert explained.graphs == mstc.last_report().graphs
    assert has_loops([explained])


def test_explain_computes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither weights nor counters nor random numbers change, and no loop runs."""
    from mstc.runtime import loop

    def refuse(*args: Any) -> None:
        raise AssertionError("a loop ran")

    monkeypatch.setattr(loop.Program, "run", refuse)
    layers = (nn.Linear(16, 64), nn.BatchNorm1d(64), nn.Dropout(), nn.Linear(64, 16), MLP())
    model = nn.Sequential(*layers)
    before = copy.deepcopy(model.state_dict())
    tensors = {name: id(tensor) for name, tensor in model.named_parameters()}
    state = torch.random.get_rng_state()
    report = mstc.explain(model, torch.randn(64, 16, generator=torch.Generator()), options=EAGER)
    assert has_loops([report])
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert {name: id(tensor) for name, tensor in model.named_parameters()} == tensors
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)


def _large_model() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    model = TinyLM(vocab=128_000, hidden=1024, tied=True)
    return model, (torch.zeros(4, 8192, dtype=torch.long), torch.zeros(4, 8192, dtype=torch.long))


def test_explain_stops_at_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """The partitioner, which takes seconds where layers are many, is not asked."""

    def partition(*args: object, **kwargs: object) -> None:
        raise AssertionError("the plan is there")

    monkeypatch.setattr(mstc.inductor, "min_cut_rematerialization_partition", partition)
    report = mstc.explain(TinyLM(), *lm_batch(64, vocab=32), options=EAGER)
    assert report.graphs[0].loops
    assert not report.notes


def test_explain_what_would_not_fit() -> None:
    """16 GB of logits: on fake tensors, and on the meta device, as people make large models."""
    with FakeTensorMode():
        model, batch = _large_model()
    fake = mstc.explain(model, *batch)
    with torch.device("meta"):
        model, batch = _large_model()
    meta = mstc.explain(model, *batch)
    assert fake.graphs == meta.graphs
    (graph,) = fake.graphs
    assert graph.peak_before > 15_000 * MIB > 1_500 * MIB > graph.peak_after
    assert not graph.refusals or all(r.nbytes < graph.peak_after for r in graph.refusals)
    assert next(model.parameters()).device.type == "meta"


def test_explain_without_gradients() -> None:
    with torch.no_grad():
        report = mstc.explain(TinyLM(), *lm_batch(2, 37), options=EAGER)
    (graph,) = report.graphs
    assert graph.kind == "inference"
    assert {entry.mode for entry in graph.loops} == {"forward-only"}


@NON_LEAF
def test_explain_all_graphs_of_a_call() -> None:
    report = mstc.explain(Broken(), *lm_batch(2, 37), options=EAGER)
    assert [bool(graph.loops) for graph in report.graphs] == [True, True]
    assert "graph 1 (training)" in str(report)


def test_explain_nested_arguments() -> None:
    class Nested(TinyLM):
        def forward(self, batch: dict[str, Any], *, scale: float) -> Tensor:
            return super().forward(batch["ids"], batch["rest"][0]) * scale

    ids, labels = lm_batch(2, 37)
    report = mstc.explain(Nested(), {"ids": ids, "rest": [labels]}, options=EAGER, scale=2.0)
    assert has_loops([report])


@NON_LEAF
@pytest.mark.parametrize("model", [TinyLM, Broken])
def test_explaining_does_not_use_up_recompilations(model: Callable[[], nn.Module]) -> None:
    """Dynamo gives up on a function after eight versions of it, and runs it without a backend."""
    subject = model()
    for length in range(20, 29):
        mstc.explain(subject, *lm_batch(2, length), options=EAGER)
    before = len(history.reports())
    train(subject, compile_mst(subject), lm_batch(2, 37))
    assert has_loops(history.reports()[before:])


def test_explaining_does_not_disturb_what_is_compiled() -> None:
    model, batch = TinyLM(), lm_batch(2, 37)
    call = compile_mst(model)
    train(model, call, batch)
    before = len(history.reports())
    mstc.explain(model, *batch, options=EAGER)
    train(model, call, batch)
    assert len(history.reports()) == before


def test_explain_a_compiled_model() -> None:
    model, batch = TinyLM(), lm_batch(2, 37)
    plain = mstc.explain(model, *batch, options=EAGER)
    compiled = mstc.explain(compile_mst(model), *batch, options=EAGER)
    model.compile(backend="mst", options=EAGER)
    in_place = mstc.explain(model, *batch, options=EAGER)
    assert plain.graphs == compiled.graphs == in_place.graphs
    assert model._compiled_call_impl is not None


def test_explain_a_function() -> None:
    model = TinyLM()

    def step(ids: Tensor, labels: Tensor) -> Tensor:
        return model(ids, labels) / 4

    assert has_loops([mstc.explain(step, *lm_batch(2, 37), options=EAGER)])


@NON_LEAF
def test_explain_up_to_where_a_value_is_read() -> None:
    class Reads(Broken):
        def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
            loss = super().forward(ids, labels)
            return loss * 2 if loss.item() > 1 else loss

    report = mstc.explain(Reads(), *lm_batch(2, 37), options=EAGER)
    assert has_loops([report])
    assert any("reads a value" in note for note in report.notes)


def test_explain_refuses_wrong_options() -> None:
    with pytest.raises(OptionError, match="Did you mean 'chunk_rows'"):
        mstc.explain(MLP(), torch.randn(4, 16), options={"chunk_row": 3})


def test_errors_of_the_model_are_its_own() -> None:
    with pytest.raises(TypeError, match="labels"):
        mstc.explain(TinyLM(), lm_batch(2, 37)[0])


# -- the report ---------------------------------------------------------------------------------


def test_no_report_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "_REPORTS", type(history._REPORTS)())
    with pytest.raises(LookupError, match="call the compiled model once"):
        mstc.last_report()


def test_json() -> None:
    model, batch = TinyLM(layers=2), lm_batch(2, 37)
    train(model, compile_mst(model), batch)
    report = mstc.last_report()
    data = json.loads(report.to_json())
    assert set(data) == {"graphs", "deferred", "refusals", "notes"}
    (graph,) = data["graphs"]
    assert graph["kind"] == "training"
    assert graph["peak_after"] == report.graphs[0].peak_after < graph["peak_before"]
    assert {entry["mode"] for entry in graph["loops"]} == {"gradient-in-forward", "recompute"}
    for row in graph["table"]:
        assert row["nbytes"] > 0 < row["count"]
    assert all(r["reason"] and r["subject"] for r in graph["refusals"])


class WithCumsum(nn.Module):
    """A wide value whose tokens mix."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        wide = F.gelu(self.up(x))
        wide = torch.cumsum(wide, 0)
        return self.down(wide)


def test_a_refusal_names_op_and_line() -> None:
    x = torch.randn(64, 16)
    compile_mst(WithCumsum())(x).sum().backward()
    (graph,) = mstc.last_report().graphs
    text = [str(r) for r in graph.refusals]
    found = [t for t in text if "aten.cumsum mixes positions of the loop axis" in t]
    assert found, text
    assert "wide = torch.cumsum(wide, 0)" in found[0]
    assert "mstc/test_report.py:" in found[0]
    assert all(r.nbytes > 0 for r in graph.refusals)


def test_the_text(golden: Callable[[object, str], None]) -> None:
    model = TinyLM(vocab=4096, hidden=64, layers=3)
    report = mstc.explain(model, *lm_batch(4, 512, vocab=4096), options={"min_peak_bytes": 0})
    golden(re.sub(r"models\.py:\d+", "models.py:LINE", str(report)), "report")


def test_the_text_is_for_people() -> None:
    model = TinyLM(vocab=4096, hidden=64, layers=3)
    text = str(mstc.explain(model, *lm_batch(4, 512, vocab=4096), options=EAGER))
    assert max(map(len, text.splitlines())) < 250
    assert "tests/models.py" in text
    assert str(ROOT) not in text
    assert "logits = self.head(self.hidden(ids))" in text


def test_an_output_that_left_the_graph_is_listed() -> None:
    class Model(TinyLM):
        def forward(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            logits = self.head(self.hidden(ids))
            return F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits

    compile_mst(Model())(*lm_batch(2, 37))
    (line,) = mstc.last_report().deferred
    assert "2x37x96" in line
    assert "logits = self.head(self.hidden(ids))" in line


def test_the_predicted_peaks_are_of_the_right_size() -> None:
    """Tokens 512, hidden 32, vocabulary 4096: logits of 8 MiB, and a weight of 0.5 MiB."""

    def measure(backend: str) -> int:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = TinyLM(vocab=4096, hidden=32)
        call = (
            compile_mst(model, chunk_rows=32)
            if backend == "mst"
            else torch.compile(model, backend=backend)
        )
        batch = lm_batch(512, vocab=4096)
        train(model, call, batch)
        model.zero_grad()
        trace = mstc.measure_peak(lambda: call(*batch).backward(), parameters=model.parameters())
        return trace.peak_intermediate_nbytes

    ours, theirs = measure("mst"), measure("aot_eager")
    assert ours < 0.3 * theirs
    (graph,) = mstc.last_report().graphs
    # The prediction is for fused code; op by op, up to four values as large as the logits are
    # alive.
    logits, chunk = 512 * 4096 * 4, 32 * 4096 * 4
    assert graph.peak_before < theirs < graph.peak_before + 3 * logits
    assert graph.peak_after < ours < graph.peak_after + 4 * chunk


# -- logs and traces ----------------------------------------------------------------------------


def _run_program(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    source = textwrap.dedent(program)
    return subprocess.run(
        [sys.executable, "-c", source],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )


def test_logs_and_trace(tmp_path: Path) -> None:
    done = _run_program(
        """
        import mstc
        from tests.models import TinyLM, compile_mst, lm_batch
        compile_mst(TinyLM())(*lm_batch(2, 37)).backward()
        """,
        TORCH_LOGS="+mstc,+passes",
        TORCH_TRACE=str(tmp_path),
    )
    for step in ("axes", "regions", "plan", "chunk"):
        assert f"{step}: " in done.stderr
    assert "predicted peak" in done.stderr
    (trace,) = tmp_path.glob("*.log")
    lines = trace.read_text().splitlines()
    names = [line for line in lines if '"artifact"' in line and '"mst_' in line]
    assert any('"mst_report"' in line for line in names)
    assert any("_plan" in line for line in names)


def test_nothing_is_logged_unasked() -> None:
    done = _run_program(
        """
        import mstc
        from tests.models import TinyLM, compile_mst, lm_batch
        compile_mst(TinyLM())(*lm_batch(2, 37)).backward()
        """
    )
    assert done.stdout == ""
    assert done.stderr == ""

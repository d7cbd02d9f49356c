"""The coverage table: its models build, a row runs end to end, the page says what the JSON says."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import (
    accuracy,
    compile_time,
    coverage,
    coverage_table,
    longest,
    measure,
    models,
    prediction,
    store,
    table,
    tradeoff,
    tradeoff_page,
    zoo,
)
from benchmarks.zoo import ZOO
from benchmarks.zoo.rows import _DECODERS, _ENCODERS, _EXPERT_MODELS, _HEADLESS, _PLAIN, _RECURRENT
from tests.models import fresh_compiler  # noqa: F401  (an autouse fixture)

# What transformers says about token ids that a tiny vocabulary lacks goes to its log, not to us.
pytest.importorskip("transformers")


def _subject(name: str) -> models.Subject:
    try:
        return ZOO[name].subject(zoo.TINY)
    except zoo.Unavailable as reason:
        pytest.skip(str(reason))


def test_names_are_unique():
    rows = (*_DECODERS, *_EXPERT_MODELS, *_RECURRENT, *_ENCODERS, *_HEADLESS, *_PLAIN)
    assert len(ZOO) == len(rows)
    assert len({architecture.title for architecture in rows}) == len(rows)


@pytest.mark.parametrize("name", ZOO)
def test_architecture_trains_without_dropout(name: str):
    subject = _subject(name)
    assert subject.model.training
    drops = [m for m in subject.model.modules() if isinstance(m, nn.Dropout) and m.p > 0]
    assert not drops
    losses = []
    for _ in range(2):
        subject.model.zero_grad()
        losses.append(measure.training_step(subject.model, subject.batch)())
    assert torch.isfinite(losses[0])
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
    assert any(p.grad is not None and p.grad.any() for p in subject.model.parameters())


@pytest.mark.parametrize("name", ["llama", "t5", "mixtral", "encoder", "torchtitan", "timm"])
def test_checkpointing_recomputes_and_changes_nothing(name: str):
    subject = _subject(name)
    model = copy.deepcopy(subject.model)
    zoo.checkpoint(ZOO[name], model)
    calls: list[None] = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda *_: calls.append(None))
    measure.training_step(subject.model, subject.batch)()
    measure.training_step(model, subject.batch)()
    forward_only = len(calls)
    with torch.no_grad():
        calls.clear()
        model(**subject.batch)
    assert forward_only > len(calls), "no linear layer was computed a second time"
    theirs, ours = accuracy.gradients(subject.model), accuracy.gradients(model)
    assert accuracy.floored_error(ours, theirs)["worst"] < 1e-6


@pytest.mark.parametrize("name", [n for n, a in ZOO.items() if a.experts])
def test_routers_do_not_waver(name: str):
    """float64 and bfloat16 choose the same experts, and not one set for all tokens."""
    subject = _subject(name)
    reference = copy.deepcopy(subject.model).double()
    with torch.no_grad(), zoo.Routing() as true, accuracy.Float64():
        reference(**subject.batch)
    with torch.no_grad(), zoo.Routing() as own, torch.autocast("cpu", torch.bfloat16):
        subject.model(**subject.batch)
    assert true.decisions > 0
    assert own.differing(true) == 0
    chosen = {tuple(choice) for c in true.chosen for choice in c.flatten(0, -2).tolist()}
    assert len(chosen) > 1, "all tokens go to the same experts"


def test_error_of_gradients_that_are_nothing():
    """Held against a thousandth of the whole gradient; a missing one counts as zeros."""
    truth = {"weight": torch.tensor([3.0, 4.0]), "bias": torch.tensor([1e-12])}
    noise = {"weight": torch.tensor([3.0, 4.0]), "bias": torch.tensor([5e-8])}
    error = accuracy.floored_error(noise, truth)
    assert error["worst"] == pytest.approx(5e-8 / 5e-3, rel=1e-3)
    assert error["worst_parameter"] == "bias"
    assert error["below_floor"] == 1
    assert accuracy.floored_error(truth | {"unused": torch.zeros(2)}, truth)["worst"] == 0
    assert accuracy.floored_error({"bias": truth["bias"]}, truth)["worst"] == pytest.approx(1)
    wrong = truth | {"weight": torch.tensor([float("nan"), 4.0])}
    assert accuracy.floored_error(wrong, truth)["worst_parameter"] == "weight"


def test_grouped_product_in_float64():
    """The reference's own, where PyTorch has none, against the product per group by hand."""
    a, b = torch.randn(6, 4, dtype=torch.float64), torch.randn(3, 4, 5, dtype=torch.float64)
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    with accuracy.Float64():
        product = torch._grouped_mm(a, b, offs=ends)
    expected = torch.cat([a[:2] @ b[0], a[2:5] @ b[2], torch.zeros(1, 5, dtype=torch.float64)])
    torch.testing.assert_close(product, expected)


def test_row_end_to_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """One row in a fresh process; it is not measured twice, unless it failed."""
    monkeypatch.setattr(coverage, "_RUNS", 1)  # no times are looked at
    out = tmp_path / "coverage.json"
    arguments = ["--only=nanogpt", "--modes=fp32", "--scale=tiny", "--lowering=eager"]
    arguments += ["--rounds=1", f"--out={out}"]
    assert coverage.main(arguments) == 0
    record = json.loads(out.read_text())["records"]["nanogpt/fp32"]
    assert set(record["contenders"]) == {"eager", "inductor", "mst"}
    for found in record["contenders"].values():
        assert found["peak_intermediate_nbytes"] > 0
        assert 0 < found["error"]["worst"] < 1e-5
        assert len(found["rounds_s"]) == 1
    assert record["contenders"]["mst"]["graphs"] == 1
    assert record["reports"][0]["graphs"][0]["kind"] == "training"
    assert "| fp32 | 1 |" in capsys.readouterr().out

    def broken(*_: Any, **__: Any) -> dict[str, Any]:
        raise measure.WorkerFailed("at /somewhere/deep/in/file.py:3")

    monkeypatch.setattr(measure, "run_fresh", broken)
    assert coverage.main(arguments) == 0
    assert coverage.main([*arguments, "--redo"]) == 1
    record = json.loads(out.read_text())["records"]["nanogpt/fp32"]
    assert record["failed"] == "at file.py:3", "without this machine's folders"
    monkeypatch.setattr(measure, "run_fresh", lambda *_, **__: {"contenders": {}, "reports": []})
    assert coverage.main([*arguments, "--retry-failed"]) == 0
    assert "failed" not in json.loads(out.read_text())["records"]["nanogpt/fp32"]


def test_failing_contender_leaves_the_others(monkeypatch: pytest.MonkeyPatch):
    def compiled(model: nn.Module, contender: str) -> Any:
        if contender == "aot_eager":
            raise NotImplementedError("not today")
        return model

    monkeypatch.setattr(measure, "compiled", compiled)
    job = {"architecture": "nanogpt", "mode": "autocast", "rounds": 1, "lowering": "eager"}
    found = coverage.row(job | {"scale": "tiny", "contenders": ["eager", "inductor", "mst"]})
    contenders = found["contenders"]
    assert contenders["inductor"]["failed"].startswith("NotImplementedError: not today")
    assert contenders["mst"]["failed"].startswith("RuntimeError: nothing was compiled")
    assert contenders["eager"]["rounds_s"]
    assert set(coverage_table.failures(found)) == {"inductor", "mst"}


@pytest.mark.parametrize(
    ("mode", "least", "most"),
    [
        ("fp32", 1e-9, 1e-5),
        ("checkpoint", 1e-9, 1e-5),
        ("autocast", 1e-4, 5e-2),
        ("bf16", 1e-4, 5e-2),
    ],
)
def test_errors_are_those_of_the_precision(mode: str, least: float, most: float):
    """Not zero, so the mode was on; not larger than its rounding, so the reference was the same."""
    job = {"architecture": "mixtral", "mode": mode, "rounds": 0, "lowering": "eager"}
    found = coverage.row(job | {"scale": "tiny", "contenders": ["eager"]})
    assert least < found["contenders"]["eager"]["error"]["worst"] < most
    assert found["routing"]["decisions"] > found["routing"]["differing"] == 0


def test_interrupted_write_leaves_the_file(tmp_path: Path):
    path = tmp_path / "results.json"
    store.save(path, {"device": "a", "date": "1", "records": {"x": 1}, "note": "n"})
    with pytest.raises(TypeError):
        store.save(path, {"records": object()})
    found = store.load(path, {"device": "a", "date": "2"})
    assert found == {"device": "a", "date": "2", "records": {"x": 1}, "note": "n"}
    with pytest.raises(SystemExit, match="other device"):
        store.load(path, {"device": "b", "date": "2"})
    assert store.load(path, {"device": "b"}, force=True)["records"] == {}


def _contender(mib: float, seconds: float, worst: float) -> dict[str, Any]:
    return {
        "peak_intermediate_nbytes": int(mib * 2**20),
        "error": {"worst": worst},
        "graphs": 1,
        "rounds_s": [seconds, seconds * 9, seconds],
    }


def _report(**changes: Any) -> dict[str, Any]:
    loop = {"mode": "recompute", "axis_length": 1024, "num_chunks": 4, "count": 2}
    refusal = {"subject": "aten.tril", "source": "a.py:3  x | y", "reason": "no rule"}
    graph = {"loops": [loop], "refusals": [refusal | {"nbytes": 3 * 2**20, "count": 1}]}
    return {"graphs": [graph], "refusals": [], "notes": [], "deferred": []} | changes


def _results() -> dict[str, Any]:
    sizes = {"rows": 2, "tokens": 511}
    llama = {
        "eager": _contender(100, 1.5, 1e-6),
        "inductor": _contender(100, 1.0, 1e-6),
        "auto_chunker": {"failed": "AssertionError: a | b"},
        "mst": _contender(25, 0.5, 1e-6),
    }
    vit = llama | {"mst": _contender(110, 1.0, 5e-6)}
    records = {
        "llama/fp32": {"sizes": sizes, "contenders": llama, "reports": [_report()]},
        "qwen2/fp32": {
            "sizes": sizes,
            "contenders": llama | {"mst": _contender(1, 2.0, 1e-6)},
            "routing": {"decisions": 9, "differing": 1},
            "reports": [],
        },
        "vit/fp32": {"sizes": sizes, "contenders": vit, "reports": [_report(notes=["as it was"])]},
        "rwkv/checkpoint": {"skipped": "it has none"},
        "mpt/autocast": {"failed": "no result after 9 s"},
    }
    header = {"device": "a cpu", "threads": 2, "versions": {"torch": "2"}, "lowering": "inductor"}
    scale = {"layers": 2, "hidden": 128, "heads": 4, "vocab": 8192, "image": 64}
    return header | {"date": "today", "scale": scale, "records": records}


def test_page_says_what_the_results_say():
    text = coverage_table.page(_results())
    lines = text.splitlines()
    fp32 = "| fp32 | 3 | 0.05 (worst 0.25, llama) | 1.10 (worst 1.10, vit) | "
    fp32 += "1.00 (worst 2.00, qwen2) | 1 | vit |"
    assert fp32 in lines
    every = "| all | 5 | 0.05 (worst 0.25, llama) | 1.10 (worst 1.10, vit) | "
    assert every + "1.00 (worst 2.00, qwen2) | 1 | 1 |" in lines
    assert "* 5 rows, 3 measured." in lines
    assert "* Failed: auto_chunker in 3, row in 1." in lines
    assert "* With loops: 2 rows. With something refused: 2 rows." in lines
    assert "* Peak above Inductor's: vit/fp32." in lines
    assert "* A pass failed and the graph was left as it was: vit/fp32." in lines
    llama = "| Llama | 2 x 511 | 100.0 | 1.00 | failed | **0.25** | 0.50 | 1.0e-06 | "
    assert llama + "1.0e-06 | 1 | 2 x recompute, 1024 in 4 |" in lines
    assert "1.0e-06† |" in text, "routing was not the same"
    refusal = "* `aten.tril` at `a.py:3 x / y`: no rule (3.0 MiB; fp32)"
    assert lines.count(refusal) == 2
    assert "* llama/fp32, auto_chunker: `AssertionError: a / b`" in lines
    assert "* mpt/autocast, row: `no result after 9 s`" in lines
    assert "* rwkv/checkpoint: skipped, it has none" in lines
    assert "a cpu, 2 threads; torch 2" in text


def test_a_gradient_that_is_not_a_number_is_further_off():
    results = _results()
    results["records"]["llama/fp32"]["contenders"]["mst"]["error"]["worst"] = float("nan")
    assert "| llama, vit |" in coverage_table.summary(results)


def test_what_is_published_is_what_was_measured():
    """The page and the README's table are made of the committed results, of all rows."""
    results = json.loads(coverage.RESULTS.read_text())
    assert set(results["records"]) == {f"{n}/{m}" for n in ZOO for m in coverage.modes_of(n)}
    assert coverage.PAGE.read_text() == coverage_table.page(results)
    readme = coverage.README.read_text()
    assert table.put(readme, "coverage", coverage_table.summary(results)) == readme


def test_predictions_are_those_that_were_published():
    """docs/prediction.md and the README's table are made of both result files."""
    results = json.loads(prediction.RESULTS.read_text())
    measured = json.loads(coverage.RESULTS.read_text())
    assert set(results["records"]) == set(ZOO)
    found = prediction.compare(results, measured)
    assert prediction.PAGE.read_text() == prediction.page(results, found)
    readme = prediction.README.read_text()
    assert readme == table.put(readme, "prediction", found.summary)


def test_longest_sequences_are_those_that_were_published():
    results = json.loads(longest.RESULTS.read_text())
    assert longest.PAGE.read_text() == longest.page(results)
    readme = longest.README.read_text()
    assert readme == table.put(readme, "longest", longest.summary(results))


def test_compile_times_are_those_that_were_published():
    results = json.loads(compile_time.RESULTS.read_text())
    readme = compile_time.README.read_text()
    assert readme == table.put(readme, "compile", compile_time.summary(results))
    for record in results["records"].values():
        assert all(one["lowered"] == 0 for one in record["mst"]["warm"])


def test_trade_offs_are_those_that_were_published():
    """docs/tradeoff.md is made of the results, and every row has all contenders."""
    studies = tradeoff.LENGTHS, tradeoff.EVERY
    lengths, every = (json.loads(study.results.read_text()) for study in studies)
    for study, results in zip(studies, (lengths, every), strict=True):
        for record in results["records"].values():
            assert set(record["contenders"]) == {"inductor", *study.settings}
    assert tradeoff_page.PAGE.read_text() == tradeoff_page.page(lengths, every)
    for name in ("tradeoff", "tradeoff-every", "tradeoff-predicted"):
        assert "<svg" in tradeoff_page.PAGE.with_name(f"{name}.svg").read_text()


def test_times_are_predicted_as_was_published():
    """By the planner of today; and about as they were measured."""
    records = json.loads(tradeoff.EVERY.results.read_text())["records"]
    settings = list(tradeoff.EVERY.settings)
    found = tradeoff.predictions({"model": "encoder", "settings": settings})
    published = records["encoder/0"]["contenders"]
    assert found == {name: pytest.approx(published[name]["predicted"]) for name in settings}
    pairs = [pair for own in tradeoff_page.predicted(records).values() for pair in own]
    assert len(pairs) == len(records) * len(settings)
    assert sum(abs(own - time) for own, time in pairs) < 0.08 * len(pairs)


def test_a_row_above_the_limit_is_measured_three_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seconds = {"llama": [2.0, 0.5, 1.05], "vit": [1.0]}

    def measured(job: dict[str, Any], kernels: Path) -> dict[str, Any]:
        own = _contender(1, seconds[job["architecture"]].pop(0), 1e-6)
        contenders = {"mst": own, "inductor": _contender(1, 1.0, 1e-6)}
        return {"sizes": {"rows": 1, "tokens": 2}, "contenders": contenders, "reports": []}

    monkeypatch.setattr(coverage, "_measured", measured)
    out = tmp_path / "found.json"
    arguments = ["--only", "llama,vit", "--modes", "fp32", "--scale", "tiny", "--out", str(out)]
    assert coverage.main(arguments) == 0
    assert not any(seconds.values())
    records = json.loads(out.read_text())["records"]
    assert [len(records[key]["runs"]) for key in ("llama/fp32", "vit/fp32")] == [3, 1]
    assert coverage_table.time_ratio(records["llama/fp32"]) == 1.05
    assert coverage.main(arguments) == 0, "nothing is left to be measured"

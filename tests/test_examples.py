"""What the README tells people to run does run: examples, demo and benchmarks, at tiny sizes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import accuracy, measure, memory, models, table
from examples import huggingface, plain_pytorch
from examples.demo import corpus
from examples.demo.__main__ import main as demo

TINY = {"tokens": 128, "vocab": 512, "hidden": 64, "layers": 1, "steps": 2}


@pytest.mark.parametrize("main", [plain_pytorch.main, huggingface.main])
def test_example_trains_to_the_same_losses_as_eager(
    main: Callable[..., tuple[list[float], int]], capsys: pytest.CaptureFixture[str]
):
    losses, peak = main(**TINY)
    truth, _ = main(**TINY, backend="eager")
    assert losses == pytest.approx(truth, rel=1e-5)
    assert losses[1] < losses[0], "two steps on the same text: the loss falls"
    assert peak > 0
    assert f"peak intermediate memory: {peak / 2**20:.1f} MiB (mst)" in capsys.readouterr().out


def test_demo_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    sizes = {"device": "cpu", "dtype": "float32", "hidden": 64, "layers": 1, "vocab": 512}
    sizes |= {"tokens": 64, "steps": 4}
    arguments = [f"--{name}={value}" for name, value in sizes.items()]
    assert demo([*arguments, "--contenders=eager", f"--out={tmp_path}"]) == 0
    printed = capsys.readouterr().out
    assert "peak intermediate MiB" in printed
    (line,) = [line for line in printed.splitlines() if line.startswith("eager ")]
    _, measured, predicted, *_ = line.split()
    assert float(measured) == float(predicted) > 0
    assert (tmp_path / "memory-cpu.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "memory-cpu.svg").read_text()


def test_demo_batches_are_the_text():
    texts = corpus.sources(max_nbytes=50_000)
    tokenizer = corpus.train_tokenizer(texts, 512)
    batches = corpus.batches(texts, tokenizer, tokens=32, count=3)
    assert [tuple(batch.shape) for batch in batches] == [(1, 32)] * 3
    ids = torch.cat(batches, dim=1)[0].tolist()
    assert texts[0].startswith(tokenizer.decode(ids))
    with pytest.raises(ValueError, match="need more text"):
        corpus.batches(texts[:1], tokenizer, tokens=32, count=10**6)


def test_benchmark_writes_resumes_and_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "memory.json"
    arguments = ["--scale=tiny", "--only=nanogpt", "--cases=1x64", "--contenders=eager"]
    arguments += ["--skip-time", "--modes=fp32", "--error-case=1x32", f"--out={out}"]
    assert memory.main(arguments) == 0
    results = json.loads(out.read_text())
    assert set(results["records"]) == {"peak/nanogpt/1x64/eager", "error/nanogpt/1x32/fp32"}
    assert results["records"]["peak/nanogpt/1x64/eager"]["peak_intermediate_nbytes"] > 0
    assert 0 < results["records"]["error/nanogpt/1x32/fp32"]["eager"]["worst"] < 1e-5
    assert "| nanogpt | 1x64 |" in capsys.readouterr().out

    def no_job_is_left(*_: Any, **__: Any) -> dict[str, Any]:
        raise AssertionError("measured twice")

    monkeypatch.setattr(measure, "run_fresh", no_job_is_left)
    assert memory.main(arguments) == 0
    with pytest.raises(SystemExit, match="other dtype"):
        memory.main([*arguments, "--dtype=bfloat16"])


def test_table_shows_gains_and_failures():
    peak = {"peak_intermediate_nbytes": 3 * 2**20, "compile_s": 1.0}
    records = {
        "peak/llama/1x64/eager": {"failed": "torch.OutOfMemoryError: CUDA out of memory"},
        "peak/llama/1x64/inductor": peak,
        "peak/llama/1x64/mst": peak | {"peak_intermediate_nbytes": 2**20},
        "time/llama/1x64": {"step_s": {"inductor": 0.5, "mst": 0.25}, "mst_over_inductor": 0.5},
        "error/llama/1x64/fp32": {"failed": "exit status 1"},
    }
    header = {"device": "a", "threads": 2, "dtype": "float32", "date": "today", "versions": {}}
    text = table.markdown(header | {"records": records})
    cost = "| llama | 1x64 | out of memory | 3.0 | 1.0 | 3.0 | 1 | 1 | 0.5 | 0.25 | 0.50 |"
    assert cost in text.splitlines()
    assert "| llama | 1x64 | fp32 | failed | failed |" in text


def test_failed_worker_is_reported():
    with pytest.raises(measure.WorkerFailed, match="KeyError"):
        measure.run_fresh("benchmarks.memory", {"work": "nothing of the kind"})


@pytest.mark.parametrize("name", models.NAMES)
def test_reference_is_float64_throughout(name: str):
    """`.double()` alone leaves float32 casts in norms and losses; under Float64 none is left."""
    subject = models.build(name, "tiny", rows=1, tokens=32)
    with accuracy.Float64():
        loss = measure.training_step(subject.model.double(), subject.batch)()
    assert loss.dtype == torch.float64
    assert all(p.grad is not None for p in subject.model.parameters())


def test_gradient_error_is_relative_and_leaves_rounding_out():
    truth = {
        "a": torch.tensor([3.0, 4.0]),
        "b": torch.tensor([100.0]),
        "zero": torch.tensor([1e-9]),
    }
    ours = {"a": torch.tensor([3.0, 4.5]), "b": torch.tensor([101.0]), "zero": torch.tensor([5e-9])}
    error = accuracy.gradient_error(ours, truth)
    assert error["worst"] == pytest.approx(0.1)
    assert error["worst_parameter"] == "a"
    assert error["left_out"] == ["zero"]
    with pytest.raises(ValueError, match="different parameters"):
        accuracy.gradient_error({}, truth)

"""benchmarks/gpu.py, as far as it can be tried without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import gpu, measure
from tests.models import fresh_compiler  # noqa: F401  (an autouse fixture)

pytest.importorskip("transformers")


def test_idle_time_and_the_share_of_products():
    spans = [
        ("void cutlass::Kernel2<sm90_gemm>", 0.0, 10.0),
        ("triton_poi_fused_mul_0", 12.0, 14.0),
        ("triton_red_fused_1", 13.0, 16.0),  # beside the one before, on another stream
        ("nvjet_tst_128x256", 16.0, 22.0),
    ]
    assert gpu.summary_of_kernels(reversed(spans)) == {
        "kernels": 4,
        "span_us": 22.0,
        "idle_us": 2.0,
        "product_share": 0.8,
    }
    with pytest.raises(ValueError, match="saw no kernel"):
        gpu.summary_of_kernels([])


def test_a_run_goes_on_where_it_stopped():
    jobs = gpu.jobs_of(gpu.SIZES["tiny"])
    records: dict[str, dict[str, Any]] = {}
    asked: list[dict[str, Any]] = []
    saved: list[int] = []

    def run(job: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        asked.append(job)
        assert 0 < timeout_s <= 1000
        if job.get("contender") == "Liger, checkpointed":
            raise measure.WorkerFailed("killed")
        if job["kind"] == "kernels":
            return {"kernels": 3, "span_us": 4e3, "idle_us": 1e3, "product_share": 0.5}
        return {"first_step_s": 9.4, "tokens_per_s": 1234.5, "peak_nbytes": 3 * 2**30}

    def save() -> None:
        saved.append(len(records))

    assert gpu.run_jobs(jobs, records, 0.0, save, run) == list(jobs)  # no time, nothing begun
    assert gpu.run_jobs(jobs, records, 1000.0, save, run) == []
    assert list(records) == list(jobs)
    assert saved == list(range(1, len(jobs) + 1))  # after each
    assert gpu.run_jobs(jobs, records, 1000.0, save, run) == []
    assert len(asked) == len(jobs)  # none twice
    text = gpu.markdown(records)
    assert "| 1 | 512 | mst | 1,234 | 3.00 | 9 |" in text
    assert "Liger, checkpointed | WorkerFailed: killed" in text
    assert "| 1,024 | inductor | 3 | 4.0 | 25.0% | 50.0% |" in text


def test_whole_models_come_soon_and_cover_what_few_can():
    keys = list(gpu.jobs_of(gpu.SIZES["8b"]))
    assert keys.index("step/32/65536/mst, checkpointed") < len(gpu.CONTENDERS) + 1
    assert "step/32/131072/inductor, checkpointed" in keys
    assert len(set(keys)) == len(keys)


def test_a_step_without_inductor(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(gpu.CONTENDERS, "mst, checkpointed", gpu.Contender("mst_eager", True))
    job = {"kind": "step", "contender": "mst, checkpointed", "layers": 1, "tokens": 512}
    found = gpu.work(job | {"device": "cpu", "size": "tiny"})
    assert found["parameter_nbytes"] > 2 * 4096 * 64  # bfloat16
    assert 0 < found["peak_nbytes"] < 4 * 512 * 4096 * 4  # four logits in float32
    assert found["tokens_per_s"] > 0
    assert len(found["step_s"]) == gpu._STEPS
    assert torch.get_default_dtype() == torch.float32


def test_who_fails_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(gpu.CONTENDERS, "mst", gpu.Contender("no such backend", False))
    job = {"kind": "step", "contender": "mst", "layers": 1, "tokens": 64}
    assert "no such backend" in gpu.work(job | {"device": "cpu", "size": "tiny"})["failed"]


def test_no_gpu_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        gpu.main([])
    assert stopped.value.code == 2
    assert "no GPU here" in capsys.readouterr().err

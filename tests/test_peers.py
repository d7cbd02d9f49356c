"""Contenders do what they claim, who fails leaves the others, the page says what was measured."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import accuracy, measure, quiet, store
from benchmarks.peers import __main__ as peers
from benchmarks.peers import cases, page, turns
from benchmarks.peers.contenders import BASE, CONTENDERS, Contender, of_case
from mstc.runtime.memory import measure_step
from tests.models import fresh_compiler  # noqa: F401  (an autouse fixture)

pytest.importorskip("transformers")


def _task(case: str, tokens: int = 512) -> cases.Task:
    return cases.build(case, "tiny", tokens, "cpu", torch.float32)


def _measured(task: cases.Task, name: str) -> tuple[float, int]:
    """(worst error, peak bytes) of a contender."""
    truth = cases.truth(task)
    step = task.step(CONTENDERS[name].make(task))
    step()
    error = accuracy.floored_error(task.gradients(), truth)["worst"]
    task.clear()
    return error, measure_step(step, task.leaves().values()).peak_nbytes


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same partitioner, and no C++."""

    def compiled(model: Any, contender: str) -> Any:
        assert contender == "inductor"
        return measure.compiled_by(model, "aot_eager_decomp_partition")

    monkeypatch.setattr(measure, "compiled", compiled)


# --- the work


def test_every_case_has_the_base_and_us():
    for case in cases.CASES:
        assert {"eager", BASE, "mst"} <= set(of_case(case))
    titles = [contender.title for contender in CONTENDERS.values()]
    assert len(set(titles)) == len(titles) <= len(page._MARKERS)


def test_truth_of_a_loss_in_chunks_is_that_of_the_whole():
    task = _task("linear-ce")
    truth = cases.truth(task)
    whole = cases.Task("whole", task.size, task.tokens, task.module, task.inputs)
    assert accuracy.floored_error(cases.truth(whole), truth)["worst"] < 1e-12
    assert set(truth) == {"head.weight", "input hidden"}


@pytest.mark.parametrize("case", cases.CASES)
def test_the_same_in_every_process(case: str):
    first, second = _task(case, 64), _task(case, 64)
    for name, value in first.inputs.items():
        assert torch.equal(value, second.inputs[name])
    assert accuracy.floored_error(cases.truth(first), cases.truth(second))["worst"] == 0
    error, _ = _measured(first, "eager")
    assert 0 < error < 1e-5


# --- contenders do what they claim


@pytest.mark.parametrize("case", ["layer", "model"])
def test_checkpoint_computes_layers_again(case: str):
    calls: list[None] = []
    task = _task(case)
    for name, module in task.module.named_modules():
        if name.endswith("up_proj"):
            module.register_forward_hook(lambda *_: calls.append(None))
    task.step(task.module)()
    once = len(calls)
    assert once == task.size.layers
    task.step(CONTENDERS["checkpoint"].make(task))()
    assert len(calls) == once + 2 * once


@pytest.mark.usefixtures("without_inductor")
@torch._functorch.config.patch(activation_memory_budget=1.0)  # which puts it back
def test_budget_saves_less():
    config: Any = torch._functorch.config
    kept: dict[str, int] = {}
    for name, share in ((BASE, 1.0), ("budget 0.5", 0.5), ("budget 0", 0.0)):
        torch._dynamo.reset()
        task = _task("layer")
        work = CONTENDERS[name].make(task)
        assert config.activation_memory_budget == share
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda value, sizes=sizes: sizes.append(value.nbytes) or value, lambda value: value
        ):
            work(**task.inputs)
        kept[name] = sum(sizes)
    assert kept["budget 0"] < kept["budget 0.5"] < kept[BASE]


@pytest.mark.usefixtures("without_inductor")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # Dynamo looks at chunks
@pytest.mark.parametrize("case", ["linear-ce", "model"])
@pytest.mark.parametrize("name", ["linear_cross_entropy", "chunked loss", "chunked loss+inductor"])
def test_a_chunked_loss_is_right_and_small(case: str, name: str):
    _, whole = _measured(_task(case), "eager")
    error, peak = _measured(_task(case), name)
    assert error < 1e-5
    assert peak < whole / 2


def test_auto_chunker_chunks_the_head_and_says_so_where_it_does_not():
    from torch._inductor import metrics

    contender = CONTENDERS["auto_chunker"]
    assert contender.note
    metrics.reset()
    assert contender.note() == "found nothing to chunk"
    task = _task("linear-ce", 1024)
    error, peak = _measured(task, "auto_chunker")
    assert metrics.num_auto_chunking == 1
    assert contender.note() == ""
    assert error < 1e-5
    assert peak < 1024 * task.size.vocab * 4, "the logits were never whole"


def _package(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> None:
    """An importable package that stands in for one that is not installed."""
    parent = ""
    for part in name.split("."):
        parent = f"{parent}.{part}" if parent else part
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    for key, value in contents.items():
        setattr(sys.modules[name], key, value)


class _Tiled(torch.autograd.Function):
    """What DeepSpeed's function takes, without what it does."""

    @staticmethod
    def forward(ctx: Any, fn: Any, mlp: Any, x: Tensor, shards: int, parameters: list[Any]) -> Any:
        assert shards == -(-x.shape[-2] // x.shape[-1])
        assert len(parameters) == 3
        ctx.save_for_backward(x)
        ctx.work = lambda value: fn(mlp, value)
        return torch.cat([fn(mlp, part) for part in x.chunk(shards, dim=-2)], dim=-2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            ctx.work(x).backward(gradients[0])
        return None, None, x.grad, None, None


@pytest.mark.parametrize("case", ["mlp", "layer", "model"])
def test_deepspeed_is_called_as_it_says(case: str, monkeypatch: pytest.MonkeyPatch):
    _package(monkeypatch, "deepspeed.runtime.sequence_parallel.ulysses_sp", TiledMLP=_Tiled)
    error, _ = _measured(_task(case), "deepspeed")
    assert error < 1e-5


def test_losses_of_other_libraries_are_called_as_they_say(monkeypatch: pytest.MonkeyPatch):
    def cut(e: Tensor, c: Tensor, targets: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(e @ c.T, targets)

    class Fused:
        def __call__(self, weight: Tensor, hidden: Tensor, labels: Tensor) -> Tensor:
            return cut(hidden, weight, labels)

    _package(monkeypatch, "cut_cross_entropy", linear_cross_entropy=cut)
    _package(monkeypatch, "liger_kernel.transformers", LigerFusedLinearCrossEntropyLoss=Fused)
    sys.modules["liger_kernel"].transformers = sys.modules["liger_kernel.transformers"]  # type: ignore
    for name in ("cut_cross_entropy", "liger"):
        error, _ = _measured(_task("linear-ce"), name)
        assert error < 1e-5


def test_packages_are_required_in_the_versions_that_were_measured():
    """The Mini-Sequence reference is in no registry."""
    lines = (Path(peers.__file__).parent / "requirements.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line and line[0] != "#")
    packages = {c.package for c in CONTENDERS.values() if c.package} - {"minis"}
    assert {name.replace("-", "_") for name in pinned} == packages
    results = measure.ROOT / "benchmarks" / "results" / "peers-cpu.json"
    measured = json.loads(results.read_text())["versions"]
    assert pinned == {name: measured[name] for name in pinned}


def test_who_cannot_run_here_says_why(monkeypatch: pytest.MonkeyPatch):
    assert CONTENDERS["liger"].missing("cpu") == "needs a GPU"
    absent = Contender("absent", lambda task: task.module, package="no_such_package")
    assert absent.missing("cuda") == "package no_such_package is not installed"
    assert not CONTENDERS["mst"].missing("cpu")


# --- a run goes on

FAKES = {
    "fails": "raise NotImplementedError('not today')",
    "killed": "os.kill(os.getpid(), 9)",
    "hungry": "return lambda **inputs: torch.empty(2**44)",
    "slow": "time.sleep(1000)",
    "late": "return dying_at_third(task.module)",
}
WORKER = """
import functools, os, sys, time
import torch
from benchmarks.peers import contenders, worker

def dying_at_third(module):
    calls = []
    def work(**inputs):
        calls.append(None)
        if len(calls) == 3:
            os.kill(os.getpid(), 9)
        return module(**inputs)
    return work

"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`run(...)`: a run of eager and others, at a small size; returns its results."""
    fakes = [f"def {name}(task):\n    {body}\n" for name, body in FAKES.items()]
    add = "contenders.CONTENDERS['{0}'] = contenders.Contender('{0}', {0}, compiles=False)\n"
    script = tmp_path / "worker.py"
    main = "worker.main(sys.argv[1])\n"
    script.write_text(WORKER + "".join(fakes) + "".join(map(add.format, FAKES)) + main)
    monkeypatch.setattr(turns, "COMMAND", [sys.executable, str(script)])
    monkeypatch.setenv("PYTHONPATH", str(measure.ROOT))
    monkeypatch.setattr(quiet, "FOLDER", tmp_path)
    for name in FAKES:
        monkeypatch.setitem(CONTENDERS, name, Contender(name, lambda task: None, compiles=False))
    absent = Contender("absent", lambda task: None, package="no_such_package")
    monkeypatch.setitem(CONTENDERS, "absent", absent)
    started: list[str] = []
    fresh = measure.run_fresh

    def run_fresh(module: str, job: dict[str, Any], **how: Any) -> dict[str, Any]:
        started.append(job.get("case", "caches"))
        return fresh(module, job, **how) if job else {}  # nobody here compiles

    monkeypatch.setattr(measure, "run_fresh", run_fresh)
    out = tmp_path / "found.json"

    def run(*names: str, more: tuple[str, ...] = ()) -> dict[str, Any]:
        common = ["--scale", "tiny", "--cases", "linear-ce", "--tokens", "64", "--rounds", "2"]
        named = ["--contenders", ",".join(("eager", *names)), "--out", str(out)]
        assert peers.main([*common, *named, *more]) == 0
        return json.loads(out.read_text())["records"]["linear-ce/64"] | {"started": list(started)}

    return run


def test_who_fails_is_killed_silent_or_missing_leaves_the_others(run: Any):
    record = run("fails", "killed", "hungry", "slow", "late", "absent", more=("--timeout", "40"))
    rows = record["contenders"]
    assert record["complete"]
    assert rows["fails"]["failed"].startswith("NotImplementedError: not today")
    assert rows["killed"]["failed"] == rows["late"]["failed"]
    assert rows["killed"]["failed"].startswith("killed, as the system does")
    assert "can't allocate memory" in rows["hungry"]["failed"]
    assert page._without(rows["hungry"]) == "out of memory"
    assert rows["slow"]["failed"] == "no answer after 40 s"
    assert rows["absent"] == {"missing": "package no_such_package is not installed"}
    assert len(rows["eager"]["rounds_s"]) == 2
    assert 0 < rows["eager"]["error"]["worst"] < 1e-5
    assert rows["eager"]["peak_nbytes"] > 64 * 8192 * 4


def test_interrupted_runs_resume(run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    class Interrupted(KeyboardInterrupt):
        pass

    def interrupt(*_: Any) -> None:
        raise Interrupted

    with monkeypatch.context() as patched:
        patched.setattr(peers, "_take_turns", interrupt)
        with pytest.raises(Interrupted):
            run("killed")
    saved = json.loads((tmp_path / "found.json").read_text())["records"]["linear-ce/64"]
    assert not saved["complete"]
    assert saved["contenders"]["killed"]["failed"]
    assert "| eager |" not in page.summary({"records": {"linear-ce/64": saved}})

    saved["contenders"]["killed"]["failed"] = "not asked again"
    results = json.loads((tmp_path / "found.json").read_text()) | {
        "records": {"linear-ce/64": saved}
    }
    store.save(tmp_path / "found.json", results)
    record = run("killed")
    assert record["contenders"]["eager"]["rounds_s"]
    assert record["contenders"]["killed"]["failed"] == "not asked again"
    assert run("killed")["started"].count("linear-ce") == 2, "nothing was left to be measured"
    _never_continued_elsewhere(run, tmp_path / "found.json")


def _never_continued_elsewhere(run: Any, path: Path):
    """Results of another machine, or of other versions."""
    results = json.loads(path.read_text())
    results["versions"]["torch"] = "1.0"
    results["records"]["linear-ce/128"] = {"complete": True, "contenders": {}}
    store.save(path, results)
    with pytest.raises(SystemExit, match="other versions"):
        run("killed")
    assert json.loads(path.read_text()) == results
    run(more=("--force",))
    assert set(json.loads(path.read_text())["records"]) == {"linear-ce/64"}


def test_a_part_of_the_contenders_is_not_published():
    with pytest.raises(SystemExit):
        peers.main(["--contenders", "eager"])


# --- the page


def _row(mib: float, seconds: float, worst: float, **more: Any) -> dict[str, Any]:
    return {
        "peak_nbytes": int(mib * 2**20),
        "first_step_s": 9.0,
        "error": {"worst": worst},
        "rounds_s": [seconds, seconds * 9, seconds],
        **more,
    }


def _results() -> dict[str, Any]:
    short = {
        "eager": _row(300, 2.0, 1e-6),
        "inductor": _row(100, 1.0, 1e-6),
        "deepspeed": {"missing": "package deepspeed is not installed"},
        "mst": _row(25, 0.5, 2e-6, note="left the graph as it was"),
    }
    long = {
        "eager": {"failed": "RuntimeError: can't allocate memory: you tried `x`"},
        "inductor": _row(400, 4.0, 1e-6),
        "deepspeed": {"failed": "ImportError: x"},
        "mst": _row(100, 8.0, 1e-6),
    }
    records = {
        "mlp/1024": {"complete": True, "commit": "c", "contenders": short},
        "mlp/4096": {"complete": True, "commit": "c", "contenders": long},
        "mlp/16384": {"complete": False, "commit": "c", "contenders": {"eager": short["eager"]}},
    }
    header = {"device": "a cpu", "threads": 2, "dtype": "float32", "versions": {"torch": "2"}}
    sizes = {"mlp": {"hidden": 256, "wide": 896, "layers": 0}}
    return header | {"sizes": sizes, "date": "today", "records": records}


def test_page_says_what_the_results_say():
    lines = page.text({"cpu": _results()}).splitlines()
    assert "| eager |  | 3.00 / 2.00 |  |  | 1.00 | 1 of 2 |" in lines
    assert "| **mst** |  | 0.25 / 1.00 |  |  | 2.00 | 2 of 2 |" in lines
    assert "| DeepSpeed's TiledMLP |  |  |  |  |  | 0 of 2 |" in lines
    mst = "| 1,024 | **mst** | 25.0 | 0.25 | 0.5 | 0.50 | 9.0 | 2.0e-06 | 2.00 | "
    assert mst + "left the graph as it was |" in lines
    assert "| 4,096 | eager | out of memory |  |  |  |  |  |  |  |" in lines
    assert (
        "| 1,024 | DeepSpeed's TiledMLP | package deepspeed is not installed |  |  |  |  |  |  |  |"
        in lines
    )
    assert "* mlp/4096, eager: `RuntimeError: can't allocate memory: you tried 'x'`" in lines
    assert "Sizes: hidden 256, wide 896." in lines
    [absent] = [line for line in lines if line.startswith("**Not measured**")]
    assert "mlp at 16,384" in absent
    assert "mlp at 4,096" not in absent


def test_a_gradient_that_is_not_a_number_is_the_worst():
    results = _results()
    results["records"]["mlp/1024"]["contenders"]["mst"]["error"]["worst"] = float("nan")
    assert "| **mst** |  | 0.25 / 1.00 |  |  | inf | 2 of 2 |" in page.summary(results)


def test_picture_is_drawn(tmp_path: Path):
    page.draw(_results(), tmp_path / "peers.svg")
    assert "<svg" in (tmp_path / "peers.svg").read_text()


def test_what_is_published_is_what_was_measured():
    """The page is made of the results; each group is whole, and lacks no contender."""
    found = page.published()
    assert "cpu" in found
    for device, results in found.items():
        for key, record in results["records"].items():
            case, tokens = key.split("/")
            assert int(tokens) in cases.LENGTHS[device][case]
            assert record["complete"]
            assert list(record["contenders"]) == of_case(case)
        assert "<svg" in page.picture_path(device).read_text()
    assert page.PAGE.read_text() == page.text(found)
    assert page.README.read_text() == page.readme(found)

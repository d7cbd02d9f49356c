"""A step of all layers, found from steps of few: equal to a simulation of all."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

import mstc
from mstc.cli import layers, steps, text
from mstc.cli.app import run
from mstc.cli.second import second_process
from mstc.cli.subject import Subject, Wanted
from mstc.report import Report
from mstc.runtime.memory import MemoryTrace
from mstc.watch import Buffer, Held, SimulatedTrace
from tests.cli.test_fit import CONFIG as FOUR_LAYERS
from tests.models import fresh_compiler  # noqa: F401  (an autouse fixture)

CONFIG = FOUR_LAYERS | {"vocab_size": 4096}


def _config(tmp_path: Path, **changes: Any) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG | changes))
    return str(path)


def test_explain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same peaks and the same values at them, of two and three layers as of all four."""
    arguments = ["explain", _config(tmp_path), "--seq-len=1536", "--json"]
    assert run(arguments) == 0
    few = json.loads(capsys.readouterr().out)
    assert run([*arguments, "--all-layers"]) == 0
    every = json.loads(capsys.readouterr().out)
    assert few["layers"] == 4
    assert few["report"] == every["report"], "the plan is made for all layers in any case"
    assert few["report"]["graphs"][0]["loops"]
    for backend, entry in few["peaks"].items():
        whole = every["peaks"][backend]
        assert entry["simulated_layers"] == [2, 3]
        assert whole["simulated_layers"] is None
        assert sum(h["nbytes"] for h in entry["at_peak"]) == entry["peak_intermediate_nbytes"]
        for name in ("peak_nbytes", "peak_intermediate_nbytes", "grad_nbytes"):
            assert entry[name] == whole[name], (backend, name)
        assert sorted(h["nbytes"] for h in entry["at_peak"]) == sorted(
            h["nbytes"] for h in whole["at_peak"]
        )


def test_two_processes_and_a_deeper_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under one backend the steps of two and of three layers are not alike: four are simulated."""
    asked: list[tuple[int, str, Any]] = []

    def simulated(model: str, wanted: Wanted, num_layers: int, backend: str, options: Any) -> Any:
        asked.append((num_layers, backend, options))
        return _trace(num_layers, 100, 10, loss=320 if (backend, num_layers) == ("mst", 2) else 0)

    @contextmanager
    def here() -> Iterator[Executor]:
        with ThreadPoolExecutor(1) as pool:
            yield pool

    monkeypatch.setattr(steps, "_of_few", simulated)
    monkeypatch.setattr(steps, "second_process", here)
    report = Report()
    planned, found = steps.planned_and_simulated(
        "", Wanted(1), _subject(9, 1), (2, 3), lambda: report
    )
    assert planned is report
    nothing = {"min_peak_bytes": 1 << 62}  # for few layers as for all
    assert {(n, b) for n, b, o in asked if o == nothing} == {(n, "mst") for n in (2, 3, 4)}
    assert {(n, b) for n, b, o in asked if o is None} == {(n, "inductor") for n in (2, 3)}
    assert len(asked) == 5, "each once"
    assert {step.peak_nbytes for step in found.values()} == {_trace(9, 100, 10).peak_nbytes}
    assert {b: step.simulated for b, step in found.items()} == {"inductor": (2, 3), "mst": (3, 4)}


def test_a_failure_here_ends_the_second_process() -> None:
    def fail() -> None:
        with second_process() as second:
            for _ in range(3):
                second.submit(time.sleep, 100)
            raise ZeroDivisionError

    begin = time.perf_counter()
    with pytest.raises(ZeroDivisionError):
        fail()
    assert time.perf_counter() - begin < 50


def test_text_says_so() -> None:
    """Also where nothing is worth a loop."""
    console = Console(record=True, width=200, file=io.StringIO())
    step = layers.Step(300 << 20, 200 << 20, 100 << 20, (Held(200 << 20, "mm", ""),), (2, 3))
    whole = replace(step, simulated=None)
    subject = _subject(5, 1)
    text.print_explanation(console, subject, {"inductor": step, "mst": whole}, Report())
    printed = " ".join(console.export_text().split())
    assert "inductor: 2 and 3 of 5 layers simulated" in printed
    assert printed.count("layers simulated") == 1
    assert "No loops" in printed


def test_few_layers_are_left_alone_where_all_are(tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    report = mstc.explain(model, torch.randn(4, 8))
    assert layers.options_of(report, plan) == {"min_peak_bytes": 1 << 62}
    assert not plan.exists()
    looped = mstc.explain(
        model, torch.randn(512, 8), options={"min_peak_bytes": 0, "min_region_bytes": 0}
    )
    assert layers.options_of(looped, plan) == {"plan": str(plan)}
    assert plan.exists()


def _subject(depth: int | None, period: int) -> Subject:
    return Subject("", nn.Module(), lambda tokens: ((), {}), 1, depth, period)


@pytest.mark.parametrize(
    ("depth", "period", "few"),
    [
        (None, 1, None),
        (3, 1, None),
        (4, 1, (2, 3)),
        (32, 1, (2, 3)),
        (6, 2, (2, 4)),
        (7, 2, (3, 5)),
        (26, 6, (8, 14)),
        (12, 12, None),
    ],
)
def test_depths(depth: int | None, period: int, few: tuple[int, int] | None) -> None:
    assert layers.depths(_subject(depth, period)) == few
    if few is not None:
        assert depth is not None
        assert (depth - few[0]) % (few[1] - few[0]) == 0
        assert few[0] % period == depth % period, "it ends on a layer of the same kind"


@dataclass
class _Step:
    """A step, written down: what is made and what is dropped, by name."""

    times: int = 0
    backward: int = 0
    buffers: list[Buffer] = field(default_factory=list)

    def make(self, name: str, nbytes: int) -> None:
        own = nbytes if name == "gradient" else 0
        self.buffers.append(Buffer(nbytes, own, self.times, None, name, "", None, False))
        self.times += 1

    def drop(self, name: str) -> None:
        """The latest of that name."""
        last = max(i for i, b in enumerate(self.buffers) if b.made_by == name and b.dies is None)
        self.buffers[last] = replace(self.buffers[last], dies=self.times)
        self.times += 1

    def trace(self) -> SimulatedTrace:
        def alive(time: int) -> list[Buffer]:
            return [b for b in self.buffers if b.born <= time and (b.dies or 1e9) > time]

        timeline = [(float(t), sum(b.nbytes for b in alive(t))) for t in range(self.times)]
        grad = sum(b.grad_nbytes for b in self.buffers)
        peak = max(nbytes for _, nbytes in timeline)
        memory = MemoryTrace(peak, 0, timeline[-1][1], grad, tuple(timeline))
        return SimulatedTrace(
            **vars(memory),
            loops=(),
            backward=self.backward,
            buffers=tuple(self.buffers),
        )


def _trace(depth: int, saved: int, grad: int, loss: int = 0) -> SimulatedTrace:
    """Every layer keeps a value, and its backward needs another, and gives a gradient."""
    step = _Step()
    for _ in range(depth):
        step.make("kept", saved)
    if loss:
        step.make("loss", loss)
        step.drop("loss")
    step.backward = step.times
    for _ in range(depth):
        step.make("work", 50)
        step.drop("work")
        step.make("gradient", grad)
        step.drop("kept")
    return step.trace()


@pytest.mark.parametrize(("saved", "grad"), [(100, 10), (10, 100), (70, 70)])
def test_memory_that_falls_and_that_rises(saved: int, grad: int) -> None:
    """Through the backward, from layer to layer: the highest instant is in the last layer, or in
    the first."""
    found = layers.extrapolate([_trace(n, saved, grad) for n in (2, 3)], (2, 3), 9)
    whole = _trace(9, saved, grad)
    assert found.peak_nbytes == whole.peak_nbytes
    assert found.peak_intermediate_nbytes == 9 * saved + 50
    assert found.grad_nbytes == 9 * grad
    assert found.at_peak == whole.at_peak


def test_another_instant_in_a_shallow_step() -> None:
    """With two layers a loss is the highest, with three and more the backward is."""

    def trace(depth: int) -> SimulatedTrace:
        return _trace(depth, 100, 10, loss=0 if depth > 2 else 320)

    asked: list[int] = []

    def simulate(depth: int) -> SimulatedTrace:
        asked.append(depth)
        return trace(depth)

    found = layers.step_of_all(simulate, (2, 3), 9)
    assert asked == [2, 3, 4]
    assert found.simulated == (3, 4)
    assert found.peak_nbytes == trace(9).peak_nbytes


def test_an_instant_with_gradients_that_grows_slower() -> None:
    """In shallow steps it is the highest, and in deeper ones no more."""

    def trace(depth: int) -> SimulatedTrace:
        step = _Step()
        for _ in range(depth):
            step.make("kept", 100)
        step.backward = step.times
        step.make("work", 50)
        step.drop("work")
        step.make("gradient", max(120 - 30 * depth, 0))
        step.drop("gradient")
        for _ in range(depth):
            step.make("work", 1)
            step.drop("work")
            step.drop("kept")
        return step.trace()

    assert trace(2).peak_nbytes > trace(2).peak_intermediate_nbytes
    found = layers.extrapolate([trace(n) for n in (2, 3)], (2, 3), 9)
    assert found.peak_nbytes == found.peak_intermediate_nbytes == trace(9).peak_nbytes == 950

"""The memory of a step before and after, for `mstc explain`.

Of many equal layers few are simulated (`mstc.cli.layers`), by two processes: while this one plans
for all layers, the other simulates what Inductor makes of few; then each of them simulates one of
the two depths under the plan.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch._dynamo.exc import BackendCompilerFailed  # what Dynamo makes of a failed compilation

from mstc.cli import layers
from mstc.cli.second import second_process
from mstc.cli.subject import Subject, Wanted, load_subject
from mstc.errors import SimulationError
from mstc.report import Report
from mstc.simulate import Backend, simulate_step
from mstc.watch import SimulatedTrace

BACKENDS: tuple[Backend, ...] = ("inductor", "mst")  # before, and after


def traces(subject: Subject, memory_budget: str | None = None) -> dict[str, SimulatedTrace]:
    """Steps of all layers, under each of `BACKENDS`."""
    budget = None if memory_budget is None else {"memory_budget": memory_budget}
    return {
        backend: _trace(subject, backend, budget if backend == "mst" else None)
        for backend in BACKENDS
    }


def planned_and_simulated(
    model: str, wanted: Wanted, subject: Subject, few: tuple[int, int], plan: Callable[[], Report]
) -> tuple[Report, dict[str, layers.Step]]:
    """The plan for all layers, and steps of all, found from steps of few under that plan.

    Args:
        model, wanted: what `subject` was made of.
        few: depths, as `mstc.cli.layers.depths` gives them.
        plan: plans for all layers.
    """
    depth = subject.num_layers
    assert depth is not None
    simulate = partial(_of_few, model, wanted)
    with second_process() as second, TemporaryDirectory() as folder:
        ahead = {n: second.submit(simulate, n, "inductor", None) for n in few}
        report = plan()
        options = layers.options_of(report, Path(folder) / "plan.json")
        # the deeper one for the process that has compiled before
        deep = second.submit(simulate, few[1], "mst", options)
        shallow = simulate(few[0], "mst", options)

        def before(num_layers: int) -> SimulatedTrace:
            own = ahead.get(num_layers)
            return own.result() if own else simulate(num_layers, "inductor", None)

        def after(num_layers: int) -> SimulatedTrace:
            if num_layers in few:
                return shallow if num_layers == few[0] else deep.result()
            return simulate(num_layers, "mst", options)

        found = {"inductor": before, "mst": after}
        return report, {b: layers.step_of_all(found[b], few, depth) for b in BACKENDS}


def _of_few(
    model: str, wanted: Wanted, num_layers: int, backend: Backend, options: dict[str, Any] | None
) -> SimulatedTrace:
    subject = load_subject(model, replace(wanted, num_layers=num_layers))
    try:
        return _trace(subject, backend, options)
    except BackendCompilerFailed as error:  # it holds a frame, which no process can send another
        raise SimulationError(str(error.inner_exception)) from None


def _trace(subject: Subject, backend: Backend, options: dict[str, Any] | None) -> SimulatedTrace:
    args, kwargs = subject.batch
    return simulate_step(subject.model, *args, backend=backend, options=options, **kwargs)

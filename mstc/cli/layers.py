"""A step of many equal layers, found from steps of few of them.

Terms
    depth     a number of layers.
    period    layers after which their kinds repeat.
    summit    what is held at the highest instant of a part of a step (`mstc.watch.Summit`).

Algorithm
    1. Two depths are simulated that differ by one period, and that end on a layer of the kind that
       the model ends on. The shallower one has a first layer and a last one that are not the same,
       since these differ from those between (what makes their input, what reads their output).
    2. What is held a given number of changes after the forward's end grows by the same for every
       period, and so does what is held a given number of changes before the end of the step, as
       long as these are changes of the same layer. Hence two parts of a step: until half of the
       shallower one's backward, and the last changes, as many as a period makes. Their summits are
       linear in the depth, each. Between the two, memory rises or falls from layer to layer, so the
       higher summit is the step's; with gradients it is no lower than without. (The halves of each
       step's own backward would not do: in another depth, the second half begins in another layer,
       and its summit grows by something else.)
    3. So do gradients, and the values that are held at a summit, by what makes them and their size.
    4. In a shallow step another instant may be the highest than in a deep one. Then what is held
       there is of other kinds: a period more is simulated, and the two deepest are compared.

Not handled: an instant with gradients that is highest in a deep step only, and in neither summit of
the shallow ones (what is held at the same instant of two depths cannot be told by counting changes:
a few more per layer are at the forward's end). A model whose layers are of more kinds than repeat,
an encoder beside a decoder, scripts: all of it is simulated.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mstc.cli.subject import Subject
from mstc.report import Report
from mstc.watch import Held, SimulatedTrace, Summit

_DEEPER = 3  # periods that are simulated beyond the first two, at most


@dataclass(frozen=True)
class Step:
    """The memory of one step, forward and backward, above weights and batch."""

    peak_nbytes: int
    peak_intermediate_nbytes: int  # gradients not counted
    grad_nbytes: int
    at_peak: tuple[Held, ...]  # at the intermediate peak, largest first; gradients are not in it
    simulated: tuple[int, int] | None = (
        None  # the depths it was found from; None if it was simulated itself
    )


def depths(subject: Subject) -> tuple[int, int] | None:
    """The two numbers of layers to simulate; None where all are to be."""
    depth, period = subject.num_layers, subject.period
    if depth is None:
        return None
    low = period + depth % period
    while low < 2:
        low += period
    return None if depth <= low + period else (low, low + period)


def step_of(trace: SimulatedTrace) -> Step:
    """A step that was simulated itself."""
    return Step(trace.peak_nbytes, trace.peak_intermediate_nbytes, trace.grad_nbytes, trace.at_peak)


def extrapolate(traces: Sequence[SimulatedTrace], few: tuple[int, int], depth: int) -> Step:
    """The step of `depth` layers.

    Args:
        traces: of steps of `few` layers.
        few: two depths; `depth` is further by a whole number of times of what they are apart.
    """
    low, high = few
    times, rest = divmod(depth - low, high - low)
    assert not rest
    first, second = traces

    def grown(one: int, other: int) -> int:
        return one + times * (other - one)

    early, late = _backward(first) // 2, _backward(second) - _backward(first)
    summits = [
        Summit(
            grown(a.peak_nbytes, b.peak_nbytes),
            grown(a.peak_intermediate_nbytes, b.peak_intermediate_nbytes),
            _held(a.at_peak, b.at_peak, times),
        )
        for a, b in zip(*(_summits(trace, early, late) for trace in traces), strict=True)
    ]
    top = max(summits, key=lambda summit: summit.peak_intermediate_nbytes)
    return Step(
        # a shallow step's may be an instant with gradients that grows slower than the top does
        peak_nbytes=max(*(summit.peak_nbytes for summit in summits), top.peak_intermediate_nbytes),
        peak_intermediate_nbytes=top.peak_intermediate_nbytes,
        grad_nbytes=grown(first.grad_nbytes, second.grad_nbytes),
        at_peak=top.at_peak,
        simulated=few,
    )


def step_of_all(
    simulate: Callable[[int], SimulatedTrace], few: tuple[int, int], depth: int
) -> Step:
    """The step of `depth` layers, from `few` or, where these do not do, from a few more.

    Args:
        simulate: a step of so many layers.
        few: as `depths` gives them.
        depth: of the model.
    """
    low, high = few
    period = high - low
    traces = simulate(low), simulate(high)
    for _ in range(_DEEPER):
        if high + period >= depth or _are_alike(*traces):
            break
        low, high = high, high + period
        traces = traces[1], simulate(high)
    return extrapolate(traces, (low, high), depth)


def _are_alike(first: SimulatedTrace, second: SimulatedTrace) -> bool:
    """Whether values of the same kinds are held at the summits, and no fewer with more layers."""
    fewer, more = Counter(first.at_peak), Counter(second.at_peak)
    return fewer.keys() == more.keys() and fewer <= more


def _backward(trace: SimulatedTrace) -> int:
    return len(trace.changes) - trace.forward_changes


def _summits(trace: SimulatedTrace, early: int, late: int) -> tuple[Summit, Summit]:
    """Until `early` changes into the backward, and of the last `late`."""
    end = len(trace.changes)
    return trace.summit(0, trace.forward_changes + early), trace.summit(end - late, end)


def _held(first: Sequence[Held], second: Sequence[Held], times: int) -> tuple[Held, ...]:
    """Values that more layers hold more of are there as often as they say; what fewer hold would
    be there less than never, which a deeper step does not have."""
    counts, more = Counter(first), Counter(second)
    for held in {*counts, *more}:
        counts[held] += times * (more[held] - counts[held])
    return tuple(sorted(counts.elements(), key=lambda held: -held.nbytes))


def options_of(report: Report, path: Path) -> dict[str, Any]:
    """Options under which fewer layers get what was planned for all; `path` is for a plan."""
    if all(graph.untouched for graph in report.graphs):
        return {"min_peak_bytes": 1 << 62}  # nothing is worth it
    report.save_plan(path)
    return {"plan": str(path)}

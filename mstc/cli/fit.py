"""The longest sequence that fits into a given memory, for several ways of training.

Terms
    state     weights, optimizer state; gradients are in the step's peak.
    step      what `mstc.simulate` finds: gradients, saved values, and what stands at the peak.

Algorithm
    1. The step of a length is simulated with that length, not with an open one: a planner, and
       Inductor, may decide otherwise where they do not know it. Of a configuration of many equal
       layers few are simulated (`mstc.cli.layers`), which tests hold to be exact.
    2. From the step of one length those of others are computed, buffer by buffer
       (`mstc.cli.lengths`). The longest that has room is simulated, too, and is the answer if its
       step is what was computed, to the byte.
    3. Under mst, loops are those of a plan: a planner that sees few layers may decide otherwise
       than for all of them. First the plan for few layers is tried; then that for all layers at
       the length found, until a length has the plan that it was found with.

What it assumes: code as Inductor writes it for a CPU (kernels on a GPU fuse much alike; its
attention kernels keep statistics a little larger); nothing for what kernels take while they run,
for the CUDA context, for fragmentation, for communication; nothing is offloaded (simulated tensors
are on the host). Chunks have the fewest rows that keep a GPU busy, so that the answer does not
depend on the planner's choice for one length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from mstc.cli.layers import Step, depths, extrapolate, options_of, step_of, step_of_all
from mstc.cli.lengths import GRAIN, at_length, longest_computed, longest_tried, probe_of
from mstc.cli.second import second_process
from mstc.cli.subject import Subject, SubjectError, Wanted, load_subject
from mstc.device import MIN_ROWS
from mstc.explain import explain
from mstc.simulate import Backend, Simulation, loss_of
from mstc.watch import SimulatedTrace
from passes.records import FixedLoop

CHUNK_ROWS = MIN_ROWS["cuda"]  # of every loop: the fewest at which a GPU is busy
OPTIMIZERS = {"none": 0, "sgd": 0, "momentum": 1, "adamw": 2}  # states per weight
_LARGE = 8  # chunks, from which on the lengths under mst are whole numbers of chunks


@dataclass(frozen=True)
class Way:
    """A way of training."""

    name: str
    backend: Backend
    checkpoint: bool

    @property
    def options(self) -> dict[str, Any] | None:
        return {"chunk_rows": CHUNK_ROWS} if self.backend == "mst" else None


WAYS = (
    Way("inductor", "inductor", False),
    Way("inductor, checkpointed", "inductor", True),
    Way("mst", "mst", False),
    Way("mst, checkpointed", "mst", True),
)


@dataclass(frozen=True)
class Fit:
    """An answer."""

    way: Way
    seq_len: int | None  # tokens per sequence; None: not even `GRAIN` fit
    step_nbytes: int  # peak of the step at `seq_len`, gradients included; 0 if not even state fits
    state_nbytes: int  # weights and optimizer state


def fit(model: str, memory: int, wanted: Wanted, way: Way, optimizer: str = "adamw") -> Fit:
    """Find the longest sequence.

    Args:
        model: as for `load_subject`.
        memory: bytes.
        wanted: batch size and dtype; length and checkpointing are not read.
        way: of training.
        optimizer: a key of `OPTIMIZERS`; its states have the weights' dtype.

    Raises:
        SubjectError: the model cannot be used, or its batch does not depend on the length.
    """
    wanted = replace(wanted, seq_len=GRAIN, checkpoint=way.checkpoint)
    whole = load_subject(model, wanted)
    if not _depends_on_length(whole):
        raise SubjectError(
            f"{model}: the batch does not depend on seq_len; let the function take it."
        )
    weights = sum(p.nbytes for p in whole.model.parameters())
    state = weights * (1 + OPTIMIZERS[optimizer])
    room = memory - state
    if room <= 0:
        return Fit(way, None, 0, state)
    steps = _Steps(model, wanted, way, whole)
    if way.backend != "mst":
        longest, peak = steps.longest(room, weights)
        return Fit(way, longest, peak, state)
    with TemporaryDirectory() as folder:
        planner = _Planner(Path(folder), way, whole)
        few = depths(whole)
        first = load_subject(model, replace(wanted, num_layers=few[1])) if few else whole
        longest = _consistent(
            lambda plan: steps.longest(room, weights, plan)[0],
            planner.plan_of,
            planner.made_for(first, steps.probe or GRAIN),
        )
        # a chunk divides its length: the plan of this very length may have others
        peak = steps.peak(longest or GRAIN, planner.plan_of(longest or GRAIN))
        while longest and peak > room:
            longest -= GRAIN
            peak = steps.peak(longest or GRAIN, planner.plan_of(longest or GRAIN))
    return Fit(way, longest or None, peak, state)


@dataclass(frozen=True)
class _Plan:
    """What the planner decided."""

    loops: frozenset[FixedLoop] | None  # of any length and chunk; None: the graph is untouched
    chunks: frozenset[FixedLoop] = field(compare=False)  # the same with their chunks
    options: dict[str, Any] = field(compare=False)  # under which that is done again


class _Planner:
    """Plans for all layers of a model."""

    def __init__(self, folder: Path, way: Way, whole: Subject) -> None:
        self._folder, self._way, self._whole = folder, way, whole
        self._known: dict[int, _Plan] = {}

    def plan_of(self, seq_len: int) -> _Plan:
        if seq_len not in self._known:
            self._known[seq_len] = self.made_for(self._whole, seq_len)
        return self._known[seq_len]

    def made_for(self, subject: Subject, seq_len: int) -> _Plan:
        args, kwargs = subject.batch_of(seq_len)
        report = explain(subject.model, *args, options=self._way.options, **kwargs)
        options = options_of(report, self._folder / f"{subject.num_layers}-{seq_len}.json")
        chunks = frozenset(replace(loop, axis_length=1) for loop in report.fixed_loops())
        loops = frozenset(replace(loop, chunk=1) for loop in chunks)
        return _Plan(loops if "plan" in options else None, chunks, options)


def _consistent(
    longest: Callable[[_Plan], int | None], plan_of: Callable[[int], _Plan], plan: _Plan
) -> int | None:
    """The longest sequence under the plan that is made for it; `plan` is tried first."""
    found: dict[_Plan, int | None] = {}
    while plan not in found:
        found[plan] = longest(plan)
        plan = plan_of(found[plan] or GRAIN)
    # more than one: each is what the next one's plan is made for, the shortest fits under any
    around = list(found.values())[list(found).index(plan) :]
    return min(around, key=lambda one: one or 0)


class _Steps:
    """Steps in one way of training."""

    def __init__(self, model: str, wanted: Wanted, way: Way, whole: Subject) -> None:
        self._model, self._wanted, self._way = model, wanted, way
        self._few, self._depth = depths(whole), whole.num_layers
        self._traces: dict[tuple[int | None, int, frozenset[FixedLoop] | None], SimulatedTrace] = {}
        self._computed: dict[tuple[int, frozenset[FixedLoop] | None], int] = {}
        self.probe = probe_of(whole.model, CHUNK_ROWS, (wanted.batch_size,))

    def longest(self, room: int, least: int, plan: _Plan | None = None) -> tuple[int | None, int]:
        """The longest length that has room, and the bytes of its step (or of the shortest one's).

        Args:
            room: bytes.
            least: of a step without tokens, about.
            plan: to be replayed.
        """
        peak = partial(self.peak, plan=plan)
        found = None
        if self.probe is not None:
            found, few = self._longest_computed(room, plan)
            if found and self._is_as_computed(found, few, plan):
                step = self._of_probe(found, plan).peak_nbytes
                self._computed[found, plan and plan.chunks] = step
                return found, step
        longest = longest_tried(peak, room, least, found or GRAIN)
        return longest, peak(longest or GRAIN)

    def peak(self, seq_len: int, plan: _Plan | None = None) -> int:
        """Bytes, gradients included.

        Args:
            seq_len: tokens per sequence.
            plan: to be replayed.
        """
        key = seq_len, plan and plan.chunks
        if key not in self._computed:
            step = self._all_layers(lambda depth: self._trace(depth, seq_len, plan))
            self._computed[key] = step.peak_nbytes
        return self._computed[key]

    def _floor(self, seq_len: int) -> int:
        """Under mst whole chunks, so that no chunk has another size than the probe's."""
        rows = CHUNK_ROWS if self._way.backend == "mst" else GRAIN
        grain = rows if seq_len >= _LARGE * rows else GRAIN
        return seq_len // grain * grain

    def _longest_computed(
        self, room: int, plan: _Plan | None
    ) -> tuple[int, tuple[int, int] | None]:
        """The longest length that has room as far as the probe says, and the depths it was computed
        from: those that the step at the length found is found from."""
        few = self._few

        def peak(seq_len: int) -> int:
            if few is None or self._depth is None:
                return self._of_probe(seq_len, plan).peak_nbytes
            traces = [self._scaled(depth, seq_len, plan) for depth in few]
            return extrapolate(traces, few, self._depth).peak_nbytes

        while True:
            found = longest_computed(peak, room, self._floor)
            step = self._of_probe(found or GRAIN, plan)
            if step.simulated == few:
                return found, few
            few = step.simulated

    def _of_probe(self, seq_len: int, plan: _Plan | None) -> Step:
        """A step, computed from the probe's."""
        return self._all_layers(lambda depth: self._scaled(depth, seq_len, plan))

    def _scaled(self, depth: int | None, seq_len: int, plan: _Plan | None) -> SimulatedTrace:
        assert self.probe is not None
        return at_length(self._trace(depth, self.probe, plan), self.probe, seq_len)

    def _is_as_computed(
        self, seq_len: int, few: tuple[int, int] | None, plan: _Plan | None
    ) -> bool:
        """Whether a step is what was computed; of two depths, the deeper one."""
        deeper = few and few[1]
        computed, step = self._scaled(deeper, seq_len, plan), self._trace(deeper, seq_len, plan)
        return (step.peak_nbytes, step.peak_intermediate_nbytes) == (
            computed.peak_nbytes,
            computed.peak_intermediate_nbytes,
        )

    def _all_layers(self, trace: Callable[[int | None], SimulatedTrace]) -> Step:
        if self._few is None or self._depth is None:
            return step_of(trace(None))
        return step_of_all(trace, self._few, self._depth)

    def _trace(self, num_layers: int | None, seq_len: int, plan: _Plan | None) -> SimulatedTrace:
        key = num_layers, seq_len, plan and plan.chunks
        if key not in self._traces:
            options = plan.options if plan else self._way.options
            self._traces[key] = self._simulated(num_layers, seq_len, options)
        return self._traces[key]

    def _simulated(
        self, num_layers: int | None, seq_len: int, options: dict[str, Any] | None
    ) -> SimulatedTrace:
        wanted = replace(self._wanted, num_layers=num_layers, seq_len=seq_len)
        one = load_subject(self._model, wanted)
        # A GPU's memory is asked for: what kernels take on this machine's CPU says nothing of it.
        with Simulation(one.model, one.batch, scratch=False) as simulation:
            compiled = simulation.compile(one.model, self._way.backend, options)
            args, kwargs = simulation.batch
            return simulation.trace(lambda: loss_of(compiled(*args, **kwargs)).backward())


def fit_all(model: str, memory: int, wanted: Wanted, optimizer: str = "adamw") -> list[Fit]:
    """`fit` in every way of `WAYS`, half of them in a second process: two at once.

    Raises:
        SubjectError: as for `fit`.
    """
    weights = sum(p.nbytes for p in load_subject(model, wanted).model.parameters())
    if memory <= weights * (1 + OPTIMIZERS[optimizer]):
        return [fit(model, memory, wanted, way, optimizer) for way in WAYS]  # nothing to simulate
    own, other = (WAYS[0], WAYS[3]), (WAYS[1], WAYS[2])  # about as long
    with second_process() as second:
        later = [second.submit(fit, model, memory, wanted, way, optimizer) for way in other]
        found = [fit(model, memory, wanted, way, optimizer) for way in own]
        found += [one.result() for one in later]
    return sorted(found, key=lambda one: WAYS.index(one.way))


def _depends_on_length(subject: Subject) -> bool:
    one, other = ([t.shape for t in _tensors(subject.batch_of(n))] for n in (GRAIN, 2 * GRAIN))
    return one != other


def _tensors(batch: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]

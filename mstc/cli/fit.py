"""The longest sequence that fits into a given memory, for several ways of training.

Terms
    state     weights, optimizer state; gradients are in the step's peak.
    step      what `mstc.simulate` finds: gradients, saved values, and what stands at the peak.

Algorithm
    1. A configuration of many equal layers is simulated with few of them (`mstc.cli.layers`).
    2. The step is compiled once per depth with the sequence length left open, and simulated at
       lengths that close in on the longest that fits.

Tests hold this against a simulation of all layers, with the length found instead of an open one:
they are equal.

What it assumes: code as Inductor writes it for a CPU (kernels on a GPU fuse much alike; its
attention kernels keep statistics a little larger); nothing for what kernels take while they run,
for the CUDA context, for fragmentation, for communication; nothing is offloaded (PyTorch's option
for it moves values that a pass of the user's has marked from a GPU to the host, and simulated
tensors are on the host). Chunks have the fewest rows that keep a GPU busy, so that the answer does
not depend on the planner's choice for one length.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from mstc.cli.layers import depths, extrapolate, step_of_all
from mstc.cli.subject import SubjectError, Wanted, load_subject
from mstc.driver import MIN_ROWS
from mstc.simulate import Backend, Simulation, loss_of
from mstc.watch import SimulatedTrace

CHUNK_ROWS = MIN_ROWS["cuda"]  # of every loop: the fewest at which a GPU is busy
OPTIMIZERS = {"none": 0, "sgd": 0, "momentum": 1, "adamw": 2}  # states per weight
_FIRST = 4096  # tokens at which the step is compiled
_GRAIN = 1024  # tokens, to which an answer is rounded down
_MOST = 1 << 26  # tokens; nobody asks for more
_CLOSE = 0.005  # of the length, at which the search ends


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
    seq_len: int | None  # tokens per sequence; None: not even `_GRAIN` fit
    state_nbytes: int  # weights and optimizer state
    step_nbytes: int  # peak of the step at `seq_len`, gradients included; 0 if not even state fits


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
    wanted = replace(wanted, seq_len=_FIRST, checkpoint=way.checkpoint)
    whole = load_subject(model, wanted)
    weights = sum(p.nbytes for p in whole.model.parameters())
    state = weights * (1 + OPTIMIZERS[optimizer])
    if memory <= state:
        return Fit(way, None, state, 0)
    few = depths(whole)
    with ExitStack() as stack:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        known: dict[int | None, _Simulated] = {}

        def simulated(num_layers: int | None) -> _Simulated:
            if num_layers not in known:
                with _disable_current_modes():  # a deeper one may be made when others are entered
                    one = _Simulated(model, replace(wanted, num_layers=num_layers), way, mode)
                known[num_layers] = stack.enter_context(one)
            return known[num_layers]

        def trace(num_layers: int | None, seq_len: int) -> SimulatedTrace:
            return simulated(num_layers).trace(seq_len)

        if few is None or whole.num_layers is None:
            longest = _longest(lambda n: trace(None, n).peak_nbytes, memory - state)
            return Fit(way, longest, state, trace(None, longest or _GRAIN).peak_nbytes)
        depth = whole.num_layers

        def step(seq_len: int, pair: tuple[int, int]) -> int:
            return extrapolate([trace(n, seq_len) for n in pair], pair, depth).peak_nbytes

        while True:
            longest = _longest(partial(step, pair=few), memory - state)
            seq_len = longest or _GRAIN
            found = step_of_all(partial(trace, seq_len=seq_len), few, depth)
            if longest is None or found.simulated in (None, few):
                return Fit(way, longest, state, found.peak_nbytes)
            few = found.simulated  # too shallow at that length


def fit_all(model: str, memory: int, wanted: Wanted, optimizer: str = "adamw") -> list[Fit]:
    """`fit` in every way of `WAYS`, half of them in a second process: two at once.

    Raises:
        SubjectError: as for `fit`.
    """
    weights = sum(p.nbytes for p in load_subject(model, wanted).model.parameters())
    if memory <= weights * (1 + OPTIMIZERS[optimizer]):
        return [fit(model, memory, wanted, way, optimizer) for way in WAYS]  # nothing to simulate
    own, other = (WAYS[0], WAYS[3]), (WAYS[1], WAYS[2])  # about as long
    # no fork: PyTorch has threads, and Dynamo's state belongs to one process
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as second:
        later = [second.submit(fit, model, memory, wanted, way, optimizer) for way in other]
        try:
            found = [fit(model, memory, wanted, way, optimizer) for way in own]
        except BaseException:
            second.shutdown(wait=False, cancel_futures=True)
            raise
        found += [one.result() for one in later]
    return sorted(found, key=lambda one: WAYS.index(one.way))


def _longest(step: Callable[[int], int], room: int) -> int | None:
    """The longest length, a multiple of `_GRAIN`, whose step has room."""
    if step(_GRAIN) > room:
        return None
    low, low_bytes = _GRAIN, step(_GRAIN)
    high = _FIRST
    while (high_bytes := step(high)) <= room:
        low, low_bytes = high, high_bytes
        if low >= _MOST:
            return low
        high *= 4
    while high - low > max(_GRAIN, _CLOSE * low):
        # nearly linear in between: where the line meets the room, a little inside
        share = (room - low_bytes) / max(high_bytes - low_bytes, 1)
        guess = low + (high - low) * min(max(share, 0.02), 0.98)
        middle = min(max(_GRAIN * round(guess / _GRAIN), low + _GRAIN), high - _GRAIN)
        found = step(middle)
        if found <= room:
            low, low_bytes = middle, found
        else:
            high, high_bytes = middle, found
    return low


class _Simulated:
    """One depth of a model, compiled once for any length; a context manager."""

    def __init__(self, model: str, wanted: Wanted, way: Way, mode: FakeTensorMode) -> None:
        self._subject, self._way = load_subject(model, wanted), way
        self._open = _open_dims(*map(self._subject.batch_of, (_FIRST, 2 * _FIRST)))
        if not any(self._open):
            raise SubjectError(
                f"{model}: the batch does not depend on seq_len; let the function take it."
            )
        # A GPU's memory is asked for: what kernels take on this machine's CPU says nothing of it.
        self._simulation = Simulation(self._subject.model, (), mode, scratch=False)
        self._known: dict[int, SimulatedTrace] = {}

    def __enter__(self) -> _Simulated:
        with ExitStack() as stack:
            stack.enter_context(self._simulation)
            self._compiled = self._simulation.compile(
                self._subject.model, self._way.backend, self._way.options, dynamic=None
            )
            self.trace(_FIRST)
            stack.pop_all()  # `__exit__` leaves it
        return self

    def __exit__(self, *error: Any) -> None:
        self._simulation.__exit__(*error)

    def trace(self, seq_len: int) -> SimulatedTrace:
        if seq_len not in self._known:
            args, kwargs = self._batch(seq_len)
            self._known[seq_len] = self._simulation.trace(
                lambda: loss_of(self._compiled(*args, **kwargs)).backward()
            )
        return self._known[seq_len]

    def _batch(self, seq_len: int) -> Any:
        batch = self._simulation.fake(lambda: self._subject.batch_of(seq_len))
        for tensor, dims in zip(_tensors(batch), self._open, strict=True):
            for dim in dims:
                torch._dynamo.mark_dynamic(tensor, dim)
        return batch


def _tensors(batch: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]


def _open_dims(one: Any, other: Any) -> list[list[int]]:
    """Per tensor of a batch, the dims that depend on the length."""
    shapes = [[t.shape for t in _tensors(batch)] for batch in (one, other)]
    return [
        [dim for dim, (a, b) in enumerate(zip(x, y, strict=True)) if a != b]
        for x, y in zip(*shapes, strict=True)
    ]

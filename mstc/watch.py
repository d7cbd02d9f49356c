"""Hears of every storage that is made and that dies while fake tensors are computed with.

All chunks of a loop but the last are alike: the first two (the first makes the sums, the others
add to them) and the last stand for all. So do they among the blocks of rows that a product is added
in (`mstc.runtime.product`; from the second on, a block is made while the one before it is there).
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mstc import history
from mstc.maker import maker_of
from mstc.runtime.loop import loop_op, program_of
from mstc.runtime.memory import MemoryEvent, MemoryTrace, trace_of
from mstc.scratch import scratch_nbytes

_HOSTS = ("cpu", "meta")


@dataclass(frozen=True)
class Span:
    """A loop on the timeline."""

    start: float  # time of its first event
    end: float  # time after its last event
    name: str  # "op at file:line", of the widest value that it does not make whole
    num_chunks: int


@dataclass(frozen=True)
class Held:
    """Memory that is held at the peak."""

    nbytes: int
    made_by: str  # the op, the ops that one kernel is for, or the loop that it is of
    source: str  # "file:line  code" of the user, or "" (that of a loop is in `made_by`)


@dataclass(frozen=True)
class Buffer:
    """A piece of memory, from its allocation to its release."""

    nbytes: int
    grad_nbytes: int  # of it, what gradients take at the end
    born: float  # time from which on it counts
    dies: float | None  # time from which on it no longer counts; None: it outlives the step
    made_by: str  # the op, or the ops that one kernel is for
    source: str  # "file:line  code" of the user, or "" (in a loop: its own name says it)
    loop: int | None  # the loop that made it, an index into `SimulatedTrace.loops`
    is_result: bool  # whether it left that loop; otherwise it is a chunk's

    @property
    def intermediate_nbytes(self) -> int:
        """Its bytes that are no gradient's."""
        return self.nbytes - self.grad_nbytes

    def is_alive(self, time: float) -> bool:
        return self.born <= time and (self.dies is None or self.dies > time)


class Change(NamedTuple):
    """A storage that is made, or that dies."""

    nbytes: int  # negative when it dies
    held: Held  # without the part that is a gradient in the end


@dataclass(frozen=True)
class Summit:
    """The most that is held in a part of a step."""

    peak_nbytes: int
    peak_intermediate_nbytes: int
    at_peak: tuple[Held, ...]  # at the intermediate peak, largest first; gradients are not in it


@dataclass(frozen=True)
class SimulatedTrace(MemoryTrace):
    """What `simulate_step` finds; times are counts of events, not microseconds."""

    loops: tuple[Span, ...]
    backward: float  # time at which the backward began
    buffers: tuple[Buffer, ...]  # by time of birth; those alive at a time sum up to the timeline's

    @functools.cached_property
    def peak_time(self) -> float:
        """When the intermediate peak is first reached."""
        total, top, at = 0, 0, 0.0
        for time, (nbytes, held) in self._timed:
            total += held.nbytes if nbytes > 0 else -held.nbytes
            if total > top:
                top, at = total, time
        return at

    @property
    def at_peak(self) -> tuple[Held, ...]:
        """At the intermediate peak, largest first; gradients are not in it."""
        return self.summit(0, len(self.changes)).at_peak

    @functools.cached_property
    def changes(self) -> tuple[Change, ...]:
        """In their order."""
        return tuple(change for _, change in self._timed)

    @functools.cached_property
    def forward_changes(self) -> int:
        """How many changes are before the backward."""
        return sum(time < self.backward for time, _ in self._timed)

    @functools.cached_property
    def _timed(self) -> list[tuple[float, Change]]:
        found: list[tuple[float, Change]] = []
        for buffer in self.buffers:
            held = self._held(buffer)
            found.append((buffer.born, Change(buffer.nbytes, held)))
            if buffer.dies is not None:
                found.append((buffer.dies, Change(-buffer.nbytes, held)))
        return sorted(found, key=lambda one: one[0])

    def _held(self, buffer: Buffer) -> Held:
        if buffer.loop is None:
            return Held(buffer.intermediate_nbytes, buffer.made_by, buffer.source)
        name = self.loops[buffer.loop].name or "a region"
        what = "the result of a loop over" if buffer.is_result else "a chunk of"
        return Held(buffer.intermediate_nbytes, f"{what} {name}", "")

    def summit(self, start: int, end: int) -> Summit:
        """The most that is held after some of the changes."""
        total = others = peak = top = 0
        at = -1
        for i, (nbytes, held) in enumerate(self.changes[:end]):
            total += nbytes
            others += held.nbytes if nbytes > 0 else -held.nbytes
            if i >= start:
                peak = max(peak, total)
                if others > top:
                    top, at = others, i
        alive: Counter[Held] = Counter()
        for nbytes, held in self.changes[: at + 1]:
            alive[held] += 1 if nbytes > 0 else -1
        found = (held for held in alive.elements() if held.nbytes)
        return Summit(peak, top, tuple(sorted(found, key=lambda held: -held.nbytes)))


@dataclass(frozen=True)
class _Made:
    """Where a storage comes from; fields as those of `Buffer`."""

    made_by: str
    source: str
    loop: int | None
    is_result: bool = False


class Watch(TorchDispatchMode):
    """Hears of every storage that is made and that dies."""

    supports_higher_order_operators = True  # random states, which a checkpointed op saves

    def __init__(self, own: Sequence[Tensor], *, scratch: bool = True) -> None:
        """Args:
        own: what is there at the start, and does not count. If any of it is on an accelerator,
            what lies in the host's memory does not count either.
        scratch: whether what ops take while they run on a CPU counts (`mstc.scratch`).
        """
        super().__init__()
        self._scratch = scratch
        self._on_host = all(tensor.device.type in _HOSTS for tensor in own)
        self._own = [tensor.untyped_storage() for tensor in own]  # or another could get its key
        self._events: list[MemoryEvent] = []
        self._time = 0.0
        self._loops: list[Span] = []
        self._backward: float | None = None
        self._within: int | None = None  # number of the loop that runs
        self._made: dict[int, _Made] = {}
        self._alive: dict[int, tuple[int, object]] = {}  # storage -> number, what hears of its end
        self._sum: tuple[int, int, int] | None = None  # see `_is_in_place`
        self._really: dict[int, int] = {}  # number of a sum -> number of the addend it is made in
        for storage in self._own:
            self._alive[storage._cdata] = (0, None)

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True  # or Dynamo would not run what it has compiled

    def summary(self, gradients: Sequence[Tensor]) -> SimulatedTrace:
        """What was heard so far."""
        found: dict[int, int] = {}
        for tensor in gradients:
            number = self._number(tensor)
            number = self._really.get(number, number)
            found[number] = found.get(number, 0) + tensor.nbytes
        trace = trace_of(self._events, found)
        return SimulatedTrace(
            **vars(trace),
            loops=tuple(self._loops),
            backward=self._time if self._backward is None else self._backward,
            buffers=self._buffers(found),
        )

    def _buffers(self, gradients: dict[int, int]) -> tuple[Buffer, ...]:
        ends = {e.address: e.time_us for e in self._events if e.delta_nbytes < 0}
        return tuple(
            Buffer(
                nbytes=event.delta_nbytes,
                grad_nbytes=min(gradients.get(event.address, 0), event.delta_nbytes),
                born=event.time_us,
                dies=ends.get(event.address),
                **vars(self._made[event.address]),
            )
            for event in self._events
            if event.delta_nbytes > 0
        )

    def _number(self, tensor: Tensor) -> int:
        """That of its storage; 0 for what was there at the start."""
        return self._alive.get(_key(tensor), (0, None))[0]

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if self._backward is None and torch._C._current_graph_task_id() != -1:
            self._backward = self._time
        if func is loop_op:
            return self._loop(*args)
        if func is torch.ops.aten.addmm.dtype_out and kwargs:
            return kwargs["out"]  # makes nothing; torch 2.11 cannot do it with fake tensors
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor, func)
        if self._scratch:
            self._add_scratch(func, scratch_nbytes(func, args, kwargs or {}))
        if func is torch.ops.aten.add.Tensor and _accumulates():
            self._sum = (self._number(args[0]), len(self._events) - 1, self._number(out))
        return out

    def _loop(
        self, inputs: Sequence[Tensor], sizes: Sequence[int], chunk: int, spec: str, lowering: str
    ) -> list[Tensor]:
        start, name = self._time, history.name_of_body(spec)
        self._within = len(self._loops)
        try:
            with self:
                outputs = program_of(spec, lowering).run(
                    inputs, [int(s) for s in sizes], chunk, only=_first_and_last
                )
        finally:
            self._within = None
        for number in map(self._number, outputs):
            if number:
                self._made[number] = replace(self._made[number], is_result=True)
        self._loops.append(Span(start, self._time, name, -(-int(sizes[0]) // chunk)))
        return outputs

    def _add(self, tensor: Tensor, func: Any) -> None:
        storage, key = tensor.untyped_storage(), _key(tensor)
        if key in self._alive or (not self._on_host and tensor.device.type in _HOSTS):
            return
        number = len(self._made) + 1
        origin = maker_of(func)
        self._made[number] = _Made(origin.op, origin.source, self._within)
        last = functools.partial(self._drop, key, number, storage.nbytes())
        self._alive[key] = (number, weakref.ref(storage, last))
        self._note(storage.nbytes(), number)

    def _add_scratch(self, func: Any, nbytes: int) -> None:
        if not nbytes or not self._on_host:  # it is of the CPU
            return
        number = len(self._made) + 1
        origin = maker_of(func)
        self._made[number] = _Made(f"scratch of {origin.op}", origin.source, self._within)
        self._note(nbytes, number)
        self._note(-nbytes, number)

    def _drop(self, key: int, number: int, nbytes: int, reference: object) -> None:
        if self._alive.get(key, (0, None))[1] is reference:
            del self._alive[key]
        number = self._really.pop(number, number)
        if not self._is_in_place(number):
            self._note(-nbytes, number)

    def _note(self, delta: int, number: int) -> None:
        self._events.append(MemoryEvent(self._time, delta, number))
        self._time += 1

    def _is_in_place(self, number: int) -> bool:
        """Whether what dies is an addend in whose memory autograd's engine would have made the sum.

        The engine adds gradients up in place; for a fake tensor, as for any subclass, it makes a
        new one, and drops the addend before anything else is made.
        """
        if self._sum is None or self._sum[0] != number or not number:
            return False
        addend, index, total = self._sum
        self._sum = None
        if any(event.delta_nbytes > 0 for event in self._events[index + 1 :]):
            return False
        del self._events[index]
        self._really[total] = addend
        return True


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _accumulates() -> bool:
    """Whether an addition may be autograd's engine adding gradients up."""
    return torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled()


def _first_and_last(parts: list[Any]) -> list[Any]:
    return parts if len(parts) < 4 else [*parts[:2], parts[-1]]

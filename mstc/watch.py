"""Hears of every storage that is made and that dies while fake tensors are computed with.

All chunks of a loop but the last are alike: the first two (the first makes the sums, the others
add to them) and the last stand for all.
"""

from __future__ import annotations

import functools
import linecache
import re
import sys
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mstc import history
from mstc.emission import EMITTED
from mstc.runtime.loop import loop_op, program_of
from mstc.runtime.memory import MemoryEvent, MemoryTrace, trace_of

_ORIGINAL = re.compile(r"Original ATen: \[(.*?)\]")
_VIEWS = {
    "aten.t",
    "aten.view",
    "aten._unsafe_view",
    "aten.permute",
    "aten.transpose",
    "aten.detach",
}
_COMMENT_LINES = 40  # after an allocation, in which Inductor says what it is for


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
    made_by: str  # the op, the ops that one kernel is for, or the loop that a chunk is of


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
    changes: tuple[Change, ...]
    forward_changes: int  # how many of them are before the backward

    @property
    def at_peak(self) -> tuple[Held, ...]:
        """At the intermediate peak, largest first; gradients are not in it."""
        return self.summit(0, len(self.changes)).at_peak

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


class Watch(TorchDispatchMode):
    """Hears of every storage that is made and that dies."""

    supports_higher_order_operators = True  # random states, which a checkpointed op saves

    def __init__(self, own: Sequence[Tensor]) -> None:
        super().__init__()
        self._events: list[MemoryEvent] = []
        self._time = 0.0
        self._loops: list[Span] = []
        self._backward: float | None = None
        self._within = ""  # name of the loop that runs
        self._makers: dict[int, str] = {}
        self._alive: dict[int, tuple[int, object]] = {}  # storage -> number, what hears of its end
        self._sum: tuple[int, int, int] | None = None  # see `_is_in_place`
        self._really: dict[int, int] = {}  # number of a sum -> number of the addend it is made in
        for tensor in own:
            self._alive[_key(tensor)] = (0, None)

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
        backward = self._time if self._backward is None else self._backward
        return SimulatedTrace(
            **vars(trace),
            loops=tuple(self._loops),
            backward=backward,
            changes=tuple(self._changes(found)),
            forward_changes=sum(event.time_us < backward for event in self._events),
        )

    def _changes(self, gradients: dict[int, int]) -> Iterator[Change]:
        last = {e.address: i for i, e in enumerate(self._events) if e.delta_nbytes > 0}
        alive: dict[int, Held] = {}
        for i, event in enumerate(self._events):
            number, delta = event.address, event.delta_nbytes
            if delta < 0:
                yield Change(delta, alive.pop(number))
                continue
            own = gradients.get(number, 0) if last[number] == i else 0
            alive[number] = Held(delta - min(own, delta), self._makers.get(number, ""))
            yield Change(delta, alive[number])

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
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor, func)
        if func is torch.ops.aten.add.Tensor and _accumulates():
            self._sum = (self._number(args[0]), len(self._events) - 1, self._number(out))
        return out

    def _loop(
        self, inputs: Sequence[Tensor], sizes: Sequence[int], chunk: int, spec: str, lowering: str
    ) -> list[Tensor]:
        start, name = self._time, history.name_of_body(spec)
        self._within = name or "a loop"
        try:
            with self:
                outputs = program_of(spec, lowering).run(
                    inputs, [int(s) for s in sizes], chunk, only=_first_and_last
                )
        finally:
            self._within = ""
        self._loops.append(Span(start, self._time, name, -(-int(sizes[0]) // chunk)))
        return outputs

    def _add(self, tensor: Tensor, func: Any) -> None:
        storage, key = tensor.untyped_storage(), _key(tensor)
        if key in self._alive:
            return
        number = len(self._makers) + 1
        self._makers[number] = f"a chunk of {self._within}" if self._within else _maker(func)
        last = functools.partial(self._drop, key, number, storage.nbytes())
        self._alive[key] = (number, weakref.ref(storage, last))
        self._note(storage.nbytes(), number)

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


def _maker(func: Any) -> str:
    """The op that makes a value; in emitted code, what the comment says that its kernel is for."""
    frame = sys._getframe(2)
    while frame is not None:
        lines = linecache.getlines(frame.f_code.co_filename) if _is_emitted(frame) else []
        if lines:
            for line in lines[frame.f_lineno - 1 : frame.f_lineno + _COMMENT_LINES]:
                if found := _ORIGINAL.search(line):
                    made = [op for op in found[1].split(", ") if op not in _VIEWS]
                    return ", ".join(made) or found[1]
            break
        frame = frame.f_back
    return str(func).removesuffix(".default")


def _is_emitted(frame: FrameType) -> bool:
    return frame.f_globals.get("__name__") == EMITTED


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _accumulates() -> bool:
    """Whether an addition may be autograd's engine adding gradients up."""
    return torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled()


def _first_and_last(chunks: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return chunks if len(chunks) < 4 else [*chunks[:2], chunks[-1]]

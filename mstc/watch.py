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
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

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


@dataclass(frozen=True)
class SimulatedTrace(MemoryTrace):
    """What `simulate_step` finds; times are counts of events, not microseconds."""

    loops: tuple[Span, ...]
    backward: float  # time at which the backward began
    at_peak: tuple[Held, ...]  # at the intermediate peak, largest first; gradients are not in it


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
        return SimulatedTrace(
            **vars(trace),
            loops=tuple(self._loops),
            backward=self._time if self._backward is None else self._backward,
            at_peak=self._at_peak(trace.peak_intermediate_nbytes, found),
        )

    def _at_peak(self, peak: int, gradients: dict[int, int]) -> tuple[Held, ...]:
        held: dict[int, int] = {}
        total = 0
        last = {e.address: i for i, e in enumerate(self._events) if e.delta_nbytes > 0}
        for i, event in enumerate(self._events):
            if event.delta_nbytes < 0:
                total -= held.pop(event.address)
            else:
                own = gradients.get(event.address, 0) if last[event.address] == i else 0
                held[event.address] = event.delta_nbytes - min(own, event.delta_nbytes)
                total += held[event.address]
            if total == peak:
                break
        found = (Held(n, self._makers.get(number, "")) for number, n in held.items() if n)
        return tuple(sorted(found, key=lambda h: -h.nbytes))

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

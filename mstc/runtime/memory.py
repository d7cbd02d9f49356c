"""Exact measurement of the memory that a training step needs beside its parameters and inputs.

Terms
    live           bytes that tensors hold, above what was held when the measured function started
    peak           the most that is live at one instant
    intermediate   live bytes that are not gradients. "Peak intermediate memory" is the most of them
                   at one instant: memory above parameters, inputs and gradients. It is what
                   chunking can lower, and the figure that this project quotes.

How it is measured
    1. Every allocation and release of PyTorch's allocator while the function runs is recorded, with
       size, address and time. On a CPU: the memory events of `torch.profiler` (`profile_memory`).
       On CUDA: the allocator's history (`torch.cuda.memory._record_memory_history`), which is
       what torch's memory visualiser draws.
    2. The running sum of sizes is the timeline; its maximum is the peak.
    3. For each gradient that exists at the end, the last allocation at its address is the
       gradient's own. A second running sum leaves those out; its maximum is the intermediate peak.

Hence `peak - gradients <= peak_intermediate <= peak`. The left side would be simpler to compute,
but it flatters: gradients that do not exist yet at the peak would be subtracted from it.

The convention for a training step is to start with `.grad` None (as after `zero_grad()`), so that
autograd keeps each new gradient instead of adding it to an old one: `measure_step` does that.
Run one step before, so that nothing is compiled, tuned or lazily made while measuring.

On a CPU the figures are deterministic. Sizes are as tensors ask for them; the CUDA allocator
rounds up to 512 bytes, so `torch.cuda.max_memory_allocated` is slightly larger.

Not handled: memory that does not come from PyTorch's allocators (workspaces that cuBLAS and MKL
allocate themselves; oneDNN's come from there, and count); several devices at once; fragmentation
(reserved memory). On a CPU, the release of memory that was held before the start is not seen (the
profiler does not know its size), so a function that gives back old memory first shows a larger peak
than it has.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile


class MemoryEvent(NamedTuple):
    """One allocation (positive) or release (negative)."""

    time_us: float
    delta_nbytes: int
    address: int


@dataclass(frozen=True)
class MemoryTrace:
    """Live memory while a function ran. All sizes are bytes above those live at its start."""

    peak_nbytes: int  # the most at one instant
    peak_intermediate_nbytes: int  # the most at one instant, not counting gradients
    end_nbytes: int  # when the function had returned: gradients, and what it returned
    grad_nbytes: int  # gradients of the given parameters at the end; the part of end that is wanted
    timeline: tuple[tuple[float, int], ...]  # (microseconds since the first event, bytes)


def measure_peak(
    fn: Callable[[], object],
    *,
    device: torch.device | str = "cpu",
    parameters: Iterable[torch.Tensor] = (),
) -> MemoryTrace:
    """Run `fn` once and trace the memory that it takes on `device`.

    `parameters` are the tensors whose `.grad` counts as a gradient. What `fn` returns stays alive
    until the measurement ends and is part of `end_nbytes`. On CUDA this replaces a memory history
    that is being recorded.
    """
    device = torch.device(device)
    if device.type == "cpu":
        result, events = _record_cpu(fn)
    elif device.type == "cuda":
        result, events = _record_cuda(fn, device)
    else:
        raise ValueError(f"memory is measured on cpu and cuda, not on {device.type!r}")
    trace = trace_of(events, _gradient_storages(parameters))
    del result  # alive until here, so that its release is not among the events
    return trace


def measure_step(
    step: Callable[[], object],
    parameters: Iterable[torch.Tensor],
    device: torch.device | str = "cpu",
) -> MemoryTrace:
    """`measure_peak` of a forward and backward pass, by the convention above: no gradients."""
    parameters = list(parameters)
    for parameter in parameters:
        parameter.grad = None
    return measure_peak(step, device=device, parameters=parameters)


def trace_of(events: Iterable[MemoryEvent], gradients: dict[int, int]) -> MemoryTrace:
    """Sum up what happened; `gradients` are bytes of gradients by the address of their storage."""
    events = sorted(events, key=lambda event: event.time_us)
    last_alloc = {event.address: i for i, event in enumerate(events) if event.delta_nbytes > 0}
    is_gradient = {
        last_alloc[address]: nbytes
        for address, nbytes in gradients.items()
        if address in last_alloc
    }

    start_us = events[0].time_us if events else 0.0
    live = peak = held_by_gradients = peak_intermediate = 0
    timeline = [(0.0, 0)]
    for i, event in enumerate(events):
        live += event.delta_nbytes
        # A gradient may be a view of a larger allocation: only its own bytes are a gradient's.
        held_by_gradients += min(is_gradient.get(i, 0), max(event.delta_nbytes, 0))
        peak = max(peak, live)
        peak_intermediate = max(peak_intermediate, live - held_by_gradients)
        timeline.append((event.time_us - start_us, live))
    return MemoryTrace(
        peak_nbytes=peak,
        peak_intermediate_nbytes=peak_intermediate,
        end_nbytes=live,
        grad_nbytes=sum(gradients.values()),
        timeline=tuple(timeline),
    )


def _gradient_storages(parameters: Iterable[torch.Tensor]) -> dict[int, int]:
    """Address of each storage that holds gradients -> bytes of gradients in it."""
    storages: dict[int, int] = {}
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None or gradient.layout is not torch.strided:
            continue
        address = gradient.untyped_storage().data_ptr()
        storages[address] = storages.get(address, 0) + gradient.nbytes
    return storages


def _record_cpu(fn: Callable[[], object]) -> tuple[object, list[MemoryEvent]]:
    # `acc_events` matters over several cycles, and there is one; torch 2.11 warns if it is not said
    options: Any = {"activities": [ProfilerActivity.CPU], "acc_events": True}
    with profile(profile_memory=True, **options) as profiler:
        result = fn()
    # The event tree, unlike `events()`, knows addresses.
    inner: Any = profiler.profiler
    pending = list(inner.kineto_results.experimental_event_tree())
    events: list[MemoryEvent] = []
    while pending:
        node = pending.pop()
        pending.extend(node.children)
        if node.tag == _EventType.Allocation and node.extra_fields.device.type == "cpu":
            fields = node.extra_fields
            events.append(MemoryEvent(node.start_time_ns / 1e3, fields.alloc_size, fields.ptr))
    return result, events


def _record_cuda(
    fn: Callable[[], object], device: torch.device
) -> tuple[object, list[MemoryEvent]]:
    index = torch.cuda.current_device() if device.index is None else device.index
    record: Any = torch.cuda.memory._record_memory_history
    torch.cuda.synchronize(index)
    record(enabled="all", context=None, stacks="python", clear_history=True)
    try:
        result = fn()
        torch.cuda.synchronize(index)
        snapshot: Any = torch.cuda.memory._snapshot(index)
    finally:
        record(enabled=None)
    # A release counts when it is requested, as in torch.cuda.memory_allocated.
    signs = {"alloc": 1, "free_requested": -1}
    events = [
        MemoryEvent(entry["time_us"], signs[entry["action"]] * entry["size"], entry["addr"])
        for entry in snapshot["device_traces"][index]
        if entry["action"] in signs
    ]
    return result, events

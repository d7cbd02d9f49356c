"""A memory budget: how a graph is compiled so that its step takes no more.

Terms
    budget    the most bytes that a step may take above what was there when it began (weights,
              optimizer state, batch): intermediate values and gradients, as `mstc.measure_peak`
              counts `peak_nbytes`. Each graph has it for itself.
    setting   one way to compile a graph. `LADDER` has them in order, each smaller and slower than
              the one before: no loops, loops with ever smaller chunks, chunks below the rows that
              keep a device busy, then recomputation of what is between loops (AOTAutograd's
              `activation_memory_budget`), which costs much and saves little (docs/tradeoff.md). On
              a device with memory of its own, what is saved for the backward goes to the host at
              last (`OFFLOADED`, `passes.offload`): every saved byte crosses the bus twice. It is
              instead of recomputation: beside it, hardly anything is saved.

Algorithm
    0. Settings with larger chunks are left out where the planner predicts no less time for them
       (`passes.cost`): values of small chunks stay in a CPU's caches.
    1. A setting's peak is that of the code which Inductor writes for it, run on fake tensors
       (`mstc.emission`, `mstc.watch`): no estimate, and no kernel is built.
    2. Bisection finds the first setting whose peak is within the budget, in the first part of the
       ladder (chunks; finer chunks and recomputation; offload) whose last setting is. Which
       settings are looked at depends on the answers alone, so a smaller budget never ends at an
       earlier setting.
    3. What was found is kept on disk, beside PyTorch's compiled graphs.

Not handled: graphs whose sizes are left open cannot be simulated; they get the smallest chunks, and
the report says so. A loss in eager code is planned without a budget. Memory that a GPU's kernels
take while they run is not seen (see `mstc.simulate`), nor what offload takes on the host.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule

from mstc.errors import BudgetError, BudgetWarning, OptionError
from mstc.inductor import backward_ahead, detect_fake_mode, unrecorded
from mstc.options import Options, Setting
from mstc.quantity import format_bytes
from mstc.saved import load_entry, save_entry
from mstc.watch import Watch
from passes.offload import is_far

log = logging.getLogger(__name__)

Compile = Callable[[GraphModule, Sequence[Any], Options], Callable[..., Any]]
Times = Callable[[GraphModule, Sequence[Any], Sequence[Setting]], Sequence[float | None]]

FASTER = 1.02  # by which a setting's predicted time has to be shorter than a smaller one's
_STEPS = 8  # between no loops and the smallest chunks
CHUNKED = tuple(Setting(tightness=i / _STEPS) for i in range(_STEPS + 1))
FINER = (Setting(tightness=1.0, least_divisor=4),)
RECOMPUTED = tuple(replace(FINER[0], activation_budget=share) for share in (0.5, 0.2, 0.05))
FINEST = (replace(RECOMPUTED[-1], least_divisor=16),)
LADDER = (*CHUNKED, *FINER, *RECOMPUTED, *FINEST)
OFFLOADED = tuple(Setting(tightness=1.0, least_divisor=n, offload=True) for n in (4, 16))


def budget_bytes(budget: int | float, device: torch.device) -> int:
    """A budget in bytes.

    Args:
        budget: bytes (int), or a share of the device's memory (float).
        device: where the graph runs.

    Raises:
        OptionError: more than the device has.
    """
    total = _device_bytes(device)
    if isinstance(budget, float):
        if total is None:
            raise OptionError(
                f'options["memory_budget"] is {budget}: how much memory {device} has is not known '
                "here; give bytes."
            )
        return int(budget * total)
    if total is not None and budget > total:
        raise OptionError(
            f'options["memory_budget"] is {format_bytes(budget)}, and {device} has '
            f"{format_bytes(total)}."
        )
    return budget


def _device_bytes(device: torch.device) -> int | None:
    """The memory of a device; None for one that is not there."""
    if device.type == "cuda":
        if not torch.cuda.is_available():
            return None
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def settle(
    graph: GraphModule,
    inputs: Sequence[Any],
    options: Options,
    compile_: Compile,
    times: Times,
    key: str,
) -> tuple[Options, str]:
    """Choose a setting for a graph.

    Args:
        graph: a Dynamo graph that neither takes nor returns deferred tensors.
        inputs: example inputs, fake.
        options: with a budget.
        compile_: compiles for a simulation, with given options.
        times: predicts the time of a step under each of some settings, of that without loops, or
            None where it is not known.
        key: what names the graph and the options, to find what was chosen before.

    Returns:
        the options with the setting, and a line for the report.

    Raises:
        OptionError: see `budget_bytes`.
        BudgetError: no setting is small enough, and the options do not ask for a warning.
    """
    assert options.memory_budget is not None
    tensors = [t for t in inputs if isinstance(t, Tensor)]
    device = next((t.device for t in tensors if t.device.type != "cpu"), torch.device("cpu"))
    budget = budget_bytes(options.memory_budget, device)
    if not _has_fixed_sizes(inputs):
        setting = CHUNKED[-1]
        line = "its sizes are left open, so no peak is known: the smallest chunks"
        return replace(options, setting=setting), f"memory budget {format_bytes(budget)}: {line}"
    key = f"{key}-{torch.get_num_threads()}"  # what kernels take while they run is per thread
    chosen = _kept(key)
    if chosen is None:
        try:
            with _apart(graph, inputs) as (copied, own):
                chunked = worth_trying(CHUNKED, times(copied, own, CHUNKED))
            parts = _parts(inputs, device, chunked)
            chosen = _search(graph, inputs, options, compile_, budget, parts)
        except Exception as error:  # the model reads a value, or Inductor cannot compile it
            log.debug("a budget cannot be checked", exc_info=error)
            line = (
                f"memory budget {format_bytes(budget)}: its step cannot be simulated "
                f"({type(error).__name__}: {error}), so no peak is known: the smallest chunks"
            )
            warnings.warn(line, BudgetWarning, stacklevel=2)
            return replace(options, setting=CHUNKED[-1]), line
        save_entry("budgets", key, json.dumps([asdict(chosen[0]), chosen[1]]))
    setting, peak = chosen
    line = f"memory budget {format_bytes(budget)}: {setting}; simulated peak {format_bytes(peak)}"
    if peak > budget:
        advice = (
            f"a step of this graph takes {format_bytes(peak)} at least, and "
            f'options["memory_budget"] is {format_bytes(budget)}. Give it more, shorten the '
            "sequence or the batch, or checkpoint the model's layers."
        )
        if options.over_budget == "raise":
            raise BudgetError(f'{advice} (options["over_budget"]="warn" goes on anyway.)')
        warnings.warn(advice, BudgetWarning, stacklevel=2)
    return replace(options, setting=setting), line


def _has_fixed_sizes(inputs: Sequence[Any]) -> bool:
    return all(
        isinstance(size, int)
        for value in inputs
        for size in ((*value.shape, *value.stride()) if isinstance(value, Tensor) else (value,))
    )


def _kept(key: str) -> tuple[Setting, int] | None:
    text = load_entry("budgets", key)
    try:
        setting, peak = json.loads(text or "")
        return Setting(**setting), int(peak)
    except (ValueError, TypeError):
        return None


def worth_trying(settings: Sequence[Setting], times: Sequence[float | None]) -> tuple[Setting, ...]:
    """Those that are predicted to be faster than all smaller ones; the first (no loops) and the
    last (the smallest) in any case.

    Args:
        settings: from large to small.
        times: predicted, or None.
    """
    found = [settings[-1]]
    least = times[-1]
    for setting, time in reversed(list(zip(settings, times, strict=True))[1:-1]):
        if time is None or least is None or time * FASTER <= least:
            found.append(setting)
            least = time
    return settings[0], *reversed(found)


def _parts(
    inputs: Sequence[Any], device: torch.device, chunked: tuple[Setting, ...] = CHUNKED
) -> tuple[tuple[Setting, ...], ...]:
    """The ladder for a graph, in the parts that are searched one after the other."""
    trains = any(isinstance(t, Tensor) and t.requires_grad for t in inputs)
    if not trains or not torch.is_grad_enabled():
        return chunked, _WITHOUT_GRADIENTS
    parts = chunked, LADDER[len(CHUNKED) :]
    return (*parts, OFFLOADED) if is_far(device) else parts


def _search(
    graph: GraphModule,
    inputs: Sequence[Any],
    options: Options,
    compile_: Compile,
    budget: int,
    parts: Sequence[Sequence[Setting]],
) -> tuple[Setting, int]:
    """The first setting within the budget, or the smallest that was looked at, and its peak."""
    known: dict[Setting, int] = {}

    def fits(setting: Setting) -> bool:
        if setting not in known:
            own = replace(options, setting=setting)
            known[setting] = graph_peak(graph, inputs, own, compile_)
        return known[setting] <= budget

    part = next((part for part in parts if fits(part[-1])), None)
    if part is None:
        return min(known.items(), key=lambda one: one[1])
    low, high = -1, len(part) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(part[middle]) else (middle, high)
    return part[high], known[part[high]]


_WITHOUT_GRADIENTS = (*FINER, Setting(tightness=1.0, least_divisor=16))


def graph_peak(
    graph: GraphModule, inputs: Sequence[Any], options: Options, compile_: Compile
) -> int:
    """The most bytes that one forward and backward pass of a graph takes, gradients included.

    The caller is taken to hold what the graph returns until the backward has ended, as in
    ``out = model(...); out.loss.backward()``.

    Args:
        as for `settle`.
    """
    with _apart(graph, inputs) as (copied, own):
        with backward_ahead():
            compiled = compile_(copied, own, replace(options, lowering="emit"))
        leaves = [t for t in own if isinstance(t, Tensor) and t.requires_grad]
        tangents: list[Tensor] = []

        def step() -> None:
            outputs = compiled(*own)
            results = [t for t in outputs if isinstance(t, Tensor) and t.requires_grad]
            if not tangents:
                tangents.extend(map(torch.empty_like, results))
            if results:
                torch.autograd.backward(results, tangents)

        step()
        for leaf in leaves:
            leaf.grad = None
        watch = Watch([*(t for t in own if isinstance(t, Tensor)), *tangents])
        with watch:
            step()
        return watch.summary([t.grad for t in leaves if t.grad is not None]).peak_nbytes


@contextmanager
def _apart(graph: GraphModule, inputs: Sequence[Any]) -> Iterator[tuple[GraphModule, list[Any]]]:
    """A graph of its own, since compiling changes it, with inputs that nobody else knows of."""
    mode = detect_fake_mode(inputs) or FakeTensorMode()
    copied = copy.deepcopy(graph.graph)
    with unrecorded(), tracing(TracingContext(mode)), mode:
        yield GraphModule(graph, copied), [_fresh(value) for value in inputs]


def _fresh(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    return made.requires_grad_(value.requires_grad)

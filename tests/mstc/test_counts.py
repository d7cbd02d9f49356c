"""What one more chunk costs: ops, copies and allocations, counted. Times vary, these do not."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import mstc
from mstc.runtime.loop import counters
from tests.models import (
    INDUCTOR,
    MLP,
    fresh_compiler,  # noqa: F401  (an autouse fixture)
)

TOKENS = 64
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm")


def _counts(chunk_rows: int) -> tuple[Counter[str], int]:
    """Ops (and allocations) of one training step of an MLP, and how many bodies were compiled."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = MLP(), torch.randn(TOKENS, 16, requires_grad=True)
    call = torch.compile(model, backend="mst", options=INDUCTOR | {"chunk_rows": chunk_rows})
    before = counters.bodies_compiled

    def step() -> None:
        call(x).sum().backward()

    step()
    step()  # gradients are there, and are added to
    bodies = counters.bodies_compiled - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        step()
    assert counters.bodies_compiled - before == bodies
    (graph,) = mstc.last_report().graphs
    assert [loop.num_chunks for loop in graph.loops] == [TOKENS // chunk_rows]
    found: Counter[str] = Counter()
    inner: Any = trace.profiler
    for event in inner.kineto_results.events():
        if event.name() == "[memory]":
            found["allocations"] += event.nbytes() > 0
        elif event.name() in _PRODUCTS:
            found["products"] += 1
        else:
            found[event.name()] += 1
    return found, bodies


def test_one_more_chunk() -> None:
    few, bodies = _counts(16)
    many, _ = _counts(8)
    chunks = TOKENS // 8 - TOKENS // 16
    more = {name: (n - few[name]) / chunks for name, n in many.items() if n != few[name]}
    assert bodies == 2  # forward and backward
    # forward: up, down; backward: up again, two gradients of activations, two of weights
    assert more["products"] == 7
    # three products begin with their bias; output and input's gradient are written in their places
    assert more["aten::copy_"] == more["aten::expand"] == 3
    assert more["aten::add_"] == 1  # the gradient of the bias inside; the other is a sum outside
    assert more["allocations"] <= 5
    assert not {"aten::clone", "aten::contiguous", "aten::empty_permuted"} & set(more)

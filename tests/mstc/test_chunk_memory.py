"""The memory of a chunk is what the planner takes it to be."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from mstc.runtime.loop import program_of
from mstc.runtime.memory import measure_peak
from passes.chunks import body_bytes
from tests.models import fresh_compiler  # noqa: F401  (an autouse fixture)
from tests.passes.graphs import Recorder, compiled

ROWS, HIDDEN, WIDE = 256, 32, 512
CHUNK = 128
INDUCTOR = json.dumps({"kind": "inductor", "config": {}})
SLACK = 0.03  # sums and numbers per row, which the estimate shares out among chunks
SCRATCH = 0.6  # of a product in bfloat16 that is as small as here


def gated(x: Tensor, up: Tensor, gate: Tensor, down: Tensor) -> Tensor:
    return ((F.silu(x @ gate) * (x @ up)) @ down).square().sum()


def with_bias(x: Tensor, up: Tensor, gate: Tensor, down: Tensor) -> Tensor:
    return (F.gelu(torch.addmm(gate[0], x, up)) @ down).square().sum()


def by_tanh(x: Tensor, up: Tensor, gate: Tensor, down: Tensor) -> Tensor:
    return (F.gelu(x @ up, approximate="tanh") @ down).square().sum()


def head(x: Tensor, up: Tensor, gate: Tensor, down: Tensor) -> Tensor:
    return F.cross_entropy(x @ up, torch.arange(ROWS))


def head_in_float32(x: Tensor, up: Tensor, gate: Tensor, down: Tensor) -> Tensor:
    return F.cross_entropy((x @ up).float(), torch.arange(ROWS))


@pytest.mark.parametrize(
    ("fn", "dtype", "values"),
    [
        (gated, torch.float32, [2, 3]),
        (with_bias, torch.float32, [1, 2]),
        (by_tanh, torch.float32, [1, 2]),
        (head, torch.float32, [1]),
        (head_in_float32, torch.bfloat16, [1]),
    ],
)
def test_a_chunk_takes_what_was_planned(
    fn: Callable[..., Tensor], dtype: torch.dtype, values: list[int]
) -> None:
    """In values of a chunk's rows x wide: what the code that Inductor writes allocates."""
    torch.manual_seed(0)
    shapes = (ROWS, HIDDEN), (HIDDEN, WIDE), (HIDDEN, WIDE), (WIDE, HIDDEN)
    inputs = [torch.randn(*s).mul_(0.1).to(dtype).requires_grad_() for s in shapes]
    recorder = Recorder(chunk_rows=CHUNK)
    compiled(fn, inputs, recorder)
    (planned,) = recorder.planned
    assert planned.chunked is not None
    found: list[float] = []
    for loop in planned.chunked.loops:
        args: Any = loop.node.args  # of `mst::loop`
        ins, sizes, *_ = args
        program = program_of(loop.body.spec, INDUCTOR)
        tensors = program.first_slices([like(n) for n in ins], sizes, CHUNK)
        own = (CHUNK, *sizes[1:])
        run = program.function(own, tensors)
        measured = measure_peak(lambda run=run, own=own, t=tensors: run(own, list(t))).peak_nbytes
        predicted = body_bytes(loop.body) * CHUNK / ROWS
        scratch = SCRATCH if dtype == torch.bfloat16 else 0
        assert (1 - SLACK) * predicted <= measured <= (1 + SLACK + scratch) * predicted
        found.append(predicted / (CHUNK * WIDE * dtype.itemsize))
    assert found == pytest.approx(values, rel=SLACK)


def like(node: Node) -> Tensor:
    """A tensor for an input of a loop."""
    value = node.meta["val"]
    return torch.zeros(value.shape, dtype=value.dtype).as_strided(value.shape, value.stride())

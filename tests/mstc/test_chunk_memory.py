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
from passes import plan
from passes.axes import Axes
from passes.body import Body
from passes.chunks import ChunkMemory, chunk_memory
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


class Known(dict[str, ChunkMemory]):
    """What the planner takes bodies to need, by spec."""

    def chunk_memory(self, body: Body, axes: Axes, length: int) -> ChunkMemory:
        self[body.spec] = chunk_memory(body, axes, length)
        return self[body.spec]


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> Known:
    found = Known()
    monkeypatch.setattr(plan, "chunk_memory", found.chunk_memory)
    return found


def measured(
    fn: Callable[..., Tensor], x: Tensor, dtype: torch.dtype, known: Known, **options: Any
) -> list[tuple[int, int]]:
    """Of every loop the bytes that a chunk was taken to need, and those that what Inductor makes
    of it allocates, copies of slices included."""
    shapes = (HIDDEN, WIDE), (HIDDEN, WIDE), (WIDE, HIDDEN)
    weights = [torch.randn(*s).mul_(0.1) for s in shapes]
    recorder = Recorder(chunk_rows=CHUNK, **options)
    compiled(fn, [t.to(dtype).requires_grad_() for t in (x, *weights)], recorder)
    (planned,) = recorder.planned
    assert planned.chunked is not None
    found: list[tuple[int, int]] = []
    for loop in planned.chunked.loops:
        args: Any = loop.node.args  # of `mst::loop`
        ins, sizes, *_ = args
        program, inputs = program_of(loop.body.spec, INDUCTOR), [like(n) for n in ins]
        chunk = loop.plan.chunk
        own = (chunk, *sizes[1:])
        run = program.function(own, program.first_slices(inputs, sizes, chunk))

        def one(
            program: Any = program,
            inputs: list[Tensor] = inputs,
            sizes: list[int] = sizes,
            own: tuple[int, ...] = own,
            run: Any = run,
        ) -> object:
            return run(own, program.first_slices(inputs, sizes, own[0]))

        found.append((known[loop.body.spec].of(chunk), measure_peak(one).peak_nbytes))
    return found


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
    fn: Callable[..., Tensor], dtype: torch.dtype, values: list[int], known: Known
) -> None:
    """In values of a chunk's rows x wide."""
    torch.manual_seed(0)
    found = measured(fn, torch.randn(ROWS, HIDDEN), dtype, known)
    scratch = SCRATCH if dtype == torch.bfloat16 else 0
    for predicted, taken in found:
        assert (1 - SLACK) * predicted <= taken <= (1 + SLACK + scratch) * predicted
    unit = CHUNK * WIDE * dtype.itemsize
    assert [p / unit for p, _ in found] == pytest.approx(values, rel=SLACK)


@pytest.mark.parametrize("loop_axes", ["tokens", "weights"])
def test_slices_that_lie_apart_are_counted(loop_axes: str, known: Known) -> None:
    """Rows of several sequences, and columns of a weight: a chunk gets copies of them. What has
    not the loop's axis does not shrink with the chunk."""
    torch.manual_seed(0)
    x = torch.randn(2, ROWS // 2, HIDDEN)
    for predicted, taken in measured(gated, x, torch.float32, known, loop_axes=loop_axes):
        assert predicted == pytest.approx(taken, rel=0.01)


def like(node: Node) -> Tensor:
    """A tensor for an input of a loop."""
    value = node.meta["val"]
    return torch.zeros(value.shape, dtype=value.dtype).as_strided(value.shape, value.stride())

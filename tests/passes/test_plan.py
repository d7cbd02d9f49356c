"""The plan: which regions become loops, how large chunks are, and when nothing is done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from passes import rules
from passes.chunks import even_chunk
from passes.groups import MANY
from passes.plan import MIN_GAIN, SMALL
from passes.source import op_name
from tests.passes.graphs import Recorder, assert_close, compiled, gradients_of

Tensor = torch.Tensor
KIB = 2**10


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).mul_(0.3).requires_grad_()


def model(x: Tensor, head: Tensor, labels: Tensor, *layers: Tensor) -> Tensor:
    """MLPs with residuals, then a vocabulary projection and its loss."""
    for up, down in zip(layers[::2], layers[1::2], strict=True):
        x = x + F.gelu(F.layer_norm(x, x.shape[-1:], eps=1e-3) @ up) @ down
    return F.cross_entropy(x @ head, labels)


def inputs(
    rows: int = 64, width: int = 16, wide: int = 128, vocabulary: int = 2048, layers: int = 2
) -> list[Tensor]:
    torch.manual_seed(0)
    made = [leaf(rows, width), leaf(width, vocabulary), torch.randint(vocabulary, (rows,))]
    for _ in range(layers):
        made += [leaf(width, wide), leaf(wide, width)]
    return made


def plan(values: list[Tensor], fn: Callable[..., Any] = model, **options: Any) -> Recorder:
    recorder = Recorder(**options)
    compiled(fn, values, recorder)
    return recorder


def text(recorder: Recorder) -> str:
    """Regions, loops and refusals of one compilation, for a reader."""
    lines: list[str] = []
    for planned in recorder.planned:
        decided = planned.plan
        lines.append(f"predicted peak {decided.peak_before} -> {decided.peak_after} bytes")
        for loop in decided.loops:
            region = loop.region
            lines.append(
                f"{loop.mode}: {loop.num_chunks} chunks of {loop.chunk} along an axis of "
                f"{region.length}, seed {op_name(region.seed)}, {region.inside_bytes} bytes inside"
            )
            for title, part in (("forward", region.forward), ("backward", region.backward)):
                nodes = region.seed.graph.nodes
                products = [n.name for n in nodes if n in part and rules.is_matmul(n)]
                lines.append(f"    {title}: {' '.join(products)}")
        lines += [f"refused ({r.nbytes} bytes): {r.subject}: {r.reason}" for r in decided.refusals]
        for loop in planned.chunked.loops if planned.chunked else ():
            outputs = " ".join(f"{o.kind}:{op_name(o.node)}" for o in loop.body.outputs)
            lines.append(f"loop {loop.node.name} ({loop.label}) makes {outputs}")
    return "\n".join(lines)


def test_plan_of_two_layers_and_a_head(golden: Callable[[object, str], None]):
    """What is decided, as text; and the numbers that it gives."""
    values = inputs(vocabulary=512)
    recorder = Recorder(chunk_rows=16)
    got = gradients_of(model, values, recorder)
    golden(text(recorder), "plan_two_layers_and_a_head")
    assert_close(got, gradients_of(model, values, None))


def test_a_region_off_the_peak_is_left_alone():
    """The vocabulary is all the memory there is: the small MLPs run untouched."""
    recorder = plan(inputs(vocabulary=16384, wide=32), chunk_rows=32)
    assert recorder.modes == ["gradient-in-forward"]


def test_what_is_at_the_peak_then_is_chunked_too():
    """With the logits gone, the MLPs stand at the peak."""
    recorder = plan(inputs(vocabulary=8192, wide=512), chunk_rows=8)
    assert sorted(recorder.modes) == ["gradient-in-forward", "recompute", "recompute"]


def test_layers_that_are_each_a_small_part_of_the_peak():
    """Of thirty-two equal layers none stands out; a chunk is then as large as the layer."""

    def deep(x: Tensor, *weights: Tensor) -> Tensor:
        for up, down in zip(weights[::2], weights[1::2], strict=True):
            x = x + F.gelu(x @ up) @ down
        return x.square().sum()

    weights = [w for _ in range(64) for w in (leaf(8, 64), leaf(64, 8))]
    recorder = plan([leaf(64, 8), *weights], deep)
    assert recorder.modes == ["recompute"] * 64
    decided = recorder.planned[0].plan
    assert decided.peak_after < decided.peak_before / 4


def test_below_the_least_peak_nothing_is_done():
    values = inputs()
    peak = plan(values).planned[0].plan.before.peak_bytes
    assert plan(values, min_peak_bytes=peak).modes
    recorder = plan(values, min_peak_bytes=peak + 1)
    assert recorder.modes == []
    assert recorder.planned[0].chunked is None


def test_a_plan_without_gain_is_dropped():
    """The gradient of the weight is the peak, with or without a loop."""

    def fn(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return (F.gelu(x @ up) @ down).square().sum()

    recorder = plan([leaf(4, 512), leaf(512, 640), leaf(640, 8)], fn, chunk_rows=1)
    (planned,) = recorder.planned
    assert planned.plan.loops == ()
    assert planned.chunked is None
    assert planned.plan.peak_before == planned.plan.peak_after


def test_a_kept_plan_gains():
    (planned,) = plan(inputs()).planned
    decided = planned.plan
    assert decided.loops
    assert decided.after.peak_bytes <= (1 - MIN_GAIN) * decided.before.peak_bytes
    assert decided.peak_after < decided.peak_before


# -- chunk sizes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "chunk"), [(1, 1), (7, 7), (16, 16), (64, 64), (1000, 64)])
def test_rows_that_the_user_asks_for(rows: int, chunk: int):
    recorder = plan(inputs(), chunk_rows=rows)
    loops = recorder.planned[0].plan.loops
    assert loops, "a single chunk keeps nothing for the backward either"
    for loop in loops:
        assert loop.chunk == chunk
        assert loop.num_chunks == -(-64 // chunk)


@pytest.mark.parametrize("least", [1, 8, 16, 32])
def test_chunks_are_not_smaller_than_the_device_likes(least: int):
    loops = plan(inputs(), min_rows=least).planned[0].plan.loops
    assert loops
    assert all(loop.chunk >= least for loop in loops)


def test_chunks_are_not_smaller_than_matters():
    """A peak below `min_peak_bytes` would be left alone: a chunk far below it saves nothing."""
    values = inputs()
    least = plan(values).planned[0].plan.before.peak_bytes // 2
    fine = plan(values, min_rows=1).planned[0].plan.loops
    coarse = plan(values, min_rows=1, min_peak_bytes=least).planned[0].plan.loops
    head = [max(loops, key=lambda one: one.region.inside_bytes) for loops in (fine, coarse)]
    assert head[0].chunk < head[1].chunk < head[1].region.length
    share = head[1].chunk / head[1].region.length
    assert share * head[1].region.inside_bytes >= SMALL * least


def test_chunks_that_would_be_the_peak_have_fewer_rows():
    """Where it is known what that costs, and nowhere else."""
    least, fewer, wide = 16, 8, 512

    def fn(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return (F.gelu(x @ up) @ down).square().sum()

    def chunk(length: int, **changes: Any) -> int:
        values = [leaf(length, 4), leaf(4, wide), leaf(wide, 4)]
        (loop,) = plan(values, fn, min_rows=least, **changes).planned[0].plan.loops
        return loop.chunk

    # what stays: gradients of weights and activations; what a row adds: several values of its width
    assert chunk(32, fewer_rows=fewer) == fewer
    assert chunk(32) == least
    assert chunk(2**14, fewer_rows=fewer) >= least
    assert chunk(32, fewer_rows=fewer, tightness=1.0) == least, "a budget asks for what it needs"


@pytest.mark.parametrize(("dtype", "num_chunks"), [(torch.float32, MANY), (torch.float64, 64)])
def test_larger_chunks_instead_of_second_buffers(dtype: torch.dtype, num_chunks: int):
    """Sums of many chunks in float32 have them; chunks twice as large take no more than these."""

    def fn(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return (F.gelu(x @ up) @ down).square().sum()

    shapes = (512, 8), (8, 64), (64, 8)
    values = [torch.randn(*shape, dtype=dtype).requires_grad_() for shape in shapes]
    (loop,) = plan(values, fn, min_rows=8).planned[0].plan.loops
    assert loop.num_chunks == num_chunks


@pytest.mark.parametrize(("length", "num_chunks"), [(500, 50), (512, MANY), (509, MANY)])
def test_larger_chunks_are_equal_where_they_were(length: int, num_chunks: int):
    """Chunks of two sizes are two bodies to compile."""

    def fn(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return (F.gelu(x @ up) @ down).square().sum()

    shapes = (length, 8), (8, 64), (64, 8)
    values = [torch.randn(*shape).requires_grad_() for shape in shapes]
    (loop,) = plan(values, fn, min_rows=8).planned[0].plan.loops
    assert loop.num_chunks == num_chunks
    assert (length % loop.chunk == 0) == (length != 509)  # a prime


def test_rows_are_tokens_of_all_sequences():
    """Four sequences: eight rows are two positions."""

    def fn(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return (F.gelu(x @ up) @ down).square().sum()

    recorder = plan([leaf(4, 32, 4), leaf(4, 64), leaf(64, 4)], fn, chunk_rows=8)
    (loop,) = recorder.planned[0].plan.loops
    assert (loop.region.length, loop.chunk, loop.num_chunks) == (32, 2, 16)


@pytest.mark.parametrize("length", [2, 7, 64, 96, 97, 1000, 1009])
@pytest.mark.parametrize("wanted", [1, 3, 16, 100])
def test_even_chunks(length: int, wanted: int):
    wanted = min(wanted, length)
    chunk = even_chunk(length, wanted, 1)
    assert 1 <= chunk <= length
    near = [d for d in range(1, length + 1) if length % d == 0 and wanted <= 2 * d <= 4 * wanted]
    if near:
        assert length % chunk == 0, "equal chunks where a divisor is near"
    else:
        count = -(-length // chunk)
        assert chunk - (length - (count - 1) * chunk) < count, "as equal as can be"
    assert chunk <= 2 * wanted


def test_even_chunks_keep_the_least():
    assert even_chunk(96, 20, 20) in (24, 32)
    assert even_chunk(96, 16, 16) == 16

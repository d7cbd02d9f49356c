"""Loops along the axes of weights: hidden features, heads, features of experts. The same float64
gradients with a last chunk of another size, and where such a loop cannot be had."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from passes.axes import analyze_axes
from passes.cost import Machine
from passes.grouped import grouped_mm
from passes.plan import Planned
from passes.records import FixedLoop, LoopPlan
from passes.regions import RegionFinder, find_regions
from passes.rules import find_rule
from passes.source import op_name, source_of
from passes.split import Split
from tests.passes.graphs import Recorder, assert_close, compiled, gradients_of, trace

TOKENS, HIDDEN, WIDE, HEADS, EXPERTS = 41, 8, 50, 5, 3

Model = Callable[..., Tensor]


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).mul_(0.5).requires_grad_()


def loops(recorder: Recorder) -> list[LoopPlan]:
    return [loop for planned in recorder.planned for loop in planned.plan.loops]


def same_numbers(fn: Model, inputs: list[Tensor], **options: object) -> Recorder:
    recorder = Recorder(**{"loop_axes": "weights", "chunk_rows": 16, **options})
    assert_close(gradients_of(fn, inputs, recorder), gradients_of(fn, inputs, None))
    return recorder


def gated(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    wide = F.silu(F.linear(y, gate)) * F.linear(y, up)
    return (x + F.linear(wide, down)).square().mean()


def plain(x: Tensor, up: Tensor, bias: Tensor, down: Tensor) -> Tensor:
    return (x + F.gelu(F.linear(x, up, bias)) @ down).square().mean()


def biased(x: Tensor, up: Tensor, bias: Tensor, down: Tensor, other: Tensor) -> Tensor:
    return (x + F.linear(F.gelu(F.linear(x, up, bias)), down.T, other)).square().mean()


def attention(x: Tensor, *weights: Tensor) -> Tensor:
    rows = x.shape[:-1]
    q, k, v = ((x @ w).unflatten(-1, (HEADS, -1)).transpose(-2, -3) for w in weights[:3])
    mixed = (q @ k.mT).softmax(-1) @ v
    return (x + mixed.transpose(-2, -3).reshape(*rows, -1) @ weights[3]).square().mean()


def experts(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, choice: Tensor) -> Tensor:
    """The largest entry of `choice` says which expert a token goes to."""
    keys, rows = choice.argmax(-1).sort()
    ends = torch.histc(keys.double(), EXPERTS, 0, EXPERTS - 1).cumsum(0).to(torch.int32)
    y = x[rows]
    wide = F.silu(grouped_mm(y, gate, ends)) * grouped_mm(y, up, ends)
    out = torch.zeros_like(x).index_add(0, rows, grouped_mm(wide, down, ends))
    return (x + out).square().mean()


UP, DOWN = (WIDE, HIDDEN), (HIDDEN, WIDE)
SHAPES: dict[str, tuple[Model, list[tuple[int, ...]]]] = {
    "gated": (gated, [(TOKENS, HIDDEN), UP, UP, DOWN]),
    "gated, a batch": (gated, [(2, TOKENS, HIDDEN), UP, UP, DOWN]),
    "plain": (plain, [(TOKENS, HIDDEN), UP, (WIDE,), UP]),
    "a bias behind": (biased, [(TOKENS, HIDDEN), UP, (WIDE,), UP, (HIDDEN,)]),
}


@pytest.mark.parametrize("tokens", [None, 5], ids=["many tokens", "fewer tokens than features"])
@pytest.mark.parametrize("name", SHAPES)
def test_hidden_features(name: str, tokens: int | None):
    fn, shapes = SHAPES[name]
    if tokens is not None:
        shapes = [(*shapes[0][:-2], tokens, HIDDEN), *shapes[1:]]
    # least memory: with few tokens gradients of weights are most of it, and hardly any is saved
    recorder = same_numbers(fn, [leaf(*s) for s in shapes], tightness=1.0)
    assert [(loop.region.length, loop.chunk) for loop in loops(recorder)] == [(WIDE, 16)]


@pytest.mark.parametrize("batch", [(), (2,)], ids=["one sequence", "a batch"])
def test_heads(batch: tuple[int, ...]):
    inputs = [leaf(*batch, TOKENS, 15), *(leaf(15, 15) for _ in range(4))]
    rows = 2 * TOKENS * max(1, *batch, 1)
    recorder = same_numbers(attention, inputs, chunk_rows=rows)
    assert [(loop.region.length, loop.chunk) for loop in loops(recorder)] == [(HEADS, 2)]


def test_features_of_experts():
    shapes = (EXPERTS, HIDDEN, WIDE), (EXPERTS, HIDDEN, WIDE), (EXPERTS, WIDE, HIDDEN)
    weights = [leaf(*shape) for shape in shapes]
    choice = torch.randn(TOKENS, EXPERTS, dtype=torch.float64)
    recorder = same_numbers(experts, [leaf(TOKENS, HIDDEN), *weights, choice])
    assert [(loop.region.length, loop.chunk) for loop in loops(recorder)] == [(WIDE, 16)]


def test_the_output_is_a_sum_and_weights_have_their_own_rows():
    recorder = same_numbers(gated, [leaf(TOKENS, HIDDEN), leaf(*UP), leaf(*UP), leaf(*DOWN)])
    (loop,) = loops(recorder)
    specs = [n.args[3] for p in recorder.planned for n in chunked_loops(p)]
    assert len(specs) == 2
    assert [spec.count('"kind":"matmul"') for spec in specs] == [1, 2], "output; input's gradient"
    assert [spec.count('"kind":"split"') for spec in specs] == [0, 3], "gradients of weights"
    assert loop.num_chunks == 4


def chunked_loops(planned: Planned) -> list[torch.fx.Node]:
    assert planned.chunked is not None
    return list(
        planned.chunked.graph.find_nodes(op="call_function", target=torch.ops.mst.loop.default)
    )


def head(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x.tanh(), weight), labels)


def test_tokens_remain_where_there_is_no_other_axis():
    inputs = [leaf(TOKENS, HIDDEN), leaf(300, HIDDEN), torch.randint(300, (TOKENS,))]
    recorder = same_numbers(head, inputs)
    assert [(loop.region.length, loop.mode) for loop in loops(recorder)] == [
        (TOKENS, "gradient-in-forward")
    ]


def test_the_vocabulary_is_refused():
    """A softmax needs the sum over all of it."""
    recorder = Recorder(loop_axes="weights", min_peak_bytes=2**60)
    inputs = [leaf(1, HIDDEN), leaf(300, HIDDEN), torch.randint(300, (1,))]
    compiled(head, inputs, recorder)
    (graph,) = recorder.graphs
    regions, refusals = find_regions(
        graph, analyze_axes(graph, find_rule), min_bytes=1, loop_axes="weights"
    )
    assert regions == []
    assert "aten.amax mixes positions of the loop axis" in "\n".join(map(str, refusals))


def test_a_chunk_of_experts_has_no_rows_of_its_own():
    """Where a group's rows are, only run time knows: the groups' axis cannot be split."""
    choice = torch.randn(TOKENS, EXPERTS, dtype=torch.float64)
    shapes = (EXPERTS, HIDDEN, WIDE), (EXPERTS, HIDDEN, WIDE), (EXPERTS, WIDE, HIDDEN)
    weights = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    graph = trace(experts, torch.randn(TOKENS, HIDDEN, dtype=torch.float64), *weights, choice)
    axes = analyze_axes(graph, find_rule)
    gate = list(graph.nodes)[1]
    ((axis,), *_) = axes.dims(gate)
    split = Split(axes, axis, EXPERTS)
    products = [n for n in graph.nodes if axes.role(n, axis) == "entangled"]
    assert products
    assert all("mixes positions of the loop axis" in split.status(n) for n in products)


def few(tokens: int = 16, wide: int = 256, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    shapes = (tokens, 32), (wide, 32), (wide, 32), (32, wide)
    return [leaf(*s).detach().to(dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize(
    ("tokens", "wide", "dtype", "length"),
    [
        (16, 256, torch.float64, 256),
        (13, 250, torch.float64, 250),
        (256, 128, torch.float64, 256),
        (64, 128, torch.bfloat16, 128),
        (64, 128, torch.float64, 64),
    ],
    ids=["few tokens", "odd", "many tokens", "sums of gradients in float32", "of no wider type"],
)
def test_the_axis_that_takes_less_memory(tokens: int, wide: int, dtype: torch.dtype, length: int):
    recorder = Recorder(loop_axes="either", min_rows=8)
    inputs = few(tokens, wide, dtype)
    got = gradients_of(gated, inputs, recorder)
    assert [loop.region.length for loop in loops(recorder)] == [length]
    if dtype == torch.float64:
        assert_close(got, gradients_of(gated, inputs, None))


@pytest.mark.parametrize(("near_nbytes", "length"), [(1 << 10, 128), (1 << 15, 64)])
def test_the_axis_that_is_not_slower(near_nbytes: int, length: int):
    """Chunks of tokens would stay near the cores, those of features would not quite."""
    machine = Machine(written=1000, reread=0, near_nbytes=near_nbytes)
    recorder = Recorder(loop_axes="either", min_rows=8, machine=machine)
    compiled(gated, few(64, 128, torch.bfloat16), recorder)
    assert [loop.region.length for loop in loops(recorder)] == [length]


def test_no_loop_that_tokens_would_not_have():
    """Gradients of weights are most of the memory: chunks of tokens save too little, and features
    are not looked at."""
    for loop_axes, expected in (("tokens", []), ("either", []), ("weights", [256])):
        recorder = Recorder(loop_axes=loop_axes, min_rows=8)
        compiled(gated, few(tokens=12, dtype=torch.bfloat16), recorder)
        assert [loop.region.length for loop in loops(recorder)] == expected


@pytest.mark.parametrize(("length", "chunk"), [(256, 100), (16, 5)], ids=["features", "tokens"])
def test_a_plan_says_which_axis(length: int, chunk: int):
    recorder = Recorder(loop_axes="either", min_rows=8)
    inputs = few()
    compiled(gated, inputs, recorder)
    (loop,) = loops(recorder)
    seed = loop.region.seed
    subject = op_name(seed), source_of(seed)
    again = FixedLoop(*subject, loop.mode, 1, chunk, along_weights=length == 256)
    replayed = same_numbers(gated, inputs, loop_axes="either", fixed=(again,))
    assert [(one.region.length, one.chunk) for one in loops(replayed)] == [(length, chunk)]


def test_tokens_come_first_by_default():
    graph = trace(gated, *(torch.randn(s) for s in [(TOKENS, HIDDEN), UP, UP, DOWN]))
    axes = analyze_axes(graph, find_rule)
    for loop_axes, length in (("tokens", TOKENS), ("either", TOKENS), ("weights", WIDE)):
        (region,), _ = find_regions(graph, axes, min_bytes=1, loop_axes=loop_axes)
        assert region.length == length
        assert (region.instead is not None) == (loop_axes == "either")
    finder = RegionFinder(graph, axes, 1, loop_axes="weights")
    assert not any(finder.may_seed(n) for n in finder.parameters), "weights are there anyhow"

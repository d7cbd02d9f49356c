"""What is saved beside what it is made from is made again, and nothing else is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph
from torch.utils.checkpoint import CheckpointPolicy

from mstc.runtime.memory import measure_peak
from passes import plan
from passes.copies import copy_graph
from passes.liveness import REMADE, saved_beside_sources, saved_values
from passes.remade import make_again
from tests.models import (
    compile_mst,
    fresh_compiler,  # noqa: F401  (an autouse fixture)
)
from tests.passes.graphs import Recorder, assert_close, compiled, gradients_of

ROWS, HIDDEN, WIDE = 512, 32, 256
F32 = 4  # bytes


def joint(fn: Callable[..., object], *inputs: Tensor) -> Graph:
    recorder = Recorder(min_peak_bytes=2**60)
    compiled(fn, inputs, recorder)
    return recorder.graphs[0]


def inputs(*widths: int) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(ROWS, widths[0]), *pairwise(widths)]
    return [torch.randn(*shape, requires_grad=True) for shape in shapes]


def root_mean_square(x: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


def normed(x: Tensor, w: Tensor) -> Tensor:
    return (root_mean_square(x) @ w).square().sum()


def normed_in_bfloat16(x: Tensor, w: Tensor) -> Tensor:
    return (root_mean_square(x).bfloat16() @ w.bfloat16()).float().square().sum()


def layer_normed(x: Tensor, w: Tensor) -> Tensor:
    return (F.layer_norm(x, x.shape[-1:]) @ w).square().sum()


def of_a_stream(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """The sum is saved for the norm's backward, the norm's output need not be."""
    stream = x @ w + x
    return (root_mean_square(stream) @ v).square().sum()


def dropped(x: Tensor, w: Tensor) -> Tensor:
    """The mask is saved: random numbers are not made again."""
    return ((x * (torch.rand_like(x) < 0.5)) @ w).square().sum()


def activated(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return (F.gelu(x @ w) @ v).square().sum()


@pytest.mark.parametrize(
    ("fn", "widths"),
    [
        (normed, (HIDDEN, HIDDEN)),
        (normed_in_bfloat16, (HIDDEN, HIDDEN)),
        (layer_normed, (HIDDEN, HIDDEN)),
        (dropped, (HIDDEN, HIDDEN)),
        (of_a_stream, (HIDDEN, HIDDEN, HIDDEN)),
        (activated, (HIDDEN, WIDE, HIDDEN)),
    ],
    ids=lambda one: getattr(one, "__name__", None),
)
def test_made_again(fn: Callable[..., Tensor], widths: tuple[int, ...]) -> None:
    graph = joint(fn, *inputs(*widths))
    marked, _ = copy_graph(graph)
    make_again(marked)
    found = [n for n in marked.nodes if REMADE in n.meta]
    assert len(found) == (2 if fn is normed_in_bfloat16 else 1), "a cast of the weight is another"
    assert all(n.meta["recompute"] is CheckpointPolicy.PREFER_RECOMPUTE for n in found)
    before, after = ({n.name for n in saved_values(g)} for g in (graph, marked))
    assert after < before
    assert before - after == {n.name for n in found}
    assert not saved_beside_sources(marked)[0]


def of_what_is_not_saved(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """Nothing needs the product itself."""
    return ((x @ w * 2) @ v).square().sum()


def a_product(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return (x @ w @ v).square().sum()


def long(x: Tensor, w: Tensor) -> Tensor:
    for _ in range(5):
        x = x.sin().cos()
    return (x @ w).square().sum()


@pytest.mark.parametrize(
    ("fn", "widths"),
    [
        (of_what_is_not_saved, (HIDDEN, HIDDEN, HIDDEN)),
        (a_product, (HIDDEN, HIDDEN, HIDDEN)),
        (long, (HIDDEN, HIDDEN)),
    ],
    ids=lambda one: getattr(one, "__name__", None),
)
def test_kept(fn: Callable[..., Tensor], widths: tuple[int, ...]) -> None:
    assert not saved_beside_sources(joint(fn, *inputs(*widths)))[0]


def test_outputs_are_there_anyhow() -> None:
    def fn(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        made = root_mean_square(x)
        return (made @ w).square().sum(), made.view(-1)

    assert not saved_beside_sources(joint(fn, *inputs(HIDDEN, HIDDEN)))[0]


def test_small_values_are_kept() -> None:
    def fn(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        narrow = root_mean_square(x[:, :1])
        return (narrow @ w[:1]).square().sum() + (x @ v).exp().sum()

    made = inputs(HIDDEN, HIDDEN, WIDE)
    made[2] = torch.randn(HIDDEN, WIDE, requires_grad=True)
    assert not saved_beside_sources(joint(fn, *made))[0]


def test_the_users_checkpointing_has_decided() -> None:
    graph, _ = copy_graph(joint(normed, *inputs(HIDDEN, HIDDEN)))
    ((node,), _) = saved_beside_sources(graph)
    node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    make_again(graph)
    assert node.meta["recompute"] is CheckpointPolicy.MUST_SAVE
    assert REMADE not in node.meta


@contextmanager
def saving_all() -> Iterator[None]:
    with patch.object(plan, "make_again", lambda graph: None):
        yield


LAYERS = 8


def layers(x: Tensor, *weights: Tensor) -> Tensor:
    """Three products read a norm; a wide part gets a loop."""
    mixing, up, down = weights[:LAYERS], weights[LAYERS], weights[LAYERS + 1]
    for w in mixing:
        x = x + torch.tanh(root_mean_square(x) @ w)
    return (F.gelu(x @ up) @ down).square().sum()


def layered() -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(ROWS, HIDDEN), *[(HIDDEN, HIDDEN)] * LAYERS, (HIDDEN, WIDE), (WIDE, HIDDEN)]
    return [torch.randn(*shape, requires_grad=True) for shape in shapes]


def test_a_step_with_loops_saves_less_by_what_is_made_again() -> None:
    def saved_by(recorder: Recorder) -> int:
        made = layered()
        run = compiled(layers, made, recorder)
        nbytes = [0]

        def pack(value: Tensor) -> Tensor:
            nbytes[0] += value.nbytes
            return value

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            run(*made)
        return nbytes[0]

    ours, without = Recorder(chunk_rows=64), Recorder(chunk_rows=8)
    untouched = Recorder(min_peak_bytes=2**60)
    with saving_all():
        all_of_it = saved_by(without)
    # the norms' outputs, and the last sum, whose terms are saved
    assert all_of_it - saved_by(ours) == (LAYERS + 1) * ROWS * HIDDEN * F32
    assert ours.planned[0].plan.loops
    saved_by(untouched)
    assert untouched.planned[0].chunked is None
    now, before = (one.planned[0].plan.after for one in (ours, without))
    assert now.peak_bytes < before.peak_bytes


def test_gradients_stay() -> None:
    made = [t.detach().double().requires_grad_() for t in layered()]
    ours = gradients_of(layers, made, Recorder(chunk_rows=64))
    assert_close(ours, gradients_of(layers, made, None))


def test_the_peak_falls() -> None:
    def peak() -> int:
        made = layered()
        run = compiled(layers, made, Recorder(chunk_rows=64))

        def train() -> None:
            run(*made)[0].backward()
            for t in made:
                t.grad = None

        train()
        return measure_peak(train).peak_nbytes

    with saving_all():
        before = peak()
    assert peak() < before


class Scaled(nn.Module):
    """What its products read is made of a buffer, in some way."""

    def __init__(self, how: Callable[[Tensor], Tensor], *, writes: bool) -> None:
        super().__init__()
        self.mixing, self.up = nn.Linear(16, 16), nn.Linear(16, 128)
        self.down = nn.Linear(128, 16)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 16))
        self.how, self.writes = how, writes

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.mixing((x + 1) * self.how(self.scale)))
        result = self.down(F.gelu(self.up(hidden)))
        if self.writes:
            self.scale.mul_(3)
        return result.square().mean()


WAYS: list[Callable[[Tensor], Tensor]] = [
    lambda scale: scale,
    lambda scale: scale.roll(1),
    lambda scale: scale[None][torch.zeros(1, dtype=torch.int64)],
    lambda scale: scale.as_strided((16,), (1,)),
    lambda scale: scale.unfold(0, 16, 1)[0],
    lambda scale: torch.stack([scale, scale]).mean(0),
    lambda scale: scale.sort().values,
]


@pytest.mark.parametrize("writes", [True, False], ids=["written inside", "written by the caller"])
@pytest.mark.parametrize("how", range(len(WAYS)))
def test_buffers_that_change_before_the_backward(how: int, writes: bool) -> None:
    def step(module: Scaled, call: Callable[[Tensor], Tensor]) -> list[Tensor]:
        loss = call(x)
        if not writes:
            with torch.no_grad():
                module.scale.mul_(3)
        loss.backward()
        return [p.grad for p in module.parameters() if p.grad is not None]

    torch.manual_seed(0)
    x = torch.randn(64, 16)
    eager = Scaled(WAYS[how], writes=writes).double()
    ours = copy.deepcopy(eager)
    x = x.double()
    wanted = step(eager, eager)
    assert_close(step(ours, compile_mst(ours)), wanted)


def test_two_views_of_one_buffer_of_which_one_is_written() -> None:
    def model(x: Tensor, one: Tensor, other: Tensor, w: Tensor, up: Tensor, down: Tensor) -> Tensor:
        hidden = torch.tanh((x * one) @ w)
        other.mul_(3)
        return (F.gelu(hidden @ up) @ down).square().mean()

    shapes = ((16, 16), (16, 128), (128, 16))
    torch.manual_seed(0)
    weights = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    x = torch.randn(64, 16, dtype=torch.float64)

    def step(call: Callable[..., Tensor]) -> list[Tensor]:
        base = torch.linspace(0.5, 1.5, 32, dtype=torch.float64)
        return list(torch.autograd.grad(call(x, base[:16], base[8:24], *weights), weights))

    wanted = step(model)
    assert_close(step(compile_mst(model)), wanted)


def test_weights_that_are_cast_are_cast_again() -> None:
    """Under autocast: what is trained is there in the backward, a frozen weight may not be."""

    def marked(*, frozen: bool) -> int:
        made = inputs(HIDDEN, HIDDEN)
        made[1].requires_grad_(not frozen)
        graph, _ = copy_graph(joint(normed_in_bfloat16, *made))
        make_again(graph)
        return sum(
            REMADE in n.meta and n.all_input_nodes[0].op == "placeholder" for n in graph.nodes
        )

    assert marked(frozen=False) == 1
    assert marked(frozen=True) == 0

"""Lengths that vary: automatic dynamic shapes, marked ones, and all at once."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import mstc
from mstc import history
from mstc.runtime import loop
from mstc.runtime.output import Output
from tests.models import (
    EAGER,
    INDUCTOR,
    MLP,
    TinyLM,
    assert_no_fallback,
    assert_same,
    compile_mst,
    counting_loops,
    fresh_compiler,  # noqa: F401  (an autouse fixture)
    has_loops,
    lm_batch,
    train,
)

LENGTHS = (37, 64, 101, 7, 2, 3, 48, 97, 8)  # odd, prime, a multiple, shorter than a chunk


def _compiles() -> int:
    return counters["stats"]["unique_graphs"]


def test_automatic_dynamic() -> None:
    model = TinyLM()
    call = compile_mst(model)
    start, before = len(history.reports()), _compiles()
    with counting_loops() as programs:
        for length in LENGTHS:
            batch = lm_batch(2, length, ignored=1)
            assert_same(train(model, call, batch), train(model, model, batch))
    assert _compiles() - before == 2  # one for the first length, one for all others
    assert programs
    found = history.reports()[start:]
    assert all(has_loops([r]) for r in found)
    assert_no_fallback(found)


def test_rows_and_lengths_vary() -> None:
    model = TinyLM()
    call = compile_mst(model)
    start, before = len(history.reports()), _compiles()
    for rows, length in ((2, 37), (3, 37), (3, 64), (2, 5), (4, 101), (1, 37), (1, 50), (5, 2)):
        batch = lm_batch(rows, length)
        assert_same(train(model, call, batch), train(model, model, batch))
    assert _compiles() - before <= 4
    assert_no_fallback(history.reports()[start:])
    assert all(has_loops([r]) for r in history.reports()[start:])


def test_dynamic_from_the_start() -> None:
    model = TinyLM(tied=True)
    call = compile_mst(model, dynamic=True)
    before = _compiles()
    for length in LENGTHS:
        batch = lm_batch(2, length)
        assert_same(train(model, call, batch), train(model, model, batch))
    assert _compiles() - before == 1
    assert has_loops([mstc.last_report()])


def test_marked_as_dynamic() -> None:
    model = TinyLM()
    call = compile_mst(model)
    before = _compiles()
    for length in (37, 64, 101, 7):
        ids, labels = lm_batch(2, length)
        for tensor in (ids, labels):
            torch._dynamo.mark_dynamic(tensor, 1)
        assert_same(train(model, call, (ids, labels)), train(model, model, (ids, labels)))
    assert _compiles() - before == 1
    assert has_loops([mstc.last_report()])


def test_marked_as_static_in_an_otherwise_dynamic_model() -> None:
    model = TinyLM()
    call = compile_mst(model, dynamic=False)
    for length in (37, 64):
        batch = lm_batch(2, length)
        assert_same(train(model, call, batch), train(model, model, batch))
        assert has_loops([mstc.last_report()])


def test_dynamic_without_gradients() -> None:
    model = TinyLM()
    call = compile_mst(model, dynamic=True)
    with torch.no_grad(), counting_loops() as programs:
        for length in LENGTHS:
            batch = lm_batch(2, length)
            torch.testing.assert_close(call(*batch), model(*batch))
    assert programs


@pytest.mark.filterwarnings("ignore:var_mean.*degrees of freedom is <= 0")
def test_no_tokens_at_all() -> None:
    """Sums and gradients of nothing are zero, a mean is nan, as in eager."""
    model = TinyLM(reduction="sum")
    for dynamic in (False, True):
        call = compile_mst(model, dynamic=dynamic)
        for batch in (lm_batch(2, 37), lm_batch(2, 0), lm_batch(2, 12)):
            assert_same(train(model, call, batch), train(model, model, batch))
        torch._dynamo.reset()


def test_no_tokens_through_a_layer() -> None:
    model = MLP()
    call = compile_mst(model, dynamic=True)
    for length in (40, 0, 1, 9):
        x = torch.randn(length, 16, requires_grad=True)
        eager = torch.autograd.grad(model(x).square().sum(), (x, *model.parameters()))
        ours = torch.autograd.grad(call(x).square().sum(), (x, *model.parameters()))
        for left, right in zip(ours, eager, strict=True):
            torch.testing.assert_close(left, right)


def test_input_of_three_dims_with_gradient() -> None:
    model = MLP()
    call = compile_mst(model, dynamic=True)
    for rows, length in ((2, 30), (3, 17), (7, 5)):
        x = torch.randn(rows, length, 16, requires_grad=True)
        eager = torch.autograd.grad(model(x).square().sum(), (x, *model.parameters()))
        ours = torch.autograd.grad(call(x).square().sum(), (x, *model.parameters()))
        for left, right in zip(ours, eager, strict=True):
            torch.testing.assert_close(left, right)
    assert has_loops([mstc.last_report()])


def test_a_dynamic_size_inside_a_region() -> None:
    """Divided by the number of rows, which only run time knows."""

    class Model(MLP):
        def forward(self, x: Tensor) -> Tensor:
            wide = F.gelu(self.up(x)) / x.shape[0]
            return self.down(wide + x.shape[0])

    model = Model()
    call = compile_mst(model, dynamic=True)
    for length in (40, 55, 8):
        x = torch.randn(length, 16)
        eager = train(model, lambda x=x: model(x).square().sum())
        assert_same(train(model, lambda x=x: call(x).square().sum()), eager)
    assert_no_fallback([mstc.last_report()])


def test_a_gain_per_position() -> None:
    """A whole input of the batch's loop, or a split one of the length's: both sizes vary."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp, self.gain = MLP(), nn.Parameter(torch.rand(128, 64))

        def forward(self, x: Tensor) -> Tensor:
            wide = torch.tanh(self.mlp.up(x) * self.gain[: x.shape[1]])
            return self.mlp.down(wide).square().sum()

    model = Model()
    call = compile_mst(model, dynamic=True)
    for rows, length in ((2, 30), (40, 3), (3, 128), (5, 7)):
        x = torch.randn(rows, length, 16)
        assert_same(train(model, call, (x,)), train(model, model, (x,)))
    assert_no_fallback([mstc.last_report()])


def test_a_dynamic_vocabulary() -> None:
    weight = torch.randn(96, 16, requires_grad=True)

    def loss(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(x @ w.t(), labels)

    call = compile_mst(loss, dynamic=True)
    for rows, vocab in ((40, 96), (41, 90), (64, 50), (7, 96)):
        x = torch.randn(rows, 16, requires_grad=True)
        labels = torch.randint(vocab, (rows,))
        w = weight[:vocab].detach().requires_grad_()
        eager = torch.autograd.grad(loss(x, w, labels), (x, w))
        ours = torch.autograd.grad(call(x, w, labels), (x, w))
        for left, right in zip(ours, eager, strict=True):
            torch.testing.assert_close(left, right)
    assert has_loops([mstc.last_report()])


def test_sequences_packed_by_data_dependent_masks() -> None:
    """`x[mask]` has a size that only run time knows; Dynamo breaks the graph or makes it
    unbacked."""
    model = TinyLM()

    def loss(ids: Tensor, labels: Tensor) -> Tensor:
        hidden = model.hidden(ids)
        keep = labels != -100
        return F.cross_entropy(model.head(hidden[keep]), labels[keep])

    batch = lm_batch(2, 37, ignored=9)
    eager = train(model, loss, batch)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        call = compile_mst(loss)
        assert_same(train(model, call, batch), eager)
        assert_no_fallback([mstc.last_report()])


def test_the_number_of_compilations_is_that_of_inductors_road() -> None:
    """What Dynamo counts: as many graphs as with any other backend."""
    counts: list[int] = []
    for backend in ("aot_eager", "mst"):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend(backend)
        if backend == "mst":
            from functools import partial

            counter.backend = backend

            def mst(gm: torch.fx.GraphModule, inputs: list[Tensor], counter=counter):
                counter.frame_count += 1
                return partial(mstc.mst_backend, options=EAGER)(gm, inputs)

            call = torch.compile(TinyLM(), backend=mst)
        else:
            call = torch.compile(TinyLM(), backend=counter)
        for length in (20, 30, 40, 50):
            call(*lm_batch(2, length)).backward()
        counts.append(counter.frame_count)
    assert counts[0] == counts[1] == 2


def test_nothing_is_compiled_again_over_fifty_lengths() -> None:
    """Through Inductor, bodies and all: the first length, the first other one, and no more."""
    model = TinyLM(hidden=8, vocab=64)
    call = torch.compile(model, backend="mst", options=INDUCTOR)
    random = Random(0)
    lengths = [random.randint(2, 200) for _ in range(50)]
    assert len({length % 32 for length in lengths}) > 20  # last chunks of many sizes
    after: list[tuple[int, int, int]] = []
    for length in lengths:
        call(*lm_batch(2, length, vocab=64)).backward()
        lowered = counters["inductor"]["fxgraph_cache_miss"]
        after.append((_compiles(), loop.counters.bodies_compiled, lowered))
    assert after[2:] == after[2:3] * 48
    assert after[-1][0] - after[0][0] == 1


class PositionBias(nn.Module):
    """Attention written out, with a bias per key that the product's own kernel adds (BLOOM)."""

    def __init__(self, heads: int = 2, width: int = 8) -> None:
        super().__init__()
        self.heads = heads
        self.project = nn.Linear(heads * width, 3 * heads * width)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.shape[0]
        query, key, value = self.project(x).view(tokens, 3, self.heads, -1).permute(1, 2, 0, 3)
        slopes = torch.arange(1, self.heads + 1, dtype=x.dtype).view(-1, 1, 1)
        bias = slopes * torch.arange(tokens, dtype=x.dtype)
        scores = torch.baddbmm(bias, query, key.transpose(1, 2), alpha=0.3)
        return (scores.softmax(-1) @ value).transpose(0, 1).flatten(1).square().mean()


def test_a_last_chunk_of_another_size_beside_a_stretched_bias(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Keys have a fixed size and queries an open one."""
    opened: list[list[int]] = []
    compiled = loop.Program._compiled

    def spy(self: loop.Program, sizes: Any, tensors: Any, dynamic: list[int]) -> Any:
        body = compiled(self, sizes, tensors, dynamic)
        opened.append(dynamic)
        return body

    monkeypatch.setattr(loop.Program, "_compiled", spy)
    model = PositionBias()
    x = torch.randn(37, 16, requires_grad=True)
    call = torch.compile(model, backend="mst", options=INDUCTOR)
    assert_same(train(model, call, (x,)), train(model, model, (x,)))
    report = mstc.last_report()
    assert any("baddbmm" in found.seed for g in report.graphs for found in g.loops)
    assert_no_fallback([report])
    assert opened.count([0]) == opened.count([]) == 2  # forward and backward, two sizes each


def test_chunks_are_of_rows_whatever_the_length() -> None:
    """The size of a chunk is fixed when the graph is compiled; its number follows the length."""
    model = TinyLM()
    call = compile_mst(model, dynamic=True, chunk_rows=8)
    steps: list[int] = []
    original = Output.put

    def put(self, place, values, sizes, ends, only):
        steps.append(sizes[0])
        return original(self, place, values, sizes, ends, only)

    Output.put = put
    try:
        for length in (16, 64, 160):
            steps.clear()
            with torch.no_grad():
                call(*lm_batch(1, length))
            assert max(steps) <= 8
    finally:
        Output.put = original


@pytest.mark.parametrize("length", [1, 2])
def test_very_short(length: int) -> None:
    model, batch = TinyLM(), lm_batch(1, length)
    assert_same(train(model, compile_mst(model), batch), train(model, model, batch))


class EverySecond(nn.Module):
    """A second output whose tangent has a size that nothing else in the graph has."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 256, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.gelu(self.head(x))[:, ::8]
        return logits.logsumexp(-1).sum(), logits.logsumexp(-1)


class TokenShift(nn.Module):
    """A size (length - 1) that only exists inside the region."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 256), nn.Linear(256, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.gelu(self.up(x))
        y = y - F.pad(y[:, :-1], (0, 0, 1, 0))
        return self.down(y).pow(2).mean(), x[:, 1:] * 2


@pytest.mark.parametrize(("kind", "rows"), [(EverySecond, 1), (TokenShift, 3)])
def test_a_size_that_is_computed_from_others(kind: type[nn.Module], rows: int) -> None:
    """The loop needs it as an argument, before any tangent is there."""
    model = kind()
    compiled = compile_mst(model)

    def loss(x: Tensor, call: Callable[..., Any]) -> Tensor:
        torch._dynamo.mark_dynamic(x, 1)
        first, second = call(x)
        return first + second.square().sum()

    for length in (65, 33, 50):
        x = torch.randn(rows, length, 8)
        expected = train(model, loss, (x, model))
        assert_same(train(model, loss, (x, compiled)), expected)
        assert_no_fallback([mstc.last_report()])
        assert has_loops([mstc.last_report()])

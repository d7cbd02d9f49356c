"""A simulated step takes the memory that a real one does, to the byte, and leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import mstc
from mstc.emission import emit
from mstc.errors import SimulationError
from mstc.options import parse_options
from mstc.runtime.memory import MemoryTrace, measure_step
from mstc.simulate import Backend, Simulation, loss_of, simulate_step
from mstc.watch import Buffer, Watch
from tests.models import (
    INDUCTOR,
    NON_LEAF,
    TinyLM,
    compile_mst,
    fresh_compiler,  # noqa: F401  (an autouse fixture)
    lm_batch,
)


def test_what_was_there_at_the_start_is_not_taken_for_what_comes_later() -> None:
    """Memory that is free again may get the same address."""
    with FakeTensorMode():
        for _ in range(20):
            own = torch.empty(100)
            watch = Watch([own])
            del own
            with watch:
                made = [torch.empty(100) for _ in range(5)]
            assert watch.summary([]).peak_nbytes == 5 * 400
            del made


class Tied(nn.Module):
    """Embedding and head share a weight, so autograd adds two gradients up."""

    def __init__(self, vocab: int = 512, hidden: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, hidden)
        self.mix = nn.Linear(hidden, hidden)

    def forward(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.mix(self.embed(ids)))
        torch._dynamo.graph_break()
        logits = F.linear(hidden, self.embed.weight)
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten()), logits


def _measured(model: nn.Module, batch: tuple[Any, ...], backend: Backend) -> MemoryTrace:
    compiled: Callable[..., Any] = model
    if backend == "mst":
        compiled = compile_mst(model, **INDUCTOR)
    elif backend == "inductor":
        compiled = torch.compile(model, backend="inductor")

    def step() -> None:
        model.zero_grad()
        loss_of(compiled(*batch)).backward()

    step()  # compiles
    return measure_step(step, model.parameters())


def _assert_as_measured(model: nn.Module, backend: Backend) -> None:
    batch = lm_batch(67, vocab=32)
    options = INDUCTOR if backend == "mst" else None
    simulated = simulate_step(model, *batch, backend=backend, options=options)
    torch._dynamo.reset()
    measured = _measured(model, batch, backend)
    assert simulated.peak_nbytes == measured.peak_nbytes
    assert simulated.peak_intermediate_nbytes == measured.peak_intermediate_nbytes
    assert simulated.grad_nbytes == measured.grad_nbytes


@NON_LEAF
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("backend", ["eager", "inductor", "mst"])
@pytest.mark.parametrize("kind", [TinyLM, Tied])
def test_as_measured(kind: type[nn.Module], backend: Backend) -> None:
    _assert_as_measured(kind(), backend)


@NON_LEAF
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("backend", ["eager", "inductor", "mst"])
def test_in_bfloat16_as_measured(backend: Backend) -> None:
    """With what products take while they run, where the processor has them in bfloat16."""
    _assert_as_measured(TinyLM(vocab=512, hidden=64).bfloat16(), backend)


def test_scratch_has_a_name() -> None:
    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x).sum()

    x = torch.randn(1, 2, 64, 16, requires_grad=True)
    for backend in ("eager", "inductor"):
        trace = simulate_step(Attention(), x, backend=backend)
        own = [b for b in trace.buffers if b.made_by.startswith("scratch of aten._scaled_dot")]
        assert len(own) == 2, "forward and backward"
        assert all(b.dies == b.born + 1 and "F.scaled_dot_product" in b.source for b in own[:1])


def test_many_chunks_are_three() -> None:
    """Nine chunks of eight rows: what three of them take is what all take."""
    model, batch = TinyLM(), lm_batch(72, vocab=32)
    simulated = simulate_step(model, *batch, options=INDUCTOR)
    measured = _measured(model, batch, "mst")
    assert simulated.peak_intermediate_nbytes == measured.peak_intermediate_nbytes
    assert len(simulated.timeline) < len(measured.timeline)


@pytest.mark.parametrize("backend", ["inductor", "mst"])
def test_compiled_once_it_runs_once(backend: Backend) -> None:
    model, batch = TinyLM(), lm_batch(24, vocab=32)
    runs: list[int] = []
    with Simulation(model, batch) as simulation:
        options = INDUCTOR if backend == "mst" else None
        compiled = simulation.compile(model, backend, options)

        def step() -> None:
            runs.append(1)
            loss_of(compiled(*simulation.batch)).backward()

        first = simulation.trace(step)
        assert len(runs) == 2, "to compile, and to watch"
        assert simulation.trace(step).peak_nbytes == first.peak_nbytes
        assert len(runs) == 3


def test_a_real_run_after_it_has_kernels() -> None:
    """Neither PyTorch's caches nor ours hold what was written without kernels."""
    model, batch = TinyLM(), lm_batch(40, vocab=32)
    loss_of(model(*batch)).backward()
    expected = [p.grad for p in model.parameters()]
    for backend in ("mst", "inductor"):
        options = INDUCTOR if backend == "mst" else None
        simulate_step(model, *batch, backend=backend, options=options)
        torch._dynamo.reset()
        model.zero_grad()
        compiled = torch.compile(model, backend=backend, options=options)
        loss_of(compiled(*batch)).backward()
        for parameter, gradient in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)


def test_the_model_stays_as_it_was() -> None:
    model = TinyLM()
    before = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    simulate_step(model, *lm_batch(24, vocab=32))
    for name, parameter in model.named_parameters():
        identity, value = before[name]
        assert id(parameter) == identity
        assert torch.equal(parameter, value)
        assert parameter.grad is None


def test_a_model_without_memory() -> None:
    with torch.device("meta"):
        model = TinyLM(vocab=1 << 17, hidden=4096)
        batch = tuple(torch.zeros(1, 1 << 16, dtype=torch.long) for _ in range(2))
    ours, theirs = (simulate_step(model, *batch, backend=b) for b in ("mst", "inductor"))
    assert theirs.peak_intermediate_nbytes > 4 * (1 << 17) * (1 << 16), "the logits are there"
    assert ours.peak_intermediate_nbytes < theirs.peak_intermediate_nbytes / 4


def test_autocast_counts() -> None:
    model, batch = TinyLM(vocab=4096), lm_batch(64, vocab=32)
    whole = simulate_step(model, *batch, backend="inductor")
    with torch.autocast("cpu", torch.bfloat16):
        narrow = simulate_step(model, *batch, backend="inductor")
    assert narrow.peak_intermediate_nbytes < whole.peak_intermediate_nbytes


def test_a_value_is_read() -> None:
    class Peeks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            return y.sum() * (2 if y.sum().item() > 0 else 3)

    with pytest.raises(SimulationError, match="reads a value"):
        simulate_step(Peeks(), torch.randn(2, 4))


def test_no_loss() -> None:
    with pytest.raises(SimulationError, match="pass labels"):
        simulate_step(nn.Linear(4, 4), torch.randn(2, 4))
    trace = simulate_step(nn.Linear(4, 4), torch.randn(2, 4), loss=lambda y: y.square().mean())
    assert trace.grad_nbytes == 4 * (16 + 4)


@pytest.mark.parametrize(
    ("output", "value"),
    [
        ({"loss": torch.tensor(1.0), "logits": torch.ones(2)}, 1.0),
        ((torch.tensor(2.0), torch.ones(2)), 2.0),
        (torch.tensor(3.0), 3.0),
    ],
)
def test_where_the_loss_is(output: Any, value: float) -> None:
    assert float(loss_of(output)) == value


def test_code_without_kernels_computes_nothing() -> None:
    with FakeTensorMode() as mode:
        x = mode.from_tensor(torch.ones(4))
        call = emit(make_fx(lambda x: (x.sin(),))(x), [x], is_inference=True)
        assert call([x])[0].shape == (4,)
    with pytest.raises(RuntimeError, match="outside a simulation"):
        call([torch.ones(4)])


def test_emitting_is_not_a_lowering_for_users() -> None:
    with pytest.raises(mstc.OptionError, match='"inductor" or "eager"'):
        parse_options({"lowering": "emit"}, None)


@NON_LEAF
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("backend", ["eager", "inductor", "mst"])
@pytest.mark.parametrize("kind", [TinyLM, Tied])
def test_buffers_sum_up_to_the_timeline(kind: type[nn.Module], backend: Backend) -> None:
    options = INDUCTOR if backend == "mst" else None
    trace = simulate_step(kind(), *lm_batch(67, vocab=32), backend=backend, options=options)

    def alive(time: float) -> list[Buffer]:
        return [b for b in trace.buffers if b.born <= time and (b.dies is None or b.dies > time)]

    for time, nbytes in trace.timeline[1:]:
        assert sum(b.nbytes for b in alive(time)) == nbytes
    held = [b.nbytes - b.grad_nbytes for b in alive(trace.peak_time)]
    assert sum(held) == trace.peak_intermediate_nbytes
    assert sorted(filter(None, held)) == sorted(h.nbytes for h in trace.at_peak)
    assert sum(b.grad_nbytes for b in trace.buffers) == trace.grad_nbytes


def test_where_buffers_come_from() -> None:
    """The line of the model, in code that a compiler wrote as in eager code; of a loop, its own."""
    model, batch = TinyLM(vocab=256), lm_batch(64, vocab=32)
    for backend in ("eager", "inductor"):
        trace = simulate_step(model, *batch, backend=backend)
        (logits,) = [
            b for b in trace.buffers if b.nbytes == 4 * 256 * 64 and "self.head" in b.source
        ][:1]
        assert logits.made_by in ("aten.mm", "aten.addmm")
        assert "tests/models.py:" in logits.source
        assert logits.loop is None
    trace = simulate_step(model, *batch, options=INDUCTOR)
    in_loops = [b for b in trace.buffers if b.loop is not None]
    assert {b.is_result for b in in_loops} == {True, False}
    for buffer in in_loops:
        span = trace.loops[buffer.loop]
        assert span.start <= buffer.born < span.end
        if not buffer.is_result:
            assert buffer.dies is not None
            assert buffer.dies < span.end
    assert any(b.grad_nbytes for b in in_loops if b.is_result), "made in the forward's loop"

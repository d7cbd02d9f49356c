"""When something goes wrong: the user sees the real cause, or training goes on and the report says
so."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mstc
import passes
from mstc.errors import BodyCompilationWarning, FallbackWarning
from mstc.runtime import loop
from tests.models import (
    EAGER,
    INDUCTOR,
    MLP,
    TinyLM,
    assert_same,
    compile_mst,
    fresh_compiler,  # noqa: F401  (an autouse fixture)
    has_loops,
    lm_batch,
    train,
)


def _labels_out_of_range() -> tuple[Tensor, Tensor]:
    ids, labels = lm_batch(2, 37)
    labels[1, 20] = 1000
    return ids, labels


def test_labels_out_of_range() -> None:
    """The real cause, not one of ours; and the next call is right."""
    model, batch = TinyLM(), lm_batch(2, 37)
    call = compile_mst(model)
    eager = train(model, model, batch)
    for _ in range(2):
        with pytest.raises((IndexError, RuntimeError), match=r"1000|out of (range|bounds)"):
            train(model, call, _labels_out_of_range())
        assert_same(train(model, call, batch), eager)
    assert has_loops([mstc.last_report()])


def test_ids_out_of_range() -> None:
    model, (ids, labels) = TinyLM(), lm_batch(2, 37)
    call = compile_mst(model)
    with pytest.raises(IndexError, match="out of range"):
        call(ids + 96, labels)
    assert_same(train(model, call, (ids, labels)), train(model, model, (ids, labels)))


def test_shapes_that_do_not_fit() -> None:
    model = MLP()
    call = compile_mst(model)
    with pytest.raises(Exception, match=r"17"):
        call(torch.randn(40, 17))
    x = torch.randn(40, 16)
    torch.testing.assert_close(call(x), model(x))


def test_an_error_in_a_hook_in_backward() -> None:
    """The backward stops in the middle; the next one is right."""
    model, batch = TinyLM(), lm_batch(2, 37)
    eager = train(model, model, batch)
    call = compile_mst(model)

    def fail(gradient: Tensor) -> None:
        raise KeyError("from the hook")

    handle = model.embed.weight.register_hook(fail)
    with pytest.raises(KeyError, match="from the hook"):
        train(model, call, batch)
    handle.remove()
    assert_same(train(model, call, batch), eager)


# -- Inductor fails on a body -------------------------------------------------------------------


@pytest.fixture
def no_inductor_for_bodies(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []

    def compile_body(*args: Any, build: bool) -> Any:
        calls.append(1)
        raise RuntimeError("no compiler today")

    monkeypatch.setattr(loop, "compile_body", compile_body)
    loop.program_of.cache_clear()
    return calls


def test_a_body_that_cannot_be_compiled(no_inductor_for_bodies: list[int]) -> None:
    """It runs op by op, is said once, and stands in the report. The outer graph is Inductor's."""
    model = MLP()
    call = torch.compile(model, backend="mst", options=INDUCTOR)
    x = torch.randn(50, 16)
    with pytest.warns(BodyCompilationWarning, match="no compiler today") as caught, torch.no_grad():
        ours = call(x)
    torch.testing.assert_close(ours, model(x))
    assert len(caught) == 1
    assert "it runs op by op" in str(caught[0].message)
    (note,) = mstc.last_report().notes
    assert "no compiler today" in note
    assert note in str(mstc.last_report())
    with torch.no_grad():
        torch.testing.assert_close(
            call(x), model(x)
        )  # and no second warning, which is an error here
    assert len(no_inductor_for_bodies) == 1


def test_bodies_that_cannot_be_compiled_in_forward_and_backward(
    no_inductor_for_bodies: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mstc import driver

    def eagerly(gm: Any, inputs: Any, graph_pass: Any, config: Any, **kwargs: Any) -> Any:
        return driver.compile_outer_eager(gm, inputs, graph_pass)

    monkeypatch.setattr(driver, "compile_outer", eagerly)  # only the bodies are of interest
    model, batch = TinyLM(layers=2), lm_batch(2, 37)
    call = torch.compile(model, backend="mst", options=INDUCTOR)
    eager = train(model, model, batch)
    with pytest.warns(BodyCompilationWarning):
        assert_same(train(model, call, batch), eager)
    assert_same(train(model, call, batch), eager)
    assert any("no compiler today" in note for note in mstc.last_report().notes)


# -- a pass of ours fails -----------------------------------------------------------------------


@pytest.mark.parametrize("step", ["separate", "find_regions", "make_plan", "verify_same_interface"])
def test_a_pass_that_fails(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError(f"a mistake in {step}")

    monkeypatch.setattr(passes, step, fail)
    model, batch = TinyLM(), lm_batch(2, 37)
    eager = train(model, model, batch)
    call = compile_mst(model)
    with pytest.warns(FallbackWarning, match=f"ZeroDivisionError: a mistake in {step}") as caught:
        assert_same(train(model, call, batch), eager)
    assert len(caught) == 1
    assert "Training goes on" in str(caught[0].message)
    (note,) = mstc.last_report().notes
    assert f"a mistake in {step}" in note
    assert not has_loops([mstc.last_report()])
    monkeypatch.undo()
    torch._dynamo.reset()
    assert_same(train(model, compile_mst(model), batch), eager)
    assert has_loops([mstc.last_report()])


@pytest.mark.parametrize("step", ["defer_outputs", "detach_outputs"])
def test_a_step_before_that_fails(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake in the steps before AOTAutograd costs no run either."""
    from mstc import prepare

    def fail(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("a mistake before")

    monkeypatch.setattr(prepare, step, fail)
    model, batch = TinyLM(), lm_batch(2, 37)
    eager = train(model, model, batch)
    with pytest.warns(FallbackWarning, match="a mistake before"):
        assert_same(train(model, compile_mst(model), batch), eager)
    assert any("a mistake before" in note for note in mstc.last_report().notes)
    assert has_loops([mstc.last_report()])


def test_a_failure_of_the_model_is_not_called_ours() -> None:
    class Model(MLP):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[0] > 4:
                raise ValueError("too long")
            return super().forward(x)

    with pytest.raises(ValueError, match="too long"):
        compile_mst(Model())(torch.randn(5, 16))


# -- odd values ---------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_a_number_stays_in_its_rows(value: float) -> None:
    """One bad row makes the same entries of gradients bad as in eager, in all chunks no more."""
    model = MLP()
    x = torch.randn(50, 16, requires_grad=True)
    with torch.no_grad():
        x[13, 3] = value
    weight = torch.zeros(50, 16)
    weight[:10] = 1  # the bad row has no say
    y = compile_mst(model)(x)
    eager = model(x)
    torch.testing.assert_close(y, eager, equal_nan=True)
    (ours,) = torch.autograd.grad(y[:10].square().sum(), x, retain_graph=True)
    (theirs,) = torch.autograd.grad(eager[:10].square().sum(), x)
    torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_overflow_of_scaled_gradients_is_seen_as_in_eager() -> None:
    """A loss scaler needs the infinities."""
    model, batch = TinyLM().half(), lm_batch(2, 37)
    for run in (compile_mst(model), torch.compile(model, backend="aot_eager")):
        step = train(model, run, batch, backward=lambda loss: (loss.float() * 2.0**40).backward())
        assert any(not g.isfinite().all() for g in step.gradients.values())
        torch._dynamo.reset()


def test_deep_copies_of_a_trained_model() -> None:
    model, batch = TinyLM(), lm_batch(2, 37)
    call = compile_mst(model)
    eager = train(model, call, batch)
    twin = copy.deepcopy(model)
    assert_same(train(twin, compile_mst(twin), batch), eager, tolerance=0)


def test_an_error_in_one_thread_and_work_in_another() -> None:
    """Bodies are shared between threads (a data-parallel wrapper, a server)."""
    from concurrent.futures import ThreadPoolExecutor

    model = MLP()
    call = torch.compile(model, backend="mst", options=EAGER)
    x = torch.randn(50, 16)
    with torch.no_grad():
        expected = model(x)
        call(x)

    def work(_: int) -> bool:
        with torch.no_grad():
            return torch.allclose(call(x), expected, atol=1e-6)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(32)))


def test_sparse_embedding_gradients() -> None:
    """Dynamo leaves a sparse embedding out of the graph; the rest is chunked."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(96, 16, sparse=True), nn.Linear(16, 96)

        def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(self.head(self.embed(ids)).flatten(0, 1), labels.flatten())

    model, batch = Model(), lm_batch(2, 37)
    model(*batch).backward()
    expected = [p.grad.to_dense() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    compile_mst(model)(*batch).backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad.to_dense(), gradient)


class Crossed(nn.Module):
    """Two regions, each convex, of which each reads what the other makes."""

    def __init__(self) -> None:
        super().__init__()
        self.ups = nn.ModuleList(nn.Linear(8, 128, bias=False) for _ in range(4))
        self.downs = nn.ModuleList(nn.Linear(128, 8, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        first, second = F.gelu(self.ups[0](x)), F.gelu(self.ups[1](x))
        from_second = self.ups[2](self.downs[0](second).tanh())
        from_first = self.ups[3](self.downs[1](first).tanh())
        left = self.downs[2](first * from_second).pow(2)
        return (left + self.downs[3](second * from_first).pow(2)).mean()


@pytest.mark.parametrize("grad", [True, False])
def test_regions_that_wait_for_each_other(grad: bool) -> None:
    """One of them runs as a loop, the other is refused, and says which it collides with."""
    model, batch = Crossed(), (torch.randn(2, 64, 8),)
    call = compile_mst(model)
    if grad:
        assert_same(train(model, call, batch), train(model, model, batch))
    else:
        with torch.no_grad():
            torch.testing.assert_close(call(*batch), model(*batch))
    report = mstc.last_report()
    assert not report.notes
    assert len(report.graphs[0].loops) == 1
    reasons = [r.reason for r in report.graphs[0].refusals]
    assert any("its loop needs what another loop makes" in reason for reason in reasons)


def test_a_detached_output_does_not_require_grad() -> None:
    model, batch = TinyLM(), lm_batch(2, 37)

    def both(ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = model.hidden(ids)
        loss = F.cross_entropy(model.head(hidden).flatten(0, 1), labels.flatten())
        return loss, hidden.flatten(0, -2), hidden.detach()

    ours, eager = compile_mst(both)(*batch), both(*batch)
    assert [t.requires_grad for t in ours] == [t.requires_grad for t in eager]

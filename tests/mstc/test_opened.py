"""Logits made in one graph, the loss in another: both meet again, and nothing of the logits' size
exists."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mstc
from mstc import history
from mstc.errors import DeferredOutputError
from mstc.runtime import gradient
from mstc.runtime.deferred import DeferredTensor
from mstc.runtime.memory import measure_step
from tests.models import (
    EAGER,
    INDUCTOR,
    MLP,
    NON_LEAF,
    assert_no_fallback,
    assert_not_worse,
    assert_same,
    compile_mst,
    fresh_compiler,  # noqa: F401  (an autouse fixture)
    has_loops,
    lm_batch,
    train,
)

pytestmark = NON_LEAF


class Head(nn.Module):
    """A model that returns its logits and leaves the loss to others."""

    def __init__(
        self, vocab: int = 96, hidden: int = 8, *, cap: float = 0, tied: bool = False
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, hidden)
        self.mlp = MLP(hidden, 2 * hidden)
        self.head = nn.Linear(hidden, vocab, bias=not tied)
        if tied:
            self.head.weight = self.embed.weight
        self.cap = cap

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        logits = self.head(x + self.mlp(x))
        return self.cap * torch.tanh(logits / self.cap) if self.cap else logits


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def smoothed(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=0.1
    )


def log_probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    chosen = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])
    return -chosen.squeeze(-1).mul(labels >= 0).sum(-1).tanh().sum()


def z_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits, labels) + 1e-3 * logits.float().logsumexp(-1).square().mean()


def cast_first(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)


LOSSES = [cross_entropy, smoothed, log_probabilities, z_loss]


def together(model: Any, loss: Any, seen: list[Tensor] | None = None) -> Callable[..., Tensor]:
    def call(ids: Tensor, labels: Tensor) -> Tensor:
        logits = model(ids)
        if seen is not None:
            seen.append(logits)
        return loss(logits, labels)

    return call


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kind", [{}, {"cap": 5.0}, {"tied": True}], ids=["plain", "cap", "tied"])
def test_a_loss_compiled_by_itself(loss: Callable[..., Tensor], kind: dict[str, Any]) -> None:
    model, batch = Head(**kind).double(), lm_batch(2, 37, ignored=5)
    eager = train(model, together(model, loss), batch)
    seen: list[Tensor] = []
    call = together(compile_mst(model), compile_mst(loss), seen)
    for _ in range(2):
        assert_same(train(model, call, batch), eager, tolerance=1e-12)
    for logits in seen:
        assert isinstance(logits, DeferredTensor)
        assert not logits.is_materialized
    assert has_loops([mstc.last_report()])
    assert any("computed in the graph" in note for note in mstc.last_report().notes)
    assert_no_fallback(history.reports()[-1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_further_from_float64(dtype: torch.dtype) -> None:
    model, batch = Head(), lm_batch(2, 37, ignored=5)
    exact = copy.deepcopy(model).double()
    truth = train(exact, together(exact, cross_entropy), batch)
    model = model.to(dtype)
    theirs = train(
        model,
        together(torch.compile(model, backend="aot_eager"), cross_entropy),
        batch,
    )
    ours = train(model, together(compile_mst(model), compile_mst(cross_entropy)), batch)
    assert_not_worse(ours, theirs, truth, slack=2.5e-7 if dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize("loss", [cross_entropy, z_loss, cast_first])
def test_under_autocast(loss: Callable[..., Tensor]) -> None:
    """The head runs in bfloat16 as it did, though the loss is outside."""
    model, batch = Head(), lm_batch(2, 37)

    def step(model_: Any, loss_: Any) -> Callable[..., Tensor]:
        def call(ids: Tensor, labels: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                logits = model_(ids)
            assert logits.dtype == torch.bfloat16
            return loss_(logits, labels)

        return call

    eager = train(model, step(model, loss), batch)
    ours = train(model, step(compile_mst(model), compile_mst(loss)), batch)
    assert_same(ours, eager, tolerance=2e-2)


def test_a_graph_break_between_head_and_loss() -> None:
    model, batch = Head().double(), lm_batch(2, 37)

    def call(ids: Tensor, labels: Tensor) -> Tensor:
        logits = model(ids)
        torch._dynamo.graph_break()
        return cross_entropy(logits, labels)

    eager = train(model, call, batch)
    assert_same(train(model, compile_mst(call), batch), eager, tolerance=1e-12)
    assert has_loops([mstc.last_report()])


def test_explain_says_the_same() -> None:
    model, batch = Head(), lm_batch(2, 37)

    def call(ids: Tensor, labels: Tensor) -> Tensor:
        logits = model(ids)
        torch._dynamo.graph_break()
        return cross_entropy(logits, labels)

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
            logits = self.inner(ids)
            torch._dynamo.graph_break()
            return cross_entropy(logits, labels)

    for subject in (call, Whole()):
        start = len(history.reports())
        explained = mstc.explain(subject, *batch, options=EAGER)
        train(model, compile_mst(subject), batch)
        found = history.reports()[start:]
        assert explained.graphs == [g for r in found for g in r.graphs]
        assert len(explained.deferred) == 1
        assert has_loops([explained])


def test_gpt2() -> None:
    """Its logger call breaks the graph between head and loss."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=512,
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    ids = torch.randint(512, (2, 49))
    start = len(history.reports())

    def step(model_: Any, ids: Tensor) -> Tensor:
        return model_(input_ids=ids, labels=ids).loss

    eager = train(model, step, (model, ids))
    call = compile_mst(model)
    for _ in range(2):
        assert_same(train(model, step, (call, ids)), eager, tolerance=1e-4)
    found = history.reports()[start:]
    assert any("computed in the graph" in note for r in found for note in r.notes)
    assert any(
        loop.mode == "gradient-in-forward" for r in found for g in r.graphs for loop in g.loops
    )


def test_weights_and_hidden_states_in_the_loss_too() -> None:
    """What the logits are made from, passed beside them: each gradient arrives once."""
    model, (ids, labels) = Head().double(), lm_batch(2, 37)

    def penalized(logits: Tensor, labels: Tensor, *others: Tensor) -> Tensor:
        return cross_entropy(logits, labels) + sum(t.square().sum() for t in others)

    def step(model_: Any, loss: Any, first: bool) -> Callable[..., Tensor]:
        def call(ids: Tensor, labels: Tensor) -> Tensor:
            logits = model_(ids)
            weights = [model.head.weight, model.head.bias, model.embed.weight]
            return loss(*weights, logits, labels) if first else loss(logits, labels, *weights)

        return call

    def weights_first(a: Tensor, b: Tensor, c: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        return penalized(logits, labels, a, b, c)

    for loss, first in ((penalized, False), (weights_first, True)):
        eager = train(model, step(model, loss, first), (ids, labels))
        for backend in ("mst", "aot_eager"):
            torch._dynamo.reset()
            other = compile_mst(loss) if backend == "mst" else torch.compile(loss, backend=backend)
            ours = train(model, step(compile_mst(model), other, first), (ids, labels))
            assert_same(ours, eager, tolerance=1e-12)
            assert backend != "mst" or has_loops([mstc.last_report()])


def test_a_penalty_on_the_weights_after_a_graph_break() -> None:
    model, batch = Head().double(), lm_batch(2, 37)

    def call(ids: Tensor, labels: Tensor) -> Tensor:
        logits = model(ids)
        torch._dynamo.graph_break()
        return cross_entropy(logits, labels) + sum(p.square().sum() for p in model.parameters())

    eager = train(model, call, batch)
    assert_same(train(model, compile_mst(call), batch), eager, tolerance=1e-12)
    assert has_loops([mstc.last_report()])


def test_two_models_in_one_loss() -> None:
    """Distillation, from a teacher that is detached; and both detached."""
    student, teacher, batch = Head().double(), Head().double(), lm_batch(2, 37)

    def distill(logits: Tensor, target: Tensor, labels: Tensor) -> Tensor:
        log_p = logits.log_softmax(-1)
        return cross_entropy(logits, labels) + F.kl_div(
            log_p, target.log_softmax(-1), reduction="sum", log_target=True
        )

    def step(one: Any, two: Any, loss: Any) -> Callable[..., Tensor]:
        def call(ids: Tensor, labels: Tensor) -> Tensor:
            return loss(one(ids), two(ids).detach(), labels)

        return call

    eager = train(student, step(student, teacher, distill), batch)
    one, two, loss = compile_mst(student), compile_mst(teacher), compile_mst(distill)
    for _ in range(2):
        assert_same(train(student, step(one, two, loss), batch), eager, tolerance=1e-12)
    ids, labels = batch
    torch.testing.assert_close(
        loss(one(ids).detach(), two(ids).detach(), labels),
        distill(student(ids), teacher(ids), labels).detach(),
    )


def test_a_weight_that_is_thawed_in_between() -> None:
    """What was frozen when the logits were made gets no gradient, as in eager."""
    model, (ids, labels) = Head().double(), lm_batch(2, 37)
    compiled, loss = compile_mst(model), compile_mst(cross_entropy)
    gradients: list[dict[str, Tensor | None]] = []
    for model_, loss_ in ((model, cross_entropy), (compiled, loss)):
        model.zero_grad()
        model.head.weight.requires_grad_(False)
        logits = model_(ids)
        model.head.weight.requires_grad_(True)
        loss_(logits, labels).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    assert gradients[1]["head.weight"] is None
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("view", [lambda t: t.flatten(0, 1), lambda t: t.detach()])
def test_a_loss_that_returns_a_view_of_the_logits(view: Callable[[Tensor], Tensor]) -> None:
    """A write to one is seen in the other."""
    model, (ids, labels) = Head().double(), lm_batch(2, 37)

    def both(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return cross_entropy(logits, labels), view(logits)

    seen: list[Tensor] = []
    for model_, loss in ((model, both), (compile_mst(model), compile_mst(both))):
        logits = model_(ids)
        _, viewed = loss(logits, labels)
        with torch.no_grad():
            viewed.mul_(2)
        seen.append(logits.detach() * 1)
    torch.testing.assert_close(seen[1], seen[0])


def test_lengths_that_vary() -> None:
    model = Head().double()
    call = together(compile_mst(model), compile_mst(cross_entropy))
    start = len(history.reports())
    for length in (37, 64, 21, 101):
        batch = lm_batch(2, length)
        eager = train(model, together(model, cross_entropy), batch)
        assert_same(train(model, call, batch), eager, tolerance=1e-12)
    found = history.reports()[start:]
    assert len(found) == 4  # two of each: the first length, all others
    assert_no_fallback(found)


def test_gradients_that_add_up() -> None:
    """Two micro-batches before a step, and a graph that is walked twice."""
    model = Head().double()
    compiled = together(compile_mst(model), compile_mst(cross_entropy))

    def twice(call: Callable[..., Tensor]) -> list[Tensor]:
        model.zero_grad()
        losses = [call(*lm_batch(2, length)) for length in (37, 29)]
        for loss in losses:
            (loss / 2).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = twice(together(model, cross_entropy))
    for got, want in zip(twice(compiled), expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("what", ["hook", "retain", "look", "write", "view"])
def test_what_somebody_is_interested_in_is_made(what: str) -> None:
    """Then the values are passed, and hooks, gradients and writes are as in eager."""
    model, batch = Head().double(), lm_batch(2, 37)

    def step(model_: Any, loss: Any) -> tuple[Any, list[Tensor]]:
        extra: list[Tensor] = []

        def call(ids: Tensor, labels: Tensor) -> Tensor:
            logits = model_(ids)
            if what == "hook":
                logits.register_hook(lambda g: extra.append(g.clone()))
            elif what == "retain":
                logits.retain_grad()
                extra.append(logits)
            elif what == "look":
                extra.append(torch.tensor(logits.tolist()))
            elif what == "write":
                logits.mul_(0.5)
            else:
                logits = logits[:, 1:]
                labels = labels[:, 1:]
            return loss(logits, labels)

        result = train(model, call, batch)
        if what == "retain":
            extra = [t.grad for t in extra]  # type: ignore[misc]
        return result, extra

    eager, expected = step(model, cross_entropy)
    compiled, loss = compile_mst(model), compile_mst(cross_entropy)
    for _ in range(2):
        ours, got = step(compiled, loss)
        assert_same(ours, eager, tolerance=1e-12)
        torch.testing.assert_close(got, expected)
    notes = mstc.last_report().notes
    assert what == "view" or any("has been looked at, written to" in n for n in notes)


@pytest.mark.parametrize("what", ["register_hook", "retain_grad"])
def test_interest_that_comes_too_late(what: str) -> None:
    """The gradient does not come by any more: an error instead of a hook that never runs."""
    model, (ids, labels) = Head(), lm_batch(2, 37)
    logits = compile_mst(model)(ids)
    loss = compile_mst(cross_entropy)(logits, labels)
    with pytest.raises(DeferredOutputError, match=f"Call {what} before that function"):
        logits.register_hook(print) if what == "register_hook" else logits.retain_grad()
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        torch.autograd.grad(loss, logits)


def test_without_gradients() -> None:
    model, (ids, labels) = Head().double(), lm_batch(2, 37)
    logits = compile_mst(model)(ids)
    loss = compile_mst(cross_entropy)
    for given in (logits.detach(), logits):
        with torch.no_grad():
            torch.testing.assert_close(loss(given, labels), cross_entropy(model(ids), labels))
    detached = loss(logits.detach(), labels)
    assert not detached.requires_grad
    assert not logits.is_materialized
    with torch.no_grad():
        assert not isinstance(compile_mst(model)(ids), DeferredTensor)


def test_a_weight_that_changed_in_between() -> None:
    model, (ids, labels) = Head(), lm_batch(2, 37)
    compiled, loss = compile_mst(model), compile_mst(cross_entropy)
    loss(compiled(ids), labels).backward()
    logits = compiled(ids)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with pytest.raises(RuntimeError, match=r"DeferredOutputError: .*has been changed in place"):
        loss(logits, labels)


def write(logits: Tensor, labels: Tensor) -> Tensor:
    logits.mul_(0.5)
    logits[0, 0] = 1.0
    return cross_entropy(logits, labels)


def write_a_view(logits: Tensor, labels: Tensor) -> Tensor:
    logits[:, 0].mul_(0.5)
    return cross_entropy(logits, labels)


@pytest.mark.parametrize("loss", [write, write_a_view])
def test_a_loss_that_writes_to_the_logits(loss: Callable[..., Tensor]) -> None:
    """The caller sees what was written. Another backend's graph cannot: that is a clear error."""
    model, (ids, labels) = Head().double(), lm_batch(2, 37)
    expected: list[Tensor] = []
    eager = train(model, together(model, loss, expected), (ids, labels))
    seen: list[Tensor] = []
    call = together(compile_mst(model), compile_mst(loss), seen)
    assert_same(train(model, call, (ids, labels)), eager, tolerance=1e-12)
    torch.testing.assert_close(seen[0] * 1, expected[0])
    assert any("the graph writes to it" in note for note in mstc.last_report().notes)
    other = torch.compile(loss, backend="aot_eager")
    with pytest.raises(Exception, match=r"changes it in place. Pass it a copy"):
        other(compile_mst(model)(ids), labels)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "aot_eager_decomp_partition"])
def test_a_loss_compiled_by_another_backend(backend: str) -> None:
    model, batch = Head().double(), lm_batch(2, 37)
    eager = train(model, together(model, z_loss), batch)
    call = together(compile_mst(model), torch.compile(z_loss, backend=backend))
    for _ in range(2):
        assert_same(train(model, call, batch), eager, tolerance=1e-12)


def test_the_loss_in_eager_code() -> None:
    """Made when the loss reads it; its gradient needs the frontier alone, whatever the length."""
    model = Head(cap=5.0).double()
    call = together(compile_mst(model), z_loss)
    for length in (*range(20, 40), 37):
        batch = lm_batch(2, length)
        eager = train(model, together(model, z_loss), batch)
        assert_same(train(model, call, batch), eager, tolerance=1e-12)


def test_gradients_that_cannot_be_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """The closure runs again: the same gradients."""

    def fail(*args: Any) -> None:
        raise NotImplementedError("no trace today")

    monkeypatch.setattr(gradient, "make_fx", fail)
    model, batch = Head().double(), lm_batch(2, 37)
    eager = train(model, together(model, z_loss), batch)
    assert_same(train(model, together(compile_mst(model), z_loss), batch), eager, tolerance=1e-12)


@pytest.mark.parametrize("frozen", ["head.weight", "embed.weight"])
def test_frozen_parts(frozen: str) -> None:
    model, batch = Head().double(), lm_batch(2, 37)
    model.get_parameter(frozen).requires_grad_(False)
    eager = train(model, together(model, cross_entropy), batch)
    for loss in (cross_entropy, compile_mst(cross_entropy)):
        ours = train(model, together(compile_mst(model), loss), batch)
        assert_same(ours, eager, tolerance=1e-12)


def test_memory_is_that_of_a_chunk() -> None:
    """The head and its loss, in two functions: less than a quarter of the logits."""
    model, batch = Head(vocab=4096, hidden=16), lm_batch(2, 256, vocab=4096)
    logits_bytes = 2 * 256 * 4096 * 4
    call = together(compile_mst(model, chunk_rows=32), compile_mst(cross_entropy, chunk_rows=32))

    def step() -> None:
        call(*batch).backward()

    for _ in range(2):
        model.zero_grad()
        step()
    model.zero_grad()
    peak = measure_step(step, model.parameters(), "cpu").peak_intermediate_nbytes
    assert peak < logits_bytes // 4


def test_with_inductor() -> None:
    model, batch = Head(), lm_batch(2, 64, ignored=9)
    eager = train(model, together(model, cross_entropy), batch)
    compiled = torch.compile(model, backend="mst", options=INDUCTOR)
    loss = torch.compile(cross_entropy, backend="mst", options=INDUCTOR)
    assert_same(train(model, together(compiled, loss), batch), eager)
    assert has_loops([mstc.last_report()])


def test_it_can_be_switched_off() -> None:
    model, (ids, _) = Head(), lm_batch(2, 37)
    assert type(compile_mst(model, defer_outputs=False)(ids)) is Tensor
    assert EAGER.get("defer_outputs", True)

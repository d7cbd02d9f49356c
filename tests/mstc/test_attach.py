"""Outputs beside the loss: no gradient is made for them, and the right one when somebody asks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mstc
from tests.models import (
    EAGER,
    INDUCTOR,
    NON_LEAF,
    fresh_compiler,  # noqa: F401  (an autouse fixture)
)

pytestmark = NON_LEAF
ROWS, HIDDEN = 64, 16


class Attention(nn.Module):
    """Two layers that return their keys and values, a linear head, a loss."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.projections = nn.ModuleList(nn.Linear(HIDDEN, 3 * HIDDEN) for _ in range(2))
        self.head = nn.Linear(HIDDEN, 4)
        self.dropout = dropout

    def forward(self, x: Tensor, target: Tensor) -> tuple[Tensor, list[Tensor]]:
        cache: list[Tensor] = []
        for projection in self.projections:
            q, k, v = projection(F.layer_norm(x, (HIDDEN,))).chunk(3, -1)
            k, v = k.contiguous(), v.contiguous()
            cache += [k, v]
            x = x + F.dropout(F.scaled_dot_product_attention(q, k, v), self.dropout)
        return F.cross_entropy(self.head(x).flatten(0, -2), target.flatten()), cache


def batch(rows: int = ROWS) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(2, rows, HIDDEN), torch.randint(4, (2, rows))


def compiled(model: nn.Module, **options: Any) -> Callable[..., Any]:
    return torch.compile(model, backend="mst", options=EAGER | options)


def both(model: nn.Module) -> nn.Module:
    """The same model in float64."""
    twin = Attention().double()
    twin.load_state_dict(model.state_dict())
    return twin


def assert_equal_gradients(model: nn.Module, twin: nn.Module) -> None:
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert p.grad is not None  # zeros where nothing leads to it, as from any compiled graph
        expected = torch.zeros_like(q) if q.grad is None else q.grad
        assert (p.grad - expected).norm() <= 1e-5 * expected.norm(), name


LOSSES: dict[str, Callable[[Tensor, list[Tensor]], Tensor]] = {
    "loss alone": lambda loss, cache: loss,
    "one of them alone": lambda loss, cache: cache[3].sin().mean(),
    "both": lambda loss, cache: loss + cache[0].square().mean() - cache[3].sin().mean(),
    "the loss twice": lambda loss, cache: loss * (1 + loss) + cache[1].exp().mean(),
}


@pytest.mark.parametrize("of", LOSSES)
def test_gradients(of: str) -> None:
    """In three steps: the first finds out, the others know."""
    torch.manual_seed(0)
    model = Attention()
    twin = both(model)
    call = compiled(model)
    for _ in range(3):
        x, target = batch()
        LOSSES[of](*call(x, target)).backward()
        LOSSES[of](*twin(x.double(), target)).backward()
        assert_equal_gradients(model, twin)  # accumulated, as well
    again = [r for r in mstc.history.reports() if "compiled again" in str(r.notes)]
    assert len(again) == (of != "loss alone")


@pytest.mark.parametrize("options", [EAGER, INDUCTOR], ids=["eager", "inductor"])
def test_under_inductor(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Attention()
    twin = both(model)
    x, target = batch()
    loss, cache = torch.compile(model, backend="mst", options=options)(x, target)
    assert "4 outputs" in str(mstc.last_report().notes)
    (loss + cache[2].square().sum()).backward()
    expected, own = twin(x.double(), target)
    (expected + own[2].square().sum()).backward()
    assert_equal_gradients(model, twin)


def test_after_the_loss() -> None:
    """The values that the loss's backward needed are gone by then."""
    torch.manual_seed(0)
    model = Attention()
    twin = both(model)
    x, target = batch()
    loss, cache = compiled(model)(x, target)
    loss.backward()
    cache[1].square().sum().backward()
    cache[1].square().sum().backward()
    expected, own = twin(x.double(), target)
    (expected + 2 * own[1].square().sum()).backward()
    assert_equal_gradients(model, twin)


def test_several_calls_before_a_backward() -> None:
    torch.manual_seed(0)
    model = Attention()
    twin = both(model)
    call = compiled(model)
    batches = [(x * i, target) for i in (1, 2, 3) for x, target in [batch()]]
    total = sum(loss + cache[0].sin().sum() for loss, cache in [call(*b) for b in batches])
    total.backward()
    for x, target in batches:
        loss, cache = twin(x.double(), target)
        (loss + cache[0].sin().sum()).backward()
    assert_equal_gradients(model, twin)


def test_inputs_with_gradients() -> None:
    """Of activations that come from elsewhere, and of leaves."""
    torch.manual_seed(0)
    model = Attention()
    twin = both(model)
    x, target = batch()
    leaf = x.clone().requires_grad_()
    loss, cache = compiled(model)(leaf.sin(), target)
    (loss + cache[3].square().mean()).backward()
    own_leaf = x.double().requires_grad_()
    loss, cache = twin(own_leaf.sin(), target)
    (loss + cache[3].square().mean()).backward()
    assert leaf.grad is not None
    assert own_leaf.grad is not None
    torch.testing.assert_close(leaf.grad.double(), own_leaf.grad, rtol=1e-5, atol=1e-7)
    assert_equal_gradients(model, twin)


def test_lengths_left_open() -> None:
    torch.manual_seed(0)
    model = Attention()
    twin = both(model)
    call = torch.compile(model, backend="mst", options=EAGER, dynamic=True)
    for rows in (64, 40, 64, 52):
        x, target = batch(rows)
        loss, cache = call(x, target)
        (loss + cache[0].square().mean()).backward()
        loss, cache = twin(x.double(), target)
        (loss + cache[0].square().mean()).backward()
        assert_equal_gradients(model, twin)


def test_autocast() -> None:
    torch.manual_seed(0)
    model, plain = Attention(), Attention()
    plain.load_state_dict(model.state_dict())
    x, target = batch()

    def train(call: Callable[..., Any]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            loss, cache = call(x, target)
        assert cache[2].dtype == torch.bfloat16
        cache[2].float().square().sum().backward()
        return loss

    train(compiled(model))
    train(plain)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert p.grad is not None
        expected = torch.zeros_like(q) if q.grad is None else q.grad
        assert (p.grad - expected).norm() <= 0.02 * expected.norm()


def test_they_look_as_without() -> None:
    model = Attention()
    x, target = batch()
    _, cache = compiled(model)(x, target)
    _, own = model(x, target)
    seen: list[Tensor] = []
    for ours, theirs in zip(cache, own, strict=True):
        assert type(ours) is Tensor
        assert (ours.requires_grad, ours.is_leaf) == (True, False)
        assert (ours.shape, ours.stride()) == (theirs.shape, theirs.stride())
        torch.testing.assert_close(ours, theirs)
    cache[1].register_hook(seen.append)
    cache[1].retain_grad()
    cache[1].sum().backward()
    assert torch.equal(seen[0], torch.ones_like(cache[1]))
    assert cache[1].grad is not None


def test_without_gradients() -> None:
    model = Attention().eval()
    x, target = batch()
    call = compiled(model)
    for _ in range(2):
        with torch.no_grad():
            _, cache = call(x, target)
        assert not any(t.requires_grad for t in cache)
        _, cache = call(x, target)
        assert all(t.requires_grad for t in cache)


def test_an_engine_that_passes_by() -> None:
    """DDP's sink hands None to every output that has no gradient."""

    class Sink(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *tensors: Tensor) -> Any:
            ctx.set_materialize_grads(False)
            return tuple(t.view_as(t) for t in tensors)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return grads

    torch.manual_seed(0)
    model = Attention()
    loss, cache = compiled(model)(*batch())
    reports = len(mstc.history.reports())
    Sink.apply(loss, *cache)[0].backward()  # type: ignore[no-untyped-call]
    assert len(mstc.history.reports()) == reports  # nothing was compiled again
    assert all(p.grad is not None for p in model.parameters())


def test_changed_in_between() -> None:
    model = Attention()
    x, target = batch()
    call = compiled(model)
    loss, cache = call(x, target)
    x.mul_(2)
    with pytest.raises(mstc.DeferredOutputError, match="has been changed in place"):
        cache[0].sum().backward()
    loss.backward()  # which needs what it saved, and has it


@pytest.mark.parametrize("kind", ["foreach", "fused"])
def test_stepped_in_between(kind: str) -> None:
    """A fused step leaves the version of a parameter as it was."""
    model = Attention()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, **{kind: True})
    loss, cache = compiled(model)(*batch())
    loss.backward()
    optimizer.step()
    with pytest.raises(mstc.DeferredOutputError, match=r"optimizer\.step"):
        cache[0].sum().backward()


def test_another_model_is_stepped_in_between() -> None:
    model, other = Attention(), nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(other.parameters(), fused=True)
    other(torch.ones(1, 2)).sum().backward()
    _, cache = compiled(model)(*batch())
    optimizer.step()
    cache[0].sum().backward()
    assert model.projections[0].weight.grad is not None


def test_dropout_keeps_them() -> None:
    """What was dropped cannot be known a second time."""
    model = Attention(dropout=0.5)
    _, cache = compiled(model)(*batch())
    assert "gradient of output" in str(mstc.last_report().refusals)
    cache[0].sum().backward()
    assert model.projections[0].weight.grad is not None


def test_random_numbers_that_were_not_foreseen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("passes.detach._may_be_random", lambda node: False)
    model = Attention(dropout=0.5)
    _, cache = compiled(model)(*batch())
    with pytest.raises(mstc.DeferredOutputError, match="random numbers"):
        cache[2].sum().backward()


def test_the_option() -> None:
    compiled(Attention(), defer_outputs=False)(*batch())
    assert not mstc.last_report().notes


def test_deferred_logits_keep_their_hidden_states() -> None:
    """A loss in eager code needs no second run of the model."""

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = Attention(), nn.Linear(HIDDEN, 512)

        def forward(self, x: Tensor, target: Tensor) -> Any:
            loss, cache = self.body(x, target)
            hidden = cache[-1] + x
            logits = self.head(hidden)
            return loss + F.cross_entropy(logits.flatten(0, 1), target.flatten()), logits, cache

    model = Head()
    loss, logits, _ = compiled(model)(*batch())
    assert type(logits) is not Tensor
    count = len(mstc.history.reports())
    (loss + logits.log_softmax(-1)[..., 0].mean()).backward()
    assert not any("compiled again" in str(r.notes) for r in mstc.history.reports()[count:])
    assert model.head.weight.grad is not None


@pytest.mark.parametrize("options", [EAGER, INDUCTOR], ids=["eager", "inductor"])
def test_memory(options: dict[str, Any]) -> None:
    """A backward takes as much as that of a model that does not return them, and the outputs."""

    class Silent(Attention):
        def forward(self, x: Tensor, target: Tensor) -> Any:
            return super().forward(x, target)[0], []

    x, target = batch(512)

    def peak(model: nn.Module) -> int:
        call = torch.compile(model, backend="mst", options=options)

        def step() -> None:
            loss, cache = call(x, target)
            loss.backward()
            del cache

        step()
        step()
        return mstc.measure_peak(step, parameters=model.parameters()).peak_intermediate_nbytes

    nbytes = 4 * 2 * 512 * HIDDEN * 4  # of all keys and values, or their gradients
    assert peak(Attention()) < peak(Silent()) + nbytes


def test_twice_differentiated() -> None:
    """As any compiled graph: refused, and not taken for a constant."""
    model = Attention()
    _, cache = compiled(model)(*batch())
    weight = model.projections[0].weight
    (grad,) = torch.autograd.grad(cache[0].sin().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward|backward twice|does not require grad"):
        grad.sum().backward()

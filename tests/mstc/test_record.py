"""A loss in eager code: what it does to deferred logits is recorded and runs in chunks."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mstc
from mstc import history
from mstc.errors import DeferredOutputError, FallbackWarning
from mstc.runtime import evaluation
from mstc.runtime.deferred import DeferredTensor
from mstc.runtime.memory import measure_step
from tests.models import (
    INDUCTOR,
    MLP,
    NON_LEAF,
    assert_not_worse,
    assert_same,
    compile_mst,
    fresh_compiler,  # noqa: F401  (an autouse fixture)
    has_loops,
    lm_batch,
    train,
)

pytestmark = NON_LEAF

VOCAB = 96


class Head(nn.Module):
    """A model that returns its logits and leaves the loss to eager code."""

    def __init__(self, vocab: int = VOCAB, hidden: int = 8, *, cap: float = 0) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, hidden)
        self.mlp = MLP(hidden, 2 * hidden)
        self.head = nn.Linear(hidden, vocab)
        self.cap = cap

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        logits = self.head(x + self.mlp(x))
        return self.cap * torch.tanh(logits / self.cap) if self.cap else logits


def shifted(logits: Tensor, labels: Tensor) -> Tensor:
    """As Hugging Face's own loss."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = logits[..., :-1, :].contiguous().view(-1, logits.shape[-1])
    return F.cross_entropy(logits, labels[..., 1:].flatten())


def padded(logits: Tensor, labels: Tensor) -> Tensor:
    labels = F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
    return F.cross_entropy(logits.view(-1, logits.shape[-1]), labels.view(-1), reduction="sum") / 7


def weighted(logits: Tensor, labels: Tensor) -> Tensor:
    weight = torch.linspace(0.5, 2.0, logits.shape[-1], dtype=logits.dtype)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), weight=weight)


def smoothing(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)


def weighted_smoothing(logits: Tensor, labels: Tensor) -> Tensor:
    weight = torch.linspace(0.5, 2.0, logits.shape[-1], dtype=logits.dtype)
    return F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), weight=weight, label_smoothing=0.1
    )


def transposed(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.transpose(1, 2), labels)


def probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    target = torch.linspace(0, 1, logits.shape[-1], dtype=logits.dtype).expand(
        labels.numel(), -1
    ) / (1 + labels.clamp(min=0).flatten()[:, None])
    return F.cross_entropy(logits.flatten(0, 1), target.contiguous())


def trainer_smoothing(logits: Tensor, labels: Tensor) -> Tensor:
    """`LabelSmoother` of transformers."""
    log_probs = -F.log_softmax(logits[..., :-1, :].contiguous(), dim=-1)
    labels = labels[..., 1:].unsqueeze(-1)
    mask = labels.eq(-100)
    labels = torch.clamp(labels, min=0)
    nll = log_probs.gather(dim=-1, index=labels)
    smoothed = log_probs.sum(dim=-1, keepdim=True)
    nll.masked_fill_(mask, 0.0)
    smoothed.masked_fill_(mask, 0.0)
    active = mask.numel() - mask.long().sum()
    return 0.9 * nll.sum() / active + 0.1 * smoothed.sum() / (active * log_probs.shape[-1])


def chosen(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """`selective_log_softmax` of trl: logarithms of the labels' probabilities."""
    logits = logits / temperature
    index = labels.clamp(min=0)
    picked = logits.gather(-1, index.unsqueeze(-1)).squeeze(-1)
    return (picked - torch.logsumexp(logits, dim=-1)) * (labels >= 0)


def preference(logits: Tensor, labels: Tensor) -> Tensor:
    """DPO: the first half of the batch is better than the second."""
    sums = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    sums = (sums * (labels >= 0)).sum(-1)
    better, worse = sums.chunk(2)
    return -F.logsigmoid(0.1 * (better - worse)).mean()


def clipped(logits: Tensor, labels: Tensor) -> Tensor:
    """GRPO: ratios to the old probabilities, clipped."""
    logps = chosen(logits, labels, 0.7)
    ratio = torch.exp(logps - logps.detach())
    advantage = torch.linspace(-1, 1, len(labels), dtype=logits.dtype)[:, None]
    loss = -torch.min(ratio * advantage, torch.clamp(ratio, 0.8, 1.2) * advantage)
    mask = labels >= 0
    return ((loss * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean()


def in_place(logits: Tensor, labels: Tensor) -> Tensor:
    """GRPO's temperature, divided by in place, for the completions alone."""
    logits = logits[:, :-1, :]
    logits = logits[:, -24:, :]
    logits.div_(0.9)
    index = labels[:, -24:].clamp(min=0)
    picked = logits.gather(-1, index.unsqueeze(-1)).squeeze(-1)
    with torch.no_grad():
        spread = (torch.logsumexp(logits, -1) - (logits.softmax(-1) * logits).sum(-1)).mean()
    return -(picked - torch.logsumexp(logits, -1)).mean() / spread


def entropy(logits: Tensor, labels: Tensor) -> Tensor:
    logps = F.log_softmax(logits, dim=-1)
    return -(torch.exp(logps) * logps).sum(-1).mean()


def entropy_of_softmax(logits: Tensor, labels: Tensor) -> Tensor:
    """`entropy_from_logits` of trl."""
    probabilities = F.softmax(logits, dim=-1)
    return (torch.logsumexp(logits, dim=-1) - (probabilities * logits).sum(-1)).mean()


def z_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return padded(logits, labels) + 1e-3 * logits.logsumexp(-1).square().mean()


def capped(logits: Tensor, labels: Tensor) -> Tensor:
    return smoothing(torch.tanh(logits / 3.0) * 3.0, labels)


def masked_mean(logits: Tensor, labels: Tensor) -> Tensor:
    losses = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100
    )
    mask = (labels.flatten() >= 0).to(losses.dtype)
    return (losses * mask).sum() / mask.sum()


def distilled(logits: Tensor, labels: Tensor) -> Tensor:
    """KL to a shifted copy of itself, that gets no gradient."""
    target = F.log_softmax(logits.detach().roll(1, -1), -1)
    return F.kl_div(F.log_softmax(logits / 2, -1), target, log_target=True, reduction="batchmean")


def read_first(logits: Tensor, labels: Tensor) -> Tensor:
    """A loss that is looked at before its gradients are asked for."""
    loss = smoothing(logits, labels)
    assert loss.item() > 0
    return loss


def scaled(logits: Tensor, labels: Tensor) -> Tensor:
    """As a gradient scaler and gradient accumulation do."""
    loss = smoothing(logits, labels) * torch.tensor(1024.0, dtype=logits.dtype)
    return loss / 1024 / 4


LOSSES: list[Callable[[Tensor, Tensor], Tensor]] = [
    *(shifted, padded, weighted, smoothing, weighted_smoothing, transposed, probabilities),
    *(
        trainer_smoothing,
        preference,
        clipped,
        in_place,
        entropy,
        entropy_of_softmax,
        z_loss,
        capped,
    ),
    *(masked_mean, read_first, scaled),
]


def together(model: Any, loss: Any, seen: list[Tensor] | None = None) -> Callable[..., Tensor]:
    def call(ids: Tensor, labels: Tensor) -> Tensor:
        logits = model(ids)
        if seen is not None:
            seen.append(logits)
        return loss(logits, labels)

    return call


@pytest.mark.parametrize("cap", [0.0, 5.0], ids=["plain", "cap"])
@pytest.mark.parametrize("loss", LOSSES)
def test_loss_and_gradients(loss: Callable[..., Tensor], cap: float) -> None:
    model, batch = Head(cap=cap).double(), lm_batch(2, 37, ignored=5)
    eager = train(model, together(model, loss), batch)
    seen: list[Tensor] = []
    call = together(compile_mst(model), loss, seen)
    for _ in range(2):
        assert_same(train(model, call, batch), eager, tolerance=1e-12)
    for logits in seen:
        assert isinstance(logits, DeferredTensor)
        assert not logits.is_materialized
    assert all(type(p.grad) is Tensor for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", [shifted, trainer_smoothing, preference, clipped, z_loss])
def test_no_further_from_float64(loss: Callable[..., Tensor], dtype: torch.dtype) -> None:
    model, batch = Head(), lm_batch(2, 37, ignored=5)
    exact = copy.deepcopy(model).double()
    truth = train(exact, together(exact, loss), batch)
    model = model.to(dtype)
    theirs = train(model, together(torch.compile(model, backend="aot_eager"), loss), batch)
    ours = train(model, together(compile_mst(model), loss), batch)
    assert_not_worse(ours, theirs, truth, slack=2.5e-7 if dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize("loss", LOSSES)
def test_memory_is_that_of_a_chunk(loss: Callable[..., Tensor]) -> None:
    model, batch = Head(vocab=4096, hidden=16), lm_batch(2, 256, vocab=4096)
    logits_bytes = 2 * 256 * 4096 * 4
    call = together(compile_mst(model, chunk_rows=16), loss)

    def step() -> None:
        call(*batch).backward()

    for _ in range(2):
        model.zero_grad()
        step()
    model.zero_grad()
    peak = measure_step(step, model.parameters(), "cpu").peak_intermediate_nbytes
    inputs = logits_bytes if loss is probabilities else 0  # that the loss itself makes
    assert peak < logits_bytes // 4 + 2 * inputs


# --- what else may happen -------------------------------------------------------------------------


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def both(
    use: Callable[[nn.Module, Tensor, Tensor], object], **options: Any
) -> tuple[Any, Any, nn.Module]:
    """What `use` (of model, ids, labels) gives with the model as it is and compiled, and gradients
    of the model, compared."""
    model, batch = Head().double(), lm_batch(2, 37, ignored=5)
    twin = copy.deepcopy(model)
    compiled: Any = compile_mst(twin, **options)
    expected, got = use(model, *batch), use(compiled, *batch)
    for theirs, ours in zip(gradients(model), gradients(twin), strict=True):
        assert type(ours) is Tensor
        torch.testing.assert_close(ours, theirs)
    assert len(gradients(model)) == len(gradients(twin))
    torch.testing.assert_close(got, expected)
    return expected, got, twin


def test_results_stay_after_the_weights_have_changed() -> None:
    """Old log-probabilities, say, that are used after several steps."""

    def use(model: Any, ids: Tensor, labels: Tensor) -> list[float]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with torch.no_grad():
            old = chosen(model(ids), labels)
        kept = []
        for _ in range(3):
            optimizer.zero_grad()
            logits = model(ids)
            loss = -(chosen(logits, labels) - old).exp().mean()
            kept += [loss.detach(), logits.logsumexp(-1).mean()]
            loss.backward()
            optimizer.step()
        return [v.item() for v in (old.sum(), *kept)]

    both(use)


def test_a_gradient_of_an_ordinary_loss_is_recorded_too() -> None:
    """Memory of a result that goes through ordinary tensors: a value that was read, another
    parameter, an operation that cannot wait."""
    scale = nn.Parameter(torch.tensor(2.0))

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        found = chosen(logits, labels)
        picked = logits[:, :, 0].sum(-1)
        assert found.tolist()
        return (found * scale).sort().values.mean() + picked.mean() * 0.1

    model, batch = Head(vocab=4096, hidden=16), lm_batch(2, 256, vocab=4096)
    eager = train(model, together(model, loss), batch)
    call = together(compile_mst(model, chunk_rows=16), loss)
    for _ in range(2):
        scale.grad = None
        assert_same(train(model, call, batch), eager)
        assert type(scale.grad) is Tensor
    model.zero_grad()
    trace = measure_step(lambda: call(*batch).backward(), model.parameters(), "cpu")
    assert trace.peak_intermediate_nbytes < 2 * 256 * 4096 * 4 // 4


def test_a_reference_model() -> None:
    """KL between two models' outputs, one without gradients; and between two with."""
    torch.manual_seed(0)
    other = Head().double()
    for grad in (False, True):

        def use(model: Any, ids: Tensor, labels: Tensor, grad: bool = grad) -> Tensor:
            ours = F.log_softmax(model(ids) / 2.0, -1)
            reference = other if isinstance(model, Head) else compile_mst(other)
            with torch.set_grad_enabled(grad):
                theirs = F.log_softmax(reference(ids) / 2.0, -1)
            loss = F.kl_div(ours, theirs, log_target=True, reduction="batchmean")
            other.zero_grad()
            loss.backward()
            found = [p.grad.sum() for p in other.parameters() if p.grad is not None]
            assert bool(found) == grad
            return loss.detach() + sum(found)

        both(use)


def test_memory_with_a_reference_model() -> None:
    """The reference's output is deferred as well, though it has no gradients."""
    reference = Head(vocab=4096, hidden=16)

    def loss_with(frozen: Any) -> Callable[[Any], Callable[..., Tensor]]:
        def step(model: Any) -> Callable[..., Tensor]:
            def call(ids: Tensor, labels: Tensor) -> Tensor:
                with torch.no_grad():
                    old = F.log_softmax(frozen(ids), -1)
                return F.kl_div(
                    F.log_softmax(model(ids), -1), old, log_target=True, reduction="batchmean"
                )

            return call

        return step

    model, batch = Head(vocab=4096, hidden=16), lm_batch(2, 256, vocab=4096)
    eager = train(model, loss_with(reference)(model), batch)
    call = loss_with(compile_mst(reference, chunk_rows=16))(compile_mst(model, chunk_rows=16))
    for _ in range(2):
        assert_same(train(model, call, batch), eager)
    model.zero_grad()
    trace = measure_step(lambda: call(*batch).backward(), model.parameters(), "cpu")
    assert trace.peak_intermediate_nbytes < 2 * 256 * 4096 * 4 // 2


def test_several_losses_in_any_order() -> None:
    def use(model: Any, ids: Tensor, labels: Tensor) -> list[Tensor]:
        logits = model(ids)
        first, second = smoothing(logits, labels), z_loss(logits, labels)
        second.backward(retain_graph=True)
        first.backward(retain_graph=True)
        (first * second).backward()
        return [first.detach(), second.detach()]

    both(use)


def test_gradients_that_add_up() -> None:
    def use(model: Any, ids: Tensor, labels: Tensor) -> None:
        for _ in range(2):
            (shifted(model(ids), labels) / 2).backward()

    both(use)


def test_gradients_asked_for_by_name() -> None:
    def use(model: Any, ids: Tensor, labels: Tensor) -> list[Tensor]:
        logits = model(ids)
        loss = smoothing(logits, labels)
        (inner,) = torch.autograd.grad(loss, logits, retain_graph=True)
        weights = list(model.parameters())
        return [inner.sum(-1), inner[0], *torch.autograd.grad(loss, weights)]

    both(use)


def test_gradient_of_a_gradient() -> None:
    def use(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
        logits = model(ids)
        loss = smoothing(logits, labels)
        (inner,) = torch.autograd.grad(loss, logits, create_graph=True)
        penalty = loss + inner.square().sum()
        penalty.backward()
        return penalty.detach()

    both(use)


def test_hooks_see_gradients() -> None:
    seen: list[Tensor] = []

    def use(model: Any, ids: Tensor, labels: Tensor) -> list[Tensor]:
        logits = model(ids)
        logits.retain_grad()
        seen.clear()
        logits.register_hook(lambda g: (seen.append(g), g * 2)[1])
        smoothing(logits, labels).backward()
        assert type(logits.grad) is Tensor
        return [logits.grad, *seen]

    both(use)


def test_what_a_label_was_when_it_was_read() -> None:
    """The caller may write to what he gave to an operation."""

    def use(model: Any, ids: Tensor, labels: Tensor) -> list[Tensor]:
        labels = labels.clamp(min=0)
        weight = torch.ones(labels.shape, dtype=torch.float64)
        found = model(ids).log_softmax(-1).gather(-1, labels[..., None])[..., 0] * weight
        labels.zero_()
        weight.mul_(5)
        again = model(ids).log_softmax(-1).gather(-1, labels[..., None])[..., 0] * weight
        (found.sum() - again.sum()).backward()
        return [found.detach(), again.detach()]

    with pytest.raises(RuntimeError, match="inplace operation"):
        both(use)  # autograd's own: the index is saved for the backward

    def without(model: Any, ids: Tensor, labels: Tensor) -> list[Tensor]:
        with torch.no_grad():
            labels = labels.clamp(min=0)
            found = model(ids).log_softmax(-1).gather(-1, labels[..., None])[..., 0]
            labels.zero_()
            return [found, model(ids).log_softmax(-1).gather(-1, labels[..., None])]

    both(without)


def test_a_weight_that_has_changed() -> None:
    model, batch = Head(), lm_batch(2, 37)
    loss = smoothing(compile_mst(model)(batch[0]), batch[1])
    with torch.no_grad():
        model.head.weight.mul_(2)
    with pytest.raises(DeferredOutputError, match=r"head\.weight, has been changed in place"):
        loss.item()
    with pytest.raises(RuntimeError, match="inplace operation"):
        loss.backward()


def test_a_large_tensor_that_has_changed() -> None:
    model, batch = Head(), lm_batch(2, 37)
    target = torch.rand(2 * 37, VOCAB)
    loss = F.cross_entropy(compile_mst(model)(batch[0]).flatten(0, 1), target)
    target.zero_()
    with pytest.raises(DeferredOutputError, match="a tensor that the loss reads"):
        loss.item()


IN_PLACE: dict[str, Callable[[Any, Tensor], Any]] = {
    "div_": lambda t, m: t.div_(0.7),
    "a shift, then div_": lambda t, m: t[:, :-1].div_(0.7),
    "slices, then div_": lambda t, m: t[:, :-1][:, -20:, :].div_(0.7),
    "masked_fill_": lambda t, m: t.masked_fill_(m[..., None], -1.0),
    "a column": lambda t, m: t[..., 3].fill_(-2.0),
    "setitem": lambda t, m: (t.__setitem__((..., 3), -2.0), t)[1],
    "a mask": lambda t, m: (t.__setitem__(m, 0.5), t)[1],
    "a flat view": lambda t, m: t.view(-1, VOCAB).mul_(2).view(t.shape),
    "transposed": lambda t, m: t.transpose(0, 1).mul_(2),
    "a row": lambda t, m: t[1].mul_(2),
    "noise": lambda t, m: t.add_(torch.ones(VOCAB, dtype=t.dtype)),
    "with another": lambda t, m: t.sub_(t.detach().amax(-1, keepdim=True)),
}


@pytest.mark.parametrize("base", [False, True], ids=["what is written to", "what is behind it"])
@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place(name: str, base: bool) -> None:
    def use(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
        logits = model(ids)
        logits = logits * 1.0 if name == "a mask" else logits.clone()
        before = logits.detach()
        found = IN_PLACE[name](logits, labels < 0)
        loss = (logits if base else found).logsumexp(-1).square().sum()
        loss.backward()
        return loss.detach() + before.sum()

    both(use)


def test_an_operation_that_cannot_wait() -> None:
    uses: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda t, labels: t[labels >= 0].sum(-1),
        lambda t, labels: torch.sort(t, -1).values[..., :3].exp(),
        lambda t, labels: torch.linalg.svdvals(t),
        lambda t, labels: torch.cat([t.flatten(), t.flatten()[:3]]).cos(),
        lambda t, labels: t.unfold(-1, 4, 4).sum(-1),
    ]
    for own in uses:

        def use(model: Any, ids: Tensor, labels: Tensor, own: Any = own) -> Tensor:
            logits = model(ids)
            loss = own(logits * 2, labels).mean() + smoothing(logits, labels)
            loss.backward()
            return loss.detach()

        both(use)


def test_other_operations() -> None:
    uses: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda t, labels: t.topk(3).values.mean(),
        lambda t, labels: t.max(-1).values.mean() + t.amin((1, 2)).sum(),
        lambda t, labels: (t.argmax(-1) == labels).double().mean() + t.mean(),
        lambda t, labels: t.split(10, 1)[1].softmax(-1).square().mean(),
        lambda t, labels: torch.stack([u.sum() for u in t.unbind(0)]).prod(),
        lambda t, labels: t.std() + t.var(-1).mean() + t.norm(),
        lambda t, labels: t[:, torch.tensor([0, 2])].exp().mean(),
        lambda t, labels: t[..., torch.tensor([0, 2])].exp().mean(),
        lambda t, labels: F.mse_loss(t.softmax(-1), torch.full_like(t, 1 / VOCAB)),
        lambda t, labels: F.smooth_l1_loss(t, t.detach() * 0.5),
        lambda t, labels: F.binary_cross_entropy_with_logits(t, torch.zeros_like(t)),
        lambda t, labels: torch.where(t > 0, t, t * 0.1).mean(),
        lambda t, labels: (t.softmax(-1) @ torch.ones(VOCAB, 3, dtype=t.dtype)).square().mean(),
        lambda t, labels: F.pad(t, (0, 0, 0, 1)).sum(-1).square().mean(),
        lambda t, labels: t.cumsum(-1)[..., -1].mean(),
        lambda t, labels: t.float().double().mean(),
        lambda t, labels: t.expand(3, -1, -1, -1).square().mean(),
        lambda t, labels: t.squeeze(0)[1:, ..., None].transpose(0, 1).mean(0).square().sum(),
    ]
    for own in uses:

        def use(model: Any, ids: Tensor, labels: Tensor, own: Any = own) -> Tensor:
            loss = own(model(ids), labels)
            loss.backward()
            return loss.detach()

        both(use)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_a_scaler(dtype: torch.dtype) -> None:
    model, batch = Head(), lm_batch(2, 37)

    def step(own: Any) -> Callable[..., Tensor]:
        def call(ids: Tensor, labels: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype):
                logits = own(ids)
                assert logits.dtype == dtype
                loss = smoothing(logits, labels)
            return loss * 64 / 64

        return call

    exact = train(model, together(model, smoothing), batch)
    eager = train(model, step(model), batch)
    ours = train(model, step(compile_mst(model)), batch)
    assert_not_worse(ours, eager, exact, slack=1e-3)


def test_inference_mode() -> None:
    def use(model: Any, ids: Tensor, labels: Tensor) -> list[Tensor]:
        with torch.inference_mode():
            logits = model(ids)
            loss = smoothing(logits, labels)
            return [loss, logits.detach().argmax(-1), logits.float().mean(), loss.detach()]

    both(use)


def test_threads() -> None:
    def use(model: Any, ids: Tensor, labels: Tensor) -> list[Tensor]:
        logits = model(ids)
        losses = [smoothing(logits, labels), z_loss(logits, labels)]
        found: list[Tensor] = []

        def work(loss: Tensor) -> None:
            loss.backward(retain_graph=True)
            found.append(loss.detach())

        threads = [threading.Thread(target=work, args=(loss,)) for loss in losses]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 2
        return [loss.detach() for loss in losses]

    both(use)


def test_copies_and_printing() -> None:
    def use(model: Any, ids: Tensor, labels: Tensor) -> list[Any]:
        loss = smoothing(model(ids), labels).detach()
        text = f"{loss:.4f} {loss}"
        same = [copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), copy.copy(loss)]
        return [len(text), float(loss), loss.numpy(), *same, loss.tolist(), bool(loss > 0)]

    both(use)


def test_a_result_that_is_written_to() -> None:
    def use(model: Any, ids: Tensor, labels: Tensor) -> list[Tensor]:
        logits = model(ids)
        loss = smoothing(logits, labels)
        double = loss * 2
        total = torch.zeros((), dtype=torch.float64)
        total += loss.detach()
        loss.detach().add_(1)
        return [total, loss.detach(), double.detach(), logits.mean().detach()]

    both(use)


def test_the_second_step_compiles_nothing() -> None:
    model, batch = Head(), lm_batch(2, 37)
    call = together(compile_mst(model), lambda t, labels: preference(t, labels) * len(seen))
    seen: list[int] = [1]
    train(model, call, batch)
    before = len(history.reports())
    for _ in range(3):
        seen.append(1)
        train(model, call, batch)
    assert len(history.reports()) == before


def test_lengths_that_vary() -> None:
    model = Head().double()
    call = together(compile_mst(model), trainer_smoothing)
    for length in (*range(20, 36), 35):
        batch = lm_batch(2, length)
        eager = train(model, together(model, trainer_smoothing), batch)
        assert_same(train(model, call, batch), eager, tolerance=1e-12)


def test_too_many_sizes_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "_MOST_OF_A_KIND", 1)
    model = Head().double()
    call = together(compile_mst(model), trainer_smoothing)
    for length in (51, 52):
        batch = lm_batch(2, length)
        eager = train(model, together(model, trainer_smoothing), batch)
        assert_same(train(model, call, batch), eager, tolerance=1e-12)
    assert any("in more than 1 sizes" in n for r in history.reports() for n in r.notes)


def test_what_cannot_be_compiled_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise NotImplementedError("no compiler today")

    model, batch = Head().double(), lm_batch(2, 53)
    eager = train(model, together(model, z_loss), batch)
    call = together(compile_mst(model), z_loss)
    monkeypatch.setattr(evaluation, "_compiled", fail)
    with pytest.warns(FallbackWarning, match="no compiler today"):
        assert_same(train(model, call, batch), eager, tolerance=1e-12)


def test_a_label_that_is_out_of_range() -> None:
    model, (ids, labels) = Head(), lm_batch(2, 37)
    labels[0, 0] = VOCAB + 3
    loss = smoothing(compile_mst(model)(ids), labels)
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        loss.item()


def test_what_is_alive() -> None:
    """A result holds nothing of the model once it is there."""
    model, (ids, labels) = Head(), lm_batch(2, 37)
    logits: Any = compile_mst(model)(ids)
    loss: Any = smoothing(logits, labels).detach()
    cell = weakref.ref(logits._cell)
    del logits
    assert loss.item() > 0
    gc.collect()
    assert cell() is None
    assert not loss._cell.expression()


def test_with_inductor() -> None:
    model, batch = Head(), lm_batch(2, 64, ignored=9)
    eager = train(model, together(model, trainer_smoothing), batch)
    call = together(torch.compile(model, backend="mst", options=INDUCTOR), trainer_smoothing)
    for _ in range(2):
        assert_same(train(model, call, batch), eager)
    assert has_loops([mstc.last_report()])


def test_a_custom_function_with_a_parameter() -> None:
    """Its gradient may be a deferred tensor; an optimizer takes it as any other."""

    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, logits: Tensor, scale: Tensor) -> Tensor:
            ctx.save_for_backward(logits, scale)
            return logits * scale.detach()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
            logits, scale = ctx.saved_tensors
            return grads[0] * scale, (grads[0] * logits).sum()

    def use(model: Any, ids: Tensor, labels: Tensor) -> list[float]:
        scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
        optimizer = torch.optim.AdamW([*model.parameters(), scale], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            smoothing(Scale.apply(model(ids), scale), labels).backward()
            torch.nn.utils.clip_grad_norm_([*model.parameters(), scale], 1.0)
            optimizer.step()
        return [scale.item(), *(p.sum().item() for p in model.parameters())]

    both(use)


def test_a_parameter_that_scales_the_logits() -> None:
    def use(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
        scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
        smoothing(model(ids) * scale, labels).backward()
        assert type(scale.grad) is Tensor
        return scale.grad

    both(use)


def test_gradients_are_apart() -> None:
    """Two weights that get the same gradient get it in memory of their own."""

    def logits(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        hidden = x.sin()
        return F.linear(hidden, first) + F.linear(hidden, second)

    x = torch.randn(300, 8)
    first, second = (torch.randn(VOCAB, 8).requires_grad_() for _ in range(2))
    found = compile_mst(logits)(x, first, second)
    assert isinstance(found, DeferredTensor)
    found.square().mean().backward()
    places = [t.grad.untyped_storage().data_ptr() for t in (first, second) if t.grad is not None]
    assert len(set(places)) == 2
    torch.testing.assert_close(first.grad, second.grad)

    one, two = torch.randn(4), torch.randn(4)
    apart = evaluation._apart([one, one.view(2, 2), two], [two])
    assert len({t.untyped_storage().data_ptr() for t in (*apart, two)}) == 4
    for ours, theirs in zip(apart, (one, one.view(2, 2), two), strict=True):
        assert torch.equal(ours, theirs)

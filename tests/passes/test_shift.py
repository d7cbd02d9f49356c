"""Cuts of wide values move to what these are made from, and gradients stay what they were."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mstc

VOCAB, HIDDEN = 257, 16
Cut = Callable[[Tensor], Tensor]


class CutHead(nn.Module):
    """A head whose logits are cut along the sequence before the loss."""

    def __init__(self, cut: Cut, labels: Cut, *, cap: float = 0.0, bias: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.inner = nn.Linear(HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCAB, bias=bias)
        self.cut, self.labels, self.cap = cut, labels, cap

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head(torch.tanh(self.inner(self.embed(ids))))
        if self.cap:
            logits = torch.tanh(logits / self.cap) * self.cap
        kept = self.cut(logits).reshape(-1, VOCAB)
        return F.cross_entropy(kept, self.labels(ids).reshape(-1), ignore_index=3), logits


OPTIONS = {
    "lowering": "eager",
    "min_peak_bytes": 0,
    "min_region_bytes": 1024,
    "min_deferred_bytes": 1024,
    "chunk_rows": 24,
}


def difference(model: nn.Module, ids: Tensor, **options: object) -> tuple[float, mstc.Report]:
    """The largest difference between gradients, in float64, and what was done."""
    model = model.double()
    model(ids)[0].backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    dynamic = bool(options.pop("dynamic", False))
    torch.compile(model, backend="mst", dynamic=dynamic, options={**OPTIONS, **options})(ids)[
        0
    ].backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    return max((found[n] - wanted[n]).abs().max().item() for n in wanted), mstc.last_report()


def loops_over(report: mstc.Report, length: int) -> int:
    return sum(loop.axis_length == length for graph in report.graphs for loop in graph.loops)


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


@pytest.mark.parametrize("cap", [0.0, 3.0], ids=["plain", "softcap"])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize(
    ("cut", "labels", "length"),
    [
        (lambda x: x[:, :-1], lambda y: y[:, 1:], 40),
        (lambda x: x[..., :-1, :].contiguous(), lambda y: y[..., 1:].contiguous(), 40),
        (lambda x: x[:, 2:-3], lambda y: y[:, 5:], 36),
        (lambda x: x[:, 1:], lambda y: y[:, :-1], 40),
    ],
    ids=["last", "contiguous", "both-ends", "first"],
)
def test_a_cut_of_the_logits_is_chunked(
    cut: Cut, labels: Cut, length: int, cap: float, bias: bool
) -> None:
    ids = torch.randint(VOCAB, (3, 41))
    worst, report = difference(CutHead(cut, labels, cap=cap, bias=bias), ids)
    assert worst < 1e-13
    assert loops_over(report, length) == 1, str(report)


def test_a_cut_along_the_batch_is_chunked() -> None:
    worst, report = difference(
        CutHead(lambda x: x[:-1], lambda y: y[1:]), torch.randint(VOCAB, (7, 33))
    )
    assert worst < 1e-13
    assert any(loop.num_chunks > 1 for graph in report.graphs for loop in graph.loops)


def test_symbolic_sizes_stay_whole_and_say_so() -> None:
    model = CutHead(lambda x: x[:, :-1], lambda y: y[:, 1:])
    worst, report = difference(model, torch.randint(VOCAB, (3, 41)), dynamic=True)
    assert worst < 1e-13
    reasons = [r for graph in report.graphs for r in graph.refusals]
    assert any("aten.slice mixes positions" in r.reason and r.source for r in reasons), str(report)


def test_a_cut_with_steps_does_not_move() -> None:
    """It leaves the sequence closed; the batch is still an axis to loop over."""
    model = CutHead(lambda x: x[:, ::2], lambda y: y[:, ::2])
    worst, report = difference(model, torch.randint(VOCAB, (3, 41)))
    assert worst < 1e-13
    assert {loop.axis_length for graph in report.graphs for loop in graph.loops} == {3}


def test_logits_that_are_needed_whole_are_not_computed_twice() -> None:
    model = CutHead(lambda x: x[:, :-1], lambda y: y[:, 1:])
    worst, report = difference(model, torch.randint(VOCAB, (3, 41)), defer_outputs=False)
    assert worst < 1e-13
    assert loops_over(report, 40) == 0

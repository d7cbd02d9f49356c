"""Random numbers from a counter: as random as they were, the same in every piece, and dropout's
gradient is the gradient of what the forward dropped."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mstc
from mstc.runtime.loop import Program
from passes.counted import count_random_numbers
from passes.liveness import output_nodes
from tests.models import fresh_compiler  # noqa: F401  (an autouse fixture)
from tests.passes.graphs import run_graph, trace


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random numbers as a rewritten graph makes them."""
    graph = trace(lambda x: (x + torch.rand(shape, dtype=dtype),), torch.zeros((), dtype=dtype))
    counted = count_random_numbers(graph, min_bytes=1)
    assert not any("rand.default" in str(n.target) for n in counted.nodes)
    torch.manual_seed(seed)
    return run_graph(counted, [torch.zeros((), dtype=dtype)])[0]


@pytest.mark.parametrize("shape", [(400_000,), (1000, 400), (1, 500, 800), (7, 11, 13, 401)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_and_independent(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    numbers = draw(*shape, dtype=dtype)
    assert numbers.dtype == dtype
    assert numbers.min() >= 0
    assert numbers.max() < 1
    flat = numbers.flatten()
    count = flat.numel()
    assert abs(flat.mean() - 0.5) < 5 * (1 / 12 / count) ** 0.5
    histogram = torch.histc(flat, 256, 0, 1)
    expected = count / 256
    assert ((histogram - expected) ** 2 / expected).sum() < 255 + 5 * (2 * 255) ** 0.5
    for dim in range(numbers.dim()):
        for lag in (1, 2, 8):
            if numbers.shape[dim] <= lag:
                continue
            a = numbers.narrow(dim, 0, numbers.shape[dim] - lag).flatten() - 0.5
            b = numbers.narrow(dim, lag, numbers.shape[dim] - lag).flatten() - 0.5
            assert abs((a * b).mean() * 12) < 5 / a.numel() ** 0.5


def test_seeds_decide() -> None:
    first, again, other = draw(64, 64), draw(64, 64), draw(64, 64, seed=1)
    assert torch.equal(first, again)
    assert abs(((first - 0.5) * (other - 0.5)).mean() * 12) < 5 / 64
    assert len(first.unique()) > 4000


def test_two_draws_of_one_graph_differ() -> None:
    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.rand(64, 64) + x, torch.rand(64, 64) + x

    graph = count_random_numbers(trace(both, torch.zeros(())), min_bytes=1)
    one, two = run_graph(graph, [torch.zeros(())])
    assert abs(((one - 0.5) * (two - 0.5)).mean() * 12) < 5 / 64


def test_what_stays() -> None:
    def others(x: Tensor) -> tuple[Tensor, ...]:
        return torch.randn(64, 64) + x, torch.rand(4) + x, torch.randint(9, (64, 64)) + x

    graph = trace(others, torch.zeros(()))
    assert count_random_numbers(graph, min_bytes=64) is graph
    assert len(output_nodes(graph)) == 3


class Block(nn.Module):
    """Attention written out by PyTorch (its kernel drops nothing on a CPU), and an MLP, with
    dropout everywhere."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 4, 12).transpose(1, 2).chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.p)
        x = x + F.dropout(mixed.transpose(1, 2).reshape(x.shape), self.p)
        return x + F.dropout(self.down(F.dropout(torch.tanh(self.up(x)), self.p)), self.p)


class Model(nn.Module):
    def __init__(self, p: float, *, checkpointed: bool) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.blocks = nn.ModuleList([Block(p), Block(p)])
        self.head = nn.Linear(16, 97)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


OPTIONS = {"lowering": "eager", "min_peak_bytes": 0, "min_region_bytes": 2048, "chunk_rows": 24}


def compiled(
    p: float, *, checkpointed: bool = False, **options: object
) -> tuple[nn.Module, Callable[[int], Tensor]]:
    """A model in float64, and its loss under a seed."""
    torch.manual_seed(3)
    model = Model(p, checkpointed=checkpointed).double()
    x, labels = torch.randn(2, 37, 16, dtype=torch.float64), torch.randint(97, (2, 37))
    call = torch.compile(model, backend="mst", options={**OPTIONS, **options})

    def loss(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return call(x, labels)

    return model, loss


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_in_forward": False},
        {"chunk_rows": 7},
        {"chunk_rows": 1000},
        {"checkpointed": True},
    ],
    ids=["planned", "recompute", "small", "one-chunk", "checkpointed"],
)
def test_the_gradient_is_that_of_what_was_dropped(options: dict[str, object]) -> None:
    """The loss under a fixed seed is a smooth function: its slope along the gradient, by central
    differences, tells whether the backward used the forward's masks."""
    model, loss = compiled(0.3, **options)
    parameters = list(model.parameters())
    loss(5).backward()
    grads = [p.grad for p in parameters]
    torch.manual_seed(0)
    for _ in range(3):
        direction = [torch.randn_like(p) for p in parameters]
        slope = sum(
            (g * d).sum().item() for g, d in zip(grads, direction, strict=True) if g is not None
        )
        step, sides = 1e-6, []
        for sign in (1, -1):
            with torch.no_grad():
                for p, d in zip(parameters, direction, strict=True):
                    p.add_(d, alpha=sign * step)
            sides.append(loss(5).item())
            with torch.no_grad():
                for p, d in zip(parameters, direction, strict=True):
                    p.sub_(d, alpha=sign * step)
        assert (sides[0] - sides[1]) / (2 * step) == pytest.approx(slope, rel=1e-6, abs=1e-8)
    if options.get("chunk_rows") != 1000:
        assert loops() >= 3


def test_a_checkpoint_computes_no_loop_a_third_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loops of the backward compute their region again; the layer's checkpoint does not."""
    ran: list[int] = []
    run = Program.run

    def counted(self: Program, *args: Any) -> list[Tensor]:
        ran[-1] += 1
        return run(self, *args)

    monkeypatch.setattr(Program, "run", counted)
    for checkpointed in (False, True):
        torch._dynamo.reset()
        _, loss = compiled(0.3, checkpointed=checkpointed)
        ran.append(0)
        loss(5).backward()
        assert loops() >= 3
    assert ran[0] == ran[1] > 0


def test_numbers_of_eager_code_where_they_are_asked_for() -> None:
    def noisy(x: Tensor, weight: Tensor) -> Tensor:
        wide = x @ weight
        return (torch.tanh(wide) * torch.rand(wide.shape)).sum()

    x, weight = torch.randn(400, 4), torch.randn(4, 256, requires_grad=True)
    torch.manual_seed(1)
    wanted = noisy(x, weight)
    found: list[Tensor] = []
    for asked in (True, False):
        torch._dynamo.reset()
        with torch._inductor.config.patch(fallback_random=asked):
            torch.manual_seed(1)
            found.append(torch.compile(noisy, backend="mst", options=OPTIONS)(x, weight))
    torch.testing.assert_close(found[0], wanted)
    assert abs(found[1] - wanted) > 1e-3, "from a counter, other numbers are drawn"
    assert loops() == 1


def loops() -> int:
    return sum(loop.count for graph in mstc.last_report().graphs for loop in graph.loops)


def test_the_same_seed_gives_the_same_step() -> None:
    model, loss = compiled(0.5)
    grads: list[list[Tensor]] = []
    losses: list[Tensor] = []
    for seed in (5, 5, 6):
        model.zero_grad()
        losses.append(loss(seed))
        losses[-1].backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert loops() >= 3
    assert torch.equal(losses[0], losses[1])
    assert all(map(torch.equal, grads[0], grads[1]))
    assert losses[0] != losses[2]


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_as_much_is_dropped_as_was_asked_for(p: float) -> None:
    """Inside a loop: identity weights let the mask through to the loss."""

    class Leak(nn.Module):
        def forward(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            wide = F.dropout(x @ weight, p)
            return (wide != 0).double().sum(), (wide * wide).sum()

    x, weight = torch.ones(400, 4), torch.ones(4, 256, requires_grad=True)
    kept, _ = torch.compile(Leak(), backend="mst", options=OPTIONS)(x, weight)
    assert loops() == 1
    count = 400 * 256
    assert abs(kept / count - (1 - p)) < 5 * (p * (1 - p) / count) ** 0.5

"""Small modules and the comparison that end-to-end tests share.

`train` runs one step of a model; `three_way` holds our step against float64, beside the error that
the same lowering makes without chunking.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mstc
from mstc import history
from mstc.history import reports
from mstc.runtime import loop

EAGER: dict[str, Any] = {
    "lowering": "eager",
    "min_peak_bytes": 0,
    "min_region_bytes": 1024,
    "min_deferred_bytes": 1024,
    "chunk_rows": 8,
}
"""Options under which tiny models are chunked, without Inductor."""

INDUCTOR = EAGER | {"lowering": "inductor"}


NON_LEAF = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
"""Dynamo looks at ``.grad`` of what a graph is given, and PyTorch warns."""


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Every test compiles anew: a test file that imports this uses it."""
    torch._dynamo.reset()
    history._REPORTS.clear()  # bounded: a full one has no place that is `len` reports away
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


class MLP(nn.Module):
    """An up-projection four times as wide, a GELU, a down-projection."""

    def __init__(self, hidden: int = 16, wide: int = 64) -> None:
        super().__init__()
        self.up = nn.Linear(hidden, wide)
        self.down = nn.Linear(wide, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


def grouped_mm(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Rows of `x` times one of the matrices `weights`: the first up to ``ends[0]`` times the first,
    and so on. The kernel takes bfloat16 only."""
    if x.dtype == torch.bfloat16:
        return torch._grouped_mm(x, weights, ends)
    group = torch.searchsorted(ends, torch.arange(len(x), dtype=ends.dtype), right=True)
    return torch.einsum("nk,nkm->nm", x, weights[group])


class Experts(nn.Module):
    """A mixture of experts as it is written today: sort the choices by expert, one grouped product
    per projection, weigh, bring the rows back to their tokens.

    What is chosen depends on features of the input alone, so that every precision chooses the same.

    Args:
        k: experts per token.
        back: how rows come back to their tokens: "places" (the inverse permutation), "argsort" (the
            same, found by sorting), "index_add", "scatter" (as ``scatter_add``, with ``gather`` on
            the way in).
        balanced: with an auxiliary loss for the load of the experts.
        bias: a bias per expert.
    """

    def __init__(
        self,
        hidden: int = 16,
        wide: int = 64,
        experts: int = 4,
        k: int = 2,
        back: str = "places",
        *,
        balanced: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.experts, self.k, self.back, self.balanced = experts, k, back, balanced
        self.router = nn.Parameter(0.3 * torch.randn(hidden, experts))
        self.up = nn.Parameter(0.3 * torch.randn(experts, hidden, 2 * wide))
        self.down = nn.Parameter(0.3 * torch.randn(experts, wide, hidden))
        self.bias = nn.Parameter(torch.randn(experts, 2 * wide)) if bias else None

    def chosen(self, x: Tensor) -> Tensor:
        """``[tokens, k]``."""
        return x.detach()[:, : self.experts].topk(self.k, -1).indices

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        choice = self.chosen(flat)
        probabilities = (flat @ self.router).softmax(-1)
        weights = probabilities.gather(-1, choice)
        counts = torch.histc(choice.flatten().float(), self.experts, 0, self.experts - 1)
        y = flat + self.mix(flat, choice.flatten(), weights.flatten(), counts)
        loss = (y.view_as(x) * target).mean()
        if self.balanced:
            load = counts.to(x.dtype) / choice.numel()
            loss = loss + 0.1 * self.experts * (load * probabilities.mean(0)).sum()
        return loss

    def mix(self, x: Tensor, choice: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
        keys, rows = torch.sort(choice)
        ends = torch.cumsum(counts, 0, dtype=torch.int32)
        tokens = rows // self.k
        if self.back == "scatter":
            y = x.gather(0, tokens[:, None].expand(-1, x.shape[-1]))
        else:
            y = x[tokens]
        y = grouped_mm(y, self.up, ends)
        if self.bias is not None:
            y = y + self.bias[keys]
        gate, y = y.chunk(2, -1)
        y = grouped_mm(F.silu(gate) * y, self.down, ends) * weights[rows, None]
        if self.back == "index_add":
            return torch.zeros_like(x).index_add(0, tokens, y)
        if self.back == "scatter":
            return torch.zeros_like(x).scatter_add(0, tokens[:, None].expand_as(y), y)
        if self.back == "argsort":
            places = rows.argsort()
        else:
            places = torch.empty_like(rows)
            places[rows] = torch.arange(len(rows))
        return y[places].view(-1, self.k, x.shape[-1]).sum(1)


class TinyLM(nn.Module):
    """Embedding, MLPs with residuals, a vocabulary projection and its loss."""

    def __init__(
        self,
        vocab: int = 96,
        hidden: int = 16,
        layers: int = 1,
        *,
        bias: bool = False,
        tied: bool = False,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, hidden)
        self.layers = nn.ModuleList(MLP(hidden) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, vocab, bias=bias)
        if tied:
            self.head.weight = self.embed.weight
        self.reduction = reduction

    def hidden(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(self.norm(x))
        return x

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        logits = self.head(self.hidden(ids))
        return F.cross_entropy(
            logits.flatten(0, -2), labels.flatten(), ignore_index=-100, reduction=self.reduction
        )


def tokens(*shape: int, vocab: int = 96, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab, shape, generator=generator)


def lm_batch(*shape: int, vocab: int = 96, ignored: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids and labels; the first `ignored` labels are -100."""
    ids, labels = tokens(*shape, vocab=vocab), tokens(*shape, vocab=vocab, seed=2)
    labels.view(-1)[:ignored] = -100
    return ids, labels


@dataclass(frozen=True)
class Step:
    """What one training step gave."""

    loss: Tensor
    gradients: dict[str, Tensor]  # by parameter name, and "input 0", ...

    def error(self, truth: Step) -> dict[str, float]:
        """Relative distance in the Euclidean norm, per tensor."""
        assert self.gradients.keys() == truth.gradients.keys()
        pairs = {"loss": (self.loss, truth.loss)}
        pairs |= {name: (g, truth.gradients[name]) for name, g in self.gradients.items()}
        # a gradient that is zero but for rounding is measured by the size of the others
        sizes = {name: true.double().norm().item() for name, (_, true) in pairs.items()}
        least = 1e-6 * max(sizes.values()) or 1.0
        errors: dict[str, float] = {}
        for name, (ours, true) in pairs.items():
            assert ours.shape == true.shape, name
            distance = (ours.double() - true.double()).norm().item()
            errors[name] = distance / max(sizes[name], least)
        return errors


def loss_of(output: Any) -> Tensor:
    if isinstance(output, Mapping):
        return output["loss"]
    if isinstance(output, (tuple, list)):
        return next(o for o in output if o.dim() == 0)
    return output


def train(
    model: nn.Module,
    call: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    backward: Callable[[Tensor], object] = torch.Tensor.backward,
) -> Step:
    """One step: gradients of every parameter, and of every input that requires grad."""
    model.zero_grad(set_to_none=True)
    inputs = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    for tensor in inputs:
        tensor.grad = None
    loss = loss_of(call(*args, **(kwargs or {})))
    backward(loss)
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    for index, tensor in enumerate(inputs):
        assert tensor.grad is not None
        gradients[f"input {index}"] = tensor.grad.clone()
    return Step(loss.detach().clone(), gradients)


def compile_mst(model: Any, **options: Any) -> Callable[..., Any]:
    dynamic = options.pop("dynamic", None)
    return torch.compile(model, backend="mst", options=EAGER | options, dynamic=dynamic)


def _converted(value: Any, dtype: torch.dtype) -> Any:
    if not isinstance(value, Tensor):
        return value
    if not value.is_floating_point():
        return value.clone()
    return value.detach().to(dtype).requires_grad_(value.requires_grad)


def _as_is(tensor: Any) -> Any:
    return tensor


def three_way(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    autocast: bool = False,
    options: Mapping[str, Any] | None = None,
    baseline: str = "aot_eager",
    prepare: Callable[[Any], Any] = _as_is,
    backward: Callable[[Tensor], object] = torch.Tensor.backward,
    slack: float = 2.5e-7,
    chunked: bool = True,
) -> Step:
    """Our error against float64 is at most the baseline's times 1.1, plus `slack`.

    Args:
        model: in float32; copies of it are trained.
        args, kwargs: of the model; floating-point tensors are converted with it.
        dtype: that both compiled models run in.
        autocast: run both under bf16 autocast.
        options: further options of ours.
        baseline: a backend without chunking.
        prepare: makes a view of an argument, where the layout is what is tested.
        backward: what is done with the loss.
        slack: relative; the default is two units in the last place of float32.
        chunked: whether we expect a loop; the test fails if the graph was left alone.
    """

    def step(dtype: torch.dtype, compiler: Callable[[nn.Module], Any], cast: bool) -> Step:
        torch._dynamo.reset()
        own = copy.deepcopy(model).to(dtype)
        own_args = [prepare(_converted(a, dtype)) for a in args]
        own_kwargs = {k: prepare(_converted(v, dtype)) for k, v in (kwargs or {}).items()}
        for tensor in own_args:
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.retain_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            call = compiler(own)

        def under(*a: Any, **k: Any) -> Any:
            with torch.autocast("cpu", torch.bfloat16, enabled=cast):
                return call(*a, **k)

        return train(own, under, own_args, own_kwargs, backward=backward)

    truth = step(torch.float64, _as_is, False)
    theirs = step(dtype, lambda m: torch.compile(m, backend=baseline), autocast)
    before = len(reports())
    ours = step(dtype, lambda m: compile_mst(m, **(options or {})), autocast)
    assert_not_worse(ours, theirs, truth, slack=slack)
    assert has_loops(reports()[before:]) == chunked, "\n".join(map(str, reports()[before:]))
    assert_no_fallback(reports()[before:])
    return ours


def assert_not_worse(ours: Step, theirs: Step, truth: Step, *, slack: float = 2.5e-7) -> None:
    limits = {name: 1.1 * e + slack for name, e in theirs.error(truth).items()}
    errors = ours.error(truth)
    # written so that a nan is too large
    bad = {n: (e, limits[n]) for n, e in errors.items() if not e <= limits[n]}
    assert not bad, f"error, and the most that it may be: {bad}"


def assert_same(ours: Step, eager: Step, *, tolerance: float = 1e-5) -> None:
    """Close in the Euclidean norm; for cases where the model cannot be run in float64."""
    bad = {n: e for n, e in ours.error(eager).items() if not e <= tolerance}
    assert not bad, bad


def has_loops(found: Sequence[mstc.Report]) -> bool:
    return any(g.loops for r in found for g in r.graphs)


def assert_no_fallback(found: Sequence[mstc.Report]) -> None:
    notes = [n for r in found for n in r.notes if "as it was" in n]
    assert not notes, notes


@contextmanager
def counting_loops() -> Iterator[list[str]]:
    """Collects the spec of every loop that runs."""
    specs: list[str] = []
    original = loop.Program.run

    def run(self: loop.Program, *args: Any) -> Any:
        specs.append(str(id(self)))
        return original(self, *args)

    loop.Program.run = run  # type: ignore[method-assign]
    try:
        yield specs
    finally:
        loop.Program.run = original  # type: ignore[method-assign]

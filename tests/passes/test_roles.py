"""Queries and keys are two axes: attention runs along the queries, and no tensor of tokens x tokens
is whole."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mstc
from mstc.runtime.memory import measure_peak
from passes.axes import analyze_axes
from passes.roles import join, separate
from passes.rules import find_rule
from passes.rules.shape import cut
from tests.models import fresh_compiler  # noqa: F401  (an autouse fixture)
from tests.passes.graphs import run_graph, trace

Mask = Callable[[Tensor, Tensor], Tensor]
HEADS, SIZE = 2, 8


def positions(x: Tensor) -> tuple[Tensor, Tensor]:
    at = torch.arange(x.shape[1])
    return at[:, None], at[None, :]


def window(x: Tensor, data: Tensor) -> Tensor:
    i, j = positions(x)
    return ((j <= i) & (i - j < 9))[None, None]


def padding(x: Tensor, data: Tensor) -> Tensor:
    i, j = positions(x)
    return (j <= i)[None, None] & (data > 0)[:, None, None, :] | (i == j)


def only_padding(x: Tensor, data: Tensor) -> Tensor:
    return (data >= 0)[:, None, None, :].expand(-1, 1, x.shape[1], -1)


def documents(x: Tensor, data: Tensor) -> Tensor:
    """Packed: tokens see their own document only."""
    own = (data > 1).cumsum(1)
    i, j = positions(x)
    return (own[:, :, None] == own[:, None, :])[:, None] & (j <= i)


def distance(x: Tensor, data: Tensor) -> Tensor:
    """A float bias per head (ALiBi)."""
    i, j = positions(x)
    slope = torch.tensor([0.5, 0.25], dtype=x.dtype)[:, None, None]
    return (slope * (j - i).clamp(max=0)).masked_fill(j > i, -torch.inf)[None]


MASKS = [window, padding, only_padding, documents, distance]


class Layer(nn.Module):
    """Attention; with a `sink`, every query may also look at nothing (GPT-OSS)."""

    def __init__(
        self, mask: Mask, *, written_out: bool = False, groups: int = 1, sink: bool = False
    ) -> None:
        super().__init__()
        self.q = nn.Linear(SIZE, SIZE)
        self.kv = nn.Linear(SIZE, 2 * SIZE // groups)
        self.out = nn.Linear(SIZE, SIZE)
        self.mask, self.written_out, self.groups = mask, written_out, groups
        self.sink = nn.Parameter(torch.randn(HEADS)) if sink else None

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        kv = self.kv(x).unflatten(-1, (2, HEADS // self.groups, -1)).permute(2, 0, 3, 1, 4)
        k, v = kv.repeat_interleave(self.groups, dim=2).unbind(0)
        turn = torch.arange(x.shape[1], dtype=x.dtype)[:, None].cos()
        q, k = q * turn, k * turn  # what rotary embeddings do to axes
        if self.written_out:
            scores = q @ k.transpose(-1, -2) * 0.3
            scores = scores.masked_fill(~mask, -1e9) if mask.dtype is torch.bool else scores + mask
            mixed = self.probabilities(scores) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return x + self.out(mixed.transpose(1, 2).flatten(2))

    def probabilities(self, scores: Tensor) -> Tensor:
        if self.sink is None:
            return scores.softmax(-1)
        sink = self.sink.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        both = torch.cat([scores, sink], dim=-1)
        return (both - both.max(-1, keepdim=True).values).softmax(-1)[..., :-1]


class Model(nn.Module):
    """Layers that share one mask."""

    def __init__(self, mask: Mask, *, layers: int = 2, **options: bool | int) -> None:
        super().__init__()
        self.mask = mask
        self.layers = nn.ModuleList([Layer(mask, **options) for _ in range(layers)])  # type: ignore[arg-type]

    def forward(self, x: Tensor, data: Tensor) -> Tensor:
        mask = self.mask(x, data)
        for layer in self.layers:
            x = layer(x, mask)
        return (x * x).sum()


OPTIONS = {"lowering": "eager", "min_peak_bytes": 0, "min_region_bytes": 4096, "chunk_rows": 64}


def inputs(length: int, batch: int = 2, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    x = torch.randn(batch, length, SIZE, dtype=dtype)
    return x, torch.randint(3, (batch, length))


def gradients(model: nn.Module, call: Callable[..., Tensor], *args: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss = call(*args)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def loops_along(length: int) -> int:
    graphs = mstc.last_report().graphs
    return sum(n.count for g in graphs for n in g.loops if n.axis_length == length)


@pytest.mark.parametrize("written_out", [False, True], ids=["fused", "written-out"])
@pytest.mark.parametrize("mask", MASKS, ids=lambda m: m.__name__)
def test_the_same_gradients(mask: Mask, written_out: bool) -> None:
    torch.manual_seed(1)
    model = Model(mask, written_out=written_out).double()
    x, data = inputs(131)
    wanted = gradients(model, model, x, data)
    found = gradients(model, torch.compile(model, backend="mst", options=OPTIONS), x, data)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    one_row = bool(mstc.last_report().graphs[0].rewrites)
    assert one_row == (mask is only_padding and not written_out)
    assert one_row or loops_along(131) >= 2, str(mstc.last_report())


class OneKey(Layer):
    """One key and value for all heads, stretched by attention itself (Falcon)."""

    def __init__(self, mask: Mask, **options: bool | int) -> None:
        super().__init__(mask, groups=HEADS)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        k, v = (y[:, None] for y in self.kv(x).chunk(2, dim=-1))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return x + self.out(mixed.transpose(1, 2).flatten(2))


def test_one_key_for_all_heads() -> None:
    """Its softmax asks for rows that are masked as a whole; that needs no copies of the tokens."""
    torch.manual_seed(1)
    model = Model(window).double()
    model.layers = nn.ModuleList([OneKey(window).double() for _ in range(2)])
    x, data = inputs(131)
    wanted = gradients(model, model, x, data)
    found = gradients(model, torch.compile(model, backend="mst", options=OPTIONS), x, data)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    assert loops_along(131) >= 2, str(mstc.last_report())


class OneProjection(Layer):
    """Queries, keys and values of one product: their gradients are one tensor again (MPT)."""

    def __init__(self, mask: Mask, *, chunked: bool = False) -> None:
        super().__init__(mask)
        self.qkv = nn.Linear(SIZE, 3 * SIZE)
        self.chunked = chunked

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if self.chunked:
            parts = self.qkv(x).chunk(3, dim=-1)
            q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)
        else:
            q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q @ k.transpose(-1, -2) * 0.3).masked_fill(~mask, -1e9)
        mixed = scores.softmax(-1) @ v
        return x + self.out(mixed.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("chunked", [False, True])
def test_one_projection_for_all_roles(chunked: bool) -> None:
    torch.manual_seed(1)
    model = Model(window).double()
    model.layers = nn.ModuleList([OneProjection(window, chunked=chunked).double() for _ in "ab"])
    x, data = inputs(131)
    wanted = gradients(model, model, x, data)
    found = gradients(model, torch.compile(model, backend="mst", options=OPTIONS), x, data)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    assert loops_along(131) >= 2, str(mstc.last_report())


@pytest.mark.parametrize("length", [96, 131])
def test_sinks(length: int) -> None:
    """Padded scores are cut to the keys: only the values say that these are tokens."""
    torch.manual_seed(1)
    model = Model(window, written_out=True, sink=True).double()
    x, data = inputs(length)
    wanted = gradients(model, model, x, data)
    found = gradients(model, torch.compile(model, backend="mst", options=OPTIONS), x, data)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    assert loops_along(length) >= 2, str(mstc.last_report())


@pytest.mark.parametrize("written_out", [False, True], ids=["fused", "written-out"])
def test_grouped_heads_and_other_lengths(written_out: bool) -> None:
    torch.manual_seed(1)
    model = Model(window, written_out=written_out, groups=2).double()
    compiled = torch.compile(model, backend="mst", dynamic=True, options=OPTIONS)
    for length in (131, 96, 157):
        x, data = inputs(length)
        wanted = gradients(model, model, x, data)
        torch.testing.assert_close(
            gradients(model, compiled, x, data), wanted, rtol=1e-10, atol=1e-12
        )


@pytest.mark.parametrize("written_out", [False, True], ids=["fused", "written-out"])
@pytest.mark.parametrize("mask", [window, documents], ids=lambda m: m.__name__)
def test_nothing_of_tokens_x_tokens_is_whole(mask: Mask, written_out: bool) -> None:
    length = 768
    model = Model(mask, written_out=written_out)
    options = {"lowering": "eager", "min_peak_bytes": 0, "chunk_rows": 64}
    compiled = torch.compile(model, backend="mst", options=options)
    x, data = inputs(length, batch=1, dtype=torch.float32)
    gradients(model, compiled, x, data)
    peak = measure_peak(lambda: compiled(x, data).backward()).peak_intermediate_nbytes
    assert peak < 4 * length**2 * 0.8, "one float mask is larger"


def test_inference_too() -> None:
    model = Model(window, written_out=True).double()
    x, data = inputs(131)
    with torch.no_grad():
        wanted = model(x, data)
        found = torch.compile(model, backend="mst", options=OPTIONS)(x, data)
    torch.testing.assert_close(found, wanted)
    assert loops_along(131) >= 2


class SeparateKeys(nn.Module):
    """Keys and values from layers of their own: their gradients are transposed and viewed."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(SIZE, SIZE) for _ in range(3)])

    def forward(self, x: Tensor, data: Tensor) -> Tensor:
        q, k, v = (part(x).view(*x.shape[:2], HEADS, -1).transpose(1, 2) for part in self.parts)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=window(x, data)).square().sum()


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_gradients_that_are_sums_keep_their_strides(lowering: str) -> None:
    torch.manual_seed(1)
    model = SeparateKeys().double()
    x, data = inputs(131)
    wanted = gradients(model, model, x, data)
    call = torch.compile(model, backend="mst", options={**OPTIONS, "lowering": lowering})
    torch.testing.assert_close(gradients(model, call, x, data), wanted, rtol=1e-10, atol=1e-12)
    assert loops_along(131) >= 1, str(mstc.last_report())


def scores(x: Tensor) -> tuple[Tensor]:
    return ((x @ x.T).softmax(-1) @ x,)


def test_cuts_separate_and_join() -> None:
    graph = trace(scores, torch.randn(32, 4))
    new, axes = separate(graph, min_bytes=1)
    assert not analyze_axes(new, find_rule).cuts
    cuts = new.find_nodes(op="call_function", target=cut)
    assert len(cuts) == 2, "the keys, and the values"
    (softmax,) = [n for n in new.nodes if "softmax" in str(n.target)]
    queries, keys = axes.dims(softmax)
    assert queries != keys
    x = torch.randn(32, 4)
    torch.testing.assert_close(run_graph(new, [x]), run_graph(graph, [x]))
    join(new)
    assert not new.find_nodes(op="call_function", target=cut)
    torch.testing.assert_close(run_graph(new, [x]), run_graph(graph, [x]))


def test_small_scores_are_not_cut() -> None:
    graph = trace(scores, torch.randn(32, 4))
    assert separate(graph, min_bytes=2**20)[0] is graph


def test_scores_that_mix_both_roles_are_refused() -> None:
    """A sum of scores and their transpose needs whole scores."""

    class Symmetric(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(SIZE, SIZE)

        def forward(self, x: Tensor) -> Tensor:
            q = self.inner(x)
            s = q @ q.transpose(1, 2)
            return ((s + s.transpose(1, 2)).softmax(-1) @ q).square().sum()

    model = Symmetric().double()
    x, _ = inputs(131)
    wanted = gradients(model, model, x)
    found = gradients(model, torch.compile(model, backend="mst", options=OPTIONS), x)
    torch.testing.assert_close(found, wanted)
    assert loops_along(131) == 0

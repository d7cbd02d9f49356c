"""What equal layers do between their loops is lowered once, and nothing else changes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor import metrics
from torch._inductor.codecache import PyCodeCache
from torch.utils.checkpoint import checkpoint

import mstc
from mstc import partition
from mstc.errors import FallbackWarning
from mstc.inductor import calls_subgraphs
from passes.shared import NAME
from tests.models import (
    INDUCTOR,
    MLP,
    TinyLM,
    assert_same,
    compile_mst,
    fresh_compiler,  # noqa: F401  (an autouse fixture)
    lm_batch,
    train,
)

pytestmark = pytest.mark.skipif(
    not calls_subgraphs({}), reason="this version of PyTorch is not tried"
)
HIDDEN, HEADS = 16, 2
OPTIONS = INDUCTOR | {"min_region_bytes": 20_000}  # loops for MLPs and the head


class Block(nn.Module):
    """A layer of a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.out = nn.Linear(HIDDEN, HIDDEN)
        self.mlp = MLP(HIDDEN, 8 * HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.first(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.second(x))


class Transformer(TinyLM):
    def __init__(self, layers: int) -> None:
        super().__init__(hidden=HIDDEN)
        self.layers = nn.ModuleList(Block() for _ in range(layers))

    def hidden(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return x


@contextmanager
def emitted() -> Iterator[list[str]]:
    """The modules that Inductor writes meanwhile."""
    texts: list[str] = []
    load = PyCodeCache.load_by_key_path

    def loaded(cls: type, key: str, path: str, *args: Any, **kwargs: Any) -> Any:
        texts.append(Path(path).read_text())
        return load(key, path, *args, **kwargs)

    with patch.object(PyCodeCache, "load_by_key_path", classmethod(loaded)):
        yield texts


@pytest.fixture
def no_graph_caches() -> Iterator[None]:
    """What is patched here is in nobody's key."""
    graphs = torch._inductor.config.patch(fx_graph_cache=False)
    with graphs, torch._functorch.config.patch(enable_autograd_cache=False):
        yield


def _subgraphs(texts: list[str]) -> dict[str, list[str]]:
    """Name of a subgraph's function -> what it returns, for every module."""
    pattern = rf"def ({NAME}_\d+)\(args\):\n(.*?)\n    return \((.*?), ?\)\n"
    return {
        f"{i} {m[1]}": re.split(r", (?![^()]*\))", m[3])  # a reinterpreted buffer has commas
        for i, text in enumerate(texts)
        for m in re.finditer(pattern, text, re.S)
    }


@pytest.mark.usefixtures("no_graph_caches")
def test_the_code_of_a_layer_stands_there_once() -> None:
    """In the forward and in the backward; gradients are eager code's."""
    model, batch = Transformer(5), lm_batch(2, 35)
    with emitted() as texts:
        found = train(model, compile_mst(model, **OPTIONS), batch)
    assert_same(found, train(model, model, batch))
    subgraphs = _subgraphs(texts)
    assert len(subgraphs) == 2
    for results in subgraphs.values():
        buffers = [re.findall(r"\w+_buf\d+", result) for result in results]
        assert all(len(names) == 1 for names in buffers), "memory of its own, no operand's"
        assert len({name for (name,) in buffers}) == len(results)
    calls = [text.count(f"= {NAME}_0({NAME}_0_args)") for text in texts]
    assert sorted(calls)[-2:] == [3, 4]  # the first layer, and in the backward the last, differ


def _lowered(layers: int) -> tuple[int, int]:
    """The peak of a step, and the kernels in all code that is written for it."""
    torch._dynamo.reset()
    metrics.reset()
    trace = mstc.simulate_step(Transformer(layers), *lm_batch(2, 35), options=OPTIONS)
    outside = [buffer for buffer in trace.buffers if buffer.loop is None]
    assert all(b.source for b in outside if b.nbytes > 1000), "lines of the user's code"
    return trace.peak_nbytes, metrics.generated_kernel_count


def test_more_layers_have_no_more_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a step takes what it took."""
    (_, few), (peak, more) = _lowered(5), _lowered(8)
    assert more <= few, "which has the bodies of loops besides"
    monkeypatch.setattr(partition, "share_equal_runs", lambda graph: 0)
    apart, every = _lowered(8)
    assert every > 2 * more
    assert peak < 1.01 * apart


class Checkpointed(Transformer):
    def hidden(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return x


def test_checkpointed_layers_take_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their backward is compiled as one: apart, what is read after a loop would wait for it."""

    def peak() -> int:
        torch._dynamo.reset()
        return mstc.simulate_step(Checkpointed(6), *lm_batch(2, 35), options=OPTIONS).peak_nbytes

    found: list[int] = []
    share = partition.share_equal_runs
    monkeypatch.setattr(
        partition, "share_equal_runs", lambda graph: found.append(share(graph)) or found[-1]
    )
    shared = peak()
    assert len(found) == 1, "the forward"
    assert found[0] > 0
    monkeypatch.setattr(partition, "share_equal_runs", lambda graph: 0)
    assert shared == peak()


@pytest.mark.parametrize(
    "options", [{"cpp_wrapper": True}, {"triton.cudagraphs": True}], ids=lambda o: next(iter(o))
)
def test_what_nobody_has_tried(options: dict[str, object]) -> None:
    assert not calls_subgraphs(options)


@pytest.mark.usefixtures("no_graph_caches")
def test_a_mistake_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(graph: object) -> int:
        raise ValueError("planted")

    monkeypatch.setattr(partition, "share_equal_runs", fail)
    with pytest.warns(FallbackWarning, match="planted"):
        trace = mstc.simulate_step(TinyLM(), *lm_batch(2, 35), options=INDUCTOR)
    assert trace.loops, "the rest is as ever"


@torch.compiler.nested_compile_region
def region(x: Tensor, y: Tensor) -> Tensor:
    return torch.sin(x) * y


def test_regions_of_the_users_are_left_alone() -> None:
    """And their gradients are right (`mstc.repairs`): with Inductor by itself they are not."""

    def both_ways(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        h, k = torch.tanh(x @ w), torch.sigmoid(x @ v)
        return ((region(h, k) + region(k, h)) * h.exp() * k).sum()

    inputs = [(torch.randn(64, 64) / 8).requires_grad_() for _ in range(3)]
    wanted = torch.autograd.grad(both_ways(*(t.double() for t in inputs)), inputs)
    with emitted() as texts:
        call = torch.compile(both_ways, backend="mst", options=INDUCTOR)
        found = torch.autograd.grad(call(*inputs), inputs)
    for got, expected in zip(found, wanted, strict=True):
        assert (got - expected).norm() < 1e-6 * expected.norm()
    assert not _subgraphs(texts)

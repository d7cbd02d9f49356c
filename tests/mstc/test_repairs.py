"""What PyTorch gets wrong by itself is right under ours."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._inductor.codegen.cpp import CppTile2DKernel
from torch._inductor.compile_fx import compile_fx_inner
from torch.fx.experimental.proxy_tensor import make_fx

from mstc import repairs
from passes.shared import share_equal_runs
from tests.models import INDUCTOR, fresh_compiler  # noqa: F401  (an autouse fixture)
from tests.passes.test_shared import loop

HEADS, SIZE = 4, 32


def multi_query(qkv: Tensor) -> Tensor:
    """Falcon's attention: one key and one value for all heads, picked by a list."""
    qkv = qkv.unflatten(-1, (HEADS + 2, SIZE))
    q, k, v = (x.transpose(1, 2) for x in (qkv[..., :-2, :], qkv[..., [-2], :], qkv[..., [-1], :]))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


def gradient(call: Callable[[Tensor], Tensor], x: Tensor, weights: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (call(x) * weights.to(x.dtype)).sum().backward()
    assert x.grad is not None
    return x.grad


@pytest.mark.usefixtures("two_threads")  # with one, Inductor needs no atomic additions
@pytest.mark.parametrize("backend", ["inductor", "mst"])
def test_rows_picked_by_a_list(backend: str) -> None:
    if backend == "inductor":
        repairs.mend()  # as the first graph of ours does
    torch.manual_seed(0)
    x = torch.randn(1, 64, (HEADS + 2) * SIZE)
    weights = torch.randn(1, 64, HEADS * SIZE)
    wanted = gradient(multi_query, x.double(), weights)
    options = INDUCTOR if backend == "mst" else None
    found = gradient(torch.compile(multi_query, backend=backend, options=options), x, weights)
    assert (found - wanted).norm() < 1e-5 * wanted.norm()


def test_mending_twice_changes_nothing() -> None:
    repairs.mend()
    before = CppTile2DKernel.transform_indexing
    repairs.mend()
    assert CppTile2DKernel.transform_indexing is before


def test_results_of_shared_code_share_no_memory() -> None:
    """Inductor makes ``cat`` of all parts of a split the value itself, and then two results are one
    buffer, of which the caller takes the first for another's."""

    def run(x: Tensor, *weights: Tensor) -> list[Tensor]:
        kept = []
        for i, weight in enumerate(weights):
            wide = (x @ weight).relu()
            kept.append(torch.cat(torch.ops.aten.split_with_sizes(wide, [4, 4], -1), -1))
            made, _ = loop(kept[-1])
            x = wide.sin() + made if i == len(weights) - 1 else wide + made
        return [x.tanh(), *kept]

    repairs.mend()
    inputs = [torch.randn(64, 8), *(torch.randn(8, 8) / 3 for _ in range(4))]
    module = make_fx(run, tracing_mode="fake")(*inputs)
    wanted = module(*inputs)
    assert share_equal_runs(module, min_runs=2, min_ops=1) >= 2
    fakes = [n.meta["val"] for n in module.graph.nodes if n.op == "placeholder"]
    context = TracingContext(fakes[0].fake_mode)
    with tracing(context), torch._inductor.config.patch(fx_graph_cache=False):
        compiled = compile_fx_inner(module, fakes)
    assert callable(compiled)
    for found, expected in zip(compiled(list(inputs)), wanted, strict=True):
        torch.testing.assert_close(found, expected)

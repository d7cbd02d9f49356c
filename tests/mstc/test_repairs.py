"""What PyTorch gets wrong by itself is right under ours."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.codegen.cpp import CppTile2DKernel

from mstc import repairs
from tests.models import INDUCTOR, fresh_compiler  # noqa: F401  (an autouse fixture)

HEADS, SIZE = 4, 32


def multi_query(qkv: Tensor) -> Tensor:
    """Falcon's attention: one key and one value for all heads, picked by a list."""
    qkv = qkv.unflatten(-1, (HEADS + 2, SIZE))
    q, k, v = (x.transpose(1, 2) for x in (qkv[..., :-2, :], qkv[..., [-2], :], qkv[..., [-1], :]))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


def gradient(call: object, x: Tensor, weights: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (call(x) * weights.to(x.dtype)).sum().backward()  # type: ignore[operator]
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

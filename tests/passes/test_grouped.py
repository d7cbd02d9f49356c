"""Products by groups in any dtype: values, gradients, odd groups; put in place of others' ops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule, symbolic_trace

from passes.grouped import grouped_mm, replace_grouped

ENDS = [
    pytest.param([2, 5, 9], id="plain"),
    pytest.param([0, 9, 9], id="empty groups"),
    pytest.param([0, 0, 0], id="no rows in any group"),
    pytest.param([1, 4, 7], id="rows after the last group"),
]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def operands(ends: list[int], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Nine rows, three groups; whole numbers, which every dtype multiplies exactly."""
    a, b = torch.randint(-2, 3, (9, 4)).to(dtype), torch.randint(-2, 3, (3, 4, 5)).to(dtype)
    return a, b, torch.tensor(ends, dtype=torch.int32)


def by_hand(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    out = torch.zeros(len(a), b.shape[2], dtype=a.dtype)
    for row in range(len(a)):
        group = int((ends <= row).sum())
        if group < len(b):
            out[row] = a[row] @ b[group]
    return out


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(ends: list[int], dtype: torch.dtype):
    a, b, offs = operands(ends, dtype)
    product = grouped_mm(a, b, offs)
    assert product.dtype == dtype
    torch.testing.assert_close(product, by_hand(a, b, offs), rtol=0, atol=0)


@pytest.mark.parametrize("ends", ENDS)
def test_gradients(ends: list[int]):
    a, b, offs = operands(ends)
    transposed = b.mT.contiguous().mT  # as libraries pass their weights
    for weights in (b, transposed):
        inputs = (a.clone().requires_grad_(), weights.detach().requires_grad_())
        assert torch.autograd.gradcheck(lambda x, w: grouped_mm(x, w, offs), inputs)


@pytest.mark.parametrize("of", ["rows", "weights"])
def test_gradient_of_one_alone(of: str):
    a, b, offs = operands([2, 5, 9])
    (a if of == "rows" else b).requires_grad_()
    grouped_mm(a, b, offs).sum().backward()
    assert (a.grad is None, b.grad is None) == (of != "rows", of != "weights")


@pytest.mark.parametrize("offs_dtype", [torch.int32, torch.int64], ids=str)
def test_op_is_well_behaved(offs_dtype: torch.dtype):
    a, b, offs = operands([2, 5, 9])
    offs = offs.to(offs_dtype)
    torch.library.opcheck(grouped_mm, (a.requires_grad_(), b.requires_grad_(), offs))
    torch.library.opcheck(grouped_mm, (a.detach().t(), a.detach() * 2, offs))


def test_dims_that_have_no_meaning():
    _, b, offs = operands([2, 5, 9])
    with pytest.raises(ValueError, match="of 3 and 3 dims"):
        grouped_mm(b, b, offs)


def test_second_derivatives_say_so():
    a, b, offs = operands([2, 5, 9])
    a.requires_grad_()
    b.requires_grad_()
    (grad,) = torch.autograd.grad(grouped_mm(a, b, offs).square().sum(), b, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        grad.sum().backward()


def test_others_are_replaced():
    pytest.importorskip("transformers.integrations.moe")
    if not hasattr(torch.ops.transformers, "grouped_mm_fallback"):
        pytest.skip("an older transformers, without grouped products")
    theirs = torch.ops.transformers.grouped_mm_fallback

    def calls(op: object) -> GraphModule:
        return symbolic_trace(lambda a, b, offs: op(a, b, offs) * 2)  # pyright: ignore

    for op in (theirs, theirs.default):
        gm = calls(op)
        inputs = operands([2, 5, 9])
        before = gm(*inputs)
        assert replace_grouped(gm) == 1
        assert next(n.target for n in gm.graph.nodes if n.op == "call_function") is grouped_mm
        torch.testing.assert_close(gm(*inputs), before, rtol=0, atol=0)
        assert replace_grouped(gm) == 0

"""``buffer += left @ right`` for operands narrower than the buffer, without rounding the product.

Three ways, the best that the device has:

    accumulate  ``addmm`` with ``out_dtype``: added in the buffer's precision, in place.
    multiply    ``mm`` with ``out_dtype``, then an addition: one more buffer of the product's size.
    cast        the operands are widened first: works everywhere.
"""

from __future__ import annotations

import functools
from typing import Literal

import torch
from torch import Tensor

Way = Literal["accumulate", "multiply", "cast"]


def add_product(buffer: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Add a matrix product to `buffer`, in place.

    Args:
        buffer: ``[m, n]`` in `dtype`; None makes a new one.
        left: ``[m, k]``.
        right: ``[k, n]``, of the dtype and device of `left`.
        dtype: in which to multiply, add and keep.

    Returns:
        the buffer.
    """
    if left.dtype == dtype:
        return torch.mm(left, right) if buffer is None else buffer.addmm_(left, right)
    return _WAYS[best_way(left.device, left.dtype, dtype)](buffer, left, right, dtype)


def _accumulate(buffer: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    if buffer is None:
        return torch.mm(left, right, out_dtype=dtype)
    return torch.ops.aten.addmm.dtype_out(buffer, left, right, dtype, out=buffer)


def _multiply(buffer: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    product = torch.mm(left, right, out_dtype=dtype)
    return product if buffer is None else buffer.add_(product)


def _cast(buffer: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    left, right = left.to(dtype), right.to(dtype)
    return torch.mm(left, right) if buffer is None else buffer.addmm_(left, right)


_WAYS = {"accumulate": _accumulate, "multiply": _multiply, "cast": _cast}


@functools.cache
def best_way(device: torch.device, narrow: torch.dtype, wide: torch.dtype) -> Way:
    """What a device offers depends on its kind and on the version of PyTorch: asked by trying."""
    operand = torch.ones(16, 16, dtype=narrow, device=device)
    ways: tuple[Way, ...] = ("accumulate", "multiply")
    for way in ways:
        try:
            _WAYS[way](torch.zeros(16, 16, dtype=wide, device=device), operand, operand, wide)
        except (RuntimeError, NotImplementedError):
            continue
        return way
    return "cast"

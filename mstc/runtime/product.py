"""``buffer += left @ right`` for operands narrower than the buffer, without rounding the product.

Three ways, the best that the device has:

    accumulate  ``addmm`` with ``out_dtype``: added in the buffer's precision, in place.
    multiply    ``mm`` with ``out_dtype``, then an addition: one more buffer of the product's size.
    cast        the operands are widened first, the left one a block of rows at a time (it may be
                the gradient of a chunk's logits): works everywhere.
"""

from __future__ import annotations

import functools
from typing import Literal

import torch
from torch import Tensor

_BLOCK_BYTES = 2**20  # of a widened left operand: stays in the cache of a core

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
    right = right.to(dtype)
    keep = 0 if buffer is None else 1
    if buffer is None:
        buffer = right.new_empty(left.shape[0], right.shape[1])
    rows = max(_BLOCK_BYTES // max(left.shape[1] * dtype.itemsize, 1), 1)
    for start in range(0, left.shape[0], rows):
        block = buffer[start : start + rows]
        block.addmm_(left[start : start + rows].to(dtype), right, beta=keep)
    return buffer


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

"""Products that the loop makes itself, into buffers of its own.

Of ``buffer += left @ right`` for operands narrower than the buffer there are four ways; the best
that the device has is taken:

    accumulate  ``addmm`` with ``out_dtype``: added in the buffer's precision, in place.
    multiply    ``mm`` with ``out_dtype``, then an addition: one more buffer of the product's size.
    round       the product has its operands' type, and is added in the buffer's, a block of rows at
                a time. For processors that multiply in bfloat16 but have no such product with a
                wider result: three to four times as fast there as widening the operands.
    cast        the operands are widened first, the left one a block of rows at a time (it may be
                the gradient of a chunk's logits): works everywhere.

Why rounding a chunk's product is no worse than what it replaces: a plain compile rounds the product
of all chunks once, by up to half a unit of its last place. Here each chunk's is rounded by up to
half a unit of its own, and these errors are independent. Where chunks add up, together they are
smaller than one rounding of the whole; where signs are random, as large. Where chunks cancel they
are larger, but so is what the rounding of the operands' entries has done by then: together up to
sqrt(2) times the error of a plain compile. Not for float16, in which one chunk's product can
overflow where the sum does not.

Not used: oneDNN's float32 product in bfloat16 steps (exact for such operands, and 0.6 of the time
of `cast`), because its switch, ``torch.backends.mkldnn.matmul.fp32_precision``, is the process's:
for a moment, the float32 products of other threads would be less exact.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

_BLOCK_BYTES = 2**20  # of what is made beside the buffer: stays in the cache of a core

Way = Literal["accumulate", "multiply", "round", "cast"]
Only = Callable[[list[slice]], list[slice]]


def add_product(
    buffer: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype, *, only: Only = list
) -> Tensor:
    """Add a matrix product to `buffer`, in place.

    Args:
        buffer: ``[m, n]`` in `dtype`; None makes a new one.
        left: ``[m, k]``.
        right: ``[k, n]``, of the dtype and device of `left`.
        dtype: in which to multiply, add and keep.
        only: chooses among the blocks of rows, for simulation.

    Returns:
        the buffer.
    """
    if left.dtype == dtype:
        return torch.mm(left, right) if buffer is None else buffer.addmm_(left, right)
    way = best_way(left.device, left.dtype, dtype)
    return _WAYS[way](buffer, left, right, dtype, only)


def write_products(target: Tensor, terms: Sequence[Sequence[Tensor]]) -> None:
    """Write a sum of matrix products, without a buffer beside.

    Args:
        target: ``[m, n]``, in the operands' dtype.
        terms: of each the operands, ``[m, k]`` and ``[k, n]``; of the first one perhaps a bias of
            ``[n]`` before.
    """
    first, *others = terms
    if len(first) > 2:
        bias, left, right = first
        torch.addmm(bias, left, right, out=target)
    else:
        torch.mm(*first, out=target)
    for left, right in others:
        target.addmm_(left, right)


def _accumulate(
    buffer: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype, only: Only
) -> Tensor:
    if buffer is None:
        return torch.mm(left, right, out_dtype=dtype)
    return torch.ops.aten.addmm.dtype_out(buffer, left, right, dtype, out=buffer)


def _multiply(
    buffer: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype, only: Only
) -> Tensor:
    product = torch.mm(left, right, out_dtype=dtype)
    return product if buffer is None else buffer.add_(product)


def _round(
    buffer: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype, only: Only
) -> Tensor:
    keep = buffer is not None
    if buffer is None:
        buffer = right.new_empty(left.shape[0], right.shape[1], dtype=dtype)
    for rows in only(_blocks(left.shape[0], right.shape[1] * right.itemsize)):
        product = torch.mm(left[rows], right)
        _ = buffer[rows].add_(product) if keep else buffer[rows].copy_(product)
    return buffer


def _cast(
    buffer: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype, only: Only
) -> Tensor:
    right = right.to(dtype)
    keep = 0 if buffer is None else 1
    if buffer is None:
        buffer = right.new_empty(left.shape[0], right.shape[1])
    for rows in only(_blocks(left.shape[0], left.shape[1] * dtype.itemsize)):
        buffer[rows].addmm_(left[rows].to(dtype), right, beta=keep)
    return buffer


def _blocks(rows: int, row_nbytes: int) -> list[slice]:
    step = max(_BLOCK_BYTES // max(row_nbytes, 1), 1)
    return [slice(start, start + step) for start in range(0, rows, step)]


_WAYS = {"accumulate": _accumulate, "multiply": _multiply, "round": _round, "cast": _cast}


@functools.cache
def best_way(device: torch.device, narrow: torch.dtype, wide: torch.dtype) -> Way:
    """What a device offers depends on its kind and on the version of PyTorch: asked by trying.

    A device that this machine does not have, as in a simulation, is taken to offer the best.
    """
    ways: tuple[Way, ...] = ("accumulate", "multiply")
    with _disable_current_modes():  # a simulation asks under fake tensors, which can do anything
        if not _is_here(device):
            return ways[0]
        for way in ways:
            try:
                operand = torch.ones(16, 16, dtype=narrow, device=device)
                buffer = torch.zeros(16, 16, dtype=wide, device=device)
                _WAYS[way](buffer, operand, operand, wide, list)
            except RuntimeError:  # this device has no such product
                continue
            return way
    return "round" if device.type == "cpu" and _multiplies_in(narrow) else "cast"


def _is_here(device: torch.device) -> bool:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):  # no driver, no device; a build without its kernels
        return False
    return True


def _multiplies_in(dtype: torch.dtype) -> bool:
    """Whether the processor has instructions for it; elsewhere oneDNN widens, as `_cast` does."""
    features = torch.cpu._is_avx512_bf16_supported, torch.cpu._is_amx_tile_supported
    return dtype == torch.bfloat16 and any(has() for has in features)

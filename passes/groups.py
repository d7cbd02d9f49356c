"""Sums over very many chunks are added up in two steps: in groups of chunks, then the groups.

Rounding of a running sum grows with the root of the number of its terms. A matrix product over the
whole axis is such a sum too (of blocks that fit a cache), so that a loop's sum of a few dozen
chunks is as near to the exact one; that of hundreds is not. In two steps, of which each has the
root of the number of terms, it is nearer (Higham, The accuracy of floating point summation, 1993:
blocked summation).

It takes a second buffer, so it is done where that is small beside what the loop reads and makes
along its axis. Only float32 has something to gain: float64 has digits to spare, and in low
precision the rounding of a chunk's operands is larger than all that adding does.
"""

from __future__ import annotations

import math

MANY = 32  # chunks; up to here a running sum was measured to be no further off than one product
_SHARE = 8  # the second buffers take at most one of so many parts of what is along the axis


def group_size(num_chunks: int, sums_nbytes: int, split_nbytes: int) -> int:
    """How many chunks are added up before they join the others; 0: each joins by itself.

    Args:
        num_chunks: of the loop.
        sums_nbytes: of the sums that have something to gain; their second buffers take as much.
        split_nbytes: of the loop's inputs and outputs that have the loop axis.
    """
    if num_chunks <= MANY or _SHARE * sums_nbytes > split_nbytes:
        return 0
    return math.isqrt(num_chunks)

"""A step of another length, computed from a simulated one; the longest that fits.

Terms
    probe     a length by which the sizes of buffers tell how they grow: it has a prime factor that
              no dim of the model has.

Algorithm
    1. One step is simulated, of a probe's length. A buffer whose bytes the length divides grows
       with it, one that its square divides (a mask) with the square, one that the length plus or
       less one divides (labels that are padded, logits that are sliced, to shift them) with that;
       any other one stays. The loops' chunks have as many rows at any length.
    2. With these sizes the same events give the peak of any length, hence the longest that fits.
    3. That length is simulated, too, and is the answer if it is what was computed. Otherwise
       (something is decided by the length) lengths are tried one after another, where the line
       through the nearest known ones meets the room.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import accumulate

from torch import nn

from mstc.watch import SimulatedTrace

GRAIN = 1024  # tokens, to which an answer is rounded down
MOST = 1 << 26  # tokens; nobody asks for more
_PRIMES = (13, 11, 17, 19, 23, 29, 31, 37, 41, 43)


def probe_of(model: nn.Module, rows: int, others: Iterable[int] = ()) -> int | None:
    """A length that is a multiple of `rows` and tells itself from the dims of a model.

    Args:
        model: whose parameters' and buffers' dims are not to be mistaken for it.
        rows: of a chunk.
        others: further sizes, as that of the batch.

    Returns:
        None if the first few primes are all taken.
    """
    tensors = [*model.parameters(), *model.buffers()]
    taken = {size for tensor in tensors for size in tensor.shape} | set(others)
    free = (p for p in _PRIMES if all(size % p for size in taken if size))
    return next((p * rows for p in free), None)


def grown(nbytes: int, own: int, other: int) -> int:
    """The bytes that a buffer of a step of `own` tokens has in one of `other`; `own` is a probe."""
    if nbytes % (own * own) == 0:
        return nbytes // (own * own) * other * other
    off = next((one for one in (0, 1, -1) if nbytes % (own + one) == 0), None)
    return nbytes if off is None else nbytes // (own + off) * (other + off)


def at_length(trace: SimulatedTrace, own: int, other: int) -> SimulatedTrace:
    """A step of `other` tokens, computed from one of `own`; `own` is a probe."""
    buffers = tuple(
        replace(
            buffer,
            nbytes=grown(buffer.nbytes, own, other),
            grad_nbytes=grown(buffer.grad_nbytes, own, other),
        )
        for buffer in trace.buffers
    )
    made = replace(trace, buffers=buffers)
    whole = made.summit(0, len(made.changes))
    totals = list(accumulate((change.nbytes for change in made.changes), initial=0))
    return replace(
        made,
        peak_nbytes=whole.peak_nbytes,
        peak_intermediate_nbytes=whole.peak_intermediate_nbytes,
        grad_nbytes=sum(buffer.grad_nbytes for buffer in buffers),
        end_nbytes=totals[-1],
        timeline=tuple((time, n) for (time, _), n in zip(trace.timeline, totals, strict=True)),
    )


def longest_computed(step: Callable[[int], int], room: int, floor: Callable[[int], int]) -> int:
    """The longest length whose computed step has room; 0 if none has.

    Args:
        step: bytes of the step of a length; no fewer for a longer one.
        room: bytes.
        floor: rounds a length down to one that is allowed.
    """
    low, high = 0, GRAIN
    while high < MOST and step(high) <= room:
        low, high = high, 2 * high
    while high - low > GRAIN:
        middle = (low + high) // 2 // GRAIN * GRAIN
        low, high = (middle, high) if step(middle) <= room else (low, middle)
    return floor(low)


def longest_tried(step: Callable[[int], int], room: int, least: int, first: int) -> int | None:
    """The longest length, a multiple of `GRAIN`, whose step has room; a `GRAIN` more has none.

    Args:
        step: bytes of the step of a length; it may be asked for the same one again.
        room: bytes.
        least: of a step without tokens, about: where the line through one length begins.
        first: the length to try first.
    """
    low, low_bytes = 0, least
    slope = 0.0  # bytes per token, of the line that is followed as long as lengths fit
    high, high_bytes = first, step(first)
    while high_bytes <= room:
        if high >= MOST:
            return high
        slope = (high_bytes - low_bytes) / (high - low)
        low, low_bytes = high, high_bytes
        further = int((room - low_bytes) / slope) if slope > 0 else MOST
        high = _grains(min(low + further, 8 * low, MOST), low + GRAIN, MOST)
        high_bytes = step(high)
    halve = False
    while (width := high - low) > GRAIN:
        # nearly linear in between: where the line meets the room; half the way if that gains little
        share = 0.5 if halve else (room - low_bytes) / max(high_bytes - low_bytes, 1)
        guess = low + int(width * min(max(share, 0), 1))
        middle = _grains(guess, low + GRAIN, high - GRAIN)
        found = step(middle)
        if found <= room:
            low, low_bytes = middle, found
        else:
            high, high_bytes = middle, found
        halve = not halve and high - low > width / 2
    return low or None


def _grains(length: int, least: int, most: int) -> int:
    return min(max(GRAIN * (length // GRAIN), least), most)

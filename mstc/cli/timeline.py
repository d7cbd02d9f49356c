"""The timeline of a simulated step as plain data, for the page of `mstc report`.

A page cannot show a hundred thousand buffers, and nobody could point at them: those that stand at
the peak, then those that take most bytes for longest, are each by itself; the others are one band.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from mstc.watch import Buffer, SimulatedTrace

DRAWN = 1000  # buffers that are each by itself
KINDS = ("kept", "chunk", "passing", "gradient")  # of buffers: see `kind`


def data_of(trace: SimulatedTrace) -> dict[str, Any]:
    """What the timeline is drawn from; texts are kept once, and named by their number."""
    texts: dict[str, int] = {}
    shown = sorted(_most_visible(trace), key=lambda b: b.born)
    return {
        "peak": trace.peak_nbytes,
        "intermediate": trace.peak_intermediate_nbytes,
        "peak_time": trace.peak_time,
        "backward": trace.backward,
        "times": [time for time, _ in trace.timeline],
        "totals": [nbytes for _, nbytes in trace.timeline],
        "loops": [[s.start, s.end, s.name or "a region", s.num_chunks] for s in trace.loops],
        "kinds": _by_kind(trace),
        "count": len(trace.buffers),
        "buffers": [
            [
                *(b.nbytes, b.grad_nbytes, b.born, b.dies),
                *(texts.setdefault(text, len(texts)) for text in what(b, trace)),
                *(b.loop, b.is_result, KINDS.index(kind(b, trace))),
            ]
            for b in shown
        ],
        "texts": list(texts),
    }


def _most_visible(trace: SimulatedTrace) -> Sequence[Buffer]:
    """Those that stand at the peak, then by bytes and time."""
    end = len(trace.timeline)

    def area(b: Buffer) -> tuple[bool, float]:
        return b.is_alive(trace.peak_time), b.nbytes * (
            (end if b.dies is None else b.dies) - b.born
        )

    return sorted(trace.buffers, key=area, reverse=True)[:DRAWN]


def what(buffer: Buffer, trace: SimulatedTrace) -> tuple[str, str]:
    """What made a buffer, and "file:line  code" of the user; in a loop, the line the loop is of."""
    if buffer.loop is None:
        return buffer.made_by or "?", buffer.source
    op, _, source = trace.loops[buffer.loop].name.partition(" at ")
    made = "result of the loop" if buffer.is_result else f"{buffer.made_by}, a chunk in the loop"
    return f"{made} of {op or 'a region'}", source


def kind(buffer: Buffer, trace: SimulatedTrace) -> str:
    """One of `KINDS`: a gradient, a chunk's value inside a loop, what the forward keeps for the
    backward, or what comes and goes within one of them."""
    if buffer.grad_nbytes:
        return "gradient"
    if buffer.loop is not None and not buffer.is_result:
        return "chunk"
    outlives = buffer.dies is None or buffer.dies > trace.backward
    return "kept" if buffer.born < trace.backward and outlives else "passing"


def _by_kind(trace: SimulatedTrace) -> list[int]:
    """Bytes of each kind at the peak of intermediate memory, gradients too."""
    found: Counter[str] = Counter()
    for buffer in trace.buffers:
        if buffer.is_alive(trace.peak_time):
            found[kind(buffer, trace)] += buffer.nbytes
    return [found[kind] for kind in KINDS]

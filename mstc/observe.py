"""What hangs on the pipeline between passes: time it, log it, dump it.

Passes know nothing of it. Dumps go to `torch._logging.trace_structured`, so tlparse shows them
beside PyTorch's own.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from torch._logging import trace_structured  # the log that tlparse reads

from passes.axes import Axes
from passes.chunk import ChunkedGraph
from passes.records import Plan, Refusal, Region, Rewrite

log = logging.getLogger(__name__)


class Observer:
    """Called after each pass with its name and result; keeps the seconds that each took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()
        self._step = 0

    def __call__(self, name: str, value: object) -> None:
        now = time.perf_counter()
        self.seconds[name] = now - self._since
        self._step += 1
        log.debug("%s: %.3f s", name, self.seconds[name])
        if log.isEnabledFor(logging.DEBUG):
            log.debug("%s", _describe(value))
        dump(f"mst_{self._step:02d}_{name}", lambda: _describe(value))
        self._since = time.perf_counter()


def dump(name: str, text: Callable[[], str], encoding: str = "string") -> None:
    """An artifact for tlparse; costs nothing when no trace is written."""
    trace_structured(
        "artifact", metadata_fn=lambda: {"name": name, "encoding": encoding}, payload_fn=text
    )


def _describe(value: object) -> str:
    if isinstance(value, Axes):
        return f"{len(value.table.sizes)} axes"
    if isinstance(value, ChunkedGraph):
        return str(value.graph)
    if isinstance(value, Plan):
        return "\n".join(
            f"{p.mode}: {p.num_chunks} x {p.chunk} along axis {p.region.axis}, seed {p.region.seed}"
            for p in value.loops
        )
    if isinstance(value, tuple):
        lines: list[str] = []
        for item in value:
            for entry in item if isinstance(item, list) else [item]:
                if isinstance(entry, Region):
                    lines.append(
                        f"region: seed {entry.seed}, axis {entry.axis} of {entry.length}, "
                        f"{entry.inside_bytes} bytes inside,"
                        f" {len(entry.forward)} forward and {len(entry.backward)} backward nodes"
                    )
                elif isinstance(entry, Refusal):
                    lines.append(f"refused: {entry}")
                elif isinstance(entry, Rewrite):
                    lines.append(f"gone: {entry.subject}, {entry.nbytes} bytes: {entry.reason}")
        return "\n".join(lines)
    return str(value)

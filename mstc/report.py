"""What was found, planned and refused, as text and as JSON.

A report covers one compiled model call: one `GraphReport` per joint (or inference) graph, in order
of compilation. `last_report` gives the latest; `explain` makes one for a model call.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from torch.fx import Node

from mstc.errors import FallbackWarning
from mstc.plans import write_plan
from passes.records import FixedLoop, Mode, Plan, Refusal, Rewrite
from passes.source import op_name, source_of

log = logging.getLogger(__name__)

_TABLE_ROWS = 12


@dataclass(frozen=True)
class TableRow:
    """One kind of value at the peak; equal values of equal layers share a row."""

    op: str
    source: str  # "file:line  code" of the user
    nbytes: int  # together
    count: int


@dataclass(frozen=True)
class LoopReport:
    """One loop, or several equal ones."""

    seed: str
    source: str
    mode: str
    axis_length: int  # positions
    chunk: int  # positions
    num_chunks: int
    inside_bytes: int  # of values that exist a chunk at a time only, together
    count: int  # equal layers
    along_weights: bool = False  # hidden features or heads instead of tokens


@dataclass(frozen=True)
class GraphReport:
    """One graph."""

    kind: str  # "training" or "inference"
    peak_before: int  # predicted bytes above parameters, inputs and gradients
    peak_after: int
    table: tuple[TableRow, ...]  # what stands at the peak before
    table_after: tuple[TableRow, ...]
    loops: tuple[LoopReport, ...]
    rewrites: tuple[Rewrite, ...]
    refusals: tuple[Refusal, ...]
    floor: int  # predicted bytes with these loops and chunks of nothing
    flops: int  # of products, attention and convolutions in a step without loops
    extra_work: float  # multiplications that loops do a second time, as a share of the step's
    relative_time: float | None  # predicted, of Inductor's; None where nothing is known
    note: str = ""

    @property
    def untouched(self) -> bool:
        return not self.loops and not self.rewrites


@dataclass
class Report:
    """One call of the backend: one Dynamo graph."""

    graphs: list[GraphReport] = field(default_factory=list)
    deferred: list[str] = field(default_factory=list)  # outputs that left the graph
    refusals: list[Refusal] = field(
        default_factory=list
    )  # outputs that did not, bodies that fell back
    notes: list[str] = field(default_factory=list)

    @property
    def relative_time(self) -> float | None:
        """Predicted, of Inductor's, over all graphs; None where nothing is known."""
        total = sum(graph.flops for graph in self.graphs)
        times = [graph.relative_time for graph in self.graphs]
        if not total or None in times:
            return None
        return sum(g.flops * t for g, t in zip(self.graphs, times, strict=True) if t) / total

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)

    def fixed_loops(self) -> tuple[FixedLoop, ...]:
        """The plan: the loops of all graphs, equal ones once."""
        found = (
            FixedLoop(
                loop.seed,
                loop.source,
                cast("Mode", loop.mode),
                loop.axis_length,
                loop.chunk,
                loop.along_weights,
            )
            for graph in self.graphs
            for loop in graph.loops
        )
        return tuple(dict.fromkeys(found))

    def save_plan(self, path: str | Path) -> None:
        """Write the loops to a file, for ``options={"plan": path}``.

        Raises:
            OSError: the file cannot be written.
        """
        write_plan(self.fixed_loops(), path)

    @staticmethod
    def from_json(entry: Mapping[str, Any]) -> Report:
        """What `to_json` wrote, parsed.

        Raises:
            KeyError, TypeError: fields are missing, or unknown.
        """
        return Report(
            graphs=[_graph_from_json(g) for g in entry["graphs"]],
            deferred=list(entry["deferred"]),
            refusals=[Refusal(**r) for r in entry["refusals"]],
            notes=list(entry["notes"]),
        )

    def __str__(self) -> str:
        return render(self)


def _graph_from_json(entry: Mapping[str, Any]) -> GraphReport:
    def rows(name: str, kind: Callable[..., Any]) -> tuple[Any, ...]:
        return tuple(kind(**row) for row in entry[name])

    fields: dict[str, Any] = dict(entry) | {
        "table": rows("table", TableRow),
        "table_after": rows("table_after", TableRow),
        "loops": rows("loops", LoopReport),
        "rewrites": rows("rewrites", Rewrite),
        "refusals": rows("refusals", Refusal),
    }
    return GraphReport(**fields)


def _rows(plan: Plan, *, after: bool) -> tuple[TableRow, ...]:
    live = plan.after if after else plan.before
    sums: Counter[tuple[str, str]] = Counter()
    counts: Counter[tuple[str, str]] = Counter()
    for buffer in live.at(live.peak_step):
        sums[(buffer.op, buffer.source)] += buffer.nbytes
        counts[(buffer.op, buffer.source)] += 1
    return tuple(
        TableRow(op, src, n, counts[(op, src)]) for (op, src), n in sums.most_common(_TABLE_ROWS)
    )


def graph_report(plan: Plan, *, training: bool, note: str = "") -> GraphReport:
    """The report of one plan."""
    loops: dict[tuple[Any, ...], list[int]] = {}
    for loop in plan.loops:
        region = loop.region
        key = (
            op_name(region.seed),
            source_of(region.seed),
            loop.mode,
            region.length,
            loop.chunk,
            loop.num_chunks,
            region.along_weights,
        )
        loops.setdefault(key, []).append(region.inside_bytes)
    return GraphReport(
        kind="training" if training else "inference",
        peak_before=plan.peak_before,
        peak_after=plan.peak_after,
        table=_rows(plan, after=False),
        table_after=_rows(plan, after=True),
        loops=tuple(
            LoopReport(*key, inside_bytes=sum(sizes), count=len(sizes), along_weights=along)
            for (*key, along), sizes in loops.items()
        ),
        rewrites=plan.rewrites,
        refusals=plan.refusals,
        floor=plan.floor,
        flops=plan.flops,
        extra_work=plan.extra_work,
        relative_time=plan.relative_time,
        note=note,
    )


def subject_of(node: Node) -> str:
    """The op, and the user's line that it comes from."""
    source = source_of(node)
    return f"{op_name(node)} at {source}" if source else op_name(node)


def fall_back(error: Exception, report: Report) -> None:
    """Say that a pass failed; the graph stays as it is."""
    log.debug("a pass failed", exc_info=error)
    report.notes.append(f"a graph was left as it was: {type(error).__name__}: {error}")
    warnings.warn(
        f'backend="mst" left a graph as it was, because a pass failed '
        f"({type(error).__name__}: {error}). "
        "Training goes on as with Inductor. Please report this.",
        FallbackWarning,
        stacklevel=3,
    )


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:.1f} MiB"


def render(report: Report) -> str:
    """A report as text, for a terminal."""
    lines: list[str] = []
    for output in report.deferred:
        lines.append(f"deferred: {output}")
    for number, graph in enumerate(report.graphs):
        lines.append(f"graph {number} ({graph.kind})")
        if graph.note:
            lines.append(f"  {graph.note}")
        if graph.untouched:
            lines.append(f"  predicted peak {_mib(graph.peak_before)}; left untouched")
        else:
            time = graph.relative_time
            lines.append(
                f"  predicted peak {_mib(graph.peak_before)} -> {_mib(graph.peak_after)}, "
                f"{graph.peak_after / max(1, graph.floor):.2f}x of the floor "
                f"({_mib(graph.floor)}: what stays whatever the chunks), "
                f"{graph.extra_work:.0%} of the multiplications done twice"
                + ("" if time is None else f", predicted time {time:.2f}x")
            )
        lines.append(
            "  intermediate memory at the peak, before"
            + ("" if graph.untouched else " (and after)")
        )
        tables = [graph.table] if graph.untouched else [graph.table, graph.table_after]
        for table in tables:
            for row in table:
                many = f" x{row.count}" if row.count > 1 else ""
                lines.append(f"    {_mib(row.nbytes):>12}  {row.op + many:<28} {row.source}")
            lines.append("    --")
        for loop in graph.loops:
            many = f" x{loop.count}" if loop.count > 1 else ""
            lines.append(
                f"  loop{many}: {loop.num_chunks} chunks of {loop.chunk} "
                f"along an axis of {loop.axis_length}{' of the weights' * loop.along_weights}, "
                f"{loop.mode}, {_mib(loop.inside_bytes)} of values a chunk at a time"
            )
            lines.append(f"    from {loop.seed} at {loop.source}")
        for rewrite in graph.rewrites:
            where = f" at {rewrite.source}" if rewrite.source else ""
            lines.append(
                f"  gone ({_mib(rewrite.nbytes)}): {rewrite.subject}{where}: {rewrite.reason}"
            )
        for refusal in graph.refusals:
            lines.append(f"  refused ({_mib(refusal.nbytes)}): {refusal}")
    for refusal in report.refusals:
        lines.append(f"refused ({_mib(refusal.nbytes)}): {refusal}")
    lines.extend(f"note: {note}" for note in report.notes)
    return "\n".join(lines) if lines else "nothing was compiled yet"

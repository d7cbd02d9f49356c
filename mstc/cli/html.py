"""What `mstc report` writes: one HTML file that needs nothing else, no network and no server.

The figures and tables are in the page as text, so they are there without JavaScript; the timeline
is drawn by the scripts in `page/` from JSON in the page (`mstc.cli.timeline`). Names, paths and
lines of code come from elsewhere: they are escaped here, and only ever set as text there. A policy
in the page forbids every request, and every script but ours.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

from mstc.cli.subject import DTYPES, Subject, SubjectError, Wanted
from mstc.cli.text import size
from mstc.cli.timeline import data_of, what
from mstc.report import LoopReport, Report
from mstc.version import VERSION
from mstc.watch import SimulatedTrace
from mstc.whole import whole_file

_SCRIPTS = ("layout.js", "draw.js", "tell.js", "actions.js")  # in one scope, in this order
_ROWS = 8  # of the table of what stands at the peak


def path_of(out: Path) -> Path:
    """The file.

    Raises:
        SubjectError: another ending, or a folder that is not there or not to be written to.
    """
    if out.suffix not in (".html", ".htm"):
        raise SubjectError(f"--out {out}: it must end in .html.")
    if not out.parent.is_dir():
        raise SubjectError(f"--out {out}: there is no folder {out.parent}.")
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise SubjectError(f"{out} cannot be written.")
    return out


def write(path: Path, text: str) -> None:
    """Write the page, whole or not at all.

    Raises:
        SubjectError: it cannot be written.
    """
    try:
        with whole_file(path) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SubjectError(f"{path} cannot be written: {error.strerror}.") from error


def page(
    subject: Subject, wanted: Wanted, traces: Mapping[str, SimulatedTrace], report: Report
) -> str:
    """The report of one model, as HTML."""
    script = "".join(map(_file, _SCRIPTS))
    script = f'(() => {{\n"use strict";\n{script}}})();'
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    kind = type(subject.model).__name__
    return Template(_file("report.html")).substitute(
        title=escape(f"{kind}, {wanted.batch_size} x {wanted.seq_len:,} tokens"),
        digest=digest,
        style=_file("report.css"),
        script=script,
        data=_json({name: data_of(trace) for name, trace in traces.items()}),
        kind=escape(kind),
        name=escape(subject.name),
        facts="".join(f"<li>{escape(fact)}</li>" for fact in _facts(subject, wanted)),
        headline=_headline(traces),
        at_peak="".join(_at_peak(name, trace) for name, trace in traces.items()),
        plan=_plan(report),
        refusals=_refusals(report),
        notes=_notes(subject, report),
        version=escape(VERSION),
    )


def _json(found: object) -> str:
    """JSON that no HTML parser can take for the end of a script."""
    text = json.dumps(found, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _file(name: str) -> str:
    return (files("mstc.cli") / "page" / name).read_text(encoding="utf-8")


# --- the parts that need no script


def _facts(subject: Subject, wanted: Wanted) -> Iterable[str]:
    weights = list(subject.model.parameters())  # a tied one is one
    names = {dtype: name for name, dtype in DTYPES.items()}
    dtypes = sorted({names.get(p.dtype, str(p.dtype)) for p in weights})
    yield f"{wanted.batch_size:,} × {wanted.seq_len:,} tokens"
    yield " and ".join(dtypes) + (", checkpointed" if wanted.checkpoint else "")
    nbytes = size(sum(p.nbytes for p in weights))
    yield f"{sum(p.numel() for p in weights):,} weights ({nbytes}, not counted below)"


def _headline(traces: Mapping[str, SimulatedTrace]) -> str:
    before, after = traces["inductor"], traces["mst"]
    base = max(before.peak_intermediate_nbytes, 1)
    ratio = after.peak_intermediate_nbytes / base
    bars = "".join(
        f'<div class="bar {escape(name)}"><span>{escape(name)}</span>'
        f'<i style="width:{max(100 * t.peak_intermediate_nbytes / base, 0.5):.2f}%"></i>'
        f"<b>{size(t.peak_intermediate_nbytes)}</b></div>"
        for name, t in (("inductor", before), ("mst", after))
    )
    with_grads = f"{size(before.peak_nbytes)} → {size(after.peak_nbytes)}"
    return (
        f'<p class="ratio"><strong>{ratio:.2f}×</strong> the peak of Inductor</p>'
        f'<div class="bars">{bars}</div>'
        f"<p>Peak of intermediate memory: above weights, batch and gradients. With gradients "
        f"({size(after.grad_nbytes)}): <b>{with_grads}</b>.</p>"
    )


def _at_peak(name: str, trace: SimulatedTrace) -> str:
    """Equal values of equal layers share a row."""
    together: Counter[tuple[str, str]] = Counter()
    counts: Counter[tuple[str, str]] = Counter()
    for buffer in trace.buffers:
        if buffer.is_alive(trace.peak_time) and buffer.intermediate_nbytes:
            together[what(buffer, trace)] += buffer.intermediate_nbytes
            counts[what(buffer, trace)] += 1
    rows: list[tuple[str, str]] = []
    largest = max(together.values(), default=1)
    for (made_by, source), nbytes in together.most_common(_ROWS):
        count = counts[(made_by, source)]
        many = f" <small>× {count}</small>" if count > 1 else ""
        bar = f'{size(nbytes)}<i class="share" style="width:{100 * nbytes / largest:.1f}%"></i>'
        rows.append((bar, f"<b>{escape(made_by)}</b>{many} {_code(source)}"))
    rest = trace.peak_intermediate_nbytes - sum(n for _, n in together.most_common(_ROWS))
    if rest:
        rows.append((size(rest), "smaller ones"))
    table = _table(("bytes", "made by"), rows)
    return f'<div class="of" data-of="{escape(name)}"><h3>{escape(name)}</h3>{table}</div>'


def _plan(report: Report) -> str:
    loops = [loop for graph in report.graphs for loop in graph.loops]
    if not loops:
        return "<p>No loops: the graph goes to Inductor as it is.</p>"
    rows = [
        (
            '<button type="button" title="show it in the timeline" '
            f'data-loop="{escape(_name(loop))}">'
            f"{escape(loop.seed)}</button>"
            + (f" <small>× {loop.count}</small>" if loop.count > 1 else "")
            + _code(loop.source),
            f"{loop.num_chunks:,} of {loop.chunk:,} positions",
            escape(loop.mode),
            size(loop.inside_bytes),
        )
        for loop in loops
    ]
    return _table(("loop", "chunks", "mode", "not made whole"), rows)


def _name(loop: LoopReport) -> str:
    """As the timeline has it."""
    return f"{loop.seed} at {loop.source}" if loop.source else loop.seed


def _refusals(report: Report) -> str:
    found = [r for graph in report.graphs for r in graph.refusals] + report.refusals
    if not found:
        return "<p>Nothing was refused.</p>"
    rows = [
        (
            size(r.nbytes),
            f"<b>{escape(r.subject)}</b> {_code(r.source)}",
            escape(f"{r.reason}.") + (f" <b>{escape(r.advice)}</b>" if r.advice else ""),
        )
        for r in sorted(found, key=lambda r: -r.nbytes)
    ]
    return _table(("bytes", "what", "why, and the way out"), rows)


def _notes(subject: Subject, report: Report) -> str:
    notes = [
        f"gone ({size(r.nbytes)}): {r.subject} {r.source}: {r.reason}"
        for graph in report.graphs
        for r in graph.rewrites
    ]
    notes += [f"computed when somebody looks: {output}" for output in report.deferred]
    notes += [*subject.notes, *report.notes, *(g.note for g in report.graphs if g.note)]
    if not notes:
        return "<p>None.</p>"
    counts = Counter(notes)
    lines = (f"<li>{escape(n)}{f' × {c}' if c > 1 else ''}</li>" for n, c in counts.items())
    return f'<ul class="notes">{"".join(lines)}</ul>'


def _code(source: str) -> str:
    place, _, code = source.partition("  ")
    if not source:
        return '<span class="line"><small>no line of the model’s</small></span>'
    return f'<span class="line"><small>{escape(place)}</small><code>{escape(code)}</code></span>'


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{c}</th>' for c in columns)
    body = "".join(
        "<tr>"
        + "".join(f'<td data-label="{c}">{v}</td>' for c, v in zip(columns, row, strict=True))
        + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

"""What the commands print, for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mstc.cli.checks import Check
from mstc.cli.fit import WAYS, Fit
from mstc.cli.layers import Step
from mstc.cli.subject import Subject
from mstc.plans import Change
from mstc.quantity import format_bytes as size
from mstc.report import Report

_AT_PEAK = 8  # rows
_RIGHT = {"bytes", "loops", "peak", "intermediate", "not whole", "tokens", "step", "state"}


_FEW = "{0}: {2} and {3} of {1} layers simulated; what further ones add is the same."
_TIME = "Predicted time of a step on a CPU: {:.2f}x of Inductor's, give or take 0.08.\n"
_ASSUMED = """\
step: the peak of forward and backward, gradients included. state: weights and the states of \
{optimizer}, in the weights' dtype. mst with options={options}. Simulated from the code that \
Inductor writes for a CPU; no CUDA context, fragmentation or communication is in it."""


def print_explanation(
    console: Console,
    subject: Subject,
    steps: Mapping[str, Step],
    report: Report,
) -> None:
    """The answer of ``mstc explain``."""
    console.print(_peaks(steps))
    for backend, step in steps.items():
        if step.simulated:
            console.print(Text(_FEW.format(backend, subject.num_layers, *step.simulated)))
    if any(step.simulated for step in steps.values()):
        console.print("The plan is made for all layers. --all-layers simulates all.\n")
    for backend, step in steps.items():
        console.print(_held(backend, step))
    loops = [loop for graph in report.graphs for loop in graph.loops]
    if loops:
        table = _table("Loops", "loops", "chunks", "mode", "not whole", "from")
        for loop in loops:
            table.add_row(
                str(loop.count),
                f"{loop.num_chunks} of {loop.chunk:,}",
                loop.mode,
                size(loop.inside_bytes),
                Text(f"{loop.seed} {loop.source}"),
            )
        console.print(table)
        if report.relative_time is not None:
            console.print(_TIME.format(report.relative_time))
    else:
        console.print("No loops: the graph goes to Inductor as it is.\n")
    refusals = [r for graph in report.graphs for r in graph.refusals] + report.refusals
    if refusals:
        table = _table("Left whole", "bytes", "what", "why")
        for refusal in refusals:
            why = f"{refusal.reason}. {refusal.advice}".rstrip()
            what = Text(f"{refusal.subject} {refusal.source}".rstrip())
            table.add_row(size(refusal.nbytes), what, Text(why))
        console.print(table)
    for note in (*subject.notes, *dict.fromkeys(report.notes)):
        console.print(Text(f"note: {note}"))


def print_changes(console: Console, changes: Sequence[Change]) -> None:
    """The answer of ``mstc diff``."""
    if not changes:
        console.print("The plans are the same.")
        return
    table = _table("", "loop of", "before", "after")
    for change in changes:
        table.add_row(Text(change.loop), change.before or "none", change.after or "none")
    console.print(table)


def print_fits(console: Console, fits: Sequence[Fit], memory: int, optimizer: str) -> None:
    """The answer of ``mstc fit``."""
    title = f"The longest sequence in {size(memory)}"
    table = _table(title, "training with", "tokens", "of the first", "step", "state")
    base = fits[0].seq_len
    for one in fits:
        ratio = f"{one.seq_len / base:.1f}x" if one.seq_len and base else ""
        tokens = f"{one.seq_len:,}" if one.seq_len else "none"
        table.add_row(one.way.name, tokens, ratio, size(one.step_nbytes), size(one.state_nbytes))
    console.print(table)
    console.print(Text(_ASSUMED.format(optimizer=optimizer, options=WAYS[-1].options)))


def print_checks(console: Console, checks: Iterable[Check]) -> None:
    """The answer of ``mstc doctor``."""
    table = _table("", "", "what", "found")
    style = {"ok": "green", "optional": "yellow", "missing": "bold red"}
    for check in checks:
        table.add_row(Text(check.verdict, style[check.verdict]), check.name, Text(check.found))
    console.print(table)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title or None, title_justify="left", title_style="bold", box=None)
    for column in columns:
        right = column in _RIGHT
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    return table


def _peaks(steps: Mapping[str, Step]) -> Table:
    table = _table(
        "One step, forward and backward, above weights and batch",
        *("backend", "peak", "intermediate", "of Inductor's"),
    )
    base = steps["inductor"].peak_intermediate_nbytes if "inductor" in steps else 0
    for backend, step in steps.items():
        own = step.peak_intermediate_nbytes
        ratio = f"{own / base:.2f}x" if base else ""
        table.add_row(backend, size(step.peak_nbytes), size(own), ratio)
    return table


def _held(backend: str, step: Step) -> Table:
    """Equal values of equal layers share a row."""
    table = _table(f"At the peak of intermediate memory, {backend}", "bytes", "made by")
    together: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for held in step.at_peak:
        what = f"{held.made_by} {held.source}".rstrip()
        together[what] += held.nbytes
        counts[what] += 1
    for what, nbytes in together.most_common(_AT_PEAK):
        many = f" x{counts[what]}" if counts[what] > 1 else ""
        table.add_row(size(nbytes), Text((what or "?") + many))
    rest = sum(together.values()) - sum(n for _, n in together.most_common(_AT_PEAK))
    if rest:
        table.add_row(size(rest), "smaller ones")
    return table

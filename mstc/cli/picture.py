"""Memory over a simulated step, as PNG and SVG.

A simulated step has an order and no clock: events are spread evenly, forward and backward over half
of the picture each, so that the curves of two backends lie over each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from mstc.cli.subject import SubjectError
from mstc.quantity import format_bytes as size
from mstc.watch import SimulatedTrace
from mstc.whole import whole_file

_COLORS = {"inductor": "#8a8f98", "mst": "#2b6cb0", "eager": "#c05621"}
_SHADES = ("#38a169", "#d69e2e", "#9f7aea", "#ed64a6", "#00a3c4", "#dd6b20")
_NAME = 70  # characters of a loop's name


def paths_of(out: Path) -> tuple[Path, Path]:
    """Both files.

    Raises:
        SubjectError: another ending, or a folder that is not there.
    """
    if out.suffix not in (".png", ".svg"):
        raise SubjectError(f"--out {out}: it must end in .png or .svg.")
    if not out.parent.is_dir():
        raise SubjectError(f"--out {out}: there is no folder {out.parent}.")
    return out.with_suffix(".png"), out.with_suffix(".svg")


def draw(traces: Mapping[str, SimulatedTrace], title: str, paths: Sequence[Path]) -> None:
    """Write the picture.

    Raises:
        SubjectError: a file cannot be written.
    """
    figure = Figure(figsize=(9, 5.2), layout="constrained")
    axes: Any = figure.subplots()
    highest = max(t.peak_nbytes for t in traces.values())
    unit, name = next(
        ((u, n) for u, n in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")) if highest >= u),
        (1, "bytes"),
    )
    for backend, trace in traces.items():
        _curve(axes, backend, trace, unit)
    if "mst" in traces:
        _shade(axes, traces["mst"])
    axes.axvline(1, color="#4a5568", linewidth=0.8, linestyle=":")
    axes.set_xlim(0, 2)
    axes.set_ylim(0, 1.12 * highest / unit)
    axes.set_xticks([0.5, 1.5], ["forward", "backward"])
    axes.tick_params(axis="x", length=0)
    axes.set_xlabel(
        "allocations in their order; a loop is drawn with three of its chunks", fontsize=8
    )
    axes.set_ylabel(f"memory above weights and batch, {name}")
    axes.set_title(title, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    handles, _ = axes.get_legend_handles_labels()
    figure.legend(handles=handles, loc="outside lower left", frameon=False, fontsize=8)
    for path in paths:
        try:
            with whole_file(path) as partial:
                figure.savefig(partial, dpi=150)
        except OSError as error:
            raise SubjectError(f"{path} cannot be written: {error.strerror}.") from error


def _place(trace: SimulatedTrace, time: float) -> float:
    """Where an event is drawn: the forward from 0 to 1, the backward from 1 to 2."""
    end = max(trace.timeline[-1][0] if trace.timeline else 0.0, trace.backward + 1)
    if time <= trace.backward:
        return time / max(trace.backward, 1)
    return 1 + (time - trace.backward) / (end - trace.backward)


def _curve(axes: Any, backend: str, trace: SimulatedTrace, unit: int) -> None:
    x = [_place(trace, time) for time, _ in trace.timeline]
    y = [nbytes / unit for _, nbytes in trace.timeline]
    color = _COLORS.get(backend)
    axes.fill_between(x, y, step="post", alpha=0.12, color=color, linewidth=0)
    label = f"{backend}: peak {size(trace.peak_nbytes)}"
    axes.step(x, y, where="post", color=color, linewidth=1.4, label=label)
    top = max(range(len(y)), key=y.__getitem__)
    axes.plot(x[top], y[top], "o", color=color, markersize=4)
    left = x[top] > 1.5
    axes.annotate(
        size(trace.peak_nbytes),
        (x[top], y[top]),
        xytext=(-6 if left else 6, 4),
        textcoords="offset points",
        ha="right" if left else "left",
        color=color,
        fontweight="bold",
    )


def _shade(axes: Any, trace: SimulatedTrace) -> None:
    """The loops, and what each is of."""
    names = list(dict.fromkeys(span.name for span in trace.loops))
    seen: set[str] = set()
    for span in trace.loops:
        color = _SHADES[names.index(span.name) % len(_SHADES)]
        count = sum(s.name == span.name for s in trace.loops)
        short = span.name if len(span.name) <= _NAME else span.name[: _NAME - 1] + "…"
        many = "loop" if count == 1 else f"{count} loops"
        label = f"{many} of {short or 'a region'}"
        x = (_place(trace, span.start), _place(trace, span.end))
        axes.axvspan(
            *x, color=color, alpha=0.16, linewidth=0, label=None if span.name in seen else label
        )
        seen.add(span.name)

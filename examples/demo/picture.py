"""The memory of one training step, one curve per contender."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")  # files only: no display is needed
import matplotlib.pyplot as plt
from matplotlib.patheffects import withStroke

MIB = 2**20
COLORS = {"eager": "#9a9a9a", "inductor": "#d9822b", "mst": "#1f77b4"}
Timeline = Sequence[Sequence[float]]  # (microseconds, bytes) after each allocation and release


def thin(timeline: Timeline, count: int = 2000) -> list[tuple[float, float]]:
    """At most about `count` points that keep the highest and the lowest value of every stretch."""
    points = [(float(t), float(n)) for t, n in timeline]
    stretch = -(-2 * len(points) // count)
    if stretch <= 2:
        return points
    kept: list[tuple[float, float]] = []
    for i in range(0, len(points), stretch):
        part = points[i : i + stretch]
        kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return kept


def draw(timelines: Mapping[str, Timeline], title: str, paths: Sequence[Path]) -> None:
    """Save one picture under every path; the suffix says the format (png, svg)."""
    figure, axes = plt.subplots(figsize=(9, 4.8), layout="constrained")
    highest = max(n for timeline in timelines.values() for _, n in timeline) / MIB
    for name, timeline in timelines.items():
        points = thin(timeline)
        ms = [t / 1e3 for t, _ in points]
        mib = [n / MIB for _, n in points]
        color = COLORS.get(name)
        axes.fill_between(ms, mib, step="post", alpha=0.12, color=color, linewidth=0)
        axes.step(ms, mib, where="post", color=color, linewidth=1.4)
        top = max(range(len(mib)), key=lambda i: mib[i])
        axes.plot(ms[top], mib[top], "o", color=color, markersize=4)
        axes.annotate(
            f"{name}: {mib[top]:,.0f} MiB",
            (ms[top], mib[top]),
            xytext=(6, 6),
            textcoords="offset points",
            color=color,
            fontweight="bold",
            path_effects=[withStroke(linewidth=3, foreground="white")],
        )
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("time since the start of the step, forward then backward (ms)")
    axes.set_ylabel("memory above parameters, gradients included (MiB)")
    axes.set_ylim(0, 1.12 * highest)
    axes.set_xlim(left=0)
    axes.margins(x=0.12)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=160)
    plt.close(figure)

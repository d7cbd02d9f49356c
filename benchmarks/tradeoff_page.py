"""docs/tradeoff.md and its pictures, from the results of `benchmarks.tradeoff`."""

from collections.abc import Iterable, Sequence
from statistics import geometric_mean, median
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # files only: no display is needed
import matplotlib.pyplot as plt

from benchmarks import measure, zoo
from benchmarks.table import table
from mstc.device import CPU_IN_FLOAT32
from mstc.quantity import format_bytes

PAGE = measure.ROOT / "docs" / "tradeoff.md"
PICTURE = PAGE.with_suffix(".svg")
EVERY_PICTURE = PAGE.with_name("tradeoff-every.svg")
PREDICTED_PICTURE = PAGE.with_name("tradeoff-predicted.svg")
_BASE = "inductor"
_ORANGE = "#d9822b"
_COLUMNS = 6  # panels in a row, where there is one for every architecture

_LONGEST_TITLE = 24  # characters that a panel has room for

SLOWER = 1.02  # of Inductor's time: what the default should not be above

Point = tuple[float, float]  # time and peak, relative to Inductor's


def points(record: dict[str, Any]) -> dict[str, Point]:
    """Contender -> (time, peak), relative to Inductor's; the failed are left out."""
    found = record["contenders"]
    base = found[_BASE]
    return {
        name: (
            median(one["rounds_s"]) / median(base["rounds_s"]),
            one["peak_nbytes"] / base["peak_nbytes"],
        )
        for name, one in found.items()
        if "rounds_s" in one
    }


def _draw_row(axes: Any, record: dict[str, Any], color: Any, label: str) -> None:
    """The settings as a line, the default as a star."""
    found = points(record)
    line = [point for name, point in found.items() if name not in (_BASE, "auto")]
    axes.plot(*zip(*line, strict=True), "o-", color=color, markersize=3.5, linewidth=1, label=label)
    if "auto" in found:
        axes.plot(*found["auto"], "*", color=color, markersize=13)


def _panel(axes: Any, title: str) -> None:
    axes.plot(1, 1, "s", color=_ORANGE, markersize=7, label="Inductor")
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_ylim(0, 1.15)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(figure: Any, axes: Any, columns: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    star = plt.Line2D([], [], marker="*", linestyle="", color="#444444", markersize=11)
    figure.legend(
        [*handles, star], [*labels, 'mst, "auto"'], loc="outside lower center", ncols=columns,
        frameon=False,
    )  # fmt: skip


def draw_lengths(records: dict[str, dict[str, Any]]) -> None:
    """docs/tradeoff.svg: one panel per model, one line per length."""
    models = list(dict.fromkeys(key.split("/")[0] for key in records))
    lengths = sorted({int(key.split("/")[1]) for key in records})
    colors = plt.get_cmap("viridis")([0.85 - 0.8 * i / len(lengths) for i in range(len(lengths))])
    figure, grid = plt.subplots(
        1, len(models), figsize=(4.4 * len(models), 4.2), sharey=True, layout="constrained",
        squeeze=False,
    )  # fmt: skip
    for axes, model in zip(grid[0], models, strict=True):
        _panel(axes, model)
        for tokens, color in zip(lengths, colors, strict=True):
            if record := records.get(f"{model}/{tokens}"):
                _draw_row(axes, record, color, f"{tokens:,} tokens")
        axes.set_xlabel("time per step, Inductor = 1")
    grid[0][0].set_ylabel("peak with gradients, Inductor = 1")
    _legend(figure, grid[0][0], 3)
    figure.savefig(PICTURE)
    plt.close(figure)


def draw_every(records: dict[str, dict[str, Any]]) -> None:
    """docs/tradeoff-every.svg: one panel per architecture."""
    rows = -(-len(records) // _COLUMNS)
    figure, grid = plt.subplots(
        rows, _COLUMNS, figsize=(2.3 * _COLUMNS, 1.9 * rows), sharex=True, sharey=True,
        layout="constrained", squeeze=False,
    )  # fmt: skip
    color = plt.get_cmap("viridis")(0.3)
    for axes, (key, record) in zip(grid.flat, records.items(), strict=False):
        name = key.split("/")[0]
        title = zoo.ZOO[name].title
        _panel(axes, title if len(title) <= _LONGEST_TITLE else name)
        _draw_row(axes, record, color, "mst, settings of a budget")
    for axes in list(grid.flat)[len(records) :]:
        axes.set_visible(False)
    what = "peak with gradients, upward, against time per step, to the right; Inductor = 1"
    figure.suptitle(what, fontsize=10)
    _legend(figure, grid[0][0], 3)
    figure.savefig(EVERY_PICTURE)
    plt.close(figure)


def predicted(records: dict[str, dict[str, Any]]) -> dict[str, list[Point]]:
    """Setting -> predicted and measured time, relative to Inductor's, of every architecture."""
    found: dict[str, list[Point]] = {}
    for record in records.values():
        for name, (time, _) in points(record).items():
            if (own := record["contenders"][name].get("predicted")) is not None:
                found.setdefault(name, []).append((own, time))
    return found


def draw_predicted(records: dict[str, dict[str, Any]]) -> None:
    """docs/tradeoff-predicted.svg: a dot per architecture and setting."""
    found = predicted(records)
    if not found:
        return
    figure, axes = plt.subplots(figsize=(5, 4.6), layout="constrained")
    colors = plt.get_cmap("viridis")([0.1 + 0.75 * i / len(found) for i in range(len(found))])
    for (name, pairs), color in zip(found.items(), colors, strict=True):
        axes.plot(*zip(*pairs, strict=True), "o", markersize=4, color=color, alpha=0.7, label=name)
    every = [value for pairs in found.values() for pair in pairs for value in pair]
    ends = min(every) - 0.03, max(every) + 0.03
    axes.plot(ends, ends, color="#888888", linewidth=1)
    axes.set(xlim=ends, ylim=ends, aspect="equal")
    axes.set_xlabel("predicted time per step, Inductor = 1")
    axes.set_ylabel("measured")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left")
    figure.savefig(PREDICTED_PICTURE)
    plt.close(figure)


def _predicted_table(results: dict[str, Any]) -> str:
    lines: list[list[str]] = []
    found = predicted(results["records"])
    if not found:
        return "Nothing was predicted."
    together = [pair for pairs in found.values() for pair in pairs]
    for name, pairs in {**found, "all": together}.items():
        off = [abs(own - time) for own, time in pairs]
        means = [sum(values) / len(pairs) for values in (*zip(*pairs, strict=True), off)]
        lines.append([name, str(len(pairs)), *(f"{mean:.2f}" for mean in means), f"{max(off):.2f}"])
    header = "setting", "steps", "predicted", "measured", "off by, mean", "at most"
    return table(header, lines)


def page(lengths: dict[str, Any], every: dict[str, Any]) -> str:
    """docs/tradeoff.md."""
    return _PAGE.format(
        where=_where(lengths),
        table=_table(lengths),
        every_where=_where(every),
        every_table=_table(every),
        every_line=_line(every),
        predicted_table=_predicted_table(every),
        steps=sum(map(len, predicted(every["records"]).values())),
        machine=CPU_IN_FLOAT32,
        near=format_bytes(CPU_IN_FLOAT32.near_nbytes),
    )


def _where(results: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    threads = results["threads"]
    plural = "" if threads == 1 else "s"
    where = f"{results['device']}, {threads} thread{plural}; {versions}; {results['date']}"
    return f"{where}; {results['note']}" if "note" in results else where


def _settings(results: dict[str, Any]) -> Sequence[str]:
    names: Iterable[str] = (n for r in results["records"].values() for n in r["contenders"])
    return [name for name in dict.fromkeys(names) if name != _BASE]


def _table(results: dict[str, Any]) -> str:
    settings = _settings(results)
    lines: list[list[str]] = []
    for key, record in results["records"].items():
        model, tokens = key.split("/")
        architecture = zoo.ZOO[model]
        own = architecture.at(zoo.ROW)
        size = f"{int(tokens):,}" if int(tokens) else f"{own.rows} x {own.tokens:,}"
        found = points(record)
        base = record["contenders"][_BASE]["peak_nbytes"] / 2**20
        cells = [
            f"{found[name][1]:.2f} / {found[name][0]:.2f}" if name in found else "failed"
            for name in settings
        ]
        lines.append([architecture.title, size, f"{base:,.0f}", *cells])
    return table(("model", "tokens", "Inductor MiB", *settings), lines)


def _line(results: dict[str, Any]) -> str:
    """The default's times over all rows, in words."""
    found = {key: points(r) for key, r in results["records"].items()}
    auto = {key.split("/")[0]: p["auto"] for key, p in found.items() if "auto" in p}
    slow = [model for model, (time, _) in auto.items() if time > SLOWER]
    worst = max(auto, key=lambda model: auto[model][0])
    times, peaks = zip(*auto.values(), strict=True)
    return (
        f"{len(auto)} rows; the default's time is {geometric_mean(times):.2f} and its peak "
        f"{geometric_mean(peaks):.2f} of Inductor's (geometric means); its time is above {SLOWER} "
        f"in {len(slow)} of them (worst: {zoo.ZOO[worst].title}, {auto[worst][0]:.2f})."
    )


_PAGE = """\
# What memory costs

Every point is a training step that was compiled and measured; the lines go through settings of the
planner and the partitioner as `options={{"memory_budget": ...}}` makes them, the star is the
default. Models are those of the [coverage table](coverage.md), in float32. Peaks hold the gradients
and are exact; times are medians of steps in alternation. Peak / time, relative to Inductor's.

## Two models at four lengths

![peak against time, per model and length](tradeoff.svg)

One sequence. Made by `python -m benchmarks.tradeoff`; {where}.

{table}

0.25 to 1: chunks as large as a target between no loops (0) and the smallest chunks that are fast
(1) allows. *Recomputed*: AOTAutograd's `activation_memory_budget` of 0.2 besides. *Below*: chunks a
quarter as large as is fast, and an `activation_memory_budget` of 0.05. What is computed again
between loops costs more time than anything else here and saves least, so a budget comes to it last;
on a GPU only offload to the host, which is not measured here, comes after it.

## Every architecture

![peak against time, per architecture](tradeoff-every.svg)

At the sizes of the coverage table. Made by `python -m benchmarks.tradeoff --every`; {every_where}.
{every_line}

*Finer*: chunks a quarter as large as is fast.

{every_table}

## Times that are predicted

![predicted against measured time](tradeoff-predicted.svg)

The planner predicts the time of a step from three figures of a graph and three of the machine
(`passes/cost.py`): multiplications, of which loops do some a second time; bytes that are written to
memory, of which chunks keep some in the caches; bytes that every further chunk reads again. A byte
written takes the time of {machine.written} multiplications here, a byte read again that of
{machine.reread}, and {near} of a chunk stay in the caches: these three are fitted to the very
steps above, on one machine and in float32, so that the table says how well three figures explain
{steps} steps, and not how well they foretell another machine's. `mstc explain` and the report show
the predicted time of a CPU's step in float32; a memory budget does not try larger chunks that are
predicted to save no time; a loop runs along an axis of weights only if that is not predicted to be
slower. Nothing is predicted elsewhere. Made by
`python -m benchmarks.tradeoff --predict`; means over architectures.

{predicted_table}
"""


def write(lengths: dict[str, Any], every: dict[str, Any]) -> None:
    """The page and its pictures."""
    draw_lengths(lengths["records"])
    draw_every(every["records"])
    draw_predicted(every["records"])
    PAGE.write_text(page(lengths, every))

"""docs/peers.md, its pictures and the README's table, from the results."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # files only: no display is needed
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks import measure
from benchmarks.peers.cases import CASES, LENGTHS
from benchmarks.peers.contenders import BASE, CONTENDERS
from benchmarks.table import number, put, table

PAGE = measure.ROOT / "docs" / "peers.md"
README = measure.ROOT / "README.md"
DEVICES = {"cpu": "On a CPU", "cuda": "On a GPU"}
_TITLES = {
    "linear-ce": "linear-ce: a head and its loss",
    "mlp": "mlp: one gated MLP",
    "layer": "layer: one decoder layer",
    "model": "model: a whole Llama",
}
_MARKERS = "so^vD<>PXhd*p8H"
Row = dict[str, Any]


def results_path(device: str) -> Path:
    return measure.ROOT / "benchmarks" / "results" / f"peers-{device}.json"


def picture_path(device: str) -> Path:
    return PAGE.with_name("peers.svg" if device == "cpu" else f"peers-{device}.svg")


def write() -> None:
    """Make everything anew from the results that there are."""
    found = published()
    for device, results in found.items():
        draw(results, picture_path(device))
    PAGE.write_text(text(found))
    README.write_text(readme(found))


def readme(found: dict[str, dict[str, Any]]) -> str:
    """The README with the summary of the CPU's results."""
    return put(README.read_text(), "peers", summary(found["cpu"]))


def published() -> dict[str, dict[str, Any]]:
    """Device -> its results, if it was measured."""
    paths = {device: results_path(device) for device in DEVICES}
    return {d: json.loads(path.read_text()) for d, path in paths.items() if path.exists()}


# --- figures relative to Inductor's


def _groups(results: dict[str, Any], case: str) -> dict[int, dict[str, Row]]:
    """Tokens -> rows by contender, of a case's groups that are complete."""
    records = results["records"].items()
    found = {key: r["contenders"] for key, r in records if r["complete"]}
    split = {tuple(key.split("/")): rows for key, rows in found.items()}
    return {int(tokens): split[name, tokens] for name, tokens in split if name == case}


def _seconds(row: Row) -> float | None:
    return median(row["rounds_s"]) if row.get("rounds_s") else None


def _worst(row: Row) -> float | None:
    error = row.get("error")
    if not error:
        return None
    return math.inf if math.isnan(error["worst"]) else error["worst"]


def _figures(row: Row) -> dict[str, float | None]:
    """Peak, seconds, error; none of a row without a figure."""
    return {"peak": row.get("peak_nbytes"), "time": _seconds(row), "error": _worst(row)}


def _ratios(rows: dict[str, Row], name: str) -> dict[str, float]:
    """Figures of a contender over Inductor's, where both are."""
    own, base = (_figures(rows.get(n, {})) for n in (name, BASE))
    return {
        what: value / below
        for what, value in own.items()
        if value is not None and (below := base[what])
    }


def _geometric_mean(values: Iterable[float]) -> float | None:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else None


def _means(results: dict[str, Any], cases: Iterable[str], name: str, what: str) -> float | None:
    ratios = (_ratios(rows, name) for case in cases for rows in _groups(results, case).values())
    return _geometric_mean(r[what] for r in ratios if what in r)


# --- tables


def summary(results: dict[str, Any]) -> str:
    """Peak and time relative to Inductor's, geometric means by case; the worst error."""
    lines: list[list[str]] = []
    for name, contender in CONTENDERS.items():
        everything = [g for case in CASES for g in _groups(results, case).values() if name in g]
        if not everything:
            continue
        cells = [_pair(results, (case,), name) for case in CASES]
        errors = [ratio["error"] for g in everything if "error" in (ratio := _ratios(g, name))]
        without = len([g for g in everything if _seconds(g[name]) is None])
        lines.append(
            [
                contender.title,
                *cells,
                f"{max(errors):.2f}" if errors else "",
                f"{len(everything) - without} of {len(everything)}",
            ]
        )
    return table(("contender", *CASES, "worst error", "rows measured"), lines)


def _pair(results: dict[str, Any], cases: Iterable[str], name: str) -> str:
    peak, time = (_means(results, cases, name, what) for what in ("peak", "time"))
    return "" if peak is None or time is None else f"{peak:.2f} / {time:.2f}"


def _case(results: dict[str, Any], case: str) -> str:
    """A row per length and contender."""
    header = ("tokens", "contender", "peak MiB", "x", "step s", "x", "first step s", "error", "x")
    lines: list[list[str]] = []
    for tokens, rows in _groups(results, case).items():
        for name, row in rows.items():
            ratios = _ratios(rows, name)
            peak, seconds = row.get("peak_nbytes"), _seconds(row)
            lines.append(
                [
                    f"{tokens:,}",
                    CONTENDERS[name].title,
                    _without(row) or number(peak and peak / 2**20, ",.1f"),
                    number(ratios.get("peak"), ".2f"),
                    number(seconds, ".3g"),
                    number(ratios.get("time"), ".2f"),
                    number(row.get("first_step_s"), ".1f"),
                    number(_worst(row), ".1e"),
                    number(ratios.get("error"), ".2f"),
                    row.get("note", ""),
                ]
            )
    return table((*header, "note"), lines)


def _without(row: Row) -> str:
    """What stands in the place of figures."""
    if "missing" in row:
        return row["missing"]
    text = row.get("failed", "")
    if any(sign in text for sign in ("can't allocate memory", "OutOfMemory", "MemoryError")):
        return "out of memory"
    if text.startswith(("killed", "no answer")):
        return text
    return "failed" if text else ""


def _not_measured(results: dict[str, Any], device: str) -> list[str]:
    """A paragraph that names what the tables lack, if they do."""
    absent = [
        f"{case} at {tokens:,}"
        for case, lengths in LENGTHS[device].items()
        for tokens in lengths
        if tokens not in _groups(results, case)
    ]
    return [f"**Not measured**: {', '.join(absent)} tokens."] if absent else []


def _failures(results: dict[str, Any]) -> str:
    lines: list[str] = []
    for key, record in results["records"].items():
        if problem := record.get("without_truth"):
            lines.append(f"* {key}: no float64 gradients: `{_plain(problem)}`")
        for name, row in record["contenders"].items():
            if "failed" in row:
                lines.append(f"* {key}, {name}: `{_plain(row['failed'])}`")
    return "\n".join(lines) or "None."


def _plain(text: str) -> str:
    return " ".join(text.replace("`", "'").split())[-300:]


def text(found: dict[str, dict[str, Any]]) -> str:
    """The page."""
    parts = [_INTRODUCTION]
    for device, results in found.items():
        versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
        commits = sorted({record["commit"] for record in results["records"].values()})
        parts += [
            f"## {DEVICES[device]}",
            f"{results['device']}, {results['threads']} threads, {results['dtype']}; {versions}; "
            f"{results['date']}, at {', '.join(commits)}.",
            f"![peak against time, per case]({picture_path(device).name})",
            "Peak / time relative to Inductor's, geometric means over the lengths that a contender "
            "managed; the worst gradient error of a row, over Inductor's in the same group.",
            summary(results),
            *_not_measured(results, device),
        ]
        for case in CASES:
            if _groups(results, case):
                size = {k: v for k, v in results["sizes"][case].items() if v}
                if "layers" not in size:
                    size.pop("head_dim", None)  # there is no attention
                sizes = ", ".join(f"{name} {value:,}" for name, value in size.items())
                parts += [f"### {_TITLES[case]}", f"Sizes: {sizes}.", _case(results, case)]
        parts += ["### Failures", _failures(results)]
    return "\n\n".join(parts) + "\n"


_INTRODUCTION = """\
# Beside everything else

What else lowers the memory of the same work, in the same run: PyTorch's own ways, other libraries,
the idea written by hand, and mst. Made by `python -m benchmarks.peers`; what a contender does
exactly is a few lines in `benchmarks/peers/contenders.py`.

* *Peak*: the most that a step takes above weights and inputs, gradients included, summed from the
  allocator's events. *x*: relative to Inductor's.
* *Step*: the median of steps that all contenders of a group take in turns, each in its own process.
* *First step*: with cold compile caches, so mostly compiling.
* *Error*: the worst parameter's (or input's) gradient, relative distance from float64.
* Contenders are used as they come: those written for eager PyTorch run in it. Where one replaces
  the loss of a model only, Inductor compiles the rest. A case that a contender cannot do has no row
  of it."""


# --- picture


def draw(results: dict[str, Any], path: Path) -> None:
    """Peak against time, a panel per case, a dot per contender: geometric means, Inductor = 1."""
    mpl.rcParams["svg.hashsalt"] = "peers"  # the same figures give the same file
    cases = [case for case in CASES if _groups(results, case)]
    columns = min(2, len(cases))
    figure, grid = plt.subplots(
        math.ceil(len(cases) / 2), columns, figsize=(4.6 * columns, 7.6), layout="constrained",
        squeeze=False,
    )  # fmt: skip
    handles: dict[str, Any] = {}
    for axes, case in zip(grid.flat, cases, strict=False):
        _panel(axes, results, case, handles)
    for axes in grid.flat[len(cases) :]:
        axes.set_visible(False)
    order = [name for name in CONTENDERS if name in handles]
    figure.legend(
        [handles[name] for name in order],
        [CONTENDERS[name].title.replace("`", "").replace("*", "") for name in order],
        loc="outside lower center", ncols=columns, frameon=False, fontsize=9,
    )  # fmt: skip
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _panel(axes: Any, results: dict[str, Any], case: str, handles: dict[str, Any]) -> None:
    colors = plt.get_cmap("tab20")
    for i, (name, marker) in enumerate(zip(CONTENDERS, _MARKERS, strict=True)):
        peak, time = (_means(results, (case,), name, what) for what in ("peak", "time"))
        if peak is None or time is None:
            continue
        ours = name == "mst"
        (handles[name],) = axes.plot(
            time, peak, marker, color="#c0392b" if ours else colors(i), linestyle="",
            markersize=11 if ours else 7.5, markeredgecolor="black" if ours else "white",
            markeredgewidth=0.8, zorder=3 if ours else 2,
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", title=_TITLES[case])
    axes.set_xlabel("time per step, Inductor = 1")
    axes.set_ylabel("peak, Inductor = 1")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())
    axes.margins(0.1)
    axes.axhline(1, color="#bbbbbb", linewidth=0.8, zorder=1)
    axes.axvline(1, color="#bbbbbb", linewidth=0.8, zorder=1)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)

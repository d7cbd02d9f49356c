"""The results of `benchmarks.coverage` as Markdown.

python -m benchmarks.coverage_table benchmarks/results/coverage-cpu.json

Writes docs/coverage.md, and the README's table of means.
"""

import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.table import number, put, table
from benchmarks.zoo import ZOO

Record = dict[str, Any]

MODES = {
    "fp32": "float32",
    "autocast": "float32 weights under bfloat16 autocast",
    "checkpoint": "float32, every block under activation checkpointing",
    "bf16": "bfloat16 weights",
}
_SLACK = {"fp32": 2.5e-7, "autocast": 4e-3, "checkpoint": 2.5e-7, "bf16": 4e-3}
"""What a gradient error may exceed 1.1 times Inductor's by: two units in the last place of float32;
one of bfloat16."""
_SLOW = 1.10  # of Inductor's time
_MOST_REFUSALS = 8  # of a row, largest first; the JSON has all


def failures(record: Record) -> dict[str, str]:
    """Error texts by contender; under "row" if the whole row has none."""
    if "failed" in record:
        return {"row": record["failed"]}
    contenders = record.get("contenders", {})
    return {name: found["failed"] for name, found in contenders.items() if "failed" in found}


def has_failed(record: Record) -> bool:
    return bool(failures(record))


def page(results: dict[str, Any]) -> str:
    """docs/coverage.md."""
    records: dict[str, Record] = results["records"]
    parts = ["# Coverage", _INTRODUCTION, summary(results), "\n".join(_counts(records))]
    for mode, title in MODES.items():
        rows = _of_mode(records, mode)
        if rows:
            parts += [f"## {title[0].upper()}{title[1:]}", _mode_table(rows)]
    parts += ["## What failed, and what was skipped", _failed(records)]
    parts += ["## What was refused", _refused(records)]
    parts += ["## How it was measured", _method(results)]
    return "\n\n".join(part for part in parts if part) + "\n"


def summary(results: dict[str, Any]) -> str:
    """Figures over all rows, by mode: geometric means and the worst."""
    records: dict[str, Record] = results["records"]
    modes = {mode: found for mode in MODES if (found := _of_mode(records, mode))}
    lines = [[mode, *_means(list(rows.items()), mode)] for mode, rows in modes.items()]
    if len(modes) > 1:
        every = [(name, row) for rows in modes.values() for name, row in rows.items()]
        further = sum(_is_further(r, m) for m, rows in modes.items() for r in rows.values())
        lines.append(["all", *_means(every)[:-1], str(further or "none")])
    header = ("mode", "rows", "peak, models with a vocabulary head", "peak, others")
    header += ("time per step", f"rows above {_SLOW:.2f}x of the time")
    header += ("gradients further off than Inductor's",)
    return table(header, lines)


def _means(rows: list[tuple[str, Record]], mode: str = "") -> list[str]:
    with_head = [(n, r) for n, r in rows if ZOO[n].has_vocabulary]
    without = [(n, r) for n, r in rows if not ZOO[n].has_vocabulary]
    return [
        str(len(rows)),
        _mean_and_worst(with_head, peak_ratio),
        _mean_and_worst(without, peak_ratio),
        _mean_and_worst(rows, time_ratio),
        str(sum(is_slow(r) for _, r in rows) or "none"),
        _list(n for n, r in rows if mode and _is_further(r, mode)) or "none",
    ]


def peak_ratio(record: Record, above: str = "mst", below: str = "inductor") -> float | None:
    return _ratio(record, above, below, lambda found: found.get("peak_intermediate_nbytes"))


def time_ratio(record: Record) -> float | None:
    """Median over median of steps that took turns; of several processes the median."""
    runs = [run for run in record.get("runs", ()) if {"mst", "inductor"} <= run.keys()]
    if len(runs) > 1:
        return median(run["mst"] / run["inductor"] for run in runs)
    return _ratio(record, "mst", "inductor", _step_s)


def is_slow(record: Record) -> bool:
    """Does a step take longer than it may?"""
    return (time_ratio(record) or 0) > _SLOW


def _step_s(found: Record) -> float | None:
    rounds = found.get("rounds_s")
    return median(rounds) if rounds else None


def _ratio(
    record: Record, above: str, below: str, figure: Callable[[Record], float | None]
) -> float | None:
    contenders = record.get("contenders", {})
    top, bottom = (figure(contenders.get(name, {})) for name in (above, below))
    return top / bottom if top is not None and bottom else None


def _of_mode(records: dict[str, Record], mode: str) -> dict[str, Record]:
    """Rows by architecture, in the zoo's order."""
    return {name: records[f"{name}/{mode}"] for name in ZOO if f"{name}/{mode}" in records}


def _mean_and_worst(
    rows: list[tuple[str, Record]], figure: Callable[[Record], float | None]
) -> str:
    found = [(value, name) for name, row in rows if (value := figure(row)) is not None]
    if not found:
        return ""
    mean = math.exp(sum(math.log(value) for value, _ in found) / len(found))
    worst, name = max(found)
    return f"{mean:.2f} (worst {worst:.2f}, {name})"


def _is_further(record: Record, mode: str) -> bool:
    """Is a gradient of ours further from float64 than Inductor's, by more than rounding does?"""
    errors = [record.get("contenders", {}).get(n, {}).get("error") for n in ("mst", "inductor")]
    if errors[0] is None or errors[1] is None:
        return False
    return not errors[0]["worst"] <= 1.1 * errors[1]["worst"] + _SLACK[mode]  # a nan is further


def _counts(records: dict[str, Record]) -> Iterator[str]:
    measured = {key: record for key, record in records.items() if "contenders" in record}
    yield f"* {len(records)} rows, {len(measured)} measured."
    broken = Counter(name for record in records.values() for name in failures(record))
    if broken:
        yield "* Failed: " + ", ".join(f"{name} in {n}" for name, n in broken.items()) + "."
    loops = sum(bool(_loops(record)) for record in measured.values())
    refused = sum(bool(_refusals_of(record)) for record in measured.values())
    yield f"* With loops: {loops} rows. With something refused: {refused} rows."
    higher = [k for k, record in measured.items() if (peak_ratio(record) or 0) >= 1.005]
    if higher:
        yield f"* Peak above Inductor's: {_list(higher)}."
    notes = [k for k, record in measured.items() if any("as it was" in n for n in _notes(record))]
    if notes:
        yield f"* A pass failed and the graph was left as it was: {_list(notes)}."


def _mode_table(rows: dict[str, Record]) -> str:
    header = ("architecture", "batch x tokens", "Inductor MiB", "eager", "auto_chunker", "mst")
    header += ("time per step", "gradient error: mst", "Inductor")
    header += ("graphs", "loops")
    return table(header, (_cells(name, row) for name, row in rows.items()))


def _cells(name: str, row: Record) -> list[str]:
    title = ZOO[name].title
    if "contenders" not in row:
        return [title, "skipped" if "skipped" in row else "failed", *[""] * 10]
    contenders, sizes = row["contenders"], row["sizes"]
    ours, theirs = contenders.get("mst", {}), contenders.get("inductor", {})
    peak = theirs.get("peak_intermediate_nbytes")
    peaks = [
        "failed" if "failed" in contenders.get(c, {}) else number(peak_ratio(row, c), ".2f")
        for c in ("eager", "auto_chunker", "mst")
    ]
    flips = row.get("routing", {}).get("differing", 0)
    errors = [number(found.get("error", {}).get("worst"), ".1e") for found in (ours, theirs)]
    return [
        title,
        f"{sizes['rows']} x {sizes['tokens']}",
        "failed" if "failed" in theirs else number(peak and peak / 2**20, ".1f"),
        *peaks[:2],
        f"**{peaks[2]}**" if peaks[2] else "",
        number(time_ratio(row), ".2f"),
        errors[0] + ("†" if flips else ""),
        errors[1],
        str(ours.get("graphs", "")),
        _loops_text(row),
    ]


def _loops(record: Record) -> Counter[tuple[str, int, int]]:
    """(mode, length of the axis, chunks) -> loops."""
    found: Counter[tuple[str, int, int]] = Counter()
    for report in record.get("reports", ()):
        for graph in report["graphs"]:
            for loop in graph["loops"]:
                key = (loop["mode"], loop["axis_length"], loop["num_chunks"])
                found[key] += loop["count"]
    return found


def _loops_text(record: Record) -> str:
    return "; ".join(
        f"{count} x {mode}, {length} in {chunks}"
        for (mode, length, chunks), count in _loops(record).items()
    )


def _notes(record: Record) -> list[str]:
    return [note for report in record.get("reports", ()) for note in report["notes"]]


def _refusals_of(record: Record) -> dict[tuple[str, str, str], int]:
    """(subject, source, reason) -> bytes of the largest value that stays because of it."""
    found: dict[tuple[str, str, str], int] = {}
    for report in record.get("reports", ()):
        graphs = [r for graph in report["graphs"] for r in graph["refusals"]]
        for refusal in (*graphs, *report["refusals"]):
            key = (refusal["subject"], refusal["source"], refusal["reason"])
            found[key] = max(found.get(key, 0), refusal["nbytes"])
    return found


def _refused(records: dict[str, Record]) -> str:
    """By architecture: what stays whole, where, why, and in which modes."""
    parts: list[str] = []
    for name, architecture in ZOO.items():
        sizes: dict[tuple[str, str, str], int] = {}
        modes: dict[tuple[str, str, str], list[str]] = {}
        for mode in MODES:
            for key, nbytes in _refusals_of(records.get(f"{name}/{mode}", {})).items():
                sizes[key] = max(sizes.get(key, 0), nbytes)
                modes.setdefault(key, []).append(mode)
        if not sizes:
            continue
        largest = sorted(sizes, key=lambda key: -sizes[key])
        lines = [f"**{architecture.title}**", ""]
        for key in largest[:_MOST_REFUSALS]:
            subject, source, reason = map(_inline, key)
            where = f" at `{source}`" if source else ""
            size = f"{sizes[key] / 2**20:.1f} MiB" if sizes[key] else "no size known"
            lines.append(f"* `{subject}`{where}: {reason} ({size}; {', '.join(modes[key])})")
        if len(largest) > _MOST_REFUSALS:
            lines.append(f"* and {len(largest) - _MOST_REFUSALS} smaller ones")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) or "Nothing."


def _failed(records: dict[str, Record]) -> str:
    lines = [
        f"* {key}, {name}: `{_inline(text)[:300]}`"
        for key, record in records.items()
        for name, text in failures(record).items()
    ]
    lines += [f"* {key}: skipped, {r['skipped']}" for key, r in records.items() if "skipped" in r]
    return "\n".join(lines) or "Nothing."


def _inline(text: str) -> str:
    """On one line, and without what would end a table's cell or a code span."""
    return " ".join(text.split()).replace("`", "'").replace("|", "/")


def _list(names: Iterable[str]) -> str:
    return ", ".join(names)


_INTRODUCTION = """\
Every architecture below, in every mode, as its users call it: labels in, loss and logits out,
`model.train()`, a configuration's defaults but for sizes and dropout; random weights. Four
contenders: eager, Inductor, Inductor with its own `auto_chunker` switched on, and mst with default
options. Peaks are of intermediate memory (above parameters, inputs and gradients); peaks and times
are ratios to Inductor's, smaller is better. Made by `python -m benchmarks.coverage`; every figure
is in `benchmarks/results/coverage-cpu.json`."""

_WITHOUT_INDUCTOR = """
**Without Inductor**: graphs ran op by op; `aot_eager_decomp_partition` stands in its place."""


def _method(results: dict[str, Any]) -> str:
    scale, records = results["scale"], results["records"].values()
    commits = sorted({r["commit"] for r in records if "commit" in r})
    dates = sorted({r["date"] for r in records if "date" in r})
    sizes = (
        f"{scale['layers']} layers, hidden {scale['hidden']}, MLPs {4 * scale['hidden']} wide, "
        f"{scale['heads']} heads, vocabulary {scale['vocab']:,}, images of {scale['image']} x "
        f"{scale['image']} pixels in patches of 4 x 4"
    )
    where = (
        f"{results['device']}, {results['threads']} threads",
        ", ".join(f"{name} {version}" for name, version in results["versions"].items()),
        " to ".join(dict.fromkeys([*dates[:1], *dates[-1:]])),
        f"commit {', '.join(commits)}",
    )
    lowering = _WITHOUT_INDUCTOR if results["lowering"] == "eager" else ""
    return _METHOD.format(
        where="; ".join(part for part in where if part) + "." + lowering,
        sizes=sizes,
        slow=_SLOW,
        slack=f"{_SLACK['fp32']:.1e} (float32) or {_SLACK['autocast']:.0e} (bfloat16)",
    )


_METHOD = """\
{where}

* Sizes, where a row does not say otherwise: {sizes}; half as many layers each for an encoder with a
  decoder. Small, so that a row takes a minute; what a vocabulary head needs, and the gain, grow
  with vocabulary and tokens (the README has larger ones).
* One process per row, with PyTorch's caches of compiled graphs switched off.
* *Peak*: summed from the allocator's events during a later step (`mstc/runtime/memory.py`).
* *Time per step*: contenders take turns in one process (A B C D A B C D), medians; forward and
  backward. Rows may be compiled side by side; while one is timed, the others wait. A row above
  {slow:.2f} was measured twice more in processes of its own, and the median of the three ratios
  stands.
* *Gradient error*: against the same weights and batch in float64, eager. Of each parameter,
  `||g - g64|| / max(||g64||, 0.001 ||all g64||)`; the table has the worst parameter's. The second
  term of the maximum is for gradients whose true value is 0 (the bias of the keys under a softmax):
  they are held against a thousandth of the model's whole gradient instead of against themselves. No
  parameter is left out. A row is *further off than Inductor's* if its error exceeds 1.1 times
  Inductor's by more than {slack}.
* *Mixtures of experts*: with random weights some tokens stand between two experts, and routers in
  bfloat16 choose others than in float64, with any compiler. So that gradients can be compared,
  embeddings and routers are given clear preferences before the step, in all modes
  (`benchmarks/zoo/routing.py`). Decisions that differ between float64 and eager in the row's
  precision are counted all the same; a row with any is marked †. Their experts are one graph with
  bfloat16 weights only (in float32, code of transformers breaks the graph): a mode of their own.
* *Checkpointing*: transformers' `gradient_checkpointing_enable`, with `use_cache` off as its own
  warning demands; elsewhere `torch.utils.checkpoint` without reentrance around every block.
* Tracing unrolls RWKV's recurrence, so its row has many short sequences. The torchtitan-style row
  compiles model and loss function separately, as torchtitan does."""


def write(results: dict[str, Any], page_path: Path, readme: Path) -> None:
    page_path.write_text(page(results))
    readme.write_text(put(readme.read_text(), "coverage", summary(results)))


if __name__ == "__main__":
    write(json.loads(Path(sys.argv[1]).read_text()), Path("docs/coverage.md"), Path("README.md"))

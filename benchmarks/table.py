"""The results of `benchmarks.memory` as Markdown.

python -m benchmarks.table benchmarks/results/memory-cpu.json    # writes the README's tables
"""

import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Records = dict[str, dict[str, Any]]


def markdown(results: dict[str, Any]) -> str:
    """Three tables: cost of a step, models too small to gain, errors. Empty ones are left out."""
    records: Records = results["records"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    parts = [
        f"{results['device']}, {results['threads']} threads, {results['dtype']}, "
        f"{results['date']}; {versions}",
        _cost(records),
        _error(records),
    ]
    return "\n\n".join(part for part in parts if part)


def _cost(records: Records) -> str:
    header = (
        *("model", "tokens", "eager MiB", "inductor MiB", "mst MiB", "inductor / mst"),
        *("compile s: inductor", "mst", "step s: inductor", "mst", "mst / inductor"),
    )
    cases = {tuple(key.split("/")[1:3]): None for key in records if not key.startswith("error/")}
    rows: list[list[str]] = []
    for model, case in cases:
        tiny = f"tiny/{model}/{case}" in records
        peaks = {
            c: records.get(f"peak/{model}/{case}/{c}", {}) for c in ("eager", "inductor", "mst")
        }
        nbytes = {c: record.get("peak_intermediate_nbytes") for c, record in peaks.items()}
        time = records.get(f"{'tiny' if tiny else 'time'}/{model}/{case}", {})
        step_s = time.get("step_s", {})
        gain = nbytes["inductor"] / nbytes["mst"] if nbytes["inductor"] and nbytes["mst"] else None
        rows.append(
            [
                f"{model} (tiny)" if tiny else model,
                case,
                *(_failure(peaks[c]) or number(n and n / 2**20, ".1f") for c, n in nbytes.items()),
                number(gain, ".1f"),
                *(number(peaks[c].get("compile_s"), ".0f") for c in ("inductor", "mst")),
                *(number(step_s.get(c), ".4g") for c in ("inductor", "mst")),
                _failure(time) or number(time.get("mst_over_inductor"), ".2f"),
            ]
        )
    return table(header, rows)


def _error(records: Records) -> str:
    header = ("model", "tokens", "mode", "worst gradient: eager", "inductor", "mst")
    header += ("loss: eager", "inductor", "mst")
    rows: list[list[str]] = []
    for key, record in records.items():
        if key.startswith("error/"):
            cells = [
                _failure(record) or number(record.get(contender, {}).get(what), ".1e")
                for what in ("worst", "loss")
                for contender in ("eager", "inductor", "mst")
            ]
            rows.append([*key.split("/")[1:], *cells])
    return table(header, rows)


TITLES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen3": "Qwen3",
    "gemma2": "Gemma-2 (soft-capped)",
    "bert": "BERT (masked LM)",
    "nanogpt": "nanoGPT-style",
}


def readme_cost(results: dict[str, Any]) -> str:
    """mst against Inductor, per model and case: peaks, step time, compile time."""
    records: Records = results["records"]
    rows: list[list[str]] = []
    for model, title in TITLES.items():
        size = results["sizes"][model]
        cases = [k.split("/")[2] for k in records if re.fullmatch(f"peak/{model}/.*/mst", k)]
        for case in cases:
            time = records.get(f"time/{model}/{case}", {})
            theirs, ours = (
                records.get(f"peak/{model}/{case}/{c}", {}) for c in ("inductor", "mst")
            )
            peaks, compiles = (
                [float(r[what]) for r in (theirs, ours) if what in r]
                for what in ("peak_intermediate_nbytes", "compile_s")
            )
            if len(peaks) < 2:  # it failed, which the other table says
                continue
            rows.append(
                [
                    title,
                    f"{size['layers']} x {size['hidden']}, {size['vocab']:,}",
                    case.replace("x", " x "),
                    *(f"{nbytes / 2**20:,.0f}" for nbytes in peaks),
                    f"**{peaks[1] / peaks[0]:.2f}x**",
                    number(time.get("mst_over_inductor"), ".2f"),
                    f"{compiles[1] / compiles[0]:.2f}",
                ]
            )
    header = ("model", "layers x hidden, vocabulary", "batch x tokens", "Inductor MiB", "mst MiB")
    return table((*header, "peak", "time per step", "compile time"), rows)


def readme_errors(results: dict[str, Any]) -> str:
    """Worst gradient errors against float64, mst and Inductor, per model and precision."""
    records: Records = results["records"]
    modes = ("fp32", "bf16", "autocast")
    rows: list[list[str]] = []
    for model, title in TITLES.items():
        found = {k.split("/")[3]: r for k, r in records.items() if k.startswith(f"error/{model}/")}
        if found:
            pairs = [[found.get(m, {}).get(c, {}) for c in ("mst", "inductor")] for m in modes]
            cells = (" / ".join(number(r.get("worst"), ".2e") for r in pair) for pair in pairs)
            rows.append([title, *cells])
    return table(("worst gradient error, mst / Inductor", *modes), rows)


def write_readme(results: dict[str, Any], path: Path) -> None:
    """Put the tables of `benchmarks.memory` into the README."""
    text = path.read_text()
    for name, made in (("memory", readme_cost(results)), ("errors", readme_errors(results))):
        text = put(text, name, made)
    path.write_text(text)


def put(text: str, name: str, table_text: str) -> str:
    """A text with a table between its markers, ``<!-- table:NAME -->`` and
    ``<!-- /table:NAME -->``.

    Raises:
        ValueError: a marker is missing.
    """
    begin, end = f"<!-- table:{name} -->", f"<!-- /table:{name} -->"
    if begin not in text or end not in text:
        raise ValueError(f"no {begin} ... {end} to put a table between")
    head, _, rest = text.partition(begin)
    return f"{head}{begin}\n{table_text}\n{end}{rest.partition(end)[2]}"


def _failure(record: dict[str, Any]) -> str:
    """What stands in the table for a job that ended without a figure."""
    if "failed" not in record:
        return ""
    return "out of memory" if "OutOfMemoryError" in record["failed"] else "failed"


def number(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rows = list(rows)
    if not rows:
        return ""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    write_readme(json.loads(Path(sys.argv[1]).read_text()), Path("README.md"))

"""The results of `benchmarks.memory` as Markdown, for the README."""

from collections.abc import Iterable, Sequence
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
                *(_failure(peaks[c]) or _number(n and n / 2**20, ".1f") for c, n in nbytes.items()),
                _number(gain, ".1f"),
                *(_number(peaks[c].get("compile_s"), ".0f") for c in ("inductor", "mst")),
                *(_number(step_s.get(c), ".4g") for c in ("inductor", "mst")),
                _failure(time) or _number(time.get("mst_over_inductor"), ".2f"),
            ]
        )
    return _table(header, rows)


def _error(records: Records) -> str:
    header = ("model", "tokens", "mode", "worst gradient: eager", "inductor", "mst")
    header += ("loss: eager", "inductor", "mst")
    rows: list[list[str]] = []
    for key, record in records.items():
        if key.startswith("error/"):
            cells = [
                _failure(record) or _number(record.get(contender, {}).get(what), ".1e")
                for what in ("worst", "loss")
                for contender in ("eager", "inductor", "mst")
            ]
            rows.append([*key.split("/")[1:], *cells])
    return _table(header, rows)


def _failure(record: dict[str, Any]) -> str:
    """What stands in the table for a job that ended without a figure."""
    if "failed" not in record:
        return ""
    return "out of memory" if "OutOfMemoryError" in record["failed"] else "failed"


def _number(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rows = list(rows)
    if not rows:
        return ""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

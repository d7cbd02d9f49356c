"""Hold the sittings, keep the results; see the package's docstring."""

import argparse
import contextlib
import importlib.metadata
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks import coverage, measure, quiet, store
from benchmarks.peers import page
from benchmarks.peers.cases import CASES, LENGTHS, SIZES
from benchmarks.peers.contenders import CONTENDERS, of_case
from benchmarks.peers.turns import Gone, Process

_LEAST_ROUNDS = 3
_PACKAGES = ("deepspeed", "liger-kernel", "cut-cross-entropy", "minis")


def sit(
    group: dict[str, Any],
    names: list[str],
    options: argparse.Namespace,
    begun: Path,
    record: dict[str, Any],
    keep: Callable[[], None],
) -> None:
    """Measure the contenders of a group into `record["contenders"]`; `keep` saves what is known.

    `begun` is a cache folder, see turns.Process.
    """
    rows: dict[str, dict[str, Any]] = record["contenders"]
    with tempfile.TemporaryDirectory(prefix="mstc-truth-") as folder, contextlib.ExitStack() as all:
        quiet.work()
        job = group | {"truth": _truth(group, Path(folder), options, record)}
        ready: dict[str, Process] = {}
        for name in names:
            if "failed" in rows.get(name, {}):  # in a sitting that was interrupted
                continue
            if missing := CONTENDERS[name].missing(options.device):
                rows[name] = {"missing": missing}
                continue
            process = all.enter_context(Process(begun))
            try:
                rows[name] = process.ask(job | {"contender": name}, options.timeout)
                ready[name] = process
            except Gone as reason:
                rows[name] = {"failed": str(reason)}
                process.end()
            keep()
        with quiet.alone():
            _take_turns(ready, rows, options)


def _truth(
    group: dict[str, Any], folder: Path, options: argparse.Namespace, record: dict[str, Any]
) -> str | None:
    """The file with float64 gradients; None, and a word in the record, if they cannot be had."""
    path = str(folder / "truth.pt")
    try:
        measure.run_fresh(
            "benchmarks.peers.worker", group | {"truth": path}, timeout_s=options.timeout
        )
    except measure.WorkerFailed as problem:
        record["without_truth"] = coverage.shortened(str(problem)[-300:])
        return None
    return path


def _take_turns(
    ready: dict[str, Process], rows: dict[str, dict[str, Any]], options: argparse.Namespace
) -> None:
    """Add seconds of each round: as many rounds as fit into the time for them, but some."""
    begin = time.monotonic()
    for done in range(options.rounds):
        if done >= _LEAST_ROUNDS and time.monotonic() - begin > options.seconds:
            break
        for name, process in list(ready.items()):
            try:
                seconds = process.ask("turn", options.timeout)["s"]
                rows[name].setdefault("rounds_s", []).append(round(seconds, 5))
            except Gone as reason:
                rows[name] = {"failed": str(reason)}
                del ready[name]
                process.end()


def header(options: argparse.Namespace) -> dict[str, Any]:
    """What a figure depends on beside our code; results under another are not continued."""
    found = measure.environment(options.device)
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found["versions"][name] = importlib.metadata.version(name)
    sizes = {case: asdict(size) for case, size in SIZES[options.scale].items()}
    return found | {"dtype": options.dtype, "sizes": sizes, "date": date.today().isoformat()}


def _parse(arguments: list[str]) -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return text.split(",")

    parser = argparse.ArgumentParser(
        prog="benchmarks.peers", description="mst beside what else lowers the memory of a step"
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU")
    add("--cases", type=names, default=list(CASES), metavar="CASE,...")
    add("--tokens", type=names, metavar="N,...", help="default: those of the device")
    add("--contenders", type=names, metavar="NAME,...", help="default: all; else give --out")
    add("--rounds", type=int, default=7, help="turns of each contender, at most")
    add("--seconds", type=float, default=45, help="after which no round begins, but the first 3")
    add("--timeout", type=float, default=300, help="seconds that an answer may take")
    add("--memory-gib", type=float, default=14, help="that a process may take (CPU)")
    add("--scale", choices=tuple(SIZES), help="sizes; default: those of the device")
    add("--redo", action="store_true", help="also groups that the results have")
    add("--force", action="store_true", help="drop results of another machine or version")
    add("--out", type=Path, help="default: benchmarks/results/peers-<device>.json")
    options = parser.parse_args(arguments)
    options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    options.scale = options.scale or options.device
    for given, known in ((options.cases, CASES), (options.contenders or (), CONTENDERS)):
        if unknown := set(given) - set(known):
            parser.error(f"unknown: {', '.join(sorted(unknown))} (known: {', '.join(known)})")
    if options.out is None:
        if options.contenders or options.scale != options.device:
            parser.error("--out is needed with --contenders or --scale: these are not published")
        options.out = page.results_path(options.device)
    return options


def groups(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Key in the results -> what all jobs of the group share."""
    common = {name: getattr(options, name) for name in ("device", "dtype", "scale", "memory_gib")}
    found: dict[str, dict[str, Any]] = {}
    for case in options.cases:
        for tokens in options.tokens or LENGTHS[options.device][case]:
            found[f"{case}/{tokens}"] = common | {"case": case, "tokens": int(tokens)}
    return found


def main(arguments: list[str]) -> int:
    options = _parse(arguments)
    results = store.load(options.out, header(options), options.force)
    with tempfile.TemporaryDirectory(prefix="mstc-begun-") as folder:
        begun = Path(folder)
        measure.run_fresh("benchmarks.peers.worker", {}, kernels=begun)
        _measure_all(options, begun, results)
    print(page.summary(results))
    if options.out == page.results_path(options.device):
        page.write()
    return 0


def _measure_all(options: argparse.Namespace, begun: Path, results: dict[str, Any]) -> None:
    """Hold the sittings that the results lack."""
    records, commit = results["records"], coverage.commit()
    progress = tqdm(groups(options).items(), unit="group")
    for key, group in progress:
        progress.set_postfix_str(key)
        record = records.get(key)
        if record and record["complete"] and not options.redo:
            continue
        if record is None or record["complete"] or record["commit"] != commit:
            record = records[key] = {"complete": False, "commit": commit, "contenders": {}}
        names = [n for n in of_case(group["case"]) if n in (options.contenders or CONTENDERS)]
        begin = time.monotonic()
        sit(group, names, options, begun, record, lambda: store.save(options.out, results))
        record |= {"complete": True, "seconds": round(time.monotonic() - begin)}
        record["contenders"] = {name: record["contenders"][name] for name in names}
        store.save(options.out, results)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

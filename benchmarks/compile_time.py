"""How long compiling takes: the first step of a model of many layers, cold and from warm caches.

    python -m benchmarks.compile_time                   # 4 and 32 layers; a quarter of an hour
    python -m benchmarks.compile_time --layers 8 --rounds 1

Each figure is the first forward and backward of the zoo's Llama in a fresh process, after Inductor
has loaded what it loads once per process. Cold: nothing is compiled. Warm: a second process with
the first one's caches. Backends take turns. Beside the seconds stands how many graphs (loop bodies
are graphs too) Inductor lowered. Results: benchmarks/results/compile-cpu.json and a table of the
README.
"""

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import coverage, measure, store, zoo
from benchmarks.table import put, table

RESULTS = measure.ROOT / "benchmarks" / "results" / "compile-cpu.json"
README = measure.ROOT / "README.md"
LAYERS = (4, 32)
BACKENDS = ("inductor", "mst")
_TIMEOUT_S = 1800


def first_step(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a first step, and what was lowered in it."""
    architecture = zoo.ZOO["llama"]
    subject = architecture.subject(replace(zoo.ROW, layers=job["layers"]))
    measure.warm_up_compiler()
    counters: Any = torch._dynamo.utils.counters
    counters.clear()
    step = measure.training_step(measure.compiled(subject.model, job["backend"]), subject.batch)
    begin = time.perf_counter()
    step()
    seconds = time.perf_counter() - begin
    return {"seconds": round(seconds, 3), "lowered": counters["inductor"]["fxgraph_cache_miss"]}


def measured(layers: int, rounds: int) -> dict[str, Any]:
    """`rounds` of cold and warm starts of each backend, in turns."""
    found: dict[str, Any] = {name: {"cold": [], "warm": []} for name in BACKENDS}
    for _ in range(rounds):
        for name in BACKENDS:
            job = {"layers": layers, "backend": name}
            with tempfile.TemporaryDirectory(prefix="mstc-compile-") as caches:
                for start in ("cold", "warm"):
                    one = measure.run_fresh(
                        "benchmarks.compile_time", job, timeout_s=_TIMEOUT_S, caches=Path(caches)
                    )
                    found[name][start].append(one)
    return found


def summary(results: dict[str, Any]) -> str:
    """The README's table."""
    rows: list[list[str]] = []
    for layers, record in results["records"].items():
        for start in ("cold", "warm"):
            seconds, lowered = (
                [median(one[what] for one in record[name][start]) for name in BACKENDS]
                for what in ("seconds", "lowered")
            )
            rows.append(
                [
                    layers,
                    start,
                    *(f"{s:.1f}" for s in seconds),
                    f"{seconds[1] / seconds[0]:.2f}",
                    *(f"{n:.0f}" for n in lowered),
                ]
            )
    header = ("layers", "caches", "Inductor s", "mst s", "mst / Inductor")
    return table((*header, "graphs lowered: Inductor", "mst"), rows)


def main(arguments: list[str]) -> int:
    if measure.serve(first_step, arguments):
        return 0
    parser = argparse.ArgumentParser(
        prog="benchmarks.compile_time", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--layers", type=int, nargs="+", default=list(LAYERS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--force", action="store_true", help="drop results of other versions")
    options = parser.parse_args(arguments)
    header = measure.environment("cpu") | {"date": date.today().isoformat()}
    results = store.load(RESULTS, header, options.force)
    for layers in options.layers:
        found = measured(layers, options.rounds)
        results["records"][str(layers)] = found | {"commit": coverage.commit()}
        store.save(RESULTS, results)
    README.write_text(put(README.read_text(), "compile", summary(results)))
    print(summary(results))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

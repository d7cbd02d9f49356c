"""The claim "predicted exactly": simulated peaks beside the measured ones of the coverage table.

    python -m benchmarks.prediction                  # every row; resumes where it stopped
    python -m benchmarks.prediction --only llama,t5 --redo --jobs 2
    python -m benchmarks.prediction --anew mst --modes autocast   # and keep what else there is

`mstc.simulate_step` runs no step and builds no kernel; the measured peaks are those in
benchmarks/results/coverage-cpu.json (benchmarks/coverage.py), of the same sizes, contenders,
options and threads: what kernels take while they run is per thread. Per architecture one fresh
process. Results go to benchmarks/results/prediction-cpu.json, and docs/prediction.md and a table of
the README are made of them.
"""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.fx import GraphModule
from tqdm import tqdm

from benchmarks import coverage, measure, models, store, zoo
from benchmarks.table import put, table
from mstc.driver import analyze_graph
from mstc.errors import SimulationError
from mstc.options import parse_options
from mstc.report import GraphReport
from mstc.simulate import Backend, Simulation

RESULTS = measure.ROOT / "benchmarks" / "results" / "prediction-cpu.json"
PAGE = measure.ROOT / "docs" / "prediction.md"
README = measure.ROOT / "README.md"
BACKENDS: tuple[Backend, ...] = ("inductor", "mst")
PLANNER = "planner"  # its own estimate of what mst takes, made before Inductor sees the graph
EVERY = (*BACKENDS, PLANNER)
_WITHIN = 0.05
_SHOWN = 0.001  # of the measured peak: rows that are further off are listed
_TIMEOUT_S = 1800


def rows(job: dict[str, Any]) -> dict[str, Any]:
    """One architecture in all its modes: mode -> backend -> what was found."""
    coverage.let_dynamo_compile_everything()
    torch.set_num_threads(job["threads"])
    name = job["architecture"]
    return {
        mode: {
            one: _estimated(name, mode) if one == PLANNER else _simulated(name, mode, one)
            for one in job["who"]
        }
        for mode in job["modes"]
    }


def _estimated(name: str, mode: str) -> dict[str, Any]:
    """What the planner thinks that its loops take, which sees the joint graph and not what Inductor
    makes of it."""
    architecture = zoo.ZOO[name]
    torch._dynamo.reset()
    graphs: list[GraphReport] = []

    def backend(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        report, run = analyze_graph(gm, inputs, parse_options(None, None))
        graphs.extend(report.graphs)
        return run

    begin = time.perf_counter()
    try:
        subject = _subject(architecture, mode)
        with Simulation(subject.model, subject.batch) as simulation:
            compiled = architecture.compile(
                subject.model, lambda part: torch.compile(part, backend=backend, dynamic=False)
            )
            measure.training_step(compiled, simulation.batch, mode == "autocast")()
    except Exception as error:  # what cannot be simulated
        return {"failed": f"{type(error).__name__}: {error}"[:500]}
    if len(graphs) != 1:
        return {"refused": f"{len(graphs)} graphs, each with an estimate of its own"}
    seconds = round(time.perf_counter() - begin, 1)
    return {"peak_intermediate_nbytes": graphs[0].peak_after, "seconds": seconds}


def _simulated(name: str, mode: str, backend: Backend) -> dict[str, Any]:
    architecture = zoo.ZOO[name]
    torch._dynamo.reset()
    begin = time.perf_counter()
    try:
        subject = _subject(architecture, mode)
        with Simulation(subject.model, subject.batch) as simulation:
            compiled = architecture.compile(
                subject.model, lambda part: simulation.compile(part, backend)
            )
            step = measure.training_step(compiled, simulation.batch, mode == "autocast")
            trace = simulation.trace(step)
    except (SimulationError, zoo.Unavailable) as reason:
        return {"refused": str(reason)}
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"[:500]}
    seconds = round(time.perf_counter() - begin, 1)
    return {"peak_intermediate_nbytes": trace.peak_intermediate_nbytes, "seconds": seconds}


def _subject(architecture: zoo.Architecture, mode: str) -> models.Subject:
    subject = architecture.subject(zoo.ROW)
    if mode == "bf16":
        subject = coverage.in_bfloat16(subject)
    if mode == "checkpoint":
        zoo.checkpoint(architecture, subject.model)
    return subject


@dataclass(frozen=True)
class Findings:
    """Predictions held against measurements."""

    off: dict[str, list[tuple[float, str]]]  # backend -> relative error and row
    without: list[str]  # rows that lack one of both, and why

    @property
    def summary(self) -> str:
        """One line per backend."""
        header = ("backend", "rows", "equal to the byte", "median error", "worst error")
        header += (f"within {_WITHIN:.0%}",)
        return table(header, [_summary_line(name, found) for name, found in self.off.items()])


def compare(results: dict[str, Any], measured: dict[str, Any]) -> Findings:
    """Both result files, row by row."""
    off: dict[str, list[tuple[float, str]]] = {one: [] for one in EVERY}
    without: list[str] = []
    for name, modes in results["records"].items():
        for mode, found in modes["modes"].items():
            contenders = measured["records"][f"{name}/{mode}"]["contenders"]
            for backend, one in found.items():
                contender = "mst" if backend == PLANNER else backend
                real = contenders[contender].get("peak_intermediate_nbytes")
                if real is None or "peak_intermediate_nbytes" not in one:
                    why = one.get("refused") or one.get("failed") or "it was not measured"
                    without.append(f"* {name}/{mode}, {backend}: {why}")
                else:
                    off[backend].append(
                        (one["peak_intermediate_nbytes"] / real - 1, f"{name}/{mode}")
                    )
    return Findings(off, without)


def page(results: dict[str, Any], found: Findings) -> str:
    """docs/prediction.md."""
    listed = [
        (row, backend, f"{error:+.2%}", _commit(results, row, backend))
        for backend, errors in found.off.items()
        for error, row in sorted(errors, key=lambda one: -abs(one[0]))
        if abs(error) > (_WITHIN if backend == PLANNER else _SHOWN)
    ]
    seconds = [
        one["seconds"]
        for modes in results["records"].values()
        for backends in modes["modes"].values()
        for backend, one in backends.items()
        if "seconds" in one and backend != PLANNER
    ]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    commits = ", ".join(f"{commit} ({n})" for commit, n in _commits(results).most_common())
    return _PAGE.format(
        threads=results["threads"],
        where=f"{results['device']}; {versions}; {results['date']}; answers by commit: {commits}",
        summary=found.summary,
        seconds=f"{median(seconds):.1f}" if seconds else "?",
        shown=f"{_SHOWN:.1%}",
        within=f"{_WITHIN:.0%}",
        off=table(("row", "backend", "error", "commit"), listed) if listed else "None.",
        without="\n".join(found.without) or "None.",
    )


def _commit(results: dict[str, Any], row: str, backend: str) -> str:
    name, mode = row.split("/")
    return results["records"][name]["modes"][mode][backend]["commit"]


def _commits(results: dict[str, Any]) -> Counter[str]:
    """How many answers are of which state of the code."""
    return Counter(
        answer["commit"]
        for record in results["records"].values()
        for answers in record["modes"].values()
        for answer in answers.values()
    )


def _summary_line(backend: str, found: list[tuple[float, str]]) -> list[str]:
    sizes = [abs(error) for error, _ in found]
    worst, row = max(((abs(error), row) for error, row in found), default=(0.0, ""))
    return [
        backend,
        str(len(found)),
        str(sum(size == 0 for size in sizes)),
        f"{median(sizes):.2%}" if sizes else "",
        f"{worst:.2%} ({row})" if worst else "0",
        str(sum(size <= _WITHIN for size in sizes)),
    ]


_PAGE = """\
# Predicted peaks

`mstc.simulate_step` says how much intermediate memory a training step takes, and runs nothing of
it. Here its answer stands beside what the allocator counted, for every row of the
[coverage table](coverage.md). Made by `python -m benchmarks.prediction`; {where}.

{summary}

A simulation took {seconds} s (median), as long as compiling without building kernels does. The
planner's estimate is the one of `mstc.explain` and of every compilation's report: made of the
joint graph alone, in the time of the passes, by a model of what the partitioner keeps and what
Inductor fuses (`passes/liveness.py`). It chooses the loops.

## Further off than {shown} (the planner: {within})

{off}

Memory that a kernel takes while it runs is part of both sides: for products in bfloat16, attention,
convolutions, and sums of float32 and bfloat16. A simulation learns it by running such an op
once (`mstc/scratch.py`), with as many threads as the measured step had: {threads}. Rows in float32
and checkpointed ones were mostly simulated before it did that (commits before 6bd1353, one thread).
Measured and simulated steps are both of the code before keys and values took no gradient.

## Rows without a prediction, or without a measured peak

{without}
"""


def main(arguments: list[str]) -> int:
    if measure.serve(rows, arguments):
        return 0
    parser = argparse.ArgumentParser(
        prog="benchmarks.prediction", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--only", type=lambda t: t.split(","), default=list(zoo.ZOO), metavar="NAME,..."
    )
    parser.add_argument("--jobs", type=int, default=1, help="architectures at once")
    parser.add_argument("--redo", action="store_true", help="also rows that the results have")
    parser.add_argument(
        "--anew",
        type=lambda t: t.split(","),
        metavar="WHO,...",
        help=f"these of {', '.join(EVERY)} anew, and nothing else",
    )
    parser.add_argument(
        "--modes",
        type=lambda t: t.split(","),
        default=list(coverage.EXPERT_MODES),
        metavar="MODE,...",
        help="with --anew: of these modes",
    )
    parser.add_argument("--force", action="store_true", help="drop results of other versions")
    options = parser.parse_args(arguments)
    if unknown := set(options.only) - set(zoo.ZOO):
        parser.error(f"unknown: {', '.join(sorted(unknown))} (known: {', '.join(zoo.ZOO)})")
    measured = json.loads(Path(coverage.RESULTS).read_text())
    header = measure.environment("cpu") | {"date": date.today().isoformat()}
    header["threads"] = measured["threads"]
    results = store.load(RESULTS, header, options.force)
    records = results["records"]
    if unknown := {*(options.anew or ()), *options.modes} - {*EVERY, *coverage.EXPERT_MODES}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    jobs = [
        {
            "architecture": name,
            "who": options.anew or EVERY,
            "modes": [m for m in coverage.modes_of(name) if not options.anew or m in options.modes],
            "threads": header["threads"],
        }
        for name in options.only
        if options.redo or options.anew or name not in records
    ]
    with ThreadPoolExecutor(options.jobs) as pool:
        pending = {pool.submit(_fresh, job): job["architecture"] for job in jobs if job["modes"]}
        for done in tqdm(as_completed(pending), total=len(pending), unit="architecture"):
            modes = records.setdefault(pending[done], {"modes": {}})["modes"]
            for mode, found in done.result().items():
                modes.setdefault(mode, {}).update(found)
            store.save(RESULTS, results)
    order = {name: records[name] for name in zoo.ZOO if name in records}
    results["records"] = order
    store.save(RESULTS, results)
    found = compare(results, measured)
    PAGE.write_text(page(results, found))
    README.write_text(put(README.read_text(), "prediction", found.summary))
    print(found.summary)
    return 0


def _fresh(job: dict[str, Any]) -> dict[str, Any]:
    """What `rows` finds, with the commit that it is of."""
    try:
        found = measure.run_fresh("benchmarks.prediction", job, timeout_s=_TIMEOUT_S)
    except measure.WorkerFailed as problem:
        lost = {"failed": str(problem)[-300:]}
        found = {mode: dict.fromkeys(job["who"], lost) for mode in job["modes"]}
    commit = coverage.commit()
    return {
        mode: {one: answer | {"commit": commit} for one, answer in answers.items()}
        for mode, answers in found.items()
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

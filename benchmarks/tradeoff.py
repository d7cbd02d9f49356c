"""The trade-off between memory and time: what every setting of a memory budget costs.

    python -m benchmarks.tradeoff                           # resumes where it stopped
    python -m benchmarks.tradeoff --only llama --tokens 128,8192 --redo
    python -m benchmarks.tradeoff --every                   # all architectures, one length each
    python -m benchmarks.tradeoff --predict                 # their times, as the planner has them

Per model and length one fresh process, in which Inductor, mst by default ("auto") and settings that
a budget chooses from take turns. Peaks are exact and hold the gradients, as a budget does. Two
*studies*: two models at four lengths with all settings, and every architecture of the coverage
table at its own size with fewer. Results go to benchmarks/results, one file each; docs/tradeoff.md
and its two pictures are made of them.
"""

import argparse
import functools
import json
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from torch.fx import GraphModule
from tqdm import tqdm

from benchmarks import coverage, measure, store, tradeoff_page, zoo
from mstc.budget import CHUNKED, FINER
from mstc.driver import analyze_graph, compile_graph
from mstc.options import Options, Setting
from mstc.report import Report
from mstc.runtime.memory import measure_step

_RESULTS = measure.ROOT / "benchmarks" / "results"
TOKENS = (128, 512, 2048, 8192)
OWN = 0  # instead of a length: the row of the coverage table
SETTINGS: dict[str, Setting] = {
    "auto": Setting(),
    "0.25": CHUNKED[2],
    "0.5": CHUNKED[4],
    "0.75": CHUNKED[6],
    "1": CHUNKED[8],
    "finer": FINER[0],
    "1, recomputed": Setting(tightness=1.0, activation_budget=0.2),
    "below": Setting(tightness=1.0, least_divisor=4, activation_budget=0.05),
}


@dataclass(frozen=True)
class Study:
    """What is measured together, under one header."""

    results: Path
    models: tuple[str, ...]
    tokens: tuple[int, ...]
    settings: tuple[str, ...]  # names in `SETTINGS`


LENGTHS = Study(
    results=_RESULTS / "tradeoff-cpu.json",
    models=("llama", "bert"),
    tokens=TOKENS,
    settings=tuple(name for name in SETTINGS if name != "finer"),
)
EVERY = Study(
    results=_RESULTS / "tradeoff-every-cpu.json",
    models=tuple(zoo.ZOO),
    tokens=(OWN,),
    settings=("auto", "0.5", "1", "finer"),
)
BASE = "inductor"
_TIMEOUT_S = 1800


def row(job: dict[str, Any]) -> dict[str, Any]:
    """One model at one length: contender -> peak and seconds of each round."""
    coverage.let_dynamo_compile_everything()
    architecture = zoo.ZOO[job["model"]]
    scale = replace(zoo.ROW, tokens=job["tokens"]) if job["tokens"] != OWN else zoo.ROW
    subject = architecture.subject(scale)
    found: dict[str, Any] = {}
    steps: dict[str, Callable[[], object]] = {}
    for name in (BASE, *job["settings"]):
        compiled = architecture.compile(subject.model, functools.partial(_compiled, name))
        step = measure.training_step(compiled, subject.batch)
        try:
            step()
            step()  # so that nothing is made or tuned while measuring
        except Exception as error:
            found[name] = {"failed": f"{type(error).__name__}: {error}"[:300]}
            continue
        trace = measure_step(step, subject.model.parameters())
        found[name] = {
            "peak_nbytes": trace.peak_nbytes,
            "peak_intermediate_nbytes": trace.peak_intermediate_nbytes,
        }
        steps[name] = step
    times = measure.alternate(steps, subject.model, "cpu", job["rounds"])
    for name, values in times.items():
        found[name]["rounds_s"] = [round(value, 5) for value in values]
    if job["tokens"] == OWN:
        _put_beside(found, predictions(job))
    return {"contenders": found}


def _put_beside(found: dict[str, Any], predicted: dict[str, float | None]) -> None:
    for name, time in predicted.items():
        found[name]["predicted"] = time


def predictions(job: dict[str, Any]) -> dict[str, float | None]:
    """Setting -> the time of a step, of Inductor's, as the planner predicts it."""
    coverage.let_dynamo_compile_everything()
    architecture = zoo.ZOO[job["model"]]
    subject = architecture.subject(zoo.ROW)
    found: dict[str, float | None] = {}
    for name in job["settings"]:
        options = Options(setting=SETTINGS[name])
        together = Report()

        def backend(
            gm: GraphModule,
            inputs: Sequence[Any],
            options: Options = options,
            together: Report = together,
        ) -> Callable[..., Any]:
            report, run = analyze_graph(gm, inputs, options)
            together.graphs += report.graphs
            return run

        compiled = architecture.compile(
            subject.model, functools.partial(measure.compiled_by, backend=backend)
        )
        measure.training_step(compiled, subject.batch)()
        found[name] = together.relative_time
    return found


def _worker(job: dict[str, Any]) -> dict[str, Any]:
    return predictions(job) if job["predict"] else row(job)


def _predict() -> None:
    """Write what is predicted beside what was measured of every architecture."""
    results = json.loads(EVERY.results.read_text())

    def fresh(key: str) -> dict[str, Any]:
        job = {"predict": True, "model": key.split("/")[0], "settings": EVERY.settings}
        return measure.run_fresh("benchmarks.tradeoff", job, timeout_s=_TIMEOUT_S)

    with ThreadPoolExecutor(2) as pool:  # no time is measured
        found = pool.map(fresh, results["records"])
        for record in tqdm(results["records"].values(), unit="row"):
            _put_beside(record["contenders"], next(found))
    store.save(EVERY.results, results)


def _compiled(name: str, part: Any) -> Callable[..., Any]:
    if name == BASE:
        return measure.compiled(part, name)
    options = Options(setting=SETTINGS[name])

    def backend(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return compile_graph(gm, inputs, options)

    return measure.compiled_by(part, backend)


def main(arguments: list[str]) -> int:
    if measure.serve(_worker, arguments):
        return 0
    parser = argparse.ArgumentParser(
        prog="benchmarks.tradeoff", description=(__doc__ or "").split("\n")[0]
    )
    names = {"type": lambda text: text.split(","), "metavar": "NAME,..."}
    parser.add_argument("--every", action="store_true", help="the study of all architectures")
    parser.add_argument("--predict", action="store_true", help="predict times, measure nothing")
    parser.add_argument("--only", **names)
    parser.add_argument("--tokens", **names)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--kernels", type=Path, help="a folder that keeps C++ kernels between runs")
    parser.add_argument("--redo", action="store_true", help="also rows that the results have")
    parser.add_argument("--force", action="store_true", help="drop results of other versions")
    options = parser.parse_args(arguments)
    if unknown := set(options.only or ()) - set(zoo.ZOO):
        parser.error(f"unknown: {', '.join(sorted(unknown))} (known: {', '.join(zoo.ZOO)})")
    if options.predict:
        if options.every or options.only or options.tokens:
            parser.error("--predict is of all architectures, and of nothing else")
        _predict()
        _write_page()
        return 0
    study = EVERY if options.every else LENGTHS
    header = measure.environment("cpu") | {"date": date.today().isoformat()}
    results = store.load(study.results, header, options.force)
    lengths = [int(text) for text in options.tokens or study.tokens]
    jobs = [(model, tokens) for model in options.only or study.models for tokens in lengths]
    for model, tokens in tqdm(jobs, unit="row"):
        key = f"{model}/{tokens}"
        if key in results["records"] and not options.redo:
            continue
        job = {"predict": False, "model": model, "tokens": tokens, "rounds": options.rounds}
        try:
            found = measure.run_fresh(
                "benchmarks.tradeoff",
                job | {"settings": study.settings},
                timeout_s=_TIMEOUT_S,
                kernels=options.kernels,
            )
        except measure.WorkerFailed as error:
            tqdm.write(f"{key}: {error}")  # no row: the next run tries again
            continue
        results["records"][key] = found | {"commit": coverage.commit()}
        store.save(study.results, results)
    _write_page()
    return 0


def _write_page() -> None:
    tradeoff_page.write(
        json.loads(LENGTHS.results.read_text()), json.loads(EVERY.results.read_text())
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

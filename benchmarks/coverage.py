"""The claim "any architecture": every architecture of the zoo in every mode, beside three others.

    python -m benchmarks.coverage                    # everything; resumes where it stopped
    python -m benchmarks.coverage --only llama,t5 --modes fp32,autocast --redo
    python -m benchmarks.coverage --jobs 2           # two rows at once, timed one by one
    python -m benchmarks.coverage --lowering eager --out found.json   # quick, for finding faults

A row is one architecture in one mode, in a process of its own. PyTorch's caches of compiled graphs
are off; rows share the C++ kernels, so a row that is measured again builds only what has changed:
    1. loss and gradients of the model in float64, eager;
    2. for each contender (eager, Inductor, Inductor with its auto_chunker, mst with default
       options): gradients of the first step against the float64 ones; then the peak of
       intermediate memory of a later step (mstc/runtime/memory.py);
    3. steps of all contenders in turns, for their times;
    4. what mst reports: graphs, loops, refusals.
A contender that fails leaves its error in the row, and the run goes on. Times differ from process
to process on a shared machine: a row that is above the limit is measured twice more, and the median
of the three ratios stands (`runs` in the results has them all).

Results go to benchmarks/results/coverage-cpu.json after every row. When the last is done,
benchmarks/coverage_table.py makes docs/coverage.md of them.
"""

import argparse
import copy
import json
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import accuracy, coverage_table, measure, models, quiet, store, zoo
from mstc import history
from mstc.runtime.memory import measure_step

MODES = ("fp32", "autocast", "checkpoint")
EXPERT_MODES = (*MODES, "bf16")  # transformers' experts are one graph in bfloat16 weights alone
CONTENDERS = ("eager", "inductor", "auto_chunker", "mst")
SCALES = {"row": zoo.ROW, "tiny": zoo.TINY}
RESULTS = measure.ROOT / "benchmarks" / "results" / "coverage-cpu.json"
PAGE = measure.ROOT / "docs" / "coverage.md"
README = measure.ROOT / "README.md"
_DEVICE = "cpu"
_WITHOUT_INDUCTOR = {"inductor": "aot_eager", "mst": "mst_eager"}  # who stands in for whom
_ROW_TIMEOUT_S = 900
_RUNS = 3  # of a row that is above the limit on time
_TEXT = 700  # characters of an error that are kept


# --- a row, in its own process


def row(job: dict[str, Any]) -> dict[str, Any]:
    """One architecture in one mode."""
    begin = time.perf_counter()
    found = _compile_and_compare(job)
    if not isinstance(found, _Compiled):
        return found
    with quiet.alone():
        _take_turns(found, job["rounds"])
    found.result["reports"] = [_plain_report(report) for report in history.reports()]
    found.result["seconds"] = round(time.perf_counter() - begin, 1)
    return found.result


@dataclass
class _Compiled:
    """The contenders that work, ready to be timed, and what is known of all so far."""

    subject: models.Subject
    steps: dict[str, Callable[[], Tensor]]
    result: dict[str, Any]


def _compile_and_compare(job: dict[str, Any]) -> _Compiled | dict[str, Any]:
    """Everything but the times; or a result that says why there is none."""
    architecture, scale = zoo.ZOO[job["architecture"]], SCALES[job["scale"]]
    try:
        subject = architecture.subject(scale)
        if job["mode"] == "bf16":
            subject = in_bfloat16(subject)
        truth = _Truth(architecture, subject)
        if job["mode"] == "checkpoint":
            zoo.checkpoint(architecture, subject.model)
    except zoo.Unavailable as reason:
        return {"skipped": str(reason)}
    autocast = job["mode"] == "autocast"
    result: dict[str, Any] = {"sizes": asdict(architecture.at(scale)), "contenders": {}}
    if architecture.experts:
        result["routing"] = _compare_routing(subject, truth, autocast)

    let_dynamo_compile_everything()
    steps: dict[str, Callable[[], Tensor]] = {}
    for name in job["contenders"]:
        compiler = _compiler(name, job["lowering"])
        try:
            compiled = architecture.compile(subject.model, compiler)
            step = measure.training_step(compiled, subject.batch, autocast)
            result["contenders"][name] = _first_steps(step, subject, truth, name)
            steps[name] = step
        except Exception as error:
            result["contenders"][name] = {"failed": text_of(error)}
    return _Compiled(subject, steps, result)


def in_bfloat16(subject: models.Subject) -> models.Subject:
    """Weights and images rounded; the reference starts from the rounded ones."""
    for parameter in subject.model.parameters():
        # Not the buffers: from_pretrained leaves rotary frequencies in float32 too.
        parameter.data = parameter.data.bfloat16()
    batch = {name: _converted(value, torch.bfloat16) for name, value in subject.batch.items()}
    return models.Subject(subject.model, batch)


class _Truth:
    """Loss and gradients of a copy in float64."""

    def __init__(self, architecture: zoo.Architecture, subject: models.Subject) -> None:
        self.model = copy.deepcopy(subject.model).double()
        self.batch = {n: _converted(value, torch.float64) for n, value in subject.batch.items()}
        with accuracy.Float64():
            self.loss = measure.training_step(self.model, self.batch)()
        assert self.loss.dtype == torch.float64, self.loss.dtype
        self.gradients = accuracy.gradients(self.model)


def _converted(value: Any, dtype: torch.dtype) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype) if floating else value


def _compare_routing(subject: models.Subject, truth: _Truth, autocast: bool) -> dict[str, int]:
    """Do routers choose in this mode as they do in float64? (see benchmarks/zoo/routing.py)"""
    with torch.no_grad(), zoo.Routing() as true, accuracy.Float64():
        truth.model(**truth.batch)
    cast = torch.autocast(_DEVICE, torch.bfloat16, enabled=autocast)
    with torch.no_grad(), zoo.Routing() as own, cast:
        subject.model(**subject.batch)
    return {"decisions": true.decisions, "differing": own.differing(true)}


def let_dynamo_compile_everything() -> None:
    """No limit is reached, behind which Dynamo would quietly run a model op by op."""
    config: Any = torch._dynamo.config
    config.recompile_limit = 256
    config.accumulated_recompile_limit = 4096
    config.fail_on_recompile_limit_hit = True


def _compiler(name: str, lowering: str) -> Callable[[Any], Callable[..., Any]]:
    contender = _WITHOUT_INDUCTOR.get(name, name) if lowering == "eager" else name
    return lambda model: measure.compiled(model, contender)


def _first_steps(
    step: Callable[[], Tensor], subject: models.Subject, truth: _Truth, name: str
) -> dict[str, Any]:
    """Compile, compare, measure the peak.

    Raises:
        whatever the contender raises; RuntimeError if it compiled nothing.
    """
    counters: Any = torch._dynamo.utils.counters
    counters.clear()
    measure.clear_gradients(subject.model)
    losses = [step()]
    gradients = accuracy.gradients(subject.model)
    measure.clear_gradients(subject.model)
    step()  # a second step, so that nothing is made or tuned while measuring
    trace = measure_step(step, subject.model.parameters(), _DEVICE)
    graphs = counters["stats"]["unique_graphs"]
    if name != "eager" and not graphs:
        raise RuntimeError("nothing was compiled")
    return {
        "peak_intermediate_nbytes": trace.peak_intermediate_nbytes,
        "error": accuracy.floored_error(gradients, truth.gradients),
        "loss_error": float((losses[0].double() - truth.loss).abs() / truth.loss.abs()),
        "graphs": graphs,
        "graph_breaks": sum(counters["graph_break"].values()),
    }


def _take_turns(compiled: _Compiled, rounds: int) -> None:
    """Add the seconds of each round to the contenders, and what was compiled meanwhile."""
    if not rounds:
        return
    counters: Any = torch._dynamo.utils.counters
    counters.clear()
    contenders = compiled.result["contenders"]
    times = measure.alternate(compiled.steps, compiled.subject.model, _DEVICE, rounds, warm_up=1)
    for name, values in times.items():
        contenders[name]["rounds_s"] = [round(value, 5) for value in values]
    if late := counters["stats"]["unique_graphs"]:
        for name in times.keys() - {"eager"}:
            contenders[name]["note"] = f"{late} graphs were compiled while steps were timed"


def _plain_report(report: Any) -> dict[str, Any]:
    """A report without its tables; equal refusals once, with their number and largest size."""
    entry = json.loads(report.to_json())
    for graph in entry["graphs"]:
        del graph["table"], graph["table_after"]
        graph["refusals"] = _folded(graph["refusals"])
    entry["refusals"] = _folded(entry["refusals"])
    return entry


def _folded(refusals: list[dict[str, Any]]) -> list[dict[str, Any]]:
    counts = Counter((r["subject"], r["reason"], r["source"]) for r in refusals)
    largest: dict[tuple[str, str, str], int] = {}
    for r in refusals:
        key = (r["subject"], r["reason"], r["source"])
        largest[key] = max(largest.get(key, 0), r["nbytes"])
    names = ("subject", "reason", "source")
    return [
        dict(zip(names, key, strict=True)) | {"nbytes": largest[key], "count": count}
        for key, count in counts.items()
    ]


def text_of(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return shortened(f"{type(error).__name__}: {error}"[:_TEXT] + where)


def shortened(text: str) -> str:
    """Without the folders of this machine."""
    text = re.sub(r"/[^\s\"':]*/site-packages/", "", text)
    return re.sub(r"/[^\s\"':]+/(?=[^/\s\"':]+\.\w+)", "", text)


# --- the run


def commit() -> str:
    """The commit that is measured, with a "+" if the sources have changed since."""

    def git(*arguments: str) -> str:
        command = ("git", *arguments)
        done = subprocess.run(
            command, cwd=measure.ROOT, capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", "mstc", "passes", "benchmarks/*.py")
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + ("+" if changed else "")


def modes_of(name: str) -> tuple[str, ...]:
    """The modes in which the table has a row for an architecture."""
    return EXPERT_MODES if zoo.ZOO[name].experts else MODES


def _jobs(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key in the results, job), architecture by architecture."""
    common = {"lowering": options.lowering, "scale": options.scale, "rounds": options.rounds}
    for name in options.only:
        for mode in options.modes or modes_of(name):
            job = {"architecture": name, "mode": mode, "contenders": options.contenders}
            yield f"{name}/{mode}", common | job


def _is_wanted(record: dict[str, Any] | None, options: argparse.Namespace) -> bool:
    if record is None or options.redo:
        return True
    return options.retry_failed and coverage_table.has_failed(record)


def _run_of(found: dict[str, Any]) -> list[dict[str, float]]:
    """Median seconds by contender, if the process took times."""
    contenders = found.get("contenders", {})
    run = {n: median(c["rounds_s"]) for n, c in contenders.items() if c.get("rounds_s")}
    return [run] if run else []


def _is_slow(record: dict[str, Any], commit: str) -> bool:
    """Above the limit so far, on the code that is measured now."""
    return record["commit"] == commit and coverage_table.is_slow(record)


def _measured(job: dict[str, Any], kernels: Path) -> dict[str, Any]:
    try:
        return measure.run_fresh(
            "benchmarks.coverage", job, timeout_s=_ROW_TIMEOUT_S, kernels=kernels, share=True
        )
    except measure.WorkerFailed as problem:
        return {"failed": shortened(str(problem)[-_TEXT:])}


def _parse(arguments: list[str]) -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return text.split(",")

    parser = argparse.ArgumentParser(
        prog="benchmarks.coverage", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--only", type=names, default=list(zoo.ZOO), metavar="NAME,...")
    parser.add_argument(
        "--modes",
        type=names,
        metavar="MODE,...",
        help=f"default: {', '.join(MODES)}, and bf16 for mixtures of experts",
    )
    parser.add_argument("--contenders", type=names, help="default: all that the lowering has")
    parser.add_argument("--rounds", type=int, default=5, help="of timing, after one to warm up")
    parser.add_argument(
        "--lowering",
        choices=("inductor", "eager"),
        default="inductor",
        help="eager: graphs run op by op, beside aot_eager in Inductor's place",
    )
    parser.add_argument("--jobs", type=int, default=1, help="rows at once, except when timing")
    parser.add_argument(
        "--kernels", type=Path, help="where C++ kernels are kept for a later run; default: nowhere"
    )
    parser.add_argument("--scale", choices=tuple(SCALES), default="row", help="tiny: for tests")
    parser.add_argument("--redo", action="store_true", help="also rows that the results have")
    parser.add_argument("--retry-failed", action="store_true", help="also rows with a failure")
    parser.add_argument(
        "--force", action="store_true", help="drop results of other versions or sizes"
    )
    parser.add_argument("--out", type=Path, help=f"default: {RESULTS.relative_to(measure.ROOT)}")
    options = parser.parse_args(arguments)
    known_contenders = [
        c for c in CONTENDERS if not (c == "auto_chunker" and options.lowering == "eager")
    ]
    options.contenders = options.contenders or known_contenders
    for given, known in (
        (options.only, zoo.ZOO),
        (options.modes or (), EXPERT_MODES),
        (options.contenders, known_contenders),
    ):
        if unknown := set(given) - set(known):
            parser.error(f"unknown: {', '.join(sorted(unknown))} (known: {', '.join(known)})")
    if options.out is None:
        if options.lowering != "inductor" or options.scale != "row":
            parser.error("--out is needed with --lowering eager or --scale tiny")
        options.out = RESULTS
    return options


def main(arguments: list[str]) -> int:
    if measure.serve(row, arguments):
        return 0
    options = _parse(arguments)
    header = measure.environment(_DEVICE) | {
        "date": date.today().isoformat(),
        "lowering": options.lowering,
        "scale": asdict(SCALES[options.scale]),
    }
    results = store.load(options.out, header, options.force)
    records, measured = results["records"], commit()
    jobs = dict(_jobs(options))
    todo = {key: job for key, job in jobs.items() if _is_wanted(records.get(key), options)}
    with tempfile.TemporaryDirectory(prefix="mstc-kernels-") as folder:
        kernels = options.kernels or Path(folder)

        def measure_all(todo: dict[str, dict[str, Any]], extend: bool) -> None:
            with ThreadPoolExecutor(options.jobs) as pool:
                pending = {pool.submit(_measured, job, kernels): key for key, job in todo.items()}
                progress = tqdm(as_completed(pending), total=len(pending), unit="row")
                for done in progress:
                    key, found = pending[done], done.result()
                    earlier = records.get(key, {}).get("runs", []) if extend else []
                    stamp = {"commit": measured, "date": date.today().isoformat()}
                    records[key] = stamp | found | {"runs": [*earlier, *_run_of(found)]}
                    store.save(options.out, results)
                    progress.set_postfix_str(key)
                    for name, text in coverage_table.failures(found).items():
                        progress.write(f"{key} {name}: {text}")

        measure_all(todo, extend=False)
        slow = [key for key in jobs if _is_slow(records[key], measured)]
        for _ in range(_RUNS - 1):
            again = [key for key in slow if len(records[key]["runs"]) < _RUNS]
            measure_all({key: jobs[key] for key in again}, extend=True)
    print(coverage_table.summary(results))
    if options.out == RESULTS:
        coverage_table.write(results, PAGE, README)
    return 1 if any(coverage_table.failures(records[key]) for key in todo) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

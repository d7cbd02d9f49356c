"""The trade-off between memory and time: what every setting of a memory budget costs.

    python -m benchmarks.tradeoff                           # resumes where it stopped
    python -m benchmarks.tradeoff --only llama --tokens 128,8192 --redo

Per model and length one fresh process, in which Inductor, mst by default ("auto") and settings that
a budget chooses from take turns. Peaks are exact and hold the gradients, as a budget does. Results
go to benchmarks/results/tradeoff-cpu.json; docs/tradeoff.md and docs/tradeoff.svg are made of them.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import date
from statistics import median
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # files only: no display is needed
import matplotlib.pyplot as plt
from torch.fx import GraphModule
from tqdm import tqdm

from benchmarks import coverage, measure, store, zoo
from benchmarks.table import table
from mstc.budget import CHUNKED
from mstc.driver import compile_graph
from mstc.options import Options, Setting
from mstc.runtime.memory import measure_step

RESULTS = measure.ROOT / "benchmarks" / "results" / "tradeoff-cpu.json"
PAGE = measure.ROOT / "docs" / "tradeoff.md"
PICTURE = measure.ROOT / "docs" / "tradeoff.svg"
MODELS = ("llama", "bert")
TOKENS = (128, 512, 2048, 8192)
SETTINGS: dict[str, Setting] = {
    "auto": Setting(),
    "0.25": CHUNKED[2],
    "0.5": CHUNKED[4],
    "0.75": CHUNKED[6],
    "1": CHUNKED[8],
    "1, recomputed": Setting(tightness=1.0, activation_budget=0.2),
    "below": Setting(tightness=1.0, least_divisor=4, activation_budget=0.05),
}
_BASE = "inductor"
_TIMEOUT_S = 1800


def row(job: dict[str, Any]) -> dict[str, Any]:
    """One model at one length: contender -> peak and seconds of each round."""
    coverage.let_dynamo_compile_everything()
    architecture = zoo.ZOO[job["model"]]
    subject = architecture.subject(replace(zoo.ROW, tokens=job["tokens"]))
    found: dict[str, Any] = {}
    steps: dict[str, Callable[[], object]] = {}
    for name in (_BASE, *SETTINGS):
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
    return {"contenders": found}


def _compiled(name: str, part: Any) -> Callable[..., Any]:
    if name == _BASE:
        return measure.compiled(part, name)
    options = Options(setting=SETTINGS[name])

    def backend(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return compile_graph(gm, inputs, options)

    return measure.compiled_by(part, backend)


def _points(record: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Contender -> (time, peak), relative to Inductor's."""
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


def draw(records: dict[str, dict[str, Any]]) -> None:
    """docs/tradeoff.svg: one panel per model, one line per length."""
    models = list(dict.fromkeys(key.split("/")[0] for key in records))
    figure, panels = plt.subplots(
        1, len(models), figsize=(4.4 * len(models), 4.2), sharey=True, layout="constrained"
    )
    colors = dict(zip(TOKENS, plt.get_cmap("viridis")([0.85, 0.6, 0.35, 0.05]), strict=True))
    for axes, model in zip([panels] if len(models) == 1 else panels, models, strict=True):
        axes.plot(1, 1, "s", color="#d9822b", markersize=7, label="Inductor")
        for tokens in TOKENS:
            if f"{model}/{tokens}" not in records:
                continue
            points = _points(records[f"{model}/{tokens}"])
            own = [points[name] for name in SETTINGS if name in points and name != "auto"]
            axes.plot(
                *zip(*own, strict=True), "o-", color=colors[tokens], markersize=3.5, linewidth=1,
                label=f"{tokens:,} tokens",
            )  # fmt: skip
            if "auto" in points:
                axes.plot(*points["auto"], "*", color=colors[tokens], markersize=13)
        axes.set_title(model, loc="left")
        axes.set_xlabel("time per step, Inductor = 1")
        axes.set_ylim(0, 1.15)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    left = panels if len(models) == 1 else panels[0]
    left.set_ylabel("peak with gradients, Inductor = 1")
    handles, labels = left.get_legend_handles_labels()
    star = plt.Line2D([], [], marker="*", linestyle="", color="#444444", markersize=11)
    figure.legend(
        [*handles, star], [*labels, 'mst, "auto"'], loc="outside lower center", ncols=3,
        frameon=False,
    )  # fmt: skip
    figure.savefig(PICTURE)
    plt.close(figure)


def page(results: dict[str, Any]) -> str:
    """docs/tradeoff.md."""
    header = ("model", "tokens", "Inductor MiB", *SETTINGS)
    lines: list[list[str]] = []
    for key, record in results["records"].items():
        model, tokens = key.split("/")
        points = _points(record)
        base = record["contenders"][_BASE]["peak_nbytes"] / 2**20
        cells = [
            f"{points[name][1]:.2f} / {points[name][0]:.2f}" if name in points else "failed"
            for name in SETTINGS
        ]
        lines.append([model, f"{int(tokens):,}", f"{base:,.0f}", *cells])
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    where = f"{results['device']}, {results['threads']} threads; {versions}; {results['date']}"
    return _PAGE.format(where=where, table=table(header, lines))


_PAGE = """\
# What memory costs

![peak against time, per model and length](tradeoff.svg)

Every point is a training step that was compiled and measured; the lines go through settings of the
planner and the partitioner as `options={{"memory_budget": ...}}` makes them, the star is the
default. Made by
`python -m benchmarks.tradeoff`; {where}; float32, one sequence, the models of the
[coverage table](coverage.md). Peaks hold the gradients and are exact; times are medians of steps in
alternation.

Peak / time, relative to Inductor's:

{table}

0.25 to 1: chunks as large as a target between no loops (0) and the smallest chunks that are fast
(1) allows. *Recomputed*: AOTAutograd's `activation_memory_budget` of 0.2 besides. *Below*: chunks a
quarter as large as is fast, and an `activation_memory_budget` of 0.05. What is computed again
between loops costs more time than anything else and saves least, so a budget comes to it last.
"""


def main(arguments: list[str]) -> int:
    if measure.serve(row, arguments):
        return 0
    parser = argparse.ArgumentParser(
        prog="benchmarks.tradeoff", description=(__doc__ or "").split("\n")[0]
    )
    names = {"type": lambda text: text.split(","), "metavar": "NAME,..."}
    parser.add_argument("--only", default=list(MODELS), **names)
    parser.add_argument("--tokens", default=list(map(str, TOKENS)), **names)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--redo", action="store_true", help="also rows that the results have")
    parser.add_argument("--force", action="store_true", help="drop results of other versions")
    options = parser.parse_args(arguments)
    if unknown := set(options.only) - set(zoo.ZOO):
        parser.error(f"unknown: {', '.join(sorted(unknown))} (known: {', '.join(zoo.ZOO)})")
    header = measure.environment("cpu") | {"date": date.today().isoformat()}
    results = store.load(RESULTS, header, options.force)
    records = results["records"]
    jobs = [(model, int(tokens)) for model in options.only for tokens in options.tokens]
    for model, tokens in tqdm(jobs, unit="row"):
        key = f"{model}/{tokens}"
        if key in records and not options.redo:
            continue
        job = {"model": model, "tokens": tokens, "rounds": options.rounds}
        found = measure.run_fresh("benchmarks.tradeoff", job, timeout_s=_TIMEOUT_S)
        records[key] = found | {"commit": coverage.commit()}
        store.save(RESULTS, results)
    draw(records)
    PAGE.write_text(page(results))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

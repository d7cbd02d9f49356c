"""The commands and their options; what they print is made in `mstc.cli.text`.

Results go to stdout, progress and errors to stderr. Exit status: 0, or 1 when `doctor` finds
something missing or `diff` a difference, 2 for a mistake of the user's (one line says which).
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from torch._dynamo.exc import BackendCompilerFailed  # what Dynamo makes of our errors

import mstc
from mstc import plans
from mstc.cli import checks, fit, html, layers, steps, text
from mstc.cli.subject import Subject, SubjectError, Wanted, load_subject
from mstc.errors import BudgetError, OptionError, SimulationError
from mstc.quantity import parse_bytes
from mstc.watch import SimulatedTrace

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="What torch.compile(model, backend='mst') does to a model: on any machine, without a GPU, "
    "without running it.",
)

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="config.json of transformers, a folder with one, a hub name, or script.py:build, a "
        "function that returns (model, batch).",
    ),
]
SeqLen = Annotated[int, typer.Option("--seq-len", "-s", help="Tokens per sequence.")]
BatchSize = Annotated[int, typer.Option("--batch-size", "-b", help="Sequences.")]
Dtype = Annotated[str, typer.Option("--dtype", "-d", help="Of weights: fp32, bf16 or fp16.")]
Checkpoint = Annotated[
    bool, typer.Option("--checkpoint", help="With gradient checkpointing of every layer.")
]
AllLayers = Annotated[
    bool,
    typer.Option("--all-layers", help="Simulate every layer, where a few would stand for all."),
]
MemoryBudget = Annotated[
    str | None,
    typer.Option("--memory-budget", help="Under mst: the most that a step may take, as 24GiB."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def explain(
    model: Model,
    seq_len: SeqLen = 2048,
    batch_size: BatchSize = 1,
    dtype: Dtype = "bf16",
    checkpoint: Checkpoint = False,
    save_plan: Annotated[
        Path | None, typer.Option("--save-plan", help="Write the loops to a file, to be replayed.")
    ] = None,
    memory_budget: MemoryBudget = None,
    all_layers: AllLayers = False,
    as_json: AsJson = False,
) -> None:
    """Where the memory of a training step goes, what becomes a loop, and what does not, and why."""
    wanted = Wanted(seq_len, batch_size, dtype, checkpoint)
    subject = load_subject(model, wanted)
    # what a budget asks of the partitioner is in no plan that few layers could replay
    few = None if all_layers or memory_budget else layers.depths(subject)
    if few is None:
        report = _explained(subject, memory_budget)
        traces = _traces(subject, memory_budget)
        found = {backend: layers.step_of(trace) for backend, trace in traces.items()}
    else:
        with _busy(f"planning, and simulating steps of {few[0]} and {few[1]} layers"):
            report, found = steps.planned_and_simulated(
                model, wanted, subject, few, lambda: _report(subject, memory_budget)
            )
    if save_plan is not None:
        _save_plan(report, save_plan)
    if as_json:
        entry = {"model": model, "seq_len": seq_len, "batch_size": batch_size, "dtype": dtype}
        entry |= {"checkpoint": checkpoint, "layers": subject.num_layers}
        entry |= {"peaks": {b: _plain(s) for b, s in found.items()}}
        _print_json(entry | {"report": json.loads(report.to_json())})
        return
    text.print_explanation(Console(), subject, found, report)


@app.command()
def diff(
    before: Annotated[Path, typer.Argument(metavar="PLAN")],
    after: Annotated[Path, typer.Argument(metavar="PLAN")],
    as_json: AsJson = False,
) -> None:
    """What changed from one plan to another; status 1 if anything did."""
    changes = plans.differences(plans.read_plan(before), plans.read_plan(after))
    if as_json:
        _print_json([vars(change) for change in changes])
    else:
        text.print_changes(Console(), changes)
    if changes:
        raise typer.Exit(1)


def _save_plan(report: mstc.Report, path: Path) -> None:
    try:
        report.save_plan(path)
    except OSError as error:
        raise SubjectError(f"--save-plan {path}: {error.strerror}.") from error


@app.command("fit")
def fit_command(
    model: Model,
    memory: Annotated[str, typer.Option("--memory", "-m", help="Of the device: 80GiB, 24GB.")],
    batch_size: BatchSize = 1,
    dtype: Dtype = "bf16",
    optimizer: Annotated[str, typer.Option(help="none, sgd, momentum or adamw.")] = "adamw",
    as_json: AsJson = False,
) -> None:
    """The longest sequence that fits: as it is, checkpointed, and under mst."""
    try:
        room = parse_bytes(memory)
    except ValueError as error:
        raise SubjectError(f"--memory {memory}: {error}.") from None
    if optimizer not in fit.OPTIMIZERS:
        raise SubjectError(f"--optimizer {optimizer}: one of {', '.join(fit.OPTIMIZERS)}.")
    with _busy(f"simulating {len(fit.WAYS)} ways of training"):
        found = fit.fit_all(model, room, Wanted(1, batch_size, dtype), optimizer)
    if as_json:
        _print_json([dataclasses.asdict(one) for one in found])
    else:
        text.print_fits(Console(), found, room, optimizer)


@app.command()
def plot(
    model: Model,
    seq_len: SeqLen = 2048,
    batch_size: BatchSize = 1,
    dtype: Dtype = "bf16",
    checkpoint: Checkpoint = False,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="A .png or .svg file; the other comes beside it.")
    ] = Path("memory.png"),
    memory_budget: MemoryBudget = None,
    as_json: AsJson = False,
) -> None:
    """A picture of memory over the step, before and after."""
    try:
        from mstc.cli import picture
    except ModuleNotFoundError as error:
        raise SubjectError(f"a picture needs {error.name}: pip install 'mstc[cli]'") from error
    paths = picture.paths_of(out)
    subject = load_subject(model, Wanted(seq_len, batch_size, dtype, checkpoint))
    traces = _traces(subject, memory_budget)
    title = f"{Path(subject.name).stem}, {batch_size} x {seq_len:,} tokens, {dtype}"
    picture.draw(traces, title + (", checkpointed" if checkpoint else ""), paths)
    if as_json:
        _print_json({"files": [str(p) for p in paths]})
    else:
        print("\n".join(map(str, paths)))


@app.command("report")
def report_command(
    model: Model,
    seq_len: SeqLen = 2048,
    batch_size: BatchSize = 1,
    dtype: Dtype = "bf16",
    checkpoint: Checkpoint = False,
    out: Annotated[Path, typer.Option("--out", "-o", help="An .html file.")] = Path("report.html"),
    memory_budget: MemoryBudget = None,
    as_json: AsJson = False,
) -> None:
    """A page for a browser: the timeline with every large buffer, the plan, what was refused."""
    path = html.path_of(out)
    wanted = Wanted(seq_len, batch_size, dtype, checkpoint)
    subject = load_subject(model, wanted)
    report = _explained(subject, memory_budget)
    html.write(path, html.page(subject, wanted, _traces(subject, memory_budget), report))
    if as_json:
        _print_json({"files": [str(path)]})
    else:
        print(path)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """What is installed, what is missing, and where things are kept."""
    found = checks.run_all()
    if as_json:
        _print_json([vars(check) for check in found])
    else:
        text.print_checks(Console(), found)
    if any(check.verdict == "missing" for check in found):
        raise typer.Exit(1)


def _explained(subject: Subject, memory_budget: str | None) -> mstc.Report:
    with _busy("reading the model's graph"):
        return _report(subject, memory_budget)


def _report(subject: Subject, memory_budget: str | None) -> mstc.Report:
    options = None if memory_budget is None else {"memory_budget": memory_budget}
    args, kwargs = subject.batch
    return mstc.explain(subject.model, *args, options=options, **kwargs)


def _traces(subject: Subject, memory_budget: str | None) -> dict[str, SimulatedTrace]:
    with _busy("simulating steps"):
        return steps.traces(subject, memory_budget)


def _plain(step: layers.Step) -> dict[str, Any]:
    return {
        "peak_nbytes": step.peak_nbytes,
        "peak_intermediate_nbytes": step.peak_intermediate_nbytes,
        "grad_nbytes": step.grad_nbytes,
        "simulated_layers": step.simulated,
        "at_peak": [vars(held) for held in step.at_peak],
    }


@contextmanager
def _busy(what: str) -> Iterator[None]:
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(what):
        yield


def _print_json(found: object) -> None:
    print(json.dumps(found, indent=1))


def run(arguments: Sequence[str]) -> int:
    """Run one command; the exit status."""
    try:
        app(args=list(arguments), prog_name="mstc")
    except SystemExit as end:  # every command ends so; mistakes in options have been printed
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except (SubjectError, SimulationError, OptionError) as error:
        print(f"mstc: {error}", file=sys.stderr)
        return 2
    except BackendCompilerFailed as error:
        if not isinstance(error.inner_exception, (OptionError, BudgetError)):
            raise
        print(f"mstc: {error.inner_exception}", file=sys.stderr)
        return 2
    return 0

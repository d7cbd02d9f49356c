"""Trains one small Llama under eager, inductor and mst, and shows what each needs.

    python -m examples.demo              # minutes on two cores; a larger model where there is a GPU
    python -m examples.demo --docs       # the picture goes to docs/ too
    python -m examples.demo --contenders eager,mst --steps 4

Each contender trains the same weights on the same batches in a process of its own. One table is
printed, in which the measured peak stands beside the one that was predicted without running
anything (`mstc.simulate`), and one picture saved: the predicted memory over one step, as
`mstc plot` draws it.
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
from tabulate import tabulate

from benchmarks import measure
from examples.demo import corpus
from examples.demo.train import LARGE, SMALL, Setup, build, train
from mstc.cli.picture import draw
from mstc.runtime.memory import MemoryTrace
from mstc.simulate import Backend, Simulation
from mstc.watch import SimulatedTrace

MIB = 2**20


def table(results: dict[str, dict[str, Any]], traces: Mapping[str, MemoryTrace]) -> str:
    rows = [
        (
            name,
            f"{result['peak_intermediate_nbytes'] / MIB:,.1f}",
            f"{traces[name].peak_intermediate_nbytes / MIB:,.1f}",
            f"{result['step_s']:.3f}",
            f"{result['compile_s']:.1f}",
            " ".join(f"{loss:.4f}" for loss in result["losses"]),
        )
        for name, result in results.items()
    ]
    header = ("", "peak intermediate MiB", "predicted", "s per step", "first step s")
    header += ("loss of each step",)
    return tabulate(rows, header, disable_numparse=True, colalign=("left", *["right"] * 4, "left"))


def predict(setup: Setup, contenders: Sequence[str]) -> dict[str, SimulatedTrace]:
    """The memory of one step of each contender, on tensors without data."""
    model = build(setup)
    ids = torch.zeros(1, setup.tokens, dtype=torch.long, device=setup.device)
    traces: dict[str, SimulatedTrace] = {}
    for name in contenders:
        with Simulation(model, {"input_ids": ids, "labels": ids}) as simulation:
            compiled = simulation.compile(model, cast("Backend", name))
            traces[name] = simulation.trace(measure.training_step(compiled, simulation.batch))
    return traces


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, Setup]:
    setup = LARGE if torch.cuda.is_available() else SMALL
    parser = argparse.ArgumentParser(
        prog="examples.demo", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--contenders", default=",".join(measure.CONTENDERS))
    parser.add_argument("--out", type=Path, default=measure.ROOT / "demo_output")
    parser.add_argument("--docs", action="store_true", help="save the picture to docs/ as well")
    for field in ("device", "dtype", "hidden", "layers", "vocab", "tokens", "steps"):
        default = getattr(setup, field)
        parser.add_argument(f"--{field}", type=type(default), default=default)
    options = parser.parse_args(arguments)
    options.contenders = options.contenders.split(",")
    if unknown := set(options.contenders) - set(measure.CONTENDERS):
        parser.error(f"--contenders: {', '.join(sorted(unknown))} is not known")
    if options.steps < 4:
        parser.error(
            "--steps: one to compile, one to warm up, one to time, one to trace: at least 4"
        )
    chosen = {name: getattr(options, name) for name in asdict(setup) if hasattr(options, name)}
    return options, replace(setup, **chosen)


def main(arguments: list[str]) -> int:
    if measure.serve(train, arguments):
        return 0
    options, setup = _parse(arguments)
    print(f"tokenizer: {setup.vocab} byte pairs from the standard library's sources")
    texts = corpus.sources(setup.text_nbytes)
    tokenizer = corpus.train_tokenizer(texts, setup.vocab)
    batches = corpus.batches(texts, tokenizer, setup.tokens, setup.steps)

    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="mstc-demo-") as folder:
        path = Path(folder, "batches.pt")
        torch.save(batches, path)
        for contender in options.contenders:
            job = {"contender": contender, "setup": asdict(setup), "batches": str(path)}
            results[contender] = measure.run_fresh("examples.demo", job, show=True)

    print("predicting each contender's memory without running it")
    traces = predict(setup, options.contenders)
    print(f"\n{table(results, traces)}")
    print(
        "Times are from processes one after another; `make bench` lets the contenders take turns.\n"
    )
    title = (
        f"One training step of a Llama with {setup.layers} layers, hidden {setup.hidden}, "
        f"vocabulary {setup.vocab:,}\non {setup.tokens:,} tokens ({setup.dtype}, {setup.device})"
    )
    folders = [options.out, *([measure.ROOT / "docs"] if options.docs else [])]
    paths = [
        folder / f"memory-{setup.device}.{kind}" for folder in folders for kind in ("png", "svg")
    ]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    draw(traces, title, paths)
    for path in paths:
        print(f"picture: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

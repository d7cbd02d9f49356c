"""The claim "longer sequences": the longest that fits into a memory, simulated.

    python -m benchmarks.longest            # Llama-3-8B's configuration in 80 GiB; minutes

What ``mstc fit`` says, for every way of training, each in a fresh process; and how long ``mstc
explain`` takes. Results go to benchmarks/results/longest-llama3-8b.json, docs/fit.md and a table of
the README.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks import coverage, measure, store
from benchmarks.table import put, table
from mstc.cli import fit
from mstc.cli.subject import Wanted
from mstc.quantity import format_bytes as size
from mstc.quantity import parse_bytes

CONFIG = measure.ROOT / "benchmarks" / "configs" / "llama3-8b.json"
RESULTS = measure.ROOT / "benchmarks" / "results" / "longest-llama3-8b.json"
PAGE = measure.ROOT / "docs" / "fit.md"
README = measure.ROOT / "README.md"
ON_A_GPU = RESULTS.with_name("longest-sm90.json")  # made by tests/sm90/longest.py
_MEMORY = "80GiB"
_EXPLAINED = (65_536, 524_288)  # tokens


def row(job: dict[str, Any]) -> dict[str, Any]:
    """One way of training."""
    begin = time.perf_counter()
    way = next(way for way in fit.WAYS if way.name == job["way"])
    room = parse_bytes(_MEMORY)
    found = fit.fit(str(CONFIG), room, Wanted(1), way, "none")
    return asdict(found) | {"seconds": round(time.perf_counter() - begin, 1)}


def explained(tokens: int) -> dict[str, Any]:
    """``mstc explain``: seconds, and the most that a process of this benchmark took so far."""
    command = [sys.executable, "-c", "import sys, mstc.cli as c; sys.exit(c.main())", "explain"]
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [*command, str(CONFIG), "--seq-len", str(tokens), "--json"],
            cwd=measure.ROOT,
            env=measure.cold_caches(Path(folder)),
            capture_output=True,
            check=True,
        )
    seconds = round(time.perf_counter() - begin, 1)
    peaks = json.loads(done.stdout)["peaks"]
    return {
        "seconds": seconds,
        "process_nbytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
        "peaks": {name: one["peak_nbytes"] for name, one in peaks.items()},
    }


def page(results: dict[str, Any]) -> str:
    """docs/fit.md."""
    records = results["records"]
    first = records[fit.WAYS[0].name]["seq_len"]
    header = (
        "training with",
        "longest sequence",
        "of the first",
        "step",
        "weights",
        "simulated in",
    )
    lines = [
        [
            name,
            f"{one['seq_len']:,}",
            f"{one['seq_len'] / first:.1f}x",
            size(one["step_nbytes"]),
            size(one["state_nbytes"]),
            f"{one['seconds']:.0f} s",
        ]
        for name, one in records.items()
    ]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    checkpointed, weights = records[fit.WAYS[1].name], records[fit.WAYS[0].name]["state_nbytes"]
    steps = [
        [
            f"{int(tokens):,}",
            *(size(one["peaks"][name]) for name in ("inductor", "mst")),
            f"{one['seconds']:.0f} s",
            size(one["process_nbytes"]),
        ]
        for tokens, one in results["explained"].items()
    ]
    return _PAGE.format(
        explained=table(
            (
                "tokens",
                "Inductor's step",
                "mst's step",
                "explained in",
                "no process took more than",
            ),
            steps,
        ),
        mask=size(2 * checkpointed["seq_len"] ** 2),
        longest=checkpointed["seq_len"],
        weights=size(weights),
        states=size(2 * weights),
        memory=_MEMORY,
        rows=fit.CHUNK_ROWS,
        table=table(header, lines),
        where=f"{results['device']}; {versions}; {results['date']}; commit {results['commit']}",
        on_a_gpu=_on_a_gpu(json.loads(ON_A_GPU.read_text())),
    )


def _on_a_gpu(found: dict[str, Any]) -> str:
    """What is known of the code for a GPU, in a sentence or two."""
    step, weights, host = (size(found[key]) for key in ("step", "weights", "on_the_host"))
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    budget = f'`options={{"memory_budget": "{size(found["budget"])}"}}`'
    text = (
        f"The same model, {found['layers']} layers, in the code that Inductor writes for a GPU,"
        f" with {budget} (what the weights leave of a card of 80 GB): {found['tokens']:,} tokens,"
        f" a step of {step}, gradients of {size(found['gradients'])} included, beside weights of"
        f" {weights}. Of what is saved for the backward {host} wait in the host's memory."
        f" Simulated for an {found['simulated']} that is not there, by"
        f" `python -m tests.sm90.longest` ({found['seconds']} s; {versions}; {found['date']};"
        f" commit {found['commit']}): what"
        " kernels of libraries take while they run is not in it, nor how long the copies take."
    )
    return textwrap.fill(text, 100, break_on_hyphens=False, break_long_words=False)


def summary(results: dict[str, Any]) -> str:
    """The README's table."""
    lines = [[name, f"{one['seq_len']:,}"] for name, one in results["records"].items()]
    return table(("training with", "longest sequence, tokens"), lines)


_PAGE = """\
# The longest sequence that fits

Llama-3-8B's configuration (32 layers, hidden 4,096, MLPs 14,336 wide, vocabulary 128,256), one
sequence, weights and gradients in bfloat16, full gradients, in {memory}. Simulated, not run: made
by `python -m benchmarks.longest`, which asks what `mstc fit` asks. {where}.

{table}

What is in it, and what is not:

* *step*: the most that forward and backward hold at once, gradients ({weights} at the end)
  included.
* *weights*: bfloat16. No optimizer state: with momentum or Adam a card of 80 GiB has room for less
  (`mstc fit --optimizer adamw`: AdamW's two states in bfloat16 are {states}), or they live
  elsewhere.
* No offloading, in any row: what is saved for the backward stays on the card (further below it
  does not).
* Code as Inductor writes it for a CPU. There keys and values are repeated for every head and saved
  so; attention kernels of a GPU may take them as they are. transformers' causal mask of tokens x
  tokens stands in the first two rows ({mask} at {longest:,} tokens); mst proves that it is causal
  and drops it. A model that never makes one would reach a little further in these rows.
* The length of each row is simulated as itself, under the plan for all layers of that length. That
  the next one does not fit (1,024 tokens more; under mst {rows:,}, a chunk) is computed from the
  sizes of its buffers. Layers: few are simulated, the step is linear in them. No CUDA context,
  fragmentation or communication.
* Seconds are of two ways at once on two cores, each in a process of its own.
* mst with chunks of {rows:,} rows; `checkpointed` is transformers' `gradient_checkpointing_enable`.

`mstc explain` of the same model, without checkpointing, by default chunks: the plan for all 32
layers and both steps, in two processes on two cores.

{explained}

## On a GPU, with what is saved on the host

{on_a_gpu}

## The paper's figures

The Mini-Sequence Transformer (Luo et al., NeurIPS 2024, arXiv 2407.15892) reports 60,000 tokens of
Llama-3-8B on one card of 80 GB, 12 times what training without it reaches and 4 times what
activation recomputation reaches; measured on a GPU, with its own assumptions about optimizer
states, gradients and offloading. The two stand side by side; neither confirms the other.
"""


def main(arguments: list[str]) -> int:
    if measure.serve(row, arguments):
        return 0
    parser = argparse.ArgumentParser(prog="benchmarks.longest")
    parser.add_argument("--jobs", type=int, default=1, help="ways at once")
    options = parser.parse_args(arguments)
    header = measure.environment("cpu") | {"date": date.today().isoformat()}
    results: dict[str, Any] = header | {"commit": coverage.commit(), "records": {}}
    jobs = {way.name: {"way": way.name} for way in fit.WAYS}
    with ThreadPoolExecutor(options.jobs) as pool:
        for name, found in zip(jobs, pool.map(_fresh, jobs.values()), strict=True):
            results["records"][name] = found
    results["explained"] = {str(tokens): explained(tokens) for tokens in _EXPLAINED}
    store.save(RESULTS, results)
    PAGE.write_text(page(results))
    README.write_text(put(README.read_text(), "longest", summary(results)))
    print(page(results))
    return 0


def _fresh(job: dict[str, Any]) -> dict[str, Any]:
    return measure.run_fresh("benchmarks.longest", job, timeout_s=1800)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

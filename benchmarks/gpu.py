"""Llama-3-8B's shapes on one GPU: tokens per second, peaks, and what a loop's kernels do.

    python -m benchmarks.gpu                     # about ten minutes; goes on where it stopped
    python -m benchmarks.gpu --minutes 25 --redo
    python -m benchmarks.gpu --device cpu --size tiny --out gpu.json          # does it run at all?

Jobs, most telling first, one fresh process each (what fills the memory cannot stand beside others):

    step      forward and backward of a whole model, bfloat16, all gradients, no optimizer: seconds
              of the first step (compiling), median of further steps, peak. 4 of the 32 layers at
              lengths that everybody manages, all 32 at lengths that few do.
    kernels   one MLP alone: how long kernels ran, how long none did between the first and the last,
              and which share of the time was matrix products (on a CPU: of its outermost ops).

A contender that fails or runs out of memory has a row that says so. Errors against float64 are in
`python -m benchmarks.peers --device cuda`. Results: benchmarks/results/gpu-<device>.json.
"""

import argparse
import importlib
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import coverage, measure, store
from benchmarks.models import loss_of
from benchmarks.peers import cases
from benchmarks.table import table
from mstc.runtime.memory import measure_step

_K = 1024
_TIMEOUT_S = 540
_STEPS = 3
_LEAST_S = 90  # no job is begun with less time left


@dataclass(frozen=True)
class Size:
    config: dict[str, Any]  # of transformers' Llama
    few: int  # layers where everybody is compared
    short: tuple[int, ...]  # tokens, with few layers
    long: tuple[int, ...]  # tokens, with all layers
    mlp: tuple[str, int]  # scale of `benchmarks.peers.cases` and tokens, for the kernels


SIZES = {
    "8b": Size(
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "max_position_embeddings": 1024 * _K,
        },
        few=4,
        short=(8 * _K, 32 * _K),
        long=(64 * _K, 128 * _K),
        mlp=("cuda", 32 * _K),
    ),
    "tiny": Size(
        {
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "vocab_size": 4096,
            "max_position_embeddings": _K,
        },
        few=1,
        short=(512,),
        long=(_K,),
        mlp=("tiny", _K),
    ),
}


@dataclass(frozen=True)
class Contender:
    backend: str | None  # of torch.compile
    checkpointed: bool
    liger: bool = False


CONTENDERS = {
    "inductor": Contender("inductor", False),
    "mst": Contender("mst", False),
    "inductor, checkpointed": Contender("inductor", True),
    "mst, checkpointed": Contender("mst", True),
    "Liger, checkpointed": Contender(None, True, liger=True),
}
_LONG = ("mst, checkpointed", "Liger, checkpointed", "inductor, checkpointed")


def jobs_of(size: Size) -> dict[str, dict[str, Any]]:
    """Key -> job, most telling first."""
    found: dict[str, dict[str, Any]] = {}

    def step(name: str, layers: int, tokens: int) -> None:
        found[f"step/{layers}/{tokens}/{name}"] = {
            "kind": "step", "contender": name, "layers": layers, "tokens": tokens,
        }  # fmt: skip

    layers = size.config["num_hidden_layers"]
    for name in CONTENDERS:
        step(name, size.few, size.short[0])
    step(_LONG[0], layers, size.long[0])
    for backend in ("mst", "inductor"):
        found[f"kernels/{size.mlp[1]}/{backend}"] = {"kind": "kernels", "backend": backend}
    for tokens in size.short[1:]:
        for name in CONTENDERS:
            step(name, size.few, tokens)
    for tokens in size.long:
        for name in _LONG:
            step(name, layers, tokens)
    return found


# --- in a process of its own


def work(job: dict[str, Any]) -> dict[str, Any]:
    coverage.let_dynamo_compile_everything()
    try:
        return _step(job) if job["kind"] == "step" else _kernels(job)
    except Exception as error:  # out of memory, a package that is not there
        return {"failed": coverage.text_of(error)}


def _step(job: dict[str, Any]) -> dict[str, Any]:
    device = job["device"]
    model = _model(SIZES[job["size"]].config | {"num_hidden_layers": job["layers"]}, job)
    torch.manual_seed(1)
    ids = torch.randint(model.config.vocab_size, (1, job["tokens"]), device=device)
    contender = CONTENDERS[job["contender"]]
    compiled = measure.compiled(model, contender.backend) if contender.backend else model

    def step() -> None:
        loss_of(compiled(input_ids=ids, labels=ids)).backward()

    first_s = measure.seconds(step, device)
    trace = measure_step(step, model.parameters(), device)
    seconds = measure.alternate({"": step}, model, device, _STEPS, warm_up=0)[""]
    return {
        "first_step_s": round(first_s, 2),
        "step_s": [round(s, 5) for s in seconds],
        "tokens_per_s": round(job["tokens"] / median(seconds), 1),
        "peak_nbytes": trace.peak_nbytes,
        "parameter_nbytes": sum(p.nbytes for p in model.parameters()),
    }


def _model(config: dict[str, Any], job: dict[str, Any]) -> Any:
    """Random weights, made where they stay; bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM  # they take seconds to import

    contender = CONTENDERS[job["contender"]]
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(job["device"]):
            model: Any = LlamaForCausalLM(LlamaConfig(**config)).train()
    finally:
        torch.set_default_dtype(torch.float32)
    if contender.checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.config.use_cache = False  # as transformers' warning says
    if contender.liger:
        importlib.import_module("liger_kernel.transformers").apply_liger_kernel_to_llama(
            model=model
        )
    return model


def _kernels(job: dict[str, Any]) -> dict[str, Any]:
    scale, tokens = SIZES[job["size"]].mlp
    device = job["device"]
    task = cases.build("mlp", scale, tokens, device, torch.bfloat16)
    step = task.step(measure.compiled(task.module, job["backend"]))
    for _ in range(2):
        step()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with profile(activities=activities) as trace:
        measure.seconds(step, device)
    wanted = torch.autograd.DeviceType.CUDA if device == "cuda" else torch.autograd.DeviceType.CPU
    spans = [
        (event.name, float(event.time_range.start), float(event.time_range.end))
        for event in trace.events() or ()
        if event.device_type == wanted
    ]
    return summary_of_kernels(spans)


_PRODUCT = re.compile(r"gemm|nvjet|cutlass|xmma|wgmma|\bmm\b|addmm|\bbmm\b", re.IGNORECASE)
Span = tuple[str, float, float]  # name, start, end in microseconds


def summary_of_kernels(spans: Iterable[Span]) -> dict[str, Any]:
    """Where the time between the first kernel's start and the last one's end went.

    Returns:
        kernels, their number; span_us; idle_us, in which none ran; product_share, of the time in
        which one ran, that of matrix products.
    """
    ordered = sorted(spans, key=lambda span: span[1])
    if not ordered:
        raise ValueError("the profiler saw no kernel")
    busy = products = 0.0
    until = ordered[0][1]
    for name, start, end in ordered:
        alone = max(end - max(start, until), 0.0)  # what no earlier kernel covers
        busy += alone
        products += alone if _PRODUCT.search(name) else 0.0
        until = max(until, end)
    span = until - ordered[0][1]
    return {
        "kernels": len(ordered),
        "span_us": round(span, 1),
        "idle_us": round(span - busy, 1),
        "product_share": round(products / busy, 4) if busy else 0.0,
    }


# --- all of them


def markdown(records: dict[str, dict[str, Any]]) -> str:
    """Two tables: steps, kernels."""
    steps: list[list[str]] = []
    kernels: list[list[str]] = []
    for key, found in records.items():
        kind, *rest = key.split("/")
        if kind == "kernels":
            cells = [
                f"{found['kernels']:,}",
                f"{found['span_us'] / 1e3:,.1f}",
                f"{found['idle_us'] / found['span_us']:.1%}",
                f"{found['product_share']:.1%}",
            ] if "failed" not in found else [found["failed"], "", "", ""]  # fmt: skip
            kernels.append([f"{int(rest[0]):,}", rest[1], *cells])
            continue
        layers, tokens, name = rest
        cells = [
            f"{found['tokens_per_s']:,.0f}",
            f"{found['peak_nbytes'] / 2**30:.2f}",
            f"{found['first_step_s']:.0f}",
        ] if "failed" not in found else [found["failed"], "", ""]  # fmt: skip
        steps.append([layers, f"{int(tokens):,}", name, *cells])
    first = ("layers", "tokens", "contender", "tokens per s", "peak GiB", "first step s")
    second = ("tokens", "backend", "kernels", "ms", "idle", "products")
    return f"{table(first, steps)}\n\n{table(second, kernels)}"


def run_jobs(
    jobs: dict[str, dict[str, Any]],
    records: dict[str, dict[str, Any]],
    seconds: float,
    save: Callable[[], None],
    run: Callable[[dict[str, Any], float], dict[str, Any]],
) -> list[str]:
    """Run what `records` lack, in order, while there is time; the keys that are left."""
    end = time.monotonic() + seconds
    left = [key for key in jobs if key not in records]
    while left and end - time.monotonic() > min(_LEAST_S, seconds / 2):
        key = left.pop(0)
        try:
            found = run(jobs[key], min(end - time.monotonic(), _TIMEOUT_S))
        except measure.WorkerFailed as error:
            found = {"failed": coverage.text_of(error)}
        records[key] = found | {"commit": coverage.commit()}
        save()
        print(key, {k: v for k, v in records[key].items() if k != "commit"}, flush=True)
    return left


def main(arguments: Sequence[str]) -> int:
    if measure.serve(work, arguments):
        return 0
    parser = argparse.ArgumentParser(
        prog="benchmarks.gpu", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--size", default="8b", choices=tuple(SIZES))
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--out", type=Path, help="the results' file")
    parser.add_argument("--redo", action="store_true", help="also what the results have")
    parser.add_argument("--force", action="store_true", help="drop results of other versions")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU here (--device cpu --size tiny tries the program)")
    header = measure.environment(options.device) | {"size": options.size}
    header["date"] = date.today().isoformat()
    name = re.sub(r"\W+", "-", header["device"]).strip("-").lower()
    path = options.out or measure.ROOT / "benchmarks" / "results" / f"gpu-{name}.json"
    results = store.load(path, header, options.force)
    records: dict[str, Any] = results["records"]
    if options.redo:
        records.clear()

    def run(job: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        own = job | {"device": options.device, "size": options.size}
        return measure.run_fresh("benchmarks.gpu", own, timeout_s=timeout_s)

    jobs = jobs_of(SIZES[options.size])
    left = run_jobs(jobs, records, 60 * options.minutes, lambda: store.save(path, results), run)
    print(markdown(records))
    if left:
        print(f"\n{len(left)} of {len(jobs)} not run for lack of time: the same command goes on")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

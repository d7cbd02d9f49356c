"""The claim of the README: what a training step costs under eager, inductor and mst.

    python -m benchmarks.memory                  # everything, on the CPU; resumes where it stopped
    python -m benchmarks.memory --only llama,nanogpt --cases 1x4096 --skip-time
    python -m benchmarks.memory --device cuda    # larger sizes, bf16, CUDA event timings

Four questions, each answered in processes of its own (see `benchmarks/measure.py`):
    peak    peak intermediate bytes (mstc/runtime/memory.py); seconds of the first step, caches cold
    time    seconds per step of the compiled contenders, which take turns in one process
            (--together: peaks and compile seconds from that process as well)
    tiny    the same for a model too small to gain anything, where the ratio should be 1
    error   distance of loss and gradients from float64 eager, in fp32, bf16 weights and autocast
Results go to benchmarks/results/memory-<device>.json after every job; a Markdown table is printed.
"""

import argparse
import copy
import re
import sys
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import accuracy, measure, models, store
from benchmarks.table import markdown
from mstc.runtime.memory import measure_step

MODES = ("fp32", "bf16", "autocast")
TINY_CASE, TINY_MODEL, TINY_ROUNDS = "1x128", "nanogpt", 101
DEFAULT_CASES = {"cpu": "1x4096,2x1024", "cuda": "1x16384,2x8192"}


def _subject(job: dict[str, Any]) -> models.Subject:
    rows, tokens = map(int, job["case"].split("x"))
    dtype = getattr(torch, job["dtype"])
    return models.build(job["model"], job["scale"], rows, tokens, job["device"], dtype)


def peak(job: dict[str, Any]) -> dict[str, Any]:
    subject = _subject(job)
    step = measure.training_step(measure.compiled(subject.model, job["contender"]), subject.batch)
    return _peak(subject, step, job["device"])


def _peak(subject: models.Subject, step: Callable[[], Tensor], device: str) -> dict[str, Any]:
    measure.clear_gradients(subject.model)
    compile_s = measure.seconds(step, device)
    measure.clear_gradients(subject.model)
    step()  # a second step, so that nothing is made or tuned while measuring
    trace = measure_step(step, subject.model.parameters(), device)
    return {
        "compile_s": compile_s,
        "peak_intermediate_nbytes": trace.peak_intermediate_nbytes,
        "peak_nbytes": trace.peak_nbytes,
        "end_nbytes": trace.end_nbytes,
        "grad_nbytes": trace.grad_nbytes,
    }


def time(job: dict[str, Any]) -> dict[str, Any]:
    subject = _subject(job)
    steps = {
        contender: measure.training_step(measure.compiled(subject.model, contender), subject.batch)
        for contender in job["contenders"]
    }
    peaks: dict[str, Any] = {}
    if job.get("peaks"):
        measure.warm_up_compiler()  # or the first contender would pay for it
        peaks = {name: _peak(subject, step, job["device"]) for name, step in steps.items()}
    times = measure.alternate(steps, subject.model, job["device"], job["rounds"])
    result: dict[str, Any] = {
        "peaks": peaks,
        "step_s": {name: median(values) for name, values in times.items()},
        "rounds_s": times,
    }
    if {"mst", "inductor"} <= times.keys():
        result["mst_over_inductor"] = measure.ratio_of_medians(times, "mst", "inductor")
    return result


def error(job: dict[str, Any]) -> dict[str, Any]:
    job = job | {"dtype": "bfloat16" if job["mode"] == "bf16" else "float32"}
    subject = _subject(job)
    reference = copy.deepcopy(subject.model).double()
    with accuracy.Float64():
        true_loss = measure.training_step(reference, subject.batch)()
    assert true_loss.dtype == torch.float64
    true_gradients = accuracy.gradients(reference)
    result: dict[str, Any] = {}
    for contender in job["contenders"]:
        torch._dynamo.reset()
        measure.clear_gradients(subject.model)
        step = measure.training_step(
            measure.compiled(subject.model, contender), subject.batch, job["mode"] == "autocast"
        )
        loss = step().double()
        result[contender] = accuracy.gradient_error(
            accuracy.gradients(subject.model), true_gradients
        ) | {"loss": float((loss - true_loss).abs() / true_loss.abs())}
    return result


WORK = {"peak": peak, "time": time, "tiny": time, "error": error}


def jobs(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key in the results, job) in the order in which they run."""
    base = {"device": options.device, "scale": options.scale, "dtype": options.dtype}
    compiled = [name for name in options.contenders if name != "eager"] or options.contenders
    for model in options.only:
        for case in options.cases:
            one = base | {"model": model, "case": case}
            for contender in () if options.together else options.contenders:
                yield (
                    f"peak/{model}/{case}/{contender}",
                    one | {"work": "peak", "contender": contender},
                )
            if not options.skip_time:
                rounds = {
                    "contenders": options.contenders if options.together else compiled,
                    "rounds": options.rounds,
                    "peaks": options.together,
                }
                yield f"time/{model}/{case}", one | rounds | {"work": "time"}
        if not options.skip_error:
            for mode in options.modes:
                yield (
                    f"error/{model}/{options.error_case}/{mode}",
                    base
                    | {
                        "work": "error",
                        "model": model,
                        "case": options.error_case,
                        "mode": mode,
                        "contenders": options.contenders,
                    },
                )
    if not options.skip_time:
        yield (
            f"tiny/{TINY_MODEL}/{TINY_CASE}",
            base
            | {
                "work": "tiny",
                "model": TINY_MODEL,
                "case": TINY_CASE,
                "scale": "tiny",
                "contenders": compiled,
                "rounds": TINY_ROUNDS,
            },
        )


def _parse(arguments: list[str]) -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return text.split(",")

    parser = argparse.ArgumentParser(
        prog="benchmarks.memory", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--scale", choices=models.SCALES, help="sizes; default: the device's")
    parser.add_argument("--dtype", help="of the weights; default: float32, on cuda bfloat16")
    parser.add_argument("--only", type=names, default=list(models.NAMES), metavar="MODEL,...")
    parser.add_argument("--cases", type=names, metavar="ROWSxTOKENS,...")
    parser.add_argument("--error-case", default="1x512", metavar="ROWSxTOKENS")
    parser.add_argument("--modes", type=names, default=list(MODES), metavar="MODE,...")
    parser.add_argument("--contenders", type=names, default=list(measure.CONTENDERS))
    parser.add_argument("--rounds", type=int, default=7, help="of timing, after two to warm up")
    parser.add_argument(
        "--together",
        action="store_true",
        help="peaks and compile seconds from the process in which contenders take turns (faster)",
    )
    parser.add_argument("--skip-time", action="store_true")
    parser.add_argument("--skip-error", action="store_true")
    parser.add_argument(
        "--force", action="store_true", help="measure again, though the results have it"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    options.scale = options.scale or options.device
    options.dtype = options.dtype or {"cpu": "float32", "cuda": "bfloat16"}[options.device]
    options.cases = options.cases or names(DEFAULT_CASES[options.device])
    for given, known in (
        (options.only, models.NAMES),
        (options.contenders, measure.CONTENDERS),
        (options.modes, MODES),
    ):
        if unknown := set(given) - set(known):
            parser.error(f"unknown: {', '.join(sorted(unknown))} (known: {', '.join(known)})")
    return options


def main(arguments: list[str]) -> int:
    if measure.serve(lambda job: WORK[job["work"]](job), arguments):
        return 0
    options = _parse(arguments)
    environment = measure.environment(options.device)
    slug = "cpu" if options.device == "cpu" else environment["device"]
    name = re.sub(r"[^a-z0-9]+", "-", slug.lower()).strip("-")
    path = options.out or measure.ROOT / "benchmarks" / "results" / f"memory-{name}.json"
    sizes = {model: models.describe(model, options.scale) for model in models.NAMES}
    header = environment | {
        "date": date.today().isoformat(),
        "dtype": options.dtype,
        "sizes": sizes | {"tiny": models.describe(TINY_MODEL, "tiny")},
    }
    results = store.load(path, header, options.force)

    todo = [
        (key, job)
        for key, job in jobs(options)
        if options.force or _missing(results["records"], key, job)
    ]
    failed = 0
    progress = tqdm(todo, unit="job")
    for key, job in progress:
        progress.set_postfix_str(key)
        try:
            results["records"][key] = measure.run_fresh("benchmarks.memory", job)
        except measure.WorkerFailed as problem:
            failed += 1
            results["records"][key] = {"failed": str(problem)}
            progress.write(f"{key} failed: {problem}")
        for contender, found in results["records"][key].pop("peaks", {}).items():
            results["records"][f"peak/{job['model']}/{job['case']}/{contender}"] = found
        store.save(path, results)
    print(markdown(results))
    return 1 if failed else 0


def _missing(records: dict[str, Any], key: str, job: dict[str, Any]) -> bool:
    """Not measured yet, or failed, or measured for fewer contenders than are wanted now."""
    record = records.get(key)
    if record is None or "failed" in record:
        return True
    return not set(job.get("contenders", ())) <= record.get("step_s", record).keys()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What the benchmarks and the demo measure with: fresh processes, steps, clocks.

Every cold figure (compile seconds, peak) comes from a process of its own with empty compile caches.
Times that are compared come from one process in which the contenders take turns.
"""

import contextlib
import inspect
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks.models import loss_of

CONTENDERS = ("eager", "inductor", "mst")
_CAN_ISOLATE = "isolate_recompiles" in inspect.signature(torch.compile).parameters
ROOT = Path(__file__).resolve().parent.parent


_ALL_ANEW = {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
_GRAPHS_ANEW = {"TORCHINDUCTOR_FX_GRAPH_CACHE": "0", "TORCHINDUCTOR_AUTOGRAD_CACHE": "0"}


class WorkerFailed(RuntimeError):
    """A fresh process ended without a result; the message is the end of what it printed."""


def run_fresh(
    module: str,
    job: Mapping[str, Any],
    *,
    show: bool = False,
    timeout_s: float = 3600,
    kernels: Path | None = None,
    caches: Path | None = None,
    share: bool = False,
) -> dict[str, Any]:
    """Run `python -m module --worker job.json result.json` with cold compile caches.

    `show` lets the worker write to our stdout (its progress); warnings on stderr stay unseen. Into
    `kernels`, a folder, go Inductor's C++ kernels, which it finds again by their source: compile
    times are then not cold. `caches` is a folder for all that PyTorch keeps. With `share`, the
    worker begins at work (see benchmarks/quiet.py).
    """
    with tempfile.TemporaryDirectory(prefix="mstc-bench-") as folder:
        job_path, result_path = Path(folder, "job.json"), Path(folder, "result.json")
        job_path.write_text(json.dumps(job))
        environment = cold_caches(Path(folder), kernels)
        if caches is not None:
            environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(caches)}
        at_work = ["-m", "benchmarks.quiet", module] if share else ["-m", module]
        command = [sys.executable, *at_work, "--worker", str(job_path), str(result_path)]
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=None if show else subprocess.PIPE,
                stderr=subprocess.PIPE if show else subprocess.STDOUT,
                text=True,
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise WorkerFailed(f"no result after {timeout_s:.0f} s") from error
        if done.returncode != 0 or not result_path.exists():
            raise WorkerFailed(
                f"exit status {done.returncode}:\n{(done.stderr if show else done.stdout)[-3000:]}"
            )
        return json.loads(result_path.read_text())


def cold_caches(folder: Path, kernels: Path | None = None) -> dict[str, str]:
    """The environment of a process that finds nothing compiled, or `kernels` only; what it compiles
    itself goes to `folder`."""
    return os.environ | {
        "TORCHINDUCTOR_CACHE_DIR": str(kernels or Path(folder, "inductor")),
        "TRITON_CACHE_DIR": str(Path(folder, "triton")),
        **(_GRAPHS_ANEW if kernels else _ALL_ANEW),
    }


def serve(work: Callable[[dict[str, Any]], dict[str, Any]], arguments: Sequence[str]) -> bool:
    """The other side of `run_fresh`: if `arguments` are a worker's, do the work and say True."""
    if list(arguments[:1]) != ["--worker"]:
        return False
    job_path, result_path = arguments[1:]
    result = work(json.loads(Path(job_path).read_text()))
    Path(result_path).write_text(json.dumps(result))
    return True


def environment(device: str) -> dict[str, Any]:
    """What a figure depends on beside the code: device, threads, versions."""
    names = ("torch", "transformers", "triton", "mstc")
    versions: dict[str, str] = {"python": platform.python_version()}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "versions": versions,
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


_AUTO_CHUNKER = {"auto_chunker.enable": True}
_EAGER_LOWERING = {"lowering": "eager"}
_BACKENDS: dict[str, tuple[str, dict[str, Any]]] = {
    "inductor": ("inductor", {}),
    "auto_chunker": ("inductor", _AUTO_CHUNKER),  # Inductor with its own chunking switched on
    "mst": ("mst", {}),
    # op by op, with the partitioner and the decompositions that Inductor has
    "aot_eager": ("aot_eager_decomp_partition", {}),
    "mst_eager": ("mst", _EAGER_LOWERING),
}


def compiled(model: Callable[..., Any], contender: str) -> Callable[..., Any]:
    """`model` as the contender compiles it; kept apart, where torch can, from what other contenders
    compile of the same code."""
    if contender == "eager":
        return model
    backend, options = _BACKENDS[contender]
    if backend == "mst":
        import mstc  # noqa: F401  (registers the backend where the package is not installed)
    return compiled_by(model, backend, options)


def compiled_by(
    model: Callable[..., Any],
    backend: str | Callable[..., Any],
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """`model` as a backend compiles it, kept apart as in `compiled`."""
    apart = {"isolate_recompiles": True} if _CAN_ISOLATE else {}
    return cast("Any", torch.compile)(model, backend=backend, options=options or None, **apart)


def warm_up_compiler() -> None:
    """Let Inductor load what it loads once per process."""
    torch.compile(lambda x: x.sin().sum())(torch.ones(64, requires_grad=True)).backward()
    torch._dynamo.reset()


def training_step(
    model: Callable[..., Any], batch: Mapping[str, Any], autocast: bool = False
) -> Callable[[], Tensor]:
    """Forward and backward as in a user's loop: the output, logits too, lives through backward."""
    device = next(iter(batch.values())).device.type

    def step() -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            output = model(**batch)
        loss = loss_of(output)
        loss.backward()
        return loss.detach()

    return step


def clear_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None


def seconds(fn: Callable[[], object], device: str) -> float:
    """Duration of one call: CUDA events on a GPU, the wall elsewhere."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        fn()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    fn()
    return time.perf_counter() - begin


def alternate(
    steps: Mapping[str, Callable[[], object]],
    model: nn.Module,
    device: str,
    rounds: int,
    warm_up: int = 2,
) -> dict[str, list[float]]:
    """Seconds of each round of each step, in turns (A B A B), so that drift hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(warm_up + rounds):
        for name, step in steps.items():
            clear_gradients(model)
            duration = seconds(step, device)
            if i >= warm_up:
                times[name].append(duration)
    return times


def ratio_of_medians(times: Mapping[str, Sequence[float]], above: str, below: str) -> float:
    return median(times[above]) / median(times[below])

"""One contender in a process of its own: `python -m benchmarks.peers.worker FD`.

FD is this side of a pipe to turns.py. The first message is a job, its answer the row that prepared
the contender; every further message is a turn, its answer the seconds of a step.
"""

import contextlib
import resource
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks import accuracy, coverage, measure
from benchmarks.peers import cases
from benchmarks.peers.contenders import CONTENDERS
from mstc.runtime.memory import measure_step


class Entry:
    """A contender with its task, ready to take steps."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job, self.device = job, job["device"]
        self.contender = CONTENDERS[job["contender"]]
        self.task = task_of(job)
        self.step = self.task.step(self.contender.make(self.task))

    def prepare(self) -> dict[str, Any]:
        """The row so far: seconds of the first step, error, peak.

        Raises:
            whatever the contender raises; RuntimeError if it compiled nothing but should have.
        """
        if self.contender.compiles:
            measure.warm_up_compiler()  # what is loaded once per process is not a contender's cost
        counters: Any = torch._dynamo.utils.counters
        counters.clear()
        row: dict[str, Any] = {"first_step_s": round(measure.seconds(self.step, self.device), 4)}
        row["error"] = self._error()
        self._rest()
        trace = measure_step(self.step, self.task.leaves().values(), self.device)
        row["peak_nbytes"] = trace.peak_nbytes
        row["peak_intermediate_nbytes"] = trace.peak_intermediate_nbytes
        if self.contender.compiles and not counters["stats"]["unique_graphs"]:
            raise RuntimeError("nothing was compiled")
        if self.contender.note and (note := self.contender.note()):
            row["note"] = note
        self._rest()
        return row

    def turn(self) -> float:
        took = measure.seconds(self.step, self.device)
        self._rest()
        return took

    def _error(self) -> dict[str, Any] | None:
        if self.job["truth"] is None:
            return None
        truth = torch.load(self.job["truth"], map_location=self.device)
        return accuracy.floored_error(self.task.gradients(), truth)

    def _rest(self) -> None:
        """Leave the memory to the next contender."""
        self.task.clear()
        if self.device == "cuda":
            torch.cuda.empty_cache()


def task_of(job: dict[str, Any]) -> cases.Task:
    dtype = getattr(torch, job["dtype"])
    return cases.build(job["case"], job["scale"], job["tokens"], job["device"], dtype)


def before_contenders(job: dict[str, Any]) -> dict[str, Any]:
    """What contenders share: Inductor's first files in its cache, or (with a file named) the
    float64 gradients."""
    if "truth" not in job:
        measure.warm_up_compiler()
        return {}
    limit_memory(job)
    torch.save(cases.truth(task_of(job)), job["truth"])
    return {}


def limit_memory(job: dict[str, Any]) -> None:
    """An allocation beyond the limit fails here, before the system kills somebody; and if it does,
    then this process and not the one that writes the results."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    if job["device"] == "cpu":  # CUDA's drivers reserve more than there is
        nbytes = int(job["memory_gib"] * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (nbytes, nbytes))


def main(descriptor: str) -> None:
    pipe = Connection(int(descriptor))
    job = pipe.recv()
    try:
        limit_memory(job)
        coverage.let_dynamo_compile_everything()
        entry = Entry(job)
        pipe.send(entry.prepare())
        while pipe.recv():
            pipe.send({"s": entry.turn()})
    except Exception as error:
        pipe.send({"failed": coverage.text_of(error)})


if __name__ == "__main__":
    if not measure.serve(before_contenders, sys.argv[1:]):
        main(sys.argv[1])

"""A budget that only offload meets, for a Llama's step on a GPU; see the package.

python -m tests.sm90.offload
"""

from __future__ import annotations

import json
import re
from typing import Any

import torch
from torch.fx import GraphModule

import mstc
from mstc import budget, emission, partition
from mstc.options import Options
from passes.offload import Offloaded
from tests.sm90 import device
from tests.sm90.llama import Sizes, on_gpu

SIZES = Sizes(4096, 8192, 256, 1024, layers=3, heads=4)
BUDGET = 44 * 2**20
OPTIONS: dict[str, Any] = {
    "memory_budget": BUDGET,
    "min_region_bytes": 2**18,
    "min_peak_bytes": 2**18,
    "min_chunk_rows": 512,
}
_OUTWARD = re.compile(r"empty_strided_cpu_pinned\(")
_BACK = re.compile(r"\.copy_\((?:reinterpret_tensor\()?host_\w+")
_LOOP = "torch.ops.mst.loop.default("


def main() -> None:
    device.install_or_leave()
    peaks: dict[str, int] = {}
    modules: list[str] = []
    shares: list[tuple[int, int]] = []
    _record(peaks, modules, shares)
    with on_gpu(SIZES, torch.bfloat16) as (model, batch):
        trace = mstc.simulate_step(model.train(), options=OPTIONS, **batch)
        weights = sum(p.nbytes for p in model.parameters())
    forward, backward = [text for text in modules if _LOOP in text][-2:]  # those of the step
    result = {
        "peaks": peaks,
        "peak": trace.peak_nbytes,
        "gradients": trace.grad_nbytes,
        "weights": weights,
        "moved": shares[-1][0],
        "stays": shares[-1][1],
        "outward": len(_OUTWARD.findall(forward)),
        "back": len(_BACK.findall(backward)),
        "back_before_a_loop": len(_BACK.findall(backward[: backward.index(_LOOP)])),
    }
    print(json.dumps(result))


def _record(peaks: dict[str, int], modules: list[str], shares: list[tuple[int, int]]) -> None:
    """Write down what is found from here on: peaks of settings, modules, bytes that move."""
    measure, load = budget.graph_peak, emission._load

    def measured(graph: GraphModule, inputs: Any, options: Options, compile_: Any) -> int:
        peaks[str(options.setting)] = found = measure(graph, inputs, options, compile_)
        return found

    def loaded(path: str, constants: dict[str, Any]) -> Any:
        with open(path) as file:
            modules.append(file.read())
        return load(path, constants)

    budget.graph_peak = measured
    emission._load = loaded
    record_moves(shares)


def record_moves(shares: list[tuple[int, int]]) -> None:
    """Write down from here on, for every graph, how many bytes of saved values move to the host,
    and how many stay."""
    offload = partition.offload_saved_values

    def offloaded(*args: Any) -> Offloaded | None:
        found = offload(*args)
        shares.append((found.nbytes, found.stays) if found is not None else (0, 0))
        return found

    partition.offload_saved_values = offloaded


if __name__ == "__main__":
    main()

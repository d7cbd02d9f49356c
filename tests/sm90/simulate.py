"""The memory of a Llama's step on a GPU, ours and Inductor's; see the package."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import torch
from torch import Tensor

import mstc
from mstc.runtime import product
from tests.sm90 import device
from tests.sm90.llama import LARGE, on_gpu


def main() -> None:
    device.install_or_leave()
    products = _counted_products()
    found: dict[str, Any] = {}
    with on_gpu(LARGE, torch.bfloat16) as (model, batch):
        for backend in ("mst", "inductor"):
            trace = mstc.simulate_step(model, backend=backend, **batch)
            found[backend] = {
                "peak": trace.peak_nbytes,
                "largest": max(b.nbytes for b in trace.buffers),
                "gradients": trace.grad_nbytes,
                "loops": len(trace.loops),
            }
        found["weights"] = sum(p.nbytes for p in model.parameters())
    found["products"] = products
    print(json.dumps(found))


def _counted_products() -> Counter[str]:
    """How products of a loop's chunks are added up, from here on."""
    counts: Counter[str] = Counter()

    def counting(way: str, add: Any) -> Any:
        def call(
            buffer: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype, only: Any
        ) -> Tensor:
            result = add(buffer, left, right, dtype, only)
            counts[f"{way}: {left.dtype} in {result.dtype} on {result.device}"] += 1
            return result

        return call

    for way, add in product._WAYS.items():
        product._WAYS[way] = counting(way, add)
    return counts


if __name__ == "__main__":
    main()

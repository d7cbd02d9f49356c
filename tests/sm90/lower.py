"""Compiles a Llama's step for sm_90 as users do; see the package."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from contextlib import suppress
from typing import Any

import torch

import mstc
from mstc.errors import BodyCompilationWarning, FallbackWarning
from mstc.runtime.loop import counters
from tests.sm90 import device
from tests.sm90.emitted import Emitted, Stopped, collected, stop
from tests.sm90.llama import LARGE, on_gpu


def main() -> None:
    device.install_or_leave()
    for kind in (BodyCompilationWarning, FallbackWarning):
        warnings.simplefilter("error", kind)
    with (
        on_gpu(LARGE, torch.bfloat16) as (model, batch),
        collected(stop) as modules,
        suppress(Stopped),
    ):
        torch.compile(model, backend="mst")(**batch)
    found = mstc.last_report()
    assert found is not None
    (graph,) = found.graphs
    result = {
        "modules": list(map(_described, modules)),
        "bodies": counters.bodies_compiled,
        "loops": [dataclasses.asdict(loop) for loop in graph.loops],
        "deferred": found.deferred,
    }
    print(json.dumps(result))


# of a kernel's text: a whole row of a chunk's logits, read or written
_LOGITS = re.compile(rf"tl\.(load|store)\(\w+ \+ \(r\w+ \+ {LARGE.vocabulary}\*x\w+\)")


def _described(one: Emitted) -> dict[str, Any]:
    built = [result.kernel for k in one.kernels.values() for result in k.compile_results]
    return {
        "role": one.role,
        "kernels": len(one.kernels),
        "libraries": one.libraries,
        "largest_buffer": one.largest_buffer,
        "logits": sorted(_LOGITS.findall(one.text)),
        "built": len({b.metadata.name for b in built if b.asm["cubin"]}),
        "targets": sorted({b.metadata.target.arch for b in built}),
    }


if __name__ == "__main__":
    main()

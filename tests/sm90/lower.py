"""Compiles a Llama's step for sm_90 as users do; see the package."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from contextlib import suppress
from typing import Any

import torch
from torch._subclasses import FakeTensorMode

import mstc
from mstc.errors import BodyCompilationWarning, FallbackWarning
from mstc.runtime.loop import counters
from tests.mstc import test_inplace as inplace
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
        "in_place": _in_place(),
    }
    print(json.dumps(result))


def _in_place() -> dict[str, int]:
    """Bodies that write over their operands, by name: how many buffers they have."""
    with FakeTensorMode():
        tensors = [t.to("cuda") for t in inplace.inputs()]
    return {body.__name__: inplace.buffers(body, tensors) for body in inplace.BODIES}


# of a kernel's text: a whole row of a chunk's logits, read or written
_LOGITS = re.compile(rf"tl\.(load|store)\(\w+ \+ \(r\w+ \+ {LARGE.vocabulary}\*x\w+\)")


def _described(one: Emitted) -> dict[str, Any]:
    built = [result.kernel for k in one.kernels.values() for result in k.compile_results]
    return {
        "role": one.role,
        "kernels": len(one.kernels),
        "libraries": one.libraries,
        "buffers": one.buffers,
        "logits": sorted(_LOGITS.findall(one.text)),
        "built": len({b.metadata.name for b in built if b.asm["cubin"]}),
        "targets": sorted({b.metadata.target.arch for b in built}),
    }


if __name__ == "__main__":
    main()

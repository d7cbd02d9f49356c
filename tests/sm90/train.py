"""One step of a tiny Llama in Triton's interpreter; see the package.

A step is compiled for the GPU on tensors without data, and called with a CPU's. Beside Triton's
kernels only matrix products are computed by others.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from mstc.backend import mst_backend
from mstc.runtime.loop import counters
from tests.models import INDUCTOR, tokens, train
from tests.sm90 import device
from tests.sm90.emitted import Stopped, collected
from tests.sm90.llama import TINY, by_name, on_gpu

OPTIONS = INDUCTOR | {"chunk_rows": 16}  # of 40 rows: the last chunk is another


def main(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = TINY.model(dtype, "cpu")
    ids = tokens(1, TINY.tokens, vocab=TINY.vocabulary)
    batch = {"input_ids": ids, "labels": ids.masked_fill(torch.arange(TINY.tokens) < 5, -100)}
    exact = copy.deepcopy(model).double()
    truth = train(exact, exact, kwargs=batch)
    eager = train(model, model, kwargs=batch).error(truth)
    step = _compiled(dtype, by_name(model, batch))
    bodies = counters.bodies_compiled
    ours = train(model, step).error(truth)
    result = {
        "ours": ours,
        "eager": eager,
        "bodies": bodies,
        "bodies_compiled_later": counters.bodies_compiled - bodies,
    }
    print(json.dumps(result))


def _compiled(dtype: torch.dtype, values: dict[str, Tensor]) -> Callable[[], Any]:
    """The step for a GPU, to be run with these values."""
    device.install_or_leave()
    from tests.sm90 import interpreter  # loads Triton

    interpreter.install()
    calls: list[Callable[[], Any]] = []
    with on_gpu(TINY, dtype) as (model, batch), collected(interpreter.on_cpu):
        names = {id(tensor): name for name, tensor in by_name(model, batch).items()}

        def backend(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            compiled = mst_backend(gm, inputs, options=OPTIONS)
            order = [names[id(tensor)] for tensor in inputs]
            calls.append(lambda: compiled(*(values[name] for name in order)))
            return _stopped

        with suppress(Stopped):
            torch.compile(model, backend=backend)(**batch)
    (call,) = calls
    return call


def _stopped(*args: Any) -> Any:
    raise Stopped


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") == "1"
    main(getattr(torch, sys.argv[1]))

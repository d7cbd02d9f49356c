"""Two steps of a Llama as CUDA graphs would be made of them, ours and Inductor's; see the package.

With ``mode="reduce-overhead"`` Inductor makes one CUDA graph of all that a compiled forward or
backward launches, loops included: it runs once to warm up, is recorded as it runs again, and what
was recorded is replayed. In the place of what records stands something that holds every op against
what can be recorded: work for the GPU, on the GPU's tensors, and nothing that is compiled on the
way.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters as skipped
from torch._inductor import compile_fx
from torch._inductor.runtime.triton_heuristics import CachingAutotuner
from torch.fx import GraphModule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mstc import emission
from mstc.backend import mst_backend
from mstc.runtime.loop import counters, loop_op, program_of
from tests.sm90 import device
from tests.sm90.emitted import collected
from tests.sm90.llama import Sizes, on_gpu

MODE = "reduce-overhead"
SIZES = Sizes(1024, 2048, 64, 256, layers=2, heads=2)
OPTIONS: dict[str, Any] = {"min_peak_bytes": 0, "min_region_bytes": 0, "chunk_rows": 384}


class _Run(TorchDispatchMode):
    """Runs loops too, of which a fake tensor would see results only. While it is recorded, whatever
    no CUDA graph can hold raises; reading a value of a fake tensor does anyway."""

    def __init__(self, *, recorded: bool) -> None:
        super().__init__()
        self.recorded = recorded
        self.ops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is loop_op:
            inputs, sizes, chunk, spec, lowering = args
            with self:
                return program_of(spec, lowering).run(inputs, list(map(int, sizes)), chunk)
        result = func(*args, **(kwargs or {}))
        if self.recorded:
            for value in tree_leaves((args, kwargs, result)):
                if isinstance(value, Tensor) and value.device.type != "cuda":
                    raise AssertionError(f"{func} has a tensor of the host")
        self.ops += 1
        return result


class _Recorder:
    """In the place of `torch._inductor.compile_fx.cudagraphify`."""

    def __init__(self) -> None:
        self.graphs: list[dict[str, Any]] = []

    def __call__(
        self,
        model: Callable[..., Any],
        static_input_idxs: Sequence[int] = (),
        *,
        is_backward: bool,
        mutated_input_idxs: Sequence[int] = (),
        **settings: Any,
    ) -> Callable[..., Any]:
        graph = {
            "backward": is_backward,
            "mutated": len(mutated_input_idxs),
            "runs": 0,
            "ops": 0,
            "bodies": 0,
        }
        self.graphs.append(graph)

        def run(inputs: Sequence[Any]) -> Any:
            graph["static"] = _nbytes([inputs[i] for i in static_input_idxs])
            graph["copied"] = _nbytes(inputs) - graph["static"]
            graph["runs"] += 1
            before = counters.bodies_compiled
            with _Run(recorded=graph["runs"] > 1) as way:
                result = model(inputs)
            if way.recorded:
                graph["ops"] += way.ops
                graph["bodies"] += counters.bodies_compiled - before
            return result

        return run


def _nbytes(values: Sequence[Any]) -> int:
    return sum(v.nbytes for v in values if isinstance(v, Tensor))


def _launches_nothing(module: ModuleType) -> None:
    scope = vars(module)
    kernels = [name for name, value in scope.items() if isinstance(value, CachingAutotuner)]
    scope.update(emission._STAND_INS, **dict.fromkeys(kernels, emission._Kernel()))


def _steps(model: nn.Module, batch: dict[str, Tensor], backend: str) -> dict[str, Any]:
    torch._dynamo.reset()
    skipped.clear()
    recorder = _Recorder()
    with (
        patch.object(compile_fx, "cudagraphify", recorder),
        collected(_launches_nothing) as modules,
    ):
        compiled = torch.compile(model, backend=_ours if backend == "mst" else _theirs)
        for _ in range(2):
            model.zero_grad()
            compiled(**batch).loss.backward()
    return {
        "graphs": recorder.graphs,
        "skipped": skipped["inductor"]["cudagraph_skips"],
        "loops": sum(m.libraries["mst.loop.default"] for m in modules),
    }


def _ours(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    return mst_backend(gm, inputs, options=OPTIONS, mode=MODE)


def _theirs(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    return compile_fx.compile_fx(gm, inputs, config_patches=torch._inductor.list_mode_options(MODE))


def main() -> None:
    device.install_or_leave()
    with on_gpu(SIZES, torch.bfloat16) as (model, batch):
        found: dict[str, Any] = {b: _steps(model, batch, b) for b in ("mst", "inductor")}
    found["weights"] = _nbytes(list(model.parameters()))
    print(json.dumps(found))


if __name__ == "__main__":
    main()

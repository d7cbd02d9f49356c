"""What ``torch.compile(model, backend="mst")`` calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.fx import GraphModule

from mstc.driver import compile_graph
from mstc.inductor import forget_cuda_graphs
from mstc.options import parse_options


def mst_backend(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile a Dynamo graph so that training needs a fraction of the intermediate memory.

    Args:
        gm: the graph.
        example_inputs: its inputs.
        options: see `mstc.Options`; Inductor's options may stand beside ours.
        mode: as for Inductor: "default", "reduce-overhead", "max-autotune",
            "max-autotune-no-cudagraphs".

    Raises:
        OptionError: an unknown or impossible option; the message names the known ones.
    """
    return compile_graph(gm, example_inputs, parse_options(options, mode))


mst_backend.reset = forget_cuda_graphs  # type: ignore[attr-defined]  # what `torch._dynamo.reset` asks a backend for

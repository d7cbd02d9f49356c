"""What the backend would do to a model, without running it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule
from torch.utils._pytree import tree_map_only

from mstc import driver
from mstc.options import parse_options
from mstc.report import Report


def explain(
    model: Callable[..., Any], *args: Any, options: dict[str, Any] | None = None, **kwargs: Any
) -> Report:
    """Analyse one call ``model(*args, **kwargs)`` as ``torch.compile(model, backend="mst")`` would
    compile it.

    Nothing is computed: the call runs on fake tensors, which have shapes and no data, so a size
    that would not fit is explained as well. Gradients are taken to be wanted if they are enabled.

    Args:
        model: a module or a function.
        args, kwargs: what it would be called with; real tensors, or fake ones.
        options: as for ``torch.compile``.

    Returns:
        the intermediate-memory table, regions, refusals and predicted peaks, of all graphs of the
        call; ``print`` it.
    """
    parsed = parse_options(options, None)
    merged = Report()

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        report = driver.analyze_graph(gm, example_inputs, parsed)
        merged.graphs += report.graphs
        merged.deferred += report.deferred
        merged.refusals += report.refusals
        merged.notes += report.notes
        return gm.forward

    given = [a for a in (*args, *kwargs.values()) if isinstance(a, FakeTensor)]
    mode = given[0].fake_mode if given else FakeTensorMode(allow_non_fake_inputs=True)

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        return tensor if isinstance(tensor, FakeTensor) else mode.from_tensor(tensor)

    with mode, torch._dynamo.config.patch(recompile_limit=1 << 16):
        fake_args, fake_kwargs = tree_map_only(torch.Tensor, fake, (args, kwargs))
        torch.compile(model, backend=backend, dynamic=False)(*fake_args, **fake_kwargs)
    return merged

"""What the backend would do to a model, without running it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves, tree_map_only

from mstc import driver
from mstc.inductor import forgotten_frames
from mstc.options import parse_options
from mstc.report import Report


def explain(
    model: Callable[..., Any], *args: Any, options: dict[str, Any] | None = None, **kwargs: Any
) -> Report:
    """Analyse one call ``model(*args, **kwargs)`` as ``torch.compile(model, backend="mst")`` would
    compile it.

    Nothing is computed: the call runs on fake tensors, which have shapes and no data, so a size
    that would not fit is explained as well (a model made on the "meta" device counts as one on the
    CPU). Gradients are taken to be wanted if they are enabled.

    Args:
        model: a module or a function, compiled or not.
        args, kwargs: what it would be called with; real tensors, or fake ones.
        options: as for ``torch.compile``.

    Returns:
        the intermediate-memory table, regions, refusals and predicted peaks, of all graphs of the
        call; ``print`` it.
    """
    parsed = parse_options(options, None)
    merged = Report()
    model = plain(model)

    def call(*args: Any, **kwargs: Any) -> Any:  # so that the model's own frames keep their cache
        return model(*args, **kwargs)

    call.__code__ = call.__code__.replace(
        co_filename=""
    )  # no line of the user's: not in the report
    given = [a for a in tree_leaves((args, kwargs)) if isinstance(a, FakeTensor)]
    mode = given[0].fake_mode if given else FakeTensorMode(allow_non_fake_inputs=True)
    fake_args, fake_kwargs = tree_map_only(torch.Tensor, lambda t: as_fake(t, mode), (args, kwargs))

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        report, run = driver.analyze_graph(gm, example_inputs, parsed)
        merged.graphs += report.graphs
        merged.deferred += report.deferred
        merged.refusals += report.refusals
        merged.notes += report.notes
        return lambda *args: run(*tree_map_only(torch.Tensor, lambda t: as_fake(t, mode), args))

    with (
        forgotten_frames(),
        torch._dynamo.config.patch(recompile_limit=1 << 16),
        on_fakes(model, mode),
        mode,
    ):
        try:
            torch.compile(call, backend=backend, dynamic=False)(*fake_args, **fake_kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            merged.notes.append(
                f"the model reads a value ({error.func}), which only a real run has: "
                "what comes after it is not explained"
            )
    return merged


def plain(model: Callable[..., Any]) -> Callable[..., Any]:
    """What was given to ``torch.compile``, if `model` came out of it."""
    model = getattr(model, "_torchdynamo_orig_callable", model)
    return getattr(model, "_orig_mod", model)


def as_fake(tensor: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    if isinstance(tensor, FakeTensor):
        return tensor
    if tensor.device.type != "meta":
        return mode.from_tensor(tensor)
    with mode:
        made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(made, requires_grad=tensor.requires_grad)
    return made.requires_grad_(tensor.requires_grad)


@contextmanager
def on_fakes(model: object, mode: FakeTensorMode) -> Iterator[None]:
    """Put fake tensors in the place of a module's own, so that not even a counter in it changes."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    tables = [t for m in modules for t in (m._parameters, m._buffers)]
    kept = [dict(table) for table in tables]
    compiled = [(m, m._compiled_call_impl) for m in modules]
    fakes: dict[int, torch.Tensor] = {}  # a tied weight stays one
    try:
        for table, own in zip(tables, kept, strict=True):
            for name, tensor in own.items():
                if tensor is not None:
                    if id(tensor) not in fakes:
                        fakes[id(tensor)] = as_fake(tensor, mode)
                    table[name] = fakes[id(tensor)]  # type: ignore[assignment]
        for module, _ in compiled:
            module._compiled_call_impl = None
        yield
    finally:
        for table, own in zip(tables, kept, strict=True):
            table.clear()
            table.update(cast("Any", own))
        for module, impl in compiled:
            module._compiled_call_impl = impl

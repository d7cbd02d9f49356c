"""A deferred output, and its gradients, as graphs of aten ops; the gradients' computes nothing that
they do not need."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from mstc.runtime.recipe import Recipe

__all__ = ["gradient_graph", "value_graph"]

log = logging.getLogger(__name__)

_TRACED: weakref.WeakKeyDictionary[Any, dict[Any, GraphModule | None]] = weakref.WeakKeyDictionary()
"""Per closure: its graphs, for the shapes that came; None where the trace failed."""
_MOST_TRACED = 64  # per closure; beyond, shapes vary too much for a trace of each


def gradient_graph(
    recipe: Recipe, tensors: Sequence[torch.Tensor], wanted: Sequence[bool], grad: torch.Tensor
) -> GraphModule | None:
    """``graph(grad, *tensors)`` gives the gradients wanted; None where it cannot be traced.

    A linear layer's gradients do not need its output: the graph does not compute it.
    """

    def gradients(grad: torch.Tensor, *given: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_(w) for t, w in zip(given, wanted, strict=True)]
            output = recipe.run(leaves)
        inputs = [t for t, w in zip(leaves, wanted, strict=True) if w]
        return torch.autograd.grad(output, inputs, grad, allow_unused=True)

    return _traced(recipe, gradients, (grad, *tensors), tuple(wanted))


def value_graph(recipe: Recipe, tensors: Sequence[torch.Tensor]) -> GraphModule | None:
    """``graph(*tensors)`` gives the output; None where it cannot be traced."""

    def values(*given: torch.Tensor) -> torch.Tensor:
        return recipe.run(given)

    return _traced(recipe, values, tensors, None)


def _traced(
    recipe: Recipe, function: Callable[..., Any], tensors: Sequence[torch.Tensor], what: Any
) -> GraphModule | None:
    """The graph of a function, traced once for all that it depends on."""
    plain = all(type(t) in (torch.Tensor, torch.nn.Parameter, FakeTensor) for t in tensors)
    if not (plain and recipe.is_traceable):
        return None
    graphs = _TRACED.setdefault(recipe.closure, {})
    metas = tuple((t.shape, t.stride(), t.dtype, t.device) for t in tensors)
    key = (recipe.numbers, recipe.autocast, recipe.casts, what, metas)
    if key not in graphs:
        if len(graphs) >= _MOST_TRACED:
            return None
        try:
            graphs[key] = _trace(function, tensors)
        except Exception:  # running the closure again gives the same gradients, only slower
            log.debug("a deferred output, or its gradients, cannot be traced", exc_info=True)
            graphs[key] = None
    return graphs[key]


def _trace(function: Callable[..., Any], tensors: Sequence[torch.Tensor]) -> GraphModule:
    with FakeTensorMode():
        fakes = [
            torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
            for t in tensors
        ]
    graph = make_fx(function)(*fakes)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph

"""The gradients of a deferred output, as a graph that computes nothing that they do not need."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from mstc.runtime.cell import Recipe

__all__ = ["gradient_graph"]

log = logging.getLogger(__name__)

_TRACED: weakref.WeakKeyDictionary[Any, dict[Any, Callable[..., Any] | None]] = (
    weakref.WeakKeyDictionary()
)
"""Per closure: its gradients as a graph, for the shapes that came; None where the trace failed."""
_MOST_TRACED = 16  # per closure; beyond, shapes vary too much for a trace of each


def gradient_graph(
    recipe: Recipe, tensors: Sequence[torch.Tensor], wanted: Sequence[bool], grad: torch.Tensor
) -> Callable[..., Any] | None:
    """``graph(grad, *tensors)`` gives the gradients wanted; None where it cannot be traced.

    A linear layer's gradients do not need its output: the graph does not compute it.
    """
    plain = all(type(t) in (torch.Tensor, torch.nn.Parameter) for t in (grad, *tensors))
    if not (plain and recipe.is_traceable):
        return None
    graphs = _TRACED.setdefault(recipe.closure, {})
    metas = tuple((t.shape, t.stride(), t.dtype, t.device) for t in (grad, *tensors))
    key = (recipe.numbers, recipe.autocast, recipe.casts, tuple(wanted), metas)
    if key not in graphs:
        if len(graphs) >= _MOST_TRACED:
            return None
        try:
            graphs[key] = _trace_gradients(recipe, tensors, wanted, grad)
        except Exception:  # running the closure again gives the same gradients, only slower
            log.debug("the gradients of a deferred output cannot be traced", exc_info=True)
            graphs[key] = None
    return graphs[key]


def _trace_gradients(
    recipe: Recipe, tensors: Sequence[torch.Tensor], wanted: Sequence[bool], grad: torch.Tensor
) -> Callable[..., Any]:
    def gradients(grad: torch.Tensor, *given: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_(w) for t, w in zip(given, wanted, strict=True)]
            output = recipe.run(leaves)
        inputs = [t for t, w in zip(leaves, wanted, strict=True) if w]
        return torch.autograd.grad(output, inputs, grad, allow_unused=True)

    mode = FakeTensorMode()
    fakes = [mode.from_tensor(t.detach(), static_shapes=True) for t in (grad, *tensors)]
    graph = make_fx(gradients)(*fakes)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph

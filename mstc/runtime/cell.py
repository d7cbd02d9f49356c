"""What a deferred output is made from, and its values once they are made.

A `Recipe` says how to compute values, and a `Cell` holds them, or what makes them. See
`mstc.runtime.deferred` for the tensor around it, and for what is not handled.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily  # no fakes in a trace
from torch.fx import GraphModule
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from mstc.errors import DeferredOutputError
from mstc.runtime.frontier import Stamped, explain_change, stamp_of

__all__ = ["Cell", "Recipe", "read_autocast"]


@dataclass(frozen=True)
class Recipe:
    """How to compute values from the tensors of a frontier."""

    closure: Callable[..., torch.Tensor]
    numbers: tuple[Any, ...]  # the frontier, with None where a tensor goes
    autocast: tuple[tuple[str, bool, torch.dtype], ...]  # device type, whether on, dtype
    casts: tuple[torch.dtype, ...]  # applied to what the closure returns, in order
    source: str  # "file:line  code" of the user who makes the output

    @property
    def is_traceable(self) -> bool:
        """Whether it can be traced on fake tensors: no value is read while it runs."""
        closure = self.closure
        return isinstance(closure, GraphModule) and not any(
            node.op == "call_method" and node.target == "item" for node in closure.graph.nodes
        )

    def run(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """The values, in the caller's grad mode."""
        given = iter(tensors)
        values = [next(given) if n is None else n for n in self.numbers]
        with ExitStack() as stack:
            for device_type, enabled, dtype in self.autocast:
                # No cache: it would keep a cast weight until the caller's own region ends.
                autocast = torch.autocast(device_type, dtype, enabled, cache_enabled=False)
                stack.enter_context(autocast)
            stack.enter_context(_same_autocast_depth())
            result = self.closure(*values)
        for dtype in self.casts:
            result = result.to(dtype)
        return result


@contextmanager
def _same_autocast_depth() -> Iterator[None]:
    """Leave the autocast regions that a closure entered before it failed (out of memory, say)."""
    depth = torch.autocast_increment_nesting()
    try:
        yield
    finally:
        while torch.autocast_decrement_nesting() >= depth:
            pass


def read_autocast(device_type: str) -> tuple[tuple[str, bool, torch.dtype], ...]:
    return tuple(
        (d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d))
        for d in sorted({device_type, "cpu"})
        if torch.amp.is_autocast_available(d)
    )


class Cell:
    """The values of a deferred tensor, once they are made; detached tensors share it."""

    traced = False
    """Whether it was made from parts: they stay its inner tensors while the trace goes on."""
    passed_on = False
    """Whether a graph has computed it inside, so that gradients pass it by."""

    def __init__(self, recipe: Recipe, frontier: Sequence[Stamped], dtype: torch.dtype):
        self.recipe = recipe
        self.frontier = frontier
        self.dtype = dtype
        self.made: torch.Tensor | None = None
        self.changed: Stamped | None = None  # what an optimizer stepped on
        self.lock = threading.RLock()
        if frontier:
            _watch_optimizers()
            with _WAITING_LOCK:
                _WAITING.add(self)

    @staticmethod
    def of(values: torch.Tensor) -> Cell:
        """A cell whose values are there already."""
        cell = Cell(_NO_RECIPE, (), values.dtype)
        cell.made = values
        return cell

    def values(self) -> torch.Tensor:
        """The values, outside autograd. Raises `DeferredOutputError` if they cannot be made."""
        with self.lock:
            if self.made is None:
                self.check()
                with unset_fake_temporarily(), torch.inference_mode(False), torch.no_grad():
                    self.made = self.recipe.run([stamped.tensor for stamped in self.frontier])
                assert self.made.dtype == self.dtype, "a closure's dtype differs from its output's"
                if not self.traced:
                    self.frontier = ()
        return self.made

    def check(self) -> None:
        """Raise `DeferredOutputError` if the frontier is no longer what it was."""
        for stamped in () if self.traced else self.frontier:
            if stamped is self.changed or stamp_of(stamped.tensor) != stamped.stamp:
                raise DeferredOutputError(explain_change(stamped.name, self.recipe.source))

    def cast(self, dtype: torch.dtype) -> Cell:
        """A cell for the values in another dtype, made from the frontier again."""
        cell = Cell(replace(self.recipe, casts=(*self.recipe.casts, dtype)), self.frontier, dtype)
        cell.changed, cell.traced = self.changed, self.traced
        return cell


_NO_RECIPE = Recipe(lambda: torch.empty(0), (), (), (), "")

_WAITING: weakref.WeakSet[Cell] = weakref.WeakSet()
"""Cells whose values may still have to be made."""
_WAITING_LOCK = threading.Lock()


@functools.cache
def _watch_optimizers() -> None:
    hook: Any = torch.compiler.disable(_note_step)
    register_optimizer_step_post_hook(hook)


def _note_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Remember which frontiers an optimizer changed: a fused step leaves no other trace."""
    with _WAITING_LOCK:
        waiting = [cell for cell in _WAITING if cell.frontier]
    if waiting:
        params = (p for group in optimizer.param_groups for p in group["params"])
        stepped = {id(p) for p in params if p.grad is not None}
        for cell in waiting:
            hit = (s for s in cell.frontier if id(s.tensor) in stepped)
            cell.changed = cell.changed or next(hit, None)

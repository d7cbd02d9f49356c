"""What holds the values of a deferred tensor, once they are made.

A `Cell` makes them from a closure's frontier, a `RecordedCell` from what eager code did to other
deferred tensors (`mstc.runtime.record`), a `ViewCell` is a view of another cell's. See
`mstc.runtime.deferred` for the tensor around it, and for what is not handled.
"""

from __future__ import annotations

import functools
import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import unset_fake_temporarily  # no fakes in a trace
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from mstc.errors import DeferredOutputError
from mstc.runtime.evaluation import evaluate, held_cells, hold, is_spent
from mstc.runtime.frontier import Stamped, explain_change, stamp_of
from mstc.runtime.gradient import value_graph
from mstc.runtime.recipe import NO_RECIPE, Recipe
from mstc.runtime.record import (
    LOCK,
    Root,
    Value,
    frontier_leaf,
    leaf,
    pick,
    quiet,
    record,
    replay,
    undo_view,
)
from mstc.runtime.streams import Place, follow, place_of

__all__ = ["Cell", "RecordedCell", "ViewCell", "sticky_cell"]

log = logging.getLogger(__name__)
aten = torch.ops.aten


class Cell:
    """The values of a deferred output, once they are made; detached tensors share it."""

    traced = False
    """Whether it was made from parts: they stay its inner tensors while the trace goes on."""
    passed_on = False
    """Whether a graph has computed it inside, so that gradients pass it by."""
    rewritten = False
    """Whether an in-place operation on it was recorded."""

    def __init__(self, recipe: Recipe, frontier: Sequence[Stamped], dtype: torch.dtype):
        self.recipe = recipe
        self.frontier = frontier
        self.dtype = dtype
        self.made: torch.Tensor | None = None
        self.place: Place | None = None  # where that was made
        self.changed: Stamped | None = None  # what an optimizer stepped on
        self.lock = threading.RLock()
        self._value: Value | None = None  # what it is in a record
        self._recorded = recipe.compile_record is not None and bool(frontier)
        self._kept: tuple[Any, int] | None = None  # of which value `made` is, at which version
        if frontier:
            _watch(self)

    @staticmethod
    def of(values: torch.Tensor) -> Cell:
        """A cell whose values are there already."""
        cell = Cell(NO_RECIPE, (), values.dtype)
        cell.made, cell.place = values, place_of(values)
        return cell

    @property
    def is_there(self) -> bool:
        """Whether the values have been made."""
        return self.made is not None

    def values(self) -> torch.Tensor:
        """The values, outside autograd. Raises `DeferredOutputError` if they cannot be made."""
        with self.lock:
            if self.made is None:
                made = self._make()
                assert made.dtype == self.dtype, "a closure's dtype differs from its output's"
                self._set(made)
            assert self.made is not None
            follow(self.place, self.made)
        return self.made

    def _make(self) -> torch.Tensor:
        if self.rewritten:
            assert self._value is not None
            return evaluate([self._value])[0]
        self.check()
        with unset_fake_temporarily(), torch.inference_mode(False), torch.no_grad():
            for stamped in self.frontier:
                follow(stamped.place, stamped.tensor)
            return self.recipe.run([stamped.tensor for stamped in self.frontier])

    def _set(self, made: torch.Tensor) -> None:
        self.place = place_of(made)  # first: others look at `made`
        self.made = made
        if self._value is not None and self._value.is_wide:
            self._kept = weakref.ref(self._value), made._version
        if not self.traced:
            self.frontier, self._value = (), None

    def kept(self, value: Value) -> torch.Tensor | None:
        """The values, if they are still those of a value in a record."""
        if self.made is None or self._kept is None or self._kept[0]() is not value:
            return None
        if self.made._version != self._kept[1]:
            return None
        follow(self.place, self.made)
        return self.made

    def keep(self, value: Value, made: torch.Tensor) -> None:
        """Take the values that were made for somebody else."""
        if self.made is None and self._value is value and made.dtype == self.dtype:
            self._set(made)

    def check(self) -> None:
        """Raise `DeferredOutputError` if the frontier is no longer what it was."""
        for stamped in () if self.traced else self.frontier:
            if stamped is self.changed or stamp_of(stamped.tensor) != stamped.stamp:
                raise DeferredOutputError(explain_change(stamped.name, self.recipe.source))

    def note_step(self, stepped: set[int]) -> None:
        """Remember what an optimizer has changed: tensors by their `id`."""
        hit = (s for s in self.frontier if id(s.tensor) in stepped)
        self.changed = self.changed or next(hit, None)

    def cast(self, dtype: torch.dtype) -> Cell:
        """A cell for the values in another dtype, made from the frontier again."""
        cell = Cell(replace(self.recipe, casts=(*self.recipe.casts, dtype)), self.frontier, dtype)
        cell.changed, cell.traced = self.changed, self.traced
        return cell

    # What eager code does to it.

    @property
    def can_wait(self) -> bool:
        """Whether operations on it are to be recorded."""
        return self._recorded and not self.is_there and not self.traced

    def expression(self) -> Value | None:
        """The values in a record; None where they cannot be in one."""
        with LOCK:
            if self._value is None and self._recorded and self.frontier:
                self._value = self._trace()
                self._recorded = self._value is not None
            if self._value is None or is_spent(self._value.roots):
                return None
            return self._value

    def _trace(self) -> Value | None:
        tensors = [s.detached for s in self.frontier]
        if self.changed or any(type(t) is not torch.Tensor for t in tensors):
            return None
        with quiet():
            graph = value_graph(self.recipe, tensors)
        if graph is None:
            return None
        assert self.recipe.compile_record is not None
        root = Root(self.recipe.compile_record, self.recipe.source)
        leaves = [frontier_leaf(s, root, frozenset((root,))) for s in self.frontier]
        (value,) = replay(graph, leaves) or (None,)
        if value is None or value.meta.dtype != self.dtype:
            return None
        _watch(root)
        value.cell = weakref.ref(self)
        return value

    def rewrite(self, value: Value) -> None:
        """Stand for another value from now on, as after an in-place operation."""
        self._value, self.rewritten = value, True
        if value.is_wide:
            value.cell = weakref.ref(self)


class RecordedCell(Cell):
    """What an operation on deferred tensors gives."""

    _is_sticky = False
    """Whether operations wait although the values are there."""

    def __init__(self, value: Value) -> None:
        super().__init__(NO_RECIPE, (), value.meta.dtype)
        self._recorded = True
        self.lineage = value.widest, value.roots
        self.rewrite(value)

    @property
    def value(self) -> Value | None:
        return self._value

    @property
    def can_wait(self) -> bool:
        return self._is_sticky or super().can_wait

    def _make(self) -> torch.Tensor:
        value = self._value
        assert value is not None
        (made,) = evaluate([value])
        # The record goes on with its own, whatever is written to this one.
        return made if value.is_wide else made.clone()

    def rewrite(self, value: Value) -> None:
        super().rewrite(value)
        self.made, self._is_sticky = None, False
        if not value.is_wide:
            hold(self)


def sticky_cell(tensor: torch.Tensor, widest: int, roots: frozenset[Root]) -> Cell | None:
    """A cell of values that are there, with which operations wait all the same: a gradient."""
    value = leaf(tensor, widest, roots)
    if value is None:
        return None
    cell = RecordedCell(value)
    cell.made, cell.place, cell._is_sticky = tensor, value.place, True
    return cell


class ViewCell(Cell):
    """A view of another cell's values."""

    def __init__(self, base: Cell, func: OpOverload, args: Any, kwargs: Any, index: int | None):
        super().__init__(NO_RECIPE, (), base.dtype)
        self._recorded = True
        self.base = base
        self.call = func, args, kwargs
        self.index = index  # where the operation gives several
        self._seen: Value | None = None  # the base's, when the view was recorded
        self.lineage: tuple[int, frozenset[Root]] | None = getattr(base, "lineage", None)

    @property
    def is_there(self) -> bool:
        return self.made is not None or self.base.is_there

    def _make(self) -> torch.Tensor:
        func, args, kwargs = self.call
        base = self.base.values()
        with torch.inference_mode(False), torch.no_grad():
            made = func(base, *args, **kwargs)
        return made if self.index is None else made[self.index]

    def expression(self) -> Value | None:
        with LOCK:
            base = self.base.expression()
            if base is None:
                return None
            if self._seen is not base or self._value is None:
                func, args, kwargs = self.call
                made = record(func, (base, *args), kwargs)
                if made is not None and self.index is not None:
                    made = pick(made, self.index)
                self._value, self._seen = made, base
            return self._value

    def rewrite(self, value: Value) -> None:
        base = self.base.expression()
        func, args, kwargs = self.call
        whole = None if base is None or self.index else undo_view(base, value, func, args, kwargs)
        if whole is None:
            raise NotImplementedError(f"a write through {func}")
        self.base.rewrite(whole)
        self._value, self._seen, self.rewritten = value, whole, True


_WAITING: weakref.WeakSet[Any] = weakref.WeakSet()
"""Cells whose values may still have to be made, and roots of records."""
_WAITING_LOCK = threading.Lock()


def _watch(waiting: Cell | Root) -> None:
    _watch_optimizers()
    with _WAITING_LOCK:
        _WAITING.add(waiting)


@functools.cache
def _watch_optimizers() -> None:
    before: Callable[..., Any] = torch.compiler.disable(_before_step)
    after: Callable[..., Any] = torch.compiler.disable(_note_step)
    register_optimizer_step_pre_hook(before)
    register_optimizer_step_post_hook(after)


def _stepped(optimizer: Optimizer) -> set[int]:
    params = (p for group in optimizer.param_groups for p in group["params"])
    return {id(p) for p in params if p.grad is not None}


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Compute the small results that somebody holds while the weights are still there, and the
    gradients that a custom function gave."""
    for param in (p for group in optimizer.param_groups for p in group["params"]):
        if (materialize := getattr(param.grad, "materialize", None)) is not None:
            with torch.no_grad():
                param.grad = materialize()
    cells = held_cells()
    stepped = _stepped(optimizer) if cells else set()
    for cell in cells:
        value = cell.value
        if value is not None and any(r.read_by(stepped) for r in value.roots):
            try:
                cell.values()
            except DeferredOutputError:  # it is too late, and nobody may ask
                log.debug("a result of a deferred output is lost", exc_info=True)


def _note_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Remember which frontiers an optimizer changed: a fused step leaves no other trace."""
    with _WAITING_LOCK:
        waiting = list(_WAITING)
    if waiting:
        stepped = _stepped(optimizer)
        for each in waiting:
            each.note_step(stepped)

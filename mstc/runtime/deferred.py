"""The tensor that stands for a deferred output, and makes it when somebody looks.

`passes.defer` takes large outputs that the caller probably drops out of the graph and leaves a
closure for each. `wrap_outputs` puts a `DeferredTensor` in the place of each. It has a shape, a
dtype, a device and its place in the autograd graph from the start, and computes its values from the
closure's frontier when an operation first needs them.

How it works
------------
- It is a wrapper subclass: a tensor with metadata and no memory. An operation that needs values
  arrives in `__torch_dispatch__`, below autograd, and finds them there. So views, in-place
  operations, hooks, saved tensors and custom autograd functions are PyTorch's own.
- Where the frontier requires grad, the tensor is the output of an autograd function with the
  frontier as input. Its backward computes the gradients from the frontier (traced once, so that of
  the closure only what they need is repeated); nothing of the output's size is saved.
- Operations of eager code that can wait are recorded (`mstc.runtime.record`), forward and backward,
  and give deferred tensors again. Small ones run in chunks when somebody needs their values.
- `detach()` and floating-point casts make another deferred tensor. A detached one shares the
  values, as everywhere in PyTorch; a cast makes its own.
- The closure runs once, under a lock, with the autocast state of the call that returned the tensor.
  Then the frontier is let go (the autograd graph keeps what a backward needs, until it is freed).
- What the closure reads must be as it was at the call. The version counter tells; the address and
  size of the memory, since some frameworks free or swap parameters behind the counter's back; and a
  hook on all optimizers, since a fused step does not count.
- `torch.compile` sees a traceable wrapper subclass. As long as nothing has looked at it, changed it
  or hooked onto it, its inner tensors are the frontier's (its *parts*), so that a graph compiled by
  this backend can compute it inside (`passes.open`); afterwards, the values.
- Methods that read memory without the dispatcher (`numpy`, `tolist`, pickling) go to the values.

Not handled: writes to what the closure reads through `.data`, NumPy or a kernel that PyTorch does
not know (autograd cannot see them either). PyTorch raises an error where C++ code asks for the
address, and for unbound calls like `torch.Tensor.numpy(t)`: pass `t.materialize()`. Where a loss
was computed in another compiled graph from the parts, the logits are not in its autograd graph:
hooks on `logits.grad_fn` do not run (those on the tensor do), `torch.autograd.grad(loss, logits)`
says that they were not used, and `loss.backward(inputs=[logits])` leaves no gradient.
`untyped_storage()` has the right size and no memory: `torch.compile` asks for it while tracing.
Tensors made in `torch.inference_mode` have no version: when the closure reads one that the caller
can write to, the output is computed at once. The gradient that `torch.autograd.grad` or a custom
function gives for deferred tensors may be a deferred tensor, too: read it before the next step.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._C._functorch import peek_interpreter_stack  # is a function being transformed?
from torch._ops import OpOverload
from torch._subclasses.functional_tensor import FunctionalTensor  # what AOTAutograd traces with
from torch.fx import GraphModule
from torch.utils._mode_utils import no_dispatch  # lets an op change a wrapper's own shape
from torch.utils._pytree import tree_flatten, tree_map_only  # for the arguments of any op

from mstc.errors import DeferredOutputError
from mstc.runtime.cell import Cell, RecordedCell, ViewCell, sticky_cell
from mstc.runtime.evaluation import evaluate
from mstc.runtime.frontier import Stamped, stamped
from mstc.runtime.gradient import gradient_graph
from mstc.runtime.recipe import Recipe, read_autocast
from mstc.runtime.record import (
    LOCK,
    NARROW_SHARE,
    Root,
    Value,
    decomposition,
    frontier_leaf,
    functional_of,
    is_plain,
    is_view,
    may_record,
    pick,
    quiet,
    record,
    replay,
)
from mstc.runtime.streams import Place, follow, place_of
from passes.defer import DeferredOutput
from passes.open import Opening

__all__ = ["DeferredTensor", "opening_of", "plain_example", "wrap_outputs"]

log = logging.getLogger(__name__)
aten = torch.ops.aten

Geometry = tuple[Sequence[Any], Sequence[Any], Any]
"""Shape, stride and storage offset: ints, or SymInts in a trace."""


def wrap_outputs(
    deferred: Sequence[DeferredOutput],
    outputs: Sequence[Any],
    args: Sequence[Any],
    *,
    num_outputs: int,
    compile_record: Callable[..., Any] | None = None,
) -> list[Any]:
    """The original outputs, with a `DeferredTensor` in the place of each that was deferred.

    Call it right after the compiled graph, under the same grad, inference and autocast modes.

    Args:
        deferred: from `passes.defer.DeferResult`.
        outputs: what the compiled `DeferResult.graph_module` returned.
        args: what it was called with.
        num_outputs: from `passes.defer.DeferResult`.
        compile_record: compiles what eager code does to the outputs (a graph module, its inputs);
            with None, they are made when eager code reads them.
    """
    gone = {index: spec for spec in deferred for index in spec.indices}
    num_kept = num_outputs - len(gone)
    made = {spec.indices: _make(spec, outputs, args, num_kept, compile_record) for spec in deferred}
    kept = iter(outputs)
    return [made[gone[i].indices] if i in gone else next(kept) for i in range(num_outputs)]


def opening_of(
    example: Any, sources: Callable[[str], object], results: Sequence[Any]
) -> Opening | None:
    """How a graph can compute an input that a deferred tensor is passed for.

    Args:
        example: what the graph was traced with.
        sources: gives Dynamo's source of an attribute of the input.
        results: what the trace returned.

    Returns:
        None where it cannot: not a deferred tensor, or one that the graph writes to or returns a
        view of.
    """
    if not (isinstance(example, DeferredTensor) and example.has_parts):
        return None
    if _was_written(example) or any(_is_alias(example, value) for value in results):
        return None
    recipe = example._cell.recipe
    assert isinstance(recipe.closure, GraphModule)
    names, _ = example.__tensor_flatten__()
    return Opening(
        closure=recipe.closure,
        casts=recipe.casts,
        autocast=recipe.autocast,
        parts=tuple(s.part for s in example._cell.frontier),
        sources=tuple(map(sources, names)),
    )


def _was_written(example: DeferredTensor) -> bool:
    """Whether Dynamo saw a write to a deferred tensor, or to a view of it, in its trace."""
    made = example._cell.made
    return example._version > 0 or (made is not None and made._version > 0)


def _is_alias(example: DeferredTensor, value: object) -> bool:
    """Whether a result of the trace shares memory with a deferred input, or with its values."""
    if isinstance(value, DeferredTensor):
        return value._cell is example._cell
    made = example._cell.made
    if made is None or not isinstance(value, torch.Tensor):
        return False
    return value.untyped_storage()._cdata == made.untyped_storage()._cdata


def plain_example(example: DeferredTensor) -> torch.Tensor:
    """A fake tensor like `example`, but no deferred one: what `materialize` will give."""
    with torch.enable_grad():
        values = torch.empty_strided(
            example.shape, example.stride(), dtype=example.dtype, device=example.device
        )
        return aten.alias.default(values.requires_grad_()) if example.requires_grad else values


def _make(
    spec: DeferredOutput,
    outputs: Sequence[Any],
    args: Sequence[Any],
    num_kept: int,
    compile_record: Callable[..., Any] | None,
) -> torch.Tensor:
    numbers: list[Any] = []
    frontier: list[Stamped] = []
    places: dict[torch.device, Place | None] = {}
    must_compute = False
    for source in spec.frontier:
        value = (args if source.kind == "input" else outputs)[source.index]
        is_tensor = isinstance(value, torch.Tensor)
        numbers.append(None if is_tensor else value)
        if is_tensor:
            if value.device not in places:
                places[value.device] = place_of(value)
            frontier.append(stamped(value, source.name, places[value.device]))
            is_ours = source.kind == "output" and source.index >= num_kept
            must_compute |= value.is_inference() and not is_ours
    autocast = read_autocast(spec.device.type)
    recipe = Recipe(spec.closure, tuple(numbers), autocast, (), spec.source, compile_record)
    geometry = spec.geometry(args)
    tensors = [stamped.tensor for stamped in frontier]
    if must_compute:
        return recipe.run(tensors)
    cell = Cell(recipe, frontier, spec.dtype)
    if spec.requires_grad and any(t.requires_grad for t in tensors):
        return _Attach.apply(cell, geometry, spec.dtype, spec.device, *tensors)
    return DeferredTensor(cell, geometry, spec.dtype, spec.device)


_MOST_PARTS = 8


def _is_written(values: torch.Tensor | None) -> bool:
    """Whether AOTAutograd saw a write to values that were made in its trace."""
    if not isinstance(values, FunctionalTensor):
        return False
    return torch._functionalize_has_data_mutation(values.elem)  # type: ignore[attr-defined]


def _part_name(index: int) -> str:
    return f"_part{index}"


@dataclass(frozen=True, eq=False)
class _Context:
    """What a traced deferred tensor is, beside its parts; graphs are compiled for one."""

    recipe: Recipe
    dtype: torch.dtype
    device: torch.device
    storage_offset: Any
    wanted: tuple[bool, ...]  # which parts get a gradient

    def _key(self) -> tuple[Any, ...]:
        recipe = self.recipe
        text = str(getattr(recipe.closure, "code", id(recipe.closure)))
        return (text, recipe.autocast, recipe.casts, self.dtype, self.device, self.wanted)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Context) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __deepcopy__(self, memo: dict[int, Any]) -> _Context:
        return self  # nothing in it changes


class DeferredTensor(torch.Tensor):
    """A tensor whose values are computed when something first needs them.

    It behaves as the tensor that it stands for; `materialize` gives that tensor. Any use may raise
    `DeferredOutputError`, when what it is computed from has changed in place in the meantime.
    """

    _cell: Cell

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls: type[DeferredTensor],
        cell: Cell,
        geometry: Geometry,
        dtype: torch.dtype,
        device: torch.device,
    ) -> DeferredTensor:
        shape, stride, offset = geometry
        self = torch.Tensor._make_wrapper_subclass(
            cls, shape, strides=stride, storage_offset=offset, dtype=dtype, device=device
        )
        self._cell = cell
        return self

    @property
    def is_materialized(self) -> bool:
        """Whether the values have been computed."""
        return self._cell.is_there

    def materialize(self) -> torch.Tensor:
        """This tensor as a `torch.Tensor` that shares its values and its place in autograd."""
        return aten.alias.default(self)

    @classmethod
    def __torch_dispatch__(
        cls,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, DeferredTensor):
            if func is aten.detach.default:
                return first._with_cell(first._cell)
            if func is aten.record_stream.default and not first.is_materialized:
                return None  # there is no memory yet, and whoever makes it is told (`streams`)
            if func is aten._to_copy.default and first._can_cast(**kwargs):
                return first._with_cell(first._cell.cast(kwargs["dtype"]))
            if torch.Tag.inplace_view in getattr(func, "tags", ()):
                return first._change_shape(func, args, kwargs)
        recorded = _record_call(func, args, kwargs)
        if recorded is not NotImplemented:
            return recorded
        opened: dict[int, DeferredTensor] = {}

        def open_one(tensor: DeferredTensor) -> torch.Tensor:
            values = tensor._made
            _keep_gradients_lazy(tensor)
            opened.setdefault(id(values), tensor)
            return values

        plain_args, plain_kwargs = tree_map_only(DeferredTensor, open_one, (args, kwargs))
        result = func(*plain_args, **plain_kwargs)
        if isinstance(func, OpOverload) and func._schema.is_mutable:
            for argument, given in zip(func._schema.arguments, args):
                # Autograd does not count writes to the tensors of a list: they count themselves.
                if isinstance(given, list | tuple) and argument.alias_info is not None:
                    written = [t for t in given if isinstance(t, DeferredTensor)]
                    torch.autograd.graph.increment_version(written)
        # An in-place operation returns the tensor that it was given.
        return tree_map_only(torch.Tensor, lambda t: opened.get(id(t), t), result)

    @property
    def _made(self) -> torch.Tensor:
        return self._cell.values()

    def _with_cell(self, cell: Cell) -> DeferredTensor:
        geometry = self.shape, self.stride(), self.storage_offset()
        return DeferredTensor(cell, geometry, cell.dtype, self.device)

    def _can_cast(self, dtype: torch.dtype | None = None, **others: Any) -> bool:
        """Whether a copy with these arguments can wait: if only the dtype changes."""
        others.pop("non_blocking", None)
        same = (None, self.device, self.layout, torch.preserve_format)
        return (
            not self.is_materialized
            and bool(self._cell.frontier)
            and not self._cell.rewritten
            and self.is_contiguous()
            and dtype is not None
            and dtype.is_floating_point
            and all(other in same for other in others.values())
        )

    def _change_shape(self, func: Any, args: Any, kwargs: Any) -> DeferredTensor:
        """An operation like `unsqueeze_`: aliases keep their shape, so this gets its own cell."""
        values = self._made.detach()
        func(values, *args[1:], **kwargs)
        self._cell = Cell.of(values)
        with no_dispatch():  # and now the wrapper itself, which has no memory
            before = torch._C._meta_in_tls_dispatch_include()
            torch._C._set_meta_in_tls_dispatch_include(True)
            try:
                func(self, *args[1:], **kwargs)
            finally:
                torch._C._set_meta_in_tls_dispatch_include(before)
        return self

    # What torch.compile needs of a wrapper subclass.

    @property
    def has_parts(self) -> bool:
        """Whether it may be computed elsewhere, from `parts`: if nobody has looked at the values,
        written to them, or asked for their gradient."""
        cell = self._cell
        if cell.traced:
            return True
        return (
            cell.made is None
            and not cell.rewritten
            and 0 < len(cell.frontier) <= _MOST_PARTS
            and all(number is None for number in cell.recipe.numbers)
            and cell.recipe.is_traceable
            and (self.is_inference() or self._version == 0)
            and not self._backward_hooks
            and not self.retains_grad
            and (not self.requires_grad or getattr(self.grad_fn, "recipe", None) is cell.recipe)
        )

    def parts(self) -> list[torch.Tensor]:
        """The tensors that the values are computed from, with their place in autograd.

        Raises:
            DeferredOutputError: they have changed in the meantime.
        """
        self._cell.check()
        for s in self._cell.frontier:
            follow(s.place, s.tensor)
        return [s.part if self.requires_grad else s.detached for s in self._cell.frontier]

    def pass_on(self) -> list[torch.Tensor]:
        """The parts, for a graph that computes the values inside.

        Raises:
            DeferredOutputError: as `parts`.
        """
        tensors = self.parts()
        self._cell.passed_on |= self.requires_grad and torch.is_grad_enabled()
        return tensors

    def register_hook(self, hook: Callable[[torch.Tensor], object]) -> Any:
        self._check_not_passed_on("register_hook")
        return super().register_hook(lambda grad: hook(_plain_gradient(grad)))

    def retain_grad(self) -> None:
        self._check_not_passed_on("retain_grad")
        if not self.retains_grad and not self.is_leaf:
            super().register_hook(_plain_gradient)
        super().retain_grad()

    def _check_not_passed_on(self, what: str) -> None:
        if self._cell.passed_on and self.requires_grad:
            raise DeferredOutputError(
                f"{what}: the output made at {self._cell.recipe.source} was computed inside the"
                " compiled function that it was passed to, so no gradient comes by here. Call"
                f" {what} before that function, or compile with options={{'defer_outputs': False}}."
            )

    def __tensor_flatten__(self) -> tuple[list[str], _Context | None]:
        if not self.has_parts:
            return ["_made"], None
        cell = self._cell
        if cell.traced and _is_written(cell.made):
            raise DeferredOutputError(
                f"The output made at {cell.recipe.source} was deferred, and a function that another"
                " backend compiles changes it in place. Pass it a copy (logits.clone()), or compile"
                " the model with options={'defer_outputs': False}."
            )
        wanted = tuple(s.part.requires_grad and self.requires_grad for s in cell.frontier)
        names = [_part_name(i) for i in range(len(cell.frontier))]
        return names, _Context(cell.recipe, cell.dtype, self.device, self.storage_offset(), wanted)

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, torch.Tensor], context: _Context | None, size: Any, stride: Any
    ) -> DeferredTensor:
        if context is not None:
            parts = [inner[_part_name(i)] for i in range(len(inner))]
            frontier = [Stamped(part, "", (), part, part) for part in parts]
            cell = Cell(context.recipe, frontier, context.dtype)
            cell.traced = True
            geometry = size, stride, context.storage_offset
            return DeferredTensor(cell, geometry, context.dtype, context.device)
        values = inner["_made"]
        geometry = size, stride, values.storage_offset()
        return DeferredTensor(Cell.of(values), geometry, values.dtype, values.device)

    # What reads or replaces memory without the dispatcher.

    def _plain(self) -> torch.Tensor:
        """`materialize`, but a leaf stays a leaf."""
        if not self.is_leaf:
            return self.materialize()
        plain = self._made.detach().requires_grad_(self.requires_grad)
        plain.grad = self.grad
        return plain

    @property
    def data(self) -> torch.Tensor:  # type: ignore[override]
        return torch.Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, new: torch.Tensor) -> None:
        new = new._made if isinstance(new, DeferredTensor) else new
        geometry = new.shape, new.stride(), new.storage_offset()
        like_new = DeferredTensor(Cell.of(new.detach()), geometry, new.dtype, new.device)
        torch.Tensor.data.__set__(self, like_new)  # type: ignore[attr-defined]
        self._cell = like_new._cell

    def __repr__(self, *, tensor_contents: str | None = None) -> str:
        return self._plain().__repr__(tensor_contents=tensor_contents)

    def __format__(self, format_spec: str) -> str:
        return self.item().__format__(format_spec) if self.dim() == 0 else repr(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return memo.setdefault(id(self), self._plain().__deepcopy__(memo))


def _on_values(name: str) -> Callable[..., Any]:
    def method(self: DeferredTensor, *args: Any, **kwargs: Any) -> Any:
        return getattr(self._plain(), name)(*args, **kwargs)

    method.__name__ = name
    return method


def _part(index: int) -> property:
    # guards on sizes read it, and Dynamo would compile that reading as a frame of the user's
    return property(torch.compiler.disable(lambda self: self.parts()[index]))


for _index in range(_MOST_PARTS):
    setattr(DeferredTensor, _part_name(_index), _part(_index))

for _name in (
    *("numpy", "tolist", "data_ptr", "share_memory_", "is_shared", "apply_", "map_", "map2_"),
    *("__reduce_ex__", "__dlpack__"),
):
    setattr(DeferredTensor, _name, _on_values(_name))


# --- what eager code does to it -------------------------------------------------------------------


def _record_call(func: Any, args: Any, kwargs: Any) -> Any:
    """Write an operation down instead of doing it; NotImplemented where it cannot wait."""
    if not isinstance(func, OpOverload):
        return NotImplemented
    flat = tree_flatten((args, kwargs))[0]
    tensors = [t for t in flat if isinstance(t, torch.Tensor)]
    deferred = [t for t in tensors if isinstance(t, DeferredTensor)]
    if not any(t._cell.can_wait for t in deferred) or _is_traced(tensors):
        return NotImplemented
    if torch.is_grad_enabled() and any(
        t.requires_grad and not isinstance(t, DeferredTensor) for t in tensors
    ):
        return NotImplemented  # its gradient would be a deferred tensor
    if (parts := decomposition(func)) is not None:
        return parts(*args, **kwargs)
    functional = functional_of(func) if func._schema.is_mutable else func
    if functional is None or not may_record(functional, args, kwargs):
        return NotImplemented
    with LOCK:
        values = {id(t): _value_of(t) for t in deferred}
        if any(v is None for v in values.values()):
            return NotImplemented
        if func is aten.as_strided.default and not _starts_memory(args[0], values[id(args[0])]):
            return NotImplemented
        own = tree_map_only(DeferredTensor, lambda t: values[id(t)], (args, kwargs))
        value = record(functional, *own)
        if value is None:
            return NotImplemented
        if functional is not func:
            return _rewrite(args[0], value)
        return _wrap(value, func, args, kwargs)


def _starts_memory(tensor: DeferredTensor, value: Any) -> bool:
    """Whether a recorded tensor lies in memory as its value does: ``as_strided`` reads memory."""
    if not isinstance(value, Value) or tensor.storage_offset() != 0:
        return False
    return value.meta.storage_offset() == 0 and value.meta.stride() == tensor.stride()


def _value_of(tensor: DeferredTensor) -> Value | torch.Tensor | None:
    cell = tensor._cell
    if cell.can_wait:
        return cell.expression()
    if cell.made is not None:
        follow(cell.place, cell.made)
    return cell.made


def _is_traced(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether somebody traces, or transforms a function, or has tensors of an own kind."""
    return (
        torch.compiler.is_compiling()
        or peek_interpreter_stack() is not None
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
        or not all(type(t) is DeferredTensor or is_plain(t) for t in tensors)
    )


def _wrap(value: Value, func: OpOverload, args: Any, kwargs: Any) -> Any:
    """What the operation returns."""
    several = isinstance(value.meta, list | tuple)
    base = args[0]._cell if is_view(func) else None

    def one(meta: torch.Tensor, index: int | None) -> DeferredTensor:
        if base is not None:
            cell: Cell = ViewCell(base, func, args[1:], kwargs, index)
        else:
            cell = RecordedCell(value if index is None else pick(value, index))
        geometry = meta.shape, meta.stride(), meta.storage_offset()
        return DeferredTensor(cell, geometry, meta.dtype, meta.device)

    if not several:
        return one(value.meta, None)
    return type(value.meta)(one(m, i) for i, m in enumerate(value.meta))


def _rewrite(tensor: Any, value: Value) -> Any:
    """Let a tensor stand for what an in-place operation has made of it."""
    if not isinstance(tensor, DeferredTensor) or not tensor._cell.can_wait:
        return NotImplemented
    if value.meta.shape != tensor.shape:
        return NotImplemented
    if value.meta.stride() != tensor.stride() and not isinstance(tensor._cell, ViewCell):
        return NotImplemented  # a view has the strides of what is behind it
    if value.meta.dtype != tensor.dtype:
        if not torch.can_cast(value.meta.dtype, tensor.dtype):
            return NotImplemented
        cast = record(aten._to_copy.default, (value,), {"dtype": tensor.dtype})
        if cast is None:
            return NotImplemented
        value = cast
    try:
        tensor._cell.rewrite(value)
    except NotImplementedError:
        return NotImplemented
    return tensor


def _keep_gradients_lazy(tensor: DeferredTensor) -> None:
    """Values of a small result go to ordinary operations, whose gradients are ordinary tensors: let
    them be recorded as well when they come back, since a `gather` makes a wide one of a narrow."""
    cell = tensor._cell
    if not isinstance(cell, RecordedCell | ViewCell) or cell.lineage is None:
        return
    if not (torch.is_grad_enabled() and tensor.requires_grad):
        return
    node: Any = tensor.grad_fn
    if node is None or "mst" in node.metadata:
        return
    node.metadata["mst"] = True
    node.register_prehook(functools.partial(_deferred_gradients, *cell.lineage))


def _deferred_gradients(
    widest: int, roots: frozenset[Root], grads: tuple[torch.Tensor | None, ...]
) -> tuple[torch.Tensor | None, ...]:
    """Gradients with which operations wait, where they are small."""

    def one(grad: torch.Tensor | None) -> torch.Tensor | None:
        if grad is None or not is_plain(grad) or torch.is_grad_enabled():
            return grad
        if grad.numel() * grad.element_size() * NARROW_SHARE > widest:
            return grad
        cell = sticky_cell(grad, widest, roots)
        geometry = grad.shape, grad.stride(), grad.storage_offset()
        return None if cell is None else DeferredTensor(cell, geometry, grad.dtype, grad.device)

    return tuple(map(one, grads))


def _plain_gradient(grad: Any) -> Any:
    """A gradient for the user's eyes, and for his `.grad`."""
    return grad.materialize() if isinstance(grad, DeferredTensor) else grad


def _small_gradients(
    recipe: Recipe, tensors: Sequence[torch.Tensor], wanted: Sequence[bool], grad: torch.Tensor
) -> list[torch.Tensor | None] | None:
    """The gradients of a closure's frontier, from a recorded gradient of its output; None where
    that is not recorded."""
    if not isinstance(grad, DeferredTensor) or torch.is_grad_enabled():
        return None
    value = grad._cell.expression() if grad._cell.can_wait else None
    plain = [t.detach() for t in tensors]
    if value is None or not all(is_plain(t) for t in plain):
        return None
    with LOCK:
        with quiet():
            graph = gradient_graph(recipe, plain, wanted, value.meta)
        if graph is None:
            return None
        place = place_of(plain)
        leaves = [frontier_leaf(stamped(t, "", place), None, value.roots) for t in plain]
        found = replay(graph, [value, *leaves])
    if found is None:
        return None
    made = iter(evaluate([v for v in found if v is not None], backward=True))
    given = iter(None if v is None else next(made) for v in found)
    return [next(given) if w else None for w in wanted]


class _Attach(torch.autograd.Function):
    """Makes a deferred tensor a differentiable function of its frontier."""

    @staticmethod
    def forward(
        ctx: Any,
        cell: Cell,
        geometry: Geometry,
        dtype: torch.dtype,
        device: torch.device,
        *tensors: torch.Tensor,
    ) -> torch.Tensor:
        ctx.recipe = cell.recipe
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        return DeferredTensor(cell, geometry, dtype, device)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        (grad,) = grads
        wanted = ctx.needs_input_grad[4:]
        if grad is None or not any(wanted):
            return (None,) * len(ctx.needs_input_grad)
        tensors = list(ctx.saved_tensors)
        made = _small_gradients(ctx.recipe, tensors, wanted, grad)
        if made is not None:
            return (None,) * 4 + tuple(made)
        grad = _plain_gradient(grad)
        create_graph = torch.is_grad_enabled()  # of a gradient that will be differentiated itself
        traced = None if create_graph else gradient_graph(ctx.recipe, tensors, wanted, grad)
        if traced is not None:
            made = iter(traced(grad, *tensors))
            return (None,) * 4 + tuple(next(made) if w else None for w in wanted)
        with torch.enable_grad():
            if create_graph:  # aliases: what one tensor owes to another must not count twice
                tensors = [t.view_as(t) for t in tensors]
            else:
                tensors = [t.detach().requires_grad_(w) for t, w in zip(tensors, wanted)]
            output = ctx.recipe.run(tensors)
        inputs = [t for t, w in zip(tensors, wanted, strict=True) if w]
        made = iter(
            torch.autograd.grad(output, inputs, grad, create_graph=create_graph, allow_unused=True)
        )
        return (None,) * 4 + tuple(next(made) if w else None for w in wanted)

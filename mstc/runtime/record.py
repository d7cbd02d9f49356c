"""What eager code does to a deferred output, written down instead of done.

A loss in eager code reads the logits through a few operations: a cast, a shift, a `log_softmax`, a
`gather`. Done one by one, each makes a tensor as large as the logits. Written down, they are a
small graph, which runs through the same passes as a compiled one (`mstc.runtime.evaluation`) when
somebody needs a small result of it.

Terms
-----
value    a node of the graph: an operation on other values, or a leaf. It never changes: an in-place
         operation makes another value, which the tensor stands for from then on.
leaf     a real tensor. Small ones (labels, masks) are copied, since eager code may write to them
         before the graph runs; for large ones the version counter is kept and checked.
root     a deferred output that values are recorded from.
wide     of a size comparable to that of the largest value on the way; only wide values are worth
         being lazy. The others are *narrow*.

What may be recorded: operations of the tables below, and whatever PyTorch tags as pointwise, on
plain strided tensors of one device; nothing random, nothing whose shape depends on data. A write in
place is recorded where it is the same as another operation (``div_``), to the tensor itself or to a
view from which the whole can be told. Everything else is done at once, on values.
"""

from __future__ import annotations

import logging
import operator
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch._decomp import get_decompositions  # PyTorch's own definitions of ops by others
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_flatten, tree_map_only

from mstc.errors import DeferredOutputError
from mstc.runtime.frontier import Stamped, explain_change, stamp_of
from mstc.runtime.streams import Place, follow, place_of

__all__ = [
    "LOCK",
    "Root",
    "Value",
    "functional_of",
    "is_view",
    "leaf",
    "quiet",
    "record",
    "replay",
]

log = logging.getLogger(__name__)
aten = torch.ops.aten

NARROW_SHARE = 16
"""A value with at most one part in this many of the widest value's bytes is narrow."""

LOCK = threading.RLock()
"""Held while recording and while a record runs."""

_VIEWS = {
    *(aten.view, aten._reshape_alias, aten.t, aten.transpose, aten.permute, aten.slice),
    *(aten.select, aten.squeeze, aten.unsqueeze, aten.expand, aten.split, aten.split_with_sizes),
    *(aten.unbind, aten.diagonal, aten.as_strided),
}
_OTHERS = {
    *(aten._softmax, aten._log_softmax, aten._softmax_backward_data, aten.logsumexp),
    *(aten._log_softmax_backward_data, aten.nll_loss_backward, aten.nll_loss2d_backward),
    *(aten.gather, aten.scatter, aten.scatter_add, aten.index, aten.index_put, aten.index_select),
    *(aten.sum, aten.mean, aten.amax, aten.amin, aten.max, aten.min, aten.argmax, aten.argmin),
    *(aten.any, aten.all, aten.prod, aten.var, aten.var_mean, aten.std, aten.cumsum, aten.topk),
    *(aten.linalg_vector_norm, aten.count_nonzero, aten._unsafe_view, aten.clone, aten._to_copy),
    *(aten.fill, aten.masked_fill, aten.where, aten.cat, aten.stack),
    *(aten.slice_backward, aten.select_backward, aten.slice_scatter, aten.select_scatter),
    *(aten.constant_pad_nd, aten.mm, aten.addmm, aten.bmm, aten.mv, aten.dot, aten.isnan),
    *(aten.mse_loss, aten.mse_loss_backward, aten.smooth_l1_loss, aten.smooth_l1_loss_backward),
    *(aten.huber_loss, aten.huber_loss_backward, aten.log_sigmoid_forward),
    *(aten.log_sigmoid_backward, aten._reshape_copy, aten.value_selecting_reduction_backward),
}
_CREATIONS = {
    *(aten.zeros_like, aten.ones_like, aten.full_like, aten.new_zeros, aten.new_ones),
    *(aten.new_full, aten.empty_like, aten.new_empty, aten.new_empty_strided),
}
_DECOMPOSED = get_decompositions([aten.nll_loss_forward, aten.nll_loss2d_forward])
"""Ops of several results, of which one does not depend on the logits (the number of labels)."""
_MASKS = (torch.bool, torch.uint8)
_PLAIN = (torch.Tensor, torch.nn.Parameter)


class Root:
    """One deferred output, and what all that is recorded from it has in common."""

    def __init__(self, compile_record: Callable[..., Any], source: str) -> None:
        self.compile_record = compile_record
        self.source = source  # "file:line  code" of the user who makes the output, or ""
        self.evaluations = 0  # how often the output was computed for a result, no backward counted
        self.changed: set[str] = set()  # names of the tensors that an optimizer stepped on
        self.leaves: weakref.WeakSet[Value] = weakref.WeakSet()  # parameters and hidden states

    def note_step(self, stepped: set[int]) -> None:
        """Remember what an optimizer has changed: tensors by their `id`."""
        self.changed |= {v.name for v in self.read_by(stepped)}

    def read_by(self, stepped: set[int]) -> list[Value]:
        """The leaves that an optimizer is to change."""
        return [v for v in list(self.leaves) if v.original and id(v.original()) in stepped]


class Value:
    """A node of a record."""

    __slots__ = (
        *("__weakref__", "args", "cell", "fixed", "func", "kwargs", "meta", "name", "original"),
        *("place", "roots", "stamps", "tensor", "widest"),
    )

    def __init__(self, meta: Any, widest: int, roots: frozenset[Root]) -> None:
        self.meta = meta  # a fake tensor, or several
        self.widest = widest  # bytes of the widest value on the way, its own counted
        self.roots = roots
        self.func: Any = None  # None for leaves
        self.args: Any = ()
        self.kwargs: dict[str, Any] = {}
        self.fixed = False  # whether it is part of a closure, or of its gradients
        self.tensor: Any = None  # a leaf's, or the result: nobody else may write to that
        self.place: Place | None = None  # where that was made
        self.cell: Any = None  # weak reference to the cell that stands for it, where it is wide
        # of leaves that are not copied
        self.stamps: tuple[Any, ...] = ()
        self.original: Any = None  # weak reference to the tensor that was given
        self.name = ""  # for people

    @property
    def nbytes(self) -> int:
        return nbytes(self.meta)

    @property
    def is_wide(self) -> bool:
        return self.nbytes * NARROW_SHARE > self.widest

    @property
    def inputs(self) -> list[Value]:
        return [v for v in tree_flatten((self.args, self.kwargs))[0] if isinstance(v, Value)]

    def read(self) -> Any:
        """The tensor, for the current stream."""
        follow(self.place, self.tensor)
        return self.tensor

    def settle(self, tensor: Any) -> None:
        """From now on it is a leaf."""
        self.tensor, self.place = tensor, place_of(tensor)
        self.func, self.args, self.kwargs = None, (), {}

    def check(self) -> None:
        """Raise `DeferredOutputError` if a leaf is no longer what it was."""
        if self.stamps:
            original = self.original and self.original()
            own = self.stamps[0] == stamp_of(self.tensor)
            stepped = any(self.name in r.changed for r in self.roots)
            if own and not stepped and (original is None or self.stamps[1] == stamp_of(original)):
                return
            source = next((r.source for r in self.roots), "")
            raise DeferredOutputError(explain_change(self.name, source))


def nbytes(meta: Any) -> int:
    metas = meta if isinstance(meta, list | tuple) else (meta,)
    return sum(m.numel() * m.element_size() for m in metas if isinstance(m, torch.Tensor))


# --- leaves ---------------------------------------------------------------------------------------

_FAKES = FakeTensorMode()


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether it is a strided tensor of no special kind."""
    return (
        type(tensor) in _PLAIN
        and tensor.layout is torch.strided
        and not tensor.is_quantized
        and not tensor.is_neg()
        and not tensor.is_conj()
        and tensor.device.type != "meta"
    )


def _fake(tensor: torch.Tensor) -> torch.Tensor:
    with quiet(), _FAKES:
        return torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
        )


def frontier_leaf(stamped: Stamped, root: Root | None, roots: frozenset[Root]) -> Value:
    """A leaf for a tensor that a closure starts from.

    Args:
        stamped: the tensor, as it was at the call.
        root: to tell when an optimizer changes it; None for one that is read at once.
        roots: the deferred outputs that it belongs to.
    """
    made = Value(_fake(stamped.tensor), 0, roots)
    made.tensor, made.place, made.name = stamped.detached, stamped.place, stamped.name
    made.stamps = (stamp_of(stamped.detached), stamped.stamp)
    if root is not None:
        made.original = weakref.ref(stamped.tensor)
        root.leaves.add(made)
    return made


def leaf(tensor: torch.Tensor, widest: int, roots: frozenset[Root]) -> Value | None:
    """A leaf for a tensor as it is now; None where nobody could tell when it changes."""
    size = tensor.numel() * tensor.element_size()
    if size * NARROW_SHARE <= widest:
        return _copied(tensor, widest, roots)
    if tensor.is_inference():
        return None
    made = Value(_fake(tensor), max(widest, size), roots)
    made.settle(tensor)
    made.name = "a tensor that the loss reads"
    made.stamps = (stamp_of(tensor), stamp_of(tensor))
    made.original = weakref.ref(tensor)
    for root in roots:
        root.leaves.add(made)
    return made


def _copied(tensor: torch.Tensor, widest: int, roots: frozenset[Root]) -> Value:
    """Not shared between operations: nothing tells whether it was written to in between, if that
    was done behind the version counter's back."""
    with quiet():
        copy = tensor.detach().clone()
    made = Value(_fake(copy), widest, roots)
    made.settle(copy)
    return made


class quiet:
    """No autograd, no inference mode, no autocast, no fake mode: as below the dispatcher."""

    def __enter__(self) -> None:
        self.stack = [
            unset_fake_temporarily(),
            torch.inference_mode(False),
            torch.no_grad(),
            torch._C._DisableAutocast(),
        ]
        for context in self.stack:
            context.__enter__()

    def __exit__(self, *error: Any) -> None:
        for context in reversed(self.stack):
            context.__exit__(*error)


# --- operations -----------------------------------------------------------------------------------


def is_view(func: OpOverload) -> bool:
    return func.overloadpacket in _VIEWS and func._overloadname != "dtype"


def decomposition(func: OpOverload) -> Callable[..., Any] | None:
    return _DECOMPOSED.get(func)


def may_record(func: OpOverload, args: Any, kwargs: Any) -> bool:
    """Whether an operation can wait, as far as its kind tells."""
    tags = func.tags
    if torch.Tag.nondeterministic_seeded in tags or func._schema.is_mutable:
        return False
    if func.namespace not in ("aten", "prims") or func is aten.alias.default:
        return False
    if is_view(func):
        return True
    if any(r.alias_info is not None for r in func._schema.returns):
        return False
    packet = func.overloadpacket
    if packet in (aten.index, aten.index_put):
        indices = [i for i in args[1] if i is not None]
        return all(_dtype(i) not in _MASKS for i in indices)
    return (
        packet in _OTHERS
        or packet in _CREATIONS
        or packet is aten.copy
        or torch.Tag.pointwise in tags
    )


def _dtype(value: Any) -> torch.dtype:
    return value.meta.dtype if isinstance(value, Value) else value.dtype


def functional_of(func: OpOverload) -> OpOverload | None:
    """The operation that computes what an in-place one writes to its first argument."""
    name = func._schema.name.split("::")[1]
    arguments = func._schema.arguments
    writes = [a.alias_info is not None and a.alias_info.is_write for a in arguments]
    if (
        not name.endswith("_")
        or func.namespace != "aten"
        or writes[:1] != [True]
        or any(writes[1:])
    ):
        return None
    packet = getattr(aten, name[:-1], None)
    return getattr(packet, func._overloadname or "default", None)


def record(func: Any, args: Any, kwargs: Any, *, fixed: bool = False) -> Value | None:
    """Write an operation down; None where it cannot wait.

    Args:
        func: an operation that returns a tensor, or several.
        args, kwargs: of it; values, plain tensors and constants.
        fixed: whether it is part of a closure, or of a closure's gradients.
    """
    if func in (aten.as_strided.default, aten.copy.default):
        rewrite = _strided if func is aten.as_strided.default else _copy
        return rewrite(*args) if not kwargs else None
    if (shorter := _without_slices(func, args)) is not None:
        return shorter
    with LOCK:
        flat = tree_flatten((args, kwargs))[0]
        values = [v for v in flat if isinstance(v, Value)]
        widest = max((v.widest for v in values), default=0)
        roots = frozenset(r for v in values for r in v.roots)
        leaves: dict[int, Value] = {}
        for tensor in flat:
            if isinstance(tensor, torch.Tensor):
                made = leaf(tensor, widest, roots)
                if made is None:
                    return None
                leaves[id(tensor)] = made
        args, kwargs = tree_map_only(torch.Tensor, lambda t: leaves[id(t)], (args, kwargs))
        try:
            meta = _infer(func, args, kwargs)
        except Exception:  # a user's mistake, say: the operation itself will tell
            log.debug("%s cannot be recorded", func, exc_info=True)
            return None
        if not _is_plain_result(meta, [v.meta for v in (*values, *leaves.values())]):
            return None
        made = Value(meta, max(widest, nbytes(meta) if fixed else 0), roots)
        made.func, made.args, made.kwargs, made.fixed = func, args, kwargs, fixed
        if func.overloadpacket in _CREATIONS:
            if not meta.is_contiguous():
                return None
            # It reads no values, so it must not wait for any.
            made.func, made.args = aten.full.default, (list(meta.shape), _fill_of(func, args))
            made.kwargs = {"dtype": meta.dtype, "device": meta.device}
        return made


def _fill_of(func: Any, args: Any) -> Any:
    packet = func.overloadpacket
    if packet in (aten.full_like, aten.new_full):
        return args[-1]
    return 1 if packet in (aten.ones_like, aten.new_ones) else 0


def _infer(func: Any, args: Any, kwargs: Any) -> Any:
    fake_args, fake_kwargs = tree_map_only(Value, lambda v: v.meta, (args, kwargs))
    with quiet(), _FAKES:
        return func(*fake_args, **fake_kwargs)


def _is_plain_result(meta: Any, inputs: Sequence[Any]) -> bool:
    """Whether there are only tensors, all where the others are."""
    outputs = meta if isinstance(meta, list | tuple) else (meta,)
    if not all(isinstance(m, torch.Tensor) for m in outputs):
        return False
    flat = (m for i in inputs for m in (i if isinstance(i, list | tuple) else (i,)))
    devices = {m.device for m in (*flat, *outputs) if m.dim()}
    return len(devices) <= 1 and len({m.device for m in outputs}) <= 1


def pick(value: Value, index: int) -> Value:
    """One of several results."""
    made = Value(value.meta[index], value.widest, value.roots)
    made.func, made.args, made.fixed = operator.getitem, (value, index), value.fixed
    return made


_CUTS = {aten.slice.Tensor: 1, aten.slice_scatter.default: 2, aten.slice_backward.default: 2}
"""Operations on a range of a dim, and which argument says it first."""


def _cut(func: Any, args: Any, size: Sequence[int]) -> tuple[int, int, int, int] | None:
    """Dim, start, end and step that such an operation speaks of."""
    given = args[_CUTS[func] :]
    dim, start, end, step = (*given, *(0, None, None, 1)[len(given) :])
    if not isinstance(dim, int):
        return None
    dim %= len(size)
    return dim, *slice(start, end, step).indices(size[dim])


def _without_slices(func: Any, args: Any) -> Value | None:
    """The same value where one range is cut out, filled or padded with zeros and cut out again, as
    autograd does it for views that have been written to."""
    base = args[0] if func in _CUTS else None
    if not isinstance(base, Value) or base.func not in _CUTS or func not in _CUTS:
        return None
    size = base.meta.shape
    if func is aten.slice_backward.default or base.func is aten.slice.Tensor:
        return None
    if _cut(func, args, size) != _cut(base.func, base.args, size):
        return None
    if func is aten.slice.Tensor:  # of what has been filled, or padded
        found = base.args[1] if base.func is aten.slice_scatter.default else base.args[0]
        same = isinstance(found, Value) and found.meta.dtype == base.meta.dtype
        return found if same else None
    if base.func is aten.slice_backward.default and isinstance(args[1], Value):
        if args[1].meta.dtype != base.meta.dtype:
            return None
        return record(aten.slice_backward.default, (args[1], *base.args[1:]), {})
    return None


def _copy(base: Any, source: Any, *others: Any) -> Value | None:
    """What `base` is after ``copy_``: the source, where it needs no stretching."""
    same = isinstance(base, Value) and isinstance(source, Value)
    if not same or base.meta.shape != source.meta.shape:
        return None
    if base.meta.dtype == source.meta.dtype:
        return source
    return record(aten._to_copy.default, (source,), {"dtype": base.meta.dtype})


def _slices(meta: torch.Tensor, size: Any, stride: Any, offset: Any) -> Any:
    """A shape of contiguous memory, and the ranges of its dims, that ``as_strided`` reads; None
    where it reads something else."""
    if not meta.is_contiguous() or not size or 0 in size or stride[-1] != 1:
        return None
    shape: list[int] = []
    outer = meta.numel()
    for step in stride:
        if step < 1 or outer % step:
            return None
        shape.append(outer // step)
        outer = step
    ranges: list[tuple[int, int]] = []
    for step, length, whole in zip(stride, size, shape, strict=True):
        start, offset = divmod(offset, step)
        if start + length > whole:
            return None
        ranges.append((start, start + length))
    return shape, ranges


def _strided(base: Any, size: Any, stride: Any, offset: Any = None) -> Value | None:
    """``as_strided``, as slices: autograd uses it for views that have been written to."""
    steps = _steps(base, size, stride, offset)
    return steps[-1][0] if steps else None


def _steps(base: Any, size: Any, stride: Any, offset: Any = None) -> list[tuple[Value, Any]]:
    """The base in another shape, then a slice after the other, each with its dim and range."""
    found = _slices(base.meta, size, stride, offset or 0) if isinstance(base, Value) else None
    if found is None:
        return []
    value = record(aten.view.default, (base, found[0]), {})
    steps: list[tuple[Value, Any]] = []
    for dim, (start, end) in enumerate(found[1]):
        if value is None:
            return []
        steps.append((value, (dim, start, end)))
        if (start, end) != (0, value.meta.shape[dim]):
            value = record(aten.slice.Tensor, (value, dim, start, end), {})
    return [] if value is None else [*steps, (value, None)]


def undo_view(base: Value, value: Value, func: OpOverload, args: Any, kwargs: Any) -> Value | None:
    """What `base` is after ``func(base, *args)``, a view of it, has become `value`; None where no
    operation says so."""
    packet = func.overloadpacket
    if kwargs:
        return None
    if packet is aten.slice:
        return record(aten.slice_scatter.default, (base, value, *args), {})
    if packet is aten.select:
        return record(aten.select_scatter.default, (base, value, *args), {})
    if packet is aten.as_strided:
        whole: Value | None = value
        steps = _steps(base, *args)
        for step, (dim, start, end) in reversed(steps[:-1]):
            if whole is not None and (start, end) != (0, step.meta.shape[dim]):
                whole = record(aten.slice_scatter.default, (step, whole, dim, start, end), {})
        if whole is None or not steps:
            return None
        return record(aten.view.default, (whole, list(base.meta.shape)), {})
    if packet in (aten.t, aten.transpose):
        return record(func, (value, *args), {})
    if packet in (aten.view, aten.squeeze, aten.unsqueeze):
        return record(aten.view.default, (value, list(base.meta.shape)), {})
    return None


def replay(graph: GraphModule, inputs: Iterable[Value]) -> list[Value | None] | None:
    """The values that a traced graph of aten ops computes; None where they cannot be recorded."""
    known: dict[Node, Any] = {}
    given = iter(inputs)
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            known[node] = next(given)
        elif node.op == "output":
            results = torch.fx.map_arg(node.args[0], known.__getitem__)
            return list(results) if isinstance(results, list | tuple) else [results]
        elif node.op == "get_attr":
            known[node] = getattr(graph, str(node.target))
        else:
            args, kwargs = torch.fx.map_arg((node.args, dict(node.kwargs)), known.__getitem__)
            if isinstance(args[0], Value) and isinstance(args[0].meta, list | tuple):
                made = pick(args[0], args[1])
            else:
                made = record(node.target, args, kwargs, fixed=True)
            if made is None:
                return None
            known[node] = made
    return None

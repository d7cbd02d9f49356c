"""Run a record: small results of what eager code did to deferred outputs.

Steps, for the values that somebody needs (`evaluate`)
-----
1. Narrow values that depend on no wide one are computed at once, by themselves.
2. The rest is cut into *stages*. A value that has fewer elements than there are rows (a sum over
   tokens) and that wide values are made from in turn (the gradients of a sequence's log-likelihood)
   is only complete when all rows have been seen: it ends a stage. The next stage computes the wide
   values that it needs again. So one graph never needs a wide value twice, before and after a sum,
   which no loop could give it.
3. The wide values of a stage, and the narrow ones between wide ones or made from them directly,
   are a graph. It is compiled as any inference graph: its regions become loops. Graphs are kept by
   their text, so the next step compiles nothing.
4. What only narrow values need comes after it, by itself. So a number that is different in every
   step, as the number of labels, is in no graph.

All narrow values of the same outputs that somebody still holds are computed together.

A result that is wide itself is made operation by operation, as eager code would have; so is
everything while something else is being traced, where too many different graphs have come, and
where compiling fails.
"""

from __future__ import annotations

import logging
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._guards import TracingContext  # is something being compiled?
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import tree_map_only

from mstc import history
from mstc.errors import DeferredOutputError, FallbackWarning
from mstc.runtime.record import LOCK, Root, Value, is_view, quiet

__all__ = ["evaluate", "held_cells", "hold", "is_spent"]

log = logging.getLogger(__name__)

_MOST_GRAPHS = 64
"""Compiled records that are kept; the least used goes first."""
_MOST_OF_A_KIND = 12
"""Compiled records that differ in sizes and numbers only; beyond, they vary too much."""
_MOST_EVALUATIONS = 8
"""How often an output is computed for one result or another before it is made and kept."""

_HELD: weakref.WeakSet[Any] = weakref.WeakSet()
"""Cells of narrow values that are not there yet."""


def hold(cell: Any) -> None:
    """Compute a narrow value together with others, once one of them is needed."""
    with LOCK:
        _HELD.add(cell)


def held_cells() -> list[Any]:
    """Cells of narrow values that somebody holds and that are missing."""
    with LOCK:
        cells = list(_HELD)
    found = [c for c in cells if not c.is_there and c.value is not None]
    return [c for c in found if c.value.tensor is None and not c.value.is_wide]


def _held_values(roots: frozenset[Root]) -> list[Value]:
    """The same, of those that are made from these outputs alone."""
    return list(dict.fromkeys(c.value for c in held_cells() if c.value.roots <= roots))


def evaluate(targets: Sequence[Value], *, backward: bool = False) -> list[torch.Tensor]:
    """The tensors of some values; those of narrow ones are kept in them.

    Args:
        targets: values.
        backward: whether it is for gradients that leave the record.

    Raises:
        DeferredOutputError: a leaf has changed in the meantime.
    """
    with LOCK, quiet():
        roots = frozenset(r for v in targets for r in v.roots)
        results: dict[Value, Any] = {}
        needed = _ordered(targets)
        for value in needed:
            value.check()
        inputs = [v.tensor for v in needed if isinstance(v.tensor, torch.Tensor)]
        others = [v for v in _held_values(roots) if _is_whole(v)]
        whole = not backward and any(v.is_wide and v.tensor is None for v in targets)
        if whole or _is_tracing():
            _make_whole(targets, results)
        else:
            for root in roots:
                root.evaluations += not backward
            _run(targets, others, results)
        found = [results[v] if v in results else v.read() for v in targets]
        return _apart(found, inputs) if backward else found


def _apart(tensors: list[torch.Tensor], inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Each in memory of its own: they become somebody's ``.grad``, which is written to.

    Equal values are computed once, and one may be an input of the record."""
    taken = {_place(t) for t in inputs}
    for index, tensor in enumerate(tensors):
        if _place(tensor) in taken:
            tensors[index] = tensor.clone()
        taken.add(_place(tensors[index]))
    return tensors


def _place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _run(targets: Sequence[Value], others: list[Value], results: dict[Value, Any]) -> None:
    """In stages; or operation by operation, should something go wrong with that."""
    try:
        _run_stages(targets, others, results)
    except (DeferredOutputError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        log.debug("a record could not be run", exc_info=True)
        results.clear()
        _make_whole(targets, results)  # a mistake of the user's is an error here, too
        what = (
            f"a loss in eager code could not be run in chunks ({type(error).__name__}: {error}): "
            "its values were made as a whole, as without this backend. Please report this."
        )
        history.note(what)
        warnings.warn(what, FallbackWarning, stacklevel=2)


def _is_whole(value: Value) -> bool:
    """Whether all that a value is made from is still as it was."""
    try:
        for i in _ordered([value]):
            i.check()
    except DeferredOutputError:
        return False
    return True


def _is_tracing() -> bool:
    return TracingContext.try_get() is not None or torch.compiler.is_compiling()


def is_spent(roots: Iterable[Root]) -> bool:
    """Whether outputs have been computed so often that keeping their values is better."""
    return any(root.evaluations >= _MOST_EVALUATIONS for root in roots)


# --- order and stages -----------------------------------------------------------------------------


def _ordered(targets: Iterable[Value]) -> list[Value]:
    """What is needed for the targets, themselves included, each after its inputs."""
    done: dict[Value, None] = {}
    stack = [(v, False) for v in reversed(list(dict.fromkeys(targets)))]
    while stack:
        value, ready = stack.pop()
        if value in done:
            continue
        if ready:
            done[value] = None
        else:
            stack.append((value, True))
            stack.extend((i, False) for i in reversed(value.inputs) if i not in done)
    return list(done)


@dataclass
class _Stages:
    """Where every value of a record belongs."""

    order: list[Value]
    phase: dict[Value, int] = field(default_factory=dict)
    """-1: no wide value before it; 2n: in stage n; 2n + 1: in stage n, and a sum over its rows."""
    rows: dict[Value, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for value in self.order:
            if value.func is not None:
                self._place(value)

    def _place(self, value: Value) -> None:
        inputs = value.inputs
        phase = max((self.phase.get(i, -1) for i in inputs), default=-1)
        rows = min((self.rows[i] for i in inputs if i in self.rows), default=0)
        if value.is_wide:
            phase += phase % 2  # -1 -> 0 as well: Python's remainder of -1 by 2 is 1
            if own := _rows(value):
                self.rows[value] = own
        elif phase >= 0:
            count = _numel(value)
            viewed = isinstance(value.func, OpOverload) and is_view(value.func)
            if count < rows and not viewed:
                phase |= 1
            self.rows[value] = count if viewed else rows
        self.phase[value] = phase


def _rows(value: Value) -> int:
    meta = value.meta
    if not isinstance(meta, torch.Tensor):
        return 0
    return meta.numel() // max(1, meta.shape[-1] if meta.dim() else 1)


def _numel(value: Value) -> int:
    metas = value.meta if isinstance(value.meta, list | tuple) else (value.meta,)
    return max(m.numel() for m in metas)


def _run_stages(targets: Sequence[Value], others: list[Value], results: dict[Value, Any]) -> None:
    wanted = list(dict.fromkeys([*targets, *others]))
    while missing := [v for v in wanted if v.tensor is None and v not in results]:
        stages = _Stages(_ordered(missing))
        _run_narrow(v for v in stages.order if stages.phase.get(v) == -1 and not v.fixed)
        missing = [v for v in missing if v.tensor is None]
        if not missing:
            return
        stages = _Stages(_ordered(missing))
        first = [v for v in stages.order if stages.phase.get(v, 2) < 2]
        inside = _inside(first)
        outputs = _outputs(stages.order, first, inside, set(missing))
        assert outputs, "a stage makes something"
        for value, tensor in zip(outputs, _run_graph(outputs), strict=True):
            if value.is_wide:
                results[value] = tensor
            else:
                value.settle(tensor)
        _run_narrow(v for v in first if v not in inside)


def _run_narrow(values: Iterable[Value]) -> None:
    for value in values:
        if value.func is not None and not any(i.tensor is None for i in value.inputs):
            value.settle(_call(value, {}))


def _inside(values: list[Value]) -> set[Value]:
    """Those of a stage that are wide, made from wide ones directly, or needed for wide ones."""
    inside: set[Value] = set()
    for value in values:
        from_wide = any(i.is_wide or (i in inside and _is_several(i)) for i in value.inputs)
        if value.is_wide or value.fixed or from_wide:
            inside.add(value)
    needed: set[Value] = set()
    for value in reversed(values):
        if value in needed or value.is_wide:
            inside.add(value)
            needed |= {i for i in value.inputs if i.func is not None}
    return inside


def _is_several(value: Value) -> bool:
    return isinstance(value.meta, list | tuple)


def _outputs(
    order: list[Value], first: list[Value], inside: set[Value], wanted: set[Value]
) -> list[Value]:
    """What the graph of the first stage has to give to the rest."""
    members = set(first)
    needed = set(wanted)
    for value in order:
        if value not in inside:
            needed |= set(value.inputs)
    return [
        v
        for v in first
        if v in inside and v in needed and v in members and not _is_several(v)
        if v in wanted or not v.is_wide
    ]


# --- op by op -------------------------------------------------------------------------------------


def _call(value: Value, known: dict[Value, Any]) -> Any:
    args, kwargs = tree_map_only(
        Value, lambda v: known[v] if v in known else v.read(), (value.args, value.kwargs)
    )
    return value.func(*args, **kwargs)


def _make_whole(targets: Sequence[Value], results: dict[Value, Any]) -> None:
    """Compute values one operation after the other, as eager code does.

    A wide value that somebody holds is kept for him; the others live as long as they are read.
    """
    order = _ordered(v for v in targets if v.tensor is None)
    readers: dict[Value, int] = {}
    for value in order:
        for i in value.inputs:
            readers[i] = readers.get(i, 0) + 1
    known: dict[Value, Any] = {}
    for value in order:
        if value.tensor is not None:
            continue
        cell = value.cell and value.cell()
        known[value] = cell.kept(value) if cell else None
        if known[value] is None:
            known[value] = _call(value, known)
            if cell:
                cell.keep(value, known[value])
        for i in value.inputs:
            readers[i] -= 1
            if not readers[i] and i not in targets:
                known.pop(i, None)
    for value in targets:
        if value.tensor is None:
            results[value] = known[value]


# --- as a graph -----------------------------------------------------------------------------------


@dataclass
class _Written:
    """A record as a graph, and as text."""

    graph: GraphModule
    inputs: list[torch.Tensor]
    key: str  # equal graphs, equal text
    kind: str  # the text without sizes and numbers


def _write(outputs: Sequence[Value]) -> _Written:
    graph = Graph()
    nodes: dict[Value, Node] = {}
    inputs: dict[tuple[Any, ...], Node] = {}
    tensors: list[torch.Tensor] = []
    lines: list[str] = []
    kinds: list[str] = []
    for value in _ordered(outputs):
        if value.tensor is not None:
            layout = _layout(value.tensor)
            place = (value.tensor.data_ptr(), value.tensor.storage_offset(), *layout)
            if place not in inputs:
                inputs[place] = graph.placeholder(f"leaf{len(tensors)}")
                tensors.append(value.read())
                lines.append(f"{inputs[place]}: {layout}")
                kinds.append(f"{layout[2:]}")
            nodes[value] = inputs[place]
            continue
        args, kwargs = tree_map_only(Value, nodes.__getitem__, (value.args, value.kwargs))
        nodes[value] = graph.call_function(value.func, tuple(args), kwargs)
        lines.append(f"{nodes[value]} = {value.func}{args}{kwargs}")
        kinds.append(f"{value.func}")
    for value in outputs:
        if _is_spread(value):
            nodes[value] = graph.call_function(
                torch.ops.aten.clone.default,
                (nodes[value],),
                {"memory_format": torch.contiguous_format},
            )
    graph.output(tuple(nodes[v] for v in outputs))
    lines.append(f"return {[nodes[v] for v in outputs]}")
    module = GraphModule(torch.nn.Module(), graph)
    return _Written(module, tensors, "\n".join(lines), "\n".join(kinds))


def _is_spread(value: Value) -> bool:
    """Whether it is a view of something larger, in whose memory it would stay."""
    meta = value.meta
    last = sum((n - 1) * s for n, s in zip(meta.shape, meta.stride(), strict=True))
    return not value.fixed and meta.numel() > 0 and last >= meta.numel()


def _layout(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device


_GRAPHS: OrderedDict[tuple[Any, str], tuple[str, Callable[..., Any]]] = OrderedDict()


def _run_graph(outputs: list[Value]) -> list[torch.Tensor]:
    written = _write(outputs)
    root = min((r for v in outputs for r in v.roots), key=id)
    compiled = _compiled(written, root.compile_record)
    return [_with_layout(t, v) for t, v in zip(compiled(*written.inputs), outputs, strict=True)]


def _compiled(written: _Written, compile_record: Any) -> Callable[..., Any]:
    key = compile_record.key, written.key
    found = _GRAPHS.get(key)
    if found is None:
        same = sum(kind == written.kind for kind, _ in _GRAPHS.values())
        if same >= _MOST_OF_A_KIND:
            history.note(
                f"a loss in eager code has come in more than {_MOST_OF_A_KIND} sizes: for further "
                "ones its values are made as a whole. Pad batches to few lengths, or compile the "
                "loss function"
            )
            return written.graph
        found = written.kind, compile_record(written.graph, written.inputs)
        _GRAPHS[key] = found
        if len(_GRAPHS) > _MOST_GRAPHS:
            _GRAPHS.popitem(last=False)
    _GRAPHS.move_to_end(key)
    return found[1]


def _with_layout(tensor: torch.Tensor, value: Value) -> torch.Tensor:
    """A result in the layout that eager code would have given it."""
    meta = value.meta
    assert tensor.shape == meta.shape
    assert tensor.dtype == meta.dtype
    free = value.fixed or not isinstance(value.func, OpOverload) or is_view(value.func)
    if free or tensor.stride() == meta.stride():
        return tensor
    made = torch.empty_strided(meta.shape, meta.stride(), dtype=meta.dtype, device=meta.device)
    return made.copy_(tensor)

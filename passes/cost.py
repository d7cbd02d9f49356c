"""What a plan costs: the multiplications that it does twice, and the time that a step takes.

A recompute loop makes its forward values once more in the backward. Of these, products of matrices,
attention and convolutions cost time; what is fused into them does not. Gradients made in the
forward cost nothing more.

Time is predicted as a roofline would have it whose two sides add up: multiplications, and bytes
that are moved, in multiplications that the device does in the same time (`Machine`). A loop

1. multiplies again what it recomputes;
2. reads again, once per chunk, what every chunk needs whole (weights), and adds to sums (their
   gradients);
3. does not write to memory, nor reads from there, what stays near the cores between two ops of a
   chunk; of a chunk larger than that, a share.

The figures of a `Machine` are fitted to measured steps (docs/tradeoff.md, which has the error), so
there is none for a device that was not measured. Not counted: what a call of a loop's body takes,
which is what the planner's least chunk is for; that products of few rows are slower.

Source: Williams et al., "Roofline" (CACM 2009); `torch.utils.flop_counter`, whose table lacks
attention on a CPU and grouped products.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry

from passes import rules
from passes.axes import Axes
from passes.body import Body
from passes.modes import Bodies
from passes.records import Liveness, LoopPlan
from passes.rules.permuted import GROUPED
from passes.source import hint, nbytes, packet_of

aten = torch.ops.aten


Shape = tuple[int, ...]


def _attention(query: Shape, key: Shape, value: Shape) -> int:
    """Scores, and their product with the values."""
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _attention_backward(grad: Shape, query: Shape, key: Shape, value: Shape) -> int:
    """Scores again, and two products for each product of the forward."""
    return 2 * math.prod(query[:-1]) * key[-2] * (3 * query[-1] + 2 * value[-1])


def _grouped(a: Shape, b: Shape) -> int:
    """Every row of `a` with one of `b`'s matrices, or every column with the rows of its group."""
    return 2 * a[-2] * a[-1] * b[-1]


_FORMULAS: dict[object, tuple[Callable[..., int], int]] = {  # with the number of tensors it reads
    aten._scaled_dot_product_flash_attention_for_cpu: (_attention, 3),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (_attention_backward, 4),
    **dict.fromkeys(GROUPED, (_grouped, 2)),
}


class _Unknown(Exception):
    """A size that only run time knows."""


def _known(value: Any) -> Any:
    """A tensor's shape, or a size, by its hints: a number taken from a symbolic size itself would
    be a guard, and fix the size."""
    if isinstance(value, torch.Tensor):
        return tuple(_known(size) for size in value.shape)
    if not isinstance(value, torch.SymInt):
        return value
    found = hint(value)
    if found is None:
        raise _Unknown
    return found


def flops(node: Node) -> int:
    """Floating-point operations of an op at the sizes that it was traced with; 0 for an op without
    products, or of a size that only run time knows."""
    packet = packet_of(node) if node.op == "call_function" else None
    if packet not in _FORMULAS and packet not in flop_registry:
        return 0
    values = map_arg((node.args, dict(node.kwargs)), lambda n: n.meta.get("val"))
    try:
        args, kwargs = tree_map(_known, values)
        if packet in _FORMULAS:
            formula, count = _FORMULAS[packet]
            return formula(*args[:count])
        # the table's formulas take shapes as well as tensors
        known: Any = flop_registry[packet]
        if not hasattr(known, "__wrapped__"):  # it wants tensors: attention of unequal lengths
            return 0
        return int(known(*args, **kwargs, out_val=tree_map(_known, node.meta["val"])))
    except _Unknown:
        return 0


@dataclass(frozen=True)
class Machine:
    """What moving bytes takes on a device, in the multiplications that it does meanwhile."""

    written: float  # per byte of a value that is written to memory and read from there
    reread: float  # per byte that one chunk more reads, or adds to
    near_nbytes: int  # of a chunk's values that are not written to memory


@dataclass(frozen=True)
class Loop:
    """A loop, as far as its cost goes."""

    plan: LoopPlan
    bodies: Bodies
    chunk_nbytes: int  # that a chunk's own values take, of the larger body


@dataclass(frozen=True)
class Work:
    """What a step does, with loops and without."""

    flops: int  # without
    again_flops: int  # that loops do a second time
    written_nbytes: int  # without: of values that are written to memory
    kept_nbytes: float  # of them, what loops keep near the cores
    reread_nbytes: int  # that loops read, or add to, once more per chunk

    @property
    def extra(self) -> float:
        """The share of the multiplications that is done a second time."""
        return self.again_flops / max(1, self.flops)

    def relative_time(self, machine: Machine) -> float:
        """The time of a step with loops, over that of one without."""
        more = self.again_flops + machine.reread * self.reread_nbytes
        more -= machine.written * self.kept_nbytes
        return 1 + more / max(1, self.flops + machine.written * self.written_nbytes)


def work_of(
    graph: Graph,
    before: Liveness,
    unlooped: Liveness,
    loops: Iterable[Loop],
    axes: Axes,
    near_nbytes: int,
) -> Work:
    """What a plan has to do.

    Args:
        graph: as it was traced.
        before: its memory.
        unlooped: memory of what was planned: earlier passes take values out.
        loops: of the plan.
        axes: of what was planned.
        near_nbytes: as for `Machine`.
    """
    written = sum(buffer.nbytes for buffer in before.buffers)
    sizes: dict[str, int] = {}
    for buffer in unlooped.buffers:
        sizes[buffer.node] = sizes.get(buffer.node, 0) + buffer.nbytes
    again = reread = 0
    kept = float(written - sum(sizes.values()))
    for loop in loops:
        forward, backward = loop.bodies.forward, loop.bodies.backward
        if forward is not None and backward is not None:
            again += sum(map(flops, set(forward.work) & set(backward.work)))
        nodes = loop.plan.region.nodes
        inside = sum(sizes.get(n.name, 0) for n in nodes if _stays(n, nodes))
        kept += inside * min(1.0, near_nbytes / max(1, loop.chunk_nbytes))
        more = loop.plan.num_chunks - 1
        reread += more * sum(_whole_nbytes(body, axes) for body in loop.bodies.all)
    return Work(sum(map(flops, graph.nodes)), again, written, kept, reread)


def _stays(node: Node, nodes: frozenset[Node]) -> bool:
    """Whether nobody outside reads a value, through views either."""
    return all(u in nodes and (not rules.is_view(u) or _stays(u, nodes)) for u in node.users)


def _whole_nbytes(body: Body, axes: Axes) -> int:
    """What every chunk reads whole, and what it reads and writes to add to it."""
    axis = body.axes[0]
    whole = [i for i in body.inputs if all(axis not in product for product in axes.dims(i))]
    read = sum(nbytes(i.meta.get("val")) for i in whole)
    values = ((o.node.meta["val"], o.accumulate) for o in body.outputs if o.kind != "split")
    return read + 2 * sum(nbytes(v) // v.element_size() * kind.itemsize for v, kind in values)

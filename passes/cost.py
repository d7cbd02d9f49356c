"""What a plan costs: the multiplications that it does twice.

A recompute loop makes its forward values once more in the backward. Of these, products of matrices,
attention and convolutions cost time; what is fused into them does not. Gradients made in the
forward cost nothing more, nor do chunks as long as they keep the device's matrix units busy, which
is what the planner's least chunk is for.

Not counted: bytes that are read again (weights, once per chunk) and bytes that are not written any
more (values that stay in the cache); a loop has some of both.

Source: `torch.utils.flop_counter`, whose table lacks attention on a CPU and grouped products.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry

from passes.modes import Bodies
from passes.rules.permuted import GROUPED
from passes.source import hint, packet_of

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
        return int(known(*args, **kwargs, out_val=tree_map(_known, node.meta["val"])))
    except _Unknown:
        return 0


def extra_work(graph: Graph, loops: Iterable[Bodies]) -> float:
    """The share of a step's multiplications that loops do a second time.

    Args:
        graph: the graph without loops.
        loops: the bodies of each.
    """
    again = 0
    for bodies in loops:
        if bodies.forward is not None and bodies.backward is not None:
            again += sum(map(flops, set(bodies.forward.nodes) & set(bodies.backward.nodes)))
    return again / max(1, sum(map(flops, graph.nodes)))

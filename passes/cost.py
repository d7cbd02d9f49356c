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
from torch.utils.flop_counter import flop_registry

from passes.modes import Bodies
from passes.rules.permuted import GROUPED
from passes.source import packet_of

aten = torch.ops.aten


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Any:
    """Scores, and their product with the values."""
    rows = math.prod(query.shape[:-1]) * key.shape[-2]
    return 2 * rows * (query.shape[-1] + value.shape[-1])


def _attention_backward(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> Any:
    """Scores again, and two products for each product of the forward."""
    rows = math.prod(query.shape[:-1]) * key.shape[-2]
    return 2 * rows * (3 * query.shape[-1] + 2 * value.shape[-1])


def _grouped(a: torch.Tensor, b: torch.Tensor) -> Any:
    """Every row of `a` with one of `b`'s matrices, or every column with the rows of its group."""
    return 2 * a.shape[-2] * a.shape[-1] * b.shape[-1]


_FORMULAS: dict[object, tuple[Callable[..., Any], int]] = {  # with the number of tensors it reads
    aten._scaled_dot_product_flash_attention_for_cpu: (_attention, 3),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (_attention_backward, 4),
    **dict.fromkeys(GROUPED, (_grouped, 2)),
}


def flops(node: Node) -> int:
    """Floating-point operations of an op at the sizes that it was traced with; 0 for an op without
    products."""
    if node.op != "call_function":
        return 0
    packet = packet_of(node)
    args, kwargs = map_arg((node.args, dict(node.kwargs)), lambda n: n.meta.get("val"))
    if packet in _FORMULAS:
        formula, count = _FORMULAS[packet]
        return int(formula(*args[:count]))
    known: Any = flop_registry.get(packet)
    return 0 if known is None else int(known(*args, **kwargs, out_val=node.meta["val"]))


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

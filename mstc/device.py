"""What the planner has to know of the device that a graph runs on."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Graph

from passes.cost import Machine

MIN_ROWS = {"cpu": 256, "cuda": 2048}  # below these, matrix products slow down
FEWER_ROWS = 128  # on a CPU in float32, where memory is worth it (heads in docs/peers.md have them)
# Fitted to 47 architectures in four settings each, on one machine (docs/tradeoff.md).
CPU_IN_FLOAT32 = Machine(written=24, reread=8, near_nbytes=16 * 2**20)


def kinds_of(graph: Graph) -> set[str]:
    """The kinds of devices that a graph's values are on."""
    return {value.device.type for value in _values(graph)}


def min_rows(kinds: set[str]) -> int:
    """The fewest rows with which matrix products are fast on all of these."""
    return max((MIN_ROWS.get(kind, MIN_ROWS["cpu"]) for kind in kinds), default=MIN_ROWS["cpu"])


def machine_of(graph: Graph) -> Machine | None:
    """What a graph's bytes cost, in multiplications; None where nobody has measured it."""
    return CPU_IN_FLOAT32 if all(map(is_measured, _values(graph))) else None


def is_measured(value: Tensor) -> bool:
    """Whether work on a value is of the kind that `CPU_IN_FLOAT32` was fitted to."""
    return value.device.type == "cpu" and (
        value.dtype == torch.float32 or not value.is_floating_point()
    )


def _values(graph: Graph) -> list[Tensor]:
    found = (node.meta.get("val") for node in graph.nodes)
    return [value for value in found if isinstance(value, Tensor)]

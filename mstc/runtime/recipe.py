"""How to compute a deferred output from the tensors that its closure starts from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule

__all__ = ["NO_RECIPE", "Recipe", "read_autocast"]


@dataclass(frozen=True)
class Recipe:
    """How to compute values from the tensors of a frontier."""

    closure: Callable[..., torch.Tensor]
    numbers: tuple[Any, ...]  # the frontier, with None where a tensor goes
    autocast: tuple[tuple[str, bool, torch.dtype], ...]  # device type, whether on, dtype
    casts: tuple[torch.dtype, ...]  # applied to what the closure returns, in order
    source: str  # "file:line  code" of the user who makes the output
    compile_record: Callable[..., Any] | None = None  # how to run what eager code does to it

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


NO_RECIPE = Recipe(lambda: torch.empty(0), (), (), (), "")

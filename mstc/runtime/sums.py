"""Sums over chunks, each made in a buffer of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mstc.runtime.product import add_product


@dataclass
class ChunkSum:
    """A sum over chunks, in one step or in two (`passes.groups`)."""

    dtype: torch.dtype
    order: tuple[int, ...]  # dims from outermost to innermost in memory
    in_groups: bool
    whole: Tensor | None = None  # the sum, of all groups that are complete
    part: Tensor | None = None  # the sum of a group; there from the first chunk on, so that memory
    # is the same in every chunk after it
    starts: bool = True  # whether the next chunk is the first of its group

    def add(self, value: Tensor, *, ends: bool) -> None:
        """Add a chunk's value; `ends`: it is the last of its group."""
        if self.whole is None:
            # a body's result may have any strides, the loop's has those that were promised
            self._begin(
                torch.empty_permuted(
                    value.shape, self.order, dtype=self.dtype, device=value.device
                ).copy_(value)
            )
        else:
            self._target().add_(value)
            self._close(ends)

    def add_product(
        self, left: Tensor, right: Tensor, *, ends: bool, only: Callable[[list[Any]], list[Any]]
    ) -> None:
        """Add the product of a chunk's two values; `only` is for simulation."""
        if self.whole is None:
            self._begin(add_product(None, left, right, self.dtype, only=only))
        else:
            add_product(self._target(), left, right, self.dtype, only=only)
            self._close(ends)

    def _begin(self, first: Tensor) -> None:
        """The first chunk is a group of its own."""
        self.whole = first
        if self.in_groups:
            self.part = torch.empty_like(first)

    def _target(self) -> Tensor:
        """What the next chunk is added to."""
        assert self.whole is not None
        if self.part is None:
            return self.whole
        return self.part.zero_() if self.starts else self.part

    def _close(self, ends: bool) -> None:
        self.starts = ends
        if ends and self.part is not None:
            assert self.whole is not None
            self.whole.add_(self.part)

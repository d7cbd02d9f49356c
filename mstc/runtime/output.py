"""What a loop reads in slices, and what it makes of its chunks' values.

A split output is written in its place: by the products that make it, where it is a sum of such
(`passes.products`), else by a copy. Sums are added to (`mstc.runtime.sums`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from mstc.runtime.product import write_products
from mstc.runtime.sums import ChunkSum


@dataclass(frozen=True)
class Slicing:
    """Where a tensor has the loop axis."""

    dim: int
    factors: tuple[int, ...]  # the dim's axes, outermost first, as indices into the sizes
    position: int  # which of them is the loop axis

    def pieces(
        self, tensor: torch.Tensor, sizes: Sequence[int], spans: Sequence[tuple[int, int]]
    ) -> Sequence[torch.Tensor]:
        """The chunks' slices, their factors still apart: dims ``dim .. dim + len(factors) - 1``.

        Views, made in one call where `spans` (start and size of chunks) leave nothing out: one by
        one they cost as much of the host's time as a small kernel.
        """
        if len(self.factors) > 1:
            tensor = tensor.unflatten(self.dim, [sizes[f] for f in self.factors])
        axis = self.dim + self.position
        lengths = [length for _, length in spans]
        if sum(lengths) == tensor.shape[axis]:
            return tensor.split_with_sizes(lengths, axis)
        return [tensor.narrow(axis, start, length) for start, length in spans]

    def merge(self, tensor: torch.Tensor) -> torch.Tensor:
        if len(self.factors) > 1:
            tensor = tensor.flatten(self.dim, self.dim + len(self.factors) - 1)
        return tensor.contiguous()

    def split(self, tensor: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """A chunk's result with its factors apart, to be copied into its piece of the whole;
        `sizes` are the chunk's."""
        if len(self.factors) == 1:
            return tensor
        return tensor.unflatten(self.dim, [sizes[f] for f in self.factors])


def _has_rows(tensor: torch.Tensor) -> bool:
    """Whether all but the last dim can be seen as one: those of several sequences cannot."""
    dims = [d for d in range(tensor.dim() - 1) if tensor.shape[d] != 1]
    shape, strides = tensor.shape, tensor.stride()
    return all(strides[a] == strides[b] * shape[b] for a, b in pairwise(dims))


@dataclass(frozen=True)
class Output:
    """One value that the loop makes, and how."""

    kind: str  # "split", "sum" or "matmul" (a sum whose addends are matrix products)
    dims: tuple[tuple[int, ...], ...]  # per dim, indices into the sizes
    dtype: torch.dtype
    order: tuple[int, ...]  # dims from outermost to innermost in memory
    slicing: Slicing | None
    in_groups: bool  # whether a sum over very many chunks gains from two steps
    # Of every matrix product that the loop makes for it, how many values of the body it takes; ()
    # where the body makes the value.
    terms: tuple[int, ...]

    def shape(self, sizes: Sequence[Any]) -> list[Any]:
        return [
            functools.reduce(lambda a, b: a * b, (sizes[i] for i in dim), 1) for dim in self.dims
        ]

    def nbytes(self, sizes: Sequence[int]) -> int:
        return math.prod(self.shape(sizes)) * self.dtype.itemsize

    def places(
        self,
        whole: torch.Tensor | ChunkSum,
        sizes: Sequence[int],
        spans: Sequence[tuple[int, int]],
    ) -> Sequence[torch.Tensor | ChunkSum]:
        """Where the chunks' values go: into their pieces of `whole`, as rows if products can be
        written there; or into the sum."""
        if isinstance(whole, ChunkSum):
            return [whole] * len(spans)
        assert self.slicing is not None
        pieces = self.slicing.pieces(whole, sizes, spans)
        if not self.terms or not all(map(_has_rows, pieces)):
            return pieces
        return [p.view(math.prod(p.shape[:-1]), p.shape[-1]) for p in pieces]

    def put(
        self,
        place: torch.Tensor | ChunkSum,
        values: Iterator[torch.Tensor],
        sizes: Sequence[int],
        ends: bool,
        only: Callable[[list[Any]], list[Any]],
    ) -> None:
        """Write or add what the body made of a chunk.

        Args:
            place: of `places`.
            values: of the body; those that belong to this output are taken.
            sizes: the chunk's.
            ends: whether the chunk is the last of its group.
            only: as for `Program.run`.
        """
        terms = [[next(values) for _ in range(count)] for count in self.terms]
        if isinstance(place, ChunkSum):
            if terms:
                ((left, right),) = terms
                place.add_product(left, right, ends=ends, only=only)
            else:
                place.add(next(values), ends=ends)
        elif terms and place.dim() == 2:
            write_products(place, terms)
        else:
            assert self.slicing is not None
            value = self._product(terms, sizes) if terms else next(values)
            place.copy_(self.slicing.split(value, sizes))

    def _product(
        self, terms: Sequence[Sequence[torch.Tensor]], sizes: Sequence[int]
    ) -> torch.Tensor:
        left, right = terms[0][-2:]
        value = left.new_empty(left.shape[0], right.shape[1])
        write_products(value, terms)
        return value.view(self.shape(sizes))

    def empty(self, sizes: Sequence[Any], device: torch.device) -> torch.Tensor:
        return torch.empty_permuted(self.shape(sizes), self.order, dtype=self.dtype, device=device)

"""Errors of PyTorch that make gradients wrong without a word, mended for the whole process.

Each is mended such that nothing happens where PyTorch has mended it itself.

Atomic additions in tiles of two dims (C++, more than one thread; seen in torch 2.13)
    Where the values of an ``index_put(accumulate=True)`` lie transposed, the kernel runs over tiles
    and adds the tile's inner counter to the index: once in `CppTile2DKernel.store`, and once more
    where the vector of indices is made from that. Rows are then added to where they do not belong.
    Seen in multi-query attention that takes its keys out of one projection by a list
    (``qkv[..., [-2], :]``, Falcon): 6 % of the gradient of the projection.

Buffers that a subgraph of a backward does not own (seen in torch 2.13)
    AOTAutograd tells which inputs of the backward nobody else reads, by their positions, and the
    code may write into them. Inductor takes the same positions for the inputs of every subgraph
    (`invoke_subgraph`), whatever these are there: it may write into what is read later.

Results of a subgraph that are one buffer (seen in torch 2.13)
    Inductor may find that a result is an operand or another result (``cat`` of all the parts of a
    ``split``), and hands out the same memory twice; the caller takes every result for memory of its
    own, and may write into it. Mended for what `passes.shared` makes, and for nobody else's.
"""

from __future__ import annotations

import functools
from typing import Any

import sympy
from torch._inductor import ir
from torch._inductor.codegen.cpp import CppTile2DKernel
from torch._inductor.graph import SubgraphLowering

from passes.shared import NAME


@functools.cache
def mend() -> None:
    """Apply all repairs, once per process."""
    _add_the_inner_counter_once()
    _subgraphs_own_no_inputs()
    _shared_code_returns_its_own()


def _add_the_inner_counter_once() -> None:
    kernel: Any = CppTile2DKernel
    transform = getattr(kernel, "transform_indexing", None)
    if transform is None:
        return

    def transform_once(self: Any, index: sympy.Expr) -> sympy.Expr:
        if self.inner_itervar() in getattr(index, "free_symbols", ()):
            return index
        return transform(self, index)

    kernel.transform_indexing = transform_once


def _subgraphs_own_no_inputs() -> None:
    lowering: Any = SubgraphLowering
    initialize = lowering.__init__

    def without_donations(self: Any, *args: Any, **kwargs: Any) -> None:
        initialize(self, *args, **kwargs)
        self.bw_donated_idxs = None

    lowering.__init__ = without_donations


def _shared_code_returns_its_own() -> None:
    lowering: Any = SubgraphLowering
    output = lowering.output

    def with_copies(self: Any, target: Any, args: Any, kwargs: Any) -> Any:
        if NAME not in self.name:
            return output(self, target, args, kwargs)
        taken, results = {*self.graph_inputs}, []
        for result in args[0]:
            if isinstance(result, ir.TensorBox):
                result.realize()
                if result.get_name() in taken:
                    result = ir.ExternKernel.copy_input(result)
                taken.add(result.get_name())
            results.append(result)
        return output(self, target, (tuple(results),), kwargs)

    lowering.output = with_copies

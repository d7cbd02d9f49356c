"""Random numbers that can be made again, in any piece: dropout inside loops.

`rand` draws from a generator, so a slice of its result is not the result for a slice, and whoever
needs the numbers again has to keep them. Here a large `rand` becomes a function of a seed and the
positions: the seed is drawn from the same generator (so `torch.manual_seed` decides as before), and
each number is a hash of the seed and its coordinates. All ops are pointwise integer arithmetic on
``arange``, so the axis rules hold for it as for any other op: a chunk makes its own numbers, the
backward makes the forward's again, and nobody keeps a mask.

Algorithm, for a `rand` of shape ``(n0, .., nk)``
    1. Two 31-bit seeds.
    2. A key per row and seed: for every dim but the last, ``key = mix(key + coordinate * ODD)``.
    3. ``mix(mix(first key + coordinate * ODD) + second key)``, whose upper bits are the number.
       Two rows share their numbers only if both of their keys agree (64 bits).

`mix` is a bijection of 32 bits; its products fit 63 bits, so signed 64-bit arithmetic never
overflows, which C++ would leave undefined.

Not handled: normal and integer random numbers; a generator given by the user; numbers of less than
32 bits. They stay as they are.

Source: Wellons, "Prospecting for Hash Functions" (2018), and its successor by TheIronBorn
    (16 21f0aaad 15 735a2d97 15, bias 0.107); counter-based generators: Salmon et al., "Parallel
    Random Numbers: As Easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

from passes.axes import as_size
from passes.source import nbytes

aten = torch.ops.aten
prims = torch.ops.prims

_LOW = 0xFFFFFFFF  # the lower 32 bits
_ODD = 0x61C88647  # 2**32 less the golden ratio's share: spreads neighbours; below 2**31
_SEED_END = 2**31 - 1
_BITS = {torch.float32: 24, torch.float64: 32}  # of a number, at most its significand's


class _Writer:
    """Emits calls with fake values, marked as what they stand for."""

    def __init__(self, graph: Graph, like: Node) -> None:
        self.graph = graph
        self.like = like
        self.device = like.meta["val"].device
        self.mode = like.meta["val"].fake_mode

    def call(self, op: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        node = self.graph.call_function(op, args, kwargs)
        node.meta = dict(self.like.meta)
        given = torch.fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        with self.mode:
            node.meta["val"] = op(*given[0], **given[1])
        return node

    def seeds(self) -> tuple[Node, Node]:
        drawn = self.call(
            aten.randint.low, 0, _SEED_END, [2], dtype=torch.int64, device=self.device
        )
        # whoever computes a layer again must not draw again
        drawn.meta.pop("recompute", None)
        first, second = (self.call(aten.select.int, drawn, 0, i) for i in (0, 1))
        return first, second

    def coordinates(self, dim: int, rank: int, size: Any) -> Node:
        """``arange`` along one dim of a tensor, scaled."""
        node = self.call(
            prims.iota.default,
            size,
            start=0,
            step=1,
            dtype=torch.int64,
            device=self.device,
            requires_grad=False,
        )
        node = self.call(aten.mul.Tensor, node, _ODD)
        for _ in range(rank - 1 - dim):
            node = self.call(aten.unsqueeze.default, node, -1)
        return node

    def mix(self, value: Node) -> Node:
        """A bijection of the lower 32 bits of non-negative values."""
        value = self.call(aten.bitwise_and.Scalar, value, _LOW)
        for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
            value = self.spread(value, shift)
            value = self.call(aten.mul.Tensor, value, factor)
            value = self.call(aten.bitwise_and.Scalar, value, _LOW)
        return self.spread(value, 15)

    def spread(self, value: Node, shift: int) -> Node:
        shifted = self.call(aten.bitwise_right_shift.Tensor_Scalar, value, shift)
        return self.call(aten.bitwise_xor.Tensor, value, shifted)

    def add(self, left: Node, right: Node) -> Node:
        return self.call(aten.add.Tensor, left, right)

    def uniform(self, bits: Node, dtype: torch.dtype) -> Node:
        kept = _BITS[dtype]
        bits = self.call(aten.bitwise_right_shift.Tensor_Scalar, bits, 32 - kept)
        number = self.call(prims.convert_element_type.default, bits, dtype)
        return self.call(aten.mul.Tensor, number, 2.0**-kept)


def _counted(writer: _Writer, sizes: list[Any], dtype: torch.dtype) -> Node:
    first, second = writer.seeds()
    rank = len(sizes)
    for dim, size in enumerate(sizes[:-1]):
        if not isinstance(size, Node) and size == 1:
            continue
        at = writer.coordinates(dim, rank, size)
        first, second = (writer.mix(writer.add(at, key)) for key in (first, second))
    last = writer.coordinates(rank - 1, rank, sizes[-1])
    bits = writer.mix(writer.add(last, first))
    bits = writer.mix(writer.add(bits, second))
    while bits.meta["val"].dim() < rank:  # leading dims of size one
        bits = writer.call(aten.unsqueeze.default, bits, 0)
    return writer.uniform(bits, dtype)


def _may_be_counted(node: Node, min_bytes: int) -> bool:
    if node.op != "call_function" or node.target is not aten.rand.default:
        return False
    value = node.meta["val"]
    return (
        value.dtype in _BITS
        and value.dim() > 0
        and nbytes(value) >= min_bytes
        and as_size(value.shape[-1]) != 1
    )


def count_random_numbers(graph: Graph, *, min_bytes: int) -> Graph:
    """A graph in which large uniform random numbers are functions of a seed and their positions;
    `graph` itself if there are none.

    Args:
        graph: a functional aten graph; left as it is.
        min_bytes: smallest value that is worth it.
    """
    if not any(_may_be_counted(n, min_bytes) for n in graph.nodes):
        return graph
    new = Graph()
    copied: dict[Node, Node] = {}
    for node in graph.nodes:
        if not _may_be_counted(node, min_bytes):
            copied[node] = new.node_copy(node, copied.__getitem__)
            continue
        sizes = [copied[s] if isinstance(s, Node) else s for s in node.args[0]]
        value = node.meta["val"]
        number = _counted(_Writer(new, node), sizes, value.dtype)
        assert [as_size(s) for s in number.meta["val"].shape] == [as_size(s) for s in value.shape]
        copied[node] = number
    new.lint()
    return new

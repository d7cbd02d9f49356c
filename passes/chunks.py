"""How large chunks are: their sizes, and the memory that one of them needs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from passes.axes import Axes
from passes.body import Body
from passes.liveness import analyze_liveness
from passes.records import Region
from passes.rules.permuted import GROUPED
from passes.source import hint, nbytes, packet_of

aten = torch.ops.aten


def rows_per_position(region: Region, axes: Axes) -> int:
    """Rows of the seed's matrix for one position of the loop axis; its columns, if the axis is
    among them: a product needs as many of these."""
    value = region.seed.meta["val"]
    columns = hint(value.shape[-1]) or 1 if value.dim() else 1
    if value.dim() and region.axis in axes.dims(region.seed)[-1]:
        return max(1, columns // region.length)
    total = nbytes(value) // value.element_size()
    return max(1, total // max(1, columns) // region.length)


def experts(region: Region, axes: Axes) -> int:
    """Among how many matrices grouped products share out a chunk's rows; 1 without such."""
    weights = (n.args[1] for n in region.nodes if packet_of(n) in GROUPED)
    whole = (w for w in weights if isinstance(w, Node) and not axes.count(w, region.axis))
    shapes = (w.meta["val"].shape for w in whole)
    return max((hint(s[0]) or 1 for s in shapes if len(s) == 3), default=1)


def is_batched(region: Region, axes: Axes) -> bool:
    """Whether positions are rows of each of several products (of attention's heads)."""
    batched = (n for n in region.nodes if packet_of(n) in (aten.bmm, aten.baddbmm))
    return any(region.axis in axes.dims(n)[1] for n in batched)


def even_chunk(length: int, wanted: int, least: int) -> int:
    """A chunk of about `wanted` positions, at least `least`: the divisor of `length` nearest to it
    within a factor of two, so that all chunks are equal and one compiled body serves them; else
    chunks as equal as can be."""
    divisors = [length // n for n in range(1, length // max(1, wanted // 2) + 1) if length % n == 0]
    near = [d for d in divisors if d >= least and wanted <= 2 * d and d <= 2 * wanted]
    if near:
        return min(near, key=lambda d: (max(d / wanted, wanted / d), d))
    return math.ceil(length / max(1, math.ceil(length / wanted)))


def largest_chunk(length: int, most: int, least: int) -> int:
    """The largest chunk of at most `most` positions (at least `least`), or up to half as large if
    that divides `length`."""
    most = min(length, max(most, least, 1))
    for chunk in range(most, max(most // 2, least - 1), -1):
        if length % chunk == 0:
            return chunk
    return math.ceil(length / math.ceil(length / most))


@dataclass(frozen=True)
class ChunkMemory:
    """Bytes that a body needs beside its inputs and outputs, by the positions of its chunk."""

    length: int  # positions of the whole axis
    steps: tuple[tuple[int, int], ...]  # at every step of the body that may be its peak: bytes of
    # values without the loop axis, and of those with it, of the whole axis

    def of(self, chunk: int) -> int:
        """Bytes that a chunk needs."""
        return max((same + split * chunk // self.length for same, split in self.steps), default=0)

    def most(self, room: float) -> int:
        """The positions of the largest chunk that needs no more than `room` bytes; 0 if none
        does."""
        most = self.length
        for same, split in self.steps:
            left = max(0, room - same)
            if left < split:
                most = min(most, int(left * self.length / split))
            elif same > room:
                most = 0
        return most


def _lies_apart(node: Node, axes: Axes, axis: int) -> bool:
    """Whether the slices of a value along an axis are not contiguous."""
    in_order = [one for product in axes.dims(node) for one in product]
    outside = in_order[: in_order.index(axis)]
    if any(axes.table.sizes[one] != 1 for one in outside):
        return True
    value, expected = node.meta["val"], 1
    for size, stride in zip(reversed(value.shape), reversed(value.stride()), strict=True):
        known, step = hint(size), hint(stride)
        if known is None or step is None:
            return False
        if known != 1 and step != expected:
            return True
        expected *= known
    return False


def chunk_memory(body: Body, axes: Axes, length: int) -> ChunkMemory:
    """What a body needs: the values that it makes, and copies of the slices of its inputs that lie
    apart in memory. `length` is that of its loop axis."""
    axis = body.axes[0]
    members = set(body.nodes)
    graph = Graph()
    map_: dict[Node, Node] = {}

    def look(node: Node) -> Node:
        if node not in map_:
            stand_in = graph.placeholder(node.name)
            stand_in.meta = dict(node.meta)
            map_[node] = stand_in
        return map_[node]

    for node in body.inputs:
        look(node)
    for node in body.nodes:
        for i in node.all_input_nodes:
            if i not in members:
                look(i)  # the sizes of views
    for node in body.nodes:
        map_[node] = graph.node_copy(node, look)
    results = [i for o in body.outputs for i in o.leaving if o.kind != "sum"]
    graph.output(tuple(look(r) for r in results))
    copied = frozenset(map_[n] for n in body.split_inputs if _lies_apart(n, axes, axis))
    split = {made.name for node, made in map_.items() if axes.count(node, axis)}
    same, scaled = [0] * len(graph.nodes), [0] * len(graph.nodes)
    for buffer in analyze_liveness(graph, fused=True, copied=copied).buffers:
        sums = scaled if buffer.node in split else same
        for step in range(buffer.born, buffer.dies + 1):
            sums[step] += buffer.nbytes
    return ChunkMemory(length, tuple(_largest(zip(same, scaled, strict=True))))


def _largest(steps: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Those pairs of which no other has both numbers as large."""
    kept: list[tuple[int, int]] = []
    for pair in sorted(set(steps), reverse=True):
        if not kept or pair[1] > kept[-1][1]:
            kept.append(pair)
    return kept

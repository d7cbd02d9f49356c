"""How large chunks are: their sizes, and the memory that one of them needs."""

from __future__ import annotations

import math

from torch.fx import Graph, Node

from passes.body import Body
from passes.liveness import analyze_liveness
from passes.records import Region
from passes.source import hint, nbytes


def rows_per_position(region: Region) -> int:
    """Rows of the seed's matrix for one position of the loop axis."""
    value = region.seed.meta["val"]
    columns = hint(value.shape[-1]) or 1 if value.dim() else 1
    total = nbytes(value) // value.element_size()
    return max(1, total // max(1, columns) // region.length)


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


def body_bytes(body: Body) -> int:
    """Bytes that a body needs for the whole axis at once, its inputs not counted; a chunk needs its
    share."""
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
    return analyze_liveness(graph, fused=True).peak_bytes

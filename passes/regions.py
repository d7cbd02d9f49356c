"""Convex sets of nodes with a large inside and a small boundary, forward and backward side
together.

Terms
    loop axis     the axis along which a region would run in chunks.
    width         bytes of a value per position of the loop axis.
    seed          a node that is wider than all that it is made from: a projection to the
                  vocabulary, the up-projection of an MLP.
    wide          wider than what the seed is made from.
    convex        no path leaves the forward (or the backward) part and enters it again, so the part
                  can run as one step.

Algorithm, for every seed, widest first, and every axis of it, fewest weights first; of these the
outermost that is fine enough, whose slices are contiguous, then the longest
    1. Flood from the seed through wide nodes that are split along the axis, forward and backward
       nodes alike.
    2. Add the consumers of wide nodes: where values get small again, or become sums over the axis
       (*partial*).
    3. Close the forward and the backward part under paths. A node on such a path that cannot be
       split cuts the region: what depends on it in the same direction leaves, and so does what
       reads that in the other; the cut is remembered as a refusal.
    4. Absorb consumers while the bytes that leave shrink (two gradients that are added leave as
       one).
    5. Keep the region if what is inside is larger than what leaves, and either what leaves in both
       directions is again narrower than the seed, or far more stays inside than leaves.

Every node of a region is parallel along the axis, or a sum over it whose result nobody inside
reads. By induction over the nodes, the loop's slices are the slices of the unchunked values, and
its partials add up to the unchunked sums.

Not handled: values that need a whole reduction over the axis and are then used per position again
(normalisation over tokens); regions inside regions; two loop axes at once.

Source: Mini-Sequence Transformer (Luo et al., NeurIPS 2024) for the two cases that matter most.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable
from dataclasses import replace

import networkx as nx
import sympy
import torch
from torch.fx import Graph, Node

from passes import rules
from passes.axes import Axes
from passes.generated import NARROW
from passes.liveness import output_nodes, tangent_nodes
from passes.records import LoopAxes, Refusal, Region
from passes.source import elements, hint, nbytes, op_name, packet_of, source_of
from passes.split import Split

AMPLIFY = 1.25  # a seed is at least this much wider than what it is made from
_MUCH = 3  # times what leaves, a region pays even if what leaves is as wide as the seed
_FINE = 1.25  # times `min_rows`, the rows of one position up to which an axis is fine enough
_LOOKAHEAD = (
    8  # nodes that may be absorbed together because the last of them makes the output smaller
)


def _dataflow(graph: Graph) -> nx.DiGraph[Node]:
    flow: nx.DiGraph[Node] = nx.DiGraph()
    for node in graph.nodes:
        if node.op != "output":
            flow.add_node(node)
            flow.add_edges_from((i, node) for i in node.all_input_nodes)
    return flow


def _inputs_of_products(graph: Graph) -> set[Node]:
    """The graph inputs that matrix products read: weights. A table of positions, which is only
    added or multiplied, is none, so a token axis is no less a token axis for having one."""
    found: set[Node] = set()
    for node in graph.nodes:
        if node.op != "call_function" or not rules.is_matmul(node):
            continue
        found |= {m for m in map(_maker, node.all_input_nodes) if m.op == "placeholder"}
    return found


def _maker(node: Node) -> Node:
    """What made the values: behind views and changes of dtype."""
    while node.op == "call_function" and _keeps_values(node):
        node = node.all_input_nodes[0]
    return node


def _keeps_values(node: Node) -> bool:
    """A view or a change of dtype."""
    packet = packet_of(node)
    return bool(node.all_input_nodes) and (
        rules.is_view(node)
        or packet in (torch.ops.prims.convert_element_type, torch.ops.aten.clone)
    )


def _only_widens_its_type(node: Node) -> bool:
    """``logits.float()``, ``scores + mask``: more bytes, but what made them wide came before. (Not
    so a mask of numbers that is made of a mask of bits.)"""
    own = elements(node.meta["val"])
    return rules.is_pointwise(node) and any(
        isinstance(value := i.meta.get("val"), torch.Tensor)
        and value.is_floating_point()
        and elements(value) == own
        for i in node.all_input_nodes
    )


def _bytes_in_float32(value: object) -> float:
    """As many as the value would have without a narrower type: a model has the same regions in any
    precision."""
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return nbytes(value) * max(1, 4 / value.element_size())
    return nbytes(value)


def symbol_hints(graph: Graph) -> dict[sympy.Basic, sympy.Integer]:
    """The hint of every size symbol that an input of the graph carries."""
    found: dict[sympy.Basic, sympy.Integer] = {}
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        for size in value.shape if isinstance(value, torch.Tensor) else (value,):
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                known = hint(size)
                if known is not None:
                    found[size.node.expr] = sympy.Integer(known)
    return found


class RegionFinder:
    """Finds the regions of one graph; `find` gives them in order of size, and what was refused on
    the way."""

    def __init__(
        self,
        graph: Graph,
        axes: Axes,
        min_bytes: int,
        *,
        min_rows: int = 0,
        all_axes: bool = False,
        loop_axes: LoopAxes = "tokens",
    ) -> None:
        self.min_rows = min_rows
        self.all_axes = all_axes
        self.weights_first = loop_axes == "weights"
        self.weighs = loop_axes == "either"
        self.graph = graph
        self.axes = axes
        self.min_bytes = min_bytes
        self.order = {n: i for i, n in enumerate(graph.nodes)}
        self.flow = _dataflow(graph)
        self.tangent = tangent_nodes(graph)
        self.outputs = set(output_nodes(graph))
        self.taken: set[Node] = set()
        self.refusals: list[Refusal] = []
        self.splits: dict[int, Split] = {}
        self.hopeless: set[tuple[Node, int]] = (
            set()
        )  # nodes that a failed attempt flooded, and its axis
        self.hints = symbol_hints(graph)
        self.weights: dict[int, int] = {}  # axis -> how many inputs of products have it
        self.parameters = _inputs_of_products(graph) - self.tangent
        for node in self.parameters:
            for axis in set(axes.axes(node)):
                self.weights[axis] = self.weights.get(axis, 0) + 1

    def find(self) -> tuple[list[Region], list[Refusal]]:
        regions: list[Region] = []
        candidates = [n for n in self.graph.nodes if n.op == "call_function" and self.may_seed(n)]
        # a table's rows are wide beside their indices wherever they are read: asked last
        for seed in sorted(candidates, key=lambda n: (rules.is_lookup(n), -nbytes(n.meta["val"]))):
            if seed in self.taken:
                continue
            region = self.region_of(seed)
            if region is not None:
                regions.append(region)
                self.taken |= region.nodes
        regions.sort(key=lambda r: -r.inside_bytes)
        return self._with_others(regions) if self.weighs else regions, self.refusals

    def _with_others(self, regions: list[Region]) -> list[Region]:
        """The regions, each with what could be instead of it along an axis of weights."""
        finder = copy.copy(self)  # facts about the graph are the same
        finder.weights_first, finder.hopeless, finder.refusals = True, set(), []
        found: list[Region] = []
        for region in regions:
            finder.taken = self.taken - region.nodes
            other = None if self.weights.get(region.axis) else finder.region_of(region.seed)
            if other is not None and self.weights.get(other.axis):
                self.taken |= other.nodes
                region = replace(region, instead=replace(other, along_weights=True))
            found.append(region)
        return found

    def may_seed(self, node: Node) -> bool:
        """Whether a region may be grown from the node, as far as the node alone tells."""
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return False
        if _bytes_in_float32(value) < self.min_bytes or rules.is_view(node):
            return False
        if packet_of(node) is torch.ops.aten.scatter:
            return False  # a gradient of picked values: nearly nothing, and all is wide beside that
        if self._is_free(node) or self._is_gradient(node):
            return False
        return node not in self.tangent or node not in self.outputs  # a gradient has to be whole

    def region_of(self, seed: Node) -> Region | None:
        failure: Refusal | None = None
        best: Region | None = None
        sizes = self.axes.table.sizes
        for axis in self._candidates(seed):
            length = self._length(axis)
            assert length is not None, sizes[axis]
            split = self.splits.setdefault(axis, Split(self.axes, axis, length))
            if (seed, axis) in self.hopeless:
                continue
            base = self._made_from(seed, split)
            if not split.is_split(seed) or split.width(seed) < AMPLIFY * base:
                continue
            threshold = AMPLIFY * base
            if split.is_generated(seed):  # made from next to nothing: compared to itself
                threshold = max(threshold, split.width(seed) / NARROW)
            elif _only_widens_its_type(seed):
                continue
            if threshold == 0:
                continue
            hopeless = set(self.hopeless) if self.all_axes else self.hopeless
            attempt = self._grow(seed, split, threshold)
            if isinstance(attempt, Refusal):
                failure = failure or attempt
            elif not self.all_axes:
                return attempt
            else:
                self.hopeless = hopeless
                if best is None or attempt.inside_bytes > AMPLIFY * best.inside_bytes:
                    best = attempt
        if best is None and failure is not None:
            self.refusals.append(failure)
        return best

    def _made_from(self, seed: Node, split: Split) -> float:
        """The width of what a seed is made from. Along an axis of weights (heads, features) every
        chunk reads the activations whole, and they count as well: else any projection would be
        wider than nothing, and attention be computed again for it."""
        split_inputs = [i for i in seed.all_input_nodes if split.is_split(i)]
        base = sum(split.origin(i) for i in split_inputs if not self._is_free(i))
        if self.weights.get(split.axis, 0):
            others = (i for i in seed.all_input_nodes if i not in split_inputs)
            base += sum(split.width(i) for i in others if _maker(i) not in self.parameters)
        return base

    def _candidates(self, seed: Node) -> list[int]:
        """The axes of a seed, in the order in which they are tried."""
        found = dict.fromkeys(self.axes.table.unpermuted(self.axes.axes(seed)))  # outermost first
        own = [a for a in found if (self._length(a) or 0) > 1]
        value = seed.meta["val"]
        rows = elements(value) // max(1, hint(value.shape[-1]) or 1) if value.dim() else 1

        def order(axis: int) -> tuple[int, bool, int]:
            length = self._length(axis) or 1
            coarse = rows // length > _FINE * self.min_rows
            weights = self.weights.get(axis, 0)
            weights = -weights if self.weights_first else weights
            return weights, coarse, -length if coarse else own.index(axis)

        return sorted(own, key=order)

    def _is_free(self, node: Node) -> bool:
        """Whether a slice of the value takes no memory: that of a weight, which is there anyhow.
        (Along tokens weights are whole, and do not count either.)"""
        return self.weights_first and _maker(node) in self.parameters

    def _is_gradient(self, node: Node) -> bool:
        """Whether the value is read as a gradient only, which has to exist as a whole in any case.
        (Along tokens those of weights are sums, and do not count either.)"""
        if not self.weights_first or node not in self.tangent:
            return False
        return node in self.outputs or all(
            u.op == "output" or (_keeps_values(u) and self._is_gradient(u)) for u in node.users
        )

    def _length(self, axis: int) -> int | None:
        """The size of an axis, by the hints of its symbols; None where only run time knows."""
        size = self.axes.table.sizes[axis]
        if isinstance(size, int):
            return size
        found = size.xreplace(self.hints)
        return int(found) if isinstance(found, sympy.Integer) else None

    def _grow(self, seed: Node, split: Split, threshold: float) -> Region | Refusal:
        wide = self._flood(seed, split, threshold)
        attempt = self._shape(seed, wide, split)
        if isinstance(attempt, Refusal):
            self.hopeless |= {(n, split.axis) for n in wide}
        return attempt

    def _shape(self, seed: Node, wide: set[Node], split: Split) -> Region | Refusal:
        """The region that is left of what was flooded."""
        region = set(wide)
        for node in wide:
            region |= {u for u in node.users if u.op == "call_function" and self._joins(u, split)}
        obstacle = self._close(region, seed, split)
        if seed not in region:
            assert obstacle is not None
            return self._refuse(seed, obstacle, split)
        self._absorb(region, split)
        inside = sum(nbytes(n.meta["val"]) for n in region if self._is_inside(n, region, split))
        leaving = [n for n in region if self._leaves(n, region) and split.is_split(n)]
        leaving = [n for n in leaving if not self._is_gradient(n)]
        out = sum(nbytes(n.meta["val"]) for n in leaving)
        phase_out = max(
            (
                sum(split.width(n) for n in leaving if (n in self.tangent) == side)
                for side in (False, True)
            ),
            default=0,
        )
        as_wide = phase_out * AMPLIFY > split.width(seed) and inside < _MUCH * out
        if inside <= out or inside < self.min_bytes or as_wide:
            return self._refuse(seed, obstacle or self._outlet(leaving, region, split), split)
        return Region(
            axis=split.axis,
            length=split.length,
            forward=frozenset(n for n in region if n not in self.tangent),
            backward=frozenset(n for n in region if n in self.tangent),
            seed=seed,
            inside_bytes=inside,
        )

    def _flood(self, seed: Node, split: Split, threshold: float) -> set[Node]:
        """The wide nodes around a seed; around a generated one, those that it is generated by."""
        generated = split.is_generated(seed)
        wide: set[Node] = set()
        stack = [seed]
        while stack:
            node = stack.pop()
            if node in wide or node.op != "call_function" or node in self.taken:
                continue
            if not split.is_split(node) or split.width_as(node, seed) < threshold:
                continue
            if generated and not split.is_generated(node):
                continue
            if self._is_free(node) or self._is_gradient(node):
                continue
            wide.add(node)
            stack.extend(node.all_input_nodes)
            stack.extend(node.users)
        return wide

    def _joins(self, node: Node, split: Split) -> bool:
        return node not in self.taken and split.status(node) in ("split", "partial", "tally")

    def _between(self, part: set[Node]) -> set[Node]:
        """Nodes outside `part`, of the same side of the tangents, on a path from it to itself."""
        if not part:
            return set()
        low, high = min(self.order[n] for n in part), max(self.order[n] for n in part)
        side = next(iter(part)) in self.tangent

        def reach(step: Callable[[Node], Iterable[Node]]) -> set[Node]:
            seen: set[Node] = set()
            stack = [m for n in part for m in step(n)]
            while stack:
                node = stack.pop()
                if (
                    node not in seen
                    and low <= self.order[node] <= high
                    and (node in self.tangent) == side
                ):
                    seen.add(node)
                    stack.extend(step(node))
            return seen

        after = reach(self.flow.successors)
        before = reach(self.flow.predecessors)
        return (after & before) - part

    def _close(self, region: set[Node], seed: Node, split: Split) -> Node | None:
        """Make both parts convex in place; the node that cut the region, if one did."""
        obstacle: Node | None = None
        dropped: set[Node] = set()
        while True:
            forward = {n for n in region if n not in self.tangent}
            missing = self._between(forward) | self._between(region - forward)
            for part in (n for n in region if split.status(n) == "partial"):
                # a sum over the axis is complete only after the loop: nobody inside may read it
                missing |= {u for u in part.users if u in region}
            missing |= self._apart(region, split, dropped)
            bound = self._bound(region, split)
            if not missing and not bound:
                return obstacle
            bad = {
                n
                for n in missing
                if n in region or not self._may_join(n, split, dropped, "partial")
            }
            lost = {n for n in bound if not self._may_join(n, split, dropped, "partial")}
            if not bad and not lost:
                region |= missing | bound.keys()
                continue
            first = min(bad | lost, key=self.order.__getitem__)
            obstacle = obstacle or first
            if first in bad:
                # the other direction runs in a loop of its own: only what reads these leaves it
                side = first in self.tangent
                late = {n for n in self._late(first) if (n in self.tangent) == side}
            else:
                late = self._late(first, bound[first])
            gone = late & region
            if not gone:
                raise AssertionError(
                    f"{first} lies between nodes of a region and none depends on it"
                )
            dropped |= late
            region -= gone | {n for n in region if gone.intersection(n.all_input_nodes)}
            self._drop_unconnected(region, seed)

    def _may_join(self, node: Node, split: Split, dropped: set[Node], *also: str) -> bool:
        if node in dropped or node in self.taken:
            return False
        return split.status(node) in ("split", "tally", *also)

    def _late(self, *nodes: Node) -> set[Node]:
        """The nodes and all that depends on them."""
        known = [n for n in nodes if n in self.flow]
        return {*nodes, *(d for n in known for d in nx.descendants(self.flow, n))}

    def _bound(self, region: set[Node], split: Split) -> dict[Node, Node]:
        """What has to be in the region because a node of it makes or reads a value that only one
        chunk understands, and that node. Counts may be read outside, as sums."""
        found: dict[Node, Node] = {}
        for node in region:
            for i in self.axes.operands(node):
                if i not in region and split.is_relative(i):
                    found[i] = node
            if split.is_relative(node) and split.status(node) != "tally":
                found |= {u: node for u in node.users if u not in region}
        return found

    def _apart(self, region: set[Node], split: Split, dropped: set[Node]) -> set[Node]:
        """What belongs to nodes of several outputs: these and the nodes that pick one stay
        together."""
        missing: set[Node] = set()
        for node in region:
            if node.target is operator.getitem:
                missing |= set(node.all_input_nodes) - region
            elif isinstance(node.meta.get("val"), (tuple, list)):
                picks = set(node.users) - region
                free = all(self._may_join(p, split, dropped, "partial") for p in picks)
                missing |= picks if free else {node}
        return missing

    def _drop_unconnected(self, region: set[Node], seed: Node) -> None:
        """After a cut, keep what still hangs together with the seed."""
        if seed not in region:
            return
        kept: set[Node] = set()
        stack = [seed]
        while stack:
            node = stack.pop()
            if node in region and node not in kept:
                kept.add(node)
                stack.extend(node.all_input_nodes)
                stack.extend(node.users)
        region &= kept

    def _leaves(self, node: Node, region: set[Node]) -> bool:
        return any(u not in region for u in node.users)

    def _is_inside(self, node: Node, region: set[Node], split: Split) -> bool:
        """Whether the value is in memory without the loop and not with it: no view, no fused value,
        not leaving."""
        if not split.is_split(node) or rules.is_view(node) or self._leaves(node, region):
            return False
        if not (rules.is_pointwise(node) or rules.is_creation(node)):
            return True
        readers = list(node.users)
        while any(rules.is_view(r) for r in readers):
            readers = [u for r in readers for u in (r.users if rules.is_view(r) else (r,))]
        return any(rules.is_matmul(r) or rules.is_attention(r) for r in readers)

    def _absorb(self, region: set[Node], split: Split) -> None:
        """Take in consumers of what leaves while fewer bytes leave for it."""

        def boundary(nodes: set[Node]) -> float:
            leaving = sum(
                split.width(n) for n in nodes if split.is_split(n) and self._leaves(n, nodes)
            )
            entering = {
                i for n in nodes for i in n.all_input_nodes if i not in nodes and split.is_split(i)
            }
            return leaving + sum(split.width(i) for i in entering if not rules.is_creation(i))

        improved = True
        while improved:
            improved = False
            leaving = [n for n in region if split.is_split(n) and self._leaves(n, region)]
            for start in sorted(leaving, key=self.order.__getitem__):
                before = boundary(region)
                grown, front = set(region), [start]
                for _ in range(_LOOKAHEAD):
                    consumers = [
                        u
                        for n in front
                        for u in n.users
                        if u not in grown and u.op == "call_function"
                    ]
                    same_side = all(
                        (u in self.tangent) == (start in self.tangent) for u in consumers
                    )
                    if (
                        not consumers
                        or not same_side
                        or not all(self._joins(u, split) for u in consumers)
                    ):
                        break
                    if any(rules.is_matmul(u) for u in consumers):
                        break  # absorbing is for what can be fused, not for the next layer
                    grown |= set(consumers)
                    grown |= self._views_between(grown, consumers, split)
                    front = [u for u in consumers if split.is_split(u)]
                    if boundary(grown) < before:
                        trial = set(grown)
                        if self._close(trial, start, split) is None and boundary(trial) < before:
                            region |= trial
                            improved = True
                            break
                if improved:
                    break

    def _views_between(self, region: set[Node], readers: list[Node], split: Split) -> set[Node]:
        """Views through which nodes of a region are read by others of it: the other addend."""
        found: set[Node] = set()
        stack = [i for n in readers for i in n.all_input_nodes]
        while stack:
            node = stack.pop()
            if node in region or node in found or not rules.is_view(node):
                continue
            if not self._joins(node, split):
                continue
            (behind,) = node.all_input_nodes[:1]
            stack.append(behind)
            found.add(node)
        # of a chain of views, all or none
        while loose := {n for n in found if n.all_input_nodes[0] not in region | found}:
            found -= loose
        return found

    def _outlet(self, leaving: list[Node], region: set[Node], split: Split) -> Node:
        """The outside reader that keeps the largest value from staying inside."""
        for node in sorted(leaving, key=lambda n: (-nbytes(n.meta["val"]), self.order[n])):
            outside = [u for u in node.users if u not in region]
            named = [u for u in outside if u.op == "call_function" and split.status(u) != "split"]
            if named or outside:
                return (named or outside)[0]
        return next(iter(region))

    def _refuse(self, seed: Node, obstacle: Node, split: Split) -> Refusal:
        status = split.status(obstacle) if obstacle.op == "call_function" else "split"
        if obstacle.op == "output":
            reason = "its value is an output of the graph, so it has to exist as a whole"
        elif obstacle in self.taken:
            reason = f"{op_name(obstacle)} already belongs to another region"
        elif status in ("split", "partial", "whole"):
            reason = (
                f"what leaves through {op_name(obstacle)} is as large as what would stay inside"
            )
        else:
            reason = status
        while obstacle.target is rules.shape.cut:
            obstacle = next(iter(obstacle.users))  # who reads the keys
        where = source_of(obstacle) or "an op without source"
        return Refusal(
            subject=op_name(seed),
            reason=f"{reason} (needed by {op_name(obstacle)} at {where})"
            if obstacle.op == "call_function" and source_of(obstacle) != source_of(seed)
            else reason,
            source=source_of(seed),
            nbytes=nbytes(seed.meta.get("val")),
        )


def find_regions(
    graph: Graph,
    axes: Axes,
    *,
    min_bytes: int,
    min_rows: int = 0,
    all_axes: bool = False,
    loop_axes: LoopAxes = "tokens",
) -> tuple[list[Region], list[Refusal]]:
    """The regions of a graph, largest inside first, and the seeds that became none, with the
    reason.

    Args:
        graph: a functional aten graph, joint or inference.
        axes: its axis analysis.
        min_bytes: smallest value (in float32 at least) that may seed a region, and smallest inside
            that makes one.
        min_rows: rows that a chunk will have at least. An axis of which one position has not many
            more is as good as a finer one.
        all_axes: try every axis of a seed and take the one that keeps most inside, instead of the
            first that gives a region: for small graphs, in which values per token are inputs
            beside the weights, so that the order of axes says little.
        loop_axes: "weights" tries the axes that most weights have (hidden features, heads) before
            tokens, and counts neither these weights nor their gradients against a region;
            "either" tries tokens first, and gives every region what could be `instead` of it.
    """
    return RegionFinder(
        graph,
        axes,
        min_bytes,
        min_rows=min_rows,
        all_axes=all_axes,
        loop_axes=loop_axes,
    ).find()

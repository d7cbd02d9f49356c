"""Which regions become loops, in which mode, and how large their chunks are.

Algorithm
    1. Predict memory over the step (`passes.liveness`). If the peak is below `min_peak_bytes`,
       nothing is done.
    2. Choose every region with values alive at the peak; rewrite; predict again; repeat until no
       further region stands at the peak, and take the first of these plans that is as good as the
       best. A region that is off the peak is left alone, so short sequences run untouched.
    3. Gradient-in-forward where it can be proven (`passes.modes`), recompute otherwise.
    4. Chunk size: as large as adds at most `TRANSIENT_SHARE` to what is left at the peak without
       any chunk alive, and never below the rows at which matrix units are still busy (`min_rows`),
       nor below a `SMALL` share of the peak for which nothing would be done.
       The number of chunks is rounded so that chunks are equal where a divisor is near. In a deep
       model that may be one: what the layer makes is then small beside what all layers keep.
    5. Keep the plan only if the predicted peak falls by at least `MIN_GAIN`.

A plan that is given (`fixed`) is carried out instead: every region that one of its loops was made
of, in that mode and with that chunk.

Chunk sizes are in positions of the loop axis; `min_rows` is in rows of the matrix products (tokens
of all sequences).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch.fx import Graph, Node

from passes import rules
from passes.axes import Axes
from passes.body import Body, BodyError
from passes.chunk import ChunkedGraph, UnorderedLoops, chunk_graph, mutated_inputs
from passes.liveness import analyze_liveness, saved_values, tangent_nodes
from passes.modes import Bodies, gradient_in_forward, recompute
from passes.records import (
    FixedLoop,
    Liveness,
    LoopPlan,
    Mode,
    Plan,
    Refusal,
    Region,
    Rewrite,
)
from passes.source import hint, nbytes, op_name, source_of

TRANSIENT_SHARE = 0.10  # of the peak that stays, how much a chunk may add
MIN_GAIN = 0.05  # of the predicted peak, below which the graph is left alone
WORTH_A_ROUND = 1.02  # of the lowest predicted peak, up to which a plan with fewer loops is better
SMALL = 1 / 8  # of `min_peak_bytes`: a smaller chunk saves nothing that matters, and costs its call
AT_PEAK = 0.02  # of the peak, below which a region counts as off it


@dataclass(frozen=True)
class PlanOptions:
    """What the planner is asked for."""

    min_rows: (
        int  # rows (tokens) per chunk at which matrix products are still efficient on the device
    )
    min_peak_bytes: int  # predicted peak below which a graph is left untouched
    chunk_rows: int | None = None  # rows per chunk, instead of the planner's choice
    gradient_in_forward: bool = True  # False: always recompute
    fixed: tuple[FixedLoop, ...] | None = None  # these loops, and no planning


@dataclass(frozen=True)
class Planned:
    """A plan and the graph that carries it out; `chunked` is None when the graph is left
    untouched."""

    plan: Plan
    chunked: ChunkedGraph | None


def _storage(node: Node) -> Node:
    """The node in whose memory a view is."""
    while node.op == "call_function" and rules.is_view(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _rows_per_position(region: Region) -> int:
    """Rows of the seed's matrix for one position of the loop axis."""
    value = region.seed.meta["val"]
    columns = hint(value.shape[-1]) or 1 if value.dim() else 1
    total = nbytes(value) // value.element_size()
    return max(1, total // max(1, columns) // region.length)


def _kind(region: Region) -> object:
    """What equal layers have in common."""
    seed = region.seed
    return op_name(seed), source_of(seed), nbytes(seed.meta["val"]), bool(region.backward)


def matching(region: Region, fixed: Sequence[FixedLoop]) -> FixedLoop | None:
    """The loop of a plan that was made of such a region: with a backward part or without, and of
    the same length, if there is one."""
    key = op_name(region.seed), source_of(region.seed)
    found = [f for f in fixed if (f.seed, f.source) == key]

    def likeness(one: FixedLoop) -> tuple[bool, bool]:
        both = (one.mode == "forward-only") == (not region.backward)
        return both, one.axis_length == region.length

    return max(found, key=likeness, default=None)


def even_chunk(length: int, wanted: int, least: int) -> int:
    """A chunk of about `wanted` positions, at least `least`: the divisor of `length` nearest to it
    within a factor of two, so that all chunks are equal and one compiled body serves them; else
    chunks as equal as can be."""
    divisors = [length // n for n in range(1, length // max(1, wanted // 2) + 1) if length % n == 0]
    near = [d for d in divisors if d >= least and wanted <= 2 * d and d <= 2 * wanted]
    if near:
        return min(near, key=lambda d: (max(d / wanted, wanted / d), d))
    return math.ceil(length / max(1, math.ceil(length / wanted)))


def left_alone(planned: Planned, reason: str) -> Planned:
    """The same facts, but the graph stays as it is, for a reason."""
    plan = planned.plan
    refusal = Refusal("the graph", reason, "", plan.peak_before - plan.peak_after)
    unchanged = replace(
        plan,
        loops=(),
        rewrites=(),
        refusals=(refusal, *plan.refusals),
        peak_after=plan.peak_before,
        after=plan.before,
    )
    return Planned(unchanged, None)


@dataclass(frozen=True)
class Facts:
    """What the planner knows of one graph."""

    original: Graph  # as it was traced
    graph: Graph  # what is to be planned: `original`, or what earlier passes made of it
    rewrites: tuple[Rewrite, ...]  # what these took out
    axes: Axes  # of `graph`
    regions: list[Region]  # of `graph`, largest inside first
    refusals: list[Refusal]


class _Planner:
    def __init__(
        self, facts: Facts, options: PlanOptions, loop_op: Callable[..., object], lowering: str
    ) -> None:
        self.facts = facts
        self.graph, self.axes, self.regions = facts.graph, facts.axes, facts.regions
        self.refusals = list(facts.refusals)
        self.options = options
        self.loop_op, self.lowering = loop_op, lowering
        self.tangent = tangent_nodes(self.graph)
        self.mutated = mutated_inputs(self.graph)
        self.saved = saved_values(self.graph)
        self.known_bytes: dict[tuple[str, int], int] = {}

    def run(self) -> Planned:
        before = analyze_liveness(self.facts.original)
        if self.options.fixed is not None:
            return self.replay(before, self.options.fixed)
        if before.peak_bytes < self.options.min_peak_bytes:
            return self.untouched(before)
        chosen: dict[LoopPlan, Bodies] = {}
        unlooped = ChunkedGraph(self.graph, ()) if self.facts.rewrites else None
        changed = self.graph is not self.facts.original
        without_loops = analyze_liveness(self.graph) if changed else before
        chunked, now, rest = unlooped, without_loops, list(self.regions)
        rounds: list[tuple[dict[LoopPlan, Bodies], Liveness]] = [({}, now)]
        while True:
            at_peak = self.on_peak(now, rest)
            rest = [r for r in rest if r not in at_peak]
            planned = [p for p in map(self.prepare, at_peak) if p is not None]
            if not planned:
                break
            chosen.update(planned)
            chunked = self.rewrite(chosen)
            floor = analyze_liveness(chunked.graph)
            sized = {p: self.resize(p, b, floor) for p, b in chosen.items()}
            chunked = chunked.resized(sized)
            chosen = {sized[p]: b for p, b in chosen.items()}
            now = self.with_bodies(chunked)
            rounds.append((dict(chosen), now))
        best = WORTH_A_ROUND * min(live.peak_bytes for _, live in rounds)
        kept, now = next(one for one in rounds if one[1].peak_bytes <= best)
        if len(kept) < len(chosen):
            chosen = kept
            chunked = self.rewrite(chosen) if chosen else unlooped
        if chunked is None or now.peak_bytes > (1 - MIN_GAIN) * before.peak_bytes:
            return self.untouched(before)
        return self.planned(chosen, chunked, before, now)

    def replay(self, before: Liveness, fixed: Sequence[FixedLoop]) -> Planned:
        """The loops of an earlier plan, as far as this graph has them."""
        chosen: dict[LoopPlan, Bodies] = {}
        for region in self.regions:
            wanted = matching(region, fixed)
            prepared = None if wanted is None else self.prepare(region, wanted.mode)
            if wanted is None or prepared is None:
                continue
            plan, bodies = prepared
            if plan.mode != wanted.mode and region.backward:  # without, there is one mode
                self.refuse(region, f"the plan wants {wanted.mode}, which is not proven right here")
                continue
            chunk = min(wanted.chunk, region.length)
            number = math.ceil(region.length / chunk)
            chosen[replace(plan, chunk=chunk, num_chunks=number)] = bodies
        if not chosen and not self.facts.rewrites:
            return self.untouched(before)
        chunked = self.rewrite(chosen) if chosen else ChunkedGraph(self.graph, ())
        return self.planned(chosen, chunked, before, self.with_bodies(chunked))

    def planned(
        self,
        chosen: Mapping[LoopPlan, Bodies],
        chunked: ChunkedGraph,
        before: Liveness,
        now: Liveness,
    ) -> Planned:
        start, after = (live.peak_bytes - live.gradient_bytes for live in (before, now))
        refused = self.relevant(before)
        plan = Plan(tuple(chosen), self.facts.rewrites, refused, start, after, before, now)
        return Planned(plan, chunked)

    def untouched(self, before: Liveness) -> Planned:
        start = before.peak_bytes - before.gradient_bytes
        return Planned(Plan((), (), self.relevant(before), start, start, before, before), None)

    def relevant(self, before: Liveness) -> tuple[Refusal, ...]:
        """Refusals large enough to matter; those of equal layers are one."""
        together: dict[tuple[str, str, str], Refusal] = {}
        for one in self.refusals:
            key = one.subject, one.reason, one.source
            known = together.get(key)
            together[key] = one if known is None else replace(one, nbytes=known.nbytes + one.nbytes)
        limit = AT_PEAK * before.peak_bytes
        kept = [r for r in together.values() if r.nbytes >= limit]
        return tuple(sorted(kept, key=lambda r: -r.nbytes))

    def on_peak(self, now: Liveness, regions: list[Region]) -> list[Region]:
        alive: dict[str, int] = {}
        for buffer in now.at(now.peak_step):
            alive[buffer.node] = alive.get(buffer.node, 0) + buffer.nbytes
        # equal layers together: each of a hundred is a small part of the peak
        own = {r: sum(alive.get(n.name, 0) for n in r.nodes) for r in regions}
        together: dict[object, int] = {}
        for region, nbytes_alive in own.items():
            kind = _kind(region)
            together[kind] = together.get(kind, 0) + nbytes_alive
        limit = AT_PEAK * now.peak_bytes
        return [r for r in regions if own[r] and together[_kind(r)] >= limit]

    def prepare(self, region: Region, mode: Mode | None = None) -> tuple[LoopPlan, Bodies] | None:
        """The bodies of a region, in the best mode (or in `mode`, if it can), or a refusal."""
        foreign = frozenset(n for r in self.regions if r is not region for n in r.nodes)
        try:
            bodies = None
            if self.options.gradient_in_forward and mode != "recompute":
                bodies = gradient_in_forward(region, self.axes, self.tangent, foreign)
            bodies = bodies or recompute(region, self.axes, self.tangent, self.saved, foreign)
        except BodyError as error:
            self.refuse(region, str(error))
            return None
        for body in (bodies.forward, bodies.backward):
            read = map(_storage, body.inputs if body else ())
            written = [n for n in read if n in self.mutated]
            if written:
                self.refuse(region, f"its input {written[0].name} is changed in place by the model")
                return None
        return LoopPlan(region, bodies.mode, region.length, 1), bodies

    def refuse(self, region: Region, reason: str, advice: str = "") -> None:
        seed = region.seed
        self.refusals.append(
            Refusal(op_name(seed), reason, source_of(seed), region.inside_bytes, advice)
        )

    def resize(self, plan: LoopPlan, bodies: Bodies, floor: Liveness) -> LoopPlan:
        region = plan.region
        per_row = _rows_per_position(region)
        if self.options.chunk_rows is not None:
            chunk = max(1, min(region.length, self.options.chunk_rows // per_row))
            return replace(plan, chunk=chunk, num_chunks=math.ceil(region.length / chunk))
        per_position = max(
            1,
            *(
                self.body_bytes(b, region) / region.length
                for b in (bodies.forward, bodies.backward)
                if b
            ),
        )
        small = SMALL * self.options.min_peak_bytes / per_position
        least = max(1, self.options.min_rows // per_row, min(round(small), region.length))
        wanted = max(least, int(TRANSIENT_SHARE * floor.peak_bytes / per_position))
        chunk = even_chunk(region.length, min(wanted, region.length), least)
        return replace(plan, chunk=chunk, num_chunks=math.ceil(region.length / chunk))

    def rewrite(self, chosen: dict[LoopPlan, Bodies]) -> ChunkedGraph:
        """The graph with all of `chosen`; those that cannot be ordered leave `chosen`, refused."""
        while True:
            try:
                return chunk_graph(self.graph, self.axes, chosen, self.loop_op, self.lowering)
            except UnorderedLoops as error:
                least = min(error.plans, key=lambda p: p.region.inside_bytes)
                others = [p.region.seed for p in error.plans if p is not least]
                where = source_of(others[0]) if others else ""
                self.refuse(
                    least.region,
                    "its loop needs what another loop makes, which needs what this one makes"
                    + (f" (the other is from {op_name(others[0])} at {where})" if where else ""),
                )
                del chosen[least]

    def with_bodies(self, chunked: ChunkedGraph) -> Liveness:
        """Memory of the rewritten graph, a chunk's body counted where its loop runs."""
        extra: dict[Node, int] = {}
        for loop in chunked.loops:
            share = loop.plan.chunk / loop.plan.region.length
            extra[loop.node] = int(share * self.body_bytes(loop.body, loop.plan.region))
        return analyze_liveness(chunked.graph, lambda n: extra.get(n, 0))

    def body_bytes(self, body: Body, region: Region) -> int:
        """`body_bytes`, once per distinct body."""
        key = (body.spec, region.length)
        if key not in self.known_bytes:
            self.known_bytes[key] = body_bytes(body)
        return self.known_bytes[key]


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
    results = [
        i
        for o in body.outputs
        for i in (o.node.all_input_nodes if o.kind == "matmul" else (o.node,))
        if o.kind != "sum"
    ]
    graph.output(tuple(look(r) for r in results))
    return analyze_liveness(graph).peak_bytes


def make_plan(
    facts: Facts, options: PlanOptions, *, loop_op: Callable[..., object], lowering: str
) -> Planned:
    """Choose regions, modes and chunk sizes for a graph, and rewrite it."""
    return _Planner(facts, options, loop_op, lowering).run()

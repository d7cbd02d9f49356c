"""Which regions become loops, in which mode, and how large their chunks are.

Algorithm
    1. Predict memory over the step (`passes.liveness`). If the peak is below `min_peak_bytes`,
       nothing is done.
    2. Choose every region with values alive at the peak; rewrite; predict again; repeat until no
       further region stands at the peak, and take the first of these plans that is as good as the
       best. A region that is off the peak is left alone, so short sequences run untouched.
    3. Gradient-in-forward where it can be proven (`passes.modes`), recompute otherwise.
    4. Chunk size: as large as adds at most `TRANSIENT_SHARE` to what is left at the peak without
       any chunk alive, and never below the rows at which matrix units are still busy (`min_rows`:
       of each expert, as far as a chunk is small beside their summed gradients; of each head's
       product at least `TILE`), nor below a `SMALL` share of the peak for which nothing would be
       done.
       The number of chunks is rounded so that chunks are equal where a divisor is near. In a deep
       model that may be one: what the layer makes is then small beside what all layers keep.
       Sums over many chunks have second buffers (`passes.groups`); where chunks so large that these
       go take no more memory, they are taken.
    5. Keep the plan only if the predicted peak falls by at least `MIN_GAIN`.
    6. Unless rows per chunk are asked for, loops of one kind along tokens run along an axis of
       weights instead (`loop_axes`), if the predicted peak falls by at least `AXIS_GAIN` more, in
       the same mode, and the step is not predicted to be slower (`passes.cost`). No loop is made
       that would not be made along tokens.
    7. Chunks that still add more than `DOMINANT` to what is left have `fewer_rows`.

With a `tightness` (a memory budget, see `mstc.budget`) the plan is the one that costs least for a
target between the predicted peak without loops (0) and with chunks as small as may be (1): regions
are added only until the target is met, and chunks are as large as it allows.

A plan that is given (`fixed`) is carried out instead: every region that one of its loops was made
of, in that mode and with that chunk.

Chunk sizes are in positions of the loop axis; `min_rows` is in rows of the matrix products (tokens
of all sequences).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch.fx import Graph, Node

from passes import rules
from passes.axes import Axes
from passes.body import Body, BodyError, is_widening
from passes.chunk import ChunkedGraph, UnorderedLoops, chunk_graph, mutated_inputs
from passes.chunks import (
    ChunkMemory,
    chunk_memory,
    even_chunk,
    experts,
    is_batched,
    largest_chunk,
    rows_per_position,
)
from passes.cost import Loop, Machine, Work, flops, work_of
from passes.groups import MANY
from passes.liveness import analyze_liveness, saved_values, tangent_nodes
from passes.modes import Bodies, gradient_in_forward, recompute
from passes.records import (
    FixedLoop,
    Liveness,
    LoopAxes,
    LoopPlan,
    Mode,
    Plan,
    Refusal,
    Region,
    Rewrite,
)
from passes.remade import make_again
from passes.source import nbytes, op_name, source_of

TRANSIENT_SHARE = 0.10  # of the peak that stays, how much a chunk may add
DOMINANT = 0.5  # of the peak that stays: a chunk that adds more has fewer rows than is fast
MIN_GAIN = 0.05  # of the predicted peak, below which the graph is left alone
WORTH_A_ROUND = 1.02  # of the lowest predicted peak, up to which a plan with fewer loops is better
SUMS_SHARE = 1.0  # of what the gradients of experts take while summed, how much a chunk may add
TILE = 64  # rows of each product of a batch, below which it slows down whatever its batch
SMALL = 1 / 16  # of `min_peak_bytes`: a smaller chunk saves nothing that matters, but has its call
AXIS_GAIN = 1 / 8  # of the predicted peak, for another axis: as much as the estimate may be off by
SLOWER = 1.05  # predicted times of two plans of one graph tell themselves apart from here on
AT_PEAK = 0.02  # of the peak, below which a region counts as off it


@dataclass(frozen=True)
class PlanOptions:
    """What the planner is asked for."""

    min_rows: (
        int  # rows (tokens) per chunk at which matrix products are still efficient on the device
    )
    min_peak_bytes: int  # predicted peak below which a graph is left untouched
    fewer_rows: int | None = None  # instead of `min_rows`, where such a chunk would be most of the
    # memory: some time for much memory
    chunk_rows: int | None = None  # rows per chunk, instead of the planner's choice
    gradient_in_forward: bool = True  # False: always recompute
    fixed: tuple[FixedLoop, ...] | None = None  # these loops, and no planning
    tightness: float | None = None  # 0: no loop, 1: the smallest chunks; None: the rule of step 4
    loop_axes: LoopAxes = "tokens"  # as for `passes.regions.find_regions`
    machine: Machine | None = None  # where the step runs, if its cost is known
    least_divisor: int = 1  # makes the least chunk smaller, where `tightness` 1 is not enough

    def __post_init__(self) -> None:
        assert self.tightness is None or 0 <= self.tightness <= 1
        assert self.least_divisor >= 1


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


def _leaves(node: Node) -> bool:
    """Whether the graph returns a value, or a view of it."""
    return any(u.op == "output" or (rules.is_view(u) and _leaves(u)) for u in node.users)


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
        floor=plan.peak_before,
        extra_work=0.0,
        relative_time=1.0,
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


@dataclass(frozen=True)
class Round:
    """Loops that were chosen, the graph with them, and the memory that it takes."""

    chosen: dict[LoopPlan, Bodies]
    chunked: ChunkedGraph
    floor: Liveness  # without any chunk
    live: Liveness


def _lowest(rounds: Sequence[Round]) -> int:
    return min(one.live.peak_bytes for one in rounds)


Sizing = Callable[[LoopPlan, Bodies, ChunkedGraph, Liveness], LoopPlan]
"""Gives a loop its chunks, from the rewritten graph and its memory without any chunk alive."""


def _sized(plan: LoopPlan, chunk: int) -> LoopPlan:
    return replace(plan, chunk=chunk, num_chunks=math.ceil(plan.region.length / chunk))


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
        # wide copies that stay: what they are made of is written to, or they live on anyhow
        self.kept_wide = frozenset(
            n
            for n in self.graph.nodes
            if is_widening(n) and (_storage(n.all_input_nodes[0]) in self.mutated or _leaves(n))
        )
        self.saved = saved_values(self.graph)
        self.known_memory: dict[tuple[str, int], ChunkMemory] = {}
        self.prepared: dict[tuple[Region, Mode | None], tuple[LoopPlan, Bodies] | None] = {}

    def run(self) -> Planned:
        before = self.before
        if self.options.fixed is not None:
            return self.replay(before, self.options.fixed)
        if self.options.tightness is None and before.peak_bytes < self.options.min_peak_bytes:
            return self.untouched(before)
        unlooped = self.unlooped
        if self.options.tightness is None:
            rounds = self.rounds(unlooped, self.rule)
            best = WORTH_A_ROUND * _lowest(rounds)
            worth = (1 - MIN_GAIN) * before.peak_bytes
        else:
            rounds = self.rounds(unlooped, self.least_of)
            lowest = _lowest(rounds)
            share = (lowest / max(unlooped.peak_bytes, 1)) ** self.options.tightness
            target = math.ceil(share * unlooped.peak_bytes)
            if self.options.tightness < 1:
                rounds = self.rounds(unlooped, functools.partial(self.largest, target), target)
            best = max(target, _lowest(rounds))
            worth = before.peak_bytes
        kept = next(one for one in rounds if one.live.peak_bytes <= best)
        if kept.live.peak_bytes > worth or not (kept.chosen or self.facts.rewrites):
            return self.untouched(before)
        if self.options.tightness is None and self.options.chunk_rows is None:
            kept = self.with_fewer_rows(self.along_weights(kept))
        return self.planned(kept, before)

    @functools.cached_property
    def before(self) -> Liveness:
        """Memory of the graph as it was traced."""
        return analyze_liveness(self.facts.original)

    @functools.cached_property
    def unlooped(self) -> Liveness:
        """Memory of the graph that is planned, without loops."""
        changed = self.graph is not self.facts.original
        return analyze_liveness(self.graph) if changed else self.before

    def work(self, chosen: dict[LoopPlan, Bodies]) -> Work:
        """What a step does with these loops."""
        machine = self.options.machine
        return work_of(
            self.facts.original,
            self.before,
            self.unlooped,
            (Loop(p, b, self.chunk_bytes(p, b)) for p, b in chosen.items()),
            self.axes,
            machine.near_nbytes if machine else 0,
        )

    def along_weights(self, made: Round) -> Round:
        """Step 6 of the algorithm."""
        kinds = {_kind(p.region) for p in made.chosen if p.region.instead is not None}
        for kind in sorted(kinds, key=str):
            chosen: dict[LoopPlan, Bodies] = {}
            for plan, bodies in made.chosen.items():
                other = plan.region.instead if _kind(plan.region) == kind else None
                prepared = None if other is None else self.prepare(other, plan.mode)
                if prepared is None or prepared[0].mode != plan.mode:
                    chosen[plan] = bodies
                else:
                    chosen[prepared[0]] = prepared[1]
            changed = self.resized(chosen, self.rule)
            if self.is_slower(changed, made):
                continue
            now, before = (self.while_running(one) for one in (changed, made))
            limit = (1 - AXIS_GAIN) * before.peak_intermediate_bytes
            if now.peak_intermediate_bytes <= limit and now.peak_bytes <= before.peak_bytes:
                made = changed
        return made

    def with_fewer_rows(self, made: Round) -> Round:
        """Step 7 of the algorithm."""
        fewer = self.options.fewer_rows
        if fewer is None:
            return made
        sized: dict[LoopPlan, LoopPlan] = {}
        for plan, bodies in made.chosen.items():
            sized[plan] = plan
            length = plan.region.length
            least = self.least(plan, bodies, fewer)
            large = self.chunk_bytes(plan, bodies) > DOMINANT * made.floor.peak_bytes
            if large and not plan.region.along_weights and least < plan.chunk:
                sized[plan] = _sized(plan, even_chunk(length, min(least, length), least))
        if all(plan is other for plan, other in sized.items()):
            return made
        chosen = {sized[plan]: bodies for plan, bodies in made.chosen.items()}
        return self.round(chosen, made.chunked.resized(sized), made.floor)

    def is_slower(self, one: Round, other: Round) -> bool:
        """Whether the first is predicted to take longer; False where nothing is known."""
        machine = self.options.machine
        if machine is None:
            return False
        now, before = (self.work(r.chosen).relative_time(machine) for r in (one, other))
        return now > SLOWER * before

    def while_running(self, made: Round) -> Liveness:
        """Memory with what a loop makes counted from its first chunk on: sums in low precision have
        buffers in float32, all of them at once."""
        extra = self.of_bodies(made.chunked)
        gradients: dict[str, int] = {}
        for loop in made.chunked.loops:
            results = [n for n in loop.node.users if n.name in made.floor.gradients]
            gradients[loop.node.name] = sum(nbytes(n.meta["val"]) for n in results)
            extra[loop.node.name] += sum(map(nbytes, loop.node.meta["val"]))
        return made.floor.with_transient(extra, gradients)

    def rounds(self, unlooped: Liveness, size: Sizing, enough: int = 0) -> list[Round]:
        """Step 2 of the algorithm, until the predicted peak is `enough` bytes."""
        chosen: dict[LoopPlan, Bodies] = {}
        now, rest = unlooped, list(self.regions)
        found = [Round({}, ChunkedGraph(self.graph, ()), now, now)]
        while now.peak_bytes > enough:
            at_peak = self.on_peak(now, rest)
            rest = [r for r in rest if r not in at_peak]
            planned = [p for p in map(self.prepare, at_peak) if p is not None]
            if not planned:
                break
            chosen.update(planned)
            made = self.resized(chosen, size)
            chosen, now = dict(made.chosen), made.live
            found.append(made)
        return found

    def resized(self, chosen: dict[LoopPlan, Bodies], size: Sizing) -> Round:
        """The graph with all of `chosen` that can be ordered, with chunks as `size` says."""
        chunked = self.rewrite(chosen)
        floor = analyze_liveness(chunked.graph)
        sized = {p: size(p, b, chunked, floor) for p, b in chosen.items()}
        chunked = chunked.resized(sized)
        own = {sized[p]: b for p, b in chosen.items()}
        return self.round(own, chunked, floor)

    def round(
        self, chosen: dict[LoopPlan, Bodies], chunked: ChunkedGraph, floor: Liveness
    ) -> Round:
        """Chunks' bodies are counted where their loops run."""
        live = floor.with_transient(self.of_bodies(chunked))
        return Round(chosen, chunked, floor, live)

    def replay(self, before: Liveness, fixed: Sequence[FixedLoop]) -> Planned:
        """The loops of an earlier plan, as far as this graph has them."""
        chosen: dict[LoopPlan, Bodies] = {}
        for region in self.regions:
            wanted = matching(region, fixed)
            if wanted is not None and wanted.along_weights and region.instead is not None:
                region = region.instead
            prepared = None if wanted is None else self.prepare(region, wanted.mode)
            if wanted is None or prepared is None:
                continue
            plan, bodies = prepared
            if plan.mode != wanted.mode and region.backward:  # without, there is one mode
                self.refuse(region, f"the plan wants {wanted.mode}, which is not proven right here")
                continue
            chosen[_sized(plan, min(wanted.chunk, region.length))] = bodies
        if not chosen and not self.facts.rewrites:
            return self.untouched(before)
        chunked = self.rewrite(chosen) if chosen else ChunkedGraph(self.graph, ())
        floor = analyze_liveness(chunked.graph)
        return self.planned(self.round(chosen, chunked, floor), before)

    def planned(self, made: Round, before: Liveness) -> Planned:
        known = before, made.live, made.floor
        start, after, least = (live.peak_intermediate_bytes for live in known)
        work, machine = self.work(made.chosen), self.options.machine
        plan = Plan(
            loops=tuple(made.chosen),
            rewrites=self.facts.rewrites,
            refusals=self.relevant(before),
            peak_before=start,
            peak_after=after,
            before=before,
            after=made.live,
            floor=least,
            flops=work.flops,
            extra_work=work.extra,
            relative_time=work.relative_time(machine) if machine else None,
        )
        return Planned(plan, made.chunked)

    def untouched(self, before: Liveness) -> Planned:
        start = before.peak_intermediate_bytes
        plan = Plan(
            loops=(),
            rewrites=(),
            refusals=self.relevant(before),
            peak_before=start,
            peak_after=start,
            before=before,
            after=before,
            floor=start,
            flops=sum(map(flops, self.facts.original.nodes)),
            extra_work=0.0,
            relative_time=1.0,
        )
        return Planned(plan, None)

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
        key = region, mode
        if key not in self.prepared:
            self.prepared[key] = self.written(region, mode)
        return self.prepared[key]

    def written(self, region: Region, mode: Mode | None) -> tuple[LoopPlan, Bodies] | None:
        own = {r for r in self.regions if region in (r, r.instead)}
        others = (s for r in self.regions if r not in own for s in (r, r.instead) if s is not None)
        foreign = frozenset(n for other in others for n in other.nodes) | self.kept_wide
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

    def rule(
        self, plan: LoopPlan, bodies: Bodies, chunked: ChunkedGraph, floor: Liveness
    ) -> LoopPlan:
        """Step 4 of the algorithm."""
        length = plan.region.length
        if (asked := self.asked(plan)) is not None:
            return asked
        least = self.least(plan, bodies)
        wanted = max(least, self.most(plan, bodies, TRANSIENT_SHARE * floor.peak_bytes))
        if plan.region.along_weights or self.options.loop_axes == "weights":
            # finer chunks take no longer there (docs/axes.md)
            return _sized(plan, largest_chunk(length, min(wanted, length), least))
        chunk = even_chunk(length, min(wanted, length), least)
        return self.without_groups(_sized(plan, chunk), bodies)

    def without_groups(self, plan: LoopPlan, bodies: Bodies) -> LoopPlan:
        """As few chunks as need no second buffers of sums, where that takes no more memory."""
        length = plan.region.length
        least = math.ceil(length / MANY)
        if plan.chunk >= least:
            return plan
        other = _sized(plan, even_chunk(length, least, least))
        if length % other.chunk and not length % plan.chunk:
            return plan  # its last chunk would have a body of its own

        def needed(one: LoopPlan) -> int:
            second = max((b.groups_nbytes(one.num_chunks) for b in bodies.all), default=0)
            return self.chunk_bytes(one, bodies) + second

        return other if needed(other) <= needed(plan) else plan

    def least_of(
        self, plan: LoopPlan, bodies: Bodies, chunked: ChunkedGraph, floor: Liveness
    ) -> LoopPlan:
        """The smallest chunks."""
        least = self.least(plan, bodies)
        return self.asked(plan) or _sized(plan, largest_chunk(plan.region.length, least, 1))

    def largest(
        self,
        target: int,
        plan: LoopPlan,
        bodies: Bodies,
        chunked: ChunkedGraph,
        floor: Liveness,
    ) -> LoopPlan:
        """The largest chunks with which memory stays below `target` while the loops run."""
        length, least = plan.region.length, self.least(plan, bodies)
        most = length
        for loop in chunked.loops:
            if loop.plan is plan:
                room = target - floor.live_bytes[floor.steps.index(loop.node.name)]
                memory = self.memory(loop.body, plan.region)
                room -= loop.body.groups_nbytes(-(-length // max(1, memory.most(room))))
                most = min(most, memory.most(room))
        return self.asked(plan) or _sized(plan, largest_chunk(length, most, min(least, length)))

    def asked(self, plan: LoopPlan) -> LoopPlan | None:
        """The chunk that the user asked for, if any."""
        if self.options.chunk_rows is None:
            return None
        region = plan.region
        chunk = max(1, self.options.chunk_rows // rows_per_position(region, self.axes))
        return _sized(plan, min(region.length, chunk))

    def least(self, plan: LoopPlan, bodies: Bodies, min_rows: int | None = None) -> int:
        """The fewest positions per chunk; `min_rows` instead of that of the options."""
        region, divisor = plan.region, self.options.least_divisor
        small = self.most(plan, bodies, SMALL * self.options.min_peak_bytes)
        rows = min_rows or self.options.min_rows
        least = rows // rows_per_position(region, self.axes)
        if (shared := experts(region, self.axes)) > 1:
            # every expert gets its part of a chunk's rows, but its whole gradient is added to
            sums = max(b.sums_nbytes for b in bodies.all)
            fast = shared * rows // rows_per_position(region, self.axes)
            least = max(least, min(fast, self.most(plan, bodies, SUMS_SHARE * sums)))
        elif is_batched(region, self.axes):
            least = max(least, min(TILE, rows))
        return max(1, min(least, region.length) // divisor, small // divisor)

    def most(self, plan: LoopPlan, bodies: Bodies, room: float) -> int:
        """The most positions of a chunk that needs no more than `room` bytes, in any body."""
        found = (self.memory(b, plan.region).most(room) for b in bodies.all)
        return min(found, default=plan.region.length)

    def rewrite(self, chosen: dict[LoopPlan, Bodies]) -> ChunkedGraph:
        """The graph with all of `chosen`; those that cannot be ordered leave `chosen`, refused."""
        while True:
            try:
                made = chunk_graph(self.graph, self.axes, chosen, self.loop_op, self.lowering)
                make_again(made.graph)
                return made
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

    def of_bodies(self, chunked: ChunkedGraph) -> dict[str, int]:
        """Bytes of a chunk's body, by the name of its loop."""
        extra: dict[str, int] = {}
        for loop in chunked.loops:
            one = self.memory(loop.body, loop.plan.region).of(loop.plan.chunk)
            extra[loop.node.name] = one + loop.body.groups_nbytes(loop.plan.num_chunks)
        return extra

    def chunk_bytes(self, plan: LoopPlan, bodies: Bodies) -> int:
        """Bytes that a chunk of a loop needs, in its larger body."""
        return max((self.memory(b, plan.region).of(plan.chunk) for b in bodies.all), default=0)

    def memory(self, body: Body, region: Region) -> ChunkMemory:
        """`chunk_memory`, once per distinct body."""
        key = (body.spec, region.length)
        if key not in self.known_memory:
            self.known_memory[key] = chunk_memory(body, self.axes, region.length)
        return self.known_memory[key]


def make_plan(
    facts: Facts, options: PlanOptions, *, loop_op: Callable[..., object], lowering: str
) -> Planned:
    """Choose regions, modes and chunk sizes for a graph, and rewrite it."""
    return _Planner(facts, options, loop_op, lowering).run()


def predict_times(
    facts: Facts,
    options: Sequence[PlanOptions],
    *,
    loop_op: Callable[..., object],
    lowering: str,
) -> list[float | None]:
    """The predicted time of each plan; options differ in `tightness` alone."""
    planner = _Planner(facts, options[0], loop_op, lowering)
    found: list[float | None] = []
    for one in options:
        planner.options = one  # bodies do not depend on it
        found.append(planner.run().plan.relative_time)
    return found

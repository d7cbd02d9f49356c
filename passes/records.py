"""The nouns: frozen values that travel between passes.

`Phase` says when a node runs, `Buffer` and `Liveness` what memory holds, `Region` what may become a
loop, `Refusal` why something may not, `LoopPlan` and `Plan` what will be done.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from torch.fx import Node

Phase = Literal["forward", "backward"]
Mode = Literal["recompute", "gradient-in-forward", "forward-only"]
LoopAxes = Literal["tokens", "weights", "either"]


@dataclass(frozen=True)
class Buffer:
    """One stretch of memory that holds a value."""

    node: str  # name of the node whose value it holds
    op: str  # the op that made it
    nbytes: int
    born: int  # step (index of the node in the schedule) at which it is made
    dies: int  # last step at which it is read
    source: str  # "file:line  code" of the user, or ""

    def __post_init__(self) -> None:
        assert self.born <= self.dies
        assert self.nbytes >= 0


@dataclass(frozen=True)
class Liveness:
    """Who is alive when. Graph inputs (parameters, batch, tangents) are not counted."""

    buffers: tuple[Buffer, ...]
    steps: tuple[str, ...]  # node names in schedule order
    live_bytes: tuple[int, ...]  # bytes alive during each step
    output_bytes: int  # bytes of the graph's outputs that are no inputs: loss and gradients
    gradient_bytes: tuple[int, ...]  # of `live_bytes`, those of `gradients`
    gradients: frozenset[str]  # outputs that depend on a tangent, by the node that makes them

    @property
    def peak_step(self) -> int:
        return max(range(len(self.live_bytes)), key=self.live_bytes.__getitem__, default=0)

    @property
    def peak_bytes(self) -> int:
        """The most bytes alive at one step, gradients included."""
        return max(self.live_bytes, default=0)

    @property
    def peak_intermediate_bytes(self) -> int:
        """The most bytes alive at one step that are no gradients: what `mstc.measure_peak` calls
        `peak_intermediate_nbytes`."""
        both = zip(self.live_bytes, self.gradient_bytes, strict=True)
        return max((live - gradients for live, gradients in both), default=0)

    @property
    def peak_node(self) -> str:
        return self.steps[self.peak_step] if self.steps else ""

    def with_transient(
        self, extra: Mapping[str, int], gradients: Mapping[str, int] | None = None
    ) -> Liveness:
        """The same, with what nodes take while they run beside their inputs and outputs.

        Args:
            extra: bytes by name of the node (of a loop: what its body takes).
            gradients: of these, those of gradients.
        """

        def added(known: tuple[int, ...], more: Mapping[str, int]) -> tuple[int, ...]:
            return tuple(n + more.get(s, 0) for s, n in zip(self.steps, known, strict=True))

        return replace(
            self,
            live_bytes=added(self.live_bytes, extra),
            gradient_bytes=added(self.gradient_bytes, gradients or {}),
        )

    def at(self, step: int) -> tuple[Buffer, ...]:
        """The buffers alive at a step, largest first."""
        alive = [b for b in self.buffers if b.born <= step <= b.dies]
        return tuple(sorted(alive, key=lambda b: (-b.nbytes, b.born)))


@dataclass(frozen=True)
class Refusal:
    """Something that was not done, and why."""

    subject: str  # the op or value in question
    reason: str  # one sentence
    source: str  # "file:line  code" of the user, or ""
    nbytes: int = 0  # memory that stays because of it
    advice: str = ""  # the way out, if there is one

    def __str__(self) -> str:
        where = f" at {self.source}" if self.source else ""
        advice = f" {self.advice}" if self.advice else ""
        return f"{self.subject}{where}: {self.reason}.{advice}"


@dataclass(frozen=True)
class Rewrite:
    """A value that the graph no longer needs, and why; no loop is involved."""

    subject: str  # the op that made the value
    reason: str  # one sentence
    source: str  # "file:line  code" of the user, or ""
    nbytes: int  # of the value


@dataclass(frozen=True)
class Region:
    """A convex set of nodes, split along one axis, whose inside is much larger than its
    boundary."""

    axis: int  # the loop axis (a root of the axis table)
    length: int  # size of the axis, by its hint where symbolic
    forward: frozenset[Node]  # nodes that no tangent reaches
    backward: frozenset[Node]  # nodes that depend on a tangent; empty in an inference graph
    seed: Node  # the widest node
    inside_bytes: int  # bytes that the loop keeps from being alive at once
    along_weights: bool = False  # whether it is another one's `instead`
    instead: Region | None = None  # from the same seed along an axis of weights, if looked for

    @property
    def nodes(self) -> frozenset[Node]:
        return self.forward | self.backward


@dataclass(frozen=True)
class LoopPlan:
    """How one region is to run."""

    region: Region
    mode: Mode
    chunk: int  # size of a chunk along the axis, in positions
    num_chunks: int

    def __post_init__(self) -> None:
        assert self.chunk >= 1
        assert self.num_chunks >= 1


@dataclass(frozen=True)
class FixedLoop:
    """A loop of an earlier plan, to be made again."""

    seed: str  # op of the widest node
    source: str  # "file:line  code" of the user
    mode: Mode
    axis_length: int  # positions, when it was planned
    chunk: int  # positions
    along_weights: bool = False  # whether the axis is one of weights, tried beside tokens

    def __post_init__(self) -> None:
        assert self.chunk >= 1
        assert self.mode in get_args(Mode)

    def __str__(self) -> str:
        return f"{self.seed} at {self.source}" if self.source else self.seed


@dataclass(frozen=True)
class Plan:
    """What is to be done with one graph."""

    loops: tuple[LoopPlan, ...]
    rewrites: tuple[Rewrite, ...]
    refusals: tuple[Refusal, ...]
    peak_before: int  # predicted bytes, gradients not counted
    peak_after: int  # predicted bytes, gradients not counted
    before: Liveness = field(repr=False)
    after: Liveness = field(repr=False)
    floor: int  # predicted bytes of these loops with chunks of nothing, gradients not counted
    flops: int  # of products, attention and convolutions in a step without loops
    extra_work: float  # multiplications done once more, as a share of all that the step needs
    relative_time: float | None  # predicted, of the step without loops; None: not known

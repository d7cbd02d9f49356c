"""How a region can run: recompute, gradient-in-forward, or forward only.

recompute            the forward loop makes the region's values, the backward loop makes them again,
                     chunk by chunk.
gradient-in-forward  when the only tangent that reaches the region is one scalar (a loss), forward
                     and backward part run in one loop, with the tangent set to one; the backward
                     multiplies by it. Nothing is computed twice.
forward-only         an inference graph.

Gradient-in-forward needs a proof that every gradient is linear in the tangent (`passes.linear`).
The tangent's own way to the region (a division by the number of labels) is walked in the forward
with a one in its place, so that with the usual ``loss.backward()``, whose tangent is one, the
numbers are those of the unchunked graph and the final product is exact.

Source: gradient-in-forward is what fused linear-cross-entropy kernels do (Liger Kernel, Hsu et al.
    2024); here it is
found and proven per graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from passes import rules
from passes.axes import Axes
from passes.body import Body, BodyError, build_body
from passes.linear import is_linear_in
from passes.liveness import is_fusible
from passes.records import Mode, Region
from passes.source import hint, nbytes

_LONG_RANGE = 1e30  # float16 and float8 end far below, bfloat16 and float32 do not
_MAX_PRELUDE = 4  # large pointwise values that are computed again rather than one of them kept


@dataclass(frozen=True)
class Bodies:
    """The loops of one region. `forward` is None when nothing outside reads a forward value."""

    mode: Mode
    forward: Body | None
    backward: Body | None  # None but for recompute
    tangent: Node | None = None  # gradient-in-forward: the scalar tangent to multiply by
    chain: tuple[
        Node, ...
    ] = ()  # gradient-in-forward: scalars between the tangent and the region, in order

    @property
    def all(self) -> tuple[Body, ...]:
        return tuple(b for b in (self.forward, self.backward) if b is not None)


def region_outputs(region: Region, tangent: set[Node]) -> tuple[list[Node], list[Node]]:
    """The values that outside nodes read, forward and backward, in graph order."""
    nodes = region.nodes
    leaving = [n for n in nodes if any(u not in nodes for u in n.users)]
    order = {n: i for i, n in enumerate(next(iter(nodes)).graph.nodes)}
    leaving.sort(key=order.__getitem__)
    return [n for n in leaving if n not in tangent], [n for n in leaving if n in tangent]


def _scalar_chain(sources: list[Node], tangent: set[Node]) -> tuple[Node, tuple[Node, ...]] | None:
    """The one scalar tangent behind `sources`, and the scalars on the way, or None."""
    chain: list[Node] = []
    roots: set[Node] = set()
    seen: set[Node] = set()

    def visit(node: Node) -> bool:
        if node in seen or node not in tangent:
            return True
        seen.add(node)
        value = node.meta.get("val")
        if getattr(value, "numel", lambda: 0)() != 1:
            return False
        if node.op == "placeholder":
            roots.add(node)
            return True
        if not all(visit(i) for i in node.all_input_nodes):
            return False
        chain.append(node)
        return True

    if not all(visit(s) for s in sources) or len(roots) != 1:
        return None
    return roots.pop(), tuple(chain)


def _has_short_range(node: Node) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return False
    return torch.finfo(value.dtype).max < _LONG_RANGE


def _depends_on(nodes: list[Node], made: set[Node]) -> bool:
    seen: set[Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node in made:
            return True
        if node not in seen:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return False


def gradient_in_forward(
    region: Region, axes: Axes, tangent: set[Node], foreign: frozenset[Node]
) -> Bodies | None:
    """One loop for both directions, or None when it cannot be proven right."""
    if not region.backward:
        return None
    forward, backward = region_outputs(region, tangent)
    try:
        body = build_body(
            [*forward, *backward],
            axes=axes,
            axis=region.axis,
            inside=region.nodes,
            tangent=tangent,
            seed=region.seed,
            foreign=foreign,
        )
    except BodyError:
        return None  # two loops may still do
    sources = [n for n in body.inputs if n in tangent]
    found = _scalar_chain(sources, tangent)
    if found is None:
        return None
    root, chain = found
    if any(hint(s) is None for s in getattr(root.meta["val"], "shape", ())):
        return None
    made = set(forward)
    others = [n for n in body.inputs if n not in tangent]
    side = [i for n in chain for i in n.all_input_nodes if i not in tangent]
    if _depends_on(others + side, made):
        return None  # a loop cannot read what it makes
    if not is_linear_in(root, [*chain, *body.work]):
        return None
    if any(n in tangent and _has_short_range(n) for n in [*chain, *body.work, *backward]):
        return None  # a tangent that scales the loss keeps small gradients from vanishing
    return Bodies("gradient-in-forward", body, None, root, chain)


def _prelude(region: Region, tangent: set[Node], saved: frozenset[Node]) -> frozenset[Node]:
    """Pointwise values that only the region reads, and that are made from values which live until
    the backward anyhow (the output of a normalisation, made from the residual stream): computed
    again inside, they need not be kept.

    A prelude is short. Where the stream itself is only a sum of what earlier layers kept, it is not
    computed again from there, or every layer would have a longer body than the one before."""
    nodes = region.nodes
    found: set[Node] = set()

    def remake(node: Node, least: int, budget: int, made: set[Node]) -> set[Node] | None:
        """The nodes to compute again for `node`, or None where that would keep something new
        alive, or needs more than `budget` values of at least `least` bytes."""
        if node.op == "placeholder" or (made and node in saved):
            return set()
        if not (is_fusible(node) or rules.is_view(node)):
            return None
        own = {node}
        budget -= not rules.is_view(node) and nbytes(node.meta["val"]) >= least
        if budget < 0 or len(made) > 8 * _MAX_PRELUDE:
            return None
        for i in node.all_input_nodes:
            below = remake(i, least, budget, made | own)
            if below is None:
                if not (made and _read_elsewhere(i, nodes, made | own)):
                    return None
                below = set()  # it is there for its other readers
            budget -= sum(
                not rules.is_view(n) and nbytes(n.meta["val"]) >= least for n in below - own
            )
            own |= below
        return own

    for node in nodes:
        for i in node.all_input_nodes:
            while rules.is_view(i) and i not in nodes:
                i = i.all_input_nodes[0]
            if i in nodes or i in tangent or not is_fusible(i) or i not in saved:
                continue
            if not _read_inside_only(i, nodes):
                continue
            least = nbytes(i.meta["val"]) // 2
            found |= remake(i, least, _MAX_PRELUDE, set()) or set()
    return frozenset(found)


def _read_elsewhere(node: Node, nodes: frozenset[Node], made: set[Node]) -> bool:
    return any(u not in nodes and u not in made for u in node.users)


def _read_inside_only(node: Node, nodes: frozenset[Node]) -> bool:
    return all(u in nodes or (rules.is_view(u) and _read_inside_only(u, nodes)) for u in node.users)


def recompute(
    region: Region,
    axes: Axes,
    tangent: set[Node],
    saved: frozenset[Node],
    foreign: frozenset[Node],
) -> Bodies:
    """Two loops; the backward's body computes again what it needs of the forward."""
    forward, backward = region_outputs(region, tangent)
    prelude = _prelude(region, tangent, saved) if backward else frozenset[Node]()

    def body(outputs: list[Node], inside: frozenset[Node]) -> Body | None:
        if not outputs:
            return None
        return build_body(
            outputs,
            axes=axes,
            axis=region.axis,
            inside=inside,
            tangent=tangent,
            seed=region.seed,
            prelude=prelude,
            foreign=foreign,
        )

    return Bodies(
        "recompute" if region.backward else "forward-only",
        body(forward, region.forward),
        body(backward, region.nodes),
    )

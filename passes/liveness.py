"""Who is alive when: bytes of every tensor over the schedule, and where the peak is.

Terms
    schedule      the nodes in graph order, forward before backward.
    storage       what a view shares with its base; views have no bytes of their own.
    fused value   the value of a pointwise op: a code generator computes it where it is read, so it
                  has bytes only where something reads it that cannot be fused into (a matrix
                  product, an attention kernel, an output).
    saved value   a forward value that lives until the backward reads it.

Algorithm
    1. Nodes that tangent-free outputs need run forward, the others backward.
    2. A fused value is real, once per phase, when a non-fusible op or an output reads it in that
       phase.
    3. A forward value that the backward reads is saved; or made again, if only fusible ops read it
       there and all it is made from is saved anyhow (what AOTAutograd's partitioner decides with a
       min-cut, by a rule of thumb here), or if it is told to (`passes.remade`).
    4. A buffer lives from its maker to its last reader, which may write its result in place if it
       is pointwise; bytes are summed per step.
    5. In a loop's body (`fused`), fused values of one size that read a buffer in common are made by
       one kernel, when the first of them is needed; all may take the places of what it reads last
       (`mstc.inplace`).

The partitioner and Inductor's scheduler have the last word on both, so figures are estimates; tests
hold them against measured peaks. Not handled: buffers that a kernel library allocates inside an op;
padding of the allocator.

Source: `torch._functorch.partitioners.min_cut_rematerialization_partition`,
    `torch._inductor.memory`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from itertools import accumulate

import torch
from torch.fx import Graph, Node

from passes import rules
from passes.records import Buffer, Liveness, Phase
from passes.source import nbytes, op_name, packet_of, source_of

_NEGLIGIBLE = 32  # a source this many times smaller than the value is never worth a decision
_MANY_REAL = 64  # values that a body keeps, beyond which it is not asked which kernels make them
_LONG = 8  # values of its size that are computed on the way to one that is made again
REMADE = "mst_remade"  # in a node's meta: it is made again in the backward (`passes.remade`)


def output_nodes(graph: Graph) -> list[Node]:
    """The tensors that the graph returns, without None."""
    (output,) = graph.find_nodes(op="output")
    found: list[Node] = []
    torch.fx.map_arg(output.args[0], found.append)
    return found


def tangent_nodes(graph: Graph) -> set[Node]:
    """The nodes that depend on a tangent (the backward's own inputs)."""
    reached: set[Node] = set()
    for node in graph.nodes:
        if node.op == "output":
            continue
        if node.op == "placeholder":
            if str(node.target).startswith("tangents"):
                reached.add(node)
        elif any(i in reached for i in node.all_input_nodes):
            reached.add(node)
    return reached


def phases(graph: Graph) -> dict[Node, Phase]:
    """When every node runs: forward if an output without tangents needs it."""
    tangent = tangent_nodes(graph)
    if not tangent:
        return dict.fromkeys(graph.nodes, "forward")
    needed: set[Node] = set()
    stack = [n for n in output_nodes(graph) if n not in tangent]
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack.extend(node.all_input_nodes)
    return {n: "forward" if n in needed else "backward" for n in graph.nodes}


_FUSED = {
    torch.ops.aten.select_scatter,  # a comparison of positions
    torch.ops.aten.empty,  # of which nobody reads a value
    torch.ops.aten.new_empty_strided,
}


def is_fusible(node: Node) -> bool:
    """Whether a code generator computes the value where it is read."""
    if node.op != "call_function":
        return False
    if packet_of(node) is torch.ops.aten.scatter:
        # one value per row into a constant (the backward of a cross entropy) becomes a comparison
        # with the index
        base = node.args[0]
        return isinstance(base, Node) and rules.is_creation(base)
    if packet_of(node) in _FUSED:
        return True
    return rules.is_pointwise(node) or rules.is_creation(node)


class _Builder:
    def __init__(
        self, graph: Graph, *, fused: bool = False, copied: frozenset[Node] = frozenset()
    ) -> None:
        self.graph = graph
        self.copied = copied
        self.fused = fused
        self.order = {n: i for i, n in enumerate(graph.nodes)}
        self.phase = phases(graph)
        if fused:  # a body has no forward and backward: it runs as one
            for node in graph.nodes:
                self.phase[node] = "forward"
        self.outputs = set(output_nodes(graph))
        self.uses: dict[
            tuple[Node, Phase], tuple[int, int]
        ] = {}  # (value, phase made) -> first, last step
        self.kernel: dict[Node, Node] = {}  # of a body: fused value -> the first of its kernel
        self.saved: set[Node] = set()

    def root(self, node: Node) -> Node:
        """The node whose storage this value is in."""
        while node.op == "call_function" and rules.is_view(node) and node.all_input_nodes:
            node = node.all_input_nodes[0]
        return node

    def readers(self, node: Node) -> Iterable[Node]:
        """Who reads the value, through views."""
        for user in node.users:
            if user.op == "call_function" and rules.is_view(user):
                yield from self.readers(user)
                if user in self.outputs:
                    yield from (u for u in user.users if u.op == "output")
            else:
                yield user

    def sources(self, node: Node, phase: Phase) -> set[Node]:
        """The values in memory that a fused value is computed from, in one phase."""
        found: set[Node] = set()
        seen: set[Node] = set()
        stack = list(node.all_input_nodes)
        while stack:
            root = self.root(stack.pop())
            if root in seen:
                continue
            seen.add(root)
            if (
                not is_fusible(root)
                or root in self.saved
                or ((root, phase) in self.uses and self.phase[root] == phase)
            ):
                found.add(root)
            else:
                stack.extend(root.all_input_nodes)
        return found

    def touch(self, node: Node, phase: Phase, step: int) -> None:
        given = node.op == "placeholder" and node not in self.copied
        if given or not isinstance(node.meta.get("val"), torch.Tensor):
            return
        made = self.phase[node] if (not is_fusible(node) or node in self.saved) else phase
        late = made != self.phase[node] or (self.fused and is_fusible(node))
        born = step if late else self.order[node]
        first, last = self.uses.get((node, made), (born, born))
        self.uses[(node, made)] = (min(first, step, born), max(last, step))

    def decide_saved(self) -> None:
        """Forward values that stay in memory until the backward (step 3 of the algorithm)."""
        for node in self.graph.nodes:
            if node.op != "call_function" or self.phase[node] != "forward" or rules.is_view(node):
                continue
            late = [
                r for r in self.readers(node) if self.phase[r] == "backward" and r.op != "output"
            ]
            if not late or REMADE in node.meta:
                continue
            fuses = is_fusible(node) and all(is_fusible(r) or rules.is_reduction(r) for r in late)
            if not fuses or self.unsaved_sources(node):
                self.saved.add(node)

    def unsaved_sources(self, node: Node) -> list[Node]:
        """What would have to be saved so that a fused value can be made again."""
        size = nbytes(node.meta.get("val"))
        return [
            s
            for s in self.sources(node, "forward")
            if s not in self.saved
            and s.op != "placeholder"
            and nbytes(s.meta.get("val")) * _NEGLIGIBLE > size
        ]

    def length(self, node: Node) -> int:
        """How many values of its size are computed on the way to a fused value, from saved ones."""
        size = nbytes(node.meta["val"])
        seen: set[Node] = set()
        stack = [node]
        while stack:
            root = self.root(stack.pop())
            known = root in seen or (root is not node and root in self.saved)
            if known or not is_fusible(root) or 2 * nbytes(root.meta.get("val")) < size:
                continue
            seen.add(root)
            stack.extend(root.all_input_nodes)
        return len(seen)

    def run(self) -> Liveness:
        self.decide_saved()
        for node in self.graph.nodes:
            step = self.order[node]
            if node.op == "output" or (node.op == "call_function" and rules.is_view(node)):
                continue
            if node.op == "call_function":
                if not is_fusible(node):
                    self.touch(node, self.phase[node], step)
                    for operand in map(self.root, node.all_input_nodes):
                        self.read(operand, self.phase[node], step, real=self.reads_memory(node))
                elif node in self.saved:
                    self.touch(node, "forward", step)
                    self.read(node, "forward", step, real=False)
                elif self.phase[node] == "backward":
                    pass  # read where it is used
        last = len(self.order) - 1
        for node in self.outputs:
            root = self.root(node)
            if root.op != "placeholder" or root in self.copied:
                phase = self.phase[root]
                self.read(root, phase, last if self.fused else self.order[root], real=True)
                self.touch(root, phase, last)
        return self.finish()

    def read(self, value: Node, phase: Phase, step: int, *, real: bool) -> None:
        """`value` is read at `step`: itself if it is in memory (or must be), else what it is made
        from."""
        if not is_fusible(value):
            self.touch(value, phase, step)
            return
        if value in self.saved and step != self.order[value]:
            self.touch(value, "forward", step)
            return
        if self.fused and not real and (value, phase) in self.uses:
            self.touch(value, phase, step)
            return
        if real:
            made = (value, phase) in self.uses
            beside = self.beside(value, phase, step) if self.fused and not made else []
            self.touch(value, phase, step)
            if made:
                return  # read where it already is
            step = self.uses[(value, phase)][0]
            for other in beside:
                self.kernel[other] = self.kernel.setdefault(value, value)
                self.read(other, phase, step, real=True)
        for source in self.sources(value, phase):
            self.touch(source, phase, step)

    def beside(self, value: Node, phase: Phase, step: int) -> list[Node]:
        """The fused values that the kernel of `value` makes as well."""
        if len(self.real) > _MANY_REAL:
            return []
        size, own = nbytes(value.meta["val"]), self.sources(value, phase)
        return [
            other
            for other in self.real
            if other is not value
            and (other, phase) not in self.uses
            and nbytes(other.meta["val"]) == size
            and not own.isdisjoint(sources := self.sources(other, phase))
            and all(s.op == "placeholder" or self.order[s] < step for s in sources)
        ]

    @functools.cached_property
    def real(self) -> list[Node]:
        """Fused values that have bytes, since not only a code generator reads them."""
        return [
            node
            for node in self.graph.nodes
            if is_fusible(node)
            and (
                node in self.outputs
                or any(not is_fusible(r) and self.reads_memory(r) for r in self.readers(node))
            )
        ]

    def reads_memory(self, node: Node) -> bool:
        """Whether what a node that is not fusible reads must have bytes; the code of a reduction
        computes it."""
        computed = rules.is_reduction(node)
        return not (computed or (self.fused and packet_of(node) is torch.ops.aten.gather))

    def reuse_in_place(self) -> None:
        """A pointwise result takes the place of an operand of its size that dies with it."""
        read: dict[tuple[Node, Phase], set[Node]] = {}  # by a kernel
        made = [key for key in self.uses if is_fusible(key[0])]
        for node, phase in made:
            kernel = self.kernel.get(node, node), phase
            read.setdefault(kernel, set()).update(self.sources(node, phase))
        for node, phase in made:
            first, _ = self.uses[node, phase]
            sources = read[self.kernel.get(node, node), phase]
            for source in sorted(sources, key=self.order.__getitem__):
                keys: list[tuple[Node, Phase]] = [(source, phase), (source, self.phase[source])]
                known = (k for k in keys if k in self.uses and source not in self.copied)
                key = next(known, None)
                if key is None or source in self.outputs or source is node:
                    continue
                start, end = self.uses[key]
                if (
                    end == first
                    and start < end
                    and nbytes(source.meta["val"]) == nbytes(node.meta["val"])
                ):
                    self.uses[key] = (start, end - 1)
                    break

    def finish(self) -> Liveness:
        self.reuse_in_place()
        tangent = tangent_nodes(self.graph)
        made = [n for n in map(self.root, self.outputs) if n.op != "placeholder"]
        gradients = {n for n in made if n in tangent}
        buffers: list[Buffer] = []
        delta, delta_gradients = [0] * (len(self.order) + 1), [0] * (len(self.order) + 1)
        for (node, _), (first, last) in self.uses.items():
            size = nbytes(node.meta["val"])
            if size:
                buffers.append(Buffer(node.name, op_name(node), size, first, last, source_of(node)))
                for sums in (delta, delta_gradients) if node in gradients else (delta,):
                    sums[first] += size
                    sums[last + 1] -= size
        buffers.sort(key=lambda b: (b.born, b.node))
        steps = tuple(n.name for n in self.order)
        return Liveness(
            buffers=tuple(buffers),
            steps=steps,
            live_bytes=tuple(accumulate(delta))[: len(steps)],
            output_bytes=sum(nbytes(n.meta.get("val")) for n in set(made)),
            gradient_bytes=tuple(accumulate(delta_gradients))[: len(steps)],
            gradients=frozenset(n.name for n in gradients),
        )


def saved_values(graph: Graph) -> frozenset[Node]:
    """Forward values that stay in memory until the backward, by the rule of thumb above."""
    builder = _Builder(graph)
    builder.decide_saved()
    return frozenset(builder.saved)


def saved_beside_sources(graph: Graph) -> tuple[list[Node], frozenset[Node]]:
    """Saved values that a few pointwise ops make of what is saved as well, or of graph inputs, and
    all saved values; of the first, those much smaller than the largest saved value are left out."""
    builder = _Builder(graph)
    builder.decide_saved()
    sizes = {n: nbytes(n.meta.get("val")) for n in builder.saved}
    least = max(sizes.values(), default=0) / _NEGLIGIBLE
    kept = {builder.root(n) for n in builder.outputs}
    found = [
        node
        for node, size in sizes.items()
        if size >= least
        and node not in kept
        and is_fusible(node)
        and not builder.unsaved_sources(node)
        and builder.length(node) <= _LONG
    ]
    return found, frozenset(builder.saved)


def analyze_liveness(
    graph: Graph, *, fused: bool = False, copied: frozenset[Node] = frozenset()
) -> Liveness:
    """Bytes alive at every step of a joint (or inference) graph.

    Args:
        graph: a functional aten graph with fake values in ``meta["val"]``.
        fused: whether it is a loop's body, whose kernels write over what they read last.
        copied: inputs that are given as copies made for this graph, which count until they are
            read last.
    """
    return _Builder(graph, fused=fused, copied=copied).run()

"""What equal layers do between their loops is compiled once.

A model of many equal layers repeats the same ops, and a compiler that takes its graph as one lowers
them as often. Loops have one body for all layers already; this pass does the same with what is
between loops. It works on the graphs of the forward and of the backward, behind the partitioner:
before, what the backward computes again could not be told.

Terms
    barrier  a node that stays by itself: a loop, and any op that is not functional.
    run      the ops between two barriers.
    operand  a value from outside that a run reads; result: a value of it that is read outside.

Algorithm
    1. Cut the graph at barriers. Getitems of a barrier belong to it.
    2. Views that are read outside a run are made outside: a result is memory of its own.
    3. Runs with the same ops, in the same order, on operands of the same layouts, with the same
       results, are one subgraph; every run is a call of it (`invoke_subgraph`).

Since loops end fusion anyway, nothing is fused less than before.

Not handled: open sizes, ops that draw from the generator, graphs with subgraphs of their own.

Source: the op is that of `torch.compiler.nested_compile_region`.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import Graph, GraphModule, Node

from passes import rules
from passes.copies import copy_node
from passes.rules.arguments import argument

_CALL = torch.ops.higher_order.invoke_subgraph
NAME = "mst_shared"
MIN_RUNS = 3  # equal ones
MIN_OPS = 8  # of a run
_ALIGNMENT = 16  # bytes: what Triton's kernels ask whether a tensor begins at a multiple of
_MAYBE_VIEWS = {  # by their arguments, which their schemas do not say
    torch.ops.aten.contiguous,
    torch.ops.aten._to_copy,
    torch.ops.aten.lift_fresh,
    torch.ops.prims.device_put,
}


@dataclass(frozen=True)
class _Run:
    nodes: tuple[Node, ...]  # in order; the call stands where the last one was
    operands: tuple[Node, ...]
    results: tuple[Node, ...]
    views: tuple[Node, ...]  # made from results and operands, outside
    key: tuple[object, ...]  # equal for runs that do the same


def _is_functional(node: Node) -> bool:
    """Whether an op reads its operands, makes tensors and does nothing else."""
    target = node.target
    if target is operator.getitem:
        return True
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return False
    if target.namespace not in ("aten", "prims") or not target._schema.returns:
        return False
    if torch.Tag.nondeterministic_seeded in target.tags:
        return argument(node, "dropout_p") == 0  # attention that might draw numbers, and does not
    return True


def _is_view(node: Node) -> bool:
    """Whether the value may share the memory of an operand."""
    target = node.target
    if target is operator.getitem:
        source = node.args[0]
        assert isinstance(source, Node)
        return source.op == "call_function" and _is_view(source)
    assert isinstance(target, torch._ops.OpOverload)
    if any(result.alias_info is not None for result in target._schema.returns):
        return True
    return rules.is_view(node) or target.overloadpacket in _MAYBE_VIEWS


def _cut(graph: Graph) -> Iterator[list[Node]]:
    """The nodes between barriers, in order."""
    found: list[Node] = []
    own: set[Node] = set()
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        if node.target is operator.getitem and node.args[0] not in own:
            continue  # of a barrier
        if _is_functional(node):
            found.append(node)
            own.add(node)
        else:
            yield found
            found, own = [], set()
    yield found


def _layout(value: object) -> object:
    """What code is compiled for; None for what is no tensor of fixed sizes."""
    if not isinstance(value, torch.Tensor):
        return None
    sizes = (*value.shape, *value.stride(), value.storage_offset())
    if not all(isinstance(size, int) for size in sizes):
        return None
    begins = value.storage_offset() * value.element_size() % _ALIGNMENT
    return value.dtype, value.device, tuple(value.shape), value.stride(), begins


def _run_of(nodes: list[Node]) -> _Run | None:
    """None where the nodes cannot be a subgraph."""
    place = {node: i for i, node in enumerate(nodes)}
    operands: dict[Node, int] = {}
    layouts: list[object] = []
    ops: list[object] = []

    def token(operand: Node) -> str:
        if operand in place:
            return f"<{place[operand]}>"
        if operand not in operands:
            operands[operand] = len(operands)
            layouts.append(_layout(operand.meta.get("val")))
        return f"<operand {operands[operand]}>"

    for node in nodes:
        given = torch.fx.map_arg((node.args, node.kwargs), token)
        ops.append((node.target, repr(given)))
    if None in layouts:
        return None
    outside = {node for node in nodes if any(user not in place for user in node.users)}
    views: set[Node] = set()
    stack = [node for node in outside if _is_view(node)]
    results = {node for node in outside if not _is_view(node)}
    while stack:
        node = stack.pop()
        if node in views:
            continue
        views.add(node)
        for source in node.all_input_nodes:
            if source not in place:
                continue
            if _is_view(source):
                stack.append(source)
            else:
                results.add(source)
    if any(_layout(node.meta.get("val")) is None for node in results):
        return None  # several outputs, some read outside
    ordered = tuple(node for node in nodes if node in results)
    return _Run(
        tuple(nodes),
        tuple(operands),
        ordered,
        tuple(node for node in nodes if node in views),
        (tuple(ops), tuple(layouts), tuple(place[node] for node in ordered)),
    )


def _subgraph(run: _Run) -> GraphModule:
    graph = Graph()
    copied: dict[Node, Node] = {}
    for operand in run.operands:
        copied[operand] = graph.placeholder(operand.name)
        copied[operand].meta = dict(operand.meta)
    for node in run.nodes:
        copied[node] = copy_node(graph, node, copied.__getitem__)
    graph.output(tuple(copied[node] for node in run.results))
    graph.eliminate_dead_code()  # views that are made outside
    graph.lint()
    return GraphModule({}, graph)


def share_equal_runs(
    module: GraphModule, *, min_runs: int = MIN_RUNS, min_ops: int = MIN_OPS
) -> int:
    """Have equal runs of a graph share a subgraph, in place.

    Args:
        module: a functional aten graph with fake values in ``meta["val"]``.
        min_runs: how many equal ones are worth it.
        min_ops: and of how many ops.

    Returns:
        the number of runs that became calls.
    """
    graph = module.graph
    if any(node.target is _CALL for node in graph.nodes):
        return 0
    groups: dict[object, list[_Run]] = defaultdict(list)
    for nodes in _cut(graph):
        if sum(not _is_view(node) for node in nodes) >= min_ops:
            run = _run_of(nodes)
            if run is not None and run.results and run.operands:
                groups[run.key].append(run)
    groups = {key: runs for key, runs in groups.items() if len(runs) >= min_runs}
    if not groups:
        return 0
    names: dict[Node, str] = {}  # last node of a run -> its subgraph
    ends: dict[Node, _Run] = {}
    inside: set[Node] = set()
    for number, runs in enumerate(groups.values()):
        name = f"{NAME}_{number}"
        setattr(module, name, _subgraph(runs[0]))
        for run in runs:
            ends[run.nodes[-1]] = run
            names[run.nodes[-1]] = name
            inside.update(run.nodes)
    new = Graph(module)
    copied: dict[Node, Node] = {}
    bodies: dict[str, Node] = {}
    for node in graph.nodes:
        if node not in inside:
            copied[node] = copy_node(new, node, copied.__getitem__)
        elif node in ends:
            name, run = names[node], ends[node]
            if name not in bodies:
                bodies[name] = new.get_attr(name)
            _call(new, bodies[name], name, run, copied)
    new.lint()
    module.graph = new
    return len(ends)


def _call(new: Graph, body: Node, name: str, run: _Run, copied: dict[Node, Node]) -> None:
    call = new.call_function(_CALL, (body, name, *(copied[node] for node in run.operands)))
    call.meta["val"] = tuple(node.meta["val"] for node in run.results)
    for i, node in enumerate(run.results):
        copied[node] = new.create_node("call_function", operator.getitem, (call, i), name=node.name)
        copied[node].meta = dict(node.meta)
    for node in run.views:
        copied[node] = copy_node(new, node, copied.__getitem__)

"""Small graphs for the tests of the passes: made, run and compared without a compiler."""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from mstc.inductor import CustomGraphPass, compile_outer_eager, without_duplicates
from mstc.runtime.loop import loop_op, program_of
from passes import run_passes
from passes.axes import Axes
from passes.body import Body, sizes_of
from passes.plan import Planned, PlanOptions

EAGER = json.dumps({"kind": "eager", "config": {}})


@dataclass
class Sketch:
    """A graph made by hand, one call at a time, with the values of its inputs."""

    graph: Graph = field(default_factory=Graph)
    mode: FakeTensorMode = field(default_factory=FakeTensorMode)
    values: dict[Node, torch.Tensor] = field(default_factory=dict)

    def input(self, value: torch.Tensor, name: str | None = None) -> Node:
        node = self.graph.placeholder(name or f"primals_{len(self.values)}")
        node.meta["val"] = self.mode.from_tensor(value)
        self.values[node] = value
        return node

    def call(self, op: Any, *args: Any, **kwargs: Any) -> Node:
        """One call; tensors among the arguments become inputs of the graph."""
        lift = lambda a: self.input(a) if isinstance(a, torch.Tensor) else a  # noqa: E731
        args, kwargs = pytree.tree_map(lift, (args, kwargs))
        node = self.graph.call_function(op, args, kwargs)
        fake_args, fake_kwargs = torch.fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        with self.mode:
            node.meta["val"] = op(*fake_args, **fake_kwargs)
        return node

    def outputs_of(self, node: Node) -> list[Node]:
        """The tensors that a call makes."""
        value = node.meta["val"]
        if not isinstance(value, (tuple, list)):
            return [node]
        return [self.call(operator.getitem, node, i) for i in range(len(value))]

    def finish(self, outputs: Sequence[Node]) -> list[torch.Tensor]:
        """Close the graph; its outputs as the graph computes them on the input values."""
        self.graph.output(tuple(outputs))
        self.graph.lint()
        return run_graph(self.graph, list(self.values.values()))


def run_graph(graph: Graph, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    with torch.no_grad():
        return list(Interpreter(GraphModule({}, graph)).run(*inputs))


def run_body(
    body: Body, axes: Axes, values: dict[Node, torch.Tensor], chunk: int
) -> list[torch.Tensor]:
    """Run a body through the runtime's loop, op by op."""
    sizes = [int(s) for s in sizes_of(body, axes)]
    with torch.no_grad():
        return program_of(body.spec, EAGER).run([values[n] for n in body.inputs], sizes, chunk)


def trace(fn: Callable[..., Any], *inputs: torch.Tensor, symbolic: bool = False) -> Graph:
    """The aten graph of a function without gradients."""
    mode = "symbolic" if symbolic else "fake"
    return make_fx(fn, tracing_mode=mode)(*inputs).graph


def plan_options(**changes: Any) -> PlanOptions:
    return PlanOptions(**{"min_rows": 1, "min_peak_bytes": 0, **changes})


class Recorder(CustomGraphPass):
    """Runs the passes, keeps what they found, and lets their mistakes through."""

    def __init__(self, **options: Any) -> None:
        self.options = plan_options(**options)
        self.graphs: list[Graph] = []  # what was planned
        self.planned: list[Planned] = []

    def uuid(self) -> object:
        return None

    def __call__(self, graph: Graph) -> None:
        seen = without_duplicates(graph)
        planned = run_passes(
            seen, self.options, min_region_bytes=1, loop_op=loop_op, lowering=EAGER
        )
        self.graphs.append(seen)
        self.planned.append(planned)
        if planned.chunked is None:
            return
        for node in reversed(graph.nodes):
            graph.erase_node(node)
        copied: dict[Node, Node] = {}
        for node in planned.chunked.graph.nodes:
            copied[node] = graph.node_copy(node, copied.__getitem__)

    @property
    def modes(self) -> list[str]:
        return [p.mode for planned in self.planned for p in planned.plan.loops]

    @property
    def chunks(self) -> list[int]:
        return [p.num_chunks for planned in self.planned for p in planned.plan.loops]

    @property
    def reasons(self) -> str:
        return "\n".join(str(r) for planned in self.planned for r in planned.plan.refusals)


class _Functional(torch.nn.Module):
    """A function as the module that AOTAutograd wants."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, *inputs: torch.Tensor) -> tuple[Any, ...]:
        made = self.fn(*inputs)
        return tuple(made) if isinstance(made, (tuple, list)) else (made,)


def compiled(
    fn: Callable[..., Any], inputs: Sequence[torch.Tensor], recorder: Recorder
) -> Callable[..., Any]:
    """The road of a graph without Dynamo and Inductor: AOTAutograd, the passes, the partitioner."""
    return compile_outer_eager(_Functional(fn), inputs, recorder)  # type: ignore[arg-type]


def gradients_of(
    fn: Callable[..., Any], inputs: Sequence[torch.Tensor], recorder: Recorder | None
) -> list[torch.Tensor]:
    """Outputs, then gradients of the inputs that require them, of a functional model.

    Args:
        fn: takes the inputs, returns the loss, or several outputs (which get fixed gradients).
        inputs: those that require gradients get them.
        recorder: through AOTAutograd with the passes; None runs `fn` as it is.
    """
    leaves = [t.detach().clone().requires_grad_(t.requires_grad) for t in inputs]
    run = _Functional(fn) if recorder is None else compiled(fn, leaves, recorder)
    outputs = list(run(*leaves))
    results = [o.detach() for o in outputs]
    wanted = [t for t in leaves if t.requires_grad]
    live = [o for o in outputs if o.requires_grad]
    if wanted and live:
        starts = [torch.linspace(0.5, 1.5, o.numel(), dtype=o.dtype).view(o.shape) for o in live]
        grads = torch.autograd.grad(live, wanted, starts, allow_unused=True)
        results += [torch.zeros(()) if g is None else g for g in grads]
    return results


def assert_close(got: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    """Equal up to the rounding of float64 sums in another order."""
    assert len(got) == len(expected)
    sizes = [e.abs().max().item() for e in expected if e.is_floating_point() and e.numel()]
    atol = 1e-11 * max([1.0, *(s for s in sizes if math.isfinite(s))])
    for index, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.dtype == b.dtype, index
        tight: dict[str, Any] = {"rtol": 1e-10, "atol": atol} if a.dtype == torch.float64 else {}
        torch.testing.assert_close(
            a, b, equal_nan=True, msg=lambda m, i=index: f"{i}: {m}", **tight
        )

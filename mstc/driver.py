"""One compilation on one screen.

Dynamo graph --open--> Dynamo graph that takes no deferred tensor
             --defer--> Dynamo graph without the logits
             --AOTAutograd--> joint graph --ChunkPass--> joint graph with loops
             --partitioner, Inductor--> a callable, wrapped so that deferred outputs come back
"""

from __future__ import annotations

import dataclasses
import json
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch.fx import Graph, GraphModule, Node

import passes
from mstc import history
from mstc.budget import settle
from mstc.errors import FallbackWarning
from mstc.inductor import (
    CustomGraphPass,
    attribute_source,
    compile_outer,
    compile_outer_eager,
    detect_fake_mode,
    get_hash_for_files,
    show_outer,
    wants_eager_random_numbers,
    without_duplicates,
)
from mstc.observe import Observer, dump
from mstc.options import Options, Setting
from mstc.report import Report, graph_report, subject_of
from mstc.runtime import flops  # noqa: F401  (tells PyTorch how much loops do)
from mstc.runtime.deferred import DeferredTensor, opening_of, plain_example, wrap_outputs
from mstc.runtime.loop import Call, loop_op, prepare_bodies
from mstc.saved import load_report, report_key, save_report
from passes.copies import copy_node
from passes.defer import DeferResult, defer_outputs
from passes.grouped import replace_grouped
from passes.liveness import tangent_nodes
from passes.open import Opening, open_inputs
from passes.plan import AT_PEAK, PlanOptions, matching
from passes.records import FixedLoop, Plan

log = logging.getLogger(__name__)

MIN_ROWS = {"cpu": 256, "cuda": 2048}  # below these, matrix products slow down
_SOURCES = tuple(
    str(p)
    for package in (Path(passes.__file__).parent, Path(__file__).parent)
    for p in sorted(package.rglob("*.py"))
)


def _replace_contents(graph: Graph, new: Graph) -> None:
    """Make `graph` say what `new` says: Inductor's hook wants the change in place."""
    for node in reversed(graph.nodes):
        graph.erase_node(node)
    copied: dict[Node, Node] = {}
    for node in new.nodes:
        copied[node] = copy_node(graph, node, copied.__getitem__)


def _call(node: Node) -> Call | None:
    """What a loop node will be called with, if all sizes are known."""
    inputs, sizes, chunk, spec, lowering = cast("Any", node.args)
    values = tuple(i.meta["val"] for i in inputs)
    if not all(isinstance(s, int) for v in values for s in (*v.shape, *v.stride(), *sizes)):
        return None
    return Call(values, tuple(sizes), chunk, spec, lowering)


def _fall_back(error: Exception, report: Report) -> None:
    """Say that a pass failed; the graph stays as it is."""
    log.debug("a pass failed", exc_info=error)
    report.notes.append(f"a graph was left as it was: {type(error).__name__}: {error}")
    warnings.warn(
        f'backend="mst" left a graph as it was, because a pass failed '
        f"({type(error).__name__}: {error}). "
        "Training goes on as with Inductor. Please report this.",
        FallbackWarning,
        stacklevel=3,
    )


_NOT_OF_THIS_GRAPH = (
    'options["plan"] has no loop for a graph that needs memory: it was made for another model, '
    "or for other versions of its code. The graph goes to Inductor as it is; mstc.last_report() "
    "has the loops."
)


def _missing(fixed: Sequence[FixedLoop] | None, plan: Plan) -> list[str]:
    """What a given plan has and this graph has not."""
    made = {matching(loop.region, fixed or ()) for loop in plan.loops}
    missing = [str(loop) for loop in fixed or () if loop not in made]
    if not missing:
        return []
    return [f"the given plan has loops that this graph does not have: {'; '.join(missing)}"]


class ChunkPass(CustomGraphPass):
    """Our place in Inductor: sees every joint graph, and every inference graph, before it does
    anything to it."""

    def __init__(self, options: Options, report: Report, *, is_record: bool = False) -> None:
        self.options = options
        self.report = report
        self.is_record = is_record  # of what eager code does to deferred outputs
        self.has_run = False
        self.fixed = None if is_record else options.fixed_loops  # a plan is made of models
        self.calls: list[Call] = []  # loops of fixed sizes, whose bodies can be compiled ahead

    def uuid(self) -> object:
        """Two compilations may share a cache entry only if our code and options are the same."""
        options = self.options
        own = {k: v for k, v in vars(options).items() if k not in ("inductor", "setting")}
        own |= dataclasses.asdict(options.setting)
        return get_hash_for_files(_SOURCES, json.dumps([own, self.is_record], sort_keys=True))

    def plan_options(self, graph: Graph) -> PlanOptions:
        kinds = {
            n.meta["val"].device.type
            for n in graph.nodes
            if isinstance(n.meta.get("val"), torch.Tensor)
        }
        default = max((MIN_ROWS.get(k, MIN_ROWS["cpu"]) for k in kinds), default=MIN_ROWS["cpu"])
        return PlanOptions(
            min_rows=self.options.min_chunk_rows or default,
            min_peak_bytes=self.options.min_peak_bytes,
            chunk_rows=self.options.chunk_rows,
            gradient_in_forward=self.options.gradient_in_forward,
            fixed=self.fixed,
            tightness=None if self.is_record else self.options.setting.tightness,
            least_divisor=self.options.setting.least_divisor,
        )

    def __call__(self, graph: Graph) -> None:
        self.has_run = True
        lowering = {"kind": self.options.lowering, "config": self.options.body_config()}
        try:
            planned = passes.run_passes(
                without_duplicates(graph),
                self.plan_options(graph),
                min_region_bytes=self.options.min_region_bytes,
                all_axes=self.is_record,
                count_random=not wants_eager_random_numbers(),
                loop_op=loop_op,
                lowering=json.dumps(lowering, sort_keys=True),
                observe=Observer(),
            )
        except Exception as error:  # a mistake of ours must not cost the user the run
            _fall_back(error, self.report)
            return
        if planned.chunked is not None:
            _replace_contents(graph, planned.chunked.graph)
            for loop in planned.chunked.loops:
                history.name_body(loop.body.spec, subject_of(loop.plan.region.seed))
            self.calls += [c for loop in planned.chunked.loops if (c := _call(loop.node))]
        self.report.notes += _missing(self.fixed, planned.plan)
        is_large = planned.plan.peak_before >= self.options.min_peak_bytes
        if self.fixed and not planned.plan.loops and is_large:
            warnings.warn(_NOT_OF_THIS_GRAPH, FallbackWarning, stacklevel=2)
        least = AT_PEAK * planned.plan.before.peak_bytes
        self.report.refusals = [r for r in self.report.refusals if r.nbytes >= least]
        entry = graph_report(planned.plan, training=bool(tangent_nodes(graph)))
        self.report.graphs.append(entry)
        dump("mst_report", self.report.to_json, encoding="json")
        log.info("%s", self.report)


def _deferred(gm: GraphModule, options: Options, report: Report) -> DeferResult | None:
    """Step one; None when no output leaves the graph."""
    if not options.defer_outputs:
        return None
    try:
        result = defer_outputs(gm, min_bytes=options.min_deferred_bytes)
    except Exception as error:  # as above
        _fall_back(error, report)
        return None
    report.refusals += result.refusals
    for output in result.deferred:
        shape = "x".join(map(str, output.shape))
        report.deferred.append(
            f"output {', '.join(map(str, output.indices))} "
            f"({shape}, {output.nbytes / 2**20:.1f} MiB) at {output.source}"
        )
    if not result.deferred:
        return None
    return result


@dataclass(frozen=True)
class _Opened:
    """A Dynamo graph that takes no deferred tensor any more."""

    graph: GraphModule
    inputs: list[Any]  # example inputs
    parts: frozenset[int]  # positions of inputs that are computed inside, from their parts
    values: frozenset[int]  # positions of inputs that are passed as plain tensors

    def arguments(self, args: Sequence[Any]) -> list[Any]:
        """What the graph is to be called with."""
        flat: list[Any] = []
        for index, arg in enumerate(args):
            if index in self.parts:
                flat += arg.pass_on()
            else:
                flat.append(arg.materialize() if index in self.values else arg)
        return flat


def _open(gm: GraphModule, example_inputs: Sequence[Any], report: Report) -> _Opened:
    """Have deferred inputs computed in the graph; one that it writes to is passed as values."""
    openings: dict[int, Opening] = {}
    inputs: list[Any] = []
    plain: dict[int, torch.Tensor] = {}
    returned = gm.graph.output_node().all_input_nodes
    results = [n.meta.get("example_value") for n in returned]
    for index, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        example = node.meta.get("example_value")
        opening = opening_of(example, attribute_source(node), results)
        if opening is not None:
            openings[index] = opening
            inputs += opening.parts
            report.notes.append(f"input {index} is a deferred output: it is computed in the graph")
        elif isinstance(example, DeferredTensor) and example.has_parts:
            mode = detect_fake_mode(example_inputs)
            assert mode is not None, "Dynamo traces with fake tensors"
            with mode:
                plain[index] = plain_example(example)
            inputs.append(plain[index])
            report.notes.append(
                f"input {index} is a deferred output, but the graph writes to it or returns a view "
                "of it: it is computed before. Pass a copy (logits.clone()), or return no view"
            )
        else:
            if isinstance(example, DeferredTensor):
                report.notes.append(
                    f"input {index} was a deferred output, but it has been looked at, written to "
                    "or hooked onto: its values are there already. Call the function before that"
                )
            inputs.append(example_inputs[index])
    if not openings and not plain:
        return _Opened(gm, list(example_inputs), frozenset(), frozenset())
    graph = open_inputs(gm, openings, plain)
    return _Opened(graph, inputs, frozenset(openings), frozenset(plain))


class RecordCompiler:
    """Compiles what eager code does to a graph's deferred outputs, with the graph's options."""

    def __init__(self, options: Options) -> None:
        if "triton.cudagraphs" in options.inductor:
            # A recorded result may be held until after the next run of the same graph.
            own = {**options.inductor, "triton.cudagraphs": False}
            options = dataclasses.replace(options, inductor=own)
        self.options = options
        self.key = repr(options)  # records may share what was compiled with equal options

    def __call__(
        self, graph: GraphModule, inputs: Sequence[torch.Tensor]
    ) -> Callable[..., Sequence[torch.Tensor]]:
        """A callable with the graph's inputs and outputs."""
        report = Report()
        history.add(report)
        report.notes.append("what eager code does to a deferred output, recorded")
        return _compile(graph, inputs, self.options, report)


@dataclass(frozen=True)
class _Prepared:
    """What AOTAutograd gets of a Dynamo graph, and the way back from it."""

    opened: _Opened
    result: DeferResult | None  # None when no output leaves the graph
    compile_record: RecordCompiler

    @property
    def graph(self) -> GraphModule:
        return self.opened.graph if self.result is None else self.result.graph_module

    @property
    def inputs(self) -> list[Any]:
        return self.opened.inputs

    def wrap(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """A callable with the Dynamo graph's inputs and outputs."""
        opened, result = self.opened, self.result
        if not opened.parts and not opened.values and result is None:
            return compiled

        def call(*args: Any) -> Any:
            args = tuple(opened.arguments(args))
            outputs = compiled(*args)
            if result is None:
                return outputs
            return wrap_outputs(
                result.deferred,
                outputs,
                args,
                num_outputs=result.num_outputs,
                compile_record=self.compile_record,
            )

        return call


def _prepare(
    gm: GraphModule, example_inputs: Sequence[Any], options: Options, report: Report
) -> _Prepared:
    replace_grouped(gm)
    opened = _open(gm, example_inputs, report)
    return _Prepared(opened, _deferred(opened.graph, options, report), RecordCompiler(options))


def analyze_graph(
    gm: GraphModule, example_inputs: Sequence[Any], options: Options
) -> tuple[Report, Callable[..., Any]]:
    """Find out what would be done to a Dynamo graph, and compile nothing.

    Returns:
        the report, and a callable that runs the graph op by op, deferred outputs and all.
    """
    report = Report()
    prepared = _prepare(gm, example_inputs, options, report)
    options = _settled(prepared.graph, prepared.inputs, options, report, prepared.opened.graph)
    show_outer(prepared.graph, prepared.inputs, ChunkPass(options, report))
    return report, prepared.wrap(prepared.graph.forward)


def _restore(report: Report, key: str) -> None:
    """PyTorch had the compiled graph in its cache: the report is the one of that compilation."""
    kept = load_report(key)
    if kept is None:
        report.notes.append(
            "the compiled graph came from PyTorch's cache, so no pass ran, and the report of its "
            "compilation was not kept: mstc.explain(model, ...) makes it again"
        )
        return
    vars(report).update(vars(kept))
    report.notes.append("the compiled graph came from PyTorch's cache, with this report")


def compile_graph(
    gm: GraphModule, example_inputs: Sequence[Any], options: Options
) -> Callable[..., Any]:
    """Compile one Dynamo graph.

    Args:
        gm: the graph as Dynamo made it.
        example_inputs: fake or real inputs, in the order of its placeholders.
        options: what the user asked for.

    Returns:
        a callable with the graph's inputs and outputs.
    """
    report = Report()
    if options.lowering != "emit":  # a simulation is nobody's latest compilation
        history.add(report)
    prepared = _prepare(gm, example_inputs, options, report)
    compiled = _compile(prepared.graph, prepared.inputs, options, report, prepared.opened.graph)
    return prepared.wrap(compiled)


def _settled(
    graph: GraphModule,
    inputs: Sequence[Any],
    options: Options,
    report: Report,
    subject: GraphModule | None,
) -> Options:
    """The options, with the setting that the memory budget asks for, if there is one."""
    if options.memory_budget is None or options.setting != Setting() or subject is None:
        return options

    def compiled(gm: GraphModule, own: Sequence[Any], tried: Options) -> Callable[..., Any]:
        return _compile(gm, own, tried, Report(), gm)

    # one answer for a simulation and for what it is of
    asked = ChunkPass(dataclasses.replace(options, lowering="inductor"), report)
    key = report_key(subject, asked.uuid(), options.inductor)
    options, line = settle(graph, inputs, options, compiled, key)
    report.notes.append(line)
    return options


def _compile(
    graph: GraphModule,
    inputs: Sequence[Any],
    options: Options,
    report: Report,
    subject: GraphModule | None = None,
) -> Callable[..., Any]:
    """Compile a graph that neither takes nor returns deferred tensors.

    Args:
        graph: to be compiled, for `inputs`.
        options: what the user asked for.
        report: filled by our pass, or from what was kept beside PyTorch's cache.
        subject: the Dynamo graph that the report is about; None for a record.
    """
    options = _settled(graph, inputs, options, report, subject)
    graph_pass = ChunkPass(options, report, is_record=subject is None)
    share = options.setting.activation_budget
    if options.lowering == "eager":
        return compile_outer_eager(graph, inputs, graph_pass, share)
    build = options.lowering != "emit"
    key = report_key(subject or graph, graph_pass.uuid(), options.inductor)
    compiled = compile_outer(
        graph, inputs, graph_pass, options.inductor, build=build, activation_budget=share
    )
    prepare_bodies(graph_pass.calls)
    if not build:
        return compiled
    if graph_pass.has_run:
        save_report(key, report)
    else:
        _restore(report, key)
    return compiled

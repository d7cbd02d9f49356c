"""One compilation on one screen.

Dynamo graph --open--> Dynamo graph that takes no deferred tensor
             --defer--> Dynamo graph without the logits
             --detach--> Dynamo graph that makes no gradient for keys and values
             --AOTAutograd--> joint graph --ChunkPass--> joint graph with loops
             --partitioner, Inductor--> a callable, wrapped so that deferred outputs come back
"""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch.fx import Graph, GraphModule, Node

import passes
from mstc import history
from mstc.budget import settle
from mstc.collector import no_collections
from mstc.device import FEWER_ROWS, is_measured, kinds_of, machine_of, min_rows
from mstc.errors import FallbackWarning
from mstc.inductor import (
    CustomGraphPass,
    compile_outer,
    compile_outer_eager,
    get_hash_for_files,
    show_outer,
    wants_eager_random_numbers,
    without_duplicates,
)
from mstc.observe import Observer, dump
from mstc.options import Options, Setting
from mstc.partition import after_partition
from mstc.prepare import prepare
from mstc.report import Report, fall_back, graph_report, subject_of
from mstc.runtime import flops  # noqa: F401  (tells PyTorch how much loops do)
from mstc.runtime.loop import Call, loop_op, prepare_bodies
from mstc.saved import load_report, report_key, save_report
from passes.copies import copy_node
from passes.liveness import tangent_nodes
from passes.plan import AT_PEAK, PlanOptions, matching
from passes.records import FixedLoop, Plan

log = logging.getLogger(__name__)

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
        kinds, machine = kinds_of(graph), machine_of(graph)
        own = self.options.min_chunk_rows
        return PlanOptions(
            min_rows=own or min_rows(kinds),
            fewer_rows=FEWER_ROWS if machine is not None and own is None else None,
            min_peak_bytes=self.options.min_peak_bytes,
            chunk_rows=self.options.chunk_rows,
            gradient_in_forward=self.options.gradient_in_forward,
            fixed=self.fixed,
            tightness=None if self.is_record else self.options.setting.tightness,
            least_divisor=self.options.setting.least_divisor,
            machine=machine,
            # measured on CPUs only (docs/axes.md)
            loop_axes=self.options.setting.loop_axes
            or ("either" if kinds == {"cpu"} else "tokens"),
        )

    def lowering(self) -> str:
        """What the loops of a plan are told."""
        lowering = {"kind": self.options.lowering, "config": self.options.body_config()}
        return json.dumps(lowering, sort_keys=True)

    def __call__(self, graph: Graph) -> None:
        self.has_run = True
        try:
            with no_collections():
                planned = passes.run_passes(
                    without_duplicates(graph),
                    self.plan_options(graph),
                    min_region_bytes=self.options.min_region_bytes,
                    all_axes=self.is_record,
                    count_random=not wants_eager_random_numbers(),
                    loop_op=loop_op,
                    lowering=self.lowering(),
                    observe=Observer(),
                )
        except Exception as error:  # a mistake of ours must not cost the user the run
            fall_back(error, self.report)
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


class _TimesPass(ChunkPass):
    """Predicts the times of a graph's steps under several settings, and does nothing to it."""

    def __init__(self, options: Options, settings: Sequence[Setting]) -> None:
        super().__init__(options, Report())
        self._settings = settings
        self.found: list[float | None] = [None] * len(settings)

    def __call__(self, graph: Graph) -> None:
        options = self.plan_options(graph)
        if options.machine is None:
            return
        with no_collections():
            self.found = passes.relative_times(
                without_duplicates(graph),
                [dataclasses.replace(options, tightness=one.tightness) for one in self._settings],
                min_region_bytes=self.options.min_region_bytes,
                count_random=not wants_eager_random_numbers(),
                loop_op=loop_op,
                lowering=self.lowering(),
            )


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

    def with_all_gradients(
        self, graph: GraphModule, inputs: Sequence[Any]
    ) -> Callable[..., Sequence[Any]]:
        """As above, for a graph whose detached outputs somebody differentiates through."""
        report = Report()
        history.add(report)
        report.notes.append("compiled again: somebody differentiates through all of its outputs")
        own = copy.deepcopy(graph.graph)  # compiling changes it
        return _compile(GraphModule(graph, own), inputs, self.options, report, graph)


def analyze_graph(
    gm: GraphModule, example_inputs: Sequence[Any], options: Options
) -> tuple[Report, Callable[..., Any]]:
    """Find out what would be done to a Dynamo graph, and compile nothing.

    Returns:
        the report, and a callable that runs the graph op by op, deferred outputs and all.
    """
    report = Report()
    prepared = prepare(gm, example_inputs, options, report, RecordCompiler(options))
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
    prepared = prepare(gm, example_inputs, options, report, RecordCompiler(options))
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

    def times(
        gm: GraphModule, own: Sequence[Any], settings: Sequence[Setting]
    ) -> list[float | None]:
        predicted = _TimesPass(options, settings)
        if all(is_measured(t) for t in own if isinstance(t, torch.Tensor)):
            try:
                show_outer(gm, own, predicted)
            except Exception as error:  # a mistake of ours: all settings are tried
                log.debug("times cannot be predicted", exc_info=error)
        return predicted.found

    # one answer for a simulation and for what it is of
    asked = ChunkPass(dataclasses.replace(options, lowering="inductor"), report)
    key = report_key(subject, asked.uuid(), options.inductor)
    options, line = settle(graph, inputs, options, compiled, times, key)
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
    after = after_partition(graph, options, report)
    if options.lowering == "eager":
        return compile_outer_eager(graph, inputs, graph_pass, share, after)
    build = options.lowering != "emit"
    key = report_key(subject or graph, graph_pass.uuid(), options.inductor)
    compiled = compile_outer(
        graph,
        inputs,
        graph_pass,
        options.inductor,
        build=build,
        activation_budget=share,
        after_partition=after,
        offloads=options.setting.offload,
    )
    prepare_bodies(graph_pass.calls)
    if not build:
        return compiled
    if graph_pass.has_run:
        save_report(key, report)
    else:
        _restore(report, key)
    return compiled

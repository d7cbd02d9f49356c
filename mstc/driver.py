"""One compilation on one screen.

Dynamo graph --defer--> Dynamo graph without the logits
             --AOTAutograd--> joint graph --ChunkPass--> joint graph with loops
             --partitioner, Inductor--> a callable, wrapped so that deferred outputs come back
"""

from __future__ import annotations

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
from mstc.errors import FallbackWarning
from mstc.inductor import (
    CustomGraphPass,
    compile_outer,
    compile_outer_eager,
    get_hash_for_files,
    without_duplicates,
)
from mstc.observe import Observer, dump
from mstc.options import Options
from mstc.report import Report, graph_report
from mstc.runtime.deferred import wrap_outputs
from mstc.runtime.loop import Call, loop_op, prepare_bodies
from mstc.saved import load_report, report_key, save_report
from passes.defer import DeferResult, defer_outputs
from passes.liveness import tangent_nodes
from passes.plan import AT_PEAK, PlanOptions

log = logging.getLogger(__name__)

_MIN_ROWS = {"cpu": 256, "cuda": 2048}  # below these, matrix products slow down
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
        copied[node] = graph.node_copy(node, copied.__getitem__)


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


class ChunkPass(CustomGraphPass):
    """Our place in Inductor: sees every joint graph, and every inference graph, before it does
    anything to it."""

    def __init__(self, options: Options, report: Report) -> None:
        self.options = options
        self.report = report
        self.has_run = False
        self.calls: list[Call] = []  # loops of fixed sizes, whose bodies can be compiled ahead

    def uuid(self) -> object:
        """Two compilations may share a cache entry only if our code and options are the same."""
        options = self.options
        own = {k: v for k, v in vars(options).items() if k != "inductor"}
        return get_hash_for_files(_SOURCES, json.dumps(own, sort_keys=True))

    def plan_options(self, graph: Graph) -> PlanOptions:
        kinds = {
            n.meta["val"].device.type
            for n in graph.nodes
            if isinstance(n.meta.get("val"), torch.Tensor)
        }
        default = max((_MIN_ROWS.get(k, _MIN_ROWS["cpu"]) for k in kinds), default=_MIN_ROWS["cpu"])
        return PlanOptions(
            min_rows=self.options.min_chunk_rows or default,
            min_peak_bytes=self.options.min_peak_bytes,
            chunk_rows=self.options.chunk_rows,
            gradient_in_forward=self.options.gradient_in_forward,
        )

    def __call__(self, graph: Graph) -> None:
        self.has_run = True
        lowering = {"kind": self.options.lowering, "config": self.options.body_config()}
        try:
            planned = passes.run_passes(
                without_duplicates(graph),
                self.plan_options(graph),
                min_region_bytes=self.options.min_region_bytes,
                loop_op=loop_op,
                lowering=json.dumps(lowering, sort_keys=True),
                observe=Observer(),
            )
        except Exception as error:  # a mistake of ours must not cost the user the run
            _fall_back(error, self.report)
            return
        if planned.chunked is not None:
            _replace_contents(graph, planned.chunked.graph)
            self.calls += [c for loop in planned.chunked.loops if (c := _call(loop.node))]
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
    for old, new in zip(
        gm.graph.find_nodes(op="placeholder"),
        result.graph_module.graph.find_nodes(op="placeholder"),
        strict=True,
    ):
        if hasattr(old, "_dynamo_source"):  # AOTAutograd reads from it which inputs are parameters
            new._dynamo_source = old._dynamo_source  # type: ignore[attr-defined]
    return result


def analyze_graph(gm: GraphModule, example_inputs: Sequence[Any], options: Options) -> Report:
    """Find out what would be done to a Dynamo graph, and compile nothing."""
    report = Report()
    result = _deferred(gm, options, report)
    inner = gm if result is None else result.graph_module
    compile_outer_eager(inner, example_inputs, ChunkPass(options, report))
    return report


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
    history.add(report)
    graph_pass = ChunkPass(options, report)
    key = report_key(gm, graph_pass.uuid(), options.inductor)  # before anything changes the graph
    result = _deferred(gm, options, report)
    inner = gm if result is None else result.graph_module
    if options.lowering == "eager":
        compiled = compile_outer_eager(inner, example_inputs, graph_pass)
    else:
        compiled = compile_outer(inner, example_inputs, graph_pass, options.inductor)
        prepare_bodies(graph_pass.calls)
        if graph_pass.has_run:
            save_report(key, report)
        else:
            _restore(report, key)
    if result is None:
        return compiled
    deferred, count = result.deferred, result.num_outputs

    def call(*args: Any) -> list[Any]:
        return wrap_outputs(deferred, compiled(*args), args, num_outputs=count)

    return call
